"""How well a model predicts a text: the language-modelling columns of GPT-2's table 3."""

import math

import numpy as np

from gpt2lib.evaluate.score import Scorer
from gpt2lib.evaluate.statistics import bootstrap
from gpt2lib.evaluate.texts import Text, TextError


def document_losses(
    scorer: Scorer, tokenizer, text: Text, window=None, stride=None, full=False
) -> tuple[np.ndarray, np.ndarray]:
    """Nats [n] and tokens [n] of each document of a text, all of its tokens predicted.

    The first is predicted after the end of text, as in training. Pieces of one text are predicted as one. An empty
    document has none of either. TextError if all are empty.
    """
    ids = [tokenizer.encode(document) for document in text.documents]
    lengths = np.array([len(part) for part in ids])
    if not lengths.sum():
        raise TextError(f"{text.name} has nothing to be predicted: all of its {len(ids)} documents are empty")
    if text.joined:
        nats = scorer.text([tokenizer.end_of_text, *(i for part in ids for i in part)], window, stride, full)
        return np.bincount(np.repeat(np.arange(len(ids)), lengths), nats, len(ids)), lengths
    most = window or scorer.model.config.n_ctx
    short = [i for i, part in enumerate(ids) if 0 < len(part) <= most]
    nats = np.zeros(len(ids))
    for i, scored in zip(short, scorer.passages([[tokenizer.end_of_text, *ids[i]] for i in short]), strict=True):
        nats[i] = scored.nats.sum()
    for i in np.flatnonzero(lengths > most):
        nats[i] = scorer.text([tokenizer.end_of_text, *ids[i]], window, stride, full).sum()
    return nats, lengths


def perplexity(
    scorer: Scorer, tokenizer, text: Text, window: int | None = None, stride: int | None = None, full=False
) -> dict:
    """All figures of a model on a text, each with its standard error (bootstrap over documents), by name.

    Sums first, one division, then the exponential (openai/gpt-2#78): `perplexity` is by the words of the text as it was
    published, whatever the model was given; `loss` is nats per token; `bits_per_byte` and `bits_per_character` are by
    what the model was given. `window`, `stride` and `full` as in `Scorer.text`; the figures say which they were.
    """
    window = window or scorer.model.config.n_ctx
    stride = stride or window
    nats, tokens = document_losses(scorer, tokenizer, text, window, stride, full)
    figures = {"documents": len(nats), "tokens": int(tokens.sum()), "words": sum(text.words), "nats": float(nats.sum())}
    units = {
        "loss": (tokens, lambda nats, units: nats / units),
        "perplexity": (text.words, lambda nats, units: np.exp(nats / units)),
        "bits_per_byte": (text.bytes, lambda nats, units: nats / units / math.log(2)),
        "bits_per_character": (text.characters, lambda nats, units: nats / units / math.log(2)),
    }
    for name, (counts, statistic) in units.items():
        figures[name] = float(statistic(nats.sum(), np.sum(counts)))
        figures[f"{name}_se"] = bootstrap(statistic, nats, counts)
    return figures | {"raw_lines": text.raw, "window": window, "stride": stride}
