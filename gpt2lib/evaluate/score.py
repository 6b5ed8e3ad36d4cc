"""Negative log-likelihoods of texts of any length, token by token: short passages in batches, long texts by windows."""

import numpy as np
from keras import ops

from gpt2lib.device import compiled
from gpt2lib.model import nll

_MULTIPLE = 32  # lengths are rounded up to a multiple: as many programs are compiled at most as it goes into n_ctx


class Scorer:
    """Scores with one model, whose programs it keeps.

    Args:
        model: GPT2.
        batch_tokens: about how many tokens are computed at once.
        progress: wraps the list of batches, such as tqdm; None: silent.
    """

    def __init__(self, model, batch_tokens: int = 4096, progress=None):
        self.model, self.batch_tokens, self.progress = model, batch_tokens, progress
        self.programs = {}

    def passages(self, passages) -> list[np.ndarray]:
        """Nats of every token but the first of each passage, given all before it: float64 [len - 1] each.

        A passage has 2 to n_ctx + 1 token ids. Those of like length are computed together.
        """
        n_ctx, out = self.model.config.n_ctx, [np.zeros(0)] * len(passages)
        for i, ids in enumerate(passages):
            if not 2 <= len(ids) <= n_ctx + 1:
                raise ValueError(f"passage {i} has {len(ids)} tokens; it must have 2 to {n_ctx + 1}")
        order = sorted(range(len(passages)), key=lambda i: len(passages[i]), reverse=True)  # the largest batch first
        groups, at = [], 0
        while at < len(order):
            width = min(-(-(len(passages[order[at]]) - 1) // _MULTIPLE) * _MULTIPLE, n_ctx)
            rows = max(1, self.batch_tokens // width)
            groups.append((width, rows, order[at : at + rows]))
            at += rows
        for width, rows, group in self._bar(groups):
            windows = np.zeros((rows, width + 1), np.int32)  # what is behind a passage does not change it
            for row, i in enumerate(group):
                windows[row, : len(passages[i])] = passages[i]
            nats = self._run(windows, width)
            for row, i in enumerate(group):
                out[i] = nats[row, : len(passages[i]) - 1]
        return out

    def text(self, ids, window: int | None = None, stride: int | None = None) -> np.ndarray:
        """Nats of every token but the first of a long text: float64 [len - 1].

        Args:
            ids: token ids; the first is context only, such as the end of the text before.
            window: how many tokens at most the model sees; None: n_ctx.
            stride: how many of them are predicted in each window but the first, in which all are: each token sees
                at least window - stride before it. None: the whole window, so that none sees another's.
        """
        n_ctx = self.model.config.n_ctx
        window = window or n_ctx
        stride = stride or window
        if not 1 <= stride <= window <= n_ctx:
            raise ValueError(
                f"a window of {window} with a stride of {stride}: they must be 1 <= stride <= window <= {n_ctx}"
            )
        ids = np.asarray(ids, np.int32)
        if len(ids) <= window + 1:
            return self.passages([ids])[0] if len(ids) > 1 else np.zeros(0)
        first = self.passages([ids[: window + 1]])[0]
        starts = np.arange(stride, len(ids) - 1 - (window - stride), stride)  # each predicts the last of its window
        padded = np.concatenate([ids, np.zeros(window, np.int32)])
        rows, parts = max(1, self.batch_tokens // window), [first]
        for at in self._bar(range(0, len(starts), rows)):
            some = starts[at : at + rows]
            windows = np.zeros((rows, window + 1), np.int32)
            windows[: len(some)] = padded[some[:, None] + np.arange(window + 1)]
            parts.append(self._run(windows, stride)[: len(some)].reshape(-1))
        return np.concatenate(parts)[: len(ids) - 1]

    def _bar(self, things):
        return self.progress(things) if self.progress else things

    def _run(self, windows, last):
        """Nats [B, last] of the last tokens of windows [B, T + 1]."""
        if last not in self.programs:

            def run(windows):
                hidden, _ = self.model.hidden(windows[:, :-1])
                return nll(self.model.logits(hidden[:, -last:]), windows[:, -last:])

            self.programs[last] = compiled(self.model, run)
        return np.asarray(self.programs[last](ops.convert_to_tensor(windows, "int32")), np.float64)
