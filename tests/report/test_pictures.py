"""Pictures and videos as files."""

from __future__ import annotations

import sys

import numpy as np
import pytest

from sodaprof.errors import FormatError, SodaprofError
from sodaprof.report.pictures import save_video, to_bytes


def moving(frames: int = 9, height: int = 32, width: int = 48) -> np.ndarray:
    """A soft edge that moves right, one channel each way."""
    x, t = np.arange(width) / width, np.arange(frames)[:, None] / frames
    ramp = np.clip((t - x) * 4 + 0.5, 0, 1)[:, None, :, None]
    return np.broadcast_to(np.concatenate([ramp, 1 - ramp, ramp * 0.5], -1), (frames, height, width, 3)).astype(
        "float32"
    )


def test_halves_are_rounded_up():
    halves = np.array([0.5, 1.5, 2.5, 254.5]) / 255
    assert to_bytes(np.concatenate([halves, [-0.3, 0.0, 1.0, 1.7]])).tolist() == [1, 2, 3, 255, 0, 0, 255, 255]
    every = np.arange(256) / 255
    assert to_bytes(every).tolist() == list(range(256))


def test_a_video_holds_its_frames(tmp_path):
    ffmpeg = pytest.importorskip("imageio_ffmpeg")
    path = tmp_path / "clip.mp4"
    save_video(moving(), path, fps=12)
    assert [p.name for p in tmp_path.iterdir()] == ["clip.mp4"]
    reader = ffmpeg.read_frames(str(path))
    about = next(reader)
    assert (about["codec"], about["fps"], about["size"]) == ("h264", 12, (48, 32))
    found = np.stack([np.frombuffer(frame, np.uint8).reshape(32, 48, 3) for frame in reader])
    assert found.shape == (9, 32, 48, 3)
    assert np.abs(found.astype(float) - to_bytes(moving())).mean() < 4  # of 255; colours are stored at half resolution
    with pytest.raises(FormatError, match="exists already"):
        save_video(moving(), path)


def test_a_clip_of_odd_size_is_scaled_up_by_a_pixel(tmp_path):
    ffmpeg = pytest.importorskip("imageio_ffmpeg")
    save_video(moving(width=47), tmp_path / "clip.mp4")
    assert next(ffmpeg.read_frames(str(tmp_path / "clip.mp4")))["size"] == (48, 32)


def test_a_missing_encoder_is_reported_with_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "imageio_ffmpeg", None)
    with pytest.raises(SodaprofError, match="pip install imageio-ffmpeg"):
        save_video(moving(), tmp_path / "clip.mp4")
