"""`evaluate`: the same seeds with and without each schedule, next to controls at the same cost."""

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
from ..pipelines.entries import check_entries, default_prompts
from ..pipelines.flops import count_flops
from ..pipelines.load import check_seeds
from ..runtime.apply import runtime_settings
from ..runtime.checks import check_matches
from . import metrics
from .classifier import Classifier, load_classifier
from .contenders import Comparison, Contender, Samples, choose_spacings, contender_of, control_candidates, features_of
from .data import check_enough

SEED = 1_000_000  # the first evaluation seed: far from the calibration seeds, which start at 0
CALIBRATION = 8  # seeds of the profile on which the controls' spacings are chosen
MOST_SAMPLES = 1_000_000
SHOWN = 8  # pictures kept of every contender
REFERENCES = ("fora", "soda")  # policies that every other row is compared with, seed by seed


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
    graphs: bool = True,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Any]:
    """Returns what each schedule costs in fidelity and gains in speed on the same held-out seeds, as plain data.

    `rows` holds the schedules and their controls, `full` the full run, `candidates` every spacing tried for the
    fewer-step controls on calibration seeds, `pictures` the first few of each as float arrays [n, H, W, 3] ([n, F, H, W, 3]
    of clips).
    controls: all, none, or the names of some ("fora", "fewer steps, DDIM"). budget: the speed-up that the controls get; by
    default what each schedule reaches.
    data: pictures [n, H, W, 3] in [0, 1] that the model was trained on. n and samples must be at least 1000; the Fréchet and
    kernel distances to them are then reported in addition to those to the full run.
    runtime: hooks, compiled or whole-steps, for the schedules and FORA; the pictures of the first two are the same. graphs:
    capture CUDA graphs on a GPU.
    Raises MismatchError if evaluation seeds are calibration seeds of a schedule, or schedules or data differ in sampler or
    size, SodaprofError for settings that cannot be evaluated.
    """
    if not 2 <= samples <= MOST_SAMPLES:
        wanted = "at least 2" if samples < 2 else f"2 to {MOST_SAMPLES:,}"
        raise SodaprofError(f"--samples is {samples}; expected {wanted}.")
    seeds = range(seed, seed + samples)
    _check_request(pipe, schedules, seeds)
    runtime_settings(runtime, graphs)
    sampler = schedules[0].sampler
    scale = sampler.guidance_scale if guidance_scale is None else guidance_scale
    entries = check_entries(pipe, default_prompts(pipe) if prompts is None else prompts)
    classifier = load_classifier(Path(str(pipe.config.get("_name_or_path", ""))))
    real = None if data is None else _features_of_data(classifier, data, samples)
    model, _, step = inspect_pipeline(pipe, "", sampler.steps, scale, entries[0])
    cost = count_flops(pipe, model, step)

    named = zip(names or [s.policy["name"] for s in schedules], schedules, strict=True)
    contenders = [contender_of(name, schedule, cost) for name, schedule in named]
    candidates = control_candidates(schedules, model, cost, budget, controls)
    comparison = Comparison(pipe, entries, batch_size, scale, classifier, runtime, graphs, on_progress)
    full, pairs, tried = _sample(comparison, contenders, candidates, seeds, data)
    about = {
        "samples": samples, "seed": seed, "guidance_scale": scale, "device": str(getattr(pipe, "device", "cpu")),
        "machine": platform.machine(), "threads": torch.get_num_threads(), "dtype": model.shape["dtype"],
        "versions": versions(), "runtime": runtime,
    }  # fmt: skip
    controlled = controls is not True or any(c.control is not None for c in candidates)
    notes = _notes(samples, classifier is not None, controlled, runtime)
    result = _result(about, full, pairs, real) | {"candidates": tried, "notes": notes}
    shown = {"full": full} | {f"{c.name} {c.speedup:.2f}x": one for c, one in pairs}
    return result | {"pictures": {name: one.pictures[:SHOWN] for name, one in shown.items()}}


def _sample(
    comparison: Comparison,
    contenders: list[Contender],
    candidates: list[Contender],
    seeds: range,
    data: np.ndarray | None,
) -> tuple[Samples, list[tuple[Contender, Samples]], list[dict[str, Any]]]:
    """Returns the samples of the full run, of each schedule and control, and all spacings that were tried.

    contenders: the schedules. candidates: the controls; of fewer steps, the best spacing on calibration seeds is taken.
    Raises MismatchError if the data has another size than the pipeline's pictures.
    """
    schedules = [c.schedule for c in contenders if c.schedule is not None]
    used = next((s.profile for s in schedules if s.profile is not None), {"seed": 0, "samples": CALIBRATION})
    calibration = range(used["seed"], used["seed"] + min(CALIBRATION, used["samples"]))
    fewer = [c for c in candidates if c.control is not None]
    contenders = contenders + [c for c in candidates if c.control is None]
    steps = schedules[0].steps
    full = Contender("full", f"{steps} steps", steps, 1.0)
    comparison.total = 1 + (len(calibration) * (1 + len(fewer)) if fewer else 0)
    comparison.total += len(seeds) * (1 + len(contenders) + len({(c.name, c.count) for c in fewer}))
    (warm_up,) = comparison.sample([full], calibration[:1])  # the first call is slow and would flatter the schedules
    if data is not None and data.shape[1:] != (made := warm_up.pictures.shape[1:]):
        raise MismatchError(
            f"The data is of shape {data.shape[1:]}, the pipeline makes {made}. Give pictures of that size."
        )
    chosen, tried = choose_spacings(comparison, full, fewer, calibration)
    contenders += chosen
    reference, *sampled = comparison.sample([full, *contenders], seeds)
    return reference, list(zip(contenders, sampled, strict=True)), tried


def _check_request(pipe: Any, schedules: Sequence[Schedule], seeds: range) -> None:
    """Raises SodaprofError unless these schedules can be compared on these seeds of this pipeline."""
    check_seeds(seeds)
    if not schedules:
        raise SodaprofError("No schedule to evaluate. Type: sodaprof eval MODEL schedule.json")
    for schedule in schedules:
        if schedule.sampler.timesteps != schedules[0].sampler.timesteps:
            raise MismatchError("The schedules are for different timesteps; evaluate them in separate calls.")
        used = schedule.profile or {"seed": 0, "samples": CALIBRATION}  # on these the controls are chosen
        end = used["seed"] + used["samples"]
        if seeds.start < end and used["seed"] < seeds.stop:
            raise MismatchError(
                f"Evaluation seeds {seeds[0]}…{seeds[-1]} overlap the calibration seeds {used['seed']}…{end - 1}. "
                f"Choose others: --seed {end}"
            )
        check_matches(pipe, schedule)


def _features_of_data(classifier: Classifier | None, data: np.ndarray, samples: int) -> np.ndarray:
    check_enough(samples)
    if classifier is None:
        raise SodaprofError("No classifier ships with this model, so no distance to data. Leave the data out.")
    if len(data) < metrics.LEAST_FOR_DISTANCE:
        raise SodaprofError(
            f"Found {len(data)} pictures of data; distances need at least {metrics.LEAST_FOR_DISTANCE}."
        )
    return features_of(classifier, data.astype(np.float32)).double().numpy()


def _result(
    about: dict[str, Any], full: Samples, pairs: Sequence[tuple[Contender, Samples]], real: np.ndarray | None
) -> dict[str, Any]:
    """Returns the result without candidates, notes and pictures; real: the data's features."""
    quality = [samples.psnr_db(full) for _, samples in pairs]
    rows = [_row(c, samples, full, db, real) for (c, samples), db in zip(pairs, quality, strict=True)]
    _add_differences(rows, [c for c, _ in pairs], quality)
    of_full = {"seconds_a_sample": full.seconds / about["samples"]} | _classified(full, {"data": real})
    return {"format": "sodaprof.evaluation", "version": 1} | about | {"full": of_full, "rows": rows}


def _row(c: Contender, samples: Samples, full: Samples, quality: np.ndarray, real: np.ndarray | None) -> dict[str, Any]:
    """Returns a contender's row; quality: the PSNR of its pictures to the full run's, [n]; real: the data's features."""
    latents = samples.latents
    row: dict[str, Any] = {
        "name": c.name,
        "detail": c.detail,
        "works_by": c.works_by(),
        "flops_speedup": round(c.speedup, 4),
        "wall_speedup": round(full.seconds / samples.seconds, 3),
        "psnr_db": metrics.mean_interval(quality) | {"worst_decile": metrics.worst_decile(quality)},
        "flipped": metrics.flipped(quality),
        "ssim": float(metrics.ssim(samples.pictures, full.pictures).mean()),
        "latent_l2": None if latents is None else float(metrics.relative_l2(latents, full.latents).mean()),
    } | _classified(samples, {"full": full.features, "data": real})
    if real is not None:
        difference = metrics.kernel_difference(samples.features, full.features, real)
        row["distance"]["data"]["kernel_over_full"] = difference
    if c.schedule is not None:
        planned = dict(c.schedule.counts())
        row |= {"policy": c.schedule.policy["name"], "planned": planned, "executed": samples.executed}
    return row


def _classified(samples: Samples, sides: dict[str, np.ndarray | None]) -> dict[str, Any]:
    """Returns the class accuracy of the pictures and their distances to the features of each side, as far as there are any."""
    found: dict[str, Any] = {} if samples.hits is None else {"accuracy": float(samples.hits.mean())}
    features = samples.features
    if features is not None and len(features) >= metrics.LEAST_FOR_DISTANCE:
        kinds = {"frechet": metrics.frechet_distance, "kernel": metrics.kernel_distance}
        found["distance"] = {
            side: {name: distance(features, other) for name, distance in kinds.items()}
            for side, other in sides.items()
            if other is not None
        }
    return found


def _add_differences(
    rows: list[dict[str, Any]], contenders: Sequence[Contender], quality: Sequence[np.ndarray]
) -> None:
    """Adds to each row, under `over`, the paired PSNR differences to the schedule of nearest cost of each reference policy.

    They are of the means and of the worst deciles. A reference's own rows are left out; a reference is the policy alone,
    without a fitted update.
    """
    for name in REFERENCES:
        known = [
            (c, db)
            for c, db in zip(contenders, quality, strict=True)
            if c.schedule and c.schedule.policy["name"] == name and not c.schedule.update
        ]
        for row, contender, of_row in zip(rows, contenders, quality, strict=True):
            if not known or any(c is contender for c, _ in known):
                continue
            nearest, of_nearest = min(known, key=lambda one: abs(one[0].speedup - contender.speedup))
            row.setdefault("over", {})[name] = metrics.mean_interval(of_row - of_nearest) | {
                "worst_decile": metrics.worst_decile_difference(of_row, of_nearest), "speedup": round(nearest.speedup, 4),
            }  # fmt: skip


def _notes(samples: int, classified: bool, controlled: bool, runtime: str) -> list[str]:
    """Returns what the result lacks; controlled: the controls are as asked for."""
    notes, least = [], metrics.LEAST_FOR_DISTANCE
    if not classified:
        notes.append("No classifier ships with this model: no class accuracy, no Fréchet and kernel distance.")
    elif samples < least:
        notes.append(f"Fréchet and kernel distance need {least} samples; this run has {samples}.")
    if not controlled:
        notes.append(
            "No fewer-step control: the sampler is neither of the DDPM family nor a flow of Euler steps, or the cost leaves "
            "under 2 steps."
        )
    if runtime != "hooks":
        notes.append("Wall-clock of the schedules includes tracing in their first batches.")
    return notes


def measured_record(result: dict[str, Any], row: dict[str, Any]) -> dict[str, Any]:
    """Returns what a schedule file keeps of an evaluation: one entry of its `measured`."""
    kept = ("device", "machine", "threads", "dtype", "samples", "seed", "guidance_scale", "versions")
    figures = (
        "flops_speedup", "wall_speedup", "psnr_db", "flipped", "ssim", "latent_l2", "accuracy", "distance", "over",
        "executed",
    )  # fmt: skip
    return {key: result[key] for key in kept} | {key: row[key] for key in figures if key in row}
