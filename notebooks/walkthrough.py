"""What the notebooks share: they train for a short while, draw, show lines of the scripts and say
whether an exercise is right. Nothing of a method is here."""

import contextlib
import importlib
import inspect
import io
import json
import math
import multiprocessing
import os
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(1, str(Path(__file__).resolve().parent.parent / "results"))
sys.path.insert(2, str(Path(__file__).resolve().parent.parent / "tests"))

import matplotlib.pyplot as plt
import torch
import torchvision
from IPython.display import Markdown, display

import common

ROOT = Path(__file__).resolve().parent.parent
plt.rcParams |= {"figure.dpi": 72, "figure.constrained_layout.use": True, "axes.titlesize": 10}
DATA = common.load("patterns")


# ------------------------------------------------------------------------- lines of the scripts
def source(thing, *only):
    """Shows the source of a function or class of a script, with line numbers; with `only`, those
    lines of it that contain one of these pieces."""
    thing = inspect.unwrap(thing)
    lines, first = inspect.getsourcelines(thing)
    shown = [f"{first + i:4d}  {line.rstrip()}" for i, line in enumerate(lines)
             if not only or any(piece in line for piece in only)]
    assert len(shown) >= max(len(only), 1), f"a line is gone: {only}"
    name = Path(inspect.getsourcefile(thing)).name
    display(Markdown(f"`{name}`, `{thing.__qualname__}`\n```python\n" + "\n".join(shown) + "\n```"))


def diff(parent, child):
    """Shows what a script changes in the one beside which it is to be read."""
    text = (ROOT / "results" / "diffs" / f"{parent}--{child}.diff").read_text()
    changed = sum(line[:1] in "+-" for line in text.splitlines()) - 2
    display(Markdown(f"`diff {parent}.py {child}.py`: {changed} lines\n```diff\n{text}```"))


# ------------------------------------------------------------------------------------- training
@dataclass
class Run:
    """A short training: its settings, its log, the trained model, and what it printed."""

    args: object
    log: list
    model: torch.nn.Module
    said: str
    seconds: float

    @property
    def last(self):
        return self.log[-1]

    @property
    def warned(self):
        return "warning: " in self.said


def settings(script, **flags):
    """The script's Args of its patterns recipe, with these flags."""
    return script.parse_args([word for name, value in flags.items()
                              for word in ("--" + name.replace("_", "-"), str(value))])


def only_knn(*arguments, classifier, **more):
    return common.linear_eval(*arguments, classifier=False, **more)


def train(script, replaced=None, probe=False, of=None, **flags):
    """Runs a script's own main on the patterns with these flags. `replaced`: {name: value} puts
    other things in place of the script's own for this run, which is how parts are removed. Without
    `probe` there is no linear evaluation and no report, which saves their seconds. With `of` these
    are the first epochs of a run of so many, with its schedules."""
    replaced = dict(replaced or {})
    for name in {"learning_rate", "ema_momentum"} & vars(script).keys() if of else ():
        function = replaced.get(name, getattr(script, name))
        replaced[name] = lambda args, epoch, function=function: function(
            replace(args, epochs=of), epoch)
    if not probe:
        replaced |= {"linear_eval": only_knn, "conclude": lambda *arguments: None}
    start, said = time.time(), io.StringIO()
    with tempfile.TemporaryDirectory() as out, mock.patch.dict(vars(script), replaced):
        args = settings(script, out=out, eval_every=1, **flags)
        with contextlib.redirect_stdout(said):
            script.main(args)
        checkpoint = common.load_checkpoint(Path(out, "checkpoint.pt"))
        log = [json.loads(line) for line in Path(out, "log.jsonl").read_text().splitlines()]
        model = script.build_model(args, len(DATA.pretrain), torch.device("cpu"))
    model.load_state_dict(checkpoint["model"])
    return Run(args, log, model, said.getvalue(), time.time() - start)


def first_epochs(name, epochs):
    torch.set_num_threads(1)
    script = importlib.import_module(name)
    return train(script, of=script.parse_args([]).epochs, epochs=epochs)


def train_all(names, epochs):
    """{name: Run} of the first epochs of these scripts' default recipes, in processes of their own:
    as many at a time as there are cores, each on one."""
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(os.cpu_count(), len(names)), spawn) as pool:
        return dict(zip(names, pool.map(first_epochs, names, [epochs] * len(names))))


def untrained(script, **flags):
    """The same network as it was before the first step of a run with these flags."""
    args = settings(script, **flags)
    torch.manual_seed(args.seed)
    return script.build_model(args, len(DATA.pretrain), torch.device("cpu"))


@torch.no_grad()
def embed(network, images, augment):
    """Outputs (N, D) in eval mode for uint8 images, as evaluation sees them."""
    network.eval()
    return torch.cat([network(augment.plain(part)) for part in images.split(250)])


# -------------------------------------------------------------------------------------- drawing
def picture(axis, images, title, columns=8):
    """A grid of images (N, 3, H, W), each scaled to its own range."""
    grid = torchvision.utils.make_grid(images.float(), columns, 1, normalize=True, scale_each=True)
    axis.imshow(grid.permute(1, 2, 0).numpy(), interpolation="nearest")
    axis.set(title=title, xticks=[], yticks=[])


def curves(runs, chance=True):
    """Loss against its chance level, kNN on held-out images, and health, over the epochs; runs:
    {name: Run}."""
    figure, (a, b, c) = plt.subplots(1, 3, figsize=(12, 3))
    for name, run in runs.items():
        log = run.log[1:]
        epochs = [line["epoch"] for line in log]
        lines = a.plot(epochs, [line["loss"] for line in log], marker=".", label=name)
        if chance and run.model.chance_loss is not None:
            a.axhline(run.model.chance_loss, color=lines[0].get_color(), linestyle=":")
        b.plot([0, *epochs], [line["knn_top1"] for line in run.log], marker=".", label=name)
        c.plot(epochs, [line["std"] for line in log], marker=".", label=name)
    a.set(title="loss; dotted: of a network that tells nothing", xlabel="epoch")
    b.set(title="kNN top-1 (%); epoch 0: random weights", xlabel="epoch", ylim=(0, 100))
    b.axhline(10, color="gray", linestyle=":")
    c.set(title="std of z: 1 is healthy, 0 has collapsed", xlabel="epoch", ylim=(0, 1.1))
    for axis in (a, b, c):
        axis.xaxis.get_major_locator().set_params(integer=True)
    a.legend()
    plt.show()


def bars(values, title, chance=None, unit="%"):
    """A bar for each of {name: number}, with the number on it."""
    figure, axis = plt.subplots(figsize=(min(12, 2 + 1.4 * len(values)), 2.8))
    drawn = axis.bar([str(name) for name in values], list(values.values()), width=0.6)
    axis.bar_label(drawn, fmt="{:.1f} " + unit)
    axis.set(title=title)
    axis.margins(y=0.15)
    if chance is not None:
        axis.axhline(chance, color="gray", linestyle=":")
    plt.show()


def table(rows, *names):
    """A table of rows with these names of columns."""
    lines = ["| " + " | ".join(names) + " |", "|" + "-|" * len(names)]
    lines += ["| " + " | ".join(str(cell) for cell in row) + " |" for row in rows]
    display(Markdown("\n".join(lines)))


# ------------------------------------------------------------------------------------ exercises
def check(number, answer, truth, tolerance=0.01):
    """Says whether the answer to an exercise is right; truth: a function, so that nothing is given
    away to whoever prints it."""
    if answer is None:
        print(f"exercise {number}: no answer yet")
        return
    expected = truth()
    if isinstance(expected, float):
        right = math.isclose(answer, expected, rel_tol=tolerance, abs_tol=tolerance)
    elif torch.is_tensor(expected):
        right = torch.is_tensor(answer) and answer.shape == expected.shape and torch.allclose(
            answer.float(), expected.float(), atol=tolerance)
    else:
        right = answer == expected
    print(f"exercise {number}: {'right' if right else 'wrong, try again'}")
