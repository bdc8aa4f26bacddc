"""`refine --objective distribution`: samplers and numbers of steps at one cost, decided by samples.

Each profile's schedule is fitted closed loop and drawn on the same seeds, neither the profiles' nor an evaluation's; the one
whose pictures are nearest to data, as the model's classifier sees them, is taken.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from tests.reference.data import training_pictures

from ..compiler.ranking import Ranked, rank_profiles
from ..errors import MismatchError, SodaprofError
from ..formats.cost import cost_of
from ..formats.schedule import Schedule
from ..formats.sites import Sampler
from ..measure.classifier import Classifier, load_classifier
from ..measure.contenders import Contender, Run, describe, features_of, joined
from ..measure.data import pictures_in
from ..measure.metrics import LEAST_FOR_DISTANCE, kernel_difference, kernel_distance, worst_decile
from ..pipelines.load import REFERENCE, call, default_prompts, pictures_of
from ..runtime.sampler.scheduler import scheduler_of
from .closed_loop import fit_to_model

DATA_SEED = 4_000_000  # of the drawings that samples are held against: others than an evaluation's
SEED = 500_000  # the first seed that decides: between a profile's, which start at 0, and an evaluation's, at 1 000 000


@dataclass(frozen=True)
class Judged:
    """A profile's schedule, fitted, and what its samples came to."""

    ranked: Ranked
    schedule: Schedule
    fidelity_db: float  # of the calibration generations' last latents to the profile's own full run, mean
    worst_decile_db: float
    kernel: float  # kernel distance of the samples to the data
    over_best: dict[str, float] | None  # that less the best one's, with its 95 % interval; None for the best


def refine_distribution(
    pipe: Any,
    folders: Sequence[str | Path],
    budget: str | float,
    *,
    samples: int = LEAST_FOR_DISTANCE,
    seed: int = SEED,
    prompts: Sequence[int | str] | None = None,
    data: Path | None = None,
    batch_size: int = 16,
    cost: str | Path = "flops",
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[Schedule, list[Judged], dict[str, str]]:
    """Returns the schedule whose samples are nearest to the data, all that were judged, best first, and who was left out why.

    budget, cost: as for `rank_profiles`. samples: a profile's, on the seeds from `seed` on, at least 1000. data: a folder of
    pictures of the pipeline's size; by default what a shipped model was trained on is drawn anew, then prompts are its own.
    Raises SodaprofError naming what is missing where the model has no classifier or no data, MismatchError where the seeds touch
    a profile's or the pictures are of another size.
    """
    if samples < LEAST_FOR_DISTANCE:
        raise SodaprofError(f"--samples is {samples}; distances need at least {LEAST_FOR_DISTANCE}.")
    classifier, pictures = _judges(pipe, samples, data, prompts)
    ranked, left_out = rank_profiles(folders, budget, cost)
    for one in ranked:
        used = one.profile.manifest
        if seed < used["seed"] + used["samples"] and used["seed"] < seed + samples:
            raise MismatchError(
                f"Seeds {seed}…{seed + samples - 1} touch those of {one.name}. Choose others: --seed {SEED}"
            )
    entries = default_prompts(pipe) if prompts is None else list(prompts)
    made = pictures_of(call(pipe, entries[:1], [seed], 2)).shape[1:]
    if made != pictures.shape[1:]:
        raise MismatchError(
            f"The data is of shape {pictures.shape[1:]}, the pipeline makes {made}. Give pictures of its size."
        )
    real = features_of(classifier, pictures.astype(np.float32)).double().numpy()
    run = Run(pipe, entries, batch_size, None, classifier, on_progress)
    run.total = samples * len(ranked)
    fitted: list[tuple[Ranked, Schedule, np.ndarray, np.ndarray]] = []
    for one in ranked:
        with sampled_by(pipe, one.profile.sampler):
            schedule, distances = fit_to_model(pipe, one.profile, one.schedule, cost_of(one.profile.folder, cost))
            contender = Contender("solver", describe(schedule), schedule.steps, one.speedup, schedule)
            run.scale = schedule.sampler.guidance_scale
            run.all([contender], range(seed, seed + samples))
        fitted.append((one, schedule, distances, joined(contender.features)))
    judged = _judged(fitted, real)
    kernels = {one.ranked.name: one.kernel for one in judged}
    about = {"kernel_distances": kernels, "samples": samples, "samples_seed": seed}
    best = judged[0].schedule
    policy = best.policy | {"knobs": best.policy["knobs"] | about}
    return replace(best, policy=policy), judged, left_out


def _judged(fitted: Sequence[tuple[Ranked, Schedule, np.ndarray, np.ndarray]], real: np.ndarray) -> list[Judged]:
    """Returns the candidates by their features' kernel distance to the data, least first."""
    ordered = sorted(fitted, key=lambda one: kernel_distance(one[3], real))
    nearest = ordered[0][3]
    return [
        Judged(
            ranked, schedule, float(distances.mean()), worst_decile(distances), kernel_distance(features, real),
            None if features is nearest else kernel_difference(features, nearest, real),
        )
        for ranked, schedule, distances, features in ordered
    ]  # fmt: skip


def _judges(
    pipe: Any, count: int, data: Path | None, prompts: Sequence[int | str] | None
) -> tuple[Classifier, np.ndarray]:
    """Returns the model's classifier and the pictures of data; SodaprofError naming what is missing."""
    where = Path(str(pipe.config.get("_name_or_path", "")))
    shipped = where.parent == REFERENCE
    classifier = load_classifier(where)
    missing = [] if classifier else [f"a classifier (a folder {where / 'classifier'} of sodaprof's format)"]
    missing += [] if shipped or data else ["pictures of what it was trained on (--data FOLDER)"]
    if classifier is None or missing:
        raise SodaprofError(
            f"Objective distribution judges samples by their distance to data; missing: {' and '.join(missing)}. Without them, "
            "--objective faithful stays near to one full run."
        )
    if data is not None:
        return classifier, pictures_in(data, LEAST_FOR_DISTANCE)
    if prompts is not None:
        raise SodaprofError(
            "The shipped data is of the shipped prompts. Leave --prompts out, or give --data FOLDER, too."
        )
    return classifier, training_pictures(where.name, count, DATA_SEED)


@contextmanager
def sampled_by(pipe: Any, sampler: Sampler) -> Iterator[None]:
    """Puts the sampler's scheduler in place of the pipeline's while the block runs."""
    own = pipe.scheduler
    pipe.scheduler = scheduler_of(sampler)
    try:
        yield
    finally:
        pipe.scheduler = own
