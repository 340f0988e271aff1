"""How often a cell that DenseCL matches is the geometrically right one: the boxes of both crops are
known, so is the key's cell in which the centre of each query cell lies.

python results/matches.py runs/densecl-patterns/checkpoint.pt [more seeds ...]

Prints and writes results/densecl_matches.json: percent of the query cells whose centre the key's
crop contains, for the trained and for random weights, and for a guess among the cells.
"""

import json
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import densecl  # noqa: E402
from common import AUGMENTS, adapt, fail, load, load_checkpoint, seeded  # noqa: E402


def right_cells(box_q, flip_q, box_k, flip_k, side):
    """Boxes (B, 4) of top, left, height, width and flips (B,) of two crops of the same images ->
    (B, S): for each cell of the query the key's cell with the same place; -1 if it has none."""
    centre = (torch.arange(side) + 0.5) / side
    down, right = (x.flatten() for x in torch.meshgrid(centre, centre, indexing="ij"))  # (S,)
    right = torch.where(flip_q.unsqueeze(1), 1 - right, right)  # (B, S), in the crop unflipped
    (top, left, tall, wide), (top_k, left_k, tall_k, wide_k) = (
        box.unsqueeze(2).unbind(1) for box in (box_q, box_k)
    )
    down = (top + down * tall - top_k) / tall_k  # (B, S), in the other crop
    right = (left + right * wide - left_k) / wide_k
    inside = (down >= 0) & (down < 1) & (right >= 0) & (right < 1)
    right = torch.where(flip_k.unsqueeze(1), 1 - right, right)
    cells = (down * side).floor() * side + (right * side).floor().clamp(max=side - 1)
    return torch.where(inside, cells, -1).long()


@torch.no_grad()
def matched_rightly(encoder, images, augment, repeats=5):
    """Percent of the cells with a right match, and of the guesses that would be right."""
    encoder.eval()
    hits = cells = 0
    for repeat in range(repeats):
        chance, maps, boxes, flips = seeded("matches", repeat), [], [], []
        for _ in range(2):
            box = augment.boxes(len(images), *images.shape[2:], chance)
            draws = augment.draw(len(images), chance)
            maps.append(encoder(augment.apply(images, box, draws))[2])  # (B, S, D)
            boxes.append(box)
            flips.append(draws["flip"])
        side = round(maps[0].shape[1] ** 0.5)
        truth = right_cells(boxes[0], flips[0], boxes[1], flips[1], side)
        found = densecl.match(*maps)
        hits += (found == truth).sum().item()
        cells += (truth >= 0).sum().item()
    return {"right": 100 * hits / cells, "guess": 100 / side**2, "cells": cells}


def main(paths):
    if not paths:
        fail("name the checkpoint.pt of one or more runs of densecl.py")
    record = ROOT / "results" / "densecl_matches.json"
    kept, lines = json.loads(record.read_text()) if record.exists() else [], []
    for path in paths:
        checkpoint = load_checkpoint(path)
        args = densecl.Args(**checkpoint["args"])
        data, augment = load(args.data, args.root), adapt(AUGMENTS["densecl"], args.size)[0]
        images = data.test[0] if data.test else data.pretrain
        torch.manual_seed(args.seed)
        model = densecl.DenseCL(args)  # as training starts
        random = matched_rightly(model.encoder_q, images, augment)
        model.load_state_dict(checkpoint["model"])
        trained = matched_rightly(model.encoder_q, images, augment)
        lines.append({"data": data.name, "arch": args.arch, "seed": args.seed,
                      "epoch": checkpoint["epoch"], "trained": round(trained["right"], 1),
                      "random": round(random["right"], 1), "guess": trained["guess"],
                      "cells": trained["cells"]})
        print(json.dumps(lines[-1]))
    same = ("data", "arch", "seed", "epoch")  # a run counted again replaces its line
    again = [[line[key] for key in same] for line in lines]
    lines = [line for line in kept if [line[key] for key in same] not in again] + lines
    record.write_text(json.dumps(lines, indent=1) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
