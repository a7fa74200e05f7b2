"""Every block of code in README and docs/: Python runs as shown, and commands are those that exist."""

import importlib.util
import os
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch

from pages import LANGUAGES, PAGES, ROOT, Block, blocks

pytest.importorskip("transformers")
pytest.importorskip("typer")

# pages of long texts and of models, which other tests run as well
LONG = frozenset({"caches.md", "quick_start.md", "training.md", "transformers.md"})
WITH_PYTHON = [page for page in PAGES if any(block.language == "python" for block in blocks(page))]
COMMANDS = [(page, line) for page in PAGES for block in blocks(page) for line in block.commands]
# programs that a reader calls; other lines without a language are output or a drawing
PROGRAMS = ("hyperattention", "make", "pip", "python")


def marked(page: Path) -> object:
    return pytest.param(page, id=page.name, marks=pytest.mark.heavy if page.name in LONG else pytest.mark.slow)


@pytest.mark.parametrize("page", [marked(page) for page in WITH_PYTHON])
@pytest.mark.filterwarnings("ignore:no attention call was approximated")
def test_python_blocks_run_in_order(page: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    torch.manual_seed(0)
    for block in blocks(page):
        if block.language == "python" and block.not_run is None:
            exec(compile(block.text, page.name, "exec"), names)


def test_every_block_has_a_known_language_and_a_reason_if_it_is_not_run() -> None:
    for page in PAGES:
        for block in blocks(page):
            assert block.language in LANGUAGES, f"{page.name} has a block of {block.language}"
            assert block.not_run is None or len(block.not_run.split()) >= 5, f"{page.name}: {block.not_run}"
        assert page.read_text().count("<!-- not run:") == sum(block.not_run is not None for block in blocks(page))


def test_blocks_are_found_with_their_marks(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("a\n\n<!-- not run: two GPUs are needed -->\n```python\nx\n```\n\n```sh\nmake test  # all\n```\n")
    assert blocks(page) == [Block("python", "x\n", "two GPUs are needed"), Block("sh", "make test  # all\n", None)]
    assert blocks(page)[1].commands == ["make test"]


@pytest.mark.parametrize(("page", "line"), COMMANDS, ids=[f"{page.stem}: {line[:50]}" for page, line in COMMANDS])
def test_commands_exist(page: Path, line: str) -> None:
    words = shlex.split(line) if line.startswith((*PROGRAMS, "PIP_")) else []
    while words and "=" in words[0]:
        words.pop(0)
    check = {"hyperattention": parsed, "make": made, "pip": installed, "python": script}.get(words[0] if words else "")
    if check is not None:
        check(words[1:])


def parsed(words: list[str]) -> None:
    """Parse a command without running it: an unknown command, option or value raises."""
    import typer.main

    from hyperattention.cli.main import app

    group = typer.main.get_command(app)
    command = group.commands[words[0]]  # pyright: ignore[reportAttributeAccessIssue]
    command.make_context(words[0], list(words[1:]))


def made(words: list[str]) -> None:
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    assert all(word in targets for word in words if "=" not in word)


def installed(words: list[str]) -> None:
    """Look up the extras of this package; other packages are not looked up."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert words[0] in ("install", "uninstall")
    for word in words[1:]:
        named = re.fullmatch(r"(?:\.|hyperattention)\[([\w,]+)\]", word)
        assert named is None or set(named[1].split(",")) <= extras.keys()


def script(words: list[str]) -> None:
    """Look for a file, or for a module after `-m`."""
    assert importlib.util.find_spec(words[1]) if words[0] == "-m" else (ROOT / words[0]).is_file()


@pytest.mark.parametrize(
    ("check", "words"),
    [
        (parsed, "demos --quick"), (parsed, "demo --quickly"), (parsed, "ask"), (parsed, "generate a b --budget many"),
        (made, "tests"), (installed, "install .[everything]"), (script, "benchmarks/none.py"), (script, "-m hyperattentive"),
    ],
)  # fmt: skip
def test_a_command_that_does_not_exist_is_found(check, words: str) -> None:
    with pytest.raises(BaseException) as found:  # noqa: PT011 - click has exceptions of its own
        check(words.split())
    assert not isinstance(found.value, (SystemExit, KeyboardInterrupt))


@pytest.mark.parametrize("program", ["website/messages.py", "benchmarks/report.py"])
def test_pages_that_are_written_by_a_program_are_up_to_date(program: str) -> None:
    quiet = os.environ | {"MPLBACKEND": "agg"}
    command = [sys.executable, str(ROOT / program), "--check"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=quiet)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def raised():
    found = importlib.util.spec_from_file_location("raised", ROOT / "website" / "raised.py")
    assert found is not None
    assert found.loader is not None
    module = importlib.util.module_from_spec(found)
    sys.modules["raised"] = module
    found.loader.exec_module(module)
    return module


def test_every_message_tells_what_to_do(raised) -> None:
    found = raised.messages()
    assert len(found) > 300
    assert [f"{each.module}: {each.text}" for each in found if not each.parts[1]] == []


@pytest.mark.parametrize(
    ("code", "parts"),
    [
        ('raise ValueError(f"x={x} is odd: give an even number")', ("x=… is odd", "give an even number")),
        ('raise ValueError(f"x={x} must be even")', ("x=…", "must be even")),
        ('raise ValueError(f"x={x} is odd")', ("x=… is odd", "")),
        ('why = f"of {n} keys"\nraise ValueError(f"{why}: use one")', ("of … keys", "use one")),
        ('class A:\n    def f(self):\n        raise TypeError(f"{self} is odd; use B")', ("A(…) is odd", "use B")),
    ],
)
def test_a_message_is_read_as_a_user_sees_it(raised, code: str, parts: tuple[str, str]) -> None:
    import ast

    (message,) = raised._in_module(ast.parse(code), "a.py")
    assert message.parts == parts


def test_troubleshooting_explains_every_reason_for_exact_attention() -> None:
    import ast

    source = (ROOT / "src/hyperattention/integrations/transformers/forward.py").read_text()
    (function,) = (
        node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef) and node.name == "_why_exact"
    )
    text = (ROOT / "docs/troubleshooting.md").read_text()
    reasons = {
        part.value
        for node in ast.walk(function)
        if isinstance(node, ast.Return) and node.value is not None
        for part in ast.walk(node.value)
        if isinstance(part, ast.Constant) and isinstance(part.value, str)
    }
    assert len(reasons) >= 8
    assert {
        reason for reason in reasons | {"exact method", "softcap", "sinks", "position bias"} if f"`{reason}`" not in text
    } == set()


def test_no_docstring_looks_like_html() -> None:
    """Markdown takes `<k, y>` for a tag, so that the site would show nothing there."""
    import ast

    tag = re.compile(r"</?[a-zA-Z][^<>@ ]*( [^<>]*)?>")
    assert tag.search("|<k_j, y>|^p")
    found = [
        f"{path.name}: {match[0]}"
        for path in sorted((ROOT / "src").rglob("*.py"))
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, (ast.FunctionDef, ast.ClassDef, ast.Module))
        for match in tag.finditer(ast.get_docstring(node) or "")
    ]
    assert found == []
