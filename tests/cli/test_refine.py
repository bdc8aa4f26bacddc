"""`refine`: its options, wrong files, an interruption, and what the file then holds."""

from __future__ import annotations

import json
from contextlib import contextmanager

import pytest

import sodaprof
from sodaprof.cli import refine as refining
from sodaprof.cli.options import parse_size, parse_span
from sodaprof.errors import SodaprofError
from sodaprof.formats.schedule_file import load_schedule
from tests.tiny_pipelines import tiny_pipe

STEPS = 8


@pytest.fixture(scope="module")
def profiled(tmp_path_factory):
    folder = tmp_path_factory.mktemp("refine") / "profile"
    sodaprof.profile(tiny_pipe(), folder, name="tiny", steps=STEPS, samples=6, max_interval=4, prompts=[1, 2])
    return folder


@pytest.fixture(scope="module")
def first(profiled, tmp_path_factory):
    path = tmp_path_factory.mktemp("first") / "first.json"
    sodaprof.compile_schedule(profiled, 2.5).save(path)
    return path


@pytest.fixture
def target(tmp_path):
    """A path in an empty folder."""
    (tmp_path / "out").mkdir()
    return tmp_path / "out" / "better.json"


def test_a_search_of_a_few_candidates(command, model, first, target):
    code, out, _ = command("refine", model, first, "--evaluations", 3, "-o", target)
    assert code == 0
    assert "dB on the search generations" in out
    assert f"Next: sodaprof eval {model} {target}" in out
    better = load_schedule(target)
    assert better.update.fitted["loop"] == "closed"
    assert better.predicted["speedup"] >= 2.5 - 1e-9
    assert "--force" in command("refine", model, first, "--evaluations", 1, "--seed", 1, "-o", first)[2]


@pytest.mark.parametrize("span", ["5q", "5", "m", "-1m", "0s", "infh", "5MB"])
def test_a_wrong_time_is_reported_before_the_model_is_loaded(refused, first, target, span):
    said = refused("refine", "no-such-model", first, f"--time={span}", output=target)
    assert f"--time is {span!r}; expected a number above 0 with its unit, as in --time 5m" in said


def test_a_search_without_an_end_is_reported_before_the_model_is_loaded(refused, first, target):
    said = refused("refine", "no-such-model", first, output=target)
    assert "Give --time 5m, or --evaluations" in said


def test_a_profile_of_too_few_generations(refused, first, target, tmp_path):
    few = json.loads(first.read_text())
    few["profile"]["samples"] = 3
    (tmp_path / "few.json").write_text(json.dumps(few))
    said = refused("refine", "no-such-model", tmp_path / "few.json", "--evaluations", 1, output=target)
    assert "has 3 calibration generations; a search takes at least 4. Profile and compile again" in said


@pytest.mark.parametrize(
    ("what", "message"),
    [("missing", "no such file"), ("folder", "profile"), ("other", "found format"), ("half", "not readable as JSON")],
)
def test_files_that_are_no_schedules(refused, profiled, first, target, tmp_path, what, message):
    paths = {
        "missing": tmp_path / "missing.json",
        "folder": profiled,
        "other": profiled / "cost.flops.json",
        "half": tmp_path / "half.json",
    }
    paths["half"].write_text(first.read_text()[:100])
    assert message in refused("refine", "no-such-model", paths[what], "--evaluations", 1, output=target)


def test_another_sampler_or_model_than_the_schedules(refused, model, first, target, tmp_path):
    for name in ("UniPCMultistepScheduler", "DDPMScheduler"):  # the second one sets the same timesteps
        said = refused("refine", model, first, "--evaluations", 1, "--scheduler", name, output=target)
        assert f"The schedule is for DDIMScheduler, the pipeline has {name}" in said
        assert "--scheduler DDIMScheduler" in said
    tiny_pipe(layers=3).save_pretrained(tmp_path / "other")
    assert "Compile for this" in refused("refine", tmp_path / "other", first, "--evaluations", 1, output=target)


def test_an_interrupted_search_leaves_its_best_and_goes_on(command, model, first, target, monkeypatch):
    @contextmanager
    def interrupted(console, title):
        def on_progress(done, total):
            if done == 2:
                raise KeyboardInterrupt

        yield on_progress

    arguments = ("refine", model, first, "--samples", 4, "-o", target)
    with monkeypatch.context() as patch:
        patch.setattr(refining, "progress", interrupted)
        code, _, err = command(*arguments, "--evaluations", 9)
    assert code == 130
    assert "refine continue when the same command is repeated" in err
    assert load_schedule(target).update.fitted["loop"] == "closed"
    assert sorted(path.name for path in target.parent.iterdir()) == ["better.json", "better.json.search"]
    assert command(*arguments, "--evaluations", 3)[0] == 0  # three in all, two of them known
    whole = target.with_name("whole.json")
    assert command("refine", model, first, "--samples", 4, "--evaluations", 3, "-o", whole)[0] == 0
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
