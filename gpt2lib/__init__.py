"""gpt2lib: GPT-2, Adafactor and their training, for a reproduction study that anyone can run again."""

import glob
import importlib.util
import os


def _has(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


# Keras asks for TensorFlow unless told otherwise; a TPU runtime has none, and could not use its TPU with it.
if _has("jax") and (not _has("tensorflow") or (_has("libtpu") and glob.glob("/dev/accel*"))):
    os.environ.setdefault("KERAS_BACKEND", "jax")

# Unless told otherwise XLA takes half of a vector on a CPU with AVX-512, which holds up products in bfloat16. It reads
# this once, when first used. XLA_FLAGS may also name a file with flags.
_flags, _width = os.environ.get("XLA_FLAGS", ""), "--xla_cpu_prefer_vector_width"
if _flags.lstrip()[:1] in ("", "-") and _width not in _flags:
    os.environ["XLA_FLAGS"] = f"{_flags} {_width}=512".strip()
