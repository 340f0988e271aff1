"""Slow: a training that is killed again and again ends where the uninterrupted one ends."""

import pytest
import torch
from conftest import ROOT, run, torchrun, words
from test_scripts import log_of, same

import swav

PROGRAM = """
import os, signal, sys
sys.path.insert(0, {root!r})
import swav
if {kill} and os.environ["RANK"] == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
    update, calls = swav.update, []

    def fatal(*arguments):
        calls.append(1)
        if len(calls) == 7:  # in the second epoch
            os.kill(os.getpid(), signal.SIGKILL)
        return update(*arguments)

    swav.update = fatal
swav.main(swav.parse_args({words!r}))
"""


@pytest.mark.slow
def test_killed_runs_end_where_uninterrupted_ones_do(folder):
    ran = run("tests/kill.py", folder, limit=1500)
    assert ran.returncode == 0, ran.stdout + ran.stderr[-3000:]
    assert int(ran.stdout.split()[-2]) >= 20, ran.stdout


@pytest.mark.slow
def test_torchrun_restarts_after_a_killed_worker(folder, tmp_path):
    ends = []
    for kill in (False, True):
        out, program = tmp_path / f"run{kill}", tmp_path / f"program{kill}.py"
        command = words(
            swav, recipe="patterns", data=folder, out=out, epochs=4, queue_size=32, queue_start=1)
        program.write_text(PROGRAM.format(root=str(ROOT), kill=kill, words=command))
        ran = torchrun(2, "--max-restarts=3", program)
        assert ran.returncode == 0, ran.stderr[-3000:]
        assert ran.stdout.count("random weights  kNN") == 1  # a restart goes on, and not anew
        ends.append((torch.load(out / "checkpoint.pt", weights_only=True), log_of(out)))
    (whole, whole_log), (killed, killed_log) = ends
    assert same(whole["model"], killed["model"]) and same(whole["optimizer"], killed["optimizer"])
    assert whole["model"]["queue"].any() and whole_log == killed_log
