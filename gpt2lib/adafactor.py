"""Adafactor (Shazeer & Stern 2018, arXiv:1804.04235), as the 2019 replication used it, for Keras 3 on any backend.

The second moment of a matrix [.., R, C] is kept as its row and column means, R + C numbers instead of R * C: well under
1% of a GPT-2's parameters. Keras' own Adafactor allocates a full-size slot for every variable besides.
"""

import keras
from keras import ops

from gpt2lib.seed import FixedSeed


def decay_rate(step, decay_type="pow", decay_exponent=0.8, beta2=0.98):
    """Decay of the second moments at `step` t, from 1: section 7.1's 1 - t^-c, or Adam's with its bias correction."""
    if decay_type == "pow":
        return 1 - ops.power(step, -decay_exponent)
    return beta2 * (1 - ops.power(beta2, step - 1)) / (1 - ops.power(beta2, step))


def rms(x):
    """Root mean square of all entries of x: a scalar."""
    return ops.sqrt(ops.mean(ops.square(x)))


def round_stochastically(x, seed):
    """float32 to bfloat16, up or down with the probabilities that make the mean x: no small update is always lost.

    Random low bits are added to a number's 32, then the lower 16 are cut off (Gupta et al. 2015, arXiv:1502.02551).
    """
    noise = keras.random.randint(ops.shape(x), 0, 2**16, dtype="int32", seed=seed)
    bits = ops.bitwise_and(ops.view(x, "int32") + noise, -(2**16))
    rounded = ops.where(ops.isnan(x), x, ops.view(bits, "float32"))  # the noise could make a number of what is none
    return ops.cast(rounded, "bfloat16")


@keras.saving.register_keras_serializable("gpt2lib")
class DefaultRate(keras.optimizers.schedules.LearningRateSchedule):
    """The paper's relative step size min(t^-0.5, 1e-2), t from 1, times `scale`."""

    def __init__(self, scale=1.0):
        self.scale = scale

    def __call__(self, step):
        return self.scale * ops.minimum(ops.rsqrt(ops.cast(step, "float32") + 1), 1e-2)

    def get_config(self):
        return {"scale": self.scale}


@keras.saving.register_keras_serializable("gpt2lib")
class Adafactor(keras.optimizers.Optimizer):
    """Adafactor: algorithm 4 of arXiv:1804.04235, with relative steps, optional momentum, decoupled weight decay.

    Args:
        learning_rate: float or schedule of the step from 0. With `multiply_by_parameter_scale` it is relative: the step
            is this times max(RMS(parameter), epsilon2), section 8. Without, it is absolute. None: `DefaultRate`, times
            0.05 without parameter scale.
        decay_type: "pow" (1 - t^-decay_exponent) or "adam" (beta2, bias-corrected).
        decay_exponent, beta2: of those two.
        beta1: momentum on the update, without bias correction; 0 keeps no momentum.
        epsilon1: added to squared gradients. epsilon2: least parameter scale.
        clipping_threshold: an update's RMS is clipped to it, section 6; None: no clipping.
        multiply_by_parameter_scale: see learning_rate.
        factored: keep row and column means over the last two axes of every variable of rank 2 or more.
        weight_decay: each step first shrinks every variable by weight_decay * learning rate.
        rounding: of bfloat16 variables. "stochastic": `round_stochastically`; "master": a float32 copy is kept and
            updated, the variable is it rounded; "nearest": updates below a 256th of a parameter are lost.
        seed: of stochastic rounding.

    Slots are float32: `v_row` and `v_col`, or `v`; `m` with momentum; `master` where one is kept.
    """

    def __init__(
        self,
        learning_rate=None,
        decay_type="pow",
        decay_exponent=0.8,
        beta2=0.98,
        beta1=0.0,
        epsilon1=1e-30,
        epsilon2=1e-3,
        clipping_threshold=1.0,
        multiply_by_parameter_scale=True,
        factored=True,
        weight_decay=None,
        rounding="stochastic",
        seed=0,
        name="adafactor",
        **kwargs,
    ):
        if rounding not in ("stochastic", "master", "nearest"):
            raise ValueError(f"rounding must be 'stochastic', 'master' or 'nearest', got {rounding!r}")
        if decay_type not in ("pow", "adam"):
            raise ValueError(f"decay_type must be 'pow' or 'adam', got {decay_type!r}")
        if learning_rate is None:
            learning_rate = DefaultRate(1.0 if multiply_by_parameter_scale else 0.05)
        super().__init__(learning_rate=learning_rate, weight_decay=weight_decay, name=name, **kwargs)
        self.decay_type, self.decay_exponent, self.beta2, self.beta1 = decay_type, decay_exponent, beta2, beta1
        self.epsilon1, self.epsilon2, self.clipping_threshold = epsilon1, epsilon2, clipping_threshold
        self.multiply_by_parameter_scale, self.factored = multiply_by_parameter_scale, factored
        self.rounding, self.seed = rounding, seed

    def build(self, variables):
        if self.built:
            return
        super().build(variables)
        self._slots = [self._make_slots(variable) for variable in variables]

    def _make_slots(self, variable):
        shape = tuple(variable.shape)

        def slot(name, shape, initializer="zeros"):
            name = f"{variable.path.replace('/', '_')}_{name}"
            return self.add_variable(shape, initializer=initializer, dtype="float32", name=name)

        if self.factored and len(shape) >= 2:
            slots = {"v_row": slot("v_row", shape[:-1]), "v_col": slot("v_col", shape[:-2] + shape[-1:])}
        else:
            slots = {"v": slot("v", shape)}
        if self.beta1:
            slots["m"] = slot("m", shape)
        if self.rounding == "master" and variable.dtype != "float32":
            slots["master"] = slot("master", shape, lambda shape, dtype: ops.cast(variable.value, dtype))
        return slots

    def _apply_weight_decay(self, variables):
        """`update_step` does it, in float32 also for bfloat16 variables."""

    def update_step(self, gradient, variable, learning_rate):
        index = self._get_variable_index(variable)
        slots = self._slots[index]
        t = ops.cast(self.iterations, "float32") + 1
        decay = decay_rate(t, self.decay_type, self.decay_exponent, self.beta2)
        g = ops.cast(gradient, "float32")
        alpha = ops.cast(learning_rate, "float32")
        x = ops.cast(ops.convert_to_tensor(slots.get("master", variable)), "float32")
        if self.weight_decay is not None and self._use_weight_decay(variable):
            x = x - x * self.weight_decay * alpha
        if self.multiply_by_parameter_scale:
            alpha = alpha * ops.maximum(rms(x), self.epsilon2)
        g2 = ops.square(g) + self.epsilon1
        alpha = alpha + 1e-30 * ops.mean(
            g2
        )  # in 2019 against XLA's fusing; it moves parameters that are exactly 0 at rate 0
        if "v_row" in slots:
            v_row = decay * slots["v_row"] + (1 - decay) * ops.mean(g2, axis=-1)  # [.., R]
            v_col = decay * slots["v_col"] + (1 - decay) * ops.mean(g2, axis=-2)  # [.., C]
            self.assign(slots["v_row"], v_row)
            self.assign(slots["v_col"], v_col)
            row = ops.rsqrt(v_row / ops.mean(v_row, axis=-1, keepdims=True))
            update = g * row[..., :, None] * ops.rsqrt(v_col)[..., None, :]
        else:
            v = decay * slots["v"] + (1 - decay) * g2
            self.assign(slots["v"], v)
            update = g * ops.rsqrt(v)
        if self.clipping_threshold is not None:
            update = update / ops.maximum(1.0, rms(update) / self.clipping_threshold)
        update = alpha * update
        if self.beta1:
            update = self.beta1 * slots["m"] + (1 - self.beta1) * update
            self.assign(slots["m"], update)
        x = x - update
        if "master" in slots:
            self.assign(slots["master"], x)
        elif self.rounding == "stochastic" and keras.backend.standardize_dtype(variable.dtype) == "bfloat16":
            x = round_stochastically(x, FixedSeed(self.seed, self.iterations).child(index))
        self.assign(variable, ops.cast(x, variable.dtype))

    def get_config(self):
        names = (
            "decay_type", "decay_exponent", "beta2", "beta1", "epsilon1", "epsilon2", "clipping_threshold",
            "multiply_by_parameter_scale", "factored", "rounding", "seed",
        )  # fmt: skip
        return {**super().get_config(), **{name: getattr(self, name) for name in names}}
