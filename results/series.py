"""Runs of one script in several arms, over seeds: what a table in results/README.md is made of.

    python -m results.series patterns             # what is missing of one series
    python -m results.series zero_shot --jobs 1
    python -m results.series laptop --data FOLDER     # CIFAR-10, up to an hour of a core per run

Each run is the default recipe on one thread with the flags, or the one replaced function, of its
arm. It adds a line to results/SERIES.jsonl: the name of the arm and its result.json."""

import argparse
import importlib
import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from threading import Lock

import torch

from common import fail, make_generator
from results.methods import METHODS

FOLDER = Path(__file__).resolve().parent
SEEDS = (0, 1, 2)


@dataclass(frozen=True)
class Arm:
    name: str
    script: str
    flags: tuple = ()
    change: str = ""  # the name of a function below
    seeds: tuple = SEEDS


def shuffle_captions(script):
    """The captions go to other images, so all that can be learnt is which captions there are."""
    load = script.load_captions

    def changed(*arguments):
        data = load(*arguments)
        order = torch.randperm(len(data.captions), generator=make_generator("shuffled"))
        data.captions = [data.captions[row] for row in order.tolist()]
        return data

    script.load_captions = changed


SCRATCH = ("--epochs", "1", "--tune-epochs", "1")  # only the training from scratch counts
LAPTOP = ("--recipe", "patterns", "--epochs", "20", "--eval-every", "20")

SERIES = {
    "patterns": [Arm(name, name) for name in METHODS],
    "laptop": [Arm(name, name, LAPTOP, seeds=(0,)) for name in METHODS],
    "zero_shot": [
        Arm("transformer", "clip"),
        Arm("cbow", "clip", ("--text", "cbow")),
        Arm("transformer, captions shuffled", "clip", change="shuffle_captions"),
    ],
    "open_vocabulary": [
        Arm("ViLD-text", "vild", ("--mode", "text")),
        Arm("ViLD", "vild"),
        Arm("ViLD-ensemble", "vild", ("--mode", "ensemble")),
        Arm("all ten names labelled", "vild", ("--mode", "text", "--novel", "")),
    ],
    "pretraining": [
        Arm("random patches", "up_detr"),
        Arm("patches of another image", "up_detr", ("--other-patches", "1")),
        Arm("without reconstruction", "up_detr", ("--reconstruction", "0")),
        Arm("scratch, half the rate", "up_detr", (*SCRATCH, "--scratch-lr", "0.001")),
        Arm("scratch, twice the rate", "up_detr", (*SCRATCH, "--scratch-lr", "0.004")),
        Arm("scratch, seven times the epochs", "up_detr", (*SCRATCH, "--scratch-epochs", "210")),
        Arm("CNN of densecl.py", "up_detr", ("--backbone", "runs/densecl-patterns/backbone.pt")),
        Arm("CNN of moco_v2.py", "up_detr", ("--backbone", "runs/moco_v2-patterns/backbone.pt")),
        Arm("CNN not frozen", "up_detr", ("--lr-backbone", "0.0005")),
    ],
}


def train(arm, seed, out, data=None):
    """One run in this process -> its line."""
    torch.set_num_threads(1)
    script = importlib.import_module(arm.script)
    if arm.change:
        globals()[arm.change](script)
    words = [*arm.flags, "--seed", str(seed), "--out", str(out), "--overwrite"]
    if data:
        words += ["--data", data]
    return {"arm": arm.name, **script.main(script.parse_args(words))}


def missing(series):
    """[(number of the arm, seed)] of the runs that have no line yet."""
    path = FOLDER / f"{series}.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    done = {(line["arm"], line["seed"]) for line in map(json.loads, lines)}
    found = []
    for number, arm in enumerate(SERIES[series]):
        for seed in arm.seeds:
            if (arm.name, seed) not in done:
                found.append((number, seed))
    return found


def run(series, number, seed, runs, data=None):
    """One run in a process of its own -> its line, as text."""
    out = Path(runs) / f"{series}-{number}-{seed}"
    words = [series, "--runs", runs, "--one", str(number), str(seed)]
    if data:
        words += ["--data", data]
    ended = subprocess.run(
        [sys.executable, "-m", "results.series", *words], capture_output=True, text=True
    )
    if ended.returncode:
        fail(f"{out}: {ended.stderr.strip()}")
    return (out / "line.json").read_text()


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.error = fail
    parser.add_argument("series", choices=SERIES)
    parser.add_argument("--data", help="in place of what the scripts use by default")
    parser.add_argument("--runs", default="runs", help="folder of the runs")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, of one thread each")
    parser.add_argument("--one", nargs=2, type=int, help=argparse.SUPPRESS)  # arm, seed
    args = parser.parse_args(argv)
    if args.one:
        number, seed = args.one
        out = Path(args.runs) / f"{args.series}-{number}-{seed}"
        line = train(SERIES[args.series][number], seed, out, args.data)
        (out / "line.json").write_text(json.dumps(line) + "\n")
        return
    lock = Lock()

    def record(key):
        line = run(args.series, *key, args.runs, args.data)
        with lock, open(FOLDER / f"{args.series}.jsonl", "a") as file:
            file.write(line)
        found = json.loads(line)
        print(f"{found['arm']}, seed {found['seed']}: recorded", flush=True)

    with ThreadPoolExecutor(args.jobs) as pool:
        list(pool.map(record, missing(args.series)))


if __name__ == "__main__":
    main()
