"""Losses and parts of the methods against naive versions, in float64.

Each method as a whole, and what a step of its training does, is in test_forward.py."""

import copy
import math
from collections import deque

import pytest
import torch
import torch.nn.functional as F
from conftest import small_args
from torch import nn

import barlow
import byol
import densecl
import moco_v1
import moco_v2
import moco_v3
import simclr
import simsiam
import swav
from results.methods import build_optimizer, model_class, views_of

MOCO = [moco_v1, moco_v2, densecl]  # queue, shuffle and grouped batch normalisation
FROZEN = {  # the first words of the names of what is never trained
    "simclr": ("projector.4.bias",),
    "moco_v1": ("encoder_k",),
    "moco_v2": ("encoder_k",),
    "moco_v3": (
        "encoder_k",
        "encoder_q.backbone.conv_proj",
        "encoder_q.backbone.encoder.pos_embedding",
    ),
    "byol": ("target_encoder",),
    "densecl": ("encoder_k",),
}


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def unit(*shape):
    return F.normalize(torch.randn(*shape, dtype=torch.float64), dim=-1)


def naive_cross_entropy(scores, label, temperature):
    """Minus the logarithm of the share of one score among the scores."""
    powers = [math.exp(score.item() / temperature) for score in scores]
    return -math.log(powers[label] / sum(powers))


# -------------------------------------------------------------------------------------- losses
@pytest.mark.parametrize("temperature", [0.07, 0.5])
def test_nt_xent(temperature):
    z = unit(10, 8)
    total = 0.0
    for i in range(10):
        others = [j for j in range(10) if j != i]
        partner = others.index((i + 5) % 10)
        total += naive_cross_entropy([z[i] @ z[j] for j in others], partner, temperature)
    loss = simclr.nt_xent(z[:5], z[5:], temperature)
    assert loss.item() == pytest.approx(total / 10, rel=1e-12)


@pytest.mark.parametrize("module", MOCO)
def test_info_nce(module):
    q = unit(4, 8)
    k = unit(4, 8)
    queue = unit(6, 8)
    total = 0.0
    for i in range(4):
        total += naive_cross_entropy([q[i] @ key for key in (k[i], *queue)], 0, 0.07)
    assert module.info_nce(q, k, queue, 0.07).item() == pytest.approx(total / 4, rel=1e-12)


def test_dense_info_nce():
    q = unit(2, 4, 8)
    k = unit(2, 4, 8)
    queue = unit(6, 8)
    total = 0.0
    for b in range(2):
        for s in range(4):
            total += naive_cross_entropy([q[b, s] @ key for key in (k[b, s], *queue)], 0, 0.2)
    loss = densecl.dense_info_nce(q, k, queue, 0.2)
    assert loss.item() == pytest.approx(total / 8, rel=1e-12)


def test_contrastive_loss():
    q = unit(5, 8)
    k = unit(5, 8)
    total = 0.0
    for i in range(5):
        total += 2 * 0.3 * naive_cross_entropy([q[i] @ key for key in k], i, 0.3)
    loss = moco_v3.contrastive_loss(q, k, 0.3)
    assert loss.item() == pytest.approx(total / 5, rel=1e-12)


def test_regression_loss_is_the_squared_distance_of_unit_vectors():
    p = unit(5, 8)
    z = unit(5, 8)
    total = (p - z).square().sum().item()
    assert byol.regression_loss(3 * p, 7 * z).item() == pytest.approx(total / 5, rel=1e-12)


def test_negative_cosine_stops_the_gradient_of_z():
    p = (3 * unit(5, 8)).requires_grad_()
    z = (7 * unit(5, 8)).requires_grad_()
    expected = -sum((p[i] @ z[i] / p[i].norm() / z[i].norm()).item() for i in range(5)) / 5
    loss = simsiam.negative_cosine(p, z)
    assert loss.item() == pytest.approx(expected, rel=1e-12)
    loss.backward()
    assert z.grad is None
    assert p.grad.abs().sum() > 0


def test_barlow_loss(monkeypatch):
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    z1 = torch.randn(6, 4).double()
    z2 = torch.randn(6, 4).double()
    total = 0.0
    for i in range(4):
        for j in range(4):
            c = sum((z1[b, i] * z2[b, j]).item() for b in range(6)) / 6
            total += (1 - c) ** 2 if i == j else 0.01 * c**2
    assert barlow.barlow_loss(z1, z2, 0.01).item() == pytest.approx(total, rel=1e-12)
    bn = nn.BatchNorm1d(4, affine=False, eps=1e-12).double()
    assert barlow.barlow_loss(bn(z1), bn(z1), 0.0).item() == pytest.approx(0, abs=1e-9)


def test_swapped_prediction():
    scores = unit(5, 7)
    codes = torch.rand(5, 7).double().softmax(dim=1)
    total = 0.0
    for b in range(5):
        for p in range(7):
            total += codes[b, p].item() * naive_cross_entropy(scores[b], p, 0.1)
    loss = swav.swapped_prediction(scores, codes, 0.1)
    assert loss.item() == pytest.approx(total / 5, rel=1e-12)


def test_sinkhorn_has_the_marginals_and_is_the_optimum():
    scores = unit(12, 8) @ unit(6, 8).T
    ones = torch.ones(12).double()
    assert torch.allclose(swav.sinkhorn(scores, 0.05, 3).sum(dim=1), ones)  # one unit per image
    codes = swav.sinkhorn(scores, 0.05, 2000)
    assert torch.allclose(codes.sum(dim=1), ones)
    assert torch.allclose(codes.sum(dim=0), torch.full((6,), 2.0).double(), rtol=1e-6)
    # Of all matrices with these marginals it has the most of <codes, scores> + epsilon * entropy:
    # its logarithm is scores / epsilon plus one number per row and one per column.
    rest = codes.log() - scores / 0.05
    rest = rest - rest.mean(dim=0) - rest.mean(dim=1, keepdim=True) + rest.mean()
    assert rest.abs().max() < 1e-5


def test_sinkhorn_does_not_overflow():
    codes = swav.sinkhorn(torch.ones(4, 3), 0.001, 3)  # exp(1000) would be infinite
    assert torch.allclose(codes, torch.full((4, 3), 1 / 3))


def test_match_finds_the_most_similar_cell():
    h_q = torch.randn(3, 16, 5).double()
    h_k = torch.randn(3, 16, 5).double()
    cells = densecl.match(h_q, h_k)
    for b in range(3):
        for s in range(16):
            cosines = [F.cosine_similarity(h_q[b, s], cell, dim=0).item() for cell in h_k[b]]
            assert cells[b, s].item() == cosines.index(max(cosines))
    order = torch.randperm(16)
    assert torch.equal(densecl.match(h_q[:, order], h_q)[0], order)


# -------------------------------------------------------------------------------- chance losses
def chance_loss(module, **flags):
    return pytest.approx(model_class(module)(small_args(module, **flags)).chance_loss)


def test_chance_loss_of_equal_similarities():
    same = F.normalize(torch.ones(16, 8), dim=1)
    assert simclr.nt_xent(same, same, 0.1).item() == chance_loss(simclr)
    for module in MOCO:
        loss = module.info_nce(same, same, same[:1].expand(32, 8), 0.1)
        assert loss.item() == chance_loss(module)
    loss = 2 * moco_v3.contrastive_loss(same, same, 0.3)  # both directions
    assert loss.item() == chance_loss(moco_v3, temperature=0.3)
    codes = torch.rand(5, 12).softmax(dim=1)
    loss = swav.swapped_prediction(torch.zeros(5, 12), codes, 0.1)
    assert loss.item() == chance_loss(swav)


def test_chance_loss_of_orthogonal_outputs():
    z = torch.eye(8)
    others = z.roll(1, 0)
    assert 2 * byol.regression_loss(z, others).item() == chance_loss(byol)
    assert simsiam.negative_cosine(z, others).item() == chance_loss(simsiam)


def test_chance_loss_of_random_outputs():
    model = barlow.BarlowTwins(small_args(barlow, batch_size=512, projection_dim=64))
    z1 = model.bn(torch.randn(512, 64))
    z2 = model.bn(torch.randn(512, 64))
    loss = barlow.barlow_loss(z1, z2, model.redundancy_weight)
    assert loss.item() == pytest.approx(model.chance_loss, rel=0.02)


# --------------------------------------------------------------------- queues, averages, shuffle
@pytest.mark.parametrize("module", [*MOCO, swav])
@pytest.mark.parametrize("rows", [12, 10])  # a multiple of the batch, or not
def test_queue_is_a_deque(module, rows):
    queue = torch.zeros(rows, 3)
    pointer = torch.zeros((), dtype=torch.long)
    oracle = deque([torch.zeros(3)] * rows, maxlen=rows)
    for _ in range(10):
        keys = torch.randn(4, 3)
        module.enqueue(queue, pointer, keys)
        oracle.extend(keys)
        oldest_first = torch.cat([queue[pointer:], queue[:pointer]])
        assert torch.equal(oldest_first, torch.stack(list(oracle)))


def test_queues_start_with_random_unit_vectors():
    for module in MOCO:
        queues = dict(model_class(module)(small_args(module)).named_buffers())
        for name in ("queue", "dense_queue"):
            if name in queues:
                norms = queues[name].norm(dim=1)
                assert torch.allclose(norms, torch.ones(32))
                assert queues[name].mean().abs() < 0.01
                assert queues[f"{name}_ptr"].item() == 0
    assert not swav.SwAV(small_args(swav, queue_size=32)).queue.any()


@pytest.mark.parametrize("module", [*MOCO, moco_v3, byol])
def test_the_average_starts_as_a_copy(module):
    model = model_class(module)(small_args(module))
    if module is byol:
        pair = (model.encoder, model.target_encoder)
    else:
        pair = (model.encoder_q, model.encoder_k)
    for p, target_p in zip(pair[0].parameters(), pair[1].parameters()):
        assert torch.equal(p, target_p)
        assert p is not target_p


@pytest.mark.parametrize("module", [*MOCO, moco_v3, byol])
def test_ema_moves_the_parameters_and_leaves_the_statistics(module):
    source = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)).double()
    target = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)).double()
    source(unit(5, 3))
    before = copy.deepcopy(target)
    source_before = copy.deepcopy(source)
    module.ema_update(source, target, 0.9)
    for s, t, b in zip(source.parameters(), target.parameters(), before.parameters()):
        assert torch.allclose(t, 0.9 * b + 0.1 * s, rtol=1e-14)
    for t, b in zip(target.buffers(), before.buffers()):
        assert torch.equal(t, b)
    for s, b in zip(source.parameters(), source_before.parameters()):
        assert torch.equal(s, b)


@pytest.mark.parametrize("module", MOCO)
def test_shuffle_and_unshuffle_are_inverse(module):
    x = torch.arange(24.0).view(12, 2)
    shuffled, permutation = module.shuffle(x)
    assert not torch.equal(shuffled, x)
    assert torch.equal(shuffled[:, 0].sort().values, x[:, 0])
    assert torch.equal(module.unshuffle(shuffled, permutation), x)


@pytest.mark.parametrize("module", MOCO)
def test_grouped_batch_norm_is_one_batch_norm_per_group(module):
    x = torch.randn(12, 5, 4, 4, dtype=torch.float64)
    grouped = module.GroupedBatchNorm2d(5, groups=3).double()
    grouped.weight.data.uniform_(1, 2)
    grouped.bias.data.uniform_(1, 2)
    grouped.running_mean.uniform_(1, 2)
    grouped.running_var.uniform_(1, 2)
    plain = nn.BatchNorm2d(5).double()
    plain.load_state_dict(grouped.state_dict())
    alone = [copy.deepcopy(plain) for _ in range(3)]
    parts = [norm(part) for norm, part in zip(alone, x.chunk(3))]
    assert torch.equal(grouped(x), torch.cat(parts))
    for name in ("running_mean", "running_var"):  # one update, averaged over the groups
        expected = sum(getattr(norm, name) for norm in alone) / 3
        assert torch.allclose(getattr(grouped, name), expected, rtol=1e-12)
    plain.load_state_dict(grouped.state_dict())
    grouped.eval()
    plain.eval()
    assert torch.equal(grouped(x), plain(x))


# ---------------------------------------------------------------------- optimizers and schedules
@pytest.mark.parametrize("module", [simclr, byol, barlow, moco_v3])
def test_lars(module):
    """SimCLR's has the learning rate in its momentum buffer, the others multiply the buffer."""
    weight = nn.Parameter(unit(4, 3))
    bias = nn.Parameter(unit(4))
    optimizer = module.LARS([weight, bias], lr=0.5, momentum=0.9, weight_decay=0.1)
    w = weight.detach().clone()
    b = bias.detach().clone()
    w_buffer = 0.0
    b_buffer = 0.0
    for rate in (0.5, 0.2):
        weight.grad = unit(4, 3)
        bias.grad = unit(4)
        optimizer.param_groups[0]["lr"] = rate
        optimizer.step()
        update = weight.grad + 0.1 * w
        before = rate if module is simclr else 1.0  # factor before the momentum, and after it
        after = 1.0 if module is simclr else rate
        w_buffer = 0.9 * w_buffer + before * (0.001 * w.norm() / update.norm()) * update
        b_buffer = 0.9 * b_buffer + before * bias.grad
        w = w - after * w_buffer
        b = b - after * b_buffer
        assert torch.allclose(weight, w, rtol=1e-12)
        assert torch.allclose(bias, b, rtol=1e-12)


@pytest.mark.parametrize("module", [simclr, byol, barlow, moco_v3])
def test_lars_without_a_norm_is_sgd(module):
    """A weight of zeros takes the whole gradient; without a gradient too, it stays."""
    weight = nn.Parameter(torch.zeros(4, 3))
    still = nn.Parameter(torch.zeros(4, 3))
    optimizer = module.LARS([weight, still], lr=0.5, weight_decay=0.1)
    weight.grad = torch.ones(4, 3)
    still.grad = torch.zeros(4, 3)
    optimizer.step()
    assert torch.equal(weight, torch.full((4, 3), -0.5))
    assert not still.any()


def test_larc():
    """All parameters are scaled, also those of one dimension; without a norm, the bare gradient."""
    parameters = [nn.Parameter(x) for x in (unit(4, 3), unit(4), torch.zeros(3).double())]
    optimizer = swav.LARC(parameters, lr=0.5, momentum=0.9, weight_decay=0.1)
    values = [p.detach().clone() for p in parameters]
    buffers = [0.0, 0.0, 0.0]
    for rate in (0.5, 0.2):
        optimizer.param_groups[0]["lr"] = rate
        for i, p in enumerate(parameters):
            p.grad = torch.randn_like(p)
            update = p.grad
            norm = values[i].norm()
            if norm > 0:
                update = p.grad + 0.1 * values[i]
                update = update * 0.001 * norm / (p.grad.norm() + 0.1 * norm + 1e-8)
            buffers[i] = 0.9 * buffers[i] + update
            values[i] = values[i] - rate * buffers[i]
        optimizer.step()
        for p, expected in zip(parameters, values):
            assert torch.allclose(p, expected, rtol=1e-12)


@pytest.mark.parametrize(
    "module, start, end",
    [(simclr, 0, 0), (byol, 0, 0), (moco_v3, 0, 0), (barlow, 0, 0.001), (swav, 1 / 16, 0.001)],
)
def test_warm_up_and_cosine(module, start, end):
    args = small_args(module, epochs=10, lr=2, batch_size=128, warmup_epochs=2)
    rates = [module.learning_rate(args, epoch) for epoch in (0, 1, 2, 6, 10)]
    assert rates == pytest.approx([start, (1 + start) / 2, 1, (1 + end) / 2, end])
    args = small_args(module, epochs=10, lr=2, batch_size=128, warmup_epochs=0)
    assert module.learning_rate(args, 0) == 1


def test_steps_of_moco_v1():
    args = small_args(moco_v1, epochs=200, lr=0.06, batch_size=128)
    rates = [moco_v1.learning_rate(args, epoch) for epoch in (0, 119.9, 120, 159.9, 160, 199.9)]
    assert rates == pytest.approx([0.03, 0.03, 0.003, 0.003, 0.0003, 0.0003])


@pytest.mark.parametrize("module", [moco_v2, densecl, simsiam])
def test_cosine_in_steps_of_an_epoch(module):
    args = small_args(module, epochs=200, lr=0.06, batch_size=128)
    rates = [module.learning_rate(args, epoch) for epoch in (0, 0.9, 100, 199.9)]
    last = 0.03 * (1 + math.cos(math.pi * 199 / 200)) / 2
    assert rates == pytest.approx([0.03, 0.03, 0.015, last])


@pytest.mark.parametrize("module", [byol, moco_v3])
def test_ema_momentum_grows_to_one(module):
    args = small_args(module, epochs=10, ema_momentum=0.9)
    momenta = [module.ema_momentum(args, epoch) for epoch in (0, 5, 10)]
    assert momenta == pytest.approx([0.9, 0.95, 1.0])


def test_who_gets_a_gradient(script):
    """All that the optimizer holds, and nothing else: no target, key encoder, queue or code."""
    args = small_args(script)
    model = model_class(script)(args)
    optimizer = build_optimizer(script, args, model)
    loss, _ = model(*views_of(args, 16))
    loss.backward()
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    for name, p in model.named_parameters():
        trained = not name.startswith(FROZEN.get(script.__name__, ()))
        assert (id(p) in held) == p.requires_grad == (p.grad is not None) == trained, name
        if trained:
            assert p.grad.isfinite().all(), name
            assert p.grad.abs().sum() > 0, name


@pytest.mark.parametrize("module", MOCO)
def test_no_gradient_to_keys(module):
    model = model_class(module)(small_args(module))
    x_k = torch.randn(16, 3, 32, 32, requires_grad=True)
    loss, _ = model(torch.randn(16, 3, 32, 32), x_k)
    loss.backward()
    assert x_k.grad is None


@pytest.mark.parametrize("module", [byol, simsiam, moco_v3])
def test_no_gradient_to_targets(module, monkeypatch):
    """Gradients come through predictions alone: behind a predictor cut off, nothing has one."""
    args = small_args(module)
    model = model_class(module)(args)
    predict = model.predictor.forward
    monkeypatch.setattr(model.predictor, "forward", lambda z: predict(z.detach()))
    views = [x.requires_grad_() for x in views_of(args, 16)]
    loss, _ = model(*views)
    loss.backward()
    for name, p in model.named_parameters():
        assert (p.grad is not None) == name.startswith("predictor"), name
    assert all(x.grad is None for x in views)


# -------------------------------------------------------------------------------------- networks
@pytest.mark.parametrize("recipe, cells", [("patterns", 16), ("cifar10", 16), ("imagenet", 49)])
def test_map_of_densecl_has_four_by_four_cells_or_more(recipe, cells):
    args = densecl.parse_args(["--recipe", recipe])
    backbone = densecl.build_backbone(args)
    encoder = densecl.Encoder(backbone, 8).eval()
    x = torch.randn(1, 3, args.size, args.size)
    with torch.no_grad():
        z, dense, h = encoder(x)
        assert torch.allclose(h.mean(dim=1), backbone(x), atol=1e-5)  # what evaluation sees
    assert z.shape == (1, 8)
    assert dense.shape == (1, cells, 8)
    assert h.shape == (1, cells, backbone.dim)


def test_position_embedding():
    side = 3
    embedding = moco_v3.position_embedding(side, 16)[0]
    assert not embedding[0].any()  # the class token
    for row in range(side):
        for column in range(side):
            waves = []
            for place in (row, column):
                angles = [place / 10000 ** (i / 4) for i in range(4)]
                waves += [math.sin(angle) for angle in angles]
                waves += [math.cos(angle) for angle in angles]
            found = embedding[1 + row * side + column]
            assert torch.allclose(found, torch.tensor(waves), atol=1e-6)


def test_initial_weights_of_the_vit():
    args = moco_v3.parse_args(["--recipe", "imagenet"])
    vit = moco_v3.build_backbone(args)
    assert torch.equal(vit.encoder.pos_embedding, moco_v3.position_embedding(14, 384))
    assert vit.class_token.abs().max() < 1e-5
    for block in vit.encoder.layers:
        attention = block.self_attention
        for weight, bound in (  # uniform up to the root of 6 / (inputs + outputs)
            (attention.in_proj_weight, (6 / (384 + 384)) ** 0.5),
            (attention.out_proj.weight, (6 / (384 + 384)) ** 0.5),
            (block.mlp[0].weight, (6 / (384 + 4 * 384)) ** 0.5),
            (block.mlp[3].weight, (6 / (384 + 4 * 384)) ** 0.5),
        ):
            assert 0.99 * bound < weight.abs().max() <= bound
        for bias in (attention.in_proj_bias, attention.out_proj.bias, block.mlp[0].bias):
            assert not bias.any()
    bound = (6 / (3 * 16 * 16 + 384)) ** 0.5
    assert 0.99 * bound < vit.conv_proj.weight.abs().max() <= bound
    assert not vit.conv_proj.bias.any()
