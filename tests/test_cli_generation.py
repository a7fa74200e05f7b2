"""The commands `generate`, `cache` and `ask` from end to end: what they write is the model's, and bad input is one line."""

import json
import os
import re
from pathlib import Path

import pytest
import torch
import transformers
from transformers import DynamicCache
from typer.testing import CliRunner, Result

from hyperattention.cli.main import app
from hyperattention.generation import session
from hyperattention.integrations.transformers.cache import HyperCache
from hyperattention.reference.model import load_reference
from hyperattention.reference.text import held_out_text
from hyperattention.report import generation as report
from test_cli import WORDS, save_model

LENGTH, NEW = 700, 24
TEXT = held_out_text()[:LENGTH]
QUESTIONS = ("\n    def ", "\nimport ")
SMALL = ("--budget", 96, "--max-new-tokens", NEW)
ROOMY = ("--budget", 2 * LENGTH, "--max-new-tokens", NEW)
# no row of the table says so of a cache from which keys are missing
WHOLE = "exact: nothing was dropped"


def run(*arguments: object, code: int = 0) -> Result:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": None})
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == code, result.output
    return result


def approximated(result: Result) -> list[int]:
    """Count the approximated calls of each line that counts them."""
    return [int(number) for number in re.findall(r"(\d+) of \d+ attention calls approximated", result.stderr)]


def plain_continuation(text: bytes, num: int = NEW) -> str:
    """Let the reference model go on greedily, with transformers' own cache and attention."""
    model = load_reference().model
    given = torch.tensor([list(text)])
    with torch.inference_mode():
        written = model.generate(
            given, past_key_values=DynamicCache(config=model.config), max_new_tokens=num, do_sample=False, pad_token_id=0
        )
    return bytes(written[0, given.shape[1] :].tolist()).decode("utf-8", "replace") + "\n"


def quoted(question: str) -> str:
    """Give a question as it stands above its answer."""
    return "".join(f"> {line}\n" for line in question.split("\n"))


@pytest.fixture
def document(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "document.txt"
    path.write_bytes(TEXT)
    return path


@pytest.fixture
def own_model(tmp_path: Path) -> Path:
    from tokenizers import Tokenizer, models, pre_tokenizers

    folder = save_model(tmp_path / "own_model", len(WORDS) + 1)
    vocabulary = {word: number for number, word in enumerate(["?", *dict.fromkeys(WORDS)])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="?").save_pretrained(folder)
    return folder


@pytest.mark.parametrize("policy", [("--policy", "exact", "--budget", 96), ("--policy", "cluster_means", "--budget", 800)])
def test_what_drops_nothing_writes_what_the_model_would(document: Path, policy: tuple[object, ...]) -> None:
    result = run("generate", "reference", document, "--max-new-tokens", NEW, *policy)
    assert result.stdout == plain_continuation(TEXT)
    assert WHOLE in result.stderr
    assert approximated(result) == [0, 0]


def test_a_small_cache_is_called_what_it_is(document: Path) -> None:
    result = run("generate", "reference", document, *SMALL)
    assert len(result.stdout) == NEW + 1
    assert result.stdout != plain_continuation(TEXT)
    table = result.stderr
    for words in (f"{LENGTH - 1} tokens", f"{NEW} tokens", "a second", "a step reads", "ClusterMeans(", "for all keys"):
        assert words in table
    assert WHOLE not in table
    reading, writing = approximated(result)
    assert (reading, writing > 0) == (0, True)
    slots, share = re.search(r"a step reads (\d+) a head for [\d,]+ tokens \(([\d.]+)%\)", table).groups()
    assert 0 < int(slots) <= 96
    # all tokens were seen but the last, which nothing follows; the share is printed to a tenth of a percent
    assert float(share) == pytest.approx(100 * int(slots) / (LENGTH + NEW - 1), abs=0.1)
    held, whole = re.search(r"([\d.]+) MiB, of ([\d.]+) for all keys", table).groups()
    assert float(held) < float(whole) / 4


def test_the_error_is_told_unless_no_audit_is_asked_for(document: Path) -> None:
    audited = run("generate", "reference", document, *SMALL, "--audit", 4)
    shown = " ".join(audited.stderr.split())
    found = re.search(r"relative error ([\d.]+), (\d+) of (\d+) approximated tokens audited \(too few for an int", shown)
    error, num_audited, num_approximated = map(float, found.groups())
    assert 0 < error < 1
    # one token in four, a run that is not over yet aside
    assert 0 < num_audited <= num_approximated / 4 + 1 <= NEW / 4 + 1
    plain = run("generate", "reference", document, *SMALL, "--audit", 0)
    assert "audit" not in plain.stderr
    assert plain.stdout == audited.stdout
    roomy = run("generate", "reference", document, *ROOMY, "--audit", 4)
    assert "nothing to measure: the cache read every key" in roomy.stderr


def test_pages_keep_everything_and_say_what_a_step_reads(document: Path) -> None:
    result = run("generate", "reference", document, *SMALL, "--policy", "pages")
    assert f"all {LENGTH + NEW - 1} kept; a step reads 96 a head" in result.stderr
    assert WHOLE not in result.stderr
    assert approximated(result)[1] > 0


def test_chunks_are_read_through_what_is_left_of_earlier_ones(document: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read, pieces = session.read, []

    def counted(model: torch.nn.Module, piece: torch.Tensor, cache: object) -> torch.Tensor:
        pieces.append(piece.shape[1])
        return read(model, piece, cache)

    monkeypatch.setattr(session, "read", counted)
    result = run("generate", "reference", document, *SMALL, "--chunk", 300)
    assert pieces == [300, 300, 99]
    assert approximated(result)[0] > 0


def test_text_is_written_as_it_is_made(document: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, events = load_reference().model, []
    loaded, tokens = session.LoadedModel(model, "the reference model"), torch.tensor([list(TEXT)])
    cache = HyperCache(model.config, budget=2 * LENGTH)
    session.read_text(loaded, cache, tokens[:, :-1])
    model.register_forward_hook(lambda *_: events.append("step"))
    monkeypatch.setattr("builtins.print", lambda text, *, flush, end: events.append("text") if text and flush else None)
    session.write_on(loaded, cache, tokens, session.Sampling(NEW))
    # steps go on once there is something to see
    assert "step" in events[events.index("text") :]
    assert events.count("step") == NEW


def test_draws_follow_the_seed(document: Path) -> None:
    def drawn(seed: int) -> str:
        return run("generate", "reference", document, *ROOMY, "--temperature", 1.5, "--seed", seed).stdout

    state = torch.get_rng_state()
    assert drawn(1) == drawn(1) != drawn(2)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_file_of_a_whole_cache_answers_as_if_all_had_been_read(document: Path) -> None:
    # 'exact' has no budget, although it is given one
    told = run("cache", "reference", document, "--out", "doc.safetensors", "--policy", "exact", "--budget", 96)
    assert WHOLE in told.stderr
    result = run("ask", "doc.safetensors", QUESTIONS[0], "--max-new-tokens", NEW)
    assert result.stdout == quoted(QUESTIONS[0]) + plain_continuation(TEXT + QUESTIONS[0].encode())
    assert WHOLE in result.stderr
    assert approximated(result) == [0, 0]


@pytest.mark.slow
def test_every_question_starts_from_the_file(document: Path) -> None:
    told = run("cache", "reference", document, "--out", "doc.safetensors", "--budget", 96, "--chunk", 300)
    written = Path("doc.safetensors").read_bytes()
    assert f"wrote doc.safetensors, {len(written) / 2**20:.1f} MiB" in told.stderr
    assert f"{LENGTH} tokens" in told.stderr
    assert "a step reads" in told.stderr
    assert told.stdout == ""
    alone = [run("ask", "doc.safetensors", question, "--max-new-tokens", NEW) for question in QUESTIONS]
    together = run("ask", "doc.safetensors", *QUESTIONS, "--max-new-tokens", NEW)
    assert together.stdout == "\n".join(result.stdout for result in alone)
    assert len({result.stdout for result in alone}) == 2
    for result, question in zip(alone, QUESTIONS, strict=True):
        assert min(approximated(result)) > 0
        assert f"{len(question) - 1} tokens" in result.stderr
    assert Path("doc.safetensors").read_bytes() == written
    # of a question of one token nothing is left to read before the answer
    assert len(approximated(run("ask", "doc.safetensors", "\n", "--max-new-tokens", 2))) == 1


@pytest.mark.parametrize("before", [None, b"an older cache"])
@pytest.mark.parametrize("halfway", ["loading", "reading", "writing"])
def test_an_interruption_leaves_no_partial_file(
    document: Path, monkeypatch: pytest.MonkeyPatch, halfway: str, before: bytes | None
) -> None:
    out = document.with_name("doc.safetensors")
    if before is not None:
        out.write_bytes(before)
    read, write, calls = session.read, Path.write_bytes, []

    def interrupted_read(*arguments: object) -> torch.Tensor:
        calls.append("read")
        if len(calls) == 2:
            raise KeyboardInterrupt
        return read(*arguments)

    def interrupted_write(self: Path, data: bytes) -> int:
        calls.append("write")
        write(self, data[: len(data) // 2])
        raise KeyboardInterrupt

    def interrupted_load() -> None:
        calls.append("load")
        raise KeyboardInterrupt

    if halfway == "loading":
        monkeypatch.setattr(report, "load_reference", interrupted_load)
    elif halfway == "reading":
        monkeypatch.setattr(session, "read", interrupted_read)
    else:
        monkeypatch.setattr(Path, "write_bytes", interrupted_write)
    result = run("cache", "reference", document, "--out", out, "--budget", 96, "--chunk", 300, "--overwrite", code=130)
    assert calls
    monkeypatch.undo()
    stands = "it does not exist" if before is None else "what it held before stands"
    assert result.stderr.splitlines()[-1] == f"stopped: nothing was written to {out}; {stands}"
    assert (out.read_bytes() if out.exists() else None) == before
    assert set(os.listdir(document.parent)) <= {"document.txt", "doc.safetensors"}


def test_a_users_own_model_is_found_again_or_named(own_model: Path, tmp_path: Path) -> None:
    # the folder may ask for what one bounded cache cannot follow
    settings = {
        "num_return_sequences": 2, "num_beams": 2, "use_cache": False, "prompt_lookup_num_tokens": 3,
        "return_dict_in_generate": True, "stop_strings": ["fox"],
    }  # fmt: skip
    (own_model / "generation_config.json").write_text(json.dumps(settings))
    text, out = tmp_path / "own.txt", tmp_path / "doc.safetensors"
    text.write_text("the quick brown fox jumps over the lazy dog and runs away\n" * 30)
    run("cache", own_model, text, "--out", out, "--budget", 96)
    asked = ("the quick", "--max-new-tokens", 5)
    found = run("ask", out, *asked)
    answer = found.stdout.removeprefix(quoted("the quick")).split()
    assert set(answer) <= {"?", *WORDS}
    assert len(answer) == 5
    assert min(approximated(found)) > 0
    refused = run("ask", out, *asked, "--model", "reference", code=2)
    assert "was written by another model" in refused.stderr
    moved = own_model.rename(tmp_path / "moved")
    gone = " ".join(run("ask", out, *asked, code=2).stderr.split())
    assert f"written with the model in {own_model}, which no longer exists: name it with --model" in gone
    assert run("ask", out, *asked, "--model", moved).stdout == found.stdout
