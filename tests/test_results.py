"""The programs in results/ do on a small setting what they do on the large one."""

import json
import sys

import pytest
from conftest import ROOT, SCRIPTS, error_line

sys.path.insert(0, str(ROOT / "results"))

import cifar10
import steps
import tables

SMALL = ["--arch", "thin", "--batch-size", "16", "--epochs", "1", "--workers", "0"]


def test_every_script_is_among_the_methods():
    assert sorted(cifar10.METHODS) == SCRIPTS


def test_a_line_for_each_run(folder, tmp_path, capsys, monkeypatch):
    lines = tmp_path / "results" / "cifar10.jsonl"
    command = ["simclr", "--data", str(folder), "--runs", str(tmp_path / "runs"), "--lines",
               str(lines), *SMALL, "--seeds", "3"]
    cifar10.main(command)
    assert "simclr-3" in capsys.readouterr().out
    cifar10.main(command)
    assert "has its line already" in capsys.readouterr().out
    (first,) = map(json.loads, lines.read_text().splitlines())
    assert first["seed"] == 3 and first["settings"]["arch"] == "thin"
    result = json.loads(next((tmp_path / "runs").glob("simclr-3*/result.json")).read_text())
    assert first["knn200_top1"] == result["knn_top1"] and 0 <= first["knn10_top1"] <= 100
    assert first["linear_top1"] == result["linear_top1"] and first["device"] == "cpu"
    assert first["minutes"] * 60 == pytest.approx(result["seconds"])
    assert first["tflops"] > 0 and first["share"] is None
    monkeypatch.setattr(tables, "ROOT", tmp_path)
    row = tables.cifar10("cifar10").splitlines()[-1]
    assert row.startswith("| [simclr](simclr.py) | small | thin | 1 | 16 | 1 |")
    lines.unlink()
    assert "No run yet" in tables.cifar10("cifar10")


def test_operations_are_those_of_the_literature():
    """ResNet-18 on 32 pixels: 0.557 10^9 multiply-adds forward, and twice as many backward."""
    import simclr

    args = simclr.parse_args(["--recipe", "cifar10"])
    assert cifar10.tera_operations(simclr, args) == pytest.approx(2 * 3 * 2 * 0.557e-3, rel=0.01)
    assert cifar10.bf16_peak("NVIDIA H200") == 989 and cifar10.bf16_peak("cpu") is None


def test_parts_of_a_step(tmp_path):
    steps.main(["densecl", "byol", "--batch-size", "16", "--steps", "1", "--arch", "thin", "--out",
                str(tmp_path)])
    densecl, byol = json.loads((tmp_path / "steps.json").read_text())
    assert set(densecl["milliseconds"]) == set(steps.PARTS)
    assert all(value > 0 for value in densecl["milliseconds"].values())
    assert byol["milliseconds"]["EMA, queue"] > 0 and byol["method"] == "byol"
    assert (tmp_path / "steps.png").stat().st_size > 10_000
    import densecl as script

    assert script.ema_update.__name__ == "ema_update"  # what was timed is as it was


@pytest.mark.parametrize("program", [cifar10, steps])
def test_unknown_method(program, capsys):
    assert "simclt: not one of simclr" in error_line(capsys, program.main, ["simclt"])
