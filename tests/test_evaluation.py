"""The evaluation is honest: the backbone stays as it is, nothing is chosen on the test set."""

import json
import math

import pytest
import torch
import torch.nn.functional as F
import torchvision
from conftest import error_line, small_args, torchrun
from torch import nn

import common
import evaluate
import moco_v3
import simclr
from common import Augment, Data, make_generator
from results.methods import model_class

POOLED = nn.Sequential(nn.AdaptiveAvgPool2d(4), nn.Flatten())  # a backbone without weights


def toy(n=300, classes=5, noise=1.0, seed=0):
    """Features of classes with random centres, (N, 16), and labels (N,)."""
    centres = torch.randn(classes, 16, generator=make_generator("centres"))
    labels = torch.arange(n) % classes
    spread = torch.randn(n, 16, generator=make_generator("toy", seed))
    return centres[labels] + noise * spread, labels


def pattern_data(n=120):
    """Patterns, a third of which are the test set."""
    images, labels = common.patterns(n)
    test = n // 3
    train = (images[test:], labels[test:])
    return Data("toy", train[0], train, (images[:test], labels[:test]), common.PATTERNS)


def as_process(monkeypatch, rank, world_size):
    """What this process alone contributes: what it gets from the others is 0."""

    def all_gather(parts, mine):
        for number, part in enumerate(parts):
            part.copy_(mine if number == rank else torch.zeros_like(mine))

    monkeypatch.setattr(common, "rank", lambda: rank)
    monkeypatch.setattr(common, "world_size", lambda: world_size)
    monkeypatch.setattr(common.dist, "all_gather", all_gather)
    monkeypatch.setattr(common.dist, "all_reduce", lambda x: None)
    monkeypatch.setattr(common.dist, "broadcast", lambda x, source: None)


# ------------------------------------------------------------------------------------ features
def test_the_backbone_is_untouched_to_the_bit(folder):
    model = simclr.SimCLR(small_args(simclr))
    model(torch.randn(16, 3, 32, 32), torch.randn(16, 3, 32, 32))  # running statistics have moved
    before = {name: value.clone() for name, value in model.backbone.state_dict().items()}
    data = common.load_images(str(folder))
    view = Augment(size=32)
    result = common.linear_eval(model.backbone, data, view, "cpu")
    assert set(result) == {"linear_top1", "knn_top1", "knn_k"}
    assert result["knn_k"] == 80
    device = torch.device("cpu")
    evaluate.linear_sgd(model.backbone, data, view, device, epochs=1)
    after = model.backbone.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert model.training and model.backbone.training
    assert all(p.requires_grad and p.grad is None for p in model.backbone.parameters())


def test_features_are_those_of_eval_mode():
    model = simclr.SimCLR(small_args(simclr))
    images, _ = common.patterns(300)
    view = Augment(size=32)
    h = common.features(model.backbone, images, view, "cpu")
    model.eval()
    expected = torch.cat([model.backbone(view.plain(image[None])) for image in images])
    assert h.dtype == torch.float32
    assert torch.allclose(h, expected, atol=1e-5)


def test_each_process_computes_its_part_of_the_features(monkeypatch):
    backbone = simclr.SimCLR(small_args(simclr)).backbone
    images, _ = common.patterns(23)  # not a multiple of three
    view = Augment(size=32)
    whole = common.features(backbone, images, view, "cpu")
    for rank in range(3):
        as_process(monkeypatch, rank, 3)
        h = common.features(backbone, images, view, "cpu")
        mine = slice(8 * rank, 8 * rank + 8)
        assert h.shape == whole.shape
        assert torch.allclose(h[mine], whole[mine], atol=1e-5)


# ----------------------------------------------------------------------------------------- kNN
@pytest.mark.parametrize("k, temperature", [(7, 0.1), (200, 0.5)])
def test_knn_equals_a_plain_loop(k, temperature, monkeypatch):
    h, labels = toy()
    h_test, labels_test = toy(61, seed=1)
    correct = 0
    for x, label in zip(h_test.double(), labels_test):
        cosine = [float(x @ t / x.norm() / t.norm()) for t in h.double()]
        nearest = sorted(range(len(h)), key=lambda i: -cosine[i])[:k]
        votes = [0.0] * 5
        for i in nearest:
            votes[labels[i]] += math.exp(cosine[i] / temperature)
        if votes.index(max(votes)) == label:
            correct += 1
    plain = 100 * correct / 61
    task = (h, labels, h_test, labels_test, 5, k, temperature)
    assert common.knn(*task) == pytest.approx(plain)

    parts = []  # of three processes, each with a part of the queries
    for rank in range(3):
        as_process(monkeypatch, rank, 3)
        parts.append(common.knn(*task))
    assert sum(parts) == pytest.approx(plain)
    assert 0 < max(parts) < plain


# -------------------------------------------------------------------------------- linear probe
def newton(h, labels, decay):
    """(W, b) that fit_linear looks for, by Newton's method in float64."""
    x = torch.cat([h.double(), torch.ones(len(h), 1)], dim=1)

    def loss(weight):
        table = weight.view(17, 5)
        return F.cross_entropy(x @ table, labels) + decay * table[:-1].square().sum()

    weight = torch.zeros(17 * 5, dtype=torch.double)
    for _ in range(15):
        gradient = torch.func.grad(loss)(weight)
        hessian = torch.func.hessian(loss)(weight) + 1e-9 * torch.eye(len(weight))
        weight = weight - torch.linalg.solve(hessian, gradient)
    table = weight.view(17, 5)
    return table[:-1].T, table[-1]


def test_fitted_classifier_is_at_the_minimum():
    h, labels = toy()
    head = common.fit_linear(h, labels, 5, 1e-2)
    weight, bias = newton(h, labels, 1e-2)
    assert torch.allclose(head.weight.double(), weight, atol=2e-3)
    bias = bias - bias.mean()  # a shift of all five changes nothing
    assert torch.allclose(head.bias.double() - head.bias.mean(), bias, atol=2e-3)


def test_linear_probe_equals_newtons_method():
    """The whole of it again: standardised features, the decays in turn, the fit on all images."""
    h, labels = toy(noise=2.0)
    h_test, labels_test = toy(100, noise=2.0, seed=1)
    found = common.linear_probe(h, labels, h_test, labels_test, 5)["top1"]
    std, mean = torch.std_mean(h, dim=0)
    h = (h - mean) / std
    h_test = (h_test - mean) / std

    def top1(rows, decay, x, y):
        weight, bias = newton(h[rows], labels[rows], decay)
        hits = (x.double() @ weight.T + bias).argmax(1) == y
        return 100 * hits.double().mean().item()

    fit, choose = common.held_out(300, 60)
    chosen = [top1(fit, decay, h[choose], labels[choose]) for decay in common.DECAYS]
    decay = common.DECAYS[chosen.index(max(chosen))]
    plain = top1(torch.arange(300), decay, h_test, labels_test)
    assert 40 < plain < 90
    assert found == pytest.approx(plain, abs=1.01)  # one image at most


def test_linear_probe_finds_what_is_linear():
    h, labels = toy(noise=0.5)
    h_test, labels_test = toy(100, noise=0.5, seed=1)
    assert common.linear_probe(h, labels, h_test, labels_test, 5)["top1"] > 95
    noise = torch.randn(400, 16, generator=make_generator("noise"))
    assert common.linear_probe(noise[:300], labels, noise[300:], labels_test, 5)["top1"] < 40


def test_linear_probe_chooses_nothing_on_the_test_set(monkeypatch):
    """With other test labels, the same classifiers are fitted with the same decays."""
    h, labels = toy(noise=2.0)
    h_test, labels_test = toy(100, noise=2.0, seed=1)
    fits = []
    scored = []
    fit_linear = common.fit_linear
    accuracy = common.accuracy

    def recorded_fit(h, labels, classes, decay):
        head = fit_linear(h, labels, classes, decay)
        fits.append((len(h), decay, head.weight))
        return head

    def recorded_accuracy(scores, labels):
        scored.append(len(labels))
        return accuracy(scores, labels)

    monkeypatch.setattr(common, "fit_linear", recorded_fit)
    monkeypatch.setattr(common, "accuracy", recorded_accuracy)
    common.linear_probe(h, labels, h_test, labels_test, 5)
    first = fits.copy()
    fits.clear()
    common.linear_probe(h, labels, h_test, labels_test.roll(7), 5)
    assert scored == 2 * ([60] * len(common.DECAYS) + [100])  # the test set once, at the end
    assert [n for n, _, _ in first] == [240] * len(common.DECAYS) + [300]
    for (_, decay, weight), (_, other_decay, other_weight) in zip(first, fits, strict=True):
        assert decay == other_decay
        assert torch.equal(weight, other_weight)


def test_held_out_rows_are_always_the_same():
    fit, choose = common.held_out(100, 20)
    assert len(choose) == 20
    assert sorted(fit.tolist() + choose.tolist()) == list(range(100))
    assert torch.equal(choose, common.held_out(100, 20)[1])


def test_top5_where_there_are_more_than_ten_classes():
    scores = torch.eye(12) + torch.arange(12) / 100
    assert common.accuracy(scores, torch.arange(12)) == {"top1": 100, "top5": 100}
    found = common.accuracy(scores, torch.full((12,), 11))
    assert found == {"top1": pytest.approx(100 / 12), "top5": 100}
    found = common.accuracy(scores, torch.full((12,), 0))
    assert found == {"top1": pytest.approx(100 / 12), "top5": pytest.approx(100 / 12)}
    assert common.accuracy(scores[:, :10], torch.zeros(12).long()).keys() == {"top1"}


def test_large_data_is_left_to_the_evaluation_program():
    def data_of(n):
        images = torch.zeros(n, 3, 2, 2, dtype=torch.uint8)
        labels = torch.zeros(n).long()
        return Data("large", images, (images, labels), (images[:10], labels[:10]), ["a", "b"])

    assert not data_of(100_000).large
    data = data_of(100_001)
    assert data.large
    result = common.linear_eval(nn.Flatten(), data, Augment(size=2), "cpu")
    assert result == {"knn_top1": 100, "knn_k": 200}


def test_health():
    generator = make_generator("health")

    def random(*shape):
        return torch.randn(*shape, generator=generator)

    healthy = common.health(random(512, 64))
    assert healthy["std"] == pytest.approx(1, abs=0.02)
    assert healthy["effective_rank"] > 55
    collapsed = common.health(random(1, 64) + 1e-4 * random(512, 64))
    assert collapsed["std"] < 0.01
    assert collapsed["effective_rank"] < 1.2
    plane = common.health(random(512, 2) @ random(2, 64))
    assert plane["effective_rank"] == pytest.approx(2, abs=0.1)


# ----------------------------------------------------------------------- the papers' protocol
def test_sgd_on_crops_and_flips_learns():
    """Dark from light, on pixels averaged to 4 x 4."""
    generator = make_generator("dark and light")
    images = torch.randint(0, 128, (200, 3, 32, 32), generator=generator)
    labels = torch.arange(200) % 2
    images = (images + 100 * labels.view(-1, 1, 1, 1)).byte()
    test = (images[:50], labels[:50])
    data = Data("toy", images, (images, labels), test, ["dark", "light"])
    device = torch.device("cpu")
    assert evaluate.linear_sgd(POOLED, data, Augment(32), device, epochs=3) == {"top1": 100}


class Watched(nn.Module):
    """Constant images, whose colour is their number, stay constant in every crop: the numbers of
    the images in each batch are in `seen`."""

    seen = []

    def forward(self, x):
        numbers = (255 * x[:, :, 0, 0]).round().long()
        self.seen.append(sorted(numbers[:, 0].tolist()))
        return x.flatten(1)


def test_sgd_trains_on_all_training_images_after_the_choice():
    numbers = torch.arange(150, dtype=torch.uint8)
    images = numbers.view(-1, 1, 1, 1).expand(150, 3, 8, 8)
    labels = numbers.long() % 2
    train = (images[:100], labels[:100])
    data = Data("toy", train[0], train, (images[100:], labels[100:]), ["even", "odd"])
    view = Augment(8, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
    Watched.seen.clear()
    evaluate.linear_sgd(Watched(), data, view, torch.device("cpu"), epochs=1)
    fit, choose = common.held_out(100, 20)
    batches = [batch for batch in Watched.seen if len(batch) > 1]  # but for one image of zeros
    assert batches == [
        sorted(fit.tolist()),  # one batch, seen by the classifiers of all rates
        sorted(choose.tolist()),
        list(range(100)),  # the classifier that is tested
        list(range(100, 150)),
    ]


def test_sgd_holds_out_ten_thousand_images_at_most(monkeypatch):
    calls = []

    def untrained(backbone, data, rows, view, device, epochs, rates, workers):
        calls.append((len(rows), tuple(rates)))
        return [nn.Linear(12, 2) for _ in rates]

    monkeypatch.setattr(evaluate, "train_heads", untrained)
    images = torch.zeros(60_000, 3, 2, 2, dtype=torch.uint8)
    labels = torch.arange(60_000) % 2
    data = Data("toy", images, (images, labels), (images[:10], labels[:10]), ["a", "b"])
    evaluate.linear_sgd(nn.Flatten(), data, Augment(2), torch.device("cpu"), epochs=1)
    assert calls[0] == (50_000, evaluate.RATES)
    assert calls[1][0] == 60_000 and len(calls[1][1]) == 1


def test_sgd_chooses_nothing_on_the_test_set(monkeypatch):
    """The rate is the best on held-out images; the test set is looked at once, at the end."""
    scored = []
    trained = []
    accuracy = evaluate.accuracy
    train_heads = evaluate.train_heads

    def recorded_accuracy(scores, labels):
        found = accuracy(scores, labels)
        scored.append((len(labels), found["top1"]))
        return found

    def recorded_training(*arguments):
        heads = train_heads(*arguments)
        trained.append((arguments[6], heads[0].weight))
        return heads

    monkeypatch.setattr(evaluate, "accuracy", recorded_accuracy)
    monkeypatch.setattr(evaluate, "train_heads", recorded_training)
    data = pattern_data()
    device = torch.device("cpu")
    evaluate.linear_sgd(POOLED, data, Augment(32), device, epochs=3)
    data.test = (data.test[0], data.test[1].roll(7))
    evaluate.linear_sgd(POOLED, data, Augment(32), device, epochs=3)

    assert [n for n, _ in scored] == 2 * ([16] * len(evaluate.RATES) + [40])
    held_out = [top1 for _, top1 in scored[: len(evaluate.RATES)]]
    assert len(set(held_out)) > 1
    best = evaluate.RATES[held_out.index(max(held_out))]
    rates = [rates for rates, _ in trained]
    assert rates == [evaluate.RATES, [best]] * 2
    assert torch.equal(trained[1][1], trained[3][1])


# --------------------------------------------------------------------------------- our own runs
@pytest.fixture(scope="module")
def trained(folder, tmp_path_factory):
    """(checkpoint, result) of a run of SimCLR over one epoch."""
    out = tmp_path_factory.mktemp("simclr")
    result = simclr.main(small_args(simclr, data=folder, out=out, epochs=1))
    return out / "checkpoint.pt", result


def evaluated(*command):
    return evaluate.main(evaluate.parse_args([str(word) for word in command]))


def test_our_resnet_is_evaluated_again(trained, folder):
    checkpoint, result = trained
    again = evaluated(checkpoint, "--data", folder)
    assert again == {key: result[key] for key in ("linear_top1", "knn_top1", "knn_k")}


def test_our_vit_is_evaluated_again(folder, tmp_path, capsys):
    result = moco_v3.main(small_args(moco_v3, data=folder, out=tmp_path, epochs=1))
    again = evaluated(tmp_path / "checkpoint.pt", "--data", folder)
    assert again == {key: result[key] for key in ("linear_top1", "knn_top1", "knn_k")}
    assert "moco_v3, vit_thin, epoch 1; left out: " in capsys.readouterr().out


def test_the_backbone_of_every_script_is_found(script, tmp_path):
    args = small_args(script)
    model = model_class(script)(args)
    content = {"args": vars(args), "log": [{"epoch": 0}], "random_state": {}}
    torch.save(content | {"model": model.state_dict()}, tmp_path / "checkpoint.pt")
    backbone, view, description = evaluate.load_backbone(tmp_path / "checkpoint.pt")
    assert description.startswith(f"{args.method}, {args.arch}, epoch 0; left out: ")
    assert view == script.build_views(args)[0]
    found = backbone.state_dict()
    expected = model.backbone.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)


@pytest.mark.parametrize("epochs", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_two_processes_measure_what_one_measures(epochs, trained, folder, capsys):
    command = [trained[0], "--data", folder, "--workers", "0", "--epochs", epochs]
    capsys.readouterr()
    found = evaluated(*command)
    one = capsys.readouterr().out
    two = torchrun(2, "evaluate.py", *command)
    assert two.returncode == 0, two.stderr[-3000:]
    assert one == two.stdout
    assert f"{trained[0]}: simclr, thin, epoch 1; left out: projector\n" in one
    assert json.loads(one.splitlines()[-1]) == {"data": "small", **found}


def test_large_data_gets_the_papers_protocol(trained, folder, monkeypatch):
    calls = []

    def linear_sgd(backbone, data, view, device, epochs, workers):
        calls.append(epochs)
        return {"top1": 1.0, "top5": 2.0}

    monkeypatch.setattr(Data, "large", True)
    monkeypatch.setattr(evaluate, "linear_sgd", linear_sgd)
    found = evaluated(trained[0], "--data", folder)
    assert calls == [100]
    assert found["linear_top1"] == 1 and found["linear_top5"] == 2


# -------------------------------------------------------------------------- official checkpoints
def under(prefix, state):
    return {prefix + name: value for name, value in state.items()}


def official(layout, arch):
    """What the official code of a method saves, and the backbone's weights in it."""
    network = getattr(torchvision.models, arch)()
    whole = network.state_dict()
    body = {name: value for name, value in whole.items() if not name.startswith("fc.")}
    head = {"0.weight": torch.zeros(4, 4)}
    if layout == "moco":
        state = under("module.encoder_q.", body) | under("module.encoder_q.fc.", head)
        state |= under("module.encoder_k.", body)
        state |= {"module.queue": torch.zeros(4, 8), "module.queue_ptr": torch.zeros(1).long()}
        return {"epoch": 200, "arch": arch, "state_dict": state}, body
    if layout == "moco_v3":
        state = under("module.base_encoder.", body) | under("module.momentum_encoder.", body)
        return {"state_dict": state | under("module.predictor.", head)}, body
    if layout == "simsiam":
        state = under("module.encoder.", body) | under("module.encoder.fc.", head)
        return {"state_dict": state | under("module.predictor.", head)}, body
    if layout == "barlow":
        state = under("module.backbone.", body) | under("module.projector.", head)
        return {"epoch": 1, "model": state}, body
    if layout == "swav":
        state = under("module.", body) | under("module.projection_head.", head)
        return state | {"module.prototypes.weight": torch.zeros(4, 4)}, body
    if layout == "densecl":
        state = under("encoder_q.0.", body) | under("encoder_q.1.mlp.", head)
        return {"state_dict": state | under("backbone.", body)}, body
    return whole, body


@pytest.mark.parametrize(
    "layout, arch, unused",
    [
        ("moco", "resnet50", "encoder_k, fc, queue, queue_ptr"),
        ("moco_v3", "resnet18", "momentum_encoder, predictor"),
        ("simsiam", "resnet18", "fc, predictor"),
        ("barlow", "resnet18", "projector"),
        ("swav", "resnet50", "projection_head, prototypes"),
        ("densecl", "resnet18", "backbone, encoder_q"),
        ("torchvision", "resnet34", "fc"),
    ],
)
def test_official_checkpoints_are_recognised(layout, arch, unused, tmp_path):
    content, body = official(layout, arch)
    torch.save(content, tmp_path / "official.pth")
    backbone, view, description = evaluate.load_backbone(tmp_path / "official.pth")
    assert description.startswith(f"{arch}, ")
    assert description.endswith(f"; left out: {unused}")
    assert view.size == 224
    found = backbone.state_dict()
    assert found.keys() == body.keys()
    assert all(torch.equal(found[name], body[name]) for name in body)


def official_vit(dim):
    """Random weights of MoCo v3's ViT under their official names."""
    generator = make_generator("vit", dim)

    def draw(*shape):
        return torch.randn(*shape, generator=generator) / shape[-1] ** 0.5

    state = {"cls_token": draw(1, 1, dim), "pos_embed": draw(1, 197, dim)}
    state["patch_embed.proj.weight"] = draw(dim, 3, 16, 16) / 16
    state["patch_embed.proj.bias"] = draw(dim)
    norms = ["norm"]
    for i in range(12):
        linear = {
            "attn.qkv": (3 * dim, dim),
            "attn.proj": (dim, dim),
            "mlp.fc1": (4 * dim, dim),
            "mlp.fc2": (dim, 4 * dim),
        }
        for name, shape in linear.items():
            state[f"blocks.{i}.{name}.weight"] = draw(*shape)
            state[f"blocks.{i}.{name}.bias"] = draw(shape[0])
        norms += [f"blocks.{i}.norm1", f"blocks.{i}.norm2"]
    for name in norms:
        state[f"{name}.weight"] = 1 + draw(dim)
        state[f"{name}.bias"] = draw(dim)
    return state


def official_forward(state, x, dim, heads=12):
    """What the official code computes from these weights, written out plainly."""

    def part(name):
        return state[name + ".weight"], state[name + ".bias"]

    def norm(x, name):
        return F.layer_norm(x, (dim,), *part(name), eps=1e-6)

    x = F.conv2d(x, *part("patch_embed.proj"), stride=16)
    x = x.flatten(2).mT
    x = torch.cat([state["cls_token"].expand(len(x), 1, dim), x], dim=1) + state["pos_embed"]
    for i in range(12):
        block = f"blocks.{i}."
        qkv = F.linear(norm(x, block + "norm1"), *part(block + "attn.qkv"))
        qkv = qkv.view(len(x), 197, 3, heads, dim // heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        weight = (q @ k.mT / (dim // heads) ** 0.5).softmax(-1)
        mixed = (weight @ v).transpose(1, 2).reshape(len(x), 197, dim)
        x = x + F.linear(mixed, *part(block + "attn.proj"))
        hidden = F.gelu(F.linear(norm(x, block + "norm2"), *part(block + "mlp.fc1")))
        x = x + F.linear(hidden, *part(block + "mlp.fc2"))
    return norm(x, "norm")[:, 0]


@pytest.mark.parametrize("name, dim", [("vit_small", 384), ("vit_base", 768)])
def test_official_vit_is_recognised_and_computes_the_same(name, dim, tmp_path):
    body = official_vit(dim)
    state = under("module.base_encoder.", body) | under("module.momentum_encoder.", body)
    state |= {"module.base_encoder.head.0.weight": torch.zeros(4, 4)}
    torch.save({"state_dict": state}, tmp_path / "official.pth")
    backbone, _, description = evaluate.load_backbone(tmp_path / "official.pth")
    assert description == f"{name}, MoCo v3; left out: head, momentum_encoder"
    x = torch.randn(2, 3, 224, 224)
    with torch.no_grad():
        found = backbone.eval()(x)
        expected = official_forward(body, x, dim)
    assert torch.allclose(found, expected, atol=1e-3, rtol=1e-3)


def test_what_is_no_backbone_is_refused(tmp_path, capsys):
    path = tmp_path / "x.pth"
    content, _ = official("moco", "resnet18")
    state = content["state_dict"]
    cut = {name: value for name, value in state.items() if "layer4" not in name}
    for content, part in (
        ({"weights": torch.zeros(2)}, "no ResNet"),
        ([1, 2], "no weights"),
        ({}, "no ResNet"),
        (cut, "none of resnet18"),
    ):
        torch.save(content, path)
        assert part in error_line(capsys, evaluate.load_backbone, path)


class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_code_in_a_checkpoint_is_not_run(tmp_path, capsys):
    torch.save({"model": Bomb(tmp_path / "ran")}, tmp_path / "bomb.pt")
    line = error_line(capsys, evaluated, tmp_path / "bomb.pt")
    assert "not a readable checkpoint" in line
    assert "weights_only" not in line
    assert not (tmp_path / "ran").exists()


# ------------------------------------------------------------------------- torchvision's names
@pytest.mark.parametrize("arch", ["resnet18", "resnet50"])
def test_our_backbones_load_in_torchvision(script, arch):
    """Those for images over 64 pixels; the others have another first convolution."""
    backbone = script.build_backbone(small_args(script, arch=arch, size=72))
    network = getattr(torchvision.models, arch)()
    assert backbone.dim == network.fc.in_features
    missing, unexpected = network.load_state_dict(backbone.state_dict(), strict=False)
    assert set(missing) == {"fc.weight", "fc.bias"} and not unexpected


@pytest.mark.slow
def test_backbone_file_loads_in_torchvision(folder, tmp_path):
    simclr.main(small_args(simclr, data=folder, out=tmp_path, epochs=1, arch="resnet18", size=72))
    state = torch.load(tmp_path / "backbone.pt", weights_only=True)
    missing, unexpected = torchvision.models.resnet18().load_state_dict(state, strict=False)
    assert set(missing) == {"fc.weight", "fc.bias"} and not unexpected
