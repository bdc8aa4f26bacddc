"""The small classifier of a reference model: class accuracy and the feature space of distances between sets of pictures."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from ..errors import FormatError

FEATURES = 32  # width of the penultimate layer: the feature space of the Fréchet and kernel distances


class Classifier(nn.Module):
    """RGB [B, 3, H, W] in [-1, 1] -> logits [B, classes]; `features` gives the penultimate [B, 32].

    heads: how many of the classes, in order, belong to each question about a picture; by default all belong to one.
    grid: the maxima are taken over grid x grid parts of the picture; above 1 the features depend on places.
    """

    def __init__(
        self, classes: tuple[str, ...], width: int = 16, heads: tuple[int, ...] | None = None, grid: int = 1
    ) -> None:
        super().__init__()
        self.classes, self.width, self.grid = tuple(classes), width, grid
        self.heads = (len(self.classes),) if heads is None else tuple(heads)
        layers: list[nn.Module] = []
        widths = [3, width, 3 * width, 4 * width, 6 * width, 6 * width]
        for i, (before, after) in enumerate(itertools.pairwise(widths)):
            layers += [nn.Conv2d(before, after, 3, 1, 1, bias=False), nn.BatchNorm2d(after), nn.ReLU()]
            if i in (0, 2):
                layers.append(nn.MaxPool2d(2))
        self.body = nn.Sequential(*layers)
        self.embed = nn.Linear((grid * grid + 1) * 6 * width, FEATURES)
        self.head = nn.Linear(FEATURES, len(self.classes))

    def features(self, pictures: torch.Tensor) -> torch.Tensor:
        maps = self.body(pictures)
        maxima = nn.functional.adaptive_max_pool2d(maps, self.grid).flatten(1)
        return torch.relu(self.embed(torch.cat([maxima, maps.mean((2, 3))], dim=1)))

    def forward(self, pictures: torch.Tensor) -> torch.Tensor:
        return self.head(self.features(pictures))

    def predictions(self, pictures: torch.Tensor) -> torch.Tensor:
        """Returns the class found for each question, counted from 0 within its classes: [B, heads] int64."""
        with torch.no_grad():
            logits = self(pictures).split(self.heads, dim=1)
        return torch.stack([of_head.argmax(1) for of_head in logits], dim=1)

    def save(self, folder: Path, dtype: torch.dtype = torch.float32) -> None:
        """Writes config.json and model.safetensors, its weights in `dtype`, to `folder`."""
        folder.mkdir(parents=True, exist_ok=True)
        config = {"classes": self.classes, "width": self.width, "heads": self.heads, "grid": self.grid}
        (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")
        weights = {k: v.to(dtype) if v.is_floating_point() else v for k, v in self.state_dict().items()}
        save_file({k: v.contiguous() for k, v in weights.items()}, folder / "model.safetensors")


def load_classifier(folder: Path) -> Classifier | None:
    """Returns the classifier in `folder`/classifier, in eval mode, or None if the model has none."""
    folder = folder / "classifier"
    if not folder.is_dir():
        return None
    try:
        config = json.loads((folder / "config.json").read_text())
        model = Classifier(tuple(config["classes"]), config["width"], config.get("heads"), config.get("grid", 1))
        model.load_state_dict(load_file(folder / "model.safetensors"))
    except (OSError, KeyError, ValueError, RuntimeError) as error:
        raise FormatError(f"{folder}: not a classifier of sodaprof ({error}). Remove or rebuild the folder.") from None
    return model.eval()
