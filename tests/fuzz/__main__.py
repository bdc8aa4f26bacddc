"""`python -m tests.fuzz`: legal files of every kind are read as written, changed ones are refused with a SodaprofError.

Prints the smallest example of each kind of fault, then one summary line; exits 1 if there is a fault.
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
import time

from tests.fuzz.check import one_chunk
from tests.fuzz.readers import READERS

CHUNK = 500


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--schedules", type=int, default=10_000)
    parser.add_argument("--others", type=int, default=2_000, help="files of each other kind")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("names", nargs="*", metavar="KIND", help=f"kinds of files: {', '.join(READERS)}")
    given = parser.parse_args()
    counts = {n: given.schedules if n == "schedule" else given.others for n in given.names or READERS}
    tasks = [(n, min(CHUNK, count - i), given.seed + i) for n, count in counts.items() for i in range(0, count, CHUNK)]
    began, found = time.monotonic(), set[str]()
    with multiprocessing.get_context("spawn").Pool(given.processes) as pool:
        for name, faults in pool.imap_unordered(one_chunk, tasks):
            for fault, (size, change) in sorted(faults.items()):
                if (line := f"{name}: {fault}") not in found:
                    found.add(line)
                    print(f"{line}\n  smallest example, {size} bytes: {change!r:.300}", flush=True)
    number = len(found)
    print(
        f"fuzz: {sum(counts.values())} files of {len(counts)} kinds, seed {given.seed}, {time.monotonic() - began:.0f} s: "
        f"{number or 'no'} fault{'s' * (number != 1)}"
    )
    return bool(number)


if __name__ == "__main__":
    sys.exit(main())
