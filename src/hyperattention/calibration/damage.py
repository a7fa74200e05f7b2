"""What the errors of each head do to a model's predictions: the weight of a head in a plan for a number of pairs."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hyperattention.calibration.journal import Divergence, Journal
from hyperattention.integrations.transformers import use
from hyperattention.methods.base import AttentionMethod
from hyperattention.methods.by_head import ByHead
from hyperattention.methods.by_layer import ByLayer
from hyperattention.methods.exact import Exact
from hyperattention.reference.model import LoadedModel
from hyperattention.reference.samples import EvaluationSample

# predictions that are compared: a gigabyte of them for a vocabulary of 128,000
_PREDICTIONS = 2048

# for each layer, the weight of each kv head
Weights = dict[int, tuple[float, ...]]


@dataclass(frozen=True)
class Probe:
    """One document, and the candidate that stands in for exact attention in one head at a time.

    Args:
        loaded: the model.
        sample: the document.
        document: its number.
        ladder: the candidates.
        place: number of the candidate that is tried.
        seed: seed of the draws.
    """

    loaded: LoadedModel
    sample: EvaluationSample
    document: int
    ladder: Sequence[AttentionMethod]
    place: int
    seed: int

    @torch.inference_mode()
    def predictions(self, method: AttentionMethod) -> Tensor:
        """Compute the log-probabilities of the tokens that are judged, evenly spaced if there are many."""
        model, tokens = self.loaded.model, self.sample.tokens
        with use(model, method, seed=self.seed + self.document, warn=False):
            logits = model(tokens[None].to(model.device), use_cache=False).logits[0]
        return torch.log_softmax(logits[judged_rows(self.sample).to(logits.device)].float(), -1)


def judged_rows(sample: EvaluationSample) -> Tensor:
    """List the rows whose predictions are judged: counted tokens and digits of answers, evenly spaced if there are many.

    Lines that set facts are left out, and the keys in those that ask for them: both are random.

    Args:
        sample: the document.

    Returns:
        the rows, in order; each predicts the next token.
    """
    judged, digits = sample.counted.clone(), torch.arange(sample.answer_size, dtype=torch.int64, device="cpu")
    first = torch.tensor(sample.answer_index, dtype=torch.int64, device="cpu")
    judged[(first[:, None] + digits - 1).flatten()] = True
    rows = judged.nonzero()[:, 0]
    return rows[:: -(-len(rows) // _PREDICTIONS)]


def weigh_heads(probe: Probe, kept: Journal, on_step: Callable[[str], None]) -> Weights:
    """Measure how far a model's predictions move for each unit of a head's squared error, one head replaced at a time.

    weight = KL(exact || one head replaced) / squared relative error of that head
    Source: none; the divergence grows like the square of a small error, so one pass tells it for every candidate.
    Cost: one pass for each kv head, and one with exact attention.

    Args:
        probe: the document and the candidate.
        kept: the measurements of this document, and the file to which each divergence is written at once.
        on_step: called before each pass with its name.

    Returns:
        the weight of each head, in nats a token for each unit of squared error.
    """
    exact, weights = None, {}
    for found in sorted((each for each in kept.measurements if each.document == probe.document), key=lambda x: x.layer):
        moved = []
        for head in range(found.shape[1]):
            on_step(f"weight: layer {found.layer}, kv head {head}")
            divergence = kept.divergence(probe.document, found.layer, head, probe.place)
            if divergence is None:
                exact = probe.predictions(Exact()) if exact is None else exact
                divergence = _divergence(probe, exact, found.layer, head, found.shape[1])
                kept.add_divergence(Divergence(probe.document, found.layer, head, probe.place, divergence))
            error = found.squares[probe.place][head]
            moved.append(divergence / error if error > 0 else 0.0)
        weights[found.layer] = tuple(moved)
    return weights


def _divergence(probe: Probe, exact: Tensor, layer: int, head: int, num_heads: int) -> float:
    """Average how far predictions move if one head runs the candidate."""
    methods = tuple(probe.ladder[probe.place] if each == head else Exact() for each in range(num_heads))
    moved = probe.predictions(ByLayer({layer: ByHead(methods)}))
    return max(0.0, float((exact.exp() * (exact - moved)).sum(-1).mean()))
