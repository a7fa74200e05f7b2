"""Peak memory of one attention call, read from the operating system in a separate process.

A process that made an earlier measurement can reuse its freed memory, which would hide memory of the next call. Each
measurement therefore runs in a new process, after a warm-up on a short input, and resets the peak memory of the process
just before the call. `measure` starts this module as a process and reads the result from its standard output; users do not
call ``python -m hyperattention.bench.peak_memory``.
"""

import json
import resource
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

from hyperattention.bench.case import Case

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
_WARM_LENGTH = 512


def measure(case: Case, row: str, threads: int) -> int | None:
    """Measure the bytes that a call needs beyond its inputs.

    Args:
        case: the shapes and the kind of the call.
        row: name of the row in `bench.rows` whose method runs.
        threads: number of threads of the call.

    Returns:
        bytes, outputs included; None if the process failed, for example from lack of memory.
    """
    question = json.dumps({"case": asdict(case), "row": row, "threads": threads})
    command = [sys.executable, "-m", "hyperattention.bench.peak_memory"]
    done = subprocess.run(command, input=question, capture_output=True, text=True, check=False)
    return int(done.stdout.split()[-1]) if done.returncode == 0 and done.stdout.split() else None


def _peak_bytes() -> int:
    if _STATUS.exists():
        return next(int(line.split()[1]) * 1024 for line in _STATUS.read_text().splitlines() if line.startswith("VmHWM"))
    # macOS counts bytes, other systems kilobytes; this peak cannot be reset, so the result may be too small there
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _reset_peak() -> None:
    if _CLEAR.exists():
        _CLEAR.write_text("5")


def _answer(question: dict) -> int:
    import torch

    from hyperattention.bench.rows import rows

    torch.set_num_threads(question["threads"])
    case = Case(**question["case"])
    method = next(row.method for row in rows() if row.name == question["row"])
    short = replace(case, length=min(case.length, _WARM_LENGTH))
    short.call(method, short.plain_inputs())()
    call = case.call(method, case.plain_inputs())
    _reset_peak()
    before = _peak_bytes()
    kept = call()
    after = _peak_bytes()
    del kept
    return max(0, after - before)


if __name__ == "__main__":
    sys.stdout.write(f"{_answer(json.load(sys.stdin))}\n")
