"""Row sums of exp(Q K'), estimated by one sample of keys: the normalisers of HyperAttention's analysis."""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from hyperattention.check import instance, positive
from hyperattention.kernels.list.operator import list_attention
from hyperattention.problem import Problem
from hyperattention.random import hash_bits
from hyperattention.select.locate.hash_buckets import HashBuckets
from hyperattention.select.stage import CoveredKeys
from hyperattention.tiling import cut
from hyperattention.types import Labels

# scores of one chunk of rows
SCORE_BYTES = 16 * 2**20


@dataclass(frozen=True)
class ApproxD:
    """Estimate the row sums of exp(q.k * scale) from a heavy mask and one sample of keys shared by all rows.

    heavy_i = sum_j M_ij e^{s_ij},   tau = max over m random rows of sum_j (1 - M_ij) e^{s_ij},
    cap_i = cap_constant * epsilon^2 m / (n log n) * (heavy_i + tau / kappa),
    d_i = max(heavy_i + n/m * sum over the sample of (1 - M_ij) min(e^{s_ij}, cap_i),   tau / kappa)
    Source: Han et al., 2023 (arXiv:2310.05869), Alg. 2.   Differs: the paper's Theta(.) is `cap_constant`; sums are kept as
    logs, so that no exponential overflows; no causal mask (Alg. 4 halves the sequence instead).
    Cost: O((queries + keys) * num_samples) products and the heavy entries.   Guarantee: if the cap never applies, d is
    unbiased above its floor; error O(num_samples^-1/2), given bounded alpha and kappa.

    Args:
        num_samples: m, number of sampled keys, and of rows read for tau.
        kappa: bound on the ratio of largest to smallest unmasked row sum, at least 1.
        epsilon: target relative error, in (0, 1).
        cap_constant: factor of the cap; infinity for no cap.
        heavy: the mask: pairs with equal bucket are summed exactly. None for no mask.

    Raises:
        ValueError: if a constant is outside its range.
        TypeError: if `heavy` is no `HashBuckets`.
    """

    num_samples: int
    kappa: float = 1.5
    epsilon: float = 0.1
    cap_constant: float = 64.0
    heavy: HashBuckets | None = None

    def __post_init__(self) -> None:
        """Check the constants."""
        positive("ApproxD", num_samples=self.num_samples)
        if self.heavy is not None:
            instance("ApproxD", HashBuckets, "HashBuckets(64)", heavy=self.heavy)
        if not self.kappa >= 1 or math.isinf(self.kappa):
            raise ValueError(f"ApproxD(kappa={self.kappa!r}): kappa must be finite and at least 1")
        if not 0 < self.epsilon < 1:
            raise ValueError(f"ApproxD(epsilon={self.epsilon!r}): the target relative error must be in (0, 1)")
        if not self.cap_constant > 0:
            raise ValueError(f"ApproxD(cap_constant={self.cap_constant!r}): it must be positive; math.inf turns the cap off")

    def __call__(
        self,
        q: Float[Tensor, "batch heads queries head_dim"],
        k: Float[Tensor, "batch kv_heads keys head_dim"],
        *,
        scale: float,
        seed: int = 0,
        layer: int = 0,
    ) -> Float[Tensor, "batch heads queries"]:
        """Estimate row sums, which may overflow although `log_row_sums` does not.

        Args:
            q: queries.
            k: keys.
            scale: factor of the scores.
            seed: seed of the sample and of the hash.
            layer: layer of the model, so that layers draw independently.

        Returns:
            the estimated row sums.
        """
        return self.log_row_sums(q, k, scale=scale, seed=seed, layer=layer).exp()

    def log_row_sums(
        self,
        q: Float[Tensor, "batch heads queries head_dim"],
        k: Float[Tensor, "batch kv_heads keys head_dim"],
        *,
        scale: float,
        seed: int = 0,
        layer: int = 0,
    ) -> Float[Tensor, "batch heads queries"]:
        """Estimate the natural logs of row sums.

        Args:
            q: queries.
            k: keys.
            scale: factor of the scores.
            seed: seed of the sample and of the hash.
            layer: layer of the model, so that layers draw independently.

        Returns:
            the logs; -inf if there are no keys.
        """
        q, k = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in (q, k))
        (num_queries, num_keys), kv_heads, device = (q.shape[2], k.shape[2]), k.shape[1], q.device
        if not num_queries or not num_keys:
            return q.new_full(q.shape[:3], -torch.inf)
        problem = Problem(q, k, k[..., :1], scale, seed=seed, layer=layer)
        heavy, labels = self._heavy(problem)
        group = problem.group
        draw = torch.arange(self.num_samples, dtype=torch.int64, device=device)
        head = torch.arange(kv_heads, dtype=torch.int64, device=device)[:, None]
        keys = hash_bits((seed, layer, head, draw, 2), device) % num_keys  # [kv_heads, samples]
        rows = hash_bits((seed, layer, head, draw, 3), device) % num_queries
        query_label, key_label = labels or (None, None)
        rows = rows.repeat_interleave(group, 0)
        looked = q.gather(2, rows[None, :, :, None].expand(q.shape[0], -1, -1, q.shape[3]))
        row_label = None if query_label is None else query_label.gather(2, rows.expand(q.shape[0], -1, -1))
        everything = _log_sums(looked, k, scale, row_label, key_label)
        log_floor = everything.amax(-1, keepdim=True) - math.log(self.kappa)  # [batch, heads, 1]
        ratio = self.cap_constant * self.epsilon**2 * self.num_samples / (num_keys * math.log(max(2, num_keys)))
        log_cap = torch.logaddexp(heavy, log_floor) + math.log(ratio)
        index = keys.expand(k.shape[0], -1, -1)
        sampled = k.gather(2, index[..., None].expand(*index.shape, k.shape[3]))
        sample_label = None if key_label is None else key_label.gather(2, index)
        rest = _log_sums(q, sampled, scale, query_label, sample_label, log_cap)
        total = torch.logaddexp(heavy, rest + math.log(num_keys / self.num_samples))
        return torch.maximum(total, log_floor)

    def _heavy(self, problem: Problem) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
        """Return log sums over masked pairs, and the labels whose equality defines the mask."""
        q, k = problem.q, problem.k
        if self.heavy is None:
            return q.new_full(q.shape[:3], -torch.inf), None
        with torch.no_grad():
            ((tiling, selection),), taken = self.heavy.select_apart(cut(problem, problem.num_queries), CoveredKeys())
        labels: Labels | None = taken.labels
        assert labels is not None
        flat_k, flat_v = k.flatten(0, 1), problem.v.flatten(0, 1)
        _, lse = list_attention(tiling.arrange(q), flat_k, flat_v, selection, problem.scale)
        return tiling.restore(lse), (labels.query, labels.key)


def _log_sums(
    q: Tensor, k: Tensor, scale: float, row_label: Tensor | None, key_label: Tensor | None, log_cap: Tensor | None = None
) -> Tensor:
    """Return the log of each row's sum of (capped) exponentials over keys with another label, in chunks of rows."""
    kv_heads = k.shape[1]
    q = q.unflatten(1, (kv_heads, -1)) * scale
    step = max(1, SCORE_BYTES // (4 * k.shape[2] * q.shape[0] * q.shape[1] * q.shape[2]))
    sums = []
    for at in range(0, q.shape[3], step):
        part = slice(at, at + step)
        scores = q[:, :, :, part] @ k[:, :, None].transpose(3, 4)  # [batch, kv_heads, group, rows, keys]
        if log_cap is not None:
            scores = torch.minimum(scores, log_cap.unflatten(1, (kv_heads, -1))[:, :, :, part, None])
        if row_label is not None and key_label is not None:
            same = row_label.unflatten(1, (kv_heads, -1))[:, :, :, part, None] == key_label[:, :, None, None]
            scores = scores.masked_fill(same, -torch.inf)
        sums.append(scores.logsumexp(-1))
    return torch.cat(sums, 3).flatten(1, 2)
