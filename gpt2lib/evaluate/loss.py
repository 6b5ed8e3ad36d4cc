"""Loss on fixed windows of tokens, and what follows from it: perplexity, bits per byte, standard errors."""

import math
from dataclasses import dataclass

import numpy as np
from keras import ops

from gpt2lib.device import compiled
from gpt2lib.evaluate.statistics import ratio_error
from gpt2lib.model import nll


class NotFinite(ValueError):
    """Losses that are no numbers: nothing can be said of such a model."""


def check_finite(nats, what: str) -> None:
    """Raises NotFinite if a loss [T] of `what` is none; the message names its token."""
    if not np.isfinite(nats).all():
        at = int(np.flatnonzero(~np.isfinite(nats))[0])
        raise NotFinite(
            f"the loss of token {at} of {what} is {nats[at]}: the model's parameters are damaged; "
            "load another checkpoint"
        )


@dataclass(frozen=True)
class Loss:
    """Total negative log-likelihood of a text, with the numbers of units that it may be divided by.

    Attributes:
        nats: the total over all tokens.
        tokens: number of tokens predicted.
        n: number of windows.
        standard_error: of `loss`, in nats per token, see `ratio_error`.
        bytes: UTF-8 bytes of the text that the tokens stand for; 0 if unknown.
        bits_per_byte_standard_error: of `bits_per_byte`; NaN if unknown.
    """

    nats: float
    tokens: int
    n: int
    standard_error: float
    bytes: int = 0
    bits_per_byte_standard_error: float = math.nan

    @property
    def loss(self) -> float:
        """Nats per token."""
        return self.nats / self.tokens

    @property
    def perplexity(self) -> float:
        """exp(total nats / total tokens)."""
        return math.exp(self.loss)

    @property
    def perplexity_standard_error(self) -> float:
        return self.perplexity * self.standard_error

    @property
    def bits_per_byte(self) -> float:
        return self.nats / math.log(2) / self.bytes

    def to_dict(self) -> dict:
        """All figures by name, for a report."""
        figures = {
            "loss": self.loss, "loss_se": self.standard_error, "perplexity": self.perplexity,
            "perplexity_se": self.perplexity_standard_error, "tokens": self.tokens, "windows": self.n,
        }  # fmt: skip
        if self.bytes:
            figures |= {
                "bits_per_byte": self.bits_per_byte,
                "bits_per_byte_se": self.bits_per_byte_standard_error,
                "bytes": self.bytes,
            }
        return figures


def total(nats, n_bytes=None) -> Loss:
    """Sum per-token losses [W, T] in nats; sums first, one division at the end. `n_bytes` [W]: bytes of each window."""
    nats = np.asarray(nats, np.float64)
    windows, width = nats.shape
    sums = nats.sum(1)
    error = ratio_error(sums, np.full(windows, width))
    if n_bytes is None:
        return Loss(float(sums.sum()), nats.size, windows, error)
    return Loss(
        float(sums.sum()), nats.size, windows, error, int(np.sum(n_bytes)), ratio_error(sums, n_bytes) / math.log(2)
    )


def loss_function(model):
    """`f(windows [B, T + 1]) -> nats [B, T]`, compiled for the model; keep it to evaluate the same model again."""
    return compiled(model, lambda windows: nll(model(windows[:, :-1]), windows[:, 1:]))


def window_losses(function, windows, batch_size: int = 8, progress=None):
    """Losses [W, T] float32 in nats of windows [W, T + 1], `batch_size` at a time; `progress` wraps the loop.

    Raises NotFinite at the first batch in which one is no number.
    """
    starts = range(0, len(windows), batch_size)
    results = []
    for start in progress(starts) if progress else starts:
        batch = windows[start : start + batch_size]
        padding = np.zeros((batch_size - len(batch), batch.shape[1]), batch.dtype)  # one shape: compiled once
        nats = function(ops.convert_to_tensor(np.concatenate([batch, padding]), "int32"))
        results.append(np.asarray(nats)[: len(batch)])
        for window, losses in enumerate(results[-1], start):
            check_finite(losses, f"window {window}")
    return np.concatenate(results)


def count_bytes(windows, tokenizer):
    """UTF-8 bytes that the predicted tokens of each window [W, T + 1] stand for: [W]; the end of text has none."""
    return tokenizer.byte_lengths[windows[:, 1:]].sum(axis=1)
