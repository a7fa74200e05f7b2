"""One forward pass of a model over one sample, with a method in all its layers: loss, answers, times and audits."""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Bool
from torch import Tensor
from torch.nn.functional import cross_entropy

from hyperattention.bench.rows import Row
from hyperattention.error.audit import ErrorReport
from hyperattention.integrations.transformers import use
from hyperattention.methods.exact import Exact
from hyperattention.reference.call_recorder import CallInputs, CallRecorder, watched
from hyperattention.reference.model import LoadedModel
from hyperattention.reference.samples import EvaluationSample

# number of rows of logits whose loss is computed at a time, for models with a large vocabulary
_CHUNK = 1024


@dataclass(frozen=True)
class Pass:
    """The results of one pass of a model over one sample.

    Args:
        nats: loss summed over the counted tokens.
        num_bytes: bytes of text of the counted tokens.
        planted_nats: loss summed over the lines of the second half that set or ask for facts.
        num_planted: number of tokens in these lines.
        right: for each answer, whether each digit was the model's first choice.
        distance: for each answer, the distance to the digits that set it.
        model_seconds: time of the complete pass, without audits.
        attention_seconds: time in attention.
        reports: audits of the approximated calls.
        approximated: number of attention calls that ran the method.
        calls: number of all attention calls.
    """

    nats: float
    num_bytes: int
    planted_nats: float
    num_planted: int
    right: Bool[Tensor, "answers digits"]
    distance: tuple[int, ...]
    model_seconds: float
    attention_seconds: float
    reports: tuple[ErrorReport, ...]
    approximated: int
    calls: int

    @property
    def nats_per_byte(self) -> float:
        """The loss in nats a byte."""
        return self.nats / self.num_bytes


def run_pass(
    loaded: LoadedModel,
    sample: EvaluationSample,
    row: Row,
    *,
    seed: int = 0,
    audit_rows: int = 0,
    on_call: Callable[[CallInputs], None] | None = None,
) -> Pass:
    """Run a model over one sample with all layers replaced.

    Args:
        loaded: the model.
        sample: the sequence.
        row: the row of the method.
        seed: seed of draws and audited rows.
        audit_rows: rows of each approximated call that are compared with exact attention.
        on_call: in a pass with exact attention, called with the inputs of each call that a method could run.

    Returns:
        the results of the pass.
    """
    ids = sample.tokens[None].to(loaded.model.device)
    # in the exact row no call is approximated on purpose, and every other row reports this in its label
    with use(loaded.model, row.method, seed=seed, warn=False) as counter:
        watch = CallRecorder(counter, row.method, rows=audit_rows, seed=seed, on_call=on_call)
        with watched(loaded.model, watch):
            began = time.perf_counter()
            logits = loaded.model(ids, use_cache=False).logits[0]
            seconds = time.perf_counter() - began - watch.audit_seconds
            targets = ids[0, 1:]
            nats = _sum_loss(logits[:-1], targets, sample.counted.to(ids.device))
            planted_nats = _sum_loss(logits[:-1], targets, sample.planted.to(ids.device))
            right = digits_right(logits[:-1], targets, sample)
    counts = counter.counts
    return Pass(
        nats,
        sample.num_bytes,
        planted_nats,
        int(sample.planted.sum()),
        right,
        sample.answer_distance,
        seconds,
        watch.attention_seconds,
        tuple(watch.reports),
        counts.approximated,
        counts.total,
    )


def _sum_loss(logits: Tensor, targets: Tensor, counted: Tensor) -> float:
    index = counted.nonzero()[:, 0]
    parts = (cross_entropy(logits[part].float(), targets[part], reduction="sum").item() for part in index.split(_CHUNK))
    return sum(parts, 0.0)


def digits_right(logits: Tensor, targets: Tensor, sample: EvaluationSample) -> Tensor:
    """Return which digits of the answers a model predicts first, given all tokens before them.

    Args:
        logits: ``[targets, vocabulary]``.
        targets: the tokens to be predicted.
        sample: the sample with the places of the answers.

    Returns:
        ``[answers, digits]``, boolean.
    """
    first = torch.tensor(sample.answer_index, dtype=torch.int64, device="cpu")[:, None]
    place = (first + torch.arange(sample.answer_size, dtype=torch.int64, device="cpu") - 1).to(
        targets.device
    )  # [answers, digits]
    return (logits[place].argmax(-1) == targets[place]).cpu()


def watch_exact(loaded: LoadedModel, sample: EvaluationSample, on_call: Callable[[CallInputs], None]) -> None:
    """Run a pass with exact attention, and pass on the inputs of each attention call that a method could run.

    Args:
        loaded: the model.
        sample: the sample to read.
        on_call: called with the inputs of each such call, in order.
    """
    with use(loaded.model, Exact(), warn=False) as counter:
        watch = CallRecorder(counter, Exact(), on_call=on_call)
        with watched(loaded.model, watch):
            loaded.model(sample.tokens[None].to(loaded.model.device), use_cache=False)


def capture(loaded: LoadedModel, sample: EvaluationSample, exact: Row) -> tuple[CallInputs, ...]:
    """Record the model's own queries, keys and values of every layer, in a pass with exact attention.

    Args:
        loaded: the model.
        sample: the sample to read.
        exact: the row of exact attention.

    Returns:
        the inputs of each attention call.
    """
    with use(loaded.model, exact.method, warn=False) as counter:
        watch = CallRecorder(counter, exact.method, keep=True)
        with watched(loaded.model, watch):
            loaded.model(sample.tokens[None].to(loaded.model.device), use_cache=False)
    return tuple(watch.inputs)
