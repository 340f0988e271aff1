"""SimSiam: Exploring Simple Siamese Representation Learning
Xinlei Chen, Kaiming He. CVPR 2021, arXiv 2011.10566

BYOL without the momentum encoder: the target is the same network, whose output is taken as a
constant. No negatives, no average over time; the stop-gradient and the predictor alone keep it from
collapsing, and the paper shows that without either it does.

    python simsiam.py                                            # a few CPU minutes, no download
    torchrun --nproc_per_node=8 simsiam.py --data /data/imagenet

Read it as a diff of byol.py; it ends the line of methods without negatives.

The paper's words -> ours: f -> encoder, that is backbone and projector ("projection MLP");
h ("prediction MLP") -> predictor; z -> z; p -> p; D -> negative_cosine.
Letters: B images a process, W processes, D features, C embedding.

Measured: 83.4 % linear top-1 on patterns (random weights 32.8 %), mean of 3 seeds."""
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
import torch.nn.functional as F
import torchvision
from torch import nn
from torchvision.models.resnet import BasicBlock, ResNet

from common import (AUGMENTS, Views, adapt, check, conclude, fail, health, linear_eval, load,
                    orderly, processes, recipe_for, record, resume, seeded)

METHOD = "simsiam"


@dataclass
class Args:
    data: str = "patterns"  # patterns, cifar10, cifar100, stl10, or a folder of images
    recipe: str = ""  # patterns, cifar10 or imagenet; empty: what suits the data
    arch: str = ""  # thin (four narrow stages), or a ResNet of torchvision, such as resnet50
    size: int = 0  # pixels, the side of a view
    epochs: int = 0  # passes over the images
    batch_size: int = 0  # images, over all processes
    lr: float = 0.0  # for 256 images; scaled linearly with the batch
    weight_decay: float = 0.0  # on all parameters
    projection_dim: int = 0  # C, width of the embedding and of the projector's layers
    predictor_dim: int = 0  # width of the predictor's hidden layer
    eval_every: int = 0  # epochs between two kNN evaluations
    seed: int = 0
    workers: int = min(8, os.cpu_count() or 1)  # decoding processes for each training process
    root: str = "data"  # folder for the data sets of torchvision
    out: str = ""  # folder for the results; empty: runs/<script>-<data>
    compile: bool = False  # torch.compile
    overwrite: bool = False  # start anew over a run that is finished or has other arguments


RECIPES = {  # minutes on two cores; one GPU (appendix D); the paper's own numbers (section 3)
    "recipe":         ("patterns", "cifar10",  "imagenet"),
    "arch":           ("thin",     "resnet18", "resnet50"),
    "size":           (32,         32,         224),
    "epochs":         (25,         200,        100),
    "batch_size":     (64,         512,        512),
    "lr":             (0.8,        0.03,       0.05),
    "weight_decay":   (1e-4,       5e-4,       1e-4),
    "projection_dim": (256,        2048,       2048),
    "predictor_dim":  (64,         512,        512),
    "eval_every":     (5,          10,         10),
}


# -------------------------------------------------------------------------------------- method
class SimSiam(nn.Module):
    """forward(x1, x2), two views (B, 3, H, W) -> the loss of this process's images."""

    def __init__(self, args):
        super().__init__()
        backbone, dim = build_backbone(args)
        self.encoder = nn.Sequential()
        self.encoder.backbone = backbone
        self.encoder.projector = build_projector(dim, args.projection_dim)
        self.predictor = build_predictor(args.projection_dim, args.predictor_dim)
        self.chance_loss = 0.0  # predictions at right angles to the other view; the best is -1

    @property
    def backbone(self):
        return self.encoder.backbone

    def forward(self, x1, x2):
        z1, z2 = self.encoder(x1), self.encoder(x2)  # (B, C); a view has its own batch statistics
        p1, p2 = self.predictor(z1), self.predictor(z2)  # (B, C)
        self.z = z1.detach()  # for the health figures
        return negative_cosine(p1, z2) / 2 + negative_cosine(p2, z1) / 2  # equation 2


def negative_cosine(p, z):
    """Equations 1 and 3: p, z (B, C) -> the mean of -cos(p, stopgrad(z))."""
    return -F.cosine_similarity(p, z.detach(), dim=1).mean()  # without detach it collapses


def build_projector(dim, projection_dim):
    """The projection MLP (section 3): three layers, batch normalisation after each, the last one
    without learned scale and shift."""
    return nn.Sequential(
        nn.Linear(dim, projection_dim, bias=False),
        nn.BatchNorm1d(projection_dim), nn.ReLU(inplace=True),
        nn.Linear(projection_dim, projection_dim, bias=False),
        nn.BatchNorm1d(projection_dim), nn.ReLU(inplace=True),
        nn.Linear(projection_dim, projection_dim, bias=False),
        nn.BatchNorm1d(projection_dim, affine=False))


def build_predictor(projection_dim, predictor_dim):
    """The prediction MLP (section 3): a bottleneck, no batch normalisation at its output."""
    return nn.Sequential(
        nn.Linear(projection_dim, predictor_dim, bias=False),
        nn.BatchNorm1d(predictor_dim), nn.ReLU(inplace=True),
        nn.Linear(predictor_dim, projection_dim))


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
    model = SimSiam(args).to(device, memory_format=torch.channels_last)
    if device.type == "cuda":  # global batch normalisation (section 3); torch has none on the CPU
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    return model


def build_optimizer(args, model):
    return torch.optim.SGD([{"params": model.encoder.parameters()},
                            {"params": model.predictor.parameters()}],
                           lr=args.lr, momentum=0.9, weight_decay=args.weight_decay)


def learning_rate(args, epoch):
    """Half a cosine to 0, in steps of an epoch (section 3)."""
    peak = args.lr * args.batch_size / 256
    return peak * (1 + math.cos(math.pi * int(epoch) / args.epochs)) / 2


def update(args, model, optimizer, epoch):
    """One step of the optimizer, at this fraction of an epoch; returns the learning rate."""
    encoder, predictor = optimizer.param_groups
    lr = encoder["lr"] = learning_rate(args, epoch)
    predictor["lr"] = learning_rate(args, 0)  # constant: it is to follow the encoder (section 4.2)
    optimizer.step()
    return lr


# ------------------------------------------------------------------------------------ skeleton
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
        return train(args, adapt(AUGMENTS[METHOD], args.size))  # MoCo v2's views


if __name__ == "__main__":
    main(parse_args())
