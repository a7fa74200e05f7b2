"""A journal of the measurements, from which an interrupted calibration resumes."""

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

from hyperattention.calibration.measure import Measurement
from hyperattention.files.atomic_write import atomic_write

# settings longer than this, such as hashes and candidates, are not shown
_SHOWN = 60


class Journal:
    """A file of JSON lines: first the settings of the measurements, then one line for each layer and document.

    Args:
        path: the file, which is created if it does not exist.
        settings: all settings that the measurements depend on.

    Raises:
        ValueError: if the file was written with other settings, or is not a journal. The file is left unchanged, because its
            measurements may have taken hours; the message gives the differences.
    """

    def __init__(self, path: Path, settings: Mapping[str, object]) -> None:
        """Read the existing measurements."""
        self.path = path
        header = json.dumps(settings, sort_keys=True)
        lines = path.read_text(errors="replace").split("\n") if path.exists() else []
        if any(lines) and (why := _why_other(lines[0], json.loads(header))):
            raise ValueError(
                f"{path}: {why}: use the same settings to resume, delete the file to start again, or write the plan to "
                "another file"
            )
        self.measurements = [each for line in lines[1:] if (each := _read(line)) is not None]
        # a line that an interruption truncated is left out
        atomic_write(path, "".join(f"{line}\n" for line in (header, *map(_write, self.measurements))))

    def has(self, document: int, layer: int) -> bool:
        """Return whether a layer was measured on a document.

        Args:
            document: the number of the document.
            layer: the index of the layer.

        Returns:
            True if the measurement exists.
        """
        return any((each.document, each.layer) == (document, layer) for each in self.measurements)

    def add(self, measurement: Measurement) -> None:
        """Write a measurement to the file at once.

        Args:
            measurement: the measurement.
        """
        self.measurements.append(measurement)
        with self.path.open("a") as file:
            file.write(_write(measurement) + "\n")


def _write(measurement: Measurement) -> str:
    return json.dumps(asdict(measurement))


def _why_other(line: str, settings: Mapping[str, object]) -> str | None:
    """Describe how the first line differs from the settings; None if it does not differ."""
    try:
        found = json.loads(line)
    except ValueError:
        found = None
    if not isinstance(found, dict):
        return "this file holds no measurements of a calibration"
    phrases = _differences(found, settings)
    return f"this file was measured with other settings ({'; '.join(phrases)})" if phrases else None


def _differences(there: Mapping[str, object], here: Mapping[str, object], inside: str = "") -> list[str]:
    phrases = []
    for name in sorted(there.keys() | here.keys()):
        old, new = there.get(name), here.get(name)
        if old == new:
            continue
        if isinstance(old, dict) and isinstance(new, dict):
            phrases += _differences(old, new, f"{name} ")
        elif max(len(str(old)), len(str(new))) > _SHOWN:
            phrases.append(f"another {inside}{name}")
        else:
            phrases.append(f"{inside}{name} {old} there and {new} here")
    return phrases


def _read(line: str) -> Measurement | None:
    try:
        data = json.loads(line)
        errors = tuple(map(tuple, data["errors"]))
        return Measurement(data["document"], data["layer"], tuple(data["shape"]), tuple(data["seconds"]), errors)
    except (ValueError, KeyError, TypeError):
        return None
