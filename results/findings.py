"""What each paper found, measured here on photographs, with seeds, beside the paper's numbers.

    python -m results.findings --data FOLDER                       # all that is missing
    python -m results.findings swav.multicrop --data FOLDER        # one finding, anew
    python -m results.findings                                     # findings.json from the runs

FOLDER holds CIFAR-10 as train/<class>/ and test/<class>/, or is `cifar10`. Each run is the default
recipe of a script (a thin network) on 20,000 training images for ten epochs, with the flags or the
one replaced function that a finding names; it is judged by kNN and a linear probe on all 10,000
test images. A run adds its line to results/findings_runs.jsonl as it ends, so an interrupted series
continues where it was. findings.json is made from these lines; a verdict is computed, not written:

holds                  the gap has the paper's sign and exceeds twice its standard error
does not hold here     it has the other sign and exceeds twice its standard error
too close to tell      otherwise
not measured           a run is missing"""

import argparse
import importlib
import json
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Lock

import torch
from torch import nn

import common
import harness
from results.methods import model_class

FOLDER = Path(__file__).resolve().parent
RUNS = FOLDER / "findings_runs.jsonl"
TABLE = FOLDER / "findings.json"
EPOCHS = 10
METRICS = ("linear_top1", "knn_top1")


# --------------------------------------------------------------------------------- replaced parts
def change_views(script, **changes):
    build_views = script.build_views

    def changed(args):
        return [replace(view, **changes) for view in build_views(args)]

    script.build_views = changed


def change_model(script, name, change):
    """Applies `change` to each new model of the class `name`."""
    model = getattr(script, name)

    class Changed(model):
        def __init__(self, args):
            super().__init__(args)
            change(self)

    setattr(script, name, Changed)


def without_colour(script):
    """Crops, flips and blur as before; no colour jitter, no grayscale, no solarization."""
    change_views(script, jitter_p=0.0, grayscale=0.0, solarize=0.0)


def linear_head(script):
    def build_projector(dim, projection_dim):
        return nn.Sequential(
            nn.Linear(dim, projection_dim, bias=False), nn.BatchNorm1d(projection_dim)
        )

    script.build_projector = build_projector


def no_head(script):
    script.build_projector = lambda dim, projection_dim: nn.Identity()


def no_shuffle(script):
    """Keys share the batch statistics of their own queries."""

    def shuffle(x):
        return x, torch.arange(common.world_size() * len(x))

    script.shuffle = shuffle


def mlp_head(script):
    script.build_projector = importlib.import_module("moco_v2").build_projector


def cosine_schedule(script):
    script.learning_rate = importlib.import_module("moco_v2").learning_rate


def v2_views(script):
    script.build_views = importlib.import_module("moco_v2").build_views


def no_predictor(script):
    def change(model):
        model.predictor = nn.Identity()

    change_model(script, {"byol": "BYOL", "simsiam": "SimSiam"}[script.__name__], change)


def no_stop_gradient(script):
    def negative_cosine(p, z):
        return -nn.functional.cosine_similarity(p, z, dim=1).mean()

    script.negative_cosine = negative_cosine


def decayed_predictor(script):
    """The predictor's learning rate decays with the encoder's."""
    learning_rate = script.learning_rate
    last = [0.0]

    def decayed(args, epoch):
        if epoch > 0:
            last[0] = epoch
        return learning_rate(args, last[0])

    script.learning_rate = decayed


def no_equal_shares(script):
    """Codes are the softmax of the scores: nothing keeps the prototypes equally full."""

    def sinkhorn(scores, epsilon, iterations):
        return torch.softmax(scores / epsilon, dim=1)

    script.sinkhorn = sinkhorn


def trained_patches(script):
    """The patch projection of the ViT is trained, as in other ViTs."""

    def change(model):
        model.encoder_q.backbone.conv_proj.requires_grad_(True)

    change_model(script, "MoCo", change)


def heads_without_norm(script):
    def build_mlp(widths, last_norm):
        layers = []
        for dim, width in zip(widths, widths[1:]):
            layers += [nn.Linear(dim, width), nn.ReLU(inplace=True)]
        return nn.Sequential(*layers[:-1])

    script.build_mlp = build_mlp


def dense_backbone(script):
    """DenseCL's backbone: thin without a stride in its last stage, so with four times the cells."""
    script.build_backbone = importlib.import_module("densecl").build_backbone


def match_projected(script):
    """Cells are matched by the dense head's outputs instead of the backbone's features."""
    encoder = script.Encoder

    class Projected(encoder):
        def forward(self, x):
            z, dense, _ = super().forward(x)
            return z, dense, dense

    script.Encoder = Projected


# ------------------------------------------------------------------------------------ the findings
@dataclass(frozen=True)
class Arm:
    """A run with other flags or one replaced part: what a finding compares."""

    method: str
    flags: tuple = ()
    change: str = ""  # the name of a function above
    seeds: tuple = (0, 1, 2)
    metric: str = "linear_top1"
    composites: bool = False  # trained on pictures of four images, and judged cell by cell

    def key(self, seed):
        change = [self.change] if self.change else []
        change += ["composites"] if self.composites else []
        return " ".join([self.method, *self.flags, *change, f"seed={seed}"])


@dataclass(frozen=True)
class Finding:
    """compare: pairs of arms, the one that the paper finds better first; or four arms (a, b, c, d),
    where the paper finds that a loses less against b than c against d."""

    key: str
    claim: str
    source: str  # section, table or figure
    paper: dict  # its numbers, if it has some that can be compared
    arms: dict  # {name: Arm}
    compare: tuple


def arms(method, flag, values, **options):
    """An arm per value of one flag."""
    return {str(value): Arm(method, (flag, str(value)), **options) for value in values}


def dense_arm(method, change="", flags=()):
    flags = ("--size", "64", *flags)
    return Arm(method, flags, change, metric="cell_top1", composites=True)


ONE = (0,)  # one seed is enough where a part's removal ends in a collapse
SIMCLR = Arm("simclr")
MOCO_V1 = Arm("moco_v1")
MLP_HEAD = Arm("moco_v1", ("--temperature", "0.2"), "mlp_head")
V2_VIEWS = Arm("moco_v1", change="v2_views")
MOCO_V2 = Arm("moco_v2")
BYOL = Arm("byol")
SIMSIAM = Arm("simsiam")
BARLOW = Arm("barlow")
SWAV = Arm("swav")
MOCO_V3 = Arm("moco_v3")
DENSECL = Arm("densecl")

# The papers' numbers are top-1 in % on ImageNet by linear evaluation, where nothing else is said.
FINDINGS = [
    Finding(
        key="simclr.colour",
        claim="Crops need changes of colour beside them: otherwise colour alone gives pairs away.",
        source="SimCLR, section 3.1, figure 5",
        paper={"crop and colour": 56.3, "crop alone": 33.1},
        arms={"crop and colour": SIMCLR, "crop alone": Arm("simclr", change="without_colour")},
        compare=(("crop and colour", "crop alone"),),
    ),
    Finding(
        key="simclr.head",
        claim="A non-linear head is better than a linear one, and much better than none.",
        source="SimCLR, section 4.2, figure 8: by 3 points, by more than 10 points",
        paper={},
        arms={
            "two layers": SIMCLR,
            "linear": Arm("simclr", change="linear_head"),
            "none": Arm("simclr", change="no_head"),
        },
        compare=(("two layers", "linear"), ("two layers", "none")),
    ),
    Finding(
        key="simclr.before_the_head",
        claim="The features before the head are better than the embedding after it.",
        source="SimCLR, section 4.2: by more than 10 points",
        paper={},
        arms={"before": SIMCLR, "after": replace(SIMCLR, metric="after_head_top1")},
        compare=(("before", "after"),),
    ),
    Finding(
        key="simclr.temperature",
        claim="A low temperature is better than one of 1.",
        source="SimCLR, section 5.1, table 5 (normalised embeddings)",
        paper={"0.05": 59.7, "0.1": 64.4, "0.5": 60.7, "1.0": 58.0},
        arms={"0.2": SIMCLR} | arms("simclr", "--temperature", (0.05, 0.5, 1.0)),
        compare=(("0.2", "1.0"),),
    ),
    Finding(
        key="moco_v1.momentum",
        claim="The encoder of the keys has to change slowly.",
        source="MoCo, section 4.1, table of m (4,096 keys): without momentum the training fails",
        paper={"0.9": 55.2, "0.99": 57.8, "0.999": 59.0, "0.9999": 58.9},
        arms={"0.99": MOCO_V1} | arms("moco_v1", "--ema-momentum", (0, 0.9, 0.999)),
        compare=(("0.99", "0"), ("0.99", "0.9")),
    ),
    Finding(
        key="moco_v1.queue",
        claim="A longer queue is better.",
        source="MoCo, section 4.1, figure 3: 60.6 with 65,536 keys",
        paper={"65536": 60.6},
        arms={"512": MOCO_V1} | arms("moco_v1", "--queue-size", (64, 4096)),
        compare=(("4096", "64"),),
    ),
    Finding(
        key="moco_v1.shuffle",
        claim="Without shuffling, batch statistics give the key away, and the features are worse.",
        source="MoCo, section 3.3, figure A.1",
        paper={},
        arms={"shuffled": MOCO_V1, "not shuffled": Arm("moco_v1", change="no_shuffle")},
        compare=(("shuffled", "not shuffled"),),
    ),
    Finding(
        key="moco_v2.head",
        claim="A head of two layers improves MoCo v1.",
        source="MoCo v2, table 1",
        paper={"v1": 60.6, "two layers": 66.2},
        arms={"v1": MOCO_V1, "two layers": MLP_HEAD},
        compare=(("two layers", "v1"),),
    ),
    Finding(
        key="moco_v2.augmentation",
        claim="MoCo v2's augmentation improves MoCo v1.",
        source="MoCo v2, table 1 (with blur; images of 32 pixels are not blurred here)",
        paper={"v1": 60.6, "augmentation": 63.4},
        arms={"v1": MOCO_V1, "augmentation": V2_VIEWS},
        compare=(("augmentation", "v1"),),
    ),
    Finding(
        key="moco_v2.together",
        claim="Head, augmentation and schedule together do more than head or augmentation alone.",
        source="MoCo v2, table 1; the schedule alone is not there",
        paper={"v1": 60.6, "two layers": 66.2, "augmentation": 63.4, "v2": 67.5},
        arms={
            "v1": MOCO_V1,
            "two layers": MLP_HEAD,
            "augmentation": V2_VIEWS,
            "cosine schedule": Arm("moco_v1", change="cosine_schedule"),
            "v2": MOCO_V2,
        },
        compare=(("v2", "v1"), ("v2", "two layers"), ("v2", "augmentation")),
    ),
    Finding(
        key="byol.target",
        claim="The target has to move, but slowly.",
        source="BYOL, section 5, table 5a (300 epochs)",
        paper={"0": 0.3, "0.9": 68.4, "0.99": 72.5, "1": 18.8},
        arms={"0.95": BYOL} | arms("byol", "--ema-momentum", (0, 0.99, 1)),
        compare=(("0.95", "1"), ("0.95", "0")),
    ),
    Finding(
        key="byol.predictor",
        claim="Without the predictor, BYOL collapses.",
        source="BYOL, section 5, table 5b",
        paper={"with": 72.5, "without": 0.2},
        arms={"with": BYOL, "without": Arm("byol", change="no_predictor", seeds=ONE)},
        compare=(("with", "without"),),
    ),
    Finding(
        key="byol.colour",
        claim="BYOL needs changes of colour less than SimCLR does.",
        source="BYOL, section 5, figure 3b: 9.1 and 22.2 points lost",
        paper={"BYOL loses": 9.1, "SimCLR loses": 22.2},
        arms={
            "BYOL": BYOL,
            "BYOL, no colour": Arm("byol", change="without_colour"),
            "SimCLR": SIMCLR,
            "SimCLR, no colour": Arm("simclr", change="without_colour"),
        },
        compare=(("BYOL, no colour", "BYOL", "SimCLR, no colour", "SimCLR"),),
    ),
    Finding(
        key="simsiam.stop_gradient",
        claim="Without the stop-gradient, SimSiam collapses.",
        source="SimSiam, section 4.1, figure 2",
        paper={"with": 67.7, "without": 0.1},
        arms={"with": SIMSIAM, "without": Arm("simsiam", change="no_stop_gradient", seeds=ONE)},
        compare=(("with", "without"),),
    ),
    Finding(
        key="simsiam.predictor",
        claim="Without the predictor, SimSiam collapses.",
        source="SimSiam, section 4.2, table 1",
        paper={"with": 67.7, "without": 0.1},
        arms={"with": SIMSIAM, "without": Arm("simsiam", change="no_predictor", seeds=ONE)},
        compare=(("with", "without"),),
    ),
    Finding(
        key="simsiam.predictor_rate",
        claim="A constant learning rate of the predictor is slightly better than a decaying one.",
        source="SimSiam, section 4.2, table 1",
        paper={"constant": 68.1, "decaying": 67.7},
        arms={"constant": SIMSIAM, "decaying": Arm("simsiam", change="decayed_predictor")},
        compare=(("constant", "decaying"),),
    ),
    Finding(
        key="barlow.redundancy",
        claim="Without the redundancy term the features are worse.",
        source="Barlow Twins, section 4, table 5 (300 epochs)",
        paper={"both terms": 71.4, "invariance alone": 57.3},
        arms={
            "both terms": BARLOW,
            "invariance alone": Arm("barlow", ("--redundancy-weight", "0")),
        },
        compare=(("both terms", "invariance alone"),),
    ),
    Finding(
        key="barlow.width",
        claim="A wider projector is better, also far beyond the width of the features.",
        source="Barlow Twins, section 4, figure 4",
        paper={},
        arms={"256": BARLOW} | arms("barlow", "--projection-dim", (32, 1024)),
        compare=(("256", "32"), ("1024", "256")),
    ),
    Finding(
        key="barlow.batch",
        claim="Barlow Twins needs a large batch less than SimCLR does.",
        source="Barlow Twins, section 4, figure 2: with 256 images SimCLR loses 4 points",
        paper={},
        arms={
            "Barlow, 128": BARLOW,
            "Barlow, 32": Arm("barlow", ("--batch-size", "32")),
            "SimCLR, 256": SIMCLR,
            "SimCLR, 32": Arm("simclr", ("--batch-size", "32")),
        },
        compare=(("Barlow, 32", "Barlow, 128", "SimCLR, 32", "SimCLR, 256"),),
    ),
    Finding(
        key="swav.multicrop",
        claim="Small crops beside the two large ones improve the features.",
        source="SwAV, section 5.2, figure 3 (left): by 2 to 4 points",
        paper={},
        arms={"with": SWAV, "without": Arm("swav", ("--small-crops", "0"))},
        compare=(("with", "without"),),
    ),
    Finding(
        key="swav.equal_shares",
        claim="Without equal shares for the prototypes, the codes collapse.",
        source="SwAV, section 3.1: the constraint prevents the trivial solution",
        paper={},
        arms={"with": SWAV, "without": Arm("swav", change="no_equal_shares", seeds=ONE)},
        compare=(("with", "without"),),
    ),
    Finding(
        key="swav.prototypes",
        claim="There have to be enough prototypes.",
        source="SwAV, appendix C.1, table 12: 3,000 to 100,000 differ by at most 0.3 points",
        paper={},
        arms={"100": SWAV} | arms("swav", "--prototypes", (10, 400)),
        compare=(("100", "10"),),
    ),
    Finding(
        key="swav.queue",
        claim="A queue of past embeddings helps where the batch is small.",
        source="SwAV, section 3.1, working with small batches; no comparison is given",
        paper={},
        arms={
            "queue": Arm(
                "swav", ("--batch-size", "32", "--queue-size", "512", "--queue-start", "1")
            ),
            "no queue": Arm("swav", ("--batch-size", "32")),
        },
        compare=(("queue", "no queue"),),
    ),
    Finding(
        key="moco_v3.frozen_patches",
        claim="A frozen patch projection makes the training of a ViT more stable at a high rate.",
        source="MoCo v3, section 4.2, figure 5 (ViT-B, 100 epochs, learning rate 1.5e-4)",
        paper={"frozen": 73.4, "trained": 71.7},
        arms={
            "frozen": Arm("moco_v3", ("--lr", "0.016")),
            "trained": Arm("moco_v3", ("--lr", "0.016"), "trained_patches"),
        },
        compare=(("frozen", "trained"),),
    ),
    Finding(
        key="moco_v3.head_norm",
        claim="Batch normalisation in the heads improves the features.",
        source="MoCo v3, section 6.2 (ViT-B, 300 epochs)",
        paper={"with": 76.5, "without": 74.4},
        arms={"with": MOCO_V3, "without": Arm("moco_v3", change="heads_without_norm")},
        compare=(("with", "without"),),
    ),
    Finding(
        key="moco_v3.momentum",
        claim="A moving average of the keys' encoder is better than the encoder itself.",
        source="MoCo v3, section 6.2 (ViT-B, 300 epochs)",
        paper={"0": 74.3, "0.9": 75.6, "0.99": 76.5, "0.999": 75.0},
        arms={"0.99": MOCO_V3} | arms("moco_v3", "--ema-momentum", (0, 0.9)),
        compare=(("0.99", "0"),),
    ),
    Finding(
        key="densecl.cells",
        claim="On pictures of several objects, DenseCL's cells tell more than MoCo v2's.",
        source="DenseCL, table 1: detection on VOC, AP after 200 epochs on ImageNet",
        paper={"DenseCL": 58.7, "MoCo v2": 57.0},
        arms={"DenseCL": dense_arm("densecl"), "MoCo v2": dense_arm("moco_v2", "dense_backbone")},
        compare=(("DenseCL", "MoCo v2"),),
    ),
    Finding(
        key="densecl.weight",
        claim="The dense loss needs a good share of the whole.",
        source="DenseCL, table of lambda: detection on VOC, AP after 800 epochs on COCO",
        paper={"0.5": 56.7, "0.0": 54.7},
        arms={
            "0.5": dense_arm("densecl"),
            "0.0": dense_arm("densecl", flags=("--dense-weight", "0.0")),
        },
        compare=(("0.5", "0.0"),),
    ),
    Finding(
        key="densecl.matching",
        claim="Matching by the backbone's features is better than by the dense embeddings.",
        source="DenseCL, section 4.4, table of matching strategies (detection)",
        paper={},
        arms={"backbone": DENSECL, "embeddings": Arm("densecl", change="match_projected")},
        compare=(("backbone", "embeddings"),),
    ),
]


# -------------------------------------------------------------------------------------- the runs
def train(arm, seed, data, out):
    """One run in this process -> its line for findings_runs.jsonl."""
    torch.set_num_threads(1)
    script = importlib.import_module(arm.method)
    if arm.change:
        globals()[arm.change](script)
    load = load_composites if arm.composites else load_part
    script.load_images = lambda *_: load(data)
    flags = ["--epochs", str(EPOCHS), "--eval-every", str(EPOCHS), *arm.flags]
    args = script.parse_args(
        ["--recipe", "patterns", "--seed", str(seed), "--out", str(out), *flags]
    )
    started = time.time()
    result = script.main(args)
    last = json.loads((out / "log.jsonl").read_text().splitlines()[-1])
    line = {
        "key": arm.key(seed),
        "method": arm.method,
        "flags": list(arm.flags),
        "change": arm.change,
        "seed": seed,
        "linear_top1": result["linear_top1"],
        "knn_top1": result["knn_top1"],
        "random_linear_top1": result["random_linear_top1"],
        "loss": last["loss"],
        "std": last["std"],
        "effective_rank": last["effective_rank"],
    }
    if arm == SIMCLR:
        line["after_head_top1"] = after_head(script, args, data, out)
    if arm.composites:
        line |= judge_cells(script, args, data, out)
    line["seconds"] = round(time.time() - started, 1)
    line["torch"] = torch.__version__
    return line


def load_part(data):
    """CIFAR-10 with 20,000 training images, two of every five, and all test images."""
    whole = common.load_images(data)
    images, labels = whole.train
    kept = torch.arange(len(images)) % 5 < 2  # a folder is sorted by class
    train = (images[kept], labels[kept])
    return replace(whole, pretrain=train[0], train=train)


@dataclass
class Composites(common.Data):
    labelled: list = ()  # (pictures, classes of the four images (N, 4)), for training and for test


def load_composites(data):
    """Pictures (64 x 64) of four images each: 5,000 for training, 2,500 for test. The classes go
    from left to right and from top to bottom; the methods do not see them."""
    part = load_part(data)
    sets = []
    for images, labels in (part.train, part.test):
        order = torch.randperm(len(images), generator=common.make_generator("composites"))
        order = order[: len(order) // 4 * 4].view(-1, 4)
        four = images[order]  # (N, 4, 3, 32, 32)
        top = torch.cat([four[:, 0], four[:, 1]], dim=3)
        bottom = torch.cat([four[:, 2], four[:, 3]], dim=3)
        sets.append((torch.cat([top, bottom], dim=2), labels[order]))
    return Composites(part.name, sets[0][0], labelled=sets)


def judge_cells(script, args, data, out):
    """Top-1 of single cells of a finished run, and of the weights that it started from."""
    torch.manual_seed(args.seed)
    model = model_class(script)(args)
    before = cell_top1(model.backbone, script, args, data)
    model = model_class(script)(args)
    model.load_state_dict(harness.load_checkpoint(out / "checkpoint.pt")["model"])
    after = cell_top1(model.backbone, script, args, data)
    return {"cell_top1": after, "random_cell_top1": before}


def cell_top1(backbone, script, args, data, cells=8):
    """Top-1 of a linear classifier on single cells of the frozen map: what is at this place? It is
    fitted to `cells` random ones per training picture, and tested on all cells of the test ones."""
    view = script.build_views(args)[0]
    sets = []
    for images, labels in load_composites(data).labelled:
        h = map_of(backbone, view, images)  # (N, S, D)
        side = round(h.shape[1] ** 0.5)
        half = torch.arange(side) * 2 // side  # 0 or 1: the first or the second image
        quarter = 2 * half.unsqueeze(1) + half  # (side, side): which of the four
        sets.append((h, labels[:, quarter.flatten()]))
    h, labels = sets[0]
    order = torch.rand(labels.shape, generator=common.make_generator("cells"))
    picked = order.argsort(1)[:, :cells]
    rows = torch.arange(len(h)).unsqueeze(1)
    h_test, labels_test = sets[1]
    found = common.linear_probe(
        h[rows, picked].flatten(0, 1),
        labels[rows, picked].flatten(),
        h_test.flatten(0, 1),
        labels_test.flatten(),
        10,
    )
    return found["top1"]


@torch.no_grad()
def map_of(backbone, view, images):
    """The last feature map of a ResNet of common.resnet, cell by cell: (N, S, D)."""
    backbone.eval()
    backbone.avgpool = nn.Identity()  # torchvision flattens what follows: (B, D * S)
    h = [backbone(view.plain(part)) for part in images.split(250)]
    return torch.cat(h).unflatten(1, (backbone.dim, -1)).mT


def after_head(script, args, data, out):
    """Linear top-1 of the embedding, after the head, of a finished run of simclr.py."""
    model = script.SimCLR(args)
    model.load_state_dict(harness.load_checkpoint(out / "checkpoint.pt")["model"])
    network = nn.Sequential(model.backbone, model.projector)
    view = script.build_views(args)[0]
    return common.linear_eval(network, load_part(data), view, "cpu")["linear_top1"]


def read_runs():
    if not RUNS.exists():
        return {}
    lines = [json.loads(line) for line in RUNS.read_text().splitlines()]
    return {line["key"]: line for line in lines}


def missing(findings):
    """{key: (arm, seed)} of the runs that these findings need and that are not recorded."""
    done = read_runs()
    found = {}
    for finding in findings:
        for arm in finding.arms.values():
            for seed in arm.seeds:
                if arm.key(seed) not in done:
                    found[arm.key(seed)] = (arm, seed)
    return found


def run_all(findings, data, folder, jobs):
    """Each run in a process of its own, `jobs` at a time; a line is written as a run ends."""
    lock = Lock()

    wanted = missing(findings)

    def run(key):
        arm, _ = wanted[key]
        out = folder / key.replace(" ", "_").replace("/", "_")
        command = [sys.executable, "-m", "results.findings", "--data", data, "--one", key]
        command += ["--runs", str(folder)]
        ended = subprocess.run(command, cwd=FOLDER.parent, capture_output=True, text=True)
        if ended.returncode != 0:
            return print(f"{key}: failed, see {out}: {ended.stderr[-500:]}", flush=True)
        line = json.loads((out / "finding.json").read_text())
        with lock:
            runs = read_runs() | {key: line}
            text = "".join(json.dumps(runs[name]) + "\n" for name in sorted(runs))
            harness.save(RUNS, text)
            print(f"{key}: {line[arm.metric]:.1f}", flush=True)

    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(run, wanted))


def run_one(key, data, folder):
    known = {}
    for finding in FINDINGS:
        for arm in finding.arms.values():
            known |= {arm.key(seed): (arm, seed) for seed in arm.seeds}
    arm, seed = known[key]
    out = folder / key.replace(" ", "_").replace("/", "_")
    harness.save(out / "finding.json", json.dumps(train(arm, seed, data, out)))


# ----------------------------------------------------------------------------------- the verdicts
def summary(arm, runs, spread):
    """Mean, standard deviation and standard error of an arm; None if a run is missing. An arm of
    one seed is given the typical spread between seeds."""
    lines = [runs.get(arm.key(seed)) for seed in arm.seeds]
    if None in lines:
        return None
    values = [line[arm.metric] for line in lines]
    std = statistics.stdev(values) if len(values) > 1 else spread
    knn_mean = None
    random_mean = None
    if not arm.composites:
        knn_mean = statistics.mean(line["knn_top1"] for line in lines)
    if f"random_{arm.metric}" in lines[0]:
        random_mean = statistics.mean(line[f"random_{arm.metric}"] for line in lines)
    return {
        "mean": statistics.mean(values),
        "std": std if len(values) > 1 else None,
        "error": std / len(values) ** 0.5,
        "knn_mean": knn_mean,
        "random_mean": random_mean,
        "embedding_std": statistics.mean(line["std"] for line in lines),
        "seeds": list(arm.seeds),
    }


def typical_spread(runs):
    """The median of the standard deviations of all arms with several seeds."""
    spreads = []
    for finding in FINDINGS:
        for arm in finding.arms.values():
            keys = [arm.key(seed) for seed in arm.seeds]
            values = [runs[key][arm.metric] for key in keys if key in runs]
            if len(values) > 1:
                spreads.append(statistics.stdev(values))
    return statistics.median(spreads) if spreads else 0.0


def judge(compare, found):
    """The gap of each comparison of a finding, its standard error and the verdict on it; found:
    {name: summary}."""
    judged = []
    for names in compare:
        line = {"arms": list(names), "gap": None, "error": None, "verdict": "not measured"}
        judged.append(line)
        if any(found[name] is None for name in names):
            continue
        signs = (1, -1) if len(names) == 2 else (1, -1, -1, 1)
        line["gap"] = sum(sign * found[name]["mean"] for sign, name in zip(signs, names))
        line["error"] = sum(found[name]["error"] ** 2 for name in names) ** 0.5
        if abs(line["gap"]) <= 2 * line["error"]:
            line["verdict"] = "too close to tell"
        else:
            line["verdict"] = "holds" if line["gap"] > 0 else "does not hold here"
    return judged


def verdict(judged):
    """That of a finding: the worst of its comparisons."""
    verdicts = [line["verdict"] for line in judged]
    for kind in ("not measured", "does not hold here", "too close to tell"):
        if kind in verdicts:
            return kind
    return "holds"


def make_table():
    """The content of findings.json."""
    runs = read_runs()
    spread = typical_spread(runs)
    table = []
    for finding in FINDINGS:
        found = {name: summary(arm, runs, spread) for name, arm in finding.arms.items()}
        judged = judge(finding.compare, found)
        entry = {
            "key": finding.key,
            "claim": finding.claim,
            "source": finding.source,
            "paper": finding.paper,
            "command": f"python -m results.findings {finding.key} --data FOLDER",
            "arms": {},
            "compare": judged,
            "verdict": verdict(judged),
        }
        for name, arm in finding.arms.items():
            how = {"method": arm.method, "flags": list(arm.flags), "change": arm.change}
            entry["arms"][name] = how | {"metric": arm.metric, "found": found[name]}
        table.append(entry)
    return table


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.error = common.fail
    parser.add_argument("findings", nargs="*", metavar="FINDING", help="default: all")
    parser.add_argument("--data", help="CIFAR-10: a folder, or cifar10")
    parser.add_argument(
        "--runs", type=Path, default=Path("runs/findings"), help="folder of the runs"
    )
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, of one thread each")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.one:
        return run_one(args.one, args.data, args.runs.resolve())
    known = {finding.key: finding for finding in FINDINGS}
    for key in args.findings:
        if key not in known:
            common.fail(f"{key}: not one of {', '.join(known)}")
    if args.data:
        chosen = [known[key] for key in args.findings or known]
        run_all(chosen, args.data, args.runs.resolve(), args.jobs)
    harness.save(TABLE, json.dumps(make_table(), indent=1) + "\n")
    for entry in make_table():
        print(f"{entry['key']}: {entry['verdict']}")


if __name__ == "__main__":
    main()
