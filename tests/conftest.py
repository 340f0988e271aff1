"""What the tests share: the list of scripts, small settings for any of them, a small folder."""

import importlib
import os
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import torch

import common

torch.set_num_threads(1)  # tiny tensors: more threads only wait for each other
ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = sorted(path.stem for path in ROOT.glob("*.py") if path.stem != "common")
SMALL = {
    "batch_size": 16,
    "epochs": 2,
    "queue_size": 32,
    "bn_groups": 2,
    "small_crops": 2,
    "prototypes": 12,
    "eval_every": 1,
    "workers": 0,
}


@pytest.fixture(params=SCRIPTS)
def script(request):
    return importlib.import_module(request.param)


def words(script, **flags):
    """The command line of a small run; flags a script does not have are left out."""
    known = {field.name for field in fields(script.Args)}
    flags = {name: value for name, value in (SMALL | flags).items() if name in known}
    return [
        word
        for name, value in flags.items()
        if value is not False
        for word in (["--" + name.replace("_", "-")] + ([str(value)] if value is not True else []))
    ]


def small_args(script, **flags):
    return script.parse_args(words(script, recipe="patterns", **flags))


def model_of(script):
    """The method's class: the one module in the script that says chance_loss in its constructor."""
    return next(
        value
        for value in vars(script).values()
        if isinstance(value, type)
        and issubclass(value, torch.nn.Module)
        and value.__module__ == script.__name__
        and hasattr(value, "backbone")
    )


def views_for(args, n, dtype=torch.float32):
    """A fixed batch for `forward`: views of the number and the sides that these settings give."""
    known = vars(args)
    sides = [args.size] * 2 + [known.get("small_size")] * known.get("small_crops", 0)
    chance = torch.Generator().manual_seed(1)
    return [torch.randn(n, 3, side, side, generator=chance, dtype=dtype) for side in sides]


def run(*command, threads=1, limit=300):
    """A program of ours in a process of its own; in one thread, so that two share two cores."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(
        [sys.executable, *map(str, command)], cwd=ROOT, env=environment, capture_output=True,
        text=True, timeout=limit)


def torchrun(processes, *command):
    return run(
        "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}", *command
    )


def write_folder(folder, images, labels):
    for number, (image, label) in enumerate(zip(images, labels)):
        path = folder / common.PATTERNS[label] / f"{number:03}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        common.TF.to_pil_image(image).save(path)


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """A labelled folder: 80 training and 40 test images of 32 x 32 in ten classes."""
    root = tmp_path_factory.mktemp("data") / "small"
    images, labels = common.patterns(120, seed=1)
    write_folder(root / "train", images[:80], labels[:80])
    write_folder(root / "val", images[80:], labels[80:])
    return root


@pytest.fixture(scope="session")
def photos(tmp_path_factory):
    """An unlabelled folder of 20 JPEG files of several sizes, too large to be kept in memory."""
    root = tmp_path_factory.mktemp("data") / "photos"
    root.mkdir()
    images, _ = common.patterns(20, seed=2)
    for number, image in enumerate(images):
        image = common.TF.to_pil_image(image).resize((150 + 8 * number, 120 + 5 * number))
        image.save(root / f"{number:02}.jpg", quality=90)
    return root


def error_line(capsys, function, *arguments):
    """What a program says that must end with exit code 2 and one line on stderr."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        function(*arguments)
    lines = capsys.readouterr().err.strip().splitlines()
    assert end.value.code == 2 and len(lines) == 1 and lines[0].startswith("error: "), (
        end.value,
        lines,
    )
    return lines[0]
