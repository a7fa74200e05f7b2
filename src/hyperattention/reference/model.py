"""Load the models that are judged: the embedded reference model, or a user's own from a folder."""

from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from hyperattention.files.model_folder import WEIGHTS, check_model_folder, check_reference_folder
from hyperattention.integrations.transformers.trained_length import trained_length

__all__ = ["WEIGHTS", "LoadedModel", "load_model", "load_reference"]


@dataclass(frozen=True)
class LoadedModel:
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


def load_reference(folder: Path = WEIGHTS) -> LoadedModel:
    """Load the reference model, a small Llama over bytes, in float32.

    Args:
        folder: ``config.json`` and ``model.safetensors``; by default those inside the package.

    Returns:
        the model.

    A folder without weights is a FileNotFoundError.

    Raises:
        ValueError: if its model is not one of 256 bytes.
    """
    check_reference_folder(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True).eval()
    if model.config.vocab_size != 256:
        raise ValueError(f"the model in {folder} has {model.config.vocab_size} tokens: the reference model reads 256 bytes")
    return LoadedModel(model, "the reference model")


def load_model(folder: Path) -> LoadedModel:
    """Load a user's own model and its tokenizer; nothing is downloaded.

    Args:
        folder: a model saved by transformers, with its tokenizer.

    Returns:
        the model, in the precision it was saved in.

    A folder that does not exist or holds no model is a FileNotFoundError.

    Raises:
        ValueError: if transformers cannot load the model or its tokenizer.
    """
    check_model_folder(folder)
    try:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", local_files_only=True).eval()
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"transformers cannot load a language model and its tokenizer from {folder}: {error}") from error
    return LoadedModel(model, folder.resolve().name, tokenizer)
