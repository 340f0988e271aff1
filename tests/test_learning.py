"""Slow: each script's default recipe must really learn: a method that was broken without a sound,
so that it runs and its loss falls, is found here."""

import json

import pytest
from conftest import run

SHARE = 0.4  # of the recipe's epochs
FLOORS = {  # kNN top-1 in percent, about 12 under what was measured; random weights: 20 to 43
    "simclr": 54, "moco_v1": 48, "moco_v2": 44, "moco_v3": 58, "simsiam": 43, "byol": 31,
    "barlow": 46, "swav": 40, "densecl": 49,
}


@pytest.mark.slow
def test_default_recipe_learns(script, tmp_path):
    """Far above random weights, and near what was measured when the script was right."""
    column = script.RECIPES["recipe"].index("patterns")
    epochs = round(SHARE * script.RECIPES["epochs"][column])
    ran = run(
        f"{script.__name__}.py", "--epochs", epochs, "--out", tmp_path, threads=2, limit=1500)
    assert ran.returncode == 0, ran.stderr
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["knn_top1"] >= FLOORS[script.__name__]
    assert result["linear_top1"] >= result["random_linear_top1"] + 15
    log = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert log[-1]["std"] > 0.4 and log[-1]["effective_rank"] > 4
    assert "warning" not in ran.stdout
