"""Masks of transformers models in a compact form, without a dense mask in the common cases.

A model builds one mask per forward pass and passes it to every layer. The mask has one of these forms:

- ``None``: only the module's own causality; the last key has the position of the last query;
- bool ``[batch, live]``: causal over the first ``live`` keys (a static cache holds more), True = attend;
- int32 ``[batch, tokens]``: causal within each document of a packed batch, numbered from 1;
- bool ``[batch, 1, 1, keys]``: not causal, True = attend;
- any other 4-D tensor: a dense mask, which only exact attention supports.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.masking_utils import bidirectional_mask_function, causal_mask_function, create_causal_mask, sdpa_mask

# older versions (before some version between 5.9 and 5.16) request a dense mask for every prompt with a static cache
_CALLERS_DECIDE = "allow_is_causal_skip" in inspect.signature(create_causal_mask).parameters


@dataclass(frozen=True)
class Pattern:
    """The meaning of a mask function, read from its closures.

    Args:
        causal: whether later keys are hidden from a query.
        window: largest number of keys that a query sees, its own included; None for no window.
        documents: ``[batch, tokens]``, equal numbers for tokens of one packed document.
    """

    causal: bool = False
    window: int | None = None
    documents: Tensor | None = None

    def reaches(self, documents: Tensor) -> bool:
        """Return whether the window, if there is one, covers the longest document and so hides no key.

        Args:
            documents: ``[batch, tokens]`` document numbers.

        Returns:
            True if only causality within documents hides keys.
        """
        return self.window is None or longest_span(document_bounds(documents)) <= self.window


def read_pattern(mask_function: Callable) -> Pattern | None:
    """Recognise the mask functions that transformers composes for causal, windowed and packed models.

    The composition is a tree of closures without a public description, so each closure is recognised by its factory.
    Unknown parts (a user's mask, chunks, bidirectional blocks) are not guessed.

    Args:
        mask_function: the argument of a mask function registered in ``AttentionMaskInterface``.

    Returns:
        the pattern, or None if some part is unknown.
    """
    if mask_function is causal_mask_function:
        return Pattern(causal=True)
    if not inspect.isfunction(mask_function) or mask_function.__module__ != causal_mask_function.__module__:
        return None
    cells = inspect.getclosurevars(mask_function).nonlocals
    match mask_function.__qualname__.partition(".")[0]:
        case "and_masks":
            return _intersect([read_pattern(part) for part in cells["mask_functions"]])
        case "sliding_window_overlay":
            return Pattern(window=cells["sliding_window"])
        case "packed_sequence_mask_function":
            return Pattern(documents=cells["packed_sequence_mask"])
        case "remap_positions_for_packed_sequence":
            # positions increase by one inside a document, so the distances that causality and windows use are unchanged
            return read_pattern(cells["mask_function"])
        case _:
            return None


def _intersect(parts: list[Pattern | None]) -> Pattern | None:
    known = [part for part in parts if part is not None]
    windows = [part.window for part in known if part.window is not None]
    documents = [part.documents for part in known if part.documents is not None]
    if len(known) != len(parts) or len(windows) > 1 or len(documents) > 1:
        return None
    return Pattern(
        any(part.causal for part in known),
        windows[0] if windows else None,
        documents[0] if documents else None,
    )


def build_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: Any = 0,
    kv_offset: Any = 0,
    mask_function: Callable = causal_mask_function,
    attention_mask: Tensor | None = None,
    allow_is_causal_skip: bool = True,
    allow_is_bidirectional_skip: bool = False,
    **options: Any,
) -> Tensor | None:
    """Build the mask of one forward pass; the function registered in ``AttentionMaskInterface``.

    Args:
        batch_size: rows of the batch.
        q_length: number of queries.
        kv_length: number of keys, unwritten slots of a static cache included.
        q_offset: position of the first query, an integer; a 0-d tensor for static caches.
        kv_offset: position of the first key; in some versions a 0-d tensor after a crop.
        mask_function: predicate of (batch, head, query, key) composed by transformers.
        attention_mask: ``[batch, positions]``, True = attend.
        allow_is_causal_skip: False if the caller needs a dense mask in every case.
        allow_is_bidirectional_skip: True if a mask that hides no key may be None.
        options: further arguments of ``sdpa_mask``.

    Returns:
        one of the forms listed in the docstring of this module.
    """

    def dense(may_skip: bool) -> Tensor | None:
        return sdpa_mask(
            batch_size=batch_size,
            q_length=q_length,
            kv_length=kv_length,
            q_offset=q_offset,
            kv_offset=kv_offset,
            mask_function=mask_function,
            attention_mask=attention_mask,
            allow_is_causal_skip=may_skip,
            allow_is_bidirectional_skip=allow_is_bidirectional_skip,
            **options,
        )

    if q_length == 1 or (isinstance(q_offset, Tensor) and torch.compiler.is_compiling()):
        return dense(allow_is_causal_skip and q_length == 1)
    kv_offset = int(kv_offset)
    keys_mask = _slice_padding(attention_mask, kv_offset, kv_length)
    if mask_function is bidirectional_mask_function and allow_is_bidirectional_skip:
        return None if keys_mask is None or _hides_nothing(keys_mask) else keys_mask[:, None, None, :]
    pattern = read_pattern(mask_function)
    live = int(q_offset) + q_length - kv_offset
    if pattern is None or not pattern.causal or not 0 < live <= kv_length:
        return dense(False)
    if pattern.documents is not None:
        documents = pattern.documents.to(torch.int32) + 1
        whole = keys_mask is None and live == kv_length
        return documents if whole and pattern.reaches(documents) else dense(False)
    if (_CALLERS_DECIDE and not allow_is_causal_skip) or (pattern.window is not None and pattern.window < live):
        return dense(False)
    if live < kv_length and keys_mask is None:
        keys_mask = torch.ones(batch_size, kv_length, dtype=torch.bool, device=options.get("device"))
    return _causal_mask(keys_mask, live)


def _slice_padding(attention_mask: Tensor | None, kv_offset: int, kv_length: int) -> Tensor | None:
    if attention_mask is None:
        return None
    missing = kv_offset + kv_length - attention_mask.shape[-1]
    padded = torch.nn.functional.pad(attention_mask, (0, missing)) if missing > 0 else attention_mask
    return padded[:, kv_offset : kv_offset + kv_length].bool()


def _hides_nothing(keys_mask: Tensor) -> bool:
    # reading the mask would break a graph during compilation, so the mask is passed on there
    return not torch.compiler.is_compiling() and bool(keys_mask.all())


def _causal_mask(keys_mask: Tensor | None, live: int) -> Tensor | None:
    if keys_mask is None or (live == keys_mask.shape[1] and _hides_nothing(keys_mask)):
        return None
    # the attention function reads the number of written slots of a static cache from the width of the mask
    return keys_mask[:, :live].contiguous()


def document_bounds(documents: Tensor) -> Tensor:
    """Compute the cumulative lengths for a varlen call from document numbers, with the rows concatenated.

    Args:
        documents: ``[batch, tokens]``; a document ends where the number changes or the row ends.

    Returns:
        int32 ``[documents + 1]``, from 0 to batch * tokens.
    """
    starts = torch.ones_like(documents, dtype=torch.bool)
    starts[:, 1:] = documents[:, 1:] != documents[:, :-1]
    total = torch.tensor([documents.numel()], dtype=torch.int64, device=documents.device)
    return torch.cat([starts.flatten().nonzero()[:, 0], total]).to(torch.int32)


def longest_span(bounds: Tensor) -> int:
    """Compute the length of the longest document of a packed batch; no query looks back further.

    Args:
        bounds: cumulative lengths.

    Returns:
        the number of tokens of the longest document.
    """
    return int(bounds.diff().max()) if bounds.numel() > 1 else 0
