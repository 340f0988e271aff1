"""What a training asks of a device that is not the CPU, shown without one: torch's meta device
computes nothing and refuses whatever would have to wait for a value."""

import pytest
import torch
from conftest import small_args
from torch.utils._python_dispatch import TorchDispatchMode

import common

META = torch.device("meta")


class Copies(TorchDispatchMode):
    """Notes copies between CPU and device; those that the CPU would wait for stand in `waits`."""

    def __init__(self):
        super().__init__()
        self.sent, self.waits = 0, []

    def __torch_dispatch__(self, function, types, arguments=(), settings=None):
        settings = settings or {}
        result = function(*arguments, **settings)
        source = next((x for x in arguments if torch.is_tensor(x)), None)
        if torch.is_tensor(result) and source is not None and source.device != result.device:
            self.sent += 1
            if not settings.get("non_blocking"):
                self.waits.append(str(function))
        return result


def step(script, args, augments):
    torch.manual_seed(0)
    images = torch.empty(64, 3, 32, 32, dtype=torch.uint8, device=META)
    views = common.Views(images, augments, args.batch_size, META)
    model = script.build_model(args, len(images), torch.device("cpu")).to(META)
    optimizer, batches = script.build_optimizer(args, model), iter(views)
    total = torch.zeros((), device=META)
    for _ in range(2):  # the first step allocates
        with Copies() as copies:
            loss = model(*next(batches))
            optimizer.zero_grad()
            loss.backward()
            script.update(args, model, optimizer, 0.5)
            total += loss.detach()
    return copies


@pytest.mark.parametrize("column", [0, 1])  # of the recipes, for their optimizers
def test_a_step_does_not_wait_for_the_device(script, column, monkeypatch):
    recipes, found = script.RECIPES, []
    flags = {"optimizer": recipes["optimizer"][column]} if "optimizer" in recipes else {}
    args = small_args(script, **flags)
    monkeypatch.setattr(script, "train", lambda args, augments: found.extend(augments))
    script.main(args)
    copies = step(script, args, found)
    assert copies.sent > 20 and not copies.waits


@pytest.mark.parametrize("size", [32, 96])
def test_views_with_everything_do_not_wait(size):
    augment = common.Augment(size=size, blur=0.5, solarize=0.3, bicubic=True)
    images = torch.empty(64, 3, 40, 40, dtype=torch.uint8, device=META)
    with Copies() as copies:
        augment(images, common.seeded(0))
    assert copies.sent > 20 and not copies.waits


@pytest.mark.parametrize("kind, expected", [
    ("cuda", ["pinned", ("cuda", True)]), ("cpu", [("cpu", True)]),
    ("mps", [("mps", False)]),  # where a copy that is not waited for has read freed memory
])
def test_how_a_tensor_is_sent(kind, expected):
    class Noted:
        def pin_memory(self):
            self.done.append("pinned")
            return self

        def to(self, device, non_blocking):
            self.done.append((device.type, non_blocking))
            return self

    x = Noted()
    x.is_cpu, x.done = True, []
    assert common.send(x, torch.device(kind)) is x and x.done == expected
    x.is_cpu, x.done = False, []  # there already: cannot be pinned
    assert common.send(x, torch.device(kind)) is x and "pinned" not in x.done


def test_what_waits_is_seen():
    x = torch.zeros(2, device=META)
    with Copies() as copies:
        torch.zeros(2).to(META)
        torch.ones(2).to(META, non_blocking=True)
    assert copies.sent == 2 and len(copies.waits) == 1
    for wait in (lambda: x.sum().item(), lambda: x.nonzero(), lambda: bool(x.any()), x.tolist):
        with pytest.raises((RuntimeError, NotImplementedError)):
            wait()
