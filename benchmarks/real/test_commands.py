"""What a user does with a pretrained model, done on SmolLM2: every step must succeed. `make real` runs it."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from model import FOLDER, prepare
from texts import prose
from transformers import AutoModelForCausalLM, AutoTokenizer

import hyperattention as ha
from hyperattention import load_plan
from hyperattention.integrations.transformers import HyperCache, use

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

LENGTH = 1024
SCRIPT = """
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from hyperattention.integrations.transformers import use

model = AutoModelForCausalLM.from_pretrained({folder!r})
tokens = AutoTokenizer.from_pretrained({folder!r})(open({text!r}).read(), return_tensors="pt").input_ids[:, :4096]
with torch.inference_mode(), use(model) as calls:
    model(tokens, use_cache=False, logits_to_keep=1)
print(calls)
"""


@pytest.fixture(scope="module")
def folder() -> Path:
    return prepare(FOLDER)


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("real")
    (made / "text.txt").write_text(prose()[:24_000])
    (made / "short.txt").write_text(prose()[:6_000])
    return made


def run(words: Sequence[str | Path], work: Path) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"COLUMNS": "200", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, *map(str, words)], cwd=work, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def command(work: Path, *words: str | Path) -> subprocess.CompletedProcess[str]:
    return run(["-m", "hyperattention", *words], work)


def test_use_in_a_script_of_ten_lines(folder: Path, work: Path) -> None:
    script = work / "script.py"
    script.write_text(SCRIPT.format(folder=str(folder), text=str(work / "text.txt")))
    assert "30 of 30 attention calls approximated" in run([script], work).stdout


def test_exact_attention_under_use_gives_the_logits_of_the_model(folder: Path, work: Path) -> None:
    model, tokens = load(folder, work / "short.txt")
    with torch.inference_mode():
        theirs = model(tokens, use_cache=False).logits
        with use(model, ha.Exact()):
            ours = model(tokens, use_cache=False).logits
    # float32 through 30 layers, in another order of sums
    assert (ours - theirs).abs().max() <= 1e-3 * theirs.abs().max()


def test_generate_with_a_cache_that_holds_all_writes_what_the_model_writes(folder: Path, work: Path) -> None:
    model, tokens = load(folder, work / "short.txt")
    settings = {"max_new_tokens": 16, "do_sample": False}
    with torch.inference_mode():
        theirs = model.generate(tokens, **settings)
        with use(model, ha.Exact()):
            ours = model.generate(tokens, past_key_values=HyperCache(model.config, budget=8192), **settings)
    assert ours.tolist() == theirs.tolist()


def test_generate_with_a_bounded_cache_holds_fewer_keys(folder: Path, work: Path) -> None:
    model, tokens = load(folder, work / "short.txt")
    small, whole = HyperCache(model.config, budget=256), HyperCache(model.config, budget=8192)
    with torch.inference_mode(), use(model, ha.Exact()) as calls:
        for cache in (small, whole):
            written = model.generate(tokens, past_key_values=cache, max_new_tokens=16, do_sample=False)
            assert written.shape[1] > tokens.shape[1]
    assert calls.counts.approximated > 0
    assert small.memory_bytes < whole.memory_bytes / 2


def test_generate_on_the_command_line(folder: Path, work: Path) -> None:
    done = command(work, "generate", folder, "short.txt", "--budget", "256", "--max-new-tokens", "16")
    assert done.stdout.strip()
    assert "audited" in done.stderr


def test_cache_and_ask(folder: Path, work: Path) -> None:
    command(work, "cache", folder, "short.txt", "--out", "text.safetensors", "--budget", "256")
    before = (work / "text.safetensors").read_bytes()
    questions = ("In short, a topic is", "An example:")
    done = command(work, "ask", "text.safetensors", *questions, "--max-new-tokens", "8")
    assert all(f"> {question}" in done.stdout for question in questions)
    assert (work / "text.safetensors").read_bytes() == before


@pytest.fixture(scope="module")
def plan_file(folder: Path, work: Path) -> Path:
    words = ("--length", str(LENGTH), "--documents", "1", "--tolerance", "0.2", "--out", "plan.json")
    command(work, "calibrate", folder, "text.txt", *words)
    return work / "plan.json"


def test_calibrate_makes_a_plan_that_use_takes(folder: Path, work: Path, plan_file: Path) -> None:
    plan = load_plan(plan_file)
    assert sorted(plan.layers) == list(range(30))
    assert max(max(errors) for errors in plan.errors.values()) <= 0.2
    model, tokens = load(folder, work / "short.txt")
    # so short a plan may not pay, and then `use` says so and runs exact attention
    with torch.inference_mode(), use(model, plan) as calls:
        model(tokens, use_cache=False, logits_to_keep=1)
    assert calls.counts.total == 30
    with torch.inference_mode(), use(model, plan.method) as calls:
        model(tokens, use_cache=False, logits_to_keep=1)
    assert calls.counts.approximated > 0


def test_inspect_draws_every_head_under_the_plan(folder: Path, work: Path, plan_file: Path) -> None:
    command(work, "inspect", folder, "text.txt", "--length", str(LENGTH), "--plan", plan_file, "--out", "report.html")
    assert "<html" in (work / "report.html").read_text()


def test_a_plan_of_another_model_is_refused(folder: Path, work: Path, plan_file: Path) -> None:
    plan = json.loads(plan_file.read_text())
    assert plan["model"]["num_layers"] == 30
    plan["model"]["num_layers"] = 31
    (work / "other.json").write_text(json.dumps(plan))
    model, _ = load(folder, work / "short.txt")
    with pytest.raises(ValueError, match="another model"), use(model, load_plan(work / "other.json")):
        pass


def load(folder: Path, text: Path):
    model = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    return model, tokenizer(text.read_text(), return_tensors="pt").input_ids
