"""Judges a trained reference model by its classifier and writes the model card."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from .classifier import load_classifier
from .drawings import CLASSES
from .load import call, default_guidance, load_pipeline, pictures_of

SEED = 2_000_000  # of the first judged sample: apart from calibration and evaluation seeds
BATCH = 20

CARD = """# tiny-dit

A class-conditional diffusion transformer small enough to ship: `DiTTransformer2DModel` (adaLN-zero, 8 layers of width 128,
64 tokens) over the latents [4, 16, 16] of a small `AutoencoderKL`; v-prediction, cosine schedule, bfloat16 on disk. It draws
32 x 32 pictures of ten classes (labels 0-9: {classes}); 1000 is the null class.

Trained from nothing on drawings that `sodaprof/models/drawings.py` makes; no data set is needed.

```
make train    # python -m sodaprof.models.train_tiny_dit build/train
```

| | |
| --- | --- |
| 50-step samples that the classifier recognises | {accuracy:.1%} of {judged} (guidance {scale}, seeds from {first}) |
| classifier on 5000 held-out drawings | {classifier:.2%} |
| autoencoder on 500 held-out drawings | {vae} dB PSNR |
| training seed | {seed} |
| seconds: classifier, autoencoder, transformer | {seconds} ({device}) |

Recognised by class: {by_class}.

| step | loss | seconds |
| ---: | ---: | ---: |
{curve}
"""


def write_card(out: Path, judged: int, seed: int, device: str) -> None:
    """Samples `judged` pictures of OUT/pipeline, judges them, and writes OUT/pipeline/README.md."""
    folder = out / "pipeline"
    pipe, classifier = load_pipeline(str(folder), device=device), load_classifier(folder)
    if classifier is None:
        raise SystemExit(f"{folder}: no classifier. Run the classifier's stage, then the transformer's.")
    scale, hits = default_guidance(pipe), torch.zeros(len(CLASSES))
    for start in range(0, judged, BATCH):
        labels: list[int | str] = [(start + i) % len(CLASSES) for i in range(BATCH)]
        pictures = pictures_of(call(pipe, labels, [SEED + start + i for i in range(BATCH)], 50, scale))
        with torch.no_grad():
            guess = classifier(torch.from_numpy(pictures).permute(0, 3, 1, 2) * 2 - 1).argmax(1)
        for label, found in zip(labels, guess.tolist(), strict=True):
            hits[int(label)] += label == found
        print("card", start + BATCH, f"{hits.sum().item() / (start + BATCH):.3f}", flush=True)
    parts = {s: json.loads((out / f"training.{s}.json").read_text()) for s in ("classifier", "vae", "dit")}
    curve = [row for row in parts["dit"]["curve"] if row["step"] % 1000 == 0]
    text = CARD.format(
        classes=", ".join(CLASSES),
        accuracy=hits.sum().item() / judged,
        judged=judged,
        scale=scale,
        first=SEED,
        classifier=parts["classifier"]["held_out_accuracy"],
        vae=parts["vae"]["held_out_psnr_db"],
        seed=seed,
        seconds=", ".join(str(parts[s].get("seconds", "unfinished")) for s in parts),
        device=device,
        by_class=", ".join(f"{c} {h / (judged / 10):.0%}" for c, h in zip(CLASSES, hits.tolist(), strict=True)),
        curve="\n".join(f"| {row['step']} | {row['loss']} | {row['seconds']} |" for row in curve),
    )
    (folder / "README.md").write_text(text)
