"""What a training asks of a device that is not the CPU, shown without one: torch's meta device
computes nothing and refuses whatever would have to wait for a value."""

import importlib

import pytest
import torch
from conftest import METHODS, small_args
from torch.utils._python_dispatch import TorchDispatchMode

import common
from results.methods import build_optimizer, finish_step, model_class

META = torch.device("meta")


class Copies(TorchDispatchMode):
    """Counts copies between CPU and device, and notes those that the CPU would wait for."""

    def __init__(self):
        super().__init__()
        self.sent = 0
        self.waits = []

    def __torch_dispatch__(self, function, types, arguments=(), settings=None):
        settings = settings or {}
        result = function(*arguments, **settings)
        source = next((x for x in arguments if torch.is_tensor(x)), None)
        if torch.is_tensor(result) and source is not None and source.device != result.device:
            self.sent += 1
            if not settings.get("non_blocking"):
                self.waits.append(str(function))
        return result


def images(side):
    return torch.empty(64, 3, side, side, dtype=torch.uint8, device=META)


def optimizers():
    """(script, flags) for each optimizer that a recipe of the script uses."""
    found = []
    for name in METHODS:
        settings = importlib.import_module(name).SETTINGS
        if "optimizer" in settings:
            *kinds, _ = settings["optimizer"]
            found += [(name, {"optimizer": kind}) for kind in dict.fromkeys(kinds)]
        else:
            found.append((name, {}))
    return found


@pytest.mark.parametrize("name, flags", optimizers())
def test_a_step_does_not_wait_for_the_device(name, flags):
    script = importlib.import_module(name)
    args = small_args(script, **flags)
    views = iter(common.Views(images(32), script.build_views(args), args.batch_size, META))
    model = model_class(script)(args).to(META)
    optimizer = build_optimizer(script, args, model)
    total = torch.zeros((), device=META)
    for _ in range(2):  # the first step allocates
        with Copies() as copies:
            loss, z = model(*next(views))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            finish_step(script, model, z)
            total = total + loss.detach()
    assert copies.sent > 20
    assert not copies.waits


@pytest.mark.parametrize("size", [32, 96])
def test_views_with_everything_do_not_wait(size):
    augment = common.Augment(
        size=size,
        jitter=(0.8, 0.8, 0.8, 0.2),
        jitter_p=0.8,
        grayscale=0.2,
        blur=0.5,
        solarize=0.3,
        bicubic=True,
    )
    with Copies() as copies:
        augment(images(40), common.make_generator(0))
    assert copies.sent > 20
    assert not copies.waits


@pytest.mark.parametrize(
    "kind, expected",
    [
        ("cuda", ["pinned", ("cuda", True)]),
        ("cpu", [("cpu", True)]),
        ("mps", [("mps", False)]),  # where a copy that is not waited for has read freed memory
    ],
)
def test_how_a_tensor_is_sent(kind, expected):
    class Noted:
        def __init__(self, is_cpu):
            self.is_cpu = is_cpu
            self.done = []

        def pin_memory(self):
            self.done.append("pinned")
            return self

        def to(self, device, non_blocking):
            self.done.append((device.type, non_blocking))
            return self

    x = Noted(is_cpu=True)
    assert common.to_device(x, torch.device(kind)) is x
    assert x.done == expected
    x = Noted(is_cpu=False)  # there already: cannot be pinned
    assert common.to_device(x, torch.device(kind)) is x
    assert x.done == expected[-1:]


def test_a_wait_is_noticed():
    x = torch.zeros(2, device=META)
    with Copies() as copies:
        torch.zeros(2).to(META)
        torch.ones(2).to(META, non_blocking=True)
    assert copies.sent == 2
    assert len(copies.waits) == 1
    for wait in (lambda: x.sum().item(), lambda: x.nonzero(), lambda: bool(x.any()), x.tolist):
        with pytest.raises((RuntimeError, NotImplementedError)):
            wait()


@pytest.mark.parametrize("mistake", [torch.Tensor.item, torch.Tensor.cpu])
def test_a_loss_that_is_read_within_a_step_is_noticed(mistake, monkeypatch):
    model = model_class(importlib.import_module("simclr"))
    forward = model.forward

    def waiting(*arguments):
        loss, z = forward(*arguments)
        mistake(loss)
        return loss, z

    monkeypatch.setattr(model, "forward", waiting)
    with pytest.raises((RuntimeError, NotImplementedError)):
        test_a_step_does_not_wait_for_the_device("simclr", {})
