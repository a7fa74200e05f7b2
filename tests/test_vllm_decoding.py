"""Decoding by the best pages of vLLM's cache, without vLLM: the side table, the choice of keys, and what is refused."""

from dataclasses import replace

import pytest
import torch

import hyperattention as ha
from assertions import assert_exact
from hyperattention.cache.budget import CacheBudget
from hyperattention.cache.page_rank import Bounds, Midpoint, TwoLevels
from hyperattention.integrations.vllm.decode_options import DecodeOptions
from hyperattention.integrations.vllm.decoding import attend_to_best_pages, decoded_rows
from hyperattention.integrations.vllm.options import read_options
from hyperattention.integrations.vllm.page_summaries import PageSummaries, filled_pages
from hyperattention.integrations.vllm.pages import CachePages, KeyOrder
from hyperattention.integrations.vllm.served_layers import LayerTraits, check_layer
from hyperattention.integrations.vllm.side_tables import EngineTraits, TableShape, check_engine, check_memory
from hyperattention.integrations.vllm.split import Piece
from hyperattention.policies import TopPages

BLOCK, PAGE, HEADS, WIDTH, BLOCKS = 16, 4, 2, 8, 24
ENGINE = EngineTraits(speculative=False, transfers=False, overlaps=False, block_size=128, kernel_block_size=128, blocks=100)
ORDERS = [*KeyOrder, None]


class Server:
    """A cache in any order of vLLM, with its side table, and requests whose keys and values are known."""

    def __init__(self, order, by):
        self.pages = CachePages(WIDTH, order)
        self.cache = torch.full((BLOCKS, HEADS, BLOCK, 2 * WIDTH), torch.nan)
        shape = {"blocks": BLOCKS, "block_size": BLOCK, "heads": HEADS, "head_dim": WIDTH}
        self.table = PageSummaries.empty(by, PAGE, **shape, like=self.cache)

    def write(self, blocks, k, v, begin):
        """Write keys of positions from `begin` on, as a step does: first the cache, then the table."""
        key, value = self.pages.views(self.cache)
        position = torch.arange(begin, begin + k.shape[1])
        slots = blocks[position // BLOCK] * BLOCK + position % BLOCK
        for held, new in ((key, k), (value, v)):
            held[slots // BLOCK, :, slots % BLOCK] = new.transpose(0, 1)
        padded = torch.cat([slots, torch.tensor([-1, -1])])
        self.table.renew(key, filled_pages(padded, PAGE))

    def decode(self, q, blocks, keys, options):
        (row,) = decoded_rows([Piece(0, 0, 1, keys)], blocks[None], BLOCK, options)
        return attend_to_best_pages(q, self.pages, self.cache, self.table, row, 0.5)


def drawn(count, seed):
    return torch.randn(2, HEADS, count, WIDTH, generator=torch.Generator().manual_seed(seed)).unbind()


def options_for(by, budget=40, sinks=4, window=6):
    return DecodeOptions(CacheBudget(budget, sinks, window), TopPages(by, PAGE))


def stored(k, v, q, options):
    """The same step of the library's own store, which holds the keys of one request in order."""
    store = options.policy.store(options.budget, 0, 0, None)
    rows = q[None, :, None]
    store.append(k[None, :, :-1], v[None, :, :-1])
    store.end_step(rows, 0.5)
    store.append(k[None, :, -1:], v[None, :, -1:])
    return store.attend(rows, 0.5).out[0, :, 0]


@pytest.mark.parametrize("by", [Bounds(0.5), Midpoint(), TwoLevels(keep=0.2)], ids=["bounds", "midpoint", "two levels"])
@pytest.mark.parametrize("order", ORDERS, ids=str)
def test_a_request_in_blocks_reads_what_the_store_of_its_keys_reads(order, by):
    server, options = Server(order, by), options_for(by, budget=48, sinks=8)
    (k, v), q = drawn(150, 1), torch.randn(6, WIDTH, generator=torch.Generator().manual_seed(2))
    # sinks of large scores: where pairs of pages are ranked first, theirs leaves no room for others, and pages are missing
    k[:, :8] += 2 * q.unflatten(0, (HEADS, -1)).mean(1)[:, None]
    blocks = torch.randperm(BLOCKS, generator=torch.Generator().manual_seed(3))[:10]
    for begin, end in ((0, 61), (61, 140), *((at, at + 1) for at in range(140, 150))):
        server.write(blocks, k[:, begin:end], v[:, begin:end], begin)
        if end >= 140:
            ours, theirs = server.decode(q, blocks, end, options), stored(k[:, :end], v[:, :end], q, options)
            assert_exact(ours, theirs)


def test_shared_reused_and_recomputed_blocks_have_the_summaries_of_their_keys():
    server, options = Server(None, Bounds(0.5)), options_for(Bounds(0.5))
    generator = torch.Generator().manual_seed(4)
    free, live = list(range(BLOCKS)), []
    # requests begin, some on a prefix of another, and end; their blocks are used again
    for turn in range(40):
        while len(free) < 8 or (live and turn % 5 == 4):
            ended = live.pop(int(torch.randint(len(live), (), generator=generator)))[2].tolist()
            free += set(ended) - {block for each in live for block in each[2].tolist()}
        length = int(torch.randint(50, 90, (), generator=generator))
        k, v = drawn(length, turn)
        count, begin = -(-length // BLOCK), 0
        own = [free.pop(int(torch.randint(len(free), (), generator=generator))) for _ in range(count)]
        if live and turn % 2:
            begin = 2 * BLOCK
            free += own[:2]
            own[:2] = live[0][2][:2].tolist()
            k[:, :begin], v[:, :begin] = live[0][0][:, :begin], live[0][1][:, :begin]
        blocks = torch.tensor(own)
        cut = int(torch.randint(begin + 1, length, (), generator=generator))
        # the tail of a first attempt is written over, as after a preemption
        server.write(blocks, k[:, begin:cut].flip(1), v[:, begin:cut], begin)
        server.write(blocks, k[:, begin:cut], v[:, begin:cut], begin)
        server.write(blocks, k[:, cut:], v[:, cut:], cut)
        live.append((k, v, blocks))
        for k, v, blocks in live:
            full = k.shape[1] // PAGE
            expected = Bounds(0.5).summarise(k[None, :, : full * PAGE].unflatten(2, (full, PAGE)))
            assert torch.equal(server.table.of_blocks(blocks)[:, :, :full], expected)
            q = torch.randn(2, WIDTH, generator=generator)
            assert_exact(server.decode(q, blocks, k.shape[1], options), stored(k, v, q, options))


@pytest.mark.parametrize("by", [Bounds(0.5), TwoLevels(keep=1.0)], ids=["bounds", "two levels"])
@pytest.mark.parametrize("keys", [1, 3, 7, 8, 31, 32, 33, 100])
def test_a_budget_that_covers_is_exact(keys, by):
    server, (k, v), q = Server(None, by), drawn(keys, 5), torch.randn(4, WIDTH, generator=torch.Generator().manual_seed(6))
    blocks = torch.arange(BLOCKS).flip(0)
    server.write(blocks, k, v, 0)
    ours = server.decode(q, blocks, keys, options_for(by, budget=200))
    expected = ha.attention(q[None, :, None], k[None], v[None], method=ha.Exact(), scale=0.5, enable_gqa=True)
    assert_exact(ours, expected[0, :, 0])


@pytest.mark.parametrize("keys", [1, 20, 40, 41, 150, 10_000])
@pytest.mark.parametrize("sinks", [0, 3, 4])
def test_a_step_reads_no_more_than_its_budget_and_no_key_twice(keys, sinks):
    options = options_for(Bounds(0.5), sinks=sinks)
    plan = options.plan(keys)
    assert plan.slots <= min(keys, options.budget.budget)
    assert plan.sinks % PAGE == plan.recent % PAGE == 0
    assert plan.sinks <= plan.recent <= max(0, keys - options.budget.window - 1)
    if keys > 100:
        # what is left over is less than a page and the page at the edge of the window
        assert plan.slots > options.budget.budget - 2 * PAGE
        assert plan.sinks >= sinks


def test_a_budget_that_does_not_cover_reads_the_best_pages():
    """One key far from the window gets nearly all attention: it is found, and is missed where its page is not summarised."""
    server, (k, v) = Server(None, Bounds(0.5)), drawn(200, 7)
    blocks, options = torch.arange(BLOCKS), options_for(Bounds(0.5))
    q = torch.zeros(2, WIDTH).index_fill_(1, torch.tensor([0]), 1.0)
    k[:, 101, 0] = 60.0
    server.write(blocks, k, v, 0)
    assert_exact(server.decode(q, blocks, 200, options), v[:, 101])
    server.table.held.zero_()
    assert float((server.decode(q, blocks, 200, options) - v[:, 101]).norm()) > 0.5


def test_options_of_decoding_are_read():
    def read(value):
        return read_options({"hyperattention": {"decode": value}}).decode

    assert read("exact") is None
    assert read({"budget": 1024}) == DecodeOptions(CacheBudget(1024))
    assert DecodeOptions(CacheBudget(1024)).least == 20_480
    assert DecodeOptions(CacheBudget(4096)).least == 32_768
    given = {"budget": 512, "sinks": 8, "window": 64, "min_length": 3, "memory_gib": 0.5}
    found = read(given | {"policy": {"type": "TopPages", "page": 16, "by": {"type": "Midpoint"}}})
    assert found == DecodeOptions(CacheBudget(512, 8, 64), TopPages(Midpoint(), 16), 3, 0.5)
    assert DecodeOptions(CacheBudget(512), min_length=3).least == 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"speculative": True}, "without --speculative-config"),
        ({"transfers": True}, "without --kv-transfer-config"),
        ({"overlaps": True}, "without --enable-dbo"),
        ({"kernel_block_size": 64}, "cuts blocks of 128 keys into blocks of 64 .* --block-size 64"),
        ({"block_size": 20, "kernel_block_size": 20}, "block of 20 keys is no whole number of pages of 8"),
    ],
    ids=str,
)
def test_engines_that_do_not_keep_summaries_right_are_refused(changes, message):
    options = DecodeOptions(CacheBudget(512))
    check_engine(ENGINE, options)
    with pytest.raises(ValueError, match=message):
        check_engine(replace(ENGINE, **changes), options)


def test_the_memory_of_all_tables_is_that_of_the_allocated_ones_and_is_limited():
    options = DecodeOptions(CacheBudget(512), memory_gib=0.01)
    shape = TableShape(2, 64, torch.bfloat16)
    table = shape.allocate(ENGINE, options, torch.device("cpu"))
    assert table.held.dtype == torch.bfloat16
    # an eighth of keys and values, with pages of eight
    assert table.memory_bytes == shape.memory_bytes(ENGINE, options) == 2 * 100 * 128 * 2 * 64 * 2 // 8
    assert check_memory([shape] * 3, ENGINE, options) == 3 * table.memory_bytes
    with pytest.raises(ValueError, match=r"100 blocks in 20 layers take 0.0153 GiB .* allows 0.01: give a larger `page`"):
        check_memory([shape] * 20, ENGINE, options)


def test_a_layer_that_reads_the_keys_of_another_is_refused_for_decoding():
    traits = LayerTraits("decoder", None, False, False, False, "auto", False, "model.layers.3")
    check_layer("model.layers.9", traits)
    with pytest.raises(ValueError, match=r"model.layers.9 reads the keys of model.layers.3, .* name the layers with keys"):
        check_layer("model.layers.9", traits, selects=True)
