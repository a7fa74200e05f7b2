"""The bench command: time, memory and error of attention against length, for common kinds of calls."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from rich.console import Console

from hyperattention.bench.case import Case
from hyperattention.bench.rows import rows
from hyperattention.bench.speed import Speed, SpeedSettings, measure_speed, steps_of
from hyperattention.files.records import write_records
from hyperattention.report.narrow import print_table
from hyperattention.report.plots import plot_bench
from hyperattention.report.progress import progress
from hyperattention.report.tables import speed_table

# the published preset is only in the demo: on a CPU it is slower than exact attention and would take most of the time
_ROWS = ("exact", "control", "default")
_LEAST_LENGTH = 64


@dataclass(frozen=True)
class BenchOptions:
    """The options of the command.

    Args:
        min_length: shortest length, in tokens; the lengths double from there.
        max_length: upper limit of the lengths, in tokens.
        speed: settings of the measurement.
        seed: seed of inputs and draws.
    """

    min_length: int = 4096
    max_length: int = 32768
    speed: SpeedSettings = field(default_factory=SpeedSettings)
    seed: int = 0


def list_cases(options: BenchOptions) -> tuple[Case, ...]:
    """List the cases: causal attention of one head, and four variants that change one property, each at every length.

    Args:
        options: the options of the command.

    Returns:
        the cases, short ones first.

    Raises:
        ValueError: if the lengths are too short or in the wrong order.
    """
    if not _LEAST_LENGTH <= options.min_length <= options.max_length:
        asked = f"lengths {options.min_length} to {options.max_length}"
        raise ValueError(f"{asked}: give lengths of at least {_LEAST_LENGTH}, the longest not below the shortest")
    lengths, length = [], options.min_length
    while length <= options.max_length:
        lengths.append(length)
        length *= 2
    plain = Case(options.min_length, seed=options.seed)
    kinds = (
        plain,
        replace(plain, backward=True),
        replace(plain, causal=False),
        replace(plain, head_dim=128),
        replace(plain, heads=4, kv_heads=1),
    )
    return tuple(replace(kind, length=length) for length in lengths for kind in kinds)


def run(options: BenchOptions, console: Console) -> dict[Case, tuple[Speed, ...]]:
    """Measure every case, and print the table of each case as soon as it is measured.

    Args:
        options: the options of the command.
        console: the console for tables and progress.

    Returns:
        the results of every case.
    """
    lines = [row for row in rows() if row.name in _ROWS]
    cases = list_cases(options)
    results: dict[Case, tuple[Speed, ...]] = {}
    with progress(console, "bench", len(cases) * steps_of(lines, options.speed)) as on_step:
        for case in cases:
            results[case] = measure_speed(case, lines, options.speed, on_step)
            print_table(console, speed_table(results[case], case, "structured inputs, scattered heads"))
    return results


def save(results: Mapping[Case, tuple[Speed, ...]], *, plot: Path | None, records: Path | None) -> None:
    """Write the plot and the records.

    Args:
        results: the measured results.
        plot: the file of the plot; None for no plot.
        records: the file of JSON lines; None for no file.
    """
    if plot is not None:
        plot_bench(plot, results)
    if records is not None:
        write_records(records, (speed.record(case) for case, speeds in results.items() for speed in speeds), kind="bench")
