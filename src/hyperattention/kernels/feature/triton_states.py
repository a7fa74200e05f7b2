"""States of the feature kernel in Triton: sums of each chunk of keys by one launch, of all chunks before each by others.

A chunk holds some hundred consecutive positions. Its state is the sum of (expanded) features times values, relative to
exp(largest log scale so far); masses are the same sums for the last number of each value, in float32. Backward needs sums
over the rows that see a key, from the last chunk to the first: the same kernels, with rows as keys, `reverse`.
"""
# kernels are written in Triton's language, which its type stubs do not describe
# pyright: reportGeneralTypeIssues=false, reportArgumentType=false, reportOperatorIssue=false

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from hyperattention.kernels.launch import Launch, precision_of

# numbers of a state that one program carries from chunk to chunk
_SCANNED = 1024


@dataclass(frozen=True)
class Side:
    """Tokens that are summed, or that read sums: all with their heads as lists, contiguous.

    Args:
        features: ``[lists, tokens, features]``.
        values: ``[lists, tokens, width]``.
        last: one more number of each value, ``[lists, tokens]``, float32.
        log_scale: natural log of each token's scale, ``[lists, tokens]``, float32.
        shift: position of the first token; positions decide what is visible.
    """

    features: Tensor
    values: Tensor
    last: Tensor
    log_scale: Tensor
    shift: int


@dataclass(frozen=True)
class Cut:
    """Sizes of programs.

    Args:
        chunk: positions of a chunk; multiple of the others.
        tile: rows of a program that reads.
        block: tokens at once; divides `tile`.
        piece: with power 2, features multiplied with all features at once.
        warps: warps of a program that reads.
        stages: stages of software pipelining.
    """

    chunk: int
    tile: int
    block: int
    piece: int
    warps: int
    stages: int


@dataclass(frozen=True)
class States:
    """Sums over all chunks before each, or with `reverse` over it and all behind it.

    Args:
        state: ``[lists, chunks + 1, expanded, width]`` in the dtype of the features, padded to powers of two.
        mass: ``[lists, chunks + 1, expanded]``, float32.
        top: what they are relative to, ``[lists, chunks + 1]``, float32.
        chunks: number of chunks.
    """

    state: Tensor
    mass: Tensor
    top: Tensor
    chunks: int


def padded(width: int) -> int:
    """Round a width up to what products of matrices need."""
    return max(16, triton.next_power_of_2(width))


def expanded(features: int, cut: Cut, power: int) -> int:
    """Count the rows of a state, padding included."""
    wide = padded(features)
    return wide if power == 1 else triton.cdiv(features, cut.piece) * cut.piece * wide


@triton.jit
def _states_kernel(
    key_ptr, value_ptr, last_ptr, log_ptr, top_ptr, state_ptr, mass_ptr,
    length, shift, chunks, group, rows,
    FEATURES: tl.constexpr, WIDTH: tl.constexpr, WIDE: tl.constexpr, VALUE_WIDE: tl.constexpr,
    CHUNK: tl.constexpr, BLOCK: tl.constexpr, PIECE: tl.constexpr, POWER: tl.constexpr, REVERSE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    owner = (tl.program_id(0) // chunks).to(tl.int64)
    chunk = tl.program_id(0) % chunks
    piece = tl.program_id(1)
    ROWS: tl.constexpr = PIECE * WIDE if POWER == 2 else WIDE
    feature, column, step = tl.arange(0, WIDE), tl.arange(0, VALUE_WIDE), tl.arange(0, BLOCK)
    first = piece * PIECE + tl.arange(0, PIECE)
    # the chunk is part of the sum that this is relative to
    top = tl.load(top_ptr + owner * (chunks + 1) + chunk + (0 if REVERSE else 1))
    state = tl.zeros([ROWS, VALUE_WIDE], tl.float32)
    mass = tl.zeros([ROWS], tl.float32)
    for block in range(0, group * (CHUNK // BLOCK)):
        index = chunk * CHUNK - shift + (block % (CHUNK // BLOCK)) * BLOCK + step
        live = (index >= 0) & (index < length)
        place = (owner * group + block // (CHUNK // BLOCK)) * length + index
        key = tl.load(
            key_ptr + place[None, :] * FEATURES + feature[:, None],
            mask=live[None, :] & (feature[:, None] < FEATURES),
            other=0.0,
        )  # [WIDE, BLOCK]
        value = tl.load(
            value_ptr + place[:, None] * WIDTH + column[None, :],
            mask=live[:, None] & (column[None, :] < WIDTH),
            other=0.0,
        )  # [BLOCK, VALUE_WIDE]
        last = tl.load(last_ptr + place, mask=live, other=0.0)
        scale = tl.exp(tl.load(log_ptr + place, mask=live, other=-float("inf")) - top)
        scaled = key.to(tl.float32) * scale[None, :]
        if POWER == 2:
            others = tl.load(
                key_ptr + place[None, :] * FEATURES + first[:, None],
                mask=live[None, :] & (first[:, None] < FEATURES),
                other=0.0,
            )  # [PIECE, BLOCK]
            scaled = tl.reshape(others.to(tl.float32)[:, None, :] * scaled[None, :, :], [ROWS, BLOCK])
        state = tl.dot(scaled.to(value.dtype), value, state, input_precision=PRECISION)
        mass += tl.sum(scaled * last[None, :], 1)
    row = (owner * chunks + chunk) * rows + piece * ROWS + tl.arange(0, ROWS)
    tl.store(state_ptr + row[:, None] * VALUE_WIDE + column[None, :], state)
    tl.store(mass_ptr + row, mass)


@triton.jit
def _scan_kernel(sums_ptr, top_ptr, result_ptr, chunks, size, SIZE: tl.constexpr, REVERSE: tl.constexpr):
    owner = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * SIZE + tl.arange(0, SIZE)
    inside = at < size
    sums, result = sums_ptr + owner * chunks * size + at, result_ptr + owner * (chunks + 1) * size + at
    tops = top_ptr + owner * (chunks + 1)
    carry = tl.zeros([SIZE], tl.float32)
    for step in range(0, chunks):
        before = chunks - step if REVERSE else step
        after = before - 1 if REVERSE else before + 1
        chunk = after if REVERSE else before
        tl.store(result + tl.cast(before, tl.int64) * size, carry.to(result_ptr.dtype.element_ty), mask=inside)
        # it grows, but from the 0 that stands for no tokens
        fall = tl.exp(tl.minimum(tl.load(tops + before) - tl.load(tops + after), 0.0))
        carry = carry * fall + tl.load(sums + tl.cast(chunk, tl.int64) * size, mask=inside, other=0.0)
    end = 0 if REVERSE else chunks
    tl.store(result + tl.cast(end, tl.int64) * size, carry.to(result_ptr.dtype.element_ty), mask=inside)


def tops_of(side: Side, group: int, chunks: int, cut: Cut, reverse: bool) -> Tensor:
    """Return the largest log scale before each chunk; with `reverse`, in and behind it; 0 where all are -inf.

    Args:
        side: the tokens.
        group: lists that share sums.
        chunks: number of chunks.
        cut: sizes of programs.
        reverse: direction of the sums.

    Returns:
        ``[lists / group, chunks + 1]``.
    """
    log_scale = side.log_scale.unflatten(0, (-1, group)).amax(1)
    # tokens at negative positions take part in nothing
    start = max(0, -side.shift)
    ends = max(0, chunks * cut.chunk - side.shift - log_scale.shape[1])
    log_scale = torch.nn.functional.pad(log_scale[:, start:], (max(0, side.shift), ends), value=-torch.inf)
    largest = log_scale[:, : chunks * cut.chunk].unflatten(1, (chunks, cut.chunk)).amax(2)
    none = largest.new_full((len(largest), 1), -torch.inf)
    if reverse:
        top = torch.cat([none, largest.flip(1)], 1).cummax(1)[0].flip(1)
    else:
        top = torch.cat([none, largest], 1).cummax(1)[0]
    return top.masked_fill(top == -torch.inf, 0.0)


def chunks_of(side: Side, cut: Cut) -> int:
    """Count the chunks from position 0 to the last token."""
    return max(1, triton.cdiv(max(0, side.shift + side.features.shape[1]), cut.chunk))


def empty_states(side: Side, group: int, cut: Cut, power: int, reverse: bool) -> tuple[States, Tensor, Tensor]:
    """Allocate states, and the sums of each chunk that they are made of."""
    lists, chunks = len(side.features) // group, chunks_of(side, cut)
    rows, width = expanded(side.features.shape[2], cut, power), padded(side.values.shape[2])
    x = side.features
    sums = (
        x.new_empty(lists, chunks, rows, width, dtype=torch.float32),
        x.new_empty(lists, chunks, rows, dtype=torch.float32),
    )
    states = States(
        x.new_empty(lists, chunks + 1, rows, width),
        x.new_empty(lists, chunks + 1, rows, dtype=torch.float32),
        tops_of(side, group, chunks, cut, reverse),
        chunks,
    )
    return states, *sums


def launches_states(
    side: Side, group: int, cut: Cut, power: int, reverse: bool, results: tuple[States, Tensor, Tensor]
) -> list[Launch]:
    """Prepare the launches: sums of chunks, then states and masses.

    Args:
        side: the tokens.
        group: lists that share sums.
        cut: sizes of programs.
        power: of products of features.
        reverse: direction of the sums.
        results: as `empty_states` makes them.

    Returns:
        the launches, in order.
    """
    states, sums, masses = results
    features, width = side.features.shape[2], side.values.shape[2]
    rows, wide = expanded(features, cut, power), padded(features)
    pieces = 1 if power == 1 else triton.cdiv(features, cut.piece)
    lists = len(side.features) // group
    arguments = {
        "key_ptr": side.features, "value_ptr": side.values, "last_ptr": side.last, "log_ptr": side.log_scale,
        "top_ptr": states.top, "state_ptr": sums, "mass_ptr": masses,
        "length": side.features.shape[1], "shift": side.shift, "chunks": states.chunks, "group": group, "rows": rows,
        "FEATURES": features, "WIDTH": width, "WIDE": wide, "VALUE_WIDE": padded(width),
        "CHUNK": cut.chunk, "BLOCK": cut.block, "PIECE": cut.piece, "POWER": power, "REVERSE": reverse,
        "PRECISION": precision_of(side.features), "num_warps": 8 if padded(width) > 64 else 4, "num_stages": cut.stages,
    }  # fmt: skip
    launches = [Launch(_states_kernel, (lists * states.chunks, pieces), arguments)]
    for summed, result in ((sums, states.state), (masses, states.mass)):
        size = summed[0, 0].numel()
        scanned = {
            "sums_ptr": summed, "top_ptr": states.top, "result_ptr": result, "chunks": states.chunks, "size": size,
            "SIZE": _SCANNED, "REVERSE": reverse, "num_warps": 4,
        }  # fmt: skip
        launches.append(Launch(_scan_kernel, (lists, triton.cdiv(size, _SCANNED)), scanned))
    return launches


def states_of(side: Side, group: int, cut: Cut, power: int, reverse: bool) -> States:
    """Sum tokens over all chunks before each chunk; with `reverse`, over it and all behind it.

    Args:
        side: the tokens.
        group: lists that share sums.
        cut: sizes of programs.
        power: of products of features.
        reverse: direction of the sums.

    Returns:
        the states.
    """
    results = empty_states(side, group, cut, power, reverse)
    for launch in launches_states(side, group, cut, power, reverse, results):
        launch.run()
    return results[0]
