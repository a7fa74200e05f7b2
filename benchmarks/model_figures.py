"""The gate of the reference model: what makes losses and retrieval on it mean something."""

from claims import Plan, Record, announce, figure

from hyperattention.bench.rows import Row
from hyperattention.methods.exact import Exact
from hyperattention.methods.method import Method
from hyperattention.reference.evaluate import ModelJudgement, evaluate
from hyperattention.reference.model import load_reference
from hyperattention.reference.samples import samples_of_documents
from hyperattention.reference.text import held_out_documents
from hyperattention.report.demo import judgement_record
from hyperattention.select.locate.sinks import Sinks
from hyperattention.select.locate.window import Window

# the gate is a property of the model: its window stays what it is when the default method changes
GATE = (Row("exact", "exact (SDPA)", Exact()), Row("sinks_window", "sinks + window", Method(Sinks(16), Window(256))))


def judged_samples(plan: Plan, count: int):
    loaded = load_reference(plan.reference)
    length = plan.loaded or loaded.max_length
    return loaded, samples_of_documents(held_out_documents(length, count)), length


def reference_gate(plan: Plan) -> list[Record]:
    """The gate of the model: far keys matter to its loss, and exact attention finds answers at every distance."""
    loaded, samples, length = judged_samples(plan, plan.gate_documents)
    exact, dropped = results = evaluate(loaded, samples, GATE, audit_rows=0, on_step=announce)
    shared = {"length": length, "documents": len(samples), "seed": 0}
    return [*gate_figures(exact, dropped, length), *(shared | judgement_record(each) for each in results)]


def gate_figures(exact: ModelJudgement, dropped: ModelJudgement, length: int) -> list[Record]:
    gap, planted = (getattr(dropped, name) - getattr(exact, name) for name in ("bits_per_byte", "bits_with_planted"))
    # a range of distances without answers has shown nothing
    least = min(depth.share or 0.0 for depth in exact.depths)
    beside = f"{planted:.3f} with planted lines; {dropped.retrieval:.1%} of digits retrieved (exact {exact.retrieval:.1%})"
    where = f"gate, {length:,} bytes"
    return [
        figure(f"{where}: exact beats sinks + window", ">= 0.05 bits a byte", gap, gap >= 0.05, f"{gap:.3f} bits", beside),
        figure(
            f"{where}: exact retrieval at every depth",
            ">= 90 %, >= 400 answers",
            least,
            least >= 0.9 and exact.answers >= 400,
            f"{least:.1%}",
            f"{exact.answers} answers in {len(exact.depths)} ranges of distance",
        ),
    ]
