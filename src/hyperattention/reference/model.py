"""Load the models that are judged: the embedded reference model, or a user's own from a folder."""

from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from hyperattention.integrations.transformers.trained_length import trained_length

WEIGHTS = Path(__file__).parent / "weights"


@dataclass(frozen=True)
class Judged:
    """A model to judge.

    Args:
        model: the model, ready to be evaluated.
        name: how tables call it.
        tokenizer: turns text into tokens; None for a model of bytes.
    """

    model: PreTrainedModel
    name: str
    tokenizer: PreTrainedTokenizerBase | None = None

    @property
    def max_length(self) -> int:
        """Give the longest input the model was made for."""
        length = trained_length(self.model.config.get_text_config())
        if length is None:
            raise ValueError(f"{self.name} names no longest input: its configuration lacks max_position_embeddings")
        return length


def load_reference(folder: Path = WEIGHTS) -> Judged:
    """Load the reference model, a small Llama over bytes, in float32.

    Args:
        folder: ``config.json`` and ``model.safetensors``; by default those inside the package.

    Returns:
        the model.

    Raises:
        FileNotFoundError: if the folder has no weights.
        ValueError: if its model is not one of 256 bytes.
    """
    if not (folder / "model.safetensors").exists():
        raise FileNotFoundError(
            f"no reference model in {folder}: reinstall the package, or train one with training/train_reference.py "
            "and name its folder"
        )
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True).eval()
    if model.config.vocab_size != 256:
        raise ValueError(f"the model in {folder} has {model.config.vocab_size} tokens: the reference model reads 256 bytes")
    return Judged(model, "the reference model")


def load_model(folder: Path) -> Judged:
    """Load a user's own model and its tokenizer; nothing is downloaded.

    Args:
        folder: a model saved by transformers, with its tokenizer.

    Returns:
        the model, in the precision it was saved in.

    Raises:
        FileNotFoundError: if the folder does not exist or holds no model.
        ValueError: if transformers cannot load the model or its tokenizer.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"no directory {folder}: name a folder that holds config.json, weights and a tokenizer")
    if not (folder / "config.json").exists():
        raise FileNotFoundError(f"{folder} has no config.json: name a folder written by transformers' save_pretrained")
    try:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", local_files_only=True).eval()
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"transformers cannot load a language model and its tokenizer from {folder}: {error}") from error
    return Judged(model, folder.resolve().name, tokenizer)
