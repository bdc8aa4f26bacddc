"""Pipelines whose transformers take turns (Wan 2.2): found, profiled, compiled, run, each with caches of its own."""

from __future__ import annotations

import io
import json
from collections import defaultdict
from functools import cache
from itertools import combinations, product
from shutil import copytree

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from msgspec.structs import replace
from rich.console import Console

import sodaprof
from sodaprof.compiler import compile_schedule
from sodaprof.doctor.diagnose import diagnose
from sodaprof.errors import BudgetError, FormatError, MismatchError, UnsupportedModelError
from sodaprof.formats.cost import load_cost
from sodaprof.formats.files import write_json
from sodaprof.formats.profile import load_inspection, load_profile
from sodaprof.formats.schedule import Forecast
from sodaprof.pipelines.discover import inspect_pipeline
from sodaprof.pipelines.flops import count_flops
from sodaprof.profiler.plan import plan_profile
from sodaprof.profiler.run import run_profile
from sodaprof.report.results import inspection_view
from sodaprof.report.schedule import schedule_data, schedule_view
from tests.tape import runtime as runtime_of
from tests.tiny_pipelines import with_known_programs
from tests.two_transformers import (
    BOUNDARY,
    HIGH,
    LOW,
    NAMES,
    STEPS,
    draw,
    mixed,
    paint,
    schedule_of,
    small_wan,
    turns_pipe,
)

AGAIN = (0, 1, 2, 8, 9, 10), tuple(range(3, 8))  # the steps of two transformers; the first has two turns
SETTINGS = {"steps": STEPS, "samples": 2, "batch_size": 2, "max_interval": 4}


@pytest.fixture
def wan():
    return small_wan()


@pytest.fixture(scope="module")
def profiled(tmp_path_factory):
    """Returns a function (halves, turns) -> a pipeline and its profile, made once."""

    @cache
    def of(halves, turns):
        pipe = turns_pipe(halves, turns)
        return pipe, sodaprof.profile(pipe, tmp_path_factory.mktemp("turns") / "p", prompts=[3, 4], **SETTINGS)

    return of


@pytest.fixture(scope="module")
def profile_of_wan(tmp_path_factory):
    """The profile of `wan`, made once: copy it before changing it."""
    settings = SETTINGS | {"prompts": ["a cat", "a small dog"], "guidance_scale": 5.0}
    return sodaprof.profile(small_wan(), tmp_path_factory.mktemp("wan") / "p", **settings)


# ---- discovery --------------------------------------------------------------------------------------------------------


def test_the_steps_of_each_transformer_are_found_by_running(wan):
    model, sampler, step = inspect_pipeline(wan, "tiny", STEPS, 5.0)
    called = {name: transformer.called for name, transformer in model.transformers.items()}
    assert called == step.called == {"transformer": HIGH, "transformer_2": LOW}
    assert sampler.guidance_form == "passes"
    assert model.transformers["transformer_2"].past(STEPS) == [-1] * 5 + [0, 1, 2, 3, 4, 5]
    assert torch.equal(draw(wan), draw(small_wan()))  # nothing is left on the pipeline


@pytest.mark.parametrize(("ratio", "name"), [(None, "transformer"), (2.0, "transformer_2")])
def test_a_transformer_that_is_never_called_is_not_part_of_the_model(wan, ratio, name):
    wan.register_to_config(boundary_ratio=ratio)
    model, _, step = inspect_pipeline(wan, "tiny", STEPS, 5.0)
    assert [(n, t.called) for n, t in model.transformers.items()] == [(name, ())]
    assert step.called == {}


@pytest.mark.parametrize("called", [[0, 3], None, [], [3, 2], [1, 1], [-1, 0], ["0"], 3])
def test_model_json_holds_the_steps_in_rising_order(make_model, make_sampler, tmp_path, called):
    data = json.loads(json.dumps(make_model().to_json()))
    assert set(data["transformers"]["t"]) == {"class", "fingerprint", "sites"}  # as before there were turns
    write_json(tmp_path / "sampler.json", make_sampler().to_json())
    data["transformers"]["t"] |= {} if called is None else {"called": called}
    write_json(tmp_path / "model.json", data)
    if called in (None, [0, 3]):
        assert load_inspection(tmp_path).model.transformers["t"].called == tuple(called or ())
    else:
        with pytest.raises(FormatError, match=r"model\.json"):
            load_inspection(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"halves": (True, False)}, "transformer with halves, transformer_2 with passes"),
        ({"doubled": (7,)}, "calls 12 in 11 steps"),
    ],
)
def test_other_guidance_in_one_turn_and_two_transformers_in_one_step_are_refused(changes, message):
    pipe = turns_pipe()
    vars(pipe).update(changes)
    with pytest.raises(UnsupportedModelError, match=message):
        plan_profile(pipe, "tiny", steps=STEPS, samples=1)


# ---- profile ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("halves", "turns"), [(False, (HIGH, LOW)), (True, AGAIN)])
def test_errors_are_those_of_a_transformer_against_itself(halves, turns, profiled):
    pipe, profile = profiled(halves, turns)
    assert profile.sampler.guidance_form == ("halves" if halves else "passes")
    errors, (pruning, rates) = profile.caching_error(), profile.pruning_error()
    ages = 0
    for name, own in zip(NAMES, turns, strict=True):
        found = {site.key: [] for site in profile.model.transformers[name].sites}
        hooks = [
            pipe.components[name].get_submodule(key).register_forward_hook(lambda _, a, out, to=to: to.append(out))
            for key, to in found.items()
        ]
        paint(pipe, [3, 4])
        for hook in hooks:
            hook.remove()
        for s, seen in enumerate(found.values()):
            full = seen if halves else [torch.cat(pair) for pair in zip(seen[::2], seen[1::2], strict=True)]
            for step, age in product(range(STEPS), range(1, 4)):
                known = {step, *range(step - age, step)} <= set(own)
                assert np.isnan(errors[name][step, s, age]) != known
                assert np.isnan(pruning[name][step, s, age]).all() != known
                if known:
                    now, past = (full[own.index(one)].double() for one in (step, step - age))
                    cos = (1 - torch.cosine_similarity(now, past, dim=-1)).mean().item()
                    assert errors[name][step, s, age] == pytest.approx(cos, rel=2e-4)
                    ages += 1
    rows = pq.read_table(profile.folder / "caching.parquet", columns=["transformer", "step", "age", "branch"])
    assert rows.num_rows == ages * 3  # branches and their mean
    assert len(rates) == 8


def test_passes_over_the_trajectories_change_nothing(profiled, tmp_path):
    """Sites in groups, some of which hold sites of one transformer alone, give the tables of one pass."""
    pipe, one = profiled(True, AGAIN)
    plan = plan_profile(pipe, "TurnsPipeline", prompts=[3, 4], **SETTINGS)
    plan.groups = [[0, 1], [2], [3, 4, 5], [6, 7]]
    progress = []
    several = run_profile(pipe, plan, tmp_path / "several", on_progress=lambda *done: progress.append(done))
    for table in ("caching", "pruning"):
        assert pq.read_table(one.folder / f"{table}.parquet").equals(pq.read_table(several.folder / f"{table}.parquet"))
    assert progress[-1] == (4 * 2 * STEPS, 4 * 2 * STEPS)
    assert sorted(progress) == progress


def test_a_profile_is_read_as_it_was_written(wan, profile_of_wan, tmp_path):
    loaded = load_profile(copytree(profile_of_wan.folder, tmp_path / "p"))
    assert loaded.model == profile_of_wan.model == inspect_pipeline(wan, "SmallWan", STEPS, 5.0)[0]
    assert loaded.digest() == profile_of_wan.digest()
    table = pq.read_table(tmp_path / "p" / "caching.parquet")
    pq.write_table(table.filter([s != 8 for s in table["step"].to_pylist()]), tmp_path / "p" / "caching.parquet")
    with pytest.raises(FormatError, match="lacks rows of transformer_2, or has some twice"):
        loaded.caching_error()


def test_a_boundary_that_moves_while_profiling_is_refused(wan, tmp_path):
    plan = plan_profile(wan, "tiny", prompts=["a cat"], guidance_scale=5.0, **SETTINGS)
    wan.register_to_config(boundary_ratio=0.3)
    with pytest.raises(MismatchError, match="calls transformer at step 5"):
        run_profile(wan, plan, tmp_path / "p")


def test_flops_are_counted_at_a_transformers_own_steps(wan):
    model, _, step = inspect_pipeline(wan, "tiny", STEPS, 5.0)
    cost = count_flops(wan, model, step)
    high, low = (cost.transformers[name].full for name in NAMES)
    assert high == low > 0  # of one class, at one size
    assert cost.all_compute(schedule_of(wan)) == STEPS * high
    reused = schedule_of(wan, "CRRRR", "CRRRRR")
    assert cost.schedule(reused) == 2 * high + 9 * cost.transformers["transformer"].step.all_cached


# ---- compile ----------------------------------------------------------------------------------------------------------

T, SPLIT, LONGEST = 10, 4, 5


def in_turns(model, **turns):
    return replace(model, transformers={n: replace(t, called=turns[n]) for n, t in model.transformers.items()})


@pytest.fixture
def synthetic(make_model, make_cost, make_profile):
    """A profile of two transformers of 4 sites, of 4 and 6 steps; `high` costs three times as much as `low`; its errors."""
    model = in_turns(make_model(names=("high", "low")), high=tuple(range(SPLIT)), low=tuple(range(SPLIT, T)))
    rng = np.random.default_rng(3)
    errors = rng.uniform(0.01, 0.1, (T, 8, LONGEST)).cumsum(axis=2).astype(np.float32).astype(np.float64)
    cost = make_cost(model)
    high = cost.transformers["high"]
    dear = {key: replace(s, C=3 * s.C, P=tuple((k, 3 * c) for k, c in s.P)) for key, s in high.sites.items()}
    cost = replace(cost, transformers=cost.transformers | {"high": replace(high, sites=dear)})
    return make_profile(errors, model=model, cost=cost), errors


def placements(turns):
    """Yields (full steps of each turn, age of every step) of all placements that no interval of LONGEST steps is in."""
    options = [[(turn[0], *c) for n in range(len(turn)) for c in combinations(turn[1:], n)] for turn in turns]
    for placed in product(*options):
        full = sorted(step for anchors in placed for step in anchors)
        ages = [step - max(a for a in full if a <= step) for step in range(T)]
        if max(ages) < LONGEST:
            yield placed, ages


def every_choice(errors):
    """Returns the cost of computing all, and (cost, error, full steps) of all placements, by the definitions alone."""
    full, cached, loop = (20 + 3 * 320, 20 + 320), 12, 2
    found, of_high = [], slice(0, 4)
    for placed, ages in placements((range(SPLIT), range(SPLIT, T))):
        counts = [len(anchors) for anchors in placed]
        cost = T * loop + np.dot(counts, full) + (T - sum(counts)) * cached
        sites = [of_high if step < SPLIT else slice(4, 8) for step in range(T)]
        error = sum(errors[step, sites[step], age].sum() for step, age in enumerate(ages) if age)
        found.append((cost, error, placed))
    return T * loop + SPLIT * full[0] + (T - SPLIT) * full[1], found


@pytest.mark.parametrize("budget", [1.0, 1.2, 1.5, 2.0, 2.5, 3.0, 3.2])
def test_soda_finds_the_optimum_over_both_transformers(synthetic, budget):
    folder, errors = synthetic
    whole, choices = every_choice(errors)
    error, (high, low) = min(choice[1:] for choice in choices if choice[0] <= whole / budget * (1 + 1e-9))
    schedule = compile_schedule(folder, budget, knobs={"uas": "none"})
    assert schedule.predicted["error"] == pytest.approx(error, rel=1e-6)
    assert {n: tuple(p.anchors()) for n, p in schedule.transformers.items()} == {"high": high, "low": low}
    assert schedule.policy["knobs"]["anchors"] == len(high) + len(low)
    assert schedule.predicted["speedup"] >= budget * (1 - 1e-9)
    assert schedule.transformers["high"].stack == "....______"
    assert all(row[SPLIT:] == "______" for row in schedule.transformers["high"].rows.values())
    assert all(row[:SPLIT] == "____" for row in schedule.transformers["low"].rows.values())


def test_the_split_follows_the_costs(synthetic):
    """Full steps of the cheaper transformer are preferred: as many in other places have a smaller error, at a higher cost."""
    folder, errors = synthetic
    _, choices = every_choice(errors)
    schedule = compile_schedule(folder, 2.0, knobs={"uas": "none"})
    count = schedule.policy["knobs"]["anchors"]
    free = min((error, anchors) for _, error, anchors in choices if sum(map(len, anchors)) == count)
    assert free[0] < schedule.predicted["error"]  # it would not be affordable


@pytest.mark.parametrize("uas", ["priced", "paper"])
def test_pruning_spends_what_is_left_on_both(synthetic, uas):
    folder, errors = synthetic
    plain = compile_schedule(folder, 2.0, knobs={"uas": "none"})
    pruned = compile_schedule(folder, 2.0, knobs={"uas": uas})
    assert pruned.predicted["error"] < plain.predicted["error"]
    assert pruned.predicted["speedup"] >= 2.0 * (1 - 1e-9)
    assert any(p.k for p in pruned.transformers.values())
    total, rates = 0.0, np.array([0, 0.25, 0.5, 0.75, 1])  # E_p = E_c · rate² at the profile's rates, by the fixture
    for plan, first in zip(pruned.transformers.values(), (0, 4), strict=True):
        anchors = plan.anchors()
        for i, (site, row) in enumerate(plan.rows.items()):
            for step, action in enumerate(row):
                if action in "RP":
                    age = step - max(a for a in anchors if a <= step)
                    rate = 1 - plan.k[site][plan.cell(site, step, "P")] / 16 if action == "P" else 1
                    total += errors[step, first + i, age] * np.interp(rate, rates, [0, *(rates[1:4] ** 2), 1])
    assert pruned.predicted["error"] == pytest.approx(total, rel=1e-5)


def test_a_given_number_of_anchors_is_split_at_its_best(synthetic):
    folder, errors = synthetic
    _, choices = every_choice(errors)
    schedule = compile_schedule(folder, 1.0, knobs={"uas": "none", "anchors": 5})
    best = min((error, anchors) for _, error, anchors in choices if sum(map(len, anchors)) == 5)
    assert tuple(tuple(p.anchors()) for p in schedule.transformers.values()) == best[1]
    with pytest.raises(BudgetError, match="Knob anchors is 2; 3 to 10 full steps meet a budget of 1x"):
        compile_schedule(folder, 1.0, knobs={"anchors": 2})
    with pytest.raises(BudgetError, match="at most"):
        compile_schedule(folder, 50.0)


@pytest.mark.parametrize("budget", [1.2, 1.7, 2.4])
def test_turns_that_come_again_begin_anew(synthetic, make_model, make_profile, budget):
    """A B A: each turn is placed by itself, the counts of one transformer's turns together."""
    _, errors = synthetic
    model = in_turns(make_model(names=("high", "low")), high=(0, 1, 2, 7, 8, 9), low=(3, 4, 5, 6))
    schedule = compile_schedule(make_profile(errors, name="again", model=model), budget, knobs={"uas": "none"})
    stacks = {name: plan.stack for name, plan in schedule.transformers.items()}
    assert stacks == {"high": "...____...", "low": "___....___"}
    best = np.inf
    for placed, ages in placements((range(3), range(3, 7), range(7, T))):
        count = sum(map(len, placed))
        if T * 2 + count * 340 + (T - count) * 12 <= (T * 2 + T * 340) / budget:
            sites = [slice(4, 8) if 3 <= step < 7 else slice(0, 4) for step in range(T)]
            best = min(best, sum(errors[step, sites[step], age].sum() for step, age in enumerate(ages) if age))
    assert schedule.predicted["error"] == pytest.approx(best, rel=1e-6)


def test_fora_spreads_its_anchors_within_each_turn(synthetic):
    folder, _ = synthetic
    counts = {}
    for anchors in range(2, T + 1):
        schedule = compile_schedule(folder, 1.0, "fora", knobs={"anchors": anchors})
        high, low = (plan.anchors() for plan in schedule.transformers.values())
        counts[anchors] = len(high), len(low)
        assert high[0] == 0
        assert low[0] == SPLIT
        for own, length in ((high, SPLIT), (low, T - SPLIT)):
            intervals = np.diff([*own, own[0] + length])
            assert max(intervals) - min(intervals) <= 1
    assert [sum(c) for c in counts.values()] == list(counts)
    assert counts[2] == (1, 1)
    assert counts[5] == (2, 3)
    assert counts[T] == (SPLIT, T - SPLIT)
    best = compile_schedule(folder, 2.0, "fora")
    assert best.predicted["speedup"] >= 2.0
    assert load_cost(folder / "cost.flops.json").speedup(best) == best.predicted["speedup"]
    more = {"anchors": best.policy["knobs"]["anchors"] + 1}
    with pytest.raises(BudgetError, match="Knob anchors is 5; 2 to 4 full steps meet a budget of 2x"):
        compile_schedule(folder, 2.0, "fora", knobs=more)
    with pytest.raises(BudgetError, match="2 to 10 full steps meet a budget of 1x"):
        compile_schedule(folder, 1.0, "fora", knobs={"anchors": 1})


def test_the_caches_of_one_turn_are_predicted(synthetic):
    """16 tokens of width 8 in float32 on two branches: four sites at once, not eight."""
    folder, _ = synthetic
    schedule = compile_schedule(folder, 3.0, knobs={"uas": "none"})
    assert schedule.predicted["cache_bytes"] == 4 * 16 * 8 * 4 * 2


# ---- run --------------------------------------------------------------------------------------------------------------


def applied(pipe, schedule, runtime="hooks"):
    return with_known_programs(sodaprof.apply(pipe, schedule, runtime=runtime_of(runtime)))


def by_hand(pipe, schedule, scale):
    """Returns the latents with the schedule carried out by forward hooks of the test's own, one store a module and pass."""
    stores, calls, hooks = defaultdict(dict), defaultdict(int), []
    passes = 1 if schedule.sampler.guidance_form == "none" else 2
    for name, plan in schedule.transformers.items():
        for site, row in plan.rows.items():

            def serve(module, args, out, plan=plan, site=site, row=row):
                step = calls[module] // passes + (row.rindex("_", 0, 6) + 1 if row[0] == "_" else 0)
                store = stores[module, calls[module] % passes]
                calls[module] += 1
                if row[step] == "C":
                    store[step] = store["latest"] = out
                if row[step] != "F":
                    return store["latest"]
                cell = plan.forecasts[site][plan.cell(site, step, "F")]
                parts = [store[source] * weight for source, weight in zip(cell.sources, cell.weights, strict=True)]
                return sum(parts[1:], parts[0])

            hooks.append(pipe.components[name].get_submodule(site).register_forward_hook(serve))
    out = draw(pipe, scale=scale)
    for hook in hooks:
        hook.remove()
    return out


@pytest.mark.parametrize("runtime", ["hooks", "compiled"])
def test_a_schedule_of_c_alone_changes_no_bit(wan, runtime):
    plain = draw(wan)
    with applied(wan, schedule_of(wan), runtime) as handle:
        for _ in range(1 if runtime == "hooks" else 3):
            assert torch.equal(draw(wan), plain)
            report = handle.report()
            assert report.complete
            assert report.executed == report.planned == {"C": 2 * STEPS * 6}  # both branches
    assert torch.equal(draw(wan), plain)


@pytest.mark.parametrize(("scale", "runtime"), [(5.0, "graphs"), (1.0, "compiled")])
def test_each_transformer_reuses_its_own_outputs(wan, scale, runtime):
    schedule = mixed(wan, scale)
    wanted, plain = by_hand(wan, schedule, scale), draw(wan, scale=scale)
    assert not torch.equal(wanted, plain)
    with applied(wan, schedule) as handle:
        assert torch.equal(draw(wan, scale=scale), wanted)
        other = draw(wan, "another prompt", scale=scale)
        branches = 2 if scale > 1 else 1
        cells = {"C": branches * 5 * 6, "R": branches * 4 * 6, "F": branches * 2 * 6}
        assert handle.report().executed == handle.report().planned == cells
    with applied(wan, schedule, runtime) as handle:
        for _ in range(4):
            assert torch.equal(draw(wan, scale=scale), wanted)
            assert handle.report().executed == handle.report().planned
        assert torch.equal(draw(wan, "another prompt", scale=scale), other)
        assert [tables.steps for tables in handle.executor.engine.tables] == [list(HIGH), list(LOW)]
        captures = handle.executor.engine.captures
        assert len(captures) == (2 if runtime == "graphs" else 0)
        assert all(capture.graphs and capture.replays for capture in captures)


def test_caches_and_tables_are_those_of_the_transformer_whose_turn_it_is(wan):
    with applied(wan, mixed(wan), "compiled") as handle:
        draw(wan), draw(wan)
        kept, ready, served, step = {}, {}, [], wan.scheduler.step

        def note(*args, **kwargs):
            kept[handle.executor.clock.step] = [bool(row.memory) for row in handle.executor.rows]
            ready[handle.executor.clock.step] = [len(block.ready) for block in handle.executor.engine.blocks]
            counters = handle.report().counters
            served.append(counters.blocks_from_tables + counters.sums)
            return step(*args, **kwargs)

        wan.scheduler.step = note
        draw(wan)
        wan.scheduler.step = step
    assert kept[4] == [True] * 6 + [False] * 6
    assert kept[5] == [False] * 6 + [True] * 6
    assert ready[4] == [2 * len(HIGH)] * 2 + [0] * 2
    assert ready[5][2:] == [2 * len(LOW)] * 2  # filled when its turn begins
    assert np.diff(served)[len(HIGH) :].min() > 0  # every step of the second turn takes values from its tables


def test_stacks_are_skipped_in_each_turn(wan):
    schedule = schedule_of(wan, "CCCCC", "CC-CCC", stack="_____..S...", stack_forecasts=(Forecast((6,), (1.0,)),))
    plain = draw(wan)
    with applied(wan, schedule) as handle:
        wanted = draw(wan)
        assert handle.report().executed == handle.report().planned == {"C": 2 * 10 * 6, "-": 2 * 6}
    assert not torch.equal(wanted, plain)
    with applied(wan, schedule, "compiled"):
        for _ in range(3):
            assert torch.equal(draw(wan), wanted)


def test_a_profile_in_halves_leads_to_schedules_that_run(profiled):
    pipe, profile = profiled(True, AGAIN)
    plain = paint(pipe)
    for policy in ("fora", "soda"):
        schedule = compile_schedule(profile.folder, "1.6x", policy)
        with applied(pipe, schedule) as handle:
            wanted = paint(pipe)
            assert handle.report().executed == handle.report().planned
        assert not np.array_equal(wanted, plain)
    with applied(pipe, schedule, "compiled") as handle:  # soda's: steps that compute all, some and nothing
        for _ in range(3):
            assert np.array_equal(paint(pipe), wanted)
            assert handle.report().executed == handle.report().planned


def test_a_profile_in_passes_leads_to_schedule_files_that_run(wan, profile_of_wan, tmp_path):
    plain = draw(wan)
    for policy in ("soda", "fora"):
        schedule = compile_schedule(profile_of_wan.folder, "1.6x", policy)
        schedule.save(tmp_path / f"{policy}.json")
        with sodaprof.apply(wan, tmp_path / f"{policy}.json") as handle:
            assert handle.schedule.digest() == schedule.digest()
            assert not torch.equal(draw(wan), plain)
            report = handle.report()
            assert report.complete
            assert report.executed == report.planned
            assert sum(report.planned.values()) == 2 * STEPS * 6  # on both branches; _ is no action
    assert torch.equal(draw(wan), plain)


# ---- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("ratio", "found"), [(0.3, "8 of 11"), (0.9, "2 of 11"), (None, "11 of 11")])
def test_another_boundary_is_refused_when_a_schedule_is_applied(wan, ratio, found):
    schedule, plain = mixed(wan), draw(wan)
    wan.register_to_config(boundary_ratio=ratio)
    with pytest.raises(MismatchError, match=f"calls transformer at {found} steps") as caught:
        sodaprof.apply(wan, schedule)
    recommended = float(str(caught.value).split("pipe.register_to_config(boundary_ratio=")[1].split(")")[0])
    wan.register_to_config(boundary_ratio=recommended)
    with applied(wan, schedule_of(wan)):
        assert torch.equal(draw(wan), plain)


LATE, EARLY = "calls transformer at step 5 .* 0, 1, 2, 3, 4", "calls transformer_2 at step 2 "


@pytest.mark.parametrize(("ratio", "found"), [(0.3, LATE), (0.9, EARLY)])
def test_another_boundary_is_refused_while_running(wan, ratio, found):
    with applied(wan, mixed(wan)) as handle:
        wanted = draw(wan)
        wan.register_to_config(boundary_ratio=ratio)
        with pytest.raises(MismatchError, match=f"{found}.*boundary_ratio"):
            draw(wan)
        assert not handle.report().complete
        wan.register_to_config(boundary_ratio=BOUNDARY)
        assert torch.equal(draw(wan), wanted)  # a refused run changes nothing
        assert handle.report().complete


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"turns": (tuple(range(6)), tuple(range(6, STEPS)))}, "calls transformer at step 5 "),
        ({"skipped": (3,)}, "took step 3 without calling a transformer"),
        ({"skipped": (5,)}, "took step 5 without calling a transformer"),
        ({"halves": (False, True)}, "guidance form 'passes'"),
    ],
)
def test_a_pipeline_that_calls_its_transformers_otherwise_than_profiled_is_refused(changes, message):
    pipe = turns_pipe(halves=False)
    with applied(pipe, schedule_of(pipe, "CRRCR", "CCRCRR", 4.0)):
        wanted, before = paint(pipe), {name: getattr(pipe, name) for name in changes}
        vars(pipe).update(changes)
        with pytest.raises(MismatchError, match=message):
            paint(pipe)
        vars(pipe).update(before)
        assert np.array_equal(paint(pipe), wanted)


# ---- reports ----------------------------------------------------------------------------------------------------------


def shown(view) -> str:
    console = Console(width=100, file=io.StringIO())
    console.print(view)
    return console.file.getvalue()


def test_show_prints_both_pictures(wan):
    schedule = schedule_of(wan, "CRRCR", "CCRCRR")
    text = shown(schedule_view(schedule))
    for part in (
        "CRRCR______",
        "_____CCRCRR",
        "_ another transformer's step",
        "full steps: 0 3\ncache intervals: 3 2",
        "full steps: 5 6 8\ncache intervals: 1 2 3",
    ):
        assert part in text
    data = schedule_data(schedule)
    assert data["counts"] == {"C": 30, "R": 36}
    assert [data["transformers"][name]["intervals"] for name in NAMES] == [[3, 2], [1, 2, 3]]
    site = data["transformers"]["transformer_2"]["sites"]["blocks.0.attn1"]
    assert site["reuse_ages"] == {"7": 1, "9": 1, "10": 2}


def test_inspect_and_doctor_report_both(wan):
    model, sampler, step = inspect_pipeline(wan, "tiny", STEPS, 5.0)
    text = shown(inspection_view(model, sampler, count_flops(wan, model, step)))
    assert all(f"{name}: WanTransformer3DModel" in text for name in NAMES)
    result = diagnose(wan, "tiny", STEPS, 5.0)
    assert set(result["verdict"]) == set(NAMES)
    assert {about["lowered"] for about in result["transformers"].values()} == {2}
