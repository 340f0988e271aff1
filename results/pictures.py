"""Draws the two pictures at the top of README.md.

    python -m results.pictures idea                                # results/idea.png
    python -m results.pictures neighbours runs/simclr-patterns     # results/neighbours.png

The second takes a finished run on the patterns and compares its features with random weights."""

import argparse
import importlib
from argparse import Namespace
from pathlib import Path

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from matplotlib.patches import Circle, FancyArrowPatch, FancyBboxPatch, Rectangle

import common
import harness

FOLDER = Path(__file__).resolve().parent
GREEN = "#2e8b57"
RED = "#c0392b"
COLOURS = ("#2a6fbb", "#e08a1e")  # of the two images


# ------------------------------------------------------------------------------------- the idea
def draw_idea(path):
    """Two images, two views of each, one network, and where the embeddings are pushed."""
    figure = Figure(figsize=(10, 4.2))
    axis = figure.add_axes((0, 0, 1, 1))
    axis.axis("off")
    view = common.Augment(64, scale=(0.15, 0.6), jitter=(0.4, 0.4, 0.4, 0.1), jitter_p=1.0)
    images = common.patterns(10)[0]
    heights = ((3.2, 2.4), (1.5, 0.7))  # of the views of each image
    for i, row in enumerate((0, 9)):
        middle = sum(heights[i]) / 2
        place(axis, images[row].float() / 255, 0.85, middle, 1.1, COLOURS[i])
        for k, height in enumerate(heights[i]):
            x = view(images[row : row + 1], common.make_generator("idea", row, k))[0]
            x = (x - x.min()) / (x.max() - x.min())
            place(axis, x, 2.75, height, 0.7, COLOURS[i])
            arrow(axis, (1.45, middle), (2.35, height), "#666666")
            arrow(axis, (3.15, height), (4.0, height), "#666666")
    box = FancyBboxPatch(
        (4.1, 0.4), 1.7, 3.1, boxstyle="round,pad=0.05", fc="#eef3fa", ec="#666666"
    )
    axis.add_patch(box)
    axis.text(4.95, 1.95, "one network,\nno labels", ha="center", va="center", fontsize=13)
    arrow(axis, (5.95, 1.95), (6.65, 1.95), "#666666")

    axis.add_patch(Circle((8.3, 1.95), 1.5, fill=False, ec="#bbbbbb"))
    points = (((7.35, 3.11), (8.72, 3.39)), ((7.9, 0.5), (9.22, 0.76)))
    for i, (start, end) in enumerate(points):
        for x, y in (start, end):
            axis.plot(x, y, "o", color=COLOURS[i], markersize=15)
        x = (start[0] + end[0]) / 2
        y = (start[1] + end[1]) / 2
        arrow(axis, start, (x - 0.05, y), GREEN, 2)
        arrow(axis, end, (x + 0.05, y), GREEN, 2)
    arrow(axis, (8.2, 2.15), (8.1, 2.95), RED, 2)
    arrow(axis, (8.3, 1.75), (8.45, 0.95), RED, 2)
    axis.text(8.3, 2.62, "  push apart", color=RED, fontsize=12)
    axis.text(8.3, 3.62, "pull together", color=GREEN, fontsize=12, ha="center")
    axis.text(8.3, 0.1, "pull together", color=GREEN, fontsize=12, ha="center")
    for x, text in ((0.85, "images"), (2.75, "random views"), (8.3, "embeddings")):
        axis.text(x, 3.95, text, ha="center", fontsize=13)
    axis.set(xlim=(0, 10), ylim=(0, 4.2), aspect="equal")
    figure.savefig(path, dpi=110)


def place(axis, image, x, y, side, colour):
    corner = (x - side / 2, y - side / 2)
    extent = (corner[0], corner[0] + side, corner[1], corner[1] + side)
    axis.imshow(image.permute(1, 2, 0).numpy(), extent=extent)
    axis.add_patch(Rectangle(corner, side, side, fill=False, ec=colour, lw=3))


def arrow(axis, start, end, colour, width=1.2):
    style = {"arrowstyle": "-|>", "mutation_scale": 14, "color": colour, "lw": width}
    axis.add_patch(FancyArrowPatch(start, end, **style))


# --------------------------------------------------------------------------- nearest neighbours
def draw_neighbours(folder, path, queries=10, neighbours=5):
    """Test images and their nearest neighbours by random weights and by the trained backbone."""
    checkpoint = harness.load_checkpoint(Path(folder, "checkpoint.pt"))
    args = Namespace(**checkpoint["args"])
    script = importlib.import_module(args.method)
    view = script.build_views(args)[0]
    images, labels = common.load_images("patterns").test
    torch.manual_seed(args.seed)
    backbone = script.build_backbone(args)
    figure = Figure(figsize=(12, 4), layout="constrained")
    axes = figure.subplots(1, 2)
    for axis, kind in zip(axes, ("random weights", f"{args.method}, no labels")):
        if kind != "random weights":
            weights = torch.load(Path(folder, "backbone.pt"), weights_only=True)
            backbone.load_state_dict(weights)
        h = F.normalize(common.features(backbone, images, view, "cpu"), dim=1)
        nearest = (h @ h.T).topk(neighbours + 1).indices  # (N, 1 + neighbours), first: the image
        right = labels[nearest[:, 1:]] == labels.unsqueeze(1)
        share = 100 * right.float().mean().item()
        title = f"{kind}: {share:.0f} % are of the same kind"
        show_grid(axis, images, labels, nearest[:queries], title)
    figure.savefig(path, dpi=100)


def show_grid(axis, images, labels, nearest, title):
    """A column per query: the image on top, its neighbours below, framed in green or red."""
    for column, row in enumerate(nearest.tolist()):
        for depth, index in enumerate(row):
            top = depth + 0.25 * (depth > 0)
            picture = images[index].permute(1, 2, 0).numpy()
            axis.imshow(picture, extent=(column + 0.06, column + 0.94, top + 0.94, top + 0.06))
            right = labels[index] == labels[row[0]]
            colour = "black" if depth == 0 else GREEN if right else RED
            frame = Rectangle((column + 0.06, top + 0.06), 0.88, 0.88, fill=False, ec=colour, lw=2)
            axis.add_patch(frame)
    axis.set(xlim=(0, len(nearest)), ylim=(nearest.shape[1] + 0.25, 0), xticks=[], title=title)
    axis.set_yticks([0.5, nearest.shape[1] / 2 + 0.6], ["image", "its nearest neighbours"])
    for label in axis.get_yticklabels():
        label.set(rotation=90, va="center")
    axis.tick_params(length=0)
    for side in axis.spines.values():
        side.set_visible(False)


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.error = common.fail
    parser.add_argument("picture", choices=["idea", "neighbours"])
    parser.add_argument("run", nargs="?", default="runs/simclr-patterns")
    args = parser.parse_args(argv)
    if args.picture == "idea":
        draw_idea(FOLDER / "idea.png")
    else:
        draw_neighbours(args.run, FOLDER / "neighbours.png")


if __name__ == "__main__":
    main()
