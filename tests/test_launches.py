"""Launches of a choice on a GPU, counted on the meta device: no change adds one unseen."""

from pathlib import Path

import pytest

# what docs/performance.md tells, by tokens
LEAN = {8192: 17, 131_072: 17, 1_048_576: 58}
DEFAULT = {8192: 10, 16_384: 10, 32_768: 20, 131_072: 62}


@pytest.mark.parametrize(
    ("lean", "tokens", "launches"),
    [(True, *each) for each in LEAN.items()] + [(False, *each) for each in DEFAULT.items()],
)
def test_a_choice_takes_as_many_launches_as_stated(lean, tokens, launches, monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    from gpu.counts import count

    counted = count(tokens, lean).launches
    # kernels of this package alone: no operator of PyTorch between them
    ours = {
        "place_tiles", "alike_first", "key_factors", "alike_blocks", "sort_alike", "group_alike", "alike_bars",
        "alike_shares", "draw_alike", "uniform_of_tiles", "key_basis", "prepare_keys", "prepare_queries", "represent",
        "block_lse", "block_mass", "open_blocks", "draw_leaves",
    }  # fmt: skip
    assert {name for name, times in counted.items() if times} <= ours
    assert counted.total() == launches
