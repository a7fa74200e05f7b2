"""Checks that a folder holds a model, before anything slow is imported."""

from pathlib import Path

WEIGHTS = Path(__file__).parent.parent / "reference" / "weights"
# the word that stands for the embedded model on the command line
REFERENCE = "reference"


def find_folder(model: str) -> Path | None:
    """Return the folder for a model name of the command line.

    Args:
        model: a folder, or the word for the embedded reference model.

    Returns:
        the folder; None for the reference model.
    """
    return None if model == REFERENCE else Path(model)


def check_model_folder(folder: Path) -> None:
    """Check that a folder holds a model.

    Args:
        folder: folder of a user's model.

    Raises:
        FileNotFoundError: if the folder does not exist or has no configuration.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"no directory {folder}: name a folder that holds config.json, weights and a tokenizer")
    if not (folder / "config.json").exists():
        raise FileNotFoundError(f"{folder} has no config.json: name a folder written by transformers' save_pretrained")


def check_reference_folder(folder: Path) -> None:
    """Check that a folder holds a reference model.

    Args:
        folder: folder of a reference model.

    Raises:
        FileNotFoundError: if the folder has no weights.
    """
    if not (folder / "model.safetensors").exists():
        raise FileNotFoundError(
            f"no reference model in {folder}: reinstall the package, or train one with training/train_reference.py "
            "and name its folder"
        )
