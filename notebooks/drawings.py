"""A drawing of each method in one style: what passes through what, what is trained, what follows it
as a moving average, and where the gradient stops.

    drawings.draw("byol")        # a matplotlib figure

Names are those of the scripts. Places are in inches from the lower left corner."""

import matplotlib.pyplot as plt
from matplotlib.patches import Ellipse, FancyArrowPatch, Patch, Rectangle

HEIGHT = 0.46  # of a box
STYLES = {  # what a box is: how its patch looks
    "image or text": {"facecolor": "white", "edgecolor": "gray"},
    "trained": {"facecolor": "#cfe3f5", "edgecolor": "#1f5fa0", "linewidth": 1.4},
    "moving average": {"facecolor": "#fde2c0", "edgecolor": "#b8650b", "linestyle": "--"},
    "frozen": {"facecolor": "#e4e4e4", "edgecolor": "#555555", "hatch": "///"},
    "computed, no weights": {"facecolor": "white", "edgecolor": "black", "linestyle": ":"},
    "loss": {"facecolor": "#fff3a8", "edgecolor": "black", "linewidth": 2},
}
DATA, TRAINED, AVERAGE, FROZEN, COMPUTED, LOSS = STYLES


class Drawing:
    """Boxes and arrows on a figure of this size. A box is known by its key."""

    def __init__(self, width, height):
        self.figure, self.axis = plt.subplots(
            figsize=(width, height + 0.35), dpi=110, layout="none"
        )
        self.axis.set(xlim=(0, width), ylim=(-0.35, height), aspect="equal")
        self.axis.axis("off")
        self.boxes = {}  # key: (x, y, width, height) around the centre
        self.kind_of = {}  # key: what it is
        self.texts = {}  # key: the text in the box
        self.stops = []  # (from, to) of the arrows without gradient
        self.averages = []  # (from, to) of the moving averages
        self.arrows = []

    def box(self, key, kind, x, y, text=None, width=1.15, height=HEIGHT):
        shape = Ellipse if kind == LOSS else Rectangle
        place = (x, y) if kind == LOSS else (x - width / 2, y - height / 2)
        self.axis.add_patch(shape(place, width, height, zorder=2, **STYLES[kind]))
        text = self.axis.text(x, y, text or key, ha="center", va="center", fontsize=8.5, zorder=4)
        if kind == FROZEN:  # readable on the hatching
            text.set_bbox({"facecolor": STYLES[FROZEN]["facecolor"], "edgecolor": "none", "pad": 1})
        self.boxes[key] = (x, y, width, height)
        self.texts[key] = text
        self.kind_of[key] = kind

    def chain(self, y, start, *steps):
        """Boxes in a row, joined by arrows; a step: (key, kind, x, label of the arrow to it)."""
        before = start
        for key, kind, x, label in steps:
            text = key.split(" ")[0]
            self.box(key, kind, x, y, text)
            self.arrow(before, key, label)
            before = key

    def arrow(self, start, end, label="", stop=False, bend=0.0, shift=(0.0, 0.11)):
        """From box to box. stop: no gradient flows back along it."""
        tail, head = self.ends(start, end)
        style = f"arc3,rad={bend}"
        arrow = FancyArrowPatch(tail, head, arrowstyle="-|>", mutation_scale=10, zorder=1)
        arrow.set(connectionstyle=style, color="black", linewidth=1)
        self.axis.add_patch(arrow)
        self.arrows.append((start, end))
        x = (tail[0] + head[0]) / 2
        y = (tail[1] + head[1]) / 2
        if label:
            self.note(label, x + shift[0], y + shift[1])
        if stop:
            self.stops.append((start, end))
            self.bars(tail, head)

    def line(self, start, end, y):
        """A level arrow between two boxes side by side, at this height."""
        x1, _, width1, _ = self.boxes[start]
        x2, _, width2, _ = self.boxes[end]
        tail = (x1 + width1 / 2, y)
        head = (x2 - width2 / 2, y)
        arrow = FancyArrowPatch(tail, head, arrowstyle="-|>", mutation_scale=10, zorder=1)
        self.axis.add_patch(arrow)
        self.arrows.append((start, end))
        return tail, head

    def side(self, start, end, y, label, stop=False):
        """The same, with a label."""
        tail, head = self.line(start, end, y)
        self.note(label, (tail[0] + head[0]) / 2, y + (0.2 if stop else 0.11))
        if stop:
            self.stops.append((start, end))
            self.bars(tail, head)

    def bentarrow(self, start, end, x):
        """To the right as far as x, up, and back to the left."""
        x1, y1, width1, _ = self.boxes[start]
        x2, y2, width2, _ = self.boxes[end]
        xs = [x1 + width1 / 2, x, x, x2 + width2 / 2 + 0.12]
        self.axis.plot(xs, [y1, y1, y2, y2], color="black", linewidth=1, zorder=1)
        tail = (x2 + width2 / 2 + 0.13, y2)
        head = (x2 + width2 / 2, y2)
        self.axis.add_patch(FancyArrowPatch(tail, head, arrowstyle="-|>", mutation_scale=10))
        self.arrows.append((start, end))

    def corner(self, start, end, x, label, stop=False):
        """To the right as far as x, then up or down to the other box."""
        x1, y1, width1, _ = self.boxes[start]
        _, y2, _, height2 = self.boxes[end]
        turn = (x, y1)
        self.axis.plot([x1 + width1 / 2, x], [y1, y1], color="black", linewidth=1, zorder=1)
        head = (x, y2 - height2 / 2 if y2 > y1 else y2 + height2 / 2)
        arrow = FancyArrowPatch(turn, head, arrowstyle="-|>", mutation_scale=10, shrinkA=0)
        self.axis.add_patch(arrow)
        self.arrows.append((start, end))
        self.note(label, x1 + width1 / 2 + 0.4, y1 + 0.11)
        if stop:
            self.stops.append((start, end))
            self.bars((x1 + width1 / 2, y1), turn)

    def bars(self, tail, head):
        """Two short strokes across an arrow: the gradient stops here."""
        dx = head[0] - tail[0]
        dy = head[1] - tail[1]
        length = (dx * dx + dy * dy) ** 0.5
        for part in (-0.03, 0.03):
            x = (tail[0] + head[0]) / 2 + part * dx / length
            y = (tail[1] + head[1]) / 2 + part * dy / length
            across = (-0.1 * dy / length, 0.1 * dx / length)
            xs = [x - across[0], x + across[0]]
            ys = [y - across[1], y + across[1]]
            self.axis.plot(xs, ys, color="crimson", linewidth=2, zorder=3)

    def average(self, start, end, label="EMA"):
        """The weights of the second follow those of the first."""
        tail, head = self.ends(start, end)
        arrow = FancyArrowPatch(tail, head, arrowstyle="-|>", mutation_scale=10, zorder=1)
        arrow.set(color=STYLES[AVERAGE]["edgecolor"], linewidth=1.4, linestyle="--")
        self.axis.add_patch(arrow)
        self.averages.append((start, end))
        x = (tail[0] + head[0]) / 2
        y = (tail[1] + head[1]) / 2
        self.note(label, x + 0.06, y, ha="left", color=STYLES[AVERAGE]["edgecolor"])

    def shared(self, first, second):
        """The two boxes are one network."""
        tail, head = self.ends(first, second)
        self.axis.plot(
            [tail[0], head[0]], [tail[1], head[1]], color="#1f5fa0", linewidth=3, zorder=1
        )
        y = (tail[1] + head[1]) / 2
        self.note("the same weights", tail[0] + 0.08, y, ha="left", color="#1f5fa0")

    def note(self, text, x, y, ha="center", color="black"):
        self.axis.text(x, y, text, ha=ha, va="center", fontsize=8, color=color, zorder=5)

    def cells(self, key, x, y, text, count=8, colours=("#fde2c0", "white")):
        """A memory: a row of cells, the newest first."""
        width = 0.16
        left = x - count * width / 2
        for number in range(count):
            colour = colours[0] if number < 2 else colours[1]
            place = (left + number * width, y - 0.12)
            cell = Rectangle(place, width, 0.24, facecolor=colour, edgecolor="black", zorder=2)
            self.axis.add_patch(cell)
        self.boxes[key] = (x, y, count * width, 0.24)
        self.note(text, x, y - 0.24)

    def table(self, key, x, y, text, size=4, cell=0.17, views=1):
        """A square table with the right answers in blue: the diagonal; with two views, half a
        table beside it, while the diagonal, each view with itself, is left out."""
        left = x - size * cell / 2
        top = y + size * cell / 2
        for i in range(size):
            for j in range(size):
                place = (left + j * cell, top - (i + 1) * cell)
                colour = "white"
                if views == 2 and i == j:
                    colour = "#bbbbbb"
                if j == (i + (views - 1) * size // 2) % size:
                    colour = "#1f5fa0"
                square = Rectangle(place, cell, cell, facecolor=colour, edgecolor="gray", zorder=2)
                self.axis.add_patch(square)
        self.boxes[key] = (x, y, size * cell, size * cell)
        self.note(text, x, y - size * cell / 2 - 0.05 - 0.08 * len(text.splitlines()))

    def ends(self, start, end):
        """Where a straight arrow between two boxes leaves the one and meets the other."""
        x1, y1, width1, height1 = self.boxes[start]
        x2, y2, width2, height2 = self.boxes[end]
        apart = abs(x2 - x1) - (width1 + width2) / 2
        if apart > 0.05:  # side by side
            side = 1 if x2 > x1 else -1
            return (x1 + side * width1 / 2, y1), (x2 - side * width2 / 2, y2)
        side = 1 if y2 > y1 else -1
        return (x1, y1 + side * height1 / 2), (x2, y2 - side * height2 / 2)

    def finish(self):
        """Adds the legend of what occurs, and gives the figure."""
        there = set(self.kind_of.values())
        shown = [Patch(label=kind, **STYLES[kind]) for kind in STYLES if kind in there]
        if self.stops:
            line = plt.Line2D([], [], color="crimson", marker="|", markersize=9, markeredgewidth=2)
            line.set(linestyle="none", label="the gradient stops")
            shown.append(line)
        self.axis.legend(
            handles=shown, ncols=len(shown), loc="lower center", frameon=False, fontsize=8
        )
        self.figure.subplots_adjust(left=0.005, right=0.995, bottom=0.01, top=0.99)
        return self.figure


def two_views(drawing, top, bottom, first="x1", second="x2"):
    """An image and its two views."""
    drawing.box("image", DATA, 0.55, (top + bottom) / 2, width=0.8)
    drawing.box(first, DATA, 1.75, top, width=0.7)
    drawing.box(second, DATA, 1.75, bottom, width=0.7)
    drawing.arrow("image", first)
    drawing.arrow("image", second)


def simclr():
    d = Drawing(10.4, 2.5)
    two_views(d, 1.95, 0.65)
    d.chain(1.95, "x1", ("backbone 1", TRAINED, 3.2, ""), ("projector 1", TRAINED, 5.0, "h"))
    d.chain(0.65, "x2", ("backbone 2", TRAINED, 3.2, ""), ("projector 2", TRAINED, 5.0, "h"))
    d.shared("backbone 1", "backbone 2")
    d.shared("projector 1", "projector 2")
    d.table("similarities", 7.3, 1.3, "cosines of all views", size=6, views=2)
    d.arrow("projector 1", "similarities", "z1", shift=(0.1, 0.16))
    d.arrow("projector 2", "similarities", "z2", shift=(0.1, -0.16))
    d.box("loss", LOSS, 9.4, 1.3, "nt_xent", width=1.3, height=0.6)
    d.arrow("similarities", "loss")
    d.note("each view has to find\nits partner in its row", 9.4, 0.72)
    return d


def momentum_contrast(shuffled):
    """Of MoCo v1 and v2."""
    d = Drawing(10.4, 3.2)
    two_views(d, 2.6, 1.2, "x_q", "x_k")
    d.chain(2.6, "x_q", ("backbone q", TRAINED, 3.9, ""), ("projector q", TRAINED, 5.6, "h"))
    d.note("encoder_q", 3.9, 2.97)
    if shuffled:
        d.box("shuffle", COMPUTED, 2.75, 1.2, width=0.7)
        d.arrow("x_k", "shuffle")
    start = "shuffle" if shuffled else "x_k"
    d.chain(1.2, start, ("backbone k", AVERAGE, 3.9, ""), ("projector k", AVERAGE, 5.6, "h"))
    d.note("encoder_k", 3.9, 0.83)
    d.average("backbone q", "backbone k")
    d.average("projector q", "projector k")
    before = "projector k"
    if shuffled:
        d.box("unshuffle", COMPUTED, 6.95, 1.2, width=0.8)
        d.arrow("projector k", "unshuffle")
        before = "unshuffle"
    d.box("loss", LOSS, 9.2, 2.6, "info_nce", width=1.4, height=0.6)
    d.arrow("projector q", "loss", "q")
    d.arrow(before, "loss", "k, the positive", stop=True, shift=(0.55, -0.2))
    d.cells("queue", 9.2, 0.75, "queue: K keys, newest first")
    d.arrow(before, "queue", "", stop=True)
    d.arrow("queue", "loss", "the negatives", stop=True, bend=0.0, shift=(0.5, -0.35))
    return d


def moco_v1():
    d = momentum_contrast(shuffled=True)
    d.note("one linear layer", 5.6, 2.97)
    return d


def moco_v2():
    d = momentum_contrast(shuffled=True)
    d.note("two layers", 5.6, 2.97)
    return d


def densecl():
    d = Drawing(10.6, 4.3)
    two_views(d, 3.2, 1.4, "x_q", "x_k")
    d.box("backbone q", TRAINED, 3.1, 3.2, "backbone")
    d.box("backbone k", AVERAGE, 3.1, 1.4, "backbone")
    d.arrow("x_q", "backbone q")
    d.arrow("x_k", "backbone k")
    d.average("backbone q", "backbone k")
    d.note("encoder_q", 3.1, 3.57)
    d.note("encoder_k", 3.1, 1.03)
    d.box("projector q", TRAINED, 5.3, 3.85, "projector")
    d.box("dense_projector q", TRAINED, 5.3, 2.95, "dense_projector", width=1.3)
    d.box("dense_projector k", AVERAGE, 5.3, 1.65, "dense_projector", width=1.3)
    d.box("projector k", AVERAGE, 5.3, 0.6, "projector")
    d.arrow("backbone q", "projector q", "average of h", shift=(-0.35, 0.18))
    d.arrow("backbone q", "dense_projector q", "cells of h", shift=(0.05, 0.13))
    d.arrow("backbone k", "dense_projector k")
    d.arrow("backbone k", "projector k")
    d.box("match", COMPUTED, 3.95, 2.3, width=0.75)
    d.arrow("backbone q", "match", "", stop=True)
    d.arrow("backbone k", "match", "", stop=True)
    d.box("dense loss", LOSS, 7.6, 2.3, "dense_info_nce", width=1.6, height=0.6)
    d.arrow("dense_projector q", "dense loss", "cells", shift=(0.15, 0.14))
    d.arrow("dense_projector k", "dense loss", "matched cells", stop=True, shift=(0.45, -0.16))
    d.arrow("match", "dense loss", "which cell is the partner", shift=(0.0, 0.11))
    d.cells("dense_queue", 7.6, 1.3, "dense_queue")
    d.arrow("dense_queue", "dense loss", "", stop=True)
    d.box("loss", LOSS, 9.6, 3.85, "info_nce", width=1.4, height=0.6)
    d.arrow("projector q", "loss", "q")
    d.cells("queue", 10.02, 2.3, "queue", count=6)
    d.corner("projector k", "loss", 9.4, "k", stop=True)
    d.arrow("queue", "loss", "", stop=True)
    return d


def byol():
    d = Drawing(10.4, 2.9)
    two_views(d, 2.25, 0.75)
    d.chain(
        2.25,
        "x1",
        ("backbone 1", TRAINED, 3.2, ""),
        ("projector 1", TRAINED, 5.0, "h"),
        ("predictor", TRAINED, 6.8, "z"),
    )
    d.note("encoder", 4.1, 2.62)
    d.chain(0.75, "x2", ("backbone 2", AVERAGE, 3.2, ""), ("projector 2", AVERAGE, 5.0, "h"))
    d.note("target_encoder", 4.1, 0.38)
    d.average("backbone 1", "backbone 2")
    d.average("projector 1", "projector 2")
    d.box("loss", LOSS, 9.2, 1.5, "regression_loss", width=1.7, height=0.6)
    d.arrow("predictor", "loss", "p", shift=(0.1, 0.15))
    d.arrow("projector 2", "loss", "target", stop=True, shift=(0.0, -0.2))
    d.note("and once more with\nthe views exchanged", 9.2, 0.9)
    return d


def simsiam():
    d = Drawing(10.4, 2.9)
    two_views(d, 2.25, 0.75)
    d.chain(
        2.25,
        "x1",
        ("backbone 1", TRAINED, 3.2, ""),
        ("projector 1", TRAINED, 5.0, "h"),
        ("predictor", TRAINED, 6.8, "z1"),
    )
    d.chain(0.75, "x2", ("backbone 2", TRAINED, 3.2, ""), ("projector 2", TRAINED, 5.0, "h"))
    d.shared("backbone 1", "backbone 2")
    d.shared("projector 1", "projector 2")
    d.note("encoder", 4.1, 2.62)
    d.box("loss", LOSS, 9.2, 1.5, "negative_cosine", width=1.7, height=0.6)
    d.arrow("predictor", "loss", "p1", shift=(0.1, 0.15))
    d.arrow("projector 2", "loss", "z2", stop=True, shift=(0.0, -0.2))
    d.note("and once more with\nthe views exchanged", 9.2, 0.9)
    return d


def moco_v3():
    d = Drawing(10.4, 3.0)
    two_views(d, 2.3, 0.8)
    d.box("conv_proj", FROZEN, 2.75, 2.3, width=0.8)
    d.arrow("x1", "conv_proj")
    d.box("conv_proj k", FROZEN, 2.75, 0.8, "conv_proj", width=0.8)
    d.arrow("x2", "conv_proj k")
    d.chain(
        2.3,
        "conv_proj",
        ("backbone q", TRAINED, 4.1, ""),
        ("projector q", TRAINED, 5.75, "h"),
        ("predictor", TRAINED, 7.35, "z"),
    )
    d.note("encoder_q", 4.1, 2.67)
    d.chain(
        0.8, "conv_proj k", ("backbone k", AVERAGE, 4.1, ""), ("projector k", AVERAGE, 5.75, "h")
    )
    d.note("encoder_k", 4.1, 0.43)
    d.average("backbone q", "backbone k")
    d.average("projector q", "projector k")
    d.box("loss", LOSS, 9.4, 1.55, "contrastive_loss", width=1.75, height=0.6)
    d.arrow("predictor", "loss", "q1", shift=(0.1, 0.15))
    d.arrow("projector k", "loss", "k2: the batch's keys", stop=True, shift=(0.35, -0.28))
    d.note("no queue; once more with\nthe views exchanged", 9.3, 0.9)
    return d


def barlow():
    d = Drawing(10.4, 2.6)
    two_views(d, 2.05, 0.7)
    for number, y in ((1, 2.05), (2, 0.7)):
        d.chain(
            y,
            f"x{number}",
            (f"backbone {number}", TRAINED, 3.2, ""),
            (f"projector {number}", TRAINED, 4.9, "h"),
        )
        d.box(f"bn {number}", COMPUTED, 6.3, y, "bn", width=0.6)
        d.arrow(f"projector {number}", f"bn {number}")
    d.shared("backbone 1", "backbone 2")
    d.shared("projector 1", "projector 2")
    d.table("correlations", 7.9, 1.38, "C: dimensions\nby dimensions", size=5)
    d.arrow("bn 1", "correlations", "z1", shift=(0.1, 0.16))
    d.arrow("bn 2", "correlations", "z2", shift=(0.1, -0.16))
    d.box("loss", LOSS, 9.6, 1.38, "barlow_loss", width=1.35, height=0.6)
    d.arrow("correlations", "loss")
    d.note("ones on the diagonal,\nzeros elsewhere", 9.55, 0.8)
    return d


def swav():
    d = Drawing(10.6, 3.4)
    d.box("image", DATA, 0.55, 1.9, width=0.8)
    d.box("crop 1", DATA, 1.8, 2.7, "large crop", width=0.85)
    d.box("crop 2", DATA, 1.8, 1.5, "large crop", width=0.85)
    d.box("small", DATA, 1.8, 0.55, "small crops", width=0.9)
    for crop in ("crop 1", "crop 2", "small"):
        d.arrow("image", crop)
    d.box("backbone", TRAINED, 3.4, 1.75, width=1.0, height=2.6)
    d.box("projector", TRAINED, 4.75, 1.75, width=0.9, height=2.6)
    d.box("prototypes", TRAINED, 6.15, 1.75, width=1.0, height=2.6)
    for crop in ("crop 1", "crop 2", "small"):
        y = d.boxes[crop][1]
        d.line(crop, "backbone", y)
    d.arrow("backbone", "projector", "h")
    d.arrow("projector", "prototypes", "z")
    d.box("sinkhorn", COMPUTED, 7.9, 2.7, width=0.95)
    d.side("prototypes", "sinkhorn", 2.7, "scores", stop=True)
    d.box("loss", LOSS, 9.55, 1.6, "swapped_\nprediction", width=1.4, height=0.75)
    d.arrow("sinkhorn", "loss", "codes", shift=(0.25, 0.16))
    d.side("prototypes", "loss", 1.6, "scores of the other crops")
    d.note("codes come from the large crops,\nwith equal shares for all prototypes", 8.9, 3.1)
    return d


def clip():
    d = Drawing(10.4, 2.7)
    d.box("image", DATA, 0.7, 2.1, width=0.9)
    d.box("caption", DATA, 0.7, 0.7, width=0.9)
    d.chain(2.1, "image", ("backbone", TRAINED, 2.7, ""), ("projector", TRAINED, 4.6, "h_image"))
    d.box("text_encoder", TRAINED, 2.7, 0.7)
    d.box("text_projector", TRAINED, 4.6, 0.7)
    d.arrow("caption", "text_encoder")
    d.arrow("text_encoder", "text_projector", "h_text")
    d.table("similarities", 7.1, 1.4, "images by captions,\ntimes exp(log_scale)", size=5)
    d.arrow("projector", "similarities", "z_image", shift=(0.1, 0.17))
    d.arrow("text_projector", "similarities", "z_text", shift=(0.1, -0.17))
    d.box("loss", LOSS, 9.3, 1.4, "contrastive_loss", width=1.8, height=0.6)
    d.arrow("similarities", "loss")
    d.note("rows and columns:\ntwo classifications", 9.3, 0.83)
    return d


def up_detr():
    d = Drawing(10.8, 3.7)
    d.box("image", DATA, 0.6, 2.9, width=0.8)
    d.box("patches", DATA, 0.6, 1.2, "M patches", width=0.9)
    d.arrow("image", "patches", "cut at random", shift=(0.5, 0.0))
    d.box("backbone", FROZEN, 2.3, 2.05, width=1.0, height=2.3)
    d.line("image", "backbone", 2.9)
    d.line("patches", "backbone", 1.2)
    d.box("encoder", TRAINED, 4.5, 2.9)
    d.side("backbone", "encoder", 2.9, "feature map")
    d.box("patch_to_query", TRAINED, 4.1, 1.2, width=1.15)
    d.side("backbone", "patch_to_query", 1.2, "average", stop=False)
    d.box("query_embedding", TRAINED, 4.1, 0.5, width=1.3)
    d.box("decoder", TRAINED, 6.5, 2.05, width=1.1, height=1.1)
    d.arrow("encoder", "decoder", "memory", shift=(0.28, 0.24))
    d.arrow("patch_to_query", "decoder", "N queries", shift=(-0.2, 0.2))
    d.arrow("query_embedding", "decoder", "added", shift=(0.35, -0.16))
    d.note("mask: a query sees only\nthe queries of its patch", 6.6, 3.0)
    d.box("box_head", TRAINED, 8.2, 2.9, width=0.95)
    d.box("class_head", TRAINED, 8.2, 2.05, width=0.95)
    d.box("feature_head", TRAINED, 8.2, 1.2, width=1.0)
    for head in ("box_head", "class_head", "feature_head"):
        d.arrow("decoder", head)
    d.box("loss", LOSS, 9.95, 2.5, "set_loss\nafter match", width=1.35, height=0.75)
    d.arrow("box_head", "loss")
    d.arrow("class_head", "loss")
    d.box("reconstruction", LOSS, 9.95, 1.2, "distance to\nits features", width=1.4, height=0.75)
    d.arrow("feature_head", "reconstruction")
    d.note("reconstruction", 9.95, 0.68)
    return d


def vild():
    d = Drawing(10.8, 3.9)
    d.box("image", DATA, 0.6, 2.4, width=0.8)
    d.box("backbone", TRAINED, 2.0, 2.4, "backbone,\nfpn", width=1.0, height=0.7)
    d.arrow("image", "backbone")
    d.box("rpn", TRAINED, 3.5, 3.3, width=0.7)
    d.arrow("backbone", "rpn")
    d.box("pool", COMPUTED, 4.3, 2.4, "regions", width=0.85)
    d.arrow("backbone", "pool", "maps")
    d.arrow("rpn", "pool", "proposals", shift=(0.55, 0.0))
    d.box("head", TRAINED, 5.8, 2.4, width=0.8)
    d.arrow("pool", "head")
    d.box("box_regressor", TRAINED, 7.6, 3.5, width=1.2)
    d.arrow("head", "box_regressor")
    d.box("text loss", LOSS, 9.6, 2.65, "text_loss", width=1.3, height=0.55)
    d.arrow("head", "text loss", "z", shift=(-0.9, 0.14))
    d.box("names", DATA, 7.4, 0.45, "base names", width=1.0)
    d.box("text", FROZEN, 9.1, 0.45, "CLIP, text", width=1.0)
    d.arrow("names", "text")
    d.box("background", TRAINED, 9.75, 3.5, "background", width=1.1)
    d.arrow("background", "text loss")
    d.bentarrow("text", "text loss", 10.55)
    d.box("image loss", LOSS, 7.6, 1.5, "image_loss", width=1.3, height=0.55)
    d.arrow("head", "image loss", "z", shift=(0.05, 0.16))
    d.box("crops", DATA, 3.0, 0.8, "cropped regions", width=1.35)
    d.box("clip image", FROZEN, 5.2, 0.8, "CLIP, image", width=1.1)
    d.arrow("image", "crops", "cut out, 1x and 1.5x", shift=(-0.55, -0.22))
    d.arrow("crops", "clip image")
    d.arrow("clip image", "image loss", "", stop=True)
    return d


DRAWINGS = {
    "simclr": simclr,
    "moco_v1": moco_v1,
    "moco_v2": moco_v2,
    "moco_v3": moco_v3,
    "byol": byol,
    "simsiam": simsiam,
    "barlow": barlow,
    "swav": swav,
    "densecl": densecl,
    "clip": clip,
    "up_detr": up_detr,
    "vild": vild,
}


def draw(method):
    """The figure of a method."""
    return DRAWINGS[method]().finish()
