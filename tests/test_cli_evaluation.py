"""`hyperattention eval` from end to end, at sizes that say nothing but that it works, and what it says of bad input."""

import csv
import json
from pathlib import Path

import pytest
import transformers

from test_cli import WORDS, invoke, save_model

SMALL = ("--lengths", "512,300", "--depths", 2, "--budget", 200, "--seeds", 1, "--documents", 2)
POLICIES = ["exact", "streaming", "uniform", "random"]


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("reference"), 256)


@pytest.fixture(scope="module")
def own_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tokenizers import Tokenizer, models, pre_tokenizers

    folder = save_model(tmp_path_factory.mktemp("own_model"), len(WORDS) + 1)
    vocabulary = {word: number for number, word in enumerate(["?", *dict.fromkeys(WORDS)])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="?").save_pretrained(folder)
    return folder


def small(reference: Path, out: Path, *more: object) -> tuple[int, str]:
    return invoke("eval", "--reference", reference, "--out", out, "--policies", "", *SMALL, *more)


@pytest.mark.slow
def test_eval_writes_what_it_found_and_how(reference: Path, tmp_path: Path) -> None:
    out = tmp_path / "found"
    code, output = small(reference, out, "--tasks", "single,multi-query")
    assert code == 0, output
    for words in ("512 tokens: answers found", "300 tokens: loss", "streaming@200", "single h", "multi-query v", "beyond"):
        assert words in output
    names = {path.name for path in out.iterdir()}
    maps = {f"heat_map_{name}.png" for name in ("exact", "streaming_200", "uniform_200", "random_200")}
    assert names == {"metrics.json", "predictions.csv", "config.json", *maps}
    assert all((out / name).read_bytes().startswith(b"\x89PNG") for name in maps)
    metrics, config = (json.loads((out / name).read_text()) for name in ("metrics.json", "config.json"))
    cells = metrics["retrieval"]
    assert len(cells) == len(POLICIES) * 2 * 2 * 2 * 3  # tasks, lengths, visible or not, two depths and all
    assert {(cell["policy"], cell["budget"]) for cell in cells} == {("exact", None), *((p, 200) for p in POLICIES[1:])}
    for cell in cells:
        low, high = cell["interval_95"]
        assert 0 <= low <= cell["score"] <= high <= 1
        assert cell["exact"] == (cell["policy"] == "exact") == (cell["approximated_calls"] == 0)
        assert cell["answers"] > 0 < cell["memory_bytes"]
        # random weights answer nothing, and say nothing of a cache
        assert cell["beyond_the_model"] == (cell["ceiling"] < metrics["floor"])
    assert {each["length"] for each in metrics["continuation"]} == {300, 512}
    assert all((each["added_nats"] == 0) == each["exact"] for each in metrics["continuation"])
    assert {"commit", "versions", "device", "fingerprint", "tasks", "budgets", "seeds", "contenders"} <= config.keys()
    assert [each["method"] for each in config["contenders"]][1:] == ["Latest()", "UniformSample()", "RandomKeys()"]
    with (out / "predictions.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == sum(cell["answers"] for cell in cells if cell["depth"] is None)
    assert {row["policy"] for row in rows} == set(POLICIES)
    for row in rows:
        assert row["right"] == str(row["expected"] in row["said"])
        assert 0 <= float(row["depth"]) < 1


@pytest.mark.slow
def test_a_finished_evaluation_is_not_overwritten_unasked(reference: Path, tmp_path: Path) -> None:
    out = tmp_path / "found"
    assert small(reference, out, "--tasks", "single")[0] == 0
    before = (out / "predictions.csv").read_bytes()
    code, output = small(reference, out, "--tasks", "lines")
    assert (code, "holds a finished evaluation" in output, "--overwrite" in output) == (2, True, True)
    assert (out / "predictions.csv").read_bytes() == before
    assert small(reference, out, "--tasks", "lines", "--overwrite")[0] == 0
    assert (out / "predictions.csv").read_bytes() != before


def test_a_budget_that_holds_everything_is_called_exact(reference: Path, tmp_path: Path) -> None:
    code, output = small(reference, tmp_path / "found", "--tasks", "single", "--budget", 600)
    assert code == 0
    for name in POLICIES[1:]:
        assert f"{name}@600 (exact)" in output


@pytest.mark.slow
def test_a_users_own_model_is_asked_in_sentences(own_model: Path, tmp_path: Path) -> None:
    text, out = tmp_path / "own.txt", tmp_path / "found"
    text.write_text("the quick brown fox jumps over the lazy dog and runs away\n" * 400)
    code, output = invoke(
        "eval", own_model, "--text", text, "--out", out, "--lengths", 1000, "--depths", 2, "--budget", 200, "--seeds", 1,
        "--documents", 1, "--tasks", "single,multi-value,tracking", "--policies", "streaming",
    )  # fmt: skip
    assert code == 0, output
    with (out / "predictions.csv").open() as file:
        assert "Question: What is the code of" in next(csv.DictReader(file))["question"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--tasks", "single,juggling"), "unknown tasks juggling: choose from single"),
        (("--tasks", ",", "--documents", 0), "nothing to evaluate"),
        (("--policies", "magic"), "unknown policies magic: choose from exact"),
        (("--lengths", 4096), "reads at most 1,024 tokens"),
        (("--lengths", "long"), "--lengths 'long': give whole, positive numbers"),
        (("--lengths", 100), "give more than 128"),
        (("--budget", 20), "budget=20 leaves no slot besides 16 sinks"),
        (("--budget", "0"), "--budget '0'"),
        (("--text", "nowhere.txt"), "cannot read nowhere.txt"),
        (("--text", "short.txt"), "the text has 5 tokens, but 512 are needed"),
        (("--out", "short.txt"), "is a file: give a folder"),
        (("--out", "no/where"), "in an existing directory"),
    ],
)
def test_eval_refuses_before_it_runs(
    arguments: tuple[object, ...],
    message: str,
    reference: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("short.txt").write_text("short")
    code, output = small(reference, Path("found"), *arguments)
    assert (code, message in " ".join(output.split())) == (2, True), output
    assert "Traceback" not in output
    assert not Path("found").exists()
