"""The settings of a calibration."""

from dataclasses import dataclass

from hyperattention.methods.base import AttentionMethod
from hyperattention.methods.exact import Exact

_TOLERANCE = 0.05


@dataclass(frozen=True)
class CalibrationSettings:
    """The settings of a calibration: how large errors may be, or how many keys a query may list.

    Args:
        tolerance: the largest allowed mean relative error of a head; 0.05 if neither this nor `pairs` is given.
        pairs: keys that a query may list, in the mean over layers and heads, in place of a tolerance: they are spent where
            they keep the model's predictions best.
        seed: seed of the draws.
        repeats: rounds of interleaved timing of the finished plan; their spread shows how reliable the times are.
        ladder: the candidates, exact attention first; None for `candidates`, or `candidates_by_pairs`.

    Raises:
        ValueError: if the tolerance is not between 0 and 1, the pairs are not positive, both are given, or the ladder does
            not begin with exact attention.
    """

    tolerance: float | None = None
    seed: int = 0
    repeats: int = 5
    ladder: tuple[AttentionMethod, ...] | None = None
    pairs: int | None = None

    def __post_init__(self) -> None:
        if self.tolerance is not None and self.pairs is not None:
            raise ValueError(f"tolerance {self.tolerance} and pairs {self.pairs}: give one, the other follows from it")
        if self.pairs is not None and self.pairs < 1:
            raise ValueError(f"pairs {self.pairs}: give how many keys a query may list on average, such as 800")
        if self.tolerance is None and self.pairs is None:
            object.__setattr__(self, "tolerance", _TOLERANCE)
        if self.tolerance is not None and not 0 < self.tolerance < 1:
            raise ValueError(f"tolerance {self.tolerance}: give a relative error between 0 and 1, such as 0.05")
        if self.ladder is not None and (not self.ladder or not isinstance(self.ladder[0], Exact)):
            raise ValueError(f"ladder {self.ladder}: put Exact() first, for heads that no other method can approximate")
