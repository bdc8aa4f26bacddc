"""Predictions of a schedule's error from the profile alone, and how they agree with the true one."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.stats import rankdata, spearmanr

from sodaprof.compiler import placement as one_past
from sodaprof.compiler.fit import Span, fit_open_loop, jump_costs
from sodaprof.compiler.forecasts import ridge, segment_costs, taylor
from sodaprof.compiler.placement import place_full_steps
from sodaprof.formats.profile import Profile
from sodaprof.formats.sampler import MAX_HISTORY
from tests.studies.proxy_truth import anchors_of, columns_at, longest_interval

Predict = Callable[[Sequence[int]], float]  # full steps -> predicted error; inf where the profile does not reach
RESAMPLES = 1000
FAMILIES = ("updates", "reuse", "forecasts")
SOLVER, EVEN = "state-space residual, squares summed (`solver`)", "even intervals (FORA)"


@dataclass(frozen=True)
class Predictor:
    """A prediction that is a sum over intervals. segment: what an interval costs, as `place_full_steps` takes it."""

    key: str
    name: str
    segment: np.ndarray
    first: int = 1  # steps at the beginning that its policy computes in any case; read where full steps are placed

    def __call__(self, anchors: Sequence[int]) -> float:
        return summed(self.segment, anchors)

    def placed(self, count: int) -> list[int]:
        """Returns the full steps of least predicted error, as its policy would place them."""
        return place_full_steps(self.placing(), count)[count][0]

    def placing(self) -> np.ndarray:
        """Returns the segments as its policy prices them."""
        segment = self.segment.copy()
        segment[: self.first - 1, ..., 2:] = np.inf
        return segment


def summed(segment: np.ndarray, anchors: Sequence[int]) -> float:
    """Returns the cost of all intervals; segment [T, (longest + 1)^(history − 1) …, longest + 1]."""
    steps, longest, depth = len(segment), segment.shape[-1] - 1, segment.ndim - 2
    total = 0.0
    for i, (anchor, end) in enumerate(itertools.pairwise([*anchors, steps])):
        past = [b - a for a, b in itertools.pairwise(anchors[max(0, i - depth) : i + 1])][::-1]
        if max([end - anchor, *past]) > longest:
            return float("inf")
        total += float(segment[(anchor, *past, *[0] * (depth - len(past)), end - anchor)])
    return total


def predictors(profile: Profile) -> list[Predictor]:
    """Returns the predictions that are sums over intervals; of a model with one transformer."""
    ((name, sites),) = profile.site_products().items()
    drift, output = (profile.stack_products()[name][form][None] for form in ("drift", "output"))
    longest, span = profile.max_age + 1, span_of(profile)
    missed = jump_costs(span)
    reuse = {metric: np.nansum(profile.caching_error(metric)[name], axis=1) for metric in ("cos", "l2")}
    first_order = taylor("published")
    return [
        Predictor("cosine", "1 − cosine of every reused site (SODA)", one_past.reuse_segment_costs(reuse["cos"])),
        Predictor("l2", "relative L2 error of every reused site", one_past.reuse_segment_costs(reuse["l2"])),
        Predictor(
            "energy", "the same, each site by its share of the energy", one_past.reuse_segment_costs(by_energy(sites, longest))
        ),
        Predictor("guidance", "the same, by branch: s · with + (s − 1) · without", one_past.reuse_segment_costs(guided(profile))),
        Predictor("site-taylor", "relative L2 error of site forecasts, Taylor order 1",
                  segment_costs(sites, 2, longest, first_order), first=2),
        Predictor("site-fit", "relative L2 error of site forecasts, fitted, squared (`fit`)",
                  segment_costs(sites, 2, longest, ridge(1e-4), 2.0)),
        Predictor("dpcache", "relative L2 error of the last block, Taylor order 1 (DPCache)",
                  segment_costs(output, 2, longest, first_order), first=3),
        Predictor("drift", "relative L2 error of the stack's drift, fitted, squared (`drift`)",
                  segment_costs(drift, 3, longest, ridge(1e-4), 2.0)),
        Predictor("residual", "state-space residual, summed", np.sqrt(missed)),
        Predictor("residual-squared", SOLVER, missed),
    ]  # fmt: skip


def span_of(profile: Profile, with_response: bool = True) -> Span:
    """Returns the profile's span, with the response that it measured or without."""
    return Span(profile.state_products(), profile.own_update(), profile.response() if with_response else None)


def simulations(profile: Profile, family: str) -> dict[str, tuple[str, Predict]]:
    """Returns {key: (name, prediction)}: the last state's error under the family's action, simulated on the profile."""
    return {
        "simulated-off": (
            "simulated last state, network's response left out",
            simulator(span_of(profile, False), family),
        ),
        "simulated": ("simulated last state, with the measured response", simulator(span_of(profile), family)),
    }


def simulator(span: Span, family: str) -> Predict:
    """Returns the relative error of the last state with full steps somewhere, within the span of the profile's vectors.

    updates: the open-loop fit's own. reuse: the newest guided output held, forecasts: it and the one before weighed as
    policy `forecast` weighs sites, under the sampler's own coefficients.
    """
    if family == "updates":
        return lambda anchors: fit_open_loop(span, anchors, MAX_HISTORY)[1]
    recorded = np.stack([span.full_output(step) for step in range(span.steps)])
    products = (recorded @ span.products @ recorded.T)[None]
    history, weigh = (1 if family == "reuse" else 2), ridge(1e-4)

    def predict(anchors: Sequence[int]) -> float:
        x, known, full = span.state(0), list[np.ndarray](), dict[int, np.ndarray]()
        for step in range(span.steps):
            if step in anchors:
                full[step] = span.output(step, x)
                value = full[step]
            else:
                sources = np.array(sorted(full, reverse=True)[:history])
                weights = weigh(products, sources, np.array([step]))[0, :, 0]
                value = sum((w * full[s] for w, s in zip(weights, sources.tolist(), strict=True)), np.zeros_like(x))
            known = [value, *known][: span.own.history]
            row = span.own.coefficients[step]
            x = row[0] * x + sum(c * v for c, v in zip(row[1:], known, strict=False)) + span.noise(step)
        final = span.state(span.steps)
        return span.length(x - final) / span.length(final)

    return predict


def by_energy(products: np.ndarray, longest: int) -> np.ndarray:
    """Returns the error of reuse [T, longest] of all sites [S, T, T] together, relative to the energy of all together."""
    steps = products.shape[1]
    energy = np.diagonal(products, axis1=1, axis2=2)  # [S, T]
    error = np.zeros((steps, longest))
    for age in range(1, longest):
        now = np.arange(age, steps)
        missed = energy[:, now] + energy[:, now - age] - 2 * products[:, now, now - age]
        error[now, age] = np.sqrt(np.maximum(missed, 0.0).sum(axis=0) / energy[:, now].sum(axis=0))
    return error


def guided(profile: Profile) -> np.ndarray:
    """Returns the error of reuse [T, ages + 1] summed over sites, branches weighed as guidance weighs the network's outputs.

    The branch with the condition is the first, as in DiT's pipeline.
    """
    scale, branches = profile.manifest["guidance_scale"], []
    for branch in (0, 1):
        (errors,) = profile.caching_error("l2", branch).values()
        branches.append(np.nansum(errors, axis=1))
    weighed: np.ndarray = scale * branches[0] + abs(1 - scale) * branches[1]
    return weighed


def agreement(predicted: np.ndarray, error: np.ndarray, seed: int = 0) -> dict[str, float]:
    """Returns Spearman's coefficient and its 95 % interval over the schedules (bootstrap, percentiles)."""
    rho = float(spearmanr(predicted, error).statistic)
    index = np.random.default_rng(seed).integers(len(error), size=(RESAMPLES, len(error)))
    ranks = [rankdata(values[index], axis=1) for values in (predicted, error)]
    a, b = (r - r.mean(axis=1, keepdims=True) for r in ranks)
    low, high = np.percentile((a * b).sum(1) / np.sqrt((a * a).sum(1) * (b * b).sum(1)), [2.5, 97.5])
    return {"rho": round(rho, 4), "low": round(float(low), 4), "high": round(float(high), 4)}


def study(profile: Profile, family: str, truth: Mapping[str, Sequence[float]], every: Sequence[str]) -> dict[str, Any]:
    """Returns how each prediction agrees with the true distances (dB, by generation) of those schedules that all tables cover."""
    steps, longest = profile.sampler.steps, profile.max_age + 1
    covered = [columns for columns in every if longest_interval(anchors_of(columns), steps) <= longest]
    full = [anchors_of(columns) for columns in covered]
    distances = np.array([truth[columns] for columns in covered])  # [schedules, generations]
    error, half = -distances.mean(axis=1), distances.shape[1] // 2
    rows: list[tuple[str, str, Predict]] = [(p.key, p.name, p) for p in predictors(profile)]
    rows += [(key, name, predict) for key, (name, predict) in simulations(profile, family).items()]
    return {
        "schedules": len(covered),
        "mean_db": round(float(-error.mean()), 2), "best_db": round(float(-error.min()), 2),
        "worst_db": round(float(-error.max()), 2),
        "halves": agreement(-distances[:, :half].mean(axis=1), -distances[:, half:].mean(axis=1)),
        "predictors": [
            {"key": key, "name": name} | agreement(np.array([predict(some) for some in full]), error)
            for key, name, predict in rows
        ],
    }  # fmt: skip


def uniform(steps: int, count: int, forced: bool) -> list[int]:
    """Returns evenly spread full steps, with the last step among them (forced) or as FORA places them."""
    return [round(i * (steps - 1) / (count - 1)) if forced else round(i * steps / count) for i in range(count)]


def growing(steps: int, count: int) -> list[int]:
    """Returns full steps whose intervals grow linearly, the first and the last step among them."""
    whole = count * (count - 1) / 2
    return [round((steps - 1) * i * (i + 1) / 2 / whole) for i in range(count)]


def regret(distances: Mapping[str, float], chosen: str) -> dict[str, float]:
    """Returns a schedule's distance, what it lacks to the best of all, in dB, and the share of all that are better."""
    values = np.array(list(distances.values()))
    return {
        "db": round(distances[chosen], 2),
        "regret_db": round(float(values.max() - distances[chosen]), 2),
        "better": round(float((values > distances[chosen]).mean()), 4),
    }


def placements(profile: Profile, every: Sequence[str], count: int) -> list[dict[str, Any]]:
    """Returns what each policy chooses: among `every` schedule, and left to itself (None where that is the same search)."""
    steps, full = profile.sampler.steps, {columns: anchors_of(columns) for columns in every}
    found = []
    for p in predictors(profile):
        segment = p.placing()
        errors = {columns: summed(segment, anchors) for columns, anchors in full.items()}
        found.append({
            "key": p.key, "name": p.name, "chosen": min(errors, key=errors.__getitem__),
            "free": columns_at(p.placed(count), steps),
        })  # fmt: skip
    for key, (name, predict) in simulations(profile, "updates").items():
        errors = {columns: predict(anchors) for columns, anchors in full.items()}
        found.append(
            {"key": key, "name": f"{name} (update)", "chosen": min(errors, key=errors.__getitem__), "free": None}
        )
    even, grown = uniform(steps, count, True), growing(steps, count)
    shrunk = [steps - 1 - step for step in reversed(grown)]
    return [
        *found,
        {"key": "uniform", "name": EVEN, "chosen": columns_at(even, steps),
         "free": columns_at(uniform(steps, count, False), steps)},
        {"key": "growing", "name": "growing intervals", "chosen": columns_at(grown, steps), "free": None},
        {"key": "shrinking", "name": "shrinking intervals", "chosen": columns_at(shrunk, steps), "free": None},
    ]  # fmt: skip


def compared(placed: Mapping[str, str], truth: Mapping[str, Sequence[float]], judged: int) -> list[dict[str, Any]]:
    """Returns for each placement (name: columns) its distance, dB, and what it gains over policy `solver`'s placement.

    The interval of the gain is a bootstrap over the `judged` held-out generations, paired.
    """
    values = {name: np.array(truth[columns][:judged]) for name, columns in placed.items()}
    index = np.random.default_rng(0).integers(judged, size=(RESAMPLES, judged))
    rows = []
    for name, columns in placed.items():
        gain = values[name] - values[SOLVER]
        low, high = np.percentile(gain[index].mean(axis=1), [2.5, 97.5])
        rows.append({
            "name": name, "anchors": anchors_of(columns), "db": round(float(values[name].mean()), 2),
            "gain_db": round(float(gain.mean()), 2), "low": round(float(low), 2), "high": round(float(high), 2),
        })  # fmt: skip
    return rows


def oracle(
    placed: Sequence[Mapping[str, Any]], truth: Mapping[str, Sequence[float]], every: Sequence[str], judged: int
) -> dict[str, Any]:
    """Returns the regret of each placement, and what the best, the median and the best on calibration reach.

    truth: distances in dB of the `judged` held-out generations, then of those that were fitted on, if any.
    """
    held_out = {columns: float(np.mean(truth[columns][:judged])) for columns in every}
    best = max(held_out, key=held_out.__getitem__)
    rows = []
    for one in placed:
        free = None if one["free"] is None else round(float(np.mean(truth[one["free"]][:judged])), 2)
        rows.append({"key": one["key"], "name": one["name"], "anchors": anchors_of(one["chosen"]), "free_db": free}
                    | regret(held_out, one["chosen"]))  # fmt: skip
    if len(truth[best]) > judged:
        tuned = max(every, key=lambda columns: float(np.mean(truth[columns][judged:])))
        rows.append({"key": "calibrated", "name": "best of all on the calibration generations", "free_db": None,
                     "anchors": anchors_of(tuned)} | regret(held_out, tuned))  # fmt: skip
    values = np.array(list(held_out.values()))
    return {
        "schedules": len(every), "best": anchors_of(best), "best_db": round(held_out[best], 2),
        "median_db": round(float(np.median(values)), 2), "worst_db": round(float(values.min()), 2),
        "rows": rows,
    }  # fmt: skip
