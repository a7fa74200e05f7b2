"""What a transformers model says about who sees whom, in a form that never needs a dense mask for the common cases.

A model builds one mask per forward pass and hands it to every layer, so the mask carries the geometry:

- ``None``: nothing to add to the module's own causality, keys ending with the queries;
- bool ``[batch, live]``: causal over the first ``live`` keys (a static cache holds more), True = attend;
- int32 ``[batch, tokens]``: causal within each document of a packed batch, numbered from 1;
- bool ``[batch, 1, 1, keys]``: not causal, True = attend;
- any other 4-D tensor: a dense mask, which only exact attention honours.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.masking_utils import bidirectional_mask_function, causal_mask_function, create_causal_mask, sdpa_mask

# before callers could ask for a dense mask, somewhere between 5.9 and 5.16, static caches did so for every prompt
_CALLERS_DECIDE = "allow_is_causal_skip" in inspect.signature(create_causal_mask).parameters


@dataclass(frozen=True)
class Pattern:
    """What a mask function means, once its closures are read.

    Args:
        causal: whether a query is kept from later keys.
        window: how many keys, itself included, a query sees at most.
        documents: ``[batch, tokens]``, equal numbers for tokens of one packed document.
    """

    causal: bool = False
    window: int | None = None
    documents: Tensor | None = None

    def reaches(self, documents: Tensor) -> bool:
        """Return whether the window, if any, covers the longest document, so that it hides nothing.

        Args:
            documents: ``[batch, tokens]`` document numbers.

        Returns:
            True where causality within documents is all there is.
        """
        return self.window is None or longest_span(document_bounds(documents)) <= self.window


def read_pattern(mask_function: Callable) -> Pattern | None:
    """Recognise the mask functions that transformers composes for causal, windowed and packed models.

    The composition is a tree of closures without a public description, so each is recognised by the factory that made it;
    anything unknown (a user's mask, chunks, bidirectional blocks) is refused rather than guessed.

    Args:
        mask_function: as given to a mask function registered in ``AttentionMaskInterface``.

    Returns:
        the pattern, or None where some part is unknown.
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
            # positions rise by one inside a document, so distances, all that causality and windows use, are unchanged
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
    """Describe who sees whom for one forward pass; the function registered in ``AttentionMaskInterface``.

    Args:
        batch_size: rows of the batch.
        q_length: number of queries.
        kv_length: number of keys held, unwritten slots of a static cache included.
        q_offset: position of the first query, an integer; a 0-d tensor for static caches.
        kv_offset: position of the first key; a 0-d tensor where some versions cropped.
        mask_function: predicate of (batch, head, query, key) composed by transformers.
        attention_mask: ``[batch, positions]``, True = attend.
        allow_is_causal_skip: False where the caller wants a dense mask whatever it says.
        allow_is_bidirectional_skip: True where a mask that hides nothing may be None.
        options: what ``sdpa_mask`` takes beside these.

    Returns:
        one of the forms listed at the head of this module.
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
    # reading the mask would break a graph that is being compiled, where it is passed on instead
    return not torch.compiler.is_compiling() and bool(keys_mask.all())


def _causal_mask(keys_mask: Tensor | None, live: int) -> Tensor | None:
    if keys_mask is None or (live == keys_mask.shape[1] and _hides_nothing(keys_mask)):
        return None
    # the width tells the attention function where the live keys of a static cache end, padded or not
    return keys_mask[:, :live].contiguous()


def document_bounds(documents: Tensor) -> Tensor:
    """Turn document numbers into the cumulative lengths of a varlen call, rows laid end to end.

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
    """Measure the longest document of a packed batch, which bounds how far back a query looks.

    Args:
        bounds: cumulative lengths.

    Returns:
        its number of tokens.
    """
    return int(bounds.diff().max()) if bounds.numel() > 1 else 0
