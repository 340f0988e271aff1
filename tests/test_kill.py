"""Slow: a training that is killed again and again ends as the uninterrupted one does, to the bit.

A run is killed (SIGKILL, by itself) at moments drawn from a seed: before or after a step of an
optimizer, the classifier's included, and within the writing of a file: with half of it on the disk,
with all of it, and just after it was renamed. The same command then continues, and is killed again,
until it ends."""

import importlib
import json
import multiprocessing
import os
import random
import signal
from collections import Counter

import pytest
import torch
from conftest import (
    ROOT,
    checkpoint_of,
    log_of,
    same,
    same_state,
    small_args,
    torchrun,
    words,
)
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

KINDS = ("before a step", "after a step", "half a file", "a file not renamed", "a file renamed")
RUN_TIMES = ("seconds", "images_per_second")
PROGRAM = """
import os
import signal
import swav
from torch.optim import LBFGS
from torch.optim.optimizer import register_optimizer_step_pre_hook

steps = []

def fatal(optimizer, arguments, settings):
    if isinstance(optimizer, LBFGS):  # the classifier's
        return
    steps.append(1)
    if len(steps) == 7:  # in the second epoch
        os.kill(os.getpid(), signal.SIGKILL)

if {kill} and os.environ["RANK"] == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
    register_optimizer_step_pre_hook(fatal)
swav.main(swav.parse_args({words!r}))
"""


class Moments:
    """Counts the moments of each kind, and kills this process at the given one."""

    def __init__(self, kind, number):
        self.kind = kind
        self.number = number
        self.counts = Counter()
        self.fsync = os.fsync
        self.replace = os.replace

    def watch(self):
        register_optimizer_step_pre_hook(lambda *_: self.note("before a step"))
        register_optimizer_step_post_hook(lambda *_: self.note("after a step"))
        os.fsync = self.watched_fsync
        os.replace = self.watched_replace

    def note(self, kind, file=None):
        self.counts[kind] += 1
        if kind == self.kind and self.counts[kind] == self.number:
            if file is not None:
                os.ftruncate(file, os.fstat(file).st_size // 2)
            os.kill(os.getpid(), signal.SIGKILL)

    def watched_fsync(self, file):
        self.note("half a file", file)
        self.fsync(file)

    def watched_replace(self, *paths):
        self.note("a file not renamed")
        self.replace(*paths)
        self.note("a file renamed")


def work(name, folder, out, kind, number, queue):
    """A training in a process of its own; sends the number of moments of each kind."""
    moments = Moments(kind, number)
    moments.watch()
    script = importlib.import_module(name)
    script.main(small_args(script, data=folder, out=out, epochs=3, queue_start=1))
    queue.put(moments.counts)


def train(name, folder, out, kind=None, number=0):
    """The moments of each kind, or None for a training that was killed."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "torchvision"])  # saves seconds for each training
    queue = context.SimpleQueue()
    process = context.Process(target=work, args=(name, folder, out, kind, number, queue))
    process.start()
    process.join()
    assert process.exitcode in (0, -signal.SIGKILL)
    return queue.get() if process.exitcode == 0 else None


def result_of(out):
    result = json.loads((out / "result.json").read_text())
    return {key: value for key, value in result.items() if key not in RUN_TIMES}


def compare(whole, killed):
    assert same_state(checkpoint_of(whole), checkpoint_of(killed))
    assert log_of(whole) == log_of(killed)
    assert result_of(whole) == result_of(killed)
    backbones = [torch.load(out / "backbone.pt", weights_only=True) for out in (whole, killed)]
    assert same(*backbones)
    assert not list(killed.glob("*.tmp"))


@pytest.mark.slow
def test_a_killed_run_ends_where_the_uninterrupted_one_does(script, folder, tmp_path):
    name = script.__name__
    draw = random.Random(name)
    whole = tmp_path / "whole"
    moments = train(name, folder, whole)
    kinds = list(KINDS)
    draw.shuffle(kinds)
    while kinds:  # a run may end before all kinds have had their turn: then another one
        out = tmp_path / f"killed-{len(kinds)}"
        while not (out / "result.json").exists():
            kind = kinds[-1] if kinds else None
            number = draw.randint(1, moments[kind]) if kinds else 0
            if train(name, folder, out, kind, number) is None:
                print(f"killed: {kind}, {number} of {moments[kind]}")
                kinds.pop()
        compare(whole, out)


@pytest.mark.slow
def test_torchrun_restarts_after_a_killed_worker(folder, tmp_path):
    """torchrun has to open a new store for each start, which the README says how to tell it: with
    TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1. The old one still names the process that is gone, and
    without the variable some restarts wait for it forever."""
    environment = {"PYTHONPATH": str(ROOT), "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    script = importlib.import_module("swav")
    flags = {"data": folder, "epochs": 4, "queue_size": 32, "queue_start": 1}
    for kill in (False, True):
        out = tmp_path / f"kill-{kill}"
        program = tmp_path / f"program-{kill}.py"
        command = words(script, recipe="patterns", out=out, **flags)
        program.write_text(PROGRAM.format(kill=kill, words=command))
        ran = torchrun(2, "--max-restarts=3", program, **environment)
        assert ran.returncode == 0, ran.stderr[-3000:]
        assert ran.stdout.count("random weights  kNN") == 1  # it continues, and does not start anew
        assert ("exitcode: -9" in ran.stderr) == kill
    whole = checkpoint_of(tmp_path / "kill-False")
    assert whole["model"]["queue"].any()
    assert same_state(whole, checkpoint_of(tmp_path / "kill-True"))
    assert log_of(tmp_path / "kill-False") == log_of(tmp_path / "kill-True")
