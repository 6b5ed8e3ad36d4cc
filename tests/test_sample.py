"""Generation: OpenAI's greedy continuation, rows that do not disturb each other, words drawn as often as due."""

import keras
import numpy as np
import pytest
from keras import ops
from literal import distinctive, gpt2

from gpt2lib import sample
from gpt2lib.checkpoint import load_openai
from gpt2lib.config import ModelConfig
from gpt2lib.model import GPT2
from gpt2lib.sample import generate, keep_top_k, keep_top_p

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
    (new,) = generate(model, [prompt], 16, temperature=0, end_of_text=None)
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


def literal_top_p(logits, p):
    """`top_p_logits` of openai/gpt-2."""
    kept = []
    for row in logits:
        falling = np.array(sorted(row, reverse=True))
        cumulated = np.cumsum(np.exp(falling - falling[0]) / np.exp(falling - falling[0]).sum())
        last = max(sum(cumulated <= p) - 1, 0)
        kept.append([-1e10 if x < falling[last] else x for x in row])
    return np.array(kept)


LOGITS = np.random.default_rng(0).normal(0, 2, (5, 23)).round(1).astype(np.float32)  # rounded: ties
LOGITS[1, :7] = LOGITS[1].max()
LOGITS[2] = 0


@pytest.mark.parametrize("k", [1, 2, 5, 22, 23])
def test_keep_top_k(k):
    np.testing.assert_array_equal(np.asarray(keep_top_k(ops.convert_to_tensor(LOGITS), k)), literal_top_k(LOGITS, k))


@pytest.mark.parametrize("p", [1e-9, 0.1, 0.5, 0.9, 0.999])
def test_keep_top_p(p):
    np.testing.assert_array_equal(np.asarray(keep_top_p(ops.convert_to_tensor(LOGITS), p)), literal_top_p(LOGITS, p))


def test_the_word_that_crosses_p_is_left_out():
    """As in OpenAI's code, unlike most others: of .5, .3, .2 the p of .6 keeps one, .81 keeps two."""
    logits = np.log(np.array([[0.2, 0.5, 0.3]], np.float32))
    for p, kept in ((0.3, [1]), (0.6, [1]), (0.81, [1, 2])):
        out = np.asarray(keep_top_p(ops.convert_to_tensor(logits), p))[0]
        assert [i for i in range(3) if out[i] > -1e9] == kept
        assert out.min() == np.float32(-1e10)


@pytest.mark.parametrize(
    "options",
    [{}, {"temperature": 0.6}, {"top_k": 4}, {"temperature": 1.7, "top_k": 9, "top_p": 0.8}, {"top_p": 0.7}],
    ids=str,
)
def test_words_are_drawn_as_often_as_they_should(model, options):
    """Chi-square of 4096 first words, and of as many second ones, against the softmax; the seed is fixed."""
    n, p = 4096, {v.path: np.asarray(v.value) for v in model.trainable_variables}
    rows = np.array(generate(model, [[7, 7, 2]] * n, 2, seed=5, end_of_text=None, **options))

    def expected(ids):
        logits = gpt2(p, 3, ids)[0][-1:] / options.get("temperature", 1.0)
        logits = literal_top_k(logits, options.get("top_k", 0))
        logits = literal_top_p(logits, options["top_p"]) if "top_p" in options else logits
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


# --- one program ------------------------------------------------------------------------------------------------------


def test_compiled_once_for_a_shape(monkeypatch):
    """Counts how often the program is traced: other prompts, seeds, temperatures and weights need no new one."""
    traces, make = [], sample.program

    def counted(*args):
        run = make(*args)

        def traced(*tensors):
            traces.append(1)
            return run(*tensors)

        return traced

    monkeypatch.setattr(sample, "program", counted)
    model = GPT2(CONFIG, init=distinctive)
    first = generate(model, [[1, 2]], 3, seed=1, end_of_text=None)
    for prompt, options in (
        ([9], {"seed": 2}), ([1] * 16, {"temperature": 0.5}), ([3, 4], {"end_of_text": 7}), ([5], {"seed": None}),
    ):  # fmt: skip
        generate(model, [prompt], 3, **options)
    assert len(traces) == 1
    model.wte.assign(np.asarray(model.wte.value)[::-1].copy())
    assert generate(model, [[1, 2]], 3, seed=1, end_of_text=None) != first, "new weights are seen"
    assert len(traces) == 1
    generate(model, [[1, 2], [3]], 3)
    assert len(traces) == 2


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "prompts, options, said",
    [
        ([[1], [1] * 40], {}, ("prompt 1", "40 tokens", "41")),
        ([[1] * 41], {"length": 1}, ("prompt 0", "41 tokens")),
        ([[1], []], {}, ("prompt 1", "empty", "[36]")),
        ([[1, 37]], {}, ("prompt 0", "36")),
        ([[1, -1]], {}, ("prompt 0", "36")),
        ([[1]], {"length": 0}, ("length", "0")),
        ([[1]], {"temperature": -0.1}, ("temperature", "-0.1")),
        ([[1]], {"top_p": 0.0}, ("top_p", "0.0")),
        ([[1]], {"top_p": 1.1}, ("top_p", "1.1")),
        ([[1]], {"top_k": -1}, ("top_k", "-1")),
        ([[1]], {"top_k": 38}, ("top_k", "38")),
    ],
    ids=str,
)
def test_bad_input_is_one_sentence(model, prompts, options, said):
    with pytest.raises(ValueError) as error:
        generate(model, prompts, **({"length": 2} | options))
    assert all(word in str(error.value) for word in said), str(error.value)
    assert "\n" not in str(error.value)


def test_no_prompts(model):
    assert generate(model, [], 3) == []


def test_a_low_precision_model_generates(next_word):
    values = {v.path: np.asarray(v.value) for v in next_word.trainable_variables}
    low = GPT2(next_word.config, init=lambda path, shape: values[path], dtype="mixed_bfloat16")
    assert generate(low, [[3], [10]], 4, temperature=0) == [[4, 5, 6, 7], [11]]
    assert keras.config.dtype_policy().name == "float32"
