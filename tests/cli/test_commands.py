"""The command line, run in this process: files, output, exit codes; never a traceback."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import typer
from PIL import Image

import sodaprof.measure.bench
from sodaprof import cli
from sodaprof.compiler.policies import POLICIES, RENAMED
from sodaprof.formats.profile import load_profile
from sodaprof.formats.schedule_file import load_schedule
from sodaprof.measure import metrics
from sodaprof.measure.classifier import Classifier
from sodaprof.profiler import run
from sodaprof.profiler.statistics import Statistics
from tests.cli.conftest import STEPS


def test_from_profile_to_table(command, done, model, profiled, tmp_path):
    schedule, picture, sheet = (tmp_path / name for name in ("s.json", "p.png", "sheet.png"))
    out = done("compile", profiled, "--budget", "1.6x", "-o", schedule)
    assert f"Next: sodaprof show {schedule}" in out.replace("\n", "")
    predicted = load_schedule(schedule).predicted["speedup"]
    assert 1.6 <= predicted < 1.8

    out = done("show", schedule)
    assert f"Next: sodaprof run MODEL {schedule}" in out
    rows = load_schedule(schedule).transformers["transformer"].rows
    assert all(row in out for row in rows.values())
    out = done("show", schedule, "--json")
    data = json.loads(out)["transformers"]["transformer"]
    assert sum(data["intervals"]) == STEPS
    assert data["anchors"][0] == 0

    out = done("run", model, schedule, "--label", 3, "--label", 4, "-o", picture)
    assert "executed/planned" in out
    assert Image.open(picture).size[0] > 2 * 90

    before = load_schedule(schedule).digest()
    out = done(
        "eval", model, schedule, "--samples", 4, "--picture", sheet, "--json", "--record", "-o", tmp_path / "e.json"
    )
    result = json.loads(out)
    names = [row["name"] for row in result["rows"]]
    assert names == ["solver", "fora", "fewer steps, DDIM", "fewer steps, DPM++ 2M", "fewer steps, UniPC"]
    assert result["rows"][0]["executed"] == result["rows"][0]["planned"]
    assert "fora" in result["rows"][0]["over"]
    assert json.loads((tmp_path / "e.json").read_text()) == result
    assert sheet.exists()
    (record,) = load_schedule(schedule).measured
    assert record["psnr_db"] == result["rows"][0]["psnr_db"]
    assert load_schedule(schedule).digest() == before

    out = done("eval", model, schedule, "--samples", 3, "--no-controls")
    assert "solver" in out
    assert out.endswith(f"Next: sodaprof show {schedule}\n")


def test_the_module_is_the_command_line():
    found = subprocess.run(
        [sys.executable, "-m", "sodaprof", "show", "missing.json"], capture_output=True, text=True, check=False
    )
    assert (found.returncode, found.stdout) == (1, "")
    assert found.stderr.startswith("sodaprof: missing.json: no such file")


def test_inspect_and_a_policy_that_needs_no_tables(command, done, model, tmp_path):
    out = done("inspect", model, "--steps", STEPS, "-o", tmp_path / "i")
    assert re.search(r"transformer_blocks\.\*\.attn1\s+attn\s+2\s+16\s+16", out)
    code, out, _ = command("inspect", model, "--steps", STEPS, "--json")
    assert len(json.loads(out)["model"]["transformers"]["transformer"]["sites"]) == 4
    done("compile", tmp_path / "i", "--policy", "fora", "-o", tmp_path / "f.json")
    code, _, err = command("compile", tmp_path / "i", "-o", tmp_path / "s.json")
    assert code == 1
    assert "sodaprof profile" in err


def test_one_picture_is_written_as_it_is(done, model, schedule, tmp_path):
    done("run", model, schedule, "--label", 3, "-o", tmp_path / "one.png")
    assert np.asarray(Image.open(tmp_path / "one.png")).shape == (8, 8, 3)


def test_nothing_is_overwritten_without_force(command, done, model, profiled, tmp_path):
    path = tmp_path / "s.json"
    done("compile", profiled, "-o", path)
    text = path.read_text()
    for arguments in (
        ("compile", profiled, "-o", path),
        ("run", model, path, "--label", 1, "-o", path),
        ("eval", model, path, "-o", path),
        ("profile", model, "-o", profiled),
        ("inspect", model, "-o", profiled),
    ):
        code, _, err = command(*arguments)
        assert code == 1
        assert "--force" in err
    assert path.read_text() == text
    done("compile", profiled, "-o", path, "--force", "--policy", "fora")
    assert load_schedule(path).policy["name"] == "fora"


@pytest.mark.parametrize("budget", ["0", "-1x", "abc", "nan", "inf", "1000x"])
def test_budgets_that_cannot_be_met(done, refused, profiled, target, budget):
    said = refused("compile", profiled, f"--budget={budget}", output=target)
    assert "budget" in said
    if budget == "1000x":
        most = re.search(r"--budget ([\d.]+)x", said).group(1)
        done("compile", profiled, f"--budget={most}x", "-o", target)


@pytest.mark.parametrize(
    "arguments",
    [
        ("show", "missing.json"),
        ("compile", "missing", "-o", "s.json"),
        ("eval", "no-such-model", "missing.json"),
        ("inspect", "no-such-model"),
        ("run", "no-such-model", "missing.json", "-o", "p.png"),
        ("profile", "no-such-model", "-o", "p"),
    ],
)
def test_missing_files_and_models(command, arguments, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, _, err = command(*arguments)
    assert code == 1
    assert err.startswith("sodaprof: ")
    assert len(err.splitlines()) < 8
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "arguments",
    [("show",), ("compile", "x", "--nonsense"), ("nonsense",), ("profile", "m", "-o", "p", "--steps", "many")],
)
def test_wrong_usage(command, arguments):
    code, _, err = command(*arguments)
    assert code == 2
    assert "--help" in err


def test_broken_files_in_one_screen(command, schedule, tmp_path):
    path, text = tmp_path / "s.json", schedule.read_text()
    for broken in (
        text[: len(text) // 2],
        text.replace('"version": 1', '"version": 2'),
        text.replace('"update"', '"updates"'),
    ):
        path.write_text(broken)
        code, _, err = command("show", path)
        assert code == 1
        assert "s.json" in err
        assert len(err.splitlines()) < 8


def test_a_full_disk_leaves_nothing_behind(refused, profiled, target, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    monkeypatch.setattr(os, "link", full)
    assert "disk is full" in refused("compile", profiled, output=target)


@pytest.mark.parametrize(("owner", "name"), [(run, "write_solver"), (Statistics, "save")], ids=["begin", "samples"])
def test_a_profile_goes_on_after_the_disk_was_full(command, done, model, tmp_path, owner, name):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    arguments = ("profile", model, "-o", tmp_path / "p", "--steps", STEPS, "--samples", 2, "--max-interval", 3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, name, full)
        code, _, err = command(*arguments)
    assert code == 1
    assert "disk is full" in err
    assert not (tmp_path / "p").exists()
    done(*arguments)
    assert [path.name for path in tmp_path.iterdir()] == ["p"]


def test_every_verb_has_an_example(command):
    _, out, _ = command("--help")
    for verb, _, example in cli.COMMANDS:
        assert verb in out
        assert f"Example: {example}\n" in command(verb, "--help")[1]  # in one line, to be copied


def test_documented_commands_have_these_options():
    """Every `sodaprof verb --option` of the documentation, the Makefile, the examples and the messages."""
    options = {
        verb: {name for parameter in known.params for name in (*parameter.opts, *parameter.secondary_opts)}
        for verb, known in typer.main.get_command(cli.app).commands.items()
    }
    root = Path(__file__).parents[2]
    pages = [root / "README.md", root / "Makefile", *root.glob("docs/*.md"), *root.glob("sodaprof/**/*.py")]
    found = set()
    for page in pages:
        text = page.read_text().replace("\\\n", " ")
        for verb, rest in re.findall(r"\bsodaprof (\w+)\b([^\n`;|)]*)", text):
            if verb in options:
                found |= {(verb, option, page.name) for option in re.findall(r"(?<=\s)--?[a-z][a-z-]*", rest)}
    assert len(found) > 50
    assert not [entry for entry in found if entry[1] not in options[entry[0]] | {"--help"}]
    policies = re.findall(r"--policy (\w+)", "".join(page.read_text() for page in pages))
    assert len(policies) > 20
    assert set(policies) <= {*POLICIES, *RENAMED, "mix", "NAME", "out"}  # as in: leave --policy out


def test_a_schedule_of_another_sampler_is_fitted_run_and_timed_by_it(
    command, done, refused, model, target, monkeypatch
):
    other, folder, mixed = "UniPCMultistepScheduler", target.parent / "profile", target.parent / "mix.json"
    small = ("--steps", 4, "--samples", 2, "--max-interval", 3)
    done("profile", model, *small, "--scheduler", other, "-o", folder)
    assert load_profile(folder).sampler.class_name == other
    done("compile", folder, "--budget", "1.5x", "-o", target)
    out = done("compile", folder, "--policy", "mix", "--fit", model, "--budget", "1.5x", "-o", mixed)
    assert f"Sampled by {other}" in out  # a closed-loop fit samples as the profile was sampled
    assert "Taken: " in out
    drawn, picture = ("run", model, target, "--label", 3), target.parent / "p.png"
    for arguments in (drawn, ("bench", model, target, "--rounds", 1)):
        said = refused(*arguments, output=picture)
        assert f"The schedule is for {other}, the pipeline has DDIMScheduler" in said
        assert f"--scheduler {other}" in said
    out = done(*drawn, "--scheduler", other, "-o", picture)
    assert f"Next: sodaprof eval {model} {target} --scheduler {other}\n" in out
    done("eval", model, target, "--scheduler", other, "--samples", 2, "--no-controls")
    samplers = []

    def noted(pipe, *_, **__):
        samplers.append(type(pipe.scheduler).__name__)
        raise KeyboardInterrupt

    monkeypatch.setattr(sodaprof.measure.bench, "benchmark", noted)
    assert command("bench", model, target, "--scheduler", other)[0] == 130
    assert samplers == [other]


def test_a_runtime_is_chosen_by_name(command, refused, model, schedule, target):
    arguments = (
        "run",
        model,
        schedule,
        "--label",
        3,
        "--runtime",
        "compiled",
        "--no-graphs",
        "-o",
        target.parent / "p.png",
    )
    code, out, _ = command(*arguments)
    assert (code, ", compiled\n" in out) == (0, True)  # without graphs
    for verb, name, *label in (("run", "q.png", "--label", 3), ("eval", "e.json")):
        said = refused(verb, "no-such-model", schedule, *label, "--runtime", "lowered", output=target.parent / name)
        assert "another name now: --runtime compiled --no-graphs" in said


def test_distances_to_a_folder_of_pictures(done, refused, model, schedule, target, tmp_path, monkeypatch):
    monkeypatch.setattr(metrics, "LEAST_FOR_DISTANCE", 12)
    folder, data = tmp_path / "m", tmp_path / "data"
    shutil.copytree(model, folder)
    Classifier(tuple("abcdefghij")).save(folder / "classifier")
    data.mkdir()
    for number in range(12):
        Image.new("RGB", (8, 8), (20 * number, 0, 0)).save(data / f"{number:02}.png")
    out = done("eval", folder, schedule, "--no-controls", "--data", data, "--samples", 12, "--json")
    result = json.loads(out)
    assert set(result["rows"][0]["distance"]) == {"full", "data"}
    assert result["full"]["distance"]["data"]["frechet"] > 0
    said = refused("eval", "no-such-model", schedule, "--data", data, "--samples", 11, output=target)
    assert "--samples is 11; distances to data need at least 12" in said
    (data / "00.png").unlink()
    said = refused("eval", "no-such-model", schedule, "--data", data, output=target)
    assert "11 pictures; distances need at least 12" in said
