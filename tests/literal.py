"""GPT-2 written down slowly in NumPy, float64, from the paper and OpenAI's `model.py`, to hold the model against."""

import math

import numpy as np


def gelu(x):
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def norm(x, g, b):
    """One position at a time: x [D]."""
    mean = sum(x) / len(x)
    variance = sum((x - mean) ** 2) / len(x)
    return g * (x - mean) / math.sqrt(variance + 1e-5) + b


def gpt2(p, n_head, tokens, embd=1.0, attn=1.0, resid_attn=1.0, resid_mlp=1.0):
    """Logits [T, V] and cache [L, 2, N, T, H] of one row of tokens, with the parameters p: path -> array.

    `embd`, `attn`, `resid_attn`, `resid_mlp` multiply what dropout would.
    """
    p = {name: np.asarray(value, np.float64) for name, value in p.items()}
    d, t = p["model/wte"].shape[1], len(tokens)
    h = d // n_head
    n_layer = 1 + max(int(name.split("/")[1][1:]) for name in p if name.startswith("model/h"))
    x = [(p["model/wte"][token] + p["model/wpe"][i]) * embd for i, token in enumerate(tokens)]
    cache = np.zeros((n_layer, 2, n_head, t, h))
    for layer in range(n_layer):
        w = {name.removeprefix(f"model/h{layer}/"): value for name, value in p.items()}
        qkv = [norm(row, w["ln_1/g"], w["ln_1/b"]) @ w["attn/c_attn/w"] + w["attn/c_attn/b"] for row in x]
        context = np.zeros((t, d))
        for n in range(n_head):
            head = slice(n * h, (n + 1) * h)
            q, k, v = (np.array([row[part * d : (part + 1) * d][head] for row in qkv]) for part in range(3))
            cache[layer, 0, n], cache[layer, 1, n] = k, v
            for i in range(t):
                scores = np.array([q[i] @ k[j] / math.sqrt(h) for j in range(i + 1)])
                weights = np.exp(scores - max(scores))
                weights = weights / sum(weights) * attn
                context[i, head] = sum(weights[j] * v[j] for j in range(i + 1))
        for i in range(t):
            x[i] = x[i] + (context[i] @ w["attn/c_proj/w"] + w["attn/c_proj/b"]) * resid_attn
            inner = gelu(norm(x[i], w["ln_2/g"], w["ln_2/b"]) @ w["mlp/c_fc/w"] + w["mlp/c_fc/b"])
            x[i] = x[i] + (inner @ w["mlp/c_proj/w"] + w["mlp/c_proj/b"]) * resid_mlp
    logits = np.array([norm(row, p["model/ln_f/g"], p["model/ln_f/b"]) @ p["model/wte"].T for row in x])
    return logits, cache


def nll(logits, labels):
    """Nats of each label: [T, V], [T] -> [T]."""
    pairs = zip(logits, labels, strict=True)
    return np.array([np.log(np.exp(row - row.max()).sum()) + row.max() - row[label] for row, label in pairs])


def distinctive(path, shape):
    """Initial values in which no two parameters are equal and nothing is small: path decides the stream."""
    random = np.random.default_rng(list(path.encode()))
    values = random.normal(0, 0.3, shape)
    return (values + 1 if path.endswith("/g") else values).astype(np.float32)
