"""MoCo v3: An Empirical Study of Training Self-Supervised Vision Transformers
Xinlei Chen, Saining Xie, Kaiming He. ICCV 2021, arXiv 2104.02057

MoCo for Vision Transformers: the negatives are the other images of a large batch instead of a
queue, there is a predictor as in BYOL, and both views serve as queries. Training a ViT is unstable
in its first layer, so the patch projection keeps its random weights.

    python moco_v3.py                                          # a few CPU minutes, no download
    torchrun --nproc_per_node=8 moco_v3.py --data /data/imagenet
    torchrun --nproc_per_node=8 moco_v3.py --data /data/imagenet --recipe imagenet_resnet50

Read it beside byol.py: a different loss and network. moco_v2.py is its predecessor.

The paper's f_q is encoder_q (backbone and projector) with predictor; f_k is encoder_k, m
ema_momentum, tau temperature, ctr contrastive_loss.
Shapes: B images per process, W processes, D features, C embedding dimensions, S patches.
Measured: 86.0 % linear top-1 on patterns (random weights 54.8 %), mean of 3 seeds.
"""

import copy
import math
import os
from collections import OrderedDict

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torchvision.models.vision_transformer import VisionTransformer

import harness  # command line, checkpoint, log, report: what every run leaves on disk
from common import Augment, Views, fail, health, linear_eval, load_images, rank, resnet, world_size

# patterns and cifar10: chosen here. imagenet: the paper's ViT-S (section 5). imagenet_resnet50: the
# official code's (the paper's appendix A has ResNet-50).
SETTINGS = {
    "recipe":         ("patterns", "cifar10",  "imagenet",  "imagenet_resnet50", ""),
    "arch":           ("vit_thin", "resnet18", "vit_small", "resnet50", "one of VITS, or a ResNet"),
    "size":           (32,         32,         224,         224,      "side of a view, in pixels"),
    "patch_size":     (8,          4,          16,          16,       "side of a ViT's patch"),
    "crop_min":       (0.2,        0.2,        0.08,        0.2,      "least area of a crop, of 1"),
    "epochs":         (30,         200,        300,         1000,     "passes over the images"),
    "batch_size":     (128,        512,        4096,        4096,     "images per step, in all"),
    "optimizer":      ("adamw",    "sgd",      "adamw",     "lars",     "adamw, sgd or lars"),
    "lr":             (4e-3,       0.12,       1.5e-4,      0.3,      "per 256 images in a batch"),
    "warmup_epochs":  (2.0,        10.0,       40.0,        10.0,     "epochs of linear warm-up"),
    "weight_decay":   (0.1,        5e-4,       0.1,         1.5e-6,   "lars: not on biases, norms"),
    "temperature":    (0.1,        0.2,        0.2,         1.0,      "tau in equation 1"),
    "hidden_dim":     (1024,       1024,       4096,        4096,     "hidden width of both heads"),
    "projection_dim": (128,        256,        256,         256,      "C, width of the embedding"),
    "ema_momentum":   (0.99,       0.99,       0.99,        0.996,    "m at the start; grows to 1"),
    "eval_every":     (5,          10,         10,          10,       "epochs between evaluations"),
}  # fmt: skip
VITS = {  # width D, layers, heads (table 2); vit_small has 12 heads, not DeiT's 6
    "vit_thin": (64, 4, 2),
    "vit_small": (384, 12, 12),
    "vit_base": (768, 12, 12),
}


# -------------------------------------------------------------------------------------- method
def build_views(args):
    """Section 5: BYOL's two views; one is always blurred, the other sometimes solarized."""
    shared = {
        "size": args.size,
        "scale": (args.crop_min, 1.0),
        "jitter": (0.4, 0.4, 0.2, 0.1),  # brightness, contrast, saturation, hue
        "jitter_p": 0.8,
        "grayscale": 0.2,
    }
    large = args.size > 64  # CIFAR-sized images are not blurred
    view1 = Augment(**shared, blur=1.0 if large else 0.0)
    view2 = Augment(**shared, blur=0.1 if large else 0.0, solarize=0.2)
    return [view1, view2]


class MoCo(nn.Module):
    """forward(x1, x2): two views (B, 3, H, W) -> loss, and the embedding (B, C) for monitoring."""

    def __init__(self, args):
        super().__init__()
        backbone = build_backbone(args)
        vit = args.arch in VITS
        hidden = [args.hidden_dim] * (2 if vit else 1)
        projector = build_mlp([backbone.dim, *hidden, args.projection_dim], last_norm=True)
        self.encoder_q = nn.Sequential(OrderedDict(backbone=backbone, projector=projector))
        widths = [args.projection_dim, args.hidden_dim, args.projection_dim]
        self.predictor = build_mlp(widths, last_norm=vit)
        self.encoder_k = copy.deepcopy(self.encoder_q).requires_grad_(False)
        self.temperature = args.temperature
        self.chance_loss = 4 * self.temperature * math.log(args.batch_size)  # all logits equal

    @property
    def backbone(self):
        return self.encoder_q.backbone

    def forward(self, x1, x2):
        z1 = self.encoder_q(x1)  # (B, C); each view has its own batch statistics
        z2 = self.encoder_q(x2)
        q1 = F.normalize(self.predictor(z1), dim=1)  # (B, C)
        q2 = F.normalize(self.predictor(z2), dim=1)
        with torch.no_grad():  # no gradient to keys
            k1 = F.normalize(self.encoder_k(x1), dim=1)  # (B, C)
            k2 = F.normalize(self.encoder_k(x2), dim=1)
        loss = contrastive_loss(q1, k2, self.temperature)
        loss = loss + contrastive_loss(q2, k1, self.temperature)
        return loss, z1.detach()


@torch.autocast("cuda", enabled=False)  # logits in float32 (TF32 on GPUs), not bf16
def contrastive_loss(q, k, temperature):
    """Equation 1 and algorithm 1: q, k (B, C), normalised -> 2 temperature times the mean over B
    queries, each of which has to find its key among those of all processes."""
    logits = q @ gather(k).T / temperature  # (B, WB)
    labels = rank() * len(q) + torch.arange(len(q), device=q.device)  # where k is among all keys
    return 2 * temperature * F.cross_entropy(logits, labels)  # the gradient's size without 1 / tau


def build_mlp(widths, last_norm):
    """Linear layers without bias, with batch normalisation and ReLU in between (section 5); at the
    end batch normalisation without learned scale and shift, except in a ResNet's predictor."""
    layers = []
    for dim, width in zip(widths, widths[1:]):
        layers += [nn.Linear(dim, width, bias=False), nn.BatchNorm1d(width), nn.ReLU(inplace=True)]
    layers = layers[:-2]
    if last_norm:
        layers.append(nn.BatchNorm1d(widths[-1], affine=False))
    return nn.Sequential(*layers)


def build_backbone(args):
    """A ViT or a ResNet without its classifier: (B, 3, H, W) -> h (B, D), with D in `.dim`."""
    if args.arch not in VITS:
        return resnet(args.arch, args.size, zero_init_residual=True)  # as in the official code
    if args.size % args.patch_size:
        fail(f"--size {args.size}: not a multiple of --patch-size {args.patch_size}")
    dim, layers, heads = VITS[args.arch]
    vit = VisionTransformer(args.size, args.patch_size, layers, heads, dim, 4 * dim)
    vit.heads = nn.Identity()
    vit.dim = dim
    initialize(vit, args.patch_size)
    return vit


@torch.no_grad()
def initialize(vit, patch):
    """The initial weights of the official code, and what is never trained: the position embedding
    and the random projection of the patches (section 4.2, its stop-gradient)."""
    for module in vit.encoder.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
        elif isinstance(module, nn.MultiheadAttention):  # as if q, k and v had a matrix each
            bound = (3 / vit.dim) ** 0.5
            nn.init.uniform_(module.in_proj_weight, -bound, bound)
    nn.init.normal_(vit.class_token, std=1e-6)
    bound = (6 / (3 * patch**2 + vit.dim)) ** 0.5
    nn.init.uniform_(vit.conv_proj.weight, -bound, bound)
    nn.init.zeros_(vit.conv_proj.bias)
    vit.conv_proj.requires_grad_(False)
    vit.encoder.pos_embedding.copy_(position_embedding(vit.image_size // patch, vit.dim))
    vit.encoder.pos_embedding.requires_grad_(False)


def position_embedding(side, dim):
    """Sines and cosines of the row and of the column of each patch (Vaswani et al., 2017, in two
    dimensions): (1, 1 + S, D), zeros for the class token, S = side * side."""
    wavelength = 10000 ** (torch.arange(dim // 4) / (dim // 4))
    angle = torch.arange(side).unsqueeze(1) / wavelength
    waves = torch.cat([angle.sin(), angle.cos()], dim=1)  # (side, D / 2)
    rows = waves.repeat_interleave(side, 0)  # (S, D / 2)
    columns = waves.repeat(side, 1)
    patches = torch.cat([rows, columns], dim=1)  # (S, D)
    return torch.cat([torch.zeros(1, dim), patches]).unsqueeze(0)


@torch.no_grad()
def ema_update(source, target, momentum):
    """target <- momentum * target + (1 - momentum) * source (MoCo v1, equation 2; BYOL, equation
    1). Parameters only: the running statistics of the target are its own."""
    for p, target_p in zip(source.parameters(), target.parameters()):
        target_p.lerp_(p, 1 - momentum)


def ema_momentum(args, epoch):
    """From args.ema_momentum to 1 along a half cosine (BYOL, section 3.3), step by step."""
    return 1 - (1 - args.ema_momentum) * (1 + math.cos(math.pi * epoch / args.epochs)) / 2


def build_optimizer(args, model):
    trained = [p for p in model.parameters() if p.requires_grad]
    if args.optimizer == "adamw":
        return torch.optim.AdamW(trained, lr=0.0, weight_decay=args.weight_decay)
    if args.optimizer == "sgd":
        return torch.optim.SGD(trained, momentum=0.9, weight_decay=args.weight_decay)
    if args.optimizer == "lars":
        return LARS(trained, weight_decay=args.weight_decay)
    fail(f"--optimizer {args.optimizer}: not one of adamw, sgd, lars")


def learning_rate(args, epoch):
    """Linear warm-up, then a half cosine down to 0 (section 5); epoch grows with every step."""
    peak = args.lr * args.batch_size / 256
    if epoch < args.warmup_epochs:
        return peak * epoch / args.warmup_epochs
    progress = (epoch - args.warmup_epochs) / (args.epochs - args.warmup_epochs)
    return peak * (1 + math.cos(math.pi * progress)) / 2


# ------------------------------------------------------------------------------------ training
def train(args):
    """Trains, evaluates and writes everything to args.out; returns the content of result.json."""
    device = launch()
    data = load_images(args.data, args.root, device)
    augments = build_views(args)
    views = Views(data.pretrain, augments, args.batch_size, device, args.seed, args.workers)

    torch.manual_seed(args.seed)  # all processes start from the same weights
    model = MoCo(args).to(device, memory_format=torch.channels_last)
    if device.type == "cuda":  # batch statistics over all processes (official code); GPUs only
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    optimizer = build_optimizer(args, model)

    run = harness.Run(args, model, optimizer, views)  # continues where a killed run stopped
    if run.is_new:  # the baseline: random weights
        run.log_start(linear_eval(model.backbone, data, augments[0], device, args.workers))
    if args.compile:
        model.compile()
    network = DistributedDataParallel(model) if world_size() > 1 else model

    for epoch in run.epochs():
        views.set_epoch(epoch)
        for step, (x1, x2) in enumerate(views):
            now = epoch - 1 + step / len(views)
            lr = learning_rate(args, now)
            for group in optimizer.param_groups:
                group["lr"] = lr
            bf16 = device.type == "cuda" and args.precision == "bf16"
            with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                loss, z = network(x1, x2)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            ema_update(model.encoder_q, model.encoder_k, ema_momentum(args, now))
            run.after_step(loss)

        metrics = {"lr": lr, **health(z)}
        last = epoch == args.epochs
        if last or epoch % args.eval_every == 0:
            view = augments[0]
            metrics |= linear_eval(model.backbone, data, view, device, args.workers, last)
        run.after_epoch(metrics)  # prints a line, writes checkpoint.pt and log.jsonl
    return run.finish(data)  # writes result.json, backbone.pt and report.png


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


class LARS(torch.optim.Optimizer):
    """Layer-wise adaptive rate scaling (You et al., 2017): the update of a weight is rescaled to a
    thousandth of the weight's norm. Biases and normalisation are neither rescaled nor decayed.
    The learning rate is applied after the momentum, as in torch's SGD (simclr.py: before it)."""

    def __init__(self, params, lr=0.0, weight_decay=0.0, momentum=0.9):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                update = p.grad
                if p.ndim > 1:
                    update = update + group["weight_decay"] * p
                    ratio = 0.001 * p.norm() / update.norm()
                    update = update * torch.where(ratio.isfinite() & (ratio > 0), ratio, 1.0)
                state = self.state[p]
                if not state:
                    state["momentum_buffer"] = torch.zeros_like(p)
                buffer = state["momentum_buffer"]
                buffer.mul_(group["momentum"]).add_(update)
                p.sub_(group["lr"] * buffer)


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
    return harness.parse_args(__file__, __doc__, SETTINGS, argv)


def main(args):
    with harness.clean_exit():  # Ctrl-C, SIGTERM, out of memory: one line, and the group is left
        return train(args)


if __name__ == "__main__":
    main(parse_args())
