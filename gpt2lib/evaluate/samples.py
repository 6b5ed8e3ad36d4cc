"""Statistics of samples, to set beside those of real text."""


def distinct(sequences, n: int) -> float:
    """Share of different n-grams among all n-grams of some token sequences (Li et al. 2016, distinct-n)."""
    grams = [tuple(ids[i : i + n]) for ids in sequences for i in range(len(ids) - n + 1)]
    return len(set(grams)) / len(grams) if grams else float("nan")
