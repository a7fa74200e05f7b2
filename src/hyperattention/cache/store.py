"""The contract of a store: what one layer of a cache holds, however it holds it."""

from abc import ABC, abstractmethod

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from hyperattention.cache.budget import CacheBudget
from hyperattention.cache.score_rule import PLAIN, ScoreRule
from hyperattention.types import Partial


class Store(ABC):
    """Keys and values of one layer while a model reads and writes: appended, attended to, settled, over and over.

    A step is `append`, then attention, then `end_step`. While `is_whole` attention over what `append` returned is exact, and
    whoever attends may do it in any way; from then on `attend` is the way. Every store tells its true length (`seen`), so
    that positions stay those of the text, and how many bytes it holds.
    """

    @property
    @abstractmethod
    def seen(self) -> int:
        """Tokens appended so far, padding included."""

    @property
    @abstractmethod
    def batch(self) -> int:
        """Rows of the batch; 0 while nothing is held."""

    @property
    @abstractmethod
    def device(self) -> torch.device | None:
        """Where keys and values lie; None while nothing is held."""

    @property
    @abstractmethod
    def num_slots(self) -> int:
        """Slots of each head that the next query is shown; as many as `append` would return before its new ones."""

    @property
    @abstractmethod
    def num_read(self) -> int:
        """Keys of each head that a query of one more token reads, its own left out."""

    @property
    @abstractmethod
    def is_whole(self) -> bool:
        """Whether every key is held and read."""

    @property
    @abstractmethod
    def memory_bytes(self) -> int:
        """Bytes of all tensors held, room for more included."""

    @abstractmethod
    def append(
        self, k: Float[Tensor, "batch kv_heads new head_dim"], v: Float[Tensor, "batch kv_heads new value_dim"]
    ) -> tuple[Tensor, Tensor]:
        """Take new keys and values in.

        Args:
            k: keys, positions applied.
            v: values.

        Returns:
            the keys and values of all slots, new ones last.
        """

    @abstractmethod
    def mask_padding(self, live: Bool[Tensor, "batch new"]) -> None:
        """Say which of the tokens just appended are padding, before they are attended to.

        Args:
            live: False for padding, which is never read again.
        """

    @abstractmethod
    def attend(self, q: Float[Tensor, "batch heads queries head_dim"], scale: float, rule: ScoreRule = PLAIN) -> Partial:
        """Attend from the tokens just appended, each to what is held and to those up to itself.

        Args:
            q: their queries.
            scale: factor of the scores.
            rule: what the model does to scores beside.

        Returns:
            the rows and their log-sum-exp.
        """

    @abstractmethod
    def end_step(self, q: Float[Tensor, "batch heads queries head_dim"], scale: float, rule: ScoreRule = PLAIN) -> None:
        """End a step: look at its queries, and bring what is held back within the budget.

        Args:
            q: the queries of the tokens just appended.
            scale: factor of the scores.
            rule: what the model does to scores beside.
        """

    @abstractmethod
    def take_rows(self, index: Int[Tensor, " rows"]) -> None:
        """Keep some rows of the batch, repeats allowed: beams that move, sequences that end.

        Args:
            index: which.
        """

    @abstractmethod
    def crop(self, num: int) -> None:
        """Forget the latest tokens, as assisted decoding does with guesses that were wrong.

        Args:
            num: how many.

        Raises:
            ValueError: if they can no longer be told from what they were compressed into.
        """

    @abstractmethod
    def state(self) -> dict[str, Tensor]:
        """Give all that is needed to go on later, by name: tensors alone, numbers as tensors of one.

        Returns:
            the state.
        """

    @abstractmethod
    def restore(self, state: dict[str, Tensor]) -> None:
        """Go on from a state.

        Args:
            state: what `state` gave.

        Raises:
            ValueError: if a tensor is missing, or its shape does not fit the others.
        """

    def move(self, device: torch.device) -> None:
        """Move everything to where attention runs.

        Args:
            device: where.
        """
        self.restore({name: x.to(device) for name, x in self.state().items()})


class StoreFactory(ABC):
    """A way to keep keys that is no `Policy`: a store of its own kind, made for each layer."""

    @abstractmethod
    def store(self, room: CacheBudget, layer: int, seed: int, previous: Store | None) -> Store:
        """Make an empty store.

        Args:
            room: how much each head may hold, or read in a step.
            layer: layer of the model, a counter of every draw.
            seed: seed of every draw.
            previous: the store of the layer before, where there is one: neighbours may share what they chose.

        Returns:
            the store.
        """
