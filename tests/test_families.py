"""The table of docs/models.md says what is so: some of its rows are measured again, and no row admits a wrong result."""

from importlib import import_module
from pathlib import Path

import pytest

pytest.importorskip("transformers")
families = import_module("families")

PAGE = Path(__file__).parents[1] / "docs" / "models.md"
SAMPLE = (
    "bert",
    "deepseek_v4",
    "falcon",
    "gemma2",
    "glm_moe_dsa",
    "gpt_oss",
    "llama",
    "qwen3_5_text",
    "qwen3_next",
    "whisper",
)


def lines() -> dict[str, list[str]]:
    written = PAGE.read_text().partition(families.BEGIN)[2].partition(families.END)[0]
    rows = [
        [cell.strip() for cell in line.strip("| \n").split("|")] for line in written.splitlines() if line.startswith("| ")
    ]
    return {row[0]: row for row in rows[1:]}


@pytest.mark.parametrize("family", SAMPLE)
def test_a_row_is_what_is_measured_today(family: str) -> None:
    row = families.judge(family)
    assert [row.family, row.reference, row.logits, row.approximated] == lines()[family][:4]


@pytest.mark.heavy
@pytest.mark.parametrize("family", families.families())
def test_every_family_is_right_or_refused(family: str) -> None:
    row = families.judge(family)
    assert "WRONG" not in row.logits
    assert [row.family, row.reference, row.logits, row.approximated] == lines()[family][:4]


def test_the_page_lists_every_family_and_no_wrong_logits() -> None:
    assert lines().keys() == set(families.families())
    assert not [row for row in lines().values() if "WRONG" in row[2]]


def test_a_wrong_result_would_be_told() -> None:
    import torch

    assert families.compare(torch.ones(3), torch.ones(3)) == families.SAME
    assert families.compare(torch.ones(3), torch.ones(3) + 0.01).startswith("WRONG")
    assert families.compare(ValueError("told, so there"), torch.ones(3)) == "refused: told"
    assert families.compare(IndexError("no"), torch.ones(3)).startswith("error")
