"""`scheduler`: a schedule of whole steps as a plain diffusers scheduler, which needs no hooks.

Its steps are those at which the schedule calls the network. From one to the next the latents move by the schedule's updates,
composed into one, with the noise of every step between, so the pictures are those of `apply`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from threading import get_ident
from typing import Any

import diffusers
import torch
from diffusers import ConfigMixin, SchedulerMixin
from diffusers.configuration_utils import FrozenDict
from diffusers.schedulers.scheduling_utils import SchedulerOutput
from torch import Tensor

from ...errors import MismatchError, SodaprofError, UnsupportedModelError
from ...formats.rules import verify
from ...formats.schedule import Schedule
from ...formats.schedule_file import load_schedule
from ...formats.sites import Sampler
from ...opensora.scheduler import RectifiedFlowScheduler
from ...pipelines.sampler_steps import own_update
from .update import Ring, called_steps, check_linear, drawn, jumps, next_dtype

# these scale no input, draw no noise and weigh the outputs themselves
UNSCALED = ("DDIMScheduler", "FlowMatchEulerDiscreteScheduler", "RectifiedFlowScheduler")


def scheduler(schedule: Schedule | str | Path) -> JumpScheduler:
    """Returns a diffusers scheduler that runs a schedule (or the file of one) of whole steps and fitted updates.

    Type `pipe.scheduler = sodaprof.scheduler(schedule)` and call the pipeline with as many steps as the schedule calls the
    network at. Its `config` is that of the sampler which the schedule was made for. Raises UnsupportedModelError for a
    schedule that reuses, forecasts or prunes, for one without an update, and if the sampler's steps are not linear.
    """
    if isinstance(schedule, Schedule):
        verify(schedule)
    else:
        schedule = load_schedule(schedule)
    cells = "".join(plan.stack + "".join(plan.rows.values()) for plan in schedule.transformers.values())
    if others := sorted(set(cells) - set(".C-_")):
        raise UnsupportedModelError(
            f"The schedule holds {others[0]} cells, which work inside the network; a plain scheduler runs whole steps only. "
            "Run it with sodaprof.apply(pipe, schedule), or compile with --policy solver."
        )
    if schedule.update is None:
        raise UnsupportedModelError(
            "The schedule has no update, so it is the sampler itself. Compile one with --policy solver."
        )
    return JumpScheduler(schedule)


class JumpScheduler(SchedulerMixin, ConfigMixin):  # type: ignore[misc]
    """The steps of a schedule that call the network, and the jumps from each to the next."""

    config_name = "scheduler_config.json"
    order = 1
    begin_index = 0

    def __init__(self, schedule: Schedule) -> None:
        sampler, update = schedule.sampler, schedule.update
        assert update is not None
        self._internal_dict = FrozenDict(_config(sampler))
        self.sampler = sampler
        data, noise = [(0.0, 1.0)] * sampler.steps, [0.0] * sampler.steps
        scales, sigmas, self.init_noise_sigma = [1.0] * sampler.steps, list[float](), 1.0
        own = scheduler_of(sampler)
        check_linear(own, update.basis)
        if sampler.class_name == "FlowMatchEulerDiscreteScheduler":
            last = 1.0 if own.config.invert_sigmas else 0.0
            sigmas = [*(t / own.config.num_train_timesteps for t in sampler.timesteps), last]
        if sampler.class_name not in UNSCALED:
            _set_timesteps(own, sampler)
            found = own_update(own, own.timesteps)
            data, noise = list(found.data), list(found.noise)
            self.init_noise_sigma = float(own.init_noise_sigma)
            for step, t in enumerate(own.timesteps):
                if "_step_index" in vars(own):
                    own._step_index = step
                scales[step] = float(own.scale_model_input(torch.ones((), dtype=torch.float64), t))
            if "sigmas" in vars(own):
                sigmas = own.sigmas.tolist()
        self._jumps = jumps(update.coefficients, noise, called_steps(schedule))
        self._data = [data[jump.start] for jump in self._jumps]
        self._scales = [scales[jump.start] for jump in self._jumps]
        self._known = [sampler.timesteps[jump.start] for jump in self._jumps]
        if sigmas:  # some pipelines read them
            self.sigmas = torch.tensor([*(sigmas[jump.start] for jump in self._jumps), sigmas[-1]])
        self._ring = Ring(update.history)
        self.timesteps = torch.tensor(self._known)
        self.num_inference_steps: int | None = None
        self.step_index: int | None = None

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Raises MismatchError for another index than 0: the whole trajectory runs."""
        if begin_index:
            raise MismatchError(
                f"The pipeline begins at step {begin_index}; a fitted schedule runs from its first step. Call it without "
                "strength below 1 or latents to begin from."
            )

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        timesteps: Sequence[float] | None = None,
        sigmas: Sequence[float] | None = None,
        mu: float | None = None,
        height: float | None = None,
        width: float | None = None,
        num_frames: int | None = None,
    ) -> None:
        """Begins a run: `timesteps` are the schedule's, whatever is given; MismatchError for another number of steps."""
        given = next((len(values) for values in (timesteps, sigmas) if values is not None), num_inference_steps)
        count = len(self._known)
        if given != count:
            raise MismatchError(
                f"The schedule calls the network at {count} of its {self.sampler.steps} steps, the pipeline asks for {given}. "
                f"Call it with num_inference_steps={count}."
            )
        self.num_inference_steps, self.step_index, self._ring.newest = count, None, []
        self._thread = get_ident()
        self.timesteps = torch.tensor(self._known, device=device)

    def scale_model_input(self, sample: Tensor, timestep: float | Tensor | None = None) -> Tensor:
        """Returns the latents as the network takes them at the next step."""
        scale = self._scales[min(self.step_index or 0, len(self._scales) - 1)]
        return sample if scale == 1 else sample * scale

    def step(
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        eta: float = 0.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        return_dict: bool = True,
    ) -> SchedulerOutput | tuple[Tensor]:
        """Returns the latents at the next step that calls the network, or the last ones, without a host sync.

        model_output is the guided output, of the sample's shape; eta must be 0; generator draws the sampler's noise.
        """
        step = self.step_index or 0
        if self.num_inference_steps is not None and self._thread != get_ident():
            raise MismatchError(
                "Another call of the pipeline began with this scheduler while this one ran, and took its place. Give each "
                "call that overlaps others a pipeline with a scheduler of its own: copy.deepcopy(pipe.scheduler)"
            )
        if self.num_inference_steps is None or step == len(self._jumps):
            raise SodaprofError("There is no step to take: call set_timesteps first, once before each run.")
        on_host = not torch.is_tensor(timestep) or timestep.device.type == "cpu"
        if on_host and float(timestep) != float(self._known[step]):
            raise MismatchError(
                f"Step {step} is at timestep {self._known[step]:g}, the pipeline is at {float(timestep):g}. Run the whole "
                "trajectory: no strength below 1, nothing that leaves steps out."
            )
        if eta or model_output.shape != sample.shape:
            raise UnsupportedModelError(
                f"A fitted schedule is for eta 0 and outputs of the latents' shape; found eta={eta}, an output "
                f"{list(model_output.shape)} for {list(sample.shape)}. Call the pipeline without eta, or take another scheduler."
            )
        jump = self._jumps[step]
        self._ring.add(self._data[step], sample, model_output)
        noise = drawn(jump.noise, model_output, generator)
        moved = self._ring.moved(jump.coefficients, sample, noise, next_dtype(self.sampler.class_name, sample))
        self.step_index = step + 1
        return SchedulerOutput(prev_sample=moved) if return_dict else (moved,)

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        """Raises UnsupportedModelError: the file of a fitted schedule is the schedule."""
        raise UnsupportedModelError(
            "A fitted schedule is kept in its own file, not in a pipeline's folder. Put the sampler back before saving: "
            "pipe.scheduler = SamplerClass.from_config(pipe.scheduler.config); or ship the schedule: sodaprof ship"
        )

    def __len__(self) -> int:
        return int(self.config.get("num_train_timesteps", self.sampler.steps))


def _config(sampler: Sampler) -> dict[str, Any]:
    """Returns the sampler's configuration, with infinities, which are text in files, as numbers."""
    return {k: float(v) if v in ("inf", "-inf") else v for k, v in sampler.config.items()}


def scheduler_of(sampler: Sampler) -> Any:
    """Returns the scheduler that a schedule or a profile was made for; UnsupportedModelError if diffusers has none."""
    known = {"RectifiedFlowScheduler": RectifiedFlowScheduler}
    cls = known.get(sampler.class_name) or getattr(diffusers, sampler.class_name, None)
    if cls is None:
        raise UnsupportedModelError(f"diffusers {diffusers.__version__} has no {sampler.class_name}. Upgrade it.")
    return cls.from_config(_config(sampler))


def _set_timesteps(own: Any, sampler: Sampler) -> None:
    """Sets the schedule's timesteps; UnsupportedModelError if they do not follow from their number."""
    own.set_timesteps(sampler.steps)
    if tuple(own.timesteps.tolist()) != sampler.timesteps:
        raise UnsupportedModelError(
            f"The schedule's {sampler.steps} timesteps are not those that {sampler.class_name} sets for as many steps "
            "(the pipeline asked for timesteps, sigmas or mu of its own), so its noise or data predictions are not known "
            "here. Run it with sodaprof.apply(pipe, schedule)."
        )
