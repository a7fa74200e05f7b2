"""The budget of a cache: how many slots it may hold."""

from dataclasses import dataclass

# share of the slots between sinks and window that a compression leaves free
_PENDING = 8


@dataclass(frozen=True)
class CacheBudget:
    """The number of slots that each head of a layer may hold, and the slots that are never evicted.

    Args:
        budget: most slots between two steps.
        sinks: number of attention sinks: first keys, which many heads attend to at every query.
        window: number of latest keys, which are kept unchanged.

    Raises:
        ValueError: if the budget leaves no slot besides sinks and window, or one of them is negative.
    """

    budget: int
    sinks: int = 16
    window: int = 128

    def __post_init__(self) -> None:
        if self.sinks < 0 or self.window < 1:
            raise ValueError(f"sinks={self.sinks}, window={self.window}: sinks must be at least 0, the window at least 1")
        if self.budget <= self.sinks + self.window:
            raise ValueError(
                f"budget={self.budget} leaves no slot besides {self.sinks} sinks and {self.window} window keys: give more "
                f"than {self.sinks + self.window}, or smaller sinks= and window="
            )

    @property
    def pending(self) -> int:
        """Slots that a compression leaves free for the latest tokens, so that not every token triggers a compression."""
        return max(1, (self.budget - self.sinks - self.window) // _PENDING)

    @property
    def middle(self) -> int:
        """Slots for compressed keys."""
        return max(1, self.budget - self.sinks - self.window - self.pending)
