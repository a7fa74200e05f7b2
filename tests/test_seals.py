"""Seals of messages: rows come back as they were, and every damage of a byte, an order or a size is seen."""

import pytest
import torch

from hyperattention.distributed.seal import SIZE, Seals

COUNTS = (3, 0, 5, 1)
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.int64, torch.bool]


def sent(dtype: torch.dtype, width: int = 3, what: int = 7) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Give rows that rank 1 sends, and the messages, by rank."""
    draw = torch.Generator().manual_seed(1)
    rows = (
        torch.randint(0, 2, (sum(COUNTS), width), generator=draw).to(dtype)
        if dtype == torch.bool
        else (torch.randn(sum(COUNTS), width, generator=draw).mul(100).to(dtype))
    )
    each = width * rows.element_size()
    sizes = [count and count * each + SIZE for count in COUNTS]
    return rows, list(Seals(what, 1).close(rows, COUNTS).split(sizes))


def read(
    message: torch.Tensor, rows: int, like: torch.Tensor, rank: int = 2, what: int = 7
) -> tuple[torch.Tensor, list[int]]:
    """Open what came from rank 1."""
    return Seals(what, rank).open(message, (0, rows, 0, 0), like)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_come_back(dtype):
    rows, messages = sent(dtype)
    for rank, part in enumerate(rows.split(COUNTS)):
        found, damaged = read(messages[rank], len(part), rows, rank)
        assert not damaged
        assert found.dtype == dtype
        assert torch.equal(found, part)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_damaged_byte_is_seen(dtype):
    rows, messages = sent(dtype)
    # the bytes of a number of the type bool are 0 or 1
    for at in range(len(messages[2])):
        message = messages[2].clone()
        message[at] ^= 1
        assert read(message, 5, rows)[1] == [1]


def test_another_order_size_or_message_is_seen():
    rows, messages = sent(torch.float32)
    each = 3 * 4
    swapped = messages[2].clone()
    swapped[:each], swapped[each : 2 * each] = messages[2][each : 2 * each], messages[2][:each]
    short = torch.cat([messages[2][:each], torch.zeros(len(messages[2]) - each, dtype=torch.uint8)])
    assert read(messages[2], 5, rows)[1] == []
    assert read(swapped, 5, rows)[1] == [1]
    assert read(short, 5, rows)[1] == [1]
    assert read(torch.zeros_like(short), 5, rows)[1] == [1]
    # for another rank, and of another exchange
    assert read(messages[2], 5, rows, rank=0)[1] == [1]
    assert read(messages[2], 5, rows, what=8)[1] == [1]
    assert Seals(7, 2).open(messages[2], (5, 0, 0, 0), rows)[1] == [0]


def test_nothing_is_sent_where_nothing_goes():
    rows = torch.empty(0, 4)
    assert not len(Seals(7, 1).close(rows, (0, 0)))
    found, damaged = Seals(7, 1).open(torch.empty(0, dtype=torch.uint8), (0, 0), rows)
    assert (tuple(found.shape), damaged) == ((0, 4), [])
