"""A scheduler's own steps as coefficients, measured on the scheduler: `own_update`; steps by coefficients: `advance`.

A run of the scheduler on unit vectors in float64 shows the coefficients of each step, elements whose inputs are zero its noise.
A second run on random numbers must equal the same sums: a step that clips, thresholds or mixes elements is refused.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from ..errors import UnsupportedModelError
from ..formats.data_basis import FLOWS, in_data_basis
from ..formats.sampler import MAX_HISTORY, Basis, OwnUpdate
from .patch import replaced

LOOP_SCHEDULERS: dict[str, dict[str, tuple[Any, ...]]] = {  # a captured step can contain them -> settings allowed
    "DDIMScheduler": {},
    "DDPMScheduler": {},
    "DPMSolverMultistepScheduler": {"algorithm_type": ("dpmsolver++", "dpmsolver")},
    "FlowMatchEulerDiscreteScheduler": {"stochastic_sampling": (False,)},
    "RectifiedFlowScheduler": {},
    "UniPCMultistepScheduler": {"solver_p": (None,)},
}
SCHEDULERS: dict[str, dict[str, tuple[Any, ...]]] = {**LOOP_SCHEDULERS, "EulerDiscreteScheduler": {}}
WIDENING = ("RectifiedFlowScheduler",)  # their steps return fp32 or wider, the others' the latents' dtype
PLAIN: dict[str, tuple[Any, ...]] = {  # settings with which a step is a weighted sum; messages recommend the first
    "clip_sample": (False,),
    "thresholding": (False,),
    "variance_type": ("fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log", None),
}
Note = Callable[[int], None]  # called with each step, for messages
INSTEAD = "or do without fitted updates and whole steps (--runtime compiled)"
SILENT, PROBES = 8, 64  # elements with zero inputs, which return noise alone; elements of the random run
LOUD = 100.0  # standard deviation of the random run: beyond the values at which a scheduler may clip
EXACT = 1e-10  # relative: largest residual of a float64 sum
ROUNDING = 1e-14  # relative to a step's largest coefficient: smaller ones are 0
# attributes of a scheduler that its steps change
BEFORE_FIRST_STEP = {"_step_index": None, "lower_order_nums": 0, "last_sample": None, "is_scale_input_called": True}
HISTORIES = ("model_outputs", "timestep_list")


class _Wide(Tensor):
    """A float64 tensor that stays float64: schedulers cast samples to float32, which would blur the coefficients."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (Tensor.to, Tensor.float) and isinstance(args[0], cls):
            return args[0]
        return super().__torch_function__(func, types, args, kwargs or {})


def own_update(scheduler: Any, timesteps: Any, basis: str | None = None) -> OwnUpdate:
    """Returns the scheduler's own steps through timesteps ([T], tensor or list, in the order of the steps) as an update.

    basis: `data` for its steps in the data basis (`data_basis.in_data_basis`); by default the scheduler's own.

    The scheduler must be in its state before the pipeline's loop (`set_timesteps` called, begin index set if the pipeline
    sets it) and is not changed. The coefficients are those of a run which passes only a generator to `step`: no `eta` other
    than 0, no `per_token_timesteps`. UnsupportedModelError names the reason if its steps are no weighted sums, and what to do.
    """
    refuse_settings(scheduler)
    name, steps = type(scheduler).__name__, _stretch(scheduler, timesteps)
    current = 0

    def note(step: int) -> None:
        nonlocal current
        current = step

    try:
        pairs, noise, states = _simulated(_fresh(scheduler), steps, note)
        rows = _solved(states, note)
        found = OwnUpdate(basis_of(scheduler), tuple(map(tuple, rows.tolist())), tuple(pairs), tuple(noise))
        _check(found, _fresh(scheduler), steps, note)
    except (ArithmeticError, IndexError, NotImplementedError, RuntimeError, TypeError, ValueError) as error:
        raise UnsupportedModelError(
            f"{name}: step {current} of {len(steps)} (timestep {steps[current].item():g}) cannot be tabled: {error}. Take"
            f" DPMSolverMultistepScheduler (2M), DDIM or flow-match Euler with settings that it supports, {INSTEAD}."
        ) from error
    return in_data_basis(found, name in FLOWS) if basis == "data" else found


def basis_of(scheduler: Any) -> Basis:
    """Returns what the scheduler's steps weigh: `data` if it keeps data predictions of its outputs, else `output`."""
    return "output" if getattr(scheduler, "model_outputs", None) is None else "data"


def refuse_settings(scheduler: Any) -> None:
    """Raises UnsupportedModelError for schedulers and settings whose steps are known to be no weighted sums, by name."""
    name = type(scheduler).__name__
    if name not in SCHEDULERS:
        raise UnsupportedModelError(
            f"The steps of {name} cannot be tabled. Take one of {', '.join(SCHEDULERS)}, {INSTEAD}."
        )
    for key, allowed in {**SCHEDULERS[name], **PLAIN}.items():
        value = scheduler.config.get(key, allowed[0])
        if value not in allowed:
            raise UnsupportedModelError(
                f"The steps of {name} with {key}={value!r} cannot be tabled: they are no weighted sums of latents and"
                f" outputs. Set {key}={allowed[0]!r} ({name}.from_config(scheduler.config, {key}={allowed[0]!r}),"
                f" which may change what is sampled), {INSTEAD}."
            )
    if replaced(scheduler, "step") is not None:
        raise UnsupportedModelError(
            f"{name}: its step was replaced on this instance, so the class's steps do not run. Remove the replacement"
            f" (del scheduler.step), {INSTEAD}."
        )


def table_of(coefficients: Any, data: Any) -> Tensor:
    """Returns the fp64 table [T, 3 + K] that `advance` reads, from coefficients [T][1 + K] and data [T][2].

    Its columns: sample; data of the sample, data of the output; one for each V, newest first.
    """
    rows = torch.tensor(coefficients, dtype=torch.float64)
    return torch.cat((rows[:, :1], torch.tensor(data, dtype=torch.float64), rows[:, 1:]), 1)


def advance(table: Tensor, step: Tensor, x: Tensor, v: Tensor, ring: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """Returns (x', ring') of one step: x' in x's dtype. Tensor operators only, no host copy.

    table [T, 3 + K] and step (int64 [1], 0 … T − 1) are on the device of x, v and noise, which have one shape; ring [K, …]
    holds the V of earlier steps, newest first, in the table's dtype; any finite values before the first step. noise is
    already weighted. The sums are computed in the table's dtype and rounded once.
    """
    row = table.index_select(0, step).reshape(-1)
    sample, of_sample, of_output = row[:3].unbind()
    wide = x.to(table.dtype)
    ring = torch.cat(((of_sample * wide + of_output * v.to(table.dtype))[None], ring[:-1]))
    moved = torch.addcmul(noise.to(table.dtype), sample, wide)
    for weight, value in zip(row[3:].unbind(), ring.unbind(), strict=True):
        moved = torch.addcmul(moved, weight, value)
    return moved.to(x.dtype), ring


def _stretch(scheduler: Any, timesteps: Any) -> Tensor:
    """Returns the timesteps [T]; UnsupportedModelError if they are no consecutive part of the scheduler's."""
    steps = torch.as_tensor(timesteps).detach().cpu().reshape(-1)
    own = getattr(scheduler, "timesteps", None)
    known = torch.as_tensor([] if own is None else own).detach().cpu()
    begin = getattr(scheduler, "begin_index", None)
    begins = range(len(known)) if begin is None else [begin]
    if not len(steps) or not any(torch.equal(known[i : i + len(steps)].double(), steps.double()) for i in begins):
        raise UnsupportedModelError(
            f"{type(scheduler).__name__}: the {len(steps)} requested timesteps are no consecutive part of its own {len(known)}"
            f"{'' if begin is None else f' from index {begin}'}: call set_timesteps first, and pass scheduler.timesteps."
        )
    return steps.to(known.dtype)  # Euler refuses whole numbers


def _fresh(scheduler: Any) -> Any:
    """Returns a copy in its state before the first step, on the CPU, without methods set on the instance."""
    probe = copy.copy(scheduler)
    for key, value in list(vars(probe).items()):
        if key in ("step", "set_timesteps"):
            del vars(probe)[key]
        elif key in BEFORE_FIRST_STEP:
            setattr(probe, key, BEFORE_FIRST_STEP[key])
        elif key in HISTORIES:
            setattr(probe, key, [None] * len(value))
        elif torch.is_tensor(value):
            setattr(probe, key, value.detach().cpu())
    return probe


def _stepped(probe: Any, v: Tensor, t: Tensor, x: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """Returns (sample, noise): the result of the probe's next step, and the noise that it draws if it draws any."""
    generator = torch.Generator().manual_seed(seed)
    options = {"generator": generator} if "generator" in inspect.signature(probe.step).parameters else {}
    out = probe.step(v.as_subclass(_Wide), t, x.as_subclass(_Wide), return_dict=False, **options)[0]
    if out.dtype != torch.float64 or not out.isfinite().all():
        raise ValueError("its numbers are not finite (its betas do not suit its prediction_type)")
    return out.as_subclass(Tensor), torch.randn(x.shape, generator=generator.manual_seed(seed), dtype=torch.float64)


def _pair(probe: Any, t: Tensor, like: Tensor) -> tuple[float, float]:
    """Returns (α, β): the scheduler keeps α · sample + β · output of the probe's next step."""
    if basis_of(probe) == "output":
        return 0.0, 1.0
    other = copy.copy(probe)
    vars(other).update({key: list(vars(probe)[key]) for key in HISTORIES if key in vars(probe)})
    x, v = torch.zeros((2, *like.shape), dtype=torch.float64)
    x[0, 0] = v[0, 1] = 1
    _stepped(other, v, t, x, 0)
    kept = other.model_outputs[-1].as_subclass(Tensor)
    alpha, beta = kept[0, :2].tolist()
    if not kept.isfinite().all() or not beta:
        raise ValueError("the data predictions that it keeps are not finite, or do not depend on its outputs")
    return alpha, beta


def _simulated(probe: Any, steps: Tensor, note: Note) -> tuple[list[tuple[float, float]], list[float], Tensor]:
    """Returns the data pairs, the weights of the noise and the states [T + 1, 1 + T], one coordinate an element.

    The first sample is a unit vector, and each step's output is chosen so that the value that the update weighs (the output
    itself, or the data prediction that the scheduler makes of it) is another one.
    """
    size = 1 + len(steps)
    x = torch.zeros(1, size + SILENT, dtype=torch.float64)
    x[0, 0] = 1
    pairs, weights, states = [], [], [x[0, :size]]
    for step, t in enumerate(steps):
        note(step)
        alpha, beta = _pair(probe, t, x)
        newest = torch.zeros_like(x)
        newest[0, 1 + step] = 1
        moved, noise = _stepped(probe, (newest - alpha * x) / beta, t, x, step)
        silent = noise[0, size:]
        weight = float(moved[0, size:] @ silent / silent.square().sum())
        x = moved - weight * noise
        x[0, size:] = 0
        pairs.append((alpha, beta))
        weights.append(weight if abs(weight) > ROUNDING else 0.0)
        states.append(x[0, :size])
    return pairs, weights, torch.stack(states)


def _solved(states: Tensor, note: Note) -> Tensor:
    """Returns the coefficients fp64 [T, 1 + K] with the shortest history that gives every state from the one before."""
    for history in range(1, MAX_HISTORY + 1):
        rows = torch.zeros(len(states) - 1, 1 + history, dtype=torch.float64)
        for step, (x, after) in enumerate(pairwise(states)):
            note(step)
            recent = list(range(1 + step, max(0, 1 + step - history), -1))  # coordinates of V, newest first
            old = torch.ones(len(x), dtype=torch.bool)
            old[recent] = False
            weight = float(x[old] @ after[old] / x[old].square().sum().clamp_min(1e-300))
            left = after - weight * x
            if left[old].norm() > EXACT * after.norm():
                break
            rows[step, 0], rows[step, 1 : 1 + len(recent)] = weight, left[recent]
        else:  # rounding errors become 0
            return torch.where(rows.abs() < ROUNDING * rows.abs().amax(1, keepdim=True), 0.0, rows)
    raise ValueError(f"it is no weighted sum of its sample and the last {MAX_HISTORY} outputs")


def _check(found: OwnUpdate, probe: Any, steps: Tensor, note: Note) -> None:
    """Raises ValueError unless a run on large random numbers, with its noise, equals the sums that were found."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, PROBES, generator=generator, dtype=torch.float64) * LOUD
    ring: list[Tensor] = []
    for step, t in enumerate(steps):
        note(step)
        v = torch.randn(x.shape, generator=generator, dtype=torch.float64) * LOUD
        alpha, beta = found.data[step]
        ring = [alpha * x + beta * v, *ring][: found.history]
        moved, noise = _stepped(probe, v, t, x, step)
        own, *weights = found.coefficients[step]
        terms = [own * x, found.noise[step] * noise]
        terms += [weight * value for weight, value in zip(weights, ring, strict=False)]
        if ((moved - sum(terms)).abs() > EXACT * sum(term.abs() for term in terms)).any():
            raise ValueError("it is no weighted sum of sample, outputs and noise, element by element")
        x = moved


def in_loop(scheduler: Any) -> bool:
    """Whether a captured step can contain the scheduler's step."""
    wanted = LOOP_SCHEDULERS.get(type(scheduler).__name__)
    return wanted is not None and all(scheduler.config.get(key, values[0]) in values for key, values in wanted.items())
