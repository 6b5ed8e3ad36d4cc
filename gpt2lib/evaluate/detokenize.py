"""Invertible de-tokenizers: texts of benchmarks, which were cut into words, as people write them, and back.

GPT-2 was trained on written text; its paper (section 3.1) measured benchmarks after "invertible de-tokenizers", which
were never released, and gave perplexity by the words of the original. What is invertible here is proved line by line:
words are joined only where the inverse takes them apart again, and a line that does not come back stays as it is.
"""

import re
from dataclasses import dataclass, field

_SUFFIX = re.compile(r"'(?:s|re|ve|ll|d|m|t)", re.IGNORECASE)

_INITIALS = re.compile(r"(?:[^\W\d_]\.)+")
_TITLES = frozenset(
    "mr mrs ms messrs dr st sr jr col gen capt maj lt sgt adm gov sen rep rev prof hon etc ph.d mt".split()
)
_SHORT = _TITLES | frozenset(
    "no nos vs v p pp co corp inc ltd bros al mm lbs ave op vol cf jan feb mar apr aug sept oct nov dec".split()
)


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
        sentences: whether each line is one, so that a full stop within it belongs to a word.
        short: words that keep their full stop, in lower case and without it.
        signs: {what stands for a sign: the sign}, also within words.
        edge: what a line has at its ends.
    """

    before: tuple = ()
    after: tuple = ()
    within: dict = field(default_factory=dict)
    quotes: tuple = ()
    written: dict = field(default_factory=dict)
    hyphens: str | None = None
    numbers: dict = field(default_factory=dict)
    negation: bool = False
    sentences: bool = False
    short: frozenset = _SHORT
    signs: dict = field(default_factory=dict)
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
                pieces += self._pieces(words[start:i], i == len(words) or not self.sentences)
                start = i
        if None in pieces:
            return None
        text = " ".join(pieces)
        for written, sign in self.signs.items():
            text = text.replace(written, sign)
        return text if self.tokenize(text) == line else None

    def tokenize(self, text: str) -> str:
        """The line that `detokenize` made it from."""
        if not text:
            return self.edge
        for written, sign in self.signs.items():
            text = text.replace(sign, written)
        pieces = text.split(" ")
        words = [word for piece in pieces[:-1] for word in self._split(piece, not self.sentences)]
        return self.edge + " ".join([*words, *self._split(pieces[-1])]) + self.edge

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

    def _pieces(self, words, stops) -> list:
        """The words as one piece, or as several where they would not come apart again; None for one that cannot be."""
        whole = self._write(words)
        if self._split(whole, stops) == words:
            return [whole]
        if len(words) == 1:
            return [None]
        for i in range(len(words) - 1, 0, -1):  # one more space may be enough, as late as can be
            parts = self._write(words[:i]), self._write(words[i:])
            if self._split(parts[0], not self.sentences) == words[:i] and self._split(parts[1], stops) == words[i:]:
                return list(parts)
        return self._pieces(words[:1], not self.sentences) + self._pieces(words[1:], stops)

    def _split(self, piece: str, stops: bool = True) -> list[str]:
        """The words of a piece of text without spaces; `stops`: a full stop at its end may be a word."""
        head, tail = [], []
        spoken = {written: word for word, written in self.written.items()}
        while len(piece) > 1:  # what opens
            if piece in self.before or piece in self.after or piece in self.within:
                break
            first = next((w for w in (*self.after, *self.quotes) if piece.startswith(self.written.get(w, w))), None)
            if first is None:
                break
            head.append(first)
            piece = piece[len(self.written.get(first, first)) :]
        while len(piece) > 1:  # what closes
            last = self._last(piece, stops)
            if last is None:
                break
            tail.insert(0, last)
            piece = piece[: -len(self.written.get(last, last))]
        words = self._middle(piece) if piece else []
        return [*head, *(spoken.get(word, word) for word in words), *tail]

    def _last(self, piece, stops):
        if piece in self.within or re.fullmatch(r"\.+", piece):
            return None
        if self.negation and piece.lower().endswith("n't"):
            return piece[-3:] if len(piece) > 3 else None
        if found := re.search(r"[^'](" + _SUFFIX.pattern + ")$", piece, re.IGNORECASE):
            return found[1]
        if re.search(r"s'$", piece):
            return "'"
        if piece.endswith(".") and (not stops or _INITIALS.fullmatch(piece) or piece[:-1].lower() in self.short):
            return None
        ends = [w for w in (*self.before, *self.quotes) if piece.endswith(self.written.get(w, w))]
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


_MARKS = (",", ".", ";", ":", "!", "?", "%", ")", "]", "...")

# WikiText (Merity et al. 2016): hyphens, and marks within numbers, are words between @.
_WIKITEXT = Detokenizer(
    before=(*_MARKS, "’", "”", "°"), after=("(", "[", "$", "£", "¥", "₱", "“", "#"),
    within={"@-@": "-", "@,@": ",", "@.@": ".", "/": "/", "⁄": "⁄"}, quotes=('"',), hyphens="@-@",
    numbers={",": "@,@", ".": "@.@"}, edge=" ",
)  # fmt: skip
# Penn Treebank as Mikolov et al. 2010 left it: in lower case and without punctuation.
_PTB = Detokenizer(before=("%",), after=("$", "#"), negation=True, signs={r"\/": "/"}, edge=" ")
# One Billion Word (Chelba et al. 2013): sentences.
_1BW = Detokenizer(
    before=_MARKS, after=("(", "[", "$", "£", "€"), quotes=('"',), within={"/": "/"},
    sentences=True,
)  # fmt: skip
# Children's Book Test (Hill et al. 2016), and LAMBADA as first published: words and signs of the Penn Treebank.
_CBT = Detokenizer(
    before=(*_MARKS, "''", "-RRB-"), after=("``", "-LRB-", "$", "£"), negation=True, short=_TITLES,
    written={"``": '"', "''": '"', "-LRB-": "(", "-RRB-": ")"},
)  # fmt: skip

DETOKENIZERS = {"wikitext": _WIKITEXT, "ptb": _PTB, "1bw": _1BW, "cbt": _CBT}


def detokenize(lines, kind: str) -> tuple[list[str], list[int]]:
    """The lines of a benchmark as people write them, and the numbers of those that stay as they are.

    `kind` is a name in DETOKENIZERS. Each of the other lines comes back from `DETOKENIZERS[kind].tokenize`.
    """
    rules, out, raw = DETOKENIZERS[kind], [], []
    for number, line in enumerate(lines):
        text = rules.detokenize(line)
        raw += [number] if text is None else []
        out.append(line if text is None else text)
    return out, raw
