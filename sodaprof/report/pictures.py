"""Contact sheets: pictures side by side under their names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from ..errors import SodaprofError
from ..formats.files import replacing

MARGIN = 6


def check_picture(path: Path) -> None:
    """Raises SodaprofError unless the suffix is one of a format that pictures are written in."""
    from PIL import Image

    if Image.registered_extensions().get(path.suffix.lower()) not in Image.SAVE:
        raise SodaprofError(f"{path}: pictures are written as .png, .jpg or .webp. Type: {path.with_suffix('.png')}")


def save_picture(picture: np.ndarray, path: Path, *, force: bool = False) -> None:
    """Writes one picture [H, W, 3] in [0, 1] atomically; the format follows the suffix."""
    with replacing(path, force=force) as temporary:
        _image(picture).save(temporary)


def strip(clip: np.ndarray, frames: int = 5) -> np.ndarray:
    """Returns some frames of a clip [F, H, W, 3], from first to last, side by side as one picture."""
    shown = np.linspace(0, len(clip) - 1, min(frames, len(clip))).round().astype(int)
    return np.concatenate(list(clip[shown]), axis=1)


def save_side_by_side(columns: dict[str, np.ndarray], path: Path, *, force: bool = False, least: int = 96) -> None:
    """Writes a sheet with one named column an entry, pictures [n, H, W, 3] in [0, 1], small ones enlarged.

    Of clips [n, F, H, W, 3] some frames beside each other.
    """
    from PIL import Image, ImageDraw, ImageFont

    columns = {name: np.stack([strip(c) for c in p]) if p.ndim == 5 else p for name, p in columns.items()}
    font = ImageFont.load_default(size=13)
    rows = min(len(p) for p in columns.values())
    height, width = next(iter(columns.values())).shape[1:3]
    scale = max(1, -(-least // width))
    cell_w, cell_h = width * scale, height * scale
    names = [_fold(name, cell_w // 7) for name in columns]
    head = 16 * max(len(lines) for lines in names) + 4
    sheet = Image.new(
        "RGB", (len(columns) * (cell_w + MARGIN) + MARGIN, head + rows * (cell_h + MARGIN) + MARGIN), "white"
    )
    draw = ImageDraw.Draw(sheet)
    for x, (lines, pictures) in enumerate(zip(names, columns.values(), strict=True)):
        left = MARGIN + x * (cell_w + MARGIN)
        for i, line in enumerate(lines):
            draw.text((left, 2 + 16 * i), line, fill="black", font=font)
        for y in range(rows):
            tile = _image(pictures[y]).resize((cell_w, cell_h), Image.Resampling.NEAREST)
            sheet.paste(tile, (left, head + y * (cell_h + MARGIN)))
    with replacing(path, force=force) as temporary:
        sheet.save(temporary)


def _image(picture: np.ndarray) -> "Image.Image":  # type: ignore[name-defined]  # noqa: F821, UP037
    from PIL import Image

    return Image.fromarray((picture * 255).round().clip(0, 255).astype(np.uint8))


def _fold(name: str, width: int) -> list[str]:
    lines: list[str] = [""]
    for word in name.split():
        if lines[-1] and len(lines[-1]) + 1 + len(word) > width:
            lines.append(word)
        else:
            lines[-1] = f"{lines[-1]} {word}".strip()
    return lines


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
