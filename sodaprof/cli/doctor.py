"""`sodaprof doctor`."""

from __future__ import annotations

from .console import make_console, print_next, print_result
from .options import Json, Model, Steps


def doctor(model: Model, steps: Steps = None, as_json: Json = False) -> None:
    """Find what keeps a model out of CUDA graphs, and say how to change it. Needs no GPU: one step runs on the CPU."""
    from ..doctor.diagnose import diagnose
    from ..pipelines.load import default_steps, load_pipeline
    from ..report.results import diagnosis_view

    console = make_console(stderr=as_json)
    pipe = load_pipeline(model, device="cpu")
    steps = default_steps(pipe) if steps is None else steps
    result = diagnose(pipe, model, steps)
    print_result(console, result, lambda: diagnosis_view(result), as_json)
    if as_json:
        return
    no_sites = any(found["kind"] == "sites" for found in result["findings"])
    print_next(
        console, f"sodaprof inspect {model}" if no_sites else f"sodaprof profile {model} --steps {steps} -o profile"
    )
