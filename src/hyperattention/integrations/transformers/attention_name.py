"""The attention implementation that a model uses at present, read from its configuration."""

from dataclasses import dataclass

from transformers import PreTrainedConfig


@dataclass(frozen=True)
class AttentionName:
    """Read the name of the attention implementation from the model's configuration, again in every step.

    A copy of this object keeps a reference to the same configuration, because `use` changes only the model's own
    configuration. A pickled object may be loaded for another model in another process, so it keeps no configuration; the
    cache then detects from its keys whether attention reads weights.

    Args:
        config: the model's configuration; None if it is not known.
    """

    config: PreTrainedConfig | None

    @property
    def now(self) -> str | None:
        """The name of the attention implementation; None if it is not known."""
        return None if self.config is None else self.config._attn_implementation

    def __copy__(self) -> "AttentionName":
        return self

    def __deepcopy__(self, memo: dict[int, object]) -> "AttentionName":
        return self

    def __reduce__(self) -> tuple[type["AttentionName"], tuple[None]]:
        return AttentionName, (None,)
