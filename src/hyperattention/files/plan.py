"""A plan: a method for each layer and kv head of one model, with the measurements it is based on."""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from hyperattention.files.fingerprint import Fingerprint, fingerprint
from hyperattention.files.timed import Crossing, Timed
from hyperattention.methods.by_head import ByHead
from hyperattention.methods.by_layer import ByLayer


@dataclass(frozen=True)
class Measured:
    """The measurements that a plan is based on, and its measured times and loss.

    Args:
        length: tokens of each document.
        documents: number of documents.
        text: SHA-256 of their tokens.
        seed: seed of the draws.
        device: device of the measurement; after `retime`, device of the times.
        threads: threads of torch on the CPU, likewise.
        versions: versions of the relevant packages.
        pairs_per_query: slots listed per query, mean over the heads of the plan, exact heads included.
        exact_pairs_per_query: the same for exact attention.
        seconds: of attention in all the plan's layers, at `length`.
        exact_seconds: the same for exact attention.
        added_nats: increase of the loss per byte, in nats, over exact attention, on the second half of the documents.
        times: times of plan and exact attention at every timed length, ascending; empty in a plan of an earlier release.
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
    """The result of `hyperattention calibrate` for one model: a method for each layer and kv head, and the crossover length.

    Query heads of a group share lists of keys, hence one method per kv head. ``use(model, plan)`` applies the plan.

    Args:
        model: fingerprint of the model; `use` refuses any other model.
        layers: the methods of each layer that can be approximated, by layer index; layers not named are exact.
        errors: the measured error of each kv head under its method, by layer.
        tolerance: the largest error allowed; in a plan for a number of pairs, the largest error of its heads.
        crossover: number of keys from which the plan ran faster than exact attention; shorter calls are exact. None if the
            plan was slower at the calibration length: then every call is exact. `retime` measures it again.
        measured: the measurements.

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
            raise ValueError("a plan needs at least one layer: give the methods of the layers that can be approximated")
        heads = {layer: len(method.methods) for layer, method in self.layers.items()}
        if heads != {layer: len(errors) for layer, errors in self.errors.items()}:
            raise ValueError(f"a plan needs one error for each method; it has {heads} methods by layer")

    @property
    def method(self) -> ByLayer:
        """The plan as a method for every layer, at any length."""
        return ByLayer(self.layers)

    def pays(self, num_keys: int) -> bool:
        """Return whether a call is long enough for the plan to run.

        Args:
            num_keys: keys of the call.

        Returns:
            whether the plan is faster than exact attention there, by the measured crossover.
        """
        return self.crossover is not None and num_keys >= self.crossover

    def payoff(self) -> str:
        """Describe from which length on the plan is faster, the measured times, and how reliable they are.

        Returns:
            a few sentences.
        """
        found = self.measured
        pays = (
            "It was not faster, so `use` runs exact attention instead; `hyperattention retime` times it again."
            if self.crossover is None
            else f"It is faster from {self.crossover:,} keys on; `use` runs shorter calls exactly."
        )
        times = Crossing(found.times).describe() or [
            f"At {found.length:,} tokens its attention took {found.seconds:.3g} s and exact attention "
            f"{found.exact_seconds:.3g} s ({found.exact_seconds / found.seconds:.2f}x as fast)."
        ]
        return " ".join([times[0], f"Timed on {found.device}, threads: {found.threads}.", pays, *times[1:]])

    def check(self, model: nn.Module) -> None:
        """Check that the plan was made for a model.

        Args:
            model: the transformers model to be switched.

        Raises:
            ValueError: if it is another model; the message names the differences.
        """
        if found := self.model.differences(fingerprint(model)):
            raise ValueError(
                f"this plan was made for another model: {'; '.join(found)}. Run `hyperattention calibrate` on this one, or "
                "name the plan's own"
            )
