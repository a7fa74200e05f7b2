"""The base class of every store: the keys and values of one layer of a cache."""

from abc import ABC, abstractmethod

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from hyperattention.cache.budget import CacheBudget
from hyperattention.cache.score_rule import PLAIN, ScoreRule
from hyperattention.types import Partial


class Store(ABC):
    """The keys and values of one layer during generation: appended, attended to, and compressed in every step.

    A step is `append`, then attention, then `end_step`. While `is_whole` is True, attention over the tensors that `append`
    returned is exact, and a caller may compute it in any way; afterwards a caller must use `attend`. Every store reports the
    true length of the text (`seen`), so that positions stay those of the text, and the number of bytes it holds.
    """

    @property
    @abstractmethod
    def seen(self) -> int:
        """Tokens appended so far, padding included."""

    @property
    @abstractmethod
    def batch(self) -> int:
        """Rows of the batch; 0 if the store is empty."""

    @property
    @abstractmethod
    def device(self) -> torch.device | None:
        """Device of keys and values; None if the store is empty."""

    @property
    @abstractmethod
    def num_slots(self) -> int:
        """Slots of each head: as many as the next `append` returns, without its new ones."""

    @property
    @abstractmethod
    def num_read(self) -> int:
        """Keys of each head that the query of the next token reads, without its own key."""

    @property
    @abstractmethod
    def is_whole(self) -> bool:
        """Whether every key is held and read."""

    @property
    @abstractmethod
    def memory_bytes(self) -> int:
        """Bytes of all tensors held, free space included."""

    @abstractmethod
    def append(
        self, k: Float[Tensor, "batch kv_heads new head_dim"], v: Float[Tensor, "batch kv_heads new value_dim"]
    ) -> tuple[Tensor, Tensor]:
        """Append new keys and values.

        Args:
            k: keys, positions applied.
            v: values.

        Returns:
            the keys and values of all slots, new ones last.
        """

    @abstractmethod
    def mask_padding(self, live: Bool[Tensor, "batch new"]) -> None:
        """Mark the tokens just appended that are padding, before attention over them.

        Args:
            live: False for padding, which is never read again.
        """

    @abstractmethod
    def attend(self, q: Float[Tensor, "batch heads queries head_dim"], scale: float, rule: ScoreRule = PLAIN) -> Partial:
        """Compute attention for the tokens just appended, each over earlier keys and the new keys up to its own.

        Args:
            q: queries of the new tokens.
            scale: factor of the scores.
            rule: the model's softcap and learned sinks.

        Returns:
            the rows and their log-sum-exp.
        """

    @abstractmethod
    def end_step(self, q: Float[Tensor, "batch heads queries head_dim"], scale: float, rule: ScoreRule = PLAIN) -> None:
        """End a step: read its queries, and compress the store to its budget.

        Args:
            q: the queries of the tokens just appended.
            scale: factor of the scores.
            rule: the model's softcap and learned sinks.
        """

    @abstractmethod
    def take_rows(self, index: Int[Tensor, " rows"]) -> None:
        """Select rows of the batch, for beam search and for sequences that end.

        Args:
            index: the rows; repeats are allowed.
        """

    @abstractmethod
    def crop(self, num: int) -> None:
        """Remove the latest tokens, as assisted decoding does with rejected tokens.

        Args:
            num: number of tokens.

        Raises:
            ValueError: if the tokens are already compressed.
        """

    @abstractmethod
    def state(self) -> dict[str, Tensor]:
        """Return all that is needed to continue later, by name: only tensors; numbers are tensors with one element.

        Returns:
            the state.
        """

    @abstractmethod
    def restore(self, state: dict[str, Tensor]) -> None:
        """Continue from a state.

        Args:
            state: the result of `state`.

        Raises:
            ValueError: if a tensor is missing, or its shape does not fit the others.
        """

    def move(self, device: torch.device) -> None:
        """Move all tensors to the device where attention runs.

        Args:
            device: the device.
        """
        self.restore({name: x.to(device) for name, x in self.state().items()})


class StoreFactory(ABC):
    """A way to keep keys with its own store class, in place of a `Policy`; each layer gets one store."""

    @abstractmethod
    def store(self, room: CacheBudget, layer: int, seed: int, previous: Store | None) -> Store:
        """Make an empty store.

        Args:
            room: number of keys that each head may hold, or read in a step.
            layer: layer of the model, a counter of every draw.
            seed: seed of every draw.
            previous: the store of the previous layer, if any: neighbouring layers may share their choice.

        Returns:
            the store.
        """
