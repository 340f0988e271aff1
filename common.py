"""What all methods share: the images, the augmentations, and how the features are judged.

Shapes: B images per process, N images in all, H x W pixels, S x S after a crop, D features."""

import copy
import math
import os
import sys
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from PIL import Image
from torch import nn
from torchvision.models.resnet import BasicBlock, ResNet
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as TF

PATTERNS = "stripes checks dots rings zigzag waves grid bricks bullseye pinwheel".split()
TORCHVISION = {
    "cifar10": torchvision.datasets.CIFAR10,
    "cifar100": torchvision.datasets.CIFAR100,
    "stl10": torchvision.datasets.STL10,
}
SUFFIXES = torchvision.datasets.folder.IMG_EXTENSIONS
IN_MEMORY = 96  # square images of one size up to this are held on the device
DECAYS = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1)  # weight decays the linear probe chooses from


def fail(message: object):
    """Ends the program over something the user can correct: one line on stderr, exit code 2."""
    print(f"error: {message}", file=sys.stderr, flush=True)
    raise SystemExit(2)


def rank() -> int:
    """The number of this process among those of torchrun; 0 without it."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """W, the number of processes that train together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def make_generator(*key: object) -> torch.Generator:
    """A random generator on the CPU that depends on the key alone: not on what ran before, nor on
    the device, so a resumed run draws what the uninterrupted one would have drawn."""
    return torch.Generator().manual_seed(zlib.crc32(repr(key).encode()))


def to_device(x: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Copies x without waiting for the GPU. (On mps it waits: there an unpinned copy may read
    memory that has been freed, pytorch issue 189690.)"""
    if device.type == "cuda" and x.is_cpu:
        x = x.pin_memory()
    return x.to(device, non_blocking=device.type != "mps")


# -------------------------------------------------------------------------------------- images
@dataclass
class Data:
    """Images are one uint8 tensor (N, 3, H, W) on the device, or a list of N paths."""

    name: str
    pretrain: torch.Tensor | list  # what the methods see, without labels
    train: tuple = ()  # (images, labels (N,)) for the evaluation; () without labels
    test: tuple = ()
    classes: list = ()

    @property
    def large(self) -> bool:
        """As large as ImageNet: the linear classifier is left to evaluate.py."""
        return bool(self.train) and len(self.train[0]) > 100_000


def patterns(n: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """n images of ten families of pattern, drawn from a seed: uint8 (n, 3, 32, 32), labels (n,).
    Colour, phase, frequency and shading are random, so only the family tells the class."""
    images, labels, _ = draw_patterns(n, seed)
    return images, labels


def draw_patterns(n, seed):
    """The same, and what could be said of each image beside its family: {name: (n,)}."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(low, high, channels=1):
        return low + (high - low) * torch.rand(n, channels, 1, 1, generator=generator)

    x = torch.arange(32).view(1, 32)
    x = (x + 0.5) / 16 - 1
    y = x.T
    tilt = math.pi / 9
    angle = uniform(-tilt, tilt)
    cos = angle.cos()
    sin = angle.sin()
    frequency = uniform(6, 11)
    u = x * cos + y * sin
    v = y * cos - x * sin
    phase = uniform(0, 2 * math.pi)
    s = frequency * u + phase
    t = frequency * v + uniform(0, 2 * math.pi)
    dx = u - uniform(-0.5, 0.5)
    dy = v - uniform(-0.5, 0.5)
    radius = dx.hypot(dy)
    row = (t / math.pi).floor()
    upright = (s / 2 + row * math.pi / 2).cos()
    upright = upright.abs() - 0.93
    level = 0.35 - t.sin().abs()
    spokes = 4 * torch.atan2(dy, dx)
    spokes = (spokes + phase).sin()
    fields = [  # in the order of PATTERNS; positive where the second colour goes
        s.sin(),
        s.sin() * t.sin() * 2,
        s.cos() + t.cos() - 0.6,
        0.45 - (s.cos() + t.cos() - 0.5).abs(),
        (s + 1.4 * t.sin().asin()).sin(),
        (t + 1.6 * (0.8 * s).sin()).sin(),
        torch.maximum(s.cos(), t.cos()) - 0.75,
        torch.maximum(upright, level) * 2,
        (1.3 * frequency * radius + phase).sin(),
        spokes * radius.clamp(max=0.5) * 2,
    ]
    labels = torch.arange(n) % len(PATTERNS)
    fields = torch.cat(fields, dim=1)  # (n, 10, 32, 32)
    field = fields[torch.arange(n), labels]
    ink = torch.sigmoid(4 * field)
    ink = ink.unsqueeze(1)  # (n, 1, 32, 32)
    dark = uniform(0.1, 0.4)
    light = uniform(0.6, 0.9)
    swap = uniform(0, 1) < 0.5
    # Only a little colour: with more, colour identifies the image and no method needs the pattern.
    ground = torch.where(swap, light, dark)
    ground = ground + uniform(-0.08, 0.08, 3)
    colour = torch.where(swap, dark, light)
    colour = colour + uniform(-0.08, 0.08, 3)
    shade = 1 + uniform(-0.3, 0.3) * x
    shade = shade + uniform(-0.3, 0.3) * y
    noise = torch.randn(n, 3, 32, 32, generator=generator)
    images = ground + (colour - ground) * ink
    images = images * shade + 0.04 * noise
    images = (images.clamp(0, 1) * 255).round()
    drawn = {
        "frequency": frequency.flatten(),
        "tilt": angle.flatten(),
        "pale": ~swap.flatten(),  # the second colour, on a dark ground
    }
    return images.byte(), labels, drawn


def load_images(name: str, root: str = "data", device: torch.device | str = "cpu") -> Data:
    """`patterns`, `scenes`, `cifar10`, `cifar100`, `stl10` (under root), or a folder of images.

    A folder with train/<class>/ and val/<class>/ or test/<class>/ is labelled, any other tree of
    images is not. Exits with one line if the folder or data set cannot be used."""
    if name == "patterns":
        images, labels = patterns(5000)
        more_images, more_labels = patterns(3000, seed=50)
        train = (images[:4000], labels[:4000])
        test = (torch.cat([images[4000:], more_images]), torch.cat([labels[4000:], more_labels]))
        sets = {"train": train, "test": test}
        classes = PATTERNS
    elif name == "scenes":
        import scenes  # here, because that module is made of parts of this one

        sets = scenes.load_crops()
        classes = PATTERNS
    elif name in TORCHVISION:
        sets, classes = load_torchvision(name, root)
    else:
        sets, classes = load_folder(Path(name))
        name = Path(name).resolve().name
    for part, tensors in sets.items():
        sets[part] = tuple(x.to(device) if torch.is_tensor(x) else x for x in tensors)
    unlabelled = sets.get("pretrain", sets.get("train"))[0]
    return Data(name, unlabelled, sets.get("train", ()), sets.get("test", ()), classes)


def load_torchvision(name, root):
    kind = TORCHVISION[name]
    stl = name == "stl10"
    waits = world_size() > 1 and int(os.environ.get("LOCAL_RANK", 0)) > 0
    if world_size() > 1:  # a group of its own: a download can outlast nccl's time-out
        group = dist.new_group(backend="gloo", timeout=timedelta(days=1))
    if waits:
        dist.barrier(group)  # the first process of each machine downloads
    try:
        train = kind(root, "train" if stl else True, download=not waits)
        test = kind(root, "test" if stl else False, download=not waits)
        parts = {"train": train, "test": test}
        if stl:
            parts["pretrain"] = kind(root, "unlabeled")
    except Exception as error:
        fail(
            f"{name} is not under {root} and cannot be downloaded ({type(error).__name__}); "
            f"put {kind.filename} there yourself, from {kind.url}"
        )
    if world_size() > 1 and not waits:
        dist.barrier(group)
    sets = {}
    for part, dataset in parts.items():
        images = torch.as_tensor(dataset.data)
        if not stl:
            images = images.permute(0, 3, 1, 2).contiguous()
        labels = torch.as_tensor(dataset.labels if stl else dataset.targets)
        sets[part] = (images, labels.long())
    return sets, train.classes


def load_folder(folder):
    if not folder.is_dir():
        fail(f"--data {folder}: no such folder, nor one of patterns, {', '.join(TORCHVISION)}")
    train = folder / "train"
    test = folder / "val" if (folder / "val").is_dir() else folder / "test"
    classes = []
    if test.is_dir() and train.is_dir() and any(path.is_dir() for path in train.iterdir()):
        sets = {"train": list_classes(train), "test": list_classes(test)}
        classes = sets["train"].pop()
        if classes != sets["test"].pop():
            fail(f"--data {folder}: {train.name} and {test.name} hold different classes")
    else:
        sets = {"pretrain": [sorted(image_files(folder))]}
    first = next(iter(sets.values()))[0]
    if len(first) < 2:
        fail(f"--data {folder}: {len(first)} image(s) found; training takes at least two")
    if is_small(first[0]):
        paths = sum((part[0] for part in sets.values()), [])
        images = stack(paths)
        if images is not None:
            start = 0
            for part in sets.values():
                end = start + len(part[0])
                part[0] = images[start:end]
                start = end
    return sets, classes


def list_classes(folder):
    """[paths, labels, names of the classes] of folder/<class>/."""
    try:
        found = torchvision.datasets.ImageFolder(folder)
    except OSError as error:  # no classes, or one without images
        fail(f"--data {folder}: {str(error).split(' Supported')[0]}")
    paths = [path for path, _ in found.samples]
    return [paths, torch.tensor(found.targets), found.classes]


def image_files(folder: Path) -> Iterator[str]:
    for where, _, names in os.walk(folder, followlinks=True):
        for name in names:
            if name.lower().endswith(SUFFIXES):
                yield os.path.join(where, name)


def is_small(path: str) -> bool:
    """Whether images like this one are held in memory."""
    try:
        with Image.open(path) as image:
            return image.width == image.height <= IN_MEMORY
    except Exception as error:
        fail(f"cannot read the image {path}: {error}")


def stack(paths):
    """The images as one tensor (N, 3, H, W), or None if their sizes differ."""
    images = []
    for path in paths:
        try:
            images.append(TF.pil_to_tensor(read_image(path)))
        except BrokenImage as error:
            fail(error)
        if images[-1].shape != images[0].shape:
            return None
    return torch.stack(images)


class BrokenImage(Exception):
    """A file that cannot be decoded; raised in a worker, reported by the main process."""


def read_image(path, least=None):
    """A file as PIL's RGB: transparency becomes white, 16 bits become 8. A JPEG may be decoded at
    1/2, 1/4 or 1/8 of its size while its short side stays at least `least` pixels."""
    try:
        with Image.open(path) as image:
            if least:
                factor = least / min(image.size)
                image.draft("RGB", [math.ceil(side * factor) for side in image.size])
            if image.mode.startswith("I"):  # 16 bits, which convert() would clip
                image = Image.fromarray((TF.pil_to_tensor(image)[0].int() // 256).byte().numpy())
            if "A" in image.mode or "transparency" in image.info:
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            return image.convert("RGB")
    except Exception as error:  # a damaged file can make PIL raise nearly anything
        raise BrokenImage(f"cannot read the image {path}: {error}") from None


class RandomCrops(torch.utils.data.Dataset):
    """(epoch, index) -> one uint8 crop (3, S, S) per view, made in a DataLoader's worker. The crops
    are a function of (seed, epoch, index)."""

    def __init__(self, paths, augments, seed):
        self.paths = paths
        self.augments = augments
        self.seed = seed
        # Pixels that a crop of the smallest allowed area needs on the image's short side.
        self.least = max(a.size / max(a.scale[0], 0.01) ** 0.5 for a in augments)

    def __getitem__(self, item):
        epoch, index = item
        generator = make_generator("crop", self.seed, epoch, index)
        image = read_image(self.paths[index], self.least)
        views = []
        for a in self.augments:
            box = a.draw_boxes(1, image.height, image.width, generator)[0]
            top, left, height, width = box.int().tolist()
            size = [a.size, a.size]
            view = TF.resized_crop(image, top, left, height, width, size, a.interpolation)
            views.append(TF.pil_to_tensor(view))
        return views


class CentreCrops(torch.utils.data.Dataset):
    """index -> the uint8 image (3, S, S) that evaluation sees: the centre of the resized image."""

    def __init__(self, paths, view):
        self.paths = paths
        self.view = view

    def __getitem__(self, index):
        image = read_image(self.paths[index])
        short_side = round(self.view.size * self.view.margin)
        image = TF.resize(image, short_side, self.view.interpolation)
        image = TF.center_crop(image, self.view.size)
        return TF.pil_to_tensor(image)


def decode(dataset, batches, workers):
    """A DataLoader over lists of items; its workers live as long as it does."""
    return torch.utils.data.DataLoader(
        dataset,
        batch_sampler=batches,
        num_workers=workers,
        persistent_workers=workers > 0,
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator(),  # or starting workers would advance the training's own
    )


def decoded(loader):
    """The loader's batches; a broken image ends the program with its line."""
    try:
        yield from loader
    except BrokenImage as error:  # from a worker, it arrives behind a traceback
        fail(str(error).rpartition("BrokenImage: ")[2])


# ------------------------------------------------------------------------------- augmentations
@dataclass(frozen=True)
class Augment:
    """One random view: resized crop, flip, colour jitter, grayscale, blur, solarization and
    normalisation. Every image draws its own parameters; each operation equals torchvision's.

    augment(images, generator): uint8 (B, 3, H, W) -> float32 (B, 3, S, S), on the same device."""

    size: int  # S, in pixels
    scale: tuple = (0.08, 1.0)  # area of the crop, as a fraction of the image's
    flip: float = 0.5  # probability, as are jitter_p, grayscale, blur and solarize
    jitter: tuple = (0.0, 0.0, 0.0, 0.0)  # brightness, contrast, saturation, hue
    jitter_p: float = 0.0
    grayscale: float = 0.0
    blur: float = 0.0  # Gaussian, sigma U(0.1, 2) pixels
    solarize: float = 0.0  # above 1/2
    bicubic: bool = False
    margin: float = 256 / 224  # evaluation resizes a file's short side to S times this
    mean: tuple = (0.485, 0.456, 0.406)
    std: tuple = (0.229, 0.224, 0.225)

    def __post_init__(self):
        low, high = self.scale
        if not 0 <= low <= high <= 1:
            fail(f"crops cannot take {low} to {high} of the image's area")

    @property
    def interpolation(self):
        """Of images from files, by PIL."""
        return InterpolationMode.BICUBIC if self.bicubic else InterpolationMode.BILINEAR

    def __call__(self, images, generator, cropped=False):
        """With W processes, each draws for the whole batch and uses its own part, so that together
        they make the views of one process. cropped: the images are crops already, from files."""
        n, _, height, width = images.shape
        mine = slice(rank() * n, (rank() + 1) * n)
        if cropped:
            boxes = torch.tensor([0.0, 0.0, height, width]).expand(n, 4)
        else:
            boxes = self.draw_boxes(world_size() * n, height, width, generator)[mine]
        draws = self.draw(world_size() * n, generator)
        return self.apply(images, boxes, {name: value[mine] for name, value in draws.items()})

    def draw_boxes(self, n, height, width, generator):
        """n crops (n, 4) in whole pixels: top, left, height, width. Area U(scale), aspect ratio
        log-uniform in 3/4 to 4/3; the first of ten draws that fits, or else a large centre crop."""
        fraction = torch.empty(n, 10).uniform_(*self.scale, generator=generator)
        area = height * width * fraction
        exponent = torch.empty(n, 10).uniform_(-1, 1, generator=generator)
        aspect = (4 / 3) ** exponent
        tall = (area / aspect).sqrt()
        tall = tall.round()
        wide = (area * aspect).sqrt()
        wide = wide.round()
        fits = (tall >= 1) & (tall <= height) & (wide >= 1) & (wide <= width)
        first = fits.int().argmax(1, keepdim=True)
        drawn = torch.cat([tall.gather(1, first), wide.gather(1, first)], dim=1)  # (n, 2)
        largest = [min(height, round(width * 4 / 3)), min(width, round(height * 4 / 3))]
        fits = fits.any(1, keepdim=True)
        sides = torch.where(fits, drawn, torch.tensor(largest).float())
        place = torch.rand(n, 2, generator=generator)
        place = torch.where(fits, place, torch.tensor(0.4999))
        limit = torch.tensor([height, width])
        corner = (place * (limit - sides + 1)).floor()
        return torch.cat([corner, sides], dim=1)

    def draw(self, n, generator):
        """The other parameters, n rows each; 1, 0 or False leaves the image unchanged."""
        jittered = torch.rand(n, 1, generator=generator) < self.jitter_p
        change = torch.rand(n, 4, generator=generator)
        change = (2 * change - 1) * torch.tensor(self.jitter)
        change = change * jittered
        probability = torch.tensor([self.flip, self.grayscale, self.blur, self.solarize])
        happens = torch.rand(n, 4, generator=generator) < probability
        order = torch.rand(n, 3, generator=generator)
        order = order.argsort(1)
        hue_slot = torch.randint(4, (n,), generator=generator)
        sigma = torch.empty(n).uniform_(0.1, 2.0, generator=generator)
        return {
            "factors": (1 + change[:, :3]).clamp(min=0),  # brightness, contrast, saturation
            "hue": change[:, 3],
            "order": order,  # of the three factors
            "hue_slot": hue_slot,  # hue's place among them
            "flip": happens[:, 0],
            "gray": happens[:, 1],
            "sigma": sigma * happens[:, 2],
            "solarize": happens[:, 3],
        }

    def apply(self, images, boxes, draws):
        x = images.float().div_(255)
        flip = to_device(draws["flip"], x.device)
        whole = torch.tensor([0.0, 0.0, self.size, self.size])
        if bool((boxes == whole).all()):
            x = torch.where(flip.view(-1, 1, 1, 1), x.flip(3), x)
        else:
            x = crop(x, to_device(boxes, x.device), flip, self.size, self.bicubic)
        if self.jitter_p > 0:
            x = jitter(x, draws)
        x = change_drawn(x, draws["gray"], grayscale)
        x = change_drawn(x, draws["sigma"], gaussian_blur)
        x = change_drawn(x, draws["solarize"], solarize)
        return self.normalize(x)

    def normalize(self, x):
        mean = torch.tensor(self.mean).view(3, 1, 1)
        std = torch.tensor(self.std).view(3, 1, 1)
        x.sub_(to_device(mean, x.device))
        return x.div_(to_device(std, x.device))

    def plain(self, images):
        """The view of evaluation, with nothing random: uint8 (B, 3, H, W) -> (B, 3, S, S)."""
        x = images.float() / 255
        if x.shape[-1] != self.size:
            x = F.interpolate(x, [self.size] * 2, mode="bilinear", antialias=True)
        return self.normalize(x)


def change_drawn(x, amount, operation):
    """operation(x, amount) on those images whose amount (B,) is not 0."""
    rows = amount.nonzero()[:, 0]
    if len(rows) > 0:
        there = to_device(rows, x.device)
        x[there] = operation(x[there], to_device(amount[rows], x.device))
    return x


def crop(x, boxes, flip, size, bicubic=False):
    """x (B, 3, H, W), boxes (B, 4), flip (B,) -> (B, 3, size, size): for each image, torchvision's
    resized_crop(antialias=True) and hflip, as two matrix products."""
    n, channels, height, width = x.shape
    top, left, box_height, box_width = boxes.unbind(1)
    never = torch.zeros_like(flip)
    rows = resampling(top, box_height, never, height, size, bicubic)  # (B, S, H)
    columns = resampling(left, box_width, flip, width, size, bicubic)  # (B, S, W)
    x = x.reshape(n, channels * height, width)
    x = torch.bmm(x, columns.transpose(1, 2))
    x = x.view(n, channels, height, size)
    x = [torch.bmm(rows, channel) for channel in x.unbind(1)]
    x = torch.stack(x, dim=1)
    return x.clamp_(0, 1) if bicubic else x


def resampling(start, length, flip, pixels, size, bicubic):
    """Matrices (B, size, pixels) that resize [start, start + length) to `size`, antialiased."""
    start = start.view(-1, 1, 1)
    length = length.view(-1, 1, 1)
    target = torch.arange(size, device=start.device).view(1, -1, 1)
    target = torch.where(flip.view(-1, 1, 1), size - 1 - target, target)
    source = torch.arange(pixels, device=start.device) + 0.5
    step = length / size
    centre = (target + 0.5) * step
    d = (source - start - centre) / step.clamp(min=1)
    d = d.abs()
    weight = (1 - d).clamp_(min=0)
    if bicubic:  # Keys' kernel with a = -1/2, as in PIL
        near = (1.5 * d - 2.5) * d * d + 1
        far = ((2.5 - 0.5 * d) * d - 4) * d + 2
        far = far * (d < 2)
        weight = torch.where(d < 1, near, far)
    inside = (source > start) & (source < start + length)
    weight = weight * inside
    return weight / weight.sum(2, keepdim=True)


def jitter(x, draws):
    """torchvision's ColorJitter, each image in an order of its own. Brightness, contrast and
    saturation are one blend, factor * x + (1 - factor) * base, with different bases."""
    for slot in range(4):
        here = (draws["hue_slot"] == slot) & (draws["hue"] != 0)
        x = change_drawn(x, draws["hue"] * here, shift_hue)
        if slot == 3:
            break
        kind = draws["order"][:, slot]  # 0 brightness, 1 contrast, 2 saturation
        is_contrast = to_device((kind == 1).float(), x.device).view(-1, 1, 1, 1)
        is_saturation = to_device((kind == 2).float(), x.device).view(-1, 1, 1, 1)
        gray = luminance(x)
        mean = gray.mean((2, 3), keepdim=True) * is_contrast
        base = gray.mul_(is_saturation).add_(mean)  # for brightness: 0
        factor = draws["factors"].gather(1, kind.unsqueeze(1))
        factor = to_device(factor, x.device).view(-1, 1, 1, 1)
        torch.lerp(base, x, factor, out=x).clamp_(0, 1)
    return x


def shift_hue(x, turns):
    """Shifts the hue of x (B, 3, H, W) by turns (B,) of the HSV circle."""
    red, green, blue = x.unbind(1)
    value = torch.maximum(red, green).maximum(blue)
    chroma = value - torch.minimum(red, green).minimum(blue)
    scale = 1 / chroma.clamp(min=1e-12)  # a grey pixel has no hue, and all differences are 0
    from_green = (blue - red).mul_(scale).add_(2)
    from_blue = (red - green).mul_(scale).add_(4)
    from_red = (green - blue).mul_(scale)
    hue = torch.where(value == green, from_green, from_blue)
    hue = torch.where(value == red, from_red, hue)
    hue.add_(6 * turns.view(-1, 1, 1))
    hue.sub_((hue / 6).floor_(), alpha=6)  # in sixths of a turn, from red
    shifted = torch.empty_like(x)
    for channel, centre, sign in ((0, 3, -1), (1, 2, 1), (2, 4, 1)):
        missing = (hue - centre).abs_().sub_(1.5)
        missing = missing.mul_(sign).add_(0.5).clamp_(0, 1)
        torch.addcmul(value, chroma, missing, value=-1, out=shifted[:, channel])
    return shifted


def luminance(x):
    red, green, blue = x.unbind(1)
    gray = 0.2989 * red
    gray.add_(green, alpha=0.587)
    gray.add_(blue, alpha=0.114)
    return gray.unsqueeze(1)


def grayscale(x, _):
    return luminance(x).expand_as(x)


def solarize(x, _):
    return torch.where(x >= 0.5, 1 - x, x)


def gaussian_blur(x, sigma):
    """x (B, 3, S, S), sigma (B,) in pixels; the kernel is a tenth of S wide."""
    n, channels, size, _ = x.shape
    width = size // 10 | 1  # odd
    half = width // 2
    offset = torch.arange(width, device=x.device) - half
    distance = offset / sigma.view(-1, 1)
    kernel = torch.softmax(-0.5 * distance**2, dim=1)
    kernel = kernel.repeat_interleave(channels, 0)
    kernel = kernel.view(n * channels, 1, 1, width)
    x = F.pad(x, [half, half, half, half], mode="reflect")
    x = x.flatten(0, 1)
    x = x.unsqueeze(0)  # every channel of every image is convolved on its own
    x = F.conv2d(x, kernel, groups=len(kernel))
    x = F.conv2d(x, kernel.mT, groups=len(kernel))
    return x.view(n, channels, size, size)


class Views:
    """What a script loops over: each step yields a list with one view (B, 3, S, S) per Augment, on
    the device; B is this process's part of the global batch_size. An epoch is a function of
    (seed, epoch): W processes together see the views that one process would see."""

    def __init__(
        self,
        images: torch.Tensor | list,
        augments: list[Augment],
        batch_size: int,
        device: torch.device | str = "cpu",
        seed: int = 0,
        workers: int = 0,
    ):
        self.images = images
        self.augments = augments
        self.device = torch.device(device)
        self.batches = Batches(len(images), batch_size, seed)
        self.loader = None
        if batch_size % world_size():
            fail(f"--batch-size {batch_size} cannot be divided among {world_size()} processes")
        if batch_size < 2 * world_size():
            fail(f"--batch-size {batch_size}: batch normalisation needs two images per process")
        if batch_size > len(images):
            fail(f"--batch-size {batch_size}, but the data has only {len(images)} images")
        if not torch.is_tensor(images):
            self.loader = decode(RandomCrops(images, augments, seed), self.batches, workers)

    def set_epoch(self, epoch: int):
        self.batches.epoch = epoch

    def __len__(self) -> int:
        return len(self.batches)

    def rows(self) -> torch.Tensor:
        """The indices of this process's images, (steps, B)."""
        return self.batches.rows()

    def read(self):
        """Per step, the uint8 images (B, 3, H, W) that each view is made from."""
        if self.loader is not None:
            yield from decoded(self.loader)
            return
        for rows in self.rows().to(self.images.device):
            yield [self.images[rows]] * len(self.augments)

    def __iter__(self) -> Iterator[list[torch.Tensor]]:
        generator = make_generator("views", self.batches.seed, self.batches.epoch, 0)
        for sources in self.read():
            views = []
            for augment, images in zip(self.augments, sources):
                images = to_device(images, self.device)
                view = augment(images, generator, cropped=self.loader is not None)
                views.append(view.contiguous(memory_format=torch.channels_last))
            yield views


class Batches:
    """Which images are in the batches of the current epoch: (epoch, index) for each, for
    RandomCrops. (Not part of Views, or DataLoader and Views would keep each other alive.)"""

    def __init__(self, images, batch_size, seed):
        self.images = images  # how many there are
        self.batch_size = batch_size
        self.seed = seed
        self.epoch = 0

    def __len__(self):
        return self.images // self.batch_size  # an incomplete batch is dropped

    def rows(self):
        """(steps, B): this process's part of one permutation of all images."""
        generator = make_generator("order", self.seed, self.epoch)
        order = torch.randperm(self.images, generator=generator)
        order = order[: len(self) * self.batch_size]
        order = order.view(len(self), world_size(), -1)
        return order[:, rank()]

    def __iter__(self):
        for rows in self.rows().tolist():
            yield [(self.epoch, index) for index in rows]


# ------------------------------------------------------------------- the features and their worth
def resnet(arch: str, size: int, **options) -> nn.Module:
    """torchvision's ResNet without its classifier: (B, 3, H, W) -> h (B, D), with D in `.dim`.
    `thin`: a ResNet of four blocks, 16 to 128 channels, for minutes on a CPU. Images of up to 64
    pixels get a first convolution of 3 x 3 and no pooling after it, as is usual for CIFAR."""
    names = torchvision.models.list_models(torchvision.models, include=["resnet*", "wide_resnet*"])
    if arch == "thin":
        network = ResNet(BasicBlock, [1, 1, 1, 1], **options)
        norm_layer = options.get("norm_layer", nn.BatchNorm2d)
        network.inplanes = 16
        network.conv1 = nn.Conv2d(3, 16, 3, stride=2, padding=1, bias=False)
        network.bn1 = norm_layer(16)
        network.fc = nn.Linear(128, 1)
        network.layer1 = network._make_layer(BasicBlock, 16, 1, stride=1)
        network.layer2 = network._make_layer(BasicBlock, 32, 1, stride=2)
        network.layer3 = network._make_layer(BasicBlock, 64, 1, stride=2)
        network.layer4 = network._make_layer(BasicBlock, 128, 1, stride=2)
    elif arch in names:
        network = torchvision.models.get_model(arch, **options)
        if size <= 64:
            network.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
    else:
        fail(f"--arch {arch}: neither thin nor one of {', '.join(names)}")
    if size <= 64:
        network.maxpool = nn.Identity()
    network.dim = network.fc.in_features
    network.fc = nn.Identity()
    return network


@torch.no_grad()
def features(
    backbone: nn.Module,
    images: torch.Tensor | list,
    view: Augment,
    device: torch.device | str,
    workers: int = 0,
) -> torch.Tensor:
    """h (N, D) in float32 of all images, each process computing its part. Works on a copy in eval
    mode: the backbone, running statistics included, stays as it is to the bit."""
    backbone = copy.deepcopy(backbone).eval()
    if world_size() > 1:
        for tensor in backbone.state_dict().values():
            dist.broadcast(tensor, 0)  # running statistics may differ between processes
    part = math.ceil(len(images) / world_size())
    rows = torch.arange(rank() * part, (rank() + 1) * part).clamp(max=len(images) - 1).split(250)
    if torch.is_tensor(images):
        batches = (images[r.to(images.device)] for r in rows)
    else:
        items = [r.tolist() for r in rows]
        batches = decoded(decode(CentreCrops(images, view), items, workers))
    h = None
    start = rank() * part
    for x in batches:
        found = backbone(view.plain(x.to(device))).float()
        if h is None:  # one tensor for the features of all processes: ImageNet's take 10 GB
            h = found.new_empty(world_size() * part, found.shape[1])
        h[start : start + len(found)] = found
        start += len(found)
    if world_size() > 1:
        parts = list(h.split(part))
        dist.all_gather(parts, parts[rank()].clone())
    h = h[: len(images)]
    if not h.abs().max() < 1e15:  # or nan
        fail("the features are not finite, or too large to fit a classifier; try a lower --lr")
    return h


def linear_eval(
    backbone: nn.Module,
    data: Data,
    view: Augment,
    device: torch.device | str,
    workers: int = 0,
    classifier: bool = True,
    k: int = 200,
) -> dict[str, float]:
    """What the frozen features say about the labels, in percent of the test images: knn_top1 (and
    knn_k), and with `classifier` linear_top1 (and linear_top5 for more than ten classes). Whatever
    is chosen is chosen on training images. {} without labels."""
    if not data.test:
        return {}
    h = features(backbone, data.train[0], view, device, workers)
    h_test = features(backbone, data.test[0], view, device, workers)
    task = (h, data.train[1], h_test, data.test[1], len(data.classes))
    metrics = {"knn_top1": knn(*task, k=k), "knn_k": min(k, len(h))}
    if classifier and not data.large:  # for ImageNet: evaluate.py
        for name, value in linear_probe(*task).items():
            metrics[f"linear_{name}"] = value
    return metrics


def knn(h, labels, h_test, labels_test, classes, k=200, temperature=0.1):
    """Top-1 in percent of the weighted kNN classifier (Wu et al., 2018, section 3.4): the k nearest
    training images by cosine vote for their class with weight exp(cosine / temperature)."""
    norms = h.norm(dim=1)  # (N,); a normalised copy of h would double the memory
    norms = norms.clamp(min=1e-12)
    mine = torch.arange(rank(), len(h_test), world_size(), device=h.device)
    correct = torch.zeros((), device=h.device)
    for rows in mine.split(500):
        queries = F.normalize(h_test[rows], dim=1)
        cosines = queries @ h.T / norms
        cosine, nearest = cosines.topk(min(k, len(h)))
        weight = (cosine / temperature).exp()
        votes = torch.zeros(len(rows), classes, device=h.device)
        votes.scatter_add_(1, labels[nearest], weight)
        found = votes.argmax(1)
        correct += (found == labels_test[rows]).sum()
    if world_size() > 1:
        dist.all_reduce(correct)
    return 100 * correct.item() / len(h_test)


def linear_probe(h, labels, h_test, labels_test, classes):
    """Test accuracy of a linear classifier on h (N, D): its weight decay is the one that does best
    on a held-out fifth of the training images, on all of which it is then fitted."""
    std, mean = torch.std_mean(h, dim=0)
    std = std + 1e-6
    h = (h - mean) / std
    h_test = (h_test - mean) / std
    fit, choose = held_out(len(h), len(h) // 5)
    best = 0.0
    best_decay = DECAYS[0]
    for decay in DECAYS:
        head = fit_linear(h[fit], labels[fit], classes, decay)
        top1 = accuracy(head(h[choose]), labels[choose])["top1"]
        if top1 > best:
            best = top1
            best_decay = decay
    head = fit_linear(h, labels, classes, best_decay)
    return accuracy(head(h_test), labels_test)


def fit_linear(h, labels, classes, decay):
    """Logistic regression on h (N, D): cross-entropy + decay * |W|^2, by L-BFGS; an nn.Linear."""
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


def held_out(n: int, chosen: int) -> tuple[torch.Tensor, torch.Tensor]:
    """n rows as (those to fit, `chosen` rows to choose on), the same split every time."""
    generator = make_generator("held out")
    order = torch.randperm(n, generator=generator)
    return order[chosen:], order[:chosen]


def accuracy(scores: torch.Tensor, labels: torch.Tensor) -> dict[str, float]:
    """{"top1": percent} of scores (N, classes), and "top5" if there are more than ten classes."""
    classes = scores.shape[1]
    guesses = scores.topk(min(5, classes)).indices
    hits = guesses == labels.unsqueeze(1)
    first = hits[:, 0].sum().item()
    found = {"top1": 100 * first / len(labels)}
    if classes > 10:
        any_of_five = hits.any(1).sum().item()
        found["top5"] = 100 * any_of_five / len(labels)
    return found


@torch.no_grad()
def health(z: torch.Tensor) -> dict[str, float]:
    """Two signs of collapse in an embedding z (B, C). std: the standard deviation of z / |z| per
    dimension, averaged, times sqrt(C); 1 is healthy, 0 collapsed (SimSiam, section 4.1).
    effective_rank: the exponential of the entropy of the singular values (Roy & Vetterli, 2007)."""
    z = F.normalize(z.float().cpu(), dim=1)
    values = torch.linalg.svdvals(z)
    values = values / values.sum()
    entropy = torch.special.entr(values).sum()
    std = z.std(0).mean() * z.shape[1] ** 0.5
    return {"std": std.item(), "effective_rank": entropy.exp().item()}
