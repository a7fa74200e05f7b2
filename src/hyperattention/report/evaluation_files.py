"""The files of an evaluation: metrics, every answer, and all settings."""

import csv
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from hyperattention.evaluation.policies import CacheCandidate
from hyperattention.evaluation.run import Findings
from hyperattention.evaluation.score import marks
from hyperattention.evaluation.summary import FLOOR, Cell, Continuation
from hyperattention.files.atomic_write import atomic_write
from hyperattention.files.fingerprint import fingerprint
from hyperattention.files.records import environment, plain
from hyperattention.reference.model import LoadedModel
from hyperattention.report.evaluation_folder import COLUMNS, CONFIG, METRICS, PREDICTIONS


def candidate_record(candidate: CacheCandidate) -> dict[str, object]:
    """Return a candidate as a record.

    Args:
        candidate: the candidate.

    Returns:
        its name, budget and policy; no budget if no key is dropped.
    """
    whole = candidate.family.policy is None
    return {
        "policy": candidate.family.name,
        "budget": None if whole else candidate.budget,
        "method": "everything is kept" if whole else repr(candidate.family.policy),
    }


def cell_record(cell: Cell, depths: int) -> dict[str, object]:
    """Return a cell as a record.

    Args:
        cell: the cell.
        depths: number of ranges of depth.

    Returns:
        the record.
    """
    low, high = cell.share.interval
    depth = None if cell.depth is None else [cell.depth / depths, (cell.depth + 1) / depths]
    return {
        **candidate_record(cell.candidate),
        "task": cell.task,
        "length": cell.length,
        "question_visible": cell.visible,
        "depth": depth,
        "score": cell.share.value,
        "answers": cell.share.total,
        "interval_95": [low, high],
        "digits": cell.digits,
        "ceiling": cell.ceiling.value,
        "beyond_the_model": cell.beyond,
        "memory_bytes": cell.memory_bytes,
        "seconds_a_token": cell.seconds,
        "approximated_calls": cell.approximated,
        "exact": cell.exact,
    }


def continuation_record(each: Continuation) -> dict[str, object]:
    """Return the losses of a continuation as a record.

    Args:
        each: the losses of one candidate and length.

    Returns:
        the record.
    """
    return {
        **candidate_record(each.candidate),
        "length": each.length,
        "added_nats": each.added.nats,
        "standard_error": each.added.error,
        "nats": each.added.loss,
        "texts": each.added.texts,
        "memory_bytes": each.memory_bytes,
        "approximated_calls": each.approximated,
        "exact": each.exact,
    }


def write_files(
    out: Path,
    loaded: LoadedModel,
    settings: Mapping[str, object],
    findings: Findings,
    summary: tuple[Sequence[Cell], Sequence[Continuation]],
) -> list[Path]:
    """Write the settings, every answer and the metrics; each file is written completely or not at all.

    Args:
        out: the folder.
        loaded: the model.
        settings: all options, by name.
        findings: every reply.
        summary: cells and continuations.

    Returns:
        the files.
    """
    cells, continuations = summary
    depths = int(str(settings["depths"]))
    metrics = {
        "floor": FLOOR,
        "retrieval": [cell_record(cell, depths) for cell in cells],
        "continuation": [continuation_record(each) for each in continuations],
    }
    config = {"model": loaded.name, "fingerprint": asdict(fingerprint(loaded.model)), **settings, **environment()}
    atomic_write(out / CONFIG, json.dumps(plain(config), indent=1) + "\n")
    atomic_write(out / PREDICTIONS, _predictions(findings))
    atomic_write(out / METRICS, json.dumps(metrics, indent=1) + "\n")
    return [out / name for name in (CONFIG, PREDICTIONS, METRICS)]


def _predictions(findings: Findings) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    for reply in findings.replies:
        who = candidate_record(reply.candidate)
        asked = [(number, turn) for number, turn in enumerate(reply.item.turns) for _ in turn.answers]
        for (number, turn), mark in zip(asked, marks(reply.item, reply.outputs), strict=True):
            # escaped, because bytes that are not text would break lines and programs that read the file
            question, said = (json.dumps(words)[1:-1] for words in (turn.question, mark.said))
            writer.writerow(
                (who["policy"], who["budget"], reply.item.task, reply.item.length, f"{mark.depth:.4f}", reply.visible,
                 reply.seed, number, question, mark.answer, said, mark.right, f"{mark.digits:.3f}")
            )  # fmt: skip
    return text.getvalue()
