"""What all tests share: a quiet start, the golden values, and how far two arrays are apart."""

import atexit
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
