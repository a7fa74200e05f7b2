"""A plan: a method for each layer and kv head of one model, what it was chosen by, and whom it is for."""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from hyperattention.files.fingerprint import Fingerprint, fingerprint
from hyperattention.files.timed import Crossing, Timed
from hyperattention.methods.by_head import ByHead
from hyperattention.methods.by_layer import ByLayer


@dataclass(frozen=True)
class Measured:
    """What a plan was chosen by, and what it then did.

    Args:
        length: tokens of each document.
        documents: documents read.
        text: SHA-256 of their tokens.
        seed: of draws.
        device: where it was measured; after `retime`, where its times were.
        threads: of torch on the CPU, likewise.
        versions: of the packages that matter.
        pairs_per_query: slots listed for a query, mean over the heads of the plan, exact ones included.
        exact_pairs_per_query: the same of exact attention.
        seconds: of attention in all the plan's layers, at `length`.
        exact_seconds: the same of exact attention.
        added_nats: loss a byte of the documents' second half, more than with exact attention.
        times: of plan and exact attention at every length timed, ascending; none in a plan of an earlier release.
    """

    length: int
    documents: int
    text: str
    seed: int
    device: str
    threads: int
    versions: Mapping[str, str]
    pairs_per_query: float
    exact_pairs_per_query: float
    seconds: float
    exact_seconds: float
    added_nats: float
    times: tuple[Timed, ...] = ()


@dataclass(frozen=True)
class Plan:
    """What `hyperattention calibrate` found for one model: a method for each layer and kv head, and where it begins to pay.

    Query heads of a group share lists of keys, hence one method a kv head. ``use(model, plan)`` applies it.

    Args:
        model: whose plan this is; `use` refuses any other model.
        layers: the methods of each layer that can be approximated, by its index; layers not named are exact.
        errors: the measured error of each kv head under its method, by layer.
        tolerance: the largest error allowed.
        crossover: keys from which the plan ran faster than exact attention; shorter calls are exact. None if it was slower
            at the length it was calibrated at: then every call is. `retime` measures it again.
        measured: what it was chosen by.

    Raises:
        ValueError: if there is no layer, or errors and methods differ in number.

    Example:
        >>> plan = load_plan("plan.json")  # doctest: +SKIP
        >>> with use(model, plan) as calls:  # doctest: +SKIP
        ...     model.generate(**inputs)
    """

    model: Fingerprint
    layers: Mapping[int, ByHead]
    errors: Mapping[int, tuple[float, ...]]
    tolerance: float
    crossover: int | None
    measured: Measured

    def __post_init__(self) -> None:
        if not self.layers:
            raise ValueError("a plan needs at least one layer")
        heads = {layer: len(method.methods) for layer, method in self.layers.items()}
        if heads != {layer: len(errors) for layer, errors in self.errors.items()}:
            raise ValueError(f"a plan needs one error for each method; it has {heads} methods by layer")

    @property
    def method(self) -> ByLayer:
        """The plan as a method: what runs, by layer, whatever the length."""
        return ByLayer(self.layers)

    def pays(self, num_keys: int) -> bool:
        """Return whether a call is long enough for the plan to run.

        Args:
            num_keys: keys of the call.

        Returns:
            whether it would be faster than exact attention, as far as was measured.
        """
        return self.crossover is not None and num_keys >= self.crossover

    def payoff(self) -> str:
        """Say from where on the plan pays, by what times, and whether these can be trusted.

        Returns:
            a few sentences.
        """
        found = self.measured
        pays = (
            "It did not pay, so `use` runs exact attention in its place; `hyperattention retime` times it again."
            if self.crossover is None
            else f"It pays from {self.crossover:,} keys on; `use` runs shorter calls exactly."
        )
        times = Crossing(found.times).describe() or [
            f"At {found.length:,} tokens its attention took {found.seconds:.3g} s and exact attention "
            f"{found.exact_seconds:.3g} s ({found.exact_seconds / found.seconds:.2f}x as fast)."
        ]
        return " ".join([times[0], f"Timed on {found.device}, threads: {found.threads}.", pays, *times[1:]])

    def check(self, model: nn.Module) -> None:
        """Refuse another model than the plan was made for.

        Args:
            model: the transformers model to be switched.

        Raises:
            ValueError: saying what differs.
        """
        if found := self.model.differences(fingerprint(model)):
            raise ValueError(
                f"this plan was made for another model: {'; '.join(found)}. Run `hyperattention calibrate` on this one, or "
                "name the plan's own"
            )
