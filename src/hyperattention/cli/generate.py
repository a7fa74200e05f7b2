"""The commands `generate`, `cache` and `ask`: texts read through a cache of bounded size."""

from pathlib import Path
from typing import Annotated

import typer

from hyperattention.cli.options import Encoding, Overwrite
from hyperattention.cli.support import INTERRUPTED, check_inputs, explained, hide_bars, make_console, refuse
from hyperattention.files.model_folder import find_folder
from hyperattention.files.outputs import Outputs
from hyperattention.random import SEED_LIMIT

_Folder = Annotated[str, typer.Argument(help="Folder of a transformers model, or 'reference': the embedded one.")]
_Budget = Annotated[int, typer.Option(min=1, help="Most slots of each head, or most keys that a step reads.")]
_Policy = Annotated[str, typer.Option(help="What is kept: a name as in `eval`, such as cluster_means, pages, exact.")]
_Sinks = Annotated[int, typer.Option(min=0, help="First tokens that are always kept.")]
_Window = Annotated[int | None, typer.Option(min=1, help="Latest tokens that are always kept; by default the policy's.")]
_Chunk = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="Read the text in pieces of so many tokens: memory is bounded, the audit's aside, but later pieces are read "
        "through what is left of earlier ones.",
    ),
]
_New = Annotated[int, typer.Option("--max-new-tokens", min=1, help="Most tokens to write.")]
_Temperature = Annotated[float, typer.Option(min=0.0, help="0 for the likeliest token, above for draws.")]
_Seed = Annotated[int, typer.Option(min=0, max=SEED_LIMIT - 1, help="Seed of every draw.")]
_Audit = Annotated[
    int,
    typer.Option(
        min=0,
        help="Attend exactly as well from one token in each run of N, over a copy of all keys, for its error; 0: never.",
    ),
]
_AllowLonger = Annotated[bool, typer.Option("--allow-longer", help="Go on beyond the length that the model was made for.")]


def generate(
    model: _Folder,
    prompt: Annotated[Path, typer.Argument(help="File of the text to go on from.")],
    budget: _Budget = 1024,
    policy: _Policy = "cluster_means",
    sinks: _Sinks = 16,
    window: _Window = None,
    chunk: _Chunk = None,
    max_new_tokens: _New = 128,
    temperature: _Temperature = 0.0,
    seed: _Seed = 0,
    audit: _Audit = 8,
    allow_longer: _AllowLonger = False,
    encoding: Encoding = None,
) -> None:
    """Go on from a text, through a cache of bounded size: the text on standard output, what it cost on standard error."""
    console = make_console(stderr=True)
    with explained():
        _check_cache(policy, budget, sinks, window)
        check_inputs(model=model, text=prompt, encoding=encoding)
        from hyperattention.report import generation as report

        hide_bars()
        options = report.GenerationOptions(
            model, policy, budget, sinks, window, chunk, seed, audit or None, allow_longer, encoding
        )
        sampling = report.Sampling(max_new_tokens, temperature, seed)
        prepared = report.prepare(options, prompt, max_new_tokens)
        reading = report.read(prepared, console, leave=1)
        writing = report.write(prepared, sampling)
    report.show(prepared, console, reading=reading, writing=writing)


def cache(
    model: _Folder,
    document: Annotated[Path, typer.Argument(help="File of the text to read.")],
    out: Annotated[Path, typer.Option(help="The cache to write, a safetensors file.")] = Path("cache.safetensors"),
    budget: _Budget = 1024,
    policy: _Policy = "cluster_means",
    sinks: _Sinks = 16,
    window: _Window = None,
    chunk: _Chunk = None,
    seed: _Seed = 0,
    allow_longer: _AllowLonger = False,
    overwrite: Overwrite = False,
    encoding: Encoding = None,
) -> None:
    """Read a document once, and keep what `ask` needs of it in one file."""
    console = make_console(stderr=True)
    with explained():
        Outputs((out,), overwrite, (document, find_folder(model))).check()
        _check_cache(policy, budget, sinks, window)
        check_inputs(model=model, text=document, encoding=encoding)
        from hyperattention.integrations.transformers.cache_file import check_savable
        from hyperattention.report import generation as report

        hide_bars()
        options = report.GenerationOptions(
            model, policy, budget, sinks, window, chunk, seed, allow_longer=allow_longer, encoding=encoding
        )
        try:
            prepared = report.prepare(options, document, None)
            check_savable(prepared.cache, prepared.loaded.model)
            reading = report.read(prepared, console, leave=0)
            report.keep(prepared, out, overwrite=overwrite)
        except KeyboardInterrupt:
            stands = "what it held before stands" if out.exists() else "it does not exist"
            typer.echo(f"stopped: nothing was written to {out}; {stands}", err=True)
            raise typer.Exit(INTERRUPTED) from None
    report.show(prepared, console, reading=reading)
    console.print(f"wrote {out}, {out.stat().st_size / 2**20:.1f} MiB")


def ask(
    file: Annotated[Path, typer.Argument(help="A cache that `cache` wrote.")],
    questions: Annotated[
        list[str], typer.Argument(help="Text that is put behind the document, for the model to go on from; each on its own.")
    ],
    model: Annotated[
        str | None, typer.Option(help="Folder of the model, if it is no longer where the file says it was.")
    ] = None,
    max_new_tokens: _New = 128,
    temperature: _Temperature = 0.0,
    seed: _Seed = 0,
    allow_longer: _AllowLonger = False,
) -> None:
    """Ask about a document that was read before; the file stays as it is, so that every question starts from it.

    Attention cannot be audited here: that takes all keys of the document, and the file holds what is left of them.
    """
    console = make_console(stderr=True)
    with explained():
        if not file.is_file():
            refuse(f"no file {file}: write one with `hyperattention cache`")
        check_inputs(model=model)
        from hyperattention.report import generation as report

        hide_bars()
        sampling = report.Sampling(max_new_tokens, temperature, seed)
        asked = report.recall(file, questions, model, max_new_tokens, allow_longer=allow_longer)
        for number, (question, prepared) in enumerate(zip(questions, asked, strict=True)):
            # the blank line and the mark tell answers apart, in a file too
            typer.echo(("\n" if number else "") + _quoted(question))
            reading = report.read(prepared, console, leave=1)
            writing = report.write(prepared, sampling)
            report.show(prepared, console, reading=reading, writing=writing)


def _check_cache(policy: str, budget: int, sinks: int, window: int | None) -> None:
    """Refuse an unknown policy, or a budget that is too small for it, before any slow package is imported."""
    from hyperattention.evaluation.families import find_family

    find_family(policy).check(budget, sinks, window)


def _quoted(question: str) -> str:
    """Mark a question as one, line by line; bytes that are no text become signs that say so."""
    text = question.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
    return "\n".join(f"> {line}" for line in text.split("\n"))
