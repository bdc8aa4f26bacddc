"""The arguments of a transformer's blocks at every step, without running a block.

Most networks compute embeddings of the timestep and the prompt outside of their blocks. Calling the whole transformer with
stubbed blocks at every timestep would cost more than the conditioning tables save. Traced once, what is outside of the blocks is
a program as a block's is: without what leads only to the latents, with parameters as inputs, all steps computed at once.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.func import functional_call
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from ...errors import SodaprofError
from .dependence import Arguments, BlockCall, Stubs, TransformerCall, with_stubbed_blocks
from .identity import same, setting_of, signature_of, stored_tensors
from .precompute import Filler, Parts, parts_of
from .trace import Bare, TracedBlock, graph_of

LOG = logging.getLogger(__name__)


class Outside:
    """The modules of a transformer outside of its blocks, as they are now."""

    def __init__(self, transformer: nn.Module, blocks: list[TracedBlock]) -> None:
        self.transformer, self.blocks = transformer, blocks
        self.modules = list(_outside("", transformer, {id(block.block) for block in blocks}))
        self.tensors = stored_tensors(self.modules)

    def parameters(self) -> list[torch.Tensor]:
        """Returns parameters and buffers as they are now."""
        return [found[name] for _, found, name in self.tensors]

    def built(self) -> Any:
        """Returns all that a trace would make a constant; None if a module has hooks of others, which must run."""
        others = [module for _, module in self.modules if module is not self.transformer]
        hooked = [*others, *(block.block for block in self.blocks)]  # the transformer's own run outside of the trace
        if any(m._forward_hooks or m._forward_pre_hooks for m in hooked) or any("forward" in vars(m) for m in others):
            return None
        settings = tuple((name, type(module), setting_of(vars(module))) for name, module in self.modules)
        return settings, tuple(map(signature_of, self.parameters()))

    def program(self, call: TransformerCall, known: Sequence[BlockCall]) -> OutsideProgram | None:
        """Returns a program from the transformer's arguments to its blocks' early arguments, None if it cannot be traced."""
        stubs, stub_spec = tree_flatten([one.out for one in known])
        inputs = [*call.leaves, *stubs]
        constants = [None if torch.is_tensor(leaf) else leaf for leaf in inputs]
        places = [i for i, leaf in enumerate(inputs) if torch.is_tensor(leaf)]
        wanted: list[Wanted] = []
        parameters = self.parameters()

        def run(*flat: torch.Tensor) -> list[Any]:
            filled = list(constants)
            for place, tensor in zip(places, flat[len(parameters) :], strict=True):
                filled[place] = tensor
            args, kwargs = tree_unflatten(filled[: len(call.leaves)], call.spec)
            named = {f"block.{path}": value for (path, _, _), value in zip(self.tensors, flat, strict=False)}
            outputs = tree_unflatten(filled[len(call.leaves) :], stub_spec)
            bare = Bare(self.transformer, call.forward)
            found, _ = with_stubbed_blocks(self.blocks, outputs, lambda: functional_call(bare, named, args, kwargs))
            return _early_tensors(found, known, wanted)

        graph = self._traced(run, [*parameters, *(inputs[i] for i in places)])
        if graph is None:
            return None
        changing = {len(parameters) + n for n, i in enumerate(places) if i in call.changing}
        return OutsideProgram(parts_of(graph, 0, set(), changing), places, stubs, wanted)

    def _traced(self, run: Callable[..., list[Any]], inputs: list[Any]) -> Any:
        """Returns the graph of run(*inputs); None if it cannot be traced or draws random numbers."""
        try:
            graph = graph_of(run, inputs)
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
        tags = (getattr(node.target, "tags", ()) for node in graph.graph.nodes)
        return None if any(torch.Tag.nondeterministic_seeded in of_node for of_node in tags) else graph


class Wanted(NamedTuple):
    """An early argument of a block among the outputs of a program."""

    block: int
    argument: int
    output: int


class OutsideProgram:
    """A program that computes the blocks' arguments at every step."""

    def __init__(self, parts: Parts, places: list[int], stubs: list[Any], wanted: list[Wanted]) -> None:
        self.parts, self.places, self.stubs, self.wanted = parts, places, stubs, wanted
        self.template: Arguments = []  # the blocks' arguments; stubs for those that the program does not compute

    def arguments(
        self, filler: Filler, parameters: list[torch.Tensor], of_steps: Sequence[list[Any]]
    ) -> list[Arguments]:
        """Returns the arguments of every block at each step, from the leaves of the transformer's call at each step."""
        inputs = [[(*leaves, *self.stubs)[i] for i in self.places] for leaves in of_steps]
        of_run = self.parts.of_run.forward(*parameters, *inputs[0])
        values = filler.of_steps(self.parts, parameters, inputs, of_run)
        found = []
        for at_step, of_step in zip(inputs, values, strict=True):
            outputs = self.parts.rest.forward(*parameters, *at_step, *of_run, *of_step)
            found.append([list(of_block) for of_block in self.template])
            for block, argument, output in self.wanted:
                found[-1][block][argument] = outputs[output]
        return found


class BlockArguments:
    """Computes the arguments of every block at each step: by a program, or by calls with stubbed blocks."""

    def __init__(self, blocks: list[TracedBlock], steps: list[int], filler: Filler, stubs: Stubs) -> None:
        self.blocks, self.steps, self.filler, self.stubs = blocks, steps, filler, stubs
        self.programs: dict[Any, OutsideProgram | None] = {}  # by variant of the call and build of the modules

    def prepare(
        self, call: TransformerCall, variant: Any, known: Sequence[BlockCall]
    ) -> Callable[[TransformerCall], list[Arguments]]:
        """Returns the function from a call of this variant to the arguments; traces the program if there is none yet.

        Arguments that depend on the latents are stubs.
        """
        stubs = [one.out for one in known]
        plain = getattr(call.forward, "__func__", None) is type(call.module).forward  # else replaced, by offloading say
        outside = Outside(call.module, self.blocks)
        built = outside.built() if plain else None
        if built is None:
            return lambda call: self._by_calls(call, stubs)
        key = variant, built
        if key not in self.programs:
            self.programs[key] = self._program(outside, call, known)
        program = self.programs[key]
        if program is None:
            return lambda call: self._by_calls(call, stubs)
        parameters = outside.parameters()
        return lambda call: program.arguments(self.filler, parameters, [call.at(step) for step in self.steps])

    def _by_calls(self, call: TransformerCall, stubs: Sequence[Any]) -> list[Arguments]:
        def at(step: int) -> Arguments:
            changed = call.changed.get(step, {})
            return with_stubbed_blocks(self.blocks, stubs, lambda: call.output(changed))[0]

        return [at(step) for step in self.steps]

    def _program(self, outside: Outside, call: TransformerCall, known: Sequence[BlockCall]) -> OutsideProgram | None:
        """Returns a program whose arguments equal those of calls with stubbed blocks, None if there is none."""
        changing, stubs = call.changing, [one.out for one in known]
        signatures = {tuple(signature_of(at_step[i]) for i in changing) for at_step in map(call.at, self.steps)}
        if len(signatures) > 1 or not all(torch.is_tensor(call.leaves[i]) for i in changing):
            return None
        program = outside.program(call, known)
        if program is None:
            return None
        expected = self._by_calls(call, stubs)
        own = {id(leaf) for leaf in tree_leaves(stubs) if torch.is_tensor(leaf)}
        program.template = [
            [self.stubs.like(leaf) if i in one.late and id(leaf) not in own else leaf for i, leaf in enumerate(leaves)]
            for one, leaves in zip(known, expected[0], strict=True)
        ]
        of_steps = [call.at(step) for step in self.steps]
        for _ in range(2):  # step by step, then all at once
            found = program.arguments(self.filler, outside.parameters(), of_steps)
            for before, after in zip(expected, found, strict=True):
                if not all(map(_equal, known, before, after)):
                    return None
        return program


def _equal(one: BlockCall, expected: list[Any], found: list[Any]) -> bool:
    """Returns whether a block's arguments have the expected signatures, and the early ones the expected values."""
    pairs = enumerate(zip(expected, found, strict=True))
    return all(signature_of(a) == signature_of(b) and (i in one.late or same(a, b)) for i, (a, b) in pairs)


def _early_tensors(found: Arguments, known: Sequence[BlockCall], wanted: list[Wanted]) -> list[Any]:
    """Returns the tensors among the blocks' early arguments, each once; adds to `wanted` where each argument is."""
    numbers, outputs = dict[int, int](), list[Any]()
    for block, (leaves, one) in enumerate(zip(found, known, strict=True)):
        for i, leaf in enumerate(leaves):
            if torch.is_tensor(leaf) and i not in one.late:
                if id(leaf) not in numbers:
                    numbers[id(leaf)] = len(outputs)
                    outputs.append(leaf)
                wanted.append(Wanted(block, i, numbers[id(leaf)]))
    return outputs


def _outside(prefix: str, module: nn.Module, blocks: set[int]) -> Iterator[tuple[str, nn.Module]]:
    """Yields (path, module) of a module and of all modules in it that are not within a block."""
    yield prefix, module
    for name, child in module._modules.items():
        if child is not None and id(child) not in blocks:
            yield from _outside(f"{prefix}.{name}" if prefix else name, child, blocks)
