"""What the notebooks share: short trainings, finished networks, excerpts of the scripts, tables and
charts. Nothing in here belongs to a method."""

import argparse
import contextlib
import copy
import difflib
import inspect
import io
import json
import tempfile
import textwrap
import time
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import matplotlib.pyplot as plt
import torch
import torchvision
from IPython.display import Markdown, display

COMMAND = "PYTHONPATH=$PWD:$PWD/tests jupyter notebook notebooks"

try:
    import common
    import harness
    from results import weights
except ModuleNotFoundError as error:
    if error.name not in ("common", "harness"):
        raise
    raise SystemExit(
        f"the scripts are not found; in the repository's root, run: {COMMAND}"
    ) from None

ROOT = Path(common.__file__).resolve().parent
plt.rcParams |= {"figure.dpi": 110, "figure.constrained_layout.use": True, "axes.titlesize": 9.5}
DATA = common.load_images("patterns")


# ------------------------------------------------------------------------------------- excerpts
def source(thing, *only):
    """Shows the source of a function or class of a script, with line numbers; with `only`, just the
    lines that contain one of these pieces of text."""
    thing = inspect.unwrap(thing)
    lines, first = inspect.getsourcelines(thing)
    shown = []
    for number, line in enumerate(lines, first):
        if not only or any(piece in line for piece in only):
            shown.append(f"{number:4d}  {line.rstrip()}")
    assert len(shown) >= max(len(only), 1), f"{thing.__qualname__} has no line with {only}"
    name = Path(inspect.getsourcefile(thing)).name
    show_text(f"`{name}`, `{thing.__qualname__}`", "python", "\n".join(shown))


def diff(parent, child):
    """Shows what a script changes in the one it is to be read beside."""
    names = [f"{parent}.py", f"{child}.py"]
    texts = [(ROOT / name).read_text().splitlines() for name in names]
    lines = list(difflib.unified_diff(*texts, *names, n=1, lineterm=""))
    changed = sum(line[0] in "+-" for line in lines[2:])  # after the names of the two files
    show_text(f"`diff {' '.join(names)}`: {changed} lines", "diff", "\n".join(lines))


def show_text(title, language, text):
    display(Markdown(f"{title}\n```{language}\n{text}\n```"))


# ------------------------------------------------------------------------------------- training
@dataclass
class Run:
    """A short training: its settings, its log, the trained model, and what it printed."""

    args: object
    log: list  # a dictionary per epoch; [0] is the random weights
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
    """The script's settings of its patterns recipe, with these flags."""
    words = []
    for name, value in flags.items():
        words += ["--" + name.replace("_", "-"), str(value)]
    return script.parse_args(words)


def build_model(script, args):
    """The method's model, also where a notebook has put a class of its own in its place: the
    script's only module that has a chance_loss."""
    for value in vars(script).values():
        if isinstance(value, type) and issubclass(value, torch.nn.Module):
            if "chance_loss" in value.__init__.__code__.co_names:
                return value(args)


def train(script, replaced=None, probe=False, of=None, **flags):
    """Runs a script's own `main` on the patterns with these flags.

    `replaced`, {name: value}, puts other things in place of the script's own for this run; this is
    how parts are removed. Without `probe` there is no linear classifier and no report, which saves
    time. With `of`, these are the first epochs of a run of that many epochs, with its schedules."""
    replaced = dict(replaced or {})
    unknown = replaced.keys() - vars(script).keys()
    assert not unknown, f"{script.__name__} has no {', '.join(unknown)}"
    if of:
        for name in ("learning_rate", "ema_momentum"):  # the schedules; not every script has both
            function = replaced.get(name, vars(script).get(name))
            if function:
                replaced[name] = stretch(function, of)
    finish = harness.Run.finish
    if not probe:
        replaced["linear_eval"] = only_knn
        finish = leave_unfinished
    start = time.time()
    said = io.StringIO()
    with contextlib.ExitStack() as stack:
        out = stack.enter_context(tempfile.TemporaryDirectory())
        stack.enter_context(mock.patch.dict(vars(script), replaced))
        stack.enter_context(mock.patch.object(harness.Run, "finish", finish))
        args = settings(script, out=out, eval_every=1, **flags)
        with contextlib.redirect_stdout(said):
            script.main(args)
        checkpoint = harness.load_checkpoint(Path(out, "checkpoint.pt"))
        lines = Path(out, "log.jsonl").read_text().splitlines()
        model = build_model(script, args)
    model.load_state_dict(checkpoint["model"])
    log = [json.loads(line) for line in lines]
    return Run(args, log, model, said.getvalue(), time.time() - start)


def stretch(function, epochs):
    """A schedule as it is in a run of so many epochs."""

    def stretched(args, *more):
        longer = copy.copy(args)
        longer.epochs = epochs
        return function(longer, *more)

    return stretched


def only_knn(backbone, data, view, device, workers=0, classifier=False):
    return common.linear_eval(backbone, data, view, device, workers, classifier=False)


def leave_unfinished(run, data):
    """In place of harness.Run.finish."""


def untrained(script, **flags):
    """The model as it is before the first step of a run with these flags."""
    args = settings(script, **flags)
    torch.manual_seed(args.seed)
    return build_model(script, args)


def finished(script):
    """The model of a finished run of the default recipe, as results/weights/ keeps it, and the log
    of that run. Moving averages and queues are not kept: they are as a new model has them."""
    saved = harness.load_checkpoint(ROOT / "results" / "weights" / f"{script.__name__}.pt")
    model = build_model(script, argparse.Namespace(**saved["args"]))
    left = model.load_state_dict(saved["model"], strict=False)
    assert not left.unexpected_keys
    assert all(name.startswith(weights.LEFT_OUT) for name in left.missing_keys)
    return model.float().eval(), saved["log"]


def finished_detr(name, build):
    """(model, args) of up_detr.py as results/weights/ keeps it under this name; build(args) makes a
    model of its kind, for which its CNN has to be in a file."""
    saved = harness.load_checkpoint(ROOT / "results" / "weights" / f"{name}.pt")
    args = argparse.Namespace(**saved["args"])
    cnn = {}
    for key, x in saved["model"].items():
        if key.startswith("backbone."):
            cnn[key.removeprefix("backbone.")] = x
    with tempfile.TemporaryDirectory() as folder:
        args.backbone = str(Path(folder, "backbone.pt"))
        torch.save(cnn, args.backbone)
        model = build(args)
    model.load_state_dict(saved["model"])
    return model.eval(), args


def view_of(script):
    """The augmentation of the first view, by whose `plain` evaluation sees images."""
    return script.build_views(script.parse_args([]))[0]


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
    """Loss (with its chance level), kNN on held-out images and health over the epochs; runs:
    {name: Run}."""
    figure, (a, b, c) = plt.subplots(1, 3, figsize=(10.5, 2.8))
    for name, run in runs.items():
        log = run.log[1:]
        epochs = [line["epoch"] for line in log]
        lines = a.plot(epochs, [line["loss"] for line in log], marker=".", label=name)
        if chance:
            a.axhline(run.model.chance_loss, color=lines[0].get_color(), linestyle=":")
        b.plot([0, *epochs], [line["knn_top1"] for line in run.log], marker=".", label=name)
        c.plot(epochs, [line["std"] for line in log], marker=".", label=name)
    a.set(title="dotted: chance level" if chance else "", xlabel="epoch", ylabel="loss")
    b.set(title="epoch 0: random weights; dotted: chance", xlabel="epoch", ylim=(0, 100))
    b.set(ylabel="kNN top-1 (%)")
    b.axhline(10, color="gray", linestyle=":")
    c.set(title="1: healthy, 0: collapsed", xlabel="epoch", ylabel="std of z", ylim=(0, 1.1))
    for axis in (a, b, c):
        axis.xaxis.get_major_locator().set_params(integer=True)
    a.legend()
    plt.show()


def bars(values, title, chance=None, unit="%"):
    """A bar for each of {name: number}, with the number on it; `chance`: a dotted line."""
    figure, axis = plt.subplots(figsize=(min(12, 2 + 1.4 * len(values)), 2.8))
    drawn = axis.bar([str(name) for name in values], list(values.values()), width=0.6)
    axis.bar_label(drawn, fmt="{:.1f} " + unit)
    axis.set(title=title, ylabel=unit)
    axis.margins(y=0.15)
    if chance is not None:
        axis.axhline(chance, color="gray", linestyle=":")
    plt.show()


def findings(*keys):
    """What results/findings.py measured of these findings, drawn beside the paper's numbers: the
    mean of the seeds with their standard deviation, and the verdict."""
    entries = json.loads((ROOT / "results" / "findings.json").read_text())
    known = {entry["key"]: entry for entry in entries}
    for key in keys:
        draw_finding(known[key])


def draw_finding(entry):
    measured = {}
    for name in in_order(entry["arms"]):
        found = entry["arms"][name]["found"]
        if found is not None:
            measured[name] = found
    rows = max(len(measured), len(entry["paper"]), 2)
    height = 1.1 + 0.36 * rows + 0.15 * len(entry["compare"])
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, height))
    if entry["paper"]:
        draw_arms(left, entry["paper"], {})
        left.set(title=textwrap.fill(f"the paper: {entry['source']}", 52))
    else:
        left.axis("off")
        source = textwrap.fill(f"the paper: {entry['source']}", 45)
        left.text(0.5, 0.5, source, ha="center", va="center", transform=left.transAxes)
    if not measured:
        right.axis("off")
    means = {name: found["mean"] for name, found in measured.items()}
    draw_arms(right, means, {name: found["std"] for name, found in measured.items()})
    title = "here: CIFAR-10, linear top-1 (%)"
    if any(arm["metric"] == "cell_top1" for arm in entry["arms"].values()):
        title = "here: pictures of four images, top-1 of cells (%)"
    levels = [found["random_mean"] for found in measured.values() if found["random_mean"]]
    if levels:
        right.axvline(sum(levels) / len(levels), color="black", linestyle=":")
        title += "\ndotted: random weights"
    right.set(title=title)
    right.set_xlabel("\n".join(comparisons(entry)), fontsize=8)
    figure.suptitle(f"{entry['claim']}  → {entry['verdict']}", fontsize=11, weight="bold")
    plt.show()


def in_order(names):
    """From small to large where the arms are numbers, else as they are."""
    names = list(names)
    if all(name.replace(".", "").isdigit() for name in names):
        names.sort(key=float)
    return names


def comparisons(entry):
    """The gap of each comparison of a finding, the arms that it is between unless there are no
    others, and its verdict if there are several."""
    lines = []
    several = len(entry["compare"]) > 1
    for line in entry["compare"]:
        if line["gap"] is None:
            continue
        text = f"gap {line['gap']:+.1f} (standard error {line['error']:.1f})"
        if len(line["arms"]) < len(entry["arms"]):
            text = f"{' / '.join(line['arms'])}: {text}"
        if several:
            text = f"{text}: {line['verdict']}"
        lines.append(text)
    return lines


def draw_arms(axis, means, spreads):
    """A horizontal bar for each arm, the first on top."""
    values = list(means.values())
    bars = axis.barh(list(means), values, color="tab:blue", alpha=0.6)
    labels = []
    for row, (name, value) in enumerate(means.items()):
        spread = spreads.get(name)
        labels.append(f"{value:.1f} ± {spread:.1f}" if spread else f"{value:.1f}")
        if spread:
            axis.errorbar(value, row, xerr=spread, color="black", capsize=3)
    right = max([value + (spreads.get(name) or 0) for name, value in means.items()], default=1)
    for bar, label in zip(bars, labels):
        axis.text(1.05 * right, bar.get_y() + bar.get_height() / 2, label, va="center")
    axis.invert_yaxis()
    axis.set(xlim=(0, 1.4 * right))


def say(*sentences):
    """Prose whose figures come from the cell that says it."""
    display(Markdown(" ".join(sentences)))


def table(rows, *names):
    """A table of rows under these column names."""
    lines = []
    for row in (names, ["-"] * len(names), *rows):
        lines.append("| " + " | ".join(str(cell) for cell in row) + " |")
    display(Markdown("\n".join(lines)))
