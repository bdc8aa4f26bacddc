"""The arguments of a transformer's blocks at every step, without running a block.

Most networks compute embeddings of the timestep and the prompt outside of their blocks. Calling the whole transformer with
stubbed blocks at every timestep would cost more than the conditioning tables save. Traced once, what is outside of the blocks is
a program as a block's is: without what leads only to the latents, with parameters as inputs, all steps computed at once.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from ...errors import SodaprofError
from .dependence import Arguments, BlockCall, Stubs, TransformerCall, stubbed_arguments
from .identity import Stored, build_of, same, signature_of, stored_tensors, tensors_now
from .precompute import Filler, Parts, draws, parts_of
from .trace import TracedBlock, graph_of

LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class OutsideProgram:
    """A program that computes the blocks' arguments at every step."""

    parts: Parts
    places: list[int]  # of its inputs among the leaves of the transformer's call and `stubs`
    stubs: list[Any]  # of the blocks' outputs
    template: Arguments  # the blocks' arguments that the program does not compute, None for the others

    def arguments(self, filler: Filler, tensors: Stored, of_steps: Sequence[list[Any]]) -> list[Arguments]:
        """Returns the arguments of every block at each step, from the leaves of the transformer's call at each step."""
        parameters = tensors_now(tensors)
        inputs = [[(*leaves, *self.stubs)[i] for i in self.places] for leaves in of_steps]
        of_run = self.parts.of_run.forward(*parameters, *inputs[0])
        values = filler.of_steps(self.parts, parameters, inputs, of_run)
        found = []
        for at_step, of_step in zip(inputs, values, strict=True):
            computed = self.parts.rest.forward(*parameters, *at_step, *of_run, *of_step)
            pairs = zip(self.template, computed, strict=True)
            found.append([[b if a is None else a for a, b in zip(*pair, strict=True)] for pair in pairs])
        return found


class BlockArguments:
    """Computes the arguments of every block at each step: by a program, or by calls with stubbed blocks."""

    def __init__(
        self, transformer: nn.Module, blocks: list[TracedBlock], steps: list[int], filler: Filler, stubs: Stubs
    ) -> None:
        self.transformer, self.blocks, self.steps, self.filler, self.stubs = transformer, blocks, steps, filler, stubs
        self.programs: dict[Any, OutsideProgram | None] = {}  # by variant of the call and build of the modules

    def at_steps(self, call: TransformerCall, variant: int, known: Sequence[BlockCall]) -> list[Arguments]:
        """Returns the arguments, stubs for those that depend on the latents; traces the program if there is none yet.

        known: what is known of the blocks' calls in calls of this variant.
        """
        modules = list(_outside("", self.transformer, {id(block.block) for block in self.blocks}))
        tensors, program = stored_tensors(modules), None
        if self._traceable(call, [module for _, module in modules]):
            key = variant, build_of(modules), *map(signature_of, tensors_now(tensors))
            if key not in self.programs:
                self.programs[key] = self._program(call, known, tensors)
            program = self.programs[key]
        if program is None:
            return self._by_calls(call, known)
        return program.arguments(self.filler, tensors, [call.at(step) for step in self.steps])

    def _traceable(self, call: TransformerCall, modules: list[nn.Module]) -> bool:
        """Returns whether no hooks of others must run; the transformer's own run outside of the trace."""
        replaced = getattr(call.forward, "__func__", None) is not type(self.transformer).forward  # by offloading, say
        others = [module for module in modules if module is not self.transformer]
        hooked = [*others, *(block.block for block in self.blocks)]
        return not (
            replaced
            or any(m._forward_hooks or m._forward_pre_hooks for m in hooked)
            or any("forward" in vars(m) for m in others)
        )

    def _by_calls(self, call: TransformerCall, known: Sequence[BlockCall]) -> list[Arguments]:
        stubs, found = [one.out for one in known], []
        for step in self.steps:
            leaves = call.at(step)
            found.append(stubbed_arguments(self.blocks, lambda leaves=leaves: call.output(leaves), stubs))  # type: ignore[misc]
        return found

    def _program(self, call: TransformerCall, known: Sequence[BlockCall], tensors: Stored) -> OutsideProgram | None:
        """Returns a program whose arguments equal those of calls with stubbed blocks, None if there is none."""
        of_steps, changing = [call.at(step) for step in self.steps], call.changing
        if len({tuple(signature_of(leaves[i]) for i in changing) for leaves in of_steps}) > 1:
            return None
        if not all(torch.is_tensor(call.leaves[i]) for i in changing):
            return None
        stubs, spec = tree_flatten([one.out for one in known])
        traced = self._traced(call, known, tensors, stubs, spec)
        if traced is None:
            return None
        graph, places = traced
        of_step = {len(tensors) + n for n, i in enumerate(places) if i in changing}
        expected, own = self._by_calls(call, known), {id(leaf) for leaf in stubs if torch.is_tensor(leaf)}
        template = [
            [
                leaf
                if not torch.is_tensor(leaf) or id(leaf) in own
                else self.stubs.like(leaf)
                if i in one.late
                else None
                for i, leaf in enumerate(leaves)
            ]
            for one, leaves in zip(known, expected[0], strict=True)
        ]
        program = OutsideProgram(parts_of(graph, 0, set(), of_step), places, stubs, template)
        for _ in range(2):  # step by step, then all at once
            found = program.arguments(self.filler, tensors, of_steps)
            if not all(all(map(_equal, known, *pair)) for pair in zip(expected, found, strict=True)):
                return None
        return program

    def _traced(
        self, call: TransformerCall, known: Sequence[BlockCall], tensors: Stored, stubs: list[Any], spec: TreeSpec
    ) -> tuple[fx.GraphModule, list[int]] | None:
        """Returns (graph, places) of the early tensors among the blocks' arguments, None for the others.

        Returns None if they cannot be traced, or draw random numbers.
        """

        def run(forward: Callable[..., Any], filled: list[Any]) -> Arguments:
            count = len(call.leaves)
            args, kwargs = tree_unflatten(filled[:count], call.spec)
            outputs = tree_unflatten(filled[count:], spec)
            found = stubbed_arguments(self.blocks, lambda: forward(args, kwargs), outputs)
            return [
                [None if i in one.late or not torch.is_tensor(leaf) else leaf for i, leaf in enumerate(leaves)]
                for one, leaves in zip(known, found, strict=True)
            ]

        try:
            graph, places = graph_of(self.transformer, call.forward, tensors, [*call.leaves, *stubs], run)
        except SodaprofError:
            raise
        except Exception as error:  # any error of an operator that cannot be traced
            LOG.info(
                "What %s computes outside of its blocks cannot be traced (%s: %s): it is called at each step to fill the "
                "tables, which gives the same bits and takes longer.",
                type(self.transformer).__name__,
                type(error).__name__,
                error,
            )
            return None
        return None if any(map(draws, graph.graph.nodes)) else (graph, places)


def _equal(one: BlockCall, expected: list[Any], found: list[Any]) -> bool:
    """Returns whether a block's arguments have the expected signatures, and the early ones the expected values."""
    pairs = enumerate(zip(expected, found, strict=True))
    return all(signature_of(a) == signature_of(b) and (i in one.late or same(a, b)) for i, (a, b) in pairs)


def _outside(prefix: str, module: nn.Module, blocks: set[int]) -> Iterator[tuple[str, nn.Module]]:
    """Yields (path, module) of a module and of all modules in it that are not within a block."""
    yield prefix, module
    for name, child in module._modules.items():
        if child is not None and id(child) not in blocks:
            yield from _outside(f"{prefix}.{name}" if prefix else name, child, blocks)
