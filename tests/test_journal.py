"""A journal keeps what was measured, through interruptions, and refuses to go on under other settings."""

import math
import re
from pathlib import Path

import pytest

from hyperattention.calibration.journal import Journal
from hyperattention.calibration.measure import Measurement

ONE = Measurement(0, 1, (4, 2, 16, 16), (2.0, 1.0), ((0.0, 0.0), (math.inf, 0.5)))


class Interrupted(Exception):
    pass


def test_a_journal_keeps_measurements(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    Journal(path, {"seed": 0}).add(ONE)
    assert Journal(path, {"seed": 0}).measurements == [ONE]
    assert Journal(path, {"seed": 0}).has(0, 1)
    assert not Journal(path, {"seed": 0}).has(1, 1)


def test_a_journal_of_other_settings_is_refused_and_kept(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    there = {"seed": 0, "text": "a" * 64, "versions": {"torch": "2.5", "other": "1"}, "threads": 2}
    here = {"seed": 0, "text": "b" * 64, "versions": {"torch": "2.6", "other": "1"}, "threads": 1}
    Journal(path, there).add(ONE)
    kept = path.read_text()
    said = "(another text; threads 2 there and 1 here; versions torch 2.5 there and 2.6 here): use the same settings"
    with pytest.raises(ValueError, match=re.escape(said)):
        Journal(path, here)
    assert path.read_text() == kept


def test_a_file_that_is_no_journal_is_refused_and_kept(tmp_path: Path) -> None:
    path = tmp_path / "notes"
    for text in ("something else\n", "[]\n", "\nsomething else\n"):
        path.write_text(text)
        with pytest.raises(ValueError, match="holds no measurements of a calibration"):
            Journal(path, {"seed": 0})
        assert path.read_text() == text
    path.write_text("")
    assert Journal(path, {"seed": 0}).measurements == []


def test_an_interruption_while_a_journal_is_read_costs_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "journal"
    Journal(path, {"seed": 0}).add(ONE)

    def stop(*_: object) -> None:
        raise Interrupted

    with monkeypatch.context() as patch:
        patch.setattr("os.replace", stop)
        with pytest.raises(Interrupted):
            Journal(path, {"seed": 0})
    assert [each.name for each in tmp_path.iterdir()] == ["journal"]
    assert Journal(path, {"seed": 0}).measurements == [ONE]
