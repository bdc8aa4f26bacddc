"""Every committed file loads, and is the same bytes when it is written again."""

from __future__ import annotations

from pathlib import Path

import pytest

import sodaprof
from sodaprof.formats.cost import load_cost, save_cost
from sodaprof.formats.files import read_json, write_json
from sodaprof.formats.profile import load_profile, write_inspection, write_solver
from sodaprof.formats.schedule_file import load_schedule

SCHEDULES = Path(sodaprof.__file__).parent.parent / "schedules"
PROFILES = [path.parent for path in sorted(SCHEDULES.rglob("manifest.json"))]
FILES = [path for path in sorted(SCHEDULES.rglob("*.json")) if path.parent not in PROFILES]


def test_the_files_are_found():
    assert len(FILES) >= 30
    assert SCHEDULES / "tiny-dit" / "profile" in PROFILES


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SCHEDULES)))
def test_a_schedule(path, tmp_path):
    load_schedule(path).save(tmp_path / "again.json")
    assert (tmp_path / "again.json").read_bytes() == path.read_bytes()


@pytest.mark.parametrize("folder", PROFILES, ids=lambda path: str(path.relative_to(SCHEDULES)))
def test_a_profile(folder, tmp_path):
    profile = load_profile(folder)
    write_inspection(tmp_path, profile.model, profile.sampler)
    write_solver(tmp_path, profile.own_update())
    save_cost(load_cost(folder / "cost.flops.json"), tmp_path / "cost.flops.json")
    write_json(tmp_path / "manifest.json", profile.manifest)
    written = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert written == {path.name: path.read_bytes() for path in folder.glob("*.json")}
    assert profile.manifest == read_json(folder / "manifest.json")
