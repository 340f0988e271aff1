"""SimSiam: Exploring Simple Siamese Representation Learning
Xinlei Chen, Kaiming He. CVPR 2021, arXiv 2011.10566

BYOL without the moving average: the target is the same network, whose output is treated as a
constant. No negatives and no second network; the stop-gradient and the predictor alone prevent a
collapse, and the paper shows that removing either one brings it about.

    python simsiam.py                                          # a few CPU minutes, no download
    torchrun --nproc_per_node=8 simsiam.py --data /data/imagenet

Read it as a diff of byol.py.

The paper's f is encoder, that is backbone and projector ("projection MLP"); its h ("prediction
MLP") is predictor; z and p are z and p, D is negative_cosine.
Shapes: B images per process, W processes, D features, C embedding dimensions.
Measured: 94.3 % linear top-1 on patterns (random weights 32.8 %), mean of 3 seeds.
"""

import math
import os
from collections import OrderedDict

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import harness  # command line, checkpoint, log, report: what every run leaves on disk
from common import Augment, Views, health, linear_eval, load_images, resnet, world_size

# patterns: two cores. cifar10: after appendix D, with 200 epochs (800 there) and three layers in
# the projector (two there). imagenet: the paper's (section 3).
SETTINGS = {
    "recipe":              ("patterns", "cifar10",  "imagenet", "what the columns are for"),
    "arch":                ("thin",     "resnet18", "resnet50", "thin, or a ResNet of torchvision"),
    "size":                (32,         32,         224,        "side of a view, in pixels"),
    "epochs":              (60,         200,        100,        "passes over the images"),
    "batch_size":          (64,         512,        512,        "images per step, all processes"),
    "lr":                  (0.8,        0.03,       0.05,       "per 256 images of the batch"),
    "weight_decay":        (1e-4,       5e-4,       1e-4,       "on all parameters"),
    "projection_dim":      (256,        2048,       2048,       "C; also the projector's width"),
    "predictor_dim":       (64,         512,        512,        "hidden width of the predictor"),
    "eval_every":          (5,          10,         10,         "epochs between kNN evaluations"),
}  # fmt: skip


# -------------------------------------------------------------------------------------- method
def build_views(args):
    """Section 3: the views of MoCo v2."""
    view = Augment(
        size=args.size,
        scale=(0.2, 1.0),
        jitter=(0.4, 0.4, 0.4, 0.1),  # brightness, contrast, saturation, hue
        jitter_p=0.8,
        grayscale=0.2,
        blur=0.5 if args.size > 64 else 0.0,  # CIFAR-sized images are not blurred (appendix D)
    )
    return [view, view]


class SimSiam(nn.Module):
    """forward(x1, x2): two views (B, 3, H, W) -> loss, and the embedding (B, C) for monitoring."""

    def __init__(self, args):
        super().__init__()
        backbone = build_backbone(args)
        projector = build_projector(backbone.dim, args.projection_dim)
        self.encoder = nn.Sequential(OrderedDict(backbone=backbone, projector=projector))
        self.predictor = build_predictor(args.projection_dim, args.predictor_dim)
        self.chance_loss = 0.0  # predictions orthogonal to the other view; the best is -1

    @property
    def backbone(self):
        return self.encoder.backbone

    def forward(self, x1, x2):
        z1 = self.encoder(x1)  # (B, C); each view has its own batch statistics
        z2 = self.encoder(x2)
        p1 = self.predictor(z1)  # (B, C)
        p2 = self.predictor(z2)
        loss = negative_cosine(p1, z2) / 2 + negative_cosine(p2, z1) / 2  # equation 2
        return loss, z1.detach()


def negative_cosine(p, z):
    """Equations 1 and 3: p, z (B, C) -> mean of -cos(p, stopgrad(z))."""
    return -F.cosine_similarity(p, z.detach(), dim=1).mean()  # without detach it collapses


def build_projector(dim, projection_dim):
    """The projection MLP (section 3): three layers, each followed by batch normalisation, the last
    one without learned scale and shift."""
    return nn.Sequential(
        nn.Linear(dim, projection_dim, bias=False),
        nn.BatchNorm1d(projection_dim),
        nn.ReLU(inplace=True),
        nn.Linear(projection_dim, projection_dim, bias=False),
        nn.BatchNorm1d(projection_dim),
        nn.ReLU(inplace=True),
        nn.Linear(projection_dim, projection_dim, bias=False),
        nn.BatchNorm1d(projection_dim, affine=False),
    )


def build_predictor(projection_dim, predictor_dim):
    """The prediction MLP (section 3): a bottleneck, no batch normalisation at its output."""
    return nn.Sequential(
        nn.Linear(projection_dim, predictor_dim, bias=False),
        nn.BatchNorm1d(predictor_dim),
        nn.ReLU(inplace=True),
        nn.Linear(predictor_dim, projection_dim),
    )


def build_backbone(args):
    return resnet(args.arch, args.size, zero_init_residual=True)  # as in the official code


def learning_rate(args, epoch):
    """A half cosine down to 0, in steps of an epoch (section 3)."""
    peak = args.lr * args.batch_size / 256
    return peak * (1 + math.cos(math.pi * int(epoch) / args.epochs)) / 2


# ------------------------------------------------------------------------------------ training
def train(args):
    """Trains, evaluates and writes everything to args.out; returns the content of result.json."""
    device = launch()
    data = load_images(args.data, args.root, device)
    augments = build_views(args)
    views = Views(data.pretrain, augments, args.batch_size, device, args.seed, args.workers)

    torch.manual_seed(args.seed)  # all processes start from the same weights
    model = SimSiam(args).to(device, memory_format=torch.channels_last)
    if device.type == "cuda":  # batch statistics over all processes (section 3); GPUs only
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    encoder = {"params": model.encoder.parameters()}
    predictor = {"params": model.predictor.parameters()}
    optimizer = torch.optim.SGD([encoder, predictor], momentum=0.9, weight_decay=args.weight_decay)

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
            optimizer.param_groups[0]["lr"] = lr  # of the encoder
            optimizer.param_groups[1]["lr"] = learning_rate(args, 0)  # constant (section 4.2)
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
