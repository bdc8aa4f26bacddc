"""A denoising loop that can continue at any step from any latents: what closed-loop fits and searches run on.

One call of the pipeline is recorded: the arguments of its network at each step, the latents before each step and the guided
outputs that the scheduler received. After that a step needs no pipeline, only the network and the weights of its guidance.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten

from ..compiler.fit import StateSpace
from ..errors import MismatchError, UnsupportedModelError
from ..formats.data_basis import FLOWS, in_data_basis
from ..formats.sampler import OwnUpdate
from ..formats.sites import Sampler, SiteKey
from .clock import Clock
from .guidance import combined, guidance_of
from .load import OwnCall, call, transformers_of
from .patch import patched
from .probe import Args, Forward, Kwargs, as_tokens, main_part
from .recording import check_no_schedule, latents_of, recorded_calls, tapped
from .sampler_steps import own_update

COORDINATES = 2048  # of a generation that a site's weights are fitted on
LATENTS = object()  # in recorded arguments, in place of the latents
WITHOUT = "Compile without --fit; the schedule is then fitted open loop."


class Recording:
    """A plain run of some generations, by its steps; takes the place of the network and of the scheduler's step."""

    def __init__(self, network: Any, sampler: Sampler, generations: int, on_step: Callable[[], None]) -> None:
        self.network, self.sampler, self.generations, self.on_step = network, sampler, generations, on_step
        self.calls: list[list[tuple[Args, Kwargs]]] = []  # [T][branches]
        self.guidance: list[tuple[list[float], bool]] = []  # [T], of `guidance_of`
        self.states: list[Tensor] = []  # [T + 1] of [B, …] float32: latents before each step and after the last
        self.outputs: list[Tensor] = []  # [T] of [B, …] float32: guided, as the scheduler received them
        self.network_rows = 0  # rows of the latents in a network call
        self.guided_shape: tuple[int, ...] = ()  # of a guided output with as many rows as the scheduler's sample
        self._outs: list[Tensor] = []  # of the network at the current step

    def call(self, forward: Forward, args: Args, kwargs: Kwargs) -> Any:
        """Runs the network and records its arguments."""
        latents = latents_of(self.network, args, kwargs)
        if not torch.is_tensor(latents):
            raise UnsupportedModelError(
                f"{type(self.network).__name__} takes its latents as a list; closed-loop fits take one tensor. {WITHOUT}"
            )
        out = forward(*args, **kwargs)
        if not self._outs:
            self.calls.append([])
        self.network_rows = latents.shape[0]
        self.calls[-1].append(tree_map(lambda leaf: LATENTS if leaf is latents else leaf, (args, kwargs)))
        self._outs.append(tree_leaves(out)[0])
        return out

    def advance(
        self, take_step: Any, model_output: Tensor, timestep: Any, sample: Tensor, *args: Any, **kwargs: Any
    ) -> Any:
        """Takes the scheduler's step and records its guidance and its latents."""
        form, scale = self.sampler.guidance_form, self.sampler.guidance_scale
        self.guidance.append(guidance_of(model_output, self._outs, form, scale))
        self.guided_shape = (sample.shape[0], *model_output.shape[1:])
        result = take_step(model_output, timestep, sample, *args, **kwargs)
        after = result[0] if isinstance(result, tuple) else result.prev_sample
        before = sample[: self.generations].float()
        if not self.states:
            self.states.append(before)
        elif not torch.equal(self.states[-1], before):
            raise UnsupportedModelError(
                "The pipeline changes the latents between two steps; closed-loop fits take pipelines that leave them to the "
                f"scheduler. {WITHOUT}"
            )
        self.states.append(after[: self.generations].float())
        self.outputs.append(model_output[: self.generations].float())
        self._outs = []
        self.on_step()
        return result


@dataclass(frozen=True)
class TimeMap:
    """How a pipeline makes an argument of its network from a timestep t: origin + slope · t, cast to the argument's dtype."""

    origin: Tensor
    slope: Tensor
    dtype: torch.dtype

    def __call__(self, time: Tensor | float) -> Tensor:
        return (self.origin + self.slope * time).to(self.dtype)


def time_maps(
    calls: Sequence[Sequence[tuple[Args, Kwargs]]], timesteps: Sequence[float]
) -> list[dict[int, TimeMap]] | None:
    """Returns for each branch the maps of the arguments that are linear in the timestep, by their places.

    None if there are none, or an argument that changes from step to step is not linear in it at every step.
    """
    leaves = [[tree_leaves(recorded) for recorded in branches] for branches in calls]
    if len({len(branches) for branches in leaves}) != 1 or len(calls) < 2:
        return None
    found: list[dict[int, TimeMap]] = []
    for branch in range(len(leaves[0])):
        found.append({})
        for place, arguments in enumerate(zip(*(of_step[branch] for of_step in leaves), strict=True)):
            if not torch.is_tensor(arguments[0]) or all(torch.equal(arguments[0], other) for other in arguments[1:]):
                continue
            if len({argument.shape for argument in arguments}) != 1:
                return None
            first, *_, last = (argument.double() for argument in arguments)
            slope = (last - first) / (timesteps[-1] - timesteps[0])
            dtype = arguments[0].dtype if arguments[0].is_floating_point() else torch.float32
            one = TimeMap(first - slope * timesteps[0], slope, dtype)
            rounding = 2 * torch.finfo(dtype).eps
            for argument, timestep in zip(arguments, timesteps, strict=True):
                if not torch.allclose(one(timestep).double(), argument.double(), rtol=rounding, atol=rounding):
                    return None
            found[-1][place] = one
    return found if all(found) else None


class Replay:
    """The denoising loop of some generations at once, by its steps.

    states [T + 1, B, …]: latents of the plain run before each step and after the last; outputs [T, B, …]: the guided
    outputs that the scheduler received; both float32.

    Raises MismatchError if the pipeline carries a schedule or runs other timesteps, UnsupportedModelError if it has several
    transformers, or does more between two steps than guidance and its scheduler's step.
    """

    def __init__(
        self,
        pipe: Any,
        sampler: Sampler,
        entries: Sequence[int | str],
        seeds: Sequence[int],
        on_step: Callable[[], None] = lambda: None,
        own: OwnCall | None = None,
    ) -> None:
        self.pipe, self.sampler, self.seeds = pipe, sampler, list(seeds)
        parts = transformers_of(pipe)
        if len(parts) > 1:
            raise UnsupportedModelError(
                f"{type(pipe).__name__} has several transformers ({', '.join(parts)}); closed-loop fits take one. {WITHOUT}"
            )
        check_no_schedule(pipe)
        (self.module,) = parts.values()
        self.recording = run = Recording(self.module, sampler, len(seeds), on_step)
        with tapped(self.module, run.call, "sodaprof.replay"), patched(pipe.scheduler, "step", run.advance):
            call(pipe, entries, seeds, sampler.steps, sampler.guidance_scale, output_type="latent", own=own)
        if tuple(pipe.scheduler.timesteps.tolist()) != sampler.timesteps:
            raise MismatchError(f"The pipeline runs other timesteps than the profile's {sampler.steps}. Profile again.")
        self.states, self.outputs = torch.stack(run.states), torch.stack(run.outputs)
        self.update: OwnUpdate = own_update(pipe.scheduler, pipe.scheduler.timesteps)
        self.time_maps = time_maps(run.calls, sampler.timesteps)
        self._stack: dict[tuple[int, str], Tensor] = {}  # step, form -> `through_stack`
        self._sites: dict[int, dict[str, Tensor]] = {}  # step -> `at_sites`
        self._coordinates: dict[int, Tensor] = {}  # elements of a generation -> those of `site_values`

    @property
    def steps(self) -> int:
        return self.sampler.steps

    def output(self, step: int, x: Tensor, clock: Clock | None = None, time: Tensor | float | None = None) -> Tensor:
        """Returns the guided output [B, …] float32 of the network at a step for latents x.

        clock: that of a schedule on the pipeline, which is set to the step. time: that the network receives, in the
        scheduler's units, by default the step's own. Differentiable if x requires gradients.
        """
        if clock is not None:
            clock.set_step(step)
        weights, doubled = self.recording.guidance[step]
        with torch.set_grad_enabled(x.requires_grad):
            outs = self._call_network(step, x, time)
            like = x.new_empty(self.recording.guided_shape)
            return combined(outs, weights, doubled, self.sampler.guidance_form, like)[: x.shape[0]].float()

    @torch.no_grad()
    def through_stack(self, step: int, first: str, last: str, form: str) -> Tensor:
        """Returns what the blocks made of their input at a step of the plain run, guided as the network's outputs are.

        first, last: paths of the blocks. form: `output`, what the last block returned, or `drift`, its difference from what
        the first one received. Costs one step of the plain network; the result is kept. The pipeline must carry no
        schedule. Raises UnsupportedModelError if a block returns more than one tensor.
        """
        if (step, form) not in self._stack:
            with recorded_calls(self.module, {first, last}, [first]) as (found, received):
                self._call_network(step, self.states[step])
            inputs, outputs = received[first], found[last]
            if not all(map(torch.is_tensor, [*inputs, *outputs])):
                raise UnsupportedModelError(
                    f"Block {last} returns a {type(outputs[0]).__name__}; only stacks whose blocks return one tensor are "
                    "skipped."
                )
            if form == "drift":
                outputs = [after - before for before, after in zip(inputs, outputs, strict=True)]
            self._stack[step, form] = self.guided(step, outputs)
        return self._stack[step, form]

    @torch.no_grad()
    def at_sites(self, step: int, layouts: Mapping[str, str]) -> dict[str, Tensor]:
        """Returns the outputs of sites at a step of the plain run, as `site_values` returns them: {site: values}.

        layouts: of the sites' outputs (`Plan.layout`). Costs one step of the plain network; the results are kept. The
        pipeline must carry no schedule.
        """
        if step not in self._sites:
            keys = {site: SiteKey.parse(site) for site in layouts}
            with recorded_calls(self.module, {key.path for key in keys.values()}) as (outputs, _):
                outs = self._call_network(step, self.states[step])
            values = {}
            for site, key in keys.items():
                of_module = outputs[key.path]
                values[site] = self.site_values(of_module[key.call :: len(of_module) // len(outs)], layouts[site])
            self._sites[step] = values
        return self._sites[step]

    def site_values(self, calls: Sequence[Any], layout: str) -> Tensor:
        """Returns a site's outputs, one a call of the network, at a fixed random sample of a generation's coordinates.

        [calls · rows of a call, n], n at most COORDINATES. Of a tuple, which joint attention returns, the first part. The
        branches stay separate: guidance would weigh their difference, which later layers do not receive.
        """
        whole = torch.cat([as_tokens(main_part(out), layout).reshape(self.recording.network_rows, -1) for out in calls])
        size = whole.shape[1]
        if size <= COORDINATES:
            return whole.float()
        if size not in self._coordinates:
            some = np.random.default_rng(0).choice(size, COORDINATES, replace=False)
            self._coordinates[size] = torch.from_numpy(np.sort(some)).to(whole.device)
        return whole.index_select(1, self._coordinates[size]).float()

    def guided(self, step: int, calls: Sequence[Tensor]) -> Tensor:
        """Returns the guided sum at a step of any tensors that the network's calls produced."""
        parts = calls[0].chunk(2) if self.sampler.guidance_form == "halves" else calls
        weights, _ = self.recording.guidance[step]
        return torch.stack([part * weight for part, weight in zip(parts, weights, strict=True)]).sum(0)

    def _call_network(self, step: int, x: Tensor, time: Tensor | float | None = None) -> list[Tensor]:
        """Returns the network's outputs for latents x and the arguments of a step, at another time if one is given."""
        if time is not None and self.time_maps is None:
            raise UnsupportedModelError(
                f"{type(self.module).__name__} is called with no argument that is linear in the timestep, so a schedule with "
                "network times cannot be continued. Begin with one that has none, of compile."
            )
        latents = x.to(next(self.module.parameters()).dtype)
        copies = self.recording.network_rows // latents.shape[0]
        latents = torch.cat([latents] * copies) if copies > 1 else latents
        outs = []
        for branch, recorded in enumerate(self.recording.calls[step]):
            leaves, spec = tree_flatten(recorded)
            if time is not None and self.time_maps is not None:
                for place, at in self.time_maps[branch].items():
                    leaves[place] = at(time)
            args, kwargs = tree_unflatten([latents if leaf is LATENTS else leaf for leaf in leaves], spec)
            outs.append(tree_leaves(self.module(*args, **kwargs))[0])
        return outs


@dataclass(frozen=True)
class ReplaySpace(StateSpace[Tensor]):
    """Latents and outputs of a replay, [B, …], for the fit of an update.

    clock: that of a schedule on the pipeline. before: called with a step ahead of its network call.
    """

    replay: Replay
    clock: Clock | None = None
    before: Callable[[int], None] = lambda step: None
    basis: str | None = None  # by default the sampler's own

    @cached_property
    def own(self) -> OwnUpdate:  # type: ignore[override]
        own = self.replay.update
        return in_data_basis(own, self.replay.sampler.class_name in FLOWS) if self.basis == "data" else own

    def state(self, step: int) -> Tensor:
        return self.replay.states[step]

    def full_output(self, step: int) -> Tensor:
        return self.in_basis(step, self.replay.states[step], self.replay.outputs[step])

    def output(self, step: int, x: Tensor, time: Tensor | float | None = None) -> Tensor:
        self.before(step)
        return self.in_basis(step, x, self.replay.output(step, x, self.clock, time))

    def in_basis(self, step: int, x: Tensor, output: Tensor) -> Tensor:
        """Returns a guided output at a step in the basis of the update."""
        of_state, of_output = self.own.data[step]
        return of_state * x + of_output * output if of_state else of_output * output

    def inner(self, vectors: Sequence[Tensor], target: Tensor) -> tuple[np.ndarray, np.ndarray]:
        flat = torch.stack([*vectors, target]).flatten(1).double()
        products = (flat @ flat.T).cpu().numpy()
        return products[:-1, :-1], products[:-1, -1]

    def weighted(self, weights: Sequence[float], vectors: Sequence[Tensor]) -> Tensor:
        row = torch.tensor(weights, dtype=torch.float32, device=vectors[0].device)
        return torch.tensordot(row, torch.stack(list(vectors)), 1)
