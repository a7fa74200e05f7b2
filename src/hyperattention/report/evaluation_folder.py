"""The folder of an evaluation: which files it gets, and whether they may be written, told before work begins."""

import json
import os
from pathlib import Path

from hyperattention.files.outputs import carries_mark, check_folder, check_own

METRICS = "metrics.json"
PREDICTIONS = "predictions.csv"
CONFIG = "config.json"
HEAT_MAPS = "heat_map_*.png"
COLUMNS = (
    *("policy", "budget", "task", "length", "depth", "question_visible", "seed", "turn", "question", "expected", "said"),
    *("right", "digits"),
)
# what a file of JSON holds, so that it is known again
_KEYS = {METRICS: {"floor", "retrieval", "continuation"}, CONFIG: {"fingerprint", "contenders", "tokens_of_text"}}


def check_evaluation_folder(out: Path, reads: tuple[Path | None, ...], *, overwrite: bool) -> None:
    """Refuse a folder in which an evaluation would lose something, or which cannot be written.

    Files of an evaluation that was interrupted are replaced, those of a finished one if the user says so, all others never.

    Args:
        out: the folder.
        reads: folders that the command reads, which are never written into; None for none.
        overwrite: whether a finished evaluation may be replaced.

    Raises:
        ValueError: if it is no folder, cannot be written, is read, or holds a finished evaluation.
    """
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out} is a file: name a folder to write into")
    if not out.resolve().parent.is_dir():
        raise ValueError(f"cannot make {out}: name a folder in an existing directory")
    real = os.path.realpath(out)
    if any(path is not None and real == os.path.realpath(path) for path in reads):
        raise ValueError(f"cannot write into {out}: this command reads it; name another folder")
    if out.is_dir():
        check_own(out, (CONFIG, PREDICTIONS, METRICS, *(path.name for path in out.glob(HEAT_MAPS))), is_own, "eval")
    if (out / METRICS).exists() and not overwrite:
        raise ValueError(f"{out} holds a finished evaluation: name another folder, or give --overwrite")
    check_folder(out / CONFIG if out.is_dir() else out)


def is_own(path: Path) -> bool:
    """Return whether a file was written by an evaluation.

    Args:
        path: the file, under one of the names above.

    Returns:
        whether it was; no if it cannot be read.
    """
    if path.suffix == ".png":
        return carries_mark(path)
    try:
        text = path.read_text(encoding="utf-8")
        if path.name == PREDICTIONS:
            return text.partition("\n")[0] == ",".join(COLUMNS)
        data = json.loads(text)
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(data, dict) and data.keys() >= _KEYS[path.name]
