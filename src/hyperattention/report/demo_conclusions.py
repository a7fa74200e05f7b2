"""The tables of the demo in words."""

from collections.abc import Sequence

import torch

from hyperattention.bench.case import Case
from hyperattention.bench.speed import Speed
from hyperattention.reference.evaluate import ModelJudgement
from hyperattention.report.tables import format_added, format_error, format_ratio, format_seconds

# shorter documents show that the library works, but exact attention costs little on them
_LONG = 32768


def conclude(
    judgements: Sequence[ModelJudgement], speeds: Sequence[Speed], case: Case, length: int, longest: int
) -> list[str]:
    """Describe the tables in words.

    Args:
        judgements: the results of the model, exact attention first.
        speeds: the results on structured inputs.
        case: the structured inputs.
        length: tokens of each document.
        longest: tokens that the model reads.

    Returns:
        one sentence for each part, and one more if the documents were short.
    """
    found = (_model_in_words(judgements, length), _speed_in_words(speeds, case), short_in_words(length, longest))
    return [sentence for sentence in found if sentence]


def _model_in_words(judgements: Sequence[ModelJudgement], length: int) -> str:
    ours, exact = next(each for each in judgements if each.row == "default"), judgements[0]
    if not ours.approximated:
        return f"At {length:,} tokens the default lists as many pairs as exact attention, so it saves nothing."
    asked = "" if ours.retrieval is None else f", retrieved {ours.retrieval:.1%} of digits (exact {exact.retrieval:.1%})"
    return (
        f"Reading {length:,} tokens, the default scored {1 / ours.cost.share_of_exact:.1f}x fewer pairs than exact "
        f"attention, added {format_added(ours)} nats a byte{asked}. Its attention took "
        f"{format_seconds(ours.attention.median)} a document, exact attention {format_seconds(exact.attention.median)} "
        f"({format_ratio(ours.attention_ratio)})."
    )


def _speed_in_words(speeds: Sequence[Speed], case: Case) -> str:
    ours, control = (next(each for each in speeds if each.row == name) for name in ("default", "control"))
    return (
        f"At {case.length:,} tokens the default ran {ours.ratio.value:.1f}x as fast as SDPA (threads: "
        f"{torch.get_num_threads()}), with an error of {format_error(ours.error)}; error of the control, at the same pairs: "
        f"{format_error(control.error)}."
    )


def short_in_words(length: int, longest: int) -> str:
    """Say where an approximation counts, if documents are shorter.

    Args:
        length: tokens of each document.
        longest: tokens that the model reads.

    Returns:
        a sentence; empty if the documents are long enough.
    """
    if length >= _LONG:
        return ""
    remedy = "" if longest < _LONG else f": leave out --quick, and set --length {_LONG}"
    return (
        f"{length:,} tokens are short: exact attention is still cheap there. It is at {_LONG:,} tokens and more that an "
        f"approximation counts{remedy}."
    )
