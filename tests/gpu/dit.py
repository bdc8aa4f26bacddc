"""Part 2: the denoising loop of DiT-XL/2 at 256 pixels, bf16, one generation with both guidance branches, 50 steps."""

from __future__ import annotations

import gc
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from msgspec.structs import replace
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

import sodaprof
from sodaprof.compiler.problem import draw_schedule, draw_steps
from sodaprof.formats.sampler import rounded
from sodaprof.formats.schedule import Plan, Schedule, Update
from sodaprof.formats.sites import Model, Sampler
from sodaprof.pipelines.discover import inspect_pipeline
from sodaprof.pipelines.patch import patched
from sodaprof.pipelines.sampler_steps import own_update
from sodaprof.runtime.compiled.engine import Compiled
from tests.gpu.common import Loop, Results, Settings, alone, captures_of, check_run, graphs_of, memory, settings_of
from tests.gpu.networks import dit

SCALE, ROUNDS, WARM_UP = 4.0, 5, 4  # runs: the first traces, the second probes, the third captures, the fourth replays
COMPILE_S = 100  # a compilation that takes longer is given up
MODE = "max-autotune-no-cudagraphs"


def spread(count: int, steps: int) -> list[int]:
    """Returns `count` steps, evenly spread, the first among them."""
    return sorted({i * steps // count for i in range(count)})


def solver_schedule(pipe: Any, model: Model, sampler: Sampler, called: list[int]) -> Schedule:
    """Returns a schedule that calls the network at these steps, under the sampler's own update: times need no fitted one."""
    pipe.scheduler.set_timesteps(sampler.steps)
    own = own_update(pipe.scheduler, sampler.timesteps)
    update = Update(own.basis, own.history, rounded(own.coefficients), {"guidance_scale": SCALE, "loop": "open"})
    anchors = dict.fromkeys(model.transformers, called)
    return replace(draw_steps(model, sampler, anchors, "-"), update=update)


def all_different(model: Model, sampler: Sampler) -> Schedule:
    """Returns a schedule in which no two steps do the same, as far as there are sites: as many graphs as steps."""
    plans = {}
    for name, transformer in model.transformers.items():
        count = len(transformer.sites)
        rows = {
            site.key: "".join("C" if t == 0 or t % count == i else "R" for t in range(sampler.steps))
            for i, site in enumerate(transformer.sites)
        }
        plans[name] = Plan(transformer.class_name, transformer.fingerprint, rows, "." * sampler.steps)
    return Schedule(plans, sampler, model.shape, {})


def contender(
    settings: Settings, loop: Loop, schedule: Schedule, found: dict[str, Any], whole: bool = False, rounds: int = ROUNDS,
    tables: bool | str = "near",
) -> None:  # fmt: skip
    """Fills an entry with the times of a schedule, its graphs one by one, and what capturing took."""
    found["allocated_before_mib"] = memory(settings).get("allocated_mib")
    found["steps"] = schedule.steps
    runtime = Compiled(tables=tables, graphs=settings.recorder(), whole_steps=whole)
    with sodaprof.apply(loop.pipe, schedule, runtime=runtime) as handle:
        found |= loop.time(WARM_UP, rounds) | captures_of(handle)
        found["graphs"] = graphs_of(settings, handle)[:8]
    check_run(handle, schedule)
    free()


def free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


class Replayed:
    """A transformer's forward in a CUDA graph captured by hand, for calls of one kind; on a CPU, the forward itself."""

    def __init__(self, settings: Settings, forward: Callable[..., Any]) -> None:
        self.settings, self.forward = settings, forward
        self.graph: Any = None
        self.places: list[Any] = []
        self.out: Any = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not self.settings.cuda:
            return self.forward(*args, **kwargs)
        leaves, spec = tree_flatten((args, kwargs))
        if self.graph is None:
            self.places = [leaf.clone() if torch.is_tensor(leaf) else leaf for leaf in leaves]
            given, named = tree_unflatten(self.places, spec)
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(3):
                    self.forward(*given, **named)
            torch.cuda.current_stream().wait_stream(side)
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                self.out = self.forward(*given, **named)
        for place, leaf in zip(self.places, leaves, strict=True):
            if torch.is_tensor(leaf):
                place.copy_(leaf)
        self.graph.replay()
        return tree_map(lambda x: x.clone() if torch.is_tensor(x) else x, self.out)


def forward_of(module: Any, forward: Callable[..., Any]) -> AbstractContextManager[None]:
    """Puts another forward on a module while the block runs."""
    return patched(module, "forward", lambda own, *args, **kwargs: forward(*args, **kwargs))


@contextmanager
def given_up_after(seconds: int) -> Iterator[None]:
    """Raises TimeoutError in the block once it took so long."""

    def expired(*_: Any) -> None:
        raise TimeoutError(f"given up after {seconds} s")

    before = signal.signal(signal.SIGALRM, expired)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def by_hand(settings: Settings, loop: Loop, forward: Callable[..., Any], found: dict[str, Any]) -> None:
    """Fills an entry with the loop under a graph captured by hand, and with the graph alone."""
    replayed = Replayed(settings, forward)
    with torch.no_grad(), forward_of(loop.pipe.transformer, replayed):
        found |= loop.time(2, ROUNDS)
    if replayed.graph is not None:
        found |= alone(settings, replayed.graph.replay, "step_us")


def compiled(settings: Settings, loop: Loop, found: dict[str, Any]) -> None:
    """Fills an entry with the loop under torch.compile without its own graphs, in a graph captured by hand."""
    forward, began = loop.pipe.transformer.forward, time.perf_counter()
    options = {"backend": "eager"} if settings.rehearsal else {"mode": MODE}
    fast = torch.compile(forward, **options)
    with given_up_after(COMPILE_S), forward_of(loop.pipe.transformer, fast):
        loop.run()
    found["mode"], found["compile_s"] = str(options), round(time.perf_counter() - began, 2)
    by_hand(settings, loop, fast, found)


def main() -> int:
    settings = settings_of("dit")
    results, steps = Results(settings), 4 if settings.rehearsal else 50
    with results.entry("network") as found:
        pipe = dit(settings)
        loop = Loop(settings, pipe, steps, SCALE)
        model, sampler, _ = inspect_pipeline(pipe, "", steps, SCALE, 0)
        found |= {"parameters": sum(p.numel() for p in pipe.transformer.parameters())} | memory(settings)
    with results.entry("plain") as found:
        found |= loop.time(2, ROUNDS)
    few, fewer = (2, 2) if settings.rehearsal else (18, 14)
    full = draw_schedule(model, sampler, list(range(steps)), {})
    some = draw_schedule(model, sampler, spread(few, steps), {})
    jumps = solver_schedule(pipe, model, sampler, spread(fewer, steps))
    contenders = [
        (f"reuse, {few} of {steps}", some, False),
        (f"solver, {fewer} of {steps}, whole steps", jumps, True),
        ("all computed", full, False),
        (f"reuse, {few} of {steps}, whole steps", some, True),
        ("all computed, whole steps", full, True),
        (f"solver, {fewer} of {steps}", jumps, False),
    ]
    for name, schedule, whole in contenders[: 2 if settings.rehearsal else None]:
        with results.entry(name) as found:
            contender(settings, loop, schedule, found, whole)
    if not settings.rehearsal:
        with results.entry(f"reuse, {few} of {steps}, whole steps, tables with the same bits") as found:
            contender(settings, loop, some, found, True, tables=True)
    with results.entry("a pattern a step") as found:
        contender(settings, loop, all_different(model, sampler), found, rounds=2)
    with results.entry("plain, in a graph by hand") as found:
        by_hand(settings, loop, pipe.transformer.forward, found)
    with results.entry("plain, again") as found:
        found |= loop.time(1, ROUNDS)
    with results.entry("torch.compile, in a graph by hand") as found:
        compiled(settings, loop, found)
    return results.finish()


if __name__ == "__main__":
    sys.exit(main())
