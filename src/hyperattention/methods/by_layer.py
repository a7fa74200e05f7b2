"""A method for each layer of a model: what a calibrated plan runs."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from jaxtyping import Float
from torch import Tensor

from hyperattention.methods.base import AttentionMethod, Cost
from hyperattention.methods.by_head import mean_cost
from hyperattention.methods.exact import Exact
from hyperattention.problem import Problem
from hyperattention.select.stage import LookAhead
from hyperattention.types import Partial


@dataclass(frozen=True)
class ByLayer(AttentionMethod):
    """Serve every layer of a model by a method of its own; layers not named are exact.

    Cost: the mean of its methods'.   Guarantee: each method's, in its layer.

    Args:
        methods: by index of the layer, as in ``attention(..., layer=)``.

    Raises:
        TypeError: if one of them is not a method, or is itself by layer.
        ValueError: if there is none, or an index is negative.

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
        """Whether every layer's method is."""
        return all(method.complete for method in self.methods.values())

    @property
    def looks_ahead(self) -> LookAhead:
        """As far as any layer's method does."""
        return max(method.looks_ahead for method in self.methods.values())

    def of(self, layer: int) -> AttentionMethod:
        """Return what serves a layer.

        Args:
            layer: its index.

        Returns:
            its method; exact attention if it is not named.
        """
        return self.methods.get(layer, Exact())

    def attend(self, problem: Problem) -> Partial:
        """Attend by the method of the problem's layer."""
        return self.of(problem.layer).attend(problem)

    def attend_with_error(self, problem: Problem) -> tuple[Partial, Float[Tensor, "batch heads queries"]]:
        """Attend by the method of the problem's layer, and estimate each row's standard error; raises what it raises."""
        return self.of(problem.layer).attend_with_error(problem)

    def output(self, problem: Problem) -> Tensor:
        """Compute the output alone, by the method of the problem's layer."""
        return self.of(problem.layer).output(problem)

    def cost(self, num_keys: int, *, is_causal: bool = True, head_dim: int = 64) -> Cost:
        """Return the cost, averaged over the layers named.

        Args:
            num_keys: length of the sequence.
            is_causal: whether queries see only earlier keys.
            head_dim: width of keys, and of values.

        Returns:
            the cost.
        """
        return mean_cost([each.cost(num_keys, is_causal=is_causal, head_dim=head_dim) for each in self.methods.values()])
