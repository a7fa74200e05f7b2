"""Which fused kernel answers exact attention, and that it agrees with the oracle; `pytest -m gpu` where there is a GPU."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import hyperattention as ha
from assertions import assert_exact, assert_same_bits, assert_same_math
from hyperattention.exact import exact_attention, visible_keys
from hyperattention.fused import CpuFlash, Folded, FusedCall, Plain, choose
from hyperattention.kernels.cpu_flash import _cpu_flash, cpu_flash

SCALE = 0.3
# (heads, kv heads, queries, keys, is_causal, causal_align)
SHAPES = [
    (4, 4, 1, 90, True, "lower_right"),
    (4, 1, 1, 90, True, "lower_right"),
    (4, 2, 1, 90, True, "upper_left"),
    (4, 2, 17, 90, True, "lower_right"),
    (4, 2, 17, 90, True, "upper_left"),
    (4, 2, 90, 17, True, "lower_right"),
    (4, 2, 90, 17, True, "upper_left"),
    (4, 2, 50, 50, True, "upper_left"),
    (4, 2, 17, 90, False, "upper_left"),
    (4, 2, 18, 17, True, "lower_right"),
    (4, 2, 16, 17, True, "lower_right"),
]
# dead keys first, dead keys last, none live, all live, and dead keys between live ones
MASKS = ["left", "right", "none", "all", "holes"]


def make(heads, kv_heads, queries, keys, *, batch=2, dtype=torch.float32, width=8, device="cpu"):
    generator = torch.Generator().manual_seed(queries * 1000 + keys)
    shapes = [(heads, queries), (kv_heads, keys), (kv_heads, keys)]
    made = [torch.randn(batch, *shape, width, generator=generator, dtype=torch.float64) for shape in shapes]
    return [x.to(dtype).to(device) for x in made]


def mask_of(names, keys):
    position = torch.arange(keys)
    masks = {
        "left": position >= keys // 3,
        "right": position < keys // 2,
        "none": position < 0,
        "all": position >= 0,
        "holes": position % 3 != 1,
    }
    return torch.stack([masks[name] for name in names])


def oracle(q, k, v, is_causal, align, key_mask=None):
    visible = visible_keys(q.shape[2], k.shape[2], is_causal, align, q.device)
    if key_mask is not None:
        k, v = (x.masked_fill(~key_mask[:, None, :, None], 0.0) for x in (k, v))
    return exact_attention(*(x.double() for x in (q, k, v)), scale=SCALE, visible=visible, key_mask=key_mask)


def run(q, k, v, is_causal, align, *, with_lse=False, **options):
    options |= {"is_causal": is_causal, "causal_align": align, "scale": SCALE, "enable_gqa": True, "method": ha.Exact()}
    if not with_lse:
        return ha.attention(q, k, v, **options)
    result = ha.measured_attention(q, k, v, **options)
    return result.out, result.lse


class Operators(TorchDispatchMode):
    """Remember what ran, and the largest result that is no view."""

    def __init__(self):
        super().__init__()
        self.names, self.numel = [], 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.names.append(func._schema.name.split("::")[1])
        old = {x.untyped_storage().data_ptr() for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
        made = [x for x in tree_leaves(result) if isinstance(x, torch.Tensor)]
        self.numel = max([self.numel, *(x.numel() for x in made if x.untyped_storage().data_ptr() not in old)])
        return result

    @property
    def fused(self):
        return [name for name in self.names if "attention_for_cpu" in name or name == "cpu_flash"]


def assert_near(ours, reference):
    """Two orders of the same sums, whose terms are of size 1 even where they cancel."""
    size = reference[reference.isfinite()].abs().max().item() if reference.isfinite().any() else 0.0
    assert_exact(ours, reference.to(ours.dtype), size=max(1.0, size))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("with_lse", [False, True])
def test_every_shape_runs_a_fused_kernel_and_is_the_oracle(shape, with_lse):
    *sizes, is_causal, align = shape
    q, k, v = make(*sizes)
    with Operators() as seen:
        result = run(q, k, v, is_causal, align, with_lse=with_lse)
    expected = oracle(q, k, v, is_causal, align)
    out, lse = result if with_lse else (result, None)
    assert_near(out, expected.out)
    if lse is not None:
        assert_near(lse, expected.lse)
    assert seen.fused, seen.names
    assert "bmm" not in seen.names, "scores were written down"


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("with_lse", [False, True])
def test_gradients_are_those_of_the_oracle(shape, with_lse):
    *sizes, is_causal, align = shape
    x = make(*sizes)

    def gradients(attend, *leaves):
        leaves = [t.clone().requires_grad_() for t in leaves]
        out, lse = attend(*leaves)
        ramp = torch.linspace(0.5, 2, out.numel(), dtype=out.dtype).view(out.shape)
        loss = (out * ramp).sum()
        if lse is not None:
            loss = loss + (lse.masked_fill(lse == -torch.inf, 0.0) * ramp[..., 0]).sum()
        return torch.autograd.grad(loss, leaves)

    def ours(*leaves):
        result = run(*leaves, is_causal, align, with_lse=with_lse)
        return result if with_lse else (result, None)

    def theirs(*leaves):
        partial = oracle(*leaves, is_causal, align)
        return partial.out, partial.lse if with_lse else None

    truth = gradients(theirs, *(t.double() for t in x))
    for a, b in zip(gradients(ours, *x), truth, strict=True):
        assert_near(a, b)


@pytest.mark.parametrize("names", [("left", "left"), ("left", "right"), ("none", "all"), ("holes", "left")], ids="-".join)
@pytest.mark.parametrize("shape", [s for s in SHAPES if s[3] == 90], ids=str)
@pytest.mark.parametrize("with_lse", [False, True])
def test_masks_of_keys(names, shape, with_lse):
    *sizes, is_causal, align = shape
    q, k, v = make(*sizes)
    key_mask = mask_of(names, sizes[3])
    for x in (k, v):
        x.transpose(1, 2)[~key_mask] = torch.nan
    result = run(q, k, v, is_causal, align, key_mask=key_mask, with_lse=with_lse)
    expected = oracle(q, k, v, is_causal, align, key_mask)
    out, lse = result if with_lse else (result, None)
    assert_near(out, expected.out)
    if lse is not None:
        assert_near(lse, expected.lse)


def test_padding_copies_no_key_and_repeats_no_head():
    q, k, v = make(8, 2, 1, 4096, batch=1)
    key_mask = mask_of(["left"], 4096)
    with Operators() as seen:
        run(q, k, v, True, "lower_right", key_mask=key_mask)
    assert seen.fused == ["_scaled_dot_product_flash_attention_for_cpu"]
    assert seen.numel <= key_mask.numel()


@pytest.mark.parametrize("queries", [1, 16])
def test_grouped_heads_are_not_repeated(queries):
    q, k, v = make(8, 2, queries, 2048, batch=1)
    with Operators() as seen:
        run(q, k, v, True, "lower_right")
    assert seen.fused
    assert seen.numel < k.numel() / 2


def test_the_choice_says_which_kernel_runs():
    q, k, v = make(4, 2, 6, 9)
    square = FusedCall(q, k[:, :, :6], v[:, :, :6], SCALE, True)
    assert choose(square, lse=False) == Plain()
    assert choose(FusedCall(q, k, v, SCALE, False), lse=False) == Folded()
    assert choose(FusedCall(q, k, v, SCALE, True), lse=False) == CpuFlash()
    assert choose(square, lse=True) == CpuFlash()
    assert choose(FusedCall(q, k, v[..., :3], SCALE, True), lse=False) is None
    wide = [x.double() for x in (q, k, v)]
    assert choose(FusedCall(*wide, SCALE, True), lse=True) is None
    half = [x.bfloat16() for x in (q, k, v)]
    assert choose(FusedCall(*half, SCALE, True), lse=True) is None


def test_numbers_of_a_row_that_do_not_lie_side_by_side():
    x = [t.transpose(2, 3).contiguous().transpose(2, 3) for t in make(4, 2, 9, 30)]
    assert x[0].stride(-1) != 1
    for queries in (9, 1):
        q = x[0][:, :, :queries]
        assert_near(run(q, *x[1:], True, "lower_right"), oracle(q, *x[1:], True, "lower_right").out)
    k, v = (t[:, :, :9] for t in x[1:])
    assert_near(run(x[0], k, v, True, "upper_left"), oracle(x[0], k, v, True, "upper_left").out)


def test_forward_mode_and_vmap_run_in_chunks():
    q, k, v = make(2, 2, 5, 9)

    def attend(q):
        return run(q, k, v, True, "lower_right")

    _, tangent = torch.func.jvp(attend, (q,), (torch.ones_like(q),))
    assert_near(tangent, torch.func.jvp(lambda q: oracle(q, k, v, True, "lower_right").out, (q,), (torch.ones_like(q),))[1])
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(q, torch.ones_like(q))
        assert_same_bits(torch.autograd.forward_ad.unpack_dual(attend(dual)).tangent, tangent)
    many = torch.stack([q, q + 1])
    assert_near(torch.func.vmap(attend)(many), torch.stack([attend(q), attend(q + 1)]).double())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_dtypes(dtype):
    x = make(4, 2, 40, 300, dtype=dtype, width=16)
    group = [t.repeat_interleave(2, 1) for t in x[1:]]
    mask = torch.ones(40, 300, dtype=torch.bool).tril(260)
    plain = torch.nn.functional.scaled_dot_product_attention(x[0], *group, attn_mask=mask, scale=SCALE)
    assert_same_math(run(*x, True, "lower_right"), oracle(*x, True, "lower_right").out, plain)


@pytest.mark.slow
def test_the_operator_keeps_torchs_rules():
    q, k, v = (x.requires_grad_() for x in make(4, 2, 5, 9))
    torch.library.opcheck(_cpu_flash, (q, k, v, SCALE, True))
    wide = [x.detach().double().requires_grad_() for x in make(2, 1, 3, 5, batch=1, width=3)]
    for causal in (True, False):

        def both(q, k, v, causal=causal):
            partial = cpu_flash(q, k, v, SCALE, causal=causal)
            return partial.out, partial.lse

        assert torch.autograd.gradcheck(both, wide)


GPU_SHAPES = [(1, 131_072, True), (2048, 131_072, True), (4096, 4096, True), (16, 5000, False)]


def some_rows(q, k, v, rows, is_causal, key_mask, dtype):
    visible = visible_keys(q.shape[2], k.shape[2], is_causal, "lower_right", q.device)
    x = [t.to(dtype) for t in (q, k, v)]
    return exact_attention(*x, scale=SCALE, visible=visible, key_mask=key_mask, row_index=rows)


@pytest.mark.gpu
@pytest.mark.parametrize(("queries", "keys", "is_causal"), GPU_SHAPES)
@pytest.mark.parametrize("masked", [False, True])
def test_on_a_gpu_fused_kernels_are_the_oracle(queries, keys, is_causal, masked):
    q, k, v = make(32, 8, queries, keys, batch=1, dtype=torch.bfloat16, width=128, device="cuda")
    key_mask = (torch.arange(keys, device="cuda") >= 100)[None] if masked else None
    with Operators() as seen:
        out, lse = run(q, k, v, is_causal, "lower_right", key_mask=key_mask, with_lse=True)
        alone = run(q, k, v, is_causal, "lower_right", key_mask=key_mask)
    assert "_scaled_dot_product_flash_attention" in seen.names
    assert "bmm" not in seen.names
    assert seen.numel <= max(2 * q.numel(), 2 * keys)
    rows = torch.arange(0, queries, max(1, queries // 64), device="cuda")
    truth, plain = (some_rows(q, k, v, rows, is_causal, key_mask, dtype) for dtype in (torch.float64, torch.float32))
    for ours in (out, alone):
        assert_same_math(ours[:, :, rows].cpu(), truth.out.cpu(), plain.out.bfloat16().cpu())
    # what is rounded on the way are sums of products, none of which exceeds |q| |k|, before they are scaled
    largest = [x.float().norm(dim=-1).max().item() for x in (q[:, :, rows], k)]
    assert_exact(lse[:, :, rows].cpu(), truth.lse.float().cpu(), size=SCALE * largest[0] * largest[1])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("with_lse", [False, True])
def test_on_a_gpu_gradients_are_the_oracles(dtype, with_lse):
    x = make(8, 2, 200, 700, batch=1, dtype=dtype, width=64, device="cuda")
    found = []
    for attend, leaves in (
        (lambda *t: run(*t, True, "lower_right", with_lse=True) if with_lse else (run(*t, True, "lower_right"), None), x),
        (lambda *t: vars(oracle(*t, True, "lower_right")).values(), [t.double() for t in x]),
        (lambda *t: vars(oracle(*t, True, "lower_right")).values(), x),
    ):
        leaves = [t.detach().clone().requires_grad_() for t in leaves]
        out, lse = attend(*leaves)
        loss = out.double().square().sum() + (lse.double().sum() if with_lse else 0.0)
        found.append([g.cpu() for g in torch.autograd.grad(loss, leaves)])
    size = torch.finfo(dtype).eps
    for ours, truth, _ in zip(*found, strict=True):
        assert_exact(ours, truth.to(dtype), size=max(truth.abs().max().item(), size))
