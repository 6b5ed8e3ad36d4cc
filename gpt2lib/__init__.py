"""gpt2lib: GPT-2, Adafactor and their training, for a reproduction study that anyone can run again."""

import glob
import importlib.util
import os


def _has(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


# Keras asks for TensorFlow unless told otherwise; a TPU runtime has none, and could not use its TPU with it.
if _has("jax") and (not _has("tensorflow") or (_has("libtpu") and glob.glob("/dev/accel*"))):
    os.environ.setdefault("KERAS_BACKEND", "jax")
