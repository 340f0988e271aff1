"""Barlow Twins: Self-Supervised Learning via Redundancy Reduction
Jure Zbontar, Li Jing, Ishan Misra, Yann LeCun, Stephane Deny. ICML 2021, arXiv 2103.03230

Neither negatives nor a second network: over the batch, a dimension of one view's embedding should
correlate fully with the same dimension of the other view's (invariance) and not at all with the
other dimensions (no redundancy). A constant output has no correlation, so it cannot win.

    python barlow.py                                            # a few CPU minutes, no download
    torchrun --nproc_per_node=8 barlow.py --data /data/imagenet

Read it beside simclr.py: the same two views, compared by columns instead of by rows.

The paper's words -> ours: encoder -> backbone; projector -> projector; Z^A, Z^B -> z1, z2;
cross-correlation C -> c; lambda -> redundancy_weight.
Letters: B images a process, W processes, D features, C embedding.

Measured: 88.7 % linear top-1 on patterns (random weights 32.8 %), mean of 3 seeds."""
import argparse
import inspect
import math
import os
import re
import signal
import sys
import time
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
import torchvision
from torch import nn
from torchvision.models.resnet import BasicBlock, ResNet

from common import (AUGMENTS, Views, adapt, check, conclude, fail, health, linear_eval, load,
                    orderly, processes, recipe_for, record, resume, seeded)

METHOD = "barlow"


@dataclass
class Args:
    data: str = "patterns"  # patterns, cifar10, cifar100, stl10, or a folder of images
    recipe: str = ""  # patterns, cifar10 or imagenet; empty: what suits the data
    arch: str = ""  # thin (four narrow stages), or a ResNet of torchvision, such as resnet50
    size: int = 0  # pixels, the side of a view
    epochs: int = 0  # passes over the images
    batch_size: int = 0  # images, over all processes
    optimizer: str = ""  # adamw, sgd or lars
    lr: float = 0.0  # of the weights, for 256 images; scaled linearly with the batch
    lr_biases: float = 0.0  # of biases and normalisation, likewise
    warmup_epochs: float = 0.0  # epochs of linear warm-up
    weight_decay: float = 0.0  # not on biases and normalisation
    redundancy_weight: float = 0.0  # lambda of equation 1
    projection_dim: int = 0  # C, width of the embedding and of the projector's layers
    eval_every: int = 0  # epochs between two kNN evaluations
    seed: int = 0
    workers: int = min(8, os.cpu_count() or 1)  # decoding processes for each training process
    root: str = "data"  # folder for the data sets of torchvision
    out: str = ""  # folder for the results; empty: runs/<script>-<data>
    compile: bool = False  # torch.compile
    overwrite: bool = False  # start anew over a run that is finished or has other arguments


# Paper: lr_biases .0048. Here: a sixteenth, because it was tuned on 16 processes whose all_reduce
# had no gradient, which leaves 1/16 of the true one; LARS hides that for weights, not for biases.
RECIPES = {  # minutes on two cores; one GPU; the paper's own numbers (section 2.2)
    "recipe":            ("patterns", "cifar10",  "imagenet"),
    "arch":              ("thin",     "resnet18", "resnet50"),
    "size":              (32,         32,         224),
    "epochs":            (25,         200,        1000),
    "batch_size":        (128,        256,        2048),
    "optimizer":         ("adamw",    "sgd",      "lars"),
    "lr":                (0.004,      0.12,       0.2),
    "lr_biases":         (0.004,      0.12,       0.0003),
    "warmup_epochs":     (1.0,        10.0,       10.0),
    "weight_decay":      (1e-4,       5e-4,       1e-6),
    "redundancy_weight": (0.0051,     0.0051,     0.0051),
    "projection_dim":    (256,        2048,       8192),
    "eval_every":        (5,          10,         10),
}


# -------------------------------------------------------------------------------------- method
class BarlowTwins(nn.Module):
    """forward(x1, x2), two views (B, 3, H, W) -> the loss of all processes' images."""

    def __init__(self, args):
        super().__init__()
        backbone, dim = build_backbone(args)
        self.encoder = nn.Sequential()
        self.encoder.backbone = backbone
        self.encoder.projector = build_projector(dim, args.projection_dim)
        self.bn = nn.BatchNorm1d(args.projection_dim, affine=False)  # per dimension: mean 0, std 1
        self.redundancy_weight = args.redundancy_weight
        # Of random embeddings: c is 1 / batch_size in the mean square, everywhere.
        c, square = args.projection_dim, 1 / args.batch_size
        self.chance_loss = c * (1 + square) + args.redundancy_weight * c * (c - 1) * square

    @property
    def backbone(self):
        return self.encoder.backbone

    def forward(self, x1, x2):
        z1, z2 = self.bn(self.encoder(x1)), self.bn(self.encoder(x2))  # (B, C), each view its own
        self.z = z1.detach()  # for the health figures
        return barlow_loss(z1, z2, self.redundancy_weight)


@torch.autocast("cuda", enabled=False)  # sums over the batch in full precision
def barlow_loss(z1, z2, redundancy_weight):
    """Equation 1: z1, z2 (B, C), batch-normalised -> the loss of the correlations over all W B
    images, the same on every process."""
    n = len(z1) * processes()[1]
    c = total(z1.float().T @ z2.float()) / n  # (C, C), equation 2
    on_diagonal = (1 - c.diagonal()).square().sum()
    off_diagonal = c.square().sum() - c.diagonal().square().sum()
    return on_diagonal + redundancy_weight * off_diagonal  # sums: lambda fits C = 8192


def build_projector(dim, projection_dim):
    """Three layers as wide as the embedding (section 2.2)."""
    return nn.Sequential(
        nn.Linear(dim, projection_dim, bias=False),
        nn.BatchNorm1d(projection_dim), nn.ReLU(inplace=True),
        nn.Linear(projection_dim, projection_dim, bias=False),
        nn.BatchNorm1d(projection_dim), nn.ReLU(inplace=True),
        nn.Linear(projection_dim, projection_dim, bias=False))


def build_backbone(args):
    """(torchvision's ResNet without its classifier, D): (B, 3, H, W) -> h (B, D)."""
    if args.arch == "thin":
        backbone = ResNet(BasicBlock, [1, 1, 1, 1])
        backbone.inplanes = 16
        backbone.conv1 = nn.Conv2d(3, 16, 3, stride=2, padding=1, bias=False)
        backbone.bn1, backbone.fc = nn.BatchNorm2d(16), nn.Linear(128, 1)
        for stage, width in enumerate((16, 32, 64, 128), start=1):
            layer = backbone._make_layer(BasicBlock, width, 1, stride=min(stage, 2))
            setattr(backbone, f"layer{stage}", layer)
    elif re.fullmatch(r"(wide_)?resnet\d\w+", args.arch) and hasattr(torchvision.models, args.arch):
        backbone = getattr(torchvision.models, args.arch)(zero_init_residual=True)  # official code
        if args.size <= 64:
            backbone.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
    else:
        fail(f"--arch {args.arch}: neither thin nor a ResNet of torchvision, such as resnet50")
    if args.size <= 64:  # small images: no early pooling
        backbone.maxpool = nn.Identity()
    dim, backbone.fc = backbone.fc.in_features, nn.Identity()
    return backbone, dim


def build_model(args, images, device):
    model = BarlowTwins(args).to(device, memory_format=torch.channels_last)
    if device.type == "cuda":  # global batch normalisation (official code); torch has none on CPUs
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    return model


def build_optimizer(args, model):
    kinds = {"adamw": torch.optim.AdamW, "sgd": partial(torch.optim.SGD, momentum=0.9),
             "lars": LARS}
    if args.optimizer not in kinds:
        fail(f"--optimizer {args.optimizer}: not one of {', '.join(kinds)}")
    weights = [p for p in model.parameters() if p.ndim > 1]
    biases = [p for p in model.parameters() if p.ndim == 1]
    return kinds[args.optimizer]([{"params": weights, "weight_decay": args.weight_decay},
                                  {"params": biases, "weight_decay": 0.0}], lr=0.0)


def learning_rate(args, epoch):
    """Linear warm-up, then half a cosine to a thousandth (section 2.2); epoch is a fraction."""
    peak = args.lr * args.batch_size / 256
    if epoch < args.warmup_epochs:
        return peak * epoch / args.warmup_epochs
    share = (epoch - args.warmup_epochs) / (args.epochs - args.warmup_epochs)
    return peak * (0.001 + 0.999 * (1 + math.cos(math.pi * share)) / 2)


def update(args, model, optimizer, epoch):
    """One step of the optimizer, at this fraction of an epoch; returns the learning rate."""
    weights, biases = optimizer.param_groups
    lr = weights["lr"] = learning_rate(args, epoch)
    biases["lr"] = lr * args.lr_biases / args.lr
    optimizer.step()
    return lr


# ------------------------------------------------------------------------------------ skeleton
class Total(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        x = x.clone()
        dist.all_reduce(x)
        return x

    @staticmethod
    def backward(ctx, gradient):
        gradient = gradient.clone()
        dist.all_reduce(gradient)  # the loss of every process depends on this one's share
        return gradient


def total(x):
    """Sum over the processes. The gradient is summed as well, so that after DDP's mean W processes
    have the gradient of one with the whole batch; dist.all_reduce alone would leave 1 / W of it."""
    return Total.apply(x) if processes()[1] > 1 else x


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
        return train(args, adapt(AUGMENTS[METHOD], args.size))  # BYOL's two views


if __name__ == "__main__":
    main(parse_args())
