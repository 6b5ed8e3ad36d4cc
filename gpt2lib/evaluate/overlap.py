"""How much of a validation text stands in the training text word for word; compare GPT-2's paper, table 6."""

import numpy as np


def _hashes(tokens, n: int):
    """A 64-bit polynomial hash of every n-gram along the last axis: [..., T] -> [..., T - n + 1]."""
    tokens = np.asarray(tokens).astype(np.uint64) + np.uint64(1)
    length = tokens.shape[-1] - n + 1
    result = np.zeros((*tokens.shape[:-1], length), np.uint64)
    for i in range(n):
        result = result * np.uint64(0x9E3779B97F4A7C15) + tokens[..., i : i + length]  # wraps at 2^64
    return result


def seen(train_tokens, windows, n: int = 20):
    """Which predicted tokens lie inside an n-gram that is also in the training text.

    Args:
        train_tokens: [N] token ids.
        windows: [W, T + 1], of which the last T are predicted.
        n: length of the n-grams in tokens.

    Returns: bool [W, T].
    """
    n = min(n, windows.shape[1])
    found = np.isin(_hashes(windows, n), np.unique(_hashes(train_tokens, n)))  # [W, T + 2 - n], by first token
    inside = np.zeros(windows.shape, bool)
    for i in range(n):
        inside[:, i : i + found.shape[1]] |= found
    return inside[:, 1:]
