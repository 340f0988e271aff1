"""CLIP against plain second versions: the loss, both encoders, the training, many processes, the
runs and what is made of them, and OpenAI's weights.

Where nothing else is said, both versions compute in float64."""

import contextlib
import copy
import json
import math
from dataclasses import asdict

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from conftest import (
    checkpoint_of,
    error_line,
    interrupt,
    log_of,
    run,
    same_state,
    small_args,
    torchrun,
    words,
)
from results import series
from results.methods import views_of
from test_captions import shrink, write_captioned
from test_forward import body, compare, compare_state, cross_entropy, noise, unit
from test_forward import Recorder as Unwritten
from test_forward import warm_up_and_cosine
from test_parity import BATCH, difference, gather_without_gradient, synchronise, with_names
from test_scripts import RESULT, STOPPED
from torch import nn

import captions
import clip
import common
import evaluate
import harness
from captions import FRAMES, GROUNDS, TEMPLATES, Captioned, Tokenizer, captioned_patterns

TINY = {  # of which every part is there
    "batch_size": 8,
    "epochs": 3,
    "warmup_epochs": 1.0,
    "text_width": 12,
    "text_layers": 2,
    "text_heads": 3,
    "context": 9,
    "vocabulary": 30,
    "projection_dim": 10,
}
VOCABULARY = 40  # without a tokenizer


@pytest.fixture
def double(monkeypatch):
    """Also images, which Augment makes of type float."""
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def tiny_model(vocabulary=VOCABULARY, **flags):
    """(model, args), no weight of which is 0 or 1."""
    args = small_args(clip, **TINY | flags)
    torch.manual_seed(0)
    model = clip.CLIP(args, vocabulary)
    with torch.no_grad():
        for i, p in enumerate(model.parameters()):
            p.add_(0.1 * noise(p.shape, seed=i))
    return model, args


def tokens_of(n, context=9, seed=0):
    """Captions of several lengths, with start, end, and 0 among the words as well as behind."""
    generator = torch.Generator().manual_seed(seed)
    text = torch.zeros(n, context, dtype=torch.int32)
    for row in text:
        length = int(torch.randint(2, context + 1, (), generator=generator))
        row[:length] = torch.randint(VOCABULARY - 2, (length,), generator=generator)
        row[1 : length - 1 : 3] = 0
        row[0] = VOCABULARY - 2
        row[length - 1] = VOCABULARY - 1
    return text


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """(data, out, result) of a run over three epochs of four steps."""
    root = tmp_path_factory.mktemp("clip")
    write_captioned(root / "data")
    result = clip.main(small_args(clip, data=root / "data", out=root / "run", **TINY))
    return root / "data", root / "run", result


# ---------------------------------------------------------------------------- the naive encoders
def layer_norm(state, name, x):
    """Of each row of x (N, D)."""
    centred = x - x.mean(1, keepdim=True)
    variance = centred.square().mean(1, keepdim=True)
    return centred / (variance + 1e-5).sqrt() * state[name + ".weight"] + state[name + ".bias"]


def linear(state, name, x):
    return x @ state[name + ".weight"].T + state[name + ".bias"]


def attend(q, k, v, heads, causal=False):
    """Row by row and head by head: q (N, D), k, v (S, D) -> (N, D). causal: row i sees 0 to i."""
    width = q.shape[1] // heads
    rows = []
    for i, query in enumerate(q):
        seen = i + 1 if causal else len(k)
        row = []
        for head in range(heads):
            mine = slice(head * width, (head + 1) * width)
            powers = (k[:seen, mine] @ query[mine] / math.sqrt(width)).exp()
            row.append(powers / powers.sum() @ v[:seen, mine])
        rows.append(torch.cat(row))
    return torch.stack(rows)


def transformer(state, prefix, x, heads, mlp="", causal=False):
    """All blocks whose weights begin with the prefix, on the tokens x (N, D) of one item."""
    layers = {name.removeprefix(prefix).split(".")[0] for name in state if name.startswith(prefix)}
    for layer in range(len(layers)):
        block = f"{prefix}{layer}."
        n = layer_norm(state, block + "ln_1", x)
        weights = state[block + "attn.in_proj_weight"].chunk(3)
        biases = state[block + "attn.in_proj_bias"].chunk(3)
        q, k, v = [n @ weight.T + bias for weight, bias in zip(weights, biases)]
        x = x + linear(state, block + "attn.out_proj", attend(q, k, v, heads, causal))
        n = layer_norm(state, block + "ln_2", x)
        n = linear(state, f"{block}{mlp}c_fc", n)
        n = n / (1 + (-1.702 * n).exp())
        x = x + linear(state, f"{block}{mlp}c_proj", n)
    return x


def patches(kernel, image):
    """Every patch times every filter, in the order in which one reads: (S, D)."""
    side = kernel.shape[-1]
    rows = []
    for top in range(0, image.shape[1], side):
        for left in range(0, image.shape[2], side):
            patch = image[:, top : top + side, left : left + side]
            rows.append((kernel * patch).flatten(1).sum(1))
    return torch.stack(rows)


def pool(state, prefix, positions, cells, heads):
    """The mean of the cells (S, D) asks, the mean and all cells answer."""
    x = torch.cat([cells.mean(0, keepdim=True), cells]) + positions
    q, k, v = [linear(state, f"{prefix}{name}_proj", x) for name in "qkv"]
    return attend(q[:1], k, v, heads)[0]


def our_image(model, state, args, x):
    """h of all images (B, D)."""
    if args.arch not in clip.VITS:
        heads = max(model.backbone.dim // 64, 1)
        positions = state["backbone.avgpool.positions"]
        found = []
        for cells in body(model.backbone)(x):
            cells = torch.stack([cell for row in cells.permute(1, 2, 0) for cell in row])
            found.append(pool(state, "backbone.avgpool.", positions, cells, heads))
        return torch.stack(found)
    found = []
    for image in x:
        tokens = patches(state["backbone.conv1.weight"], image)
        tokens = torch.cat([state["backbone.class_token"][None], tokens])
        tokens = layer_norm(state, "backbone.ln_pre", tokens + state["backbone.positions"])
        tokens = transformer(state, "backbone.blocks.", tokens, tokens.shape[1] // 64)
        found.append(layer_norm(state, "backbone.ln_post", tokens[:1])[0])
    return torch.stack(found)


def our_text(state, args, text):
    """h of all captions, of which nothing behind the end token is looked at: (B, text_width)."""
    found = []
    for caption in text.tolist():
        caption = caption[: caption.index(VOCABULARY - 1) + 1]
        x = torch.stack([state["text_encoder.token_embedding.weight"][token] for token in caption])
        if args.text == "cbow":
            found.append(sum(x) / len(x))
            continue
        x = x + state["text_encoder.positions"][: len(caption)]
        x = transformer(state, "text_encoder.blocks.", x, args.text_heads, causal=True)
        found.append(layer_norm(state, "text_encoder.ln_final", x[-1:])[0])
    return torch.stack(found)


def naive_loss(z_image, z_text, scale):
    """Figure 3, pair by pair."""
    n = len(z_image)
    loss = 0.0
    for i in range(n):
        loss = loss + cross_entropy([scale * (z_image[i] @ z_text[j]) for j in range(n)], i)
        loss = loss + cross_entropy([scale * (z_text[i] @ z_image[j]) for j in range(n)], i)
    return loss / (2 * n)


def naive_forward(model, args, x, text):
    state = dict(model.named_parameters())
    h_image = our_image(model, state, args, x)
    z_image = h_image @ state["projector.weight"].T
    if args.arch not in clip.VITS:
        z_image = z_image + state["projector.bias"]
    z_image = unit(z_image)
    z_text = unit(our_text(state, args, text) @ state["text_projector.weight"].T)
    return naive_loss(z_image, z_text, state["log_scale"].exp()), z_image


# ------------------------------------------------------------------------------------------ loss
def embeddings(n=12, c=6):
    return unit(noise(n, c, seed=1).double()), unit(noise(n, c, seed=2).double())


@pytest.mark.parametrize("scale", [1.0, 1 / 0.07, 100.0])
def test_the_loss_equals_a_double_loop(scale):
    z_image, z_text = embeddings()
    found = clip.contrastive_loss(z_image, z_text, torch.tensor(scale).double())
    compare(found, naive_loss(z_image, z_text, scale), "loss")
    other = clip.contrastive_loss(z_text, z_image, torch.tensor(scale).double())
    compare(found, other, "the loss is the same both ways")


def test_the_gradient_of_the_scale():
    """The mean cosine under the softmax less that of the pairs, for both ways."""
    z_image, z_text = embeddings()
    scale = torch.tensor(5.0).double().requires_grad_()
    clip.contrastive_loss(z_image, z_text, scale).backward()
    cosines = z_image @ z_text.T
    expected = 0.0
    for table in (cosines, cosines.T):
        weights = (5 * table).exp()
        weights = weights / weights.sum(1, keepdim=True)
        expected += ((weights * table).sum(1) - table.diagonal()).mean() / 2
    compare(scale.grad, expected, "gradient")


def test_equal_similarities_give_the_chance_loss():
    for n in (8, 256):
        model = clip.CLIP(small_args(clip, **TINY | {"batch_size": n}), VOCABULARY)
        z = torch.ones(n, 4) / 2
        loss = clip.contrastive_loss(z, z, model.log_scale.exp())
        assert loss.item() == pytest.approx(math.log(n), rel=1e-5)
        assert model.chance_loss == math.log(n)


def test_captions_that_occur_twice_give_the_loss_a_floor():
    """They are each other's negatives (a pitfall, not a mistake): no images do better than the
    mean of the logarithms of how often each caption occurs."""
    times = torch.tensor([1, 2, 5])
    caption = torch.arange(3).repeat_interleave(times)
    floor = sum(count * math.log(count) for count in times.tolist()) / 8
    assert floor == pytest.approx(1.179, abs=1e-3)
    best = torch.eye(3).double()[caption]
    scale = torch.tensor(100.0).double()
    assert clip.contrastive_loss(best, best, scale).item() == pytest.approx(floor, abs=1e-9)
    for seed in range(20):
        z_image = unit(noise(8, 3, seed=seed).double())
        z_text = unit(noise(3, 3, seed=100 + seed).double())[caption]
        assert clip.contrastive_loss(z_image, z_text, scale) > floor
    assert floor < math.log(8)


# --------------------------------------------------------------------------------------- forward
@pytest.mark.parametrize(
    "flags",
    [
        {},
        {"text": "cbow"},
        {"arch": "vit_thin"},
        {"arch": "vit_thin", "size": 16, "patch_size": 4, "text_layers": 1},
    ],
)
def test_forward_follows_the_paper(flags, double):
    """Loss, output and all gradients; also the running statistics of two steps."""
    model, args = tiny_model(**flags)
    naive = copy.deepcopy(model)
    for step in (1, 2):
        x = noise(4, 3, args.size, args.size, seed=step)
        text = tokens_of(4, seed=step)
        loss, z = model(x, text)
        model.zero_grad()
        loss.backward()
        expected_loss, expected_z = naive_forward(naive, args, x, text)
        naive.zero_grad()
        expected_loss.backward()
        compare(loss, expected_loss, "loss")
        compare(z, expected_z, "z")
        assert not z.requires_grad
        for (name, p), expected in zip(model.named_parameters(), naive.parameters()):
            assert p.grad is not None, name
            compare(p.grad, expected.grad, name)
        assert model.log_scale.grad.abs() > 1e-4
        compare_state(model, naive)


@pytest.mark.parametrize("text", ["transformer", "cbow"])
def test_padding_is_not_seen_and_an_exclamation_mark_is(text, double):
    """The token 0 pads, and is the byte "!" of a vocabulary."""
    model, _ = tiny_model(text=text)
    start, end = VOCABULARY - 2, VOCABULARY - 1
    first = torch.tensor([[start, 5, 0, 7, end, 0, 0, 0, 0]])
    other_word = first.clone()
    other_word[0, 2] = 8
    other_padding = first.clone()
    other_padding[0, 5:] = torch.tensor([3, end, start, 4])  # the first end is the end
    h = model.text_encoder(first)
    compare(model.text_encoder(other_padding), h, "padding")
    assert (model.text_encoder(other_word) - h).abs().max() > 1e-3


@pytest.mark.parametrize("text", ["transformer", "cbow"])
def test_the_end_token_is_found_by_its_number(text, double):
    """Not as the largest number, which it is not if somebody adds words to the vocabulary."""
    model, args = tiny_model(text=text)
    encoder = model.text_encoder
    caption = torch.tensor([[VOCABULARY - 2, 5, VOCABULARY + 2, 7, VOCABULARY - 1, 0, 0, 0, 0]])
    known = caption.clone()
    known[0, 2] = 6
    embedding = encoder.token_embedding.weight.detach()
    grown = nn.Embedding(VOCABULARY + 3, args.text_width)
    with torch.no_grad():
        grown.weight[:VOCABULARY] = embedding
        grown.weight[VOCABULARY + 2] = embedding[6]
    expected = encoder(known)
    encoder.token_embedding = grown
    compare(encoder(caption), expected, "h")


def test_the_order_of_words_counts_for_the_transformer_alone(double):
    text = torch.tensor([[VOCABULARY - 2, 5, 6, 7, VOCABULARY - 1, 0, 0, 0, 0]])
    swapped = text[:, [0, 3, 2, 1, 4, 5, 6, 7, 8]]
    for kind, moves in (("transformer", True), ("cbow", False)):
        encoder = tiny_model(text=kind)[0].text_encoder
        assert ((encoder(text) - encoder(swapped)).abs().max() > 1e-3) == moves


# ----------------------------------------------------------------------------------------- start
def test_weights_start_as_in_the_official_code():
    args = small_args(clip, arch="vit_thin", text_width=128, text_layers=3, context=40)
    torch.manual_seed(0)
    model = clip.CLIP(args, 600)
    assert model.log_scale.item() == pytest.approx(math.log(1 / 0.07))
    deviations = {
        "text_encoder.token_embedding.weight": 0.02,
        "text_encoder.positions": 0.01,
        "text_projector.weight": 128**-0.5,
        "projector.weight": 64**-0.5,
        "backbone.class_token": 64**-0.5,
        "backbone.positions": 64**-0.5,
    }
    for i in range(3):
        block = f"text_encoder.blocks.{i}."
        deviations |= {
            block + "attn.in_proj_weight": 128**-0.5,
            block + "attn.out_proj.weight": 128**-0.5 * 6**-0.5,
            block + "c_fc.weight": 256**-0.5,
            block + "c_proj.weight": 128**-0.5 * 6**-0.5,
        }
    for i in range(4):  # torch's own start (official code); a uniform one, a side of it / sqrt(3)
        block = f"backbone.blocks.{i}."
        deviations |= {
            block + "attn.in_proj_weight": (6 / (64 + 3 * 64)) ** 0.5 / 3**0.5,
            block + "attn.out_proj.weight": 64**-0.5 / 3**0.5,
            block + "c_fc.weight": 64**-0.5 / 3**0.5,
            block + "c_proj.weight": 256**-0.5 / 3**0.5,
        }
    state = dict(model.named_parameters())
    for name, expected in deviations.items():
        close = 0.05 + 2 / state[name].numel() ** 0.5
        assert state[name].std().item() == pytest.approx(expected, rel=close), name
    for name, p in state.items():
        norm = ".ln_" in name
        if norm and name.endswith("weight"):
            assert (p == 1).all(), name
        elif norm or name.endswith("in_proj_bias"):
            assert (p == 0).all(), name


def test_a_resnet_starts_as_in_the_official_code():
    """The last gain of each block is 0, and queries, keys and values are small."""
    backbone = clip.build_backbone(small_args(clip, arch="resnet18"))
    for block in (backbone.layer1[0], backbone.layer4[0]):
        assert (block.bn2.weight == 0).all() and (block.bn1.weight == 1).all()
    for projection in (backbone.avgpool.q_proj, backbone.avgpool.k_proj, backbone.avgpool.v_proj):
        assert projection.weight.std().item() == pytest.approx(512**-0.5, rel=0.05)
    assert backbone.training


def test_the_first_layer_is_trained():
    """As opposed to moco_v3.py's, which has to be frozen."""
    model, args = tiny_model(arch="vit_thin")
    optimizer = clip.build_optimizer(args, model)
    trained = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert all(id(p) in trained and p.requires_grad for p in model.parameters())


# -------------------------------------------------------------------------------------- training
class Recorder(Unwritten):
    """As in test_forward."""

    def finish(self, data, draw):
        return self


def few_pairs(n=16):
    """Captioned with n images to train on and two held out."""
    images, _, _, texts = captioned_patterns(n + 2, seed=1)
    pairs = (images[n:], texts[n:])
    return Captioned("small", images[:n], captions=texts[:n], pairs=pairs)


def naive_training(args, data, start):
    """All steps, by AdamW written out; returns the model and (loss, rate, scale) of each step."""
    tokenizer = captions.build_tokenizer(args, data.captions)
    texts = tokenizer(data.captions)
    torch.manual_seed(args.seed)
    model = start(args, tokenizer.vocabulary)
    views = common.Views(data.pretrain, clip.build_views(args), args.batch_size, seed=args.seed)
    parameters = list(model.parameters())
    means = [torch.zeros_like(p) for p in parameters]
    squares = [torch.zeros_like(p) for p in parameters]
    lines = []
    for epoch in range(1, args.epochs + 1):
        views.set_epoch(epoch)
        for step, (rows, (x,)) in enumerate(zip(views.rows(), views)):
            lr = warm_up_and_cosine(args, epoch - 1 + step / len(views), args.lr)
            text = torch.stack([texts[row] for row in rows])
            z_image = model.encode_image(x)
            z_text = model.encode_text(text)
            loss = naive_loss(z_image, z_text, model.log_scale.exp())
            grads = torch.autograd.grad(loss, parameters)
            t = len(lines) + 1
            with torch.no_grad():
                for p, grad, mean, square in zip(parameters, grads, means, squares):
                    mean.mul_(0.9).add_(0.1 * grad)
                    square.mul_(args.beta2).add_((1 - args.beta2) * grad**2)
                    root = (square / (1 - args.beta2**t)).sqrt() + 1e-6
                    decay = args.weight_decay if p.ndim > 1 else 0.0
                    p.sub_(lr * (mean / (1 - 0.9**t) / root + decay * p))
                if model.log_scale > math.log(100):
                    model.log_scale.fill_(math.log(100))
            lines.append((loss.item(), lr, model.log_scale.exp().item()))
    return model, lines


@pytest.mark.parametrize("flags", [{}, {"beta2": 0.9, "text": "cbow"}])
@pytest.mark.parametrize("log_scale", [math.log(1 / 0.07), math.log(100) + 0.2])
def test_training_follows_the_paper(flags, log_scale, double, tmp_path, monkeypatch):
    """Also from a temperature beyond its bound: it is at the bound after the first step, and comes
    back from there where the gradient wants it to."""
    args = small_args(clip, out=tmp_path, lr=0.01, weight_decay=0.2, **TINY | flags)
    original = clip.CLIP

    def start(*arguments):
        model = original(*arguments)
        with torch.no_grad():
            model.log_scale.fill_(log_scale)
        return model

    data = few_pairs()
    monkeypatch.setattr(harness, "Run", Recorder)
    monkeypatch.setattr(clip, "launch", lambda: torch.device("cpu"))
    monkeypatch.setattr(clip, "load_captions", lambda *_: data)
    monkeypatch.setattr(clip, "CLIP", start)
    run = clip.train(args)
    model, lines = naive_training(args, data, start)
    for epoch, line in enumerate(run.log[1:]):
        (first, _, _), (second, lr, scale) = lines[2 * epoch : 2 * epoch + 2]
        assert line["loss"] == pytest.approx((first + second) / 2, rel=1e-8)
        assert line["lr"] == pytest.approx(lr, rel=1e-12)
        assert line["scale"] == pytest.approx(scale, rel=1e-10)
    compare_state(run.model, model)
    scales = [scale for _, _, scale in lines]
    if log_scale > math.log(100):
        assert scales[0] == pytest.approx(100)  # in the warm-up's first step, whose rate is 0
        assert 90 < scales[-1] < 99.9
    else:
        assert scales[-1] != pytest.approx(1 / 0.07, rel=1e-3)


def test_what_is_decayed():
    """Neither gains nor biases nor the temperature; the class token and a bias have one axis."""
    model, args = tiny_model(arch="vit_thin")
    decays = {}
    for group in clip.build_optimizer(args, model).param_groups:
        for p in group["params"]:
            decays[id(p)] = group["weight_decay"]
        assert group["betas"] == (0.9, 0.98) and group["eps"] == 1e-6
    for name, p in model.named_parameters():
        free = "bias" in name or ".ln_" in name or name in ("log_scale", "backbone.class_token")
        assert decays[id(p)] == (0.0 if free else args.weight_decay), name


# ---------------------------------------------------------------------------------------- parity
MISTAKES = {
    "none": {},
    "a gather without gradient": {"gather": gather_without_gradient},
    "labels without the offset of the rank": {"rank": lambda: 0},
}


def parity_step(rank=0, world_size=1, mistake="none"):
    """A step on this process's share of a fixed batch, and what came out of it."""
    args = small_args(clip, **TINY | {"batch_size": BATCH})
    torch.manual_seed(0)
    model = clip.CLIP(args, VOCABULARY).double()
    synchronise(model)
    (x,) = views_of(args, BATCH, torch.float64)
    x = x.chunk(world_size)[rank].contiguous(memory_format=torch.channels_last)
    text = tokens_of(BATCH).chunk(world_size)[rank]
    network = nn.parallel.DistributedDataParallel(model) if world_size > 1 else model
    with pytest.MonkeyPatch.context() as patch:
        loss = with_names(clip, clip.contrastive_loss, **MISTAKES[mistake])
        patch.setattr(clip, "contrastive_loss", loss)
        loss, _ = network(x, text)
    loss.backward()
    found = {f"gradient of {name}": p.grad for name, p in model.named_parameters()}
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    found |= {name: p.detach() for name, p in model.named_parameters()}
    total = loss.detach().clone()
    if world_size > 1:
        dist.all_reduce(total)
    return found | {"loss": total / world_size}


def work(rank, world_size, folder, command):
    """All steps, then a run of the script, which leaves the group of processes."""
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=world_size)
    found = {mistake: parity_step(rank, world_size, mistake) for mistake in MISTAKES}
    torch.save(found, f"{folder}/{rank}.pt")
    with open(f"{folder}/{rank}.txt", "w") as file, contextlib.redirect_stdout(file):
        clip.main(clip.parse_args(command))


@pytest.fixture(scope="module", params=[2, pytest.param(4, marks=pytest.mark.slow)])
def together(request, whole, tmp_path_factory):
    """(number of processes, folder with what they left, settings of their run). The run's network
    has no batch normalisation, which on a CPU would be that of each process."""
    folder = tmp_path_factory.mktemp("together")
    flags = TINY | {"data": whole[0], "epochs": 1, "arch": "vit_thin"}
    command = words(clip, recipe="patterns", out=folder / "run", **flags)
    mp.spawn(work, (request.param, str(folder), command), nprocs=request.param)
    return request.param, folder, flags


def test_the_step_of_many_processes_is_that_of_one(together):
    """To 1e-9 in all weights and gradients, the temperature's included; each mistake is noticed."""
    processes, folder, _ = together
    one = parity_step()
    assert one["gradient of log_scale"].abs() > 1e-3
    differences = dict.fromkeys(MISTAKES, 0.0)
    for rank in range(processes):
        found = torch.load(folder / f"{rank}.pt", weights_only=True)
        for mistake in MISTAKES:
            differences[mistake] = max(differences[mistake], difference(one, found[mistake]))
    assert differences.pop("none") < 1e-9
    assert min(differences.values()) > 1e-3, differences


def test_the_run_of_many_processes_is_that_of_one(together, tmp_path):
    processes, folder, flags = together
    printed = [(folder / f"{rank}.txt").read_text() for rank in range(processes)]
    assert "epoch 1/1" in printed[0] and "captions are cut" in printed[0]
    assert set(printed[1:]) == {""}
    result = json.loads((folder / "run" / "result.json").read_text())
    assert result["world_size"] == processes
    clip.main(small_args(clip, out=tmp_path, **flags))
    for found, expected in zip(log_of(folder / "run"), log_of(tmp_path)):
        for key in expected.keys() - {"std", "effective_rank"}:  # of a process's own images
            assert found[key] == pytest.approx(expected[key], rel=1e-3), key


# ------------------------------------------------------------------------------------- zero-shot
class Lines:
    """A tokenizer with a line of numbers for each text."""

    def __init__(self, vocabulary=VOCABULARY, context=9):
        self.words = {}
        self.vocabulary = vocabulary
        self.context = context

    def __call__(self, texts):
        rows = torch.zeros(len(texts), self.context, dtype=torch.int32)
        for row, text in zip(rows, texts):
            numbers = [self.number(word) for word in text.split()]
            numbers = [self.vocabulary - 2, *numbers[: self.context - 2], self.vocabulary - 1]
            row[: len(numbers)] = torch.tensor(numbers)
        return rows

    def number(self, word):
        return self.words.setdefault(word, len(self.words) % (self.vocabulary - 2))


def loud_model(**flags):
    """A model whose embeddings of different images and texts point into different directions."""
    model, args = tiny_model(**flags)
    with torch.no_grad():
        for p in (model.text_encoder.token_embedding.weight, model.text_encoder.positions):
            p.copy_(noise(p.shape, seed=3))
        for p in (model.projector.weight, model.text_projector.weight):
            p.copy_(noise(p.shape, seed=4))
    return model.eval(), args


def naive_classes(model, tokenizer, names, templates):
    """Sentence by sentence: the mean of the unit vectors, made a unit vector."""
    rows = []
    for name in names:
        total = 0.0
        for template in templates:
            z = model.text_projector(model.text_encoder(tokenizer([template.format(name)])))[0]
            total = total + z / z.norm()
        rows.append(total / total.norm())
    return torch.stack(rows)


def hits(z, classes, answers):
    """Percent of the rows whose nearest class is the answer."""
    found = 0
    for row, answer in zip(z, answers):
        cosines = [float(row @ other) for other in classes]
        found += cosines.index(max(cosines)) == answer
    return 100 * found / len(z)


@torch.no_grad()
def test_classes_are_means_over_sentences():
    model, _ = loud_model()
    tokenizer = Lines()
    names = ["a dog", "cats", "{} in braces"]
    for templates in (TEMPLATES, FRAMES, ("{}",)):
        found = clip.embed_classes(model, tokenizer, names, templates)
        expected = naive_classes(model, tokenizer, names, templates)
        assert torch.allclose(found, expected, atol=1e-6)
    assert len(TEMPLATES) == len(FRAMES) == 7
    assert (found @ found.T - torch.eye(3)).max() < 0.99


@torch.no_grad()
def test_what_is_measured(monkeypatch):
    """All figures without labels again, by loops over images and sentences."""
    shrink(monkeypatch, n=150, labelled=50)
    data = captions.load_captions("patterns", "data")
    model, args = loud_model()
    tokenizer = Lines()
    found = clip.evaluate(args, model, tokenizer, data, last=False)

    def images_of(images):
        return unit(model.projector(model.backbone(clip.build_views(args)[0].plain(images))))

    z = images_of(data.pairs[0])
    said = naive_classes(model, tokenizer, data.pairs[1], ("{}",))
    expected = {
        "image_to_text_top1": hits(z, said, range(len(z))),
        "text_to_image_top1": hits(said, z, range(len(z))),
    }
    classes = naive_classes(model, tokenizer, common.PATTERNS, FRAMES)
    expected["zero_shot_top1"] = hits(images_of(data.test[0]), classes, data.test[1])
    images, families, grounds, held_out = data.pasted
    z = images_of(images)
    expected["pasted_top1"] = hits(z, classes, families)
    names = [f"{family} on {ground}" for family in common.PATTERNS for ground in GROUNDS]
    pairs = naive_classes(model, tokenizer, names, FRAMES)
    answers = [names.index(f"{common.PATTERNS[f]} on {list(GROUNDS)[g]}") for f, g in
               zip(families, grounds)]  # fmt: skip
    answers = torch.tensor(answers)
    expected["held_out_top1"] = hits(z[held_out], pairs, answers[held_out])
    expected["seen_top1"] = hits(z[~held_out], pairs, answers[~held_out])
    for key, value in expected.items():
        assert found[key] == pytest.approx(value), key
    assert found["image_to_text_top5"] >= found["image_to_text_top1"]
    assert sum(value > 0 for value in expected.values()) >= 4
    assert found["knn_k"] == 100 and "linear_top1" not in found
    assert "linear_top1" in clip.evaluate(args, model, tokenizer, data)


# ------------------------------------------------------------------------------------------ runs
def test_a_run_on_a_folder(whole, capsys):
    data, out, result = whole
    assert result == json.loads((out / "result.json").read_text())
    assert result["method"] == "clip" and result["data"] == "data"
    assert result["linear_top1"] is None and "zero_shot_top1" not in result
    retrieval = [f"{way}_top1" for way in ("image_to_text", "text_to_image")]
    for key in retrieval:
        assert 0 <= result[key] <= 100 and result["random_" + key] is not None
    assert result.keys() == {*RESULT.split(), *retrieval, *("random_" + key for key in retrieval)}
    log = log_of(out)
    assert [line["epoch"] for line in log] == [0, 1, 2, 3]
    for line in log[1:]:
        assert {"loss", "lr", "std", "effective_rank", "scale", *retrieval} <= line.keys()
    assert (out / "report.png").read_bytes().startswith(b"\x89PNG")
    files = "backbone.pt checkpoint.pt log.jsonl merges.txt report.png result.json"
    assert sorted(path.name for path in out.iterdir()) == files.split()
    assert len(captions.read_merges(out / "merges.txt")) == TINY["vocabulary"]
    args = small_args(clip, data=data, out=out, **TINY)
    backbone = clip.build_backbone(args)
    backbone.load_state_dict(torch.load(out / "backbone.pt", weights_only=True))
    before = (out / "checkpoint.pt").read_bytes()
    assert "holds a finished run" in error_line(capsys, clip.main, args)
    args.text = "cbow"
    assert "holds a run with another --text:" in error_line(capsys, clip.main, args)
    assert (out / "checkpoint.pt").read_bytes() == before


def test_a_run_on_patterns(tmp_path, monkeypatch, capsys):
    shrink(monkeypatch, n=100, labelled=30)
    flags = TINY | {"batch_size": 64, "epochs": 1}
    result = clip.main(small_args(clip, out=tmp_path, **flags))
    printed = capsys.readouterr().out
    own = ["zero_shot_top1", "pasted_top1", "held_out_top1", "seen_top1"]
    for way in ("image_to_text", "text_to_image"):
        own += [f"{way}_top1", f"{way}_top5"]
    assert result.keys() == {*RESULT.split(), *own, *("random_" + key for key in own)}
    for key in (*own, "linear_top1", "knn_top1"):
        assert 0 <= result[key] <= 100 and 0 <= result["random_" + key] <= 100
    assert result == json.loads((tmp_path / "result.json").read_text())
    assert "epoch 0/1  random weights  zero-shot top-1 " in printed
    for text in ("(chance 4.16)", "captions are cut to 9 tokens", "linear top-1"):
        assert text in printed, text
    assert "chance 10.0 %" in printed.splitlines()[-1]
    assert (tmp_path / "report.png").stat().st_size > 10_000


def test_resumed_equals_uninterrupted(whole, tmp_path, capsys):
    """Stopped right after the first figures, within the first epoch, the second, and after it."""
    data, out, _ = whole
    args = small_args(clip, data=data, out=tmp_path, **TINY)
    for method, call, finished in (
        ("log_start", 1, 0),
        ("after_step", 3, 0),
        ("after_step", 6, 1),
        ("after_epoch", 1, 2),
    ):
        interrupt(clip, args, method, call)
        assert STOPPED in capsys.readouterr().out
        assert [line["epoch"] for line in log_of(tmp_path)] == list(range(finished + 1))
    clip.main(args)
    assert log_of(tmp_path) == log_of(out)
    assert same_state(checkpoint_of(tmp_path), checkpoint_of(out))
    assert (tmp_path / "merges.txt").read_bytes() == (out / "merges.txt").read_bytes()


@pytest.mark.slow
def test_torchrun(whole, tmp_path):
    """As users start it."""
    flags = TINY | {"data": whole[0], "epochs": 1}
    ran = torchrun(2, "clip.py", *words(clip, recipe="patterns", out=tmp_path, **flags))
    assert ran.returncode == 0, ran.stderr[-3000:]
    assert ran.stdout.count("epoch 1/1") == 1
    assert json.loads((tmp_path / "result.json").read_text())["world_size"] == 2


@pytest.mark.parametrize(
    "flags, part",
    [
        ({"text": "lstm"}, "--text lstm: neither transformer nor cbow"),
        ({"text_heads": 5}, "--text-heads 5: not a divisor of --text-width 12"),
        ({"arch": "vit_huge"}, "--arch vit_huge: neither thin nor "),
        ({"arch": "vit_thin", "size": 30}, "--size 30: not a multiple of --patch-size 8"),
        ({"merges": "nowhere"}, "--merges nowhere: "),
        ({"crop_min": 2}, "crops cannot take 2.0 to 1.0 of the image's area"),
        ({"batch_size": 37}, "--batch-size 37, but the data has only 36 images"),
    ],
)
def test_wrong_flags(flags, part, whole, tmp_path, capsys):
    wrong = small_args(clip, data=whole[0], out=tmp_path / "run", **TINY | flags)
    assert part in error_line(capsys, clip.main, wrong)
    assert not (tmp_path / "run").exists()


# -------------------------------------------------------------------------------------- classify
def classified(names, images, out):
    command = ["--classify", names, "--images", str(images), "--out", str(out), "--workers", "0"]
    return clip.main(clip.parse_args(command))


@torch.no_grad()
def test_classify(whole, capsys):
    """A user's own names, in an order and with spaces of the user's; braces stay braces."""
    data, out, _ = whole
    names = ["my cat", "stripes", "{}", "a wall"]
    paths = captions.image_paths(str(data))
    found = classified(" my cat,stripes , {},a wall,,", data, out)
    lines = capsys.readouterr().out.splitlines()
    model, tokenizer, args = clip.load(out / "checkpoint.pt", "cpu")
    x = clip.build_views(args)[0].plain(common.stack(paths))
    z = unit(model.projector(model.backbone(x)))
    logits = model.log_scale.exp() * z @ naive_classes(model, tokenizer, names, TEMPLATES).T
    shares = logits.exp() / logits.exp().sum(1, keepdim=True)
    assert len(found) == len(lines) == len(paths) == 40
    for path, name, line, share in zip(paths, found, lines, shares):
        best = share.tolist().index(max(share))
        assert name == names[best]
        said, _, percent = line.rpartition(" (")
        assert said == f"{path}: {name}"
        assert abs(float(percent.removesuffix(" %)")) - 100 * share[best]) < 0.6
    assert classified("my cat, stripes,{},a wall", paths[7], out) == [found[7]]


def test_classify_after_the_patterns_uses_their_sentences(tmp_path, monkeypatch):
    used = []

    def embed_classes(model, tokenizer, names, templates):
        used.append(templates)
        return torch.eye(10)[: len(names)]

    args = small_args(clip, **TINY)
    tokenizer = Tokenizer([], args.context)
    tokenizer.save(tmp_path / "merges.txt")
    model = clip.CLIP(args, tokenizer.vocabulary)
    torch.save({"args": vars(args), "model": model.state_dict()}, tmp_path / "checkpoint.pt")
    write_captioned(tmp_path / "data", n=3)
    monkeypatch.setattr(clip, "embed_classes", embed_classes)
    assert len(classified("a,b", tmp_path / "data", tmp_path)) == 3
    assert used == [FRAMES]


def test_what_classify_cannot_do(whole, tmp_path, capsys):
    data, out, _ = whole

    def wrong(names="a,b", images=data, out=out):
        return error_line(capsys, classified, names, images, out)

    for names in ("", " , "):
        assert "--classify needs names and --images" in wrong(names)
    assert "--images" in wrong(images=tmp_path)
    assert "neither a picture nor a folder of pictures" in wrong(images=tmp_path / "x.png")
    assert "checkpoint.pt: no such file" in wrong(out=tmp_path)
    args = clip.parse_args(["--classify", "a,b", "--out", str(out)])
    assert "--classify needs names and --images" in error_line(capsys, clip.main, args)
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no image")
    assert f"cannot read the image {broken}" in wrong(images=broken)

    content = harness.load_checkpoint(out / "checkpoint.pt")
    torch.save(content, tmp_path / "checkpoint.pt")
    assert "merges.txt: " in wrong(out=tmp_path)
    Tokenizer([], 9).save(tmp_path / "merges.txt")  # of another vocabulary
    for changed in (content, {"model": {}}, [1], {"args": {"method": "simclr"}}):
        torch.save(changed, tmp_path / "checkpoint.pt")
        assert "is not a checkpoint of this program" in wrong(out=tmp_path)


# ------------------------------------------------------------------------- the program evaluate.py
def evaluated(checkpoint, *flags):
    command = [str(word) for word in (checkpoint, *flags, "--workers", 0)]
    return evaluate.main(evaluate.parse_args(command))


@torch.no_grad()
def test_our_run_is_evaluated(whole, folder, capsys):
    """Backbone and zero-shot, on images that it was not trained on."""
    checkpoint = whole[1] / "checkpoint.pt"
    found = evaluated(checkpoint, "--data", folder)
    assert f"{checkpoint}: clip, thin\n" in capsys.readouterr().out
    model, tokenizer, args = clip.load(checkpoint, "cpu")
    view = clip.build_views(args)[0]
    data = common.load_images(str(folder))
    expected = common.linear_eval(model.backbone, data, view, "cpu")
    z = unit(model.projector(model.backbone(view.plain(data.test[0]))))
    classes = naive_classes(model, tokenizer, data.classes, TEMPLATES)
    expected["zero_shot_top1"] = pytest.approx(hits(z, classes, data.test[1]))
    assert found == expected


def drawn_weights(key):
    """A function that draws weights in half precision, smaller the more inputs there are."""
    generator = common.make_generator("official", key)

    def draw(*shape):
        inputs = math.prod(shape[1:]) if len(shape) > 1 else 25
        return (torch.randn(shape, generator=generator) / math.sqrt(inputs)).half()

    return draw


def official_norm(draw, name, width):
    return {f"{name}.weight": 1 + draw(width).float(), f"{name}.bias": draw(width).float()}


def official_blocks(draw, prefix, width, layers):
    state = {}
    for layer in range(layers):
        block = f"{prefix}{layer}."
        state[block + "attn.in_proj_weight"] = draw(3 * width, width)
        state[block + "attn.in_proj_bias"] = draw(3 * width)
        linears = {"attn.out_proj": (width, width), "mlp.c_fc": (4 * width, width)}
        linears["mlp.c_proj"] = (width, 4 * width)
        for name, shape in linears.items():
            state[f"{block}{name}.weight"] = draw(*shape)
            state[f"{block}{name}.bias"] = draw(shape[0])
        state |= official_norm(draw, block + "ln_1", width)
        state |= official_norm(draw, block + "ln_2", width)
    return state


def official_vit(draw):
    """ViT-B/32 for images of 64 x 64: all of its weights, of the positions only five."""
    state = {
        "visual.class_embedding": draw(768),
        "visual.positional_embedding": draw(5, 768),
        "visual.proj": draw(768, 32),
        "visual.conv1.weight": draw(768, 3, 32, 32),
    }
    for name in ("visual.ln_pre", "visual.ln_post"):
        state |= official_norm(draw, name, 768)
    return state | official_blocks(draw, "visual.transformer.resblocks.", 768, 12)


def official_resnet(draw):
    """RN50 for images of 96 x 96."""
    shapes = {"conv1": (32, 3, 3, 3), "conv2": (32, 32, 3, 3), "conv3": (64, 32, 3, 3)}
    inputs = 64
    for stage, blocks in enumerate((3, 4, 6, 3), 1):
        width = 32 * 2**stage
        for block in range(blocks):
            name = f"layer{stage}.{block}."
            shapes[name + "conv1"] = (width, inputs, 1, 1)
            shapes[name + "conv2"] = (width, width, 3, 3)
            shapes[name + "conv3"] = (4 * width, width, 1, 1)
            if block == 0:
                shapes[name + "downsample.0"] = (4 * width, inputs, 1, 1)
            inputs = 4 * width
    state = {"visual.attnpool.positional_embedding": draw(10, 2048)}
    for name, shape in shapes.items():
        norm = "visual." + name.replace("conv", "bn").replace("downsample.0", "downsample.1")
        state[f"visual.{name}.weight"] = draw(*shape)
        state |= official_norm(draw, norm, shape[0])
        state[norm + ".running_mean"] = draw(shape[0]).float()
        state[norm + ".running_var"] = 1 + draw(shape[0]).float().abs()
        state[norm + ".num_batches_tracked"] = torch.tensor(7)
    for name in ("q_proj", "k_proj", "v_proj", "c_proj"):
        outputs = 32 if name == "c_proj" else 2048
        state[f"visual.attnpool.{name}.weight"] = draw(outputs, 2048)
        state[f"visual.attnpool.{name}.bias"] = draw(outputs)
    return state


IMAGE_TOWERS = {"vit_base": official_vit, "resnet50": official_resnet}
MERGES = [("a", "t</w>"), ("d", "o"), ("do", "g</w>")]


def official_weights(arch):
    """Random weights under OpenAI's names: an image tower, and a small text tower."""
    draw = drawn_weights(arch)
    vocabulary = 514 + len(MERGES)
    state = {
        "positional_embedding": draw(12, 128).float(),
        "text_projection": draw(128, 32),
        "logit_scale": torch.tensor(4.6),
        "token_embedding.weight": draw(vocabulary, 128).float(),
        "input_resolution": torch.tensor(64),
        "context_length": torch.tensor(12),
        "vocab_size": torch.tensor(vocabulary),
    }
    state |= official_norm(draw, "ln_final", 128)
    state |= official_blocks(draw, "transformer.resblocks.", 128, 2)
    return state | IMAGE_TOWERS[arch](draw)


def forward_vit(state, image):
    tokens = patches(state["visual.conv1.weight"], image)
    tokens = torch.cat([state["visual.class_embedding"][None], tokens])
    tokens = tokens + state["visual.positional_embedding"]
    tokens = layer_norm(state, "visual.ln_pre", tokens)
    tokens = transformer(state, "visual.transformer.resblocks.", tokens, 12, mlp="mlp.")
    return layer_norm(state, "visual.ln_post", tokens[:1])[0] @ state["visual.proj"]


def forward_resnet(state, image):
    def convolve(x, name, **settings):
        return F.conv2d(x, state[f"visual.{name}.weight"], **settings)

    def norm(x, name):
        parts = ("running_mean", "running_var", "weight", "bias")
        mean, variance, gain, bias = [state[f"visual.{name}.{p}"].view(-1, 1, 1) for p in parts]
        return (x - mean) / (variance + 1e-5).sqrt() * gain + bias

    x = image[None]
    for i in (1, 2, 3):
        x = convolve(x, f"conv{i}", padding=1, stride=2 if i == 1 else 1)
        x = norm(x, f"bn{i}").relu()
    x = F.avg_pool2d(x, 2)
    for stage, blocks in enumerate((3, 4, 6, 3), 1):
        for block in range(blocks):
            name = f"layer{stage}.{block}."
            stride = 2 if block == 0 and stage > 1 else 1
            y = norm(convolve(x, name + "conv1"), name + "bn1").relu()
            y = norm(convolve(y, name + "conv2", padding=1), name + "bn2").relu()
            y = F.avg_pool2d(y, stride)
            y = norm(convolve(y, name + "conv3"), name + "bn3")
            if block == 0:
                x = convolve(F.avg_pool2d(x, stride), name + "downsample.0")
                x = norm(x, name + "downsample.1")
            x = (x + y).relu()
    positions = state["visual.attnpool.positional_embedding"]
    h = pool(state, "visual.attnpool.", positions, x[0].flatten(1).T, 32)
    return linear(state, "visual.attnpool.c_proj", h[None])[0]


def forward_text(state, tokens):
    """tokens: a list, which ends with the end token."""
    x = state["token_embedding.weight"][tokens] + state["positional_embedding"][: len(tokens)]
    x = transformer(state, "transformer.resblocks.", x, 2, mlp="mlp.", causal=True)
    return layer_norm(state, "ln_final", x[-1:])[0] @ state["text_projection"]


@pytest.fixture(scope="module")
def official():
    """{arch: weights in half precision}."""
    return {arch: official_weights(arch) for arch in IMAGE_TOWERS}


@pytest.fixture
def merges(tmp_path):
    path = tmp_path / "bpe.txt"
    path.write_text("".join(["title\n", *(" ".join(pair) + "\n" for pair in MERGES)]))
    return path


@torch.no_grad()
@pytest.mark.parametrize("arch, size", [("vit_base", 64), ("resnet50", 96)])
def test_openai_weights_compute_what_openai_computes(arch, size, official, merges):
    weights = official[arch]
    state = evaluate.clip_weights(weights)
    model, tokenizer, view, description = evaluate.load_clip("x.pt", state, merges)
    assert description == f"CLIP, {arch}"
    assert view.size == size and view.mean == (0.48145466, 0.4578275, 0.40821073)
    assert model.log_scale.item() == pytest.approx(4.6)
    assert not model.training
    exact = {name: x.double() for name, x in weights.items()}
    forward = {"vit_base": forward_vit, "resnet50": forward_resnet}[arch]
    images = noise(3, 3, size, size, seed=1) + 4 * noise(3, 3, 1, 1, seed=2)
    expected = unit([forward(exact, image.double()) for image in images])
    found = model.encode_image(images).double()
    assert (found - expected).abs().max() < 1e-4
    assert (expected[0] - expected[1]).abs().max() > 1e-2
    texts = ["a dog", "cats & dogs!!", "a word " * 9]
    tokens = tokenizer(texts)
    assert tokens[2, -1] == tokenizer.end and tokenizer.end == 516
    rows = [row[: row.index(tokenizer.end) + 1] for row in tokens.tolist()]
    expected = unit([forward_text(exact, row) for row in rows])
    found = model.encode_text(tokens).double()
    assert (found - expected).abs().max() < 1e-4
    assert (expected[0] - expected[1]).abs().max() > 1e-2


@pytest.fixture
def few_images(monkeypatch):
    """In the place of the labelled data of evaluate.py."""
    images, labels = common.patterns(15)
    data = common.Data("few", images, (images[:10], labels[:10]), (images[10:], labels[10:]))
    data.classes = ["stripes", "grey_checks", *common.PATTERNS[2:]]
    monkeypatch.setattr(evaluate, "load_images", lambda *_: data)
    return data


def open_clip_names(weights):
    """As open_clip's models with a text tower of its own save them, trained by many processes."""
    found = {}
    for name, x in weights.items():
        own = name.startswith("visual") or name == "logit_scale"
        if x.ndim > 0 or own:  # it has not the three numbers
            found["module." + ("" if own else "text.") + name] = x
    return {"epoch": 3, "name": "run", "state_dict": found}


@torch.no_grad()
def test_official_files_are_evaluated(official, merges, few_images, tmp_path, capsys):
    """The small file of the two: with and without the merges, under the names of both codes."""
    path = tmp_path / "RN50.pt"
    torch.save(official["resnet50"], path)
    found = evaluated(path)
    said = capsys.readouterr().out
    assert said.startswith(f"{path}: CLIP, resnet50; zero-shot needs --merges\n")
    assert found.keys() == {"linear_top1", "knn_top1", "knn_k"}
    whole = evaluated(path, "--merges", merges)
    assert capsys.readouterr().out.startswith(f"{path}: CLIP, resnet50\n")
    assert {key: whole[key] for key in found} == found

    state = evaluate.clip_weights(official["resnet50"])
    model, tokenizer, view, _ = evaluate.load_clip(path, state, merges)
    names = [name.replace("_", " ") for name in few_images.classes]
    classes = naive_classes(model, tokenizer, names, TEMPLATES)
    images, labels = few_images.test
    z = model.encode_image(view.plain(images))
    assert whole["zero_shot_top1"] == pytest.approx(hits(z, classes, labels))

    state = evaluate.clip_weights(open_clip_names(official["resnet50"]))
    again, *_ = evaluate.load_clip(path, state, merges)
    for name, x in model.state_dict().items():
        assert torch.equal(x, again.state_dict()[name]), name


def test_official_weights_that_do_not_fit(official, merges, tmp_path, capsys):
    weights = official["resnet50"]

    def load(state, path=merges):
        return error_line(capsys, evaluate.load_clip, "x.pt", state, path)

    merges.write_text("title\na b\n")
    assert f"--merges {merges}: 515 tokens, but x.pt has 517" in load(weights)
    assert "--merges nowhere: " in load(weights, "nowhere")
    for missing in ("visual.layer3.5.", "visual.layer1.0.conv1", "ln_final.bias"):
        state = {name: x for name, x in weights.items() if not name.startswith(missing)}
        assert "x.pt: CLIP, but none of its ViT-B" in load(state, None)
    deeper = weights | {f"visual.layer3.{i}.conv1.weight": torch.zeros(1) for i in range(6, 10)}
    assert "x.pt: CLIP, but none of its ViT-B" in load(deeper, None)


def test_a_torchscript_archive_is_not_run_but_can_be_converted(tmp_path, capsys):
    """As OpenAI's files are."""
    path = tmp_path / "RN50.pt"
    torch.jit.trace(nn.Linear(2, 2), torch.zeros(1, 2)).save(path)
    line = error_line(capsys, evaluated, path)
    assert f"{path} is a TorchScript archive" in line
    assert f"torch.save(torch.jit.load('{path}', 'cpu').state_dict(), 'weights.pt')" in line
    assert "weights_only" not in line


# --------------------------------------------------------------------------------------- recipes
RECIPES = {
    # Conceptual Captions on one GPU. mlfoundations/open_clip: README.md, "sample single-process
    # running code" (RN50, 128 images, 1e-3, 0.1, 30 epochs; 10,000 steps of warm-up are 0.44 of
    # its epochs); params.py, get_default_params (beta2 of networks that are no ViT; eps is 1e-8
    # there and 1e-6 here); model_configs/RN50.json (widths, layers, heads, length).
    "cc3m": {
        "arch": "resnet50",
        "size": 224,
        "patch_size": 32,  # without effect
        "crop_min": 0.9,
        "text": "transformer",
        "text_width": 512,
        "text_layers": 12,
        "text_heads": 8,
        "context": 77,
        "vocabulary": 8000,  # learnt from the captions, unless --merges names OpenAI's 48,894
        "merges": "",
        "epochs": 30,
        "batch_size": 128,
        "lr": 1e-3,
        "beta2": 0.999,
        "warmup_epochs": 0.5,
        "weight_decay": 0.1,
        "projection_dim": 1024,
    },
    # ViT-B/32. Section 2.5 and tables 18 to 20 of the paper: 400 million pairs are 12,207 steps,
    # of which 2,000 are 0.16. openai/CLIP: clip/model.py and clip/simple_tokenizer.py (vocabulary,
    # length). crop_min: open_clip's transform.py; the paper has a random square crop.
    "paper": {
        "arch": "vit_base",
        "size": 224,
        "patch_size": 32,
        "crop_min": 0.9,
        "text": "transformer",
        "text_width": 512,
        "text_layers": 12,
        "text_heads": 8,
        "context": 77,
        "vocabulary": 48_894,
        "merges": "",
        "epochs": 32,
        "batch_size": 32_768,
        "lr": 5e-4,
        "beta2": 0.98,
        "warmup_epochs": 0.16,
        "weight_decay": 0.2,
        "projection_dim": 512,
    },
}
VIEW = {  # openai/CLIP: clip/clip.py (margin, mean, std); open_clip: transform.py (crop, bicubic)
    "size": 224,
    "scale": (0.9, 1.0),
    "flip": 0.0,
    "jitter": (0.0, 0.0, 0.0, 0.0),
    "jitter_p": 0.0,
    "grayscale": 0.0,
    "blur": 0.0,
    "solarize": 0.0,
    "bicubic": True,
    "margin": 1.0,
    "mean": (0.48145466, 0.4578275, 0.40821073),
    "std": (0.26862954, 0.26130258, 0.27577711),
}


@pytest.mark.parametrize("recipe", RECIPES)
def test_settings_and_view_are_those_of_the_sources(recipe):
    assert {"patterns", *RECIPES} == set(clip.SETTINGS["recipe"][:-1])
    args = clip.parse_args(["--recipe", recipe])
    found = {key: vars(args)[key] for key in clip.SETTINGS if key not in ("recipe", "eval_every")}
    assert found == RECIPES[recipe]
    assert [asdict(view) for view in clip.build_views(args)] == [VIEW]


def test_the_paper_trains_as_many_tokens_and_weights_as_openai():
    """49,408 tokens, and the 151 million weights of ViT-B/32."""
    args = clip.parse_args(["--recipe", "paper"])
    with torch.device("meta"):
        model = clip.CLIP(args, 49_408)
    assert sum(p.numel() for p in model.parameters()) == 151_277_313


# -------------------------------------------------------------------------------------- learning
@pytest.mark.slow
def test_the_default_recipe_learns(tmp_path):
    ran = run("clip.py", "--out", tmp_path, limit=1200)
    assert ran.returncode == 0, ran.stderr[-3000:]
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["zero_shot_top1"] >= 90
    assert result["pasted_top1"] >= 70
    assert result["held_out_top1"] >= 55
    assert result["random_zero_shot_top1"] <= 20


@pytest.mark.slow
def test_captions_of_other_images_teach_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(clip, "load_captions", captions.load_captions)  # put back in the end
    series.shuffle_captions(clip)
    args = clip.parse_args(["--epochs", "3", "--workers", "0", "--out", str(tmp_path)])
    result = clip.main(args)
    assert result["zero_shot_top1"] <= 20
    assert result["image_to_text_top1"] <= 1
