"""How much a cache may hold."""

from dataclasses import dataclass

# share of the slots between sinks and window that a compression leaves free
_PENDING = 8


@dataclass(frozen=True)
class CacheBudget:
    """How many slots each head of a layer may hold, and which are never given away.

    Args:
        budget: most slots between two steps.
        sinks: first keys, which many heads attend to whatever they look for.
        window: latest keys, kept as they are.

    Raises:
        ValueError: if the budget leaves no slot beside sinks and window, or one of them is negative.
    """

    budget: int
    sinks: int = 16
    window: int = 128

    def __post_init__(self) -> None:
        if self.sinks < 0 or self.window < 1:
            raise ValueError(f"sinks={self.sinks}, window={self.window}: sinks must be at least 0, the window at least 1")
        if self.budget <= self.sinks + self.window:
            raise ValueError(
                f"budget={self.budget} leaves nothing beside {self.sinks} sinks and {self.window} of window: give more than "
                f"{self.sinks + self.window}, or smaller sinks= and window="
            )

    @property
    def pending(self) -> int:
        """Slots left free by a compression, so that not every token pays for one; the latest fill them."""
        return max(1, (self.budget - self.sinks - self.window) // _PENDING)

    @property
    def middle(self) -> int:
        """Slots that are left to what was compressed."""
        return max(1, self.budget - self.sinks - self.window - self.pending)
