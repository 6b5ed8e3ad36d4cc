"""The compiled train step on both backends: gradients in parts, several devices, a state that stays what it was when a
gradient is not finite.

JAX: one pure program (`jax_step`), whose state may be replicated over the devices or sharded. TensorFlow: two
programs, gradients and update, on one device or mirrored on several.
"""

import contextlib
import functools
import inspect
import math

import keras
import numpy as np
from keras import ops

from gpt2lib import attention
from gpt2lib.adafactor import Adafactor
from gpt2lib.config import ConfigError, nearest
from gpt2lib.model import GPT2, fused, look_up, nll, with_gradient
from gpt2lib.schedule import Warmup, WarmupCosine
from gpt2lib.seed import FixedSeed

_OPTIMIZERS = {"adafactor": Adafactor, "adamw": keras.optimizers.AdamW}


_COEFFICIENTS = {"beta_1", "beta_2", "epsilon"}  # AdamW's options that change no operation of it


def make_optimizer(config):
    """The optimizer of a run, with its schedule: `WarmupCosine`, or Adafactor's default when the rate is None."""
    rate = config.learning_rate
    if rate is not None:
        if config.schedule == "cosine":
            rate = WarmupCosine(rate, config.warmup_steps, config.max_steps)
        else:
            rate = Warmup(rate, config.warmup_steps)
    make = _OPTIMIZERS[config.optimizer]
    valid = set(inspect.signature(make.__init__).parameters)
    valid -= {"self", "kwargs", "name", "learning_rate", "weight_decay"}
    for option in config.optimizer_options:
        if option not in valid:
            raise ConfigError(f"{config.optimizer} has no option `{option}`; {nearest(option, valid)}")
    decay = config.weight_decay
    if config.optimizer == "adamw" and decay is None:
        decay = 0.0  # Keras' default would decay
    try:
        return make(rate, name=config.optimizer, weight_decay=decay, **config.optimizer_options)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{config.optimizer} does not accept {config.optimizer_options}: {error}") from error


def trained_variables(model, freeze) -> list:
    """The variables that a run changes: all but those whose path, such as `model/h0/attn/c_attn/w`, has a frozen part.

    `freeze` holds parts of paths: `wte`, `h0`, `h1/mlp`, `ln_f`. ConfigError for one that no path has.
    """

    def within(part, path):
        return f"/{part.strip('/')}/" in f"/{path}/"

    for part in freeze:
        if not any(within(part, v.path) for v in model.trainable_variables):
            valid = {"wte", "wpe", "ln_f", *(block.name for block in model.blocks)}
            raise ConfigError(f"TrainConfig.freeze: no variable has `{part}` in its path; {nearest(part, valid)}")
    trained = [v for v in model.trainable_variables if not any(within(part, v.path) for part in freeze)]
    if not trained:
        raise ConfigError("TrainConfig.freeze leaves nothing to train")
    return trained


def held_variables(model, trained) -> list:
    """The variables that a run does not change."""
    return [v for v in model.trainable_variables if not any(v is t for t in trained)]


def make_parts(config, shape, init):
    """The model of a run, its optimizer, and the variables that it changes; `init` as in `GPT2`."""
    model = GPT2(shape, init=init, seed=config.seed, dtype=config.dtype, remat=config.remat)
    optimizer, trained = make_optimizer(config), trained_variables(model, config.freeze)
    optimizer.build(trained)
    return model, optimizer, trained


def _product():
    """The matrix product to use: float32 with JAX; TensorFlow rounds the sums to the type of the operands."""
    if keras.backend.backend() != "jax":
        return ops.matmul
    from jax import numpy

    if attention.platform() == "cpu":  # where older versions cannot multiply bfloat16 into float32
        return lambda a, b: numpy.matmul(a.astype("float32"), b.astype("float32"))
    return functools.partial(numpy.matmul, preferred_element_type="float32")


def _width(b, t, chunk):
    """Positions that are taken at once, so that B of each make about `chunk` tokens."""
    return t if chunk is None else min(t, max(1, chunk // b))


@fused
def _nats_and_slope(logits, labels, dtype):
    """The nats of labels [B, W] in all, and their slope by the logits [B, W, V], in `dtype`."""
    z = ops.cast(logits, "float32")
    z = z - ops.max(z, axis=-1, keepdims=True)
    e = ops.exp(z)
    total = ops.sum(e, axis=-1, keepdims=True)
    nats = ops.log(total) - ops.take_along_axis(z, labels[..., None], axis=-1)
    return ops.sum(nats), ops.cast(e / total - ops.one_hot(labels, z.shape[-1], dtype="float32"), dtype)


def cross_entropy(h, wte, labels, dtype="float32", chunk=None):
    """Mean negative log-likelihood in nats of labels [B, T], given h [B, T, D] and the output matrix wte [V, D].

    Equal to the mean of `nll(logits)`. With `chunk`, the gradients are made while the logits are at hand, and only the
    logits of about that many tokens exist at a time. The three matrix products run in `dtype`; the softmax is float32.
    """
    b, t, d = h.shape
    width, product = _width(b, t, chunk), _product()

    def part(h, wte, labels):  # [B, W, D], [V, D], [B, W] -> their nats, and what their gradients are made of
        low = ops.cast(wte, dtype)
        logits = product(ops.cast(h, dtype), ops.transpose(low))  # [B, W, V]
        nats, slope = _nats_and_slope(logits, labels, dtype)
        return nats, (h, low, slope)

    def gradients(kept, scale):
        h, low, slope = kept
        rows = ops.reshape(ops.cast(h * scale, dtype), (-1, d))
        dwte = product(ops.transpose(ops.reshape(slope, (-1, low.shape[0]))), rows)
        return ops.cast(product(slope, low), "float32") * scale, ops.cast(dwte, "float32")

    def whole(h, wte, labels):
        nats, kept = part(h, wte, labels)
        return nats / (b * t), kept

    def chunked(h, wte, labels):
        def parts(h, labels):
            nats, kept = part(h, wte, labels)
            return nats, *gradients(kept, 1 / (b * t))

        def body(i, state):
            nats, dh, dwte = state
            rows = ops.slice(h, (0, i * width, 0), (b, width, d))
            more, dh_part, dwte_part = parts(rows, ops.slice(labels, (0, i * width), (b, width)))
            return nats + more, ops.slice_update(dh, (0, i * width, 0), dh_part), dwte + dwte_part

        zeros = (ops.zeros((), "float32"), ops.zeros((b, t, d), "float32"), ops.zeros(wte.shape, "float32"))
        nats, dh, dwte = ops.fori_loop(0, t // width, body, zeros)
        if rest := t % width:
            more, dh_part, dwte_part = parts(h[:, -rest:], labels[:, -rest:])
            nats, dwte = nats + more, dwte + dwte_part
            dh = ops.concatenate([dh[:, :-rest], dh_part], axis=1)
        return nats / (b * t), (dh, dwte)

    if width == t:
        mean = with_gradient(whole, lambda kept, scale: (*gradients(kept, scale / (b * t)), None))
    else:
        mean = with_gradient(chunked, lambda kept, scale: (*(scale * gradient for gradient in kept), None))
    return mean(ops.convert_to_tensor(h), ops.cast(wte, "float32"), labels)


def _tied(wte, tokens):
    """The rows [B, T, D] of tokens [B, T], and wte [V, D] for the logits. TensorFlow adds up their gradients."""
    if keras.backend.backend() == "jax":  # which over several devices would exchange both
        return look_up(wte, tokens), wte
    import tensorflow as tf

    @tf.custom_gradient
    def both(wte):
        def gradient(rows, dense):
            return tf.tensor_scatter_nd_add(dense, tokens[..., None], tf.cast(rows, dense.dtype))

        return (tf.gather(wte, tokens), tf.identity(wte)), gradient

    return both(wte)


def loss_of(model, tokens, seed, chunk):
    """Mean nats per token of tokens [B, T + 1], with the dropout of a seed, for the gradient."""
    rows, wte = _tied(model.dropped_wte(seed), tokens[:, :-1])
    h, _ = model.hidden(tokens[:, :-1], rows=rows, training=True, seed=seed)
    return cross_entropy(h, wte, tokens[:, 1:], model.compute_dtype, chunk)


def losses_of(model, windows, chunk):
    """Nats [W, T] of windows [W, T + 1], without dropout; with `chunk` the logits of about so many tokens at a time."""
    (h, _), labels = model.hidden(windows[:, :-1]), windows[:, 1:]
    b, t, d = h.shape
    width = _width(b, t, chunk)
    if width == t:
        return nll(model.logits(h), labels)

    def body(i, nats):
        rows = ops.slice(h, (0, i * width, 0), (b, width, d))
        part = nll(model.logits(rows), ops.slice(labels, (0, i * width), (b, width)))
        return ops.slice_update(nats, (0, i * width), part)

    nats = ops.fori_loop(0, t // width, body, ops.zeros((b, t), "float32"))
    if rest := t % width:
        nats = ops.concatenate([nats[:, :-rest], nll(model.logits(h[:, -rest:]), labels[:, -rest:])], axis=1)
    return nats


def _sum_of_squares(arrays):
    arrays = [ops.cast(a, "float32") for a in arrays]
    if keras.backend.backend() == "jax":
        return sum(ops.sum(ops.square(a)) for a in arrays)
    import tensorflow as tf

    return 2 * sum(tf.nn.l2_loss(a) for a in arrays)  # in one pass


def _sizes(before, after):
    """RMS of the update and of the parameters, over all entries."""
    n = sum(math.prod(a.shape) for a in after)
    moved = [ops.cast(new, "float32") - ops.cast(old, "float32") for new, old in zip(after, before, strict=True)]
    return {
        "update_rms": ops.sqrt(_sum_of_squares(moved) / n),
        "parameter_rms": ops.sqrt(_sum_of_squares(after) / n),
    }


def _clipped(gradients, norm, clip_norm):
    """Gradients scaled so that their global norm is at most `clip_norm`."""
    if clip_norm is None:
        return gradients
    scale = clip_norm / ops.maximum(norm, clip_norm)
    return [g * ops.cast(scale, g.dtype) for g in gradients]


def make_step(model, optimizer, trained, config, places):
    """The compiled step of the backend in use: `JaxStep` or `TensorFlowStep`, at the places of `device.places`."""
    step = JaxStep if keras.backend.backend() == "jax" else TensorFlowStep
    return step(model, optimizer, trained, config, places)


# --- JAX --------------------------------------------------------------------------------------------------------------


def jax_layout(mesh, shape, sharded: bool):
    """The `NamedSharding` of an array over the devices of a mesh with the one axis `data`.

    Sharded: a matrix is cut along its largest axis that the devices divide (ZeRO stage 3, Rajbhandari et al. 2020,
    arXiv:1910.02054; FSDP), and so are its slots; vectors, and what cannot be cut evenly, are replicated.
    """
    from jax.sharding import NamedSharding, PartitionSpec

    axes = [a for a in range(len(shape)) if shape[a] % mesh.size == 0] if sharded and len(shape) >= 2 else []
    if not axes:
        return NamedSharding(mesh, PartitionSpec())
    cut = max(axes, key=lambda a: shape[a])
    return NamedSharding(mesh, PartitionSpec(*["data" if a == cut else None for a in range(len(shape))]))


@contextlib.contextmanager
def _computing(mesh, sharded: bool):
    """Inside, the model's programs are made for a mesh: for one device of it, or all of it with XLA's partitioning."""
    with attention.target(mesh, alone=not sharded), contextlib.ExitStack() as stack:
        if sharded:  # the batch stays on its devices, parameters come to it
            devices = keras.distribution.DeviceMesh((mesh.size,), ["data"], mesh.devices)
            layouts = keras.distribution.LayoutMap(devices)
            for outputs in ("ln_.", "c_attn", "c_fc", "c_proj", "mlp"):
                layouts[f"{outputs}/output"] = keras.distribution.TensorLayout(("data", None, None), devices)
            options = dict(layout_map=layouts, batch_dim_name="data", auto_shard_dataset=False)
            stack.enter_context(keras.distribution.ModelParallel(**options).scope())
        yield


def jax_step(model, optimizer, trained, config, mesh):
    """The train step of a run as a pure function of arrays, to be compiled with `jax_layout`s over `mesh`.

    `step(state, frozen, tokens [B, T + 1], index) -> (state, measures)`. The state is {"trained": values of `trained`,
    "slots": those of the optimizer's variables, "failed": -1 or the first step whose gradient was not finite, which
    changes nothing, nor does any later one}; `frozen` are the values of the other parameters.

    Where every device has all parameters, each makes the gradient of its own sequences, and one exchange follows, in
    the types of the gradients. Where they are sharded, XLA decides what to exchange, and when.
    """
    import jax
    from jax import lax, numpy
    from jax.sharding import NamedSharding, PartitionSpec

    held, n = held_variables(model, trained), config.accumulate
    parts_data = PartitionSpec(None, "data")
    low = [config.dtype == "mixed_bfloat16" and v.path.endswith("/w") for v in trained]

    def loss(values, frozen, tokens, count, row):
        scope = keras.StatelessScope(state_mapping=list(zip(held, frozen, strict=True)))
        for v, value in zip(trained, values, strict=True):
            if config.sharded and v is model.wte:
                value = lax.with_sharding_constraint(value, NamedSharding(mesh, PartitionSpec()))
            scope.add_update((v, value))
        with _computing(mesh, config.sharded), scope:
            return loss_of(model, tokens, FixedSeed(config.seed, count, row), config.loss_chunk)

    def settle(arrays):  # gradients lie where their parameters lie
        if not config.sharded:
            return arrays
        return [lax.with_sharding_constraint(g, jax_layout(mesh, g.shape, True)) for g in arrays]

    def gradients_of(values, frozen, parts, index, row=0):  # parts [accumulate, B / accumulate, T + 1]
        values = [v.astype("bfloat16") if is_low else v for v, is_low in zip(values, low, strict=True)]
        if n == 1:
            total, gradients = jax.value_and_grad(loss)(values, frozen, parts[0], index, row)
            return total, settle(gradients)

        def body(carry, part):
            i, total, sums = carry
            value, gradients = jax.value_and_grad(loss)(values, frozen, part, index * n + i, row)
            sums = [a + g.astype(a.dtype) for a, g in zip(sums, settle(gradients), strict=True)]
            return (i + 1, total + value, sums), None

        zeros = settle([numpy.zeros(v.shape, "float32") for v in values])
        (_, total, sums), _ = lax.scan(body, (numpy.int32(0), numpy.float32(0), zeros), parts)
        return total / n, [a / n for a in sums]

    def on_each_device(values, frozen, parts, index):
        row = lax.axis_index("data") * parts.shape[1]
        return lax.pmean(gradients_of(values, frozen, parts, index, row), "data")

    if not config.sharded:
        specs = (PartitionSpec(), PartitionSpec(), parts_data, PartitionSpec())
        exchanged = jax.shard_map(on_each_device, mesh=mesh, in_specs=specs, out_specs=PartitionSpec(), check_vma=False)

    def step(state, frozen, tokens, index):
        values, slots, failed = state["trained"], state["slots"], state["failed"]
        parts = lax.with_sharding_constraint(tokens.reshape(n, -1, tokens.shape[1]), NamedSharding(mesh, parts_data))
        total, gradients = (gradients_of if config.sharded else exchanged)(values, frozen, parts, index)
        norm = ops.sqrt(_sum_of_squares(gradients))
        gradients = [
            g.astype(v.dtype) for g, v in zip(_clipped(gradients, norm, config.clip_norm), values, strict=True)
        ]
        new_values, new_slots = optimizer.stateless_apply(slots, gradients, values)
        measures = {"loss": total, "gradient_norm": norm, **_sizes(values, new_values)}
        fine = numpy.isfinite(norm) & numpy.isfinite(total)
        failed = numpy.where((failed < 0) & ~fine, index, failed)

        def keep(new, old):
            return [numpy.where(failed < 0, n, o) for n, o in zip(new, old, strict=True)]

        state = {"trained": keep(new_values, values), "slots": keep(new_slots, slots)}
        # An update that overflows is seen too late to be taken back: for that, both states would have to exist at once.
        failed = numpy.where((failed < 0) & ~numpy.isfinite(measures["parameter_rms"]), index, failed)
        return {**state, "failed": failed}, {**measures, "failed": failed}

    return step


class JaxPrograms:
    """What a run compiles over the devices of a mesh, and where the arrays lie: nothing here has values.

    `step(state, frozen, tokens, index)` is `jax_step`; `losses(trained, frozen, windows [W, T + 1])` gives nats [W, T].
    """

    def __init__(self, model, optimizer, trained, config, mesh):
        import jax
        from jax.sharding import NamedSharding, PartitionSpec

        self.trained, self.slots, self.held = trained, optimizer.variables, held_variables(model, trained)
        self.rows, self.everywhere = NamedSharding(mesh, PartitionSpec("data")), NamedSharding(mesh, PartitionSpec())

        def layouts(variables):
            return [jax_layout(mesh, tuple(v.shape), config.sharded) for v in variables]

        self.layouts = {"trained": layouts(trained), "slots": layouts(self.slots), "failed": self.everywhere}
        self.frozen_layouts = layouts(self.held)
        self.step = jax.jit(
            jax_step(model, optimizer, trained, config, mesh),
            in_shardings=(self.layouts, self.frozen_layouts, self.rows, self.everywhere),
            out_shardings=(self.layouts, self.everywhere),
            donate_argnums=0,
        )

        def losses(values, frozen, windows):
            mapping = [*zip(trained, values, strict=True), *zip(self.held, frozen, strict=True)]
            with _computing(mesh, config.sharded), keras.StatelessScope(state_mapping=mapping):
                return losses_of(model, windows, config.loss_chunk)

        if not config.sharded:
            all_of, rows = PartitionSpec(), PartitionSpec("data")
            specs = (all_of, all_of, rows)
            losses = jax.shard_map(losses, mesh=mesh, in_specs=specs, out_specs=rows, check_vma=False)
        self.losses = jax.jit(
            losses,
            in_shardings=(self.layouts["trained"], self.frozen_layouts, self.rows),
            out_shardings=self.everywhere,
        )


class JaxStep:
    """`step(tokens of this host [B / hosts, T + 1], index) -> measures`; the state lives on the devices, not in Keras.

    The variables of the model and the optimizer keep their first values, or none: `arrays()` has the state.
    """

    def __init__(self, model, optimizer, trained, config, devices):
        from jax.sharding import Mesh

        self.model, self.optimizer, self.trained = model, optimizer, trained
        self.programs = JaxPrograms(model, optimizer, trained, config, Mesh(np.array(devices), ("data",)))
        self.frozen = [
            self._put(v.value, where) for v, where in zip(self.programs.held, self.programs.frozen_layouts, strict=True)
        ]
        self.assign({v.path: v.value for v in (*trained, *self.programs.slots)})

    @staticmethod
    def _put(value, layout):
        """An array over the devices from one that every host has."""
        import jax

        value = np.asarray(value)
        return jax.make_array_from_callback(value.shape, layout, lambda index: value[index])

    def __call__(self, tokens, index, measure_sizes=True):
        import jax

        tokens = jax.make_array_from_process_local_data(self.programs.rows, np.asarray(tokens, np.int32))
        self.state, measures = self.programs.step(self.state, self.frozen, tokens, np.int32(index))
        return measures

    def losses(self, windows):
        """Nats [W, T] of windows [W, T + 1], which every host has; without dropout."""
        return np.asarray(
            self.programs.losses(self.state["trained"], self.frozen, self._put(windows, self.programs.rows))
        )

    def arrays(self) -> dict:
        """The whole state by the paths of its variables, as NumPy arrays on every host."""
        from jax.experimental import multihost_utils

        def whole(x):
            if x.is_fully_addressable or x.is_fully_replicated:
                return np.asarray(x.addressable_data(0) if x.is_fully_replicated else x)
            return np.asarray(multihost_utils.process_allgather(x, tiled=True))

        variables = [*self.programs.trained, *self.programs.slots, *self.programs.held]
        values = [*self.state["trained"], *self.state["slots"], *self.frozen]
        return {v.path: whole(x) for v, x in zip(variables, values, strict=True)}

    def assign(self, arrays: dict):
        """Set the state from arrays by path."""

        def placed(variables, layouts):
            return [self._put(arrays[v.path], where) for v, where in zip(variables, layouts, strict=True)]

        self.state = {
            "trained": placed(self.programs.trained, self.programs.layouts["trained"]),
            "slots": placed(self.programs.slots, self.programs.layouts["slots"]),
            "failed": self._put(np.int32(-1), self.programs.everywhere),
        }


# --- TensorFlow -------------------------------------------------------------------------------------------------------


class TensorFlowStep:
    """`step(tokens [B, T + 1], index, measure_sizes) -> measures`, on the devices of a `tf.distribute` strategy.

    Gradients are summed over the parts of a batch on each device and then over the devices; the optimizer sees one
    gradient. A gradient that is not finite is not applied.
    """

    def __init__(self, model, optimizer, trained, config, strategy):
        import tensorflow as tf

        self.model, self.optimizer, self.trained, self.strategy = model, optimizer, trained, strategy
        replicas, n = strategy.num_replicas_in_sync, config.accumulate
        # On one device, bfloat16 copies of the kernels, made when they change: cheaper than casts where they are used.
        kernels = [v for v in model.trainable_variables if v.path.endswith("/w")]
        mixed = replicas == 1 and config.dtype == "mixed_bfloat16"
        self.low = [(v, tf.Variable(tf.cast(v.value, "bfloat16"))) for v in kernels] if mixed else []
        low = {v.path: copy for v, copy in self.low}
        parameters = [low.get(v.path, v.value) for v in trained]

        def part(tokens, count):
            with keras.StatelessScope() as scope, tf.GradientTape() as tape:
                for update in self.low:
                    scope.add_update(update)
                loss = loss_of(model, tokens, FixedSeed(config.seed, count), config.loss_chunk)
                return loss, tape.gradient(loss, parameters)

        def local(tokens, index):
            context = tf.distribute.get_replica_context()
            first = (index * replicas + context.replica_id_in_sync_group) * n
            if n == 1:
                total, gradients = part(tokens, first)
            else:
                parts = tf.reshape(tokens, (n, -1, tokens.shape[1]))

                def body(i, total, sums):
                    loss, gradients = part(parts[i], first + i)
                    return i + 1, total + loss, [a + tf.cast(g, a.dtype) for a, g in zip(sums, gradients, strict=True)]

                zeros = [tf.zeros(v.shape, "float32") for v in trained]
                _, total, sums = tf.while_loop(lambda i, *_: i < n, body, (0, tf.zeros(()), zeros))
                total, gradients = total / n, [a / n for a in sums]
            if replicas > 1:
                total, *gradients = context.all_reduce(tf.distribute.ReduceOp.MEAN, [total, *gradients])
            norm = ops.sqrt(_sum_of_squares(gradients))
            return {"loss": total, "gradient_norm": norm}, _clipped(gradients, norm, config.clip_norm)

        def gradients_of(tokens, index):
            rows = tokens.shape[0] // replicas
            tokens = strategy.experimental_distribute_values_from_function(
                lambda context: tokens[context.replica_id_in_sync_group * rows :][:rows]
            )
            return strategy.run(local, args=(tokens, index))

        def apply(gradients):
            if simple:
                self._adamw(gradients)
            elif replicas == 1:
                optimizer.apply(gradients, trained)
            else:  # where Keras sums over the devices
                strategy.run(lambda g: optimizer.apply([x / replicas for x in g], trained), args=(gradients,))
            self._refresh()

        # AdamW in one pass over its arrays. Adafactor's means gain nothing by XLA.
        simple = replicas == 1 and config.optimizer == "adamw" and config.optimizer_options.keys() <= _COEFFICIENTS
        self._gradients = tf.function(gradients_of, autograph=False)
        self._apply = tf.function(apply, autograph=False)
        self._losses = tf.function(lambda w: losses_of(model, w, config.loss_chunk), autograph=False)

    def _adamw(self, gradients):
        """`optimizer.apply` for AdamW (Loshchilov and Hutter 2019, algorithm 2; decay times the rate, as Keras has it).

        One program for each shape, not operations for each variable, which starts sooner.
        """
        import tensorflow as tf

        optimizer = self.optimizer
        slots = {v.path: v.value for v in optimizer.variables}
        step, rate = tf.cast(optimizer.iterations.value + 1, "float32"), tf.cast(optimizer.learning_rate, "float32")
        beta_1, beta_2 = optimizer.beta_1, optimizer.beta_2
        alpha = rate * tf.sqrt(1 - beta_2**step) / (1 - beta_1**step)

        @tf.function(autograph=False, jit_compile=True)
        def update(variable, momentum, velocity, gradient, alpha, decay):
            gradient = tf.cast(gradient, variable.dtype)
            m = momentum.assign_add((gradient - momentum) * (1 - beta_1))
            v = velocity.assign_add((gradient * gradient - velocity) * (1 - beta_2))
            variable.assign(variable - variable * decay - m * alpha / (tf.sqrt(v) + optimizer.epsilon))

        for variable, gradient in zip(self.trained, gradients, strict=True):
            slot = f"{optimizer.name}/{variable.path.replace('/', '_')}"
            momentum, velocity = slots[f"{slot}_momentum"], slots[f"{slot}_velocity"]
            update(variable.value, momentum, velocity, gradient, alpha, rate * optimizer.weight_decay)
        optimizer.iterations.assign_add(1)

    def __call__(self, tokens, index, measure_sizes=True):
        import tensorflow as tf

        measures, gradients = self._gradients(tf.constant(tokens, "int32"), tf.constant(index, "int32"))
        first = self.strategy.experimental_local_results
        measures = {name: float(first(value)[0]) for name, value in measures.items()}
        if not all(map(math.isfinite, measures.values())):
            return {**measures, "failed": index}
        before = [tf.identity(v.value) for v in self.trained] if measure_sizes else None
        self._apply(gradients)
        if measure_sizes:
            measures |= {name: float(value) for name, value in _sizes(before, self.trained).items()}
            if not math.isfinite(measures["parameter_rms"]):
                return {**measures, "failed": index}
        return {**measures, "failed": -1}

    def losses(self, windows):
        """Nats [W, T] of windows [W, T + 1], without dropout."""
        return np.asarray(self._losses(ops.convert_to_tensor(windows, "int32")))

    def arrays(self) -> dict:
        """The whole state by the paths of its variables, as NumPy arrays."""
        variables = [*self.model.trainable_variables, *self.optimizer.variables]
        return {v.path: np.asarray(v.value) for v in variables}

    def assign(self, arrays: dict):
        """Set the state from arrays by path."""
        for v in (*self.trained, *self.optimizer.variables):
            v.assign(arrays[v.path])
        self._refresh()

    def _refresh(self):
        for v, copy in self.low:
            copy.assign(ops.cast(v.value, copy.dtype))
