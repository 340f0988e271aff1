"""Slow: each script's default recipe, with no flag but the place to write to, must really learn."""

import json

import pytest
from conftest import run


@pytest.mark.slow
def test_default_recipe_learns(script, tmp_path):
    """Far above random weights, and at the level that the README promises."""
    ran = run(f"{script.__name__}.py", "--out", tmp_path, threads=2, limit=1500)
    assert ran.returncode == 0, ran.stderr
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["linear_top1"] >= {"simclr": 85, "moco_v1": 85, "moco_v2": 78}.get(
        script.__name__, 70
    )
    assert result["linear_top1"] >= result["random_linear_top1"] + 40
    assert result["knn_top1"] >= result["random_knn_top1"] + 30
    log = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert log[-1]["std"] > 0.5 and log[-1]["effective_rank"] > 5
