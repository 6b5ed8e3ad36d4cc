"""GPT-2 in Keras 3, top to bottom: norm, linear, attention, mlp, block, model.

Follows `src/model.py` of openai/gpt-2 (Radford et al. 2019, section 2.3); a variable's path is its name there.
Shapes: B batch, T query position, S key position, D n_embd, N heads, H = D / N, F = 4 * D, V vocabulary, L layer.
"""

import contextlib
import contextvars
import math
import zlib

import keras
import numpy as np
from keras import ops

from gpt2lib import attention
from gpt2lib.config import ConfigError, nearest
from gpt2lib.seed import FixedSeed, keep

# Standard deviation of a kernel [nx, nf] by its path, nx and the number of layers; wte has 0.02, wpe 0.01 in all.
INITS = {
    # OpenAI's 0.02 and the paper's 1/sqrt(N) on residual projections, N = 2 * n_layer residual branches
    "gpt2": lambda path, nx, n_layer: 0.02 / math.sqrt(2 * n_layer) if "c_proj" in path else 0.02,
    # openai/gpt-2 as released: the factor of the paper is not in the code
    "openai": lambda path, nx, n_layer: 0.02,
    # ConnorJL/GPT2 when its models were trained, June 2019: 1/sqrt(n_layer) on both c_proj
    "2019": lambda path, nx, n_layer: 0.02 / math.sqrt(n_layer) if "c_proj" in path else 0.02,
    # its PrettyBig: scale .1443 = 1/sqrt(48) whatever the number of layers
    "2019-prettybig": lambda path, nx, n_layer: 0.02 / math.sqrt(48) if "c_proj" in path else 0.02,
    # since its commit aac4b8e, July 2019: 1/sqrt(fan_in) everywhere, 1/sqrt(n_layer) on the mlp's c_proj only
    "2019-newinit": lambda path, nx, n_layer: 0.02 / math.sqrt(nx * (n_layer if "mlp/c_proj" in path else 1)),
}


def initial_values(config, init: str, seed: int):
    """`values(path, shape)`: the initial float32 array of a variable, the same under both backends."""
    if init not in INITS:
        raise ConfigError(f"there is no initialisation `{init}`; {nearest(init, INITS)}")

    def values(path, shape):
        kind = path.rsplit("/", 1)[-1]
        if kind in "bg":
            return np.full(shape, kind == "g", np.float32)
        std = {"wte": 0.02, "wpe": 0.01}.get(kind) or INITS[init](path, shape[0], config.n_layer)
        random = np.random.Generator(np.random.Philox([seed, zlib.crc32(path.encode())]))
        array = random.standard_normal(shape, np.float32)
        array *= std
        return array

    return values


def fused(function):
    """`function(*tensors)`, of whose operations XLA makes a few loops: for much memory and little arithmetic.

    JAX does so with the whole program around it. TensorFlow's own operations take a pass over memory each.
    """
    if keras.backend.backend() == "jax":
        return function
    import tensorflow as tf

    return tf.function(function, autograph=False, jit_compile=True)


def with_gradient(forward, backward):
    """A function of tensors whose gradient is written out, on either backend.

    `forward(*args)` gives (y, kept); `backward(kept, upstream)` a gradient for each of args, None for integers.
    """
    if keras.backend.backend() == "jax":
        import jax

        function = jax.custom_vjp(lambda *args: forward(*args)[0])
        function.defvjp(forward, backward)
        return function

    @ops.custom_gradient
    def function(*args):
        y, kept = forward(*args)
        return y, lambda *upstream: backward(kept, upstream[0] if len(upstream) == 1 else upstream)

    return function


def dropout(x, rate, seed):
    """x with a share `rate` of its entries 0 and the others 1 / (1 - rate) times as large; without a seed as it is."""
    if seed is None or not rate:
        return x
    if keras.backend.backend() != "jax":
        return keras.random.dropout(x, rate, seed=seed)
    return _drop(x, rate, seed.key(), seed.row)


def _drop(x, rate, key, first):
    """Dropout whose gradient makes the mask again instead of keeping it. JAX."""
    from jax import lax

    def masked(x, key, first):
        row, stride = 0, 1  # numbers of the rows along the last axis, in the whole batch
        for axis in reversed(range(x.ndim - 1)):
            row += stride * lax.broadcasted_iota("int32", (*x.shape[:-1], 1), axis)
            stride *= x.shape[axis]
        row += first * (stride // x.shape[0])
        kept = keep(key, row, lax.broadcasted_iota("int32", x.shape, x.ndim - 1), rate)
        return ops.where(kept, x / (1 - rate), ops.zeros_like(x))

    function = with_gradient(
        lambda x, key, first: (masked(x, key, first), (key, first)),
        lambda kept, upstream: (masked(upstream, *kept), None, None),
    )
    return function(x, key, first)


class _Layer(keras.layers.Layer):
    """A layer with what all layers of one model share: `values(path, shape)` gives first values."""

    casts = True  # what it is given, to the precision of the computation

    def __init__(self, name, config, values, dtype, int8=False):
        super().__init__(name=name, dtype=dtype, autocast=self.casts)
        self.config, self.values, self.int8 = config, values, int8

    def child(self, kind, name, *args):
        return kind(name, self.config, self.values, self.dtype_policy, self.int8, *args)

    def weight(self, name, shape, **kwargs):
        return self.fixed(name, self.values(f"{self.path}/{name}", shape), **kwargs)

    def fixed(self, name, array, **kwargs):
        return self.add_weight(
            array.shape, lambda shape, dtype: ops.convert_to_tensor(array, dtype), name=name, **kwargs
        )

    def eights(self, name, shape, by_column=False):
        """A matrix as 8-bit integers [R, K] and a scale for each row [R]; `by_column`: of the transposed matrix."""
        array = self.values(f"{self.path}/{name}", shape)
        integers, scale = eight_bits(array.T if by_column else array)
        fixed = dict(trainable=False, autocast=False)
        return self.fixed(name, integers, dtype="int8", **fixed), self.fixed(f"{name}_scale", scale, **fixed)


class Norm(_Layer):
    """Layer normalisation over the last axis, epsilon 1e-5, always in float32: [..., D] -> [..., D]."""

    def __init__(self, name, config, values, dtype, int8=False):
        super().__init__(name, config, values, "float32")

    def build(self, shape):
        self.g, self.b = self.weight("g", (shape[-1],)), self.weight("b", (shape[-1],))

    def call(self, x):
        return layer_norm(x, ops.copy(self.g), ops.copy(self.b))


_one_row = contextvars.ContextVar("one_row", default=(None, {}))


@contextlib.contextmanager
def one_row(tick, turned: dict):
    """Inside, the body of a loop is traced that multiplies one row by matrices, on a CPU, compiled by XLA.

    Such a loop is as fast as memory is read. XLA would convert all matrices to float32 before it begins and then read
    those, were it not told that they may change with `tick`, a number of the loop that is never negative; and it uses
    all cores for matrices [nf, nx] only. `turned`: path -> those of kernels, where the caller has them. The cache is
    without the axis of batches here, 2 x [N, S, H] a layer: an axis of 1 would have XLA copy all of it in each round.
    """
    token = _one_row.set((tick, turned))
    try:
        yield
    finally:
        _one_row.reset(token)


def _multiply(x, matrix, scale=None):
    """x [M, K] times the transpose of a matrix [R, K] of whatever type, by its rows' scale [R] -> [M, R]."""
    tick, _ = _one_row.get()
    if tick is not None:
        # XLA would work out x anew for each row of the matrix, unless it ends in a division: by ones, unknown to it,
        # and as many as x has columns, so that it is left in the shape that it has here
        ones = ops.where(tick >= 0, 1.0, ops.arange(x.shape[-1], dtype="float32"))
        x = ops.cast(x, "float32") / ones
        matrix = matrix if matrix.dtype == "float32" else _changing(ops.convert_to_tensor(matrix), tick)
    y = ops.matmul(x, ops.transpose(ops.cast(matrix, x.dtype)))
    y = y if tick is None else _changing(y, tick)
    return y if scale is None else ops.cast(y, "float32") * ops.cast(scale, "float32")


def _changing(x, tick):
    """x, of which XLA does not know that it is the same whenever `tick` changes."""
    if keras.backend.backend() == "jax":
        from jax import lax

        return lax.optimization_barrier((x, tick))[0]
    from tensorflow.compiler.tf2xla.ops.gen_xla_ops import xla_optimization_barrier

    return xla_optimization_barrier([x, tick])[0]


def eight_bits(array):
    """Integers in -127..127 [R, K] and a scale for each row [R], the product of which is near a matrix [R, K]."""
    array = np.asarray(array, np.float32)
    scale = np.maximum(np.abs(array).max(axis=1), 1e-30) / 127
    return np.rint(array / scale[:, None]).astype(np.int8), scale


class Conv1D(_Layer):
    """OpenAI's name for a linear map: [..., nx] -> [..., nf], kernel `w` [nx, nf]; with 8 bits [nf, nx] and a scale."""

    def __init__(self, name, config, values, dtype, int8, nf):
        super().__init__(name, config, values, dtype, int8)
        self.nf = nf

    def build(self, shape):
        if self.int8:
            self.w, self.w_scale = self.eights("w", (shape[-1], self.nf), by_column=True)
        else:
            self.w = self.weight("w", (shape[-1], self.nf))
        self.b = self.weight("b", (self.nf,))

    def call(self, x):
        y, b = self.multiply(ops.reshape(x, (-1, x.shape[-1]))), self.b  # TensorFlow fuses matrix and vector
        if keras.backend.backend() == "jax":  # so that XLA sums the gradient of b in float32 under every policy
            b = ops.cast(ops.broadcast_to(ops.cast(b, "float32"), ops.shape(y)), y.dtype)
        return ops.reshape(y + b, (*ops.shape(x)[:-1], self.nf))

    def multiply(self, x):  # [M, nx] -> [M, nf]
        if self.int8:
            return ops.cast(_multiply(x, self.w, self.w_scale), x.dtype)
        turned = _one_row.get()[1].get(self.w.path)
        return ops.matmul(x, self.w) if turned is None else ops.cast(_multiply(x, turned), x.dtype)


class Attention(_Layer):
    """Causal multi-head self-attention: [B, T, D] -> [B, T, D] and the keys and values, 2 x [B, N, S, H]."""

    casts = False  # the cache may be in another precision

    def build(self, shape):
        d = self.config.n_embd
        self.c_attn, self.c_proj = self.child(Conv1D, "c_attn", 3 * d), self.child(Conv1D, "c_proj", d)
        self.c_attn.build(shape)
        self.c_proj.build(shape)

    def split_heads(self, x):  # [B, T, D] -> [B, N, T, H]
        b, t, d = ops.shape(x)
        n = self.config.n_head
        return ops.transpose(ops.reshape(x, (b, t, n, d // n)), (0, 2, 1, 3))

    def merge_heads(self, x):  # [B, N, T, H] -> [B, T, D]
        b, n, t, h = ops.shape(x)
        return ops.reshape(ops.transpose(x, (0, 2, 1, 3)), (b, t, n * h))

    def call(self, x, past=None, position=0, bias=None, tpu=False, seed=None):
        qkv, drop = self.c_attn(x), seed and seed.child(1)  # [B, T, 3D]
        q, k, v = (self.split_heads(part) for part in ops.split(qkv, 3, axis=-1))  # 3 x [B, N, T, H]
        if past is not None:  # the T new keys and values behind the `position` old ones
            k, v = self.append(past[0], k, position), self.append(past[1], v, position)
        if tpu:
            a = attention.attend(qkv, self.config.n_head, self.config.attn_pdrop, drop)
        else:
            a = self.attend(q, k, v, bias, drop)
        a = self.c_proj(a)  # [B, T, D]
        return dropout(a, self.config.resid_pdrop, seed and seed.child(2)), (k, v)

    def append(self, old, new, position):  # [B, N, S, H], [B, N, T, H] -> [B, N, S, H]; the cache also [N, S, H]
        new = ops.cast(new, old.dtype)
        if len(old.shape) == 3:
            return ops.slice_update(old, (0, position, 0), new[0])
        return ops.slice_update(old, (0, 0, position, 0), new)

    def attend(self, q, k, v, bias, seed):  # [B, N, T, H], 2 x [B, N, S, H] -> [B, T, D]
        q = q / math.sqrt(self.config.n_embd // self.config.n_head)
        if len(k.shape) == 3:  # [N, S, H]; as below, but XLA would turn all keys for each token
            k, v = k[None], v[None]
            scores = ops.swapaxes(ops.matmul(k, ops.swapaxes(q, -1, -2)), -1, -2)
        else:
            scores = ops.matmul(q, ops.swapaxes(k, -1, -2))  # [B, N, T, H] @ [B, N, H, S] -> [B, N, T, S]
        scores = ops.cast(scores, "float32") + bias
        weights = ops.softmax(scores) if scores.shape[-1] != 1 else ops.ones_like(scores)  # Keras warns of a lone 1
        weights = ops.cast(weights, self.compute_dtype)
        weights = dropout(weights, self.config.attn_pdrop, seed)
        return self.merge_heads(ops.matmul(weights, v))  # [B, N, T, S] @ [B, N, S, H] -> [B, N, T, H] -> [B, T, D]


class MLP(_Layer):
    """Two linear maps around a tanh-GELU: [B, T, D] -> [B, T, F] -> [B, T, D]."""

    def build(self, shape):
        d = self.config.n_embd
        self.c_fc, self.c_proj = self.child(Conv1D, "c_fc", 4 * d), self.child(Conv1D, "c_proj", d)
        self.c_fc.build(shape)
        self.c_proj.build((*shape[:-1], 4 * d))

    def call(self, x, seed=None):
        h = gelu(self.c_fc(x))
        return dropout(self.c_proj(h), self.config.resid_pdrop, seed and seed.child(3))


class Block(_Layer):
    """x + attention(norm(x)), then x + mlp(norm(x)): [B, T, D] -> [B, T, D] and the keys and values."""

    casts = False

    def build(self, shape):
        self.ln_1, self.attn = self.child(Norm, "ln_1"), self.child(Attention, "attn")
        self.ln_2, self.mlp = self.child(Norm, "ln_2"), self.child(MLP, "mlp")
        for layer in (self.ln_1, self.attn, self.ln_2, self.mlp):
            layer.build(shape)

    def call(self, x, past=None, position=0, bias=None, tpu=False, seed=None):
        a, present = self.attn(self.ln_1(x), past=past, position=position, bias=bias, tpu=tpu, seed=seed)
        x = x + a
        x = x + self.mlp(self.ln_2(x), seed=seed)
        return x, present


class GPT2(keras.Model):
    """GPT-2: `model(tokens [B, T] int32) -> logits [B, T, V] float32`.

    Args:
        config: `ModelConfig`.
        init: a name in `INITS`, or a function `(path, shape) -> float32 array` (this is how checkpoints are read).
        seed: of the initial values and of dropout.
        dtype: a Keras dtype policy; norms, softmax and logits stay float32. With `mixed_bfloat16` all parameters do
            too, with `bfloat16` only those of the norms.
        remat: in training, keep only the inputs of the blocks and compute the blocks again for their gradients.
        int8: hold the matrices as 8-bit integers with a scale for each column (each row of wte): for generation and
            evaluation, see `quantized`.
    """

    def __init__(self, config, init="gpt2", seed=0, dtype=None, remat=False, int8=False, name="model"):
        super().__init__(name=name, dtype=dtype)
        self.config, self.remat, self.int8 = config, remat, int8
        self.source = init if callable(init) else initial_values(config, init, seed)
        self.dropout_seed = keras.random.SeedGenerator(seed, name="dropout")  # where a call gives no seed of its own
        shared = (config, self.values, self.dtype_policy, int8)
        self.blocks = [Block(f"h{i}", *shared) for i in range(config.n_layer)]
        self.ln_f = Norm("ln_f", *shared)
        self.build((None, None))
        self.source = None  # the arrays of a checkpoint need not live on

    def build(self, shape):
        c = self.config
        # no autocast: their sum and the logits are made in float32
        self.wpe = self.embedding("wpe", (c.n_ctx, c.n_embd), autocast=False)
        if self.int8:
            self.wte, self.wte_scale = self.eights("wte", (c.n_vocab, c.n_embd))
        else:
            self.wte = self.embedding("wte", (c.n_vocab, c.n_embd), autocast=False)
        for layer in (*self.blocks, self.ln_f):
            layer.build((None, None, c.n_embd))
        self.built = True

    def values(self, path, shape):
        """The first value of a variable, of whatever layer."""
        return self.source(path, shape)

    embedding, fixed, eights = _Layer.weight, _Layer.fixed, _Layer.eights

    def empty_cache(self, batch, length):
        """A cache for `length` positions: for each layer the keys and values, 2 x [B, N, S, H] of zeros."""
        c = self.config
        zeros = ops.zeros((batch, c.n_head, length, c.n_embd // c.n_head), self.compute_dtype)
        return [(zeros, zeros) for _ in self.blocks]

    def hidden(self, tokens, past=None, position=0, start=None, training=False, seed=None, rows=None):
        """The last norm's output [B, T, D] float32 and the cache with these tokens. Arguments as `call`.

        `rows` [B, T, D]: the rows of wte, from a caller that has looked them up.
        """
        t = ops.shape(tokens)[1]
        if isinstance(t, int) and t > self.config.n_ctx and start is None:
            raise ValueError(f"{t} tokens are more than the context of {self.config.n_ctx}; shorten the text")
        s = t if past is None else ops.shape(past[0][0])[-2]
        query = position + ops.arange(t)[:, None]  # [T, 1]
        visible = ops.arange(s)[None, :] <= query  # [T, S]
        where = query[:, 0]  # [T]
        if start is not None:  # row b begins at start[b]: hide what lies before it, and count positions from it
            visible = visible & (ops.arange(s)[None, :] >= start[:, None])[:, None, None, :]  # [B, 1, T, S]
            where = ops.clip(where - start[:, None], 0, self.config.n_ctx - 1)  # [B, T]
        if training and seed is None:
            seed = FixedSeed(*ops.unstack(self.dropout_seed.next()))
        bias = ops.where(visible, 0.0, -1e10)  # of the scores: [T, S] or [B, 1, T, S]
        whole = self.config.embd_pdrop_on == "matrices"  # then the rows that are given are of `dropped_wte`
        wpe = self.wpe  # [n_ctx, D]
        if whole and seed:
            wpe = dropout(ops.convert_to_tensor(wpe), self.config.embd_pdrop, seed.whole(2))
        x = (self.embed(tokens) if rows is None else rows) + look_up(wpe, where)
        x = dropout(ops.cast(x, self.compute_dtype), self.config.embd_pdrop, None if whole else seed)  # [B, T, D]
        tpu = past is None and start is None and attention.usable(t, self.config)
        present = []
        for i, block in enumerate(self.blocks):
            options = dict(bias=bias, tpu=tpu, seed=seed and seed.child(4 * i + 4))
            if training and self.remat:
                x = keras.remat(lambda x, block=block, options=options: block(x, **options)[0])(x)
            else:
                x, layer_present = block(x, past=past and past[i], position=position, **options)
                present.append(layer_present)
        return self.ln_f(x), present

    def dropped_wte(self, seed):
        """wte [V, D]; where dropout is on whole matrices, with entries of it dropped: one mask for the whole batch."""
        wte = ops.convert_to_tensor(self.wte)
        if self.config.embd_pdrop_on != "matrices":
            return wte
        return dropout(wte, self.config.embd_pdrop, seed.whole(1))

    def embed(self, tokens):
        """The rows of wte of some tokens: [B, T] -> [B, T, D]."""
        if not self.int8:
            return look_up(self.wte, tokens)
        return ops.cast(ops.take(self.wte, tokens, axis=0), "float32") * ops.take(self.wte_scale, tokens)[..., None]

    def logits(self, h):
        """[B, T, D] -> [B, T, V] by the transpose of wte, in float32 under every dtype policy."""
        if self.int8 or _one_row.get()[0] is not None:
            flat = _multiply(ops.reshape(h, (-1, h.shape[-1])), self.wte, self.wte_scale if self.int8 else None)
            return ops.reshape(flat, (*ops.shape(h)[:-1], self.config.n_vocab))
        return ops.matmul(h, ops.transpose(ops.cast(self.wte, "float32")))

    def call(self, tokens, past=None, position=0, start=None, training=False, seed=None):
        """Logits of the next token at every position.

        Args:
            tokens: [B, T] int32.
            past: a cache from `empty_cache` or an earlier call, with `position` of its S places filled.
            position: how many positions came before these tokens.
            start: [B] int32, the first position of each row that counts, for prompts padded on the left.
            training: apply dropout.
            seed: `FixedSeed` of the dropout; None: the model's own stream of seeds.

        Returns: logits [B, T, V] float32; with a `past`, (logits, present), present being the cache with these tokens.
        """
        rows, logits = None, self.logits
        if training and self.config.embd_pdrop_on == "matrices":
            seed = seed or FixedSeed(*ops.unstack(self.dropout_seed.next()))
            wte = self.dropped_wte(seed)
            rows, logits = look_up(wte, tokens), lambda h: ops.matmul(h, ops.transpose(ops.cast(wte, "float32")))
        h, present = self.hidden(tokens, past, position, start, training, seed, rows)
        return logits(h) if past is None else (logits(h), present)


def quantized(model) -> GPT2:
    """The same model with its matrices in 8 bits, a quarter of the memory of float32: for generation and evaluation.

    Each column of a kernel and each row of wte has the scale that its largest entry needs; norms, biases and wpe stay
    as they are, and so do activations.
    """
    values = {v.path: v.value for v in model.weights}
    return GPT2(model.config, init=lambda path, _: np.asarray(values[path]), dtype=model.dtype_policy, int8=True)


@fused
def _norm_forward(x, g, b):
    centred = x - ops.mean(x, axis=-1, keepdims=True)
    scale = ops.rsqrt(ops.mean(ops.square(centred), axis=-1, keepdims=True) + 1e-5)
    normed = centred * scale
    return normed * g + b, normed, scale


@fused
def _norm_gradients(normed, scale, g, upstream):
    axes = tuple(range(len(normed.shape) - 1))
    slope = upstream * g
    back = slope - ops.mean(slope, axis=-1, keepdims=True) - normed * ops.mean(slope * normed, axis=-1, keepdims=True)
    return scale * back, ops.sum(upstream * normed, axis=axes), ops.sum(upstream, axis=axes)


def layer_norm(x, g, b):
    """Layer normalisation of x [..., D] over its last axis, epsilon 1e-5, times g [D], plus b [D]."""

    def forward(x, g, b):
        y, normed, scale = _norm_forward(x, g, b)
        return y, (normed, scale, g)

    return with_gradient(forward, lambda kept, upstream: _norm_gradients(*kept, upstream))(x, g, b)


@fused
def _gelu_and_slope(x):
    a, b = 2 * math.sqrt(2 / math.pi), 2 * math.sqrt(2 / math.pi) * 0.044715
    z = ops.cast(x, "float32")
    square = z * z
    s = ops.sigmoid(z * (a + b * square))
    y = z * s
    return ops.cast(y, x.dtype), ops.cast(s + y * (1 - s) * (a + 3 * b * square), x.dtype)


def gelu(x):
    """OpenAI's GELU: x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))) / 2, here x sigmoid(2 sqrt(2 / pi) (...)).

    In float32 inside; of all that, only the slope is kept for the gradient.
    """

    return with_gradient(_gelu_and_slope, lambda slope, upstream: (upstream * slope,))(x)


def look_up(table, rows):
    """Rows of a table, with a dense gradient: [R, D], int [...] -> [..., D].

    TensorFlow's own gradient is IndexedSlices, which would swallow the dense one that wte has as the output matrix.
    """

    tick, _ = _one_row.get()
    if tick is not None:
        return ops.take(_changing(ops.convert_to_tensor(table), tick), rows, axis=0)
    dense = with_gradient(lambda x: (ops.copy(x), ()), lambda _, upstream: (ops.reshape(upstream, table.shape),))
    return ops.take(dense(ops.copy(table)), rows, axis=0)


def nll(logits, labels):
    """Negative log-likelihood of each label in nats: [B, T, V], [B, T] -> [B, T] float32."""
    return ops.sparse_categorical_crossentropy(labels, logits, from_logits=True)
