"""Losses and parts of the methods against naive re-implementations, in float64."""

import copy
import math
from collections import deque

import pytest
import torch
import torch.nn.functional as F
from conftest import model_of, small_args
from torch import nn

import moco_v1
import moco_v2
import simclr

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


@pytest.mark.parametrize("module", [moco_v1, moco_v2])
def test_info_nce(module):
    q, k, queue, total = unit(4, 8), unit(4, 8), unit(6, 8), 0.0
    for i in range(4):
        positive = math.exp(float(q[i] @ k[i]) / 0.07)
        total -= math.log(
            positive / (positive + sum(math.exp(float(q[i] @ n) / 0.07) for n in queue))
        )
    assert module.info_nce(q, k, queue, 0.07).item() == pytest.approx(total / 4, rel=1e-12)


def test_chance_loss_is_the_loss_of_a_network_that_tells_nothing():
    same = F.normalize(torch.ones(16, 8), dim=1)
    model = simclr.SimCLR(small_args(simclr))
    assert simclr.nt_xent(same, same, 0.1).item() == pytest.approx(model.chance_loss)
    model = moco_v1.MoCo(small_args(moco_v1))
    assert moco_v1.info_nce(same, same, same[:1].expand(32, 8), 0.1).item() == pytest.approx(
        model.chance_loss
    )


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


def test_lars():
    weight, bias = nn.Parameter(unit(4, 3)), nn.Parameter(unit(1, 4)[0])
    optimizer = simclr.LARS([weight, bias], lr=0.5, momentum=0.9, weight_decay=0.1)
    w, b, v_w, v_b = weight.detach().clone(), bias.detach().clone(), 0.0, 0.0
    for rate in (0.5, 0.2):
        weight.grad, bias.grad = unit(4, 3), unit(1, 4)[0]
        optimizer.param_groups[0]["lr"] = rate
        optimizer.step()
        update = weight.grad + 0.1 * w
        v_w = 0.9 * v_w + rate * (0.001 * w.norm() / update.norm()) * update
        v_b = 0.9 * v_b + rate * bias.grad
        w, b = w - v_w, b - v_b
        assert torch.allclose(weight, w, rtol=1e-12) and torch.allclose(bias, b, rtol=1e-12)
    weight.data.zero_()
    weight.grad = torch.zeros_like(weight)
    optimizer.step()
    assert weight.isfinite().all()


def test_schedules_at_their_ends():
    args = simclr.parse_args(
        ["--epochs", "10", "--lr", "2", "--batch-size", "128", "--warmup-epochs", "2"]
    )
    rates = [simclr.learning_rate(args, epoch) for epoch in (0, 1, 2, 6, 10)]
    assert rates == pytest.approx([0, 0.5, 1, 0.5, 0])
    args = moco_v1.parse_args(["--epochs", "200", "--lr", "0.03", "--batch-size", "256"])
    rates = [moco_v1.learning_rate(args, epoch) for epoch in (0, 119.9, 120, 159.9, 160, 199.9)]
    assert rates == pytest.approx([0.03, 0.03, 0.003, 0.003, 0.0003, 0.0003])
    rates = [moco_v2.learning_rate(args, epoch) for epoch in (0, 0.9, 100, 199.9)]
    assert rates == pytest.approx(
        [0.03, 0.03, 0.015, 0.03 * (1 + math.cos(math.pi * 199 / 200)) / 2]
    )


def test_who_gets_a_gradient(script):
    """All that the optimizer holds, and nothing else: no target, key encoder, queue or code."""
    torch.manual_seed(0)
    args = small_args(script)
    model = model_of(script)(args)
    optimizer = script.build_optimizer(args, model)
    model(torch.randn(16, 3, 32, 32), torch.randn(16, 3, 32, 32)).backward()
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    for name, parameter in model.named_parameters():
        assert (id(parameter) in held) == parameter.requires_grad == (parameter.grad is not None), (
            name
        )
        if parameter.grad is not None:
            assert parameter.grad.isfinite().all() and parameter.grad.abs().sum() > 0, name


def test_no_gradient_to_keys():
    model = moco_v1.MoCo(small_args(moco_v1))
    x_k = torch.randn(16, 3, 32, 32, requires_grad=True)
    model(torch.randn(16, 3, 32, 32), x_k).backward()
    assert x_k.grad is None
    assert not any(p.requires_grad for p in model.encoder_k.parameters())


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
