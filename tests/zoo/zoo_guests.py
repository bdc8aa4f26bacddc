"""Runs pipelines of `zoo_pipelines` under a schedule together with what users put on them: caches, adapters, copies, callbacks.

    python -m tests.zoo.zoo_guests [NAME...] [--markdown]

prints a row for each pair of GUESTS and RUNTIMES, a column for each pipeline, and the notes that the cells number. A cell is
"right" (the latents are those of the reference that the guest's function names), "refused" with a note that holds the first
words of the SodaprofError, "n/a" with a note that says why the guest does not apply, or WRONG. Exits with 1 if one is WRONG.
"""

from __future__ import annotations

import argparse
import copy
import inspect
import pickle
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import diffusers
import torch
from diffusers import hooks
from diffusers.utils.peft_utils import recurse_remove_peft_layers
from msgspec.structs import replace
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import Tensor

import sodaprof
from sodaprof.errors import SodaprofError
from sodaprof.formats.schedule import Forecast, Schedule
from tests.tiny_pipelines import clone, with_known_programs
from tests.updated import apart, with_update
from tests.zoo.zoo_check import expect, said
from tests.zoo.zoo_pipelines import PIPELINES, STEPS, Case, no_text, pooled

RUNTIMES = ("hooks", "compiled", "scheduler")
NAMES = (
    "FluxPipeline", "StableDiffusion3Pipeline", "WanPipeline", "QwenImagePipeline", "PixArtAlphaPipeline", "LTXPipeline",
)  # fmt: skip
CLOSE = 1e-4  # relative: between paths that round otherwise
CALLED = "..-.-."  # the steps of the fitted schedule
ROWS = ("CCRFRC", "CRCFRR")  # of the sites in turn
FORECAST = {"CCRFRC": (Forecast((1, 0), (1.5, -0.5)),), "CRCFRR": (Forecast((2, 0), (1.25, -0.25)),)}
GUESTS: dict[str, Callable[[Host], list[str]]] = {}


class DoesNotApply(Exception):
    """The pipeline has nothing of the guest's kind."""


class Interrupted(BaseException):
    """Raised by a callback, as a Ctrl-C."""


class Host:
    """A pipeline under a schedule, and what the cells compare."""

    def __init__(self, name: str, runtime: str) -> None:
        self.name, self.runtime = name, runtime
        self.case = PIPELINES[name]()
        self.pipe = self.case.pipe
        self.network = self.pipe.transformer
        self.steps = STEPS
        self.plain = self.draw()
        self.computed = self._computed(self.case)
        self.reusing = self._reusing()
        with self.under(self.reusing, "scheduler" if runtime == "scheduler" else "hooks"):
            self.alone = self.draw()
        expect(apart(self.alone, self.plain) > 100 * CLOSE, "the schedule does not change the picture")

    def _computed(self, case: Case) -> Schedule:
        """Returns a schedule that gives the plain pipeline's latents."""
        schedule = case.schedule()
        return with_update(self.pipe, schedule) if self.runtime == "scheduler" else schedule

    def _reusing(self) -> Schedule:
        if self.runtime == "scheduler":
            return with_update(self.pipe, self.case.schedule(), CALLED, stir=0.2)
        schedule = self.computed
        plan = schedule.transformers["transformer"]
        rows = {key: ROWS[i % 2] for i, key in enumerate(plan.rows)}
        forecasts = {key: FORECAST[row] for key, row in rows.items()}
        return replace(schedule, transformers={"transformer": replace(plan, rows=rows, forecasts=forecasts)})

    @contextmanager
    def under(self, schedule: Schedule, runtime: str = "", pipe: Any = None) -> Iterator[Any]:
        """Puts the pipeline under the schedule; the runtime `compiled` has made its tables when the block begins."""
        pipe, runtime = pipe or self.pipe, runtime or self.runtime
        if runtime == "scheduler":
            own = pipe.scheduler
            pipe.scheduler = sodaprof.scheduler(schedule)
            self.steps = len(pipe.scheduler.timesteps)
            try:
                yield None
            finally:
                pipe.scheduler, self.steps = own, STEPS
            return
        with with_known_programs(sodaprof.apply(pipe, schedule, runtime=runtime)) as handle:
            if runtime == "compiled":
                for _ in range(2):
                    self.draw(pipe=pipe)
            yield handle

    def draw(self, entry: int = 7, pipe: Any = None, **more: Any) -> Tensor:
        """Returns the latents of one generation."""
        arguments = {"output_type": "latent"} | self.case.arguments([entry]) | more
        generator = [torch.Generator().manual_seed(1000 + entry)]
        out = (pipe or self.pipe)(**arguments, generator=generator, num_inference_steps=self.steps, return_dict=False)
        return torch.as_tensor(out[0])

    def is_right(self, wanted: Tensor, of: str, draw: Callable[[], Tensor] | None = None, close: bool = False) -> str:
        """Returns "right" if the drawn latents are these, bit for bit unless close, or the refusal; else AssertionError."""
        try:
            found = (draw or self.draw)()
        except SodaprofError as error:
            return f"refused: {error}"
        same = found.shape == wanted.shape and (torch.equal(found, wanted) or (close and apart(found, wanted) < CLOSE))
        expect(same, f"{of}: off by {apart(found, wanted) if found.shape == wanted.shape else 'its shape'}")
        return "right"

    def as_plain(self, more: Callable[[], dict[str, Any]], of: str) -> str:
        """Compares a call with further arguments under the computing schedule with the plain pipeline's."""
        try:
            wanted = self.draw(**more())
        except Exception as error:
            raise DoesNotApply(f"{of} fails on the plain pipeline: {said(error)}") from error
        expect(self.runtime == "scheduler" or not torch.equal(wanted, self.plain), f"{of} has no effect")
        try:
            with self.under(self.computed):
                return self.is_right(wanted, of, lambda: self.draw(**more()), close=self.runtime == "scheduler")
        except SodaprofError as error:
            return f"refused: {error}"

    def is_back(self, found: list[str]) -> list[str]:
        """Checks that the pipeline is plain; returns what was found before."""
        self.is_right(self.plain, "the pipeline after the schedule")
        return found

    def clone(self) -> Any:
        """Returns a pipeline with the same network and a copy of the scheduler, as a server makes one for each request."""
        return clone(self.pipe)

    def on_step(self, function: Callable[..., Tensor | None]) -> dict[str, Any]:
        """Returns the arguments of a call that calls function(pipe, step, latents) after each step, for latents in place."""
        if "callback_on_step_end" not in inspect.signature(type(self.pipe).__call__).parameters:

            def former(step: int, timestep: Any, latents: Tensor) -> None:  # has no pipeline; in-place changes count
                if (changed := function(None, step, latents)) is not None:
                    latents.copy_(changed)

            return {"callback": former, "callback_steps": 1}

        def callback(pipe: Any, step: int, timestep: Any, given: dict[str, Any]) -> dict[str, Any]:
            changed = function(pipe, step, given["latents"])
            return given if changed is None else given | {"latents": changed}

        return {"callback_on_step_end": callback}


def guest(name: str) -> Callable[[Callable[[Host], list[str]]], Callable[[Host], list[str]]]:
    """Enters a guest: a function that returns what it found ("right", "refused: …"), raises DoesNotApply or fails."""

    def enter(function: Callable[[Host], list[str]]) -> Callable[[Host], list[str]]:
        GUESTS[name] = function
        return function

    return enter


# ---- guests -----------------------------------------------------------------------------------------------------------

CACHES: dict[str, tuple[Any, Callable[[], Any]]] = {
    "PAB": (
        hooks.apply_pyramid_attention_broadcast,
        lambda: hooks.PyramidAttentionBroadcastConfig(
            spatial_attention_block_skip_range=2, spatial_attention_timestep_skip_range=(-1, 1001),
            current_timestep_callback=lambda: 500,
        ),
    ),
    "first block": (hooks.apply_first_block_cache, lambda: hooks.FirstBlockCacheConfig(threshold=1e3)),
    "FasterCache": (
        hooks.apply_faster_cache,
        lambda: hooks.FasterCacheConfig(
            spatial_attention_timestep_skip_range=(-1, 1001), current_timestep_callback=lambda: 500,
            tensor_format="BCHW", is_guidance_distilled=True,
        ),
    ),
    "TaylorSeer": (
        hooks.apply_taylorseer_cache,
        lambda: hooks.TaylorSeerCacheConfig(cache_interval=2, disable_cache_before_step=1, max_order=1),
    ),
    "MagCache": (
        hooks.apply_mag_cache,
        lambda: hooks.MagCacheConfig(threshold=1e3, num_inference_steps=STEPS, mag_ratios=torch.ones(STEPS)),
    ),
}  # fmt: skip


def clear(network: torch.nn.Module) -> None:
    """Removes all hooks of diffusers, and the mark that a cache is on."""
    for module in network.modules():
        registry = vars(module).get("_diffusers_hook")
        for name in reversed(list(registry.hooks) if registry else ()):
            registry.remove_hook(name, recurse=False)
    network._cache_config = None


@guest("other cache")
def other_cache(host: Host) -> list[str]:
    """Refused before and within; the cache works after remove(). A plain scheduler runs the network that it is given."""
    found, tried = [], 0
    for name, (enable, config) in CACHES.items():
        try:
            enable(host.network, config())
            cached = host.draw()
            hooked = any(vars(m).get("_diffusers_hook") and m._diffusers_hook.hooks for m in host.network.modules())
        except Exception:  # diffusers does not know these blocks, or the pipeline has no context for the cache
            hooked = False
        if not hooked:  # or the cache found no module that it takes
            clear(host.network)
            continue
        tried += 1
        if host.runtime == "scheduler":
            clear(host.network)
            found.append(with_cache(host, enable, config))
            continue
        try:
            with host.under(host.reusing):
                raise AssertionError(f"{name} before apply is taken")
        except SodaprofError as error:
            found.append(f"refused: {error}")
        expect(host.draw().shape == cached.shape, f"{name} does not run after the refusal")
        clear(host.network)
        with host.under(host.reusing):
            expect(host.is_right(host.alone, "before the cache") == "right", "refused without a cache")
            enable(host.network, config())
            inside = host.is_right(host.alone, f"{name} within the schedule")
            expect(inside != "right", f"{name} within the schedule is taken")
            found.append(inside)
        host.is_right(cached, f"{name} after remove()")
        clear(host.network)
        host.is_back([])
    if not tried:
        raise DoesNotApply("no cache of diffusers runs on this transformer")
    return found


def with_cache(host: Host, enable: Any, config: Any) -> str:
    """The fitted scheduler draws the same with a cache twice, and without the cache what it drew before."""
    with host.under(host.reusing):
        pictures = []
        for _ in range(2):
            enable(host.network, config())
            pictures.append(host.draw())
            clear(host.network)
        expect(torch.equal(*pictures), "the cache's pictures differ")
        return host.is_right(host.alone, "after the cache")


def add_lora(host: Host) -> None:
    """Puts an adapter on each linear layer in the sites, sites that are linear layers among them."""
    torch.manual_seed(1)
    paths = [
        path
        for site in host.computed.transformers["transformer"].rows
        for path, module in host.network.named_modules()
        if (path == site or path.startswith(site + ".")) and isinstance(module, torch.nn.Linear)
    ]
    config = LoraConfig(r=2, lora_alpha=1, target_modules=paths, init_lora_weights=False)
    if hasattr(host.network, "add_adapter"):
        host.network.add_adapter(config)
    else:
        inject_adapter_in_model(config, host.network)


def layers(host: Host) -> list[LoraLayer]:
    return [module for module in host.network.modules() if isinstance(module, LoraLayer)]


def weigh(host: Host, factor: float) -> None:
    if hasattr(host.network, "set_adapters"):
        host.network.set_adapters("default", factor)
    else:
        for layer in layers(host):
            layer.set_scale("default", factor)


def switch(host: Host, on: bool) -> None:
    for layer in layers(host):
        layer.enable_adapters(on)


def fuse(host: Host, on: bool) -> None:
    for layer in layers(host):
        layer.merge() if on else layer.unmerge()


def unload(host: Host) -> None:
    """Takes the adapters away, layers and all, as `unload_lora_weights` does."""
    recurse_remove_peft_layers(host.network)
    vars(host.network).pop("peft_config", None)
    host.network._hf_peft_config_loaded = False


def merged(host: Host, factor: float) -> Host:
    """Returns a host whose network has the adapter's part added to its weights."""
    other = Host(host.name, host.runtime)
    with torch.no_grad():
        for path, layer in host.network.named_modules():
            if isinstance(layer, LoraLayer):
                other.network.get_submodule(path).weight += factor * layer.get_delta_weight("default")
    return other


@guest("LoRA on a site")
def lora(host: Host) -> list[str]:
    """References: the plain pipeline with the adapter; the schedule on a network whose weights hold the adapter's part."""
    add_lora(host)
    adapted = host.draw()
    reference = merged(host, 1.0)
    half = merged(host, 0.5)
    for other in (reference, half):
        with other.under(other.reusing, "scheduler" if host.runtime == "scheduler" else "hooks"):
            other.alone = other.draw()
    expect(apart(reference.alone, host.alone) > 100 * CLOSE, "the adapter has no effect")

    def check(of: str, wanted: Tensor) -> None:
        for _ in range(2):
            found.append(host.is_right(wanted, of, close=True))

    found: list[str] = []
    with host.under(host.computed):
        found.append(host.is_right(adapted, "computed, before apply", close=host.runtime == "scheduler"))
    with host.under(host.reusing):
        check("before apply", reference.alone)
        weigh(host, 0.5)
        check("half the weight", half.alone)
        weigh(host, 1.0)
        switch(host, False)
        check("disabled", host.alone)
        switch(host, True)
        fuse(host, True)
        check("fused", reference.alone)
        fuse(host, False)
        check("unfused", reference.alone)
        unload(host)
        check("unloaded", host.alone)
        add_lora(host)
        check("after apply", reference.alone)
    found.append(host.is_right(adapted, "after remove()", close=True))
    unload(host)
    found.append(host.is_right(host.plain, "without any", close=True))
    return found


@guest("deepcopy")
def deep_copies(host: Host) -> list[str]:
    """Copies of the pipeline and the network are plain; one of the scheduler runs the schedule as it does alone."""
    of_scheduler = host.runtime == "scheduler"
    with host.under(host.reusing):
        whole, network, clone = copy.deepcopy(host.pipe), copy.deepcopy(host.network), host.clone()
        pickled = pickle.loads(pickle.dumps(host.network))
        wanted = host.alone if of_scheduler else host.plain
        found = [host.is_right(wanted, "a deep copy of the pipeline", lambda: host.draw(pipe=whole))]
        for copied in (network, pickled):
            apart_ = type(host.pipe)(**dict(whole.components) | {"transformer": copied})
            apart_.set_progress_bar_config(disable=True)
            found.append(host.is_right(wanted, "a copy of the network", lambda p=apart_: host.draw(pipe=p)))
        found.append(host.is_right(host.alone, "with a copied scheduler", lambda: host.draw(pipe=clone)))
        found.append(host.is_right(host.alone, "the original"))
        sodaprof.remove(whole)
        found.append(host.is_right(host.alone, "the original, after remove() of its copy"))
    if not of_scheduler:
        for pipe in (whole, clone):
            found.append(host.is_right(host.plain, "a copy after remove()", lambda p=pipe: host.draw(pipe=p)))
    return host.is_back(found)


def in_turn(calls: list[Callable[[Callable[..., None]], Tensor]]) -> list[Tensor | BaseException]:
    """Runs calls in a thread each, of which each goes on when the others have called what it is given, or are over.

    Returns what each returned or raised.
    """
    results: list[Any] = [None] * len(calls)
    turn, over = [0], [False] * len(calls)
    changed = threading.Condition()

    def passes(number: int) -> None:
        """Gives the turn to the next thread that is not over, and waits for it."""
        with changed:
            others = [(number + i) % len(calls) for i in range(1, len(calls) + 1)]
            turn[0] = next((other for other in others if not over[other]), number)
            changed.notify_all()
            assert changed.wait_for(lambda: over[number] or turn[0] == number, 60), "the other thread hangs"

    def request(number: int) -> None:
        with changed:
            changed.wait_for(lambda: turn[0] == number, 60)
        try:
            results[number] = calls[number](lambda *_: passes(number))
        except BaseException as error:
            results[number] = error
        over[number] = True
        passes(number)

    threads = [threading.Thread(target=request, args=(number,), daemon=True) for number in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    return results


def at_once(host: Host, calls: list[tuple[Any, int]]) -> list[Tensor | BaseException]:
    """Draws for each (pipeline, entry) in a thread of its own, a step of each in turn."""
    return in_turn(
        [lambda passes, pipe=pipe, entry=entry: host.draw(entry, pipe, **host.on_step(passes)) for pipe, entry in calls]
    )


def outcome(host: Host, result: Tensor | BaseException, wanted: Tensor, of: str) -> str:
    def drawn() -> Tensor:
        if isinstance(result, BaseException):
            raise result
        return result

    return host.is_right(wanted, of, drawn)


@guest("interleaved runs")
def interleaved(host: Host) -> list[str]:
    """Two threads with a copied scheduler each, a run in another's callback: as alone. One scheduler: the same or refused."""
    found: list[str] = []
    with host.under(host.reusing):
        alone = {entry: host.draw(entry) for entry in (7, 8)}
        pipes = [host.clone(), host.clone()]
        for _ in range(2):
            for entry, result in zip(alone, at_once(host, list(zip(pipes, alone, strict=True))), strict=True):
                found.append(outcome(host, result, alone[entry], f"entry {entry} in its thread"))
        expect(set(found) == {"right"}, f"with copies: {found}")
        inner = []

        def draws_another(pipe: Any, step: int, latents: Tensor) -> None:
            if step == 1:
                inner.append(host.draw(8, pipes[1]))

        outer = host.draw(7, pipes[0], **host.on_step(draws_another))
        found.append(outcome(host, outer, alone[7], "around another run"))
        found.append(outcome(host, inner[0], alone[8], "in another run's callback"))
        shared = at_once(host, [(host.pipe, 7), (host.pipe, 8)])
        for entry, result in zip(alone, shared, strict=True):
            found.append(outcome(host, result, alone[entry], f"entry {entry} on one scheduler"))
        found.append(host.is_right(host.alone, "after them"))
    return host.is_back(found)


def cut(host: Host) -> Callable[[], dict[str, Any]]:
    """Returns the arguments of a call whose guidance ends after its third step."""
    if host.name == "StableDiffusion3Pipeline":
        callback = diffusers.callbacks.SD3CFGCutoffCallback(cutoff_step_index=2, cutoff_step_ratio=None)
        return lambda: {"callback_on_step_end": callback}

    def ends(pipe: Any, step: int, timestep: Any, given: dict[str, Any]) -> dict[str, Any]:
        if step != 2:
            return given
        pipe._guidance_scale = 1.0
        return given | ({"prompt_embeds": given["prompt_embeds"][-1:]} if host.name == "LTXPipeline" else {})

    names = ["latents", "prompt_embeds"] if host.name == "LTXPipeline" else ["latents"]
    return lambda: {"callback_on_step_end": ends, "callback_on_step_end_tensor_inputs": names}


@guest("guidance change")
def guidance(host: Host) -> list[str]:
    """Another scale, no guidance, a cutoff: as on the plain pipeline."""
    scale = "true_cfg_scale" if host.name == "QwenImagePipeline" else "guidance_scale"
    found = [host.as_plain(lambda: {scale: 2.5}, "another scale")]
    if host.name == "FluxPipeline":
        more = {
            "negative_prompt_embeds": no_text([7]), "negative_pooled_prompt_embeds": pooled([9]), "true_cfg_scale": 3.0
        }  # fmt: skip
        found.append(host.as_plain(lambda: more, "a second branch"))
    else:
        found.append(host.as_plain(lambda: {scale: 1.0}, "no guidance"))
    if host.name not in ("FluxPipeline", "QwenImagePipeline", "PixArtAlphaPipeline"):  # these fix it before the loop
        try:
            found.append(host.as_plain(cut(host), "a cutoff"))
        except DoesNotApply:
            expect(host.name == "LTXPipeline", "the cutoff fails")
    with host.under(host.reusing):
        found.append(host.is_right(host.alone, "as profiled, after them"))
    return host.is_back(found)


@guest("skip-layer")
def skip_layer(host: Host) -> list[str]:
    """Skip-layer guidance that the schedule does not know, and in the call that it was made from: as plain."""
    if "skip_guidance_layers" not in inspect.signature(type(host.pipe).__call__).parameters:
        raise DoesNotApply(f"{host.name} has no skip_guidance_layers")
    more = {"skip_guidance_layers": [1], "skip_layer_guidance_stop": 0.5}
    found = [host.as_plain(lambda: more, "skip-layer guidance")]
    try:
        host.computed = host._computed(host.case.changed(lambda entries: more))
        found.append(host.as_plain(lambda: more, "skip-layer guidance as profiled"))
    except SodaprofError as error:
        found.append(f"refused: {error}")
    return host.is_back(found)


@guest("callbacks")
def callbacks(host: Host) -> list[str]:
    """A callback that reads changes nothing; one that changes the latents does what it does on the plain pipeline."""
    seen: list[Tensor] = []
    reads = host.on_step(lambda pipe, step, latents: seen.append(latents.clone()))
    with host.under(host.reusing):
        found = [host.is_right(host.alone, "a callback that reads", lambda: host.draw(**reads))]
        expect(
            len(seen) == host.steps and torch.equal(seen[-1].flatten(), host.alone.flatten()), "other latents are seen"
        )
    changes = host.on_step(lambda pipe, step, latents: latents * 1.1 if step == 2 else None)
    found.append(host.as_plain(lambda: changes, "a callback that changes the latents"))
    return host.is_back(found)


def interrupted(draws: Callable[..., Tensor], thread: bool) -> Any:
    """Returns what the call raised or returned, in a thread of its own or here."""
    if thread:
        return in_turn([draws])[0]
    try:
        return draws()
    except BaseException as error:
        return error


@guest("interrupt")
def interrupt(host: Host) -> list[str]:
    """`pipe._interrupt`, an exception, one in a thread: what follows is right, the interrupted picture is the plain one's."""

    def stops(pipe: Any, step: int, latents: Tensor) -> None:
        if step == 2 and pipe is not None:
            pipe._interrupt = True

    def raises(pipe: Any, step: int, latents: Tensor) -> None:
        if step == 2:
            raise Interrupted

    found = []
    if hasattr(type(host.pipe), "interrupt"):
        found.append(host.as_plain(lambda: host.on_step(stops), "interrupted"))
    with host.under(host.reusing) as handle:
        for pipe in (host.pipe, host.clone()):
            if hasattr(type(host.pipe), "interrupt"):
                host.draw(pipe=pipe, **host.on_step(stops))
                found.append(host.is_right(host.alone, "after an interrupted run"))
            for thread in (False, True):
                draws = lambda passes=None, pipe=pipe: host.draw(pipe=pipe, **host.on_step(raises))  # noqa: E731
                expect(
                    isinstance(result := interrupted(draws, thread), Interrupted), f"the interrupt became {result!r}"
                )
                expect(handle is None or not handle.report().complete, "the report says complete")
                found.append(host.is_right(host.alone, "after an exception"))
                found.append(host.is_right(host.alone, "on that pipeline", lambda p=pipe: host.draw(pipe=p)))
    return host.is_back(found)


# ---- the table --------------------------------------------------------------------------------------------------------


def check(name: str, guest_name: str, runtime: str) -> tuple[str, list[str]]:
    """Returns the cell's result and its notes."""
    try:
        found = GUESTS[guest_name](Host(name, runtime))
    except DoesNotApply as reason:
        return "n/a", [f"does not apply: {reason}"]
    except Exception as error:
        return "WRONG", [f"WRONG: {name}, {guest_name}, {runtime}: {said(error)}"]
    refusals = [first_words(f) for f in dict.fromkeys(found) if f != "right"]
    result = "right" if "right" in found else ""
    return "; ".join(filter(None, (result, "refused" if refusals else ""))), list(dict.fromkeys(refusals))


def first_words(refusal: str) -> str:
    words = refusal.split()
    return " ".join(words[:18]) + (" …" if len(words) > 18 else "")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help="pipelines; all where none is given")
    parser.add_argument("--markdown", action="store_true")
    parser.add_argument("--guest", action="append", choices=list(GUESTS), help="these guests alone")
    parser.add_argument("--runtime", action="append", choices=RUNTIMES, help="these runtimes alone")
    arguments = parser.parse_args()
    names = arguments.names or list(NAMES)
    diffusers.utils.logging.set_verbosity_error()
    torch.set_num_threads(1)
    notes: dict[str, int] = {}
    edge, end = ("| ", " |") if arguments.markdown else ("", "")
    print(edge + " | ".join(("guest", "runtime", *(name.removesuffix("Pipeline") for name in names))) + end)
    if arguments.markdown:
        print("|" + " --- |" * (len(names) + 2))
    wrong = 0
    for guest_name in arguments.guest or GUESTS:
        for runtime in arguments.runtime or RUNTIMES:
            cells = [guest_name, runtime]
            for name in names:
                result, of_cell = check(name, guest_name, runtime)
                wrong += result == "WRONG"
                numbers = [str(notes.setdefault(note, len(notes) + 1)) for note in of_cell]
                cells.append(" ".join([result, ", ".join(numbers)]).strip())
            print(edge + " | ".join(cells) + end, flush=True)
    print()
    for note, number in notes.items():
        print(f"{number}. {note}")
    raise SystemExit(wrong > 0)


if __name__ == "__main__":
    main()
