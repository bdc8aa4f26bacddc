"""sodaprof.scheduler on an image-to-image pipeline at strength 1 (the whole trajectory: nothing is left out).

The pipeline asks its scheduler for scale_noise; the answer is an AttributeError of Python's, neither a picture nor a refusal
in words. (Under sodaprof.apply the same call runs.) Exits 1 while that is so.
"""
import sys
import os; sys.path.insert(0, os.environ.get("PROJECT", "."))
import torch, diffusers, sodaprof
diffusers.utils.logging.set_verbosity_error()
from tests.zoo.zoo_pipelines import network, euler, text, no_text, pooled
from tests.updated import with_update
from sodaprof.pipelines.discover import inspect_pipeline
from sodaprof.formats.schedule import Plan, Schedule

net = network("SD3Transformer2DModel"); torch.manual_seed(0)
vae = diffusers.AutoencoderKL(block_out_channels=(8,), layers_per_block=1, latent_channels=net.config.in_channels, norm_num_groups=1, shift_factor=0.0).eval()
pipe = diffusers.StableDiffusion3Img2ImgPipeline(net, euler(), vae, *[None] * 6)
pipe.set_progress_bar_config(disable=True)
image = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
def draw(steps=6, strength=1.0):
    return pipe(image=image, strength=strength, num_inference_steps=steps, height=16, width=16, prompt_embeds=text([1]), negative_prompt_embeds=no_text([1]),
                pooled_prompt_embeds=pooled([1]), negative_pooled_prompt_embeds=pooled([1]) * 0, output_type="latent",
                generator=torch.Generator().manual_seed(0), return_dict=False)[0]
model, sampler, _ = inspect_pipeline(pipe, "tiny", 6, own=lambda e, g: draw())
plans = {n: Plan(t.class_name, t.fingerprint, dict.fromkeys((s.key for s in t.sites), "C" * 6), "." * 6) for n, t in model.transformers.items()}
draw()
schedule = with_update(pipe, Schedule(plans, sampler, model.shape, {"name": "test", "knobs": {}}), "..-.-.", stir=0.1)
with sodaprof.apply(pipe, schedule):
    wanted = draw()
print("apply runs it", tuple(wanted.shape))
pipe.scheduler = sodaprof.scheduler(schedule)
try:
    found = draw(4)
    print("scheduler:", float((found - wanted).abs().max()))
    sys.exit(float((found - wanted).abs().max()) > 1e-4)
except sodaprof.SodaprofError as error:
    print("refused in words:", error); sys.exit(0)
except Exception as error:
    print(f"{type(error).__name__}: {error}"); sys.exit(1)
