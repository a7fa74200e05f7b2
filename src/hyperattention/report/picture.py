"""Writing of pictures, completely or not at all, with a mark by which this package recognises its own files."""

import io
from pathlib import Path

from matplotlib.figure import Figure

from hyperattention.files.atomic_write import atomic_write_bytes
from hyperattention.files.outputs import MARK

# the metadata key of the mark in each file format; other formats have no mark
_MAKER = {"png": "Software", "pdf": "Creator", "svg": "Creator"}


def save_picture(figure: Figure, path: Path, dpi: int) -> None:
    """Write a figure to a file.

    Args:
        figure: the figure.
        path: the file, which is replaced; its suffix gives the format, PNG without a suffix.
        dpi: dots an inch.
    """
    kind = path.suffix[1:].lower() or "png"
    metadata = {_MAKER[kind]: MARK} if kind in _MAKER else None
    drawn = io.BytesIO()
    figure.savefig(drawn, dpi=dpi, format=kind, metadata=metadata)
    atomic_write_bytes(path, drawn.getvalue())
