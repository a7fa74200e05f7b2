"""The command `demo`: near-linear attention on a real model and on long inputs."""

from pathlib import Path
from typing import Annotated

import typer

from hyperattention.cli.options import Encoding, Json, Length, Model, Overwrite, Plot, Quick, Reference, Repeats, Seed, Text
from hyperattention.cli.support import check_inputs, check_picture, explained, hide_bars, make_console, tell
from hyperattention.files.outputs import Outputs

_PICTURE = Path("hyperattention-demo.png")
# what the reference model reads: here an approximation counts, and exact attention still ends within minutes
_LENGTH = 32768


def demo(
    length: Length = None,
    text: Text = None,
    model: Model = None,
    reference: Reference = None,
    speed_length: Annotated[int | None, typer.Option(min=64, help="Tokens of the structured inputs (32768).")] = None,
    repeats: Repeats = None,
    plot: Plot = _PICTURE,
    json: Json = None,
    quick: Quick = False,
    seed: Seed = 0,
    encoding: Encoding = None,
    overwrite: Overwrite = False,
) -> None:
    """Show near-linear attention on a real model and on long inputs: speed, loss, retrieval and measured error."""
    console = make_console()
    outputs = Outputs((plot, json), overwrite, (text, model, reference), _PICTURE)
    with explained():
        outputs.check()
        check_picture(plot)
        check_inputs(model=model, reference=reference, text=text, encoding=encoding)
        from hyperattention.bench.speed import SpeedSettings
        from hyperattention.report import demo as report

        hide_bars()
        usual = report.DemoOptions()
        speed = SpeedSettings(repeats or 1, 64, memory=False) if quick else SpeedSettings(repeats or 3, 256)
        options = report.DemoOptions(
            length,
            text,
            model,
            reference or usual.reference,
            speed_length or (4096 if quick else usual.speed_length),
            1 if quick else None,
            usual.audit_rows,
            speed,
            seed,
            encoding,
            usual.most if quick or model is not None else _LENGTH,
        )
        prepared = report.prepare(options)
    results = report.run(prepared, console)
    report.show(prepared, results, console)
    with explained():
        outputs.check()
        report.save(prepared, results, plot=plot, records=json)
    tell(outputs)
