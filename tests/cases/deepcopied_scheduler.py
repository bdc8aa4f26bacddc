"""copy.deepcopy of a scheduler that carries a schedule: the copy's set_timesteps and step work on the ORIGINAL.

diffusers pipelines copy their scheduler inside __call__ (LTX2, Cosmos3, Kandinsky6, SkyReels). Exits 1 while the fault exists.
"""
import copy, sys
import os; sys.path.insert(0, os.environ.get("PROJECT", "."))
import torch, diffusers, sodaprof
diffusers.utils.logging.set_verbosity_error()
from tests.tiny_pipelines import STEPS, schedule_for, tiny_pipe

pipe = tiny_pipe()
schedule = schedule_for(pipe)
faults = []
with sodaprof.apply(pipe, schedule) as handle:
    pipe.scheduler.set_timesteps(STEPS)
    twin = copy.deepcopy(pipe.scheduler)
    before = pipe.scheduler.timesteps
    twin.timesteps = None
    try:
        twin.set_timesteps(STEPS)
        if twin.timesteps is None:
            faults.append("the copy's set_timesteps left the copy as it was")
        if pipe.scheduler.timesteps is not before:
            faults.append("the copy's set_timesteps set the timesteps of the original")
    except Exception as error:
        faults.append(f"{type(error).__name__}: {error}")
    x = torch.zeros(1, 4, 8, 8)
    own = diffusers.DDIMScheduler.from_config(pipe.scheduler.config); own.set_timesteps(STEPS)
    try:
        twin.step(x, own.timesteps[0], x)
    except Exception as error:
        faults.append(f"the copy's step: {type(error).__name__}: {error}")
print("\n".join(faults) or "none")
sys.exit(bool(faults))
