"""Generation: prompts in, new tokens out, by two compiled programs with a KV cache between them.

The first reads the prompts, the second goes on token by token. What either is compiled for is its shapes and `Rules`;
temperature, p and the like are arguments. Random numbers are a function of a sequence's key, the token and the word.
"""

import contextlib
import json
import math
import os
import secrets
import warnings
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from functools import partial
from numbers import Integral, Real
from pathlib import Path

import keras
import numpy as np
from keras import ops

from gpt2lib import attention, device
from gpt2lib.device import compiled
from gpt2lib.model import fused, one_row

_LOWEST = -1e10  # what OpenAI's sample.py gives to words that are out
_CHUNK = 32  # tokens that the second program makes at most before it comes back


# --- which words, and which of them ---------------------------------------------------------------------------------


def _ordered(logits):
    """Integers in the order of float32 numbers: the bits, those of negative ones turned."""
    bits = ops.view(logits, "int32")
    return ops.where(bits < 0, ops.bitwise_xor(bits, 2**31 - 1), bits)


def _largest(enough, rows):
    """The largest int32 of each row for which `enough` [B, 1] still holds, found bit by bit: [B, 1].

    A sort of the vocabulary takes ten to thirty times as long on a CPU.
    """

    def body(i, t):
        more = t + ops.left_shift(ops.ones_like(t), 31 - i)  # the first step wraps from the smallest number to 0
        return i + 1, ops.where(enough(more), more, t)

    lowest = ops.full((rows, 1), -(2**31), "int32")
    return ops.while_loop(lambda i, t: i < 32, body, (ops.convert_to_tensor(0, "int32"), lowest))[1]


def _mass(weights):
    """Sums of rows in two steps of about sqrt(V) numbers, which are short and use vector instructions: -> [B, 1]."""
    b, v = weights.shape
    width = math.isqrt(v - 1) + 1
    folded = ops.reshape(ops.pad(weights, ((0, 0), (0, -v % width))), (b, -1, width))
    return ops.sum(ops.sum(folded, axis=1), axis=1, keepdims=True)


def keep_top_k(logits, k):
    """[B, V] -> [B, V]: all but the k largest become -1e10; ties with the k-th stay (`top_k_logits`, openai/gpt-2)."""
    keys = _ordered(logits)
    least = _largest(lambda t: ops.sum(ops.cast(keys >= t, "int32"), axis=1, keepdims=True) >= k, logits.shape[0])
    return ops.where(keys < least, _LOWEST, logits)


def keep_top_p(logits, p, crossing: bool = True):
    """[B, V] -> [B, V]: nucleus sampling; all but the most likely words become -1e10, at least one stays.

    Args:
        p: how much probability they have together, below 1.
        crossing: keep the word that crosses p, so that they have p or more (Holtzman et al. 2020, arXiv:1904.09751,
            equation 2); False: leave it out, so that they have p at most (`top_p_logits`, openai/gpt-2).

    Ties with the last word that is kept stay.
    """
    keys, weights = _ordered(logits), ops.exp(logits - ops.max(logits, axis=1, keepdims=True))
    p = p * _mass(weights)

    def from_(t):
        return _mass(ops.where(keys >= t, weights, 0.0))

    if crossing:
        least = _largest(lambda t: from_(t) >= p, logits.shape[0])
    else:
        least = _largest(lambda t: from_(t) > p, logits.shape[0])  # where p is crossed
        above = _mass(ops.where(keys > least, weights, 0.0))
        one = ops.max(ops.where(keys == least, weights, 0.0), axis=1, keepdims=True)
        crossed = ops.logical_and(above > 0, above + one > p)
        least = ops.where(crossed, least + 1, least)
    return ops.where(keys < least, _LOWEST, logits)


def penalise(logits, seen, penalty):
    """[B, V]: logits of words that were seen, divided by the penalty where positive, else multiplied (CTRL: Keskar et
    al. 2019, arXiv:1909.05858, section 4.1; negative logits as in most libraries)."""
    return ops.where(seen, ops.where(logits > 0, logits / penalty, logits * penalty), logits)


def threefry(keys, counters):
    """Two random words for each two of `counters`, by the two of `keys`; all are uint32, of shapes that broadcast.

    Threefry-2x32 of 20 rounds (Salmon et al. 2011, doi:10.1145/2063384.2063405, section 3.2).
    """

    def word(x):
        return ops.convert_to_tensor(np.uint32(x))

    (x, y), (a, b) = counters, keys
    schedule = a, b, ops.bitwise_xor(ops.bitwise_xor(a, b), word(0x1BD11BDA))
    x, y = x + a, y + b
    for group in range(5):
        for turned in ((13, 15, 26, 6), (17, 29, 16, 24))[group % 2]:
            x = x + y
            y = ops.bitwise_or(ops.left_shift(y, word(turned)), ops.right_shift(y, word(32 - turned)))
            y = ops.bitwise_xor(y, x)
        x, y = x + schedule[(group + 1) % 3], y + schedule[(group + 2) % 3] + word(group + 1)
    return x, y


def gumbel(keys, made, v):
    """Numbers of Gumbel's distribution for each word of the vocabulary: keys [B, 2] uint32, the number of tokens made
    before -> [B, V] float32. What a row gets depends on its key, `made` and the word only, on both backends alike."""
    half = -(-v // 2)
    words = ops.convert_to_tensor(np.arange(half, dtype=np.uint32))[None, :]
    x = threefry((keys[:, :1], keys[:, 1:]), (words, ops.cast(made, "uint32")))
    bits = ops.right_shift(ops.concatenate(x, axis=1)[:, :v], ops.convert_to_tensor(np.uint32(1)))
    u = ops.cast(ops.cast(bits, "int32"), "float32") * 2.0**-31 + 2.0**-32
    return -ops.log(-ops.log1p(-ops.minimum(u, 1 - 2.0**-24)))


def draw(logits, keys, made):
    """A word of each row, as likely as softmax says: logits [B, V], keys [B, 2], tokens made before -> [B] int32.

    The largest of logits + Gumbel numbers (Maddison et al. 2014, arXiv:1411.0030, section 2). Where logits are a little
    other ones, as they are by rounding in a batch of another size, the word is nearly always the same.
    """
    return _largest_word(logits + gumbel(keys, made, logits.shape[1]))


def _largest_word(x):
    """As `ops.argmax`, for which XLA has no vector instructions on a CPU: [B, V] -> [B] int32."""
    largest = x == ops.max(x, axis=1, keepdims=True)
    return ops.min(ops.where(largest, ops.arange(x.shape[1], dtype="int32"), x.shape[1] - 1), axis=1)


# --- programs ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rules:
    """Of the settings, those that a program is compiled for."""

    greedy: bool = False
    top_k: bool = False
    top_p: bool = False
    crossing: bool = True
    penalty: bool = False
    early: bool = False  # tokens that end a text are forbidden at first
    beams: int = 1


@dataclass(frozen=True)
class Knobs:
    """The others, which are arguments."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    penalty: float = 1.0
    earliest: int = 0  # so many tokens come before one that ends a text
    ends: np.ndarray | None = None  # [V], whether a word ends a text

    def tensors(self):
        temperature, top_p, penalty = (
            ops.convert_to_tensor(x, "float32") for x in (max(self.temperature, 1e-30), self.top_p, self.penalty)
        )
        ends = ops.convert_to_tensor(self.ends, "bool")
        return temperature, _int32(self.top_k), top_p, penalty, _int32(self.earliest), ends


def _pick(logits, made, keys, seen, rules, knobs):
    """The next token of each row and its log-probability in the model's own softmax: [B, V] -> [B], [B]."""
    temperature, top_k, top_p, penalty, earliest, ends = knobs
    x = penalise(logits, seen, penalty) if rules.penalty else logits
    if rules.early:
        x = ops.where(ops.logical_and(ends, made < earliest), _LOWEST, x)
    if rules.greedy:
        token = _largest_word(x)
    else:
        x = (x - ops.max(x, axis=1, keepdims=True)) / temperature  # finite or -inf, however low
        x = keep_top_k(x, top_k) if rules.top_k else x
        x = keep_top_p(x, top_p, rules.crossing) if rules.top_p else x
        token = draw(x, keys, made)
    own = ops.take_along_axis(logits, token[:, None], axis=1)[:, 0]
    return token, own - ops.logsumexp(logits, axis=1)


def _widen(logits, made, scores, finished, seen, rules, knobs):
    """The best continuations of the beams of each prompt: [B W, V] -> token, its log-probability and the beam that it
    continues, [B W] each, and the scores of the new beams."""
    *_, penalty, earliest, ends = knobs
    own = logits - ops.logsumexp(logits, axis=1, keepdims=True)
    x = penalise(own, seen, penalty) if rules.penalty else own
    if rules.early:
        x = ops.where(ops.logical_and(ends, made < earliest), _LOWEST, x)
    rows, v = x.shape
    width = rules.beams
    stay = ops.where(ops.arange(v) == 0, 0.0, _LOWEST)  # a finished beam has one continuation: none
    x = scores[:, None] + ops.where(finished[:, None], stay, x)
    scores, best = ops.top_k(ops.reshape(x, (rows // width, width * v)), width)  # [B, W]
    best = ops.cast(best, "int32")
    parent = ops.reshape(best // v + width * ops.arange(rows // width, dtype="int32")[:, None], (-1,))
    token = ops.reshape(best % v, (-1,))
    flat = ops.take(ops.reshape(own, (-1,)), parent * v + token)
    return token, flat, parent, ops.reshape(scores, (-1,))


def _chosen(logits, made, keys, state, knobs, rules):
    """One choice for all rows: what comes out of it (token, log-probability, beam), the parents of the rows where they
    change, and the state with it."""
    finished, seen, scores, token = state
    parent = ops.arange(logits.shape[0], dtype="int32")
    if rules.beams > 1:
        new, own, parent, scores = _widen(logits, made, scores, finished, seen, rules, knobs)
        finished = ops.take(finished, parent, axis=0)
        token = ops.take(token, parent, axis=0)
        seen = ops.take(seen, parent, axis=0) if rules.penalty else seen
    else:
        new, own = _pick(logits, made, keys, seen, rules, knobs)
    out = ops.where(finished, -1, new), own, parent
    token = ops.where(finished, token, new)  # what a finished row reads does not matter
    if rules.penalty:
        seen = ops.logical_or(seen, ops.arange(logits.shape[1], dtype="int32") == token[:, None])
    finished = ops.logical_or(finished, ops.take(knobs[-1], token))
    return out, (finished, seen, scores, token)


def _for_cpu() -> bool:
    """Whether the program is made for a CPU, wherever it is compiled."""
    return attention.platform() == "cpu" if keras.backend.backend() == "jax" else device.is_cpu()


def begin(model, rules, space):
    """`f(tokens [B, T], start [B], made, keys [R, 2], state, knobs) -> (token [R], log-probability [R], beam [R]),
    state, cache`, R = B beams, not yet compiled. `space`: positions in the cache."""

    def run(tokens, start, made, keys, state, knobs):
        h, cache = model.hidden(tokens, model.empty_cache(tokens.shape[0], space), 0, start)
        logits = fused(model.logits)(h[:, -1])
        if _for_cpu():  # which would convert all of it for each token
            cache = [tuple(ops.cast(x, "float32") for x in layer) for layer in cache]
        if rules.beams > 1:
            logits = ops.repeat(logits, rules.beams, axis=0)
            cache = [tuple(ops.repeat(x, rules.beams, axis=0) for x in layer) for layer in cache]
        out, state = fused(partial(_chosen, rules=rules))(logits, made, keys, state, knobs)
        return out, state, cache

    return run


def turn(model):
    """`f() -> path of each kernel: [nf, nx]`, in the precision of the computation; see `model.one_row`."""

    turned = fused(lambda w: ops.transpose(ops.cast(w, model.compute_dtype)))  # twice as fast as TensorFlow's transpose

    def run():
        return {v.path: turned(v.value) for v in model.weights if v.path.endswith("/w")}

    return run


def go_on(model, rules, most=_CHUNK):
    """`f(position, start [R], made, count, keys [R, 2], state, cache, matrices, knobs) -> (tokens [R, most],
    log-probabilities, beams), state, cache`: `count` tokens more; -1 for rows that are finished. Not yet compiled."""

    def run(position, start, made, count, keys, state, cache, matrices, knobs):
        rows = start.shape[0]
        fast = rows == 1 and _for_cpu()
        same = ops.broadcast_to(ops.arange(rows, dtype="int32")[:, None], (rows, most))
        outs = ops.full((rows, most), -1, "int32"), ops.zeros((rows, most), "float32"), same

        def going(i, outs, state, cache):
            return ops.logical_and(i < count, ops.logical_not(ops.all(state[0])))

        def body(i, outs, state, cache):
            with one_row(i, matrices) if fast else contextlib.nullcontext():
                h, cache = model.hidden(state[3][:, None], cache, position + i, start)
                logits = model.logits(h[:, -1])
            out, state = _chosen(logits, made + i, keys, state, knobs, rules)
            if rules.beams > 1:
                cache = [tuple(ops.take(x, out[2], axis=0) for x in layer) for layer in cache]
            outs = tuple(ops.slice_update(x, (0, i), y[:, None]) for x, y in zip(outs, out, strict=True))
            return i + 1, outs, state, cache

        if fast:
            cache = [(k[0], v[0]) for k, v in cache]
        _, outs, state, cache = ops.while_loop(going, body, (ops.convert_to_tensor(0, "int32"), outs, state, cache))
        return outs, state, [(k[None], v[None]) for k, v in cache] if fast else cache

    return run


def program(model, length, space, rules):
    """`f(tokens [B, T], start [B], keys [B, 2], state, knobs) -> new tokens [B, length]`: both in one, uncompiled.

    What a TPU is asked to compile; `generate` has the two apart, so that tokens can be seen as they come.
    """

    def run(tokens, start, keys, state, knobs):
        made = ops.convert_to_tensor(1, "int32")
        out, state, cache = begin(model, rules, space)(tokens, start, made - 1, keys, state, knobs)
        more = go_on(model, rules, length - 1)
        outs, *_ = more(tokens.shape[1], start, made, length - 1, keys, state, cache, {}, knobs)
        return ops.concatenate([out[0][:, None], outs[0]], axis=1)

    return run


# --- the host's part --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Continuation:
    """What `generate` says with `details`.

    Attributes:
        ids: the new tokens, without the one that ended them.
        log_probabilities: of each, in nats, given all before it: by the model's own softmax, at temperature 1 and
            before any filter.
        ended: "length", "token" (one that ends a text) or "string" (a stop string).
        text: of the ids, up to a stop string; None where there was no tokenizer.
    """

    ids: list[int]
    log_probabilities: list[float]
    ended: str
    text: str | None = None


class _Writer:
    """The rows of a batch and their state between the programs."""

    def __init__(self, model, prompts, length, rules, knobs, seed, overlap, multiple):
        self.model, self.rules, self.multiple = model, rules, multiple
        self.knobs, self.ends = knobs.tensors(), knobs.ends
        self.ids, self.length, self.made = [list(p) for p in prompts], length, 0
        self.overlap = overlap
        self.windows = [max(0, len(p) - model.config.n_ctx) for p in prompts]  # where each row's context begins
        self.finished = np.zeros(len(prompts), bool)
        self.cache, self.matrices, times = None, {}, Counter()
        keys = np.zeros((len(prompts) * rules.beams, 2), np.uint32)
        for row, p in enumerate([] if rules.greedy else map(tuple, prompts)):  # of each alone, whatever the others are
            keys[row] = np.random.SeedSequence([seed, times[p], len(p), *p]).generate_state(2)
            times[p] += 1
        self.keys = ops.convert_to_tensor(keys)

    def advance(self, most: int):
        """Up to `most` tokens more: ids [R, n], log-probabilities [R, n], beams [R, n]; None when all is written."""
        most = min(most, _CHUNK, self.length - self.made)
        if most < 1 or self.finished.all():
            return None
        if self.cache is None or self.room == 0:
            found = self._begin()
        else:
            found = self._go_on(min(most, self.room))
        if np.isnan(found[1]).any():
            raise ValueError("the model's logits are no numbers: its parameters are damaged; load another checkpoint")
        if self.rules.beams == 1:
            for row, new in enumerate(found[0].tolist()):
                self.ids[row] += [token for token in new if token >= 0]
        self.made += found[0].shape[1]
        return found

    def stop(self, row):
        """No more of this row."""
        self.finished[row] = True

    def _begin(self):
        n_ctx, width = self.model.config.n_ctx, self.rules.beams
        contexts = []
        for row, ids in enumerate(self.ids):
            if len(ids) - self.windows[row] > n_ctx:
                self.windows[row] = len(ids) - self.overlap
            contexts.append(ids[-1:] if self.finished[row] else ids[self.windows[row] :])
        longest = max(map(len, contexts))
        lengths = {len(c) for c, over in zip(contexts, self.finished, strict=True) if not over}
        multiple, few = self.multiple, self.made and len(lengths) > 1
        if few:  # lengths that change from window to window: programs for four of them, with one cache
            multiple = max(multiple, n_ctx // 4)
        t = -(-longest // multiple) * multiple
        steps = min(self.length - self.made - 1, n_ctx - longest)
        space = cache_length(n_ctx + multiple, 1) if few else cache_length(t, steps + 1)
        self.room, self.position = steps, t
        tokens = np.array([[0] * (t - len(c)) + c for c in contexts], np.int32)  # padded on the left: [B, T]
        start = np.array([t - len(c) for c in contexts], np.int32)
        run = self._compiled(("begin", tokens.shape, space), lambda: begin(self.model, self.rules, space))
        out, self.state, self.cache = run(
            *map(_int32, (tokens, start, self.made)), self.keys, self._state(), self.knobs
        )
        self.start = _int32(np.repeat(start, width))
        self.finished = np.array(self.state[0])
        if not self.matrices and width * len(tokens) == 1 and self.length - self.made > _CHUNK and _room(self.model):
            self.matrices = self._compiled(("turn",), lambda: turn(self.model))()
        return [np.asarray(x)[:, None] for x in out]

    def _go_on(self, count):
        space = self.cache[0][0].shape[2]
        key = ("go on", len(self.finished), space, bool(self.matrices))
        run = self._compiled(key, lambda: go_on(self.model, self.rules), xla=True, state=6)
        state = (ops.convert_to_tensor(self.finished), *self.state[1:])
        numbers = map(_int32, (self.made, count))
        outs, self.state, self.cache = run(
            _int32(self.position), self.start, *numbers, self.keys, state, self.cache, self.matrices, self.knobs
        )
        self.position, self.room = self.position + count, self.room - count
        self.finished = np.array(self.state[0])
        return [np.asarray(x)[:, :count] for x in outs]

    def _compiled(self, key, make, **options):
        programs = self.model.__dict__.setdefault("_programs", {})
        key = (*key, self.rules)
        if key not in programs:
            programs[key] = compiled(self.model, make(), **options)
        return programs[key]

    def _state(self):
        rows, v = len(self.ids) * self.rules.beams, self.model.config.n_vocab
        seen = np.zeros((rows, v if self.rules.penalty else 1), bool)
        if self.rules.penalty:
            for row in range(rows):
                seen[row, self.ids[row // self.rules.beams]] = True
        scores = np.where(np.arange(rows) % self.rules.beams, _LOWEST, 0).astype(np.float32)  # one beam to begin with
        finished = np.resize(self.finished, rows)
        return (*map(ops.convert_to_tensor, (finished, seen, scores)), _int32(np.zeros(rows)))


def cache_length(prompt, length) -> int:
    """Positions in the cache for a prompt and `length` new tokens, of which the last one is not read.

    Rounded up, by 15 or an eighth at most, so that few programs are compiled: eight between a length and its double.
    """
    needed = prompt + length - 1
    step = 1 << max(4, needed.bit_length() - 4)
    return -(-needed // step) * step


def _room(model) -> bool:
    """Whether kernels the other way round are of use, and the memory has room for them twice."""
    if model.int8 or not device.is_cpu():
        return False
    if keras.backend.backend() == "jax" and model.compute_dtype == "float32":
        return False  # its XLA uses all cores for either
    size = sum(math.prod(v.shape) for v in model.weights if v.path.endswith("/w"))
    free = device.free_memory()
    return free is None or 2 * 4 * size < free


def _int32(x):
    return ops.convert_to_tensor(x, "int32")


def generate(
    model,
    prompts,
    length,
    temperature=1.0,
    top_k=0,
    top_p=1.0,
    seed=None,
    *,
    end_of_text: int | None = -1,
    samples: int = 1,
    crossing: bool = True,
    repetition_penalty: float = 1.0,
    min_length: int = 0,
    stop_tokens=(),
    stop=(),
    tokenizer=None,
    beams: int = 1,
    length_penalty: float = 1.0,
    overlap: int | None = None,
    details: bool = False,
    progress=None,
    multiple: int = 16,
) -> list[list[int]] | list[Continuation]:
    """Continue each prompt by up to `length` tokens.

    Args:
        model: GPT2.
        prompts: lists of token ids, of any lengths, run as one batch; an empty one starts from the end of text. Of one
            longer than the context the end is read, with a warning.
        length: most new tokens. What goes beyond the context is written by a sliding window: when it is full, its
            last `overlap` tokens begin the next.
        temperature: logits are divided by it; 0 always takes the most likely token.
        top_k: sample among the k most likely tokens; 0: all.
        top_p: sample among the most likely tokens of this total probability, in (0, 1]; 1: all.
        seed: the same seed gives the same text, whatever else is in the batch: each sequence has random numbers of
            its own, by its prompt and its number among the samples of that prompt. A batch of another size rounds
            otherwise: in bfloat16 that makes another word now and then, from which on the text is another. None: a
            new one.
        end_of_text: a row ends before this token; -1: the last of the vocabulary, as in GPT-2; None: never.
        samples: how many texts for each prompt; they follow one another in the list.
        crossing: top_p keeps the token that crosses it, as most libraries do; False: leaves it out, as OpenAI's code.
        repetition_penalty: above 1, tokens that were in the prompt or the text become less likely (`penalise`).
        min_length: so many tokens come before one that ends a row; stop strings are not held back.
        stop_tokens: further ids that end a row.
        stop: strings that end a row; the new text, in which alone they are looked for, ends before the first of
            them. Needs `tokenizer`.
        beams: beam search of this width, which needs temperature 0; `samples` of them are given, the best first, by
            the sum of log-probabilities over length ** `length_penalty` (with the token that ends).
        overlap: None: half the context.
        details: give a `Continuation` for each instead of its ids.
        progress: called with the number of tokens written by each row so far, now and then.
        multiple: prompts are padded to a multiple of it, so that those of like length share a program.

    Returns: for each prompt its new tokens only, without what ended them.

    ValueError for settings out of range, in one sentence. Programs are compiled for a number of rows, a length of
    prompts and of the cache (multiples of 16 and those of `cache_length`; of n_ctx / 4 where rows go on beyond the
    context at different lengths), and the kind of sampling; later calls find them.
    """
    options = dict(
        temperature=temperature, top_k=top_k, top_p=top_p, end_of_text=end_of_text, crossing=crossing,
        repetition_penalty=repetition_penalty, min_length=min_length, stop_tokens=stop_tokens, beams=beams,
    )  # fmt: skip
    _number(samples=samples, beams=beams)
    stop = _strings(stop)
    if stop and tokenizer is None:
        raise ValueError("stop strings need the tokenizer that the ids are of; give it, or stop_tokens")
    if samples < 1 or (samples > beams > 1):
        raise ValueError(f"samples must be at least 1{f' and at most beams, {beams}' if beams > 1 else ''}: {samples}")
    _number(Real, length_penalty=length_penalty)
    if not math.isfinite(length_penalty):
        raise ValueError(f"length_penalty must be a finite number, not {length_penalty}")
    options |= dict(seed=seed, overlap=overlap, multiple=multiple, times=1 if beams > 1 else samples)
    writer = _writer(model, prompts, length, **options)
    rows = len(writer.ids) * beams
    if not rows:
        return []
    made, own, parents = (np.zeros((rows, 0), kind) for kind in (np.int32, np.float32, np.int32))
    while found := writer.advance((1 if beams > 1 else 8) if stop else _CHUNK):
        made, own, parents = (np.concatenate(pair, axis=1) for pair in zip((made, own, parents), found, strict=True))
        texts = _unwound(made, own, parents)[0] if stop and beams > 1 else made
        for row in np.flatnonzero(~writer.finished) if stop else ():
            if _stopped(tokenizer, _new(texts[row], writer.ends), stop):
                writer.stop(row)
        if progress:
            progress(made.shape[1])
    if beams > 1:
        made, own = _unwound(made, own, parents)
        scores = np.asarray(writer.state[2]) / (made >= 0).sum(axis=1) ** length_penalty
        best = np.argsort(-scores.reshape(-1, beams), axis=1, kind="stable")[:, :samples]
        best = (best + beams * np.arange(len(best))[:, None]).ravel()
        made, own = made[best], own[best]
    found = [_continuation(ids, values, writer.ends, tokenizer, stop) for ids, values in zip(made, own, strict=True)]
    return found if details else [one.ids for one in found]


def _writer(
    model, prompts, length, temperature, top_k, top_p, seed, end_of_text=-1, crossing=True, repetition_penalty=1.0,
    min_length=0, stop_tokens=(), beams=1, overlap=None, multiple=16, times=1,
) -> _Writer:  # fmt: skip
    """Checks the settings that `generate` and `stream` share; of each prompt `times` rows."""
    c = model.config
    overlap = c.n_ctx // 2 if overlap is None else overlap
    _number(length=length, top_k=top_k, min_length=min_length, beams=beams, overlap=overlap, multiple=multiple)
    _number(**{name: x for name, x in {"seed": seed, "end_of_text": end_of_text}.items() if x is not None})
    _number(Real, temperature=temperature, top_p=top_p, repetition_penalty=repetition_penalty)
    if (further := _ids(stop_tokens)) is None:
        raise ValueError(f"stop_tokens must be a list of token ids; got {stop_tokens!r}")
    rows = [_ids(prompt) for prompt in prompts] if isinstance(prompts, Iterable) else [None]
    if None in rows:
        raise ValueError("prompts must be lists of token ids, such as [tokenizer.encode(text)], one for each text")
    end = c.n_vocab - 1 if end_of_text == -1 else end_of_text
    ends = {*further, *(() if end is None else (end,))}
    for name, value, right, wanted in (
        ("length", length, length >= 1, "at least 1"),
        ("temperature", temperature, 0 <= temperature < math.inf, "a finite number from 0, which is greedy"),
        ("top_k", top_k, 0 <= top_k <= c.n_vocab, f"0, which is all, or up to the vocabulary's {c.n_vocab}"),
        ("top_p", top_p, 0 < top_p <= 1, "above 0 and at most 1, which is all"),
        ("repetition_penalty", repetition_penalty, 0 < repetition_penalty < math.inf, "a finite number above 0"),
        ("min_length", min_length, 0 <= min_length <= length, f"0 to the length, {length}"),
        ("beams", beams, beams >= 1, "at least 1"),
        ("beams", beams, beams == 1 or temperature == 0, f"1, unless temperature is 0; it is {temperature}"),
        ("multiple", multiple, multiple >= 1, "at least 1"),
        ("overlap", overlap, 1 <= overlap <= c.n_ctx, f"1 to the context's {c.n_ctx}"),
        ("seed", seed, seed is None or seed >= 0, "at least 0"),
    ):
        if not right:
            raise ValueError(f"{name} must be {wanted}; got {value}")
    if outside := [token for token in ends if not 0 <= token < c.n_vocab]:
        raise ValueError(f"the id {outside[0]} that ends a text is outside the vocabulary, 0..{c.n_vocab - 1}")
    prompts = [row or [c.n_vocab - 1 if end is None else end] for row in rows]
    for i, prompt in enumerate(prompts):
        if not 0 <= min(prompt) <= max(prompt) < c.n_vocab:
            raise ValueError(f"prompt {i} has an id outside 0..{c.n_vocab - 1}; was it encoded by another tokenizer?")
        if len(prompt) > c.n_ctx:
            message = f"prompt {i} has {len(prompt)} tokens, the context {c.n_ctx}: only its end is read"
            warnings.warn(message, stacklevel=3)
        if beams > 1 and len(prompt) + length > c.n_ctx:
            raise ValueError(
                f"prompt {i} has {len(prompt)} tokens and {length} more are asked for, but the context holds {c.n_ctx}"
                "; beams do not go beyond it: shorten the prompt or the length"
            )
    prompts = [prompt for prompt in prompts for _ in range(times)]
    rules = Rules(
        greedy=temperature == 0, top_k=top_k > 0, top_p=top_p < 1, crossing=crossing, penalty=repetition_penalty != 1,
        early=min_length > 0, beams=beams,
    )  # fmt: skip
    ending = np.zeros(c.n_vocab, bool)
    ending[list(ends)] = True
    knobs = Knobs(temperature or 1.0, top_k, top_p, repetition_penalty, min_length, ending)
    seed = secrets.randbits(63) if seed is None else seed
    return _Writer(model, prompts, length, rules, knobs, seed, overlap, multiple)


def _ids(found) -> list[int] | None:
    """As a list; None where it is no ids."""
    found = list(found) if isinstance(found, Iterable) else [None]
    return found if all(isinstance(token, Integral) for token in found) else None


def _number(kind=Integral, **settings):
    for name, value in settings.items():
        if not isinstance(value, kind):
            raise ValueError(f"{name} must be a {'whole ' if kind is Integral else ''}number; got {value!r}")


def _strings(stop) -> list[str]:
    stop = [stop] if isinstance(stop, str) else list(stop) if isinstance(stop, Iterable) else [stop]
    if wrong := [x for x in stop if not isinstance(x, str)]:
        raise ValueError(f"stop must be strings; got {wrong[0]!r} (ids go into stop_tokens)")
    if not all(stop):
        raise ValueError("a stop string is empty, which every text has; leave it out")
    return stop


def _new(made, ends) -> list[int]:
    """The ids of a row before the one that ended it."""
    over = (made < 0) | ends[made]
    return made[: over.argmax() if over.any() else len(made)].tolist()


def _unwound(made, own, parents):
    """Tokens and log-probabilities of the beams that are there at the end, each followed back to its first."""
    row = np.arange(len(made))
    made, own = made.copy(), own.copy()
    for step in reversed(range(made.shape[1])):
        made[:, step], own[:, step] = made[row, step], own[row, step]
        row = parents[row, step]
    return made, own


def _stopped(tokenizer, ids, stop) -> tuple[list[int], str] | None:
    """The ids before the first stop string that is complete, and the text up to it; None: there is none."""
    if not any(s in tokenizer.decode(ids) for s in stop):
        return None
    n = next(n for n in range(1, len(ids) + 1) if any(s in tokenizer.decode(ids[:n]) for s in stop))
    text = tokenizer.decode(ids[:n])
    text = text[: min(text.index(s) for s in stop if s in text)]
    while len(tokenizer.decode(ids[:n])) > len(text):
        n -= 1
    return ids[:n], text


def _continuation(made, own, ends, tokenizer, stop) -> Continuation:
    ids = _new(made, ends)
    ended = "token" if len(ids) < len(made) and made[len(ids)] >= 0 else "length"
    text = None if tokenizer is None else tokenizer.decode(ids)
    if stop and (cut := _stopped(tokenizer, ids, stop)):
        (ids, text), ended = cut, "string"
    return Continuation(ids, own[: len(ids)].tolist(), ended, text)


def stream(model, tokenizer, prompt: str, length, temperature=1.0, top_k=0, top_p=1.0, seed=None, **options):
    """The new text of one prompt as it is written, in pieces of whole characters: `for piece in stream(...)`.

    The same text as `generate` gives to the prompt with the same settings, of which this takes all but `samples`,
    `beams`, `details` and `progress`.
    """
    if other := {"samples", "beams", "details", "progress"} & options.keys():
        raise ValueError(f"stream writes one text as it comes and takes no {min(other)}; use generate")
    stop = _strings(options.pop("stop", ()))
    options.setdefault("end_of_text", tokenizer.end_of_text)
    sampling = dict(temperature=temperature, top_k=top_k, top_p=top_p, seed=seed)
    writer = _writer(model, [tokenizer.encode(prompt)], length, **sampling, **options)
    made, shown = np.zeros(0, np.int32), 0
    while found := writer.advance(1):
        made = np.concatenate([made, found[0][0]])
        ids = _new(made, writer.ends)
        cut = _stopped(tokenizer, ids, stop)
        if cut is not None:
            yield cut[1][shown:]
            return
        text = tokenizer.decode(ids)
        ready = len(text.rstrip("\ufffd"))  # the rest of a character may come
        starts = (n for s in stop for n in range(1, len(s)) if text[:ready].endswith(s[:n]))
        ready -= max(starts, default=0)  # or the rest of a stop string
        if ready > shown:
            yield text[shown:ready]
            shown = ready
    if len(made):
        yield tokenizer.decode(_new(made, writer.ends))[shown:]


# --- files ------------------------------------------------------------------------------------------------------------


def read_prompts(path) -> list[str]:
    """Prompts of a file: of each line of a `.jsonl` file its "prompt"; any other file is one text, without its last
    line break. ValueError for a line that has none, or none that is a string."""
    path = Path(path)
    text = path.read_text(encoding="utf-8")
    if path.suffix != ".jsonl":
        return [text.removesuffix("\n")]
    found = []
    for number, line in enumerate(text.split("\n"), start=1):  # a string may have other characters that break lines
        if not line.strip():
            continue
        try:
            prompt = json.loads(line)["prompt"]
            wrong = not isinstance(prompt, str)
        except (ValueError, KeyError, TypeError):
            wrong = True
        if wrong:
            message = f'line {number} of {path} is not a JSON object with a text as its "prompt"; mend or remove it'
            raise ValueError(message)
        found.append(prompt)
    return found


def write_samples(path, prompts, found, settings: dict, checkpoint: str) -> None:
    """One JSON object a line for each text: prompt, text, ids, log_probabilities, ended, settings, checkpoint.

    Args:
        path: of the file; it is whole or not there.
        prompts: text of the prompt of each of `found`.
        found: `Continuation`s.
        settings: what they were sampled with.
        checkpoint: the hash of the model's parameters, `checkpoint.fingerprint(model)`.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(beside, "w", encoding="utf-8") as file:
            for prompt, one in zip(prompts, found, strict=True):
                line = {
                    "prompt": prompt,
                    "text": one.text,
                    **asdict(one),
                    "settings": settings,
                    "checkpoint": checkpoint,
                }
                file.write(json.dumps(line, ensure_ascii=False) + "\n")
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)
