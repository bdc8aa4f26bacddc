"""The command that says what will be captured: doctor."""

from __future__ import annotations

import json

from .options import Json, Model, Steps, make_console, say_next


def doctor(model: Model, steps: Steps = None, as_json: Json = False) -> None:
    """Say what of a model CUDA graphs cannot hold, and what to do about it. Needs no GPU: one step runs on the CPU."""
    from ..doctor.diagnose import diagnose
    from ..pipelines.load import default_steps, load_pipeline
    from ..report.diagnosis import diagnosis_view

    console = make_console(stderr=as_json)
    pipe = load_pipeline(model, device="cpu")
    steps = default_steps(pipe) if steps is None else steps
    result = diagnose(pipe, model, steps)
    if as_json:
        print(json.dumps(result))
        return
    console.print(diagnosis_view(result))
    refused = any(found["kind"] == "sites" for found in result["findings"])
    say_next(
        console, f"sodaprof inspect {model}" if refused else f"sodaprof profile {model} --steps {steps} -o profile"
    )
