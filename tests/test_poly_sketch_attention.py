"""The layer of polynomial attention against its definition, pair by pair; and decoding from its state against the layer."""

import copy
import re
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from assertions import assert_exact, assert_same_bits, assert_same_math
from hyperattention.kernels.feature import plan, reference
from hyperattention.kernels.polynomial import polynomial_attention, polynomial_blocks
from hyperattention.nn import PolySketchAttention, PolySketchState, poly_sketch_attention
from hyperattention.nn.rotary import rotate

WIDTH, HEADS, BLOCK = 16, 2, 8


def make(init: int = 0, dtype: torch.dtype = torch.float64, **options) -> PolySketchAttention:
    torch.manual_seed(init)
    layer = PolySketchAttention(WIDTH, HEADS, dtype=dtype, **{"sketch_size": 5, "block": BLOCK, **options})
    for norm in (layer.query_norm, layer.key_norm):
        for parameter in norm.parameters():
            # away from their initial values, which would hide which of them is read
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    return layer


def tokens(length: int, batch: int = 2, dtype: torch.dtype = torch.float64, width: int = WIDTH) -> Tensor:
    return torch.randn(batch, length, width, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)


def by_definition(layer: PolySketchAttention, x: Tensor) -> Tensor:
    """Weights of all pairs, in the scale of the publication."""
    q, k, v = layer.in_projection(x).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
    if layer.rotary_base is not None:
        q, k = (rotate(each, 0, layer.rotary_base) for each in (q, k))
    normed = layer.query_norm(q), layer.key_norm(k)
    sketches = [layer.sketch(each) for each in ((q, k) if layer.learned else normed)]
    weight = (sketches[0] @ sketches[1].mT).square()
    if layer.local:
        block = torch.arange(x.shape[1]) // layer.block
        weight = torch.where(block[:, None] == block, (normed[0] @ normed[1].mT) ** layer.degree, weight)
    weight = weight.tril()
    return layer.out_projection((weight @ v / (1 + weight.sum(-1, keepdim=True))).transpose(1, 2).flatten(2))


FORMS = {
    "learned": {}, "random": {"learned": False}, "learned, not local": {"local": False},
    "random, not local": {"learned": False, "local": False}, "no positions": {"rotary_base": None},
    "degree 2": {"degree": 2, "learned": False}, "degree 8": {"degree": 8, "learned": False},
    "learned, degree 6": {"degree": 6}, "more features than a block": {"sketch_size": 40, "block": 4},
    "one feature": {"sketch_size": 1, "learned": False}, "blocks of one": {"block": 1},
}  # fmt: skip
every_form = pytest.mark.parametrize("options", FORMS.values(), ids=FORMS)


@every_form
def test_the_layer_is_its_definition(options):
    layer = make(**options)
    for length in (0, 1, BLOCK - 1, BLOCK, BLOCK + 1, 5 * BLOCK + 3):
        x = tokens(length)
        assert_exact(layer(x), by_definition(layer, x))


@pytest.mark.parametrize("learned", [True, False])
def test_float32_is_as_precise_as_the_definition(learned):
    wide = make(learned=learned)
    narrow, x = copy.deepcopy(wide).float(), tokens(100)
    assert_same_math(narrow(x.float()), wide(x), by_definition(narrow, x.float()))


@every_form
def test_gradients_are_those_of_the_definition(options):
    layer, x = make(**options), tokens(3 * BLOCK + 2).requires_grad_()
    leaves = [x, *layer.parameters()]
    ramp = torch.linspace(-1, 2, x.numel(), dtype=x.dtype).view(x.shape)
    ours, expected = (
        torch.autograd.grad((f(x) * ramp).sum(), leaves, materialize_grads=True)
        for f in (layer, lambda x: by_definition(layer, x))
    )
    # all are sums of terms of the size of the largest
    size = max(x.abs().max().item() for x in expected)
    for a, b in zip(ours, expected, strict=True):
        assert_exact(a, b, size=size)


@pytest.mark.parametrize("learned", [True, False])
def test_gradcheck(learned):
    torch.manual_seed(0)
    layer = PolySketchAttention(4, 1, sketch_size=2, block=2, learned=learned, dtype=torch.float64)
    assert torch.autograd.gradcheck(layer, (tokens(5, 1, width=4).requires_grad_(),))


# decoding


def decode(layer: PolySketchAttention, x: Tensor, cuts: list[int]) -> tuple[Tensor, PolySketchState]:
    state, outs = None, []
    for start, end in pairwise([0, *cuts, x.shape[1]]):
        out, state = layer.step(x[:, start:end], state)
        outs.append(out)
    assert state is not None
    return torch.cat(outs, 1), state


@every_form
@pytest.mark.parametrize("prompt", [0, 2 * BLOCK + 3])
def test_a_prompt_and_then_tokens_give_what_the_layer_gives(options, prompt):
    layer, x = make(**options), tokens(3 * BLOCK + 5)
    out, state = decode(layer, x, list(range(prompt, x.shape[1])))
    assert_exact(out, layer(x))
    assert state.position == x.shape[1]


def test_a_text_may_be_cut_anywhere():
    layer, x = make(), tokens(6 * BLOCK)
    whole = layer(x)
    for cuts in ([], [BLOCK], [3, 3, 20, 21, 40], [BLOCK - 1, 4 * BLOCK + 1]):
        assert_exact(decode(layer, x, cuts)[0], whole)


@pytest.mark.parametrize("learned", [True, False])
def test_decoding_in_float32_is_as_precise_as_the_definition(learned):
    wide = make(learned=learned)
    narrow, x = copy.deepcopy(wide).float(), tokens(50)
    ours = decode(narrow, x.float(), list(range(30, 50)))[0]
    assert_same_math(ours, wide(x), by_definition(narrow, x.float()))


def test_the_state_does_not_grow_with_the_text():
    layer, sizes = make(), []
    for length in (3, BLOCK + 3, 40 * BLOCK + 3):
        state = layer.step(tokens(length))[1]
        sizes.append(state.memory_bytes)
        # sums of features squared times values and one, for each text and head
        assert state.total.shape == (2, HEADS, 5 * 6 // 2, WIDTH // HEADS + 1)
        assert state.key.shape[2] == 3
    assert len(set(sizes)) == 1
    most = layer.step(tokens(BLOCK - 1))[1].memory_bytes
    assert most - layer.step(tokens(BLOCK))[1].memory_bytes == 8 * 2 * HEADS * (BLOCK - 1) * (2 * WIDTH // HEADS + 5)


def test_gradients_go_through_the_state():
    layer, x = make(), tokens(3 * BLOCK).requires_grad_()
    ours = torch.autograd.grad(decode(layer, x, [5, 20])[0].square().sum(), [x, *layer.parameters()])
    for a, b in zip(ours, torch.autograd.grad(layer(x).square().sum(), [x, *layer.parameters()]), strict=True):
        assert_exact(a, b)


def test_a_state_is_not_changed_by_a_step():
    layer, x = make(), tokens(2 * BLOCK)
    with torch.no_grad():
        state = layer.step(x[:, : BLOCK - 1])[1]
        kept = copy.deepcopy(state)
        layer.step(x[:, BLOCK - 1 :], state)
    for name in ("total", "key", "key_sketch", "value", "position"):
        assert_same_bits(torch.as_tensor(getattr(state, name)), torch.as_tensor(getattr(kept, name)))


# laws


@every_form
def test_no_token_depends_on_a_later_one(options):
    layer, x = make(**options), tokens(4 * BLOCK)
    later = x.clone()
    later[:, 19:] += 1.0
    assert_exact(layer(later)[:, :19], layer(x)[:, :19])
    assert not torch.isclose(layer(later)[:, 19:], layer(x)[:, 19:]).any(-1).all(-1).any()


def test_texts_of_a_batch_do_not_mix():
    layer, x = make(), tokens(3 * BLOCK)
    assert_exact(layer(x)[1:], layer(x[1:]))


def test_random_sketches_approach_exact_polynomial_attention():
    x, errors = tokens(12 * BLOCK, 1), []
    for size in (6, 48, 384):
        layer = make(sketch_size=size, learned=False)
        exact = copy.deepcopy(layer)
        exact.block = x.shape[1]
        truth = by_definition(exact, x)
        # one block alone is exact attention
        assert_exact(exact(x), truth)
        errors.append(((layer(x) - truth).norm() / truth.norm()).item())
    # as the root of the size, or faster
    assert errors[0] > errors[1] > errors[2] > 0
    assert errors[0] > 4 * errors[2], errors


def test_opposite_vectors_attract_as_equal_ones():
    q = torch.randn(1, 1, 5, 4, dtype=torch.float64)
    v = torch.randn(1, 1, 5, 3, dtype=torch.float64)
    opposite, equal = (polynomial_attention(q, k, v, 4) for k in (-q, q))
    assert_same_bits(opposite.out, equal.out)
    assert_same_bits(opposite.lse, equal.lse)


@pytest.mark.parametrize("degree", [2, 32])
def test_the_exact_blocks_neither_overflow_nor_lose_rows(degree):
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(1, 2, 20, 8, generator=generator, dtype=torch.float64) * 1e10 for _ in range(2))
    q[:, :, 3] = 0.0
    q[:, :, 4] *= 1e-40
    v = torch.randn(1, 2, 20, 3, generator=generator, dtype=torch.float64)
    near = polynomial_blocks(q, k, v, degree, 7)
    block = torch.arange(20) // 7
    hidden = (block[:, None] != block) | (torch.arange(20) > torch.arange(20)[:, None])
    logs = degree * (q @ k.mT).abs().log().masked_fill(hidden, -torch.inf)
    alive = torch.arange(20) != 3
    # a product may cancel to a hundredth of its terms, and rounding grows by the degree
    for ours, truth in ((near.lse, logs.logsumexp(-1)), (near.out, logs.softmax(-1) @ v)):
        assert_exact(ours[:, :, alive], truth[:, :, alive], size=100.0 * degree)
    assert (near.lse[..., 3] == -torch.inf).all()
    assert not near.out[..., 3, :].any()


def test_positions_are_relative_and_precise_far_out():
    q, k = torch.randn(2, 1, 1, 1, 8, dtype=torch.float64)
    near = (rotate(q, 3, 1e4) * rotate(k, 10, 1e4)).sum()
    assert_exact((rotate(q, 1_000_003, 1e4) * rotate(k, 1_000_010, 1e4)).sum(), near, size=1e6)
    assert_exact(rotate(q.float(), 1_000_003, 1e4), rotate(q, 1_000_003, 1e4).float())
    assert_exact(rotate(q, 5, 1e4).norm(), q.norm())


def test_a_saved_layer_is_the_same_layer():
    for learned in (True, False):
        layer, other = make(learned=learned), make(init=3, learned=learned, seed=7)
        other.load_state_dict(layer.state_dict())
        x = tokens(3 * BLOCK)
        assert_same_bits(other(x), layer(x))


def test_half_precision_and_autocast():
    layer, x = make(dtype=torch.float32), tokens(5 * BLOCK, dtype=torch.float32)
    truth = layer(x)
    half = copy.deepcopy(layer).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        mixed = layer(x)
    for out in (half(x.bfloat16()), mixed, decode(half, x.bfloat16(), [3, 17])[0]):
        assert out.dtype == torch.bfloat16
        # a fourth power of a product rounded to 8 bits, and a norm of it
        assert ((out - truth).norm() / truth.norm()).item() == pytest.approx(0, abs=0.1)


def test_nan_is_not_hidden():
    layer, x, at = make(), tokens(40 * BLOCK), 35 * BLOCK + 1
    x[0, at] = torch.nan
    out = layer(x)
    assert out[0, at:].isnan().all()
    # it may reach back by a block of the kernel
    assert out[0, : at - 2 * plan.BLOCK_KEYS - BLOCK].isfinite().all()
    assert out[1].isfinite().all()


# near-linear


class LargestTensor(TorchDispatchMode):
    """Remember the largest result of any operation."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.numel = max([self.numel, *(x.numel() for x in tree_leaves(result) if isinstance(x, Tensor))])
        return result


def both_passes(
    query: Tensor, key: Tensor, value: Tensor, *, row_limit: Tensor | None = None, is_causal: bool = False, power: int
) -> tuple[Tensor, Tensor]:
    # modes do not look inside an operator, so that its parts are called
    limit = torch.arange(1, query.shape[2] + 1)[None] if row_limit is None else row_limit
    assert is_causal == (row_limit is None)
    scales = query.new_zeros(query.shape[:3]), key.new_zeros(key.shape[:3])
    out, lse = reference.forward(query, key, value, *scales, limit, power)
    reference.backward((out, lse.clamp(min=0)), (query, key, value, *scales, out, lse), limit, power)
    return out, lse


@pytest.mark.parametrize("local", [True, False])
def test_no_tensor_has_all_expanded_features_or_all_pairs(monkeypatch, local):
    monkeypatch.setattr(poly_sketch_attention, "feature_attention", both_passes)
    # a text of several steps, without being long
    monkeypatch.setattr(plan, "STEP_ROWS", 128)
    monkeypatch.setattr(plan, "STEP_NUMBERS", 1 << 16)
    length, size, block = 1024, 32, 64
    layer = PolySketchAttention(16, 1, sketch_size=size, block=block, local=local)
    with LargestTensor() as seen, torch.no_grad():
        layer(tokens(length, 1, torch.float32))
    # what grows with the length: the hidden layers of the learned sketch, 8 times its features
    assert seen.numel <= length * 8 * size < length * size * (size + 1) // 2
    with LargestTensor() as seen, torch.no_grad():
        layer.step(tokens(length, 1, torch.float32))
    assert seen.numel <= length * 3 * 16


# bad input


@pytest.mark.parametrize(("options", "message"), [
    ({"num_heads": 3}, "num_heads=3\\): the heads must divide"), ({"num_heads": 0}, "num_heads=0"),
    ({"degree": 3}, "PolySketchAttention\\(degree=3.*even"), ({"degree": 6, "learned": False}, "power of two"),
    ({"sketch_size": 0}, "sketch_size=0"), ({"block": -1}, "block=-1"),
    ({"num_heads": 16}, "width 1.*rotary_base=None"), ({"rotary_base": 0.0}, "rotary_base=0.0"),
], ids=str)  # fmt: skip
def test_bad_settings_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        PolySketchAttention(**{"embed_dim": 16, "num_heads": 2, **options})


def test_bad_tokens_and_states_are_named():
    layer = make()
    with pytest.raises(ValueError, match=r"x is \(2, 5, 8\): must be \[batch, tokens, embed_dim=16\]"):
        layer(tokens(5, width=8))
    state = layer.step(tokens(3))[1]
    with pytest.raises(ValueError, match="x has 1 texts, and the state 2"):
        layer.step(tokens(3, batch=1), state)


def test_the_guide_runs(capsys):
    page = (Path(__file__).parents[1] / "docs" / "relatives.md").read_text()
    section = page.split("## PolySketchFormer\n")[1].split("\n## ")[0]
    (block,) = re.findall(r"```python\n(.*?)```", section, flags=re.DOTALL)
    exec(compile(block, "relatives.md", "exec"), {})
    difference, size = capsys.readouterr().out.split()
    assert float(difference.removeprefix("tensor(").removesuffix(")")) < 1e-5
    assert int(size) > 0
