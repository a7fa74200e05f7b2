"""The command line, put together of its commands."""

from typing import Annotated

try:
    import rich  # noqa: F401 - named here if it is missing
    import typer
except ModuleNotFoundError as error:
    # before typer there is nothing to report an error with
    raise SystemExit(f"the command line needs {error.name}: pip install 'hyperattention[demo]'") from error

from hyperattention.cli.bench import bench
from hyperattention.cli.demo import demo
from hyperattention.cli.doctor import doctor
from hyperattention.cli.evaluate import evaluate
from hyperattention.cli.generate import ask, cache, generate
from hyperattention.cli.pareto import pareto
from hyperattention.cli.plan import calibrate_model, inspect_model
from hyperattention.cli.retime import retime
from hyperattention.cli.support import interruptible, version

app = typer.Typer(
    no_args_is_help=True, add_completion=False, help="Near-linear attention over long contexts, with a measured error bar."
)

for name, command in (("eval", evaluate), ("calibrate", calibrate_model), ("inspect", inspect_model)):
    app.command(name=name)(interruptible(command))
for command in (generate, cache, ask, retime, demo, bench, pareto, doctor):
    app.command()(interruptible(command))


@app.callback()
def main(
    _: Annotated[bool, typer.Option("--version", callback=version, is_eager=True, help="Say which version.")] = False,
) -> None:
    """Near-linear attention over long contexts, with a measured error bar."""


if __name__ == "__main__":
    app()
