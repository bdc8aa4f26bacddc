"""What a transformer computes around its blocks, as a program: the blocks' arguments that do not depend on the latents.

Embeddings of the timestep and the prompt are computed there by most networks. To fill the tables by calling the whole
transformer at every timestep, its blocks standing still, would cost more than the tables save. Traced once, it is a program
as a block's is: without what only leads to the latents, with parameters as inputs, all steps computed at once.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn
from torch.func import functional_call, functionalize
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from ...errors import SodaprofError
from .precompute import Filler, Parts, parts_of
from .trace import Bare, LoweredBlock, kind_of, setting_of

LOG = logging.getLogger(__name__)

Arguments = list[list[Any]]  # of every block, its leaves


class Outside:
    """The modules around a transformer's blocks as they are now, and how they are built."""

    def __init__(self, transformer: nn.Module, blocks: list[LoweredBlock]) -> None:
        self.transformer, self.blocks = transformer, blocks
        self.modules = list(_around("", transformer, {id(block.block) for block in blocks}))
        self.tensors = [
            (found, name, f"{prefix}.{name}" if prefix else name)
            for prefix, module in self.modules
            for found in (module._parameters, module._buffers)
            for name, value in found.items()
            if value is not None
        ]

    def parameters(self) -> list[torch.Tensor]:
        """Returns parameters and buffers as they are now."""
        found = (where[name] for where, name, _ in self.tensors)
        return [tensor for tensor in found if tensor is not None]

    def built(self) -> Any:
        """Returns all that a trace would bake in; None where somebody's hooks stand around a module: they are to be heard."""
        others = [module for _, module in self.modules if module is not self.transformer]
        hooked = [*others, *(block.block for block in self.blocks)]  # the transformer's stand around what is traced
        if any(m._forward_hooks or m._forward_pre_hooks for m in hooked) or any("forward" in vars(m) for m in others):
            return None
        return tuple((n, type(m), setting_of(vars(m))) for n, m in self.modules), tuple(map(kind_of, self.parameters()))

    def program(
        self, forward: Callable[..., Any], leaves: list[Any], spec: TreeSpec, answers: Sequence[Any],
        moving: set[int], late: Sequence[set[int]],
    ) -> OutsideProgram | None:  # fmt: skip
        """Returns what maps the transformer's arguments to its blocks', or None where it cannot be traced.

        answers: what the blocks return while they stand still; moving: arguments that change from step to step; late: of
        each block, arguments that are not asked for.
        """
        stand_ins, answer_spec = tree_flatten(list(answers))
        constants = [None if torch.is_tensor(leaf) else leaf for leaf in (*leaves, *stand_ins)]
        places = [i for i, leaf in enumerate((*leaves, *stand_ins)) if torch.is_tensor(leaf)]
        wanted: list[tuple[int, int, int]] = []  # block, argument, number of the output
        parameters = self.parameters()

        def run(*flat: torch.Tensor) -> list[Any]:
            filled = list(constants)
            for place, tensor in zip(places, flat[len(parameters) :], strict=True):
                filled[place] = tensor
            args, kwargs = tree_unflatten(filled[: len(leaves)], spec)
            named = {f"block.{name}": value for (_, _, name), value in zip(self.tensors, flat, strict=False)}
            asked = stand_still(
                self.blocks, tree_unflatten(filled[len(leaves) :], answer_spec),
                lambda: functional_call(Bare(self.transformer, forward), named, args, kwargs),
            )[0]  # fmt: skip
            numbers, outputs = dict[int, int](), list[Any]()
            for block, (of_block, not_asked) in enumerate(zip(asked, late, strict=True)):
                for i, leaf in enumerate(of_block):
                    if torch.is_tensor(leaf) and i not in not_asked:
                        if id(leaf) not in numbers:
                            numbers[id(leaf)] = len(outputs)
                            outputs.append(leaf)
                        wanted.append((block, i, numbers[id(leaf)]))
            return outputs

        inputs = [*parameters, *((*leaves, *stand_ins)[i] for i in places)]
        try:
            graph = make_fx(functionalize(run), tracing_mode="fake", _allow_non_fake_inputs=True)(*inputs)
        except SodaprofError:
            raise
        except Exception as error:  # whatever an operator says that cannot be traced
            LOG.info(
                "What surrounds the blocks of %s cannot be traced (%s: %s): it is called at each step to fill the tables, which "
                "gives the same bits and takes longer.", type(self.transformer).__name__, type(error).__name__, error,
            )  # fmt: skip
            return None
        graph.graph.eliminate_dead_code()
        graph.recompile()
        random = (torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ()) for node in graph.graph.nodes)
        if any(random):
            return None
        moved = {len(parameters) + n for n, i in enumerate(places) if i in moving}
        return OutsideProgram(parts_of(graph, 0, set(), moved), places, stand_ins, wanted)


class OutsideProgram:
    """The blocks' arguments at every step as a program of the transformer's."""

    def __init__(
        self, parts: Parts, places: list[int], stand_ins: list[Any], wanted: list[tuple[int, int, int]]
    ) -> None:
        self.parts, self.places, self.stand_ins, self.wanted = parts, places, stand_ins, wanted
        self.template: Arguments = []  # the blocks' arguments, those not asked for as they look

    def arguments(
        self, filler: Filler, parameters: list[torch.Tensor], of_steps: Sequence[list[Any]]
    ) -> list[Arguments]:
        """Returns the arguments of every block at each step, of the leaves of the transformer's call at each step."""
        inputs = [[(*leaves, *self.stand_ins)[i] for i in self.places] for leaves in of_steps]
        of_run = self.parts.of_run.forward(*parameters, *inputs[0])
        values = filler.of_steps(self.parts, parameters, inputs, of_run)
        found = []
        for at_step, of_step in zip(inputs, values, strict=True):
            outputs = self.parts.rest.forward(*parameters, *at_step, *of_run, *of_step)
            found.append([list(of_block) for of_block in self.template])
            for block, argument, number in self.wanted:
                found[-1][block][argument] = outputs[number]
        return found


def _around(prefix: str, module: nn.Module, blocks: set[int]) -> Iterator[tuple[str, nn.Module]]:
    yield prefix, module
    for name, child in module._modules.items():
        if child is not None and id(child) not in blocks:
            yield from _around(f"{prefix}.{name}" if prefix else name, child, blocks)


def stand_still(blocks: list[LoweredBlock], answers: Sequence[Any], call: Callable[[], Any]) -> tuple[Arguments, Any]:
    """Returns the arguments of every block in call() while they return `answers`, and what it returns."""
    try:
        for block, answer in zip(blocks, answers, strict=True):
            block.answer = (answer,)
        out = call()
        return [block.asked for block in blocks], out
    finally:
        for block in blocks:
            block.answer, block.asked = None, []
