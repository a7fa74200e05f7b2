"""A compressed cache and every form of mask: followed as `DynamicCache` would, or refused before anything is lost."""

from importlib import import_module

import pytest
import torch
from torch import Tensor, nn

import hyperattention as ha
from hyperattention import policies
from hyperattention.integrations.transformers.cache_padding import NOTHING_TOLD, read_shown
from tiny_models import assert_exact, build, tokens

transformers = pytest.importorskip("transformers")
integration = import_module("hyperattention.integrations.transformers")

PROMPT, STEPS, HIDDEN = 24, 5, torch.finfo(torch.float32).min
PADDED = {"left": slice(0, 7), "right": slice(17, 24), "middle": slice(9, 15)}
pytestmark = pytest.mark.filterwarnings("ignore:no attention call was approximated")


def live_of(where: str) -> Tensor:
    live = torch.ones(2, PROMPT, dtype=torch.bool)
    live[1, PADDED[where]] = False
    return live


def square(live: Tensor) -> Tensor:
    return (live[:, None] & torch.ones(live.shape[1], live.shape[1]).tril().bool())[:, None]


def additive(mask: Tensor) -> Tensor:
    return torch.zeros(mask.shape).masked_fill(~mask, HIDDEN)


# what a user may give for a prompt, and then for one more token over all that came before
FORMS = {
    "2-D": (lambda live: live.long(), lambda live: live.long()),
    "2-D bool": (lambda live: live, lambda live: live),
    "4-D bool": (square, lambda live: live[:, None, None]),
    "4-D added": (lambda live: additive(square(live)), lambda live: additive(live[:, None, None])),
    "4-D, all heads": (
        lambda live: square(live).expand(-1, 4, -1, -1),
        lambda live: live[:, None, None].expand(-1, 4, -1, -1),
    ),
    "one row for all": (lambda live: live[:, None, None], lambda live: live[:, None, None]),
}


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return build("Llama", {})


def cache_of(model: nn.Module, budget: int = 200) -> object:
    return integration.HyperCache(model.config, budget=budget, sinks=2, window=8, policy=policies.ClusterMeans(latest=4))


def read_on(model: nn.Module, cache: object, form: str, live: Tensor) -> Tensor:
    """Read a prompt and a few tokens more; the logits, those of padding 0."""
    first, later = FORMS[form]
    text, logits = tokens(2, PROMPT + STEPS), []
    with torch.no_grad():
        logits.append(model(text[:, :PROMPT], attention_mask=first(live), past_key_values=cache).logits)
        for at in range(PROMPT, PROMPT + STEPS):
            seen = torch.nn.functional.pad(live, (0, at + 1 - PROMPT), value=True)
            logits.append(model(text[:, at : at + 1], attention_mask=later(seen), past_key_values=cache).logits)
    whole = torch.nn.functional.pad(live, (0, STEPS), value=True)
    return torch.cat(logits, 1).masked_fill(~whole[..., None], 0.0)


@pytest.mark.parametrize("where", PADDED)
@pytest.mark.parametrize("form", FORMS)
def test_within_the_budget_every_form_says_what_it_says_to_a_dynamic_cache(model: nn.Module, form: str, where: str) -> None:
    live = live_of(where)
    expected = read_on(model, transformers.DynamicCache(config=model.config), form, live)
    with integration.use(model, ha.Exact()):
        assert_exact(read_on(model, cache_of(model), form, live), expected)


@pytest.mark.parametrize("where", PADDED)
@pytest.mark.parametrize("form", list(FORMS)[1:5])
def test_beyond_the_budget_every_form_marks_the_same_padding(model: nn.Module, form: str, where: str) -> None:
    live, caches = live_of(where), [cache_of(model, 22) for _ in range(2)]
    with integration.use(model, ha.Exact()):
        ours, expected = (read_on(model, cache, each, live) for cache, each in zip(caches, (form, "2-D"), strict=True))
    assert_exact(ours, expected)
    assert not caches[0].stores[0].is_whole
    for store, other in zip(caches[0].stores.values(), caches[1].stores.values(), strict=True):
        assert torch.equal(store.held.live, other.held.live)
        assert torch.equal(store.held.position, other.held.position)


@pytest.mark.parametrize("family", ["Bert", "Roberta", "Electra"])
def test_decoders_of_another_family_with_padding(family: str) -> None:
    kinds = {"Bert": "BertLMHeadModel", "Roberta": "RobertaForCausalLM", "Electra": "ElectraForCausalLM"}
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64, "vocab_size": 97}
    config = getattr(transformers, f"{family}Config")(**sizes, is_decoder=True, pad_token_id=0)
    model = getattr(transformers, kinds[family])(config).eval()
    expected = read_on(model, transformers.DynamicCache(config=config), "2-D", live_of("left"))
    with integration.use(model, ha.Exact()):
        assert_exact(read_on(model, cache_of(model), "2-D", live_of("left")), expected)


def heads_differ() -> Tensor:
    mask = torch.ones(1, 4, 1, PROMPT + 1, dtype=torch.bool)
    mask[:, 0, :, 5] = False
    return mask


def step(model: nn.Module, cache: object, mask: Tensor | None, new: int = 1) -> Tensor:
    with torch.no_grad(), integration.use(model, ha.Exact()):
        return model(tokens(1, new), attention_mask=mask, past_key_values=cache).logits


def biased() -> Tensor:
    return torch.linspace(-1.0, 0.0, PROMPT + 1)[None, None, None]


def hides(token: int, new: int = 1) -> Tensor:
    mask = torch.ones(1, PROMPT + new, dtype=torch.bool)
    mask[:, token] = False
    return mask


REFUSED = {
    "heads that see different keys": (heads_differ, 1, "only padding can be hidden"),
    "numbers added to scores": (biased, 1, "only padding can be hidden"),
    "one row for many tokens": (lambda: torch.ones(1, 1, 1, PROMPT + 3, dtype=torch.bool), 3, "only padding can be hidden"),
    "later tokens": (lambda: torch.ones(1, 1, 3, PROMPT + 3, dtype=torch.bool), 3, "only padding can be hidden"),
    "a key that was read": (lambda: hides(20), 1, "hides tokens that were read"),
    "a key that was read, in 4-D": (lambda: hides(20)[:, None, None], 1, "hides tokens that were read"),
    "too few columns": (lambda: torch.ones(1, 1, 3, 2, dtype=torch.bool), 3, "for 3 new tokens"),
    "too few rows": (lambda: torch.ones(1, 1, 2, PROMPT + 3, dtype=torch.bool), 3, "for 3 new tokens"),
    "whole numbers in 4-D": (lambda: torch.ones(1, 1, 1, PROMPT + 1, dtype=torch.int64), 1, "torch.int64 for 1 new"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_a_compressed_cache_cannot_follow_is_refused(model: nn.Module, case: str) -> None:
    mask, new, message = REFUSED[case]
    cache = cache_of(model, 22)
    step(model, cache, None, PROMPT)
    assert not cache.stores[0].is_whole
    with pytest.raises(ValueError, match=message):
        step(model, cache, mask(), new)


def test_several_tokens_with_a_square_mask_are_read_as_without(model: nn.Module) -> None:
    caches = [cache_of(model, 22) for _ in range(2)]
    for cache in caches:
        step(model, cache, None, PROMPT)
    held = caches[0].stores[0].num_slots
    mask = torch.ones(3, held + 3).tril(held).bool()[None, None]
    assert torch.equal(step(model, caches[0], mask, 3), step(model, caches[1], None, 3))


def test_within_the_budget_a_mask_may_hide_what_was_read(model: nn.Module) -> None:
    ours, plain = cache_of(model), transformers.DynamicCache(config=model.config)
    step(model, ours, None, PROMPT)
    with torch.no_grad():
        model(tokens(1, PROMPT), past_key_values=plain)
        expected = model(tokens(1, 1), attention_mask=hides(20)[:, None, None], past_key_values=plain).logits
    assert_exact(step(model, ours, hides(20)[:, None, None]), expected)


@pytest.mark.parametrize("mask", [None, torch.ones(1, PROMPT + 1, dtype=torch.long)], ids=["none", "all ones"])
def test_padding_is_not_brought_back(model: nn.Module, mask: Tensor | None) -> None:
    cache = cache_of(model)
    step(model, cache, hides(3, 0), PROMPT)
    with pytest.raises(ValueError, match="shows tokens that were padding"):
        step(model, cache, mask)


@pytest.mark.parametrize(
    "change", [lambda own: own | torch.eye(PROMPT).bool(), lambda own: own & ~torch.eye(PROMPT).bool()], ids=["kept", "cut"]
)
def test_a_mask_that_does_not_tell_padding_is_refused(model: nn.Module, change: object) -> None:
    # padding that sees itself, and tokens that do not
    mask = change(square(live_of("left"))[1:])
    with pytest.raises(ValueError, match="does not give whether new token"):
        step(model, cache_of(model), mask, PROMPT)


def test_a_prefix_that_sees_itself_whole_is_no_padding() -> None:
    mask = torch.ones(1, 1, 6, 6).tril().bool()
    mask[..., :3, :3] = True
    shown = read_shown(mask, 6)
    assert bool(shown.live.all())
    assert not shown.only_padding


def test_what_was_told_follows_rows_and_crops() -> None:
    live = torch.tensor([[False, True, True], [True, True, True]])
    told = NOTHING_TOLD.followed_by(2, None, 2).followed_by(3, live, 2).rows(torch.tensor([1, 0, 0])).without(1)
    assert told.num == 4
    assert told.live.tolist() == [[True] * 4] + [[True, True, False, True]] * 2
    told.check(told.live, 4, whole=False)
    # fewer columns are of the latest tokens; more, of tokens that nothing is known of
    told.check(told.live[:, 2:], 2, whole=False)
    told.check(torch.cat([torch.zeros(3, 5, dtype=torch.bool), told.live], 1), 9, whole=False)
    with pytest.raises(ValueError, match="shows tokens that were padding"):
        told.check(None, 4, whole=True)
