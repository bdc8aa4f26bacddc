"""Judges a trained reference model by its classifier and writes the model card."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from sodaprof.measure.classifier import Classifier, load_classifier
from sodaprof.pipelines.load import call, default_guidance, load_pipeline, pictures_of
from tests.reference import motions, scenes
from tests.reference.drawings import CLASSES

SEED = 2_000_000  # of the first judged sample: apart from calibration and evaluation seeds
BATCH = 20

DIT_CARD = """# tiny-dit

A class-conditional diffusion transformer small enough to ship: `DiTTransformer2DModel` (adaLN-zero, 8 layers of width 128,
64 tokens) over the latents [4, 16, 16] of a small `AutoencoderKL`; v-prediction, cosine schedule, bfloat16 on disk. It draws
32 x 32 pictures of ten classes (labels 0-9: {classes}); 1000 is the null class.

Trained from nothing on drawings that `tests/reference/drawings.py` makes; no data set is needed.

```
make train    # python -m tests.reference.train_tiny_dit build/train
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


PIXART_CARD = """# tiny-pixart

A text-to-image diffusion transformer small enough to ship: `PixArtAlphaPipeline` with a `PixArtTransformer2DModel` (adaLN-single,
8 layers of width 128, 64 tokens) over the latents [4, 16, 16] of a small `AutoencoderKL`, a `T5EncoderModel` (2 layers of width
64) and a `T5Tokenizer` of {words} words; v-prediction, cosine schedule, DPM-Solver++ of second order, bfloat16 on disk. It draws
32 x 32 pictures of two objects, one beside or above the other:

- shapes {shapes}
- colours {colours}
- sizes {sizes}
- grounds {grounds}, each a plain background or a gradient
- left of, right of, above, below

such as "a large red ring left of a small blue disk on a grey gradient", 20 steps. Other words are unknown to it. PixArt's own
pipeline rounds sizes to those of the published models, so outside of sodaprof call it with `use_resolution_binning=False`.

Trained from nothing on captioned scenes that `tests/reference/scenes.py` makes, but for the autoencoder: its encoder is that of
tiny-dit as it is, its decoder that of tiny-dit, trained on with scenes. No data set is needed. The text encoder learns first, to
tell in the words of an object its shape, colour, size and place, and is then frozen.

```
make train-pixart    # python -m tests.reference.train_tiny_pixart build/train-pixart
```

Whether a prompt is followed is judged on {judged} prompts of combinations of shapes, colours and axis that training never saw
(one in ten is held out). The judge in `classifier/` learnt from drawings alone, and sees neither captions nor samples; what it
answers is compared with what the prompt says. A property is right where it is right of both objects.

| | |
| --- | --- |
| colour | {colour:.1%} |
| shape | {shape:.1%} |
| relation | {relation:.1%} |
| size, where said | {size:.1%} |
| all of them | {all:.1%} |

| | |
| --- | --- |
| samples | {judged}, 20 steps, guidance {scale}, seeds from {first} |
| worst answer of the judge on 5000 held-out drawings | {classifier:.2%} |
| text encoder on 1000 held-out captions, worst question | {text:.2%} |
| autoencoder on 500 drawings | {vae} dB PSNR |
| training seed | {seed} |
| seconds: text encoder, judge, decoder, transformer | {seconds} ({threads}) |

By shape, both of its uses counted: {by_shape}.

| step | loss | seconds |
| ---: | ---: | ---: |
{curve}
"""


OPENSORA_CARD = """# tiny-opensora

A text-to-video diffusion transformer small enough to ship: `OpenSoraPipeline` with an `STDiT3` (8 spatial and 8 temporal blocks
of width 88, 5 latent frames of 16 tokens), an `AutoencoderKLOpenSora` (spatial and temporal half, 17 frames to 5), a
`T5EncoderModel` (2 layers of width 64) and a `T5Tokenizer` of {words} words; rectified flow without the timestep transform, which
is made for sizes from 144p on; bfloat16 on disk. It draws clips of 17 frames of 32 x 32 pixels, of one object that moves:

- shapes {shapes}
- colours {colours}
- grounds {grounds}
- right, left, down, up

such as "a red disk moves right on a grey background", 30 steps, guidance 7. Other words are unknown to it.

Trained from nothing on captioned clips that `tests/reference/motions.py` makes; no data set is needed.

```
make train-opensora    # python -m tests.reference.train_tiny_opensora build/train-opensora
```

Whether a prompt is followed is read off the frames by `motions.read`, which has nothing learned in it: it follows the centre of
what differs from the ground, and lays the outline of each shape over it. {judged} prompts, of combinations of shape, colour and
direction that training never saw (one in six is held out), seeds from {first}:

| | |
| --- | --- |
| direction | {direction:.1%} |
| shape | {shape:.1%} |
| colour | {colour:.1%} |
| all of them | {all:.1%} |

| | |
| --- | --- |
| autoencoder: spatial half on held-out frames | {spatial} dB PSNR |
| autoencoder, both halves, on held-out clips | {temporal} dB PSNR; of these, {read:.0%} are read right |
| seconds: spatial, temporal half, network | {seconds} ({threads}) |

| step | loss | seconds |
| ---: | ---: | ---: |
{curve}
"""


def write_dit_card(out: Path, judged: int, seed: int, device: str) -> None:
    """Samples `judged` pictures of OUT/pipeline, judges them, and writes OUT/pipeline/README.md."""
    pipe, classifier = _open(out, device)
    labels: list[int | str] = [i % len(CLASSES) for i in range(judged)]
    hits = torch.zeros(len(CLASSES))
    for label, found in zip(labels, classifier(_sample(pipe, labels, 50)).argmax(1).tolist(), strict=True):
        hits[int(label)] += label == found
    parts = _curves(out, ("classifier", "vae", "dit"))
    text = DIT_CARD.format(
        classes=", ".join(CLASSES),
        accuracy=hits.sum().item() / judged,
        judged=judged,
        scale=default_guidance(pipe),
        first=SEED,
        classifier=parts["classifier"]["held_out_accuracy"],
        vae=parts["vae"]["held_out_psnr_db"],
        seed=seed,
        seconds=_seconds(parts),
        device=device,
        by_class=", ".join(f"{c} {h / (judged / 10):.0%}" for c, h in zip(CLASSES, hits.tolist(), strict=True)),
        curve=_rows(parts["dit"], 1000),
    )
    (out / "pipeline" / "README.md").write_text(text)


def write_pixart_card(out: Path, judged: int, seed: int) -> None:
    """Samples `judged` held-out prompts of OUT/pipeline, judges the pictures, and writes OUT/pipeline/README.md."""
    pipe, judge = _open(out, "cpu")
    generator = torch.Generator().manual_seed(SEED)
    asked = scenes.sample(judged, generator, unseen=True)
    captions = [scenes.caption(asked, row, generator) for row in range(judged)]
    found = judge.predictions(_sample(pipe, [c.text for c in captions], 20))
    said = torch.tensor([c.says_size for c in captions])
    followed = scenes.followed(asked, said, found)
    share = {what: right.float().mean().item() for what, right in followed.items()}
    share["size"] = followed["size"][said.any(1)].float().mean().item()
    alike = (found[:, [1, 4]] == asked.shape).float()
    parts = _curves(out, ("text", "judge", "vae", "transformer"))
    text = PIXART_CARD.format(
        words=len(scenes.vocabulary()),
        shapes=", ".join(scenes.SHAPES),
        colours=", ".join(scenes.COLOURS),
        sizes=", ".join(scenes.SIZES),
        grounds=", ".join(scenes.GROUNDS),
        judged=judged,
        **share,
        scale=default_guidance(pipe),
        first=SEED,
        classifier=parts["judge"]["held_out_accuracy"],
        text=parts["text"]["held_out_accuracy"],
        vae=parts["vae"]["held_out_psnr_db"],
        seed=seed,
        seconds=_seconds(parts),
        threads=f"{parts['transformer'].get('threads', '?')} threads of a CPU",
        by_shape=", ".join(
            f"{name} {alike[asked.shape == index].mean().item():.0%}" for index, name in enumerate(scenes.SHAPES)
        ),
        curve=_rows(parts["transformer"], 500),
    )
    (out / "pipeline" / "README.md").write_text(text)


def write_opensora_card(out: Path) -> None:
    """Writes OUT/pipeline/README.md from what the stages of the training left in OUT, its judge included."""
    parts = _curves(out, ("vae", "temporal", "network"))
    judged = json.loads((out / "training.judge.json").read_text())
    text = OPENSORA_CARD.format(
        words=len(motions.vocabulary()),
        shapes=", ".join(scenes.SHAPES),
        colours=", ".join(scenes.COLOURS),
        grounds=", ".join(motions.GROUNDS),
        judged=judged["judged"],
        first=judged["first_seed"],
        **judged["held_out"],
        spatial=parts["vae"]["held_out_psnr_db"],
        temporal=parts["temporal"]["held_out_psnr_db"],
        read=parts["temporal"]["read_right"]["all"],
        seconds=_seconds(parts),
        threads=f"{parts['network'].get('threads', '?')} threads of a CPU",
        curve=_rows(parts["network"], 500),
    )
    (out / "pipeline" / "README.md").write_text(text)


def _open(out: Path, device: str) -> tuple[Any, Classifier]:
    folder = out / "pipeline"
    classifier = load_classifier(folder)
    if classifier is None:
        raise SystemExit(f"{folder}: no classifier. Run the classifier's stage, then the transformer's.")
    return load_pipeline(str(folder), device=device), classifier


@torch.no_grad()
def _sample(pipe: Any, entries: Sequence[int | str], steps: int) -> torch.Tensor:
    """Pictures [n, 3, H, W] in [-1, 1] of the entries, at the pipeline's own guidance, seeds from SEED."""
    parts = []
    for start in range(0, len(entries), BATCH):
        some = entries[start : start + BATCH]
        seeds = [SEED + start + i for i in range(len(some))]
        parts.append(torch.from_numpy(pictures_of(call(pipe, some, seeds, steps, default_guidance(pipe)))))
        print("card", start + len(some), flush=True)
    return torch.cat(parts).permute(0, 3, 1, 2) * 2 - 1


def _curves(out: Path, stages: Sequence[str]) -> dict[str, Any]:
    return {stage: json.loads((out / f"training.{stage}.json").read_text()) for stage in stages}


def _seconds(parts: dict[str, Any]) -> str:
    return ", ".join(str(part.get("seconds", "unfinished")) for part in parts.values())


def _rows(part: dict[str, Any], every: int) -> str:
    rows = [row for row in part["curve"] if row["step"] % every == 0]
    return "\n".join(f"| {row['step']} | {row['loss']} | {row['seconds']} |" for row in rows)
