"""Transforms of torch: right under exact attention, refused by name under everything that lists keys, dropped by nothing."""

from collections.abc import Callable, Iterator

import jaxtyping
import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

import hyperattention as ha
from assertions import assert_exact
from cases import CONTROL
from front_door import with_lse
from hyperattention import policies
from hyperattention.coreset import Coreset
from hyperattention.kernels.feature.operator import feature_attention
from hyperattention.methods.oracle import TopKeys
from hyperattention.policies.latest import Latest
from problems import tensors

Q, K, V = tensors(60)
PAGES = [x[0].unflatten(1, (-1, 10)).transpose(0, 1) for x in (K, V)]
PAGED = torch.arange(6)[None], torch.tensor([0, 60]), torch.tensor([60])
EDGES = torch.tensor([0, 25, 60])


@pytest.fixture(autouse=True)
def without_shape_checks() -> Iterator[None]:
    """Run as a user does: the checks of annotations read no tensors that a transform has wrapped."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


def attend(q: Tensor, method=CONTROL, **options) -> Tensor:
    return ha.attention(q, K, V, is_causal=True, method=method, **options)


def stored(q: Tensor) -> Tensor:
    from hyperattention.cache.budget import CacheBudget
    from hyperattention.cache.compressing import CompressingStore

    store = CompressingStore(Latest(), CacheBudget(40, sinks=3, window=12))
    store.append(K, V)
    return store.attend(q, 0.3).out


def paged_by_rank(q: Tensor) -> Tensor:
    from hyperattention.cache.budget import CacheBudget

    store = policies.TopPages(page=2, most_queries=99).store(CacheBudget(40, sinks=3, window=12), 0, 0, None)
    store.append(K, V)
    return store.attend(q, 0.3).out


CALLS: dict[str, Callable[[Tensor], Tensor]] = {
    "a method": attend,
    "top keys": lambda q: attend(q, TopKeys(8)),
    "the published method": lambda q: attend(q, ha.HyperAttention(block_size=8, sample_size=8, min_seq_len=16)),
    "a method for each head": lambda q: attend(q, ha.ByHead((CONTROL, ha.Exact()))),
    "a standard error": lambda q: ha.measured_attention(q, K, V, is_causal=True, method=CONTROL, standard_error=True).out,
    "an audit": lambda q: ha.measured_attention(q, K, V, is_causal=True, method=ha.Exact(), audit=4).out,
    "a tolerance": lambda q: attend(q, None, tolerance=0.2),
    "packed sequences": lambda q: ha.varlen_attention(q, K, V, EDGES, is_causal=True, method=CONTROL),
    "pages": lambda q: ha.paged_attention(q[0].transpose(0, 1), *PAGES, *PAGED, method=CONTROL),
    "pages, exactly": lambda q: ha.paged_attention(q[0].transpose(0, 1), *PAGES, *PAGED, method=ha.Exact()),
    "a coreset": lambda q: Coreset.of(K, V).attend(q).out,
    "a cache": stored,
    "a cache by pages": paged_by_rank,
    "features": lambda q: feature_attention(q.exp(), K.exp(), V)[0],
}
each_call = pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)


def in_a_dual_level(call: Callable[[Tensor], Tensor]) -> Tensor | None:
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(call(forward_ad.make_dual(Q, torch.ones_like(Q)))).tangent


def mapped(call: Callable[[Tensor], Tensor]) -> Tensor:
    return torch.func.vmap(call)(torch.stack([Q, 2 * Q]))


TRANSFORMS: dict[str, tuple[Callable, str]] = {
    "jvp": (lambda call: torch.func.jvp(call, (Q,), (Q,)), r"torch\.func\.jvp.*torch\.autograd\.grad"),
    "forward_ad": (in_a_dual_level, r"torch\.autograd\.forward_ad.*torch\.autograd\.grad"),
    "grad": (lambda call: torch.func.grad(lambda q: call(q).sum())(Q), r"torch\.func\.grad.*torch\.autograd\.grad"),
    "vmap": (mapped, r"torch\.func\.vmap.*batch axis"),
    "vmap of jvp": (lambda call: mapped(lambda q: torch.func.jvp(call, (q,), (q,))[1]), r"torch\.func\."),
    "a jvp around another's": (
        lambda call: torch.func.jvp(lambda q: torch.func.jvp(lambda x: call(q).sum() + x.sum(), (Q,), (Q,))[0], (Q,), (Q,)),
        r"torch\.func",
    ),
    "jvp of vmap": (lambda call: torch.func.jvp(torch.func.vmap(call), (Q[None],), (Q[None],)), r"torch\.func\.vmap"),
}


@each_call
@pytest.mark.parametrize(("transform", "message"), TRANSFORMS.values(), ids=TRANSFORMS)
def test_what_has_no_rule_is_refused_by_name(call: Callable[[Tensor], Tensor], transform: Callable, message: str) -> None:
    assert call(Q).isfinite().all()
    with pytest.raises(NotImplementedError, match=message):
        transform(call)


@pytest.mark.parametrize("where", [1, 2], ids=["key", "value"])
@pytest.mark.parametrize("transform", ["jvp", "vmap"])
def test_keys_and_values_are_looked_at_as_well(where: int, transform: str) -> None:
    def call(x: Tensor) -> Tensor:
        inputs = [Q, K, V]
        inputs[where] = x
        return ha.attention(*inputs, method=CONTROL)

    with pytest.raises(NotImplementedError, match="torch.func"):
        TRANSFORMS[transform][0](call)


def test_tensors_that_a_transform_leaves_alone_are_attended_to() -> None:
    plain = attend(Q)
    assert_exact(torch.func.vmap(lambda x: attend(Q) + x)(torch.zeros(2))[1], plain)
    assert torch.func.grad(lambda x: (attend(Q) * x).sum())(torch.tensor(1.0)).isfinite()


@pytest.mark.parametrize("name", ["a method", "a coreset", "features", "top keys", "the published method"])
def test_second_derivatives_and_batches_of_gradients_are_refused(name: str) -> None:
    q = Q.clone().requires_grad_()
    out = CALLS[name](q)
    (gradient,) = torch.autograd.grad(out.square().sum(), q, create_graph=True)
    with pytest.raises(NotImplementedError, match="no second derivatives: leave create_graph out"):
        torch.autograd.grad(gradient.square().sum(), q)
    out = CALLS[name](q)
    with pytest.raises(NotImplementedError, match="is_grads_batched"):
        torch.autograd.grad(out, q, torch.ones(2, *out.shape), is_grads_batched=True)


def test_exact_attention_with_lse_follows_transforms() -> None:
    def call(q: Tensor) -> Tensor:
        return with_lse(q, K.double(), V.double(), method=ha.Exact())[0]

    q, step = Q.double(), 1e-6
    along = torch.ones_like(q)
    slope = (call(q + step * along) - call(q - step * along)) / (2 * step)
    assert_exact(torch.func.jvp(call, (q,), (along,))[1].float(), slope.float(), size=1.0)
    leaf = q.clone().requires_grad_()
    (expected,) = torch.autograd.grad(call(leaf).square().sum(), leaf)
    assert_exact(torch.func.grad(lambda x: call(x).square().sum())(q), expected)
    assert_exact(torch.func.vmap(call)(torch.stack([q, 2 * q]))[1], call(2 * q))
    assert torch.autograd.gradgradcheck(lambda x: with_lse(x, x, x, method=ha.Exact()), leaf[:, :1, :3, :2])


SCALED = {
    "attention": lambda scale: attend(Q, scale=scale),
    "exactly": lambda scale: attend(Q, ha.Exact(), scale=scale),
    "packed": lambda scale: ha.varlen_attention(Q, K, V, EDGES, scale=scale),
    "pages": lambda scale: ha.paged_attention(Q[0].transpose(0, 1), *PAGES, *PAGED, scale=scale),
    "coreset": lambda scale: Coreset.of(K, V).attend(Q, scale=scale).out,
}


@pytest.mark.parametrize("call", SCALED.values(), ids=SCALED)
def test_a_scale_that_would_be_learned_is_refused(call: Callable[[Tensor], Tensor]) -> None:
    with pytest.raises(ValueError, match=r"scale is a tensor of shape \(\).*multiply query by it, and pass scale=1.0"):
        call(torch.tensor(0.3, requires_grad=True))
    with pytest.raises(ValueError, match="multiply query by it"):
        torch.func.grad(lambda x: call(x).sum())(torch.tensor(0.3))
    assert_exact(call(torch.tensor(0.25)), call(0.25))


def test_exact_attention_in_chunks_follows_torch_func_grad(monkeypatch: pytest.MonkeyPatch) -> None:
    # so small a chunk that a backward pass would compute its weights again
    monkeypatch.setattr("hyperattention.exact._CHUNK_SCORES", 4096)
    q, k, v = tensors(200, dtype=torch.float64)
    bias = torch.zeros(200, 200, dtype=torch.float64).tril()

    def total(q: Tensor) -> Tensor:
        return ha.attention(q, k, v, attn_mask=bias, method=ha.Exact()).square().sum()

    q.requires_grad_()
    (expected,) = torch.autograd.grad(total(q), q)
    assert_exact(torch.func.grad(total)(q.detach()), expected)
