"""Objective `distribution`: profiles of one model under several samplers and numbers of steps, at one absolute cost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..errors import BudgetError, MismatchError, SodaprofError, UnsupportedModelError
from ..formats.cost import CostModel, cost_of
from ..formats.profile import Profile, load_profile
from ..formats.rules import verify
from ..formats.schedule import Schedule
from . import DEPTH, parse_budget
from .policies.solver import compile_solver
from .problem import reuse_only_cost, within_cache


@dataclass(frozen=True)
class Ranked:
    """A profile's schedule by policy solver, at the cost that all of them share."""

    name: str  # the folder as it was given
    profile: Profile
    schedule: Schedule
    speedup: float  # against the first profile's full loop

    @property
    def error(self) -> float:
        """Predicted relative error of the last state, against the profile's own full run."""
        return float((self.schedule.predicted or {})["error"])


def rank_profiles(
    folders: Sequence[str | Path],
    budget: str | float,
    cost: str | Path = "flops",
    knobs: dict[str, Any] | None = None,
    max_cache: int | None = None,
) -> tuple[list[Ranked], dict[str, str]]:
    """Returns the profiles' schedules by predicted error, least first, and why others were left out, by folder.

    budget: what the first profile's full loop is to cost over what each schedule may; the others are compiled for what that
    comes to in their own numbers of steps. cost: as for `compile_schedule`. A predicted error is against the profile's own full
    run: none says how good that is, so a sampler of few steps is easily followed. Raises MismatchError for profiles of different
    models, BudgetError where no profile can be compiled at this cost.
    """
    ratio = parse_budget(budget)
    if len(folders) < 2 or len({Path(f).resolve() for f in folders}) < len(folders):
        raise SodaprofError(
            f"Objective distribution ranks several profiles; found {', '.join(map(str, folders))}. Make another: sodaprof "
            "profile MODEL --scheduler UniPCMultistepScheduler --steps 20 -o DIR"
        )
    profiles = [load_profile(folder) for folder in folders]
    for profile in profiles:
        _check_same_model(profiles[0], profile)
    found, left_out, allowed = [], {}, 0.0
    for folder, profile in zip(folders, profiles, strict=True):
        table = cost_of(profile.folder, cost)
        full, _ = reuse_only_cost(profile.model, profile.sampler, table)
        allowed = allowed or full / ratio
        try:
            schedule = _compiled(profile, table, full / allowed, knobs or {}, max_cache)
        except (BudgetError, UnsupportedModelError) as error:
            left_out[str(folder)] = str(error)
        else:
            found.append(Ranked(str(folder), profile, schedule, allowed * ratio / table.schedule(schedule)))
    if not found:
        told = " ".join(f"{name}: {reason}" for name, reason in left_out.items())
        raise BudgetError(f"No profile can be compiled at this cost. {told}")
    ranked = sorted(found, key=lambda one: one.error)
    return [replace(one, schedule=_signed(one, ratio, ranked)) for one in ranked], left_out


def _compiled(
    profile: Profile, table: CostModel, ratio: float, knobs: dict[str, Any], max_cache: int | None
) -> Schedule:
    """Returns the profile's schedule at a speed-up of its own, which is below 1 where the cost leaves more than its full loop."""

    def compile_with(more: dict[str, Any]) -> Schedule:
        return compile_solver(profile.model, profile.sampler, profile, table, ratio, knobs | more)

    schedule = compile_with({})
    if max_cache is not None:
        schedule = within_cache(
            schedule, max_cache, None if DEPTH["solver"] in knobs else DEPTH["solver"], compile_with, profile
        )
    verify(schedule)
    return schedule


def _signed(one: Ranked, ratio: float, ranked: Sequence[Ranked]) -> Schedule:
    """Returns the schedule, which remembers what it was ranked with."""
    about = {"objective": "distribution", "budget": ratio, "predicted_errors": {r.name: r.error for r in ranked}}
    return replace(one.schedule, policy=one.schedule.policy | {"knobs": one.schedule.policy["knobs"] | about})


def _check_same_model(first: Profile, other: Profile) -> None:
    if (first.model.transformers, first.model.shape["latent"]) != (
        other.model.transformers,
        other.model.shape["latent"],
    ):
        raise MismatchError(
            f"{other.folder} is of {other.model.name} with latents {other.model.shape['latent']}, {first.folder} of "
            f"{first.model.name} with {first.model.shape['latent']}. Give profiles of one model."
        )
