"""`profile`: samples full trajectories once and writes how much every site suffers when its result is reused or pruned."""

from __future__ import annotations

import os
import platform
import shutil
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..cost import save_cost
from ..errors import FormatError, MismatchError, SodaprofError
from ..files import digest, read_json, refuse_existing, write_json
from ..models.clock import Clock, Moment, TransformerHook
from ..models.discover import inspect_pipeline, tapped
from ..models.flops import count_flops
from ..models.load import call, default_guidance, takes_labels
from ..profiles import FORMAT, TABLES, VERSION, Profile, load_profile
from ..sites import Model, Sampler, Site
from ..version import __version__
from .errors import Ring
from .statistics import Statistics

RATES = np.array([0.125, 0.25, 0.375, 0.5, 0.625, 0.75, 0.875, 0.9375])
MEMORY_SHARE = 0.6  # of what is free may go to the rings


@dataclass
class ProfilePlan:
    """What a profile will take: shown before it starts."""

    model: Model
    sampler: Sampler
    request: dict[str, Any]  # the manifest without what is only known at the end
    groups: list[list[int]]  # sites profiled together; one pass over the trajectories each
    ring_bytes: int  # of the largest group
    disk_bytes: int
    seconds: float  # estimated
    step: Any = field(repr=False)

    @property
    def sites(self) -> list[tuple[str, Site]]:
        return [(name, s) for name, t in self.model.transformers.items() for s in t.sites]


def plan_profile(
    pipe: Any,
    name: str,
    *,
    steps: int = 50,
    samples: int = 100,
    prompts: Sequence[int | str] | None = None,
    guidance_scale: float | None = None,
    max_interval: int = 8,
    batch_size: int = 16,
    seed: int = 0,
    memory_bytes: int | None = None,
) -> ProfilePlan:
    """Returns what `run_profile` will do and take. Raises SodaprofError for settings that make no sense."""
    for what, value, least in (("steps", steps, 2), ("samples", samples, 1), ("batch-size", batch_size, 1)):
        if value < least:
            raise SodaprofError(f"--{what} is {value}; expected at least {least}.")
    if not 2 <= max_interval <= min(steps, 100):
        raise SodaprofError(f"--max-interval is {max_interval}; expected 2 to {min(steps, 100)} (at most the steps).")
    if seed < 0:
        raise SodaprofError(f"--seed is {seed}; expected at least 0.")
    if prompts is None:
        if not takes_labels(pipe):
            raise SodaprofError("A text pipeline needs prompts. Type: --prompts calibration_prompts/text-to-image.txt")
        prompts = list(range(10))
    scale = default_guidance(pipe) if guidance_scale is None else guidance_scale
    model, sampler, step = inspect_pipeline(pipe, name, steps, scale, prompts[0])
    batch_size = min(batch_size, samples)
    branches = 1 if sampler.guidance_form == "none" else 2
    sites = [s for t in model.transformers.values() for s in t.sites]
    item = 4 if model.shape["dtype"] == "float32" else 2
    ring = [(max_interval - 1) * branches * batch_size * s.tokens * (s.width * item + 12) for s in sites]
    free = _free_memory(pipe) * MEMORY_SHARE if memory_bytes is None else memory_bytes
    groups = _group(ring, free)
    rows = steps * len(sites) * (max_interval - 1)
    tokens = sum(s.tokens for s in sites) // len(sites)
    disk = rows * ((branches + 1) * (24 + 8 * len(RATES)) + 2 * tokens)
    request = {
        "format": FORMAT, "version": VERSION, "tables": dict.fromkeys(TABLES, 1), "model": name,
        "sampler": sampler.class_name, "prompts": list(prompts), "seed": seed, "samples": samples,
        "max_interval": max_interval, "batch_size": batch_size, "guidance_scale": scale, "dtype": model.shape["dtype"],
    }  # fmt: skip
    seconds = _seconds_a_step(pipe, step) * steps * samples * len(groups) * 1.3
    return ProfilePlan(
        model, sampler, request, groups, max(sum(ring[i] for i in g) for g in groups), disk, seconds, step
    )


def run_profile(
    pipe: Any,
    plan: ProfilePlan,
    folder: str | Path,
    *,
    force: bool = False,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> Profile:
    """Samples the plan's generations and writes the profile to `folder`, which appears only when it is whole.

    Until then everything is in `folder`.partial, after every batch; the same call goes on from there and ends with the
    same tables, bit for bit. on_progress is given (steps done, steps in all).
    """
    folder = Path(folder)
    refuse_existing(folder, force)
    work = folder.with_name(folder.name + ".partial")
    _open_partial(work, pipe, plan, force)
    steps, request = plan.sampler.steps, plan.request
    branches = 1 if plan.sampler.guidance_form == "none" else 2
    statistics = Statistics(plan.sites, steps, request["max_interval"] - 1, branches, RATES)
    state = work / "state.npz"
    done = statistics.restore(state) if state.exists() else {"group": 0, "batch": 0}
    starts = range(0, request["samples"], request["batch_size"])
    total = len(plan.groups) * request["samples"] * steps
    watch = Stopwatch(pipe)
    began = time.perf_counter()
    for group in range(done["group"], len(plan.groups)):
        for start in starts[done["batch"] if group == done["group"] else 0 :]:
            count = min(request["batch_size"], request["samples"] - start)
            before = (group * request["samples"] + start) * steps
            with Taps(pipe, plan, plan.groups[group], statistics, watch) as taps:
                taps.on_step = lambda s, before=before, count=count: on_progress(before + s * count, total)
                entries = [request["prompts"][(start + i) % len(request["prompts"])] for i in range(count)]
                seeds = [request["seed"] + start + i for i in range(count)]
                call(pipe, entries, seeds, steps, request["guidance_scale"], output_type="np")
            taps.flush()
            if group == 0:
                statistics.samples += count
            last = start == starts[-1]
            statistics.save(state, {"group": group + last, "batch": 0 if last else start // request["batch_size"] + 1})
    seconds = time.perf_counter() - began
    statistics.write_tables(work, plan.model)
    measured = {"seconds": round(seconds, 2), "ring_bytes": plan.ring_bytes, "passes": len(plan.groups)}
    measured["time_over_plain"] = round(seconds / max(seconds - watch.seconds(), 1e-9), 3) if seconds else None
    device = str(next(pipe.components[next(iter(plan.model.transformers))].parameters()).device)
    write_json(
        work / "manifest.json", request | {"device": device, "versions": versions(), "measured": measured}, force=True
    )
    state.unlink(missing_ok=True)
    (work / "request.json").unlink()
    if folder.exists():
        shutil.rmtree(folder)
    os.replace(work, folder)
    return load_profile(folder)


def profile(pipe: Any, folder: str | Path, *, name: str | None = None, force: bool = False, **settings: Any) -> Profile:
    """Profiles `pipe` into `folder` and returns the profile; `settings` are those of `plan_profile`."""
    plan = plan_profile(pipe, name or pipe.config.get("_name_or_path") or type(pipe).__name__, **settings)
    return run_profile(pipe, plan, folder, force=force)


def versions() -> dict[str, str]:
    import diffusers

    found = {"sodaprof": __version__, "torch": torch.__version__, "diffusers": diffusers.__version__}
    return found | {"python": platform.python_version()}


def _open_partial(work: Path, pipe: Any, plan: ProfilePlan, force: bool) -> None:
    """Makes the working folder, or checks that the one there is of the same request."""
    mark = {"request": digest(plan.request), "groups": plan.groups}
    if work.exists() and not force:
        found = read_json(work / "request.json") if (work / "request.json").exists() else None
        if found == mark:
            return
        raise FormatError(
            f"{work}: an interrupted profile with other settings is there. Repeat its settings to go on with it, or "
            "add --force to start anew."
        )
    if work.exists():
        shutil.rmtree(work)
    work.mkdir(parents=True)
    write_inspection(work, plan.model, plan.sampler)
    save_cost(count_flops(pipe, plan.model, plan.step), work / "cost.flops.json", force=True)
    write_json(work / "request.json", mark)


def write_inspection(folder: Path, model: Model, sampler: Sampler) -> None:
    write_json(folder / "model.json", model.to_json(), force=True)
    write_json(folder / "sampler.json", sampler.to_json(), force=True)


class Taps:
    """Hooks on the sites of one group for one batch: pushes every output through its ring, adds up the errors."""

    def __init__(
        self, pipe: Any, plan: ProfilePlan, group: list[int], statistics: Statistics, watch: Stopwatch
    ) -> None:
        self.pipe, self.plan, self.group, self.statistics, self.watch = pipe, plan, group, statistics, watch
        self.moment = Moment()
        self.clock = Clock(pipe.scheduler, plan.sampler, lambda: None, lambda: None)
        self.on_step: Callable[[int], None] = lambda step: None
        self.rings: dict[tuple[int, int], Ring] = {}
        self.calls: dict[str, int] = {}
        self.found: dict[tuple[int, int], list[Any]] = {}  # (step, site) -> the branches' errors, on the device
        device = next(pipe.components[next(iter(plan.model.transformers))].parameters()).device
        self.rates = torch.tensor(RATES, device=device)
        self.stack = ExitStack()

    def __enter__(self) -> Taps:
        self.clock.attach()
        self.stack.callback(self.clock.detach)
        for name, transformer in self.plan.model.transformers.items():
            module = self.pipe.components[name]
            numbers = {s.key: i for i, (n, s) in enumerate(self.plan.sites) if n == name and i in self.group}
            begin = TransformerHook(self.clock, self.moment, lambda: None)
            self.stack.enter_context(_hooked(module, begin))
            for path in dict.fromkeys(s.path for s in transformer.sites):
                self.stack.enter_context(
                    tapped(module.get_submodule(path), self._tap(path, numbers), "sodaprof.profile")
                )
        return self

    def __exit__(self, *exception: object) -> None:
        self.stack.close()

    def _tap(self, path: str, numbers: dict[str, int]) -> Callable[..., Any]:
        def run(forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            out = forward(*args, **kwargs)
            seen, call_ = self.calls.get(path, (-1, 0)), 0
            call_ = seen[1] + 1 if seen[0] == self.moment.forward else 0
            self.calls[path] = (self.moment.forward, call_)
            site = numbers.get(path + (f"#{call_}" if call_ else ""))
            if site is not None:
                with self.watch:
                    self._push(site, out[0] if isinstance(out, tuple) else out)
            return out

        return run

    def _push(self, site: int, out: torch.Tensor) -> None:
        halves = self.plan.sampler.guidance_form == "halves"
        for i, x in enumerate(out.chunk(2) if halves else (out,)):
            branch = i if halves else self.moment.branch
            ring = self.rings.setdefault((site, branch), Ring(self.plan.request["max_interval"] - 1, self.rates))
            errors = ring.push(x)
            if errors is not None:
                self.found.setdefault((self.moment.step, site), []).append(errors)
        if site == self.group[-1]:
            self.on_step(self.moment.step + 1)

    def flush(self) -> None:
        """Moves the batch's errors off the device and into the statistics."""
        if len(self.found) != (self.plan.sampler.steps - 1) * len(self.group):
            raise MismatchError(
                f"The pipeline ran {len(self.found)} cells of {(self.plan.sampler.steps - 1) * len(self.group)}: it "
                "leaves out calls of its transformer. Profile without options that skip steps or guidance."
            )
        with self.watch:
            for (step, site), branches in self.found.items():
                whole, pruned = (
                    torch.stack([getattr(b, part) for b in branches]).cpu().numpy() for part in ("whole", "pruned")
                )
                tokens = sum(b.tokens.double().cpu().numpy() for b in branches)
                self.statistics.add(step, site, whole, pruned, tokens)
        self.found.clear()


def _hooked(module: Any, hook: Any) -> Any:
    from contextlib import contextmanager

    from diffusers.hooks import HookRegistry

    @contextmanager
    def attached() -> Any:
        registry = HookRegistry.check_if_exists_or_initialize(module)
        registry.register_hook(hook, "sodaprof.profile")
        try:
            yield
        finally:
            registry.remove_hook("sodaprof.profile", recurse=False)

    return attached()


class Stopwatch:
    """Adds up the time spent inside `with`: on a GPU by events in the stream, without synchronising."""

    def __init__(self, pipe: Any) -> None:
        self.cuda = "cuda" in str(getattr(pipe, "device", "cpu"))
        self.total, self.begin = 0.0, 0.0
        self.events: list[tuple[Any, Any]] = []

    def __enter__(self) -> None:
        if self.cuda:
            self.events.append((torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)))
            self.events[-1][0].record()
        self.begin = time.perf_counter()

    def __exit__(self, *exception: object) -> None:
        if self.cuda:
            self.events[-1][1].record()
        else:
            self.total += time.perf_counter() - self.begin

    def seconds(self) -> float:
        if self.cuda:
            torch.cuda.synchronize()
            self.total += sum(a.elapsed_time(b) for a, b in self.events) / 1e3
            self.events.clear()
        return self.total


def _group(sizes: list[int], free: float) -> list[list[int]]:
    """Returns the sites in as few consecutive groups as fit `free` bytes each."""
    if max(sizes) > free:
        raise SodaprofError(
            f"The ring of one site takes {max(sizes) / 2**20:.0f} MiB, {free / 2**20:.0f} MiB may be used. "
            "Lower --batch-size or --max-interval."
        )
    groups: list[list[int]] = [[]]
    used = 0
    for i, size in enumerate(sizes):
        if used + size > free:
            groups.append([])
            used = 0
        groups[-1].append(i)
        used += size
    return groups


def _free_memory(pipe: Any) -> float:
    device = torch.device(str(getattr(pipe, "device", "cpu")))
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0])
    return float(os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))


def _seconds_a_step(pipe: Any, step: Any) -> float:
    """Returns the seconds of one generation's step, timed on the recorded one."""
    with torch.no_grad():
        for repeat in range(2):  # the first one warms up
            if repeat:
                began = time.perf_counter()
            for name, args, kwargs in step.calls:
                pipe.components[name](*args, **kwargs)
            if getattr(pipe, "device", torch.device("cpu")).type == "cuda":
                torch.cuda.synchronize()
    return time.perf_counter() - began
