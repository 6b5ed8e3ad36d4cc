"""The train step: against plain autodiff, the whole batch and the single device; what it holds, rounds and refuses."""

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import warnings
from pathlib import Path

import keras
import numpy as np
import pytest
from conftest import relative_error
from keras import ops
from ml_dtypes import bfloat16
from test_train import assert_same_run, configuration, state_of, write

from gpt2lib import checkpoint, device, train
from gpt2lib.adafactor import Adafactor, round_stochastically
from gpt2lib.benchmark import peak_memory
from gpt2lib.config import SIZES, ConfigError, TrainConfig
from gpt2lib.model import GPT2, dropout, initial_values, nll
from gpt2lib.seed import FixedSeed
from gpt2lib.step import cross_entropy, loss_of, make_optimizer, make_step, trained_variables

BACKEND = keras.backend.backend()
jax_only = pytest.mark.skipif(BACKEND != "jax", reason="of the JAX step")
tensorflow_only = pytest.mark.skipif(BACKEND != "tensorflow", reason="of the TensorFlow step")

B, T, V = 6, 11, 257
DRY = {"embd_pdrop": 0.0, "attn_pdrop": 0.0, "resid_pdrop": 0.0}  # no dropout
WET = {"embd_pdrop": 0.1, "attn_pdrop": 0.2, "resid_pdrop": 0.3}


@pytest.fixture(scope="module", autouse=True)
def hasty():
    """Have JAX compile with little ado, which takes more time here than to run."""
    with pytest.MonkeyPatch.context() as patch:
        if BACKEND == "jax":
            import jax

            jit, options = jax.jit, {"xla_backend_optimization_level": 0}
            patch.setattr(jax, "jit", lambda function, **more: jit(function, compiler_options=options, **more))
        yield


def build(init="gpt2", **changes):
    """A step on one device. Without momentum AdamW's first slot is the gradient that it was given."""
    defaults = dict(
        size="test", optimizer="adamw", optimizer_options={"beta_1": 0.0}, learning_rate=1e-3, warmup_steps=0,
        schedule="constant", batch_size=B, devices=1,
    )  # fmt: skip
    model = {"n_ctx": T, "n_layer": 1, **DRY, **changes.pop("model", {})}
    config = TrainConfig(corpus="-", run_dir="-", model=model, **(defaults | changes))
    places = device.places(config.devices, config.sharded)
    with places.scope() if BACKEND == "tensorflow" else contextlib.nullcontext():
        model = GPT2(config.model_config(), init=init, seed=config.seed, dtype=config.dtype, remat=config.remat)
        optimizer = make_optimizer(config)
        trained = trained_variables(model, config.freeze)
        optimizer.build(trained)
    return make_step(model, optimizer, trained, config, places)


def some_tokens(rows=B, width=T + 1, seed=0):
    return np.random.default_rng(seed).integers(0, V, (rows, width)).astype(np.int32)


def gradients_in(step) -> dict:
    """The gradients that the optimizer was given last, by the paths of the variables."""
    arrays = step.arrays()
    slots = {path: f"adamw/{path.replace('/', '_')}_momentum" for path in arrays}
    return {path: arrays[slot] for path, slot in slots.items() if slot in arrays}


def differentiated(function, variables):
    """(value, gradients) of function() by the backend's own autodiff, compiled."""
    if BACKEND == "jax":
        import jax

        def stateless(values):
            with keras.StatelessScope(state_mapping=list(zip(variables, values, strict=True))):
                return function()

        value, gradients = jax.jit(jax.value_and_grad(stateless))([v.value for v in variables])
    else:
        import tensorflow as tf

        @tf.function(autograph=False)
        def run():
            with tf.GradientTape() as tape:
                value = function()
            return value, tape.gradient(value, [v.value for v in variables])

        value, gradients = run()
    return np.asarray(value), [np.asarray(ops.convert_to_tensor(g)) for g in gradients]


def assert_close(ours: dict, expected: dict, tolerance):
    """Every array to `tolerance` of its largest entry."""
    assert ours.keys() == expected.keys()
    for name, value in expected.items():
        error = relative_error(ours[name], value) if np.any(value) else float(np.any(ours[name]))
        assert error < tolerance, f"{name} is {error:.2g} off"


def assert_equal(ours: dict, expected: dict):
    assert ours.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_array_equal(ours[name], value, err_msg=name)


@pytest.fixture(scope="module")
def plain():
    """(loss, gradients, gradient norm) of one step of one part, and the step."""
    step = build()
    measures = step(some_tokens(), 0)
    return float(measures["loss"]), gradients_in(step), float(measures["gradient_norm"]), step


# --- gradients --------------------------------------------------------------------------------------------------------


def test_gradients_are_those_of_autodiff(plain):
    """Both are float32: beside float64's, ours are off by up to 6e-7 here and autodiff's by up to 1.4e-6."""
    loss, gradients, norm, step = plain
    model = GPT2(step.model.config, seed=0)
    tokens = some_tokens()
    expected_loss, expected = differentiated(
        lambda: ops.mean(nll(model(tokens[:, :-1], training=True), tokens[:, 1:])), model.trainable_variables
    )
    assert abs(loss - expected_loss) < 1e-6 * expected_loss
    assert_close(gradients, {v.path: g for v, g in zip(model.trainable_variables, expected, strict=True)}, 2e-6)
    assert abs(norm / np.sqrt(sum(np.sum(g.astype(np.float64) ** 2) for g in expected)) - 1) < 1e-6


def test_accumulated_gradients_are_those_of_the_whole_batch(plain):
    """Also where they are nearly clipped."""
    loss, gradients, norm, _ = plain
    step = build(accumulate=2, clip_norm=1.001 * norm)
    measures = step(some_tokens(), 0)
    assert abs(float(measures["loss"]) - loss) < 1e-6 * loss
    assert abs(float(measures["gradient_norm"]) / norm - 1) < 1e-6
    assert_close(gradients_in(step), gradients, 1e-6)


def test_accumulated_gradients_are_clipped_like_those_of_keras(plain):
    """Once, after the three parts are together."""
    loss, gradients, norm, _ = plain
    step = build(accumulate=3, clip_norm=norm / 7)
    measures = step(some_tokens(), 0)
    assert abs(float(measures["loss"]) - loss) < 1e-6 * loss
    assert abs(float(measures["gradient_norm"]) / norm - 1) < 1e-6, "the norm before clipping"
    optimizer = keras.optimizers.AdamW(1e-3, beta_1=0.0, global_clipnorm=norm / 7)
    _, slots = optimized(optimizer, gradients.values(), [gradients.values()], "float32")
    theirs = [value for name, value in slots.items() if name.endswith("_momentum")]
    expected = dict(zip(gradients, theirs, strict=True))
    assert_close(expected, {path: g / 7 for path, g in gradients.items()}, 1e-6)
    assert_close(gradients_in(step), expected, 1e-6)


@tensorflow_only
def test_adamw_in_one_pass_is_that_of_keras():
    """`amsgrad=False` is Keras' default, but leaves the update to Keras."""
    changes = {"weight_decay": 0.1, "clip_norm": 0.5, "warmup_steps": 2}
    options = {"beta_1": 0.8, "beta_2": 0.97, "epsilon": 1e-6}
    ours = build(optimizer_options=options, **changes)
    theirs = build(optimizer_options=options | {"amsgrad": False}, **changes)
    first = ours.arrays()
    for i in range(4):
        sizes = [step(some_tokens(seed=i), i) for step in (ours, theirs)]
    assert abs(sizes[0]["parameter_rms"] / sizes[1]["parameter_rms"] - 1) < 1e-6
    ours, theirs = ours.arrays(), theirs.arrays()
    assert ours["adamw/iteration"] == theirs["adamw/iteration"] == 4
    assert_close({k: v - first[k] for k, v in ours.items()}, {k: v - first[k] for k, v in theirs.items()}, 1e-4)
    assert_close(ours, theirs, 1e-5)


def test_bfloat16_compute_keeps_float32_parameters_and_gradients(plain):
    """Also in parts, to a bfloat16 spacing: each part's gradient is rounded to half of one, and so is the whole's."""
    whole, parts = build(dtype="mixed_bfloat16"), build(dtype="mixed_bfloat16", accumulate=2)
    for step in (whole, parts):
        loss = float(step(some_tokens(), 0)["loss"])
        assert 0 < abs(loss / plain[0] - 1) < 2**-8, "computed in bfloat16"
        assert {a.dtype for a in step.arrays().values() if a.ndim} == {np.dtype(np.float32)}
    assert_close(gradients_in(parts), gradients_in(whole), 2**-7)
    before = whole.arrays()
    losses = [float(whole(some_tokens(seed=2), 1)["loss"])]
    whole.assign(before)
    losses.append(float(whole(some_tokens(seed=2), 1)["loss"]))
    assert losses[0] == losses[1], "computed with the parameters of now"


# --- the loss in chunks -----------------------------------------------------------------------------------------------


def loss_case(dtype="float32"):
    """h [3, 11, 5], wte [23, 5], labels [3, 11]: logits up to some 10, labels of all sizes."""
    random = np.random.default_rng(4)
    h = keras.Variable(2 * random.standard_normal((3, 11, 5)), dtype="float32", name="h")
    wte = keras.Variable(2 * random.standard_normal((23, 5)), dtype=dtype, name="wte")
    labels = random.integers(0, 23, (3, 11)).astype(np.int32)
    labels[0, :2] = 0, 22
    return h, wte, labels


@pytest.fixture(scope="module")
def loss_by_logits():
    """Twice the mean of `nll(logits)`, and its gradients."""
    h, wte, labels = loss_case()
    return differentiated(lambda: 2 * ops.mean(nll(ops.matmul(h, ops.transpose(wte)), labels)), [h, wte])


@pytest.mark.parametrize("chunk", [None, 1, 2, 3, 7, 12, 15, 32, 33, 34, 1000])
def test_cross_entropy_is_that_of_the_logits(loss_by_logits, chunk):
    """Chunks of 1, 2, 4, 5, 10 and 11 positions of 11, some with a rest; twice it, for the gradient that comes in."""
    h, wte, labels = loss_case()
    loss, (dh, dwte) = differentiated(lambda: 2 * cross_entropy(h, wte, labels, chunk=chunk), [h, wte])
    expected, (expected_dh, expected_dwte) = loss_by_logits
    assert loss.dtype == dh.dtype == dwte.dtype == np.float32 and loss.shape == ()
    assert abs(loss - expected) < 1e-6 * expected
    assert_close({"h": dh, "wte": dwte}, {"h": expected_dh, "wte": expected_dwte}, 1e-6)


@pytest.mark.parametrize("chunk", [None, 7])
def test_cross_entropy_in_bfloat16(chunk):
    """Products of bfloat16 numbers, the softmax of float32 ones: that of the same numbers, to bfloat16's rounding.

    The logits are small: TensorFlow rounds them too, or cuts them off where the processor has no bfloat16, which moves
    a logit of 4 by up to 2**-6.
    """
    h, wte, labels = loss_case("bfloat16")
    h.assign(ops.cast(ops.cast(h.value / 16, "bfloat16"), "float32"))
    loss, (dh, dwte) = differentiated(lambda: cross_entropy(h, wte, labels, "bfloat16", chunk), [h, wte])
    whole = keras.Variable(ops.cast(wte.value, "float32"), name="whole")
    expected, (expected_dh, expected_dwte) = differentiated(
        lambda: ops.mean(nll(ops.matmul(h, ops.transpose(whole)), labels)), [h, whole]
    )
    assert abs(loss - expected) < 2**-8 * expected
    assert dh.dtype == np.float32 and dwte.dtype == bfloat16
    assert_close({"h": dh, "wte": dwte}, {"h": expected_dh, "wte": expected_dwte}, 2**-7)


def test_cross_entropy_of_huge_logits_is_finite():
    h, wte, labels = loss_case()
    h.assign(1e3 * h.value)
    for chunk in (None, 3):
        loss, gradients = differentiated(lambda chunk=chunk: cross_entropy(h, wte, labels, chunk=chunk), [h, wte])
        scores = np.asarray(h.value, np.float64) @ np.asarray(wte.value, np.float64).T
        scores -= scores.max(-1, keepdims=True)
        label = np.take_along_axis(scores, labels[..., None], 2)[..., 0]
        expected = np.mean(np.log(np.exp(scores).sum(-1)) - label)
        assert abs(loss / expected - 1) < 1e-6
        assert all(np.isfinite(g).all() for g in gradients)


@pytest.fixture(scope="module")
def chunked(plain):
    """A step that holds the logits of 20 tokens of 66: 3 positions at a time and a rest of 2."""
    step = build(loss_chunk=20)
    return step, float(step(some_tokens(), 0)["loss"]), gradients_in(step)


def test_a_step_in_chunks_is_the_same(plain, chunked):
    step, loss, gradients = chunked
    assert abs(loss - plain[0]) < 1e-6 * plain[0]
    assert_close(gradients, plain[1], 1e-6)
    np.testing.assert_allclose(step.losses(some_tokens()), plain[3].losses(some_tokens()), rtol=1e-5)


def program(step, rows=B):
    """The compiled JAX program of a step."""
    import jax

    tokens = jax.ShapeDtypeStruct((rows, step.model.config.n_ctx + 1), "int32")
    return step.programs.step.lower(step.state, step.frozen, tokens, np.int32(0)).compile()


@jax_only
def test_chunks_never_hold_all_logits(plain, chunked):
    import jax

    whole, part = ("f32[6,11,257]", "f32[66,257]"), "f32[6,3,257]"
    programs = program(plain[3]), program(chunked[0])
    assert any(shape in programs[0].as_text() for shape in whole)
    assert not any(shape in programs[1].as_text() for shape in whole) and part in programs[1].as_text()
    logits = 4 * B * T * V
    sizes = [p.memory_analysis().temp_size_in_bytes for p in programs]
    assert sizes[0] > sizes[1] + logits / 2
    # validation, which is asked for the losses of as many sequences
    windows = jax.ShapeDtypeStruct((B, T + 1), "int32")
    texts = [
        step.programs.losses.lower(step.state["trained"], step.frozen, windows).compile().as_text()
        for step in (plain[3], chunked[0])
    ]
    assert any(shape in texts[0] for shape in whole)
    assert not any(shape in texts[1] for shape in whole)


# --- rematerialisation ------------------------------------------------------------------------------------------------


def block_dropout(remat, n_layer=1):
    """A model with dropout in its blocks, and its loss as a function of nothing."""
    config = TrainConfig("-", "-", size="test", model={"n_layer": n_layer, **DRY, "attn_pdrop": 0.2}).model_config()
    model, tokens = GPT2(config, remat=remat), some_tokens()
    return model, lambda: loss_of(model, tokens, FixedSeed(5, 2), None)


def test_rematerialised_gradients_are_the_same():
    """With dropout, whose masks are made again as well."""
    (loss, gradients), (again_loss, again) = (
        differentiated(function, model.trainable_variables)
        for model, function in (block_dropout(remat) for remat in (False, True))
    )
    assert abs(again_loss - loss) < 1e-6 * loss
    assert_close(dict(enumerate(again)), dict(enumerate(gradients)), 1e-6)


@jax_only
def test_rematerialisation_keeps_the_inputs_of_blocks_only():
    """What is kept for the backward pass grows with each block by no more than its input and its parameters.

    XLA's CPU backend orders a program without regard to memory: there its peak is the same.
    """
    import jax

    def kept(remat, n_layer):
        model, function = block_dropout(remat, n_layer)

        def stateless(values):
            with keras.StatelessScope(state_mapping=list(zip(model.trainable_variables, values, strict=True))):
                return function()

        values = [v.value for v in model.trainable_variables]
        arrays = jax.tree.leaves(jax.eval_shape(lambda x: jax.vjp(stateless, x)[1], values))
        return sum(a.size * a.dtype.itemsize for a in arrays)

    block = 4 * (B * T * 15 + 12 * 15**2 + 13 * 15)
    assert kept(True, 4) - kept(True, 1) <= 3 * block < (kept(False, 4) - kept(False, 1)) / 5


def memory(folder):
    """Largest memory of this process, in bytes, after things that need more and more of it, on TensorFlow."""
    model = {"n_layer": 8, "n_embd": 48, "n_ctx": 96, "n_vocab": 8009}
    tokens = some_tokens(16, 97)

    def peak(after):
        after()
        return peak_memory()

    steps = [
        build(model=model, batch_size=16, **o) for o in (dict(remat=True, loss_chunk=100), dict(loss_chunk=100), {})
    ]
    both, chunk, neither = steps
    return {
        "both": peak(lambda: both(tokens, 0)),
        "validated": peak(lambda: both.losses(tokens)),
        "chunk": peak(lambda: chunk(tokens, 0)),
        "neither": peak(lambda: neither(tokens, 0)),
    }


@tensorflow_only
def test_chunks_and_rematerialisation_take_less_memory(processes):
    """At least half of what each is there to save."""
    peaks = processes["memory"].result()
    logits = 4 * 16 * 96 * 8009
    kept = 7 * 4 * (16 * 96 * 48 * 15 + 2 * 16 * 3 * 96 * 96)  # of 7 layers: 15 rows of D, scores and weights
    assert peaks["validated"] - peaks["both"] < logits / 2
    assert peaks["chunk"] - peaks["both"] > kept / 2
    assert peaks["neither"] - peaks["chunk"] > logits / 2


# --- frozen variables, gradients that are not finite ------------------------------------------------------------------


def broken_at_the_end(path, shape):
    """First values, with an infinite embedding of the last position: only shorter windows are well."""
    value = initial_values(SIZES["test"], "gpt2", 0)(path, shape)
    if path.endswith("wpe"):
        value[T - 1] = np.inf
    return value


@pytest.fixture(scope="module")
def frozen():
    """A step with wpe and the attention frozen after one short batch: (step, arrays before, arrays after)."""
    step = build(init=broken_at_the_end, freeze=["wpe", "h0/attn"])
    before = step.arrays()
    assert int(step(some_tokens(width=T), 0)["failed"]) == -1
    return step, before, step.arrays()


def test_frozen_variables_stay_and_have_no_slots(frozen):
    _, before, after = frozen
    still = {path for path in before if path.startswith("model/") and np.array_equal(before[path], after[path])}
    attention = {f"model/h0/attn/{name}/{kind}" for name in ("c_attn", "c_proj") for kind in "wb"}
    assert still == {"model/wpe"} | attention
    slots = [path for path in after if path.startswith("adamw/")]
    assert not [path for path in slots if "attn" in path or "wpe" in path]
    assert len(slots) == 1 + 2 * (len([p for p in after if p.startswith("model/")]) - len(still))


def test_the_others_have_the_gradients_of_an_unfrozen_model(frozen):
    step, _, _ = frozen
    gradients = gradients_in(step)
    model, tokens = GPT2(step.model.config, init=broken_at_the_end), some_tokens(width=T)
    _, expected = differentiated(lambda: loss_of(model, tokens, FixedSeed(0, 0), None), model.trainable_variables)
    expected = {v.path: g for v, g in zip(model.trainable_variables, expected, strict=True)}
    assert_close(gradients, {path: expected[path] for path in gradients}, 1e-6)


def test_a_gradient_that_is_not_finite_changes_nothing(frozen):
    """And with JAX, whose steps are started before the last one's measures are read, neither do later steps."""
    step, _, before = frozen
    measures = step(some_tokens(), 1)
    assert int(measures["failed"]) == 1 and not np.isfinite(float(measures["gradient_norm"]))
    assert_equal(step.arrays(), before)
    if BACKEND == "jax":
        assert int(step(some_tokens(width=T, seed=1), 2)["failed"]) == 1, "well, but too late"
        assert int(step(some_tokens(), 3)["failed"]) == 1, "the first one"
        assert_equal(step.arrays(), before)
    step.assign(before)
    assert int(step(some_tokens(width=T, seed=1), 1)["failed"]) == -1
    after = step.arrays()
    assert int(after["adamw/iteration"]) == int(before["adamw/iteration"]) + 1 == 2
    assert not np.array_equal(after["model/wte"], before["model/wte"])


def test_arrays_do_not_change_later_and_are_assigned_back(plain):
    step = plain[3]
    first = step.arrays()
    copies = {path: value.copy() for path, value in first.items()}
    step(some_tokens(seed=5), 1)
    second = step.arrays()
    assert_equal(first, copies)
    step.assign(first)
    assert_equal(step.arrays(), copies)
    step(some_tokens(seed=5), 1)
    assert_equal(step.arrays(), second)


@pytest.mark.parametrize(
    "freeze, said",
    [
        (["wtf"], ("`wtf`", "`wte`")), (["h1"], ("`h1`", "h0")), (["wte", "ln_g"], ("`ln_g`", "`ln_f`")),
        (["h0/atn"], ("`h0/atn`",)), ([""], ("freeze",)), (["model"], ("nothing to train",)),
    ],
    ids=str,
)  # fmt: skip
def test_a_name_to_freeze_that_matches_nothing(freeze, said):
    model = GPT2(TrainConfig("-", "-", size="test", model={"n_layer": 1}).model_config(), init=broken_at_the_end)
    with pytest.raises(ConfigError) as error:
        trained_variables(model, freeze)
    assert all(word in str(error.value) for word in said) and "\n" not in str(error.value)


def test_h1_is_not_h10():
    class Named:
        def __init__(self, path):
            self.path = path

    class Model:
        def __init__(self):
            self.blocks = ()
            self.trainable_variables = [Named(f"model/{x}/w") for x in ("h1/mlp", "h10/mlp", "h1/attn", "wte")]

    assert [v.path for v in trained_variables(Model(), ["h1"])] == ["model/h10/mlp/w", "model/wte/w"]
    assert [v.path for v in trained_variables(Model(), ["mlp", "/wte/"])] == ["model/h1/attn/w"]


# --- dropout ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def still():
    """Losses of two parts, of one sequence each, with dropout, of a model that never changes: f(tokens, index)."""
    step = build(learning_rate=0.0, accumulate=2, batch_size=2, model={"resid_pdrop": 0.3})
    return lambda tokens, index: float(step(tokens, index)["loss"])


def test_dropout_is_a_function_of_the_step(still):
    tokens = some_tokens(2)
    losses = [still(tokens, index) for index in (5, 3, 5, 4, 3)]
    assert losses[0] == losses[2] and losses[1] == losses[4]
    assert len(set(losses)) == 3


def test_parts_have_masks_of_their_own(still):
    """Were the masks equal, the two parts could change places. And no part has those of another step."""
    one, other = some_tokens(2)
    assert still(np.stack([one, other]), 3) != still(np.stack([other, one]), 3)
    same = [still(np.stack([one, one]), index) for index in range(6)]
    assert len(set(same)) == 6


def masks(seed, step, monkeypatch):
    """The masks of all dropouts of a model with three blocks, each of as many ones as its own x has entries."""
    found = []

    def drop(x, rate, seed):
        mask = np.asarray(dropout(ops.ones((400,)), 0.5, seed))
        found.append((rate, np.asarray(seed.next()).tolist(), mask))
        return dropout(x, rate, seed)

    with monkeypatch.context() as patch:
        patch.setattr("gpt2lib.model.dropout", drop)
        config = TrainConfig("-", "-", size="test", model={"n_layer": 3, **WET}).model_config()
        GPT2(config, init=lambda path, shape: np.ones(shape, np.float32)).hidden(
            np.zeros((1, 5), np.int32), training=True, seed=FixedSeed(seed, step)
        )
    return found


def test_every_dropout_has_a_mask_of_its_own(monkeypatch):
    """Embeddings, then weights, attention and MLP of each layer; over two seeds and two steps none is there twice."""
    found = {(seed, step): masks(seed, step, monkeypatch) for seed in (0, 7) for step in (0, 1)}
    assert [rate for rate, _, _ in found[0, 0]] == [0.1] + 3 * [0.2, 0.3, 0.3]
    every = [tuple(mask) for case in found.values() for _, _, mask in case]
    assert len(set(every)) == len(every) == 4 * 10
    assert len({tuple(pair) for case in found.values() for _, pair, _ in case}) == 40
    again = masks(7, 1, monkeypatch)
    assert [tuple(mask) for _, _, mask in again] == [tuple(mask) for _, _, mask in found[7, 1]]


# --- rounding ---------------------------------------------------------------------------------------------------------


def rounded(x, *seed):
    result = round_stochastically(ops.convert_to_tensor(x, "float32"), FixedSeed(*seed))
    assert keras.backend.standardize_dtype(result.dtype) == "bfloat16" and result.shape == np.shape(x)
    return as_float32(result)


def as_float32(x):
    """A copy; TensorFlow's bfloat16 is not NumPy's."""
    return np.asarray(ops.cast(ops.convert_to_tensor(x), "float32")).copy()


def neighbours(x):
    """The two bfloat16 numbers around each x, as float32; both are x where it is one."""
    near = x.astype(bfloat16)
    exact = near.astype(np.float32)
    below = np.where(exact > x, np.nextafter(near, bfloat16(-np.inf)), near).astype(np.float32)
    above = np.where(exact < x, np.nextafter(near, bfloat16(np.inf)), near).astype(np.float32)
    return below, above


def test_every_bfloat16_number_stays():
    """All 65536 bit patterns: both zeros, denormal numbers, infinities; those that are not numbers stay such."""
    x = (np.arange(2**16, dtype=np.uint32) << 16).view(np.float32)
    for seed in range(3):
        result = rounded(x, seed, 1)
        np.testing.assert_array_equal(result.view(np.uint32)[~np.isnan(x)], x.view(np.uint32)[~np.isnan(x)])
        assert np.isnan(result[np.isnan(x)]).all()


def test_what_is_not_a_number_stays_so():
    """Whatever its lower bits: 0x7fffffff is what a GPU computes."""
    bits = np.array([0x7FFFFFFF, 0xFFFFFFFF, 0x7FC00000, 0xFFC00000, 0x7F800001, 0xFF80FFFF, 0x7FFFFFFF], np.uint32)
    for seed in range(3):
        assert np.isnan(rounded(bits.view(np.float32), seed, 0)).all()


def test_rounding_goes_to_a_neighbour():
    """Of random bit patterns, that is of numbers of all sizes, huge and denormal ones, of both signs."""
    bits = np.random.default_rng(2).integers(0, 2**32, 200_000, dtype=np.uint64).astype(np.uint32)
    denormal = np.concatenate([np.arange(1, 2000), np.arange(2**31 + 1, 2**31 + 2000), np.arange(2**23 - 99, 2**23)])
    x = np.concatenate([bits, denormal.astype(np.uint32)]).view(np.float32)
    x = x[np.isfinite(x)]
    result = rounded(x, 3, 4)
    below, above = neighbours(x)
    inside = (x > 0) & (below == 0) | (x < 0) & (above == 0) | (result != 0)
    assert inside.all(), "a number that is not tiny never becomes 0"
    assert ((result == below) | (result == above)).all()
    assert (np.signbit(result) == np.signbit(x)).all()
    up = (result == above)[above > below]
    assert abs(up.mean() - 0.5) < 4 * 0.5 / np.sqrt(len(up))


def test_rounding_is_unbiased():
    """The share of 20000 roundings that went up, within five standard errors of what makes the mean the number."""
    random = np.random.default_rng(3)
    x = random.standard_normal(41) * 10.0 ** random.integers(-30, 30, 41)
    x = np.concatenate([x, [1 + 2.0**-16, 1 + 2.0**-8, 1 - 2.0**-17, -1 - 2.0**-15, 3e38, -1e-39, 2.5e-39]])
    x = x.astype(np.float32)
    below, above = neighbours(x)
    share = (x.astype(np.float64) - below) / (above.astype(np.float64) - below)
    assert share.min() < 0.01 and share.max() > 0.99 and (share > 0).all() and (share < 1).all()
    result = rounded(np.broadcast_to(x, (20_000, len(x))), 5, 6)
    errors = (np.mean(result == above, axis=0) - share) / np.sqrt(share * (1 - share) / 20_000)
    assert np.abs(errors).max() < 5
    assert 0.5 < np.mean(errors**2) < 1.7, "and as random as independent ones"


def test_rounding_is_a_function_of_its_seed():
    x = np.full(500, 1 + 2.0**-8, np.float32)
    results = {pair: tuple(rounded(x, *pair)) for pair in [(0, 0), (0, 1), (1, 0), (1, 1)]}
    assert len(set(results.values())) == 4
    assert tuple(rounded(x, 0, 1)) == results[0, 1]


def optimized(optimizer, values, gradients, dtype="bfloat16"):
    """Variables [step][variable] as float32 and all slots by name, after steps with the same compiled update."""
    variables = [keras.Variable(value, dtype=dtype, name=f"x{i}") for i, value in enumerate(values)]
    optimizer.build(variables)
    state, slots, after = [v.value for v in variables], [v.value for v in optimizer.variables], []
    if BACKEND == "jax":
        import jax

        update = jax.jit(optimizer.stateless_apply)
    else:
        import tensorflow as tf

        update = tf.function(lambda *g: optimizer.apply(list(g), variables), autograph=False)
    for part in gradients:
        part = [ops.cast(ops.convert_to_tensor(g), dtype) for g in part]
        if BACKEND == "jax":
            state, slots = update(slots, part, state)
        else:
            update(*part)
            state, slots = [v.value for v in variables], [v.value for v in optimizer.variables]
        after.append([as_float32(x) for x in state])
    names = [v.path.removeprefix("adafactor/") for v in optimizer.variables]
    return after, {name: as_float32(x) for name, x in zip(names, slots, strict=True)}


def test_small_updates_are_not_lost():
    """Ones, whose neighbour below is 1/256 away, taught to shrink by 1e-4 of themselves a step, 50 steps."""
    ones, steps = np.ones((31, 43), np.float32), 50
    gradients = steps * [[ones, ones]]
    expected = (1 - 1e-4) ** steps
    after = {
        how: optimized(Adafactor(1e-4, rounding=how), [ones, ones], gradients)
        for how in ("nearest", "stochastic", "master")
    }
    assert all((x == 1).all() for x in after["nearest"][0][-1])
    moved, slots = after["stochastic"]
    for x in moved[-1]:
        assert abs(x.mean() - expected) < 4 * x.std() / np.sqrt(x.size), "within its error"
        assert x.mean() < 1 - 20 * x.std() / np.sqrt(x.size), "and far from where it began"
    assert not any("master" in name for name in slots)
    moved, slots = after["master"]
    for x, name in zip(moved[-1], ("x0_master", "x1_master"), strict=True):
        np.testing.assert_allclose(slots[name], expected, rtol=1e-6)
        np.testing.assert_array_equal(x, slots[name].astype(bfloat16).astype(np.float32))


def test_variables_and_steps_are_rounded_by_noise_of_their_own():
    ones = np.ones((31, 43), np.float32)
    cases = [optimized(Adafactor(1e-3, seed=seed), [ones, ones], 2 * [[ones, ones]])[0] for seed in (0, 0, 1)]
    (first, second), (again, _), (other, _) = cases
    down = [x < 1 for x in (first[0], first[1], other[0], other[1])]
    down.append((second[0] < first[0]) & ~down[0])  # those that moved in the second step
    for i, one in enumerate(down):
        assert 0.1 < one.mean() < 0.4
        for two in down[:i]:
            assert (one != two).mean() > 0.1
    independent = down[0] & down[1]
    assert abs(independent.mean() - down[0].mean() * down[1].mean()) < 4 * np.sqrt(0.06 / ones.size)
    np.testing.assert_array_equal(first, again)


def test_a_master_follows_the_float32_run():
    """The same gradients for 20 steps: the master is the float32 variable, and the variable is its nearest."""
    random = np.random.default_rng(8)
    values = [random.standard_normal(shape).astype(bfloat16).astype(np.float32) for shape in ((7, 5), (13,))]
    gradients = [[random.standard_normal(x.shape).astype(bfloat16) for x in values] for _ in range(20)]
    gradients = [[g.astype(np.float32) for g in part] for part in gradients]
    options = dict(beta1=0.9, weight_decay=0.1)
    exact, _ = optimized(Adafactor(1e-2, **options), values, gradients, "float32")
    ours, slots = optimized(Adafactor(1e-2, rounding="master", **options), values, gradients)
    for i, x in enumerate(exact[-1]):
        assert relative_error(slots[f"x{i}_master"], x) < 1e-6
        np.testing.assert_array_equal(ours[-1][i], slots[f"x{i}_master"].astype(bfloat16).astype(np.float32))
        assert (np.abs(ours[-1][i] - x) <= np.abs(x) * 2**-8).all()


# --- whole runs -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write(tmp_path_factory.mktemp("step") / "corpus")


def one_step(config):
    """Train one more step of a run and stop, saved."""
    with pytest.raises(train.Stopped):
        train.train(config.replace(max_minutes=1e-9))


@pytest.fixture(scope="module", params=["stochastic", "master"])
def low(request, corpus, tmp_path_factory) -> TrainConfig:
    """A finished run with bfloat16 parameters."""
    config = configuration(
        corpus, tmp_path_factory.mktemp("low") / "run", model=DRY, dtype="bfloat16", max_steps=2, warmup_steps=0,
        schedule="constant", validate_every=9, optimizer_options={"rounding": request.param, "seed": 3},
    )  # fmt: skip
    train.train(config)
    return config


def test_bfloat16_parameters_go_on_bit_for_bit(low, tmp_path):
    parts = low.replace(run_dir=str(tmp_path / "parts"))
    one_step(parts)
    train.train(parts)
    assert_same_run(low.run_dir, parts.run_dir)


def test_a_checkpoint_of_bfloat16_parameters(low):
    """Norms are float32, as are all slots; a master's parameter is it rounded."""
    arrays = state_of(low.run_dir)
    parameters = {path: a for path, a in arrays.items() if path.startswith("model/")}
    norms = {path for path in parameters if "/ln_" in path}
    assert {path for path, a in parameters.items() if a.dtype == bfloat16} == parameters.keys() - norms
    assert all(parameters[path].dtype == np.float32 for path in norms)
    slots = {path: a for path, a in arrays.items() if path.startswith("adafactor/") and a.ndim}
    assert {a.dtype for a in slots.values()} == {np.dtype(np.float32)}
    masters = {f"adafactor/{path.replace('/', '_')}_master": path for path in parameters.keys() - norms}
    if low.optimizer_options["rounding"] == "master":
        assert masters.keys() == {path for path in slots if path.endswith("_master")}
        for master, path in masters.items():
            np.testing.assert_array_equal(arrays[master].astype(bfloat16), arrays[path])
    else:
        assert not masters.keys() & slots.keys()
    model, info = checkpoint.load(low.run_dir)
    assert info["dtype"] == "bfloat16"
    for v in model.trainable_variables:
        assert keras.backend.standardize_dtype(v.dtype) == str(parameters[v.path].dtype)
        np.testing.assert_array_equal(as_float32(v.value), parameters[v.path].astype(np.float32))


@pytest.mark.parametrize("low", ["stochastic"], indirect=True)
def test_variables_frozen_later_keep_what_they_had_learnt(low, tmp_path):
    config = low.replace(run_dir=str(shutil.copytree(low.run_dir, tmp_path / "run")))
    train.train(config.replace(max_steps=3, freeze=["wte", "h0/mlp"], allow_changes=["freeze", "max_steps"]))
    before, after = state_of(low.run_dir), state_of(config.run_dir)
    assert int(after["step"]) == 3
    for path in (p for p in after if p.startswith("model/")):
        same = np.array_equal(before[path], after[path])
        assert same == ("wte" in path or "mlp" in path), path


# --- several devices --------------------------------------------------------------------------------------------------

# The bias of the keys has no gradient but rounding, which either optimizer would make a whole step of: its small number
# in the denominator is large here.
RUNS = {
    "adamw": dict(optimizer="adamw", learning_rate=3e-3, optimizer_options={"epsilon": 1e-3}),
    "adafactor": dict(
        accumulate=2, clip_norm=0.5, loss_chunk=40, freeze=["wpe"],
        optimizer_options={"epsilon1": 2.0**-20, "beta1": 0.5},
    ),
}  # fmt: skip


def several(folder, name, **changes) -> TrainConfig:
    """A run whose matrices eight devices can share; with dropout where masks do not depend on the devices."""
    model = {"n_embd": 24, "n_head": 4, **DRY, "attn_pdrop": 0.2 if BACKEND == "jax" else 0.0}
    options = dict(batch_size=16, warmup_steps=1, **RUNS[name]) | changes
    run_dir = Path(folder) / options.pop("run_dir", name)
    return configuration(Path(folder) / "corpus", run_dir, model=model, **options)


def attempt(config, made):
    """Train, and say where the state was: {error} or {devices: {device: [bytes of matrices, of the rest]}, whole}."""
    made.clear()
    try:
        train.train(config)
        error = None
    except (ConfigError, train.Stopped) as refused:
        error = str(refused)
    if not made or BACKEND != "jax":
        return {"error": error}
    (step,) = made
    state = [*step.state["trained"], *step.state["slots"], *step.frozen]
    devices, whole = {}, [0, 0]
    for x in state:
        whole[x.ndim < 2] += x.nbytes
        for shard in x.addressable_shards:
            devices.setdefault(str(shard.device), [0, 0])[x.ndim < 2] += shard.data.nbytes
    return {"error": error, "devices": devices, "whole": whole}


@contextlib.contextmanager
def noted_steps():
    """The steps that `train` makes."""
    made, make = [], train.make_step
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "make_step", lambda *args: made.append(make(*args)) or made[-1])
        yield made


def eight(folder):
    """Runs on eight virtual devices, and on the first one or two of them."""
    result = {}
    with noted_steps() as made:

        def run(key, name, **changes):
            result[key] = attempt(several(folder, name, **{"run_dir": key, **changes}), made)

        for name in RUNS:
            run(f"{name} on 1", name, devices=1)
        run("adamw on 8", "adamw")
        run("adafactor on 8", "adafactor", sharded=True, remat=True)
        run("passed on", "adamw", max_minutes=1e-9)
        run("passed on", "adamw", max_minutes=1e-9, devices=1)
        run("passed on", "adamw", max_minutes=1e-9, sharded=True)
        result["sharded"] = result["passed on"]
        shutil.copytree(Path(folder) / "passed on", Path(folder) / "handed over")
        run("passed on", "adamw", devices=2)
        run("uneven", "adamw", batch_size=12)
        run("uneven parts", "adamw", batch_size=24, accumulate=2)
        run("nine", "adamw", devices=9)
    return result


def mirrored(folder):
    """Runs on two logical devices of TensorFlow, and on one of them."""
    import tensorflow as tf

    (cpu,) = tf.config.list_physical_devices("CPU")
    tf.config.set_logical_device_configuration(cpu, 2 * [tf.config.LogicalDeviceConfiguration()])
    result = {}
    with noted_steps() as made:

        def run(key, name, **changes):
            result[key] = attempt(several(folder, name, **{"run_dir": key, **changes}), made)
            if made and made[0].strategy.num_replicas_in_sync == 2:
                for v in (*made[0].model.trainable_variables, *made[0].optimizer.variables):
                    one, other = (as_float32(x) for x in v.value.values)
                    np.testing.assert_array_equal(one, other, err_msg=f"{v.path} of {key}")

        for name in RUNS:
            run(f"{name} on 1", name, devices=1)
            run(f"{name} on 2", name, remat=name == "adafactor")
        run("passed on", "adamw", max_minutes=1e-9)
        run("passed on", "adamw", max_minutes=1e-9, devices=1)
        run("passed on", "adamw")
        run("bfloat16", "adafactor", dtype="bfloat16", max_steps=2, optimizer_options={})
        run("uneven", "adamw", batch_size=15)
        run("uneven parts", "adamw", batch_size=18, accumulate=6)
        run("three", "adamw", devices=3)
        run("sharded", "adamw", sharded=True)
    step = build(learning_rate=0.0, batch_size=2, model=WET, devices=2)
    one, other = some_tokens(2)
    result["replicas"] = [float(step(np.stack(rows), 3)["loss"]) for rows in ([one, other], [other, one], [one, other])]
    return result


class Process:
    """A command, whose output goes to a file."""

    def __init__(self, arguments, log, **environment):
        self.log, self.file = log, log.open("wb")
        before = os.environ | {"JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": "", "KERAS_BACKEND": BACKEND}
        command = [sys.executable, *map(str, arguments)]
        self.popen = subprocess.Popen(command, stdout=self.file, stderr=self.file, env=before | environment)

    def wait(self) -> int:
        return self.popen.wait(timeout=600)

    def result(self):
        """What a function of this file returned in its own process."""
        assert self.wait() == 0, self.log.read_text()[-3000:]
        return json.loads(self.log.with_suffix(".json").read_text())

    def stop(self):
        if self.popen.poll() is None:
            self.popen.kill()
            self.popen.wait()
        self.file.close()


def start(name, folder, **environment):
    """Call the function of this file with that name in another process."""
    return Process([__file__, name, folder], folder / f"{name}.log", **environment)


def virtual(n):
    """XLA_FLAGS for so many devices, and for what `hasty` does."""
    return f"--xla_force_host_platform_device_count={n} --xla_backend_optimization_level=0"


def start_hosts(config, log):
    """The command line on two hosts with four devices each."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    path = log.with_suffix(".config.json")
    path.write_text(json.dumps(config.to_dict()))
    return [
        Process(
            ["-m", "gpt2lib.train", path, "--distributed"], log.with_suffix(f".{host}.log"),
            XLA_FLAGS=virtual(4), KERAS_DISTRIBUTION_JOB_ADDRESSES=address,
            KERAS_DISTRIBUTION_NUM_PROCESSES="2", KERAS_DISTRIBUTION_PROCESS_ID=str(host),
        )
        for host in range(2)
    ]  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("several")
    write(folder / "corpus")
    return folder


@pytest.fixture(scope="module", autouse=True)
def processes(request, folder):
    """Other processes, which start with the first test of this file if any test needs them."""
    started = {}
    if any("processes" in item.function.__code__.co_varnames for item in request.session.items):
        if BACKEND == "jax":
            started["eight"] = start("eight", folder, XLA_FLAGS=virtual(8))
            hosts = start_hosts(several(folder, "adafactor", run_dir="adafactor on 2x4", sharded=True), folder / "2x4")
            started |= {f"host {i}": process for i, process in enumerate(hosts)}
        else:
            started["mirrored"] = start("mirrored", folder)
            started["memory"] = start("memory", folder, MALLOC_MMAP_THRESHOLD_="65536")
    yield started
    for process in started.values():
        process.stop()


def assert_same_within(folder, one, other, tolerance=1e-5):
    """All measures of two runs, relative to their size, and all arrays to their largest entry; the rates are equal."""
    a, b = (train.read_metrics(folder / run / "metrics.jsonl") for run in (one, other))
    timed = {"tokens_per_second", "seconds"}
    assert [line.keys() for line in a] == [line.keys() for line in b]
    assert len([line for line in a if "loss" in line]) == 6 and len([x for x in a if "validation_loss" in x]) == 3
    for x, y in zip(a, b, strict=True):
        for key in x.keys() - timed:
            assert abs(x[key] - y[key]) <= tolerance * abs(y[key]), f"{key} of step {x['step']}: {x[key]}, {y[key]}"
        assert x.get("learning_rate") == y.get("learning_rate")
    assert_close(state_of(folder / one), state_of(folder / other), tolerance)


@jax_only
@pytest.mark.parametrize("run", ["adamw on 8", "adafactor on 8"])
def test_eight_devices_are_one(folder, processes, run):
    """Adafactor's state is sharded, in two parts of the batch, with blocks computed again and something frozen."""
    found = processes["eight"].result()[run]
    assert found["error"] is None and len(found["devices"]) == 8
    assert_same_within(folder, run, run.replace("8", "1"))


@jax_only
def test_a_run_is_passed_on_between_devices(folder, processes):
    """A step on eight, one on one, one on eight with a sharded state, three on two."""
    found = processes["eight"].result()["passed on"]
    assert found["error"] is None and len(found["devices"]) == 2
    assert_same_within(folder, "passed on", "adamw on 1")


@jax_only
def test_a_device_holds_its_part_of_a_sharded_state(processes):
    """Of matrices an eighth; all of the rest, which is small. Parameters, slots, and what is frozen."""
    found = processes["eight"].result()
    for run in ("sharded", "adafactor on 8"):
        matrices, rest = found[run]["whole"]
        assert len(found[run]["devices"]) == 8
        assert all(part == [matrices / 8, rest] for part in found[run]["devices"].values())
        assert matrices > 3 * rest
    for run in ("adamw on 8", "adamw on 1"):
        assert all(part == found[run]["whole"] for part in found[run]["devices"].values())
    assert len(found["adamw on 1"]["devices"]) == 1


@jax_only
def test_two_hosts_with_four_devices_are_one(folder, processes):
    processes["eight"].result()
    for host in range(2):
        assert processes[f"host {host}"].wait() == 0, processes[f"host {host}"].log.read_text()[-3000:]
    assert_same_within(folder, "adafactor on 2x4", "adafactor on 1")


@jax_only
def test_two_hosts_go_on_with_a_run_of_one(folder, processes):
    """Which eight devices had a sharded state of; three steps are left."""
    processes["eight"].result()
    hosts = start_hosts(several(folder, "adamw", run_dir="handed over"), folder / "handed")
    try:
        for host in hosts:
            assert host.wait() == 0, host.log.read_text()[-3000:]
    finally:
        for host in hosts:
            host.stop()
    assert_same_within(folder, "handed over", "adamw on 1")


@tensorflow_only
@pytest.mark.parametrize("run", ["adamw on 2", "adafactor on 2", "passed on"])
def test_two_devices_are_one(folder, processes, run):
    """Adafactor in two parts of the batch, with blocks computed again; the last from two to one and to two again."""
    assert processes["mirrored"].result()[run]["error"] is None
    assert_same_within(folder, run, "adamw on 1" if run == "passed on" else run.replace("2", "1"))


@tensorflow_only
def test_replicas_have_masks_of_their_own(processes):
    """Were the masks equal, the two sequences could change places."""
    ours, swapped, again = processes["mirrored"].result()["replicas"]
    assert ours == again and ours != swapped


@tensorflow_only
def test_replicas_round_alike(processes):
    """`mirrored` compares the copies of every variable."""
    assert processes["mirrored"].result()["bfloat16"]["error"] is None


def test_what_devices_cannot_do_is_one_sentence(folder, processes):
    found = processes["eight" if BACKEND == "jax" else "mirrored"].result()
    if BACKEND == "jax":
        said = {"uneven": (12, 8), "uneven parts": (24, 2, 12, 8, 16), "nine": ("devices", 9, 8)}
    else:
        said = {
            "uneven": (15, 2), "uneven parts": (18, 6, 3, 2), "three": ("devices", 3, 2),
            "sharded": ("sharded", "KERAS_BACKEND=jax"),
        }  # fmt: skip
    for run, words in said.items():
        error = found[run]["error"]
        assert error and "\n" not in error
        assert not (folder / run).exists(), "nothing was begun"
        assert all(str(word) in error for word in words), error


if __name__ == "__main__":
    warnings.simplefilter("error")
    _, name, folder = sys.argv
    answer = globals()[name](Path(folder))
    (Path(folder) / f"{name}.json").write_text(json.dumps(answer))
