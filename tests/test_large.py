"""Full sizes: built and read in seconds, written as OpenAI wrote them, and every check of the released weights runs."""

import json
import time

import numpy as np
import pytest

from gpt2lib.checkpoint import load_openai, openai_shapes, save_openai
from gpt2lib.config import SIZES
from gpt2lib.evaluate import port
from gpt2lib.model import GPT2


@pytest.mark.slow
def test_117m_is_built_written_and_read(tmp_path, golden):
    started = time.perf_counter()
    model = GPT2(SIZES["117M"])
    assert time.perf_counter() - started < 10
    assert model.count_params() == 124_439_808
    save_openai(model, tmp_path / "117M")
    data = tmp_path / "117M" / "model.ckpt.data-00000-of-00001"
    assert data.stat().st_size == 497_759_232

    started = time.perf_counter()
    again = load_openai(tmp_path / "117M")
    assert time.perf_counter() - started < 5
    for ours, theirs in zip(model.trainable_variables, again.trainable_variables, strict=True):
        np.testing.assert_array_equal(np.asarray(ours.value), np.asarray(theirs.value), err_msg=ours.path)

    # Every variable lies where the genuine index has it: names, shapes, offsets and sizes.
    tensors = json.loads((golden / "openai-124M" / "tensors.json").read_text())
    flat = np.memmap(data, np.uint8, mode="r")
    shapes = openai_shapes(SIZES["117M"])
    values = {v.path: np.asarray(v.value) for v in model.trainable_variables}
    assert len(tensors) == len(shapes) == 148
    for name, entry in tensors.items():
        start, size = entry["offset"], entry["size"]
        assert tuple(entry["shape"]) == shapes[name], name
        assert flat[start : start + size].tobytes() == values[name].tobytes(), name


@pytest.mark.slow
@pytest.mark.parametrize(("size", "parameters"), [("345M", 354_823_168), ("PrettyBig", 367_419_392)])
def test_larger_ones_round_trip(tmp_path, size, parameters):
    model = GPT2(SIZES[size])
    assert model.count_params() == parameters
    save_openai(model, tmp_path / size)
    assert (tmp_path / size / "model.ckpt.data-00000-of-00001").stat().st_size == 4 * parameters
    again = load_openai(tmp_path / size)
    assert again.config.hparams == SIZES[size].hparams
    for ours, theirs in zip(model.trainable_variables, again.trainable_variables, strict=True):
        np.testing.assert_array_equal(np.asarray(ours.value), np.asarray(theirs.value), err_msg=ours.path)


@pytest.mark.slow
@pytest.mark.parametrize("size", ["117M", "345M"])
def test_every_check_of_the_released_weights_runs(size):
    """With other weights of the same shape: what depends on the weights fails, all else passes."""
    checks = port.released(GPT2(SIZES[size]), size)
    passed = [check.passed for check in checks]
    assert passed == [True, True] + [False] * (len(checks) - 2)
    assert len(checks) == (2 + 2 + 4 + 1 + 2 * 5 + 1 + 3 + 2 if size == "117M" else 2 + 2)
    assert all(np.isfinite(check.difference) for check in checks)
