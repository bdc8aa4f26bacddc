"""What the command line refuses: each in one message, exit code 1, with nothing written or lost."""

from __future__ import annotations

import io
import json
import os
import shutil
import sys

import pytest

from sodaprof import cli
from sodaprof.profiler import run
from tests.conftest import build_relay

SMALL = ("--steps", 8, "--samples", 2, "--max-interval", 3)


def test_a_schedule_of_another_model(refused, tmp_path):
    build_relay().save(tmp_path / "s.json")  # of two transformers
    said = refused("eval", "tiny-dit", tmp_path / "s.json", "--samples", 2, output=tmp_path / "e.json")
    assert "The schedule is for " in said
    assert "Compile for this one" in said


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--samples", 0), "--samples is 0; expected at least 1"),
        (("--steps", 0), "--steps is 0; expected at least 1"),
        (("--steps", 5000), "DDIMScheduler does not take 5000 steps: "),
        (("--max-interval", 1), "--max-interval is 1; expected at least 2"),
        (("--batch-size", 0), "--batch-size is 0; expected at least 1"),
        (("--seed", -1), "--seed is -1; expected at least 0"),
        (("--seed", 2**64 - 1), f"Found the seed {2**64}; expected 0 to 2^64 - 1"),
        (("--guidance-scale", "nan"), "--guidance-scale is nan; expected 0 to 10,000"),
        (("--guidance-scale", "inf"), "--guidance-scale is inf; expected 0 to 10,000"),
        (("--guidance-scale", -2), "--guidance-scale is -2.0; expected at least 0"),
        (("--dtype", "float8"), "--dtype is 'float8'; expected float32, bfloat16 or float16"),
        (("--device", "cuda:99"), "--device is 'cuda:99'; expected one that torch can use here"),
        (("--device", "meta"), "--device is 'meta'"),
        (("--scheduler", "HeunDiscreteScheduler"), "this release needs samplers that call the network once"),
        (("--scheduler", "DiTPipeline"), "DiTPipeline: not a scheduler of diffusers"),
        (("--scheduler", "FlowMatchEulerDiscreteScheduler"), "samples a flow; the pipeline has DDIMScheduler"),
    ],
)
def test_profile(refused, model, tmp_path, options, said):
    assert said in refused("profile", model, *SMALL, *options, output=tmp_path / "p")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--samples", 1), "--samples is 1; expected at least 2"),
        (("--batch-size", 0), "--batch-size is 0; expected at least 1"),
        (("--batch-size", -1), "--batch-size is -1; expected at least 1"),
        (("--seed", -7), "--seed is -7; expected at least 0"),
        (("--seed", 10**30), "expected 0 to 18,446,744,073,709,551,615"),
        (("--guidance-scale", "inf"), "--guidance-scale is inf; expected 0 to 10,000"),
        (("--picture", "sheet.foo"), "pictures are written as .png, .jpg or .webp. Type: sheet.png"),
    ],
)
def test_eval(refused, model, schedule, tmp_path, options, said):
    assert said in refused("eval", model, schedule, "--samples", 2, *options, output=tmp_path / "e.json")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--rounds", 0), "--rounds is 0; expected at least 1"),
        (("--batch-size", -1), "--batch-size is -1; expected at least 1"),
        (("--steps", 0), "--steps is 0; expected at least 1"),
        (("--guidance-scale", "nan"), "--guidance-scale is nan"),
    ],
)
def test_bench(refused, model, tmp_path, options, said):
    cost = tmp_path / "cost.json"
    assert said in refused("bench", model, "--steps", 8, "--cost", cost, *options, output=tmp_path / "b.json")
    assert not cost.exists()


def test_bench_takes_the_steps_of_its_schedules(refused, schedule, tmp_path):
    said = refused("bench", "no-such-model", schedule, "--steps", 5, output=tmp_path / "b.json")
    assert "are for 8 steps, --steps is 5. Leave --steps out" in said


@pytest.mark.parametrize("steps", [0, -2, 5000])
@pytest.mark.parametrize("command_line", [("inspect",), ("doctor",), ("bench", "--rounds", 1)])
def test_steps_that_nothing_can_take(command, model, command_line, steps):
    verb, *options = command_line
    code, _, err = command(verb, model, *options, "--steps", steps)
    assert code == 1
    assert ("does not take 5000 steps" if steps > 0 else f"--steps is {steps}; expected at least 1") in err


@pytest.mark.parametrize(
    ("options", "name", "said"),
    [
        (("--seed", -1), "p.png", "--seed is -1; expected at least 0"),
        (("--label", -1), "p.png", "Found the label -1; this model knows 0 to "),
        ((), "p.foo", "p.foo: pictures are written as .png, .jpg or .webp. Type: "),
        ((), "p", "pictures are written as .png"),
        ((), "p.mp4", "an mp4 holds one clip"),
    ],
)
def test_run(refused, model, schedule, tmp_path, options, name, said):
    assert said in refused("run", model, schedule, "--label", 1, *options, output=tmp_path / name)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"\xff\xfe\x00b", "not readable ('utf-8' codec"),
        (b"# a comment\n\n", "no prompts"),
        (b"1\n99999\n", "Found the label 99999"),
        ("²\n".encode(), "takes integer labels; found '²'"),
        (b"--5\n", "takes integer labels; found '--5'"),
    ],
)
def test_prompt_files(refused, model, schedule, tmp_path, content, said):
    prompts, output = tmp_path / "prompts.txt", tmp_path / "out"
    prompts.write_bytes(content)
    assert said in refused("profile", model, *SMALL, "--prompts", prompts, output=output)
    assert said in refused("eval", model, schedule, "--samples", 2, "--prompts", prompts, output=output)


def test_two_results_do_not_go_to_one_file(command, model, schedule, tmp_path):
    one = tmp_path / "one.png"
    for arguments in (("eval", model, schedule, "--picture", one), ("bench", model, "--cost", one)):
        code, _, err = command(*arguments, "-o", one)
        assert code == 1
        assert f"--output are both {one}. Give each a file of its own." in err
    assert not list(tmp_path.iterdir())


def test_force_replaces_files_by_files_and_profiles_by_profiles(command, model, profiled, schedule, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    kept = tmp_path / "home"
    kept.mkdir()
    (kept / "letter.txt").write_text("dear")
    for arguments, said in (
        (("compile", profiled, "-o", kept), "exists and is not a file"),
        (("compile", profiled, "-o", tmp_path / "pipe"), "exists and is not a file"),
        (("profile", model, *SMALL, "-o", schedule), "exists and is not a folder"),
        (("inspect", model, "-o", schedule), "exists and is not a folder"),
        (("compile", profiled, "-o", schedule / "s.json"), f"{schedule} is a file; expected a folder to write into"),
        (("profile", model, *SMALL, "-o", kept), "holds letter.txt, which is no part of a profile and would be lost"),
    ):
        code, _, err = command(*arguments, "--force")
        assert (code, err.count("\n")) == (1, 1)
        assert said in err
    assert (kept / "letter.txt").read_text() == "dear"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["home", "pipe"]


def test_a_folder_that_may_not_be_written(command, model, schedule, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path)  # root, say, may write anywhere
    code, _, err = command("eval", model, schedule, "-o", tmp_path / "new" / "e.json")
    assert code == 1
    assert f"the folder {tmp_path} may not be written" in err
    assert not list(tmp_path.iterdir())


def test_what_a_killed_profile_had_not_finished_writing_goes(command, done, model, tmp_path, monkeypatch):
    def killed(*_):
        (tmp_path / "p.partial" / ".state.npz.abc.npz").write_text("half")
        raise KeyboardInterrupt

    arguments = ("profile", model, *SMALL, "-o", tmp_path / "p")
    with monkeypatch.context() as patch:
        patch.setattr(run, "measure_response", killed)
        assert command(*arguments)[0] == 130
    done(*arguments)
    assert {path.name for path in (tmp_path / "p").iterdir()} == run.PARTS
    done(*arguments, "--force")


def test_an_output_that_takes_ascii_alone(schedule, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding="ascii"))
    monkeypatch.setattr(sys, "argv", ["sodaprof", "show", str(schedule)])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 1
    assert "Set PYTHONIOENCODING=utf-8" in capsys.readouterr().err


@pytest.mark.parametrize("wrong", ["larger", "none", "free"])
def test_costs_that_do_not_match_the_model(refused, profiled, target, tmp_path, wrong):
    table = json.loads((profiled / "cost.flops.json").read_text())
    known = table["transformers"]["transformer"]
    policies, message = ["solver"], "a full step costs nothing; expected more than 0"
    if wrong == "larger":
        known["sites"]["transformer_blocks.0.attn2"] = next(iter(known["sites"].values()))
        message = "has costs for transformer/transformer_blocks.0.attn2, which this model does not have"
    elif wrong == "none":
        table["transformers"] = {}
        policies += ["soda", "fora", "drift"]
        message = "has no costs for transformer/transformer_blocks.0.attn1"
    else:
        known["sites"] = {site: {"C": 0, "R": 0, "F": [0] * 4, "P": [[0, 0]], "map": 0} for site in known["sites"]}
        known["step"] = {"fixed": 0, "all_cached": 0, "stack": [0] * 4}
    (tmp_path / "cost.json").write_text(json.dumps(table))
    for policy in policies:
        options = ("--policy", policy, "--cost", tmp_path / "cost.json")
        assert message in refused("compile", profiled, *options, output=target)


@pytest.mark.parametrize("prompts", [None, [], "abc", [None], [1.5]])
def test_broken_prompts_of_a_profile(refused, profiled, tmp_path, prompts):
    folder = tmp_path / "profile"
    shutil.copytree(profiled, folder)
    manifest = json.loads((folder / "manifest.json").read_text()) | {"prompts": prompts}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    said = refused("compile", folder, output=tmp_path / "s.json")
    assert "`$.prompts" in said
    assert f"sodaprof profile MODEL -o {folder} --force" in said


@pytest.mark.parametrize("policy", ["forecast", "drift", "soda", "smoothcache"])
def test_a_budget_that_the_recorded_intervals_bound(refused, command, profiled, tmp_path, policy):
    said = refused("compile", profiled, "--policy", policy, "--budget", "7x", output=tmp_path / "s.json")
    assert "Full steps are at most 4 apart, the longest interval of the profile" in said
    assert "sodaprof profile MODEL --max-interval 5 (or more) -o DIR" in said
    _, _, err = command("compile", profiled, "--policy", "fora", "--budget", "99x", "-o", tmp_path / "s.json")
    assert "--max-interval" not in err  # nothing but its cost bounds it
