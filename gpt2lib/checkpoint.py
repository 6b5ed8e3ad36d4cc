"""Checkpoints: of training, atomic and checksummed; OpenAI's TF1 layout, both ways.

A training checkpoint is a folder `step-00000500` with `state.safetensors` (parameters, dropout state, optimizer) and
`checkpoint.json` (step, configuration, checksum): plain arrays, so that either backend restores what the other saved.
"""

import hashlib
import json
import os
import shutil
import warnings
from pathlib import Path

import numpy as np

from gpt2lib.config import ModelConfig
from gpt2lib.data import replace_folder


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be read or written; the message says what, where and what to do."""


# --- training checkpoints ---------------------------------------------------------------------------------------------


def state_arrays(model, optimizer=None) -> dict:
    """Every variable of the model and of the optimizer, by its path, as NumPy arrays."""
    variables = [*model.variables, *(optimizer.variables if optimizer else [])]
    return {v.path: np.asarray(v.value) for v in variables}


def save(folder, step: int, arrays: dict, info: dict, keep: int = 2) -> Path:
    """Write `folder/step-XXXXXXXX`, beside and then renamed, and delete all but the last `keep` up to this step.

    `info` is stored as JSON beside the arrays. Raises CheckpointError when the disk is full; older ones stay then.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import save_file

    folder = Path(folder)
    final, part = folder / f"step-{step:08d}", folder / f".step-{step:08d}.part"
    try:
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        save_file({name: np.asarray(array, order="C") for name, array in arrays.items()}, part / "state.safetensors")
        document = {**info, "step": step, "sha256": _sha256(part / "state.safetensors")}
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
            if _sha256(path / "state.safetensors") != info["sha256"]:
                raise ValueError("its checksum differs")
            return load_file(path / "state.safetensors"), info
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            warnings.warn(f"checkpoint {path} is damaged ({error}); falling back to the one before", stacklevel=2)
    if steps:
        raise CheckpointError(f"every checkpoint in {folder} is damaged; delete the folder to start the run afresh")
    return None


def assign(variables, arrays: dict, where: str) -> None:
    """Set each variable from the array with its path; all are checked before the first is set."""
    for v in variables:
        if v.path not in arrays:
            raise CheckpointError(f"{where} has no variable `{v.path}`; it was written by another model or optimizer")
        if tuple(arrays[v.path].shape) != tuple(v.shape):
            raise CheckpointError(
                f"`{v.path}` in {where} has shape {list(arrays[v.path].shape)}, the model needs {list(v.shape)}; "
                "use the configuration that it was saved with"
            )
    for v in variables:
        v.assign(arrays[v.path])


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
    model = GPT2(config, init=lambda path, shape: _expect(arrays, path, shape, run_dir), dtype=dtype or info["dtype"])
    return model, info


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


def load_openai(folder, dtype: str | None = None):
    """The model of a folder in OpenAI's released layout (`hparams.json`, `model.ckpt.*`).

    Needs no TensorFlow. The checkpoint may have several shards and hold optimizer slots, which are left out.
    Raises CheckpointError naming a missing or mis-shaped variable.
    """
    from gpt2lib.model import GPT2

    folder = Path(folder)
    if not (folder / "hparams.json").is_file():
        raise CheckpointError(f"{folder} has no hparams.json; give the folder that holds it and model.ckpt.*")
    known = ModelConfig().hparams
    try:
        hparams = json.loads((folder / "hparams.json").read_text())
        config = ModelConfig.from_dict({name: hparams[name] for name in known})
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{folder}/hparams.json does not hold the numbers {', '.join(known)} ({error}); download it again"
        ) from error
    arrays = _read_tensors(folder, config)

    def values(path, shape):
        array = arrays[path]
        return array[0] if path.endswith("/w") else array  # OpenAI's kernels have a leading 1

    return GPT2(config, init=values, dtype=dtype)


def save_openai(model, folder) -> None:
    """Write the model as a folder in OpenAI's released layout: `hparams.json`, `checkpoint`, `model.ckpt.*`.

    Needs TensorFlow, whatever the backend in use. Written beside and renamed: an older checkpoint stays until it
    succeeds, and the other files of its folder stay in any case. A folder that holds something else is refused.
    """
    tf = _tensorflow("write OpenAI's TF1 layout")
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


def _read_tensors(folder, config) -> dict:
    """The variables of an OpenAI checkpoint, mapped from disk: name -> float32 array."""
    index = folder / "model.ckpt.index"
    if not index.is_file():
        found = sorted(folder.glob("*.index"))  # a training's own, such as model.ckpt-500000.index
        if not found:
            raise CheckpointError(f"{folder} has no model.ckpt.index; download the checkpoint again")
        index = found[-1]
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
        dtype, seen, shard, offset, size = entries[name]
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
    return arrays


def _read_index(path) -> dict:
    """What a `model.ckpt.index` says: name -> (dtype number, shape, shard, offset, size in bytes).

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
                )
    return entries


def _tensorflow(purpose):
    try:
        os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
        import tensorflow
    except ImportError as error:
        raise CheckpointError(f"TensorFlow is needed to {purpose}; run: pip install tensorflow") from error
    return tensorflow


def _expect(arrays, path, shape, where):
    if path not in arrays or tuple(arrays[path].shape) != tuple(shape):
        raise CheckpointError(f"the checkpoint of {where} lacks `{path}` of shape {list(shape)}; was it edited?")
    return arrays[path]


def _sha256(path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path) -> None:
    """Make sure that a file or a folder's entries are on disk before the rename that relies on them."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
