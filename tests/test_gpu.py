"""What only a GPU can show: bf16, SyncBatchNorm under nccl, copies that nothing waits for, and a
resumed run that is equal to the bit. Part of the fast set; skipped without CUDA."""

import copy
import importlib
import json
import os

import pytest
import torch
import torch.distributed as dist
from conftest import (
    METHODS,
    checkpoint_of,
    interrupt,
    log_of,
    same_state,
    small_args,
    torchrun,
    words,
)
from torch import nn

import common
from results.methods import build_optimizer, finish_step, model_class, views_of

DEVICE = torch.device("cuda")
SYNCHRONISED = [
    name for name in METHODS if "bn_groups" not in importlib.import_module(name).SETTINGS
]
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def build(script):
    """(args, model on the CPU, views on the CPU), always the same."""
    args = small_args(script)
    torch.manual_seed(0)
    model = model_class(script)(args)
    views = views_of(args, args.batch_size)
    return args, model.to(memory_format=torch.channels_last), views


def to_gpu(views):
    return [view.to(DEVICE, memory_format=torch.channels_last) for view in views]


@pytest.fixture
def same_shuffles(monkeypatch):
    """Permutations are drawn on the CPU, so that both devices shuffle alike after one seed."""
    randperm = torch.randperm
    monkeypatch.setattr(torch, "randperm", lambda n, device: randperm(n).to(device))


def test_a_step_in_bf16(script, same_shuffles):
    """It is finite, and its loss that of the CPU in float32."""
    args, model, views = build(script)
    on_gpu = copy.deepcopy(model).to(DEVICE)
    torch.manual_seed(1)
    expected, _ = model(*views)

    optimizer = build_optimizer(script, args, on_gpu)
    for group in optimizer.param_groups:
        group["lr"] = 0.01
    torch.manual_seed(1)
    with torch.autocast(DEVICE.type, torch.bfloat16):
        loss, z = on_gpu(*to_gpu(views))
    loss.backward()
    gradients = [p.grad for p in on_gpu.parameters() if p.grad is not None]
    optimizer.step()
    finish_step(script, on_gpu, z)
    assert loss.dtype == torch.float32
    near_zero = 0.02 if model.chance_loss == 0 else 0.0  # SimSiam's loss, between -1 and 1
    assert loss.item() == pytest.approx(expected.item(), rel=0.02, abs=near_zero)
    for tensor in (*gradients, *on_gpu.state_dict().values()):
        assert tensor.isfinite().all()


@pytest.fixture
def group_of_one(tmp_path):
    torch.cuda.set_device(0)
    store = f"file://{tmp_path}/store"
    dist.init_process_group("nccl", store, rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("name", SYNCHRONISED)
def test_synchronised_batch_norm_in_a_group_of_one(name, group_of_one):
    """Converted as in train, the model gives the loss, gradients and statistics that it gave."""
    _, model, views = build(importlib.import_module(name))
    plain = model.to(DEVICE)
    synchronised = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(plain))
    kinds = {type(module) for module in synchronised.modules()}
    assert nn.SyncBatchNorm in kinds
    assert not kinds & {nn.BatchNorm1d, nn.BatchNorm2d}
    network = nn.parallel.DistributedDataParallel(synchronised)
    views = to_gpu(views)
    losses = []
    for forward in (plain, network):
        loss, _ = forward(*views)
        loss.backward()
        losses.append(loss)
    assert torch.allclose(*losses, rtol=1e-3)
    for (key, p), other in zip(plain.named_parameters(), synchronised.parameters()):
        if p.grad is not None:
            error = (p.grad - other.grad).norm()
            assert error <= 0.01 * p.grad.norm() + 1e-4, key
    state = synchronised.state_dict()
    for key, value in plain.state_dict().items():
        assert torch.allclose(value.double(), state[key].double(), rtol=1e-3, atol=1e-4), key


def test_torchrun_with_nccl(folder, tmp_path):
    """A whole run in a group of one process."""
    script = importlib.import_module("simclr")
    command = words(script, recipe="patterns", data=folder, out=tmp_path)
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "0")
    ran = torchrun(1, "simclr.py", *command, CUDA_VISIBLE_DEVICES=visible)
    assert ran.returncode == 0, ran.stderr[-3000:]
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["device"] == torch.cuda.get_device_name()
    assert result["memory_gib"] > 0


def test_copies_that_nothing_waits_for_have_the_right_values():
    """The GPU is busy while they are made, and their sources change and vanish meanwhile."""
    work = torch.randn(4096, 4096, device=DEVICE)
    sent = []
    for number in range(200):
        work @ work
        source = torch.full((1 << 16,), number)
        sent.append(common.to_device(source, DEVICE))
        source.fill_(-1)
    for number, there in enumerate(sent):
        assert there.device.type == DEVICE.type
        assert (there == number).all(), number


@pytest.fixture
def deterministic():
    """Without atomic additions, whose order changes from run to run."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.backends.cudnn.deterministic = True
    yield
    torch.use_deterministic_algorithms(False)
    torch.backends.cudnn.deterministic = False


def losses_of(out):
    return [line.get("loss") for line in log_of(out)]


def test_resumed_equals_uninterrupted(folder, tmp_path, deterministic):
    """In bf16, and with shuffles that the GPU's random generator draws."""
    script = importlib.import_module("moco_v1")
    whole = tmp_path / "whole"
    killed = tmp_path / "killed"
    script.main(small_args(script, data=folder, out=whole, epochs=3))
    torch.cuda.manual_seed(7)  # what a new process would not find either
    args = small_args(script, data=folder, out=killed, epochs=3)
    interrupt(script, args, "after_step", 8)
    torch.cuda.manual_seed(8)
    script.main(args)
    assert "cuda" in checkpoint_of(whole)["random_state"]
    assert losses_of(whole) == losses_of(killed)
    assert same_state(checkpoint_of(whole), checkpoint_of(killed))
