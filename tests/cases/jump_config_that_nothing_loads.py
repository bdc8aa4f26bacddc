"""What sodaprof.scheduler returns refuses save_pretrained in words, but its other doors stay open. Exits 1 while any holds:

1. save_config writes a scheduler_config.json of class JumpScheduler, which no loader can read
2. from_pretrained / from_config of that class raise "missing 1 required positional argument", not words
3. pipe.save_pretrained is refused after it has written the weights: a folder without model_index.json is left
"""
import os, sys, tempfile
import os; sys.path.insert(0, os.environ.get("PROJECT", "."))
import diffusers, sodaprof
diffusers.utils.logging.set_verbosity_error()
from tests.tiny_pipelines import tiny_pipe
from tests.updated import RESTING, updated

pipe = tiny_pipe(); pipe.scheduler = sodaprof.scheduler(updated(pipe, RESTING)); cls = type(pipe.scheduler)
faults = []
with tempfile.TemporaryDirectory() as folder:
    try:
        pipe.scheduler.save_config(folder + "/scheduler")
        faults.append(f"1: save_config wrote {os.listdir(folder + '/scheduler')}")
        for name, load in (("from_pretrained", lambda: cls.from_pretrained(folder + "/scheduler")), ("from_config", lambda: cls.from_config(pipe.scheduler.config))):
            try: load()
            except sodaprof.SodaprofError: pass
            except Exception as error: faults.append(f"2: {name}: {type(error).__name__}: {error}")
    except sodaprof.SodaprofError as error: print("refused:", error)
    try: pipe.save_pretrained(folder + "/pipe")
    except sodaprof.SodaprofError:
        left = [f for _, _, files in os.walk(folder + "/pipe") for f in files]
        if left: faults.append(f"3: pipe.save_pretrained was refused and left {left}")
print("\n".join(faults) or "none")
sys.exit(bool(faults))
