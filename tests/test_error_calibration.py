"""What standard errors promise, over seeds: as large as the errors are, and blind to what was not drawn."""

import pytest
import torch
from torch import Tensor

import dense
import hyperattention as ha
from cases import DESCENT, MIXTURE
from front_door import with_error
from hyperattention import select
from hyperattention.error.audit import audit
from hyperattention.select.density import Density
from pair_weights import replicas
from problems import tensors

# stated in the docstring of `attention`
MULTIPLE, COVER = 2.0, (0.90, 0.99)
# mean square error over the mean square of the standard errors. It is 1 on average over inputs; of one input it is not
# quite: each tile's points are one systematic sample, whose variance depends on which keys happen to be neighbours
MEAN_SQUARE = (0.85, 1.15)
# where strata hold one key or two, it depends as well on where their edges cut keys
MEAN_SQUARE_OF_FEW = (0.75, 1.3)
REPLICAS = 200


def z_scores(method: ha.Method, sharpness: float, *, tokens: int, value_dim: int, causal: bool) -> tuple[Tensor, Tensor]:
    """Errors and standard errors ``[replicas, rows]`` of the rows that draw: each replica of a kv head draws for itself."""
    q, k, v = tensors(tokens, heads=2, kv_heads=1, value_dim=value_dim)
    q = sharpness * q
    many, keys = replicas(q, k, REPLICAS)
    out, error = with_error(many, keys, v.repeat(1, REPLICAS, 1, 1), is_causal=causal, enable_gqa=True, method=method)
    truth = dense.reference(q, k, v, causal=causal)[0].repeat(1, REPLICAS, 1, 1)
    off = (out - truth).norm(dim=-1)[0].unflatten(0, (REPLICAS, 2)).flatten(1)
    error = error[0].double().unflatten(0, (REPLICAS, 2)).flatten(1)
    drawn = (error > 0).any(0)
    assert drawn.double().mean() > 0.3
    return off[:, drawn], error[:, drawn]


def _after_window(density: Density) -> ha.Method:
    return ha.Method(ha.Sinks(4), ha.Window(16), ha.Draw(64, by=density), tile=16)


SPARSE = {
    "uniform": _after_window(ha.Uniform()),
    "descent": _after_window(DESCENT),
    "scan": _after_window(ha.KeyScan(8)),
    "block score": _after_window(select.BlockScore(8)),
    "value norm": _after_window(select.ValueNorm()),
    "mixture": _after_window(MIXTURE),
    "after blocks": ha.Method(ha.Window(16), ha.TopBlocks(4, block_size=8), ha.Draw(64), tile=16),
    "after a hash": ha.Method(ha.HashBuckets(16), ha.Draw(64), tile=16),
}
each_method = pytest.mark.parametrize("method", SPARSE.values(), ids=SPARSE)
# scores of a standard deviation of 0.7, and of 1.4: the largest weights are ten, and a hundred, times the median
each_sharpness = pytest.mark.parametrize("sharpness", [0.25, 0.5], ids=["diffuse", "sharper"])


@each_method
@each_sharpness
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
def test_twice_the_standard_error_holds_as_often_as_stated(method, sharpness, causal):
    off, error = z_scores(method, sharpness, tokens=400, value_dim=1, causal=causal)
    cover = (off <= MULTIPLE * error).double().mean().item()
    assert COVER[0] <= cover <= COVER[1], f"{MULTIPLE} standard errors hold in {cover:.1%} of rows"


@each_method
@each_sharpness
def test_the_mean_square_is_that_of_the_errors(method, sharpness):
    off, error = z_scores(method, sharpness, tokens=400, value_dim=8, causal=True)
    ratio = (off.square().mean() / error.square().mean()).item()
    assert MEAN_SQUARE[0] <= ratio <= MEAN_SQUARE[1], f"the errors' mean square is {ratio:.3g} of what is stated"
    assert (off <= MULTIPLE * error).double().mean() >= COVER[0]


@pytest.mark.parametrize("tokens", [72, 96])
@pytest.mark.parametrize(
    "density",
    [ha.Uniform(), DESCENT, select.BlockScore(4), select.ValueNorm(), MIXTURE],
    ids=["uniform", "descent", "block score", "value norm", "mixture"],
)
def test_where_most_keys_are_drawn_little_is_left(tokens, density):
    off, error = z_scores(ha.Method(ha.Draw(64, by=density), tile=16), 0.25, tokens=tokens, value_dim=8, causal=False)
    ratio = (off.square().mean() / error.square().mean()).item()
    assert MEAN_SQUARE_OF_FEW[0] <= ratio <= MEAN_SQUARE_OF_FEW[1], (
        f"the errors' mean square is {ratio:.3g} of what is stated"
    )


def test_a_heavy_key_that_no_draw_hit_is_seen_by_an_audit_alone():
    generator = torch.Generator().manual_seed(0)
    q, k, v = (0.1 * torch.randn(1, 1, 512, 8, generator=generator) for _ in range(3))
    q[..., 0], v[..., 1] = 3.0, 1.0
    # every query looks for one key, in vain if it is not drawn: the default window and sinks would not hold it either
    k[:, :, 300, 0], v[:, :, 300] = 30.0, torch.tensor([9.0] + 7 * [0.0])
    method = ha.Method(ha.Draw(16), tile=512)
    out, error = with_error(q, k, v, method=method)
    assert out[..., 0].abs().max() < 1, "a draw hit the key: take another seed"
    truth = dense.reference(q, k, v)[0]
    assert ((out - truth).norm(dim=-1) / truth.norm(dim=-1)).min() > 0.9
    assert (error / out.norm(dim=-1)).max() < 0.2
    report = audit(q, k, v, out)
    assert report.relative_error.item() > 0.9
    assert report.interval[0].item() > 0.9
