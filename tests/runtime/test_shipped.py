"""Schedules next to the weights: copied there after a check, found if they match, listed if several or none do."""

from __future__ import annotations

from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
from diffusers import DDIMScheduler, DiTPipeline
from msgspec.structs import replace

import sodaprof
from sodaprof.errors import FormatError, MismatchError, SodaprofError
from sodaprof.runtime.shipped import find_shipped, ship
from tests.tiny_pipelines import SITES, STEPS, draw, schedule_for, tiny_pipe


@pytest.fixture
def model(tmp_path) -> Path:
    pipe = tiny_pipe()
    pipe.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def pipe(model) -> DiTPipeline:
    pipe = DiTPipeline.from_pretrained(model)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def saved(pipe, path, row="CRRRRRRR", **changes) -> Path:
    schedule = schedule_for(pipe, {SITES[0]: row}, steps=len(row))
    replace(schedule, **changes).save(path, force=True)
    return path


def test_a_shipped_schedule_is_applied_without_a_name(model, pipe, tmp_path):
    file = saved(pipe, tmp_path / "soda-2x.json")
    with sodaprof.apply(pipe, file):
        wanted = draw(pipe)
    assert ship(file, model) == model / "sodaprof" / "soda-2x.json"
    assert (model / "sodaprof" / "soda-2x.json").read_bytes() == file.read_bytes()
    with sodaprof.apply(pipe) as handle:
        assert np.array_equal(draw(pipe), wanted)
        assert handle.report().executed["R"] == STEPS - 1


def test_several_schedules_are_distinguished_by_their_steps(model, pipe, tmp_path):
    ship(saved(pipe, tmp_path / "eight.json"), model)
    ship(saved(pipe, tmp_path / "four.json", "CRRR"), model)
    assert find_shipped(pipe, 4).name == "four.json"
    assert find_shipped(pipe, 8).name == "eight.json"
    with pytest.raises(
        SodaprofError, match=r"2 schedules that match(.|\n)*eight.json: test, 8 steps\n.*four.json: test, 4 steps"
    ):
        sodaprof.apply(pipe)
    with pytest.raises(MismatchError, match=r"eight.json: it is for 8 steps, not 5\n"):
        sodaprof.apply(pipe, steps=5)


def test_a_schedule_for_another_scheduler_is_listed_with_the_reason(model, pipe, tmp_path):
    ship(saved(pipe, tmp_path / "s.json"), model)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, prediction_type="v_prediction")
    with pytest.raises(MismatchError, match=r"s.json: The scheduler's prediction_type is 'v_prediction'"):
        sodaprof.apply(pipe)


def test_without_a_shipped_schedule_the_message_names_the_command(model, pipe):
    with pytest.raises(SodaprofError, match=f"ships no schedules.*sodaprof ship schedule.json {model}"):
        sodaprof.apply(pipe)
    with pytest.raises(SodaprofError, match="not loaded from a folder or the hub"):
        sodaprof.apply(tiny_pipe())


def test_only_what_matches_is_shipped_and_nothing_is_overwritten(model, pipe, tmp_path):
    file = saved(pipe, tmp_path / "s.json")
    other = saved(tiny_pipe(layers=3), tmp_path / "other.json")
    with pytest.raises(MismatchError, match="layers 2, the schedule is for 3"):
        ship(other, model)
    assert not (model / "sodaprof").exists()
    ship(file, model)
    with pytest.raises(FormatError, match="exists already"):
        ship(file, model)
    ship(file, model, force=True)
    with pytest.raises(SodaprofError, match="is a hub id"):
        ship(file, "someone/model")


def test_a_hub_repository_is_asked_for_its_schedules_alone(model, pipe, tmp_path, monkeypatch):
    ship(saved(pipe, tmp_path / "s.json"), model)
    asked = []

    def snapshot(repo, allow_patterns):
        asked.append((repo, allow_patterns))
        if len(asked) > 1:
            raise ConnectionError("no route")
        return str(model)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    pipe.register_to_config(_name_or_path="someone/model")
    assert find_shipped(pipe) == model / "sodaprof" / "s.json"
    assert asked == [("someone/model", ["sodaprof/*.json"])]
    with pytest.raises(SodaprofError, match=r"nor fetched from the hub \(no route\)"):
        find_shipped(pipe)


def test_the_command_line(model, pipe, tmp_path, command):
    file, picture = saved(pipe, tmp_path / "s.json"), tmp_path / "p.png"
    code, _, said = command("run", model, "--label", 1, "-o", picture)
    assert (code, picture.exists()) == (1, False)
    assert "ships no schedules" in said
    code, out, _ = command("ship", file, model)
    assert code == 0
    assert "sodaprof run" in out
    code, out, _ = command("run", model, "--label", 1, "-o", picture)
    assert (code, picture.exists()) == (0, True)
    assert "R 7/7" in out
    code, _, said = command("run", model, file, "--steps", 9, "--label", 1, "-o", picture, "--force")
    assert code == 1
    assert "is for 8 steps, not 9" in said
