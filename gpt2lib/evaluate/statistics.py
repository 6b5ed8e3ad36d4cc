"""Standard errors of ratios, and statistics of samples to set beside those of real text."""

import math

import numpy as np


def ratio_error(numerators, denominators) -> float:
    """Standard error of sum(numerators) / sum(denominators) over windows in the order of the text.

    Neighbouring windows are of one package or one book and alike, so about sqrt(W) contiguous blocks are the units
    taken as independent. Denominators vary too: the linearised ratio estimator (Cochran 1977, section 6.3).
    NaN for fewer than two windows.
    """
    numerators, denominators = (np.asarray(x, np.float64) for x in (numerators, denominators))
    n_blocks = min(len(numerators), max(2, round(math.sqrt(len(numerators)))))
    if n_blocks < 2:
        return math.nan
    residuals = numerators - denominators * (numerators.sum() / denominators.sum())
    blocks = np.array([block.sum() for block in np.array_split(residuals, n_blocks)])
    return float(math.sqrt(n_blocks / (n_blocks - 1) * np.sum(blocks**2)) / denominators.sum())


def distinct(sequences, n: int) -> float:
    """Share of different n-grams among all n-grams of some token sequences (Li et al. 2016, distinct-n)."""
    grams = [tuple(ids[i : i + n]) for ids in sequences for i in range(len(ids) - n + 1)]
    return len(set(grams)) / len(grams) if grams else float("nan")


def bootstrap(statistic, *columns, samples: int = 1000, seed: int = 0) -> float:
    """Standard error of `statistic(*sums of the columns)` over documents (Efron 1979).

    Args:
        statistic: of as many arrays [samples] as there are columns, such as `lambda nats, words: nats / words`
        columns: each has one number for each document [n]; documents are drawn with replacement.
        samples: how many times they are drawn.
        seed: of the draws.

    NaN for fewer than two documents.
    """
    columns = np.stack([np.asarray(column, np.float64) for column in columns])  # [columns, n]
    n = columns.shape[1]
    if n < 2:
        return math.nan
    random = np.random.default_rng(seed)
    times = np.stack([np.bincount(random.integers(0, n, n), minlength=n) for _ in range(samples)])  # [samples, n]
    return float(np.std(statistic(*(columns @ times.T)), ddof=1))


def repetition(ids, n: int = 4) -> float:
    """Share of the n-grams of a text that stood in it before (Welleck et al. 2020, seq-rep-n). NaN for none."""
    grams = [tuple(ids[i : i + n]) for i in range(len(ids) - n + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else math.nan


def zipf(sequences) -> float:
    """The exponent s of frequency ~ rank^-s over the tokens of all texts, fitted in logarithms (Zipf 1949)."""
    counts = np.sort(np.unique(np.concatenate([np.asarray(ids, int) for ids in sequences]), return_counts=True)[1])
    if len(counts) < 3:
        return math.nan
    return float(-np.polyfit(np.log(np.arange(1, len(counts) + 1)), np.log(counts[::-1]), 1)[0])


def self_bleu(texts, most: int = 100) -> list[float]:
    """BLEU of each text against all others as its references, in [0, 1] (Zhu et al. 2018): high if they are all alike.

    Of at most the first `most` texts. Needs sacrebleu.
    """
    from sacrebleu.metrics import BLEU

    texts, bleu = list(texts)[:most], BLEU(effective_order=True)
    return [bleu.sentence_score(text, texts[:i] + texts[i + 1 :]).score / 100 for i, text in enumerate(texts)]


def of_samples(sequences, texts) -> dict:
    """Statistics of texts, each a pair (value, standard error): what tells machine text from human text.

    Args:
        sequences: token ids of each text.
        texts: the same as strings.

    Length in tokens; distinct 1- to 3-grams, repeated 4-grams, self-BLEU: means over texts. The exponent of Zipf's law
    is of all, its error that of the delete-one-group jackknife of up to 20 groups (Efron and Tibshirani 1993).
    ValueError for fewer than two texts, or for texts of fewer than four tokens.
    """
    if len(sequences) < 2 or max(map(len, sequences)) < 4:
        raise ValueError("statistics of samples need at least 2 texts, and one of 4 tokens or more; ask for more")
    per_text = {"tokens": [len(ids) for ids in sequences]}
    per_text |= {f"distinct {n}-grams": [distinct([ids], n) for ids in sequences] for n in (1, 2, 3)}
    per_text |= {"repeated 4-grams": [repetition(ids) for ids in sequences], "self-BLEU": self_bleu(texts)}
    figures = {}
    for name, values in per_text.items():
        values = np.array(values, float)[np.isfinite(values)]
        se = values.std(ddof=1) / math.sqrt(len(values)) if len(values) > 1 else 0
        figures[name] = (float(values.mean()), float(se))
    groups = [g for g in np.array_split(np.arange(len(sequences)), min(20, len(sequences))) if len(g)]
    left = [zipf([ids for i, ids in enumerate(sequences) if i not in set(group.tolist())]) for group in groups]
    spread = (len(left) - 1) / len(left) * np.sum((np.array(left) - np.mean(left)) ** 2)
    figures["Zipf exponent"] = (zipf(sequences), float(math.sqrt(spread)))
    return figures
