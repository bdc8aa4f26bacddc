"""Tiny pipelines with random weights, made in memory, and schedules drawn by hand for them."""

from __future__ import annotations

import copy
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline, DiTTransformer2DModel
from msgspec.structs import replace

from sodaprof.formats.schedule import Forecast, Plan, Schedule, TokenRule
from sodaprof.pipelines.discover import inspect_pipeline
from sodaprof.runtime.apply import Handle
from sodaprof.runtime.compiled.trace import Programs

STEPS = 8
SITES = tuple(f"transformer_blocks.{layer}.{module}" for layer in (0, 1) for module in ("attn1", "ff"))


def tiny_vae() -> AutoencoderKL:
    torch.manual_seed(1)
    return AutoencoderKL(block_out_channels=(8,), layers_per_block=1, latent_channels=4, norm_num_groups=1).eval()


def tiny_pipe(layers: int = 2, seed: int = 0, cls: type = DiTPipeline) -> DiTPipeline:
    """16 tokens of width 16, two heads."""
    torch.manual_seed(seed)
    transformer = DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=4, num_layers=layers, sample_size=8,
        patch_size=2, num_embeds_ada_norm=1000,
    ).eval()  # fmt: skip
    names = {str(label): f"class {label}" for label in range(10)}
    pipe = cls(transformer, tiny_vae(), DDIMScheduler(clip_sample=False), names)
    pipe.register_to_config(id2label=names)  # which the pipeline itself does not save
    pipe.set_progress_bar_config(disable=True)
    return pipe


def clone(pipe: Any) -> Any:
    """Returns a pipeline with the same parts and a copy of the scheduler."""
    made = type(pipe)(**dict(pipe.components) | {"scheduler": copy.deepcopy(pipe.scheduler)})
    made.set_progress_bar_config(disable=True)
    return made


def draw(pipe, labels=(1, 2), steps=STEPS, seed=0, guidance_scale=4.0):
    """The pipeline's own call; pictures as an array."""
    generator = [torch.Generator().manual_seed(seed + i) for i in range(len(labels))]
    return pipe(
        class_labels=list(labels), num_inference_steps=steps, generator=generator, guidance_scale=guidance_scale,
        output_type="np",
    ).images  # fmt: skip


def schedule_for(pipe, rows=None, k=None, forecasts=None, rule=None, steps=STEPS, guidance_scale=4.0) -> Schedule:
    """A schedule of this pipeline: the given rows, C everywhere else."""
    model, sampler, _ = inspect_pipeline(pipe, "tiny", steps, guidance_scale, 0)
    transformer = model.transformers["transformer"]
    all_rows = {site.key: "C" * steps for site in transformer.sites} | (rows or {})
    plan = Plan(transformer.class_name, transformer.fingerprint, all_rows, "." * steps, k or {}, forecasts or {})
    rule = rule or (TokenRule("feature_mean") if k else None)
    return Schedule({"transformer": plan}, sampler, model.shape, {"name": "test", "knobs": {}}, token_rule=rule)


MIXED_ROWS = dict(zip(SITES, ("CRRCPRFC", "CPRCRRFC", "CRPCCRRC", "CRRCPPRC"), strict=True))
MIXED_K = {SITES[0]: (5,), SITES[1]: (7,), SITES[2]: (0,), SITES[3]: (3, 16)}
MIXED_FORECASTS = {SITES[0]: (Forecast((3, 0), (1.5, -0.5)),), SITES[1]: (Forecast((3,), (1.0,)),)}


def mixed_schedule(pipe) -> Schedule:
    """All four actions."""
    return schedule_for(pipe, MIXED_ROWS, MIXED_K, MIXED_FORECASTS)


SKIPPING_STACK = "...S.SS."


def skipping_schedule(pipe, forms=("output", "drift", "output"), layer_0="CCC-C--C") -> Schedule:
    """Skips the stack at steps 3, 5 and 6; C cells of layer 0 may be computed under an S."""
    sources, weights = ((2, 0), (4,), (4, 2)), ((1.5, -0.5), (1.0,), (2.0, -1.0))
    schedule = schedule_for(pipe, dict.fromkeys(SITES, "CCC-C--C") | dict.fromkeys(SITES[:2], layer_0))
    plan = replace(
        schedule.transformers["transformer"],
        stack=SKIPPING_STACK,
        stack_forecasts=tuple(map(Forecast, sources, weights, forms)),
    )
    return replace(schedule, transformers={"transformer": plan})


FEW = 4
FEW_ROWS = dict(zip(SITES, ("CPCF", "CPFR", "CRCR", "CPRR"), strict=True))


def few_schedule(pipe) -> Schedule:
    """All four actions in FEW steps, no two of them alike; the last is a sum over both blocks."""
    forecasts = {SITES[0]: (Forecast((2, 0), (1.5, -0.5)),), SITES[1]: (Forecast((0,), (0.75,)),)}
    return schedule_for(pipe, FEW_ROWS, {SITES[0]: (5,), SITES[1]: (7,), SITES[3]: (3,)}, forecasts, steps=FEW)


def few(pipe, labels=(1, 2), **given):
    """`draw` in FEW steps."""
    return draw(pipe, labels, FEW, **given)


PROGRAMS: Programs = {}


def with_known_programs(handle: Handle) -> Handle:
    """Returns the handle, taking what other tests' handles traced: for tests of what is done with programs.

    A program is kept by all that it depends on and holds nothing of the handle or its pipeline. What fills the tables is the
    handle's own: which steps may be computed at once without a changed bit is found out by trying on those of this run.
    """
    for block in handle.executor.engine.blocks if handle.executor.engine else ():
        block.programs = PROGRAMS
    return handle


SHORT = 3


def short_schedule(pipe) -> Schedule:
    """All four actions in SHORT steps, every layer alike: three programs a layer where `mixed_schedule` has seven."""
    attn, ff = (SITES[i : 2 * len(pipe.transformer.transformer_blocks) : 2] for i in (0, 1))
    rows = dict.fromkeys(attn, "CPF") | dict.fromkeys(ff, "CPR")
    ks = dict.fromkeys(attn, (5,)) | dict.fromkeys(ff, (7,))
    return schedule_for(pipe, rows, ks, dict.fromkeys(attn, (Forecast((0,), (1.5,)),)), steps=SHORT)


class TwoPassPipeline(DiTPipeline):
    """DiT with one network call a guidance branch, as Wan or Qwen-Image call theirs."""

    @torch.no_grad()
    def __call__(self, class_labels, guidance_scale=4.0, generator=None, num_inference_steps=50, output_type="np"):
        n = len(class_labels)
        x = torch.cat([torch.randn(1, 4, 8, 8, generator=g) for g in generator]).to(self.device)
        labels, network = torch.tensor(class_labels, device=self.device), self.transformer
        self.scheduler.set_timesteps(num_inference_steps)
        for t in self.scheduler.timesteps:
            time, given = t.to(self.device).expand(n), x.to(network.dtype)
            cond = network(given, timestep=time, class_labels=labels).sample
            if guidance_scale > 1:
                uncond = network(given, timestep=time, class_labels=torch.full_like(labels, 1000)).sample
                cond = uncond + guidance_scale * (cond - uncond)
            x = self.scheduler.step(cond, t, x).prev_sample
        pictures = self.vae.decode(x.to(self.vae.dtype)).sample
        return type("Out", (), {"images": pictures.permute(0, 2, 3, 1).float().cpu().numpy()})()
