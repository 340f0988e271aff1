"""What programs, tests and notebooks ask of any method. All of it is found in the scripts
themselves: a new one needs no change here."""

import importlib
import re
from pathlib import Path

import torch
from torch import nn

from common import fail

ROOT = Path(__file__).resolve().parent.parent
SHARED = ("common", "harness", "evaluate", "captions", "scenes")
SCRIPTS = sorted(path.stem for path in ROOT.glob("*.py") if path.stem not in SHARED)
# Those that learn from views of images alone; the others see captions or boxes as well.
METHODS = [name for name in SCRIPTS if name not in ("clip", "up_detr", "vild")]


def choose(names):
    """The methods named on a command line; all if none is."""
    for name in names:
        if name not in METHODS:
            fail(f"{name}: not one of {', '.join(METHODS)}")
    return names or METHODS


def parent(name):
    """The script that this one is to be compared with: the first after "Read it" in its docstring;
    None if there is none."""
    doc = importlib.import_module(name).__doc__
    found = re.search(r"Read it .*?(\w+)\.py", doc, re.DOTALL)
    return found.group(1) if found else None


def model_class(script):
    """The method's class: the only module defined in its script whose __init__ sets chance_loss."""
    found = []
    for value in vars(script).values():
        if not isinstance(value, type) or not issubclass(value, nn.Module):
            continue
        defined_here = value.__module__ == script.__name__
        if defined_here and "chance_loss" in value.__init__.__code__.co_names:
            found.append(value)
    if len(found) != 1:
        raise LookupError(f"{script.__name__}: {len(found)} classes that set chance_loss")
    return found[0]


def build_optimizer(script, args, model):
    """The optimizer of the script's train. Where train itself builds it, SGD with the same groups:
    one per part of the model that has something to train."""
    if hasattr(script, "build_optimizer"):
        return script.build_optimizer(args, model)
    groups = []
    for part in model.children():
        if any(p.requires_grad for p in part.parameters()):
            groups.append({"params": part.parameters()})
    return torch.optim.SGD(groups, lr=0.0, momentum=0.9, weight_decay=args.weight_decay)


def finish_step(script, model, z, momentum=0.9):
    """What train does after the optimizer's step: moving averages, and SwAV's queue."""
    if hasattr(model, "encoder_k"):
        script.ema_update(model.encoder_q, model.encoder_k, momentum)
    elif hasattr(model, "target_encoder"):
        script.ema_update(model.encoder, model.target_encoder, momentum)
    elif hasattr(model, "queue"):
        script.enqueue(model.queue, model.queue_ptr, torch.stack(z.chunk(2), dim=1))


def views_of(args, n, dtype=torch.float32, generator=None, device="cpu"):
    """A batch of n for `forward`: noise, as many views and of the sizes that these settings give;
    always the same without a generator."""
    if generator is None:
        generator = torch.Generator().manual_seed(1)
    script = importlib.import_module(args.method)
    views = []
    for augment in script.build_views(args):
        shape = (n, 3, augment.size, augment.size)
        view = torch.randn(shape, generator=generator, dtype=dtype).to(device)
        views.append(view.contiguous(memory_format=torch.channels_last))
    return views
