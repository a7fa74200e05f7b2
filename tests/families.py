"""Which families of models `use` and `HyperCache` serve: tiny random models of all, against transformers' own attention.

python tests/families.py --write docs/models.md     writes the table of that page
python tests/families.py llama gemma2               prints the rows of some families
"""

import argparse
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

import hyperattention as ha
from hyperattention.integrations.transformers import HyperCache, use
from tiny_families import LONGEST, VOCABULARY, families, tiny_model

LENGTH, PADDING, NEW = 60, 17, 6
SAME, NOT_BUILT = "same", "not built tiny"
BEGIN, END = "<!-- families: written by tests/families.py -->\n", "<!-- families end -->\n"
_SMALL = ha.Method(ha.Sinks(1), ha.Window(4))


@dataclass(frozen=True)
class Row:
    """What became of one family."""

    family: str
    reference: str
    logits: str
    approximated: str
    cache: str

    def __str__(self) -> str:
        return f"| {self.family} | {self.reference} | {self.logits} | {self.approximated} | {self.cache} |"


def tokens() -> Tensor:
    return torch.randint(3, VOCABULARY, (2, LENGTH), generator=torch.Generator().manual_seed(7))


def keep_left() -> Tensor:
    return (torch.arange(LENGTH) >= torch.tensor([[0], [PADDING]])).long()


def plain(model: PreTrainedModel) -> Tensor:
    return model(tokens()).logits


def left_padded(model: PreTrainedModel) -> Tensor:
    return model(tokens(), attention_mask=keep_left()).logits[keep_left().bool()]


def right_padded(model: PreTrainedModel) -> Tensor:
    keep = keep_left().flip(1)
    return model(tokens(), attention_mask=keep).logits[keep.bool()]


def dense_bool(model: PreTrainedModel) -> Tensor:
    return model(tokens(), attention_mask=_causal()).logits


def dense_added(model: PreTrainedModel) -> Tensor:
    mask = torch.zeros(2, 1, LENGTH, LENGTH).masked_fill(~_causal(), torch.finfo(torch.float32).min)
    return model(tokens(), attention_mask=mask).logits


def _causal() -> Tensor:
    hidden = torch.ones(LENGTH, LENGTH).tril().bool() & (torch.arange(LENGTH) != 5)
    return (hidden | torch.eye(LENGTH).bool()).expand(2, 1, -1, -1)


def chunked(model: PreTrainedModel) -> Tensor:
    cache = DynamicCache(config=model.config)
    keep, out = keep_left(), []
    for start, stop in ((0, 40), (40, 41), (41, LENGTH)):
        given = {"attention_mask": keep[:, :stop], "past_key_values": cache, "use_cache": True}
        out.append(model(tokens()[:, start:stop], **given).logits)
    return torch.cat(out, 1)[keep.bool()]


def generated(model: PreTrainedModel, **options: object) -> Tensor:
    options = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False, "output_logits": True} | options
    out = model.generate(tokens(), attention_mask=keep_left(), return_dict_in_generate=True, **options)
    return torch.stack(out.logits, 1)


def static(model: PreTrainedModel) -> Tensor:
    return generated(model, cache_implementation="static")


SCENARIOS = (plain, left_padded, right_padded, dense_bool, dense_added, chunked, generated, static)


def attempt(scenario: Callable[[], Tensor]) -> Tensor | Exception:
    try:
        return scenario()
    except Exception as problem:
        return problem


def compare(ours: Tensor | Exception, reference: Tensor) -> str:
    """Say whether they are the same, how far they are apart, or why there is nothing to compare."""
    if isinstance(ours, ValueError):
        return f"refused: {_first_line(ours)}"
    if isinstance(ours, Exception):
        return f"error: {type(ours).__name__}: {_first_line(ours)}"
    # float32, several layers deep, with experts chosen by comparison
    live = torch.isfinite(reference)
    apart = float((ours - reference)[live].abs().max() / reference[live].abs().max().clamp_min(1))
    return SAME if apart <= 1e-3 else f"WRONG by {apart:.1e}"


def _first_line(problem: Exception) -> str:
    line = str(problem).strip().split("\n")[0].replace("|", "/")
    for remedy in (": use a model", ", which", ", so"):
        line = line.split(remedy)[0]
    return line[:150]


def judge(family: str) -> Row:
    """Make a tiny model of a family and compare all scenarios."""
    try:
        model = tiny_model(family)
    except LookupError:
        return Row(family, "-", NOT_BUILT, "-", "-")
    name = _switch_to_reference(model)
    with torch.no_grad():
        known = {scenario: attempt(lambda scenario=scenario: scenario(model)) for scenario in SCENARIOS}
        # transformers' eager attention adds a boolean mask to the scores as if it were numbers
        sound = {scenario: out for scenario, out in known.items() if name == "sdpa" or scenario is not dense_bool}
        references = {scenario: out for scenario, out in sound.items() if isinstance(out, Tensor)}
        verdicts = {s: compare(attempt(lambda s=s: _exactly(model, s)), out) for s, out in references.items()}
        return Row(family, name, _sum_up(verdicts), _approximated(model), _cache(model, references))


def _switch_to_reference(model: PreTrainedModel) -> str:
    for name in ("sdpa", "eager"):
        try:
            model.set_attn_implementation(name)
            with torch.no_grad():
                model(tokens())
            return name
        except (ValueError, ImportError):
            continue
    return "as it is"


def _exactly(model: PreTrainedModel, scenario: Callable[[PreTrainedModel], Tensor]) -> Tensor:
    with use(model, ha.Exact(), warn=False):
        return scenario(model)


def _sum_up(verdicts: dict[Callable, str]) -> str:
    others: dict[str, list[str]] = {}
    for scenario, verdict in verdicts.items():
        others.setdefault(verdict, []).append(scenario.__name__)
    if len(others) == 1:
        return next(iter(others))
    return "; ".join(verdict if verdict == SAME else f"{', '.join(names)} {verdict}" for verdict, names in others.items())


def _approximated(model: PreTrainedModel) -> str:
    try:
        with use(model, _SMALL, warn=False) as calls:
            model(tokens())
    except Exception:
        return "-"
    reasons = ", ".join(sorted(calls.counts.exact))
    if not calls.counts.approximated:
        return f"none: {reasons}" if reasons else "none"
    return f"some; exact: {reasons}" if reasons else "all"


def _cache(model: PreTrainedModel, references: dict[Callable, Tensor]) -> str:
    if generated not in references:
        return "no generation"

    def run() -> Tensor:
        with use(model, ha.Exact(), warn=False):
            return generated(model, past_key_values=HyperCache(model.config, budget=LONGEST))

    return compare(attempt(run), references[generated])


def table(rows: list[Row]) -> str:
    tried = [row for row in rows if row.logits != NOT_BUILT]
    same = sum(row.logits == SAME for row in tried)
    both = sum(row.logits == SAME == row.cache for row in tried)
    refused = sum(row.logits.startswith("refused") for row in tried)
    head = (
        f"transformers {transformers.__version__}: {len(tried)} of {len(rows)} families could be built tiny; {same} "
        f"of these have the same logits under `use`, {both} the same generation with `HyperCache` too, "
        f"and {refused} are refused.\n\n"
        "| family | compared with | logits under `use` | approximated | `HyperCache` |\n|---|---|---|---|---|\n"
    )
    return head + "".join(f"{row}\n" for row in rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("families", nargs="*")
    parser.add_argument("--write", type=Path)
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    rows = []
    for family in given.families or families():
        rows.append(judge(family))
        sys.stdout.write(f"{rows[-1]}\n")
        sys.stdout.flush()
    if given.write:
        before, _, rest = given.write.read_text().partition(BEGIN)
        given.write.write_text(before + BEGIN + table(rows) + END + rest.partition(END)[2])


if __name__ == "__main__":
    main()
