"""Causal self-attention as one TPU kernel, forward and backward, with dropout: nothing of [T, S] goes to memory.

A TPU's memory is slow beside its matrix units, and scores, weights, their masks and their gradients are most of what a
step would move. Here each program of the kernel has the queries, keys and values of a whole context for the heads that
share 128 lanes in fast memory, goes over them in blocks, and makes the weights again for the gradient (FlashAttention:
Dao et al. 2022, arXiv:2205.14135). Heads smaller than the lanes are told apart by masks, not moved.
"""

import concurrent.futures
import contextlib
import contextvars
import functools
import math
import warnings

from gpt2lib.seed import keep

_LANES = 128
_FLOAT32 = ("TPU v2", "TPU v3")  # whose matrix units take float32 and round it themselves


_target = contextvars.ContextVar("target", default=(None, False))


@contextlib.contextmanager
def target(mesh, alone: bool):
    """Inside, programs are made for the devices of a mesh with the one axis `data`, over which a batch is spread.

    `alone`: the program is that of one device, with its part of the batch (inside `jax.shard_map`).
    """
    token = _target.set((mesh, alone))
    try:
        yield
    finally:
        _target.reset(token)


def platform() -> str:
    """What the program is made for: cpu, gpu or tpu."""
    import jax

    mesh, _ = _target.get()
    return mesh.devices.flat[0].platform if mesh else jax.default_backend()


def usable(t, config) -> bool:
    """Whether the program is made for TPUs and the kernel can take a context of t tokens."""
    mesh, _ = _target.get()
    if mesh is None or platform() != "tpu" or not fits(t, config.n_embd, config.n_head):
        return False
    return works(mesh.devices.flat[0])


@functools.cache
def works(device) -> bool:
    """Whether the kernel runs on a device, tried once; True for one that is not there, whose compiler will say.

    Kernels are in a language of their own, whose version the runtime's libtpu may not know. Then attention is written
    out, with a warning.
    """
    import jax
    import numpy as np

    if device not in jax.devices():
        return True

    def attempt():
        with target(jax.sharding.Mesh(np.array([device]), ("data",)), alone=True):
            qkv = jax.device_put(np.zeros((1, _LANES, 3 * _LANES), np.float32), device)
            jax.jit(lambda x: attend(x, 1))(qkv).block_until_ready()

    try:
        with concurrent.futures.ThreadPoolExecutor(1) as thread:  # away from the program that is being traced
            thread.submit(attempt).result()
    except Exception as error:
        warnings.warn(
            f"the attention kernel does not run on {device.device_kind} with jax {jax.__version__}: steps are slower "
            f"and need more memory: {str(error).splitlines()[0][:200]}",
            stacklevel=2,
        )
        return False
    return True


def fits(t: int, d: int, n_head: int) -> bool:
    """Whether the kernel can take a context of t tokens with n_head heads in d."""
    return t % _LANES == 0 and t <= 2048 and _LANES % (d // n_head) == 0


def attend(qkv, n_head: int, rate: float = 0.0, seed=None, interpret: bool = False):
    """softmax(q k / sqrt(H), causal) v of all heads, with dropout of `rate` on the weights: [B, T, 3D] -> [B, T, D].

    Args:
        qkv: queries, keys and values side by side, as `c_attn` gives them.
        seed: `FixedSeed` of the dropout, whose masks are those of `model.dropout`; None: no dropout.
        interpret: run the kernel step by step, on any machine.
    """
    import jax
    from jax import numpy
    from jax.sharding import PartitionSpec

    (b, t, _), rate = qkv.shape, rate if seed is not None else 0.0
    heads = numpy.arange(b * n_head, dtype="int32").reshape(b, n_head)
    keys = seed.key() + t * (heads + n_head * seed.row) if rate else heads
    mesh, alone = _target.get()
    kind = "float32" if mesh is not None and mesh.devices.flat[0].device_kind in _FLOAT32 else str(qkv.dtype)
    run = _function(n_head, rate, kind, interpret)
    if mesh is not None and not alone:
        data = PartitionSpec("data")
        run = jax.shard_map(run, mesh=mesh, in_specs=(data, data), out_specs=data, check_vma=False)
    return run(qkv, keys)


@functools.cache
def _function(n_head, rate, kind, interpret):
    """`f(qkv [B, T, 3D], keys [B, N]) -> [B, T, D]` with its gradient."""
    import jax
    from jax import numpy

    call = functools.partial(_call, n_head=n_head, rate=rate, kind=kind, interpret=interpret)

    def forward(qkv, keys):
        out, stats = call(_forward, keys, _split(qkv), outputs=1)
        return out, (qkv, keys, out, stats)

    def backward(kept, upstream):
        qkv, keys, out, stats = kept
        parts = call(_backward, keys, [*_split(qkv), (out, 0), (upstream, 0)], stats, outputs=3)
        return numpy.concatenate(parts, axis=-1), None

    attention = jax.custom_vjp(lambda qkv, keys: forward(qkv, keys)[0])
    attention.defvjp(forward, backward)
    return attention


def _split(qkv):
    """(array, its first block of 128 lanes) of queries, keys, values: three times qkv itself where they are aligned."""
    d = qkv.shape[-1] // 3
    if d % _LANES == 0:
        return [(qkv, part * d // _LANES) for part in range(3)]
    return [(qkv[..., part * d : (part + 1) * d], 0) for part in range(3)]


def _call(kernel, keys, inputs, stats=None, *, outputs, n_head, rate, kind, interpret):
    """What a kernel gives, arrays [B, T, D]: one program for each sequence and 128 lanes of heads.

    The forward kernel also gives, and the other one takes, log(sum(exp(scores))) of head n in lane n: [B, T, 128].
    """
    import jax
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import tpu as pltpu

    (b, t, width), dtype = inputs[0][0].shape, inputs[0][0].dtype
    d = width // 3 if inputs[1][1] else width
    size, block = d // n_head, 256 if t % 256 == 0 else _LANES

    def spec(first):
        return pl.BlockSpec((1, t, _LANES), lambda b, part: (b, 0, first + part))

    every = pl.BlockSpec((1, t, _LANES), lambda b, part: (b, 0, 0))
    out_shapes, out_specs = [jax.ShapeDtypeStruct((b, t, d), dtype)] * outputs, [spec(0)] * outputs
    if stats is None:
        out_shapes, out_specs = [*out_shapes, jax.ShapeDtypeStruct((b, t, _LANES), "float32")], [*out_specs, every]
    # the lower triangle in blocks; two products forward, five backward
    places = b * n_head * t * (t + block) // 2
    cost = pl.CostEstimate(
        flops=(4 if stats is None else 10) * places * size,
        bytes_accessed=b * t * (d * dtype.itemsize * (len(inputs) + outputs) + 4 * _LANES),
        transcendentals=places,
    )
    return pl.pallas_call(
        functools.partial(kernel, n_head, size, block, rate, kind),
        grid=(b, -(-d // _LANES)),
        in_specs=[
            pl.BlockSpec(memory_space=pltpu.SMEM),
            *(spec(first) for _, first in inputs),
            *([] if stats is None else [every]),
        ],
        out_specs=out_specs,
        out_shape=out_shapes,
        scratch_shapes=[] if stats is None else [pltpu.VMEM((t, _LANES), "float32")] * 2,
        cost_estimate=cost,
        interpret=interpret,
    )(keys, *(array for array, _ in inputs), *([] if stats is None else [stats]))


def _product(a, b, axis_a, axis_b):
    """a and b multiplied and summed over an axis of each, in float32."""
    from jax import lax

    return lax.dot_general(a, b, (((axis_a,), (axis_b,)), ((), ())), preferred_element_type="float32")


def _heads(n_head, size, keys):
    """(key of its dropout, [1, 128] which lanes it has, [1, 128] which lane has its stats) of this program's heads."""
    from jax import lax, numpy
    from jax.experimental import pallas as pl

    first = pl.program_id(1) * (_LANES // size)
    lane = lax.broadcasted_iota("int32", (1, _LANES), 1)
    numbers = [first + i for i in range(_LANES // size)]
    return [  # the last program may have lanes of no head, with anything in them
        (
            keys[pl.program_id(0), numpy.minimum(number, n_head - 1)],
            (lane // size == i) & (number < n_head),
            lane == number,
        )
        for i, number in enumerate(numbers)
    ]


def _of(lanes, array, rows):
    """Rows of a block in float32, 0 outside some lanes."""
    from jax import numpy

    return numpy.where(lanes, array[0, rows, :].astype("float32"), 0)


def _scores(q, k, i, j, key, rate):
    """Scores of the i-th block of queries and the j-th of keys, [R, R] float32; which of them dropout keeps."""
    from jax import lax, numpy

    scores = _product(q, k, 1, 1)
    row = i * scores.shape[0] + lax.broadcasted_iota("int32", (scores.shape[0], 1), 0)
    column = j * scores.shape[1] + lax.broadcasted_iota("int32", scores.shape, 1)
    return numpy.where(column <= row, scores, -1e10), keep(key, row, column, rate) if rate else True


def _forward(n_head, size, block, rate, kind, keys, q, k, v, out, stats):
    from jax import lax, numpy
    from jax.experimental import pallas as pl

    heads = _heads(n_head, size, keys)

    def queries(i, _):
        here, result = pl.ds(i * block, block), numpy.zeros((block, _LANES), "float32")
        for key, lanes, lane in heads:
            its_q = (_of(lanes, q, here) / math.sqrt(size)).astype(kind)

            def more(j, state, key=key, lanes=lanes, its_q=its_q):  # softmax and sum, as far as the j-th block
                there, (top, total, part) = pl.ds(j * block, block), state
                scores, kept = _scores(its_q, _of(lanes, k, there).astype(kind), i, j, key, rate)
                higher = numpy.maximum(top, numpy.max(scores, axis=-1, keepdims=True))
                weights, less = numpy.exp(scores - higher), numpy.exp(top - higher)
                total = total * less + numpy.sum(weights, axis=-1, keepdims=True)
                weights = numpy.where(kept, weights, 0).astype(kind)
                return higher, total, part * less + _product(weights, _of(lanes, v, there).astype(kind), 1, 0)

            start = numpy.full((block, 1), -1e30), numpy.zeros((block, 1)), numpy.zeros((block, _LANES))
            top, total, part = lax.fori_loop(0, i + 1, more, start)
            result += part / (total * (1 - rate))
            stats[0, here, :] = numpy.where(lane, top + numpy.log(total), stats[0, here, :])
        out[0, here, :] = result.astype(out.dtype)
        return 0

    lax.fori_loop(0, q.shape[1] // block, queries, 0)


def _backward(n_head, size, block, rate, kind, keys, q, k, v, out, upstream, stats, dq, dk, dv, dk_sum, dv_sum):
    from jax import lax, numpy
    from jax.experimental import pallas as pl

    heads = _heads(n_head, size, keys)
    dk_sum[...], dv_sum[...] = numpy.zeros(dk_sum.shape, "float32"), numpy.zeros(dv_sum.shape, "float32")

    def queries(i, _):
        here, result = pl.ds(i * block, block), numpy.zeros((block, _LANES), "float32")
        for key, lanes, lane in heads:
            its_q, up = (_of(lanes, q, here) / math.sqrt(size)).astype(kind), _of(lanes, upstream, here)
            # the sum over keys of weight times slope, by what came out (appendix B.2 of the paper)
            mean = numpy.sum(up * _of(lanes, out, here), axis=-1, keepdims=True)
            logs = numpy.sum(_of(lane, stats, here), axis=-1, keepdims=True)
            up = up.astype(kind)

            def more(j, dq, key=key, lanes=lanes, its_q=its_q, up=up, mean=mean, logs=logs):
                there = pl.ds(j * block, block)
                its_k, its_v = _of(lanes, k, there).astype(kind), _of(lanes, v, there).astype(kind)
                scores, kept = _scores(its_q, its_k, i, j, key, rate)
                weights, slope = numpy.exp(scores - logs), _product(up, its_v, 1, 1)
                dv_sum[there, :] += _product(numpy.where(kept, weights / (1 - rate), 0).astype(kind), up, 0, 0)
                slope = weights * (numpy.where(kept, slope / (1 - rate), 0) - mean)  # of the scores
                dk_sum[there, :] += _product(slope.astype(kind), its_q, 0, 0)
                return dq + _product(slope.astype(kind), its_k, 1, 0)

            result += lax.fori_loop(0, i + 1, more, numpy.zeros((block, _LANES))) / math.sqrt(size)
        dq[0, here, :] = result.astype(dq.dtype)
        return 0

    lax.fori_loop(0, q.shape[1] // block, queries, 0)
    dk[0], dv[0] = dk_sum[...].astype(dk.dtype), dv_sum[...].astype(dv.dtype)
