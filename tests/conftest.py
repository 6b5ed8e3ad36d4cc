"""What all tests share: a quiet start, the golden values, and how far two arrays are apart."""

import atexit
import json
import os
import shutil
import tempfile
from pathlib import Path

import numpy as np
import pytest

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # before anything imports TensorFlow
os.environ.setdefault("KERAS_BACKEND", "tensorflow")
# JAX compiles for seconds what the tests run for milliseconds, and many tests compile the same step again.
_compiled = tempfile.mkdtemp(prefix="gpt2lib-tests-")
atexit.register(shutil.rmtree, _compiled, ignore_errors=True)
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", _compiled)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def golden() -> Path:
    """The folder of recorded values; see its README."""
    return ROOT / "tests" / "golden"


@pytest.fixture(scope="session")
def shared_golden() -> Path:
    """The folder of recorded values that are too large to be kept here; tests skip where it is absent."""
    return ROOT.parent / "shared" / "golden"


@pytest.fixture(scope="session")
def learnt():
    """(model, tokenizer, stories) after a few steps: it guesses some words, and stories are longer than its context."""
    import keras

    from gpt2lib.config import ModelConfig
    from gpt2lib.model import GPT2
    from gpt2lib.tokenizer import Tokenizer

    lines = (ROOT / "tests" / "corpus" / "stories.jsonl").read_text().splitlines()
    stories = [json.loads(line)["text"] for line in lines]
    tokenizer, n_ctx = Tokenizer.train(stories, 400), 24
    model = GPT2(ModelConfig(400, n_ctx, 32, 2, 2, embd_pdrop=0.0, attn_pdrop=0.0, resid_pdrop=0.0))
    ids = np.array([i for story in stories for i in [tokenizer.end_of_text, *tokenizer.encode(story)]], np.int32)
    starts = np.random.default_rng(0).integers(0, len(ids) - n_ctx - 1, (150, 16))
    model.compile(
        optimizer=keras.optimizers.AdamW(3e-3), loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    )
    losses = []
    for some in starts:
        windows = ids[some[:, None] + np.arange(n_ctx + 1)]
        losses.append(float(model.train_on_batch(windows[:, :-1], windows[:, 1:])))
    assert losses[-1] < losses[0] - 1, "it learnt nothing"
    return model, tokenizer, stories


def relative_error(a, b) -> float:
    """The largest difference between a and b, as a part of the largest entry of b."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    assert a.shape == b.shape, f"{a.shape} is not {b.shape}"
    return float(np.max(np.abs(a - b)) / np.max(np.abs(b)))


def assert_same_bits(a: dict, b: dict):
    """Arrays of the same names, types, shapes and bytes."""
    assert a.keys() == b.keys()
    for name in a:
        assert (a[name].dtype, a[name].shape) == (b[name].dtype, b[name].shape), name
        assert a[name].tobytes() == b[name].tobytes(), name
