"""Evaluation: sums first, one division, literal statistics; counting models against dictionaries."""

import math
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
from literal import distinctive, gpt2
from literal import nll as literal_nll

from gpt2lib.config import ModelConfig
from gpt2lib.evaluate.baselines import Bigram, Unigram
from gpt2lib.evaluate.loss import Loss, NotFinite, count_bytes, loss_function, total, window_losses
from gpt2lib.model import GPT2
from gpt2lib.tokenizer import Tokenizer

V = 37
CONFIG = ModelConfig(n_vocab=V, n_ctx=7, n_embd=15, n_head=3, n_layer=1, embd_pdrop=0.5)
WINDOWS = np.random.default_rng(1).integers(0, V, (11, 8)).astype(np.int32)


# --- Loss -------------------------------------------------------------------------------------------------------------


@pytest.mark.backend_free
def test_sums_first():
    """The mean of the windows' perplexities would be another, larger number."""
    nats = np.array([[1.0, 2.0, 3.0], [5.0, 5.0, 8.0]])
    loss = total(nats, n_bytes=[9, 7])
    assert (loss.nats, loss.tokens, loss.n, loss.bytes) == (24.0, 6, 2, 16)
    assert loss.loss == 4.0
    assert math.isclose(loss.perplexity, math.exp(4.0))
    assert math.isclose(loss.bits_per_byte, 24 / math.log(2) / 16)
    assert loss.perplexity < np.exp(nats.mean(1)).mean()


@pytest.mark.backend_free
def test_standard_errors_written_out():
    """17 windows are 4 blocks of 5, 4, 4, 4 neighbours; a ratio's error is that of its residuals."""
    random = np.random.default_rng(0)
    nats, n_bytes = random.gamma(2.0, 1.5, (17, 5)), random.integers(9, 30, 17)
    loss = total(nats, n_bytes)
    sums, blocks = [sum(row) for row in nats], (range(5), range(5, 9), range(9, 13), range(13, 17))
    for error, units in ((loss.standard_error, [5] * 17), (loss.bits_per_byte_standard_error * math.log(2), n_bytes)):
        ratio = sum(sums) / sum(units)
        residuals = [sum(sums[i] - ratio * units[i] for i in block) for block in blocks]
        assert math.isclose(error, math.sqrt(4 / 3 * sum(x**2 for x in residuals)) / sum(units))
    assert math.isclose(loss.perplexity_standard_error, math.exp(loss.loss) * loss.standard_error)  # delta method


@pytest.mark.backend_free
@pytest.mark.parametrize("alike", [1, 6], ids=["independent", "six alike"])
def test_standard_errors_are_the_spread_of_many_texts(alike):
    """Of 500 made-up texts, also where neighbouring windows belong to one document."""
    random, losses = np.random.default_rng(1), []
    for _ in range(500):
        level = np.repeat(random.normal(3, 0.5, 360 // alike), alike)
        n_bytes = random.integers(20, 60, 360)
        losses.append(total(level[:, None] + random.normal(0, 0.3, (360, 4)), n_bytes))
    for value, error in (("loss", "standard_error"), ("bits_per_byte", "bits_per_byte_standard_error")):
        spread = np.std([getattr(loss, value) for loss in losses], ddof=1)
        stated = math.sqrt(np.mean([getattr(loss, error) ** 2 for loss in losses]))
        assert 0.85 < stated / spread < 1.15


@pytest.mark.backend_free
def test_one_window_has_no_standard_error():
    assert math.isnan(total(np.ones((1, 5))).standard_error)
    assert math.isnan(total(np.ones((1, 5)), [7]).bits_per_byte_standard_error)
    assert math.isfinite(total(np.ones((2, 5)), [7, 8]).bits_per_byte_standard_error)


@pytest.mark.backend_free
def test_figures_by_name():
    figures = Loss(24.0, 6, 2, 0.5, 16).to_dict()
    assert {"loss", "loss_se", "perplexity", "perplexity_se", "bits_per_byte", "bits_per_byte_se"} <= figures.keys()
    assert (figures["tokens"], figures["windows"], figures["bytes"], figures["loss_se"]) == (6, 2, 16, 0.5)
    assert "bits_per_byte" not in Loss(24.0, 6, 2, 0.5).to_dict(), "unknown bytes give no figure"


@pytest.mark.backend_free
def test_long_sums_are_exact():
    """A float32 sum of so many would stand still."""
    assert total(np.full((20_000, 1024), 3.1, np.float32)).loss == pytest.approx(np.float64(np.float32(3.1)), rel=1e-12)


@pytest.mark.backend_free
def test_bytes_of_the_predicted_tokens():
    tokenizer = Tokenizer([])
    end = tokenizer.end_of_text
    windows = np.array([tokenizer.encode("abcd"), [end, *tokenizer.encode("xy"), end]])
    assert count_bytes(windows, tokenizer).tolist() == [
        3,
        2,
    ]  # the first of a window is predicted by none, an end has no bytes
    assert count_bytes(np.array([tokenizer.encode("aé€")]), tokenizer).tolist() == [5]


# --- a model's losses -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model():
    return GPT2(CONFIG, init=distinctive)


@pytest.fixture(scope="module")
def losses(model):
    return loss_function(model)


def test_window_losses_are_the_transcriptions(model, losses):
    """Without dropout, whatever its rate."""
    p = {v.path: np.asarray(v.value) for v in model.trainable_variables}
    nats = window_losses(losses, WINDOWS, batch_size=4)
    assert nats.shape == (11, 7) and nats.dtype == np.float32
    for window, row in zip(WINDOWS, nats, strict=True):
        np.testing.assert_allclose(row, literal_nll(gpt2(p, 3, window[:-1])[0], window[1:]), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("batch_size", [1, 3, 11, 16])
def test_the_batch_does_not_matter(losses, batch_size):
    """Nor does the padding that fills up the last one, or the others in it."""
    nats = window_losses(losses, WINDOWS, batch_size=batch_size)
    np.testing.assert_allclose(nats, window_losses(losses, WINDOWS, batch_size=4), rtol=1e-5, atol=1e-6)
    first = window_losses(losses, WINDOWS[:1], batch_size=batch_size)
    np.testing.assert_allclose(first, nats[:1], rtol=1e-5, atol=1e-6)


def test_new_weights_are_seen(losses, model):
    before = window_losses(losses, WINDOWS, batch_size=4)
    old = np.asarray(model.ln_f.b.value).copy()
    model.ln_f.b.assign(old + 1)
    after = window_losses(losses, WINDOWS, batch_size=4)
    model.ln_f.b.assign(old)
    assert np.abs(after - before).max() > 0.01
    np.testing.assert_array_equal(window_losses(losses, WINDOWS, batch_size=4), before)


def test_damaged_parameters_are_said(model):
    """As `Scorer` says it; a window after the first batch is named too."""
    arrays = {v.path: np.asarray(v.value).copy() for v in model.trainable_variables}
    arrays["model/wpe"][3, 2] = np.nan
    damaged = loss_function(GPT2(CONFIG, init=lambda path, shape: arrays[path]))
    said = r"^the loss of token 0 of window 0 is nan: the model's parameters are damaged; load another checkpoint$"
    with pytest.raises(NotFinite, match=said):
        window_losses(damaged, WINDOWS, batch_size=4)

    def late(windows):  # the sixth window, of the second batch
        return np.where(np.asarray(windows)[:, :-1] == WINDOWS[5, :-1], np.inf, 1.0)

    with pytest.raises(NotFinite, match=r"^the loss of token 0 of window 5 is inf: "):
        window_losses(late, np.where(np.arange(11)[:, None] == 5, WINDOWS, -1), batch_size=4)


def test_progress_sees_every_batch(losses):
    seen = []

    def progress(batches):
        for batch in batches:
            seen.append(batch)
            yield batch

    window_losses(losses, WINDOWS, batch_size=4, progress=progress)
    assert len(seen) == 3


# --- counting models --------------------------------------------------------------------------------------------------

TEXT = np.random.default_rng(2).choice(V - 5, 400, p=np.arange(1, V - 4) / np.arange(1, V - 4).sum()).astype(np.int32)


def dictionary(tokens):
    """Interpolated absolute discounting over an add-one unigram, from dictionaries: (p1(w), p2(w | u))."""
    words, pairs, contexts = Counter(tokens), Counter(pairwise(tokens)), Counter(tokens[:-1])
    ones, twos = (sum(count == n for count in pairs.values()) for n in (1, 2))
    d = ones / (ones + 2 * twos)

    def p1(w):
        return (words[w] + 1) / (len(tokens) + V)

    def p2(w, u):
        if not contexts[u]:
            return p1(w)
        followers = sum(first == u for first, _ in pairs)
        return max(pairs[u, w] - d, 0) / contexts[u] + d * followers / contexts[u] * p1(w)

    return p1, p2


def everything(model, u):
    """P(w | u) of every word w by a counting model: [V]."""
    windows = np.array([[u, w] for w in range(V)], np.int32)
    return np.exp(-model.window_losses(windows)[:, 0])


@pytest.mark.backend_free
@pytest.mark.parametrize("kind", [Unigram, Bigram])
def test_probabilities_sum_to_one(kind):
    """After words that were seen, the last word of the text, and words that never were."""
    model = kind(TEXT, V)
    for u in range(V):
        p = everything(model, u)
        assert (p > 0).all()
        assert math.isclose(p.sum(), 1, abs_tol=1e-12), u


@pytest.mark.backend_free
def test_counting_models_are_the_dictionaries():
    p1, p2 = dictionary(TEXT.tolist())
    unigram, bigram = Unigram(TEXT, V), Bigram(TEXT, V)
    for u in range(V):
        np.testing.assert_allclose(everything(unigram, u), [p1(w) for w in range(V)], rtol=1e-12)
        np.testing.assert_allclose(everything(bigram, u), [p2(w, u) for w in range(V)], rtol=1e-12)


@pytest.mark.backend_free
def test_a_word_seen_only_at_the_end_has_no_followers():
    tokens = [0, 1, 0, 1, 2, 0, 3]
    _, p2 = dictionary(tokens)
    np.testing.assert_allclose(everything(Bigram(np.array(tokens), V), 3), [p2(w, 3) for w in range(V)], rtol=1e-12)


@pytest.mark.backend_free
@pytest.mark.parametrize("tokens", [[0, 1] * 50, [0] * 50, [0, 1, 2, 3, 4]], ids=["two pairs", "one word", "all once"])
def test_unusual_counts_of_counts(tokens):
    """No pair seen once, or none seen twice: the discount has a value nevertheless, and probabilities stay positive."""
    model = Bigram(np.array(tokens), V)
    for u in (0, 1, 4, 30):
        p = everything(model, u)
        assert (p > 0).all() and np.isfinite(p).all()
        assert math.isclose(p.sum(), 1, abs_tol=1e-12)


@pytest.mark.backend_free
def test_losses_have_the_shape_of_windows():
    for model in (Unigram(TEXT, V), Bigram(TEXT, V)):
        nats = model.window_losses(WINDOWS)
        assert nats.shape == (11, 7)
        one = np.concatenate([model.window_losses(WINDOWS[i : i + 1]) for i in range(11)])
        np.testing.assert_array_equal(nats, one)
    # 64-bit counting: pairs of a large vocabulary do not wrap around
    large = Bigram(np.array([50_000, 50_001, 50_000, 50_001, 7], np.int32), 50_257)
    seen, unseen = large.window_losses(np.array([[50_000, 50_001], [50_000, 7]], np.int32))[:, 0]
    assert seen < unseen
