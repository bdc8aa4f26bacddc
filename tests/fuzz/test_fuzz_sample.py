"""A sample of `make fuzz`: a few files of every kind."""

from __future__ import annotations

import pytest

from tests.fuzz.check import faults
from tests.fuzz.readers import READERS

SLOW = {"search", "request.json", "state.npz", "sidecar"}  # those that run a pipeline


@pytest.mark.parametrize("name", READERS)
def test_legal_files_are_read_and_changed_ones_refused(tmp_path, name):
    assert not faults(READERS[name](tmp_path), 3 if name in SLOW else 10, seed=0)
