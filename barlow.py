"""Barlow Twins: Self-Supervised Learning via Redundancy Reduction
Jure Zbontar, Li Jing, Ishan Misra, Yann LeCun, Stéphane Deny. ICML 2021, arXiv 2103.03230

Neither negatives nor a second network: over the batch, each dimension of one view's embedding
should correlate fully with the same dimension of the other view's (invariance) and not at all with
the other dimensions (no redundancy). A constant output has no correlation, so it cannot win.

    python barlow.py                                          # a few CPU minutes, no download
    torchrun --nproc_per_node=8 barlow.py --data /data/imagenet

Read it beside simclr.py: the same two embeddings, compared by columns instead of by rows.

The paper's encoder is backbone; Z^A, Z^B are z1, z2, the cross-correlation matrix is c, lambda is
redundancy_weight.
Shapes: B images per process, W processes, D features, C embedding dimensions.
Measured: 88.9 % linear top-1 on patterns (random weights 32.8 %), mean of 3 seeds.
"""

import math
import os

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import harness  # command line, checkpoint, log, report: what every run leaves on disk
from common import Augment, Views, fail, health, linear_eval, load_images, resnet, world_size

# patterns and cifar10: chosen here. imagenet: the official code's (section 2.2 of the paper has a
# weight decay of 1.5e-6 and a lambda of 5e-3).
# Paper: lr_biases 0.0048. Here: 1/16 of it, because it was tuned on 16 processes whose all_reduce
# had no gradient, which leaves 1/16 of the true one; LARS hides that for weights, not for biases.
SETTINGS = {
    "recipe":              ("patterns", "cifar10",  "imagenet", "what the columns are for"),
    "arch":                ("thin",     "resnet18", "resnet50", "thin, or a ResNet of torchvision"),
    "size":                (32,         32,         224,        "side of a view, in pixels"),
    "epochs":              (25,         200,        1000,       "passes over the images"),
    "batch_size":          (128,        256,        2048,       "images per step, all processes"),
    "optimizer":           ("adamw",    "sgd",      "lars",     "adamw, sgd or lars"),
    "lr":                  (0.004,      0.12,       0.2,        "per 256 images, of the weights"),
    "lr_biases":           (0.004,      0.12,       0.0003,     "of biases and normalisation"),
    "warmup_epochs":       (1.0,        10.0,       10.0,       "epochs of linear warm-up"),
    "weight_decay":        (1e-4,       5e-4,       1e-6,       "not on biases, normalisation"),
    "redundancy_weight":   (0.0051,     0.0051,     0.0051,     "lambda in equation 1"),
    "projection_dim":      (256,        2048,       8192,       "C; also the projector's width"),
    "eval_every":          (5,          10,         10,         "epochs between kNN evaluations"),
}  # fmt: skip


# -------------------------------------------------------------------------------------- method
def build_views(args):
    """Section 2.2: BYOL's two views; one is always blurred, the other sometimes solarized."""
    shared = {
        "size": args.size,
        "scale": (0.08, 1.0),
        "jitter": (0.4, 0.4, 0.2, 0.1),  # brightness, contrast, saturation, hue
        "jitter_p": 0.8,
        "grayscale": 0.2,
        "bicubic": True,
    }
    large = args.size > 64  # CIFAR-sized images are not blurred
    view1 = Augment(**shared, blur=1.0 if large else 0.0)
    view2 = Augment(**shared, blur=0.1 if large else 0.0, solarize=0.2)
    return [view1, view2]


class BarlowTwins(nn.Module):
    """forward(x1, x2): two views (B, 3, H, W) -> loss, and the embedding (B, C) for monitoring."""

    def __init__(self, args):
        super().__init__()
        self.backbone = build_backbone(args)
        self.projector = build_projector(self.backbone.dim, args.projection_dim)
        self.bn = nn.BatchNorm1d(args.projection_dim, affine=False)  # mean 0, std 1 per dimension
        self.redundancy_weight = args.redundancy_weight
        # Of random embeddings: every correlation is 1 / batch_size in the mean square.
        c = args.projection_dim
        square = 1 / args.batch_size
        self.chance_loss = c * (1 + square) + args.redundancy_weight * c * (c - 1) * square

    def forward(self, x1, x2):
        h1 = self.backbone(x1)  # (B, D); each view has its own batch statistics
        z1 = self.bn(self.projector(h1))  # (B, C)
        h2 = self.backbone(x2)
        z2 = self.bn(self.projector(h2))
        return barlow_loss(z1, z2, self.redundancy_weight), z1.detach()


@torch.autocast("cuda", enabled=False)  # sums over the batch in float32 (TF32 on GPUs), not bf16
def barlow_loss(z1, z2, redundancy_weight):
    """Equation 1: z1, z2 (B, C), batch-normalised -> the loss of the correlations over all WB
    images, the same on every process."""
    n = len(z1) * world_size()
    c = all_sum(z1.float().T @ z2.float()) / n  # (C, C), equation 2
    on_diagonal = (1 - c.diagonal()).square().sum()
    off_diagonal = c.square().sum() - c.diagonal().square().sum()
    return on_diagonal + redundancy_weight * off_diagonal  # sums: lambda depends on C


def build_projector(dim, projection_dim):
    """Three layers as wide as the embedding (section 2.2)."""
    return nn.Sequential(
        nn.Linear(dim, projection_dim, bias=False),
        nn.BatchNorm1d(projection_dim),
        nn.ReLU(inplace=True),
        nn.Linear(projection_dim, projection_dim, bias=False),
        nn.BatchNorm1d(projection_dim),
        nn.ReLU(inplace=True),
        nn.Linear(projection_dim, projection_dim, bias=False),
    )


def build_backbone(args):
    return resnet(args.arch, args.size, zero_init_residual=True)  # as in the official code


def build_optimizer(args, model):
    """Two groups: weights, and biases with normalisation, which are not decayed."""
    weights = [p for p in model.parameters() if p.ndim > 1]
    biases = [p for p in model.parameters() if p.ndim == 1]
    groups = [{"params": weights, "weight_decay": args.weight_decay}]
    groups.append({"params": biases, "weight_decay": 0.0})
    if args.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=0.0)
    if args.optimizer == "sgd":
        return torch.optim.SGD(groups, momentum=0.9)
    if args.optimizer == "lars":
        return LARS(groups)
    fail(f"--optimizer {args.optimizer}: not one of adamw, sgd, lars")


def learning_rate(args, epoch, lr=None):
    """Linear warm-up, then a half cosine down to a thousandth (section 2.2); epoch grows with every
    step. lr: per 256 images, of the weights if not given."""
    peak = (args.lr if lr is None else lr) * args.batch_size / 256
    if epoch < args.warmup_epochs:
        return peak * epoch / args.warmup_epochs
    progress = (epoch - args.warmup_epochs) / (args.epochs - args.warmup_epochs)
    return peak * (0.001 + 0.999 * (1 + math.cos(math.pi * progress)) / 2)


# ------------------------------------------------------------------------------------ training
def train(args):
    """Trains, evaluates and writes everything to args.out; returns the content of result.json."""
    device = launch()
    data = load_images(args.data, args.root, device)
    augments = build_views(args)
    views = Views(data.pretrain, augments, args.batch_size, device, args.seed, args.workers)

    torch.manual_seed(args.seed)  # all processes start from the same weights
    model = BarlowTwins(args).to(device, memory_format=torch.channels_last)
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
            optimizer.param_groups[0]["lr"] = lr  # of the weights
            optimizer.param_groups[1]["lr"] = learning_rate(args, now, args.lr_biases)
            bf16 = device.type == "cuda" and args.precision == "bf16"
            with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                loss, z = network(x1, x2)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            run.after_step(loss)

        metrics = {"lr": lr, **health(z)}
        last = epoch == args.epochs
        if last or epoch % args.eval_every == 0:
            view = augments[0]
            metrics |= linear_eval(model.backbone, data, view, device, args.workers, last)
        run.after_epoch(metrics)  # prints a line, writes checkpoint.pt and log.jsonl
    return run.finish(data)  # writes result.json, backbone.pt and report.png


# ------------------------------------------------------------------------------------ skeleton
class AllSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        x = x.clone()
        dist.all_reduce(x)
        return x

    @staticmethod
    def backward(ctx, grad):
        grad = grad.clone()
        dist.all_reduce(grad)  # every process's loss depends on this one's part
        return grad


def all_sum(x):
    """The sum over processes. The backward pass sums over them too, so after DDP's averaging the
    gradient equals that of one process with the batch; dist.all_reduce alone would leave 1/W."""
    return AllSum.apply(x) if world_size() > 1 else x


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
