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
from diffusers import DDIMScheduler, DiTPipeline, FlowMatchEulerDiscreteScheduler, WanPipeline, WanTransformer3DModel
from msgspec.structs import replace
from rich.console import Console

import sodaprof
from sodaprof.compiler import compile_schedule
from sodaprof.doctor.diagnose import diagnose
from sodaprof.errors import BudgetError, FormatError, MismatchError, UnsupportedModelError
from sodaprof.formats.cost import load_cost
from sodaprof.formats.files import write_json
from sodaprof.formats.profile import load_inspection, load_profile
from sodaprof.formats.schedule import Forecast, Plan, Schedule
from sodaprof.formats.schedule_file import load_schedule
from sodaprof.pipelines.discover import inspect_pipeline
from sodaprof.pipelines.flops import count_flops
from sodaprof.profiler.plan import plan_profile
from sodaprof.profiler.run import run_profile
from sodaprof.report.results import inspection_view
from sodaprof.report.schedule import schedule_data, schedule_view
from sodaprof.runtime.compiled.engine import Compiled
from tests.tape import Tapes
from tests.tiny_pipelines import tiny_pipe, tiny_vae, with_known_programs
from tests.zoo.zoo import WAN

STEPS, BOUNDARY = 11, 0.55
HIGH, LOW = range(5), range(5, 11)  # the steps of the two transformers
NAMES = ("transformer", "transformer_2")
TURNS = {"transformer": tuple(HIGH), "transformer_2": tuple(LOW)}


# ---- pipelines --------------------------------------------------------------------------------------------------------


class SmallWan(WanPipeline):
    """WanPipeline at a tiny size, its prompts told apart by a random embedding instead of a text encoder."""

    def encode_prompt(self, prompt=None, **given):
        draw = lambda seed: torch.randn(5, 12, generator=torch.Generator().manual_seed(seed))  # noqa: E731
        guided = given["do_classifier_free_guidance"]
        return torch.stack([draw(len(p)) for p in prompt]), torch.stack([draw(99) for _ in prompt]) if guided else None

    def __call__(self, prompt, **arguments):
        return super().__call__(prompt, height=64, width=64, num_frames=5, **arguments | {"output_type": "latent"})


def small_wan():
    networks = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        networks.append(WanTransformer3DModel(**WAN).eval())
    scheduler = FlowMatchEulerDiscreteScheduler()
    pipe = SmallWan(None, None, None, scheduler, *networks, boundary_ratio=BOUNDARY)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def wan():
    return small_wan()


def draw(pipe, prompt="a cat", steps=STEPS, scale=5.0, seed=0):
    """Returns the latents [1, C, F, H, W] of the pipeline's own call."""
    generator = torch.Generator().manual_seed(seed)
    return pipe([prompt], guidance_scale=scale, num_inference_steps=steps, generator=[generator]).frames


class TurnsPipeline(DiTPipeline):
    """DiT with two transformers. turns: their steps; halves: of each, whether both guidance branches share a batch.

    skipped: steps without a call; doubled: steps at which the first one is called, too.
    """

    def __init__(self, transformer, vae, scheduler, transformer_2):
        super().__init__(transformer, vae, scheduler, {i: f"class {i}" for i in range(10)})
        self.register_modules(transformer_2=transformer_2)
        self.turns, self.halves, self.skipped, self.doubled = (HIGH, LOW), (True, True), (), ()

    @torch.no_grad()
    def __call__(self, class_labels, guidance_scale=4.0, generator=None, num_inference_steps=50, output_type="np"):
        n = len(class_labels)
        x = torch.cat([torch.randn(1, 4, 8, 8, generator=g) for g in generator])
        labels, null = torch.tensor(class_labels), torch.full((n,), 1000)
        self.scheduler.set_timesteps(num_inference_steps)
        for step, t in enumerate(self.scheduler.timesteps):
            second = step not in self.turns[0]
            network = self.transformer_2 if second else self.transformer
            if step in self.doubled:
                self.transformer(torch.cat([x, x]), timestep=t.expand(2 * n), class_labels=torch.cat([labels, null]))
            if step in self.skipped:
                cond = uncond = x
            elif self.halves[second]:
                both = network(
                    torch.cat([x, x]), timestep=t.expand(2 * n), class_labels=torch.cat([labels, null])
                ).sample
                cond, uncond = both.chunk(2)
            else:
                cond = network(x, timestep=t.expand(n), class_labels=labels).sample
                uncond = network(x, timestep=t.expand(n), class_labels=null).sample
            x = self.scheduler.step(uncond + guidance_scale * (cond - uncond), t, x).prev_sample
        return type("Out", (), {"images": self.vae.decode(x).sample.permute(0, 2, 3, 1).numpy()})()


def turns_pipe(halves=True):
    networks = [tiny_pipe(seed=seed).transformer for seed in (0, 1)]
    pipe = TurnsPipeline(networks[0], tiny_vae(), DDIMScheduler(clip_sample=False), networks[1])
    pipe.halves = (halves, halves)
    return pipe


def paint(pipe, labels=(1, 2), steps=STEPS):
    generators = [torch.Generator().manual_seed(seed) for seed in range(len(labels))]
    return pipe(list(labels), generator=generators, num_inference_steps=steps).images


# ---- schedules --------------------------------------------------------------------------------------------------------


def schedule_of(pipe, high="CCCCC", low="CCCCCC", scale=5.0, **changes) -> Schedule:
    """Returns the schedule with one row for all sites of each transformer; changes: fields of transformer_2's plan."""
    model, sampler, _ = inspect_pipeline(pipe, "tiny", STEPS, scale)
    plans = {}
    for (name, t), row in zip(model.transformers.items(), (high + "_" * 6, "_" * 5 + low), strict=True):
        stack = "".join(a if a in "_" else "." for a in row)
        plans[name] = Plan(t.class_name, t.fingerprint, dict.fromkeys((s.key for s in t.sites), row), stack)
    plans["transformer_2"] = replace(plans["transformer_2"], **changes)
    return Schedule(plans, sampler, model.shape, {"name": "test", "knobs": {}})


def compiled(pipe, schedule, **settings):
    return with_known_programs(sodaprof.apply(pipe, schedule, runtime=Compiled(**settings)))


def mixed(pipe, scale=5.0):
    """Returns a schedule of C, R and F; the two transformers differ."""
    forecasts = (Forecast((6, 5), (1.5, -0.5)), Forecast((8,), (1.0,)))
    schedule = schedule_of(pipe, "CRRCR", "CCFCRF", scale)
    second = schedule.transformers["transformer_2"]
    second = replace(second, forecasts=dict.fromkeys(second.rows, forecasts))
    return replace(schedule, transformers=schedule.transformers | {"transformer_2": second})


def by_hand(pipe, schedule, scale=5.0):
    """Returns the latents with the schedule carried out by forward hooks of the test's own, one store a module and pass."""
    stores, calls, undo = defaultdict(dict), defaultdict(int), []
    passes = 1 if schedule.sampler.guidance_form == "none" else 2
    for name, plan in schedule.transformers.items():
        for site, row in plan.rows.items():

            def serve(module, args, out, plan=plan, site=site, row=row):
                step = calls[module] // passes + row.rindex("_", 0, 6) + 1 if row[0] == "_" else calls[module] // passes
                store = stores[module, calls[module] % passes]
                calls[module] += 1
                if row[step] == "C":
                    store[step] = store["latest"] = out
                elif row[step] == "R":
                    return store["latest"]
                else:
                    cell = plan.forecasts[site][plan.cell(site, step, "F")]
                    parts = [store[source] * weight for source, weight in zip(cell.sources, cell.weights, strict=True)]
                    return sum(parts[1:], parts[0])
                return None

            undo.append(pipe.components[name].get_submodule(site).register_forward_hook(serve))
    out = draw(pipe, scale=scale)
    for handle in undo:
        handle.remove()
    return out


# ---- discovery --------------------------------------------------------------------------------------------------------


def test_whose_steps_are_whose_is_found_by_running(wan):
    ran = []
    hooks = [wan.components[n].register_forward_hook(lambda *_, n=n: ran.append(n)) for n in NAMES]
    model, sampler, step = inspect_pipeline(wan, "tiny", STEPS, 5.0)
    for hook in hooks:
        hook.remove()
    assert {name: t.called for name, t in model.transformers.items()} == TURNS
    assert step.called == TURNS
    assert sampler.guidance_form == "passes"
    by_turn = model.transformers["transformer_2"].past(STEPS)
    assert by_turn == [-1] * 5 + [0, 1, 2, 3, 4, 5]
    plain = draw(wan)
    assert torch.equal(plain, draw(wan))  # nothing is left on the pipeline


def test_a_transformer_that_is_never_called_has_no_part_in_it(wan):
    wan.register_to_config(boundary_ratio=None)
    model, _, step = inspect_pipeline(wan, "tiny", STEPS, 5.0)
    assert list(model.transformers) == ["transformer"]
    assert model.transformers["transformer"].called == ()
    assert step.called == {}
    wan.register_to_config(boundary_ratio=2.0)
    model, _, _ = inspect_pipeline(wan, "tiny", STEPS, 5.0)
    assert [(name, t.called) for name, t in model.transformers.items()] == [("transformer_2", ())]


def test_the_steps_are_kept_in_model_json_and_broken_ones_refused(wan, tmp_path):
    model, sampler, _ = inspect_pipeline(wan, "tiny", STEPS, 5.0)
    path = tmp_path / "model.json"
    write_json(tmp_path / "sampler.json", sampler.to_json())
    for called in (None, "missing", [], [3, 2], [1, 1], [-1, 0], ["0"], 3):
        data = json.loads(json.dumps(model.to_json()))
        if called is not None:
            data["transformers"]["transformer"]["called"] = called
        if called == "missing":
            del data["transformers"]["transformer"]["called"]
        write_json(path, data, force=True)
        if called is None:
            assert load_inspection(tmp_path).model == model
        elif called == "missing":
            assert load_inspection(tmp_path).model.transformers["transformer"].called == ()
        else:
            with pytest.raises(FormatError, match=r"model\.json"):
                load_inspection(tmp_path)
    single, _, _ = inspect_pipeline(tiny_pipe(), "tiny", 4, 4.0)
    assert set(single.to_json()["transformers"]["transformer"]) == {"class", "fingerprint", "sites"}  # as it always was


def test_transformers_that_are_guided_differently_are_refused():
    pipe = turns_pipe()
    pipe.halves = (True, False)
    with pytest.raises(UnsupportedModelError, match="transformer with halves, transformer_2 with passes"):
        inspect_pipeline(pipe, "tiny", STEPS, 4.0)


def test_two_transformers_in_one_step_are_refused():
    pipe = turns_pipe()
    pipe.doubled = (7,)
    with pytest.raises(UnsupportedModelError, match="calls 12 in 11 steps"):
        plan_profile(pipe, "tiny", steps=STEPS, samples=1)


# ---- profile ----------------------------------------------------------------------------------------------------------

SETTINGS = {"steps": STEPS, "samples": 2, "batch_size": 2, "max_interval": 4}


AGAIN = (0, 1, 2, 8, 9, 10), tuple(range(3, 8))  # the first one's turn comes again


@pytest.fixture(scope="module")
def profiled(tmp_path_factory):
    """Returns a function (halves, turns) -> a pipeline and its profile, made once: copy that before changing it."""

    @cache
    def of(halves, turns):
        pipe = turns_pipe(halves)
        pipe.turns = turns
        return pipe, sodaprof.profile(pipe, tmp_path_factory.mktemp("turns") / "p", prompts=[3, 4], **SETTINGS)

    return of


@pytest.fixture(scope="module")
def profile_of_wan(tmp_path_factory):
    """The profile of `wan`, made once: copy it before changing it."""
    settings = SETTINGS | {"prompts": ["a cat", "a small dog"], "guidance_scale": 5.0}
    return sodaprof.profile(small_wan(), tmp_path_factory.mktemp("wan") / "p", **settings)


@pytest.mark.parametrize(("halves", "turns"), [(True, (HIGH, LOW)), (False, (HIGH, LOW)), (True, AGAIN)])
def test_errors_are_those_of_a_transformer_against_itself(halves, turns, profiled):
    pipe, profile = profiled(halves, turns)
    assert profile.sampler.guidance_form == ("halves" if halves else "passes")
    errors = profile.caching_error()
    pruning, rates = profile.pruning_error()
    for name, own in zip(NAMES, turns, strict=True):
        sites = profile.model.transformers[name].sites
        found = {s.key: [] for s in sites}
        modules = {key: pipe.components[name].get_submodule(key) for key in found}
        hooks = [m.register_forward_hook(lambda _, a, out, to=found[key]: to.append(out)) for key, m in modules.items()]
        paint(pipe, [3, 4])
        for hook in hooks:
            hook.remove()
        for s, site in enumerate(sites):
            seen = found[site.key]
            full = seen if halves else [torch.cat(pair) for pair in zip(seen[::2], seen[1::2], strict=True)]
            for i, step in enumerate(own):
                for age in range(1, 4):
                    if step - age not in own:
                        assert np.isnan(errors[name][step, s, age])
                        assert np.isnan(pruning[name][step, s, age]).all()
                        continue
                    now, past = full[i].double(), full[i - age].double()
                    cos = (1 - torch.cosine_similarity(now, past, dim=-1)).mean().item()
                    assert errors[name][step, s, age] == pytest.approx(cos, rel=2e-4)
        others = [step for step in range(STEPS) if step not in own]
        assert np.isnan(errors[name][others]).all()
    rows = pq.read_table(profile.folder / "caching.parquet", columns=["transformer", "step", "age", "branch"])
    lengths = [3, 5, 3] if turns is AGAIN else [5, 6]
    ages = sum(min(i, 3) for length in lengths for i in range(length))
    assert rows.num_rows == ages * 4 * 3  # sites, branches and their mean
    assert len(rates) == 8


def test_passes_over_the_trajectories_change_nothing(profiled, tmp_path):
    """Sites in groups, some of which hold sites of one transformer alone, give the tables of one pass."""
    pipe, one = profiled(True, (HIGH, LOW))
    plan = plan_profile(pipe, "TurnsPipeline", prompts=[3, 4], **SETTINGS)
    plan.groups = [[0, 1], [2], [3, 4, 5], [6, 7]]
    told = []
    several = run_profile(pipe, plan, tmp_path / "several", on_progress=lambda done, total: told.append((done, total)))
    for table in ("caching", "pruning"):
        assert pq.read_table(one.folder / f"{table}.parquet").equals(pq.read_table(several.folder / f"{table}.parquet"))
    assert told[-1] == (4 * 2 * STEPS, 4 * 2 * STEPS)
    assert sorted(told) == told


def test_a_profile_comes_back_from_its_folder(wan, profile_of_wan, tmp_path):
    made = profile_of_wan
    loaded = load_profile(copytree(made.folder, tmp_path / "p"))
    assert loaded.model == made.model == inspect_pipeline(wan, "SmallWan", STEPS, 5.0)[0]
    assert [t.called for t in loaded.model.transformers.values()] == [tuple(HIGH), tuple(LOW)]
    assert loaded.digest() == made.digest()
    table = pq.read_table(tmp_path / "p" / "caching.parquet")
    pq.write_table(table.filter([s != 8 for s in table["step"].to_pylist()]), tmp_path / "p" / "caching.parquet")
    with pytest.raises(FormatError, match="rows are missing at age 1"):
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


@pytest.fixture
def synthetic(make_model, make_cost, make_profile):
    """A profile of two transformers of 4 sites, of 4 and 6 steps, `high` three times as dear as `low`; its errors."""
    model = make_model(names=("high", "low"))
    turns = {"high": tuple(range(SPLIT)), "low": tuple(range(SPLIT, T))}
    model = replace(model, transformers={n: replace(t, called=turns[n]) for n, t in model.transformers.items()})
    rng = np.random.default_rng(3)
    errors = rng.uniform(0.01, 0.1, (T, 8, LONGEST)).cumsum(axis=2).astype(np.float32).astype(np.float64)
    cost = make_cost(model)
    high = cost.transformers["high"]
    dear = {key: replace(s, C=3 * s.C, P=tuple((k, 3 * c) for k, c in s.P)) for key, s in high.sites.items()}
    cost = replace(cost, transformers=cost.transformers | {"high": replace(high, sites=dear)})
    return make_profile(errors, model=model, cost=cost), errors


def every_choice(errors):
    """Returns (cost, error, anchors) of all placements of anchors in both turns, by the definitions alone."""
    full, cached, loop = {"high": 20 + 3 * 320, "low": 20 + 320}, 12, 2
    found = []
    turns = (range(SPLIT), range(SPLIT, T))
    options = []
    for turn in turns:
        rest = turn[1:]
        options.append([(turn[0], *c) for n in range(len(rest) + 1) for c in combinations(rest, n)])
    for high, low in product(*options):
        total = T * loop + len(high) * full["high"] + len(low) * full["low"] + (T - len(high) - len(low)) * cached
        error, fits = 0.0, True
        for sites, turn, anchors in ((slice(0, 4), turns[0], high), (slice(4, 8), turns[1], low)):
            for step in turn:
                age = step - max(a for a in anchors if a <= step)
                fits &= age < LONGEST
                error += errors[step, sites, age].sum() if 0 < age < LONGEST else 0.0
        if fits:
            found.append((total, error, (high, low)))
    return T * loop + SPLIT * full["high"] + (T - SPLIT) * full["low"], found


@pytest.mark.parametrize("budget", [1.0, 1.2, 1.5, 2.0, 2.5, 3.0, 3.2])
def test_soda_finds_the_optimum_over_both_transformers(synthetic, budget):
    folder, errors = synthetic
    whole, choices = every_choice(errors)
    affordable = [(error, anchors) for cost, error, anchors in choices if cost <= whole / budget * (1 + 1e-9)]
    error, (high, low) = min(affordable)
    schedule = compile_schedule(folder, budget, knobs={"uas": "none"})
    assert schedule.predicted["error"] == pytest.approx(error, rel=1e-6)
    assert {n: tuple(p.anchors()) for n, p in schedule.transformers.items()} == {"high": high, "low": low}
    assert schedule.policy["knobs"]["anchors"] == len(high) + len(low)
    assert schedule.predicted["speedup"] >= budget * (1 - 1e-9)
    assert schedule.transformers["high"].stack == "....______"
    assert all(row[SPLIT:] == "______" for row in schedule.transformers["high"].rows.values())
    assert all(row[:SPLIT] == "____" for row in schedule.transformers["low"].rows.values())


def test_the_split_follows_the_costs(synthetic):
    """As many anchors as before, but where they are cheap: the choice is not one of the sum alone."""
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
    total = (
        0.0  # of the picture as it is drawn: E_p = E_c · rate² by the fixture, at the profile's rates and between them
    )
    rates = np.array([0, 0.25, 0.5, 0.75, 1])
    for plan, first in zip(pruned.transformers.values(), (0, 4), strict=True):
        anchors = plan.anchors()
        for i, (site, row) in enumerate(plan.rows.items()):
            for step, action in enumerate(row):
                if action in "RP":
                    age = step - max(a for a in anchors if a <= step)
                    rate = 1 - plan.k[site][plan.cell(site, step, "P")] / 16 if action == "P" else 1
                    served = np.interp(rate, rates, [0, *(rates[1:4] ** 2), 1])
                    total += errors[step, first + i, age] * served
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


@pytest.mark.parametrize("budget", [1.2, 1.5, 1.7, 2.0, 2.4])
def test_turns_that_come_again_begin_anew(synthetic, make_model, make_profile, budget):
    """A B A: each turn is placed by itself, the counts of one transformer's turns together."""
    _, errors = synthetic
    turns = {"high": (0, 1, 2, 7, 8, 9), "low": (3, 4, 5, 6)}
    model = make_model(names=("high", "low"))
    model = replace(model, transformers={n: replace(t, called=turns[n]) for n, t in model.transformers.items()})
    folder = make_profile(errors, name="again", model=model)
    schedule = compile_schedule(folder, budget, knobs={"uas": "none"})
    stacks = {name: plan.stack for name, plan in schedule.transformers.items()}
    assert stacks == {"high": "...____...", "low": "___....___"}
    assert {0, 7} <= set(schedule.transformers["high"].anchors())
    best = np.inf
    for anchors in product([0, 1], repeat=T):
        at = [t for t in range(T) if anchors[t]]
        if not {0, 3, 7} <= set(at) or T * 2 + len(at) * 340 + (T - len(at)) * 12 > (T * 2 + T * 340) / budget:
            continue
        error = 0.0
        for step in range(T):
            age = step - max(a for a in at if a <= step)
            own = slice(4, 8) if step in turns["low"] else slice(0, 4)
            error += errors[step, own, age].sum() if age else 0.0
        best = min(best, error)
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

RUNTIMES = {
    "hooks": "hooks",
    "compiled": "compiled",
    "without tables": Compiled(tables=False),
    "without sums": Compiled(sums=None),
}


@pytest.mark.parametrize("runtime", ["hooks", "compiled", "without tables"])  # there are no sums
@pytest.mark.parametrize("scale", [5.0, 1.0])
def test_a_schedule_of_c_alone_changes_no_bit(wan, runtime, scale):
    plain = draw(wan, scale=scale)
    with with_known_programs(sodaprof.apply(wan, schedule_of(wan, scale=scale), runtime=RUNTIMES[runtime])) as handle:
        for _ in range(3):
            assert torch.equal(draw(wan, scale=scale), plain)
            report = handle.report()
            assert report.complete
            assert report.executed == report.planned == {"C": STEPS * 6}
    assert torch.equal(draw(wan, scale=scale), plain)


@pytest.mark.parametrize(
    ("scale", "runtimes"), [(5.0, ("compiled", "without tables", "without sums")), (1.0, ("compiled",))]
)
def test_each_transformer_reuses_its_own_outputs(wan, scale, runtimes):
    schedule = mixed(wan, scale)
    wanted, plain = by_hand(wan, schedule, scale), draw(wan, scale=scale)
    assert not torch.equal(wanted, plain)
    with sodaprof.apply(wan, schedule) as handle:
        assert torch.equal(draw(wan, scale=scale), wanted)
        other = draw(wan, "another prompt", scale=scale)
        report = handle.report()
        assert report.executed == report.planned == {"C": 5 * 6, "R": 4 * 6, "F": 2 * 6}
    for runtime in runtimes:
        with with_known_programs(sodaprof.apply(wan, schedule, runtime=RUNTIMES[runtime])) as handle:
            for _ in range(3):
                assert torch.equal(draw(wan, scale=scale), wanted)
                assert handle.report().executed == handle.report().planned
            assert torch.equal(draw(wan, "another prompt", scale=scale), other)


def test_tables_and_sums_are_those_of_each_transformer(wan):
    schedule = mixed(wan)
    with compiled(wan, schedule) as handle:
        for _ in range(2):
            draw(wan)
        seen = []
        inner = handle.engine.tables[1].arguments.is_expected
        handle.engine.tables[1].arguments.is_expected = lambda *given: (seen.append(inner(*given)), seen[-1])[1]
        held = {}
        step = wan.scheduler.step

        def look(*args, **kwargs):
            held[handle.clock.step] = (
                [len(b.sums) for b in handle.engine.blocks],
                [len(b.ready) for b in handle.engine.blocks],
            )
            return step(*args, **kwargs)

        wan.scheduler.step = look
        draw(wan)
        wan.scheduler.step = step
        assert [tables.steps for tables in handle.engine.tables] == [list(HIGH), list(LOW)]
        assert seen == [True] * 2 * (len(LOW) - 1)  # served from the tables on both branches
        assert held[4][1] == [2 * len(HIGH)] * 2 + [0] * 2  # the second's are filled when its turn begins
        assert held[5][1][2:] == [2 * len(LOW)] * 2


def test_caches_are_let_go_when_the_other_takes_over(wan):
    schedule = mixed(wan)
    with sodaprof.apply(wan, schedule) as handle:
        kept = {}
        step = wan.scheduler.step

        def look(*args, **kwargs):
            kept[handle.clock.step] = [bool(row.memory) for row in handle.rows]
            return step(*args, **kwargs)

        wan.scheduler.step = look
        draw(wan)
        wan.scheduler.step = step
    assert kept[4] == [True] * 6 + [False] * 6
    assert kept[5] == [False] * 6 + [True] * 6


def test_captured_steps_give_the_bits_of_the_hooks(wan):
    schedule, tapes = mixed(wan), Tapes()
    wanted = by_hand(wan, schedule)
    with compiled(wan, schedule, graphs=tapes) as handle:
        for _ in range(4):
            assert torch.equal(draw(wan), wanted)
            assert handle.report().executed == handle.report().planned
        assert handle.report().path.startswith("compiled: ")
        assert all(capture.graphs for capture in handle.engine.captures)
        assert tapes.played
    assert torch.equal(by_hand(wan, schedule), wanted)


def test_stacks_are_skipped_in_each_turn(wan):
    skip = Forecast((6,), (1.0,))
    schedule = schedule_of(wan, "CCCCC", "CC-CCC")
    second = replace(schedule.transformers["transformer_2"], stack="_____..S...", stack_forecasts=(skip,))
    schedule = replace(schedule, transformers=schedule.transformers | {"transformer_2": second})
    plain = draw(wan)
    with sodaprof.apply(wan, schedule) as handle:
        first = draw(wan)
        assert handle.report().executed == handle.report().planned == {"C": 10 * 6, "-": 6}
    assert not torch.equal(first, plain)
    with compiled(wan, schedule) as handle:
        for _ in range(3):
            assert torch.equal(draw(wan), first)


@pytest.mark.parametrize("turns", [(HIGH, LOW), AGAIN])
def test_guidance_in_halves_from_profile_to_picture(turns, profiled):  # in passes: the whole way below
    pipe, profile = profiled(True, turns)
    plain = paint(pipe)
    for policy in ("fora", "soda"):
        schedule = compile_schedule(profile.folder, "1.6x", policy)
        with sodaprof.apply(pipe, schedule) as handle:
            wanted = paint(pipe)
            assert handle.report().executed == handle.report().planned
        assert not np.array_equal(wanted, plain)
    with compiled(pipe, schedule) as handle:  # soda's: steps that compute all, some and nothing
        for _ in range(3):
            assert np.array_equal(paint(pipe), wanted)
            assert handle.report().executed == handle.report().planned
    assert np.array_equal(paint(pipe), plain)


def test_the_whole_way_in_the_real_pipeline(wan, profile_of_wan, tmp_path):
    plain = draw(wan)
    pictures = {}
    for policy in ("soda", "fora"):
        schedule = compile_schedule(profile_of_wan.folder, "1.6x", policy)
        schedule.save(tmp_path / f"{policy}.json")
        loaded = load_schedule(tmp_path / f"{policy}.json")
        assert loaded == schedule
        assert loaded.digest() == schedule.digest()
        with sodaprof.apply(wan, tmp_path / f"{policy}.json") as handle:
            pictures[policy] = draw(wan)
            report = handle.report()
            assert report.complete
            assert report.executed == report.planned
            assert sum(report.planned.values()) == STEPS * 6  # _ is no action
        with compiled(wan, loaded):
            for _ in range(3):
                assert torch.equal(draw(wan), pictures[policy])
        assert not torch.equal(pictures[policy], plain)
    assert torch.equal(draw(wan), plain)


# ---- refusals at work -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("ratio", "found"), [(0.3, "8 of 11"), (0.9, "2 of 11"), (None, "11 of 11")])
def test_another_boundary_is_refused_on_applying(wan, ratio, found):
    schedule = mixed(wan)
    plain = draw(wan)
    wan.register_to_config(boundary_ratio=ratio)
    with pytest.raises(MismatchError, match=f"calls transformer at {found} steps") as caught:
        sodaprof.apply(wan, schedule)
    told = float(str(caught.value).split("pipe.register_to_config(boundary_ratio=")[1].split(")")[0])
    wan.register_to_config(boundary_ratio=told)
    with sodaprof.apply(wan, schedule_of(wan)):
        assert torch.equal(draw(wan), plain)


LATE, EARLY = "calls transformer at step 5 .* 0, 1, 2, 3, 4", "calls transformer_2 at step 2 "


@pytest.mark.parametrize(("ratio", "found", "lower"), [(0.3, LATE, False), (0.3, LATE, True), (0.9, EARLY, False)])
def test_another_boundary_is_refused_while_running(wan, ratio, found, lower):
    schedule = mixed(wan)
    with with_known_programs(sodaprof.apply(wan, schedule, runtime="compiled" if lower else "hooks")) as handle:
        wanted = draw(wan)
        wan.register_to_config(boundary_ratio=ratio)
        with pytest.raises(MismatchError, match=f"{found}.*boundary_ratio"):
            draw(wan)
        assert not handle.report().complete
        wan.register_to_config(boundary_ratio=BOUNDARY)
        assert torch.equal(draw(wan), wanted)  # a refused run harms nothing
        assert handle.report().complete


def test_a_pipeline_without_a_boundary_of_diffusers_is_refused_while_running():
    pipe = turns_pipe()
    schedule = schedule_of(pipe, "CRRCR", "CCRCRR", 4.0)
    with sodaprof.apply(pipe, schedule):
        wanted = paint(pipe)
        pipe.turns = (range(6), range(6, STEPS))
        with pytest.raises(MismatchError, match="calls transformer at step 5 "):
            paint(pipe)
        pipe.turns = (HIGH, LOW)
        assert np.array_equal(paint(pipe), wanted)


@pytest.mark.parametrize("skipped", [3, 5, 8])
def test_a_step_without_any_transformer_is_refused(skipped):
    pipe = turns_pipe()
    schedule = schedule_of(pipe, "CRRCR", "CCRCRR", 4.0)
    with sodaprof.apply(pipe, schedule):
        pipe.skipped = (skipped,)
        with pytest.raises(MismatchError, match=f"took step {skipped} without calling a transformer"):
            paint(pipe)


def test_guidance_is_checked_where_each_turn_begins():
    pipe = turns_pipe(halves=False)
    schedule = schedule_of(pipe, "CRRCR", "CCRCRR", 4.0)
    assert schedule.sampler.guidance_form == "passes"
    pipe.halves = (False, True)
    with sodaprof.apply(pipe, schedule), pytest.raises(MismatchError, match="guidance form 'passes'"):
        paint(pipe)


# ---- what people see --------------------------------------------------------------------------------------------------


def shown(view) -> str:
    console = Console(width=100, file=io.StringIO())
    console.print(view)
    return console.file.getvalue()


def test_show_prints_both_pictures(wan):
    schedule = schedule_of(wan, "CRRCR", "CCRCRR")
    text = shown(schedule_view(schedule))
    assert "CRRCR______" in text
    assert "_____CCRCRR" in text
    assert "_ another transformer's step" in text
    assert "full steps: 0 3\ncache intervals: 3 2" in text
    assert "full steps: 5 6 8\ncache intervals: 1 2 3" in text
    data = schedule_data(schedule)
    assert data["counts"] == {"C": 30, "R": 36}
    assert data["transformers"]["transformer"]["intervals"] == [3, 2]
    assert data["transformers"]["transformer_2"]["intervals"] == [1, 2, 3]
    site = data["transformers"]["transformer_2"]["sites"]["blocks.0.attn1"]
    assert site["reuse_ages"] == {"7": 1, "9": 1, "10": 2}


def test_inspect_and_doctor_know_both(wan):
    model, sampler, step = inspect_pipeline(wan, "tiny", STEPS, 5.0)
    text = shown(inspection_view(model, sampler, count_flops(wan, model, step)))
    assert "transformer: WanTransformer3DModel" in text
    assert "transformer_2: WanTransformer3DModel" in text
    result = diagnose(wan, "tiny", STEPS, 5.0)
    assert set(result["verdict"]) == set(NAMES)
    assert {about["lowered"] for about in result["transformers"].values()} == {2}
