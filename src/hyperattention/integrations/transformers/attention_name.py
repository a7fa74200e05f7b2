"""Which attention a model uses at present, as its own configuration says."""

from dataclasses import dataclass

from transformers import PreTrainedConfig


@dataclass(frozen=True)
class AttentionName:
    """The configuration that `use` switches, asked again in every step.

    Copies ask the same configuration, which is the model's own, and which a copy of it would not follow. What is pickled
    may be read by another model in another process: it asks none, and whether attention reads weights is told by the keys
    that it was handed.

    Args:
        config: of the model; None where it is not known.
    """

    config: PreTrainedConfig | None

    @property
    def now(self) -> str | None:
        """Name the attention; None where it is not known."""
        return None if self.config is None else self.config._attn_implementation

    def __copy__(self) -> "AttentionName":
        return self

    def __deepcopy__(self, memo: dict[int, object]) -> "AttentionName":
        return self

    def __reduce__(self) -> tuple[type["AttentionName"], tuple[None]]:
        return AttentionName, (None,)
