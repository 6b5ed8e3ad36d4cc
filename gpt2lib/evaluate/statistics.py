"""Standard errors of ratios, and statistics of samples to set beside those of real text."""

import math

import numpy as np


def ratio_error(numerators, denominators) -> float:
    """Standard error of sum(numerators) / sum(denominators) over windows in the order of the text.

    Neighbouring windows are of one package or one book and alike, so about sqrt(W) contiguous blocks are the units
    taken as independent. Denominators vary too: the linearised ratio estimator (Cochran 1977, section 6.3).
    NaN for fewer than two windows.
    """
    numerators, denominators = (np.asarray(x, np.float64) for x in (numerators, denominators))
    n_blocks = min(len(numerators), max(2, round(math.sqrt(len(numerators)))))
    if n_blocks < 2:
        return math.nan
    residuals = numerators - denominators * (numerators.sum() / denominators.sum())
    blocks = np.array([block.sum() for block in np.array_split(residuals, n_blocks)])
    return float(math.sqrt(n_blocks / (n_blocks - 1) * np.sum(blocks**2)) / denominators.sum())


def distinct(sequences, n: int) -> float:
    """Share of different n-grams among all n-grams of some token sequences (Li et al. 2016, distinct-n)."""
    grams = [tuple(ids[i : i + n]) for ids in sequences for i in range(len(ids) - n + 1)]
    return len(set(grams)) / len(grams) if grams else float("nan")


def bootstrap(statistic, *columns, samples: int = 1000, seed: int = 0) -> float:
    """Standard error of `statistic(*sums of the columns)` over documents (Efron 1979).

    Args:
        statistic: of as many arrays [samples] as there are columns, such as `lambda nats, words: nats / words`
        columns: each has one number for each document [n]; documents are drawn with replacement.
        samples: how many times they are drawn.
        seed: of the draws.

    NaN for fewer than two documents.
    """
    columns = np.stack([np.asarray(column, np.float64) for column in columns])  # [columns, n]
    n = columns.shape[1]
    if n < 2:
        return math.nan
    random = np.random.default_rng(seed)
    times = np.stack([np.bincount(random.integers(0, n, n), minlength=n) for _ in range(samples)])  # [samples, n]
    return float(np.std(statistic(*(columns @ times.T)), ddof=1))
