"""The folder of an evaluation: the names of its files, and the check before the run that they can be written."""

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
# keys by which a JSON file of an evaluation is recognised
_KEYS = {METRICS: {"floor", "retrieval", "continuation"}, CONFIG: {"fingerprint", "contenders", "tokens_of_text"}}


def check_evaluation_folder(out: Path, reads: tuple[Path | None, ...], *, overwrite: bool) -> None:
    """Check that an evaluation can write its folder without a loss of other files.

    Files of an interrupted evaluation are replaced. Files of a finished evaluation are replaced only with `overwrite`. All
    other files are never replaced.

    Args:
        out: the folder.
        reads: folders that the command reads, and therefore never writes to; None entries are skipped.
        overwrite: whether a finished evaluation may be replaced.

    Raises:
        ValueError: if `out` is not a folder, cannot be written, is read by the command, or holds a finished evaluation.
    """
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out} is a file: give a folder to write into")
    if not out.resolve().parent.is_dir():
        raise ValueError(f"cannot make {out}: give a folder in an existing directory")
    real = os.path.realpath(out)
    if any(path is not None and real == os.path.realpath(path) for path in reads):
        raise ValueError(f"cannot write into {out}: this command reads it; give another folder")
    if out.is_dir():
        check_own(out, (CONFIG, PREDICTIONS, METRICS, *(path.name for path in out.glob(HEAT_MAPS))), is_own, "eval")
    if (out / METRICS).exists() and not overwrite:
        raise ValueError(f"{out} holds a finished evaluation: give another folder, or --overwrite")
    check_folder(out / CONFIG if out.is_dir() else out)


def is_own(path: Path) -> bool:
    """Return whether a file was written by an evaluation.

    Args:
        path: the file, with one of the names above.

    Returns:
        True if an evaluation wrote the file; False if not, or if the file cannot be read.
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
