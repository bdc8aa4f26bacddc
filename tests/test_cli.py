"""The command line, run in this process: what it writes, what it says, its exit codes; never a traceback."""

from __future__ import annotations

import json
import re
import sys

import numpy as np
import pytest
from PIL import Image

from sodaprof import cli
from sodaprof.schedule import load_schedule

from .pipelines import tiny_pipe

STEPS = "8"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "tiny"
    tiny_pipe().save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def profiled(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli") / "profile"
    with pytest.MonkeyPatch.context() as patch:
        code = invoke(patch, "profile", model, "-o", folder, "--steps", STEPS, "--samples", 3, "--max-interval", 4)
    assert code == 0
    return folder


def invoke(monkeypatch, *arguments) -> int:
    monkeypatch.setattr(sys, "argv", ["sodaprof", *map(str, arguments)])
    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit) as stop:
        cli.main()
    return stop.value.code


@pytest.fixture
def sodaprof(monkeypatch, capsys):
    def run(*arguments):
        capsys.readouterr()
        code = invoke(monkeypatch, *arguments)
        said = capsys.readouterr()
        assert "Traceback" not in said.err + said.out
        return code, said.out, said.err

    return run


def test_from_profile_to_table(sodaprof, model, profiled, tmp_path):
    schedule, picture, sheet = tmp_path / "s.json", tmp_path / "p.png", tmp_path / "sheet.png"
    code, out, _ = sodaprof("compile", profiled, "--budget", "1.6x", "-o", schedule)
    assert code == 0
    assert f"Next: sodaprof show {schedule}" in out.replace("\n", "")
    predicted = load_schedule(schedule).predicted["speedup"]
    assert 1.6 <= predicted < 1.8

    code, out, _ = sodaprof("show", schedule)
    assert code == 0
    rows = load_schedule(schedule).transformers["transformer"].rows
    assert all(row in out for row in rows.values())
    code, out, _ = sodaprof("show", schedule, "--json")
    data = json.loads(out)["transformers"]["transformer"]
    assert sum(data["intervals"]) == int(STEPS)
    assert data["anchors"][0] == 0
    site, shown = next(iter(data["sites"].items()))
    assert {int(t) for t in shown["reuse_ages"]} == {t for t, a in enumerate(rows[site]) if a in "RP"}

    code, out, _ = sodaprof("run", model, schedule, "--label", 3, "--label", 4, "-o", picture)
    assert code == 0
    assert "executed/planned" in out
    assert Image.open(picture).size[0] > 2 * 90

    before = load_schedule(schedule).digest()
    code, out, _ = sodaprof(
        "eval", model, schedule, "--samples", 4, "--picture", sheet, "--json", "--record", "-o", tmp_path / "e.json"
    )
    assert code == 0
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

    code, out, _ = sodaprof("eval", model, schedule, "--samples", 3, "--no-controls")
    assert code == 0
    assert "solver" in out


def test_inspect_and_a_policy_that_needs_no_tables(sodaprof, model, tmp_path):
    code, out, _ = sodaprof("inspect", model, "--steps", STEPS, "-o", tmp_path / "i")
    assert code == 0
    assert re.search(r"transformer_blocks\.\*\.attn1\s+attn\s+2\s+16\s+16", out)
    code, out, _ = sodaprof("inspect", model, "--steps", STEPS, "--json")
    assert len(json.loads(out)["model"]["transformers"]["transformer"]["sites"]) == 4
    assert sodaprof("compile", tmp_path / "i", "--policy", "fora", "-o", tmp_path / "f.json")[0] == 0
    code, _, err = sodaprof("compile", tmp_path / "i", "-o", tmp_path / "s.json")
    assert code == 1
    assert "sodaprof profile" in err


def test_one_picture_is_written_as_it_is(sodaprof, model, profiled, tmp_path):
    sodaprof("compile", profiled, "-o", tmp_path / "s.json")
    assert sodaprof("run", model, tmp_path / "s.json", "--label", 3, "-o", tmp_path / "one.png")[0] == 0
    assert np.asarray(Image.open(tmp_path / "one.png")).shape == (8, 8, 3)


def test_nothing_is_overwritten_without_force(sodaprof, model, profiled, tmp_path):
    path = tmp_path / "s.json"
    assert sodaprof("compile", profiled, "-o", path)[0] == 0
    text = path.read_text()
    for arguments in (
        ("compile", profiled, "-o", path),
        ("run", model, path, "--label", 1, "-o", path),
        ("eval", model, path, "-o", path),
        ("profile", model, "-o", profiled),
        ("inspect", model, "-o", profiled),
    ):
        code, _, err = sodaprof(*arguments)
        assert code == 1
        assert "--force" in err
    assert path.read_text() == text
    assert sodaprof("compile", profiled, "-o", path, "--force", "--policy", "fora")[0] == 0
    assert load_schedule(path).policy["name"] == "fora"


@pytest.mark.parametrize("budget", ["0", "-1x", "abc", "nan", "inf", "1000x"])
def test_senseless_budgets(sodaprof, profiled, tmp_path, budget):
    code, _, err = sodaprof("compile", profiled, f"--budget={budget}", "-o", tmp_path / "s.json")
    assert code == 1
    assert "budget" in err
    assert not list(tmp_path.iterdir())
    if budget == "1000x":
        most = float(re.search(r"--budget ([\d.]+)x", err).group(1))
        assert sodaprof("compile", profiled, f"--budget={most}x", "-o", tmp_path / "s.json")[0] == 0


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
def test_missing_files_and_models(sodaprof, arguments, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, _, err = sodaprof(*arguments)
    assert code == 1
    assert err.startswith("sodaprof: ")
    assert len(err.splitlines()) < 8
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "arguments",
    [("show",), ("compile", "x", "--nonsense"), ("nonsense",), ("profile", "m", "-o", "p", "--steps", "many")],
)
def test_wrong_usage(sodaprof, arguments):
    code, _, err = sodaprof(*arguments)
    assert code == 2
    assert "--help" in err


def test_broken_files_in_one_screen(sodaprof, profiled, tmp_path):
    path = tmp_path / "s.json"
    sodaprof("compile", profiled, "-o", path)
    text = path.read_text()
    for broken in (
        text[: len(text) // 2],
        text.replace('"version": 1', '"version": 2'),
        text.replace('"update"', '"updates"'),
    ):
        path.write_text(broken)
        code, _, err = sodaprof("show", path)
        assert code == 1
        assert "s.json" in err
        assert len(err.splitlines()) < 8


def test_a_full_disk_leaves_nothing_behind(sodaprof, profiled, tmp_path, monkeypatch):
    import errno
    import os

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    code, _, err = sodaprof("compile", profiled, "-o", tmp_path / "s.json")
    assert code == 1
    assert "disk is full" in err
    assert not list(tmp_path.iterdir())


def test_ctrl_c(sodaprof, profiled, tmp_path, monkeypatch):
    import sodaprof.compiler as compiler

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(compiler, "compile_schedule", interrupted)
    code, _, err = sodaprof("compile", profiled, "-o", tmp_path / "s.json")
    assert code == 130
    assert "Interrupted" in err


def test_evaluation_seeds_keep_away_from_calibration(sodaprof, model, profiled, tmp_path):
    sodaprof("compile", profiled, "-o", tmp_path / "s.json")
    code, _, err = sodaprof("eval", model, tmp_path / "s.json", "--seed", 2, "--samples", 4)
    assert code == 1
    assert "--seed 3" in err


def test_every_verb_has_an_example(sodaprof):
    _, out, _ = sodaprof("--help")
    for verb in ("profile", "compile", "show", "run", "eval", "inspect"):
        assert verb in out
        assert f"Example: sodaprof {verb}" in " ".join(sodaprof(verb, "--help")[1].split())


def test_a_disk_that_fills_during_a_profile(sodaprof, model, tmp_path, monkeypatch):
    import errno

    from sodaprof.profiler.statistics import Statistics

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    arguments = ("profile", model, "-o", tmp_path / "p", "--steps", STEPS, "--samples", 2, "--max-interval", 3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Statistics, "save", full)
        code, _, err = sodaprof(*arguments)
    assert code == 1
    assert "disk is full" in err
    assert not (tmp_path / "p").exists()
    assert sodaprof(*arguments)[0] == 0  # and the same command goes on
    assert (tmp_path / "p" / "manifest.json").exists()
