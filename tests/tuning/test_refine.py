"""`refine`: columns, candidates, fitted forecasts, the search and its file."""

from __future__ import annotations

import json
import random

import numpy as np
import pytest
import torch
from msgspec.structs import replace

from sodaprof.compiler import compile_schedule
from sodaprof.compiler.problem import cache_bytes
from sodaprof.errors import BudgetError, FormatError, MismatchError, UnsupportedModelError
from sodaprof.formats.cost import cost_of
from sodaprof.formats.sampler import RIDGE
from sodaprof.formats.schedule import Forecast
from sodaprof.formats.schedule_file import load_schedule
from sodaprof.pipelines import replay as replaying
from sodaprof.pipelines.recording import tapped
from sodaprof.pipelines.replay import Replay
from sodaprof.tuning import refine as refining
from sodaprof.tuning.candidates import fit_to_model
from sodaprof.tuning.closed_loop import Fit, forecast_weights, sampled_distances
from sodaprof.tuning.jumps import score_db
from sodaprof.tuning.refine import CandidateFits, refine, sure_gain
from sodaprof.tuning.step_letters import columns_of, varied, with_columns
from tests.tiny_pipelines import TwoPassPipeline, schedule_for, tiny_pipe
from tests.tuning.conftest import STEPS, replay_of, sampled_db

SEARCH = {"evaluations": 6, "samples": 8, "method": "none"}
MIXED = "CCSC-SRSCS-S"


@pytest.fixture(scope="module")
def costs(profile):
    """What a search would count itself."""
    return cost_of(profile.folder, "flops")


@pytest.fixture(scope="module")
def solver(profile):
    return compile_schedule(profile.folder, "3.0x")


@pytest.fixture(scope="module")
def drift(profile):
    return compile_schedule(profile.folder, "2.0x", "drift")


@pytest.fixture(scope="module")
def forecasts(profile):
    return compile_schedule(profile.folder, "2.0x", "forecast")


# ---- columns ----------------------------------------------------------------------------------------------------------


def test_columns_are_read_and_drawn_again(solver, drift):
    columns = columns_of(solver)
    assert columns.count("C") == 4
    assert columns_of(with_columns(solver, columns)) == columns
    assert set(columns_of(drift)) == {"C", "S"}
    for start in (solver, drift):
        assert columns_of(with_columns(start, MIXED)) == MIXED
    (plan,) = with_columns(drift, MIXED).transformers.values()
    assert [cell.sources for cell in plan.stack_forecasts] == [(1, 0), (3, 1, 0), (3, 1, 0), (8, 3, 1), (8, 3, 1)]
    assert plan.stack == "..S.-S.S.S-S"
    (plan,) = with_columns(replace(drift, transformers=one_source(drift)), "CCS").transformers.values()
    assert plan.stack_forecasts == (Forecast((1,), (1.0,), "output"),)


def one_source(schedule):
    """The schedule's transformers with S cells that reuse the newest output."""
    ((name, plan),) = schedule.transformers.items()
    cells = tuple(Forecast(cell.sources[:1], (1.0,), "output") for cell in plan.stack_forecasts)
    return {name: replace(plan, stack_forecasts=cells)}


def test_forecasts_of_sites_are_drawn_from_the_newest_full_steps(forecasts):
    columns = columns_of(forecasts)
    assert set(columns) == {"C", "F"}
    again = with_columns(forecasts, columns)
    assert columns_of(again) == columns
    (plan,), (before,) = again.transformers.values(), forecasts.transformers.values()
    assert plan.forecasts.keys() == plan.rows.keys()
    for site, cells in plan.forecasts.items():
        assert [cell.sources for cell in cells] == [cell.sources for cell in before.forecasts[site]]
        assert all(cell.weights == (1.0, *[0.0] * (len(cell.sources) - 1)) for cell in cells)
    assert not next(iter(with_columns(forecasts, "C--C").transformers.values())).forecasts


def test_steps_that_mix_actions_and_forms_are_refused(pipe, drift):
    mixed = schedule_for(pipe, steps=STEPS)
    ((name, plan),) = mixed.transformers.items()
    key = next(iter(plan.rows))
    plan = replace(plan, rows=plan.rows | {key: "CR" + "C" * (STEPS - 2)})
    with pytest.raises(UnsupportedModelError, match="step 1 holds CR"):
        columns_of(replace(mixed, transformers={name: plan}))
    ((name, plan),) = drift.transformers.items()
    first, *others = plan.stack_forecasts
    plan = replace(plan, stack_forecasts=(replace(first, form="output"), *others))
    with pytest.raises(UnsupportedModelError, match="in the forms drift, output"):
        columns_of(replace(drift, transformers={name: plan}))


def test_variations_keep_the_first_step_and_the_number_of_full_ones():
    generator, known, found = random.Random(0), {"C--C--C-"}, []
    for _ in range(18):
        found.append(varied("C--C--C-", generator, known, "-RS"))
        assert found[-1] is not None
        assert found[-1] not in known
        assert found[-1][0] == "C"
        assert found[-1].count("C") == 3
        known.add(found[-1])
    assert set("".join(found)) == set("C-RS")
    assert varied("CCC", generator, set()) is None


def test_variations_are_allowed_ones():
    asked, known, wanted = [], {"CSCS"}, {"C-CS", "CSC-", "C-C-"}

    def allowed(columns):
        asked.append(columns)
        return columns in wanted

    found = [varied("CSCS", random.Random(seed), known, "-RS", allowed) for seed in range(40)]
    assert set(found) == {"C-CS", "CSC-"}  # one step is varied at a time
    assert set(asked) - wanted
    known |= wanted
    assert varied("CSCS", random.Random(0), known, "-RS", allowed) is None


# ---- weights of skipped stacks ----------------------------------------------------------------------------------------


def test_forecast_weights_are_a_least_squares():
    draws = torch.randn(4, 5, 6, 7, generator=torch.Generator().manual_seed(0))
    found = forecast_weights(list(draws[:3]), draws[3])
    x, y = draws[:3].flatten(1).double(), draws[3].flatten().double()
    pull = (RIDGE * x.square().sum(1).mean()).sqrt()
    left, right = torch.cat([x.T, pull * torch.eye(3)]), torch.cat([y, pull * torch.eye(3)[0]])
    direct = torch.linalg.lstsq(left, right[:, None]).solution[:, 0]
    np.testing.assert_allclose(found, direct.numpy(), rtol=1e-5)
    assert all(float(f"{weight:.6g}") == weight for weight in found)
    still = torch.zeros(2, 3, 4)
    assert forecast_weights([still, still], still) == (1.0, 0.0)


def at_site(replay, site, step, x):
    """What a site gives at a step for other latents, on both branches; no schedule in the way."""
    found = []

    def hear(forward, args, kwargs):
        found.append(forward(*args, **kwargs))
        return found[-1]

    with tapped(replay.module.get_submodule(site), hear, "test.site"):
        replay.output(step, x)
    return torch.cat(found)


@pytest.mark.parametrize("kind", [None, TwoPassPipeline])
def test_site_weights_are_fitted_from_the_accelerated_outputs_to_the_full_runs(kind, forecasts):
    pipe = tiny_pipe(cls=kind) if kind else tiny_pipe()
    sampler = schedule_for(pipe, steps=STEPS).sampler
    replay = Replay(pipe, sampler, [1, 2, 3], [5, 6, 7])
    start = replace(with_columns(forecasts, "CCFCFFRCF-CF"), sampler=sampler)
    fit = Fit(replay, start)
    distances = fit.run()
    (plan,) = fit.fitted().transformers.values()
    ats = {step: fit.ats[step].x for step in range(STEPS)}
    for site in list(plan.rows)[:3]:
        for cell, step in zip(plan.forecasts[site], (2, 4, 5, 8, 11), strict=True):
            sources = [at_site(replay, site, source, ats[source]) for source in cell.sources]
            target = at_site(replay, site, step, replay.states[step])
            np.testing.assert_allclose(cell.weights, forecast_weights(sources, target), rtol=1e-3, atol=2e-5)
    np.testing.assert_allclose(sampled_distances(replay, fit.fitted()), distances, atol=1e-3)


def test_site_weights_of_a_sample_of_coordinates_are_near(pipe, profile, forecasts, monkeypatch):
    def weights():
        fit = Fit(replay_of(pipe, profile, range(6)), forecasts)
        fit.run()
        (plan,) = fit.fitted().transformers.values()
        return np.array([weight for cells in plan.forecasts.values() for cell in cells for weight in cell.weights])

    whole = weights()
    monkeypatch.setattr(replaying, "COORDINATES", 200)  # of 256
    some = weights()
    assert 0 < np.abs(some - whole).max() < 0.3
    assert np.abs(some - whole).mean() < 0.03


def drift_at(replay, step, x):
    """What the stack adds to its input at a step for other latents, guided at scale 4; no schedule in the way."""
    found = []

    def enter(forward, args, kwargs):
        found.append(-args[0])
        return forward(*args, **kwargs)

    def leave(forward, args, kwargs):
        out = forward(*args, **kwargs)
        found[-1] = found[-1] + out
        return out

    blocks = replay.module.transformer_blocks
    with tapped(blocks[0], enter, "test.entry"), tapped(blocks[-1], leave, "test.exit"):
        replay.output(step, x)
    conditional, other = found if len(found) == 2 else found[0].chunk(2)
    return other + 4 * (conditional - other)


@pytest.mark.parametrize("kind", [None, TwoPassPipeline])
def test_weights_are_fitted_from_the_accelerated_drifts_to_the_full_runs(kind, drift):
    pipe = tiny_pipe(cls=kind) if kind else tiny_pipe()
    sampler = schedule_for(pipe, steps=STEPS).sampler
    replay = Replay(pipe, sampler, [1, 2, 3], [5, 6, 7])
    fit = Fit(replay, replace(with_columns(drift, "CCSCS-SCSSSS"), sampler=sampler))
    fit.run()
    fitted = fit.fitted()
    (plan,) = fitted.transformers.values()
    cells = dict(zip((t for t, action in enumerate(plan.stack) if action == "S"), plan.stack_forecasts, strict=True))
    assert list(cells) == [2, 4, 6, 8, 9, 10, 11]
    for step, cell in cells.items():
        sources = [drift_at(replay, source, fit.ats[source].x) for source in cell.sources]
        direct = forecast_weights(sources, drift_at(replay, step, replay.states[step]))
        np.testing.assert_allclose(cell.weights, direct, rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(sampled_distances(replay, fitted), fit.run(), atol=1e-3)


@pytest.mark.parametrize("policy", ["drift", "dpcache"])
def test_a_fit_changes_only_the_weights_of_skipped_stacks(pipe, profile, policy):
    compiled = compile_schedule(profile.folder, "2.0x", policy, updated=True)
    fitted, distances = fit_to_model(pipe, profile, compiled, cost_of(profile.folder, "flops"), samples=6)
    (before,), (after,) = compiled.transformers.values(), fitted.transformers.values()
    assert (after.rows, after.stack) == (before.rows, before.stack)
    for old, new in zip(before.stack_forecasts, after.stack_forecasts, strict=True):
        assert (new.sources, new.form) == (old.sources, old.form)
    assert [cell.weights for cell in before.stack_forecasts] != [cell.weights for cell in after.stack_forecasts]
    assert fitted.predicted["speedup"] == compiled.predicted["speedup"]
    np.testing.assert_allclose(sampled_distances(replay_of(pipe, profile, range(6)), fitted), distances, atol=1e-3)


# ---- the search -------------------------------------------------------------------------------------------------------


def test_first_steps_that_candidates_share_are_run_once(pipe, profile, drift, monkeypatch):
    replay = replay_of(pipe, profile, range(4))
    taken = []
    output = Replay.output
    monkeypatch.setattr(Replay, "output", lambda self, step, *rest: taken.append(step) or output(self, step, *rest))
    start = "CCSCS-SCSSSS"
    fits = CandidateFits(replay, drift)
    fits.evaluate(start)
    for columns, run in (
        ("CCSCS-SSCSSS", [7, 8, 9, 10, 11]),  # sources that the run before kept
        ("CCSCS-SC-SSS", [9, 10, 11]),  # compared with the incumbent, not the latest one
        ("CCSCSSSCSSSS", [5, 6, 7, 8, 9, 10, 11]),
        ("CCSCS-SCRSSS", [0, 1, 2, 3, 4, 6, 7, 8, 9, 10, 11]),  # caches of sites: from the start
        ("CC-C---C----", [3, 7]),
    ):
        taken.clear()
        schedule, distances = fits.evaluate(columns)
        assert taken == run
        alone, same = CandidateFits(replay, drift).evaluate(columns)
        assert schedule.digest() == alone.digest()
        np.testing.assert_array_equal(distances, same)
    fits.accept_latest()
    taken.clear()
    schedule, _ = fits.evaluate("CC-C---CS---")  # the incumbent kept no sources for the stack
    assert taken == [0, 1, 3, 7, 8]
    assert schedule.digest() == CandidateFits(replay, drift).evaluate("CC-C---CS---")[0].digest()


@pytest.mark.parametrize("start", ["solver", "drift", "forecasts"])
def test_a_search_is_reproducible_resumable_and_never_worse(pipe, costs, tmp_path, start, request):
    schedule = request.getfixturevalue(start)
    whole, parts = tmp_path / "whole.json", tmp_path / "parts.json"
    seen = []
    best = refine(pipe, schedule, whole, **SEARCH, on_progress=lambda *now: seen.append(now))  # which counts the cost
    assert [done for _, done, _ in seen] == list(range(SEARCH["evaluations"] + 1))
    assert columns_of(best).count("C") == columns_of(schedule).count("C")
    assert load_schedule(whole).digest() == best.digest()
    refine(pipe, schedule, parts, evaluations=2, samples=8, method="none", cost=costs)
    seen = []
    refine(pipe, schedule, parts, **SEARCH, cost=costs, on_progress=lambda *now: seen.append(now))
    assert parts.read_bytes() == whole.read_bytes()
    assert seen[0][1] == 2
    assert [held for *_, held in seen] == sorted(held for *_, held in seen)


def test_a_search_goes_on_after_an_interruption_at_any_moment(pipe, drift, costs, tmp_path, monkeypatch):
    settings = {"evaluations": 4, "samples": 4, "cost": costs}
    whole = refine(pipe, drift, tmp_path / "whole.json", **settings)
    real = refining.write_json

    def interrupted(number, after):
        def write(path, data, *, force=False):
            nonlocal left
            left -= 1
            if left or after:
                real(path, data, force=force)
            if not left:
                raise KeyboardInterrupt

        left = number
        return write

    for number, after in ((1, False), (1, True), (2, True), (5, False)):  # before a file is written, or right after
        output = tmp_path / f"{number}{after}.json"
        with monkeypatch.context() as patch:
            for module in ("sodaprof.tuning.refine", "sodaprof.formats.schedule"):
                patch.setattr(f"{module}.write_json", interrupted(number, after))
            with pytest.raises(KeyboardInterrupt):
                refine(pipe, drift, output, **settings)
        if number > 1:
            assert load_schedule(output).update.fitted["loop"] == "closed"
        assert refine(pipe, drift, output, **settings).digest() == whole.digest()
        assert output.read_bytes() == (tmp_path / "whole.json").read_bytes()


@pytest.mark.parametrize("columns", [MIXED, "CCSCS-SCSSSS", "CCFCFRSCFS-F"])
def test_the_written_schedule_reaches_in_the_pipeline_the_score_of_the_search(pipe, drift, tmp_path, columns):
    output, seen = tmp_path / "a.json", []
    settings = {"evaluations": 3, "samples": 8, "prompts": [1, 2, 3]}
    refine(pipe, with_columns(drift, columns), output, **settings, on_progress=lambda *now: seen.append(now))
    best = load_schedule(output)
    assert columns_of(best).count("C") == columns.count("C")
    validated = sampled_db(pipe, best, (1, 2), seed=6)  # generations 6 and 7, whose labels follow 0's, 1's, …
    assert score_db(validated) == pytest.approx(seen[-1][2], abs=0.02)


def test_columns_of_every_kind_are_searched_and_their_caches_counted(pipe, profile, drift, tmp_path):
    tried, costs = [], cost_of(profile.folder, "flops")
    for seed in range(2):
        best = refine(
            pipe,
            with_columns(drift, MIXED),
            tmp_path / f"{seed}.json",
            evaluations=6,
            samples=4,
            method="none",
            seed=seed,
        )
        tried += json.loads((tmp_path / f"{seed}.json.search").read_text())["search"]["tried"]
        assert best.predicted["cache_bytes"] == cache_bytes(best, profile.model) > 0
        assert best.predicted["cost"] == costs.schedule(best)
    assert len(set(tried)) > 8
    assert all(costs.schedule(with_columns(drift, one)) <= costs.schedule(with_columns(drift, MIXED)) for one in tried)


def test_candidates_keep_within_max_cache(pipe, profile, costs, tmp_path):
    reuse = compile_schedule(profile.folder, "2.0x", "fora")
    kept = cache_bytes(with_columns(reuse, columns_of(reuse)), profile.model)
    with pytest.raises(BudgetError, match=rf"take {kept:,} bytes .* at most {kept - 1:,} are allowed") as refusal:
        refine(pipe, reuse, tmp_path / "a.json", **SEARCH, max_cache=kept - 1)
    assert "Allow as much" in str(refusal.value)
    assert not list(tmp_path.iterdir())

    def tried(name, most):
        refine(pipe, reuse, tmp_path / name, evaluations=25, samples=4, method="none", cost=costs, max_cache=most)
        found = json.loads((tmp_path / f"{name}.search").read_text())["search"]["tried"]
        return [cache_bytes(with_columns(reuse, columns), profile.model) for columns in found]

    assert max(tried("b.json", None)) > kept  # reuse at some steps, skipped stacks at others
    assert max(tried("c.json", kept)) <= kept
    with pytest.raises(MismatchError, match="other settings"):
        refine(
            pipe, reuse, tmp_path / "c.json", evaluations=26, samples=4, method="none", cost=costs, max_cache=kept + 1
        )


def test_a_gain_is_sure_if_it_does_not_depend_on_a_few_generations():
    incumbent = np.linspace(30.0, 50.0, 18)
    assert sure_gain(incumbent, incumbent) == 0
    assert sure_gain(incumbent + 0.3, incumbent) == pytest.approx(0.3)
    lucky = incumbent + np.where(np.arange(18) == 0, 12.0, -0.2)  # the worst one far better, all others worse
    assert score_db(lucky) > score_db(incumbent)
    assert sure_gain(lucky, incumbent) < 0


def test_the_incumbent_is_replaced_by_sure_gains_only(pipe, drift, tmp_path, monkeypatch):
    monkeypatch.setattr(refining, "sure_gain", lambda candidate, incumbent: -0.1)
    best = refine(pipe, drift, tmp_path / "a.json", **SEARCH)
    assert best.policy["knobs"]["refined"] == 0
    assert columns_of(best) == columns_of(drift)


def test_a_search_of_other_settings_and_a_broken_state_are_refused(pipe, solver, tmp_path):
    refine(pipe, solver, tmp_path / "a.json", evaluations=1, samples=8, method="none")
    with pytest.raises(MismatchError, match="another schedule or with other settings"):
        refine(pipe, solver, tmp_path / "a.json", evaluations=1, samples=8, method="none", seed=1)
    state = tmp_path / "a.json.search"
    state.write_text(json.dumps({"format": "sodaprof.refine", "version": 9}))
    with pytest.raises(FormatError, match="Delete it"):
        refine(pipe, solver, tmp_path / "a.json", evaluations=1, samples=8, method="none")
    state.unlink()
    with pytest.raises(FormatError, match="exists"):
        refine(pipe, solver, tmp_path / "a.json", evaluations=1, samples=8, method="none")
