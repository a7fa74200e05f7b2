"""What `generate`, `cache` and `ask` say of bad input: one line, before anything slow, and nothing half-done stays."""

import os
from collections.abc import Sequence
from pathlib import Path

import pytest
import transformers

from hyperattention.generation import session
from hyperattention.integrations.transformers.cache_file import load_cache, save_cache
from hyperattention.reference.model import load_reference
from test_cli import WORDS
from test_cli_generation import QUESTIONS, TEXT, document, own_model, run

# fixtures of both files
__all__ = ["document", "own_model"]


def test_layers_that_no_file_holds_are_refused_before_the_text_is_read(
    own_model: Path, document: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = transformers.Qwen3NextConfig(
        vocab_size=len(WORDS) + 1, hidden_size=32, intermediate_size=32, num_hidden_layers=4, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, max_position_embeddings=2048, pad_token_id=0, eos_token_id=0,
        linear_num_key_heads=1, linear_num_value_heads=2, linear_key_head_dim=8, linear_value_head_dim=8, num_experts=2,
        num_experts_per_tok=1, moe_intermediate_size=16, shared_expert_intermediate_size=16,
    )  # fmt: skip
    transformers.Qwen3NextForCausalLM(config).save_pretrained(own_model)
    monkeypatch.setattr(session, "read", lambda *_: pytest.fail("something was read"))
    document.write_text("the quick brown fox " * 100)
    assert "are of kinds that this file does not hold" in run("cache", own_model, document, code=2).stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("generate", "reference", "nowhere.txt"), "cannot read nowhere.txt: No such file"),
        (("generate", "reference", "."), "cannot read .: Is a directory"),
        (("generate", "reference", "empty.txt"), "empty.txt has 0 tokens: give a text of at least two"),
        (
            ("generate", "reference", "document.txt", "--budget", 20),
            "budget=20 leaves no slot besides 16 sinks and 10 window keys: give at least 33",
        ),
        (("generate", "reference", "document.txt", "--budget", 96, "--window", 90), "leaves no slot besides 16 sinks"),
        (
            ("generate", "reference", "document.txt", "--policy", "magic"),
            "unknown policy 'magic': choose from exact, streaming",
        ),
        (("generate", "reference", "document.txt", "--max-new-tokens", 10**6), "was made for"),
        (("generate", "reference", "document.txt", "--temperature", "inf"), "temperature inf: give 0"),
        (("generate", "reference", "document.txt", "--temperature", "nan"), "--temperature"),
        (("generate", "reference", "document.txt", "--seed", 2**63), "--seed"),
        (("generate", "no/model", "document.txt"), "no directory no/model"),
        (("cache", "reference", "nowhere.txt"), "cannot read nowhere.txt"),
        (("cache", "reference", "document.txt", "--budget", 20), "budget=20 leaves no slot"),
        (("cache", "reference", "document.txt", "--out", "no/where"), "cannot write no/where"),
        (
            ("cache", "reference", "document.txt", "--out", "./document.txt"),
            "document.txt: this command reads it",
        ),
        (
            ("cache", "reference", "document.txt", "--out", "empty.txt"),
            "empty.txt exists: name another file, or give --overwrite",
        ),
        (("ask", "nowhere.safetensors", "what?"), "no file nowhere.safetensors: write one with `hyperattention cache`"),
        (("ask", "document.txt", "what?"), "cannot read document.txt as a cache"),
        (("ask", "empty.txt", "what?"), "cannot read empty.txt as a cache"),
    ],
)
def test_bad_input_is_told_in_a_line(document: Path, arguments: Sequence[object], message: str) -> None:
    Path("empty.txt").touch()
    result = run(*arguments, code=2)
    assert message in " ".join(result.stderr.split())
    assert "Traceback" not in result.output
    assert result.stdout == ""
    assert sorted(os.listdir()) == ["document.txt", "empty.txt"]
    assert document.read_bytes() == TEXT


def test_a_damaged_file_is_refused_before_anything_is_answered(document: Path) -> None:
    run("cache", "reference", document, "--out", "doc.safetensors", "--budget", 96)
    path = Path("doc.safetensors")
    whole = path.read_bytes()
    flipped = bytearray(whole)
    flipped[-100] ^= 1
    for damaged, message in ((bytes(flipped), "not match its checksum"), (whole[:-100], "as a cache")):
        path.write_bytes(damaged)
        result = run("ask", path, QUESTIONS[0], code=2)
        assert (message in result.stderr, "hyperattention cache" in result.stderr, result.stdout) == (True, True, "")
    path.write_bytes(whole)
    for questions, message in (((QUESTIONS[0], ""), "the question is empty"), (("x" * 33_000,), "was made for")):
        result = run("ask", path, *questions, code=2)
        assert (message in result.stderr, result.stdout) == (True, "")
    cache, _ = load_cache(path, model := load_reference().model)
    save_cache(cache, model, path, overwrite=True)
    assert "holds no tokens of its text" in run("ask", path, QUESTIONS[0], code=2).stderr
