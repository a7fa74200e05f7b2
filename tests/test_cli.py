"""The commands from end to end, at sizes that say nothing but that they work, and what they say of bad input."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from typer.testing import CliRunner

from assertions import assert_exact
from hyperattention.bench.case import Case
from hyperattention.bench.peak_memory import measure
from hyperattention.bench.timing import Timing, interleave, speedup
from hyperattention.cli.main import app
from hyperattention.methods.default import LEAN_CROSSOVER
from hyperattention.methods.exact import Exact
from hyperattention.report.bench import BenchOptions, list_cases
from hyperattention.report.demo_conclusions import short_in_words

ROWS = ["exact", "sinks_window", "control", "published", "default"]
WORDS = ["the", "quick", "brown", "fox", "jumps", "over", "the", "lazy", "dog", "and", "runs", "away"]


def invoke(*arguments: object) -> tuple[int, str]:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": None})
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.output


def save_model(folder: Path, vocab_size: int) -> Path:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=vocab_size, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, max_position_embeddings=1024, initializer_range=0.3,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("reference"), 256)


@pytest.fixture(scope="module")
def own_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tokenizers import Tokenizer, models, pre_tokenizers

    folder = save_model(tmp_path_factory.mktemp("own_model"), len(WORDS) + 1)
    vocabulary = {word: i for i, word in enumerate(["?", *dict.fromkeys(WORDS)])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="?").save_pretrained(folder)
    return folder


@pytest.fixture
def own_text(tmp_path: Path) -> Path:
    path = tmp_path / "own.txt"
    path.write_text(" ".join(WORDS * (LEAN_CROSSOVER // 40)))
    return path


def read_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_doctor_names_every_path_and_why_one_is_missing() -> None:
    code, output = invoke("doctor")
    assert code == 0
    for name in (torch.__version__, "list kernel, Triton", "reference model", "held-out text", "threads"):
        assert name in output
    assert "reinstall" not in output


def test_demo_shows_both_parts_and_writes_them_down(reference: Path, tmp_path: Path) -> None:
    plot, records = tmp_path / "demo.png", tmp_path / "demo.jsonl"
    small = ("--quick", "--length", 256, "--speed-length", 256)
    code, output = invoke("demo", *small, "--reference", reference, "--plot", plot, "--json", records)
    assert code == 0, output
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert (
        output.index("1. the reference model") < output.index("retrieval by distance") < output.index("2. structured inputs")
    )
    assert "no fewer pairs" in output
    assert "so it saves nothing" in output
    assert "256 tokens are short" in output
    assert "It is at 32,768 tokens and more that an approximation counts." in " ".join(output.split())
    lines = read_lines(records)
    assert [line["row"] for line in lines if line["part"] == "loss and retrieval"] == ROWS
    assert [line["row"] for line in lines if line["part"] == "speed and error"] == ROWS
    for line in lines:
        assert line["kind"] == "demo"
        assert {"commit", "versions", "device", "threads", "method", "approximated", "error"} <= line.keys()
        assert line["approximated"] is False
    first, second = lines[0], lines[5]
    assert {"model_median_s", "attention_quartiles_s", "retrieval", "depths", "bits_per_byte", "seed"} <= first.keys()
    assert {"median_s", "quartiles_s", "speedup", "peak_memory_bytes", "pairs_per_query", "case"} <= second.keys()


def test_demo_reads_32768_bytes_once_and_quickly_8192(monkeypatch: pytest.MonkeyPatch) -> None:
    from hyperattention.report import demo as report

    prepared: list[report.PreparedDemo] = []

    def stop(given: report.PreparedDemo, console: object) -> report.DemoResults:
        prepared.append(given)
        raise KeyboardInterrupt

    monkeypatch.setattr(report, "run", stop)
    for arguments in ((), ("--quick",), ("--length", 4096)):
        assert invoke("demo", *arguments)[0] == 130
    assert [[len(sample.tokens) for sample in each.samples] for each in prepared] == [[32768], [8192], [4096] * 4]
    # other commands run many methods, or one many times
    usual = report.prepare(report.DemoOptions())
    assert [len(sample.tokens) for sample in usual.samples] == [8192] * 4


@pytest.mark.parametrize(
    ("length", "longest", "said"), [(32768, 32768, ""), (8192, 32768, "--length 32768"), (99, 4096, "")]
)
def test_short_documents_are_called_short(length: int, longest: int, said: str) -> None:
    found = short_in_words(length, longest)
    assert bool(found) == (length < 32768)
    assert said in found
    assert ("--length" in found) == bool(said)


def test_demo_reads_a_users_own_text_and_model(own_model: Path, own_text: Path, tmp_path: Path) -> None:
    plot, records = tmp_path / "own.png", tmp_path / "own.jsonl"
    code, output = invoke(
        "demo", "--quick", "--model", own_model, "--text", own_text, "--length", 128, "--speed-length", 128, "--plot", plot,
        "--json", records,
    )  # fmt: skip
    assert code == 0, output
    assert "tokens of own.txt" in output
    assert "retrieval by distance" not in output
    assert read_lines(records)[0]["retrieval"] is None


def test_demo_refuses_a_text_it_cannot_use(reference: Path, tmp_path: Path) -> None:
    empty, short = tmp_path / "empty.txt", tmp_path / "short.txt"
    empty.write_text(" \n")
    short.write_text("x" * (LEAN_CROSSOVER - 1))
    for path, message in (
        (empty, "is empty"),
        (short, "attention is exact"),
        (tmp_path / "none.txt", "cannot read"),
        (tmp_path, "cannot read"),
    ):
        code, output = invoke("demo", "--reference", reference, "--text", path)
        assert (code, "Traceback" in output) == (2, False)
        assert message in output


def test_demo_refuses_a_model_it_cannot_use(own_text: Path, tmp_path: Path) -> None:
    config = transformers.MambaConfig(vocab_size=9, hidden_size=16, num_hidden_layers=1, state_size=4)
    no_attention = tmp_path / "mamba"
    transformers.MambaForCausalLM(config).save_pretrained(no_attention)
    no_tokenizer = save_model(tmp_path / "bare", 9)
    (tmp_path / "hollow").mkdir()
    cases = (
        ("--model", tmp_path / "nowhere", "no directory"),
        ("--model", tmp_path / "hollow", "no config.json"),
        ("--model", no_tokenizer, "cannot load"),
        ("--reference", tmp_path / "hollow", "no reference model"),
        ("--reference", no_tokenizer, "9 tokens"),
    )
    for option, folder, message in cases:
        code, output = invoke("demo", "--text", own_text, option, folder)
        assert (code, message in output) == (2, True), output
    assert no_attention.is_dir()


def test_demo_refuses_a_model_without_attention_that_can_be_switched(
    own_model: Path, own_text: Path, tmp_path: Path
) -> None:
    config = transformers.MambaConfig(vocab_size=len(WORDS) + 1, hidden_size=16, num_hidden_layers=1, state_size=4)
    folder = tmp_path / "mamba"
    transformers.MambaForCausalLM(config).save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(own_model).save_pretrained(folder)
    code, output = invoke("demo", "--text", own_text, "--model", folder, "--length", 128)
    assert (code, "AttentionInterface" in output) == (2, True), output


def test_demo_refuses_lengths_and_files_before_it_runs(
    reference: Path, own_text: Path, own_model: Path, tmp_path: Path
) -> None:
    cases = (
        (("--reference", reference, "--length", 2048), "64 to 1,024"),
        (("--reference", reference, "--plot", tmp_path / "no" / "plot.png"), "cannot write"),
        (("--reference", reference, "--json", tmp_path), "cannot write"),
        (("--model", own_model, "--text", own_text), "give a longer text or a model with a longer context"),
    )
    for arguments, message in cases:
        code, output = invoke("demo", *arguments)
        assert (code, message in output) == (2, True), output


@pytest.mark.slow
def test_bench_measures_every_case(tmp_path: Path) -> None:
    plot, records = tmp_path / "bench.png", tmp_path / "bench.jsonl"
    code, output = invoke("bench", "--quick", "--min-length", 64, "--max-length", 64, "--plot", plot, "--json", records)
    assert code == 0, output
    assert plot.read_bytes().startswith(b"\x89PNG")
    cases = {json.dumps(line["case"]) for line in read_lines(records)}
    assert len(cases) == 5
    assert len(read_lines(records)) == 15
    for title in ("non-causal", "forward + backward", "d=128", "4 heads on 1"):
        assert title in output


def test_bench_refuses_lengths_in_the_wrong_order() -> None:
    code, output = invoke("bench", "--min-length", 256, "--max-length", 128)
    assert (code, "not below the shortest" in output) == (2, True)


def test_cases_differ_from_the_first_in_one_thing() -> None:
    plain, *others = list_cases(BenchOptions(min_length=64, max_length=64))
    for case in others:
        changed = {name for name in vars(plain) if getattr(plain, name) != getattr(case, name)}
        assert changed in ({"backward"}, {"causal"}, {"head_dim"}, {"heads"})


@pytest.mark.parametrize("case", [Case(96, backward=True), Case(96, heads=4, kv_heads=2, causal=False)])
def test_a_case_gives_the_same_call_to_exact_attention_and_to_methods(case: Case) -> None:
    from hyperattention import Method, Sinks, Window

    inputs = case.structured_inputs()
    assert inputs[0].shape == (1, case.heads, 96, 64)
    ours, exact = (case.call(method, inputs)() for method in (Method(Sinks(4), Window(256)), Exact()))
    assert_exact(ours, exact)


def test_calls_are_timed_in_turn() -> None:
    order: list[str] = []
    times = interleave({name: lambda name=name: order.append(name) for name in "abc"}, 2)
    assert order == list("abcbca")
    assert all(len(timing.seconds) == 2 for timing in times.values())
    with pytest.raises(ValueError, match="repeats=0"):
        interleave({"a": list}, 0)


def test_a_speedup_is_the_median_of_the_rounds_with_their_quartiles() -> None:
    ratio = speedup(Timing((8.0, 9.0, 10.0)), Timing((1.0, 3.0, 5.0)))
    assert (ratio.value, ratio.low, ratio.high) == (3.0, 2.5, 5.5)
    assert speedup(Timing((4.0,)), Timing((2.0,))).low == 2.0
    # medians of different rounds: their ratio, 3 / 2, lies beyond every quartile
    ratio = speedup(Timing((1.0, 3.0, 4.0, 1.0, 5.0)), Timing((1.0, 2.0, 4.0, 1.0, 5.0)))
    assert (ratio.low, ratio.value, ratio.high) == (1.0, 1.0, 1.0)


@pytest.mark.slow  # two fresh interpreters that import torch
def test_peak_memory_grows_with_what_a_call_needs() -> None:
    small, large = (measure(Case(length, head_dim=256), "exact", 1) for length in (512, 16384))
    assert small is not None
    assert large is not None
    # the output alone is 16 MiB
    assert small < 2**23 < 2**24 <= large


@pytest.mark.slow
def test_without_the_extra_the_command_says_what_to_install(run_python: Callable[[str], str]) -> None:
    code = (
        "import sys; sys.modules['typer'] = None\n"
        "try:\n    import hyperattention.cli.main\nexcept SystemExit as stop:\n    print(stop)"
    )
    assert "pip install 'hyperattention[demo]'" in run_python(code)
    code = (
        "import sys; sys.modules['matplotlib'] = None\nfrom typer.testing import CliRunner\n"
        "from hyperattention.cli.main import app\nprint(CliRunner().invoke(app, ['bench']).output)"
    )
    assert "this command needs matplotlib" in run_python(code)


@pytest.mark.slow
def test_importing_the_package_loads_nothing_of_the_command_line(run_python: Callable[[str], str]) -> None:
    listed = "print(sorted({'typer', 'rich', 'matplotlib', 'transformers'} & set(sys.modules)))"
    assert run_python(f"import sys, hyperattention; {listed}").strip() == "[]"
    # the check can fail
    assert "typer" in run_python(f"import sys, hyperattention.cli.main; {listed}")
