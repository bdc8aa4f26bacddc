"""The small classifier that ships with a reference model: its verdict and its features judge generated pictures."""

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
    """RGB [B, 3, H, W] in [-1, 1] -> logits [B, classes]; `features` gives the penultimate [B, 32]."""

    def __init__(self, classes: tuple[str, ...], width: int = 16) -> None:
        super().__init__()
        self.classes, self.width = tuple(classes), width
        layers: list[nn.Module] = []
        widths = [3, width, 3 * width, 4 * width, 6 * width, 6 * width]
        for i, (before, after) in enumerate(itertools.pairwise(widths)):
            layers += [nn.Conv2d(before, after, 3, 1, 1, bias=False), nn.BatchNorm2d(after), nn.ReLU()]
            if i in (0, 2):
                layers.append(nn.MaxPool2d(2))
        self.body = nn.Sequential(*layers)
        self.embed = nn.Linear(12 * width, FEATURES)
        self.head = nn.Linear(FEATURES, len(self.classes))

    def features(self, pictures: torch.Tensor) -> torch.Tensor:
        maps = self.body(pictures)
        return torch.relu(self.embed(torch.cat([maps.amax((2, 3)), maps.mean((2, 3))], dim=1)))

    def forward(self, pictures: torch.Tensor) -> torch.Tensor:
        return self.head(self.features(pictures))

    def save(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps({"classes": self.classes, "width": self.width}, indent=1) + "\n")
        save_file({k: v.contiguous() for k, v in self.state_dict().items()}, folder / "model.safetensors")


def load_classifier(folder: Path) -> Classifier | None:
    """Returns the classifier in `folder`/classifier, in eval mode, or None where the model ships none."""
    folder = folder / "classifier"
    if not folder.is_dir():
        return None
    try:
        config = json.loads((folder / "config.json").read_text())
        model = Classifier(tuple(config["classes"]), config["width"])
        model.load_state_dict(load_file(folder / "model.safetensors"))
    except (OSError, KeyError, ValueError, RuntimeError) as error:
        raise FormatError(f"{folder}: not a classifier of sodaprof ({error}). Remove or rebuild the folder.") from None
    return model.eval()
