"""The driver of the GPU run: parts in processes of their own with limits, wheels without a package index."""

from __future__ import annotations

import os
import subprocess
import sys
import time
import zipfile

import pytest

from tests.gpu import __main__ as driver
from tests.gpu.common import Results, Settings


def part(tmp_path, code, limit=60.0):
    return driver.run("part", [sys.executable, "-c", code], dict(os.environ), limit, tmp_path / "log.txt")


def test_what_becomes_of_a_part(tmp_path):
    assert part(tmp_path, "print('well')")["status"] == "passed"
    assert part(tmp_path, "raise SystemExit('ill')")["status"] == "failed"
    assert part(tmp_path, "", limit=1.0)["status"] == "not started"
    log = (tmp_path / "log.txt").read_text()
    assert log.count("==== part") == 2
    assert "well" in log
    assert "ill" in log


def test_a_part_is_stopped_with_what_it_started(tmp_path):
    mark = tmp_path / "still running"
    child = f"import pathlib, time; time.sleep(12); pathlib.Path({str(mark)!r}).touch()"
    code = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    found = part(tmp_path, code, limit=6.0)
    assert found["status"] == "stopped"
    time.sleep(8)
    assert not mark.exists()


def wheel(folder, name):
    """Writes a wheel of one module."""
    about = f"{name}-1.dist-info"
    files = {f"{name}.py": "VALUE = 7\n", f"{about}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: 1\n"}
    files[f"{about}/WHEEL"] = "Wheel-Version: 1.0\nGenerator: t\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    files[f"{about}/RECORD"] = "".join(f"{path},,\n" for path in (*files, f"{about}/RECORD"))
    with zipfile.ZipFile(folder / f"{name}-1-py3-none-any.whl", "w") as archive:
        for path, data in files.items():
            archive.writestr(path, data)


def test_wheels_go_to_a_folder_of_their_own(tmp_path):
    wheels, site = tmp_path / "wheels", tmp_path / "site"
    wheels.mkdir()
    with pytest.raises(SystemExit, match="No wheels in"):
        driver.install(wheels, site)
    wheel(wheels, "carried")
    driver.install(wheels, site)
    code = "import carried; assert carried.VALUE == 7"
    assert subprocess.run([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": str(site)}).returncode == 0
    (wheels / "broken-1-py3-none-any.whl").write_bytes(b"")
    with pytest.raises(SystemExit, match="pip could not install"):
        driver.install(wheels, site)


def test_results_are_written_as_they_come(tmp_path):
    settings = Settings("part", tmp_path, "cpu", rehearsal=True)
    results = Results(settings)
    with results.entry("one") as found:
        found["value"] = 1
    with results.entry("two") as found:
        raise ValueError("no such thing")
    text = (tmp_path / "part.json").read_text()
    assert '"complete": false' in text
    assert "ValueError: no such thing" in text
    assert results.finish() == 1
    assert [entry["name"] for entry in results.data["entries"]] == ["one", "two"]
    assert results.data["failed"] == 1
