"""Judge methods on a model that retrieves at 32,768 tokens: added loss, retrieval by depth, error, pairs and time.

    python benchmarks/long_context.py --methods exact default --documents 1
    python benchmarks/long_context.py --documents 4 --seeds 3                  # all methods; resumes
    python benchmarks/long_context.py --device cuda --dtype bfloat16
    python benchmarks/long_context.py --length 65536 --out longer.jsonl        # beyond training, positions stretched by YaRN
    python benchmarks/long_context.py --show                                   # the table of what is recorded

The model is the embedded one, or another that reads bytes. A method is one of the names below, or
`alike:NUM:ROWS:POOLED:MOST:CANDIDATES` (what is left out keeps its default), `pooled:NUM:CHUNK:AVERAGES`, or
`rival:NAME:KEYS`, another method of `hyperattention.bench.rivals` with so many keys a query, by default as many as the
default lists. Every pass adds a line to the file of records at once; passes that are there are not run again.
"""

import argparse
import json
import time
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from claims import Record
from long_context_table import RECORDS, table

from hyperattention import default_method, lean_method, thorough_method
from hyperattention.bench.error import pool
from hyperattention.bench.rivals import rivals
from hyperattention.bench.rows import Row, control_of, window_of
from hyperattention.files.method_table import method_to_json
from hyperattention.files.records import environment, plain
from hyperattention.methods.base import AttentionMethod
from hyperattention.methods.exact import Exact
from hyperattention.methods.method import Method
from hyperattention.methods.pooled_chunks import PooledChunks
from hyperattention.methods.scatterbrain import Scatterbrain
from hyperattention.reference.evaluate import NUM_DEPTHS
from hyperattention.reference.model import LoadedModel, load_reference
from hyperattention.reference.passes import Pass, run_pass
from hyperattention.reference.samples import EvaluationSample, samples_of_documents
from hyperattention.reference.text import held_out_documents
from hyperattention.select.draw import Draw
from hyperattention.select.draw_alike import DrawAlike
from hyperattention.select.locate.sinks import Sinks
from hyperattention.select.locate.top_blocks import TopBlocks
from hyperattention.select.locate.window import Window
from hyperattention.select.score.key_scan import KeyScan

LONG = 10**9
# more than the packaged text has at this length: all of them are cut, so that a document's number names it
ALL = 10**6


def alike(num: int, rows: int = 64, pooled: int = 8, most: int = 8192, candidates: int = 12) -> Method:
    stage = DrawAlike(num, rows, pooled, most, candidates=candidates)
    return Method(Sinks(16), Window(192), stage, tile=128)


def scan(num: int, tile: int, pooled: int) -> Method:
    """Every key scored, for lists of `tile` positions: what a better choice costs where nothing is spared."""
    return Method(Sinks(16), Window(256), Draw(num, by=KeyScan(pooled, most=LONG)), tile=tile)


def _list(method: AttentionMethod) -> Method:
    assert isinstance(method, Method)
    return method


METHODS: dict[str, AttentionMethod] = {
    "exact": Exact(),
    "sinks_window": window_of(_list(default_method(LONG))),
    "control": control_of(_list(default_method(LONG))),
    "default": default_method(LONG),
    "thorough": thorough_method(LONG),
    "lean": lean_method(32_768),
    "scan_64_16": scan(688, 64, 16),
    "scan_16_8": scan(736, 16, 8),
    "scan_16_16": scan(736, 16, 16),
    # as many pairs as the default: blocks listed count twice, because their features are subtracted
    "scatterbrain": Scatterbrain(Sinks(16), Window(192), TopBlocks(20, 16), num_features=64),
}


def find_method(name: str) -> AttentionMethod:
    if name.startswith("alike:"):
        return alike(*map(int, name.split(":")[1:]))
    if name.startswith("pooled:"):
        # one machine runs what ranks of CHUNK tokens would, with pools of NUM keys
        num, chunk, averages = map(int, name.split(":")[1:])
        return PooledChunks(_list(default_method(LONG)), chunk=chunk, num=num, averages=averages)
    if name.startswith("control:"):
        # as many pairs as those drawn, sinks and the default's window
        return Method(Sinks(16), Window(256), Draw(int(name.split(":")[1])))
    if name.startswith("rival:"):
        _, rival, *keys = name.split(":")
        slots = int(keys[0]) if keys else round(_list(default_method(LONG)).cost(LONG).pairs)
        return next(row.method for row in rivals(slots) if row.name == rival)
    if name not in METHODS:
        raise SystemExit(
            f"--methods {name}: choose from {', '.join(METHODS)}, alike:NUM:ROWS:POOLED:MOST:CANDIDATES, "
            "pooled:NUM:CHUNK:AVERAGES or control:NUM"
        )
    return METHODS[name]


def measure(judged: LoadedModel, sample: EvaluationSample, method: AttentionMethod, seed: int, audit_rows: int) -> Record:
    """Run one pass, and refuse one that shows no approximation but claims to."""
    row, on_gpu = Row("row", "row", method), judged.model.device.type == "cuda"
    if on_gpu:
        torch.cuda.synchronize()
    began = time.perf_counter()
    done = run_pass(judged, sample, row, seed=seed, audit_rows=audit_rows)
    seconds = time.perf_counter() - began
    length = len(sample.tokens)
    cost = row.cost(length, True)
    if not isinstance(method, Exact):
        assert done.approximated == done.calls > 0, f"{method!r} answered {done.approximated} of {done.calls} calls"
        assert cost.share_of_exact < 1, f"{method!r} lists {cost.pairs} pairs, exact attention {cost.exact_pairs}"
    error = pool(done.reports)
    return {
        "nats_per_byte": done.nats_per_byte, "retrieval": float(done.right.float().mean()), "answers": len(done.right),
        "depths": depths_of(done, length), "error": error, "pairs": cost.pairs, "selection_pairs": cost.selection_pairs,
        "share_of_exact": cost.share_of_exact, "approximated": done.approximated, "calls": done.calls, "seconds": seconds,
        # a GPU goes on after a call has returned
        "attention_seconds": None if on_gpu else done.attention_seconds,
    }  # fmt: skip


def depths_of(done: Pass, length: int) -> list[tuple[float, int]]:
    """Count digits right and digits asked for, by how far back they were set, in equal ranges."""
    counts = [[0.0, 0] for _ in range(NUM_DEPTHS)]
    for distance, digits in zip(done.distance, done.right, strict=True):
        place = counts[min(NUM_DEPTHS - 1, distance * NUM_DEPTHS // length)]
        place[0] += float(digits.sum())
        place[1] += len(digits)
    return [(right, asked) for right, asked in counts]


def read(path: Path) -> list[dict]:
    """Read the passes of a file, which may hold records of other kinds as well."""
    records = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return [record for record in records if record["kind"] == "long_context"]


def _key(record: Mapping[str, object]) -> str:
    names = ("model", "length", "document", "seed", "name", "method", "run_on", "dtype")
    return json.dumps([record[name] for name in names], sort_keys=True)


def run(options: argparse.Namespace) -> None:
    judged = load_reference(*([options.model] if options.model else []))
    if (options.length or 0) > judged.max_length:
        judged = load_reference(*([options.model] if options.model else []), max_length=options.length)
    judged.model.to(options.device, getattr(torch, options.dtype))  # pyright: ignore[reportCallIssue]
    name_of_model = options.model.name if options.model else "reference"
    length = options.length or judged.max_length
    samples = samples_of_documents(held_out_documents(length, ALL))
    done = {_key(record) for record in read(options.out)}
    for document in range(options.first, min(options.first + options.documents, len(samples))):
        for seed in range(options.seeds):
            for name in options.methods:
                method = find_method(name)
                # exact attention draws nothing
                if isinstance(method, Exact) and seed:
                    continue
                record = {
                    "kind": "long_context", "model": name_of_model, "length": length, "document": document,
                    "seed": seed, "name": name, "method": method_to_json(method), "run_on": options.device,
                    "dtype": options.dtype,
                }  # fmt: skip
                if _key(record) in done:
                    continue
                found = measure(judged, samples[document], method, seed * 1009 + document, options.audit_rows)
                line = json.dumps(plain(record | dict(found) | {"repr": repr(method)} | environment() | on(options.device)))
                with options.out.open("a") as file:
                    file.write(line + "\n")
                print(f"document {document}, seed {seed}, {name}: {found['nats_per_byte']:.4f} nats a byte, "
                      f"{found['retrieval']:.3f} retrieved, {found['seconds']:.1f} s", flush=True)  # fmt: skip


def on(device: str) -> dict[str, object]:
    return {"device": f"cuda: {torch.cuda.get_device_name()}"} if device == "cuda" else {}


def show(records: Iterable[dict]) -> None:
    """Print a table for each model, length and device."""
    groups: dict[tuple, list[dict]] = {}
    for record in records:
        where = (record["model"], record["length"], record["run_on"], record["dtype"])
        groups.setdefault(where, []).append(record)
    for where, found in groups.items():
        print("\n" + ", ".join(map(str, where)) + "\n" + table(found))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", type=Path, help="folder of another model of bytes: config.json and model.safetensors")
    parser.add_argument("--methods", nargs="+", default=[*METHODS], help="names, or alike:NUM:ROWS:POOLED:MOST:CANDIDATES")
    parser.add_argument("--documents", type=int, default=1)
    parser.add_argument("--first", type=int, default=0, help="number of the first document")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--length", type=int, help="tokens of a document; beyond the model's own limit by YaRN")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--audit-rows", type=int, default=64)
    parser.add_argument("--out", type=Path, default=RECORDS)
    parser.add_argument("--show", action="store_true", help="print the table of what is recorded, and measure nothing")
    options = parser.parse_args()
    if not options.show:
        run(options)
    show(read(options.out))


if __name__ == "__main__":
    main()
