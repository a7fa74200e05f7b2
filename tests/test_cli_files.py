"""Files of commands: nothing is written over unasked, nothing is replaced in a text, and figures fit narrow terminals."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.console import Console
from rich.table import Table

from hyperattention.bench.candidates import candidates
from hyperattention.cli.support import make_console
from hyperattention.files.atomic_write import atomic_write
from hyperattention.files.outputs import MARK, Outputs
from hyperattention.files.user_text import Text, read_text
from hyperattention.report.evaluation_folder import CONFIG, METRICS, check_evaluation_folder
from hyperattention.report.narrow import print_table
from test_cli import invoke
from test_cli_generation import document, own_model

# fixtures of another file
__all__ = ["document", "own_model"]

COMMANDS = {
    "demo": ("--plot", ()),
    "bench": ("--plot", ()),
    "pareto": ("--json", ()),
    "calibrate": ("--out", ("reference",)),
    "inspect": ("--out", ("reference",)),
    "cache": ("--out", ("reference", "document.txt")),
}


@pytest.mark.parametrize("command", COMMANDS)
def test_what_is_there_is_refused_before_work_begins(command: str, document: Path) -> None:
    option, given = COMMANDS[command]
    Path("there.png").write_text("not ours")
    for path, message in (
        ("there.png", "there.png exists: name another file, or give --overwrite"),
        ("no/x.png", "no/x.png"),
    ):
        code, output = invoke(command, *given, option, path)
        assert (code, message in output) == (2, True), output
    assert Path("there.png").read_text() == "not ours"


@pytest.mark.parametrize("command", ["demo", "calibrate", "inspect", "pareto", "eval", "generate", "cache"])
def test_what_is_no_text_is_refused_with_the_place(command: str, own_model: Path, document: Path) -> None:
    document.write_bytes(b"the quick brown fox " * 200 + b"caf\xe9 " + b"runs away " * 200)
    model = (own_model,) if command in ("calibrate", "inspect", "eval", "generate", "cache") else ("--model", own_model)
    text = ("document.txt",) if command in ("calibrate", "inspect", "generate", "cache") else ("--text", "document.txt")
    code, output = invoke(command, *model, *text)
    assert (code, "byte 0xe9 at position 4,003" in output) == (2, True), output
    code, output = invoke(command, *model, *text, "--encoding", "nonsense")
    assert (code, "unknown encoding: nonsense" in output) == (2, True), output


def test_a_text_is_its_bytes_or_what_its_encoding_says(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_bytes("café".encode("utf-16"))
    assert read_text(path).data == path.read_bytes()
    assert read_text(path, "utf-16").words() == "café"
    with pytest.raises(ValueError, match="give --encoding utf-16"):
        read_text(path).words()
    with pytest.raises(ValueError, match="0xe9 at position 3"):
        Text(b"caf\xe9", "it").words()


def test_an_evaluation_writes_over_nothing_but_an_evaluation(tmp_path: Path) -> None:
    for overwrite in (False, True):
        with pytest.raises(ValueError, match="this command reads it"):
            check_evaluation_folder(tmp_path, (tmp_path,), overwrite=overwrite)
    (tmp_path / CONFIG).write_text('{"model_type": "llama"}')
    for overwrite in (False, True):
        with pytest.raises(FileExistsError, match="was not written by `eval`"):
            check_evaluation_folder(tmp_path, (), overwrite=overwrite)
    (tmp_path / CONFIG).write_text(json.dumps({"fingerprint": 1, "contenders": [], "tokens_of_text": 1}))
    check_evaluation_folder(tmp_path, (), overwrite=False)
    (tmp_path / METRICS).write_text(json.dumps({"floor": 1, "retrieval": [], "continuation": []}))
    with pytest.raises(ValueError, match="finished evaluation"):
        check_evaluation_folder(tmp_path, (), overwrite=False)
    check_evaluation_folder(tmp_path, (), overwrite=True)
    (tmp_path / "heat_map_mine.png").write_bytes(b"a picture")
    with pytest.raises(FileExistsError, match="heat_map_mine"):
        check_evaluation_folder(tmp_path, (), overwrite=True)


def test_only_an_own_picture_under_the_default_name_is_replaced_unasked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    default, other = Path("demo.png"), Path("other.png")
    for path in (default, other):
        path.write_text(MARK)
    Outputs((default,), default=default).check()
    with pytest.raises(FileExistsError):
        Outputs((other,), default=default).check()
    default.write_text("a picture of the user's")
    with pytest.raises(FileExistsError):
        Outputs((default,), default=default).check()
    Outputs((default,), overwrite=True, default=default).check()
    with pytest.raises(ValueError, match="reads it"):
        Outputs((default,), overwrite=True, reads=(default,)).check()
    with pytest.raises(ValueError, match="twice"):
        Outputs((Path("new"), Path("new"))).check()


def test_devices_stay_and_links_are_followed(tmp_path: Path) -> None:
    real, link = tmp_path / "real", tmp_path / "link"
    real.write_text("old")
    link.symlink_to(real)
    atomic_write(link, "new")
    assert (link.is_symlink(), real.read_text()) == (True, "new")
    Outputs((Path(os.devnull),)).check()
    atomic_write(Path(os.devnull), "nothing")
    assert not Path(os.devnull).is_file()


@pytest.mark.parametrize("ending", [".xyz", ".txt"])
def test_a_picture_that_cannot_be_drawn_is_refused_at_once(ending: str) -> None:
    code, output = invoke("bench", "--plot", f"nowhere{ending}")
    assert (code, "end its name in" in output) == (2, True), output


def test_no_figure_of_a_wide_table_is_cut() -> None:
    table = Table(title="a title", title_justify="left")
    for number in range(9):
        table.add_column(f"column {number}")
    table.add_row("a method of many words", *(f"0.{number}23 [0.{number}00, 0.{number}99]" for number in range(1, 9)))
    console = Console(width=80, markup=False)
    with console.capture() as captured:
        print_table(console, table)
    text = captured.get()
    assert max(map(len, text.splitlines())) <= 80
    assert "…" not in text
    for number in range(1, 9):
        assert f"0.{number}23 [0.{number}00, 0.{number}99]" in text


def test_a_file_gets_the_width_that_columns_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    assert make_console().width == 150
    monkeypatch.setenv("COLUMNS", "80")
    assert make_console().width == make_console(stderr=True).width == 80


def test_only_methods_that_take_part_have_to_fit_the_budget() -> None:
    assert [each.family for each in candidates((256,), ("default",))] == ["exact", "default"]
    with pytest.raises(ValueError, match="512 slots"):
        candidates((256,), ("priority",))
    with pytest.raises(ValueError, match="no method is called nonsense"):
        candidates((256,), ("nonsense",))


def test_doctor_names_the_extra_in_brackets(monkeypatch: pytest.MonkeyPatch) -> None:
    from hyperattention.cli import doctor

    monkeypatch.setattr(doctor.importlib.util, "find_spec", lambda name: None)
    assert "pip install 'hyperattention[transformers]'" in invoke("doctor")[1]


def test_the_version_is_told() -> None:
    code, output = invoke("--version")
    assert (code, output.startswith("hyperattention")) == (0, True)


def test_a_missing_extra_is_named_on_import(run_python: Callable[[str], str]) -> None:
    code = (
        "import sys, importlib; sys.modules['transformers'] = None\n"
        "for name in ('integrations.transformers', 'reference.model'):\n"
        "    try:\n        importlib.import_module('hyperattention.' + name)\n"
        "    except ModuleNotFoundError as error:\n        print(error)"
    )
    assert run_python(code).count("needs transformers: pip install 'hyperattention[transformers]'") == 2


WRONG = (
    "demo --text no",
    "demo --model no",
    "demo --reference no",
    "demo --plot no/x.png",
    "demo --json no/x.jsonl",
    "bench --plot x.txt",
    "pareto --text no",
    "pareto --model no",
    "pareto --budgets x",
    "pareto --budgets 5",
    "pareto --methods nonsense",
    "eval no",
    "eval --text no",
    "eval --reference no",
    "eval --out no/x",
    "eval --lengths x",
    "eval --budget 0",
    "eval --budget 20",
    "eval --policies nonsense",
    "calibrate no",
    "calibrate reference no",
    "calibrate --out no/x",
    "inspect no",
    "calibrate --tolerance 7",
    "calibrate --pairs 0",
    "inspect reference no",
    "inspect --plan no",
    "inspect --plan empty",
    "inspect --out no/x",
    "eval --tasks nonsense",
    "pareto --methods nonsense",
    "generate no empty",
    "generate reference no",
    "generate reference empty --policy nonsense",
    "generate reference empty --budget 20",
    "cache no empty",
    "cache reference no",
    "cache reference empty --policy nonsense",
    "cache reference empty --window 3000",
    "cache reference empty --out no/x",
    "ask no q",
    "ask empty q --model no",
    "retime no",
    "retime empty --out new",
    "retime empty reference no --out new",
)


def test_what_is_wrong_is_refused_before_anything_slow_is_imported(run_python: Callable[[str], str], tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    code = f"""
import os, sys
from typer.testing import CliRunner
from hyperattention.cli.main import app
os.chdir({str(tmp_path)!r})
for words in {WRONG}:
    done = CliRunner().invoke(app, words.split())
    line, *more = done.output.splitlines()
    slow = {{"transformers", "matplotlib", "plotly", "safetensors"}} & set(sys.modules)
    if (done.exit_code, line[:7], more, slow) != (2, "error: ", [], set()):
        print(words, done.exit_code, done.output, slow)
"""
    assert run_python(code) == ""
    assert [each.name for each in tmp_path.iterdir()] == ["empty"]


def test_a_reader_that_has_gone_ends_a_command_quietly() -> None:
    # what is printed last waits in the buffer
    code = (
        "import os, sys, typer\nfrom hyperattention.cli.support import interruptible\n"
        "read, write = os.pipe(); os.close(read); os.dup2(write, 1)\n"
        "try:\n    interruptible(lambda: print('text'))()\n"
        "except typer.Exit as end:\n    sys.exit(end.exit_code)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (141, "")


@pytest.mark.parametrize(
    ("command", "place"),
    [("bench", "bench.run"), ("bench", "bench.save"), ("retime", "retime.ready"), ("retime", "retime.show")],
)
def test_an_interrupted_command_says_so_and_leaves_nothing(
    command: str, place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.chdir(tmp_path)
    for name in ("bench.run", "retime.ready", "retime.run"):
        monkeypatch.setattr(f"hyperattention.report.{name}", lambda *_, **__: SimpleNamespace(plan=None))
    monkeypatch.setattr("hyperattention.cli.support.load_plan", lambda path: None)
    monkeypatch.setattr(f"hyperattention.report.{place}", stop)
    code, output = invoke(command, *(("plan.json",) if command == "retime" else ()))
    assert (code, output) == (130, "stopped\n")
    assert not list(tmp_path.iterdir())
