"""Each method as a whole, forward and training, against its paper's algorithm.

The algorithms are written here a second time, with plain loops over images and from the parts of
the model (backbone, projector, predictor, prototypes, queue). Both versions see the same two
different views, in float64. Compared are the loss, the output for monitoring, the gradients of all
parameters and all that is left behind: queues, pointers, averages and running statistics."""

import copy
import importlib
import math

import pytest
import torch
from conftest import METHODS, small_args
from torch import nn

import common
import harness
from results.methods import model_class

SMALL = {  # two steps per epoch; the second batch goes beyond the end of a queue of 12
    "batch_size": 8,
    "epochs": 3,
    "warmup_epochs": 1.0,
    "weight_decay": 0.01,
    "queue_size": 12,
    "bn_groups": 2,
    "hidden_dim": 24,
    "predictor_dim": 12,
    "projection_dim": 10,
    "prototypes": 6,
    "small_crops": 2,
    "lr": 4.0,
    "lr_biases": 2.0,
    "redundancy_weight": 0.05,
    "ema_momentum": 0.8,
    "dense_weight": 0.3,
    "temperature": 0.3,
    "epsilon": 0.2,
}
IMAGES = 16


@pytest.fixture(autouse=True)
def double(monkeypatch):
    """Everything in float64, also where a script asks for float32."""
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


# ---------------------------------------------------------------------------- the naive methods
def unit(x):
    """Rows of length 1."""
    return torch.stack([row / row.square().sum().sqrt() for row in x])


def cross_entropy(logits, label):
    """Minus the logarithm of one entry of the softmax."""
    powers = [logit.exp() for logit in logits]
    return -(powers[label] / sum(powers)).log()


def write(queue, pointer, keys):
    """Replaces the oldest rows, one after the other."""
    for key in keys:
        queue[pointer.item()] = key.detach()
        pointer.copy_((pointer + 1) % len(queue))


def in_groups(network, x, groups):
    """Every slice of the batch passes through on its own, as if on a GPU of its own. The running
    statistics end at the mean of what the slices alone would have led to."""
    norms = [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)]
    before = [(norm.running_mean, norm.running_var) for norm in norms]
    means = [torch.zeros_like(mean) for mean, _ in before]
    variances = [torch.zeros_like(variance) for _, variance in before]
    outputs = []
    for part in x.split(len(x) // groups):
        for norm, (mean, variance) in zip(norms, before):
            norm.groups = 1
            norm.running_mean = mean.clone()
            norm.running_var = variance.clone()
        outputs.append(network(part))
        for i, norm in enumerate(norms):
            means[i] += norm.running_mean / groups
            variances[i] += norm.running_var / groups
    for norm, mean, variance in zip(norms, means, variances):
        norm.running_mean = mean
        norm.running_var = variance
    return torch.cat(outputs)


def shuffled_keys(network, x_k, groups):
    """Network outputs for the images, normalised among other images than their queries."""
    order = torch.randperm(len(x_k)).tolist()
    mixed = torch.stack([x_k[image] for image in order])
    outputs = in_groups(network, mixed, groups).detach()
    keys = [None] * len(order)
    for place, image in enumerate(order):
        keys[image] = outputs[place]
    return torch.stack(keys)


def simclr(model, args, x1, x2):
    """Algorithm 1: every view must find its partner among all other views."""
    n = len(x1)
    z = unit(model.projector(model.backbone(torch.cat([x1, x2]))))
    loss = 0.0
    for i in range(2 * n):
        others = [j for j in range(2 * n) if j != i]
        partner = (i + n) % (2 * n)
        logits = [z[i] @ z[j] / args.temperature for j in others]
        loss = loss + cross_entropy(logits, others.index(partner))
    return loss / (2 * n), z[:n]


def moco(model, args, x_q, x_k):
    """Algorithm 1 of MoCo v1, with shuffled batch normalisation."""
    q = unit(in_groups(model.encoder_q, x_q, args.bn_groups))
    k = unit(shuffled_keys(model.encoder_k, x_k, args.bn_groups))
    queue = model.queue.clone()
    loss = 0.0
    for i in range(len(q)):
        logits = [q[i] @ key / args.temperature for key in (k[i], *queue)]
        loss = loss + cross_entropy(logits, 0)
    write(model.queue, model.queue_ptr, k)
    return loss / len(q), q


def densecl(model, args, x_q, x_k):
    """Equations 1 to 4 (sections 3.3 and 3.4)."""
    query = model.encoder_q
    key = model.encoder_k
    h_q = in_groups(body(query.backbone), x_q, args.bn_groups)  # (B, D, H, W)
    h_k = shuffled_keys(body(key.backbone), x_k, args.bn_groups)
    n = len(x_q)
    queue = model.queue.clone()
    dense_queue = model.dense_queue.clone()
    q = unit(query.projector(h_q.mean(dim=(2, 3))))
    k = unit(key.projector(h_k.mean(dim=(2, 3)))).detach()
    loss = 0.0
    dense_loss = 0.0
    pooled = []
    for i in range(n):
        logits = [q[i] @ row / args.temperature for row in (k[i], *queue)]
        loss = loss + cross_entropy(logits, 0) / n
        cells_q = h_q[i].flatten(1).T  # (S, D)
        cells_k = h_k[i].flatten(1).T
        dense_q = unit(query.dense_projector(cells_q))
        dense_k = key.dense_projector(cells_k).detach()
        pooled.append(dense_k.mean(dim=0))
        for s, cell in enumerate(cells_q):
            similarity = [(cell @ other / other.norm()).item() for other in cells_k]
            positive = unit(dense_k)[similarity.index(max(similarity))]
            logits = [dense_q[s] @ row / args.temperature for row in (positive, *dense_queue)]
            dense_loss = dense_loss + cross_entropy(logits, 0) / (n * len(cells_q))
    write(model.queue, model.queue_ptr, k)
    write(model.dense_queue, model.dense_queue_ptr, unit(pooled))
    return (1 - args.dense_weight) * loss + args.dense_weight * dense_loss, q


def body(resnet):
    """The network up to its last feature map, without pooling and classifier."""
    return nn.Sequential(*list(resnet.children())[:-2])


def moco_v3(model, args, x1, x2):
    """Algorithm 1: each view's query must find the other view's key in the batch."""
    z1 = model.encoder_q(x1)
    z2 = model.encoder_q(x2)
    q = [unit(model.predictor(z1)), unit(model.predictor(z2))]
    k = [unit(model.encoder_k(x1)).detach(), unit(model.encoder_k(x2)).detach()]
    n = len(x1)
    loss = 0.0
    for view, other in ((0, 1), (1, 0)):
        for i in range(n):
            logits = [q[view][i] @ k[other][j] / args.temperature for j in range(n)]
            loss = loss + 2 * args.temperature * cross_entropy(logits, i) / n
    return loss, z1


def byol(model, args, x1, x2):
    """Equation 2, and the same with the views exchanged (section 3.1)."""
    z1 = model.encoder(x1)
    z2 = model.encoder(x2)
    p = [unit(model.predictor(z1)), unit(model.predictor(z2))]
    target = [unit(model.target_encoder(x1)).detach(), unit(model.target_encoder(x2)).detach()]
    loss = 0.0
    for view, other in ((0, 1), (1, 0)):
        for i in range(len(x1)):
            loss = loss + (p[view][i] - target[other][i]).square().sum() / len(x1)
    return loss, z1


def simsiam(model, args, x1, x2):
    """Algorithm 1."""
    z1 = model.encoder(x1)
    z2 = model.encoder(x2)
    p = [unit(model.predictor(z1)), unit(model.predictor(z2))]
    target = [unit(z1.detach()), unit(z2.detach())]
    loss = 0.0
    for view, other in ((0, 1), (1, 0)):
        for i in range(len(x1)):
            loss = loss - p[view][i] @ target[other][i] / len(x1) / 2
    return loss, z1


def barlow(model, args, x1, x2):
    """Equations 1 and 2."""
    n = len(x1)
    z1 = model.bn(model.projector(model.backbone(x1)))
    z2 = model.bn(model.projector(model.backbone(x2)))
    loss = 0.0
    for i in range(z1.shape[1]):
        for j in range(z1.shape[1]):
            c = sum(z1[b, i] * z2[b, j] for b in range(n)) / n
            loss = loss + ((1 - c) ** 2 if i == j else args.redundancy_weight * c**2)
    return loss, z1


def swav(model, args, *crops):
    """Equations 1 to 5, with multi-crop and queue (section 3)."""
    n = len(crops[0])
    with torch.no_grad():
        model.prototypes.weight.copy_(unit(model.prototypes.weight))
    h = [model.backbone(torch.cat(crops[:2]))]
    if len(crops) > 2:
        h.append(model.backbone(torch.cat(crops[2:])))
    z = unit(model.projector(torch.cat(h))).split(n)
    prototypes = model.prototypes.weight
    full = args.queue_size > 0 and model.queue[-1].abs().sum() > 0
    loss = 0.0
    for i in (0, 1):
        images = [*z[i], *model.queue[:, i]] if full else list(z[i])
        codes = sinkhorn([[(row @ p).item() for p in prototypes] for row in images], args)
        others = [v for v in range(len(crops)) if v != i]
        for v in others:
            for b in range(n):
                logits = [z[v][b] @ p / args.temperature for p in prototypes]
                for p in range(args.prototypes):
                    term = codes[b][p] * cross_entropy(logits, p)
                    loss = loss + term / n / len(others) / 2
    return loss, torch.cat(z[:2])


def sinkhorn(scores, args):
    codes = [[math.exp(score / args.epsilon) for score in row] for row in scores]
    for _ in range(args.sinkhorn_iterations):
        sums = [sum(row[p] for row in codes) for p in range(args.prototypes)]
        codes = [[code / total for code, total in zip(row, sums)] for row in codes]
        codes = [[code / sum(row) for code in row] for row in codes]
    return codes


FORWARD = {
    "simclr": simclr,
    "moco_v1": moco,
    "moco_v2": moco,
    "moco_v3": moco_v3,
    "byol": byol,
    "simsiam": simsiam,
    "barlow": barlow,
    "swav": swav,
    "densecl": densecl,
}


# ------------------------------------------------------------------------------------- forward
def noise(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def compare(made, expected, what):
    assert made.shape == expected.shape, what
    assert torch.allclose(made, expected, rtol=1e-8, atol=1e-9), what


def compare_state(made, expected):
    for name, value in expected.state_dict().items():
        if not name.endswith("num_batches_tracked"):
            compare(made.state_dict()[name], value, name)


def test_every_method_has_its_naive_version():
    assert sorted(FORWARD) == METHODS


@pytest.mark.parametrize(
    "name, flags",
    [
        *((name, {}) for name in sorted(FORWARD)),
        ("moco_v3", {"arch": "thin"}),
        ("swav", {"small_crops": 0}),
        ("swav", {"queue_size": 0}),
    ],
)
def test_forward_follows_the_paper(name, flags):
    script = importlib.import_module(name)
    args = small_args(script, **SMALL | flags)
    torch.manual_seed(0)
    model = model_class(script)(args)
    with torch.no_grad():  # no weight is left at 0 or 1, and no network equal to its average
        for i, p in enumerate(model.parameters()):
            p.add_(0.1 * noise(*p.shape, seed=i))
        if name == "swav" and args.queue_size > 0:
            model.queue.copy_(noise(*model.queue.shape, seed=1))
    naive = copy.deepcopy(model)
    for step in (1, 2):  # the second step sees what the first one left
        sides = [32, 32] + [16] * vars(args).get("small_crops", 0)
        views = [noise(8, 3, side, side, seed=10 * step + v) for v, side in enumerate(sides)]
        torch.manual_seed(step)
        loss, z = model(*views)
        model.zero_grad()
        loss.backward()
        torch.manual_seed(step)
        expected_loss, expected_z = FORWARD[name](naive, args, *views)
        naive.zero_grad()
        expected_loss.backward()
        compare(loss, expected_loss, "loss")
        compare(z, expected_z, "z")
        assert not z.requires_grad
        for (parameter, p), expected in zip(model.named_parameters(), naive.parameters()):
            assert (p.grad is None) == (expected.grad is None), parameter
            if p.grad is not None:
                compare(p.grad, expected.grad, parameter)
        compare_state(model, naive)


# ------------------------------------------------------------------------------------ training
class Recorder(harness.Run):
    """A run without files; `train` returns it."""

    def resume(self):
        pass

    def write(self):
        pass

    def finish(self, data):
        return self


def warm_up_and_cosine(args, progress, peak, start=0.0, end=0.0):
    """start and end are fractions of the peak; progress is in epochs."""
    if progress < args.warmup_epochs:
        return peak * (start + (1 - start) * progress / args.warmup_epochs)
    left = (args.epochs - progress) / (args.epochs - args.warmup_epochs)
    return peak * (end + (1 - end) * (1 - math.cos(math.pi * left)) / 2)


def cosine_by_epoch(args, progress, peak):
    return peak * (1 + math.cos(math.pi * math.floor(progress) / args.epochs)) / 2


def rate(method, args, name, p, progress):
    """The learning rate of parameter p at this step."""
    peak = args.lr * args.batch_size / 256
    if method == "moco_v1":  # the fractions 120 / 200 and 160 / 200 of the training
        done = math.floor(progress) / args.epochs
        return peak / 10 ** ((done >= 0.6) + (done >= 0.8))
    if method == "simsiam" and name.startswith("predictor"):
        return peak
    if method in ("moco_v2", "densecl", "simsiam"):
        return cosine_by_epoch(args, progress, peak)
    if method == "barlow":
        if p.ndim == 1:
            peak = args.lr_biases * args.batch_size / 256
        return warm_up_and_cosine(args, progress, peak, end=0.001)
    if method == "swav":
        return warm_up_and_cosine(args, progress, peak, start=1 / 16, end=0.001)
    return warm_up_and_cosine(args, progress, peak)


def change(method, args, p, grad, state, lr):
    """The change of parameter p in one step of the optimizer."""
    kind = vars(args).get("optimizer", "sgd")
    decay = args.weight_decay
    if p.ndim == 1 and (method == "barlow" or kind == "lars"):
        decay = 0.0
    if kind == "adamw":
        state["t"] = state.get("t", 0) + 1
        state["m"] = 0.9 * state.get("m", 0) + 0.1 * grad
        state["v"] = 0.999 * state.get("v", 0) + 0.001 * grad**2
        mean = state["m"] / (1 - 0.9 ** state["t"])
        square = state["v"] / (1 - 0.999 ** state["t"])
        return -lr * (mean / (square.sqrt() + 1e-8) + decay * p)
    direction = grad + decay * p
    if kind == "lars" and p.ndim > 1 and p.norm() > 0 and direction.norm() > 0:
        direction = 0.001 * p.norm() / direction.norm() * direction
    if kind == "larc" and p.norm() > 0 and grad.norm() > 0:
        direction = 0.001 * p.norm() / (grad.norm() + decay * p.norm() + 1e-8) * direction
    elif kind == "larc":
        direction = grad
    if method == "simclr" and kind == "lars":
        state["v"] = 0.9 * state.get("v", 0) + lr * direction
        return -state["v"]
    state["v"] = 0.9 * state.get("v", 0) + direction
    return -lr * state["v"]


def average(method, args, model, progress):
    """The moving average after a step."""
    momentum = vars(args).get("ema_momentum")
    if method in ("byol", "moco_v3"):
        share = (1 + math.cos(math.pi * progress / args.epochs)) / 2
        momentum = 1 - (1 - momentum) * share
    if method == "byol":
        source = model.encoder
        target = model.target_encoder
    elif method.startswith("moco") or method == "densecl":
        source = model.encoder_q
        target = model.encoder_k
    else:
        return
    for p, target_p in zip(source.parameters(), target.parameters()):
        target_p.copy_(momentum * target_p + (1 - momentum) * p)


def naive_train(script, args, images):
    """All steps of a training; returns the model, and each step's loss and learning rate."""
    method = script.__name__
    torch.manual_seed(args.seed)
    model = model_class(script)(args)
    views = common.Views(images, script.build_views(args), args.batch_size, seed=args.seed)
    states = {name: {} for name, _ in model.named_parameters()}
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    lines = []
    for epoch in range(1, args.epochs + 1):
        views.set_epoch(epoch)
        for step, batch in enumerate(views):
            progress = epoch - 1 + step / len(views)
            loss, z = FORWARD[method](model, args, *batch)
            grads = torch.autograd.grad(loss, list(trained.values()))
            with torch.no_grad():
                for (name, p), grad in zip(trained.items(), grads):
                    if name == "prototypes.weight" and progress < args.freeze_epochs:
                        continue
                    lr = rate(method, args, name, p, progress)
                    p.add_(change(method, args, p, grad, states[name], lr))
                average(method, args, model, progress)
            if method == "swav" and args.queue_size > 0 and progress >= args.queue_start:
                write(model.queue, model.queue_ptr, torch.stack(z.chunk(2), dim=1))
            first = next(iter(trained))
            lr = rate(method, args, first, trained[first], progress)
            lines.append((loss.item(), lr))
    return model, lines


@pytest.mark.parametrize(
    "name, flags",
    [
        ("moco_v1", {}),
        ("moco_v2", {}),
        ("densecl", {}),
        ("simsiam", {}),
        ("simclr", {"optimizer": "lars"}),
        ("simclr", {"optimizer": "sgd"}),
        ("byol", {"optimizer": "lars"}),
        ("byol", {"optimizer": "sgd"}),
        ("moco_v3", {"optimizer": "lars", "arch": "thin"}),
        ("moco_v3", {"optimizer": "sgd"}),
        ("moco_v3", {"optimizer": "adamw", "lr": 0.1}),
        ("barlow", {"optimizer": "lars"}),
        ("barlow", {"optimizer": "sgd", "lr": 0.1, "lr_biases": 0.2}),
        ("barlow", {"optimizer": "adamw", "lr": 0.1, "lr_biases": 0.2}),
        ("swav", {"optimizer": "larc", "queue_size": 0}),
        ("swav", {"optimizer": "sgd", "queue_size": 16, "queue_start": 1}),
        ("swav", {"optimizer": "adamw", "lr": 0.1, "queue_size": 16, "freeze_epochs": 0.5}),
    ],
)
def test_training_follows_the_paper(name, flags, monkeypatch):
    script = importlib.import_module(name)
    args = small_args(script, **SMALL | flags)
    images, _ = common.patterns(IMAGES)
    monkeypatch.setattr(harness, "Run", Recorder)
    monkeypatch.setattr(script, "launch", lambda: torch.device("cpu"))
    monkeypatch.setattr(script, "load_images", lambda *_: common.Data("small", images))
    run = script.train(args)
    model, lines = naive_train(script, args, images)
    for epoch, line in enumerate(run.log[1:]):
        (first, _), (second, lr) = lines[2 * epoch : 2 * epoch + 2]
        assert line["loss"] == pytest.approx((first + second) / 2, rel=1e-8)
        assert line["lr"] == pytest.approx(lr, rel=1e-12)
    compare_state(run.model, model)
