"""How text becomes tokens and tokens text, for models with a tokenizer and for the reference model of bytes."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from hyperattention.files.user_text import Text, refuse_damaged
from hyperattention.reference.model import LoadedModel


class Codec(ABC):
    """Text to tokens and back; `decode` is what transformers' streamers call."""

    @abstractmethod
    def encode(self, text: str, *, first: bool) -> Int[Tensor, " tokens"]:
        """Turn text into tokens.

        Args:
            text: the text.
            first: whether it begins the input, where models may want a token of their own.

        Returns:
            the tokens.
        """

    @abstractmethod
    def read(self, text: Text) -> Int[Tensor, " tokens"]:
        """Turn a whole text, which begins the input, into tokens.

        Args:
            text: the text.

        Returns:
            the tokens.
        """

    @abstractmethod
    def decode(self, tokens: Any, **options: Any) -> str:
        """Turn tokens into text.

        Args:
            tokens: a token, or a list or tensor of them.
            options: what streamers pass along to tokenizers.

        Returns:
            the text.
        """


@dataclass(frozen=True)
class Bytes(Codec):
    """A token is a byte: of a text as it is, of words as UTF-8 writes them."""

    def encode(self, text: str, *, first: bool) -> Tensor:
        """Take the bytes."""
        # what a command line holds that is no UTF-8 came as surrogates, and becomes the bytes that it was
        return torch.tensor(list(text.encode("utf-8", "surrogateescape")), dtype=torch.int64, device="cpu")

    def read(self, text: Text) -> Tensor:
        """Take the bytes."""
        return torch.tensor(list(text.data), dtype=torch.int64, device="cpu")

    def decode(self, tokens: Any, **options: Any) -> str:
        """Read the bytes; those that are no character become a sign that says so."""
        return bytes(torch.as_tensor(tokens, dtype=torch.int64, device="cpu").flatten().tolist()).decode("utf-8", "replace")


@dataclass(frozen=True)
class Words(Codec):
    """Tokens are a tokenizer's; nothing of a chat template is added.

    Args:
        tokenizer: the model's.
    """

    tokenizer: PreTrainedTokenizerBase

    def encode(self, text: str, *, first: bool) -> Tensor:
        """Ask the tokenizer; a token that ends the input is left out, for more is to come."""
        refuse_damaged(text, "the text")
        tokens = list(self.tokenizer(text, add_special_tokens=first, verbose=False).input_ids)
        if first and len(tokens) > 1 and tokens[-1] == self.tokenizer.eos_token_id:
            tokens = tokens[:-1]
        return torch.tensor(tokens, dtype=torch.int64, device="cpu")

    def read(self, text: Text) -> Tensor:
        """Ask the tokenizer for the tokens of the words."""
        return self.encode(text.words(), first=True)

    def decode(self, tokens: Any, **options: Any) -> str:
        """Ask the tokenizer."""
        return str(self.tokenizer.decode(tokens, **options))


def codec_of(loaded: LoadedModel) -> Codec:
    """Find out how a model's tokens are made.

    Args:
        loaded: the model; one without a tokenizer is the reference model.

    Returns:
        the codec.
    """
    return Bytes() if loaded.tokenizer is None else Words(loaded.tokenizer)
