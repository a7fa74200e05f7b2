"""Blocks of code in README and docs/, and their marks."""

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
# a block that cannot run has this line before it
MARK = re.compile(r"<!-- not run: (.+?) -->\n\Z", re.DOTALL)
SHELLS = frozenset({"sh", "bash", "console"})
LANGUAGES = frozenset({"", "python", "text", "diff", "json", "yaml", "toml"}) | SHELLS


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, its lines, and why it is not run, if it is not."""

    language: str
    text: str
    not_run: str | None

    @property
    def commands(self) -> list[str]:
        """Lines of a shell block, and of a block without a language, which may hold commands too."""
        lines = [line.split("  #")[0].strip() for line in self.text.replace("\\\n", " ").splitlines()]
        return [line for line in lines if line and (not self.language or self.language in SHELLS)]


def blocks(page: Path) -> list[Block]:
    """Cut the fenced blocks out of a page."""
    text = page.read_text(encoding="utf-8")
    found = []
    for match in re.finditer(r"^```(\w*)\n(.*?)^```$", text, flags=re.DOTALL | re.MULTILINE):
        reason = MARK.search(text[: match.start()])
        found.append(Block(match[1], match[2], reason and reason[1]))
    return found
