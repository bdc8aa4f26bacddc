"""Two prompts from the same noise in one batch (prompts compared at one seed), on pipelines without both branches in a batch.

Expected: the pictures of the plain pipeline under an all-C schedule. Found: refused, "found both branches in one batch", which
is not so, with advice that does not help.
"""
import sys, warnings
warnings.filterwarnings("ignore")
import torch, diffusers, sodaprof
from sodaprof.errors import SodaprofError
from sodaprof.pipelines.discover import inspect_pipeline
from sodaprof.formats.schedule import Plan, Schedule

diffusers.utils.logging.set_verbosity_error()
torch.manual_seed(0)
flux = diffusers.FluxPipeline(diffusers.FlowMatchEulerDiscreteScheduler(), None, None, None, None, None, diffusers.FluxTransformer2DModel(
    in_channels=8, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2, joint_attention_dim=12,
    pooled_projection_dim=8, axes_dims_rope=(4, 6, 6), guidance_embeds=True).eval())
qwen = diffusers.QwenImagePipeline(diffusers.FlowMatchEulerDiscreteScheduler(), None, None, None, diffusers.QwenImageTransformer2DModel(
    in_channels=8, out_channels=2, num_layers=1, attention_head_dim=16, num_attention_heads=2, joint_attention_dim=12,
    axes_dims_rope=(4, 6, 6)).eval())


def states(entries):
    return torch.stack([torch.randn(5, 12, generator=torch.Generator().manual_seed(int(e))) for e in entries])


def call_flux(entries, generators):
    s = states(entries)
    return flux(prompt_embeds=s, pooled_prompt_embeds=s[:, 0, :8], height=64, width=64, generator=generators, num_inference_steps=4,
                output_type="latent", return_dict=False)[0]


def call_qwen(entries, generators):
    s = states(entries)
    mask = torch.ones(len(entries), 5, dtype=torch.int64)
    return qwen(prompt_embeds=s, prompt_embeds_mask=mask, negative_prompt_embeds=s * 0, negative_prompt_embeds_mask=mask, height=64,
                width=64, generator=generators, num_inference_steps=4, output_type="latent", return_dict=False)[0]


bad = []
for name, pipe, call in (("FluxPipeline", flux, call_flux), ("QwenImagePipeline", qwen, call_qwen)):
    pipe.set_progress_bar_config(disable=True)
    model, sampler, _ = inspect_pipeline(pipe, "tiny", 4, own=call)
    t = model.transformers["transformer"]
    plan = Plan(t.class_name, t.fingerprint, {s.key: "C" * 4 for s in t.sites}, "." * 4)
    schedule = Schedule({"transformer": plan}, sampler, model.shape, {"name": "all C", "knobs": {}})
    draw = lambda: call([7, 8], [torch.Generator().manual_seed(5) for _ in range(2)])  # noqa: E731
    plain = draw()
    with sodaprof.apply(pipe, schedule):
        try:
            if not torch.equal(draw(), plain):
                bad.append(f"{name}: another picture")
        except SodaprofError as error:
            bad.append(f"{name} (form {sampler.guidance_form!r}): {error}")
print("\n".join(bad) or "ok")
sys.exit(bool(bad))
