"""Pictures that samples are judged by: what a reference model was trained on, drawn anew, or a folder of files."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ..errors import FormatError

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")


def pictures_in(folder: Path, least: int) -> np.ndarray:
    """Returns the pictures of a folder [n, H, W, 3] in [0, 1]; FormatError where there are under `least`, or of two sizes."""
    from PIL import Image

    paths = sorted(p for p in folder.glob("*") if p.suffix.lower() in SUFFIXES)
    if len(paths) < least:
        raise FormatError(f"{folder}: {len(paths)} pictures; distances need at least {least}. Give a folder with more.")
    found: list[np.ndarray] = []
    for path in paths:
        try:
            with Image.open(path) as picture:
                found.append(np.asarray(picture.convert("RGB"), dtype=np.float32) / 255)
        except OSError as error:
            raise FormatError(f"{path}: not readable as a picture ({error}). Replace or remove it.") from None
        if found[-1].shape != found[0].shape:
            raise FormatError(f"{path}: {found[-1].shape[:2]} pixels, others are {found[0].shape[:2]}. Give one size.")
    return np.stack(found)
