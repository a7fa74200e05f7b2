"""Tiles lie at multiples of their size in the positions of the keys: the first and last of a chunk may hold padding."""

from dataclasses import replace

import pytest
import torch

from assertions import assert_same_bits
from hyperattention.tiling import cut
from problems import problem


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
@pytest.mark.parametrize(("begin", "end"), [(0, 37), (3, 37), (7, 32), (9, 14), (36, 37)])
def test_rows_of_padding_see_nothing_before_and_after_a_chunk(begin, end, causal):
    whole = problem(40, causal=causal)
    tiles = cut(replace(whole, q=whole.q[:, :, begin:end], offset=begin), 8)
    position = tiles.index[:, None] * 8 + torch.arange(8)
    assert tiles.index.tolist() == [*range(begin // 8, (end - 1) // 8 + 1)]
    inside = (position >= begin) & (position < end)
    seen = position + 1 if causal else torch.full_like(position, 40)
    assert_same_bits(tiles.limit, (seen * inside)[None])
    # where they are, queries are zero, and restored away
    rows = tiles.arrange(tiles.problem.q)
    assert_same_bits(rows[:, ~inside], torch.zeros_like(rows[:, ~inside]))
    assert_same_bits(tiles.restore(rows), tiles.problem.q)
