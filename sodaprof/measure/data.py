"""Pictures of the data that a model was trained on, from a folder: the other side of a distance to data."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ..errors import FormatError, SodaprofError
from . import metrics

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")


def check_enough(samples: int) -> None:
    """Raises SodaprofError if there are too few samples for a distance to data."""
    least = metrics.LEAST_FOR_DISTANCE
    if samples < least:
        raise SodaprofError(f"--samples is {samples}; distances to data need at least {least}. Type: --samples {least}")


def pictures_in(folder: Path) -> np.ndarray:
    """Returns the pictures of a folder, [n, H, W, 3] float32 in [0, 1], in the order of their names.

    Raises FormatError if there are too few for a distance, one cannot be read, or they are of several sizes.
    """
    from PIL import Image

    paths = sorted(p for p in folder.glob("*") if p.suffix.lower() in SUFFIXES)
    least = metrics.LEAST_FOR_DISTANCE
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
