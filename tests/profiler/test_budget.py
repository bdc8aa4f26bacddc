"""What a profile takes: by arithmetic for the published models, and averages for sites with many tokens."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from sodaprof.errors import SodaprofError
from sodaprof.formats.profile import history_of
from sodaprof.formats.sites import Site, raster_of
from sodaprof.profiler.budget import MOST_TOKENS, Grid, Shapes, grid_of, passes
from sodaprof.profiler.reuse_errors import pooled

DOCS = Path(__file__).parents[2] / "docs" / "concepts.md"
GIB = 2**30
FREE = 0.6 * 79 * GIB  # of an 80 GB device


def published(layers, modules, latent, patch, tokens, width, steps, full=False):
    sites = [
        Site(stack, layer, module, "mlp", tokens, width, True) for layer in range(layers) for stack, module in modules
    ]
    grid = grid_of(tokens, raster_of(latent, patch, tokens), full)
    products = (math.prod(latent), history_of(steps, 8), [tokens * width])
    return Shapes(sites, [2 * tokens] * len(sites), [grid] * len(sites), steps, 2, True, 7, 2, 8, *products)


def pixart(full=False):
    modules = [("transformer_blocks", m) for m in ("attn1", "attn2", "ff")]
    return published(28, modules, [4, 128, 128], 2, 4096, 1152, 20, full)


def open_sora(full=False):
    modules = [(f"{s}_blocks", m) for s in ("spatial", "temporal") for m in ("attn", "cross_attn", "mlp")]
    return published(28, modules, [4, 15, 60, 106], [1, 2, 2], 15 * 30 * 53, 1152, 30, full)


def test_pixart_at_1024_is_within_the_memory_of_a_device_in_one_pass():
    shapes = pixart()
    batch, groups = passes(shapes, 16, FREE)
    assert len(shapes.sites) == 84
    assert (batch, len(groups)) == (4, 1)
    assert shapes.grids[0].shape == (1, 32, 32)
    assert shapes.disk_bytes < 200e6 / 6
    assert pixart(full=True).disk_bytes < 200e6


def test_open_sora_at_480p_is_within_the_memory_of_a_device_in_a_few_passes():
    shapes = open_sora()
    slot = sum(shapes.ring(i, 1) for i in range(168)) / 7
    assert len(shapes.sites) == 168
    assert slot == pytest.approx(18.6e9, rel=0.01)  # one slot of all sites
    batch, groups = passes(shapes, 16, FREE)
    assert (batch, len(groups)) == (1, 3)
    assert sum(shapes.ring(i, 1) for i in groups[0]) + shapes.scratch(1) <= FREE
    assert shapes.grids[0].shape == (15, 6, 11)
    assert shapes.disk_bytes < 200e6
    assert open_sora(full=True).disk_bytes > 200e6  # as an option


def test_the_figures_in_the_docs_are_these():
    text = DOCS.read_text(encoding="utf-8")
    for name, shapes in (("PixArt-XL, 1024", pixart()), ("Open-Sora, 480p", open_sora())):
        batch, groups = passes(shapes, 16, FREE)
        extra = shapes.scratch(batch) + max(sum(shapes.ring(i, batch) for i in g) for g in groups)
        row = (
            f"| {name} | {shapes.sites[0].tokens} | {len(shapes.sites)} | {shapes.ring(0, 1) / 2**20:.0f} MiB | "
            f"{batch} | {len(groups)} | {extra / GIB:.1f} GiB | {shapes.host_bytes / 2**20:.0f} MiB | "
            f"{shapes.disk_bytes / 2**20:.0f} MiB |"
        )
        assert row in text, row


def test_fewer_generations_at_once_before_more_passes():
    shapes = published(2, [("blocks", "ff")], [4, 8, 8], 2, 16, 8, 4)
    all_of = lambda batch: shapes.scratch(batch) + 2 * shapes.ring(0, batch)  # noqa: E731
    assert passes(shapes, 8, all_of(8)) == (8, [[0, 1]])
    assert passes(shapes, 8, all_of(8) - 1) == (4, [[0, 1]])
    assert passes(shapes, 8, all_of(1) - 1) == (1, [[0], [1]])
    with pytest.raises(SodaprofError, match="--max-interval"):
        passes(shapes, 8, shapes.ring(0, 1))


def test_errors_a_token_are_averaged_over_blocks_of_a_frame():
    grid = Grid(2, 3, 5, 2)
    assert grid.shape == (2, 2, 3)
    values = torch.randn(2, 3, 5, 4)
    found = pooled(values.reshape(30, 4), grid).reshape(2, 2, 3, 4)
    for frame, row, column in np.ndindex(2, 2, 3):
        block = values[frame, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2]
        torch.testing.assert_close(found[frame, row, column], block.reshape(-1, 4).mean(0))


def test_tokens_that_are_no_raster_are_averaged_in_runs():
    grid = grid_of(2500, None, False)
    assert (grid.shape, grid.side) == ((1, 1, 834), 3)
    values = torch.randn(2500, 2)
    found = pooled(values, grid)
    torch.testing.assert_close(found[1], values[3:6].mean(0))
    torch.testing.assert_close(found[-1], values[2499])
    assert pooled(values, grid_of(2500, None, True)) is values


@pytest.mark.parametrize(
    ("latent", "patch", "tokens", "raster"),
    [
        ([4, 64, 64], 2, 1024, (1, 32, 32)),
        ([4, 15, 60, 106], [1, 2, 2], 23850, (15, 30, 53)),
        ([4, 15, 30, 53], [1, 2, 2], 15 * 15 * 27, (15, 15, 27)),  # padded
        ([16, 21, 60, 104], [1, 2, 2], 21 * 30 * 52, (21, 30, 52)),
        ([4, 64, 64], 2, 1024 + 77, None),  # text among them
        ([1024, 64], 1, 1024, None),  # packed latents
    ],
)
def test_rasters(latent, patch, tokens, raster):
    assert raster_of(latent, patch, tokens) == raster


def test_errors_of_few_tokens_are_not_averaged():
    assert grid_of(MOST_TOKENS, (1, 32, 32), False) == Grid(1, 32, 32, 1)


def test_a_profile_states_its_grid_and_keeps_its_means(tmp_path, monkeypatch):
    from sodaprof.formats.tables import read_table
    from sodaprof.profiler import budget as memory
    from sodaprof.profiler.plan import plan_profile
    from sodaprof.profiler.run import run_profile
    from tests.tiny_pipelines import tiny_pipe

    monkeypatch.setattr(memory, "MOST_TOKENS", 4)
    columns = ["step", "age", "branch", "cos_mean"]
    found = {}
    for full in (False, True):
        plan = plan_profile(tiny_pipe(), "m", steps=4, samples=2, max_interval=3, batch_size=2, full_tokens=full)
        run_profile(tiny_pipe(), plan, tmp_path / str(full))
        import pyarrow.parquet as pq

        found[full] = pq.read_table(tmp_path / str(full) / "caching.parquet").to_pylist()
        grids = pq.read_table(tmp_path / str(full) / "sites.parquet")["token_grid"].to_pylist()
        assert grids == [[1, 4, 4] if full else [1, 2, 2]] * 4
        assert read_table(tmp_path / str(full), "caching", columns)["step"].size
        assert json.loads((tmp_path / str(full) / "manifest.json").read_text())["tables"]["sites"] == 2
    for pooled_row, row in zip(found[False], found[True], strict=True):
        if row["token_cos"] is not None:
            blocks = np.array(row["token_cos"]).reshape(2, 2, 2, 2).mean((1, 3)).ravel()
            np.testing.assert_allclose(pooled_row["token_cos"], blocks, rtol=5e-3, atol=1e-6)
