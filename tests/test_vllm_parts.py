"""The parts of the vLLM plugin that run without vLLM: options, the rows of a step, counts, and the orders of a page."""

import pytest
import torch

import hyperattention as ha
from hyperattention.files.fingerprint import Fingerprint
from hyperattention.files.plan import Measured
from hyperattention.integrations.vllm.choice import choose, unreached
from hyperattention.integrations.vllm.counts import ServedCounter, is_audited, pairs_of
from hyperattention.integrations.vllm.options import Options, read_options
from hyperattention.integrations.vllm.pages import CachePages, KeyOrder, find_order
from hyperattention.integrations.vllm.plugin import asked_on_cpu
from hyperattention.integrations.vllm.served_layers import LayerTraits, check_layer, check_listed
from hyperattention.integrations.vllm.split import Piece, split_step

CPU = torch.device("cpu")
DRAWN = ha.Method(ha.Sinks(4), ha.Window(32), ha.Draw(16), tile=48)


def test_options_have_defaults_and_are_read():
    assert read_options({}) == read_options({"other": 1}) == Options()
    given = {"method": {"type": "Method", "stages": [{"type": "Window", "size": 8}]}, "layers": [1, 2], "seed": 3}
    options = read_options({"hyperattention": given | {"min_length": 5, "audit_every": 2, "decode": "exact"}})
    assert options.method == ha.Method(ha.Window(8))
    assert (options.layers, options.seed, options.min_length, options.audit_every) == (frozenset({1, 2}), 3, 5, 2)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"budget": 3}, "no such option is known, only method, plan, layers, min_length, seed, audit_every"),
        ({"method": "fast"}, "must be one of default, thorough, lean, or a method"),
        ({"method": {"type": "Nothing"}}, "must be one of AntiDiagonal"),
        ({"method": "lean", "plan": "plan.json"}, "give either `method` or `plan`"),
        ({"layers": 3}, "must be a list"),
        ({"layers": [-1]}, "whole number from 0"),
        ({"seed": True}, "whole number from 0"),
        ({"audit_rows": 0}, "whole number from 1"),
        ({"decode": "top_pages"}, 'must be "exact", or an object such as'),
        ({"decode": {}}, r'must be "exact", or an object such as \{"budget": 1024\}'),
        ({"decode": None}, 'must be "exact", or an object such as'),
        ({"decode": {"budget": 0}}, "^--additional-config: hyperattention.decode.budget is 0: it must be a whole number"),
        ({"method": None}, "must be one of default, thorough, lean, or a method"),
        ({"decode": {"budget": 100}}, "leaves no slot besides 16 sinks and 128 window"),
        ({"decode": {"budget": 150}}, "leaves no page of 8"),
        ({"decode": {"budget": 512, "pages": 3}}, "only policy, budget, sinks, window, min_length, memory_gib"),
        ({"decode": {"budget": 512, "memory_gib": -1}}, "finite number of at least 0"),
        ({"decode": {"budget": 512, "policy": {"type": "Latest"}}}, "use TopPages"),
        ({"decode": {"budget": 512, "policy": {"type": "TopPages", "draws": 8}}}, "leave `draws` and `share` out"),
        ([], "must be an object"),
    ],
    ids=str,
)
def test_wrong_options_are_refused_with_the_remedy(given, message):
    with pytest.raises(ValueError, match=message) as found:
        read_options({"hyperattention": given})
    assert "docs/vllm.md" in str(found.value)


@pytest.mark.parametrize(
    "given", [{"method": "lean"}, {"hyperatention": {"method": "lean"}}, {"HyperAttention": {}, "other": 1}], ids=str
)
def test_options_that_would_not_be_read_are_refused(given):
    with pytest.raises(ValueError, match=r'options are read from the key .* write \{"hyperattention": \{...\}\}'):
        read_options(given)
    assert read_options({"hyperattention": {}} | given) == Options()
    assert read_options({"method": "lean", "other": 1}) == Options()


def test_presets_begin_where_they_pay_and_at_an_edge_of_a_tile():
    found = choose(Options(min_length=100, method=DRAWN), None, max_length=4096, device=CPU)
    assert (found.min_length, found.tile) == (144, 48)
    assert choose(Options(), None, max_length=4096, device=CPU).min_length == 16_384
    lean = choose(Options("lean"), None, max_length=4096, device=CPU)
    assert (lean.min_length, lean.method) == (2048, ha.lean_method(65_536))
    # the same list of stages at every length, chosen by the longest
    assert choose(Options("lean"), None, max_length=200_000, device=CPU).method == ha.lean_method(200_000)
    assert choose(Options(), None, max_length=4096, device=torch.device("cuda")).min_length == 32_768


@pytest.mark.parametrize("min_length", [None, 100])
def test_exact_prompts_begin_nowhere(min_length):
    found = choose(Options(method=ha.Exact(), min_length=min_length), None, max_length=4096, device=CPU)
    assert found.min_length is found.of(0, (0, 2)) is None


def test_a_method_that_reads_a_whole_prompt_is_refused():
    for method in (ha.HyperAttention(), ha.Method(ha.HashBuckets(16), ha.Draw(8))):
        with pytest.raises(ValueError, match="computes in chunks"):
            choose(Options(method=method), None, max_length=4096, device=CPU)


def make_plan(crossover):
    measured = Measured(320, 2, "ab", 0, "cpu: some", 1, {"torch": "2"}, 60.0, 160.5, 0.5, 1.0, -0.001)
    layers = {1: ha.ByHead((DRAWN, ha.Exact())), 3: ha.ByHead((ha.Exact(), ha.Exact()))}
    errors = dict.fromkeys(layers, (0.1, 0.1))
    return ha.Plan(Fingerprint("LlamaForCausalLM", 4, 4, 2, 16, "ab"), layers, errors, 0.25, crossover, measured)


def test_a_plan_gives_each_process_the_methods_of_its_heads():
    found = choose(Options(), make_plan(1000), max_length=4096, device=CPU)
    assert found.min_length == 528
    assert found.of(1, (0, 2)) == ha.ByHead((DRAWN, ha.Exact()))
    assert found.of(1, (0, 1)) == ha.ByHead((DRAWN,))
    # heads that are all exact, and layers that are not planned
    assert found.of(1, (1, 2)) is found.of(3, (0, 2)) is found.of(0, (0, 2)) is None
    assert choose(Options(), make_plan(None), max_length=4096, device=CPU).of(1, (0, 2)) is None
    with pytest.raises(ValueError, match=r"layers \[0\] are not in the plan"):
        choose(Options(layers=frozenset({0, 1})), make_plan(1000), max_length=4096, device=CPU)


def test_queries_are_split_by_their_position_alone():
    # decoding, a short prompt, a chunk across the edge, a chunk beyond it, one query of a prompt, and no query
    starts, lengths = [0, 1, 31, 131, 181, 182, 182], [500, 30, 180, 400, 900, 7]
    split = split_step(starts, lengths, [False, True, True, True, True, False], 128)
    assert split.approximate == (Piece(2, 79, 52, 180), Piece(3, 131, 50, 400), Piece(4, 181, 1, 900))
    assert split.exact == (Piece(0, 0, 1, 500), Piece(1, 1, 30, 30), Piece(2, 31, 48, 128))
    assert (split.decoding, split.short) == (1, 1)
    # requests that generate: a short one, long ones, and several queries of a long one
    split = split_step([0, 1, 2, 3, 8, 18], [99, 100, 500, 500, 500], [False, False, True, False, True], None, 100)
    assert split.selected == (Piece(1, 1, 1, 100),)
    assert split.exact == (Piece(0, 0, 1, 99), Piece(2, 2, 1, 500), Piece(3, 3, 5, 500), Piece(4, 8, 10, 500))
    assert (split.approximate, split.decoding, split.short) == ((), 2, 2)


@pytest.mark.parametrize("chunk", [1, 7, 64, 200])
def test_chunks_approximate_the_same_positions(chunk):
    found = []
    for begin in range(0, 200, chunk):
        end = min(200, begin + chunk)
        for piece in split_step([0, end - begin], [end], [True], 48).approximate:
            found += range(piece.keys - piece.count, piece.keys)
    assert found == list(range(48, 200))


@pytest.mark.parametrize(
    "piece", [Piece(0, 0, 200, 200), Piece(0, 0, 10, 300), Piece(0, 0, 60, 90), Piece(0, 0, 1, 5)], ids=str
)
def test_pairs_are_those_of_a_sum_over_rows(piece):
    slots = DRAWN.cost(piece.keys, head_dim=8).pairs
    seen = [piece.keys - piece.count + 1 + row for row in range(piece.count)]
    listed, exact = pairs_of(DRAWN, piece, 8)
    assert exact == sum(seen)
    assert listed == pytest.approx(sum(min(slots, each) for each in seen))


def test_counts_are_printed_in_one_line():
    counter = ServedCounter()
    assert str(counter.counts) == "0 of 0 attention calls approximated"
    assert counter.counts.prompts.share_of_pairs == 1.0
    counter.approximate((25.0, 100.0))
    counter.exactly("decoding", 3)
    counter.audit(0.25)
    assert str(counter.counts) == (
        "1 of 4 attention calls approximated, with 0.25 of their pairs; exact: decoding (3); mean relative error 0.25 in 1 "
        "audited calls"
    )
    counter.approximate((10.0, 100.0), decoding=True)
    counter.audit(0.5, decoding=True)
    assert str(counter.counts) == (
        "1 of 5 attention calls approximated, with 0.25 of their pairs; 1 calls decoded by their best pages, with 0.1 of "
        "their pairs; exact: decoding (3); mean relative error 0.25 in 1 audited calls; decoding: mean relative error 0.5 "
        "in 1 audited calls"
    )


def test_audits_visit_every_layer_alike():
    # calls go round the layers: a number that they divide would always audit the same one
    every, layers = 8, 4
    drawn = [call for call in range(4096) if is_audited(call, every, 3)]
    assert [call // every for call in drawn] == list(range(4096 // every))
    counts = torch.bincount(torch.tensor(drawn) % layers, minlength=layers)
    # four standard deviations of a binomial distribution
    assert float((counts - 128).abs().max()) < 4 * (512 * 0.25 * 0.75) ** 0.5
    assert not is_audited(0, 0, 3)
    assert all(is_audited(call, 1, 3) for call in range(9))


@pytest.mark.parametrize("order", [*KeyOrder, None], ids=str)
def test_pages_are_read_in_the_order_in_which_they_were_written(order):
    size, heads, width = 4, 2, 3
    key, value = torch.randn(2, 5, heads, size, width).unbind()
    if order is None:
        cache = torch.cat([key, value], -1)
    else:
        stored = key if order is KeyOrder.ROWS else key.transpose(2, 3).reshape(key.shape)
        cache = torch.stack([stored, value], 2).reshape(5, heads, size, 2 * width)
        assert find_order(stored[1], key[1].transpose(0, 1)) is order
    pages = CachePages(width, order)
    assert all(torch.equal(a, b) for a, b in zip(pages.views(cache), (key, value), strict=True))
    k, v, table = pages.of_request(cache, torch.tensor([3, 1, 0]), 7)
    for stored, read in ((key, k), (value, v)):
        assert torch.equal(read[table[0].long()], stored[[3, 1]])


def test_an_unknown_order_is_told():
    key = torch.randn(4, 2, 3)
    assert find_order(key.transpose(0, 1).flip(1), key) is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"attention_type": "encoder_decoder"}, "serves decoders only"),
        ({"quantised": True, "cache_dtype": "fp8"}, "cache of fp8: .* start vLLM without --kv-cache-dtype"),
        ({"soft_cap": True, "sinks": True}, "capped scores and learned sinks, which no method approximates"),
        ({"alibi": True}, "ALiBi"),
    ],
    ids=str,
)
def test_layers_that_no_method_approximates_are_refused(changes, message):
    plain = {
        "attention_type": "decoder", "sliding_window": None, "soft_cap": False, "alibi": False, "sinks": False,
        "cache_dtype": "auto", "quantised": False,
    }  # fmt: skip
    check_layer("model.layers.0", LayerTraits(**plain))
    with pytest.raises(ValueError, match=f"model.layers.0 .*{message}"):
        check_layer("model.layers.0", LayerTraits(**(plain | changes)))


def test_layers_that_the_model_does_not_have_are_refused():
    check_listed(None, 4)
    check_listed(frozenset({0, 3}), 4)
    with pytest.raises(ValueError, match=r"layers \[4, 9\] are not in the model: list some of 0 to 3 in `layers`"):
        check_listed(frozenset({1, 4, 9}), 4)
    with pytest.raises(ValueError, match="no layer is listed"):
        check_listed(frozenset(), 4)


def test_what_no_request_is_long_enough_for_is_said():
    options = read_options({"hyperattention": {"method": "lean", "decode": {"budget": 1024}}})
    lean = choose(options, None, max_length=20_480, device=CPU)
    assert unreached(lean, options, 20_480) is None
    short = unreached(lean, options, 20_479)
    assert short is not None
    assert short.startswith("no request decodes by its best pages, because these begin at 20480 keys; requests end at 20479")
    both = unreached(lean, options, 2048)
    assert both is not None
    assert both.startswith("no prompt is approximated, because the method begins at position 2048; no request decodes")
    # the last query of 2,049 tokens is at position 2,048
    assert unreached(lean, Options("lean"), 2049) is None


def test_the_cpu_is_asked_for_in_words(monkeypatch):
    for value, asked in (("1", True), ("0", False)):
        monkeypatch.setenv("HYPERATTENTION_VLLM_CPU", value)
        assert asked_on_cpu() is asked
    monkeypatch.setenv("HYPERATTENTION_VLLM_CPU", "yes")
    with pytest.raises(ValueError, match="set it to 1"):
        asked_on_cpu()
    monkeypatch.delenv("HYPERATTENTION_VLLM_CPU")
    assert not asked_on_cpu()
