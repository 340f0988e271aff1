"""What a user can get wrong: one clear line, exit code 2, nothing overwritten or lost."""

import errno
import importlib
import resource
import shutil
from dataclasses import fields

import numpy
import pytest
import simclr
import torch
from conftest import error_line, small_args, words
from PIL import Image

import common


@pytest.mark.parametrize(
    "flags, part",
    [
        (["--data", "nowhere"], "no such folder"),
        (["--recipe", "cifar"], "not one of patterns, cifar10, imagenet"),
        (["--epochs", "many"], "invalid int value"),
        (["--epochs", "0"], "--epochs 0: out of range"),
        (["--lr", "nan"], "--lr nan: out of range"),
        (["--lr", "inf"], "--lr inf: out of range"),
        (["--weight-decay", "-1"], "--weight-decay -1.0: out of range"),
        (["--batch-size", "-64"], "out of range"),
        (["--bath-size", "64"], "unrecognized arguments"),
        (["--arch", "resnet51"], "--arch resnet51: neither "),
        (["--arch", "load_state_dict"], "load_state_dict: neither "),
        (["--batch-size", "1"], "--batch-size 1: batch normalisation takes two images"),
        (["--batch-size", "5000"], "has only 80 images"),
    ],
)
def test_flags(script, flags, part, folder, tmp_path, capsys):
    command = [*words(script, data=folder, out=tmp_path / "run"), *flags]

    def program():
        script.main(script.parse_args(command))

    assert part in error_line(capsys, program)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "name, flags, part",
    [
        *(
            (name, flags, part)
            for name in ("moco_v1", "moco_v2", "densecl")
            for flags, part in (
                ({"queue_size": 40}, "--queue-size 40: no multiple of --batch-size 16"),
                ({"queue_size": 0}, "--queue-size 0: no multiple"),
                ({"queue_size": 96}, "over 80 images"),
                ({"bn_groups": 3}, "--bn-groups 3"),
                ({"ema_momentum": 1.5}, "--ema-momentum 1.5: out of range"),
                ({"temperature": -1}, "--temperature -1.0: out of range"),
            )
        ),
        ("densecl", {"dense_weight": 1.5}, "--dense-weight 1.5: out of range"),
        ("byol", {"optimizer": "adam"}, "--optimizer adam: not one of sgd, lars"),
        ("barlow", {"optimizer": "adam"}, "--optimizer adam: not one of adamw, sgd, lars"),
        ("barlow", {"redundancy_weight": -1}, "--redundancy-weight -1.0: out of range"),
        ("swav", {"optimizer": "lars"}, "--optimizer lars: not one of adamw, sgd, larc"),
        ("swav", {"queue_size": 40}, "--queue-size 40: no multiple of --batch-size 16"),
        ("swav", {"epsilon": 0}, "--epsilon 0.0: out of range"),
        ("moco_v3", {"optimizer": "sgd"}, "--optimizer sgd: not one of adamw, lars"),
        ("moco_v3", {"size": 30}, "--size 30: no multiple of --patch-size 8"),
        ("moco_v3", {"crop_min": 2}, "--crop-min 2.0: out of range"),
    ],
)
def test_flags_of_one_method(name, flags, part, folder, tmp_path, capsys):
    script = importlib.import_module(name)

    def program():
        script.main(small_args(script, data=folder, out=tmp_path / "run", **flags))

    assert part in error_line(capsys, program)


def test_every_number_has_its_range(script, capsys):
    """Wrong numbers for each flag: what is accepted is in range, the rest has its line."""
    for field in fields(script.Args):
        if field.type not in (int, float):
            continue
        flag = "--" + field.name.replace("_", "-")
        fraction = ["1.5"] if field.type is int else []
        for value in ["x", "", "nan", "-1", "0", "1e10", "9" * 12, *fraction]:
            try:
                args = script.parse_args([flag, value])
            except SystemExit as end:
                lines = capsys.readouterr().err.splitlines()
                assert end.code == 2 and len(lines) == 1 and flag in lines[0], (flag, value, lines)
                allowed = value == "0" and field.name in common.ZERO_ALLOWED
                assert not allowed or "no effect" in lines[0]
            else:
                assert value == "0" and field.name in common.ZERO_ALLOWED, (flag, value)
                assert getattr(args, field.name) == 0


@pytest.mark.parametrize(
    "name, flags",
    [
        ("moco_v3", ["--patch-size", "8", "--arch", "resnet18"]),
        ("swav", ["--small-size", "16", "--small-crops", "0"]),
        ("swav", ["--queue-start", "3", "--queue-size", "0"]),
        ("simclr", ["--root", "elsewhere", "--data", "patterns"]),
    ],
)
def test_no_flag_is_silently_ignored(name, flags, capsys):
    script = importlib.import_module(name)
    line = error_line(capsys, script.parse_args, flags)
    assert f"{flags[0]} has no effect with {flags[2]} {flags[3]}" in line
    script.parse_args(flags[2:])  # a recipe's number for the idle flag is no mistake


@pytest.mark.slow
def test_huge_numbers(script, folder, tmp_path, capsys):
    """Whatever is in range runs, or ends with one line: too little memory, a loss not finite."""
    for field in fields(script.Args):
        if field.type not in (int, float) or field.name in ("epochs", "seed"):
            continue
        out = tmp_path / field.name
        flags = {"data": folder / "train", "out": out, "epochs": 1} | {field.name: 900_000_000}
        try:
            script.main(small_args(script, **flags))
        except SystemExit as end:
            lines = [x for x in capsys.readouterr().err.splitlines() if x]
            assert end.code == 2 and len(lines) == 1, (field.name, lines)
            assert lines[0].startswith("error: "), lines


@pytest.mark.parametrize(
    "name, flag",
    [("simclr", "projection_dim"), ("byol", "hidden_dim"), ("swav", "prototypes")],
)
def test_too_little_memory(name, flag, folder, tmp_path, capsys):
    script = importlib.import_module(name)
    args = small_args(script, data=folder, out=tmp_path, **{flag: 900_000_000})
    assert "not enough memory" in error_line(capsys, script.main, args)


def test_a_batch_that_the_processes_cannot_share(monkeypatch, capsys):
    monkeypatch.setattr(common, "processes", lambda: (1, 2))
    images = torch.zeros(20, 3, 32, 32, dtype=torch.uint8)
    line = error_line(capsys, common.Views, images, common.AUGMENTS["simclr"], 15)
    assert "--batch-size 15 cannot be shared by 2 processes" in line


def test_folders(folder, tmp_path, capsys):
    def load(name="x"):
        return error_line(capsys, common.load, str(tmp_path / name))

    (tmp_path / "x").mkdir()
    assert "0 image(s)" in load()
    Image.new("RGB", (32, 32)).save(tmp_path / "x" / "one.png")
    assert "1 image(s)" in load()
    (tmp_path / "x" / "folder.png").mkdir()  # no image, in spite of its name
    assert "1 image(s)" in load()
    (tmp_path / "x" / "two.png").write_bytes(b"no image")
    assert "two.png" in load()
    shutil.copytree(folder, tmp_path / "y")
    (tmp_path / "y" / "train" / "void").mkdir()
    assert "void" in load("y")
    shutil.rmtree(tmp_path / "y" / "train" / "void")
    shutil.rmtree(tmp_path / "y" / "val" / "dots")
    assert "different classes" in load("y")


def test_truncated_jpeg_is_named(folder, photos, tmp_path, capsys):
    shutil.copytree(photos, tmp_path / "photos")
    path = tmp_path / "photos" / "07.jpg"
    path.write_bytes(path.read_bytes()[:1500])
    for workers in (0, 2):
        args = small_args(
            simclr,
            data=tmp_path / "photos",
            out=tmp_path / "run",
            size=64,
            batch_size=10,
            workers=workers,
        )
        line = error_line(capsys, simclr.main, args)
        assert "07.jpg" in line and "truncated" in line


@pytest.mark.parametrize("place", ["train/dots/first.png", "train/waves/x.png", "val/dots/x.png"])
@pytest.mark.parametrize("kind", ["empty", "text", "cut", "folder", "nowhere"])
def test_a_broken_file_is_named_wherever_it_is(place, kind, folder, tmp_path, capsys):
    """Small images are read at the start; a broken one stops the run before anything is written."""
    shutil.copytree(folder, tmp_path / "data")
    path = tmp_path / "data" / place
    whole = next((folder / "train" / "dots").iterdir()).read_bytes()
    if kind == "nowhere":
        path.symlink_to("nothing.png")
    elif kind == "folder":
        path.mkdir()
    else:
        content = {"empty": b"", "text": b"no image", "cut": whole[: len(whole) // 2]}
        path.write_bytes(content[kind])
    args = small_args(simclr, data=tmp_path / "data", out=tmp_path / "run", epochs=1)
    if kind == "folder":  # which holds no images, and is no image itself
        simclr.main(args)
        return
    line = error_line(capsys, simclr.main, args)
    assert "cannot read the image" in line and path.name in line
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("workers", [0, 2])
def test_a_broken_large_test_image_is_named(workers, photos, tmp_path, capsys):
    """Large images are read when they are needed: the test set before the first epoch."""
    for part in ("train", "val"):
        for name in ("a", "b"):
            shutil.copytree(photos, tmp_path / "data" / part / name)
    (tmp_path / "data" / "val" / "b" / "03.jpg").write_bytes(b"no image")
    args = small_args(simclr, data=tmp_path / "data", out=tmp_path / "run", size=64, batch_size=8,
                      workers=workers)
    line = error_line(capsys, simclr.main, args)
    assert "cannot read the image" in line and "03.jpg" in line


def test_kinds_of_images(tmp_path):
    colour = numpy.array(Image.linear_gradient("L").resize((32, 32)))
    rgb = Image.fromarray(numpy.stack([colour, 255 - colour, colour // 2], axis=2))
    expected = {
        "rgb.png": rgb,
        "palette.png": rgb.quantize(256).convert("RGB"),
        "grey.png": rgb.convert("L"),
        "sixteen.png": rgb.convert("L"),
        "alpha.png": rgb,
        "cmyk.jpg": rgb,
    }
    rgb.save(tmp_path / "rgb.png")
    rgb.quantize(256).save(tmp_path / "palette.png")
    rgb.convert("L").save(tmp_path / "grey.png")
    grey = numpy.array(rgb.convert("L")).astype("uint16") * 256
    Image.fromarray(grey).save(tmp_path / "sixteen.png")
    alpha = rgb.convert("RGBA")
    alpha.putpixel((0, 0), (0, 0, 0, 0))
    alpha.save(tmp_path / "alpha.png")
    rgb.convert("CMYK").save(tmp_path / "cmyk.jpg", quality=100)
    for name, image in expected.items():
        ours = numpy.array(common.read_image(tmp_path / name)).astype(int)
        theirs = numpy.array(image.convert("RGB")).astype(int)
        if name == "alpha.png":
            assert (ours[0, 0] == 255).all()  # transparent: white
            ours[0, 0] = theirs[0, 0]
        assert abs(ours - theirs).max() <= (12 if name == "cmyk.jpg" else 1), name
    data = common.load(str(tmp_path))
    assert data.pretrain.shape == (6, 3, 32, 32)


def test_jpegs_are_decoded_coarsely_but_never_too_small(tmp_path):
    Image.effect_noise((1600, 1200), 50).convert("RGB").save(tmp_path / "large.jpg")
    assert common.read_image(tmp_path / "large.jpg").size == (1600, 1200)
    assert common.read_image(tmp_path / "large.jpg", least=500).size == (800, 600)
    assert common.read_image(tmp_path / "large.jpg", least=700).size == (1600, 1200)


def test_truncated_checkpoint_and_wrong_checkpoint(folder, tmp_path, capsys):
    args = small_args(simclr, data=folder, out=tmp_path, epochs=1)
    simclr.main(args)
    (tmp_path / "result.json").unlink()
    path = tmp_path / "checkpoint.pt"
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    assert "not a readable checkpoint" in error_line(capsys, simclr.main, args)
    assert path.stat().st_size == len(whole) // 2
    torch.save({"weights": 1}, path)
    assert "not a checkpoint of this program" in error_line(capsys, simclr.main, args)
    path.write_bytes(whole)
    assert "--temperature 0.2 there, 0.3 here" in error_line(
        capsys,
        simclr.main,
        small_args(simclr, data=folder, out=tmp_path, epochs=1, temperature=0.3),
    )
    simclr.main(args)  # what was finished but for its result is finished now


def test_a_checkpoint_cut_short_anywhere_has_its_line(folder, tmp_path, capsys):
    args = small_args(simclr, data=folder, out=tmp_path, epochs=1)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1000))])
    content = {"method": "simclr", "args": vars(args), "optimizer": optimizer.state_dict()}
    common.save(tmp_path / "checkpoint.pt", content | {"model": {"w": torch.randn(10_000)}})
    whole = (tmp_path / "checkpoint.pt").read_bytes()
    for part in range(10):
        (tmp_path / "checkpoint.pt").write_bytes(whole[: len(whole) * part // 10])
        line = error_line(capsys, simclr.main, args)
        assert "checkpoint.pt is not a readable checkpoint" in line
    assert not list(tmp_path.glob("*.tmp"))


def test_a_checkpoint_of_another_method_arch_or_version(folder, tmp_path, capsys):
    args = small_args(simclr, data=folder, out=tmp_path, epochs=1)

    def resumed(**changes):
        content = {"method": "simclr", "world_size": 1, "args": dict(vars(args))}
        for name, value in changes.items():
            (content if name in content else content["args"])[name] = value
        torch.save(content, tmp_path / "checkpoint.pt")
        return error_line(capsys, simclr.main, args)

    assert "method byol there, simclr here" in resumed(method="byol")
    assert "--arch resnet18 there, thin here" in resumed(arch="resnet18")
    assert "processes 2 there, 1 here" in resumed(world_size=2)
    assert "--new-flag 3 there, None here" in resumed(new_flag=3)
    assert "not a checkpoint of this program" in resumed(args=None)
    assert "another version of this program" in resumed()  # the same flags, but no such weights
    model = {"encoder.backbone.conv1.weight": torch.zeros(1)}
    for method, flags in (("os", {}), ("../simclr", {}), ("simclr", {"new": 1}), (3, {})):
        torch.save({"method": method, "args": flags, "model": model}, tmp_path / "x.pt")
        line = error_line(capsys, common.load_backbone, tmp_path / "x.pt")
        assert "another version of this program" in line
    flags = vars(args) | {"arch": "thin"}
    torch.save({"method": "simclr", "args": flags, "model": model, "epoch": 1}, tmp_path / "x.pt")
    line = error_line(capsys, common.load_backbone, tmp_path / "x.pt")
    assert "another version of this program" in line


def test_a_folder_that_vanishes_during_training(photos, tmp_path, monkeypatch, capsys):
    shutil.copytree(photos, tmp_path / "photos")
    health = simclr.health

    def vanishing(z):
        shutil.rmtree(tmp_path / "photos", ignore_errors=True)
        return health(z)

    monkeypatch.setattr(simclr, "health", vanishing)
    args = small_args(simclr, data=tmp_path / "photos", out=tmp_path / "run", size=64, batch_size=8)
    line = error_line(capsys, simclr.main, args)
    assert "cannot read the image" in line and ".jpg" in line
    assert torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)["epoch"] == 1


def test_no_place_to_write(folder, tmp_path, capsys):
    (tmp_path / "file").write_text("not a folder")
    args = small_args(simclr, data=folder, out=tmp_path / "file" / "run")
    assert "cannot write" in error_line(capsys, simclr.main, args)


def test_full_disk_keeps_the_old_checkpoint(tmp_path, capsys):
    """A limit on the size of files stands in for the disk: the write fails half-way, for real."""
    path = tmp_path / "checkpoint.pt"
    common.save(path, {"x": torch.zeros(10)})
    old = path.read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))
    try:
        line = error_line(capsys, common.save, path, {"x": torch.zeros(100_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "cannot write" in line and "kept" in line and errno.EFBIG
    assert path.read_bytes() == old and [p.name for p in tmp_path.iterdir()] == ["checkpoint.pt"]


def test_code_in_a_checkpoint_is_not_run(tmp_path, capsys):
    class Bomb:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    torch.save({"model": Bomb()}, tmp_path / "bomb.pt")
    assert "not a readable checkpoint" in error_line(
        capsys, common.load_checkpoint, tmp_path / "bomb.pt"
    )
    assert not (tmp_path / "ran").exists()


def test_data_set_out_of_reach_says_what_to_put_where(tmp_path, monkeypatch, capsys):
    def unreachable(*arguments, **settings):
        raise OSError("no network")

    monkeypatch.setattr(common.TORCHVISION["cifar10"], "download", unreachable)
    line = error_line(capsys, common.load, "cifar10", str(tmp_path))
    assert "cifar-10-python.tar.gz" in line and str(tmp_path) in line


def test_evaluation_program(tmp_path, monkeypatch, capsys):
    for command, part in (
        ([], "required: checkpoint"),
        (["none.pt"], "not a readable checkpoint"),
        (["none.pt", "--epochs", "x"], "invalid int value"),
    ):
        monkeypatch.setattr("sys.argv", ["common.py", *command])
        assert part in error_line(capsys, common.main)


@pytest.mark.parametrize("error, code, part", [
    (KeyboardInterrupt(), 130, "stopped\n"),
    (RuntimeError("CUDA out of memory"), 2, "not enough memory"),
])
def test_evaluation_program_ends_with_a_line(error, code, part, monkeypatch, capsys):
    def load_backbone(path):
        raise error

    monkeypatch.setattr(common, "load_backbone", load_backbone)
    monkeypatch.setattr("sys.argv", ["common.py", "some.pt"])
    with pytest.raises(SystemExit) as end:
        common.main()
    said = capsys.readouterr()
    assert end.value.code == code and part in said.out + said.err
