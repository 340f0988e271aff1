"""The notebooks show what the scripts of today do: complete, small, and executed anew."""

import ast
import asyncio
import importlib
import inspect
import json
import os
import re

import nbformat
import pytest
import torch
from conftest import ROOT, SCRIPTS
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

NOTEBOOKS = sorted(path.stem for path in (ROOT / "notebooks").glob("*.ipynb"))
PARTS = ("## The views", "What goes wrong", "## What changed from its parent", "## Exercises",
         "## Is my loss normal?")


def notebook(name):
    return nbformat.read(ROOT / "notebooks" / f"{name}.ipynb", as_version=4)


def code(book):
    return [cell for cell in book.cells if cell.cell_type == "code"]


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_committed_as_it_ran(name):
    """A reader on the web sees all of it: every cell has run, in order, without an error."""
    assert (ROOT / "notebooks" / f"{name}.ipynb").stat().st_size < 2**20
    book = notebook(name)
    nbformat.validate(book)
    assert [cell.execution_count for cell in code(book)] == list(range(1, len(code(book)) + 1))
    outputs = json.dumps([cell.outputs for cell in code(book)])
    assert '"output_type": "error"' not in outputs and "Traceback" not in outputs
    assert outputs.count('"image/png"') >= 5
    assert not re.search(r"/(tmp|home|root|work|Users)/", outputs)


@pytest.mark.parametrize("name", sorted(set(NOTEBOOKS) & set(SCRIPTS)))
def test_every_walkthrough_has_its_parts_and_copies_no_function(name):
    book, script = notebook(name), importlib.import_module(name)
    prose = "\n".join(cell.source for cell in book.cells if cell.cell_type == "markdown")
    assert all(part in prose for part in PARTS)
    assert sum("answer_" in cell.source and "walk.check" not in cell.source
               for cell in code(book)) == 1
    for cell in code(book):
        assert "answer_1 = None" in cell.source or "answer_1 =" not in cell.source
        for part in ast.walk(ast.parse(cell.source)):
            if isinstance(part, ast.FunctionDef | ast.ClassDef) and part.name in vars(script):
                # a function of the script may be wrapped under its name, which then is passed on
                assert f"={name}.{part.name}" in cell.source, part.name
                assert ast.unparse(part) not in inspect.getsource(script)


def test_check_says_right_and_wrong(capsys, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "notebooks")
    walk = importlib.import_module("walkthrough")
    for right, wrong in ((0.5, 0.6), ("yes", "no"), ((2,), (1,)), (49, 7),
                         (torch.eye(2), torch.ones(2, 2))):
        for answer, said in ((None, "no answer yet"), (right, "right"), (wrong, "wrong")):
            walk.check(1, answer, lambda right=right: right)
            assert f"exercise 1: {said}" in capsys.readouterr().out


def test_training_with_of_has_the_schedule_of_the_longer_run(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "notebooks")
    walk, simsiam = (importlib.import_module(name) for name in ("walkthrough", "simsiam"))
    images, labels = walk.common.patterns(64)
    small = walk.common.Data("patterns", images, (images, labels), (images, labels), ["x"] * 10)
    monkeypatch.setattr(simsiam, "load", lambda *arguments: small)
    monkeypatch.setattr(walk, "DATA", small)
    rates = [walk.train(simsiam, of=of, epochs=2, batch_size=32).last["lr"] for of in (None, 4)]
    args = walk.settings(simsiam, epochs=4, batch_size=32)
    assert rates[1] == simsiam.learning_rate(args, 1.5) != rates[0]


@pytest.fixture(scope="module")
def executed():
    """{notebook: its cells after a run from a clean state, or the error}; two run at a time."""

    async def run(name, cores):
        book, place = notebook(name), {"metadata": {"path": str(ROOT / "notebooks")}}
        for cell in code(book):
            cell.outputs, cell.execution_count = [], None
        client = NotebookClient(book, timeout=900, kernel_name="python3", resources=place)
        async with cores:
            try:
                await client.async_execute(env={**os.environ, "OMP_NUM_THREADS": "1"})
            except CellExecutionError as error:
                return error
        return code(book)

    async def run_all():
        cores = asyncio.Semaphore(2)
        return await asyncio.gather(*(run(name, cores) for name in names))

    names = sorted(NOTEBOOKS, key=lambda name: name != "compare")  # the longest first
    return dict(zip(names, asyncio.run(run_all())))


@pytest.mark.slow
@pytest.mark.parametrize("name", NOTEBOOKS)
def test_runs_from_a_clean_state(name, executed):
    """In a kernel of its own; the figures differ from machine to machine, their number does not."""
    cells = executed[name]
    if isinstance(cells, CellExecutionError):
        raise cells
    shown = [len(cell.outputs) for cell in code(notebook(name))]
    assert [len(cell.outputs) for cell in cells] == shown
