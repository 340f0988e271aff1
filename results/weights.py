"""The finished networks in results/weights/, from which the notebooks start.

    python -m results.weights runs/*-patterns/checkpoint.pt
    python -m results.weights runs/up_detr-scenes/pretrained/checkpoint.pt --name up_detr_tuned

Of a checkpoint it keeps the trained network in half precision, the settings and the log, and leaves
out the optimizer, moving averages and queues. The file is called after the method, and of clip.py
comes merges.txt as well. evaluate.py takes it like the checkpoint."""

import argparse
import shutil
from pathlib import Path

import torch

import common
import harness
from results.methods import SCRIPTS

FOLDER = Path(__file__).resolve().parent / "weights"
LEFT_OUT = ("encoder_k.", "target_encoder.", "queue", "dense_queue")


def pack(checkpoint):
    weights = {}
    for name, x in checkpoint["model"].items():
        if not name.startswith(LEFT_OUT):
            weights[name] = x.half() if x.is_floating_point() else x
    return {"args": checkpoint["args"], "log": checkpoint["log"], "model": weights}


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.error = common.fail
    parser.add_argument("checkpoints", nargs="+", type=Path, metavar="CHECKPOINT")
    parser.add_argument("--name", help="of the file, without .pt, in place of the method's")
    args = parser.parse_args(argv)
    if args.name and len(args.checkpoints) > 1:
        common.fail("--name: for one checkpoint only")
    for path in args.checkpoints:
        checkpoint = harness.load_checkpoint(path)
        if not isinstance(checkpoint, dict) or not {"args", "log", "model"} <= checkpoint.keys():
            common.fail(f"{path}: not a checkpoint of one of the scripts here")
        method = checkpoint["args"]["method"]
        if method not in SCRIPTS:
            common.fail(f"{path}: {method} is not one of {', '.join(SCRIPTS)}")
        FOLDER.mkdir(exist_ok=True)
        file = FOLDER / f"{args.name or method}.pt"
        torch.save(pack(checkpoint), file)
        merges = path.with_name("merges.txt")
        if merges.exists():
            shutil.copy(merges, FOLDER)
        print(f"{file.name}: {file.stat().st_size / 2**20:.2f} MiB")


if __name__ == "__main__":
    main()
