"""What the profiler measures, against the definitions written out in float64; and its sums over generations."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from sodaprof.formats.tables import CELL, MEAN, read_table
from sodaprof.profiler.budget import Grid
from sodaprof.profiler.reuse_errors import Ring, kept_tokens
from sodaprof.profiler.statistics import Statistics
from sodaprof.runtime.hooks.tokens import feature_mean, top

RATES = [0.0, 0.125, 0.25, 0.5, 0.75, 0.9375, 1.0]


def one_minus_cos(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Returns 1 − cosine over the last axis in extended precision."""
    a, b = a.astype(np.longdouble), b.astype(np.longdouble)
    return (1 - (a * b).sum(-1) / np.sqrt((a * a).sum(-1) * (b * b).sum(-1))).astype(np.float64)


def after_pruning(new: np.ndarray, stale: np.ndarray, rate: float) -> np.ndarray:
    """Returns what a pruned module returns [N, D]: rows of `new` for the tokens of large stale output, else of `stale`."""
    tokens = len(new)
    kept = np.argsort(-np.abs(stale).mean(-1))[: int(np.rint((1 - rate) * tokens))]
    mixed = stale.copy()
    mixed[kept] = new[kept]
    return mixed


def outputs(
    steps: int, shape: tuple[int, ...], dtype: torch.dtype = torch.float32, seed: int = 0
) -> list[torch.Tensor]:
    """Returns a random walk of outputs [B, N, D] whose rows differ in size."""
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=draw)
    found = []
    for _ in range(steps):
        x = x + 0.4 * torch.randn(shape, generator=draw)
        found.append((x * torch.linspace(0.5, 2, shape[1])[:, None]).to(dtype))
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("ages", [1, 3, 7, 12])
def test_errors_equal_their_definitions_at_every_age(ages, dtype):
    """Nine steps, so that the shorter rings wrap around more than once and the longest is never full."""
    walk = outputs(9, (2, 8, 5), dtype)
    exact = [x.to(torch.float64).numpy() for x in walk]
    ring = Ring(ages, torch.tensor(RATES))
    for step, x in enumerate(walk):
        errors = ring.push(x)
        if step == 0:
            assert errors is None
            continue
        known = min(step, ages)
        assert errors.whole.shape == (2, known, 3)
        assert errors.tokens.shape == (8, known)
        assert errors.pruned.shape == (2, known, len(RATES))
        for age in range(1, known + 1):
            new, stale = exact[step], exact[step - age]
            a_token = one_minus_cos(stale, new)  # [B, N]
            got = {name: getattr(errors, name).numpy() for name in ("whole", "tokens", "pruned")}
            l1 = np.abs(stale - new).sum((1, 2)) / np.abs(new).sum((1, 2))
            l2 = np.sqrt(np.square(stale - new).sum((1, 2)) / np.square(new).sum((1, 2)))
            np.testing.assert_allclose(got["whole"][:, age - 1, 0], a_token.mean(1), rtol=2e-5)
            np.testing.assert_allclose(got["whole"][:, age - 1, 1], l1, rtol=2e-5)
            np.testing.assert_allclose(got["whole"][:, age - 1, 2], l2, rtol=2e-5)
            np.testing.assert_allclose(got["tokens"][:, age - 1], a_token.sum(0), rtol=2e-5)
            for i, rate in enumerate(RATES):
                mixed = np.stack([after_pruning(new[b], stale[b], rate) for b in range(2)])
                expected = one_minus_cos(mixed, new).mean(1)
                np.testing.assert_allclose(got["pruned"][:, age - 1, i], expected, rtol=2e-5, atol=1e-7)


def test_kept_tokens_are_those_that_the_runtime_would_recompute():
    """E_p at each rate is what dropping exactly the tokens that `top` leaves out costs."""
    stale, new = outputs(2, (3, 16, 6))
    ring = Ring(1, torch.tensor(RATES))
    ring.push(stale)
    errors = ring.push(new)
    a_token = one_minus_cos(stale.double().numpy(), new.double().numpy())
    for i, k in enumerate(kept_tokens(torch.tensor(RATES), 16).tolist()):
        assert k == [16, 14, 12, 8, 4, 1, 0][i]
        kept = top(feature_mean(stale), k).numpy()
        dropped = a_token.copy()
        np.put_along_axis(dropped, kept, 0.0, axis=1)
        np.testing.assert_allclose(errors.pruned[:, 0, i].numpy(), dropped.mean(1), rtol=2e-5, atol=1e-7)


def test_kept_tokens_are_rounded():
    rates = torch.tensor([0.0, 0.125, 0.25, 0.9, 0.96, 1.0])
    assert kept_tokens(rates, 10).tolist() == [10, 9, 8, 1, 0, 0]  # of 10, 8.75, 7.5, 1, 0.4, 0
    assert kept_tokens(rates, 256).tolist() == [256, 224, 192, 26, 10, 0]


@pytest.mark.parametrize("size", [1e-1, 1e-2, 1e-3, 1e-4])
def test_cosine_of_nearly_equal_outputs(size):
    """In float32, 1 − a·b/|a||b| is noise below 1e-7; here 1 − cos down to 1e-8 has two digits at least."""
    x = outputs(1, (1, 32, 64))[0]
    y = x + size * torch.randn(x.shape, generator=torch.Generator().manual_seed(1)) * x.abs().mean()
    ring = Ring(1, torch.tensor(RATES))
    ring.push(x)
    found = ring.push(y).tokens[:, 0].double().numpy()
    expected = one_minus_cos(x.double().numpy(), y.double().numpy())[0]
    assert expected.max() < 10 * size**2
    np.testing.assert_allclose(found, expected, rtol=1e-2)


def test_equal_outputs_have_no_error_and_scaled_ones_no_angle():
    x = outputs(1, (2, 8, 64))[0]
    ring = Ring(2, torch.tensor(RATES))
    ring.push(x)
    same = ring.push(x)
    assert same.whole.abs().max() == same.tokens.abs().max() == same.pruned.abs().max() == 0
    scaled = ring.push(2 * x)
    assert scaled.whole[:, :, 0].abs().max() < 1e-6
    torch.testing.assert_close(scaled.whole[:, :, 1:], torch.full((2, 2, 2), 0.5), rtol=1e-5, atol=0)


def test_opposite_and_orthogonal_outputs():
    x = torch.zeros(1, 2, 4)
    x[..., 0] = 1.0
    ring = Ring(2, torch.tensor(RATES))
    ring.push(x)
    assert ring.push(-x).tokens[:, 0].tolist() == pytest.approx([2.0, 2.0])
    assert ring.push(x.roll(1, -1)).tokens.flatten().tolist() == pytest.approx([1.0] * 4)


def test_tokens_of_zeros_give_finite_errors():
    """A token of zeros has no direction: its error is 0 against another one of zeros, and never more than 2."""
    x = outputs(1, (1, 8, 257))[0]
    zeros = torch.zeros_like(x)
    ring = Ring(2, torch.tensor(RATES))
    ring.push(zeros)
    assert ring.push(zeros).tokens.abs().max() == 0
    both = [ring.push(x), ring.push(zeros)]
    for errors in both:
        for part in (errors.tokens, errors.whole[..., 0], errors.pruned):
            assert torch.isfinite(part).all()
            assert part.min() >= 0
        assert errors.tokens.max() <= 2.001


# ---- sums over generations --------------------------------------------------------------------------------------------

STEPS, AGES, SAMPLES = 4, 2, 10
POINTS = np.array([0.25, 0.5, 0.75])


def samples(sites: int, tokens: int) -> dict[tuple[int, int], tuple[np.ndarray, ...]]:
    """Returns for each (step, site) errors of all generations: whole [2, B, A, 3], pruned [2, B, A, 3], tokens [B, N, A]."""
    rng = np.random.default_rng(5)
    found = {}
    for step in range(1, STEPS):
        ages = min(step, AGES)
        for site in range(sites):
            parts = [rng.gamma(2.0, 0.1, (2, SAMPLES, ages, n)) for n in (3, len(POINTS))]
            tokens_ = rng.gamma(2.0, 0.1, (SAMPLES, tokens, ages))
            found[step, site] = tuple(x.astype(np.float32) for x in (*parts, tokens_))
    return found


def add(statistics: Statistics, data: dict[tuple[int, int], tuple[np.ndarray, ...]], start: int, stop: int) -> None:
    """Adds the generations start…stop−1 as one batch, as the profiler does."""
    for (step, site), (whole, pruned, tokens) in data.items():
        part = slice(start, stop)
        statistics.add(step, site, whole[:, part], pruned[:, part], tokens[part].astype(np.float64).sum(0))
    statistics.samples += stop - start


@pytest.fixture
def model(make_model):
    return make_model(layers=1, tokens=4)


def empty(model) -> Statistics:
    sites = [(name, s) for name, t in model.transformers.items() for s in t.sites]
    return Statistics(sites, STEPS, AGES, 2, POINTS, [Grid(1, 1, site.tokens, 1) for _, site in sites])


def tables(folder: Path) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    metrics = [f"{m}_{s}" for m in ("cos", "l1", "l2") for s in ("mean", "std")]
    caching = read_table(folder, "caching", [*CELL, *metrics, "n"])
    return caching, read_table(folder, "pruning", [*CELL, "ranking", "prune_rate", "mean", "std", "n"])


@pytest.mark.parametrize("splits", [[10], [5, 5], [3, 3, 4], [1] * 10, [9, 1]])
def test_mean_and_deviation_whatever_the_batches(model, tmp_path, splits):
    data = samples(2, 4)
    statistics = empty(model)
    for start, count in zip(np.cumsum([0, *splits]), splits, strict=False):
        add(statistics, data, start, start + count)
    statistics.write_tables(tmp_path, model)
    caching, pruning = tables(tmp_path)
    branches = 3  # both and their mean
    cells = 2 * (1 + 2 + 2)  # ages that exist at steps 1, 2, 3, for two sites
    assert len(caching["step"]) == cells * branches
    assert len(pruning["step"]) == cells * branches * len(POINTS)
    assert set(caching["n"]) == set(pruning["n"]) == {SAMPLES}
    assert set(pruning["ranking"]) == {"feature_mean"}
    modules = ["attn1", "ff"]
    for table, part in ((caching, 0), (pruning, 1)):
        for row in range(len(table["step"])):
            step, site, age = table["step"][row], modules.index(table["module"][row]), table["age"][row]
            branch = table["branch"][row]
            all_ = data[step, site][part].astype(np.float64)[:, :, age - 1]  # [branches, B, 3]
            values = all_.mean(0) if branch == MEAN else all_[branch]
            if part == 0:
                pairs = [(f"{m}_mean", f"{m}_std", i) for i, m in enumerate(("cos", "l1", "l2"))]
            else:
                pairs = [("mean", "std", int(POINTS.tolist().index(table["prune_rate"][row])))]
            for mean, std, i in pairs:
                assert table[mean][row] == pytest.approx(values[:, i].mean(), rel=1e-6)
                assert table[std][row] == pytest.approx(values[:, i].std(ddof=1), rel=1e-5)


def test_per_token_errors_are_means_over_generations_and_branches(model, tmp_path):
    import pyarrow.parquet as pq

    data = samples(2, 4)
    statistics = empty(model)
    add(statistics, data, 0, 4)
    add(statistics, data, 4, SAMPLES)
    statistics.write_tables(tmp_path, model)
    rows = pq.read_table(tmp_path / "caching.parquet").to_pylist()
    assert {row["token_cos"] is None for row in rows if row["branch"] != MEAN} == {True}
    for row in rows:
        if row["branch"] == MEAN:
            site = ["attn1", "ff"].index(row["module"])
            tokens = data[row["step"], site][2][:, :, row["age"] - 1].astype(np.float64)
            # the sums are over both branches, hence the half
            np.testing.assert_allclose(row["token_cos"], tokens.mean(0) / 2, rtol=1e-3)


def test_a_single_generation_has_no_deviation(model, tmp_path):
    statistics = empty(model)
    add(statistics, samples(2, 4), 0, 1)
    statistics.write_tables(tmp_path, model)
    caching, pruning = tables(tmp_path)
    assert not caching["cos_std"].any()
    assert not pruning["std"].any()


def test_equal_generations_have_no_deviation(model, tmp_path):
    """The sums of squares must not turn rounding into a negative variance."""
    statistics = empty(model)
    given = np.random.default_rng(6).random((STEPS, 2, AGES, 3)).astype(np.float32)
    for step in range(STEPS):
        for site in range(2):
            value = np.broadcast_to(given[step, site], (2, 1000, AGES, 3))
            statistics.add(step, site, value, value, np.zeros((4, AGES)))
    statistics.samples = 1000
    variance = statistics.whole[1] / 1000 - (statistics.whole[0] / 1000) ** 2
    assert variance.min() < 0  # rounding does reach below 0 in this test
    statistics.write_tables(tmp_path, model)
    caching, pruning = tables(tmp_path)
    assert max(caching["cos_std"].max(), pruning["std"].max()) < 1e-6
