"""Counting models to hold a trained one against: unigram, and bigram with absolute discounting."""

import numpy as np


class Unigram:
    """P(w) = (count(w) + 1) / (total + V): add-one smoothing (Laplace)."""

    def __init__(self, tokens, n_vocab: int):
        self.p = (np.bincount(tokens, minlength=n_vocab) + 1.0) / (len(tokens) + n_vocab)

    def window_losses(self, windows):
        """[W, T + 1] -> nats of the last T tokens of each window, [W, T]."""
        return -np.log(self.p[windows[:, 1:]])


class Bigram:
    """P(w | u) = max(count(u, w) - d, 0) / count(u) + d * types(u) / count(u) * P(w), with P the unigram.

    Interpolated absolute discounting (Ney, Essen & Kneser 1994), d = n1 / (n1 + 2 n2) from the counts of counts.
    """

    def __init__(self, tokens, n_vocab: int):
        self.n_vocab, self.unigram = n_vocab, Unigram(tokens, n_vocab)
        tokens = np.asarray(tokens, np.int64)
        self.pairs, self.counts = np.unique(tokens[:-1] * n_vocab + tokens[1:], return_counts=True)
        n1, n2 = np.sum(self.counts == 1), np.sum(self.counts == 2)
        self.discount = n1 / (n1 + 2 * n2) if n1 else 0.5
        self.followers = np.bincount(self.pairs // n_vocab, minlength=n_vocab)  # types(u)
        self.totals = np.bincount(tokens[:-1], minlength=n_vocab)  # count(u)

    def window_losses(self, windows):
        """[W, T + 1] -> nats of the last T tokens of each window, each given the token before it, [W, T]."""
        u, w = windows[:, :-1].astype(np.int64), windows[:, 1:]
        at = np.minimum(np.searchsorted(self.pairs, u * self.n_vocab + w), len(self.pairs) - 1)
        count = np.where(self.pairs[at] == u * self.n_vocab + w, self.counts[at], 0)
        total = np.maximum(self.totals[u], 1)
        seen = np.maximum(count - self.discount, 0) / total
        rest = np.where(self.totals[u] > 0, self.discount * self.followers[u] / total, 1.0)
        return -np.log(seen + rest * self.unigram.p[w])
