"""Seen text and n-grams: by hand and against sets."""

import math

import numpy as np
import pytest

from gpt2lib.evaluate.overlap import seen
from gpt2lib.evaluate.statistics import bootstrap, distinct

pytestmark = pytest.mark.backend_free


def test_seen_tokens_are_those_of_shared_runs():
    train = np.arange(50) % 31
    windows = np.array([[60, 3, 4, 5, 6, 61, 4, 5, 62], [7, 8, 9, 10, 11, 12, 13, 14, 15]])
    expected = np.zeros((2, 8), bool)
    expected[0, 0:4] = True  # 3 4 5 6; the run 4 5 is too short
    expected[1] = True
    np.testing.assert_array_equal(seen(train, windows, n=3), expected)


def test_seen_is_what_sets_of_n_grams_say():
    random = np.random.default_rng(0)
    train, windows = random.integers(0, 5, 300), random.integers(0, 5, (20, 23))
    grams = {tuple(train[i : i + 4]) for i in range(297)}
    expected = np.zeros((20, 23), bool)
    for w, window in enumerate(windows):
        for i in range(20):
            if tuple(window[i : i + 4]) in grams:
                expected[w, i : i + 4] = True
    np.testing.assert_array_equal(seen(train, windows, n=4), expected[:, 1:])
    assert 0.1 < expected.mean() < 0.9


def test_distinct_n_grams():
    assert distinct([[1, 2, 1, 2], [1, 2]], 2) == 2 / 4  # 12 21 12 12
    assert math.isnan(distinct([[1]], 2))


def test_bootstrap_of_a_mean_and_of_a_ratio():
    """As large as the formulas say; the same every time."""
    random = np.random.default_rng(3)
    values, sizes = random.normal(5, 2, 900), random.integers(5, 50, 900)
    error = bootstrap(lambda total, n: total / n, values, np.ones(900))
    assert math.isclose(error, values.std(ddof=1) / 30, rel_tol=0.1)
    assert error == bootstrap(lambda total, n: total / n, values, np.ones(900))
    nats = values * sizes
    residuals = nats - sizes * nats.sum() / sizes.sum()
    ratio = bootstrap(lambda nats, sizes: np.exp(nats / sizes), nats, sizes)
    delta = math.exp(nats.sum() / sizes.sum()) * math.sqrt(np.sum(residuals**2)) / sizes.sum()
    assert math.isclose(ratio, delta, rel_tol=0.1)
    assert math.isnan(bootstrap(lambda x: x, [1.0]))
