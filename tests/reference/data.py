"""Pictures that samples are judged by: what a reference model was trained on, drawn anew, or a folder of files."""

from __future__ import annotations

import numpy as np
import torch

from sodaprof.errors import FormatError, SodaprofError
from sodaprof.pipelines.entries import read_prompts
from tests.reference import drawings, scenes


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
