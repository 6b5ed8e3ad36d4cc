"""From text to a corpus of token shards: the docstrings of installed packages, or a folder of files."""

import itertools
from collections.abc import Collection
from os import PathLike
from pathlib import Path

from tqdm import tqdm

from gpt2lib.corpus import docstrings, files
from gpt2lib.data import VALIDATION_FRACTION, Corpus, CorpusError, check_replaceable, split_documents, write_corpus
from gpt2lib.tokenizer import Tokenizer


def build(
    folder: str | PathLike,
    source: str | PathLike = "docstrings",
    n_vocab: int = 8192,
    tokenizer: Tokenizer | None = None,
    text_field: str = "text",
    validation_fraction: float = VALIDATION_FRACTION,
    progress: bool = True,
    packages: Collection[str] | None = None,
    cut_bytes: int | None = None,
) -> dict:
    """Write a corpus to `folder` and return its manifest; one that is there and made from the same is kept.

    `source` is "docstrings" (of `packages`, or of all that are installed) or a folder of text, JSON lines and Parquet
    files, whose records hold their text in `text_field`. Its BPE of `n_vocab` entries is learned from the train split,
    unless a `tokenizer` is given. With `cut_bytes` a longer document is cut into several at ends of paragraphs, so that
    a book can be split. CorpusError or TokenizerError if that cannot be done; the old corpus stays then.
    """
    folder = Path(folder)
    check_replaceable(folder.resolve())
    if source == "docstrings":
        name = "docstrings"
        made = {"kind": "docstrings", "packages": docstrings.installed(packages)}
    else:
        name = Path(source).resolve().stem
        made = {"kind": "files", "files": files.describe(source), "text_field": text_field}
    if cut_bytes is not None:
        made["cut_bytes"] = cut_bytes
    made["tokenizer"] = f"BPE of {n_vocab} learned from train" if tokenizer is None else f"given: {tokenizer.hash}"
    manifest = _kept(folder, name, made, validation_fraction)
    if manifest is not None:
        return manifest

    # Parsing all packages takes longer than everything after it, and their docstrings fit into memory; files may not.
    collected = None
    if source == "docstrings":
        texts = docstrings.docstrings(packages)
        collected = list(tqdm(texts, desc="docstrings: parsing packages", unit=" documents", disable=not progress))

    def documents():
        whole = files.documents(source, text_field) if collected is None else iter(collected)
        return whole if cut_bytes is None else (part for text in whole for part in files.cut(text, cut_bytes))

    if tokenizer is None:
        kept = split_documents(documents(), validation_fraction)
        train = (text for split, text, _ in kept if split == "train")
        first = next(train, None)
        if first is None:
            raise CorpusError(f"the corpus {name} is empty: there is no train document with text in its source")
        tokenizer = Tokenizer.train(itertools.chain([first], train), n_vocab)
    return write_corpus(
        folder,
        documents(),
        tokenizer,
        name=name,
        source=made,
        validation_fraction=validation_fraction,
        progress=progress,
    )


def _kept(folder: Path, name: str, source: dict, validation_fraction: float) -> dict | None:
    """The manifest of the corpus in `folder` if it is whole and made from the same arguments."""
    try:
        manifest = Corpus(folder).manifest
    except CorpusError:
        return None
    asked = (name, source, validation_fraction)
    return manifest if asked == (manifest["name"], manifest["source"], manifest["validation_fraction"]) else None
