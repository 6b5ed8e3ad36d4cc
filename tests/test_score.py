"""Losses token by token: equal to the model asked about each token by itself."""

import numpy as np
import pytest
from literal import distinctive, gpt2
from literal import nll as literal_nll

from gpt2lib.config import ModelConfig
from gpt2lib.evaluate.score import Scorer
from gpt2lib.model import GPT2

V, T = 37, 12
CONFIG = ModelConfig(n_vocab=V, n_ctx=T, n_embd=15, n_head=3, n_layer=2)
RANDOM = np.random.default_rng(2)


@pytest.fixture(scope="module")
def model():
    return GPT2(CONFIG, init=distinctive)


@pytest.fixture(scope="module")
def alone(model):
    """`alone(context, token)`: nats by the literal model, for one token."""
    arrays = {v.path: np.asarray(v.value) for v in model.trainable_variables}

    def alone(context, token):
        return literal_nll(gpt2(arrays, CONFIG.n_head, context)[0][-1:], [token]).item()

    return alone


def test_passages(model, alone):
    passages = [RANDOM.integers(0, V, n).tolist() for n in (2, 13, 5, 13, 7, 2, 9)]
    seen = Scorer(model, batch_tokens=3 * T).passages(passages)
    for ids, scored in zip(passages, seen, strict=True):
        expected = [alone(ids[:i], ids[i]) for i in range(1, len(ids))]
        assert scored.nats.dtype == np.float64
        np.testing.assert_allclose(scored.nats, expected, rtol=2e-5, atol=1e-6)
        best = [min(range(V), key=lambda token, i=i: alone(ids[:i], token)) for i in range(1, len(ids))]
        assert scored.first.tolist() == [token == b for token, b in zip(ids[1:], best, strict=True)]


def test_the_ends_of_passages(model, alone):
    passages = [RANDOM.integers(0, V, n).tolist() for n in (9, 13, 4)]
    seen = Scorer(model, batch_tokens=3 * T).passages(passages, [3, 1, 3])
    for ids, count, scored in zip(passages, [3, 1, 3], seen, strict=True):
        expected = [alone(ids[:i], ids[i]) for i in range(len(ids) - count, len(ids))]
        np.testing.assert_allclose(scored.nats, expected, rtol=2e-5, atol=1e-6)


def test_what_is_banned_is_not_reckoned_with(model, alone):
    context = RANDOM.integers(0, V, 6).tolist()
    ranked = sorted(range(V), key=lambda token: alone(context, token))
    scorer = Scorer(model)
    for place in range(4):
        passage = [*context, ranked[place]]
        assert scorer.passages([passage], [1])[0].first.tolist() == [place == 0]
        assert scorer.passages([passage], [1], banned=ranked[:place])[0].first_allowed.tolist() == [True]


@pytest.mark.parametrize("n", [1, 4, 9])
def test_branches(model, alone, n):
    context = RANDOM.integers(0, V, n).tolist()
    branches = [RANDOM.integers(0, V, k).tolist() for k in (1, 4, 3, T + 1 - n)]
    for branch, nats in zip(branches, Scorer(model).branches(context, branches), strict=True):
        whole = context + branch
        np.testing.assert_allclose(
            nats, [alone(whole[:i], whole[i]) for i in range(n, len(whole))], rtol=2e-5, atol=1e-6
        )


@pytest.mark.parametrize(("context", "branches"), [([], [[1]]), ([1], [[1], []]), ([1] * T, [[1, 2]])])
def test_branches_that_cannot_be(model, context, branches):
    with pytest.raises(ValueError, match=r"each has at least one, and they have at most 13 together"):
        Scorer(model).branches(context, branches)


@pytest.mark.parametrize("n", [2, T, T + 1, T + 2, 41])
@pytest.mark.parametrize(("window", "stride"), [(None, None), (T, 1), (T, 5), (8, 3), (8, None)])
def test_a_text(model, alone, n, window, stride):
    """Token i is predicted in the first window that has it: its context begins at the last multiple of the stride."""
    ids = RANDOM.integers(0, V, n).tolist()
    seen = Scorer(model, batch_tokens=3 * T).text(ids, window, stride)
    window, expected = window or T, []
    step = stride or window
    for i in range(1, n):
        begin = 0 if i <= window else -(-(i - window) // step) * step
        expected.append(alone(ids[begin:i], ids[i]))
    np.testing.assert_allclose(seen, expected, rtol=2e-5, atol=1e-6)


def test_batches_do_not_matter(model):
    ids = RANDOM.integers(0, V, 90).tolist()
    one, other = (Scorer(model, batch_tokens=size).text(ids, stride=4) for size in (1, 1000))
    np.testing.assert_allclose(one, other, rtol=2e-5)


def test_progress_is_shown(model):
    seen = []
    Scorer(model, progress=lambda things: seen.append(len(things)) or things).text(list(range(30)), stride=4)
    assert seen == [1, 1]


@pytest.mark.parametrize("n", [0, 1, T + 2])
def test_a_passage_that_cannot_be_scored(model, n):
    with pytest.raises(ValueError, match=rf"passage 1 has {n} tokens, .* it must have 2 to 13"):
        Scorer(model).passages([[1, 2], [1] * n])


@pytest.mark.parametrize(("window", "stride"), [(T + 1, 1), (4, 5), (4, -1)])
def test_windows_that_cannot_be(model, window, stride):
    with pytest.raises(ValueError, match=r"1 <= stride <= window <= 12"):
        Scorer(model).text([1, 2, 3], window, stride)


def test_a_text_of_one_token_has_no_loss(model):
    assert Scorer(model).text([3]).shape == (0,)


def test_damaged_parameters_are_said(model):
    """Losses that are no numbers never become a figure, whichever way a text is scored."""
    arrays = {v.path: np.asarray(v.value).copy() for v in model.trainable_variables}
    arrays["model/h0/mlp/c_fc/b"][3] = np.nan
    scorer = Scorer(GPT2(model.config, init=lambda path, shape: arrays[path]))
    sentence = r"^the loss of token 0 of {} is nan: the model's parameters are damaged; load another checkpoint$"
    with pytest.raises(ValueError, match=sentence.format("passage 0")):
        scorer.passages([[1, 2, 3]])
    with pytest.raises(ValueError, match=sentence.format(r"(passage 0|a text of \d+ tokens)")):
        scorer.text(list(range(model.config.n_ctx * 2)))
    with pytest.raises(ValueError, match=sentence.format("choice 0")):
        scorer.branches([1, 2], [[3], [4]])


def test_full_windows_reach_back(model, alone):
    """With `full` each token of the last window sees all that fits; the rest is as without."""
    n_ctx, ids = model.config.n_ctx, list(range(1, model.config.n_ctx * 2 - 3))
    plain, full = Scorer(model).text(ids), Scorer(model).text(ids, full=True)
    assert len(plain) == len(full) == len(ids) - 1
    np.testing.assert_allclose(full[:n_ctx], plain[:n_ctx], rtol=1e-6)
    tail = Scorer(model).passages([ids[-n_ctx - 1 :]])[0].nats
    np.testing.assert_allclose(full[n_ctx:], tail[n_ctx - (len(full) - n_ctx) :], rtol=1e-5)
    assert np.abs(full[n_ctx:] - plain[n_ctx:]).max() > 1e-3
    for length in (2, n_ctx - 1, n_ctx + 1, 2 * n_ctx + 1):  # nothing to reach back for
        whole = (ids * 2)[:length]
        np.testing.assert_array_equal(Scorer(model).text(whole, full=True), Scorer(model).text(whole))
