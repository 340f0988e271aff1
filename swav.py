r"""SwAV: Unsupervised Learning of Visual Features by Contrasting Cluster Assignments
Mathilde Caron, Ishan Misra, Julien Mairal, Priya Goyal, Piotr Bojanowski, Armand Joulin.
NeurIPS 2020, arXiv 2006.09882

Views are compared through clusters: each view predicts to which of P learned prototypes another
view of its image was assigned. The assignments (codes) are computed anew for each batch, under the
constraint that all prototypes receive equal shares of it; otherwise one would receive everything.
Small crops add inexpensive views.

    python swav.py                                          # a few CPU minutes, no download
    torchrun --nproc_per_node=8 swav.py --data /data/imagenet
    torchrun --nproc_per_node=4 swav.py --data /data/imagenet --batch-size 256 --lr 0.6 \
        --warmup-epochs 0 --queue-size 3840 --queue-start 15 --epochs 400    # few GPUs: the queue

Read it beside simclr.py: clusters in place of negatives.

The paper's f is backbone and projector, C prototypes, z^T C scores, q codes, p the softmax of
scores / temperature, epsilon epsilon; its V + 2 crops are 2 large ones and small_crops small ones.
Shapes: B images per process, W processes, V crops per image, D features, C embedding dimensions, P
prototypes, K images in the queue.
Measured: 89.5 % linear top-1 on patterns (random weights 32.8 %), mean of 3 seeds.
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

# patterns and cifar10: chosen here. imagenet: the paper's (appendices A.1 and A.2).
SETTINGS = {
    "recipe":              ("patterns", "cifar10",  "imagenet", "what the columns are for"),
    "arch":                ("thin",     "resnet18", "resnet50", "thin, or a ResNet of torchvision"),
    "size":                (32,         32,         224,        "side of a large crop, in pixels"),
    "small_size":          (16,         16,         96,         "side of a small crop, in pixels"),
    "small_crops":         (4,          0,          6,          "V - 2, small crops per image"),
    "crop_split":          (0.3,        0.14,       0.14,       "area that parts large and small"),
    "epochs":              (20,         200,        800,        "passes over the images"),
    "batch_size":          (128,        512,        4096,       "images per step, all processes"),
    "optimizer":           ("adamw",    "adamw",    "larc",     "adamw, sgd or larc"),
    "lr":                  (0.004,      0.002,      0.3,        "per 256 images of the batch"),
    "warmup_epochs":       (1.0,        10.0,       10.0,       "epochs of linear warm-up"),
    "weight_decay":        (1e-6,       1e-6,       1e-6,       "on all parameters"),
    "temperature":         (0.1,        0.1,        0.1,        "tau in equation 2"),
    "epsilon":             (0.05,       0.05,       0.05,       "smoothness, in equation 3"),
    "sinkhorn_iterations": (3,          3,          3,          "rounds of equalising"),
    "hidden_dim":          (128,        512,        2048,       "hidden width of the projector"),
    "projection_dim":      (64,         128,        128,        "C, width of the embedding"),
    "prototypes":          (100,        512,        3000,       "P, number of prototypes"),
    "freeze_epochs":       (1.0,        1.0,        1.0,        "epochs with fixed prototypes"),
    "queue_size":          (0,          0,          0,          "K, images in the queue"),
    "queue_start":         (0,          0,          0,          "epochs before the queue fills"),
    "jitter_strength":     (0.5,        0.5,        1.0,        "of the colours; SimCLR's is 1"),
    "eval_every":          (5,          10,         10,         "epochs between kNN evaluations"),
}  # fmt: skip


# -------------------------------------------------------------------------------------- method
def build_views(args):
    """Appendix A.2: multi-crop, two large crops and several small ones; SimCLR's colours."""
    # Paper's code: a standard deviation of 0.228 for red. Here: 0.229, as everywhere else.
    s = args.jitter_strength
    shared = {
        "jitter": (0.8 * s, 0.8 * s, 0.8 * s, 0.2 * s),  # brightness, contrast, saturation, hue
        "jitter_p": 0.8,
        "grayscale": 0.2,
    }
    blur = 0.5 if args.size > 64 else 0.0  # CIFAR-sized images are not blurred
    large = Augment(args.size, scale=(args.crop_split, 1.0), blur=blur, **shared)
    small_scale = (0.05, max(args.crop_split, 0.05))
    small = Augment(args.small_size, scale=small_scale, blur=blur, **shared)
    return [large, large] + [small] * args.small_crops


class SwAV(nn.Module):
    """forward(*crops): two large crops (B, 3, H, W), then small ones -> loss, and the embeddings of
    the large crops (2B, C) for the queue and for monitoring."""

    def __init__(self, args):
        super().__init__()
        self.backbone = build_backbone(args)
        self.projector = build_projector(self.backbone.dim, args.hidden_dim, args.projection_dim)
        self.prototypes = nn.Linear(args.projection_dim, args.prototypes, bias=False)  # (P, C)
        # The same on all processes: for each image, the embeddings of its two large crops.
        self.register_buffer("queue", torch.zeros(args.queue_size, 2, args.projection_dim))
        self.register_buffer("queue_ptr", torch.zeros((), dtype=torch.long))
        self.temperature = args.temperature
        self.epsilon = args.epsilon
        self.iterations = args.sinkhorn_iterations
        self.chance_loss = math.log(args.prototypes)  # if all prototypes were equally likely

    def forward(self, *crops):
        with torch.no_grad():  # prototypes of norm 1, so that scores are cosines
            self.prototypes.weight.copy_(F.normalize(self.prototypes.weight, dim=1))
        # One pass of the backbone per resolution, then one of the head for all crops.
        h = self.backbone(torch.cat(crops[:2]))  # (2B, D)
        if len(crops) > 2:
            h = torch.cat([h, self.backbone(torch.cat(crops[2:]))])  # (VB, D)
        z = F.normalize(self.projector(h), dim=1)  # (VB, C)
        with torch.autocast("cuda", enabled=False):  # exp(1 / epsilon) overflows in half precision
            scores = self.prototypes(z).chunk(len(crops))  # V of (B, P)
            loss = 0.0
            for i in (0, 1):  # the code of each large crop is predicted from every other crop
                codes = self.assign(scores[i].detach(), i)  # (B, P)
                for v in range(len(crops)):
                    if v != i:
                        loss = loss + swapped_prediction(scores[v], codes, self.temperature)
        n = len(crops[0])
        return loss / (2 * (len(crops) - 1)), z[: 2 * n].detach()

    @torch.no_grad()
    def assign(self, scores, i):
        """scores (B, P) of large crop i -> its codes (B, P). Once the queue is full, its images
        take part in the assignment, so that a small batch can fill the prototypes too."""
        codes = sinkhorn(scores, self.epsilon, self.iterations)
        if len(self.queue) == 0:
            return codes
        queue = self.queue.chunk(world_size())[rank()]  # (K / W, 2, C), this process's part
        all_scores = torch.cat([scores, self.prototypes(queue[:, i])])
        with_queue = sinkhorn(all_scores, self.epsilon, self.iterations)[: len(scores)]
        return torch.where(self.queue[-1].any(), with_queue, codes)


def swapped_prediction(scores, codes, temperature):
    """Equation 2: cross-entropy between the codes (B, P) of one crop and the prediction made from
    the scores (B, P) of another; mean over the B images."""
    return -(codes * F.log_softmax(scores / temperature, dim=1)).sum(dim=1).mean()


@torch.no_grad()
def sinkhorn(scores, epsilon, iterations):
    """Equations 3 to 5: scores (B, P), cosines -> codes (B, P). Each row sums to 1, and over all
    processes each prototype receives about the same share; epsilon weighs the entropy."""
    codes = torch.exp((scores - 1) / epsilon)  # cosines are at most 1, so nothing overflows
    for _ in range(iterations):
        share = codes.sum(dim=0)  # (P,)
        if world_size() > 1:
            dist.all_reduce(share)
        codes = codes / share  # equal shares for the prototypes
        codes = codes / codes.sum(dim=1, keepdim=True)  # one unit per image
    return codes


def build_projector(dim, hidden_dim, projection_dim):
    """Two layers with batch normalisation in between (appendix A.1)."""
    return nn.Sequential(
        nn.Linear(dim, hidden_dim),
        nn.BatchNorm1d(hidden_dim),
        nn.ReLU(inplace=True),
        nn.Linear(hidden_dim, projection_dim),
    )


def build_backbone(args):
    return resnet(args.arch, args.size)


@torch.no_grad()
def enqueue(queue, queue_ptr, keys):
    """Writes the keys of all processes (WB, ...) over the oldest rows of the queue (K, ...)."""
    keys = gather(keys)
    rows = (queue_ptr + torch.arange(len(keys), device=keys.device)) % len(queue)
    queue[rows] = keys
    queue_ptr.add_(len(keys)).remainder_(len(queue))


def build_optimizer(args, model):
    if args.optimizer == "adamw":
        return torch.optim.AdamW(model.parameters(), lr=0.0, weight_decay=args.weight_decay)
    if args.optimizer == "sgd":
        return torch.optim.SGD(model.parameters(), momentum=0.9, weight_decay=args.weight_decay)
    if args.optimizer == "larc":
        return LARC(model.parameters(), weight_decay=args.weight_decay)
    fail(f"--optimizer {args.optimizer}: not one of adamw, sgd, larc")


def learning_rate(args, epoch):
    """Linear warm-up, then a half cosine down to a thousandth (appendix A.1); epoch grows with
    every step."""
    peak = args.lr * args.batch_size / 256
    if epoch < args.warmup_epochs:
        return peak * (1 + 15 * epoch / args.warmup_epochs) / 16  # batch of 4096: 0.3 to 4.8
    progress = (epoch - args.warmup_epochs) / (args.epochs - args.warmup_epochs)
    return peak * (0.001 + 0.999 * (1 + math.cos(math.pi * progress)) / 2)


# ------------------------------------------------------------------------------------ training
def train(args):
    """Trains, evaluates and writes everything to args.out; returns the content of result.json."""
    device = launch()
    data = load_images(args.data, args.root, device)
    augments = build_views(args)
    views = Views(data.pretrain, augments, args.batch_size, device, args.seed, args.workers)
    if args.queue_size % args.batch_size or args.queue_size > len(data.pretrain):
        fail(f"--queue-size {args.queue_size}: not a multiple of a batch, or over all images")

    torch.manual_seed(args.seed)  # all processes start from the same weights
    model = SwAV(args).to(device, memory_format=torch.channels_last)
    if device.type == "cuda":  # batch statistics over all processes (appendix A.1); GPUs only
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
        for step, crops in enumerate(views):
            now = epoch - 1 + step / len(views)
            lr = learning_rate(args, now)
            for group in optimizer.param_groups:
                group["lr"] = lr
            bf16 = device.type == "cuda" and args.precision == "bf16"
            with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                loss, z = network(*crops)
            optimizer.zero_grad()
            loss.backward()
            if now < args.freeze_epochs:  # with a gradient of 0, momentum would still move them
                model.prototypes.weight.grad = None
            optimizer.step()
            if args.queue_size > 0 and now >= args.queue_start:
                enqueue(model.queue, model.queue_ptr, torch.stack(z.chunk(2), dim=1))  # (B, 2, C)
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


class LARC(torch.optim.Optimizer):
    """SGD with momentum and layer-wise adaptive rates (apex's LARC without clipping): gradient and
    decay of every parameter are rescaled to a thousandth of the parameter's norm."""

    def __init__(self, params, lr=0.0, weight_decay=0.0, momentum=0.9):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                decay = group["weight_decay"]
                norm = p.norm()
                grad_norm = p.grad.norm()
                ratio = 0.001 * norm / (grad_norm + decay * norm + 1e-8)
                scaled = ratio * (p.grad + decay * p)
                update = torch.where((norm > 0) & (grad_norm > 0), scaled, p.grad)
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
