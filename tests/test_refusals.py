"""Every refusal has a row in `tests/refusals.py`, and the advice of those that users of a pipeline reach works when followed."""

from __future__ import annotations

import ast
import copy
import functools
import re
import threading
from collections.abc import Callable
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0

import sodaprof
from sodaprof import errors
from sodaprof.errors import SodaprofError
from sodaprof.formats.schedule import TokenRule
from sodaprof.pipelines.recording import record_step
from sodaprof.runtime.compiled.engine import Compiled
from tests.refusals import REFUSALS
from tests.runtime.sampler.test_network_times import before_skips
from tests.tiny_flux import draw_rows, flux_pipe, flux_schedule
from tests.tiny_pipelines import STEPS, TwoPassPipeline, clone, draw, schedule_for, tiny_pipe
from tests.two_transformers import draw as draw_wan
from tests.two_transformers import small_wan
from tests.updated import CALLED, RESTING, pipe_of, with_update
from tests.zoo.zoo_pipelines import PIPELINES

SOURCE = Path(sodaprof.__file__).parent
ERRORS = {name for name, kind in vars(errors).items() if isinstance(kind, type) and issubclass(kind, SodaprofError)}
ADVICE: dict[str, Callable[[Any], None]] = {}


def template(node: ast.expr) -> str:
    """Returns the text of a message, with `{}` for what is filled in."""
    if isinstance(node, ast.JoinedStr):
        return "".join(map(template, node.values))
    return str(node.value) if isinstance(node, ast.Constant) else "{}"


def messages(path: Path) -> list[str]:
    """Returns the messages of a file's refusals: errors that are raised or returned, and calls of `Clock.refuse`."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        made = getattr(node, "exc", None) if isinstance(node, ast.Raise) else getattr(node, "value", None)
        if isinstance(node, (ast.Raise, ast.Return)) and getattr(getattr(made, "func", None), "id", "") in ERRORS:
            found.append(template(made.args[0]))
        if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "refuse":
            found.append(template(node.args[0]))
    return found


def row_of(message: str) -> str | None:
    """Returns the longest row that the message begins with; that of `{}` is for a message that is `{}`."""
    rows = [words for words in REFUSALS if message.startswith(words) and (words != "{}" or message == "{}")]
    return max(rows, key=len, default=None)


def test_every_refusal_has_a_row_and_every_row_a_refusal():
    folders = ("runtime", "pipelines", "cli")
    found = [message for f in folders for path in sorted((SOURCE / f).rglob("*.py")) for message in messages(path)]
    assert len(found) > 100
    assert [m for m in found if row_of(m) is None] == []
    assert set(REFUSALS) - {row_of(m) for m in found} == set()


def advice(words: str) -> Callable[[Callable[[Any], None]], None]:
    """Enters a test that reaches a refusal, and then does what it says: function(refused), where refused() is a block that
    must end in this refusal."""

    def enter(function: Callable[[Any], None]) -> None:
        ADVICE[words] = function

    return enter


def test_advice_is_followed_for_each_row_that_says_so():
    assert set(ADVICE) == {words for words, text in REFUSALS.items() if text.startswith("*")}


# ---- pipelines ----------------------------------------------------------------------------------------------------------


def step_of(pipe: Any) -> tuple[Any, Any]:
    """Returns the arguments of the network's first call."""
    return record_step(pipe, [1, 2], STEPS, 4.0).call_of("transformer")


def draw_around(pipe: Any, function: Callable[[], Any]) -> Any:
    """Draws, and calls the function once, before the network's fifth call."""
    left = [function, None, None, None, None]

    def before(*of_call: Any) -> None:
        if left and (then := left.pop()) is not None:
            then()

    hook = pipe.transformer.register_forward_pre_hook(before)
    try:
        return draw(pipe)
    finally:
        hook.remove()


def in_thread(function: Callable[..., Any], *args: Any) -> None:
    thread = threading.Thread(target=function, args=args)
    thread.start()
    thread.join()


# ---- apply ------------------------------------------------------------------------------------------------------------


@advice("The transformer was called outside a denoising loop")
def _(refused):
    pipe = tiny_pipe()
    args = step_of(pipe)
    sodaprof.apply(pipe, schedule_for(pipe))
    with refused():
        pipe.transformer(*args[0], **args[1])
    draw(pipe)
    draw(clone(pipe))
    sodaprof.remove(pipe)
    pipe.transformer(*args[0], **args[1])


@advice("apply({}=...) has been replaced:")
def _(refused):
    pipe = tiny_pipe()
    with refused('apply(pipe, schedule, runtime="compiled")'):
        sodaprof.apply(pipe, schedule_for(pipe), lower=True)
    sodaprof.apply(pipe, schedule_for(pipe), runtime="compiled")


@advice("The runtime {} has another name now:")
def _(refused):
    pipe = tiny_pipe()
    with refused("--runtime compiled"):
        sodaprof.apply(pipe, schedule_for(pipe), runtime="captured")
    sodaprof.apply(pipe, schedule_for(pipe), runtime="compiled")


@advice("No runtime {}; there are {}.")
def _(refused):
    pipe = tiny_pipe()
    with refused("--runtime compiled"):
        sodaprof.apply(pipe, schedule_for(pipe), runtime="fast")
    sodaprof.apply(pipe, schedule_for(pipe), runtime="compiled")


@advice("Another call of the pipeline began")
def _(refused):
    pipe = tiny_pipe(cls=TwoPassPipeline)
    alone = draw(pipe)
    with sodaprof.apply(pipe, schedule_for(pipe)):
        with refused("copy.deepcopy(pipe.scheduler)"):
            draw_around(pipe, lambda: in_thread(draw, pipe))
        other = clone(pipe)
        assert (draw_around(pipe, lambda: in_thread(draw, other)) == alone).all()


@advice("Rows of the batch changed places before")
def _(refused):
    pipe, schedule = flux_pipe(), flux_schedule(flux_pipe())
    exchange = lambda latents: latents.flip(0)  # noqa: E731
    sodaprof.apply(pipe, schedule)
    with refused("only before step 5, or remove the schedule: sodaprof.remove(pipe)"):
        draw_rows(pipe, exchange, after=1)
    draw_rows(pipe)
    draw_rows(pipe, exchange, after=4)
    sodaprof.remove(pipe)
    draw_rows(pipe, exchange, after=1)


@advice("The pipeline's scheduler was replaced")
def _(refused):
    pipe = tiny_pipe()
    handle = sodaprof.apply(pipe, schedule_for(pipe))
    pipe.scheduler = diffusers.DDIMScheduler(clip_sample=False, beta_end=0.01)
    with refused("remove() the schedule first"):
        draw(pipe)
    handle.remove()
    sodaprof.apply(pipe, schedule_for(pipe))
    draw(pipe)


@advice("The schedule is for {}, the pipeline has {}. {}")
def _(refused):
    schedule = schedule_for(tiny_pipe())
    pipe = pipe_of(sampler="dpm")
    with refused():
        sodaprof.apply(pipe, schedule)
    pipe.scheduler = diffusers.DDIMScheduler.from_config(pipe.scheduler.config)
    sodaprof.apply(pipe, schedule)


@advice("The scheduler carries a schedule already.")
def _(refused):
    pipe, other = tiny_pipe(), tiny_pipe()
    schedule = schedule_for(pipe)
    sodaprof.apply(pipe, schedule)
    other.scheduler = pipe.scheduler
    with refused("sodaprof.remove(pipe)"):
        sodaprof.apply(other, schedule)
    sodaprof.remove(other)
    sodaprof.apply(other, schedule)


@advice("The scheduler's {} is {}, {} in the")
def _(refused):
    pipe, schedule = tiny_pipe(), schedule_for(tiny_pipe())
    pipe.scheduler = diffusers.DDIMScheduler(clip_sample=False, beta_end=0.01)
    with refused("beta_end is 0.01, 0.02 in the schedule"):
        sodaprof.apply(pipe, schedule)
    pipe.scheduler.register_to_config(beta_end=0.02)
    sodaprof.apply(pipe, schedule)


@advice("With boundary_ratio={} the pipeline")
def _(refused):
    pipe = small_wan()
    schedule = before_skips(pipe, 550.45)
    pipe.register_to_config(boundary_ratio=0.6)
    with refused("at most 0.55045, say pipe.register_to_config(boundary_ratio=0.5255)"):
        sodaprof.apply(pipe, schedule)
    for ratio in (0.55045, 0.5255):
        pipe.register_to_config(boundary_ratio=ratio)
        with sodaprof.apply(pipe, schedule):
            draw_wan(pipe)


@advice("{} carries a schedule already. Remove")
def _(refused):
    pipe, other = tiny_pipe(), tiny_pipe()
    schedule = schedule_for(pipe)
    other.transformer = pipe.transformer
    handle = sodaprof.apply(pipe, schedule)
    with refused("copy.deepcopy(pipe.scheduler)"):
        sodaprof.apply(other, schedule)
    other.scheduler = copy.deepcopy(pipe.scheduler)
    draw(other)
    assert handle.report().complete
    sodaprof.remove(pipe)
    other.scheduler = diffusers.DDIMScheduler(clip_sample=False)
    sodaprof.apply(other, schedule)


@advice("Compiled: tables is {}; expected True,")
def _(refused):
    with refused():
        Compiled(tables="all")
    Compiled(tables="near")


@advice("Compiled: sums is {}; expected 'ordered',")
def _(refused):
    with refused():
        Compiled(sums="all")
    Compiled(sums="fused")


@advice("Compiled: whole_steps needs tables")
def _(refused):
    with refused("Leave tables and graphs as they are"):
        Compiled(whole_steps=True, graphs=False)
    Compiled(whole_steps=True)


@advice("{} called scaled_dot_product_attention")
def _(refused):
    pipe = tiny_pipe()
    rows = dict.fromkeys(schedule_for(pipe).transformers["transformer"].rows, "CPPCPPPC")
    schedule = schedule_for(pipe, rows, dict.fromkeys(rows, (5,) * 5), {}, TokenRule("attention_received", 0.5, 3))
    sodaprof.apply(pipe, schedule)
    pipe.transformer.transformer_blocks[0].attn1.set_processor(AttnProcessor())
    with refused("set_attention_backend"):
        draw(pipe)
    pipe.transformer.transformer_blocks[0].attn1.set_processor(AttnProcessor2_0())
    draw(pipe)


@advice("This pipeline was not loaded from a")
def _(refused):
    pipe = tiny_pipe()
    with refused("sodaprof.apply(pipe, 'schedule.json')"):
        sodaprof.apply(pipe)
    sodaprof.apply(pipe, schedule_for(pipe))


@advice("{} ships no schedules ({}/*.json).")
def _(command):
    command.refused("run", command.model, "--label", 1, "-o", command.out / "p.png")
    command.works("run", command.model, command.schedule, "--label", 1, "-o", command.out / "p.png")


# ---- the fitted update and its scheduler --------------------------------------------------------------------------------


def fitted(pipe: Any) -> Any:
    pipe.scheduler.set_timesteps(STEPS)
    return with_update(pipe, schedule_for(pipe), RESTING)


@advice("The schedule holds {} cells, which")
def _(refused):
    pipe = tiny_pipe()
    rows = dict.fromkeys(schedule_for(pipe).transformers["transformer"].rows, "CRCRCRCR")
    with refused("Run it with sodaprof.apply(pipe, schedule)"):
        sodaprof.scheduler(schedule_for(pipe, rows))
    sodaprof.apply(pipe, schedule_for(pipe, rows))


@advice("The schedule calls the network at {}")
def _(refused):
    pipe = tiny_pipe()
    pipe.scheduler = sodaprof.scheduler(fitted(pipe))
    with refused(f"num_inference_steps={CALLED}"):
        draw(pipe)
    draw(pipe, steps=CALLED)


@advice("There is no step to take: call set_timesteps")
def _(refused):
    pipe = tiny_pipe()
    jumps = pipe.scheduler = sodaprof.scheduler(fitted(pipe))
    draw(pipe, steps=CALLED)
    latents = torch.zeros(1, 4, 8, 8)
    with refused():
        jumps.step(latents, jumps.timesteps[0], latents)
    jumps.set_timesteps(CALLED)
    jumps.step(latents, jumps.timesteps[0], latents)


@advice("A fitted schedule is for eta 0 and")
def _(refused):
    pipe = tiny_pipe()
    jumps = sodaprof.scheduler(fitted(pipe))
    jumps.set_timesteps(CALLED)
    latents = torch.zeros(1, 4, 8, 8)
    with refused("without eta"):
        jumps.step(latents, jumps.timesteps[0], latents, eta=0.5)
    jumps.step(latents, jumps.timesteps[0], latents)


@advice("The pipeline calls the step of {} with")
def _(refused):
    pipe = tiny_pipe()
    schedule = fitted(pipe)
    args, kwargs = step_of(pipe)
    latents = torch.zeros(2, 4, 8, 8)
    with sodaprof.apply(pipe, schedule):
        for given in ({"eta": 0.5}, {}):
            pipe.scheduler.set_timesteps(STEPS)
            pipe.transformer(*args, **kwargs)
            with refused("Leave eta at 0") if given else nullcontext():
                pipe.scheduler.step(latents, pipe.scheduler.timesteps[0], latents, **given)


# ---- runs -----------------------------------------------------------------------------------------------------------------


@advice("The schedule is for {} timesteps {},")
def _(refused):
    pipe = tiny_pipe()
    sodaprof.apply(pipe, schedule_for(pipe))
    with refused(f"num_inference_steps={STEPS}"):
        draw(pipe, steps=5)
    draw(pipe, steps=STEPS)


@advice("The schedule was made for guidance")
def _(refused):
    pipe = tiny_pipe()
    sodaprof.apply(pipe, schedule_for(pipe))
    with refused("guidance_scale above 1"):
        draw(pipe, guidance_scale=1.0)
    draw(pipe, guidance_scale=1.5)


@advice("Step {} has {}, the first one had {}:")
def _(refused):
    pipe = tiny_pipe(cls=TwoPassPipeline)
    args, kwargs = step_of(pipe)
    sodaprof.apply(pipe, schedule_for(pipe))
    with refused("call the pipeline without what changes it"):
        draw_around(pipe, lambda: pipe.transformer(*args, **kwargs))
    draw(pipe)


@advice("The pipeline took step {} without calling")
def _(refused):
    pipe = tiny_pipe(cls=TwoPassPipeline)
    sodaprof.apply(pipe, schedule_for(pipe))
    pipe.scheduler.set_timesteps(STEPS)
    latents = torch.zeros(1, 4, 8, 8)
    with refused():
        pipe.scheduler.step(latents, pipe.scheduler.timesteps[0], latents)
    draw(pipe)
    sodaprof.remove(pipe)
    pipe.scheduler.step(latents, pipe.scheduler.timesteps[0], latents)


# ---- profile and inspect --------------------------------------------------------------------------------------------------


@advice("The pipeline carries a schedule; a")
def _(refused):
    pipe = tiny_pipe()
    sodaprof.apply(pipe, schedule_for(pipe))
    with refused("sodaprof.remove(pipe)"):
        schedule_for(pipe)
    sodaprof.remove(pipe)
    schedule_for(pipe)


@advice("{} carries another cache, {} of diffusers,")
def _(refused):
    case = PIPELINES["FluxPipeline"]()
    schedule = case.schedule()
    case.pipe.transformer.enable_cache(diffusers.FirstBlockCacheConfig(threshold=0.1))
    for call in (case.schedule, lambda: sodaprof.apply(case.pipe, schedule)):
        with refused("pipe.transformer.disable_cache()"):
            call()
    case.pipe.transformer.disable_cache()
    case.schedule()
    sodaprof.apply(case.pipe, schedule)
    case.draw()


@advice("{} carries another cache, cache-dit,")
def _(refused):
    pipe, schedule = tiny_pipe(), schedule_for(tiny_pipe())
    pipe.transformer._is_cached = True  # its mark; it is not installed here
    for call in (lambda: schedule_for(pipe), lambda: sodaprof.apply(pipe, schedule)):
        with refused("cache_dit.disable_cache(pipe)"):
            call()
    pipe.transformer._is_cached = False
    schedule_for(pipe)
    sodaprof.apply(pipe, schedule)


@advice("The pipeline samples with copies of")
def _(refused):
    class Copying(TwoPassPipeline):
        @functools.wraps(TwoPassPipeline.__call__)
        def __call__(self, *args, **kwargs):
            own = self.scheduler
            self.scheduler = copy.deepcopy(own)
            try:
                return super().__call__(*args, **kwargs)
            finally:
                self.scheduler = own

    with refused("This release profiles pipelines that sample with one scheduler"):
        schedule_for(tiny_pipe(cls=Copying))
    schedule_for(tiny_pipe(cls=TwoPassPipeline))


@advice("--steps is {}; expected at least 1.")
def _(command):
    command.refused("inspect", command.model, "--steps", 0)
    command.works("inspect", command.model, "--steps", 1)


@advice("{} does not take {} steps: {} Give")
def _(command):
    command.refused("inspect", command.model, "--steps", 5000)
    command.works("inspect", command.model, "--steps", 500)


@advice("{}: no such folder and no reference")
def _(command):
    command.refused("inspect", "tiny-dot")
    command.works("inspect", "tiny-dit", "--steps", 4)


@advice("--dtype is {}; expected float32, bfloat16")
def _(command):
    command.refused("inspect", command.model, "--dtype", "float8")
    command.works("inspect", command.model, "--steps", 4, "--dtype", "bfloat16")


@advice("--device is {}; expected one that torch")
def _(command):
    command.refused("inspect", command.model, "--device", "cuda:99")
    command.works("inspect", command.model, "--steps", 4, "--device", "cpu")


@advice("--scheduler {}: not a scheduler of")
def _(command):
    command.refused("inspect", command.model, "--scheduler", "DiTPipeline")
    command.works("inspect", command.model, "--steps", 4, "--scheduler", "DPMSolverMultistepScheduler")


def runs(command: Any, *wrong: Any, right: tuple[Any, ...] = ()) -> None:
    """`run` is refused with some options, and runs with others."""
    line = ("run", command.model, command.schedule, "-o", command.out / "p.png")
    command.refused(*line, *wrong)
    command.works(*line, *right)


@advice("{} takes {}. Give {} in place of --{}")
def _(command):
    runs(command, "--prompt", "a cat", right=("--label", 1))


@advice("Found the label {}; this model knows")
def _(command):
    runs(command, "--label", 5000, right=("--label", 9))


@advice("{} is {}; expected {}.")
def _(command):
    runs(command, "--label", 1, "--seed", -1, right=("--label", 1, "--seed", 2**64 - 1))


@advice("{} makes pictures of one size. Leave")
def _(command):
    runs(command, "--label", 1, "--height", 16, "--width", 16, right=("--label", 1))


@advice("Nothing to sample. Give --label N or")
def _(command):
    runs(command, right=("--label", 1))


@advice("Give --height and --width together,")
def _(command):
    runs(command, "--label", 1, "--height", 16, right=("--label", 1))


@advice("{} is for {} steps, not {}. Leave --steps")
def _(command):
    runs(command, "--label", 1, "--steps", 3, right=("--label", 1))


# ---- the test of them -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("words", ADVICE)
def test_advice(words, request):
    pattern = re.escape(words).replace(re.escape("{}"), "(?s:.*)")

    @contextmanager
    def refused(says=""):
        with pytest.raises(SodaprofError, match=f"^{pattern}") as caught:
            yield
        assert says in str(caught.value)

    ADVICE[words](refused if ADVICE[words].__code__.co_varnames[0] == "refused" else Commands(request, pattern))


class Commands:
    """Runs commands on the tiny model: those that end in the refusal, those that end well."""

    def __init__(self, request: Any, pattern: str) -> None:
        self.run, self.pattern = request.getfixturevalue("command"), pattern
        self.model, self.out = request.getfixturevalue("model"), request.getfixturevalue("tmp_path")
        self.schedule = self.out / "s.json"
        schedule_for(tiny_pipe()).save(self.schedule)

    def refused(self, *arguments: Any) -> None:
        code, _, err = self.run(*arguments)
        assert code == 1
        assert re.match(f"sodaprof: {self.pattern}", err)

    def works(self, *arguments: Any) -> None:
        code, _, err = self.run(*arguments)
        assert code == 0, err
