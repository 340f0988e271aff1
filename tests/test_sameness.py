"""The scripts are made to be read side by side: one name, one body, one order, and fresh diffs."""

import ast
import importlib
import json
import subprocess
import sys
from dataclasses import fields

import pytest
from conftest import ROOT, SCRIPTS, run

TREES = {name: ast.parse((ROOT / f"{name}.py").read_text()) for name in SCRIPTS}
MODELS = {"SimCLR", "MoCo", "BYOL", "SimSiam", "BarlowTwins", "SwAV", "DenseCL"}


def definitions(name):
    source = (ROOT / f"{name}.py").read_text()
    return {
        node.name: ast.get_source_segment(source, node)
        for node in TREES[name].body
        if isinstance(node, ast.FunctionDef | ast.ClassDef)
    }


def free(name):
    """Names that may differ between scripts: the method itself and what builds it."""
    return name in MODELS | {"Args", "learning_rate", "update", "main"} or name.startswith("build_")


def test_one_name_one_body():
    bodies = {}
    for script in SCRIPTS:
        for name, source in definitions(script).items():
            if not free(name):
                bodies.setdefault(name, {}).setdefault(source, []).append(script)
    different = {name: list(forms.values()) for name, forms in bodies.items() if len(forms) > 1}
    assert not different


def test_shared_names_stand_in_one_order():
    order = {}
    for script in SCRIPTS:
        names = list(definitions(script))
        for i, first in enumerate(names):
            for second in names[i + 1 :]:
                assert (
                    script == order.setdefault((first, second), script)
                    or (second, first) not in order
                )
    assert not [pair for pair in order if pair[::-1] in order]


@pytest.mark.parametrize("name", SCRIPTS)
def test_form(name):
    source = (ROOT / f"{name}.py").read_text()
    assert len(source.splitlines()) <= 400
    assert source.index("- method\n") < source.index("- skeleton\n")
    assert source.endswith('\n\nif __name__ == "__main__":\n    main(parse_args())\n')
    doc = ast.get_docstring(TREES[name])
    for part in (
        "arXiv",
        f"python {name}.py",
        f"torchrun --nproc_per_node=8 {name}.py",
        "Read it ",
        "The paper's words -> ours",
        "Letters:",
        "Measured:",
    ):
        assert part in doc, part


@pytest.mark.parametrize("name", SCRIPTS)
def test_recipes(name):

    script = importlib.import_module(name)
    known = {field.name: field.type for field in fields(script.Args)}
    columns = script.RECIPES["recipe"]
    assert columns[:3] == ("patterns", "cifar10", "imagenet")
    for row, values in script.RECIPES.items():
        assert len(values) == len(columns), row
        assert all(type(value) is known[row] for value in values), row
    unset = {
        field.name for field in fields(script.Args) if not field.default and field.type is not bool
    }
    assert unset - {"seed", "out"} <= script.RECIPES.keys()


def test_nothing_runs_at_import():
    ran = run("-c", f"import {', '.join(SCRIPTS)}, sys; assert 'matplotlib' not in sys.modules")
    assert (ran.returncode, ran.stdout, ran.stderr) == (0, "", "")


def test_only_three_packages_at_run_time():
    for name in ["common", *SCRIPTS]:
        tree = ast.parse((ROOT / f"{name}.py").read_text())
        imports = {
            alias.name.split(".")[0]
            for node in ast.walk(tree)
            if isinstance(node, ast.Import)
            for alias in node.names
        }
        imports |= {
            node.module.split(".")[0] for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)
        }
        foreign = (
            imports
            - sys.stdlib_module_names
            - {"torch", "torchvision", "matplotlib", "PIL", "common"}
        )
        assert not foreign, (name, foreign)  # PIL comes with torchvision


def test_tables_and_diffs_are_fresh():
    ran = run("results/tables.py", "--check")
    assert ran.returncode == 0, ran.stdout


@pytest.mark.parametrize("name", SCRIPTS)
def test_the_measured_result_is_the_recorded_one(name):
    runs = json.loads((ROOT / "results" / "patterns.json").read_text())
    runs = [run for run in runs if run["method"] == name]
    linear, chance = (sum(run[key] for run in runs) / len(runs)
                      for key in ("linear_top1", "random_linear_top1"))
    said = f"Measured: {linear:.1f} % linear top-1 on patterns (random weights {chance:.1f} %)"
    assert said in ast.get_docstring(TREES[name])


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="a copy without its history")
def test_nothing_large_is_committed():
    names = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True
    ).stdout.split("\n")
    sizes = {
        name: (ROOT / name).stat().st_size for name in names if name and (ROOT / name).exists()
    }
    assert not {name: size for name, size in sizes.items() if size > 2**20}
