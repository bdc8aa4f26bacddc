"""A denoising loop that can be taken up at any step from any latents: what closed-loop fits and searches run on.

One call of the pipeline is recorded: the arguments of its network at each step, the latents before each step and the guided
outputs as the scheduler was given them. After that a step needs no pipeline: the network runs on other latents under the
arguments of its step, and guidance is the weighted sum that was read off the recording.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
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
from .probe import as_tokens, hidden_states, main_part
from .recording import latents_of, stepping, tapped
from .sampler_steps import own_update

COORDINATES = 2048  # of a generation that a site's weights are fitted on
WITHOUT = "Compile without --fit; the schedule is then fitted open loop."


@dataclass(frozen=True)
class Call:
    """One call of the network: its arguments, and which of them the latents are."""

    leaves: list[Any]
    spec: TreeSpec
    latents: int


class Replay:
    """The denoising loop of some generations at once, by its steps.

    states [T + 1, B, …]: latents of the plain run before each step and after the last; outputs [T, B, …]: the guided
    outputs that the scheduler was given; both float32. Raises UnsupportedModelError where the pipeline does more between two
    steps than guidance and its scheduler's.
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
        self.module = next(iter(parts.values()))
        if "_sodaprof" in vars(pipe.scheduler):
            raise MismatchError("The pipeline carries a schedule; it is recorded plain. Take it off: handle.remove()")
        self.calls: list[list[Call]] = []  # [T][branches]
        self._outs: list[Any] = []  # of the step under way
        self._weights: list[tuple[list[float], bool]] = []  # guidance, by step
        self._stack: dict[tuple[int, str], torch.Tensor] = {}  # step, form -> `through_stack`
        self._sites: dict[int, dict[str, torch.Tensor]] = {}  # step -> `at_sites`
        self._coordinates: dict[int, torch.Tensor] = {}  # elements of a generation -> those of `site_values`
        states: list[torch.Tensor] = []
        outputs: list[torch.Tensor] = []
        take_step = pipe.scheduler.step

        def advance(output: torch.Tensor, timestep: Any, sample: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            leaves = [tree_leaves(out)[0] for out in self._outs]
            self._weights.append(guidance_of(output, leaves, sampler.guidance_form, sampler.guidance_scale))
            self._like, self._twice = output[:0], sample.shape[0]
            result = take_step(output, timestep, sample, *args, **kwargs)
            after = result[0] if isinstance(result, tuple) else result.prev_sample
            count = len(seeds)
            if not states:
                states.append(sample[:count].float())
            elif not torch.equal(states[-1], sample[:count].float()):
                raise UnsupportedModelError(
                    f"{type(pipe).__name__} changes the latents between two steps; closed-loop fits take pipelines that leave "
                    f"them to the scheduler. {WITHOUT}"
                )
            states.append(after[:count].float())
            outputs.append(output[:count].float())
            self._outs = []
            on_step()
            return result

        def note(forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            given = latents_of(self.module, args, kwargs)
            leaves, spec = tree_flatten((args, kwargs))
            at = next((i for i, leaf in enumerate(leaves) if leaf is given), None)
            if at is None or not torch.is_tensor(given):
                raise UnsupportedModelError(
                    f"{type(pipe).__name__} hands its latents to the network as a list; closed-loop fits take one tensor. "
                    f"{WITHOUT}"
                )
            out = forward(*args, **kwargs)
            if not self._outs:
                self.calls.append([])
            self._fed = given.shape[0]
            self.calls[-1].append(Call([leaf if i != at else None for i, leaf in enumerate(leaves)], spec, at))
            self._outs.append(out)
            return out

        with ExitStack() as stack:
            stack.enter_context(tapped(self.module, note, "sodaprof.replay"))
            stack.enter_context(stepping(pipe.scheduler, advance))
            call(pipe, entries, seeds, sampler.steps, sampler.guidance_scale, output_type="latent", own=own)
        if tuple(pipe.scheduler.timesteps.tolist()) != sampler.timesteps:
            raise MismatchError(
                f"The pipeline runs other timesteps than the profile's {len(sampler.timesteps)}. Profile again."
            )
        self.states, self.outputs = torch.stack(states), torch.stack(outputs)
        self.dtype: torch.dtype = next(self.module.parameters()).dtype
        self.update: OwnUpdate = own_update(pipe.scheduler, pipe.scheduler.timesteps)

    @property
    def steps(self) -> int:
        return self.sampler.steps

    @torch.no_grad()
    def output(self, step: int, x: torch.Tensor, clock: Clock | None = None) -> torch.Tensor:
        """Returns the guided output [B, …] float32 of the network at a step for latents x.

        clock: that of a schedule on the pipeline, which is set to the step.
        """
        if clock is not None:
            clock.step, clock.branches, clock.begins = step, 0, step == 0
        weights, doubled = self._weights[step]
        outs = self._called(step, x)
        like = x.new_empty((self._twice, *self._like.shape[1:]))
        return combined(outs, weights, doubled, self.sampler.guidance_form, like)[: x.shape[0]].float()

    @torch.no_grad()
    def through_stack(self, step: int, first: str, last: str, form: str) -> torch.Tensor:
        """Returns what the blocks made of their input at a step of the plain run, guided as the network's outputs are.

        first, last: paths of the blocks. form: `output`, what the last block returned, or `drift`, that less what the first
        one was given. Costs one step of the plain network, the first time; the answer is kept. The pipeline must carry no
        schedule. Raises UnsupportedModelError where a block hands on more than one tensor.
        """
        if (step, form) not in self._stack:
            entries, outs = list[Any](), list[Any]()

            def enter(forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
                entries.append(hidden_states(args, kwargs))
                return forward(*args, **kwargs)

            def leave(forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
                outs.append(forward(*args, **kwargs))
                return outs[-1]

            with (
                tapped(self.module.get_submodule(first), enter, "sodaprof.entry"),
                tapped(self.module.get_submodule(last), leave, "sodaprof.exit"),
            ):
                self._called(step, self.states[step])
            if not all(map(torch.is_tensor, [*entries, *outs])):
                raise UnsupportedModelError(
                    f"Block {last} returns a {type(outs[0]).__name__}; stacks are skipped whose blocks hand on one tensor."
                )
            if form == "drift":
                outs = [out - entry for entry, out in zip(entries, outs, strict=True)]
            self._stack[step, form] = self.guided(step, outs)
        return self._stack[step, form]

    @torch.no_grad()
    def at_sites(self, step: int, layouts: Mapping[str, str]) -> dict[str, torch.Tensor]:
        """Returns what sites gave at a step of the plain run, as `site_values` has them: {site: values}.

        layouts: of the sites' outputs (`Plan.layout`). Costs one step of the plain network, the first time; the answers are
        kept. The pipeline must carry no schedule.
        """
        if step not in self._sites:
            calls: dict[str, list[torch.Tensor]] = {}
            paths = dict.fromkeys(SiteKey.parse(site).path for site in layouts)
            order: Counter[str] = Counter()

            def hear(path: str) -> Callable[..., Any]:
                def tap(forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
                    out = forward(*args, **kwargs)
                    site = str(SiteKey.parse(path)._replace(call=order[path]))
                    order[path] += 1
                    if site in layouts:
                        calls.setdefault(site, []).append(out)
                    return out

                return tap

            with ExitStack() as stack:
                for path in paths:
                    stack.enter_context(tapped(self.module.get_submodule(path), hear(path), "sodaprof.sites"))
                self._called(step, self.states[step], order.clear)
            self._sites[step] = {site: self.site_values(outs, layouts[site]) for site, outs in calls.items()}
        return self._sites[step]

    def site_values(self, calls: Sequence[Any], layout: str) -> torch.Tensor:
        """Returns a site's outputs, one a call of the network, at a fixed random sample of a generation's coordinates.

        [calls · rows of a call, n], n at most COORDINATES. Of a tuple, what joint attention returns, its first part. The
        branches side by side: guidance would weigh what they differ in, of which later layers know nothing.
        """
        whole = torch.cat([as_tokens(main_part(out), layout).reshape(self._fed, -1) for out in calls])
        size = whole.shape[1]
        if size <= COORDINATES:
            return whole.float()
        if size not in self._coordinates:
            some = np.random.default_rng(0).choice(size, COORDINATES, replace=False)
            self._coordinates[size] = torch.from_numpy(np.sort(some)).to(whole.device)
        return whole.index_select(1, self._coordinates[size]).float()

    def guided(self, step: int, calls: Sequence[torch.Tensor]) -> torch.Tensor:
        """Returns the sum of the branches that guidance takes at a step, of any tensors that the network's calls gave."""
        parts = calls[0].chunk(2) if self.sampler.guidance_form == "halves" else calls
        weights, _ = self._weights[step]
        return torch.stack([part * weight for part, weight in zip(parts, weights, strict=True)]).sum(0)

    def _called(self, step: int, x: torch.Tensor, before: Callable[[], None] = lambda: None) -> list[torch.Tensor]:
        """Returns the network's outputs for latents x under the arguments of a step, one a call; before: called ahead of each."""
        outs = []
        for one in self.calls[step]:
            before()
            leaves = list(one.leaves)
            fed = x.to(self.dtype)
            leaves[one.latents] = torch.cat([fed] * (self._fed // fed.shape[0])) if self._fed > fed.shape[0] else fed
            args, kwargs = tree_unflatten(leaves, one.spec)
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
