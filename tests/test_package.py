"""The package as a whole: public names, import levels, how quickly it starts."""

from __future__ import annotations

import ast
import subprocess
import sys
from importlib.util import resolve_name
from pathlib import Path

import pytest

import sodaprof

ROOT = Path(sodaprof.__file__).parent
LEVELS = {  # a folder imports from lower levels and from itself; two on one level do not import each other
    "version": 0, "errors": 0, "formats": 1, "compiler": 2, "report": 2, "opensora": 2, "pipelines": 3, "profiler": 4,
    "runtime": 4, "measure": 5, "doctor": 5, "tuning": 6, "cli": 7, "__init__": 8, "__main__": 8,
}  # fmt: skip
NO_TORCH = ("version", "errors", "formats", "compiler", "report", "cli")


SOURCES = sorted(ROOT.rglob("*.py"))


def part_of(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imports(path: Path) -> set[str]:
    """Returns the parts of the package (`sodaprof.formats`) and the outside modules that a file imports when it runs."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    package = ".".join(("sodaprof", *path.relative_to(ROOT).parent.parts))
    unchecked = [n for n in ast.walk(tree) if isinstance(n, ast.If) and getattr(n.test, "id", "") == "TYPE_CHECKING"]
    typing_only = {id(node) for branch in unchecked for node in ast.walk(branch)}
    found = set[str]()
    for node in ast.walk(tree):
        if id(node) in typing_only:
            continue
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            module = resolve_name("." * node.level + (node.module or ""), package)
            found |= {f"{module}.{name.name}" for name in node.names}
    return {".".join(name.split(".")[: 2 if name.startswith("sodaprof.") else 1]) for name in found}


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_folders_import_from_lower_levels_only(path):
    part = part_of(path)
    for name in imports(path):
        other = name.removeprefix("sodaprof.")
        if name.startswith("sodaprof.") and other != part:
            assert LEVELS[other] < LEVELS[part], f"{part} imports {other}"


@pytest.mark.parametrize("part", NO_TORCH)
def test_no_torch_in_the_half_that_computes_schedules(part):
    for path in SOURCES:
        assert part_of(path) != part or not imports(path) & {"torch", "diffusers", "transformers"}, path


def run_python(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout


def test_compiling_and_reporting_do_not_load_torch():
    parts = ("cli", "compiler", "report.schedule", "report.results", "measure.metrics")
    code = f"import sys, {', '.join(f'sodaprof.{part}' for part in parts)}"
    assert run_python(code + "; print({'torch', 'diffusers'} & set(sys.modules))").strip() == "set()"


def test_the_command_line_loads_neither_numpy_nor_rich():
    heavy = "{'torch', 'numpy', 'pyarrow', 'scipy'}"
    assert run_python(f"import sys, sodaprof.cli; print({heavy} & set(sys.modules))").strip() == "set()"


def test_public_names():
    assert sodaprof.__all__ == [
        "BudgetError", "FormatError", "Handle", "IllegalScheduleError", "MismatchError", "Profile", "Report", "Schedule",
        "SodaprofError", "UnsupportedModelError", "__version__", "apply", "compile_schedule", "evaluate", "load_pipeline",
        "load_profile", "load_schedule", "profile", "remove", "scheduler",
    ]  # fmt: skip
    for name in sodaprof.__all__:
        assert getattr(sodaprof, name) is not None
    with pytest.raises(AttributeError):
        sodaprof.nonsense  # noqa: B018


def test_public_functions_are_not_shadowed_by_modules():
    import sodaprof.measure.evaluate
    import sodaprof.profiler.run

    for name in ("apply", "compile_schedule", "evaluate", "profile", "load_profile"):
        assert callable(getattr(sodaprof, name))
        assert not hasattr(getattr(sodaprof, name), "__path__")


def test_errors_are_one_tree():
    from sodaprof import errors

    found = {n: c for n, c in vars(errors).items() if isinstance(c, type) and c.__module__ == errors.__name__}
    for name, cls in found.items():
        assert issubclass(cls, errors.SodaprofError)
        assert name in (errors.__doc__ or "")


def test_no_machine_paths():
    for path in SOURCES:
        assert "index-url" not in path.read_text(encoding="utf-8"), path


# typer commands, an option a line; signatures of diffusers' models and pipelines; a Triton kernel
LONG = {"bench", "compile_", "eval_", "profile", "refine_", "run"}
MANY_PARAMETERS = LONG | {"inspect"} | {"__init__", "__call__", "forward", "_sum"}


def test_modules_and_functions_are_short():
    """Modules of at most 350 lines, functions of at most 60 with at most 8 parameters, apart from the named ones."""
    for path in SOURCES:
        text = path.read_text(encoding="utf-8")
        assert len(text.splitlines()) <= 350, path
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef):
                length = (node.end_lineno or 0) - node.lineno + 1
                given = [arg.arg for arg in (*node.args.posonlyargs, *node.args.args) if arg.arg not in ("self", "cls")]
                assert length <= 60 or node.name in LONG, f"{path}: {node.name} has {length} lines"
                few = len(given) <= 8 or node.name in MANY_PARAMETERS
                assert few, f"{path}: {node.name} has {len(given)} parameters"
