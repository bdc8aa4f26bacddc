"""sodaprof: measures once what every step, layer and module of a diffusion transformer suffers when its result is reused,
and compiles that into a schedule for the speed-up you ask for.

    import sodaprof
    from diffusers import DiTPipeline

    pipe = DiTPipeline.from_pretrained("facebook/DiT-XL-2-256")
    sodaprof.profile(pipe, "profile", steps=50)
    schedule = sodaprof.compile_schedule("profile", budget="2.0x")
    with sodaprof.apply(pipe, schedule):
        image = pipe(class_labels=[207], num_inference_steps=50).images[0]
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from .version import __version__

if TYPE_CHECKING:
    from .compiler import compile_schedule
    from .errors import (
        BudgetError,
        FormatError,
        IllegalScheduleError,
        MismatchError,
        SodaprofError,
        UnsupportedModelError,
    )
    from .evaluation import evaluate
    from .models.load import load_pipeline
    from .profiler.run import profile
    from .profiles import Profile, load_profile
    from .runtime.attach import Handle, Report, apply
    from .runtime.scheduler import scheduler
    from .schedule import Schedule, load_schedule

_HOME = {  # public name -> the module that defines it; imported on first use, so that `import sodaprof` is quick
    "BudgetError": "errors",
    "FormatError": "errors",
    "Handle": "runtime.attach",
    "IllegalScheduleError": "errors",
    "MismatchError": "errors",
    "Profile": "profiles",
    "Report": "runtime.attach",
    "Schedule": "schedule",
    "SodaprofError": "errors",
    "UnsupportedModelError": "errors",
    "apply": "runtime.attach",
    "compile_schedule": "compiler",
    "evaluate": "evaluation",
    "load_pipeline": "models.load",
    "load_profile": "profiles",
    "load_schedule": "schedule",
    "profile": "profiler.run",
    "scheduler": "runtime.scheduler",
}

__all__ = [
    "BudgetError",
    "FormatError",
    "Handle",
    "IllegalScheduleError",
    "MismatchError",
    "Profile",
    "Report",
    "Schedule",
    "SodaprofError",
    "UnsupportedModelError",
    "__version__",
    "apply",
    "compile_schedule",
    "evaluate",
    "load_pipeline",
    "load_profile",
    "load_schedule",
    "profile",
    "scheduler",
]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
