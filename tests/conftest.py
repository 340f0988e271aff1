"""What the tests share: the list of scripts, small settings for any of them, small folders."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torchvision.transforms import functional as TF

import common
import harness
from results.methods import METHODS

torch.set_num_threads(1)  # tiny tensors: more threads only wait for each other
ROOT = Path(__file__).resolve().parent.parent
SMALL = {
    "batch_size": 16,
    "epochs": 2,
    "queue_size": 32,
    "bn_groups": 2,
    "small_crops": 2,
    "prototypes": 12,
    "eval_every": 1,
}
COMMON_FLAGS = {"data", "recipe", "seed", "precision", "workers", "root", "out"}
SWITCHES = {"compile", "overwrite"}


@pytest.fixture(params=METHODS)
def script(request):
    return importlib.import_module(request.param)


def words(script, **flags):
    """The command line of a small run; flags that a script does not have are left out."""
    flags = SMALL | {"workers": 0} | flags
    found = []
    for name, value in flags.items():
        flag = "--" + name.replace("_", "-")
        if name in SWITCHES and value:
            found.append(flag)
        elif name in script.SETTINGS or name in COMMON_FLAGS:
            found += [flag, str(value)]
    return found


def small_args(script, **flags):
    return script.parse_args(words(script, recipe="patterns", **flags))


def run(*command, threads=1, limit=300, **environment):
    """A program of ours in a process of its own; in one thread, so that two share two cores."""
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": str(threads),
        "CUDA_VISIBLE_DEVICES": "",
        **environment,
    }
    return subprocess.run(
        [sys.executable, *map(str, command)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=limit,
    )


def torchrun(processes, *command, **environment):
    launcher = ("-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}")
    return run(*launcher, *command, **environment)


def write_folder(folder, images, labels):
    for number, (image, label) in enumerate(zip(images, labels)):
        path = folder / common.PATTERNS[label] / f"{number:03}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        TF.to_pil_image(image).save(path)


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
        image = TF.to_pil_image(image).resize((150 + 8 * number, 120 + 5 * number))
        image.save(root / f"{number:02}.jpg", quality=90)
    return root


def log_of(out):
    """The lines of a run's log without what no two runs share."""
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    for line in lines:
        line.pop("seconds", None)
    return lines


def checkpoint_of(out):
    return torch.load(out / "checkpoint.pt", weights_only=True)


def same(a, b):
    """Equality to the bit of nested dictionaries, lists and tensors."""
    if torch.is_tensor(a):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b))
    return a == b


def same_state(a, b):
    """Whether two checkpoints hold the same weights, optimizer and random state, to the bit."""
    return all(same(a[part], b[part]) for part in ("model", "optimizer", "random_state"))


def interrupt(script, args, method, call):
    """A training stopped by Ctrl-C right after the given call of that method of harness.Run."""
    original = getattr(harness.Run, method)
    calls = []

    def interrupted(*arguments):
        original(*arguments)
        calls.append(method)
        if len(calls) == call:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as end:
        patch.setattr(harness.Run, method, interrupted)
        script.main(args)
    assert end.value.code == 130


def error_line(capsys, function, *arguments):
    """What a program says that must end with exit code 2 and one line on stderr."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        function(*arguments)
    lines = capsys.readouterr().err.strip().splitlines()
    assert end.value.code == 2, end.value
    assert len(lines) == 1 and lines[0].startswith("error: "), lines
    return lines[0]
