"""Encoding of text as tokens and decoding, for models with a tokenizer and for the byte-level reference model."""

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
    """Encoding of text as tokens and decoding; the streamers of transformers call `decode`."""

    @abstractmethod
    def encode(self, text: str, *, first: bool) -> Int[Tensor, " tokens"]:
        """Encode text as tokens.

        Args:
            text: the text.
            first: whether the text begins the input, where some models need a special token.

        Returns:
            the tokens.
        """

    @abstractmethod
    def read(self, text: Text) -> Int[Tensor, " tokens"]:
        """Encode a complete text, which begins the input, as tokens.

        Args:
            text: the text.

        Returns:
            the tokens.
        """

    @abstractmethod
    def decode(self, tokens: Any, **options: Any) -> str:
        """Decode tokens to text.

        Args:
            tokens: a token, or a list or tensor of tokens.
            options: options that streamers pass to tokenizers.

        Returns:
            the text.
        """


@dataclass(frozen=True)
class Bytes(Codec):
    """Byte tokens: the unchanged bytes of a file, or the UTF-8 bytes of a string."""

    def encode(self, text: str, *, first: bool) -> Tensor:
        """Return the UTF-8 bytes of the string."""
        # bytes on a command line that are not UTF-8 arrive as surrogates, and are converted back to the same bytes
        return torch.tensor(list(text.encode("utf-8", "surrogateescape")), dtype=torch.int64, device="cpu")

    def read(self, text: Text) -> Tensor:
        """Return the bytes of the text."""
        return torch.tensor(list(text.data), dtype=torch.int64, device="cpu")

    def decode(self, tokens: Any, **options: Any) -> str:
        """Decode bytes as UTF-8; invalid bytes become the replacement character."""
        return bytes(torch.as_tensor(tokens, dtype=torch.int64, device="cpu").flatten().tolist()).decode("utf-8", "replace")


@dataclass(frozen=True)
class Words(Codec):
    """The tokens of a tokenizer, without a chat template.

    Args:
        tokenizer: the model's tokenizer.
    """

    tokenizer: PreTrainedTokenizerBase

    def encode(self, text: str, *, first: bool) -> Tensor:
        """Encode with the tokenizer; an end-of-text token is removed, because more tokens follow."""
        refuse_damaged(text, "the text")
        tokens = list(self.tokenizer(text, add_special_tokens=first, verbose=False).input_ids)
        if first and len(tokens) > 1 and tokens[-1] == self.tokenizer.eos_token_id:
            tokens = tokens[:-1]
        return torch.tensor(tokens, dtype=torch.int64, device="cpu")

    def read(self, text: Text) -> Tensor:
        """Encode the words of the text with the tokenizer."""
        return self.encode(text.words(), first=True)

    def decode(self, tokens: Any, **options: Any) -> str:
        """Decode with the tokenizer."""
        return str(self.tokenizer.decode(tokens, **options))


def codec_of(loaded: LoadedModel) -> Codec:
    """Choose the codec of a model.

    Args:
        loaded: the model; one without a tokenizer is the reference model.

    Returns:
        the codec.
    """
    return Bytes() if loaded.tokenizer is None else Words(loaded.tokenizer)
