"""Options that several commands share."""

from pathlib import Path
from typing import Annotated

import typer

Text = Annotated[Path | None, typer.Option(help="Your own text, read in place of the held-out one.")]
Model = Annotated[Path | None, typer.Option(help="Folder of your own transformers model and its tokenizer; loss only.")]
Reference = Annotated[Path | None, typer.Option(help="Folder of another byte-level reference model, such as a checkpoint.")]
Plot = Annotated[Path, typer.Option(help="Picture to write; an earlier one under the default name is replaced.")]
Json = Annotated[Path | None, typer.Option("--json", help="Write the measurements as JSON lines.")]
Quick = Annotated[bool, typer.Option("--quick", help="A little of everything, once, on short inputs: to see that it works.")]
Repeats = Annotated[int | None, typer.Option(min=1, help="Rounds of interleaved timing.")]
Length = Annotated[
    int | None,
    typer.Option(min=64, help="Tokens of each document; by default what the model reads, up to 8192 (demo: 32768)."),
]
Seed = Annotated[int, typer.Option(min=0, help="Seed of documents, inputs and draws.")]
Encoding = Annotated[
    str | None,
    typer.Option(help="Of your text, such as latin-1; by default UTF-8, or bytes as they are for the embedded model."),
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace files that are there.")]
