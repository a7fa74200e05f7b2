"""A cache that drops once what the end of a prompt does not look at, and reads the best pages of the rest."""

import pytest
import torch
from torch import Tensor

from assertions import assert_exact, assert_same_bits
from dense import attention
from hyperattention.cache.look_once import LookOnce
from hyperattention.cache.look_once_store import LookOnceStore
from hyperattention.cache.page_rank import Bounds
from hyperattention.cache.room import Room
from hyperattention.cache.top_pages import TopPages

DIM, SCALE, PROMPT, LATEST = 8, 0.3, 200, 12
ROOM, POLICY = Room(64, sinks=3, window=10), LookOnce(keep=0.4, latest=LATEST, pages=TopPages(by=Bounds(), page=4))
KEPT = round(0.4 * (PROMPT + 1))


def inputs(num: int = 260, batch: int = 2, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Queries of four heads, keys and values of two."""
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(batch, heads, num, DIM, generator=generator) for heads in (4, 2, 2))


def new_store(policy: LookOnce = POLICY, room: Room = ROOM) -> LookOnceStore:
    return policy.store(room, 0, 0, None)


def read(store: LookOnceStore, qkv: tuple[Tensor, ...], sizes: list[int], live: Tensor | None = None) -> Tensor:
    """Read a text in steps of these sizes, from where the store is: all rows."""
    outs = []
    for size in sizes:
        part = slice(store.seen, store.seen + size)
        q, k, v = (x[:, :, part] for x in qkv)
        shown = store.num_slots
        keys, _ = store.append(k, v)
        assert keys.shape[2] == shown + size
        if live is not None:
            store.mark(live[:, part])
        outs.append(store.attend(q, SCALE).out)
        store.settle(q, SCALE)
    return torch.cat(outs, 2)


def votes(q: Tensor, k: Tensor, begin: int = 0, last: int = LATEST) -> Tensor:
    """Attention of the last queries summed over them and over groups, one query after another."""
    batch, num = k.shape[0], k.shape[2]
    total = torch.zeros(batch, 2, num, dtype=torch.float64)
    for i in range(num - last, num):
        for head in range(4):
            score = (k[:, head // 2, begin : i + 1].double() @ q[:, head, i, :, None].double())[..., 0] * SCALE
            total[:, head // 2, begin : i + 1] += score.softmax(-1)
    return total


def kept_keys(store: LookOnceStore) -> Tensor:
    return store.pages.state()["k"]


def test_the_last_queries_decide_what_is_dropped() -> None:
    q, k, v = inputs()
    store = new_store()
    read(store, (q, k, v), [PROMPT])
    # the prompt is read in full, and nothing is dropped before a step that chooses pages
    assert store.num_slots == PROMPT
    read(store, (q, k, v), [1])
    num = PROMPT + 1
    assert store.num_slots == KEPT < num
    assert store.seen == num
    vote = votes(q[:, :, :num], k[:, :, :num])
    vote[:, :, : ROOM.sinks] = vote[:, :, num - ROOM.window :] = torch.inf
    for row in range(2):
        for head in range(2):
            best = vote[row, head].argsort(descending=True)[:KEPT].sort().values
            assert_same_bits(kept_keys(store)[row, head], k[row, head, best])
            # heads do not agree: each keeps its own
    assert not torch.equal(kept_keys(store)[:, 0], kept_keys(store)[:, 1])
    memory = store.memory_bytes
    read(store, (q, k, v), [1] * 30)
    # once: what comes later stays
    assert store.num_slots == KEPT + 30
    assert store.seen == num + 30
    # keys, values and two bounds for each page of four
    assert memory == 2 * 2 * DIM * 4 * (2 * KEPT + 2 * (KEPT // 4))


def test_steps_read_the_best_pages_of_what_is_left() -> None:
    qkv = inputs()
    store = new_store()
    read(store, qkv, [PROMPT, 1])
    left = [x[:, :, :KEPT].clone() for x in (store.pages.state()["k"], store.pages.state()["v"])]
    pages = POLICY.pages.store(ROOM, 0, 0, None)
    pages.append(*left)
    pages.settle(left[0], 1.0)
    q, k, v = (x[:, :, PROMPT + 1 : PROMPT + 2] for x in qkv)
    pages.append(k, v)
    out = read(store, qkv, [1])
    assert_same_bits(out, pages.attend(q, SCALE).out)
    # pages leave some out, and so did the eviction
    whole = attention(q, *(torch.cat([x, new], 2) for x, new in zip(left, (k, v), strict=True)), scale=SCALE)[0]
    exact = attention(q, *(x[:, :, : PROMPT + 2] for x in qkv[1:]), scale=SCALE)[0]
    assert (out - whole).abs().max() > 0.01
    assert (whole - exact).abs().max() > 0.01


def test_a_long_step_reads_all_that_is_left() -> None:
    qkv = inputs()
    store = new_store()
    read(store, qkv, [PROMPT, 1])
    left = [store.pages.state()[name].clone() for name in "kv"]
    out = read(store, qkv, [40])
    assert not store.is_whole
    q, k, v = (x[:, :, PROMPT + 1 : PROMPT + 41] for x in qkv)
    for i in range(40):
        keys, values = (torch.cat([x, new[:, :, : i + 1]], 2) for x, new in zip(left, (k, v), strict=True))
        assert_exact(out[:, :, i : i + 1], attention(q[:, :, i : i + 1], keys, values, scale=SCALE)[0])


@pytest.mark.parametrize("sizes", [[60], [30, 30], [1] * 60])
def test_up_to_the_budget_everything_is_read(sizes: list[int]) -> None:
    qkv = inputs(60)
    store = new_store()
    outs = read(store, qkv, sizes)
    assert store.is_whole
    assert_exact(outs, attention(*qkv, causal=True, scale=SCALE)[0])


def test_a_prompt_in_long_chunks_is_looked_at_after_the_last() -> None:
    qkv = inputs()
    ours, expected = new_store(), new_store()
    read(ours, qkv, [50] * 4 + [1])
    read(expected, qkv, [PROMPT, 1])
    assert expected.num_slots < expected.seen
    assert_same_bits(kept_keys(ours), kept_keys(expected))


@pytest.mark.parametrize("padding", [23, 150])
def test_padding_is_dropped_before_anything_else(padding: int) -> None:
    q, k, v = inputs()
    live = torch.arange(260) >= torch.tensor([[0], [padding]])
    poison = torch.where(live[:, None, :, None], 0.0, torch.nan)
    store = new_store()
    read(store, (q, k + poison, v + poison), [PROMPT, 1], live)
    num = PROMPT + 1
    there = num - padding
    if there >= KEPT:
        vote = votes(q[1:, :, :num], k[1:, :, :num], padding)[0]
        vote[:, padding : padding + ROOM.sinks] = vote[:, num - ROOM.window :] = torch.inf
        for head in range(2):
            best = vote[head].argsort(descending=True)[:KEPT].sort().values
            assert_same_bits(kept_keys(store)[1, head], k[1, head, best])
    else:
        assert_same_bits(kept_keys(store)[1, :, KEPT - there :], k[1, :, padding:num])
    outs = read(store, (q, k, v), [1, 40, 1], live)
    assert torch.isfinite(outs).all()
    if there < KEPT:
        # nothing of this row is gone; one step has pages for all of it, and a long step reads all
        exact = attention(*(x[1:, :, padding : num + 41] for x in (q, k, v)), causal=True, scale=SCALE)[0]
        assert_exact(outs[1:, :, :41], exact[:, :, -41:])


def test_rows_move_and_states_go_on_before_and_after_the_eviction() -> None:
    qkv, index = inputs(batch=3), torch.tensor([2, 0, 2])
    for first in ([PROMPT], [PROMPT, 1, 1]):
        ours, expected, again = new_store(), new_store(), new_store()
        read(ours, qkv, first)
        ours.take_rows(index)
        read(expected, tuple(x[index] for x in qkv), first)
        again.restore({name: x.clone() for name, x in expected.state().items()})
        assert (again.seen, again.num_slots) == (ours.seen, ours.num_slots) == (expected.seen, expected.num_slots)
        after = tuple(x[index] for x in qkv)
        wanted = read(expected, after, [1] * 20)
        assert expected.num_slots < expected.seen
        for store in (ours, again):
            assert_same_bits(read(store, after, [1] * 20), wanted)


def test_the_window_is_forgotten_and_what_was_looked_at_is_not() -> None:
    qkv, other = inputs(), inputs(seed=1)
    ours, expected = new_store(), new_store()
    for store in (ours, expected):
        read(store, qkv, [PROMPT, 1])
    read(ours, other, [5])
    ours.crop(5)
    assert_same_bits(read(ours, qkv, [1, 1]), read(expected, qkv, [1, 1]))
    ours.crop(2 + ROOM.window)
    assert ours.seen == PROMPT + 1 - ROOM.window
    with pytest.raises(ValueError, match="cannot forget the latest 1 tokens.*give a window of at least 1"):
        ours.crop(1)


def test_queries_that_are_taken_back_do_not_vote() -> None:
    q, k, v = inputs()
    ours, num = new_store(), PROMPT + 1
    read(ours, (q, k, v), [PROMPT])
    # a step that is long enough to read everything, and to push all others out of those that vote
    read(ours, inputs(seed=1), [40])
    ours.crop(40)
    read(ours, (q, k, v), [1])
    vote = votes(q[:, :, :num], k[:, :, :num], last=1)
    vote[:, :, : ROOM.sinks] = vote[:, :, num - ROOM.window :] = torch.inf
    index = vote.argsort(descending=True)[:, :, :KEPT].sort().values
    assert_same_bits(kept_keys(ours), k.gather(2, index[..., None].expand(-1, -1, -1, DIM)))


def test_guesses_of_the_step_that_decides_can_be_taken_back() -> None:
    q, k, v = (torch.cat([x[:, :, :PROMPT], y[:, :, :20]], 2) for x, y in zip(inputs(), inputs(seed=1), strict=True))
    store = new_store()
    read(store, (q, k, v), [PROMPT, 20])
    num = round(0.4 * (PROMPT + 20))
    assert store.num_slots == num < store.seen == PROMPT + 20
    # more than the window holds
    store.crop(20)
    assert store.seen == PROMPT
    vote = votes(q, k)[:, :, :PROMPT]
    vote[:, :, : ROOM.sinks] = torch.inf
    index = vote.argsort(descending=True)[:, :, : num - 20].sort().values
    assert_same_bits(kept_keys(store), k.gather(2, index[..., None].expand(-1, -1, -1, DIM)))


def test_what_is_not_whole_is_refused() -> None:
    store, whole = new_store(), new_store()
    read(store, inputs(), [PROMPT])
    for name in ("numbers", "queries", "k", "begin"):
        with pytest.raises(ValueError, match=f"lacks .'{name}'"):
            whole.restore({key: x for key, x in store.state().items() if key != name})
    assert whole.seen == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"keep": 0.0}, "keep=0.0"),
        ({"keep": 1.1}, "keep=1.1"),
        ({"latest": 0}, "latest=0"),
        ({"pages": TopPages(share=2)}, "layers cannot share a choice.*give share=1"),
    ],
)
def test_sizes_that_make_no_sense_are_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LookOnce(**options)
    with pytest.raises(ValueError, match="leaves no page of 4"):
        new_store(room=Room(18, 3, 10))
