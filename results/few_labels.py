"""What features learnt without labels are worth where few images have one.

    python -m results.few_labels runs/*/checkpoint.pt --data FOLDER
    python -m results.few_labels runs/moco_v2/checkpoint.pt --data FOLDER --fine-tune
    python -m results.few_labels --data FOLDER --labels 0 --fine-tune --steps 10000   # supervised

From 1, 3, 10 and 100 labels per class it measures, on all test images, a linear classifier on the
frozen features of each checkpoint and of random weights. With --fine-tune also the whole network,
trained on from there; from random weights, that is a supervised network from scratch. It has the
same augmentation (SimCLR's), optimizer and number of steps.

Three seeds draw which images are labelled. A line is added to results/few_labels.jsonl as a figure
is known; what has its line already is skipped."""

import argparse
import copy
import json
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

import common
import evaluate
import harness
import simclr

LINES = Path(__file__).resolve().parent / "few_labels.jsonl"
RANDOM = "random weights"
SEEDS = (0, 1, 2)
BATCH = 128
RATE = 0.05


def draw_labelled(labels, per_class, seed):
    """The rows of `per_class` images of each class, or of all if it is 0."""
    order = torch.randperm(len(labels), generator=common.make_generator("few labels", seed))
    if per_class == 0:
        return order
    rows = []
    for label in labels.unique():
        of_class = order[labels[order] == label]
        if len(of_class) < per_class:
            common.fail(f"--labels {per_class}: a class has only {len(of_class)} training images")
        rows.append(of_class[:per_class])
    return torch.cat(rows)


def fine_tune(backbone, view, images, labels, classes, seed, steps):
    """A copy of the backbone with a linear classifier, both trained on these images."""
    torch.manual_seed(seed)
    network = nn.Sequential(copy.deepcopy(backbone), nn.Linear(backbone.dim, classes))
    network.train()
    optimizer = torch.optim.SGD(network.parameters(), lr=RATE, momentum=0.9, weight_decay=5e-4)
    generator = common.make_generator("fine-tune", seed)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = RATE * 0.5 * (1 + math.cos(math.pi * step / steps))
        rows = torch.randint(len(images), (BATCH,), generator=generator)
        x = view(images[rows], generator)
        loss = F.cross_entropy(network(x), labels[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return network


@torch.no_grad()
def top1(network, view, images, labels):
    network.eval()
    scores = [network(view.plain(part)) for part in images.split(250)]
    return common.accuracy(torch.cat(scores), labels)["top1"]


def linear(backbone, view, images, labels, data):
    """Top-1 of a linear classifier on frozen features of these images."""
    h = common.features(backbone, images, view, "cpu")
    h_test = common.features(backbone, data.test[0], view, "cpu")
    return common.linear_probe(h, labels, h_test, data.test[1], len(data.classes))["top1"]


def load(checkpoint):
    """(what its lines are called, backbone) of a checkpoint; of random weights if it is None."""
    if checkpoint is None:
        torch.manual_seed(0)
        return {"method": RANDOM, "epochs": 0}, common.resnet("thin", 32)
    backbone, _, _ = evaluate.load_backbone(checkpoint)
    content = harness.load_checkpoint(checkpoint)
    args = content.get("args", {})
    if not {"method", "epochs"} <= args.keys():
        common.fail(f"{checkpoint}: not a checkpoint of one of the scripts here")
    done = len(content["log"]) - 1
    if done < args["epochs"]:
        common.fail(f"{checkpoint}: {done} of {args['epochs']} epochs; let the run finish first")
    return {"method": args["method"], "epochs": args["epochs"]}, backbone


def measure(backbone, per_class, seed, data, steps):
    """Top-1 in percent of the test images: of a linear classifier, or, with steps, fine-tuned."""
    view = simclr.build_views(simclr.parse_args(["--recipe", "patterns"]))[0]
    images, labels = data.train
    rows = draw_labelled(labels, per_class, seed)
    if steps == 0:
        return linear(backbone, view, images[rows], labels[rows], data)
    classes = len(data.classes)
    network = fine_tune(backbone, view, images[rows], labels[rows], classes, seed, steps)
    return top1(network, view, *data.test)


def is_recorded(key):
    if not LINES.exists():
        return False
    lines = LINES.read_text().splitlines()
    return any(key.items() <= json.loads(line).items() for line in lines)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.error = common.fail
    parser.add_argument("checkpoints", nargs="*", metavar="CHECKPOINT", help="of the scripts here")
    parser.add_argument("--data", required=True, help="a data set, or a folder with train and test")
    parser.add_argument("--labels", type=int, nargs="+", default=(1, 3, 10, 100), help="0: all")
    parser.add_argument("--fine-tune", action="store_true", help="train the whole network as well")
    parser.add_argument(
        "--steps", type=int, default=600, help=f"of fine-tuning; {BATCH} images each"
    )
    args = parser.parse_args(argv)
    if args.steps < 1 or min(args.labels) < 0:
        common.fail("--steps is at least 1, --labels at least 0")
    torch.set_num_threads(1)
    data = common.load_images(args.data)
    if not data.train or not data.test or not torch.is_tensor(data.pretrain):
        common.fail(
            f"--data {args.data}: no labelled images of one small size, to train and to test"
        )
    for checkpoint in [*args.checkpoints, None]:
        called, backbone = load(checkpoint)
        for steps in (0, args.steps) if args.fine_tune else (0,):
            for per_class in args.labels:
                for seed in SEEDS:
                    key = {"data": data.name, **called, "labels": per_class}
                    key |= {"seed": seed, "steps": steps}
                    if is_recorded(key):
                        continue
                    found = {"top1": measure(backbone, per_class, seed, data, steps)}
                    with open(LINES, "a") as file:
                        file.write(json.dumps(key | found) + "\n")
                    print(json.dumps(key | found), flush=True)


if __name__ == "__main__":
    main()
