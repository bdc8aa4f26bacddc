"""The command line: from inspect and profile over compile and refine to run and eval. Errors become one message and an exit code.

Exit codes: 0 success, 1 an error of sodaprof, 2 wrong usage, 130 Ctrl-C.
"""

from __future__ import annotations

import errno
import os
import sys
from typing import Annotated

import typer

from ..errors import SodaprofError
from ..version import __version__
from .bench import bench
from .compile import CompileCommand, compile_
from .doctor import doctor
from .eval import eval_
from .inspect import inspect
from .profile import profile
from .refine import refine_
from .run import run
from .ship import ship
from .show import show

app = typer.Typer(
    name="sodaprof", no_args_is_help=True, add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False,
    help="Profile a diffusion transformer once, compile a schedule for the speed-up you want, run it.",
    epilog="Start: sodaprof profile tiny-dit -o profile --samples 16",
)  # fmt: skip

COMMANDS = (  # in the order of --help
    ("profile", profile, "sodaprof profile tiny-dit -o profile --samples 16"),
    ("compile", compile_, "sodaprof compile profile --budget 2.0x -o schedule.json"),
    ("refine", refine_, "sodaprof refine tiny-dit schedule.json --time 5m -o better.json"),
    ("show", show, "sodaprof show schedule.json"),
    ("run", run, "sodaprof run tiny-dit schedule.json --label 5 --label 7 -o star-and-heart.png"),
    ("ship", ship, "sodaprof ship schedule.json path/to/model"),
    ("eval", eval_, "sodaprof eval tiny-dit schedule.json --samples 64 --picture side-by-side.png"),
    ("bench", bench, "sodaprof bench tiny-dit schedule.json --cost cost.json"),
    ("inspect", inspect, "sodaprof inspect tiny-dit --steps 50 -o inspected"),
    ("doctor", doctor, "sodaprof doctor tiny-dit"),
)
for name, command, example in COMMANDS:
    kind = CompileCommand if command is compile_ else None
    app.command(name, cls=kind, epilog=f"\b\nExample: {example}")(command)  # \b: not wrapped, so that it can be copied


def version(value: bool) -> None:
    if value:
        print(f"sodaprof {__version__}")
        raise typer.Exit


@app.callback()
def root(
    show_version: Annotated[
        bool, typer.Option("--version", callback=version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


def main() -> None:
    """Runs the command line; every error that sodaprof knows ends in one message, without a traceback."""
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    try:
        code = app(standalone_mode=False)
        if code == 130:  # what typer returns after Ctrl-C
            raise KeyboardInterrupt
    except SodaprofError as error:
        code = _fail(str(error))
    except KeyboardInterrupt:
        code = _fail(
            "Interrupted. No file was left incomplete. profile and refine continue when the same command is repeated; the best "
            "schedule that refine has found so far is in its file.",
            130,
        )
    except MemoryError:
        code = _fail("Out of memory. Lower --batch-size.")
    except OSError as error:
        reason = "The disk is full" if error.errno == errno.ENOSPC else f"{error.strerror or error}"
        code = _fail(f"{reason}{f' ({error.filename})' if error.filename else ''}. No file was left incomplete.")
    except UnicodeEncodeError as error:
        shown = error.object[error.start]
        code = _fail(f"The output takes {error.encoding} only, which has no {shown!r}. Set PYTHONIOENCODING=utf-8.")
    except Exception as error:
        if hasattr(error, "format_message") and hasattr(error, "exit_code"):  # click's usage errors
            print(f"sodaprof: {error.format_message()} See: sodaprof --help", file=sys.stderr)
            code = error.exit_code
        elif type(error).__name__ == "OutOfMemoryError":
            code = _fail("The GPU is out of memory. Lower --batch-size.")
        else:
            raise
    sys.exit(code if isinstance(code, int) else 0)


def _fail(message: str, code: int = 1) -> int:
    print(f"sodaprof: {message}", file=sys.stderr)
    return code
