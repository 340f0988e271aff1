"""What the papers found: the replaced parts do what they say, and verdicts follow from the runs."""

import importlib.util
import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, checkpoint_of, error_line, small_args

import common
from results import findings
from results.findings import FINDINGS, Arm, Finding
from results.methods import METHODS, model_class, views_of

ARMS = {}
for finding in FINDINGS:
    for an_arm in finding.arms.values():
        ARMS[an_arm.key(0)] = an_arm


def fresh(name):
    """A script as a module of its own, which nobody else uses."""
    spec = importlib.util.spec_from_file_location(name, ROOT / f"{name}.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    return script


def step_of(arm):
    """The loss, and the size of its gradient, of one step with an arm's flags and replaced part."""
    script = fresh(arm.method)
    name = model_class(script).__name__
    if arm.change:
        getattr(findings, arm.change)(script)
    args = script.parse_args(["--recipe", "patterns", *arm.flags])
    args.batch_size = 16
    torch.manual_seed(0)
    network = getattr(script, name)(args)
    loss, z = network(*views_of(args, 16))
    loss.backward()
    gradients = [p.grad.norm() for p in network.parameters() if p.grad is not None]
    return loss.item(), torch.stack(gradients).norm().item()


@pytest.mark.parametrize("key", ARMS)
def test_every_arm_computes_something_of_its_own(key):
    """What it changes in the model shows in a step; the rest is changed in train."""
    arm = ARMS[key]
    loss, gradient = step_of(arm)
    assert abs(loss) < 1e4
    assert 0 < gradient < 1e6
    in_training = ["without_colour", "v2_views", "decayed_predictor", "trained_patches"]
    in_training.append("cosine_schedule")
    flags = {"--ema-momentum", "--lr"} & {*arm.flags}
    if arm.change and arm.change not in in_training and not flags:
        assert (loss, gradient) != step_of(Arm(arm.method, arm.flags))


def test_parts_that_are_replaced_in_training():
    script = fresh("simclr")
    findings.without_colour(script)
    views = script.build_views(small_args(script))
    assert all(view.jitter_p == view.grayscale == view.solarize == 0 for view in views)

    script = fresh("simsiam")
    args = small_args(script, epochs=4)
    plain = script.learning_rate
    findings.decayed_predictor(script)
    for epoch in (0.5, 2.5):
        assert script.learning_rate(args, epoch) == plain(args, epoch)  # the encoder's
        assert script.learning_rate(args, 0) == plain(args, epoch)  # the predictor's, right after

    script = fresh("moco_v3")
    findings.trained_patches(script)
    model = script.MoCo(small_args(script))
    assert model.encoder_q.backbone.conv_proj.weight.requires_grad
    assert not model.encoder_k.backbone.conv_proj.weight.requires_grad

    script = fresh("moco_v1")
    findings.v2_views(script)
    assert script.build_views(small_args(script))[0].jitter == (0.4, 0.4, 0.4, 0.1)

    script = fresh("moco_v1")
    args = small_args(script, epochs=10)
    findings.cosine_schedule(script)
    halfway = script.learning_rate(args, 5)
    assert halfway == pytest.approx(script.learning_rate(args, 0) / 2)  # the steps are still at 1


def summary(mean, error):
    return {"mean": mean, "error": error}


@pytest.mark.parametrize(
    "means, errors, expected",
    [
        ((50, 45), (1, 1), "holds"),
        ((50, 48), (1, 1), "too close to tell"),
        ((45, 50), (1, 1), "does not hold here"),
        ((50, 45), (3, 0), "too close to tell"),
    ],
)
def test_verdict_on_a_pair(means, errors, expected):
    found = {name: summary(*both) for name, both in zip("ab", zip(means, errors))}
    judged = findings.judge((("a", "b"),), found)
    assert judged[0]["gap"] == means[0] - means[1]
    assert judged[0]["error"] == pytest.approx((errors[0] ** 2 + errors[1] ** 2) ** 0.5)
    assert findings.verdict(judged) == judged[0]["verdict"] == expected


def test_verdict_on_several():
    def verdict(*compare):
        return findings.verdict(findings.judge(compare, found))

    found = {"a": summary(50, 1), "b": summary(40, 1), "c": summary(50.5, 1), "d": None}
    assert verdict(("a", "b"), ("a", "c")) == "too close to tell"
    assert verdict(("a", "b"), ("b", "a")) == "does not hold here"
    assert verdict(("b", "a"), ("a", "d")) == "not measured"
    found = {"a": summary(48, 1), "b": summary(50, 1), "c": summary(30, 1), "d": summary(50, 1)}
    assert verdict(("a", "b", "c", "d")) == "holds"  # 2 lost against 20
    assert verdict(("c", "d", "a", "b")) == "does not hold here"


def test_summary_of_an_arm():
    arm = Arm("simclr")
    runs = {}
    for seed, value in enumerate((40.0, 42.0, 44.0)):
        line = {"linear_top1": value, "knn_top1": 30.0, "random_linear_top1": 20.0, "std": 0.9}
        runs[arm.key(seed)] = line
    found = findings.summary(arm, runs, spread=5.0)
    assert found["mean"] == 42.0
    assert found["std"] == 2.0
    assert found["random_mean"] == 20.0
    assert found["error"] == pytest.approx(2 / 3**0.5)
    one = findings.summary(replace(arm, seeds=(0,)), runs, spread=5.0)
    assert one["std"] is None
    assert one["error"] == 5.0  # unknown for one seed, so that of the others
    del runs[arm.key(2)]
    assert findings.summary(arm, runs, spread=5.0) is None


def test_a_missing_run_is_made_and_recorded_once(folder, tmp_path, monkeypatch):
    """The arm's own metric as well; a second call finds nothing to do."""
    small = common.load_images(str(folder))
    monkeypatch.setattr(findings, "load_part", lambda data: small)
    monkeypatch.setattr(findings, "EPOCHS", 1)
    monkeypatch.setattr(findings, "RUNS", tmp_path / "runs.jsonl")
    arm = Arm("simclr", ("--batch-size", "16"), "no_head", seeds=(0,))
    both = Finding("x", "", "", {}, {"a": arm, "b": arm}, (("a", "b"),))
    assert list(findings.missing([both])) == ["simclr --batch-size 16 no_head seed=0"]
    own = SimpleNamespace(import_module=fresh)  # train changes the script, which tests share
    monkeypatch.setattr(findings, "importlib", own)
    line = findings.train(arm, 0, str(folder), tmp_path / "run")
    assert 0 <= line["linear_top1"] <= 100
    findings.RUNS.write_text(json.dumps(line) + "\n")
    assert not findings.missing([both])


def test_composites_hold_the_images_that_their_labels_say(monkeypatch):
    images, labels = common.patterns(80)
    images[:] = labels.view(-1, 1, 1, 1)  # an image shows its label
    part = common.Data("small", images, (images, labels), (images[:40], labels[:40]))
    monkeypatch.setattr(findings, "load_part", lambda data: part)
    composites = findings.load_composites("")
    assert composites.pretrain.shape == (20, 3, 64, 64)
    for pictures, classes in composites.labelled:
        shown = pictures[:, 0, ::32, ::32].flatten(1)  # a pixel per quarter
        assert torch.equal(shown.long(), classes)
        halves = pictures[:, :, 16::32, 16::32]
        assert torch.equal(halves[:, 1].flatten(1).long(), classes)


def test_cells_are_judged_after_training_and_before(folder, tmp_path, monkeypatch):
    small = common.load_images(str(folder))
    monkeypatch.setattr(findings, "load_part", lambda data: small)
    monkeypatch.setattr(findings, "EPOCHS", 1)
    own = SimpleNamespace(import_module=fresh)
    monkeypatch.setattr(findings, "importlib", own)
    flags = ("--size", "64", "--batch-size", "4", "--queue-size", "8")
    arm = Arm("densecl", flags, metric="cell_top1", composites=True)
    line = findings.train(arm, 3, "", tmp_path / "run")
    script = fresh("densecl")
    args = script.parse_args(flags)
    for seed, same in ((3, True), (4, False)):
        torch.manual_seed(seed)
        backbone = model_class(script)(args).backbone
        found = findings.cell_top1(backbone, script, args, "")
        assert (found == line["random_cell_top1"]) == same
    model = model_class(script)(args)
    model.load_state_dict(checkpoint_of(tmp_path / "run")["model"])
    assert findings.cell_top1(model.backbone, script, args, "") == line["cell_top1"]


def test_cells_are_where_they_are_in_the_picture():
    """From left to right, then from top to bottom; a change far away does not reach a cell."""
    script = fresh("densecl")
    args = script.parse_args(["--size", "64"])
    view = script.build_views(args)[0]
    backbone = script.build_backbone(args)
    pictures = torch.zeros(2, 3, 64, 64, dtype=torch.uint8)
    pictures[1, :, :16, 48:] = 255
    h = findings.map_of(backbone, view, pictures)
    assert h.shape == (2, 64, backbone.dim)
    change = (h[1] - h[0]).norm(dim=1).view(8, 8)
    assert change[0, 7] > 0
    assert change[7, 0] == 0


def test_every_finding_is_well_formed():
    assert len({finding.key for finding in FINDINGS}) == len(FINDINGS)
    for finding in FINDINGS:
        assert finding.key.split(".")[0] in METHODS
        for names in finding.compare:
            assert len(names) in (2, 4)
            assert {*names} <= finding.arms.keys(), finding.key


def test_findings_are_made_from_the_recorded_runs():
    assert json.loads(findings.TABLE.read_text()) == findings.make_table()
    for key in findings.read_runs():
        assert key.rpartition(" seed=")[0] in {arm.key(0)[:-7] for arm in ARMS.values()}


def test_unknown_finding(capsys):
    assert "swav.x: not one of" in error_line(capsys, findings.main, ["swav.x"])
