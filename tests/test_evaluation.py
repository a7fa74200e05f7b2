"""The evaluation of compressed caches: items, marks, and that what is compared is really what was meant."""

from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
import torch

from assertions import assert_exact, assert_same_bits
from hyperattention.cache.policy import CompressionRequest, Policy
from hyperattention.cache.slots import CacheSlots
from hyperattention.evaluation.ask import AskSettings, Reply, ask
from hyperattention.evaluation.continuation import Texts, continuation_loss, pieces
from hyperattention.evaluation.dialect import Lines
from hyperattention.evaluation.families import EXACT, CacheFamily, choose_families
from hyperattention.evaluation.haystack import Haystack
from hyperattention.evaluation.policies import CacheCandidate, candidates_at
from hyperattention.evaluation.prompt import Prompt
from hyperattention.evaluation.reading import converse, read, reading
from hyperattention.evaluation.recording import fill, rows_of, start
from hyperattention.evaluation.summary import cells
from hyperattention.evaluation.tasks import TASKS
from hyperattention.evaluation.tasks.setting import Setting
from hyperattention.policies.choose import best
from hyperattention.policies.latest import Latest
from hyperattention.policies.uniform_sample import UniformSample
from hyperattention.reference.model import LoadedModel, load_reference
from hyperattention.reference.text import held_out_text

LENGTH = 768
BUDGET = 256


@pytest.fixture(scope="module")
def loaded() -> LoadedModel:
    return load_reference()


@pytest.fixture(scope="module")
def haystack() -> Haystack:
    return Haystack.of(held_out_text()[:60_000].decode("latin-1"), Lines())


@dataclass(frozen=True)
class Watchful(Policy):
    """Keep what the queries attended to, and remember what it was shown."""

    shown: list[CompressionRequest] = field(default_factory=list, compare=False)

    @property
    def num_queries(self) -> int:
        return 5

    @property
    def watches(self) -> bool:
        return True

    @property
    def weighted(self) -> bool:
        return False

    def compress(self, full: CompressionRequest) -> CacheSlots:
        self.shown.append(full)
        index = best(full.candidates.score, full)
        return full.candidates.take(index, full.candidates.log_weight.gather(2, index))


@pytest.mark.parametrize("make", [Latest, UniformSample, Watchful])
def test_a_recorded_prompt_leaves_what_the_model_itself_would_have(
    loaded: LoadedModel, haystack: Haystack, make: Callable[[], Policy]
) -> None:
    tokens = torch.tensor([haystack.tokens[first : first + 300] for first in (0, 5000)])
    policies = make(), make()
    read_by_itself, filled = (CacheCandidate(CacheFamily("x", x), 200).cache(loaded.model, 300, 3) for x in policies)
    with reading(loaded.model):
        read(loaded.model, tokens[[1, 0]], read_by_itself)
        recorded = start(loaded.model)
        read(loaded.model, tokens[:, :290], recorded)
        fill(CacheCandidate(CacheFamily("x", make()), 200).cache(loaded.model, 300, 3), recorded)
        # rows change places, and what was worked out for them goes along
        recorded = rows_of(recorded, loaded.model, [1, 0])
        read(loaded.model, tokens[[1, 0], 290:], recorded)
        fill(filled, recorded)
    assert filled.get_seq_length() == 300
    for number, store in read_by_itself.stores.items():
        assert_same_bits(filled.stores[number].held.position, store.held.position)
        for name in ("k", "v", "log_weight"):
            assert_exact(getattr(filled.stores[number].held, name), getattr(store.held, name))
        # sums of some hundred rows, in another order
        assert_exact(filled.stores[number].held.score, store.held.score)
    if make is Watchful:
        ours, theirs = (policy.shown[-1].queries for policy in reversed(policies))
        assert_exact(ours, theirs)


def asked(
    loaded: LoadedModel, haystack: Haystack, candidates: tuple[CacheCandidate, ...], task: str = "single"
) -> list[Reply]:
    items = TASKS[task](Setting(haystack, LENGTH, depths=4, seed=1))
    return list(ask(AskSettings(loaded.model, haystack.dialect, candidates, shown=3, rows=2), items))


def test_streaming_loses_what_lies_deep_and_exact_attention_does_not(loaded: LoadedModel, haystack: Haystack) -> None:
    replies = asked(loaded, haystack, candidates_at(choose_families(()), (BUDGET,)))
    found = {(cell.candidate.family.name, cell.visible, cell.depth): cell for cell in cells(replies, 4)}
    for visible in (False, True):
        assert found["exact", visible, None].share.value == 1.0
        assert found["exact", visible, None].exact
        assert [found["streaming", visible, depth].share.value for depth in range(4)] == [0.0, 0.0, 0.0, 1.0]
        for name in ("streaming", "uniform", "random"):
            cell = found[name, visible, None]
            assert (cell.ceiling.value, cell.exact, cell.beyond) == (1.0, False, False)
            assert cell.memory_bytes < 0.5 * found["exact", visible, None].memory_bytes
            assert 0 < cell.seconds < 10


def test_answers_through_a_whole_cache_are_those_of_generate(loaded: LoadedModel, haystack: Haystack) -> None:
    replies = asked(loaded, haystack, (CacheCandidate(EXACT, BUDGET),), "multi-query")
    hidden = [reply for reply in replies if not reply.visible]
    for reply in hidden[:1] + hidden[-1:]:
        text = list(reply.item.context)
        for turn, said in zip(reply.item.turns, reply.outputs, strict=True):
            text += haystack.dialect.encode(turn.question)
            whole = loaded.model.generate(torch.tensor([text]), max_new_tokens=turn.answer_size, do_sample=False)
            assert said == haystack.dialect.decode(tuple(whole[0, len(text) :].tolist()))
            text = whole[0].tolist()


def test_questions_of_one_context_do_not_see_one_another(loaded: LoadedModel, haystack: Haystack) -> None:
    items = TASKS["multi-key"](Setting(haystack, LENGTH, depths=6, seed=1))
    candidates = candidates_at((EXACT, CacheFamily("streaming", Latest())), (BUDGET,))
    few, many = (
        {
            (reply.item, reply.candidate, reply.visible): reply.outputs
            for reply in ask(AskSettings(loaded.model, haystack.dialect, candidates, rows=rows), items)
        }
        for rows in (2, 8)
    )
    assert few == many
    assert len(few) == 6 * 2 * 2


def test_what_was_said_is_read_before_the_next_question(loaded: LoadedModel, haystack: Haystack) -> None:
    cache, question = CacheCandidate(EXACT, BUDGET).cache(loaded.model, 100, 0), torch.tensor([list(b"\n#get abc=")])
    with reading(loaded.model):
        read(loaded.model, torch.tensor([haystack.tokens[:50]]), cache)
        said = converse(loaded.model, cache, [question, question], [4, 3])
    assert [turn.shape for turn in said.turns] == [(1, 4), (1, 3)]
    # all but the very last token
    assert cache.get_seq_length() == 50 + 10 + 4 + 10 + 3 - 1


@pytest.mark.slow
def test_with_room_for_everything_nothing_is_approximated(loaded: LoadedModel, haystack: Haystack) -> None:
    candidates = candidates_at((EXACT, CacheFamily("uniform", UniformSample())), (LENGTH,))
    replies = asked(loaded, haystack, candidates, "multi-value")
    exact, uniform = ([(r.item, r.visible, r.outputs) for r in replies if r.candidate is who] for who in candidates)
    assert exact == uniform
    assert all(cell.exact for cell in cells(replies, 4))
    # the reference model never saw a key with several values
    assert {cell.beyond for cell in cells(replies, 4) if cell.depth is None} == {True}


@pytest.mark.slow
def test_in_pieces_later_ones_are_read_through_what_is_left_of_earlier_ones(loaded: LoadedModel, haystack: Haystack) -> None:
    candidates = candidates_at((EXACT, CacheFamily("streaming", Latest())), (BUDGET,))
    items = TASKS["lines"](Setting(haystack, LENGTH, depths=4, seed=1))
    whole, pieced = (
        list(ask(AskSettings(loaded.model, haystack.dialect, candidates, chunk=chunk), items)) for chunk in (None, 100)
    )
    assert [r.outputs for r in whole if r.candidate.family is EXACT] == [
        r.outputs for r in pieced if r.candidate.family is EXACT
    ]
    assert {r.approximated for r in pieced if r.candidate.family is EXACT} == {0}
    tokens, caches = torch.tensor([items[0].context]), []
    with reading(loaded.model) as counter:
        for chunk in (None, 100):
            before = counter.counts.approximated
            caches.append(Prompt.of(loaded.model, tokens, chunk).compressed(candidates[1], 20, 0)[0])
            assert (counter.counts.approximated - before > 0) is (chunk is not None)
        by_hand = candidates[1].cache(loaded.model, 0, 0)
        for part in tokens.split(100, 1):
            loaded.model(part, past_key_values=by_hand)
    for number, store in by_hand.stores.items():
        assert_exact(caches[1].stores[number].held.v, store.held.v)
    # the latest tokens are held either way, and what the last layer knows of them depends on what earlier ones read
    ours, theirs = (cache.stores[max(by_hand.stores)].held.v[:, :, -100:] for cache in caches)
    assert not torch.allclose(ours, theirs)


def test_the_question_is_seen_by_the_policy_only_where_it_is_visible(loaded: LoadedModel, haystack: Haystack) -> None:
    policy = Watchful()
    replies = asked(
        loaded, haystack, (CacheCandidate(EXACT, BUDGET), CacheCandidate(CacheFamily("watchful", policy), BUDGET)), "lines"
    )
    first = [int(full.held.position.max()) + 1 for full in policy.shown if full.counters[1:] == (0, 0)]
    context, question = len(replies[0].item.context), len(replies[0].item.turns[0].question)
    # the three that are asked visibly come in two batches
    assert first == [context, context + question - 1, context + question - 1]
    # and no more questions of one context are asked that way than was said
    assert [sum(r.visible is kind for r in replies) for kind in (False, True)] == [2 * 4, 2 * 3]
    assert len({r.item for r in replies if r.visible}) == 3


def test_the_loss_of_a_continuation_is_the_models_own_where_nothing_is_dropped(
    loaded: LoadedModel, haystack: Haystack
) -> None:
    candidates = candidates_at(choose_families(()), (BUDGET,))
    texts = Texts(LENGTH, continuation=100, documents=3)
    found = list(continuation_loss(AskSettings(loaded.model, haystack.dialect, candidates, rows=2), haystack.tokens, texts))
    exact = {loss.document: loss for loss in found if loss.candidate.family is EXACT}
    for number, tokens in pieces(haystack.tokens, texts, 0).items():
        with torch.inference_mode():
            whole = torch.tensor([tokens])
            logits = loaded.model(whole).logits[0, -101:-1]
        own = torch.nn.functional.cross_entropy(logits, whole[0, -100:]).item()
        # a loss of logits in float32, several layers deep
        assert exact[number].nats == pytest.approx(own, rel=1e-4)
        assert (exact[number].added, exact[number].approximated) == (0.0, 0)
    others = [loss for loss in found if loss.candidate.family is not EXACT]
    assert len(others) == 9
    for loss in others:
        assert loss.approximated > 0
        assert loss.added == pytest.approx(loss.nats - exact[loss.document].nats)
        assert loss.added != 0
