"""Structured q, k, v with the statistics of real language models, and the iid Gaussian inputs of the papers.

Reported statistics of real models, with sources, and how the inputs here model them:

- *Norms* near 15, 15 and 3 for q, k and v (Llama-3.1-8B): BalanceKV (arXiv:2502.07861).
- *Narrow cones*: queries share a mean direction, and so do keys (Spotlight Attention's abstract); MagicPIG
  (arXiv:2410.16179) centres its keys before hashing. Here queries and keys each have a constant vector. Our choice: queries
  point away from the keys' mean and towards the sinks.
- *Sinks*: the first tokens get much weight, independent of their content (StreamingLLM, arXiv:2309.17453), with smaller
  values than other tokens (arXiv:2410.13835); small keys get large weights (arXiv:2406.11430). Here four small keys
  opposite to the cone.
- *Local decay*, by rotary pairs: high frequencies carry position, low ones meaning (arXiv:2410.06205). Half the channels
  are pairs rotated at geometric rates, whose cosines add up to a power law in the distance; the others are not rotated.
- *Low-rank keys*: the spectrum of keys decays (Loki, arXiv:2406.02542). Here variances fall along a random basis.
- *Far keys*: our model of text: topics that last, mix and return, words by Zipf's law. A query looks for a word, often the
  same as its neighbours, so that its heavy keys are scattered; a few queries look for one planted key far back, a needle.
- *Keys of lower rank, alike among neighbours*: the kind `LOW_RANK`; its sources are in `synthetic/kinds.py`.
- *Heads from sharp to diffuse* (MagicPIG's abstract: attention is not always as sparse as expected): one number per head.

The amplitudes are ours, those of the default kind `SCATTERED` set so that dropping, drawing and choosing keys give the same
errors as in a trained model; the docstring of `structured` lists the measured statistics.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hyperattention.random import normal
from hyperattention.synthetic.kinds import SCATTERED, HeadKind
from hyperattention.synthetic.parts import (
    GAP,
    GAUSSIAN,
    PERIOD_SIZE,
    RUN_SIZE,
    STRETCH,
    Head,
    Text,
    place_in_span,
    target_period,
)
from hyperattention.synthetic.shape import Shape, given


@dataclass(frozen=True)
class Inputs:
    """Queries, keys and values with planted needles: query `needle_query[t]` looks for key `needle_key[..., t]`.

    Args:
        q: queries.
        k: keys.
        v: values.
        needle_query: positions of the queries that look for a needle, the same in every row and head.
        needle_key: position of the key that each of these queries looks for, more than 1,024 tokens earlier.
    """

    q: Float[Tensor, "batch heads queries head_dim"]
    k: Float[Tensor, "batch kv_heads keys head_dim"]
    v: Float[Tensor, "batch kv_heads keys value_dim"]
    needle_query: Int[Tensor, " needles"]
    needle_key: Int[Tensor, "batch heads needles"]


def _sharpness(sharpness: Sequence[float] | None, heads: int) -> list[float]:
    if sharpness is None:
        return [0.5] if heads == 1 else [h / (heads - 1) for h in range(heads)]
    if len(sharpness) != heads or not all(0 <= s <= 1 for s in sharpness):
        raise ValueError(f"sharpness={list(sharpness)} must be {heads} values in [0, 1], one for each head")
    return list(sharpness)


def _needles(seed: int, batch: int, heads: int, num_tokens: int, device: torch.device) -> tuple[Tensor, Tensor]:
    positions = torch.arange(num_tokens, dtype=torch.int64, device=device)
    place = place_in_span(seed, positions, 1)
    query = positions[(place >= 0) & (place < RUN_SIZE) & (positions // PERIOD_SIZE >= GAP)]
    key = torch.empty(batch, heads, len(query), dtype=torch.int64, device=device)
    for row in range(batch):
        for head in range(heads):
            first = target_period(seed, row, head, query // PERIOD_SIZE) * PERIOD_SIZE
            key[row, head] = first - place_in_span(seed, first, 0) + place[query]
    return query, key


def structured(
    num_tokens: int,
    *,
    batch: int = 1,
    heads: int = 1,
    kv_heads: int | None = None,
    head_dim: int = 64,
    value_dim: int | None = None,
    sharpness: Sequence[float] | None = None,
    kind: HeadKind = SCATTERED,
    seed: int = 0,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Inputs:
    """Make q, k and v like those of language models; on Gaussian inputs errors of methods are too small or too large.

    q = cones + position + word and topic looked for, k = cone + position + word and topic shown, v = mean + word + topic
    Source: the statistics and papers in this module's docstring.   Differs: amplitudes and the model of text are ours.
    Cost: O(tokens * head_dim) time per head.   Guarantee: a shorter text is the beginning of a longer one, bit for bit.

    Measured on `SCATTERED`, 8,192 tokens, head_dim 64, seed 0, causal, rows of the second half, by sharpness (one: 0.5):

    ============================================  =====  =====  =====  =====
    sharpness                                         0   0.43    0.5      1
    ============================================  =====  =====  =====  =====
    norm of q                                      15.0   15.0   15.0   17.7
    cosine of queries to their mean                0.91   0.77   0.73   0.59
    mass on the sinks                              0.20   0.36   0.36   0.37
    mass in the window of 512                      0.39   0.44   0.47   0.51
    effective keys, exp(entropy), median            543     71     55     12
    effective keys beyond sinks and window         2237    869    708    109
    mass of a needle at its query                  0.00   0.20   0.26   0.80
    error when the rest is dropped                 0.40   0.24   0.22   0.17
    error with 512 of it drawn uniformly           0.12   0.15   0.14   0.16
    error with 8 blocks of 64 by mean key          0.28   0.16   0.16   0.12
    error with own top 256 and 256 drawn          0.074  0.034  0.027  0.005
    ============================================  =====  =====  =====  =====

    For all heads: norms of k and v 15.0 and 2.9, cosine of keys to their mean 0.69, of mean query to mean key -0.2 to -0.5.
    At 32,768 tokens one head has 26% of its mass on sinks and 41% in the window, and effective keys go from 20 to 2,900 in
    eight heads; at 131,072 tokens one head has 20%, 33% and 670 effective keys.

    Calibration: mean relative L2 error, sinks and a window of 512 exact, keys drawn or chosen once for 128 queries; over one
    head, over eight heads, and (in brackets) over the four layers of a small trained model, used for calibration: rest
    dropped .23, .23 (.25); hash buckets of 256 .21, .22 (.23); 512 drawn uniformly .14, .13 (.14); 8 blocks of 64 by mean
    key .16, .16 (.13); 4 such and 256 drawn .14, .13 (.12); 16 blocks of 16 and 256 drawn .14, .13 (.12), for 8 queries .12,
    .11 (.09); a query's own top 256 and 256 drawn .03, .03 (.02).

    Args:
        num_tokens: length; the first tokens do not depend on it.
        batch: number of texts.
        heads: number of query heads.
        kv_heads: number of kv heads; equal to `heads` if None.
        head_dim: channels of queries and keys, at least 8; if it is above 64, norms of queries exceed 15.
        value_dim: channels of values; `head_dim` if None.
        sharpness: one number in [0, 1] per query head, from diffuse to sharp; evenly spaced from 0 to 1 if None (0.5 for one
            head).
        kind: what vectors are made of: `SCATTERED`, whose heavy far keys lie apart, or `LOW_RANK`, whose keys are of lower
            rank and alike among neighbours. A claim holds for the kind that it was measured on.
        seed: seed of every draw, in [0, 2**63).
        device: device of the tensors; values are equal on all devices up to rounding.
        dtype: dtype of q, k and v; they are computed in float32.

    Returns:
        the inputs, for attention at scale 1 / sqrt(head_dim), and the positions of the needles.

    Raises:
        ValueError: if a size, the seed or the sharpness is out of range.

    Example:
        >>> structured(2048, heads=4, kv_heads=2).k.shape
        torch.Size([1, 2, 2048, 64])
    """
    shape = Shape(num_tokens, batch, heads, given(kv_heads, heads), head_dim, given(value_dim, head_dim), seed)
    if head_dim < 8:
        raise ValueError(f"head_dim={head_dim} must be >= 8: rotary pairs, two cones and content each need channels")
    wanted = [kind.query_parts(s) for s in _sharpness(sharpness, heads)]
    q, k, v = shape.empty(device, dtype)
    models = [Head.of(seed, h, head_dim, shape.value_dim, kind, q.device) for h in range(shape.kv_heads)]
    for row in range(batch):
        for start in range(0, num_tokens, STRETCH):
            text, stop = Text.at(seed, row, start, head_dim // 4, kind, q.device), min(start + STRETCH, num_tokens)
            drifts = [model.drift(text) for model in models]
            for h, model in enumerate(models):
                k[row, h, start:stop] = model.keys(text, drifts[h])[: stop - start]
                v[row, h, start:stop] = model.values(text)[: stop - start]
            for h, want in enumerate(wanted):
                shared = h * shape.kv_heads // heads
                q[row, h, start:stop] = models[shared].queries(text, drifts[shared], h, want)[: stop - start]
    query, key = _needles(seed, batch, heads, num_tokens, q.device)
    return Inputs(q, k, v, query, key)


def gaussian(
    num_tokens: int,
    *,
    batch: int = 1,
    heads: int = 1,
    kv_heads: int | None = None,
    head_dim: int = 64,
    value_dim: int | None = None,
    seed: int = 0,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Inputs:
    """Make iid standard normal q, k and v, as in many papers: there are no heavy keys to find.

    Source: none needed. Differs from real models in everything that `structured` adds; no needles.
    Cost: O(tokens * head_dim) time per head.

    Args:
        num_tokens: length; the first tokens do not depend on it.
        batch: number of texts.
        heads: number of query heads.
        kv_heads: number of kv heads; equal to `heads` if None.
        head_dim: channels of queries and keys.
        value_dim: channels of values; `head_dim` if None.
        seed: seed of every draw, in [0, 2**63).
        device: device of the tensors.
        dtype: dtype of q, k and v.

    Returns:
        the inputs, with empty lists of needles.

    Example:
        >>> gaussian(100, heads=4, kv_heads=2).k.shape
        torch.Size([1, 2, 100, 64])
    """
    shape = Shape(num_tokens, batch, heads, given(kv_heads, heads), head_dim, given(value_dim, head_dim), seed)
    tensors = shape.empty(device, dtype)
    positions = torch.arange(num_tokens, dtype=torch.int64, device=device)[:, None]
    for which, x in enumerate(tensors):
        channels = torch.arange(x.shape[-1], dtype=torch.int64, device=device)
        for row in range(batch):
            for h in range(x.shape[1]):
                # one stretch at a time, so that the integers of the hash fit in the CPU cache
                for part, at in zip(x[row, h].split(STRETCH), positions.split(STRETCH), strict=True):
                    part.copy_(normal([seed, GAUSSIAN, which, row, h, at, channels], x.device))
    none = torch.empty(batch, heads, 0, dtype=torch.int64, device=device)
    q, k, v = tensors
    return Inputs(q, k, v, none[0, 0], none)
