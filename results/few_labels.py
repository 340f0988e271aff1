"""What features learnt without labels are worth where few images have one.

    python -m results.few_labels --data FOLDER --backbones RUNS
    python -m results.few_labels simclr --data FOLDER --backbones RUNS --labels 3 10

RUNS holds METHOD/backbone.pt for each method, trained on FOLDER's images (or the data set that
--data names) by that script. From 1, 3, 10 and 100 labels per class, and from all, it measures on
all test images

linear        a linear classifier on the frozen features
fine-tuned    the whole network trained on from there
and the same from random weights, where "fine-tuned" is a supervised network from scratch: it has
the same augmentation (SimCLR's), optimizer and number of steps.

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
import harness
import simclr
from results.methods import METHODS, choose

LINES = Path(__file__).resolve().parent / "few_labels.jsonl"
RANDOM = "random weights"
LABELS = (1, 3, 10, 100, 0)  # per class; 0: all
SEEDS = (0, 1, 2)
STEPS = 1000
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


def build_backbone(start, folder):
    """The network of a method's default recipe, with the weights of its run or with random ones."""
    torch.manual_seed(0)
    backbone = common.resnet("thin", 32)
    if start != RANDOM:
        weights = harness.load_checkpoint(folder / start / "backbone.pt")
        try:
            backbone.load_state_dict(weights)
        except RuntimeError:
            common.fail(f"{folder / start / 'backbone.pt'}: not the weights of a thin ResNet")
    return backbone


def measure(start, per_class, seed, data, folder):
    """{how: top-1 in percent of the test images}."""
    backbone = build_backbone(start, folder)
    view = simclr.build_views(simclr.parse_args(["--recipe", "patterns"]))[0]
    images, labels = data.train
    rows = draw_labelled(labels, per_class, seed)
    images = images[rows]
    labels = labels[rows]
    test_images, test_labels = data.test
    classes = len(data.classes)
    h = common.features(backbone, images, view, "cpu")
    h_test = common.features(backbone, test_images, view, "cpu")
    linear = common.linear_probe(h, labels, h_test, test_labels, classes)["top1"]
    network = fine_tune(backbone, view, images, labels, classes, seed, STEPS)
    return {"linear": linear, "fine-tuned": top1(network, view, test_images, test_labels)}


def read_lines():
    if not LINES.exists():
        return []
    return [json.loads(line) for line in LINES.read_text().splitlines()]


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.error = common.fail
    parser.add_argument("methods", nargs="*", metavar="METHOD", help="default: all of a ResNet")
    parser.add_argument("--data", required=True, help="CIFAR-10: a folder, or cifar10")
    parser.add_argument("--backbones", type=Path, required=True, help="folder of the runs")
    parser.add_argument("--labels", type=int, nargs="+", default=LABELS, help="per class; 0: all")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    starts = args.methods
    if not starts:
        starts = [name for name in METHODS if (args.backbones / name / "backbone.pt").exists()]
        starts = [name for name in starts if name != "moco_v3"]  # whose network is another
    choose(starts)
    data = common.load_images(args.data)
    for per_class in args.labels:
        for start in [*starts, RANDOM]:
            for seed in SEEDS:
                key = {"start": start, "labels": per_class, "seed": seed}
                done = [line for line in read_lines() if key.items() <= line.items()]
                if done:
                    continue
                found = measure(start, per_class, seed, data, args.backbones)
                with open(LINES, "a") as file:
                    file.write(json.dumps(key | found) + "\n")
                print(f"{start}, {per_class or 'all'} labels per class, seed {seed}: {found}")


if __name__ == "__main__":
    main()
