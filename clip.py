"""CLIP: Learning Transferable Visual Models From Natural Language Supervision
Alec Radford, Jong Wook Kim, Chris Hallacy, Aditya Ramesh, et al. ICML 2021, arXiv 2103.00020

An image and the caption found beside it should find each other among all the images and captions
in the batch. The two encoders meet in one space, so a class is recognised by its name alone: write
the names as sentences, embed them, and the nearest sentence to an image is its class (zero-shot).

    python clip.py                                            # a few CPU minutes, no download
    torchrun --nproc_per_node=8 clip.py --data FOLDER         # images, each with a .txt beside it
    python clip.py --classify "stripes,dots,my cat" --images FOLDER       # after the first command

Read it beside simclr.py: a caption takes the place of the second view, the temperature is learned,
the projection is linear, and there is hardly any augmentation. captions.py has data and tokens.

The paper's I_f, T_f are h_image, h_text; I_e, T_e are z_image, z_text; t is log_scale.
Shapes: B images per process, W processes, D features, C embedding dimensions, L tokens, S cells.
Measured: 99.9 % zero-shot top-1 on patterns (random weights 10.0 %), mean of 3 seeds.
"""

import math
import os
from argparse import Namespace
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import harness  # command line, checkpoint, log, report: what every run leaves on disk
from captions import FRAMES, GROUNDS, TEMPLATES, Tokenizer, build_tokenizer, draw_pairs
from captions import image_paths, load_captions, read_images, read_merges
from common import Augment, Views, accuracy, fail, features, health, linear_eval, rank, resnet
from common import to_device, world_size

# patterns: two cores. cc3m: a folder with captions on one GPU, open_clip's values for CC3M. paper:
# its ViT-B/32 (tables 18 to 20), warm-up 2,000 of 12,207 steps per epoch.
SETTINGS = {
    "recipe":              ("patterns", "cc3m",     "paper",    "what the columns are for"),
    "arch":                ("thin",     "resnet50", "vit_base", "thin, a ResNet, or one of VITS"),
    "size":                (32,         224,        224,        "side of a view, in pixels"),
    "patch_size":          (8,          32,         32,         "side of a ViT's patch"),
    "crop_min":            (0.7,        0.9,        0.9,        "least area of a crop, of 1"),
    "text":                ("transformer", "transformer", "transformer", "or cbow: mean of words"),
    "text_width":          (64,         512,        512,        "width of the text encoder"),
    "text_layers":         (2,          12,         12,         "its layers"),
    "text_heads":          (2,          8,          8,          "its attention heads"),
    "context":             (24,         77,         77,         "L, most tokens of a caption"),
    "vocabulary":          (200,        8000,       48894,      "merges to learn from captions"),
    "merges":              ("",         "",         "",         "or a file of them: OpenAI's"),
    "epochs":              (8,          30,         32,         "passes over the images"),
    "batch_size":          (256,        128,        32768,      "images per step, all processes"),
    "lr":                  (3e-3,       1e-3,       5e-4,       "whatever the batch"),
    "beta2":               (0.98,       0.999,      0.98,       "of AdamW; paper's ResNets .999"),
    "warmup_epochs":       (1.0,        0.5,        0.16,       "epochs of linear warm-up"),
    "weight_decay":        (0.2,        0.1,        0.2,        "not on gains, biases, scale"),
    "projection_dim":      (64,         1024,       512,        "C, width of the embedding"),
    "eval_every":          (1,          1,          1,          "epochs between evaluations"),
}  # fmt: skip
USES = {
    "data": "patterns, or a folder of images with captions",
    "classify": "names, separated by commas, of which each of --images gets the most similar one",
    "images": "a picture, or a folder of them",
}
VITS = {  # width D, layers; a head for every 64 channels (table 19)
    "vit_thin": (64, 4),
    "vit_base": (768, 12),
    "vit_large": (1024, 24),
}


# -------------------------------------------------------------------------------------- method
def build_views(args):
    """Section 2.3: a random square crop is the only augmentation."""
    # Paper: a crop of the resized image. Here: of at least crop_min of its area, because open_clip,
    # which reproduced the paper's figures, crops so.
    view = Augment(
        size=args.size,
        scale=(args.crop_min, 1.0),
        flip=0.0,
        bicubic=True,
        margin=1.0,  # evaluation shows the image up to its border (official code)
        mean=(0.48145466, 0.4578275, 0.40821073),  # of the paper's data (official code)
        std=(0.26862954, 0.26130258, 0.27577711),
    )
    return [view]


class CLIP(nn.Module):
    """forward(x, text): images (B, 3, H, W) and tokens (B, L) -> loss, and the embedding of the
    images (B, C) for monitoring."""

    def __init__(self, args, vocabulary):
        super().__init__()
        self.backbone = build_backbone(args)
        self.projector = build_projector(args, self.backbone.dim)
        self.text_encoder = build_text_encoder(args, vocabulary)
        self.text_projector = nn.Linear(args.text_width, args.projection_dim, bias=False)
        nn.init.normal_(self.text_projector.weight, std=args.text_width**-0.5)
        self.log_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))
        self.chance_loss = math.log(args.batch_size)  # if all similarities were equal

    def encode_image(self, x):
        h_image = self.backbone(x)  # (B, D)
        return F.normalize(self.projector(h_image), dim=1)  # (B, C)

    def encode_text(self, text):
        h_text = self.text_encoder(text)  # (B, text_width)
        return F.normalize(self.text_projector(h_text), dim=1)  # (B, C)

    def forward(self, x, text):
        z_image = self.encode_image(x)
        z_text = self.encode_text(text)
        return contrastive_loss(z_image, z_text, self.log_scale.exp()), z_image.detach()


@torch.autocast("cuda", enabled=False)  # logits in float32 (TF32 on GPUs), not bf16
def contrastive_loss(z_image, z_text, scale):
    """Figure 3: z_image, z_text (B, C), normalised -> mean of two cross-entropies: each image of
    this process has to find its caption among those of all processes, each caption its image."""
    labels = rank() * len(z_image) + torch.arange(len(z_image), device=z_image.device)
    image_logits = scale * z_image @ gather(z_text).T  # (B, WB)
    text_logits = scale * z_text @ gather(z_image).T  # (B, WB)
    image_loss = F.cross_entropy(image_logits, labels)
    text_loss = F.cross_entropy(text_logits, labels)
    return (image_loss + text_loss) / 2


def build_projector(args, dim):
    """Linear (section 2.3); after a ResNet with biases, as in the official code."""
    projector = nn.Linear(dim, args.projection_dim, bias=args.arch not in VITS)
    nn.init.normal_(projector.weight, std=dim**-0.5)
    return projector


def build_backbone(args):
    """A ViT, or a ResNet with attention pooling: (B, 3, H, W) -> h (B, D), with D in `.dim`."""
    if args.arch in VITS:
        return VisionTransformer(args)
    network = resnet(args.arch, args.size, zero_init_residual=True)  # as in the official code
    if hasattr(network.layer1[0], "conv3") and args.size > 64:
        add_pooling(network)
    network.avgpool = nn.Identity()
    with torch.no_grad():
        maps = network.eval()(torch.zeros(1, 3, args.size, args.size))  # (1, D * S)
    network.avgpool = AttentionPool(network.dim, maps.shape[1] // network.dim)
    return network.train()


def add_pooling(network):
    """Section 2.3, on ResNets of bottlenecks: three convolutions at the start (ResNet-D), and an
    average pooling in the place of every stride (Zhang, 2019)."""
    half = network.conv1.out_channels // 2
    network.conv1 = nn.Conv2d(3, half, 3, stride=2, padding=1, bias=False)
    network.bn1 = nn.BatchNorm2d(half)
    network.maxpool = nn.Sequential(
        nn.Conv2d(half, half, 3, padding=1, bias=False),
        nn.BatchNorm2d(half),
        nn.ReLU(inplace=True),
        nn.Conv2d(half, 2 * half, 3, padding=1, bias=False),
        nn.BatchNorm2d(2 * half),
        nn.ReLU(inplace=True),
        nn.AvgPool2d(2),
    )
    for stage in (network.layer2, network.layer3, network.layer4):
        block = stage[0]
        shortcut = block.downsample[0]
        channels = (shortcut.in_channels, shortcut.out_channels)
        block.downsample[0] = PooledConvolution(*channels, 1, bias=False)
        block.conv1.stride = (1, 1)
        block.conv2.stride = (1, 1)
        block.conv3 = PooledConvolution(channels[1] // 4, channels[1], 1, bias=False)


class PooledConvolution(nn.Conv2d):
    def forward(self, x):
        return super().forward(F.avg_pool2d(x, 2))


class AttentionPool(nn.Module):
    """Section 2.3: cells (B, D, H, W) -> h (B, D), in which the mean of the cells attends to itself
    and to all cells."""

    def __init__(self, dim, cells):
        super().__init__()
        self.heads = max(dim // 64, 1)
        self.positions = nn.Parameter(dim**-0.5 * torch.randn(1 + cells, dim))
        self.q_proj = nn.Linear(dim, dim)
        self.k_proj = nn.Linear(dim, dim)
        self.v_proj = nn.Linear(dim, dim)
        for projection in (self.q_proj, self.k_proj, self.v_proj):
            nn.init.normal_(projection.weight, std=dim**-0.5)

    def forward(self, x):
        x = x.flatten(2).mT  # (B, S, D)
        mean = x.mean(1, keepdim=True)
        x = torch.cat([mean, x], dim=1)  # (B, 1 + S, D)
        x = x + self.positions
        q = self.q_proj(x[:, :1])  # of the mean alone
        k = self.k_proj(x)
        v = self.v_proj(x)
        q = self.split(q)
        k = self.split(k)
        v = self.split(v)
        h = F.scaled_dot_product_attention(q, k, v)  # (B, heads, 1, D / heads)
        return h.flatten(1)

    def split(self, x):
        return x.unflatten(2, (self.heads, -1)).transpose(1, 2)  # (B, heads, 1 + S, D / heads)


class VisionTransformer(nn.Module):
    """A ViT with one more layer normalisation, before the first block (section 2.3)."""

    def __init__(self, args):
        super().__init__()
        if args.size % args.patch_size:
            fail(f"--size {args.size}: not a multiple of --patch-size {args.patch_size}")
        self.dim, layers = VITS[args.arch]
        cells = (args.size // args.patch_size) ** 2
        std = self.dim**-0.5
        self.conv1 = nn.Conv2d(3, self.dim, args.patch_size, args.patch_size, bias=False)
        self.class_token = nn.Parameter(std * torch.randn(self.dim))
        self.positions = nn.Parameter(std * torch.randn(1 + cells, self.dim))
        self.ln_pre = nn.LayerNorm(self.dim)
        self.blocks = nn.ModuleList(Block(self.dim, self.dim // 64) for _ in range(layers))
        self.ln_post = nn.LayerNorm(self.dim)

    def forward(self, x):
        x = self.conv1(x)
        x = x.flatten(2).mT  # (B, S, D)
        token = self.class_token.expand(len(x), 1, -1)
        x = torch.cat([token, x], dim=1)  # (B, 1 + S, D)
        x = self.ln_pre(x + self.positions)
        for block in self.blocks:
            x = block(x)
        return self.ln_post(x[:, 0])


class Block(nn.Module):
    """A layer of both transformers: normalisation first, then attention or MLP, then the sum."""

    def __init__(self, width, heads):
        super().__init__()
        self.ln_1 = nn.LayerNorm(width)
        self.attn = nn.MultiheadAttention(width, heads, batch_first=True)
        self.ln_2 = nn.LayerNorm(width)
        self.c_fc = nn.Linear(width, 4 * width)
        self.c_proj = nn.Linear(4 * width, width)

    def forward(self, x, mask=None):
        n = self.ln_1(x)
        x = x + self.attn(n, n, n, need_weights=False, attn_mask=mask)[0]
        n = self.ln_2(x)
        n = self.c_fc(n)
        n = n * torch.sigmoid(1.702 * n)  # the official code's approximation of GELU
        return x + self.c_proj(n)


def build_text_encoder(args, vocabulary):
    if args.text == "transformer":
        return TextTransformer(args, vocabulary)
    if args.text == "cbow":
        return ContinuousBagOfWords(args, vocabulary)
    fail(f"--text {args.text}: neither transformer nor cbow")


class TextTransformer(nn.Module):
    """Section 2.3: tokens (B, L) -> h (B, text_width), the output at the end token, which by the
    causal mask has seen the whole caption and none of the padding behind it."""

    def __init__(self, args, vocabulary):
        super().__init__()
        width = args.text_width
        if width % args.text_heads:
            fail(f"--text-heads {args.text_heads}: not a divisor of --text-width {width}")
        self.end = vocabulary - 1
        self.token_embedding = nn.Embedding(vocabulary, width)
        self.positions = nn.Parameter(0.01 * torch.randn(args.context, width))
        self.blocks = nn.ModuleList(Block(width, args.text_heads) for _ in range(args.text_layers))
        self.ln_final = nn.LayerNorm(width)
        mask = torch.full((args.context, args.context), -math.inf).triu(1)
        self.register_buffer("mask", mask, persistent=False)
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        std = width**-0.5
        residual_std = std * (2 * args.text_layers) ** -0.5  # as GPT-2's (official code)
        for block in self.blocks:
            nn.init.normal_(block.attn.in_proj_weight, std=std)
            nn.init.normal_(block.attn.out_proj.weight, std=residual_std)
            nn.init.normal_(block.c_fc.weight, std=(2 * width) ** -0.5)
            nn.init.normal_(block.c_proj.weight, std=residual_std)

    def forward(self, text):
        x = self.token_embedding(text) + self.positions  # (B, L, text_width)
        for block in self.blocks:
            x = block(x, self.mask)
        end = (text == self.end).int().argmax(1)  # (B,)
        image = torch.arange(len(x), device=x.device)
        return self.ln_final(x[image, end])


class ContinuousBagOfWords(nn.Module):
    """The simpler text encoder: the mean of the embeddings of a caption's tokens, in any order."""

    def __init__(self, args, vocabulary):
        super().__init__()
        self.end = vocabulary - 1
        self.token_embedding = nn.Embedding(vocabulary, args.text_width)

    def forward(self, text):
        end = (text == self.end).int().argmax(1, keepdim=True)
        place = torch.arange(text.shape[1], device=text.device)
        used = (place <= end).unsqueeze(2)  # (B, L, 1); padding is behind the end token
        x = self.token_embedding(text) * used
        return x.sum(1) / (end + 1)


def build_optimizer(args, model):
    """AdamW; gains, biases and the temperature are not decayed (section 2.5)."""
    decayed = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    groups = [
        {"params": decayed, "weight_decay": args.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=0.0, betas=(0.9, args.beta2), eps=1e-6)


def learning_rate(args, epoch):
    """Linear warm-up, then a half cosine down to 0 (section 2.5); epoch grows with every step."""
    if epoch < args.warmup_epochs:
        return args.lr * epoch / args.warmup_epochs
    progress = (epoch - args.warmup_epochs) / (args.epochs - args.warmup_epochs)
    return args.lr * (1 + math.cos(math.pi * progress)) / 2


# ----------------------------------------------------------------------------------- zero-shot
@torch.no_grad()
def embed_texts(model, tokenizer, texts):
    """Sentences -> (N, C), normalised."""
    device = model.log_scale.device
    parts = []
    for text in tokenizer(texts).split(500):
        parts.append(model.encode_text(text.to(device)))
    return torch.cat(parts)


def embed_classes(model, tokenizer, names, templates):
    """Section 3.1.4: each name in all templates -> the mean of the embeddings, (N, C), normalised.
    These are the weights of the zero-shot classifier."""
    total = 0.0
    for template in templates:
        sentences = [template.format(name) for name in names]
        total = total + embed_texts(model, tokenizer, sentences)
    return F.normalize(total, dim=1)


@torch.no_grad()
def embed_images(model, images, view, workers):
    """Images, as in common.Data -> (N, C), normalised."""
    h = features(model.backbone, images, view, model.log_scale.device, workers)
    return F.normalize(model.projector(h), dim=1)


def evaluate(args, model, tokenizer, data, last=True):
    """All figures of the epoch, in percent: kNN and the linear classifier as for any backbone, and
    what the two encoders do together without a label."""
    view = build_views(args)[0]
    device = model.log_scale.device
    metrics = linear_eval(model.backbone, data, view, device, args.workers, last)
    images, captions = data.pairs
    z_image = embed_images(model, images, view, args.workers)
    z_text = embed_texts(model, tokenizer, captions)
    cosines = z_image @ z_text.T
    own = torch.arange(len(captions), device=device)
    for key, value in accuracy(cosines, own).items():
        metrics[f"image_to_text_{key}"] = value
    for key, value in accuracy(cosines.T, own).items():
        metrics[f"text_to_image_{key}"] = value
    if data.test:
        images, labels = data.test
        classes = embed_classes(model, tokenizer, data.classes, data.templates)
        z = embed_images(model, images, view, args.workers)
        metrics["zero_shot_top1"] = accuracy(z @ classes.T, labels)["top1"]
    if data.pasted:
        images, labels, grounds, held_out = data.pasted
        z = embed_images(model, images, view, args.workers)
        metrics["pasted_top1"] = accuracy(z @ classes.T, labels)["top1"]
        names = []
        for name in data.classes:
            names += [f"{name} on {ground}" for ground in GROUNDS]
        pairs = embed_classes(model, tokenizer, names, data.templates)
        scores = z @ pairs.T
        both = labels * len(GROUNDS) + grounds
        metrics["held_out_top1"] = accuracy(scores[held_out], both[held_out])["top1"]
        metrics["seen_top1"] = accuracy(scores[~held_out], both[~held_out])["top1"]
    return metrics


def load(path, device):
    """(model, tokenizer, args) of the checkpoint.pt of a run, beside which merges.txt lies. Exits
    with one line if there is none."""
    checkpoint = harness.load_checkpoint(path)
    try:
        args = Namespace(**checkpoint["args"])
        tokenizer = Tokenizer(read_merges(Path(path).with_name("merges.txt")), args.context)
        model = CLIP(args, tokenizer.vocabulary)
        model.load_state_dict(checkpoint["model"])
    except (KeyError, TypeError, AttributeError, RuntimeError):
        fail(f"{path} is not a checkpoint of this program; `python clip.py` makes one")
    return model.to(device).eval(), tokenizer, args


def classify(args):
    """Prints, for each image, the most similar of some names and its share of the softmax."""
    device = launch()
    names = [name.strip() for name in args.classify.split(",") if name.strip()]
    if not names or not args.images:
        fail("--classify needs names and --images, a picture or a folder of them")
    model, tokenizer, trained = load(Path(args.out) / "checkpoint.pt", device)
    paths = image_paths(args.images)
    z = embed_images(model, read_images(paths, device), build_views(trained)[0], args.workers)
    templates = FRAMES if trained.data == "patterns" else TEMPLATES
    classes = embed_classes(model, tokenizer, names, templates)
    logits = model.log_scale.exp() * z @ classes.T  # (N, names)
    shares = 100 * logits.softmax(1)  # in percent
    found = []
    for path, share in zip(paths, shares):
        best = share.argmax().item()
        found.append(names[best])
        print(f"{path}: {names[best]} ({share[best]:.0f} %)")
    return found


# ------------------------------------------------------------------------------------ training
def train(args):
    """Trains, evaluates and writes everything to args.out; returns the content of result.json."""
    device = launch()
    data = load_captions(args.data, args.root, device)
    augments = build_views(args)
    views = Views(data.pretrain, augments, args.batch_size, device, args.seed, args.workers)
    tokenizer = build_tokenizer(args, data.captions)
    tokenizer.report_cut(data.captions)
    texts = tokenizer(data.captions)  # (N, L)

    torch.manual_seed(args.seed)  # all processes start from the same weights
    model = CLIP(args, tokenizer.vocabulary).to(device, memory_format=torch.channels_last)
    if device.type == "cuda":  # batch statistics over all processes; GPUs only
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    optimizer = build_optimizer(args, model)

    run = harness.Run(args, model, optimizer, views)  # continues where a killed run stopped
    if run.is_new:  # the baseline: random weights
        run.log_start(evaluate(args, model, tokenizer, data))
    if rank() == 0:
        tokenizer.save(run.out / "merges.txt")
    if args.compile:
        model.compile()
    network = DistributedDataParallel(model) if world_size() > 1 else model

    for epoch in run.epochs():
        views.set_epoch(epoch)
        rows = views.rows()  # (steps, B): which images these are
        for step, (x,) in enumerate(views):
            text = to_device(texts[rows[step]], device)
            lr = learning_rate(args, epoch - 1 + step / len(views))
            for group in optimizer.param_groups:
                group["lr"] = lr
            bf16 = device.type == "cuda" and args.precision == "bf16"
            with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                loss, z = network(x, text)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            with torch.no_grad():  # at most 100 (section 2.5); after the step, so it can come back
                model.log_scale.clamp_(max=math.log(100))
            run.after_step(loss)

        metrics = {"lr": lr, "scale": model.log_scale.exp().item(), **health(z)}
        last = epoch == args.epochs
        if last or epoch % args.eval_every == 0:
            metrics |= evaluate(args, model, tokenizer, data, last)
        run.after_epoch(metrics)  # prints a line, writes checkpoint.pt and log.jsonl
    draw = partial(draw_report, model=model, tokenizer=tokenizer)
    return run.finish(data, draw=draw)  # writes result.json, backbone.pt and report.png


def draw_report(run, data, title, model, tokenizer):
    images, captions = data.pairs
    z_image = embed_images(model, images, run.views.augments[0], run.args.workers)
    z_text = embed_texts(model, tokenizer, captions)
    if rank() == 0:
        draw_pairs(run, data, title, z_image, z_text)


# ------------------------------------------------------------------------------------ skeleton
class Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        x = x.contiguous()  # nccl would scramble the pixels of channels_last images
        parts = [torch.empty_like(x) for _ in range(world_size())]
        dist.all_gather(parts, x)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx, grad):
        grad = grad.contiguous()
        dist.all_reduce(grad)  # every process's loss depends on these rows
        return grad.chunk(world_size())[rank()]


def gather(x):
    """The rows of all processes, (B, ...) -> (WB, ...), with gradient. The backward pass sums over
    processes, so after DDP's averaging the gradient equals that of one process with the batch."""
    return Gather.apply(x) if world_size() > 1 else x


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
        return train(args) if args.classify is None else classify(args)


if __name__ == "__main__":
    main(parse_args())
