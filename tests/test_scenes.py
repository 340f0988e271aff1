"""Rendered scenes, folders in COCO's layout, and average precision against cases whose value is
known, against a naive loop, and against pycocotools (by hand, see COCO_SAYS)."""

import json

import pytest
import torch
from conftest import error_line
from torchvision.ops import box_iou, masks_to_boxes
from torchvision.transforms import functional as TF

import common
import scenes
from common import PATTERNS

# COCOeval of pycocotools 2.0 on noisy_case(): AP, AP50, AP75, and AP50 of each class.
COCO_SAYS = (25.16274, 70.12191, 7.90823, 68.72959, 77.11075, 64.52539)


# ------------------------------------------------------------------------------- rendered scenes
@pytest.fixture(scope="module")
def drawn():
    return scenes.scenes(300, seed=5)


def test_scenes_are_a_function_of_the_seed(drawn):
    assert torch.equal(drawn.images[:40], scenes.scenes(40, seed=5).images)
    assert not torch.equal(drawn.images[:40], scenes.scenes(40, seed=6).images)
    assert drawn.images.shape == (300, 3, 64, 64) and drawn.images.dtype == torch.uint8
    assert len(drawn) == len(drawn.boxes) == len(drawn.labels) == len(drawn.sizes) == 300


def test_objects_have_the_promised_sizes_and_do_not_overlap(drawn):
    counts = torch.tensor([len(boxes) for boxes in drawn.boxes])
    assert counts.min() == 1 and counts.max() == 3
    for boxes, labels in zip(drawn.boxes, drawn.labels):
        sides = boxes[:, 2:] - boxes[:, :2]
        assert len(labels) == len(boxes)
        assert sides.min() >= 16 and sides.max() <= 36
        assert boxes.min() >= 0 and boxes.max() <= 64
        canvas = torch.zeros(64, 64)
        for x1, y1, x2, y2 in boxes.int().tolist():
            canvas[y1:y2, x1:x2] += 1
        assert canvas.max() == 1


def test_a_box_is_the_exact_extent_of_its_mask():
    sides = torch.arange(16, 37)
    sides = torch.cartesian_prod(sides, sides)
    corner = torch.tensor([[3, 5]]).expand(len(sides), 2)
    boxes = torch.cat([corner, corner + sides], dim=1)
    for shape in range(3):
        mask = scenes.draw_mask(boxes, torch.full([len(boxes)], shape))
        last = torch.tensor([0, 0, 1, 1])  # masks_to_boxes gives the last column and row
        assert torch.equal(masks_to_boxes(mask).long() + last, boxes)


def test_an_object_shows_its_family_pixel_for_pixel():
    generator = common.make_generator("texture")
    labels = torch.tensor([3, 1, 3, 9])
    textures = scenes.draw_textures(labels, generator)
    boxes = torch.tensor([[10, 20, 30, 36], [0, 0, 16, 17], [28, 28, 64, 64], [40, 1, 62, 33]])
    laid = scenes.lay_out(textures, boxes)
    for picture, (x1, y1, x2, y2) in enumerate(boxes.tolist()):
        for x in range(x1, x2):
            for y in range(y1, y2):
                column = x - x1 + (32 - (x2 - x1)) // 2
                row = y - y1 + (32 - (y2 - y1)) // 2
                if 0 <= column < 32 and 0 <= row < 32:
                    expected = textures[picture, :, row, column]
                    assert torch.equal(laid[picture, :, y, x], expected)


def test_textures_are_those_of_patterns():
    labels = torch.tensor([3, 1, 3, 9, 1, 0])
    textures = scenes.draw_textures(labels, common.make_generator("t"))
    seed = torch.randint(2**31, (), generator=common.make_generator("t")).item()
    images, families = common.patterns(20, seed)
    assert families[[3, 1, 13, 9, 11, 0]].equal(labels)
    assert torch.equal(textures, images[[3, 1, 13, 9, 11, 0]].float() / 255)


def test_rare_families_have_their_share():
    rare = ("zigzag", "bricks", "pinwheel")
    for share in (0.1, 0.3):
        labels = torch.cat(scenes.scenes(750, 1, "train", rare, share).labels)
        is_rare = torch.isin(labels, torch.tensor([PATTERNS.index(name) for name in rare]))
        assert abs(is_rare.float().mean() - share) < 0.03
        counts = torch.bincount(labels, minlength=10)
        assert counts.min() > 0


def test_an_unknown_family_is_named(capsys):
    assert "spots" in error_line(capsys, scenes.scenes, 10, 0, "", ("spots",))


def test_distractors_are_drawn_beside_the_objects(drawn):
    more = scenes.scenes(300, seed=5, distractors=True)
    assert all(torch.equal(a, b) for a, b in zip(drawn.boxes, more.boxes))
    # What the distractor covers is plain, and no box reaches into it.
    changed = (more.images.int() - drawn.images.int()).abs().amax(1) > 60
    assert changed.flatten(1).any(1).float().mean() > 0.5
    for picture, boxes in zip(changed, more.boxes):
        for x1, y1, x2, y2 in boxes.int().tolist():
            assert not picture[y1:y2, x1:x2].any()


def test_object_crops(drawn):
    crops, labels = scenes.object_crops(drawn)
    assert crops.shape == (sum(map(len, drawn.boxes)), 3, 32, 32)
    assert torch.equal(labels, torch.cat(drawn.labels))
    picture = len(drawn.boxes[0])  # the first object of the second scene
    x1, y1, x2, y2 = drawn.boxes[1][0].int().tolist()
    expected = TF.resize(drawn.images[1, :, y1:y2, x1:x2], [32, 32], antialias=True)
    assert (crops[picture].int() - expected.int()).abs().max() <= 1


def test_data_scenes(monkeypatch):
    few = scenes.load_crops(400)
    monkeypatch.setattr(scenes, "load_crops", lambda: dict(few))
    data = common.load_images("scenes")
    assert data.pretrain.shape == (400, 3, 64, 64)
    assert data.classes == PATTERNS
    for images, labels in (data.train, data.test):
        assert images.shape == (len(labels), 3, 32, 32)
        assert torch.bincount(labels).min() > 5
    assert len(data.train[0]) > 1.6 * len(data.test[0])


# -------------------------------------------------------------------------------------- targets
def test_targets_are_shares_of_each_picture():
    boxes = [
        torch.tensor([[10.0, 4.0, 30.0, 10.0], [0.0, 0.0, 40.0, 20.0]]),
        torch.zeros(0, 4),
        torch.tensor([[2.0, 10.0, 4.0, 40.0]]),
    ]
    labels = [torch.tensor([3, 1]), torch.zeros(0, dtype=torch.long), torch.tensor([2])]
    images = torch.zeros(3, 3, 8, 8, dtype=torch.uint8)
    made = scenes.Scenes(images, boxes, labels, [(40, 20), (30, 30), (10, 50)], PATTERNS)
    rows = torch.tensor([2, 1, 0, 2])
    flip = torch.tensor([False, True, False, True])
    place, label, box = made.targets(rows, flip)
    assert place.tolist() == [0, 2, 2, 3] and label.tolist() == [2, 3, 1, 2]
    tall = [0.3, 0.5, 0.2, 0.6]
    mirrored = [0.7, 0.5, 0.2, 0.6]
    wide = [0.5, 0.35, 0.5, 0.3]
    whole = [0.5, 0.5, 1.0, 1.0]
    assert torch.allclose(box, torch.tensor([tall, wide, whole, mirrored]))
    nothing = made.targets(torch.tensor([1]), torch.tensor([True]))
    assert [part.shape for part in nothing] == [(0,), (0,), (0, 4)]


def test_targets_are_mirrored_with_the_picture(drawn):
    mask = torch.zeros(1, 64, 64, dtype=torch.bool)
    x1, y1, x2, y2 = drawn.boxes[0][0].int().tolist()
    mask[0, y1:y2, x1:x2] = True
    _, _, boxes = drawn.targets(torch.tensor([0]), torch.tensor([True]))
    x, y, width, height = (64 * boxes[0]).tolist()
    left, top, right, bottom = masks_to_boxes(mask.flip(2))[0].tolist()
    assert (x - width / 2, y - height / 2) == (left, top)
    assert (x + width / 2, y + height / 2) == (right + 1, bottom + 1)


# ------------------------------------------------------------------------------------- a folder
def write_coco(folder, drawn, part="train", change=None):
    """A folder in COCO's layout from rendered scenes; `change` edits the annotation file's content
    before it is written."""
    where = folder / part
    where.mkdir(parents=True)
    (folder / "annotations").mkdir(exist_ok=True)
    images = []
    annotations = []
    for number in range(len(drawn)):
        name = f"{number:03}.png"
        TF.to_pil_image(drawn.images[number]).save(where / name)
        width, height = drawn.sizes[number]
        picture = {"id": 7 * number, "file_name": name, "width": width, "height": height}
        images.append(picture)
        for box, label in zip(drawn.boxes[number].tolist(), drawn.labels[number].tolist()):
            x1, y1, x2, y2 = box
            annotation = {"id": len(annotations), "image_id": 7 * number}
            annotation["category_id"] = 90 - 2 * label
            annotation["bbox"] = [x1, y1, x2 - x1, y2 - y1]
            annotation["iscrowd"] = 0
            annotations.append(annotation)
    categories = [{"id": 90 - 2 * i, "name": name} for i, name in enumerate(PATTERNS)]
    content = {"images": images, "annotations": annotations, "categories": categories}
    if change:
        change(content)
    (folder / "annotations" / f"instances_{part}.json").write_text(json.dumps(content))
    return folder


def test_a_folder_gives_back_what_was_written(tmp_path, drawn):
    drawn = drawn.part(list(range(12)))
    found = scenes.load_boxes(write_coco(tmp_path, drawn), "train")
    assert found.classes == PATTERNS[::-1]  # by falling label here, by rising id there
    for number in range(12):
        assert torch.equal(found.boxes[number], drawn.boxes[number])
        assert torch.equal(9 - found.labels[number], drawn.labels[number])
    rows = torch.arange(12).view(3, 4)
    batches = torch.cat(list(scenes.read(found.images, rows, 64)))
    assert torch.equal(batches, drawn.images)
    in_memory = torch.cat(list(scenes.read(drawn.images, rows, 32)))
    from_files = torch.cat(list(scenes.read(found.images, rows, 32)))
    assert (in_memory.int() - from_files.int()).abs().float().mean() < 1
    picture, square = scenes.read_picture(found.images[3], 32)
    assert torch.equal(picture, drawn.images[3])
    assert square.shape == (1, 3, 32, 32)


def test_pictures_without_boxes_groups_and_tiny_boxes(tmp_path, drawn, capsys):
    drawn = drawn.part([0, 1, 2])

    def change(content):
        mine = [a for a in content["annotations"] if a["image_id"] == 0]
        for annotation in mine:
            annotation["iscrowd"] = 1
        content["annotations"][-1]["bbox"][3] = 0.0

    found = scenes.load_boxes(write_coco(tmp_path, drawn, change=change), "train")
    assert found.boxes[0].shape == (0, 4) and found.labels[0].shape == (0,)
    assert len(found.boxes[2]) == len(drawn.boxes[2]) - 1
    assert "left out 1 box" in capsys.readouterr().out


def edit(key, value):
    def change(content):
        content["annotations"][1][key] = value

    return change


def without(key):
    def change(content):
        del content[key]

    return change


def empty(content):
    content["annotations"] = []


def missing(content):
    content["images"][1]["file_name"] = "gone.png"


BAD_FILES = {
    "leaves the picture": edit("bbox", [50, 10, 20, 20]),
    "leaves the picture, ": edit("bbox", [-5, 10, 20, 20]),
    "a box of -3 x 20 pixels": edit("bbox", [10, 10, -3, 20]),
    "a box of nan x 20 pixels": edit("bbox", [10, 10, float("nan"), 20]),
    "bbox of four numbers": edit("bbox", [10, 10, 20]),
    "has category 1,": edit("category_id", 1),
    "is of picture 1,": edit("image_id", 1),
    "has no boxes": empty,
    "gone.png": missing,
    "not in COCO's format (KeyError: 'categories')": without("categories"),
}


@pytest.mark.parametrize("said", BAD_FILES)
def test_a_bad_file_is_one_line(tmp_path, drawn, capsys, said):
    write_coco(tmp_path, drawn.part([0, 1]), change=BAD_FILES[said])
    assert said.strip(", ") in error_line(capsys, scenes.load_boxes, tmp_path, "train")


def test_a_bad_folder_is_one_line(tmp_path, drawn, capsys):
    assert "no such folder" in error_line(capsys, scenes.load_boxes, tmp_path / "none", "train")
    assert "instances_train" in error_line(capsys, scenes.load_boxes, tmp_path, "train")
    write_coco(tmp_path, drawn.part([0]))
    (tmp_path / "annotations" / "instances_train.json").write_text("[1, 2")
    assert "COCO's format" in error_line(capsys, scenes.load_boxes, tmp_path, "train")
    (tmp_path / "train" / "000.png").write_bytes(b"no picture")
    assert "cannot read" in error_line(
        capsys, scenes.read_picture, tmp_path / "train" / "000.png", 32
    )


# --------------------------------------------------------------------------------- load_scenes
def test_the_parts_of_rendered_scenes(monkeypatch, drawn):
    asked = []

    def render(n, seed, part):
        asked.append((n, seed, part))
        return drawn.part([len(asked)])

    monkeypatch.setattr(scenes, "scenes", render)
    for seed in (0, 7):
        data = scenes.load_scenes("scenes", seed)
        parts = [(4000, seed, "unlabelled"), (1000, seed, "train"), (500, 1000 + seed, "test")]
        assert asked == parts
        assert torch.equal(data.pretrain, drawn.images[1:2])
        assert torch.equal(data.train.images, drawn.images[2:3])
        assert torch.equal(data.test.images, drawn.images[3:4])
        assert data.name == "scenes" and data.classes == PATTERNS
        asked.clear()
    scenes.load_scenes("scenes", 0, unlabelled=5, labelled=4)
    assert [n for n, _, _ in asked] == [5, 4, 500]


def test_a_folder_with_boxes(tmp_path, drawn):
    folder = write_coco(tmp_path / "mine", drawn.part(list(range(8))))
    write_coco(folder, drawn.part([8, 9, 10]), "val")
    data = scenes.load_scenes(str(folder))
    assert data.name == "mine" and data.classes == PATTERNS[::-1]
    assert data.pretrain == data.train.images == [f"{folder}/train/{n:03}.png" for n in range(8)]
    assert data.test.images == [f"{folder}/val/{n:03}.png" for n in range(3)]
    few = scenes.load_scenes(str(folder), 0, unlabelled=3, labelled=5)
    assert len(few.pretrain) == 3 and len(few.train) == 5 and len(few.test) == 3
    assert set(few.pretrain) <= set(data.pretrain)
    for path, boxes in zip(few.train.images, few.train.boxes):
        number = data.train.images.index(path)
        assert torch.equal(boxes, drawn.boxes[number])


def test_a_folder_without_boxes(photos):
    data = scenes.load_scenes(str(photos))
    assert data.pretrain == [f"{photos}/{number:02}.jpg" for number in range(20)]
    assert data.train is None and data.test is None and data.classes == []
    few = scenes.load_scenes(str(photos), 0, unlabelled=6, labelled=2)
    assert len(set(few.pretrain)) == 6 and set(few.pretrain) < set(data.pretrain)


def rename(content):
    content["categories"][0]["name"] = "spots"


def test_a_folder_that_cannot_be_used_is_one_line(tmp_path, drawn, capsys):
    missing = tmp_path / "none"
    assert "no such folder" in error_line(capsys, scenes.load_scenes, str(missing))
    folder = write_coco(tmp_path / "mine", drawn.part([0, 1]))
    assert "instances_val" in error_line(capsys, scenes.load_scenes, str(folder))
    write_coco(folder, drawn.part([2, 3]), "val", rename)
    said = error_line(capsys, scenes.load_scenes, str(folder))
    assert "train and val have different categories" in said


def test_choose(drawn):
    names = [f"{number}.png" for number in range(12)]
    few = scenes.choose(names, 5, 0)
    assert few == scenes.choose(names, 5, 0) and len(set(few)) == 5 and set(few) < set(names)
    assert few != scenes.choose(names, 5, 1) and few != names[:5]
    for n in (0, 12, 13):
        assert scenes.choose(names, n, 0) == names
    found = scenes.choose(drawn.part(list(range(12))), 5, 0)
    assert len(found) == 5
    for number, name in enumerate(few):  # the same ones of any kind
        row = names.index(name)
        assert torch.equal(found.images[number], drawn.images[row])
        assert torch.equal(found.boxes[number], drawn.boxes[row])
        assert torch.equal(found.labels[number], drawn.labels[row])


# ---------------------------------------------------------------------------- average precision
def detections(*rows):
    """Rows of (x1, y1, x2, y2, score, label)."""
    rows = torch.tensor(rows, dtype=torch.float).view(-1, 6)
    return rows[:, :4], rows[:, 4], rows[:, 5].long()


def truth(*rows):
    """One picture with rows of (x1, y1, x2, y2, label)."""
    rows = torch.tensor(rows, dtype=torch.float).view(-1, 5)
    return [rows[:, :4]], [rows[:, 4].long()]


def test_hand_made_cases():
    one = truth((0, 0, 10, 10, 0))
    two = truth((0, 0, 10, 10, 0), (20, 20, 30, 30, 0))
    right = (0, 0, 10, 10, 0.9, 0)
    wrong = (40, 40, 50, 50, 0.95, 0)
    cases = [
        (one, detections(right), 100, 100),
        (one, detections(), 0, 0),
        (one, detections(wrong), 0, 0),
        (one, detections(right, wrong), 50, 50),  # the wrong one comes first
        (one, detections((0, 0, 10, 7.6, 0.9, 0)), 60, 100),  # right up to an overlap of .75
        (one, detections((0, 0, 10, 5, 0.9, 0)), 10, 100),  # an overlap of .5 is enough
        (two, detections(right), 100 * 51 / 101, 100 * 51 / 101),  # recalls 0 to .50
        (one, detections(right, (0, 0, 10, 10, 0.8, 0)), 100, 100),  # found twice, after recall 1
        (one, detections((0, 0, 10, 10, 0.9, 1)), 0, 0),  # of a class that does not occur
    ]
    for (boxes, labels), found, ap, ap50 in cases:
        result = scenes.average_precision([found], boxes, labels, 2)
        assert abs(result["ap"] - ap) < 1e-4 and abs(result["ap50"] - ap50) < 1e-4
        assert result["ap_per_class"][1] != result["ap_per_class"][1]  # nan: no such object


def noisy_case(pictures=40, classes=3):
    """Detections like a mediocre detector's, some of them twice, in a world of three classes."""
    generator = torch.Generator().manual_seed(3)

    def uniform(*shape):
        return torch.rand(*shape, generator=generator)

    boxes = []
    labels = []
    found = []
    for _ in range(pictures):
        n = int(4 * uniform(1))
        corner = (uniform(n, 2) * 40).round()
        sides = 16 + (uniform(n, 2) * 20).round()
        true = torch.cat([corner, corner + sides], dim=1)
        label = (classes * uniform(n)).long()
        guess = true.repeat(3, 1) + (12 * uniform(3 * n, 4) - 6).round()
        guessed = torch.where(uniform(3 * n) < 0.8, label.repeat(3), 0)
        score = (uniform(3 * n) * 20).round() / 20  # many are equal
        boxes.append(true)
        labels.append(label)
        found.append((guess, score, guessed))
    return found, boxes, labels


def overlap(a, b):
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    shared = max(width, 0) * max(height, 0)
    area_a = (a[2] - a[0]) * (a[3] - a[1])
    area_b = (b[2] - b[0]) * (b[3] - b[1])
    return shared / (area_a + area_b - shared)


def naive(found, boxes, labels, label, threshold):
    """AP of one class at one threshold, from one sorted list of all detections."""
    detected = []
    objects = 0
    for picture in range(len(found)):
        objects += (labels[picture] == label).sum().item()
        for box, score, guess in zip(*(x.tolist() for x in found[picture])):
            if guess == label:
                detected.append((score, picture, box))
    detected.sort(key=lambda entry: -entry[0])
    taken = set()
    points = []
    right = 0
    for rank, (_, picture, box) in enumerate(detected, 1):
        best = None
        most = threshold
        for number, true in enumerate(boxes[picture].tolist()):
            free = (picture, number) not in taken
            if labels[picture][number] == label and free and overlap(box, true) >= most:
                best = number
                most = overlap(box, true)
        if best is not None:
            taken.add((picture, best))
            right += 1
        points.append((right / objects, right / rank))
    total = 0
    for step in range(101):
        reached = [precision for recall, precision in points if recall >= step / 100]
        total += max(reached, default=0)
    return 100 * total / 101


def test_average_precision_against_a_naive_loop():
    case = noisy_case()
    result = scenes.average_precision(*case, 3)
    table = []
    for label in range(3):
        table.append([naive(*case, label, 0.5 + 0.05 * step) for step in range(10)])
    table = torch.tensor(table)
    assert abs(result["ap"] - table.mean()) < 1e-3
    assert abs(result["ap50"] - table[:, 0].mean()) < 1e-3
    assert abs(result["ap75"] - table[:, 5].mean()) < 1e-3
    assert torch.allclose(torch.tensor(result["ap_per_class"]), table.mean(1), atol=1e-3)
    assert torch.allclose(torch.tensor(result["ap50_per_class"]), table[:, 0], atol=1e-3)


def test_average_precision_against_pycocotools():
    result = scenes.average_precision(*noisy_case(), 3)
    said = [result["ap"], result["ap50"], result["ap75"], *result["ap50_per_class"]]
    assert torch.allclose(torch.tensor(said), torch.tensor(COCO_SAYS), atol=1e-3)


def test_only_the_hundred_best_of_a_class_count():
    boxes, labels = truth((0, 0, 10, 10, 0))
    wrong = [(40, 40, 50, 50, 0.9, 0)] * 99
    for more, ap in ((0, 1), (1, 0)):
        found = detections(*wrong, *wrong[:more], (0, 0, 10, 10, 0.5, 0))
        assert abs(scenes.average_precision([found], boxes, labels, 1)["ap"] - ap) < 1e-4


def test_overlap_against_torchvision():
    generator = torch.Generator().manual_seed(0)
    corner = 10 * torch.rand(2, 200, 2, generator=generator)
    sides = 0.1 + 8 * torch.rand(2, 200, 2, generator=generator)
    a, b = torch.cat([corner, corner + sides], dim=2)
    expected = box_iou(a, b).diag()
    assert (expected == 0).any() and (expected > 0.3).any()
    assert torch.allclose(scenes.overlap(a, b), expected, atol=1e-6)
    many = scenes.overlap(a.view(4, 50, 4), b.view(4, 50, 4))
    assert torch.allclose(many, expected.view(4, 50), atol=1e-6)
    assert torch.equal(scenes.overlap(a, a), torch.ones(200))


def stretched(drawn):
    """Twelve scenes; the boxes of every second one are those of a picture of 640 x 32 pixels."""
    few = drawn.part(list(range(12)))
    for number in range(0, 12, 2):
        few.sizes[number] = (640, 32)
        few.boxes[number] = few.boxes[number] * torch.tensor([10, 0.5, 10, 0.5])
    return few


@pytest.mark.parametrize("shift, ap50, ap", [(0.0, 100, 100), (0.2, 100, 40), (0.5, 0, 0)])
def test_evaluate(drawn, shift, ap50, ap):
    """Boxes moved to the right by a share of their width; 0.2 leaves an overlap of 2/3."""
    seen = []

    def detect(images):
        found = []
        for image in images:
            number = len(seen)
            seen.append(image)
            boxes = drawn.boxes[number] / 64
            moved = shift * (boxes[:, 2] - boxes[:, 0])
            boxes = boxes + torch.stack([moved, 0 * moved] * 2, dim=1)
            labels = drawn.labels[number]
            found.append((boxes, torch.ones(len(labels)), labels))
        return found

    test = stretched(drawn)
    result = scenes.evaluate(detect, test, 64, "cpu", batch_size=5)
    assert torch.equal(torch.stack(seen), test.images)
    assert result.keys() == {"ap50", "ap", "ap75"}
    assert abs(result["ap50"] - ap50) < 1e-3 and abs(result["ap"] - ap) < 1e-3
    assert abs(result["ap75"] - 100 * (shift == 0)) < 1e-3


# -------------------------------------------------------------------------------------- drawing
def some_detections():
    """Of four, the second and the last are just sure enough."""
    boxes = torch.tensor([[0.0, 0.0, 0.5, 0.5], [0.25, 0.5, 0.75, 1.0]]).repeat(2, 1)
    scores = scenes.SURE + torch.tensor([-0.01, 0.01, -0.2, 0.55])
    return boxes, scores, torch.tensor([3, 1, 0, 2])


def test_only_sure_detections_are_drawn():
    from matplotlib.figure import Figure

    axis = Figure().subplots()
    image = torch.zeros(3, 20, 40, dtype=torch.uint8)
    boxes, scores, labels = some_detections()
    scenes.draw_detections(axis, image, (boxes, scores, labels), PATTERNS)
    texts = [text.get_text() for text in axis.texts]
    assert texts == [f"{PATTERNS[1]} 0.31", f"{PATTERNS[2]} 0.85"]
    assert len(axis.lines) == 2
    for line in axis.lines:
        assert {*line.get_xdata()} == {9.5, 29.5} and {*line.get_ydata()} == {9.5, 19.5}
    axis = Figure().subplots()
    scenes.draw_detections(axis, image, (boxes, 0 * scores, labels), PATTERNS)
    assert len(axis.images) == 1 and not axis.lines and not axis.texts


def test_detections_are_saved(tmp_path):
    image = torch.zeros(3, 40, 40, dtype=torch.uint8)
    boxes, scores, labels = some_detections()
    shares = []
    for name, sure in (("some.png", scores), ("none.png", 0 * scores)):
        scenes.save_detections(tmp_path / name, image, (boxes, sure, labels), PATTERNS)
        saved = TF.pil_to_tensor(common.read_image(tmp_path / name)).int()
        orange = (saved[0] - saved[2]) > 100
        shares.append(orange.float().mean())
    assert shares[0] > 0.001 and shares[1] == 0


def test_boxes_are_drawn(drawn):
    from matplotlib.figure import Figure

    axis = Figure().subplots()
    names = [f"{PATTERNS[label]} 0.9" for label in drawn.labels[2]]
    scenes.draw_boxes(axis, drawn.images[2], drawn.boxes[2], names)
    assert [text.get_text() for text in axis.texts] == names
    x1, y1, x2, y2 = drawn.boxes[2][0].tolist()
    line = axis.lines[0]
    assert min(line.get_xdata()) == x1 - 0.5 and max(line.get_xdata()) == x2 - 0.5
    assert min(line.get_ydata()) == y1 - 0.5 and max(line.get_ydata()) == y2 - 0.5
