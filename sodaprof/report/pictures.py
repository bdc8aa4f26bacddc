"""Contact sheets: pictures side by side under their names."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ..errors import SodaprofError
from ..files import replacing

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
