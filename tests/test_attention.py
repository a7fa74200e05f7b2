"""The front door: SDPA's arguments and semantics, whatever method runs behind it."""

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

import dense
import hyperattention as ha
from assertions import assert_exact, assert_same_bits, assert_same_math
from cases import CONTROL
from problems import tensors

# lists with room for every key: all that a method adds to exact attention is then machinery
FULL = ha.Method(ha.Sinks(4), ha.Window(8), ha.TopBlocks(2, block_size=8), ha.Draw(64), tile=16)
METHODS = {"default": None, "exact": ha.Exact(), "lists": FULL}
every_method = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
every_align = pytest.mark.parametrize("align", ["upper_left", "lower_right"])
NARROW = [torch.bfloat16, torch.float16]


def attend(
    q: Tensor, k: Tensor, v: Tensor, method: ha.Method | None, mask: Tensor | None = None, **options
) -> tuple[Tensor, Tensor]:
    return ha.attention(q, k, v, mask, enable_gqa=True, method=method, return_lse=True, **options)


def assert_attends(ours: tuple[Tensor, Tensor], q: Tensor, k: Tensor, v: Tensor, **options) -> None:
    """Out in the dtype of the query and lse in the accumulation dtype are those of dense attention."""
    truth, plain = dense.reference(q, k, v, **options), dense.attention(q, k, v, **options)
    assert_same_math(ours[0], truth[0], plain[0])
    dtype = torch.promote_types(q.dtype, torch.float32)
    mask = options.pop("attn_mask", None)
    mask = mask.to(dtype) if mask is not None and mask.is_floating_point() else mask
    assert_same_math(ours[1], truth[1], dense.attention(q.to(dtype), k.to(dtype), v.to(dtype), attn_mask=mask, **options)[1])


def padded(side: str) -> Tensor:
    """Key masks of two rows of 30 keys, one of them padded."""
    place, live = torch.arange(30), torch.ones(2, 30, dtype=torch.bool)
    live[1] = {"left": place >= 11, "right": place < 19, "holes": place % 3 > 0, "all": place < 0}[side]
    return live


# shapes and dtypes


@every_method
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, *NARROW], ids=str)
@pytest.mark.parametrize("causal", [True, False])
def test_dtypes(method, dtype, causal):
    q, k, v = tensors(30, dtype=dtype)
    ours = attend(q, k, v, method, is_causal=causal)
    assert_attends(ours, q, k, v, causal=causal)
    alone = ha.attention(q, k, v, is_causal=causal, method=method)
    assert alone.dtype == dtype
    assert_same_math(alone, *(f(q, k, v, causal=causal)[0] for f in (dense.reference, dense.attention)))


@every_method
@every_align
@pytest.mark.parametrize(("num_queries", "num_keys"), [(30, 30), (13, 30), (30, 13), (1, 30), (17, 16)])
def test_lengths_alignments_and_shared_heads(method, align, num_queries, num_keys):
    q, k, v = tensors(num_queries, num_keys, batch=2, heads=6, value_dim=5)
    options = {"causal": True, "align": align}
    assert_attends(attend(q, k, v, method, is_causal=True, causal_align=align), q, k, v, **options)
    if align == "upper_left":
        expected = scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        assert_same_math(
            ha.attention(q, k, v, is_causal=True, enable_gqa=True, method=method),
            dense.reference(q, k, v, **options)[0],
            expected,
        )
    assert_attends(attend(q, k, v, method), q, k, v)


@every_method
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_query_heads_share_kv_heads_in_order(method, kv_heads):
    q, k, v = tensors(30, heads=4, kv_heads=kv_heads)
    ours = ha.attention(q, k, v, is_causal=True, enable_gqa=True, method=method)
    repeated = (x.repeat_interleave(4 // kv_heads, 1) for x in (k, v))
    assert_exact(ours, ha.attention(q, *repeated, is_causal=True, method=method))


@every_method
def test_any_strides(method):
    q, k, v = tensors(30, batch=2)
    apart = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k)] + [v.repeat_interleave(2, 3)[..., ::2]]
    for options in ({}, {"key_mask": padded("left")}):
        ours, expected = (attend(*x, method, is_causal=True, **options) for x in (apart, (q, k, v)))
        for x, y in zip(ours, expected, strict=True):
            assert_exact(x, y)
    shared = [x[:1].expand(2, -1, -1, -1) for x in (q, k, v)]
    assert_exact(attend(*shared, method)[0], attend(*(x.contiguous() for x in shared), method)[0])


@every_method
def test_scale(method):
    q, k, v = tensors(30)
    assert_attends(attend(q, k, v, method, is_causal=True, scale=0.21), q, k, v, causal=True, scale=0.21)
    assert_exact(attend(q, k, v, method, scale=0.0)[0], v.mean(2, keepdim=True).expand_as(v))


# masks


@every_method
@every_align
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("side", ["left", "right", "holes", "all"])
def test_key_masks(method, align, causal, side):
    q, k, v = tensors(24, 30, batch=2, heads=4)
    live = padded(side)
    ours = attend(q, k, v, method, is_causal=causal, causal_align=align, key_mask=live)
    assert_attends(ours, q, k, v, causal=causal, align=align, key_mask=live)
    as_sdpa = attend(q, k, v, method, live[:, None, None], is_causal=causal, causal_align=align)
    for x, y in zip(as_sdpa, ours, strict=True):
        assert_same_bits(x, y)


def test_key_masks_of_both_kinds_combine():
    q, k, v = tensors(30, batch=2)
    one, other = padded("holes"), padded("left")
    both = attend(q, k, v, FULL, other[:, None, None], key_mask=one)
    for x, y in zip(both, attend(q, k, v, FULL, key_mask=one & other), strict=True):
        assert_same_bits(x, y)
    for_all_rows = attend(q, k, v, FULL, one[1:, None, None])
    for x, y in zip(for_all_rows, attend(q, k, v, FULL, key_mask=one[1:].expand(2, -1)), strict=True):
        assert_same_bits(x, y)


def test_sinks_are_the_first_live_keys():
    q, k, v = tensors(80, batch=2)
    live = torch.arange(80)[None] >= torch.tensor([[0], [37]])
    method = ha.Method(ha.Sinks(3), ha.Window(4), tile=16)
    out = ha.attention(q, k, v, is_causal=True, method=method, key_mask=live)
    seen = torch.zeros(2, 80, 80, dtype=torch.bool)
    for row, first in enumerate((0, 37)):
        for i in range(first, 80):
            start = max(first, i // 16 * 16)
            seen[row, i, first : min(first + 3, i + 1)] = True
            seen[row, i, max(first, start - 4) : i + 1] = True
    mask = seen[:, None]
    assert_same_math(out, *(f(q, k, v, attn_mask=mask)[0] for f in (dense.reference, dense.attention)))


@pytest.mark.parametrize("method", [None, ha.Exact()], ids=["default", "exact"])
@pytest.mark.parametrize(
    "shape", [(24, 30), (2, 1, 24, 30), (1, 4, 24, 30), (2, 4, 1, 30), (24, 1), (2, 4, 24, 30)], ids=str
)
@pytest.mark.parametrize("kind", ["bool", "float"])
def test_dense_masks_broadcast_as_in_sdpa(method, shape, kind):
    q, k, v = tensors(24, 30, batch=2, heads=4)
    mask = torch.randn(shape, generator=torch.Generator().manual_seed(2))
    mask = mask > -1 if kind == "bool" else mask
    ours = attend(q, k, v, method, mask)
    assert_attends(ours, q, k, v, attn_mask=mask)
    # rows that see nothing are zeros here as in SDPA, or NaN in some of its kernels
    expected = scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
    assert_exact(ours[0], torch.where(torch.isnan(expected), 0.0, expected))
    live = padded("holes")
    assert_attends(attend(q, k, v, method, mask, key_mask=live), q, k, v, attn_mask=mask, key_mask=live)


@pytest.mark.parametrize("dtype", NARROW, ids=str)
def test_dense_masks_keep_the_dtype(dtype):
    q, k, v = tensors(20, dtype=dtype)
    mask = torch.zeros(20, 20, dtype=dtype).masked_fill(~dense.visible(20, 20, causal=True), -torch.inf)
    assert_attends(attend(q, k, v, None, mask), q, k, v, attn_mask=mask)
    assert ha.attention(q, k, v, mask).dtype == dtype


# packed sequences


@every_method
@every_align
@pytest.mark.parametrize("causal", [True, False])
def test_packed_sequences_do_not_see_one_another(method, align, causal):
    lengths_q, lengths_k = [9, 0, 20, 1, 5], [9, 3, 30, 1, 0]
    q, k, v = tensors(sum(lengths_q), sum(lengths_k), heads=4)
    edges_q, edges_k = (torch.tensor([0, *torch.tensor(x).cumsum(0).tolist()]) for x in (lengths_q, lengths_k))
    options = {"is_causal": causal, "causal_align": align, "enable_gqa": True, "method": method, "seed": 5}
    ours = ha.varlen_attention(q, k, v, edges_q, edges_k, return_lse=True, **options)
    assert_exact(ha.varlen_attention(q, k, v, edges_q.int(), edges_k.int(), **options), ours[0])
    for q0, q1, k0, k1 in zip(edges_q, edges_q[1:], edges_k, edges_k[1:], strict=False):
        piece = q[:, :, q0:q1], k[:, :, k0:k1], v[:, :, k0:k1]
        for x, y in zip(ours, ha.attention(*piece, return_lse=True, **options), strict=True):
            assert_exact(x[:, :, q0:q1], y)
        assert_attends(tuple(x[:, :, q0:q1] for x in ours), *piece, causal=causal, align=align)


def test_packed_sequences_share_their_edges_unless_told():
    q, k, v = tensors(30)
    edges = torch.tensor([0, 11, 30])
    one = ha.varlen_attention(q, k, v, edges, is_causal=True, method=FULL)
    assert_same_bits(one, ha.varlen_attention(q, k, v, edges, edges, is_causal=True, method=FULL))
    empty = tuple(x[:, :, :0] for x in (q, k, v))
    for edges in (torch.tensor([0]), torch.tensor([0, 0, 0])):
        assert ha.varlen_attention(*empty, edges, method=FULL).shape == empty[0].shape


# what comes back


@every_method
def test_return_forms(method):
    q, k, v = tensors(30)
    out = ha.attention(q, k, v, is_causal=True, method=method)
    assert isinstance(out, Tensor)
    first, lse = ha.attention(q, k, v, is_causal=True, method=method, return_lse=True)
    assert lse.dtype == torch.float32
    second, report = ha.attention(q, k, v, is_causal=True, method=method, audit=8)
    third, lse_again, report_again = ha.attention(q, k, v, is_causal=True, method=method, return_lse=True, audit=8)
    for x in (first, second, third):
        assert_exact(x, out)
    assert_same_bits(lse_again, lse)
    assert isinstance(report, ha.ErrorReport)
    assert report.relative_error.shape == (1, 2)
    assert_exact(report.relative_error + 1, torch.ones(1, 2, dtype=report.relative_error.dtype))
    assert isinstance(report_again, ha.ErrorReport)


def test_audit_sees_the_masks_and_the_alignment():
    q, k, v = tensors(24, 30, batch=2, heads=4)
    live = padded("left")
    for options in ({"key_mask": live}, {"attn_mask": live[:, None, None]}, {"causal_align": "lower_right"}, {"scale": 0.3}):
        options = {"is_causal": True, "enable_gqa": True, "method": FULL} | options
        mask = options.pop("attn_mask", None)
        _, report = ha.attention(q, k, v, mask, audit=12, **options)
        assert (report.relative_error < 1e-5).all()
    _, report = ha.attention(q, k, v, enable_gqa=True, method=ha.Method(ha.Window(2), tile=2), audit=12)
    assert (report.relative_error > 0.05).all()


def test_no_method_is_exact_below_the_crossover_and_visible():
    q, k, v = tensors(40)
    assert ha.default_method(40) == ha.Exact()
    assert_same_bits(ha.attention(q, k, v, is_causal=True), ha.attention(q, k, v, is_causal=True, method=ha.Exact()))
    small = ha.attention(q, k, v, is_causal=True, method=CONTROL)
    assert not torch.equal(small, ha.attention(q, k, v, is_causal=True)), "an explicit method runs as written, however short"
    long, few = ha.default_method(10**6), ha.default_method(10**6, num_queries=1)
    assert isinstance(long, ha.Method)
    assert few == ha.Exact()
    assert eval(repr(long), vars(ha)) == long


def test_above_the_crossover_no_method_runs_the_default():
    from hyperattention.default import CROSSOVER

    q, k, v = tensors(CROSSOVER, heads=1, kv_heads=1, head_dim=4, value_dim=4)
    with torch.no_grad():
        ours = ha.attention(q, k, v, is_causal=True, seed=3)
        assert_same_bits(ours, ha.attention(q, k, v, is_causal=True, seed=3, method=ha.default_method(CROSSOVER)))


# gradients


@every_method
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_gradients(method, dtype):
    live = padded("left")
    leaves = [x.requires_grad_() for x in tensors(30, batch=2, heads=4, dtype=dtype)]
    options = {"is_causal": True, "key_mask": live}

    def gradients(out: Tensor, lse: Tensor, leaves: list[Tensor]) -> tuple[Tensor, ...]:
        ramp = torch.linspace(-1, 2, out.numel()).view(out.shape).to(out)
        return torch.autograd.grad((out * ramp).sum() + (lse[lse > -torch.inf] ** 2).sum(), leaves)

    ours = gradients(*attend(*leaves, method, **options), leaves)
    wide = [x.detach().double().requires_grad_() for x in leaves]
    truth = gradients(*dense.attention(*wide, causal=True, key_mask=live), wide)
    plain = gradients(*dense.attention(*leaves, causal=True, key_mask=live), leaves)
    for x, y, z in zip(ours, truth, plain, strict=True):
        assert_same_math(x, y, z)
    # the queries of the padded row's first tokens see nothing
    assert_same_bits(ours[0][1, :, :11], torch.zeros_like(ours[0][1, :, :11]))


def test_gradients_hold_the_selection_fixed():
    from hyperattention.problem import Problem

    leaves = [x.requires_grad_() for x in tensors(60, heads=4, dtype=torch.float64)]
    method = ha.Method(ha.Sinks(2), ha.Window(8), ha.TopBlocks(1, block_size=4), ha.Draw(5), tile=8)
    with torch.no_grad():
        frozen = dense.weights(method, Problem(*leaves, leaves[0].shape[-1] ** -0.5, causal=True, seed=1))
    assert (frozen > 1).any()
    ours, truth = attend(*leaves, method, is_causal=True, seed=1), dense.attention(*leaves, causal=True, weight=frozen)
    mine, expected = (torch.autograd.grad((out**2).sum() + (lse**2).sum(), leaves) for out, lse in (ours, truth))
    for x, y in zip(mine, expected, strict=True):
        # the weights' logarithms are float32
        assert_exact(x.float(), y.float())


def test_gradcheck_through_the_front_door():
    leaves = [x.requires_grad_() for x in tensors(9, heads=2, kv_heads=1, head_dim=2, value_dim=3, dtype=torch.float64)]
    method = ha.Method(ha.Sinks(1), ha.Window(2), ha.Draw(2), tile=2)
    assert torch.autograd.gradcheck(lambda *x: attend(*x, method, is_causal=True), leaves)


@every_method
def test_rows_that_see_nothing_are_zero_and_send_no_gradient(method):
    q, k, v = (x.requires_grad_() for x in tensors(30, 12))
    out, lse = attend(q, k, v, method, is_causal=True, causal_align="lower_right")
    assert_same_bits(out[:, :, :18], torch.zeros_like(out[:, :, :18]))
    assert_same_bits(lse[:, :, :18], torch.full_like(lse[:, :, :18], -torch.inf))
    gradients = torch.autograd.grad(out[:, :, :18].sum(), (q, k, v), retain_graph=True)
    assert all(not gradient.any() for gradient in gradients)
    assert all(torch.isfinite(x).all() for x in torch.autograd.grad(out.sum(), (q, k, v)))


def test_checkpointing_repeats_every_bit():
    from torch.utils.checkpoint import checkpoint

    tokens = tensors(70)

    def gradients(call) -> list[Tensor]:
        leaves = [x.clone().requires_grad_() for x in tokens]
        out = call(lambda q, k, v: ha.attention(2 * q, k, v, is_causal=True, method=CONTROL, seed=2), *leaves)
        (out**2).sum().backward()
        return [out, *(x.grad for x in leaves)]

    plain = gradients(lambda f, *x: f(*x))
    # neither replays a random state: the draws are a function of the seed
    for reentrant in (True, False):
        again = gradients(lambda f, *x, r=reentrant: checkpoint(f, *x, use_reentrant=r, preserve_rng_state=False))
        for x, y in zip(again, plain, strict=True):
            assert_same_bits(x, y)


# torch's machinery


@every_method
def test_autocast_computes_in_its_dtype(method):
    q, k, v = tensors(30)
    with torch.autocast("cpu", torch.bfloat16):
        out, lse = attend(q, k, v, method, is_causal=True)
        mixed, _ = attend(q, k, v.bfloat16(), method, is_causal=True)
        expected = scaled_dot_product_attention(q, k, v, is_causal=True)
    assert out.dtype == expected.dtype == torch.bfloat16
    assert_attends((out, lse), *(x.bfloat16() for x in (q, k, v)), causal=True)
    assert_same_bits(mixed, out)
    with torch.autocast("cpu", torch.bfloat16):
        wide = attend(q.double(), k.double(), v.double(), method, is_causal=True)[0]
    assert wide.dtype == torch.float64


@every_method
@pytest.mark.parametrize("masked", [False, True])
def test_the_meta_device_gives_shapes(method, masked):
    q, k, v = (x.to("meta") for x in tensors(40, 50, batch=2, heads=4, value_dim=5))
    options = {"key_mask": torch.ones(2, 50, dtype=torch.bool, device="meta")} if masked else {}
    out, lse = attend(q, k, v, method, is_causal=True, **options)
    assert out.device.type == "meta"
    assert (out.shape, lse.shape) == ((2, 4, 40, 5), (2, 4, 40))


@every_method
@pytest.mark.parametrize("masked", [False, True])
def test_fake_tensors_give_shapes(method, masked):
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        q, k, v = torch.empty(2, 4, 40, 8), torch.empty(2, 2, 50, 8), torch.empty(2, 2, 50, 5)
        options = {"key_mask": torch.ones(2, 50, dtype=torch.bool)} if masked else {}
        out, lse = attend(q, k, v, method, is_causal=True, **options)
    assert (out.shape, lse.shape) == ((2, 4, 40, 5), (2, 4, 40))


COMPILED = """
import torch
import hyperattention as ha
lists = ha.Method(ha.Sinks(2), ha.Window(8), ha.TopBlocks(2, block_size=4), ha.Draw(4), tile=8)
torch.manual_seed(0)
q, k, v = torch.randn(2, 4, 50, 8), torch.randn(2, 2, 50, 8), torch.randn(2, 2, 50, 8)
live = torch.arange(50)[None] >= torch.tensor([[0], [9]])
for method, key_mask in ((None, None), (ha.default_method(10**6), None), (lists, live)):
    def attend(q, k, v):
        options = dict(is_causal=True, enable_gqa=True, key_mask=key_mask)
        out, lse = ha.attention(q, k, v, method=method, return_lse=True, **options)
        return out, lse.masked_fill(lse == -torch.inf, 0.0)
    results = []
    for step in (attend, torch.compile(attend, fullgraph=True, backend="aot_eager")):
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        out, lse = step(*leaves)
        results.append([out.detach(), lse.detach(), *torch.autograd.grad((out ** 2).sum() + lse.sum(), leaves)])
    print(max((a - b).abs().max().item() for a, b in zip(*results)) < 1e-5)
"""


@pytest.mark.slow
def test_compiles_into_one_graph(run_python):
    assert run_python(COMPILED).split() == ["True"] * 3
