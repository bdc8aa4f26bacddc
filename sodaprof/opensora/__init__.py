"""Open-Sora v1.2 as diffusers parts. Saved pipelines name this package, and no module in it, in their model_index.json."""

from __future__ import annotations

import importlib
from typing import Any

_MODULES = {  # class -> the module that defines it; imported on first use: the scheduler alone needs no text encoder
    "AutoencoderKLOpenSora": ".autoencoder",
    "OpenSoraPipeline": ".pipeline",
    "RectifiedFlowScheduler": ".scheduler",
    "STDiT3": ".network",
    "ModelMixin": "diffusers",  # diffusers looks for these two in this package, to know how its classes are loaded
    "SchedulerMixin": "diffusers",
}


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return getattr(importlib.import_module(_MODULES[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
