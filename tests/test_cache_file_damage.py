"""Cache files that are damaged, or whole and wrong: each is refused, by name and with a remedy, before any of it is used."""

import json
import random
import re
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import hyperattention as ha
from hyperattention import policies
from tiny_models import build, tokens

pytest.importorskip("transformers")
integration = import_module("hyperattention.integrations.transformers")
file = import_module("hyperattention.integrations.transformers.cache_file")
file_content = import_module("hyperattention.integrations.transformers.cache_file_content")
safetensors = import_module("safetensors.torch")

PROMPT, FLIPS = 60, 100
POLICIES = {
    "means": policies.ClusterMeans(latest=4),
    "hitters": policies.HeavyHitters(),
    "pages": policies.TopPages(page=4),
    "subgen": policies.SubGen(delta=3.0, samples=2, value_samples=4, most_clusters=99),
}
Change = Callable[[dict[str, Tensor]], object]


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return build("Llama", {})


@pytest.fixture(scope="module")
def written(model: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What a file of each policy holds."""
    path, found = tmp_path_factory.mktemp("written") / "doc.safetensors", {}
    for name, policy in POLICIES.items():
        cache = integration.HyperCache(model.config, budget=40, policy=policy, sinks=2, window=16, seed=3)
        with torch.no_grad(), pytest.warns(UserWarning, match="exact"), integration.use(model, ha.Exact()):
            model(tokens(2, PROMPT), past_key_values=cache)
        file.save_cache(cache, model, path, tokens=tokens(2, PROMPT), overwrite=True)
        found[name] = path.read_bytes()
    return found


def assert_refused(path: Path, model: nn.Module, message: str = "") -> None:
    with pytest.raises(ValueError, match=f"(?s){re.escape(str(path))}.*{message}.*write it again with save_cache"):
        file.load_cache(path, model)


def header_size(data: bytes) -> int:
    return 8 + int.from_bytes(data[:8], "little")


@pytest.mark.parametrize("part", ["header", "tensors"])
def test_a_single_bit_that_flipped_is_found(model: nn.Module, written: dict[str, bytes], tmp_path: Path, part: str) -> None:
    path, data, rng = tmp_path / "doc.safetensors", written["means"], random.Random(part)
    edge = header_size(data)
    begin, end = (0, edge) if part == "header" else (edge, len(data))
    path.write_bytes(data)
    file.load_cache(path, model)
    for _ in range(FLIPS):
        damaged = bytearray(data)
        damaged[rng.randrange(begin, end)] ^= 1 << rng.randrange(8)
        path.write_bytes(damaged)
        assert_refused(path, model)


def test_a_file_of_another_length_is_found(model: nn.Module, written: dict[str, bytes], tmp_path: Path) -> None:
    path, data, rng = tmp_path / "doc.safetensors", written["means"], random.Random(0)
    edge = header_size(data)
    lengths = [0, 1, 7, 8, 9, edge - 1, edge, edge + 1, len(data) - 1] + [rng.randrange(len(data)) for _ in range(60)]
    for length in lengths:
        path.write_bytes(data[:length])
        assert_refused(path, model, "not a complete safetensors file")
    path.write_bytes(data + b"\0" * 8)
    assert_refused(path, model, "not a complete safetensors file")


def forge(data: bytes, path: Path, tensors: Change = dict, metadata: Callable[[dict[str, str]], object] = dict) -> None:
    """Write a file with other content, and the digest of that content."""
    header = json.loads(data[8 : header_size(data)])["__metadata__"]
    content = safetensors.load(data)
    header.pop("sha256")
    tensors(content)
    metadata(header)
    content = {name: x.contiguous() for name, x in content.items()}
    path.write_bytes(file_content.to_bytes(content, header))


def put(name: str, change: Callable[[Tensor], Tensor]) -> Change:
    return lambda content: content.update({name: change(content[name])})


def in_every_layer(names: tuple[str, ...], change: Callable[[Tensor], Tensor]) -> Change:
    def changed(content: dict[str, Tensor]) -> None:
        for layer in (0, 1):
            for name in names:
                put(f"layer.{layer}.{name}", change)(content)

    return changed


def at_first(value: float) -> Callable[[Tensor], Tensor]:
    def changed(x: Tensor) -> Tensor:
        x = x.clone()
        x.view(-1)[0] = value
        return x

    return changed


SLOTS = ("k", "v", "log_weight", "position", "score")
WRONG = {
    "a tensor is missing": ("means", lambda content: content.pop("layer.1.position"), r"lacks \['position'\]"),
    "a layer is missing": ("means", lambda content: [content.pop(x) for x in list(content) if "layer.1" in x], "lacks"),
    "a tensor is unknown": ("means", lambda content: content.update({"layer.1.odd": torch.zeros(2)}), r"unknown \['odd'\]"),
    "a layer is unknown": ("means", lambda content: content.update({"layer.2.k": torch.zeros(2)}), "to no layer"),
    "queries are missing": ("means", lambda content: content.pop("layer.0.queries"), r"lacks \['queries'\]"),
    "queries are too many": ("means", put("layer.0.queries", lambda x: torch.cat([x, x], 2)), "at most 4 queries"),
    "queries of odd heads": ("means", put("layer.0.queries", lambda x: x[:, :3]), "multiple of the kv heads"),
    "head_dim": ("means", in_every_layer(("k", "queries"), lambda x: x[..., :8]), "k of 2 kv heads of width 8.*width 16"),
    "value width": ("means", in_every_layer(("v",), lambda x: x[..., :8]), "v of 2 kv heads of width 8.*width 16"),
    "kv heads": ("means", in_every_layer(SLOTS, lambda x: x[:, :1]), "1 kv heads of width 16, but the model has 2"),
    "fewer axes": ("means", put("layer.0.k", lambda x: x[0]), "do not fit together"),
    "batch": ("means", put("layer.0.v", lambda x: x[:1]), "do not fit together"),
    # half precision is what autocast may leave: the first step tells
    "double": ("means", in_every_layer(("k", "v", "queries"), Tensor.double), "float64, but the model computes in"),
    "values in double": ("means", in_every_layer(("v",), Tensor.double), "float64, but the model computes in"),
    "values are whole": ("means", put("layer.0.v", Tensor.int), "int32"),
    "integers": ("means", put("layer.0.k", Tensor.int), "int32"),
    "weights in half": ("means", put("layer.0.log_weight", Tensor.half), "log_weight in torch.float16"),
    "positions are long": ("means", put("layer.0.position", Tensor.long), "position in torch.int64"),
    "a weight is NaN": ("means", put("layer.0.log_weight", at_first(float("nan"))), "log-weights are numbers"),
    "a weight is infinite": ("means", put("layer.0.log_weight", at_first(float("inf"))), "log-weights are numbers"),
    "a position is negative": ("means", put("layer.0.position", at_first(-1)), "from 0 to 59"),
    "a position is later": ("means", put("layer.1.position", at_first(PROMPT)), "from 0 to 59"),
    "a score is NaN": ("hitters", put("layer.0.score", at_first(float("nan"))), "finite and not negative"),
    "a score is negative": ("hitters", put("layer.0.score", at_first(-1.0)), "finite and not negative"),
    "seen is negative": ("means", put("layer.0.numbers", at_first(-60)), "slots of -60 tokens"),
    "seen is less": ("means", put("layer.0.numbers", at_first(20)), "slots of 20 tokens"),
    "compressions are negative": ("means", put("layer.0.numbers", lambda x: torch.tensor([60, -1])), "38 slots of 60"),
    "whole is too few": ("means", put("layer.0.numbers", lambda x: torch.tensor([60, 0])), "38 slots of 60 tokens"),
    "three counters": ("means", put("layer.0.numbers", lambda x: torch.tensor([60, 1, 1])), "do not fit together"),
    "the middle is missing": ("means", in_every_layer(SLOTS, lambda x: x[:, :, :10]), "10 slots of 60 tokens"),
    "the budget is exceeded": ("means", in_every_layer(SLOTS, lambda x: torch.cat([x, x], 2)), "76 slots of 60 tokens"),
    "layers saw other numbers": ("means", put("layer.1.numbers", lambda x: torch.tensor([61, 1])), "different numbers"),
    "tokens of another": ("means", put("tokens", lambda x: x[:1]), "the tokens of shape"),
    "tokens are long": ("means", put("tokens", Tensor.long), "the tokens of shape"),
    "pages without a beginning": ("pages", lambda content: content.pop("layer.0.begin"), "lacks"),
    "pages begin before": ("pages", put("layer.0.begin", at_first(-1)), "rows begin from 0 to 60"),
    "pages begin behind": ("pages", put("layer.0.begin", at_first(61)), "rows begin from 0 to 60"),
    "page keys in double": ("pages", in_every_layer(("k", "v"), Tensor.double), "float64, but the model computes in"),
    "pages of other values": ("pages", put("layer.0.v", lambda x: x[:, :, :9]), "do not fit together"),
    "clusters count less": ("subgen", put("layer.0.cluster_count", at_first(-1)), "clusters count the 44 tokens"),
    "clusters count more": ("subgen", put("layer.0.cluster_count", at_first(99)), "clusters count the 44 tokens"),
    "clusters are fewer": ("subgen", put("layer.0.cluster_num", at_first(-1)), "there are from 0 to"),
    "clusters are more": ("subgen", put("layer.0.cluster_num", at_first(10**6)), "there are from 0 to"),
    "a ticket is NaN": ("subgen", put("layer.0.cluster_ticket", at_first(float("nan"))), "cluster_ticket is not negative"),
    "a norm is NaN": ("subgen", put("layer.0.drawn_norm", at_first(float("nan"))), "drawn_norm is not negative"),
    "a total is infinite": ("subgen", put("layer.0.drawn_total", at_first(float("inf"))), "drawn_total is finite"),
    "draws of other sizes": ("subgen", put("layer.0.drawn_k", lambda x: x[:, :, :1]), "do not fit together"),
    "exact tokens are more": ("subgen", put("layer.0.numbers", at_first(9)), "16 of 9 tokens are exact"),
    "the sketch is missing": (
        "subgen",
        lambda content: [content.pop(x) for x in list(content) if "cluster" in x or "drawn" in x],
        "16 of 60 tokens are exact",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_content_with_a_digest_of_its_own_is_refused(
    model: nn.Module, written: dict[str, bytes], tmp_path: Path, case: str
) -> None:
    policy, change, message = WRONG[case]
    path = tmp_path / "doc.safetensors"
    # what is forged without a change is accepted: it is the change that is refused
    forge(written[policy], path)
    file.load_cache(path, model)
    forge(written[policy], path, change)
    assert_refused(path, model, message)


def edit(name: str, **fields: object) -> Callable[[dict[str, str]], object]:
    def edited(header: dict[str, str]) -> None:
        header[name] = json.dumps(json.loads(header[name]) | fields)

    return edited


HEADERS = {
    "no policy": (lambda header: header.update(cache='{"seed": 3}'), "policy is missing|room is missing"),
    "an unknown policy": (edit("cache", policy={"type": "Path"}), "must be one of"),
    "no policy at all": (edit("cache", policy={"type": "Bounds", "reach": 0.3}), "must be a policy"),
    "a policy of wrong arguments": (edit("cache", policy={"type": "BalancedHalving", "breadth": -1.0}), "breadth=-1.0"),
    "an unknown field": (edit("cache", more=1), "no such field"),
    "room for nothing": (edit("cache", room={"budget": 18, "sinks": 2, "window": 16}), "leaves no slot besides"),
    "a smaller budget": (edit("cache", room={"budget": 20, "sinks": 2, "window": 16}), "38 slots of 60 tokens, budget=20"),
    "a negative seed": (edit("cache", seed=-1), "whole number"),
    "no JSON": (lambda header: header.update(cache="{"), "not JSON"),
    "no model": (lambda header: header.pop("model"), "not match its checksum"),
    "half a model": (lambda header: header.update(model='{"num_layers": 2}'), "of another kind"),
}


@pytest.mark.parametrize("case", HEADERS)
def test_a_wrong_header_with_a_digest_of_its_own_is_refused(
    model: nn.Module, written: dict[str, bytes], tmp_path: Path, case: str
) -> None:
    change, message = HEADERS[case]
    path = tmp_path / "doc.safetensors"
    forge(written["means"], path, metadata=change)
    assert_refused(path, model, message)


def test_a_state_that_is_refused_leaves_the_cache_as_it_was(model: nn.Module) -> None:
    caches = [integration.HyperCache(model.config, budget=40, sinks=2, window=16) for _ in range(2)]
    for cache, length in zip(caches, (PROMPT, 50), strict=True):
        with torch.no_grad(), pytest.warns(UserWarning, match="exact"), integration.use(model, ha.Exact()):
            model(tokens(2, length), past_key_values=cache)
    states = {number: store.state() for number, store in caches[0].stores.items()}
    del states[1]["k"]
    before = dict(caches[1].stores)
    with pytest.raises(ValueError, match="lacks"):
        caches[1].restore(states)
    assert caches[1].stores == before
    assert caches[1].get_seq_length() == 50
    states[1] = caches[0].stores[1].state()
    caches[1].restore(states)
    assert [store.seen for store in caches[1].stores.values()] == [PROMPT, PROMPT]
