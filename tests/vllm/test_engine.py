"""The real engine with a tiny random Llama: what equals stock vLLM, and what a batch or a chunk may not change."""

import pytest
import torch

from engines import prompt_of, run_engines

# reads every key of these prompts, by way of the method's own lists
COVERING = {
    "type": "Method",
    "stages": [{"type": "Sinks", "num": 4}, {"type": "Window", "size": 32}, {"type": "Draw", "num": 1024}],
    "tile": 16,
}
BY_PLACE = {
    "type": "Method",
    "stages": [{"type": "Sinks", "num": 4}, {"type": "Window", "size": 32}, {"type": "Draw", "num": 32}],
    "tile": 16,
}
# keys of a tile are chosen by all of its queries
BY_TILE = {
    "type": "Method",
    "stages": [
        {"type": "Sinks", "num": 4},
        {"type": "Window", "size": 32},
        {"type": "DrawAlike", "num": 32, "rows": 16, "pooled": 4},
    ],
    "tile": 32,
}
ALIGNED = "hyperattention.integrations.vllm.scheduler.AlignedScheduler"
PROMPTS = [prompt_of(700, 1), prompt_of(3, 2), prompt_of(300, 3), prompt_of(451, 4)]
GREEDY = {"max_tokens": 12, "logprobs": 1}


def case(model, batches, options=None, sampling=GREEDY, **llm):
    llm = {"max_model_len": 1024, "max_num_seqs": 8, "max_num_batched_tokens": 1024} | llm
    if options is not None:
        llm["additional_config"] = {"hyperattention": options}
    return {"model": model, "batches": batches, "sampling": sampling, "llm": llm}


@pytest.fixture(scope="module")
def stock(llama):
    """Stock vLLM: the prompts together, in small chunks, and each alone with the loss of its tokens."""
    loss = {"max_tokens": 1, "prompt_logprobs": 1}
    return run_engines(
        [
            case(llama, [PROMPTS]),
            case(llama, [PROMPTS], max_num_batched_tokens=128),
            case(llama, [PROMPTS[:1]], sampling=loss),
        ],
        plugin=False,
    )


def difference(a, b):
    """Largest difference of two losses, token by token."""
    a, b = (torch.tensor([loss for loss, _ in each], dtype=torch.float64) for each in (a, b))
    return float((a - b).abs().max())


@pytest.fixture(scope="module")
def covered(llama):
    options = {"method": COVERING, "min_length": 32}
    return run_engines(
        [
            case(llama, [PROMPTS], options | {"audit_every": 2}),
            case(llama, [PROMPTS], options, max_num_batched_tokens=128),
            # cached prefixes: the second batch shares the first 400 tokens of the first
            case(llama, [[PROMPTS[0]], [PROMPTS[0][:400] + prompt_of(60, 9)], [PROMPTS[0]]], options),
            # 13 blocks of 128 tokens do not hold all requests to their ends
            case(
                llama,
                [[*PROMPTS, *PROMPTS]],
                options,
                {"max_tokens": 140},
                num_gpu_blocks_override=14,
                max_num_batched_tokens=256,
            ),
        ]
    )


@pytest.mark.parametrize("number", [0, 1], ids=["one chunk", "chunks of 128"])
def test_tokens_are_those_of_stock_where_the_budget_covers(stock, covered, number):
    ours = covered[number]
    assert ours["tokens"] == stock[number]["tokens"]
    assert ours["approximated"] >= 2 * 3
    assert ours["exact"]["decoding"] > 0
    # a mixed batch: prompts were computed while others generated
    assert stock[1]["tokens"] == stock[0]["tokens"]


def test_a_shared_prefix_is_read_from_the_cache(covered, llama):
    ours = covered[2]
    assert ours["cached"][0] == 0
    assert ours["cached"][1] >= 256
    assert ours["cached"][2] >= 512
    assert ours["tokens"][2] == ours["tokens"][0]
    (alone,) = run_engines([case(llama, [[PROMPTS[0][:400] + prompt_of(60, 9)]])], plugin=False)
    assert ours["tokens"][1] == alone["tokens"][0]
    assert ours["approximated"] > 0


def test_preempted_requests_go_on(covered, stock):
    ours = covered[3]
    assert ours["preemptions"] > 0
    assert ours["approximated"] > 0
    for number, tokens in enumerate(ours["tokens"]):
        assert tokens[:12] == stock[0]["tokens"][number % 4]


@pytest.fixture(scope="module")
def drawn(llama):
    """One prompt under two methods: alone in one chunk; in odd chunks; beside others; and with chunks of whole tiles."""
    loss, one = {"max_tokens": 4, "prompt_logprobs": 1}, [PROMPTS[:1]]
    cases = {}
    for name, method in (("place", BY_PLACE), ("tile", BY_TILE)):
        options = {"method": method, "min_length": 64, "audit_every": 2, "audit_rows": 200}
        cases[name, "alone"] = case(llama, one, options, loss)
        cases[name, "chunks"] = case(llama, one, options, loss, max_num_batched_tokens=101)
        cases[name, "batch"] = case(llama, [[*PROMPTS[1:], PROMPTS[0]]], options, loss, max_num_batched_tokens=150)
    for size in (101, 150):
        aligned = {"max_num_batched_tokens": size, "scheduler_cls": ALIGNED}
        cases["tile", f"aligned {size}"] = case(llama, [[*PROMPTS[1:], PROMPTS[0]]], options, loss, **aligned)
    cases["tile", "other seed"] = case(llama, one, options | {"seed": 1}, loss)
    return dict(zip(cases, run_engines(list(cases.values())), strict=True))


def loss_of(result):
    return result["prompt"][-1]


# float32 sums of other orders, two layers deep
ROUNDING = 2e-4


@pytest.mark.parametrize("change", ["chunks", "batch"])
def test_neither_chunk_nor_batch_changes_a_choice_by_place(drawn, stock, change):
    alone = drawn["place", "alone"]
    assert alone["approximated"] == 2
    assert 0.1 < alone["listed_pairs"] / alone["exact_pairs"] < 0.5
    assert difference(loss_of(alone), stock[2]["prompt"][0]) > 0.05
    assert difference(loss_of(alone), loss_of(drawn["place", change])) < ROUNDING


@pytest.mark.parametrize("change", ["aligned 101", "aligned 150"])
def test_neither_chunk_nor_batch_changes_a_choice_by_tile_where_chunks_are_whole_tiles(drawn, stock, change):
    alone = drawn["tile", "alone"]
    assert alone["approximated"] == 2
    assert alone["listed_pairs"] / alone["exact_pairs"] < 0.5
    assert difference(loss_of(alone), stock[2]["prompt"][0]) > 0.05
    assert difference(loss_of(alone), loss_of(drawn["tile", change])) < ROUNDING


@pytest.mark.parametrize("change", ["chunks", "batch", "other seed"])
def test_the_comparison_would_see_another_choice(drawn, change):
    # with vLLM's own scheduler a tile may be cut in two, and its parts choose apart
    assert difference(loss_of(drawn["tile", "alone"]), loss_of(drawn["tile", change])) > 10 * ROUNDING


def test_rows_before_min_length_are_stock(drawn, stock):
    ours, theirs = loss_of(drawn["place", "alone"]), stock[2]["prompt"][0]
    assert difference(ours[:63], theirs[:63]) < ROUNDING
    assert difference(ours[64:], theirs[64:]) > 0.05


def test_audits_measure_an_error(drawn, covered):
    for result in drawn.values():
        assert result["audits"] in range(result["approximated"] // 2, result["approximated"] // 2 + 2)
    # heads of random weights this wide are sharp, and a key that was not drawn is missed
    assert 0.05 < drawn["place", "alone"]["error"] < 3.0
    # and where all keys are read there is none
    assert covered[0]["audits"] > 0
    assert covered[0]["error"] < 1e-5
