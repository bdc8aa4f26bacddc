"""Programs made quick: the same bits, linear layers whole again, nothing handed on that is somebody else's memory."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.func import functionalize
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import tree_flatten

from sodaprof.runtime.compiled.quick import quick


def targets(run):
    return [
        getattr(node.target, "__name__", str(node.target))
        for node in run.__self__.graph.nodes
        if node.op == "call_function"
    ]


def traced(function, *inputs):
    return make_fx(functionalize(function), tracing_mode="fake")(*inputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("turned", [False, True])
@torch.no_grad()
def test_a_linear_layer_is_one_operator_with_the_same_bits(dtype, turned):
    weight, bias = torch.nn.Parameter(torch.randn(24, 16, dtype=dtype)), torch.randn(24, dtype=dtype)
    x = torch.randn(2, 16, 9, dtype=dtype).transpose(1, 2) if turned else torch.randn(2, 9, 16, dtype=dtype)

    def layer(w, b, x):
        return [F.linear(x, w, b).view(2, 9, 4, 6).transpose(1, 2) / 1.0]

    run = quick(traced(layer, weight, bias, x))
    assert targets(run).count("linear") == 1
    assert not {"addmm", "mm", "add"} & set(targets(run))
    (found,), (wanted,) = run(weight, bias, x), layer(weight, bias, x)
    assert torch.equal(found, wanted)
    assert found.stride() == wanted.stride()


def test_products_that_are_no_linear_layer_stay_as_they_are():
    def products(w, b, x):
        return [torch.addmm(b, x, w.t()), torch.addmm(b, x.view(6, 16), w.t(), beta=0.5).view(2, 3, 24)]

    weight, bias, x = torch.randn(24, 16), torch.randn(24), torch.randn(6, 16)
    run = quick(traced(products, weight, bias, x))
    assert targets(run).count("addmm") == 2
    assert all(torch.equal(a, b) for a, b in zip(run(weight, bias, x), products(weight, bias, x), strict=True))


def test_division_by_one_vanishes_only_where_the_memory_is_nobody_elses():
    def scaled(x):
        y = x + 2
        return [(y * 3 + 1) / 1.0, x / 1.0, y, y / 1.0, (x + 1) / 2.0]

    x = torch.randn(5)
    found = quick(traced(scaled, x))(x)
    assert all(torch.equal(a, b) for a, b in zip(found, scaled(x), strict=True))
    assert len({t.data_ptr() for t in (x, *found)}) == 6


def test_views_of_views_and_results_in_their_structure():
    def viewed(x):
        return [x.view(4, 6).view(2, 2, 6).view(3, 8) + 1, x.t().reshape(24).view(4, 6)]

    x = torch.randn(8, 3)
    graph = traced(viewed, x)
    for structure in ((0, [{"a": 0}]), torch.return_types.max((0, 0))):
        spec = tree_flatten(structure)[1]
        found, wanted = quick(graph, spec)(x), viewed(x)
        assert type(found) is type(structure)
        leaves = tree_flatten(found)[0]
        assert all(torch.equal(a, b) for a, b in zip(leaves, wanted, strict=True))
    assert targets(quick(graph)).count("view") == 2
