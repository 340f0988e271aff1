"""Pictures of several objects: rendered ones, those of a folder with boxes, and average precision.

Boxes are (x1, y1, x2, y2) in pixels: columns x1 up to but not x2, rows y1 up to but not y2.
Shapes: N pictures in all, B in a batch, n boxes in a picture, S x S pixels."""

import json
import math
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torchvision.ops import box_iou
from torchvision.transforms import functional as TF

from common import (
    PATTERNS,
    Batches,
    BrokenImage,
    crop,
    decode,
    decoded,
    fail,
    image_files,
    make_generator,
    patterns,
    read_image,
    to_device,
    world_size,
)

SIDE = 64  # of a rendered scene, in pixels
OBJECTS = 3  # at most
SMALLEST = 16  # side of an object
LARGEST = 36
TRIES = 40  # places tried for an object before it is left out
CHUNK = 250  # scenes rendered at a time
OCTAVES = {2: 0.12, 4: 0.10, 8: 0.08, 16: 0.06}  # the ground: {blotches per side: their contrast}
RECALLS = 101  # recalls at which precision is averaged
TEST_SEED = 1000  # test scenes are drawn from seeds that nothing was chosen on
SURE = 0.3  # score from which a detection is drawn
DETECTIONS = 100  # at most, per picture and class
THRESHOLDS = [0.5 + 0.05 * step for step in range(10)]  # of the overlap, for AP


@dataclass
class Scenes:
    """Pictures and their objects. Images: one uint8 tensor (N, 3, S, S), or a list of N paths;
    boxes and labels: lists of N tensors, (n, 4) in pixels and (n,); sizes: N (width, height)."""

    images: torch.Tensor | list
    boxes: list
    labels: list
    sizes: list
    classes: list

    def __len__(self) -> int:
        return len(self.images)

    def targets(self, rows: torch.Tensor, flip: torch.Tensor) -> list:
        """The boxes of these pictures (B,): the place in the batch of the picture each is in (T,),
        labels (T,), and boxes (T, 4) as centre and sides, from 0 to 1, mirrored where flip (B,)."""
        place = []
        labels = []
        boxes = []
        for number, row in enumerate(rows.tolist()):
            x1, y1, x2, y2 = self.boxes[row].unbind(1)
            width, height = self.sizes[row]
            if flip[number]:
                x1, x2 = width - x2, width - x1
            centre = [(x1 + x2) / 2 / width, (y1 + y2) / 2 / height]
            sides = [(x2 - x1) / width, (y2 - y1) / height]
            boxes.append(torch.stack(centre + sides, dim=1))
            labels.append(self.labels[row])
            place.append(torch.full_like(self.labels[row], number))
        return [torch.cat(place), torch.cat(labels), torch.cat(boxes)]

    def part(self, rows: list) -> "Scenes":
        """Only these pictures."""
        images = self.images
        return Scenes(
            images[rows] if torch.is_tensor(images) else [images[row] for row in rows],
            [self.boxes[row] for row in rows],
            [self.labels[row] for row in rows],
            [self.sizes[row] for row in rows],
            self.classes,
        )


# ------------------------------------------------------------------------------- rendered scenes
def scenes(
    n: int,
    seed: int = 0,
    part: str = "train",
    rare: tuple = (),
    rare_share: float = 0.1,
    distractors: bool = False,
) -> Scenes:
    """n scenes of 64 x 64 pixels from a seed, the first of however many are drawn: one to three
    objects that do not overlap, each filled with one of the ten families of `patterns`.

    part: any name; each has scenes of its own. rare: names of families that together make up
    rare_share of the objects (all are equally frequent without it). distractors: each scene also
    has a plain object, without box or label."""
    for name in rare:
        if name not in PATTERNS:
            fail(f"{name}: not one of {', '.join(PATTERNS)}")
    frequency = torch.ones(len(PATTERNS))
    if rare:
        is_rare = torch.tensor([name in rare for name in PATTERNS])
        common_share = (1 - rare_share) / (~is_rare).sum()
        frequency = torch.where(is_rare, rare_share / is_rare.sum(), common_share)
    images = []
    boxes = []
    labels = []
    for chunk in range(math.ceil(n / CHUNK)):
        generator = make_generator("scenes", part, seed, chunk)
        drawn = draw_scenes(CHUNK, frequency, distractors, generator)
        images.append(drawn[0])
        for place, label, present in zip(*drawn[1:]):
            boxes.append(place[present].float())
            labels.append(label[present])
    images = torch.cat(images)
    sizes = [(SIDE, SIDE)] * n
    return Scenes(images[:n], boxes[:n], labels[:n], sizes, PATTERNS)


def draw_scenes(n, frequency, distractors, generator):
    """Images (n, 3, S, S); boxes (n, 3, 4), labels (n, 3), and which of them are present (n, 3)."""
    image = draw_ground(n, generator)
    count = torch.randint(1, OBJECTS + 1, (n, 1), generator=generator)
    labels = torch.multinomial(frequency, n * OBJECTS, True, generator=generator)
    textures = draw_textures(labels, generator).view(n, OBJECTS, 3, 32, 32)
    labels = labels.view(n, OBJECTS)
    wanted = torch.arange(OBJECTS) < count
    wanted = F.pad(wanted, [0, 1], value=True)  # the last one is the distractor
    boxes, present = draw_places(wanted, generator)  # (n, 4, 4), (n, 4)
    shapes = torch.randint(3, (n, OBJECTS + 1), generator=generator)
    plain = torch.rand(n, 3, 1, 1, generator=generator)
    plain = plain.expand(n, 3, 32, 32)
    for slot in range(OBJECTS + 1):
        if slot == OBJECTS and not distractors:
            break
        texture = plain if slot == OBJECTS else textures[:, slot]
        box = boxes[:, slot]
        there = present[:, slot]
        mask = draw_mask(box, shapes[:, slot])  # (n, S, S)
        mask = mask & there.view(-1, 1, 1)
        laid = lay_out(texture, box)
        image = torch.where(mask.unsqueeze(1), laid, image)
    image = image + 0.02 * torch.randn(image.shape, generator=generator)
    image = (image.clamp(0, 1) * 255).round()
    boxes = boxes[:, :OBJECTS]
    present = present[:, :OBJECTS]
    return image.byte(), boxes, labels, present


def draw_ground(n, generator):
    """Blotches of colour in several sizes, so that hardly two places look alike: (n, 3, S, S)."""
    ground = 0.35 + 0.3 * torch.rand(n, 3, 1, 1, generator=generator)
    for cells, contrast in OCTAVES.items():
        blotches = contrast * torch.randn(n, 3, cells, cells, generator=generator)
        smooth = F.interpolate(blotches, [SIDE, SIDE], mode="bicubic")
        ground = ground + smooth
    return ground


def draw_textures(labels, generator):
    """An image of `patterns` for each label: (n,) -> (n, 3, 32, 32), from 0 to 1."""
    kinds = len(PATTERNS)
    most = torch.bincount(labels).max().item()
    seed = torch.randint(2**31, (), generator=generator).item()
    images, _ = patterns(kinds * most, seed)  # image i shows family i % kinds
    earlier = F.one_hot(labels, kinds).cumsum(0) - 1
    turn = earlier.gather(1, labels.unsqueeze(1))[:, 0]  # how many of its family came before
    return images[kinds * turn + labels].float() / 255


def draw_places(wanted, generator):
    """wanted (n, slots) -> boxes (n, slots, 4) in whole pixels that do not overlap, and which of
    those wanted found a place (n, slots). An object takes the first of its tries that is free."""
    n, slots = wanted.shape
    boxes = torch.zeros(n, slots, 4, dtype=torch.long)
    present = torch.zeros(n, slots, dtype=torch.bool)
    for slot in range(slots):
        sides = torch.randint(SMALLEST, LARGEST + 1, (n, TRIES, 2), generator=generator)
        place = torch.rand(n, TRIES, 2, generator=generator)
        corner = (place * (SIDE - sides + 1)).long()
        tried = torch.cat([corner, corner + sides], dim=2)  # (n, TRIES, 4)
        free = torch.ones(n, TRIES, dtype=torch.bool)
        for other in range(slot):
            drawn = boxes[:, other].unsqueeze(1)
            gap = torch.maximum(tried[..., :2] - drawn[..., 2:], drawn[..., :2] - tried[..., 2:])
            apart = (gap >= 0).any(2)
            absent = ~present[:, other]
            free &= apart | absent.unsqueeze(1)
        first = free.int().argmax(1)
        boxes[:, slot] = tried[torch.arange(n), first]
        present[:, slot] = wanted[:, slot] & free.any(1)
    return boxes, present


def draw_mask(boxes, shapes):
    """Rectangle, ellipse or octagon (0, 1, 2) that reaches each side of its box: (n, S, S)."""
    corner = boxes[:, :2].unsqueeze(2)
    sides = boxes[:, 2:].unsqueeze(2) - corner
    offset = torch.arange(SIDE) - corner  # (n, 2, S)
    place = (2 * offset + 1) / sides - 1  # -1 to 1 within the box
    u = place[:, 0].unsqueeze(1).abs()  # (n, 1, S)
    v = place[:, 1].unsqueeze(2).abs()  # (n, S, 1)
    shape = shapes.view(-1, 1, 1)
    mask = (u < 1) & (v < 1)
    mask &= (shape != 1) | (u.hypot(v) <= 1)
    mask &= (shape != 2) | (u + v <= 1.5)
    return mask


def lay_out(texture, boxes):
    """texture (n, 3, 32, 32), its centre in the centre of the box and its pixels as large as the
    scene's -> (n, 3, S, S). Beyond its border it is mirrored."""
    n = len(texture)
    corner = boxes[:, :2].unsqueeze(2)
    sides = boxes[:, 2:].unsqueeze(2) - corner
    source = torch.arange(SIDE) - corner + (32 - sides) // 2  # (n, 2, S)
    source = 31 - (31 - source.abs()).abs()
    columns, rows = source.clamp(0, 31).unbind(1)
    picture = torch.arange(n).view(n, 1, 1)
    laid = texture[picture, :, rows.unsqueeze(2), columns.unsqueeze(1)]  # (n, S, S, 3)
    return laid.permute(0, 3, 1, 2)


def object_crops(found: Scenes, size: int = 32) -> tuple[torch.Tensor, torch.Tensor]:
    """Each object of rendered scenes as an image of its own, resized: uint8 (objects, 3, size,
    size), and the labels (objects,)."""
    counts = torch.tensor([len(boxes) for boxes in found.boxes])
    picture = torch.arange(len(found)).repeat_interleave(counts)
    x1, y1, x2, y2 = torch.cat(found.boxes).unbind(1)
    boxes = torch.stack([y1, x1, y2 - y1, x2 - x1], dim=1)
    unflipped = torch.zeros(len(boxes), dtype=torch.bool)
    images = crop(found.images[picture].float(), boxes, unflipped, size)
    return images.round().byte(), torch.cat(found.labels)


def load_crops(n: int = 4000, seed: int = 0) -> dict:
    """What --data scenes is: whole scenes to learn from, and crops of the objects of others, with
    their families, to judge the features by. {"pretrain", "train", "test"}: (images, labels)."""
    unlabelled = scenes(n, seed, "unlabelled")
    train = scenes(n // 2, seed, "train")
    test = scenes(n // 4, seed, "test")
    return {
        "pretrain": (unlabelled.images,),
        "train": object_crops(train),
        "test": object_crops(test),
    }


# ------------------------------------------------------------------------------------- a folder
def load_boxes(folder: Path | str, part: str) -> Scenes:
    """A folder in COCO's layout: annotations/instances_<part>*.json and the pictures in a folder
    of the same name, such as instances_train2017.json and train2017/. Labels count the categories
    in the order of their ids. Pictures without a box are kept, groups ("iscrowd") are left out.
    Exits with one line if anything in it cannot be used."""
    folder = Path(folder)
    if not folder.is_dir():
        fail(f"{folder}: no such folder")
    files = sorted(folder.glob(f"annotations/instances_{part}*.json"))
    if not files:
        fail(f"{folder}: has no annotations/instances_{part}.json, as a folder like COCO's has")
    file = files[0]
    try:
        content = json.loads(file.read_text())
        categories = {entry["id"]: entry["name"] for entry in content["categories"]}
        pictures = {entry["id"]: entry for entry in content["images"]}
        annotations = content["annotations"]
        sizes = [(entry["width"], entry["height"]) for entry in pictures.values()]
        names = [entry["file_name"] for entry in pictures.values()]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        fail(f"{file}: not in COCO's format ({type(error).__name__}: {error})")
    where = folder / file.stem.removeprefix("instances_")
    paths = [str(where / name) for name in names]
    for path in paths:
        if not Path(path).is_file():
            fail(f"{file} names a picture that is not there: {path}")

    ids = sorted(categories)
    boxes = {picture: [] for picture in pictures}
    labels = {picture: [] for picture in pictures}
    tiny = 0
    for annotation in annotations:
        if annotation.get("iscrowd"):
            continue
        x1, y1, x2, y2 = check_box(annotation, pictures, categories, file)
        if x2 < x1 + 1 or y2 < y1 + 1:
            tiny += 1
            continue
        picture = annotation["image_id"]
        label = ids.index(annotation["category_id"])
        boxes[picture].append([x1, y1, x2, y2])
        labels[picture].append(label)
    if not any(boxes.values()):
        fail(f"{file}: has no boxes")
    if tiny:  # COCO itself has two of height 0
        print(f"{file}: left out {tiny} box(es) less than a pixel wide or high", flush=True)
    return Scenes(
        paths,
        [torch.tensor(found).view(-1, 4) for found in boxes.values()],
        [torch.tensor(found, dtype=torch.long) for found in labels.values()],
        sizes,
        [categories[number] for number in ids],
    )


def check_box(annotation, pictures, categories, file):
    """[x1, y1, x2, y2] of an annotation, whose box is x, y, width, height."""
    name = f"{file}: annotation {annotation.get('id')}"
    try:
        picture = pictures.get(annotation["image_id"])
        category = annotation["category_id"]
        x, y, width, height = map(float, annotation["bbox"])
    except (KeyError, TypeError, ValueError):
        fail(f"{name} has no image_id, no category_id, or no bbox of four numbers")
    if picture is None:
        fail(f"{name} is of picture {annotation['image_id']}, which is not in the file")
    if category not in categories:
        fail(f"{name} has category {category}, which is not in the file")
    right = picture["width"]
    bottom = picture["height"]
    if not min(width, height) >= 0:
        fail(f"{name}: a box of {width:g} x {height:g} pixels")
    x2 = x + width
    y2 = y + height
    beyond = max(-x, -y, x2 - right, y2 - bottom)
    if not beyond <= 1:  # a pixel may be rounding
        fail(f"{name}: its box leaves the picture, which is {right} x {bottom} pixels")
    x1 = max(x, 0.0)
    y1 = max(y, 0.0)
    x2 = min(x2, right)
    y2 = min(y2, bottom)
    return [x1, y1, x2, y2]


class Squares(torch.utils.data.Dataset):
    """index -> the picture as uint8 (3, size, size), its proportions ignored."""

    def __init__(self, paths, size):
        self.paths = paths
        self.size = size

    def __getitem__(self, index):
        image = read_image(self.paths[index], self.size)
        image = TF.resize(image, [self.size, self.size])
        return TF.pil_to_tensor(image)


def read(images: torch.Tensor | list, rows: torch.Tensor, size: int, workers: int = 0):
    """For each row of rows (steps, B), those pictures as uint8 (B, 3, size, size)."""
    if not torch.is_tensor(images):
        batches = [row.tolist() for row in rows]
        yield from decoded(decode(Squares(images, size), batches, workers))
        return
    for row in rows:
        batch = images[row.to(images.device)]
        if batch.shape[-1] != size:
            batch = TF.resize(batch, [size, size])
        yield batch


def read_picture(path: str, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A picture as it is, uint8 (3, H, W), and resized for a detector, (1, 3, size, size)."""
    try:
        image = read_image(path)
    except BrokenImage as error:
        fail(error)
    square = TF.resize(image, [size, size])
    return TF.pil_to_tensor(image), TF.pil_to_tensor(square).unsqueeze(0)


def resize_boxes(boxes: torch.Tensor, size: tuple, side: int) -> torch.Tensor:
    """Boxes (n, 4) in a picture of this size (width, height) -> in the square it is resized to."""
    return boxes * side / torch.tensor([*size, *size])


def flip_boxes(boxes: torch.Tensor, side: int) -> torch.Tensor:
    """Boxes (n, 4) in a square picture -> in its mirror image."""
    x1, y1, x2, y2 = boxes.unbind(1)
    return torch.stack([side - x2, y1, side - x1, y2], dim=1)


@dataclass
class SceneData:
    """What a detector trains on: images without boxes, and scenes with them to train and test on;
    None where there are no boxes."""

    name: str
    pretrain: torch.Tensor | list
    train: Scenes | None
    test: Scenes | None
    classes: list
    large: bool = False  # there is no linear classifier to leave to evaluate.py


def load_scenes(
    name: str,
    seed: int = 0,
    unlabelled: int = 0,
    labelled: int = 0,
    device: torch.device | str = "cpu",
) -> SceneData:
    """`scenes`, drawn anew for each seed, or a folder: in COCO's layout (parts train and val), or
    any tree of pictures, which has no boxes. unlabelled and labelled: how many pictures of each
    kind, 0 for all there are (of scenes: 4000 and 1000)."""
    if name == "scenes":
        images = scenes(unlabelled or 4000, seed, "unlabelled").images.to(device)
        train = scenes(labelled or 1000, seed, "train")
        test = scenes(500, TEST_SEED + seed, "test")
        for part in (train, test):
            part.images = part.images.to(device)
        return SceneData(name, images, train, test, PATTERNS)
    folder = Path(name)
    train = None
    test = None
    classes = []
    if (folder / "annotations").is_dir():
        train = load_boxes(folder, "train")
        test = load_boxes(folder, "val")
        classes = train.classes
        if classes != test.classes:
            fail(f"{folder}: train and val have different categories")
        images = train.images
    elif folder.is_dir():
        images = sorted(image_files(folder))
    else:
        fail(f"--data {folder}: no such folder, nor scenes")
    images = choose(images, unlabelled, seed)
    if train is not None:
        train = choose(train, labelled, seed)
    return SceneData(folder.resolve().name, images, train, test, classes)


def choose(found, n, seed):
    """n of the pictures, or all of them if n is 0 or too many."""
    if n == 0 or n >= len(found):
        return found
    order = torch.randperm(len(found), generator=make_generator("choose", seed))
    rows = order[:n].tolist()
    return found.part(rows) if isinstance(found, Scenes) else [found[row] for row in rows]


class Pictures:
    """What a detector's script loops over: each step yields the indices of this process's pictures
    (B,) and the pictures, uint8 (B, 3, size, size), on the device. The order is a function of
    (seed, epoch); W processes together see the batches of one."""

    def __init__(
        self,
        images: torch.Tensor | list,
        size: int,
        batch_size: int,
        device: torch.device | str = "cpu",
        seed: int = 0,
        workers: int = 0,
    ):
        self.images = images
        self.size = size
        self.device = torch.device(device)
        self.batches = Batches(len(images), batch_size, seed)
        self.workers = workers
        if batch_size % world_size():
            fail(f"a batch of {batch_size} cannot be divided among {world_size()} processes")
        if batch_size > len(images):
            fail(f"a batch of {batch_size}, but there are only {len(images)} pictures")

    def set_epoch(self, epoch: int):
        self.batches.epoch = epoch

    def __len__(self) -> int:
        return len(self.batches)

    def read(self, rows: torch.Tensor) -> torch.Tensor:
        """These pictures (n,), uint8 (n, 3, size, size), on the device."""
        batches = read(self.images, rows.view(1, -1), self.size)
        return to_device(next(iter(batches)), self.device)

    def __iter__(self):
        rows = self.batches.rows()
        batches = read(self.images, rows, self.size, self.workers)
        for row, images in zip(rows, batches):
            yield row, to_device(images, self.device)


# ---------------------------------------------------------------------------- average precision
def average_precision(found: list, boxes: list, labels: list, classes: int) -> dict:
    """COCO's average precision in percent. found: for each picture (boxes (n, 4), scores (n,),
    labels (n,)); boxes and labels: the true ones of each picture.

    Returns ap (mean over thresholds of the overlap from .50 to .95), ap50 and ap75; and the first
    two per class, as ap_per_class and ap50_per_class, nan for classes without an object."""
    precision = torch.full((classes, len(THRESHOLDS)), math.nan)
    for label in range(classes):
        scores = []
        hits = []
        objects = 0
        for picture in range(len(found)):
            true = boxes[picture][labels[picture] == label]
            objects += len(true)
            guess, score, guessed = found[picture]
            guess = guess[guessed == label]
            score = score[guessed == label]
            score, order = score.sort(descending=True, stable=True)
            order = order[:DETECTIONS]
            guess = guess[order]
            overlaps = box_iou(guess.double(), true.double())
            scores.append(score[:DETECTIONS])
            hits.append(find_hits(overlaps.tolist(), len(true)))
        if objects > 0:
            precision[label] = interpolate(scores, hits, objects)
    precision = 100 * precision
    mean = precision.nanmean(0)  # over classes
    return {
        "ap": mean.mean().item(),
        "ap50": mean[0].item(),
        "ap75": mean[5].item(),
        "ap_per_class": precision.mean(1).tolist(),
        "ap50_per_class": precision[:, 0].tolist(),
    }


@torch.no_grad()
def evaluate(detect, test: Scenes, size: int, device, batch_size: int = 50) -> dict[str, float]:
    """ap50, ap and ap75 on test pictures. detect(images): uint8 (B, 3, size, size) -> for each
    image its boxes (n, 4) as x1, y1, x2, y2 from 0 to 1, scores (n,) and labels (n,). Every process
    does all of it."""
    found = []
    rows = torch.arange(len(test))
    for row in rows.split(batch_size):
        (images,) = read(test.images, row.unsqueeze(0), size)
        for boxes, scores, labels in detect(images.to(device)):
            sizes = torch.tensor(test.sizes[len(found)] * 2)
            found.append((boxes.cpu() * sizes, scores.cpu(), labels.cpu()))
    result = average_precision(found, test.boxes, test.labels, len(test.classes))
    return {name: result[name] for name in ("ap50", "ap", "ap75")}


def average_by_kind(found: list, test: Scenes, is_base: torch.Tensor) -> dict[str, float]:
    """AP50 and AP in percent of all names, of the base and of the novel ones. found: per picture
    boxes, scores and labels; is_base (names,)."""
    found = average_precision(found, test.boxes, test.labels, len(test.classes))
    metrics = {"ap50": found["ap50"], "ap": found["ap"]}
    for kind, chosen in (("base", is_base), ("novel", ~is_base)):
        for key in ("ap50", "ap"):
            per_class = torch.tensor(found[f"{key}_per_class"])
            per_class = per_class[chosen]
            per_class = per_class[~per_class.isnan()]  # of names that have objects
            if len(per_class) > 0:
                metrics[f"{kind}_{key}"] = per_class.mean().item()
    return metrics


def guess_novel(found: list, is_base: torch.Tensor) -> list:
    """The detections with a random novel name in the place of each novel name: chance."""
    novel = (~is_base).nonzero()[:, 0]
    generator = make_generator("guess")
    guessed = []
    for boxes, scores, labels in found:
        if len(novel) > 0:
            guess = torch.randint(len(novel), labels.shape, generator=generator)
            guess = novel[guess]
            labels = torch.where(is_base[labels], labels, guess)
        guessed.append((boxes, scores, labels))
    return guessed


def overlap(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Intersection over union of each box of a (..., 4) with the same one of b."""
    least = torch.maximum(a[..., :2], b[..., :2])
    most = torch.minimum(a[..., 2:], b[..., 2:])
    shared = (most - least).clamp(min=0).prod(-1)
    area_a = (a[..., 2:] - a[..., :2]).prod(-1)
    area_b = (b[..., 2:] - b[..., :2]).prod(-1)
    return shared / (area_a + area_b - shared)


def find_hits(overlaps, objects):
    """overlaps[detection][object], detections by falling score -> bool (detections, thresholds).
    Each detection takes the free object that it overlaps most; each object is taken once."""
    hits = torch.zeros(len(overlaps), len(THRESHOLDS), dtype=torch.bool)
    for t, threshold in enumerate(THRESHOLDS):
        taken = [False] * objects
        for detection, row in enumerate(overlaps):
            best = None
            most = threshold
            for number, overlap in enumerate(row):
                if overlap >= most and not taken[number]:
                    best = number
                    most = overlap
            if best is not None:
                taken[best] = True
                hits[detection, t] = True
    return hits


def interpolate(scores, hits, objects):
    """The mean over 101 recalls of the precision reached there or at a higher recall, per
    threshold, from the scores and hits of each picture."""
    average = torch.zeros(len(THRESHOLDS))
    scores = torch.cat(scores)
    hits = torch.cat(hits)
    order = scores.argsort(descending=True, stable=True)
    detected = torch.arange(1, len(order) + 1)
    wanted = torch.linspace(0, 1, RECALLS, dtype=torch.double)
    for t in range(len(THRESHOLDS)):
        right = hits[order, t].double()
        right = right.cumsum(0)
        recall = right / objects
        precision = right / detected
        precision = precision.flip(0)
        precision = precision.cummax(0).values  # the best from here to the end
        precision = F.pad(precision.flip(0), [0, 1])  # 0 at recalls that are never reached
        place = torch.searchsorted(recall, wanted)
        average[t] = precision[place].mean()
    return average


# -------------------------------------------------------------------------------------- drawing
def draw_detections(axis, image, found, classes):
    """What a detector found (boxes from 0 to 1, scores, labels) on the image, if it is sure."""
    boxes, scores, labels = found
    height, width = image.shape[1:]
    boxes = boxes.cpu() * torch.tensor([width, height] * 2)
    texts = [f"{classes[label]} {score:.2f}" for label, score in zip(labels, scores)]
    sure = (scores > SURE).nonzero()[:, 0].tolist()
    draw_boxes(axis, image, boxes[sure], [texts[number] for number in sure])


def save_detections(path, image, found, classes):
    """The same as a picture file."""
    from matplotlib.figure import Figure  # here, so that nothing else has to wait for it

    figure = Figure(figsize=(8, 8), layout="constrained")
    draw_detections(figure.subplots(), image, found, classes)
    figure.savefig(path)


def draw_boxes(axis, image, boxes, texts=(), colours=("tab:orange",)):
    """image uint8 (3, H, W) on a matplotlib axis with boxes (n, 4) in its pixels, a text at each
    and a colour for each, the last of which is repeated."""
    image = image.permute(1, 2, 0)
    axis.imshow(image.cpu().numpy(), interpolation="nearest")
    axis.set(xticks=[], yticks=[])
    corners = boxes - 0.5  # matplotlib's pixels have their centre at whole numbers
    for number, (x1, y1, x2, y2) in enumerate(corners.tolist()):
        colour = colours[min(number, len(colours) - 1)]
        x = [x1, x2, x2, x1, x1]
        y = [y1, y1, y2, y2, y1]
        axis.plot(x, y, color=colour)
        if number < len(texts):
            label = {"facecolor": colour, "edgecolor": "none", "pad": 1, "alpha": 0.8}
            axis.text(x1, y1, texts[number], fontsize=7, color="white", va="bottom", bbox=label)
