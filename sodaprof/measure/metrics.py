"""Distances between pictures: paired, and between sets. Integer pictures are refused, since their differences wrap."""

from __future__ import annotations

import numpy as np

PSNR_CAP_DB = 100.0  # PSNR of equal pictures, so that means are finite
FLIP_DB = 20.0  # PSNR to the full run under which a picture counts as another picture
LEAST_FOR_DISTANCE = 1000  # samples a side under which Fréchet and kernel distances are not reported


def psnr_db(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Returns the peak signal-to-noise ratio of each pair, dB: pictures [n, H, W, C] in [0, 1] -> [n].

    For clips [n, F, H, W, C] it is computed over all frames.
    """
    from skimage.metrics import peak_signal_noise_ratio

    pairs = zip(_floats(a), _floats(b), strict=True)
    with np.errstate(divide="ignore"):  # of equal pictures
        values = [peak_signal_noise_ratio(x, y, data_range=1.0) for x, y in pairs]
    return np.minimum(values, PSNR_CAP_DB)


def ssim(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Returns the structural similarity of each pair (Wang et al. 2004): pictures [n, H, W, C] in [0, 1] -> [n].

    For clips [n, F, H, W, C] it is the mean over the frames.
    """
    from skimage.metrics import structural_similarity

    frames = [_floats(x).reshape(-1, *x.shape[-3:]) for x in (a, b)]
    values = [structural_similarity(x, y, data_range=1.0, channel_axis=-1) for x, y in zip(*frames, strict=True)]
    return np.array(values).reshape(len(a), -1).mean(1)


def relative_l2(a: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """Returns |a − reference| / |reference| of each pair: [n, …] -> [n]."""
    a, reference = (x.reshape(len(x), -1).astype(np.float64) for x in (a, reference))
    return np.linalg.norm(a - reference, axis=1) / np.linalg.norm(reference, axis=1)


def frechet_distance(a: np.ndarray, b: np.ndarray) -> float:
    """Returns the Fréchet distance of two sets of features, [n, d] and [m, d] (Heusel et al. 2017)."""
    mean = a.mean(0) - b.mean(0)
    cov_a, cov_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    values, vectors = np.linalg.eigh(cov_a)
    root_a = vectors * np.sqrt(values.clip(0)) @ vectors.T  # features that are always 0 make cov_a singular
    roots = np.sqrt(np.linalg.eigvalsh(root_a @ cov_b @ root_a).clip(0))
    return float(mean @ mean + np.trace(cov_a) + np.trace(cov_b) - 2 * roots.sum())


def kernel_distance(a: np.ndarray, b: np.ndarray) -> float:
    """Returns the unbiased squared MMD under k(x, y) = (x·y / d + 1)³ (Bińkowski et al. 2018): [n, d], [m, d]."""
    n, (within_a, between, within_b) = len(a), _kernel_sums(a, b)
    return float(within_a.sum() / (n * (n - 1)) + within_b - 2 * between.mean())


def kernel_difference(a: np.ndarray, other: np.ndarray, b: np.ndarray) -> dict[str, float]:
    """Returns the kernel distance of a to b minus that of other to b, with its 95 % interval: [n, d], [n, d], [m, d].

    a and other are paired and b is fixed: the interval is that of the jackknife over the n pairs.
    """
    n = len(a)
    left_out = []  # the distances without one sample each
    for features in (a, other):
        within, between, _ = _kernel_sums(features, b)
        without = (within.sum() - 2 * within) / ((n - 1) * (n - 2))
        left_out.append(without - 2 * (between.sum() - between) / (n - 1))
    spread = left_out[0] - left_out[1]
    half = 1.96 * float(np.sqrt((n - 1) / n * ((spread - spread.mean()) ** 2).sum()))
    mean = kernel_distance(a, b) - kernel_distance(other, b)
    return {"mean": mean, "low": mean - half, "high": mean + half}


def _kernel_sums(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray, float]:
    """Returns the sums of k over the others of a [n], the means over b [n], and the mean over pairs of b."""
    m, d = len(b), a.shape[1]
    within_a, within_b, between = ((x @ y.T / d + 1) ** 3 for x, y in ((a, a), (b, b), (a, b)))
    return (
        within_a.sum(1) - np.diag(within_a),
        between.mean(1),
        float(within_b.sum() - np.trace(within_b)) / (m * (m - 1)),
    )


def mean_interval(values: np.ndarray) -> dict[str, float]:
    """Returns the mean and its 95 % bootstrap interval (percentile, 4000 resamples, fixed seed)."""
    from scipy.stats import bootstrap

    mean = float(values.mean())
    if len(values) < 2 or np.ptp(values) == 0:
        return {"mean": mean, "low": mean, "high": mean}
    found = bootstrap((values,), np.mean, n_resamples=4000, method="percentile", rng=np.random.default_rng(0))
    return {"mean": mean, "low": float(found.confidence_interval.low), "high": float(found.confidence_interval.high)}


def worst_decile(values: np.ndarray) -> float:
    """Returns the mean of the lowest tenth of the values (at least one)."""
    return float(np.sort(values)[: max(1, len(values) // 10)].mean())


def worst_decile_difference(a: np.ndarray, b: np.ndarray) -> dict[str, float]:
    """Returns worst_decile(a) − worst_decile(b) of paired values [n], and its 95 % bootstrap interval."""
    drawn = np.random.default_rng(0).integers(len(a), size=(4000, len(a)))
    least = max(1, len(a) // 10)
    tails = [np.sort(values[drawn], axis=1)[:, :least].mean(1) for values in (a, b)]
    low, high = np.percentile(tails[0] - tails[1], (2.5, 97.5))
    return {"mean": worst_decile(a) - worst_decile(b), "low": float(low), "high": float(high)}


def flipped(quality_db: np.ndarray) -> float:
    """Returns the share of pictures with a PSNR to the full run, [n], under FLIP_DB."""
    return float((quality_db < FLIP_DB).mean())


def _floats(pictures: np.ndarray) -> np.ndarray:
    if pictures.dtype.kind != "f":
        raise TypeError(f"pictures must be floats in [0, 1], found {pictures.dtype}: integers wrap")
    return pictures.astype(np.float64)
