"""Which cells of two crops show the same place, against a plain loop; and the program around it."""

import importlib
import json

import torch
from conftest import error_line, small_args

from results import matches


def test_right_cells():
    generator = torch.Generator().manual_seed(0)
    places = torch.rand(2, 20, 2, generator=generator) * 10
    sides = 8 + torch.rand(2, 20, 2, generator=generator) * 16
    box_q, box_k = torch.cat([places, sides], dim=2)
    flip_q, flip_k = torch.rand(2, 20, generator=generator) < 0.5
    found = matches.right_cells(box_q, flip_q, box_k, flip_k, 4)
    shared = 0
    for b in range(20):
        top, left, height, width = box_q[b].tolist()
        for row in range(4):
            for column in range(4):
                seen = 3 - column if flip_q[b] else column  # its column before the flip
                y = top + (row + 0.5) / 4 * height
                x = left + (seen + 0.5) / 4 * width
                expected = cell_at(y, x, box_k[b].tolist(), flip_k[b])
                shared += expected >= 0
                assert found[b, row * 4 + column].item() == expected
    assert 50 < shared < 320
    same = matches.right_cells(box_q, flip_q, box_q, flip_q, 4)
    assert torch.equal(same, torch.arange(16).expand(20, 16))


def cell_at(y, x, box, flip):
    """The cell, of 4 x 4, of this crop that contains the point (y, x) of the image; -1 if none."""
    top, left, height, width = box
    for row in range(4):
        for column in range(4):
            seen = 3 - column if flip else column
            down = y - top - row / 4 * height  # from the cell's corner
            right = x - left - seen / 4 * width
            if 0 <= down < height / 4 and 0 <= right < width / 4:
                return row * 4 + column
    return -1


def test_the_program(folder, tmp_path, capsys, monkeypatch):
    """Right matches only, if matching is replaced by the truth; a run counted again replaces its
    line."""
    script = importlib.import_module("densecl")
    for seed in (0, 1):
        args = small_args(script, data=folder, out=tmp_path / str(seed), epochs=1, seed=seed)
        script.main(args)
    lines = tmp_path / "lines.json"
    checkpoints = [str(tmp_path / str(seed) / "checkpoint.pt") for seed in (0, 1)]
    matches.main([*checkpoints, "--lines", str(lines)])
    first, second = json.loads(lines.read_text())
    assert (first["data"], first["epoch"], first["guess"]) == ("small", 1, 6.25)
    assert (first["seed"], second["seed"]) == (0, 1)
    assert 0 < first["random"] < 60
    assert first["trained"] != first["random"]
    assert 100 < first["cells"] < 5 * 40 * 16

    right_cells = matches.right_cells
    truth = []

    def recorded(*arguments):
        truth.append(right_cells(*arguments))
        return truth[-1]

    monkeypatch.setattr(matches, "right_cells", recorded)
    monkeypatch.setattr(script, "match", lambda h_q, h_k: truth[-1].clamp(min=0))
    matches.main([checkpoints[0], "--lines", str(lines)])
    other, again = json.loads(lines.read_text())
    assert other == second
    assert again == first | {"trained": 100.0, "random": 100.0}


def test_it_needs_a_run_of_densecl(folder, tmp_path, capsys):
    script = importlib.import_module("moco_v2")
    script.main(small_args(script, data=folder, out=tmp_path, epochs=1))
    path = str(tmp_path / "checkpoint.pt")
    assert "is not a run of densecl.py" in error_line(capsys, matches.main, [path])
    torch.save({"state_dict": {}}, path)
    assert "is not a run of densecl.py" in error_line(capsys, matches.main, [path])
    assert "CHECKPOINT" in error_line(capsys, matches.main, [])
