"""A tiny pipeline, a profile of it, and distances to its full run."""

from __future__ import annotations

import numpy as np
import pytest

import sodaprof
from sodaprof.pipelines.replay import Replay
from tests.tiny_pipelines import tiny_pipe
from tests.updated import sample

STEPS, SAMPLES = 12, 8
LABELS = [1, 2, 3]  # of the profile's generations, in turn


@pytest.fixture(scope="session")
def pipe():
    return tiny_pipe()


@pytest.fixture(scope="session")
def profile(pipe, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tuning") / "profile"
    return sodaprof.profile(pipe, folder, name="tiny", steps=STEPS, samples=SAMPLES, max_interval=4, prompts=LABELS)


def replay_of(pipe, profile, seeds):
    return Replay(pipe, profile.sampler, [LABELS[seed % 3] for seed in seeds], seeds)


def sampled_db(pipe, schedule, labels, seed=0):
    """Returns the distances of the pipeline's latents with the schedule to those without, seeds `seed`, …, dB."""
    full = sample(pipe, labels, schedule.steps, seed=seed)
    with sodaprof.apply(pipe, schedule):
        found = sample(pipe, labels, schedule.steps, seed=seed)
    error = np.square((found - full).reshape(len(labels), -1)).mean(1)
    return 10 * np.log10(np.square(full).mean() / error)
