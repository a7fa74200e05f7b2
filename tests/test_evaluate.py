"""What the evaluation says must be what the model did: losses, answers, pairs, labels and intervals."""

import math
import random
import re
from pathlib import Path

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import hyperattention as ha
from assertions import assert_exact
from hyperattention import select
from hyperattention.bench.error import Error, pool
from hyperattention.bench.rows import Row, control_of, find_default, rows, window_of
from hyperattention.evaluation.reading import reading
from hyperattention.reference.documents import make_document
from hyperattention.reference.evaluate import NUM_DEPTHS, evaluate
from hyperattention.reference.model import LoadedModel, load_reference
from hyperattention.reference.passes import capture, digits_right, run_pass, watch_exact
from hyperattention.reference.samples import EvaluationSample, samples_of_documents
from hyperattention.reference.text import documents_from, held_out_documents, held_out_text

LENGTH = 256
SMALL = ha.Method(ha.Sinks(4), ha.Window(16), ha.TopBlocks(2, block_size=8, by=select.KeySketch(8)), ha.Draw(8), tile=16)


@pytest.fixture(scope="module")
def loaded() -> LoadedModel:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=256, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, max_position_embeddings=512, initializer_range=0.3,
    )  # fmt: skip
    return LoadedModel(transformers.LlamaForCausalLM(config).eval(), "a tiny model")


@pytest.fixture(scope="module")
def samples() -> tuple[EvaluationSample, ...]:
    return samples_of_documents(held_out_documents(LENGTH, 2))


@pytest.mark.parametrize("method", [find_default(), SMALL])
def test_rows_list_the_same_pairs_as_the_method_judged(method: ha.Method) -> None:
    pairs = method.cost(10**6).pairs
    assert control_of(method).cost(10**6).pairs == pairs
    assert window_of(method).cost(10**6).pairs < pairs
    assert control_of(method).complete
    assert not window_of(method).complete
    assert [row.name for row in rows(method)] == ["exact", "sinks_window", "control", "published", "default"]


def test_a_control_needs_a_window_and_slots_to_draw() -> None:
    with pytest.raises(ValueError, match="no Sinks or no Window"):
        control_of(ha.Method(ha.Sinks(4), ha.Draw(8)))
    with pytest.raises(ValueError, match="its control has no draws"):
        control_of(ha.Method(ha.Sinks(4), ha.Window(16)))


@pytest.mark.filterwarnings("error")
def test_passes_with_exact_attention_end_without_a_warning(
    loaded: LoadedModel, samples: tuple[EvaluationSample, ...]
) -> None:
    exact = Row("exact", "exact", ha.Exact())
    assert run_pass(loaded, samples[0], exact).approximated == 0
    assert len(capture(loaded, samples[0], exact)) == 2
    watch_exact(loaded, samples[0], lambda call: None)
    with reading(loaded.model):
        loaded.model(samples[0].tokens[None], use_cache=False)


def test_labels_tell_where_nothing_was_approximated() -> None:
    row = Row("default", "ours", SMALL)
    assert row.label_for(4096, True, 1) == "ours"
    assert row.label_for(4096, True, 0) == "ours (exact ran)"
    assert row.label_for(64, True, 1) == "ours (no fewer pairs)"
    assert not row.approximates(64, True, 1)


def test_held_out_documents_do_not_overlap_and_are_the_same_each_time() -> None:
    first, again = held_out_documents(2048, 5, seed=3), held_out_documents(2048, 5, seed=3)
    assert [d.data for d in first] == [d.data for d in again]
    assert len({d.data for d in first}) == 5
    assert all(len(d.data) == 2048 for d in first)
    assert b"\f" not in held_out_text()


def test_answers_stand_where_documents_say() -> None:
    document = held_out_documents(2048, 1)[0]
    assert len(document.answer_index) > 10
    for index, distance in zip(document.answer_index, document.answer_distance, strict=True):
        digits = document.data[index : index + document.answer_size]
        assert digits.isdigit()
        assert document.data[index - distance : index - distance + document.answer_size] == digits


@pytest.mark.parametrize(("length", "count"), [(0, 1), (64, 0), (10**9, 1)])
def test_impossible_documents_are_refused(length: int, count: int) -> None:
    with pytest.raises(ValueError, match="positive|longer text"):
        documents_from(b"text\n" * 100, length, count, 0)


def test_loss_counts_ordinary_text_of_the_second_half() -> None:
    document = make_document(b"an ordinary line of text\n" * 40, 800, 6, random.Random(0))
    sample = samples_of_documents([document])[0]
    counted = bytes(b for b, keep in zip(document.data[1:], sample.counted.tolist(), strict=True) if keep)
    assert re.search(rb"#[sg]et", counted) is None
    assert re.search(rb"[0-9]", counted) is None
    assert not sample.counted[:399].any()
    assert sample.num_bytes == len(counted) > 200
    planted = bytes(b for b, keep in zip(document.data[1:], sample.planted.tolist(), strict=True) if keep)
    assert len(counted) + len(planted) == 400
    assert re.fullmatch(rb"[^\n]*\n?(#[sg]et [a-z]{3}=[0-9]{4}\n)*[^\n]*", planted)


def test_the_loss_is_that_of_the_plain_model(loaded: LoadedModel, samples: tuple[EvaluationSample, ...]) -> None:
    sample = samples[0]
    with torch.no_grad():
        logits = loaded.model(sample.tokens[None]).logits[0, :-1]
    expected = cross_entropy(logits[sample.counted], sample.tokens[1:][sample.counted], reduction="sum").item()
    exact = run_pass(loaded, sample, rows(SMALL)[0])
    complete = run_pass(loaded, sample, Row("all", "all", ha.Method(ha.Sinks(4), ha.Window(LENGTH))))
    whole = torch.arange(1, LENGTH) >= LENGTH // 2
    expected_whole = cross_entropy(logits[whole], sample.tokens[1:][whole], reduction="sum").item()
    # losses are of logits in float32, several layers deep
    assert exact.nats + exact.planted_nats == pytest.approx(expected_whole, rel=1e-5)
    assert exact.num_bytes + exact.num_planted == LENGTH // 2
    assert exact.nats == pytest.approx(expected, rel=1e-5)
    assert complete.nats == pytest.approx(expected, rel=1e-4)
    assert (exact.approximated, exact.calls) == (0, 2)
    assert (complete.approximated, complete.calls) == (2, 2)


def one_hot(targets: Tensor) -> Tensor:
    return nn.functional.one_hot(targets, 256).float()


def test_a_digit_is_right_when_the_model_puts_it_first(samples: tuple[EvaluationSample, ...]) -> None:
    sample, targets = samples[0], samples[0].tokens[1:]
    right = digits_right(one_hot(targets), targets, sample)
    assert right.shape == (len(sample.answer_index), 4)
    assert right.all()
    spoiled = one_hot(targets)
    spoiled[sample.answer_index[0] - 1] = 0
    assert digits_right(spoiled, targets, sample).sum() == right.numel() - 1
    assert not digits_right(one_hot(targets - 1), targets, sample).any()


def test_every_row_is_judged_beside_exact_attention(loaded: LoadedModel, samples: tuple[EvaluationSample, ...]) -> None:
    before, steps = loaded.model.config._attn_implementation, []
    lines = rows(SMALL)
    results = {each.row: each for each in evaluate(loaded, samples, lines, audit_rows=64, on_step=steps.append)}
    assert len(steps) == len(lines) * len(samples)
    exact, control, ours = results["exact"], results["control"], results["default"]
    assert (exact.added_nats, exact.share_of_calls, exact.error, exact.approximated) == (0, 0, None, False)
    assert exact.model_ratio.value == exact.attention_ratio.value == 1
    for each in (results["sinks_window"], control, ours):
        assert each.approximated
        assert each.share_of_calls == 1
        assert each.cost.share_of_exact < 1
        assert each.error is not None
        assert 0 < each.error.low <= each.error.mean <= each.error.high
        assert each.error.calls == 2 * len(samples)
        assert 0 < each.attention.median < each.model.median
    assert results["published"].label.endswith("(no fewer pairs)")
    assert not results["published"].approximated
    # the same attention by lists of all keys, in another order; nats of logits in float32
    assert results["published"].added_nats == pytest.approx(0, abs=1e-4)
    expected = [ours.nats_per_byte[i] - exact.nats_per_byte[i] for i in range(2)]
    assert ours.added_nats == pytest.approx(sum(expected) / 2)
    assert ours.added_error == pytest.approx(abs(expected[0] - expected[1]) / 2)
    assert len(ours.depths) == NUM_DEPTHS
    assert sum(depth.answers for depth in ours.depths) == ours.answers == sum(len(s.answer_index) for s in samples)
    assert loaded.model.config._attn_implementation == before
    assert not any("watch" in name for module in loaded.model.modules() for name in module.__dict__)


def test_evaluation_needs_samples_and_exact_attention_first(
    loaded: LoadedModel, samples: tuple[EvaluationSample, ...]
) -> None:
    with pytest.raises(ValueError, match="at least one sample, and exact attention as first row"):
        evaluate(loaded, (), rows(SMALL))
    with pytest.raises(ValueError, match="at least one sample, and exact attention as first row"):
        evaluate(loaded, samples, rows(SMALL)[1:])


def test_captured_inputs_are_those_of_every_layer(loaded: LoadedModel, samples: tuple[EvaluationSample, ...]) -> None:
    calls = capture(loaded, samples[0], rows(SMALL)[0])
    assert [call.layer for call in calls] == [0, 1]
    assert all(call.q.shape == (1, 2, LENGTH, 16) and call.k.shape == call.v.shape == (1, 1, LENGTH, 16) for call in calls)


def test_captured_calls_keep_what_exact_attention_gave(loaded: LoadedModel, samples: tuple[EvaluationSample, ...]) -> None:
    for call in capture(loaded, samples[0], rows(SMALL)[0]):
        exact = ha.attention(call.q, call.k, call.v, is_causal=True, enable_gqa=True, scale=call.scale, method=ha.Exact())
        assert_exact(call.out, exact)


def test_pooled_intervals_add_in_squares() -> None:
    def report(mean: float, low: float, high: float) -> ha.ErrorReport:
        heads = torch.tensor([[mean, mean]])
        none = torch.zeros(1, 2)
        ends = torch.tensor([[low, low]]), torch.tensor([[high, high]])
        return ha.ErrorReport(heads, ends, none, none, none, none, None, 64, torch.zeros(1, dtype=torch.int64))

    pooled = pool([report(0.1, 0.07, 0.14), report(0.3, 0.26, 0.33)])
    assert pooled is not None
    assert (pooled.mean, pooled.calls, pooled.rows) == (pytest.approx(0.2), 2, 64)
    assert pooled.low == pytest.approx(0.2 - math.hypot(0.03, 0.04) / 2)
    assert pooled.high == pytest.approx(0.2 + math.hypot(0.04, 0.03) / 2)
    assert pool([]) is None
    assert isinstance(pooled, Error)


def test_longer_texts_are_read_by_stretched_positions() -> None:
    usual, longer = load_reference(), load_reference(max_length=131_072)
    assert (usual.max_length, longer.max_length) == (32_768, 131_072)
    near, far = (loaded.model.get_submodule("model.rotary_emb").inv_freq for loaded in (usual, longer))
    # short waves tell neighbours apart as before, the longest reach four times as far
    assert near[0] == far[0]
    assert near[-1] == pytest.approx(4 * float(far[-1]))
    with pytest.raises(ValueError, match="max_length=100: only rotary positions .* trained length, here 32768"):
        load_reference(max_length=100)


def test_missing_or_foreign_weights_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no reference model in"):
        load_reference(tmp_path)
    config = transformers.LlamaConfig(
        vocab_size=99, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=1
    )
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="99 tokens"):
        load_reference(tmp_path)
