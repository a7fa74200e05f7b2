"""Graphs of a method: one node, whatever the length, that says what the eager call says; export; inductor."""

import shutil

import pytest

ONE_NODE = """
import torch
import hyperattention as ha
from hyperattention import select
torch.manual_seed(0)
graphs = []

def remember(graph, inputs):
    graphs.append([str(node.target) for node in graph.graph.nodes if node.op == "call_function"])
    return graph

def attend(q, k, v):
    # made while the graph is traced, as a model would
    method = ha.Method(ha.Sinks(2), ha.Window(8), ha.Draw(4, by=ha.HierarchicalSearch()), tile=8)
    result = ha.measured_attention(q, k, v, is_causal=True, enable_gqa=True, method=method)
    return result.out, result.lse

def default(q, k, v):
    return ha.attention(q, k, v, is_causal=True, enable_gqa=True, method=ha.default_method(10**6))

def check(run, lengths):
    graphs.clear()
    torch._dynamo.reset()
    compiled = torch.compile(run, fullgraph=True, backend=remember)
    for length in lengths:
        x = [torch.randn(1, heads, length, 8, requires_grad=True) for heads in (4, 2, 2)]
        results = []
        for step in (run, compiled):
            out = step(*x)
            out = out if isinstance(out, tuple) else (out,)
            results.append([*out, *torch.autograd.grad(sum(y.square().sum() for y in out), x)])
        assert all(torch.equal(a, b) for a, b in zip(*results)), length
    # static first, then one graph for all lengths
    assert len(graphs) == 2, len(graphs)
    assert all(sum("run_method" in node for node in nodes) == 1 and len(nodes) < 20 for nodes in graphs), graphs

check(attend, (300, 400, 77, 1000))
check(default, (4200, 4097, 4300))
print("one node")
"""

EXPORT = """
import torch
import hyperattention as ha

class Attention(torch.nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.options = options

    def forward(self, q, k, v):
        return ha.attention(q, k, v, is_causal=True, enable_gqa=True, **self.options)

def make(length):
    return tuple(torch.randn(1, heads, length, 8) for heads in (4, 2, 2))

def export(model, least, most, *, strict):
    length = torch.export.Dim("length", min=least, max=most)
    return torch.export.export(model, make(max(5000, least + 9)), dynamic_shapes=[{2: length}] * 3, strict=strict)

lists = ha.Method(ha.Sinks(2), ha.Window(8), ha.Draw(4, by=ha.HierarchicalSearch()), tile=8)
for strict in (False, True):
    for least, options in ((32768, {}), (2, {"method": ha.Exact()}), (2, {"method": lists})):
        model = Attention(**options)
        exported = export(model, least, 10**6, strict=strict).module()
        for length in (max(4097, least), max(5000, least + 9)):
            x = make(length)
            assert torch.equal(exported(*x), model(*x)), (strict, options, length)
# exact below the crossover, by draws above it: torch names the range that one graph can serve
try:
    export(Attention(), 2, 10**6, strict=False)
except torch._dynamo.exc.UserError as error:
    assert "32767" in str(error), str(error)
    print("exported")
"""

INDUCTOR = """
import torch
import hyperattention as ha
torch.manual_seed(0)

def attend(q, k, v):
    return ha.attention(q.relu(), k, v, is_causal=True, method=ha.default_method(10**6)) + 1

compiled = torch.compile(attend, fullgraph=True)
for length in (5000, 5200):
    x = [torch.randn(1, 1, length, 8, requires_grad=True) for _ in range(3)]
    pairs = [(out.detach(), *torch.autograd.grad(out.sum(), x)) for out in (attend(*x), compiled(*x))]
    for a, b in zip(*pairs):
        # a user's program, which knows nothing of tests/
        torch.testing.assert_close(a, b)
print("compiled")
"""

CUSTOM = """
import dataclasses
import torch
import hyperattention as ha
from hyperattention import select
from hyperattention.compiled import is_opaque, write_method, _read_method

@dataclasses.dataclass(frozen=True)
class Mine(ha.Window):
    pass

for method in (ha.default_method(10**6), ha.lean_method(10**6), ha.thorough_method(10**6), ha.HyperAttention(),
               ha.Method(ha.Draw(4, by=select.Mix((ha.Uniform(), 0.25), (select.ValueNorm(), 0.75)))),
               ha.ByHead((ha.Exact(), ha.default_method(10**6)))):
    assert is_opaque(method) and _read_method(write_method(method)) == method, method
assert not is_opaque(ha.Method(Mine(8)))
print("read")
"""


@pytest.mark.heavy
def test_a_method_is_one_node_whatever_the_length(run_python):
    assert run_python(ONE_NODE).strip() == "one node"


@pytest.mark.heavy
def test_export_with_a_length_that_varies(run_python):
    assert run_python(EXPORT).strip() == "exported"


@pytest.mark.heavy
@pytest.mark.skipif(not shutil.which("g++"), reason="inductor builds with a C++ compiler, and finds none")
def test_inductor_compiles_what_draws(run_python):
    assert run_python(INDUCTOR).strip() == "compiled"


@pytest.mark.slow
def test_a_graph_names_the_methods_of_the_package(run_python):
    assert run_python(CUSTOM).strip() == "read"
