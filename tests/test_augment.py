"""Augmentations against torchvision's functional operations, image by image."""

from dataclasses import replace

import pytest
import torch
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as V

import common
from common import AUGMENTS, Augment, Views, seeded

EVERYTHING = Augment(size=32, jitter=(0.8, 0.8, 0.8, 0.4), grayscale=0.3, blur=0.5, solarize=0.3)


def torchvisions(augment, image, box, draws, i):
    """The same view of one uint8 image (3, H, W), by torchvision."""
    mode = v2.InterpolationMode.BICUBIC if augment.bicubic else v2.InterpolationMode.BILINEAR
    size = [augment.size, augment.size]
    x = V.resized_crop(image.float() / 255, *box.int().tolist(), size, mode, antialias=True)
    x = x.clamp(0, 1)
    x = V.horizontal_flip(x) if draws["flip"][i] else x
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
    chance = seeded("test", pixels, size)
    images = torch.randint(0, 256, (64, 3, pixels, pixels), generator=chance, dtype=torch.uint8)
    images[0] = 100  # grey has no hue
    boxes, draws = augment.boxes(64, pixels, pixels, chance), augment.draw(64, chance)
    ours = augment.apply(images, boxes, draws)
    theirs = torch.stack(
        [torchvisions(augment, image, boxes[i], draws, i) for i, image in enumerate(images)]
    )
    # Solarize jumps at 1/2: a rounding error may fall on either side of it.
    assert ((ours - theirs).abs() > 1e-4).float().mean() < 1e-4
    still = ~draws["solarize"]
    assert torch.allclose(ours[still], theirs[still], atol=1e-4)


def test_each_image_draws_its_own_parameters():
    image = torch.randint(0, 256, (1, 3, 32, 32), dtype=torch.uint8).expand(64, 3, 32, 32)
    views = EVERYTHING(image, seeded(0))
    assert len({view.numpy().tobytes() for view in views}) == 64
    draws = EVERYTHING.draw(1000, seeded(0))
    assert len(draws["factors"].unique(dim=0)) > 700 and len(draws["order"].unique(dim=0)) == 6
    assert sorted(draws["hue_slot"].unique().tolist()) == [0, 1, 2, 3]
    for name, share in (("gray", 0.3), ("sigma", 0.5), ("solarize", 0.3), ("flip", 0.5)):
        assert (draws[name] != 0).float().mean().item() == pytest.approx(share, abs=0.06), name
    assert (draws["hue"] != 0).float().mean().item() == pytest.approx(0.8, abs=0.05)


@pytest.mark.parametrize("height, width", [(32, 32), (40, 100), (400, 20)])
def test_boxes_are_distributed_as_torchvisions(height, width):
    augment = Augment(scale=(0.08, 1.0))
    ours = augment.boxes(2000, height, width, seeded("boxes"))
    torch.manual_seed(0)
    image = torch.empty(3, height, width)
    get = v2.RandomResizedCrop(8, augment.scale).make_params
    theirs = torch.tensor(
        [
            [p["top"], p["left"], p["height"], p["width"]]
            for p in (get([image]) for _ in range(2000))
        ]
    ).float()
    assert torch.equal(ours, ours.round()) and (ours[:, 2:] >= 1).all() and (ours[:, :2] >= 0).all()
    assert (ours[:, 0] + ours[:, 2] <= height).all() and (ours[:, 1] + ours[:, 3] <= width).all()
    error = 4 * theirs.std(0) / 2000**0.5 * 2**0.5 + 0.02
    assert ((ours.mean(0) - theirs.mean(0)).abs() < error).all(), (ours.mean(0), theirs.mean(0))


def test_strength_and_size():
    simclr = common.adapt(AUGMENTS["simclr"], 32, 0.5)
    assert [a.jitter for a in simclr] == [(0.4, 0.4, 0.4, 0.1)] * 2
    assert all(a.size == 32 and a.blur == 0 for a in simclr)
    assert AUGMENTS["simclr"][0].jitter == (0.8, 0.8, 0.8, 0.2)
    assert AUGMENTS["simclr"][0].blur == 0.5
    assert common.adapt(AUGMENTS["moco_v2"], 224)[0] == Augment(blur=0.5)


def test_plain_view_has_no_chance():
    images = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8)
    augment = Augment(size=32)
    expected = V.normalize(images.float() / 255, augment.mean, augment.std)
    assert torch.allclose(augment.plain(images), expected)
    assert replace(augment, size=16).plain(images).shape == (4, 3, 16, 16)


def test_views_are_a_function_of_seed_and_epoch():
    images = torch.randint(0, 256, (50, 3, 32, 32), dtype=torch.uint8)
    views = Views(images, common.adapt(AUGMENTS["moco_v2"], 32), 16, seed=3)
    assert len(views) == 3

    def epoch(number):
        views.set_epoch(number)
        return torch.stack([torch.stack(step) for step in views])

    first, second = epoch(1), epoch(2)
    assert first.shape == (3, 2, 16, 3, 32, 32)
    assert torch.equal(first, epoch(1)) and not torch.equal(first, second)
    assert not torch.equal(first[:, 0], first[:, 1])
    views.set_epoch(1)
    assert len(views.rows().flatten().unique()) == 48  # each image at most once an epoch


@pytest.mark.parametrize("large", [False, True])
def test_two_processes_make_the_views_of_one(large, photos, monkeypatch):
    images = torch.randint(0, 256, (50, 3, 32, 32), dtype=torch.uint8)
    if large:
        images = common.load(str(photos)).pretrain

    def epoch(rank, world_size):
        monkeypatch.setattr(common, "processes", lambda: (rank, world_size))
        return list(Views(images, common.adapt(AUGMENTS["byol"], 32), 16, seed=3))

    for one, first, second in zip(epoch(0, 1), epoch(0, 2), epoch(1, 2), strict=True):
        for whole, *halves in zip(one, first, second, strict=True):
            assert len(halves[0]) == 8 and torch.allclose(whole, torch.cat(halves), atol=1e-6)


@pytest.mark.parametrize("workers", [0, 2])
def test_files_give_the_same_views_with_any_number_of_workers(photos, workers):
    data = common.load(str(photos))
    assert isinstance(data.pretrain, list) and len(data.pretrain) == 20
    views = Views(data.pretrain, AUGMENTS["moco_v2"], 8, seed=1, workers=workers)
    views.set_epoch(4)
    steps = [torch.stack(step) for step in views]
    assert [tuple(step.shape) for step in steps] == [(2, 8, 3, 224, 224)] * 2
    oracle = Views(data.pretrain, AUGMENTS["moco_v2"], 8, seed=1)
    oracle.set_epoch(4)
    assert all(torch.equal(a, torch.stack(b)) for a, b in zip(steps, oracle))


def test_patterns_are_reproducible_and_balanced():
    images, labels = common.patterns(100)
    assert images.dtype == torch.uint8 and images.shape == (100, 3, 32, 32)
    assert torch.equal(images, common.patterns(100)[0])
    assert not torch.equal(images, common.patterns(100, seed=1)[0])
    assert labels.bincount().tolist() == [10] * 10


@pytest.mark.parametrize("method", ["byol", "swav"])  # views that differ in chance, and in size
def test_views_made_in_one_call_are_those_made_one_by_one(method):
    augments = common.adapt(AUGMENTS[method], 32)
    if method == "swav":
        augments = augments[:2] + common.adapt(augments[2:], 16)
    images = torch.randint(0, 256, (40, 3, 32, 32), dtype=torch.uint8)
    views = Views(images, augments, batch_size=20)
    chance = seeded("views", 0, 0, 0)
    for rows, batch in zip(views.rows(), views):
        assert len(batch) == len(augments)
        for augment, view in zip(augments, batch):
            assert torch.equal(view, augment(images[rows], chance))
