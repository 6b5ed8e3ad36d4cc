"""Adafactor: against trajectories of the 2019 code, a literal NumPy transcription, and Keras' own."""

import json
import math
from types import SimpleNamespace

import keras
import numpy as np
import pytest
from conftest import relative_error
from keras import ops

from gpt2lib.adafactor import Adafactor
from gpt2lib.checkpoint import openai_shapes
from gpt2lib.config import SIZES
from gpt2lib.schedule import WarmupCosine

CASES = ["gpt2_1.5B", "pow", "adam_decay", "momentum", "absolute", "default_rate", "unfactored", "no_clipping"]


@pytest.fixture(scope="module")
def recorded(golden):
    return json.loads((golden / "adafactor" / "golden.json").read_text()), np.load(golden / "adafactor" / "golden.npz")


def variables_of(values: dict) -> list:
    return [keras.Variable(value, name=name) for name, value in values.items()]


def trajectories(optimizer, init: dict, gradients: dict):
    """The parameters after every step, name -> [step, ...], and the rate that each step used."""
    variables = variables_of(init)
    optimizer.build(variables)
    steps, rates = len(next(iter(gradients.values()))), []
    after = {name: [] for name in init}
    for step in range(steps):
        rates.append(float(optimizer.learning_rate))
        optimizer.apply([ops.convert_to_tensor(gradients[name][step]) for name in init], variables)
        for name, variable in zip(init, variables, strict=True):
            after[name].append(np.asarray(variable.value).copy())  # TensorFlow would show it as it changes
    return {name: np.stack(values) for name, values in after.items()}, rates


def part(archive, prefix: str) -> dict:
    return {name.removeprefix(prefix): archive[name] for name in archive.files if name.startswith(prefix)}


def test_every_recorded_case_is_tested(recorded):
    assert list(recorded[0]) == CASES


@pytest.mark.parametrize("case", CASES)
def test_trajectories_are_those_of_2019(recorded, case):
    """To 1e-5 of a variable's largest entry over its whole trajectory: the scalar crosses zero on its way, and close to
    there one step's own largest entry says nothing about float32's rounding of the steps before."""
    options, archive = dict(recorded[0][case]), recorded[1]
    rate, warmup, end = options.pop("lr"), options.pop("warmup_steps", None), options.pop("max_steps", None)
    optimizer = Adafactor(rate if warmup is None else WarmupCosine(rate, warmup, end), **options)
    init = part(archive, "init/")
    after, rates = trajectories(optimizer, init, part(archive, "grad/"))
    expected = part(archive, case + "/")
    assert set(expected) == {*init, "learning_rate"}
    assert relative_error(rates, expected["learning_rate"]) < 1e-6
    for name in init:
        assert after[name].shape == expected[name].shape == (40, *init[name].shape)
        for step in range(40):
            error = np.abs(after[name][step].astype(np.float64) - expected[name][step]).max()
            assert error < 1e-5 * np.abs(expected[name]).max(), f"{name} parts at step {step}"


# --- the literal transcription ----------------------------------------------------------------------------------------


def literal(
    init, gradients, rate, decay_type="pow", decay_exponent=0.8, beta2=0.98, beta1=0.0, epsilon1=1e-30, epsilon2=1e-3,
    clipping_threshold=1.0, multiply_by_parameter_scale=True, factored=True, weight_decay=0.0,
):  # fmt: skip
    """Adafactor of one variable, line by line as in the 2019 `optimizers.py`, float64: [step, ...]."""
    var, m, v, vr, vc, after = np.array(init, np.float64), 0.0, 0.0, 0.0, 0.0, []
    for s, g in enumerate(np.asarray(gradients, np.float64)):
        t = s + 1
        lr = rate(s)
        var = var - weight_decay * lr * var
        decay = 1 - t**-decay_exponent if decay_type == "pow" else beta2 * (1 - beta2 ** (t - 1)) / (1 - beta2**t)
        alpha = lr * max(math.sqrt((var**2).mean()), epsilon2) if multiply_by_parameter_scale else lr
        g2 = g * g + epsilon1
        decay += 1e-30 * g2.mean()
        alpha += 1e-30 * g2.mean()
        if factored and var.ndim >= 2:
            vr = decay * vr + (1 - decay) * g2.mean(-1)
            vc = decay * vc + (1 - decay) * g2.mean(-2)
            x = g * (1 / np.sqrt(vr / vr.mean(-1, keepdims=True)))[..., None] * (1 / np.sqrt(vc))[..., None, :]
        else:
            v = decay * v + (1 - decay) * g2
            x = g / np.sqrt(v)
        if clipping_threshold is not None:
            x = x / max(1.0, math.sqrt((x**2).mean()) / clipping_threshold)
        u = alpha * x
        if beta1:
            m = beta1 * m + (1 - beta1) * u
            u = m
        var = var - u
        after.append(var)
    return np.stack(after)


def made_up(steps=12):
    """Shapes of rank 0 to 3 with gradients over eight decades; some variables start at 0, some gradients are 0."""
    random = np.random.default_rng(3)
    shapes = {"scalar": (), "vector": (13,), "matrix": (3, 11), "column": (7, 1), "stack": (2, 5, 3)}
    init = {name: random.normal(0, 0.5, shape).astype(np.float32) for name, shape in shapes.items()}
    init["zeros"], init["tiny"] = np.zeros((3, 11), np.float32), np.full(13, 1e-5, np.float32)
    scales = 10.0 ** random.uniform(-4, 4, steps)
    gradients = {
        name: np.stack([random.normal(0, scale, value.shape) for scale in scales]).astype(np.float32)
        for name, value in init.items()
    }
    gradients["vector"][4] = 0
    gradients["matrix"][0] = 0
    gradients["stack"][:, 1, 2] = 0  # a row that is never touched, like an unused word
    return init, gradients


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"decay_type": "adam", "beta2": 0.9},
        {"beta1": 0.7},
        {"multiply_by_parameter_scale": False, "beta1": 0.5, "decay_type": "adam"},
        {"factored": False, "decay_exponent": 0.6},
        {"clipping_threshold": 0.3, "epsilon2": 0.05},
        {"clipping_threshold": None, "weight_decay": 0.3},
        {"epsilon1": 1e-2},
    ],
    ids=str,
)
def test_trajectories_are_the_transcriptions(options):
    init, gradients = made_up()
    after, _ = trajectories(Adafactor(WarmupCosine(0.02, 3, 15), **options), init, gradients)

    def rate(s):
        return 0.02 * s / 3 if s < 3 else 0.02 * 0.5 * (1 + math.cos(math.pi * (s - 3) / 12))

    for name in init:
        expected = literal(init[name], gradients[name], rate, **options)
        assert relative_error(after[name], expected) < 1e-5, name


@pytest.mark.parametrize("scaled", [True, False])
def test_default_rate(scaled):
    """The class default: min((step + 1)^-0.5, 1e-2), times 0.05 without parameter scale."""
    optimizer = Adafactor(multiply_by_parameter_scale=scaled)
    optimizer.build(variables_of({"x": np.ones(3, np.float32)}))
    for step in (0, 1, 9_998, 9_999, 10_000, 39_999, 300_000):
        optimizer.iterations.assign(step)
        expected = min((step + 1) ** -0.5, 1e-2) * (1 if scaled else 0.05)
        assert abs(float(optimizer.learning_rate) / expected - 1) < 1e-5


def test_warmup_cosine_is_the_formula():
    schedule = WarmupCosine(2.5e-4, 2000, 500_000)
    assert float(schedule(0)) == 0
    for step in (1, 1000, 1999, 2000, 2001, 251_000, 499_999, 500_000, 500_001, 1_000_000):
        cosine = 0.5 * 2.5e-4 * (1 + math.cos(math.pi * (step - 2000) / 498_000))
        expected = 2.5e-4 * step / 2000 if step < 2000 else cosine if step <= 500_000 else 0.0
        assert abs(float(schedule(step)) - expected) < 1e-6 * 2.5e-4
    assert float(WarmupCosine(1.0, 0, 10)(0)) == 1.0
    with pytest.raises(ValueError, match=r"warmup_steps.*10 of 10"):
        WarmupCosine(1.0, 10, 10)


# --- memory -----------------------------------------------------------------------------------------------------------


def slots_of(optimizer) -> list:
    return [v for v in optimizer.variables if not any(v.path.endswith(end) for end in ("iteration", "learning_rate"))]


def shapes_117m():
    """The variables of 117M by shape alone: nothing is allocated."""
    for i, (name, shape) in enumerate(openai_shapes(SIZES["117M"]).items()):
        shape = shape[1:] if name.endswith("/w") else shape
        yield SimpleNamespace(path=name, name=name, shape=shape, dtype="float32", trainable=True, _id=-i, _unique_id=-i)


def test_slots_of_117m_are_under_one_percent():
    optimizer = Adafactor(2.5e-4)
    variables = list(shapes_117m())
    optimizer.build(variables)
    slots = slots_of(optimizer)
    assert all(slot.dtype == "float32" for slot in slots)
    n_params = sum(math.prod(v.shape) for v in variables)
    assert n_params == 124_439_808
    expected = sum(sum(v.shape) if len(v.shape) == 2 else math.prod(v.shape) for v in variables)
    assert sum(math.prod(slot.shape) for slot in slots) == expected < 0.01 * n_params
    assert len({slot.path for slot in optimizer.variables}) == len(optimizer.variables), "a checkpoint is keyed by path"


def test_shapes_of_slots():
    variables = variables_of({"a": np.zeros((2, 3, 5), np.float32), "b": np.zeros(7, np.float32)})
    for options, expected in (
        ({}, [(2, 3), (2, 5), (7,)]),
        ({"factored": False}, [(2, 3, 5), (7,)]),
        ({"beta1": 0.9}, [(2, 3), (2, 5), (2, 3, 5), (7,), (7,)]),
    ):
        optimizer = Adafactor(**options)
        optimizer.build(variables)
        assert [tuple(slot.shape) for slot in slots_of(optimizer)] == expected


def test_low_precision_parameters_have_float32_slots():
    variable = keras.Variable(np.linspace(-1, 1, 12).reshape(3, 4), dtype="bfloat16", name="x")
    optimizer = Adafactor(0.1, beta1=0.5)
    optimizer.build([variable])
    before = np.asarray(ops.cast(variable, "float32")).copy()
    for _ in range(3):
        optimizer.apply([ops.ones((3, 4), "bfloat16")], [variable])
    assert [slot.dtype for slot in slots_of(optimizer)] == ["float32"] * 3
    assert variable.dtype == "bfloat16"
    gradients = np.ones((3, 3, 4))
    expected = literal(before, gradients, lambda s: 0.1, beta1=0.5)[-1]
    assert relative_error(ops.cast(variable, "float32"), expected) < 3 * 2**-8


# --- as a Keras optimizer ---------------------------------------------------------------------------------------------


def test_compiled_agrees_with_eager():
    init, gradients = made_up(5)
    options = {"learning_rate": WarmupCosine(0.02, 2, 9), "beta1": 0.3, "weight_decay": 0.1}
    expected, _ = trajectories(Adafactor(**options), init, gradients)
    optimizer, variables = Adafactor(**options), variables_of(init)
    optimizer.build(variables)
    if keras.backend.backend() == "jax":
        import jax

        step = jax.jit(optimizer.stateless_apply)
        values, state = [v.value for v in variables], [v.value for v in optimizer.variables]
        for s in range(5):
            values, state = step(state, [gradients[name][s] for name in init], values)
    else:
        import tensorflow as tf

        step = tf.function(lambda *gradients: optimizer.apply(gradients, variables), autograph=False)
        for s in range(5):
            step(*[tf.constant(gradients[name][s]) for name in init])
        values = [v.value for v in variables]
    for name, value in zip(init, values, strict=True):
        np.testing.assert_allclose(np.asarray(value), expected[name][-1], rtol=1e-5, atol=1e-6, err_msg=name)


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # Keras reading its own learning rate
@pytest.mark.parametrize("rate", [None, 0.02, WarmupCosine(0.02, 2, 9)], ids=["default", "constant", "schedule"])
def test_configuration_round_trip(rate):
    options = dict(
        decay_type="adam", decay_exponent=0.7, beta2=0.9, beta1=0.3, epsilon1=1e-20, epsilon2=1e-2,
        clipping_threshold=0.5, multiply_by_parameter_scale=False, factored=False, weight_decay=0.1,
    )  # fmt: skip
    optimizer = Adafactor(rate, **options)
    written = json.dumps(keras.saving.serialize_keras_object(optimizer))
    again = keras.saving.deserialize_keras_object(json.loads(written))
    assert isinstance(again, Adafactor)
    assert {name: again.get_config()[name] for name in options} == options
    init, gradients = made_up(5)
    one, rates = trajectories(optimizer, init, gradients)
    two, same = trajectories(again, init, gradients)
    assert rates == same
    for name in init:
        np.testing.assert_array_equal(one[name], two[name])


def test_an_unknown_decay_type_is_named():
    with pytest.raises(ValueError, match=r"decay_type.*'adamw'"):
        Adafactor(decay_type="adamw")


def test_keras_own_agrees_at_small_rates():
    """A second opinion. Keras caps every rate at 1/sqrt(t), which at these rates never bites."""
    init, gradients = made_up(30)
    ours, _ = trajectories(Adafactor(1e-3), init, gradients)
    theirs, _ = trajectories(keras.optimizers.Adafactor(1e-3), init, gradients)
    for name in init:
        assert relative_error(ours[name], theirs[name]) < 1e-6, name
