"""Negative log-likelihoods of texts of any length, token by token: short passages in batches, long texts by windows."""

from dataclasses import dataclass

import numpy as np
from keras import ops

from gpt2lib.device import compiled
from gpt2lib.evaluate.loss import check_finite
from gpt2lib.model import fused, nll

_MULTIPLE = 32  # lengths are rounded up to a multiple: as many programs are compiled at most as it goes into n_ctx


@dataclass(frozen=True)
class Scored:
    """Of the predicted tokens of a passage, in their order."""

    nats: np.ndarray  # float64 [K], of each token given all before it
    first: np.ndarray  # bool [K], whether no token has a higher probability
    first_allowed: np.ndarray  # bool [K], whether no token that is not banned has one


class Scorer:
    """Scores with one model, whose programs it keeps.

    Args:
        model: GPT2.
        batch_tokens: about how many tokens are computed at once.
        progress: wraps the list of batches, such as tqdm; None: silent.
    """

    def __init__(self, model, batch_tokens: int = 4096, progress=None):
        self.model, self.batch_tokens, self.progress = model, batch_tokens, progress
        self._tails = compiled(model, self._tail_program)
        self._judged = fused(self._judge)
        self._branches = {}  # a program for each pair of shapes, which a cache needs to be fixed

    def passages(self, passages, counts=None, banned=()) -> list[Scored]:
        """The last `counts[i]` tokens of each passage, given all before; those of like length are computed together.

        Args:
            passages: of 2 to n_ctx + 1 token ids each.
            counts: how many of them are predicted, each at least 1; None: all but the first.
            banned: ids that `first_allowed` does not reckon with.
        """
        n_ctx, out = self.model.config.n_ctx, [None] * len(passages)
        counts = counts or [len(ids) - 1 for ids in passages]
        for i, (ids, count) in enumerate(zip(passages, counts, strict=True)):
            if not 2 <= len(ids) <= n_ctx + 1 or not 1 <= count < len(ids):
                raise ValueError(
                    f"passage {i} has {len(ids)} tokens, {count} of them to be predicted; it must have 2 to "
                    f"{n_ctx + 1}, the first of which is given"
                )
        order = sorted(range(len(passages)), key=lambda i: len(passages[i]), reverse=True)  # the largest batch first
        groups, at = [], 0
        while at < len(order):
            width = self._rounded(len(passages[order[at]]) - 1)
            rows = max(1, self.batch_tokens // width)
            groups.append((width, rows, order[at : at + rows]))
            at += rows
        bias = np.zeros(self.model.config.n_vocab, np.float32)
        bias[list(banned)] = -np.inf
        for width, rows, group in self._bar(groups):
            windows = np.zeros((rows, width + 1), np.int32)  # what is behind a passage does not change it
            most = min(1 << (max(counts[i] for i in group) - 1).bit_length(), width)
            places = np.zeros((rows, most), np.int32)
            for row, i in enumerate(group):
                windows[row, : len(passages[i])] = passages[i]
                places[row, : counts[i]] = np.arange(len(passages[i]) - 1 - counts[i], len(passages[i]) - 1)
            found = self._run(windows, places, bias)
            for row, i in enumerate(group):
                out[i] = Scored(*(column[row, : counts[i]] for column in found))
                check_finite(out[i].nats, f"passage {i}")
        return out

    def text(self, ids, window: int | None = None, stride: int | None = None, full: bool = False) -> np.ndarray:
        """Nats of every token but the first of a long text: float64 [len - 1].

        Args:
            ids: token ids; the first is context only, such as the end of the text before.
            window: how many tokens at most the model sees; None: n_ctx.
            stride: how many of them are predicted in each window but the first, in which all are: each token sees
                at least window - stride before it. None: the whole window, so that none sees another's.
            full: the last window reaches back until it is full, whatever the stride (as lm-evaluation-harness has it).
        """
        n_ctx = self.model.config.n_ctx
        window = window or n_ctx
        stride = stride or window
        if not 1 <= stride <= window <= n_ctx:
            raise ValueError(
                f"a window of {window} with a stride of {stride}: they must be 1 <= stride <= window <= {n_ctx}"
            )
        ids = np.asarray(ids, np.int32)
        if len(ids) < 2:
            return np.zeros(0)
        parts = [self.passages([ids[: window + 1]])[0].nats]
        starts = np.arange(stride, len(ids) - 1 - (window - stride), stride)  # each predicts the last of its window
        left, end = len(ids) - 1 - window - stride * (len(starts) - 1), []  # how many the last one predicts
        if full and len(starts) and left < stride:
            starts, end = starts[:-1], [self.passages([ids[-window - 1 :]], [left])[0].nats]
        padded, rows = np.concatenate([ids, np.zeros(window, np.int32)]), max(1, self.batch_tokens // window)
        places = np.tile(np.arange(window - stride, window, dtype=np.int32), (rows, 1))
        bias = np.zeros(self.model.config.n_vocab, np.float32)
        for at in self._bar(range(0, len(starts), rows)):
            some = starts[at : at + rows]
            windows = np.zeros((rows, window + 1), np.int32)
            windows[: len(some)] = padded[some[:, None] + np.arange(window + 1)]
            parts.append(self._run(windows, places, bias)[0][: len(some)].reshape(-1))
        nats = np.concatenate(parts + end)[: len(ids) - 1]
        check_finite(nats, f"a text of {len(ids)} tokens")
        return nats

    def branches(self, context, branches) -> list[np.ndarray]:
        """Nats of the tokens of several continuations of one context, which is computed once: float64 [len] each.

        Args:
            context: at least one token id.
            branches: at least one token id each; with the context at most n_ctx + 1.
        """
        n_ctx, longest = self.model.config.n_ctx, max(map(len, branches))
        if not context or not all(branches) or len(context) + longest > n_ctx + 1:
            raise ValueError(
                f"a context of {len(context)} tokens and branches of up to {longest}: each has at least one, and they "
                f"have at most {n_ctx + 1} together"
            )
        depth = min(8 << max(0, (longest - 1) // 8).bit_length(), n_ctx + 1 - len(context))  # 8, 16, 32, ...
        before = np.zeros((1, self._rounded(len(context))), np.int32)
        before[0, : len(context)] = context
        windows = np.zeros((len(branches), depth + 1), np.int32)
        windows[:, 0] = context[-1]
        for row, branch in enumerate(branches):
            windows[row, 1 : len(branch) + 1] = branch
        tensors = (ops.convert_to_tensor(x, "int32") for x in (before, windows, len(context) - 1))
        shapes = before.shape, windows.shape
        if shapes not in self._branches:
            self._branches[shapes] = compiled(self.model, self._branch_program)
        nats = np.asarray(self._branches[shapes](*tensors), np.float64)
        nats = [nats[row, : len(branch)] for row, branch in enumerate(branches)]
        for row, losses in enumerate(nats):
            check_finite(losses, f"choice {row}")
        return nats

    def _rounded(self, length):
        return min(-(-length // _MULTIPLE) * _MULTIPLE, self.model.config.n_ctx)

    def _bar(self, things):
        return self.progress(things) if self.progress else things

    def _run(self, windows, places, bias):
        windows, places = (ops.convert_to_tensor(x, "int32") for x in (windows, places))
        nats, *first = self._tails(windows, places, ops.convert_to_tensor(bias))
        return np.asarray(nats, np.float64), *map(np.asarray, first)

    def _tail_program(self, windows, places, bias):
        """Windows [B, T + 1], places [B, K] of the tokens that predict, bias [V] -> nats, and whether first of all and
        of those whose bias is 0, [B, K]."""
        hidden, _ = self.model.hidden(windows[:, :-1])
        b, t, d = ops.shape(hidden)
        flat = places + t * ops.arange(b, dtype="int32")[:, None]
        kept = ops.take(ops.reshape(hidden, (-1, d)), flat, axis=0)  # [B, K, D]
        return self._judged(kept, ops.take_along_axis(windows[:, 1:], places, axis=1), bias)

    def _judge(self, hidden, labels, bias):
        """Hidden [B, K, D], labels [B, K], bias [V] -> what `_tail_program` gives."""
        logits = self.model.logits(hidden)  # [B, K, V]
        own = ops.take_along_axis(logits, labels[:, :, None], axis=2)[:, :, 0]
        return nll(logits, labels), own >= ops.max(logits, axis=2), own >= ops.max(logits + bias, axis=2)

    def _branch_program(self, before, windows, position):
        """Context [1, P], windows [C, K + 1] that begin with its last token, at place `position` -> nats [C, K]."""
        depth = before.shape[1] + windows.shape[1] - 1
        _, past = self.model.hidden(before, self.model.empty_cache(1, depth))
        rows = windows.shape[0]
        past = [tuple(ops.repeat(x, rows, axis=0) for x in layer) for layer in past]
        hidden, _ = self.model.hidden(windows[:, :-1], past, position)  # hides what lies behind
        return nll(self.model.logits(hidden), windows[:, 1:])
