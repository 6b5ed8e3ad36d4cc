"""From a page to its text, or the reason why it has none: each step takes a record and gives it on, or raises Refused.

A record is a dict: `id` and `url`, then `html` (bytes), with the `charset` that its server told or without, or `text`.
"""

import contextlib
import logging
import re
from collections import Counter

import ftfy
import py3langid
import trafilatura

from gpt2lib.corpus.urls import Refused

logging.getLogger("trafilatura").setLevel(logging.CRITICAL)  # what it cannot read is counted here

MIN_CHARACTERS = 512  # about 128 tokens: OpenWebText leaves out what is shorter
MAX_CHARACTERS = 1_000_000
# Rae et al. 2021, "Scaling Language Models", appendix A.1.1 and table A1
WORDS = (50, 100_000)
MEAN_WORD = (3, 10)  # characters
MAX_SYMBOLS = 0.1  # `#` and `...` for each word
MAX_BULLETS, MAX_ELLIPSES = 0.9, 0.3  # of the lines
MIN_ALPHABETIC = 0.8  # of the words have a letter
STOP_WORDS, MIN_STOP_WORDS = frozenset("the be to of and that have with".split()), 2
MAX_REPEATED_LINES = 0.3  # of the lines, and MAX_REPEATED_CHARACTERS of the characters, are in lines that came before
MAX_REPEATED_CHARACTERS = 0.2


_CHARSET = re.compile(rb"""<(?:meta|\?xml)[^>]*?(?:charset|encoding)\s*=\s*["']?\s*([\w-]+)""", re.IGNORECASE)
_XML = re.compile(r"^\s*<\?xml[^>]*>")


def extract(record: dict) -> dict:
    """The main text of an HTML page, without menus, comments and tables; where trafilatura finds none, its paragraphs.

    The encoding is taken from the page itself if it can be, since servers are often wrong about it.
    """
    html = decoded(record["html"], record.get("charset"))
    tree = trafilatura.load_html(html)
    if tree is None:
        raise Refused("no HTML")
    text = trafilatura.extract(tree, url=record["url"], include_comments=False, include_tables=False)
    if not text:
        text = trafilatura.baseline(html)[1]
    if not text:
        raise Refused("no text")
    return {**{k: v for k, v in record.items() if k not in ("html", "charset")}, "text": text}


def decoded(html: bytes, charset: str | None = None) -> str | bytes:
    """A page as UTF-8 if it is that, else as it declares, else in its server's `charset`.

    If it is none of these, its bytes: trafilatura guesses their encoding, with the detectors installed beside it.
    """
    declared = _CHARSET.search(html[:2048])
    for encoding in ("utf-8-sig", declared and declared[1].decode("ascii"), charset):
        with contextlib.suppress(LookupError, UnicodeError):
            if encoding:
                return _XML.sub("", html.decode(encoding), count=1)  # lxml refuses text that declares an encoding
    return html


def fix(record: dict) -> dict:
    """Text that was decoded in the wrong way put right, in NFC, with straight line ends and no control characters."""
    text = ftfy.fix_text(record["text"], uncurl_quotes=False, fix_latin_ligatures=False)
    return {**record, "text": re.sub(r"[ \t]+\n", "\n", text).strip()}


def english(record: dict, language: str = "en") -> dict:
    """Refused for a text in another language, as its first characters have it."""
    found, _ = py3langid.classify(record["text"][:1000])
    if found != language:
        raise Refused("another language")
    return record


def quality(record: dict) -> dict:
    """Refused for what is too short or long, is not made of words, or repeats itself."""
    text = record["text"]
    words, lines = text.split(), [line.strip() for line in text.splitlines() if line.strip()]
    if len(text) < MIN_CHARACTERS or len(words) < WORDS[0]:
        raise Refused("too short")
    if len(text) > MAX_CHARACTERS or len(words) > WORDS[1]:
        raise Refused("too long")
    if not MEAN_WORD[0] <= sum(map(len, words)) / len(words) <= MEAN_WORD[1]:
        raise Refused("words too short or long")
    if (text.count("#") + text.count("...") + text.count("…")) / len(words) > MAX_SYMBOLS:
        raise Refused("symbols")
    if sum(line[0] in "•-*‣◦" for line in lines) / len(lines) > MAX_BULLETS:
        raise Refused("a list")
    if sum(line.endswith(("...", "…")) for line in lines) / len(lines) > MAX_ELLIPSES:
        raise Refused("cut lines")
    if sum(any(map(str.isalpha, word)) for word in words) / len(words) < MIN_ALPHABETIC:
        raise Refused("not made of words")
    if len(STOP_WORDS.intersection(word.lower() for word in words)) < MIN_STOP_WORDS:
        raise Refused("no sentences")
    again = [(line, n - 1) for line, n in Counter(lines).items() if n > 1]
    if sum(n for _, n in again) / len(lines) > MAX_REPEATED_LINES:
        raise Refused("repeated lines")
    if sum(n * len(line) for line, n in again) / sum(map(len, lines)) > MAX_REPEATED_CHARACTERS:
        raise Refused("repeated lines")
    return record
