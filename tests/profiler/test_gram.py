"""Products of a trajectory: against the definition written out, from a sample within its bounds, resumed, left out, broken."""

from __future__ import annotations

import json
import math
from itertools import product

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

import sodaprof
from sodaprof.errors import FormatError, SodaprofError, UnsupportedModelError
from sodaprof.formats.files import write_json
from sodaprof.formats.profile import load_inspection, load_profile, write_solver
from sodaprof.formats.tables import TABLES
from sodaprof.pipelines.patch import patched
from sodaprof.pipelines.recording import recorded_calls
from sodaprof.pipelines.sampler_steps import own_update
from sodaprof.profiler import budget as memory
from sodaprof.profiler.gram import GramSums, History, Products, Track, chosen
from sodaprof.profiler.plan import plan_profile
from sodaprof.profiler.run import run_profile
from sodaprof.profiler.taps import Taps
from tests.conftest import invoke
from tests.profiler.test_budget import published
from tests.runtime.test_two_transformers import AGAIN, NAMES, paint, turns_pipe
from tests.runtime.test_two_transformers import STEPS as TURN_STEPS
from tests.tiny_pipelines import SITES, STEPS, TwoPassPipeline, tiny_pipe
from tests.zoo.zoo_pipelines import PIPELINES
from tests.zoo.zoo_pipelines import STEPS as ZOO_STEPS

SETTINGS = {"steps": STEPS, "samples": 3, "batch_size": 2, "max_interval": 4, "seed": 3}
LABELS, SEEDS = [0, 1, 2], [3, 4, 5]
FORMS = {"halves": ({}, {}), "passes": ({"cls": TwoPassPipeline}, {}), "none": ({}, {"guidance_scale": 1.0})}


@pytest.fixture(scope="module")
def profiled(tmp_path_factory):
    return sodaprof.profile(tiny_pipe(), tmp_path_factory.mktemp("gram") / "p", **SETTINGS)


@pytest.fixture
def copy(profiled, tmp_path):
    """A copy of the folder, to be broken."""
    folder = tmp_path / "copy"
    folder.mkdir()
    for file in profiled.folder.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


def watched(pipe, modules, **call):
    """Returns the modules' inputs and outputs, call after call, and the scheduler's (sample, output, next)."""
    generators, steps = [torch.Generator().manual_seed(s) for s in SEEDS], []

    def note(step, model_output, timestep, sample, **options):
        out = step(model_output, timestep, sample, **options)
        steps.append((sample.clone(), model_output.clone(), out[0].clone()))
        return out

    with recorded_calls(pipe.transformer, modules, modules) as (outputs, inputs), patched(pipe.scheduler, "step", note):
        pipe(class_labels=LABELS, num_inference_steps=STEPS, generator=generators, output_type="np", **call)
    return inputs, outputs, steps


def products_of(calls, branches):
    """[T, T] from the outputs of all network calls in turn, mean over the generations of LABELS, branches summed."""
    passes = len(calls) // STEPS
    rows = torch.stack([torch.cat(calls[i : i + passes]).double().flatten() for i in range(0, len(calls), passes)])
    assert branches * len(LABELS) == passes * len(calls[0])
    return (rows @ rows.T / len(LABELS)).numpy()


@pytest.mark.parametrize("form", FORMS)
def test_products_are_the_direct_definition(form, tmp_path):
    made, settings = FORMS[form]
    profile = sodaprof.profile(tiny_pipe(**made), tmp_path / "p", **SETTINGS, **settings)
    assert profile.sampler.guidance_form == form
    modules = [*SITES, "transformer_blocks.0", "transformer_blocks.1"]
    given, found, steps = watched(tiny_pipe(**made), modules, **settings)
    assert len(steps[0][0]) == (6 if form == "halves" else 3)  # DiT passes both halves to its scheduler
    states = [sample[:3] for sample, _, _ in steps] + [steps[-1][2][:3]] + [output[:3] for _, output, _ in steps]
    rows = torch.stack(states).double().flatten(1)
    np.testing.assert_allclose(profile.state_products(), (rows @ rows.T / 3).numpy(), rtol=1e-5, atol=1e-4)

    branches = 1 if form == "none" else 2
    sites = profile.site_products()["transformer"]
    assert sites.shape == (4, STEPS, STEPS)
    for s, site in enumerate(SITES):
        np.testing.assert_allclose(sites[s], products_of(found[site], branches), rtol=1e-6, atol=1e-6)
    stack = profile.stack_products()["transformer"]
    last = found["transformer_blocks.1"]
    np.testing.assert_allclose(stack["output"], products_of(last, branches), rtol=1e-6, atol=1e-6)
    drift = [out - entry for out, entry in zip(last, given["transformer_blocks.0"], strict=True)]
    np.testing.assert_allclose(stack["drift"], products_of(drift, branches), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ["SanaPipeline", "LattePipeline"])
def test_products_in_other_layouts_and_of_frames_in_the_batch(name, tmp_path):
    case = PIPELINES[name]()
    settings = {"steps": ZOO_STEPS, "samples": 2, "max_interval": 4, "seed": 5, "batch_size": 2, "name": "tiny"}
    profile = sodaprof.profile(case.pipe, tmp_path / "p", call=case.call, **settings)
    sites = [site.key for site in profile.model.transformers["transformer"].sites]
    with recorded_calls(case.pipe.transformer, sites) as (found, _):
        case.call([0, 1], [torch.Generator().manual_seed(5 + i) for i in range(2)])
    for s, (site, calls) in enumerate(found.items()):
        assert len(calls) == ZOO_STEPS, site
        rows = torch.stack([out.double().flatten() for out in calls])
        wanted = (rows @ rows.T / 2).numpy()
        np.testing.assert_allclose(profile.site_products()["transformer"][s], wanted, rtol=1e-6, atol=1e-6)


def test_history_keeps_the_band_and_the_turn():
    """Steps 0-8 and 11-13, ages to 2: rows are dropped in between, and no product spans the two turns."""
    values = {t: torch.randn(20) for t in (*range(9), 11, 12, 13)}
    sums = GramSums([Track("output", "t", "", 20)], 14, 2, 1)
    history = History(2, 1.0)
    for t, x in values.items():
        history.push(t, x)
        assert len(history.rows) <= memory.slots_of(2)
    history.take()
    for last, products in history.products:
        sums.add(0, last, products.numpy())
    for t, age in product(range(14), range(3)):
        known = t in values and t - age in values and (t < 9) == (t - age < 9)
        wanted = values[t].double().dot(values[t - age].double()).item() if known else 0
        assert sums.products[0, t, age] == pytest.approx(wanted, rel=1e-12)


def test_the_band_of_a_long_run(tmp_path):
    """T = 12, ages to 4: products beyond are NaN, the others those of a run that keeps all."""
    long = {"steps": 12, "samples": 2, "batch_size": 2, "seed": 3}
    narrow = sodaprof.profile(tiny_pipe(), tmp_path / "n", **long, max_interval=2)
    wide = sodaprof.profile(tiny_pipe(), tmp_path / "w", **long, max_interval=4)
    assert (narrow.history, wide.history) == (4, 11)
    some, every = narrow.site_products()["transformer"], wide.site_products()["transformer"]
    ages = np.abs(np.arange(12)[:, None] - np.arange(12))
    assert np.array_equal(np.isnan(some), np.broadcast_to(ages > 4, some.shape))
    assert np.isfinite(every).all()
    np.testing.assert_allclose(some[:, ages <= 4], every[:, ages <= 4], rtol=1e-12)


# ---- a sample of the coordinates --------------------------------------------------------------------------------------


def test_a_forecast_error_from_the_sample_is_near_the_exact_one(profiled, tmp_path, monkeypatch):
    """K = 2, w·G·w for the forecast 2 x(t-1) - x(t-2): within four standard deviations of a sample without replacement."""
    count, size = 96, 16 * 16
    monkeypatch.setattr(memory, "MOST_COORDINATES", count)
    sampled = sodaprof.profile(tiny_pipe(), tmp_path / "p", **SETTINGS)
    rows = pq.read_table(sampled.folder / "gram.parquet").to_pylist()
    assert {r["coordinates"] for r in rows if r["kind"] != "state"} == {count}
    assert {r["coordinates"] for r in rows if r["kind"] == "state"} == {4 * 8 * 8}
    np.testing.assert_array_equal(sampled.state_products(), profiled.state_products())
    _, found, _ = watched(tiny_pipe(), SITES)
    exact, near = profiled.site_products()["transformer"], sampled.site_products()["transformer"]
    weights = np.array([1.0, -2.0, 1.0])
    apart = []
    for s, site in enumerate(SITES):
        for t in range(2, STEPS):
            steps = np.ix_([t, t - 1, t - 2], [t, t - 1, t - 2])
            true, guess = (float(weights @ g[s][steps] @ weights) for g in (exact, near))
            now, one, two = (found[site][i].double() for i in (t, t - 1, t - 2))
            squares = (now - 2 * one + two).square().sum(0).flatten().numpy() / 3  # a coordinate's, branches summed
            assert squares.sum() == pytest.approx(true, rel=1e-5)  # float32 outputs, small differences of them
            deviation = size * squares.std(ddof=1) / math.sqrt(count) * math.sqrt(1 - count / size)
            assert abs(guess - true) <= 4 * deviation
            assert deviation < 0.3 * true  # or the bound would say nothing
            apart.append(abs(guess / true - 1))
    assert 0.005 < np.median(apart) < 0.15


def test_products_from_samples_are_right_on_average(monkeypatch):
    monkeypatch.setattr(memory, "MOST_COORDINATES", 40)
    x = np.random.default_rng(0).normal(size=200)
    found = [(200 / 40) * np.square(x[chosen(f"site {i}", 200).numpy()]).sum() for i in range(2000)]
    assert np.mean(found) == pytest.approx(np.square(x).sum(), abs=4 * np.std(found) / math.sqrt(2000))
    assert len(set(chosen("a", 200).tolist())) == 40
    assert torch.equal(chosen("a", 200), chosen("a", 200))
    assert not torch.equal(chosen("a", 200), chosen("b", 200))
    assert chosen("a", 40) is None


def test_products_of_prompts_of_several_lengths(tmp_path):
    """A site of the text: each prompt's own tokens, so the mean over prompts of 4 and 5 tokens."""
    settings = {"steps": ZOO_STEPS, "samples": 1, "batch_size": 1, "max_interval": 4, "name": "tiny"}
    several = PIPELINES["QwenImagePipeline"]().with_text(lambda entries: 4 + entries[0])
    both = sodaprof.profile(several.pipe, tmp_path / "b", call=several.call, **settings | {"samples": 2})
    site = next(i for i, s in enumerate(both.model.transformers["transformer"].sites) if s.module == "txt_mlp")
    each = []
    for i in range(2):
        case = PIPELINES["QwenImagePipeline"]().with_text(lambda entries, i=i: 4 + i)
        alone = sodaprof.profile(
            case.pipe, tmp_path / str(i), call=case.call, prompts=[i], seed=i, **settings
        ).site_products()
        each.append(alone["transformer"][site])
    np.testing.assert_allclose(both.site_products()["transformer"][site], (each[0] + each[1]) / 2, rtol=1e-5)


# ---- transformers, blocks ---------------------------------------------------------------------------------------------


def test_products_are_within_a_turn(tmp_path):
    pipe = turns_pipe()
    pipe.turns = AGAIN
    settings = {"steps": TURN_STEPS, "samples": 2, "batch_size": 2, "max_interval": 4}
    profile = sodaprof.profile(pipe, tmp_path / "p", prompts=[3, 4], **settings)
    sites, stacks = profile.site_products(), profile.stack_products()
    for name, own in zip(NAMES, AGAIN, strict=True):
        key = profile.model.transformers[name].sites[0].key
        with recorded_calls(pipe.components[name], [key]) as (found, _):
            paint(pipe, [3, 4])
        outs = [out.double().flatten() for out in found[key]]
        turn = np.cumsum([i > 0 and t != own[i - 1] + 1 for i, t in enumerate(own)])  # which turn each step is of
        wanted = np.full((TURN_STEPS, TURN_STEPS), np.nan)
        for (i, t), (j, u) in product(enumerate(own), repeat=2):
            if turn[i] == turn[j]:
                wanted[t, u] = outs[i].dot(outs[j]).item() / 2
        np.testing.assert_allclose(sites[name][0], wanted, rtol=1e-6)
        for form in ("output", "drift"):
            assert np.array_equal(np.isnan(stacks[name][form]), np.isnan(wanted))
    assert np.isfinite(profile.state_products()).all()


def test_blocks_that_return_two_tensors_have_no_stack(tmp_path):
    case = PIPELINES["FluxPipeline"]()
    settings = {"steps": ZOO_STEPS, "samples": 1, "max_interval": 3, "name": "tiny"}
    profile = sodaprof.profile(case.pipe, tmp_path / "p", call=case.call, **settings)
    assert profile.stack_products() == {}
    assert np.isfinite(profile.site_products()["transformer"][:, 2, 1]).all()


# ---- what is measured, and what it takes ------------------------------------------------------------------------------


def test_states_without_sites(profiled, tmp_path):
    pipe = tiny_pipe()
    plan = plan_profile(pipe, "m", **SETTINGS, states_only=True)
    steps = []
    profile = run_profile(pipe, plan, tmp_path / "p", on_progress=lambda now, _: steps.append(now))
    assert steps[-1] == 3 * STEPS
    assert {f.name for f in profile.folder.iterdir()} == {
        "model.json", "sampler.json", "solver.json", "cost.flops.json", "manifest.json", "gram.parquet",
    }  # fmt: skip
    assert profile.manifest["tables"] == {"gram": 1}
    np.testing.assert_array_equal(profile.state_products(), profiled.state_products())
    for read in (profile.caching_error, profile.pruning_error):
        with pytest.raises(FormatError, match=r"holds no .*, only gram: made with --states-only.*profile MODEL"):
            read()
    for read in (profile.site_products, profile.stack_products):
        with pytest.raises(FormatError, match="states alone: made with --states-only"):
            read()
    with pytest.raises(FormatError, match="--states-only"):
        sodaprof.compile_schedule(profile.folder, "2x", "soda")
    assert load_profile(profile.folder).digest() == profile.digest() != profiled.digest()
    assert plan.extra_bytes == (2 * STEPS + 1) * 2 * 4 * 8 * 8 * 4  # two generations' latents


def test_without_products_and_older_profiles(profiled, tmp_path):
    profile = sodaprof.profile(tiny_pipe(), tmp_path / "p", **SETTINGS, gram=False)
    assert set(profile.manifest["tables"]) == set(TABLES)
    assert not (profile.folder / "gram.parquet").exists()
    np.testing.assert_array_equal(profile.caching_error()["transformer"], profiled.caching_error()["transformer"])
    found = r"holds no gram\.parquet, only sites, caching, pruning: made with --no-gram"
    for read in (profile.state_products, profile.site_products, profile.stack_products):
        with pytest.raises(FormatError, match=found):
            read()
    (profile.folder / "solver.json").unlink()
    with pytest.raises(FormatError, match=r"solver\.json: no such file.*Profile again"):
        load_profile(profile.folder).own_update()


def test_nothing_to_measure_is_refused():
    with pytest.raises(SodaprofError, match="--states-only and --no-gram"):
        plan_profile(tiny_pipe(), "m", **SETTINGS, states_only=True, gram=False)


def test_the_memory_of_products_is_planned(tmp_path, monkeypatch):
    """The tensors that a batch's products hold when all steps are done, and the rings."""
    monkeypatch.setattr(memory, "MOST_COORDINATES", 100)
    held = []

    def count(taps):
        rows = [*taps.products.states, *taps.products.outputs]
        rows += [row for history in taps.products.histories.values() for row in history.rows]
        for ring in taps.rings.values():
            rows += [ring.outputs, ring.norms, ring.order]
        held.append(sum(t.numel() * t.element_size() for t in [*rows, *taps.scratch.values()]))

    flush = Taps.flush
    monkeypatch.setattr(Taps, "flush", lambda taps: (count(taps), flush(taps)))
    for made in ({}, {"cls": TwoPassPipeline}):
        pipe = tiny_pipe(**made)
        plan = plan_profile(pipe, "m", **SETTINGS | {"samples": 2})
        run_profile(pipe, plan, tmp_path / "p", force=True)
        assert held.pop() == plan.extra_bytes


def test_published_models_take_a_few_megabytes_on_disk(tmp_path):
    """DiT-XL/2, 50 steps: the table as it would be, its products random numbers, which do not compress."""
    shapes = published(
        28, [("transformer_blocks", "attn1"), ("transformer_blocks", "ff")], [4, 32, 32], 2, 256, 1152, 50
    )
    tracks = [Track("site", "transformer", site.key, 256 * 1152) for site in shapes.sites]
    tracks += [Track(form, "transformer", "", 256 * 1152) for form in ("output", "drift")]
    sums = GramSums(tracks, 50, 28, 4 * 32 * 32)
    rng = np.random.default_rng(0)
    sums.states, sums.products = rng.random(sums.states.shape), rng.random(sums.products.shape)
    sums.write(tmp_path, {"transformer": list(range(50))}, 100)
    assert len(pq.read_table(tmp_path / "gram.parquet")) == shapes.products == 65703
    assert 0.5e6 < (tmp_path / "gram.parquet").stat().st_size < 1e6


# ---- reading ----------------------------------------------------------------------------------------------------------


def test_the_digest_covers_products_and_solver(profiled, copy):
    before = load_profile(copy).digest()
    assert before == profiled.digest()
    solver = json.loads((copy / "solver.json").read_text())
    solver["noise"][0] += 1
    write_json(copy / "solver.json", solver, force=True)
    changed = load_profile(copy).digest()
    assert changed != before
    table = pq.read_table(copy / "gram.parquet")
    pq.write_table(table.slice(0, len(table) - 1), copy / "gram.parquet")
    manifest = json.loads((copy / "manifest.json").read_text())
    del manifest["digests"]
    write_json(copy / "manifest.json", manifest | {"version": 1}, force=True)
    assert load_profile(copy).digest() not in (before, changed)


def with_values(column, change):
    """Returns a function that replaces a column of a table by change(its values, the rows' kinds)."""

    def changed(table):
        values = change(table[column].to_numpy().copy(), table["kind"].to_numpy())
        field = table.schema.field(column)
        return table.set_column(table.schema.get_field_index(column), field, pa.array(values, type=field.type))

    return changed


def first_of_each(value):
    """Returns a function that sets the first row of each kind to a value."""

    def change(values, kinds):
        values[np.unique(kinds, return_index=True)[1]] = value
        return values

    return change


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda table: table.take(np.flatnonzero(table["row"].to_numpy() < STEPS - 1)), id="rows missing"),
        pytest.param(lambda table: pa.concat_tables([table, table]), id="twice"),
        pytest.param(with_values("product", first_of_each(np.nan)), id="nan"),
        pytest.param(with_values("row", first_of_each(2 * STEPS + 1)), id="outside"),
        pytest.param(with_values("column", first_of_each(1)), id="above the diagonal"),
        pytest.param(lambda table: table.set_column(8, "product", table["n"]), id="type"),
        pytest.param(lambda table: table.rename_columns([*table.schema.names[:-1], "m"]), id="names"),
    ],
)
def test_a_broken_table_is_refused(copy, change):
    profile, path = load_profile(copy), copy / "gram.parquet"
    pq.write_table(change(pq.read_table(path)), path)
    for read in (profile.state_products, profile.site_products, profile.stack_products):
        with pytest.raises(FormatError):
            read()


def test_products_of_unknown_sites_and_files_that_are_no_table_are_refused(copy):
    profile, path = load_profile(copy), copy / "gram.parquet"
    renamed = with_values("module", lambda values, kinds: np.where(kinds == "site", "nobody", values))
    pq.write_table(renamed(pq.read_table(path)), path)
    with pytest.raises(FormatError, match=r"model\.json does not"):
        profile.site_products()
    path.write_bytes(b"PAR1" + b"\0" * 100)
    with pytest.raises(FormatError, match="not readable as Parquet"):
        profile.state_products()
    path.unlink()
    with pytest.raises(FormatError, match=r"gram\.parquet"):
        load_profile(copy)


def test_a_newer_table_is_refused(copy):
    manifest = json.loads((copy / "manifest.json").read_text())
    for tables in (manifest["tables"] | {"gram": 2}, {"gram": 2}, {"gram": True}):
        write_json(copy / "manifest.json", manifest | {"tables": tables}, force=True)
        with pytest.raises(FormatError, match=r"table gram has version|`\$\.tables"):
            load_profile(copy)


def test_the_samplers_own_update(profiled, copy):
    pipe = tiny_pipe()
    pipe.scheduler.set_timesteps(STEPS)
    assert profiled.own_update() == own_update(pipe.scheduler, profiled.sampler.timesteps)
    assert load_inspection(copy).own_update() == profiled.own_update()
    good = json.loads((copy / "solver.json").read_text())
    short = good | {key: good[key][1:] for key in ("coefficients", "data", "noise")}
    write_json(copy / "solver.json", short, force=True)
    with pytest.raises(FormatError, match=f"{STEPS - 1} steps, sampler.json has {STEPS}"):
        load_inspection(copy).own_update()
    write_solver(copy, UnsupportedModelError("clip_sample clips."))
    with pytest.raises(UnsupportedModelError, match="clip_sample clips"):
        load_inspection(copy).own_update()
    write_json(copy / "solver.json", {"format": "sodaprof.solver", "version": 1, "refused": 3}, force=True)
    with pytest.raises(FormatError, match="refused"):
        load_inspection(copy).own_update()


def test_a_sampler_that_clips_is_recorded_as_such(tmp_path):
    pipe = tiny_pipe()
    pipe.scheduler.register_to_config(clip_sample=True)
    profile = sodaprof.profile(pipe, tmp_path / "p", **SETTINGS | {"samples": 1}, states_only=True)
    with pytest.raises(UnsupportedModelError, match="clip_sample"):
        profile.own_update()
    assert np.isfinite(profile.state_products()).all()


def test_outputs_of_another_shape_are_refused():
    kept = Products(GramSums([], 2, 1, 4), 1, 1, True, torch.device("cpu"))
    kept.state(torch.zeros(1, 8, 2), torch.ones(1, 4, 2))  # the variance behind it
    assert kept.outputs[0].shape == kept.states[0].shape == (8,)
    with pytest.raises(UnsupportedModelError, match="--no-gram"):
        kept.state(torch.zeros(1, 4, 3), torch.ones(1, 4, 2))


def test_the_commands_write_products_and_solver(tmp_path, monkeypatch, capsys):
    pipe = tiny_pipe()
    pipe.save_pretrained(tmp_path / "model")
    profile = ("profile", tmp_path / "model", "-o", tmp_path / "p", "--steps", 8, "--samples", 1, "--force")
    assert invoke(monkeypatch, "inspect", tmp_path / "model", "--steps", 8, "-o", tmp_path / "i") == 0
    pipe.scheduler.set_timesteps(8)
    wanted = own_update(pipe.scheduler, pipe.scheduler.timesteps)
    assert load_inspection(tmp_path / "i").own_update() == wanted
    for options, tables in (((), 4), (("--no-gram",), 3), (("--states-only",), 1)):
        assert invoke(monkeypatch, *profile, *options) == 0
        assert ("--policy soda" in capsys.readouterr().out) == (options == ("--no-gram",))
        assert len(load_profile(tmp_path / "p").manifest["tables"]) == tables
        assert load_profile(tmp_path / "p").own_update() == wanted
    assert invoke(monkeypatch, *profile, "--states-only", "--no-gram") == 1
