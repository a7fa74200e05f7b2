"""A journal of what was measured, so that an interrupted calibration goes on where it stopped."""

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

from hyperattention.calibration.measure import Measurement


class Journal:
    """JSON lines: first what the measurements depend on, then one line for each layer and document.

    Args:
        path: the file; it is begun anew where its first line says that something else was measured.
        settings: what the measurements depend on.
    """

    def __init__(self, path: Path, settings: Mapping[str, object]) -> None:
        """Read what is there."""
        self.path = path
        header = json.dumps(settings, sort_keys=True)
        lines = path.read_text(errors="replace").split("\n") if path.exists() else []
        found = lines[1:] if lines and lines[0] == header else []
        self.measurements = [each for line in found if (each := _read(line)) is not None]
        # what was cut short in the middle of a line is left out
        path.write_text("".join(f"{line}\n" for line in (header, *map(_write, self.measurements))))

    def has(self, document: int, layer: int) -> bool:
        """Tell whether a layer was measured on a document.

        Args:
            document: its number.
            layer: its index.

        Returns:
            whether it need not be measured again.
        """
        return any((each.document, each.layer) == (document, layer) for each in self.measurements)

    def add(self, measurement: Measurement) -> None:
        """Write a measurement down at once.

        Args:
            measurement: the measurement.
        """
        self.measurements.append(measurement)
        with self.path.open("a") as file:
            file.write(_write(measurement) + "\n")

    def remove(self) -> None:
        """Delete the file: its plan is written."""
        self.path.unlink(missing_ok=True)


def _write(measurement: Measurement) -> str:
    return json.dumps(asdict(measurement))


def _read(line: str) -> Measurement | None:
    try:
        data = json.loads(line)
        errors = tuple(map(tuple, data["errors"]))
        return Measurement(data["document"], data["layer"], tuple(data["shape"]), tuple(data["seconds"]), errors)
    except (ValueError, KeyError, TypeError):
        return None
