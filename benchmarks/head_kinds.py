"""Judge the presets against the control at the same slots on both kinds of structured heads, and compare keys with models'.

    python benchmarks/head_kinds.py                  # a quarter of an hour on two cores
    python benchmarks/head_kinds.py --model DIR --text FILE --tokens 4096     # keys of a pretrained model as well
    python benchmarks/head_kinds.py --long           # 131,072 tokens, width 128, two heads; no keys
    python benchmarks/head_kinds.py --toy --out /tmp/kinds.jsonl

What wins on one kind of heads can lose on the other; `docs/measured.md` shows both. Every record names its kind.
"""

import argparse
import json
import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from claims import announce
from head_kinds_table import LONG_RECORDS, RECORDS, table

from hyperattention.attention import attention
from hyperattention.bench.error import pool
from hyperattention.bench.rows import LONG, control_of
from hyperattention.error.audit import audit
from hyperattention.files.records import write_records
from hyperattention.methods.default import default_method, lean_method, thorough_method
from hyperattention.methods.method import Method
from hyperattention.reference.call_recorder import CallInputs
from hyperattention.reference.model import LoadedModel, load_model, load_reference
from hyperattention.reference.passes import watch_exact
from hyperattention.reference.samples import EvaluationSample, samples_of_documents, samples_of_text
from hyperattention.reference.text import held_out_documents
from hyperattention.synthetic import LOW_RANK, SCATTERED, structured
from hyperattention.synthetic.statistics import DIRECTIONS, LAGS, KeyStatistics, key_statistics

KINDS = {"scattered": SCATTERED, "low rank": LOW_RANK}


@dataclass(frozen=True)
class Size:
    """Inputs of one length, and how many of them."""

    length: int
    seeds: int
    rows: int
    heads: int = 4
    head_dims: tuple[int, ...] = (64, 128)


USUAL, LONGER, TOY = Size(32768, 3, 512), Size(131072, 1, 256, heads=2, head_dims=(128,)), Size(2048, 1, 64)


def presets(length: int) -> dict[str, Method]:
    """What runs above the crossovers, and at longer lengths the list that the lean method is below 131,072 keys."""
    found = {"default": default_method(LONG), "lean": lean_method(max(length, USUAL.length))}
    if length > USUAL.length:
        found["lean, below 131,072 keys"] = lean_method(USUAL.length)
    else:
        found["thorough"] = thorough_method(LONG)
    return {name: method for name, method in found.items() if isinstance(method, Method)}


def errors(size: Size, kind: str, head_dim: int) -> Iterator[dict[str, object]]:
    """The error of every preset and of its control, over the same inputs and rows."""
    reports: dict[tuple[str, str], list] = {}
    for seed in range(size.seeds):
        made = structured(size.length, heads=size.heads, head_dim=head_dim, kind=KINDS[kind], seed=seed)
        for name, method in presets(size.length).items():
            for role, each in (("preset", method), ("control", control_of(method))):
                out = attention(made.q, made.k, made.v, is_causal=True, method=each, seed=seed)
                report = audit(
                    made.q, made.k, made.v, out, rows=size.rows, is_causal=True, seed=seed, method=each, hardness=False
                )
                reports.setdefault((name, role), []).append(report)
    for name, method in presets(size.length).items():
        ours, control = (pool(reports[name, role]) for role in ("preset", "control"))
        by_head = {role: torch.stack([x.relative_error for x in reports[name, role]]).mean((0, 1)) for role in
                   ("preset", "control")}  # fmt: skip
        yield {
            "part": "error", "heads": kind, "kind_of_heads": KINDS[kind], "length": size.length, "head_dim": head_dim,
            "num_heads": size.heads, "seeds": size.seeds, "row": name, "method": repr(method),
            "control": repr(control_of(method)), "error": ours, "control_error": control,
            "ratio": ours.mean / control.mean if ours and control else None,
            "ratio_by_head": by_head["preset"] / by_head["control"], "slots": method.cost(LONG).pairs,
        }  # fmt: skip


def summary(name: str, found: list[KeyStatistics], **beside: object) -> dict[str, object]:
    """Quartiles over heads of every statistic."""
    values = {f"share in {count}": [x.shares[i] for x in found] for i, count in enumerate(DIRECTIONS)}
    values |= {"rank at 90%": [x.rank for x in found]}
    values |= {f"cosine at {lag}": [x.likeness[i] for x in found] for i, lag in enumerate(LAGS)}
    quartiles = {each: statistics.quantiles(numbers, n=4, method="inclusive") for each, numbers in values.items()}
    return {"part": "keys", "of": name, "num_heads": len(found), "quartiles": quartiles, **beside}


def synthetic_keys(length: int) -> Iterator[dict[str, object]]:
    for name, kind in KINDS.items():
        for head_dim in (64, 128):
            made = structured(length, heads=USUAL.heads, head_dim=head_dim, kind=kind)
            yield summary(f"structured, {name}", key_statistics(made.k), head_dim=head_dim, length=length)


def model_keys(loaded: LoadedModel, sample: EvaluationSample) -> dict[str, object]:
    found, widths = [], set()

    def note(call: CallInputs) -> None:
        found.extend(key_statistics(call.k))
        widths.add(call.k.shape[3])

    watch_exact(loaded, sample, note)
    return summary(loaded.name, found, head_dim=max(widths), length=len(sample.tokens))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="default: benchmarks/records/head_kinds.jsonl, or head_kinds_long.jsonl")
    parser.add_argument("--long", action="store_true", help="131,072 tokens")
    parser.add_argument("--model", type=Path, help="folder of a pretrained model, whose keys are measured as well")
    parser.add_argument("--text", type=Path, help="the text that it reads")
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--toy", action="store_true", help="short inputs, to see that the script runs")
    args = parser.parse_args()
    if args.toy and not args.out:
        parser.error("--toy measures nothing worth committing: name another file with --out")
    torch.set_num_threads(args.threads)
    size = TOY if args.toy else LONGER if args.long else USUAL
    out = args.out or (LONG_RECORDS if args.long else RECORDS)
    records: list[dict[str, object]] = []
    if not args.long:
        records += synthetic_keys(2048 if args.toy else 8192)
        loaded = load_reference()
        document = held_out_documents(2048 if args.toy else loaded.max_length, 1)
        records.append(model_keys(loaded, samples_of_documents(document)[0]))
    if args.model:
        loaded = load_model(args.model)
        records.append(model_keys(loaded, samples_of_text(args.text.read_text(errors="replace"), loaded, args.tokens, 1)[0]))
    for kind in KINDS:
        for head_dim in size.head_dims:
            announce(f"{kind}, width {head_dim}, {size.length:,} tokens")
            records += errors(size, kind, head_dim)
            write_records(out, records, kind="head_kinds")
    print(table([json.loads(line) for line in out.read_text().splitlines()]))


if __name__ == "__main__":
    main()
