"""Judge methods on more than one kind of needle, at 32,768 bytes: facts asked twice, answers of many sizes, eval's tasks.

    python benchmarks/harder_tasks.py --documents 2      # an hour and a half on one core; resumes
    python benchmarks/harder_tasks.py --toy --out /tmp/h.jsonl    # to see that the script runs; says nothing
    python benchmarks/harder_tasks.py --show             # the tables of what is recorded

Exact attention runs first on each document: how often it answers right is the ceiling. A group of answers whose ceiling
is below 60 % is one that the model cannot do. If a task has only such groups, no other method runs on it. Every question is
read in the same pass as its context, so the questions too run through the approximation, and the right answer stands after
each (teacher forcing). `single` of `hyperattention eval` is left out, as a pass would answer one question; `multi-key` and
`multi-query` are one task if all questions of a context are read in one pass. Every pass adds a line to the records at once;
passes that are there are not run again.
"""

import argparse
import json
import random
import time
from collections.abc import Sequence
from itertools import product
from pathlib import Path

import torch
from harder_documents import DOCUMENTS, Answer, HarderDocument
from harder_tasks_table import ENOUGH, RECORDS, tables
from long_context import METHODS, read

from hyperattention.bench.error import pool
from hyperattention.bench.rows import Row
from hyperattention.files.method_table import method_to_json
from hyperattention.files.records import environment, plain
from hyperattention.methods.exact import Exact
from hyperattention.reference.evaluate import NUM_DEPTHS
from hyperattention.reference.model import LoadedModel, load_reference
from hyperattention.reference.passes import Pass, run_pass
from hyperattention.reference.text import held_out_text

NAMES = ("exact", "default", "control", "thorough", "lean")
# long enough for the thorough method to list fewer pairs than exact attention
TOY_LENGTH = 4608


def document_of(task: str, number: int, length: int) -> HarderDocument:
    text = held_out_text()
    if (number + 1) * length > len(text):
        raise SystemExit(f"document {number}: the held-out text has {len(text) // length} of {length} bytes")
    return DOCUMENTS[task](text[number * length : (number + 1) * length], length, random.Random(f"{task} {number}"))


def measure(judged: LoadedModel, document: HarderDocument, name: str, seed: int, audit_rows: int) -> dict:
    """Run one pass, and refuse one that claims to approximate and does not."""
    method, sample = METHODS[name], document.sample()
    row, began = Row(name, name, method), time.perf_counter()
    done = run_pass(judged, sample, row, seed=seed, audit_rows=audit_rows)
    seconds, length = time.perf_counter() - began, len(sample.tokens)
    cost = row.cost(length, True)
    if not isinstance(method, Exact):
        assert done.approximated == done.calls > 0, f"{name} answered {done.approximated} of {done.calls} calls"
        assert cost.share_of_exact < 1, f"{name} lists {cost.pairs} pairs, exact attention {cost.exact_pairs}"
    return {
        # a context of facts has only a few bytes of text after the last
        "nats_per_byte": done.nats_per_byte if sample.num_bytes > length // 100 else None,
        "nats_per_character": done.planted_nats / done.num_planted, "characters_right": float(done.right.float().mean()),
        "bytes": length, **shares(document.answers, done), "error": pool(done.reports), "pairs": cost.pairs,
        "selection_pairs": cost.selection_pairs, "share_of_exact": cost.share_of_exact, "approximated": done.approximated,
        "calls": done.calls, "seconds": seconds, "attention_seconds": done.attention_seconds,
    }  # fmt: skip


def shares(answers: Sequence[Answer], done: Pass) -> dict:
    """Count answers right at every character, and all answers, by group and by how far back the fact is."""
    # the ranges of distance end at the last question
    length = max(max(done.distance) + 1, max(answer.first for answer in answers))
    groups: dict[str, list[int]] = {}
    depths = [[0, 0] for _ in range(NUM_DEPTHS)]
    characters = iter(done.right[:, 0].tolist())
    for answer in answers:
        right = sum(next(characters) for _ in range(answer.size)) == answer.size
        for place in (groups.setdefault(answer.group, [0, 0]), depths[answer.distance * NUM_DEPTHS // length]):
            place[0] += right
            place[1] += 1
    assert next(characters, None) is None
    return {"groups": dict(sorted(groups.items())), "depths": depths}


def possible(record: dict) -> bool:
    """Whether exact attention answers some group of a task often enough."""
    return any(right >= ENOUGH * asked for right, asked in record["groups"].values())


def _key(record: dict) -> str:
    return json.dumps([record[name] for name in ("task", "length", "document", "seed", "name", "method")], sort_keys=True)


def run(options: argparse.Namespace) -> None:
    judged = load_reference()
    length = TOY_LENGTH if options.toy else judged.max_length
    done = {_key(record): record for record in read(options.out)}
    names = sorted({"exact", *options.methods}, key=NAMES.index)
    for number, seed, task in product(range(options.documents), range(options.seeds), options.tasks):
        document = document_of(task, number, length)
        for name in names:
            record = {
                "kind": "harder_tasks", "task": task, "length": length, "document": number,
                # exact attention draws nothing
                "seed": 0 if name == "exact" else seed, "name": name, "method": method_to_json(METHODS[name]),
            }  # fmt: skip
            if _key(record) not in done:
                found = measure(judged, document, name, seed * 1009 + number, options.audit_rows)
                record = plain(record | found | environment())
                with options.out.open("a") as file:
                    file.write(json.dumps(record) + "\n")
                done[_key(record)] = record
                where = f"{task}, document {number}, seed {seed}, {name}"
                print(f"{where}: {found['groups']}, {found['seconds']:.0f} s", flush=True)
            if name == "exact" and not possible(done[_key(record)]):
                break


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tasks", nargs="+", default=[*DOCUMENTS], choices=[*DOCUMENTS])
    parser.add_argument("--methods", nargs="+", default=NAMES, choices=NAMES, help="exact attention always runs")
    parser.add_argument("--documents", type=int, default=1)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--audit-rows", type=int, default=64)
    parser.add_argument("--out", type=Path, default=RECORDS)
    parser.add_argument("--toy", action="store_true", help="short documents, to see that the script runs")
    parser.add_argument("--show", action="store_true", help="print the tables of what is recorded, and measure nothing")
    options = parser.parse_args()
    if options.toy and options.out == RECORDS:
        parser.error("--toy measures nothing worth committing: name another file with --out")
    torch.set_num_threads(options.threads)
    if not options.show:
        run(options)
    print(tables(read(options.out)))


if __name__ == "__main__":
    main()
