"""gpt2lib: GPT-2, Adafactor and their training, for a reproduction study that anyone can run again."""

import importlib.util
import os

# Keras asks for TensorFlow unless told otherwise, and a TPU runtime has none.
if importlib.util.find_spec("tensorflow") is None and importlib.util.find_spec("jax") is not None:
    os.environ.setdefault("KERAS_BACKEND", "jax")
