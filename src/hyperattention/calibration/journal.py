"""A journal of the measurements, from which an interrupted calibration resumes."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from hyperattention.calibration.measure import Measurement
from hyperattention.files.atomic_write import atomic_write

# settings longer than this, such as hashes and candidates, are not shown
_SHOWN = 60


@dataclass(frozen=True)
class Divergence:
    """How far a model's predictions move if one head runs a candidate and all others exact attention.

    Args:
        document: number of the document.
        layer: index of the layer.
        head: index of the kv head.
        place: number of the candidate.
        nats: mean divergence of the predictions, in nats a token.
    """

    document: int
    layer: int
    head: int
    place: int
    nats: float


class Journal:
    """A file of JSON lines: first the settings of the measurements, then a line for each layer and document, or divergence.

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
        self.divergences = [each for line in lines[1:] if (each := _read_divergence(line)) is not None]
        # a line that an interruption truncated is left out
        kept = (header, *map(_write, self.measurements), *map(_write, self.divergences))
        atomic_write(path, "".join(f"{line}\n" for line in kept))

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
        self._append(measurement)

    def divergence(self, document: int, layer: int, head: int, place: int) -> float | None:
        """Return a divergence that was measured.

        Args:
            document: the number of the document.
            layer: the index of the layer.
            head: the index of the kv head.
            place: the number of the candidate.

        Returns:
            nats a token; None if it was not measured.
        """
        wanted = (document, layer, head, place)
        found = (each.nats for each in self.divergences if (each.document, each.layer, each.head, each.place) == wanted)
        return next(found, None)

    def add_divergence(self, divergence: Divergence) -> None:
        """Write a divergence to the file at once.

        Args:
            divergence: the divergence.
        """
        self.divergences.append(divergence)
        self._append(divergence)

    def _append(self, entry: Measurement | Divergence) -> None:
        with self.path.open("a") as file:
            file.write(_write(entry) + "\n")


def _write(entry: Measurement | Divergence) -> str:
    return json.dumps(asdict(entry))


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
        errors, squares = (tuple(map(tuple, data[name])) for name in ("errors", "squares"))
        shape, seconds = tuple(data["shape"]), tuple(data["seconds"])
        return Measurement(data["document"], data["layer"], shape, seconds, errors, squares)
    except (ValueError, KeyError, TypeError):
        return None


def _read_divergence(line: str) -> Divergence | None:
    try:
        return Divergence(**json.loads(line))
    except (ValueError, TypeError):
        return None
