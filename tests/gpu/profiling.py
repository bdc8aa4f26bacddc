"""Part 3: a profile of DiT-XL/2 beside plain sampling of the same generations: time, peak and extra memory."""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path

import torch

import sodaprof
from sodaprof.formats.files import read_json
from tests.gpu.common import Loop, Results, memory, settings_of
from tests.gpu.networks import dit

SCALE = 4.0


def main() -> int:
    settings = settings_of("profiling")
    results = Results(settings)
    samples, steps = (2, 4) if settings.rehearsal else (16, 50)
    with results.entry("network") as found:
        pipe = dit(settings)
        found |= memory(settings)
    with results.entry("plain") as found:
        loop = Loop(settings, pipe, steps, SCALE, batch=samples)
        loop.run()  # warms up
        if settings.cuda:
            torch.cuda.reset_peak_memory_stats()
        _, milliseconds = loop.run()
        plain = milliseconds / 1e3
        found |= {"samples": samples, "steps": steps, "seconds_of_sampling": round(plain, 3)} | memory(settings)
    with results.entry("profile") as found, tempfile.TemporaryDirectory() as folder:
        if settings.cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        began = time.perf_counter()
        options = {"max_interval": min(8, steps), "batch_size": samples}
        sodaprof.profile(pipe, Path(folder) / "profile", samples=samples, steps=steps, guidance_scale=SCALE, **options)
        settings.wait()
        took = time.perf_counter() - began
        found |= {"samples": samples, "steps": steps, "seconds_of_profiling": round(took, 2)} | memory(settings)
        found["time_over_plain"] = round(took / plain, 3)
        found["manifest"] = read_json(Path(folder) / "profile" / "manifest.json")["measured"]
    return results.finish()


if __name__ == "__main__":
    sys.exit(main())
