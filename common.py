"""What all methods share, and only that: the images, the augmentations, the linear evaluation.

Evaluate a saved run, or an official checkpoint (recognised by the names of its weights):

    python common.py runs/simclr-patterns/checkpoint.pt --data patterns
    torchrun --nproc_per_node=8 common.py moco_v2_800ep_pretrain.pth.tar --data /data/imagenet

Letters: B images a batch, N images, H x W pixels, S x S after the crop, D features, V views."""
import argparse
import contextlib
import copy
import importlib
import io
import json
import math
import os
import re
import sys
import zlib
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from PIL import Image
from torch import nn
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as TF


def fail(message):
    """A mistake that the user can put right: one line, exit code 2."""
    print(f"error: {message}", file=sys.stderr, flush=True)
    raise SystemExit(2)


ZERO_ALLOWED = {"seed", "workers", "weight_decay", "warmup_epochs", "ema_momentum", "queue_size",
                "queue_start", "freeze_epochs", "small_crops", "dense_weight", "redundancy_weight"}
LIMITS = {"ema_momentum": 1, "dense_weight": 1, "crop_min": 1, "crop_split": 1,  # of others: 1e9
          "size": 4096, "small_size": 4096, "small_crops": 100, "sinkhorn_iterations": 1000,
          "workers": 1000}
IDLE = {  # a flag, and the setting of another with which it would have no effect
    "patch_size": ("arch", "(?!vit).*"), "small_size": ("small_crops", "0"),
    "queue_start": ("queue_size", "0"), "root": ("data", "(?!(cifar10|cifar100|stl10)$).*")}


def check(args, given=frozenset()):
    """Exits with one line for a flag whose number is out of range, or, among those given on the
    command line, one that would have no effect."""
    for name, value in vars(args).items():
        flag, low = "--" + name.replace("_", "-"), 0 if name in ZERO_ALLOWED else 1e-9
        if type(value) in (int, float) and not low <= value <= LIMITS.get(name, 1e9):
            fail(f"{flag} {value}: out of range")
    for name in given & IDLE.keys():
        other, idle = IDLE[name]
        if re.fullmatch(idle, str(getattr(args, other))):
            flag, other_flag = ("--" + key.replace("_", "-") for key in (name, other))
            fail(f"{flag} has no effect with {other_flag} {getattr(args, other)}")


def seeded(*key):
    """A random generator for this key alone: what it draws does not depend on what ran before, nor
    on the device (it is on the CPU), so a resumed run repeats the uninterrupted one."""
    return torch.Generator().manual_seed(zlib.crc32(repr(key).encode()))


def processes():
    """(rank, world size) under torchrun, else (0, 1)."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


@contextlib.contextmanager
def orderly(interrupted="stopped; the same command goes on after the last finished epoch"):
    """Around a program: an interrupt and a lack of memory end it with one line."""
    try:
        yield
    except KeyboardInterrupt:  # Ctrl-C or SIGTERM
        if processes()[0] == 0:
            print(f"\n{interrupted}", flush=True)
        raise SystemExit(130) from None
    except (MemoryError, RuntimeError) as error:
        if not re.search("out of memory|allocate memory|size calculation overflow", str(error)):
            raise
        fail("there is not enough memory: take a smaller --batch-size, --size or network")
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


# ---------------------------------------------------------------------------------- the images
PATTERNS = "stripes checks dots rings zigzag waves grid bricks bullseye pinwheel".split()
TORCHVISION = {"cifar10": torchvision.datasets.CIFAR10, "cifar100": torchvision.datasets.CIFAR100,
               "stl10": torchvision.datasets.STL10}
SUFFIXES = torchvision.datasets.folder.IMG_EXTENSIONS
SMALL = 96  # images that all have one square size up to this stay in memory


@dataclass
class Data:
    """Images are one uint8 tensor (N, 3, H, W) on the device or a list of N paths; labels (N,)."""
    name: str
    pretrain: torch.Tensor | list  # what the methods see
    train: tuple = ()  # (images, labels), for the linear classifier and kNN; () without labels
    test: tuple = ()
    classes: list = ()

    @property
    def large(self):
        """Of ImageNet's size: linear evaluation is trained for hours, as in the papers."""
        return bool(self.train) and len(self.train[0]) > 100_000


def patterns(n, seed=0):
    """n images of ten families of pattern drawn from a seed: uint8 (n, 3, 32, 32), labels (n,).
    Colours, phase, frequency and shading are random: only the family tells the class."""
    chance = torch.Generator().manual_seed(seed)

    def uniform(low, high, channels=1):
        return low + (high - low) * torch.rand(n, channels, 1, 1, generator=chance)

    x = (torch.arange(32).view(1, 32) + 0.5) / 16 - 1
    y, turn, frequency = x.T, uniform(-math.pi / 9, math.pi / 9), uniform(6, 11)
    u, v = x * turn.cos() + y * turn.sin(), y * turn.cos() - x * turn.sin()
    phase = uniform(0, 2 * math.pi)
    s, t = frequency * u + phase, frequency * v + uniform(0, 2 * math.pi)
    dx, dy = u - uniform(-0.5, 0.5), v - uniform(-0.5, 0.5)
    radius, course = dx.hypot(dy), (t / math.pi).floor()
    fields = torch.cat([  # in the order of PATTERNS; positive where the second colour goes
        s.sin(),
        s.sin() * t.sin() * 2,
        s.cos() + t.cos() - 0.6,
        0.45 - (s.cos() + t.cos() - 0.5).abs(),
        (s + 1.4 * t.sin().asin()).sin(),
        (t + 1.6 * (0.8 * s).sin()).sin(),
        torch.maximum(s.cos(), t.cos()) - 0.75,
        torch.maximum((s / 2 + course * math.pi / 2).cos().abs() - 0.93, 0.35 - t.sin().abs()) * 2,
        (1.3 * frequency * radius + phase).sin(),
        (4 * torch.atan2(dy, dx) + phase).sin() * radius.clamp(max=0.5) * 2], dim=1)
    labels = torch.arange(n) % len(PATTERNS)
    ink = torch.sigmoid(4 * fields[torch.arange(n), labels]).unsqueeze(1)  # (n, 1, 32, 32)
    dark, light = uniform(0.1, 0.4), uniform(0.6, 0.9)
    swap = uniform(0, 1) < 0.5
    # A little colour only: with more of it, colour names the image and no method needs the pattern.
    ground = torch.where(swap, light, dark) + uniform(-0.08, 0.08, 3)
    colour = torch.where(swap, dark, light) + uniform(-0.08, 0.08, 3)
    shade = 1 + uniform(-0.3, 0.3) * x + uniform(-0.3, 0.3) * y
    noise = 0.04 * torch.randn(n, 3, 32, 32, generator=chance)
    images = ((ground + (colour - ground) * ink) * shade + noise).clamp(0, 1)
    return (images * 255).round().byte(), labels


class BrokenImage(Exception):
    """A file that cannot be decoded; raised in a DataLoader's worker, shown by the main process."""


def read_image(path, least=None):
    """A file as PIL's RGB: transparency goes on white, 16 bits become 8. A JPEG may be decoded at
    1/2, 1/4 or 1/8 while its short side stays at least `least` pixels."""
    try:
        with Image.open(path) as image:
            if least:
                image.draft("RGB", [math.ceil(s * least / min(image.size)) for s in image.size])
            if image.mode.startswith("I"):  # 16 bits, which convert() would clip
                image = Image.fromarray((TF.pil_to_tensor(image)[0].int() // 256).byte().numpy())
            if "A" in image.mode or "transparency" in image.info:
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            return image.convert("RGB")
    except Exception as error:  # PIL raises nearly every kind for a damaged file
        raise BrokenImage(f"cannot read the image {path}: {error}") from None


def load(name, root="data", device="cpu"):
    """`patterns`, `cifar10`, `cifar100`, `stl10` (kept under root) or a folder of images, as Data.

    train/<class>/ with val/<class>/ or test/<class>/ beside it is labelled, any other tree is not.
    Exits with code 2 and one line for a folder that cannot be used or a data set out of reach."""
    if name == "patterns":
        images, labels = patterns(5000)
        sets = {"train": (images[:4000], labels[:4000]), "test": (images[4000:], labels[4000:])}
        classes = PATTERNS
    elif name in TORCHVISION:
        sets, classes = load_torchvision(name, root)
    else:
        sets, classes = load_folder(Path(name))
        name = Path(name).resolve().name
    sets = {part: tuple(x.to(device) if torch.is_tensor(x) else x for x in pair)
            for part, pair in sets.items()}
    return Data(name, sets.pop("pretrain", sets.get("train"))[0], classes=classes, **sets)


def load_torchvision(name, root):
    kind, stl = TORCHVISION[name], name == "stl10"
    parts = {"train": "train", "test": "test"} if stl else {"train": True, "test": False}
    follower = dist.is_initialized() and int(os.environ.get("LOCAL_RANK", 0)) > 0
    if follower:
        dist.barrier()  # one process a machine downloads; the others wait here
    try:
        sets = {part: kind(root, key, download=not follower) for part, key in parts.items()}
        sets |= {"pretrain": kind(root, "unlabeled")} if stl else {}
    except Exception as error:
        fail(f"{name} is not under {root} and cannot be downloaded ({type(error).__name__}); put "
             f"{kind.filename} there yourself, from {kind.url}")
    if dist.is_initialized() and not follower:
        dist.barrier()
    images = {part: torch.as_tensor(s.data) for part, s in sets.items()}
    labels = {part: torch.as_tensor(s.labels if stl else s.targets).long()
              for part, s in sets.items()}
    return {part: (x if stl else x.permute(0, 3, 1, 2).contiguous(), labels[part])
            for part, x in images.items()}, sets["train"].classes


def load_folder(folder):
    if not folder.is_dir():
        fail(f"--data {folder}: no such folder, nor one of patterns, {', '.join(TORCHVISION)}")
    train, classes = folder / "train", []
    test = next((folder / part for part in ("val", "test") if (folder / part).is_dir()), None)
    if test and train.is_dir() and any(path.is_dir() for path in train.iterdir()):
        try:
            found = {"train": torchvision.datasets.ImageFolder(train),
                     "test": torchvision.datasets.ImageFolder(test)}
        except OSError as error:  # a class without images, say
            fail(f"--data {folder}: {str(error).split(' Supported')[0]}")
        classes = found["train"].classes
        if classes != found["test"].classes:
            fail(f"--data {folder}: {train.name} and {test.name} hold different classes")
        sets = {part: ([path for path, _ in s.samples], torch.tensor(s.targets))
                for part, s in found.items()}
    else:
        sets = {"pretrain": (sorted(image_files(folder)),)}
    first = next(iter(sets.values()))[0]
    if len(first) < 2:
        fail(f"--data {folder}: {len(first)} image(s) found; it takes at least two")
    if is_small(first[0]):
        try:
            whole = stack([path for paths, *_ in sets.values() for path in paths])
        except BrokenImage as error:
            fail(error)
        if whole is not None:
            parts = whole.split([len(paths) for paths, *_ in sets.values()])
            sets = {part: (images, *rest)
                    for images, (part, (_, *rest)) in zip(parts, sets.items())}
    return sets, classes


def stack(paths):
    """The images as one tensor (N, 3, H, W), or None where they are of several sizes."""
    images = []
    for path in paths:
        images.append(TF.pil_to_tensor(read_image(path)))
        if images[-1].shape != images[0].shape:
            return None
    return torch.stack(images)


def image_files(folder):
    return (os.path.join(where, name) for where, _, names in os.walk(folder, followlinks=True)
            for name in names if name.lower().endswith(SUFFIXES))


def is_small(path):
    try:
        with Image.open(path) as image:
            return image.width == image.height <= SMALL
    except Exception as error:
        fail(f"cannot read the image {path}: {error}")


def recipe_for(name):
    """The column of a script's RECIPES that suits this data."""
    if name == "patterns" or name in TORCHVISION:
        return "patterns" if name == "patterns" else "cifar10"
    first = next(image_files(Path(name)), None)
    return "cifar10" if first and is_small(first) else "imagenet"


class Files(torch.utils.data.Dataset):
    """index -> a uint8 crop (3, S, S) a view, made in a DataLoader's worker: random crops that are
    a function of (key, index), or with no key the centre crop of evaluation."""

    def __init__(self, paths, augments, key=None):
        self.paths, self.augments, self.key = paths, augments, key

    def __getitem__(self, index):
        if self.key is None:
            size = self.augments[0].size
            image = TF.resize(read_image(self.paths[index]), round(size * 256 / 224))
            return [TF.pil_to_tensor(TF.center_crop(image, size))]
        chance = seeded("crop", *self.key, index)
        least = max(a.size / a.scale[0] ** 0.5 for a in self.augments)  # the smallest crop's need
        image = read_image(self.paths[index], least)
        views = []
        for a in self.augments:
            box = a.boxes(1, image.height, image.width, chance)[0].int().tolist()
            mode = InterpolationMode.BICUBIC if a.bicubic else InterpolationMode.BILINEAR
            views.append(TF.pil_to_tensor(TF.resized_crop(image, *box, [a.size, a.size], mode)))
        return views


def decoded(paths, rows, augments, workers, key=None):
    """Yields for each batch of indices a list of V uint8 batches (B, 3, S, S); see Files."""
    try:
        yield from torch.utils.data.DataLoader(
            Files(paths, augments, key), batch_sampler=rows, num_workers=workers,
            pin_memory=torch.cuda.is_available())
    except BrokenImage as error:  # a worker's comes with its traceback in front
        fail(str(error).rpartition("BrokenImage: ")[2])


# --------------------------------------------------------------------------- the augmentations
@dataclass(frozen=True)
class Augment:
    """One view: random resized crop, flip, colour jitter, grey, blur, solarize, normalisation.

    Called on uint8 (B, 3, H, W) it gives float (B, 3, S, S) on the same device. Every image draws
    its own parameters; the operations are torchvision's, in its order."""
    size: int = 224
    scale: tuple = (0.2, 1.0)  # share of the image's area
    flip: float = 0.5  # the lone numbers are probabilities
    jitter: tuple = (0.4, 0.4, 0.4, 0.1)  # brightness, contrast, saturation, hue
    jitter_p: float = 0.8
    grayscale: float = 0.2
    blur: float = 0.0  # with sigma U(.1, 2) pixels
    solarize: float = 0.0  # above 1/2
    bicubic: bool = False
    mean: tuple = (0.485, 0.456, 0.406)
    std: tuple = (0.229, 0.224, 0.225)

    @property
    def kind(self):
        """Two of one kind differ only in what they draw, and can be applied in one call."""
        return self.size, self.bicubic, self.jitter_p > 0, self.mean, self.std

    def boxes(self, n, height, width, chance):
        """n crops in whole pixels (n, 4): top, left, height, width. Area U(scale), aspect ratio
        log-uniform in 3/4 to 4/3: the first of ten draws that fits, else a large centre crop."""
        area = height * width * torch.empty(n, 10).uniform_(*self.scale, generator=chance)
        aspect = (4 / 3) ** torch.empty(n, 10).uniform_(-1, 1, generator=chance)
        sides = torch.stack([(area / aspect).sqrt().round(), (area * aspect).sqrt().round()])
        limit = torch.tensor([height, width]).view(2, 1, 1)
        fits = ((sides >= 1) & (sides <= limit)).all(0)  # (n, 10)
        sides = sides.gather(2, fits.int().argmax(1).expand(2, n).unsqueeze(2)).squeeze(2).T
        largest = [min(height, round(width * 4 / 3)), min(width, round(height * 4 / 3))]
        fits = fits.any(1, keepdim=True)
        sides = torch.where(fits, sides, torch.tensor(largest).float())  # (n, 2)
        place = torch.where(fits, torch.rand(n, 2, generator=chance), torch.tensor(0.4999))
        return torch.cat([(place * (limit.view(2) - sides + 1)).floor(), sides], dim=1)

    def draw(self, n, chance):
        """The other parameters of n images, a tensor of n rows each; 1, 0 or False: no change."""
        jittered = torch.rand(n, 1, generator=chance) < self.jitter_p
        change = (2 * torch.rand(n, 4, generator=chance) - 1) * torch.tensor(self.jitter) * jittered
        lots = torch.rand(n, 4, generator=chance)
        lots = lots < torch.tensor([self.flip, self.grayscale, self.blur, self.solarize])
        return {"factors": (1 + change[:, :3]).clamp(min=0), "hue": change[:, 3],
                "order": torch.rand(n, 3, generator=chance).argsort(1),  # of the three factors
                "hue_slot": torch.randint(4, (n,), generator=chance),  # hue's place among them
                "flip": lots[:, 0], "gray": lots[:, 1], "solarize": lots[:, 3],
                "sigma": torch.empty(n).uniform_(0.1, 2.0, generator=chance) * lots[:, 2]}

    def parameters(self, n, height, width, chance, cropped=False, share=(0, 1)):
        """(boxes, draws) of n views. chance: a generator, see seeded(); cropped: they are crops
        already, as from Files; share: (rank, world size), where W processes are to make the views
        that one would make."""
        rank, world_size = share
        mine = slice(rank * n, (rank + 1) * n)  # of what is drawn for the whole batch
        whole = torch.tensor([0.0, 0.0, height, width]).expand(n, 4)
        boxes = whole if cropped else self.boxes(world_size * n, height, width, chance)[mine]
        draws = self.draw(world_size * n, chance)
        return boxes, {name: value[mine] for name, value in draws.items()}

    def __call__(self, images, chance):
        n, _, height, width = images.shape
        return self.apply(images, *self.parameters(n, height, width, chance))

    def apply(self, images, boxes, draws):
        device = images.device
        x, flip = images.float().div_(255), send(draws["flip"], device)
        if bool((boxes == boxes.new_tensor([0, 0, self.size, self.size])).all()):
            x = torch.where(flip.view(-1, 1, 1, 1), x.flip(3), x)
        else:
            x = crop(x, send(boxes, device), flip, self.size, self.bicubic)
        if self.jitter_p:
            x = jitter(x, draws["factors"], draws["order"], draws["hue"], draws["hue_slot"])
        for name, change in (("gray", grayscale), ("sigma", gaussian_blur), ("solarize", solarize)):
            rows = draws[name].nonzero()[:, 0]
            if len(rows):
                there = send(rows, device)
                x[there] = change(x[there], send(draws[name][rows], device))
        return self.normalize(x)

    def normalize(self, x):
        mean, std = (send(torch.tensor(v).view(3, 1, 1), x.device) for v in (self.mean, self.std))
        return x.sub_(mean).div_(std)

    def plain(self, images):
        """The view of evaluation, without chance: uint8 (B, 3, H, W) -> (B, 3, S, S)."""
        x = images.float() / 255
        if x.shape[-1] != self.size:
            x = F.interpolate(x, [self.size] * 2, mode="bilinear", antialias=True)
        return self.normalize(x)


def send(x, device):
    """x on the device; the CPU does not wait for a GPU that still computes the step before. (mps
    would read what is not pinned when it may be gone, pytorch issue 189690: there it waits.)"""
    if device.type == "cuda" and x.is_cpu:
        x = x.pin_memory()
    return x.to(device, non_blocking=device.type != "mps")


def resampling(start, length, flip, pixels, size, bicubic):
    """Matrices (B, size, pixels) that resize [start, start + length) to `size`, antialiased."""
    start, length = start.view(-1, 1, 1), length.view(-1, 1, 1)
    target = torch.arange(size, device=start.device).view(1, -1, 1)
    target = torch.where(flip.view(-1, 1, 1), size - 1 - target, target) + 0.5
    source = torch.arange(pixels, device=start.device) + 0.5
    d = ((source - start - target * (length / size)) / (length / size).clamp(min=1)).abs()
    weight = (1 - d).clamp_(min=0)
    if bicubic:  # Keys' kernel with a = -1/2, as in PIL
        far = (((2.5 - 0.5 * d) * d - 4) * d + 2) * (d < 2)
        weight = torch.where(d < 1, (1.5 * d - 2.5) * d * d + 1, far)
    weight = weight * ((source > start) & (source < start + length))  # nothing from beyond the crop
    return weight / weight.sum(2, keepdim=True)


def crop(x, boxes, flip, size, bicubic=False):
    """x (B, 3, H, W), boxes (B, 4), flip (B,) -> (B, 3, size, size): for each image what
    torchvision's resized_crop(antialias=True) and hflip give, as two products of matrices."""
    (n, channels, height, width), (top, left, tall, wide) = x.shape, boxes.unbind(1)
    rows = resampling(top, tall, torch.zeros_like(flip), height, size, bicubic)  # (B, S, H)
    columns = resampling(left, wide, flip, width, size, bicubic)  # (B, S, W)
    x = torch.bmm(x.reshape(n, channels * height, width), columns.transpose(1, 2))
    x = x.view(n, channels, height, size).unbind(1)
    x = torch.stack([torch.bmm(rows, channel) for channel in x], dim=1)
    return x.clamp_(0, 1) if bicubic else x


def jitter(x, factors, order, hue, hue_slot):
    """torchvision's ColorJitter with an order of its own for each image. Brightness, contrast and
    saturation are one blend, factor * x + (1 - factor) * base; only the base differs."""
    for slot in range(4):
        rows = ((hue_slot == slot) & (hue != 0)).nonzero()[:, 0]
        there = send(rows, x.device)
        x[there] = shift_hue(x[there], send(hue[rows], x.device).view(-1, 1, 1))
        if slot < 3:
            turn, gray = order[:, slot], luminance(x)
            is_contrast, is_saturation = (
                send((turn == k).float(), x.device).view(-1, 1, 1, 1) for k in (1, 2))
            mean = gray.mean((2, 3), keepdim=True) * is_contrast
            base = gray.mul_(is_saturation).add_(mean)  # brightness: 0
            factor = send(factors.gather(1, turn.unsqueeze(1)), x.device).view(-1, 1, 1, 1)
            torch.lerp(base, x, factor, out=x).clamp_(0, 1)
    return x


def shift_hue(x, turns):
    """Shifts the hue of x (B, 3, H, W) by turns (B, 1, 1) of the HSV circle."""
    red, green, blue = x.unbind(1)
    value = torch.maximum(red, green).maximum(blue)
    chroma = value - torch.minimum(red, green).minimum(blue)
    scale = 1 / chroma.clamp(min=1e-12)  # grey has no hue, and all differences are 0
    hue = torch.where(value == green, (blue - red).mul_(scale).add_(2),
                      (red - green).mul_(scale).add_(4))
    hue = torch.where(value == red, (green - blue).mul_(scale), hue).add_(6 * turns)
    hue.sub_((hue / 6).floor_(), alpha=6)  # in sixths of a turn, from red
    shifted = torch.empty_like(x)
    for channel, (centre, sign) in enumerate(((3, -1), (2, 1), (4, 1))):
        lack = (hue - centre).abs_().sub_(1.5).mul_(sign).add_(0.5).clamp_(0, 1)
        torch.addcmul(value, chroma, lack, value=-1, out=shifted[:, channel])
    return shifted


def luminance(x):
    red, green, blue = x.unbind(1)
    return (0.2989 * red).add_(green, alpha=0.587).add_(blue, alpha=0.114).unsqueeze(1)


def grayscale(x, _):
    return luminance(x).expand_as(x)


def solarize(x, _):
    return torch.where(x >= 0.5, 1 - x, x)


def gaussian_blur(x, sigma):
    """x (B, 3, S, S), sigma (B,); the kernel is a tenth of S wide (SimCLR, appendix A)."""
    n, channels, size, _ = x.shape
    width = size // 10 | 1  # odd
    taps = torch.arange(width, device=x.device) - width // 2
    kernel = torch.softmax(-0.5 * (taps / sigma.view(-1, 1)) ** 2, dim=1)
    kernel = kernel.repeat_interleave(channels, 0).view(n * channels, 1, 1, width)
    x = F.pad(x, [width // 2] * 4, mode="reflect").flatten(0, 1).unsqueeze(0)
    x = F.conv2d(F.conv2d(x, kernel, groups=len(kernel)), kernel.mT, groups=len(kernel))
    return x.view(n, channels, size, size)


# SimCLR, appendix A: crops of 8 % and more, colour distortion of strength 1; no normalisation.
_SIMCLR = Augment(scale=(0.08, 1.0), jitter=(0.8, 0.8, 0.8, 0.2), blur=0.5, bicubic=True,
                  mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
# MoCo v1's code draws grey before the jitter; here it comes after, as in all others.
_MOCO_V1 = Augment(jitter=(0.4, 0.4, 0.4, 0.4), jitter_p=1.0)
_MOCO_V2 = Augment(blur=0.5)
# BYOL, table 6: two different views, the first always blurred, the second sometimes solarized.
_BYOL = (Augment(scale=(0.08, 1.0), jitter=(0.4, 0.4, 0.2, 0.1), blur=1.0, bicubic=True),
         Augment(scale=(0.08, 1.0), jitter=(0.4, 0.4, 0.2, 0.1), blur=0.1, solarize=0.2,
                 bicubic=True))
# SwAV, section 5.1 and appendix A: two large crops and six small ones, colours as in SimCLR.
_SWAV = Augment(scale=(0.14, 1.0), jitter=(0.8, 0.8, 0.8, 0.2), blur=0.5)
AUGMENTS = {"simclr": (_SIMCLR,) * 2, "moco_v1": (_MOCO_V1,) * 2, "moco_v2": (_MOCO_V2,) * 2,
            "byol": _BYOL, "simsiam": (_MOCO_V2,) * 2, "barlow": _BYOL,
            "swav": (_SWAV,) * 2 + (replace(_SWAV, size=96, scale=(0.05, 0.14)),) * 6,
            "densecl": (_MOCO_V2,) * 2,
            "moco_v3": tuple(replace(a, bicubic=False) for a in _BYOL)}


def adapt(augments, size, strength=1.0):
    """The views at another size, small ones without blur, the colour jitter times strength."""
    return tuple(replace(a, size=size, blur=a.blur if size > SMALL else 0.0,
                         jitter=tuple(strength * j for j in a.jitter)) for a in augments)


class Views:
    """What a script loops over: each step gives a list of V tensors (B, 3, S, S) on the device, B
    being this process's share of the global batch_size. An epoch is a function of (seed, epoch):
    W processes together make the views that one makes."""

    def __init__(self, images, augments, batch_size, device="cpu", seed=0, workers=0):
        self.images, self.augments, self.batch_size = images, augments, batch_size
        self.device, self.seed, self.workers, self.epoch = torch.device(device), seed, workers, 0
        if batch_size % processes()[1]:
            fail(f"--batch-size {batch_size} cannot be shared by {processes()[1]} processes")
        if batch_size < 2 * processes()[1]:
            fail(f"--batch-size {batch_size}: batch normalisation takes two images a process")
        if batch_size > len(images):
            fail(f"--batch-size {batch_size}, but the data has only {len(images)} images")

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __len__(self):
        return len(self.images) // self.batch_size  # an incomplete batch is dropped

    def rows(self):
        """The indices of this process's images, (steps, B): its share of one common permutation."""
        rank, world_size = processes()
        order = torch.randperm(len(self.images), generator=seeded("order", self.seed, self.epoch))
        return order[:len(self) * self.batch_size].view(len(self), world_size, -1)[:, rank]

    def __iter__(self):
        rows, chance = self.rows(), seeded("views", self.seed, self.epoch, 0)
        cropped = not torch.is_tensor(self.images)
        if cropped:
            key = (self.seed, self.epoch)
            steps = decoded(self.images, rows.tolist(), self.augments, self.workers, key)
        else:
            steps = ([self.images[r]] * len(self.augments) for r in rows.to(self.device))
        for batch in steps:
            batch, views = (send(x, self.device) for x in batch), []
            for _, same in groupby(zip(self.augments, batch), key=lambda pair: pair[0].kind):
                augments, images = zip(*same)  # these are made in one call
                (n, _, height, width), count = images[0].shape, len(images)
                boxes, draws = zip(*(a.parameters(n, height, width, chance, cropped, processes())
                                     for a in augments))
                draws = {name: torch.cat([draw[name] for draw in draws]) for name in draws[0]}
                views += augments[0].apply(torch.cat(images), torch.cat(boxes), draws).contiguous(
                    memory_format=torch.channels_last).chunk(count)
            yield views


# ---------------------------------------------------------------------- the linear evaluation
DECAYS = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1)  # weight decays to choose from, on held-out training images
RATES = (0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0)  # learning rates of SGD, likewise


@torch.no_grad()
def features(backbone, images, augment, device, workers=0):
    """h (N, D) in float32 of all images, in eval mode; under torchrun each process does a share.
    On a copy: the backbone, running statistics included, stays as it is to the bit."""
    rank, world_size = processes()
    backbone = copy.deepcopy(backbone).eval()
    for tensor in backbone.state_dict().values() if world_size > 1 else ():
        dist.broadcast(tensor, 0)  # running statistics may differ between processes
    share = math.ceil(len(images) / world_size)
    rows = torch.arange(rank * share, (rank + 1) * share).clamp(max=len(images) - 1).split(250)
    if torch.is_tensor(images):
        parts = (images[r.to(images.device)] for r in rows)
    else:
        rows = [r.tolist() for r in rows]
        parts = (crops for crops, in decoded(images, rows, [augment], workers))
    h = torch.cat([backbone(augment.plain(x.to(device))).float() for x in parts])
    if world_size > 1:
        shares = [torch.empty_like(h) for _ in range(world_size)]
        dist.all_gather(shares, h)
        h = torch.cat(shares)[:len(images)]
    if not h.abs().max() < 1e15:  # or nan
        fail("the features are not finite, or too large to fit a classifier; try a lower --lr")
    return h


def accuracy(scores, labels):
    """{"top1": percent}, and "top5" where there are more than ten classes."""
    hits = scores.topk(min(5, scores.shape[1])).indices == labels.unsqueeze(1)
    return {f"top{k}": 100 * hits[:, :k].any(1).sum().item() / len(labels)
            for k in ((1, 5) if scores.shape[1] > 10 else (1,))}


def held_out(n):
    """n rows as (four fifths to fit, one fifth to choose on), the same split every time."""
    order = torch.randperm(n, generator=seeded("held out"))
    return order[n // 5:], order[:n // 5]


def fit_linear(h, labels, classes, decay):
    """Logistic regression on h (N, D) by L-BFGS: cross-entropy + decay * |W|^2, as an nn.Linear."""
    head = nn.Linear(h.shape[1], classes, device=h.device)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    optimizer = torch.optim.LBFGS(head.parameters(), max_iter=150, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = F.cross_entropy(head(h), labels) + decay * head.weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return head.requires_grad_(False)


def linear_probe(h, labels, h_test, labels_test, classes):
    """Test accuracy of the linear classifier on h (N, D) whose decay is best on held-out rows."""
    std, mean = torch.std_mean(h, dim=0)
    h, h_test = ((x - mean) / (std + 1e-6) for x in (h, h_test))
    fit, choose = (rows.to(h.device) for rows in held_out(len(h)))

    def held_out_top1(decay):
        head = fit_linear(h[fit], labels[fit], classes, decay)
        return accuracy(head(h[choose]), labels[choose])["top1"]

    head = fit_linear(h, labels, classes, max(DECAYS, key=held_out_top1))
    return accuracy(head(h_test), labels_test)


def knn(h, labels, h_test, labels_test, classes, k=200, temperature=0.1):
    """Top-1 in percent of the weighted kNN of Wu et al., 2018, section 3.4: the k training images
    nearest by cosine vote for their class with weight exp(cosine / temperature)."""
    h, correct = F.normalize(h, dim=1), 0
    for batch, truth in zip(F.normalize(h_test, dim=1).split(500), labels_test.split(500)):
        cosine, nearest = (batch @ h.T).topk(min(k, len(h)))
        votes = torch.zeros(len(batch), classes, device=h.device)
        votes.scatter_add_(1, labels[nearest], (cosine / temperature).exp())
        correct += (votes.argmax(1) == truth).sum().item()
    return 100 * correct / len(labels_test)


def linear_eval(backbone, data, augment, device, classifier=True, epochs=None, workers=0, k=200):
    """Percent of the test set for the frozen backbone: linear_top1, linear_top5 (over ten classes),
    knn_top1, and knn_k; nothing without labels. Every choice is made on training images.

    epochs 0: the classifier is fitted once, to the features of whole images; else it is trained
    for so many epochs on crops and flips, as in the papers; None: 100 on what is as large as
    ImageNet, else 0. classifier False: kNN alone."""
    if not data.test:
        return {}
    if epochs is None:
        epochs = 100 if data.large else 0
    h, h_test = (features(backbone, images, augment, device, workers)
                 for images in (data.train[0], data.test[0]))
    task = (h, data.train[1], h_test, data.test[1], len(data.classes))
    found = {}
    if classifier and epochs:
        found = linear_sgd(backbone, data, augment, device, h_test, epochs, workers)
    elif classifier:
        found = linear_probe(*task)
    return {"knn_top1": knn(*task, k=k), "knn_k": min(k, len(h))} | {
        f"linear_{name}": value for name, value in found.items()}


def linear_sgd(backbone, data, augment, device, h_test, epochs, workers=0, batch_size=256):
    """The papers' protocol: random resized crops and flips, SGD with momentum .9, no weight decay,
    cosine schedule; one classifier a learning rate, and the one best on held-out images counts."""
    (images, labels), (_, world_size) = data.train, processes()
    fit, choose = held_out(len(images))
    kept, rest = (images[rows.to(device)] if torch.is_tensor(images) else [images[i] for i in rows]
                  for rows in (choose, fit))
    view = replace(augment, scale=(0.08, 1.0), jitter_p=0.0, grayscale=0.0, blur=0.0, solarize=0.0)
    batch_size = min(batch_size, len(fit)) // world_size * world_size
    views = Views(rest, [view], batch_size, device, workers=workers)
    heads = nn.ModuleList(nn.Linear(h_test.shape[1], len(data.classes)) for _ in RATES).to(device)
    for parameter in heads.parameters():
        nn.init.zeros_(parameter)
    optimizer = torch.optim.SGD([{"params": head.parameters(), "lr": rate * batch_size / 256}
                                 for head, rate in zip(heads, RATES)], momentum=0.9)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    backbone = copy.deepcopy(backbone).eval()
    for epoch in range(epochs):
        views.set_epoch(epoch)
        for rows, (x,) in zip(views.rows(), views):
            with torch.no_grad():
                h = backbone(x).float()
            optimizer.zero_grad()
            truth = labels[fit[rows].to(device)]
            sum(F.cross_entropy(head(h), truth) for head in heads).backward()
            for parameter in heads.parameters() if world_size > 1 else ():
                dist.all_reduce(parameter.grad)
                parameter.grad /= world_size
            optimizer.step()
        schedule.step()
    h = features(backbone, kept, augment, device, workers)
    best = max(heads, key=lambda head: accuracy(head(h), labels[choose.to(device)])["top1"])
    return accuracy(best(h_test), data.test[1])


@torch.no_grad()
def health(z):
    """Two signs of collapse of an embedding z (B, C): the std of z / |z|, averaged over dimensions,
    times sqrt(C) (1 is healthy, 0 collapsed; SimSiam, section 4.1), and the effective rank, the
    exponential of the entropy of the singular values (Roy and Vetterli, 2007)."""
    z = F.normalize(z.float().cpu(), dim=1)
    share = torch.linalg.svdvals(z)
    share = share / share.sum()
    rank = torch.special.entr(share).sum().exp()
    return {"std": (z.std(0).mean() * z.shape[1] ** 0.5).item(), "effective_rank": rank.item()}


def report(path, title, log, chance, views, backbone, data, device):
    """Draws one picture of a run. log: the lines of log.jsonl; chance: the loss of a network that
    tells nothing, or None. Under torchrun all processes call it, the first one draws."""
    batch, view = [v[:8] for v in next(iter(views))], views.augments[0]
    images = data.test[0] if data.test else data.pretrain
    images = images[::max(1, len(images) // 1000)][:1000]  # sorted by class in folders
    h = F.normalize(features(backbone, images, view, device, views.workers), dim=1)
    if processes()[0]:
        return
    from matplotlib.figure import Figure  # here: whoever does not draw need not wait for it

    def show(axis, images, title):
        images = images.cpu().float()
        grid = torchvision.utils.make_grid(images, 8, 1, normalize=True, scale_each=True)
        axis.imshow(grid.permute(1, 2, 0).numpy())
        axis.set(title=title, xticks=[], yticks=[])

    def curve(axis, key, title, **settings):
        lines = [line for line in log if key in line]
        axis.plot([line["epoch"] for line in lines], [line[key] for line in lines], marker=".")
        axis.set(title=title, xlabel="epoch", **settings)
        axis.xaxis.get_major_locator().set_params(integer=True)

    figure = Figure(figsize=(15, 9), layout="constrained")
    (a, b, c), (d, e, f) = figure.subplots(2, 3)
    figure.suptitle(title)
    side = max(v.shape[-1] for v in batch)
    batch = [F.pad(v, [0, side - v.shape[-1]] * 2) for v in batch]  # small crops, to scale
    show(a, torch.cat(batch), f"the {len(batch)} views of eight images, one image a column")
    curve(b, "loss", "loss")
    if chance is not None:
        b.axhline(chance, color="gray", linestyle=":")
        b.set(title=f"loss; dotted: {chance:.2f}, of a network that tells nothing")
    curve(c, "knn_top1", "kNN top-1 (%); epoch 0 is random weights")
    values = torch.linalg.svdvals(h.cpu())
    d.semilogy((values / values[0]).clamp(min=1e-6).tolist())
    d.set(title="singular values of h: an early cliff is a collapse", xlabel="rank")
    curve(e, "std", "std of z times sqrt(C): 1 is healthy, 0 collapsed", ylim=(0, 1.1))
    queries = h[torch.randperm(len(h), generator=seeded("queries"))[:8].to(device)]
    near = (queries @ h.T).topk(min(6, len(h))).indices.T.flatten().cpu()  # each is its own nearest
    near = images[near.to(device)] if torch.is_tensor(images) else next(
        decoded(images, [near.tolist()], [view], 0))[0]
    show(f, near, "top row: images; below each its five nearest")
    figure.savefig(picture := io.BytesIO(), dpi=80)
    save(path, picture.getvalue())


# ----------------------------------------------------------------------------- a run's files
COLLAPSED = 0.1  # of health's std: below it record warns


def save(path, content):
    """Writes text, bytes, or anything else with torch.save, beside the file and then renames: there
    is always one whole file, the new or the old. Exits with one line where it cannot."""
    beside, buffer = path.with_name(path.name + ".tmp"), io.BytesIO()
    if isinstance(content, str | bytes):
        buffer.write(content.encode() if isinstance(content, str) else content)
    else:
        torch.save(content, buffer)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(beside, "wb") as file:
            file.write(buffer.getbuffer())
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except OSError as error:
        try:
            beside.unlink(missing_ok=True)
        except OSError:
            pass
        fail(f"cannot write {path} ({error.strerror}); what was there before is kept")


def load_checkpoint(path):
    """A checkpoint as it was saved; code in it is never run. Exits with one line if broken."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        reason = (str(error) or repr(error)).splitlines()[0]
        fail(f"{path} is not a readable checkpoint ({reason})")


def resume(method, args, model, optimizer):
    """Puts model and optimizer where the unfinished run in args.out was and returns its log; None
    where a new run starts there. A run that is finished or has other arguments ends the program
    with one line, or is overwritten."""
    path, finished = Path(args.out, "checkpoint.pt"), Path(args.out, "result.json").exists()
    found = path.exists()
    if dist.is_initialized():
        dist.barrier()  # all have looked before one writes
    if not found:
        return None
    checkpoint = load_checkpoint(path)
    try:
        old = {f"--{name.replace('_', '-')}": value for name, value in checkpoint["args"].items()}
        old |= {"method": checkpoint["method"], "processes": checkpoint["world_size"]}
    except (KeyError, TypeError, AttributeError):
        fail(f"{path} is not a checkpoint of this program: name another --out")
    new = {f"--{name.replace('_', '-')}": value for name, value in vars(args).items()}
    new |= {"method": method, "processes": processes()[1]}
    free = ("--workers", "--root", "--out", "--compile", "--overwrite")  # no other result
    differ = [f"{name} {old.get(name)} there, {new.get(name)} here"  # None: another version's flag
              for name in new | old if name not in free and old.get(name) != new.get(name)]
    if not differ and not finished:
        try:
            model.load_state_dict(checkpoint["model"])
            optimizer.load_state_dict(checkpoint["optimizer"])
            return checkpoint["log"]
        except (KeyError, TypeError, ValueError, RuntimeError):
            fail(f"{path} is of another version of this program: name another --out")
    if not args.overwrite:
        what = f"another run ({'; '.join(differ)})" if differ else "this run, finished"
        fail(f"{args.out} holds {what}: name another --out, or --overwrite it")
    return None


def record(method, args, log, views, model, optimizer):
    """Writes checkpoint.pt and log.jsonl after an epoch and prints its line; log[0], the random
    weights, stands for a run that begins here, in place of a finished one if there was one."""
    out, line, (rank, world_size) = Path(args.out), log[-1], processes()
    if rank:
        return
    save(out / "checkpoint.pt", {
        "method": method, "args": vars(args), "world_size": world_size, "epoch": line["epoch"],
        "log": log, "model": model.state_dict(), "optimizer": optimizer.state_dict()})
    save(out / "log.jsonl", "".join(json.dumps(entry) + "\n" for entry in log))
    if line["epoch"] == 0:
        (out / "result.json").unlink(missing_ok=True)
        text = "random weights"
    else:
        speed = len(views) * args.batch_size / line["seconds"]
        text = (f"loss {line['loss']:.3f} (chance {model.chance_loss:.2f})  lr {line['lr']:.3g}  "
                f"std {line['std']:.2f}  rank {line['effective_rank']:.0f}  {speed:.0f} images/s  "
                f"ETA {(args.epochs - line['epoch']) * line['seconds'] / 60:.1f} min")
    knn = f"  kNN {line['knn_top1']:.1f} %" if "knn_top1" in line else ""
    back = "\r" if sys.stdout.isatty() else ""  # over the progress within the epoch
    print(f"{back}epoch {line['epoch']}/{args.epochs}  {text}{knn}", flush=True)
    if line.get("std", 1.0) < COLLAPSED:
        print(f"warning: std {line['std']:.3f}: all images are getting the same embedding, the "
              "network has collapsed; try a lower learning rate or a smaller batch", flush=True)


def conclude(method, args, data, log, views, model, device):
    """Draws and writes what a finished run leaves in args.out, says so, and returns the result."""
    out, (rank, world_size) = Path(args.out), processes()
    first, last, seconds = log[0], log[-1], sum(line.get("seconds", 0.0) for line in log)
    result = {"method": method, "data": data.name, "arch": args.arch, "epochs": args.epochs,
              "batch_size": args.batch_size, "world_size": world_size,
              **{key: last.get(key) for key in ("linear_top1", "linear_top5", "knn_top1", "knn_k")},
              "random_linear_top1": first.get("linear_top1"),
              "random_knn_top1": first.get("knn_top1"), "seconds": round(seconds, 1),
              "images_per_second": round(args.epochs * len(views) * args.batch_size / seconds, 1),
              "device": torch.cuda.get_device_name() if device.type == "cuda" else device.type,
              "memory_gib": torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda"
              else None, "torch": torch.__version__, "seed": args.seed}
    title = f"{method} on {data.name}, {args.arch}, {args.epochs} epochs"
    report(out / "report.png", title, log, model.chance_loss, views, model.backbone, data, device)
    if rank == 0:
        state = model.backbone.state_dict()
        save(out / "backbone.pt", {name: value.cpu() for name, value in state.items()})
        save(out / "result.json", json.dumps(result, indent=1) + "\n")
        found = "trained; linear evaluation needs labels"
        if data.test:
            parts = [("linear top-1", "linear_top1"),
                     (f"kNN(k={last['knn_k']}, T=.1, cosine)", "knn_top1")]
            found = ", ".join(f"{text} {last[key]:.1f} %"
                              + (f" (random weights {first[key]:.1f} %)" if key in first else "")
                              for text, key in parts)
            found += f", chance {100 / len(data.classes):.1f} %"
        print(f"{title}: {found}. See {out / 'report.png'}", flush=True)
    return result


# Where the backbone's weights lie, by the names that go before them; tried in this order.
LAYOUTS = {"encoder.backbone.": "ours", "encoder_q.backbone.": "ours", "encoder_q.0.": "DenseCL",
           "encoder_q.": "MoCo v1 or v2", "base_encoder.": "MoCo v3", "encoder.": "SimSiam",
           "backbone.": "Barlow Twins", "": "torchvision names"}
RESNETS = ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152", "wide_resnet50_2")
VITS = {"vit_small": (384, 12), "vit_base": (768, 12)}  # width, heads; of MoCo v3
FIRST = ("conv1.weight", "conv_proj.weight", "patch_embed.proj.weight")  # a backbone's first layer
TO_TORCHVISION = (  # the official names of a ViT's weights -> torchvision's
    ("cls_token", "class_token"), ("pos_embed", "encoder.pos_embedding"),
    ("patch_embed.proj", "conv_proj"), ("blocks.", "encoder.layers.encoder_layer_"),
    ("norm1", "ln_1"), ("norm2", "ln_2"), ("attn.proj", "self_attention.out_proj"),
    ("attn.qkv.", "self_attention.in_proj_"), ("mlp.fc1", "mlp.0"), ("mlp.fc2", "mlp.3"))


def load_backbone(path):
    """(backbone, augment, description) of a run of ours or of an official checkpoint."""
    checkpoint = load_checkpoint(path)
    state = checkpoint
    for key in ("model", "state_dict"):
        state = state.get(key, state) if isinstance(state, dict) else state
    if not isinstance(state, dict) or not all(torch.is_tensor(v) for v in state.values()):
        fail(f"{path} holds no weights that this program knows")
    state = {name.removeprefix("module."): value for name, value in state.items()}
    prefix = next((p for p in LAYOUTS if any(p + first in state for first in FIRST)), None)
    if prefix is None:
        fail(f"{path}: no ResNet or ViT found under any of the names {', '.join(LAYOUTS)}")
    body = {name.removeprefix(prefix): v for name, v in state.items() if name.startswith(prefix)}
    if "method" in checkpoint:
        try:  # only a script that lies beside this file is imported
            if not Path(__file__).with_name(f"{Path(checkpoint['method']).name}.py").exists():
                raise ImportError(f"no {checkpoint['method']}.py")
            script = importlib.import_module(checkpoint["method"])
            args = script.Args(**checkpoint["args"])
        except (ImportError, AttributeError, KeyError, TypeError) as error:
            fail(f"{path} is of another version of this program ({error})")
        backbone = script.build_backbone(args)[0]
        augment = adapt(AUGMENTS[checkpoint["method"]], args.size)[0]
        name = f"{checkpoint['method']}, {args.arch}, epoch {checkpoint['epoch']}"
    else:
        if "patch_embed.proj.weight" in body:
            body = {re.sub(r"^norm\.", "encoder.ln.", name): v for name, v in body.items()}
            for old, new in TO_TORCHVISION:
                body = {name.replace(old, new): v for name, v in body.items()}
        name, backbone = fitting(body)
        if backbone is None:
            fail(f"{path}: {LAYOUTS[prefix]}, but none of {', '.join((*RESNETS, *VITS))}")
        name, augment = f"{name}, {LAYOUTS[prefix]}", Augment()
    dropped = sorted({key.split(".")[0] for key in body.keys() - backbone.state_dict().keys()}
                     | {key.split(".")[0] for key in state if not key.startswith(prefix)})
    try:
        backbone.load_state_dict({key: body[key] for key in backbone.state_dict()})
    except (KeyError, RuntimeError):
        fail(f"{path} is of another version of this program")
    return backbone, augment, f"{name}; left out: {', '.join(dropped) or 'nothing'}"


def fitting(body):
    """(name, network) of the architecture whose weights have these names and shapes; a classifier
    may be missing or be another. (None, None) if there is none."""
    kinds = {name: getattr(torchvision.models, name) for name in RESNETS}
    kinds |= {name: partial(torchvision.models.VisionTransformer, 224, 16, 12, heads, dim, 4 * dim)
              for name, (dim, heads) in VITS.items()}
    for name, kind in kinds.items():
        with torch.device("meta"):
            shapes = {key: value.shape for key, value in kind().state_dict().items()
                      if not key.startswith(("fc.", "heads."))}
        roots = {key.split(".")[0] for key in shapes}
        if shapes == {k: v.shape for k, v in body.items() if k.split(".")[0] in roots}:
            backbone = kind()
            setattr(backbone, "fc" if hasattr(backbone, "fc") else "heads", nn.Identity())
            return name, backbone
    return None, None


def evaluate(args):
    """Prints what a checkpoint is and what its backbone reaches."""
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    if "RANK" in os.environ:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    backbone, augment, name = load_backbone(args.checkpoint)
    data = load(args.data, args.root, device)
    if not data.test:
        fail(f"--data {args.data} has no labels: it takes train/<class>/ and val/<class>/ folders")
    result = linear_eval(backbone.to(device), data, augment, device, epochs=args.epochs,
                         workers=args.workers)
    if processes()[0] == 0:
        print(f"{args.checkpoint}: {name}")
        print(json.dumps({"data": data.name, **result}))


def main():
    parser = argparse.ArgumentParser(description="Linear evaluation and kNN of a saved backbone.")
    parser.error = fail
    parser.add_argument("checkpoint")
    parser.add_argument("--data", default="patterns")
    parser.add_argument("--root", default="data", help="where torchvision keeps its data sets")
    parser.add_argument("--epochs", type=int, help="of SGD on crops and flips; default 100 beyond "
                        "100,000 images, else 0: fitted to the features of whole images")
    parser.add_argument("--workers", type=int, default=min(8, os.cpu_count() or 1))
    args = parser.parse_args()
    with orderly("stopped"):
        evaluate(args)


if __name__ == "__main__":
    main()
