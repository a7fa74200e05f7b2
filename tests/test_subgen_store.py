"""SubGen as a cache: exact up to the budget, then the window beside the published estimator, and what `generate` sees."""

import warnings
from importlib import import_module

import pytest
import torch
from torch import Tensor

from assertions import assert_exact, assert_same_bits
from dense import attention
from hyperattention.cache.budget import CacheBudget
from hyperattention.coreset import Coreset
from hyperattention.merge import merge
from hyperattention.methods.exact import Exact
from hyperattention.policies.subgen import SubGen
from hyperattention.policies.subgen_sketch import SketchSizes, SubGenSketch
from hyperattention.policies.subgen_store import SubGenStore

DIM, ROOM = 8, CacheBudget(80, sinks=4, window=24)
SUBGEN = SubGen(delta=1.5, samples=2, value_samples=8, most_clusters=200)
SCALE = 0.3


def inputs(num: int, batch: int = 2, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Queries of four heads, keys and values of two."""
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(batch, heads, num, DIM, generator=generator) for heads in (4, 2, 2))


def read(store: SubGenStore, qkv: tuple[Tensor, ...], sizes: list[int], live: Tensor | None = None) -> Tensor:
    """Read a text in steps of these sizes, from where the store is: all rows."""
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


def new_store(seed: int = 0) -> SubGenStore:
    return SUBGEN.store(ROOM, 3, seed, None)


def assert_same_state(ours: SubGenStore, expected: SubGenStore) -> None:
    states = ours.state(), expected.state()
    assert states[0].keys() == states[1].keys()
    for name, x in states[1].items():
        assert_same_bits(states[0][name], x)


def test_exact_up_to_the_budget() -> None:
    qkv = inputs(81)
    store = new_store()
    outs = read(store, qkv, [50] + [1] * 30)
    assert store.is_whole
    assert store.seen == store.num_slots == 80
    assert_exact(outs, attention(*(x[:, :, :80] for x in qkv), causal=True, scale=SCALE)[0])
    # the next token exceeds it
    read(store, qkv, [1])
    assert not store.is_whole


def test_beyond_the_budget_the_window_is_exact_and_a_sketch_answers_for_the_rest() -> None:
    num = 203
    q, k, v = inputs(num)
    store = new_store(seed=5)
    outs = read(store, (q, k, v), [50] + [1] * (num - 50))
    assert store.seen == num
    assert ROOM.window < store.num_slots <= ROOM.window + ROOM.pending
    absorbed = num - store.num_slots
    sketch = SubGenSketch(SketchSizes(1.5, 2, 8, 200), counters=(5, 3))
    sketch.absorb(k[:, :, :absorbed], v[:, :, :absorbed], torch.arange(absorbed), torch.ones(2, absorbed, dtype=torch.bool))
    assert store.sketch is not None
    for ours, expected in zip(store.sketch.held, sketch.held, strict=True):
        for x, y in zip(ours.tensors, expected.tensors, strict=True):
            assert_same_bits(x, y)
    window = Coreset.of(k[:, :, absorbed:], v[:, :, absorbed:]).attend(q[:, :, -1:], scale=SCALE)
    assert_exact(outs[:, :, -1:], merge([window, sketch.attend(q[:, :, -1:], scale=SCALE)]).out)
    # and that is not what exact attention gives
    assert (outs[:, :, -1:] - attention(q[:, :, -1:], k, v, scale=SCALE)[0]).abs().max() > 0.01


def test_a_chunk_attends_to_itself_before_it_is_absorbed() -> None:
    qkv = inputs(150)
    store = new_store()
    assert_exact(read(store, qkv, [150]), attention(*qkv, causal=True, scale=SCALE)[0])
    assert store.num_slots == ROOM.window
    # in chunks or one by one, what is held follows from the tokens alone once the same ones are absorbed
    other = new_store()
    read(other, qkv, [90, 60])
    assert_same_state(other, store)


def test_what_append_hands_out_is_as_wide_as_it_says() -> None:
    qkv = inputs(121)
    store = new_store()
    read(store, qkv, [100, 1, 1])
    shown = store.num_slots
    k, v = store.append(qkv[1][:, :, 102:105], qkv[2][:, :, 102:105])
    assert k.shape[2] == v.shape[2] == shown + 3 == store.num_slots
    assert_same_bits(k, qkv[1][:, :, 105 - store.num_slots : 105])


def test_cropped_tokens_are_as_if_they_had_not_come() -> None:
    qkv, other = inputs(160), inputs(160, seed=1)
    ours, expected = new_store(), new_store()
    read(expected, qkv, [150])
    read(ours, qkv, [150])
    read(ours, other, [5])
    ours.crop(5)
    assert_same_state(ours, expected)
    ours.crop(ROOM.window)
    with pytest.raises(ValueError, match="cannot forget the latest 1 tokens.* give a window of at least 1"):
        ours.crop(1)


def test_rows_that_are_taken_go_on_by_themselves() -> None:
    qkv, index = inputs(200, batch=3), torch.tensor([2, 0, 2])
    ours, expected = new_store(), new_store()
    read(ours, qkv, [150])
    ours.take_rows(index)
    read(expected, tuple(x[index] for x in qkv), [150])
    after = tuple(x[index] for x in qkv)
    assert_same_bits(read(ours, after, [1] * 50), read(expected, after, [1] * 50))


def test_a_state_goes_on_as_the_store_does() -> None:
    qkv = inputs(260)
    for first in (60, 150):  # before and after something is absorbed
        store, other = new_store(), new_store()
        read(store, qkv, [first])
        other.restore(store.state())
        assert other.is_whole == store.is_whole == (first == 60)
        assert other.seen == first
        rest = [1] * (260 - first)
        assert_same_bits(read(other, qkv, rest), read(store, qkv, rest))


def test_a_state_that_is_not_whole_or_of_another_sketch_is_refused() -> None:
    store = new_store()
    read(store, inputs(150), [150])
    state = store.state()
    for name in state:
        with pytest.raises(ValueError, match=f"lacks .'{name}'"):
            new_store().restore({key: x for key, x in state.items() if key != name})
    with pytest.raises(ValueError, match="do not fit together"):
        new_store().restore(state | {"v": state["v"][:, :, 1:]})
    with pytest.raises(ValueError, match="use their original sizes"):
        SubGen(delta=1.5, samples=3, value_samples=8, most_clusters=200).store(ROOM, 3, 0, None).restore(state)


def test_padding_is_never_absorbed() -> None:
    q, k, v = inputs(150)
    live = torch.arange(150) >= torch.tensor([[0], [40]])
    k = k.masked_fill(~live[:, None, :, None], torch.nan)
    store = new_store()
    read(store, (q, k, v), [150], live)
    assert store.sketch is not None
    count = store.sketch.held[0].count.sum(-1)
    assert count.tolist() == [[126, 126], [86, 86]]
    outs = read(store, inputs(160), [1])
    assert torch.isfinite(outs).all()


def test_clusters_stay_within_the_bytes_of_the_budget() -> None:
    room = CacheBudget(200, sinks=4, window=24)
    policy = SubGen(delta=0.5, samples=2, value_samples=8)
    centres = inputs(40, batch=1)[1]
    k = centres[:, :, torch.arange(2000) % 40]
    store = policy.store(room, 0, 0, None)
    read(store, (inputs(2000, batch=1)[0], k, k), [300, 300, 1400])
    assert store.sketch is not None
    assert store.sketch.num_clusters.tolist() == [[40, 40]]
    # 2 heads, keys and values of 8 floats; one more token is held until its step ends and compresses it
    assert store.memory_bytes <= 201 * 2 * 2 * 8 * 4
    # keys that are not clusterable need more than that
    with pytest.raises(ValueError, match="more than [0-9]+ clusters of radius delta=0.5"):
        read(policy.store(room, 0, 0, None), inputs(2000), [1000])
    with pytest.raises(ValueError, match="budget=30 leaves no space for clusters"):
        read(policy.store(CacheBudget(30, sinks=0, window=24), 0, 0, None), inputs(40), [40])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"delta": -1.0}, "delta=-1.0 must be a finite distance"),
        ({"delta": float("nan")}, "delta=nan"),
        ({"delta": 1.0, "samples": 0}, "samples=0"),
        ({"delta": 1.0, "value_samples": 0}, "value_samples=0"),
        ({"delta": 1.0, "most_clusters": 0}, "most_clusters=0 must be at least 1"),
    ],
)
def test_sizes_that_make_no_sense_are_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SubGen(**options)


@pytest.mark.parametrize("budget", [400, 200])
def test_generate(budget: int) -> None:
    transformers = pytest.importorskip("transformers")
    integration = import_module("hyperattention.integrations.transformers")
    text = import_module("hyperattention.reference.text").held_out_text()
    model = import_module("hyperattention.reference.model").load_reference().model
    prompt = torch.tensor([list(text[:300])])
    policy = SubGen(delta=4.0, samples=4, value_samples=64, most_clusters=400)
    cache = integration.HyperCache(model.config, budget=budget, policy=policy, window=64)
    options = {"max_new_tokens": 60, "do_sample": False, "attention_mask": torch.ones_like(prompt), "pad_token_id": 0}
    expected = model.generate(prompt, past_key_values=transformers.DynamicCache(config=model.config), **options)
    with warnings.catch_warnings():
        # that the method itself is exact is meant
        warnings.simplefilter("ignore")
        with integration.use(model, Exact()) as calls:
            ours = model.generate(prompt, past_key_values=cache, **options)
    assert cache.get_seq_length() == 359
    assert ours.shape == expected.shape
    if budget >= 360:
        assert torch.equal(ours, expected)
        assert calls.counts.approximated == 0
    else:
        # the prompt is attended to in full, every later token through the sketch
        assert calls.counts.approximated == 59 * model.config.num_hidden_layers
        assert all(not store.is_whole for store in cache.stores.values())
