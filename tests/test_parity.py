"""W processes are one process: the loss and every gradient, in float64, on gloo.

Where batch normalisation is global by design, all processes get a differentiable synchronised one
of this file's own (torch's refuses the CPU); where it is per group, one process has the groups."""

import importlib
import os

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from conftest import SCRIPTS, model_of, small_args
from torch import nn
from torch.distributed.nn.functional import all_reduce

BATCH = 16


class GlobalBatchNorm(nn.Module):
    """Statistics over all processes, with the gradient through them."""

    def __init__(self, old):
        super().__init__()
        self.weight, self.bias, self.eps = old.weight, old.bias, old.eps

    def forward(self, x):
        dims, shape = [0, *range(2, x.ndim)], [1, -1] + [1] * (x.ndim - 2)
        sums = torch.stack([x.sum(dims), x.square().sum(dims), torch.ones_like(x).sum(dims)])
        sums = all_reduce(sums) if dist.is_initialized() else sums
        mean = sums[0] / sums[2]
        scale = (sums[1] / sums[2] - mean**2 + self.eps).rsqrt()
        x = (x - mean.view(shape)) * scale.view(shape)
        if self.weight is not None:
            x = x * self.weight.view(shape) + self.bias.view(shape)
        return x


def synchronise(module):
    for name, child in module.named_children():
        if isinstance(child, nn.BatchNorm1d | nn.BatchNorm2d):
            setattr(module, name, GlobalBatchNorm(child))
        else:
            synchronise(child)


def step(rank, world_size, name, path, breakage=None):
    """Loss and backward on this process's share of a fixed batch; rank 0 saves what came out."""
    if world_size > 1:
        torch.set_num_threads(1)
        dist.init_process_group("gloo", f"file://{path}.store", rank=rank, world_size=world_size)
    script = importlib.import_module(name)
    args = small_args(script, batch_size=BATCH, bn_groups=4, projection_dim=8)
    torch.manual_seed(0)
    model = model_of(script)(args).double()
    if "bn_groups" not in vars(args):
        synchronise(model)
    views = torch.randn(2, BATCH, 3, 32, 32, dtype=torch.float64, generator=torch.manual_seed(1))
    share = views.chunk(world_size, dim=1)[rank]
    if breakage == "plain gather":
        script.gather = plain_gather
    network = model
    if world_size > 1:
        network = nn.parallel.DistributedDataParallel(model)
    torch.manual_seed(2)  # the same permutation, whatever the number of processes
    loss = network(*share)
    loss.backward()
    total = loss.detach().clone()
    if world_size > 1:
        dist.all_reduce(total)
    if rank == 0:
        state = {"loss": total / world_size}
        state |= {f"grad {n}": p.grad for n, p in model.named_parameters() if p.grad is not None}
        state |= {n: b for n, b in model.named_buffers() if "queue" in n}
        state |= {n: p.detach() for n, p in model.named_parameters() if not p.requires_grad}
        torch.save(state, path)
    if world_size > 1:
        dist.destroy_process_group()


def plain_gather(x):
    parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, x.detach().contiguous())
    parts[dist.get_rank()] = x
    return torch.cat(parts)


def largest_difference(name, world_size, folder, breakage=None):
    os.environ["MASTER_ADDR"] = "127.0.0.1"
    one, many = str(folder / "one.pt"), str(folder / "many.pt")
    step(0, 1, name, one)
    mp.spawn(step, (world_size, name, many, breakage), nprocs=world_size)
    one, many = (
        {k: v.double() for k, v in torch.load(p, weights_only=True).items()} for p in (one, many)
    )
    assert one.keys() == many.keys() and len(one) > 10
    return max(((one[k] - many[k]).norm() / (one[k].norm() + 1e-12)).item() for k in one)


@pytest.mark.parametrize("name", SCRIPTS)
def test_two_processes_have_the_gradient_of_one(name, tmp_path):
    assert largest_difference(name, 2, tmp_path) < 1e-9


def test_the_test_sees_a_gather_without_gradient(tmp_path):
    assert largest_difference("simclr", 2, tmp_path, "plain gather") > 1e-3
