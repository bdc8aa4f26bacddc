"""What benchmark and measured costs hold; not how fast anything is."""

from __future__ import annotations

import pytest

import sodaprof
from sodaprof.formats.cost import load_cost, save_cost
from sodaprof.formats.sites import Site
from sodaprof.measure.bench import Timings, benchmark
from sodaprof.measure.latency import SOURCES, _costs, _patterns, measure_costs
from tests.tiny_pipelines import SITES, STEPS, draw, schedule_for, tiny_pipe
from tests.updated import RESTING, updated

MODULES = {
    "b.attn": [Site("b", layer, "attn", "attn", 16, 8, True) for layer in range(2)],
    "b.ff": [Site("b", layer, "ff", "mlp", 16, 8, False) for layer in range(2)],
}


@pytest.fixture(scope="module")
def pipe():
    return tiny_pipe(layers=1)


def test_a_benchmark_holds_every_contender(pipe):
    before = draw(pipe)
    mixed = schedule_for(pipe, dict.fromkeys(SITES[:2], "CPRRCPRR"), dict.fromkeys(SITES[:2], (5, 5)))
    result = benchmark(pipe, [mixed, updated(pipe, RESTING)], rounds=2, names=["mixed", "rests"])
    assert [row["name"] for row in result["rows"]] == ["plain", "hooks", "lowered", "tables", "mixed", "rests"]
    for row in result["rows"]:
        assert row["loop_ms"] > 0
        assert len(row["step_ms"]) == STEPS == result["steps"]
        assert sum(row["step_ms"]) < 1.5 * row["quartiles_ms"][1]
    assert result["rows"][3]["speedup"] == 1
    plain, hooks, lowered, tables, mixed, _ = (sum(row["launches"][1:]) for row in result["rows"])
    assert plain == hooks
    assert hooks >= lowered > tables > mixed > 0
    assert [p["steps"] for p in result["rows"][4]["patterns"]] == [[0], [1, 5], [2, 3, 6, 7], [4]]
    assert [p["steps"] for p in result["rows"][3]["patterns"]] == [[0], list(range(1, STEPS))]
    assert result["hardware"]["name"]
    assert result["rows"][2]["programs"] > 0
    launches = list(zip(result["rows"][5]["launches"], RESTING, strict=True))
    assert max(n for n, action in launches if action == "-") < min(n for n, action in launches if action == ".") / 4
    assert result["rows"][5]["path"] == "compiled"
    assert (draw(pipe) == before).all()  # the pipeline is as before


def test_measured_costs_can_be_compiled_with(pipe, tmp_path):
    sodaprof.profile(pipe, tmp_path / "profile", steps=STEPS, samples=1, batch_size=1, max_interval=2)
    cost = measure_costs(pipe, steps=SOURCES + 9, rounds=1)  # 17 patterns in two groups, the second not full
    assert cost.loop["update"] > 0
    assert cost.loop["update"] != cost.loop["scheduler"]  # both were timed
    save_cost(cost, tmp_path / "cost.json")
    assert load_cost(tmp_path / "cost.json") == cost
    schedule = sodaprof.compile_schedule(tmp_path / "profile", 1.0, cost=tmp_path / "cost.json")
    assert schedule.predicted["unit"] == "ms"
    assert schedule.predicted["speedup"] >= 1


def test_costs_by_hand():
    """Two layers: full 30 ms, all reused 10; attention alone adds 4, feed-forward alone 12: 16 in all, scaled to 20."""
    ms = {("", "R", 0): 10.0, ("", "S", 1): 3.0, ("", "S", 4): 6.0}
    for name, c in (("b.attn", 4.0), ("b.ff", 12.0)):
        ms |= {(name, "C", 0): 10 + c, (name, "F", 1): 10.2, (name, "F", 4): 10.8}
    ms |= {("b.attn", "P", k): 10 + v for k, v in ((2, 1.0), (4, 1.5), (8, 2.5), (12, 30.0))}
    step, sites = _costs(MODULES, ms, full=30.0, tables=(0.25, 0.5))
    assert (step.fixed, step.all_cached) == (10.25, 10.5)
    assert step.stack == pytest.approx((3.5, 4.5, 5.5, 6.5))
    attn, ff = sites["b.0.attn"], sites["b.1.ff"]
    assert pytest.approx(2 * 20 / 16) == attn.C
    assert pytest.approx(6 * 20 / 16) == ff.C
    assert pytest.approx(30) == 2 * (attn.C + ff.C) + 10
    assert pytest.approx((0.1, 0.2, 0.3, 0.4)) == attn.F
    assert attn.P == ((2, 0.5), (4, 0.75), (8, 1.25), (12, attn.C), (16, attn.C))  # never more expensive than C
    assert ff.P == ((16, ff.C),)


def test_patterns_cover_every_action():
    found = _patterns(MODULES)
    assert {action for _, action, _ in found} == set("RCFPS")
    assert {k for _, action, k in found if action == "P"} == {2, 4, 8, 12}
    assert {part for part, action, _ in found if action == "P"} == {"b.attn"}


def test_medians_and_not_means_are_reported():
    runs = Timings("x")
    runs.loop = [1.0, 2.0, 30.0]
    assert runs.median_ms() == 2.0
