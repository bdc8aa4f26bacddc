"""`evaluate`: the same seeds with and without each schedule, beside the controls that a critic would ask for."""

from __future__ import annotations

import platform
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..errors import MismatchError, SodaprofError
from ..formats.schedule import Schedule
from ..pipelines.device import versions
from ..pipelines.discover import inspect_pipeline
from ..pipelines.flops import count_flops
from ..pipelines.load import check_entries, check_seeds, default_prompts
from ..runtime.checks import check_matches
from .classifier import Classifier, load_classifier
from .contenders import FEWER, Contender, Run, choose, control_candidates, describe, features_of, joined, works_by
from .metrics import (
    LEAST_FOR_DISTANCE,
    flipped,
    frechet_distance,
    kernel_difference,
    kernel_distance,
    mean_interval,
    psnr_db,
    relative_l2,
    ssim,
    worst_decile,
    worst_decile_difference,
)

SEED = 1_000_000  # the first evaluation seed: far from the calibration seeds, which start at 0
CALIBRATION = 8  # seeds of the profile on which the controls' spacings are chosen
SHOWN = 8  # pictures kept of every contender
REFERENCES = ("fora", "soda")  # policies that every other row is held against, seed by seed


def evaluate(
    pipe: Any,
    schedules: Sequence[Schedule],
    *,
    samples: int = 64,
    seed: int = SEED,
    prompts: Sequence[int | str] | None = None,
    batch_size: int = 16,
    guidance_scale: float | None = None,
    names: Sequence[str] | None = None,
    controls: Sequence[str] | bool = True,
    budget: float | None = None,
    data: np.ndarray | None = None,
    runtime: str = "hooks",
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Any]:
    """Returns what each schedule costs in fidelity and gains in speed over the same seeds, as plain data.

    `rows` holds the schedules and their controls, `full` the plain run, `candidates` every spacing tried for the
    fewer-step controls on calibration seeds, `pictures` the first few of each as float arrays [n, H, W, 3].
    controls: all, none, or the names of some ("fora", "fewer steps, DDIM"). budget: the speed-up that all schedules were
    asked for, which the controls then get too; by default what each schedule comes to.
    data: pictures [n, H, W, 3] in [0, 1] of what the model was trained on, n at least 1000: from 1000 samples on, the
    Fréchet and kernel distances to them stand beside those to the full run.
    runtime: hooks, lowered or captured, for the schedules and FORA; the pictures of the first two are the same.
    Raises MismatchError where evaluation seeds touch a schedule's calibration seeds or schedules differ in sampler.
    """
    if samples < 2:
        raise SodaprofError(f"--samples is {samples}; expected at least 2.")
    check_seeds(range(seed, seed + samples))
    if not schedules:
        raise SodaprofError("No schedule to evaluate. Type: sodaprof eval MODEL schedule.json")
    sampler = schedules[0].sampler
    for schedule in schedules:
        if schedule.sampler.timesteps != sampler.timesteps:
            raise MismatchError("The schedules are for different timesteps; evaluate them in separate calls.")
        _keep_apart(schedule, seed, samples)
        check_matches(pipe, schedule)
    scale = sampler.guidance_scale if guidance_scale is None else guidance_scale
    entries = default_prompts(pipe) if prompts is None else list(prompts)
    check_entries(pipe, entries)
    classifier = load_classifier(Path(str(pipe.config.get("_name_or_path", ""))))
    real = None if data is None else _features_of_data(classifier, data)
    model, _, step = inspect_pipeline(pipe, "", sampler.steps, scale, entries[0])
    cost = count_flops(pipe, model, step)

    contenders = [
        Contender(names[i] if names else s.policy["name"], describe(s), s.steps, cost.speedup(s), schedule=s)
        for i, s in enumerate(schedules)
    ]
    candidates = control_candidates(schedules, model, cost, budget, controls)
    fewer = [c for c in candidates if c.control is not None]
    fora = [c for c in candidates if c.control is None]
    full = Contender("full", f"{sampler.steps} steps", sampler.steps, 1.0)
    calibration = _calibration_seeds(schedules)
    run = Run(pipe, entries, batch_size, scale, classifier, on_progress)
    run.total = 1 + (len(calibration) * (1 + len(fewer)) if fewer else 0)
    run.total += samples * (1 + len(contenders) + len(fora) + len({(c.name, c.beside) for c in fewer}))
    run.all([full], calibration[:1])  # warms up: the first call is slow and would flatter the schedules
    full.clear()
    chosen, tried = choose(run, full, fewer, calibration)
    contenders += fora + chosen
    for contender in contenders:
        contender.runtime = runtime
    run.all([full, *contenders], range(seed, seed + samples))
    rows = [_row(c, full, real) for c in contenders]
    _hold_against(REFERENCES, rows, contenders, full)
    result = {
        "format": "sodaprof.evaluation", "version": 1, "samples": samples, "seed": seed, "guidance_scale": scale,
        "device": str(getattr(pipe, "device", "cpu")), "machine": platform.machine(),
        "threads": torch.get_num_threads(), "dtype": model.shape["dtype"], "versions": versions(),
        "runtime": runtime, "full": {"seconds_a_sample": full.seconds / samples} | _judged(full, {"data": real}),
        "rows": rows, "candidates": tried,
        "notes": _notes(samples, classifier, candidates, controls)
        + (["Wall-clock of the schedules includes tracing in their first batches."] if runtime != "hooks" else []),
    }  # fmt: skip
    shown = {f"{c.name} {c.speedup:.2f}x": joined(c.pictures)[:SHOWN] for c in contenders}
    return result | {"pictures": {"full": joined(full.pictures)[:SHOWN]} | shown}


def _row(c: Contender, full: Contender, real: np.ndarray | None) -> dict[str, Any]:
    a, b = joined(c.pictures), joined(full.pictures)
    quality = psnr_db(a, b)
    row: dict[str, Any] = {
        "name": c.name,
        "detail": c.detail,
        "works_by": works_by(c),
        "flops_speedup": round(c.speedup, 4),
        "wall_speedup": round(full.seconds / c.seconds, 3),
        "psnr_db": mean_interval(quality) | {"worst_decile": worst_decile(quality)},
        "flipped": flipped(quality),
        "ssim": float(ssim(a, b).mean()),
        "latent_l2": float(relative_l2(joined(c.latents), joined(full.latents)).mean()) if c.latents else None,
    } | _judged(c, {"full": joined(full.features) if full.features else None, "data": real})
    if real is not None and "distance" in row:
        over = kernel_difference(joined(c.features), joined(full.features), real)
        row["distance"]["data"]["kernel_over_full"] = over
    if c.schedule is not None:
        row |= {"policy": c.schedule.policy["name"], "planned": dict(c.schedule.counts()), "executed": c.executed}
    return row


def _judged(c: Contender, sides: dict[str, np.ndarray | None]) -> dict[str, Any]:
    """Returns what the classifier says of the contender's pictures: class accuracy, and how far they are from each side."""
    found: dict[str, Any] = {"accuracy": float(joined(c.hits).mean())} if c.hits else {}
    features = joined(c.features) if c.features else np.empty((0, 0))
    if len(features) >= LEAST_FOR_DISTANCE:
        found["distance"] = {
            side: {"frechet": frechet_distance(features, other), "kernel": kernel_distance(features, other)}
            for side, other in sides.items()
            if other is not None
        }
    return found


def _features_of_data(classifier: Classifier | None, data: np.ndarray) -> np.ndarray:
    if classifier is None:
        raise SodaprofError("No classifier ships with this model, so no distance to data. Leave the data out.")
    if len(data) < LEAST_FOR_DISTANCE:
        raise SodaprofError(f"Found {len(data)} pictures of data; distances need at least {LEAST_FOR_DISTANCE}.")
    return features_of(classifier, data.astype(np.float32)).double().numpy()


def _hold_against(
    references: Sequence[str], rows: list[dict[str, Any]], contenders: Sequence[Contender], full: Contender
) -> None:
    """Adds to each row, under `over`, the paired PSNR differences to the schedule of nearest cost of each reference policy.

    They are of the means and of the worst deciles. A reference's own rows are left out; a reference is the policy alone,
    without a fitted update.
    """
    quality = {id(c): psnr_db(joined(c.pictures), joined(full.pictures)) for c in contenders}
    for name in references:
        known = [c for c in contenders if c.schedule and c.schedule.policy["name"] == name and not c.schedule.update]
        for row, c in zip(rows, contenders, strict=True):
            if not known or c in known:
                continue
            nearest = min(known, key=lambda k: abs(k.speedup - c.speedup))
            mine, theirs = quality[id(c)], quality[id(nearest)]
            row.setdefault("over", {})[name] = mean_interval(mine - theirs) | {
                "worst_decile": worst_decile_difference(mine, theirs), "speedup": round(nearest.speedup, 4),
            }  # fmt: skip


def _keep_apart(schedule: Schedule, seed: int, samples: int) -> None:
    used = schedule.profile or {"seed": 0, "samples": CALIBRATION}  # on these the controls are chosen
    if seed < used["seed"] + used["samples"] and used["seed"] < seed + samples:
        raise MismatchError(
            f"Evaluation seeds {seed}…{seed + samples - 1} touch the calibration seeds {used['seed']}…"
            f"{used['seed'] + used['samples'] - 1}. Choose others: --seed {used['seed'] + used['samples']}"
        )


def _calibration_seeds(schedules: Sequence[Schedule]) -> range:
    used = next((s.profile for s in schedules if s.profile is not None), None)
    first, count = (0, CALIBRATION) if used is None else (used["seed"], min(CALIBRATION, used["samples"]))
    return range(first, first + count)


def _notes(
    samples: int, classifier: Classifier | None, candidates: Sequence[Contender], controls: Sequence[str] | bool
) -> list[str]:
    notes = []
    if classifier is None:
        notes.append("No classifier ships with this model: no class accuracy, no Fréchet and kernel distance.")
    elif samples < LEAST_FOR_DISTANCE:
        notes.append(f"Fréchet and kernel distance need {LEAST_FOR_DISTANCE} samples a side; this run has {samples}.")
    if controls is True and not any(c.name.startswith(FEWER) for c in candidates):
        notes.append(
            "No fewer-step control: the sampler is neither of the DDPM family nor a flow of Euler steps, or the cost leaves "
            "under 2 steps."
        )
    return notes


def measured_record(result: dict[str, Any], row: dict[str, Any]) -> dict[str, Any]:
    """Returns what a schedule file keeps of an evaluation: one entry of its `measured`."""
    kept = ("device", "machine", "threads", "dtype", "samples", "seed", "guidance_scale", "versions")
    figures = (
        "flops_speedup", "wall_speedup", "psnr_db", "flipped", "ssim", "latent_l2", "accuracy", "distance", "over",
        "executed",
    )  # fmt: skip
    return {key: result[key] for key in kept} | {key: row[key] for key in figures if key in row}
