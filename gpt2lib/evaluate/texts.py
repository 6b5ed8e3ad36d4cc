"""The texts of the language-modelling columns of GPT-2's table 3, and of WebText, with the units of their figures."""

import json
import re
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from gpt2lib.evaluate.detokenize import detokenize


class TextError(ValueError):
    """A file of a benchmark that is not what it should be; the message says which, where and what to do."""


@dataclass(frozen=True)
class Text:
    """A text to be predicted.

    Attributes:
        name: of the benchmark.
        documents: in the order of the text. What its standard error is taken over.
        words: of each document as it was published, ends of lines included; what perplexity is given by.
        joined: whether the documents are pieces of one text, so that each is predicted after the one before.
        raw: share of the lines that no de-tokenizer brings back, and that stay as they were.
    """

    name: str
    documents: list[str]
    words: list[int]
    joined: bool
    raw: float = 0.0

    @property
    def characters(self) -> list[int]:
        return [len(document) for document in self.documents]

    @property
    def bytes(self) -> list[int]:
        return [len(document.encode()) for document in self.documents]


# {name: (kind of its de-tokenizer, what its documents are, the unit of its column)}
TEXTS = {
    "wikitext2": ("wikitext", "articles", "words"),
    "wikitext103": ("wikitext", "articles", "words"),
    "ptb": ("ptb", "blocks", "words"),
    "1bw": ("1bw", "lines", "words"),
    "enwik8": (None, "blocks", "bytes"),
    "text8": (None, "blocks", "characters"),
    "webtext": (None, "records", "words"),
    "webtext-valid": (None, "records", "words"),
}
_BLOCK = 40  # lines, or as many hundred characters of a text that has no lines
_TITLE = re.compile(r" = (?!= ).* = ")
WHOLE_BYTES = {"enwik8": 100_000_000, "text8": 100_000_000}  # Mahoney 2006
_TEST_BYTES = 5_000_000  # of them: the last, as everyone splits them


def read(name: str, path, detokenized: bool = True, limit: int | None = None) -> Text:
    """A benchmark's text from its published file.

    Args:
        name: in TEXTS.
        path: of the file: lines of words (wikitext, ptb, 1bw), the whole of enwik8 or text8, `text` in JSON lines,
            which may lie in several files of a folder.
        detokenized: as people write it, where it was cut into words; else as it was published.
        limit: the first so many documents.

    Raises: TextError for a file that is missing, empty, cut short or of another layout.
    """
    if name not in TEXTS:
        raise TextError(f"there is no text `{name}`; valid: {', '.join(TEXTS)}")
    path, (kind, parts, _) = Path(path), TEXTS[name]
    try:
        files = sorted(path.glob("*.jsonl")) if path.is_dir() else [path]
        content = b"".join(file.read_bytes() for file in files)
        whole = WHOLE_BYTES.get(name)
        if content and whole and len(content) != whole:
            raise TextError(
                f"{path} has {len(content):,} bytes, and {name} has {whole:,}: it was cut short, or is a part of it; "
                "delete it and fetch it again"
            )
        content = content.decode("utf-8")
    except FileNotFoundError as error:
        raise TextError(f"{path} is missing; it is the file of {name}") from error
    except UnicodeDecodeError as error:
        raise TextError(f"{path} is not UTF-8 from byte {error.start} on: it is not the file of {name}") from error
    if not content:
        raise TextError(f"{path} is empty; fetch the file of {name} again")
    if parts == "records":
        documents = _records(path, content)[:limit]
        return Text(name, documents, [len(document.split()) for document in documents], joined=False)
    if kind is None:
        content = content.encode()[-_TEST_BYTES:].decode("utf-8", errors="ignore")
        documents = _blocks(content)[:limit]
        return Text(name, documents, [len(document.split()) for document in documents], joined=True)
    if not content.endswith("\n"):
        raise TextError(f"{path} ends in the middle of a line: it was cut short; fetch the file of {name} again")
    lines = content[:-1].split("\n")
    if kind == "wikitext" and not any(map(_TITLE.fullmatch, lines)):
        raise TextError(f"{path} has no line such as ` = Title = `: it is not the file of {name}")
    words = [len(line.split()) + 1 for line in lines]
    texts, stayed = detokenize(lines, kind) if detokenized else (lines, [])
    starts = {
        "articles": [0, *(i for i, line in enumerate(lines) if _TITLE.fullmatch(line))],
        "blocks": range(0, len(lines), _BLOCK),
        "lines": range(len(lines)),
    }[parts]
    spans = [slice(a, b) for a, b in pairwise([*starts, len(lines)]) if any(line.strip() for line in lines[a:b])]
    if parts == "articles":  # what is before the first title is blank, and belongs to it
        spans[0] = slice(0, spans[0].stop)
    documents = ["".join(f"{line}\n" for line in texts[span]) for span in spans[:limit]]
    counts = [sum(words[span]) for span in spans[:limit]]
    return Text(name, documents, counts, parts == "blocks", len(stayed) / len(lines))


def _records(path, content) -> list[str]:
    """The `text` of each line of JSON; an empty one has nothing to predict, and is left out."""
    documents = []
    for number, line in enumerate(content.splitlines(), 1):
        try:
            documents.append(json.loads(line)["text"])
        except (ValueError, KeyError, TypeError) as error:
            raise TextError(f"line {number} of {path} is no JSON object with a `text`; fetch the file again") from error
    return [document for document in documents if document]


def _blocks(content) -> list[str]:
    """Pieces of a text, cut where a token ends on either side: before a line, else before a blank."""
    pieces = re.findall(r".*\n|.+", content) if "\n" in content else re.findall(r".{1,100}\S*|.+", content)
    return ["".join(pieces[i : i + _BLOCK]) for i in range(0, len(pieces), _BLOCK)]
