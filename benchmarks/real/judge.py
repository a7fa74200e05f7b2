"""Judge every preset and a calibrated plan on SmolLM2-135M-Instruct: added nats a token, error and pairs.

    make real                                                                # sets up, tries the commands, one document
    python benchmarks/real/judge.py --methods exact default --documents 1    # resumes: what is recorded is not run again
    python benchmarks/real/judge.py --documents 4 --plan PLAN                # in full: some 25 minutes a document and kind
    python benchmarks/real/judge.py --show                                   # the table of what is recorded
    python benchmarks/real/judge.py --write     # the same, into docs/models.md; and the figures for README, for report.py

The loss is that of the second half of a document, with exact attention and the method run by the same call of `use` in all
layers. `model.py` says where the model comes from, `texts.py` what it reads. Every pass adds a line to the file of records.
The seconds of a pass are those of the clock, and count what other programs took; `times.py` compares times.
"""

import argparse
import json
import os
import time
from collections.abc import Mapping
from pathlib import Path

from methods import METHODS, QUICK, methods_of
from model import FOLDER, PACKAGE, prepare
from table import RECORDS, TIMES, read, table, write_figures, write_page
from texts import TEXTS, judged_documents, name_of
from torch.nn.functional import cross_entropy

from hyperattention.bench.error import pool
from hyperattention.files.records import environment, find_version, plain
from hyperattention.integrations.transformers import use
from hyperattention.methods.base import AttentionMethod
from hyperattention.methods.exact import Exact
from hyperattention.reference.call_recorder import CallRecorder, watched
from hyperattention.reference.model import LoadedModel, load_model
from hyperattention.reference.samples import EvaluationSample

# tokens whose loss is one number of a record: the standard error is taken over these pieces
PIECE = 512


def measure(loaded: LoadedModel, sample: EvaluationSample, method: AttentionMethod, seed: int, rows: int) -> dict:
    """Run one pass with a method in all layers, and refuse one that shows no approximation but claims to."""
    length, began = len(sample.tokens), time.perf_counter()
    ids = sample.tokens[None]
    with use(loaded.model, method, seed=seed, warn=False) as counter:
        watch = CallRecorder(counter, method, rows=rows, seed=seed)
        with watched(loaded.model, watch):
            kept = length - length // 2 + 1
            logits = loaded.model(ids, use_cache=False, logits_to_keep=kept).logits[0, :-1]
            pieces = zip(logits.split(PIECE), ids[0, 1 - kept :].split(PIECE), strict=True)
            nats = [cross_entropy(each.float(), target, reduction="sum").item() for each, target in pieces]
    seconds, counts = time.perf_counter() - began - watch.audit_seconds, counter.counts
    cost = method.cost(length)
    if not isinstance(method, Exact):
        assert counts.approximated > 0, f"{method!r} answered none of {counts.total} calls: {counts}"
        assert cost.share_of_exact < 1, f"{method!r} lists {cost.pairs} pairs, exact attention {cost.exact_pairs}"
    return {
        "nats": nats, "tokens": kept - 1, "nats_per_token": sum(nats) / (kept - 1), "error": pool(watch.reports),
        "pairs": cost.pairs, "selection_pairs": cost.selection_pairs, "share_of_exact": cost.share_of_exact,
        "approximated": counts.approximated, "calls": counts.total, "attention_seconds": watch.attention_seconds,
        "seconds": seconds, "load_average": os.getloadavg(),
    }  # fmt: skip


def key_of(record: Mapping[str, object]) -> str:
    return json.dumps([record[name] for name in ("model", "length", "sample", "name", "method")], sort_keys=True)


def run(options: argparse.Namespace) -> None:
    loaded = load_model(prepare(options.model))
    length, methods = options.length or loaded.max_length, methods_of(options.methods, options.plan)
    documents = {kind: judged_documents(loaded, kind, length) for kind in options.texts}
    done = {key_of(record) for record in read(options.out)}
    for number in range(options.first, options.first + options.documents):
        for kind, samples in documents.items():
            if number >= len(samples):
                print(f"{kind} has only {len(samples)} documents of {length:,} tokens", flush=True)
                continue
            for name, (method, about) in methods.items():
                record = {
                    "kind": "real_model", "model": f"{PACKAGE} {find_version(PACKAGE)}", "length": length, "text": kind,
                    "document": number, "sample": name_of(samples[number]), "name": name, "method": about,
                }  # fmt: skip
                if key_of(record) not in done:
                    _add(options, record, measure(loaded, samples[number], method, number, options.audit_rows))


def _add(options: argparse.Namespace, record: dict, found: dict) -> None:
    line = json.dumps(plain(record | found | environment()))
    options.out.parent.mkdir(parents=True, exist_ok=True)
    with options.out.open("a") as file:
        file.write(line + "\n")
    print(f"{record['text']} {record['document']}, {record['name']}: {found['nats_per_token']:.4f} nats a token, "
          f"{found['seconds']:.0f} s, {found['attention_seconds']:.0f} of them in attention", flush=True)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", type=Path, default=FOLDER, help="the folder; written first if it is not there")
    parser.add_argument("--methods", nargs="*", default=[*METHODS])
    parser.add_argument("--plan", type=Path, nargs="*", default=[], help="plans that `hyperattention calibrate` wrote")
    parser.add_argument("--quick", action="store_true", help="one document of prose, and the methods that one has to know")
    parser.add_argument("--texts", nargs="+", default=[*TEXTS], choices=[*TEXTS])
    parser.add_argument("--documents", type=int, default=1, help="documents of each kind of text")
    parser.add_argument("--first", type=int, default=0, help="number of the first document")
    parser.add_argument("--length", type=int, help="tokens of a document; the model's own limit, 8,192, if left out")
    parser.add_argument("--audit-rows", type=int, default=64)
    parser.add_argument("--out", type=Path, default=RECORDS)
    parser.add_argument("--show", action="store_true", help="print the table of what is recorded, and measure nothing")
    parser.add_argument(
        "--write",
        action="store_true",
        help="write that table into docs/models.md and the figures beside the records, and measure nothing",
    )
    options = parser.parse_args()
    if options.quick:
        options.texts, options.methods, options.documents = ["prose"], [*QUICK], 1
    if not (options.show or options.write):
        run(options)
    # times of another machine would say nothing about these passes
    records, times = read(options.out), read(options.out.with_name(TIMES.name))
    print(table(records, times))
    if options.write:
        write_page(records, times)
        write_figures(records, times)


if __name__ == "__main__":
    main()
