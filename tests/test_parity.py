"""W processes are one process: the loss, every gradient and the state after the step, in float64,
on gloo. Each script is also broken on purpose, to see that the comparison would notice.

Where batch normalisation is global by design, all processes get a differentiable synchronised one
of this file's own (torch's refuses the CPU); where it is per group, one process has the groups."""

import importlib

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from conftest import SCRIPTS, model_of, small_args, views_for
from torch import nn

BATCH = 16
BROKEN = {  # what is replaced in which script, by a mistake that others have made
    "simclr": "a gather without gradient",
    "barlow": "an all_reduce without gradient",
    "swav": "Sinkhorn over the local batch",
    "moco_v1": "keys left shuffled",
    "moco_v2": "a queue of the own keys only",
    "densecl": "a queue of the own keys only",
    "moco_v3": "labels without the offset of the rank",
    "byol": "batch normalisation of the local batch",
    "simsiam": "batch normalisation of the local batch",
}


class Sum(torch.autograd.Function):
    """Over all processes, in both directions."""

    @staticmethod
    def forward(ctx, x):
        x = x.clone()
        dist.all_reduce(x)
        return x

    backward = forward


class GlobalBatchNorm(nn.Module):
    """Statistics over all processes, with the gradient through them."""

    def __init__(self, old):
        super().__init__()
        self.weight, self.bias, self.eps = old.weight, old.bias, old.eps

    def forward(self, x):
        dims, shape = [0, *range(2, x.ndim)], [1, -1] + [1] * (x.ndim - 2)
        sums = torch.stack([x.sum(dims), x.square().sum(dims), torch.ones_like(x).sum(dims)])
        sums = Sum.apply(sums) if dist.is_initialized() else sums
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


def plain_gather(x):
    parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, x.detach().contiguous())
    parts[dist.get_rank()] = x
    return torch.cat(parts)


def plain_total(x):
    parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, x.detach().contiguous())
    return sum(parts) - x.detach() + x


def break_on_purpose(script, name):
    if name == "simclr":
        script.gather = plain_gather
    if name == "barlow":
        script.total = plain_total
    if name in ("byol", "simsiam"):
        globals()["synchronise"] = lambda model: None
    if name in ("moco_v2", "densecl"):
        enqueue, gather = script.enqueue, script.gather

        def own(*arguments):
            script.gather = lambda x: x
            enqueue(*arguments)
            script.gather = gather

        script.enqueue = own
    if name == "moco_v1":
        script.unshuffle = lambda k, permutation: k
    if name == "swav":
        sinkhorn, alone = script.sinkhorn, lambda: (0, 1)

        def local(*arguments):
            together, script.processes = script.processes, alone
            codes = sinkhorn(*arguments)
            script.processes = together
            return codes

        script.sinkhorn = local
    if name == "moco_v3":
        loss, alone = script.contrastive_loss, lambda: (0, 1)
        gathered = script.gather

        def without_offset(q, k, temperature):
            script.gather, k = (lambda x: x), gathered(k)
            together, script.processes = script.processes, alone
            value = loss(q, k, temperature)
            script.gather, script.processes = gathered, together
            return value

        script.contrastive_loss = without_offset


def step(name, rank=0, world_size=1):
    """A step of the method on this process's share of a fixed batch, and what came out of it."""
    script = importlib.import_module(name)
    args = small_args(script, batch_size=BATCH, bn_groups=4, projection_dim=8, queue_size=BATCH)
    torch.manual_seed(0)
    model = model_of(script)(args).double()
    if "bn_groups" not in vars(args):
        synchronise(model)
    if hasattr(model, "prototypes"):
        model.queue.normal_()  # full
    optimizer = torch.optim.SGD(  # plain: others would hide a gradient of another size
        [{"params": group["params"]} for group in script.build_optimizer(args, model).param_groups])
    views = [x.chunk(world_size)[rank] for x in views_for(args, BATCH, torch.float64)]
    network = nn.parallel.DistributedDataParallel(model) if world_size > 1 else model
    torch.manual_seed(2)  # the same permutation, whatever the number of processes
    loss = network(*views)
    loss.backward()
    found = {f"grad {n}": p.grad for n, p in model.named_parameters() if p.grad is not None}
    script.update(args, model, optimizer, args.epochs / 2)
    total = loss.detach().clone()
    if world_size > 1:
        dist.all_reduce(total)
    found |= {  # running statistics are per process where batch normalisation is
        n: v.double() for n, v in model.state_dict().items()
        if "running" not in n and "batches" not in n
    }
    return {"loss": total / world_size} | found


def work(rank, world_size, folder):
    """All scripts in one group of processes, then once more with their mistakes."""
    torch.set_num_threads(1)
    torch.Tensor.float = torch.Tensor.double  # "full precision" is double here
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", store, rank=rank, world_size=world_size)
    for broken in (False, True):  # those without synchronise come last
        for name in BROKEN if broken else SCRIPTS:
            if broken:
                break_on_purpose(importlib.import_module(name), name)
            found = step(name, rank, world_size)
            if rank == 0:
                torch.save(found, f"{folder}/{name}-{broken}.pt")
    dist.destroy_process_group()


def differences(world_size, folder):
    """{(script, broken): the largest relative difference between W processes and one}."""
    mp.spawn(work, (world_size, str(folder)), nprocs=world_size)
    found = {}
    for name in SCRIPTS:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.Tensor, "float", torch.Tensor.double)
            one = step(name)
        for broken in (False, True):
            many = torch.load(folder / f"{name}-{broken}.pt", weights_only=True)
            assert one.keys() == many.keys() and len(one) > 10
            # A bias before a batch normalisation has no gradient, only rounding errors: so 1e-4.
            found[name, broken] = max(
                ((one[k] - many[k]).norm() / (one[k].norm() + 1e-4)).item() for k in one)
    return found


@pytest.fixture(scope="module", params=[2, pytest.param(4, marks=pytest.mark.slow)])
def differ(request, tmp_path_factory):
    return differences(request.param, tmp_path_factory.mktemp("parity"))


@pytest.mark.parametrize("name", SCRIPTS)
def test_the_step_of_many_processes_is_that_of_one(name, differ):
    assert differ[name, False] < 1e-9


@pytest.mark.parametrize("name", BROKEN)
def test_a_mistake_would_be_seen(name, differ):
    assert differ[name, True] > 1e-3, BROKEN[name]
