"""How often a cell that DenseCL matches is the geometrically right one: the boxes of both crops are
known, and so is the key's cell in which the centre of each query cell lies.

    python -m results.matches runs/densecl-patterns/checkpoint.pt [more seeds ...]

Prints and records in results/densecl_matches.json: percent of the query cells whose centre the
key's crop contains, for trained and for random weights, and for a guess among the cells."""

import argparse
import json
from argparse import Namespace
from pathlib import Path

import torch

import densecl
import harness
from common import fail, load_images, make_generator
from results.methods import ROOT

SAME = ("data", "arch", "seed", "epoch")  # a run measured again replaces its line


def right_cells(box_q, flip_q, box_k, flip_k, side):
    """Boxes (B, 4) of top, left, height, width and flips (B,) of two crops of the same images ->
    (B, S): for each cell of the query the key's cell that shows the same place; -1 if none does."""
    centre = (torch.arange(side) + 0.5) / side
    down = centre.repeat_interleave(side)  # (S,)
    right = centre.repeat(side)
    right = torch.where(flip_q.unsqueeze(1), 1 - right, right)  # (B, S), in the crop unflipped
    top, left, height, width = box_q.unsqueeze(2).unbind(1)  # (B, 1) each
    y = top + down * height  # (B, S), in the image
    x = left + right * width
    top, left, height, width = box_k.unsqueeze(2).unbind(1)
    down = (y - top) / height  # (B, S), in the other crop
    right = (x - left) / width
    inside = (down >= 0) & (down < 1) & (right >= 0) & (right < 1)
    right = torch.where(flip_k.unsqueeze(1), 1 - right, right)
    row = (down * side).floor()
    column = (right * side).floor().clamp(max=side - 1)  # 1 - 0 is 1
    return torch.where(inside, row * side + column, -1).long()


def crops(encoder, images, augment, generator):
    """One random view of each image: the encoder's map (B, S, D), the boxes, the flips."""
    boxes = augment.draw_boxes(len(images), *images.shape[2:], generator)
    draws = augment.draw(len(images), generator)
    _, _, h = encoder(augment.apply(images, boxes, draws))
    return h, boxes, draws["flip"]


@torch.no_grad()
def count(encoder, images, augment, repeats=5):
    """Percent of the cells that are matched rightly, and that a guess would match rightly."""
    encoder.eval()
    hits = 0
    cells = 0
    for repeat in range(repeats):
        generator = make_generator("matches", repeat)
        h_q, box_q, flip_q = crops(encoder, images, augment, generator)
        h_k, box_k, flip_k = crops(encoder, images, augment, generator)
        side = round(h_q.shape[1] ** 0.5)
        truth = right_cells(box_q, flip_q, box_k, flip_k, side)
        hits += (densecl.match(h_q, h_k) == truth).sum().item()
        cells += (truth >= 0).sum().item()
    return {"right": 100 * hits / cells, "guess": 100 / side**2, "cells": cells}


def measure(path):
    """The line of a checkpoint of densecl.py."""
    checkpoint = harness.load_checkpoint(path)
    args = Namespace(**checkpoint.get("args", {}))
    if vars(args).get("method") != "densecl":
        fail(f"{path} is not a run of densecl.py")
    data = load_images(args.data, args.root)
    images = data.test[0] if data.test else data.pretrain
    if not torch.is_tensor(images):
        fail(f"{path} was trained on {data.name}, whose images are too large to be kept in memory")
    augment = densecl.build_views(args)[0]
    torch.manual_seed(args.seed)
    model = densecl.DenseCL(args)  # as training starts
    random = count(model.encoder_q, images, augment)
    model.load_state_dict(checkpoint["model"])
    trained = count(model.encoder_q, images, augment)
    return {
        "data": data.name,
        "arch": args.arch,
        "seed": args.seed,
        "epoch": len(checkpoint["log"]) - 1,
        "trained": round(trained["right"], 1),
        "random": round(random["right"], 1),
        "guess": trained["guess"],
        "cells": trained["cells"],
    }


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.error = fail
    parser.add_argument("checkpoints", nargs="+", metavar="CHECKPOINT")
    record = ROOT / "results" / "densecl_matches.json"
    parser.add_argument("--lines", type=Path, default=record, help="where the lines go")
    args = parser.parse_args(argv)
    lines = json.loads(args.lines.read_text()) if args.lines.exists() else []
    for path in args.checkpoints:
        line = measure(path)
        print(json.dumps(line))
        lines = [old for old in lines if any(old[key] != line[key] for key in SAME)]
        lines.append(line)
    harness.save(args.lines, json.dumps(lines, indent=1) + "\n")


if __name__ == "__main__":
    main()
