"""SimCLR: A Simple Framework for Contrastive Learning of Visual Representations
Ting Chen, Simon Kornblith, Mohammad Norouzi, Geoffrey Hinton. ICML 2020, arXiv 2002.05709

Two random views of an image should find each other among all the views in the batch. There is one
network, no memory and no momentum encoder; what makes it work is strong augmentation (crop and
colour together), a non-linear head that is discarded after training, and a large batch that
supplies many negatives.

    python simclr.py                                          # a few CPU minutes, no download
    torchrun --nproc_per_node=8 simclr.py --data /data/imagenet

Read this first. moco_v1.py replaces the large batch by a queue; byol.py drops the negatives.

The paper's f, g, z, tau are backbone, projector, z, temperature; its N images are our W * B.
Shapes: B images per process, W processes, D features, C embedding dimensions.
Measured: 98.7 % linear top-1 on patterns (random weights 33.5 %), mean of 3 seeds.
"""

import math
import os

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import harness  # command line, checkpoint, log, report: what every run leaves on disk
from common import Augment, Views, fail, health, linear_eval, load_images, rank, resnet, world_size

# patterns: two cores. cifar10: after appendix B.9, with ResNet-18 (ResNet-50 there) and SGD (LARS).
# imagenet: the paper's (section 2.3, appendix B.6).
SETTINGS = {
    "recipe":              ("patterns", "cifar10",  "imagenet", "what the columns are for"),
    "arch":                ("thin",     "resnet18", "resnet50", "thin, or a ResNet of torchvision"),
    "size":                (32,         32,         224,        "side of a view, in pixels"),
    "epochs":              (30,         200,        1000,       "passes over the images"),
    "batch_size":          (256,        512,        4096,       "images per step, all processes"),
    "optimizer":           ("lars",     "sgd",      "lars",     "sgd or lars"),
    "lr":                  (6.0,        0.12,       0.3,        "per 256 images of the batch"),
    "warmup_epochs":       (1.0,        10.0,       10.0,       "epochs of linear warm-up"),
    "weight_decay":        (1e-4,       5e-4,       1e-6,       "lars: not on biases, norms"),
    "temperature":         (0.2,        0.5,        0.1,        "tau in equation 1"),
    "projection_dim":      (64,         128,        128,        "C, width of the embedding"),
    "jitter_strength":     (1.0,        0.5,        1.0,        "s, strength of the colours"),
    "eval_every":          (5,          10,         10,         "epochs between kNN evaluations"),
}  # fmt: skip


# -------------------------------------------------------------------------------------- method
def build_views(args):
    """Appendix A: crops of at least 8 % of the image, colour distortion, blur in half the views."""
    s = args.jitter_strength
    view = Augment(
        size=args.size,
        scale=(0.08, 1.0),
        jitter=(0.8 * s, 0.8 * s, 0.8 * s, 0.2 * s),  # brightness, contrast, saturation, hue
        jitter_p=0.8,
        grayscale=0.2,
        blur=0.5 if args.size > 64 else 0.0,  # CIFAR-sized images are not blurred (appendix B.9)
        bicubic=True,
        mean=(0.0, 0.0, 0.0),  # no normalisation, as in the official code
        std=(1.0, 1.0, 1.0),
    )
    return [view, view]


class SimCLR(nn.Module):
    """forward(x1, x2): two views (B, 3, H, W) -> loss, and the embedding (B, C) for monitoring."""

    def __init__(self, args):
        super().__init__()
        self.backbone = build_backbone(args)
        self.projector = build_projector(self.backbone.dim, args.projection_dim)
        self.temperature = args.temperature
        self.chance_loss = math.log(2 * args.batch_size - 1)  # if all similarities were equal

    def forward(self, x1, x2):
        # One pass for both views, so that batch normalisation sees 2B images (official code).
        h = self.backbone(torch.cat([x1, x2]))  # (2B, D)
        z = F.normalize(self.projector(h), dim=1)  # (2B, C)
        z1, z2 = z.chunk(2)  # (B, C) each
        return nt_xent(z1, z2, self.temperature), z1.detach()


@torch.autocast("cuda", enabled=False)  # logits in float32 (TF32 on GPUs), not bf16
def nt_xent(z1, z2, temperature):
    """Equation 1: z1, z2 (B, C), normalised -> mean cross-entropy over this process's 2B views,
    each of which has to find its partner among the 2WB - 1 other views of all processes."""
    n = len(z1)
    z = torch.cat([z1, z2])  # (2B, C), of this process
    z_all = torch.cat([gather(z1), gather(z2)])  # (2WB, C), of all processes
    logits = z @ z_all.T / temperature  # (2B, 2WB)

    first = rank() * n + torch.arange(n, device=z.device)  # (B,): where z1 is in z_all
    second = world_size() * n + first  # (B,): where z2 is in z_all
    itself = torch.cat([first, second])  # (2B,)
    partner = torch.cat([second, first])  # (2B,)
    logits = logits.scatter(1, itself.unsqueeze(1), -math.inf)  # a view is not its own negative
    return F.cross_entropy(logits, partner)


def build_projector(dim, projection_dim):
    """g: two layers (section 2.1), each followed by batch normalisation (official code)."""
    # Paper's code: weights from N(0, 0.01). Here: torch's default, because LARS adapts to the norm.
    projector = nn.Sequential(
        nn.Linear(dim, dim, bias=False),
        nn.BatchNorm1d(dim),
        nn.ReLU(inplace=True),
        nn.Linear(dim, projection_dim, bias=False),
        nn.BatchNorm1d(projection_dim),
    )
    projector[-1].bias.requires_grad = False  # the last one has no learned shift
    return projector


def build_backbone(args):
    return resnet(args.arch, args.size, zero_init_residual=True)  # as in the official code


def build_optimizer(args, model):
    trained = [p for p in model.parameters() if p.requires_grad]
    if args.optimizer == "sgd":
        return torch.optim.SGD(trained, momentum=0.9, weight_decay=args.weight_decay)
    if args.optimizer == "lars":
        return LARS(trained, weight_decay=args.weight_decay)
    fail(f"--optimizer {args.optimizer}: neither sgd nor lars")


def learning_rate(args, epoch):
    """Linear warm-up, then a half cosine down to 0 (section 2.3); epoch grows with every step."""
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
    model = SimCLR(args).to(device, memory_format=torch.channels_last)
    if device.type == "cuda":  # batch statistics over all processes (section 2.2); GPUs only
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
            lr = learning_rate(args, epoch - 1 + step / len(views))
            for group in optimizer.param_groups:
                group["lr"] = lr
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
    As in SimCLR's code the learning rate is applied before the momentum (byol.py: after it)."""

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
                buffer.mul_(group["momentum"]).add_(group["lr"] * update)
                p.sub_(buffer)


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
