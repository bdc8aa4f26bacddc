"""Profiles into one place at once, over what appears meanwhile, and from damaged states: nothing is lost, nothing is wrong."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest

from sodaprof.errors import FormatError
from sodaprof.profiler.plan import plan_profile
from sodaprof.profiler.run import run_profile
from tests.tiny_pipelines import tiny_pipe

SETTINGS = {"steps": 3, "samples": 4, "batch_size": 2, "max_interval": 3}


@pytest.fixture(scope="module")
def pipe():
    return tiny_pipe(1)


def run(pipe, folder, after=None, **options):
    """Profiles; `after` is called once between the batches."""
    calls = iter([after] if after else [])

    def on_progress(done, total):
        if done > 6 and (call := next(calls, None)):
            call()

    return run_profile(pipe, plan_profile(pipe, "tiny", **SETTINGS), folder, on_progress=on_progress, **options)


@pytest.fixture(scope="module")
def interrupted(pipe, tmp_path_factory):
    """A working folder after one batch of two, and the digest of the whole profile."""
    folder = tmp_path_factory.mktemp("interrupted")
    with pytest.raises(KeyboardInterrupt):
        run(pipe, folder / "p", lambda: (_ for _ in ()).throw(KeyboardInterrupt))
    return folder / "p.partial", run(pipe, folder / "whole").digest()


def test_a_folder_that_appears_stays_and_the_same_command_ends_the_profile(pipe, tmp_path, interrupted):
    folder = tmp_path / "p"

    def appear():
        folder.mkdir()
        (folder / "notes.txt").write_text("kept")

    with pytest.raises(FormatError, match="appeared or changed while"):
        run(pipe, folder, appear)
    assert (folder / "notes.txt").read_text() == "kept"
    shutil.move(folder, tmp_path / "away")
    assert run(pipe, folder).digest() == interrupted[1]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["away", "p"]


def test_an_older_profile_is_replaced_unless_another_has_taken_its_place(pipe, tmp_path):
    folder = tmp_path / "p"
    run(pipe, folder)
    run(pipe, folder, force=True)

    def exchange():
        folder.rename(tmp_path / "old")
        shutil.copytree(tmp_path / "old", folder)

    with pytest.raises(FormatError, match="appeared or changed while"):
        run(pipe, folder, exchange, force=True)
    assert (folder / "manifest.json").exists()
    run(pipe, folder, force=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["old", "p"]


def test_of_two_runs_the_second_is_refused_and_leaves_nothing(pipe, tmp_path):
    def second():
        with pytest.raises(FormatError, match=r"p\.partial: another run of sodaprof is writing there"):
            run(tiny_pipe(1), tmp_path / "p")

    run(pipe, tmp_path / "p", second)
    assert [path.name for path in tmp_path.iterdir()] == ["p"]


def test_files_of_others_in_the_working_folder_are_kept(pipe, tmp_path):
    (tmp_path / "p.partial").mkdir()
    (tmp_path / "p.partial" / "notes.txt").write_text("kept")
    with pytest.raises(FormatError, match=r"holds notes\.txt"):
        run(pipe, tmp_path / "p", force=True)
    assert (tmp_path / "p.partial" / "notes.txt").read_text() == "kept"


@pytest.mark.parametrize("change", ["groups", "batch_size", "cut", "array", "flip", "pickle", "encrypted", "lzma"])
def test_a_damaged_state_is_refused_and_its_advice_works(pipe, tmp_path, interrupted, change):
    work, wanted = tmp_path / "p.partial", interrupted[1]
    shutil.copytree(interrupted[0], work)
    request, state = work / "request.json", work / "state.npz"
    content = state.read_bytes()
    if change in ("groups", "batch_size"):
        changed = {"groups": [[0], [1]], "batch_size": 1}[change]
        request.write_text(json.dumps(json.loads(request.read_text()) | {change: changed}))
    elif change == "array":
        with np.load(state) as saved:
            np.savez(state, **dict(saved) | {"batches": np.array(2)})
    else:
        middle = len(content) // 2
        flipped = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
        entry = content.index(b"PK\1\2")  # of the archive's first file: flags at 8, method of compression at 10
        encrypted = content[: entry + 8] + b"\1" + content[entry + 9 :]
        lzma = content[: entry + 10] + b"\x0e" + content[entry + 11 :]
        changed = {"cut": content[:middle], "flip": flipped, "pickle": b"abc", "encrypted": encrypted, "lzma": lzma}
        state.write_bytes(changed[change])
    with pytest.raises(FormatError, match="damaged") as caught:
        run(pipe, tmp_path / "p")
    if "Delete the file" in str(caught.value):
        state.unlink()
        assert run(pipe, tmp_path / "p").digest() == wanted
    else:
        assert run(pipe, tmp_path / "p", force=True).digest() == wanted


@pytest.mark.parametrize("place", ["p.partial", ".p.replaced"])
def test_what_others_put_in_our_places_is_kept(pipe, tmp_path, place):
    (tmp_path / place).mkdir()
    (tmp_path / place / "thesis.txt").write_text("x")
    with pytest.raises(FormatError, match=r"holds thesis\.txt"):
        run(pipe, tmp_path / "p", force=True)
    assert (tmp_path / place / "thesis.txt").read_text() == "x"
    assert not (tmp_path / "p").exists()
