"""The model: against OpenAI's recorded outputs, and a slow NumPy transcription at pairwise different sizes."""

import itertools
import math
import re

import keras
import numpy as np
import pytest
from conftest import relative_error
from keras import ops
from literal import distinctive, gpt2
from literal import nll as literal_nll

from gpt2lib.checkpoint import load_openai
from gpt2lib.config import SIZES, ConfigError, ModelConfig, TrainConfig
from gpt2lib.device import compiled, places
from gpt2lib.model import (
    GPT2,
    INITS,
    dropout,
    eight_bits,
    initial_values,
    nll,
    one_row,
    quantized,
)  # fmt: skip
from gpt2lib.seed import FixedSeed
from gpt2lib.step import make_step

NO_DROPOUT = {"embd_pdrop": 0.0, "attn_pdrop": 0.0, "resid_pdrop": 0.0}
# B 2, L 3, N 5, H 7, T 11, n_ctx 13, D 35, V 101: pairwise different, so a swapped axis cannot pass.
CONFIG = ModelConfig(n_vocab=101, n_ctx=13, n_embd=35, n_head=5, n_layer=3, **NO_DROPOUT)
TOKENS = np.random.default_rng(0).integers(0, 101, (2, 11)).astype(np.int32)


def array(tensor) -> np.ndarray:
    return np.asarray(tensor)


def parameters(model) -> dict:
    return {v.path: array(v.value) for v in model.trainable_variables}


def stacked(cache) -> np.ndarray:
    """Our cache as OpenAI's `present`: [B, L, 2, N, T, H]."""
    return np.stack([np.stack([array(k), array(v)], 1) for k, v in cache], 1)


@pytest.fixture(scope="module")
def model():
    return GPT2(CONFIG, init=distinctive)


@pytest.fixture(scope="module")
def forward(model):
    return compiled(model, model)


@pytest.fixture(scope="module")
def full(forward):
    return array(forward(ops.convert_to_tensor(TOKENS)))


def test_without_compiling(model, full):
    """One row, one token, too: nothing fails or warns where nothing is compiled."""
    assert relative_error(model(TOKENS[:, :1]), full[:, :1]) < 1e-5


def compiled_step(model):
    """`f(tokens, past, position) -> (logits, present)`: eager JAX would compile every operation for every position."""
    return compiled(model, lambda tokens, past, position: model(tokens, past=past, position=position))


@pytest.fixture(scope="module")
def step(model):
    return compiled_step(model)


@pytest.fixture(scope="module")
def openai(golden):
    return load_openai(golden / "openai-test"), dict(np.load(golden / "openai-test" / "golden.npz"))


# --- OpenAI's outputs -------------------------------------------------------------------------------------------------


def test_logits_loss_and_cache_are_openais(openai):
    model, recorded = openai
    tokens = recorded["tokens"]
    logits = compiled(model, model)(tokens)
    assert relative_error(logits, recorded["logits"]) < 1e-5
    losses = array(nll(logits[:, :-1], tokens[:, 1:]))
    assert relative_error(losses, recorded["nll"]) < 1e-5
    assert abs(losses.mean() - recorded["loss"]) < 1e-5 * recorded["loss"]
    with_cache, present = compiled_step(model)(tokens, model.empty_cache(*tokens.shape), ops.zeros((), "int32"))
    assert relative_error(with_cache, recorded["logits"]) < 1e-5
    assert relative_error(stacked(present), recorded["present"]) < 1e-5


def test_every_gradient_is_openais(openai):
    """By the train step itself: at a rate so large that old values do not count, the change is the gradient."""
    source, recorded = openai
    values = parameters(source)
    model = GPT2(source.config.replace(**NO_DROPOUT), init=lambda path, shape: values[path])
    rate = 2.0**30
    optimizer = keras.optimizers.SGD(rate)
    optimizer.build(model.trainable_variables)
    step = make_step(model, optimizer, model.trainable_variables, TrainConfig(corpus="", run_dir=""), places())
    measures = step(recorded["tokens"], 0)
    assert abs(float(measures["loss"]) - recorded["loss"]) < 1e-5 * recorded["loss"]
    after, expected = step.arrays(), {}
    for path, before in values.items():
        expected[path] = recorded["grad/" + path].reshape(before.shape)
        gradient = (before.astype(np.float64) - after[path]) / rate
        assert relative_error(gradient, expected[path]) < 1e-5, path
    assert set(expected) == {name.removeprefix("grad/") for name in recorded if name.startswith("grad/")}
    norm = math.sqrt(sum(np.sum(g.astype(np.float64) ** 2) for g in expected.values()))
    assert abs(float(measures["gradient_norm"]) - norm) < 1e-5 * norm


def test_a_vocabulary_of_gpt2s_size(shared_golden):
    folder = shared_golden / "openai-bpe"
    if not folder.is_dir():
        pytest.skip(f"{folder} is not here: 5 MB that the repository does not carry")
    model, recorded = load_openai(folder), np.load(folder / "golden.npz")
    tokens = recorded["tokens"]
    logits = compiled(model, model)(tokens)
    assert relative_error(array(logits)[..., :64], recorded["logits_first64"]) < 1e-5
    total = np.log(np.exp(array(logits).astype(np.float64)).sum(-1))
    assert relative_error(total, recorded["logits_logsumexp"]) < 1e-5
    losses = array(nll(logits[:, :-1], tokens[:, 1:]))
    assert relative_error(losses, recorded["nll"]) < 1e-5
    assert abs(losses.mean() - recorded["loss"]) < 1e-5 * recorded["loss"]


@pytest.mark.parametrize("config", [CONFIG, SIZES["test"]], ids=["primes", "test"])
def test_names_and_shapes_are_openais(config):
    """As OpenAI's `model.py` makes them, the leading 1 of kernels left out."""
    d, expected = (
        config.n_embd,
        {"model/wte": (config.n_vocab, config.n_embd), "model/wpe": (config.n_ctx, config.n_embd)},
    )
    for i in range(config.n_layer):
        for name in ("ln_1", "ln_2"):
            expected |= {f"model/h{i}/{name}/g": (d,), f"model/h{i}/{name}/b": (d,)}
        kernels = {"attn/c_attn": (d, 3 * d), "attn/c_proj": (d, d), "mlp/c_fc": (d, 4 * d), "mlp/c_proj": (4 * d, d)}
        for name, shape in kernels.items():
            expected |= {f"model/h{i}/{name}/w": shape, f"model/h{i}/{name}/b": shape[1:]}
    expected |= {"model/ln_f/g": (d,), "model/ln_f/b": (d,)}
    model = GPT2(config)
    assert {v.path: tuple(v.shape) for v in model.trainable_variables} == expected
    assert len(model.trainable_variables) == len(expected)
    assert sum(math.prod(v.shape) for v in model.trainable_variables) == config.n_params
    assert all(v.dtype == "float32" for v in model.trainable_variables)


# --- the literal transcription ----------------------------------------------------------------------------------------


def test_the_transcription_is_openais(golden):
    """The judge is judged: the NumPy model gives the recorded logits, too."""
    recorded = np.load(golden / "openai-test" / "golden.npz")
    model = load_openai(golden / "openai-test")
    for row in range(2):
        logits, cache = gpt2(parameters(model), 3, recorded["tokens"][row])
        assert relative_error(recorded["logits"][row], logits) < 1e-5
        assert relative_error(recorded["present"][row], cache) < 1e-5


def test_the_model_is_the_transcription(model, step, full):
    _, present = step(TOKENS, model.empty_cache(2, 11), ops.zeros((), "int32"))
    losses = array(nll(full[:, :-1], TOKENS[:, 1:]))
    for row in range(2):
        logits, cache = gpt2(parameters(model), 5, TOKENS[row])
        assert relative_error(full[row], logits) < 1e-5
        assert relative_error(stacked(present)[row], cache) < 1e-5
        assert relative_error(losses[row], literal_nll(logits[:-1], TOKENS[row, 1:])) < 1e-5


@pytest.mark.parametrize("chunks", [[1] * 11, [3, 1, 5, 2], [10, 1]], ids=str)
def test_step_by_step_equals_the_full_pass(step, model, full, chunks):
    past, position, seen = model.empty_cache(2, 12), 0, []  # one place more than needed
    for t in chunks:
        logits, past = step(TOKENS[:, position : position + t], past, ops.convert_to_tensor(position, "int32"))
        seen.append(array(logits))
        position += t
    assert relative_error(np.concatenate(seen, 1), full) < 1e-5


def test_a_row_padded_on_the_left_equals_the_row_alone(model):
    """Whatever stands in the padding, with the cache and without."""
    lengths = (11, 4)
    forward = compiled(model, lambda tokens, start: model(tokens, start=start))
    step = compiled(model, lambda tokens, past, position, start: model(tokens, past, position, start))
    for filler in (0, 100):
        padded = np.full((2, 11), filler, np.int32)
        for row, length in enumerate(lengths):
            padded[row, 11 - length :] = TOKENS[row, :length]
        start = ops.convert_to_tensor([11 - length for length in lengths], "int32")
        plain = array(forward(ops.convert_to_tensor(padded), start))
        first, past = step(
            ops.convert_to_tensor(padded[:, :8]), model.empty_cache(2, 11), ops.zeros((), "int32"), start
        )
        rest, _ = step(ops.convert_to_tensor(padded[:, 8:]), past, ops.convert_to_tensor(8, "int32"), start)
        cached = np.concatenate([array(first), array(rest)], 1)
        for row, length in enumerate(lengths):
            alone, _ = gpt2(parameters(model), 5, TOKENS[row, :length])
            assert relative_error(plain[row, 11 - length :], alone) < 1e-5
            assert relative_error(cached[row, 11 - length :], alone) < 1e-5
        assert np.isfinite(plain).all() and np.isfinite(cached).all()


@pytest.mark.parametrize("position", [1, 6, 10])
def test_a_later_token_changes_nothing_before_it(forward, full, position):
    changed = TOKENS.copy()
    changed[:, position] = (changed[:, position] + 1) % 101
    logits = array(forward(ops.convert_to_tensor(changed)))
    np.testing.assert_allclose(logits[:, :position], full[:, :position], atol=1e-6)
    assert (np.abs(logits[:, position:] - full[:, position:]).max(-1) > 1e-3).all()


def test_nll_of_large_logits_is_finite():
    logits = np.array([[[1e4, 0, -1e4], [-1e10, 0, -1e10]]], np.float32)
    np.testing.assert_allclose(nll(logits, np.array([[1, 1]], np.int32)), [[1e4, 0]])


# --- dropout ----------------------------------------------------------------------------------------------------------


def outcomes(config, values, places):
    """All logits [V] that one token can give when single entries of the named places are dropped or scaled up."""
    p = {path: value for path, value in values.items()}
    sizes = {"embd": 3, "attn": 1, "resid_attn": 3, "resid_mlp": 3}
    masks = itertools.product((0.0, 1 / (1 - 0.25)), repeat=sum(sizes[place] for place in places))
    for mask in masks:
        mask, chosen = list(mask), {}
        for place in places:
            chosen[place] = np.array([mask.pop() for _ in range(sizes[place])])
        yield sum(np.sum(m == 0) for m in chosen.values()), gpt2(p, config.n_head, [2], **chosen)[0][0]


@pytest.mark.parametrize(
    "rate, places",
    [("embd_pdrop", ("embd",)), ("attn_pdrop", ("attn",)), ("resid_pdrop", ("resid_attn", "resid_mlp"))],
)
def test_dropout_acts_where_it_should(rate, places):
    """Each place alone. One token, width 3: every possible mask is enumerated, and each result must be one of them."""
    config = ModelConfig(n_vocab=7, n_ctx=2, n_embd=3, n_head=1, n_layer=1, **(NO_DROPOUT | {rate: 0.25}))
    model = GPT2(config, init=distinctive, seed=11)
    rows = 400
    training = compiled(model, lambda tokens: model(tokens, training=True))
    logits = array(training(ops.full((rows, 1), 2, "int32")))[:, 0]
    dropped, possible = zip(*outcomes(config, parameters(model), places), strict=True)
    distance = np.abs(logits[:, None] - np.stack(possible)).max(-1)  # [rows, outcomes]
    assert distance.min(1).max() < 1e-5
    assert len(set(distance.argmin(1))) > (1 if rate == "attn_pdrop" else 6)  # not one mask for the whole batch
    size = int(math.log2(len(possible)))
    if rate != "embd_pdrop":  # an embedding of all zeros and others may look alike
        mean = np.array(dropped)[distance.argmin(1)].mean() / size
        assert abs(mean - 0.25) < 5 * math.sqrt(0.25 * 0.75 / rows / size)


def test_dropout_is_for_training_only():
    config = CONFIG.replace(n_layer=1, embd_pdrop=0.1, attn_pdrop=0.2, resid_pdrop=0.3)
    model = GPT2(config, init=distinctive, seed=3)
    expected = [gpt2(parameters(model), 5, row)[0] for row in TOKENS]
    assert relative_error(compiled(model, model)(ops.convert_to_tensor(TOKENS)), expected) < 1e-5
    model = GPT2(config.replace(attn_pdrop=0.0, resid_pdrop=0.0), init=distinctive, seed=3)  # masks are slow to compile
    optimizer = keras.optimizers.SGD(0.0)
    optimizer.build(model.trainable_variables)
    step = make_step(model, optimizer, model.trainable_variables, TrainConfig(corpus="", run_dir=""), places())
    losses = [float(step(TOKENS, i)["loss"]) for i in range(3)]
    assert len(set(losses)) == 3, "every step draws new masks"
    without = np.mean([literal_nll(logits[:-1], row[1:]) for logits, row in zip(expected, TOKENS, strict=True)])
    assert abs(losses[0] - without) > 1e-3


def test_dropout_of_rate_zero_does_nothing(model, full):
    training = compiled(model, lambda tokens: model(tokens, training=True))
    np.testing.assert_allclose(array(training(ops.convert_to_tensor(TOKENS))), full, atol=1e-6)


def test_the_seed_decides_the_masks():
    config = SIZES["test"].replace(n_layer=1, embd_pdrop=0.5)
    one, same, other = (array(GPT2(config, init=distinctive, seed=s)(TOKENS[:, :5], training=True)) for s in (1, 1, 2))
    np.testing.assert_array_equal(one, same)
    assert np.abs(one - other).max() > 0.01
    seeds = [FixedSeed(1, 2), FixedSeed(1, 2), FixedSeed(1, 3), FixedSeed(2, 2), FixedSeed(1, 2).child(1)]
    masks = [array(dropout(ops.ones((4, 50)), 0.5, seed)) for seed in seeds]
    np.testing.assert_array_equal(masks[0], masks[1])
    assert len({mask.tobytes() for mask in masks}) == 4
    assert set(np.unique(masks[0])) == {0.0, 2.0}


# --- bfloat16 ---------------------------------------------------------------------------------------------------------


def test_bfloat16_computes_low_and_keeps_high(model, full):
    low = GPT2(CONFIG, init=distinctive, dtype="mixed_bfloat16")
    assert all(v.dtype == "float32" for v in low.trainable_variables)
    logits = compiled(low, low)(ops.convert_to_tensor(TOKENS))
    assert ops.dtype(logits) == "float32"
    assert ops.dtype(nll(logits, TOKENS)) == "float32"
    error = relative_error(logits, full)
    assert 1e-5 < error < 0.03, "8 bits of mantissa"
    step, past, seen = compiled_step(low), low.empty_cache(2, 12), []
    assert ops.dtype(past[0][0]) == "bfloat16"
    for i in range(11):
        logits, past = step(TOKENS[:, i : i + 1], past, ops.convert_to_tensor(i, "int32"))
        assert ops.dtype(logits) == "float32" and ops.dtype(past[-1][1]) == "bfloat16"
        seen.append(array(logits))
    assert relative_error(np.concatenate(seen, 1), full) < 0.03


def test_a_float32_policy_elsewhere_does_not_leak_in(model):
    assert all(layer.compute_dtype == "float32" for layer in model._flatten_layers())
    assert all(v.dtype == "float32" for v in model.variables if "seed" not in v.path)


# --- initial values ---------------------------------------------------------------------------------------------------

L = 7
STDS = {  # c_attn/w, attn/c_proj/w, c_fc/w, mlp/c_proj/w at width 48
    "gpt2": (0.02, 0.02 / math.sqrt(14), 0.02, 0.02 / math.sqrt(14)),
    "openai": (0.02, 0.02, 0.02, 0.02),
    "2019": (0.02, 0.02 / math.sqrt(7), 0.02, 0.02 / math.sqrt(7)),
    "2019-prettybig": (0.02, 0.02 * 0.1443, 0.02, 0.02 * 0.1443),
    "2019-newinit": (
        0.02 / math.sqrt(48), 0.02 / math.sqrt(48), 0.02 / math.sqrt(48), 0.02 / math.sqrt(7) / math.sqrt(4 * 48),
    ),
}  # fmt: skip


def test_every_initialisation_is_tested():
    assert set(INITS) == set(STDS)


@pytest.mark.parametrize("init", STDS)
def test_initial_values(init):
    config = ModelConfig(n_vocab=211, n_ctx=53, n_embd=48, n_head=3, n_layer=L)
    values = parameters(GPT2(config, init=init, seed=5))
    stds = dict(zip(("attn/c_attn/w", "attn/c_proj/w", "mlp/c_fc/w", "mlp/c_proj/w"), STDS[init], strict=True))
    for path, value in values.items():
        kind = path.rsplit("/", 1)[-1]
        if kind in "bg":
            np.testing.assert_array_equal(value, float(kind == "g"))
            continue
        std = {"wte": 0.02, "wpe": 0.01}.get(kind) or stds[re.sub(r"model/h\d+/", "", path)]
        assert abs(value.std() / std - 1) < 4.5 / math.sqrt(2 * value.size) + 1e-3, path
        assert abs(value.mean()) < 4.5 * std / math.sqrt(value.size), path
    drawn = [value.ravel()[:20] / value.std() for path, value in values.items() if path[-1] not in "bg"]
    assert np.abs(np.corrcoef(drawn) - np.eye(len(drawn))).max() < 0.99, "each matrix has numbers of its own"


def test_initial_values_do_not_depend_on_the_backend():
    """First values and sums as recorded under one backend; the other, and later versions, must give the same."""
    values = parameters(GPT2(SIZES["test"], seed=7))
    for path, (first, total) in RECORDED.items():
        np.testing.assert_array_equal(values[path].ravel()[:2], np.array(first, np.float32), err_msg=path)
        assert abs(values[path].astype(np.float64).sum() - total) < 1e-6, path
    again, other = parameters(GPT2(SIZES["test"], seed=7)), parameters(GPT2(SIZES["test"], seed=8))
    for path in values:
        np.testing.assert_array_equal(values[path], again[path])
        assert path[-1] in "bg" or np.abs(values[path] - other[path]).max() > 1e-3


RECORDED = {
    "model/wpe": ((0.00017370026, -0.006884824), 0.28350790),
    "model/wte": ((0.005754837, -0.020742316), -0.60119368),
    "model/h0/attn/c_attn/w": ((0.032343414, -0.022673933), 0.92791526),
    "model/h0/mlp/c_fc/w": ((0.026929162, 0.034311567), 0.05699495),
    "model/h1/attn/c_proj/w": ((0.008830517, 0.008148316), 0.21411889),
    "model/h1/mlp/c_proj/w": ((0.0014230653, -0.0033553408), 0.00193151),
}


def test_values_of_a_part_do_not_depend_on_the_rest():
    """A model with more layers starts with the same numbers, up to the scale of its depth."""
    shallow, deep = (initial_values(SIZES["test"].replace(n_layer=n), "gpt2", 1) for n in (2, 8))
    for path in ("model/wte", "model/h0/attn/c_attn/w"):
        np.testing.assert_array_equal(shallow(path, (15, 45)), deep(path, (15, 45)))
    for path in ("model/h1/attn/c_proj/w", "model/h1/mlp/c_proj/w"):
        np.testing.assert_allclose(shallow(path, (15, 15)), 2 * deep(path, (15, 15)), rtol=1e-6)


def test_an_unknown_initialisation_names_the_nearest():
    with pytest.raises(ConfigError, match=r"`2019-prettybg`.*`2019-prettybig`"):
        GPT2(SIZES["test"], init="2019-prettybg")


# --- 8 bits -----------------------------------------------------------------------------------------------------------


def rounded(path, shape):
    """The values that `quantized` keeps of `distinctive`, by another way: each column's, or row of wte's, own grid."""
    values = distinctive(path, shape)
    if not path.endswith(("/w", "/wte")):
        return values
    axis = 1 if path.endswith("wte") else 0
    step = np.abs(values).max(axis=axis, keepdims=True) / 127
    return (np.round(values / step) * step).astype(np.float32)


def test_eight_bits_are_near():
    values = distinctive("model/h0/mlp/c_fc/w", (13, 17))
    integers, scale = eight_bits(values)
    assert integers.dtype == np.int8 and (np.abs(integers).max(axis=1) == 127).all()
    assert (np.abs(integers * scale[:, None] - values) <= scale[:, None] * 0.5001).all()
    assert (eight_bits(np.zeros((2, 3)))[0] == 0).all()


def test_a_model_in_eight_bits_is_the_rounded_one(full):
    model = quantized(GPT2(CONFIG, init=distinctive))
    expected = np.asarray(GPT2(CONFIG, init=rounded)(TOKENS))
    assert {v.dtype for v in model.weights if v.path.endswith(("/w", "wte"))} == {"int8"}
    np.testing.assert_allclose(np.asarray(model(TOKENS)), expected, atol=2e-4)
    assert np.abs(expected - np.asarray(full)).max() > 1e-3, "rounding is seen"
    again = quantized(model.__class__(CONFIG, init=rounded))
    np.testing.assert_allclose(np.asarray(again(TOKENS)), expected, atol=2e-4)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_one_row_in_a_loop(dtype):
    """By matrices that XLA takes for changing: the logits of the model outside."""
    model = GPT2(CONFIG, init=distinctive, dtype="float32" if dtype == "int8" else dtype)
    model = quantized(model) if dtype == "int8" else model
    kernels = {} if dtype == "int8" else {v.path: v for v in model.trainable_variables if v.path.endswith("/w")}

    def program(tokens, n):
        def body(i, logits):
            with one_row(i, {path: ops.transpose(v) for path, v in kernels.items()}):
                return i + 1, model(tokens)[:, -1] + 0.0 * logits

        zeros = ops.zeros((1, CONFIG.n_vocab))
        return ops.while_loop(lambda i, _: i < n, body, (ops.convert_to_tensor(0, "int32"), zeros))[1]

    tokens = ops.convert_to_tensor(TOKENS[:1, :1])
    seen = np.asarray(compiled(model, program, xla=True)(tokens, ops.convert_to_tensor(2, "int32")))
    expected = np.asarray(model(tokens))[:, -1]
    np.testing.assert_allclose(seen, expected, atol=0.15 if dtype == "bfloat16" else 1e-4)
