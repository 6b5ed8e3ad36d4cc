"""A folder of `.txt`, `.jsonl`, `.jsonl.gz`, `.parquet`, `.bin` and `.tfrecords` files as a corpus."""

import gzip
import hashlib
import json
import re
from collections.abc import Iterator
from os import PathLike
from pathlib import Path

from gpt2lib.config import nearest
from gpt2lib.corpus import tokenized
from gpt2lib.data import CorpusError


def text_files(folder: str | PathLike) -> list[Path]:
    """The files that a corpus is made from, sorted, at any depth; a single file may be given as well.

    CorpusError if there is no such folder or nothing in it to read.
    """
    folder = Path(folder)
    if not folder.exists():
        raise CorpusError(f"the folder of text {folder} does not exist")
    candidates = [folder] if folder.is_file() else sorted(folder.rglob("*"))
    files = [path for path in candidates if path.name.endswith(tuple(_READERS)) and path.is_file()]
    if not files:
        raise CorpusError(f"there is no text in {folder}: no file ends with {', '.join(_READERS)}")
    return files


def describe(folder: str | PathLike) -> list[dict]:
    """Name, size in bytes and sha256 of each file: equal exactly if the text is."""
    files = text_files(folder)
    parent = Path(folder) if Path(folder).is_dir() else Path(folder).parent
    return [described(path, path.relative_to(parent).as_posix()) for path in files]


def described(path: Path, name: str) -> dict:
    """Name, size in bytes and sha256 of one file."""
    with path.open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    return {"file": name, "bytes": path.stat().st_size, "sha256": sha256}


def documents(folder: str | PathLike, text_field: str = "text") -> Iterator[str]:
    """The documents of all files, in order: a `.txt` file is one, a line of `.jsonl` or a row of `.parquet` is one.

    `.bin` and `.tfrecords` hold many, in GPT-2's ids (see `tokenized`). `text_field` is the key or column of the text,
    or the name of the ids in a TFRecord. CorpusError, with file and line, for what cannot be read.
    """
    for path in text_files(folder):
        suffix = next(suffix for suffix in _READERS if path.name.endswith(suffix))
        yield from _READERS[suffix](path, text_field)


def cut(text: str, n_bytes: int) -> Iterator[str]:
    """The text in parts of at most `n_bytes` of UTF-8 if its paragraphs allow that, cut at ends of paragraphs."""
    part, size = [], 0
    for paragraph in re.split(r"(?<=\n\n)(?=[^\n])", text):
        length = len(paragraph.encode("utf-8", errors="replace"))
        if part and size + length > n_bytes:
            yield "".join(part)
            part, size = [], 0
        part.append(paragraph)
        size += length
    yield "".join(part)


def _read_txt(path: Path, text_field: str) -> Iterator[str]:
    try:
        yield path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise CorpusError(f"{path} is not UTF-8: {error}") from error


def _read_jsonl(path: Path, text_field: str) -> Iterator[str]:
    number = 0
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    yield _text(json.loads(line), text_field, f"{path}, line {number}")
    except json.JSONDecodeError as error:
        raise CorpusError(f"{path}, line {number}: this is not JSON ({error})") from error
    except UnicodeDecodeError as error:
        raise CorpusError(f"{path}, after line {number}: this is not UTF-8 ({error})") from error
    except (EOFError, gzip.BadGzipFile, gzip.zlib.error) as error:
        raise CorpusError(f"{path}, after line {number}: the gzip file is broken ({error})") from error


def _read_parquet(path: Path, text_field: str) -> Iterator[str]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            columns = file.schema_arrow.names
            if text_field not in columns:
                raise CorpusError(f"{path} has no column `{text_field}`; {nearest(text_field, columns)}")
            row = 0
            for batch in file.iter_batches(columns=[text_field]):
                for row, text in enumerate(batch.column(0).to_pylist(), row + 1):  # noqa: B020
                    yield _text({text_field: text}, text_field, f"{path}, row {row}")
    except pyarrow.ArrowException as error:
        raise CorpusError(f"{path} is not a Parquet file that can be read: {error}") from error


def _text(record: object, text_field: str, where: str) -> str:
    """The text of one record; CorpusError, naming the place, if it has none."""
    if not isinstance(record, dict):
        raise CorpusError(f"{where}: a record must be an object with the field `{text_field}`, not {record!r:.60}")
    if text_field not in record:
        raise CorpusError(f"{where}: there is no field `{text_field}`; {nearest(text_field, record)}")
    if not isinstance(record[text_field], str):
        raise CorpusError(f"{where}: the field `{text_field}` is not text but {record[text_field]!r:.60}")
    return record[text_field]


_READERS = {
    ".txt": _read_txt,
    ".jsonl": _read_jsonl,
    ".jsonl.gz": _read_jsonl,
    ".parquet": _read_parquet,
    ".bin": lambda path, _: tokenized.read_bin(path),
    ".tfrecords": tokenized.read_tfrecords,
}
