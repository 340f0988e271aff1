"""Which cells of two crops show the same place, against a plain loop."""

import sys

import torch
from conftest import ROOT

sys.path.insert(0, str(ROOT / "results"))
import matches  # noqa: E402


def test_right_cells():
    chance = torch.Generator().manual_seed(0)
    places = torch.rand(2, 20, 2, generator=chance) * 10
    sides = 8 + torch.rand(2, 20, 2, generator=chance) * 16
    box_q, box_k = torch.cat([places, sides], dim=2).unbind()
    flip_q, flip_k = torch.rand(2, 20, generator=chance) < 0.5
    found = matches.right_cells(box_q, flip_q, box_k, flip_k, 4)
    shared = 0
    for b in range(20):
        (top, left, tall, wide), (top_k, left_k, tall_k, wide_k) = (
            box[b].tolist() for box in (box_q, box_k)
        )
        for row in range(4):
            for column in range(4):
                seen = 3 - column if flip_q[b] else column  # its column before the flip
                y = top + (row + 0.5) / 4 * tall
                x = left + (seen + 0.5) / 4 * wide
                expected = -1
                for i in range(4):
                    for j in range(4):
                        there = 3 - j if flip_k[b] else j
                        if 0 <= y - top_k - i / 4 * tall_k < tall_k / 4 and (
                            0 <= x - left_k - there / 4 * wide_k < wide_k / 4
                        ):
                            expected = i * 4 + j
                            shared += 1
                assert found[b, row * 4 + column].item() == expected
    assert 50 < shared < 320
    same = matches.right_cells(box_q, flip_q, box_q, flip_q, 4)
    assert torch.equal(same, torch.arange(16).expand(20, 16))
