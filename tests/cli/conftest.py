"""One profile of the tiny pipeline and a schedule of it for all tests of the command line; copy them before you change them."""

from __future__ import annotations

import pytest

import sodaprof
from tests.conftest import invoke

STEPS, SAMPLES, INTERVAL = 8, 6, 4


@pytest.fixture(scope="session")
def profiled(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli") / "profile"
    settings = ("--steps", STEPS, "--samples", SAMPLES, "--max-interval", INTERVAL)
    with pytest.MonkeyPatch.context() as patch:
        assert invoke(patch, "profile", model, "-o", folder, *settings) == 0
    return folder


@pytest.fixture(scope="session")
def schedule(profiled):
    path = profiled.parent / "s.json"
    sodaprof.compile_schedule(profiled, 2.5).save(path)
    return path


@pytest.fixture
def target(tmp_path):
    """A path in an empty folder."""
    (tmp_path / "out").mkdir()
    return tmp_path / "out" / "new.json"


@pytest.fixture
def done(command):
    """Returns a function that runs a command which must succeed -> what it printed."""

    def run(*arguments):
        code, out, err = command(*arguments)
        assert code == 0, err
        return out

    return run
