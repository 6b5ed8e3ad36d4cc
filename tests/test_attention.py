"""The TPU's attention kernel, interpreted step by step, against attention as `model.py` writes it; dropout's masks."""

import os
import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pytest
from conftest import relative_error

from gpt2lib.config import ModelConfig
from gpt2lib.seed import FixedSeed

if keras.backend.backend() != "jax":
    pytest.skip("of the JAX backend", allow_module_level=True)

import jax
from jax import numpy

from gpt2lib import attention
from gpt2lib.model import Attention, dropout
from gpt2lib.seed import keep, mixed

SEED = (3, 5)


def written_out(t, d, n_head, rate, dtype):
    """`f(qkv [B, T, 3D]) -> [B, T, D]` by the layer itself, whose linear maps are left out."""
    config = ModelConfig(n_vocab=7, n_ctx=t, n_embd=d, n_head=n_head, n_layer=1, attn_pdrop=rate)
    layer = Attention("attn", config, lambda path, shape: np.zeros(shape, np.float32), keras.DTypePolicy(dtype))
    layer.build((None, t, d))
    bias = numpy.where(np.tril(np.ones((t, t), bool)), 0.0, -1e10)

    def run(qkv):
        q, k, v = (layer.split_heads(part) for part in numpy.split(qkv, 3, axis=-1))
        return layer.attend(q, k, v, bias, FixedSeed(*SEED))

    return run


def case(b, t, d, dtype):
    random = np.random.default_rng(t + d)
    return (numpy.asarray(random.standard_normal((b, t, width)), dtype) for width in (3 * d, d))


@pytest.mark.parametrize(
    "t, d, n_head",
    [
        (128, 128, 2),  # one block, two heads of 64 side by side
        (256, 192, 3),  # width that 128 lanes do not divide, as in 1.5B
        (384, 128, 1),  # three blocks, one head that has all lanes
        (512, 64, 2),  # two blocks of 256, lanes that no head has
    ],
)
@pytest.mark.parametrize("rate", [0.0, 0.25])
def test_kernel_is_attention(t, d, n_head, rate):
    """Values and gradients in float32, with dropout too: both have the same masks."""
    qkv, upstream = case(2, t, d, "float32")
    expected, back = jax.vjp(written_out(t, d, n_head, rate, "float32"), qkv)
    out, kernel_back = jax.vjp(lambda qkv: attention.attend(qkv, n_head, rate, FixedSeed(*SEED), interpret=True), qkv)
    assert relative_error(out, expected) < 1e-6
    assert relative_error(kernel_back(upstream)[0], back(upstream)[0]) < 1e-6


def test_kernel_in_bfloat16():
    """As near to float32 as attention without it is."""
    qkv, upstream = case(2, 256, 128, "bfloat16")
    runs = {
        "exact": (written_out(256, 128, 2, 0.25, "float32"), "float32"),
        "written out": (written_out(256, 128, 2, 0.25, "bfloat16"), "bfloat16"),
        "kernel": (lambda x: attention.attend(x, 2, 0.25, FixedSeed(*SEED), interpret=True), "bfloat16"),
    }
    found = {}
    for name, (run, dtype) in runs.items():
        out, back = jax.vjp(run, qkv.astype(dtype))
        found[name] = np.float32(out), np.float32(back(upstream.astype(dtype))[0])
    for i in range(2):
        error, theirs = (relative_error(found[name][i], found["exact"][i]) for name in ("kernel", "written out"))
        assert error < 1.5 * theirs < 0.02


DEVICES = """
import sys
import jax, numpy as np
from gpt2lib import attention
from gpt2lib.seed import FixedSeed
sys.path.insert(0, sys.argv[1])
from test_attention import case

mesh = jax.sharding.Mesh(np.array(jax.devices()), ("data",))
qkv, _ = case(4, 128, 128, "float32")
outs = [attention.attend(qkv, 2, 0.25, FixedSeed(3, 5), interpret=True)]
with attention.target(mesh, alone=False):
    outs += [attention.attend(qkv, 2, 0.25, FixedSeed(3, 5), interpret=True)]
alone = [attention.attend(qkv[i : i + 1], 2, 0.25, FixedSeed(3, 5, i), interpret=True) for i in range(4)]
outs += [jax.numpy.concatenate(alone)]
print(len(jax.devices()), float(max(abs(outs[0] - other).max() for other in outs[1:]) / abs(outs[0]).max()))
"""


def test_kernel_over_devices():
    """Each device has its own sequences, with the masks that they have on one device."""
    environment = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=4"}
    done = subprocess.run(
        [sys.executable, "-c", DEVICES, str(Path(__file__).parent)], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    devices, difference = done.stdout.split()
    assert devices == "4" and float(difference) < 1e-6


def test_what_the_kernel_takes():
    assert attention.fits(1024, 768, 12) and attention.fits(1024, 1600, 25) and attention.fits(256, 64, 2)
    assert not attention.fits(19, 15, 3) and not attention.fits(1000, 768, 12) and not attention.fits(4096, 768, 12)
    assert not attention.fits(1024, 768, 8), "a head of 96 lanes"


def test_a_device_that_cannot_run_it():
    """A CPU runs it interpreted only: one warning, and attention is written out; also while a program is traced."""

    def program(x):
        found.append(attention.works(jax.devices()[0]))
        return x

    found = []
    attention.works.cache_clear()
    with pytest.warns(UserWarning, match="attention kernel does not run on cpu with jax"):
        jax.jit(program)(numpy.zeros(3))
    assert found == [False] and attention.works(jax.devices()[0]) is False
    assert attention.works("a device of another machine")


# --- masks ------------------------------------------------------------------------------------------------------------


def test_mixing_is_murmur3s():
    """fmix32 of MurmurHash3, in Python's integers; it is a bijection."""

    def fmix32(x):
        for bits, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
            x = ((x ^ (x >> bits)) * factor) % 2**32
        return x ^ (x >> 16)

    numbers = np.array([0, 1, 2, 12345, 2**31 - 1, 2**31, 2**32 - 1], np.uint32)
    mixed_here = np.asarray(mixed(numpy.asarray(numbers.view(np.int32)))).view(np.uint32)
    assert mixed_here.tolist() == [fmix32(int(x)) for x in numbers]
    assert len(np.unique(np.asarray(mixed(numpy.arange(100_000, dtype="int32"))))) == 100_000


@pytest.mark.parametrize("rate", [0.1, 0.5])
def test_masks_look_random(rate):
    """Share, runs, neighbours in rows and columns, other keys: each within five standard deviations."""
    rows, columns = np.arange(512, dtype=np.int32)[:, None], np.arange(1024, dtype=np.int32)
    masks = [np.asarray(keep(np.int32(key), rows, columns, rate), float) for key in (0, 1, 512, -7)]
    n = rows.size * columns.size
    for mask in masks:
        assert abs(mask.mean() - (1 - rate)) < 5 * np.sqrt(rate * (1 - rate) / n)
        assert np.ptp(mask.mean(0)) < 12 * np.sqrt(rate * (1 - rate) / rows.size)
        assert np.ptp(mask.mean(1)) < 12 * np.sqrt(rate * (1 - rate) / columns.size)
        pairs = [
            (mask[1:], mask[:-1]),
            (mask[:, 1:], mask[:, :-1]),
            (mask[:, 7:], mask[:, :-7]),
            (mask[1:, 1:], mask[:-1, :-1]),
        ]
        pairs += [(mask, other) for other in masks if other is not mask]
        for a, b in pairs:
            assert abs(np.corrcoef(a.ravel(), b.ravel())[0, 1]) < 5 / np.sqrt(n)


def test_dropout_makes_its_mask_again():
    """The gradient has the mask of the value, inside a compiled program as well."""
    x = numpy.asarray(np.random.default_rng(0).standard_normal((3, 5, 7)), "float32")
    y, back = jax.vjp(jax.jit(lambda x: dropout(x, 0.25, FixedSeed(*SEED))), x)
    np.testing.assert_allclose(y, x * back(numpy.ones_like(x))[0], rtol=1e-6)
    assert set(np.unique(back(numpy.ones_like(x))[0])) == {0.0, np.float32(1 / 0.75)}
