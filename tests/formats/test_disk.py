"""What else may be at a path: pipes, devices, links, files and folders of others, the leftovers of killed runs."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from sodaprof.errors import FormatError
from sodaprof.formats.disk import lock, locked
from sodaprof.formats.files import MAX_BYTES, read_json, replacing, write_text


@pytest.mark.parametrize("kind", ["pipe", "device", "folder", "large"])
def test_only_regular_files_of_bounded_size_are_read(tmp_path, kind):
    path = tmp_path / "a.json"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "folder":
        path.mkdir()
    else:
        path.write_bytes(b"")
        os.truncate(path, MAX_BYTES + 1)
    with pytest.raises(FormatError, match=r"a\.json: not readable as JSON \((not a regular|.*limit|.*directory)"):
        read_json(path)


def test_many_small_objects_are_refused_before_they_are_made(tmp_path):
    (tmp_path / "a.json").write_text("[" + "{}," * 500_000 + "{}]")
    with pytest.raises(FormatError, match="more than 400,000 objects"):
        read_json(tmp_path / "a.json")


def test_umask_and_the_mode_of_an_older_file_are_kept(tmp_path):
    before = os.umask(0o027)
    try:
        write_text(tmp_path / "new", "x")
        assert stat.S_IMODE((tmp_path / "new").stat().st_mode) == 0o640
        (tmp_path / "new").chmod(0o604)
        write_text(tmp_path / "new", "y", force=True)
        assert stat.S_IMODE((tmp_path / "new").stat().st_mode) == 0o604
    finally:
        os.umask(before)


def test_a_link_that_leads_nowhere_is_replaced_with_force_alone(tmp_path):
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "nowhere")
    with pytest.raises(FormatError, match="exists already"):
        write_text(link, "x")
    assert link.is_symlink()
    write_text(link, "x", force=True)
    assert link.read_text() == "x"
    assert not (tmp_path / "nowhere").exists()


@pytest.mark.parametrize("links", [True, False])
def test_a_file_that_appears_while_another_is_written_stays(tmp_path, monkeypatch, links):
    def no_links(*paths: object) -> None:
        raise OSError(95, "Operation not supported")

    if not links:
        monkeypatch.setattr(os, "link", no_links)
        write_text(tmp_path / "first", "x")
        assert (tmp_path / "first").read_text() == "x"
    path = tmp_path / "a.json"

    def write() -> None:
        with replacing(path) as temporary:
            temporary.write_text("ours")
            path.write_text("another's")

    with pytest.raises(FormatError, match="appeared while it was written"):
        write()
    assert path.read_text() == "another's"
    assert not list(tmp_path.glob(".*"))


def test_temporary_files_of_killed_runs_go_and_those_of_running_ones_stay(tmp_path):
    dead, alive = tmp_path / ".a.json.00000000.tmp", tmp_path / ".a.json.11111111.tmp"
    others = [tmp_path / ".a.json.notes", tmp_path / ".b.json.00000000.tmp"]
    for path in (dead, alive, *others):
        path.write_text("x")
    with alive.open() as file:
        assert lock(file.fileno())
        write_text(tmp_path / "a.json", "x")
    assert not dead.exists()
    assert all(path.exists() for path in (alive, *others))


@pytest.mark.parametrize("folder", [True, False])
def test_a_place_has_one_run_at_a_time(tmp_path: Path, folder):
    path = tmp_path / "x"
    with locked(path, folder=folder):
        with pytest.raises(FormatError, match="another run of sodaprof"), locked(path, folder=folder):
            raise AssertionError("not reached")
        assert path.exists()
    assert not path.exists()
    path.mkdir() if folder else path.write_text("")  # what a killed run leaves
    with locked(path, folder=folder):
        pass
    assert not path.exists()
