"""The store that compresses: its budget, its sinks and its window, over every line of `policies.py`."""

from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

from assertions import assert_exact, assert_same_bits
from dense import attention
from hyperattention.cache.budget import CacheBudget
from hyperattention.cache.compressing import CompressingStore
from hyperattention.cache.policy import CompressionRequest, Policy
from hyperattention.cache.slots import CacheSlots
from hyperattention.coreset import Coreset
from hyperattention.policies.heavy_hitters import HeavyHitters
from hyperattention.policies.latest import Latest
from policies import POLICIES, PolicyCase

HEADS, KV_HEADS, DIM, SCALE = 4, 2, 8, 0.3
ROOM = CacheBudget(40, sinks=3, window=12)
SLOT_BYTES = 2 * DIM * 4 + 3 * 4
# a prompt, compressed to 37 slots, and what follows it
PROMPT, STEPS = 60, 30
each = pytest.mark.parametrize("case", POLICIES, ids=lambda case: case.name)


def text(num: int = PROMPT + STEPS, batch: int = 2, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(batch, heads, num, DIM, generator=generator) for heads in (HEADS, KV_HEADS, KV_HEADS))


def new_store(policy: Policy, room: CacheBudget = ROOM, seed: int = 7) -> CompressingStore:
    return CompressingStore(policy, room, layer=2, seed=seed)


def read(store: CompressingStore, qkv: tuple[Tensor, ...], sizes: list[int], live: Tensor | None = None) -> Tensor:
    """Read a text on in steps of these sizes; all rows of the output."""
    outs = []
    for size in sizes:
        part = slice(store.seen, store.seen + size)
        q, k, v = (x[:, :, part] for x in qkv)
        store.append(k, v)
        if live is not None:
            store.mask_padding(live[:, part])
        outs.append(store.attend(q, SCALE).out)
        store.end_step(q, SCALE)
    return torch.cat(outs, 2)


def assert_same_state(ours: CompressingStore, expected: CompressingStore) -> None:
    states = ours.state(), expected.state()
    assert states[0].keys() == states[1].keys()
    for name, x in states[1].items():
        assert_same_bits(states[0][name], x)


@each
@pytest.mark.parametrize("first", [1, 41, PROMPT])
def test_slots_never_exceed_the_budget_and_memory_hardly(case: PolicyCase, first: int) -> None:
    store, qkv = new_store(case.policy), text()
    # beside the slots, the queries that a policy asks for, and those that may still be taken back
    queries = case.policy.num_queries + (32 if case.policy.num_queries or case.policy.watches else 0)
    most = 2 * (KV_HEADS * (ROOM.budget + 1) * SLOT_BYTES + HEADS * queries * DIM * 4)
    compressed = False
    for size in [first] + [1] * (48 - first) + [7, 2] + [1] * 9:
        read(store, qkv, [size])
        assert store.num_slots <= ROOM.budget
        assert store.memory_bytes <= most
        compressed |= not store.is_whole
        assert store.held.num_slots == store.num_slots
    assert compressed


@each
def test_up_to_the_budget_nothing_is_lost(case: PolicyCase) -> None:
    store, qkv = new_store(case.policy), text()
    outs = read(store, qkv, [25] + [1] * 15)
    assert store.is_whole
    assert_exact(outs, attention(*(x[:, :, :40] for x in qkv), causal=True, scale=SCALE)[0])
    after = read(store, qkv, [1] * 8)[:, :, 1:]
    assert not store.is_whole
    exact = attention(*(x[:, :, :48] for x in qkv), causal=True, scale=SCALE)[0][:, :, 41:]
    assert (after - exact).abs().max() > 1e-3


@each
def test_a_query_reads_what_is_held_with_its_weights(case: PolicyCase) -> None:
    store, qkv = new_store(case.policy), text()
    read(store, qkv, [PROMPT] + [1] * 9)
    q, k, v = (x[:, :, store.seen : store.seen + 3] for x in qkv)
    before = store.held
    keys, values = store.append(k, v)
    assert_same_bits(keys, torch.cat([before.k, k], 2))
    assert_same_bits(values, torch.cat([before.v, v], 2))
    weight = torch.cat([before.log_weight, torch.zeros(2, KV_HEADS, 3)], 2)
    assert_exact(store.attend(q, SCALE).out, Coreset(keys, values, weight).attend(q, scale=SCALE, own=3).out)


@each
def test_sinks_and_the_window_are_kept_as_they_are(case: PolicyCase) -> None:
    store, qkv = new_store(case.policy), text()
    for size in [PROMPT] + [1] * 12:
        read(store, qkv, [size])
        held, seen = store.held, store.seen
        own = torch.cat([torch.arange(ROOM.sinks), torch.arange(seen - ROOM.window, seen)])
        slots = torch.cat([torch.arange(ROOM.sinks), torch.arange(-ROOM.window, 0) + store.num_slots])
        assert bool((held.position[:, :, slots] == own).all())
        assert not held.log_weight[:, :, slots].any()
        for ours, given in ((held.k, qkv[1]), (held.v, qkv[2])):
            assert_same_bits(ours[:, :, slots], given[:, :, own])


@each
@pytest.mark.parametrize("padding", [17, 58], ids=["some", "nearly all"])
def test_sinks_are_the_first_keys_that_are_no_padding(case: PolicyCase, padding: int) -> None:
    # with 58 of 60, the sinks come by only after the first compression
    store, qkv = new_store(case.policy), text()
    live = torch.ones(2, PROMPT + STEPS, dtype=torch.bool)
    live[1, :padding] = False
    read(store, qkv, [PROMPT] + [1] * (STEPS - 1), live)
    held = store.held
    assert held.position[:, 0, : ROOM.sinks].tolist() == [[0, 1, 2], [padding, padding + 1, padding + 2]]
    assert not held.log_weight[:, :, : ROOM.sinks].any()
    for row, first in enumerate((0, padding)):
        assert_same_bits(held.k[row, :, : ROOM.sinks], qkv[1][row, :, first : first + ROOM.sinks])
    assert bool((held.position[1][held.live[1]] >= padding).all())
    # clusters may be fewer than there is room for
    assert padding == 58 or bool(held.live.all()) or case.merges


@each
def test_rows_do_not_see_one_another(case: PolicyCase) -> None:
    qkv, live = text(batch=3), torch.ones(3, PROMPT + STEPS, dtype=torch.bool)
    live[1, :25] = False
    stores = [new_store(case.policy) for _ in range(2)]
    sizes = [PROMPT] + [1] * 12
    together = read(stores[0], qkv, sizes, live)
    alone = read(stores[1], tuple(x[2:] for x in qkv), sizes, live[2:])
    assert torch.equal(stores[0].held.position[2:], stores[1].held.position)
    assert_exact(together[2:], alone)


@each
def test_rows_that_are_taken_go_on_by_themselves(case: PolicyCase) -> None:
    qkv, index = text(batch=3), torch.tensor([2, 0, 2])
    after = tuple(x[index] for x in qkv)
    ours, expected = new_store(case.policy), new_store(case.policy)
    # a step of some tokens before, whose queries a policy may not have looked at yet
    read(ours, qkv, [PROMPT, 1, 1])
    ours.take_rows(index)
    assert ours.batch == 3
    read(expected, after, [PROMPT, 1, 1])
    rest = [1] * 12
    assert_same_bits(read(ours, after, rest), read(expected, after, rest))
    assert_same_state(ours, expected)


@each
@pytest.mark.parametrize("first", [30, PROMPT], ids=["whole", "compressed"])
def test_tokens_that_are_taken_back_leave_no_trace(case: PolicyCase, first: int) -> None:
    qkv, guesses = text(), text(seed=1)
    ours, straight = new_store(case.policy), new_store(case.policy)
    for store in (ours, straight):
        read(store, qkv, [first, 1])
    # both guesses were wrong, then the second alone
    for taken_back in (2, 1):
        read(ours, guesses, [2])
        ours.crop(taken_back)
    read(straight, guesses, [1])
    assert ours.seen == straight.seen == first + 2
    assert ours.is_whole == straight.is_whole == (first == 30)
    rest = [1] * (PROMPT + STEPS - first - 2)
    outs = [read(store, qkv, rest) for store in (ours, straight)]
    assert_exact(*outs)
    assert torch.equal(ours.held.position, straight.held.position)
    assert not ours.is_whole


def test_the_most_guesses_of_a_step_leave_no_trace_and_no_more_queries_wait() -> None:
    most, room, qkv = 32, CacheBudget(200, sinks=3, window=40), text(100)
    ours, straight = (new_store(HeavyHitters(), room) for _ in range(2))
    for store in (ours, straight):
        read(store, qkv, [40])
    before = ours.memory_bytes
    read(ours, qkv, [most])
    ours.crop(most)
    for store in (ours, straight):
        # the next step watches the queries that were still waiting
        read(store, qkv, [1, 1])
    assert_same_state(ours, straight)
    # room for the next tokens grows, what waits does not: the latest queries of the prompt, and no others
    assert before - straight.held.k.shape[0] * KV_HEADS * 40 * SLOT_BYTES == 2 * HEADS * most * DIM * 4


def test_no_more_can_be_taken_back_than_was_kept_one_by_one() -> None:
    store, qkv = new_store(Latest()), text()
    read(store, qkv, [20])
    with pytest.raises(ValueError, match="cannot forget the latest 21 tokens: only 20 were read"):
        store.crop(21)
    read(store, qkv, [40, 1, 1])
    with pytest.raises(ValueError, match=r"all but the last 14 were compressed by Latest\(\); give a window of at least 15"):
        store.crop(15)
    assert (store.seen, store.num_slots) == (62, ROOM.budget - ROOM.pending + 2)
    store.crop(14)
    assert store.seen == 48
    read(store, qkv, [1] * 30)
    assert store.num_slots <= ROOM.budget


@each
@pytest.mark.parametrize("first", [30, PROMPT], ids=["whole", "compressed"])
def test_a_state_goes_on_bit_for_bit(case: PolicyCase, first: int) -> None:
    store, other, qkv = new_store(case.policy), new_store(case.policy), text()
    read(store, qkv, [first, 1, 1])
    other.restore(store.state())
    assert (other.seen, other.batch, other.is_whole) == (first + 2, 2, first == 30)
    rest = [1] * (PROMPT + STEPS - first - 2)
    assert_same_bits(read(store, qkv, rest), read(other, qkv, rest))
    assert_same_state(other, store)
    assert not store.is_whole


def test_a_state_is_a_copy() -> None:
    store, qkv = new_store(HeavyHitters()), text()
    # a prompt fills its buffer, which is written over
    read(store, qkv, [30])
    state = store.state()
    copies = {name: x.clone() for name, x in state.items()}
    store.crop(1)
    read(store, text(seed=1), [1])
    for name, x in copies.items():
        assert_same_bits(state[name], x)


def test_a_store_that_goes_on_from_a_state_makes_room_once() -> None:
    store, other, qkv = new_store(Latest()), new_store(Latest()), text()
    read(store, qkv, [PROMPT])
    other.restore(store.state())
    read(other, qkv, [1])
    bytes_of = other.memory_bytes
    read(other, qkv, [1] * 12)
    assert other.memory_bytes == bytes_of == store.memory_bytes


@each
def test_one_slot_is_enough_between_sinks_and_window(case: PolicyCase) -> None:
    room = CacheBudget(16, sinks=3, window=12)
    assert (room.middle, room.pending) == (1, 1)
    store, qkv = new_store(case.policy, room), text()
    outs = read(store, qkv, [20] + [1] * 20)
    assert store.num_slots == 16
    assert bool(outs.isfinite().all())
    middle = store.held.position[:, :, 3]
    assert bool(((middle >= 3) & (middle < 40 - 12)).all())


@pytest.mark.parametrize("case", [case for case in POLICIES if case.policy.weighted], ids=lambda case: case.name)
def test_weights_go_on_standing_for_every_token_read(case: PolicyCase) -> None:
    store, qkv = new_store(case.policy), text()
    live = torch.ones(2, PROMPT + STEPS, dtype=torch.bool)
    live[1, :10] = False
    read(store, qkv, [PROMPT] + [1] * (STEPS - 1), live)
    held = store.held.log_weight.exp().sum(-1)
    wanted = torch.tensor([store.seen, store.seen - 10.0])[:, None].expand_as(held)
    if case.adds_weight:
        # the correction adds weight, and takes none away
        assert bool((held > wanted).all())
    else:
        assert_exact(held, wanted)


def test_queries_that_are_trained_keep_no_graph_alive() -> None:
    store, (q, k, v) = new_store(HeavyHitters()), text()
    q.requires_grad_()
    read(store, (q, k, v), [PROMPT, 1, 1])
    assert not any(x.requires_grad for x in store.state().values())


@pytest.mark.parametrize("change", ["rows", "heads", "width", "type"])
def test_keys_of_another_kind_are_refused(change: str) -> None:
    store, (q, k, v) = new_store(Latest()), text()
    read(store, (q, k, v), [PROMPT])
    k, v = k[:, :, PROMPT:], v[:, :, PROMPT:]
    others = {"rows": (k[:1], v[:1]), "heads": (k[:, :1], v[:, :1]), "width": (k[..., :1], v), "type": (k.half(), v.half())}
    with pytest.raises(ValueError, match="is given .*: use one cache for one model"):
        store.append(*others[change])
    assert store.seen == PROMPT


def test_scores_are_what_all_queries_attended_to() -> None:
    store, (q, k, v) = new_store(HeavyHitters()), text()
    # more in one step than may be taken back
    read(store, (q, k, v), [36, 2, 1])
    scores = q[:, :, :39].double() @ k[:, :, :39].double().repeat_interleave(2, 1).transpose(2, 3) * SCALE
    weights = scores.masked_fill(torch.ones(39, 39).triu(1).bool(), -torch.inf).softmax(-1)
    assert_exact(store.state()["score"], weights.sum(2).unflatten(1, (KV_HEADS, -1)).sum(2))


@dataclass(frozen=True)
class PaddingMask(Policy):
    """`Latest`, with a note of what it was shown."""

    shown: list[CompressionRequest] = field(default_factory=list)

    @property
    def num_queries(self) -> int:
        return 5

    @property
    def weighted(self) -> bool:
        return False

    def compress(self, full: CompressionRequest) -> CacheSlots:
        self.shown.append(full)
        return Latest().compress(full)


def test_a_policy_is_shown_the_latest_queries_and_counters_of_its_own() -> None:
    policy, qkv = PaddingMask(), text()
    store = new_store(policy)
    read(store, qkv, [45] + [1] * 10)
    # a compression leaves room for three tokens
    assert [full.counters for full in policy.shown] == [(7, 2, turn) for turn in range(3)]
    for full, seen in zip(policy.shown, (45, 49, 53), strict=True):
        assert (full.num, full.begin, full.held.num_slots - full.end) == (ROOM.middle, ROOM.sinks, ROOM.window)
        assert_same_bits(full.queries, qkv[0][:, :, seen - 5 : seen])
        assert int(full.held.position.max()) == seen - 1


def test_slots_that_are_used_again_hold_new_tokens() -> None:
    """What a token that was taken back left in its slot, a weight of -inf and a score, is not the next token's."""
    store = CompressingStore(HeavyHitters(), CacheBudget(64, 2, 8))
    k = torch.randn(1, 2, 9, 4, generator=torch.Generator().manual_seed(0))
    for padded in (True, False):
        store.append(k, k)
        if padded:
            store.mask_padding(torch.arange(9)[None] < 6)
        store.end_step(k, 1.0)
        store.append(k[:, :, :1], k[:, :, :1])
        store.crop(10)
    store.append(k, k)
    assert bool((store.held.log_weight == 0).all())
    assert bool((store.held.score == 0).all())
    assert torch.equal(store.held.position[0, 0], torch.arange(9, dtype=torch.int32))
