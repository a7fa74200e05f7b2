"""Keys and values in pages: requests of unequal lengths get what each would get alone, from memory laid out at once."""

import jaxtyping
import pytest
import torch

import dense
import hyperattention as ha
from assertions import assert_exact, assert_same_math
from cases import CASES, CONTROL
from hyperattention import select
from problems import tensors

PAGE = 16
HASHED = ha.Method(ha.Sinks(2), ha.HashBuckets(16), ha.Draw(8), tile=8)
RANKED = ha.Method(ha.Window(16), ha.TopBlocks(2, block_size=8), ha.Draw(16, by=select.ValueNorm()), tile=16)
METHODS = [case.method for case in CASES if isinstance(case.method, ha.Method)]


def make_cache(lengths, counts, *, heads=4, kv_heads=2, dtype=torch.float32, seed=0):
    """Requests alone, and the same in pages: queries, a cache of keys beside values, a table with holes, starts."""
    alone = []
    for s, (length, count) in enumerate(zip(lengths, counts, strict=True)):
        q, k, v = tensors(count, length, heads=heads, kv_heads=kv_heads, head_dim=8, value_dim=4, dtype=dtype, seed=seed + s)
        alone.append((q, k, v))
    each = -(-max(1, *lengths) // PAGE) + 1
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(lengths) * each, generator=generator).view(len(lengths), each)
    cache = torch.full((order.numel(), kv_heads, PAGE, 12), torch.nan, dtype=dtype)
    table = torch.full(order.shape, -1, dtype=torch.int32)
    for s, (_, k, v) in enumerate(alone):
        kv = torch.cat([k, v], -1)[0]
        for p in range(-(-kv.shape[1] // PAGE)):
            part = kv[:, p * PAGE : (p + 1) * PAGE]
            cache[order[s, p], :, : part.shape[1]] = part
            table[s, p] = order[s, p]
    starts = torch.tensor([0, *counts]).cumsum(0).int()
    query = torch.cat([q[0].transpose(0, 1) for q, _, _ in alone])
    return alone, (query, cache[..., :8], cache[..., 8:], table, starts, torch.tensor(lengths, dtype=torch.int32))


def apart(x, counts):
    return [part.transpose(0, 1)[None] for part in x.split(counts)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize(
    ("lengths", "counts"),
    [([40, 87, 1, 33], [1, 1, 1, 1]), ([41, 87, 100], [24, 63, 100]), ([5], [0]), ([0, 9], [0, 3])],
    ids=str,
)
def test_each_request_gets_what_it_would_get_alone(lengths, counts, dtype):
    alone, arguments = make_cache(lengths, counts, dtype=dtype)
    result = ha.measured_paged_attention(*arguments)
    out, lse = result.out, result.lse
    assert out.dtype == dtype
    for (q, k, v), o, m in zip(alone, apart(out, counts), apart(lse[..., None], counts), strict=True):
        if q.shape[2]:
            options = {"causal": True, "align": "lower_right"}
            truth, plain = dense.reference(q, k, v, **options), dense.attention(q, k, v, **options)
            assert_same_math(o, truth[0], plain[0])
            wide = dense.attention(*(x.to(m.dtype) for x in (q, k, v)), **options)
            assert_same_math(m[..., 0], truth[1], wide[1])


@pytest.mark.usefixtures("triton_kernel")
def test_the_triton_kernel_reads_the_same_pages():
    counts = [1, 24, 70]
    alone, arguments = make_cache([40, 87, 100], counts)
    out = ha.paged_attention(*arguments)
    for (q, k, v), o in zip(alone, apart(out, counts), strict=True):
        assert_same_math(o, *(f(q, k, v, causal=True, align="lower_right")[0] for f in (dense.reference, dense.attention)))


@pytest.mark.usefixtures("triton_kernel")
@pytest.mark.parametrize(
    "method",
    [*(pytest.param(each, marks=pytest.mark.heavy) for each in (METHODS[0], METHODS[1], HASHED)), RANKED],
    ids=["default", "control", "hashed", "ranked"],
)
def test_the_triton_kernel_reads_what_methods_list(method):
    test_methods_choose_and_read_as_they_would_alone(method)


def test_pages_under_autocast():
    q, k, v = tensors(300, 4200, heads=2, kv_heads=1, head_dim=80, value_dim=16)
    pages = (x[0].unflatten(1, (-1, 60)).transpose(0, 1) for x in (k, v))
    arguments = q[0].transpose(0, 1), *pages, torch.arange(70)[None], torch.tensor([0, 300]), torch.tensor([4200])
    with torch.autocast("cpu", torch.bfloat16):
        out = ha.paged_attention(*arguments)
    assert out.dtype == torch.bfloat16
    narrow = (x.bfloat16() for x in (q, k, v))
    expected = ha.attention(*narrow, is_causal=True, causal_align="lower_right", enable_gqa=True)
    assert_exact(out, expected[0].transpose(0, 1))


@pytest.mark.parametrize("method", METHODS, ids=repr)
def test_methods_choose_and_read_as_they_would_alone(method):
    counts = [30, 64, 1]
    alone, arguments = make_cache([150, 64, 90], counts)
    out = ha.paged_attention(*arguments, method=method, seed=3)
    for (q, k, v), o in zip(alone, apart(out, counts), strict=True):
        expected = ha.attention(q, k, v, is_causal=True, causal_align="lower_right", enable_gqa=True, method=method, seed=3)
        assert_exact(o, expected)


DRAWN = ha.Method(ha.Sinks(2), ha.Window(8), ha.Draw(8), tile=8)


@pytest.mark.parametrize(
    "method",
    [
        ha.ByHead((DRAWN, ha.Exact())),
        ha.ByLayer({5: ha.ByHead((ha.Exact(), DRAWN))}),
        ha.ByLayer({5: DRAWN}),
        ha.ByLayer({4: DRAWN}),
    ],
    ids=["heads", "layer of heads", "layer", "other layer"],
)
def test_methods_by_head_and_layer_give_what_they_give_alone(method):
    counts = [30, 64, 1]
    alone, arguments = make_cache([150, 64, 90], counts)
    out = ha.paged_attention(*arguments, method=method, seed=3, layer=5)
    for (q, k, v), o in zip(alone, apart(out, counts), strict=True):
        options = {"is_causal": True, "causal_align": "lower_right", "enable_gqa": True, "seed": 3, "layer": 5}
        assert_exact(o, ha.attention(q, k, v, method=method, **options))


def test_a_process_with_some_heads_draws_for_them_as_one_with_all():
    _, (query, key, value, *rest) = make_cache([150, 90], [30, 40])
    whole = ha.paged_attention(query, key, value, *rest, method=DRAWN)
    part = ha.paged_attention(query[:, 2:], key[:, 1:], value[:, 1:], *rest, method=DRAWN, first_kv_head=1)
    assert_exact(part, whole[:, 2:])
    # the number matters: the first head's draws are others
    other = ha.paged_attention(query[:, 2:], key[:, 1:], value[:, 1:], *rest, method=DRAWN)
    assert not torch.allclose(other, part)
    with pytest.raises(ValueError, match="first_kv_head is -1"):
        ha.paged_attention(query, key, value, *rest, first_kv_head=-1)


@pytest.mark.parametrize("method", METHODS, ids=repr)
def test_a_method_does_not_read_what_it_says_it_does_not(method):
    from hyperattention.problem import Problem

    def indices(k, v):
        x = Problem(q, k, v, 0.3, causal=True)
        return [run.first for _, selection in method.selections(x) for run in selection.runs]

    q, k, v = tensors(150, heads=4, kv_heads=2)
    blind = indices(k if method.reads_keys else k * torch.nan, v if method.reads_values else v * torch.nan)
    assert all(torch.equal(a, b) for a, b in zip(blind, indices(k, v), strict=True))


def test_positions_alone_copy_no_keys():
    assert not CONTROL.reads_keys
    assert not CONTROL.reads_values
    assert ha.default_method(10**6).reads_keys


@pytest.fixture
def without_shape_checks():
    """Run as a user does: the checks of annotations that the other tests run under would speak first."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


BAD = {
    "heads": ("query", lambda x: x[:, :3], "3 query heads cannot share 2 kv heads evenly"),
    "axes": ("query", lambda x: x[None], "queries must be .tokens, heads, head_dim."),
    "dtypes": ("query", lambda x: x.half(), "convert them to one of"),
    "widths": ("query", lambda x: x[..., :4], "queries and keys in the last"),
    "requests": ("table", lambda x: x[:2], "3 requests, seq_lens 3, block_table 2: give one of each"),
    "kind of table": ("table", lambda x: x.float(), "must be integers"),
    "starts": ("starts", lambda x: x.flip(0), "must rise from 0 to the number of tokens, 55"),
    "fewer keys than queries": ("lengths", lambda x: x - 10, "request 1 has 24 queries, 20 keys"),
    "more keys than pages": ("lengths", lambda x: x + 1000, "and fit in the pages"),
    "recursion": ("method", lambda _: ha.HyperAttention(), "does not read pages"),
    "no method": ("method", lambda _: 3, "method"),
}


@pytest.mark.usefixtures("without_shape_checks")
@pytest.mark.parametrize(("name", "change", "message"), BAD.values(), ids=BAD)
def test_bad_input_is_refused(name, change, message):
    _, arguments = make_cache([40, 30, 87], [1, 24, 30])
    names = ("query", "key_pages", "value_pages", "table", "starts", "lengths", "method")
    named = dict(zip(names, (*arguments, None), strict=True))
    named[name] = change(named[name])
    method = named.pop("method")
    with pytest.raises((ValueError, TypeError, NotImplementedError), match=message):
        ha.paged_attention(*named.values(), method=method)
