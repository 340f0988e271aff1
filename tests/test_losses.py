"""Losses and parts of the methods against naive re-implementations, in float64."""

import copy
import math
from collections import deque

import pytest
import torch
import torch.nn.functional as F
from conftest import model_of, small_args, views_for
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

torch.manual_seed(0)


def unit(*shape):
    return F.normalize(torch.randn(*shape, dtype=torch.float64), dim=-1)


@pytest.mark.parametrize("temperature", [0.07, 0.5])
def test_nt_xent(temperature):
    n, z1, z2 = 5, unit(5, 8), unit(5, 8)
    z = [*z1, *z2]
    total = 0.0
    for i in range(2 * n):
        positive = math.exp(float(z[i] @ z[(i + n) % (2 * n)]) / temperature)
        others = sum(math.exp(float(z[i] @ z[k]) / temperature) for k in range(2 * n) if k != i)
        total -= math.log(positive / others)
    assert simclr.nt_xent(z1, z2, temperature).item() == pytest.approx(total / (2 * n), rel=1e-12)


@pytest.mark.parametrize("module", [moco_v1, moco_v2, densecl])
def test_info_nce(module):
    q, k, queue, total = unit(4, 8), unit(4, 8), unit(6, 8), 0.0
    for i in range(4):
        positive = math.exp(float(q[i] @ k[i]) / 0.07)
        total -= math.log(
            positive / (positive + sum(math.exp(float(q[i] @ n) / 0.07) for n in queue))
        )
    assert module.info_nce(q, k, queue, 0.07).item() == pytest.approx(total / 4, rel=1e-12)


def test_contrastive_loss():
    q, k, total = unit(5, 8), unit(5, 8), 0.0
    for i in range(5):
        scores = [math.exp(float(q[i] @ k[j]) / 0.3) for j in range(5)]
        total -= math.log(scores[i] / sum(scores))
    expected = pytest.approx(2 * 0.3 * total / 5, rel=1e-12)
    assert moco_v3.contrastive_loss(q, k, 0.3).item() == expected


def test_regression_loss_is_the_squared_distance_of_unit_vectors():
    p, z = 3 * unit(5, 8), 7 * unit(5, 8)
    total = sum(((p[i] / p[i].norm() - z[i] / z[i].norm()) ** 2).sum() for i in range(5))
    assert byol.regression_loss(p, z).item() == pytest.approx(float(total) / 5, rel=1e-12)


def test_negative_cosine_stops_the_gradient_of_z():
    p, z = 3 * unit(5, 8), 7 * unit(5, 8)
    expected = -sum(float(p[i] @ z[i] / p[i].norm() / z[i].norm()) for i in range(5)) / 5
    loss = simsiam.negative_cosine(p.requires_grad_(), z.requires_grad_())
    assert loss.item() == pytest.approx(expected, rel=1e-12)
    loss.backward()
    assert z.grad is None and p.grad.abs().sum() > 0


def test_barlow_loss(monkeypatch):
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)  # full precision, and more
    z1, z2, total = torch.randn(6, 4).double(), torch.randn(6, 4).double(), 0.0
    for i in range(4):
        for j in range(4):
            c = sum(float(z1[b, i] * z2[b, j]) for b in range(6)) / 6
            total += (1 - c) ** 2 if i == j else 0.01 * c**2
    assert barlow.barlow_loss(z1, z2, 0.01).item() == pytest.approx(total, rel=1e-12)
    bn = nn.BatchNorm1d(4, affine=False, eps=1e-12).double()
    assert barlow.barlow_loss(bn(z1), bn(z1), 0.0).item() == pytest.approx(0, abs=1e-9)


def test_swapped_prediction():
    scores, codes, total = unit(5, 7), torch.rand(5, 7).double().softmax(1), 0.0
    for b in range(5):
        exp = [math.exp(float(s) / 0.1) for s in scores[b]]
        total -= sum(float(codes[b, p]) * math.log(exp[p] / sum(exp)) for p in range(7))
    loss = swav.swapped_prediction(scores, codes, 0.1)
    assert loss.item() == pytest.approx(total / 5, rel=1e-12)


def test_sinkhorn_has_the_marginals_and_is_the_optimum():
    scores = unit(12, 8) @ unit(6, 8).T
    codes = swav.sinkhorn(scores, 0.05, 3)
    assert torch.allclose(codes.sum(1), torch.ones(12).double())  # one unit an image, always
    codes = swav.sinkhorn(scores, 0.05, 2000)
    assert torch.allclose(codes.sum(1), torch.ones(12).double())
    assert torch.allclose(codes.sum(0), torch.full((6,), 2.0).double(), rtol=1e-6)  # equal shares
    # Of all matrices with these marginals it has the most of <codes, scores> + epsilon * entropy:
    # its logarithm is scores / epsilon up to a number for each row and each column.
    rest = codes.log() - scores / 0.05
    rest = rest - rest.mean(0) - rest.mean(1, keepdim=True) + rest.mean()
    assert rest.abs().max() < 1e-5
    large = swav.sinkhorn(torch.ones(4, 3), 0.001, 3)  # exp(1000) would overflow
    assert torch.allclose(large, torch.full((4, 3), 1 / 3))


def test_match_is_the_most_similar_cell():
    h_q, h_k = torch.randn(3, 16, 5).double(), torch.randn(3, 16, 5).double()
    cells = densecl.match(h_q, h_k)
    for b in range(3):
        for i in range(16):
            cosines = [F.cosine_similarity(h_q[b, i], h_k[b, j], dim=0).item() for j in range(16)]
            assert cells[b, i].item() == max(range(16), key=cosines.__getitem__)
    order = torch.randperm(16)
    assert torch.equal(densecl.match(h_q[:, order], h_q)[0], order)


def test_dense_info_nce():
    q, k, queue, total = unit(2, 4, 8), unit(2, 4, 8), unit(6, 8), 0.0
    for b in range(2):
        for i in range(4):
            positive = math.exp(float(q[b, i] @ k[b, i]) / 0.2)
            negative = sum(math.exp(float(q[b, i] @ n) / 0.2) for n in queue)
            total -= math.log(positive / (positive + negative))
    loss = densecl.dense_info_nce(q, k, queue, 0.2)
    assert loss.item() == pytest.approx(total / 8, rel=1e-12)


def test_chance_loss_is_the_loss_of_a_network_that_tells_nothing():
    same = F.normalize(torch.ones(16, 8), dim=1)
    model = simclr.SimCLR(small_args(simclr))
    assert simclr.nt_xent(same, same, 0.1).item() == pytest.approx(model.chance_loss)
    for module, kind in ((moco_v1, moco_v1.MoCo), (densecl, densecl.DenseCL)):
        model = kind(small_args(module))
        loss = module.info_nce(same, same, same[:1].expand(32, 8), 0.1)
        assert loss.item() == pytest.approx(model.chance_loss)
    model = moco_v3.MoCo(small_args(moco_v3, temperature=0.3))
    loss = 2 * moco_v3.contrastive_loss(same, same, 0.3)  # both directions
    assert loss.item() == pytest.approx(model.chance_loss)
    model = swav.SwAV(small_args(swav))
    codes = torch.rand(5, 12).softmax(1)
    loss = swav.swapped_prediction(torch.zeros(5, 12), codes, 0.1)
    assert loss.item() == pytest.approx(model.chance_loss)
    model = byol.BYOL(small_args(byol))
    across = torch.eye(8)
    loss = 2 * byol.regression_loss(across, across.roll(1, 0))
    assert loss.item() == pytest.approx(model.chance_loss)
    assert simsiam.negative_cosine(across, across.roll(1, 0)).item() == 0
    assert simsiam.SimSiam(small_args(simsiam)).chance_loss == 0
    model = barlow.BarlowTwins(small_args(barlow, batch_size=512, projection_dim=64))
    z1, z2 = model.bn(torch.randn(512, 64)), model.bn(torch.randn(512, 64))
    loss = barlow.barlow_loss(z1, z2, model.redundancy_weight)
    assert loss.item() == pytest.approx(model.chance_loss, rel=0.02)


def test_queue_is_a_deque():
    queue, pointer = torch.zeros(12, 3), torch.zeros((), dtype=torch.long)
    oracle = deque([torch.zeros(3)] * 12, maxlen=12)
    for _ in range(10):
        keys = torch.randn(4, 3)
        moco_v1.enqueue(queue, pointer, keys)
        oracle.extend(keys)
        oldest_first = torch.cat([queue[pointer:], queue[:pointer]])
        assert torch.equal(oldest_first, torch.stack(list(oracle)))


def test_a_key_is_in_the_queue_only_after_its_loss():
    model = moco_v1.MoCo(small_args(moco_v1))
    before, seen = model.queue.clone(), []
    info_nce = moco_v1.info_nce
    try:
        moco_v1.info_nce = lambda q, k, queue, t: (
            seen.append((k, queue)) or info_nce(q, k, queue, t)
        )
        model(torch.randn(16, 3, 32, 32), torch.randn(16, 3, 32, 32)).backward()
    finally:
        moco_v1.info_nce = info_nce
    ((k, queue),) = seen
    assert torch.equal(queue, before)
    assert torch.equal(model.queue[:16], k) and torch.equal(model.queue[16:], before[16:])
    assert model.queue_ptr.item() == 16


def test_shuffle_and_unshuffle_are_inverse():
    x = torch.arange(24.0).view(12, 2)
    dealt, permutation = moco_v1.shuffle(x)
    assert not torch.equal(dealt, x) and sorted(dealt[:, 0].tolist()) == x[:, 0].tolist()
    assert torch.equal(moco_v1.unshuffle(dealt, permutation), x)


def test_shuffle_reaches_the_batch_statistics_and_leaves_the_keys_in_order():
    model = moco_v1.MoCo(small_args(moco_v1)).double()
    x, seen = torch.randn(16, 3, 32, 32, dtype=torch.float64), []
    model.encoder_k.register_forward_hook(
        lambda module, inputs, output: seen.append((inputs[0], output))
    )
    model(x, x)
    ((images, keys),) = seen
    place = torch.stack([(images - image).abs().flatten(1).sum(1).argmin() for image in x])
    assert not torch.equal(place, torch.arange(16))
    assert torch.allclose(model.queue[:16], F.normalize(keys[place], dim=1))


def test_ema():
    source, target = nn.Linear(3, 2).double(), nn.Linear(3, 2).double()
    source.register_buffer("mean", torch.ones(1))
    target.register_buffer("mean", torch.zeros(1))
    before = copy.deepcopy(target)
    moco_v1.ema_update(source, target, 0.9)
    for s, t, b in zip(source.parameters(), target.parameters(), before.parameters()):
        assert torch.allclose(t, 0.9 * b + 0.1 * s, rtol=1e-14)
    assert target.mean.item() == 0  # its statistics are its own


def test_grouped_batch_norm_is_a_batch_norm_a_group():
    x = torch.randn(12, 5, 4, 4, dtype=torch.float64)
    grouped, plain = moco_v1.GroupedBatchNorm2d(5, groups=3).double(), nn.BatchNorm2d(5).double()
    assert torch.equal(grouped(x), torch.cat([plain(part) for part in x.chunk(3)]))
    assert same_state(grouped, plain)
    grouped.eval(), plain.eval()
    assert torch.equal(grouped(x), plain(x))


def same_state(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values()))


@pytest.mark.parametrize("module", [simclr, byol])
def test_lars(module):
    """SimCLR's has the learning rate in its momentum buffer, the others multiply the buffer."""
    inside = module is simclr
    kind = simclr.LARSOptimizer if inside else byol.LARS
    weight, bias = nn.Parameter(unit(4, 3)), nn.Parameter(unit(1, 4)[0])
    optimizer = kind([weight, bias], lr=0.5, momentum=0.9, weight_decay=0.1)
    w, b, v_w, v_b = weight.detach().clone(), bias.detach().clone(), 0.0, 0.0
    for rate in (0.5, 0.2):
        weight.grad, bias.grad = unit(4, 3), unit(1, 4)[0]
        optimizer.param_groups[0]["lr"] = rate
        optimizer.step()
        update = weight.grad + 0.1 * w
        now, later = (rate, 1) if inside else (1, rate)
        v_w = 0.9 * v_w + now * (0.001 * w.norm() / update.norm()) * update
        v_b = 0.9 * v_b + now * bias.grad
        w, b = w - later * v_w, b - later * v_b
        assert torch.allclose(weight, w, rtol=1e-12) and torch.allclose(bias, b, rtol=1e-12)
    weight.data.zero_()
    weight.grad = torch.zeros_like(weight)
    optimizer.step()
    assert weight.isfinite().all()


def test_larc():
    """All parameters are scaled, also those of one dimension; without a norm, the bare gradient."""
    parameters = [nn.Parameter(x) for x in (unit(4, 3), unit(1, 4)[0], torch.zeros(3))]
    optimizer = swav.LARC(parameters, lr=0.5, momentum=0.9, weight_decay=0.1)
    values, buffers = [p.detach().clone() for p in parameters], [0.0] * 3
    for rate in (0.5, 0.2):
        optimizer.param_groups[0]["lr"] = rate
        for i, p in enumerate(parameters):
            g, w = torch.randn_like(p), values[i]
            p.grad = g
            scale = 0.001 * w.norm() / (g.norm() + 0.1 * w.norm() + 1e-8)
            buffers[i] = 0.9 * buffers[i] + (scale * (g + 0.1 * w) if w.norm() > 0 else g)
            values[i] = w - rate * buffers[i]
        optimizer.step()
        for p, w in zip(parameters, values):
            assert torch.allclose(p, w, rtol=1e-6)


def test_schedules_at_their_ends():
    flags = ["--epochs", "10", "--lr", "2", "--batch-size", "128", "--warmup-epochs", "2"]
    for module in (simclr, byol, moco_v3):
        args = module.parse_args(flags)
        rates = [module.learning_rate(args, epoch) for epoch in (0, 1, 2, 6, 10)]
        assert rates == pytest.approx([0, 0.5, 1, 0.5, 0]), module
    for module, start in ((barlow, 0), (swav, 1 / 16)):
        args = module.parse_args(flags)
        rates = [module.learning_rate(args, epoch) for epoch in (0, 1, 2, 6, 10)]
        assert rates == pytest.approx([start, (1 + start) / 2, 1, 0.5005, 0.001]), module
    args = moco_v1.parse_args(["--epochs", "200", "--lr", "0.03", "--batch-size", "256"])
    rates = [moco_v1.learning_rate(args, epoch) for epoch in (0, 119.9, 120, 159.9, 160, 199.9)]
    assert rates == pytest.approx([0.03, 0.03, 0.003, 0.003, 0.0003, 0.0003])
    for module in (moco_v2, densecl, simsiam):
        rates = [module.learning_rate(args, epoch) for epoch in (0, 0.9, 100, 199.9)]
        assert rates == pytest.approx(
            [0.03, 0.03, 0.015, 0.03 * (1 + math.cos(math.pi * 199 / 200)) / 2]
        )
    for module in (byol, moco_v3):
        args = module.parse_args(["--epochs", "10", "--ema-momentum", "0.9"])
        momenta = [module.ema_momentum(args, epoch) for epoch in (0, 5, 10)]
        assert momenta == pytest.approx([0.9, 0.95, 1.0])


def after_a_step(script, epoch, **flags):
    """(model before, model after) one step at this epoch."""
    torch.manual_seed(0)
    args = small_args(script, **flags)
    model = script.build_model(args, 1000, torch.device("cpu"))
    optimizer = script.build_optimizer(args, model)
    before = copy.deepcopy(model)
    model(*views_for(args, 16)).backward()
    script.update(args, model, optimizer, epoch)
    return args, before, model, optimizer


def test_the_target_follows_after_the_step():
    for script, names in (
        (byol, ("encoder", "target_encoder")),
        (moco_v3, ("encoder_q", "encoder_k")),
    ):
        args, before, after, _ = after_a_step(script, 1.5, optimizer="lars")
        momentum = script.ema_momentum(args, 1.5)
        source, target = (getattr(after, name) for name in names)
        old = getattr(before, names[1])
        for s, t, o in zip(source.parameters(), target.parameters(), old.parameters()):
            assert torch.allclose(t, momentum * o + (1 - momentum) * s, atol=1e-7)


def test_the_predictors_rate_is_constant():
    args, _, _, optimizer = after_a_step(simsiam, 1.5, epochs=2, lr=1.6)
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.05, 0.1])


def test_biases_have_a_rate_and_no_decay_of_their_own():
    args, _, model, optimizer = after_a_step(
        barlow, 1.0, optimizer="lars", lr=1.6, lr_biases=0.4, warmup_epochs=1
    )
    weights, biases = optimizer.param_groups
    assert (weights["lr"], biases["lr"]) == pytest.approx((0.1, 0.025))
    assert weights["weight_decay"] == args.weight_decay and biases["weight_decay"] == 0
    assert all(p.ndim > 1 for p in weights["params"])
    assert len(weights["params"]) + len(biases["params"]) == len(list(model.parameters()))


def test_prototypes_stay_at_first_and_have_norm_one_in_forward():
    _, before, after, _ = after_a_step(swav, 0.5, freeze_epochs=1.0)
    assert torch.allclose(after.prototypes.weight, F.normalize(before.prototypes.weight, dim=1))
    _, before, after, _ = after_a_step(swav, 1.0, freeze_epochs=1.0)
    assert not torch.allclose(after.prototypes.weight, F.normalize(before.prototypes.weight, dim=1))


def test_queue_of_swav_fills_from_its_epoch_on_and_is_used_once_full(monkeypatch):
    settings = {"queue_size": 32, "queue_start": 1, "epochs": 3}
    _, _, model, _ = after_a_step(swav, 0.9, **settings)
    assert not model.queue.any()
    args, _, model, optimizer = after_a_step(swav, 1.0, **settings)
    assert torch.equal(model.queue[:16], model.large) and not model.queue[16:].any()
    made, used, sinkhorn, predict = [], [], swav.sinkhorn, swav.swapped_prediction
    monkeypatch.setattr(swav, "sinkhorn", lambda *given: made.append(sinkhorn(*given)) or made[-1])
    monkeypatch.setattr(
        swav, "swapped_prediction", lambda s, codes, t: used.append(codes) or predict(s, codes, t))
    for full in (False, True):
        made.clear(), used.clear()
        model(*views_for(args, 16)).backward()
        swav.update(args, model, optimizer, 2.0)
        assert [len(codes) for codes in made] == [16, 48] * 2  # without and with the 32 rows
        right, other = made[full][:16], made[not full][:16]
        assert any(torch.equal(codes, right) for codes in used)
        assert not any(torch.equal(codes, other) for codes in used)


def test_multi_crop_is_one_pass_a_resolution():
    model = swav.SwAV(args := small_args(swav))
    sizes = []
    model.backbone.register_forward_hook(lambda m, inputs, h: sizes.append(tuple(inputs[0].shape)))
    model(*views_for(args, 16))
    assert sizes == [(32, 3, 32, 32), (32, 3, 16, 16)]


def test_codes_of_a_crop_are_not_predicted_from_itself(monkeypatch):
    model, seen = swav.SwAV(args := small_args(swav)), []
    loss = swav.swapped_prediction
    monkeypatch.setattr(
        swav, "swapped_prediction", lambda s, c, t: seen.append((s, c)) or loss(s, c, t)
    )
    model(*views_for(args, 16))
    for half, own in ((seen[:3], 0), (seen[3:], 1)):
        scores = [s for s, _ in half]
        other = [s for s, _ in (seen[3:] if own == 0 else seen[:3])]
        codes = half[0][1]
        assert all(torch.equal(codes, c) for _, c in half) and not codes.requires_grad
        # The large crop that is missing in this half, and in the other half comes first, made them.
        (missing,) = [s for s in other if not any(s is t for t in scores)]
        assert torch.allclose(codes, swav.sinkhorn(missing.detach(), args.epsilon, 3))


def test_both_queues_of_densecl_get_one_key_an_image():
    model = densecl.DenseCL(args := small_args(densecl))
    x_q, x_k = views_for(args, 16)
    model.encoder_k.register_forward_hook(lambda m, inputs, out: seen.append((inputs[0], out)))
    seen = []
    model(x_q, x_k)
    ((images, (k, dense_k, _)),) = seen
    place = torch.stack([(images - image).abs().flatten(1).sum(1).argmin() for image in x_k])
    assert torch.allclose(model.queue[:16], F.normalize(k[place], dim=1))
    pooled = F.normalize(dense_k[place].mean(1), dim=1)
    assert torch.allclose(model.dense_queue[:16], pooled)
    assert model.queue_ptr.item() == model.dense_queue_ptr.item() == 16


@pytest.mark.parametrize("recipe", ["patterns", "cifar10", "imagenet"])
def test_the_map_of_densecl_has_four_by_four_cells_or_more(recipe):
    args = densecl.parse_args(["--recipe", recipe])
    backbone, dim = densecl.build_backbone(args)
    encoder = densecl.Encoder(backbone, dim, 8).eval()
    x = torch.randn(1, 3, args.size, args.size)
    _, dense, h = encoder(x)
    cells = {"patterns": 16, "cifar10": 16, "imagenet": 49}[recipe]
    assert h.shape == (1, cells, dim) and dense.shape == (1, cells, 8)
    assert torch.allclose(h.mean(1), backbone(x), atol=1e-5)  # what evaluation sees


def test_position_embedding():
    made, side = moco_v3.position_embedding(3, 16)[0], 3
    assert not made[0].any()  # the class token
    for row in range(side):
        for column in range(side):
            waves = []
            for place in (row, column):
                angles = [place / 10000 ** (i / 4) for i in range(4)]
                waves += [math.sin(a) for a in angles] + [math.cos(a) for a in angles]
            found = made[1 + row * side + column]
            assert torch.allclose(found, torch.tensor(waves), atol=1e-6)


def test_the_vit_starts_as_in_the_paper():
    args = moco_v3.parse_args(["--recipe", "imagenet", "--hidden-dim", "8"])
    model = moco_v3.MoCo(args)
    vit = model.backbone
    assert len(vit.encoder.layers) == 12 and vit.hidden_dim == 384 and vit.patch_size == 16
    block = vit.encoder.layers[0]
    assert block.self_attention.num_heads == 12
    frozen = {name for name, p in vit.named_parameters() if not p.requires_grad}
    assert frozen == {"conv_proj.weight", "conv_proj.bias", "encoder.pos_embedding"}
    for weight, bound in (
        (block.self_attention.in_proj_weight, (6 / (384 + 384)) ** 0.5),
        (block.self_attention.out_proj.weight, (6 / (384 + 384)) ** 0.5),
        (block.mlp[0].weight, (6 / (384 + 4 * 384)) ** 0.5),
        (vit.conv_proj.weight, (6 / (3 * 16 * 16 + 384)) ** 0.5),
    ):
        assert 0.99 * bound < weight.abs().max() <= bound
    assert [type(m).__name__ for m in model.encoder_q.projector] == (
        "Linear BatchNorm1d ReLU Linear BatchNorm1d ReLU Linear BatchNorm1d".split()
    )
    assert [type(m).__name__ for m in model.predictor] == (
        "Linear BatchNorm1d ReLU Linear BatchNorm1d".split()
    )
    assert not model.predictor[-1].affine and not model.encoder_q.projector[-1].affine
    model = moco_v3.MoCo(small_args(moco_v3, arch="resnet18"))
    assert len(model.encoder_q.projector) == 5 and not model.encoder_q.projector[-1].affine
    assert [type(m).__name__ for m in model.predictor] == "Linear BatchNorm1d ReLU Linear".split()


def test_who_gets_a_gradient(script):
    """All that the optimizer holds, and nothing else: no target, key encoder, queue or code."""
    torch.manual_seed(0)
    args = small_args(script)
    model = model_of(script)(args)
    optimizer = script.build_optimizer(args, model)
    model(*views_for(args, 16)).backward()
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    for name, parameter in model.named_parameters():
        assert (id(parameter) in held) == parameter.requires_grad == (parameter.grad is not None), (
            name
        )
        if parameter.grad is not None:
            assert parameter.grad.isfinite().all() and parameter.grad.abs().sum() > 0, name


@pytest.mark.parametrize("module", [moco_v1, moco_v2, densecl])
def test_no_gradient_to_keys(module):
    model = model_of(module)(small_args(module))
    x_k = torch.randn(16, 3, 32, 32, requires_grad=True)
    model(torch.randn(16, 3, 32, 32), x_k).backward()
    assert x_k.grad is None
    assert not any(p.requires_grad for p in model.encoder_k.parameters())


@pytest.mark.parametrize("module", [byol, simsiam, moco_v3])
def test_no_gradient_to_targets(module, monkeypatch):
    """With the predictor cut off, nothing has a gradient: it comes through predictions alone."""
    model = model_of(module)(args := small_args(module))
    predict = model.predictor.forward
    monkeypatch.setattr(model.predictor, "forward", lambda z: predict(z.detach()))
    model(*views_for(args, 16)).backward()
    assert all(p.grad is None for p in model.parameters() if not is_part(p, model.predictor))
    assert all(p.grad is not None for p in model.predictor.parameters())


def is_part(parameter, module):
    return any(parameter is p for p in module.parameters())


def test_the_papers_networks():
    for module, keys, out in (
        (moco_v1, {"weight", "bias"}, "weight"),
        (moco_v2, {"0.weight", "0.bias", "2.weight", "2.bias"}, "2.weight"),
    ):
        args = module.parse_args(
            ["--recipe", "imagenet", "--arch", "resnet18", "--queue-size", "512"]
        )
        model = module.MoCo(args)
        assert model.encoder_q.projector.state_dict().keys() == keys
        assert model.encoder_q.projector.state_dict()[out].shape == (128, 512)
        assert model.backbone.conv1.kernel_size == (7, 7)
        assert isinstance(model.backbone.maxpool, nn.MaxPool2d)
    model = simclr.SimCLR(simclr.parse_args(["--recipe", "cifar10"]))
    assert model.backbone.conv1.kernel_size == (3, 3) and isinstance(
        model.backbone.maxpool, nn.Identity
    )
    assert model.backbone(torch.randn(2, 3, 32, 32)).shape == (2, 512)
