"""Token shards on disk, and batches from them that depend on nothing but what they are asked for.

A corpus is a folder: `manifest.json`, `tokenizer/`, and shards `train-00000.bin`, `validation-00000.bin`, ... of uint16
token ids, little endian, each document followed by `<|endoftext|>`. A hash of a document's text decides its split, so
train and validation cannot mix.
"""

import contextlib
import functools
import hashlib
import json
import logging
import secrets
import shutil
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import accumulate
from os import PathLike
from pathlib import Path

import numpy as np
from tqdm import tqdm

from gpt2lib.config import nearest
from gpt2lib.tokenizer import Tokenizer

FORMAT = 1
SPLITS = ("train", "validation")
SHARD_TOKENS = 2**25  # 64 MiB
VALIDATION_FRACTION = 0.05  # of the documents
_DTYPE = np.dtype("<u2")
_MANIFEST_KEYS = {"format", "name", "source", "validation_fraction", "tokenizer", "left_out", "splits"}
_SHARD_KEYS = {"file", "sha256", "tokens", "documents", "bytes"}


class CorpusError(ValueError):
    """A corpus that cannot be written, read or used as asked; the message says what, where and what to do."""


def split_documents(
    documents: Iterable[str], validation_fraction: float, left_out: Counter | None = None
) -> Iterator[tuple[str, str, int]]:
    """The documents that a corpus keeps, each as (split, text, UTF-8 bytes of the text).

    Texts seen before and texts without a visible character are left out, and counted in `left_out`. Memory grows by one
    hash for each document.
    """
    left_out = Counter() if left_out is None else left_out
    seen = set()
    for text in documents:
        if not text or text.isspace():
            left_out["empty"] += 1
            continue
        utf8 = text.encode("utf-8", errors="replace")  # a lone surrogate is no character
        digest = hashlib.sha256(utf8).digest()
        if digest in seen:
            left_out["duplicates"] += 1
            continue
        seen.add(digest)
        split = "validation" if int.from_bytes(digest[:8], "big") < validation_fraction * 2**64 else "train"
        yield split, utf8.decode(), len(utf8)


class _Shards:
    """Writes the documents of one split into numbered shards, whole documents only; holds one shard in memory."""

    def __init__(self, folder: Path, split: str, shard_tokens: int):
        self.folder, self.split, self.shard_tokens = folder, split, shard_tokens
        self.written = []
        self._start()

    def _start(self) -> None:
        self._ids, self._documents, self._bytes = bytearray(), 0, 0

    def add(self, ids: list[int], n_bytes: int) -> None:
        """Append one document, its end of text included; the shard before it ends where it would grow too long."""
        if self._documents and len(self._ids) // _DTYPE.itemsize + len(ids) > self.shard_tokens:
            self.flush()
        self._ids += np.array(ids, _DTYPE).tobytes()
        self._documents += 1
        self._bytes += n_bytes

    def flush(self) -> None:
        """Write the documents held, if any, as one shard."""
        if not self._documents:
            return
        name = f"{self.split}-{len(self.written):05d}.bin"
        (self.folder / name).write_bytes(self._ids)
        self.written.append(
            {
                "file": name,
                "sha256": hashlib.sha256(self._ids).hexdigest(),
                "tokens": len(self._ids) // _DTYPE.itemsize,
                "documents": self._documents,
                "bytes": self._bytes,
            }
        )
        self._start()


def write_corpus(
    folder: str | PathLike,
    documents: Iterable[str],
    tokenizer: Tokenizer,
    *,
    name: str,
    source: dict,
    shard_tokens: int = SHARD_TOKENS,
    validation_fraction: float = VALIDATION_FRACTION,
    progress: bool = True,
) -> dict:
    """Tokenize documents into a new corpus in `folder` and return its manifest.

    `source` says how the text was made. All is written beside `folder` and renamed at the end, so an interruption
    leaves the corpus that was there. CorpusError for an empty split, a vocabulary beyond uint16, a full disk, or a
    folder that holds something else than a corpus.
    """
    folder = Path(folder).resolve()
    check_replaceable(folder)
    if tokenizer.n_vocab > 2**16:
        raise CorpusError(f"shards hold uint16 and so at most {2**16} entries; this tokenizer has {tokenizer.n_vocab}")
    left_out = Counter(duplicates=0, empty=0)
    with _written_beside(folder) as beside:
        with _disk_errors(folder):
            tokenizer.save(beside / "tokenizer")
        writers = {split: _Shards(beside, split, shard_tokens) for split in SPLITS}
        kept = split_documents(documents, validation_fraction, left_out)
        for split, text, n_bytes in tqdm(kept, desc=f"{name}: tokenizing", unit=" documents", disable=not progress):
            ids = [*tokenizer.encode(text), tokenizer.end_of_text]
            with _disk_errors(folder):
                writers[split].add(ids, n_bytes)
        with _disk_errors(folder):
            for writer in writers.values():
                writer.flush()
        _check_splits(name, {split: writer.written for split, writer in writers.items()}, validation_fraction)
        manifest = {
            "format": FORMAT,
            "name": name,
            "source": source,
            "validation_fraction": validation_fraction,
            "tokenizer": {"n_vocab": tokenizer.n_vocab, "hash": tokenizer.hash},
            "left_out": dict(left_out),
            "splits": {split: writer.written for split, writer in writers.items()},
        }
        with _disk_errors(folder):
            (beside / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
            replace_folder(folder, beside)
    return manifest


def _check_splits(name: str, splits: dict[str, list[dict]], validation_fraction: float) -> None:
    """CorpusError if a split has no document."""
    n_documents = {split: sum(shard["documents"] for shard in shards) for split, shards in splits.items()}
    n_all = sum(n_documents.values())
    if not n_all:
        raise CorpusError(f"the corpus {name} is empty: there is no document with text in its source")
    for split, n in n_documents.items():
        if not n:
            raise CorpusError(
                f"none of the {n_all} documents of the corpus {name} falls into the {split} split at "
                f"validation_fraction {validation_fraction}: give more documents or another fraction"
            )


def check_replaceable(folder: Path) -> None:
    """CorpusError if a corpus must not be written to `folder`, because something else is there."""
    replaceable = not folder.exists() or (folder / "manifest.json").is_file()
    if not replaceable and (folder.is_file() or any(folder.iterdir())):
        raise CorpusError(f"{folder} exists and is not a corpus; give another folder, or remove it yourself")


@contextlib.contextmanager
def _written_beside(folder: Path) -> Iterator[Path]:
    """A new folder beside `folder` to write into; whatever is left of it goes away at the end."""
    beside = folder.with_name(f".{folder.name}.{secrets.token_hex(4)}")
    with _disk_errors(folder):
        beside.mkdir(parents=True)
    try:
        yield beside
    finally:
        shutil.rmtree(beside, ignore_errors=True)


@contextlib.contextmanager
def _disk_errors(folder: Path) -> Iterator[None]:
    """Turn a failed write into one sentence. Errors of the source of the text stay outside."""
    try:
        yield
    except OSError as error:
        raise CorpusError(
            f"cannot write the corpus {folder}: {error.strerror or error}; what was there before is unchanged"
        ) from error


def replace_folder(folder: Path, beside: Path) -> None:
    """Put `beside` in the place of `folder`. No rename replaces a filled folder, so the old one steps aside first."""
    old = beside.with_name(f"{beside.name}.old")
    existed = folder.exists()
    if existed:
        folder.rename(old)
    try:
        beside.rename(folder)
    except OSError:
        if existed:
            old.rename(folder)
        raise
    shutil.rmtree(old, ignore_errors=True)


class Tokens:
    """The tokens of one split, its shards one after another; `tokens[a:b]` reads them as int32 [b - a]."""

    def __init__(self, paths: list[Path], lengths: list[int]):
        self._shards = [np.memmap(path, _DTYPE, mode="r", shape=(n,)) for path, n in zip(paths, lengths, strict=True)]
        self._starts = [0, *accumulate(lengths)]

    def __len__(self) -> int:
        return self._starts[-1]

    def __getitem__(self, window: slice) -> np.ndarray:
        start, stop, step = window.indices(len(self))
        if step != 1:
            raise ValueError(f"tokens are read in steps of 1, not {step}")
        parts = []
        shard = bisect_right(self._starts, start) - 1
        while start < stop:
            begin, end = self._starts[shard], min(stop, self._starts[shard + 1])
            parts.append(self._shards[shard][start - begin : end - begin])
            start, shard = end, shard + 1
        return np.concatenate(parts, dtype=np.int32) if parts else np.empty(0, np.int32)


def _check_keys(path: Path, value: dict, keys: set[str]) -> None:
    """CorpusError if a part of the manifest at `path` has other keys than these."""
    wrong = keys ^ set(value)
    if wrong:
        raise CorpusError(f"{path} lacks or does not know {', '.join(sorted(wrong))}; write the corpus again")


class Corpus:
    """A folder of token shards, opened for reading.

    Opening reads the manifest and looks at the sizes of all shards; `verify` reads them through. CorpusError if the
    manifest is not one of ours, or a shard is missing or of another size.
    """

    def __init__(self, folder: str | PathLike):
        self.folder = Path(folder)
        self.manifest = self._read_manifest()
        for path, shard in self._shards():
            expected = shard["tokens"] * _DTYPE.itemsize
            if not path.is_file():
                raise CorpusError(f"the shard {path} is missing ({expected} bytes expected); write the corpus again")
            if (size := path.stat().st_size) != expected:
                raise CorpusError(f"the shard {path} has {size} bytes, {expected} expected; write the corpus again")

    def _read_manifest(self) -> dict:
        path = self.folder / "manifest.json"
        try:
            manifest = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            raise CorpusError(f"there is no corpus in {self.folder}: {path.name} is missing") from error
        except ValueError as error:
            raise CorpusError(f"{path} is not JSON ({error}); write the corpus again") from error
        if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
            raise CorpusError(f"{path} is not a manifest of format {FORMAT}; write the corpus again")
        _check_keys(path, manifest, _MANIFEST_KEYS)
        _check_keys(path, manifest["splits"], set(SPLITS))
        for split in SPLITS:
            for shard in manifest["splits"][split]:
                _check_keys(path, shard, _SHARD_KEYS)
        return manifest

    def _shards(self, *splits: str) -> Iterator[tuple[Path, dict]]:
        """The path and the manifest's entry of each shard of some splits, of all if none is named."""
        for split in splits or SPLITS:
            if split not in SPLITS:
                raise CorpusError(f"there is no split `{split}`; {nearest(split, SPLITS)}")
            for shard in self.manifest["splits"][split]:
                yield self.folder / shard["file"], shard

    def verify(self) -> None:
        """Read every shard and compare its sha256; CorpusError names the first one that has changed."""
        for path, shard in self._shards():
            with path.open("rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != shard["sha256"]:
                    raise CorpusError(f"the shard {path} has changed: its sha256 is not the manifest's; write it again")

    @functools.cached_property
    def hash(self) -> str:
        """The sha256 of what a model sees, vocabulary and tokens; where the text came from is not in it."""
        shards = {split: [shard["sha256"] for _, shard in self._shards(split)] for split in SPLITS}
        seen = {"format": FORMAT, "tokenizer": self.manifest["tokenizer"]["hash"], "shards": shards}
        return hashlib.sha256(json.dumps(seen, sort_keys=True).encode()).hexdigest()

    @functools.cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer that the shards were written with."""
        folder = self.folder / "tokenizer"
        tokenizer = Tokenizer.from_files(folder / "vocab.bpe", folder / "encoder.json")
        if tokenizer.hash != self.manifest["tokenizer"]["hash"]:
            raise CorpusError(
                f"{folder} is not the tokenizer that its shards were written with; write the corpus again"
            )
        return tokenizer

    def check_tokenizer(self, expected: str, who: str) -> None:
        """CorpusError unless `expected`, the hash of the tokenizer that `who` was trained with, is this corpus's."""
        if expected != self.manifest["tokenizer"]["hash"]:
            raise CorpusError(
                f"{who} was trained with another tokenizer than that of {self.folder}; "
                "give the corpus that it was trained on"
            )

    @property
    def n_vocab(self) -> int:
        """Entries of the tokenizer's vocabulary."""
        return self.manifest["tokenizer"]["n_vocab"]

    def tokens(self, split: str = "train") -> Tokens:
        """All tokens of a split, mapped from disk."""
        shards = [*self._shards(split)]
        return Tokens([path for path, _ in shards], [shard["tokens"] for _, shard in shards])

    def n_tokens(self, split: str = "train") -> int:
        """Tokens of a split, one end of text for each document included."""
        return sum(shard["tokens"] for _, shard in self._shards(split))

    def n_bytes(self, split: str = "train") -> int:
        """UTF-8 bytes of the text of a split."""
        return sum(shard["bytes"] for _, shard in self._shards(split))

    def n_documents(self, split: str = "train") -> int:
        """Documents of a split."""
        return sum(shard["documents"] for _, shard in self._shards(split))


def _n_windows(corpus: Corpus, split: str, n_ctx: int) -> int:
    """Windows of n_ctx labels in a split: the first token is a label of none, what is left over at the end neither."""
    n_tokens = corpus.n_tokens(split)
    if n_tokens < n_ctx + 1:
        raise CorpusError(
            f"the {split} split of {corpus.folder} has {n_tokens} tokens, "
            f"too few for one window of n_ctx + 1 = {n_ctx + 1}"
        )
    return (n_tokens - 1) // n_ctx


def _window(tokens: Tokens, index: int, n_ctx: int) -> np.ndarray:
    """The tokens [T + 1] of a window; its last one is the first input of the next window."""
    return tokens[index * n_ctx : (index + 1) * n_ctx + 1]


def _import_grain():
    """grain imports jax where that is installed, so only those who train wait for it; where not, it need not say so."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        import grain
    finally:
        logger.setLevel(level)
    return grain


class Batches:
    """`batches[step]` -> int32 [B / n_hosts, T + 1]: inputs are `[:, :-1]`, labels `[:, 1:]`.

    A pure function of the corpus, the seed, the batch size B over all hosts, and the step. A split is cut into windows
    of T + 1 tokens, T = n_ctx apart, so a token is a label once. Each epoch has every window once, in a new order over
    the whole split; epochs flow on, so step s takes windows s*B ... s*B + B - 1 of an endless sequence, and host h the
    h-th part of them. Steps are asked for, not counted: there is no state to save, and no step costs more than another.
    """

    def __init__(
        self,
        corpus: Corpus,
        split: str = "train",
        *,
        batch_size: int,
        n_ctx: int,
        seed: int = 0,
        host: int = 0,
        n_hosts: int = 1,
    ):
        """Raises CorpusError if the split has fewer windows than a batch, or the hosts cannot share a batch evenly."""
        grain = _import_grain()
        self._n_windows = _n_windows(corpus, split, n_ctx)
        if self._n_windows < batch_size:
            raise CorpusError(
                f"the {split} split of {corpus.folder} has {self._n_windows} windows of {n_ctx} tokens, "
                f"fewer than one batch of {batch_size}: make the batch smaller or the corpus larger"
            )
        if batch_size % n_hosts or not 0 <= host < n_hosts:
            raise CorpusError(f"host {host} of {n_hosts} cannot take an equal part of a batch of {batch_size}")
        self.batch_size, self.n_ctx = batch_size, n_ctx
        self._tokens = corpus.tokens(split)
        self._part = range(batch_size)[host * batch_size // n_hosts : (host + 1) * batch_size // n_hosts]
        # `seed` mixes the seed; `shuffle(seed=...)` would give seed 1 the order that seed 0 has in its second epoch.
        self._order = grain.MapDataset.range(self._n_windows).seed(seed).shuffle().repeat()

    def __len__(self) -> int:
        """Whole batches in an epoch; steps go on beyond it."""
        return self._n_windows // self.batch_size

    def __getitem__(self, step: int) -> np.ndarray:
        if step < 0:
            raise IndexError(f"steps count from 0, got {step}")
        windows = (self._order[step * self.batch_size + i] for i in self._part)
        return np.stack([_window(self._tokens, window, self.n_ctx) for window in windows])


def validation_windows(corpus: Corpus, n_ctx: int, count: int | None = None) -> np.ndarray:
    """Windows of the validation split, evenly spread over it and always the same: int32 [W, T + 1].

    W is `count`, or all windows if there are fewer or `count` is None.
    """
    n_windows = _n_windows(corpus, "validation", n_ctx)
    count = n_windows if count is None else min(count, n_windows)
    tokens = corpus.tokens("validation")
    return np.stack([_window(tokens, i * n_windows // count, n_ctx) for i in range(count)])
