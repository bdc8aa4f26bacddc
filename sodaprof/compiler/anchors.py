"""The dynamic program that places anchor steps (SODA, DCS)."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product

import numpy as np

Placements = dict[int, tuple[list[int], float]]  # number of anchors -> the cheapest placement and its cost


def place_anchors(segment: np.ndarray, steps: int, most: int | None = None) -> Placements:
    """Returns for every possible number of anchors the cheapest placement and its cost: {count: (anchors, cost)}.

    segment [T, n_max + 1]: cost of an anchor at step t that serves the n − 1 steps after it (n = 1: none); entries with
    t + n > T are ignored. Step 0 is an anchor, the last segment runs to the end. Exact, O(most · T · n_max):

        dp[t][i + 1] = min over n of segment[t, n] + dp[t + n][i]
    """
    longest = segment.shape[1] - 1
    most = steps if most is None else min(most, steps)
    best = np.full((most + 1, steps + 1), np.inf)
    best[0, steps] = 0.0
    choice = np.zeros((most + 1, steps), dtype=int)
    for count in range(1, most + 1):
        for n in range(1, longest + 1):
            starts = np.arange(steps - n + 1)
            cost = segment[starts, n] + best[count - 1, starts + n]
            better = cost < best[count, starts]
            best[count, starts[better]] = cost[better]
            choice[count, starts[better]] = n
    found = {}
    for count in range(1, most + 1):
        if np.isfinite(best[count, 0]):
            anchors, step = [], 0
            for left in range(count, 0, -1):
                anchors.append(step)
                step += int(choice[left, step])
            found[count] = (anchors, float(best[count, 0]))
    return found


def place_in_turns(segment: np.ndarray, turns: Sequence[range]) -> Placements:
    """Returns `place_anchors` for a transformer that works in turns, at whose first steps it computes everything.

    segment: as there, of all T steps; no segment goes beyond its turn. Exact: counts of anchors are split over the turns.
    """
    found: Placements = {0: ([], 0.0)}
    for turn in turns:
        found = joined(found, place_anchors(segment[turn.start : turn.stop], len(turn)), turn.start)
    return found


def joined(before: Placements, own: Placements, start: int) -> Placements:
    """Returns the best placements of several turns by their number of anchors in all; own: of the turn from `start` on."""
    found: Placements = {}
    for (count, (anchors, error)), (more, (others, further)) in product(before.items(), own.items()):
        if count + more not in found or error + further < found[count + more][1]:
            found[count + more] = [*anchors, *(start + step for step in others)], error + further
    return found


def segment_costs(error: np.ndarray, last_only: bool = False) -> np.ndarray:
    """Returns segment [T, ages + 2] from the error of reuse by step and age, error [T, ages + 1].

    A segment of n steps serves ages 1…n−1: E_dp(t, n) = Σ_j error[t + j, j]; with `last_only` the last one alone.
    """
    steps, ages = error.shape
    segment = np.zeros((steps, ages + 1))
    for n in range(2, ages + 1):
        starts = np.arange(steps - n + 1)
        served = error[starts + n - 1, n - 1]
        segment[starts, n] = served if last_only else segment[starts, n - 1] + served
    return segment


def ages_since(anchors: list[int], steps: int) -> np.ndarray:
    """Returns the steps since the last anchor [T]; 0 at anchors."""
    is_anchor = np.zeros(steps, dtype=bool)
    is_anchor[anchors] = True
    last = np.maximum.accumulate(np.where(is_anchor, np.arange(steps), 0))
    return np.arange(steps) - last
