"""The low-rank part of a method: queries and keys as features, over ranges of keys or over lists."""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hyperattention.features.positive_random import PositiveRandom
from hyperattention.kernels.feature.operator import feature_attention
from hyperattention.kernels.listed_features.operator import listed_features
from hyperattention.merge import merge
from hyperattention.methods.rest import Rest
from hyperattention.problem import Problem
from hyperattention.select.stage import Tiling
from hyperattention.types import Partial, Selection


@dataclass(frozen=True)
class LowRank:
    """A problem whose queries and keys are mapped to features, with a log scale of each.

    Args:
        problem: the problem.
        query: features of the queries.
        key: features of the keys.
        value: values, in the dtype of the features.
        query_log_scale: log scale of each query, which the results of `attend` and `attend_listed` leave out.
        key_log_scale: log scale of each key.
    """

    problem: Problem
    query: Float[Tensor, "batch heads queries features"]
    key: Float[Tensor, "batch kv_heads keys features"]
    value: Float[Tensor, "batch kv_heads keys value_dim"]
    query_log_scale: Float[Tensor, "batch heads queries"]
    key_log_scale: Float[Tensor, "batch kv_heads keys"]

    @classmethod
    def of(cls, problem: Problem, features: PositiveRandom, centring: Int[Tensor, "batch 1"]) -> "LowRank":
        """Map the tokens.

        Args:
            problem: the problem.
            features: the feature map.
            centring: number of leading keys whose mean is at 0 afterwards; 0 for none.

        Returns:
            the problem with features.
        """
        wide = torch.promote_types(problem.q.dtype, torch.float32)
        q, k, v = (x.to(wide) for x in (problem.q, problem.k, problem.v))
        q = q if problem.scale >= 0 else -q
        scale = abs(problem.scale)
        leading = torch.arange(k.shape[2], dtype=torch.int64, device=k.device) < centring
        total = k.masked_fill(~leading[:, None, :, None], 0.0).sum(2, keepdim=True)
        centre = total / centring.clamp(min=1)[:, :, None, None]
        frequency = features.frequencies(k.shape[3], problem.head_index, seed=problem.seed, layer=problem.layer)
        query, query_log_scale = features.map(q, frequency, scale)
        # exp(q . k) = exp(q . (k - c)) exp(q . c)
        shift = (q.unflatten(1, (k.shape[1], -1)) * centre[:, :, None]).sum(-1).flatten(1, 2) * scale
        key, key_log_scale = features.map(k - centre, frequency, scale)
        return cls(problem, query, key, v, query_log_scale + shift, key_log_scale)

    def attend(self, rest: Rest) -> Partial:
        """Attend to the keys of the rest.

        Args:
            rest: ranges of keys.

        Returns:
            rows, and lse without the log scales of the queries.
        """
        causal = self.problem.causal
        first = Partial(
            *feature_attention(
                self.query,
                self.key,
                self.value,
                key_log_scale=self.key_log_scale,
                # declared sight needs no limits, which only the PyTorch kernel reads
                row_limit=None if rest.plain else rest.before,
                is_causal=rest.plain and causal,
                first_query=self.problem.offset if rest.plain and causal else 0,
                first_key=rest.begin,
            )
        )
        if rest.after is None:
            return first
        number = torch.arange(self.key.shape[2], dtype=torch.int64, device=self.key.device)
        scale = self.key_log_scale.masked_fill((number >= rest.total)[:, None], -torch.inf)
        # in reverse order the last keys are leading keys
        key, value, scale = (x.flip(2) for x in (self.key, self.value, scale))
        last = feature_attention(self.query, key, value, key_log_scale=scale, row_limit=self.key.shape[2] - rest.after)
        return merge([first, Partial(*last)])

    def attend_listed(self, selected: tuple[tuple[Tiling, Selection], ...]) -> Partial:
        """Attend to listed keys by their features.

        Args:
            selected: every tiling, and its lists.

        Returns:
            rows, and lse without the log scales of the queries.
        """
        key, value, scale = (x.flatten(0, 1) for x in (self.key, self.value, self.key_log_scale))
        return _over_lists(self.query, key, value, scale, selected)


def _over_lists(
    query: Tensor, key: Tensor, value: Tensor, scale: Tensor, selected: tuple[tuple[Tiling, Selection], ...]
) -> Partial:
    partials = []
    for tiling, selection in selected:
        out, lse = listed_features(tiling.arrange(query), key, value, scale, selection)
        partials.append(Partial(tiling.restore(out), tiling.restore(lse)))
    return merge(partials)


def count_listed(problem: Problem, selected: tuple[tuple[Tiling, Selection], ...]) -> Float[Tensor, "batch heads queries"]:
    """Count the keys that lists hold for every row: attention with equal weights tells their log.

    Args:
        problem: the problem.
        selected: every tiling, and its lists.

    Returns:
        the counts, whole numbers.
    """
    query, key = (x.detach()[..., :1].float().mul(0).nan_to_num() + 1 for x in (problem.q, problem.k))
    key = key.flatten(0, 1)
    return _over_lists(query, key, key, torch.zeros_like(key[..., 0]), selected).lse.exp().round()
