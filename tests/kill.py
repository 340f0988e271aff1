"""Kills trainings and compares where they end with an uninterrupted one, to the bit.

python tests/kill.py FOLDER_OF_IMAGES [SCRIPT ...]    # exit code 1 where a run ends elsewhere

A run is killed (SIGKILL, by itself) at moments drawn from a seed: before or after a step of the
optimizer, and within the writing of a file, when half of it is on the disk, when all of it is, and
just after it was renamed. The same command then goes on, and is killed again, until it ends."""

import importlib
import json
import os
import random
import signal
import sys
import tempfile
from pathlib import Path

TESTS = Path(__file__).resolve().parent
sys.path[:0] = [str(TESTS), str(TESTS.parent)]
from conftest import SCRIPTS, small_args  # noqa: E402
from test_scripts import log_of, same  # noqa: E402

KILLS = 3


def train(script, folder, out, fatal, tally):
    """In a process of its own: trains, counts the moments, dies at the one numbered `fatal`."""
    import torch

    torch.set_num_threads(1)
    count = 0

    def moment():
        nonlocal count
        count += 1
        if count == fatal:
            os.kill(os.getpid(), signal.SIGKILL)

    fsync, replace, update = os.fsync, os.replace, script.update

    def watched_fsync(number):
        size = os.fstat(number).st_size
        with open(f"/proc/self/fd/{number}", "r+b") as file:  # half of it is written, and ...
            whole = file.read()
            file.truncate(size // 2)
            moment()
            file.seek(0)
            file.write(whole)
        moment()
        fsync(number)

    def watched_replace(*paths):
        replace(*paths)
        moment()

    def watched_update(*arguments):
        moment()
        lr = update(*arguments)
        moment()
        return lr

    os.fsync, os.replace, script.update = watched_fsync, watched_replace, watched_update
    script.main(small_args(script, data=folder, out=out, epochs=3, queue_start=1))
    Path(tally).write_text(str(count))


def child(*arguments):
    """Whether a training in a forked process came to its end, or was killed."""
    if (number := os.fork()) == 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        status = 1
        try:
            train(*arguments)
            status = 0
        finally:
            os._exit(status)
    status = os.waitpid(number, 0)[1]
    if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL:
        return False
    assert status == 0, f"a training failed: {status}"
    return True


def compare(name, folder, work):
    """Kills one script's training KILLS times; returns at which moments, of how many."""
    import torch

    script, tally = importlib.import_module(name), work / f"{name}.moments"
    assert child(script, folder, work / f"{name}-whole", 0, tally)
    moments, chance, kills = int(tally.read_text()), random.Random(name), []
    while not kills or not child(script, folder, work / name, kills[-1], tally):
        kills.append(chance.randrange(1, moments // 2) if len(kills) < KILLS else 0)
    outs = work / f"{name}-whole", work / name
    whole, killed = (torch.load(out / "checkpoint.pt", weights_only=True) for out in outs)
    for part in ("model", "optimizer"):
        assert same(whole[part], killed[part]), f"{name}: another {part}"
    assert log_of(outs[0]) == log_of(outs[1]), f"{name}: another log"
    times = ("seconds", "images_per_second")
    whole, killed = (
        {k: v for k, v in json.loads((out / "result.json").read_text()).items() if k not in times}
        for out in outs
    )
    assert whole == killed, f"{name}: another result"
    return kills[:-1], moments


def main(folder, *names):
    total = 0
    with tempfile.TemporaryDirectory() as work:
        for name in names or SCRIPTS:
            kills, moments = compare(name, folder, Path(work))
            total += len(kills)
            print(f"{name}: killed at moments {kills} of {moments}; the same end", flush=True)
    print(f"{total} kills")


if __name__ == "__main__":
    main(*sys.argv[1:])
