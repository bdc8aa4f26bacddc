"""The dynamic program that places anchors, against brute force over all subsets of steps."""

from __future__ import annotations

import time
from itertools import combinations, pairwise

import numpy as np
import pytest

from sodaprof.compiler.placement import ages_since, place_anchors, reuse_segment_costs


def brute_force(segment: np.ndarray, steps: int) -> dict[int, tuple[list[int], float]]:
    """Returns {count: (anchors, cost)} by trying every subset of steps that holds step 0."""
    longest = segment.shape[1] - 1
    found: dict[int, tuple[list[int], float]] = {}
    for count in range(1, steps + 1):
        for others in combinations(range(1, steps), count - 1):
            anchors = [0, *others]
            lengths = np.diff([*anchors, steps])
            if lengths.max() <= longest:
                cost = sum(segment[t, n] for t, n in zip(anchors, lengths, strict=True))
                if count not in found or cost < found[count][1]:
                    found[count] = anchors, cost
    return found


@pytest.mark.parametrize("steps", range(1, 10))
@pytest.mark.parametrize("longest", [1, 2, 3, 5, 9])
def test_the_best_of_all_subsets_for_every_count(steps, longest):
    rng = np.random.default_rng(100 * steps + longest)
    for scale in (1.0, -1.0):  # costs need not be positive
        segment = scale * rng.random((steps, longest + 1))
        expected, found = brute_force(segment, steps), place_anchors(segment, steps)
        assert found.keys() == expected.keys()
        for count, (anchors, cost) in found.items():
            assert cost == pytest.approx(expected[count][1], abs=1e-12)
            assert anchors == expected[count][0]


def test_counts_run_from_the_longest_segments_to_every_step():
    found = place_anchors(np.ones((9, 5)), 9)  # n_max = 4
    assert list(found) == [3, 4, 5, 6, 7, 8, 9]
    assert found[9] == (list(range(9)), 9.0)
    assert list(place_anchors(np.ones((9, 5)), 9, most=4)) == [3, 4]


def test_nothing_is_read_beyond_the_last_step():
    """Entries with t + n > T may hold anything."""
    rng = np.random.default_rng(1)
    segment = rng.random((7, 4))
    poisoned = segment.copy()
    for t in range(7):
        poisoned[t, 7 - t + 1 :] = -1e9
    assert place_anchors(poisoned, 7) == place_anchors(segment, 7)


def test_an_anchor_stands_right_before_the_expensive_step():
    """Reuse costs nothing except across step 5: with two anchors, 5 is one of them."""
    error = np.zeros((8, 8))
    error[5, 1:] = 1.0
    anchors, cost = place_anchors(reuse_segment_costs(error), 8)[2]
    assert (anchors, cost) == ([0, 5], 0.0)


def test_segment_costs_by_hand():
    error = np.array([[9, 9, 9], [9, 1, 9], [9, 10, 100], [9, 1000, 10000]], dtype=float)  # [T = 4, ages 0..2]
    summed = reuse_segment_costs(error)
    assert summed.shape == (4, 4)
    assert summed[:, :2].tolist() == [[0, 0]] * 4  # an anchor alone serves nothing
    assert summed[:3, 2].tolist() == [1, 10, 1000]  # age 1 at step t + 1
    assert summed[:2, 3].tolist() == [1 + 100, 10 + 10000]  # and age 2 at step t + 2
    last = reuse_segment_costs(error, last_only=True)
    assert last[:3, 2].tolist() == [1, 10, 1000]
    assert last[:2, 3].tolist() == [100, 10000]


def test_segment_costs_against_the_definition():
    rng = np.random.default_rng(2)
    error = rng.random((11, 6))
    summed, last = reuse_segment_costs(error), reuse_segment_costs(error, last_only=True)
    for t in range(11):
        for n in range(2, 7):
            if t + n <= 11:
                served = [error[t + j, j] for j in range(1, n)]
                assert summed[t, n] == pytest.approx(sum(served))
                assert last[t, n] == served[-1]


def test_ages_since():
    assert ages_since([0, 3, 4, 7], 9).tolist() == [0, 1, 2, 0, 0, 1, 2, 0, 1]
    assert ages_since([0], 4).tolist() == [0, 1, 2, 3]


def test_250_steps_all_counts_take_less_than_a_second():
    rng = np.random.default_rng(3)
    segment = reuse_segment_costs(rng.random((250, 8)))
    began = time.perf_counter()
    found = place_anchors(segment, 250)
    assert time.perf_counter() - began < 1.0
    assert list(found) == list(range(32, 251))
    costs = [cost for _, cost in found.values()]
    assert all(a >= b for a, b in pairwise(costs))  # one more anchor never hurts here
    for count, (anchors, cost) in found.items():
        lengths = np.diff([*anchors, 250])
        assert len(anchors) == count
        assert lengths.max() <= 8
        assert cost == pytest.approx(segment[anchors, lengths].sum())
