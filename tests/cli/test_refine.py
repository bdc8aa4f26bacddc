"""`refine`: its options, wrong files, an interruption, and what the file then holds."""

from __future__ import annotations

import json
from contextlib import contextmanager

import pytest

from sodaprof.cli import refine as refining
from sodaprof.cli.options import parse_size, parse_span
from sodaprof.errors import SodaprofError
from sodaprof.formats.schedule_file import load_schedule
from tests.conftest import build_relay, build_schedule
from tests.tiny_pipelines import tiny_pipe


def test_a_search_of_a_few_candidates(command, done, model, schedule, target):
    out = done("refine", model, schedule, "--evaluations", 3, "--iterations", 6, "--max-cache", "1MB", "-o", target)
    assert "of latents and outputs of" in out
    assert "update fitted jointly" in out
    assert "Placements: " in out
    assert "dB on the validation generations (pictures)" in out
    assert "MiB of cache a generation" in out
    assert f"Next: sodaprof eval {model} {target}" in out
    better = load_schedule(target)
    assert better.update.fitted["loop"] == "joint"
    assert better.predicted["speedup"] >= 2.5 - 1e-9
    assert better.predicted["cache_bytes"] <= 10**6
    assert "--force" in command("refine", model, schedule, "--evaluations", 1, "--seed", 1, "-o", schedule)[2]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((), "Give --time 5m, or --evaluations"),
        (("--evaluations", -5), "--evaluations is -5; expected at least 0"),
        (("--evaluations", 1, "--samples", 3), "--samples is 3; expected at least 4"),
        (("--method", "newton"), "--method"),
        (("--max-cache", "much"), "--max-cache is 'much'"),
        *(
            ((f"--time={span}",), f"--time is {span!r}; expected a number above 0 with its unit, as in --time 5m")
            for span in ("5q", "5", "m", "-1m", "0s", "infh", "5MB")
        ),
    ],
)
def test_options_that_are_reported_before_the_model_is_loaded(refused, schedule, target, options, message):
    assert message in refused("refine", "no-such-model", schedule, *options, output=target)


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("missing", "no such file"),
        ("folder", "profile"),
        ("cost", "found format"),
        ("half", "not readable as JSON"),
        ("few", "has 3 calibration generations; a search takes at least 4. Profile and compile again"),
        ("mixed", "(stack .). Give a schedule of --policy solver, forecast, drift"),
        ("relay", "several transformers (high, low)"),
    ],
)
def test_files_that_no_search_begins_with(refused, profiled, schedule, target, tmp_path, what, message):
    path = {"folder": profiled, "cost": profiled / "cost.flops.json"}.get(what, tmp_path / f"{what}.json")
    if what == "half":
        path.write_text(schedule.read_text()[:100])
    elif what == "few":
        data = json.loads(schedule.read_text())
        data["profile"]["samples"] = 3
        path.write_text(json.dumps(data))
    elif what in ("mixed", "relay"):
        (build_schedule() if what == "mixed" else build_relay()).save(path)
    assert message in refused("refine", "no-such-model", path, "--evaluations", 1, output=target)


def test_another_sampler_or_model_than_the_schedules(refused, model, schedule, target, tmp_path):
    for name in ("UniPCMultistepScheduler", "DDPMScheduler"):  # the second one sets the same timesteps
        said = refused("refine", model, schedule, "--evaluations", 1, "--scheduler", name, output=target)
        assert f"The schedule is for DDIMScheduler, the pipeline has {name}" in said
        assert "--scheduler DDIMScheduler" in said
    tiny_pipe(layers=3).save_pretrained(tmp_path / "other")
    assert "Compile for this" in refused("refine", tmp_path / "other", schedule, "--evaluations", 1, output=target)


def test_an_interrupted_search_leaves_its_best_and_goes_on(command, done, model, schedule, target, monkeypatch):
    @contextmanager
    def interrupted(console, title):
        def on_progress(done, total):
            if done == 2:
                raise KeyboardInterrupt

        yield on_progress

    arguments = ("refine", model, schedule, "--samples", 4, "--method", "none", "-o", target)
    with monkeypatch.context() as patch:
        patch.setattr(refining, "progress", interrupted)
        code, _, err = command(*arguments, "--evaluations", 9)
    assert code == 130
    assert "Repeat the command, and it continues" in err
    assert load_schedule(target).update.fitted["loop"] == "closed"
    assert sorted(path.name for path in target.parent.iterdir()) == ["new.json", "new.json.search"]
    done(*arguments, "--evaluations", 3)  # three in all, two of them known
    whole = target.with_name("whole.json")
    done(*arguments[:-1], whole, "--evaluations", 3)
    assert load_schedule(target).digest() == load_schedule(whole).digest()
    code, _, err = command(*arguments, "--evaluations", 3, "--seed", 5)
    assert code == 1
    assert "another schedule or with other settings" in err


def test_sizes_and_times_need_their_unit():
    assert parse_size("2GB") == 2 * 10**9
    assert parse_size(" 1.5kb") == 1500
    assert parse_span("5m") == 300
    for wrong in ("5", "GB", "-1MB", "twoGB", "infGB", "nanMB", ""):
        with pytest.raises(SodaprofError, match=r"--max-cache is .* as in --max-cache 2GB"):
            parse_size(wrong)
