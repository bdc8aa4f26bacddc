"""The released schedules of ToCa and DuCa for the published models, as the project ships them."""

from __future__ import annotations

from pathlib import Path

import pytest

from sodaprof.compiler import compile_schedule
from sodaprof.formats.cost import save_cost
from sodaprof.formats.profile import write_inspection
from sodaprof.formats.schedule_file import load_schedule
from sodaprof.pipelines.flops import count_flops
from tests.studies.published import MODELS, published

SCHEDULES = Path(__file__).parents[2] / "schedules"


@pytest.fixture(scope="module")
def dit(tmp_path_factory):
    folder = tmp_path_factory.mktemp("published") / "dit"
    model, sampler, step, pipe = published("dit-xl-2-256-ddim-50")
    write_inspection(folder, model, sampler)
    save_cost(count_flops(pipe, model, step), folder / "cost.flops.json")
    return folder


@pytest.mark.parametrize("policy", ["toca", "duca"])
def test_shipped_schedules_are_what_the_command_makes(dit, policy):
    shipped = load_schedule(SCHEDULES / "dit-xl-2-256-ddim-50" / f"{policy}.json")
    made = compile_schedule(dit, policy=policy)
    assert made.digest() == shipped.digest()
    assert made.predicted == shipped.predicted


def test_dit_flops_are_those_of_the_paper(dit):
    """Peebles and Xie, table 4: 118.6 GFLOPs a pass of DiT-XL/2 at 256, a multiply-add counted as one; two a step."""
    schedule = compile_schedule(dit, policy="toca")
    all_compute = schedule.predicted["cost"] * schedule.predicted["speedup"]
    assert all_compute / 50 / 2 / 2 == pytest.approx(118.6e9, rel=0.02)


@pytest.mark.parametrize(
    ("name", "policy", "anchors", "skipped", "speedup"),
    [
        ("dit-xl-2-256-ddim-50", "toca", 18, 0, 2.29),
        ("dit-xl-2-256-ddim-50", "duca", 18, 9, 2.44),
        ("dit-xl-2-256-ddpm-250", "toca", 72, 0, 2.69),
        ("dit-xl-2-256-ddpm-250", "duca", 72, None, 3.04),
        ("pixart-xl-2-256-dpm-20", "toca", 6, 0, 1.84),
        ("pixart-xl-2-256-dpm-20", "duca", 7, 6, 1.87),
        ("open-sora-v1.2-480p-51f-rflow-30", "toca", 7, 0, 2.37),
        ("open-sora-v1.2-480p-51f-rflow-30", "duca", 7, 9, 2.53),
    ],
)
def test_released_schedules(name, policy, anchors, skipped, speedup):
    schedule = load_schedule(SCHEDULES / name / f"{policy}.json")
    (plan,) = schedule.transformers.values()
    assert schedule.steps == MODELS[name][3]
    assert len(plan.anchors()) == anchors
    assert skipped is None or plan.stack.count("S") == skipped
    assert schedule.predicted["speedup"] == pytest.approx(speedup, abs=0.01)
    assert schedule.measured == ()
