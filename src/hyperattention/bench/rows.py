"""The rows of every comparison: exact attention, baselines at the same slots, published HyperAttention, the default."""

from dataclasses import dataclass

from hyperattention.methods.base import AttentionMethod, Cost
from hyperattention.methods.default import default_method
from hyperattention.methods.exact import Exact
from hyperattention.methods.method import Method
from hyperattention.methods.presets import HyperAttention
from hyperattention.select.density import Uniform
from hyperattention.select.draw import Draw
from hyperattention.select.locate.sinks import Sinks
from hyperattention.select.locate.window import Window

# any length beyond the crossover gives the same default
LONG = 10**9


@dataclass(frozen=True)
class Row:
    """One line of a comparison.

    Args:
        name: the name in records.
        label: the name in tables and plots.
        method: the method of the row.
    """

    name: str
    label: str
    method: AttentionMethod

    def cost(self, length: int, is_causal: bool) -> Cost:
        """Return the cost of the method on a sequence."""
        return self.method.cost(length, is_causal=is_causal)

    def label_for(self, length: int, is_causal: bool, approximated: int) -> str:
        """Return the label with a remark if the row saved no pairs, so that such a row does not look like a saving.

        Args:
            length: tokens of the sequence.
            is_causal: whether queries see only earlier keys.
            approximated: number of attention calls that ran the method.

        Returns:
            the label, with a remark if exact attention ran or no pairs were saved.
        """
        if isinstance(self.method, Exact) or self.approximates(length, is_causal, approximated):
            return self.label
        return f"{self.label} (exact ran)" if not approximated else f"{self.label} (no fewer pairs)"

    def approximates(self, length: int, is_causal: bool, approximated: int) -> bool:
        """Return whether the method ran, and listed fewer pairs than exact attention."""
        return approximated > 0 and self.cost(length, is_causal).share_of_exact < 1


def find_default(device: str | None = None) -> Method:
    """Return the method that ``method=None`` runs above the crossover.

    Args:
        device: the device of the calls; None for a CPU.

    Returns:
        the default list of stages.

    Raises:
        TypeError: if the default is not a list of stages.
    """
    method = default_method(LONG, device=device)
    if not isinstance(method, Method):
        raise TypeError(f"the default method is {method!r}: rows at the same slots can be made only for a Method; give one")
    return method


def control_of(method: Method) -> Method:
    """Make the control: the same sinks and window, and all other slots drawn uniformly.

    Source: Dwivedi et al., 2025 (arXiv:2502.07861), the strongest baseline of that paper.   Differs: nothing.

    Args:
        method: the evaluated method, which must have sinks, a window and further slots.

    Returns:
        a method that lists the same number of pairs.

    Raises:
        ValueError: if the method has no sinks or no window, or lists no other keys.
    """
    sinks, window = _sinks_and_window(method)
    rest = _slots(method) - sinks.slots(method.tile) - window.slots(method.tile)
    if rest < 1:
        raise ValueError(f"{method!r} lists no slots beside sinks and window, so its control has no draws: add a Draw")
    return Method(sinks, window, Draw(rest, by=Uniform()), tile=method.tile)


def window_of(method: Method) -> Method:
    """Make a method with only the sinks and the window of another, to measure the cost of dropping all other keys.

    Args:
        method: the evaluated method; a method without sinks or without a window is refused.

    Returns:
        an incomplete method with the same sinks and window.
    """
    sinks, window = _sinks_and_window(method)
    return Method(sinks, window, tile=method.tile)


def rows(method: Method | None = None) -> tuple[Row, ...]:
    """List the rows of a comparison, exact attention first and the evaluated method last.

    Args:
        method: the evaluated method; None for the default.

    Returns:
        five rows; the control and the last row list the same number of pairs.
    """
    judged = find_default() if method is None else method
    return (
        Row("exact", "exact (SDPA)", Exact()),
        Row("sinks_window", "sinks + window", window_of(judged)),
        Row("control", "control: + uniform draws", control_of(judged)),
        Row("published", "HyperAttention, published", HyperAttention()),
        Row("default", "hyperattention, default", judged),
    )


def _sinks_and_window(method: Method) -> tuple[Sinks, Window]:
    sinks = next((stage for stage in method.stages if isinstance(stage, Sinks)), None)
    window = next((stage for stage in method.stages if isinstance(stage, Window)), None)
    if sinks is None or window is None:
        raise ValueError(f"{method!r} has no Sinks or no Window, so it has no control at the same slots: add both")
    return sinks, window


def _slots(method: Method) -> int:
    pairs = method.cost(LONG).pairs
    if pairs != round(pairs):
        raise ValueError(f"{method!r} lists {pairs} pairs a query: a control at the same slots needs an integer number")
    return round(pairs)
