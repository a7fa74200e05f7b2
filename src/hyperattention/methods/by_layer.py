"""A method for each layer of a model, as a calibrated plan runs it."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from jaxtyping import Float, Int
from torch import Tensor

from hyperattention.methods.base import AttentionMethod, Cost
from hyperattention.methods.by_head import mean_cost
from hyperattention.methods.exact import Exact
from hyperattention.problem import Problem
from hyperattention.select.stage import LookAhead
from hyperattention.types import Partial


@dataclass(frozen=True)
class ByLayer(AttentionMethod):
    """Run a separate method in each layer of a model; layers not named run exact attention.

    Cost: the mean cost of the methods.   Guarantee: that of each method, in its layer.

    Args:
        methods: method of each layer, by the index of the layer as in ``attention(..., layer=)``.

    Raises:
        TypeError: if one of them is not a method, or is a ByLayer.
        ValueError: if `methods` is empty, or an index is negative.

    Example:
        >>> ByLayer({0: Method(Sinks(4), Window(256)), 3: ByHead((Exact(), Method(Sinks(4), Window(256), Draw(64))))})
    """

    methods: Mapping[int, AttentionMethod]

    def __post_init__(self) -> None:
        methods = dict(sorted(self.methods.items()))
        if not methods or min(methods) < 0:
            raise ValueError(f"ByLayer({methods}): give at least one layer, by an index of at least 0")
        for method in methods.values():
            if not isinstance(method, AttentionMethod) or isinstance(method, ByLayer):
                raise TypeError(f"ByLayer takes methods such as Method(...) or ByHead(...), not {method!r}")
        object.__setattr__(self, "methods", MappingProxyType(methods))

    def __reduce__(self):
        return ByLayer, (dict(self.methods),)

    def __repr__(self) -> str:
        return f"ByLayer({dict(self.methods)})"

    def __hash__(self) -> int:
        return hash(tuple(self.methods.items()))

    @property
    def complete(self) -> bool:
        """Whether every layer's method is complete."""
        return all(method.complete for method in self.methods.values())

    @property
    def looks_ahead(self) -> LookAhead:
        """The farthest look-ahead of any layer's method."""
        return max(method.looks_ahead for method in self.methods.values())

    def of(self, layer: int) -> AttentionMethod:
        """Return the method of a layer.

        Args:
            layer: index of the layer.

        Returns:
            the method; exact attention if the layer is not named.
        """
        return self.methods.get(layer, Exact())

    def attend(self, problem: Problem) -> Partial:
        """Compute attention by the method of the problem's layer."""
        return self.of(problem.layer).attend(problem)

    def attend_with_error(self, problem: Problem) -> tuple[Partial, Float[Tensor, "batch heads queries"]]:
        """Compute attention and each row's standard error by the method of the problem's layer; errors are passed on."""
        return self.of(problem.layer).attend_with_error(problem)

    def attend_counted(self, problem: Problem) -> tuple[Partial, Int[Tensor, "batch heads"] | None]:
        """Compute attention by the method of the problem's layer, and count its rows that lost a part to rounding."""
        return self.of(problem.layer).attend_counted(problem)

    def output(self, problem: Problem) -> Tensor:
        """Compute the output alone, by the method of the problem's layer."""
        return self.of(problem.layer).output(problem)

    def cost(self, num_keys: int, *, is_causal: bool = True, head_dim: int = 64) -> Cost:
        """Return the cost, averaged over the named layers.

        Args:
            num_keys: length of the sequence.
            is_causal: whether queries see only earlier keys.
            head_dim: width of keys, and of values.

        Returns:
            the cost.
        """
        return mean_cost([each.cost(num_keys, is_causal=is_causal, head_dim=head_dim) for each in self.methods.values()])
