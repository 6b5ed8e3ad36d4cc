"""Generation: OpenAI's greedy continuation, rows that do not disturb each other, words drawn as often as due."""

import json
import re

import keras
import numpy as np
import pytest
from keras import ops
from literal import distinctive, gpt2, nll
from scipy import stats

from gpt2lib import device, sample
from gpt2lib.checkpoint import fingerprint, load_openai, save_huggingface
from gpt2lib.config import ModelConfig
from gpt2lib.model import GPT2, quantized
from gpt2lib.sample import generate, keep_top_k, keep_top_p, read_prompts, stream, write_samples
from gpt2lib.tokenizer import Tokenizer

CONFIG = ModelConfig(n_vocab=37, n_ctx=41, n_embd=15, n_head=3, n_layer=1)
PROMPTS = [[3, 1, 4, 1, 5, 9, 2], [6], [5, 3, 5, 8, 9, 7, 9, 3, 2, 3, 8, 4, 6, 2, 6, 4, 3, 3], [11, 12]]


@pytest.fixture(scope="module")
def model():
    return GPT2(CONFIG, init=distinctive)


@pytest.fixture(scope="module")
def greedy(model):
    return generate(model, PROMPTS, 9, temperature=0, end_of_text=None)


@pytest.fixture(scope="module")
def next_word():
    """A model whose answer is "the previous token + 1", and which is sure of it, by crafted weights."""

    def init(path, shape):
        values = np.zeros(shape, np.float32)
        for i in range(13):
            if path == "model/wte":
                values[i, i] = 1.0  # what the word is
                values[i, 13 + (i - 1) % 13] = 1.0  # whom it follows
            elif path == "model/h0/mlp/c_fc/w":
                values[i, i] = 10.0
            elif path == "model/h0/mlp/c_proj/w":
                values[i, 13 + i] = 10.0  # what the word is goes, loudly, to where it is asked whom a word follows
        return np.full(shape, 20.0, np.float32) if path.endswith("/g") else values

    return GPT2(ModelConfig(n_vocab=13, n_ctx=40, n_embd=26, n_head=2, n_layer=1), init=init)


def test_greedy_is_openais(golden):
    model, recorded = load_openai(golden / "openai-test"), np.load(golden / "openai-test" / "golden.npz")
    prompt, whole = recorded["prompt"].tolist(), recorded["greedy"][0].tolist()
    assert whole[:3] == prompt and len(whole) == 19 == model.config.n_ctx
    for options in ({"temperature": 0}, {"top_k": 1}):
        (new,) = generate(model, [prompt], 16, end_of_text=None, **options)
        assert prompt + new == whole


def test_greedy_of_a_vocabulary_of_gpt2s_size(shared_golden):
    folder = shared_golden / "openai-bpe"
    if not folder.is_dir():
        pytest.skip(f"{folder} is not here: 5 MB that the repository does not carry")
    recorded = np.load(folder / "golden.npz")
    prompt, whole = recorded["prompt"].tolist(), recorded["greedy"][0].tolist()
    (new,) = generate(load_openai(folder), [prompt], len(whole) - 3, temperature=0, end_of_text=None)
    assert prompt + new == whole


def test_greedy_is_the_transcriptions(model, greedy):
    """Without a cache, one whole pass for each word."""
    p = {v.path: np.asarray(v.value) for v in model.trainable_variables}
    for prompt, new in zip(PROMPTS[:2], greedy, strict=False):
        ids = list(prompt)
        for _ in range(9):
            ids.append(int(gpt2(p, 3, ids)[0][-1].argmax()))
        assert ids == prompt + new


def test_prompts_do_not_disturb_each_other(model, greedy):
    for prompt, new in zip(PROMPTS, greedy, strict=True):
        assert generate(model, [prompt], 9, temperature=0, end_of_text=None) == [new]
    assert generate(model, PROMPTS[::-1], 9, temperature=0, end_of_text=None) == greedy[::-1]


def test_the_longest_that_fits(model, greedy):
    """A prompt is padded to a multiple of 16, which together with the length may be more than the context holds."""
    prompt = [i % 37 for i in range(33)]
    (new,) = generate(model, [prompt], 8, temperature=0, end_of_text=None)
    p = {v.path: np.asarray(v.value) for v in model.trainable_variables}
    ids = list(prompt)
    for _ in range(8):
        ids.append(int(gpt2(p, 3, ids)[0][-1].argmax()))
    assert ids == prompt + new
    assert len(generate(model, [prompt, [1]], 8, end_of_text=None)[1]) == 8


def test_top_k_of_one_is_greedy(model, greedy):
    assert generate(model, PROMPTS, 9, top_k=1, seed=1, end_of_text=None) == greedy
    assert generate(model, PROMPTS, 9, top_p=1e-6, seed=1, end_of_text=None) == greedy
    assert generate(model, PROMPTS, 9, temperature=1e-4, seed=1, end_of_text=None) == greedy


def test_the_seed_decides(model):
    one, same, other = (generate(model, PROMPTS, 9, temperature=3.0, seed=s, end_of_text=None) for s in (1, 1, 2))
    assert one == same != other
    assert generate(model, PROMPTS, 9, temperature=3.0, end_of_text=None) != generate(
        model, PROMPTS, 9, temperature=3.0, end_of_text=None
    ), "without a seed every call is new"
    rows = generate(model, [[1, 2]] * 4, 9, temperature=3.0, seed=1, end_of_text=None)
    assert len({tuple(row) for row in rows}) == 4, "rows of a batch are drawn apart"
    assert rows == generate(model, [[1, 2]], 9, temperature=3.0, seed=1, end_of_text=None, samples=4)


def test_threefrys_known_answers():
    """Of its authors' library, Random123 (kat_vectors, threefry2x32 of 20 rounds)."""
    ones = 0xFFFFFFFF
    for counters, keys, expected in (
        ((0, 0), (0, 0), (0x6B200159, 0x99BA4EFE)),
        ((ones, ones), (ones, ones), (0x1CB996FC, 0xBB002BE7)),
        ((0x243F6A88, 0x85A308D3), (0x13198A2E, 0x03707344), (0xC4923A9C, 0x483DF7A0)),
    ):
        words = [tuple(ops.convert_to_tensor(np.array([x], np.uint32)) for x in pair) for pair in (keys, counters)]
        assert tuple(int(np.asarray(x)[0]) for x in sample.threefry(*words)) == expected


def test_gumbels_numbers():
    """Their distribution, exp(-exp(-x)), over words, tokens and keys; other words in the same place stay."""
    keys = ops.convert_to_tensor(np.arange(8, dtype=np.uint32).reshape(4, 2))
    found = np.stack([np.asarray(sample.gumbel(keys, number, 5001)) for number in range(3)])
    assert np.isfinite(found).all() and len(np.unique(found)) > 0.998 * found.size
    assert stats.kstest(found.ravel(), stats.gumbel_r.cdf).pvalue > 0.01
    for axis in range(2):
        assert abs(np.corrcoef(np.moveaxis(found, axis, 0).reshape(found.shape[axis], -1)[:2])[0, 1]) < 0.02
    np.testing.assert_array_equal(np.asarray(sample.gumbel(keys[1:2], 2, 5001)), found[2, 1:2])


def test_rounding_hardly_changes_a_word():
    """Of GPT-2's vocabulary, with noise as a batch of another size rounds in float32 and in bfloat16."""
    random = np.random.default_rng(0)
    logits = random.normal(0, 2, (256, 50257)).astype(np.float32)
    keys = ops.convert_to_tensor(random.integers(0, 2**32, (256, 2), np.uint32))
    words, near, far = (
        np.asarray(sample.draw(logits + random.normal(0, sd, logits.shape).astype(np.float32), keys, 7))
        for sd in (0, 2e-6, 5e-3)
    )
    assert (words == near).all() and (words != far).sum() <= 5 and len({*words}) > 200


OPTIONS = {"temperature": 2.0, "seed": 1, "end_of_text": None}


def test_a_prompt_is_no_other_ones_beginning(model):
    """Id 0 is one of the vocabulary, and a random stream knows how long its prompt is."""
    keys = [sample._writer(model, [p], 1, 1.0, 0, 1.0, seed=7).keys for p in ([33], [33, 0], [33, 0, 0])]
    assert len({np.asarray(key).tobytes() for key in keys}) == 3


def test_a_seed_gives_the_same_text_in_every_batch(model):
    """Also beyond the context, where each row has windows of its own."""
    together = generate(model, [*PROMPTS, PROMPTS[0]], 100, **OPTIONS)
    for prompt, new in zip(PROMPTS, together, strict=False):
        assert generate(model, [prompt], 100, **OPTIONS) == [new]
    assert together[-1] != together[0] and generate(model, [PROMPTS[0]] * 2, 100, **OPTIONS)[1] == together[-1]
    assert generate(model, PROMPTS, 7, **OPTIONS) == [new[:7] for new in together[:4]]


@pytest.mark.parametrize("overlap", [None, 1, 7, 40, 41])
def test_beyond_the_context_by_windows(model, overlap):
    """The literal way: a window that has grown over the context is cut to its last `overlap` tokens."""
    p = {v.path: np.asarray(v.value) for v in model.trainable_variables}
    prompt = [i * i % 37 for i in range(30)]
    window, expected = list(prompt), []
    for _ in range(100):
        if len(window) > 41:
            window = window[-(overlap or 20) :]
        expected.append(int(gpt2(p, 3, window)[0][-1].argmax()))
        window.append(expected[-1])
    assert generate(model, [prompt], 100, temperature=0, end_of_text=None, overlap=overlap) == [expected]


def test_of_a_long_prompt_the_end_is_read(model):
    prompt = [i * i % 37 for i in range(60)]
    with pytest.warns(UserWarning, match="prompt 1 has 60 tokens, the context 41") as said:
        new = generate(model, [[1], prompt], 30, temperature=0, end_of_text=None)
        generate(model, [[1], prompt], 30, seed=1, samples=3, end_of_text=None)
    assert len(said) == 2
    assert new[1] == generate(model, [prompt[-41:]], 30, temperature=0, end_of_text=None)[0]


def test_an_empty_prompt_starts_from_the_end_of_text(model):
    assert generate(model, [[]], 9, seed=1) == generate(model, [[36]], 9, seed=1)
    assert generate(model, [[]], 9, seed=1, end_of_text=5) == generate(model, [[5]], 9, seed=1, end_of_text=5)


def test_new_ids_are_plain_numbers(greedy):
    assert all(type(token) is int for row in greedy for token in row)
    assert [len(row) for row in greedy] == [9] * 4


# --- the end of a text ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{"temperature": 0}, {"seed": 1}, {"seed": 1, "top_k": 3}], ids=str)
def test_a_row_ends_before_the_end_of_text(next_word, options):
    prompts = [[3], [1, 2, 9], [0, 10], [11], [12]]
    expected = [[4, 5, 6, 7, 8, 9], [10, 11], [11], [], [0, 1, 2, 3, 4, 5]]
    assert generate(next_word, prompts, 6, **options) == expected
    assert generate(next_word, prompts[3:4], 6, **options) == [[]]


def test_another_end_of_text_or_none(next_word):
    prompts = [[3], [9]]
    assert generate(next_word, prompts, 6, temperature=0, end_of_text=5) == [[4], [10, 11, 12, 0, 1, 2]]
    assert generate(next_word, prompts, 6, temperature=0, end_of_text=None) == [
        [4, 5, 6, 7, 8, 9],
        [10, 11, 12, 0, 1, 2],
    ]
    assert generate(next_word, prompts, 6, temperature=0, end_of_text=0) == [[4, 5, 6, 7, 8, 9], [10, 11, 12]]


def test_one_word(next_word):
    assert generate(next_word, [[3], [11]], 1, temperature=0) == [[4], []]


# --- which words may be drawn -----------------------------------------------------------------------------------------


def literal_top_k(logits, k):
    """`top_k_logits` of openai/gpt-2."""
    if k == 0:
        return logits
    return np.array([[-1e10 if x < sorted(row)[-k] else x for x in row] for row in logits])


def literal_top_p(logits, p, crossing=True):
    """`top_p_logits` of openai/gpt-2; `crossing`: Holtzman et al. 2020, equation 2."""
    kept = []
    for row in logits:
        falling = np.array(sorted(row, reverse=True))
        cumulated = np.cumsum(np.exp(falling - falling[0]) / np.exp(falling - falling[0]).sum())
        last = sum(cumulated < p) if crossing else max(sum(cumulated <= p) - 1, 0)
        kept.append([-1e10 if x < falling[last] else x for x in row])
    return np.array(kept)


LOGITS = np.random.default_rng(0).normal(0, 2, (5, 23)).round(1).astype(np.float32)  # rounded: ties
LOGITS[1, :7] = LOGITS[1].max()
LOGITS[2] = 0


@pytest.mark.parametrize("k", [1, 2, 5, 22, 23])
def test_keep_top_k(k):
    np.testing.assert_array_equal(np.asarray(keep_top_k(ops.convert_to_tensor(LOGITS), k)), literal_top_k(LOGITS, k))


@pytest.mark.parametrize("crossing", [True, False])
@pytest.mark.parametrize("p", [1e-9, 0.1, 0.5, 0.9, 0.999])
def test_keep_top_p(p, crossing):
    kept = np.asarray(keep_top_p(ops.convert_to_tensor(LOGITS), p, crossing))
    np.testing.assert_array_equal(kept, literal_top_p(LOGITS, p, crossing))


@pytest.mark.parametrize(
    "p, crossing, kept",
    [(0.3, True, [1]), (0.6, True, [1, 2]), (0.81, True, [0, 1, 2]), (0.3, False, [1]), (0.6, False, [1]),
     (0.81, False, [1, 2])],
)  # fmt: skip
def test_the_word_that_crosses_p(p, crossing, kept):
    """Of .5, .3, .2 the p of .6 keeps two; in OpenAI's code one."""
    logits = np.log(np.array([[0.2, 0.5, 0.3]], np.float32))
    out = np.asarray(keep_top_p(ops.convert_to_tensor(logits), p, crossing))[0]
    assert [i for i in range(3) if out[i] > -1e9] == kept
    assert len(kept) == 3 or out.min() == np.float32(-1e10)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 0.6},
        {"top_k": 4},
        {"temperature": 1.7, "top_k": 9, "top_p": 0.8},
        {"top_p": 0.7},
        {"top_p": 0.7, "crossing": False},
    ],
    ids=str,
)
def test_words_are_drawn_as_often_as_they_should(model, options):
    """Chi-square of 4096 first words, and of as many second ones, against the softmax; the seed is fixed."""
    n, p = 4096, {v.path: np.asarray(v.value) for v in model.trainable_variables}
    rows = np.array(generate(model, [[7, 7, 2]] * n, 2, seed=5, end_of_text=None, **options))

    def expected(ids):
        logits = gpt2(p, 3, ids)[0][-1:] / options.get("temperature", 1.0)
        logits = literal_top_k(logits, options.get("top_k", 0))
        if "top_p" in options:
            logits = literal_top_p(logits, options["top_p"], options.get("crossing", True))
        weights = np.exp(logits[0] - logits.max())
        return weights / weights.sum()

    common = np.bincount(rows[:, 0]).argmax()
    for drawn, probability in (
        (rows[:, 0], expected([7, 7, 2])),
        (rows[rows[:, 0] == common, 1], expected([7, 7, 2, common])),
    ):
        seen, due = np.bincount(drawn, minlength=37), len(drawn) * probability
        assert (seen[probability < 1e-30] == 0).all(), "words that are out were drawn"
        often = due >= 5
        due, seen = np.append(due[often], due[~often].sum()), np.append(seen[often], seen[~often].sum())
        due, seen = due[due > 0], seen[due > 0]
        chi_square, freedom = ((seen - due) ** 2 / due).sum(), max(len(due) - 1, 1)
        assert chi_square < freedom + 4 * np.sqrt(2 * freedom) + 8


# --- log-probabilities, penalty, shortest length ----------------------------------------------------------------------


def literal_log_probabilities(model, prompt, new):
    p = {v.path: np.asarray(v.value) for v in model.trainable_variables}
    logits = gpt2(p, 3, [*prompt, *new])[0][len(prompt) - 1 : -1]
    return -nll(logits, np.array(new))


@pytest.mark.parametrize("options", [{}, {"temperature": 0}, {"temperature": 2.0, "top_k": 5, "top_p": 0.5}], ids=str)
def test_log_probabilities_are_the_models_own(model, options):
    """Of the tokens that were chosen, whatever the temperature and the filters."""
    found = generate(model, PROMPTS, 12, seed=1, end_of_text=None, details=True, **options)
    assert [one.ids for one in found] == generate(model, PROMPTS, 12, seed=1, end_of_text=None, **options)
    for prompt, one in zip(PROMPTS, found, strict=True):
        expected = literal_log_probabilities(model, prompt, one.ids)
        np.testing.assert_allclose(one.log_probabilities, expected, atol=2e-5)
        assert one.ended == "length" and one.text is None


def test_a_penalty_for_what_was_seen(model):
    """Keskar et al. 2019: what was in the prompt or the text so far, once; greedy by the literal model."""
    p = {v.path: np.asarray(v.value) for v in model.trainable_variables}
    for prompt, new in zip(
        PROMPTS, generate(model, PROMPTS, 20, 0, repetition_penalty=1.5, end_of_text=None), strict=True
    ):
        ids = list(prompt)
        for _ in range(20):
            logits = gpt2(p, 3, ids)[0][-1]
            for token in set(ids):
                logits[token] = logits[token] / 1.5 if logits[token] > 0 else logits[token] * 1.5
            ids.append(int(logits.argmax()))
        assert ids == prompt + new
    assert new != generate(model, PROMPTS[-1:], 20, 0, end_of_text=None)[0], "it makes a difference"


def test_shortest_length(next_word):
    """Token 12 ends; before the third token the second best is taken instead."""
    (free,), (held,) = (generate(next_word, [[10]], 6, 0, min_length=n) for n in (0, 3))
    assert free == [11] and len(held) >= 3 and 12 not in held[:3]
    assert generate(next_word, [[5]], 6, 0, min_length=3) == generate(next_word, [[5]], 6, 0)


def test_ids_of_any_kind(next_word):
    """What can be read once only is read once."""
    expected = generate(next_word, [[3], [6]], 6, 0, stop_tokens=[8])
    for kind in (iter, np.array):
        assert generate(next_word, map(kind, ([3], [6])), 6, 0, stop_tokens=kind([8])) == expected


def test_stop_tokens(next_word):
    assert generate(next_word, [[3], [6], [9]], 6, 0, stop_tokens=[6, 8]) == [[4, 5], [7], [10, 11]]
    one, two = generate(next_word, [[3], [6]], 2, 0, stop_tokens=[8], details=True)
    assert (one.ended, two.ended) == ("length", "token") and len(two.log_probabilities) == 1


# --- strings ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def alphabet():
    """A vocabulary of bytes and some pairs, and a model of it that writes the alphabet, with an "é" of two tokens."""
    tokenizer = Tokenizer([("a", "b"), ("c", "d"), ("ab", "cd")])
    order = [*tokenizer.encode("x"), *(token for byte in "zé".encode() for token in _byte(tokenizer, byte)),
             *tokenizer.encode("abcd"), *tokenizer.encode("q"), *tokenizer.encode("ab")]  # fmt: skip

    def init(path, shape):
        values = np.zeros(shape, np.float32)
        if path == "model/wte":
            for i, token in enumerate(order):
                values[token, i] = 1.0
                values[token, 8 + (i - 1) % len(order)] = 1.0
        for i in range(len(order)):
            if path == "model/h0/mlp/c_fc/w":
                values[i, i] = 10.0
            elif path == "model/h0/mlp/c_proj/w":
                values[i, 8 + i] = 10.0
        return np.full(shape, 20.0, np.float32) if path.endswith("/g") else values

    model = GPT2(ModelConfig(tokenizer.n_vocab, n_ctx=24, n_embd=16, n_head=2, n_layer=1), init=init)
    return model, tokenizer


def _byte(tokenizer, byte):
    return [next(i for i in range(256) if tokenizer._bpe.decode_single_token_bytes(i) == bytes([byte]))]


WRITTEN = "zéabcdqabxzéabcdqabxz"


@pytest.mark.parametrize(
    "stop, text, ended",
    [
        ((), WRITTEN, "length"),
        ("é", "z", "string"),
        ("bc", "zéa", "string"),  # inside one token
        (["qa", "xz"], "zéabcd", "string"),
        (["dqabx", "ab"], "zé", "string"),
        (["abcdqab", "q"], "zéabcd", "string"),  # the one that is there first, though the other begins before it
        ("bx", "zéabcdqa", "string"),
        (["nothing"], WRITTEN, "length"),
    ],
    ids=str,
)
def test_stop_strings_and_streaming(alphabet, stop, text, ended):
    model, tokenizer = alphabet
    options = {"temperature": 0, "stop": stop, "tokenizer": tokenizer}
    start, length = tokenizer.encode("x"), 15
    (one,) = generate(model, [start], length, details=True, **options)
    assert (one.text, one.ended) == (text, ended)
    assert text.startswith(tokenizer.decode(one.ids).rstrip("\ufffd")) and len(one.ids) == len(one.log_probabilities)
    assert generate(model, [start, start[:1]], length, **options) == [one.ids] * 2
    del options["tokenizer"]
    pieces = list(stream(model, tokenizer, "x", length, **options))
    assert "".join(pieces) == text and "\ufffd" not in "".join(pieces)
    assert len(pieces) >= min(3, len(text)) - 1


def test_a_stream_is_what_generate_gives(alphabet):
    model, tokenizer = alphabet
    for options in ({"seed": 1, "temperature": 9.0}, {"seed": 2, "temperature": 5.0, "top_k": 9, "min_length": 30}):
        (one,) = generate(model, [tokenizer.encode("abx")], 60, tokenizer=tokenizer, details=True, **options)
        assert "".join(stream(model, tokenizer, "abx", 60, **options)) == one.text


# --- beams ------------------------------------------------------------------------------------------------------------


def test_one_beam_is_greedy(model, greedy, monkeypatch):
    """The search for the best of several, made to look for one."""
    asked = []
    widen = sample._widen

    def chosen(logits, made, keys, state, knobs, rules):
        finished, seen, scores, _ = state
        new, own, parent, scores = widen(logits, made, scores, finished, seen, rules, knobs)
        asked.append(new)
        return (ops.where(finished, -1, new), own, parent), (finished, seen, scores, new)

    assert generate(model, PROMPTS, 9, temperature=0, beams=1, end_of_text=None) == greedy
    monkeypatch.setattr(sample, "_chosen", chosen)
    other = GPT2(CONFIG, init=distinctive)  # with programs of its own
    assert generate(other, PROMPTS, 9, temperature=0, end_of_text=None) == greedy and asked


@pytest.mark.parametrize("end", [None, 30])
def test_enough_beams_find_the_best(model, end):
    """As many as there are texts of one token: of all texts of two tokens the most likely ones, in their order."""
    p, prompt = {v.path: np.asarray(v.value) for v in model.trainable_variables}, PROMPTS[0]
    every = {}
    first = gpt2(p, 3, prompt)[0][-1]
    first = first - np.log(np.exp(first).sum())
    for a in range(37):
        if a == end:
            every[()] = first[a]
            continue
        second = gpt2(p, 3, [*prompt, a])[0][-1]
        second = second - np.log(np.exp(second).sum())
        for b in range(37):
            every[(a,) if b == end else (a, b)] = (first[a] + second[b]) / 2
    best = sorted(every, key=every.get, reverse=True)[:5]
    found = generate(model, [prompt, [6]], 2, 0, beams=37, samples=5, end_of_text=end, details=True)[:5]
    found = [tuple(one.ids) for one in found]
    assert found == best


def test_beams_of_a_prompt_alone_or_not(model):
    together = generate(model, PROMPTS, 9, 0, beams=3, samples=2, end_of_text=None, details=True)
    for i, prompt in enumerate(PROMPTS):
        alone = generate(model, [prompt], 9, 0, beams=3, samples=2, end_of_text=None, details=True)
        assert [one.ids for one in alone] == [one.ids for one in together[2 * i : 2 * i + 2]]
        for one in alone:
            expected = literal_log_probabilities(model, prompt, one.ids)
            np.testing.assert_allclose(one.log_probabilities, expected, atol=2e-5)


def test_beams_and_the_other_settings(next_word):
    assert generate(next_word, [[3], [10]], 6, 0, beams=2) == [[4, 5, 6, 7, 8, 9], [11]]
    held = generate(next_word, [[10]], 6, 0, beams=2, min_length=4)[0]
    assert len(held) >= 4 and 12 not in held[:4]
    assert generate(next_word, [[3]], 3, 0, beams=2, stop_tokens=[6]) == [[4, 5]]


def test_beams_stop_at_strings_as_at_tokens():
    """A string of one byte is a token, and a text that a beam left does not stop another one."""
    tokenizer = Tokenizer([])
    model = GPT2(ModelConfig(n_vocab=257, n_ctx=41, n_embd=15, n_head=3, n_layer=1), init=distinctive)
    rng, ended = np.random.default_rng(0), []
    for _ in range(12):
        prompts, stop = rng.integers(0, 256, (2, 5)).tolist(), chr(rng.integers(33, 127))
        options = {"beams": 4, "samples": 4, "tokenizer": tokenizer, "details": True}
        strings = generate(model, prompts, 25, 0, stop=stop, **options)
        tokens = generate(model, prompts, 25, 0, stop_tokens=tokenizer.encode(stop), **options)
        assert [(one.ids, one.ended) for one in strings] == [
            (one.ids, "string" if one.ended == "token" and len(one.ids) < 25 else one.ended) for one in tokens
        ]
        ended += [one.ended for one in strings]
    assert {"string", "length"} <= {*ended}


# --- beside transformers ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "ours, theirs",
    [
        ({}, {}),
        ({"repetition_penalty": 1.3}, {"repetition_penalty": 1.3}),
        ({"beams": 4}, {"num_beams": 4}),
        ({"beams": 3, "samples": 3}, {"num_beams": 3, "num_return_sequences": 3}),
    ],
    ids=str,
)
def test_transformers_writes_the_same(model, tmp_path, ours, theirs):
    reason = "needs torch and transformers: pip install -e '.[bench]'"
    torch = pytest.importorskip("torch", reason=reason)
    transformers = pytest.importorskip("transformers", reason=reason)
    save_huggingface(model, tmp_path / "saved")
    peer = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "saved").eval()
    for prompt in PROMPTS:
        said = peer.generate(
            torch.tensor([prompt]), max_new_tokens=20, do_sample=False, eos_token_id=None, pad_token_id=0, **theirs
        )
        new = generate(model, [prompt], 20, temperature=0, end_of_text=None, **ours)
        assert said[:, len(prompt) :].tolist() == new


# --- files ------------------------------------------------------------------------------------------------------------


def test_prompts_of_files(tmp_path):
    (tmp_path / "one.txt").write_text("Two\nlines\n")
    assert read_prompts(tmp_path / "one.txt") == ["Two\nlines"]
    (tmp_path / "some.jsonl").write_text('{"prompt": "a\\nb"}\n{"prompt": "", "n": 3}\n')
    assert read_prompts(tmp_path / "some.jsonl") == ["a\nb", ""]
    (tmp_path / "some.jsonl").write_text('{"prompt": "a\u2028b\x85"}\n\n', encoding="utf-8")
    assert read_prompts(tmp_path / "some.jsonl") == ["a\u2028b\x85"]
    for wrong in ('{"text": "a"}', "a", "[3]", '{"prompt": 5}'):
        (tmp_path / "some.jsonl").write_text('{"prompt": "a"}\n' + wrong)
        with pytest.raises(ValueError, match=r"line 2 of .*some\.jsonl"):
            read_prompts(tmp_path / "some.jsonl")


def test_samples_are_written_whole(alphabet, tmp_path):
    model, tokenizer = alphabet
    found = generate(model, [tokenizer.encode("x")], 4, seed=1, samples=2, tokenizer=tokenizer, details=True)
    path = tmp_path / "folder" / "samples.jsonl"
    write_samples(path, ["x", "x"], found, {"seed": 1}, fingerprint(model))
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert lines[0] == {
        "prompt": "x", "text": found[0].text, "ids": found[0].ids, "log_probabilities": found[0].log_probabilities,
        "ended": found[0].ended, "settings": {"seed": 1}, "checkpoint": fingerprint(model),
    }  # fmt: skip
    before = path.read_bytes()
    with pytest.raises(TypeError):
        write_samples(path, ["x", "x"], found, {"seed": object()}, "")
    assert path.read_bytes() == before and len([*path.parent.iterdir()]) == 1


# --- one program ------------------------------------------------------------------------------------------------------


def test_lengths_of_the_cache_are_few_and_near_what_is_needed():
    needed = np.arange(1, 1025)
    lengths = np.array([sample.cache_length(1, int(n)) for n in needed])
    assert np.all(lengths >= needed) and np.all(lengths - needed <= np.maximum(15, needed / 8))
    assert len(set(lengths)) == 32  # 16 up to 256, and 8 in each of two octaves


def test_compiled_once_for_a_shape(monkeypatch):
    """Counts how often programs are traced: other prompts, lengths, seeds, temperatures and weights need no new one."""
    traces = []

    def counted(make):
        def made(*args):
            run = make(*args)

            def traced(*tensors):
                traces.append(make.__name__)
                return run(*tensors)

            return traced

        return made

    for name in ("begin", "go_on"):
        monkeypatch.setattr(sample, name, counted(getattr(sample, name)))
    model = GPT2(CONFIG, init=distinctive)
    first = generate(model, [[1, 2]], 3, seed=1, end_of_text=None)
    for prompt, length, options in (
        ([9], 3, {"seed": 2}), ([1] * 16, 5, {"temperature": 0.5}), ([3, 4], 3, {"end_of_text": 7}),
        ([5], 9, {"seed": None}), ([5], 3, {"stop_tokens": [8]}),
    ):  # fmt: skip
        generate(model, [prompt], length, **options)
    assert traces == ["begin", "go_on"]
    model.wte.assign(np.asarray(model.wte.value)[::-1].copy())
    assert generate(model, [[1, 2]], 3, seed=1, end_of_text=None) != first, "new weights are seen"
    assert len(traces) == 2
    generate(model, [[1, 2], [3]], 3)
    assert traces[2:] == ["begin", "go_on"]


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "prompts, options, said",
    [
        ([[1, 37]], {}, ("prompt 0", "36")),
        ([[1, -1]], {}, ("prompt 0", "36")),
        ([[1]], {"length": 0}, ("length", "0")),
        ([[1]], {"temperature": -0.1}, ("temperature", "-0.1")),
        ([[1]], {"top_p": 0.0}, ("top_p", "0.0")),
        ([[1]], {"top_p": 1.1}, ("top_p", "1.1")),
        ([[1]], {"top_k": -1}, ("top_k", "-1")),
        ([[1]], {"top_k": 38}, ("top_k", "38")),
        ([[1]], {"temperature": float("nan")}, ("temperature", "nan")),
        ([[1]], {"temperature": float("inf")}, ("temperature", "inf")),
        ([[1]], {"top_p": float("nan")}, ("top_p", "nan")),
        ([[1]], {"repetition_penalty": 0}, ("repetition_penalty", "0")),
        ([[1]], {"min_length": 3}, ("min_length", "2", "3")),
        ([[1]], {"stop_tokens": [37]}, ("37", "vocabulary")),
        ([[1]], {"end_of_text": 99}, ("99", "vocabulary")),
        ([[1]], {"stop": "x"}, ("stop", "tokenizer")),
        ([[1]], {"samples": 0}, ("samples", "0")),
        ([[1]], {"beams": 2}, ("beams", "temperature")),
        ([[1]], {"beams": 2, "samples": 3, "temperature": 0}, ("samples", "beams", "3")),
        ([[1] * 40], {"beams": 2, "temperature": 0}, ("prompt 0", "40 tokens", "41")),
        ([[1]], {"overlap": 42}, ("overlap", "41", "42")),
        ([[1]], {"overlap": 0}, ("overlap", "41", "0")),
        ([[1]], {"seed": -1}, ("seed", "-1")),
        ([[1], [40]], {"samples": 3}, ("prompt 1", "36")),
        ("Hello", {}, ("prompts", "tokenizer.encode")),
        ([1, 2], {}, ("prompts", "tokenizer.encode")),
        (["Hello"], {}, ("prompts", "tokenizer.encode")),
        ([[1]], {"stop_tokens": 5}, ("stop_tokens", "5")),
        ([[1]], {"stop": [5]}, ("stop", "5")),
        ([[1]], {"top_k": 2.5}, ("top_k", "2.5")),
        ([[1]], {"length": "3"}, ("length", "3")),
        ([[1]], {"beams": 1.5}, ("beams", "1.5")),
        (5, {}, ("prompts", "tokenizer.encode")),
        ([[1]], {"stop_tokens": "a"}, ("stop_tokens", "'a'")),
        ([[1]], {"overlap": 20.0}, ("overlap", "20.0")),
        ([[1]], {"seed": "1"}, ("seed", "'1'")),
        ([[1]], {"end_of_text": 2.5}, ("end_of_text", "2.5")),
        ([[1]], {"multiple": 0}, ("multiple", "0")),
        ([[1]], {"temperature": "high"}, ("temperature", "'high'")),
        ([[1]], {"top_p": None}, ("top_p", "None")),
        ([[1]], {"length_penalty": "1"}, ("length_penalty", "'1'")),
    ],
    ids=str,
)
def test_bad_input_is_one_sentence(model, prompts, options, said):
    with pytest.raises(ValueError) as error:
        generate(model, prompts, **({"length": 2} | options))
    assert all(word in str(error.value) for word in said), str(error.value)
    assert "\n" not in str(error.value)


def test_a_damaged_model_is_one_sentence():
    model = GPT2(CONFIG, init=lambda path, shape: np.full(shape, np.nan, np.float32))
    for options in ({"temperature": 0}, {"seed": 1}):
        with pytest.raises(ValueError, match="damaged"):
            generate(model, [[1]], 3, **options)


def test_a_temperature_next_to_nothing_is_greedy(model, greedy):
    assert generate(model, PROMPTS, 9, temperature=1e-42, top_k=7, seed=1, end_of_text=None) == greedy


def test_few_programs_for_a_long_batch(model, monkeypatch):
    """Where windows of several rows are read again, at some other length each time."""
    made = []
    compiled = sample.compiled
    monkeypatch.setattr(sample, "compiled", lambda *args, **options: made.append(1) or compiled(*args, **options))
    other = GPT2(ModelConfig(n_vocab=37, n_ctx=128, n_embd=15, n_head=3, n_layer=1), init=distinctive)
    prompts = [[1] * n for n in (1, 5, 12, 20, 34, 37, 57, 60, 78, 95, 99, 120)]
    generate(other, prompts, 500, 0, end_of_text=None, multiple=1)
    assert len(made) <= 6  # two to begin and go on, then windows of 64, 96 and 128 tokens at most and one to go on


def test_a_stream_is_of_one_text(alphabet):
    model, tokenizer = alphabet
    for options in ({"beams": 2}, {"samples": 2}, {"details": True}):
        with pytest.raises(ValueError, match=f"stream .* takes no {min(options)}"):
            next(stream(model, tokenizer, "x", 3, 0, **options))


def test_progress(model):
    said = []
    generate(model, PROMPTS, 70, seed=1, end_of_text=None, progress=said.append)
    assert said == sorted({*said}) and said[0] == 1 and said[-1] == 70


def test_no_prompts(model):
    assert generate(model, [], 3) == []


def test_a_model_in_eight_bits_generates(model):
    """As a model whose parameters are the rounded ones, alone (integers) and in a batch."""
    low = quantized(model)
    p = {v.path: np.asarray(v.value) for v in low.weights}
    for path in [path for path in p if path + "_scale" in p]:
        values = p[path].astype(np.float64) * p[path + "_scale"][:, None]
        p[path] = values if path.endswith("wte") else values.T
    expected = []
    for prompt in PROMPTS:
        ids = list(prompt)
        for _ in range(9):
            ids.append(int(gpt2(p, 3, ids)[0][-1].argmax()))
        expected.append(ids[len(prompt) :])
    assert generate(low, PROMPTS, 9, 0, end_of_text=None) == expected
    assert [generate(low, [prompt], 9, 0, end_of_text=None)[0] for prompt in PROMPTS] == expected


@pytest.mark.parametrize("dtype", ["bfloat16", "mixed_bfloat16"])
def test_one_row_in_bfloat16(model, dtype):
    """Reads its matrices the other way round: log-probabilities as those of the batch, within the precision."""
    values = {v.path: np.asarray(v.value) for v in model.trainable_variables}
    low = GPT2(CONFIG, init=lambda path, shape: values[path], dtype=dtype)
    alone = generate(low, PROMPTS[:1], 9, 0, end_of_text=None, details=True)[0]
    batch = generate(low, PROMPTS[:1] * 2, 9, 0, end_of_text=None, details=True)[0]
    assert alone.ids == batch.ids
    np.testing.assert_allclose(alone.log_probabilities, batch.log_probabilities, atol=0.05)


def test_a_low_precision_model_generates(next_word):
    values = {v.path: np.asarray(v.value) for v in next_word.trainable_variables}
    low = GPT2(next_word.config, init=lambda path, shape: values[path], dtype="mixed_bfloat16")
    assert generate(low, [[3], [10]], 4, temperature=0) == [[4, 5, 6, 7], [11]]
    assert keras.config.dtype_policy().name == "float32"


@pytest.mark.skipif(not device.is_cpu(), reason="what is looked for is how XLA's CPU compiler copies")
@pytest.mark.parametrize("rows", [1, 3])
def test_the_cache_is_updated_in_place(rows):
    """No operation inside the loop of the compiled program makes a whole cache anew."""
    model = GPT2(ModelConfig(n_vocab=40, n_ctx=128, n_embd=24, n_head=3, n_layer=2))
    run = sample.go_on(model, sample.Rules(greedy=True), 4)
    knobs = sample.Knobs(ends=np.zeros(40, bool)).tensors()
    state = tuple(
        map(ops.convert_to_tensor, (np.zeros(rows, bool), np.zeros((rows, 1), bool), np.zeros(rows, "float32")))
    )
    state = (*state, ops.zeros(rows, "int32"))
    integers = [ops.convert_to_tensor(x, "int32") for x in (3, [0] * rows, 1, 4)]
    args = (*integers, ops.zeros((rows, 2), "uint32"), state, model.empty_cache(rows, 128), {}, knobs)
    if keras.backend.backend() == "jax":
        import jax

        values = [v.value for v in model.variables]
        text = jax.jit(device.functional(model, run)).lower(values, *args).compile().as_text()
    else:
        import tensorflow as tf

        text = tf.function(run, autograph=False, jit_compile=True).experimental_get_compiler_ir(*args)("optimized_hlo")
    names = re.findall(r"body=%?([\w.\-]+)", text)
    bodies = [part for part in text.split("\n\n") if part.lstrip().lstrip("%").split(" ")[0] in names]
    assert any("dynamic-update-slice" in part for part in bodies)
    shape = rf"(?:{rows},3|{rows * 3}),128,8"
    made = re.findall(rf"= f32\[{shape}\]\S* (copy|select|add|convert)\(", "\n".join(bodies))
    assert not made


def test_the_cache_stays_where_it_is():
    """From call to call, not only within one."""
    model = GPT2(ModelConfig(n_vocab=40, n_ctx=128, n_embd=24, n_head=3, n_layer=2), seed=3)
    settings = dict(temperature=0, top_k=0, top_p=1.0, seed=0, end_of_text=None)
    writer = sample._writer(model, [[1, 2, 3]], 20, **settings)

    def places():
        values = [getattr(x, "value", lambda x=x: x)() for layer in writer.cache for x in layer]
        return [np.from_dlpack(x).__array_interface__["data"][0] for x in values]

    writer.advance(1), writer.advance(1)
    before = places()
    ids = [*writer.advance(1)[0][0], *writer.advance(4)[0][0]]
    assert places() == before and len(set(before)) == 4
    assert writer.ids[0][-5:] == ids
