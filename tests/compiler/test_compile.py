"""FORA and SODA on synthetic profiles: budget, full steps and pruning; what is refused in arguments and in the folder."""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Callable
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from msgspec.structs import replace

from sodaprof import load_profile
from sodaprof.compiler import compile_schedule, parse_budget
from sodaprof.errors import BudgetError, FormatError, MismatchError, UnsupportedModelError
from sodaprof.formats.cost import CostModel, load_cost, save_cost
from sodaprof.formats.profile import load_inspection
from sodaprof.formats.schedule import Schedule
from sodaprof.formats.schedule_file import schedule_to_json

STEPS, SITES, LONGEST, TOKENS = 12, 4, 5, 16  # the sizes of `random_errors`; LONGEST is max_interval
RATES = np.array([0.25, 0.5, 0.75])  # of `make_profile`
FULL, CACHED, LOOP = 20 + 2 * 60 + 2 * 100, 12, 2  # a step by `make_cost`


@pytest.fixture
def folder(random_profile, tmp_path) -> Path:
    """A profile of `random_errors` that the test may break."""
    return Path(shutil.copytree(random_profile, tmp_path / "folder"))


def rows_of(schedule: Schedule) -> list[str]:
    return list(schedule.transformers["t"].rows.values())


def anchors_of(schedule: Schedule) -> list[int]:
    return schedule.transformers["t"].anchors()


def kept(schedule: Schedule) -> np.ndarray:
    """Returns k [T, S]: −1 where reused, all tokens where a site alone is C, NaN at anchors."""
    plan = schedule.transformers["t"]
    k = np.full((schedule.steps, len(plan.rows)), np.nan)
    for i, (site, row) in enumerate(plan.rows.items()):
        values = iter(plan.k.get(site, ()))
        for t, action in enumerate(row):
            if action != "C":
                k[t, i] = next(values) if action == "P" else -1
            elif t not in plan.anchors():
                k[t, i] = TOKENS
    return k


def ages_of(schedule: Schedule) -> np.ndarray:
    anchors = anchors_of(schedule)
    return np.array([t - max(a for a in anchors if a <= t) for t in range(schedule.steps)])


def caching_at(errors: np.ndarray, ages: np.ndarray) -> np.ndarray:
    """Returns E_c [T, S] at these ages, 0 at age 0."""
    return np.where(ages[:, None] > 0, errors[np.arange(len(ages)), :, ages], 0.0)


def spent(count: int) -> float:
    """Returns the cost of `count` full steps with everything else reused."""
    return STEPS * LOOP + count * FULL + (STEPS - count) * CACHED


def subsets(count: int) -> list[tuple[int, ...]]:
    """Returns all placements of `count` anchors with step 0 among them and no interval longer than LONGEST."""
    every = [(0, *others) for others in combinations(range(1, STEPS), count - 1)]
    return [a for a in every if np.diff([*a, STEPS]).max() <= LONGEST]


def reuse_error(errors: np.ndarray, anchors: tuple[int, ...], endpoint: bool = False) -> float:
    """Returns the sum of E_c over all cached cells, or over those of the last step of each interval."""
    total = 0.0
    for start, stop in zip(anchors, [*anchors[1:], STEPS], strict=True):
        served = [errors[t, :, t - start].sum() for t in range(start + 1, stop)]
        total += sum(served[-1:] if endpoint else served)
    return total


# ---- fora -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", range(1, STEPS + 1))
def test_fora_spreads_its_full_steps_evenly(folder, count):
    schedule = compile_schedule(folder, 1.0, "fora", knobs={"anchors": count})
    expected = [round(i * STEPS / count) for i in range(count)]
    assert rows_of(schedule) == ["".join("C" if t in expected else "R" for t in range(STEPS))] * SITES
    assert schedule.policy == {"name": "fora", "knobs": {"anchors": count}}


@pytest.mark.parametrize(("budget", "count"), [("1x", 12), ("1.1x", 10), ("2.0x", 5), ("2.5x", 4), ("8x", 1)])
def test_fora_takes_the_most_full_steps_that_the_budget_allows(folder, budget, count):
    """Full: 12 · 342 = 4104; k anchors cost 168 + 328 k."""
    schedule = compile_schedule(folder, budget, "fora")
    assert len(anchors_of(schedule)) == count
    assert schedule.predicted["cost"] == 168 + 328 * count == spent(count)
    assert schedule.predicted["speedup"] == pytest.approx(4104 / spent(count))


# ---- soda: the budget -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("uas", ["priced", "paper"])
@pytest.mark.parametrize("budget", [1.0, 1.05, 1.3, 1.5, 2.0, 2.49, 3.0, 3.4])
def test_soda_meets_the_budget_and_spends_it(folder, random_errors, budget, uas):
    """Less than one full step is left over, unless nothing is left to recompute; the error is the sum over cached cells."""
    schedule = compile_schedule(folder, budget, knobs={"uas": uas})
    cost = load_cost(folder / "cost.flops.json")
    total, k, ages = cost.schedule(schedule), kept(schedule), ages_of(schedule)
    assert cost.speedup(schedule) >= budget * (1 - 1e-9)
    assert schedule.predicted["cost"] == total
    assert schedule.predicted["speedup"] == cost.speedup(schedule)
    assert total > 4104 / budget - (FULL + LOOP) or (k[ages > 0] == TOKENS).all()
    assert schedule.counts()["P"] > 0 or budget <= 1.05
    error = 0.0
    for t, site in zip(*np.nonzero(k >= -1), strict=True):
        e = random_errors[t, site, ages[t]]
        points = [0, *(e * RATES**2), e]
        error += e if k[t, site] < 0 else np.interp(1 - k[t, site] / TOKENS, [0, *RATES, 1], points)
    assert schedule.predicted["error"] == pytest.approx(error, rel=1e-5)


@pytest.mark.parametrize("uas", ["priced", "paper", "none"])
def test_the_number_of_full_steps_with_the_least_error_is_taken(folder, uas):
    best = compile_schedule(folder, 2.0, knobs={"uas": uas})
    each = {n: compile_schedule(folder, 2.0, knobs={"uas": uas, "anchors": n}) for n in (3, 4, 5)}
    assert [len(anchors_of(s)) for s in each.values()] == [3, 4, 5]
    assert all(np.diff([*anchors_of(s), STEPS]).max() <= LONGEST for s in each.values())
    errors = {n: s.predicted["error"] for n, s in each.items()}
    assert best.predicted["error"] == min(errors.values())
    assert best.policy["knobs"]["anchors"] == len(anchors_of(best)) == min(errors, key=errors.get)


def test_a_budget_of_one_computes_everything(folder):
    schedule = compile_schedule(folder, "1x")
    assert rows_of(schedule) == ["C" * STEPS] * SITES
    assert schedule.predicted == {"unit": "flops", "speedup": 1.0, "cost": 4104.0, "error": 0.0, "cache_bytes": 0}


def test_a_schedule_names_its_profile_policy_and_sampler(folder):
    schedule = compile_schedule(folder, "2x")
    profile = load_profile(folder)
    assert schedule.profile == {"digest": profile.digest(), "seed": 7, "samples": 3}
    assert schedule.policy["name"] == "soda"
    assert schedule.predicted["cache_bytes"] == SITES * TOKENS * 8 * 4 * 2  # width 8, float32, both branches
    assert schedule.sampler == profile.sampler
    assert schedule.digest() == compile_schedule(folder, 2.0).digest()
    assert json.dumps(schedule_to_json(schedule), allow_nan=False)


@pytest.mark.parametrize("knobs", [{}, {"metric": "l1"}, {"metric": "l2"}, {"segment": "endpoint"}], ids=str)
@pytest.mark.parametrize("budget", [1.2, 2.0, 3.0])
def test_full_steps_are_the_best_of_all_placements(make_profile, budget, knobs):
    """By the errors of the metric, which differ; the prediction is the sum of 1 − cosine over all that is served."""
    rng = np.random.default_rng(8)
    drawn = {m: rng.random((STEPS, SITES, LONGEST)).astype(np.float32).astype(np.float64) for m in ("cos", "l1", "l2")}
    schedule = compile_schedule(make_profile(drawn), budget, knobs={"uas": "none"} | knobs)
    counts = [n for n in range(3, STEPS + 1) if spent(n) <= 4104 / budget]
    placing, endpoint = drawn[knobs.get("metric", "cos")], "segment" in knobs
    bests = [min(subsets(n), key=lambda a: reuse_error(placing, a, endpoint)) for n in counts]
    best = min(bests, key=lambda a: reuse_error(drawn["cos"], a))
    assert anchors_of(schedule) == list(best)
    assert schedule.predicted["error"] == pytest.approx(reuse_error(drawn["cos"], best), rel=1e-6)
    assert set("".join(rows_of(schedule))) == {"C", "R"}
    assert schedule.token_rule is None
    if knobs and budget == 1.2:
        assert list(best) != anchors_of(
            compile_schedule(make_profile(drawn, name="cos"), budget, knobs={"uas": "none"})
        )


# ---- soda: the prunes -------------------------------------------------------------------------------------------------


def price_of(site: int, k: np.ndarray) -> np.ndarray:
    """Returns the cost of recomputing k tokens beyond that of reuse, by `make_cost`; sites alternate attn1, ff."""
    return (10 + 50 * k / TOKENS if site % 2 == 0 else 100 * k / TOKENS) - 1


@pytest.mark.parametrize("budget", [1.5, 2.0, 2.9])
def test_priced_prunes_where_it_saves_most_a_flop(folder, random_errors, budget):
    """No reused cell offers a better (E_c − E_p) / cost than the worst of the pruned ones."""
    schedule = compile_schedule(folder, budget)
    k, ages = kept(schedule), ages_of(schedule)
    grid = np.rint(TOKENS * (1 - np.array([0, *RATES])))
    ratios: dict[bool, list[float]] = {True: [], False: []}
    for t, site in zip(*np.nonzero(k >= -1), strict=True):
        e = random_errors[t, site, ages[t]]
        gain = e - e * np.array([0, *RATES]) ** 2
        ratios[k[t, site] >= 0].append((gain / price_of(site, grid)).max())
    assert len(ratios[True]) > 0
    assert len(ratios[False]) > 0
    assert min(ratios[True]) >= max(ratios[False]) * (1 - 1e-6)


@pytest.mark.parametrize("scale", [0.0, 0.5, 1.0, 3.0])
def test_paper_keeps_tokens_by_the_linear_rule(folder, random_errors, scale):
    """One beta explains every cell: k / N = clamp(scale · E_c + beta, 0, 1), rounded."""
    schedule = compile_schedule(folder, 2.0, knobs={"uas": "paper", "scale": scale, "anchors": 4})
    k, ages = kept(schedule), ages_of(schedule)
    cells = k >= -1
    share = np.maximum(k, 0)[cells] / TOKENS
    rest = share - scale * caching_at(random_errors, ages)[cells]
    half = 0.5 / TOKENS + 1e-6
    low = (rest - half)[share > 0].max()  # beta is at least this where something is recomputed
    high = (rest + half)[share < 1].min()  # and at most this where not everything is
    assert low <= high
    assert schedule.counts()["P"] > 0
    assert schedule.policy["knobs"]["scale"] == scale
    assert (len(set(share)) == 1) == (scale == 0)


def test_paper_reads_pruning_at_age_one_and_priced_at_the_true_age(make_profile, random_errors):
    """Pruning site 1 has a large error at age 1 only: the published rule avoids it, the price does not."""
    pruning = random_errors[..., None] * RATES**2
    pruning[:, 1, 1] = 10.0
    pruning[:, 1, 2:] = 0.0
    folder = make_profile(random_errors, pruning)
    paper, priced = (compile_schedule(folder, 1.6, knobs={"uas": u, "anchors": 4}) for u in ("paper", "priced"))
    k, ages = kept(paper), ages_of(paper)
    # everything recomputed has no error, so only k = N may appear; and rates between the points cost more than E_c
    assert set(k[ages > 0, 1]) <= {-1.0, float(TOKENS)}
    assert (k[ages > 0, 0] > 0).any()
    site = kept(priced)[:, 1]
    assert (site[ages == 1] == -1).all() or set(site[ages == 1]) <= {-1.0, float(TOKENS)}
    assert ((site > 0) & (site < TOKENS))[ages > 1].any()


def test_paper_prunes_only_below_the_error_of_reuse(make_profile, random_errors):
    """With E_p = c at age 1 and every rate of the profile, cells with E_c <= c are left alone at those rates."""
    c = float(np.median(random_errors[:, :, 1:]))
    pruning = np.full((*random_errors.shape, len(RATES)), c)
    folder = make_profile(random_errors, pruning)
    schedule = compile_schedule(folder, 2.0, knobs={"uas": "paper", "anchors": 4, "scale": 0.0})
    k = kept(schedule)
    e = caching_at(random_errors, ages_of(schedule))
    inner = (k > 0) & (k <= (1 - RATES.min()) * TOKENS)  # at rates where E_p is c (above the last one it nears E_c)
    assert inner.any()
    assert e[inner].min() > c
    assert ((k == -1) & (e <= c)).any()


def test_sites_that_cannot_be_pruned_are_not(make_profile, make_model, random_errors):
    model = make_model()
    sites = [replace(s, prunable=s.kind == "mlp") for s in model.transformers["t"].sites]
    model = replace(model, transformers={"t": replace(model.transformers["t"], sites=tuple(sites))})
    folder = make_profile(random_errors, model=model)
    for uas in ("paper", "priced"):
        schedule = compile_schedule(folder, 2.0, knobs={"uas": uas})
        prunes = {site: row.count("P") for site, row in schedule.transformers["t"].rows.items()}
        assert {site for site, count in prunes.items() if count} == {"blocks.0.ff", "blocks.1.ff"}


@pytest.mark.parametrize("noise", [0.0, 1e-8])
def test_few_tokens_leave_rates_that_keep_none(make_profile, make_model, make_cost, random_errors, noise):
    """With 4 tokens the rate 0.9375 keeps none: E_p is E_c up to rounding, and that must not use up the budget."""
    rates = (0.25, 0.5, 0.75, 0.9375)
    model = make_model(tokens=4)
    pruning = random_errors[..., None] * np.array([*np.square(rates[:3]), 1.0])
    pruning[..., 3] -= noise
    folder = make_profile(random_errors, pruning, rates=rates, model=model)
    schedule = compile_schedule(folder, 2.0)
    cost = load_cost(folder / "cost.flops.json")
    assert cost.speedup(schedule) >= 2.0 * (1 - 1e-9)
    assert cost.schedule(schedule) > 4104 / 2 - (FULL + LOOP)
    assert 0 not in kept(schedule)  # it would cost what R costs, and its whole column would no longer be "all cached"


def test_cells_whose_pruning_costs_no_more_than_reuse_are_pruned(make_profile, make_model, make_cost, random_errors):
    """Measured in ms, recomputing few tokens can look free; the rest of the budget is still spent on the others."""
    model = make_model()
    table = make_cost(model)
    sites = table.transformers["t"].sites
    key = "blocks.0.attn1"
    free = sites | {key: replace(sites[key], R=30.0, P=((1, 5.0), (4, 10.0), (TOKENS, 60.0)))}
    cost = replace(table, transformers={"t": replace(table.transformers["t"], sites=free)})
    folder = make_profile(random_errors, cost=cost)
    schedule = compile_schedule(folder, 2.0)
    found = load_cost(folder / "cost.flops.json")
    assert found.speedup(schedule) >= 2.0 * (1 - 1e-9)
    assert found.schedule(schedule) > 4104 / 2 - (FULL + LOOP)
    assert {row.count("P") > 0 for row in rows_of(schedule)} == {True}


def test_a_perfect_profile_needs_no_prunes(make_profile):
    schedule = compile_schedule(make_profile(np.zeros((STEPS, SITES, LONGEST))), "3x")
    assert schedule.predicted["error"] == 0
    assert schedule.predicted["speedup"] >= 3


# ---- refusals: what was typed -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("budget", ["0", "-1x", "abc", "nan", "inf", "", "x", "0.5x", "2.0y", "2,0x", 0, -1.0])
def test_wrong_budgets(budget):
    with pytest.raises(BudgetError, match=r"at least 1, as in --budget 2\.0x"):
        parse_budget(budget)


@pytest.mark.parametrize("text", ["2", "2.0", "2x", " 2.0x ", "2X", 2, 2.0])
def test_budgets_may_be_written_in_several_ways(text):
    assert parse_budget(text) == 2.0


@pytest.mark.parametrize(("policy", "count"), [("soda", 3), ("fora", 1)])
def test_the_error_of_an_unreachable_budget_says_what_is_reachable(folder, policy, count):
    """soda needs ceil(12 / 5) = 3 anchors, fora one."""
    with pytest.raises(BudgetError) as caught:
        compile_schedule(folder, "1000x", policy)
    reachable = 4104 / spent(count)
    assert f"at most {reachable:.3g}x (flops)" in str(caught.value)
    asked = re.search(r"--budget ([\d.]+x) or less", str(caught.value))[1]
    assert reachable - 0.01 < parse_budget(asked) <= reachable
    schedule = compile_schedule(folder, asked, policy)
    assert len(anchors_of(schedule)) == count


def test_unknown_policies(folder):
    with pytest.raises(BudgetError, match="soda, fora"):
        compile_schedule(folder, 2.0, "sodda")


@pytest.mark.parametrize("policy", ["soda", "fora"])
def test_several_transformers_are_refused(make_profile, make_model, random_errors, policy):
    folder = make_profile(random_errors, model=make_model(names=("high", "low")))
    with pytest.raises(UnsupportedModelError, match="high, low"):
        compile_schedule(folder, 2.0, policy)


# ---- refusals: what is in the folder ----------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", ["soda", "fora"])
@pytest.mark.parametrize("lost", ["site", "transformer"])
def test_a_cost_table_of_another_model(folder, tmp_path, policy, lost):
    cost = load_cost(folder / "cost.flops.json")
    table = cost.transformers["t"]
    fewer = {key: c for key, c in table.sites.items() if key != "blocks.1.ff"}
    tables = {"t": replace(table, sites=fewer)} if lost == "site" else {"other": table}
    save_cost(replace(cost, transformers=tables), tmp_path / "cost.json")
    with pytest.raises(MismatchError, match=r"t/blocks\.1\.ff" if lost == "site" else r"t/blocks\.0\.attn1"):
        compile_schedule(folder, 2.0, policy, cost=tmp_path / "cost.json")


def test_another_cost_table_makes_another_schedule(folder, tmp_path):
    cost = load_cost(folder / "cost.flops.json")
    step = replace(cost.transformers["t"].step, all_cached=200.0)
    dear: CostModel = replace(cost, unit="ms", transformers={"t": replace(cost.transformers["t"], step=step)})
    save_cost(dear, tmp_path / "cost.json")
    schedule = compile_schedule(folder, 1.2, "fora", cost=tmp_path / "cost.json")
    assert schedule.predicted["unit"] == "ms"
    assert len(anchors_of(schedule)) == 7  # 24 + 12 · 200 + 140 k <= 4104 / 1.2
    assert len(anchors_of(compile_schedule(folder, 1.2, "fora"))) == 9
    hint = "FLOPs alone would allow it: on this device a step that reuses everything takes 202 ms"
    with pytest.raises(BudgetError, match=hint):
        compile_schedule(folder, 2.0, "fora", cost=tmp_path / "cost.json")
    with pytest.raises(BudgetError, match=r"less\.$"):
        compile_schedule(folder, 1000.0, "fora", cost=tmp_path / "cost.json")


QUICK = {"uas": "none"}  # reads all the same, and bisects nothing


def rewrite(folder: Path, table: str, change: Callable[[pa.Table], pa.Table]) -> None:
    path = folder / f"{table}.parquet"
    changed = change(pq.read_table(path))
    path.unlink()
    pq.write_table(changed, path)


def with_value(column: str, row: int, value: Any) -> Callable[[pa.Table], pa.Table]:
    def change(table: pa.Table) -> pa.Table:
        values = table[column].to_pylist()
        values[row] = value
        i = table.schema.get_field_index(column)
        return table.set_column(i, table.schema.field(column), pa.array(values, type=table.schema.field(column).type))

    return change


def with_type(column: str, kind: pa.DataType) -> Callable[[pa.Table], pa.Table]:
    return lambda table: table.set_column(table.schema.get_field_index(column), column, table[column].cast(kind))


@pytest.mark.parametrize(
    ("table", "change"),
    [
        pytest.param("caching", with_value("cos_mean", 5, math.nan), id="caching: nan"),
        pytest.param("caching", with_value("cos_mean", 5, math.inf), id="caching: infinity"),
        pytest.param("caching", with_value("cos_mean", 5, None), id="caching: no value"),
        pytest.param("caching", with_value("step", 5, None), id="caching: no step"),
        pytest.param("caching", with_value("module", 5, "attn9"), id="caching: unknown site"),
        pytest.param("caching", with_value("step", 5, STEPS), id="caching: step too late"),
        pytest.param("caching", with_value("step", 5, -1), id="caching: step below 0"),
        pytest.param("caching", with_value("age", 5, LONGEST), id="caching: age too high"),
        pytest.param("caching", lambda t: t.drop_columns(["cos_std"]), id="caching: no cos_std"),
        pytest.param("caching", lambda t: t.append_column("extra", t["n"]), id="caching: extra column"),
        pytest.param("caching", lambda t: t.select(t.column_names[::-1]), id="caching: other order"),
        pytest.param("caching", lambda t: t.slice(0, t.num_rows - 1), id="caching: last row missing"),
        pytest.param("caching", lambda t: t.slice(0, 0), id="caching: no rows"),
        pytest.param("caching", with_type("cos_mean", pa.string()), id="caching: text for errors"),
        pytest.param("pruning", with_value("prune_rate", 8, math.nan), id="pruning: nan rate"),
        pytest.param("pruning", with_value("prune_rate", 8, 0.3), id="pruning: rate of its own"),
        pytest.param("pruning", lambda t: t.slice(0, t.num_rows - 1), id="pruning: last row missing"),
    ],
)
def test_broken_tables(folder, table, change):
    """Row 5 of caching and row 8 of pruning are rows of the branch mean, which compilers read."""
    for name, row in (("caching", 5), ("pruning", 8)):
        assert pq.read_table(folder / f"{name}.parquet")["branch"][row].as_py() == -1
    rewrite(folder, table, lambda unchanged: unchanged)
    compile_schedule(folder, 2.0, knobs=QUICK)
    rewrite(folder, table, change)
    with pytest.raises(FormatError, match=r"Profile again|model\.json does not"):
        compile_schedule(folder, 2.0, knobs=QUICK)


@pytest.mark.parametrize("table", ["caching", "pruning"])
@pytest.mark.parametrize("share", [0.0, 0.3, 0.9, 0.999])
def test_truncated_tables(folder, table, share):
    path = folder / f"{table}.parquet"
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(FormatError, match="not readable as Parquet"):
        compile_schedule(folder, 2.0)
    path.write_bytes(content[:4] + b"\xff" * (len(content) // 2 - 4) + content[len(content) // 2 :])
    with pytest.raises(FormatError):  # damaged pages
        compile_schedule(folder, 2.0)


@pytest.mark.parametrize(
    "name", ["caching.parquet", "pruning.parquet", "model.json", "sampler.json", "cost.flops.json"]
)
def test_missing_parts(folder, name):
    (folder / name).unlink()
    with pytest.raises(FormatError, match="no such file"):
        compile_schedule(folder, 2.0)


def test_missing_manifest_and_folder(folder, tmp_path):
    (folder / "manifest.json").unlink()
    with pytest.raises(BudgetError, match=r"no manifest\.json. Measure them: sodaprof profile"):
        compile_schedule(folder, 2.0)
    with pytest.raises(FormatError, match="no such folder"):
        compile_schedule(tmp_path / "none", 2.0)
    with pytest.raises(FormatError, match="no such folder"):
        load_inspection(folder / "model.json")


@pytest.mark.parametrize(
    ("key", "value", "found"),
    [
        ("version", 3, "Upgrade sodaprof"),
        ("format", "sodaprof.cost", "expected 'sodaprof.profile'"),
        ("tables", {"sites": 1, "caching": 2, "pruning": 1}, "table caching has version 2"),
        ("tables", {"sites": 1, "caching": 1}, "table pruning has version None"),
        ("tables", {"sites": 1, "caching": True, "pruning": 1}, "Expected `int`, got `bool` - at `$.tables"),
        ("max_interval", 1, "Expected `int` >= 2 - at `$.max_interval`"),
        ("max_interval", 2, "outside the profile"),
        ("max_interval", 6, "lacks rows of t, or has some twice"),
        ("samples", 0, "Expected `int` >= 1 - at `$.samples`"),
        ("colour", 1, "unknown field `colour`"),
    ],
)
def test_broken_manifests(folder, key, value, found):
    path = folder / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    with pytest.raises(FormatError) as caught:
        compile_schedule(folder, 2.0)
    assert found in str(caught.value)


def test_later_tables_and_other_files_are_ignored(folder):
    before = compile_schedule(folder, 2.0)
    (folder / "later.parquet").write_bytes(b"of a later release")
    (folder / "notes.txt").write_text("of a user")
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    path.write_text(json.dumps(manifest | {"tables": manifest["tables"] | {"later": 3}}))
    assert rows_of(compile_schedule(folder, 2.0)) == rows_of(before)
    path.write_text(json.dumps(manifest))
    assert compile_schedule(folder, 2.0) == before


def test_profile_digest_is_of_the_request_and_the_tables(folder, make_profile, random_errors):
    digest = load_profile(folder).digest()
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    for key, value, same in (("device", "cuda", True), ("measured", {"seconds": 3}, True), ("seed", 8, False)):
        path.write_text(json.dumps(manifest | {key: value}))
        assert (load_profile(folder).digest() == digest) is same
    path.write_text(json.dumps(manifest))
    assert load_profile(folder).digest() == digest
    assert load_profile(make_profile(random_errors, name="again")).digest() == digest
    random_errors[5, 2, 3] += 0.01
    assert load_profile(make_profile(random_errors, name="other")).digest() != digest
