"""Every script runs, in one process and in two, and a resumed run is the uninterrupted one."""

import json

import pytest
import torch
from conftest import error_line, model_of, small_args, torchrun, words

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


def test_one_process(script, folder, tmp_path, capsys):
    result = script.main(small_args(script, data=folder, out=tmp_path))
    assert FIELDS <= result.keys() and result == json.loads((tmp_path / "result.json").read_text())
    assert result["method"] == script.__name__ and result["data"] == "small"
    assert [line["epoch"] for line in log_of(tmp_path)] == [0, 1, 2]
    assert (tmp_path / "report.png").stat().st_size > 10_000
    backbone, _ = script.build_backbone(small_args(script, data=folder, out=tmp_path))
    backbone.load_state_dict(torch.load(tmp_path / "backbone.pt", weights_only=True))
    assert "linear top-1" in capsys.readouterr().out
    assert "finished" in error_line(
        capsys, script.main, small_args(script, data=folder, out=tmp_path)
    )
    assert "--seed 0 there, 1 here" in error_line(
        capsys, script.main, small_args(script, data=folder, out=tmp_path, seed=1)
    )
    again = script.main(small_args(script, data=folder, out=tmp_path, overwrite=True))
    assert again["linear_top1"] == result["linear_top1"]  # the same seed, the same run


def test_two_processes(script, folder, tmp_path):
    ran = torchrun(
        2, f"{script.__name__}.py", *words(script, recipe="patterns", data=folder, out=tmp_path)
    )
    assert ran.returncode == 0, ran.stderr[-3000:]
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["world_size"] == 2 and result["linear_top1"] is not None
    assert ran.stdout.count("epoch 2/2") == 1  # one process speaks


def test_unlabelled_large_images(script, photos, tmp_path, capsys):
    args = small_args(
        script, data=photos, out=tmp_path, size=64, epochs=1, batch_size=8, queue_size=16, workers=2
    )
    assert script.main(args)["linear_top1"] is None
    assert "needs labels" in capsys.readouterr().out


def test_resumed_equals_uninterrupted(script, folder, tmp_path, monkeypatch, capsys):
    script.main(small_args(script, data=folder, out=tmp_path / "whole", epochs=3))
    args = small_args(script, data=folder, out=tmp_path / "killed", epochs=3)
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
    assert [line["epoch"] for line in log_of(tmp_path / "killed")] == [0, 1]
    script.main(args)
    assert log_of(tmp_path / "killed") == log_of(tmp_path / "whole")
    whole, killed = (
        torch.load(tmp_path / name / "checkpoint.pt", weights_only=True)
        for name in ("whole", "killed")
    )
    assert same(whole["model"], killed["model"]) and same(whole["optimizer"], killed["optimizer"])


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
