"""Picture files: one picture, several side by side under their names, clips as mp4."""

from __future__ import annotations

from pathlib import Path
from textwrap import wrap

import numpy as np

from ..errors import SodaprofError
from ..formats.files import replacing

MARGIN = 6


def check_picture(path: Path) -> None:
    """Raises SodaprofError unless Pillow can write pictures with this suffix."""
    from PIL import Image

    if Image.registered_extensions().get(path.suffix.lower()) not in Image.SAVE:
        raise SodaprofError(f"{path}: pictures are written as .png, .jpg or .webp. Type: {path.with_suffix('.png')}")


def save_picture(picture: np.ndarray, path: Path, *, force: bool = False) -> None:
    """Writes one picture [H, W, 3] in [0, 1] atomically, in the format of the suffix."""
    with replacing(path, force=force) as temporary:
        _image(picture).save(temporary)


def strip(clip: np.ndarray, frames: int = 5) -> np.ndarray:
    """Returns some frames of a clip [F, H, W, 3], from first to last, side by side as one picture."""
    shown = np.linspace(0, len(clip) - 1, min(frames, len(clip))).round().astype(int)
    return np.concatenate(list(clip[shown]), axis=1)


def save_side_by_side(columns: dict[str, np.ndarray], path: Path, *, force: bool = False, least: int = 96) -> None:
    """Writes a sheet with one named column per entry, pictures [n, H, W, 3] in [0, 1], enlarged to `least` pixels.

    Of clips [n, F, H, W, 3] some frames are drawn side by side.
    """
    from PIL import Image, ImageDraw, ImageFont

    columns = {name: np.stack([strip(c) for c in p]) if p.ndim == 5 else p for name, p in columns.items()}
    font = ImageFont.load_default(size=13)
    rows = min(len(p) for p in columns.values())
    height, width = next(iter(columns.values())).shape[1:3]
    scale = max(1, -(-least // width))
    cell_w, cell_h = width * scale, height * scale
    names = [wrap(name, cell_w // 7, break_long_words=False, break_on_hyphens=False) for name in columns]
    head = 16 * max(len(lines) for lines in names) + 4
    across, down = len(columns) * (cell_w + MARGIN), head + rows * (cell_h + MARGIN)
    sheet = Image.new("RGB", (across + MARGIN, down + MARGIN), "white")
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

    return Image.fromarray(to_bytes(picture))


def to_bytes(pictures: np.ndarray) -> np.ndarray:
    """Returns values in [0, 1] as uint8, halves rounded up, as Open-Sora's script does."""
    return np.floor(np.clip(pictures * 255 + 0.5, 0, 255)).astype(np.uint8)


def save_video(frames: np.ndarray, path: Path, fps: float = 24, *, force: bool = False) -> None:
    """Writes frames [F, H, W, 3] in [0, 1] as an mp4 (H.264, 4:2:0, constant quality), atomically.

    Odd sizes, which the format does not hold, are scaled up by a pixel. Raises SodaprofError if imageio-ffmpeg is missing.
    """
    try:
        import imageio.v2 as imageio
        import imageio_ffmpeg  # type: ignore[import-untyped]  # noqa: F401  # imageio writes mp4 with it
    except ImportError:
        raise SodaprofError(
            "Videos are written with imageio-ffmpeg, which is not installed. Type: pip install imageio-ffmpeg"
        ) from None
    with replacing(path, force=force) as temporary:
        imageio.mimwrite(
            temporary, list(to_bytes(frames)), format="FFMPEG", fps=fps, codec="libx264", quality=None, macro_block_size=2,
            output_params=["-crf", "18"],  # hardly any loss: schedules are compared by eye
        )  # fmt: skip
