"""The dynamic program that places full steps, against every placement; segments of reuse."""

from __future__ import annotations

import math
import time
from itertools import combinations, pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sodaprof.compiler.placement import place_full_steps, reuse_segment_costs
from tests.compiler.trajectories import segment_error


@given(st.integers(1, 8), st.integers(1, 9), st.integers(1, 3), st.integers(0, 2**32 - 1))
@settings(derandomize=True, max_examples=80, deadline=None)
def test_each_number_of_full_steps_has_the_best_of_all_placements(steps, longest, history, seed):
    """Whole numbers of either sign, so that ties and gains occur."""
    shape = (steps, *[longest + 1] * history)
    segment = np.random.default_rng(seed).integers(-9, 10, shape).astype(float)
    found = place_full_steps(segment)
    for count in range(1, steps + 1):
        best = min(segment_error(segment, [0, *others]) for others in combinations(range(1, steps), count - 1))
        assert (count in found) == (best < math.inf)
        if count in found:
            anchors, error = found[count]
            assert len(anchors) == count
            assert error == best == segment_error(segment, anchors)
    assert place_full_steps(segment, most=3) == {count: one for count, one in found.items() if count <= 3}


def test_counts_run_from_the_longest_segments_to_every_step():
    found = place_full_steps(np.ones((9, 5)))  # n_max = 4
    assert list(found) == [3, 4, 5, 6, 7, 8, 9]
    assert found[9] == (list(range(9)), 9.0)


def test_nothing_is_read_beyond_the_last_step():
    """Entries with t + n > T may hold anything."""
    rng = np.random.default_rng(1)
    segment = rng.random((7, 4))
    poisoned = segment.copy()
    for t in range(7):
        poisoned[t, 7 - t + 1 :] = -1e9
    assert place_full_steps(poisoned) == place_full_steps(segment)


def test_segment_costs_are_sums_of_the_errors_of_reuse_or_the_last_one():
    rng = np.random.default_rng(2)
    error = rng.random((11, 6))
    summed, last = reuse_segment_costs(error), reuse_segment_costs(error, last_only=True)
    assert summed.shape == last.shape == (11, 7)
    assert (summed[:, :2] == 0).all()  # a full step alone serves nothing
    for t in range(11):
        for n in range(2, 7):
            if t + n <= 11:
                served = [error[t + j, j] for j in range(1, n)]
                assert summed[t, n] == pytest.approx(sum(served))
                assert last[t, n] == served[-1]


def test_all_counts_of_250_steps_take_less_than_a_second_of_cpu_time():
    rng = np.random.default_rng(3)
    segment = reuse_segment_costs(rng.random((250, 8)))
    began = time.process_time()
    found = place_full_steps(segment)
    assert time.process_time() - began < 1.0
    assert list(found) == list(range(32, 251))
    costs = [cost for _, cost in found.values()]
    assert all(a >= b for a, b in pairwise(costs))  # one more full step never adds error here
    for count, (anchors, cost) in found.items():
        lengths = np.diff([*anchors, 250])
        assert len(anchors) == count
        assert lengths.max() <= 8
        assert cost == pytest.approx(segment[anchors, lengths].sum())
