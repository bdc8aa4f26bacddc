"""Pictures that samples are judged by: what a reference model was trained on, drawn anew, or a folder of files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from ..errors import FormatError, SodaprofError
from . import drawings, scenes
from .load import read_prompts

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")


def training_pictures(model: str, count: int, seed: int) -> np.ndarray:
    """Returns pictures [count, H, W, 3] in [0, 1] as a reference model was trained on, of its calibration entries in turn.

    seed: of the drawing, from a million on none that a training drew from. SodaprofError for a model whose data cannot be drawn.
    """
    drawer = torch.Generator().manual_seed(seed)
    if model == "tiny-dit":
        drawn = drawings.draw(torch.arange(count) % len(drawings.CLASSES), drawer)
    elif model == "tiny-pixart":  # its prompts are captions of these scenes
        generator = torch.Generator().manual_seed(100)
        asked = scenes.sample(100, generator)
        captions = [scenes.caption(asked, row, generator).text for row in range(len(asked))]
        if captions != read_prompts(model):
            raise FormatError(f"calibration_prompts/{model}.txt: the captions are not those of the scenes of seed 100.")
        drawn = scenes.draw(asked[torch.arange(count) % len(asked)], drawer)
    else:
        raise SodaprofError(f"No data is known for {model}. Give pictures of it: --data FOLDER")
    pictures: np.ndarray = drawn.permute(0, 2, 3, 1).numpy()
    return (pictures + 1) / 2


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
