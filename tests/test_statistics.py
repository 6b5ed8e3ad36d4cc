"""Seen text and n-grams: by hand and against sets."""

import math

import numpy as np
import pytest

from gpt2lib.evaluate.overlap import seen
from gpt2lib.evaluate.statistics import distinct

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
