"""Launches of a choice on a GPU, counted on the meta device: no change adds one unseen."""

from pathlib import Path

import pytest

import hyperattention as ha

# what docs/performance.md tells, by tokens
LEAN = {8192: 17, 131_072: 17, 1_048_576: 58}
DEFAULT = {8192: 7, 16_384: 7, 32_768: 7, 131_072: 7, 1_048_576: 7}
# the default at 131,072 tokens, by heads, kv heads and numbers of a query: large groups, sorted in parts; and width 256,
# for which PyTorch factors the covariances of keys
SHAPES = {(64, 4, 128): 7, (48, 4, 128): 7, (32, 1, 128): 7, (71, 1, 64): 7, (8, 4, 256): 66, (16, 1, 256): 66}


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
        "place_tiles", "alike_first", "key_factors", "alike_blocks", "sort_alike", "choose_alike", "uniform_of_tiles",
        "key_basis", "prepare_keys", "prepare_queries", "represent", "block_lse",
        "block_mass", "open_blocks", "draw_leaves",
    }  # fmt: skip
    assert {name for name, times in counted.items() if times} <= ours
    assert counted.total() == launches


@pytest.mark.parametrize(("sizes", "launches"), SHAPES.items(), ids=str)
def test_kernels_choose_for_the_shapes_of_common_models(sizes, launches, monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    from gpu.counts import count_launches

    counted = count_launches(ha.default_method(65_536), 131_072, sizes).launches
    assert counted["sort_alike"] == counted["choose_alike"] == 1
    assert counted.total() == launches
