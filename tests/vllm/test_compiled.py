"""Models that vLLM compiles, as it does without --enforce-eager: the plugin runs outside their graphs, and adds none."""

import shutil

import pytest

from engines import run_engines
from test_decoding import BOTH, COVERING, PROMPTS
from test_engine import COVERING as EVERY_KEY
from test_engine import case

pytestmark = pytest.mark.skipif(
    shutil.which("g++") is None, reason="vLLM compiles for a CPU with g++, which is not there; --enforce-eager needs none"
)
# logprobs would have vLLM's sampler compiled during the first request
SAMPLING = {"max_tokens": 20}
COMPILED = {"enforce_eager": False, "max_num_batched_tokens": 256}
COVERED = COVERING | {"method": EVERY_KEY, "min_length": 32, "audit_every": 4}
SMALL = BOTH | {"audit_every": 1}
# other lengths of prompts, chunks and batches than those at the start
BATCHES = [PROMPTS[:1], PROMPTS[1:], PROMPTS]


@pytest.fixture(scope="module")
def stock(llama):
    # options are not read without the plugin, but vLLM keeps compiled code by them: the plugin's engines find it
    return run_engines([case(llama, BATCHES, COVERED, SAMPLING, **COMPILED)], plugin=False)[0]


@pytest.fixture(scope="module")
def ours(llama):
    """The plugin in graphs of Inductor, in pieces of a graph, and without any graph."""
    cases = {
        "covering": case(llama, BATCHES, COVERED, SAMPLING, **COMPILED),
        "compiled": case(llama, BATCHES, SMALL, SAMPLING, **COMPILED),
        "pieces": case(llama, BATCHES, SMALL, SAMPLING, **COMPILED) | {"pieces": True},
        "eager": case(llama, BATCHES, SMALL, SAMPLING, max_num_batched_tokens=256),
    }
    return dict(zip(cases, run_engines(list(cases.values())), strict=True))


def test_tokens_are_those_of_stock_vllm_compiled_where_the_budget_covers(stock, ours):
    found = ours["covering"]
    assert found["tokens"] == stock["tokens"]
    # steps of 256 tokens: three chunks of the longest prompt in a batch of its own, and in each of two layers
    assert found["approximated"] > 2 * 3
    assert found["listed_pairs"] == found["exact_pairs"]
    assert found["decoding"]["calls"] == 2 * 6 * 19
    assert found["decoding"]["listed_pairs"] == found["decoding"]["exact_pairs"]
    assert found["audits"] == found["approximated"] // 4
    assert found["error"] < 1e-5
    assert found["decoding"]["error"] < 1e-5


@pytest.mark.parametrize("name", ["compiled", "pieces"])
def test_tokens_and_counts_are_those_without_compilation_where_keys_are_left_out(stock, ours, name):
    found, eager = ours[name], ours["eager"]
    assert found["tokens"] == eager["tokens"] != stock["tokens"]
    assert found["approximated"] > 0
    assert 0 < found["listed_pairs"] / found["exact_pairs"] < 0.2
    assert found["decoding"]["calls"] == 2 * 6 * 19
    assert 0.08 < found["decoding"]["listed_pairs"] / found["decoding"]["exact_pairs"] < 0.16
    assert found["audits"] == found["approximated"]
    for key in ("approximated", "exact", "listed_pairs", "exact_pairs", "audits"):
        assert found[key] == eager[key]
    for key in ("calls", "listed_pairs", "exact_pairs", "audits"):
        assert found["decoding"][key] == eager["decoding"][key]
    # sums of other orders
    assert found["error"] == pytest.approx(eager["error"], rel=0.01)
    assert found["decoding"]["error"] == pytest.approx(eager["decoding"]["error"], rel=0.01)


def test_the_plugin_adds_no_graph_and_no_break_at_any_length(stock, ours):
    # one graph of the whole model, with attention as an operator that is not looked into
    for found in (stock, ours["covering"], ours["compiled"]):
        assert found["compiled"] == {"graphs": 1, "breaks": 0, "pieces": 0, "compiled pieces": 0}
    # two layers: their attention is cut out, and three pieces are left
    assert ours["pieces"]["compiled"] == {"graphs": 1, "breaks": 0, "pieces": 5, "compiled pieces": 3}
    for found in (stock, *ours.values()):
        assert set(found["compiled_later"].values()) == {0}
    assert set(ours["eager"]["compiled"].values()) == {0}
