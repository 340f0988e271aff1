r"""SwAV: Unsupervised Learning of Visual Features by Contrasting Cluster Assignments
Mathilde Caron, Ishan Misra, Julien Mairal, Priya Goyal, Piotr Bojanowski, Armand Joulin.
NeurIPS 2020, arXiv 2006.09882

Views are compared through clusters: each view predicts to which of P learned prototypes another
view of its image was assigned. The assignments (codes) are made anew for each batch, and so that
all prototypes get equal shares of it, or one would get everything. Small crops add cheap views.

    python swav.py                                            # a few CPU minutes, no download
    torchrun --nproc_per_node=8 swav.py --data /data/imagenet
    torchrun --nproc_per_node=4 swav.py --data /data/imagenet --batch-size 256 --lr 0.6 \
        --warmup-epochs 0 --queue-size 3840 --queue-start 15 --epochs 400   # few GPUs: the queue

Read it beside simclr.py: clusters in place of negatives.

The paper's words -> ours: f -> backbone and projector, together encoder; C -> prototypes;
z^T C -> scores; q -> codes; p -> softmax(scores / temperature); epsilon -> epsilon; V + 2 crops
-> V crops in all, small_crops of them small.
Letters: B images a process, W processes, D features, C embedding, P prototypes, V crops, K queue.

Measured: 89.5 % linear top-1 on patterns (random weights 32.8 %), mean of 3 seeds."""
import argparse
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

METHOD = "swav"


@dataclass
class Args:
    data: str = "patterns"  # patterns, cifar10, cifar100, stl10, or a folder of images
    recipe: str = ""  # patterns, cifar10 or imagenet; empty: what suits the data
    arch: str = ""  # thin (four narrow stages), or a ResNet of torchvision, such as resnet50
    size: int = 0  # pixels, the side of the two large crops
    small_size: int = 0  # pixels, the side of a small crop
    small_crops: int = 0  # V - 2
    crop_split: float = 0.0  # share of the image's area: large crops have more, small ones less
    epochs: int = 0  # passes over the images
    batch_size: int = 0  # images, over all processes
    optimizer: str = ""  # adamw, sgd or larc
    lr: float = 0.0  # for 256 images; scaled linearly with the batch
    warmup_epochs: float = 0.0  # epochs of linear warm-up
    weight_decay: float = 0.0  # on all parameters
    temperature: float = 0.0  # tau of equation 2
    epsilon: float = 0.0  # of equation 3: larger is smoother codes
    sinkhorn_iterations: int = 0
    hidden_dim: int = 0  # width of the projector's hidden layer
    projection_dim: int = 0  # C, width of the embedding
    prototypes: int = 0  # P
    freeze_epochs: float = 0.0  # epochs at the start in which the prototypes stay as they are
    queue_size: int = 0  # K, images whose embeddings join in the codes; a multiple of the batch
    queue_start: int = 0  # epochs before the queue begins to fill
    jitter_strength: float = 0.0  # of the colour distortion, 1 as in SimCLR
    eval_every: int = 0  # epochs between two kNN evaluations
    seed: int = 0
    workers: int = min(8, os.cpu_count() or 1)  # decoding processes for each training process
    root: str = "data"  # folder for the data sets of torchvision
    out: str = ""  # folder for the results; empty: runs/<script>-<data>
    compile: bool = False  # torch.compile
    overwrite: bool = False  # start anew over a run that is finished or has other arguments


RECIPES = {  # minutes on two cores; one GPU; the paper's own numbers (section 5.1, appendix A)
    "recipe":              ("patterns", "cifar10",  "imagenet"),
    "arch":                ("thin",     "resnet18", "resnet50"),
    "size":                (32,         32,         224),
    "small_size":          (16,         16,         96),
    "small_crops":         (4,          0,          6),
    "crop_split":          (0.3,        0.14,       0.14),
    "epochs":              (20,         200,        800),
    "batch_size":          (128,        512,        4096),
    "optimizer":           ("adamw",    "adamw",    "larc"),
    "lr":                  (0.004,      0.002,      0.3),
    "warmup_epochs":       (1.0,        10.0,       10.0),
    "weight_decay":        (1e-6,       1e-6,       1e-6),
    "temperature":         (0.1,        0.1,        0.1),
    "epsilon":             (0.05,       0.05,       0.05),
    "sinkhorn_iterations": (3,          3,          3),
    "hidden_dim":          (128,        512,        2048),
    "projection_dim":      (64,         128,        128),
    "prototypes":          (100,        512,        3000),
    "freeze_epochs":       (1.0,        1.0,        1.0),
    "queue_size":          (0,          0,          0),
    "queue_start":         (0,          0,          0),
    "jitter_strength":     (0.5,        0.5,        1.0),
    "eval_every":          (5,          10,         10),
}


# -------------------------------------------------------------------------------------- method
class SwAV(nn.Module):
    """forward(*crops), two large ones (B, 3, H, W) and then small ones -> the loss of this
    process's images."""

    def __init__(self, args):
        super().__init__()
        backbone, dim = build_backbone(args)
        self.encoder = nn.Sequential()
        self.encoder.backbone = backbone
        self.encoder.projector = build_projector(dim, args.hidden_dim, args.projection_dim)
        self.prototypes = nn.Linear(args.projection_dim, args.prototypes, bias=False)  # (P, C)
        # The same on all processes: for each image the embeddings of its two large crops.
        self.register_buffer("queue", torch.zeros(args.queue_size, 2, args.projection_dim))
        self.register_buffer("queue_ptr", torch.zeros((), dtype=torch.long))
        self.temperature, self.epsilon = args.temperature, args.epsilon
        self.iterations = args.sinkhorn_iterations
        self.chance_loss = math.log(args.prototypes)  # all prototypes equally likely

    @property
    def backbone(self):
        return self.encoder.backbone

    def forward(self, *crops):
        with torch.no_grad():  # scores are cosines
            self.prototypes.weight.copy_(F.normalize(self.prototypes.weight, dim=1))
        # One pass of the backbone for each resolution, then one of the head for all crops.
        h = [self.backbone(torch.cat(same)) for same in (crops[:2], crops[2:]) if same]
        z = F.normalize(self.encoder.projector(torch.cat(h)), dim=1)  # (V B, C)
        with torch.autocast("cuda", enabled=False):  # exp(1 / epsilon) takes full precision
            scores = self.prototypes(z).chunk(len(crops))  # V of (B, P)
            codes = [self.assign(scores[i].detach(), i) for i in (0, 1)]  # of the large crops
            # The codes of a large crop are predicted from every other crop.
            loss = sum(swapped_prediction(scores[v], codes[i], self.temperature)
                       for i in (0, 1) for v in range(len(crops)) if v != i)
        self.large = torch.stack(z.detach().chunk(len(crops))[:2], dim=1)  # (B, 2, C), for update
        self.z = self.large[:, 0]  # for the health figures
        return loss / (2 * (len(crops) - 1))

    @torch.no_grad()
    def assign(self, scores, i):
        """scores (B, P) of large crop i -> its codes (B, P), in which the queue has a say."""
        codes = sinkhorn(scores, self.epsilon, self.iterations)
        if len(self.queue):
            rank, world_size = processes()
            queue = self.queue.chunk(world_size)[rank]  # (K / W, 2, C)
            pool = torch.cat([scores, self.prototypes(queue[:, i])])
            pooled = sinkhorn(pool, self.epsilon, self.iterations)[:len(scores)]
            codes = torch.where(self.queue[-1].any(), pooled, codes)  # only once it is full
        return codes


def swapped_prediction(scores, codes, temperature):
    """Equation 2: cross-entropy between the codes (B, P) of one crop and the prediction made from
    the scores (B, P) of another, mean over the B images."""
    return -(codes * F.log_softmax(scores / temperature, dim=1)).sum(dim=1).mean()


@torch.no_grad()
def sinkhorn(scores, epsilon, iterations):
    """Equations 3 to 5: scores (B, P), cosines -> codes (B, P). Each row sums to 1, and over all
    processes each prototype gets about the same share; epsilon times entropy keeps them soft."""
    codes = torch.exp((scores - 1) / epsilon)  # no cosine is over 1, so nothing overflows
    for _ in range(iterations):
        share = codes.sum(dim=0)  # (P,)
        if processes()[1] > 1:
            dist.all_reduce(share)
        codes = codes / share  # equal shares
        codes = codes / codes.sum(dim=1, keepdim=True)  # one unit an image
    return codes


def build_projector(dim, hidden_dim, projection_dim):
    """Two layers, batch normalisation in between (section 5.1)."""
    return nn.Sequential(
        nn.Linear(dim, hidden_dim), nn.BatchNorm1d(hidden_dim), nn.ReLU(inplace=True),
        nn.Linear(hidden_dim, projection_dim))


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
        backbone = getattr(torchvision.models, args.arch)()
        if args.size <= 64:
            backbone.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
    else:
        fail(f"--arch {args.arch}: neither thin nor a ResNet of torchvision, such as resnet50")
    if args.size <= 64:  # small images: no early pooling
        backbone.maxpool = nn.Identity()
    dim, backbone.fc = backbone.fc.in_features, nn.Identity()
    return backbone, dim


@torch.no_grad()
def enqueue(queue, queue_ptr, keys):
    """Writes the keys of all processes (W B, C) over the oldest rows of the queue (K, C)."""
    keys = gather(keys)
    rows = (queue_ptr + torch.arange(len(keys), device=keys.device)) % len(queue)
    queue[rows] = keys
    queue_ptr.add_(len(keys)).remainder_(len(queue))


def build_model(args, images, device):
    queue, batch = args.queue_size, args.batch_size
    if queue % batch or queue > images:
        fail(f"--queue-size {queue}: no multiple of --batch-size {batch}, or over {images} images")
    model = SwAV(args).to(device, memory_format=torch.channels_last)
    if device.type == "cuda":  # global batch normalisation (appendix A); torch has none on the CPU
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    return model


def build_optimizer(args, model):
    kinds = {"adamw": torch.optim.AdamW, "sgd": partial(torch.optim.SGD, momentum=0.9),
             "larc": LARC}
    if args.optimizer not in kinds:
        fail(f"--optimizer {args.optimizer}: not one of {', '.join(kinds)}")
    return kinds[args.optimizer](model.parameters(), lr=0.0, weight_decay=args.weight_decay)


def learning_rate(args, epoch):
    """Linear warm-up, then half a cosine to a thousandth (section 5.1); epoch is a fraction."""
    peak = args.lr * args.batch_size / 256
    if epoch < args.warmup_epochs:
        return peak * (1 + 15 * epoch / args.warmup_epochs) / 16  # 4096 images: from .3 to 4.8
    share = (epoch - args.warmup_epochs) / (args.epochs - args.warmup_epochs)
    return peak * (0.001 + 0.999 * (1 + math.cos(math.pi * share)) / 2)


def update(args, model, optimizer, epoch):
    """One step of the optimizer, at this fraction of an epoch, and of the queue; returns the
    learning rate."""
    lr = learning_rate(args, epoch)
    for group in optimizer.param_groups:
        group["lr"] = lr
    if epoch < args.freeze_epochs:  # with a gradient of 0, momentum and decay would still move them
        model.prototypes.weight.grad = None
    optimizer.step()
    if args.queue_size and epoch >= args.queue_start:
        enqueue(model.queue, model.queue_ptr, model.large)
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


class LARC(torch.optim.Optimizer):
    """SGD with momentum, layer-wise: each parameter's gradient and decay are scaled to a thousandth
    of the parameter's norm (apex's LARC without clipping); unlike in LARS, of all parameters."""

    def __init__(self, params, lr=0.0, momentum=0.9, weight_decay=0.0):
        super().__init__(params, dict(lr=lr, momentum=momentum, weight_decay=weight_decay))

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in (p for p in group["params"] if p.grad is not None):
                norm, gradient_norm, decay = p.norm(), p.grad.norm(), group["weight_decay"]
                scale = 0.001 * norm / (gradient_norm + decay * norm + 1e-8)
                scaled = scale * (p.grad + decay * p)
                update = torch.where((norm > 0) & (gradient_norm > 0), scaled, p.grad)
                buffer = self.state[p].setdefault("momentum_buffer", torch.zeros_like(p))
                buffer.mul_(group["momentum"]).add_(update)
                p.sub_(group["lr"] * buffer)


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
        large, *_, small = AUGMENTS[METHOD]
        large = replace(large, scale=(args.crop_split, 1.0))
        small = replace(small, scale=(0.05, max(args.crop_split, 0.05)))
        large = adapt((large,) * 2, args.size, args.jitter_strength)
        small = adapt((small,) * args.small_crops, args.small_size, args.jitter_strength)
        return train(args, large + small)  # multi-crop


if __name__ == "__main__":
    main(parse_args())
