"""The programs in results/ do on a small setting what they do on the large one."""

import importlib
import itertools
import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from conftest import METHODS, ROOT, error_line, small_args

import common
import harness
from results import cifar10, methods, series, steps, tables

PARENTS = {
    "barlow": "simclr",
    "byol": "simclr",
    "densecl": "moco_v2",
    "moco_v1": "simclr",
    "moco_v2": "moco_v1",
    "moco_v3": "byol",
    "simclr": None,
    "simsiam": "byol",
    "swav": "simclr",
}
LOSSES = {  # the functions whose time counts as the loss's
    "barlow": ["barlow_loss"],
    "byol": ["regression_loss"],
    "densecl": ["dense_info_nce", "info_nce", "match"],
    "moco_v1": ["info_nce"],
    "moco_v2": ["info_nce"],
    "moco_v3": ["contrastive_loss"],
    "simclr": ["nt_xent"],
    "simsiam": ["negative_cosine"],
    "swav": ["sinkhorn", "swapped_prediction"],
}


# ------------------------------------------------------------------------------------- methods
def test_every_script_is_a_method():
    """All of the root but what they share; some see more than views of images."""
    there = {path.stem for path in ROOT.glob("*.py")}
    assert there == {*methods.SCRIPTS, *methods.SHARED} & there
    assert set(methods.SCRIPTS) - set(METHODS) <= {"clip", "up_detr", "vild"}


def test_parents():
    """Each of the known methods has the parent we expect; a new one has one of the methods."""
    found = {name: methods.parent(name) for name in methods.METHODS}
    assert found | PARENTS == found
    assert set(found.values()) <= {None, *methods.METHODS}


def test_the_model_and_its_optimizer_are_those_of_train(script, monkeypatch):
    """Class, parameters of each group, momentum and weight decay."""
    images = torch.zeros(64, 3, 32, 32, dtype=torch.uint8)
    monkeypatch.setattr(script, "load_images", lambda *_: common.Data("none", images))
    there = []

    def stop(args, model, optimizer, views):
        there.extend([model, optimizer])
        raise KeyboardInterrupt

    monkeypatch.setattr(harness, "Run", stop)
    args = small_args(script)
    with pytest.raises(KeyboardInterrupt):
        script.train(args)
    model = methods.model_class(script)(args)
    optimizer = methods.build_optimizer(script, args, model)
    assert type(model) is type(there[0])
    assert type(optimizer) is type(there[1])
    assert groups(model, optimizer) == groups(*there)


def groups(model, optimizer):
    """What an optimizer does to which parameters of the model."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    found = []
    for group in optimizer.param_groups:
        rest = {key: value for key, value in group.items() if key not in ("params", "lr")}
        found.append(([names[p] for p in group["params"]], rest))
    return found


def test_a_step_is_finished_as_in_train(script):
    args = small_args(script, queue_size=32)
    model = methods.model_class(script)(args)
    views = methods.views_of(args, 16)
    assert [view.shape for view in views[:2]] == [(16, 3, 32, 32)] * 2
    assert len(views) == 2 + vars(args).get("small_crops", 0)
    assert all(view.is_contiguous(memory_format=torch.channels_last) for view in views)
    assert all(torch.equal(a, b) for a, b in zip(views, methods.views_of(args, 16)))
    loss, z = model(*views)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(1.0)
    methods.finish_step(script, model, z, momentum=0.0)
    if "ema_update" in vars(script):
        target = model.encoder_k if hasattr(model, "encoder_k") else model.target_encoder
        online = model.encoder_q if hasattr(model, "encoder_q") else model.encoder
        assert all(torch.equal(p, q) for p, q in zip(target.parameters(), online.parameters()))
    if hasattr(model, "prototypes"):
        assert torch.equal(model.queue[:16, 0], z[:16])


# -------------------------------------------------------------------------------------- series
def test_arms_of_a_series_can_be_run():
    """Their flags are known, their changes are functions, and no two have one name."""
    for arms in series.SERIES.values():
        assert len({arm.name for arm in arms}) == len(arms)
        for arm in arms:
            script = importlib.import_module(arm.script)
            script.parse_args([*arm.flags, "--seed", "2"])
            assert not arm.change or callable(getattr(series, arm.change))


def arms_of(name, key="arm"):
    """{arm: lines} of results/<name>.jsonl."""
    arms = {}
    for line in map(json.loads, (ROOT / "results" / f"{name}.jsonl").read_text().splitlines()):
        arms.setdefault(line[key], []).append(line)
    return arms


def in_errors(better, worse):
    """The difference of the means in standard errors."""
    a = torch.tensor(better)
    b = torch.tensor(worse)
    error = (a.var() / len(a) + b.var() / len(b)).sqrt()
    return ((a.mean() - b.mean()) / error).item()


def test_what_is_said_of_pretraining_is_what_was_measured():
    """Each comparison in results/README.md exceeds twice its standard error."""
    arms = arms_of("pretraining")

    def gap(better, worse, key="ap50", other=None):
        a = [line[key] for line in arms[better]]
        return in_errors(a, [line[other or key] for line in arms[worse]])

    ours = "random patches"
    assert gap(ours, ours, "ap50", "scratch_ap50") > 2
    assert gap(ours, ours, "third_ap50", "scratch_third_ap50") > 2
    assert abs(gap(ours, ours, "pretext_share", "pretext_other_share")) < 2
    for arm in ("without reconstruction", "patches of another image"):
        assert gap(ours, arm, "scratch_ap50", "ap50") > 2
    assert gap("scratch, seven times the epochs", ours, "scratch_ap50", "ap50") > 2
    assert gap("CNN of moco_v2.py", "CNN of densecl.py") > 2


def test_what_is_said_of_open_vocabulary_is_what_was_measured():
    """Better or worse: by more than twice the standard error; not to be told apart: by less."""
    arms = arms_of("open_vocabulary")

    def values(arm, key):
        return [line[key] for line in arms[arm]]

    novel = {arm: values(arm, "novel_ap50") for arm in arms}
    both = "ViLD-ensemble"
    guess = values(both, "guess_novel_ap50")
    image_head = values(both, "image_novel_ap50")
    by_clip = values(both, "teacher_novel_ap50")
    assert in_errors(novel["ViLD"], novel["ViLD-text"]) > 2
    assert abs(in_errors(novel["ViLD-text"], guess)) < 2
    assert in_errors(values("ViLD-text", "base_ap"), values("ViLD", "base_ap")) > 2
    assert in_errors(values(both, "base_ap"), values("ViLD", "base_ap")) > 2
    assert in_errors(novel["ViLD"], by_clip) > 2
    assert abs(in_errors(novel[both], image_head)) < 2
    assert in_errors(novel["ViLD"], novel[both]) > 2
    assert in_errors(novel["all ten names labelled"], novel["ViLD"]) > 2
    for line in arms["ViLD"]:
        assert line["teacher_seconds"] > 3 * line["detection_seconds"]


def test_what_is_said_of_few_labels_is_what_was_measured():
    """Better than from scratch: by more than twice the standard error; not better: by less."""
    path = ROOT / "results" / "few_labels.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]

    def gain(method, epochs, labels, steps):
        """Over a supervised network, in standard errors."""
        ours = {"method": method, "epochs": epochs, "labels": labels, "steps": steps}
        scratch = {"method": "random weights", "labels": labels, "steps": 600}
        both = []
        for wanted in (ours, scratch):
            wanted["data"] = "cifar10-jpeg"
            both.append([line["top1"] for line in lines if wanted.items() <= line.items()])
            assert len(both[-1]) == 3
        return in_errors(*both)

    throughout = []
    for name in methods.METHODS:
        if all(gain(name, 20, labels, 0) > 2 for labels in (1, 3, 10, 100)):
            throughout.append(name)
    assert throughout == ["simclr", "swav"]
    for labels in (1, 3, 10, 100):
        assert (gain("moco_v2", 20, labels, 600) > 2) == (labels >= 3)
        assert (gain("moco_v2", 5, labels, 600) > 2) == (labels == 100)


def test_the_laptop_has_run_every_method_with_the_same_settings():
    """Of each one run, of which the table has a row; and three of the supervised network."""
    path = ROOT / "results" / "laptop.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert sorted(line["method"] for line in lines) == methods.METHODS
    assert {(line["data"], line["epochs"], line["seed"]) for line in lines} == {
        ("cifar10-jpeg", 20, 0)
    }
    for line in lines:
        assert line["linear_top1"] > line["random_linear_top1"] + 10
        assert 33 < line["random_linear_top1"] < 38  # about a third, as a notebook says
        assert 14 < line["seconds"] / 60 < 60
    lines = (ROOT / "results" / "few_labels.jsonl").read_text().splitlines()
    wanted = {"data": "cifar10-jpeg", "labels": 0, "steps": 4000}
    runs = [line for line in map(json.loads, lines) if wanted.items() <= line.items()]
    assert [line["seed"] for line in runs] == [0, 1, 2]


def test_the_order_on_photographs_is_another():
    """The gap that compare.ipynb names, on both kinds of images, against twice the spread of seeds;
    that on photographs is known from the findings."""
    patterns = {}
    for name, lines in arms_of("patterns", "method").items():
        patterns[name] = torch.tensor([line["linear_top1"] for line in lines])
    lines = (ROOT / "results" / "laptop.jsonl").read_text().splitlines()
    photographs = {line["method"]: line["linear_top1"] for line in map(json.loads, lines)}
    here = max(patterns, key=lambda name: patterns[name].mean())
    there = max(photographs, key=photographs.get)
    spread = max(patterns[here].std(), patterns[there].std())
    assert patterns[here].mean() - patterns[there].mean() > 2 * spread
    entries = json.loads((ROOT / "results" / "findings.json").read_text())
    stds = {}
    for entry in entries:
        for arm in entry["arms"].values():
            if arm["found"] and arm["found"]["std"] is not None:
                stds.setdefault(entry["key"].split(".")[0], []).append(arm["found"]["std"])
    spread = max(stds[here] + stds[there])
    assert photographs[there] - photographs[here] > 2 * spread


def test_what_is_said_of_the_patterns_is_what_was_measured():
    arms = arms_of("patterns", "method")
    values = {name: [line["linear_top1"] for line in lines] for name, lines in arms.items()}
    assert all(len(found) == 3 for found in values.values())
    assert [name for name, found in values.items() if torch.tensor(found).std() > 3] == ["swav"]


def test_a_run_of_a_series_is_that_of_the_script(folder, tmp_path):
    script = importlib.import_module("simclr")
    flags = ("--data", str(folder), "--epochs", "1", "--batch-size", "16", "--workers", "0")
    flags += ("--recipe", "patterns")
    line = series.train(series.Arm("as it is", "simclr", flags), 3, tmp_path / "series")
    words = [*flags, "--seed", "3", "--out", str(tmp_path / "script")]
    result = script.main(script.parse_args(words))
    for part in ("seconds", "images_per_second"):
        del line[part], result[part]
    assert line == {"arm": "as it is", **result}


def test_captions_are_shuffled_for_the_control(monkeypatch):
    captions = [str(number) for number in range(100)]
    loaded = SimpleNamespace(captions=captions.copy())
    script = SimpleNamespace(load_captions=lambda name: loaded)
    series.shuffle_captions(script)
    found = script.load_captions("patterns").captions
    assert sorted(found, key=int) == captions
    assert sum(a == b for a, b in zip(found, captions)) < 10


def test_a_series_runs_what_is_missing(tmp_path, monkeypatch, capsys):
    def run(name, number, seed, runs, data):
        return json.dumps({"arm": series.SERIES[name][number].name, "seed": seed}) + "\n"

    monkeypatch.setattr(series, "FOLDER", tmp_path)
    monkeypatch.setattr(series, "run", run)
    known = {"arm": series.SERIES["zero_shot"][1].name, "seed": 2}
    (tmp_path / "zero_shot.jsonl").write_text(json.dumps(known) + "\n")
    series.main(["zero_shot"])
    lines = (tmp_path / "zero_shot.jsonl").read_text().splitlines()
    found = {(line["arm"], line["seed"]) for line in map(json.loads, lines)}
    assert len(lines) == len(found) == len(series.SERIES["zero_shot"]) * len(series.SEEDS)
    assert series.missing("zero_shot") == []
    series.main(["zero_shot"])
    assert (tmp_path / "zero_shot.jsonl").read_text().splitlines() == lines
    assert "recorded" in capsys.readouterr().out


# ------------------------------------------------------------------------------------- cifar10
def test_a_line_for_each_run(folder, tmp_path, capsys):
    lines = tmp_path / "results" / "cifar10.jsonl"
    command = ["simclr", "--data", str(folder), "--runs", str(tmp_path / "runs")]
    command += ["--lines", str(lines), "--seeds", "3"]
    command += ["--arch=thin", "--batch-size=16", "--epochs=1", "--workers=0"]
    cifar10.main(command)
    assert "simclr-small-3" in capsys.readouterr().out
    cifar10.main(command)
    assert "has its line already" in capsys.readouterr().out
    recorded = lines.read_text().splitlines()
    assert len(recorded) == 1
    line = json.loads(recorded[0])
    out = next((tmp_path / "runs").glob("simclr-small-3*"))
    result = json.loads((out / "result.json").read_text())
    assert line["seed"] == 3
    assert line["settings"]["arch"] == "thin"
    assert line["settings"]["recipe"] == "cifar10"
    assert line["knn200_top1"] == result["knn_top1"]
    assert line["linear_top1"] == result["linear_top1"]
    assert line["knn10_top1"] == knn_of_ten(folder, out)
    assert line["device"] == "cpu"
    assert line["minutes"] * 60 == pytest.approx(result["seconds"])
    assert line["tflops"] > 0
    assert line["share"] is None
    row = tables.one_gpu([line], "").splitlines()[-1]
    assert row.startswith("| [simclr](simclr.py) | small | thin | 1 | 16 | 1 |")


def knn_of_ten(folder, out):
    script = importlib.import_module("simclr")
    args = script.parse_args(["--recipe", "cifar10", "--arch", "thin"])
    backbone = script.build_backbone(args)
    backbone.load_state_dict(torch.load(out / "backbone.pt", weights_only=True))
    data = common.load_images(str(folder))
    view = script.build_views(args)[0]
    return common.linear_eval(backbone, data, view, "cpu", classifier=False, k=10)["knn_top1"]


def test_operations_are_those_of_the_literature():
    """ResNet-18 on 32 pixels: 0.557 10^9 multiply-adds forward, and twice as many backward."""
    script = importlib.import_module("simclr")
    args = script.parse_args(["--recipe", "cifar10"])
    per_view = 3 * 2 * 0.557e-3
    assert cifar10.tera_operations(script, args) == pytest.approx(2 * per_view, rel=0.01)
    assert args.batch_size == 512  # the settings remain as they were
    assert cifar10.bf16_peak("NVIDIA H200") == 989
    assert cifar10.bf16_peak("cpu") is None


# --------------------------------------------------------------------------------------- steps
def test_the_losses_are_found():
    found = {name: steps.losses(importlib.import_module(name)) for name in methods.METHODS}
    assert found | LOSSES == found
    assert all(found.values())


def test_the_clock_counts_each_second_once(monkeypatch):
    """A forward pass of 6 s, of which a loss takes 5, of which the queue takes 3."""
    clock = steps.Clock()
    time = [0.0]
    monkeypatch.setattr(steps, "now", lambda: time[0])

    def wait(seconds):
        time[0] += seconds

    queue = clock.timed("EMA, queue", lambda: wait(3))

    def loss_and_queue():
        wait(2)
        queue()

    loss = clock.timed("loss", loss_and_queue)

    def all_of_it():
        loss()
        wait(1)

    clock.timed("forward", all_of_it)()
    clock.timed("optimizer", wait)(0.5)
    spent = {"forward": 1, "loss": 2, "EMA, queue": 3, "optimizer": 0.5}
    assert clock.spent == dict.fromkeys(steps.PARTS, 0) | spent


def test_parts_of_a_step(tmp_path, monkeypatch):
    """With a clock that advances by a second whenever it is read, so that every call counts as one
    second, and as one more for each part within it."""
    names = ["densecl", "byol", "swav"]
    before = {name: dict(vars(importlib.import_module(name))) for name in names}
    untouched = (common.Views.__iter__, torch.Tensor.backward, harness.Run)
    monkeypatch.setattr(steps, "now", itertools.count().__next__)
    time_steps = steps.time_steps
    measured = []

    def recorded(*arguments):
        measured.append(time_steps(*arguments))
        return measured[-1]

    monkeypatch.setattr(steps, "time_steps", recorded)
    command = ["--batch-size", "16", "--rounds", "2", "--steps", "3", "--arch=thin"]
    steps.main([*names, *command, "--out", str(tmp_path)])
    assert [len(found) for found in measured] == [3] * 6
    densecl, byol, swav = json.loads((tmp_path / "steps.json").read_text())
    for line, found in ((densecl, measured[0]), (byol, measured[4]), (swav, measured[5])):
        assert found == [line["milliseconds"]] * 3
    assert byol["method"] == "byol"
    assert byol["milliseconds"] == {
        "views": 1000,
        "forward": 3000,  # a loss for each view is within it
        "loss": 2000,
        "EMA, queue": 1000,
        "backward": 1000,
        "optimizer": 2000,  # zero_grad and step
    }
    assert densecl["milliseconds"]["loss"] == 5000  # match, info_nce, dense_info_nce
    assert densecl["milliseconds"]["EMA, queue"] == 7000  # three times unshuffle, two queues
    assert swav["milliseconds"]["EMA, queue"] == 0  # a queue of 0 images
    assert byol["images_per_second"] == pytest.approx(16 / 10)
    assert (tmp_path / "steps.png").stat().st_size > 10_000
    for name in names:  # what was timed is as it was
        assert vars(importlib.import_module(name)) == before[name]
    assert untouched == (common.Views.__iter__, torch.Tensor.backward, harness.Run)


@pytest.mark.parametrize("program", [cifar10, steps])
def test_unknown_method(program, capsys):
    assert "simclt: not one of barlow" in error_line(capsys, program.main, ["simclt"])


# -------------------------------------------------------------------------------------- tables
@pytest.fixture
def copy(tmp_path, monkeypatch):
    """A copy of what results/tables.py reads, with a README that holds one table."""
    for name in methods.SCRIPTS:
        shutil.copy(ROOT / f"{name}.py", tmp_path)
    results = tmp_path / "results"
    shutil.copytree(ROOT / "results" / "diffs", results / "diffs")
    for path in (ROOT / "results").glob("*.json*"):
        shutil.copy(path, results)
    (results / "README.md").write_text("before\n<!-- table patterns -->\n<!-- end -->\nafter\n")
    (tmp_path / "README.md").write_text("<!-- table patterns_short -->\nold\n<!-- end -->\n")
    monkeypatch.setattr(tables, "ROOT", tmp_path)
    tables.main([])
    return tmp_path


def stale(capsys):
    """The files that --check names."""
    capsys.readouterr()
    code = 0
    try:
        tables.main(["--check"])
    except SystemExit as end:
        code = end.code
    lines = capsys.readouterr().out.splitlines()
    assert code == (1 if lines else 0)
    return {line.removeprefix("stale: ").partition(";")[0] for line in lines}


def test_tables_are_made(copy):
    lines = (copy / "results" / "patterns.jsonl").read_text().splitlines()
    runs = [json.loads(line) for line in lines]
    text = (copy / "results" / "README.md").read_text()
    assert text.startswith("before\n<!-- table patterns -->\n| method |")
    assert text.endswith("\n<!-- end -->\nafter\n")
    short = (copy / "README.md").read_text()
    assert "old" not in short
    for name in {run["method"] for run in runs}:
        values = [run["linear_top1"] for run in runs if run["method"] == name]
        mean = f"{sum(values) / len(values):.1f} ± "
        assert f"| [{name}](../{name}.py) | " in text
        assert f"| [{name}]({name}.py) | {mean}" in short


def test_the_supervised_network_and_few_labels_stand_in_the_table(copy):
    """As means of what results/few_labels.py has recorded for the same data and epochs."""
    path = copy / "results" / "few_labels.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    lines = [line for line in lines if line["data"] == "patterns"]
    text = (copy / "results" / "README.md").read_text()
    row = next(line for line in text.splitlines() if "supervised, from scratch" in line)
    for labels in (0, 1, 3):
        values = []
        for line in lines:
            if line["method"] == "random weights" and line["steps"] and line["labels"] == labels:
                values.append(line["top1"])
        assert f"{sum(values) / len(values):.1f} ± " in row
    row = next(line for line in text.splitlines() if "[byol]" in line)
    for labels in (1, 3):
        values = []
        for line in lines:
            if line["method"] == "byol" and not line["steps"] and line["labels"] == labels:
                values.append(line["top1"])
        assert f"{sum(values) / len(values):.1f} ± " in row


def test_few_labels_on_photographs_have_a_table():
    lines = []
    for labels, top1 in ((1, 20.0), (1, 22.0), (10, 40.0)):
        key = {"data": "cifar10-jpeg", "method": "moco_v2", "epochs": 25}
        lines.append({**key, "labels": labels, "seed": 0, "steps": 0, "top1": top1})
    lines.append({**lines[0], "data": "patterns", "top1": 99.0})
    lines.append({**lines[0], "labels": 0, "steps": 900, "top1": 60.0})
    lines.append({**lines[0], "method": "random weights", "epochs": 0, "steps": 600, "top1": 15.0})
    text = tables.few_labels(lines, "")
    assert "1 label per class (%) | 10 labels per class (%)" in text
    assert "| moco_v2 | 25 | a linear classifier | 21.0 ± 1.4 | 40.0 |" in text
    assert "| none: random weights |  | the network, 600 steps | 15.0 |  |" in text
    assert len(text.splitlines()) == 4


def test_stale_files_are_named_and_made_anew(copy, capsys):
    assert stale(capsys) == set()
    path = copy / "results" / "patterns.jsonl"
    runs = [json.loads(line) for line in path.read_text().splitlines()]
    runs[0]["linear_top1"] = 1.0
    path.write_text("".join(json.dumps(run) + "\n" for run in runs))
    with open(copy / "moco_v2.py", "a") as file:
        file.write("# another line\n")
    with open(copy / "densecl.py", "a") as file:
        file.write("# another line\n" * tables.LONGEST_DIFF)  # nobody would read this diff
    expected = {"README.md", "results/README.md", "results/diffs/moco_v1--moco_v2.diff"}
    expected.add("results/diffs/moco_v2--densecl.diff")
    assert stale(capsys) == expected
    tables.main([])
    assert stale(capsys) == set()
    assert "+# another line\n" in (copy / "results/diffs/moco_v1--moco_v2.diff").read_text()
    assert not (copy / "results/diffs/moco_v2--densecl.diff").exists()


def test_a_table_without_runs_is_an_error(copy, capsys):
    (copy / "README.md").write_text("<!-- table cifar10 -->\n<!-- end -->\n")
    assert "no file results/cifar10.json" in error_line(capsys, tables.main, [])
    (copy / "README.md").write_text("<!-- table patern -->\n<!-- end -->\n")
    assert "patern -->: not one of" in error_line(capsys, tables.main, [])


def test_every_diff_is_of_a_method_and_its_parent():
    for path in tables.diffs():
        parent, _, child = path.stem.partition("--")
        assert parent == methods.parent(child)
