"""Evaluates a saved backbone: weighted kNN, and a linear classifier on the frozen features.

    python evaluate.py runs/simclr-patterns/checkpoint.pt
    torchrun --nproc_per_node=8 evaluate.py moco_v2_800ep_pretrain.pth.tar --data /data/imagenet

Takes the checkpoints of these scripts and the official ones of MoCo v1, v2, v3, SimSiam, Barlow
Twins, SwAV, DenseCL and CLIP (OpenAI's, or open_clip's of the same networks), or any ResNet under
torchvision's names, told apart by the names of their weights. CLIP is also judged by the names of
the classes alone; for the tokens of weights that are not ours, --merges names the file. With
--epochs N the classifier is trained as in the papers, by SGD for N epochs on random crops and flips
(100 for more than 100,000 images); otherwise it is fitted once by L-BFGS."""

import argparse
import copy
import importlib
import json
import math
import os
from argparse import Namespace
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from torch import nn

import harness
from captions import FRAMES, TEMPLATES, Tokenizer, read_merges, select
from common import (
    Augment,
    Views,
    accuracy,
    fail,
    features,
    held_out,
    linear_eval,
    load_images,
    rank,
    world_size,
)

RATES = (0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0)  # learning rates of SGD to choose from

LAYOUTS = {  # what the names of the backbone's weights begin with; tried in this order
    "encoder_q.0.": "DenseCL",
    "encoder_q.": "MoCo v1 or v2",
    "base_encoder.": "MoCo v3",
    "encoder.": "SimSiam",
    "backbone.": "Barlow Twins",
    "": "torchvision names",
}
OURS = ("backbone.", "encoder.backbone.", "encoder_q.backbone.")
FIRST_LAYERS = ("conv1.weight", "conv_proj.weight", "patch_embed.proj.weight")
RESNETS = ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152", "wide_resnet50_2")
VITS = {"vit_small": (384, 12), "vit_base": (768, 12)}  # width, heads; of MoCo v3
TO_TORCHVISION = {  # parts of the official names of a ViT's weights
    "cls_token": "class_token",
    "pos_embed": "encoder.pos_embedding",
    "patch_embed.proj": "conv_proj",
    "blocks.": "encoder.layers.encoder_layer_",
    "norm1": "ln_1",
    "norm2": "ln_2",
    "norm.": "encoder.ln.",
    "attn.proj": "self_attention.out_proj",
    "attn.qkv.": "self_attention.in_proj_",
    "mlp.fc1": "mlp.0",
    "mlp.fc2": "mlp.3",
}
TO_OURS = {  # parts of OpenAI's names of CLIP's weights, and of clip.py's
    "visual.transformer.resblocks": "backbone.blocks",
    "transformer.resblocks": "text_encoder.blocks",
    "visual.attnpool.c_proj": "projector",
    "visual.attnpool.positional_embedding": "backbone.avgpool.positions",
    "visual.attnpool": "backbone.avgpool",
    "visual.positional_embedding": "backbone.positions",
    "visual.class_embedding": "backbone.class_token",
    "visual.proj": "projector.weight",
    "visual.conv2": "backbone.maxpool.0",  # of the first three convolutions
    "visual.bn2": "backbone.maxpool.1",
    "visual.conv3": "backbone.maxpool.3",
    "visual.bn3": "backbone.maxpool.4",
    "visual": "backbone",
    "mlp.": "",
    "token_embedding": "text_encoder.token_embedding",
    "positional_embedding": "text_encoder.positions",
    "ln_final": "text_encoder.ln_final",
    "text_projection": "text_projector.weight",
    "logit_scale": "log_scale",
}
MATRICES = ("visual.proj", "text_projection")  # parameters there, weights of linear layers here


def load_backbone(path: str) -> tuple[nn.Module, Augment, str]:
    """(backbone, the view to evaluate it on, description) of one of our runs or of an official
    checkpoint. Exits with one line if its weights are not known."""
    checkpoint = harness.load_checkpoint(path)
    state = unwrap(checkpoint)
    if not isinstance(state, dict) or not all(torch.is_tensor(x) for x in state.values()):
        fail(f"{path} holds no weights that this program knows")
    state = {name.removeprefix("module."): x for name, x in state.items()}
    ours = "args" in checkpoint and "log" in checkpoint
    prefix = find_prefix(state, OURS if ours else LAYOUTS)
    if prefix is None:
        fail(f"{path}: no ResNet or ViT under any of the names {', '.join(LAYOUTS)}")
    body = {name.removeprefix(prefix): x for name, x in state.items() if name.startswith(prefix)}
    if ours:
        backbone, view, name = build_ours(path, checkpoint)
    else:
        if "patch_embed.proj.weight" in body:
            body = {rename(name): x for name, x in body.items()}
        name, backbone = build_official(body)
        if backbone is None:
            fail(f"{path}: {LAYOUTS[prefix]}, but none of {', '.join((*RESNETS, *VITS))}")
        view = Augment(224)
        name = f"{name}, {LAYOUTS[prefix]}"
    unused = [key for key in body if key not in backbone.state_dict()]
    unused += [key for key in state if not key.startswith(prefix)]
    try:
        backbone.load_state_dict({key: body[key] for key in backbone.state_dict()})
    except (KeyError, RuntimeError):
        fail(f"{path} is of another version of this program")
    parts = sorted({key.split(".")[0] for key in unused})
    return backbone, view, f"{name}; left out: {', '.join(parts) or 'nothing'}"


# ------------------------------------------------------------------------- CLIP, both its towers
def clip_weights(checkpoint):
    """{name: weight} if these are an image and a text encoder, ours or OpenAI's; or else {}."""
    state = unwrap(checkpoint)
    if not isinstance(state, dict):
        return {}
    found = {}
    for name, x in state.items():
        found[str(name).removeprefix("module.").removeprefix("text.")] = x
    return found if {"text_projection", "text_projector.weight"} & found.keys() else {}


def load_clip(path, state, merges):
    """(model, tokenizer, view, description) of one of our runs or of an official checkpoint, whose
    tokens need the file `merges`; without it there is no tokenizer."""
    clip = importlib.import_module("clip")
    if "text_projector.weight" in state:
        model, tokenizer, args = clip.load(path, "cpu")
        return model, tokenizer, clip.build_views(args)[0], f"clip, {args.arch}"
    try:
        args = official_settings(state)
        vocabulary = len(state["token_embedding.weight"])
        model = clip.CLIP(args, vocabulary)
        weights = {}
        for name, x in state.items():
            if name not in ("input_resolution", "context_length", "vocab_size"):
                weights[translate(name)] = x.T if name in MATRICES else x
        model.load_state_dict(weights)
    except (KeyError, IndexError, RuntimeError):
        fail(f"{path}: CLIP, but none of its ViT-B, ViT-L, RN50 and RN101")
    tokenizer = None
    if merges:
        tokenizer = Tokenizer(read_merges(merges), args.context)
        if tokenizer.vocabulary != vocabulary:
            fail(f"--merges {merges}: {tokenizer.vocabulary} tokens, but {path} has {vocabulary}")
    return model.eval(), tokenizer, clip.build_views(args)[0], f"CLIP, {args.arch}"


def official_settings(state):
    """The settings of clip.py for weights of these shapes, under OpenAI's names."""
    width = len(state["ln_final.weight"])
    first = state["visual.conv1.weight"]
    args = Namespace(text="transformer", text_width=width, text_heads=width // 64)
    args.text_layers = count_layers(state, "transformer.resblocks.")
    args.context = len(state["positional_embedding"])
    args.projection_dim = state["text_projection"].shape[1]
    args.crop_min = 0.9
    args.batch_size = 1
    if "visual.proj" in state:
        sizes = (len(first), count_layers(state, "visual.transformer.resblocks."))
        args.arch = {(768, 12): "vit_base", (1024, 24): "vit_large"}[sizes]
        args.patch_size = first.shape[-1]
        cells = len(state["visual.positional_embedding"]) - 1
    else:
        blocks = count_layers(state, "visual.layer3.")
        args.arch = {6: "resnet50", 23: "resnet101"}[blocks]
        args.patch_size = 32
        cells = len(state["visual.attnpool.positional_embedding"]) - 1
    args.size = args.patch_size * math.isqrt(cells)
    return args


def count_layers(state, prefix):
    """How many numbers follow the prefix in the names of the weights."""
    return len({name[len(prefix) :].split(".")[0] for name in state if name.startswith(prefix)})


def translate(name):
    """OpenAI's name of a weight of CLIP -> ours."""
    for old, new in TO_OURS.items():
        name = name.replace(old, new)
    return name


@torch.no_grad()
def zero_shot(model, tokenizer, data, view, workers):
    """Top-1 and top-5 in percent by the names of the classes alone."""
    clip = importlib.import_module("clip")
    names = [name.replace("_", " ") for name in data.classes]
    templates = FRAMES if data.name == "patterns" else TEMPLATES
    classes = clip.embed_classes(model, tokenizer, names, templates)
    z = clip.embed_images(model, data.test[0], view, workers)
    found = accuracy(z @ classes.T, data.test[1].to(z.device))
    return {f"zero_shot_{key}": value for key, value in found.items()}


def find_prefix(state, prefixes):
    for prefix in prefixes:
        if any(prefix + name in state for name in FIRST_LAYERS):
            return prefix
    return None


def unwrap(checkpoint):
    """The weights of a checkpoint, whatever holds them."""
    for key in ("model", "state_dict"):
        if isinstance(checkpoint, dict) and key in checkpoint:
            checkpoint = checkpoint[key]
    return checkpoint


def build_ours(path, checkpoint):
    """From the script that trained it, which has to be beside this file."""
    try:
        args = Namespace(**checkpoint["args"])
        if not Path(__file__).with_name(f"{Path(args.method).name}.py").exists():
            raise ImportError(f"there is no {args.method}.py here")
        script = importlib.import_module(args.method)
        view = script.build_views(args)[0]
        name = f"{args.method}, {args.arch}, epoch {len(checkpoint['log']) - 1}"
        return script.build_backbone(args), view, name
    except (ImportError, AttributeError, KeyError, TypeError) as error:
        fail(f"{path} is of another version of this program ({error})")


def rename(name):
    """The official name of a weight of a ViT -> torchvision's."""
    for old, new in TO_TORCHVISION.items():
        name = name.replace(old, new)
    return name


def build_official(body):
    """(name, network) whose weights have these names and shapes, apart from the classifier, which
    may be missing or different; (None, None) if there is none."""
    networks = {name: getattr(torchvision.models, name) for name in RESNETS}
    for name, (width, heads) in VITS.items():
        vit = torchvision.models.VisionTransformer
        networks[name] = partial(vit, 224, 16, 12, heads, width, 4 * width)
    for name, build in networks.items():
        with torch.device("meta"):
            network = build()
        classifier = "fc" if hasattr(network, "fc") else "heads"
        setattr(network, classifier, nn.Identity())
        shapes = {key: x.shape for key, x in network.state_dict().items()}
        roots = {key.split(".")[0] for key in shapes}
        found = {key: x.shape for key, x in body.items() if key.split(".")[0] in roots}
        if found == shapes:
            network = build()
            setattr(network, classifier, nn.Identity())
            return name, network
    return None, None


# --------------------------------------------------------------------------- the papers' protocol
def linear_sgd(backbone, data, view, device, epochs, workers=0):
    """Test accuracy of a linear classifier trained by SGD on random crops and flips. Its learning
    rate is the one of RATES that does best on 10,000 held-out training images (at most a fifth of
    them); with it, the classifier is then trained again, on all of them."""
    images, labels = data.train
    labels = labels.to(device)
    fit, choose = held_out(len(labels), min(10_000, len(labels) // 5))
    heads = train_heads(backbone, data, fit, view, device, epochs, RATES, workers)
    h = features(backbone, select(images, choose), view, device, workers)
    found = [accuracy(head(h), labels[choose.to(device)])["top1"] for head in heads]
    rate = RATES[found.index(max(found))]
    rows = torch.arange(len(labels))
    head = train_heads(backbone, data, rows, view, device, epochs, [rate], workers)[0]
    h_test = features(backbone, data.test[0], view, device, workers)
    return accuracy(head(h_test), data.test[1].to(device))


def train_heads(backbone, data, rows, view, device, epochs, rates, workers, batch_size=256):
    """One classifier per learning rate, on the training images in `rows`: SGD with momentum 0.9,
    no weight decay, a cosine schedule; all of them see the same crops."""
    images, labels = data.train
    rows = rows.to(device)
    labels = labels.to(device)
    batch_size = min(batch_size, len(rows)) // world_size() * world_size()
    augment = Augment(view.size, bicubic=view.bicubic, mean=view.mean, std=view.std)
    views = Views(select(images, rows), [augment], batch_size, device, workers=workers)
    backbone = copy.deepcopy(backbone).eval()
    with torch.no_grad():
        plain = view.plain(torch.zeros(1, 3, view.size, view.size, device=device))
        width = backbone(plain).shape[1]
    heads = nn.ModuleList(nn.Linear(width, len(data.classes)) for _ in rates).to(device)
    for parameter in heads.parameters():
        nn.init.zeros_(parameter)
    groups = []
    for head, rate in zip(heads, rates):
        groups.append({"params": head.parameters(), "lr": rate * batch_size / 256})
    optimizer = torch.optim.SGD(groups, momentum=0.9)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    for epoch in range(epochs):
        views.set_epoch(epoch)
        for batch, (x,) in zip(views.rows(), views):
            with torch.no_grad():
                h = backbone(x).float()
            target = labels[rows[batch.to(device)]]
            optimizer.zero_grad()
            sum(F.cross_entropy(head(h), target) for head in heads).backward()
            if world_size() > 1:
                for parameter in heads.parameters():
                    dist.all_reduce(parameter.grad)
                    parameter.grad /= world_size()
            optimizer.step()
        schedule.step()
    return heads.requires_grad_(False)


# ------------------------------------------------------------------------------------- program
def evaluate(args):
    """Prints what the checkpoint is and what its backbone reaches; returns the latter."""
    device = torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    if "RANK" in os.environ:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    state = clip_weights(harness.load_checkpoint(args.checkpoint))
    tokenizer = None
    if state:
        model, tokenizer, view, name = load_clip(args.checkpoint, state, args.merges)
        model = model.to(device)
        backbone = model.backbone
    else:
        backbone, view, name = load_backbone(args.checkpoint)
    data = load_images(args.data, args.root, device)
    if not data.test:
        fail(f"--data {args.data} has no labels: it takes train/<class>/ and val/<class>/ folders")
    epochs = args.epochs
    if epochs is None:
        epochs = 100 if data.large else 0
    backbone = backbone.to(device)
    metrics = linear_eval(backbone, data, view, device, args.workers, classifier=epochs == 0)
    if epochs > 0:
        found = linear_sgd(backbone, data, view, device, epochs, args.workers)
        metrics |= {f"linear_{key}": value for key, value in found.items()}
    if tokenizer:
        metrics |= zero_shot(model, tokenizer, data, view, args.workers)
    elif state:
        name += "; zero-shot needs --merges"
    if rank() == 0:
        print(f"{args.checkpoint}: {name}")
        print(json.dumps({"data": data.name, **metrics}))
    return metrics


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.error = fail
    parser.add_argument("checkpoint")
    parser.add_argument("--data", default="patterns", help="as in the scripts")
    parser.add_argument("--root", default="data", help="where torchvision keeps its data sets")
    parser.add_argument("--epochs", type=int, help="of SGD; 0: fit once to plain features")
    parser.add_argument("--merges", help="of CLIP's tokens: bpe_simple_vocab_16e6.txt.gz")
    parser.add_argument("--workers", type=int, default=min(8, os.cpu_count() or 1))
    return parser.parse_args(argv)


def main(args):
    with harness.clean_exit("stopped"):
        return evaluate(args)


if __name__ == "__main__":
    main(parse_args())
