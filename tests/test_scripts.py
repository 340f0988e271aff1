"""Every script runs, in one process and in two, and a resumed run is the uninterrupted one."""

import contextlib
import importlib
import io
import json
import signal
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, SCRIPTS, error_line, model_of, small_args, torchrun, words

FIELDS = {
    "method",
    "data",
    "arch",
    "epochs",
    "batch_size",
    "world_size",
    "linear_top1",
    "random_linear_top1",
    "knn_top1",
    "knn_k",
    "seconds",
    "images_per_second",
    "device",
    "torch",
    "seed",
}


def log_of(out):
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "seconds"} for line in lines]


def same(a, b):
    """Equality to the bit of nested dictionaries, lists and tensors."""
    if torch.is_tensor(a):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


WHOLE = {}  # a finished run of each script, made once


@pytest.fixture
def whole(script, folder, tmp_path_factory):
    """(folder, result, what it printed) of an uninterrupted run of three epochs."""
    if script not in WHOLE:
        out, said = tmp_path_factory.mktemp("whole"), io.StringIO()
        with contextlib.redirect_stdout(said):
            result = script.main(small_args(script, data=folder, out=out, epochs=3))
        WHOLE[script] = out, result, said.getvalue()
    return WHOLE[script]


def test_one_process(script, folder, whole, capsys):
    out, result, said = whole
    assert FIELDS <= result.keys() and result == json.loads((out / "result.json").read_text())
    assert result["method"] == script.__name__ and result["data"] == "small"
    log = log_of(out)
    assert [line["epoch"] for line in log] == [0, 1, 2, 3]
    shown = {"loss", "lr", "std", "effective_rank", "knn_top1"}
    assert all(shown <= line.keys() for line in log[1:])
    assert "(chance " in said and "std " in said and "linear top-1" in said
    assert (out / "report.png").stat().st_size > 10_000
    args = small_args(script, data=folder, out=out, epochs=3)
    backbone, _ = script.build_backbone(args)
    backbone.load_state_dict(torch.load(out / "backbone.pt", weights_only=True))
    assert "finished" in error_line(capsys, script.main, args)
    args.seed = 1
    assert "--seed 0 there, 1 here" in error_line(capsys, script.main, args)


def test_a_finished_run_is_overwritten_if_told_to(folder, tmp_path):
    script = importlib.import_module("simclr")
    first = script.main(small_args(script, data=folder, out=tmp_path, epochs=1))
    again = script.main(small_args(script, data=folder, out=tmp_path, epochs=1, overwrite=True))
    assert again["linear_top1"] == first["linear_top1"]  # the same seed, the same run


def test_two_processes(folder, tmp_path):
    """All scripts in one pair of processes, which saves the time to start it for each."""
    commands = {
        name: words(
            importlib.import_module(name), recipe="patterns", data=folder, out=tmp_path / name,
            epochs=1)
        for name in SCRIPTS
    }
    program = tmp_path / "all.py"
    program.write_text(
        f"import importlib, sys\nsys.path.insert(0, {str(ROOT)!r})\n"
        "import torch.distributed as dist\n"
        "place, leave = next(dist.rendezvous('env://')), dist.destroy_process_group\n"
        "dist.init_process_group('gloo', store=place[0], rank=place[1], world_size=place[2])\n"
        "dist.rendezvous = lambda method: iter([place])\n"
        "dist.init_process_group = dist.destroy_process_group = lambda *names, **more: None\n"
        f"for name, words in {commands!r}.items():\n"
        "    script = importlib.import_module(name)\n"
        "    script.main(script.parse_args(words))\n"
        "leave()\n"
    )
    ran = torchrun(2, program)
    assert ran.returncode == 0, ran.stderr[-3000:]
    for name in SCRIPTS:
        result = json.loads((tmp_path / name / "result.json").read_text())
        assert result["world_size"] == 2 and result["linear_top1"] is not None
    assert ran.stdout.count("epoch 1/1") == len(SCRIPTS)  # one process speaks
    for name in ("moco_v1", "moco_v2", "densecl"):  # the others normalise per process on a CPU
        script = importlib.import_module(name)
        script.main(small_args(script, data=folder, out=tmp_path / "one" / name, epochs=1))
        for one, two in zip(log_of(tmp_path / "one" / name), log_of(tmp_path / name)):
            assert one["epoch"] == 0 or one["loss"] == pytest.approx(two["loss"], rel=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("name, processes", [*((name, 2) for name in SCRIPTS), ("swav", 8)])
def test_torchrun(name, processes, folder, tmp_path):
    """As users start it; eight processes on two cores only for one script, which takes long."""
    script = importlib.import_module(name)
    command = words(script, recipe="patterns", data=folder, out=tmp_path, epochs=1)
    ran = torchrun(processes, f"{name}.py", *command)
    assert ran.returncode == 0, ran.stderr[-3000:]
    assert json.loads((tmp_path / "result.json").read_text())["world_size"] == processes


def test_unlabelled_large_images(script, photos, tmp_path, capsys):
    args = small_args(
        script, data=photos, out=tmp_path, size=64, epochs=1, batch_size=8, queue_size=16, workers=2
    )
    assert script.main(args)["linear_top1"] is None
    assert "needs labels" in capsys.readouterr().out


def test_resumed_equals_uninterrupted(script, folder, whole, tmp_path, monkeypatch, capsys):
    args = small_args(script, data=folder, out=tmp_path, epochs=3)
    health, calls = script.health, []

    def interrupted(z):
        calls.append(z)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return health(z)

    with monkeypatch.context() as patch, pytest.raises(SystemExit) as end:
        patch.setattr(script, "health", interrupted)
        script.main(args)
    assert end.value.code == 130 and "the same command goes on" in capsys.readouterr().out
    assert [line["epoch"] for line in log_of(tmp_path)] == [0, 1]
    script.main(args)
    assert log_of(tmp_path) == log_of(whole[0])
    whole, killed = (
        torch.load(out / "checkpoint.pt", weights_only=True) for out in (whole[0], tmp_path)
    )
    assert same(whole["model"], killed["model"]) and same(whole["optimizer"], killed["optimizer"])


@pytest.mark.parametrize(
    "number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_a_signal_leaves_a_checkpoint_and_says_how_to_go_on(number, folder, tmp_path):
    script = importlib.import_module("moco_v2")
    flags = words(script, recipe="patterns", data=folder, out=tmp_path, epochs=200)
    with subprocess.Popen(
        [sys.executable, "moco_v2.py", *flags], cwd=ROOT, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True) as process:
        seen = next(line for line in process.stdout if line.startswith("epoch 2/"))
        process.send_signal(number)
        said, wrong = process.communicate(timeout=60)
    assert process.returncode == 130 and not wrong, wrong
    assert "stopped; the same command goes on after the last finished epoch" in said, seen
    assert torch.load(tmp_path / "checkpoint.pt", weights_only=True)["epoch"] >= 2


def test_a_loss_that_is_not_finite_stops_and_keeps_the_checkpoint(
    script, folder, tmp_path, monkeypatch, capsys
):
    kind, calls = model_of(script), []
    forward = kind.forward

    def broken(model, *views):
        calls.append(views)
        return forward(model, *views) * (float("nan") if len(calls) > 5 else 1)  # 5 steps an epoch

    monkeypatch.setattr(kind, "forward", broken)
    line = error_line(capsys, script.main, small_args(script, data=folder, out=tmp_path))
    assert "epoch 2 is not finite" in line
    assert torch.load(tmp_path / "checkpoint.pt", weights_only=True)["epoch"] == 1


def test_a_collapse_is_said_in_one_line(folder, tmp_path, monkeypatch, capsys):
    """SimSiam without what keeps it from collapsing says so, and goes on."""
    script = importlib.import_module("simsiam")
    monkeypatch.setattr(script, "health", lambda z: {"std": 0.02, "effective_rank": 1.0})
    script.main(small_args(script, data=folder, out=tmp_path, epochs=1))
    said = capsys.readouterr().out
    assert said.count("warning: std 0.020: ") == 1 and "collapsed" in said
    assert "\r" not in said  # which only a terminal gets
    assert log_of(tmp_path)[1]["std"] == 0.02
