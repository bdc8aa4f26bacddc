"""Numbers recorded with the authors' code."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from tests.parity.shrink_recordings import read


def recording(name: str) -> tuple[dict[str, torch.Tensor], dict[str, Any], dict[str, torch.Tensor]]:
    """Returns the tensors of a recording, what it says about itself, and the weights of its network."""
    tensors, meta = read(Path(__file__).parent / "data" / f"{name}.safetensors")
    return tensors, meta, under("weights/", tensors)


def under(prefix: str, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def error(a: torch.Tensor, b: torch.Tensor) -> float:
    """Largest difference, relative to the largest number."""
    assert a.shape == b.shape
    return ((a.double() - b.double()).abs().max() / b.double().abs().max()).item()
