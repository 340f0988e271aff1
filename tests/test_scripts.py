"""Every script runs, in one process and in several, and a resumed run is the uninterrupted one."""

import contextlib
import importlib
import io
import json
import signal
import subprocess
import sys

import pytest
import torch
from conftest import (
    ROOT,
    METHODS,
    checkpoint_of,
    error_line,
    interrupt,
    log_of,
    same_state,
    small_args,
    torchrun,
    words,
)

import common
import harness
from results.methods import model_class

RESULT = """method data arch epochs batch_size world_size linear_top1 linear_top5 knn_top1 knn_k
    random_linear_top1 random_knn_top1 seconds images_per_second device memory_gib torch seed"""
CHECKPOINT = "args world_size log model optimizer random_state"
STOPPED = "stopped; the same command continues after the last finished epoch"
WHOLE = {}  # a finished run of each script, made once
ALL = """
import importlib
import torch.distributed as dist

leave = dist.destroy_process_group
dist.init_process_group("gloo")
dist.init_process_group = dist.destroy_process_group = lambda *_: None
for name, words in {commands!r}.items():
    script = importlib.import_module(name)
    script.main(script.parse_args(words))
leave()
"""


@pytest.fixture
def whole(script, folder, tmp_path_factory):
    """(folder, result, what it printed) of an uninterrupted run of three epochs."""
    if script not in WHOLE:
        out = tmp_path_factory.mktemp("whole")
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            result = script.main(small_args(script, data=folder, out=out, epochs=3))
        WHOLE[script] = out, result, printed.getvalue()
    return WHOLE[script]


def test_one_process(script, folder, whole, capsys):
    out, result, printed = whole
    assert result == json.loads((out / "result.json").read_text())
    assert result.keys() == set(RESULT.split())
    assert result["method"] == script.__name__
    assert result["data"] == "small"
    assert result["linear_top1"] is not None
    log = log_of(out)
    assert [line["epoch"] for line in log] == [0, 1, 2, 3]
    for line in log[1:]:
        assert {"loss", "lr", "std", "effective_rank", "knn_top1"} <= line.keys()
    assert "epoch 0/3  random weights  kNN " in printed
    for text in ("(chance ", "std ", "images/s", "ETA ", "linear top-1 "):
        assert text in printed, text
    assert (out / "report.png").stat().st_size > 10_000
    checkpoint = checkpoint_of(out)
    assert checkpoint.keys() == set(CHECKPOINT.split())
    assert checkpoint["args"]["method"] == script.__name__
    assert checkpoint["log"][-1]["loss"] == log[-1]["loss"]

    args = small_args(script, data=folder, out=out, epochs=3)
    backbone = script.build_backbone(args)
    backbone.load_state_dict(torch.load(out / "backbone.pt", weights_only=True))
    assert "holds a finished run" in error_line(capsys, script.main, args)
    args.seed = 1
    assert "holds a run with another --seed:" in error_line(capsys, script.main, args)
    assert result == json.loads((out / "result.json").read_text())


def test_a_finished_run_is_overwritten_if_told_to(folder, tmp_path):
    script = importlib.import_module("simclr")
    args = small_args(script, data=folder, out=tmp_path, epochs=1)
    first = script.main(args)
    before = checkpoint_of(tmp_path)
    args.overwrite = True
    again = script.main(args)
    assert again["linear_top1"] == first["linear_top1"]  # the same seed, the same run
    assert same_state(before, checkpoint_of(tmp_path))
    args.seed = 1
    assert script.main(args)["seed"] == 1
    assert not same_state(before, checkpoint_of(tmp_path))


def test_resumed_equals_uninterrupted(script, folder, whole, tmp_path, monkeypatch, capsys):
    """Stopped within the first epoch of five steps, within the second, and after it."""
    args = small_args(script, data=folder, out=tmp_path, epochs=3)
    for method, call, finished in (
        ("after_step", 3, 0),
        ("after_step", 7, 1),
        ("after_epoch", 1, 2),
    ):
        interrupt(script, args, method, call)
        assert STOPPED in capsys.readouterr().out
        assert [line["epoch"] for line in log_of(tmp_path)] == list(range(finished + 1))
    script.main(args)
    assert log_of(tmp_path) == log_of(whole[0])
    assert same_state(checkpoint_of(tmp_path), checkpoint_of(whole[0]))


def record_permutations(script, patch):
    """The permutations that script.shuffle draws from now on."""
    shuffle = script.shuffle
    drawn = []

    def recorded(x):
        x, permutation = shuffle(x)
        drawn.append(permutation.tolist())
        return x, permutation

    patch.setattr(script, "shuffle", recorded)
    return drawn


@pytest.mark.parametrize(
    "images", ["in memory", pytest.param("from files", marks=pytest.mark.slow)]
)
def test_the_shuffle_continues_where_it_stopped(images, folder, photos, tmp_path, monkeypatch):
    """Also if workers, whose seeds come from a generator too, are started anew."""
    script = importlib.import_module("moco_v1")
    flags = {"data": folder, "epochs": 3}
    if images == "from files":
        flags = {"data": photos, "epochs": 3, "size": 64, "workers": 2}
        flags |= {"batch_size": 4, "queue_size": 16}  # five steps per epoch, as in memory
    drawn = record_permutations(script, monkeypatch)
    script.main(small_args(script, out=tmp_path / "whole", **flags))
    whole = drawn.copy()
    drawn.clear()
    args = small_args(script, out=tmp_path / "killed", **flags)
    interrupt(script, args, "after_step", 8)
    del drawn[5:]  # of the second epoch, which is trained again
    script.main(args)
    assert len({tuple(permutation) for permutation in whole}) > 10
    assert drawn == whole
    assert same_state(checkpoint_of(tmp_path / "killed"), checkpoint_of(tmp_path / "whole"))


def test_two_processes(folder, tmp_path):
    """All scripts in one pair of processes, which saves starting a pair for each."""
    flags = {"data": folder, "epochs": 1}
    commands = {}
    for name in METHODS:
        commands[name] = words(
            importlib.import_module(name), recipe="patterns", out=tmp_path / name, **flags
        )
    program = tmp_path / "all.py"
    program.write_text(ALL.format(commands=commands))
    ran = torchrun(2, program, PYTHONPATH=str(ROOT))
    assert ran.returncode == 0, ran.stderr[-3000:]
    assert ran.stdout.count("epoch 1/1") == len(METHODS)  # only one process prints
    for name in METHODS:
        result = json.loads((tmp_path / name / "result.json").read_text())
        assert result["world_size"] == 2
        assert result["linear_top1"] is not None
        script = importlib.import_module(name)
        if "bn_groups" in script.SETTINGS:  # on a CPU, the others normalise per process
            one = tmp_path / "one" / name
            script.main(small_args(script, out=one, **flags))
            expected = log_of(one)[1]["loss"]
            assert log_of(tmp_path / name)[1]["loss"] == pytest.approx(expected, rel=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_torchrun(name, folder, tmp_path):
    """As users start it."""
    script = importlib.import_module(name)
    command = words(script, recipe="patterns", data=folder, out=tmp_path, epochs=1)
    ran = torchrun(2, f"{name}.py", *command)
    assert ran.returncode == 0, ran.stderr[-3000:]
    assert json.loads((tmp_path / "result.json").read_text())["world_size"] == 2


@pytest.mark.slow
@pytest.mark.parametrize("name", ["moco_v1", "swav"])
def test_torchrun_with_eight_processes(name, tmp_path):
    """The default recipe with its own batch, queue and groups, for one epoch."""
    ran = torchrun(8, f"{name}.py", "--epochs", 1, "--out", tmp_path)
    assert ran.returncode == 0, ran.stderr[-3000:]
    assert json.loads((tmp_path / "result.json").read_text())["world_size"] == 8


class Ready(Exception):
    """Raised where a training would open its files."""


def test_eight_processes_fit_the_default_recipe(script, monkeypatch):
    """All of train up to the first epoch, as the last of eight processes, of which only one is
    there; then a pass through the backbone with this process's part of the batch."""
    for module in (common, script):
        monkeypatch.setattr(module, "rank", lambda: 7, raising=False)
        monkeypatch.setattr(module, "world_size", lambda: 8, raising=False)

    def ready(args, model, optimizer, views):
        raise Ready(model, views)

    monkeypatch.setattr(harness, "Run", ready)
    monkeypatch.setattr(script, "launch", lambda: torch.device("cpu"))
    args = script.parse_args([])
    with pytest.raises(Ready) as reached:
        script.train(args)
    model, views = reached.value.args
    n = args.batch_size // 8
    assert views.rows().shape == (len(views), n)
    h = model.backbone.train()(torch.randn(n, 3, args.size, args.size))
    assert h.shape == (n, model.backbone.dim)
    assert h.isfinite().all()


def test_unlabelled_large_images(script, photos, tmp_path, capsys):
    flags = {"size": 64, "epochs": 1, "batch_size": 8, "queue_size": 16, "workers": 2}
    result = script.main(small_args(script, data=photos, out=tmp_path, **flags))
    assert result["linear_top1"] is None
    assert "its evaluation needs labels" in capsys.readouterr().out


@pytest.mark.slow
def test_compiled_equals_not_compiled(folder, tmp_path):
    script = importlib.import_module("simclr")
    losses = []
    for out in ("plain", "compiled"):
        args = small_args(script, data=folder, out=tmp_path / out, epochs=1, batch_size=32)
        args.compile = out == "compiled"
        script.main(args)
        losses.append(log_of(tmp_path / out)[1]["loss"])  # of two steps
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


@pytest.mark.parametrize(
    "number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)]
)
def test_a_signal_leaves_a_checkpoint_and_says_how_to_continue(number, folder, tmp_path):
    script = importlib.import_module("moco_v2")
    flags = words(script, recipe="patterns", data=folder, out=tmp_path, epochs=200)
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    command = [sys.executable, "moco_v2.py", *flags]
    with subprocess.Popen(command, cwd=ROOT, **pipes) as process:
        for line in process.stdout:
            if line.startswith("epoch 2/"):
                break
        process.send_signal(number)
        printed, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert errors == ""
    assert STOPPED in printed
    assert len(checkpoint_of(tmp_path)["log"]) >= 3


def test_a_loss_that_is_not_finite_ends_the_run_and_keeps_the_checkpoint(
    script, folder, tmp_path, monkeypatch, capsys
):
    model = model_class(script)
    forward = model.forward
    calls = []

    def broken(*arguments):
        calls.append("forward")
        loss, z = forward(*arguments)
        return (loss if len(calls) <= 5 else loss * float("nan")), z  # five steps per epoch

    monkeypatch.setattr(model, "forward", broken)
    line = error_line(capsys, script.main, small_args(script, data=folder, out=tmp_path))
    assert "the loss of epoch 2 is not finite" in line
    assert [line["epoch"] for line in checkpoint_of(tmp_path)["log"]] == [0, 1]


def test_a_collapse_gives_one_warning(folder, tmp_path, monkeypatch, capsys):
    """The run goes on all the same."""
    script = importlib.import_module("simsiam")
    monkeypatch.setattr(script, "health", lambda z: {"std": 0.02, "effective_rank": 1.0})
    script.main(small_args(script, data=folder, out=tmp_path, epochs=1))
    printed = capsys.readouterr().out
    assert printed.count("warning: std 0.020: ") == 1
    assert "the network has collapsed" in printed
    assert "\r" not in printed  # only terminals get carriage returns
    assert log_of(tmp_path)[1]["std"] == 0.02
