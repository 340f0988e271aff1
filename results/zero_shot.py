"""What clip.py recognises by name alone, over seeds, beside a simpler text encoder and a control.

    python -m results.zero_shot            # all runs that are missing, two at a time

Each run is the default recipe on one thread. It adds a line to results/zero_shot.jsonl: its
result.json, the text encoder, and which captions the images had. In the control the captions are
shuffled among the images, so that all that can be learnt is which captions there are."""

import argparse
import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Lock

import torch

import clip
from common import fail, make_generator

FILE = Path(__file__).resolve().parent / "zero_shot.jsonl"
ARMS = [("transformer", "own"), ("cbow", "own"), ("transformer", "shuffled")]
SEEDS = (0, 1, 2)


def shuffled(load):
    """load_captions, but the captions go to other images."""

    def changed(*arguments):
        data = load(*arguments)
        order = torch.randperm(len(data.captions), generator=make_generator("shuffled"))
        data.captions = [data.captions[row] for row in order.tolist()]
        return data

    return changed


def train(text, captions, seed, out):
    """One run in this process -> its line."""
    torch.set_num_threads(1)
    if captions == "shuffled":
        clip.load_captions = shuffled(clip.load_captions)
    flags = ["--text", text, "--seed", str(seed), "--out", str(out), "--overwrite"]
    result = clip.main(clip.parse_args(flags))
    return {"text": text, "captions": captions, **result}


def recorded():
    """{(text, captions, seed) of the runs that are there}."""
    lines = FILE.read_text().splitlines() if FILE.exists() else []
    runs = [json.loads(line) for line in lines]
    return {(run["text"], run["captions"], run["seed"]) for run in runs}


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.error = fail
    parser.add_argument("--runs", default="runs", help="folder of the runs")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, of one thread each")
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)  # TEXT CAPTIONS SEED
    args = parser.parse_args(argv)
    if args.one:
        text, captions, seed = args.one
        out = Path(args.runs) / f"clip-{text}-{captions}-{seed}"
        line = json.dumps(train(text, captions, int(seed), out))
        (out / "line.json").write_text(line)
        return
    missing = []
    done = recorded()
    for text, captions in ARMS:
        for seed in SEEDS:
            if (text, captions, seed) not in done:
                missing.append((text, captions, seed))
    lock = Lock()

    def run(key):
        words = [str(part) for part in key]
        command = [sys.executable, "-m", "results.zero_shot", "--runs", args.runs, "--one", *words]
        ended = subprocess.run(command, capture_output=True, text=True)
        if ended.returncode:
            fail(f"{' '.join(words)}: {ended.stderr.strip()}")
        line = (Path(args.runs) / f"clip-{'-'.join(words)}" / "line.json").read_text()
        with lock, open(FILE, "a") as file:
            file.write(line + "\n")
        print(
            f"{' '.join(words)}: zero-shot {json.loads(line)['zero_shot_top1']:.1f} %", flush=True
        )

    with ThreadPoolExecutor(args.jobs) as pool:
        list(pool.map(run, missing))


if __name__ == "__main__":
    main()
