"""Tries the runtime on the transformer classes of `zoo`, one at a time, without pipelines or weights.

    python -m tests.zoo.zoo_check [NAME...] [--markdown]

prints a row a class: its sites, and whether each of CHECKS holds. Exits with 1 where one does not.
"""

from __future__ import annotations

import argparse
import sys
import textwrap
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
from diffusers.models.attention_dispatch import attention_backend
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

import sodaprof
from sodaprof.errors import UnsupportedModelError
from sodaprof.formats.schedule import Forecast, Plan, Schedule, TokenRule
from sodaprof.formats.sites import Guidance, Model, Sampler, Site, Transformer
from sodaprof.pipelines.discover import Step, find_sites
from sodaprof.pipelines.flops import count_flops
from sodaprof.pipelines.probe import as_tokens
from sodaprof.pipelines.structure import ATTENTION, ATTENTION_CLASS, NO_ATTENTION_CLASS, find_modules
from sodaprof.runtime.apply import Report
from sodaprof.runtime.compiled.engine import Compiled
from tests.zoo.zoo import LATENTS, ZOO, at, other

STEPS = 4
VARIANTS = [  # dtype, and one of diffusers' attention backends that a CPU has
    (torch.bfloat16, "native"), (torch.float16, "native"), (torch.float32, "_native_math"), (torch.float32, "_native_flash"),
]  # fmt: skip
Calls = list[list[dict[str, Any]]]  # of each step, of each guidance branch
Outputs = list[list[list[Tensor]]]  # of each step and branch, all tensors that the network returns


@dataclass
class Row:
    """What was found of one class."""

    name: str
    sites: tuple[Site, ...] = ()
    results: dict[str, bool | None] = field(default_factory=dict)  # by heading in CHECKS; None: refused in words
    notes: list[str] = field(default_factory=list)
    refused: bool = False  # with UnsupportedModelError, which is an answer and no failure

    @property
    def passed(self) -> bool:
        return self.refused or (len(self.results) == len(CHECKS) and False not in self.results.values())

    @property
    def modules(self) -> dict[tuple[str, str], list[Site]]:
        """The sites by stack and module."""
        found: dict[tuple[str, str], list[Site]] = {}
        for site in self.sites:
            found.setdefault((site.stack, site.module), []).append(site)
        return found

    @property
    def kinds(self) -> dict[tuple[str, str], str]:
        """The kinds by stack and module; several where layers or calls differ."""
        return {module: "/".join(dict.fromkeys(s.kind for s in sites)) for module, sites in self.modules.items()}

    @property
    def prunable(self) -> dict[tuple[str, str], str]:
        """Which modules can be pruned by stack and module, and how many of its sites where not all can: "2 of 3"."""
        some = {module: sum(s.prunable for s in sites) for module, sites in self.modules.items()}
        return {m: "" if n == len(self.modules[m]) else f"{n} of {len(self.modules[m])}" for m, n in some.items() if n}


class Failed(Exception):
    """A check does not hold; says why."""


def expect(holds: bool, why: str) -> None:
    if not holds:
        raise Failed(why)


class Scheduler:
    """As much of a scheduler as a schedule is tied to; latents come from elsewhere."""

    config: dict[str, Any] = {}  # noqa: RUF012

    def set_timesteps(self, steps: int) -> None:
        self.timesteps = torch.linspace(999, 1, steps).long()

    def step(self, model_output: Any, timestep: Tensor, sample: Any) -> None: ...


@dataclass
class Case:
    """One instance at work: what a pipeline would hold, and how its network is called."""

    name: str
    network: nn.Module
    call: dict[str, Any]
    found: Transformer
    pipe: SimpleNamespace

    @property
    def step(self) -> Step:
        return Step([("transformer", (), self.call)])

    @property
    def model(self) -> Model:
        latent = tree_leaves(next(self.call[name] for name in LATENTS if name in self.call))[0]
        tokens = max(site.tokens for site in self.found.sites)
        shape = {"latent": list(latent.shape[1:]), "tokens": tokens, "batch_profiled": 1, "dtype": "float32"}
        return Model(self.name, "", {"transformer": self.found}, shape)

    def halves(self) -> Calls:
        """Returns calls with both guidance branches in one batch."""
        return [[at(self.call, seed)] for seed in range(STEPS)]

    def passes(self) -> Calls:
        """Returns calls of one guidance branch each: the same latents, two samples of them, with other text."""
        first = [at(self.call, seed, halves=False) for seed in range(STEPS)]
        return [[call, other(call, STEPS)] for call in first]

    def schedule(
        self, rows: dict[str, str], form: str, k: dict[str, tuple[int, ...]] | None = None,
        forecasts: dict[str, tuple[Forecast, ...]] | None = None,
    ) -> Schedule:  # fmt: skip
        scheduler = Scheduler()
        scheduler.set_timesteps(STEPS)
        sampler = Sampler("Scheduler", {}, tuple(scheduler.timesteps.tolist()), Guidance(form, 4.0))
        plan = Plan(self.found.class_name, self.found.fingerprint, rows, "." * STEPS, k or {}, forecasts or {})
        rule = TokenRule("feature_mean") if k else None
        policy = {"name": "test", "knobs": {}}
        return Schedule({"transformer": plan}, sampler, self.model.shape, policy, token_rule=rule)

    @torch.no_grad()
    def sample(self, calls: Calls, after_step: Callable[[], None] = lambda: None) -> Outputs:
        """Returns what the network returns under the pipeline's scheduler; calls `after_step` after each step."""
        outputs: Outputs = []
        self.pipe.scheduler.set_timesteps(len(calls))
        for t, branches in zip(self.pipe.scheduler.timesteps, calls, strict=True):
            outputs.append([tensors(self.network(**kwargs, return_dict=False)) for kwargs in branches])
            self.pipe.scheduler.step(outputs[-1][0][0], t, None)
            after_step()
        return outputs


def tensors(output: Any) -> list[Tensor]:
    """Returns copies of all tensors in a module's output."""
    return [leaf.clone() for leaf in tree_leaves(output) if torch.is_tensor(leaf)]


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@torch.no_grad()
def case_of(name: str) -> Case:
    """Returns the class's instance, anew, with its sites; UnsupportedModelError where sodaprof refuses it."""
    network, call = ZOO[name]()
    pipe = SimpleNamespace(components={"transformer": network}, scheduler=Scheduler())
    found = find_sites(pipe, "transformer", Step([("transformer", (), call)]))
    return Case(name, network, call, found, pipe)


def plain(name: str, calls: Calls) -> Outputs:
    """Returns what an instance that sodaprof never saw returns."""
    with torch.no_grad():
        network, _ = ZOO[name]()
        return [[tensors(network(**kwargs, return_dict=False)) for kwargs in step] for step in calls]


# ---- checks: each takes a fresh case and raises Failed, or what it ran into -------------------------------------------


def computes(case: Case) -> None:
    """A schedule of C alone changes no bit of the output."""
    calls = case.halves()
    wanted = plain(case.name, calls)
    with sodaprof.apply(case.pipe, case.schedule({s.key: "C" * STEPS for s in case.found.sites}, "halves")) as handle:
        outputs = case.sample(calls)
        report = handle.report()
    for step in range(STEPS):
        expect(same(outputs[step][0], wanted[step][0]), f"step {step} differs from the plain network")
    check_report(report)


def reuses(case: Case) -> None:
    """Exactly the sites with a C run, those with an R hand on their output of the step before."""
    check_reuse(case, case.halves(), "halves")


def keeps_apart(case: Case) -> None:
    """With one network call a guidance branch, a site hands on what it computed on that branch."""
    differ = check_reuse(case, case.passes(), "passes")
    expect(differ > 0, "no site's output differs between the branches, so nothing was checked")


def counts(case: Case) -> None:
    """The FLOPs of the network, of each site and of the rest are positive."""
    costs = count_flops(case.pipe, case.model, case.step).transformers["transformer"]
    fixed = costs.step.fixed
    expect(fixed > 0, f"{fixed:g} FLOPs outside the sites")
    idle = [key for key, cost in costs.sites.items() if not cost.C > 0]
    expect(not idle, f"no FLOPs: {', '.join(idle)}")


def lowers(case: Case) -> None:
    """Traced blocks, without and with conditioning tables, give the same bits as the hooks."""
    rows, k = {}, {}
    for i, site in enumerate(case.found.sites):
        rows[site.key] = "CPRC" if site.prunable and i % 2 else ("CRRC", "CCRC", "CRCR")[i % 3]
        if "P" in rows[site.key]:
            k[site.key] = (site.tokens // 2,)
    schedule, calls = case.schedule(rows, "halves", k), case.halves()
    with sodaprof.apply(case.pipe, schedule):
        wanted = case.sample(calls)
    with sodaprof.apply(case.pipe, schedule, runtime="compiled") as handle:
        for run in ("first", "second"):
            outputs = case.sample(calls)
            for step in range(STEPS):
                expect(same(outputs[step][0], wanted[step][0]), f"step {step} of the {run} lowered run differs")
        check_report(handle.report())


def collapses(case: Case) -> str:
    """Blocks that compute nothing, as sums: ordered the same bits as the hooks, fused the same but for rounding."""
    rows = {site.key: "CRRF" for site in case.found.sites}
    forecasts = {site.key: (Forecast((0,), (0.5,)),) for site in case.found.sites}
    schedule, calls = case.schedule(rows, "halves", forecasts=forecasts), case.halves()
    with sodaprof.apply(case.pipe, schedule):
        wanted = case.sample(calls)
    found: Counter[str] = Counter()
    for mode in ("ordered", "fused"):
        with sodaprof.apply(case.pipe, schedule, runtime=Compiled(sums=mode, graphs=False)) as handle:
            case.sample(calls)
            outputs = case.sample(
                calls, lambda h=handle: found.update(b.path for b in h.executor.engine.blocks if (1, 0) in b.sums)
            )
            check_report(handle.report())
            blocks = len(handle.executor.engine.blocks)
        for step in range(STEPS):
            now, then = outputs[step][0], wanted[step][0]
            holds = same(now, then) if mode == "ordered" else all(map(near, now, then))
            expect(holds, f"step {step} of the {mode} run differs")
    return f"{len(found)} of {blocks} blocks are sums"


def finds_the_same(case: Case) -> str | None:
    """Neither the dtype nor the attention backend changes what is found: sites, kinds, what can be pruned."""
    unable = []
    for dtype, backend in VARIANTS:
        network, call = ZOO[case.name]()
        network = network.to(dtype)
        cast = lambda x, dtype=dtype: x.to(dtype) if torch.is_tensor(x) and x.is_floating_point() else x  # noqa: E731
        call = tree_map(cast, call)
        with attention_backend(backend), torch.no_grad():
            try:
                network(**call, return_dict=False)
            except Exception:  # the model's own limit: it runs under no schedule either
                unable.append(f"{dtype} with {backend}".removeprefix("torch."))
                continue
            pipe = SimpleNamespace(components={"transformer": network})
            found = find_sites(pipe, "transformer", Step([("transformer", (), call)]))
        expect(found == case.found, f"other sites in {dtype} with {backend}")
    return f"the model itself does not run in {', '.join(unable)}" if unable else None


def near(a: Tensor, b: Tensor) -> bool:
    return float((a - b).norm() / b.norm().clamp_min(1e-12)) < 1e-5


CHECKS: dict[str, Callable[[Case], str | None]] = {
    "dtypes, backends": finds_the_same,
    "all-C identical": computes,
    "reuse exact": reuses,
    "branches apart": keeps_apart,
    "FLOPs": counts,
    "lowers": lowers,
    "collapses": collapses,
}


def check_reuse(case: Case, calls: Calls, form: str) -> int:
    """Runs half of the sites with R at step 1, the other half at step 2; returns how many R differ between branches."""
    sites, branches = case.found.sites, len(calls[0])
    place: Counter[tuple[str, int]] = Counter()  # in its block; the halves swap from layer to layer
    rows = {}
    for site in sites:
        rows[site.key] = "CCRC" if (place[site.stack, site.layer] + site.layer) % 2 else "CRCC"
        place[site.stack, site.layer] += 1
    wanted = plain(case.name, calls)
    modules = {path: found[-1] for path, found in find_modules(case.network).items()}
    ran = count_forwards(modules)
    seen = watch(modules)
    by_step: list[Counter[str]] = []

    def after_step() -> None:
        by_step.append(+ran)
        ran.clear()

    with sodaprof.apply(case.pipe, case.schedule(rows, form)) as handle:
        outputs = case.sample(calls, after_step)
        report = handle.report()
    check_report(report)

    for step in range(STEPS):
        planned: Counter[str] = Counter()
        for site in sites:
            planned[site.path] += branches * (rows[site.key][step] == "C")
        wrong = {p: (by_step[step][p], planned[p]) for p in modules if by_step[step][p] != planned[p]}
        expect(not wrong, f"step {step}: runs and C cells of {wrong}")

    times = Counter(site.path for site in sites)  # calls within one forward pass
    differ = 0
    for site in sites:
        t = rows[site.key].index("R")
        now, before = (
            [seen[site.path][(step * branches + b) * times[site.path] + site.call] for b in range(branches)]
            for step in (t, t - 1)
        )
        for branch in range(branches):
            own = same(now[branch], before[branch])
            expect(own, f"{site.key} at step {t}, branch {branch}: not its output of the step before")
        differ += any(not same(before[0], x) for x in before[1:])
        layout = case.found.fingerprint.get("layouts", {}).get(f"{site.stack}.{site.module}", "")
        batch, tokens, width = as_tokens(now[0][0], layout).shape
        expect(
            batch % 2 == 0 and (tokens, width) == (site.tokens, site.width),
            f"{site.key} returns {list(now[0][0].shape)} for batch 2, not {site.tokens} tokens of {site.width} channels",
        )

    for step, reused in enumerate((False, True, True, False)):
        for branch in range(branches):
            equal = same(outputs[step][branch], wanted[step][branch])
            expect(reused != equal, f"step {step} {'equals' if equal else 'differs from'} the plain network")
    return differ


def count_forwards(modules: dict[str, nn.Module]) -> Counter[str]:
    """Returns a counter of how often each module's own forward runs from now on; attached before any schedule."""
    ran: Counter[str] = Counter()

    def counted(path: str, forward: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            ran[path] += 1
            return forward(*args, **kwargs)

        return run

    for path, module in modules.items():
        module.forward = counted(path, module.forward)
    return ran


def watch(modules: dict[str, nn.Module]) -> dict[str, list[list[Tensor]]]:
    """Returns lists that fill with each module's outputs as its block sees them; copies, for blocks may write to them."""
    seen: dict[str, list[list[Tensor]]] = {path: [] for path in modules}
    for path, module in modules.items():
        module.register_forward_hook(lambda m, args, out, path=path: seen[path].append(tensors(out)))
    return seen


def check_report(report: Report) -> None:
    expect(report.complete, "the report says that the run is not complete")
    expect(report.executed == report.planned, f"executed {report.executed}, planned {report.planned}")


# ---- one class, and the table -----------------------------------------------------------------------------------------


def check(name: str) -> Row:
    """Returns what holds of the class; failures of any kind are in its notes."""
    row = Row(name)
    try:
        case = case_of(name)
        row.sites = case.found.sites
    except UnsupportedModelError as error:
        row.refused = True
        row.notes.append(f"refused: {error}")
        return row
    except Exception as error:
        row.notes.append(f"discovery: {said(error)}")
        return row
    failures: dict[str, list[str]] = {}  # headings by what was said
    for heading, run in CHECKS.items():
        try:
            if note := run(case_of(name)):
                row.notes.append(note)
            row.results[heading] = True
        except Exception as error:
            row.results[heading] = None if isinstance(error, UnsupportedModelError) else False
            failures.setdefault(said(error), []).append(heading)
    row.notes += [f"{', '.join(headings)}: {why}" for why, headings in failures.items()]
    if parts := unscheduled(case.network, row.sites):
        row.notes.append(f"attention outside the sites: {', '.join(parts)}")
    return row


def unscheduled(network: nn.Module, sites: tuple[Site, ...]) -> list[str]:
    """Returns the parts of the network with attention that is in no site: it always runs."""
    covered = [site.path for site in sites]
    for path, module in network.named_modules():
        cls = type(module).__name__
        attends = ATTENTION_CLASS.search(cls) and not NO_ATTENTION_CLASS.search(cls)
        if (attends or isinstance(module, ATTENTION)) and not any(f"{path}.".startswith(f"{c}.") for c in covered):
            covered.append(path)
    return list(dict.fromkeys(path.split(".")[0] for path in covered[len(sites) :]))


def said(error: Exception) -> str:
    """Returns the error in one line, long ones cut."""
    text = textwrap.shorten(str(error) or "no message", 260, placeholder=" …")
    return text if isinstance(error, Failed) else f"{type(error).__name__}: {text}"


HEADINGS = ("class", "sites", "kinds", "prunable", *CHECKS, "note")


def cells(row: Row) -> list[str]:
    """Returns the row's cells under HEADINGS."""
    words = {True: "yes", False: "NO", None: "refused"}
    answers = [words[row.results[heading]] if heading in row.results else "" for heading in CHECKS]
    count = str(len(row.sites) or "")
    return [row.name, count, by_stack(row.kinds), by_stack(row.prunable), *answers, "; ".join(row.notes)]


def by_stack(said: dict[tuple[str, str], str]) -> str:
    """Returns "stack: module what, module what; stack: ..."."""
    stacks: dict[str, list[str]] = {}
    for (stack, module), what in said.items():
        stacks.setdefault(stack, []).append(f"{module} {what}".strip())
    return "; ".join(f"{stack}: {', '.join(modules)}" for stack, modules in stacks.items())


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help="classes of the zoo; all where none is given")
    parser.add_argument("--markdown", action="store_true")
    arguments = parser.parse_args()
    if unknown := sorted(set(arguments.names) - set(ZOO)):
        parser.error(f"no {unknown[0]} in the zoo; it has {', '.join(ZOO)}")
    print_table(HEADINGS, arguments.names or list(ZOO), lambda n: (cells(r := check(n)), r.passed), arguments.markdown)


def print_table(
    headings: tuple[str, ...], names: list[str], row_of: Callable[[str], tuple[list[str], bool]], markdown: bool
) -> None:
    """Prints a row for each name, as it is made, and exits: with 1 where one did not pass."""
    from diffusers.utils import logging

    logging.set_verbosity_error()
    torch.set_num_threads(1)
    edge, end = ("| ", " |") if markdown else ("", "")
    print(edge + " | ".join(headings) + end)
    if markdown:
        print("|" + " --- |" * len(headings))
    failed = 0
    for name in names:
        row, passed = row_of(name)
        failed += not passed
        print(edge + " | ".join(cell.replace("|", "/") for cell in row) + end, flush=True)
    sys.exit(failed > 0)


if __name__ == "__main__":
    main()
