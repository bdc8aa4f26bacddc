"""Videos as files: an mp4 of H.264, or one PNG a frame."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from ..errors import SodaprofError
from ..files import replacing


def to_bytes(frames: np.ndarray) -> np.ndarray:
    """Returns frames in [0, 1] as uint8, rounded as Open-Sora's script does: halves up."""
    return np.floor(np.clip(frames * 255 + 0.5, 0, 255)).astype(np.uint8)


def save_video(frames: np.ndarray, path: Path, fps: float = 24, *, force: bool = False) -> None:
    """Writes frames [F, H, W, 3] in [0, 1] as an mp4 (H.264, 4:2:0, constant quality), atomically.

    Raises SodaprofError where imageio-ffmpeg is missing, and for odd sizes, which the format does not hold.
    """
    _check(frames)
    if path.suffix != ".mp4":
        raise SodaprofError(f"{path}: videos are written as .mp4. Type: {path.with_suffix('.mp4')}")
    if frames.shape[1] % 2 or frames.shape[2] % 2:
        raise SodaprofError(
            f"{path}: frames of {frames.shape[1]} × {frames.shape[2]} pixels; an mp4 holds even sizes. Save PNG frames."
        )
    write_frames = _writer()
    height, width = frames.shape[1:3]
    with replacing(path, force=force) as temporary:
        stream = write_frames(
            str(temporary), (width, height), fps=fps, codec="libx264", quality=None, macro_block_size=2,
            output_params=["-crf", "18"],  # hardly any loss: schedules are compared by eye
        )  # fmt: skip
        stream.send(None)
        try:
            for frame in to_bytes(frames):
                stream.send(np.ascontiguousarray(frame))
        finally:
            stream.close()


def _check(frames: np.ndarray) -> None:
    if frames.ndim != 4 or frames.shape[-1] != 3 or not len(frames):
        raise SodaprofError(f"A video has frames [F, H, W, 3] in [0, 1]; found the shape {list(frames.shape)}.")


def _writer() -> Any:
    try:
        import imageio_ffmpeg  # type: ignore[import-untyped]
    except ImportError:
        raise SodaprofError(
            "Videos are written with imageio-ffmpeg, which is not installed. Type: pip install imageio-ffmpeg"
        ) from None
    return imageio_ffmpeg.write_frames
