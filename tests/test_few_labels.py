"""What results/few_labels.py measures, on a few patterns."""

import json

import pytest
import torch
from conftest import error_line, small_args

import common
import harness
import simclr
from results import few_labels


@pytest.fixture(scope="module")
def data():
    images, labels = common.patterns(400)
    test = (images[300:], labels[300:])
    return common.Data("few", images[:300], (images[:300], labels[:300]), test, common.PATTERNS)


@pytest.fixture(scope="module")
def whole_run(folder, tmp_path_factory):
    """The checkpoint of a run of one epoch."""
    out = tmp_path_factory.mktemp("run")
    simclr.main(small_args(simclr, data=folder, out=out, epochs=1))
    return out / "checkpoint.pt"


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
    _, backbone = few_labels.load(None)
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


@pytest.fixture
def lines(data, tmp_path, monkeypatch):
    """Reads what has been recorded; the images are those of `data`."""
    path = tmp_path / "lines.jsonl"
    monkeypatch.setattr(few_labels, "LINES", path)
    monkeypatch.setattr(common, "load_images", lambda name: data)
    return lambda: [json.loads(line) for line in path.read_text().splitlines()]


def test_a_line_per_checkpoint_number_and_seed(whole_run, lines):
    words = [str(whole_run), "--data", "few", "--labels", "1", "2"]
    few_labels.main(words)
    first = lines()
    found = {(line["method"], line["epochs"], line["labels"], line["seed"]) for line in first}
    starts = (("simclr", 1), (few_labels.RANDOM, 0))
    assert found == {(*start, n, seed) for start in starts for n in (1, 2) for seed in range(3)}
    assert all(line["steps"] == 0 and 0 <= line["top1"] <= 100 for line in first)
    few_labels.main(words)  # nothing is left to do
    assert lines() == first
    few_labels.main([*words, "--fine-tune", "--steps", "1"])
    assert lines()[: len(first)] == first
    tuned = [line for line in lines()[len(first) :] if line["steps"] == 1]
    assert len(tuned) == len(first) == len(lines()) - len(first)


def test_the_features_are_those_of_the_checkpoint(whole_run, data):
    called, backbone = few_labels.load(str(whole_run))
    assert called == {"method": "simclr", "epochs": 1}
    weights = harness.load_checkpoint(whole_run)["model"]
    for name, value in backbone.state_dict().items():
        assert torch.equal(value, weights[f"backbone.{name}"])
    _, random = few_labels.load(None)
    assert not torch.equal(random.conv1.weight, backbone.conv1.weight)


def test_more_labels_are_used_if_there_are_more(data):
    _, backbone = few_labels.load(None)
    one = few_labels.measure(backbone, 1, 0, data, 0)
    every = few_labels.measure(backbone, 0, 0, data, 0)
    assert every > one + 5


def test_bad_input(whole_run, data, lines, capsys, tmp_path, monkeypatch):
    words = [str(whole_run), "--data", "few"]
    assert "at least 1" in error_line(capsys, few_labels.main, [*words, "--steps", "0"])
    assert "at least 0" in error_line(capsys, few_labels.main, [*words, "--labels", "-1"])
    foreign = tmp_path / "foreign.pt"
    torch.save(common.resnet("thin", 32).state_dict(), foreign)
    assert "foreign.pt" in error_line(capsys, few_labels.main, [str(foreign), *words[1:]])
    begun = tmp_path / "begun.pt"
    content = harness.load_checkpoint(whole_run)
    content["args"]["epochs"] = 4
    torch.save(content, begun)
    assert "1 of 4 epochs" in error_line(capsys, few_labels.main, [str(begun), *words[1:]])
    unlabelled = common.Data("few", data.pretrain, (), (), [])
    monkeypatch.setattr(common, "load_images", lambda name: unlabelled)
    assert "labelled images of one" in error_line(capsys, few_labels.main, words)
