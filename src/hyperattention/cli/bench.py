"""The command `bench`: time, memory and error against length."""

from pathlib import Path
from typing import Annotated

import typer

from hyperattention.cli.options import Json, Overwrite, Plot, Quick, Repeats, Seed
from hyperattention.cli.support import check_picture, explained, make_console, tell
from hyperattention.files.outputs import Outputs

_PICTURE = Path("hyperattention-bench.png")


def bench(
    min_length: Annotated[int, typer.Option(min=64, help="Shortest length; it doubles from there.")] = 4096,
    max_length: Annotated[int, typer.Option(min=64, help="Longest length; 131072 takes exact about an hour.")] = 32768,
    repeats: Repeats = None,
    plot: Plot = _PICTURE,
    json: Json = None,
    quick: Quick = False,
    seed: Seed = 0,
    overwrite: Overwrite = False,
) -> None:
    """Measure time, memory and error against length, beside SDPA: forward, backward, causal or not, d = 64, 128, GQA."""
    console, outputs = make_console(), Outputs((plot, json), overwrite, default=_PICTURE)
    with explained():
        outputs.check()
        check_picture(plot)
        from hyperattention.bench.speed import SpeedSettings
        from hyperattention.report import bench as report

        speed = SpeedSettings(repeats or 1, 64, memory=False) if quick else SpeedSettings(repeats or 3, 64)
        options = report.BenchOptions(min_length, max_length, speed, seed)
        report.list_cases(options)
    results = report.run(options, console)
    with explained():
        outputs.check()
        report.save(results, plot=plot, records=json)
    tell(outputs)
