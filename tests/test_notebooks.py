"""The notebooks show what the scripts do now: complete, small, and able to run again."""

import ast
import importlib
import inspect
import json
import os
import re
import subprocess
import sys
from collections import Counter

import exercises
import nbformat
import pytest
from conftest import ROOT
from nbclient import NotebookClient

import common
import harness
import walkthrough as walk
from results.methods import SCRIPTS

NOTEBOOKS = sorted(path.stem for path in (ROOT / "notebooks").glob("*.ipynb"))
WALKTHROUGHS = sorted(set(NOTEBOOKS) & set(SCRIPTS))
PARTS = (
    "## The problem",
    "## The method in one picture",
    "## The idea on ",
    "## The core of the script",
    " found\n",
    "## Is my loss normal?",
    "## Limits",
    "## Exercises",
)


def read(name):
    return nbformat.read(ROOT / "notebooks" / f"{name}.ipynb", as_version=4)


def code(book):
    return [cell for cell in book.cells if cell.cell_type == "code"]


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_is_committed_with_its_outputs(name):
    """For readers on the web: every cell has run, in order and without an error."""
    assert (ROOT / "notebooks" / f"{name}.ipynb").stat().st_size < 2**20
    book = read(name)
    nbformat.validate(book)
    counts = [cell.execution_count for cell in code(book)]
    assert counts == list(range(1, len(counts) + 1))
    outputs = json.dumps([cell.outputs for cell in code(book)])
    assert '"output_type": "error"' not in outputs
    assert "Traceback" not in outputs
    assert outputs.count('"image/png"') >= 4
    assert not re.search(r"/(tmp|home|root|work|Users)/", outputs)


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_its_first_code_cell_says_how_to_start(name):
    assert walk.COMMAND in code(read(name))[0].source
    assert walk.COMMAND in (ROOT / "notebooks" / "README.md").read_text()


def test_every_script_has_a_notebook():
    assert set(NOTEBOOKS) == {*SCRIPTS, "start", "compare"}


@pytest.mark.parametrize("name", WALKTHROUGHS)
def test_walkthrough_has_its_parts_in_order_and_copies_no_function(name):
    book = read(name)
    script = importlib.import_module(name)
    assert len(book.cells) <= 25
    prose = "\n".join(cell.source for cell in book.cells if cell.cell_type == "markdown")
    places = [prose.find(part) for part in PARTS]
    assert min(places) >= 0 and places == sorted(places), dict(zip(PARTS, places))
    assert f'drawings.draw("{name}")' in code(book)[0].source
    for cell in code(book):
        for part in ast.walk(ast.parse(cell.source)):
            if isinstance(part, ast.FunctionDef | ast.ClassDef) and part.name in vars(script):
                # A function of the script may be wrapped under its name, if it is passed on. An
                # exercise may ask for one.
                known = f"={name}.{part.name}" in cell.source or "exercises.check" in cell.source
                assert known
                assert ast.unparse(part) not in inspect.getsource(script)


@pytest.mark.parametrize("name", sorted({*WALKTHROUGHS, "start"} & set(NOTEBOOKS)))
def test_its_exercises_are_those_of_the_module(name):
    """All of the method's, each with its hints before it, empty, and not solved."""
    cells = read(name).cells
    found = []
    for before, cell in zip(cells, cells[1:]):
        if "exercises.check(" in cell.source:
            key = cell.source.partition('exercises.check("')[2].partition('"')[0]
            found.append(key)
            assert before.source == exercises.markdown(key)
            assert cell.source.startswith(exercises.stub(key))
            said = "".join(output.get("text", "") for output in cell.outputs)
            assert said == f"{key}: no answer yet\n"
    assert found == [key for key in exercises.EXERCISES if key.split(".")[0] == name]


@pytest.mark.parametrize("name", WALKTHROUGHS)
def test_it_draws_the_findings_of_its_paper(name):
    """As findings.json has them now: a picture for each, and the figures in it."""
    entries = json.loads((ROOT / "results" / "findings.json").read_text())
    keys = [entry["key"] for entry in entries if entry["key"].split(".")[0] == name]
    source = "\n".join(cell.source for cell in code(read(name)))
    for key in keys:
        assert f'"{key}"' in source, key


def test_findings_are_drawn(monkeypatch):
    """Each in a figure of its own: the paper's numbers, ours with their spread, the verdict."""
    drawn = []
    monkeypatch.setattr(walk.plt, "show", lambda: drawn.append(walk.plt.gcf()))
    entries = json.loads((ROOT / "results" / "findings.json").read_text())
    with walk.plt.rc_context({"figure.max_open_warning": 0}):
        walk.findings(*[entry["key"] for entry in entries])
    assert len(drawn) == len(entries)
    for figure, entry in zip(drawn, entries):
        assert entry["verdict"] in figure.get_suptitle()
        said = [text.get_text() for axis in figure.axes for text in axis.texts]
        for value in entry["paper"].values():
            assert f"{value:.1f}" in said
        gaps = figure.axes[1].get_xlabel()
        for line in entry["compare"]:
            assert line["gap"] is None or f"gap {line['gap']:+.1f} " in gaps
            named = f"{' / '.join(line['arms'])}: gap" in gaps
            assert line["gap"] is None or named == (len(line["arms"]) < len(entry["arms"]))
        for arm in entry["arms"].values():
            if arm["found"]:
                assert any(text.startswith(f"{arm['found']['mean']:.1f}") for text in said)
        walk.plt.close(figure)


def test_arms_that_are_numbers_are_drawn_in_order():
    assert walk.in_order({"256": 0, "32": 0, "1024": 0}) == ["32", "256", "1024"]
    assert walk.in_order({"0.99": 0, "0": 0, "0.9": 0}) == ["0", "0.9", "0.99"]
    assert walk.in_order({"with": 0, "2": 0}) == ["with", "2"]


def test_without_the_scripts_one_line_says_how_to_start(tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "notebooks")}
    command = [sys.executable, "-c", "import walkthrough"]
    ended = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert ended.returncode == 1
    assert walk.COMMAND in ended.stderr
    assert len(ended.stderr.splitlines()) == 1


@pytest.fixture
def simsiam(monkeypatch):
    """The script, with 64 images instead of 4,000."""
    script = importlib.import_module("simsiam")
    images, labels = common.patterns(64)
    small = common.Data("patterns", images, (images, labels), (images, labels), common.PATTERNS)
    monkeypatch.setattr(script, "load_images", lambda *arguments: small)
    return script


def test_of_gives_the_schedule_of_the_longer_run(simsiam):
    whole = walk.train(simsiam, epochs=2, batch_size=32)
    first_half = walk.train(simsiam, of=4, epochs=2, batch_size=32)
    args = walk.settings(simsiam, epochs=4, batch_size=32)
    assert first_half.last["lr"] == simsiam.learning_rate(args, 1.5)
    assert first_half.last["lr"] != whole.last["lr"]


def test_replaced_parts_are_used_and_put_back(simsiam):
    """In the usual way first; then with a loss that is always 0."""
    before = dict(vars(simsiam))
    finish = harness.Run.finish
    usual = walk.train(simsiam, probe=True, epochs=1, batch_size=32)
    without = walk.train(
        simsiam, {"negative_cosine": lambda p, z: 0 * p.sum()}, epochs=1, batch_size=32
    )
    assert usual.last["loss"] != 0
    assert without.last["loss"] == 0
    assert "linear_top1" in usual.last
    assert "linear_top1" not in without.last
    assert "knn_top1" in without.last
    assert vars(simsiam) == before
    assert harness.Run.finish is finish


def test_only_what_a_script_has_can_be_replaced(simsiam):
    """Otherwise a part that was renamed would stay in place, and nothing would go wrong."""
    with pytest.raises(AssertionError, match="simsiam has no negative_cosines"):
        walk.train(simsiam, {"negative_cosines": None}, epochs=1, batch_size=32)


@pytest.mark.parametrize("parent, child", [("moco_v1", "moco_v2"), ("simclr", "byol")])
def test_diff_shows_every_changed_line(parent, child, monkeypatch):
    shown = []
    monkeypatch.setattr(walk, "show_text", lambda title, language, text: shown.append(text))
    walk.diff(parent, child)
    lines = shown[0].splitlines()[2:]  # after the names of the two files
    found = Counter((ROOT / f"{parent}.py").read_text().splitlines())
    found.subtract(line[1:] for line in lines if line.startswith("-"))
    found.update(line[1:] for line in lines if line.startswith("+"))
    assert +found == Counter((ROOT / f"{child}.py").read_text().splitlines())


def kinds(cell):
    """What a cell shows. On a busy machine torch may warn on stderr, which is printed instead."""
    found = []
    for output in cell.outputs:
        if output.get("name") == "stderr":
            print(output["text"])
        else:
            found.append(output["output_type"])
    return found


@pytest.mark.slow
@pytest.mark.parametrize("name", NOTEBOOKS)
def test_runs_from_a_clean_state(name):
    """In a kernel of its own; its figures differ between machines, their number does not."""
    book = read(name)
    expected = [kinds(cell) for cell in code(book)]
    for cell in code(book):
        cell.outputs = []
        cell.execution_count = None
    place = {"metadata": {"path": str(ROOT / "notebooks")}}
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    client = NotebookClient(book, timeout=900, kernel_name="python3", resources=place)
    client.execute(env=environment)
    assert [kinds(cell) for cell in code(book)] == expected
