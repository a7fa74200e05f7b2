"""The feature-map kernel against attention a row at a time, and its laws: whatever it is given, it computes what it says."""

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

import hyperattention as ha
from assertions import assert_exact, assert_same_bits, assert_same_math
from dense import attention
from front_door import with_lse
from hyperattention.exact import exact_attention, visible_keys
from hyperattention.kernels.feature import plan
from hyperattention.kernels.feature import reference as feature_torch
from hyperattention.kernels.feature.operator import feature_attention
from hyperattention.merge import merge
from hyperattention.types import Partial


def make(queries, keys, *, heads=2, kv_heads=1, batch=2, features=5, value_dim=3, spread=1.0, dtype=torch.float64, seed=0):
    """Positive features, values and log scales of the given spread."""
    generator = torch.Generator().manual_seed(seed)
    shapes = (batch, heads, queries), (batch, kv_heads, keys)
    query, key = (torch.rand((*shape, features), generator=generator) + 0.05 for shape in shapes)
    value = torch.randn((*shapes[1], value_dim), generator=generator)
    scales = (spread * (2 * torch.rand(shape, generator=generator) - 1) for shape in shapes)
    return tuple(x.to(dtype) for x in (query, key, value, *scales))


def attend(query, key, value, query_scale, key_scale, limit=None, first=0, power=1):
    scales = {"query_log_scale": query_scale, "key_log_scale": key_scale}
    return feature_attention(query, key, value, **scales, row_limit=limit, first_key=first, power=power)


def row_by_row(query, key, value, query_scale, key_scale, limit=None, first=0, power=1):
    """The definition, of every row by itself."""
    group, outs, lses = query.shape[1] // key.shape[1], [], []
    for b, h, i in torch.cartesian_prod(*(torch.arange(n) for n in query.shape[:3])).tolist():
        end = key.shape[2] if limit is None else int(limit[b % len(limit), i])
        keys, values, scales = (x[b, h // group, first : max(first, end)] for x in (key, value, key_scale))
        logs = query_scale[b, h, i] + scales
        top = logs.detach().max() if len(logs) else query_scale.new_zeros(())
        weight = (logs - top).exp() * (keys * query[b, h, i]).sum(-1) ** power
        total = weight.sum()
        alive = bool(total > 0)
        outs.append((weight / total) @ values if alive else value.new_zeros(value.shape[-1]))
        lses.append(top + total.log() if alive else query_scale.new_full((), -torch.inf))
    return torch.stack(outs).view(*query.shape[:3], -1), torch.stack(lses).view(query.shape[:3])


def all_rows(query, key, value, query_scale, key_scale, limit, first=0, power=1):
    """The definition as one writes it in plain PyTorch: all pairs at once."""
    key, value, scale = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value, key_scale))
    place = torch.arange(key.shape[2])
    seen = (place >= first) & (place < limit[:, None, :, None])
    logs = (query_scale[..., None] + scale[:, :, None]).masked_fill(~seen, -torch.inf)
    top = logs.detach().amax(-1, keepdim=True).clamp(min=torch.finfo(logs.dtype).min)
    weight = (logs - top).exp() * (query @ key.mT) ** power
    total = weight.sum(-1, keepdim=True)
    out = torch.where(total > 0, weight @ value / total, 0.0)
    return out, torch.where(total > 0, top + total.log(), -torch.inf)[..., 0]


def gradients(function, tensors, *arguments, **options):
    leaves = [x.detach().requires_grad_() for x in tensors]
    out, lse = function(*leaves, *arguments, **options)
    ramp = torch.linspace(0.5, 2, out.numel()).view(out.shape).to(out)
    alive = lse > -torch.inf
    total = (out * ramp).sum() + (lse[alive] * ramp.mean(-1)[alive]).sum()
    # rows that see nothing depend on nothing
    return torch.autograd.grad(total + 0 * leaves[0].sum(), leaves, materialize_grads=True)


def assert_all_exact(ours, expected, **options):
    for x, y in zip(ours, expected, strict=True):
        assert_exact(x, y, **options)


def both(function, tensors, *arguments):
    return *function(*tensors, *arguments), *gradients(function, tensors, *arguments)


def some_limits(kind: str, batch: int, queries: int, keys: int) -> Tensor | None:
    i = torch.arange(queries)[None]
    if kind == "window":  # of 20 keys before tiles of 16
        return (i // 16 * 16 - 20).clamp(0, keys)
    if kind == "padding":
        return torch.minimum(i + 1, torch.tensor([[keys // 2], [keys]])[:batch])
    if kind == "close":
        return i % 10
    if kind == "any":
        return torch.randint(-2, keys + 3, (batch, queries), generator=torch.Generator().manual_seed(1))
    return visible_keys(queries, keys, kind != "all", "upper_left" if kind == "all" else kind, "cpu")


POWERS = pytest.mark.parametrize("power", [1, 2])
KINDS = ["all", "upper_left", "lower_right", "window", "padding", "close", "any"]


@POWERS
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (100, 63), (63, 100)])
def test_forward_and_gradients_are_those_of_rows(kind, queries, keys, power):
    tensors, limit = make(queries, keys), some_limits(kind, 2, queries, keys)
    assert_all_exact(both(attend, tensors, limit, 0, power), both(row_by_row, tensors, limit, 0, power))


@POWERS
@pytest.mark.parametrize("group", [1, 4])
def test_over_several_blocks(group, power):
    tensors, limit = make(257, 257, heads=4, kv_heads=4 // group, batch=1), some_limits("upper_left", 1, 257, 257)
    # of either sign: with power 2 no weight is negative
    if power == 2:
        tensors = (tensors[0] - 0.5, tensors[1] - 0.5, *tensors[2:])
    assert_all_exact(both(attend, tensors, limit, 3, power), both(row_by_row, tensors, limit, 3, power))


@POWERS
@pytest.mark.parametrize("spread", [0.0, 3.0])
@pytest.mark.parametrize("kind", ["upper_left", "lower_right", "any"])
def test_over_several_steps(kind, spread, power, monkeypatch):
    # steps share buffers, and gradients of keys walk from the end
    monkeypatch.setattr(plan, "STEP_ROWS", 128)
    # every row sees a key, for the sake of the gradient of the definition
    tensors, limit = make(270, 301, heads=1, spread=spread, batch=1), some_limits(kind, 1, 270, 301).clamp(min=1)
    assert_all_exact(both(attend, tensors, limit, 0, power), both(all_rows, tensors, limit, 0, power))


def test_blocks_of_causal_rows_need_no_look_at_limits():
    for first in (1, 2, 63, 64, 65, 130):
        for rows in (1, 2, 63, 64, 65, 200):
            limit = torch.arange(first, first + rows)
            assert plan._even_blocks(first, rows, 64) == plan._blocks(limit, 64, 128)


def test_rows_that_skip_keys_are_not_causal():
    tensors, limit = make(20, 41, heads=1), torch.cat([torch.arange(1, 11), torch.arange(12, 32, 2)])[None]
    assert_all_exact(both(attend, tensors, limit), both(row_by_row, tensors, limit))


@POWERS
def test_more_features_than_keys_of_a_block(power):
    features = 150 if power == 1 else 70
    assert features > plan.BLOCK_KEYS
    tensors, limit = make(70, 70, heads=1, batch=1, features=features), some_limits("upper_left", 1, 70, 70)
    assert_all_exact(both(attend, tensors, limit, 0, power), both(row_by_row, tensors, limit, 0, power))


@pytest.mark.parametrize("scale", [0.0, 3.0])
def test_scales_that_are_all_alike(scale):
    query, key, value, query_scale, key_scale = make(100, 100)
    tensors = query, key, value, query_scale, torch.full_like(key_scale, scale)
    limit = some_limits("upper_left", 2, 100, 100)
    assert_all_exact(both(attend, tensors, limit), both(row_by_row, tensors, limit))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@POWERS
def test_dtypes(dtype, power):
    tensors, limit = make(100, 100, dtype=dtype), some_limits("upper_left", 2, 100, 100)
    wide = tuple(x.double() for x in tensors)
    # rows by themselves sum fewer numbers at a time than anyone's plain PyTorch, so that their rounding is no measure
    ways = (attend, tensors), (row_by_row, wide), (all_rows, tensors)
    ours, truth, plain = (f(*x, limit, 0, power) for f, x in ways)
    assert ours[0].dtype == dtype
    assert_same_math(ours[0], truth[0], plain[0])
    # lse is float32 at least, so that it is judged against plain PyTorch in float32
    assert_same_math(ours[1], truth[1], all_rows(*(x.float() for x in tensors), limit, 0, power)[1])
    ours, truth, plain = (gradients(f, x, limit, 0, power) for f, x in ways)
    for x, y, z in zip(ours, truth, plain, strict=True):
        assert_same_math(x, y, z)


@POWERS
def test_gradcheck(power):
    tensors = tuple(x.requires_grad_() for x in make(7, 9, batch=1, heads=4, kv_heads=2, features=3, value_dim=2))
    limit = torch.tensor([[0, 3, 1, 9, 5, 5, 9]])

    def finite(*x):
        out, lse = attend(*x, limit, 1, power)
        return out, lse[lse > -torch.inf]

    assert torch.autograd.gradcheck(finite, tensors)


def test_gradients_exist_for_one_output_alone():
    tensors, limit = make(9, 9), some_limits("upper_left", 2, 9, 9)
    for pick in (0, 1):
        leaves = tuple(x.detach().requires_grad_() for x in tensors)
        ours, truth = (f(*leaves, limit)[pick].square().sum() for f in (attend, row_by_row))
        grads = (torch.autograd.grad(x, leaves, allow_unused=True, materialize_grads=True) for x in (ours, truth))
        # of the query's scale out does not depend at all, but for rounding
        assert_all_exact(*grads, size=1.0 if pick == 0 else None)


# log scales


@POWERS
@pytest.mark.parametrize("kind", ["all", "upper_left", "any"])
def test_huge_log_scales_neither_overflow_nor_drown_a_row(kind, power):
    tensors, limit = make(150, 150, spread=500.0, batch=1), some_limits(kind, 1, 150, 150)
    # the first rows see small scales alone, while later keys of their block have large ones
    tensors[4][..., :10] = -500.0
    ours, truth = (both(f, tensors, limit, 0, power) for f in (attend, row_by_row))
    # a gradient is a difference of numbers of the size of lse
    assert_all_exact(ours, truth, size=1500.0)
    assert_all_exact(ours[:2], truth[:2])
    narrow = tuple(x.float() for x in tensors)
    truth = row_by_row(*(x.double() for x in narrow), limit, 0, power)
    ours, plain = (f(*narrow, limit, 0, power) for f in (attend, row_by_row))
    for x, y, z in zip(ours, truth, plain, strict=True):
        assert_same_math(x, y, z)
    assert all(x.isfinite().all() for x in gradients(attend, narrow, limit, 0, power))


def test_a_key_of_scale_minus_infinity_is_no_key():
    tensors = query, key, value, query_scale, key_scale = make(70, 70)
    keep = torch.arange(70) % 3 > 0
    key_scale[:, :, ~keep] = -torch.inf
    fewer = query, key[:, :, keep], value[:, :, keep], query_scale, key_scale[:, :, keep]
    limit = some_limits("upper_left", 2, 70, 70)
    rank = torch.cat([torch.zeros(1, dtype=torch.int64), keep.cumsum(0)])[limit]
    ours, expected = both(attend, tensors, limit), both(attend, fewer, rank)
    assert_all_exact(ours[:3], expected[:3])
    for i in (3, 4, 6):
        assert_exact(ours[i][:, :, keep], expected[i])
        assert not ours[i][:, :, ~keep].any()


# laws


def test_non_contiguous_inputs():
    tensors, limit = make(70, 70, heads=4, kv_heads=2), some_limits("padding", 2, 70, 70)
    apart = [x.repeat_interleave(2, -1)[..., ::2].transpose(0, 1).contiguous().transpose(0, 1) for x in tensors]
    apart[:3] = (x.transpose(2, 3).contiguous().transpose(2, 3) for x in apart[:3])
    assert not any(x.is_contiguous() for x in apart)
    assert_all_exact(both(attend, apart, limit), both(attend, tensors, limit))


@pytest.mark.heavy
@POWERS
@pytest.mark.parametrize("kind", ["all", "upper_left", "any"])
def test_results_do_not_depend_on_how_rows_are_cut(kind, power, monkeypatch):
    tensors, limit = make(41, 37), some_limits(kind, 2, 41, 37)
    whole = both(attend, tensors, limit, 0, power)
    for block, chunk in ((1, 1), (4, 3), (64, 2)):
        monkeypatch.setattr(plan, "BLOCK_KEYS", block)
        monkeypatch.setattr(plan, "STEP_ROWS", chunk)
        assert_all_exact(both(attend, tensors, limit, 0, power), whole)


def test_one_row_of_limits_of_any_integers_serves_all_batch_entries():
    tensors, limit = make(41, 200), some_limits("upper_left", 2, 41, 200)
    repeated = limit.to(torch.int8).repeat(2, 1)
    assert_all_exact(both(attend, tensors, limit), both(attend, tensors, repeated))


@pytest.mark.parametrize(("first_query", "first_key"), [(0, 0), (30, 0), (-9, 0), (3, 8)])
def test_declared_causality_is_that_of_limits(first_query, first_key):
    query, key, value, *_ = make(41, 50)
    limit = torch.arange(41)[None] + 1 + first_query
    declared = feature_attention(query, key, value, is_causal=True, first_query=first_query, first_key=first_key)
    for x, y in zip(declared, feature_attention(query, key, value, row_limit=limit, first_key=first_key), strict=True):
        assert_same_bits(x, y)


def test_first_keys_are_left_out():
    query, key, value, query_scale, key_scale = make(41, 37)
    limit = some_limits("upper_left", 2, 41, 37)
    apart = attend(query, key[:, :, 4:], value[:, :, 4:], query_scale, key_scale[:, :, 4:], limit - 4)
    for x, y in zip(attend(query, key, value, query_scale, key_scale, limit, 4), apart, strict=True):
        assert_same_bits(x, y)


@POWERS
def test_no_row_depends_on_a_later_key(power):
    tensors, limit = make(200, 200), some_limits("upper_left", 2, 200, 200)
    later = tuple(x.clone() for x in tensors)
    for x in (later[1], later[2], later[4]):
        x[:, :, 90:] += 3.0
    for x, y in zip(attend(*later, limit, 0, power), attend(*tensors, limit, 0, power), strict=True):
        assert_same_bits(x[:, :, :90], y[:, :, :90])
        assert not torch.equal(x[:, :, 90:], y[:, :, 90:])


# merging


def squares(x: Tensor) -> Tensor:
    """Features whose product is the square of a product."""
    return (x[..., :, None] * x[..., None, :]).flatten(-2)


def test_signed_features_merge_with_exact_attention_over_the_other_keys():
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn((2, 2, 60, 4), generator=generator, dtype=torch.float64) for _ in range(3))
    split = torch.arange(60)[None] // 16 * 16
    far = Partial(*feature_attention(squares(q), squares(k), v, row_limit=split))
    seen, key = visible_keys(60, 60, True, "upper_left", "cpu"), torch.arange(60)
    near = (q @ k.transpose(2, 3)).square().log().masked_fill(key < split[..., None], -torch.inf)
    near = exact_attention(0 * q, k, v, scale=1.0, visible=seen, attn_mask=near)
    none = [torch.zeros(2, 2, 60, dtype=torch.float64)] * 2
    whole = row_by_row(squares(q), squares(k), v, *none, seen)
    assert far.lse[:, :, 16:].isfinite().all()
    assert near.lse.isfinite().all()
    merged = merge([far, near])
    assert_all_exact((merged.out, merged.lse), whole)


def test_sinks_and_window_by_lists_and_the_rest_by_features():
    generator = torch.Generator().manual_seed(0)
    # keys of four kinds: which of them is a feature of a key, and the exponential of its score one of a query
    kinds = torch.randn((4, 8), generator=generator, dtype=torch.float64)
    kind = torch.randint(4, (2, 1, 150), generator=generator)
    q, v = (torch.randn((2, h, 150, 8), generator=generator, dtype=torch.float64) for h in (2, 1))
    scores = q @ kinds.T * 8**-0.5
    top = scores.amax(-1)
    one_hot = torch.nn.functional.one_hot(kind).double()
    size, sinks, tile = 20, 3, 16
    limit = torch.arange(150)[None] // tile * tile - size
    rest = feature_attention(
        (scores - top[..., None]).exp(), one_hot, v, query_log_scale=top, row_limit=limit, first_key=sinks
    )
    method = ha.Method(ha.Sinks(sinks), ha.Window(size), tile=tile)
    lists = with_lse(q, kinds[kind], v, method=method, is_causal=True, enable_gqa=True)
    merged = merge([Partial(*lists), Partial(*rest)])
    assert_all_exact((merged.out, merged.lse), attention(q, kinds[kind], v, causal=True))


# nothing to attend to, and what is not finite


@pytest.mark.parametrize(
    "kind", ["limits", "no keys", "first key", "key scales", "query scales", "zero", "tiny", "negative"]
)
def test_rows_without_a_denominator_are_empty_and_have_no_gradient(kind):
    tensors, limit, first = list(make(9, 7)), None, 0
    if kind == "limits":
        limit = torch.zeros(1, 9, dtype=torch.int64)
    elif kind == "no keys":
        tensors[1:3], tensors[4] = (x[:, :, :0] for x in tensors[1:3]), tensors[4][:, :, :0]
    elif kind == "first key":
        first = 8
    elif kind.endswith("scales"):
        tensors[3 if kind.startswith("query") else 4].fill_(-torch.inf)
    else:
        tensors[0] *= {"zero": 0.0, "tiny": 1e-310, "negative": -0.01}[kind]
    # scales that a difference of infinities, or an exponential out of range, would show
    tensors[3] += 800.0
    tensors[4] += 800.0
    out, lse = attend(*tensors, limit, first)
    assert_same_bits(out, torch.zeros_like(out))
    assert_same_bits(lse, torch.full_like(lse, -torch.inf))
    leaves = [x.requires_grad_() for x in tensors]
    for gradient in torch.autograd.grad(attend(*leaves, limit, first), leaves, [out + torch.nan, lse]):
        assert_same_bits(gradient, torch.zeros_like(gradient))


@pytest.mark.parametrize("shape", [(0, 5, 2), (5, 0, 2), (5, 5, 0)], ids=str)
def test_empty_axes(shape):
    queries, keys, batch = shape
    tensors = make(queries, keys, batch=batch)
    out, lse = attend(*tensors, torch.full((batch, queries), keys))
    assert (out.shape, lse.shape) == ((batch, 2, queries, 3), (batch, 2, queries))
    assert all(x.shape == y.shape for x, y in zip(gradients(attend, tensors), tensors, strict=True))


def test_what_no_row_sees_may_hold_anything_and_what_is_seen_shows():
    tensors, limit = make(300, 400), visible_keys(300, 400, True, "upper_left", "cpu")
    clean = both(attend, tensors, limit, 2)
    for x in (tensors[1], tensors[2], tensors[4]):
        x[:, :, :2] = x[:, :, 300:] = torch.nan
    assert_all_exact(both(attend, tensors, limit, 2)[:3], clean[:3])
    tensors[1][:, :, 200] = torch.nan
    before = 200 - plan.BLOCK_KEYS
    for ours, expected in zip(attend(*tensors, limit, 2), clean[:2], strict=True):
        assert ours[:, :, 200:].isnan().all()
        # it reaches back no farther than its block
        assert_same_bits(ours[:, :, :before], expected[:, :, :before])


@pytest.mark.parametrize(
    ("options", "arguments", "message"),
    [
        ({"heads": 3, "kv_heads": 2}, {}, "3 query heads over 2"),
        ({}, {"first_key": -1}, "first_key=-1"),
        ({}, {"power": 3}, "power=3"),
        ({}, {"power": 0}, "power=0"),
        ({}, {"is_causal": True, "row_limit": torch.ones(1, 4, dtype=torch.int64)}, r"row_limit of shape \(1, 4\)"),
        ({}, {"first_query": 2}, "first_query=2"),
    ],
)
def test_bad_arguments_are_named(options, arguments, message):
    query, key, value, *_ = make(4, 4, **options)
    with pytest.raises(ValueError, match=message):
        feature_attention(query, key, value, **arguments)


# near-linear


class LargestTensor(TorchDispatchMode):
    """Remember the largest result of any operation."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.numel = max([self.numel, *(x.numel() for x in tree_leaves(result) if isinstance(x, Tensor))])
        return result


def run_both_passes(n: int, kind: str) -> None:
    # modes do not look inside an operator, so that its parts are called
    query, key, value, *scales = make(n, n, dtype=torch.float32)
    limit = torch.full((1, n), n) if kind == "all" else some_limits(kind, 2, n, n)
    out, lse = feature_torch.forward(query, key, value, *scales, limit)
    feature_torch.backward((out, lse.nan_to_num(0, 0, 0)), (query, key, value, *scales, out, lse), limit)


@pytest.mark.heavy
@pytest.mark.parametrize("kind", KINDS)
def test_memory_and_products_grow_with_the_length(kind, monkeypatch):
    monkeypatch.setattr(plan, "BLOCK_KEYS", 16)
    monkeypatch.setattr(plan, "STEP_ROWS", 32)
    products = []
    for length in (128, 512):
        with FlopCounterMode(display=False) as counter, LargestTensor() as seen:
            run_both_passes(length, kind)
        products.append(counter.get_total_flops())
        # features of the queries of a group: no state for each key, let alone a number for each pair
        assert seen.numel <= 2 * 2 * length * 5
    # windows and edges take their share of short sequences, by less than this
    assert products[1] <= 4.5 * products[0]


# what torch does to a call


@pytest.mark.slow
def test_operators_are_registered_soundly():
    mixed = (torch.float32, torch.bfloat16, torch.float16, torch.float32, torch.bfloat16)
    for kv_heads, dtypes in ((2, (torch.float64,) * 5), (1, mixed)):
        tensors = [x.to(dtype) for x, dtype in zip(make(20, 20, heads=4, kv_heads=kv_heads), dtypes, strict=True)]
        # strides of its own, which the shapes promised to a compiler must not inherit
        tensors = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in tensors]
        limit = some_limits("padding", 2, 20, 20)
        out, lse = attend(*tensors, limit, 0, 2)
        backward = (out, lse, *tensors, out, lse, limit, None, 2)
        torch.library.opcheck(torch.ops.hyperattention.feature_attention_backward.default, backward)
        forward = (*(x.requires_grad_() for x in tensors), limit, None, 2)
        torch.library.opcheck(torch.ops.hyperattention.feature_attention.default, forward)


def test_autocast_rounds_no_sums():
    tensors = make(40, 40, dtype=torch.float32)
    plain = attend(*tensors)
    with torch.autocast("cpu", torch.bfloat16):
        inside = attend(*tensors)
    for x, y in zip(inside, plain, strict=True):
        assert_same_bits(x, y)


def test_the_meta_device_gives_shapes():
    out, lse = attend(*(x.to("meta") for x in make(9, 7, heads=4, kv_heads=2, dtype=torch.bfloat16)), first=2)
    assert (out.shape, out.dtype) == ((2, 4, 9, 3), torch.bfloat16)
    assert (lse.shape, lse.dtype) == ((2, 4, 9), torch.float32)


COMPILED = """
import torch
from hyperattention.kernels.feature.operator import feature_attention
torch.manual_seed(0)
tensors = torch.rand(2, 4, 50, 6), torch.rand(2, 2, 50, 6), torch.randn(2, 2, 50, 3), torch.randn(2, 2, 50)
def attend(query, key, value, scale):
    limit = (torch.arange(50)[None] - 5).clamp(0)
    out, lse = feature_attention(query, key, value, key_log_scale=scale, row_limit=limit, first_key=2)
    return out, lse.masked_fill(lse == -torch.inf, 0.0)
results = []
for step in (attend, torch.compile(attend, fullgraph=True, backend="aot_eager")):
    leaves = [x.clone().requires_grad_() for x in tensors]
    out, lse = step(*leaves)
    results.append([out.detach(), lse.detach(), *torch.autograd.grad((out ** 2).sum() + lse.sum(), leaves)])
print(all(torch.equal(a, b) for a, b in zip(*results, strict=True)))
"""


@pytest.mark.heavy
def test_compiles_into_one_graph(run_python):
    assert run_python(COMPILED).split() == ["True"]
