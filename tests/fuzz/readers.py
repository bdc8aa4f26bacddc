"""The readers of files under test: what a legal file is drawn from, how it is read, and what a loaded value must be."""

from __future__ import annotations

import atexit
import contextlib
import functools
import io
import json
import math
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import typer
from hypothesis import strategies as st
from msgspec.structs import replace

import sodaprof
from sodaprof import cli
from sodaprof.errors import SodaprofError
from sodaprof.formats.cost import cost_of, load_cost, save_cost
from sodaprof.formats.profile import load_profile, write_inspection
from sodaprof.formats.schedule_file import load_schedule
from sodaprof.pipelines.entries import read_prompts
from sodaprof.pipelines.load import load_pipeline
from sodaprof.profiler.plan import plan_profile
from sodaprof.profiler.run import PARTS, run_profile
from sodaprof.runtime.shipped import find_shipped
from sodaprof.tuning.refine import refine, state_file
from tests.conftest import build_cost, build_model
from tests.fuzz.mutations import Mutation, of_bytes, of_json
from tests.strategies import legal_schedules
from tests.tiny_pipelines import tiny_pipe

SETTINGS = {"steps": 3, "samples": 4, "batch_size": 2, "max_interval": 3}
VERSION_1 = {
    "format", "version", "tables", "model", "sampler", "prompts", "seed", "samples", "max_interval", "batch_size",
    "guidance_scale", "dtype", "device", "versions", "measured",
}  # fmt: skip


METHODS = {  # table -> what reads it
    "caching": ("caching_error",),
    "pruning": ("pruning_error",),
    "gram": ("state_products", "response", "site_products", "stack_products"),
}


@functools.cache
def pipe() -> Any:
    return tiny_pipe(1)


@functools.cache
def whole() -> Path:
    """Returns a profile that readers copy; it stays until the process ends."""
    folder = tempfile.TemporaryDirectory(prefix="sodaprof-fuzz-")
    atexit.register(folder.cleanup)
    run_profile(pipe(), plan_profile(pipe(), "tiny", **SETTINGS), Path(folder.name) / "p")
    return Path(folder.name) / "p"


class Wrong(AssertionError):
    """A reader loaded what it must refuse, or another value than was written."""


@functools.cache
def command() -> Any:
    """Returns the command line, made once: making it takes longer than most commands here."""
    return typer.main.get_command(cli.app)


def require(condition: Any, message: str) -> None:
    if not condition:
        raise Wrong(message)


def run_command(*arguments: Any) -> int:
    """Runs a command in this process and returns its exit code, 0 or 1; nothing that it prints may control a terminal."""
    argv, code = mock.patch.object(sys, "argv", ["sodaprof", *map(str, arguments)]), 0
    app = mock.patch.object(cli, "app", command())
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(out), argv, app:
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

    mixed: tuple[str, ...] = ()  # see `of_json`
    sealed = False  # a digest covers every byte
    json = True
    checked = False  # a legal file has been read

    def __init__(self, folder: Path) -> None:
        self.folder, self.path = folder, folder / "file.json"
        self.legal: st.SearchStrategy[Any] = st.none()  # None: one file, which is read as `wanted`
        self.wanted: Any = None

    def mutations(self) -> st.SearchStrategy[Mutation]:
        content = self.path.read_bytes()
        changed = of_bytes(content, self.sealed, whole=self.json or self.sealed)
        return of_json(content, self.mixed) | of_json(content, self.mixed) | changed if self.json else changed

    def write(self, value: Any) -> None:
        raise NotImplementedError

    def read(self) -> Any:
        """Reads the file, and whatever is read with it later. Raises SodaprofError if a part is refused."""
        raise NotImplementedError

    def check(self, value: Any, found: Any) -> None:
        """Raises unless `found`, read from a legal file, is what it was made from."""
        require(found == (self.wanted if value is None else value), "read as another value than was written")

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
        known = build_cost(build_model(2, names=("transformer",)))
        outside = st.fixed_dictionaries({"text_encoder": st.none() | amounts, "vae": amounts})
        loop = st.fixed_dictionaries(dict.fromkeys(known.loop, amounts))
        self.legal = st.builds(
            replace, st.just(known), unit=st.sampled_from(["flops", "ms"]), loop=loop, outside=outside
        )

    def write(self, value: Any) -> None:
        save_cost(value, self.path, force=True)

    def read(self) -> Any:
        return load_cost(self.path)

    def use(self, found: Any) -> None:
        self.write(found)
        require(self.read() == found, "another cost table when written and read again")
        full = [table.full + found.loop_step(True) for table in found.transformers.values()]
        require(all(0 < cost < 1e300 for cost in full), f"steps cost {full}")


class ProfileFile(Reader):
    """A file of a whole profile folder. The tables must come back unchanged, or be refused by the digest in the manifest."""

    mixed = ("prompts", "guidance_scale")

    def __init__(self, folder: Path, name: str) -> None:
        super().__init__(folder)
        self.original = folder / "original"
        shutil.copytree(whole(), self.original)
        self.profile = folder / "p"
        self.profile.mkdir()
        self.path = self.profile / name
        self.json = name.endswith(".json")
        self.sealed = not self.json
        self.write(None)
        self.wanted = load_profile(self.profile)

    def write(self, value: Any) -> None:
        for file in self.original.iterdir():
            shutil.copyfile(file, self.profile / file.name)

    def read(self) -> Any:
        found = load_profile(self.profile)
        for method in METHODS.get(self.path.stem, ("caching_error", "own_update", "reference")):
            getattr(found, method)()
        cost_of(self.profile, "flops")
        return found

    def use(self, found: Any) -> None:
        write_inspection(self.profile, found.model, found.sampler)
        require(self.read() == found, "another profile when written and read again")
        run_command(
            "compile", self.profile, "--policy", "fora", "--budget", "1.2x", "-o", self.folder / "s.json", "--force"
        )  # fmt: skip


class TableValues(ProfileFile):
    """Tables of a profile of version 1, which has no digests: rows that no profile has are refused all the same."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, "gram.parquet")
        path = self.original / "manifest.json"
        manifest = {key: value for key, value in json.loads(path.read_text()).items() if key in VERSION_1}
        path.write_text(json.dumps(manifest | {"version": 1}))
        self.write(None)
        self.wanted = load_profile(self.profile)

    def mutations(self) -> st.SearchStrategy[Mutation]:
        kinds = ["doubled", "one row twice", "one row less", "no rows", "renamed", "NaN", "1e300", "negative", "n = 0"]
        drawn = st.tuples(
            st.sampled_from(["caching", "pruning", "gram"]), st.sampled_from(kinds), st.integers(0, 10**6)
        )
        return drawn.map(lambda values: self.changed(*values))

    def changed(self, name: str, kind: str, number: int) -> Mutation:
        self.path = self.profile / f"{name}.parquet"
        table, value = pq.read_table(self.path), {"caching": "l1_mean", "pruning": "mean", "gram": "product"}[name]
        rows = table.to_pylist()
        places = [i for i, row in enumerate(rows) if row.get("row") == row.get("column")]  # squares are not negative
        place = places[number % len(places)]
        changed = {"NaN": {value: math.nan}, "1e300": {value: 1e300}, "negative": {value: -1.0}, "n = 0": {"n": 0}}
        less = [*rows[:place], *rows[place + 1 :]]
        more = {"doubled": rows * 2, "one row twice": [*rows, rows[place]], "no rows": [], "one row less": less}
        rows = more.get(kind, [*less, rows[place] | changed.get(kind, {})])
        new = pa.Table.from_pylist(rows, schema=table.schema)
        if kind == "renamed":
            new = new.rename_columns([column.upper() for column in new.column_names])
        pq.write_table(new, sink := io.BytesIO())
        return Mutation(sink.getvalue(), True, f"{name}: {kind}", f"row {place}")


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
        self.schedule = sodaprof.compile_schedule(whole(), "1.2x", "fora")
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
                raise Wrong("a file that is refused blocks the good one") from None


class Stop(Exception):
    pass


class StateFile(Reader):
    """A file of an interrupted profile: continued, it gives the tables of an uninterrupted one, or it is refused."""

    def __init__(self, folder: Path, name: str) -> None:
        super().__init__(folder)
        self.json = name.endswith(".json")
        self.plan = plan_profile(pipe(), "tiny", **SETTINGS)
        self.asked = dict(self.plan.request)
        self.wanted = load_profile(whole()).digest()

        def stop(done: int, total: int) -> None:
            if done > SETTINGS["steps"] * SETTINGS["batch_size"]:
                raise Stop

        with contextlib.suppress(Stop):
            run_profile(pipe(), self.plan, folder / "p", on_progress=stop)
        (self.path,) = folder.rglob(name)
        self.work, self.kept = self.path.parent, folder / "kept"
        self.work.rename(self.kept)

    def write(self, value: Any) -> None:
        shutil.rmtree(self.work, ignore_errors=True)
        shutil.rmtree(self.folder / "p", ignore_errors=True)
        shutil.copytree(self.kept, self.work)

    def mutations(self) -> st.SearchStrategy[Mutation]:
        if self.json:
            return super().mutations()
        with np.load(self.path) as saved:
            arrays = dict(saved)
        kinds = st.sampled_from(["missing", "unknown", "NaN", "negative", "shape", "text"])
        return super().mutations() | st.builds(self.changed, st.just(arrays), st.sampled_from(sorted(arrays)), kinds)

    def changed(self, arrays: dict[str, Any], name: str, kind: str) -> Mutation:
        """Returns the arrays with one changed, whose file is whole."""
        new = {key: array for key, array in arrays.items() if key != name or kind != "missing"}
        array = arrays[name]
        value = {"NaN": array * np.nan, "negative": array * 0 - 7, "shape": array[None], "text": array.astype(str)}.get(
            kind
        )
        np.savez(
            sink := io.BytesIO(),
            **new | ({} if value is None else {name: value}),
            **{"colour": array} if kind == "unknown" else {},
        )
        return Mutation(sink.getvalue(), True, f"array: {kind}", name)

    def read(self) -> Any:
        self.plan.request.clear()
        self.plan.request.update(self.asked)
        return run_profile(tiny_pipe(1), self.plan, self.folder / "p").digest()

    def use(self, found: Any) -> None:
        require(found == self.wanted, "continues to other tables than those of an uninterrupted profile")


class SearchFile(Reader):
    """The file of an interrupted search: continued, it gives the schedule of an uninterrupted one, or it is refused."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.schedule = sodaprof.compile_schedule(whole(), "1.2x", "fora")
        self.output = folder / "r.json"
        self.cost = cost_of(whole(), "flops")  # given, since counting takes four fifths of a search's time
        self.path = state_file(self.output)
        self.read()
        self.content, self.wanted = self.path.read_bytes(), self.output.read_bytes()

    def write(self, value: Any) -> None:
        self.path.write_bytes(self.content)

    def read(self) -> Any:
        refine(pipe(), self.schedule, self.output, evaluations=1, samples=4, cost=self.cost, method="none", force=True)
        return self.output.read_bytes()


READERS: dict[str, Any] = {
    "schedule": ScheduleFile,
    "cost": CostFile,
    **{n: functools.partial(ProfileFile, name=n) for n in sorted(PARTS - {"cost.flops.json"})},
    "table values": TableValues,
    "prompts": PromptFile,
    "sidecar": SidecarFile,
    **{n: functools.partial(StateFile, name=n) for n in ("request.json", "state.npz")},
    "search": SearchFile,
}
