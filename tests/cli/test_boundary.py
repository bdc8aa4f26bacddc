"""What ends a command: exceptions, interrupts, numbers out of range, full disks, and what names in files may not do."""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import sys
import time
from pathlib import Path

import pytest
import torch
from msgspec.structs import replace

from sodaprof import cli
from sodaprof.errors import LONGEST, FormatError, SodaprofError, out_of_memory, printable
from sodaprof.formats.cost import load_cost, save_cost
from sodaprof.formats.schedule_file import load_schedule
from sodaprof.pipelines.entries import read_prompts

HUGE = 99999999999999999999


@pytest.fixture
def failing(command, schedule, monkeypatch):
    """Returns a function that runs `show` while reading the schedule raises the exception -> (exit code, message)."""

    def run(error):
        def fail(*_):
            raise error

        with monkeypatch.context() as patch:
            patch.setattr("sodaprof.formats.schedule_file.load_schedule", fail)
            code, _, said = command("show", schedule)
        return code, said

    return run


def test_an_unknown_exception_is_reported_with_a_file(failing, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    code, said = failing(KeyError("\x1b[31mlost"))
    assert code == 70
    (file,) = tmp_path.iterdir()
    assert str(file) in said
    assert "\x1b" not in said
    assert "Traceback (most recent call last)" in file.read_text()
    assert "sodaprof show" in file.read_text()


def test_a_report_that_cannot_be_written_is_printed(failing, monkeypatch):
    monkeypatch.setattr("tempfile.NamedTemporaryFile", lambda *_, **__: (_ for _ in ()).throw(OSError("read-only")))
    monkeypatch.setattr("traceback.format_exception", lambda _: ["the lines\n"])
    code, said = failing(KeyError("lost"))
    assert code == 70
    assert "the lines" in said
    assert "no file could be written: read-only" in said


def chained(error, cause):
    error.__context__ = cause
    return error


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to"
        ),
        OSError(12, "Cannot allocate memory"),
        RuntimeError("std::bad_alloc"),
        ImportError("libtorch.so: failed to map segment from shared object"),
        chained(FormatError("model: not loadable. Save or fetch it anew."), MemoryError()),
    ],
    ids=lambda error: type(error).__name__,
)
def test_lack_of_memory(failing, error):
    assert out_of_memory(error)
    code, said = failing(error)
    assert (code, said) == (1, "sodaprof: Out of memory. Free some memory: the schedule is large.\n")


def test_the_allocator_of_torch_says_that_memory_is_out(failing):
    with pytest.raises(RuntimeError) as found:
        torch.empty(2**55)
    assert failing(found.value)[0] == 1


def test_every_verb_says_what_to_lower():
    assert set(cli.LOWER) == {name for name, _, _ in cli.COMMANDS}
    assert not out_of_memory(SodaprofError("out of memory"))  # of a file's name, say
    assert not out_of_memory(ImportError("cannot allocate memory in static TLS block"))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupts(command, schedule, monkeypatch, number):
    asked = signal.getsignal(number)
    if number == signal.SIGINT:  # a job in the background inherits that it is ignored
        signal.signal(number, signal.default_int_handler)
    before = signal.getsignal(number)

    def interrupted(*_):
        os.kill(os.getpid(), number)
        time.sleep(10)

    monkeypatch.setattr("sodaprof.formats.schedule_file.load_schedule", interrupted)
    code, _, said = command("show", schedule)
    assert code == 128 + number
    assert said.endswith("sodaprof: Interrupted. No file was left incomplete.\n")
    assert signal.getsignal(number) is before
    signal.signal(number, asked)


class Ending:
    def __del__(self):
        terminate()


def terminate():
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(0.01)


@pytest.mark.parametrize("dropped", ["in a __del__", "by a library", "nowhere"])
def test_an_interrupt_that_is_dropped_is_repeated_and_cleaning_up_is_not_disturbed(
    command, schedule, monkeypatch, dropped
):
    before, hook, cleaned = signal.getsignal(signal.SIGALRM), sys.unraisablehook, []

    def interrupted(*_):
        try:
            if dropped == "in a __del__":
                Ending()
            elif dropped == "by a library":
                with contextlib.suppress(BaseException):
                    terminate()
            else:
                terminate()
            time.sleep(10)
        finally:
            time.sleep(2.5 * cli.REPEAT)
            cleaned.append(True)

    monkeypatch.setattr("sodaprof.formats.schedule_file.load_schedule", interrupted)
    began = time.monotonic()
    code, _, said = command("show", schedule)
    assert (code, cleaned, said) == (143, [True], "sodaprof: Interrupted. No file was left incomplete.\n")
    assert time.monotonic() - began < 8
    assert (signal.getsignal(signal.SIGALRM), sys.unraisablehook) == (before, hook)
    assert signal.getitimer(signal.ITIMER_REAL) == (0, 0)


@pytest.mark.parametrize(
    ("command_line", "option", "values"),
    [
        (("profile", "m", "-o", "p"), "--samples", (0, HUGE)),
        (("profile", "m", "-o", "p"), "--steps", (0, HUGE)),
        (("profile", "m", "-o", "p"), "--batch-size", (0, HUGE)),
        (("profile", "m", "-o", "p"), "--max-interval", (1, HUGE)),
        (("profile", "m", "-o", "p"), "--seed", (-1, HUGE)),
        (("profile", "m", "-o", "p"), "--guidance-scale", ("nan", "inf", -1)),
        (("eval", "m", "s.json"), "--samples", (1, HUGE)),
        (("eval", "m", "s.json"), "--seed", (-1, HUGE)),
        (("eval", "m", "s.json"), "--batch-size", (0, HUGE)),
        (("refine", "m", "s.json", "-o", "r"), "--samples", (0, HUGE)),
        (("refine", "m", "s.json", "-o", "r"), "--evaluations", (-1, HUGE)),
        (("refine", "m", "s.json", "-o", "r"), "--seed", (-1, HUGE)),
        (("refine", "m", "s.json", "-o", "r"), "--time", ("0s", "1e308h", "nans")),
        (("refine", "m", "s.json", "-o", "r"), "--max-cache", ("0KB", "1e308GB")),
        (("bench", "m"), "--rounds", (0, HUGE)),
        (("bench", "m"), "--steps", (0, HUGE)),
        (("inspect", "m"), "--steps", (0, HUGE)),
        (("doctor", "m"), "--steps", (0, HUGE)),
        (("run", "m", "-o", "p.png", "--label", 1), "--height", (0, HUGE)),
        (("run", "m", "-o", "p.png", "--label", 1), "--seed", (-1, HUGE)),
        (("run", "m", "-o", "p.png", "--label", 1), "--steps", (0, HUGE)),
        (("compile", "m", "-o", "new.json"), "--budget", ("0.5x", "1e300x", "infms", "nan")),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else value,
)
def test_numbers_out_of_range_are_refused_before_anything_is_read(
    command, schedule, tmp_path, monkeypatch, command_line, option, values
):
    monkeypatch.chdir(tmp_path)
    Path("s.json").write_bytes(schedule.read_bytes())
    for value in values:
        code, _, said = command(*command_line, f"{option}={value}")
        assert code == 1
        assert said.count("\n") == 1
        assert "expected" in said
        assert str(value).rstrip("0") in said


def test_wrong_usage_points_to_the_help_of_the_verb(command):
    code, _, said = command("eval", "m")
    assert code == 2
    assert "Missing argument 'FILE...'. See: " in said
    assert said.endswith("eval --help\n")
    code, _, said = command("eval", "m", "s.json", "--samples", "9" * 5000)
    assert code == 2
    assert len(said) < LONGEST + 20
    assert "eval --help" in said


def test_output_that_cannot_be_written_after_the_file_is_complete(profiled, target, monkeypatch, capsys):
    class Full(io.StringIO):
        def write(self, text):
            raise OSError(28, "No space left on device")

        def fileno(self):
            return os.open(os.devnull, os.O_WRONLY)

    monkeypatch.setattr(sys, "stdout", Full())
    monkeypatch.setattr(sys, "argv", ["sodaprof", "compile", str(profiled), "--policy", "fora", "-o", str(target)])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 1
    load_schedule(target)
    assert (
        f"Standard output cannot be written (No space left on device). Complete: {target}." in capsys.readouterr().err
    )


@pytest.mark.parametrize("width", ["0", "-1", "²", "3", "99999999999", "wide"])
def test_a_width_that_no_terminal_has(done, schedule, monkeypatch, width):
    expected = done("show", schedule)
    monkeypatch.setattr(sys, "argv", ["sodaprof", "show", str(schedule)])
    for name in ("COLUMNS", "LINES"):
        monkeypatch.setenv(name, width)
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 0
    assert expected


@pytest.mark.parametrize("part", ["name", "knob", "device", "broken"])
def test_nothing_in_a_file_acts_on_the_terminal(command, schedule, tmp_path, part):
    text = "\x1b[31m\x9b2J\u202e\x07[bold]x[/nothing]:smile:\n"
    data = json.loads(schedule.read_text())
    if part == "name":
        data["policy"]["name"] = text + "y" * 10**6
    elif part == "knob":
        data["policy"]["knobs"] = {text: text}
    elif part == "device":
        data["measured"] = [{"device": text, "samples": 3}]
    else:
        data["format"] = text + "y" * 10**6
    (tmp_path / "evil.json").write_text(json.dumps(data))
    code, out, err = command("show", tmp_path / "evil.json")
    assert code == (part == "broken")
    said = out + err
    assert not set("\x1b\x9b\u202e\x07") & set(said)
    assert "[bold]x[/nothing]:smile:" in said
    assert "\\x1b[31m\\x9b2J\\u202e\\x07" in said
    assert len(said) < 5000


def test_messages_are_cut_in_the_middle():
    assert printable("a" * 50 + "end", 40).endswith("aaend")
    assert len(printable("\x00" * 10**6, 40)) <= 40
    assert len(str(SodaprofError("y" * 10**7 + " Type this."))) <= LONGEST
    assert str(SodaprofError("y" * 10**7 + " Type this.")).endswith(" Type this.")


def test_prompts_with_a_byte_order_mark_or_long_numbers(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_bytes(b"\xef\xbb\xbf# a comment\n3\n")
    assert read_prompts(path) == [3]
    path.write_text("1\n" + "7" * 5000 + "\n")
    with pytest.raises(FormatError, match=r"77… is a number of 5000 digits; labels have at most 18"):
        read_prompts(path)


def test_a_profile_of_few_steps_adapts_its_longest_interval(done, model, tmp_path):
    done("profile", model, "--steps", 6, "--samples", 1, "-o", tmp_path / "p")
    assert json.loads((tmp_path / "p" / "manifest.json").read_text())["max_interval"] == 6


def test_budgets_in_milliseconds(command, done, profiled, tmp_path):
    flops = load_cost(profiled / "cost.flops.json")
    cost, output = tmp_path / "cost.json", tmp_path / "s.json"
    save_cost(replace(flops, unit="ms"), cost)
    asked = ("compile", profiled, "--policy", "fora", "-o", output, "--force")
    done(*asked, "--cost", cost, "--budget", "2x")
    predicted = load_schedule(output).predicted
    full = predicted["cost"] * predicted["speedup"]
    done(*asked, "--cost", cost, "--budget", f"{full / 2}ms")
    assert load_schedule(output).predicted == predicted
    code, _, said = command(*asked, "--cost", cost, "--budget", f"{full * 2}ms")
    assert code == 1
    assert f"the loop takes {full:.4g} ms with every step full" in said
    done(*asked, "--cost", cost, "--budget", said.rsplit("--budget ", 1)[1].strip())
    for costs in ((), ("--cost", profiled / "cost.flops.json")):
        code, _, said = command(*asked, *costs, "--budget", "50ms")
        assert code == 1
        assert "sodaprof bench MODEL --cost cost.json" in said
