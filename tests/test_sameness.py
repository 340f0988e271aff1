"""The scripts are made to be read side by side: one name, one body, one order, and fresh diffs."""

import ast
import importlib
import json
import re
import subprocess
import sys

import pytest
from conftest import METHODS, ROOT, run
from results.methods import SCRIPTS, SHARED, model_class

METHOD_LINES = {"clip": 550, "up_detr": 965, "vild": 930}  # whole architectures; others: 400
DENSITY = dict.fromkeys(SHARED, 7.5)  # syntax nodes per line; scripts: 7.2
FREE = {
    "learning_rate",
    "train",
    "draw_report",
    "main",
}  # may differ between papers, as may models and build_*
LOSSES = {
    "nt_xent",
    "contrastive_loss",
    "regression_loss",
    "negative_cosine",
    "barlow_loss",
    "swapped_prediction",
    "sinkhorn",
    "match",
    "dense_info_nce",
}  # not info_nce, which is one loss in three scripts
FREE_IN = {
    ("simclr", "LARS"),  # applies the learning rate before the momentum
    ("clip", "parse_args"),  # has flags for uses other than training
    ("up_detr", "parse_args"),
    ("vild", "parse_args"),
}
USES = {"zero-shot", "distillation", "detection", "data"}  # headings of some scripts alone
COLUMNS = (28, 40, 52, 64)  # where a row's values and its help begin, with three recipes
DOCSTRING = (
    "arXiv ",
    "    python {name}.py ",
    "    torchrun --nproc_per_node=8 {name}.py ",
    "\nRead ",
    "\nShapes: ",
    "\nMeasured: ",
)


def source_of(name):
    return (ROOT / f"{name}.py").read_text()


TREES = {name: ast.parse(source_of(name)) for name in (*SHARED, *SCRIPTS)}


def definitions(name):
    """{name: source} of the functions and classes at the top of a script, in their order."""
    source = source_of(name)
    found = {}
    for node in TREES[name].body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            start = min([node.lineno, *(d.lineno for d in node.decorator_list)])
            found[node.name] = "\n".join(source.splitlines()[start - 1 : node.end_lineno])
    return found


def settings(name):
    """The table SETTINGS of a script: {name of a row: its tuple in the syntax tree}."""
    for node in TREES[name].body:
        if isinstance(node, ast.Assign) and node.targets[0].id == "SETTINGS":
            return {key.value: row for key, row in zip(node.value.keys, node.value.values)}


def bodies_by_name(scripts):
    """{name: {source: scripts}} of all definitions that have to be the same everywhere."""
    bodies = {}
    for script, found in scripts.items():
        for name, source in found.items():
            if name in FREE | LOSSES or name.startswith("build_") or (script, name) in FREE_IN:
                continue
            bodies.setdefault(name, {}).setdefault(source, []).append(script)
    return bodies


def test_one_name_one_body():
    scripts = {}
    for name in SCRIPTS:
        scripts[name] = definitions(name)
        scripts[name].pop(model_class(importlib.import_module(name)).__name__)
    different = {}
    for name, forms in bodies_by_name(scripts).items():
        if len(forms) > 1:
            different[name] = list(forms.values())
    assert not different


@pytest.mark.parametrize("names_of", [definitions, settings])
def test_shared_names_are_in_one_order(names_of):
    before = {}  # {(first, second): the scripts in which they stand like this}
    for script in SCRIPTS:
        names = list(names_of(script))
        for i, first in enumerate(names):
            for second in names[i + 1 :]:
                before.setdefault((first, second), []).append(script)
    both = {pair: scripts for pair, scripts in before.items() if pair[::-1] in before}
    assert not both


@pytest.mark.parametrize("name", SCRIPTS)
def test_settings(name):
    rows = settings(name)
    assert next(iter(rows)) == "recipe"
    recipes = [value.value for value in rows["recipe"].elts[:-1]]
    if name in METHODS:
        assert recipes[:3] == ["patterns", "cifar10", "imagenet"]
    for row, values in rows.items():
        *values, text = ast.literal_eval(values)
        assert len(values) == len(recipes), row
        assert {type(value) for value in values} in ({str}, {int}, {float}), row
        assert isinstance(text, str), row
        assert text or row == "recipe", row
        fits = all(len(str(value)) < 10 for value in values)  # into the columns
        if len(recipes) == 3 and fits:
            assert tuple(value.col_offset for value in rows[row].elts) == COLUMNS, row


@pytest.mark.parametrize("name", SCRIPTS)
def test_form(name):
    source = source_of(name)
    lines = source.splitlines()
    assert len(lines) <= METHOD_LINES.get(name, 400)
    headings = [line.split()[-1] for line in lines if line.startswith("# ------")]
    headings = [heading for heading in headings if heading not in USES]
    assert headings == ["method", "training", "skeleton"]
    assert source.endswith('\n\nif __name__ == "__main__":\n    main(parse_args())\n')
    doc = ast.get_docstring(TREES[name])
    for part in DOCSTRING:
        assert part.format(name=name) in doc, part


def density(tree, source):
    """Syntax nodes per line of code, which is neither blank, comment nor docstring."""
    with_docstring = ast.Module | ast.ClassDef | ast.FunctionDef
    documented = set()
    for node in ast.walk(tree):
        if isinstance(node, with_docstring) and ast.get_docstring(node):
            documented |= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    lines = 0
    for number, line in enumerate(source.splitlines(), 1):
        text = line.strip()
        if text and not text.startswith("#") and number not in documented:
            lines += 1
    small = (ast.Load, ast.Store, ast.Del, ast.operator, ast.cmpop, ast.unaryop, ast.boolop)
    nodes = [node for node in ast.walk(tree) if not isinstance(node, small)]
    return len(nodes) / lines


@pytest.mark.parametrize("name", TREES)
def test_lines_are_not_pressed(name):
    assert density(TREES[name], source_of(name)) <= DENSITY.get(name, 7.2)


@pytest.mark.parametrize("name", ["common", "harness", "captions", "scenes"])
def test_shared_modules_name_no_method(name):
    source = source_of(name)
    assert not set(re.findall(r"\w+", source)) & set(METHODS)
    assert name == "captions" or "clip.py" not in source  # captions.py says whose it is


def test_nothing_runs_at_import():
    modules = ", ".join(TREES)
    ran = run("-c", f"import {modules}, sys; assert 'matplotlib' not in sys.modules")
    assert (ran.returncode, ran.stdout, ran.stderr) == (0, "", "")


def imports(tree):
    """The packages and modules that a program imports, also within its functions."""
    names = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        if isinstance(node, ast.ImportFrom):
            names.append(node.module)
    return {name.split(".")[0] for name in names}


@pytest.mark.parametrize("name", TREES)
def test_only_three_packages_and_two_modules(name):
    known = {"torch", "torchvision", "matplotlib", "PIL"}  # PIL comes with torchvision
    known |= {"common", "harness"}  # but no script imports another
    known |= {"clip", "evaluate"} if name == "vild" else set()  # it distils clip.py
    known |= {"captions"} if name in ("clip", "vild", "evaluate") else set()
    known |= {"scenes"} if name in ("up_detr", "vild", "common") else set()
    assert not imports(TREES[name]) - sys.stdlib_module_names - known


def test_tables_and_diffs_are_fresh():
    ran = run("-m", "results.tables", "--check")
    assert ran.returncode == 0, ran.stdout + ran.stderr


def mean(runs, key):
    return sum(run[key] for run in runs) / len(runs)


@pytest.mark.parametrize("name", METHODS)
def test_the_measured_result_is_the_recorded_one(name):
    runs = recorded("patterns", name)
    linear = mean(runs, "linear_top1")
    start = mean(runs, "random_linear_top1")
    said = f"Measured: {linear:.1f} % linear top-1 on patterns (random weights {start:.1f} %), "
    said += f"mean of {len(runs)} seeds."
    assert said in ast.get_docstring(TREES[name])


def recorded(series, arm):
    """The runs of one arm of what results/series.py records."""
    path = ROOT / "results" / f"{series}.jsonl"
    return [run for run in map(json.loads, path.read_text().splitlines()) if run["arm"] == arm]


def test_the_measured_result_of_clip_is_the_recorded_one():
    runs = recorded("zero_shot", "transformer")
    found = mean(runs, "zero_shot_top1")
    start = mean(runs, "random_zero_shot_top1")
    said = f"Measured: {found:.1f} % zero-shot top-1 on patterns (random weights {start:.1f} %), "
    said += f"mean of {len(runs)} seeds."
    assert said in ast.get_docstring(TREES["clip"]).replace("\n", " ")


def test_the_measured_result_of_vild_is_the_recorded_one():
    runs = recorded("open_vocabulary", "ViLD")
    novel = mean(runs, "novel_ap50")
    base = mean(runs, "base_ap50")
    text = mean(recorded("open_vocabulary", "ViLD-text"), "novel_ap50")
    said = f"Measured: {novel:.1f} % AP50 of novel names on scenes (ViLD-text {text:.1f} %), "
    said += f"{base:.1f} % of base names, mean of {len(runs)} seeds."
    assert said in ast.get_docstring(TREES["vild"]).replace("\n", " ")


def test_the_measured_result_of_up_detr_is_the_recorded_one():
    runs = recorded("pretraining", "random patches")
    found = mean(runs, "ap50")
    scratch = mean(runs, "scratch_ap50")
    said = f"Measured: {found:.1f} % AP50 after fine-tuning on 300 scenes (from scratch "
    said += f"{scratch:.1f} %), mean of {len(runs)} seeds."
    assert said in ast.get_docstring(TREES["up_detr"]).replace("\n", " ")


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="a copy without its history")
def test_nothing_large_is_committed():
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    paths = [ROOT / name for name in listed.stdout.split("\0") if name]
    assert len(paths) > 50
    paths = [path for path in paths if path.parent.name != "weights"]  # see test_weights.py
    large = [path.name for path in paths if path.exists() and path.stat().st_size > 2**20]
    assert not large
