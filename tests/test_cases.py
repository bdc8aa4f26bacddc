"""The reported scripts of tests/cases, each of which exits with 1 while its fault exists."""

import os
import runpy
from pathlib import Path

import pytest

CASES = Path(__file__).parent / "cases"


@pytest.mark.parametrize("script", sorted(CASES.glob("*.py")), ids=lambda path: path.stem)
def test_a_reported_fault_is_gone(script, monkeypatch, capsys):
    monkeypatch.syspath_prepend(CASES.parents[1])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(os.fspath(script), run_name="__main__")
    assert not ended.value.code, capsys.readouterr().out
