"""SmoothCache (arXiv 2411.10510): each kind of site is reused until its calibrated error reaches one threshold for all kinds."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import numpy as np
from msgspec.structs import replace

from ...formats.schedule import Schedule
from ..knobs import knob
from ..problem import Problem, draw_schedule


@dataclass(frozen=True)
class SmoothCacheKnobs:
    threshold: float = knob(0.0, "of the relative L1 error; 0: the smallest that meets the budget", least=0)


def compile_smoothcache(problem: Problem, knobs: SmoothCacheKnobs) -> Schedule:
    """Returns SmoothCache's schedule: C and R, one row for each kind of site.

    The error of a kind is the relative L1 error of reuse, averaged over its layers, between a step and the last one at which
    the kind was computed. Nothing is reused for longer than the profile measured.
    """
    errors = problem.tables("smoothcache").caching_error("l1")
    any_rows = draw_schedule(problem.model, problem.sampler, [], {})

    def drawn(threshold: float) -> Schedule:
        plans = {}
        for name, transformer in problem.model.transformers.items():
            past, rows = transformer.past(problem.sampler.steps), {}
            for kind in dict.fromkeys(site.kind for site in transformer.sites):
                of_kind = [i for i, site in enumerate(transformer.sites) if site.kind == kind]
                rows[kind] = row_of(errors[name][:, of_kind].mean(axis=1), past, threshold)
            of_sites = {site.key: rows[site.kind] for site in transformer.sites}
            plans[name] = replace(any_rows.transformers[name], rows=of_sites)
        return replace(any_rows, transformers=plans)

    threshold = problem.threshold(knobs.threshold, drawn, bounded=True)
    return problem.signed(drawn(threshold), "smoothcache", dataclasses.replace(knobs, threshold=threshold), None)


def row_of(error: np.ndarray, past: list[int], threshold: float) -> str:
    """Returns the row of a kind from its error of reuse [T, ages + 1]: R while that stays below the threshold."""
    row, age = "", 0
    for step, before in enumerate(past):
        age += 1
        if before < 0:
            row += "_"
        elif before == 0 or age >= error.shape[1] or not error[step, age] < threshold:
            row, age = row + "C", 0
        else:
            row += "R"
    return row
