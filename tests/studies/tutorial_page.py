"""Runs the commands of docs/tutorial.md again and replaces their output and pictures in the page.

python -m tests.studies.tutorial_page [docs/tutorial.md]

A block that begins with ```console holds lines `$ command`, each followed by what it printed. The commands run in order in
build/tutorial, at 80 columns, with the `sodaprof` of this environment. Pictures that the page shows are copied from there.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
BLOCK = re.compile(r"(?<=```console\n).*?(?=^```$)", re.DOTALL | re.MULTILINE)
PICTURE = re.compile(r"!\[[^\]]*\]\(tutorial/([^)]+)\)")


def main() -> None:
    """Runs every command of the page, and writes the page and its pictures anew."""
    page = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "docs" / "tutorial.md"
    work = ROOT / "build" / "tutorial"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    text = BLOCK.sub(lambda block: rerun(block[0], work), page.read_text(encoding="utf-8"))
    page.write_text(text, encoding="utf-8")
    for name in PICTURE.findall(text):
        shutil.copyfile(work / name, page.parent / "tutorial" / name)


def rerun(block: str, work: Path) -> str:
    """Returns the block with the present output under each of its commands. Raises CalledProcessError if one fails."""
    commands = [line.removeprefix("$ ") for line in block.splitlines() if line.startswith("$ ")]
    return "\n".join(f"$ {command}\n{output(command, work)}" for command in commands)


def output(command: str, work: Path) -> str:
    """Returns what the command prints on a terminal of 80 columns, without trailing blanks."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = os.environ | {"COLUMNS": "80", "OMP_NUM_THREADS": "1", "PATH": path}
    print("$", command, flush=True)
    done = subprocess.run(
        command, shell=True, cwd=work, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    if done.returncode:
        print(done.stdout)
        done.check_returncode()
    return "".join(f"{line.rstrip()}\n" for line in done.stdout.splitlines())


if __name__ == "__main__":
    main()
