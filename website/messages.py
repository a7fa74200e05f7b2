"""Write docs/messages.md: every error message of the package and its remedy, read from the source.

python website/messages.py            # rewrite the page
python website/messages.py --check    # only tell, by the exit status, whether it is up to date
"""

import argparse
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from raised import messages

PAGE = Path(__file__).parents[1] / "docs" / "messages.md"
TITLES = ("Messages that begin with a name", "Messages that begin with a word", "Messages that begin with a value")
MARKS = ("{}: a name", "{}: a word", "{}, after a value")
HEAD = """# Every error message

This page lists the messages of the package's errors and warnings, with their remedies. `website/messages.py` writes it from
the source. `…` stands for a value of your call, such as a shape, a number or a file. To find a message, search this page for
its first fixed words: messages that begin with a name, such as `budget=…`, come first, then those that begin with a word,
then those that begin with a value. [Troubleshooting](troubleshooting.md) explains the most frequent problems, also those
without an error.
"""


def page() -> str:
    """Write the page."""
    rows: dict[tuple[tuple[int, str], tuple[str, str]], list[str]] = {}
    for each in messages():
        rows.setdefault((each.key, each.parts), []).append(f"{each.error}, `{each.module}`")
    lines, last = [HEAD], (-1, "")
    for ((group, words), (text, remedy)), places in rows.items():
        if group != last[0]:
            lines.append(f"## {TITLES[group]}\n")
        if (group, words[0]) != last:
            lines.append(
                f"### {MARKS[group].format(words[0].upper())}\n\n| message | remedy | raised as, and by |\n|---|---|---|"
            )
            last = group, words[0]
        lines.append(f"| {_code(text)} | {_plain(remedy)} | {'; '.join(places)} |")
    text = "\n".join(lines) + "\n"
    # a heading ends the table before it
    return re.sub(r"\n(#+ )", r"\n\n\1", text).replace("\n\n\n", "\n\n").lstrip("\n")


def _code(text: str) -> str:
    mark = "``" if "`" in text else "`"
    pad = " " if "`" in text else ""
    return f"{mark}{pad}{_cell(text)}{pad}{mark}"


def _plain(text: str) -> str:
    return re.sub(r"(?<!`)([<>*_\[\]])(?!`)", r"\\\1", _cell(text)) if "`" not in text else _cell(text)


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    if parser.parse_args().check:
        sys.exit(None if PAGE.read_text(encoding="utf-8") == page() else "out of date: run python website/messages.py")
    PAGE.write_text(page(), encoding="utf-8")


if __name__ == "__main__":
    main()
