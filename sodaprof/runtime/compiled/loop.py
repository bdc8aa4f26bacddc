"""The whole-step loop: all steps except the first without the pipeline's Python, with guidance and solver inside the graph.

The pipeline runs its first step itself. That step shows what it does with the outputs of the network: guidance as a weighted sum
of the branches, the solver as a table of coefficients (those of the schedule if it has a fitted update). The loop runs the other
steps at the pipeline's next call of its transformer. Skipped steps are composed into those before, so they cost nothing. For
the rest of its own loop the pipeline is given the final latents. Whatever else it does between steps (a callback that changes
latents, another guidance at some steps) is not seen.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

from ...errors import UnsupportedModelError
from ...formats.sampler import OwnUpdate
from ...formats.sites import Sampler
from ...pipelines.clock import Moment
from ...pipelines.guidance import combined, guidance_of
from ...pipelines.sampler_steps import advance, own_update, table_of
from ..sampler.update import Jump, Ring, StateUpdate, defaults_of, drawn, jumps, refuse_options
from .buffers import compact, copy_all, expanded_copy
from .dependence import TransformerCall
from .graphs import Graphs, StepsCall
from .identity import tensor_places


@dataclass
class Branch:
    """How the transformer is called on a guidance branch in this run."""

    call: TransformerCall
    variant: int
    out: Any  # output of the first step


@dataclass
class State:
    """The fixed places that graphs read and write between calls of the transformer."""

    x: torch.Tensor
    ring: torch.Tensor  # [K, …] fp32, terms of the solver's weighted sum, newest first
    counter: torch.Tensor  # int64 [1], the step
    following: torch.Tensor  # int64 [T], for each step the next one that calls the transformer
    noise: torch.Tensor  # fp32, weighted, with the weighted first latents
    fixed: list[dict[int, torch.Tensor]]  # of each branch: arguments that hold for the run
    changing: list[dict[int, torch.Tensor]]  # of each branch: arguments that change, a row for each step
    number: int
    table: torch.Tensor  # coefficients (`sampler_steps.table_of`)
    tabled: list[Jump] | None = None  # whose they are


@dataclass
class FirstStep:
    """The scheduler's call at the first step, which the pipeline takes."""

    sample: torch.Tensor
    output: torch.Tensor
    result: Any  # what the scheduler returned
    prev: torch.Tensor  # the latents after the latest step
    generator: Any


class Loop:
    """Runs the steps after the first of a transformer; called: for each step, whether it calls the transformer."""

    def __init__(
        self, moment: Moment, capture: Graphs, called: list[bool], sampler: Sampler, update: StateUpdate | None = None
    ) -> None:
        self.moment, self.capture, self.called, self.sampler, self.update = moment, capture, called, sampler, update
        self.steps = [step for step, calls in enumerate(called) if calls]
        self.own: OwnUpdate | None = None  # of the scheduler; a schedule has one set of timesteps and settings
        self.jumps: list[Jump] = []
        self.twice = False  # the transformer is given the latents twice
        self.branches: list[Branch] = []
        self.states: dict[Any, State] = {}
        self.refused: str | None = None  # why the pipeline runs all steps itself
        self.final: torch.Tensor | None = None  # latents after the last step, once it has run
        self.weights: list[float] = []  # of the branches in the guided output
        self.doubled = False  # the sample of the solver is the latents twice
        self.first_step: FirstStep | None = None

    def reset(self) -> None:
        self.branches, self.final, self.first_step = [], None, None

    def take(self, own: Callable[..., Any], scheduler: Any, step: int, *arguments: Any, **options: Any) -> Any:
        """Returns the final latents if the loop has run all steps, else the pipeline's own step (`clock.StepTaker`)."""
        if self.final is not None:
            return self.last()
        result = own(*arguments, **options)
        if step == 0:
            self._begin(scheduler, arguments[0], arguments[2], result, options)
        elif self.first_step is not None:
            self.first_step.prev = _latents(result)
        return result

    def _begin(self, scheduler: Any, output: Any, sample: Any, result: Any, kwargs: dict[str, Any]) -> None:
        """Finds guidance and solver from the first step, which the pipeline took."""
        self.refused = None
        if not self.branches:  # arguments not recorded yet: from the next run on
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
                update = self.update.update
                self.jumps = jumps(update.coefficients, self.own.noise, self.called, update.initial)
        except UnsupportedModelError as error:
            self.refused = str(error)
            return
        self.first_step = FirstStep(sample, output, result, _latents(result), kwargs.get("generator"))

    def takes_over(self, hidden: torch.Tensor) -> bool:
        """Returns whether the loop runs the steps from here on; hidden: the latents that the transformer is called with."""
        if self.final is not None:
            return True
        if self.first_step is None or self.moment.step != self.steps[1] or self.moment.branch:
            return False
        prev = self.first_step.prev
        self.twice = hidden.shape[0] == 2 * prev.shape[0]
        fed = self._fed(prev)
        if hidden.shape != fed.shape or not torch.equal(hidden, fed.to(hidden.dtype)):
            self.refused = "the pipeline does more to the latents between steps than its scheduler"
            self.first_step = None
            return False
        return True

    def _fed(self, x: torch.Tensor) -> torch.Tensor:
        """Returns what the transformer is called with: both guidance branches have the same latents."""
        if self.doubled:  # only the first half counts: a scheduler may have drawn other noise for the second
            x = x[: x.shape[0] // 2]
        return torch.cat([x, x]) if self.doubled or self.twice else x

    def run(self) -> Any:
        """Returns an output of the transformer, which the pipeline may use in any way; runs all steps if they have not run."""
        if self.final is None:
            with torch.no_grad():
                self._steps()
        return self.branches[min(self.moment.branch, len(self.branches) - 1)].out

    def finished(self, step: int) -> bool:
        """Returns whether all steps from this one on have run; counts the cells of skipped ones (`clock.LoopTaker`)."""
        if self.final is None:
            return False
        if skipped := self.called[step:].count(False):
            self.moment.executed["-"] += skipped * len(self.capture.rows) * len(self.branches)
        return True

    def last(self) -> Any:
        """Returns what the scheduler returns at the steps that the loop ran: the final latents in the form of its result."""
        assert self.first_step is not None
        assert self.final is not None
        result = self.first_step.result
        if isinstance(result, tuple):
            return (self.final, *result[1:])
        return type(result)(**{**result, "prev_sample": self.final})

    def _steps(self) -> None:
        assert self.first_step is not None
        assert self.own is not None
        first_step = self.first_step
        key = tuple(branch.variant for branch in self.branches), tuple(self.weights), self.doubled, self.twice
        if key not in self.states:
            self.states[key] = self._state(first_step)
        state = self.states[key]
        if state.tabled is not self.jumps:
            rows = [[0.0] * len(self.jumps[0].coefficients) for _ in self.called]
            for jump in self.jumps:
                rows[jump.start] = list(jump.coefficients)
            state.table.copy_(table_of(rows, self.own.data))
            state.tabled = self.jumps
        ring = Ring(1)
        ring.add(self.own.data[0], first_step.sample, first_step.output)
        places, values = [state.x, state.ring[0]], [first_step.prev, ring.newest[0]]
        for branch, fixed in zip(self.branches, state.fixed, strict=True):
            places += [compact(tensor) for tensor in fixed.values()]
            values += [compact(branch.call.leaves[i]) for i in fixed]
        copy_all(places, values)
        state.ring[1:].zero_()
        state.noise.zero_()
        state.counter.fill_(self.steps[1])
        step_before = self.moment.step
        for jump in self.jumps[1:]:
            added = drawn(jump.noise, first_step.output, first_step.generator)
            if jump.initial:
                first = first_step.sample.to(state.noise.dtype) * jump.initial
                added = first if added is None else added + first
            if added is not None:
                state.noise.copy_(added)
            elif any(other.noise or other.initial for other in self.jumps):
                state.noise.zero_()
            self._step(jump.start, state)
        self.moment.step, self.moment.branch = step_before, 0
        self.final = state.x.clone()

    def _state(self, first_step: FirstStep) -> State:
        """Returns new places for runs with these calls and this guidance."""
        fixed, changing = [], []
        for call in (branch.call for branch in self.branches):
            held = set(tensor_places(call.leaves)) - call.changing - {call.latents}
            fixed.append({i: expanded_copy(call.leaves[i]) for i in held})
            rows, latest = list[list[Any]](), list[Any]()
            for step, called in enumerate(self.called):
                latest = call.at(step) if called else latest
                rows.append(latest)
            changing.append({i: torch.stack([compact(row[i]) for row in rows]) for i in call.changing})
        device, history = first_step.sample.device, len(self.jumps[0].coefficients) - 1
        counter = torch.zeros(1, dtype=torch.int64, device=device)
        after = dict(zip(self.steps, [*self.steps[1:], self.steps[0]], strict=True))
        following = torch.tensor([after.get(step, 0) for step in range(len(self.called))], device=device)
        noise = torch.zeros_like(first_step.sample, dtype=torch.float32)
        ring = noise.expand(history, *noise.shape).clone()
        table = torch.zeros(len(self.called), 3 + history, dtype=torch.float32, device=device)
        return State(first_step.prev.clone(), ring, counter, following, noise, fixed, changing, len(self.states), table)

    def _step(self, step: int, state: State) -> None:
        def body(_: list[torch.Tensor]) -> None:
            fed, outputs = self._fed(state.x), []
            for number, branch in enumerate(self.branches):
                call, now = branch.call, list(branch.call.leaves)
                for i, tensor in state.fixed[number].items():
                    now[i] = tensor
                for i, values in state.changing[number].items():
                    now[i] = values.index_select(0, state.counter)[0].expand(call.leaves[i].shape)
                now[call.latents] = fed.to(call.leaves[call.latents].dtype)
                self.moment.step, self.moment.branch, self.moment.tabled = step, number, True
                self.moment.forward += 1
                outputs.append(tree_leaves(call.output(now))[0])
            guided = combined(outputs, self.weights, self.doubled, self.sampler.guidance_form, state.noise)
            x, ring = advance(state.table, state.counter, state.x, guided, state.ring, state.noise)
            state.x.copy_(x)
            state.ring.copy_(ring)
            state.counter.copy_(state.following.index_select(0, state.counter))

        positions = [(step, number) for number in range(len(self.branches))]
        self.capture.through(StepsCall(("loop", state.number), positions, [], body, state.counter))


def _latents(result: Any) -> torch.Tensor:
    """Returns the latents in the result of a scheduler."""
    latents: torch.Tensor = result[0] if isinstance(result, tuple) else result.prev_sample
    return latents
