"""A schedule on a transformer on which diffusers' own cache is enabled (TaylorSeer, PAB, first block cache).

Expected: apply refuses (as for group offload and for a second schedule), or all computes as planned. Found: the host's cache
goes on inside our cells: a schedule of C alone changes the picture and reports all cells as executed. Enabled after apply, the
message asks to profile again.
"""
import sys, warnings
warnings.filterwarnings("ignore")
import torch, diffusers, sodaprof
from diffusers.hooks import FirstBlockCacheConfig, PyramidAttentionBroadcastConfig, TaylorSeerCacheConfig
from sodaprof.errors import SodaprofError
from sodaprof.pipelines.discover import inspect_pipeline
from sodaprof.formats.schedule import Plan, Schedule

diffusers.utils.logging.set_verbosity_error()


def fresh():
    torch.manual_seed(0)
    net = diffusers.FluxTransformer2DModel(
        in_channels=8, num_layers=2, num_single_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=12, pooled_projection_dim=8, axes_dims_rope=(4, 6, 6), guidance_embeds=True).eval()
    pipe = diffusers.FluxPipeline(diffusers.FlowMatchEulerDiscreteScheduler(), None, None, None, None, None, net)
    pipe.set_progress_bar_config(disable=True)

    def call(entries, generators):
        states = torch.stack([torch.randn(5, 12, generator=torch.Generator().manual_seed(int(e))) for e in entries])
        return pipe(prompt_embeds=states, pooled_prompt_embeds=states[:, 0, :8], height=64, width=64, generator=generators,
                    num_inference_steps=6, output_type="latent", return_dict=False)[0]

    model, sampler, _ = inspect_pipeline(pipe, "tiny", 6, own=call)
    t = model.transformers["transformer"]
    plan = Plan(t.class_name, t.fingerprint, {s.key: "C" * 6 for s in t.sites}, "." * 6)
    return pipe, lambda: call([7], [torch.Generator().manual_seed(7)]), Schedule({"transformer": plan}, sampler, model.shape, {"name": "all C", "knobs": {}})


def config(name, pipe):
    if name == "first block":
        return FirstBlockCacheConfig(threshold=0.5)
    if name == "taylor":
        return TaylorSeerCacheConfig(cache_interval=2, disable_cache_before_step=1, max_order=1)
    return PyramidAttentionBroadcastConfig(spatial_attention_block_skip_range=2, spatial_attention_timestep_skip_range=(-1, 1001),
                                           current_timestep_callback=lambda: pipe._current_timestep)


bad = []
for name in ("taylor", "pyramid", "first block"):
    for order in ("before", "after"):
        pipe, draw, schedule = fresh()
        plain = draw()
        try:
            if order == "before":
                pipe.transformer.enable_cache(config(name, pipe))
            with sodaprof.apply(pipe, schedule) as handle:
                if order == "after":
                    pipe.transformer.enable_cache(config(name, pipe))
                got = draw()
                if not torch.equal(got, plain):
                    bad.append(f"{name}, enabled {order} apply: an all-C schedule moves the picture by {float((got - plain).abs().max()):.2g}; {handle.report()}")
        except SodaprofError as error:
            if "Profile again" in str(error):
                bad.append(f"{name}, enabled {order} apply: misleading: {error}")
            else:
                print("refused:", name, order, error)
print("\n".join(bad) or "ok")
sys.exit(bool(bad))
