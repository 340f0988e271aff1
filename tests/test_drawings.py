"""The drawings of the methods: readable, and of what the scripts hold."""

import importlib

import drawings
import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from conftest import METHODS

import walkthrough
from results.methods import SCRIPTS

# Where the scripts let no gradient pass, and which have a moving average.
STOPPED = {"moco_v1", "moco_v2", "moco_v3", "densecl", "byol", "simsiam", "swav", "vild"}
AVERAGED = {"moco_v1", "moco_v2", "moco_v3", "densecl", "byol"}
NETWORKS = (drawings.TRAINED, drawings.AVERAGE, drawings.FROZEN)


@pytest.fixture(params=SCRIPTS)
def name(request):
    yield request.param
    plt.close("all")


def drawn(name):
    """The drawing, finished, and its figure, rendered."""
    drawing = drawings.DRAWINGS[name]()
    figure = drawing.finish()
    figure.canvas.draw()
    return drawing, figure


def texts_of(drawing):
    return [text for text in drawing.axis.texts if text.get_text()]


def test_every_script_has_a_drawing_and_no_other():
    assert sorted(drawings.DRAWINGS) == SCRIPTS


def test_texts_can_be_read(name):
    """They do not overlap, lie within the figure, and those of a box within it."""
    drawing, figure = drawn(name)
    renderer = figure.canvas.get_renderer()
    texts = texts_of(drawing)
    places = [text.get_window_extent(renderer) for text in texts]
    for number, place in enumerate(places):
        for other in places[:number]:
            assert not place.overlaps(other), texts[number].get_text()
    whole = figure.bbox
    for text, place in zip(texts, places):
        assert text.get_fontsize() >= 8
        assert place.x0 >= whole.x0 and place.x1 <= whole.x1, text.get_text()
        assert place.y0 >= whole.y0 and place.y1 <= whole.y1, text.get_text()
    for key, text in drawing.texts.items():
        x, y, width, height = drawing.boxes[key]
        corners = [(x - width / 2, y - height / 2), (x + width / 2, y + height / 2)]
        low, high = drawing.axis.transData.transform(corners)
        place = text.get_window_extent(renderer)
        assert low[0] < place.x0 and place.x1 < high[0], key
        assert low[1] < place.y0 and place.y1 < high[1], key


def test_notes_lie_beside_the_boxes(name):
    drawing, figure = drawn(name)
    renderer = figure.canvas.get_renderer()
    inside = set(drawing.texts.values())
    for text in texts_of(drawing):
        if text in inside:
            continue
        place = text.get_window_extent(renderer)
        for key, (x, y, width, height) in drawing.boxes.items():
            corners = [(x - width / 2, y - height / 2), (x + width / 2, y + height / 2)]
            (left, low), (right, high) = drawing.axis.transData.transform(corners)
            apart = place.x0 >= right or place.x1 <= left or place.y0 >= high or place.y1 <= low
            assert apart, f"{text.get_text()} on {key}"


def test_boxes_do_not_overlap_and_all_are_joined(name):
    drawing, _ = drawn(name)
    boxes = list(drawing.boxes.items())
    for number, (key, (x, y, width, height)) in enumerate(boxes):
        for other, (x2, y2, width2, height2) in boxes[:number]:
            apart = abs(x - x2) >= (width + width2) / 2 or abs(y - y2) >= (height + height2) / 2
            assert apart, f"{key} on {other}"
    joined = {key for arrow in drawing.arrows for key in arrow}
    assert joined == set(drawing.boxes)
    ends = {end for _, end in drawing.arrows}
    losses = [
        key for key, text in drawing.texts.items() if key not in {a for a, _ in drawing.arrows}
    ]
    assert losses and set(losses) <= ends  # all leads to a loss, or to what is not drawn further


def test_gradients_stop_where_they_do_in_the_script(name):
    drawing, _ = drawn(name)
    assert bool(drawing.stops) == (name in STOPPED)
    assert bool(drawing.averages) == (name in AVERAGED)


def small_model(name):
    script = importlib.import_module(name)
    return script, walkthrough.build_model(script, script.parse_args(["--recipe", "patterns"]))


@pytest.mark.parametrize("method", METHODS)
def test_the_parts_of_the_model_are_drawn_under_their_names(method):
    """Each module and queue of the model, and no module that it lacks."""
    script, model = small_model(method)
    drawing, _ = drawn(method)
    said = " ".join(text.get_text() for text in texts_of(drawing))
    for child, _ in model.named_children():
        assert child in said, child
    for buffer, _ in model.named_buffers(recurse=True):
        if buffer in ("queue", "dense_queue") and method != "swav":  # swav's is off by default
            assert buffer in said
    parts = {part for path, _ in model.named_modules() for part in path.split(".")}
    for key, text in drawing.texts.items():
        if drawing.kind_of[key] in NETWORKS:
            assert text.get_text() in parts, text.get_text()
        elif drawing.kind_of[key] == drawings.LOSS:
            assert callable(getattr(script, text.get_text().replace("\n", "")))
    plt.close("all")


def test_the_functions_of_the_other_scripts_exist():
    for name in ("clip", "up_detr", "vild"):
        script = importlib.import_module(name)
        drawing, _ = drawn(name)
        for key, text in drawing.texts.items():
            words = text.get_text().split()
            if drawing.kind_of[key] == drawings.LOSS and "_" in words[0]:
                assert callable(getattr(script, words[0]))
    plt.close("all")


def test_the_legend_shows_what_occurs(name):
    drawing, _ = drawn(name)
    said = [text.get_text() for text in drawing.axis.get_legend().get_texts()]
    expected = [kind for kind in drawings.STYLES if kind in drawing.kind_of.values()]
    if drawing.stops:
        expected.append("the gradient stops")
    assert said == expected


def test_drawing_twice_gives_one_picture():
    pictures = []
    for _ in range(2):
        figure = drawings.draw("moco_v1")
        figure.canvas.draw()
        pictures.append(np.asarray(figure.canvas.buffer_rgba()).copy())
        plt.close(figure)
    assert torch.equal(*[torch.from_numpy(picture) for picture in pictures])
