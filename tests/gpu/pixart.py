"""Part 4: the denoising loop of PixArt-XL at 512 and 1024 pixels, bf16, one generation, 20 steps of DPM-Solver++."""

from __future__ import annotations

import sys

from sodaprof.compiler.problem import draw_schedule
from sodaprof.pipelines.discover import inspect_pipeline
from tests.gpu.common import Loop, Results, memory, settings_of
from tests.gpu.dit import contender, free, spread
from tests.gpu.networks import pixart

SCALE, ROUNDS = 4.5, 3


def main() -> int:
    settings = settings_of("pixart")
    results = Results(settings)
    steps, few = (4, 2) if settings.rehearsal else (20, 8)
    for name in ("pixart-xl-2-512",) if settings.rehearsal else ("pixart-xl-2-512", "pixart-xl-2-1024"):
        with results.entry(f"{name}: plain") as found:
            pipe = pixart(settings, name)
            loop = Loop(settings, pipe, steps, SCALE)
            model, sampler, _ = inspect_pipeline(pipe, "", steps, SCALE, loop.entries[0])
            found |= loop.time(2, ROUNDS) | memory(settings)
        contenders = [
            (f"reuse, {few} of {steps}", spread(few, steps), False),
            ("all computed", list(range(steps)), False),
            (f"reuse, {few} of {steps}, whole steps", spread(few, steps), True),
        ]
        for what, chosen, whole in contenders[: 1 if settings.rehearsal else None]:
            with results.entry(f"{name}: {what}") as found:
                contender(settings, loop, draw_schedule(model, sampler, chosen, {}), found, whole, ROUNDS)
        del pipe, loop
        free()
    return results.finish()


if __name__ == "__main__":
    sys.exit(main())
