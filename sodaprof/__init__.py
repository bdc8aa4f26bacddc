"""sodaprof: measures once the error that every step, layer and module of a diffusion transformer causes if its result is reused,
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
    from .formats.profile import Profile, load_profile
    from .formats.schedule import Schedule
    from .formats.schedule_file import load_schedule
    from .measure.evaluate import evaluate
    from .pipelines.load import load_pipeline
    from .profiler.run import profile
    from .runtime.apply import Handle, Report, apply, remove
    from .runtime.sampler.scheduler import scheduler

_HOME = {  # public name -> the module that defines it; imported on first use, so that `import sodaprof` is quick
    "BudgetError": "errors",
    "FormatError": "errors",
    "Handle": "runtime.apply",
    "IllegalScheduleError": "errors",
    "JumpScheduler": "runtime.sampler.scheduler",  # the class of `scheduler`, as saved pipelines name it
    "MismatchError": "errors",
    "Profile": "formats.profile",
    "Report": "runtime.apply",
    "Schedule": "formats.schedule",
    "SchedulerMixin": "runtime.sampler.scheduler",  # diffusers looks here for it, to know how JumpScheduler is loaded
    "SodaprofError": "errors",
    "UnsupportedModelError": "errors",
    "apply": "runtime.apply",
    "compile_schedule": "compiler",
    "evaluate": "measure.evaluate",
    "load_pipeline": "pipelines.load",
    "load_profile": "formats.profile",
    "load_schedule": "formats.schedule_file",
    "profile": "profiler.run",
    "remove": "runtime.apply",
    "scheduler": "runtime.sampler.scheduler",
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
    "remove",
    "scheduler",
]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
