"""Launches of a choice on a GPU, counted on the meta device: no change adds one unseen."""

from pathlib import Path

import pytest
import torch

import hyperattention as ha
from hyperattention import select
from hyperattention.kernels import backend
from hyperattention.problem import Problem
from hyperattention.tiling import cut
from test_workspace import Peak

# what docs/performance.md tells, by tokens
LEAN = {8192: 17, 131_072: 17, 1_048_576: 58}
DEFAULT = {8192: 7, 16_384: 7, 32_768: 7, 65_536: 7, 131_072: 7, 1_048_576: 7}
# heads, kv heads and numbers of a query: large groups, sorted in parts, and wide keys
SHAPES = [(64, 4, 128), (48, 4, 128), (32, 1, 128), (71, 1, 64), (8, 4, 256), (16, 1, 256)]
# operators that choose keys in kernels
OURS = {
    "place_tiles", "alike_first", "key_factors", "alike_blocks", "sort_alike", "choose_alike", "uniform_of_tiles",
    "key_basis", "prepare_keys", "prepare_queries", "represent", "block_lse", "block_mass", "open_blocks", "draw_leaves",
}  # fmt: skip
# bytes of blocks of keys, directions, memory of programs, and numbers of tiles: 32 heads on 8, width 128, causal
BESIDE_THE_RESULT = {8192: 72_601_632, 65_536: 297_799_840, 131_072: 534_483_104, 1_048_576: 3_932_262_560}


@pytest.mark.parametrize(
    ("lean", "tokens", "launches"),
    [(True, *each) for each in LEAN.items()] + [(False, *each) for each in DEFAULT.items()],
)
def test_a_choice_takes_as_many_launches_as_stated(lean, tokens, launches, monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    from gpu.counts import count

    counted = count(tokens, lean).launches
    # kernels of this package alone: no operator of PyTorch between them
    assert {name for name, times in counted.items() if times} <= OURS
    assert counted.total() == launches


@pytest.mark.parametrize("sizes", SHAPES, ids=str)
@pytest.mark.parametrize("rung", [None, 0, -1], ids=["default", "first rung", "last rung"])
def test_kernels_choose_for_the_shapes_of_common_models(sizes, rung, monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    from gpu.counts import count_launches

    method = ha.default_method(65_536) if rung is None else ha.default_ladder(131_072, device="cuda").rungs[rung]
    counted = count_launches(method, 131_072, sizes).launches
    assert counted["sort_alike"] == counted["choose_alike"] == 1
    assert counted.total() == 7


@pytest.mark.parametrize("method", [ha.default_method(65_536), ha.lean_method(65_536)], ids=["default", "lean"])
def test_more_lists_than_a_grid_holds_are_left_to_torch(method, monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    from gpu.counts import count_launches

    # kv heads of all batch rows
    for most, fused in ((8, True), (7, False)):
        monkeypatch.setattr(backend, "_MOST_LISTS", most)
        assert bool(OURS & set(count_launches(method, 2048).launches)) == fused


def test_more_numbers_of_blocks_than_int32_counts_are_left_to_torch(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    from gpu.counts import as_on_a_gpu

    stage = select.DrawAlike(16, most=2**30)
    with as_on_a_gpu():
        for keys, parts in ((2**22, 1), (2**23, None)):
            k = torch.empty(1, 1, keys, 128, dtype=torch.bfloat16, device="meta")
            assert stage._parts(cut(Problem(k[:, :, -128:], k, k, 0.1, causal=True, offset=keys - 128), 128)) == parts


@pytest.mark.parametrize("tokens", BESIDE_THE_RESULT)
def test_what_a_choice_for_alike_queries_holds_beside_its_result_is_bounded(tokens, monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    from gpu.counts import as_on_a_gpu

    heads, kv_heads, width = 32, 8, 128
    q, k = (torch.empty(1, each, tokens, width, dtype=torch.bfloat16, device="meta") for each in (heads, kv_heads))
    with as_on_a_gpu(), torch.no_grad(), Peak() as peak:
        kept = ha.default_method(65_536).selections(Problem(q, k, k, width**-0.5, causal=True))
        beside = peak.most - peak.now
    assert kept
    assert beside == BESIDE_THE_RESULT[tokens]
    assert beside <= 512 * 2**20 or tokens > 131_072


@pytest.mark.parametrize("tokens", [8192, 32_768, 131_072])
def test_a_whole_call_takes_as_many_launches_as_stated(tokens, monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    from gpu.counts import count_call

    counted = count_call(ha.default_method(65_536), tokens).launches
    choice = {"place_tiles": 1, "alike_first": 1, "key_factors": 2, "alike_blocks": 1, "sort_alike": 1, "choose_alike": 1}
    assert +counted == choice | {"sort_rows": 1, "list_attention": 2, "merge_rows": 1}
    assert counted.total() == 11
    # lists of several groups are laid out first
    assert count_call(ha.lean_method(65_536), tokens).launches["list_attention"] == 2


@pytest.mark.parametrize("tokens", [8192, 131_072])
def test_an_audit_of_rows_takes_as_many_launches_as_stated_and_waits_for_none(tokens, monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    from gpu.audit_counts import count_audit

    # tensors without values: the host can wait for none of them
    counted = count_audit(tokens)
    assert counted["launch_forward"] == counted["launch_merge"] == 1
    assert counted.total() == 73
