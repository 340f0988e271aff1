"""MoCo v1: Momentum Contrast for Unsupervised Visual Representation Learning
Kaiming He, Haoqi Fan, Yuxin Wu, Saining Xie, Ross Girshick. CVPR 2020, arXiv 1911.05722

Contrastive learning as a dictionary look-up: a query, one view of an image, should find the key of
the other view among many keys. The dictionary is a queue of keys from past batches, far larger than
a batch. Its keys remain comparable because their encoder changes slowly: it is a moving average of
the encoder of the queries.

    python moco_v1.py                                          # a few CPU minutes, no download
    torchrun --nproc_per_node=8 moco_v1.py --data /data/imagenet

Read it beside simclr.py. moco_v2.py changes the head, augmentation, schedule and temperature.

The paper's f_q, f_k, m, tau are encoder_q, encoder_k, ema_momentum, temperature; "shuffling BN" is
shuffle, unshuffle and bn_groups.
Shapes: B images per process, W processes, D features, C embedding dimensions, K keys in the queue.
Measured: 99.4 % linear top-1 on patterns (random weights 32.8 %), mean of 3 seeds.
"""

import copy
import math
import os
from collections import OrderedDict
from functools import partial

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import harness  # command line, checkpoint, log, report: what every run leaves on disk
from common import Augment, Views, fail, health, linear_eval, load_images, rank, resnet, world_size

# patterns: two cores. cifar10: after the authors' CIFAR demo, with crops of at least 20 % (8 %
# there). imagenet: the paper's (section 4).
SETTINGS = {
    "recipe":              ("patterns", "cifar10",  "imagenet", "what the columns are for"),
    "arch":                ("thin",     "resnet18", "resnet50", "thin, or a ResNet of torchvision"),
    "size":                (32,         32,         224,        "side of a view, in pixels"),
    "epochs":              (40,         200,        200,        "passes over the images"),
    "batch_size":          (64,         512,        256,        "images per step, all processes"),
    "lr":                  (0.12,       0.03,       0.03,       "per 256 images of the batch"),
    "weight_decay":        (1e-4,       5e-4,       1e-4,       "on all parameters"),
    "temperature":         (0.1,        0.1,        0.07,       "tau in equation 1"),
    "projection_dim":      (128,        128,        128,        "C, width of the embedding"),
    "queue_size":          (512,        4096,       65536,      "K, keys in the queue"),
    "ema_momentum":        (0.99,       0.99,       0.999,      "m in MoCo v1's equation 2"),
    "bn_groups":           (4,          8,          8,          "the paper's GPUs, for BN"),
    "eval_every":          (5,          10,         10,         "epochs between kNN evaluations"),
}  # fmt: skip


# -------------------------------------------------------------------------------------- method
def build_views(args):
    """Section 3.3: crops of at least 20 % of the image, colours always changed, no blur."""
    # Paper's code: grayscale before the colour jitter. Here: after it, as in all other methods.
    view = Augment(
        size=args.size,
        scale=(0.2, 1.0),
        jitter=(0.4, 0.4, 0.4, 0.4),  # brightness, contrast, saturation, hue
        jitter_p=1.0,
        grayscale=0.2,
    )
    return [view, view]


class MoCo(nn.Module):
    """forward(x_q, x_k): two views (B, 3, H, W) -> loss, and the queries (B, C) for monitoring."""

    def __init__(self, args):
        super().__init__()
        backbone = build_backbone(args)
        projector = build_projector(backbone.dim, args.projection_dim)
        self.encoder_q = nn.Sequential(OrderedDict(backbone=backbone, projector=projector))
        self.encoder_k = copy.deepcopy(self.encoder_q).requires_grad_(False)
        queue = F.normalize(torch.randn(args.queue_size, args.projection_dim), dim=1)
        self.register_buffer("queue", queue)  # (K, C)
        self.register_buffer("queue_ptr", torch.zeros((), dtype=torch.long))
        self.temperature = args.temperature
        self.chance_loss = math.log(args.queue_size + 1)  # if all similarities were equal

    @property
    def backbone(self):
        return self.encoder_q.backbone

    def forward(self, x_q, x_k):
        q = F.normalize(self.encoder_q(x_q), dim=1)  # (B, C)
        with torch.no_grad():  # no gradient to keys
            x_k, permutation = shuffle(x_k)
            k = F.normalize(self.encoder_k(x_k), dim=1)  # (B, C)
            k = unshuffle(k, permutation)
        # A copy of the queue: backward needs it as it is now, and enqueue overwrites part of it.
        loss = info_nce(q, k, self.queue.clone(), self.temperature)
        enqueue(self.queue, self.queue_ptr, k)  # last: otherwise a key would be its own negative
        return loss, q.detach()


@torch.autocast("cuda", enabled=False)  # logits in float32 (TF32 on GPUs), not bf16
def info_nce(q, k, queue, temperature):
    """Equation 1: q, k (B, C) and queue (K, C), normalised -> mean cross-entropy over B queries,
    each of which has to find its key among 1 + K."""
    positive = (q * k).sum(dim=1, keepdim=True)  # (B, 1)
    negative = q @ queue.T  # (B, K)
    logits = torch.cat([positive, negative], dim=1) / temperature  # (B, 1 + K)
    labels = torch.zeros(len(q), dtype=torch.long, device=q.device)  # the positive comes first
    return F.cross_entropy(logits, labels)


def build_projector(dim, projection_dim):
    """A single linear layer (section 3.3)."""
    return nn.Linear(dim, projection_dim)


def build_backbone(args):
    groups = max(1, args.bn_groups // world_size())  # in this process
    return resnet(args.arch, args.size, norm_layer=partial(GroupedBatchNorm2d, groups=groups))


@torch.no_grad()
def ema_update(source, target, momentum):
    """target <- momentum * target + (1 - momentum) * source (MoCo v1, equation 2; BYOL, equation
    1). Parameters only: the running statistics of the target are its own."""
    for p, target_p in zip(source.parameters(), target.parameters()):
        target_p.lerp_(p, 1 - momentum)


@torch.no_grad()
def enqueue(queue, queue_ptr, keys):
    """Writes the keys of all processes (WB, ...) over the oldest rows of the queue (K, ...)."""
    keys = gather(keys)
    rows = (queue_ptr + torch.arange(len(keys), device=keys.device)) % len(queue)
    queue[rows] = keys
    queue_ptr.add_(len(keys)).remainder_(len(queue))


class GroupedBatchNorm2d(nn.BatchNorm2d):
    """Batch normalisation within each of `groups` equal slices of the batch, as if every slice were
    on a GPU of its own: one process can train as the paper's eight GPUs do."""

    def __init__(self, channels, groups=1):
        super().__init__(channels)
        self.groups = groups

    def forward(self, x):
        if not self.training or self.groups == 1:
            return super().forward(x)
        parts = []
        for i, part in enumerate(x.chunk(self.groups)):
            # All groups weigh the same, as if the running statistics moved once, by their average.
            left = self.groups - 1 - i
            momentum = self.momentum / (self.groups - left * self.momentum)
            mean = self.running_mean
            var = self.running_var
            part = F.batch_norm(part, mean, var, self.weight, self.bias, True, momentum, self.eps)
            parts.append(part)
        return torch.cat(parts)


def shuffle(x):
    """Redistributes the images of all processes among processes and BN groups at random (MoCo v1,
    section 3.3): batch statistics shared by a query and its key would give the answer away.
    Returns x (B, ...) and the permutation (WB,)."""
    n = len(x)
    permutation = torch.randperm(world_size() * n, device=x.device)
    if world_size() > 1:
        dist.broadcast(permutation, src=0)
    mine = permutation[rank() * n : (rank() + 1) * n]
    return gather(x)[mine], permutation


def unshuffle(k, permutation):
    """The inverse: the keys (B, ...) of this process's own images, in their order."""
    n = len(k)
    inverse = permutation.argsort()
    mine = inverse[rank() * n : (rank() + 1) * n]
    return gather(k)[mine]


def learning_rate(args, epoch):
    """Divided by 10 after 60 % and 80 % of the epochs (section 4: 120 and 160 of 200)."""
    lr = args.lr * args.batch_size / 256
    if int(epoch) >= 0.6 * args.epochs:
        lr = lr * 0.1
    if int(epoch) >= 0.8 * args.epochs:
        lr = lr * 0.1
    return lr


# ------------------------------------------------------------------------------------ training
def train(args):
    """Trains, evaluates and writes everything to args.out; returns the content of result.json."""
    device = launch()
    data = load_images(args.data, args.root, device)
    augments = build_views(args)
    views = Views(data.pretrain, augments, args.batch_size, device, args.seed, args.workers)
    if not args.batch_size <= args.queue_size <= len(data.pretrain):
        fail(f"--queue-size {args.queue_size}: less than a batch, or more than there are images")
    if args.batch_size % args.bn_groups:
        fail(f"--bn-groups {args.bn_groups}: not a divisor of --batch-size {args.batch_size}")

    torch.manual_seed(args.seed)  # all processes start from the same weights
    model = MoCo(args).to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(
        model.encoder_q.parameters(), momentum=0.9, weight_decay=args.weight_decay
    )

    run = harness.Run(args, model, optimizer, views)  # continues where a killed run stopped
    if run.is_new:  # the baseline: random weights
        run.log_start(linear_eval(model.backbone, data, augments[0], device, args.workers))
    if args.compile:
        model.compile()
    network = DistributedDataParallel(model) if world_size() > 1 else model

    for epoch in run.epochs():
        views.set_epoch(epoch)
        for step, (x_q, x_k) in enumerate(views):
            lr = learning_rate(args, epoch - 1 + step / len(views))
            for group in optimizer.param_groups:
                group["lr"] = lr
            bf16 = device.type == "cuda" and args.precision == "bf16"
            with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                loss, q = network(x_q, x_k)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            ema_update(model.encoder_q, model.encoder_k, args.ema_momentum)
            run.after_step(loss)

        metrics = {"lr": lr, **health(q)}
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
