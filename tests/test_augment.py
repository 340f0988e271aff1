"""Augmentations against torchvision's functional operations, image by image; the views of a run."""

import hashlib
import importlib
import multiprocessing
import time
from dataclasses import replace

import pytest
import torch
from conftest import error_line
from PIL import Image
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as V

import clip
import common
import moco_v2
import simclr
from common import Augment, Views, make_generator

EVERYTHING = Augment(
    size=32,
    jitter=(0.8, 0.8, 0.8, 0.4),
    jitter_p=0.8,
    grayscale=0.3,
    blur=0.5,
    solarize=0.3,
)
PATTERNS_SHA256 = "ed072daf93e59b7c84b9ab59c453d3df904c62dc46d3afef0dcce32d990893c7"
SIDES = {  # of the views, per recipe; other methods: two views
    "swav": {
        "patterns": [32] * 2 + [16] * 4,
        "cifar10": [32] * 2,
        "imagenet": [224] * 2 + [96] * 6,
    },
}
BLUR = {  # probability per view of the imagenet recipe
    "simclr": [0.5, 0.5],
    "moco_v1": [0.0, 0.0],
    "moco_v2": [0.5, 0.5],
    "moco_v3": [1.0, 0.1],
    "byol": [1.0, 0.1],
    "simsiam": [0.5, 0.5],
    "barlow": [1.0, 0.1],
    "swav": [0.5] * 8,
    "densecl": [0.5, 0.5],
}


def random_images(n, side=32):
    generator = make_generator("images", n, side)
    return torch.randint(0, 256, (n, 3, side, side), generator=generator, dtype=torch.uint8)


def steps_of(views, epoch):
    views.set_epoch(epoch)
    return list(views)


def same(first, second):
    """Whether two epochs are equal to the bit."""
    pairs = zip(first, second, strict=True)
    return all(torch.equal(a, b) for x, y in pairs for a, b in zip(x, y, strict=True))


# ----------------------------------------------------------------------------------- one view
def by_torchvision(augment, image, box, draws, i):
    """The view of image i (3, H, W), uint8, by torchvision."""
    mode = v2.InterpolationMode.BICUBIC if augment.bicubic else v2.InterpolationMode.BILINEAR
    size = [augment.size, augment.size]
    x = V.resized_crop(image.float() / 255, *box.int().tolist(), size, mode, antialias=True)
    x = x.clamp(0, 1)
    if draws["flip"][i]:
        x = V.horizontal_flip(x)
    changes = [V.adjust_brightness, V.adjust_contrast, V.adjust_saturation]
    steps = [(changes[k], draws["factors"][i, k].item()) for k in draws["order"][i]]
    steps.insert(int(draws["hue_slot"][i]), (V.adjust_hue, draws["hue"][i].item()))
    for change, amount in steps:
        x = change(x, amount)
    if draws["gray"][i]:
        x = V.rgb_to_grayscale(x, num_output_channels=3)
    if draws["sigma"][i] > 0:
        width = augment.size // 10 | 1
        x = V.gaussian_blur(x, [width, width], [draws["sigma"][i].item()] * 2)
    if draws["solarize"][i]:
        x = V.solarize(x, 0.5)
    return V.normalize(x, augment.mean, augment.std)


@pytest.mark.parametrize("bicubic", [False, True])
@pytest.mark.parametrize("pixels, size", [(32, 32), (96, 32), (48, 96)])  # as is, smaller, larger
def test_each_image_equals_torchvisions(pixels, size, bicubic):
    augment = replace(EVERYTHING, size=size, bicubic=bicubic)
    generator = make_generator("test", pixels, size)
    images = random_images(64, pixels)
    images[0] = 100  # grey has no hue
    boxes = augment.draw_boxes(64, pixels, pixels, generator)
    draws = augment.draw(64, generator)
    ours = augment.apply(images, boxes, draws)
    theirs = [by_torchvision(augment, image, boxes[i], draws, i) for i, image in enumerate(images)]
    theirs = torch.stack(theirs)
    # Solarization jumps at 1/2: a rounding error may fall on either side of it.
    assert ((ours - theirs).abs() > 1e-4).float().mean() < 1e-4
    still = ~draws["solarize"]
    assert torch.allclose(ours[still], theirs[still], atol=1e-4)


def test_each_image_draws_its_own_parameters():
    image = random_images(1).expand(64, 3, 32, 32)
    views = EVERYTHING(image, make_generator(0))
    assert len({view.numpy().tobytes() for view in views}) == 64
    draws = EVERYTHING.draw(1000, make_generator(0))
    assert len(draws["factors"].unique(dim=0)) > 700
    assert len(draws["order"].unique(dim=0)) == 6
    assert draws["hue_slot"].unique().tolist() == [0, 1, 2, 3]
    expected = {"gray": 0.3, "sigma": 0.5, "solarize": 0.3, "flip": 0.5, "hue": 0.8}
    for name, probability in expected.items():
        found = (draws[name] != 0).float().mean().item()
        assert found == pytest.approx(probability, abs=0.06), name


@pytest.mark.parametrize("height, width", [(32, 32), (40, 100), (400, 20)])
def test_boxes_are_distributed_as_torchvisions(height, width):
    n = 2000
    augment = Augment(size=8, scale=(0.08, 1.0))
    ours = augment.draw_boxes(n, height, width, make_generator("boxes"))
    assert torch.equal(ours, ours.round())
    assert (ours[:, 2:] >= 1).all() and (ours[:, :2] >= 0).all()
    assert (ours[:, 0] + ours[:, 2] <= height).all()
    assert (ours[:, 1] + ours[:, 3] <= width).all()

    torch.manual_seed(0)
    image = torch.empty(3, height, width)
    transform = v2.RandomResizedCrop(8, augment.scale)
    theirs = []
    for _ in range(n):
        box = transform.make_params([image])
        theirs.append([box[name] for name in ("top", "left", "height", "width")])
    theirs = torch.tensor(theirs).float()
    error = 4 * theirs.std(0) * (2 / n) ** 0.5 + 0.02
    assert ((ours.mean(0) - theirs.mean(0)).abs() < error).all(), (ours.mean(0), theirs.mean(0))


def test_crops_cannot_take_more_than_the_image(capsys):
    for scale in ((0.2, 1.1), (-0.1, 1.0), (0.5, 0.2)):
        line = error_line(capsys, Augment, 32, scale)
        assert f"crops cannot take {scale[0]} to {scale[1]}" in line


def test_plain_view_is_not_random():
    images = random_images(4)
    augment = replace(EVERYTHING, size=32)
    expected = V.normalize(images.float() / 255, augment.mean, augment.std)
    assert torch.allclose(augment.plain(images), expected)
    smaller = replace(augment, size=16).plain(images)
    expected = V.resize(images.float() / 255, [16, 16], antialias=True)
    assert torch.allclose(smaller, V.normalize(expected, augment.mean, augment.std), atol=1e-5)


@pytest.mark.parametrize(
    "module, short_side, mode",
    [
        (moco_v2, 256, v2.InterpolationMode.BILINEAR),
        (simclr, 256, v2.InterpolationMode.BICUBIC),
        (clip, 224, v2.InterpolationMode.BICUBIC),
    ],
)
def test_what_evaluation_sees_of_files(module, short_side, mode, photos):
    """As in the papers: the centre of the image, which CLIP alone shows up to its border."""
    recipe = "paper" if module is clip else "imagenet"
    augment = module.build_views(module.parse_args(["--recipe", recipe]))[0]
    paths = sorted(photos.iterdir())[:3]
    found = common.CentreCrops(paths, augment)
    resize = v2.Compose([v2.Resize(short_side, mode), v2.CenterCrop(224), v2.PILToTensor()])
    for index, path in enumerate(paths):
        with Image.open(path) as image:
            assert torch.equal(found[index], resize(image))


# ---------------------------------------------------------------------------- views of a method
def test_number_and_sizes_of_the_views(script):
    """Nor are views of up to 64 pixels blurred."""
    for recipe in script.SETTINGS["recipe"][:-1]:
        args = script.parse_args(["--recipe", recipe])
        sides = SIDES.get(script.__name__, {}).get(recipe, [args.size] * 2)
        views = script.build_views(args)
        assert [view.size for view in views] == sides, recipe
        assert all(view.blur == 0 for view in views) or args.size > 64, recipe


@pytest.mark.parametrize("name", BLUR)
def test_views_above_64_pixels_are_blurred(name):
    """Among them SwAV's small crops of 96 pixels."""
    script = importlib.import_module(name)

    def blur(*flags):
        args = script.parse_args(["--recipe", "imagenet", *flags])
        return [view.blur for view in script.build_views(args)]

    assert blur() == BLUR[name]
    assert blur("--size", "65") == BLUR[name]
    assert not any(blur("--size", "64"))


# --------------------------------------------------------------------------- views of an epoch
@pytest.mark.parametrize("name", ["byol", "swav"])  # views that differ in chance, and in size
def test_views_are_a_function_of_seed_and_epoch(name):
    script = importlib.import_module(name)
    augments = script.build_views(script.parse_args(["--recipe", "patterns"]))
    images = random_images(50)
    views = Views(images, augments, batch_size=16, seed=3)
    first = steps_of(views, 1)
    assert len(views) == len(first) == 3
    assert same(first, steps_of(views, 1))
    assert not same(first, steps_of(views, 2))
    assert not same(first, steps_of(Views(images, augments, batch_size=16, seed=4), 1))
    assert not torch.equal(first[0][0], first[0][1])

    views.set_epoch(1)
    assert len(views.rows().flatten().unique()) == 48  # every image at most once per epoch
    generator = make_generator("views", 3, 1, 0)
    for rows, step in zip(views.rows(), first, strict=True):
        for augment, view in zip(augments, step, strict=True):
            assert torch.equal(view, augment(images[rows], generator))


@pytest.mark.parametrize("source", ["memory", "files"])
def test_two_processes_make_the_views_of_one(source, photos, monkeypatch):
    images = random_images(50)
    if source == "files":
        images = common.load_images(str(photos)).pretrain
    augments = [EVERYTHING, replace(EVERYTHING, size=16, bicubic=True)]

    def epoch(rank, world_size):
        monkeypatch.setattr(common, "rank", lambda: rank)
        monkeypatch.setattr(common, "world_size", lambda: world_size)
        return list(Views(images, augments, batch_size=16, seed=3))

    whole = epoch(0, 1)
    halves = zip(epoch(0, 2), epoch(1, 2), strict=True)
    for views, (first, second) in zip(whole, halves, strict=True):
        for view, *parts in zip(views, first, second, strict=True):
            assert len(parts[0]) == len(parts[1]) == 8
            assert torch.allclose(view, torch.cat(parts), atol=1e-6)


@pytest.fixture
def files(photos):
    """(paths, augments) of the imagenet recipe of MoCo v2, at 96 pixels."""
    data = common.load_images(str(photos))
    assert isinstance(data.pretrain, list) and len(data.pretrain) == 20
    args = moco_v2.parse_args(["--recipe", "imagenet", "--size", "96"])
    return data.pretrain, moco_v2.build_views(args)


def test_any_number_of_workers_gives_the_same_views(files):
    here = Views(*files, batch_size=8, seed=1)
    workers = Views(*files, batch_size=8, seed=1, workers=2)
    for epoch in (1, 2):
        steps = steps_of(workers, epoch)
        shapes = [[tuple(view.shape) for view in step] for step in steps]
        assert shapes == [[(8, 3, 96, 96)] * 2] * 2
        assert same(steps, steps_of(here, epoch))


def test_workers_live_as_long_as_the_views(files):
    """An epoch that is broken off, as for the report's picture, does not disturb the next one."""

    def living():
        return {process.pid for process in multiprocessing.active_children()}

    before = living()
    views = Views(*files, batch_size=8, seed=1, workers=2)
    steps_of(views, 1)
    started = living() - before
    next(iter(views))
    second = steps_of(views, 2)
    assert len(started) == 2
    assert living() - before == started
    assert same(second, steps_of(Views(*files, batch_size=8, seed=1), 2))
    start = time.time()
    del views
    assert not living() - before
    assert time.time() - start < 5  # a worker that is not told to end is waited for so long


@pytest.mark.parametrize("workers", [0, 2])
def test_views_leave_torchs_random_state_alone(files, workers):
    """Otherwise a run would depend on its number of workers, and a resumed run differ from an
    uninterrupted one, in which the workers start only once."""
    state = torch.get_rng_state()
    next(iter(Views(*files, batch_size=8, workers=workers)))
    same_state = torch.equal(state, torch.get_rng_state())
    assert same_state


# ------------------------------------------------------------------------------------ patterns
def test_patterns_are_reproducible_and_balanced():
    images, labels = common.patterns(100)
    assert images.dtype == torch.uint8 and images.shape == (100, 3, 32, 32)
    assert hashlib.sha256(images.numpy().tobytes()).hexdigest() == PATTERNS_SHA256
    assert not torch.equal(images, common.patterns(100, seed=1)[0])
    assert labels.bincount().tolist() == [10] * 10
