"""Trains methods on CIFAR-10 in turn and writes down what each reached and what it cost.

    python results/cifar10.py                                  # all nine with seed 0
    python results/cifar10.py simclr byol --seeds 0 1 2 --data cifar10-jpeg --epochs 500 --compile
    python results/tables.py                                   # puts the table into README.md

Flags it does not know go to the scripts. Each run adds a line to results/cifar10.jsonl:

settings               every flag of the run
knn200_top1, knn10_top1, linear_top1    in percent, of the last epoch and a single view; the kNN by
                       cosine with temperature .1, as everywhere here
minutes, images_per_second              of training alone: without start and evaluation
tflops, share          the operations of forward and backward that its networks need, a second, in
                       10^12, and their share of what the card can do in bf16 (null if not known)
memory_gib             largest use of the card (null on a CPU)

A run that was interrupted goes on; one that has its line already is left out."""

import argparse
import importlib
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch.utils.flop_counter import FlopCounterMode

import common

ROOT = Path(__file__).resolve().parent.parent
METHODS = "simclr moco_v1 moco_v2 densecl byol simsiam moco_v3 barlow swav".split()
BF16 = {"H200": 989, "H100": 989, "A100": 312, "L40S": 362, "A6000": 155, "4090": 165, "L4": 121,
        "A10": 125}  # 10^12 operations a second, dense, from the makers' data sheets


def views_of(args, n, device="cpu"):
    """n images in as many views, of the sizes, that these settings give a method."""
    known = vars(args)
    sides = [args.size] * 2 + [known.get("small_size")] * known.get("small_crops", 0)
    return [torch.randn(n, 3, side, side, device=device).contiguous(
        memory_format=torch.channels_last) for side in sides]


def tera_operations(script, args, n=16):
    """10^12 operations of one image's forward and backward, a multiplication and an addition being
    two; counted on a batch of n, so that a loss over pairs of images counts for next to nothing."""
    args = replace(args, batch_size=n)
    model = script.build_model(args, 10**9, torch.device("cpu"))
    with FlopCounterMode(display=False) as counter:
        model(*views_of(args, n)).backward()
    return counter.get_total_flops() / n / 1e12


def bf16_peak(device):
    """10^12 operations a second of a card of this name, or None."""
    return next((peak for name, peak in BF16.items() if name in device), None)


def measure(method, data, out):
    """The line of a finished run in the folder `out`."""
    script, result = importlib.import_module(method), json.loads((out / "result.json").read_text())
    settings = common.load_checkpoint(out / "checkpoint.pt")["args"]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    backbone, augment, _ = common.load_backbone(out / "checkpoint.pt")
    images = common.load(data, settings["root"], device)
    h, h_test = (common.features(backbone.to(device), part[0], augment, device)
                 for part in (images.train, images.test))
    speed = result["images_per_second"]
    tera, peak = tera_operations(script, script.Args(**settings)), bf16_peak(result["device"])
    return {
        "method": method, "data": result["data"], "arch": result["arch"], "seed": result["seed"],
        "epochs": result["epochs"], "batch_size": result["batch_size"],
        "knn200_top1": result["knn_top1"],
        "knn10_top1": common.knn(
            h, images.train[1], h_test, images.test[1], len(images.classes), k=10),
        "linear_top1": result["linear_top1"], "random_linear_top1": result["random_linear_top1"],
        "minutes": result["seconds"] / 60, "images_per_second": speed, "tflops": tera * speed,
        "share": tera * speed / peak if peak else None, "memory_gib": result["memory_gib"],
        "device": result["device"], "torch": result["torch"], "settings": settings,
    }


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = common.fail
    parser.add_argument("methods", nargs="*", metavar="METHOD", help="default: all")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--data", default="cifar10", help="cifar10, or a folder of its images")
    parser.add_argument("--runs", type=Path, default=Path("runs/cifar10"), help="folder for runs")
    parser.add_argument("--lines", type=Path, default=ROOT / "results" / "cifar10.jsonl")
    known, flags = parser.parse_known_args(argv)
    for method in known.methods:
        if method not in METHODS:
            common.fail(f"{method}: not one of {', '.join(METHODS)}")
    for seed in known.seeds:
        for method in known.methods or METHODS:
            out = (known.runs / "-".join([method, str(seed), *flags]).replace("/", "_")).resolve()
            old = known.lines.read_text().splitlines() if known.lines.exists() else []
            if any(json.loads(line)["settings"]["out"] == str(out) for line in old):
                print(f"{out.name}: has its line already")
                continue
            if not (out / "result.json").exists():
                command = [sys.executable, ROOT / f"{method}.py", "--recipe", "cifar10", "--data",
                           known.data, "--seed", str(seed), "--out", out, *flags]
                if status := subprocess.run(command).returncode:
                    raise SystemExit(status)
            line = measure(method, known.data, out)
            common.save(known.lines, "".join(f"{x}\n" for x in [*old, json.dumps(line)]))
            print(f"{out.name}: " + ", ".join(
                f"{key} {line[key]:.4g}" for key in ("knn200_top1", "knn10_top1", "linear_top1",
                                                     "minutes", "images_per_second", "tflops")))


if __name__ == "__main__":
    main()
