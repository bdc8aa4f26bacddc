"""A denoising loop that can continue at any step from any latents: what closed-loop fits and searches run on.

One call of the pipeline is recorded: the arguments of its network at each step, the latents before each step and the guided
outputs that the scheduler received. After that a step needs no pipeline: the network runs on other latents under the
arguments of its step, and guidance is the weighted sum that was read off the recording.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import TreeSpec, tree_flatten, tree_leaves, tree_unflatten

from ..compiler.fit import StateSpace
from ..errors import MismatchError, UnsupportedModelError
from ..formats.sampler import OwnUpdate
from ..formats.sites import Sampler, SiteKey
from .clock import Clock
from .guidance import combined, guidance_of
from .load import OwnCall, call, transformers_of
from .patch import patched
from .probe import as_tokens, main_part
from .recording import all_tapped, latents_of, tapped
from .sampler_steps import own_update
from .stack import block_calls

COORDINATES = 2048  # of a generation that a site's weights are fitted on
WITHOUT = "Compile without --fit; the schedule is then fitted open loop."


@dataclass(frozen=True)
class NetworkCall:
    """The arguments of one call of the network, and which of them the latents are."""

    leaves: list[Any]
    spec: TreeSpec
    latents: int


@dataclass(frozen=True)
class Recording:
    """A plain run of some generations, by its steps."""

    calls: list[list[NetworkCall]]  # [T][branches]
    guidance: list[tuple[list[float], bool]]  # [T], of `guidance_of`
    states: Tensor  # [T + 1, B, …] float32: latents before each step and after the last
    outputs: Tensor  # [T, B, …] float32: guided, as the scheduler received them
    network_rows: int  # rows of the latents in a network call
    guided_shape: tuple[int, ...]  # of a guided output with as many rows as the scheduler's sample


class _Recorder:
    """Takes the place of a pipeline's network and of its scheduler's step, and records their calls."""

    def __init__(self, network: Any, sampler: Sampler, generations: int, on_step: Callable[[], None]) -> None:
        self.network, self.sampler, self.generations, self.on_step = network, sampler, generations, on_step
        self.calls: list[list[NetworkCall]] = []
        self.guidance: list[tuple[list[float], bool]] = []
        self.states: list[Tensor] = []
        self.outputs: list[Tensor] = []
        self.network_rows = 0
        self.guided_shape: tuple[int, ...] = ()
        self._outs: list[Any] = []  # of the step under way

    def call(self, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Runs the network and records its arguments."""
        latents = latents_of(self.network, args, kwargs)
        leaves, spec = tree_flatten((args, kwargs))
        place = next((i for i, leaf in enumerate(leaves) if leaf is latents), None)
        if place is None or not torch.is_tensor(latents):
            raise UnsupportedModelError(
                f"{type(self.network).__name__} takes its latents as a list; closed-loop fits take one tensor. {WITHOUT}"
            )
        out = forward(*args, **kwargs)
        if not self._outs:
            self.calls.append([])
        self.network_rows = latents.shape[0]
        leaves[place] = None
        self.calls[-1].append(NetworkCall(leaves, spec, place))
        self._outs.append(out)
        return out

    def advance(self, take_step: Any, output: Tensor, timestep: Any, sample: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Takes the scheduler's step and records its guidance and its latents."""
        outs = [tree_leaves(out)[0] for out in self._outs]
        self.guidance.append(guidance_of(output, outs, self.sampler.guidance_form, self.sampler.guidance_scale))
        self.guided_shape = (sample.shape[0], *output.shape[1:])
        result = take_step(output, timestep, sample, *args, **kwargs)
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
        self.outputs.append(output[: self.generations].float())
        self._outs = []
        self.on_step()
        return result


def record_run(
    pipe: Any,
    sampler: Sampler,
    entries: Sequence[int | str],
    seeds: Sequence[int],
    on_step: Callable[[], None],
    own: OwnCall | None,
) -> Recording:
    """Returns a plain run of the pipeline; MismatchError if it carries a schedule or runs other timesteps.

    Raises UnsupportedModelError if the pipeline has several transformers, or does more between two steps than guidance and
    its scheduler's step.
    """
    parts = transformers_of(pipe)
    if len(parts) > 1:
        raise UnsupportedModelError(
            f"{type(pipe).__name__} has several transformers ({', '.join(parts)}); closed-loop fits take one. {WITHOUT}"
        )
    if "_sodaprof" in vars(pipe.scheduler):
        raise MismatchError(
            "The pipeline carries a schedule; a run is recorded without one. Remove it: handle.remove()"
        )
    (network,) = parts.values()
    recorder = _Recorder(network, sampler, len(seeds), on_step)
    with tapped(network, recorder.call, "sodaprof.replay"), patched(pipe.scheduler, "step", recorder.advance):
        call(pipe, entries, seeds, sampler.steps, sampler.guidance_scale, output_type="latent", own=own)
    if tuple(pipe.scheduler.timesteps.tolist()) != sampler.timesteps:
        raise MismatchError(
            f"The pipeline runs other timesteps than the profile's {len(sampler.timesteps)}. Profile again."
        )
    return Recording(
        recorder.calls,
        recorder.guidance,
        torch.stack(recorder.states),
        torch.stack(recorder.outputs),
        recorder.network_rows,
        recorder.guided_shape,
    )


class Replay:
    """The denoising loop of some generations at once, by its steps; errors as of `record_run`.

    states [T + 1, B, …]: latents of the plain run before each step and after the last; outputs [T, B, …]: the guided
    outputs that the scheduler received; both float32.
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
        self.recording = record_run(pipe, sampler, entries, seeds, on_step, own)
        self.states, self.outputs = self.recording.states, self.recording.outputs
        (self.module,) = transformers_of(pipe).values()
        self.dtype: torch.dtype = next(self.module.parameters()).dtype
        self.update: OwnUpdate = own_update(pipe.scheduler, pipe.scheduler.timesteps)
        self._stack: dict[tuple[int, str], Tensor] = {}  # step, form -> `through_stack`
        self._sites: dict[int, dict[str, Tensor]] = {}  # step -> `at_sites`
        self._coordinates: dict[int, Tensor] = {}  # elements of a generation -> those of `site_values`

    @property
    def steps(self) -> int:
        return self.sampler.steps

    @torch.no_grad()
    def output(self, step: int, x: Tensor, clock: Clock | None = None) -> Tensor:
        """Returns the guided output [B, …] float32 of the network at a step for latents x.

        clock: that of a schedule on the pipeline, which is set to the step.
        """
        if clock is not None:
            clock.set_step(step)
        weights, doubled = self.recording.guidance[step]
        outs = self._call_network(step, x)
        like = x.new_empty(self.recording.guided_shape)
        return combined(outs, weights, doubled, self.sampler.guidance_form, like)[: x.shape[0]].float()

    @torch.no_grad()
    def through_stack(self, step: int, first: str, last: str, form: str) -> Tensor:
        """Returns what the blocks made of their input at a step of the plain run, guided as the network's outputs are.

        first, last: paths of the blocks. form: `output`, what the last block returned, or `drift`, its difference from what
        the first one received. Costs one step of the plain network; the result is kept. The pipeline must carry no
        schedule. Raises UnsupportedModelError if a block returns more than one tensor.
        """
        if (step, form) in self._stack:
            return self._stack[step, form]
        with block_calls(self.module, {first, last}) as (of_blocks, from_blocks):
            self._call_network(step, self.states[step])
        inputs, outputs = of_blocks[first], from_blocks[last]
        if not all(map(torch.is_tensor, [*inputs, *outputs])):
            raise UnsupportedModelError(
                f"Block {last} returns a {type(outputs[0]).__name__}; only stacks whose blocks return one tensor are skipped."
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
        if step in self._sites:
            return self._sites[step]
        calls: dict[str, list[Tensor]] = {}
        order: Counter[str] = Counter()

        def note(path: str, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            out = forward(*args, **kwargs)
            site = str(SiteKey.parse(path)._replace(call=order[path]))
            order[path] += 1
            if site in layouts:
                calls.setdefault(site, []).append(out)
            return out

        paths = dict.fromkeys(SiteKey.parse(site).path for site in layouts)
        with all_tapped(self.module, paths, note, "sodaprof.sites"):
            self._call_network(step, self.states[step], order.clear)
        self._sites[step] = {site: self.site_values(outs, layouts[site]) for site, outs in calls.items()}
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

    def _call_network(self, step: int, x: Tensor, before: Callable[[], None] = lambda: None) -> list[Tensor]:
        """Returns the network's outputs for latents x and the arguments of a step; before() is called ahead of each call."""
        latents = x.to(self.dtype)
        copies = self.recording.network_rows // latents.shape[0]
        latents = torch.cat([latents] * copies) if copies > 1 else latents
        outs = []
        for recorded in self.recording.calls[step]:
            before()
            leaves = list(recorded.leaves)
            leaves[recorded.latents] = latents
            args, kwargs = tree_unflatten(leaves, recorded.spec)
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

    @property
    def own(self) -> OwnUpdate:  # type: ignore[override]
        return self.replay.update

    def state(self, step: int) -> Tensor:
        return self.replay.states[step]

    def full_output(self, step: int) -> Tensor:
        of_state, of_output = self.own.data[step]
        return of_state * self.replay.states[step] + of_output * self.replay.outputs[step]

    def output(self, step: int, x: Tensor) -> Tensor:
        self.before(step)
        return self.in_basis(step, x, self.replay.output(step, x, self.clock))

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
