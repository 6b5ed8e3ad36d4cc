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
