"""Documents that say the same: exact and near duplicates, and what they share with the texts of evaluations."""

import functools
import hashlib
import re
import unicodedata
from collections.abc import Iterable, Iterator

import numpy as np

SHINGLE = 5  # words
BANDS, ROWS = 14, 8  # two documents whose shingles agree to J become candidates with probability 1 - (1 - J^8)^14
_WORD = re.compile(r"\w+")


@functools.lru_cache(2)  # a text is asked for several times in a row
def words(text: str) -> tuple[str, ...]:
    """What is compared: lower-case words without punctuation and accents."""
    text = text.lower()
    if not text.isascii():
        text = "".join(c for c in unicodedata.normalize("NFKD", text) if not unicodedata.combining(c))
    return tuple(_WORD.findall(text))


@functools.lru_cache(1 << 18)
def _hash(word: str) -> int:
    return int.from_bytes(hashlib.blake2b(word.encode("utf-8", "replace"), digest_size=8).digest(), "little")


def grams(text: str, n: int) -> np.ndarray:
    """A 64-bit number for each n words in a row, in order: [words - n + 1] uint64; of fewer words, one for all."""
    hashes = np.array([_hash(word) for word in words(text)], np.uint64)
    if len(hashes) < n:
        n = max(1, len(hashes))
    out = np.zeros(max(0, len(hashes) - n + 1), np.uint64)
    for k in range(n):  # a polynomial modulo 2^64
        out *= np.uint64(0x9E3779B97F4A7C15)
        out += hashes[k : len(hashes) - n + 1 + k]
    out ^= out >> np.uint64(32)
    return out


@functools.cache
def _permutations(count: int) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.Generator(np.random.Philox(2019))
    multipliers, offsets = random.integers(0, 1 << 64, (2, count, 1), np.uint64)
    return multipliers | np.uint64(1), offsets


def signature(text: str, n: int = SHINGLE, count: int = BANDS * ROWS) -> np.ndarray:
    """MinHash (Broder 1997): [count] uint32, two of which agree in as large a share as the sets of n words do."""
    shingles = np.unique(grams(text, n))
    if not len(shingles):
        return np.full(count, 0xFFFFFFFF, np.uint32)
    multipliers, offsets = _permutations(count)
    least = np.full(count, 0xFFFFFFFF, np.uint32)
    for part in np.array_split(shingles, -(-len(shingles) // 4096)):  # [count, 4096] at once fits into caches
        mixed = (multipliers * part + offsets) >> np.uint64(32)
        np.minimum(least, mixed.astype(np.uint32).min(axis=1), out=least)
    return least


def bands(text: str) -> list[bytes]:
    """A key for each band of the signature: documents that share one are near duplicates (Leskovec et al., ch. 3.4)."""
    rows = signature(text).reshape(BANDS, ROWS)
    return [hashlib.blake2b(bytes([i]) + row.tobytes(), digest_size=8).digest() for i, row in enumerate(rows)]


def exact(text: str) -> bytes:
    """A key of the whole text, by its words."""
    return hashlib.blake2b(" ".join(words(text)).encode("utf-8", "replace"), digest_size=16).digest()


def components(edges: Iterable[tuple]) -> dict:
    """Each member of a group that edges join, but the least -> the least: all those that can go."""
    parent = {}

    def root(x):
        while (up := parent.setdefault(x, x)) != x:
            parent[x] = x = parent[up]  # half the path
        return x

    for a, b in edges:
        a, b = sorted((root(a), root(b)))
        parent[b] = a
    return {x: first for x in parent if (first := root(x)) != x}


class Overlap:
    """The n-grams of evaluations, and how many of them texts contain.

    The paper counts 8-grams, in a Bloom filter (Radford et al. 2019, section 4 and table 6); to take documents out,
    GPT-3 used 13-grams (Brown et al. 2020, appendix C). Here all are held, 8 bytes each.
    """

    def __init__(self, evaluations: dict[str, Iterable[str]], n: int = 13):
        self.n = n
        self.names = sorted(evaluations)
        each = {name: [g for text in evaluations[name] if len(g := self._grams(text))] for name in self.names}
        self.sets = {name: np.unique(np.concatenate(g)) if g else np.zeros(0, np.uint64) for name, g in each.items()}
        self.all = np.unique(np.concatenate([*self.sets.values(), np.zeros(0, np.uint64)]))

    def _grams(self, text):
        found = grams(text, self.n)
        return found if len(words(text)) >= self.n else found[:0]

    def hits(self, text: str) -> np.ndarray:
        """Those of the evaluations that the text has, sorted: [k] uint64."""
        found = self._grams(text)  # far fewer than there are of all, which are not sorted again
        place = np.minimum(np.searchsorted(self.all, found), max(0, len(self.all) - 1))
        return np.unique(found[self.all[place] == found]) if len(self.all) else found[:0]

    def shares(self, hits: np.ndarray) -> dict[str, float]:
        """Of each evaluation's n-grams the share among `hits`."""
        return {name: float(np.isin(own, hits).mean()) if len(own) else 0.0 for name, own in self.sets.items()}


def pairs(members: Iterable) -> Iterator[tuple]:
    """Edges that join the documents of one key: the least with each other one."""
    first, *rest = sorted(set(members))
    return ((first, other) for other in rest)
