"""What the commands tell `generate`, and how text becomes tokens."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import transformers

from hyperattention.generation import session
from hyperattention.generation.codec import Bytes, Words
from test_cli import WORDS, invoke, save_model


def test_draws_follow_the_folder_and_the_likeliest_token_nothing() -> None:
    usual = transformers.GenerationConfig(top_p=0.3, top_k=7, pad_token_id=5)
    drawn = session._settings(usual, session.Sampling(3, temperature=0.5))
    assert (drawn["do_sample"], drawn["temperature"], drawn["top_p"], drawn["top_k"]) == (True, 0.5, 0.3, 7)
    greedy = session._settings(usual, session.Sampling(3))
    assert (greedy["do_sample"], greedy["temperature"], greedy["top_p"], greedy["top_k"]) == (False, None, None, None)
    assert greedy["pad_token_id"] == 5
    # without a word of the folder, draws are from all tokens
    assert session._settings(None, session.Sampling(3, temperature=1.0))["top_k"] == 0


def test_a_token_that_ends_the_input_is_left_out_where_more_is_to_come() -> None:
    ended = SimpleNamespace(input_ids=[1, 8, 9, 2])

    class Tokenizer:
        eos_token_id = 2

        def __call__(self, text: str, *, add_special_tokens: bool, verbose: bool) -> SimpleNamespace:
            return ended if add_special_tokens else SimpleNamespace(input_ids=[8, 9])

    words = Words.__new__(Words)
    object.__setattr__(words, "tokenizer", Tokenizer())
    assert words.encode("a text", first=True).tolist() == [1, 8, 9]
    assert words.encode("a text", first=False).tolist() == [8, 9]


def test_bytes_come_back_as_they_were() -> None:
    text = b"caf\xc3\xa9 \xff".decode("utf-8", "surrogateescape")
    tokens = Bytes().encode(text, first=True)
    assert bytes(tokens.tolist()) == b"caf\xc3\xa9 \xff"
    assert Bytes().decode(tokens) == Bytes().decode(tokens.tolist()) == "caf\u00e9 \ufffd"
    assert Bytes().decode(ord("a")) == "a"


@pytest.fixture
def own_model(tmp_path: Path) -> Path:
    from tokenizers import Tokenizer, models, pre_tokenizers

    folder = save_model(tmp_path / "own_model", len(WORDS) + 1)
    vocabulary = {word: number for number, word in enumerate(["?", *dict.fromkeys(WORDS)])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="?").save_pretrained(folder)
    return folder


def test_the_commands_go_beyond_the_length_only_if_asked(own_model: Path, tmp_path: Path) -> None:
    text, out = tmp_path / "long.txt", tmp_path / "long.safetensors"
    text.write_text(" ".join(WORDS * 88))  # 1,056 tokens, and the model was made for 1,024
    few = ("--budget", 96, "--max-new-tokens", 3)
    code, said = invoke("generate", own_model, text, *few)
    assert code == 2
    assert "made for 1,024" in said
    code, said = invoke("generate", own_model, text, *few, "--allow-longer")
    assert code == 0, said
    code, said = invoke("cache", own_model, text, "--out", out, "--budget", 96, "--allow-longer")
    assert code == 0, said
    code, said = invoke("ask", out, "the quick", "--max-new-tokens", 3)
    assert code == 2
    assert "made for 1,024" in said
    code, said = invoke("ask", out, "the quick", "--max-new-tokens", 3, "--allow-longer")
    assert code == 0, said
