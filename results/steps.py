"""Where the milliseconds of a training step go, for each method: results/steps.json and .png.

    python results/steps.py [METHOD ...] [--batch-size 64] [--steps 5]
    python results/tables.py                                   # puts the table into README.md

The step is that of the cifar10 recipe (ResNet-18, 32 pixels), on the device at hand; a CPU gets a
smaller batch, or it would take minutes. Flags it does not know go to the scripts. The device is
waited for before and after each part, so that the parts add up; on a GPU a training, which does
not wait, is a little faster. The methods take turns, a step each, so that a disturbance meets all
of them; what counts is the median."""

import argparse
import importlib
import json
import statistics
import sys
import time
from collections import defaultdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from cifar10 import METHODS, bf16_peak, tera_operations
from matplotlib.figure import Figure

import common

ROOT = Path(__file__).resolve().parent.parent
PARTS = ("views", "forward", "loss", "EMA, queue", "backward", "optimizer")
WITHIN = {  # functions of the scripts that are no part of the networks' forward, nor the optimizer
    "loss": ("nt_xent", "info_nce", "dense_info_nce", "match", "contrastive_loss", "barlow_loss",
             "regression_loss", "negative_cosine", "swapped_prediction", "sinkhorn"),
    "EMA, queue": ("ema_update", "enqueue", "shuffle", "unshuffle"),
}


class Clock:
    """Adds up the time in each part; what is measured within another part is taken off that one."""

    def __init__(self, device):
        self.device, self.spent, self.open = device, defaultdict(float), []

    def __call__(self, part, function):
        def timed(*arguments, **settings):
            self.open.append(0.0)
            start = self.now()
            try:
                return function(*arguments, **settings)
            finally:
                whole, inner = self.now() - start, self.open.pop()
                self.spent[part] += whole - inner
                if self.open:
                    self.open[-1] += whole

        return timed

    def now(self):
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()


def profile(method, images, batch_size, device, flags=()):
    """Yields a line for each step of one method: the milliseconds of its parts."""
    script = importlib.import_module(method)
    args = script.parse_args(["--recipe", "cifar10", "--batch-size", str(batch_size), *flags])
    found, clock = [], Clock(device)

    def captured(args, augments):  # in place of train: what main hands it
        found.extend(augments)

    plain = {name: getattr(script, name) for names in WITHIN.values() for name in names
             if hasattr(script, name)}
    train, script.train = script.train, captured
    try:
        script.main(args)
        for part, names in WITHIN.items():
            for name in plain.keys() & set(names):
                setattr(script, name, clock(part, plain[name]))
        torch.manual_seed(0)
        views = common.Views(images, found, batch_size, device)
        model = script.build_model(args, len(images), device)
        optimizer, batches = script.build_optimizer(args, model), iter(views)
        tera = tera_operations(script, args)
        name = torch.cuda.get_device_name() if device.type == "cuda" else device.type
        while True:
            clock.spent.clear()
            batch = clock("views", next)(batches)
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                loss = clock("forward", model)(*batch)
            optimizer.zero_grad()
            clock("backward", loss.backward)()
            clock("optimizer", script.update)(args, model, optimizer, args.epochs / 2)
            yield {"method": method, "arch": args.arch, "batch_size": batch_size, "tera": tera,
                   "milliseconds": {part: 1000 * clock.spent[part] for part in PARTS},
                   "device": name, "torch": torch.__version__}
    finally:
        script.train = train
        for name, function in plain.items():
            setattr(script, name, function)


def summary(rows):
    """The median line of a method's steps, without the first two, which warm up."""
    line = dict(rows[0])
    line["milliseconds"] = {
        part: statistics.median(row["milliseconds"][part] for row in rows[2:]) for part in PARTS}
    line["images_per_second"] = 1000 * line["batch_size"] / sum(line["milliseconds"].values())
    line["tflops"] = line.pop("tera") * line["images_per_second"]
    peak = bf16_peak(line["device"])
    return line | {"share": line["tflops"] / peak if peak else None}


def measure(methods, images, batch_size, device, steps, flags=()):
    """A line for each method, with the median milliseconds of the parts of its step."""
    turns = [profile(method, images, batch_size, device, flags) for method in methods]
    rounds = [[next(turn) for turn in turns] for _ in range(steps + 2)]
    for turn in turns:
        turn.close()
    return [summary(rows) for rows in zip(*rounds)]


def stack_bars(axis, lines):
    left, names = [0.0] * len(lines), [line["method"] for line in lines]
    for part in PARTS:
        widths = [line["milliseconds"][part] for line in lines]
        axis.barh(names, widths, left=left, label=part)
        left = [a + b for a, b in zip(left, widths)]
    axis.invert_yaxis()
    axis.set(xlabel="milliseconds a step")


def draw(lines, path):
    figure = Figure(figsize=(9, 4.5), layout="constrained")
    axis = figure.subplots()
    stack_bars(axis, lines)
    axis.set(title=f"A step of {lines[0]['batch_size']} CIFAR-10 "
             f"images, {lines[0]['arch']}, on {lines[0]['device']}")
    axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=len(PARTS), frameon=False)
    figure.savefig(path, dpi=90)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = common.fail
    parser.add_argument("methods", nargs="*", metavar="METHOD", help="default: all")
    parser.add_argument("--batch-size", type=int, default=512 if torch.cuda.is_available() else 64)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--out", type=Path, default=ROOT / "results", help="folder")
    args, flags = parser.parse_known_args(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")
    images = torch.randint(0, 256, ((args.steps + 2) * args.batch_size, 3, 32, 32), device=device,
                           dtype=torch.uint8)
    if len(images) < 4096:  # a queue is never longer than the data
        images = images.repeat(4096 // len(images) + 1, 1, 1, 1)
    methods = args.methods or METHODS
    for method in methods:
        if method not in METHODS:
            common.fail(f"{method}: not one of {', '.join(METHODS)}")
    lines = measure(methods, images, args.batch_size, device, args.steps, flags)
    for line in lines:
        shown = {part: round(ms, 1) for part, ms in line["milliseconds"].items()}
        print(f"{line['method']}: {shown}, {line['images_per_second']:.0f} images/s")
    common.save(args.out / "steps.json", json.dumps(lines, indent=1) + "\n")
    draw(lines, args.out / "steps.png")


if __name__ == "__main__":
    main()
