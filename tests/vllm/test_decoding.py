"""Decoding by the best pages in the real engine: equal to stock where they cover, and the same for every batch where not."""

import pytest

from engines import prompt_of, run_engines
from test_engine import PROMPTS, case

EXACT = {"type": "Exact"}
SIZES = {"sinks": 4, "window": 16}
# reads every key of these requests, by way of its lists
COVERING = {"method": EXACT, "decode": SIZES | {"budget": 2048, "min_length": 64}}
SMALL = {"method": EXACT, "decode": SIZES | {"budget": 64, "min_length": 128}, "audit_every": 3}
LONG = {"max_tokens": 40, "logprobs": 1}
SHARED = PROMPTS[0][:400] + prompt_of(60, 9)
# prompts and decoding approximated together, from places that differ
BOTH = {
    "method": {"type": "Method", "stages": [{"type": "Window", "size": 32}], "tile": 16},
    "min_length": 320,
    "decode": SMALL["decode"],
}
# 13 blocks of 128 tokens do not hold all requests to their ends
TIGHT = {"num_gpu_blocks_override": 14, "max_num_batched_tokens": 256}


@pytest.fixture(scope="module")
def stock(llama):
    return run_engines(
        [case(llama, [PROMPTS], None, LONG), case(llama, [[*PROMPTS, *PROMPTS]], None, {"max_tokens": 140})], plugin=False
    )


@pytest.fixture(scope="module")
def decoded(llama):
    """Engines with the side table: covering and small budgets, batches, chunks, shared prefixes and preemption."""
    cases = {
        "covering": case(llama, [PROMPTS], COVERING | {"audit_every": 2}, LONG, max_num_batched_tokens=128),
        "covering, preempted": case(llama, [[*PROMPTS, *PROMPTS]], COVERING, {"max_tokens": 140}, **TIGHT),
        "alone": case(llama, [[each] for each in [*PROMPTS, SHARED]], SMALL, LONG, enable_prefix_caching=False),
        "batch": case(llama, [PROMPTS], SMALL, LONG),
        "mixed": case(llama, [PROMPTS], SMALL, LONG, max_num_batched_tokens=128),
        "prefix": case(llama, [PROMPTS[:1], [SHARED], PROMPTS[:1]], SMALL, LONG),
        "both": case(llama, [PROMPTS], BOTH, LONG),
        "layer": case(llama, [PROMPTS[:1]], BOTH | {"layers": [1]}, LONG),
    }
    return dict(zip(cases, run_engines(list(cases.values())), strict=True))


def test_tokens_are_those_of_stock_where_the_pages_cover(stock, decoded):
    ours = decoded["covering"]
    assert ours["tokens"] == stock[0]["tokens"]
    found = ours["decoding"]
    # three long requests in two layers; the first token of an answer is computed with the prompt
    assert found["calls"] == 2 * 3 * 39
    assert found["listed_pairs"] == found["exact_pairs"]
    # chunks of 128: the reason of all prompts is the method
    assert set(ours["exact"]) == {"decoding", "prompts"}
    assert ours["exact"]["decoding"] == 2 * 39
    assert ours["approximated"] == 0
    assert found["audits"] in range(found["calls"] // 2, found["calls"] // 2 + 2)
    assert found["error"] < 1e-5


def test_preempted_requests_go_on_as_in_stock_where_the_pages_cover(stock, decoded):
    ours = decoded["covering, preempted"]
    assert ours["preemptions"] > 0
    assert ours["tokens"] == stock[1]["tokens"]
    assert ours["decoding"]["calls"] > 2 * 6 * 100


def test_a_small_budget_reads_few_pairs_and_changes_tokens(stock, decoded):
    ours = decoded["batch"]
    found = ours["decoding"]
    assert found["calls"] == 2 * 3 * 39
    # 64 keys of about 500
    assert 0.08 < found["listed_pairs"] / found["exact_pairs"] < 0.16
    assert ours["tokens"] != stock[0]["tokens"]
    assert found["audits"] in range(found["calls"] // 3, found["calls"] // 3 + 2)
    assert 0.05 < found["error"] < 3.0


@pytest.mark.parametrize("name", ["batch", "mixed"])
def test_a_request_has_the_same_tokens_in_every_batch(decoded, name):
    assert decoded[name]["tokens"] == decoded["alone"]["tokens"][:4]


def test_a_shared_prefix_has_its_summaries(decoded):
    ours = decoded["prefix"]
    assert ours["cached"][1] >= 256
    assert ours["cached"][2] >= 512
    alone = decoded["alone"]["tokens"]
    assert ours["tokens"] == [alone[0], alone[4], alone[0]]


def test_prompts_and_decoding_are_approximated_in_one_engine_and_counted_apart(decoded):
    ours = decoded["both"]
    assert ours["approximated"] == 2 * 2
    assert ours["listed_pairs"] / ours["exact_pairs"] < 0.2
    assert ours["decoding"]["calls"] == 2 * 3 * 39
    # two short prompts, and the first chunk of one that did not fit the first step
    assert ours["exact"]["below min_length"] == 2 * 3
    one = decoded["layer"]
    assert (one["approximated"], one["decoding"]["calls"]) == (1, 39)
    assert (one["exact"]["layer not listed"], one["exact"]["decoding"]) == (1, 39)


@pytest.mark.parametrize("name", ["speculative", "page", "memory"])
def test_engines_that_cannot_keep_the_table_are_refused_at_their_start(refused, name):
    messages = {
        "speculative": "start vLLM without --speculative-config",
        "page": "a block of 128 keys is no whole number of pages of 24",
        "memory": "beside vLLM's memory, and `memory_gib` of `decode` allows 0.001",
    }
    assert messages[name] in refused[name].get("error", "it started")


@pytest.fixture(scope="module")
def refused(llama):
    speculative = {"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 3}
    page = {"decode": {"budget": 512, "policy": {"type": "TopPages", "page": 24}}}
    memory = {"decode": {"budget": 512, "memory_gib": 0.001}}
    cases = {
        "page": case(llama, [], page),
        "memory": case(llama, [], memory),
        # the last one: on a CPU vLLM replaces Triton's functions for it, and no engine starts in the process afterwards
        "speculative": case(llama, [], SMALL, speculative_config=speculative),
    }
    return dict(zip(cases, run_engines(list(cases.values())), strict=True))
