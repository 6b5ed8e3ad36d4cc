"""Generation: prompts in, new tokens out, with a KV cache inside one compiled program."""

import secrets

import keras
import numpy as np
from keras import ops

from gpt2lib.device import compiled
from gpt2lib.seed import FixedSeed

_LOWEST = -1e10  # what OpenAI's sample.py gives to words that are out


def keep_top_k(logits, k: int):
    """[B, V] -> [B, V]: all but the k largest become -1e10; ties with the k-th stay (`top_k_logits`, openai/gpt-2)."""
    least = ops.top_k(logits, k)[0][:, -1:]
    return ops.where(logits < least, _LOWEST, logits)


def keep_top_p(logits, p):
    """[B, V] -> [B, V]: nucleus sampling as `top_p_logits` of openai/gpt-2 has it.

    Keeps the largest words while their cumulated probability is <= p, at least one: the word that crosses p is left out
    (Holtzman et al. 2020 and most libraries keep it).
    """
    falling = -ops.sort(-logits, axis=-1)
    cumulated = ops.cumsum(ops.softmax(falling, axis=-1), axis=-1)
    last = ops.maximum(ops.sum(ops.cast(cumulated <= p, "int32"), axis=-1, keepdims=True) - 1, 0)
    least = ops.take_along_axis(falling, last, axis=-1)
    return ops.where(logits < least, _LOWEST, logits)


def choose(logits, temperature, top_k, top_p, use_top_p, seed):
    """The next token of each row, sampled: [B, V] -> [B] int32."""
    logits = logits / temperature
    if top_k:
        logits = keep_top_k(logits, top_k)
    if use_top_p:
        logits = keep_top_p(logits, top_p)
    return ops.cast(keras.random.categorical(logits, 1, seed=seed)[:, 0], "int32")


def program(model, length, space, greedy, top_k, use_top_p):
    """`f(tokens [B, T], start [B], temperature, top_p, seed, end) -> new tokens [B, length]`, not yet compiled."""

    def run(tokens, start, temperature, top_p, seed, end):
        b, t = tokens.shape

        def pick(logits, i):
            if greedy:
                return ops.cast(ops.argmax(logits, axis=-1), "int32")
            return choose(logits, temperature, top_k, top_p, use_top_p, FixedSeed(seed, i))

        h, cache = model.hidden(tokens, model.empty_cache(b, space), 0, start)
        token = pick(model.logits(h[:, -1]), 0)  # [B]
        out = ops.concatenate([token[:, None], ops.broadcast_to(end, (b, length - 1))], axis=1)

        def going(i, token, finished, out, cache):
            return ops.logical_and(i < length, ops.logical_not(ops.all(finished)))

        def body(i, token, finished, out, cache):
            h, cache = model.hidden(token[:, None], cache, t + i - 1, start)
            token = ops.where(finished, end, pick(model.logits(h[:, -1]), i))
            out = ops.slice_update(out, (0, i), token[:, None])
            return i + 1, token, ops.logical_or(finished, ops.equal(token, end)), out, cache

        state = (ops.convert_to_tensor(1, "int32"), token, ops.equal(token, end), out, cache)
        return ops.while_loop(going, body, state)[3]

    return run


def generate(
    model, prompts, length, temperature=1.0, top_k=0, top_p=1.0, seed=None, end_of_text: int | None = -1, multiple=16
) -> list[list[int]]:
    """Continue each prompt by up to `length` tokens.

    Args:
        model: GPT2.
        prompts: lists of token ids, of any lengths >= 1, run as one batch; [end_of_text] asks for a text from nothing.
        length: most new tokens; with the longest prompt it must fit into n_ctx.
        temperature: logits are divided by it; 0 always takes the most likely token.
        top_k: sample among the k most likely tokens; 0: all.
        top_p: sample among the most likely tokens of this total probability, as OpenAI's code does; 1: all.
        seed: the same seed gives the same tokens (on one backend); None: a new one each time.
        end_of_text: a row ends before this token; -1: the last of the vocabulary, as in GPT-2; None: never.
        multiple: prompts are padded to a multiple of it, so that those of like length share a program.

    Returns: for each prompt its new tokens only, without the end of text.

    The program is compiled once for each (number of prompts, length, top_k, prompt length rounded up to `multiple`).
    """
    c = model.config
    if length < 1:
        raise ValueError(f"length must be at least 1, got {length}")
    if temperature < 0 or not 0 < top_p <= 1 or not 0 <= top_k <= c.n_vocab:
        raise ValueError(
            f"need temperature >= 0, 0 < top_p <= 1, 0 <= top_k <= {c.n_vocab}; got {temperature}, {top_p}, {top_k}"
        )
    for i, prompt in enumerate(prompts):
        if not prompt:
            raise ValueError(f"prompt {i} is empty; to start from nothing give [{c.n_vocab - 1}], the end of text")
        if len(prompt) + length > c.n_ctx:
            raise ValueError(
                f"prompt {i} has {len(prompt)} tokens and {length} more are asked for, but the context holds {c.n_ctx}"
                "; shorten the prompt or the length"
            )
        if not 0 <= min(prompt) <= max(prompt) < c.n_vocab:
            raise ValueError(f"prompt {i} has an id outside 0..{c.n_vocab - 1}; was it encoded by another tokenizer?")
    if not prompts:
        return []
    end = c.n_vocab - 1 if end_of_text == -1 else -1 if end_of_text is None else end_of_text
    width = -(-max(map(len, prompts)) // multiple) * multiple
    tokens = np.array([[0] * (width - len(p)) + list(p) for p in prompts], np.int32)  # padded on the left: [B, T]
    start = np.array([width - len(p) for p in prompts], np.int32)

    greedy = temperature == 0
    key = (tokens.shape, length, greedy, top_k, top_p < 1)
    programs = model.__dict__.setdefault("_programs", {})
    if key not in programs:
        programs[key] = compiled(model, program(model, length, width + length, greedy, top_k, top_p < 1))
    seed = secrets.randbits(31) if seed is None else seed
    floats = [ops.convert_to_tensor(value, "float32") for value in (temperature or 1.0, top_p)]
    tokens, start, seed, end_id = (ops.convert_to_tensor(value, "int32") for value in (tokens, start, seed, end))
    rows = np.asarray(programs[key](tokens, start, *floats, seed, end_id)).tolist()
    return [row[: row.index(end)] if end in row else row for row in rows]
