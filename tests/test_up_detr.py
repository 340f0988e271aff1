"""UP-DETR and the DETR in it: matching, losses, mask and forward against naive versions in float64;
two processes against one; resuming; bad input."""

import argparse
import copy
import itertools
import json
import math
import random
import types

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
import torchvision
from conftest import ROOT, checkpoint_of, error_line, interrupt, log_of, same_state
from test_scenes import write_coco
from torch import nn
from torchvision.ops import generalized_box_iou
from torchvision.transforms import functional as TF

import common
import scenes
import up_detr

SMALL = {
    "size": 32,
    "patch_size": 16,
    "patch_min": 4,
    "patch_max": 0,
    "width": 16,
    "heads": 2,
    "ffn_dim": 24,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "queries": 6,
    "query_patches": 3,
    "query_mask": 0.3,
    "query_shuffle": 1,
    "batch_size": 8,
    "epochs": 2,
    "tune_epochs": 2,
    "scratch_epochs": 3,
    "tune_batch_size": 4,
    "eval_every": 1,
    "workers": 0,
}


@pytest.fixture(scope="module")
def cnn(tmp_path_factory):
    """The path of a random CNN, some of whose batch statistics are not trivial."""
    torch.manual_seed(5)
    network = common.resnet("thin", 32)
    network(torch.randn(64, 3, 32, 32))
    path = tmp_path_factory.mktemp("cnn") / "backbone.pt"
    torch.save(network.state_dict(), path)
    return path


@pytest.fixture(scope="module")
def drawn():
    return scenes.scenes(48, seed=9)


@pytest.fixture
def small(monkeypatch, drawn, tmp_path, cnn):
    """arguments(**flags) of a tiny run; the scenes are a few that are rendered only once."""
    train = drawn.part(list(range(16, 28)))
    test = drawn.part(list(range(28, 48)))
    data = scenes.SceneData("scenes", drawn.images[:16], train, test, common.PATTERNS)
    monkeypatch.setattr(scenes, "load_scenes", lambda *_: data)

    def arguments(**flags):
        return parse(cnn, **{"out": tmp_path / "run", **flags})

    return arguments


def parse(cnn, **flags):
    words = []
    for name, value in (SMALL | {"backbone": cnn} | flags).items():
        if value is True:
            words.append("--" + name)
        elif value is not None:
            words += ["--" + name.replace("_", "-"), str(value)]
    return up_detr.parse_args(words)


@pytest.fixture
def double(monkeypatch):
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


# ------------------------------------------------------------------------------------- matching
def cheapest(cost):
    """The lowest sum over all ways to give each row a column of its own."""
    columns = range(len(cost[0]))
    ways = itertools.permutations(columns, len(cost))
    return min(sum(row[c] for row, c in zip(cost, way)) for way in ways)


def test_hungarian_against_all_permutations():
    generator = random.Random(0)
    for case in range(500):
        targets = generator.randint(1, 5)
        queries = generator.randint(targets, 6)
        cost = []
        for _ in range(targets):
            row = [generator.uniform(-3, 3) for _ in range(queries)]
            if case % 3 == 0:  # many equal sums
                row = [generator.randint(-1, 2) for _ in range(queries)]
            cost.append(row)
        found = up_detr.hungarian(cost)
        assert len(set(found)) == targets
        total = sum(cost[target][query] for target, query in enumerate(found))
        assert abs(total - cheapest(cost)) < 1e-9
    assert up_detr.hungarian([]) == []


def corners(box):
    x, y, width, height = box.tolist()
    return x - width / 2, y - height / 2, x + width / 2, y + height / 2


def naive_giou(a, b):
    a = corners(a)
    b = corners(b)
    width = max(min(a[2], b[2]) - max(a[0], b[0]), 0)
    height = max(min(a[3], b[3]) - max(a[1], b[1]), 0)
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - width * height
    around = (max(a[2], b[2]) - min(a[0], b[0])) * (max(a[3], b[3]) - min(a[1], b[1]))
    return width * height / union - (around - union) / around


def random_boxes(*shape):
    sides = 0.1 + 0.4 * torch.rand(*shape, 2)
    return torch.cat([0.2 + 0.6 * torch.rand(*shape, 2), sides], dim=-1)


def test_giou(double):
    torch.manual_seed(0)
    a = random_boxes(50)
    b = random_boxes(50)
    naive = torch.tensor([naive_giou(*pair) for pair in zip(a, b)])
    assert torch.allclose(up_detr.giou(a, b), naive, atol=1e-6)
    pairs = generalized_box_iou(*(torch.tensor([corners(x) for x in boxes]) for boxes in (a, b)))
    assert torch.allclose(up_detr.giou(a, b), pairs.diag(), atol=1e-6)


def a_case(classes=3):
    """Predictions for three images, and 2, 0 and 3 true boxes."""
    torch.manual_seed(1)
    image = torch.tensor([0, 0, 2, 2, 2])
    labels = torch.randint(classes, (5,))
    return torch.randn(3, 6, classes + 1), random_boxes(3, 6), image, labels, random_boxes(5)


def naive_cost(scores, box, label, true):
    powers = scores.exp()
    probability = powers[label] / powers.sum()
    return -probability + 5 * (box - true).abs().sum() - 2 * naive_giou(box, true)


def test_match_has_the_lowest_cost_in_every_image(double):
    scores, boxes, image, labels, true = a_case()
    query = up_detr.match(scores, boxes, image, labels, true)
    for number in range(3):
        rows = (image == number).nonzero()[:, 0].tolist()
        if not rows:
            continue
        cost = []
        for t in rows:
            pairs = zip(scores[number], boxes[number])
            cost.append([naive_cost(*pair, labels[t], true[t]).item() for pair in pairs])
        total = sum(cost[i][query[t]] for i, t in enumerate(rows))
        assert abs(total - cheapest(cost)) < 1e-6
        assert len(set(query[rows].tolist())) == len(rows)


def naive_loss(scores, boxes, image, query, labels, true, none_weight):
    entropy = 0.0
    weights = 0.0
    owner = dict(zip(zip(image.tolist(), query.tolist()), labels.tolist()))
    none = scores.shape[2] - 1
    for i, n in itertools.product(range(len(scores)), range(scores.shape[1])):
        label = owner.get((i, n), none)
        weight = none_weight if label == none else 1.0
        powers = scores[i, n].exp()
        entropy = entropy - weight * (powers[label] / powers.sum()).log()
        weights += weight
    total = entropy / weights
    for t in range(len(image)):
        box = boxes[image[t], query[t]]
        total = total + 5 * (box - true[t]).abs().sum() / len(image)
        total = total + 2 * (1 - naive_giou(box, true[t])) / len(image)
    return total


def test_set_loss(double):
    scores, boxes, image, labels, true = a_case()
    query = up_detr.match(scores, boxes, image, labels, true)
    for none_weight in (0.1, 0.5):
        loss = up_detr.set_loss(scores, boxes, (image, query, labels, true), none_weight)
        naive = naive_loss(scores, boxes, image, query, labels, true, none_weight)
        assert abs(loss - naive) < 1e-6


def test_a_batch_without_a_box_has_a_loss_and_a_gradient(double):
    scores, boxes, *_ = a_case()
    scores.requires_grad_()
    boxes.requires_grad_()
    nothing = torch.zeros(0, dtype=torch.long)
    true = torch.zeros(0, 4)
    query = up_detr.match(scores, boxes, nothing, nothing, true)
    loss = up_detr.set_loss(scores, boxes, (nothing, query, nothing, true), 0.1)
    loss.backward()
    assert loss.isfinite() and scores.grad.any() and not boxes.grad.any()


def test_predictions_that_are_not_finite_are_one_line(capsys):
    scores, boxes, *rest = a_case()
    boxes[0, 1, 2] = math.nan
    assert "not finite" in error_line(capsys, up_detr.match, scores, boxes, *rest)


# ------------------------------------------------------------------------------- mask, positions
GROUPS = [(100, 10), (100, 20), (20, 5), (12, 4), (6, 6), (5, 1)]


@pytest.mark.parametrize("queries, patches", GROUPS)
def test_queries_attend_within_their_group(queries, patches):
    mask = up_detr.attention_mask(queries, patches)
    for a, b in itertools.product(range(queries), range(queries)):
        assert mask[a, b] == (a * patches // queries != b * patches // queries)
    assert not mask.all(1).any()  # a row of nothing but -inf would give nan


def test_queries_that_cannot_be_grouped(capsys):
    assert "--query-patches 4" in error_line(capsys, up_detr.attention_mask, 10, 4)


def test_positions():
    table = up_detr.sine_positions(3, 5, 16)
    assert table.shape == (15, 16)
    for row, column in itertools.product(range(3), range(5)):
        expected = []
        for place, side in ((row, 3), (column, 5)):
            turn = 2 * math.pi * (place + 1) / side
            angles = [turn / 10000 ** (k / 4) for k in range(4)]
            expected += [math.sin(angle) for angle in angles]
            expected += [math.cos(angle) for angle in angles]
        assert torch.allclose(table[5 * row + column], torch.tensor(expected), atol=1e-5)


# -------------------------------------------------------------------------------------- forward
def naive_attention(module, q, k, v, mask=None):
    """One image: q (N, C), k and v (S, C), head by head."""
    weights = module.in_proj_weight.chunk(3)
    biases = module.in_proj_bias.chunk(3)
    q, k, v = (x @ w.T + b for x, w, b in zip((q, k, v), weights, biases))
    heads = []
    size = q.shape[1] // module.num_heads
    for head in range(module.num_heads):
        part = slice(head * size, (head + 1) * size)
        logits = q[:, part] @ k[:, part].T / math.sqrt(size)
        if mask is not None:
            logits[mask] = -math.inf
        heads.append(logits.softmax(1) @ v[:, part])
    return torch.cat(heads, dim=1) @ module.out_proj.weight.T + module.out_proj.bias


def naive_layer4(block, h):
    """A BasicBlock without its stride, the second convolution with gaps between its weights."""
    out = F.conv2d(h, block.conv1.weight, padding=1)
    out = block.bn1(out).relu()
    out = F.conv2d(out, block.conv2.weight, padding=2, dilation=2)
    shortcut = F.conv2d(h, block.downsample[0].weight)
    return (block.bn2(out) + block.downsample[1](shortcut)).relu()


def naive_decode(model, x, queries, mask=None):
    """One image (3, H, W) and its queries (N, C): the output of each layer of the decoder."""
    cnn = model.backbone
    h = cnn.relu(cnn.bn1(cnn.conv1(x.unsqueeze(0))))
    h = naive_layer4(cnn.layer4[0], cnn.layer3(cnn.layer2(cnn.layer1(h))))[0]
    _, height, width = h.shape
    positions = up_detr.sine_positions(height, width, queries.shape[1]).double()
    cells = [h[:, y, x] for y in range(height) for x in range(width)]
    cells = (torch.stack(cells) - model.standardize.mean) / model.standardize.std
    memory = model.input_projection(cells)
    for attend, feed_forward in model.encoder:
        h = attend.norm(memory)
        memory = memory + naive_attention(attend.attention, h + positions, h + positions, h)
        memory = memory + feed_forward(memory)
    memory = model.encoder_norm(memory)
    output = torch.zeros_like(queries)
    outputs = []
    for attend, look, feed_forward in model.decoder:
        h = attend.norm(output)
        output = output + naive_attention(attend.attention, h + queries, h + queries, h, mask)
        q = look.norm(output) + queries
        output = output + naive_attention(look.attention, q, memory + positions, memory)
        output = output + feed_forward(output)
        outputs.append(model.decoder_norm(output))
    return outputs


def loss_of(model, output, image, labels, true):
    scores = model.class_head(output)
    boxes = model.box_head(output).sigmoid()
    query = up_detr.match(scores, boxes, image, labels, true)
    return query, naive_loss(scores, boxes, image, query, labels, true, model.none_weight)


def shaken(model):
    """All parameters away from their start, so that no bias is zero."""
    torch.manual_seed(3)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if not name.startswith("backbone."):
                p.add_(0.3 * torch.randn_like(p))
    return model


def test_detr_against_a_naive_version(double, small):
    model = shaken(up_detr.DETR(small(lr_backbone=0.1), 4))
    model.standardize.fit(torch.randn(100, 128) * 2 + 1)
    x = torch.randn(3, 3, 32, 32)
    image = torch.tensor([0, 0, 2, 2, 2])
    labels = torch.randint(4, (5,))
    true = random_boxes(5)
    loss, z = model(x, image, labels, true)
    by_image = [naive_decode(model, image, model.query_embedding) for image in x]
    expected = 0.0
    for layer in range(2):
        output = torch.stack([outputs[layer] for outputs in by_image])
        expected = expected + loss_of(model, output, image, labels, true)[1]
    assert abs(loss - expected) < 1e-6
    assert torch.allclose(z, output.flatten(0, 1))


def test_up_detr_against_a_naive_version(double, small):
    args = small(reconstruction=0.7)
    model = shaken(up_detr.UPDETR(args))
    model.standardize.fit(torch.randn(100, 128) * 2 + 1)
    model.standardize_patch.fit(torch.randn(100, 128) - 1)
    x = torch.randn(2, 3, 32, 32)
    patches = torch.randn(2, 3, 3, 16, 16)
    boxes = random_boxes(2, 3)
    given = torch.rand(2, 6) < 0.7
    order = torch.tensor([3, 1, 0, 5, 2, 4])
    loss, z = model(x, patches, boxes, given, order)

    features = torch.zeros(2, 3, 128)
    by_image = []
    for i in range(2):
        queries = []
        for n in range(6):
            patch = patches[i, n // 2].unsqueeze(0)
            h = up_detr.feature_map(model.backbone, patch)[0].mean((1, 2))
            h = (h - model.standardize_patch.mean) / model.standardize_patch.std
            features[i, n // 2] = h
            query = model.patch_to_query(h) if given[i, n] else torch.zeros(16)
            queries.append(query + model.query_embedding[order[n]])
        by_image.append(naive_decode(model, x[i], torch.stack(queries), model.mask))
    image = torch.tensor([0, 0, 0, 1, 1, 1])
    labels = torch.zeros(6, dtype=torch.long)
    expected = 0.0
    for layer in range(2):
        output = torch.stack([outputs[layer] for outputs in by_image])
        query, layer_loss = loss_of(model, output, image, labels, boxes.flatten(0, 1))
        expected = expected + layer_loss
        for t in range(6):  # the feature of the matched patch, not of the query's own
            guess = model.feature_head(output[image[t], query[t]])
            true = features[image[t], t % 3]
            distance = (guess / guess.norm() - true / true.norm()).square().sum()
            expected = expected + 0.7 * distance / 6
    assert abs(loss - expected) < 1e-6
    loss.backward()
    for name, p in model.named_parameters():
        assert (p.grad is None) == name.startswith("backbone."), name


def test_a_group_knows_nothing_of_the_other_patches(small):
    model = shaken(up_detr.UPDETR(small())).eval()
    x = torch.randn(2, 3, 32, 32)
    features = torch.randn(2, 3, 128)
    before = model.search(x, features)[-1]
    features[:, 1] += 1
    after = model.search(x, features)[-1]
    assert torch.equal(before[:, :2], after[:, :2]) and torch.equal(before[:, 4:], after[:, 4:])
    assert not torch.isclose(before[:, 2:4], after[:, 2:4]).all(2).any()
    fewer = model.search(x, features[:, :2])[-1]
    assert torch.allclose(fewer, after[:, :4], atol=1e-5)


def test_the_standardised_features_have_mean_0_and_std_1(small, drawn):
    args = small(query_patches=3)
    model = up_detr.UPDETR(args)
    up_detr.fit_standardization(model, drawn.images, args)
    (images,) = scenes.read(drawn.images, torch.arange(48).view(1, -1), 32)
    x = up_detr.build_views(args)[0].plain(images)
    h = up_detr.feature_map(model.backbone, x).flatten(2).transpose(1, 2)
    h = model.standardize(h).flatten(0, 1)
    assert h.mean(0).abs().max() < 1e-4
    assert ((h.std(0) - 1).abs() < 1e-2).float().mean() > 0.9  # the others are constant


def test_standardize():
    torch.manual_seed(0)
    x = 3 * torch.randn(5, 7, 4) + torch.tensor([0.0, 10.0, -5.0, 2.0])
    x[:, :, 3] = 2.0  # a dead channel
    module = up_detr.Standardize(4)
    assert torch.equal(module(x), x)
    module.fit(x)
    rows = x.view(35, 4)
    expected = (rows - rows.mean(0)) / (rows.var(0).sqrt() + 1e-6)
    assert torch.allclose(module(x).view(35, 4), expected, atol=1e-5)
    assert not module(x)[:, :, 3].any()
    assert module.state_dict().keys() == {"mean", "std"}  # kept with the weights


# ------------------------------------------------------------------------------------- backbone
@pytest.mark.parametrize("arch", ["thin", "resnet18", "resnet50"])
def test_dilation_gives_the_same_features_and_more_between_them(double, arch):
    torch.manual_seed(0)
    layer = common.resnet(arch, 64).layer4.eval()
    dilated = copy.deepcopy(layer)
    up_detr.dilate(dilated)
    h = torch.rand(1, layer[0].conv1.in_channels, 6, 6)
    few = layer(h)
    many = dilated(h)
    assert few.shape[2:] == (3, 3) and many.shape[2:] == (6, 6)
    assert torch.allclose(many[:, :, ::2, ::2], few)


def test_dilation_is_that_of_torchvision(double):
    torch.manual_seed(0)
    ours = common.resnet("resnet50", 128).layer4.eval()
    up_detr.dilate(ours)
    dilation = [False, False, True]
    theirs = torchvision.models.resnet50(replace_stride_with_dilation=dilation).layer4.eval()
    theirs.load_state_dict(ours.state_dict())
    h = torch.rand(1, 1024, 6, 6)
    assert torch.allclose(ours(h), theirs(h))


# ------------------------------------------------------------------------------------ optimizer
def test_learning_rate():
    args = argparse.Namespace(warmup_epochs=2.0, epochs=12)
    places = [0, 0.5, 1.5, 2, 7.99, 8, 11.9]
    shares = [up_detr.learning_rate(args, place) for place in places]
    assert shares == [0, 0.25, 0.75, 1, 1, 0.1, 0.1]
    args.warmup_epochs = 0.0
    assert up_detr.learning_rate(args, 0) == 1


def names_of(model, group):
    members = set(group["params"])
    return {name for name, p in model.named_parameters() if p in members}


def test_a_frozen_cnn_is_in_no_group(small):
    args = small(lr=0.3, weight_decay=0.02)
    model = up_detr.UPDETR(args)
    optimizer = up_detr.build_optimizer(args, model)
    (group,) = optimizer.param_groups
    names = {name for name, _ in model.named_parameters()}
    assert names_of(model, group) == {x for x in names if not x.startswith("backbone.")}
    assert group["peak"] == 0.3 and group["weight_decay"] == 0.02
    assert type(optimizer) is torch.optim.AdamW
    assert not any(p.requires_grad for p in model.backbone.parameters())


def test_the_cnn_is_trained_from_layer2_on_at_its_own_rate(small):
    args = small(lr=0.3, lr_backbone=0.07)
    model = up_detr.DETR(args, 4)
    rest, cnn = up_detr.build_optimizer(args, model).param_groups
    names = {name for name, _ in model.named_parameters()}
    later = ("backbone.layer2.", "backbone.layer3.", "backbone.layer4.")
    assert names_of(model, cnn) == {x for x in names if x.startswith(later)}
    assert names_of(model, rest) == {x for x in names if not x.startswith("backbone.")}
    assert rest["peak"] == 0.3 and cnn["peak"] == 0.07
    assert cnn["weight_decay"] == rest["weight_decay"] == 1e-4


# -------------------------------------------------------------------------------------- chance
def test_the_loss_of_chance_is_the_best_that_constant_predictions_get(double):
    _, _, image, _, true = a_case()
    labels = torch.tensor([3, 1, 3, 0, 3])
    args = argparse.Namespace(queries=6, decoder_layers=4)
    chance = up_detr.chance_loss(labels, true, 3, 0.1, args)
    weights = [(labels == label).sum().item() for label in range(4)] + [0.1 * (18 - 5)]
    frequency = torch.tensor(weights) / sum(weights)
    assert (frequency == 0).any()  # a class without an object
    scores = (frequency + 1e-9).log().requires_grad_()
    box = true.mean(0).expand(3, 6, 4)
    query = torch.tensor([0, 4, 1, 2, 5])
    loss = naive_loss(scores.expand(3, 6, 5), box, image, query, labels, true, 0.1)
    assert abs(4 * loss - chance) < 1e-6
    loss.backward()
    assert scores.grad.abs().max() < 1e-6


def test_the_chance_of_pre_training_is_that_of_a_simulation(small, monkeypatch):
    args = small(reconstruction=0.7)
    model = up_detr.UPDETR(args)
    drawn = up_detr.draw_patches(500, args, common.make_generator("other"))
    boxes = up_detr.to_centre(drawn, args)
    image = torch.arange(500).repeat_interleave(3)
    query = torch.tensor([0, 2, 4]).repeat(500)
    labels = torch.zeros(1500, dtype=torch.long)
    scores = torch.zeros(500, 6, 2)
    scores[:, :, 0] = 3.0
    scores[:, :, 1] = 3.0 * 0.5  # M / N
    found = boxes.mean((0, 1)).expand(500, 6, 4)
    target = (image, query, labels, boxes.flatten(0, 1))
    loss = up_detr.set_loss(scores.log(), found, target, 0.5)
    expected = 2 * (loss + 0.7 * 2)  # L layers; random directions are at a distance of 2
    assert abs(model.chance_loss / expected - 1) < 0.01


# -------------------------------------------------------------------------------------- patches
def test_patches_are_cut_where_their_boxes_say(small, monkeypatch, drawn):
    args = small()
    plain = common.Augment(16, flip=0.0)
    monkeypatch.setattr(up_detr, "build_views", lambda args: [common.Augment(32, flip=0.0), plain])
    (images,) = scenes.read(drawn.images, torch.arange(8).view(1, -1), 32)
    x, patches, boxes, given, order = up_detr.cut_patches(images, args, common.make_generator(1))
    assert x.shape == (8, 3, 32, 32) and patches.shape == (8, 3, 3, 16, 16)
    assert 0.5 < given.float().mean() < 0.9
    assert sorted(order.tolist()) == list(range(6)) != order.tolist()
    for i, m in itertools.product(range(8), range(3)):
        x1, y1, x2, y2 = (round(32 * side) for side in corners(boxes[i, m]))
        assert 0 <= x1 < x2 <= 32 and 4 <= x2 - x1 <= 28 and 4 <= y2 - y1 <= 28
        cut = images[i, :, y1:y2, x1:x2].float() / 255
        cut = TF.resize(cut, [16, 16], antialias=True)
        assert torch.allclose(patches[i, m], plain.normalize(cut.unsqueeze(0))[0], atol=1e-4)


def test_patches_of_another_image_keep_their_boxes(small, drawn):
    (images,) = scenes.read(drawn.images, torch.arange(8).view(1, -1), 32)
    own = up_detr.cut_patches(images, small(), common.make_generator(1))
    other = up_detr.cut_patches(images, small(other_patches=1), common.make_generator(1))
    assert torch.equal(own[2], other[2])
    assert not torch.isclose(own[1], other[1]).flatten(2).all(2).any()


def test_two_processes_make_the_patches_of_one(small, monkeypatch, drawn):
    args = small()
    (images,) = scenes.read(drawn.images, torch.arange(8).view(1, -1), 32)
    whole = up_detr.cut_patches(images, args, common.make_generator(1))
    parts = []
    monkeypatch.setattr(up_detr, "world_size", lambda: 2)
    for number in (0, 1):
        monkeypatch.setattr(up_detr, "rank", lambda number=number: number)
        mine = images.chunk(2)[number]
        parts.append(up_detr.cut_patches(mine, args, common.make_generator(1)))
    for position in range(4):
        both = torch.cat([part[position] for part in parts])
        assert torch.allclose(whole[position].float(), both.float(), atol=1e-5)
    assert torch.equal(whole[4], parts[0][4]) and torch.equal(whole[4], parts[1][4])


# ------------------------------------------------------------------------------------ detections
def predicting(model, scores, boxes):
    """The model, whose predictions are these whatever it sees, and the outputs they were of."""
    seen = []

    def predict(output):
        seen.append(output)
        return scores, boxes

    model.predict = predict
    return seen


def test_find_objects(small, drawn):
    args = small(queries=3, query_patches=3, dropout=0.5)
    model = shaken(up_detr.DETR(args, 3))
    chances = torch.tensor([[0.1, 0.1, 0.2, 0.6], [0.7, 0.1, 0.1, 0.1], [0.1, 0.3, 0.1, 0.5]])
    boxes = torch.tensor([[0.1, 0.5, 0.6, 0.2], [0.5, 0.9, 0.2, 0.4], [0.5, 0.5, 1.2, 0.5]])
    scores = torch.stack([chances, chances.flip(0)]).log()
    seen = predicting(model, scores, torch.stack([boxes, boxes.flip(0)]))
    (images,) = scenes.read(drawn.images, torch.arange(2).view(1, -1), 32)
    first, second = up_detr.find_objects(model, images, args)
    corner = torch.tensor([[0, 0.4, 0.4, 0.6], [0.4, 0.7, 0.6, 1], [0, 0.25, 1, 0.75]])
    for found, order in ((first, [0, 1, 2]), (second, [2, 1, 0])):
        assert torch.allclose(found[0], corner[order])
        assert torch.allclose(found[1], torch.tensor([0.2, 0.7, 0.3])[order])
        assert torch.equal(found[2], torch.tensor([2, 0, 1])[order])
    assert model.training
    model.eval()  # as it was when asked: no dropout
    x = up_detr.build_views(args)[0].plain(images)
    queries = model.query_embedding.expand(2, -1, -1)
    (output,) = seen
    assert torch.equal(output, model.decode(x, queries)[-1])


def test_a_patch_is_where_the_best_query_of_its_group_says(small):
    args = small(dropout=0.5)
    model = shaken(up_detr.UPDETR(args))
    chance = torch.tensor([[0.2, 0.3, 0.9, 0.8, 0.1, 0.4], [0.6, 0.5, 0.1, 0.2, 0.9, 0.8]])
    scores = torch.stack([chance.log(), (1 - chance).log()], dim=2)
    scores[0, 0] += 10.0  # of both classes: no more likely
    boxes = random_boxes(2, 6)
    seen = predicting(model, scores, boxes)
    x = torch.randn(2, 3, 32, 32)
    patches = torch.randn(2, 3, 3, 16, 16)
    found = up_detr.search_patches(model, x, patches)
    assert torch.equal(found[0], boxes[0, [1, 2, 5]])
    assert torch.equal(found[1], boxes[1, [0, 3, 4]])
    assert model.training
    model.eval()
    (output,) = seen
    assert torch.equal(output, model.search(x, model.patch_features(patches))[-1])


def test_attention_of_the_surest_query(small):
    model = shaken(up_detr.DETR(small(), 4)).eval()
    x = torch.randn(1, 3, 32, 64)
    look = model.decoder[-1][1].attention
    inputs = []
    hook = look.register_forward_pre_hook(lambda module, given: inputs.append(given))
    model.decode(x, model.query_embedding.unsqueeze(0))
    hook.remove()
    q, k, _ = (part[0] for part in inputs[0])
    wq, wk, _ = look.in_proj_weight.chunk(3)
    bq, bk, _ = look.in_proj_bias.chunk(3)
    q = (q @ wq.T + bq).view(6, 2, 8)
    k = (k @ wk.T + bk).view(-1, 2, 8)
    logits = torch.einsum("qhc,shc->hqs", q, k) / math.sqrt(8)
    expected = logits.softmax(2).mean(0)  # over the heads
    for surest in (1, 4):
        scores = torch.zeros(1, 6, 5)
        scores[0, surest, 2] = 1.0  # an object, the others less so
        scores[0, 3, 4] = 5.0  # nothing, and very sure of it
        predicting(model, scores, None)
        weights = up_detr.attention_of(model, x)
        assert weights.shape == (4, 8)  # height and width of the CNN's map
        assert abs(weights.sum() - 1) < 1e-5
        assert torch.allclose(weights.flatten(), expected[surest], atol=1e-5)


# --------------------------------------------------------------------------------------- parity
def one_step(cnn, kind, rank=0, world_size=1, mistake=False):
    """Loss and gradients of one step on this process's share of a fixed batch. The two halves of
    the batch have different numbers of boxes."""
    args = parse(cnn, lr_backbone=0.0 if kind == "pre-training" else 0.1)
    torch.manual_seed(0)
    if kind == "pre-training":
        model = shaken(up_detr.UPDETR(args).double())
        inputs = [torch.randn(8, 3, 32, 32), torch.randn(8, 3, 3, 16, 16), random_boxes(8, 3)]
        inputs.append(torch.rand(8, 6) < 0.7)
        inputs = [x.chunk(world_size)[rank] for x in inputs]
        inputs.append(torch.arange(6))
    else:
        model = shaken(up_detr.DETR(args, 4).double())
        x = torch.randn(8, 3, 32, 32)
        image = torch.tensor([0, 0, 0, 1, 1, 2, 3, 3, 5, 7])
        labels = torch.randint(4, (10,))
        true = random_boxes(10)
        n = 8 // world_size
        mine = image // n == rank
        x = x.chunk(world_size)[rank]
        inputs = [x, image[mine] - rank * n, labels[mine], true[mine]]
    if mistake:
        up_detr.mean_over_processes = lambda x: x
    network = nn.parallel.DistributedDataParallel(model) if world_size > 1 else model
    loss, _ = network(*inputs)
    loss.backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    loss = loss.detach()
    if world_size > 1:
        dist.all_reduce(loss)
    return {"loss": loss / world_size, **found}


def work(rank, world_size, folder, cnn):
    torch.set_num_threads(1)
    torch.Tensor.float = torch.Tensor.double
    torch.set_default_dtype(torch.float64)
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", store, rank=rank, world_size=world_size)
    right = up_detr.mean_over_processes
    for mistake in (False, True):
        for kind in ("pre-training", "fine-tuning"):
            found = one_step(cnn, kind, rank, world_size, mistake)
            torch.save(found, f"{folder}/{kind}-{mistake}-{rank}.pt")
        up_detr.mean_over_processes = right
    dist.destroy_process_group()


def difference(one, many):
    assert one.keys() == many.keys() and len(one) > 10
    return max(((one[key] - many[key]).norm() / (one[key].norm() + 1e-4)).item() for key in one)


@pytest.mark.parametrize("world_size", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_the_step_of_many_processes_is_that_of_one(double, cnn, tmp_path, world_size):
    mp.spawn(work, (world_size, str(tmp_path), str(cnn)), nprocs=world_size)
    for kind in ("pre-training", "fine-tuning"):
        one = one_step(cnn, kind)
        for rank in range(world_size):
            many = torch.load(tmp_path / f"{kind}-False-{rank}.pt", weights_only=True)
            assert difference(one, many) < 1e-9, kind
    wrong = torch.load(tmp_path / "fine-tuning-True-0.pt", weights_only=True)
    assert difference(one, wrong) > 1e-3  # the counts of one process only


# --------------------------------------------------------------------------- runs, and bad input
def test_a_run_leaves_its_files(small, tmp_path):
    result = up_detr.main(small())
    assert {"ap50", "ap", "scratch_ap50", "scratch_ap", "pretext_iou"} <= result.keys()
    assert json.loads((tmp_path / "run" / "result.json").read_text()) == result
    for name in ("report.png", "backbone.pt", "pretrained/log.jsonl", "scratch/log.jsonl"):
        assert (tmp_path / "run" / name).exists()
    first = log_of(tmp_path / "run")[0]
    assert 0 < first["pretext_constant_iou"] < 1
    before = torch.load(small().backbone, weights_only=True)
    after = torch.load(tmp_path / "run" / "backbone.pt", weights_only=True)
    assert all(torch.equal(before[name], after[name]) for name in after)  # frozen


@pytest.mark.parametrize("call", [1, 2, 3, 6])
def test_a_resumed_run_is_the_uninterrupted_one(small, tmp_path, call):
    """Stopped after an epoch of pre-training, of fine-tuning, and of training from scratch."""
    whole = up_detr.main(small(out=tmp_path / "whole"))
    interrupt(up_detr, small(), "after_epoch", call)
    resumed = up_detr.main(small())
    assert whole.keys() == resumed.keys()
    for name in whole:
        assert "second" in name or whole[name] == resumed[name], name
    for part in ("", "pretrained", "scratch"):
        a = tmp_path / "whole" / part
        b = tmp_path / "run" / part
        assert log_of(a) == log_of(b)
        assert same_state(checkpoint_of(a), checkpoint_of(b))


def test_a_new_pre_training_does_not_continue_an_old_fine_tuning(small, tmp_path):
    interrupt(up_detr, small(), "after_epoch", 3)
    up_detr.main(small(seed=1, overwrite=True))
    up_detr.main(small(seed=1, out=tmp_path / "fresh"))
    assert log_of(tmp_path / "run" / "pretrained") == log_of(tmp_path / "fresh" / "pretrained")


def test_own_boxes_and_pictures(small, tmp_path, drawn, capsys, monkeypatch):
    up_detr.main(small())
    monkeypatch.undo()
    folder = write_coco(tmp_path / "mine", drawn.part(list(range(8))))
    write_coco(folder, drawn.part(list(range(8, 12))), "val")
    run = up_detr.main(small(finetune=folder))
    assert "ap50" in run.log[-1] and len(run.views) == 2
    picture = folder / "val" / "000.png"
    up_detr.main(small(finetune=folder, detect=picture))
    assert (tmp_path / "run" / "finetuned-mine" / "detected.png").exists()
    up_detr.main(small(detect=picture))
    assert "detected.png" in capsys.readouterr().out


def test_bad_input(small, tmp_path, drawn, capsys):
    def said(**flags):
        return error_line(capsys, up_detr.main, small(**flags))

    assert "swav.py" in said(backbone=tmp_path / "none.pt")
    broken = tmp_path / "broken.pt"
    torch.save({"conv1.weight": torch.zeros(3)}, broken)
    assert "not the weights of a thin" in said(backbone=broken)
    deeper = torch.load(small().backbone, weights_only=True)
    deeper["layer4.1.conv1.weight"] = torch.zeros(128, 128, 3, 3)
    torch.save(deeper, broken)
    assert "not the weights of a thin" in said(backbone=broken)
    assert "--query-patches 4" in said(query_patches=4)
    assert "has 3 objects" in said(queries=2, query_patches=2)
    assert "batch of 99" in said(batch_size=99)
    assert "none.png" in said(detect=tmp_path / "none.png")


@pytest.mark.parametrize("method", ["barlow", "byol", "moco_v2"])
def test_the_cnn_of_a_finished_network(method, monkeypatch):
    """As results/weights/ keeps it, and not its moving average."""
    path = ROOT / "results" / "weights" / f"{method}.pt"
    args = up_detr.parse_args(["--backbone", str(path)])
    backbone = up_detr.build_backbone(args)
    saved = torch.load(path, weights_only=True)["model"]
    (name,) = [key for key in saved if key.endswith("backbone.layer4.0.conv1.weight")]
    assert torch.equal(backbone.layer4[0].conv1.weight, saved[name].float())


def test_broken_checkpoints_are_one_line(small, tmp_path, capsys):
    broken = tmp_path / "broken.pt"
    broken.write_bytes(b"no checkpoint")
    assert "not a readable checkpoint" in error_line(capsys, up_detr.main, small(backbone=broken))
    picture = tmp_path / "picture.png"
    TF.to_pil_image(torch.zeros(3, 8, 8)).save(picture)
    kept = tmp_path / "run" / "pretrained" / "checkpoint.pt"
    assert f"{kept}: no such file" in error_line(capsys, up_detr.main, small(detect=picture))
    kept.parent.mkdir(parents=True)
    kept.write_bytes(b"no checkpoint")
    said = error_line(capsys, up_detr.main, small(detect=picture))
    assert said.startswith(f"error: {kept} is not a readable checkpoint")


def test_weights_of_other_settings_are_one_line(small, capsys):
    state = up_detr.DETR(small(), 4).state_dict()
    args = small()
    same = up_detr.DETR(args, 4)
    up_detr.load_weights(same, state, args)
    assert torch.equal(same.query_embedding, state["query_embedding"])
    for flags in ({"width": 32}, {"decoder_layers": 3}):
        model = up_detr.DETR(small(**flags), 4)
        said = error_line(capsys, up_detr.load_weights, model, state, args)
        assert said.startswith(f"error: {args.out}: was trained with other settings")


def test_what_was_fine_tuned_is_checked(small, tmp_path, drawn, capsys, monkeypatch):
    """A model of more layers, a file that is no run's, names that are lost, no box at all."""
    up_detr.main(small())
    picture = tmp_path / "picture.png"
    TF.to_pil_image(torch.zeros(3, 8, 8)).save(picture)
    tuned = tmp_path / "run" / "pretrained"
    (tuned / "classes.json").unlink()
    said = error_line(capsys, up_detr.main, small(detect=picture))
    assert "classes.json: missing or damaged" in said
    torch.save({"conv1.weight": torch.zeros(1)}, tuned / "checkpoint.pt")
    said = error_line(capsys, up_detr.main, small(detect=picture))
    assert said.startswith(f"error: {tuned / 'checkpoint.pt'}: not the checkpoint of a run")
    monkeypatch.undo()
    folder = write_coco(tmp_path / "mine", drawn.part(list(range(4))))
    write_coco(folder, drawn.part(list(range(4, 6))), "val")
    said = error_line(capsys, up_detr.main, small(finetune=folder, decoder_layers=3))
    assert "other settings" in said
    said = error_line(capsys, up_detr.main, small(finetune=folder, decoder_layers=1))
    assert "other settings" in said
    empty = drawn.part([0, 1])
    empty.boxes = [torch.zeros(0, 4)] * 2
    data = scenes.SceneData("scenes", drawn.images, empty, None, common.PATTERNS)
    assert "has a box" in error_line(capsys, up_detr.check_queries, small(), data)


def test_a_report_of_few_pictures(small, tmp_path, drawn, monkeypatch):
    few = drawn.part([0, 1])
    data = scenes.SceneData("scenes", drawn.images[:16], few, few, common.PATTERNS)
    monkeypatch.setattr(scenes, "load_scenes", lambda *_: data)
    up_detr.main(small(tune_batch_size=2))
    assert (tmp_path / "run" / "report.png").exists()


def test_fine_tuning_on_pictures_without_boxes_is_one_line(small, photos, monkeypatch, capsys):
    monkeypatch.undo()
    said = error_line(capsys, up_detr.main, small(finetune=photos))
    assert f"--finetune {photos}: has no boxes" in said


def test_the_folder_of_own_boxes_is_named_after_them(monkeypatch, tmp_path):
    args = argparse.Namespace(finetune="/data/mine/")
    assert up_detr.own_name(args) == "finetuned-mine"
    (tmp_path / "birds").mkdir()
    monkeypatch.chdir(tmp_path / "birds")
    args.finetune = "."
    assert up_detr.own_name(args) == "finetuned-birds"


def test_the_backbone_that_is_missing(monkeypatch, tmp_path, capsys):
    ran = []
    done = types.SimpleNamespace(returncode=0)

    def start(command):
        ran.append([str(word) for word in command])
        return done

    def find(path):
        up_detr.find_backbone(argparse.Namespace(backbone=path))

    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setattr(up_detr.subprocess, "run", start)
    default = up_detr.SETTINGS["backbone"][0]
    assert "--backbone: which weights" in error_line(capsys, find, "")
    assert "--backbone mine.pt: no such file" in error_line(capsys, find, "mine.pt")
    with monkeypatch.context() as patch:
        patch.setenv("RANK", "0")  # as under torchrun
        assert f"--backbone {default}: no such file" in error_line(capsys, find, default)
    assert ran == []
    find(default)
    ((_, script, *flags),) = ran
    assert script.endswith("swav.py") and flags == ["--out", "runs/swav-patterns"]
    done.returncode = 1
    assert "swav.py did not finish" in error_line(capsys, find, default)
    ran.clear()
    (tmp_path / "mine.pt").touch()
    find("mine.pt")
    assert ran == []


def test_precision():
    log = [{"epoch": 0, "ap50": 1.0, "ap": 0.5}]
    for epoch in range(1, 7):
        log.append({"epoch": epoch, "seconds": 2.0 + epoch})
    log[-1] |= {"ap50": 40.0, "ap": 20.0}
    run = types.SimpleNamespace(log=log)
    seconds = 3 + 4 + 5 + 6 + 7 + 8
    expected = {"ap50": 40.0, "ap": 20.0, "tune_seconds": seconds}
    assert up_detr.precision(run, "") == expected
    log[3] |= {"ap50": 25.0, "ap": 9.0}  # half is not a third
    assert up_detr.precision(run, "") == expected
    log[2] |= {"ap50": 30.0, "ap": 10.0}
    expected["third_ap50"] = 30.0
    found = up_detr.precision(run, "scratch_")
    assert found == {"scratch_" + name: x for name, x in expected.items()}


def test_what_fine_tuning_takes_over(small, monkeypatch):
    """All that detection needs from the pre-training; from scratch, the CNN as it was before."""
    before = []
    after = []
    fit = up_detr.fit

    def record(args, model, *rest):
        before.append(copy.deepcopy(model.state_dict()))
        run = fit(args, model, *rest)
        after.append(copy.deepcopy(model.state_dict()))
        return run

    monkeypatch.setattr(up_detr, "fit", record)
    # With a CNN that changes, its weights tell which of the two were taken.
    args = small(epochs=1, tune_epochs=1, scratch_epochs=1, warmup_epochs=0.0, lr_backbone=1e-3)
    up_detr.main(args)
    start, tuned, scratch = before
    trained = after[0]
    torch.manual_seed(args.seed)
    fresh = up_detr.DETR(args, 10).state_dict()
    assert fresh.keys() == tuned.keys() == scratch.keys()
    assert not torch.equal(start["standardize.mean"], fresh["standardize.mean"])
    changed = {name for name in start if not torch.equal(start[name], trained[name])}
    assert {"backbone.layer2.0.conv1.weight", "query_embedding"} < changed
    for name in fresh:
        source = fresh if name.startswith("class_head.") else trained
        assert torch.equal(tuned[name], source[name]), name
        source = start if name.startswith(("backbone.", "standardize.")) else fresh
        assert torch.equal(scratch[name], source[name]), name


# ----------------------------------------------------------------------------- recipes
PAPER = {
    # The ResNet-50 of SwAV, whose weights the user names. No picture has one size in the paper:
    # short sides of 320 to 480 pixels in the official code, of which this is the largest.
    "backbone": "",
    "arch": "resnet50",
    "size": 480,
    "dilation": 0,
    # The official code: sides from 8 pixels to all but 8, resized to 128; SimCLR's colours.
    "patch_size": 128,
    "patch_min": 8,
    "patch_max": 0,
    "jitter": 1.0,
    # DETR's transformer: six layers each, width 256, 8 heads, dropout .1.
    "width": 256,
    "heads": 8,
    "encoder_layers": 6,
    "decoder_layers": 6,
    "ffn_dim": 2048,
    "dropout": 0.1,
    # 100 queries, 10 patches, 10 % of the queries masked; equation 2.
    "queries": 100,
    "query_patches": 10,
    "query_mask": 0.1,
    "query_shuffle": 0,
    "reconstruction": 1.0,
    "other_patches": 0,
    # 60 epochs of 256, AdamW, the CNN frozen; DETR clips the norm at .1.
    "unlabelled": 0,
    "epochs": 60,
    "batch_size": 256,
    "lr": 1e-4,
    "lr_backbone": 0.0,
    "warmup_epochs": 0.0,
    "weight_decay": 1e-4,
    "clip": 0.1,
    # Fine-tuning: 150 epochs, the CNN at half the transformer's rate; 8 GPUs of two pictures.
    "labelled": 0,
    "tune_epochs": 150,
    "tune_batch_size": 16,
    "tune_lr": 1e-4,
    "tune_lr_backbone": 5e-5,
    "scratch_lr": 1e-4,
    "scratch_epochs": 150,
}
COCO = PAPER | {  # one GPU in a day or two
    "size": 512,
    "patch_min": 64,
    "epochs": 30,
    "batch_size": 32,
    "tune_epochs": 50,
    "scratch_epochs": 50,
}


@pytest.mark.parametrize("recipe, expected", [("paper", PAPER), ("coco", COCO)])
def test_recipes(recipe, expected):
    column = up_detr.SETTINGS["recipe"].index(recipe)
    found = {name: row[column] for name, row in up_detr.SETTINGS.items()}
    del found["recipe"], found["eval_every"]
    assert found == expected
    assert vars(up_detr.parse_args(["--recipe", recipe])).items() >= expected.items()


def test_the_schedule_of_the_paper():
    """A tenth from the fortieth of sixty epochs on, as the hundredth of 150 of fine-tuning."""
    args = up_detr.parse_args(["--recipe", "paper"])
    assert [up_detr.learning_rate(args, epoch) for epoch in (0, 39, 40, 59)] == [1, 1, 0.1, 0.1]
    args.epochs = args.tune_epochs
    assert [up_detr.learning_rate(args, epoch) for epoch in (99, 100)] == [1, 0.1]
