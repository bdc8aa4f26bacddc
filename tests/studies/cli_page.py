"""Makes docs/cli.md from the commands themselves: `python -m tests.studies.cli_page [docs/cli.md]`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import typer.main

from sodaprof.cli import app

HEAD = """# Command line

Made by `make docs` from the commands; each prints this with `--help`. Exit codes are in [formats](formats.md#7-exit-codes). The
[tutorial](tutorial.md) shows what the commands print.

| command | purpose |
| --- | --- |
"""


def page() -> str:
    """Returns the page in Markdown: one section a command, one table row an argument or option."""
    commands: dict[str, Any] = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    index = [f"| [`{name}`](#{name}) | {_cell(command.help)} |" for name, command in commands.items()]
    return HEAD + "\n".join(index) + "\n" + "".join(_section(name, command) for name, command in commands.items())


def _section(name: str, command: Any) -> str:
    context = command.make_context(name, [], resilient_parsing=True)
    usage = " ".join(["sodaprof", name, *command.collect_usage_pieces(context)])
    records = [parameter.get_help_record(context) for parameter in command.params]
    rows = [f"| `{names}` | {_cell(meaning)} |" for names, meaning in filter(None, records)]
    table = "\n".join(["| argument or option | meaning |", "| --- | --- |", *rows])
    example = command.epilog.replace("\b", "").strip()
    return f"\n## {name}\n\n{_cell(command.help)}\n\n```\n{usage}\n\n{example}\n```\n\n{table}\n"


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


if __name__ == "__main__":
    Path(sys.argv[1] if len(sys.argv) > 1 else "docs/cli.md").write_text(page(), encoding="utf-8")
