"""Runs whole pipelines of diffusers, their real classes, around the tiny transformers of `zoo`: profile, compile, apply, run.

    python -m tests.zoo.zoo_pipelines [NAME...] [--markdown]

prints a row a pipeline: whether each of CHECKS holds. Exits with 1 where one does not. Prompt embeddings are passed in,
there are no text encoders, and latents are taken out before any decoder.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch import Tensor

import sodaprof
from sodaprof.compiler import compile_schedule
from sodaprof.errors import UnsupportedModelError
from sodaprof.formats.schedule import Plan, Schedule, TokenRule
from sodaprof.pipelines.discover import inspect_pipeline
from sodaprof.pipelines.load import transformers_of
from tests.tiny_pipelines import tiny_pipe
from tests.zoo.zoo import ZOO
from tests.zoo.zoo_check import check_report, expect, print_table, said

STEPS, BUDGET, SIDE = 6, "1.5x", 64
TEXT, NEGATIVE = 5, 99  # tokens of a prompt; the entry that stands for the negative prompt
Entries = list[int | str]
Generators = list[torch.Generator]
PIPELINES: dict[str, Callable[[], Case]] = {}


@dataclass
class Case:
    """A pipeline, and how it is called for some entries, each with its own generator."""

    pipe: Any
    arguments: Callable[[Entries], dict[str, Any]]

    def call(self, entries: Entries, generators: Generators) -> Tensor:
        """Returns the pipeline's latents [n, ...] after STEPS steps."""
        arguments = {"output_type": "latent"} | self.arguments(entries)
        out = self.pipe(**arguments, generator=generators, num_inference_steps=STEPS, return_dict=False)[0]
        return torch.as_tensor(out)

    def at_work(self) -> list[set[str]]:
        """Returns the transformers that are called at each step."""
        steps: list[set[str]] = [set()]
        parts = transformers_of(self.pipe)
        hooks = [p.register_forward_hook(lambda *of_call, n=n: steps[-1].add(n)) for n, p in parts.items()]
        step = self.pipe.scheduler.step
        self.pipe.scheduler.step = lambda *args, **kwargs: (steps.append(set()), step(*args, **kwargs))[1]
        try:
            self.draw()
        finally:
            del self.pipe.scheduler.step
            for hook in hooks:
                hook.remove()
        return steps[:-1]

    def draw(self, entry: int = 7) -> Tensor:
        return self.call([entry], [torch.Generator().manual_seed(1000 + entry)])

    def changed(self, change: Callable[[Entries], dict[str, Any]]) -> Case:
        """Returns the case with other arguments for the same pipeline: change(entries), added to its own."""
        own = self.arguments
        return Case(self.pipe, lambda entries: own(entries) | change(entries))

    def with_text(self, tokens: Callable[[Entries], int]) -> Case:
        """Returns the case with prompts of another length."""

        def embedded(entries: Entries) -> dict[str, Any]:
            found = {"prompt_embeds": text(entries, tokens=tokens(entries))}
            mask = {"prompt_embeds_mask": ones(entries, tokens(entries))}
            return found | (mask if "prompt_embeds_mask" in self.arguments(entries) else {})

        return self.changed(embedded)

    def schedule(self, row: str = "C" * STEPS, rows: dict[str, str] | None = None, k: Any = None) -> Schedule:
        """Returns a schedule of this row for every site; rows: of some sites, k: of their P cells."""
        model, sampler, _ = inspect_pipeline(self.pipe, "tiny", STEPS, own=self.call)
        plans = {
            name: Plan(t.class_name, t.fingerprint, {s.key: row for s in t.sites} | (rows or {}), "." * STEPS, k or {})
            for name, t in model.transformers.items()
        }
        rule = TokenRule("feature_mean") if k else None
        return Schedule(plans, sampler, model.shape, {"name": "test", "knobs": {}}, token_rule=rule)


# ---- pipelines --------------------------------------------------------------------------------------------------------


def member(make: Callable[[Any], Case]) -> Callable[[], Case]:
    """Enters a pipeline class of diffusers under the name of the function, which is called with the class."""
    name = make.__name__.removesuffix("_two")

    def entry() -> Case:
        diffusers.utils.logging.set_verbosity_error()
        case = make(getattr(diffusers, name))
        case.pipe.set_progress_bar_config(disable=True)
        return case

    PIPELINES[make.__name__] = entry
    return entry


def network(name: str) -> Any:
    """Returns the zoo's instance of a transformer class."""
    return ZOO[name]()[0]


def euler(**config: Any) -> Any:
    return diffusers.FlowMatchEulerDiscreteScheduler(**config)


def text(entries: Entries, width: int = 12, tokens: int = TEXT) -> Tensor:
    """Returns states [n, tokens, width], the same whenever for the same entry."""
    draw = lambda entry: torch.randn(tokens, width, generator=torch.Generator().manual_seed(int(entry)))  # noqa: E731
    return torch.stack([draw(entry) for entry in entries])


def no_text(entries: Entries, width: int = 12, tokens: int = TEXT) -> Tensor:
    """Returns the states of the negative prompt, once an entry."""
    return text([NEGATIVE] * len(entries), width, tokens)


def pooled(entries: Entries) -> Tensor:
    return text(entries, 8, 1)[:, 0]


def ones(entries: Entries, tokens: int = TEXT, dtype: torch.dtype = torch.int64) -> Tensor:
    return torch.ones(len(entries), tokens, dtype=dtype)


def guided(entries: Entries, mask: bool = True, **more: Any) -> dict[str, Any]:
    """Returns embeddings of prompts and negative prompts as nearly every pipeline takes them."""
    given = {"prompt_embeds": text(entries), "negative_prompt_embeds": no_text(entries), "height": SIDE, "width": SIDE}
    if mask:
        given |= {"prompt_attention_mask": ones(entries), "negative_prompt_attention_mask": ones(entries)}
    return given | more


@member
def DiTPipeline(cls: Any) -> Case:
    pipe = tiny_pipe(cls=cls)  # its null class is number 1000
    return Case(pipe, lambda entries: {"class_labels": [int(e) % 10 for e in entries], "output_type": "pt"})


@member
def PixArtAlphaPipeline(cls: Any) -> Case:
    pipe = cls(None, None, None, network("PixArtTransformer2DModel"), diffusers.DPMSolverMultistepScheduler())
    return Case(pipe, lambda entries: guided(entries, negative_prompt=None, use_resolution_binning=False))


@member
def StableDiffusion3Pipeline(cls: Any) -> Case:
    pipe = cls(network("SD3Transformer2DModel"), euler(), *[None] * 7)
    return Case(
        pipe,
        lambda entries: guided(
            entries, False, pooled_prompt_embeds=pooled(entries), negative_pooled_prompt_embeds=pooled(entries) * 0
        ),
    )


@member
def FluxPipeline(cls: Any) -> Case:  # guidance is embedded: one branch
    pipe = cls(euler(), None, None, None, None, None, network("FluxTransformer2DModel"))
    return Case(
        pipe,
        lambda entries: {
            "prompt_embeds": text(entries), "pooled_prompt_embeds": pooled(entries), "height": SIDE, "width": SIDE,
        },
    )  # fmt: skip


@member
def LattePipeline(cls: Any) -> Case:
    pipe = cls(None, None, None, network("LatteTransformer3DModel"), diffusers.DDIMScheduler())
    return Case(pipe, lambda entries: guided(entries, False, negative_prompt=None, video_length=2))


@member
def WanPipeline(cls: Any) -> Case:
    pipe = cls(None, None, None, euler(), network("WanTransformer3DModel"))
    return Case(pipe, lambda entries: guided(entries, False, num_frames=5))


@member
def WanPipeline_two(cls: Any) -> Case:  # Wan 2.2: one transformer above the boundary, another one below
    transformers = network("WanTransformer3DModel"), network("WanTransformer3DModel")
    pipe = cls(None, None, None, euler(), *transformers, boundary_ratio=0.6)
    return Case(pipe, lambda entries: guided(entries, False, num_frames=5))


@member
def CogVideoXPipeline(cls: Any) -> Case:
    pipe = cls(None, None, None, network("CogVideoXTransformer3DModel"), diffusers.CogVideoXDDIMScheduler())
    return Case(pipe, lambda entries: guided(entries, False, num_frames=5))


@member
def LTXPipeline(cls: Any) -> Case:
    pipe = cls(euler(use_dynamic_shifting=True), None, None, None, network("LTXVideoTransformer3DModel"))
    return Case(pipe, lambda entries: guided(entries, height=128, width=128, num_frames=9))


@member
def HunyuanVideoPipeline(cls: Any) -> Case:
    pipe = cls(None, None, network("HunyuanVideoTransformer3DModel"), None, euler(), None, None)
    return Case(
        pipe,
        lambda entries: {
            "prompt_embeds": text(entries), "pooled_prompt_embeds": pooled(entries), "height": SIDE, "width": SIDE,
            "prompt_attention_mask": ones(entries), "num_frames": 5,
        },
    )  # fmt: skip


@member
def QwenImagePipeline(cls: Any) -> Case:  # the negative prompt is shorter than the prompt
    pipe = cls(euler(), None, None, None, network("QwenImageTransformer2DModel"))
    return Case(
        pipe,
        lambda entries: {
            "prompt_embeds": text(entries), "prompt_embeds_mask": ones(entries), "height": SIDE, "width": SIDE,
            "negative_prompt_embeds": no_text(entries, tokens=3), "negative_prompt_embeds_mask": ones(entries, 3),
        },
    )  # fmt: skip


@member
def AuraFlowPipeline(cls: Any) -> Case:
    return Case(cls(None, None, None, network("AuraFlowTransformer2DModel"), euler()), guided)


@member
def SanaPipeline(cls: Any) -> Case:
    pipe = cls(None, None, None, network("SanaTransformer2DModel"), diffusers.DPMSolverMultistepScheduler())
    more = {"negative_prompt": None, "use_resolution_binning": False, "height": 128, "width": 128}
    return Case(pipe, lambda entries: guided(entries, **more))


@member
def Lumina2Pipeline(cls: Any) -> Case:
    return Case(cls(network("Lumina2Transformer2DModel"), euler(), None, None, None), guided)


@member
def MochiPipeline(cls: Any) -> Case:
    pipe = cls(euler(), None, None, None, network("MochiTransformer3DModel"))

    def arguments(entries: Entries) -> dict[str, Any]:
        masks = dict.fromkeys(
            ("prompt_attention_mask", "negative_prompt_attention_mask"), ones(entries, dtype=torch.bool)
        )
        embeds = {"prompt_embeds": text(entries, 16), "negative_prompt_embeds": no_text(entries, 16)}
        return guided(entries, num_frames=7) | masks | embeds

    return Case(pipe, arguments)


@member
def HunyuanDiTPipeline(cls: Any) -> Case:
    net, scheduler = network("HunyuanDiT2DModel"), diffusers.DDPMScheduler()
    pipe = cls(None, None, None, net, scheduler, None, None, requires_safety_checker=False)

    def arguments(entries: Entries) -> dict[str, Any]:
        second = {
            "prompt_embeds": text(entries, 8), "negative_prompt_embeds": no_text(entries, 8),
            "prompt_embeds_2": text(entries, 16), "negative_prompt_embeds_2": no_text(entries, 16),
            "prompt_attention_mask_2": ones(entries), "negative_prompt_attention_mask_2": ones(entries),
        }  # fmt: skip
        return guided(entries, use_resolution_binning=False) | second

    return Case(pipe, arguments)


@member
def ZImagePipeline(cls: Any) -> Case:  # latents and text come as lists
    pipe = cls(euler(), None, None, None, network("ZImageTransformer2DModel"))
    return Case(
        pipe,
        lambda entries: guided(
            entries, False, prompt_embeds=list(text(entries)), negative_prompt_embeds=list(no_text(entries))
        ),
    )


@member
def CogView4Pipeline(cls: Any) -> Case:
    pipe = cls(None, None, None, network("CogView4Transformer2DModel"), euler())
    return Case(pipe, lambda entries: guided(entries, False))


@member
def AllegroPipeline(cls: Any) -> Case:
    pipe = cls(None, None, None, network("AllegroTransformer3DModel"), diffusers.DDIMScheduler())
    return Case(pipe, lambda entries: guided(entries, negative_prompt=None, num_frames=5))


# ---- checks -----------------------------------------------------------------------------------------------------------


@dataclass
class Row:
    """What was found of one pipeline."""

    name: str
    transformer: str = ""
    form: str = ""
    results: dict[str, bool | None] = field(default_factory=dict)  # by heading in CHECKS; None: refused in words
    notes: list[str] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        return len(self.results) == len(CHECKS) and False not in self.results.values()


@dataclass
class Work:
    """What the checks of one pipeline share."""

    case: Case
    plain: Tensor
    folder: Path
    kept: dict[str, Tensor] = field(default_factory=dict)  # pictures by policy

    def compiled(self, policy: str) -> Schedule:
        return compile_schedule(self.folder, BUDGET, policy)


def computes(work: Work) -> None:
    """A schedule of C alone changes no bit."""
    model, sampler, _ = inspect_pipeline(work.case.pipe, "tiny", STEPS, own=work.case.call)
    plans = {}
    for name, t in model.transformers.items():
        row = "".join("C" if name in at_work else "_" for at_work in work.case.at_work())
        plans[name] = Plan(
            t.class_name, t.fingerprint, dict.fromkeys((s.key for s in t.sites), row), row.replace("C", ".")
        )
    schedule = Schedule(plans, sampler, model.shape, {"name": "test", "knobs": {}})
    with sodaprof.apply(work.case.pipe, schedule) as handle:
        expect(torch.equal(work.case.draw(), work.plain), "differs from the plain pipeline")
        check_report(handle.report())


def profiles(work: Work) -> str:
    """Two generations are profiled, through a call of our own."""
    settings = {"steps": STEPS, "samples": 2, "batch_size": 2, "max_interval": 4, "name": "tiny"}
    profile = sodaprof.profile(work.case.pipe, work.folder, call=work.case.call, **settings)
    errors = profile.caching_error()
    expect(all((e[:, :, 1] > 0).any() for e in errors.values()), "no site has an error of reuse")
    return f"{sum(len(t.sites) for t in profile.model.transformers.values())} sites"


def runs(policy: str) -> Callable[[Work], str]:
    """Returns the check that the policy's schedule runs as planned, changes the picture, and leaves nothing behind."""

    def check(work: Work) -> str:
        schedule = work.compiled(policy)
        with sodaprof.apply(work.case.pipe, schedule) as handle:
            work.kept[policy] = work.case.draw()
            check_report(handle.report())
        expect(
            not torch.equal(work.kept[policy], work.plain), "the picture is the plain pipeline's: nothing was reused"
        )
        expect(torch.equal(work.case.draw(), work.plain), "after remove() the picture is not the plain pipeline's")
        assert schedule.predicted is not None
        return f"{policy} {schedule.predicted['speedup']:.2f}x"

    return check


def lowers(work: Work) -> None:
    """Traced blocks and tables give the bits of the hooks, in the first run and the second."""
    with sodaprof.apply(work.case.pipe, work.compiled("soda"), runtime="compiled") as handle:
        for run in ("first", "second"):
            expect(torch.equal(work.case.draw(), work.kept["soda"]), f"the {run} lowered run differs from the hooks")
            check_report(handle.report())


CHECKS: dict[str, Callable[[Work], str | None]] = {
    "all-C identical": computes,
    "profile": profiles,
    "soda runs": runs("soda"),
    "fora runs": runs("fora"),
    "lowered": lowers,
}


def check(name: str) -> Row:
    """Returns what holds of the pipeline; failures of any kind are in its notes. A check after a refusal is not tried."""
    row = Row(name)
    with tempfile.TemporaryDirectory() as folder:
        case = PIPELINES[name]()
        work = Work(case, case.draw(), Path(folder) / "profile")
        model, sampler, _ = inspect_pipeline(case.pipe, "tiny", STEPS, own=case.call)
        row.transformer = ", ".join(t.class_name for t in model.transformers.values())
        row.form = sampler.guidance_form
        for heading, run in CHECKS.items():
            try:
                if note := run(work):
                    row.notes.append(note)
                row.results[heading] = True
            except Exception as error:
                row.results[heading] = None if isinstance(error, UnsupportedModelError) else False
                row.notes.append(f"{heading}: {said(error)}")
                if heading != "all-C identical" and not row.results[heading]:
                    row.results |= {h: row.results[heading] for h in CHECKS if h not in row.results}
                    break
    return row


HEADINGS = ("pipeline", "transformers", "guidance", *CHECKS, "note")


def cells(row: Row) -> list[str]:
    """Returns the row's cells under HEADINGS."""
    words = {True: "yes", False: "NO", None: "refused"}
    name = row.name.replace("_two", " with two transformers")
    return [name, row.transformer, row.form, *(words[row.results[h]] for h in CHECKS), "; ".join(row.notes)]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help="pipelines; all where none is given")
    parser.add_argument("--markdown", action="store_true")
    arguments = parser.parse_args()
    if unknown := sorted(set(arguments.names) - set(PIPELINES)):
        parser.error(f"no {unknown[0]} here; there are {', '.join(PIPELINES)}")
    print_table(
        HEADINGS, arguments.names or list(PIPELINES), lambda n: (cells(r := check(n)), r.passed), arguments.markdown
    )


if __name__ == "__main__":
    main()
