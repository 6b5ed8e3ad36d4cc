"""Checkpoints: OpenAI's layout to the bit; training checkpoints that outlive what happens to disks."""

import errno
import functools
import http.server
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import threading
import warnings
from pathlib import Path

import keras
import numpy as np
import pytest
from conftest import ROOT, assert_same_bits
from literal import distinctive

from gpt2lib import checkpoint
from gpt2lib.adafactor import Adafactor
from gpt2lib.checkpoint import CheckpointError, fingerprint, load_openai, openai_shapes, save_openai
from gpt2lib.config import SIZES, ConfigError, ModelConfig, TrainConfig
from gpt2lib.device import places
from gpt2lib.fetch import FetchError
from gpt2lib.model import GPT2, quantized
from gpt2lib.step import make_step

DATA = "model.ckpt.data-00000-of-00001"
writes_tf1 = pytest.mark.skipif(importlib.util.find_spec("tensorflow") is None, reason="TensorFlow is not installed")
OTHER = {"tensorflow": "jax", "jax": "tensorflow"}[keras.backend.backend()]


def arrays_of(model) -> dict:
    return {v.path: np.asarray(v.value) for v in model.trainable_variables}


def sentence(error) -> str:
    """The message of an error, which must be one line."""
    text = str(error.value)
    assert "\n" not in text
    return text


def without(*names) -> str:
    """Code that makes packages look as if they were not installed."""
    return f"""
import sys
from importlib.machinery import PathFinder
find = PathFinder.find_spec
PathFinder.find_spec = lambda name, *rest: None if name.split(".")[0] in {names} else find(name, *rest)
"""


def python(code: str, *arguments, backend: str):
    """Run code in a fresh interpreter on a backend, warnings as errors in our own code; return what it prints."""
    environment = os.environ | {"KERAS_BACKEND": backend, "TF_CPP_MIN_LOG_LEVEL": "2", "PYTHONPATH": os.getcwd()}
    command = [sys.executable, "-c", code, *map(str, arguments)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.fixture
def copy(golden, tmp_path) -> Path:
    return shutil.copytree(golden / "openai-test", tmp_path / "model")


# --- OpenAI's layout --------------------------------------------------------------------------------------------------


@writes_tf1
def test_saving_writes_openais_bytes(golden, tmp_path):
    model = load_openai(golden / "openai-test")
    save_openai(model, tmp_path / "saved")
    for name in (DATA, "model.ckpt.index", "checkpoint"):
        assert (tmp_path / "saved" / name).read_bytes() == (golden / "openai-test" / name).read_bytes(), name
    written, original = (
        json.loads((f / "hparams.json").read_text()) for f in (tmp_path / "saved", golden / "openai-test")
    )
    assert written == original
    assert {path.name for path in tmp_path.iterdir()} == {"saved"}, "nothing stays beside it"


@writes_tf1
def test_round_trip_bit_for_bit(tmp_path):
    config = ModelConfig(n_vocab=101, n_ctx=13, n_embd=35, n_head=5, n_layer=12)  # h10 sorts before h2
    model = GPT2(config, init=distinctive)
    folder = tmp_path / "saved"
    save_openai(model, folder)
    save_openai(model, folder)  # once more over what is there
    again = load_openai(folder)
    assert again.config.hparams == config.hparams
    assert_same_bits(arrays_of(again), arrays_of(model))
    for path, value in arrays_of(model).items():
        np.testing.assert_array_equal(value, distinctive(path, value.shape))


@writes_tf1
def test_a_bfloat16_model_reads_and_writes_float32(golden, tmp_path):
    model = load_openai(golden / "openai-test", dtype="mixed_bfloat16")
    assert model.compute_dtype == "bfloat16"
    assert_same_bits(arrays_of(model), arrays_of(load_openai(golden / "openai-test")))
    save_openai(model, tmp_path / "saved")
    assert (tmp_path / "saved" / DATA).read_bytes() == (golden / "openai-test" / DATA).read_bytes()


WITHOUT_TENSORFLOW = (
    without("tensorflow")
    + """
import numpy as np
from gpt2lib.checkpoint import CheckpointError, load_openai, save_openai
model = load_openai(sys.argv[1])
np.savez(sys.argv[2], **{v.path: np.asarray(v.value) for v in model.trainable_variables})
try:
    save_openai(model, sys.argv[2] + ".folder")
except CheckpointError as error:
    print(error)
"""
)


def test_reading_needs_no_tensorflow(golden, tmp_path):
    out = python(WITHOUT_TENSORFLOW, golden / "openai-test", tmp_path / "read.npz", backend="jax")
    assert_same_bits(dict(np.load(tmp_path / "read.npz")), arrays_of(load_openai(golden / "openai-test")))
    assert "TensorFlow" in out and "pip install tensorflow" in out
    assert [path.name for path in tmp_path.iterdir()] == ["read.npz"]


def test_layout_of_117m_is_the_genuine_one(golden):
    genuine = json.loads((golden / "openai-124M" / "tensors.json").read_text())
    shapes = openai_shapes(SIZES["117M"])
    assert len(shapes) == 148
    offset = 0
    for name, shape in shapes.items():
        size = 4 * int(np.prod(shape))
        there = genuine[name]
        assert (list(shape), offset, size) == (there["shape"], there["offset"], there["size"]), name
        offset += size
    assert offset == 497_759_232
    assert shapes.keys() == genuine.keys()
    hparams = json.loads((golden / "openai-124M" / "hparams.json").read_text())
    assert hparams == SIZES["117M"].hparams


def test_the_genuine_index_has_these_names_and_shapes(golden, tmp_path):
    """Read by TensorFlow itself; a file with a hole stands for the 498 MB of weights."""
    tf = pytest.importorskip("tensorflow")
    shutil.copy(golden / "openai-124M" / "model.ckpt.index", tmp_path)
    with open(tmp_path / DATA, "wb") as file:
        file.truncate(497_759_232)
    there = tf.train.load_checkpoint(str(tmp_path / "model.ckpt")).get_variable_to_shape_map()
    assert {name: tuple(shape) for name, shape in there.items()} == openai_shapes(SIZES["117M"])


def test_checksums_of_the_genuine_index(golden):
    genuine = json.loads((golden / "openai-124M" / "tensors.json").read_text())
    for name, entry in checkpoint._read_index(golden / "openai-124M" / "model.ckpt.index").items():
        assert entry[3:] == tuple(genuine[name][part] for part in ("offset", "size", "masked_crc32c")), name


def test_a_damaged_variable_is_named(copy):
    """One bit of one number, where no length tells."""
    data = bytearray((copy / DATA).read_bytes())
    data[-5] ^= 1
    (copy / DATA).write_bytes(data)
    with pytest.raises(CheckpointError, match=r"`model/wte` in .* is damaged: .*; download it again") as error:
        load_openai(copy)
    sentence(error)


# --- OpenAI's address -------------------------------------------------------------------------------------------------


@pytest.fixture
def released(golden, tmp_path, monkeypatch):
    """A server that has the golden checkpoint and its vocabulary as if it were OpenAI's 117M."""
    served = shutil.copytree(golden / "openai-test", tmp_path / "served" / "124M")
    for name in (*checkpoint._RELEASED, *checkpoint.GPT2_SHA256):
        if not (served / name).exists():
            (served / name).write_text(name)

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args):
            super().__init__(*args, directory=str(served.parent))

        def log_message(self, *_):
            pass

    sums = {path.name: checkpoint.sha256_of(path) for path in served.iterdir()}
    monkeypatch.setattr(checkpoint, "_RELEASED", {name: sums[name] for name in checkpoint._RELEASED})
    monkeypatch.setattr(checkpoint, "GPT2_SHA256", {name: sums[name] for name in checkpoint.GPT2_SHA256})
    monkeypatch.setitem(checkpoint.SIZES, "124M", SIZES["test"])
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Quiet) as httpd:
        threading.Thread(target=httpd.serve_forever, args=(0.01,), daemon=True).start()
        monkeypatch.setattr(checkpoint, "OPENAI_URL", f"http://127.0.0.1:{httpd.server_port}/")
        yield served
        httpd.shutdown()


@pytest.mark.parametrize("size", ["117M", "124M"])
def test_download(released, golden, tmp_path, size):
    folder = checkpoint.download(size, tmp_path / "models" / size, progress=False)
    assert_same_bits(arrays_of(load_openai(folder)), arrays_of(load_openai(golden / "openai-test")))
    shutil.rmtree(released)
    assert checkpoint.download(size, folder, progress=False) == folder, "it is there already"


def test_download_of_something_else(released, tmp_path, monkeypatch):
    (released / DATA).write_bytes(b"0" + (released / DATA).read_bytes()[1:])
    with pytest.raises(FetchError, match=rf"124M/{DATA} is not the file that it should be") as error:
        checkpoint.download("117M", tmp_path / "m", progress=False)
    sentence(error)
    assert not (tmp_path / "m" / DATA).exists()
    shutil.copytree(released, released.with_name("355M"))
    with pytest.raises(CheckpointError, match=r"does not hold a model of size 345M, but one of .*'n_embd': 15"):
        checkpoint.download("345M", tmp_path / "n", progress=False)


def test_a_size_that_was_never_released(tmp_path):
    with pytest.raises(ConfigError, match=r"OpenAI released no model `PrettyBig`; valid: 117M, 345M, 774M, 1\.5B"):
        checkpoint.download("PrettyBig", tmp_path)


def write_tf1(folder, arrays, hparams):
    """A TF1 checkpoint with any variables, as TensorFlow writes it."""
    tf = pytest.importorskip("tensorflow")
    folder.mkdir(exist_ok=True)
    with tf.device("CPU"):
        tf.raw_ops.SaveV2(
            prefix=str(folder / "model.ckpt"), tensor_names=list(arrays), shape_and_slices=[""] * len(arrays),
            tensors=[tf.constant(value) for value in arrays.values()],
        )  # fmt: skip
    (folder / "hparams.json").write_text(json.dumps(hparams))


@pytest.fixture(scope="module")
def as_written(golden):
    """The golden checkpoint's arrays with the shapes of the file, and its hparams."""
    arrays, shapes = arrays_of(load_openai(golden / "openai-test")), openai_shapes(SIZES["test"])
    return {name: arrays[name].reshape(shape) for name, shape in shapes.items()}, SIZES["test"].hparams


def test_slots_of_an_optimizer_beside_the_variables(as_written, tmp_path, golden):
    """The 2019 models come with them."""
    arrays, hparams = as_written
    write_tf1(tmp_path / "m", arrays | {"model/wte/Adam": arrays["model/wte"], "global_step": np.int64(7)}, hparams)
    assert_same_bits(arrays_of(load_openai(tmp_path / "m")), arrays_of(load_openai(golden / "openai-test")))


def test_the_last_step_of_a_training_is_read(copy, golden):
    """By its number: as text, 90000 comes after 500000."""
    for path in copy.glob("model.ckpt.*"):
        shutil.copy(path, path.with_name(path.name.replace("ckpt", "ckpt-500000")))
        path.rename(path.with_name(path.name.replace("ckpt", "ckpt-90000")))
    assert_same_bits(arrays_of(load_openai(copy)), arrays_of(load_openai(golden / "openai-test")))
    (copy / DATA.replace("ckpt", "ckpt-500000")).unlink()
    with pytest.raises(CheckpointError, match=r"model\.ckpt-500000\.data-00000-of-00001 is missing"):
        load_openai(copy)


def test_a_missing_variable_is_named(as_written, tmp_path):
    arrays, hparams = as_written
    write_tf1(tmp_path / "m", {name: value for name, value in arrays.items() if name != "model/h1/ln_2/g"}, hparams)
    with pytest.raises(CheckpointError, match=r"model/h1/ln_2/g") as error:
        load_openai(tmp_path / "m")
    assert str(tmp_path / "m") in sentence(error)


def test_a_misshaped_variable_is_named(as_written, tmp_path):
    arrays, hparams = as_written
    write_tf1(tmp_path / "m", arrays | {"model/h0/mlp/c_fc/w": np.zeros((1, 15, 59), np.float32)}, hparams)
    with pytest.raises(CheckpointError, match=r"model/h0/mlp/c_fc/w.*\[1, 15, 59\].*\[1, 15, 60\]") as error:
        load_openai(tmp_path / "m")
    sentence(error)


MISSHAPED = """
import sys
from gpt2lib.checkpoint import CheckpointError, load_openai
try:
    load_openai(sys.argv[1])
except CheckpointError as error:
    print(error)
else:
    print("read without a word")
"""


@pytest.mark.parametrize("change", ["transposed", "renamed"])
def test_the_same_number_of_bytes_is_not_enough(as_written, tmp_path, change):
    """A kernel of the wrong shape or name, all else as it should be; read without TensorFlow, too."""
    arrays, hparams = dict(as_written[0]), as_written[1]
    name = "model/h0/attn/c_attn/w"
    value = arrays.pop(name)
    if change == "transposed":
        arrays[name] = value.transpose(0, 2, 1).copy()
    else:
        arrays["model/h0/attn/c_attn/kernel"] = value
    write_tf1(tmp_path / "m", arrays, hparams)
    with pytest.raises(CheckpointError, match=name):
        load_openai(tmp_path / "m")
    assert name in python(MISSHAPED, tmp_path / "m", backend="jax")


@pytest.mark.parametrize(
    "hparams", [{"n_layer": 3}, {"n_layer": 1}, {"n_ctx": 20}, {"n_embd": 18}, {"n_vocab": 256}], ids=str
)
def test_wrong_hparams_name_a_variable(copy, hparams):
    written = json.loads((copy / "hparams.json").read_text())
    (copy / "hparams.json").write_text(json.dumps(written | hparams))
    with pytest.raises(CheckpointError) as error:
        load_openai(copy)
    said = sentence(error)
    assert "hparams.json" in said and ("model/" in said or "h1" in said), said


@pytest.mark.parametrize("key", ["n_layer", "n_head", "n_embd", "n_ctx", "n_vocab"])
def test_an_hparams_key_that_is_missing_is_named(copy, key):
    written = json.loads((copy / "hparams.json").read_text())
    del written[key]
    (copy / "hparams.json").write_text(json.dumps(written))
    with pytest.raises((CheckpointError, ValueError), match=key) as error:
        load_openai(copy)
    assert "hparams.json" in sentence(error)


def test_hparams_that_are_not_json(copy):
    (copy / "hparams.json").write_text('{"n_vocab": 257,')
    with pytest.raises(CheckpointError, match=r"hparams\.json"):
        load_openai(copy)


@pytest.mark.parametrize("left", [0, 1000, 39_836])
def test_truncated_data(copy, left):
    with open(copy / DATA, "r+b") as file:
        file.truncate(left)
    with pytest.raises(CheckpointError, match=r"model\.ckpt") as error:
        load_openai(copy)
    sentence(error)


@pytest.mark.parametrize("name", ["hparams.json", DATA])
def test_a_missing_file_is_named(copy, name):
    (copy / name).unlink()
    with pytest.raises(CheckpointError, match=name.split("-")[0]) as error:
        load_openai(copy)
    assert str(copy) in sentence(error)


def test_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(CheckpointError, match="nowhere"):
        load_openai(tmp_path / "nowhere")


@writes_tf1
def test_a_failed_save_leaves_the_folder_as_it_was(copy, golden, monkeypatch):
    model = load_openai(copy)
    before = {path.name: path.read_bytes() for path in copy.iterdir()}

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(CheckpointError, match="No space left on device"):
        save_openai(model, copy)
    assert {path.name: path.read_bytes() for path in copy.iterdir()} == before
    assert [path.name for path in copy.parent.iterdir()] == ["model"]


@writes_tf1
def test_a_save_keeps_the_vocabulary_beside_it(copy):
    (copy / "vocab.bpe").write_text("merges")
    save_openai(load_openai(copy), copy)
    assert (copy / "vocab.bpe").read_text() == "merges"
    load_openai(copy)


@writes_tf1
def test_a_folder_of_something_else_is_not_written_to(copy, tmp_path):
    (tmp_path / "data" / "corpus").mkdir(parents=True)
    (tmp_path / "data" / "notes.txt").write_text("mine")
    with pytest.raises(CheckpointError, match="something else than a checkpoint"):
        save_openai(load_openai(copy), tmp_path / "data")
    assert (tmp_path / "data" / "notes.txt").read_text() == "mine"


# --- training checkpoints ---------------------------------------------------------------------------------------------


def arrays_at(step: int) -> dict:
    """Dtypes and ranks of all kinds; the values tell the step."""
    random = np.random.default_rng(step)
    return {"model/wte": random.normal(size=(3, 5)).astype(np.float32), "adam/iteration": np.array(step, np.int32),
            "seed": np.array([step, 2**32 - 1], np.uint32), "step": np.array(2**40 + step, np.int64)}  # fmt: skip


def fill(folder, steps, keep=9):
    for step in steps:
        checkpoint.save(folder, step, arrays_at(step), {"config": {"seed": step}}, keep)


def test_what_was_saved_is_read(tmp_path):
    assert checkpoint.read(tmp_path) is None
    assert checkpoint.read(tmp_path / "nowhere") is None
    path = checkpoint.save(tmp_path / "c", 7, arrays_at(7), {"config": {"seed": 3}})
    assert path.is_dir() and path.parent == tmp_path / "c"
    arrays, info = checkpoint.read(tmp_path / "c")
    assert_same_bits(arrays, arrays_at(7))
    assert info["step"] == 7 and info["config"] == {"seed": 3}


def test_the_last_ones_are_kept(tmp_path):
    fill(tmp_path, (1, 20, 300, 4000), keep=2)
    assert checkpoint.list_steps(tmp_path) == [300, 4000]
    assert len(list(tmp_path.iterdir())) == 2
    fill(tmp_path, (100_000_000,), keep=1)  # nine digits sort after eight
    assert checkpoint.list_steps(tmp_path) == [100_000_000]


def test_saving_the_same_step_again_replaces_it(tmp_path):
    fill(tmp_path, (5,))
    checkpoint.save(tmp_path, 5, arrays_at(6), {})
    assert_same_bits(checkpoint.read(tmp_path)[0], arrays_at(6))


def test_a_save_after_a_fall_back_keeps_itself(tmp_path):
    """The later ones were damaged, or the run would not be at this step."""
    fill(tmp_path, (10, 20))
    fill(tmp_path, (15,), keep=1)
    assert checkpoint.list_steps(tmp_path) == [15]


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)


DAMAGES = {
    "a bit": lambda path: flip_a_bit(path / "state.safetensors"),
    "cut": lambda path: (path / "state.safetensors").write_bytes((path / "state.safetensors").read_bytes()[:50]),
    "empty": lambda path: (path / "state.safetensors").write_bytes(b""),
    "no arrays": lambda path: (path / "state.safetensors").unlink(),
    "no info": lambda path: (path / "checkpoint.json").unlink(),
    "info cut": lambda path: (path / "checkpoint.json").write_text('{"step": '),
    "info of another kind": lambda path: (path / "checkpoint.json").write_text("[]"),
    "info not text": lambda path: (path / "checkpoint.json").write_bytes(b"\xff\xfe"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_falls_back_to_the_one_before(tmp_path, damage):
    fill(tmp_path, (1, 2, 3))
    DAMAGES[damage](tmp_path / "step-00000003")
    with pytest.warns(UserWarning, match="step-00000003"):
        arrays, info = checkpoint.read(tmp_path)
    assert info["step"] == 2
    assert_same_bits(arrays, arrays_at(2))
    for step in (1, 2):
        DAMAGES[damage](tmp_path / f"step-{step:08d}")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with pytest.raises(CheckpointError, match="damaged") as error:
            checkpoint.read(tmp_path)
    assert str(tmp_path) in sentence(error)
    assert len(caught) == 3


def test_a_half_written_checkpoint_is_not_one(tmp_path):
    fill(tmp_path, (1,))
    (tmp_path / ".step-00000002.part").mkdir()  # as a kill leaves it
    (tmp_path / ".step-00000002.part" / "state.safetensors").write_bytes(b"half")
    assert checkpoint.read(tmp_path)[1]["step"] == 1
    fill(tmp_path, (2,))
    assert checkpoint.read(tmp_path)[1]["step"] == 2


def test_a_full_disk_leaves_the_older_ones(tmp_path, monkeypatch):
    import safetensors.numpy

    fill(tmp_path, (1, 2))

    def full(arrays, path):
        Path(path).write_bytes(b"as far as it went")
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(safetensors.numpy, "save_file", full)
        with pytest.raises(CheckpointError, match=r"step-00000003.*No space left on device") as error:
            checkpoint.save(tmp_path, 3, arrays_at(3), {}, keep=1)
        sentence(error)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000001", "step-00000002"]
    assert_same_bits(checkpoint.read(tmp_path)[0], arrays_at(2))


def test_a_disk_that_is_really_full(tmp_path):
    """As the library that writes the arrays reports it: a limit on the size of files stands for the end of the disk."""
    import resource
    import signal

    fill(tmp_path, (1,))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    try:
        with pytest.raises(CheckpointError, match="step-00000002") as error:
            checkpoint.save(tmp_path, 2, {"x": np.zeros(100_000, np.float32)}, {})
        sentence(error)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]
    assert checkpoint.read(tmp_path)[1]["step"] == 1


def test_another_size_names_the_variable_and_its_shapes():
    model, wider = GPT2(SIZES["test"]), GPT2(SIZES["test"].replace(n_embd=18))
    with pytest.raises(CheckpointError, match=r"`model/\S+`.*\b18\b.*\b15\b") as error:
        checkpoint.check(arrays_of(model), arrays_of(wider), "runs/x")
    assert "runs/x" in sentence(error)
    with pytest.raises(CheckpointError, match=r"model/ln_f/b"):
        checkpoint.check(arrays_of(model), arrays_of(model) | {"model/ln_f/b": np.zeros(18, np.float32)}, "runs/x")
    with pytest.raises(CheckpointError, match=r"model/h2/\S+"):
        checkpoint.check(arrays_of(GPT2(SIZES["test"].replace(n_layer=3))), arrays_of(model), "runs/x")
    checkpoint.check(arrays_of(model), arrays_of(model), "runs/x")


# --- between the backends ---------------------------------------------------------------------------------------------


def state(optimizer: str):
    """The step of a model and an optimizer, which holds all that a run must restore."""
    model = GPT2(SIZES["test"], seed=4)
    make = {"adafactor": functools.partial(Adafactor, beta1=0.9), "adamw": keras.optimizers.AdamW}[optimizer]
    optimizer = make(0.01, name=optimizer)  # Keras would number those of one process
    optimizer.build(model.trainable_variables)
    config = TrainConfig(corpus="", run_dir="")
    return make_step(model, optimizer, model.trainable_variables, config, places())


def fill_with_numbers(arrays: dict) -> dict:
    """Other values of the same dtype for each array: any bits that are a finite number."""
    random, filled = np.random.default_rng(0), {}
    for name, value in arrays.items():
        if value.dtype == np.float32:
            bits = random.integers(0, 2**32, value.shape, dtype=np.uint32)
            new = np.asarray(bits).view(np.float32).copy()
            filled[name] = np.where(np.isfinite(new), new, np.float32(1e-45)).astype(np.float32).reshape(value.shape)
        else:
            top = np.iinfo(value.dtype).max
            filled[name] = np.full(value.shape, min(top, 2**31 - 1), value.dtype)
    return filled


ACROSS = """
import sys
sys.path.insert(0, sys.argv[3])
import test_checkpoint as t
from gpt2lib import checkpoint
step = t.state(sys.argv[2])
arrays, info = checkpoint.read(sys.argv[1])
step.assign(arrays)
checkpoint.save(sys.argv[1] + ".back", info["step"], step.arrays(), {"from": t.OTHER})
"""


@pytest.mark.skipif(importlib.util.find_spec(OTHER) is None, reason=f"{OTHER} is not installed")
@pytest.mark.parametrize("optimizer", ["adafactor", "adamw"])
def test_the_other_backend_restores_it_bit_for_bit(tmp_path, optimizer):
    """Saved here, restored and saved again there; run on both backends, this is both directions."""
    folder = tmp_path / "c"
    step = state(optimizer)
    arrays = fill_with_numbers(step.arrays())
    variables = len(step.trained) + len(step.optimizer.variables)
    assert len(arrays) == variables, "every variable has a path of its own"
    step.assign(arrays)
    ours = step.arrays()
    assert_same_bits(ours, arrays)
    checkpoint.save(folder, 1234, ours, {})
    python(ACROSS, folder, optimizer, ROOT / "tests", backend=OTHER)
    theirs, info = checkpoint.read(tmp_path / "c.back")
    assert info["step"] == 1234
    assert info["from"] == keras.backend.backend(), "the other backend did write it"
    counters = [name for name in ours if ours[name].dtype != np.float32]  # each backend has integers of its own width
    for name in counters:
        np.testing.assert_array_equal(theirs.pop(name), ours.pop(name))
    assert_same_bits(theirs, ours)


def test_a_fingerprint_is_of_names_and_values():
    config = ModelConfig(n_vocab=13, n_ctx=5, n_embd=6, n_head=2, n_layer=1)
    one, same, other = (GPT2(config, seed=seed) for seed in (1, 1, 2))
    assert fingerprint(one) == fingerprint(same) != fingerprint(other)
    assert len(fingerprint(one)) == 64
    low = GPT2(config, seed=1, dtype="bfloat16")
    assert fingerprint(low) != fingerprint(one)
    one.wpe.assign(one.wpe + 1)
    assert fingerprint(one) != fingerprint(same)


@pytest.mark.parametrize("save", [save_openai, checkpoint.save_huggingface])
def test_a_model_in_eight_bits_is_not_saved(tmp_path, save):
    if save is save_openai:
        pytest.importorskip("tensorflow")
    model = quantized(GPT2(ModelConfig(n_vocab=13, n_ctx=5, n_embd=6, n_head=2, n_layer=1)))
    with pytest.raises(CheckpointError, match="8 bits"):
        save(model, tmp_path / "saved")
    assert not (tmp_path / "saved").exists() and fingerprint(model) == fingerprint(quantized(GPT2(model.config)))
