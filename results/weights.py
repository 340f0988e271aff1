"""The finished networks in results/weights/, from which the notebooks start.

    python -m results.weights runs/*-patterns/checkpoint.pt

Of a checkpoint it keeps the trained network in half precision, the settings and the log, and leaves
out the optimizer, moving averages and queues. The file is called after the method. evaluate.py
takes it like the checkpoint."""

import argparse
from pathlib import Path

import torch

import common
import harness
from results.methods import METHODS

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
    args = parser.parse_args(argv)
    for path in args.checkpoints:
        checkpoint = harness.load_checkpoint(path)
        if not isinstance(checkpoint, dict) or not {"args", "log", "model"} <= checkpoint.keys():
            common.fail(f"{path}: not a checkpoint of one of the scripts here")
        method = checkpoint["args"]["method"]
        if method not in METHODS:
            common.fail(f"{path}: {method} is not one of {', '.join(METHODS)}")
        FOLDER.mkdir(exist_ok=True)
        file = FOLDER / f"{method}.pt"
        torch.save(pack(checkpoint), file)
        print(f"{file.name}: {file.stat().st_size / 2**20:.2f} MiB")


if __name__ == "__main__":
    main()
