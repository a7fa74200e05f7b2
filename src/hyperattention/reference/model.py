"""Loading of models to evaluate: the embedded reference model, or a user's own model from a folder."""

from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from hyperattention.files.model_folder import WEIGHTS, check_model_folder, check_reference_folder
from hyperattention.integrations.transformers.trained_length import trained_length

__all__ = ["WEIGHTS", "LoadedModel", "load_model", "load_reference"]


@dataclass(frozen=True)
class LoadedModel:
    """A model to evaluate.

    Args:
        model: the model, in evaluation mode.
        name: the name in tables.
        tokenizer: the tokenizer; None for a byte-level model.
    """

    model: PreTrainedModel
    name: str
    tokenizer: PreTrainedTokenizerBase | None = None

    @property
    def max_length(self) -> int:
        """The trained length of the model, in tokens."""
        length = trained_length(self.model.config.get_text_config())
        if length is None:
            raise ValueError(f"the configuration of {self.name} lacks max_position_embeddings: add the trained length")
        return length


def load_reference(folder: Path = WEIGHTS, *, max_length: int | None = None) -> LoadedModel:
    """Load the reference model, a small byte-level Llama, in float32.

    Args:
        folder: the folder of ``config.json`` and ``model.safetensors``; by default the folder inside the package.
        max_length: read up to so many bytes, more than in training: rotary positions are stretched by YaRN (Peng et al.,
            2023, arXiv:2309.00071), as transformers does it, without training. None keeps the positions of training.

    Returns:
        the model.

    A folder without weights raises a FileNotFoundError.

    Raises:
        ValueError: if the vocabulary of the model is not 256 bytes, or `max_length` is shorter than its trained length.
    """
    check_reference_folder(folder)
    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    if max_length is not None:
        trained = trained_length(config)
        if trained is None or getattr(config, "rope_parameters", None) is None or max_length < trained:
            raise ValueError(
                f"max_length={max_length}: only rotary positions can be stretched, and only beyond the trained length, here "
                f"{trained}; leave max_length out"
            )
        yarn = {"rope_type": "yarn", "factor": max_length / trained, "original_max_position_embeddings": trained}
        config.rope_parameters = {**config.rope_parameters, **yarn}
    model = AutoModelForCausalLM.from_pretrained(folder, config=config, dtype=torch.float32, local_files_only=True).eval()
    if model.config.vocab_size != 256:
        raise ValueError(
            f"the model in {folder} has {model.config.vocab_size} tokens, but the reference model reads 256 bytes: give "
            "another folder, or load the model as your own"
        )
    return LoadedModel(model, "the reference model")


def load_model(folder: Path) -> LoadedModel:
    """Load a user's own model and its tokenizer, without any download.

    Args:
        folder: the folder of a model saved by transformers, with its tokenizer.

    Returns:
        the model, in the dtype in which it was saved.

    A folder that does not exist, or holds no model, raises a FileNotFoundError.

    Raises:
        ValueError: if transformers cannot load the model or its tokenizer.
    """
    check_model_folder(folder)
    try:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", local_files_only=True).eval()
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(
            f"transformers cannot load a language model and its tokenizer from {folder}: {error}; give a folder that "
            "save_pretrained wrote"
        ) from error
    return LoadedModel(model, folder.resolve().name, tokenizer)
