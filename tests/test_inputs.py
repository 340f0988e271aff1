"""What a user can get wrong: one clear line, exit code 2, nothing overwritten or lost."""

import importlib
import resource
import shutil

import numpy
import pytest
import torch
from conftest import METHODS, error_line, words
from PIL import Image

import common
import evaluate
import harness
import simclr


def scripts_with(setting):
    return [name for name in METHODS if setting in importlib.import_module(name).SETTINGS]


def program(script, *flags, **settings):
    """A function that does what the command line does."""
    command = [*words(script, recipe="patterns", **settings), *flags]
    return lambda: script.main(script.parse_args(command))


# --------------------------------------------------------------------------------------- flags
@pytest.mark.parametrize(
    "flags, part",
    [
        ("--data nowhere", "--data nowhere: no such folder"),
        ("--recipe cifar", "--recipe cifar: not one of patterns, cifar10, imagenet"),
        ("--precision fp16", "invalid choice: 'fp16'"),
        ("--bath-size 64", "unrecognized arguments: --bath-size 64"),
        ("--batch 64", "unrecognized arguments: --batch 64"),
        ("--lr", "--lr: expected one argument"),
        ("--epochs many", "--epochs: invalid int value"),
        ("--epochs 1.5", "--epochs: invalid int value"),
        ("--epochs 0", "--epochs 0: out of range"),
        ("--epochs 9999999999", "--epochs 9999999999: out of range"),
        ("--batch-size -64", "--batch-size -64: out of range"),
        ("--seed -1", "--seed -1: out of range"),
        ("--workers -1", "--workers -1: out of range"),
        ("--lr fast", "--lr: invalid float value"),
        ("--lr nan", "--lr nan: out of range"),
        ("--lr inf", "--lr inf: out of range"),
        ("--lr 1e10", "--lr 10000000000.0: out of range"),
        ("--weight-decay -1", "--weight-decay -1.0: out of range"),
        ("--arch resnet51", "--arch resnet51: neither thin nor one of resnet"),
        ("--arch load_state_dict", "--arch load_state_dict: neither thin nor one of resnet"),
        ("--optimizer adam", "--optimizer adam: neither sgd nor lars"),
        ("--batch-size 1", "--batch-size 1: batch normalisation needs two images per process"),
        ("--batch-size 81", "--batch-size 81, but the data has only 80 images"),
    ],
)
def test_wrong_flags(flags, part, folder, tmp_path, capsys):
    wrong = program(simclr, *flags.split(), data=folder, out=tmp_path / "run")
    assert part in error_line(capsys, wrong)
    assert not (tmp_path / "run").exists()


def test_a_flag_may_be_zero_where_a_recipe_has_a_zero(capsys):
    swav = importlib.import_module("swav")
    moco_v1 = importlib.import_module("moco_v1")
    assert swav.parse_args(["--queue-size", "0"]).queue_size == 0
    line = error_line(capsys, moco_v1.parse_args, ["--queue-size", "0"])
    assert "--queue-size 0: out of range" in line


@pytest.mark.parametrize("name", scripts_with("optimizer"))
def test_unknown_optimizer(name, folder, tmp_path, capsys):
    script = importlib.import_module(name)
    wrong = program(script, data=folder, out=tmp_path / "run", optimizer="adam")
    assert "--optimizer adam: n" in error_line(capsys, wrong)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", scripts_with("queue_size"))
def test_queues_that_do_not_fit(name, folder, tmp_path, capsys):
    """Shorter than a batch of 16, or longer than the 80 images."""
    script = importlib.import_module(name)
    for size in (8, 96):
        wrong = program(script, data=folder, out=tmp_path / "run", queue_size=size)
        assert f"--queue-size {size}: " in error_line(capsys, wrong)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", scripts_with("bn_groups"))
def test_groups_that_do_not_divide_the_batch(name, folder, tmp_path, capsys):
    script = importlib.import_module(name)
    wrong = program(script, data=folder, out=tmp_path / "run", bn_groups=3)
    assert "--bn-groups 3: not a divisor of --batch-size 16" in error_line(capsys, wrong)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "name, flags, part",
    [
        ("moco_v3", {"size": 30}, "--size 30: not a multiple of --patch-size 8"),
        ("moco_v3", {"crop_min": 2}, "crops cannot take 2.0 to 1.0 of the image's area"),
        ("swav", {"crop_split": 2}, "crops cannot take 2.0 to 1.0 of the image's area"),
        ("swav", {"queue_size": 40}, "--queue-size 40: not a multiple of a batch"),
    ],
)
def test_flags_of_one_method(name, flags, part, folder, tmp_path, capsys):
    wrong = program(importlib.import_module(name), data=folder, out=tmp_path / "run", **flags)
    assert part in error_line(capsys, wrong)
    assert not (tmp_path / "run").exists()


def test_batches_that_cannot_be_divided_among_processes(monkeypatch, capsys):
    monkeypatch.setattr(common, "world_size", lambda: 2)
    images = torch.zeros(20, 3, 32, 32, dtype=torch.uint8)
    line = error_line(capsys, common.Views, images, [], 15)
    assert "--batch-size 15 cannot be divided among 2 processes" in line
    line = error_line(capsys, common.Views, images, [], 2)
    assert "--batch-size 2: batch normalisation needs two images per process" in line


# ------------------------------------------------------------------------------- memory, numbers
@pytest.mark.parametrize(
    "name, setting",
    [("simclr", "projection_dim"), ("byol", "hidden_dim"), ("swav", "prototypes")],
)
def test_too_little_memory(name, setting, folder, tmp_path, capsys):
    script = importlib.import_module(name)
    wrong = program(script, data=folder, out=tmp_path / "run", **{setting: 900_000_000})
    assert "there is not enough memory" in error_line(capsys, wrong)


@pytest.fixture
def eight_gigabytes():
    """A limit on memory, so that asking for more fails at once, however much there is."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    with open("/proc/self/statm") as file:
        used = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + 8 * 2**30, hard))
    yield
    resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


@pytest.mark.slow
@pytest.mark.parametrize("number", [0, 900_000_000])
def test_huge_numbers(script, number, folder, tmp_path, eight_gigabytes, capsys):
    """Whatever is in range runs, or ends with one line: too little memory, a loss not finite."""
    endless = {"epochs", "small_crops", "sinkhorn_iterations"}
    for name, (value, *_) in script.SETTINGS.items():
        if isinstance(value, str) or name in endless:
            continue
        flags = {"data": folder / "train", "out": tmp_path / name, "epochs": 1, name: number}
        capsys.readouterr()
        try:
            program(script, **flags)()
        except SystemExit as end:
            lines = capsys.readouterr().err.strip().splitlines()
            assert end.code == 2, name
            assert len(lines) == 1 and lines[0].startswith("error: "), (name, lines)


# -------------------------------------------------------------------------------------- images
def test_folders(folder, tmp_path, capsys):
    def load(name):
        return error_line(capsys, common.load_images, str(tmp_path / name))

    assert "no such folder" in load("x")
    (tmp_path / "x").mkdir()
    assert "0 image(s) found" in load("x")
    Image.new("RGB", (32, 32)).save(tmp_path / "x" / "one.png")
    assert "1 image(s) found" in load("x")
    (tmp_path / "x" / "folder.png").mkdir()  # not an image, despite its name
    assert "1 image(s) found" in load("x")

    shutil.copytree(folder, tmp_path / "y")
    (tmp_path / "y" / "train" / "void").mkdir()
    line = load("y")
    assert "void" in line and "Supported" not in line  # without torchvision's list of suffixes
    shutil.rmtree(tmp_path / "y" / "train" / "void")
    shutil.rmtree(tmp_path / "y" / "val" / "dots")
    assert "train and val hold different classes" in load("y")


@pytest.mark.parametrize(
    "place, kind",
    [
        ("train/bricks/000.png", "text"),  # the first image
        ("train/bricks/000.png", "nowhere"),
        ("train/waves/x.png", "cut"),
        ("train/waves/x.png", "empty"),
        ("val/dots/x.png", "nowhere"),
        ("val/dots/x.png", "cut"),
    ],
)
def test_a_broken_image_is_named_wherever_it_is(place, kind, folder, tmp_path, capsys):
    """Small images are read at the start; a broken one stops the run before anything is written."""
    shutil.copytree(folder, tmp_path / "data")
    path = tmp_path / "data" / place
    whole = next((folder / "train" / "dots").iterdir()).read_bytes()
    if kind == "nowhere":
        path.symlink_to("nothing.png")
    else:
        content = {"empty": b"", "text": b"no image", "cut": whole[: len(whole) // 2]}
        path.write_bytes(content[kind])
    wrong = program(simclr, data=tmp_path / "data", out=tmp_path / "run")
    line = error_line(capsys, wrong)
    assert f"cannot read the image {path}" in line
    assert not (tmp_path / "run").exists()


def test_a_folder_with_the_name_of_an_image_is_none(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "data")
    for part in ("train", "val"):
        (tmp_path / "data" / part / "dots" / "x.png").mkdir()
    data = common.load_images(str(tmp_path / "data"))
    assert len(data.train[0]) == 80 and len(data.test[0]) == 40


@pytest.mark.parametrize("workers", [0, 2])
def test_a_truncated_jpeg_is_named(workers, photos, tmp_path, capsys):
    shutil.copytree(photos, tmp_path / "photos")
    path = tmp_path / "photos" / "07.jpg"
    path.write_bytes(path.read_bytes()[:1500])
    flags = {"size": 64, "batch_size": 10, "workers": workers}
    wrong = program(simclr, data=tmp_path / "photos", out=tmp_path / "run", **flags)
    line = error_line(capsys, wrong)
    assert f"cannot read the image {path}" in line and "truncated" in line


@pytest.mark.parametrize("workers", [0, 2])
def test_a_broken_large_test_image_is_named(workers, photos, tmp_path, capsys):
    """Large images are read when they are needed: the test set before the first epoch."""
    for part in ("train", "val"):
        for name in ("a", "b"):
            shutil.copytree(photos, tmp_path / "data" / part / name)
    path = tmp_path / "data" / "val" / "b" / "03.jpg"
    path.write_bytes(b"no image")
    flags = {"size": 64, "batch_size": 8, "workers": workers}
    wrong = program(simclr, data=tmp_path / "data", out=tmp_path / "run", **flags)
    assert f"cannot read the image {path}" in error_line(capsys, wrong)


def test_kinds_of_images(tmp_path):
    ramp = numpy.array(Image.linear_gradient("L").resize((32, 32)))
    rgb = Image.fromarray(numpy.stack([ramp, 255 - ramp, ramp // 2], axis=2))
    grey = rgb.convert("L")
    palette = rgb.quantize(256)
    alpha = rgb.convert("RGBA")
    alpha.putpixel((0, 0), (0, 0, 0, 0))
    flat = rgb.copy()
    flat.putpixel((0, 0), (255, 255, 255))  # transparent: white
    sixteen = Image.fromarray(numpy.array(grey).astype("uint16") * 256)
    written = {  # the file, what it should be read as, and how far off it may be
        "rgb.png": (rgb, rgb, 0),
        "palette.png": (palette, palette, 0),
        "grey.png": (grey, grey, 0),
        "sixteen.png": (sixteen, grey, 0),
        "alpha.png": (alpha, flat, 0),
        "cmyk.jpg": (rgb.convert("CMYK"), rgb, 12),
    }
    for name, (image, expected, error) in written.items():
        image.save(tmp_path / name, quality=100)
        found = numpy.array(common.read_image(tmp_path / name)).astype(int)
        expected = numpy.array(expected.convert("RGB")).astype(int)
        assert abs(found - expected).max() <= error, name
    assert common.load_images(str(tmp_path)).pretrain.shape == (6, 3, 32, 32)


def test_jpegs_are_decoded_coarsely_but_never_too_small(tmp_path):
    path = tmp_path / "large.jpg"
    Image.effect_noise((1600, 1200), 50).convert("RGB").save(path)
    assert common.read_image(path).size == (1600, 1200)
    assert common.read_image(path, least=500).size == (800, 600)
    assert common.read_image(path, least=700).size == (1600, 1200)


def test_a_folder_that_vanishes_during_training(photos, tmp_path, monkeypatch, capsys):
    shutil.copytree(photos, tmp_path / "photos")
    health = simclr.health

    def vanishing(z):
        shutil.rmtree(tmp_path / "photos", ignore_errors=True)
        return health(z)

    monkeypatch.setattr(simclr, "health", vanishing)
    flags = {"size": 64, "batch_size": 8}
    wrong = program(simclr, data=tmp_path / "photos", out=tmp_path / "run", **flags)
    line = error_line(capsys, wrong)
    assert "cannot read the image" in line and ".jpg" in line
    assert len(harness.load_checkpoint(tmp_path / "run" / "checkpoint.pt")["log"]) == 2


def test_a_data_set_out_of_reach(tmp_path, monkeypatch, capsys):
    """The line says which file to put where."""

    def unreachable(*arguments, **settings):
        raise OSError("no network")

    monkeypatch.setattr(common.TORCHVISION["cifar10"], "download", unreachable)
    line = error_line(capsys, common.load_images, "cifar10", str(tmp_path))
    assert "cifar-10-python.tar.gz" in line and str(tmp_path) in line


# --------------------------------------------------------------------------------- checkpoints
@pytest.fixture(scope="module")
def finished(folder, tmp_path_factory):
    """The checkpoint.pt of a run of one epoch."""
    out = tmp_path_factory.mktemp("finished")
    program(simclr, data=folder, out=out, epochs=1)()
    return out / "checkpoint.pt"


@pytest.fixture
def resumed(finished, folder, tmp_path):
    """(checkpoint.pt of a run without its result.json, the program that continues it)."""
    shutil.copy(finished, tmp_path)
    return tmp_path / "checkpoint.pt", program(simclr, data=folder, out=tmp_path, epochs=1)


def test_a_checkpoint_cut_short(resumed, capsys):
    path, again = resumed
    whole = path.read_bytes()
    for part in range(10):
        cut = whole[: len(whole) * part // 10]
        path.write_bytes(cut)
        line = error_line(capsys, again)
        assert f"{path} is not a readable checkpoint" in line
        assert "weights_only" not in line  # torch's advice would be to run what is in the file
        assert path.read_bytes() == cut
    path.write_bytes(whole)
    again()  # what was finished but for its result is finished now
    assert (path.parent / "result.json").exists()
    assert not list(path.parent.glob("*.tmp"))


class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_code_in_a_checkpoint_is_not_run(resumed, tmp_path, capsys):
    path, again = resumed
    torch.save(harness.load_checkpoint(path) | {"model": Bomb(tmp_path / "ran")}, path)
    line = error_line(capsys, again)
    assert "not a readable checkpoint" in line and "weights_only" not in line
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "changes, part",
    [
        ({"temperature": 0.3}, "a run with another --temperature: "),
        ({"method": "byol"}, "a run with another --method: "),
        ({"arch": "resnet18"}, "a run with another --arch: "),
        ({"new_flag": 3}, "a run with another --new-flag: "),
        ({"world_size": 2}, "a run with another --processes: "),
        ({"args": None}, "is not a checkpoint of this program"),
        ({"model": {}}, "is of another version of this program"),
        ({"optimizer": {}}, "is of another version of this program"),
        ({"random_state": {}}, "is of another version of this program"),
    ],
)
def test_a_checkpoint_of_another_run_or_version(changes, part, resumed, capsys):
    path, again = resumed
    content = harness.load_checkpoint(path)
    for name, value in changes.items():
        place = content if name in content else content["args"]
        place[name] = value
    torch.save(content, path)
    before = path.read_bytes()
    line = error_line(capsys, again)
    assert part in line and "name another --out" in line
    assert path.read_bytes() == before
    assert [file.name for file in path.parent.iterdir()] == ["checkpoint.pt"]


def test_a_file_that_is_no_checkpoint_of_ours(resumed, capsys):
    path, again = resumed
    for content in ({"weights": 1}, [1, 2], 3):
        torch.save(content, path)
        assert "is not a checkpoint of this program" in error_line(capsys, again)


@pytest.mark.parametrize(
    "changes",
    [{"method": "os"}, {"method": "common"}, {"method": 3}, {"new": 1}, {"arch": "resnet18"}],
)
def test_the_evaluation_of_another_version(changes, finished, tmp_path, capsys):
    content = harness.load_checkpoint(finished)
    if "new" in changes:
        content["args"] = changes
    content["args"] |= changes
    torch.save(content, tmp_path / "x.pt")
    line = error_line(capsys, evaluate.load_backbone, tmp_path / "x.pt")
    assert "is of another version of this program" in line


# --------------------------------------------------------------------------------------- disks
def test_no_place_to_write(folder, tmp_path, capsys):
    (tmp_path / "file").write_text("not a folder")
    wrong = program(simclr, data=folder, out=tmp_path / "file" / "run")
    assert "cannot write" in error_line(capsys, wrong)


def test_a_full_disk_keeps_the_old_checkpoint(tmp_path, capsys):
    """A limit on the size of files stands in for the disk: the write fails half-way, for real."""
    path = tmp_path / "checkpoint.pt"
    harness.save(path, {"x": torch.zeros(10)})
    old = path.read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))
    try:
        line = error_line(capsys, harness.save, path, {"x": torch.zeros(100_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert f"cannot write {path} (File too large); what was there before is kept" in line
    assert path.read_bytes() == old
    assert [file.name for file in tmp_path.iterdir()] == ["checkpoint.pt"]


# -------------------------------------------------------------------------- evaluation program
@pytest.mark.parametrize(
    "command, part",
    [
        ("", "required: checkpoint"),
        ("none.pt", "none.pt: no such file"),
        ("README.md", "README.md is not a readable checkpoint"),
        ("none.pt --epochs x", "--epochs: invalid int value"),
    ],
)
def test_wrong_flags_of_the_evaluation_program(command, part, capsys):
    line = error_line(capsys, lambda: evaluate.main(evaluate.parse_args(command.split())))
    assert part in line and "weights_only" not in line


def test_the_evaluation_program_needs_labels(finished, photos, capsys):
    args = evaluate.parse_args([str(finished), "--data", str(photos)])
    assert "has no labels" in error_line(capsys, evaluate.main, args)


@pytest.mark.parametrize("name", ["simclr", "evaluate"])
def test_interrupts_and_a_lack_of_memory_end_with_a_line(name, finished, monkeypatch, capsys):
    raised = []

    def load_images(*arguments):
        raise raised[-1]

    module = importlib.import_module(name)
    monkeypatch.setattr(module, "load_images", load_images)
    args = module.parse_args([str(finished)] if name == "evaluate" else [])
    for error in (MemoryError("out of memory"), RuntimeError("CUDA out of memory")):
        raised.append(error)
        assert "there is not enough memory" in error_line(capsys, module.main, args)

    raised.append(KeyboardInterrupt())
    with pytest.raises(SystemExit) as end:
        module.main(args)
    assert end.value.code == 130
    said = capsys.readouterr().out
    assert said.startswith("\nstopped")
    assert ("the same command continues" in said) == (name == "simclr")

    raised.append(RuntimeError("a bug"))  # is not hidden
    with pytest.raises(RuntimeError, match="a bug"):
        module.main(args)
