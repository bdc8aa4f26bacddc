"""Folders of pictures for distances to data."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from sodaprof.errors import FormatError
from sodaprof.measure import metrics
from sodaprof.measure.data import pictures_in


@pytest.fixture(autouse=True)
def _three_are_enough(monkeypatch):
    monkeypatch.setattr(metrics, "LEAST_FOR_DISTANCE", 3)


@pytest.fixture
def folder(tmp_path):
    for number in range(3):
        Image.new("RGB", (9, 8), (51 * number, 0, 255)).save(tmp_path / f"{number}.png")
    return tmp_path


def test_pictures_are_read_by_name_as_floats(folder):
    (folder / "about.txt").write_text("no picture")
    Image.new("L", (9, 8), 255).save(folder / "3.jpg")  # grey
    found = pictures_in(folder)
    assert (found.shape, found.dtype) == ((4, 8, 9, 3), np.float32)
    np.testing.assert_allclose(found[:3, 0, 0], [[0, 0, 1], [0.2, 0, 1], [0.4, 0, 1]], atol=1e-6)
    np.testing.assert_allclose(found[3], 1)


def test_folders_that_cannot_be_used_are_refused(folder, tmp_path):
    with pytest.raises(FormatError, match=r"0 pictures; distances need at least 3. Give a folder with more"):
        pictures_in(tmp_path / "nowhere")
    Image.new("RGB", (8, 9)).save(folder / "z.png")
    with pytest.raises(FormatError, match=r"z\.png: \(9, 8\) pixels, others are \(8, 9\)\. Give one size"):
        pictures_in(folder)
    (folder / "z.png").write_bytes(b"half a picture")
    with pytest.raises(FormatError, match=r"z\.png: not readable as a picture"):
        pictures_in(folder)
