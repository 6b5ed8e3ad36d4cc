"""Invertible de-tokenizers: texts of benchmarks, which were cut into words, as people write them, and back.

GPT-2 was trained on written text; its paper (section 3.1) measured benchmarks after "invertible de-tokenizers", which
were never released, and gave perplexity by the words of the original. What is invertible here is proved line by line:
words are joined only where the inverse takes them apart again, and a line that does not come back stays as it is.
"""

import re
from dataclasses import dataclass, field

_SUFFIX = re.compile(r"'(?:s|re|ve|ll|d|m|t)", re.IGNORECASE)


@dataclass(frozen=True)
class Detokenizer:
    """How the words of one benchmark are joined and split.

    Attributes:
        before: words that are joined to the one before them.
        after: words that are joined to the one after them.
        within: {word: what is written} of words that are joined to both neighbours.
        quotes: words that open and close by turns, joined to what they enclose.
        written: {word: what is written} of others, wherever they stand.
        hyphens: the word that a hyphen between letters stands for; None if it is part of a word.
        numbers: {"," and ".": the words that they stand for within a number}.
        negation: "do n't", of two words; else "don 't".
        edge: what a line has at its ends.
    """

    before: frozenset = frozenset()
    after: frozenset = frozenset()
    within: dict = field(default_factory=dict)
    quotes: frozenset = frozenset()
    written: dict = field(default_factory=dict)
    hyphens: str | None = None
    numbers: dict = field(default_factory=dict)
    negation: bool = False
    edge: str = ""

    def detokenize(self, line: str) -> str | None:
        """The line as people write it; None if that cannot be undone. `line` is without its end of line."""
        inner = line[len(self.edge) : len(line) - len(self.edge)] if self.edge else line
        if not line.strip():
            return "" if line == self.edge else None
        if f"{self.edge}{inner}{self.edge}" != line or "" in (words := inner.split(" ")):
            return None
        pieces, start, joined = [], 0, self._joined(words)
        for i in range(1, len(words) + 1):
            if i == len(words) or not joined[i]:
                pieces += self._pieces(words[start:i])
                start = i
        if None in pieces or self.tokenize(text := " ".join(pieces)) != line:
            return None
        return text

    def tokenize(self, text: str) -> str:
        """The line that `detokenize` made it from."""
        if not text:
            return self.edge
        return self.edge + " ".join(word for piece in text.split(" ") for word in self._split(piece)) + self.edge

    def _joined(self, words) -> list[bool]:
        """Whether each word is joined to the one before it."""
        joined, opening = [False] * (len(words) + 1), {}
        for i, word in enumerate(words):
            left = right = False
            if word in self.quotes:
                left = opening.get(word, False)
                right = not left
                opening[word] = right
            elif word in self.within:
                left = right = 0 < i < len(words) - 1
            elif word in self.before or _SUFFIX.fullmatch(word) or (self.negation and word.lower() == "n't"):
                left = True
            elif word in self.after:
                right = True
            elif word == "'" and i and words[i - 1].endswith("s"):
                left = True
            joined[i] |= left
            joined[i + 1] |= right
        joined[0] = joined[-1] = False
        return joined

    def _write(self, words) -> str:
        last = len(words) - 1
        return "".join(
            self.within[word] if word in self.within and 0 < i < last else self.written.get(word, word)
            for i, word in enumerate(words)
        )

    def _pieces(self, words) -> list:
        """The words as one piece, or as several where they would not come apart again; None for one that cannot be."""
        whole = self._write(words)
        if self._split(whole) == words:
            return [whole]
        if len(words) == 1:
            return [None]
        for i in range(len(words) - 1, 0, -1):  # the fewest spaces: one, as late as can be
            if all(self._split(self._write(part)) == part for part in (words[:i], words[i:])):
                return [self._write(words[:i]), self._write(words[i:])]
        return self._pieces(words[:1]) + self._pieces(words[1:])

    def _split(self, piece: str) -> list[str]:
        """The words of a piece of text without spaces."""
        head, tail = [], []
        spoken = {written: word for word, written in self.written.items()}
        while len(piece) > 1:  # what opens
            if piece in self.before or piece in self.after or piece in self.within:
                break
            first = next((w for w in (*self.after, *self.quotes) if piece.startswith(self.written.get(w, w))), None)
            if first is None or self._closes(first):
                break
            head.append(first)
            piece = piece[len(self.written.get(first, first)) :]
        while len(piece) > 1:  # what closes
            last = self._last(piece)
            if last is None:
                break
            tail.insert(0, last)
            piece = piece[: -len(self.written.get(last, last))]
        words = self._middle(piece) if piece else []
        return [*head, *(spoken.get(word, word) for word in words), *tail]

    def _closes(self, word):
        return word == "''"

    def _last(self, piece):
        if piece in self.within or re.fullmatch(r"\.+", piece):
            return None
        if self.negation and re.search(r"[^']n't$", piece, re.IGNORECASE):
            return piece[-3:]
        if found := re.search(r"[^'](" + _SUFFIX.pattern + ")$", piece, re.IGNORECASE):
            return found[1]
        if re.search(r"s'$", piece):
            return "'"
        if piece.endswith(".") and ABBREVIATION.fullmatch(piece):
            return None
        ends = [w for w in (*self.before, *self.quotes) if piece.endswith(self.written.get(w, w)) and w != "``"]
        return max(ends, key=len, default=None)

    def _middle(self, piece) -> list[str]:
        words = [piece]
        if self.hyphens:
            words = _parted(words, r"(?<=[^\W_])-(?=[^\W_])", self.hyphens)
        for mark, word in self.numbers.items():
            words = _parted(words, rf"(?<=\d){re.escape(mark)}(?=\d)", word)
        for word, written in self.within.items():
            if written not in ("-", ",", "."):
                words = _parted(words, rf"(?<=.){re.escape(written)}(?=.)", word)
        return words


def _parted(words, pattern, separator) -> list[str]:
    out = []
    for word in words:
        parts = [word] if word.startswith("@") else re.split(pattern, word)
        for i, part in enumerate(parts):
            out += [separator, part] if i else [part]
    return out


ABBREVIATION = re.compile(
    r"(?:[^\W\d_]\.)+|(?:Mr|Mrs|Ms|Dr|St|Sr|Jr|Col|Gen|Capt|Maj|Lt|Sgt|Adm|Gov|Sen|Rep|Rev|Prof|Hon|No|Nos|vs|v|p|pp|"
    r"Co|Corp|Inc|Ltd|Bros|al|etc|mm|lbs|Ph\.D|Mt|Ave|Op|Vol|ca|cf|Jan|Feb|Mar|Apr|Aug|Sept|Oct|Nov|Dec)\."
)
