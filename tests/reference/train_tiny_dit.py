"""Trains the reference model `tiny-dit` from nothing: classifier, autoencoder, then the diffusion transformer.

    python -m tests.reference.train_tiny_dit OUT [--vae-steps N --dit-steps N ...]

Each stage leaves its result in OUT and is skipped when that is there; the transformer's stage also leaves a checkpoint
every few hundred steps and goes on from it. The curve of every stage is in OUT/training.STAGE.json; OUT/pipeline is
the whole pipeline folder.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import shutil
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline, DiTTransformer2DModel

from sodaprof.measure.classifier import Classifier
from tests.reference.card import write_dit_card
from tests.reference.drawings import CLASSES, SIZE, draw
from tests.reference.linear_start import start_linear
from tests.reference.training import average, rate, record, train_autoencoder

NULL = 1000  # DiTPipeline's own null class


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--stage", choices=["classifier", "vae", "dit", "card", "all"], default="all")
    parser.add_argument("--classifier-steps", type=int, default=1200)
    parser.add_argument("--vae-steps", type=int, default=4000)
    parser.add_argument("--latents", type=int, default=60_000)
    parser.add_argument("--dit-steps", type=int, default=9_000)
    parser.add_argument("--judged", type=int, default=500, help="samples that the model card's accuracy is taken from")
    parser.add_argument(
        "--init", type=Path, help="a pipeline folder whose parts to go on from, instead of from nothing"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--compile", action="store_true", help="compile the transformer's training step")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(args.threads)
    for part in ("vae", "classifier"):
        if args.init is not None and not (args.out / part).exists():
            shutil.copytree(args.init / part, args.out / part)
    stages = {"classifier": train_classifier, "vae": train_vae, "dit": train_dit, "card": judge}
    for name, stage in stages.items():
        if args.stage in (name, "all"):
            torch.manual_seed(args.seed)
            stage(args)


def batch(size: int, generator: torch.Generator, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    labels = torch.randint(0, len(CLASSES), (size,), generator=generator)
    return draw(labels, generator).to(device), labels.to(device)


def train_classifier(args: argparse.Namespace) -> None:
    folder = args.out / "classifier"
    if folder.exists():
        return
    model = Classifier(CLASSES).to(args.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=1e-2)
    generator, start = torch.Generator().manual_seed(args.seed + 1), time.time()
    for step in range(args.classifier_steps):
        x, y = batch(64, generator, args.device)
        # the autoencoder's pictures are softer and noisier than drawings: be indifferent to that
        if step % 4 == 0:
            x = F.interpolate(F.interpolate(x, scale_factor=0.7, mode="bilinear"), SIZE, mode="bilinear")
        x = x + 0.06 * torch.rand(1).item() * torch.randn_like(x)
        optimizer.param_groups[0]["lr"] = rate(step, args.classifier_steps, 2e-3)
        loss = F.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 250 == 249:
            record(args.out, "classifier", row={"step": step + 1, "loss": round(loss.item(), 5)})
    model.eval()
    held_out = torch.Generator().manual_seed(args.seed + 999_983)
    with torch.no_grad():
        hits = sum(
            (model(x).argmax(1) == y).sum().item() for x, y in (batch(100, held_out, args.device) for _ in range(50))
        )
    model.cpu().save(folder)
    record(args.out, "classifier", held_out_accuracy=hits / 5000, seconds=round(time.time() - start))


def make_vae() -> AutoencoderKL:
    """Two-fold downsampling to [4, 16, 16], started as a linear map: see `start_linear`."""
    vae = AutoencoderKL(
        block_out_channels=(16, 32), layers_per_block=1, latent_channels=4, norm_num_groups=1, sample_size=SIZE,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
    )  # fmt: skip
    start_linear(vae)
    return vae


def train_vae(args: argparse.Namespace) -> None:
    folder = args.out / "vae"
    if folder.exists():
        return

    def pictures(count: int, generator: torch.Generator) -> torch.Tensor:
        return batch(count, generator, args.device)[0]

    vae = make_vae().to(args.device, memory_format=torch.channels_last)
    vae, spread = train_autoencoder(args.out, vae, pictures, args.vae_steps, args.seed)
    vae.register_to_config(scaling_factor=round(1 / spread, 5))
    vae.save_pretrained(folder)


def make_dit() -> DiTTransformer2DModel:
    """adaLN-zero, 8 layers of width 128, 64 tokens; label rows other than 0…9 and the null class stay zero."""
    model = DiTTransformer2DModel(
        num_attention_heads=4, attention_head_dim=32, in_channels=4, out_channels=4, num_layers=8, sample_size=16,
        patch_size=2, num_embeds_ada_norm=NULL,
    )  # fmt: skip
    with torch.no_grad():
        for block in model.transformer_blocks:
            block.norm1.linear.weight.zero_()
            block.norm1.linear.bias.zero_()
            table = block.norm1.emb.class_embedder.embedding_table.weight
            table.mul_(0.02)
            table[len(CLASSES) : NULL] = 0
        for layer in (model.proj_out_1, model.proj_out_2):
            layer.weight.zero_()
            layer.bias.zero_()
    return model


def make_scheduler() -> DDIMScheduler:
    return DDIMScheduler(
        num_train_timesteps=1000, beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction", clip_sample=False
    )


def make_latents(args: argparse.Namespace, vae: AutoencoderKL) -> tuple[torch.Tensor, torch.Tensor]:
    """Scaled posterior means [n, 4, 16, 16] of fresh drawings, and their labels [n]; kept in OUT."""
    path = args.out / "latents.pt"
    if path.exists():
        return torch.load(path)
    generator, parts = torch.Generator().manual_seed(args.seed + 3), []
    with torch.no_grad():
        for _ in range(args.latents // 200):
            x, y = batch(200, generator, args.device)
            parts.append((vae.encode(x).latent_dist.mean.cpu() * vae.config.scaling_factor, y.cpu()))
    latents, labels = (torch.cat(p) for p in zip(*parts, strict=True))
    torch.save((latents, labels), path)
    return latents, labels


def train_dit(args: argparse.Namespace) -> None:
    vae = AutoencoderKL.from_pretrained(args.out / "vae").eval().to(args.device)
    latents, labels = make_latents(args, vae)
    model = make_dit() if args.init is None else DiTTransformer2DModel.from_pretrained(args.init / "transformer")
    model = model.float().eval().to(args.device)  # eval: DiT's label dropping is per block; we drop labels below
    ema = copy.deepcopy(model).requires_grad_(False)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=1e-3, betas=(0.9, 0.99), fused=True)
    alphas = make_scheduler().alphas_cumprod.to(args.device)
    generator = torch.Generator().manual_seed(args.seed + 4)
    first, seconds, path = 0, 0.0, args.out / "checkpoint.pt"
    if path.exists():
        saved = torch.load(path)
        model.load_state_dict(saved["model"])
        ema.load_state_dict(saved["ema"])
        optimizer.load_state_dict(saved["optimizer"])
        generator.set_state(saved["generator"])
        first, seconds = saved["step"], saved["seconds"]
    call = torch.compile(model) if args.compile else model
    start, losses = time.time() - seconds, []
    for step in range(first, args.dit_steps):
        rows = torch.randint(0, len(latents), (64,), generator=generator)
        t = torch.randint(0, 1000, (64,), generator=generator)
        noise = torch.randn(64, *latents.shape[1:], generator=generator)
        drop = torch.rand(64, generator=generator) < 0.1
        x, noise, y = (
            latents[rows].to(args.device),
            noise.to(args.device),
            labels[rows].masked_fill(drop, NULL).to(args.device),
        )
        t = t.to(args.device)
        a = alphas[t][:, None, None, None]
        noisy, target = a.sqrt() * x + (1 - a).sqrt() * noise, a.sqrt() * noise - (1 - a).sqrt() * x
        loss = F.mse_loss(call(noisy, timestep=t, class_labels=y, return_dict=False)[0], target)
        optimizer.param_groups[0]["lr"] = rate(step, args.dit_steps, 1e-3)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        average(ema, model, step)
        losses.append(loss.detach())
        if step % 250 == 249:
            row = {
                "step": step + 1,
                "loss": round(torch.stack(losses).mean().item(), 4),
                "seconds": round(time.time() - start),
            }
            record(args.out, "dit", row=row)
            losses = []
            state = {"model": model.state_dict(), "ema": ema.state_dict(), "optimizer": optimizer.state_dict()}
            state |= {"generator": generator.get_state(), "step": step + 1, "seconds": time.time() - start}
            torch.save(state, args.out / "checkpoint.tmp")
            os.replace(args.out / "checkpoint.tmp", path)
            if step % 1000 == 999:
                export(args.out, ema)
    export(args.out, ema)
    record(args.out, "dit", seconds=round(time.time() - start), device=args.device, threads=torch.get_num_threads())


def judge(args: argparse.Namespace) -> None:
    write_dit_card(args.out, args.judged, args.seed, args.device)


def export(out: Path, ema: DiTTransformer2DModel) -> None:
    """Writes OUT/pipeline: the whole pipeline folder in bfloat16, classifier beside it."""
    vae = AutoencoderKL.from_pretrained(out / "vae", dtype=torch.bfloat16)
    pipe = DiTPipeline(copy.deepcopy(ema).cpu().to(torch.bfloat16), vae, make_scheduler(), dict(enumerate(CLASSES)))
    pipe.save_pretrained(out / "pipeline")
    index = out / "pipeline" / "model_index.json"  # DiTPipeline reads its labels from there but does not write them
    index.write_text(
        json.dumps(json.loads(index.read_text()) | {"id2label": dict(enumerate(CLASSES))}, indent=2) + "\n"
    )
    if (out / "classifier").exists():
        shutil.copytree(out / "classifier", out / "pipeline" / "classifier", dirs_exist_ok=True)


if __name__ == "__main__":
    main()
