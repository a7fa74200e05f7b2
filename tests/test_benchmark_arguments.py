"""A script reads only arguments that it has: a renamed one would stop it after minutes of work."""

import re
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
SCRIPTS = [path for path in sorted(BENCHMARKS.rglob("*.py")) if "parse_args" in path.read_text()]


def unknown_arguments(source: str) -> set[str]:
    """Names read from the parsed arguments that no `add_argument` gives."""
    given = re.findall(r"add_argument\(\s*\"-*([\w-]+)\"", source) + re.findall(r"dest=\"(\w+)\"", source)
    return set(re.findall(r"\b(?:args|options)\.([a-z]\w*)\b(?!\()", source)) - {name.replace("-", "_") for name in given}


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: str(path.relative_to(BENCHMARKS)))
def test_every_argument_that_is_read_is_given(path: Path) -> None:
    assert unknown_arguments(path.read_text()) == set()


def test_a_renamed_argument_is_found() -> None:
    source = 'parser.add_argument("--judged")\nargs = parser.parse_args()\nprint(args.judged, args.loaded)'
    assert unknown_arguments(source) == {"loaded"}
