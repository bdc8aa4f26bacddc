"""The command line: from inspect and profile over compile and refine to run and eval. Errors become one message and an exit code.

Exit codes: 0 success, 1 an error, 2 wrong usage, 70 a bug of sodaprof, 130 and 143 an interrupt (SIGINT, SIGTERM).
"""

from __future__ import annotations

import contextlib
import errno
import os
import platform
import signal
import sys
import tempfile
import traceback
from collections.abc import Sequence
from typing import Annotated, Any

import typer

from ..errors import LONGEST, SodaprofError, causes, out_of_memory, printable
from ..version import __version__
from . import console
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
REPEAT = 0.3  # seconds after which an interrupt that was dropped is raised again
BUG = 70  # exit code of an exception that no one expects: EX_SOFTWARE of sysexits.h
LOWER = {  # verb -> what takes less memory
    "profile": "Lower --batch-size, or --max-interval; or give --states-only.",
    "compile": "With --fit give a smaller model; without, a profile of fewer steps or a smaller --max-interval.",
    "refine": "Lower --samples.",
    "show": "Free some memory: the schedule is large.",
    "run": "Give fewer --prompt or --label at once, a smaller --height and --width, or --dtype bfloat16.",
    "ship": "Free some memory, or close other programs.",
    "eval": "Lower --batch-size, then --samples.",
    "bench": "Lower --batch-size, or give --dtype bfloat16.",
    "inspect": "Give --dtype bfloat16, or a smaller model.",
    "doctor": "Free some memory, or give a smaller model: doctor runs a step on the CPU.",
}
AGAIN = {  # verb -> what follows an interrupt
    "profile": " Repeat the command, and it continues.",
    "refine": " Repeat the command, and it continues; the best schedule found so far is in its file.",
}
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
    """Runs the command line. Every exception ends in one message and an exit code, without a traceback."""
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    received: list[int] = []
    hook = sys.unraisablehook
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def interrupt(number: int, frame: Any) -> None:
        # Python drops what is raised in a `__del__` or in the callback of a weak reference, and some libraries drop it in an
        # `except:`. So it is raised again until it has left the command; what cleans up meanwhile is not disturbed.
        before.setdefault(signal.SIGALRM, signal.signal(signal.SIGALRM, interrupt))
        signal.setitimer(signal.ITIMER_REAL, REPEAT)
        if number != signal.SIGALRM:
            received.append(number)
        elif any(isinstance(one, KeyboardInterrupt) for one in causes(sys.exc_info()[1])):
            return
        raise KeyboardInterrupt

    # says nothing of an interrupt that Python drops, since it is raised again
    sys.unraisablehook = lambda dropped: None if dropped.exc_type is KeyboardInterrupt else hook(dropped)
    for number, handler in before.items():
        if handler is not signal.SIG_IGN:  # ignored: a command in the background of a script
            signal.signal(number, interrupt)
    console.written.clear()
    try:
        with contextlib.redirect_stdout(console.Output(sys.stdout)):
            code = app(standalone_mode=False)
            if code == 130:  # what typer returns after an interrupt
                raise KeyboardInterrupt
            sys.stdout.flush()
        code = code if isinstance(code, int) else 0
    except (Exception, KeyboardInterrupt) as error:
        message, code = describe(error, received)
        print(f"sodaprof: {printable(message, LONGEST)}", file=sys.stderr)
    finally:
        if received:
            signal.setitimer(signal.ITIMER_REAL, 0)
        sys.unraisablehook = hook
        for number, handler in before.items():
            signal.signal(number, handler)
    sys.exit(code)


def describe(error: BaseException, received: Sequence[int] = ()) -> tuple[str, int]:
    """Returns the message and the exit code for an exception that ends a command; received: the signals that came."""
    verb = next((word for word in sys.argv[1:] if word in LOWER), "")
    stopped = any(isinstance(one, KeyboardInterrupt) for one in causes(error))
    if stopped:
        again = AGAIN.get(verb, "")
        return f"Interrupted. No file was left incomplete.{again}", 128 + (received[-1] if received else signal.SIGINT)
    if out_of_memory(error):
        gpu = any("OutOfMemoryError" in type(one).__name__ or "CUDA" in str(one) for one in causes(error))
        return f"{'The GPU is out' if gpu else 'Out'} of memory. {LOWER.get(verb, 'Free some memory.')}", 1
    if isinstance(error, SodaprofError):
        return str(error), 1
    if hasattr(error, "format_message") and hasattr(error, "exit_code"):  # usage errors of click, or of typer's copy
        context = getattr(error, "ctx", None)
        return (
            f"{error.format_message().rstrip('.')}. See: {context.command_path if context else 'sodaprof'} --help",
            error.exit_code,
        )
    if isinstance(error, UnicodeEncodeError):
        shown = error.object[error.start]
        return f"The output takes {error.encoding} only, which has no {shown!r}. Set PYTHONIOENCODING=utf-8.", 1
    if isinstance(error, OSError):
        return _describe_system(error), 1
    if isinstance(error, ImportError):
        return f"A library cannot be imported ({error}). Install sodaprof and what it needs again: pip install .", 1
    return _report(error), BUG


def _describe_system(error: OSError) -> str:
    """Returns the message for an error of the operating system."""
    reason = "The disk is full" if error.errno == errno.ENOSPC else f"{error.strerror or error}"
    if isinstance(error, console.OutputError):
        files = f"Complete: {', '.join(console.written)}." if console.written else "No file was written."
        return f"Standard output cannot be written ({error.strerror or error}). {files}"
    return f"{reason}{f' ({error.filename})' if error.filename else ''}. No file was left incomplete."


def _report(error: BaseException) -> str:
    """Writes the traceback of an unknown exception to a file, and returns the message that names it."""
    lines = [
        f"sodaprof {__version__}, Python {platform.python_version()}, {sys.platform}",
        console.command_line(),
    ]
    for library in ("torch", "diffusers", "transformers", "numpy"):
        lines.append(f"{library} {getattr(sys.modules.get(library), '__version__', 'not imported')}")
    text = "\n".join([*lines, "", *traceback.format_exception(error)])
    reason = printable(f"{type(error).__name__}: {error}", 300)
    try:
        with tempfile.NamedTemporaryFile("w", prefix="sodaprof-", suffix=".txt", delete=False, encoding="utf-8",
                                         errors="backslashreplace") as file:  # fmt: skip
            file.write(text)
    except OSError as failed:
        print(printable(text, kept="\n"), file=sys.stderr)
        return f"A bug of sodaprof: {reason}. Report it with the traceback above (no file could be written: {failed})."
    return f"A bug of sodaprof: {reason}. Report it with the traceback in {file.name}"
