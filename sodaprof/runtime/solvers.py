"""A sampler's steps as a table of coefficients, so that guidance and solver can sit in the graph of a step.

The numbers are asked of the scheduler: a step that is a weighted sum, element by element, of the sample, the network's
output, the output before and noise is known once unit vectors went through it. Numbers that are powers of two go through
with them, against which the sums are checked: a step that clips or thresholds is refused, not approximated.
"""

from __future__ import annotations

import copy
import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import UnsupportedModelError
from ..models.surroundings import LOOP_SCHEDULERS

COLUMNS = ("sample", "output", "memory", "noise", "keep_sample", "keep_output")
MEMORY, NOISE = COLUMNS.index("memory"), COLUMNS.index("noise")
SILENT, PROBES = 8, 64  # elements that are fed zeros, so that noise alone comes back; all elements of a probe
TOLERANCE = 1e-6  # of a checked sum's absolute terms: fp32 rounding passes (schedulers cast to fp32), clipping does not
PLAIN: dict[str, tuple[Any, ...]] = {  # settings under which a step is a weighted sum; the first value is what to set
    "clip_sample": (False,),
    "thresholding": (False,),
    "variance_type": ("fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log", None),
}
INSTEAD = "or leave the scheduler out of the graph (capture the transformer alone)"


@dataclass(frozen=True, eq=False)
class Solver:
    """x' = sample · x + output · v + memory · m + noise · n,  m' = keep_sample · x + keep_output · v, at each of T steps.

    x is the sample, v the network's output after guidance, m the memory (the m' of the step before; before the first step
    anything finite, say zeros), n standard normal noise; all of one shape. Pure numbers, no units.
    """

    coefficients: Tensor  # fp64 [T, 6] on the CPU, in the order of COLUMNS

    def to(self, device: str | torch.device) -> Tensor:
        """Returns the table fp32 [T, 6] on a device, as `advance` takes it."""
        return self.coefficients.to(device, torch.float32)

    @property
    def remembers(self) -> bool:
        """Whether any step reads the memory; where none does, `advance` needs no m."""
        return bool(self.coefficients[:, MEMORY].any())

    @property
    def draws(self) -> list[bool]:
        """Whether the scheduler draws noise, for each of T steps; it draws of the sample's shape and in v's dtype."""
        return [bool(c) for c in self.coefficients[:, NOISE]]


def solver_of(scheduler: Any, timesteps: Any) -> Solver:
    """Returns the table of a run through timesteps ([T], tensor or list, in the order of the steps).

    The scheduler is to stand as the pipeline leaves it before its loop (`set_timesteps` called, begin index set where it
    is) and is not changed. The table is that of a run which passes `step` nothing but a generator: no `eta` other than 0,
    no `per_token_timesteps`. UnsupportedModelError names what cannot be put into a table and what to do.
    """
    name = type(scheduler).__name__
    _refuse_settings(scheduler)
    steps = torch.as_tensor(timesteps).detach().cpu().reshape(-1)
    known = torch.as_tensor(scheduler.timesteps).detach().cpu()
    begin = getattr(scheduler, "begin_index", None)
    begins = range(len(known)) if begin is None else [begin]
    if not len(steps) or not any(torch.equal(known[i : i + len(steps)].double(), steps.double()) for i in begins):
        raise UnsupportedModelError(
            f"{name}: the {len(steps)} timesteps asked for are not a stretch of its own {len(known)}"
            f"{'' if begin is None else f' from index {begin}'}: call set_timesteps first, and pass scheduler.timesteps."
        )
    probe = _fresh(scheduler)
    rows = []
    for index, t in enumerate(steps):
        try:
            rows.append(_row(probe, t))
        except (ArithmeticError, IndexError, RuntimeError, TypeError, ValueError) as error:
            raise UnsupportedModelError(
                f"{name}: step {index} of {len(steps)} (timestep {t.item():g}) cannot be tabled: {error}. Take"
                f" DPMSolverMultistepScheduler (2M), DDIM or flow-match Euler with settings that it runs, {INSTEAD}."
            ) from error
    return Solver(torch.stack(rows))


def advance(
    table: Tensor, step: Tensor, x: Tensor, v: Tensor, m: Tensor | None = None, noise: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """Returns (x', m') of one step: x' in x's dtype, m' in m's (None without m). Tensor operators only, no host copy.

    table [T, 6] and step (int64 [1], 0 … T − 1) lie on the device of x, v, m and noise, which are of one shape. The sums
    are taken in the table's dtype and rounded once, so in half precision they are nearer than the scheduler's own, and not
    its bits. Without m or noise their terms are left out, whatever the table says: give m where the solver `remembers`,
    noise where it `draws` (a step whose noise weighs 0 takes any finite noise).
    """
    row = table.index_select(0, step).reshape(len(COLUMNS)).unbind()
    sample, output, memory, fresh, keep_sample, keep_output = row
    wide_x, wide_v = x.to(table.dtype), v.to(table.dtype)
    moved = torch.addcmul(sample * wide_x, output, wide_v)
    if noise is not None:
        moved = torch.addcmul(moved, fresh, noise.to(table.dtype))
    if m is None:
        return moved.to(x.dtype), None
    moved = torch.addcmul(moved, memory, m.to(table.dtype))
    return moved.to(x.dtype), torch.addcmul(keep_sample * wide_x, keep_output, wide_v).to(m.dtype)


def _refuse_settings(scheduler: Any) -> None:
    """Refuses schedulers and settings that are known not to be weighted sums, by name."""
    name = type(scheduler).__name__
    if name not in LOOP_SCHEDULERS:
        raise UnsupportedModelError(
            f"The steps of {name} cannot be tabled. Take one of {', '.join(LOOP_SCHEDULERS)}, {INSTEAD}."
        )
    for key, allowed in {**{k: (v,) for k, v in LOOP_SCHEDULERS[name].items()}, **PLAIN}.items():
        value = scheduler.config.get(key, allowed[0])
        if value not in allowed:
            raise UnsupportedModelError(
                f"The steps of {name} with {key}={value!r} cannot be tabled: they are no weighted sum, or of more than the"
                f" last two outputs. Set {key}={allowed[0]!r} ({name}.from_config(scheduler.config, {key}={allowed[0]!r}),"
                f" which may change what is sampled), {INSTEAD}."
            )
    clock = vars(scheduler).get("_sodaprof")  # wraps step on the instance; what it wraps is the class's, or somebody's
    own = vars(scheduler).get("step") if clock is None else clock._saved.get("step")
    if own is not None:
        raise UnsupportedModelError(
            f"{name}: its step was replaced on this instance, so the class's steps are not what runs. Take that off"
            f" (del scheduler.step), {INSTEAD}."
        )


def _fresh(scheduler: Any) -> Any:
    """Returns a copy before its first step, all on the CPU, without what is put on the instance."""
    probe = copy.copy(scheduler)
    for key, value in list(vars(probe).items()):
        if key in ("step", "set_timesteps", "_sodaprof"):
            del vars(probe)[key]
        elif torch.is_tensor(value):
            setattr(probe, key, value.detach().cpu())
    state: dict[str, Any] = {"_step_index": None, "lower_order_nums": 0}
    if hasattr(scheduler, "model_outputs"):
        state["model_outputs"] = [None] * len(scheduler.model_outputs)
    vars(probe).update({key: value for key, value in state.items() if key in vars(probe)})
    return probe


def _row(probe: Any, t: Tensor) -> Tensor:
    """Returns the coefficients fp64 [6] of the step that the probe stands before, and takes it; t [] is its timestep.

    Element 0 of what goes in is a unit of the sample, 1 of the output, 2 of the memory; then come SILENT zeros, and
    signed powers of two, that stay exact where the scheduler casts to fp32. ValueError where the step is no sum.
    """
    generator = torch.Generator().manual_seed(0)
    into = torch.randint(0, 2, (3, 1, PROBES), generator=generator).double() * 2 - 1
    into *= 2.0 ** torch.randint(-4, 12, into.shape, generator=generator)
    into[..., : 3 + SILENT] = 0
    into[..., :3] = torch.eye(3, dtype=torch.float64)[:, None]
    x, v, m = into
    noise = torch.randn(x.shape, generator=generator.manual_seed(1), dtype=torch.float64)
    drawn = "generator" in inspect.signature(probe.step).parameters
    options = {"generator": generator.manual_seed(1)} if drawn else {}
    remembers = getattr(probe, "model_outputs", None)
    if remembers is not None:
        remembers[-1] = m  # the step moves it back by one, and puts what it keeps in its place
    out = probe.step(v, t, x, return_dict=False, **options)[0].double()
    kept = torch.zeros_like(x) if remembers is None else probe.model_outputs[-1].double()
    if not (out.isfinite().all() and kept.isfinite().all()):
        raise ValueError("it makes numbers that are not finite (its betas do not go with its prediction_type)")
    silent = slice(3, 3 + SILENT)
    fresh = (out[:, silent] * noise[:, silent]).sum() / noise[:, silent].square().sum()
    row = torch.cat(((out - fresh * noise)[0, :3], fresh[None], kept[0, :2]))
    if remembers is None:
        row[MEMORY] = 0  # but for what taking off the noise rounded
    sums = ((out, (x, v, m, noise), row[:4]), (kept, (x, v), row[4:]))
    for found, parts, weights in sums:
        terms = torch.stack(parts) * weights[:, None, None]
        if ((found - terms.sum(0)).abs() > TOLERANCE * terms.abs().sum(0)).any():
            raise ValueError("it is no weighted sum of sample, output, the output before and noise")
    return row
