"""Randomness as a pure function of two integers, so that nothing about it has to be saved."""

import keras
from keras import ops


class FixedSeed(keras.random.SeedGenerator):
    """A seed of two integers, which may be tensors of a compiled step or loop; it has no state and never changes."""

    def __init__(self, first, second):
        dtype = "uint32" if keras.backend.backend() == "jax" else "int64"  # what Keras' generators draw from
        self.pair = ops.stack([ops.cast(first, dtype), ops.cast(second, dtype)])

    def next(self, ordered=True):
        return self.pair

    def child(self, n: int):
        """Independent randomness for the n-th place that needs some."""
        return FixedSeed(self.pair[0] + ops.cast(n * 0x9E3779B1 % 2**32, self.pair.dtype), self.pair[1])
