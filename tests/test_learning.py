"""Slow: each script's default recipe must really learn: a method that was broken without a sound,
so that it runs and its loss falls, is found here."""

import json

import pytest
from conftest import run

FLOORS = {  # linear top-1 in percent, under every seed that was measured; random weights: 30 to 60
    "simclr": 72, "moco_v1": 72, "moco_v2": 65, "moco_v3": 72, "simsiam": 62, "byol": 50,
    "barlow": 65, "swav": 65, "densecl": 80,
}


@pytest.mark.slow
def test_default_recipe_learns(script, tmp_path):
    """Far above random weights, and near what was measured when the script was right."""
    ran = run(f"{script.__name__}.py", "--out", tmp_path, threads=2, limit=1500)
    assert ran.returncode == 0, ran.stderr
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["linear_top1"] >= FLOORS[script.__name__]
    assert result["linear_top1"] >= result["random_linear_top1"] + 15
    assert result["knn_top1"] >= result["random_knn_top1"] + 15
    log = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert log[-1]["std"] > 0.4 and log[-1]["effective_rank"] > 4
    assert "warning" not in ran.stdout
