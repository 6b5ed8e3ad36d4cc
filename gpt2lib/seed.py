"""Randomness as a pure function of two integers, so that nothing about it has to be saved."""

import keras
from keras import ops


class FixedSeed(keras.random.SeedGenerator):
    """A seed of two integers, which may be tensors of a compiled step or loop; it has no state and never changes."""

    def __init__(self, first, second, row=0):
        """`row`: the number in the whole batch of the first sequence at hand, where a device has some of them (JAX)."""
        dtype = "uint32" if keras.backend.backend() == "jax" else "int64"  # what Keras' generators draw from
        self.pair, self.row = ops.stack([ops.cast(first, dtype), ops.cast(second, dtype)]), row

    def next(self, ordered=True):
        return self.pair

    def child(self, n: int):
        """Independent randomness for the n-th place that needs some."""
        return FixedSeed(self.pair[0] + ops.cast(n * 0x9E3779B1 % 2**32, self.pair.dtype), self.pair[1], self.row)

    def whole(self, n: int):
        """As `child`, for what is the same for all sequences of the batch, on whatever device."""
        place = ops.cast((n * 0x85EBCA6B + 1) % 2**32, self.pair.dtype)
        return FixedSeed(self.pair[0] + place, self.pair[1])

    def key(self):
        """The two integers as one int32 that looks random (JAX)."""
        from jax import lax

        first, second = lax.bitcast_convert_type(self.pair, "int32")
        return mixed(mixed(first) + second)


def mixed(x):
    """int32 -> int32: a bijection that leaves no pattern of x (the finalizer of Appleby's MurmurHash3). JAX."""
    from jax import lax, numpy

    for bits, factor in ((16, -0x7A143595), (13, -0x3D4D51CB)):
        x = (x ^ lax.shift_right_logical(x, numpy.full_like(x, bits))) * factor
    return x ^ lax.shift_right_logical(x, numpy.full_like(x, 16))


def keep(key, row, column, rate):
    """Which entries of an array dropout keeps, from int32 numbers of its rows and columns, which broadcast. JAX.

    A few operations an entry, the same in every program and on every device, so that a gradient makes the mask again.
    """
    from jax import lax, numpy

    bits = mixed(mixed(key + row) + column)
    return lax.shift_right_logical(bits, numpy.full_like(bits, 8)) >= int(rate * 2**24)
