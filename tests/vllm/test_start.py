"""What the plugin says when an engine starts: plans and layers that it serves, and models that it refuses."""

from dataclasses import replace

import pytest

import hyperattention as ha
from engines import prompt_of, run_engines
from hyperattention.files.fingerprint import fingerprint
from hyperattention.files.plan import Measured
from hyperattention.files.plan_file import save_plan

MEASURED = Measured(320, 2, "ab", 0, "cpu: some", 1, {"torch": "2"}, 60.0, 160.5, 0.5, 1.0, -0.001)
DRAWN = ha.Method(ha.Sinks(4), ha.Window(32), ha.Draw(32), tile=16)
LATENT = {
    "kv_lora_rank": 64, "q_lora_rank": 32, "qk_nope_head_dim": 32, "qk_rope_head_dim": 16, "v_head_dim": 32,
    "num_key_value_heads": 4, "n_routed_experts": 2, "first_k_dense_replace": 2,
}  # fmt: skip


def plan_for(folder, heads):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder)
    return ha.Plan(fingerprint(model), {1: ha.ByHead(heads)}, {1: tuple(0.1 for _ in heads)}, 0.25, 128, MEASURED)


@pytest.fixture(scope="module")
def started(tiny, llama, tmp_path_factory):
    """All engines of this file, in two processes: some serve, and some are refused."""
    folder = tmp_path_factory.mktemp("plans")
    plan = plan_for(llama, (DRAWN, ha.Exact()))
    deeper = replace(plan, model=replace(plan.model, num_layers=3))
    files = {"right": plan, "deeper": deeper, "other weights": replace(plan, model=replace(plan.model, weights="ab"))}
    for name, each in files.items():
        save_plan(each, folder / f"{name}.json")
    gemma = {
        "tie_word_embeddings": True,
        "query_pre_attn_scalar": 32,
        "sliding_window": 64,
        "layer_types": ["sliding_attention", "full_attention"],
    }
    cases = {f"plan {name}": (llama, {"plan": str(folder / f"{name}.json")}, {}) for name in files}
    cases |= {
        "option": (llama, {"budget": 3}, {}),
        "unknown layers": (llama, {"layers": [0, 2]}, {}),
        "misplaced": (llama, {}, {"additional_config": {"method": "lean"}}),
        "layers": (llama, {"method": "lean", "min_length": 64, "layers": [1]}, {}),
        "scheduler": (llama, {}, {"scheduler_cls": "hyperattention.integrations.vllm.scheduler.AlignedScheduler"}),
        "quantised": (llama, {"min_length": 64}, {"kv_cache_dtype": "fp8"}),
        "windows": (tiny("Mistral", sliding_window=64), {"min_length": 64}, {}),
        "capped": (tiny("Gemma2", **gemma), {"min_length": 64}, {}),
        "latent": (tiny("DeepseekV2", **LATENT), {}, {}),
    }
    asked = [
        {
            "model": model,
            "batches": [[prompt_of(400)]],
            "sampling": {"max_tokens": 6},
            "llm": {
                "max_model_len": 512, "max_num_seqs": 4, "max_num_batched_tokens": 100,
                "additional_config": {"hyperattention": options}, **llm,
            },
        }
        for model, options, llm in cases.values()
    ]  # fmt: skip
    found = dict(zip(cases, run_engines(asked), strict=True))
    stock = [{**each, "llm": each["llm"] | {"additional_config": {}}} for each in (asked[list(cases).index("windows")],)]
    return found | dict(zip(("stock windows",), run_engines(stock, plugin=False), strict=True))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("plan deeper", "this plan was made for another model: num layers 3 there and 2 here"),
        ("plan other weights", "this plan was made for another model: other weights in the same shape"),
        ("unknown layers", "layers [2] are not in the model: list some of 0 to 1"),
        ("misplaced", "options are read from the key 'hyperattention' alone"),
        ("option", "no such option is known, only method"),
        ("quantised", "start vLLM without --kv-cache-dtype"),
        ("capped", "has capped scores, which no method approximates"),
        ("latent", "does not read the latent keys"),
        ("scheduler", "may leave no room for a tile of 128 beside"),
    ],
)
def test_engines_are_refused_at_their_start(started, name, message):
    assert message in started[name].get("error", "it started")


def test_a_plan_of_this_model_runs_in_its_layer_and_head(started):
    ours = started["plan right"]
    # from half of the plan's crossover on: all four chunks, the first in part, in one layer of two
    assert ours["approximated"] == 4
    assert 0.1 < ours["listed_pairs"] / ours["exact_pairs"] < 1
    assert ours["exact"]["layer not listed"] == 4
    assert ours["exact"]["decoding"] == 2 * 5


def test_layers_that_are_not_listed_are_exact(started):
    ours = started["layers"]
    assert ours["approximated"] == 4
    assert ours["exact"]["layer not listed"] == 4


def test_sliding_windows_are_left_to_the_stock_backend(started):
    ours = started["windows"]
    assert ours["approximated"] == 0
    assert ours["tokens"] == started["stock windows"]["tokens"]
