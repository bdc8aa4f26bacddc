"""How long one call of a pipeline's transformer takes, compiled by Inductor and, on a GPU, in a CUDA graph captured by hand.

    python -m tests.studies.compiled MODEL OUT.json [--device cuda --dtype bfloat16 --mode max-autotune-no-cudagraphs]

The number to hold a captured step of this project against: the same transformer, arguments and batch, without its pipeline.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from sodaprof.formats.files import write_json
from sodaprof.pipelines.device import device_facts, versions
from sodaprof.pipelines.load import default_guidance, default_prompts, load_pipeline
from sodaprof.pipelines.recording import record_step


def captured(run: Callable[[], object]) -> Callable[[], object]:
    """Returns a replay of run()."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def median_ms(run: Callable[[], object], cuda: bool, rounds: int = 20) -> float:
    times = []
    for _ in range(rounds):
        began = time.perf_counter()
        run()
        if cuda:
            torch.cuda.synchronize()
        times.append((time.perf_counter() - began) * 1e3)
    return statistics.median(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("out", type=Path)
    parser.add_argument("--device")
    parser.add_argument("--dtype")
    parser.add_argument("--mode", default="max-autotune-no-cudagraphs")
    args = parser.parse_args()
    pipe = load_pipeline(args.model, args.dtype, args.device)
    cuda = "cuda" in str(pipe.device)
    step = record_step(pipe, default_prompts(pipe)[:1], 20, default_guidance(pipe))
    name, given, named = step.calls[0]
    transformer = pipe.components[name]
    with torch.no_grad():
        plain = lambda: transformer(*given, **named)  # noqa: E731
        plain()
        compiled = torch.compile(transformer, mode=args.mode)
        fast = lambda: compiled(*given, **named)  # noqa: E731
        fast()
        found = {"plain_ms": median_ms(plain, cuda), "compiled_ms": median_ms(fast, cuda)}
        if cuda:
            found["captured_ms"] = median_ms(captured(fast), cuda)
    device = str(pipe.device)
    write_json(
        args.out,
        {"format": "sodaprof.compiled", "model": args.model, "mode": args.mode, "device": device,
         "hardware": device_facts(device), "dtype": str(transformer.dtype), "versions": versions(),
         "command": "python -m tests.studies.compiled " + " ".join(sys.argv[1:])} | found,
        force=True,
    )  # fmt: skip
    print(found)


if __name__ == "__main__":
    main()
