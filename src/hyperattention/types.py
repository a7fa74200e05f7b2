"""The values that stages, kernels and audits exchange: small, immutable, with axes in the annotations.

Axes: ``batch heads kv_heads queries keys head_dim value_dim``; a *list* is one batch row of one kv head (or, in a tiling by
hash, of one query head); its queries are cut into ``tiles`` of ``rows`` queries (the heads of a group packed together), and
each tile lists ``slots``. Tensors are laid out ``[batch, heads, tokens, head_dim]``. Scores, log-weights and lse are float32
(float64 for float64 input); lse is a natural logarithm; indices are int64.
"""

from dataclasses import dataclass

from jaxtyping import Float, Int
from torch import Tensor


@dataclass(frozen=True)
class Partial:
    """Attention over some of the keys: enough to be merged with attention over the others.

    Args:
        out: rows normalised over the keys seen; 0 if no key was seen.
        lse: natural log of the sum of weighted exponentials over the keys seen; -inf if no key was seen.
    """

    out: Float[Tensor, "batch heads queries value_dim"]
    lse: Float[Tensor, "batch heads queries"]


@dataclass(frozen=True)
class DrawnSlots:
    """How the slots of a stage were drawn; the standard error is estimated from this.

    Args:
        sizes: number of slots of each independent sample, one sample after another; within a sample, slots are in the order
            of their strata.
        evenly: for each sample, whether its points are evenly spaced; if not, one point is drawn in each stratum.
        listings: for each slot, how often its own sample is expected to list its key; None if that is exp(-log_weight).
    """

    sizes: tuple[int, ...]
    evenly: tuple[bool, ...]
    listings: Float[Tensor, "lists tiles slots"] | None = None


@dataclass(frozen=True)
class Runs:
    """The slots of one stage: runs of `size` consecutive keys, each run with a log-weight.

    Args:
        first: first key of each run; keys outside the tile's `low` to `high` are skipped, so a run may extend beyond both.
        size: keys in each run: 1 for a drawn key, the block size for a block.
        log_weight: 0 for a certain pick, -log(expected times listed) for a drawn key, -inf for an empty slot.
        low: first key that counts for each tile.
        high: end of the keys that count for each tile.
        causal: whether each pair must be tested against the row's limit; without it every row of the tile sees every key.
        hole: first and end of the keys between `low` and `high` that an earlier stage took and that do not count; None for
            no hole.
        labelled: whether pairs of equal label are skipped, because an earlier stage took them by hashing.
        sample: how the slots were drawn, in runs of one key; None if all picks are certain, with log-weights of 0 or -inf.
    """

    first: Int[Tensor, "lists tiles slots"]
    size: int
    log_weight: Float[Tensor, "lists tiles slots"]
    low: Int[Tensor, "lists tiles"]
    high: Int[Tensor, "lists tiles"]
    causal: bool = False
    hole: tuple[Int[Tensor, "lists tiles"], Int[Tensor, "lists tiles"]] | None = None
    labelled: bool = False
    sample: DrawnSlots | None = None


@dataclass(frozen=True)
class Labels:
    """Labels of queries and keys, such as hash buckets: a pair with equal labels was taken by an earlier stage.

    Args:
        query: the label of every query.
        key: the label of every key.
    """

    query: Int[Tensor, "batch heads queries"]
    key: Int[Tensor, "batch kv_heads keys"]


@dataclass(frozen=True)
class Selection:
    """The keys that each tile of queries reads, and their weights: all that a kernel needs besides q, k and v.

    Args:
        runs: the slots of every stage that shares this tiling.
        row_limit: for each row of a tile, how many leading keys it may see; 0 for a padding row.
        key_row: which row of the flattened ``[batch * kv_heads]`` keys each list reads.
        row_label: label of each row, with `key_label`: pairs of equal labels are skipped. None if no stage hashed.
        key_label: label of each key.
        row_gap: first and end of the keys that an earlier stage took from each row, if tiles are not tiles of positions.
    """

    runs: tuple[Runs, ...]
    row_limit: Int[Tensor, "lists tiles rows"]
    key_row: Int[Tensor, " lists"]
    row_label: Int[Tensor, "lists tiles rows"] | None = None
    key_label: Int[Tensor, "lists keys"] | None = None
    row_gap: tuple[Int[Tensor, "lists tiles rows"], Int[Tensor, "lists tiles rows"]] | None = None
