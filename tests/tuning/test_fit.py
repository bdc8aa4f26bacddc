"""What a policy leaves open, chosen by calibration pictures."""

from __future__ import annotations

import numpy as np
import pytest

import sodaprof
from sodaprof.compiler import compile_schedule
from sodaprof.errors import BudgetError, FormatError
from sodaprof.measure.metrics import psnr_db
from sodaprof.tuning.fit import fit_schedule
from tests.tiny_pipelines import STEPS, draw, tiny_pipe

SEED, SAMPLES = 3, 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("fit") / "p"
    sodaprof.profile(tiny_pipe(), path, steps=STEPS, samples=SAMPLES, batch_size=2, max_interval=4, seed=SEED)
    return path


def test_the_period_nearest_to_the_full_run_is_kept(folder):
    pipe = tiny_pipe()
    best, tried = fit_schedule(pipe, folder, 1.5, "toca")
    assert best.policy["knobs"]["N"] == max(tried, key=lambda t: t["psnr_db"])["N"]
    assert len({t["psnr_db"] for t in tried}) > 1
    assert best.predicted["speedup"] >= 1.5
    labels = list(range(SAMPLES))
    plain = draw(pipe, labels, seed=SEED)
    for entry in tried:
        schedule = compile_schedule(folder, 1.5, "toca", knobs={"N": entry["N"]})
        with sodaprof.apply(pipe, schedule):
            pictures = draw(pipe, labels, seed=SEED)
        assert np.mean(psnr_db(pictures, plain)) == pytest.approx(entry["psnr_db"], abs=1e-3)


def test_a_budget_that_no_period_meets(folder):
    with pytest.raises(BudgetError, match="cannot be met with N=8"):
        fit_schedule(tiny_pipe(), folder, 1000, "duca")


def test_policies_that_leave_nothing_open(folder):
    with pytest.raises(BudgetError, match="chooses N for toca and duca"):
        fit_schedule(tiny_pipe(), folder, 2, "soda")
    with pytest.raises(BudgetError, match="leave N out"):
        fit_schedule(tiny_pipe(), folder, 2, "toca", knobs={"N": 3})


def test_without_calibration_seeds_nothing_is_chosen(folder, tmp_path):
    for name in ("model.json", "sampler.json", "cost.flops.json"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    with pytest.raises(FormatError, match="no calibration seeds"):
        fit_schedule(tiny_pipe(), tmp_path, 2, "toca")
