"""The readers of files under test: what a legal file is drawn from, how it is read, and what a loaded value must be."""

from __future__ import annotations

import contextlib
import functools
import io
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from hypothesis import strategies as st
from msgspec.structs import replace

import sodaprof
from sodaprof import cli
from sodaprof.errors import SodaprofError
from sodaprof.formats.cost import cost_of, load_cost, save_cost
from sodaprof.formats.profile import load_inspection, load_profile, write_inspection, write_solver
from sodaprof.formats.sampler import OwnUpdate
from sodaprof.formats.schedule_file import load_schedule
from sodaprof.pipelines.load import load_pipeline, read_prompts
from sodaprof.profiler.plan import plan_profile
from sodaprof.profiler.run import run_profile
from sodaprof.runtime.shipped import find_shipped
from sodaprof.tuning.refine import refine, state_file
from tests.conftest import build_cost, build_model, build_schedule
from tests.fuzz.mutations import Mutation, of_bytes, of_json
from tests.strategies import digits, legal_schedules, models, samplers
from tests.tiny_pipelines import tiny_pipe

SETTINGS = {"steps": 3, "samples": 4, "batch_size": 2, "max_interval": 3}
VERSION_1 = {
    "format", "version", "tables", "model", "sampler", "prompts", "seed", "samples", "max_interval", "batch_size",
    "guidance_scale", "dtype", "device", "versions", "measured",
}  # fmt: skip


@functools.cache
def pipe() -> Any:
    return tiny_pipe(1)


class Wrong(AssertionError):
    """A reader loaded what it must refuse, or another value than was written."""


def require(condition: Any, message: str) -> None:
    if not condition:
        raise Wrong(message)


def run_command(*arguments: Any) -> int:
    """Runs a command in this process and returns its exit code, 0 or 1; nothing that it prints may control a terminal."""
    sys.argv, code = ["sodaprof", *map(str, arguments)], 0
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(out):
        try:
            cli.main()
        except SystemExit as stop:
            code = int(stop.code or 0)
    printed = out.getvalue()
    controls = {c for c in printed if c != "\n" and (ord(c) < 32 or c in "\x7f\u202e")}
    require(not controls, f"{arguments[0]} printed {controls}")
    require(code == 0 or len(printed) < 4000, f"{arguments[0]}: a message of {len(printed)} characters")
    require(code in (0, 1), f"{arguments[0]}: exit code {code}: {printed[-500:]}")
    return code


class Reader:
    """One kind of file. `write` makes legal files and keeps in `path` the one that is changed."""

    vague: tuple[str, ...] = ()  # see `of_json`
    sealed = False  # a digest covers every byte
    json = True

    def __init__(self, folder: Path) -> None:
        self.folder, self.path = folder, folder / "file.json"
        self.legal: st.SearchStrategy[Any] = st.none()

    def mutations(self) -> st.SearchStrategy[Mutation]:
        content = self.path.read_bytes()
        changed = of_bytes(content, self.sealed, whole=self.json or self.sealed)
        return of_json(content, self.vague) | of_json(content, self.vague) | changed if self.json else changed

    def write(self, value: Any) -> None:
        raise NotImplementedError

    def read(self) -> Any:
        """Reads the file, and whatever is read with it later. Raises SodaprofError if a part is refused."""
        raise NotImplementedError

    def check(self, value: Any, found: Any) -> None:
        """Raises unless `found`, read from a legal file, is `value`."""
        require(found == value, "read as another value than was written")

    def use(self, found: Any) -> None:
        """Uses what was read from a changed file; raises if it is no valid value."""

    def refused(self, error: SodaprofError) -> None:
        """Checks a refusal."""
        require(str(error).strip(), "an empty message")


class ScheduleFile(Reader):
    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.legal = legal_schedules()

    def write(self, value: Any) -> None:
        value.save(self.path, force=True)

    def read(self) -> Any:
        return load_schedule(self.path)

    def use(self, found: Any) -> None:
        again = self.folder / "again.json"
        found.save(again, force=True)
        require(load_schedule(again) == found, "another schedule when written and read again")
        require(run_command("show", self.path) == 0, "load_schedule accepts it, show does not")

    def refused(self, error: SodaprofError) -> None:
        if len(str(error)) > 1000 or not str(error).replace("\n", "").isprintable():
            require(run_command("show", self.path) == 1, "load_schedule refuses it, show does not")


class CostFile(Reader):
    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        amounts = st.integers(0, 10**15) | st.floats(0, 1e15)
        self.legal = st.tuples(amounts, st.sampled_from(["flops", "ms"]), st.integers(1, 2), st.none() | amounts)
        self.schedule = build_schedule()
        self.known = build_cost(build_model(2, names=("transformer",)))

    def write(self, value: Any) -> None:
        amount, unit, batch, outside = value
        (table,) = self.known.transformers.values()
        sites = {key.replace("blocks", "transformer_blocks"): replace(s, map=amount) for key, s in table.sites.items()}
        tables = {"transformer": replace(table, step=replace(table.step, fixed=amount), sites=sites)}
        both = {"text_encoder": outside, "vae": None}
        self.cost = replace(self.known, unit=unit, batch=batch, transformers=tables, outside=both)
        save_cost(self.cost, self.path, force=True)

    def read(self) -> Any:
        return load_cost(self.path)

    def check(self, value: Any, found: Any) -> None:
        require(found == self.cost, "read as another cost table")

    def use(self, found: Any) -> None:
        save_cost(found, self.folder / "again.json", force=True)
        require(load_cost(self.folder / "again.json") == found, "another cost table when written and read again")
        with contextlib.suppress(SodaprofError):
            figures = (found.schedule(self.schedule), found.speedup(self.schedule))
            require(all(0 < figure < 1e300 for figure in figures), f"cost and speed-up are {figures}")


class InspectionFile(Reader):
    """model.json, sampler.json or solver.json."""

    def __init__(self, folder: Path, name: str) -> None:
        super().__init__(folder)
        self.path, steps = folder / f"{name}.json", st.shared(st.integers(1, 6), key="steps")
        row = st.tuples(digits(9), digits(9))
        updates = steps.flatmap(
            lambda n: st.builds(
                OwnUpdate, st.sampled_from(["output", "data"]), _rows(row, n), _rows(row, n), _rows(digits(9), n)
            )
        )
        reasons = st.text(min_size=1, max_size=9).map(sodaprof.UnsupportedModelError)
        self.legal = st.tuples(st.integers(1, 2).flatmap(models), steps.flatmap(samplers), updates | reasons)

    def write(self, value: Any) -> None:
        model, sampler, update = value
        write_inspection(self.folder, model, sampler)
        write_solver(self.folder, update)

    def read(self) -> Any:
        found = load_inspection(self.folder)
        if self.path.name != "solver.json":
            return found.model, found.sampler
        try:
            return found.own_update()
        except sodaprof.UnsupportedModelError as reason:
            return str(reason)

    def check(self, value: Any, found: Any) -> None:
        model, sampler, update = value
        wanted = update if isinstance(update, OwnUpdate) else str(update)
        require(found == (wanted if self.path.name == "solver.json" else (model, sampler)), "read as another value")

    def use(self, found: Any) -> None:
        if isinstance(found, tuple):
            write_inspection(self.folder, *found)
            require(self.read() == found, "another value when written and read again")
            for transformer in found[0].transformers.values():
                require(all(f"{transformer.tokens(site.key)}" for site in transformer.sites), "a site without tokens")


def _rows(entries: st.SearchStrategy[Any], count: int) -> st.SearchStrategy[tuple[Any, ...]]:
    return st.lists(entries, min_size=count, max_size=count).map(tuple)


class ProfileFile(Reader):
    """A file of a whole profile folder. The tables must come back unchanged, or be refused by the digest in the manifest."""

    vague = ("prompts", "guidance_scale")

    def __init__(self, folder: Path, name: str) -> None:
        super().__init__(folder)
        self.original = folder / "original"
        run_profile(pipe(), plan_profile(pipe(), "tiny", **SETTINGS), self.original)
        self.profile = folder / "p"
        self.path = self.profile / name
        self.json = name.endswith(".json")
        self.sealed = not self.json
        self.first = load_profile(self.original).digest()

    def write(self, value: Any) -> None:
        shutil.rmtree(self.profile, ignore_errors=True)
        shutil.copytree(self.original, self.profile)

    def read(self) -> Any:
        found = load_profile(self.profile)
        for metric in ("cos", "l1", "l2"):
            found.caching_error(metric)
        found.pruning_error()
        for method in ("state_products", "response", "site_products", "stack_products", "own_update", "reference"):
            getattr(found, method)()
        cost_of(self.profile, "flops")
        return found

    def check(self, value: Any, found: Any) -> None:
        require(found.digest() == self.first, "another digest")

    def use(self, found: Any) -> None:
        run_command(
            "compile", self.profile, "--policy", "fora", "--budget", "1.2x", "-o", self.folder / "s.json", "--force"
        )


class TableValues(ProfileFile):
    """Tables of a profile of version 1, which has no digests: rows that no profile has are refused all the same."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, "manifest.json")
        manifest = json.loads(self.path_of("manifest.json").read_text())
        kept = {key: value for key, value in manifest.items() if key in VERSION_1} | {"version": 1}
        self.path_of("manifest.json").write_text(json.dumps(kept))
        self.first = load_profile(self.original).digest()

    def path_of(self, name: str) -> Path:
        return self.original / name

    def mutations(self) -> st.SearchStrategy[Mutation]:
        return st.sampled_from(["caching", "pruning", "gram"]).flatmap(self._changed)

    def _changed(self, name: str) -> st.SearchStrategy[Mutation]:
        self.path = self.profile / f"{name}.parquet"
        table = pq.read_table(self.path)
        numbers = [f.name for f in table.schema if pa.types.is_floating(f.type)]
        kinds = [
            "doubled",
            "repeated",
            "dropped",
            "no rows",
            "NaN",
            "1e300",
            "negative",
            "renamed",
            "other type",
            "n = 0",
        ]
        cells = st.tuples(st.sampled_from(kinds), st.integers(0, len(table) - 1), st.sampled_from(numbers))
        return cells.map(lambda cell: self._mutation(table, name, *cell))

    def _mutation(self, table: Any, name: str, kind: str, row: int, column: str) -> Mutation:
        place = table.column_names.index(column)
        values = table[column].to_numpy().copy()
        rows = {
            "doubled": [*range(len(table))] * 2, "repeated": [*range(len(table)), row], "no rows": [],
            "dropped": [i for i in range(len(table)) if i != row],
        }.get(kind)  # fmt: skip
        if rows is not None:
            new = table.take(pa.array(rows, pa.int64()))
        elif kind == "renamed":
            new = table.rename_columns([c + "_" * (c == column) for c in table.column_names])
        elif kind == "other type":
            new = table.set_column(place, column, pa.array([str(v) for v in values]))
        elif kind == "n = 0":
            new = table.set_column(table.column_names.index("n"), "n", pa.array(np.zeros(len(table), np.int32)))
        else:
            if name == "gram":  # products of two steps may be negative, the squares on the diagonal may not
                row = int(np.flatnonzero(table["row"].to_numpy() == table["column"].to_numpy())[row % 3])
            values[row] = {"NaN": np.nan, "1e300": 1e300, "negative": -1.0}[kind]  # 1e300 is infinity in float32
            new = table.set_column(place, table.schema.field(column), pa.array(values, table.schema.field(column).type))
        sink = io.BytesIO()
        pq.write_table(new, sink)
        return Mutation(sink.getvalue(), True, f"{name}: {kind}", f"row {row}, column {column}")


class PromptFile(Reader):
    json = False

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.path = folder / "prompts.txt"
        letters = st.characters(categories=["L", "P", "Zs"])
        prompts = st.text(letters, min_size=1, max_size=20).map(str.strip).filter(lambda t: t and t[0] != "#")
        self.legal = st.lists(st.integers(-9, 999) | prompts, min_size=1, max_size=4)

    def write(self, value: Any) -> None:
        self.path.write_bytes("\n".join(["# a comment", *map(str, value), ""]).encode())

    def read(self) -> Any:
        return read_prompts(self.path)

    def use(self, found: Any) -> None:
        content = self.path.read_bytes()
        self.path.write_bytes(content.removeprefix(b"\xef\xbb\xbf"))
        require(read_prompts(self.path) == found, "a byte order mark changes the first entry")


class SidecarFile(Reader):
    """A changed schedule next to a good one beside a model's weights: the good one is found, or both match."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        pipe().save_pretrained(folder / "model")
        self.pipe = load_pipeline(str(folder / "model"))
        self.path = folder / "model" / "sodaprof" / "a.json"
        self.good = self.path.with_name("b.json")
        self.path.parent.mkdir()
        run_profile(self.pipe, plan_profile(self.pipe, "tiny", **SETTINGS), folder / "q")
        self.schedule = sodaprof.compile_schedule(folder / "q", "1.2x", "fora")
        self.schedule.save(self.good)

    def write(self, value: Any) -> None:
        self.schedule.save(self.path, force=True)

    def read(self) -> Any:
        if self.path.read_bytes() == self.good.read_bytes():
            return None
        found = find_shipped(self.pipe)
        require(found == self.good, f"{found.name} is taken, which is a changed file")
        raise SodaprofError("the good one is found")

    def refused(self, error: SodaprofError) -> None:
        if "the good one is found" not in str(error):
            try:
                load_schedule(self.path)
            except SodaprofError:
                raise Wrong(f"a broken file blocks the good one: {error!s:.200}") from None


class Stop(Exception):
    pass


class StateFile(Reader):
    """A file of an interrupted profile: continued, it gives the tables of an uninterrupted one, or it is refused."""

    def __init__(self, folder: Path, name: str) -> None:
        super().__init__(folder)
        self.json = name.endswith(".json")
        self.work, self.kept = folder / "p.partial", folder / "kept"
        self.path = self.work / name
        self.plan = plan_profile(pipe(), "tiny", **SETTINGS)
        self.asked = dict(self.plan.request)
        self.wanted = run_profile(pipe(), self.plan, folder / "whole").digest()

        def stop(done: int, total: int) -> None:
            if done > SETTINGS["steps"] * SETTINGS["batch_size"]:
                raise Stop

        with contextlib.suppress(Stop):
            run_profile(pipe(), self.plan, folder / "p", on_progress=stop)
        self.work.rename(self.kept)

    def write(self, value: Any) -> None:
        for left in (self.work, self.folder / "p"):
            shutil.rmtree(left, ignore_errors=True)
        shutil.copytree(self.kept, self.work)

    def read(self) -> Any:
        self.plan.request.clear()
        self.plan.request.update(self.asked)
        return run_profile(pipe(), self.plan, self.folder / "p").digest()

    def check(self, value: Any, found: Any) -> None:
        require(found == self.wanted, "continues to other tables")
        self.write(value)

    def use(self, found: Any) -> None:
        require(found == self.wanted, "continues to other tables than those of an uninterrupted profile")


class SearchFile(Reader):
    """The file of an interrupted search: continued, it gives the schedule of an uninterrupted one, or it is refused."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        run_profile(pipe(), plan_profile(pipe(), "tiny", **SETTINGS), folder / "q")
        self.schedule = sodaprof.compile_schedule(folder / "q", "1.2x", "fora")
        self.output = folder / "r.json"
        self.path = state_file(self.output)
        self.read()
        self.content, self.wanted = self.path.read_bytes(), self.output.read_bytes()

    def write(self, value: Any) -> None:
        self.path.write_bytes(self.content)

    def read(self) -> Any:
        refine(pipe(), self.schedule, self.output, evaluations=1, samples=4, force=True)
        return self.output.read_bytes()

    def check(self, value: Any, found: Any) -> None:
        require(found == self.wanted, "continues to another schedule")


READERS: dict[str, Any] = {
    "schedule": ScheduleFile,
    "cost": CostFile,
    **{n: functools.partial(InspectionFile, name=n) for n in ("model", "sampler", "solver")},
    **{n: functools.partial(ProfileFile, name=n) for n in ("manifest.json", "cost.flops.json")},
    **{
        f"{n}.parquet": functools.partial(ProfileFile, name=f"{n}.parquet")
        for n in ("caching", "pruning", "sites", "gram")
    },
    "table values": TableValues,
    "prompts": PromptFile,
    "sidecar": SidecarFile,
    **{n: functools.partial(StateFile, name=n) for n in ("request.json", "state.npz")},
    "search": SearchFile,
}
