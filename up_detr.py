"""UP-DETR: Unsupervised Pre-training for Object Detection with Transformers
Zhigang Dai, Bolun Cai, Yugeng Lin, Junying Chen. CVPR 2021, arXiv 2011.09094

DETR finds objects with a transformer that is trained from scratch, slowly. Here it is pre-trained
without labels: cut random patches out of an image, give their features to the decoder's queries,
and ask where in the image they come from. The CNN is frozen, so that it goes on telling things
apart, and an attention mask lets several patches be searched for at once.

    python up_detr.py                                          # a few CPU minutes, no download
    torchrun --nproc_per_node=8 up_detr.py --data /data/coco --backbone swav.pt
    python up_detr.py --finetune /data/mine                    # boxes of your own, in COCO's layout
    python up_detr.py --detect picture.jpg                     # what the fine-tuned detector finds

Read DETR first (arXiv 2005.12872): Attention, DETR, match and set_loss are that paper.

The paper's p is features, sigma match, lambda_c none_weight; its query patches are patches.
Shapes: B images per process, W processes, D features of the CNN, C width of the transformer, S
positions, N queries, M patches per image, P x P pixels of a patch, L layers, T boxes in the batch.
Measured: 31.9 % AP50 after fine-tuning on 300 scenes (from scratch 14.1 %), mean of 3 seeds.
"""

import argparse
import copy
import io
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torchvision.ops import MLP, FrozenBatchNorm2d, box_convert, generalized_box_iou_loss

import harness  # command line, checkpoint, log: what every run leaves on disk
import scenes  # pictures with boxes, and average precision
from common import Augment, fail, health, make_generator, rank, resnet, world_size

# scenes: two cores. coco: chosen here, for one GPU. paper: section 4.1 and the official code.
SETTINGS = {
    "recipe":              ("scenes",   "coco",     "paper",    "what the columns are for"),
    "backbone":            ("runs/swav-patterns/backbone.pt", "", "", "weights of the CNN"),
    "arch":                ("thin",     "resnet50", "resnet50", "thin, or a ResNet of torchvision"),
    "size":                (64,         512,        480,        "side of an image, in pixels"),
    "dilation":            (1,          0,          0,          "1: layer4 keeps layer3's stride"),
    "patch_size":          (32,         128,        128,        "side of a patch, once resized"),
    "patch_min":           (12,         64,         8,          "least side of a patch, in pixels"),
    "patch_max":           (36,         0,          0,          "largest; 0: size - patch_min"),
    "width":               (64,         256,        256,        "C, width of the transformer"),
    "heads":               (4,          8,          8,          "heads of each attention"),
    "encoder_layers":      (2,          6,          6,          "layers of the encoder"),
    "decoder_layers":      (3,          6,          6,          "layers of the decoder"),
    "ffn_dim":             (256,        2048,       2048,       "hidden width of each layer"),
    "dropout":             (0.0,        0.1,        0.1,        "in the transformer"),
    "queries":             (12,         100,        100,        "N, object queries"),
    "query_patches":       (6,          10,         10,         "M, patches per image"),
    "jitter":              (0.0,        1.0,        1.0,        "of a patch's colours; 0: none"),
    "query_mask":          (0.1,        0.1,        0.1,        "queries that get no patch, of 1"),
    "query_shuffle":       (0,          0,          0,          "1: permute the queries per step"),
    "reconstruction":      (3.0,        1.0,        1.0,        "weight of the feature loss"),
    "other_patches":       (0,          0,          0,          "1: of another image (a control)"),
    "unlabelled":          (4000,       0,          0,          "images to pre-train on; 0: all"),
    "epochs":              (12,         30,         60,         "of pre-training"),
    "batch_size":          (32,         32,         256,        "images per step, all processes"),
    "lr":                  (1e-3,       1e-4,       1e-4,       "of the transformer"),
    "lr_backbone":         (0.0,        0.0,        0.0,        "of the CNN; 0: frozen"),
    "warmup_epochs":       (1.0,        0.0,        0.0,        "epochs of linear warm-up"),
    "weight_decay":        (1e-4,       1e-4,       1e-4,       "on all parameters"),
    "clip":                (1.0,        0.1,        0.1,        "norm to which gradients are cut"),
    "labelled":            (300,        0,          0,          "images to fine-tune on; 0: all"),
    "tune_epochs":         (30,         50,         150,        "of fine-tuning"),
    "tune_batch_size":     (30,         16,         16,         "images per step of fine-tuning"),
    "tune_lr":             (2e-3,       1e-4,       1e-4,       "of the transformer"),
    "tune_lr_backbone":    (5e-4,       5e-5,       5e-5,       "of the CNN, from layer2 on"),
    "scratch_lr":          (2e-3,       1e-4,       1e-4,       "tune_lr without pre-training"),
    "scratch_epochs":      (30,         50,         150,        "tune_epochs without pre-training"),
    "eval_every":          (10,         10,         10,         "epochs between evaluations"),
}  # fmt: skip
KEPT = ("backbone.", "standardize.")  # what training from scratch starts with
LEFT = ("class_head.", "feature_head.", "patch_to_query.", "standardize_patch.", "mask")  # behind
USES = {
    "data": "scenes, a folder in COCO's layout, or pictures without boxes",
    "finetune": "fine-tune the pre-trained model of --out on this folder's boxes",
    "detect": "draw what the fine-tuned model of --out finds on this picture",
}


# -------------------------------------------------------------------------------------- method
def build_views(args):
    """The image as it is, and a patch with SimCLR's colours (official code); neither is flipped."""
    s = args.jitter
    image = Augment(args.size, flip=0.0)
    patch = Augment(
        size=args.patch_size,
        flip=0.0,
        jitter=(0.4 * s, 0.4 * s, 0.4 * s, 0.1 * s),  # brightness, contrast, saturation, hue
        jitter_p=0.8,
        grayscale=0.2 * s,
        blur=0.5 if args.patch_size > 64 else 0.0,  # small patches are not blurred
    )
    return [image, patch]


def draw_patches(n, args, generator):
    """Random boxes in n images: (n, M, 4), top, left, height and width in pixels. All sides from
    patch_min to patch_max are equally likely, and all places (official code)."""
    # Paper: sides up to size - patch_min. Here, on scenes: about as large as an object.
    most = args.patch_max or args.size - args.patch_min
    sides = torch.rand(n, args.query_patches, 2, generator=generator)
    sides = (args.patch_min + (most - args.patch_min) * sides).round()
    corner = torch.rand(sides.shape, generator=generator)
    corner = (corner * (args.size - sides + 1)).floor()
    return torch.cat([corner, sides], dim=2)


def cut_patches(images, args, generator):
    """images uint8 (B, 3, H, W) -> what UPDETR.forward takes. With W processes, each draws for the
    whole batch and uses its own part, so that together they make the patches of one process."""
    image_view, patch_view = build_views(args)
    n = len(images)
    boxes = draw_patches(world_size() * n, args, generator)
    count = len(boxes) * args.query_patches
    draws = patch_view.draw(count, generator)
    chance = torch.rand(len(boxes), args.queries, generator=generator)
    given = chance >= args.query_mask
    order = torch.arange(args.queries)
    if args.query_shuffle:  # section 3.2.2
        order = torch.randperm(args.queries, generator=generator)

    boxes = share(boxes)  # (B, M, 4)
    draws = {name: share(drawn) for name, drawn in draws.items()}
    sources = images.roll(1, 0) if args.other_patches else images
    sources = sources.repeat_interleave(args.query_patches, 0)  # (BM, 3, H, W)
    patches = patch_view.apply(sources, boxes.flatten(0, 1), draws)
    patches = patches.unflatten(0, (n, -1))  # (B, M, 3, P, P)
    x = image_view.plain(images)
    boxes = to_centre(boxes, args)
    given = share(given)  # (B, N)
    inputs = [x, patches, boxes, given, order]
    return [part.to(x.device) for part in inputs]


def to_centre(boxes, args):
    """(..., 4): top, left, height and width in pixels -> centre and sides from 0 to 1."""
    top, left, height, width = boxes.unbind(-1)
    x = left + width / 2
    y = top + height / 2
    boxes = torch.stack([x, y, width, height], dim=-1)
    return boxes / args.size


class Attention(nn.Module):
    """Attention with the normalisation first, as in UP-DETR, and with positions added to queries
    and keys in every layer but never to values, as in DETR."""

    def __init__(self, args):
        super().__init__()
        self.norm = nn.LayerNorm(args.width)
        self.attention = nn.MultiheadAttention(
            args.width, args.heads, args.dropout, batch_first=True
        )
        self.dropout = nn.Dropout(args.dropout)

    def forward(self, x, positions, memory=None, memory_positions=None, mask=None):
        """x attends to memory, or to itself without one. mask: True where it may not."""
        h = self.norm(x)
        q = h + positions
        if memory is None:
            h, _ = self.attention(q, q, h, attn_mask=mask, need_weights=False)
        else:
            k = memory + memory_positions
            h, _ = self.attention(q, k, memory, need_weights=False)
        return x + self.dropout(h)


class DETR(nn.Module):
    """forward(x, image, labels, boxes): images (B, 3, H, W), and of each of the T true boxes the
    image it is in (T,), its label (T,), and itself (T, 4), centre and sides from 0 to 1 -> loss,
    and the decoder's outputs (BN, C) for monitoring."""

    def __init__(self, args, classes):
        super().__init__()
        width = args.width
        self.backbone = build_backbone(args)
        dim = self.backbone.dim
        self.standardize = Standardize(dim)
        self.input_projection = nn.Linear(dim, width)
        self.encoder = nn.ModuleList()
        for _ in range(args.encoder_layers):
            layer = [Attention(args), build_feed_forward(args)]
            self.encoder.append(nn.ModuleList(layer))
        self.decoder = nn.ModuleList()
        for _ in range(args.decoder_layers):  # among the queries, then to the image
            layer = [Attention(args), Attention(args), build_feed_forward(args)]
            self.decoder.append(nn.ModuleList(layer))
        for p in [*self.encoder.parameters(), *self.decoder.parameters()]:
            if p.ndim > 1:
                nn.init.xavier_uniform_(p)
        self.encoder_norm = nn.LayerNorm(width)
        self.decoder_norm = nn.LayerNorm(width)
        self.query_embedding = nn.Parameter(torch.randn(args.queries, width))
        self.class_head = nn.Linear(width, classes + 1)  # the last one: no object
        self.box_head = MLP(width, [width, width, 4], inplace=None)
        self.none_weight = 0.1

    def forward(self, x, image, labels, boxes):
        queries = self.query_embedding.expand(len(x), -1, -1)
        outputs = self.decode(x, queries)  # L of (B, N, C)
        loss = 0.0
        for output in outputs:
            scores, found = self.predict(output)
            query = match(scores, found, image, labels, boxes)
            target = (image, query, labels, boxes)
            loss = loss + set_loss(scores, found, target, self.none_weight)
        return loss, outputs[-1].detach().flatten(0, 1)

    def decode(self, x, queries, mask=None):
        """queries (B, N, C) -> what each layer of the decoder makes of them, L of (B, N, C)."""
        h = feature_map(self.backbone, x)  # (B, D, H, W)
        height, width = h.shape[2:]
        positions = sine_positions(height, width, queries.shape[2])
        positions = positions.to(h)  # (S, C)
        h = h.flatten(2).transpose(1, 2)  # (B, S, D)
        memory = self.input_projection(self.standardize(h))  # (B, S, C)
        for attend, feed_forward in self.encoder:
            memory = attend(memory, positions)
            memory = memory + feed_forward(memory)
        memory = self.encoder_norm(memory)
        output = torch.zeros_like(queries)
        outputs = []
        for attend, look, feed_forward in self.decoder:
            output = attend(output, queries, mask=mask)
            output = look(output, queries, memory, positions)
            output = output + feed_forward(output)
            outputs.append(self.decoder_norm(output))
        return outputs

    def predict(self, output):
        """(B, N, C) -> scores of the classes and of "no object" (B, N, classes + 1), boxes."""
        return self.class_head(output), self.box_head(output).sigmoid()


class UPDETR(DETR):
    """forward(x, patches, boxes, given, order): images (B, 3, H, W), patches of them (B, M, 3, P,
    P), their boxes (B, M, 4), which queries get their patch (B, N), and the order of the query
    embeddings (N,) -> loss, and the decoder's outputs (BN, C) for monitoring."""

    def __init__(self, args):
        super().__init__(args, classes=1)  # a patch was found
        dim = self.backbone.dim
        self.standardize_patch = Standardize(dim)
        self.patch_to_query = nn.Linear(dim, args.width)
        self.feature_head = MLP(args.width, [args.width, dim], inplace=None)
        self.register_buffer("mask", attention_mask(args.queries, args.query_patches))
        self.group = args.queries // args.query_patches
        self.frozen = args.lr_backbone == 0
        self.reconstruction = args.reconstruction
        self.none_weight = args.query_patches / args.queries  # M / N (section 3.1)
        drawn = draw_patches(1000, args, make_generator("chance"))
        boxes = to_centre(drawn, args)
        boxes = boxes.flatten(0, 1)
        labels = torch.zeros(len(boxes), dtype=torch.long)
        chance = chance_loss(labels, boxes, 1000, self.none_weight, args)
        unrelated = 2 * args.decoder_layers  # the squared distance of orthogonal unit vectors
        self.chance_loss = chance + args.reconstruction * unrelated

    def forward(self, x, patches, boxes, given, order):
        features = self.patch_features(patches)  # (B, M, D)
        outputs = self.search(x, features, given, order)  # L of (B, N, C)
        image = torch.arange(len(x), device=x.device)
        image = image.repeat_interleave(boxes.shape[1])  # (T,), T = BM
        labels = torch.zeros_like(image)
        boxes = boxes.flatten(0, 1)  # (T, 4)
        features = features.detach().flatten(0, 1)
        features = F.normalize(features, dim=1)  # (T, D)
        loss = 0.0
        for output in outputs:
            scores, found = self.predict(output)
            query = match(scores, found, image, labels, boxes)  # (T,), of any group
            target = (image, query, labels, boxes)
            loss = loss + set_loss(scores, found, target, self.none_weight)
            guess = self.feature_head(output[image, query])  # (T, D)
            guess = F.normalize(guess, dim=1)
            distance = (guess - features).square().sum(1)
            loss = loss + self.reconstruction * distance.mean()  # equation 2
        return loss, outputs[-1].detach().flatten(0, 1)

    def patch_features(self, patches):
        """p: the CNN's average over each patch, (B, M, D)."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            features = feature_map(self.backbone, patches.flatten(0, 1))
        features = self.standardize_patch(features.mean((2, 3)))
        return features.unflatten(0, patches.shape[:2])

    def search(self, x, features, given=None, order=slice(None)):
        """Figure 2: N / M queries look for each patch. With fewer patches than M, at test, there
        are as many queries fewer."""
        queries = self.patch_to_query(features)  # (B, M, C)
        queries = queries.repeat_interleave(self.group, 1)  # (B, N, C): patch 1, 1, 1, 2, 2, 2, ...
        n = queries.shape[1]
        if given is not None:
            queries = queries * given.unsqueeze(2)
        queries = queries + self.query_embedding[order][:n]
        mask = self.mask[:n, :n]
        return self.decode(x, queries, mask)


class Standardize(nn.Module):
    """x (..., D) -> mean 0 and standard deviation 1 per channel, as measured once by `fit`."""

    # Paper: the CNN's features as they are. Here: standardised, because after a ReLU all point in
    # nearly the same direction, and reconstructing that direction teaches nothing.
    def __init__(self, dim):
        super().__init__()
        self.register_buffer("mean", torch.zeros(dim))
        self.register_buffer("std", torch.ones(dim))

    @torch.no_grad()
    def fit(self, x):
        x = x.flatten(0, -2)
        std, mean = torch.std_mean(x, dim=0)
        self.mean.copy_(mean)
        self.std.copy_(std + 1e-6)

    def forward(self, x):
        return (x - self.mean) / self.std


@torch.no_grad()
def match(scores, boxes, image, true_labels, true_boxes):
    """The query (T,) that answers for each true box: the assignment with the lowest cost in each
    image (DETR, equation 1). image (T,) is rising; nothing ties a query to its own patch."""
    probability = scores.float().softmax(2)[image]  # (T, N, classes + 1)
    queries = probability.shape[1]
    wanted = true_labels.view(-1, 1, 1)
    wanted = wanted.expand(-1, queries, 1)
    probability = probability.gather(2, wanted)[:, :, 0]  # (T, N)
    found = boxes.float()[image]  # (T, N, 4)
    true_boxes = true_boxes.unsqueeze(1)  # (T, 1, 4)
    l1 = (found - true_boxes).abs().sum(2)
    overlap = giou(found, true_boxes)
    cost = 5 * l1 - 2 * overlap - probability  # (T, N)
    if not cost.isfinite().all():
        fail("the predictions are not finite; try a lower learning rate")
    matched = []
    counts = torch.bincount(image)
    for rows in cost.cpu().split(counts.tolist()):
        matched += hungarian(rows.tolist())
    return torch.tensor(matched, dtype=torch.long, device=scores.device)


def hungarian(cost):
    """cost[t][n] of giving target t the query n, no more targets than queries -> the query of each
    target, so that the sum is lowest and no query is used twice. Each target in turn enters by the
    shortest path of reassignments; prices keep all costs along it from being negative."""
    queries = len(cost[0]) if cost else 0
    target_price = [0.0] * len(cost)
    query_price = [0.0] * queries
    owner = [None] * queries  # the target that has the query
    for target in range(len(cost)):
        distance = [math.inf] * queries
        before = [None] * queries  # the query that precedes this one on the path
        visited = [False] * queries
        here = target
        last = None
        so_far = 0.0
        while here is not None:
            nearest = math.inf
            for query in range(queries):
                if visited[query]:
                    continue
                price = target_price[here] + query_price[query]
                through = so_far + cost[here][query] - price
                if through < distance[query]:
                    distance[query] = through
                    before[query] = last
                if distance[query] < nearest:
                    nearest = distance[query]
                    closest = query
            visited[closest] = True
            last = closest
            so_far = nearest
            here = owner[closest]
        target_price[target] += so_far
        for query in range(queries):
            if visited[query] and query != last:
                target_price[owner[query]] += so_far - distance[query]
                query_price[query] -= so_far - distance[query]
        while last is not None:  # along the path, each takes the query of its successor
            previous = before[last]
            owner[last] = target if previous is None else owner[previous]
            last = previous
    return [owner.index(target) for target in range(len(cost))]


@torch.autocast("cuda", enabled=False)  # in float32
def set_loss(scores, boxes, target, none_weight):
    """DETR's loss of one layer: cross-entropy over all queries, of which those without a box count
    none_weight, + 5 * L1 + 2 * (1 - GIoU) over the T matched boxes. With W processes, the sums are
    divided by the average process's counts, so that DDP's mean is the loss of one process."""
    image, query, true_labels, true_boxes = target
    none = scores.shape[2] - 1
    shape = scores.shape[:2]
    labels = torch.full(shape, none, device=scores.device)
    labels[image, query] = true_labels
    weight = torch.ones(none + 1, device=scores.device)
    weight[none] = none_weight
    scores = scores.float().transpose(1, 2)  # (B, classes + 1, N)
    weight = weight.to(scores)
    entropy = F.cross_entropy(scores, labels, weight, reduction="sum")
    entropy = entropy / mean_over_processes(weight[labels].sum())
    found = boxes.float()[image, query]  # (T, 4)
    l1 = (found - true_boxes).abs().sum()
    distance = (1 - giou(found, true_boxes)).sum()
    count = torch.ones_like(found[:, 0]).sum()
    count = mean_over_processes(count).clamp(min=1)
    return entropy + (5 * l1 + 2 * distance) / count


def giou(a, b):
    """The generalised overlap of boxes (..., 4) given as centre and sides."""
    a = box_convert(a, "cxcywh", "xyxy")
    b = box_convert(b, "cxcywh", "xyxy")
    return 1 - generalized_box_iou_loss(a, b)


def attention_mask(queries, patches):
    """Equation 3: (N, N), True where a query does not attend: outside of its patch's group."""
    # Official code: loops over queries per patch instead of patches, right only if N / M >= M.
    if queries % patches:
        fail(f"--queries {queries}: not a multiple of --query-patches {patches}")
    group = torch.arange(queries) // (queries // patches)
    return group.unsqueeze(1) != group


def sine_positions(height, width, dim):
    """DETR's positions, (height * width, dim): sines and cosines of the row and of the column."""
    n = dim // 4
    wavelength = 10000 ** (torch.arange(n) / n)
    sides = []
    for side in (height, width):
        place = torch.arange(1, side + 1) / side
        angle = 2 * math.pi * place.unsqueeze(1) / wavelength
        both = [angle.sin(), angle.cos()]
        sides.append(torch.cat(both, dim=1))  # (side, dim / 2)
    rows = sides[0].repeat_interleave(width, 0)
    columns = sides[1].repeat(height, 1)
    return torch.cat([rows, columns], dim=1)


def feature_map(backbone, x):
    """The ResNet without its pooling: (B, 3, H, W) -> (B, D, H / 32, W / 32) or so."""
    x = backbone.relu(backbone.bn1(backbone.conv1(x)))
    x = backbone.maxpool(x)
    x = backbone.layer2(backbone.layer1(x))
    return backbone.layer4(backbone.layer3(x))


def build_feed_forward(args):
    widths = [args.ffn_dim, args.width]
    return nn.Sequential(
        nn.LayerNorm(args.width),
        MLP(args.width, widths, inplace=None, dropout=args.dropout),
    )


def build_backbone(args):
    """The pre-trained CNN. Its batch normalisation never changes, and layer1 is never trained."""
    backbone = resnet(args.arch, args.size, norm_layer=FrozenBatchNorm2d)
    if args.dilation:
        dilate(backbone.layer4)
    weights = harness.load_checkpoint(args.backbone)
    if isinstance(weights, dict) and isinstance(weights.get("model"), dict):  # of results/weights
        found = {}
        for name, x in weights["model"].items():
            if name.startswith(("backbone.", "encoder.backbone.", "encoder_q.backbone.")):
                found[name.partition("backbone.")[2]] = x
        weights = found
    try:
        missing, surplus = backbone.load_state_dict(weights, strict=False)
    except (AttributeError, RuntimeError, TypeError):
        missing = surplus = [""]
    surplus = [name for name in surplus if not name.startswith("fc.")]
    if missing or surplus:
        fail(f"--backbone {args.backbone}: not the weights of a {args.arch}")
    backbone.conv1.requires_grad_(False)
    backbone.layer1.requires_grad_(False)
    if args.lr_backbone == 0:
        backbone.requires_grad_(False)
    return backbone


def dilate(layer):
    """Takes the stride out of a layer, and spreads the convolutions behind it, so that each weight
    sees what it saw before: DETR's DC5, here for layers that torchvision does not dilate."""
    for module in layer.modules():
        if not isinstance(module, nn.Conv2d):
            continue
        if module.stride == (2, 2):
            module.stride = (1, 1)
        elif module.kernel_size == (3, 3):
            module.dilation = (2, 2)
            module.padding = (2, 2)


def build_optimizer(args, model):
    """AdamW; the CNN has a learning rate of its own, or none."""
    cnn = [p for p in model.backbone.parameters() if p.requires_grad]
    own = set(model.backbone.parameters())
    rest = [p for p in model.parameters() if p not in own]
    groups = [{"params": rest, "peak": args.lr}]
    if cnn:
        groups.append({"params": cnn, "peak": args.lr_backbone})
    return torch.optim.AdamW(groups, lr=0.0, weight_decay=args.weight_decay)


def learning_rate(args, epoch):
    """As a share of the peak: linear warm-up, then a tenth for the last third (section 4.1)."""
    if epoch < args.warmup_epochs:
        return epoch / args.warmup_epochs
    return 0.1 if epoch >= args.epochs * 2 / 3 else 1.0


def chance_loss(labels, boxes, images, none_weight, args):
    """DETR's loss in L layers if for so many images all predictions are the average box, and the
    labels are as likely as they are frequent."""
    counts = torch.bincount(labels).float()
    none = args.queries * images - len(labels)
    counts = F.pad(counts, [0, 1], value=none_weight * none)
    frequency = counts / counts.sum()
    entropy = torch.special.entr(frequency).sum()
    average = boxes.mean(0).expand_as(boxes)
    l1 = (average - boxes).abs().sum(1)
    distance = 1 - giou(average, boxes)
    l1 = l1.mean()
    distance = distance.mean()
    loss = entropy + 5 * l1 + 2 * distance
    return args.decoder_layers * loss.item()


# ------------------------------------------------------------------------------------ training
def train(args):
    """Pre-trains without labels, then fine-tunes on a few boxes, and for comparison does that from
    scratch too. Writes everything to args.out; returns the content of result.json."""
    find_backbone(args)
    device = launch()
    data = scenes.load_scenes(args.data, args.seed, args.unlabelled, args.labelled, device)
    check_queries(args, data)
    torch.manual_seed(args.seed)  # all processes start from the same weights
    model = UPDETR(args).to(device)
    fit_standardization(model, data.pretrain, args)
    start = copy.deepcopy(model.state_dict())

    def draw(images, rows, generator):
        return cut_patches(images, args, generator)

    def judge():
        return find_patches(model, data, args)

    run = fit(args, model, data.pretrain, draw, judge, device)
    last = run.log[-1]
    found = {name: x for name, x in last.items() if name.startswith("pretext")}
    if data.train:
        tuned = finetune(args, data, "pretrained", model.state_dict(), device)
        found |= precision(tuned, "")
        scratch = finetune(args, data, "scratch", start, device)
        found |= precision(scratch, "scratch_")
    return run.finish(data, found, draw_report)


def precision(run, prefix):
    """AP50, AP and seconds of a fine-tuning, and AP50 after a third of it if that was measured."""
    last = run.log[-1]
    found = {"ap50": last["ap50"], "ap": last["ap"]}
    for line in run.log:
        if 3 * line["epoch"] == last["epoch"] and "ap50" in line:
            found["third_ap50"] = line["ap50"]
    seconds = [line["seconds"] for line in run.log[1:]]
    found["tune_seconds"] = sum(seconds)
    return {prefix + name: x for name, x in found.items()}


def finetune(args, data, name, state, device):
    """The run of DETR from these weights on the labelled images, in a folder of its own."""
    args = argparse.Namespace(**vars(args))
    args.out = f"{args.out}/{name}"
    args.epochs = args.scratch_epochs if name == "scratch" else args.tune_epochs
    args.batch_size = args.tune_batch_size
    args.lr = args.scratch_lr if name == "scratch" else args.tune_lr
    args.lr_backbone = args.tune_lr_backbone
    torch.manual_seed(args.seed)
    model = DETR(args, len(data.classes)).to(device)
    if name == "scratch":
        kept = {key: x for key, x in state.items() if key.startswith(KEPT)}
        model.load_state_dict(kept, strict=False)
    else:
        kept = {key: x for key, x in state.items() if not key.startswith(LEFT)}
        load_weights(model, kept, args, fresh=("class_head.",))
    n = len(data.train)
    rows = torch.arange(n)
    unflipped = torch.zeros(n)
    _, labels, boxes = data.train.targets(rows, unflipped)
    model.chance_loss = chance_loss(labels, boxes, n, model.none_weight, args)

    image_view, _ = build_views(args)

    def draw(images, rows, generator):
        chance = torch.rand(world_size() * len(rows), generator=generator)
        flip = share(chance) < 0.5
        image, labels, boxes = data.train.targets(rows, flip)
        flip = flip.to(device).view(-1, 1, 1, 1)
        images = torch.where(flip, images.flip(3), images)
        x = image_view.plain(images)
        inputs = [x, image, labels, boxes]
        return [part.to(device) for part in inputs]

    def find(images):
        return find_objects(model, images, args)

    def judge():
        return scenes.evaluate(find, data.test, args.size, device)

    if rank() == 0:
        names = json.dumps(data.classes)
        harness.save(Path(args.out) / "classes.json", names)
    return fit(args, model, data.train.images, draw, judge, device)


def fit(args, model, images, draw, judge, device):
    """The training of both phases. draw(images, rows, generator): what model.forward takes, from a
    batch; judge(): the figures of an evaluation."""
    workers = args.workers
    pictures = scenes.Pictures(images, args.size, args.batch_size, device, args.seed, workers)
    optimizer = build_optimizer(args, model)
    run = harness.Run(args, model, optimizer, pictures)  # continues where a killed run stopped
    if run.is_new:
        forget(run.out)  # what followed an earlier training
        run.log_start(judge(), "at the start")
    if args.compile:
        model.compile()
    network = DistributedDataParallel(model) if world_size() > 1 else model

    for epoch in run.epochs():
        pictures.set_epoch(epoch)
        generator = make_generator("draws", args.seed, epoch)
        for step, (rows, batch) in enumerate(pictures):
            now = epoch - 1 + step / len(pictures)
            share_of_peak = learning_rate(args, now)
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * share_of_peak
            inputs = draw(batch, rows, generator)
            bf16 = device.type == "cuda" and args.precision == "bf16"
            with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                loss, z = network(*inputs)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), args.clip)
            optimizer.step()
            run.after_step(loss)

        metrics = {"lr": args.lr * share_of_peak, **health(z)}
        if epoch == args.epochs or epoch % args.eval_every == 0:
            metrics |= judge()
        run.after_epoch(metrics)  # prints a line, writes checkpoint.pt and log.jsonl
    return run


@torch.no_grad()
def find_objects(model, images, args):
    """uint8 (B, 3, S, S) -> for each image boxes (N, 4) as x1, y1, x2, y2 from 0 to 1, scores (N,)
    and labels (N,): one detection per query, of its best class."""
    model.eval()
    x = build_views(args)[0].plain(images)
    queries = model.query_embedding.expand(len(x), -1, -1)
    outputs = model.decode(x, queries)
    scores, boxes = model.predict(outputs[-1])
    model.train()
    scores = scores.float().softmax(2)
    scores = scores[:, :, :-1]  # without "no object"
    scores, labels = scores.max(2)  # (B, N)
    boxes = box_convert(boxes.float(), "cxcywh", "xyxy")
    return list(zip(boxes.clamp(0, 1), scores, labels))


@torch.no_grad()
def find_patches(model, data, args):
    """The pretext on images never trained on: the mean overlap of patches with the box of the best
    query of their group, and the share (%) with more than 1/2; and both if the patches come from
    another image, so that only their look can tell, and for the average box."""
    images = unseen(data, args)
    results = {}
    for name in ("", "other_"):
        asked = argparse.Namespace(**vars(args))
        asked.other_patches = int(name == "other_")
        generator = make_generator("unseen")
        x, patches, boxes, _, _ = cut_patches(images, asked, generator)
        found = search_patches(model, x, patches)
        results[name] = iou(found, boxes)
    average = boxes.mean((0, 1))
    results["constant_"] = iou(average.expand_as(boxes), boxes)
    metrics = {}
    for name, found in results.items():
        over = (found > 0.5).float()
        percent = 100 * over.mean()
        metrics[f"pretext_{name}iou"] = found.mean().item()
        metrics[f"pretext_{name}share"] = percent.item()
    return metrics


def search_patches(model, x, patches):
    """The box (B, M, 4) of the query with the highest score in each patch's group."""
    model.eval()
    outputs = model.search(x, model.patch_features(patches))
    scores, boxes = model.predict(outputs[-1])
    model.train()
    scores = scores.softmax(2)[:, :, 0]  # (B, N)
    scores = scores.unflatten(1, (-1, model.group))  # (B, M, N / M)
    best = scores.argmax(2)
    group = torch.arange(best.shape[1], device=x.device)
    query = model.group * group + best  # (B, M)
    query = query.unsqueeze(2).expand(-1, -1, 4)
    return boxes.gather(1, query)


@torch.no_grad()
def draw_report(run, data, title):
    """report.png: found patches, detections, average precision, and what one query looks at."""
    if rank() > 0:
        return
    from matplotlib.figure import Figure  # here, so that nothing else has to wait for it

    args = run.args
    images = unseen(data, args)[:4]
    generator = make_generator("report")
    x, patches, boxes, _, _ = cut_patches(images, args, generator)
    found = search_patches(run.model, x, patches)
    figure = Figure(figsize=(15, 9), layout="constrained")
    figure.suptitle(title)
    axes = figure.subplots(3, 4)
    for number in range(len(images)):
        axis = axes[0, number]
        first = [boxes[number, 0], found[number, 0]]  # of the first patch
        both = torch.stack(first)  # (2, 4)
        both = args.size * box_convert(both, "cxcywh", "xyxy")
        texts = ["patch", "found"]
        scenes.draw_boxes(axis, images[number], both, texts, ["tab:blue", "tab:orange"])
    if data.train:
        model, _ = load_tuned(args, "pretrained")
        model.to(images.device)
        for number, found in enumerate(find_objects(model, images, args)):
            axis = axes[1, number]
            scenes.draw_detections(axis, images[number], found, data.classes)
            axis.set(title="detections" if number else "first image: detections")
        weights = attention_of(model, x[:1])
        axes[2, 0].imshow(weights.cpu().numpy())
        axes[2, 0].set(title="where its surest query looks")
        for name in ("pretrained", "scratch"):
            log = Path(args.out) / name / "log.jsonl"
            lines = [json.loads(line) for line in log.read_text().splitlines()]
            harness.draw_curve(axes[2, 1], lines, "ap50")
            harness.draw_curve(axes[2, 2], lines, "ap")
        axes[2, 1].set(title="AP50 (%) over fine-tuning")
        axes[2, 1].legend(["pre-trained", "from scratch"])
        axes[2, 2].set(title="AP (%)")
    harness.draw_curve(axes[2, 3], run.log, "loss")
    axes[2, 3].set(title="loss of pre-training")
    picture = io.BytesIO()
    figure.savefig(picture, dpi=80)
    harness.save(run.out / "report.png", picture.getvalue())


@torch.no_grad()
def attention_of(model, x):
    """Where in the image (1, 3, H, W) the surest query looks, in the last layer: (H', W')."""
    kept = []
    look = model.decoder[-1][1].attention
    hook = look.register_forward_pre_hook(lambda module, inputs: kept.append(inputs))
    outputs = model.decode(x, model.query_embedding.unsqueeze(0))
    hook.remove()
    scores, _ = model.predict(outputs[-1])
    none = scores.softmax(2)[0, :, -1]
    surest = none.argmin()
    _, weights = look(*kept[0])
    h = feature_map(model.backbone, x)
    height, width = h.shape[2:]
    return weights[0, surest].view(height, width)


def finetune_own(args):
    """--finetune: the pre-trained model of --out, on all the boxes of a folder."""
    device = launch()
    data = scenes.load_scenes(args.finetune, args.seed, device=device)
    if not data.train:
        fail(f"--finetune {args.finetune}: has no boxes (annotations/instances_train.json)")
    check_queries(args, data)
    state = load_model(args.out)
    found = finetune(args, data, own_name(args), state, device)
    if rank() == 0:
        print(f"to see what it finds: --finetune {args.finetune} --detect PICTURE", flush=True)
    return found


def own_name(args):
    """The folder in --out of what is trained on the user's boxes."""
    return f"finetuned-{Path(args.finetune).resolve().name}"


def draw_detected(args):
    """--detect: draws what the fine-tuned model of --out finds in a picture."""
    name = own_name(args) if args.finetune else "pretrained"
    picture, square = scenes.read_picture(args.detect, args.size)
    model, classes = load_tuned(args, name)
    (found,) = find_objects(model, square, args)
    drawn = Path(args.out) / name / "detected.png"
    scenes.save_detections(drawn, picture, found, classes)
    print(f"{drawn}: what is found in {args.detect}", flush=True)


def load_tuned(args, name):
    """The detector in that folder of --out, and the names of its classes."""
    folder = Path(args.out) / name
    state = load_model(folder)
    try:
        classes = json.loads((folder / "classes.json").read_text())
    except (OSError, ValueError):
        fail(f"{folder / 'classes.json'}: missing or damaged; fine-tune anew with --overwrite")
    model = DETR(args, len(classes))
    load_weights(model, state, args)
    return model, classes


def load_model(folder):
    """The weights in the checkpoint of a run."""
    path = Path(folder) / "checkpoint.pt"
    try:
        return harness.load_checkpoint(path)["model"]
    except (KeyError, TypeError):
        fail(f"{path}: not the checkpoint of a run")


def load_weights(model, state, args, fresh=()):
    """fresh: how the names of those weights begin that `state` need not have."""
    try:
        missing, surplus = model.load_state_dict(state, strict=False)
    except RuntimeError:
        missing = surplus = [""]
    missing = [name for name in missing if not name.startswith(fresh)]
    if missing or surplus:
        fail(f"{args.out}: was trained with other settings; give the same flags, --recipe included")


# ------------------------------------------------------------------------------------ skeleton
def share(x):
    """This process's part of rows drawn for all processes."""
    return x.chunk(world_size())[rank()]


def check_queries(args, data):
    """Each object of an image needs a query of its own."""
    if data.train is None:
        return
    most = max(len(boxes) for boxes in data.train.boxes)
    if most == 0:
        fail("none of the labelled images has a box; take more of them")
    if most > args.queries:
        fail(f"--queries {args.queries}: an image has {most} objects, and needs as many queries")


def mean_over_processes(x):
    if world_size() > 1:
        dist.all_reduce(x)
    return x / world_size()


def iou(a, b):
    """Intersection over union of boxes (..., 4) given as centre and sides."""
    a = box_convert(a, "cxcywh", "xyxy")
    b = box_convert(b, "cxcywh", "xyxy")
    return scenes.overlap(a, b)


def unseen(data, args):
    """At most 500 images that no training has seen, uint8, or the first ones if there are none."""
    images = data.test.images if data.test else data.pretrain
    rows = torch.arange(min(500, len(images)))
    (images,) = scenes.read(images, rows.unsqueeze(0), args.size)
    return images


@torch.no_grad()
def fit_standardization(model, images, args):
    """From the first 256 images, the same in all processes."""
    rows = torch.arange(min(256, len(images)))
    (images,) = scenes.read(images, rows.unsqueeze(0), args.size)
    boxes = draw_patches(len(images), args, make_generator("standardize", args.seed))
    boxes = boxes.flatten(0, 1)
    image_view, patch_view = build_views(args)
    draws = patch_view.draw(len(boxes), make_generator("standardize", args.seed))
    device = model.mask.device
    images = images.to(device)
    h = feature_map(model.backbone, image_view.plain(images))
    h = h.flatten(2).transpose(1, 2)  # (256, S, D)
    model.standardize.fit(h)
    patches = images.repeat_interleave(args.query_patches, 0)
    patches = patch_view.apply(patches, boxes, draws)
    h = feature_map(model.backbone, patches)
    model.standardize_patch.fit(h.mean((2, 3)))


def forget(out):
    """Removes the fine-tunings of an earlier pre-training."""
    for name in ("pretrained", "scratch"):
        if rank() == 0:
            (out / name / "checkpoint.pt").unlink(missing_ok=True)
    if world_size() > 1:
        dist.barrier()


def find_backbone(args):
    """Trains swav.py, as the paper's CNN was, if its weights are the default and missing."""
    default = SETTINGS["backbone"][0]
    if not args.backbone:
        fail("--backbone: which weights of a CNN? Any of the nine scripts leaves a backbone.pt")
    if Path(args.backbone).exists():
        return
    if args.backbone != default or "RANK" in os.environ:
        fail(f"--backbone {args.backbone}: no such file; `python swav.py` makes {default}")
    print(f"there is no {default} yet: training swav.py first", flush=True)
    script = Path(__file__).with_name("swav.py")
    command = [sys.executable, script, "--out", Path(default).parent]
    if subprocess.run(command).returncode:
        fail("swav.py did not finish; run it on its own")


def launch():
    """Returns this process's device; joins the process group if torchrun started this script."""
    device = torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")  # TF32
    if "RANK" in os.environ:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return device


def parse_args(argv=None):
    return harness.parse_args(__file__, __doc__, SETTINGS, argv, USES)


def main(args):
    with harness.clean_exit():  # Ctrl-C, SIGTERM, out of memory: one line, and the group is left
        if args.detect:
            return draw_detected(args)
        return finetune_own(args) if args.finetune else train(args)


if __name__ == "__main__":
    main(parse_args())
