"""What results/few_labels.py measures, on a few patterns."""

import json

import pytest
import torch
from conftest import error_line

import common
from results import few_labels


@pytest.fixture(scope="module")
def data():
    images, labels = common.patterns(400)
    test = (images[300:], labels[300:])
    return common.Data("few", images[:300], (images[:300], labels[:300]), test, common.PATTERNS)


def test_labels_are_drawn_per_class(data, capsys):
    labels = data.train[1]
    for per_class in (1, 3, 10):
        rows = few_labels.draw_labelled(labels, per_class, seed=0)
        assert torch.equal(torch.bincount(labels[rows]), torch.full((10,), per_class))
        assert len(rows.unique()) == len(rows)
    assert not torch.equal(rows, few_labels.draw_labelled(labels, 10, seed=1))
    few = few_labels.draw_labelled(labels, 3, seed=0)
    assert set(few.tolist()) <= set(few_labels.draw_labelled(labels, 10, seed=0).tolist())
    assert sorted(few_labels.draw_labelled(labels, 0, seed=0).tolist()) == list(range(300))
    assert "only 30" in error_line(capsys, few_labels.draw_labelled, labels, 31, 0)


def test_fine_tuning_learns_and_leaves_its_start_alone(data):
    backbone = few_labels.build_backbone(few_labels.RANDOM, None)
    before = {name: x.clone() for name, x in backbone.state_dict().items()}
    view = common.Augment(32, scale=(0.8, 1.0))
    images, labels = data.train
    network = few_labels.fine_tune(backbone, view, images, labels, 10, seed=0, steps=30)
    after = backbone.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert not torch.equal(network[0].conv1.weight, backbone.conv1.weight)
    assert few_labels.top1(network, view, *data.test) > 30


def test_top1_is_a_percentage_of_all_images(data):
    images, labels = data.test
    network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 32 * 32, 10))
    torch.nn.init.zeros_(network[1].weight)
    network[1].bias.data = torch.eye(10)[3]
    view = common.Augment(32)
    share = (labels == 3).float().mean().item()
    assert few_labels.top1(network, view, images, labels) == pytest.approx(100 * share)


def test_a_line_per_start_number_and_seed(data, tmp_path, monkeypatch, capsys):
    (tmp_path / "simclr").mkdir()
    backbone = few_labels.build_backbone(few_labels.RANDOM, None)
    torch.save(backbone.state_dict(), tmp_path / "simclr" / "backbone.pt")
    monkeypatch.setattr(few_labels, "LINES", tmp_path / "lines.jsonl")
    monkeypatch.setattr(few_labels, "STEPS", 1)
    monkeypatch.setattr(common, "load_images", lambda name: data)
    words = ["--data", "few", "--backbones", str(tmp_path), "--labels", "1", "2"]
    few_labels.main(words)
    lines = [json.loads(line) for line in (tmp_path / "lines.jsonl").read_text().splitlines()]
    found = {(line["start"], line["labels"], line["seed"]) for line in lines}
    starts = ("simclr", few_labels.RANDOM)
    assert found == {(start, n, seed) for start in starts for n in (1, 2) for seed in range(3)}
    assert all(0 <= line["linear"] <= 100 and 0 <= line["fine-tuned"] <= 100 for line in lines)
    few_labels.main(words)  # nothing is left to do
    assert len((tmp_path / "lines.jsonl").read_text().splitlines()) == len(lines)
    capsys.readouterr()
    torch.save({"conv1.weight": torch.zeros(2)}, tmp_path / "simclr" / "backbone.pt")
    words[-2:] = ["3"]
    assert "not the weights of a thin" in error_line(capsys, few_labels.main, words)
    assert "not one of" in error_line(capsys, few_labels.main, ["byool", *words])
