"""How far pictures are from other pictures: paired, and as distributions. All in float; nothing wraps."""

from __future__ import annotations

import numpy as np

PSNR_CAP_DB = 100.0  # what equal pictures score, so that means stay finite
LEAST_FOR_DISTANCE = 1000  # samples a side below which Fréchet and kernel distances say nothing


def psnr_db(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Returns the peak signal-to-noise ratio of each pair, dB: pictures [n, H, W, C] in [0, 1] -> [n].

    Of clips [n, F, H, W, C] over all frames.
    """
    from skimage.metrics import peak_signal_noise_ratio

    a, b = _floats(a), _floats(b)
    equal = [np.array_equal(x, y) for x, y in zip(a, b, strict=True)]
    values = [
        PSNR_CAP_DB if same else min(PSNR_CAP_DB, peak_signal_noise_ratio(x, y, data_range=1.0))
        for x, y, same in zip(a, b, equal, strict=True)
    ]
    return np.array(values, dtype=np.float64)


def ssim(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Returns the structural similarity of each pair (Wang et al. 2004): pictures [n, H, W, C] in [0, 1] -> [n].

    Of clips [n, F, H, W, C] the mean over the frames.
    """
    from skimage.metrics import structural_similarity

    a, b = _floats(a), _floats(b)
    frames = [x.reshape(-1, *x.shape[-3:]) for x in (a, b)]
    values = [structural_similarity(x, y, data_range=1.0, channel_axis=-1) for x, y in zip(*frames, strict=True)]
    return np.array(values).reshape(len(a), -1).mean(1)


def relative_l2(a: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """Returns |a − reference| / |reference| of each pair: [n, …] -> [n]."""
    a, reference = (x.reshape(len(x), -1).astype(np.float64) for x in (a, reference))
    return np.linalg.norm(a - reference, axis=1) / np.linalg.norm(reference, axis=1)


def frechet_distance(a: np.ndarray, b: np.ndarray) -> float:
    """Returns the Fréchet distance of two sets of features, [n, d] and [m, d] (Heusel et al. 2017)."""
    from scipy.linalg import sqrtm

    mean = a.mean(0) - b.mean(0)
    cov_a, cov_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    root = np.real(sqrtm(cov_a @ cov_b))
    return float(mean @ mean + np.trace(cov_a) + np.trace(cov_b) - 2 * np.trace(root))


def kernel_distance(a: np.ndarray, b: np.ndarray) -> float:
    """Returns the unbiased squared MMD under k(x, y) = (x·y / d + 1)³ (Bińkowski et al. 2018): [n, d], [m, d]."""
    n, m, d = len(a), len(b), a.shape[1]
    within_a, within_b, between = ((x @ y.T / d + 1) ** 3 for x, y in ((a, a), (b, b), (a, b)))
    inner_a = (within_a.sum() - np.trace(within_a)) / (n * (n - 1))
    inner_b = (within_b.sum() - np.trace(within_b)) / (m * (m - 1))
    return float(inner_a + inner_b - 2 * between.mean())


def mean_interval(values: np.ndarray) -> dict[str, float]:
    """Returns the mean and its 95 % bootstrap interval (percentile, 4000 resamples, fixed seed)."""
    from scipy.stats import bootstrap

    mean = float(values.mean())
    if len(values) < 2 or np.ptp(values) == 0:
        return {"mean": mean, "low": mean, "high": mean}
    found = bootstrap(
        (values,), np.mean, n_resamples=4000, method="percentile", rng=np.random.default_rng(0)
    ).confidence_interval
    return {"mean": mean, "low": float(found.low), "high": float(found.high)}


def worst_decile(values: np.ndarray) -> float:
    """Returns the mean of the lowest tenth of the values (at least one)."""
    return float(np.sort(values)[: max(1, len(values) // 10)].mean())


def _floats(pictures: np.ndarray) -> np.ndarray:
    if pictures.dtype.kind != "f":
        raise TypeError(f"pictures must be floats in [0, 1], found {pictures.dtype}: integers wrap")
    return pictures.astype(np.float64)
