"""Scatterbrain: exact on its support, unbiased elsewhere, its clamps counted, and what it refuses."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

import dense
import hyperattention as ha
from assertions import assert_exact, assert_same_bits, assert_same_math, assert_unbiased
from front_door import with_audit, with_lse
from hyperattention import rivals, select
from hyperattention.features import PositiveRandom
from hyperattention.methods import low_rank, scatterbrain
from hyperattention.problem import Problem, compact
from hyperattention.remainder import Remainder
from pair_weights import pair_weights, replicas
from problems import problem, tensors

NEAR = ha.Sinks(4), ha.Window(16)
SUPPORTS: dict[str, tuple[ha.Stage, ...]] = {
    "none": (),
    "ranges": NEAR,
    "window alone": (ha.Window(16),),
    "blocks": (*NEAR, ha.TopBlocks(2, block_size=8)),
    "blocks alone": (ha.TopBlocks(3, block_size=8),),
    "buckets": (*NEAR, ha.HashBuckets(12)),
    "buckets first": (ha.HashBuckets(12), ha.TopBlocks(1, block_size=8)),
    "universal set": (*NEAR, select.UniversalSet(9)),
    "anti-diagonals": (*NEAR, rivals.AntiDiagonal(2, 8, stride=4)),
    "verticals and slashes": (*NEAR, rivals.VerticalSlash(6, 1, last=20)),
}
every_support = pytest.mark.parametrize("stages", SUPPORTS.values(), ids=list(SUPPORTS))
# seeds and heads of each expectation, fixed beforehand
SEEDS, HEADS = 6, 32


def mild(num_tokens: int, *, causal: bool = True) -> Problem:
    """Short queries and keys, for which the variance of the features is small."""
    asked = problem(num_tokens, causal=causal, heads=2, kv_heads=1, dtype=torch.float64)
    return replace(asked, q=0.4 * asked.q, k=0.4 * asked.k)


def method_of(stages: tuple[ha.Stage, ...], **options) -> ha.Scatterbrain:
    return ha.Scatterbrain(*stages, **({"num_features": 64, "tile": 16} | options))


def sums(method: ha.Scatterbrain, asked: Problem) -> Tensor:
    """Denominator and numerators relative to the true denominator, a mean for each twelve rows, for every head and seed.

    Means, because a row by itself may vary in few draws, or by a long tail, where a mean of 192 is not yet normal.
    """
    k, v = (x.expand(-1, HEADS, -1, -1) for x in (asked.k, asked.v))
    wide = replace(asked, q=asked.q.repeat(1, HEADS, 1, 1), k=k, v=v)
    _, truth = dense.attention(wide.q, k, v, causal=asked.causal)
    found = []
    for seed in range(SEEDS):
        done = method.attend(replace(wide, seed=seed))
        ratio = (done.lse - truth).exp()
        found.append(of_twelve(torch.cat([ratio[..., None], ratio[..., None] * done.out], -1)[0]).unflatten(0, (HEADS, 2)))
    return torch.cat(found)


def of_twelve(x: Tensor) -> Tensor:
    """Average stretches of twelve rows: ``[heads, queries, width]`` to ``[heads, stretches, width]``."""
    return x.unflatten(1, (-1, 12)).mean(2)


@every_support
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
def test_numerator_and_denominator_are_unbiased(stages, causal):
    asked, method = mild(60, causal=causal), method_of(stages, spread=1.5)
    out, _ = dense.attention(asked.q, asked.k, asked.v, causal=causal)
    truth = of_twelve(torch.cat([torch.ones_like(out[..., :1]), out], -1)[0])
    # exact rows do not vary: their rounding is that of exponentials in float64
    assert_unbiased(sums(method, asked), truth, largest_error=0.1, rounding=1e-10)


@pytest.mark.parametrize("name", ["none", "ranges", "blocks", "buckets"])
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
def test_masked_keys_are_in_no_sum(name, causal):
    asked, live = mild(60, causal=causal), torch.ones(1, 60, dtype=torch.bool)
    live[0, -20:], live[0, 5:9] = False, False
    k, v, rank = compact(asked.k, asked.v, live)
    wide = replace(asked, q=asked.q.repeat(1, HEADS, 1, 1), k=k.expand(-1, HEADS, -1, -1), v=v.expand(-1, HEADS, -1, -1))
    truth = dense.attention(asked.q, asked.k, asked.v, causal=causal, key_mask=live)[1]
    found = torch.cat([method_of(SUPPORTS[name]).attend(replace(wide, rank=rank, seed=seed)).lse for seed in range(SEEDS)])
    ratio = (found.unflatten(1, (HEADS, 2)) - truth[:, None]).exp().flatten(0, 1)
    assert_unbiased(of_twelve(ratio.transpose(0, 1)[..., None].flatten(0, 1)).unflatten(0, (2, -1)).transpose(0, 1), 1.0,
                    largest_error=0.1, rounding=1e-10)  # fmt: skip


@pytest.mark.parametrize("stages", [SUPPORTS["ranges"], SUPPORTS["blocks"]], ids=["ranges", "blocks"])
def test_keys_off_by_one_would_be_found(stages, monkeypatch):
    # planted: the low-rank part reads one key that the support lists as well
    def shifted(*x, first_key: int, **options):
        return found(*x, first_key=max(0, first_key - 1), **options)

    found = low_rank.feature_attention
    monkeypatch.setattr(low_rank, "feature_attention", shifted)
    with pytest.raises(AssertionError, match="standard errors from the truth"):
        assert_unbiased(sums(method_of(stages), mild(60))[..., 0], 1.0, largest_error=0.1, rounding=1e-10)


def test_without_the_subtraction_keys_would_count_twice(monkeypatch):
    def nothing(whole: ha.Partial, part: ha.Partial) -> Remainder:
        return Remainder(whole, torch.zeros_like(whole.lse, dtype=torch.bool))

    monkeypatch.setattr(scatterbrain, "remainder", nothing)
    with pytest.raises(AssertionError, match="standard errors from the truth"):
        assert_unbiased(sums(method_of(SUPPORTS["blocks"]), mild(60))[..., 0], 1.0, largest_error=0.1, rounding=1e-10)


@every_support
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
def test_pairs_of_the_support_are_exact(stages, causal):
    if not stages:
        pytest.skip("there is no support")
    asked = mild(60, causal=causal)
    wide = replace(asked, v=torch.eye(60, dtype=torch.float64).expand(1, 1, -1, -1))
    listed = dense.weights(ha.Method(*stages, tile=16), wide)
    weight = pair_weights(method_of(stages), asked.q, asked.k, is_causal=causal)
    assert (listed > 0).any()
    # the weight of one key in a row of up to 60: logs that differ by less than this are rounding of the row's lse
    assert_exact(weight[listed > 0], torch.ones_like(weight[listed > 0]), size=100.0)
    hidden = dense.visible(60, 60, causal=causal).logical_not().expand_as(weight)
    assert_exact(weight[hidden], torch.zeros_like(weight[hidden]), size=1.0)
    rest = (listed == 0) & ~hidden
    assert (weight[rest] != 1).all()


@every_support
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
def test_the_rest_is_the_product_of_features(stages, causal):
    """The paper's form: phi(Q) phi(K)' + sum over the support of exp - phi . phi, written out."""
    asked, method = mild(50, causal=causal), method_of(stages, centred=False)
    features, (q, k) = PositiveRandom(64), (asked.q, asked.k)
    frequency = features.frequencies(q.shape[3], asked.head_index, seed=asked.seed)
    (phi, a), (psi, b) = (features.map(x, frequency, asked.scale) for x in (q, k))
    low_rank = phi @ psi.transpose(2, 3) * (a[..., None] + b[:, :, None]).exp()
    exact = (q @ k.transpose(2, 3) * asked.scale).exp()
    listed = dense.weights(ha.Method(*stages, tile=16), asked) > 0 if stages else torch.zeros_like(exact, dtype=torch.bool)
    weight = (low_rank + listed * (exact - low_rank)) * dense.visible(50, 50, causal=causal)
    done = method.attend(asked)
    # differences of sums of fifty terms
    assert_exact(done.out, weight @ asked.v / weight.sum(-1, keepdim=True), size=10.0)
    assert_exact(done.lse, weight.sum(-1).log(), size=10.0)


@pytest.mark.parametrize("name", ["ranges", "blocks", "buckets"])
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
def test_gradients_are_those_of_the_forward_pass(name, causal, monkeypatch):
    stages = SUPPORTS[name]
    asked, method = mild(40, causal=causal), method_of(stages, num_features=8, tile=8)
    # with the selection fixed: what stages choose does not follow the perturbed keys
    chosen = ha.Method.selections(ha.Method(*stages, tile=8), asked)
    monkeypatch.setattr(ha.Method, "selections", lambda *_: chosen)
    leaves = [x.detach().clone().requires_grad_() for x in (asked.q, asked.k, asked.v)]

    def run(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        done = method.attend(replace(asked, q=q, k=k, v=v))
        return done.out, done.lse

    # in random directions: one derivative at a time would be two thousand calls
    assert torch.autograd.gradcheck(run, leaves, fast_mode=True)


def test_rows_that_the_support_covers_by_place_need_no_features(monkeypatch):
    def never(*_) -> None:
        raise AssertionError("features of a call without a rest")

    monkeypatch.setattr(PositiveRandom, "map", never)
    method = method_of(NEAR)
    for count, first in ((32, 0), (8, 24), (1, 19), (0, 0)):
        q, k, v = tensors(count, first + count)
        out, lse = with_lse(q, k, v, is_causal=True, causal_align="lower_right", method=method)
        truth, plain = (f(q, k, v, causal=True, align="lower_right") for f in (dense.reference, dense.attention))
        assert_same_math(out, truth[0], plain[0])
        assert_same_math(lse, truth[1], plain[1])
    for count, first in ((37, 0), (1, 40)):
        q, k, v = tensors(count, first + count)
        with pytest.raises(AssertionError, match="without a rest"):
            with_lse(q, k, v, is_causal=True, causal_align="lower_right", method=method)


# rounding


def sharp() -> tuple[Tensor, Tensor, Tensor]:
    """Keys so long that their features say nearly nothing, but for a block of short ones that the support lists."""
    q, k, v = tensors(96)
    q, k = 0.2 * q.abs(), -5 * k.abs()
    k[:, :, 32:40] = 0
    return q, k, v


def test_rows_that_lose_their_rest_are_counted_and_keep_the_support():
    stages = (ha.Sinks(4), ha.Window(16), ha.TopBlocks(2, block_size=8))
    method, (q, k, v) = method_of(stages, centred=False), sharp()
    result = ha.measured_attention(q, k, v, is_causal=True, method=method)
    assert result.clamped is not None
    assert result.clamped.shape == (1, 2)
    assert (result.clamped > 0).any()
    asked = Problem(q, k, v, 8**-0.5, causal=True)
    partial, clamped = method.attend_counted(asked)
    assert_same_bits(clamped, result.clamped)
    assert_same_bits(partial.out, method.attend(asked).out)
    # never below the support's own sum, clamped or not
    alone = ha.Method(*stages, tile=16).attend(asked)
    assert torch.isfinite(partial.out).all()
    assert (partial.lse >= alone.lse - 1e-5).all()
    # in float64 the same rests can be told
    wide = method.attend_counted(replace(asked, q=q.double(), k=k.double(), v=v.double()))[1]
    assert not wide.any()


def test_rows_whose_support_holds_every_key_lose_nothing():
    q, k, v = tensors(31, heads=4)
    method = method_of(SUPPORTS["blocks"])
    out, _ = with_lse(q, k, v, method=method, enable_gqa=True)
    truth, plain = (f(q, k, v)[0] for f in (dense.reference, dense.attention))
    assert_same_math(out, truth, plain)
    asked = Problem(q, k, v, 8**-0.5)
    assert not method.attend_counted(asked)[1].any()


def test_the_report_of_an_audit_says_how_many():
    q, k, v = sharp()
    method = method_of(SUPPORTS["blocks"], centred=False)
    _, report = with_audit(q, k, v, is_causal=True, method=method, audit=16)
    assert report.num_clamped is not None
    assert str(report).endswith(f"; {int(report.num_clamped.sum())} rows lost a part to rounding")
    for other in (ha.Exact(), ha.Method(*NEAR)):
        result = ha.measured_attention(q, k, v, is_causal=True, method=other, audit=16)
        assert result.clamped is None
        assert result.audit is not None
        assert "rounding" not in str(result.audit)


@pytest.mark.parametrize("wrap", [lambda x: ha.ByLayer({0: x}), lambda x: ha.ByHead((x, ha.Exact()))], ids=["layer", "head"])
def test_counts_of_heads_and_layers_are_passed_on(wrap):
    q, k, v = sharp()
    method = method_of(SUPPORTS["blocks"], centred=False)
    alone = ha.measured_attention(q, k, v, is_causal=True, method=method)
    ours = ha.measured_attention(q, k, v, is_causal=True, method=wrap(method))
    assert alone.clamped is not None
    assert ours.clamped is not None
    assert int(ours.clamped[0, 0]) == int(alone.clamped[0, 0]) > 0
    assert int(ours.clamped[0, 1]) == (int(alone.clamped[0, 1]) if isinstance(wrap(method), ha.ByLayer) else 0)
    assert_exact(ours.out[:, :1], alone.out[:, :1])


# what centring is for, and what it reads


def test_centring_cuts_the_error_of_keys_that_share_a_direction():
    q, k, v = tensors(300, dtype=torch.float64)
    q, k = 0.4 * q, 0.4 * k + 2
    truth, _ = dense.attention(q, k, v, causal=True)
    errors = [
        torch.stack([
            (ha.attention(q, k, v, is_causal=True, method=method_of(NEAR, centred=each), seed=s) - truth).norm(dim=-1).mean()
            for s in range(4)
        ]).mean()
        for each in (True, False)
    ]  # fmt: skip
    assert errors[0] < errors[1] / 2


def test_wider_frequencies_cut_the_error_where_norms_are_large_beside_the_width():
    q, k, v = tensors(200, dtype=torch.float64)
    truth, _ = dense.attention(q, k, v, causal=True)

    def error(spread: float) -> Tensor:
        method = method_of(NEAR, num_features=512, spread=spread)
        outs = [ha.attention(q, k, v, is_causal=True, method=method, seed=seed) for seed in range(4)]
        return (torch.stack(outs) - truth).norm(dim=-1).mean()

    assert error(2.5) < error(1.0) / 1.3


@pytest.mark.parametrize("scale", [-0.3, 0.0, 0.3])
def test_any_scale_is_estimated(scale):
    asked = replace(mild(40), scale=scale)
    k, v = replicas(asked.k, asked.v, HEADS)
    found = method_of(NEAR).attend(replace(asked, q=asked.q.repeat(1, HEADS, 1, 1), k=k, v=v)).lse
    truth = dense.attention(asked.q, asked.k, asked.v, causal=True, scale=scale)[1]
    ratio = (found.unflatten(1, (HEADS, 2)) - truth[:, None]).exp()[0]
    assert_unbiased(ratio, 1.0, largest_error=0.1, rounding=1e-10)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_narrow_inputs_are_mapped_in_float32(dtype):
    q, k, v = (0.5 * x for x in tensors(90, heads=4))
    method = method_of(SUPPORTS["blocks"])
    narrow = [x.to(dtype) for x in (q, k, v)]
    out, lse = with_lse(*narrow, is_causal=True, enable_gqa=True, method=method)
    truth, wide = with_lse(*(x.float() for x in narrow), is_causal=True, enable_gqa=True, method=method)
    assert (out.dtype, lse.dtype) == (dtype, torch.float32)
    # the support's rows are rounded to the narrow dtype, as those of every list are
    assert_exact(out, truth, size=1.0)
    assert_exact(lse.to(dtype), wide.to(dtype))


@pytest.mark.parametrize("name", ["none", "ranges", "blocks"])
def test_some_queries_get_the_rows_they_have_among_all(name):
    asked, method = mild(160), method_of(SUPPORTS[name])
    few = asked.of_spans(16, 32, 64)
    whole, ours = method.attend(asked), method.attend(few)
    assert_exact(ours.out, whole.out[:, :, few.position])
    assert_exact(ours.lse, whole.lse[:, :, few.position])


# arguments


@pytest.mark.parametrize(
    "stage", [ha.Draw(8), select.DrawAlike(96), rivals.PriorityDraw(8)], ids=["draw", "alike", "priority"]
)
def test_stages_that_draw_are_refused_with_the_reason(stage):
    with pytest.raises(ValueError, match=r"its draws represent all remaining keys already.*TopBlocks or HashBuckets"):
        ha.Scatterbrain(*NEAR, stage)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_features": 5}, "even number"),
        ({"num_features": 0}, "positive integer"),
        ({"num_features": 4, "spread": 0.5}, "at least 1"),
        ({"num_features": 4, "tile": 0}, "tile must be a positive integer"),
    ],
)
def test_wrong_constants_are_refused(options, message):
    for stages in ((), NEAR):
        with pytest.raises(ValueError, match=message):
            ha.Scatterbrain(*stages, **options)


@pytest.mark.parametrize("name", ["none", "ranges", "blocks", "universal set"])
@pytest.mark.parametrize("where", ["q", "k", "v"])
def test_nan_is_not_hidden_from_a_row_that_sees_it(name, where):
    asked = mild(80)
    getattr(asked, where)[:, :, 50] = torch.nan
    reached = method_of(SUPPORTS[name]).attend(asked).out.isnan().any(-1)
    assert reached[..., 50].all()
    if where == "q":
        assert reached.sum() == reached[..., 50].numel(), "other rows are computed without it"
    else:
        assert reached[..., 50:].all()


def test_what_is_no_stage_is_refused_and_order_matters():
    with pytest.raises(TypeError, match="Exact"):
        ha.Scatterbrain(ha.Exact())
    with pytest.raises(ValueError, match="put Window first"):
        ha.Scatterbrain(ha.TopBlocks(1), ha.Window(8))


def test_what_it_costs_and_how_it_prints():
    method = ha.Scatterbrain(*NEAR, ha.TopBlocks(2, block_size=8), num_features=24, tile=16)
    # 36 + 16 listed, 16 of them again by 24 features and 8 values, and 24 features
    assert method.cost(4096, head_dim=8).pairs == 4 + 32 + 16 + 16 * (24 + 8) / 16 + 24
    assert method.cost(4096).complete
    assert repr(ha.Scatterbrain(ha.Sinks(2), num_features=8)) == "Scatterbrain(Sinks(num=2), num_features=8)"
    assert repr(ha.Scatterbrain(spread=2.0, centred=False, tile=8)) == (
        "Scatterbrain(num_features=256, spread=2.0, centred=False, tile=8)"
    )
    assert method.looks_ahead == ha.LookAhead.TILE
    assert ha.Scatterbrain().looks_ahead == ha.LookAhead.NOTHING


def test_a_model_runs_it():
    transformers = pytest.importorskip("transformers")
    assert transformers
    from hyperattention.integrations.transformers import use
    from tiny_models import FULL, NUM_LAYERS, assert_exact, build, tokens

    model = build("Llama", {})
    with torch.no_grad():
        with use(model, FULL):
            exact = model(tokens(), use_cache=False).logits
        with use(model, ha.Scatterbrain(*NEAR, num_features=64, tile=16)) as counter:
            ours = model(tokens(), use_cache=False).logits
        assert counter.counts.approximated == NUM_LAYERS
        assert not torch.equal(ours, exact)
        # a support that holds every key
        with use(model, ha.Scatterbrain(ha.Sinks(4), ha.Window(4096), num_features=64)):
            assert_exact(model(tokens(), use_cache=False).logits, exact)
