"""Is our model OpenAI's? What others recorded of the released checkpoints, beside what ours computes with them.

The records lie in `data/published/openai_124M.json` and `.npz`, each with its source.
"""

import contextlib
import json
import math
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import keras
import numpy as np
from keras import ops

from gpt2lib.checkpoint import openai_shapes
from gpt2lib.model import GPT2, look_up, nll
from gpt2lib.sample import generate

PUBLISHED = Path(__file__).parents[2] / "data" / "published"


@dataclass(frozen=True)
class Check:
    """One comparison: passed if the largest difference is within the tolerance."""

    what: str
    difference: float
    tolerance: float
    source: str = ""

    @property
    def passed(self) -> bool:
        return self.difference <= self.tolerance  # False for NaN


def references() -> tuple[dict, dict]:
    """The recorded values, and the five prompts: ids [T], logits [V], attention [L, N, T, T] under prompt<i>_<name>."""
    values = json.loads((PUBLISHED / "openai_124M.json").read_text(encoding="utf-8"))
    with np.load(PUBLISHED / "openai_124M.npz") as prompts:
        return values, dict(prompts)


def _apart(a, b) -> float:
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return float(np.max(np.abs(a - b))) if a.shape == b.shape else math.inf


def _logits(model, ids) -> np.ndarray:
    return np.asarray(model(np.array([ids], np.int32)))[0]  # [T, V]


def variables(model) -> list[Check]:
    """Names, shapes and number of parameters against the list of variables in OpenAI's layout."""
    ours = {v.path: tuple(v.shape) for v in model.trainable_variables}
    theirs = {name: shape[1:] if name.endswith("/w") else shape for name, shape in openai_shapes(model.config).items()}
    differing = [name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name)]
    count = sum(math.prod(shape) for shape in theirs.values())
    return [
        Check(f"names and shapes of {len(theirs)} variables", len(differing), 0, "layout of openai/gpt-2"),
        Check(f"{count:,} parameters", abs(model.count_params() - count), 0, "layout of openai/gpt-2"),
    ]


def weights(model, records) -> list[Check]:
    """The first values of rows of tensors."""
    arrays = {v.path: v for v in model.trainable_variables}
    checks = []
    for r in records:
        seen = np.asarray(arrays[r["tensor"]].value[r["row"]])[: len(r["first"])]
        checks.append(Check(f"{r['tensor']}[{r['row']}]", _apart(seen, r["first"]), r["tolerance"], r["source"]))
    return checks


def logits(model, records) -> list[Check]:
    """Logits of some words at a position, and the most likely word there (a difference of 1 if it is another)."""
    checks = []
    for r in records:
        row = _logits(model, r["ids"])[r["position"]]
        apart = _apart(row[r["words"]], r["logits"]) if "words" in r else 0.0
        if "argmax" in r and row.argmax() != r["argmax"]:
            apart = max(apart, 1.0)
        checks.append(
            Check(f"logits after {len(r['ids'][: r['position'] + 1])} tokens", apart, r["tolerance"], r["source"])
        )
    return checks


def hidden(model, records) -> list[Check]:
    """The first values of the final hidden states, after ln_f."""
    checks = []
    for r in records:
        states = np.asarray(model.hidden(np.array([r["ids"]], np.int32))[0])[0, r["position"]]
        apart = _apart(states[: len(r["first"])], r["first"])
        checks.append(Check("final hidden state", apart, r["tolerance"], r["source"]))
    return checks


def prompts(model, arrays, tolerance=2e-3) -> list[Check]:
    """All logits of the last position, and all attention maps, of each prompt in `arrays` (see `references`).

    The program that recorded them may have GELU by the error function instead of OpenAI's by tanh, which moves logits
    by more than rounding does; both are computed, and the one that comes closer is named.
    """
    checks, source = [], "poloclub/transformer-explainer, ONNX, float32"
    for i in range(sum(name.endswith("_ids") for name in arrays)):
        ids, row, maps = (arrays[f"prompt{i}_{name}"] for name in ("ids", "logits", "attention"))
        found = []
        for exact in (False, True):
            seen, attention = walk(model, ids, exact)
            found.append((_apart(seen, row), _apart(attention, maps), "erf" if exact else "tanh"))
        logits_apart, maps_apart, kind = min(found)
        checks.append(Check(f"all logits after prompt {i}, GELU by {kind}", logits_apart, tolerance, source))
        checks.append(Check(f"all attention maps of prompt {i}", maps_apart, tolerance / 10, source))
    return checks


def walk(model, ids, exact: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """A text block by block: the logits of its last position [V] and all attention weights [L, N, T, T], float32.

    Queries follow from each block's input, keys are those that the block keeps in its cache. `exact`: GELU by the error
    function instead of the model's own.
    """
    t = len(ids)
    x = look_up(model.wte, np.array([ids], np.int32)) + look_up(model.wpe, np.arange(t))
    x = ops.cast(x, model.compute_dtype)
    mask = np.where(np.tri(t, dtype=bool), 0, -1e10).astype(np.float32)
    maps = []
    for block in model.blocks:
        q, *_ = ops.split(block.attn.c_attn(block.ln_1(x)), 3, axis=-1)
        a, (keys, _) = block.attn(block.ln_1(x), bias=mask)
        x = x + a
        h = block.ln_2(x)
        x = x + (block.mlp.c_proj(ops.gelu(block.mlp.c_fc(h), approximate=False)) if exact else block.mlp(h))
        scores = ops.matmul(block.attn.split_heads(q), ops.swapaxes(keys, -1, -2))
        scores = ops.cast(scores, "float32") / math.sqrt(model.config.n_embd // model.config.n_head)
        maps.append(np.asarray(ops.softmax(scores + mask))[0])
    return np.asarray(model.logits(model.ln_f(x)))[0, -1], np.stack(maps)


def losses(model, records) -> list[Check]:
    """Mean nats of a text's tokens but the first."""
    checks = []
    for r in records:
        ids = np.array(r["ids"], np.int32)
        loss = float(np.mean(np.asarray(nll(model(ids[None, :-1]), ids[None, 1:]))))
        checks.append(Check(f"loss of {len(ids) - 1} tokens", abs(loss - r["loss"]), r["tolerance"], r["source"]))
    return checks


def greedy(model, records) -> list[Check]:
    """Greedy continuations: how many tokens differ."""
    checks = []
    for r in records:
        ((*new,),) = generate(model, [r["prompt"]], len(r["new"]), temperature=0, end_of_text=None)
        wrong = sum(a != b for a, b in zip(new, r["new"], strict=True))
        checks.append(Check(f"greedy: {r['text'][:30]!r}...", wrong, 0, r["source"]))
    return checks


class _AdamW(keras.optimizers.AdamW):
    """AdamW with epsilon after the bias correction (Kingma and Ba 2015, algorithm 1); Keras adds it before."""

    def update_step(self, gradient, variable, learning_rate):
        rate, gradient = ops.cast(learning_rate, variable.dtype), ops.cast(gradient, variable.dtype)
        step = ops.cast(self.iterations + 1, variable.dtype)
        m, v = (slots[self._get_variable_index(variable)] for slots in (self._momentums, self._velocities))
        self.assign_add(m, (gradient - m) * (1 - self.beta_1))
        self.assign_add(v, (ops.square(gradient) - v) * (1 - self.beta_2))
        m_hat = m / (1 - ops.power(ops.cast(self.beta_1, variable.dtype), step))
        v_hat = v / (1 - ops.power(ops.cast(self.beta_2, variable.dtype), step))
        self.assign_sub(variable, rate * m_hat / (ops.sqrt(v_hat) + self.epsilon))


def training(model, record) -> list[Check]:
    """The losses of one batch before and after each step of AdamW, without dropout, in a copy of the model."""
    arrays = {v.path: np.asarray(v.value) for v in model.trainable_variables}
    still = model.config.replace(embd_pdrop=0.0, attn_pdrop=0.0, resid_pdrop=0.0)
    model = GPT2(still, init=lambda path, shape: arrays[path])
    ids = np.array(record["ids"], np.int32)
    x, y = ids[:-1].reshape(record["rows"], -1), ids[1:].reshape(record["rows"], -1)
    names = ("learning_rate", "beta_1", "beta_2", "epsilon", "weight_decay")
    model.compile(
        optimizer=_AdamW(name="adam_w", **{name: record[name] for name in names}),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        jit_compile=keras.backend.backend() == "jax",
    )
    seen = [float(model.train_on_batch(x, y)) for _ in record["losses"]]
    apart = [abs(a - b) for a, b in zip(seen, record["losses"], strict=True)]
    return [
        Check(f"loss of a batch of {x.size} tokens", apart[0], record["tolerance"], record["source"]),
        Check(
            f"its losses after {len(apart) - 1} steps of AdamW", max(apart[1:]), record["tolerance"], record["source"]
        ),
    ]


@contextlib.contextmanager
def full_precision():
    """Products of float32 in float32: on a TPU or a GPU they would be rounded to fewer bits."""
    if keras.backend.backend() == "jax":
        import jax

        with jax.default_matmul_precision("highest"):
            yield
    else:
        import tensorflow as tf

        before = tf.config.experimental.tensor_float_32_execution_enabled()
        tf.config.experimental.enable_tensor_float_32_execution(False)
        try:
            yield
        finally:
            tf.config.experimental.enable_tensor_float_32_execution(before)


@full_precision()
def released(model, size: str) -> list[Check]:
    """Every check that there is for a released size: 117M all of them, others what others recorded of them."""
    values, arrays = references()
    checks = variables(model)
    if size == "117M":
        checks += weights(model, values["weights"]) + logits(model, values["logits"]) + hidden(model, values["hidden"])
        checks += prompts(model, arrays) + losses(model, values["losses"])
    checks += greedy(model, values["greedy"].get(size, []))
    return checks + (training(model, values["training"]) if size == "117M" else [])


@full_precision()
def golden(model, arrays) -> list[Check]:
    """The values that OpenAI's own code gave for made-up parameters, `tests/golden/openai-test/golden.npz`."""
    source, tokens = "openai/gpt-2 model.py and sample.py, run unchanged", arrays["tokens"]
    ours = model(tokens)
    nats = nll(ours[:, :-1], tokens[:, 1:])
    prompt, text = arrays["prompt"].tolist(), arrays["greedy"].tolist()
    prompt, text = (rows if isinstance(rows[0], list) else [rows] for rows in (prompt, text))
    new = [row[len(start) :] for start, row in zip(prompt, text, strict=True)]
    seen = generate(model, prompt, len(new[0]), temperature=0, end_of_text=None)
    wrong = sum(a != b for x, y in zip(seen, new, strict=True) for a, b in zip(x, y, strict=True))
    return [
        *variables(model),
        Check(f"{arrays['logits'].size:,} logits", _apart(np.asarray(ours), arrays["logits"]), 1e-5, source),
        Check(f"nats of {arrays['nll'].size} tokens", _apart(np.asarray(nats), arrays["nll"]), 1e-5, source),
        Check(f"greedy: {len(new[0])} tokens", wrong, 0, source),
    ]


_OTHER = """
import sys
import numpy as np
from gpt2lib.checkpoint import load_pretrained
np.save(sys.argv[2], np.asarray(load_pretrained(sys.argv[1])(np.load(sys.argv[3]))))
"""


def on_the_other_backend(folder, tokens) -> np.ndarray | None:
    """Logits [B, T, V] of a checkpoint's model for tokens [B, T], by the other backend; None if it is not installed."""
    import importlib.util

    other = "jax" if keras.backend.backend() == "tensorflow" else "tensorflow"
    if importlib.util.find_spec(other) is None:
        return None
    with tempfile.TemporaryDirectory() as place:
        out, given = Path(place) / "logits.npy", Path(place) / "tokens.npy"
        np.save(given, np.asarray(tokens, np.int32))
        paths = os.pathsep.join([str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")])
        environment = os.environ | {"KERAS_BACKEND": other, "TF_CPP_MIN_LOG_LEVEL": "3", "PYTHONPATH": paths}
        command = [sys.executable, "-c", _OTHER, str(folder), str(out), str(given)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"{other} could not run the model: {done.stderr.strip().splitlines()[-1]}")
        return np.load(out)
