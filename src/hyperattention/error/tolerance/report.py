"""The report of a call with a tolerance: its cost and its guarantee."""

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from hyperattention.methods.base import AttentionMethod
from hyperattention.methods.exact import Exact


@dataclass(frozen=True)
class ToleranceReport:
    """The method that ran for each head of one call, and the bound of the head's mean relative row error.

    Limits of the bounds:

    - They hold for the rows of this output, all heads together. They do not hold for outputs of other seeds.
    - Each row counts with min(error, 1), where 1 means a completely wrong row. The part of an error above 1 is estimated
      from the rows drawn (`excess`) and not bounded: a few rows with very large errors may not be among the rows drawn.
    - Which rows are drawn depends only on layer, seed, attempt and batch entry. Over many calls vary `seed`: with one seed
      the calls draw the same rows, and their failures are not independent.
    - A mean over rows does not bound a single row. A query that needs one key can miss it although the mean is small.

    Args:
        tolerance: the mean relative row error allowed for each query head.
        confidence: probability that no head's mean of min(error, 1) exceeds its bound.
        methods: the method of each kv head: a rung for all batch entries and query heads that share it, or `Exact()`.
        bound: upper bound of the mean over rows of ||out_i - exact_i|| / ||exact_i||, at most `tolerance`; 0 if exact
            attention ran.
        excess: the part of `bound` that is the mean of max(error - 1, 0) over the rows drawn; it is estimated, not bounded.
        share_of_pairs: pairs scored relative to exact attention's, over all heads: rungs (failed ones included), the choice
            of keys, pilot tiles and exact rows.
        num_rows: rows of each kv head's last certificate; 0 if there was none.
        note: why exact attention ran for all heads and no rung was tried; empty if a rung was tried.
    """

    tolerance: float
    confidence: float
    methods: tuple[AttentionMethod, ...]
    bound: Float[Tensor, "batch heads"]
    excess: Float[Tensor, "batch heads"]
    share_of_pairs: float
    num_rows: tuple[int, ...]
    note: str = ""

    @property
    def exact_heads(self) -> tuple[int, ...]:
        """Return the kv heads for which exact attention ran."""
        return tuple(head for head, method in enumerate(self.methods) if isinstance(method, Exact))

    def __str__(self) -> str:
        """Print the guarantee and the cost, in a few lines."""
        exact, count = self.exact_heads, len(self.methods)
        spent = f"{self.share_of_pairs:.3g} of exact's pairs"
        if len(exact) == count:
            came = "came" if any(self.num_rows) else "was expected to come"
            why = f": {self.note}" if self.note else f", as no rung {came} within {self.tolerance:g}"
            return f"exact attention ran for all heads{why}; {spent}"
        worst = float(self.bound.max())
        text = (
            f"mean relative error of every head <= {worst:.2g}, within {self.tolerance:g} "
            f"({self.confidence:.0%} confidence); up to {max(self.num_rows)} rows a head, {spent}"
        )
        excess = float(self.excess.max())
        if excess > 0:
            text += f"\nup to {excess:.2g} of it is the excess of rows that err by more than 1: estimated, not bounded"
        if exact:
            text += f"\nran exactly: kv heads {', '.join(map(str, exact))} of {count}"
        return text
