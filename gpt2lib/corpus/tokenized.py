"""Files of GPT-2's token ids that others have made: nanoGPT's and llm.c's `.bin`, ConnorJL's TFRecords."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from gpt2lib.data import CorpusError
from gpt2lib.tokenizer import Tokenizer

_LLMC, _HEADER = 20240520, 256  # llm.c's magic number, and how many int32 its header has
_CHUNK = 1 << 20


def read_bin(path: Path) -> Iterator[str]:
    """The documents of a `.bin` file: ids as uint16, an end of text after (nanoGPT) or before (llm.c) each document.

    llm.c's has a header of 256 int32: 20240520, version 1, number of tokens. CorpusError for another version, for ids
    that GPT-2 does not have, and for a file that is cut off.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        header = np.frombuffer(file.read(4 * _HEADER), "<i4") if size >= 4 * _HEADER else np.zeros(3, "<i4")
    if header[0] == _LLMC:
        start, count = 4 * _HEADER, int(header[2])
        if header[1] != 1:
            raise CorpusError(
                f"{path} is version {header[1]} of llm.c's files, which is not of GPT-2's ids; 1 would be"
            )
    else:
        start, count = 0, size // 2
    if start + 2 * count != size:
        raise CorpusError(f"{path} has {size} bytes where {start + 2 * count} are due; it is cut off: get it again")
    yield from _documents(np.memmap(path, "<u2", "r", start, (count,)) if count else np.zeros(0, "<u2"), path)


def _documents(ids, where) -> Iterator[str]:
    """Texts of what lies between ends of text."""
    tokenizer = Tokenizer.gpt2()
    rest = np.zeros(0, "<u2")
    for at in range(0, len(ids), _CHUNK):
        part = np.concatenate([rest, ids[at : at + _CHUNK]])
        if part.max(initial=0) >= tokenizer.n_vocab:
            raise CorpusError(f"{where} has the id {part.max()}, which GPT-2 does not: it is of another vocabulary")
        *whole, rest = np.split(part, np.flatnonzero(part == tokenizer.end_of_text))
        for document in whole:
            yield from _text(tokenizer, document)
    yield from _text(tokenizer, rest)


def _text(tokenizer, ids) -> Iterator[str]:
    ids = ids[1:] if len(ids) and ids[0] == tokenizer.end_of_text else ids
    if len(ids):
        yield tokenizer.decode(ids.tolist())


def read_tfrecords(path: Path, feature: str = "text") -> Iterator[str]:
    """The documents of a TFRecord file of `tf.train.Example`s that have GPT-2's ids as the int64 list `feature`.

    Framing and checksums are those of TensorFlow's `tfrecord` format, messages those of its `example.proto`.
    CorpusError for a file that is cut off or damaged, a record without the feature, and ids that GPT-2 does not have.
    """
    tokenizer = Tokenizer.gpt2()
    for number, record in enumerate(_records(path), 1):
        try:
            ids = _feature(record, feature)
        except (IndexError, ValueError) as error:
            raise CorpusError(f"{path}, record {number}: it is not a tf.train.Example ({error})") from error
        if ids is None:
            raise CorpusError(f"{path}, record {number}: there are no whole numbers `{feature}` in it")
        if len(ids) and not 0 <= ids.min() <= ids.max() < tokenizer.n_vocab:
            raise CorpusError(f"{path}, record {number}: an id is not GPT-2's; it is of another vocabulary")
        ids = ids[ids != tokenizer.end_of_text]
        if len(ids):
            yield tokenizer.decode(ids.tolist())


def _records(path) -> Iterator[bytes]:
    """The messages of a TFRecord file: length, its checksum, message, its checksum."""
    from gpt2lib.checkpoint import masked_crc

    with path.open("rb") as file:
        number = 0
        while head := file.read(12):
            number += 1
            length = int.from_bytes(head[:8], "little")
            if len(head) < 12 or masked_crc(head[:8]) != int.from_bytes(head[8:], "little"):
                raise CorpusError(f"{path}, record {number}: it is damaged or cut off; get the file again")
            record, check = file.read(length), file.read(4)
            if len(record) < length or len(check) < 4 or masked_crc(record) != int.from_bytes(check, "little"):
                raise CorpusError(f"{path}, record {number}: it is damaged or cut off; get the file again")
            yield record


def _feature(record: bytes, name: str):
    """The int64 list of a feature of a tf.train.Example; None if it is not there or of another kind."""
    for features in _fields(record, 1):
        for entry in _fields(features, 1):
            if name.encode() in _fields(entry, 1):
                lists = [numbers for feature in _fields(entry, 2) for numbers in _fields(feature, 3)]
                if lists:
                    found = [varints(packed) for numbers in lists for packed in _fields(numbers, 1)]
                    return np.concatenate([np.zeros(0, np.int64), *found])
    return None


def _fields(message: bytes, number: int) -> list[bytes]:
    """The length-delimited fields of that number in a protocol buffer; a whole number comes as its varint."""
    found, at = [], 0

    def varint(at):
        value = shift = 0
        while message[at] & 0x80:
            value, shift, at = value | (message[at] & 0x7F) << shift, shift + 7, at + 1
        return value | message[at] << shift, at + 1

    while at < len(message):
        tag, at = varint(at)
        kind, begin = tag & 7, at
        if kind == 2:
            length, begin = varint(at)
            at = begin + length
        elif kind == 0:
            at = varint(at)[1]
        elif kind in (1, 5):
            at += 8 if kind == 1 else 4
        else:
            raise ValueError(f"it has a field of kind {kind}")
        if at > len(message):
            raise ValueError("a field is longer than the message")
        if tag >> 3 == number:
            found.append(message[begin:at])
    return found


def varints(data: bytes) -> np.ndarray:
    """Whole numbers that are packed as varints, seven bits a byte, the least first: -> int64."""
    data = np.frombuffer(data, np.uint8)
    last = np.flatnonzero(data < 0x80)
    if len(data) and (not len(last) or last[-1] != len(data) - 1):
        raise ValueError("its last number is cut off")
    first = np.concatenate([[0], last[:-1] + 1])
    place = np.arange(len(data)) - np.repeat(first, last - first + 1) if len(data) else np.zeros(0, int)
    if place.max(initial=0) > 9:
        raise ValueError("a number has more than 64 bits")
    parts = (data & 0x7F).astype(np.uint64) << (7 * place).astype(np.uint64)
    return np.add.reduceat(parts, first).astype(np.int64) if len(data) else np.zeros(0, np.int64)
