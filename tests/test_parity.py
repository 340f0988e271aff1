"""W processes are one process: the loss, every gradient and the state after the step, in float64,
on gloo. Each script is also broken on purpose, to see that the comparison would notice.

Where batch normalisation is global by design, all processes get a differentiable synchronised one
of this file's own (torch's refuses the CPU); where it is per group, one process has the groups."""

import importlib

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from conftest import METHODS, small_args
from torch import nn
from results.methods import build_optimizer, finish_step, model_class, views_of

BATCH = 16
LOCAL = "batch normalisation of the local batch"
BROKEN = {name: LOCAL for name in METHODS} | {  # mistakes that others have made
    "simclr": "a gather without gradient",
    "barlow": "a sum over processes without gradient",
    "swav": "Sinkhorn over the local batch",
    "moco_v1": "keys left shuffled",
    "moco_v2": "a queue of the process's own keys only",
    "densecl": "a queue of the process's own keys only",
    "moco_v3": "labels without the offset of the rank",
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
        self.weight = old.weight
        self.bias = old.bias
        self.eps = old.eps

    def forward(self, x):
        dims = [0, *range(2, x.ndim)]
        shape = [1, -1] + [1] * (x.ndim - 2)
        sums = torch.stack([x.sum(dims), x.square().sum(dims), torch.ones_like(x).sum(dims)])
        if dist.is_initialized():
            sums = Sum.apply(sums)
        mean = sums[0] / sums[2]
        variance = sums[1] / sums[2] - mean**2
        x = (x - mean.view(shape)) * (variance + self.eps).rsqrt().view(shape)
        if self.weight is not None:
            x = x * self.weight.view(shape) + self.bias.view(shape)
        return x


def synchronise(module):
    for name, child in module.named_children():
        if isinstance(child, nn.BatchNorm1d | nn.BatchNorm2d):
            setattr(module, name, GlobalBatchNorm(child))
        else:
            synchronise(child)


def refuse_what_nccl_scrambles(all_gather):
    """gloo keeps the pixels of channels_last images in order; nccl does not."""

    def strict(parts, x):
        assert x.is_contiguous()
        all_gather(parts, x)

    return strict


# ------------------------------------------------------------------------------------ mistakes
def gather_without_gradient(x):
    parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, x.detach())
    parts[dist.get_rank()] = x
    return torch.cat(parts)


def sum_without_gradient(x):
    total = x.detach().clone()
    dist.all_reduce(total)
    return total - x.detach() + x


def with_names(script, function, **names):
    """The function, during which these names of its script mean something else."""

    def changed(*arguments):
        with pytest.MonkeyPatch.context() as patch:
            for name, value in names.items():
                patch.setattr(script, name, value)
            return function(*arguments)

    return changed


def break_on_purpose(name):
    script = importlib.import_module(name)
    if name == "simclr":
        script.gather = gather_without_gradient
    elif name == "barlow":
        script.all_sum = sum_without_gradient
    elif name == "swav":
        script.sinkhorn = with_names(script, script.sinkhorn, world_size=lambda: 1)
    elif name == "moco_v1":
        script.unshuffle = lambda k, permutation: k
    elif name in ("moco_v2", "densecl"):
        script.enqueue = with_names(script, script.enqueue, gather=lambda x: x)
    elif name == "moco_v3":
        loss = script.contrastive_loss
        script.contrastive_loss = with_names(script, loss, rank=lambda: 0)


# -------------------------------------------------------------------------------------- parity
def step(name, rank=0, world_size=1, broken=False):
    """A step of the method on this process's share of a fixed batch, and what came out of it."""
    script = importlib.import_module(name)
    args = small_args(script, batch_size=BATCH, bn_groups=4, projection_dim=8, queue_size=BATCH)
    torch.manual_seed(0)
    model = model_class(script)(args).double()
    local = broken and BROKEN[name] == LOCAL
    if "bn_groups" not in vars(args) and not local:
        synchronise(model)
    if hasattr(model, "prototypes"):
        model.queue.normal_()  # full
    groups = [{"params": g["params"]} for g in build_optimizer(script, args, model).param_groups]
    optimizer = torch.optim.SGD(groups, lr=0.1)  # others would hide a gradient of another size
    views = []
    for view in views_of(args, BATCH, torch.float64):  # in the layout that Views gives them
        share = view.chunk(world_size)[rank]
        views.append(share.contiguous(memory_format=torch.channels_last))
    network = nn.parallel.DistributedDataParallel(model) if world_size > 1 else model
    torch.manual_seed(2)  # the same permutation, whatever the number of processes
    loss, z = network(*views)
    loss.backward()
    found = {}
    for parameter, p in model.named_parameters():
        if p.grad is not None:
            found[f"gradient of {parameter}"] = p.grad
    optimizer.step()
    finish_step(script, model, z)
    for key, value in model.state_dict().items():
        if "running" not in key and "batches" not in key:  # per process, as is their batch norm
            found[key] = value.double()
    total = loss.detach().clone()
    if world_size > 1:
        dist.all_reduce(total)
    found["loss"] = total / world_size
    return found


def work(rank, world_size, folder):
    """All scripts in one group of processes, then once more with their mistakes."""
    torch.Tensor.float = torch.Tensor.double  # "full precision" is double here
    dist.all_gather = refuse_what_nccl_scrambles(dist.all_gather)
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", store, rank=rank, world_size=world_size)
    for broken in (False, True):
        for name in BROKEN if broken else METHODS:
            if broken:
                break_on_purpose(name)
            found = step(name, rank, world_size, broken)
            torch.save(found, f"{folder}/{name}-{broken}-{rank}.pt")
    dist.destroy_process_group()


def difference(one, many):
    """The largest relative difference between two results of `step`."""
    assert one.keys() == many.keys()
    assert len(one) > 10
    found = []
    for key, value in one.items():
        # A bias before a batch normalisation has no gradient, only rounding errors: so 1e-4.
        found.append(((value - many[key]).norm() / (value.norm() + 1e-4)).item())
    return max(found)


@pytest.fixture(scope="module", params=[2, pytest.param(4, marks=pytest.mark.slow)])
def differences(request, tmp_path_factory):
    """{(script, broken): the largest difference between one process and any of W}."""
    world_size = request.param
    folder = tmp_path_factory.mktemp("parity")
    mp.spawn(work, (world_size, str(folder)), nprocs=world_size)
    found = {}
    for name in METHODS:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.Tensor, "float", torch.Tensor.double)
            one = step(name)
        for broken in (False, True):
            paths = [folder / f"{name}-{broken}-{rank}.pt" for rank in range(world_size)]
            many = [torch.load(path, weights_only=True) for path in paths]
            found[name, broken] = max(difference(one, process) for process in many)
    return found


@pytest.mark.parametrize("name", METHODS)
def test_the_step_of_many_processes_is_that_of_one(name, differences):
    assert differences[name, False] < 1e-9


@pytest.mark.parametrize("name", BROKEN)
def test_a_mistake_is_noticed(name, differences):
    print(f"{differences[name, False]:.1e}, broken {differences[name, True]:.1e}")
    assert differences[name, True] > 1e-3, BROKEN[name]
