"""Counts what a network call launches: kernels on a GPU, operators elsewhere; names device and versions."""

from __future__ import annotations

import platform
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ..version import __version__


class Operators(TorchDispatchMode):
    """Counts operators that compute: no views, no empty tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += not (func.is_view or "empty" in func.__name__)
        return func(*args, **(kwargs or {}))


def launches_of(run: Callable[[Callable[[], None]], None], cuda: bool) -> list[int]:
    """Returns the launches of each network call of `run(mark)`, which calls mark() before and after each."""
    marks: list[int] = []
    if not cuda:
        with Operators() as operators:
            run(lambda: marks.append(operators.count))
    else:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
            run(lambda: torch.cuda._sleep(1))  # a kernel that nothing else launches
            torch.cuda.synchronize()
        kernels = [e for e in profiler.events() or [] if "CUDA" in str(e.device_type)]
        kernels.sort(key=lambda e: e.time_range.start)
        marks = [i for i, e in enumerate(kernels) if "spin_kernel" in e.name]
        marks = [mark + 1 - i % 2 for i, mark in enumerate(marks)]
    return [after - before for before, after in zip(marks[::2], marks[1::2], strict=True)]


def device_facts(device: str) -> dict[str, str]:
    """Returns the device's name, for a GPU also the versions of driver and CUDA."""
    if "cuda" not in device:
        return {"name": _processor()}
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        driver = subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        driver = "unknown"
    return {"name": torch.cuda.get_device_name(), "driver": driver, "cuda": str(torch.version.cuda)}


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    named = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.processor() or platform.machine()


def versions() -> dict[str, str]:
    import diffusers

    found = {"sodaprof": __version__, "torch": torch.__version__, "diffusers": diffusers.__version__}
    return found | {"python": platform.python_version()}
