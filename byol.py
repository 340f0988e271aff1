"""BYOL: Bootstrap Your Own Latent: A New Approach to Self-Supervised Learning
Jean-Bastien Grill, Florian Strub, Florent Altché, and others. NeurIPS 2020, arXiv 2006.07733

No negatives: from one view of an image, the online network predicts what a target network outputs
for the other view. The target is a slow moving average of the online network and receives no
gradient. With a predictor on one side only, the outputs do not collapse to a constant.

    python byol.py                                          # a few CPU minutes, no download
    torchrun --nproc_per_node=8 byol.py --data /data/imagenet

Read it beside simclr.py. simsiam.py drops the moving average; moco_v3.py brings negatives back.

The paper's f and g, together encoder, are backbone and projector; q is predictor, the target
network (xi) target_encoder, tau ema_momentum; y, z, q(z) are h, z, p.
Shapes: B images per process, W processes, D features, C embedding dimensions.
Measured: 98.9 % linear top-1 on patterns (random weights 32.8 %), mean of 3 seeds.
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

import harness  # command line, checkpoint, log, report: what every run leaves on disk
from common import Augment, Views, fail, health, linear_eval, load_images, resnet, world_size

# patterns and cifar10: chosen here, with SGD. imagenet: the paper's (section 3.3).
SETTINGS = {
    "recipe":              ("patterns", "cifar10",  "imagenet", "what the columns are for"),
    "arch":                ("thin",     "resnet18", "resnet50", "thin, or a ResNet of torchvision"),
    "size":                (32,         32,         224,        "side of a view, in pixels"),
    "crop_min":            (0.2,        0.08,       0.08,       "least area of a crop, of 1"),
    "epochs":              (45,         200,        1000,       "passes over the images"),
    "batch_size":          (64,         256,        4096,       "images per step, all processes"),
    "optimizer":           ("sgd",      "sgd",      "lars",     "sgd or lars"),
    "lr":                  (0.6,        0.12,       0.2,        "per 256 images of the batch"),
    "warmup_epochs":       (1.0,        10.0,       10.0,       "epochs of linear warm-up"),
    "weight_decay":        (1e-4,       5e-4,       1.5e-6,     "lars: not on biases, norms"),
    "hidden_dim":          (256,        1024,       4096,       "hidden width of both heads"),
    "projection_dim":      (256,        256,        256,        "C, width of the embedding"),
    "ema_momentum":        (0.95,       0.99,       0.996,      "tau at the start; grows to 1"),
    "eval_every":          (5,          10,         10,         "epochs between kNN evaluations"),
}  # fmt: skip


# -------------------------------------------------------------------------------------- method
def build_views(args):
    """Table 6: two different views; one is always blurred, the other sometimes solarized."""
    # Paper's code: brightness is added. Here: multiplied, as in torchvision.
    shared = {
        "size": args.size,
        "scale": (args.crop_min, 1.0),
        "jitter": (0.4, 0.4, 0.2, 0.1),  # brightness, contrast, saturation, hue
        "jitter_p": 0.8,
        "grayscale": 0.2,
        "bicubic": True,
    }
    large = args.size > 64  # CIFAR-sized images are not blurred
    view1 = Augment(**shared, blur=1.0 if large else 0.0)
    view2 = Augment(**shared, blur=0.1 if large else 0.0, solarize=0.2)
    return [view1, view2]


class BYOL(nn.Module):
    """forward(x1, x2): two views (B, 3, H, W) -> loss, and the embedding (B, C) for monitoring."""

    def __init__(self, args):
        super().__init__()
        backbone = build_backbone(args)
        projector = build_mlp(backbone.dim, args.hidden_dim, args.projection_dim)
        self.encoder = nn.Sequential(OrderedDict(backbone=backbone, projector=projector))
        self.predictor = build_mlp(args.projection_dim, args.hidden_dim, args.projection_dim)
        # Paper: other random weights. Here: a copy, because the authors saw no difference.
        self.target_encoder = copy.deepcopy(self.encoder).requires_grad_(False)
        self.chance_loss = 4.0  # predictions orthogonal to the targets

    @property
    def backbone(self):
        return self.encoder.backbone

    def forward(self, x1, x2):
        z1 = self.encoder(x1)  # (B, C); each view has its own batch statistics
        z2 = self.encoder(x2)
        p1 = self.predictor(z1)  # (B, C)
        p2 = self.predictor(z2)
        with torch.no_grad():  # no gradient to the target, whose batch norm is in training mode too
            target_z1 = self.target_encoder(x1)  # (B, C)
            target_z2 = self.target_encoder(x2)
        loss = regression_loss(p1, target_z2) + regression_loss(p2, target_z1)
        return loss, z1.detach()


def regression_loss(p, z):
    """Equation 2: p, z (B, C) -> mean of |p / |p| - z / |z||^2, which is 2 - 2 cos(p, z)."""
    return 2 - 2 * F.cosine_similarity(p, z, dim=1).mean()


def build_mlp(dim, hidden_dim, projection_dim):
    """g and q have the same form (section 3.3): one hidden layer with batch normalisation, and,
    unlike SimCLR's, none at the output."""
    return nn.Sequential(
        nn.Linear(dim, hidden_dim),
        nn.BatchNorm1d(hidden_dim),
        nn.ReLU(inplace=True),
        nn.Linear(hidden_dim, projection_dim, bias=False),
    )


def build_backbone(args):
    return resnet(args.arch, args.size, zero_init_residual=True)  # as in the official code


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
    if args.optimizer == "sgd":
        return torch.optim.SGD(trained, momentum=0.9, weight_decay=args.weight_decay)
    if args.optimizer == "lars":
        return LARS(trained, weight_decay=args.weight_decay)
    fail(f"--optimizer {args.optimizer}: neither sgd nor lars")


def learning_rate(args, epoch):
    """Linear warm-up, then a half cosine down to 0 (section 3.3); epoch grows with every step."""
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
    model = BYOL(args).to(device, memory_format=torch.channels_last)
    if device.type == "cuda":  # batch statistics over all processes (section 3.3); GPUs only
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
            ema_update(model.encoder, model.target_encoder, ema_momentum(args, now))
            run.after_step(loss)

        metrics = {"lr": lr, **health(z)}
        last = epoch == args.epochs
        if last or epoch % args.eval_every == 0:
            view = augments[0]
            metrics |= linear_eval(model.backbone, data, view, device, args.workers, last)
        run.after_epoch(metrics)  # prints a line, writes checkpoint.pt and log.jsonl
    return run.finish(data)  # writes result.json, backbone.pt and report.png


# ------------------------------------------------------------------------------------ skeleton
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
