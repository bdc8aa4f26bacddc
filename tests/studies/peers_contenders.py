"""The contenders: how each cache is put on a pipeline, as its documentation says and, where that fails, with help."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, redirect_stdout
from dataclasses import dataclass, field
from io import StringIO
from typing import Any

import numpy as np
import torch
from diffusers import hooks
from diffusers.models.cache_utils import CacheMixin

import sodaprof
from sodaprof.compiler.problem import draw_schedule
from sodaprof.errors import SodaprofError
from sodaprof.formats.schedule import Schedule
from sodaprof.formats.schedule_file import load_schedule
from sodaprof.pipelines.discover import inspect_pipeline
from sodaprof.pipelines.load import call, default_guidance

LEAST, MOST = 1e-3, 3.0  # thresholds tried
AFTER_FIRST = (-1, 999)  # timesteps


@dataclass
class On:
    """A cache on a pipeline. around: what a picture is drawn inside. work: for caches that say what they computed."""

    around: Callable[[], AbstractContextManager[Any]] = nullcontext
    work: Callable[[], np.ndarray] | None = None


@dataclass(frozen=True)
class Job:
    """What the equal setting is: the steps that compute ("1"), and the schedule that this comes from, if a file."""

    mask: str
    schedule: str | None
    calibration: list[int | str]  # labels or prompts of the calibration seeds 0, 1, …
    kept: dict[str, Any] = field(default_factory=dict)  # what a calibration found, for all thresholds

    @property
    def computed(self) -> int:
        return self.mask.count("1")

    @property
    def period(self) -> int:
        return max(2, round(len(self.mask) / self.computed))


@dataclass(frozen=True)
class Contender:
    """One way to cache. put(pipe, job, settings, helped) puts it on; `help` says what helped adds to the documentation.

    kind: "mask" takes the very steps; "threshold" takes a threshold, swept to as many full steps, in each of `variants`;
    "setting" has neither and takes the nearest period.
    """

    kind: str
    what: str
    put: Callable[[Any, Job, dict[str, Any], bool], On]
    variants: tuple[dict[str, Any], ...] = ({},)
    help: str = ""


def steps_of(mask: str) -> list[int]:
    """Returns the mask as a list of 0 and 1, as cache-dit takes it; ValueError where it cannot be one."""
    if not re.fullmatch("1[01]*", mask):
        raise ValueError(f"{mask!r} is no mask: 0 and 1, and the first step computes")
    return [int(c) for c in mask]


# ---- this project -----------------------------------------------------------------------------------------------------


def masked(pipe: Any, mask: str) -> Schedule:
    """Returns the schedule that computes everything in the mask's steps and reuses everything in the others."""
    model, sampler, _ = inspect_pipeline(pipe, "", len(mask), default_guidance(pipe))
    return draw_schedule(model, sampler, [t for t, c in enumerate(steps_of(mask)) if c], {})


def work_of(schedule: Schedule) -> np.ndarray:
    """Returns the share [T, S] of each site's tokens that the schedule computes."""
    columns = []
    for plan in schedule.transformers.values():
        for key, row in plan.rows.items():
            k = iter(plan.k.get(key, ()))
            columns.append(
                [{"C": 1.0, "P": 0.0}.get(a, 0.0) + (next(k) / plan.tokens(key) if a == "P" else 0) for a in row]
            )
    return np.array(columns).T


def ours(lower: bool, whole: bool) -> Callable[..., On]:
    """Returns how a schedule is applied. whole: as compiled; else its mask alone."""

    def put(pipe: Any, job: Job, settings: dict[str, Any], helped: bool) -> On:
        schedule = load_schedule(job.schedule) if whole and job.schedule else masked(pipe, job.mask)
        handle = sodaprof.apply(pipe, schedule, runtime="compiled" if lower else "hooks")

        def work() -> np.ndarray:
            report = handle.report()
            if report.executed != report.planned:
                raise SodaprofError(f"planned {report.planned}, executed {report.executed}")
            return work_of(schedule)

        return On(work=work)

    return put


# ---- cache-dit --------------------------------------------------------------------------------------------------------


def cache_dit(first: int, order: int = 0, by_mask: bool = True) -> Callable[..., On]:
    """Returns how cache-dit is put on, with `first` blocks always computed (Fn), and a Taylor order."""

    def put(pipe: Any, job: Job, settings: dict[str, Any], helped: bool) -> On:
        import cache_dit as package  # type: ignore[import-not-found]  # an extra: peers

        steps: dict[str, Any] = {
            "num_inference_steps": len(job.mask),
            "Fn_compute_blocks": first,
            "Bn_compute_blocks": 0,
        }
        if by_mask:
            steps |= {
                "steps_computation_mask": steps_of(job.mask),
                "steps_computation_policy": "static",
                "max_warmup_steps": 1,
            }
        else:
            steps |= {"residual_diff_threshold": settings["threshold"], "max_warmup_steps": settings["warm_up"]}
        taylor = package.TaylorSeerCalibratorConfig(taylorseer_order=order) if order else None
        package.enable_cache(pipe, cache_config=package.DBCacheConfig(**steps), calibrator_config=taylor)
        return On()

    return put


# ---- diffusers' hooks -------------------------------------------------------------------------------------------------


@contextmanager
def reset(transformer: Any) -> Iterator[None]:
    """Clears what the hooks kept, and names the context that some of them ask for."""
    hooks.HookRegistry.check_if_exists_or_initialize(transformer).reset_stateful_hooks(recurse=True)
    with CacheMixin.cache_context(transformer, "both halves"):
        yield


def on(pipe: Any, helped: bool) -> On:
    return On(lambda: reset(pipe.transformer)) if helped else On()


def clock(pipe: Any, helped: bool) -> Callable[[], int]:
    """Returns where the hooks read the timestep: as documented, or off the transformer's own argument (DiT has no other)."""
    if not helped:
        return lambda: pipe.current_timestep
    now = {"t": 0}
    note = lambda module, args, kwargs: now.update(t=int(kwargs["timestep"].flatten()[0]))  # noqa: E731
    pipe.transformer.register_forward_pre_hook(note, with_kwargs=True, prepend=True)
    return lambda: now["t"]


def mag_cache(pipe: Any, job: Job, settings: dict[str, Any], helped: bool) -> On:
    """MagCache with ratios from one calibration run on all calibration seeds; it can only print them."""
    steps = len(job.mask)
    if "ratios" not in job.kept:
        hooks.apply_mag_cache(pipe.transformer, hooks.MagCacheConfig(calibrate=True, num_inference_steps=steps))
        with redirect_stdout(StringIO()) as printed:
            call(pipe, job.calibration, list(range(len(job.calibration))), steps, default_guidance(pipe))
        job.kept["ratios"] = printed_ratios(printed.getvalue())
    config = hooks.MagCacheConfig(mag_ratios=job.kept["ratios"], num_inference_steps=steps, **settings)
    hooks.apply_mag_cache(pipe.transformer, config)
    return on(pipe, helped)


def printed_ratios(text: str) -> list[float]:
    """Returns the last list of numbers in what MagCache printed."""
    found = re.findall(r"\[([-\d.e, ]+)\]", text)
    if not found:
        raise ValueError("MagCache printed no ratios")
    return [float(v) for v in found[-1].split(",")]


def first_block(pipe: Any, job: Job, settings: dict[str, Any], helped: bool) -> On:
    hooks.apply_first_block_cache(pipe.transformer, hooks.FirstBlockCacheConfig(**settings))
    return on(pipe, helped)


def taylor_seer(pipe: Any, job: Job, settings: dict[str, Any], helped: bool) -> On:
    names = {"cache_identifiers": [r"^(single_)?transformer_blocks\.\d+\.(attn\d?|ff)$"]} if helped else {}
    config = hooks.TaylorSeerCacheConfig(
        cache_interval=job.period, disable_cache_before_step=1, max_order=1, taylor_factors_dtype=torch.float32, **names
    )
    hooks.apply_taylorseer_cache(pipe.transformer, config)
    return on(pipe, helped)


def broadcast(pipe: Any, job: Job, settings: dict[str, Any], helped: bool) -> On:
    config = hooks.PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=job.period, spatial_attention_timestep_skip_range=(-1, 1001),
        current_timestep_callback=clock(pipe, helped),
    )  # fmt: skip
    hooks.apply_pyramid_attention_broadcast(pipe.transformer, config)
    return on(pipe, helped)


def faster_cache(pipe: Any, job: Job, settings: dict[str, Any], helped: bool) -> On:
    """FasterCache from the second step on: with the first step in its range it reads a cache that is not there yet."""
    names = ["hidden_states", "timestep", "class_labels"]
    config = hooks.FasterCacheConfig(
        spatial_attention_block_skip_range=job.period, unconditional_batch_skip_range=job.period,
        spatial_attention_timestep_skip_range=AFTER_FIRST, unconditional_batch_timestep_skip_range=AFTER_FIRST,
        attention_weight_callback=lambda _: 0.3, tensor_format="BCHW", current_timestep_callback=clock(pipe, helped),
        is_guidance_distilled=bool(pipe.transformer.config.get("guidance_embeds")),
        **({"_unconditional_conditional_input_kwargs_identifiers": names} if helped else {}),
    )  # fmt: skip
    hooks.apply_faster_cache(pipe.transformer, config)
    return on(pipe, helped)


def sea_cache(pipe: Any, job: Job, settings: dict[str, Any], helped: bool) -> On:
    hooks.apply_sea_cache(pipe.transformer, hooks.SeaCacheConfig())
    return on(pipe, helped)


RESET = "a reset of its hooks before every picture"
CONTENDERS = {
    "plain": Contender("plain", "the pipeline against itself: the noise of the clock", lambda *_: On()),
    "sodaprof": Contender("mask", "schedule as compiled, hooks", ours(False, True)),
    "sodaprof lowered": Contender("mask", "schedule as compiled, traced blocks", ours(True, True)),
    "sodaprof mask": Contender("mask", "its mask alone, traced blocks", ours(True, False)),
    "cache-dit F0": Contender("mask", "static mask, Fn=0 Bn=0", cache_dit(0)),
    "cache-dit F1": Contender("mask", "static mask, Fn=1 Bn=0", cache_dit(1)),
    "cache-dit F1 Taylor": Contender("mask", "static mask, Fn=1 Bn=0, Taylor order 1", cache_dit(1, order=1)),
    "cache-dit threshold": Contender(
        "threshold", "DBCache, Fn=1 Bn=0", cache_dit(1, by_mask=False), tuple({"warm_up": w} for w in (8, 1))
    ),
    "MagCache": Contender(
        "threshold", "ratios of the calibration seeds", mag_cache,
        tuple({"max_skip_steps": k, "retention_ratio": r} for k, r in ((3, 0.2), (3, 0.02), (50, 0.2), (50, 0.02))), RESET,
    ),
    "first-block cache": Contender("threshold", "", first_block, help=f"a named cache context and {RESET}"),
    "TaylorSeer": Contender(
        "setting", "order 1, single precision", taylor_seer, help=f"names of this model's modules and {RESET}"
    ),
    "PAB": Contender("setting", "attention at all timesteps", broadcast, help=f"a source of timesteps and {RESET}"),
    "FasterCache": Contender(
        "setting", "attention and one guidance half, at all timesteps", faster_cache,
        help=f"a source of timesteps, a private list of arguments to halve, and {RESET}",
    ),
    "SeaCache": Contender("setting", "defaults", sea_cache, help=RESET),
}  # fmt: skip
