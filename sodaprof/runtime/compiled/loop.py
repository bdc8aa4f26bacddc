"""The whole-step loop: all steps but the first without the pipeline's Python, guidance and solver in the captured graph.

The pipeline runs its first step itself. What it does with the network's outputs is read off that step: guidance as a weighted
sum of the branches, the solver as a table of coefficients, the schedule's own where it updates the latents. The other steps
then run here, at the pipeline's next call of its transformer; steps without network are composed into those before, so they
cost nothing. For the rest of its loop the pipeline is handed the last latents. What it does between steps beside that (a
callback that changes latents, another guidance at some steps) is not seen.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._pytree import TreeSpec, tree_flatten, tree_leaves, tree_unflatten

from ...errors import UnsupportedModelError
from ...formats.sampler import OwnUpdate
from ...formats.sites import Sampler
from ...pipelines.clock import Moment
from ...pipelines.guidance import combined, guidance_of
from ...pipelines.sampler_steps import advance, own_update, table_of
from ..sampler.update import Jump, Ring, StateUpdate, defaults_of, drawn, jumps, refuse_options
from .buffers import copy_all, expanded_copy, once
from .graphs import Capture


@dataclass
class Branch:
    """How the transformer is called on a guidance branch in the run under way."""

    forward: Any
    leaves: list[Any]  # arguments of the first step
    spec: TreeSpec
    latents: int  # which of them the latents are
    moving: dict[int, dict[int, Any]]  # step, from 1 on -> argument -> value, where it changes
    looks: Any
    out: Any  # what the first step returned


@dataclass
class State:
    """The fixed places that graphs read and write between calls of the transformer."""

    x: torch.Tensor
    ring: torch.Tensor  # [K, …] fp32, what the solver weighs, newest first
    counter: torch.Tensor  # int64 [1], the step
    following: torch.Tensor  # int64 [T], of each step the next that calls the transformer
    noise: torch.Tensor  # fp32, weighted
    arguments: list[dict[int, torch.Tensor]]  # of each branch: tensors that hold for the run
    moving: list[dict[int, torch.Tensor]]  # of each branch: tensors that change, a row a step
    number: int


@dataclass
class Begun:
    """A run whose first step the pipeline took."""

    sample: torch.Tensor  # what the scheduler was given at the first step
    output: torch.Tensor
    result: Any  # what it answered
    prev: torch.Tensor  # the latents after the latest step
    generator: Any


class Loop:
    """The steps after the first of a transformer's runs; `called` are those that call it."""

    def __init__(
        self, moment: Moment, capture: Capture, called: list[bool], sampler: Sampler, update: StateUpdate | None = None
    ) -> None:
        self.moment, self.capture, self.called, self.sampler, self.update = moment, capture, called, sampler, update
        self.steps = [step for step, calls in enumerate(called) if calls]
        self.tables: dict[Any, torch.Tensor] = {}
        self.tabled: dict[Any, list[Jump]] = {}  # what each of them holds
        self.own: OwnUpdate | None = None  # the schedule holds for these timesteps and settings alone
        self.jumps: list[Jump] = []
        self.twice = False  # the transformer is called with the latents twice
        self.branches: list[Branch] = []
        self.states: dict[Any, State] = {}
        self.refused: str | None = None  # why the pipeline runs its own steps
        self.final: torch.Tensor | None = None  # latents after the last step, once they are there
        self.weights: list[float] = []  # of the branches in the guided output
        self.doubled = False  # the solver's sample holds the latents twice
        self.begun: Begun | None = None

    def reset(self) -> None:
        self.branches, self.final, self.begun = [], None, None

    def take(
        self, own: Callable[..., Any], scheduler: Any, step: int, arguments: tuple[Any, ...], options: dict[str, Any]
    ) -> Any:
        """Returns the final latents if the steps were taken here, else the pipeline's own step (`clock.StepTaker`)."""
        if self.final is not None:
            return self.last()
        result = own(*arguments, **options)
        if step == 0:
            self._begin(scheduler, arguments[0], arguments[2], result, options)
        elif self.begun is not None:
            self.begun.prev = _latents(result)
        return result

    def _begin(self, scheduler: Any, output: Any, sample: Any, result: Any, kwargs: dict[str, Any]) -> None:
        """Reads guidance and solver off the first step, which the pipeline took."""
        self.refused = None
        if not self.branches:  # not yet noted: the next run
            return
        try:
            outs = [tree_leaves(branch.out)[0] for branch in self.branches]
            self.weights, self.doubled = guidance_of(
                output, outs, self.sampler.guidance_form, self.sampler.guidance_scale
            )
            if self.update is None:
                refuse_options(scheduler, defaults_of(scheduler), kwargs)
            if self.update is None and self.own is None:
                self.own = own_update(scheduler, scheduler.timesteps)
                self.jumps = jumps(self.own.coefficients, self.own.noise, self.called)
            elif self.update is not None and self.own is not self.update.own:
                assert self.update.own is not None  # it took the first step
                self.own = self.update.own
                self.jumps = jumps(self.update.update.coefficients, self.own.noise, self.called)
        except UnsupportedModelError as error:
            self.refused = str(error)
            return
        self.begun = Begun(sample, output, result, _latents(result), kwargs.get("generator"))

    def wants(self, hidden: torch.Tensor) -> bool:
        """Whether the steps from here on are run here; hidden: the latents that the pipeline calls the transformer with."""
        if self.final is not None:
            return True
        if self.begun is None or self.moment.step != self.steps[1] or self.moment.branch:
            return False
        prev = self.begun.prev
        self.twice = hidden.shape[0] == 2 * prev.shape[0]
        fed = self._fed(prev)
        if hidden.shape != fed.shape or not torch.equal(hidden, fed.to(hidden.dtype)):
            self.refused, self.begun = "the pipeline does more to the latents between steps than its scheduler", None
            return False
        return True

    def _fed(self, x: torch.Tensor) -> torch.Tensor:
        """Returns what the transformer is called with: both guidance branches begin with the same latents."""
        if self.doubled:  # only their first half counts, for a scheduler may have drawn other noise for the second
            x = x[: x.shape[0] // 2]
        return torch.cat([x, x]) if self.doubled or self.twice else x

    def run(self) -> Any:
        """Returns an output of the transformer that the pipeline may do with what it likes; runs all steps, if not yet."""
        if self.final is None:
            with torch.no_grad():
                self._steps()
        return self.branches[min(self.moment.branch, len(self.branches) - 1)].out

    def finished(self, step: int) -> bool:
        """Whether all steps from this one on are taken (`clock.LoopTaker`); counts the cells of skipped ones among them."""
        if self.final is None:
            return False
        if skipped := self.called[step:].count(False):
            self.moment.executed["-"] += skipped * len(self.capture.rows)
        return True

    def last(self) -> Any:
        """Returns the scheduler's answer at the steps that were taken here: the final latents, as it would hand them over."""
        assert self.begun is not None
        assert self.final is not None
        result = self.begun.result
        if isinstance(result, tuple):
            return (self.final, *result[1:])
        return type(result)(**{**result, "prev_sample": self.final})

    def _steps(self) -> None:
        assert self.begun is not None
        assert self.own is not None
        begun = self.begun
        looks = tuple(b.looks for b in self.branches), tuple(self.weights), self.doubled, self.twice
        state = self.states.get(looks)
        if state is None:
            state = self.states[looks] = self._state(begun)
        table = self._table(begun.sample.device)
        first = Ring(1)
        first.add(self.own.data[0], begun.sample, begun.output)
        places, news = [state.x, state.ring[0]], [begun.prev, first.newest[0]]
        for branch, held in zip(self.branches, state.arguments, strict=True):
            places += [once(tensor) for tensor in held.values()]
            news += [once(branch.leaves[i]) for i in held]
        copy_all(places, news)
        state.ring[1:].zero_()
        state.noise.zero_()
        state.counter.fill_(self.steps[1])
        executed_at = self.moment.step
        for jump in self.jumps[1:]:
            noise = drawn(jump.noise, begun.output, begun.generator)
            if noise is not None:
                state.noise.copy_(noise)
            elif any(other.noise for other in self.jumps):
                state.noise.zero_()
            self._step(jump.start, state, table)
        self.moment.step, self.moment.branch = executed_at, 0
        self.final = state.x.clone()

    def _state(self, begun: Begun) -> State:
        """Returns places for runs of this kind."""
        arguments, moving = [], []
        for branch in self.branches:
            changing = branch.moving[self.steps[1]]  # at every step the same arguments
            still = [i for i, leaf in enumerate(branch.leaves) if torch.is_tensor(leaf) and i != branch.latents]
            arguments.append({i: expanded_copy(branch.leaves[i]) for i in still if i not in changing})
            rows: dict[int, list[torch.Tensor]] = {i: [branch.leaves[i]] for i in changing}
            for step in range(1, len(self.called)):
                for i, values in rows.items():
                    values.append(branch.moving[step][i] if self.called[step] else values[-1])
            moving.append({i: torch.stack([once(value) for value in values]) for i, values in rows.items()})
        device = begun.sample.device
        counter = torch.zeros(1, dtype=torch.int64, device=device)
        after = dict(zip(self.steps, [*self.steps[1:], self.steps[0]], strict=True))
        following = torch.tensor([after.get(step, 0) for step in range(len(self.called))], device=device)
        wide = torch.zeros_like(begun.sample, dtype=torch.float32)
        ring = wide.expand(len(self.jumps[0].coefficients) - 1, *wide.shape).clone()
        return State(begun.prev.clone(), ring, counter, following, wide, arguments, moving, len(self.states))

    def _table(self, device: torch.device) -> torch.Tensor:
        """Returns the coefficients in a place of their own, which graphs may read in later runs, too."""
        assert self.own is not None
        key = device, len(self.jumps[0].coefficients)
        if key in self.tables and self.tabled[key] is self.jumps:
            return self.tables[key]
        rows = [[0.0] * len(self.jumps[0].coefficients) for _ in self.called]
        for jump in self.jumps:
            rows[jump.start] = list(jump.coefficients)
        new = table_of(rows, self.own.data).to(device, torch.float32)
        known = self.tables.setdefault(key, new)
        known.copy_(new)
        self.tabled[key] = self.jumps
        return known

    def _step(self, step: int, state: State, table: torch.Tensor) -> None:
        def body(_: list[torch.Tensor]) -> None:
            fed, outputs = self._fed(state.x), []
            for number, (branch, held, moving) in enumerate(
                zip(self.branches, state.arguments, state.moving, strict=True)
            ):
                now = [held.get(i, leaf) for i, leaf in enumerate(branch.leaves)]
                for i, values in moving.items():
                    now[i] = values.index_select(0, state.counter)[0].expand(branch.leaves[i].shape)
                now[branch.latents] = fed.to(branch.leaves[branch.latents].dtype)
                self.moment.step, self.moment.branch, self.moment.tabled = step, number, True
                self.moment.forward += 1
                args, kwargs = tree_unflatten(now, branch.spec)
                outputs.append(tree_flatten(branch.forward(*args, **kwargs))[0][0])
            guided = combined(outputs, self.weights, self.doubled, self.sampler.guidance_form, state.noise)
            x, ring = advance(table, state.counter, state.x, guided, state.ring, state.noise)
            state.x.copy_(x)
            state.ring.copy_(ring)
            state.counter.copy_(state.following.index_select(0, state.counter))

        ats = [(step, number) for number in range(len(self.branches))]
        self.capture.through(("loop", state.number), ats, [], body, state.counter)


def _latents(result: Any) -> torch.Tensor:
    """Returns the latents in a scheduler's answer."""
    latents: torch.Tensor = result[0] if isinstance(result, tuple) else result.prev_sample
    return latents
