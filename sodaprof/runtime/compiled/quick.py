"""Programs as Python runs them fastest: the same operators on the same values, so the same bits, at less cost a call.

A traced program calls operators through `torch.ops`, which parses a schema at each call, and has linear layers in their
parts. Here linear layers are whole again, views of views are one view, and an operator is called by torch's own function of
that name. For small networks what an operator costs the host is most of what a block takes.
"""

from __future__ import annotations

from collections import namedtuple
from collections.abc import Callable
from typing import Any

import torch
from torch import fx
from torch.utils._pytree import TreeSpec, tree_unflatten

ATEN = torch.ops.aten
ADD, MUL, DIV, MM, ADDMM, T, CLONE, VIEW, UNSAFE_VIEW = (
    ATEN.add.Tensor, ATEN.mul.Tensor, ATEN.div.Tensor, ATEN.mm.default, ATEN.addmm.default, ATEN.t.default,
    ATEN.clone.default, ATEN.view.default, ATEN._unsafe_view.default,
)  # fmt: skip
LINEAR: Any = torch._C._nn.linear
# operators whose function takes the same arguments in the same order; all others are called as they were traced
FUNCTIONS = (
    "add", "sub", "mul", "div", "neg", "pow", "rsqrt", "sqrt", "exp", "sin", "cos", "tanh", "sigmoid", "mean", "cat",
    "stack", "transpose", "t", "permute", "unsqueeze", "squeeze", "select", "unbind", "split", "where", "clone", "mm",
    "bmm", "addmm", "native_layer_norm", "scalar_tensor", "_scaled_dot_product_flash_attention_for_cpu",
)  # fmt: skip
FUNCTION: dict[str, Callable[..., Any]] = {
    **{f"aten::{name}": getattr(torch._VF, name) for name in FUNCTIONS},
    **{f"aten::{name}": getattr(torch._C._nn, name) for name in ("gelu", "silu")},
    **{f"aten::{name}": getattr(torch.Tensor, name) for name in ("view", "expand")},
}


def quick(graph: fx.GraphModule, result: TreeSpec | None = None) -> Callable[..., Any]:
    """Returns a function of the graph's inputs that returns what the graph returns, in the structure `result` if given."""
    new, copies, structured = fx.Graph(), dict[fx.Node, fx.Node](), result is not None and _is_plain(result)
    for node in graph.graph.nodes:
        if node.op == "output":
            found: Any = fx.map_arg(list(node.args[0]), copies.__getitem__)
            new.output(tree_unflatten(found, result) if result is not None and structured else found)
        elif (linear := _linear_of(node)) is not None:
            copies[node] = new.call_function(LINEAR, tuple(copies[part] for part in linear))
        elif _changes_nothing(node):
            copies[node] = copies[node.args[0]]
        else:
            copy = copies[node] = new.node_copy(node, copies.__getitem__)
            if node.target is VIEW:
                copy.args = (copies[_viewed(node)], *copy.args[1:])
            if isinstance(node.target, torch._ops.OpOverload):
                copy.target = FUNCTION.get(node.target._schema.name, node.target)
    new.eliminate_dead_code()
    run: Callable[..., Any] = fx.GraphModule(graph, new).forward
    if result is None or structured:
        return run
    return lambda *inputs: tree_unflatten(run(*inputs), result)


def _is_plain(spec: TreeSpec) -> bool:
    """Whether a structure is of tuples, lists and dicts alone, as code can write it down."""
    if spec.is_leaf():
        return True
    own = spec.type in (tuple, list, dict, namedtuple)
    return own and all(_is_plain(spec.child(i)) for i in range(spec.num_children))


def _viewed(node: Any) -> Any:
    """Returns what a view is to be taken of: of contiguous memory, a view of a view is a view of the first."""
    source = node.args[0]
    while (
        source.target is VIEW
        and isinstance(source.args[1], list | tuple)
        and _is_contiguous(source.args[0])
        and _linear_of(source) is None
    ):
        source = source.args[0]
    return source


def _linear_of(node: Any) -> tuple[fx.Node, fx.Node, fx.Node] | None:
    """Returns input, weight and bias where the node is what torch makes of a linear layer, else None.

    torch takes a contiguous input of 3 axes as one matrix and adds the bias in the product; another input it copies,
    multiplies and then adds. Handed the layer whole, it does the same again.
    """
    if node.target is VIEW and getattr(node.args[0], "target", None) is ADDMM:
        if node.args[0].kwargs or len(node.args[0].users) > 1:
            return None
        (bias, flat, turned), takes = node.args[0].args, VIEW
    elif node.target is ADD and not node.kwargs and getattr(node.args[0], "target", None) is UNSAFE_VIEW:
        product, bias = node.args[0].args[0], node.args[1]
        if product.target is not MM or len(product.users) > 1 or len(node.args[0].users) > 1:
            return None
        (flat, turned), takes = product.args, UNSAFE_VIEW
    else:
        return None
    if getattr(flat, "target", None) is not takes or turned.target is not T or not isinstance(bias, fx.Node):
        return None
    x, weight = flat.args[0], turned.args[0]
    if takes is UNSAFE_VIEW:
        if x.target is not CLONE:
            return None
        x = x.args[0]
    looks = [n.meta.get("val") for n in (x, weight, bias, node)]
    if not all(map(torch.is_tensor, looks)):
        return None
    shapes = [found.shape for found in looks if found is not None]
    whole = (*shapes[0][:-1], shapes[1][0]) == shapes[3] and shapes[2] == shapes[1][:1]
    if not whole or len(shapes[0]) != 3 or _is_contiguous(x) != (takes is VIEW):
        return None
    return x, weight, bias


def _changes_nothing(node: Any) -> bool:
    """Whether the node multiplies or divides by 1 what was made for it alone or for itself, as attention scales outputs."""
    if node.target not in (MUL, DIV) or node.kwargs or node.args[1] not in (1, 1.0):
        return False
    source = node.args[0]
    before, after = source.meta.get("val"), node.meta.get("val")
    if before is None or after is None or before.dtype != after.dtype or before.stride() != after.stride():
        return False
    while source.target in (VIEW, UNSAFE_VIEW) and len(source.users) == 1:
        source = source.args[0]
    return source.target in (ADDMM, MM, ADD) and len(source.users) == 1  # nobody else's memory


def _is_contiguous(node: Any) -> bool:
    looks = node.meta.get("val")
    return torch.is_tensor(looks) and bool(looks.is_contiguous())
