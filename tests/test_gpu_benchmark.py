"""The GPU benchmark runs, at toy sizes on a CPU, and its records and tables say what was measured and what was not."""

import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
BENCHMARKS = ROOT / "benchmarks"
PARTS = {"ceilings", "forward", "backward", "crossover", "selection", "audit", "peer", "long", "decode", "stack", "flex"}
WHERE = {"commit", "device", "versions", "dtype", "seed", "command", "toy", "kind", "part"}
LINE = {
    "name", "label", "method", "exact", "approximated", "pairs_per_query", "share_of_exact_pairs", "rounds", "median_s",
    "quartiles_s", "speedup", "error", "peak_memory_bytes", "floor_s", "over_floor",
}  # fmt: skip
# what exact attention may differ by in float32
ROUNDING = 1e-5
# a checkout with the layout and the imports of the published one, and none of its code
PEER = {
    "hyper_attn.py": """
import torch
from einops import rearrange
from .utils import exact

class HyperAttention(torch.nn.Module):
    def __init__(self, input_dim, block_size, sample_size, min_seq_len, cuda):
        super().__init__()
        self.cuda = cuda

    def forward(self, query, key, value, causal=False):
        assert rearrange(torch.arange(3), "n -> 1 n 1").shape == (1, 3, 1)
        out, lse = exact(query, key, value, causal, self.cuda)
        assert lse.shape == query.shape[:3]
        return out
""",
    "utils.py": """
from flash_attn import flash_attn_func as flash_attn_func_cuda
from .flash_attn_triton_for_hyper import flash_attn_func

def exact(q, k, v, causal, cuda):
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    if cuda:
        out, lse, _ = flash_attn_func_cuda(q, k, v, softmax_scale=None, causal=causal, return_attn_probs=True)
    else:
        out, lse = flash_attn_func(q, k, v, None, causal, None)
    return out.transpose(1, 2), lse
""",
    "flash_attn_triton_for_hyper.py": "raise ImportError('written for a Triton that is gone')",
}


def run_script(name: str, *words: object) -> subprocess.CompletedProcess:
    command = [sys.executable, str(BENCHMARKS / name), *map(str, words)]
    one_core = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, check=False, env=one_core)


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def toy(tmp_path_factory) -> tuple[list[dict], str]:
    folder = tmp_path_factory.mktemp("gpu")
    package = folder / "peer" / "models" / "attention"
    package.mkdir(parents=True)
    for name, text in PEER.items():
        (package / name).write_text(text)
    done = run_script("gpu/run.py", "--toy", "--out", folder / "gpu.jsonl", "--peer", folder / "peer", "--commit", "abc")
    assert done.returncode == 0, done.stdout + done.stderr
    return read(folder / "gpu.jsonl"), done.stdout


def lines_of(records: list[dict]) -> list[tuple[dict, dict]]:
    return [(record, each) for record in records for each in record.get("contenders", ()) if not each.get("failed")]


@pytest.mark.heavy
def test_every_part_is_measured_and_says_where(toy):
    records, printed = toy
    assert {record["part"] for record in records} == PARTS
    for record in records:
        assert set(record) >= WHERE
        assert record["commit"] == "abc"
        assert record["toy"]
        assert "skipped" not in record
        assert "failed" not in record
    assert "not measured" in printed


@pytest.mark.heavy
def test_every_line_is_complete_and_its_error_finite(toy):
    for record, each in lines_of(toy[0]):
        assert set(each) >= LINE, record["part"]
        assert each["median_s"] > 0
        assert each["quartiles_s"][0] <= each["median_s"] <= each["quartiles_s"][1]
        assert each["error_failed"] is None
        # what is not an output has no error, and the exact stack is what the others are judged by
        part_of_a_call = each["name"] in ("audit", "full_audit", "selection", "control_selection")
        if part_of_a_call or (record["part"], each["exact"]) == ("stack", True):
            assert each["error"] is None
        else:
            assert all(math.isfinite(each["error"][key]) for key in ("mean", "low", "high"))


@pytest.mark.heavy
def test_approximation_is_claimed_only_where_fewer_pairs_were_listed(toy):
    for record, each in lines_of(toy[0]):
        if each["approximated"]:
            assert each["share_of_exact_pairs"] < 1
        if each["exact"]:
            assert not each["approximated"]
            assert each["share_of_exact_pairs"] == 1
            assert "exact" in each["label"]
            assert each["error"] is None or each["error"]["mean"] < ROUNDING
        elif each["name"].startswith("peer") and each["error"]:
            # the stand-ins compute exact attention, and so must the peer made of them
            assert each["error"]["mean"] < ROUNDING, record


@pytest.mark.heavy
def test_exact_and_the_control_stand_beside_every_comparison(toy):
    for record in toy[0]:
        if record["part"] in ("ceilings",):
            continue
        names = {each["name"] for each in record["contenders"]}
        assert {"ours", "control"} <= names
        if record["part"] not in ("audit", "selection"):
            assert record["reference"] in names
            assert record["ratio"]["value"] > 0
    inputs = {(record["part"], record.get("inputs")) for record in toy[0]}
    for part in ("forward", "backward", "crossover", "long", "decode", "peer", "flex"):
        assert {(part, "structured"), (part, "gaussian")} <= inputs


@pytest.mark.heavy
def test_decoding_runs_the_default_exactly_and_a_named_method_as_named(toy):
    found = [record for record in toy[0] if record["part"] == "decode"]
    assert {record["shape"]["batch"] for record in found} == {1, 2}
    for record in found:
        by_name = {each["name"]: each for each in record["contenders"]}
        assert by_name["default"]["exact"]
        assert "(exact ran)" in by_name["default"]["label"]
        assert by_name["ours"]["approximated"]


@pytest.mark.heavy
def test_a_backend_that_is_missing_says_why(toy):
    found = [each for record in toy[0] for each in record.get("contenders", ()) if each.get("failed")]
    assert {each["name"] for each in found} == {"exact_cudnn"}
    assert all(len(each["failed"]) > len("RuntimeError: ") for each in found)


@pytest.mark.heavy
def test_parts_for_which_no_time_is_left_are_skipped_and_say_so(tmp_path):
    out = tmp_path / "gpu.jsonl"
    done = run_script("gpu/run.py", "--toy", "--out", out, "--only", "forward", "--only", "stack", "--seconds", 0.01)
    assert done.returncode == 0, done.stderr
    found = {record["part"]: record for record in read(out)}
    assert "out of time" in found["forward"]["skipped"]
    assert "out of time" in found["stack"]["skipped"]


@pytest.mark.heavy
def test_a_quick_look_measures_lengths_and_launches(tmp_path):
    done = run_script("gpu/run.py", "--toy", "--quick", "--out", tmp_path / "gpu.jsonl")
    assert done.returncode == 0, done.stdout + done.stderr
    records = read(tmp_path / "gpu.jsonl")
    assert {record["part"] for record in records} == {"ceilings", "lengths", "launches"}
    for record in records:
        if record["part"] == "lengths":
            by_name = {each["name"]: each for each in record["contenders"]}
            assert set(by_name) == {record["reference"], "ours", "control", "lean"}
            assert all(by_name[name]["approximated"] for name in ("ours", "control", "lean"))
        if record["part"] == "launches":
            assert record["launches"] >= len(record["kernels"]) > 0
    assert len([record for record in records if record["part"] == "launches"]) == 4
    assert done.stdout.count("before: not recorded") == 6


@pytest.mark.heavy
@pytest.mark.parametrize(
    ("body", "why"),
    [("assert True", None), ("assert False", "a kernel is wrong"), ("pytest.skip('no device')", "no test")],
    ids=["right", "wrong", "skipped"],
)
def test_nothing_is_recorded_unless_tests_of_kernels_ran_and_passed(monkeypatch, tmp_path, body, why):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from gpu import quick

    test = tmp_path / "test_kernel_of_mine.py"
    test.write_text(f"import pytest\n\n\n@pytest.mark.gpu\ndef test_it():\n    {body}\n")
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = gpu: needs a device\n")
    found = quick.why_wrong([test], 120)
    assert found is None if why is None else why in str(found)


def test_a_length_is_compared_with_its_last_record(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from gpu import quick

    before = [comparison("forward", 131072, 0.5), comparison("forward", 131072, 0.2), comparison("crossover", 4096, 0.4)]
    told = quick.against([comparison("lengths", 131072, 0.1) | {"shape": before[0]["shape"]}], before)
    assert [each.strip().split(":")[0] for each in told] == ["131,072 ours", "131,072 control"]
    assert "10x, error 0.1 [0.05, 0.2]; before: 5x" in told[0]
    assert "not recorded" in quick.against([comparison("lengths", 4096, 0.1)], [])[0]
    # another method of the same name, and the same one at other slots, are no earlier measurement
    for change in ({"label": "another"}, {"pairs_per_query": 976}):
        other = comparison("forward", 131072, 0.2)
        other["contenders"] = [each | change for each in other["contenders"]]
        now = comparison("lengths", 131072, 0.1) | {"shape": other["shape"]}
        assert all("not recorded" in each for each in quick.against([now], [other]))


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what is missing where there is no CUDA device")
def test_without_a_gpu_it_asks_for_toy(tmp_path):
    done = run_script("gpu/run.py", "--out", tmp_path / "gpu.jsonl")
    assert done.returncode != 0
    assert "pass --toy" in done.stderr
    assert not (tmp_path / "gpu.jsonl").exists()


def test_it_runs_where_jaxtyping_is_not_installed(run_python):
    blocked = f"import sys; sys.modules['jaxtyping'] = None; sys.path.insert(0, {str(BENCHMARKS)!r})"
    assert run_python(f"{blocked}; from gpu import run; print(len(run.PARTS))").strip() == str(len(PARTS) - 1)


def test_the_command_line_goes_on_after_a_broken_device_and_keeps_toys_apart(run_python, tmp_path):
    out = tmp_path / "gpu.jsonl"
    code = f"""
import sys; sys.path.insert(0, {str(BENCHMARKS)!r})
from gpu import run
args = run.parse(["--toy", "--out", {str(out)!r}, "--peer", "here", "--commit", "abc"])
again = run.parse(run.rest_of(args, run.PARTS[-2:], 99.6))
assert (again.out, again.peer, again.commit, again.toy) == (args.out, args.peer, "abc", True)
print(again.append, again.only, again.seconds)
try:
    run.parse(["--toy"])
except SystemExit as refused:
    print(refused.code)
"""
    assert run_python(code).split("\n")[:2] == ["True ['stack', 'flex'] 100.0", "2"]


def line(name: str, median_s: float, error: float, *, exact: bool = False, base: float = 1.0, over: float = 2.0) -> dict:
    return {
        "name": name, "label": name, "exact": exact, "approximated": not exact, "share_of_exact_pairs": 0.01,
        "pairs_per_query": 960,
        "median_s": median_s, "quartiles_s": [median_s, median_s], "speedup": {"value": base / median_s}, "floor_s": 0.001,
        "error": {"mean": error, "low": error / 2, "high": error * 2}, "over_floor": over, "peak_memory_bytes": 2**20,
    }  # fmt: skip


def comparison(part: str, keys: int, ours_s: float, *, inputs: str = "structured", causal: bool = True, **more) -> dict:
    lines = [line("exact_flash", 1.0, 0.001, exact=True), line("ours", ours_s, 0.1), line("control", ours_s, 0.2)]
    shape = {"title": part, "heads": 32, "keys": keys, "causal": causal}
    where = {"commit": "abc", "device": "H", "versions": {"torch": "2"}}
    ratio = {"value": 1 / ours_s}
    record = {
        "part": part,
        "inputs": inputs,
        "shape": shape,
        "reference": "exact_flash",
        "ratio": ratio,
        "contenders": lines,
    }
    return record | where | more


@pytest.fixture
def gpu_bars(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from gpu import bars

    return bars


def bar_of(gpu_bars, records: list[dict], start: str):
    return next(bar for bar in gpu_bars.bars(records) if bar.figure.startswith(start))


def test_a_ratio_of_different_rounds_is_the_median_of_all_pairs(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from gpu.timing import ratio_of

    from hyperattention.bench.timing import Timing

    # 1/4, 1/2, 1, 9/4, 9/2 and 9; the ratio of the medians is 5/2
    assert ratio_of(Timing((1.0, 9.0)), Timing((1.0, 2.0, 4.0))).value == 1.625


def test_prices_of_slots_are_those_of_the_record(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from gpu import prices

    # 6.99 ms for 974 slots in lists of 64 rows, 6.48 ms for 1,022 in lists of 256
    assert prices.seconds_of_a_slot(16) == pytest.approx(6.989e-3 / (974.3 * 131_072), rel=1e-3)
    assert prices.seconds_of_a_slot(64) == pytest.approx(6.479e-3 / (1022 * 131_072), rel=1e-3)


@pytest.mark.parametrize(("ours_s", "met"), [(1 / 26, True), (1 / 24, False)])
def test_a_bar_is_met_or_missed_by_the_ratio_of_one_record(gpu_bars, ours_s, met):
    bar = bar_of(gpu_bars, [comparison("forward", 131072, ours_s)], "causal forward, 131,072")
    assert bar.met is met
    assert "control" in bar.beside
    assert bar_of(gpu_bars, [comparison("forward", 131072, ours_s)], "non-causal").met is None


def test_toys_and_exact_runs_meet_no_bar(gpu_bars):
    toy = comparison("forward", 131072, 0.01, toy=True)
    exact = comparison("forward", 131072, 0.01)
    exact["contenders"][1]["approximated"] = False
    for record in (toy, exact):
        assert bar_of(gpu_bars, [record], "causal forward, 131,072").met is None


def test_the_crossover_is_where_no_longer_length_is_slower(gpu_bars):
    times = {2048: 0.5, 4096: 2.0, 6144: 0.9, 8192: 0.5}
    records = [comparison("crossover", keys, seconds) for keys, seconds in times.items()]
    bar = bar_of(gpu_bars, records, "crossover")
    assert bar.met
    assert bar.shown == "6,144 tokens"
    assert bar_of(gpu_bars, [*records, comparison("forward", 32768, 1.5)], "crossover").met is False


def test_the_peer_is_beaten_in_time_only_at_no_larger_error(gpu_bars):
    for peer_error, met in ((0.3, True), (0.05, False)):
        record = comparison("peer", 131072, 0.01)
        record["contenders"].append(line("peer_flash", 0.05, peer_error))
        assert bar_of(gpu_bars, [record], "vs published").met is met


def test_skipped_parts_tell_why_in_the_table(gpu_bars):
    skipped = {"part": "long", "skipped": "out of time: 3 s left"}
    bar = bar_of(gpu_bars, [skipped, comparison("forward", 131072, 0.01)], "causal forward, 1,048,576")
    assert bar.met is None
    assert "3 s left" in bar.shown


def test_without_records_every_bar_says_that_no_gpu_measured_it(gpu_bars):
    from gpu.table import gpu_table

    rows = gpu_table([]).splitlines()[2:]
    assert len(rows) == len(gpu_bars.bars([]))
    assert all(gpu_bars.NO_GPU in row for row in rows)


@pytest.mark.parametrize("measured", [False, True])
def test_report_fills_the_block_of_the_performance_page(tmp_path, measured):
    records, page = tmp_path / "records", tmp_path / "performance.md"
    shutil.copytree(BENCHMARKS / "records", records)
    (records / "gpu.jsonl").unlink(missing_ok=True)
    if measured:
        found = [comparison("forward", 131072, 0.01), comparison("forward", 131072, 0.02, inputs="gaussian")]
        (records / "gpu.jsonl").write_text("".join(json.dumps(record) + "\n" for record in found))
    readme, figures = (shutil.copy(ROOT / name, tmp_path / Path(name).name) for name in ("README.md", "docs/measured.md"))
    before = figures.read_text()
    words = ("--records", records, "--readme", readme, "--measured", figures, "--performance", page)
    assert run_script("report.py", *words).returncode == 0
    page.write_text("# Speed\n\n<!-- gpu figures: begin -->\n<!-- gpu figures: end -->\n\nThe end.\n")
    assert run_script("report.py", *words, "--check").returncode != 0
    assert run_script("report.py", *words).returncode == 0
    assert run_script("report.py", *words, "--check").returncode == 0
    text = page.read_text()
    assert ("no GPU yet" in text) is not measured
    assert ("100x" in text) is measured
    assert text.endswith("The end.\n")
    assert (tmp_path / "gpu.png").exists() is (measured and "gpu.png" in text)
    # GPU records leave the other table as it was
    assert before.split("<!-- measured: begin")[0] == figures.read_text().split("<!-- measured: begin")[0]
    assert "gpu" not in figures.read_text().split("<!-- measured: begin")[1].split("measured: end")[0]


@pytest.mark.heavy
def test_the_list_kernels_are_compared_and_a_wrong_one_leaves_no_record(tmp_path):
    pytest.importorskip("triton", reason="the test extra installs Triton, which CPU builds of torch do not bring")
    path = tmp_path / "list.jsonl"
    done = run_script("gpu/list_kernel.py", "--toy", "--out", path, "--commit", "abc")
    assert done.returncode == 0, done.stderr
    records = [json.loads(line) for line in path.read_text().splitlines()]
    assert [record["part"] for record in records] == ["list"] * 5 + ["profile", "sweep"]
    assert all(record["commit"] == "abc" and "triton" in record["versions"] for record in records)
    for record in records[:5]:
        assert set(record["ms"]) == {"old", "new", "flatten", "new, flattened"}
        assert record["errors"]["new"] < ROUNDING
    # the script with a kernel that leaves out a factor
    script = tmp_path / "wrong.py"
    spoiled = "triton_flat.flat_forward = lambda q, *x, f=triton_flat.flat_forward: f(1.01 * q, *x)\n"
    source = (
        (BENCHMARKS / "gpu" / "list_kernel.py")
        .read_text()
        .replace('if __name__ == "__main__":', spoiled + 'if __name__ == "__main__":')
    )
    script.write_text(f"import sys; sys.path.insert(0, {str(BENCHMARKS)!r})\n" + source)
    done = run_script(str(script), "--toy", "--out", tmp_path / "none.jsonl")
    assert done.returncode != 0
    assert "is wrong" in done.stderr
    assert not (tmp_path / "none.jsonl").exists()
