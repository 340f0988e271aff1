"""Trains methods on CIFAR-10 in turn and records what each reached and what it cost.

    python -m results.cifar10                                  # all of them, with seed 0
    python -m results.cifar10 simclr byol --seeds 0 1 2 --data cifar10-jpeg --epochs=500 --compile
    python -m results.tables                                   # makes the table

Unknown flags go to the scripts; write them --name=value. Each run adds a line to
results/cifar10.jsonl:

settings               every flag of the run
knn200_top1, knn10_top1, linear_top1    in percent, of the last epoch and a single view; kNN by
                       cosine with temperature .1, as everywhere here
minutes, images_per_second              of training alone, without start and evaluation
tflops, share          operations per second that forward and backward passes of its networks need,
                       in 10^12, and their share of the card's bf16 peak (null if not known)
memory_gib             peak use of the card's memory (null on a CPU)

An interrupted run continues; one that has its line already is skipped."""

import argparse
import copy
import importlib
import json
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

import common
import evaluate
import harness
from results.methods import ROOT, choose, model_class, views_of

BF16 = {  # 10^12 operations per second, dense, from the makers' data sheets
    "H200": 989,
    "H100": 989,
    "A100": 312,
    "L40S": 362,
    "A6000": 155,
    "4090": 165,
    "L4": 121,
    "A10": 125,
}
SHOWN = ("knn200_top1", "knn10_top1", "linear_top1", "minutes", "images_per_second", "tflops")


def tera_operations(script, args, n=16):
    """10^12 operations of the forward and backward passes of one image; a multiplication and an
    addition are two. Counted on a batch of n, so that a loss over pairs of images hardly counts."""
    args = copy.copy(args)
    args.batch_size = n
    model = model_class(script)(args)
    with FlopCounterMode(display=False) as counter:
        loss, _ = model(*views_of(args, n))
        loss.backward()
    return counter.get_total_flops() / n / 1e12


def bf16_peak(device):
    """10^12 operations per second of a card with this name; None if not known."""
    for name, peak in BF16.items():
        if name in device:
            return peak
    return None


def measure(out):
    """The line of the finished run in the folder `out`."""
    result = json.loads((out / "result.json").read_text())
    settings = harness.load_checkpoint(out / "checkpoint.pt")["args"]
    script = importlib.import_module(result["method"])
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    backbone, view, _ = evaluate.load_backbone(out / "checkpoint.pt")
    data = common.load_images(settings["data"], settings["root"], device)
    metrics = common.linear_eval(
        backbone.to(device), data, view, device, settings["workers"], classifier=False, k=10
    )
    speed = result["images_per_second"]
    tflops = tera_operations(script, Namespace(**settings)) * speed
    peak = bf16_peak(result["device"])
    names = ("method", "data", "arch", "seed", "epochs", "batch_size")
    return {name: result[name] for name in names} | {
        "knn200_top1": result["knn_top1"],
        "knn10_top1": metrics["knn_top1"],
        "linear_top1": result["linear_top1"],
        "random_linear_top1": result["random_linear_top1"],
        "minutes": result["seconds"] / 60,
        "images_per_second": speed,
        "tflops": tflops,
        "share": tflops / peak if peak else None,
        "memory_gib": result["memory_gib"],
        "device": result["device"],
        "torch": result["torch"],
        "settings": settings,
    }


def train(method, seed, data, out, flags):
    command = [sys.executable, ROOT / f"{method}.py", "--recipe", "cifar10", "--data", data]
    command += ["--seed", str(seed), "--out", out, *flags]
    status = subprocess.run(command).returncode
    if status != 0:
        raise SystemExit(status)


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.error = common.fail
    parser.add_argument("methods", nargs="*", metavar="METHOD", help="default: all")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--data", default="cifar10", help="cifar10, or a folder of its images")
    parser.add_argument("--runs", type=Path, default=Path("runs/cifar10"), help="folder for runs")
    parser.add_argument("--lines", type=Path, default=ROOT / "results" / "cifar10.jsonl")
    known, flags = parser.parse_known_args(argv)
    methods = choose(known.methods)
    for seed in known.seeds:
        for method in methods:
            parts = [method, Path(known.data).name, str(seed), *flags]
            name = "-".join(parts).replace("/", "_")
            out = (known.runs / name).resolve()
            lines = known.lines.read_text().splitlines() if known.lines.exists() else []
            if any(json.loads(line)["settings"]["out"] == str(out) for line in lines):
                print(f"{name}: has its line already")
                continue
            if not (out / "result.json").exists():
                train(method, seed, known.data, out, flags)
            line = measure(out)
            lines.append(json.dumps(line))
            harness.save(known.lines, "\n".join(lines) + "\n")
            print(f"{name}: " + ", ".join(f"{key} {line[key]:.4g}" for key in SHOWN))


if __name__ == "__main__":
    main()
