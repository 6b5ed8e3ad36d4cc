"""Seen text and n-grams: by hand and against sets."""

import math

import numpy as np
import pytest

from gpt2lib.evaluate.overlap import seen
from gpt2lib.evaluate.statistics import bootstrap, distinct, of_samples, repetition, self_bleu, zipf

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


def test_repetition():
    assert repetition([1, 2, 3, 1, 2, 3], 3) == 1 / 4  # 123 231 312 123
    assert repetition([7] * 10, 4) == pytest.approx(6 / 7)
    assert math.isnan(repetition([1, 2], 4))


def test_zipf_of_a_law():
    counts = [round(10_000 / rank) for rank in range(1, 60)]
    assert zipf([np.repeat(np.arange(59), counts)]) == pytest.approx(1, abs=0.01)
    assert zipf([np.repeat(np.arange(59), 5)]) == pytest.approx(0, abs=1e-9)


def test_self_bleu():
    pytest.importorskip("sacrebleu")
    assert self_bleu(["the very same words here"] * 3) == pytest.approx([1, 1, 1])
    different = self_bleu(["one two three four five", "six seven eight nine ten", "eleven twelve is it now"])
    assert max(different) < 0.2


def test_statistics_of_samples():
    pytest.importorskip("sacrebleu")
    random = np.random.default_rng(0)
    sequences = [random.integers(0, 50, 30).tolist() for _ in range(40)]
    figures = of_samples(sequences, [" ".join(map(str, ids)) for ids in sequences])
    assert figures["tokens"] == (30, 0)
    value, se = figures["distinct 1-grams"]
    each = [len(set(ids)) / 30 for ids in sequences]
    assert value == pytest.approx(np.mean(each))
    assert se == pytest.approx(np.std(each, ddof=1) / math.sqrt(40))
    assert 0 < figures["Zipf exponent"][1] < 0.1
    repeated = of_samples([[1, 2, 3, 4] * 5] * 10, ["a b c d"] * 10)
    assert repeated["repeated 4-grams"][0] == pytest.approx(1 - 4 / 17)
    assert repeated["self-BLEU"][0] == pytest.approx(1)
