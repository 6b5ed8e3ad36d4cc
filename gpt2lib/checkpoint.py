"""Checkpoints: of training, atomic and checksummed; OpenAI's TF1 layout and Hugging Face's, both ways.

A training checkpoint is a folder `step-00000500` with `state.safetensors` (parameters, optimizer) and
`checkpoint.json` (step, configuration, checksum): plain arrays, so that either backend restores what the other saved.
"""

import contextlib
import hashlib
import json
import os
import re
import shutil
import tempfile
import warnings
from pathlib import Path

import numpy as np

from gpt2lib.config import SIZES, ConfigError, ModelConfig
from gpt2lib.data import replace_folder
from gpt2lib.fetch import fetch, sha256_of
from gpt2lib.tokenizer import END_OF_TEXT, GPT2_SHA256, Tokenizer


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be read or written; the message says what, where and what to do."""


# --- training checkpoints ---------------------------------------------------------------------------------------------


def save(folder, step: int, arrays: dict, info: dict, keep: int = 2) -> Path:
    """Write `folder/step-XXXXXXXX`, beside and then renamed, and delete all but the last `keep` up to this step.

    `info` is stored as JSON beside the arrays. Raises CheckpointError when the disk is full; older ones stay then.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import save_file

    folder = Path(folder)
    final, part = folder / f"step-{step:08d}", folder / f".step-{step:08d}.part"
    try:
        for left in folder.glob(".step-*.part"):  # of a process that was killed while it wrote
            shutil.rmtree(left, ignore_errors=True)
        part.mkdir(parents=True)
        save_file({name: np.asarray(array, order="C") for name, array in arrays.items()}, part / "state.safetensors")
        document = {**info, "step": step, "sha256": sha256_of(part / "state.safetensors")}
        (part / "checkpoint.json").write_text(json.dumps(document, indent=1))
        for name in ("state.safetensors", "checkpoint.json"):
            _sync(part / name)
        if final.exists():
            shutil.rmtree(final)
        part.rename(final)
        _sync(folder)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(part, ignore_errors=True)
        raise CheckpointError(
            f"could not save {final}: {error}; free some space and start again, "
            "the run goes on from the checkpoint before"
        ) from error
    steps = list_steps(folder)
    for old in [s for s in steps if s <= step][:-keep] + [s for s in steps if s > step]:  # later ones were damaged
        shutil.rmtree(folder / f"step-{old:08d}")
    return final


def list_steps(folder) -> list[int]:
    """The steps of the complete checkpoints in `folder`, rising."""
    return sorted(int(path.name[5:]) for path in Path(folder).glob("step-*") if path.name[5:].isdigit())


def read(folder) -> tuple[dict, dict] | None:
    """(arrays, info) of the newest intact checkpoint in `folder`; None if it holds none.

    A damaged checkpoint is passed over with a warning that names it; if all are damaged, CheckpointError.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    steps = list_steps(folder)
    for step in reversed(steps):
        path = Path(folder) / f"step-{step:08d}"
        try:
            info = json.loads((path / "checkpoint.json").read_text())
            if sha256_of(path / "state.safetensors") != info["sha256"]:
                raise ValueError("its checksum differs")
            return load_file(path / "state.safetensors"), info
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            warnings.warn(f"checkpoint {path} is damaged ({error}); falling back to the one before", stacklevel=2)
    if steps:
        raise CheckpointError(f"every checkpoint in {folder} is damaged; delete the folder to start the run afresh")
    return None


def check(expected: dict, arrays: dict, where: str) -> None:
    """CheckpointError unless there is an array for each of the expected ones, of its shape."""
    for path, value in expected.items():
        if path not in arrays:
            raise CheckpointError(f"{where} has no variable `{path}`; it was written by another model or optimizer")
        if arrays[path].shape != value.shape:
            raise CheckpointError(
                f"`{path}` in {where} has shape {list(arrays[path].shape)}, the model needs {list(value.shape)}; "
                "use the configuration that it was saved with"
            )


def expect(arrays: dict, path: str, shape, where):
    """The array of a variable; CheckpointError if it is not there or of another shape."""
    if path not in arrays or tuple(arrays[path].shape) != tuple(shape):
        raise CheckpointError(
            f"the checkpoint of {where} lacks `{path}` of shape {list(shape)}; "
            "it was edited, or written under another configuration"
        )
    return arrays[path]


def load(run_dir, dtype: str | None = None):
    """(model, info) of the newest intact checkpoint of a training run.

    Args:
        run_dir: `TrainConfig.run_dir`.
        dtype: Keras dtype policy of the model; None: the one it was trained with.
    """
    from gpt2lib.model import GPT2

    found = read(Path(run_dir) / "checkpoints")
    if found is None:
        raise CheckpointError(f"{run_dir} holds no checkpoint; run the training notebook with this run_dir first")
    arrays, info = found
    config = ModelConfig.from_dict(info["model"])
    model = GPT2(config, init=lambda path, shape: expect(arrays, path, shape, run_dir), dtype=dtype or info["dtype"])
    return model, info


class Copies:
    """Copies of a run's checkpoints at another place, made in the background: a folder, or an address for fsspec.

    A copy has its `checkpoint.json` last, so one that was cut off does not count, and files that are copied again
    replace the old ones at once. What goes wrong is a warning: the next checkpoint is another chance. ConfigError for
    an address that cannot be used.
    """

    _STATE, _NOTE = "state.safetensors", "checkpoint.json"
    _LINES = ("train.json", "metrics.jsonl", "incidents.jsonl")

    def __init__(self, run_dir, address: str):
        from concurrent.futures import ThreadPoolExecutor

        from fsspec.core import url_to_fs

        self.run_dir, self.address, self.running = Path(run_dir), address, None
        self.pool = ThreadPoolExecutor(1)
        try:
            self.fs, self.root = url_to_fs(address)
            self.steps()
        except Exception as error:  # each file system has its own
            package = getattr(error.__cause__, "name", None) if isinstance(error, ImportError) else None
            advice = f"run `pip install {package}`" if package else " ".join(str(error).split())
            raise ConfigError(f"TrainConfig.copy_to: {address} cannot be used: {advice}") from error

    def steps(self) -> list[int]:
        """The steps of the complete copies, rising."""
        self.fs.invalidate_cache()
        found = self.fs.glob(f"{self.root}/checkpoints/step-*/{self._NOTE}")
        return sorted(int(path.split("/")[-2][5:]) for path in found)

    def fetch(self) -> None:
        """Bring a run here that has gone further there."""
        folder = self.run_dir / "checkpoints"
        steps = self.steps()
        if steps and steps[-1] > max(list_steps(folder), default=0):
            final, part = folder / f"step-{steps[-1]:08d}", folder / f".step-{steps[-1]:08d}.part"
            shutil.rmtree(part, ignore_errors=True)
            part.mkdir(parents=True)
            for name in (self._STATE, self._NOTE):
                self.fs.get_file(f"{self.root}/checkpoints/{final.name}/{name}", str(part / name))
            for name in self._LINES:
                if self.fs.exists(f"{self.root}/{name}"):
                    self.fs.get_file(f"{self.root}/{name}", str(self.run_dir / f".{name}.part"))
                    (self.run_dir / f".{name}.part").replace(self.run_dir / name)
            part.rename(final)

    def start(self) -> None:
        """Copy what is new, in the background."""
        self.running = self.pool.submit(self._copy)

    def wait(self) -> None:
        """Until nothing is being copied."""
        running, self.running = self.running, None
        try:
            if running:
                running.result()
        except Exception as error:
            warnings.warn(
                f"could not copy {self.run_dir} to {self.address}: {' '.join(str(error).split())}; the run goes on, "
                "and its next checkpoint is copied again",
                stacklevel=2,
            )

    def clear(self) -> None:
        """Delete the copies."""
        for name in ("checkpoints", *self._LINES):
            if self.fs.exists(f"{self.root}/{name}"):
                self.fs.rm(f"{self.root}/{name}", recursive=True)

    def _copy(self):
        here, there = list_steps(self.run_dir / "checkpoints"), self.steps()
        folders = [f"checkpoints/step-{step:08d}" for step in sorted(set(here) - set(there))]
        for folder in folders:
            self.fs.makedirs(f"{self.root}/{folder}", exist_ok=True)
            self.fs.put_file(str(self.run_dir / folder / self._STATE), f"{self.root}/{folder}/{self._STATE}")
        for name in self._LINES:  # never behind the checkpoints
            if (self.run_dir / name).exists():
                self._replace(name)
        for folder in folders:
            self._replace(f"{folder}/{self._NOTE}")
        for step in set(there) - set(here):
            self.fs.rm(f"{self.root}/checkpoints/step-{step:08d}", recursive=True)

    def _replace(self, name):
        final = f"{self.root}/{name}"
        self.fs.put_file(str(self.run_dir / name), f"{final}.part")
        self.fs.mv(f"{final}.part", final)


# --- OpenAI's layout --------------------------------------------------------------------------------------------------


def openai_shapes(config) -> dict:
    """The variables of an OpenAI checkpoint in the order of its data file: name -> shape as written there."""
    d, shapes = config.n_embd, {}
    shapes["model/wte"], shapes["model/wpe"] = (config.n_vocab, d), (config.n_ctx, d)
    linear = {"attn/c_attn": (d, 3 * d), "attn/c_proj": (d, d), "mlp/c_fc": (d, 4 * d), "mlp/c_proj": (4 * d, d)}
    norms = [f"h{i}/{name}" for i in range(config.n_layer) for name in ("ln_1", "ln_2")] + ["ln_f"]
    for name in norms:
        shapes[f"model/{name}/g"] = shapes[f"model/{name}/b"] = (d,)
    for i in range(config.n_layer):
        for name, (nx, nf) in linear.items():
            shapes[f"model/h{i}/{name}/w"], shapes[f"model/h{i}/{name}/b"] = (1, nx, nf), (nf,)
    return dict(sorted(shapes.items()))


# sha256 of the files of 124M. Those of the other sizes are noted when they first come; the vocabulary is that of all.
_RELEASED = {
    "checkpoint": "dd1b025d2e155283f5e300ce95bf6d5b6bc0f7fe010db73daa6975eb896ab9cb",
    "hparams.json": "d9d56e4121c427164e0c55c6f03c08e1daf9002b9b672825112d19097b680318",
    "model.ckpt.index": "71916f763f9746f9b2a06b12d91996cf1084ae008d0424543d39391c5f2dc687",
    "model.ckpt.meta": "4668c448fa11531fd6700460487f73e82d3272960cea942252f8744bf225c77b",
    "model.ckpt.data-00000-of-00001": "2060c885360cc0cf41d7a6dbc4d24b5127aae20260c8b5ae521b5a6578407118",
}
_RELEASES = {"117M": "124M", "345M": "355M", "774M": "774M", "1.5B": "1558M"}  # size: folder
OPENAI_URL = "https://openaipublic.blob.core.windows.net/gpt-2/models/"


def download(size: str, folder, progress: bool = True) -> Path:
    """OpenAI's released checkpoint of a size, downloaded unless it is there: the folder, for `load_openai`.

    Args:
        size: 117M (124M), 345M (355M), 774M or 1.5B (1558M).
        folder: where it goes, such as `data/models/124M`.
        progress: whether to show a bar for each file.

    Each file is resumed and tried again as in `fetch`; 124M must be the released one, byte for byte, the others what
    they were the first time. Raises: ConfigError for a size that was not released; FetchError; CheckpointError if it
    is not a model of this size.
    """
    release = _RELEASES.get(size, size)
    if release not in _RELEASES.values():
        raise ConfigError(f"OpenAI released no model `{size}`; valid: {', '.join(_RELEASES)}")
    folder = Path(folder)
    pinned = GPT2_SHA256 | (_RELEASED if release == "124M" else {})
    for name in (*_RELEASED, *GPT2_SHA256):
        fetch(f"{OPENAI_URL}{release}/{name}", folder / name, pinned.get(name), progress)
    if (found := _read_hparams(folder)).hparams != SIZES[release].hparams:
        raise CheckpointError(f"{folder} does not hold a model of size {size}, but one of {found.hparams}")
    _read_tensors(folder, found)
    return folder


def load_openai(folder, dtype: str | None = None):
    """The model of a folder in OpenAI's released layout (`hparams.json`, `model.ckpt.*`).

    Needs no TensorFlow. The checkpoint may have several shards and hold optimizer slots, which are left out.
    Raises CheckpointError naming a missing or mis-shaped variable.
    """
    from gpt2lib.model import GPT2

    folder = Path(folder)
    config = _read_hparams(folder)
    arrays = _read_tensors(folder, config)

    def values(path, shape):
        array = arrays[path]
        return array[0] if path.endswith("/w") else array  # OpenAI's kernels have a leading 1

    return GPT2(config, init=values, dtype=dtype)


def _read_hparams(folder) -> ModelConfig:
    """What the hparams.json of a folder describes."""
    if not (folder / "hparams.json").is_file():
        raise CheckpointError(f"{folder} has no hparams.json; give the folder that holds it and model.ckpt.*")
    known = ModelConfig().hparams
    try:
        hparams = json.loads((folder / "hparams.json").read_text())
        return ModelConfig.from_dict({name: hparams[name] for name in known})
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{folder}/hparams.json does not hold the numbers {', '.join(known)} ({error}); download it again"
        ) from error


def save_openai(model, folder) -> None:
    """Write the model as a folder in OpenAI's released layout: `hparams.json`, `checkpoint`, `model.ckpt.*`.

    Needs TensorFlow, whatever the backend in use. Written beside and renamed: an older checkpoint stays until it
    succeeds, and the other files of its folder stay in any case. A folder that holds something else is refused.
    """
    tf = _tensorflow("write OpenAI's TF1 layout")
    _check_whole(model)
    folder = Path(folder)
    others = [path for path in folder.iterdir() if not path.name.startswith("model.ckpt")] if folder.exists() else []
    if (others and not (folder / "hparams.json").is_file()) or any(path.is_dir() for path in others):
        raise CheckpointError(f"{folder} holds something else than a checkpoint; give a new folder")
    shapes = openai_shapes(model.config)
    arrays = {v.path: np.asarray(v.value) for v in model.trainable_variables}
    names = list(shapes)  # the index is sorted, and the data must lie in the same order
    part = folder.parent / f".{folder.name}.part"
    shutil.rmtree(part, ignore_errors=True)
    try:
        part.mkdir(parents=True)
        with tf.device("CPU"):
            tf.raw_ops.SaveV2(
                prefix=str(part / "model.ckpt"),
                tensor_names=names,
                shape_and_slices=[""] * len(names),
                tensors=[tf.constant(arrays[name].astype(np.float32).reshape(shapes[name])) for name in names],
            )
        for path in others:
            shutil.copy2(path, part)
        (part / "hparams.json").write_text(json.dumps(model.config.hparams, indent=2) + "\n")
        (part / "checkpoint").write_text(
            'model_checkpoint_path: "model.ckpt"\nall_model_checkpoint_paths: "model.ckpt"\n'
        )
        replace_folder(folder, part)
    except (OSError, tf.errors.OpError) as error:
        shutil.rmtree(part, ignore_errors=True)
        raise CheckpointError(f"could not write {folder}: {error}; what was there before is unchanged") from error


def _check_whole(model) -> None:
    if model.int8:
        raise CheckpointError("this model's matrices are rounded to 8 bits; save the one that it was made from")


def _read_tensors(folder, config) -> dict:
    """The variables of an OpenAI checkpoint, mapped from disk: name -> float32 array."""
    index = folder / "model.ckpt.index"
    if not index.is_file():
        # a training's own, such as model.ckpt-500000.index: that of its last step
        found = {path: path.stem.rpartition("-")[2] for path in sorted(folder.glob("*.index"))}
        if not found:
            raise CheckpointError(f"{folder} has no model.ckpt.index; download the checkpoint again")
        index = max(found, key=lambda path: int(found[path]) if found[path].isdecimal() else -1)
    try:
        entries = _read_index(index)
    except (IndexError, ValueError) as error:
        raise CheckpointError(f"{index} cannot be read: {error}; download the checkpoint again") from error
    extra = f"model/h{config.n_layer}/ln_1/g"
    if extra in entries:
        raise CheckpointError(f"{folder} has `{extra}`, one layer more than the n_layer of its hparams.json")
    n_shards = 1 + max((entry[2] for entry in entries.values()), default=0)
    arrays = {}
    for name, shape in openai_shapes(config).items():
        if name not in entries:
            raise CheckpointError(f"{folder} has no variable `{name}`; its hparams.json promises one")
        dtype, seen, shard, offset, size, crc = entries[name]
        if seen != shape:
            raise CheckpointError(
                f"`{name}` in {folder} has shape {list(seen)}, by its hparams.json it should have {list(shape)}"
            )
        if dtype != 1:  # DT_FLOAT
            raise CheckpointError(f"`{name}` in {folder} is not float32; save it as float32 again")
        data = index.with_name(f"{index.stem}.data-{shard:05d}-of-{n_shards:05d}")
        if not data.is_file() or data.stat().st_size < offset + size:
            raise CheckpointError(f"{data} is missing or cut short: `{name}` is not in it; download it again")
        arrays[name] = np.memmap(data, "<f4", "r", offset, shape)
        if masked_crc(arrays[name].tobytes()) != crc:
            raise CheckpointError(f"`{name}` in {data} is damaged: its checksum is another one; download it again")
    return arrays


def _read_index(path) -> dict:
    """What a `model.ckpt.index` says: name -> (dtype number, shape, shard, offset, size in bytes, masked CRC-32C).

    The file is a LevelDB table (its table_format.md): blocks of prefix-compressed keys, found through an index block
    that the last 48 bytes point to. Values are BundleEntryProto messages (tensor_bundle.proto in TensorFlow).
    """
    data = path.read_bytes()
    if data[-8:] != bytes.fromhex("57fb808b247547db"):
        raise ValueError("it is not an index of a TensorFlow checkpoint, or its end is missing")

    def varint(buffer, at):
        value = shift = 0
        while buffer[at] & 0x80:
            value, shift, at = value | (buffer[at] & 0x7F) << shift, shift + 7, at + 1
        return value | buffer[at] << shift, at + 1

    def varints(buffer, count):
        values, at = [], 0
        for _ in range(count):
            value, at = varint(buffer, at)
            values.append(value)
        return values

    def block(start, size):
        if data[start + size]:
            raise ValueError("its blocks are compressed")
        key, at = b"", start
        end = start + size - 4 * (int.from_bytes(data[start + size - 4 : start + size], "little") + 1)
        while at < end:
            shared, at = varint(data, at)
            new, at = varint(data, at)
            length, at = varint(data, at)
            key = key[:shared] + data[at : at + new]
            yield key, data[at + new : at + new + length]
            at += new + length

    def fields(message):
        at = 0
        while at < len(message):
            tag, at = varint(message, at)
            if tag & 7 == 0:
                value, at = varint(message, at)
            else:
                length, at = varint(message, at) if tag & 7 == 2 else (4 if tag & 7 == 5 else 8, at)
                value, at = message[at : at + length], at + length
            yield tag >> 3, value

    entries = {}
    for _, handle in block(*varints(data[-48:], 4)[2:]):
        for key, value in block(*varints(handle, 2)):
            if key:  # the empty key is the header
                entry = dict(fields(value))
                dims = [dict(fields(dim)).get(1, 0) for number, dim in fields(entry.get(2, b"")) if number == 2]
                entries[key.decode()] = (
                    entry.get(1, 0),
                    tuple(dims),
                    entry.get(3, 0),
                    entry.get(4, 0),
                    entry.get(5, 0),
                    int.from_bytes(entry.get(6, b""), "little"),
                )
    return entries


def masked_crc(data: bytes) -> int:
    """The CRC-32C of some bytes as TensorFlow writes it down (its lib/hash/crc32c.h)."""
    import google_crc32c

    crc = google_crc32c.value(data)
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def _tensorflow(purpose):
    try:
        os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
        import tensorflow
    except ImportError as error:
        raise CheckpointError(f"TensorFlow is needed to {purpose}; run: pip install tensorflow") from error
    return tensorflow


def write_json(path, document) -> None:
    """Write a file beside and rename it."""
    part = path.with_name(f".{path.name}.part")
    part.write_text(json.dumps(document, indent=1) + "\n")
    os.replace(part, path)


def _sync(path) -> None:
    """Make sure that a file or a folder's entries are on disk before the rename that relies on them."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# --- Hugging Face's layout --------------------------------------------------------------------------------------------

# What this model computes, by the fields of transformers' GPT2Config that change the mathematics. A field that is not
# written has the first value.
_COMPUTED = {
    "model_type": ("gpt2",),
    "activation_function": ("gelu_new", "gelu_fast", "gelu_pytorch_tanh"),  # three names of one function
    "layer_norm_epsilon": (1e-5,),
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "reorder_and_upcast_attn": (False,),
    "add_cross_attention": (False,),
    "tie_word_embeddings": (True,),
}
_FIELDS = {
    "n_vocab": "vocab_size",
    "n_ctx": "n_positions",
    "n_embd": "n_embd",
    "n_head": "n_head",
    "n_layer": "n_layer",
}
_DROPOUTS = ("embd_pdrop", "attn_pdrop", "resid_pdrop")
_MASK = re.compile(r"h\.\d+\.attn\.(masked_)?bias")  # the causal mask, which transformers once stored with the weights
_WEIGHT_FILES = ("model*.safetensors*", "pytorch_model*", "tf_model.h5", "flax_model.msgpack")


def huggingface_name(path: str) -> str:
    """The name of a variable in transformers' GPT2Model: of `model/h0/attn/c_attn/w`, `h.0.attn.c_attn.weight`."""
    name = path.removeprefix("model/")
    if name in ("wte", "wpe"):
        return f"{name}.weight"
    layer, kind = name.rsplit("/", 1)
    return re.sub(r"^h(?=\d)", "h.", layer).replace("/", ".") + (".bias" if kind == "b" else ".weight")


def load_huggingface(folder, dtype: str | None = None):
    """The model of a folder that Hugging Face's transformers wrote for GPT-2 (`config.json`, `model.safetensors`).

    The weights may lie in several shards, with or without the prefix `transformer.`; float16 and bfloat16 are read as
    float32. Needs neither torch nor transformers. Follows transformers' `modeling_gpt2.py`; its kernels are [nx, nf].
    Raises CheckpointError naming a tensor that is missing, mis-shaped or not GPT-2's, or the field of config.json that
    asks for what this model does not compute.
    """
    import ml_dtypes  # noqa: F401  safetensors asks NumPy for bfloat16 by its name
    from safetensors import SafetensorError, safe_open

    from gpt2lib.model import GPT2

    folder = Path(folder)
    config = _read_huggingface_config(folder / "config.json")
    with contextlib.ExitStack() as stack:
        files = {}  # tensor -> the open file that holds it
        for path in _weight_files(folder):
            try:
                file = stack.enter_context(safe_open(path, "np"))
            except (OSError, SafetensorError) as error:
                raise CheckpointError(f"{path} cannot be read: {error}; download it again") from error
            files |= dict.fromkeys(file.keys(), file)
        prefix = "transformer." if any(name.startswith("transformer.") for name in files) else ""
        names = {path: prefix + huggingface_name(path) for path in openai_shapes(config)}
        for path, shape in openai_shapes(config).items():
            _check_tensor(folder, files, names[path], shape[-2:])  # OpenAI's kernels have a leading 1
        wte = names["model/wte"]
        for name in sorted(files.keys() - {*names.values(), "lm_head.weight"}):
            if not _MASK.fullmatch(name.removeprefix(prefix)):
                raise CheckpointError(f"{folder} has a tensor `{name}`, which by its config.json GPT-2 does not have")

        def read(name):
            return files[name].get_tensor(name).astype(np.float32, copy=False)

        if "lm_head.weight" in files and not np.array_equal(read("lm_head.weight"), read(wte)):
            raise CheckpointError(
                f"`lm_head.weight` in {folder} differs from `{wte}`, and this model has one matrix for both"
            )
        return GPT2(config, init=lambda path, shape: read(names[path]), dtype=dtype)


def save_huggingface(model, folder, tokenizer: Tokenizer | None = None) -> None:
    """Write the model as a folder that transformers reads: `config.json`, `model.safetensors`, the tokenizer's files.

    Needs neither torch nor transformers; the weights are float32. Without a `tokenizer` no vocabulary is written, and
    the last id counts as the end of text. transformers' tokenizer takes `<|endoftext|>` inside a text for the end of
    text, where ours spells it out. Written beside and renamed: an older checkpoint stays until it succeeds, and the
    other files of its folder stay in any case. Raises CheckpointError if the folder holds something else, if the
    tokenizer has more entries than the model, or if the disk is full.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import save_file

    _check_whole(model)
    folder, config = Path(folder), model.config
    if tokenizer is not None and tokenizer.n_vocab > config.n_vocab:
        raise CheckpointError(
            f"the tokenizer has {tokenizer.n_vocab} entries and the model has {config.n_vocab}; "
            "give the tokenizer that the model was trained with"
        )
    _check_replaceable(folder)
    end_of_text = config.n_vocab - 1 if tokenizer is None else tokenizer.end_of_text
    ids = {"bos_token_id": end_of_text, "eos_token_id": end_of_text}
    document = {
        "architectures": ["GPT2LMHeadModel"],
        "dtype": "float32",
        "n_ctx": config.n_ctx,  # transformers goes by n_positions, other readers by this
        "n_inner": None,
        **{name: values[0] for name, values in _COMPUTED.items()},
        **{theirs: getattr(config, ours) for ours, theirs in _FIELDS.items()},
        **{name: getattr(config, name) for name in _DROPOUTS},
        **ids,
    }
    arrays = {
        f"transformer.{huggingface_name(v.path)}": np.asarray(v.value).astype(np.float32, order="C", copy=False)
        for v in model.trainable_variables
    }
    part = folder.parent / f".{folder.name}.part"
    shutil.rmtree(part, ignore_errors=True)
    try:
        part.mkdir(parents=True)
        for path in folder.iterdir() if folder.exists() else ():
            if not any(path.match(pattern) for pattern in _WEIGHT_FILES):
                shutil.copy2(path, part)
        save_file(arrays, part / "model.safetensors", metadata={"format": "pt"})  # transformers wants it said
        write_json(part / "config.json", document)
        write_json(part / "generation_config.json", {"_from_model_config": True, **ids})
        if tokenizer is not None:
            _write_huggingface_tokenizer(part, tokenizer, config.n_ctx)
        replace_folder(folder, part)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(part, ignore_errors=True)
        raise CheckpointError(f"could not write {folder}: {error}; what was there before is unchanged") from error


def _check_replaceable(folder) -> None:
    """CheckpointError if something else than a GPT-2 of this layout is in the way."""
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    try:
        ours = json.loads((folder / "config.json").read_text())["model_type"] == "gpt2"
    except (OSError, ValueError, KeyError, TypeError):
        ours = False
    if not ours or any(path.is_dir() for path in folder.iterdir()):
        raise CheckpointError(f"{folder} holds something else than a checkpoint; give a new folder")


def _read_huggingface_config(path) -> ModelConfig:
    """The model that a config.json describes; CheckpointError if it is not one that ours computes."""
    if not path.is_file():
        raise CheckpointError(f"{path.parent} has no config.json; give the folder that holds it and model.safetensors")
    try:
        document = dict(json.loads(path.read_text()))
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}; download it again") from error

    def check(name, values, value):
        if value not in values:
            raise CheckpointError(
                f"{path} has {name}={json.dumps(value)}, which this model does not compute; "
                f"it computes {json.dumps(values[0])}"
            )

    for name, values in {**_COMPUTED, "is_causal": (True,), "quantization_config": (None,)}.items():
        check(name, values, document.get(name, values[0]))
    for name in document.get("architectures") or []:
        check("architectures", ("GPT2LMHeadModel", "GPT2Model"), name)
    fields = {ours: document.get(theirs, document.get(ours)) for ours, theirs in _FIELDS.items()}
    for ours, theirs in _FIELDS.items():
        if fields[ours] is None:
            raise CheckpointError(f"{path} has no `{theirs}`; download it again")
    try:
        config = ModelConfig.from_dict(fields | {name: document[name] for name in _DROPOUTS if name in document})
    except ConfigError as error:
        raise CheckpointError(f"{path} describes no GPT-2: {error}") from error
    check("n_inner", (None, 4 * config.n_embd), document.get("n_inner"))
    return config


def _weight_files(folder) -> list[Path]:
    """The safetensors files of a folder: one, or the shards that its index names."""
    if (folder / "model.safetensors").is_file():
        return [folder / "model.safetensors"]
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            return [folder / name for name in sorted({*json.loads(index.read_text())["weight_map"].values()})]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{index} does not list the shards ({error!r}); download it again") from error
    if any(folder.glob("pytorch_model*.bin")):
        raise CheckpointError(
            f"{folder} has its weights in pytorch_model.bin, which is not read here; save them as safetensors, with "
            "`transformers.AutoModelForCausalLM.from_pretrained(folder).save_pretrained(folder)`"
        )
    raise CheckpointError(f"{folder} has no model.safetensors; download the checkpoint again")


def _check_tensor(folder, files, name, shape) -> None:
    """CheckpointError if a tensor is not there, or not as config.json says."""
    if name not in files:
        raise CheckpointError(f"{folder} has no tensor `{name}`; its config.json promises one")
    there = files[name].get_slice(name)
    if tuple(there.get_shape()) != shape:
        raise CheckpointError(
            f"`{name}` in {folder} has shape {list(there.get_shape())}, by its config.json it should have {list(shape)}"
        )
    if there.get_dtype() not in ("F32", "F16", "BF16"):
        raise CheckpointError(f"`{name}` in {folder} is {there.get_dtype()}; save it as float32, float16 or bfloat16")


def _write_huggingface_tokenizer(folder, tokenizer, n_ctx) -> None:
    """The files of transformers' GPT2Tokenizer: OpenAI's two under other names, and which token is special."""
    tokenizer.save(folder)
    (folder / "encoder.json").replace(folder / "vocab.json")
    (folder / "vocab.bpe").replace(folder / "merges.txt")
    special = dict.fromkeys(("bos_token", "eos_token", "unk_token"), END_OF_TEXT)
    write_json(folder / "special_tokens_map.json", special)
    more = {"add_prefix_space": False, "model_max_length": n_ctx, "tokenizer_class": "GPT2Tokenizer"}
    write_json(folder / "tokenizer_config.json", {**special, **more})
    for name in ("tokenizer.json", "added_tokens.json"):  # an older vocabulary, which would be preferred to ours
        (folder / name).unlink(missing_ok=True)


# --- whatever layout --------------------------------------------------------------------------------------------------


def load_pretrained(folder, dtype: str | None = None):
    """The model of a folder in any of three layouts: OpenAI's, Hugging Face's, or a training run's (its newest step).

    Args:
        folder: holds `hparams.json`, `config.json` or `checkpoints/`; the first of these decides.
        dtype: Keras dtype policy of the model; None: Keras' own, and for a run the one it was trained with.

    Raises CheckpointError if it holds none of them, and as `load_openai`, `load_huggingface` and `load` do.
    """
    layout = _layout(folder)
    if layout == "checkpoints":
        return load(folder, dtype)[0]
    return (load_openai if layout == "hparams.json" else load_huggingface)(folder, dtype)


def pretrained_config(folder) -> ModelConfig:
    """The shape of the model that `load_pretrained` would give, without reading its parameters."""
    layout = _layout(folder)
    if layout == "hparams.json":
        return _read_hparams(Path(folder))
    if layout == "config.json":
        return _read_huggingface_config(Path(folder) / "config.json")
    note = _newest_note(Path(folder) / "checkpoints")
    if note is None:
        raise CheckpointError(f"{folder} holds no checkpoint that can be read; train it first")
    return ModelConfig.from_dict(note["model"])


def fingerprint(model) -> str:
    """The sha256 of a model's parameters as hex: names, shapes, types and values, whatever layout they came from."""
    found = hashlib.sha256()
    for variable in sorted(model.weights, key=lambda v: v.path):
        value = np.ascontiguousarray(variable.value)
        found.update(f"{variable.path} {value.shape} {value.dtype}\n".encode())
        found.update(value.view(np.uint8).data)
    return found.hexdigest()


def tokenizer_hash(folder) -> str | None:
    """The hash (`Tokenizer.hash`) of the tokenizer that a checkpoint was made with; None if its folder does not say.

    The folder is one that `load_pretrained` takes. Its vocabulary files are read, in a run what its checkpoint notes.
    Raises CheckpointError if the folder is none of these, or if the vocabulary is not laid out as GPT-2's.
    """
    folder = Path(folder)
    if _layout(folder) == "checkpoints":
        return (_newest_note(folder / "checkpoints") or {}).get("tokenizer")
    tokenizer = _read_tokenizer(folder)
    return tokenizer and tokenizer.hash


def load_tokenizer(folder) -> Tokenizer:
    """The tokenizer of a corpus, or of a checkpoint in OpenAI's or Hugging Face's layout; "gpt2": GPT-2's own.

    Raises CheckpointError if the folder holds none.
    """
    if folder == "gpt2":
        return Tokenizer.gpt2()
    inside = Path(folder) / "tokenizer"  # of a corpus
    tokenizer = _read_tokenizer(inside if inside.is_dir() else Path(folder))
    if tokenizer is None:
        raise CheckpointError(
            f"{folder} holds no tokenizer: give the folder of a corpus, or one with encoder.json and vocab.bpe, or gpt2"
        )
    return tokenizer


def _read_tokenizer(folder) -> Tokenizer | None:
    """The tokenizer whose files lie in a folder."""
    try:
        for merges, vocabulary in (("vocab.bpe", "encoder.json"), ("merges.txt", "vocab.json")):
            if (folder / merges).is_file() and (folder / vocabulary).is_file():
                return Tokenizer.from_files(folder / merges, folder / vocabulary)
        if (folder / "tokenizer.json").is_file():  # all that transformers 5 writes
            return _read_tokenizer_json(folder / "tokenizer.json")
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"the vocabulary in {folder} is not laid out as GPT-2's; take its files from the release of the weights"
        ) from error
    return None


def _layout(folder) -> str:
    """What marks the layout of a folder: `hparams.json`, `config.json` or `checkpoints`."""
    for name in ("hparams.json", "config.json", "checkpoints"):
        if (Path(folder) / name).exists():
            return name
    raise CheckpointError(
        f"{folder} holds no model: give a folder with hparams.json (OpenAI's layout), config.json (Hugging Face's) or "
        "checkpoints/ (a training run of gpt2lib)"
    )


def _newest_note(folder) -> dict | None:
    """The `checkpoint.json` of the newest step whose note can be read."""
    for step in reversed(list_steps(folder)):
        try:
            note = json.loads((folder / f"step-{step:08d}" / "checkpoint.json").read_text())
            note["model"], note["tokenizer"]
            return note
        except (OSError, ValueError, KeyError, TypeError):  # damaged; `read` says so
            continue
    return None


def _read_tokenizer_json(path) -> Tokenizer:
    """The tokenizer of a file of Hugging Face's tokenizers, checked as two files of OpenAI are."""
    model = json.loads(path.read_text(encoding="utf-8"))["model"]
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    with tempfile.TemporaryDirectory() as folder:
        merges_txt, vocab_json = Path(folder) / "merges.txt", Path(folder) / "vocab.json"
        merges_txt.write_text("\n".join(["#version: 0.2", *merges]), encoding="utf-8")
        vocab_json.write_text(json.dumps(model["vocab"]), encoding="utf-8")
        return Tokenizer.from_files(merges_txt, vocab_json)
