"""Where the milliseconds of a training step go, for each method: results/steps.json and steps.png.

    python -m results.steps [METHOD ...] [--batch-size 64] [--rounds 3] [--steps 2]
    python -m results.tables                                   # makes the table

What is timed is the script's own `train` with the cifar10 recipe (ResNet-18, 32 pixels), on the
device at hand; a CPU gets a smaller batch, or it would take minutes. Unknown flags go to the
scripts; write them --name=value. The device is waited for before and after each part, so that the
parts add up; on a GPU, training itself does not wait and is a little faster. The methods take
turns: in each round, each makes one step to warm up and then --steps more, of which the median over
all rounds counts."""

import argparse
import dis
import importlib
import inspect
import json
import statistics
import time
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path
from unittest import mock

import torch
from matplotlib.figure import Figure

import common
import harness
from results.cifar10 import bf16_peak, tera_operations
from results.methods import ROOT, choose, model_class

PARTS = ("views", "forward", "loss", "EMA, queue", "backward", "optimizer")
UPKEEP = ("ema_update", "enqueue", "shuffle", "unshuffle")  # functions of "EMA, queue"


class Clock:
    """Adds up the seconds of each part. A part measured within another one is taken off it."""

    def __init__(self):
        self.spent = dict.fromkeys(PARTS, 0.0)
        self.inner = [0.0]  # per open part: seconds that belong to parts within it

    def timed(self, part, function):
        """The function, so wrapped that its time counts as this part's."""

        def wrapped(*arguments, **settings):
            self.inner.append(0.0)
            start = now()
            result = function(*arguments, **settings)
            seconds = now() - start
            self.spent[part] += seconds - self.inner.pop()
            self.inner[-1] += seconds
            return result

        return wrapped


def now():
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
    return time.perf_counter()


class Enough(Exception):
    """Raised to end a training."""


class ShortRun:
    """In place of harness.Run: writes nothing, notes what each step took, ends after `steps`."""

    is_new = False  # no evaluation of the random weights

    def __init__(self, clock, found, steps, args, model, optimizer, views):
        self.clock = clock
        self.found = found  # milliseconds of each part, per step
        self.steps = steps
        model.forward = clock.timed("forward", model.forward)
        optimizer.zero_grad = clock.timed("optimizer", optimizer.zero_grad)
        optimizer.step = clock.timed("optimizer", optimizer.step)

    def epochs(self):
        yield 1

    def after_step(self, loss):
        self.found.append({part: 1000 * self.clock.spent[part] for part in PARTS})
        self.clock.spent = dict.fromkeys(PARTS, 0.0)
        if len(self.found) == self.steps:
            raise Enough


def time_steps(script, args, images, steps):
    """Milliseconds of each part of so many steps of the script's train, after one that warms up."""
    clock = Clock()
    found = []

    def load_images(name, root, device):
        return common.Data("images", images.to(device))

    make_views = common.Views.__iter__

    def iterate(views):
        batches = make_views(views)
        next_batch = clock.timed("views", next)
        batch = next_batch(batches, None)
        while batch is not None:
            yield batch
            batch = next_batch(batches, None)

    replaced = {"load_images": load_images}
    for name in losses(script):
        replaced[name] = clock.timed("loss", vars(script)[name])
    for name in UPKEEP:
        if name in vars(script):
            replaced[name] = clock.timed("EMA, queue", vars(script)[name])
    backward = clock.timed("backward", torch.Tensor.backward)
    short_run = partial(ShortRun, clock, found, steps + 1)
    with ExitStack() as stack:
        stack.enter_context(mock.patch.dict(vars(script), replaced))
        stack.enter_context(mock.patch.object(common.Views, "__iter__", iterate))
        stack.enter_context(mock.patch.object(torch.Tensor, "backward", backward))
        stack.enter_context(mock.patch.object(harness, "Run", short_run))
        stack.enter_context(suppress(Enough))
        script.train(args)
    return found[1:]


def losses(script):
    """Names of the script's functions that its model calls in `forward` and are not upkeep."""
    names = set()
    for method in vars(model_class(script)).values():
        if inspect.isfunction(method) and method.__name__ != "__init__":
            for instruction in dis.get_instructions(inspect.unwrap(method)):
                if instruction.opname == "LOAD_GLOBAL":
                    names.add(instruction.argval)
    found = []
    for name in names.difference(UPKEEP):
        function = vars(script).get(name)
        if inspect.isfunction(function) and function.__module__ == script.__name__:
            found.append(name)
    return sorted(found)


def measure(methods, images, batch_size, flags=(), rounds=3, steps=2):
    """A line per method, with the median milliseconds of the parts of its step."""
    settings = {}
    found = {}
    for method in methods:
        words = ["--recipe", "cifar10", "--batch-size", str(batch_size), *flags]
        settings[method] = importlib.import_module(method).parse_args(words)
        found[method] = []
    for _ in range(rounds):
        for method in methods:
            script = importlib.import_module(method)
            found[method] += time_steps(script, settings[method], images, steps)
    return [summary(settings[method], found[method]) for method in methods]


def summary(args, found):
    milliseconds = {}
    for part in PARTS:
        milliseconds[part] = statistics.median(step[part] for step in found)
    speed = 1000 * args.batch_size / sum(milliseconds.values())
    tflops = speed * tera_operations(importlib.import_module(args.method), args)
    device = device_name()
    peak = bf16_peak(device)
    return {
        "method": args.method,
        "arch": args.arch,
        "batch_size": args.batch_size,
        "milliseconds": milliseconds,
        "device": device,
        "torch": torch.__version__,
        "images_per_second": speed,
        "tflops": tflops,
        "share": tflops / peak if peak else None,
    }


def device_name():
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return "mps" if torch.backends.mps.is_available() else "cpu"


def stack_bars(axis, lines):
    names = [line["method"] for line in lines]
    left = [0.0] * len(lines)
    for part in PARTS:
        widths = [line["milliseconds"][part] for line in lines]
        axis.barh(names, widths, left=left, label=part)
        left = [start + width for start, width in zip(left, widths)]
    axis.invert_yaxis()
    axis.set(xlabel="milliseconds per step")


def draw(lines, path):
    figure = Figure(figsize=(9, 4.5), layout="constrained")
    axis = figure.subplots()
    stack_bars(axis, lines)
    first = lines[0]
    axis.set_title(
        f"A step of {first['batch_size']} CIFAR-10 images, {first['arch']}, on {first['device']}"
    )
    axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=len(PARTS), frameon=False)
    figure.savefig(path, dpi=90)


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.error = common.fail
    parser.add_argument("methods", nargs="*", metavar="METHOD", help="default: all")
    parser.add_argument("--batch-size", type=int, default=512 if torch.cuda.is_available() else 64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--out", type=Path, default=ROOT / "results", help="folder")
    args, flags = parser.parse_known_args(argv)
    if "--compile" in flags:
        common.fail("--compile: the parts of a compiled step cannot be told apart")
    count = max(8192, args.batch_size * (args.steps + 1))  # no queue is longer
    images = torch.randint(0, 256, (count, 3, 32, 32), dtype=torch.uint8)
    methods = choose(args.methods)
    lines = measure(methods, images, args.batch_size, flags, args.rounds, args.steps)
    for line in lines:
        shown = {part: round(value, 1) for part, value in line["milliseconds"].items()}
        print(f"{line['method']}: {shown}, {line['images_per_second']:.0f} images/s")
    harness.save(args.out / "steps.json", json.dumps(lines, indent=1) + "\n")
    draw(lines, args.out / "steps.png")


if __name__ == "__main__":
    main()
