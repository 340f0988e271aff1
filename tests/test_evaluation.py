"""The evaluation is honest: frozen to the bit, nothing chosen on the test set."""

import importlib
import json
import math

import pytest
import simclr
import torch
import torch.nn.functional as F
import torchvision
from conftest import error_line, small_args, torchrun
from torch import nn

import common


def toy(n=300, classes=5, noise=1.0, seed=0):
    """Features of classes with random centres, (N, 16), and labels (N,)."""
    chance = torch.Generator().manual_seed(seed)
    centres = torch.randn(classes, 16, generator=torch.Generator().manual_seed(7))
    labels = torch.arange(n) % classes
    return centres[labels] + noise * torch.randn(n, 16, generator=chance), labels


def small_data(folder):
    return common.load(str(folder))


def test_the_backbone_is_untouched_to_the_bit(folder):
    model = simclr.SimCLR(small_args(simclr))
    model(torch.randn(16, 3, 32, 32), torch.randn(16, 3, 32, 32))  # running statistics have moved
    before = {name: value.clone() for name, value in model.backbone.state_dict().items()}
    data, augment = small_data(folder), common.adapt(common.AUGMENTS["simclr"], 32)[0]
    for epochs in (0, 1):
        result = common.linear_eval(model.backbone, data, augment, "cpu", epochs=epochs)
        assert set(result) == {"linear_top1", "knn_top1", "knn_k"} and result["knn_k"] == 80
    after = model.backbone.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert model.training and model.backbone.training
    assert all(p.requires_grad and p.grad is None for p in model.backbone.parameters())


def test_features_are_those_of_eval_mode(folder):
    model = simclr.SimCLR(small_args(simclr))
    data, augment = small_data(folder), common.Augment(size=32)
    h = common.features(model.backbone, data.train[0], augment, "cpu")
    model.eval()
    expected = torch.cat([model.backbone(augment.plain(x[None])) for x in data.train[0]])
    assert torch.allclose(h, expected, atol=1e-5)


@pytest.mark.parametrize("k, temperature", [(7, 0.1), (200, 0.5)])
def test_knn_is_the_plain_one(k, temperature):
    (h, labels), (h_test, truth) = toy(), toy(60, seed=1)
    correct = 0
    for x, y in zip(h_test.double(), truth):
        cosine = [float(x @ t / x.norm() / t.norm()) for t in h.double()]
        nearest = sorted(range(len(h)), key=lambda i: -cosine[i])[:k]
        votes = [0.0] * 5
        for i in nearest:
            votes[labels[i]] += math.exp(cosine[i] / temperature)
        correct += votes.index(max(votes)) == y
    assert common.knn(h, labels, h_test, truth, 5, k, temperature) == pytest.approx(
        100 * correct / 60
    )


def test_fitted_classifier_is_at_the_minimum():
    h, labels = toy()
    head = common.fit_linear(h, labels, 5, 1e-2)
    weight, bias = nn.Parameter(torch.zeros(5, 16)), nn.Parameter(torch.zeros(5))
    optimizer = torch.optim.SGD([weight, bias], lr=0.3)
    for _ in range(3000):
        optimizer.zero_grad()
        loss = (
            nn.functional.cross_entropy(h @ weight.T + bias, labels) + 1e-2 * weight.square().sum()
        )
        loss.backward()
        optimizer.step()
    assert torch.allclose(head.weight, weight, atol=2e-3)


def test_linear_probe_finds_what_is_linear():
    (h, labels), (h_test, truth) = toy(noise=0.5), toy(100, noise=0.5, seed=1)
    assert common.linear_probe(h, labels, h_test, truth, 5)["top1"] > 95
    useless = torch.randn(300, 16), torch.randn(100, 16)
    assert common.linear_probe(useless[0], labels, useless[1], truth, 5)["top1"] < 40


def test_nothing_is_chosen_on_the_test_set(monkeypatch):
    """With other test labels the same classifiers are fitted with the same decays."""
    (h, labels), (h_test, truth) = toy(noise=2.0), toy(100, noise=2.0, seed=1)
    fits, fit_linear = [], common.fit_linear

    def recorded(h, labels, classes, decay):
        head = fit_linear(h, labels, classes, decay)
        fits.append((decay, head.weight))
        return head

    monkeypatch.setattr(common, "fit_linear", recorded)
    common.linear_probe(h, labels, h_test, truth, 5)
    common.linear_probe(h, labels, h_test, truth.roll(7), 5)
    first, second = fits[: len(fits) // 2], fits[len(fits) // 2 :]
    assert len(first) == len(common.DECAYS) + 1
    assert all(a == b and torch.equal(x, y) for (a, x), (b, y) in zip(first, second))


def test_no_classifier_of_sgd_is_chosen_on_the_test_set(monkeypatch):
    """With other test labels the chosen one of the seven classifiers says the same."""
    scores, accuracy = [], common.accuracy

    def recorded(outputs, labels):
        scores.append(outputs)
        return accuracy(outputs, labels)

    monkeypatch.setattr(common, "accuracy", recorded)
    images, labels = common.patterns(120)
    for truth in (labels[:40], labels[:40].roll(7)):
        data = common.Data("toy", images, (images, labels), (images[:40], truth), common.PATTERNS)
        backbone = nn.Sequential(nn.AdaptiveAvgPool2d(4), nn.Flatten())
        common.linear_eval(backbone, data, common.Augment(size=32), "cpu", epochs=2)
    assert len(scores) == 2 * (len(common.RATES) + 1)
    assert torch.equal(scores[len(common.RATES)], scores[-1])


def test_linear_probe_is_the_plain_one():
    """The whole of it again: standardised features, Newton's method in float64, decays in turn."""
    (h, labels), (h_test, truth) = toy(noise=2.0), toy(100, noise=2.0, seed=1)
    found = common.linear_probe(h, labels, h_test, truth, 5)["top1"]
    h, h_test = (((x - h.mean(0)) / h.std(0)).double() for x in (h, h_test))

    def fit(rows, decay):
        x = torch.cat([h[rows], torch.ones(len(rows), 1)], dim=1)
        weight = torch.zeros(5 * 17, dtype=torch.double)

        def loss(weight):
            table = weight.view(17, 5)
            return F.cross_entropy(x @ table, labels[rows]) + decay * table[:-1].square().sum()

        for _ in range(15):
            slope = torch.func.grad(loss)(weight)
            curve = torch.func.hessian(loss)(weight) + 1e-9 * torch.eye(len(weight))
            weight = weight - torch.linalg.solve(curve, slope)
        return weight.view(17, 5)

    def top1(table, x, y):
        x = torch.cat([x, torch.ones(len(x), 1)], dim=1)
        return 100 * ((x @ table).argmax(1) == y).double().mean().item()

    rows, choose = common.held_out(len(h))
    held = [top1(fit(rows, decay), h[choose], labels[choose]) for decay in common.DECAYS]
    decay = common.DECAYS[held.index(max(held))]
    plain = top1(fit(torch.arange(len(h)), decay), h_test, truth)
    assert found == pytest.approx(plain, abs=1.01) and 40 < plain < 90  # an image at most


def test_held_out_rows_are_a_fifth_and_always_the_same():
    fit, choose = common.held_out(100)
    assert len(choose) == 20 and sorted([*fit.tolist(), *choose.tolist()]) == list(range(100))
    assert torch.equal(choose, common.held_out(100)[1])


def test_top5_where_there_are_more_than_ten_classes():
    scores = torch.eye(12) + torch.arange(12) / 100
    assert common.accuracy(scores, torch.arange(12)) == {"top1": 100, "top5": 100}
    found = common.accuracy(scores, torch.tensor([11] * 12))
    assert found["top1"] == pytest.approx(100 / 12) and found["top5"] == 100
    assert common.accuracy(scores[:, :10], torch.arange(12).clamp(max=9)).keys() == {"top1"}


def test_health():
    torch.manual_seed(0)
    healthy = common.health(torch.randn(512, 64))
    assert healthy["std"] == pytest.approx(1, abs=0.02) and healthy["effective_rank"] > 55
    collapsed = common.health(torch.randn(1, 64).expand(512, 64) + 1e-4 * torch.randn(512, 64))
    assert collapsed["std"] < 0.01 and collapsed["effective_rank"] < 1.2
    line = common.health(torch.randn(512, 2) @ torch.randn(2, 64))
    assert line["effective_rank"] == pytest.approx(2, abs=0.1)


def test_sgd_on_crops_and_flips_learns():
    """The papers' protocol on pixels averaged to 4 x 4, which tell dark from light."""
    backbone = nn.Sequential(nn.AdaptiveAvgPool2d(4), nn.Flatten())
    images, labels = torch.randint(0, 256, (200, 3, 32, 32)), torch.arange(200) % 2
    images = (images // 2 + 100 * labels.view(-1, 1, 1, 1)).byte()
    data = common.Data(
        "toy", images, (images, labels), (images[:50], labels[:50]), ["dark", "light"]
    )
    augment = common.Augment(size=32)
    result = common.linear_eval(backbone, data, augment, "cpu", epochs=3)
    assert result["linear_top1"] == 100


@pytest.mark.parametrize("epochs", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_two_processes_measure_what_one_measures(epochs, folder, tmp_path, monkeypatch, capsys):
    trained = simclr.main(small_args(simclr, data=folder, out=tmp_path, epochs=1))
    checkpoint = str(tmp_path / "checkpoint.pt")
    command = ["common.py", checkpoint, "--data", str(folder), "--workers", "0"]
    command += ["--epochs", str(epochs)]
    monkeypatch.setattr("sys.argv", command)
    capsys.readouterr()
    common.main()
    one, two = capsys.readouterr().out, torchrun(2, *command)
    assert two.returncode == 0, two.stderr[-3000:]
    assert one == two.stdout and "simclr, thin, epoch 1" in one
    found = json.loads(one.splitlines()[-1])
    for key in ("knn_top1", "linear_top1") if epochs == 0 else ("knn_top1",):
        assert trained[key] == found[key]


def official(layout, resnet="resnet18"):
    """A state dict as the official code of a method saves it: random weights of its constructor."""
    body = {
        k: v
        for k, v in getattr(torchvision.models, resnet)().state_dict().items()
        if "fc." not in k
    }
    head = {"0.weight": torch.zeros(4, 4)}

    def under(prefix, state):
        return {prefix + name: value for name, value in state.items()}

    queue = {"module.queue": torch.zeros(4, 8), "module.queue_ptr": torch.zeros(1).long()}
    return {
        "moco": {
            "epoch": 200,
            "arch": resnet,
            "state_dict": queue
            | under("module.encoder_q.", body)
            | under("module.encoder_q.fc.", head)
            | under("module.encoder_k.", body),
        },
        "moco_v3": {
            "state_dict": under("module.base_encoder.", body)
            | under("module.momentum_encoder.", body)
            | under("module.predictor.", head)
        },
        "simsiam": {
            "state_dict": under("module.encoder.", body)
            | under("module.encoder.fc.", head)
            | under("module.predictor.", head)
        },
        "barlow": {
            "epoch": 1,
            "model": under("module.backbone.", body) | under("module.projector.", head),
        },
        "swav": under("module.", body)
        | under("module.projection_head.", head)
        | {"module.prototypes.weight": torch.zeros(4, 4)},
        "densecl": {
            "state_dict": under("encoder_q.0.", body)
            | under("encoder_q.1.mlp.", head)
            | under("backbone.", body)
        },
        "torchvision": getattr(torchvision.models, resnet)().state_dict(),
    }[layout], body


@pytest.mark.parametrize(
    "layout, resnet, dropped",
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
def test_official_checkpoints_are_recognised(layout, resnet, dropped, tmp_path):
    state, body = official(layout, resnet)
    torch.save(state, tmp_path / "official.pth")
    backbone, augment, description = common.load_backbone(tmp_path / "official.pth")
    loaded = backbone.state_dict()
    assert resnet in description and description.endswith(f"left out: {dropped}"), description
    assert loaded.keys() == body.keys() and augment.size == 224
    if layout != "torchvision":
        assert all(torch.equal(loaded[name], body[name]) for name in body)


def official_vit(dim):
    """MoCo v3's ViT under its official names, random, and what it computes, written out plainly."""
    chance = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=chance) / shape[-1] ** 0.5

    state = {
        "cls_token": draw(1, 1, dim), "pos_embed": draw(1, 197, dim),
        "patch_embed.proj.weight": draw(dim, 3, 16, 16) / 16, "patch_embed.proj.bias": draw(dim),
        "norm.weight": 1 + draw(dim), "norm.bias": draw(dim),
    }
    for i in range(12):
        for name, out, wide in (
            ("attn.qkv", 3 * dim, dim), ("attn.proj", dim, dim),
            ("mlp.fc1", 4 * dim, dim), ("mlp.fc2", dim, 4 * dim),
        ):
            state |= {f"blocks.{i}.{name}.weight": draw(out, wide),
                      f"blocks.{i}.{name}.bias": draw(out)}
        for name in ("norm1", "norm2"):
            state |= {f"blocks.{i}.{name}.weight": 1 + draw(dim),
                      f"blocks.{i}.{name}.bias": draw(dim)}

    def forward(x, heads=12):
        def part(name):
            return state[name + ".weight"], state[name + ".bias"]

        def norm(x, name):
            return F.layer_norm(x, (dim,), *part(name), eps=1e-6)

        x = F.conv2d(x, *part("patch_embed.proj"), stride=16).flatten(2).mT
        x = torch.cat([state["cls_token"].expand(len(x), 1, dim), x], 1) + state["pos_embed"]
        for i in range(12):
            qkv = F.linear(norm(x, f"blocks.{i}.norm1"), *part(f"blocks.{i}.attn.qkv"))
            q, k, v = qkv.view(len(x), 197, 3, heads, dim // heads).permute(2, 0, 3, 1, 4)
            weight = (q @ k.mT / (dim // heads) ** 0.5).softmax(-1)
            mixed = (weight @ v).transpose(1, 2).reshape(len(x), 197, dim)
            x = x + F.linear(mixed, *part(f"blocks.{i}.attn.proj"))
            hidden = F.gelu(F.linear(norm(x, f"blocks.{i}.norm2"), *part(f"blocks.{i}.mlp.fc1")))
            x = x + F.linear(hidden, *part(f"blocks.{i}.mlp.fc2"))
        return norm(x, "norm")[:, 0]

    return state, forward


@pytest.mark.parametrize("name, dim", [("vit_small", 384), ("vit_base", 768)])
def test_official_vit_is_recognised_and_computes_the_same(name, dim, tmp_path):
    body, forward = official_vit(dim)
    state = {f"module.base_encoder.{key}": value for key, value in body.items()}
    state |= {"module.base_encoder.head.0.weight": torch.zeros(4, 4)}
    state |= {f"module.momentum_encoder.{key}": value for key, value in body.items()}
    torch.save({"state_dict": state}, tmp_path / "official.pth")
    backbone, _, description = common.load_backbone(tmp_path / "official.pth")
    assert description == f"{name}, MoCo v3; left out: head, momentum_encoder"
    x = torch.randn(2, 3, 224, 224)
    with torch.no_grad():
        assert torch.allclose(backbone.eval()(x), forward(x), atol=1e-3, rtol=1e-3)


def test_our_vit_is_evaluated_again(folder, tmp_path):
    moco_v3 = importlib.import_module("moco_v3")
    result = moco_v3.main(small_args(moco_v3, data=folder, out=tmp_path, epochs=1))
    backbone, augment, description = common.load_backbone(tmp_path / "checkpoint.pt")
    assert "moco_v3, vit_thin, epoch 1" in description
    again = common.linear_eval(backbone, small_data(folder), augment, "cpu")
    assert again["linear_top1"] == result["linear_top1"]


def test_what_is_no_backbone_is_refused(tmp_path, capsys):
    path = tmp_path / "x.pth"
    state, _ = official("moco")
    for content, part in (
        ({"weights": torch.zeros(2)}, "no ResNet"),
        ([1, 2], "no weights"),
        ({k: v for k, v in state["state_dict"].items() if "layer4" not in k}, "none of resnet18"),
    ):
        torch.save(content, path)
        assert part in error_line(capsys, common.load_backbone, path)
    path.write_bytes(b"not a checkpoint")
    assert "not a readable checkpoint" in error_line(capsys, common.load_backbone, path)


@pytest.mark.parametrize("arch", ["resnet18", "resnet50"])
def test_our_backbones_load_in_torchvision(script, arch):
    """Of images over 64 pixels; smaller ones get another first layer, and no pooling after it."""
    args = small_args(script, arch=arch, size=72)
    backbone, _ = script.build_backbone(args)
    model = getattr(torchvision.models, arch)()
    missing, unexpected = model.load_state_dict(backbone.state_dict(), strict=False)
    assert set(missing) == {"fc.weight", "fc.bias"} and not unexpected


@pytest.mark.slow
def test_backbone_file_loads_in_torchvision(folder, tmp_path):
    simclr.main(small_args(simclr, data=folder, out=tmp_path, epochs=1, arch="resnet18", size=72))
    model = torchvision.models.resnet18()
    missing, unexpected = model.load_state_dict(
        torch.load(tmp_path / "backbone.pt", weights_only=True), strict=False
    )
    assert set(missing) == {"fc.weight", "fc.bias"} and not unexpected
