"""ViLD against plain second versions: the losses, the whole step, what is sampled, cut out and
mirrored, the names that are kept from the training, detections, many processes, and the runs.

Where nothing else is said, both versions compute in float64."""

import copy
import json
import math
from argparse import Namespace

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from conftest import ROOT, checkpoint_of, error_line, interrupt, log_of, same_state, torchrun, words
from test_clip import loud_model
from test_forward import Recorder as Unwritten
from test_forward import compare, compare_state, cross_entropy, noise, unit
from test_parity import difference, synchronise, with_names
from test_scenes import overlap, write_coco
from test_scripts import CHECKPOINT, RESULT, STOPPED
from torch import nn
from torchvision.models.detection._utils import BalancedPositiveNegativeSampler, BoxCoder
from torchvision.transforms import functional as TF

import captions
import clip
import evaluate
import harness
import scenes
import vild
from common import PATTERNS, make_generator

TINY = {
    "mode": "ensemble",  # of which every part is there
    "size": 32,
    "batch_size": 4,
    "epochs": 3,
    "proposal_epochs": 1,
    "warmup_epochs": 0.5,
    "anchor_scale": 2.5,
    "anchors": 16,
    "proposals": 10,
    "regions": 8,
    "distilled": 4,
    "fpn_dim": 8,
    "head_dim": 12,
    "temperature": 0.1,
    "image_weight": 0.7,
}
NAMES = 5  # base names without a teacher
DIM = 6  # C, without a teacher
NOVEL = ("zigzag", "bricks", "pinwheel")
WAYS = {  # what detections are scored by, in each mode
    "text": ["text"],
    "image": ["image"],
    "vild": ["vild"],
    "ensemble": ["ensemble", "image", "text"],
}
each_mode = pytest.mark.parametrize("mode", vild.MODES)


def make_double(patch):
    """Also where a script asks for float32, as torchvision does for the labels of anchors."""
    entropy = F.binary_cross_entropy_with_logits

    def in_double(logits, labels):
        return entropy(logits, labels.double())

    patch.setattr(F, "binary_cross_entropy_with_logits", in_double)
    patch.setattr(torch.Tensor, "float", torch.Tensor.double)
    torch.set_default_dtype(torch.float64)


@pytest.fixture
def double(monkeypatch):
    make_double(monkeypatch)
    yield
    torch.set_default_dtype(torch.float32)


def tiny_args(*more, **flags):
    return vild.parse_args([*words(vild, **TINY | flags), *more])


def names_of(n=NAMES):
    """Embeddings (n, C) in the place of a teacher's."""
    return unit(noise(n, DIM, seed=90))


def tiny_model(**flags):
    """(model, args), no weight of which is 0 or 1."""
    args = tiny_args(**flags)
    torch.manual_seed(0)
    model = vild.ViLD(args, names_of())
    with torch.no_grad():
        for i, p in enumerate(model.parameters()):
            p.add_(0.1 * noise(*p.shape, seed=i))
    return model, args


def draw_boxes(n, seed, size=32):
    """n boxes of 6 to 20 pixels, (n, 4)."""
    generator = torch.Generator().manual_seed(seed)
    sides = 6 + 14 * torch.rand(n, 2, generator=generator)
    corner = (size - sides) * torch.rand(n, 2, generator=generator)
    return torch.cat([corner, corner + sides], dim=1)


def batch_of(n, step=0):
    """What forward takes of n images: the second of every four has no boxes, and of some there are
    fewer regions to distil than there could be."""
    boxes = []
    labels = []
    regions = []
    embeddings = []
    generators = []
    for image in range(n):
        seed = 100 * step + image
        count = (2, 0, 3, 1)[image % 4]
        boxes.append(draw_boxes(count, seed))
        labels.append((torch.arange(count) + image) % NAMES)
        count = (4, 2, 0, 3)[image % 4] if image < n // 2 else 4
        regions.append(draw_boxes(count, 1000 + seed))
        embeddings.append(F.normalize(noise(count, DIM, seed=seed), dim=1))
        generators.append(make_generator("test", seed))
    return noise(n, 3, 32, 32, seed=step), boxes, labels, regions, embeddings, generators


# ----------------------------------------------------------------------------- the naive detector
def naive_choice(labels, n, share, generator):
    """Row by row in a random order."""
    objects = []
    others = []
    for row in torch.randperm(len(labels), generator=generator).tolist():
        if labels[row] > 0 and len(objects) < int(n * share):
            objects.append(row)
        if labels[row] == 0:
            others.append(row)
    return objects, others[: n - len(objects)]


def naive_suppression(boxes, scores, threshold):
    """The rows that remain, by falling score."""
    kept = []
    for row in sorted(range(len(boxes)), key=lambda row: -scores[row]):
        if all(overlap(boxes[row], boxes[other]) <= threshold for other in kept):
            kept.append(row)
    return kept


def code(box, start, weights):
    """What moves a box from `start` to `box`."""
    wide, tall = start[2] - start[0], start[3] - start[1]
    return [
        weights[0] * ((box[0] + box[2]) / 2 - (start[0] + start[2]) / 2) / wide,
        weights[1] * ((box[1] + box[3]) / 2 - (start[1] + start[3]) / 2) / tall,
        weights[2] * math.log((box[2] - box[0]) / wide),
        weights[3] * math.log((box[3] - box[1]) / tall),
    ]


def move(start, step, weights, size):
    """Where a box is moved to, within the image."""
    wide, tall = start[2] - start[0], start[3] - start[1]
    x = (start[0] + start[2]) / 2 + step[0] / weights[0] * wide
    y = (start[1] + start[3]) / 2 + step[1] / weights[1] * tall
    wide = wide * math.exp(min(step[2] / weights[2], math.log(1000 / 16)))
    tall = tall * math.exp(min(step[3] / weights[3], math.log(1000 / 16)))
    corners = [x - wide / 2, y - tall / 2, x + wide / 2, y + tall / 2]
    return [min(max(corner, 0.0), float(size)) for corner in corners]


def has_area(box):
    return min(box[2] - box[0], box[3] - box[1]) >= 1e-3


def huber(found, wanted, beta):
    """Quadratic up to beta, summed over the four numbers of a box."""
    total = 0.0
    for a, b in zip(found, wanted):
        d = (a - b).abs()
        total = total + (d**2 / (2 * beta) if d < beta else d - beta / 2)
    return total


def naive_match(anchors, boxes):
    """Per anchor: 1 object, 0 background or -1 neither, and the box it belongs to."""
    if not boxes:
        return [0] * len(anchors), [None] * len(anchors)
    labels = []
    nearest = []
    table = [[overlap(box, anchor) for box in boxes] for anchor in anchors]
    for row in table:
        best = max(row)
        nearest.append(row.index(best))
        labels.append(1 if best >= 0.7 else 0 if best < 0.3 else -1)
    for box in range(len(boxes)):  # every box has an anchor, however little they overlap
        most = max(row[box] for row in table)
        for anchor, row in enumerate(table):
            if row[box] == most:
                labels[anchor] = 1
    return labels, nearest


def naive_rpn(model, args, maps, boxes, generators):
    """Proposals of each image, lists of four numbers, and the loss over all sampled anchors."""
    n = len(boxes)
    objectness, deltas = model.rpn.head(list(maps.values()))
    anchors = []
    levels = []
    for level, found in enumerate(objectness):
        cells = found.shape[-1]
        stride = args.size // cells
        side = args.anchor_scale * 4 * 2**level
        for place in range(cells**2):
            for ratio in (0.5, 1.0, 2.0):
                half = (round(side / math.sqrt(ratio) / 2), round(side * math.sqrt(ratio) / 2))
                x, y = stride * (place % cells), stride * (place // cells)
                anchors.append([x - half[0], y - half[1], x + half[0], y + half[1]])
                levels.append(level)
    scores = torch.cat([level.permute(0, 2, 3, 1).flatten(1) for level in objectness], dim=1)
    moves = torch.cat([level.permute(0, 2, 3, 1).reshape(n, -1, 4) for level in deltas], dim=1)
    entropies = []
    box_loss = 0.0
    proposals = []
    for i in range(n):
        true = boxes[i].tolist()
        labels, nearest = naive_match(anchors, true)
        objects, others = naive_choice(labels, args.anchors, 0.5, generators[i])
        for row in objects + others:
            entropies.append(cross_entropy([0 * scores[i, row], scores[i, row]], labels[row]))
        for row in objects:
            wanted = code(true[nearest[row]], anchors[row], (1, 1, 1, 1))
            box_loss = box_loss + huber(moves[i, row], wanted, 1 / 9)
        kept = []
        for level in range(len(objectness)):
            score = {row: scores[i, row].item() for row in range(len(anchors))
                     if levels[row] == level}  # fmt: skip
            best = sorted(score, key=lambda row: -score[row])[: 2 * args.proposals]
            moved = [move(anchors[row], moves[i, row].tolist(), (1, 1, 1, 1), args.size)
                     for row in best]  # fmt: skip
            seen = [row for row, box in zip(best, moved) if has_area(box)]
            moved = [box for box in moved if has_area(box)]
            for row in naive_suppression(moved, [score[row] for row in seen], 0.7):
                kept.append((score[seen[row]], moved[row]))
        kept.sort(key=lambda entry: -entry[0])
        proposals.append([box for _, box in kept[: args.proposals]])
    return proposals, (sum(entropies) + box_loss) / len(entropies)


def naive_regions(proposals, boxes, labels, n, generator):
    """Lists of regions, of the boxes they should be and of their classes."""
    candidates = proposals + boxes
    classes = []
    nearest = []
    for candidate in candidates:
        overlaps = [overlap(candidate, box) for box in boxes]
        best = max(overlaps, default=0.0)
        nearest.append(boxes[overlaps.index(best)] if boxes else None)
        classes.append(1 + labels[overlaps.index(best)] if best >= 0.5 else 0)
    objects, others = naive_choice(classes, n, 0.25, generator)
    rows = objects + others
    return [[part[row] for row in rows] for part in (candidates, nearest, classes)]


def naive_head(head, pooled):
    hidden = head.layers(pooled)
    return hidden, unit(hidden @ head.projector.weight.T + head.projector.bias)


def naive_logits(z, background, text, temperature):
    """Equation 2, of one region."""
    return [z @ e / e.norm() / temperature for e in (background, *text)]


def naive_image_loss(z, embeddings, most):
    """Equation 4, dimension by dimension."""
    total = 0.0
    for row, embedding in zip(z, embeddings):
        for a, b in zip(row, embedding):
            total = total + (a - b).abs()
    return total / most


def naive_forward(model, args, x, boxes, labels, regions, embeddings, generators):
    """Section 3, image by image and region by region."""
    maps, images = model.feature_maps(x)
    proposals, loss = naive_rpn(model, args, maps, boxes, generators)
    sampled = []
    wanted = []
    classes = []
    for i, generator in enumerate(generators):
        found = naive_regions(
            proposals[i], boxes[i].tolist(), labels[i].tolist(), args.regions, generator
        )
        sampled.append(torch.tensor(found[0]))
        for region, box in zip(*found[:2]):
            wanted.append(box and code(box, region, (10, 10, 5, 5)))
        classes += found[2]
    hidden, z = naive_head(model.head, model.pool(maps, sampled, images.image_sizes))
    most = len(x) * args.regions
    for row, label in enumerate(classes):
        if args.mode != "image":
            logits = naive_logits(z[row], model.background, model.text, args.temperature)
            loss = loss + cross_entropy(logits, label) / most
        if label > 0:
            moves = hidden[row] @ model.box_regressor.weight.T + model.box_regressor.bias
            loss = loss + huber(moves, wanted[row], 1.0) / most
    if regions is not None and args.mode != "text":
        head = model.image_head if args.mode == "ensemble" else model.head
        _, found = naive_head(head, model.pool(maps, regions, images.image_sizes))
        most = len(x) * args.distilled
        distance = naive_image_loss(found, torch.cat(embeddings), most)
        loss = loss + args.image_weight * distance
    return loss, z


# ---------------------------------------------------------------------------------------- losses
def some_regions(n=9):
    """z (n, C), classes (n,), a background that is no unit vector, and the names (N, C)."""
    z = unit(noise(n, DIM, seed=1)).requires_grad_()
    classes = torch.arange(n) % (1 + NAMES)
    background = (3 * noise(DIM, seed=2)).requires_grad_()
    return z, classes, background, names_of().requires_grad_()


@pytest.mark.parametrize("temperature", [0.01, 0.5])
def test_the_text_loss_equals_a_loop(temperature, double):
    """Also its gradients; class 0 is the background. 12 regions were possible."""
    z, classes, background, text = some_regions()
    loss = vild.text_loss(z, classes, background, text, temperature, 12)
    expected = 0.0
    for row, label in zip(z, classes):
        logits = naive_logits(row, background, text, temperature)
        expected = expected + cross_entropy(logits, label) / 12
    compare(loss, expected, "loss")
    found = torch.autograd.grad(loss, (z, background))
    for made, wanted in zip(found, torch.autograd.grad(expected, (z, background))):
        compare(made, wanted, "gradient")
        assert made.abs().max() > 1e-3


def test_only_the_direction_of_the_background_counts(double):
    z, classes, background, text = some_regions()
    logits = vild.text_logits(z, background, text, 0.1)
    assert logits.shape == (9, 1 + NAMES)
    compare(vild.text_logits(z, 7 * background, text, 0.1), logits, "logits")
    compare(logits[:, 0], z @ background / background.norm() / 0.1, "background")
    compare(logits[:, 1:], z @ text.T / 0.1, "names")


def test_the_image_loss_is_a_sum_over_dimensions(double):
    z = unit(noise(9, DIM, seed=1)).requires_grad_()
    embeddings = unit(noise(9, DIM, seed=3))
    loss = vild.image_loss(z, embeddings, 12)
    expected = naive_image_loss(z, embeddings, 12)
    compare(loss, expected, "loss")
    (gradient,) = torch.autograd.grad(loss, z)
    compare(gradient, (z - embeddings).sign().detach() / 12, "gradient")


def test_the_chance_loss():
    """Equal scores of all classes and of objects and background; unrelated unit vectors, whose
    distance is 25.5 in 512 dimensions."""
    z = unit(noise(2000, 512, seed=1))
    others = unit(noise(2000, 512, seed=2))
    distance = vild.image_loss(z, others, 2000).item()
    assert distance == pytest.approx(25.5, rel=0.01)
    for mode, start in (("text", math.log(13)), ("image", 0.0), ("ensemble", math.log(13))):
        model = vild.ViLD(tiny_args(mode=mode), others[:12])
        start += math.log(2)
        assert model.chance_loss == pytest.approx(start)
        assert model.chance(distilling=True) == pytest.approx(start + 0.7 * distance, rel=0.01)


@pytest.mark.parametrize("weight", [2 / 3, 0.5, 1.0])
def test_the_ensemble_is_a_geometric_mean_by_kind_of_name(weight, double):
    """At a weight of 1 base names are the text head's, novel ones the image head's."""
    text = noise(7, 4, seed=1).softmax(1)
    image = noise(7, 4, seed=2).softmax(1)
    is_base = torch.tensor([True, False, True, False])
    found = vild.ensemble(text, image, is_base, weight)
    for row in range(7):
        for name in range(4):
            a, b = text[row, name], image[row, name]
            if not is_base[name]:
                a, b = b, a
            expected = (weight * a.log() + (1 - weight) * b.log()).exp()
            compare(found[row, name], expected, "score")


# --------------------------------------------------------------------------------------- forward
@pytest.mark.parametrize("distilling", [False, True])
@each_mode
def test_forward_follows_the_paper(mode, distilling, double):
    """The loss of the same regions, the output, all gradients, and what two steps leave behind."""
    model, args = tiny_model(mode=mode)
    naive = copy.deepcopy(model)
    for step in (1, 2):
        x, boxes, labels, regions, embeddings, generators = batch_of(4, step)
        if not distilling:
            regions = embeddings = None
        loss, z = model(x, boxes, labels, regions, embeddings, generators)
        model.zero_grad()
        loss.backward()
        generators = batch_of(4, step)[-1]
        expected_loss, expected_z = naive_forward(
            naive, args, x, boxes, labels, regions, embeddings, generators
        )
        naive.zero_grad()
        expected_loss.backward()
        compare(loss, expected_loss, "loss")
        compare(z, expected_z, "z")
        assert not z.requires_grad
        for (name, p), expected in zip(model.named_parameters(), naive.parameters()):
            assert (p.grad is None) == (expected.grad is None), name
            if p.grad is not None:
                compare(p.grad, expected.grad, name)
        compare_state(model, naive)


@each_mode
def test_who_gets_a_gradient(mode):
    """The background where there is a text loss; never the names, which are no parameters."""
    model, _ = tiny_model(mode=mode)
    loss, _ = model(*batch_of(4))
    loss.backward()
    for name, p in model.named_parameters():
        assert (p.grad is None) == (mode == "image" and name == "background"), name
    assert not model.text.requires_grad and model.text.grad is None
    assert (model.image_head is not None) == (mode == "ensemble")


def test_what_is_distilled_enters_no_class_or_box_loss():
    """The second head alone and the layers below it move."""
    model, args = tiny_model(mode="ensemble")
    x, boxes, labels, regions, embeddings, _ = batch_of(4)
    losses = []
    gradients = []
    for given in ((None, None), (regions, embeddings), (regions[::-1], embeddings[::-1])):
        model.zero_grad()
        loss, _ = model(x, boxes, labels, *given, batch_of(4)[-1])
        loss.backward()
        losses.append(loss.item())
        gradients.append(model.box_regressor.weight.grad.clone())
    assert torch.equal(gradients[0], gradients[1]) and torch.equal(gradients[0], gradients[2])
    assert losses[1] > losses[0] + 0.1 and losses[2] > losses[0] + 0.1


@pytest.mark.parametrize("recipe, convolutions, linear", [("scenes", 1, 1), ("paper", 4, 2)])
def test_the_parts_of_a_region_head(recipe, convolutions, linear):
    """Each layer is normalised; then a projection."""
    args = vild.parse_args(["--recipe", recipe, "--fpn-dim", "8", "--head-dim", "12"])
    head = vild.RegionHead(args, DIM)
    expected = convolutions * [nn.Conv2d, nn.BatchNorm2d, nn.ReLU] + [nn.Flatten]
    expected += linear * [nn.Linear, nn.BatchNorm1d, nn.ReLU]
    assert [type(layer) for layer in head.layers] == expected
    hidden, z = head(noise(3, 8, 7, 7, seed=1))
    assert hidden.shape == (3, 12) and z.shape == (3, DIM)
    assert torch.allclose(z.norm(dim=1), torch.ones(3))


def test_a_box_is_four_numbers_however_many_names_there_are():
    for n in (1, 40):
        model = vild.ViLD(tiny_args(), names_of(n))
        assert model.box_regressor.weight.shape == (4, 12)


# -------------------------------------------------------------------------------------- sampling
def test_how_many_are_chosen():
    """At most the share of objects; background in the place of objects that are missing; nothing
    twice and nothing that is neither."""
    cases = [  # objects, background, neither; of 16, at most half
        (50, 50, 10, 8, 8),
        (3, 50, 10, 3, 13),
        (0, 50, 10, 0, 16),
        (50, 4, 10, 8, 4),
        (5, 6, 0, 5, 6),
    ]
    for objects, others, neither, chosen, filled in cases:
        labels = torch.tensor([2.0] * objects + [0.0] * others + [-1.0] * neither)
        labels = labels[torch.randperm(len(labels), generator=make_generator("mix"))]
        found, rest = vild.choose_balanced(labels, 16, 0.5, make_generator("a"))
        assert (len(found), len(rest)) == (chosen, filled)
        assert (labels[found] > 0).all() and (labels[rest] == 0).all()
        assert len({*found.tolist(), *rest.tolist()}) == chosen + filled


def test_all_are_chosen_equally_often():
    labels = torch.tensor([0, 1] * 10)
    counts = torch.zeros(20)
    for draw in range(1000):
        for rows in vild.choose_balanced(labels, 4, 0.5, make_generator("draw", draw)):
            counts[rows] += 1
    assert (counts - 200).abs().max() < 60


def test_what_is_chosen_is_a_function_of_the_generators_alone():
    proposals = draw_boxes(30, 1)
    labels = [(noise(200, seed=i) > 1.0).float() for i in range(2)]
    sampler = vild.Sampler(16)
    found = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        sampler.generators = [make_generator("anchors", i) for i in range(2)]
        regions = vild.sample_regions(
            proposals, proposals[:2], torch.tensor([3, 1]), 8, make_generator("regions")
        )
        found.append((*(torch.cat(part) for part in sampler(labels)), *regions))
    assert all(torch.equal(a, b) for a, b in zip(*found))
    sampler.generators = [make_generator("anchors", i) for i in (2, 3)]
    assert not torch.equal(torch.cat(sampler(labels)[0]), found[0][0])


def test_the_sampler_marks_what_is_chosen():
    """As torchvision's RPN wants it: a mask for each image."""
    labels = [noise(200, seed=i).round().clamp(-1, 1) for i in (1, 2)]
    sampler = vild.Sampler(16)
    sampler.generators = [make_generator("anchors", i) for i in range(2)]
    positive, negative = sampler(labels)
    for image in range(2):
        objects, others = vild.choose_balanced(
            labels[image], 16, 0.5, make_generator("anchors", image)
        )
        assert positive[image].nonzero()[:, 0].tolist() == objects.sort().values.tolist()
        assert negative[image].nonzero()[:, 0].tolist() == others.sort().values.tolist()
        assert positive[image].sum() + negative[image].sum() == 16


def test_regions_of_an_image():
    """A quarter are objects, each with the class of the box that it overlaps most."""
    boxes = torch.tensor([[0.0, 0, 10, 10], [8, 8, 20, 20]])
    near = torch.tensor([[0.0, 0, 10, 5], [0, 0, 10, 4.9], [8, 8, 20, 19], [1, 1, 11, 11]])
    far = torch.cat([torch.tensor([[22.0, 22, 30, 30]])] * 20)
    labels = torch.tensor([4, 2])
    expected = {(0.0, 0, 10, 5): (5, 0), (8, 8, 20, 19): (3, 1), (1, 1, 11, 11): (5, 0)}
    expected |= {tuple(box): (1 + label, row)
                 for row, (box, label) in enumerate(zip(boxes.tolist(), [4, 2]))}  # fmt: skip
    seen = set()
    for draw in range(20):
        generator = make_generator("draw", draw)
        found, targets, classes = vild.sample_regions(
            torch.cat([near, far]), boxes, labels, 12, generator
        )
        assert len(found) == len(targets) == len(classes) == 12
        assert (classes > 0).sum() == 3 and (classes[:3] > 0).all()
        for region, target, label in zip(found.tolist(), targets, classes.tolist()):
            if label > 0:
                wanted, row = expected[tuple(region)]
                assert label == wanted and torch.equal(target, boxes[row])
                seen.add(tuple(region))
            else:
                assert tuple(region) not in expected
    assert seen == expected.keys()  # the true boxes are candidates, too


def test_an_image_without_boxes_is_background():
    proposals = draw_boxes(30, 1)
    found, _, classes = vild.sample_regions(
        proposals, torch.zeros(0, 4), torch.zeros(0).long(), 8, make_generator("a")
    )
    assert found.shape == (8, 4) and (classes == 0).all()
    model, _ = tiny_model()
    x, boxes, labels, *rest = batch_of(4)
    nothing = [box[:0] for box in boxes]
    loss, _ = model(x, nothing, [label[:0] for label in labels], *rest)
    loss.backward()
    assert loss.isfinite() and all(p.grad.isfinite().all() for p in model.rpn.parameters())


def test_anchors_match_from_seven_tenths_on_and_not_below_three():
    """And each box the anchor that it overlaps most."""
    rpn = vild.build_rpn(tiny_args(), 3)
    boxes = torch.tensor([[0.0, 0, 10, 10], [30, 30, 34, 34]])
    heights = torch.tensor([10, 7.01, 6.99, 3.01, 2.99])
    anchors = torch.tensor([[0.0, 0, 10, 0]]).repeat(5, 1)
    anchors[:, 3] = heights
    anchors = torch.cat([anchors, torch.tensor([[30.0, 30, 40, 40], [30, 30, 41, 41]])])
    labels, matched = rpn.assign_targets_to_anchors([anchors], [{"boxes": boxes}])
    assert labels[0].tolist() == [1, 1, -1, -1, 0, 1, 0]
    assert torch.equal(matched[0][5], boxes[1])


def test_proposals_keep_their_objectness():
    model, args = tiny_model()
    proposals, pooled = model.eval().propose(noise(2, 3, 32, 32, seed=1))
    assert pooled.shape == (sum(map(len, proposals)), 8, 7, 7)
    for found in proposals:
        assert found.shape[1] == 5 and 0 < len(found) <= args.proposals
        objectness = found[:, 4]
        assert (objectness.diff() <= 0).all() and objectness.min() > 0 and objectness.max() < 1
        assert found[:, :4].min() >= 0 and found[:, :4].max() <= 32


# --------------------------------------------------------------------------------------- cutting
def naive_cut(image, box, scale, size):
    """Output pixel by output pixel: the mean of the pixels within the widened box, weighted by a
    triangle as wide as two steps, and at least as two pixels."""
    _, height, width = image.shape
    x, y = (box[0] + box[2]) / 2, (box[1] + box[3]) / 2
    half_x, half_y = scale * (box[2] - box[0]) / 2, scale * (box[3] - box[1]) / 2
    x1, x2 = max(x - half_x, 0), min(x + half_x, width)
    y1, y2 = max(y - half_y, 0), min(y + half_y, height)
    found = torch.zeros(3, size, size)
    for row in range(size):
        for column in range(size):
            total = 0.0
            for j in range(height):
                for i in range(width):
                    if not (x1 < i + 0.5 < x2 and y1 < j + 0.5 < y2):
                        continue
                    step_x, step_y = (x2 - x1) / size, (y2 - y1) / size
                    away_x = abs(i + 0.5 - x1 - (column + 0.5) * step_x) / max(step_x, 1)
                    away_y = abs(j + 0.5 - y1 - (row + 0.5) * step_y) / max(step_y, 1)
                    weight = max(1 - away_x, 0) * max(1 - away_y, 0)
                    found[:, row, column] += weight * image[:, j, i]
                    total += weight
            found[:, row, column] /= total
    return found


def an_image(size=64, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(256, (3, size, size), generator=generator, dtype=torch.uint8)


@pytest.mark.parametrize("scale", [1.0, 1.5])
def test_a_crop_is_that_of_torchvision(scale):
    """Where it begins and ends at whole pixels; beyond the border there is nothing."""
    image = an_image()
    boxes = torch.tensor([[20.0, 12, 44, 20], [0, 0, 64, 64], [0, 40, 8, 64], [52, 0, 64, 12]])
    found = vild.cut(image, boxes, scale, 16)
    for (x1, y1, x2, y2), made in zip(boxes.int().tolist(), found):
        more_x = round((scale - 1) * (x2 - x1) / 2)
        more_y = round((scale - 1) * (y2 - y1) / 2)
        top, left = max(y1 - more_y, 0), max(x1 - more_x, 0)
        tall, wide = min(y2 + more_y, 64) - top, min(x2 + more_x, 64) - left
        expected = TF.resized_crop(image.float(), top, left, tall, wide, [16, 16], antialias=True)
        assert torch.allclose(made, expected, atol=1e-3)


@pytest.mark.parametrize("scale", [1.0, 1.5])
def test_a_crop_of_any_box_equals_a_loop(scale, double):
    image = an_image(12)
    boxes = torch.tensor([[2.3, 1.1, 9.9, 4.7], [0.2, 3.4, 2.6, 11.8], [8.1, 7.7, 11.9, 12.0]])
    for box, made in zip(boxes.tolist(), vild.cut(image, boxes, scale, 5)):
        compare(made, naive_cut(image, box, scale, 5), "pixels")


def test_a_box_without_a_whole_pixel_shows_one():
    """However thin it is and wherever; the RPN keeps boxes of a thousandth of a pixel."""
    image = an_image(16)
    boxes = [[15.8, 3, 16, 9], [3, 15.999, 9, 16], [0, 0, 0.01, 0.01], [5.5, 5.5, 5.6, 5.6]]
    boxes += [[15.999, 15.999, 16, 16], [6.4, 2, 7.4, 7], [0, 4.5, 0.2, 5.5]]
    for scale in (1.0, 1.5):
        found = vild.cut(image, torch.tensor(boxes), scale, 8)
        assert found.isfinite().all()
        assert found.min() >= 0 and found.max() <= 255
    corner = image[:, 14:, 14:].float().flatten(1)
    shown = vild.cut(image, torch.tensor(boxes[4:5]), 1.0, 8)[0].flatten(1)
    assert (shown.amin(1) >= corner.amin(1)).all() and (shown.amax(1) <= corner.amax(1)).all()
    assert vild.cut(image, torch.zeros(0, 4), 1.5, 8).shape == (0, 3, 8, 8)


# -------------------------------------------------------------------------------------- teachers
@pytest.fixture(scope="session")
def clip_file(tmp_path_factory):
    """A checkpoint of CLIP with random weights, beside it its merges. Texts are told apart."""
    out = tmp_path_factory.mktemp("clip")
    _, args = loud_model(context=24)
    texts = [frame.format(name) for frame in captions.FRAMES for name in PATTERNS]
    tokenizer = captions.build_tokenizer(args, texts)
    model, args = loud_model(vocabulary=tokenizer.vocabulary, context=24)
    tokenizer.save(out / "merges.txt")
    harness.save(out / "checkpoint.pt", {"args": vars(args), "model": model.state_dict()})
    return out / "checkpoint.pt"


@pytest.fixture
def teacher(clip_file):
    return vild.Teacher(tiny_args(teacher=clip_file), torch.device("cpu"))


def test_what_clip_says_of_a_region(teacher):
    """The normalised sum of two embeddings, of the region and of what is around it."""
    images = torch.stack([an_image(seed=i) for i in range(3)])
    regions = [draw_boxes(2, 1, 64), torch.zeros(0, 4), draw_boxes(3, 2, 64)]
    found = teacher.embed_regions(images, regions)
    assert [len(z) for z in found] == [2, 0, 3]
    for image, boxes, z in zip(images, regions, found):
        for box, row in zip(boxes, z):
            near, wide = (
                teacher.model.encode_image(
                    teacher.view.plain(vild.cut(image, box.unsqueeze(0), scale, 32))
                )[0]
                for scale in (1.0, 1.5)
            )
            assert (near - wide).abs().max() > 1e-3
            assert torch.allclose(row, unit((near + wide).unsqueeze(0))[0], atol=1e-5)
    assert not any(z.requires_grad for z in found)
    assert not any(p.requires_grad for p in teacher.model.parameters())


def test_what_clip_says_of_names(teacher, clip_file):
    """As clip.py does: over the sentences of the captions of scenes, other sentences elsewhere."""
    found = teacher.embed_names(PATTERNS)
    model, tokenizer, _ = clip.load(clip_file, "cpu")
    expected = clip.embed_classes(model, tokenizer, PATTERNS, captions.FRAMES)
    assert torch.equal(found, expected) and not found.requires_grad
    elsewhere = vild.Teacher(tiny_args(teacher=clip_file, recipe="coco"), torch.device("cpu"))
    expected = clip.embed_classes(model, tokenizer, PATTERNS, captions.TEMPLATES)
    assert torch.equal(elsewhere.embed_names(PATTERNS), expected)


class Words:
    """In the place of a teacher: names are noise, regions are where they lie."""

    def __init__(self, *_):
        pass

    def embed_names(self, names):
        return names_of(len(names))

    def embed_regions(self, images, regions):
        found = []
        for image, boxes in zip(images, regions):
            place = torch.cat([boxes, boxes[:, :2]], dim=1) / 64
            found.append(place + image.float().mean() / 255)
        return found


def test_what_is_distilled_are_the_best_proposals():
    """Of the images as they are; neither the boxes that are known nor a mirrored image is asked
    for. The model is left as it was."""
    model, args = tiny_model()
    images = torch.stack([an_image(32, seed=i) for i in range(6)])
    pictures = scenes.Pictures(images, 32, 2)
    before = copy.deepcopy(model.state_dict())
    found = vild.regions_to_distil(args, model, Words(), pictures)
    assert model.training
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())
    proposals, _ = model.eval().propose(vild.view_of(args, images))
    for row in range(6):
        expected = proposals[row][: args.distilled, :4]
        count = found["count"][row]
        assert count == len(expected) == args.distilled
        assert torch.allclose(found["regions"][row, :count], expected, atol=1e-3)
        z = Words().embed_regions(images[row : row + 1], [expected])[0]
        assert torch.allclose(found["embeddings"][row].float(), z, atol=2e-3)
    assert found["regions"].shape == (6, 4, 4) and found["embeddings"].shape == (6, 4, DIM)


# ----------------------------------------------------------------------------------------- names
def painted(n, novel=NOVEL, seed=1):
    """Black scenes in which every object is bright: in red if its name has boxes in the training,
    or else in blue. A region to distil of each is bright in green."""
    images = torch.zeros(n, 3, 64, 64, dtype=torch.uint8)
    boxes = []
    labels = []
    regions = torch.zeros(n, 1, 4)
    generator = torch.Generator().manual_seed(seed)
    for image in images:
        count = int(torch.randint(1, 4, (), generator=generator))
        label = torch.randint(10, (count,), generator=generator)
        corner = torch.randint(0, 44, (count, 2), generator=generator)
        sides = torch.randint(8, 20, (count, 2), generator=generator)
        place = torch.cat([corner, corner + sides], dim=1)
        for (x1, y1, x2, y2), name in zip(place.tolist(), label.tolist()):
            image[2 if PATTERNS[name] in novel else 0, y1:y2, x1:x2] = 255
        boxes.append(place.float())
        labels.append(label)
        x1, y1 = torch.randint(0, 44, (2,), generator=generator).tolist()
        image[1, y1 : y1 + 9, x1 : x1 + 17] = 255
        regions[len(boxes) - 1, 0] = torch.tensor([x1, y1, x1 + 17, y1 + 9])
    return scenes.Scenes(images, boxes, labels, [(64, 64)] * n, PATTERNS), regions


def mask_of(boxes):
    found = torch.zeros(64, 64, dtype=torch.bool)
    for x1, y1, x2, y2 in boxes.int().tolist():
        found[y1:y2, x1:x2] = True
    return found


class Recorder(Unwritten):
    """As in test_forward; also a folder."""

    def finish(self, data, found, draw):
        return self


@pytest.fixture
def seen(monkeypatch, tmp_path):
    """What forward gets in a training on painted scenes, (arguments of it) for each step."""
    steps = []
    drawn, regions = painted(8)
    distilled = {"regions": regions, "count": torch.ones(8).long()}
    distilled["embeddings"] = noise(8, 1, DIM, seed=5).half()

    def forward(model, *arguments):
        steps.append(arguments)
        return model.background.sum(), noise(8, DIM, seed=1)

    def asked(args, model, teacher, pictures):
        assert torch.equal(pictures.images, drawn.images)
        return distilled

    monkeypatch.setattr(vild.ViLD, "forward", forward)
    monkeypatch.setattr(vild, "regions_to_distil", asked)
    monkeypatch.setattr(vild, "Teacher", Words)
    monkeypatch.setattr(vild, "find_teacher", lambda args: None)
    monkeypatch.setattr(vild, "launch", lambda: torch.device("cpu"))
    monkeypatch.setattr(vild, "measure", lambda *_, **__: {})
    monkeypatch.setattr(scenes, "scenes", lambda *_: drawn.part(list(range(8))))
    monkeypatch.setattr(harness, "Run", Recorder)
    args = tiny_args(size=64, epochs=6, proposal_epochs=2, out=tmp_path)
    run = vild.train(args)
    assert len(steps) == 12
    return steps, run, distilled, drawn


def test_image_boxes_and_regions_are_mirrored_together_and_once(seen):
    """The official parser mirrors some images twice, and the regions of them once."""
    steps, _, distilled, drawn = seen
    mean = torch.tensor((0.485, 0.456, 0.406)).view(3, 1, 1)
    std = torch.tensor((0.229, 0.224, 0.225)).view(3, 1, 1)
    mirrored = 0
    for number, (x, boxes, _, regions, embeddings, _) in enumerate(steps):
        assert (regions is None) == (embeddings is None) == (number < 4)  # the first two epochs
        for i, image in enumerate(x * std + mean):
            assert torch.equal(image[0] > 0.5, mask_of(boxes[i]))
            if regions is None:
                continue
            assert torch.equal(image[1] > 0.5, mask_of(regions[i]))
            plain = (drawn.images.float() / 255 - image).abs().flatten(1).max(1).values < 0.01
            turned = (drawn.images.float() / 255 - image.flip(2)).abs().flatten(1).max(1).values
            turned = turned < 0.01
            assert plain.sum() + turned.sum() == 1
            mirrored += turned.sum().item()
            (row,) = (plain | turned).nonzero()[:, 0].tolist()
            # CLIP has seen the region as it is.
            assert torch.equal(embeddings[i], distilled["embeddings"][row].float())
            assert regions[i].shape == (1, 4)
    assert 8 <= mirrored <= 24  # of 32


def test_novel_boxes_never_reach_the_training(seen):
    """They are painted blue: no box has to be there, and no label is one of theirs."""
    steps, run, _, drawn = seen
    base = [name for name in PATTERNS if name not in NOVEL]
    colours = {name: sum((labels == PATTERNS.index(name)).sum().item() for labels in drawn.labels)
               for name in PATTERNS}  # fmt: skip
    assert sum(colours[name] for name in NOVEL) >= 3
    counts = dict.fromkeys(base, 0)
    for _, boxes, labels, *_ in steps:
        for box, label in zip(boxes, labels):
            assert len(box) == len(label)
            for number in label.tolist():
                counts[base[number]] += 1
    assert counts == {name: 6 * colours[name] for name in base}  # once per epoch
    assert torch.equal(run.model.text, names_of(10)[[PATTERNS.index(name) for name in base]])


@pytest.mark.parametrize("novel", ["zigzag,bricks,pinwheel", " dots , waves", "", "stripes"])
def test_base_names_are_numbered_anew_and_the_test_keeps_all(novel, monkeypatch):
    drawn, _ = painted(8)
    given = []

    def draw(n, seed, part, rare, share, distractors):
        given.append((n, seed, part, rare, share, distractors))
        return drawn.part(list(range(8)))

    monkeypatch.setattr(scenes, "scenes", draw)
    args = tiny_args(novel=novel, seed=3)
    data = vild.Detection(args, Words(), torch.device("cpu"))
    names = [name.strip() for name in novel.split(",") if name.strip()]
    base = [name for name in PATTERNS if name not in names]
    assert data.is_base.tolist() == [name in base for name in PATTERNS]
    assert data.classes == PATTERNS and len(data.names) == 10
    apart = names or ["zigzag", "bricks", "pinwheel"]  # where all are labelled, the rare ones
    assert data.judged_base.tolist() == [name not in apart for name in PATTERNS]
    for row in range(8):
        expected = [(box, PATTERNS[label]) for box, label in zip(
            (drawn.boxes[row] / 2).tolist(), drawn.labels[row].tolist())]  # fmt: skip
        made = [(box, base[label]) for box, label in zip(
            data.boxes[row].tolist(), data.labels[row].tolist())]  # fmt: skip
        assert made == [pair for pair in expected if pair[1] in base]
        assert torch.equal(data.test.boxes[row], drawn.boxes[row] / 2)  # 64 pixels became 32
        assert torch.equal(data.test.labels[row], drawn.labels[row])
    train, test = given  # the same families are rare whichever of them are novel
    assert train == (2000, 3, "detect", NOVEL, 0.1, True)
    assert test == (500, 1003, "detect, test", NOVEL, 0.3, True)


def test_what_is_taken_is_a_function_of_seed_epoch_and_image(monkeypatch):
    drawn, regions = painted(8)
    monkeypatch.setattr(scenes, "scenes", lambda *_: drawn.part(list(range(8))))
    args = tiny_args(size=64)
    data = vild.Detection(args, Words(), torch.device("cpu"))
    count = torch.tensor([1, 0] * 4)
    distilled = {"regions": regions, "embeddings": noise(8, 1, DIM, seed=5).half(), "count": count}

    def taken(rows, epoch=1, seed=0):
        args.seed = seed
        found, flips = vild.take(args, data, torch.tensor(rows), distilled, epoch, "cpu")
        draws = [torch.rand(3, generator=generator).tolist() for generator in found[-1]]
        return [*found[:-1], draws, flips.tolist()]

    all_rows = taken(list(range(8)))
    for row in (5, 2):
        for part, whole in zip(taken([row]), all_rows):
            if torch.is_tensor(part[0]):
                assert torch.equal(part[0], whole[row])
            else:
                assert part[0] == whole[row]
    assert [len(found) for found in all_rows[2]] == count.tolist()
    assert taken(list(range(8)), epoch=2)[-2] != all_rows[-2]
    assert taken(list(range(8)), seed=1)[-2] != all_rows[-2]
    flips = [taken(list(range(8)), epoch)[-1] for epoch in range(1, 40)]
    assert 0.4 < torch.tensor(flips).float().mean() < 0.6


def test_boxes_are_resized_and_mirrored():
    boxes = torch.tensor([[10.0, 20, 30, 40], [0, 0, 200, 100]])
    assert torch.equal(
        scenes.resize_boxes(boxes, (200, 100), 50),
        torch.tensor([[2.5, 10, 7.5, 20], [0, 0, 50, 50]]),
    )
    flipped = scenes.flip_boxes(boxes, 200)
    assert torch.equal(flipped, torch.tensor([[170.0, 20, 190, 40], [0, 0, 200, 100]]))
    assert torch.equal(scenes.flip_boxes(flipped, 200), boxes)


# ------------------------------------------------------------------------------------- detection
class Hand:
    """A detector whose outputs are given: proposals (n, 5) of each image, z and z_image (all, C),
    and by how much each box is moved (all, 4)."""

    def __init__(self, proposals, z, z_image=None, moves=None):
        self.proposals = proposals
        self.z = z
        self.image_head = None
        if z_image is not None:
            self.image_head = lambda pooled: (None, z_image)
        self.box_regressor = lambda hidden: torch.zeros(len(z), 4) if moves is None else moves
        self.background = noise(DIM, seed=7)
        self.coder = BoxCoder((10.0, 10.0, 5.0, 5.0))

    def propose(self, x):
        return self.proposals, None

    def head(self, pooled):
        return None, self.z

    def eval(self):
        return self

    train = eval


def hand_made(mode, per_image=(6, 4), seed=1):
    """(model, args) with random outputs."""
    n = sum(per_image)
    generator = torch.Generator().manual_seed(seed)
    proposals = torch.cat([draw_boxes(n, seed), torch.rand(n, 1, generator=generator)], dim=1)
    z = unit(noise(n, DIM, seed=seed))
    z_image = unit(noise(n, DIM, seed=seed + 1)) if mode == "ensemble" else None
    model = Hand(proposals.split(per_image), z, z_image, noise(n, 4, seed=seed))
    return model, tiny_args(mode=mode)


def naive_detections(model, args, scores):
    """Of scores (all, N): box by box and name by name, the hundred best of an image."""
    found = []
    start = 0
    moves = model.box_regressor(None).tolist()
    for proposals in model.proposals:
        boxes = []
        for row, proposal in enumerate(proposals.tolist()):
            boxes.append(move(proposal[:4], moves[start + row], (10, 10, 5, 5), args.size))
        detections = []
        for name in range(scores.shape[1]):
            score = scores[start : start + len(boxes), name].tolist()
            for row in naive_suppression(boxes, score, 0.5):
                detections.append((score[row], name, boxes[row]))
        detections.sort(key=lambda entry: -entry[0])
        found.append(detections[:100])
        start += len(boxes)
    return found


def compare_detections(found, expected):
    assert len(found) == len(expected)
    for (boxes, scores, labels), detections in zip(found, expected):
        assert labels.tolist() == [name for _, name, _ in detections]
        compare(scores, torch.tensor([score for score, _, _ in detections]), "scores")
        compare(boxes, torch.tensor([box for _, _, box in detections]), "boxes")


def softmax(logits):
    powers = [logit.exp() for logit in logits]
    return [power / sum(powers) for power in powers]


@each_mode
def test_detections_follow_the_paper(mode, double):
    """The background is in the softmax of the text head alone, the objectness in the scores of the
    image head alone."""
    model, args = hand_made(mode)
    names = names_of(7)
    is_base = torch.arange(7) % 3 > 0
    images = torch.zeros(2, 3, 32, 32, dtype=torch.uint8)
    found = vild.detect(args, model, images, names, is_base)
    scores = {}
    objectness = torch.cat(model.proposals)[:, 4]
    z_image = model.image_head(None)[1] if mode == "ensemble" else model.z
    text, image, both = [], [], []
    for z, other in zip(model.z, z_image):
        text.append(softmax(naive_logits(z, model.background, names, args.temperature))[1:])
        image.append(softmax([other @ name / args.temperature for name in names]))
        weight = args.ensemble_weight
        powers = [weight if base else 1 - weight for base in is_base]
        row = zip(text[-1], image[-1], powers)
        both.append([a**power * b ** (1 - power) for a, b, power in row])
    scores["text"] = scores["vild"] = torch.tensor(text)
    scores["image"] = objectness.unsqueeze(1) * torch.tensor(image)
    scores["ensemble"] = torch.tensor(both)
    assert sorted(found) == WAYS[mode]
    for way, detections in found.items():
        compare_detections(detections, naive_detections(model, args, scores[way]))
    alone = vild.detect(args, model, images, names, is_base, alone=True)
    assert alone.keys() == {mode}
    for made, expected in zip(alone[mode], found[mode]):
        assert all(torch.equal(a, b) for a, b in zip(made, expected))


def test_detections_of_the_teacher(double):
    """CLIP's softmax at its own temperature, times the objectness."""
    model, args = hand_made("vild")
    names = names_of(7)
    z = unit(noise(10, DIM, seed=8))
    asked = []

    def embed_regions(images, regions):
        asked.extend(regions)
        return list(z.split((6, 4)))

    log_scale = torch.tensor(2.0)
    slow = Namespace(model=Namespace(log_scale=log_scale), embed_regions=embed_regions)
    images = torch.zeros(2, 3, 32, 32, dtype=torch.uint8)
    found = vild.detect_by_teacher(args, model, slow, images, names)
    assert all(torch.equal(a, b[:, :4]) for a, b in zip(asked, model.proposals))
    objectness = torch.cat(model.proposals)[:, 4]
    scores = [[o * share for share in softmax([log_scale.exp() * row @ name for name in names])]
              for o, row in zip(objectness, z)]  # fmt: skip
    compare_detections(found, naive_detections(model, args, torch.tensor(scores)))


def test_suppression_is_within_a_name_and_leaves_a_hundred():
    boxes = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 9], [20, 20, 30, 30]])
    scores = torch.tensor([[0.9, 0.1], [0.8, 0.2], [0.3, 0.7]])
    ((kept, score, label),) = vild.suppress([boxes], [scores])
    assert list(zip(score.tolist(), label.tolist())) == [
        (pytest.approx(0.9), 0), (pytest.approx(0.7), 1), (pytest.approx(0.3), 0),
        (pytest.approx(0.2), 1),
    ]  # fmt: skip
    assert torch.equal(kept, boxes[[0, 2, 2, 1]])
    corner = torch.arange(30.0).view(-1, 1).expand(-1, 4) * 20
    apart = corner + torch.tensor([0.0, 0, 10, 10])
    scores = torch.rand(30, 5, generator=make_generator("scores"))
    ((kept, score, label),) = vild.suppress([apart], [scores])
    assert torch.equal(score, scores.flatten().sort(descending=True).values[:100])
    assert len(kept) == len(label) == 100


def one_scene():
    """A base and a novel object; detections of the first that are right, of the second wrong."""
    boxes = torch.tensor([[0.0, 0, 10, 10], [10, 10, 30, 30]])
    labels = torch.tensor([0, 3])
    image = torch.zeros(1, 3, 32, 32).byte()
    test = scenes.Scenes(image, [boxes], [labels], [(32, 32)], list("abcd"))
    right = (boxes, torch.tensor([0.9, 0.8]), labels)
    return test, right


def test_base_and_novel_names_are_averaged_apart():
    test, right = one_scene()
    is_base = torch.tensor([True, True, True, False])
    wrong = (right[0], right[1], torch.tensor([0, 0]))
    found = scenes.average_by_kind([wrong], test, is_base)
    assert found["base_ap50"] == pytest.approx(100) and found["novel_ap50"] == 0
    assert found["ap50"] == pytest.approx(50) and found["base_ap"] == pytest.approx(100)
    assert found["novel_ap"] == 0 and found["ap"] == pytest.approx(50)
    loose = (torch.tensor([[0.0, 0, 10, 10], [10, 10, 30, 22]]), *right[1:])  # an overlap of .6
    found = scenes.average_by_kind([loose], test, is_base)
    assert found["novel_ap50"] == pytest.approx(100) and found["novel_ap"] == pytest.approx(30)


@pytest.mark.parametrize("novel", ["d", "", "abcd", "b"])
def test_no_figure_is_nan(novel):
    """Also if there is no name of a kind, or no object with one."""
    test, right = one_scene()
    is_base = torch.tensor([name not in novel for name in "abcd"])
    found = scenes.average_by_kind([right], test, is_base)
    assert all(math.isfinite(value) for value in found.values()), found
    assert found["ap50"] == pytest.approx(100)
    assert ("base_ap50" in found) == (novel != "abcd")
    assert ("novel_ap50" in found) == (novel in ("d", "abcd"))


def test_guesses_change_novel_names_alone():
    n = 3000
    labels = torch.arange(n) % 6
    is_base = torch.tensor([True, False, True, True, False, False])
    boxes, scores = draw_boxes(n, 1), torch.rand(n, generator=make_generator("a"))
    ((made, score, guessed),) = scenes.guess_novel([(boxes, scores, labels)], is_base)
    assert torch.equal(made, boxes) and torch.equal(score, scores)
    base = is_base[labels]
    assert torch.equal(guessed[base], labels[base])
    shares = torch.bincount(guessed[~base], minlength=6) / (~base).sum()
    assert (shares[[1, 4, 5]] - 1 / 3).abs().max() < 0.05 and shares[[0, 2, 3]].sum() == 0
    same = (guessed == labels)[~base].float().mean()
    assert 0.28 < same < 0.39  # not a function of the name that was found
    again = scenes.guess_novel([(boxes, scores, labels)], is_base)
    assert torch.equal(again[0][2], guessed)
    unchanged = scenes.guess_novel([(boxes, scores, labels)], torch.ones(6).bool())
    assert torch.equal(unchanged[0][2], labels)


class Slow(Words):
    """CLIP that knows each of the proposals by its place."""

    model = Namespace(log_scale=torch.tensor(3.0))

    def embed_regions(self, images, regions):
        return [names_of(4)[[0, 3, 1]] for _ in regions]


@pytest.mark.parametrize("novel", ["d", ""])
def test_what_is_measured(novel):
    """Recall: of the twenty best proposals, apart for base and novel; the teacher's precision and
    the guesses beside the detector's own."""
    test, _ = one_scene()
    proposals = torch.tensor([[0.0, 0, 10, 9, 0.9], [10, 10, 30, 19, 0.8], [20, 0, 30, 8, 0.1]])
    z = names_of(4)[[0, 3, 1]]
    model = Hand([proposals], z)
    args = tiny_args(mode="vild")
    is_base = torch.tensor([name not in novel for name in "abcd"])
    data = Namespace(names=names_of(4), is_base=is_base, judged_base=is_base, test=test)
    data.test_pictures = scenes.Pictures(test.images, 32, 1)
    found = vild.measure(args, model, Slow(), data, by_teacher=True)
    numbers = {key: value for key, value in found.items() if value is not None}
    assert all(math.isfinite(value) for value in numbers.values()), found
    json.dumps(numbers, allow_nan=False)
    assert found["teacher_seconds"] > 0 and found["detection_seconds"] > 0
    if novel:
        assert found["base_recall"] == 100 and found["novel_recall"] == 0  # an overlap of .45
        assert found["base_ap50"] == pytest.approx(100) and found["novel_ap50"] == 0
        assert found["teacher_base_ap50"] == pytest.approx(100)
        assert found["guess_novel_ap50"] == 0
    else:
        assert found["base_recall"] == 50
        assert "novel_ap50" not in found and found.get("guess_novel_ap50") is None
    only = vild.measure(args, model, Slow(), data)
    assert only.keys() == {"ap50", "ap", *(f"{kind}_{key}" for key in ("ap50", "ap")
                           for kind in (("base", "novel") if novel else ("base",)))}  # fmt: skip


def test_the_best_detections_are_drawn():
    from matplotlib.figure import Figure

    n = 14
    scores = torch.linspace(0.95, 0.05, n)
    labels = torch.arange(n) % 3
    axis = Figure().subplots()
    left = 2.0 * torch.arange(n)
    boxes = torch.stack([left, left + 1, left + 2, left + 3], dim=1)
    boxes = torch.cat([boxes, boxes + 0.1])  # where another has been seen with more certainty
    detections = (boxes, torch.cat([scores, scores - 0.01]), labels.repeat(2))
    vild.draw_surest(axis, an_image(32), detections, ["a", "b", "c"], [True, False, True])
    shown = [f"{'abc'[label]} {score:.2f}" for score, label in zip(scores.tolist(), labels.tolist())
             if score > 0.3][:10]  # fmt: skip
    assert [text.get_text() for text in axis.texts] == shown and len(shown) == 10
    colours = ["tab:orange" if text[0] == "b" else "tab:blue" for text in shown]
    assert [line.get_color() for line in axis.lines] == colours
    empty = Figure().subplots()
    vild.draw_surest(empty, an_image(32), (torch.zeros(0, 4), scores[:0], labels[:0]), [], [])
    assert not empty.texts and len(empty.images) == 1


# -------------------------------------------------------------------------------------- schedule
def test_the_learning_rate():
    """Section 4: up in the first epochs, then a tenth at 90, 95 and 97.5 % of the steps."""
    args = tiny_args(epochs=200, warmup_epochs=4.0, lr=0.32)
    expected = {0: 0, 1: 0.08, 3: 0.24, 4: 0.32, 179.9: 0.32, 180: 0.032, 189.9: 0.032}
    expected |= {190: 0.0032, 194.9: 0.0032, 195: 0.00032, 199.9: 0.00032}
    for epoch, lr in expected.items():
        assert vild.learning_rate(args, epoch) == pytest.approx(lr)


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_what_is_decayed(optimizer):
    """Neither gains nor biases nor the background."""
    model, args = tiny_model(optimizer=optimizer, weight_decay=0.3)
    made = vild.build_optimizer(args, model)
    decays = {id(p): group["weight_decay"] for group in made.param_groups for p in group["params"]}
    for name, p in model.named_parameters():
        assert decays[id(p)] == (0.3 if p.ndim > 1 else 0.0), name
    if optimizer == "sgd":
        assert made.param_groups[0]["momentum"] == 0.9


# ---------------------------------------------------------------------------------------- parity
CHOOSE = vild.choose_balanced
IMAGE_LOSS = vild.image_loss
MISTAKES = {
    "sampling from torch's global generator": {
        "choose_balanced": lambda labels, n, share, _: CHOOSE(labels, n, share, None)
    },
    "the sampler of torchvision": {
        "Sampler": lambda n: BalancedPositiveNegativeSampler(n, 0.5),
    },
    "a mean over the process's own regions": {
        "image_loss": lambda z, embeddings, most: IMAGE_LOSS(z, embeddings, len(z))
    },
}


def parity_step(mode, rank=0, world_size=1):
    """A step on this process's share of a fixed batch, and what came out of it."""
    model, _ = tiny_model(mode=mode)
    synchronise(model)
    network = model
    if world_size > 1:
        network = nn.parallel.DistributedDataParallel(model, find_unused_parameters=True)
    mine = slice(rank * 8 // world_size, (rank + 1) * 8 // world_size)
    torch.manual_seed(3)
    loss, _ = network(*(part[mine] for part in batch_of(8)))
    loss.backward()
    found = {}
    for name, p in model.named_parameters():
        if p.grad is not None:
            found[f"gradient of {name}"] = p.grad
    total = loss.detach().clone()
    if world_size > 1:
        dist.all_reduce(total)
    return found | {"loss": total / world_size}


def parity_steps(rank=0, world_size=1):
    """A step in each mode, and one of the main mode with each mistake."""
    found = {mode: parity_step(mode, rank, world_size) for mode in vild.MODES}
    for mistake, names in MISTAKES.items():
        found[mistake] = with_names(vild, parity_step, **names)("vild", rank, world_size)
    return found


def parity_regions(rank=0):
    """What is distilled, each process its part; their running statistics differ at first."""
    model, args = tiny_model()
    for name, x in model.named_buffers():
        if "running" in name:
            x.add_(rank)
    images = torch.stack([an_image(32, seed=i) for i in range(7)])
    pictures = Namespace(images=images, read=lambda rows: images[rows])
    return vild.regions_to_distil(args, model, Words(), pictures)


def parity_work(rank, world_size, folder):
    make_double(pytest.MonkeyPatch())
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=world_size)
    found = parity_steps(rank, world_size), parity_regions(rank)
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.parametrize("processes", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_the_step_of_many_processes_is_that_of_one(processes, tmp_path, double):
    """To 1e-9 in the loss and all gradients, in every mode; each mistake, which one process makes,
    too, is noticed. What is distilled is the same."""
    mp.spawn(parity_work, (processes, str(tmp_path)), nprocs=processes)
    one = parity_steps()
    regions = parity_regions()
    largest = dict.fromkeys(one, 0.0)
    for rank in range(processes):
        found, distilled = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        for name, expected in one.items():
            largest[name] = max(largest[name], difference(expected, found[name]))
        for name, x in regions.items():
            assert torch.allclose(distilled[name].double(), x.double(), atol=1e-3), name
    for name, value in largest.items():
        assert value > 1e-3 if name in MISTAKES else value < 1e-9, largest


# ------------------------------------------------------------------------------------------ runs
DRAWN = {}  # scenes, rendered once


@pytest.fixture
def few(monkeypatch):
    """16 scenes to train on and 8 to test on."""
    original = scenes.scenes

    def drawn(n, seed, part, *rest):
        if (seed, part) not in DRAWN:
            DRAWN[seed, part] = original(16, seed, part, *rest)
        return DRAWN[seed, part].part(list(range(16 if part == "detect" else 8)))

    monkeypatch.setattr(scenes, "scenes", drawn)


def lines_of(out):
    """A run's log without what no two runs share."""
    lines = log_of(out)
    for line in lines:
        line.pop("detection_seconds", None)
        line.pop("teacher_seconds", None)
    return lines


WHOLE = {}


@pytest.fixture
def whole(few, clip_file, tmp_path_factory, capsys):
    """(folder, result, what it printed) of an uninterrupted run of three epochs."""
    if not WHOLE:
        out = tmp_path_factory.mktemp("whole")
        result = vild.main(tiny_args(teacher=clip_file, out=out))
        WHOLE["run"] = out, result, capsys.readouterr().out
    return WHOLE["run"]


def test_one_process(whole, clip_file, capsys):
    out, result, printed = whole
    assert result == json.loads((out / "result.json").read_text())
    figures = {"ap50", "ap", "base_ap50", "base_ap", "novel_ap50", "novel_ap"}
    ways = {f"{way}_{figure}" for way in ("text", "image", "teacher") for figure in figures}
    others = {"guess_novel_ap50", "base_recall", "novel_recall"}
    seconds = {"detection_seconds", "teacher_seconds"}
    assert result.keys() == set(RESULT.split()) | figures | ways | others | seconds
    assert all(0 <= result[key] <= 100 for key in figures | ways | others)
    assert all(result[key] > 0 for key in seconds | {"seconds"})
    assert result["method"] == "vild" and result["data"] == "scenes"
    log = lines_of(out)
    assert [line["epoch"] for line in log] == [0, 1, 2, 3]
    for line in log:
        assert figures <= line.keys() and all(math.isfinite(line[key]) for key in figures)
    assert [vild.learning_rate(tiny_args(), epoch - 0.25) for epoch in (1, 2, 3)] == [
        line["lr"] for line in log[1:]
    ]
    assert "epoch 0/3  random weights  AP50 " in printed
    chances = [line.split("(chance ")[1].split(")")[0] for line in printed.splitlines()
               if "(chance " in line]  # fmt: skip
    start = math.log(2) + math.log(8)
    more = 0.7 * math.sqrt(4 / math.pi * 10)
    assert chances == [f"{start:.2f}", f"{start + more:.2f}", f"{start + more:.2f}"]
    assert (out / "report.png").stat().st_size > 10_000
    checkpoint = checkpoint_of(out)
    assert checkpoint.keys() == set(CHECKPOINT.split())
    assert checkpoint["model"]["text"].shape == (7, 10)
    assert not any(name.startswith("teacher") for name in checkpoint["model"])
    distilled = harness.load_checkpoint(out / "regions.pt")
    assert distilled["regions"].shape == (16, 4, 4)
    assert distilled["embeddings"].dtype == torch.half
    norms = distilled["embeddings"].float().norm(dim=2)[distilled["count"] == 4]
    assert torch.allclose(norms, torch.ones_like(norms), atol=2e-3)

    args = tiny_args(teacher=clip_file, out=out)
    vild.build_backbone(args).load_state_dict(torch.load(out / "backbone.pt", weights_only=True))
    assert "holds a finished run" in error_line(capsys, vild.main, args)
    args.seed = 1
    assert "holds a run with another --seed:" in error_line(capsys, vild.main, args)
    assert result == json.loads((out / "result.json").read_text())


def test_resumed_equals_uninterrupted(whole, clip_file, tmp_path, capsys):
    """Stopped before the regions to distil exist, twice after, and once as they are computed."""
    args = tiny_args(teacher=clip_file, out=tmp_path)
    regions = tmp_path / "regions.pt"
    for method, call, finished, distilled in (
        ("after_step", 3, 0, False),
        ("after_step", 6, 1, True),  # of the second epoch, which is the first to distil
        ("after_step", 5, 2, True),
        ("after_step", 2, 2, True),
    ):
        interrupt(vild, args, method, call)
        assert STOPPED in capsys.readouterr().out
        assert [line["epoch"] for line in lines_of(tmp_path)] == list(range(finished + 1))
        assert regions.exists() == distilled
        if finished == 1:
            regions.unlink()  # as if it had been killed before they were written
    result = vild.main(args)
    assert lines_of(tmp_path) == lines_of(whole[0])
    assert same_state(checkpoint_of(tmp_path), checkpoint_of(whole[0]))
    times = {"seconds", "images_per_second", "detection_seconds", "teacher_seconds"}
    assert all(result[key] == value for key, value in whole[1].items() if key not in times)


def test_regions_that_are_gone_are_one_line(few, clip_file, tmp_path, capsys):
    args = tiny_args(teacher=clip_file, out=tmp_path)
    interrupt(vild, args, "after_epoch", 2)
    (tmp_path / "regions.pt").write_bytes(b"no regions")
    assert "regions.pt is not a readable checkpoint" in error_line(capsys, vild.main, args)
    (tmp_path / "regions.pt").unlink()
    assert "regions.pt: no such file" in error_line(capsys, vild.main, args)


@pytest.mark.parametrize("flags", [{"lr": 1e3}, {"lr": 1e6, "optimizer": "sgd"}])
def test_a_training_that_diverges_is_one_line(flags, few, clip_file, tmp_path, capsys):
    """Also if it does so in the last step of an epoch, whose evaluation then finds nothing."""
    args = tiny_args(teacher=clip_file, out=tmp_path, **flags)
    line = error_line(capsys, vild.main, args)
    assert "is not finite; " in line and "keeps the one before it" in line
    assert len(checkpoint_of(tmp_path)["log"]) in (1, 2)


@pytest.mark.parametrize("mode", ["text", "image", "vild"])
def test_other_modes_run(mode, few, clip_file, tmp_path):
    """ViLD-text needs no regions, and has no other way of scoring than its own."""
    result = vild.main(tiny_args(teacher=clip_file, out=tmp_path, mode=mode, epochs=2))
    assert (tmp_path / "regions.pt").exists() == (mode != "text")
    assert "text_ap50" not in result and "image_ap50" not in result
    assert result["teacher_novel_ap50"] is not None and result["novel_ap50"] is not None


def test_a_folder_in_the_layout_of_coco(few, clip_file, tmp_path):
    """Pictures of another size than the network's, two of them to test on; without a novel name,
    and with some."""
    drawn = scenes.scenes(16, 0, "detect", NOVEL, 0.1, True)
    rare = torch.tensor([PATTERNS.index(name) for name in NOVEL])
    has_novel = [row for row in range(16) if torch.isin(drawn.labels[row], rare).any()]
    folder = write_coco(tmp_path / "small", drawn)
    write_coco(folder, drawn.part([0, has_novel[0]]), "val")
    flags = {"data": folder, "recipe": "coco", "arch": "thin", "first_level": 2, "epochs": 2}
    flags |= {"head_convs": 1, "optimizer": "sgd", "lr": 0.01}
    result = vild.main(tiny_args(teacher=clip_file, out=tmp_path / "run", **flags))
    assert result["data"] == "small" and "novel_ap50" not in result
    json.loads((tmp_path / "run" / "result.json").read_text(), parse_constant=pytest.fail)
    flags["novel"] = "zigzag,bricks,pinwheel"
    result = vild.main(tiny_args(teacher=clip_file, out=tmp_path / "novel", **flags))
    assert 0 <= result["novel_recall"] <= 100
    json.loads((tmp_path / "novel" / "result.json").read_text(), parse_constant=pytest.fail)


def test_the_teacher_is_trained_first_if_it_is_missing(monkeypatch, tmp_path, capsys):
    """And only then: another --teacher, and one of several processes, is an error."""
    monkeypatch.chdir(tmp_path)
    commands = []

    def ran(command):
        commands.append([str(word) for word in command])
        return Namespace(returncode=len(commands) - 1)

    monkeypatch.setattr(vild.subprocess, "run", ran)
    args = vild.parse_args([])
    vild.find_teacher(args)
    assert commands[0][1].endswith("clip.py") and commands[0][2:] == ["--out", "runs/clip-patterns"]
    assert "training clip.py first" in capsys.readouterr().out
    assert "clip.py did not finish" in error_line(capsys, vild.find_teacher, args)
    monkeypatch.setenv("RANK", "0")
    assert "`python clip.py` makes" in error_line(capsys, vild.find_teacher, args)
    monkeypatch.delenv("RANK")
    (tmp_path / "runs" / "clip-patterns").mkdir(parents=True)
    (tmp_path / "runs" / "clip-patterns" / "checkpoint.pt").touch()
    vild.find_teacher(args)
    assert len(commands) == 2


# ------------------------------------------------------------------------------------ --detect
def asking(out, *flags):
    return lambda: vild.main(vild.parse_args([*flags, "--out", str(out)]))


@pytest.fixture
def picture(tmp_path):
    """128 pixels wide, 64 high."""
    path = tmp_path / "picture.png"
    TF.to_pil_image(torch.cat([an_image(64), an_image(64, seed=2)], dim=2)).save(path)
    return str(path)


def test_names_never_seen_are_looked_for(whole, picture, monkeypatch, capsys):
    """Everything is shown here, however low its score."""
    out = whole[0]
    monkeypatch.setattr(scenes, "SURE", -1.0)
    found = asking(out, "--detect", picture, "--names", "zigzag, my cat ,,stripes")()
    printed = capsys.readouterr().out.splitlines()
    assert set(found[2].tolist()) == {0, 1, 2}
    lines = []
    for row in vild.surest(found).tolist():
        place = ", ".join(f"{side:.0f}" for side in found[0][row].tolist())
        name = ("zigzag", "my cat", "stripes")[found[2][row]]
        lines.append(f"{name} ({100 * found[1][row]:.0f} %) at {place}")
    assert 2 < len(lines) <= 10
    lines.append(f"{len(lines)} found with a score over -1.0")
    assert printed == [*lines, f"drawn in {out / 'detections.png'}"]
    assert (out / "detections.png").read_bytes().startswith(b"\x89PNG")
    again = asking(out, "--detect", picture, "--names", "zigzag, my cat ,,stripes")()
    assert all(torch.equal(a, b) for a, b in zip(found, again))


def test_which_names_are_base_is_known_and_where_a_box_is(whole, picture, monkeypatch, capsys):
    """Base: those with boxes in the training, which the ensemble scores in another way. A box is
    printed in pixels of the picture."""
    given = []

    def detect(args, model, images, names, is_base):
        given.append((images.shape, is_base.tolist()))
        assert not model.training
        box = torch.tensor([[8.0, 10, 16, 32]])
        return {args.mode: [(box, torch.tensor([0.7]), torch.tensor([2]))]}

    monkeypatch.setattr(vild, "detect", detect)
    names = "zigzag,stripes,my cat,pinwheel,waves"
    asking(whole[0], "--detect", picture, "--names", names)()
    assert given == [((1, 3, 32, 32), [False, True, False, False, True])]
    printed = capsys.readouterr().out
    assert printed.startswith("my cat (70 %) at 32, 20, 64, 64\n1 found with a score over 0.3\n")


def test_what_cannot_be_detected_is_one_line(whole, clip_file, picture, tmp_path, capsys):
    def said(out, *flags):
        return error_line(capsys, asking(out, *flags))

    out = whole[0]
    assert "needs --names" in said(out, "--detect", picture)
    assert "needs --names" in said(out, "--detect", picture, "--names", " , ")
    names = ("--names", "a zigzag")
    assert "checkpoint.pt: no such file" in said(tmp_path / "none", "--detect", picture, *names)
    line = said(clip_file.parent, "--detect", picture, *names)
    assert "is not a checkpoint of this program; `python vild.py` makes one" in line
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no picture")
    assert "cannot read the image" in said(out, "--detect", str(broken), *names)
    assert "cannot read the image" in said(out, "--detect", str(tmp_path / "gone.png"), *names)
    assert "cannot read the image" in said(out, "--detect", "", *names)


# ------------------------------------------------------------------------------------- bad input
@pytest.mark.parametrize(
    "flags, part",
    [
        ({"novel": "zigzag,tartan"}, "--novel tartan: not one of stripes, checks,"),
        ({"mode": "masks"}, "--mode masks: not one of text, image, vild, ensemble"),
        ({"batch_size": 17}, "a batch of 17, but there are only 16 pictures"),
        ({"optimizer": "lars"}, "--optimizer lars: neither adamw nor sgd"),
        ({"arch": "resnet51"}, "--arch resnet51: neither thin nor one of resnet"),
        ({"data": "nowhere", "recipe": "scenes"}, "nowhere: no such folder"),
        ({"teacher": "gone.pt"}, "--teacher gone.pt: no such file; `python clip.py` makes"),
        ({"teacher": ""}, "--teacher: which checkpoint of CLIP?"),
    ],
)
def test_wrong_flags(flags, part, few, clip_file, tmp_path, capsys):
    args = tiny_args(**{"teacher": clip_file, "out": tmp_path / "run"} | flags)
    assert part in error_line(capsys, vild.main, args)
    assert not (tmp_path / "run").exists()


def test_teachers_that_are_none(few, clip_file, tmp_path, capsys):
    """No checkpoint; one of another script; CLIP without its merges, ours or OpenAI's."""

    def said(content):
        path = tmp_path / "teacher.pt"
        harness.save(path, content)
        return error_line(capsys, vild.main, tiny_args(teacher=path, out=tmp_path / "run"))

    assert "teacher.pt is not a readable checkpoint" in said(b"no checkpoint")
    backbone = vild.build_backbone(tiny_args()).state_dict()
    for content in (backbone, {"model": backbone}, {"state_dict": {}}, [1, 2]):
        assert "teacher.pt: not a checkpoint of CLIP" in said(content)
    assert "merges.txt" in said(harness.load_checkpoint(clip_file))
    official = {"text_projection": torch.zeros(4, 4)}
    assert "CLIP, but none of its" in said(official)
    assert not (tmp_path / "run").exists()


def test_openai_needs_its_tokens(monkeypatch, tmp_path, capsys):
    model = Namespace(to=None)
    monkeypatch.setattr(evaluate, "load_clip", lambda *_: (model, None, None, "CLIP"))
    harness.save(tmp_path / "clip.pt", {"text_projection": torch.zeros(4, 4)})
    args = tiny_args(teacher=tmp_path / "clip.pt")
    line = error_line(capsys, vild.Teacher, args, torch.device("cpu"))
    assert "is OpenAI's: it needs --merges" in line


def test_faults_of_a_folder_are_found(few, clip_file, tmp_path, capsys):
    """The checks are scenes.py's, whose tests they have; both parts are looked at."""
    drawn = scenes.scenes(8, 0, "detect", NOVEL, 0.1, True).part([0, 1, 2, 3])

    def said(name, *flags):
        more = {"data": tmp_path / name, "recipe": "scenes", "out": tmp_path / "run"}
        return error_line(capsys, vild.main, tiny_args(teacher=clip_file, **more))

    def outside(content):
        content["annotations"][0]["bbox"] = [50, 50, 40, 40]

    def renamed(content):
        content["categories"][0]["name"] = "tartan"

    for part, change, line in (
        ("train", outside, "leaves the picture"),
        ("val", outside, "leaves the picture"),
        ("val", renamed, "train and val have different names"),
    ):
        folder = tmp_path / f"{part}-{change.__name__}"
        for written in ("train", "val"):
            write_coco(folder, drawn, written, change if written == part else None)
        assert line in said(folder.name)
    assert not (tmp_path / "run").exists()


# --------------------------------------------------------------------------------------- recipes
PAPER = {
    # tensorflow/tpu, projects/vild/configs/vild_resnet.yaml, and section 4: the ResNet-50 + FPN of
    # a Mask R-CNN, from scratch, on pictures of 1024 pixels; anchors of 8 strides on each level
    # from stride 4 on.
    "arch": "resnet50",
    "size": 1024,
    "first_level": 1,
    "fpn_dim": 256,
    "anchor_scale": 8.0,
    # The same file: 4 convolutions and 2 linear layers, 256 anchors, 1000 proposals after
    # suppression, 512 regions.
    "head_convs": 4,
    "head_layers": 2,
    "head_dim": 1024,
    "anchors": 256,
    "proposals": 1000,
    "regions": 512,
    # vild_model.py: at most 300 regions to distil.
    "distilled": 300,
    # Section 4, frcnn_head.temperature in the yaml file: tau; README.md: w of both ResNet-50s.
    "temperature": 0.01,
    "image_weight": 0.5,
    # Equation 5, ops/postprocess_ops.py.
    "mode": "ensemble",
    "ensemble_weight": 0.6667,
    # Section 4: 180,000 steps of 256 of LVIS's 100,170 pictures, of which 1,000 are warm-up; SGD.
    "epochs": 460,
    "batch_size": 256,
    "optimizer": "sgd",
    "lr": 0.32,
    "warmup_epochs": 2.5,
    "weight_decay": 4e-5,
    # The proposals of the paper are those of a network of its own; which teacher and which names
    # is for the user to say.
    "proposal_epochs": 1,
    "teacher": "",
    "merges": "",
    "novel": "",
}
COCO = PAPER | {
    # One GPU in a day: smaller pictures (DetPro's short side), fewer regions, torchvision's and
    # DetPro's 12 epochs and batch 16, AdamW.
    "size": 640,
    "proposals": 300,
    "regions": 128,
    "distilled": 50,
    "epochs": 12,
    "batch_size": 16,
    "optimizer": "adamw",
    "lr": 2e-4,
    "warmup_epochs": 0.2,
    "weight_decay": 1e-2,
}


@pytest.mark.parametrize("recipe, expected", [("paper", PAPER), ("coco", COCO)])
def test_recipes(recipe, expected):
    column = vild.SETTINGS["recipe"].index(recipe)
    found = {name: row[column] for name, row in vild.SETTINGS.items()}
    del found["recipe"], found["eval_every"]
    assert found == expected
    assert vars(vild.parse_args(["--recipe", recipe])).items() >= expected.items()


def test_the_steps_of_the_paper():
    images = 100_170  # of LVIS v1's training part
    steps = images // PAPER["batch_size"]
    assert PAPER["epochs"] * steps == pytest.approx(180_000, rel=0.01)
    assert PAPER["warmup_epochs"] * steps == pytest.approx(1000, rel=0.05)


def test_a_folder_gets_the_recipe_for_one_gpu():
    assert vild.parse_args(["--data", "somewhere"]).recipe == "coco"
    assert vild.parse_args([]).recipe == "scenes"
    assert vild.parse_args([]).novel == "zigzag,bricks,pinwheel"


# ------------------------------------------------------------------------------------------ slow
@pytest.mark.slow
def test_two_processes(clip_file, tmp_path):
    """As users start it, on a folder."""
    drawn = scenes.scenes(16, 0, "detect", NOVEL, 0.1, True)
    folder = write_coco(tmp_path / "small", drawn)
    write_coco(folder, drawn.part([0, 1, 2, 3]), "val")
    flags = TINY | {"data": folder, "recipe": "scenes", "out": tmp_path / "run", "epochs": 2}
    ran = torchrun(2, "vild.py", *words(vild, teacher=clip_file, **flags))
    assert ran.returncode == 0, ran.stderr[-3000:]
    assert ran.stdout.count("epoch 2/2") == 1  # only one process prints
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["world_size"] == 2 and result["base_ap50"] is not None


@pytest.mark.slow
def test_the_default_recipe_finds_what_nobody_labelled(tmp_path):
    """With the finished network of clip.py as its teacher."""
    teacher = ROOT / "results" / "weights" / "clip.pt"
    flags = ["--teacher", str(teacher), "--out", str(tmp_path)]
    result = vild.main(vild.parse_args(flags))
    assert result["novel_ap50"] >= 40 and result["base_ap50"] >= 85
    assert result["novel_ap50"] > result["guess_novel_ap50"] + 20
