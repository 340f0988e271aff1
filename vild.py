"""ViLD: Open-vocabulary Object Detection via Vision and Language Knowledge Distillation
Xiuye Gu, Tsung-Yi Lin, Weicheng Kuo, Yin Cui. ICLR 2022, arXiv 2104.13921

A detector whose classifier is a list of names: CLIP embeds them, and a region is what its own
embedding is nearest to. The names with boxes (base) are learnt from the boxes; so that regions
nobody labelled (novel) also get an embedding worth comparing, the detector learns from CLIP's image
encoder what it would have said of each proposal.

    python vild.py                                            # a few CPU minutes, no download
    torchrun --nproc_per_node=8 vild.py --data /data/coco --teacher ViT-B-32.pt --merges MERGES
    python vild.py --detect PICTURE --names "zigzag,bricks,my cat"        # after the first command

Read it beside clip.py, whose two encoders it distils; scenes.py has the pictures, the boxes and the
average precision. The masks of the paper's Mask R-CNN are left out: boxes only.

The paper's R(phi(I), r) is z, e_bg background, t_c text, V(crop(I, r)) embeddings, w image_weight.
Shapes: B images per process, W processes, C embedding dimensions, R regions and M proposals to
distil per image, N names.
Measured: 81.1 % AP50 of novel names on scenes (ViLD-text 15.8 %), 97.0 % of base names, mean of 3
seeds.
"""

import io
import math
import os
import subprocess
import sys
import time
from argparse import Namespace
from collections import OrderedDict
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torchvision.models.detection._utils import BoxCoder
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.rpn import AnchorGenerator, RegionProposalNetwork, RPNHead
from torchvision.ops import FeaturePyramidNetwork, MultiScaleRoIAlign, batched_nms, box_iou
from torchvision.ops import clip_boxes_to_image, nms

import clip
import evaluate
import harness  # command line, checkpoint, log, report: what every run leaves on disk
import scenes
from captions import FRAMES, TEMPLATES
from common import Augment, crop, fail, health, make_generator, rank, resnet, world_size

# scenes: two cores. coco: one GPU, 48 base and 17 novel names. paper: LVIS, section 4 and the
# official configuration.
SETTINGS = {
    "recipe":              ("scenes",   "coco",     "paper",    "what the columns are for"),
    "mode":                ("vild",     "ensemble", "ensemble", "text, image, vild or ensemble"),
    "novel":               ("zigzag,bricks,pinwheel", "", "",   "names whose boxes are not used"),
    "teacher":             ("runs/clip-patterns/checkpoint.pt", "", "", "CLIP, ours or OpenAI's"),
    "arch":                ("thin",     "resnet50", "resnet50", "thin, or a ResNet of torchvision"),
    "size":                (64,         640,        1024,       "side of an image, in pixels"),
    "first_level":         (2,          1,          1,          "stage of the ResNet of stride 4"),
    "fpn_dim":             (64,         256,        256,        "channels of the pyramid"),
    "head_convs":          (1,          4,          4,          "convolutions of a region head"),
    "head_layers":         (1,          2,          2,          "its linear layers"),
    "head_dim":            (256,        1024,       1024,       "their width"),
    "anchor_scale":        (5.0,        8.0,        8.0,        "side of an anchor / its stride"),
    "anchors":             (64,         256,        256,        "sampled per image for the RPN"),
    "proposals":           (40,         300,        1000,       "kept per image"),
    "regions":             (24,         128,        512,        "R, sampled per image"),
    "distilled":           (12,         50,         300,        "M, embedded by CLIP per image"),
    "proposal_epochs":     (2,          1,          1,          "epochs before M are computed"),
    "merges":              ("",         "",         "",         "file of OpenAI's byte pairs"),
    "epochs":              (8,          12,         460,        "passes over the images"),
    "batch_size":          (8,          16,         256,        "images per step, all processes"),
    "optimizer":           ("adamw",    "adamw",    "sgd",      "adamw or sgd"),
    "lr":                  (1e-3,       2e-4,       0.32,       "whatever the batch"),
    "warmup_epochs":       (0.2,        0.2,        2.5,        "epochs of linear warm-up"),
    "weight_decay":        (1e-2,       1e-2,       4e-5,       "not on gains and biases"),
    "temperature":         (0.03,       0.01,       0.01,       "tau of the text's cross-entropy"),
    "image_weight":        (1.0,        0.5,        0.5,        "w of the distillation"),
    "ensemble_weight":     (0.6667,     0.6667,     0.6667,     "lambda in equation 5: 2/3"),
    "eval_every":          (2,          4,          20,         "epochs between evaluations"),
}  # fmt: skip
USES = {
    "data": "scenes, or a folder in COCO's layout",
    "detect": "a picture to draw boxes on",
    "names": "what to look for in it, separated by commas",
}
MODES = ("text", "image", "vild", "ensemble")
MOST_SHOWN = 10
POOL = 7  # cells on a side of a region


# -------------------------------------------------------------------------------------- method
def build_views(args):
    """The image as it is; flips are drawn with the boxes."""
    # Paper: also resized by .1 to 2. Here: not, because rendered objects have a range of sizes.
    return [Augment(args.size, scale=(1.0, 1.0), flip=0.0)]


class ViLD(nn.Module):
    """forward(x, boxes, labels, regions, embeddings, generators): images (B, 3, S, S); per image
    base boxes (n, 4) and labels (n,); M regions to distil (m, 4) with CLIP's embeddings (m, C), or
    None before there are any; a generator -> loss, and embeddings (BR, C) for monitoring."""

    def __init__(self, args, text):
        super().__init__()
        if args.mode not in MODES:
            fail(f"--mode {args.mode}: not one of {', '.join(MODES)}")
        dim = text.shape[1]
        self.backbone = build_backbone(args)
        self.levels = []
        channels = []
        for stage in range(args.first_level, 5):
            self.levels.append(f"layer{stage}")
            channels.append(self.backbone.dim // 2 ** (4 - stage))
        self.fpn = FeaturePyramidNetwork(channels, args.fpn_dim)
        self.rpn = build_rpn(args, len(self.levels))
        self.pool = MultiScaleRoIAlign(self.levels, POOL, sampling_ratio=1)
        self.head = RegionHead(args, dim)
        self.image_head = None  # a second one keeps the distillation apart from the labels
        if args.mode == "ensemble":
            self.image_head = RegionHead(args, dim)
        self.box_regressor = nn.Linear(args.head_dim, 4)  # one box, whatever the class
        self.background = nn.Parameter(0.01 * torch.randn(dim))
        self.register_buffer("text", text)  # (base names, C), frozen
        self.args = args
        self.coder = BoxCoder((10.0, 10.0, 5.0, 5.0))
        self.chance_loss = self.chance(distilling=False)

    def chance(self, distilling):
        """Uninformative outputs: objectness 1/2, equal class scores, unrelated embeddings."""
        args = self.args
        loss = math.log(2)
        if args.mode != "image":
            loss += math.log(1 + len(self.text))
        if distilling:  # the mean L1 distance of two random unit vectors
            dim = self.text.shape[1]
            loss += args.image_weight * math.sqrt(4 / math.pi * dim)
        return loss

    def forward(self, x, boxes, labels, regions, embeddings, generators):
        args = self.args
        maps, images = self.feature_maps(x)
        self.rpn.fg_bg_sampler.generators = generators
        proposals, losses = self.find_proposals(maps, images, boxes)
        loss = losses["loss_objectness"] + losses["loss_rpn_box_reg"]

        sampled = []
        targets = []
        classes = []
        for found, true, label, generator in zip(proposals, boxes, labels, generators):
            candidates = found[:, :4]
            chosen = sample_regions(candidates, true, label, args.regions, generator)
            sampled.append(chosen[0])
            targets.append(chosen[1])
            classes.append(chosen[2])
        pooled = self.pool(maps, sampled, images.image_sizes)
        hidden, z = self.head(pooled)
        classes = torch.cat(classes)
        most = len(x) * args.regions
        if args.mode != "image":
            temperature = args.temperature
            loss = loss + text_loss(z, classes, self.background, self.text, temperature, most)
        is_object = classes > 0
        wanted = torch.cat(self.coder.encode(targets, sampled))
        moves = self.box_regressor(hidden)
        distance = F.smooth_l1_loss(moves[is_object], wanted[is_object], reduction="sum")
        loss = loss + distance / most

        if embeddings is not None and args.mode != "text":
            # Official code: in one pass with the sampled regions. Here: in one of its own, because
            # the two have different heads in the ensemble.
            head = self.image_head or self.head
            pooled = self.pool(maps, regions, images.image_sizes)
            _, z_image = head(pooled)
            most = len(x) * args.distilled
            distance = image_loss(z_image, torch.cat(embeddings), most)
            loss = loss + args.image_weight * distance
        return loss, z.detach()

    def feature_maps(self, x):
        """The pyramid, {level: (B, F, H, W)}, and the images as torchvision's RPN takes them."""
        network = self.backbone
        size = tuple(x.shape[2:])
        images = ImageList(x, [size] * len(x))
        x = network.conv1(x)
        x = network.bn1(x)
        x = network.relu(x)
        x = network.maxpool(x)
        maps = OrderedDict()
        for stage in ("layer1", "layer2", "layer3", "layer4"):
            layers = getattr(network, stage)
            x = layers(x)
            if stage in self.levels:
                maps[stage] = x
        return self.fpn(maps), images

    @torch.autocast("cuda", enabled=False)  # boxes need more digits than bf16 has
    def find_proposals(self, maps, images, boxes):
        """torchvision's RPN: proposals (n, 5) per image, and in training its losses."""
        levels = OrderedDict()
        for name, level in maps.items():
            levels[name] = level.float()
        targets = [{"boxes": found} for found in boxes]
        return self.rpn(images, levels, targets)

    def propose(self, x):
        """Per image, proposals (n, 5): boxes and their objectness; and what region heads need."""
        maps, images = self.feature_maps(x)
        proposals, _ = self.find_proposals(maps, images, [])
        corners = [found[:, :4] for found in proposals]
        pooled = self.pool(maps, corners, images.image_sizes)
        return proposals, pooled


class RegionHead(nn.Module):
    """Pooled regions (n, F, 7, 7) -> hidden (n, head_dim), and z (n, C), normalised, in CLIP's
    space."""

    def __init__(self, args, dim):
        super().__init__()
        layers = []
        for _ in range(args.head_convs):
            layers.append(nn.Conv2d(args.fpn_dim, args.fpn_dim, 3, padding=1, bias=False))
            layers.append(nn.BatchNorm2d(args.fpn_dim))
            layers.append(nn.ReLU(inplace=True))
        layers.append(nn.Flatten())
        width = args.fpn_dim * POOL**2
        for _ in range(args.head_layers):
            layers.append(nn.Linear(width, args.head_dim, bias=False))
            layers.append(nn.BatchNorm1d(args.head_dim))
            layers.append(nn.ReLU(inplace=True))
            width = args.head_dim
        self.layers = nn.Sequential(*layers)
        self.projector = nn.Linear(args.head_dim, dim)

    def forward(self, pooled):
        hidden = self.layers(pooled)
        z = self.projector(hidden)
        return hidden, F.normalize(z, dim=1)


def text_logits(z, background, text, temperature):
    """Equation 2: cosines of z (n, C) with the learned background and the names (N, C) -> (n, 1 +
    N), of which 0 is the background."""
    background = F.normalize(background, dim=0)
    classes = torch.cat([background.unsqueeze(0), text])
    return z @ classes.T / temperature


@torch.autocast("cuda", enabled=False)  # logits in float32 (TF32 on GPUs), not bf16
def text_loss(z, labels, background, text, temperature, most):
    """Equation 3, ViLD-text: the cross-entropy over all regions, divided by `most`, how many there
    can be, so that W processes are one. labels (n,): 0 background, 1 to N the base names."""
    logits = text_logits(z.float(), background, text, temperature)
    return F.cross_entropy(logits, labels, reduction="sum") / most


def image_loss(z, embeddings, most):
    """Equation 4, ViLD-image: the L1 distance to CLIP's embeddings (m, C), summed over C."""
    distance = (z - embeddings).abs()
    return distance.sum() / most


def ensemble(text_scores, image_scores, is_base, weight):
    """Equation 5: probabilities (n, N) of the two heads -> their geometric mean, in which the text
    head has most of the say on base names and the image head on novel ones."""
    text_weight = torch.where(is_base, weight, 1 - weight)
    image_weight = 1 - text_weight
    return text_scores**text_weight * image_scores**image_weight


class Sampler:
    """Chooses anchors for torchvision's RPN, at most half of them positive, from generators of the
    images: torchvision's own sampler draws from the global one, so W processes would not be one."""

    def __init__(self, n):
        self.n = n
        self.generators = []  # one per image, set before each call

    def __call__(self, labels):
        positive = []
        negative = []
        for label, generator in zip(labels, self.generators):
            objects, others = choose_balanced(label, self.n, 0.5, generator)
            none = torch.zeros_like(label, dtype=torch.bool)
            positive.append(none.index_fill(0, objects, True))
            negative.append(none.index_fill(0, others, True))
        return positive, negative


def choose_balanced(labels, n, share, generator):
    """Random rows with label > 0, at most a share of n, and rows with label 0 that make up n."""
    order = torch.randperm(len(labels), generator=generator)
    order = order.to(labels.device)
    shuffled = labels[order]
    objects = order[shuffled > 0]
    objects = objects[: int(n * share)]
    others = order[shuffled == 0]
    others = others[: n - len(objects)]
    return objects, others


def sample_regions(proposals, boxes, labels, n, generator):
    """n regions per image, at most a quarter of them objects, of the proposals and the true boxes.
    Returns them (n, 4), the box each should be (n, 4), and the class (n,): 0, or 1 + label."""
    candidates = torch.cat([proposals, boxes])
    if len(boxes) == 0:
        boxes = proposals.new_zeros(1, 4)
        labels = torch.full([1], -1, device=proposals.device)
    overlaps = box_iou(candidates, boxes)
    overlap, nearest = overlaps.max(1)
    classes = torch.where(overlap >= 0.5, 1 + labels[nearest], 0)
    objects, others = choose_balanced(classes, n, 0.25, generator)
    rows = torch.cat([objects, others])
    wanted = boxes[nearest[rows]]
    return candidates[rows], wanted, classes[rows]


class Proposals(RegionProposalNetwork):
    """torchvision's RPN, whose proposals (n, 5) keep their objectness in the last column."""

    def filter_proposals(self, *arguments):
        boxes, scores = super().filter_proposals(*arguments)
        found = []
        for box, score in zip(boxes, scores):
            found.append(torch.cat([box, score.unsqueeze(1)], dim=1))
        return found, scores


def build_rpn(args, levels):
    """One scale per level of the pyramid, three aspect ratios; anchors match at .7 and .3."""
    sizes = tuple((args.anchor_scale * 4 * 2**level,) for level in range(levels))
    anchors = AnchorGenerator(sizes, ((0.5, 1.0, 2.0),) * levels)
    kept = {"training": args.proposals, "testing": args.proposals}
    before = {"training": 2 * args.proposals, "testing": 2 * args.proposals}
    rpn = Proposals(
        anchors,
        RPNHead(args.fpn_dim, 3, conv_depth=2),
        fg_iou_thresh=0.7,
        bg_iou_thresh=0.3,
        batch_size_per_image=args.anchors,
        positive_fraction=0.5,
        pre_nms_top_n=before,
        post_nms_top_n=kept,
        nms_thresh=0.7,
    )
    rpn.fg_bg_sampler = Sampler(args.anchors)
    return rpn


def build_backbone(args):
    return resnet(args.arch, args.size)


def build_optimizer(args, model):
    decayed = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    groups = [
        {"params": decayed, "weight_decay": args.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    if args.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=0.0)
    if args.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=0.0, momentum=0.9)
    fail(f"--optimizer {args.optimizer}: neither adamw nor sgd")


def learning_rate(args, epoch):
    """Linear warm-up, then a tenth, a hundredth and a thousandth from 90, 95 and 97.5 % of the
    steps on (section 4)."""
    if epoch < args.warmup_epochs:
        return args.lr * epoch / args.warmup_epochs
    lr = args.lr
    for share in (0.9, 0.95, 0.975):
        if epoch >= share * args.epochs:
            lr = lr / 10
    return lr


# --------------------------------------------------------------------------------- distillation
class Teacher:
    """CLIP: what it says of names, and of regions of images."""

    def __init__(self, args, device):
        state = evaluate.clip_weights(harness.load_checkpoint(args.teacher))
        if not state:
            fail(f"--teacher {args.teacher}: not a checkpoint of CLIP")
        model, self.tokenizer, self.view, _ = evaluate.load_clip(args.teacher, state, args.merges)
        if self.tokenizer is None:
            fail(f"--teacher {args.teacher} is OpenAI's: it needs --merges, the file of its tokens")
        self.model = model.to(device).eval().requires_grad_(False)
        self.templates = FRAMES if args.recipe == "scenes" else TEMPLATES

    @torch.no_grad()
    def embed_names(self, names):
        """(N, C), normalised."""
        return clip.embed_classes(self.model, self.tokenizer, names, self.templates)

    @torch.no_grad()
    def embed_regions(self, images, regions):
        """images uint8 (B, 3, S, S), regions: per image (m, 4) -> per image (m, C), normalised: the
        sum of the embeddings of the region and of one 1.5 times as wide and high (section 3.3)."""
        total = 0.0
        for scale in (1.0, 1.5):
            parts = []
            for image, boxes in zip(images, regions):
                for few in boxes.split(32):  # each is cut from a copy of the image
                    pixels = cut(image, few, scale, self.view.size)
                    x = self.view.plain(pixels)
                    parts.append(self.model.encode_image(x))
            total = total + torch.cat(parts)
        z = F.normalize(total, dim=1)
        counts = [len(boxes) for boxes in regions]
        return list(z.split(counts))


def cut(image, boxes, scale, size):
    """image uint8 (3, S, S), boxes (m, 4) -> what lies in them, (m, 3, size, size), 0 to 255."""
    _, height, width = image.shape
    least = boxes[:, :2]
    most = boxes[:, 2:]
    centre = (least + most) / 2
    half = scale * (most - least) / 2
    wider = torch.cat([centre - half, centre + half], dim=1)
    wider = clip_boxes_to_image(wider, (height, width))
    x1, y1, x2, y2 = wider.unbind(1)
    y1 = y1.clamp(max=height - 2)
    x1 = x1.clamp(max=width - 2)
    tall = (y2 - y1).clamp(min=2)  # or there might be no pixel whose centre is inside
    wide = (x2 - x1).clamp(min=2)
    unflipped = torch.zeros(len(boxes), dtype=torch.bool, device=image.device)
    batch = image.float()
    batch = batch.expand(len(boxes), -1, -1, -1)
    places = torch.stack([y1, x1, tall, wide], dim=1)
    return crop(batch, places, unflipped, size)


@torch.no_grad()
def regions_to_distil(args, model, teacher, pictures):
    """For every training image, M proposals of the detector as it is now, without their names, and
    CLIP's embeddings of them: computed once, as in section 3.3. Each process does its part."""
    # Paper: proposals of an RPN trained beforehand. Here: this detector's after proposal_epochs.
    model.eval()
    if world_size() > 1:
        for tensor in model.buffers():
            dist.broadcast(tensor, 0)  # running statistics may differ between processes
    n = len(pictures.images)
    found = torch.zeros(n, args.distilled, 4)
    embeddings = torch.zeros(n, args.distilled, model.text.shape[1], dtype=torch.half)
    count = torch.zeros(n, dtype=torch.long)
    mine = torch.arange(rank(), n, world_size())
    for rows in mine.split(50):
        images = pictures.read(rows)
        proposals, _ = model.propose(view_of(args, images))
        regions = [boxes[: args.distilled, :4] for boxes in proposals]
        embedded = teacher.embed_regions(images, regions)
        for row, boxes, z in zip(rows, regions, embedded):
            m = len(boxes)
            count[row] = m
            found[row, :m] = boxes.cpu()
            embeddings[row, :m] = z.cpu()
    model.train()
    if world_size() > 1:
        for part in (found, embeddings, count):
            part_there = part.to(model.text.device)
            dist.all_reduce(part_there)
            part.copy_(part_there)
    return {"regions": found, "embeddings": embeddings, "count": count}


def view_of(args, images):
    return build_views(args)[0].plain(images)


# ---------------------------------------------------------------------------------- detection
@torch.no_grad()
def detect(args, model, images, names, is_base, alone=False):
    """images uint8 (B, 3, S, S), names: CLIP's embeddings (N, C), is_base (N,) -> per way of
    scoring, or of the mode alone, per image (boxes, scores, labels) after non-maximum suppression
    per class."""
    proposals, pooled = model.propose(view_of(args, images))
    hidden, z = model.head(pooled)
    if model.image_head is not None:
        _, z_image = model.image_head(pooled)
    else:
        z_image = z
    logits = text_logits(z, model.background, names, args.temperature)
    text_scores = logits.softmax(1)
    text_scores = text_scores[:, 1:]
    image_scores = z_image @ names.T / args.temperature  # without background
    image_scores = image_scores.softmax(1)
    objectness = torch.cat([found[:, 4:] for found in proposals])
    scores = {args.mode: text_scores}
    if args.mode in ("image", "ensemble"):  # this head knows no background: see detect_by_teacher
        scores["image"] = objectness * image_scores
    if args.mode == "ensemble":
        scores["text"] = text_scores
        scores["ensemble"] = ensemble(text_scores, image_scores, is_base, args.ensemble_weight)
    if alone:
        scores = {args.mode: scores[args.mode]}
    boxes = refine(args, model, hidden, proposals)
    sizes = [len(found) for found in proposals]
    detections = {}
    for name, found in scores.items():
        detections[name] = suppress(boxes, found.split(sizes))
    return detections


def refine(args, model, hidden, proposals):
    """The boxes (n, 4) of each image, as the regressor moves its proposals."""
    corners = [found[:, :4] for found in proposals]
    moves = model.box_regressor(hidden)
    boxes = model.coder.decode(moves, corners)
    boxes = clip_boxes_to_image(boxes.view(-1, 4), (args.size, args.size))
    counts = [len(found) for found in proposals]
    return boxes.split(counts)


def suppress(boxes, scores):
    """Per image, boxes (n, 4) and scores (n, N): every box as one detection per name, the 100 best
    of which are kept after non-maximum suppression at .5 within each name."""
    found = []
    for box, score in zip(boxes, scores):
        n, names = score.shape
        box = box.repeat_interleave(names, 0)
        label = torch.arange(names, device=box.device).repeat(n)
        score = score.flatten()
        kept = batched_nms(box, score, label, 0.5)[: scenes.DETECTIONS]
        found.append((box[kept].cpu(), score[kept].cpu(), label[kept].cpu()))
    return found


@torch.no_grad()
def detect_by_teacher(args, model, teacher, images, names):
    """The slow way (section 3.2): CLIP itself on each proposal, times its objectness."""
    proposals, pooled = model.propose(view_of(args, images))
    regions = [found[:, :4] for found in proposals]
    embeddings = teacher.embed_regions(images, regions)
    scale = teacher.model.log_scale.exp()
    scores = []
    for found, z in zip(proposals, embeddings):
        logits = scale * z @ names.T
        objectness = found[:, 4:]
        scores.append(objectness * logits.softmax(1))
    hidden, _ = model.head(pooled)
    boxes = refine(args, model, hidden, proposals)
    return suppress(boxes, scores)


def measure(args, model, teacher, data, by_teacher=False):
    """Average precision on the test images; with by_teacher also CLIP's on the same proposals, the
    seconds per image of both, and how many of the objects the proposals contain."""
    model.eval()
    is_base = data.judged_base
    found = {}
    for rows in torch.arange(len(data.test)).split(25):
        images = data.test_pictures.read(rows)
        ways = detect(args, model, images, data.names, data.is_base)
        for way, detections in ways.items():
            found.setdefault(way, []).extend(detections)
    metrics = {}
    if by_teacher:
        found["teacher"] = race(args, model, teacher, data, metrics)
        guesses = scenes.guess_novel(found[args.mode], is_base)
        guessed = scenes.average_by_kind(guesses, data.test, is_base)
        metrics["guess_novel_ap50"] = guessed.get("novel_ap50")
    for way, detections in found.items():
        start = "" if way == args.mode else f"{way}_"
        for key, value in scenes.average_by_kind(detections, data.test, is_base).items():
            metrics[start + key] = value
    model.train()
    return metrics


@torch.no_grad()
def race(args, model, teacher, data, metrics):
    """The teacher's detections on the test images; adds to metrics the seconds per image that they
    and the model's take, and the recall of the 20 best proposals in percent."""
    seconds = 0.0
    teacher_seconds = 0.0
    found = []
    hits = []
    kinds = []
    for rows in torch.arange(len(data.test)).split(25):
        images = data.test_pictures.read(rows)
        started = time.time()
        detect(args, model, images, data.names, data.is_base, alone=True)
        between = time.time()
        found += detect_by_teacher(args, model, teacher, images, data.names)
        teacher_seconds += time.time() - between
        seconds += between - started
        proposals, _ = model.propose(view_of(args, images))
        for row, boxes in zip(rows.tolist(), proposals):
            overlaps = box_iou(data.test.boxes[row], boxes[:20, :4].cpu())
            overlaps = F.pad(overlaps, [0, 1])  # also without a proposal
            labels = data.test.labels[row]
            hits.append(overlaps.amax(1) >= 0.5)
            kinds.append(data.judged_base[labels])
    metrics["detection_seconds"] = seconds / len(data.test)
    metrics["teacher_seconds"] = teacher_seconds / len(data.test)
    hits = torch.cat(hits).float()
    is_base = torch.cat(kinds)
    for kind, chosen in (("base", is_base), ("novel", ~is_base)):
        if chosen.any():
            metrics[f"{kind}_recall"] = 100 * hits[chosen].mean().item()
    return found


# ---------------------------------------------------------------------------------------- data
class Detection:
    """The pictures with boxes of base names to train on, those with all boxes to test on, and the
    names with CLIP's embeddings."""

    def __init__(self, args, teacher, device):
        rare = ()
        if args.data == "scenes":
            rare = tuple(SETTINGS["novel"][0].split(","))  # whichever of them are novel
            train = scenes.scenes(2000, args.seed, "detect", rare, 0.1, True)
            test = scenes.scenes(500, scenes.TEST_SEED + args.seed, "detect, test", rare, 0.3, True)
            self.name = "scenes"
        else:
            train = scenes.load_boxes(args.data, "train")
            test = scenes.load_boxes(args.data, "val")
            self.name = Path(args.data).resolve().name
        novel = split_names(args.novel)
        for name in novel:
            if name not in train.classes:
                fail(f"--novel {name}: not one of {', '.join(train.classes)}")
        if len(set(novel)) == len(train.classes):
            fail("--novel: all names are novel, so there is nothing to learn from boxes")
        if train.classes != test.classes:
            fail(f"--data {args.data}: train and val have different names")
        self.classes = train.classes
        self.large = False
        self.test = test
        self.is_base = torch.tensor([name not in novel for name in train.classes]).to(device)
        apart = novel or rare  # where all names are labelled, figures of the rare ones stand apart
        self.judged_base = torch.tensor([name not in apart for name in train.classes])
        self.names = teacher.embed_names(train.classes)
        self.pictures = scenes.Pictures(
            train.images, args.size, args.batch_size, device, args.seed, args.workers
        )
        self.test_pictures = scenes.Pictures(
            test.images, args.size, world_size(), device, 0, args.workers
        )
        new = self.is_base.cpu().cumsum(0) - 1  # names -> base names
        self.boxes = []  # of base names only, in pixels of the resized images
        self.labels = []
        for boxes, labels, size in zip(train.boxes, train.labels, train.sizes):
            used = self.is_base.cpu()[labels]
            boxes = scenes.resize_boxes(boxes[used], size, args.size)
            labels = labels[used]
            self.boxes.append(boxes)
            self.labels.append(new[labels])
        for row, size in enumerate(test.sizes):
            test.boxes[row] = scenes.resize_boxes(test.boxes[row], size, args.size)


def split_names(text):
    """Names separated by commas."""
    return [name.strip() for name in text.split(",") if name.strip()]


def take(args, data, rows, distilled, epoch, device):
    """What forward takes of these training images, apart from the images, all mirrored where the
    image is; and which images are (B,). Draws are a function of (seed, epoch, image)."""
    boxes = []
    labels = []
    regions = []
    embeddings = []
    generators = []
    flips = []
    for row in rows.tolist():
        generator = make_generator("regions", args.seed, epoch, row)
        flip = torch.rand(1, generator=generator).item() < 0.5
        generators.append(generator)
        flips.append(flip)
        found = data.boxes[row]
        if flip:
            found = scenes.flip_boxes(found, args.size)
        boxes.append(found.to(device))
        labels.append(data.labels[row].to(device))
        if distilled is not None:
            count = distilled["count"][row]
            found = distilled["regions"][row, :count]
            if flip:
                found = scenes.flip_boxes(found, args.size)
            z = distilled["embeddings"][row, :count]
            regions.append(found.to(device))
            embeddings.append(z.to(device).float())
    if distilled is None:
        regions = None
        embeddings = None
    return (boxes, labels, regions, embeddings, generators), torch.tensor(flips, device=device)


# ------------------------------------------------------------------------------------ training
def train(args):
    """Trains, evaluates and writes everything to args.out; returns the content of result.json."""
    if args.epochs <= args.proposal_epochs and args.mode != "text":
        fail(f"--epochs {args.epochs}: CLIP's share begins after {args.proposal_epochs} epochs")
    find_teacher(args)
    device = launch()
    teacher = Teacher(args, device)
    data = Detection(args, teacher, device)
    pictures = data.pictures

    torch.manual_seed(args.seed)  # all processes start from the same weights
    model = ViLD(args, data.names[data.is_base]).to(device)
    if device.type == "cuda":  # batch statistics over all processes (section 4); GPUs only
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    optimizer = build_optimizer(args, model)

    run = harness.Run(args, model, optimizer, pictures)  # continues where a killed run stopped
    if run.is_new:  # the baseline: random weights
        run.log_start(measure(args, model, teacher, data))
    if rank() == 0:
        names = [name for name, base in zip(data.classes, data.is_base.tolist()) if base]
        harness.save(run.out / "names.txt", "\n".join(names) + "\n")
    if args.compile:
        model.compile()
    network = (
        DistributedDataParallel(model, find_unused_parameters=True) if world_size() > 1 else model
    )

    distilled = None
    file = run.out / "regions.pt"
    for epoch in run.epochs():
        if epoch > args.proposal_epochs and args.mode != "text" and distilled is None:
            if epoch == args.proposal_epochs + 1:
                distilled = regions_to_distil(args, model, teacher, pictures)
                if rank() == 0:
                    harness.save(file, distilled)
            else:
                distilled = harness.load_checkpoint(file)
            model.chance_loss = model.chance(distilling=True)
        pictures.set_epoch(epoch)
        for step, (rows, images) in enumerate(pictures):
            lr = learning_rate(args, epoch - 1 + step / len(pictures))
            for group in optimizer.param_groups:
                group["lr"] = lr
            targets, flips = take(args, data, rows, distilled, epoch, device)
            images = torch.where(flips.view(-1, 1, 1, 1), images.flip(3), images)
            x = view_of(args, images)
            bf16 = device.type == "cuda" and args.precision == "bf16"
            with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                loss, z = network(x, *targets)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            run.after_step(loss)

        metrics = {"lr": lr, **health(z)}
        last = epoch == args.epochs
        if last or epoch % args.eval_every == 0:
            metrics |= measure(args, model, teacher, data, by_teacher=last)
        run.after_epoch(metrics)  # prints a line, writes checkpoint.pt and log.jsonl
    found = {}
    for key, value in run.log[-1].items():
        if "ap" in key or "recall" in key or key.endswith("_seconds"):
            found[key] = value
    return run.finish(data, found, draw_report)


@torch.no_grad()
def draw_report(run, data, title):
    """report.png: detections on test images, average precision by way of scoring, the scores of
    one region, and the curves."""
    if rank() > 0:
        return
    from matplotlib.figure import Figure  # here, so that nothing else has to wait for it

    args = run.args
    model = run.model.eval()
    figure = Figure(figsize=(16, 10), layout="constrained")
    figure.suptitle(title)
    axes = figure.subplots(2, 4).flatten()
    images = data.test_pictures.read(torch.arange(min(4, len(data.test))))
    found = detect(args, model, images, data.names, data.is_base)[args.mode]
    for axis, image, detections in zip(axes, images, found):
        draw_surest(axis, image.cpu(), detections, data.classes, data.is_base.tolist())
    axes[0].set_title("blue: base names, orange: novel ones")

    last = run.log[-1]
    names = []
    for start in ("", "text_", "image_", "teacher_"):
        if f"{start}ap50" in last:
            place = len(names)
            names.append(start.strip("_") or args.mode)
            axes[4].bar(place - 0.2, last.get(f"{start}base_ap50", 0), 0.4, color="tab:blue")
            axes[4].bar(place + 0.2, last.get(f"{start}novel_ap50", 0), 0.4, color="tab:orange")
    axes[4].set_xticks(range(len(names)), names)
    axes[4].set(title="AP50 (%) on test images", ylim=(0, 100))

    _, pooled = model.propose(view_of(args, images[:1]))
    head = model.image_head or model.head
    _, z = head(pooled[:1])
    cosines = z @ data.names.T
    axes[5].barh(range(len(data.classes)), cosines[0].tolist())
    axes[5].set_yticks(range(len(data.classes)), data.classes)
    axes[5].set_title("cosines of a region with all names")
    harness.draw_curve(axes[6], run.log, "loss")
    axes[6].set_title(f"loss; with CLIP's from epoch {args.proposal_epochs + 1}")
    harness.draw_curve(axes[7], run.log, "base_ap50")
    if "novel_ap50" in last:
        harness.draw_curve(axes[7], run.log, "novel_ap50")
    axes[7].set_title("AP50 (%), base and novel")
    picture = io.BytesIO()
    figure.savefig(picture, dpi=80)
    harness.save(run.out / "report.png", picture.getvalue())
    model.train()


def draw_surest(axis, image, detections, names, is_base):
    """The surest name at each place on a matplotlib axis."""
    boxes, scores, labels = detections
    kept = surest(detections)
    texts = []
    colours = []
    for row in kept.tolist():
        label = labels[row].item()
        texts.append(f"{names[label]} {scores[row].item():.2f}")
        colours.append("tab:blue" if is_base[label] else "tab:orange")
    scenes.draw_boxes(axis, image, boxes[kept], texts, colours or ["tab:blue"])


def read_names(path):
    """The base names of a run, which it leaves in a file beside its checkpoint."""
    try:
        return path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        fail(f"cannot read {path}: {error.strerror}")


def surest(detections):
    """The rows of detections to show: of those at one place the one with the highest score."""
    boxes, scores, _ = detections
    kept = nms(boxes, scores, 0.5)
    return kept[scores[kept] > scenes.SURE][:MOST_SHOWN]


def show(args):
    """Draws what the trained detector finds on a picture, also of names it never saw."""
    from matplotlib.figure import Figure

    device = launch()
    names = split_names(args.names or "")
    if not names:
        fail("--detect needs --names: what to look for, separated by commas")
    path = Path(args.out) / "checkpoint.pt"
    checkpoint = harness.load_checkpoint(path)
    try:
        trained = Namespace(**checkpoint["args"])
        model = ViLD(trained, checkpoint["model"]["text"])
        model.load_state_dict(checkpoint["model"])
    except (KeyError, TypeError, AttributeError, RuntimeError):
        fail(f"{path} is not a checkpoint of this program; `python vild.py` makes one")
    model = model.to(device).eval()
    teacher = Teacher(trained, device)
    base = read_names(path.with_name("names.txt"))
    known = teacher.embed_names(base)
    if known.shape != model.text.shape or not torch.allclose(known, model.text, atol=1e-3):
        fail(f"{trained.teacher} is not the CLIP that {path} was trained with")
    embedded = teacher.embed_names(names)
    is_base = torch.tensor([name in base for name in names], device=device)
    image, square = scenes.read_picture(args.detect, trained.size)
    found = detect(trained, model, square.to(device), embedded, is_base)[trained.mode][0]
    boxes, scores, labels = found
    _, height, width = image.shape
    boxes = boxes * torch.tensor([width, height, width, height]) / trained.size
    figure = Figure(figsize=(8, 8), layout="constrained")
    axis = figure.subplots()
    draw_surest(axis, image, (boxes, scores, labels), names, is_base.tolist())
    picture = io.BytesIO()
    figure.savefig(picture, dpi=100)
    harness.save(Path(args.out) / "detections.png", picture.getvalue())
    shown = surest((boxes, scores, labels)).tolist()
    for row in shown:
        place = ", ".join(f"{side:.0f}" for side in boxes[row].tolist())
        print(f"{names[labels[row]]} ({100 * scores[row].item():.0f} %) at {place}")
    print(f"{len(shown)} found with a score over {scenes.SURE}", flush=True)
    print(f"drawn in {Path(args.out) / 'detections.png'}")
    return boxes, scores, labels


# ------------------------------------------------------------------------------------ skeleton
def find_teacher(args):
    """Trains clip.py if its checkpoint is the default and missing."""
    default = SETTINGS["teacher"][0]
    if not args.teacher:
        fail("--teacher: which checkpoint of CLIP?")
    if Path(args.teacher).exists():
        return
    if args.teacher != default or "RANK" in os.environ:
        fail(f"--teacher {args.teacher}: no such file; `python clip.py` makes {default}")
    print(f"there is no {default} yet: training clip.py first", flush=True)
    command = [sys.executable, Path(__file__).with_name("clip.py"), "--out", Path(default).parent]
    if subprocess.run(command).returncode:
        fail("clip.py did not finish; run it on its own")


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
        return train(args) if args.detect is None else show(args)


if __name__ == "__main__":
    main(parse_args())
