"""BYOL: Bootstrap Your Own Latent: A New Approach to Self-Supervised Learning
Jean-Bastien Grill, Florian Strub, Florent Altche, and others. NeurIPS 2020, arXiv 2006.07733

No negatives: from one view of an image the online network predicts what a target network makes of
the other view. The target is a slow average of the online network and gets no gradient. With the
predictor on one side only, this does not collapse to the same output for all images.

    python byol.py                                            # a few CPU minutes, no download
    torchrun --nproc_per_node=8 byol.py --data /data/imagenet

Read it beside simclr.py; simsiam.py goes without the average, moco_v3.py has negatives again.

The paper's words -> ours: f, g -> backbone, projector, together encoder; q -> predictor;
target network (xi) -> target_encoder; tau -> ema_momentum; y -> h; z -> z; q(z) -> p.
Letters: B images a process, W processes, D features, C embedding.

Measured: 87.3 % linear top-1 on patterns (random weights 32.8 %), mean of 3 seeds."""
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
from torchvision.models.resnet import BasicBlock, ResNet

from common import (AUGMENTS, Views, adapt, check, conclude, fail, health, linear_eval, load,
                    orderly, processes, recipe_for, record, resume, seeded)

METHOD = "byol"


@dataclass
class Args:
    data: str = "patterns"  # patterns, cifar10, cifar100, stl10, or a folder of images
    recipe: str = ""  # patterns, cifar10 or imagenet; empty: what suits the data
    arch: str = ""  # thin (four narrow stages), or a ResNet of torchvision, such as resnet50
    size: int = 0  # pixels, the side of a view
    crop_min: float = 0.0  # the smallest crop's share of the image's area
    epochs: int = 0  # passes over the images
    batch_size: int = 0  # images, over all processes
    optimizer: str = ""  # sgd or lars
    lr: float = 0.0  # for 256 images; scaled linearly with the batch
    warmup_epochs: float = 0.0  # epochs of linear warm-up
    weight_decay: float = 0.0  # with lars not on biases and normalisation
    hidden_dim: int = 0  # width of the hidden layer of projector and predictor
    projection_dim: int = 0  # C, width of the embedding
    ema_momentum: float = 0.0  # tau at the start; it grows to 1
    eval_every: int = 0  # epochs between two kNN evaluations
    seed: int = 0
    workers: int = min(8, os.cpu_count() or 1)  # decoding processes for each training process
    root: str = "data"  # folder for the data sets of torchvision
    out: str = ""  # folder for the results; empty: runs/<script>-<data>
    compile: bool = False  # torch.compile
    overwrite: bool = False  # start anew over a run that is finished or has other arguments


RECIPES = {  # minutes on two cores; one GPU; the paper's own numbers (section 3.2)
    "recipe":         ("patterns", "cifar10",  "imagenet"),
    "arch":           ("thin",     "resnet18", "resnet50"),
    "size":           (32,         32,         224),
    "crop_min":       (0.2,        0.08,       0.08),
    "epochs":         (30,         200,        1000),
    "batch_size":     (64,         256,        4096),
    "optimizer":      ("sgd",      "sgd",      "lars"),
    "lr":             (0.6,        0.12,       0.2),
    "warmup_epochs":  (1.0,        10.0,       10.0),
    "weight_decay":   (1e-4,       5e-4,       1.5e-6),
    "hidden_dim":     (256,        1024,       4096),
    "projection_dim": (256,        256,        256),
    "ema_momentum":   (0.95,       0.99,       0.996),
    "eval_every":     (5,          10,         10),
}


# -------------------------------------------------------------------------------------- method
class BYOL(nn.Module):
    """forward(x1, x2), two views (B, 3, H, W) -> the loss of this process's images."""

    def __init__(self, args):
        super().__init__()
        backbone, dim = build_backbone(args)
        self.encoder = nn.Sequential()
        self.encoder.backbone = backbone
        self.encoder.projector = build_mlp(dim, args.hidden_dim, args.projection_dim)
        self.predictor = build_mlp(args.projection_dim, args.hidden_dim, args.projection_dim)
        # Paper: another random start. Here: a copy; the authors saw no difference.
        self.target_encoder = copy.deepcopy(self.encoder).requires_grad_(False)
        self.chance_loss = 4.0  # predictions at right angles to the targets

    @property
    def backbone(self):
        return self.encoder.backbone

    def forward(self, x1, x2):
        z1, z2 = self.encoder(x1), self.encoder(x2)  # (B, C); a view has its own batch statistics
        p1, p2 = self.predictor(z1), self.predictor(z2)  # (B, C)
        with torch.no_grad():  # no gradient to the target; its batch normalisation is in train mode
            target_z1, target_z2 = self.target_encoder(x1), self.target_encoder(x2)  # (B, C)
        self.z = z1.detach()  # for the health figures
        return regression_loss(p1, target_z2) + regression_loss(p2, target_z1)  # both ways


def regression_loss(p, z):
    """Equation 2: p, z (B, C) -> the mean of |p / |p| - z / |z||^2, which is 2 - 2 cos(p, z)."""
    return 2 - 2 * F.cosine_similarity(p, z, dim=1).mean()


def build_mlp(dim, hidden_dim, projection_dim):
    """g and q have the same form (section 3.3): a hidden layer with batch normalisation; none at
    the output, unlike SimCLR's."""
    return nn.Sequential(
        nn.Linear(dim, hidden_dim), nn.BatchNorm1d(hidden_dim), nn.ReLU(inplace=True),
        nn.Linear(hidden_dim, projection_dim, bias=False))


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


@torch.no_grad()
def ema_update(source, target, momentum):
    """target <- momentum * target + (1 - momentum) * source (MoCo, equation 2; BYOL, equation 1),
    parameters only; the running statistics of the target are its own."""
    torch._foreach_lerp_(list(target.parameters()), list(source.parameters()), 1 - momentum)


def ema_momentum(args, epoch):
    """From args.ema_momentum to 1 in half a cosine (section 3.2); epoch is a fraction, in steps."""
    return 1 - (1 - args.ema_momentum) * (1 + math.cos(math.pi * epoch / args.epochs)) / 2


def build_model(args, images, device):
    model = BYOL(args).to(device, memory_format=torch.channels_last)
    if device.type == "cuda":  # global batch normalisation (section 3.3); torch has none on the CPU
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    return model


def build_optimizer(args, model):
    kinds = {"sgd": torch.optim.SGD, "lars": LARS}
    if args.optimizer not in kinds:
        fail(f"--optimizer {args.optimizer}: not one of {', '.join(kinds)}")
    trained = [p for p in model.parameters() if p.requires_grad]
    return kinds[args.optimizer](trained, lr=0.0, momentum=0.9, weight_decay=args.weight_decay)


def learning_rate(args, epoch):
    """Linear warm-up, then half a cosine to 0 (section 3.2); epoch is a fraction, in steps."""
    peak = args.lr * args.batch_size / 256
    if epoch < args.warmup_epochs:
        return peak * epoch / args.warmup_epochs
    share = (epoch - args.warmup_epochs) / (args.epochs - args.warmup_epochs)
    return peak * (1 + math.cos(math.pi * share)) / 2


def update(args, model, optimizer, epoch):
    """One step of the optimizer, at this fraction of an epoch, then one of the target (equation 1);
    returns the learning rate."""
    lr = learning_rate(args, epoch)
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()
    ema_update(model.encoder, model.target_encoder, ema_momentum(args, epoch))
    return lr


# ------------------------------------------------------------------------------------ skeleton
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
        return train(args, adapt(views, args.size))  # two different views


if __name__ == "__main__":
    main(parse_args())
