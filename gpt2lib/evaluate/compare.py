"""Models side by side on the same documents: where one predicts better than the other, and by how much."""

import html
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from gpt2lib.evaluate.score import Scorer
from gpt2lib.evaluate.statistics import bootstrap


@dataclass(frozen=True)
class Reading:
    """What one model makes of some documents.

    Attributes:
        ids: the tokens of each document, int [T_d].
        nats: of each token given those before it and the end of text in front, float64 [T_d].
        bytes: UTF-8 bytes of each document [n].
        domains: what kind of text each document is [n].
    """

    ids: list[np.ndarray]
    nats: list[np.ndarray]
    bytes: np.ndarray
    domains: list[str]

    @property
    def bits_per_byte(self) -> np.ndarray:
        """Of each document [n]."""
        return np.array([nats.sum() for nats in self.nats]) / self.bytes / np.log(2)


def read(scorer: Scorer, tokenizer, documents: dict[str, list[str]]) -> Reading:
    """The losses of a model on documents {domain: texts}, each read from its beginning, by windows of the context."""
    texts = [(domain, text) for domain, some in documents.items() for text in some if text]
    ids = [np.array(tokenizer.encode(text)) for _, text in texts]
    most = scorer.model.config.n_ctx
    starts = [[tokenizer.end_of_text, *some] for some in ids]
    short = [i for i, start in enumerate(starts) if len(start) <= most + 1]
    scored = scorer.passages([starts[i] for i in short])
    nats = {i: one.nats for i, one in zip(short, scored, strict=True)}
    nats |= {i: scorer.text(starts[i]) for i in range(len(starts)) if i not in nats}
    n_bytes = np.array([len(text.encode()) for _, text in texts])
    return Reading(ids, [nats[i] for i in range(len(ids))], n_bytes, [domain for domain, _ in texts])


def same_tokens(readings) -> bool:
    """Whether several models read the same tokens, so that they can be compared one by one."""
    first, *others = readings
    return all(
        len(a) == len(b) and np.array_equal(a, b) for other in others for a, b in zip(first.ids, other.ids, strict=True)
    )


def grouped(reading: Reading, group: Callable[[int], np.ndarray], labels) -> list[dict]:
    """Mean loss of tokens in groups that are in two documents or more: label, loss (nats per token), its se, tokens.

    Args:
        reading: of one model.
        group: document -> the group of each of its tokens, int [T_d]; those below 0 or beyond the labels are left out.
        labels: of the groups.
    """
    sums = np.zeros((2, len(labels), len(reading.nats)))
    for i, nats in enumerate(reading.nats):
        groups = group(i)
        inside = (groups >= 0) & (groups < len(labels))
        sums[0, :, i] = np.bincount(groups[inside], nats[inside], len(labels))
        sums[1, :, i] = np.bincount(groups[inside], minlength=len(labels))
    rows = []
    for label, nats, counts in zip(labels, *sums, strict=True):
        there = counts > 0
        if there.sum() > 1:
            se = bootstrap(lambda a, b: a / b, nats[there], counts[there])
            rows.append({"label": label, "loss": nats.sum() / counts.sum(), "se": se, "tokens": int(counts.sum())})
    return rows


def by_position(reading: Reading, edges) -> list[dict]:
    """Loss by how many tokens of the document came before: from each edge up to the next."""
    labels = [f"{a} to {b - 1}" if b - a > 1 else f"{a}" for a, b in pairwise(edges)]
    return grouped(reading, lambda i: np.searchsorted(edges, np.arange(len(reading.ids[i])), side="right") - 1, labels)


def by_frequency(reading: Reading, counts) -> list[dict]:
    """Loss by how often a token stands in the training text, `counts` [V]: never, 1 to 9, 10 to 99, ..."""
    decade = np.where(np.asarray(counts) > 0, np.floor(np.log10(np.maximum(counts, 1))) + 1, 0).astype(int)
    labels = ["never", *(f"{10 ** (k - 1):,} to {10**k - 1:,}" for k in range(1, decade.max() + 1))]
    return grouped(reading, lambda i: decade[reading.ids[i]], labels)


def by_domain(reading: Reading) -> list[dict]:
    """Loss of each kind of text that there are two documents of, with its bits per byte and their standard error."""
    labels = [domain for domain, count in Counter(reading.domains).items() if count > 1]
    place = {label: i for i, label in enumerate(labels)}
    rows = grouped(reading, lambda i: np.full(len(reading.ids[i]), place.get(reading.domains[i], -1)), labels)
    for row in rows:
        chosen = [i for i, domain in enumerate(reading.domains) if domain == row["label"]]
        nats, size = np.array([reading.nats[i].sum() for i in chosen]), reading.bytes[chosen]
        row["documents"] = len(chosen)
        row["bits_per_byte"] = nats.sum() / size.sum() / np.log(2)
        row["bits_per_byte_se"] = bootstrap(lambda a, b: a / b / np.log(2), nats, size)
    return rows


def difference(a: Reading, b: Reading) -> tuple[float, float]:
    """Bits per byte of a minus those of b, over all documents, and the standard error of this paired difference."""
    nats = np.array([(x.sum(), y.sum()) for x, y in zip(a.nats, b.nats, strict=True)])
    bits = nats / np.log(2)
    value = (bits[:, 0].sum() - bits[:, 1].sum()) / a.bytes.sum()
    return float(value), bootstrap(lambda x, y, size: (x - y) / size, bits[:, 0], bits[:, 1], a.bytes)


def disagreements(a: Reading, b: Reading, length: int = 60, count: int = 4) -> list[tuple[int, int, int]]:
    """The pieces of `length` tokens where two models' mean losses differ most: (document, start, end), one a document.

    Half of them are those where a is better, half those where b is.
    """
    pieces = []
    for i, (x, y) in enumerate(zip(a.nats, b.nats, strict=True)):
        size = min(length, len(x))
        means = np.convolve(x - y, np.ones(size) / size, mode="valid")
        for at in {int(means.argmin()), int(means.argmax())}:
            pieces.append((float(means[at]), i, at, at + size))
    pieces.sort()
    chosen, seen = [], set()
    for some, sign in ((pieces, -1), (pieces[::-1], 1)):
        left = count // 2
        for mean, i, start, end in some:
            if left and i not in seen and sign * mean > 0:
                chosen.append((i, start, end))
                seen.add(i)
                left -= 1
    return chosen


def coloured(tokenizer, ids, values, limit: float = 3.0) -> str:
    """HTML of a text whose tokens are coloured by their values: blue below 0, red above, full at `limit`.

    A character of several tokens has the colour of its last one.
    """
    spans = []
    for text, value in zip(tokenizer.pieces(ids), values, strict=True):
        if not text:
            continue
        strength = min(abs(value) / limit, 1)
        red, blue = ((214, 96, 77), (67, 147, 195))
        colour = ",".join(map(str, red if value > 0 else blue))
        shown = html.escape(text).replace("\n", "↵<br>")
        spans.append(f'<span style="background:rgba({colour},{strength:.2f})" title="{value:+.2f} nats">{shown}</span>')
    return f'<div style="font-family:monospace;line-height:1.7;max-width:60em;color:black">{"".join(spans)}</div>'


def verdict(a: str, b: str, value: float, se: float, unit: str, better: str = "lower") -> str:
    """A difference a - b in words: who is ahead, by how much, or that the figures do not tell."""
    if not np.isfinite(se) or se == 0:
        return f"no verdict: the difference of {value:+.3g} {unit} has no standard error"
    if abs(value) < 2 * se:
        return f"no difference seen: {value:+.3g} ± {se:.2g} {unit}"
    ahead, behind = (a, b) if (value < 0) == (better == "lower") else (b, a)
    return f"{ahead} is ahead of {behind} by {abs(value):.3g} ± {se:.2g} {unit}"
