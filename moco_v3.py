"""MoCo v3: An Empirical Study of Training Self-Supervised Vision Transformers
Xinlei Chen, Saining Xie, Kaiming He. ICCV 2021, arXiv 2104.02057

MoCo for Vision Transformers: the negatives are the other images of a large batch instead of a
queue, a predictor as in BYOL, both views as queries. Training a ViT is unstable in its first layer;
so the projection of the patches keeps its random start.

    python moco_v3.py                                            # a few CPU minutes, no download
    torchrun --nproc_per_node=8 moco_v3.py --data /data/imagenet
    torchrun --nproc_per_node=8 moco_v3.py --data /data/imagenet --recipe imagenet_resnet50

Read it beside byol.py: another loss, another network; moco_v2.py is what it goes on from.

The paper's words -> ours: f_q -> encoder_q (backbone, projector) and predictor; f_k -> encoder_k;
m -> ema_momentum; tau -> temperature; ctr -> contrastive_loss.
Letters: B images a process, W processes, D features, C embedding, S patches.

Measured: 86.9 % linear top-1 on patterns (random weights 56.5 %), mean of 3 seeds."""
import argparse
import copy
import inspect
import math
import os
import re
import signal
import sys
import time
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from torch import nn
from torchvision.models.vision_transformer import VisionTransformer

from common import (AUGMENTS, Views, adapt, check, conclude, fail, health, linear_eval, load,
                    orderly, processes, recipe_for, record, resume, seeded)

METHOD = "moco_v3"


@dataclass
class Args:
    data: str = "patterns"  # patterns, cifar10, cifar100, stl10, or a folder of images
    recipe: str = ""  # patterns, cifar10, imagenet, imagenet_resnet50; empty: suits the data
    arch: str = ""  # vit_thin, vit_small, vit_base, or a ResNet of torchvision, such as resnet50
    size: int = 0  # pixels, the side of a view
    patch_size: int = 0  # pixels, the side of a ViT's patch
    crop_min: float = 0.0  # the smallest crop's share of the image's area
    epochs: int = 0  # passes over the images
    batch_size: int = 0  # images, over all processes
    optimizer: str = ""  # adamw or lars
    lr: float = 0.0  # for 256 images; scaled linearly with the batch
    warmup_epochs: float = 0.0  # epochs of linear warm-up
    weight_decay: float = 0.0  # with lars not on biases and normalisation
    temperature: float = 0.0  # tau of equation 1
    hidden_dim: int = 0  # width of the hidden layers of projector and predictor
    projection_dim: int = 0  # C, width of the embedding
    ema_momentum: float = 0.0  # m at the start; it grows to 1
    eval_every: int = 0  # epochs between two kNN evaluations
    seed: int = 0
    workers: int = min(8, os.cpu_count() or 1)  # decoding processes for each training process
    root: str = "data"  # folder for the data sets of torchvision
    out: str = ""  # folder for the results; empty: runs/<script>-<data>
    compile: bool = False  # torch.compile
    overwrite: bool = False  # start anew over a run that is finished or has other arguments


RECIPES = {  # minutes on two cores; one GPU; the paper's own numbers for ViT and ResNet (section 4)
    "recipe":         ("patterns", "cifar10",  "imagenet",  "imagenet_resnet50"),
    "arch":           ("vit_thin", "resnet18", "vit_small", "resnet50"),
    "size":           (32,         32,         224,         224),
    "patch_size":     (8,          4,          16,          16),
    "crop_min":       (0.2,        0.2,        0.08,        0.2),
    "epochs":         (30,         200,        300,         1000),
    "batch_size":     (128,        512,        4096,        4096),
    "optimizer":      ("adamw",    "lars",     "adamw",     "lars"),
    "lr":             (4e-3,       1.0,        1.5e-4,      0.3),
    "warmup_epochs":  (2.0,        10.0,       40.0,        10.0),
    "weight_decay":   (0.1,        1e-6,       0.1,         1.5e-6),
    "temperature":    (0.1,        0.2,        0.2,         1.0),
    "hidden_dim":     (1024,       1024,       4096,        4096),
    "projection_dim": (128,        256,        256,         256),
    "ema_momentum":   (0.99,       0.99,       0.99,        0.996),
    "eval_every":     (5,          10,         10,          10),
}
VITS = {  # width D, layers, heads (table 2); vit_small has 12 heads, not DeiT's 6
    "vit_thin": (64, 4, 2), "vit_small": (384, 12, 12), "vit_base": (768, 12, 12)}


# -------------------------------------------------------------------------------------- method
class MoCo(nn.Module):
    """forward(x1, x2), two views (B, 3, H, W) -> the loss of this process's images."""

    def __init__(self, args):
        super().__init__()
        backbone, dim = build_backbone(args)
        hidden_dim, projection_dim, vit = args.hidden_dim, args.projection_dim, args.arch in VITS
        self.encoder_q = nn.Sequential()
        self.encoder_q.backbone = backbone
        self.encoder_q.projector = build_mlp(
            [dim] + [hidden_dim] * (2 if vit else 1) + [projection_dim], last_norm=True)
        self.predictor = build_mlp([projection_dim, hidden_dim, projection_dim], last_norm=vit)
        self.encoder_k = copy.deepcopy(self.encoder_q).requires_grad_(False)
        self.temperature = args.temperature
        self.chance_loss = 4 * self.temperature * math.log(args.batch_size)  # all logits equal

    @property
    def backbone(self):
        return self.encoder_q.backbone

    def forward(self, x1, x2):
        z1, z2 = self.encoder_q(x1), self.encoder_q(x2)  # (B, C)
        q1, q2 = (F.normalize(self.predictor(z), dim=1) for z in (z1, z2))  # (B, C)
        with torch.no_grad():  # no gradient to keys
            k1, k2 = (F.normalize(self.encoder_k(x), dim=1) for x in (x1, x2))  # (B, C)
        self.z = z1.detach()  # for the health figures
        return (contrastive_loss(q1, k2, self.temperature)
                + contrastive_loss(q2, k1, self.temperature))


@torch.autocast("cuda", enabled=False)  # logits in full precision
def contrastive_loss(q, k, temperature):
    """Equation 1 and algorithm 1: q, k (B, C), normalised -> 2 temperature times the mean over the
    B queries, each to find its key among those of all processes."""
    logits = q @ gather(k).T / temperature  # (B, W B)
    labels = processes()[0] * len(q) + torch.arange(len(q), device=q.device)  # own rows of gather
    return 2 * temperature * F.cross_entropy(logits, labels)  # a gradient of one size for any tau


def build_mlp(widths, last_norm):
    """Linear layers without bias, batch normalisation and ReLU in between (section 4); at the end
    a batch normalisation without learned scale and shift, except in a ResNet's predictor."""
    layers = []
    for dim, width in zip(widths, widths[1:]):
        layers += [nn.Linear(dim, width, bias=False), nn.BatchNorm1d(width), nn.ReLU(inplace=True)]
    return nn.Sequential(
        *layers[:-2], *([nn.BatchNorm1d(widths[-1], affine=False)] if last_norm else []))


def build_backbone(args):
    """(torchvision's ViT or ResNet without its classifier, D): (B, 3, H, W) -> h (B, D)."""
    if args.arch in VITS:
        (dim, layers, heads), patch = VITS[args.arch], args.patch_size
        if args.size % patch:
            fail(f"--size {args.size}: no multiple of --patch-size {patch}")
        backbone = VisionTransformer(args.size, patch, layers, heads, dim, 4 * dim)
        backbone.heads = nn.Identity()
        initialize(backbone, dim, patch)
        return backbone, dim
    if re.fullmatch(r"(wide_)?resnet\d\w+", args.arch) and hasattr(torchvision.models, args.arch):
        backbone = getattr(torchvision.models, args.arch)(zero_init_residual=True)  # official code
        if args.size <= 64:
            backbone.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
    else:
        fail(f"--arch {args.arch}: neither one of {', '.join(VITS)} nor a ResNet of torchvision")
    if args.size <= 64:  # small images: no early pooling
        backbone.maxpool = nn.Identity()
    dim, backbone.fc = backbone.fc.in_features, nn.Identity()
    return backbone, dim


@torch.no_grad()
def initialize(vit, dim, patch):
    """The start of the official code, and what is never trained: the position embedding and the
    random projection of the patches (section 4.2, its stop-gradient)."""
    for module in vit.encoder.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
        elif isinstance(module, nn.MultiheadAttention):  # as if q, k and v were a matrix each
            nn.init.uniform_(module.in_proj_weight, -(3 / dim) ** 0.5, (3 / dim) ** 0.5)
    nn.init.normal_(vit.class_token, std=1e-6)
    bound = (6 / (3 * patch ** 2 + dim)) ** 0.5
    nn.init.uniform_(vit.conv_proj.weight, -bound, bound)
    nn.init.zeros_(vit.conv_proj.bias)
    vit.conv_proj.requires_grad_(False)
    vit.encoder.pos_embedding.copy_(position_embedding(vit.image_size // patch, dim))
    vit.encoder.pos_embedding.requires_grad_(False)


def position_embedding(side, dim):
    """Sines and cosines of the row and of the column of each patch (Vaswani et al., 2017, in two
    dimensions): (1, 1 + S, D), zeros for the class token, S = side * side."""
    angle = torch.arange(side).unsqueeze(1) / 10000 ** (torch.arange(dim // 4) / (dim // 4))
    waves = torch.cat([angle.sin(), angle.cos()], dim=1)  # (side, D / 2)
    grid = torch.cat([waves.repeat_interleave(side, 0), waves.repeat(side, 1)], dim=1)  # (S, D)
    return torch.cat([torch.zeros(1, dim), grid]).unsqueeze(0)


@torch.no_grad()
def ema_update(source, target, momentum):
    """target <- momentum * target + (1 - momentum) * source (MoCo, equation 2; BYOL, equation 1),
    parameters only; the running statistics of the target are its own."""
    torch._foreach_lerp_(list(target.parameters()), list(source.parameters()), 1 - momentum)


def ema_momentum(args, epoch):
    """From args.ema_momentum to 1 in half a cosine (section 3.2); epoch is a fraction, in steps."""
    return 1 - (1 - args.ema_momentum) * (1 + math.cos(math.pi * epoch / args.epochs)) / 2


def build_model(args, images, device):
    model = MoCo(args).to(device, memory_format=torch.channels_last)
    if device.type == "cuda":  # global batch normalisation (official code); torch has none on CPUs
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    return model


def build_optimizer(args, model):
    kinds = {"adamw": torch.optim.AdamW, "lars": LARS}
    if args.optimizer not in kinds:
        fail(f"--optimizer {args.optimizer}: not one of {', '.join(kinds)}")
    trained = [p for p in model.parameters() if p.requires_grad]
    return kinds[args.optimizer](trained, lr=0.0, weight_decay=args.weight_decay)


def learning_rate(args, epoch):
    """Linear warm-up, then half a cosine to 0 (section 4.1); epoch is a fraction, in steps."""
    peak = args.lr * args.batch_size / 256
    if epoch < args.warmup_epochs:
        return peak * epoch / args.warmup_epochs
    share = (epoch - args.warmup_epochs) / (args.epochs - args.warmup_epochs)
    return peak * (1 + math.cos(math.pi * share)) / 2


def update(args, model, optimizer, epoch):
    """One step of the optimizer, at this fraction of an epoch, then one of the keys' encoder
    (algorithm 1; the official code takes it before the next keys); returns the learning rate."""
    lr = learning_rate(args, epoch)
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()
    ema_update(model.encoder_q, model.encoder_k, ema_momentum(args, epoch))
    return lr


# ------------------------------------------------------------------------------------ skeleton
class Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, x.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx, gradient):
        gradient = gradient.contiguous()
        dist.all_reduce(gradient)  # the loss of every process depends on these rows
        return gradient.chunk(dist.get_world_size())[dist.get_rank()]


def gather(x):
    """Rows of all processes, (B, ...) -> (W B, ...). The gradient is summed over the processes, so
    that after DDP's mean W processes have the gradient of one with the whole batch."""
    return Gather.apply(x) if processes()[1] > 1 else x


class LARS(torch.optim.Optimizer):
    """Layer-wise adaptive rates (You et al., 2017): a weight's gradient is scaled to a thousandth
    of the weight's norm. One-dimensional parameters (biases, normalisation) are neither scaled nor
    decayed. The learning rate multiplies the momentum buffer, as in torch's SGD."""

    def __init__(self, params, lr=0.0, momentum=0.9, weight_decay=0.0):
        super().__init__(params, dict(lr=lr, momentum=momentum, weight_decay=weight_decay))

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            decay = [group["weight_decay"] * (p.ndim > 1) for p in params]
            updates = torch._foreach_mul(params, decay)  # _foreach: of all parameters in one call
            torch._foreach_add_(updates, [p.grad for p in params])
            norms, update_norms = (torch.stack(torch._foreach_norm(x)) for x in (params, updates))
            ratios = 0.001 * norms / update_norms
            ratios = torch.where(ratios.isfinite() & (ratios > 0), ratios, 1.0)
            scales, plain = ratios.unbind(), torch.ones_like(ratios[0])
            scales = [scale if p.ndim > 1 else plain for p, scale in zip(params, scales)]
            torch._foreach_mul_(updates, scales)
            buffers = [self.state[p].setdefault("momentum_buffer", torch.zeros_like(p))
                       for p in params]
            torch._foreach_mul_(buffers, group["momentum"])
            torch._foreach_add_(buffers, updates)
            torch._foreach_sub_(params, torch._foreach_mul(buffers, group["lr"]))


def launch():
    """The device of this process, which joins the others where torchrun started several."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C, see main
    device = torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")  # TF32
    if "RANK" in os.environ:
        store, rank, world_size = next(dist.rendezvous("env://"))
        if os.environ.get("GROUP_WORLD_SIZE") == "1":  # after --max-restarts it is the same store,
            # with the addresses of the dead in it (for several machines see the README)
            store = dist.PrefixStore(os.environ["TORCHELASTIC_RESTART_COUNT"], store)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", store=store,
                                rank=rank, world_size=world_size)
    return device


def parse_args(argv=None):
    """Args from the command line, or from a list of words; a flag wins over the recipe."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = fail
    notes = dict(re.findall(r"^    (\w+): .*?  # (.*)$", inspect.getsource(Args), re.M))
    for field in fields(Args):
        kind = {"action": "store_true"} if field.type is bool else {"type": field.type}
        parser.add_argument("--" + field.name.replace("_", "-"), default=argparse.SUPPRESS,
                            help=notes.get(field.name), **kind)
    given = vars(parser.parse_args(argv))
    recipe = given.get("recipe") or recipe_for(given.get("data", Args.data))
    if recipe not in RECIPES["recipe"]:
        fail(f"--recipe {recipe}: not one of {', '.join(RECIPES['recipe'])}")
    column = RECIPES["recipe"].index(recipe)
    args = Args(**{name: row[column] for name, row in RECIPES.items()} | given)
    check(args, given.keys())
    args.out = args.out or f"runs/{METHOD}-{Path(args.data).resolve().name}"
    return args


def train(args, augments):
    device, (rank, world_size) = launch(), processes()
    data = load(args.data, args.root, device)
    views = Views(data.pretrain, augments, args.batch_size, device, args.seed, args.workers)
    torch.manual_seed(args.seed)
    model = build_model(args, len(data.pretrain), device)
    optimizer = build_optimizer(args, model)
    evaluate = partial(linear_eval, model.backbone, data, augments[0], device, workers=args.workers)
    log = resume(METHOD, args, model, optimizer)
    if not log:
        log = [{"epoch": 0} | evaluate(classifier=not data.large)]  # random weights
        record(METHOD, args, log, views, model, optimizer)
    if args.compile:
        model.compile()
    network = nn.parallel.DistributedDataParallel(model) if world_size > 1 else model

    for epoch in range(len(log), args.epochs + 1):
        views.set_epoch(epoch)
        torch.manual_seed(seeded("epoch", args.seed, epoch).initial_seed())
        total, start, shown = torch.zeros((), device=device), time.time(), time.time()
        for step, batch in enumerate(views):
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                loss = network(*batch)
            optimizer.zero_grad()
            loss.backward()
            lr = update(args, model, optimizer, epoch - 1 + step / len(views))
            total += loss.detach()
            if rank == 0 and sys.stdout.isatty() and time.time() > shown + 1:
                shown = time.time()  # reading the loss waits for the device: once a second
                print(f"\repoch {epoch}, {step + 1}/{len(views)}, loss {loss.item():.3f}", end="")
        if world_size > 1:
            dist.all_reduce(total)
        loss = total.item() / len(views) / world_size  # waits for the device, so before the time
        seconds = time.time() - start
        if not math.isfinite(loss):
            fail(f"the loss of epoch {epoch} is not finite; {args.out} keeps the epoch before it")
        log.append({"epoch": epoch, "loss": loss, "lr": lr, **health(model.z), "seconds": seconds})
        if epoch % args.eval_every == 0 or epoch == args.epochs:
            log[-1] |= evaluate(classifier=epoch == args.epochs)
        record(METHOD, args, log, views, model, optimizer)
    return conclude(METHOD, args, data, log, views, model, device)


def main(args):
    """Trains, evaluates, and writes the files in args.out; returns what stands in result.json."""
    with orderly():
        views = [replace(a, scale=(args.crop_min, 1.0)) for a in AUGMENTS[METHOD]]
        return train(args, adapt(views, args.size))  # BYOL's two views


if __name__ == "__main__":
    main(parse_args())
