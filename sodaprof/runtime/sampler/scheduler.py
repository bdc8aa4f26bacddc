"""`scheduler`: a schedule of whole steps as a plain diffusers scheduler, which needs no hooks.

Its steps are those at which the schedule calls the network. From one to the next the latents move by the schedule's updates,
composed into one, with the noise of every step between, so the pictures are those of `apply`.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from diffusers import ConfigMixin, SchedulerMixin
from diffusers.schedulers.scheduling_utils import SchedulerOutput
from torch import Tensor

from ...errors import FormatError, MismatchError, SodaprofError, UnsupportedModelError
from ...formats.data_basis import FLOWS
from ...formats.rules import verify
from ...formats.schedule import Schedule
from ...formats.schedule_file import load_schedule, schedule_from_json, schedule_to_json
from ...formats.sites import Sampler
from ...opensora.scheduler import RectifiedFlowScheduler
from ...pipelines.runs import Caller
from ...pipelines.sampler_steps import basis_of, own_update
from .update import Ring, at_own_timesteps, called_steps, check_linear, drawn, jumps, next_dtype

# these scale no input, draw no noise and weigh the outputs themselves
UNSCALED = ("DDIMScheduler", "FlowMatchEulerDiscreteScheduler", "RectifiedFlowScheduler")
# what a pipeline may read of the sampler itself, on all of its steps
OF_SAMPLER = ("betas", "alphas", "alphas_cumprod")
NOISED = ("add_noise", "scale_noise", "get_velocity")  # the sampler's methods, at its own timesteps
WHOLE = "Run the whole trajectory: strength=1, and nothing that leaves steps out."
ROUNDED = 2e-3  # of sigmas: some pipelines pass whole timesteps of 1000, others begin at 0.999


def scheduler(schedule: Schedule | str | Path, *, allow_resolution: bool = False) -> JumpScheduler:
    """Returns a diffusers scheduler that runs a schedule (or the file of one) of whole steps and fitted updates.

    Type `pipe.scheduler = sodaprof.scheduler(schedule)` and call the pipeline with as many steps as the schedule calls the
    network at. `pipe.save_pretrained` writes the schedule, too. Its `config` is that of the sampler which the schedule was
    made for: `SamplerClass.from_config` makes that sampler of it. allow_resolution: run at other sizes of the latents than
    profiled, too.

    Raises UnsupportedModelError for a schedule that reuses, forecasts or prunes, for one without an update, and if the
    sampler's steps are not linear.
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
    return JumpScheduler(schedule, allow_resolution)


class JumpScheduler(SchedulerMixin, ConfigMixin):  # type: ignore[misc]
    """The steps of a schedule that call the network, and the jumps from each to the next; `scheduler` makes it.

    The config is the sampler's, and under a private key, which other schedulers pass over, the content of schedule.json.
    """

    __module__ = "sodaprof"  # as model_index.json names it
    config_name = "scheduler_config.json"
    order = 1
    begin_index = 0

    def __init__(self, schedule: Schedule, allow_resolution: bool = False) -> None:
        sampler, update = schedule.sampler, schedule.update
        assert update is not None
        kept = {"_class_name": type(self).__name__, "_schedule": schedule_to_json(schedule)}
        self.register_to_config(**_config(sampler), **kept, _allow_resolution=allow_resolution)
        self.sampler = sampler
        self._latent = None if allow_resolution else schedule.shape["latent"]
        data, noise = [(0.0, 1.0)] * sampler.steps, [0.0] * sampler.steps
        scales, sigmas, self.init_noise_sigma = [1.0] * sampler.steps, list[float](), 1.0
        own = self._own = scheduler_of(sampler)
        check_linear(own, update.basis)
        if sampler.class_name == "FlowMatchEulerDiscreteScheduler":
            last = 1.0 if own.config.invert_sigmas else 0.0
            sigmas = [*(t / own.config.num_train_timesteps for t in sampler.timesteps), last]
            own.timesteps, own.sigmas = torch.tensor(sampler.timesteps), torch.tensor(sigmas)
        if sampler.class_name == "RectifiedFlowScheduler":
            own.timesteps = torch.tensor(sampler.timesteps)
        if sampler.class_name not in UNSCALED or update.basis != basis_of(own):
            if sampler.class_name not in FLOWS:
                _set_timesteps(own, sampler)
            found = own_update(own, own.timesteps, update.basis)
            data, noise = list(found.data), list(found.noise)
        if sampler.class_name not in UNSCALED:
            self.init_noise_sigma = float(own.init_noise_sigma)
            for step, t in enumerate(own.timesteps):
                if "_step_index" in vars(own):
                    own._step_index = step
                scales[step] = float(own.scale_model_input(torch.ones((), dtype=torch.float64), t))
            if "_step_index" in vars(own):
                own._step_index = None
            if "sigmas" in vars(own):
                sigmas = own.sigmas.tolist()
        self._jumps = jumps(update.coefficients, noise, called_steps(schedule), update.initial)
        self._data = [data[jump.start] for jump in self._jumps]
        self._scales = [scales[jump.start] for jump in self._jumps]
        times = torch.tensor([schedule.times[jump.start] for jump in self._jumps])
        self._known = times.tolist()  # as the pipeline passes them on
        self._timed = schedule.times != sampler.timesteps
        if sigmas:  # some pipelines read them
            self.sigmas = torch.tensor([*(sigmas[jump.start] for jump in self._jumps), sigmas[-1]])
        self._ring = Ring(update.history, any(jump.initial for jump in self._jumps))
        self.timesteps = times
        self.num_inference_steps: int | None = None
        self.step_index: int | None = None
        self._caller: Caller | None = None  # of the run

    @classmethod
    def from_config(cls, config: Any = None, return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """Returns the scheduler whose config this is; FormatError if it holds no schedule.

        MismatchError for a setting of the sampler that is not the schedule's.
        """
        if not isinstance(config, Mapping) or "_schedule" not in config:
            raise FormatError(
                "The config holds no schedule, so no JumpScheduler can be made of it. Type: sodaprof.scheduler(schedule)"
            )
        found = scheduler(
            schedule_from_json(config["_schedule"], f"{cls.config_name}: _schedule"),
            allow_resolution=config.get("_allow_resolution") is True,
        )
        own = config if config.get("_class_name") == cls.__name__ else {}  # other samplers set some to values of theirs
        for key, value in {**own, **kwargs}.items():
            if key[0] != "_" and key in found.config and _plain(value) != _plain(found.config[key]):
                raise MismatchError(
                    f"The schedule was made for {key}={found.config[key]!r}, found {value!r}. Leave {key} as it is, or profile "
                    "and compile anew."
                )
        others = {*config} - {*found.config, "_use_default_values"}  # settings of other samplers, which diffusers keeps
        found.register_to_config(**{key: config[key] for key in sorted(others)})
        return (found, kwargs) if return_unused_kwargs else found

    @property
    def compatibles(self) -> list[type]:
        """The classes that can be made of the config: those of the sampler."""
        return list(self._own.compatibles)

    def __getattr__(self, name: str) -> Any:
        if name in OF_SAMPLER + NOISED and "_own" in vars(self):
            found = getattr(self._own, name)
            if name in OF_SAMPLER or not self._timed:
                return found
            own = [self.sampler.timesteps[jump.start] for jump in self._jumps]
            return partial(at_own_timesteps, found, self._known, own)
        return super().__getattr__(name)

    def index_for_timestep(self, timestep: float | Tensor, schedule_timesteps: Tensor | None = None) -> int:
        """Returns the index of a timestep, of two equal ones the second; MismatchError if there is none."""
        known = self.timesteps if schedule_timesteps is None else schedule_timesteps
        if not len(found := (known == timestep).nonzero()):
            raise MismatchError(f"The schedule does not call the network at timestep {float(timestep):g}. {WHOLE}")
        return int(found[:2][-1])

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Raises MismatchError for another index than 0: the whole trajectory runs."""
        if begin_index:
            raise MismatchError(
                f"The pipeline begins at step {begin_index}; a fitted schedule runs from its first step. {WHOLE}"
            )

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_caller": None}  # a copy may be stepped by anybody

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
        """Begins a run: `timesteps` become the schedule's. MismatchError for another number of steps, and for own sigmas.

        timesteps and sigmas are accepted if they are those that pipelines pass for this number of steps when their caller
        gives none, and then have no effect; nor have mu and the size, of which pipelines compute the shift.
        """
        given = next((len(values) for values in (timesteps, sigmas) if values is not None), num_inference_steps)
        count = len(self._known)
        if given != count:
            raise MismatchError(
                f"The schedule calls the network at {count} of its {self.sampler.steps} steps, the pipeline asks for {given}. "
                f"Call it with num_inference_steps={count}."
            )
        for name, values, unit in (("timesteps", timesteps, self._trained), ("sigmas", sigmas, 1.0)):
            if values is not None and not self._is_default(np.asarray(values, dtype=float) / unit):
                raise MismatchError(
                    f"The pipeline is called with {name} of its own ({_brief(values)}); the schedule has fixed timesteps. Call "
                    f"it without {name}, or profile and compile for these and run them with sodaprof.apply(pipe, schedule)."
                )
        self.num_inference_steps, self.step_index = count, None
        self._ring.reset()
        self._caller = Caller()
        self.timesteps = torch.tensor(self._known, device=device)

    @property
    def _trained(self) -> float:
        return float(self.config.get("num_train_timesteps", 1))

    def _is_default(self, sigmas: np.ndarray) -> bool:
        """Whether pipelines of diffusers pass these sigmas if their caller gives none, or they are the schedule's."""
        from diffusers.pipelines.mochi.pipeline_mochi import linear_quadratic_schedule

        count, last = len(sigmas), 1 / self._trained
        known = [np.linspace(1, 1 / count, count), np.linspace(1, last, count), np.linspace(1, last, count + 1)[:-1]]
        known.append(np.array(self._known) / self._trained)
        if count > 1:
            known.append(np.array(linear_quadratic_schedule(count, 0.025)))
        return any(np.abs(sigmas - wanted).max() <= ROUNDED for wanted in known)

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
        if self.num_inference_steps is not None and self._caller is not None and not self._caller.runs_now():
            raise MismatchError(
                "Another call of the pipeline began with this scheduler while this one ran, and took its place. Give each "
                "call that overlaps others a pipeline with a scheduler of its own: copy.deepcopy(pipe.scheduler)"
            )
        if self.num_inference_steps is None or step == len(self._jumps):
            raise SodaprofError("There is no step to take: call set_timesteps first, once before each run.")
        on_host = not torch.is_tensor(timestep) or timestep.device.type == "cpu"
        if on_host and float(timestep) != float(self._known[step]):
            raise MismatchError(
                f"Step {step} is at timestep {self._known[step]:g}, the pipeline is at {float(timestep):g}. {WHOLE}"
            )
        if self._latent is not None and math.prod(sample.shape[1:]) != math.prod(self._latent):
            raise MismatchError(
                f"The latents are {list(sample.shape[1:])} here, {self._latent} in the schedule: another resolution than "
                "profiled. Call the pipeline with the profiled size, profile this one, or allow other sizes: "
                "sodaprof.scheduler(schedule, allow_resolution=True)"
            )
        if eta or model_output.shape != sample.shape:
            raise UnsupportedModelError(
                f"A fitted schedule is for eta 0 and outputs of the latents' shape; found eta={eta}, an output "
                f"{list(model_output.shape)} for {list(sample.shape)}. Call the pipeline without eta, or take another scheduler."
            )
        jump = self._jumps[step]
        self._ring.add(self._data[step], sample, model_output)
        noise = drawn(jump.noise, model_output, generator)
        dtype = next_dtype(self.sampler.class_name, sample)
        moved = self._ring.moved(jump.coefficients, sample, noise, dtype, jump.initial)
        self.step_index = step + 1
        if self.step_index == len(self._jumps):
            self._caller = None
        return SchedulerOutput(prev_sample=moved) if return_dict else (moved,)

    def save_pretrained(self, save_directory: str | os.PathLike[str], push_to_hub: bool = False, **kwargs: Any) -> None:
        """Writes the config, with the schedule, for `from_pretrained`."""
        super().save_config(save_directory, push_to_hub, **kwargs)

    def save_config(self, *args: Any, **kwargs: Any) -> None:
        """Raises UnsupportedModelError: the file holds more than settings, so no other class loads what it does."""
        raise UnsupportedModelError(
            "save_config writes the settings of a sampler; this scheduler also holds a schedule. Type: "
            "scheduler.save_pretrained(folder), or pipe.save_pretrained(folder)"
        )

    def __len__(self) -> int:
        return int(self.config.get("num_train_timesteps", self.sampler.steps))


def _plain(value: Any) -> Any:
    """Returns a setting as JSON holds it: a tuple as a list."""
    return list(value) if isinstance(value, tuple) else value


def _brief(values: Sequence[float]) -> str:
    shown = [f"{float(v):g}" for v in values]
    return ", ".join(shown if len(shown) < 5 else [*shown[:3], "…", shown[-1]])


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
