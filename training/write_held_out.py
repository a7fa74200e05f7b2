"""Write the held-out text that the reference model is judged on: the same files that training leaves out, whole.

python training/write_held_out.py        # with Python 3.11, whose files they are

Files are parted by a form feed. Their names and sizes go to a list beside them, and Python's licence comes along.
"""

import json
import platform
import shutil
import sysconfig
from pathlib import Path

from sources import standard_library

FOLDER = Path(__file__).parents[1] / "src" / "hyperattention" / "reference"


def main() -> None:
    kept = standard_library().kept
    if any(b"\f" in data for _, data in kept):
        raise SystemExit("a held-out file contains a form feed, which parts the files: replace it before joining them")
    (FOLDER / "held_out.txt").write_bytes(b"\f".join(data for _, data in kept))
    index = {"python": platform.python_version(), "files": {name: len(data) for name, data in kept}}
    (FOLDER / "held_out.json").write_text(json.dumps(index, indent=1) + "\n")
    shutil.copyfile(Path(sysconfig.get_paths()["stdlib"]) / "LICENSE.txt", FOLDER / "held_out.LICENSE.txt")
    print(f"{len(kept)} files, {sum(len(data) for _, data in kept)} bytes")


if __name__ == "__main__":
    main()
