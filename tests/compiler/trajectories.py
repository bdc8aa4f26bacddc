"""Outputs over sampling steps as explicit vectors, and their inner products as a profile would hold them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import pairwise

import numpy as np
import pytest

from sodaprof.formats.profile import Profile
from sodaprof.formats.schedule import Schedule


def wandering(sites: int, steps: int, seed: int = 0) -> np.ndarray:
    """Returns outputs [G = 3, S, T, D = 12] that are smooth in time except for a little noise, and not evenly fast."""
    rng = np.random.default_rng(seed)
    t = np.linspace(0, 1, steps)
    curves = np.stack([np.ones(steps), t, t**2, np.sin(4 * t), np.exp(-9 * t), np.tanh(12 * (t - 0.7))])
    mixed = np.einsum("gskd,kt->gstd", rng.normal(size=(3, sites, len(curves), 12)), curves)
    return mixed + 0.02 * rng.normal(size=mixed.shape)


def polynomial(degree: int, sites: int, steps: int) -> np.ndarray:
    """Returns outputs [1, S, T, D = 12] that are a polynomial of the step's number, scaled to [0, 1]."""
    powers = np.linspace(0, 1, steps) ** np.arange(degree + 1)[:, None]
    return np.einsum("gskd,kt->gstd", np.random.default_rng(0).normal(size=(1, sites, degree + 1, 12)), powers)


def products(values: np.ndarray, history: int | None = None) -> np.ndarray:
    """Returns the mean inner products [S, T, T] of values [G, S, T, D], NaN for steps more than `history` apart."""
    found = np.einsum("gstd,gsud->stu", values, values) / len(values)
    if history is not None:
        steps = np.arange(values.shape[2])
        found[:, np.abs(steps[:, None] - steps) > history] = np.nan
    return found


def known_products(
    patch: pytest.MonkeyPatch, sites: Mapping[str, np.ndarray], stacks: Mapping[str, Mapping[str, np.ndarray]]
) -> None:
    """Makes every profile return these inner products: of the sites' outputs, of the stacks' output and drift."""
    patch.setattr(Profile, "site_products", lambda profile: sites)
    patch.setattr(Profile, "stack_products", lambda profile: stacks)


def error_of(values: np.ndarray, target: int, sources: tuple[int, ...], weights: tuple[float, ...]) -> float:
    """Returns the relative L2 error of a forecast of values [G, T, D]: roots of mean squares over the generations."""
    forecast = sum(w * values[:, s] for s, w in zip(sources, weights, strict=True))
    squared = ((forecast - values[:, target]) ** 2).sum(-1).mean()
    return float(np.sqrt(squared / (values[:, target] ** 2).sum(-1).mean()))


def error_in(schedule: Schedule, name: str, values: np.ndarray) -> float:
    """Returns Σ error^power over all F or S cells of a schedule, given the values [G, S, T, D] that they forecast."""
    power = schedule.policy["knobs"].get("power", 1.0)
    plan = schedule.transformers[name]
    rows = [(row, "F", plan.forecasts.get(site, ())) for site, row in plan.rows.items()]
    if "S" in plan.stack:
        rows = [(plan.stack, "S", plan.stack_forecasts)]
    total = 0.0
    for i, (row, action, cells) in enumerate(rows):
        steps = [t for t, a in enumerate(row) if a == action]
        total += sum(
            error_of(values[:, i], t, c.sources, c.weights) ** power for t, c in zip(steps, cells, strict=True)
        )
    return total


def segment_error(segment: np.ndarray, anchors: list[int]) -> float:
    """Sums the errors of the segments between full steps; inf if an interval is longer than there are entries."""
    steps, longest, gaps = len(segment), segment.shape[-1] - 1, segment.ndim - 2
    total = 0.0
    for i, (anchor, end) in enumerate(pairwise([*anchors, steps])):
        before = [b - a for a, b in pairwise(anchors[: i + 1])][::-1][:gaps]
        if end - anchor > longest:
            return math.inf
        total += segment[(anchor, *before, *[0] * (gaps - len(before)), end - anchor)]
    return total
