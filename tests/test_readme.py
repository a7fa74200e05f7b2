"""What README shows first; tests/test_pages.py runs its blocks."""

from pathlib import Path

README = Path(__file__).parent.parent / "README.md"


def test_the_two_commands_stand_first():
    text = README.read_text()
    assert text.index("make demo") < text.index("```python")
    assert text.index("make test") < text.index("```python")
