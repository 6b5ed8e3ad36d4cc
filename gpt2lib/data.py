"""Token shards, on disk or far away, and batches from them that depend on nothing but what they are asked for.

A corpus is a folder: `manifest.json`, `tokenizer/`, and shards `train-00000.bin`, `validation-00000.bin`, ... of uint16
token ids, little endian, each document followed by `<|endoftext|>`. A hash of a document's text decides its split, so
train and validation cannot mix.
"""

import contextlib
import functools
import hashlib
import json
import logging
import mmap
import os
import secrets
import shutil
import tempfile
import time
from bisect import bisect_left, bisect_right
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import accumulate, tee
from os import PathLike
from pathlib import Path

import numpy as np
from tqdm import tqdm

from gpt2lib.config import nearest
from gpt2lib.tokenizer import Tokenizer, TokenizerError

FORMAT = 1
SPLITS = ("train", "validation")
SHARD_TOKENS = 2**25  # 64 MiB
VALIDATION_FRACTION = 0.05  # of the documents
_DTYPE = np.dtype("<u2")
_ADVISE = hasattr(mmap, "MADV_RANDOM") and hasattr(mmap, "MADV_WILLNEED")  # not on Windows
_SCAN_TOKENS = 2**22  # held in memory when a shard is read through
_BACK_OFF = (1, 2, 4, 8)  # seconds before each new attempt at a remote read
_FINAL = (FileNotFoundError, PermissionError, NotADirectoryError, NotImplementedError)  # another attempt is no use
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

    def add(self, ids: np.ndarray, n_bytes: int) -> None:
        """Append one document, its end of text included; the shard before it ends where it would grow too long."""
        if self._documents and len(self._ids) // _DTYPE.itemsize + len(ids) > self.shard_tokens:
            self.flush()
        self._ids += ids.astype(_DTYPE).tobytes()
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
        kept, same = tee(split_documents(documents, validation_fraction, left_out))
        encoded = zip(kept, tokenizer.encode_each(text for _, text, _ in same), strict=True)
        bar = tqdm(encoded, desc=f"{name}: tokenizing", unit=" documents", disable=not progress)
        for (split, _, n_bytes), ids in bar:
            with _disk_errors(folder):
                writers[split].add(np.append(ids, tokenizer.end_of_text), n_bytes)
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


class _Disk:
    """The files of a corpus folder on disk; shards are mapped into memory."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._maps = {}

    def path(self, name: str) -> Path:
        return self.folder / name

    def read(self, name: str) -> bytes:
        """A small file as a whole."""
        return self.path(name).read_bytes()

    def sizes(self, names: list[str]) -> dict[str, int]:
        """The bytes of each of these files that is there."""
        return {name: self.path(name).stat().st_size for name in names if self.path(name).is_file()}

    def open(self, names: list[str]) -> None:
        """Map shards, so that a corpus that is replaced later does not change under its reader."""
        for name in names:
            if name in self._maps:
                continue
            try:
                with self.path(name).open("rb") as file:
                    shard = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            except OSError as error:
                raise CorpusError(f"cannot read {self.path(name)}: {error.strerror or error}") from error
            if _ADVISE:  # else a window may bring megabytes around it into memory
                shard.madvise(mmap.MADV_RANDOM)
            self._maps[name] = shard, np.frombuffer(shard, _DTYPE)

    def ranges(self, pieces: list[tuple[str, int, int]]) -> list[np.ndarray]:
        """The tokens [start, stop) of opened shards, for each (name, start, stop)."""
        if _ADVISE:  # the disk fetches all at once, and not each when its turn comes
            for name, start, stop in pieces:
                page = start * _DTYPE.itemsize // mmap.PAGESIZE * mmap.PAGESIZE
                self._maps[name][0].madvise(mmap.MADV_WILLNEED, page, stop * _DTYPE.itemsize - page)
        return [self._maps[name][1][start:stop] for name, start, stop in pieces]

    def sha256(self, name: str, n_tokens: int) -> str:
        with self.path(name).open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    @contextlib.contextmanager
    def copies(self, folder: str, names: tuple[str, ...]) -> Iterator[Path]:
        """A folder on disk with the files of `folder`: here itself."""
        yield self.path(folder)


class _Remote:
    """The files of a corpus at an address that fsspec knows; the same methods as `_Disk`.

    A read that fails is tried again after each pause of `_BACK_OFF`, and then is a CorpusError with the address.
    """

    def __init__(self, address: str, fs, root: str):
        self.folder = address.rstrip("/")
        self._fs, self._root = fs, root.rstrip("/")

    def path(self, name: str) -> str:
        return f"{self.folder}/{name}"

    def _persist(self, path: str, attempt: Callable):
        """What `attempt()` returns, once it does."""
        for pause in (*_BACK_OFF, None):
            try:
                return attempt()
            except FileNotFoundError:
                raise
            except Exception as error:  # every file system has errors of its own
                if pause is None or isinstance(error, _FINAL) or isinstance(error.__cause__, _FINAL):
                    raise CorpusError(f"cannot read {path}: {_reason(error)}") from error
                time.sleep(pause)

    def read(self, name: str) -> bytes:
        return self._persist(self.path(name), lambda: self._fs.cat_file(f"{self._root}/{name}"))

    def sizes(self, names: list[str]) -> dict[str, int | None]:
        """As that of `_Disk`; None where the server does not say."""
        try:  # one call, where files can be listed
            self._fs.invalidate_cache()
            listed = {info["name"].rsplit("/", 1)[-1]: info["size"] for info in self._fs.ls(self._root, detail=True)}
        except Exception:  # a bucket may let its files be read and not be listed
            listed = {}
        if any(size is not None for size in listed.values()):
            return listed
        paths = [f"{self._root}/{name}" for name in names]
        try:
            sizes = self._persist(self.folder, lambda: self._fs.sizes(paths))
        except FileNotFoundError:  # fsspec says so of everything that goes wrong with http://
            return self._up_to_a_missing_one(names)
        return dict(zip(names, sizes, strict=True))

    def _up_to_a_missing_one(self, names: list[str]) -> dict[str, None]:
        """The files before the first one that is not there, all if each is there: the first byte of each is read."""
        there = {}
        for name in names:
            try:
                self._persist(self.path(name), lambda path=f"{self._root}/{name}": self._fs.cat_file(path, 0, 1))
            except FileNotFoundError:
                break
            there[name] = None
        return there

    def open(self, names: list[str]) -> None:
        """Nothing to do: only what is asked for is fetched."""

    def ranges(self, pieces: list[tuple[str, int, int]]) -> list[np.ndarray]:
        """As that of `_Disk`, all in one call; only what failed is fetched again."""
        parts = {}

        def fetch():
            missing = [piece for piece in dict.fromkeys(pieces) if piece not in parts]
            contents = self._fs.cat_ranges(
                [f"{self._root}/{name}" for name, _, _ in missing],
                [start * _DTYPE.itemsize for _, start, _ in missing],
                [stop * _DTYPE.itemsize for _, _, stop in missing],
                on_error="return",
            )
            failed = None
            for (name, start, stop), content in zip(missing, contents, strict=True):
                expected = (stop - start) * _DTYPE.itemsize
                if isinstance(content, Exception):
                    failed = OSError(f"{name}: {_reason(content)}")
                    failed.__cause__ = content
                elif len(content) != expected:  # cut off, or from a server that does not know ranges
                    failed = OSError(f"{name}: {len(content)} bytes came where {expected} were asked for")
                else:
                    parts[name, start, stop] = np.frombuffer(content, _DTYPE)
            if failed:
                raise failed

        self._persist(self.folder, fetch)
        return [parts[piece] for piece in pieces]

    def sha256(self, name: str, n_tokens: int) -> str:
        digest = hashlib.sha256()
        for start in range(0, n_tokens, _SCAN_TOKENS):
            (part,) = self.ranges([(name, start, min(start + _SCAN_TOKENS, n_tokens))])
            digest.update(part)
        return digest.hexdigest()

    @contextlib.contextmanager
    def copies(self, folder: str, names: tuple[str, ...]) -> Iterator[Path]:
        """A folder on disk with the files of `folder`: copies, which go away at the end."""
        with tempfile.TemporaryDirectory() as temporary:
            for name in names:
                try:
                    (Path(temporary) / name).write_bytes(self.read(f"{folder}/{name}"))
                except FileNotFoundError as error:
                    raise CorpusError(f"{self.path(folder)}/{name} is missing; write the corpus again") from error
            try:
                yield Path(temporary)
            except TokenizerError as error:  # it names the copy
                raise TokenizerError(str(error).replace(temporary, self.path(folder))) from error


def _reason(error: Exception) -> str:
    """An error of a file system in one line."""
    kind = "" if type(error) is OSError else f"{type(error).__name__}: "
    return f"{kind}{' '.join(str(error).split())}".rstrip(": ")


def _files(folder: str | PathLike) -> _Disk | _Remote:
    """The files of a corpus; CorpusError where an address needs a package that is not there, or cannot be reached."""
    address = os.fspath(folder)
    if "://" not in address:
        return _Disk(Path(folder))
    from fsspec.core import url_to_fs
    from fsspec.implementations.local import LocalFileSystem

    try:
        fs, root = url_to_fs(address)
    except ImportError as error:
        package = getattr(error.__cause__, "name", None)
        advice = f"run `pip install {package}`" if package else _reason(error)
        raise CorpusError(f"reading {address} needs a package that is not installed: {advice}") from error
    except Exception as error:
        raise CorpusError(f"cannot read {address}: {_reason(error)}") from error
    return _Disk(Path(root)) if isinstance(fs, LocalFileSystem) else _Remote(address, fs, root)


class Tokens:
    """The tokens of one split, its shards one after another; `tokens[a:b]` reads them as int32 [b - a]."""

    def __init__(self, files: _Disk | _Remote, names: list[str], lengths: list[int]):
        self._files, self._names = files, names
        self._starts = [0, *accumulate(lengths)]
        files.open(names)

    def __len__(self) -> int:
        return self._starts[-1]

    def __getitem__(self, window: slice) -> np.ndarray:
        start, stop, step = window.indices(len(self))
        if step != 1:
            raise ValueError(f"tokens are read in steps of 1, not {step}")
        return self.windows([start], stop - start)[0] if start < stop else np.empty(0, np.int32)

    def windows(self, starts: Sequence[int], length: int) -> np.ndarray:
        """tokens[start : start + length] for each of `starts`, int32 [W, length]; all that is far away in one call."""
        pieces = []
        for start in starts:
            stop = start + length
            shard = bisect_right(self._starts, start) - 1
            while start < stop:
                begin, end = self._starts[shard], min(stop, self._starts[shard + 1])
                pieces.append((self._names[shard], start - begin, end - begin))
                start, shard = end, shard + 1
        return np.concatenate(self._files.ranges(pieces), dtype=np.int32).reshape(len(starts), length)


def _check_keys(path: Path | str, value: dict, keys: set[str]) -> None:
    """CorpusError if a part of the manifest at `path` has other keys than these."""
    wrong = keys ^ set(value)
    if wrong:
        raise CorpusError(f"{path} lacks or does not know {', '.join(sorted(wrong))}; write the corpus again")


class Corpus:
    """A folder of token shards, opened for reading: on disk, or at any address that fsspec knows (`gs://bucket/corpus`).

    Opening reads the manifest and looks at the sizes of all shards; `verify` reads them through. From an address only
    what is asked for is fetched. `folder` is a Path, or the address. CorpusError if the manifest is not one of ours, a
    shard is missing or of another size, or an address cannot be read.
    """

    def __init__(self, folder: str | PathLike):
        self._files = _files(folder)
        self.folder = self._files.folder
        self.manifest = self._read_manifest()
        shards = [*self._shards()]
        sizes = self._files.sizes([shard["file"] for _, shard in shards])
        for path, shard in shards:
            expected = shard["tokens"] * _DTYPE.itemsize
            if shard["file"] not in sizes:
                raise CorpusError(f"the shard {path} is missing ({expected} bytes expected); write the corpus again")
            if (size := sizes[shard["file"]]) not in (expected, None):
                raise CorpusError(f"the shard {path} has {size} bytes, {expected} expected; write the corpus again")

    def _read_manifest(self) -> dict:
        path = self._files.path("manifest.json")
        try:
            content = self._files.read("manifest.json")
        except FileNotFoundError as error:
            raise CorpusError(f"there is no corpus in {self.folder}: manifest.json is missing") from error
        try:
            manifest = json.loads(content)
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

    def _shards(self, *splits: str) -> Iterator[tuple[Path | str, dict]]:
        """The path and the manifest's entry of each shard of some splits, of all if none is named."""
        for split in splits or SPLITS:
            if split not in SPLITS:
                raise CorpusError(f"there is no split `{split}`; {nearest(split, SPLITS)}")
            for shard in self.manifest["splits"][split]:
                yield self._files.path(shard["file"]), shard

    def verify(self) -> None:
        """Read every shard and compare its sha256; CorpusError names the first one that has changed."""
        for path, shard in self._shards():
            if self._files.sha256(shard["file"], shard["tokens"]) != shard["sha256"]:
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
        names = ("vocab.bpe", "encoder.json")
        with self._files.copies("tokenizer", names) as folder:
            tokenizer = Tokenizer.from_files(*(folder / name for name in names))
        if tokenizer.hash != self.manifest["tokenizer"]["hash"]:
            raise CorpusError(
                f"{self._files.path('tokenizer')} is not the tokenizer that its shards were written with; "
                "write the corpus again"
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
        """All tokens of a split, to be read where they are needed."""
        shards = [shard for _, shard in self._shards(split)]
        return Tokens(self._files, [shard["file"] for shard in shards], [shard["tokens"] for shard in shards])

    def n_tokens(self, split: str = "train") -> int:
        """Tokens of a split, one end of text for each document included."""
        return sum(shard["tokens"] for _, shard in self._shards(split))

    def n_bytes(self, split: str = "train") -> int:
        """UTF-8 bytes of the text of a split."""
        return sum(shard["bytes"] for _, shard in self._shards(split))

    def n_documents(self, split: str = "train") -> int:
        """Documents of a split."""
        return sum(shard["documents"] for _, shard in self._shards(split))

    def _documents_at(self, positions: Sequence[int], split: str = "train") -> list[int]:
        """Which document of a split, counted from 0, each of these positions among its tokens belongs to.

        An end of text belongs to the document before it. Shards with a position are read up to their last one.
        """
        tokens, end_of_text = self.tokens(split), self.tokenizer.end_of_text
        ordered, found, start, before = sorted(set(positions)), {}, 0, 0
        for _, shard in self._shards(split):
            stop, at, document = start + shard["tokens"], start, before
            for position in ordered[bisect_left(ordered, start) : bisect_left(ordered, stop)]:
                for begin in range(at, position, _SCAN_TOKENS):
                    part = tokens[begin : min(begin + _SCAN_TOKENS, position)]
                    document += int(np.count_nonzero(part == end_of_text))
                found[position], at = document, position
            start, before = stop, before + shard["documents"]
        return [found[position] for position in positions]


def _n_windows(corpus: Corpus, split: str, n_ctx: int) -> int:
    """Windows of n_ctx labels in a split: the first token is a label of none, what is left over at the end neither."""
    n_tokens = corpus.n_tokens(split)
    if n_tokens < n_ctx + 1:
        raise CorpusError(
            f"the {split} split of {corpus.folder} has {n_tokens} tokens, "
            f"too few for one window of n_ctx + 1 = {n_ctx + 1}"
        )
    return (n_tokens - 1) // n_ctx


def _windows(tokens: Tokens, numbers: Iterable[int], n_ctx: int) -> np.ndarray:
    """The tokens [W, T + 1] of some windows; the last one of each is the first input of the next window."""
    return tokens.windows([number * n_ctx for number in numbers], n_ctx + 1)


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
        self.corpus, self._split, self._tokens = corpus, split, corpus.tokens(split)
        self._part = range(batch_size)[host * batch_size // n_hosts : (host + 1) * batch_size // n_hosts]
        # `seed` mixes the seed; `shuffle(seed=...)` would give seed 1 the order that seed 0 has in its second epoch.
        self._order = grain.MapDataset.range(self._n_windows).seed(seed).shuffle().repeat()

    def __len__(self) -> int:
        """Whole batches in an epoch; steps go on beyond it."""
        return self._n_windows // self.batch_size

    def __getitem__(self, step: int) -> np.ndarray:
        return _windows(self._tokens, self.windows(step), self.n_ctx)

    def windows(self, step: int) -> list[int]:
        """The number of each row's window: window i begins at token i * n_ctx of the split."""
        if step < 0:
            raise IndexError(f"steps count from 0, got {step}")
        return [self._order[step * self.batch_size + i] for i in self._part]

    def documents(self, step: int) -> list[list[int]]:
        """For each row, the documents that its T + 1 tokens are of, by their number in the split, from 0.

        Counted when asked for, by reading the shards of the batch up to its windows.
        """
        starts = [window * self.n_ctx for window in self.windows(step)]
        ends = [start + self.n_ctx for start in starts]
        at = self.corpus._documents_at([*starts, *ends], self._split)
        return [[*range(first, last + 1)] for first, last in zip(at[: len(starts)], at[len(starts) :], strict=True)]


def prefetch(batches: Batches, start: int, stop: int, ahead: int = 2) -> Iterator[np.ndarray]:
    """batches[start], ..., batches[stop - 1]; a thread reads up to `ahead` of them before they are asked for.

    What a read raises is raised where its batch is due. When the generator is closed, or ends, its thread has ended.
    """
    reader, read = ThreadPoolExecutor(1, thread_name_prefix="prefetch"), deque()
    try:
        for step in range(start, stop):
            read.append(reader.submit(batches.__getitem__, step))
            if len(read) > ahead:
                yield read.popleft().result()
        while read:
            yield read.popleft().result()
    finally:
        reader.shutdown(cancel_futures=True)


def validation_windows(corpus: Corpus, n_ctx: int, count: int | None = None) -> np.ndarray:
    """Windows of the validation split, evenly spread over it and always the same: int32 [W, T + 1].

    W is `count`, or all windows if there are fewer or `count` is None.
    """
    n_windows = _n_windows(corpus, "validation", n_ctx)
    count = n_windows if count is None else min(count, n_windows)
    tokens = corpus.tokens("validation")
    if count == n_windows:  # read once through, and not in a thousand requests
        every = tokens[: n_windows * n_ctx + 1]
        return np.lib.stride_tricks.sliding_window_view(every, n_ctx + 1)[::n_ctx].copy()
    return _windows(tokens, [i * n_windows // count for i in range(count)], n_ctx)
