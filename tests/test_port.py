"""The checks of 02_port: they pass for a model whose values were computed independently, and fail for another."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
from literal import distinctive, gelu, gpt2, nll, norm

from gpt2lib.checkpoint import load_openai, save_huggingface
from gpt2lib.config import ModelConfig
from gpt2lib.evaluate import port
from gpt2lib.model import GPT2

REFERENCE = Path(__file__).parents[2] / "shared" / "openai-124M" / "reference"
CONFIG = ModelConfig(n_vocab=61, n_ctx=24, n_embd=12, n_head=3, n_layer=2)
PROMPTS = [[5, 17, 3, 3], [60, 1, 44]]


def made(change=lambda arrays: None):
    """A model, after a change of its parameters, and these."""
    arrays = {v.path: np.asarray(v.value) for v in GPT2(CONFIG, init=distinctive).trainable_variables}
    change(arrays)
    return GPT2(CONFIG, init=lambda path, shape: arrays[path]), arrays


def attention(arrays, ids):
    """Maps [L, N, T, T] of the literal model: queries from its inputs, keys from its cache, one head at a time."""
    d, n, t = CONFIG.n_embd, CONFIG.n_head, len(ids)
    maps = np.zeros((CONFIG.n_layer, n, t, t))
    for layer in range(CONFIG.n_layer):
        # the input of a layer: the hidden state of a model that ends before it, told by an output matrix of units
        cut = {k: v for k, v in arrays.items() if not any(k.startswith(f"model/h{i}/") for i in range(layer, 9))}
        if layer == 0:
            x = np.array([arrays["model/wte"][token] + arrays["model/wpe"][i] for i, token in enumerate(ids)])
        else:
            x = unnormed(cut, ids)
        w = {k.removeprefix(f"model/h{layer}/"): np.float64(v) for k, v in arrays.items()}
        qkv = np.array([norm(row, w["ln_1/g"], w["ln_1/b"]) @ w["attn/c_attn/w"] + w["attn/c_attn/b"] for row in x])
        for head in range(n):
            part = slice(head * d // n, (head + 1) * d // n)
            q, k = qkv[:, :d][:, part], qkv[:, d : 2 * d][:, part]
            for i in range(t):
                scores = np.exp([q[i] @ k[j] / np.sqrt(d // n) for j in range(i + 1)])
                maps[layer, head, i, : i + 1] = scores / scores.sum()
    return maps


def unnormed(arrays, ids):
    """The state after the last block of a one-layer literal model, x = residual stream, before ln_f."""
    p = {k: np.float64(v) for k, v in arrays.items()}
    _, cache = gpt2(arrays, CONFIG.n_head, ids)
    x = np.array([p["model/wte"][token] + p["model/wpe"][i] for i, token in enumerate(ids)])
    h, w = CONFIG.n_embd // CONFIG.n_head, {k.removeprefix("model/h0/"): v for k, v in p.items()}
    qkv = np.array([norm(row, w["ln_1/g"], w["ln_1/b"]) @ w["attn/c_attn/w"] + w["attn/c_attn/b"] for row in x])
    context = np.zeros_like(x)
    for n in range(CONFIG.n_head):
        keys, values = cache[0, :, n]
        for i in range(len(ids)):
            q = qkv[i, n * h : (n + 1) * h]
            weights = np.exp([q @ key / np.sqrt(h) for key in keys[: i + 1]])
            context[i, n * h : (n + 1) * h] = weights / weights.sum() @ values[: i + 1]
    x = x + context @ w["attn/c_proj/w"] + w["attn/c_proj/b"]
    inner = gelu(np.array([norm(row, w["ln_2/g"], w["ln_2/b"]) for row in x]) @ w["mlp/c_fc/w"] + w["mlp/c_fc/b"])
    return x + inner @ w["mlp/c_proj/w"] + w["mlp/c_proj/b"]


def recorded(arrays):
    """Values as `references` has them, from the literal model."""
    outs = [gpt2(arrays, CONFIG.n_head, ids)[0] for ids in PROMPTS]
    text = [5, 17]
    for _ in range(4):
        text.append(int(gpt2(arrays, CONFIG.n_head, text)[0][-1].argmax()))
    values = {
        "weights": [
            {"tensor": "model/wpe", "row": 2, "first": arrays["model/wpe"][2, :3].tolist(), "tolerance": 1e-7,
             "source": ""}
        ],
        "logits": [
            {"ids": PROMPTS[0], "position": 2, "words": [0, 7], "logits": outs[0][2, [0, 7]].tolist(),
             "argmax": int(outs[0][2].argmax()), "tolerance": 1e-4, "source": ""},
            {"ids": PROMPTS[1], "position": 1, "argmax": int(outs[1][1].argmax()), "tolerance": 1e-4, "source": ""},
        ],
        "losses": [
            {"ids": PROMPTS[0], "loss": float(nll(outs[0][:-1], PROMPTS[0][1:]).mean()), "tolerance": 1e-4,
             "source": ""}
        ],
        "greedy": [{"prompt": text[:2], "new": text[2:], "text": "", "source": ""}],
    }  # fmt: skip
    prompts = {}
    for i, (ids, out) in enumerate(zip(PROMPTS, outs, strict=True)):
        prompts |= {f"prompt{i}_ids": ids, f"prompt{i}_logits": out[-1], f"prompt{i}_attention": attention(arrays, ids)}
    return values, prompts


def checks(model, values, prompts):
    found = port.variables(model)
    for name in ("weights", "logits", "losses", "greedy"):
        found += getattr(port, name)(model, values[name])
    return found + port.prompts(model, prompts, tolerance=1e-3)


def test_a_faithful_model_passes():
    model, arrays = made()
    found = checks(model, *recorded(arrays))
    assert len(found) == 2 + 1 + 2 + 1 + 1 + 2 * 2
    assert all(check.passed for check in found), [c for c in found if not c.passed]


def transposed(arrays):
    arrays["model/h1/attn/c_proj/w"] = arrays["model/h1/attn/c_proj/w"].T.copy()


def swapped(arrays):
    for name in [name for name in arrays if name.startswith("model/h0/")]:
        other = name.replace("h0", "h1")
        arrays[name], arrays[other] = arrays[other], arrays[name]


def shifted(arrays):
    arrays["model/wpe"] = np.roll(arrays["model/wpe"], 1, axis=0)


@pytest.mark.parametrize("change", [transposed, swapped, shifted])
def test_another_model_fails(change):
    values, prompts = recorded(made()[1])
    found = checks(made(change)[0], values, prompts)
    failed = {check.what for check in found if not check.passed}
    assert any(what.startswith("all logits after prompt 0") for what in failed)
    assert any(what.startswith("loss of") for what in failed)
    if change is not transposed:  # the second map does not depend on what the last block gives out
        assert "all attention maps of prompt 0" in failed


def test_values_with_the_other_gelu_are_known(monkeypatch):
    """Recorded with GELU by the error function: they pass, and are named."""
    import literal

    model, arrays = made()
    error = np.vectorize(math.erf)
    exact = lambda x: 0.5 * x * (1 + error(x / math.sqrt(2)))  # noqa: E731
    monkeypatch.setattr(literal, "gelu", exact)
    monkeypatch.setitem(globals(), "gelu", exact)
    _, prompts = recorded(arrays)
    found = port.prompts(model, prompts, tolerance=1e-3)
    assert all(check.passed for check in found)
    assert [check.what for check in found][::2] == [f"all logits after prompt {i}, GELU by erf" for i in range(2)]


def test_differences_that_are_no_numbers_fail():
    assert not port.Check("x", float("nan"), 1).passed
    assert port._apart([1, 2], [1]) == float("inf")


def test_steps_of_adamw_are_those_of_torch(tmp_path):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    model, _ = made()
    save_huggingface(model, tmp_path / "saved")
    theirs = transformers.GPT2LMHeadModel.from_pretrained(
        tmp_path / "saved", attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0
    )
    record = {"ids": np.random.default_rng(0).integers(0, 61, 33).tolist(), "rows": 2, "learning_rate": 1e-3}
    record |= {"beta_1": 0.9, "beta_2": 0.999, "epsilon": 1e-3, "weight_decay": 0.01, "tolerance": 1e-4, "source": ""}
    ids = torch.tensor(record["ids"])
    x, y = ids[:-1].reshape(2, 16), ids[1:].reshape(2, 16)
    optimizer = torch.optim.AdamW(theirs.parameters(), 1e-3, (0.9, 0.999), 1e-3, 0.01)
    record["losses"] = []
    for _ in range(10):
        loss = torch.nn.functional.cross_entropy(theirs(x).logits.reshape(32, -1), y.reshape(32))
        record["losses"].append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    before = [np.asarray(v.value) for v in model.trainable_variables]
    first, steps = port.training(model, record)
    assert first.passed and steps.passed, (first, steps)
    assert record["losses"][0] - record["losses"][-1] > 0.1, "nothing was learnt, so nothing was tested"
    assert not port.training(model, record | {"learning_rate": 2e-3})[1].passed
    for a, v in zip(before, model.trainable_variables, strict=True):
        np.testing.assert_array_equal(a, v.value)


def test_the_golden_checkpoint_passes(golden):
    model = load_openai(golden / "openai-test")
    arrays = dict(np.load(golden / "openai-test" / "golden.npz"))
    assert all(check.passed for check in port.golden(model, arrays))
    arrays["logits"] = arrays["logits"] + 1e-3
    assert [c.passed for c in port.golden(model, arrays)] == [True, True, False, True, True]


def test_the_other_backend_gives_the_same(golden):
    tokens = np.load(golden / "openai-test" / "golden.npz")["tokens"]
    other = port.on_the_other_backend(golden / "openai-test", tokens)
    if other is None:
        pytest.skip("the other backend is not installed")
    ours = np.asarray(load_openai(golden / "openai-test")(tokens))
    np.testing.assert_allclose(other, ours, atol=1e-5)


@pytest.mark.backend_free
def test_every_record_can_be_used():
    values, prompts = port.references()
    for name in ("weights", "logits", "hidden", "losses"):
        assert all(record["source"] and record["tolerance"] > 0 for record in values[name])
    assert len(values["training"]["ids"]) == 257 and len(values["training"]["losses"]) == 10
    assert [len(values["greedy"][size]) for size in ("117M", "345M")] == [3, 2]
    for i in range(5):
        t = len(prompts[f"prompt{i}_ids"])
        assert prompts[f"prompt{i}_logits"].shape == (50257,)
        assert prompts[f"prompt{i}_attention"].shape == (12, 12, t, t)
        np.testing.assert_allclose(prompts[f"prompt{i}_attention"].sum(-1), 1, atol=1e-5)


@pytest.mark.backend_free
def test_records_are_those_of_their_sources():
    if not REFERENCE.exists():
        pytest.skip("the recorded values are not here")
    values, prompts = port.references()
    batch = json.loads((REFERENCE / "llmc_124M_first_batch.json").read_text())
    assert values["training"]["ids"] == batch["tokens"]
    assert values["training"]["losses"] == batch["expected_losses"]
    with np.load(REFERENCE / "transformer_explainer_gpt2_small.npz") as theirs:
        for i in range(5):
            np.testing.assert_array_equal(prompts[f"prompt{i}_logits"], theirs[f"ex{i}_logits"])
            np.testing.assert_array_equal(prompts[f"prompt{i}_attention"], theirs[f"ex{i}_attn_softmax"])
    published = json.loads((REFERENCE / "published.json").read_text())
    assert values["logits"][0]["logits"] == published["logits_124M"][0]["logits"]
    assert values["losses"][0]["loss"] == published["losses"][0]["mean_loss"]
