"""A cache that drops once what the end of a prompt does not look at, and reads the best pages of the rest."""

import pytest
import torch
from torch import Tensor

from assertions import assert_exact, assert_same_bits
from dense import attention
from hyperattention.cache.budget import CacheBudget
from hyperattention.cache.page_rank import Bounds
from hyperattention.policies.look_once import LookOnce
from hyperattention.policies.look_once_store import LookOnceStore
from hyperattention.policies.top_pages import TopPages

DIM, SCALE, PROMPT, LATEST = 8, 0.3, 200, 12
ROOM, POLICY = CacheBudget(64, sinks=3, window=10), LookOnce(keep=0.4, latest=LATEST, pages=TopPages(by=Bounds(), page=4))
KEPT = round(0.4 * PROMPT)


def inputs(num: int = 260, batch: int = 2, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Queries of four heads, keys and values of two."""
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(batch, heads, num, DIM, generator=generator) for heads in (4, 2, 2))


def new_store(policy: LookOnce = POLICY, room: CacheBudget = ROOM) -> LookOnceStore:
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
            store.mask_padding(live[:, part])
        outs.append(store.attend(q, SCALE).out)
        store.end_step(q, SCALE)
    return torch.cat(outs, 2)


def votes(q: Tensor, k: Tensor, begin: int = 0) -> Tensor:
    """Attention of the last queries summed over them and over groups, one query after another."""
    batch, num = k.shape[0], k.shape[2]
    total = torch.zeros(batch, 2, num, dtype=torch.float64)
    for i in range(num - LATEST, num):
        for head in range(4):
            score = (k[:, head // 2, begin : i + 1].double() @ q[:, head, i, :, None].double())[..., 0] * SCALE
            total[:, head // 2, begin : i + 1] += score.softmax(-1)
    return total


def kept_keys(store: LookOnceStore) -> Tensor:
    return store.state()["k"]


def assert_kept(store: LookOnceStore, k: Tensor, vote: Tensor, num: int = KEPT) -> None:
    """Insist that sinks, window and the tokens with most votes are all there is, in order."""
    vote[:, :, : ROOM.sinks] = vote[:, :, -ROOM.window :] = torch.inf
    index = vote.argsort(descending=True)[:, :, :num].sort().values
    assert_same_bits(kept_keys(store), k.gather(2, index[..., None].expand(-1, -1, -1, DIM)))


def test_the_last_queries_decide_what_is_dropped() -> None:
    q, k, v = inputs()
    store = new_store()
    outs = read(store, (q, k, v), [PROMPT])
    # the prompt itself is read in full
    assert_exact(outs, attention(*(x[:, :, :PROMPT] for x in (q, k, v)), causal=True, scale=SCALE)[0])
    assert store.num_slots == KEPT < PROMPT == store.seen
    assert_kept(store, k, votes(q[:, :, :PROMPT], k[:, :, :PROMPT]))
    # heads do not agree: each keeps its own
    assert not torch.equal(kept_keys(store)[:, 0], kept_keys(store)[:, 1])
    # keys, values and two bounds for each page of four
    assert store.memory_bytes == 2 * 2 * DIM * 4 * (2 * KEPT + 2 * (KEPT // 4))
    read(store, (q, k, v), [1] * 30)
    # once: what comes later stays
    assert store.num_slots == KEPT + 30
    assert store.seen == PROMPT + 30


def test_steps_read_the_best_pages_of_what_is_left() -> None:
    qkv = inputs()
    store = new_store()
    read(store, qkv, [PROMPT])
    left = [store.state()[name] for name in "kv"]
    pages = POLICY.pages.store(ROOM, 0, 0, None)
    pages.append(*left)
    pages.end_step(left[0], 1.0)
    q, k, v = (x[:, :, PROMPT : PROMPT + 1] for x in qkv)
    pages.append(k, v)
    out = read(store, qkv, [1])
    assert_same_bits(out, pages.attend(q, SCALE).out)
    # pages leave some out, and so did the eviction
    whole = attention(q, *(torch.cat([x, new], 2) for x, new in zip(left, (k, v), strict=True)), scale=SCALE)[0]
    exact = attention(q, *(x[:, :, : PROMPT + 1] for x in qkv[1:]), scale=SCALE)[0]
    assert (out - whole).abs().max() > 0.01
    assert (whole - exact).abs().max() > 0.01


def test_a_long_step_reads_all_that_is_left_and_has_a_look_of_its_own() -> None:
    qkv = inputs()
    store = new_store()
    read(store, qkv, [PROMPT, 1])
    left = [store.state()[name] for name in "kv"]
    first = store.seen
    out = read(store, qkv, [40])
    q, k, v = (x[:, :, first : first + 40] for x in qkv)
    keys, values = (torch.cat([x, new], 2) for x, new in zip(left, (k, v), strict=True))
    for i in range(40):
        end = KEPT + 1 + i + 1
        exact = attention(q[:, :, i : i + 1], keys[:, :, :end], values[:, :, :end], scale=SCALE)[0]
        assert_exact(out[:, :, i : i + 1], exact)
    assert not store.is_whole
    # of all tokens so far the same share stays
    num = round(0.4 * (PROMPT + 41))
    assert store.num_slots == num < KEPT + 41
    assert store.seen == PROMPT + 41
    rows = torch.cat([torch.zeros(2, 4, KEPT + 1, DIM), q], 2)
    assert_kept(store, keys, votes(rows, keys), num)


@pytest.mark.parametrize("sizes", [[60], [30, 30], [1] * 60])
def test_up_to_the_budget_everything_is_read(sizes: list[int]) -> None:
    qkv = inputs(60)
    store = new_store()
    outs = read(store, qkv, sizes)
    assert store.is_whole
    assert_exact(outs, attention(*qkv, causal=True, scale=SCALE)[0])


def test_short_steps_drop_nothing() -> None:
    store = new_store()
    read(store, inputs(), [20] * 10)
    assert store.num_slots == store.seen == 200
    assert not store.is_whole


@pytest.mark.parametrize("padding", [23, 150])
def test_padding_is_dropped_before_anything_else(padding: int) -> None:
    q, k, v = inputs()
    live = torch.arange(260) >= torch.tensor([[0], [padding]])
    poison = torch.where(live[:, None, :, None], 0.0, torch.nan)
    store = new_store()
    read(store, (q, k + poison, v + poison), [PROMPT], live)
    there = PROMPT - padding
    vote = votes(q[1:, :, :PROMPT], k[1:, :, :PROMPT], padding)
    vote[:, :, :padding] = torch.arange(-padding, 0)
    vote[:, :, padding : padding + ROOM.sinks] = vote[:, :, -ROOM.window :] = torch.inf
    index = vote.argsort(descending=True)[0, :, : min(KEPT, there)].sort().values
    for head in range(2):
        assert_same_bits(kept_keys(store)[1, head, -len(index[head]) :], k[1, head, index[head]])
    outs = read(store, (q, k, v), [1, 40, 1], live)
    assert torch.isfinite(outs).all()
    if there < KEPT:
        # nothing of this row is gone; one step has pages for all of it, and a long step reads all
        exact = attention(*(x[1:, :, padding : PROMPT + 41] for x in (q, k, v)), causal=True, scale=SCALE)[0]
        assert_exact(outs[1:, :, :41], exact[:, :, -41:])


def test_rows_move_and_states_go_on() -> None:
    qkv, index = inputs(batch=3), torch.tensor([2, 0, 2])
    live = torch.arange(260) >= torch.tensor([[0], [0], [150]])
    for first in ([50], [PROMPT, 1, 1]):
        ours, expected, again = new_store(), new_store(), new_store()
        read(ours, qkv, first, live)
        ours.take_rows(index)
        read(expected, tuple(x[index] for x in qkv), first, live[index])
        again.restore({name: x.clone() for name, x in expected.state().items()})
        assert (again.seen, again.num_slots) == (ours.seen, ours.num_slots) == (expected.seen, expected.num_slots)
        after, rest = tuple(x[index] for x in qkv), [1, 40, 1]
        wanted = read(expected, after, rest)
        assert expected.num_slots < expected.seen
        for store in (ours, again):
            assert_same_bits(read(store, after, rest), wanted)


def test_the_window_is_forgotten_and_what_was_looked_at_is_not() -> None:
    qkv, other = inputs(), inputs(seed=1)
    ours, expected = new_store(), new_store()
    for store in (ours, expected):
        read(store, qkv, [PROMPT, 1])
    read(ours, other, [20])
    ours.crop(20)
    assert_same_bits(read(ours, qkv, [1, 1]), read(expected, qkv, [1, 1]))
    ours.crop(3 + ROOM.window)
    assert ours.seen == PROMPT - ROOM.window
    with pytest.raises(ValueError, match="cannot forget the latest 1 tokens.*give a window of at least 1"):
        ours.crop(1)


def test_what_is_not_whole_is_refused() -> None:
    store, whole = new_store(), new_store()
    read(store, inputs(), [PROMPT])
    for name in ("numbers", "k", "begin"):
        with pytest.raises(ValueError, match=f"lacks .'{name}'"):
            whole.restore({key: x for key, x in store.state().items() if key != name})
    assert whole.seen == 0
    for numbers, message in (([-1, 0], "were kept"), ([5, 10**6], "were kept"), ([1], "must be")):
        with pytest.raises(ValueError, match=message):
            whole.restore(store.state() | {"numbers": torch.tensor(numbers)})
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
        new_store(room=CacheBudget(18, 3, 10))


def test_never_fewer_stay_than_a_step_reads() -> None:
    store = new_store(LookOnce(keep=0.1, latest=LATEST, pages=TopPages(by=Bounds(), page=4)))
    read(store, inputs(), [PROMPT])
    assert round(0.1 * PROMPT) < store.num_slots == ROOM.budget
