"""Runs the parts one after the other, each in a process of its own with a time limit.

    python3 -m tests.gpu [--out build/gpu] [--wheels FOLDER] [--device cuda] [--rehearsal] [--seconds 480] [--only PART ...]

Nothing is installed into the Python that runs this: wheels go to a folder of their own, which only the parts see. Imports
the standard library only: other packages may be in the wheels.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
# seconds, at most; the most important part first
PARTS = {"correct": 110.0, "dit": 210.0, "profiling": 70.0, "pixart": 90.0}
SECONDS = 480.0
PATIENCE = 4.0  # a rehearsal may take so many times as long: its CPU may be busy with other work


def main() -> int:
    parser = argparse.ArgumentParser(prog="python3 -m tests.gpu")
    parser.add_argument("--out", type=Path, default=Path("build/gpu"))
    parser.add_argument("--wheels", type=Path, help="a folder of wheels that the base Python lacks")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--rehearsal", action="store_true", help="tiny networks, without network access")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="for all parts together, outside of a rehearsal")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    given = parser.parse_args()
    began, patience = time.monotonic(), PATIENCE if given.rehearsal else 1.0
    given.out.mkdir(parents=True, exist_ok=True)
    (given.out / "log.txt").unlink(missing_ok=True)
    with tempfile.TemporaryDirectory(prefix="wheels-") as site:
        path = [str(ROOT)]
        if given.wheels is not None:
            install(given.wheels, Path(site))
            path.insert(0, site)
        environment = {
            **os.environ, "PYTHONPATH": os.pathsep.join(path), "PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1",
            "TRANSFORMERS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false",
        }  # fmt: skip
        prefix, network = isolation() if given.rehearsal else ([], "as the machine's")
        summary: dict[str, Any] = {
            "format": "sodaprof.gpu.run", "version": 1, "device": given.device, "rehearsal": given.rehearsal,
            "network": network, "python": sys.version.split()[0], "gpu": gpu_facts(), "parts": [],
        }  # fmt: skip
        for part in given.only:
            left = patience * given.seconds - (time.monotonic() - began)
            command = [*prefix, sys.executable, "-m", f"tests.gpu.{part}", "--out", str(given.out.resolve())]
            command += ["--device", given.device, *(["--rehearsal"] if given.rehearsal else [])]
            limit = min(patience * PARTS[part], left)
            summary["parts"].append(run(part, command, environment, limit, given.out / "log.txt"))
            summary["seconds"] = round(time.monotonic() - began, 1)
            write(given.out / "run.json", summary)
            print(summary["parts"][-1], flush=True)
    print(f"network: {network}; {summary['seconds']} s, {cpu_seconds():.1f} s of one core; results in {given.out}")
    return 0 if all(part["status"] == "passed" for part in summary["parts"]) else 1


def run(part: str, command: list[str], environment: dict[str, str], limit: float, log: Path) -> dict[str, Any]:
    """Returns the status of a part: passed, failed, stopped at its limit, or not started because no time was left."""
    if limit < 5:
        return {"part": part, "status": "not started", "seconds": 0.0}
    began, used = time.monotonic(), cpu_seconds()
    with log.open("ab") as out:
        out.write(f"==== {part}\n".encode())
        out.flush()
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=out, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            code = process.wait(timeout=limit)
            status = "passed" if code == 0 else "failed"
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # with the compilers that it started
            code, status = process.wait(), "stopped"
    took = {"seconds": round(time.monotonic() - began, 1), "cpu_seconds": round(cpu_seconds() - used, 1)}
    return {"part": part, "status": status, "code": code} | took


def cpu_seconds() -> float:
    """Returns the processor time of all parts that ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def install(wheels: Path, site: Path) -> None:
    """Installs all wheels of a folder into another; exits with a message if pip fails."""
    found = sorted(map(str, wheels.glob("*.whl")))
    if not found:
        sys.exit(f"No wheels in {wheels}. Fill it as docs/gpu.md says, or leave --wheels out.")
    options = ["--quiet", "--no-index", "--no-deps", "--no-compile", "--no-cache-dir", "--target", str(site)]
    if subprocess.run([sys.executable, "-m", "pip", "install", *options, *found]).returncode:
        sys.exit(f"pip could not install the wheels of {wheels}.")


def isolation() -> tuple[list[str], str]:
    """Returns the command that runs a process without network, and what to report about it."""
    unshare = shutil.which("unshare")
    if unshare and subprocess.run([unshare, "-rn", "true"], capture_output=True).returncode == 0:
        return [unshare, "-rn"], "none (a network namespace of its own)"
    return [], "as the machine's: unshare -rn is not permitted here"


def gpu_facts() -> str:
    """Returns name, driver and memory of the GPU as nvidia-smi reports them; "" without it."""
    query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
    try:
        return subprocess.run(query, capture_output=True, text=True, timeout=30, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def write(path: Path, data: dict[str, Any]) -> None:
    part = path.with_suffix(".partial")
    part.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    part.replace(path)


if __name__ == "__main__":
    sys.exit(main())
