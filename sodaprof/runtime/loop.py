"""The whole-step loop: all steps but the first without the pipeline's Python, guidance and solver in the captured graph.

The pipeline runs its first step itself. What it does with the network's outputs is read off that step: guidance as a weighted
sum of the branches, the solver as a table of coefficients. The other steps then run here, at the pipeline's next call of its
transformer; for the rest of its loop it is handed the last latents. What a pipeline does between steps beside that (a
callback that changes latents, another guidance at some steps) is not seen.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from diffusers.utils.torch_utils import randn_tensor
from torch.utils._pytree import TreeSpec, tree_flatten, tree_leaves, tree_unflatten

from ..errors import UnsupportedModelError
from ..models.clock import Moment
from .capture import Capture
from .packed import expanded_copy, once
from .solvers import Solver, advance, solver_of

NEAR = 1e-4  # relative: what is read off a step must give that step again


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
    memory: torch.Tensor
    counter: torch.Tensor  # int64 [1], the step
    noise: torch.Tensor
    arguments: list[dict[int, torch.Tensor]]  # of each branch: tensors that hold for the run
    moving: list[dict[int, torch.Tensor]]  # of each branch: tensors that change, a row a step
    number: int


class Loop:
    """The steps after the first of a transformer's runs."""

    def __init__(self, moment: Moment, capture: Capture, steps: int, form: str) -> None:
        self.moment, self.capture, self.steps, self.form = moment, capture, steps, form
        self.tables: dict[Any, torch.Tensor] = {}
        self.solver: Solver | None = None  # the schedule holds for these timesteps and settings alone
        self.twice = False  # the transformer is called with the latents twice
        self.branches: list[Branch] = []
        self.states: dict[Any, State] = {}
        self.refused: str | None = None  # why the pipeline runs its own steps
        self.final: torch.Tensor | None = None  # latents after the last step, once they are there
        self.weights: list[float] = []  # of the branches in the guided output
        self.doubled = False  # the solver's sample holds the latents twice
        self.begun: tuple[Any, ...] | None = None

    def reset(self) -> None:
        self.branches, self.final, self.begun = [], None, None

    def begin(self, scheduler: Any, output: Any, sample: Any, result: Any, kwargs: dict[str, Any]) -> None:
        """Reads guidance and solver off the first step, which the pipeline took."""
        self.refused = None
        if not self.branches:  # not yet noted: the next run
            return
        try:
            self.weights, self.doubled = guidance_of(output, [tree_leaves(b.out)[0] for b in self.branches], self.form)
            if (
                kwargs.get("eta")
                or kwargs.get("variance_noise") is not None
                or kwargs.get("per_token_timesteps") is not None
            ):
                raise UnsupportedModelError("the pipeline passes the scheduler more than outputs and a generator")
            self.solver = self.solver or solver_of(scheduler, scheduler.timesteps)
        except UnsupportedModelError as error:
            self.refused = str(error)
            return
        prev = result[0] if isinstance(result, tuple) else result.prev_sample
        self.begun = self.solver, output, sample, prev, kwargs.get("generator"), result

    def wants(self, hidden: torch.Tensor) -> bool:
        """Whether the steps from here on are run here; hidden: the latents that the pipeline calls the transformer with."""
        if self.final is not None:
            return True
        if self.begun is None or self.moment.step != 1 or self.moment.branch:
            return False
        prev = self.begun[3]
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

    def last(self) -> Any:
        """Returns the scheduler's answer at the steps that were taken here: the final latents, as it would hand them over."""
        assert self.begun is not None
        assert self.final is not None
        result = self.begun[5]
        if isinstance(result, tuple):
            return (self.final, *result[1:])
        return type(result)(**{**result, "prev_sample": self.final})

    def _steps(self) -> None:
        assert self.begun is not None
        solver, output, sample, prev, generator, _ = self.begun
        looks = tuple(b.looks for b in self.branches), tuple(self.weights), self.doubled, self.twice
        state = self.states.get(looks)
        if state is None:
            state = self.states[looks] = self._state(output, sample, prev)
        table = self._table(solver, sample.device)
        at_first = torch.zeros_like(state.counter)
        _, memory = advance(table, at_first, sample, output, torch.zeros_like(state.memory), None)
        assert memory is not None
        places, news = [state.x, state.memory], [prev, memory]
        for branch, held in zip(self.branches, state.arguments, strict=True):
            places += [once(tensor) for tensor in held.values()]
            news += [once(branch.leaves[i]) for i in held]
        torch._foreach_copy_(places, news)
        state.counter.fill_(1)
        draws, executed_at = solver.draws, self.moment.step
        for step in range(1, self.steps):
            if draws[step]:
                state.noise.copy_(
                    randn_tensor(output.shape, generator=generator, device=output.device, dtype=output.dtype)
                )
            self._step(step, state, table)
        self.moment.step, self.moment.branch = executed_at, 0
        self.final = state.x.clone()

    def _state(self, output: torch.Tensor, sample: torch.Tensor, prev: torch.Tensor) -> State:
        """Returns places for runs of this kind."""
        arguments, moving = [], []
        for branch in self.branches:
            changing = branch.moving[1]  # at every step the same arguments
            still = [i for i, leaf in enumerate(branch.leaves) if torch.is_tensor(leaf) and i != branch.latents]
            arguments.append({i: expanded_copy(branch.leaves[i]) for i in still if i not in changing})
            rows = {i: [branch.leaves[i], *(branch.moving[s][i] for s in range(1, self.steps))] for i in changing}
            moving.append({i: torch.stack([once(value) for value in values]) for i, values in rows.items()})
        counter = torch.zeros(1, dtype=torch.int64, device=sample.device)
        wide = torch.zeros_like(sample, dtype=torch.float32)
        return State(prev.clone(), wide, counter, torch.zeros_like(output), arguments, moving, len(self.states))

    def _table(self, solver: Solver, device: torch.device) -> torch.Tensor:
        """Returns the coefficients in a place of their own, which graphs may read in later runs, too."""
        new = solver.to(device)
        known = self.tables.setdefault((new.shape, device), new)
        known.copy_(new)
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
            guided = combined(outputs, self.weights, self.doubled, self.form, state.noise)
            x, memory = advance(table, state.counter, state.x, guided, state.memory, state.noise)
            assert memory is not None
            state.x.copy_(x)
            state.memory.copy_(memory)
            state.counter.add_(1).remainder_(self.steps)

        ats = [(step, number) for number in range(len(self.branches))]
        self.capture.through(("loop", state.number), ats, [], body, state.counter)


def guidance_of(output: torch.Tensor, outs: list[torch.Tensor], form: str) -> tuple[list[float], bool]:
    """Returns (weights, doubled): what the scheduler was given is the weighted sum of the branches, once or twice in a batch.

    outs: the network's outputs, one a call; of both branches in one under the form `halves`. UnsupportedModelError where
    it is no such sum.
    """
    parts = _parts(outs, output, form)
    count = parts[0].shape[0]
    doubled = output.shape[0] == 2 * count
    target = output[:count].double()
    if not (doubled or output.shape[0] == count) or (doubled and not torch.equal(output[:count], output[count:])):
        raise UnsupportedModelError(
            f"the scheduler is given {list(output.shape)}, the network returns {list(outs[0].shape)}"
        )
    weights = [1.0]
    if len(parts) == 2:
        one, other = (part.double() for part in parts)
        apart = one - other
        scale = float(
            (target - other).flatten() @ apart.flatten() / (apart.flatten() @ apart.flatten()).clamp_min(1e-300)
        )
        near = round(scale, 4)  # what was typed, most likely
        scale = near if abs(scale - near) < 1e-4 else scale
        weights = [scale, 1 - scale]
    found = sum(part.double() * weight for part, weight in zip(parts, weights, strict=True))
    if len(parts) > 2 or float((found - target).norm()) > NEAR * float(target.norm()):
        raise UnsupportedModelError("the pipeline's guidance is no weighted sum of two branches")
    return weights, doubled


def combined(
    outs: list[torch.Tensor], weights: list[float], doubled: bool, form: str, like: torch.Tensor
) -> torch.Tensor:
    """Returns the guided output, as the scheduler takes it: of the shape of `like`."""
    parts = _parts(outs, like, form)
    guided = parts[0]
    if len(parts) == 2:
        guided = parts[1] + weights[0] * (parts[0] - parts[1])
    return torch.cat([guided, guided]) if doubled else guided


def _parts(outs: list[torch.Tensor], output: torch.Tensor, form: str) -> list[torch.Tensor]:
    """Returns each branch's output, without the channels behind the scheduler's (a learned variance)."""
    parts = list(outs[0].chunk(2)) if form == "halves" else outs
    if parts[0].shape[2:] != output.shape[2:] or parts[0].shape[1] < output.shape[1]:
        raise UnsupportedModelError(
            f"the scheduler is given {list(output.shape)}, the network returns {list(outs[0].shape)}"
        )
    return [part[:, : output.shape[1]] for part in parts]
