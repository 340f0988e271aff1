"""The finished networks in results/weights/ are those of the recorded runs."""

import importlib

import pytest
import torch
from conftest import METHODS, ROOT, checkpoint_of, error_line, small_args

import common
import evaluate
import harness
import walkthrough
from results import weights
from results.methods import SCRIPTS

KEPT = sorted((ROOT / "results" / "weights").glob("*.pt"))
OURS = [path for path in KEPT if path.stem in METHODS]


def test_every_method_has_its_file():
    assert {path.stem for path in KEPT} == {*SCRIPTS, "up_detr_tuned"}
    assert (ROOT / "results" / "weights" / "merges.txt").exists()  # of clip.py


def test_what_is_kept_of_a_checkpoint(script, folder, tmp_path, monkeypatch, capsys):
    """All that is trained, to half precision, and what is needed to build the model again."""
    name = script.__name__
    script.main(small_args(script, data=folder, out=tmp_path / "run", epochs=1))
    monkeypatch.setattr(weights, "FOLDER", tmp_path / "results" / "weights")
    (tmp_path / "results").mkdir()
    weights.main([str(tmp_path / "run" / "checkpoint.pt")])
    assert f"{name}.pt" in capsys.readouterr().out
    checkpoint = checkpoint_of(tmp_path / "run")
    monkeypatch.setattr(walkthrough, "ROOT", tmp_path)
    model, log = walkthrough.finished(script)
    assert log == checkpoint["log"]
    expected = walkthrough.build_model(script, small_args(script, data=folder))
    expected.load_state_dict(checkpoint["model"])
    x = torch.rand(4, 3, 32, 32)
    with torch.no_grad():
        assert torch.allclose(model.backbone(x), expected.eval().backbone(x), atol=0.02, rtol=0.02)
    trained = {key for key, p in expected.named_parameters() if p.requires_grad}
    saved = harness.load_checkpoint(tmp_path / "results" / "weights" / f"{name}.pt")
    assert trained <= saved["model"].keys()
    assert not any("encoder_k" in key or "target" in key for key in saved["model"])
    assert "optimizer" not in saved
    backbone, _, said = evaluate.load_backbone(str(weights.FOLDER / f"{name}.pt"))
    assert said.startswith(name)
    for key, value in backbone.state_dict().items():
        if value.is_floating_point():
            assert torch.equal(value, model.backbone.state_dict()[key])


def test_they_are_small():
    assert all(path.stat().st_size < 3.5 * 2**20 for path in KEPT)


def test_foreign_files_are_one_line(tmp_path, capsys):
    torch.save({"conv1.weight": torch.zeros(1)}, tmp_path / "foreign.pt")
    said = error_line(capsys, weights.main, [str(tmp_path / "foreign.pt")])
    assert "not a checkpoint" in said
    torch.save({"args": {"method": "clop"}, "log": [], "model": {}}, tmp_path / "clop.pt")
    assert "clop is not one of" in error_line(capsys, weights.main, [str(tmp_path / "clop.pt")])


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_their_knn_is_the_recorded_one(name):
    """To a few of 4,000 images, for half precision."""
    script = importlib.import_module(name)
    model, log = walkthrough.finished(script)
    view = script.build_views(script.parse_args([]))[0]
    data = common.load_images("patterns")
    found = common.linear_eval(model.backbone, data, view, "cpu", classifier=False)
    assert found["knn_top1"] == pytest.approx(log[-1]["knn_top1"], abs=0.3)


@pytest.mark.parametrize("path", OURS, ids=lambda path: path.stem)
def test_they_are_of_the_default_recipe(path):
    script = importlib.import_module(path.stem)
    saved = harness.load_checkpoint(path)
    default = vars(script.parse_args([]))
    changed = {key for key, value in saved["args"].items() if default.get(key) != value}
    assert changed <= {"out", "overwrite"}
    assert len(saved["log"]) == default["epochs"] + 1
