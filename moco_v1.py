"""MoCo v1: Momentum Contrast for Unsupervised Visual Representation Learning
Kaiming He, Haoqi Fan, Yuxin Wu, Saining Xie, Ross Girshick. CVPR 2020, arXiv 1911.05722

Contrastive learning as looking up a key in a dictionary: a query should find the key of the other
view of its image among many. The dictionary is a queue of the keys of past batches, far larger than
a batch; the keys stay comparable because their encoder follows that of the queries slowly (EMA).

    python moco_v1.py                                            # a few CPU minutes, no download
    torchrun --nproc_per_node=8 moco_v1.py --data /data/imagenet

Read it beside simclr.py; moco_v2.py changes head, augmentation, schedule and temperature.

The paper's words -> ours: f_q, f_k -> encoder_q, encoder_k; queue -> queue, its rows are keys;
m -> ema_momentum; tau -> temperature; shuffling BN -> shuffle, unshuffle, bn_groups.
Letters: B images a process, W processes, D features, C embedding, K queue.

Measured: 94.0 % linear top-1 on patterns (random weights 32.8 %), mean of 3 seeds."""
import argparse
import copy
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

METHOD = "moco_v1"


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
    temperature: float = 0.0  # tau of equation 1
    projection_dim: int = 0  # C, width of the embedding
    queue_size: int = 0  # K, keys; a multiple of the batch
    ema_momentum: float = 0.0  # m of equation 2
    bn_groups: int = 0  # batch normalisation sees 1/bn_groups of the batch: the paper's GPUs
    eval_every: int = 0  # epochs between two kNN evaluations
    seed: int = 0
    workers: int = min(8, os.cpu_count() or 1)  # decoding processes for each training process
    root: str = "data"  # folder for the data sets of torchvision
    out: str = ""  # folder for the results; empty: runs/<script>-<data>
    compile: bool = False  # torch.compile
    overwrite: bool = False  # start anew over a run that is finished or has other arguments


RECIPES = {  # minutes on two cores; one GPU (the authors' CIFAR demo); the paper (section 4.1)
    "recipe":         ("patterns", "cifar10",  "imagenet"),
    "arch":           ("thin",     "resnet18", "resnet50"),
    "size":           (32,         32,         224),
    "epochs":         (20,         200,        200),
    "batch_size":     (64,         512,        256),
    "lr":             (0.12,       0.03,       0.03),
    "weight_decay":   (1e-4,       5e-4,       1e-4),
    "temperature":    (0.1,        0.1,        0.07),
    "projection_dim": (128,        128,        128),
    "queue_size":     (512,        4096,       65536),
    "ema_momentum":   (0.99,       0.99,       0.999),
    "bn_groups":      (4,          8,          8),
    "eval_every":     (5,          10,         10),
}


# -------------------------------------------------------------------------------------- method
class MoCo(nn.Module):
    """forward(x_q, x_k), two views (B, 3, H, W) -> the loss of this process's queries."""

    def __init__(self, args):
        super().__init__()
        norm_layer = partial(GroupedBatchNorm2d, groups=args.bn_groups // processes()[1])
        backbone, dim = build_backbone(args, norm_layer)
        self.encoder_q = nn.Sequential()
        self.encoder_q.backbone = backbone
        self.encoder_q.projector = build_projector(dim, args.projection_dim)
        self.encoder_k = copy.deepcopy(self.encoder_q).requires_grad_(False)
        queue = F.normalize(torch.randn(args.queue_size, args.projection_dim), dim=1)
        self.register_buffer("queue", queue)  # (K, C)
        self.register_buffer("queue_ptr", torch.zeros((), dtype=torch.long))
        self.temperature, self.ema_momentum = args.temperature, args.ema_momentum
        self.chance_loss = math.log(args.queue_size + 1)  # all similarities equal

    @property
    def backbone(self):
        return self.encoder_q.backbone

    def forward(self, x_q, x_k):
        q = F.normalize(self.encoder_q(x_q), dim=1)  # (B, C)
        with torch.no_grad():  # no gradient to keys
            ema_update(self.encoder_q, self.encoder_k, self.ema_momentum)
            x_k, permutation = shuffle(x_k)
            k = F.normalize(self.encoder_k(x_k), dim=1)  # (B, C)
            k = unshuffle(k, permutation)
        # A copy of the queue: backward needs it as it is now, and enqueue writes into it.
        loss = info_nce(q, k, self.queue.clone(), self.temperature)
        enqueue(self.queue, self.queue_ptr, k)  # after the loss, or the key were its own negative
        self.z = q.detach()  # for the health figures
        return loss


@torch.autocast("cuda", enabled=False)  # logits in full precision
def info_nce(q, k, queue, temperature):
    """Equation 1: q, k (B, C) and queue (K, C), normalised -> mean over the B queries."""
    positive = (q * k).sum(dim=1, keepdim=True)  # (B, 1)
    negative = q @ queue.T  # (B, K)
    logits = torch.cat([positive, negative], dim=1) / temperature  # (B, 1 + K)
    labels = torch.zeros(len(q), dtype=torch.long, device=q.device)  # the positive is first
    return F.cross_entropy(logits, labels)


def build_projector(dim, projection_dim):
    """A single linear layer (section 3.3)."""
    return nn.Linear(dim, projection_dim)


def build_backbone(args, norm_layer=nn.BatchNorm2d):
    """(torchvision's ResNet without its classifier, D): (B, 3, H, W) -> h (B, D)."""
    if args.arch == "thin":
        backbone = ResNet(BasicBlock, [1, 1, 1, 1], norm_layer=norm_layer)
        backbone.inplanes = 16
        backbone.conv1 = nn.Conv2d(3, 16, 3, stride=2, padding=1, bias=False)
        backbone.bn1, backbone.fc = norm_layer(16), nn.Linear(128, 1)
        for stage, width in enumerate((16, 32, 64, 128), start=1):
            layer = backbone._make_layer(BasicBlock, width, 1, stride=min(stage, 2))
            setattr(backbone, f"layer{stage}", layer)
    elif re.fullmatch(r"(wide_)?resnet\d\w+", args.arch) and hasattr(torchvision.models, args.arch):
        backbone = getattr(torchvision.models, args.arch)(norm_layer=norm_layer)
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


@torch.no_grad()
def enqueue(queue, queue_ptr, keys):
    """Writes the keys of all processes (W B, C) over the oldest rows of the queue (K, C)."""
    keys = gather(keys)
    rows = (queue_ptr + torch.arange(len(keys), device=keys.device)) % len(queue)
    queue[rows] = keys
    queue_ptr.add_(len(keys)).remainder_(len(queue))


class GroupedBatchNorm2d(nn.BatchNorm2d):
    """Batch normalisation within each of `groups` equal slices of the batch, as if each slice were
    on a GPU of its own: so MoCo trains in one process as it does in eight."""

    def __init__(self, channels, groups=1):
        super().__init__(channels)
        self.groups = groups

    def forward(self, x):
        if not self.training or self.groups == 1:
            return super().forward(x)
        return torch.cat([nn.BatchNorm2d.forward(self, part) for part in x.chunk(self.groups)])


def shuffle(x):
    """Deals the images of all processes anew to processes and BN groups (section 3.3): statistics
    shared by a query and its key would give the answer away. Returns (x (B, ...), permutation)."""
    (rank, world_size), n = processes(), len(x)
    permutation = torch.randperm(world_size * n, device=x.device)
    if world_size > 1:
        dist.broadcast(permutation, src=0)
    return gather(x)[permutation[rank * n:(rank + 1) * n]], permutation


def unshuffle(k, permutation):
    """The inverse: the keys (B, C) of this process's own images, in their order."""
    rank, n = processes()[0], len(k)
    return gather(k)[permutation.argsort()[rank * n:(rank + 1) * n]]


def build_model(args, images, device):
    queue, batch, groups = args.queue_size, args.batch_size, args.bn_groups
    world_size = processes()[1]
    if not batch <= queue <= images or queue % batch:
        fail(f"--queue-size {queue}: no multiple of --batch-size {batch}, or over {images} images")
    if groups % world_size or batch % groups:
        fail(f"--bn-groups {groups}: no multiple of {world_size} processes or divisor of {batch}")
    return MoCo(args).to(device, memory_format=torch.channels_last)


def build_optimizer(args, model):
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=args.lr,
                           momentum=0.9, weight_decay=args.weight_decay)


def learning_rate(args, epoch):
    """Divided by 10 after 60 % and 80 % of the epochs (section 4.1: 120 and 160 of 200)."""
    peak = args.lr * args.batch_size / 256
    return peak * 0.1 ** sum(int(epoch) >= share * args.epochs for share in (0.6, 0.8))


def update(args, model, optimizer, epoch):
    """One step of the optimizer, at this fraction of an epoch; returns the learning rate."""
    lr = learning_rate(args, epoch)
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()
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
        return train(args, adapt(AUGMENTS[METHOD], args.size))  # jitter always, hue .4; no blur


if __name__ == "__main__":
    main(parse_args())
