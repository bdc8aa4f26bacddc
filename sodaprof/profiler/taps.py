"""Hooks that compare every output of the profiled sites with its earlier ones while the pipeline samples."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch

from ..errors import MismatchError
from ..pipelines.clock import Clock, Moment
from ..pipelines.patch import patched
from ..pipelines.probe import as_tokens, hidden_states, main_part
from ..pipelines.recording import all_tapped, hooked, tapped
from ..pipelines.transformer_hook import TransformerHook
from .gram import Products
from .plan import RATES, ProfilePlan
from .reuse_errors import Ring, StaleErrors, pooled
from .statistics import Statistics


class Stopwatch:
    """Adds up the time spent inside `with`: on a GPU by events in the stream, without a host sync."""

    def __init__(self, pipe: Any) -> None:
        self.cuda = "cuda" in str(getattr(pipe, "device", "cpu"))
        self.times: list[Any] = []  # of begin and end in turn: seconds, or events

    def __enter__(self) -> None:
        self._note()

    def __exit__(self, *exception: object) -> None:
        self._note()

    def _note(self) -> None:
        self.times.append(torch.cuda.Event(enable_timing=True) if self.cuda else time.perf_counter())
        if self.cuda:
            self.times[-1].record()

    def seconds(self) -> float:
        intervals = zip(self.times[::2], self.times[1::2], strict=True)
        if not self.cuda:
            return sum(end - begin for begin, end in intervals)
        torch.cuda.synchronize()
        return sum(begin.elapsed_time(end) for begin, end in intervals) / 1e3


class Taps:
    """Hooks on the sites of one group for one batch: they measure the errors of all ages at every output."""

    def __init__(
        self,
        pipe: Any,
        plan: ProfilePlan,
        group: list[int],
        first: bool,  # of the passes: it measures the products of states and stacks
        count: int,  # generations in the batch
        statistics: Statistics,
        watch: Stopwatch,
        on_step: Callable[[int], None],
    ) -> None:
        self.pipe, self.plan, self.group, self.count = pipe, plan, group, count
        self.statistics, self.watch = statistics, watch
        self.sites, self.past = plan.sites, plan.past
        self.moment, self.on_step = Moment(), on_step
        self.clock = Clock(pipe.scheduler, plan.sampler, lambda: None, lambda: None)
        self.rings: dict[tuple[int, int], Ring] = {}
        self.scratch: dict[torch.Size, torch.Tensor] = {}
        self.calls: dict[str, tuple[int, int]] = {}  # module -> the latest network call that ran it, and how often
        self.found: dict[tuple[int, int], list[StaleErrors]] = {}  # (step, site) -> the branches' errors, on the device
        self.rows = 2 * count if plan.halves else count  # of a network call's batch, folded samples aside
        device, gram = plan.device(pipe), statistics.gram
        self.rates = torch.tensor(RATES, device=device)
        self.products = None if gram is None else Products(gram, self.rows, count, first, device)
        self.of_run = self.products if first else None  # the products of states and stacks
        self.stack = ExitStack()

    def __enter__(self) -> Taps:
        with ExitStack() as stack:  # which restores the pipeline if an exception leaves the block
            self._attach(stack)
            self.stack = stack.pop_all()
        return self

    def _attach(self, stack: ExitStack) -> None:
        self.clock.attach()
        stack.callback(self.clock.detach)
        stack.enter_context(patched(self.pipe.scheduler, "step", self._advance))
        for name, transformer in self.plan.model.transformers.items():
            module = self.pipe.components[name]
            numbers = {s.key: i for i, (n, s) in enumerate(self.sites) if n == name and i in self.group}
            begin = TransformerHook(self.clock, self.moment, name, self.past[name])
            stack.enter_context(hooked(module, begin, "sodaprof.profile"))
            if self.of_run and name in self.plan.stacks:
                self._follow(stack, self.of_run, name, module)
            paths = dict.fromkeys(s.path for s in transformer.sites) if numbers else ()
            stack.enter_context(all_tapped(module, paths, partial(self._run, numbers), "sodaprof.profile"))

    def __exit__(self, *exception: object) -> None:
        self.stack.close()

    def _advance(
        self, take_step: Any, model_output: Any, timestep: Any, sample: torch.Tensor, *args: Any, **kwargs: Any
    ) -> Any:
        """Takes the scheduler's step, the clock's patch included, and records its states."""
        step, products = self.clock.step, self.of_run
        if step is None:
            return take_step(model_output, timestep, sample, *args, **kwargs)
        if products:
            with self.watch:
                products.state(model_output, sample)
        result = take_step(model_output, timestep, sample, *args, **kwargs)
        if products and step == self.plan.steps - 1:
            with self.watch:
                products.end(result[0] if isinstance(result, tuple) else result.prev_sample)
        self.on_step(step + 1)
        return result

    def _follow(self, hooks: ExitStack, products: Products, name: str, module: torch.nn.Module) -> None:
        """Hooks the first block's input and the last one's output."""
        stack = self.plan.stacks[name]

        def enter(forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            with self.watch:
                products.enter(name, hidden_states(args, kwargs))
            return leave(forward, args, kwargs) if stack.first == stack.last else forward(*args, **kwargs)

        def leave(forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            out = forward(*args, **kwargs)
            with self.watch:
                products.leave(name, self.moment, out)
            return out

        for path, tap in {stack.last: leave, stack.first: enter}.items():
            hooks.enter_context(tapped(module.get_submodule(path), tap, "sodaprof.profile"))

    def _run(
        self,
        numbers: dict[str, int],
        path: str,
        forward: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """Runs a module and measures its output if it is a site; numbers: of the sites by key."""
        out = forward(*args, **kwargs)
        network_call, count = self.calls.get(path, (-1, 0))
        count = count + 1 if network_call == self.moment.forward else 0
        self.calls[path] = self.moment.forward, count
        site = numbers.get(path + (f"#{count}" if count else ""))
        if site is not None:
            with self.watch:
                self._measure(site, main_part(out))
        return out

    def _measure(self, site: int, whole: torch.Tensor) -> None:
        # both halves of a batch share a ring, in different rows
        branch = 0 if self.plan.halves else self.moment.branch
        name, known = self.sites[site]
        out = as_tokens(whole, self.plan.model.transformers[name].layout(known.key))
        if out.shape[0] % self.rows or (out.shape[1] != known.tokens and site not in self.statistics.varying):
            raise MismatchError(
                f"{name}.{known.key} returns {list(out.shape)} as [B, N, D] for {self.rows} generations, halves counted; "
                f"{known.tokens} tokens were recorded at the first step. Profile calls of one size."
            )
        if self.past[name][self.moment.step] == 0 or (site, branch) not in self.rings:  # a turn reuses nothing earlier
            self.rings[site, branch] = Ring(self.plan.ages, self.rates, self.scratch)
        errors = self.rings[site, branch].push(out)
        if errors is not None:
            if site not in self.statistics.varying:
                errors.tokens = pooled(errors.tokens, self.plan.grids[site])
            self.found.setdefault((self.moment.step, site), []).append(errors)
        if self.products:
            self.products.keep(f"{name}.{known.key}", self.moment, whole)

    def flush(self) -> None:
        """Adds the batch's errors to the statistics, and releases its values."""
        cells = sum(past > 0 for site in self.group for past in self.past[self.sites[site][0]])
        if len(self.found) != cells:
            raise MismatchError(
                f"The pipeline ran {len(self.found)} cells of {cells}: it leaves out calls of its transformer. Profile without "
                "options that skip steps or guidance."
            )
        with self.watch:
            for (step, site), calls in self.found.items():
                parts = [torch.cat([c.whole for c in calls]), torch.cat([c.pruned for c in calls])]
                # a generation may be several rows of a module's batch (frames, say): their mean is its error
                rows = (self.plan.branches, self.count, len(parts[0]) // (self.plan.branches * self.count))
                whole, pruned = (part.cpu().numpy().reshape(*rows, *part.shape[1:]).mean(2) for part in parts)
                tokens = None
                if site not in self.statistics.varying:
                    tokens = (torch.stack([c.tokens.double() for c in calls]).sum(0) / rows[2]).cpu().numpy()
                self.statistics.add(step, site, whole, pruned, tokens)
            if self.products:
                self.products.flush()
        self.found.clear()
