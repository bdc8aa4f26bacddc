"""Profiling a pipeline: its numbers, its passes, and that an interrupted run loses nothing."""

from __future__ import annotations

import hashlib

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

import sodaprof
from sodaprof.errors import FormatError, SodaprofError
from sodaprof.formats.profile import load_profile
from sodaprof.formats.tables import COLUMNS
from sodaprof.pipelines.recording import recorded_calls
from sodaprof.profiler.plan import plan_profile
from sodaprof.profiler.run import run_profile
from tests.tiny_pipelines import SITES, STEPS, TwoPassPipeline, draw, tiny_pipe

SETTINGS = {"steps": STEPS, "samples": 5, "batch_size": 2, "max_interval": 4, "seed": 3}


def tables(folder):
    return {t: hashlib.sha256((folder / f"{t}.parquet").read_bytes()).hexdigest() for t in COLUMNS}


@pytest.fixture(scope="module")
def profiled(tmp_path_factory):
    folder = tmp_path_factory.mktemp("profile") / "p"
    return sodaprof.profile(tiny_pipe(), folder, **SETTINGS)


def outputs(pipe, labels, seeds):
    """{site: [T, 2B, N, D]} of a plain run."""
    with recorded_calls(pipe.transformer, SITES) as (found, _):
        draw(pipe, labels, seed=seeds[0])
    return {site: torch.stack(o).double() for site, o in found.items()}


def test_tables_hold_the_direct_definition(profiled):
    seeds = [3, 4, 5, 6, 7]
    full = outputs(tiny_pipe(), [0, 1, 2, 3, 4], seeds)
    errors = {m: profiled.caching_error(m)["transformer"] for m in ("cos", "l1", "l2")}
    for s, site in enumerate(SITES):
        for step, age in ((1, 1), (5, 3), (7, 2)):
            now, past = full[site][step], full[site][step - age]
            cos = 1 - torch.cosine_similarity(now, past, dim=-1).mean(1)  # [2B]
            l1 = (now - past).abs().sum((1, 2)) / now.abs().sum((1, 2))
            l2 = (now - past).norm(dim=(1, 2)) / now.norm(dim=(1, 2))
            for metric, value in (("cos", cos), ("l1", l1), ("l2", l2)):
                np.testing.assert_allclose(errors[metric][step, s, age], value.mean().item(), rtol=2e-4)
    assert np.isnan(errors["cos"][1, :, 2]).all()  # no output two steps before step 1


def test_pruning_table_holds_the_brute_force_definition(profiled):
    """E_p by really serving dropped tokens from the stale output, against the row-exact identity."""
    full = outputs(tiny_pipe(), [0, 1, 2, 3, 4], [3, 4, 5, 6, 7])
    table, rates = profiled.pruning_error()
    for s, site in enumerate(SITES):
        now, past = full[site][6], full[site][4]
        for r, rate in enumerate(rates):
            keep = round((1 - rate) * 16)
            top = past.abs().mean(-1).topk(keep, dim=1).indices[..., None].expand(-1, -1, 16)
            served = past.scatter(1, top, now.gather(1, top))
            brute = (1 - torch.cosine_similarity(now, served, dim=-1)).mean()
            np.testing.assert_allclose(table["transformer"][6, s, 2, r], brute.item(), rtol=2e-3, atol=1e-7)


def test_branches_and_token_errors(profiled):
    table = pq.read_table(profiled.folder / "caching.parquet").to_pylist()
    rows = [r for r in table if r["step"] == 4 and r["age"] == 2 and r["layer"] == 1 and r["module"] == "ff"]
    assert [r["branch"] for r in rows] == [0, 1, -1]
    cond, uncond, mean = rows
    assert mean["cos_mean"] == pytest.approx((cond["cos_mean"] + uncond["cos_mean"]) / 2, rel=1e-5)
    assert cond["token_cos"] is None
    assert np.mean(mean["token_cos"]) == pytest.approx(mean["cos_mean"], rel=2e-3)  # float16
    assert {r["n"] for r in table} == {5}


def test_an_interrupted_profile_resumes_bit_for_bit(profiled, tmp_path):
    folder, done = tmp_path / "p", []

    def interrupt(now, total):
        done.append(now)
        if now == 3 * STEPS:  # inside the second batch of three
            raise KeyboardInterrupt

    pipe = tiny_pipe()
    with pytest.raises(KeyboardInterrupt):
        run_profile(pipe, plan_profile(pipe, "DiTPipeline", **SETTINGS), folder, on_progress=interrupt)
    assert not folder.exists()
    plain = draw(pipe)
    assert np.array_equal(plain, draw(tiny_pipe()))
    resumed = []
    run_profile(pipe, plan_profile(pipe, "DiTPipeline", **SETTINGS), folder, on_progress=lambda n, t: resumed.append(n))
    assert min(resumed) > 2 * STEPS  # the first batch was not sampled again
    assert tables(folder) == tables(profiled.folder)
    assert not folder.with_name("p.partial").exists()


def test_other_settings_do_not_resume(tmp_path):
    folder, pipe = tmp_path / "p", tiny_pipe()

    def interrupt(now, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_profile(pipe, plan_profile(pipe, "m", **SETTINGS), folder, on_progress=interrupt)
    other = plan_profile(pipe, "m", **SETTINGS | {"samples": 6})
    with pytest.raises(FormatError, match="other settings"):
        run_profile(pipe, other, folder)
    assert run_profile(pipe, other, folder, force=True).manifest["samples"] == 6


def test_passes_over_groups_of_sites_give_the_same_tables(tmp_path):
    pipe = tiny_pipe()
    single = plan_profile(pipe, "DiTPipeline", **SETTINGS | {"batch_size": 1})
    plan = plan_profile(pipe, "DiTPipeline", **SETTINGS, memory_bytes=int(single.extra_bytes * 0.8))
    assert len(plan.groups) == 2
    assert plan.extra_bytes <= single.extra_bytes * 0.8
    run_profile(pipe, plan, tmp_path / "p")
    run_profile(pipe, single, tmp_path / "whole")
    assert len(single.groups) == 1
    assert tables(tmp_path / "p") == tables(tmp_path / "whole")
    with pytest.raises(SodaprofError, match="--max-interval"):
        plan_profile(pipe, "m", **SETTINGS, memory_bytes=1000)


def test_extra_bytes_are_those_planned():
    from sodaprof.profiler.reuse_errors import Ring

    plan = plan_profile(tiny_pipe(), "m", **SETTINGS, gram=False)
    ring = Ring(3, torch.tensor([0.5]))
    ring.push(torch.zeros(4, 16, 16))  # both halves of a batch of two
    held = sum(t.numel() * t.element_size() for t in (ring.outputs, ring.norms, ring.order))
    (scratch,) = ring.scratch.values()
    assert plan.extra_bytes == held * len(SITES) + scratch.numel() * scratch.element_size()


def test_a_profile_is_not_overwritten(profiled):
    pipe = tiny_pipe()
    with pytest.raises(FormatError, match="--force"):
        run_profile(pipe, plan_profile(pipe, "m", **SETTINGS), profiled.folder)


def test_two_pass_guidance_profiles_the_same_errors(profiled, tmp_path):
    apart = sodaprof.profile(tiny_pipe(cls=TwoPassPipeline), tmp_path / "p", **SETTINGS)
    assert apart.sampler.guidance_form == "passes"
    found, wanted = apart.caching_error()["transformer"], profiled.caching_error()["transformer"]
    np.testing.assert_allclose(found[1], wanted[1], rtol=1e-3)


def test_load_profile_reads_what_was_written(profiled):
    loaded = load_profile(profiled.folder)
    assert loaded.model == profiled.model
    assert loaded.digest() == profiled.digest()
    assert loaded.manifest["measured"]["time_over_plain"] >= 1


@pytest.mark.parametrize(
    ("setting", "value"), [("steps", 1), ("samples", 0), ("max_interval", 1), ("max_interval", 99), ("seed", -1)]
)
def test_invalid_settings_are_refused(setting, value):
    with pytest.raises(SodaprofError, match=setting.replace("_", "-")):
        plan_profile(tiny_pipe(), "m", **SETTINGS | {setting: value})
