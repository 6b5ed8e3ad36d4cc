"""Shards and batches: against literal NumPy windows, and every way in which a corpus can be bad."""

import errno
import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from gpt2lib.data import Batches, Corpus, CorpusError, validation_windows, write_corpus
from gpt2lib.tokenizer import Tokenizer

BYTES = Tokenizer([])  # ids of bytes, in GPT-2's order, and end of text
# No window of the tests occurs twice, so its text tells which one it is.
DOCUMENTS = [f"Document {i}: {hashlib.sha256(bytes([i])).hexdigest()[: i % 50]}.\n" for i in range(83)]


def write(folder, documents=DOCUMENTS, **options):
    options = {"shard_tokens": 211, "validation_fraction": 0.3, "progress": False} | options
    return write_corpus(folder, documents, BYTES, name="test", source={"kind": "made up"}, **options)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "corpus"
    write(folder)
    return folder


@pytest.fixture
def copy(folder, tmp_path) -> Path:
    return shutil.copytree(folder, tmp_path / "corpus")


def literal(documents, split) -> np.ndarray:
    """The tokens of a split, written down from its definition: a document whose hash falls below 0.3 is validation."""
    ids = []
    for text in documents:
        validation = int(hashlib.sha256(text.encode()).hexdigest()[:16], 16) / 16**16 < 0.3
        if validation == (split == "validation"):
            ids += [*BYTES.encode(text), 256]
    return np.array(ids)


def content(folder) -> dict:
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("split", ["train", "validation"])
def test_tokens_are_the_documents(folder, split):
    corpus, expected = Corpus(folder), literal(DOCUMENTS, split)
    tokens = corpus.tokens(split)
    assert len(corpus.manifest["splits"][split]) > 2
    assert tokens[:].dtype == np.int32
    np.testing.assert_array_equal(tokens[:], expected)
    assert len(tokens) == corpus.n_tokens(split) == len(expected)
    assert corpus.n_documents(split) == (expected == 256).sum()
    assert corpus.n_bytes(split) == (expected != 256).sum()  # an id a byte
    for start, stop in ((0, 1), (200, 450), (5, 5), (len(expected) - 3, len(expected) + 9), (-4, None)):
        np.testing.assert_array_equal(tokens[start:stop], expected[start:stop])


def test_manifest_describes_the_files(folder):
    corpus = Corpus(folder)
    corpus.verify()
    assert corpus.n_vocab == 257
    assert corpus.tokenizer.hash == BYTES.hash
    assert corpus.manifest["source"] == {"kind": "made up"}
    for shards in corpus.manifest["splits"].values():
        for shard in shards:
            ids = np.fromfile(folder / shard["file"], "<u2")
            assert ids[-1] == 256  # whole documents only
            assert shard["tokens"] == len(ids) <= 211
            assert shard["documents"] == (ids == 256).sum()
            assert shard["sha256"] == hashlib.sha256((folder / shard["file"]).read_bytes()).hexdigest()


def test_duplicates_and_empty_documents_are_left_out(folder, tmp_path):
    manifest = write(tmp_path / "corpus", [*DOCUMENTS, "", " \n", *DOCUMENTS[:5]])
    assert manifest["left_out"] == {"duplicates": 5, "empty": 2}
    assert Corpus(tmp_path / "corpus").hash == Corpus(folder).hash


def test_hash_depends_on_the_tokens_only(folder, tmp_path):
    options = dict(shard_tokens=211, validation_fraction=0.3, progress=False)
    write_corpus(tmp_path / "a", DOCUMENTS, BYTES, name="other", source={}, **options)
    write(tmp_path / "b", DOCUMENTS[1:])
    assert Corpus(tmp_path / "a").hash == Corpus(folder).hash != Corpus(tmp_path / "b").hash


def test_a_document_longer_than_a_shard_is_one_shard(tmp_path):
    manifest = write(tmp_path / "corpus", [*DOCUMENTS, "x" * 1000])
    shards = manifest["splits"]["train"] + manifest["splits"]["validation"]
    assert [shard["documents"] for shard in shards if shard["tokens"] > 211] == [1]
    assert max(shard["tokens"] for shard in shards) == 1001


def test_a_lone_surrogate_is_no_character(tmp_path):
    write(tmp_path / "corpus", [*DOCUMENTS, "\ud800 alone"])
    corpus = Corpus(tmp_path / "corpus")
    assert corpus.n_documents("train") + corpus.n_documents("validation") == len(DOCUMENTS) + 1


# ---------------------------------------------------------------------------------------------------------- batches


def windows_of(batch, tokens, n_ctx) -> list[int]:
    """The number of each window of a batch, found by looking for it; and each must be a literal window."""
    literal_windows = {tuple(tokens[i : i + n_ctx + 1]): i // n_ctx for i in range(0, len(tokens) - n_ctx, n_ctx)}
    return [literal_windows[tuple(window)] for window in batch.tolist()]


def test_every_window_once_in_each_epoch_in_a_new_order(folder):
    corpus, n_ctx = Corpus(folder), 23
    tokens = literal(DOCUMENTS, "train").tolist()
    n_windows = (len(tokens) - 1) // n_ctx
    batches = Batches(corpus, batch_size=1, n_ctx=n_ctx, seed=5)
    assert len(batches) == n_windows
    epochs = [[windows_of(batches[e * n_windows + i], tokens, n_ctx)[0] for i in range(n_windows)] for e in range(3)]
    for epoch in epochs:
        assert sorted(epoch) == list(range(n_windows))
        assert epoch != sorted(epoch)
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]
    other = Batches(corpus, batch_size=1, n_ctx=n_ctx, seed=6)
    order = [windows_of(other[i], tokens, n_ctx)[0] for i in range(n_windows)]
    assert order not in epochs  # seeds are not shifted copies of each other


def test_epochs_flow_on_across_a_batch(folder):
    corpus, n_ctx, batch_size = Corpus(folder), 23, 6
    single = Batches(corpus, batch_size=1, n_ctx=n_ctx, seed=5)
    batches = Batches(corpus, batch_size=batch_size, n_ctx=n_ctx, seed=5)
    assert len(single) % batch_size  # else the batch below would not cross an epoch
    assert len(batches) == len(single) // batch_size
    for step in (0, len(batches), 10**9):
        assert batches[step].shape == (batch_size, n_ctx + 1)
        assert batches[step].dtype == np.int32
        np.testing.assert_array_equal(
            batches[step], np.concatenate([single[step * batch_size + i] for i in range(batch_size)])
        )


def test_batches_have_no_state(folder):
    options = dict(batch_size=4, n_ctx=17, seed=2)
    first = Batches(Corpus(folder), **options)
    expected = [first[step] for step in range(40)]
    resumed = Batches(Corpus(folder), **options)
    np.testing.assert_array_equal(resumed[31], expected[31])
    np.testing.assert_array_equal(resumed[2], expected[2])


@pytest.mark.parametrize("n_hosts", [2, 3, 6])
def test_hosts_share_the_batch_of_one(folder, n_hosts):
    options = dict(batch_size=6, n_ctx=17, seed=2)
    whole = Batches(Corpus(folder), **options)
    parts = [Batches(Corpus(folder), **options, host=host, n_hosts=n_hosts) for host in range(n_hosts)]
    np.testing.assert_array_equal(np.concatenate([part[13] for part in parts]), whole[13])


def test_sharding_does_not_change_the_batches(folder, tmp_path):
    write(tmp_path / "corpus", shard_tokens=10**6)
    one, many = (Batches(Corpus(f), batch_size=5, n_ctx=19, seed=1)[7] for f in (tmp_path / "corpus", folder))
    np.testing.assert_array_equal(one, many)


def test_validation_windows_are_evenly_spread(folder):
    corpus, n_ctx = Corpus(folder), 13
    tokens = literal(DOCUMENTS, "validation")
    n_windows = (len(tokens) - 1) // n_ctx
    every = validation_windows(corpus, n_ctx)
    np.testing.assert_array_equal(every, [tokens[i * n_ctx : i * n_ctx + n_ctx + 1] for i in range(n_windows)])
    np.testing.assert_array_equal(every[:, 1:].ravel(), tokens[1 : 1 + n_windows * n_ctx])  # each a label once
    four = validation_windows(corpus, n_ctx, 4)
    np.testing.assert_array_equal(four, every[[n_windows * i // 4 for i in range(4)]])
    np.testing.assert_array_equal(validation_windows(corpus, n_ctx, 10**6), every)


def test_bad_batches(folder):
    corpus = Corpus(folder)
    with pytest.raises(CorpusError, match=r"train split of .* tokens, too few for one window of n_ctx \+ 1 = 1000001"):
        Batches(corpus, batch_size=1, n_ctx=10**6)
    with pytest.raises(CorpusError, match="fewer than one batch of 10000: make the batch smaller"):
        Batches(corpus, batch_size=10_000, n_ctx=16)
    with pytest.raises(CorpusError, match="host 0 of 3 cannot take an equal part of a batch of 8"):
        Batches(corpus, batch_size=8, n_ctx=16, n_hosts=3)
    with pytest.raises(CorpusError, match="no split `vaildation`; did you mean `validation`"):
        Batches(corpus, "vaildation", batch_size=8, n_ctx=16)
    with pytest.raises(IndexError, match="steps count from 0"):
        Batches(corpus, batch_size=8, n_ctx=16)[-1]


# -------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize("documents", [[], ["", "\n"]])
def test_empty_corpus(tmp_path, documents):
    with pytest.raises(CorpusError, match="the corpus test is empty"):
        write(tmp_path / "corpus", documents)
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize(("fraction", "split"), [(0.0, "validation"), (1.0, "train")])
def test_empty_split(tmp_path, fraction, split):
    with pytest.raises(CorpusError, match=f"none of the 83 documents .* falls into the {split} split"):
        write(tmp_path / "corpus", validation_fraction=fraction)
    assert not [*tmp_path.iterdir()]


def test_vocabulary_beyond_uint16(tmp_path):
    tokenizer = Tokenizer([])
    tokenizer.n_vocab = 2**16 + 1
    with pytest.raises(CorpusError, match="at most 65536 entries; this tokenizer has 65537"):
        write_corpus(tmp_path / "corpus", DOCUMENTS, tokenizer, name="test", source={})


def test_no_corpus(tmp_path):
    with pytest.raises(CorpusError, match=r"there is no corpus in .*: manifest\.json is missing"):
        Corpus(tmp_path)


def test_missing_shard(copy):
    (copy / "train-00001.bin").unlink()
    with pytest.raises(CorpusError, match=r"train-00001\.bin is missing \(\d+ bytes expected\)"):
        Corpus(copy)


def test_truncated_shard(copy):
    path = copy / "validation-00000.bin"
    size = path.stat().st_size
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(CorpusError, match=rf"validation-00000\.bin has {size - 10} bytes, {size} expected"):
        Corpus(copy)


def test_corrupted_shard(copy):
    path = copy / "train-00002.bin"
    path.write_bytes(path.read_bytes()[:-4] + b"\0\0\0\0")
    corpus = Corpus(copy)  # the size is right
    with pytest.raises(CorpusError, match=r"train-00002\.bin has changed"):
        corpus.verify()


def test_wrong_manifest(copy):
    path = copy / "manifest.json"
    manifest = json.loads(path.read_text())
    for changed, sentence in (
        ("{", "is not JSON"),
        (json.dumps(manifest | {"format": 99}), "is not a manifest of format 1"),
        (json.dumps(manifest | {"colour": "red"}), "does not know colour"),
        (json.dumps({key: value for key, value in manifest.items() if key != "splits"}), "lacks or .* splits"),
        (json.dumps(manifest | {"splits": {"train": []}}), "lacks or .* validation"),
    ):
        path.write_text(changed)
        with pytest.raises(CorpusError, match=sentence):
            Corpus(copy)


def test_wrong_tokenizer(copy):
    Tokenizer.train(["abab"], 258).save(copy / "tokenizer")
    with pytest.raises(CorpusError, match="is not the tokenizer that its shards were written with"):
        _ = Corpus(copy).tokenizer


@pytest.mark.parametrize("fails_at", range(5))
def test_full_disk_loses_nothing(copy, monkeypatch, fails_at):
    before = content(copy.parent)
    write_bytes, calls = Path.write_bytes, []

    def full(path, data):
        calls.append(path)
        if len(calls) > fails_at:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write_bytes(path, data)

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(
        CorpusError, match=r"cannot write the corpus .*: No space left on device; what was there before"
    ):
        write(copy, [f"another {text}" for text in DOCUMENTS])
    assert content(copy.parent) == before


def test_failing_source_loses_nothing(copy):
    def documents():
        yield from DOCUMENTS
        raise OSError("the source went away")

    before = content(copy.parent)
    with pytest.raises(OSError, match="the source went away"):
        write(copy, documents())
    assert content(copy.parent) == before


def test_failed_rename_puts_the_old_corpus_back(copy, monkeypatch):
    before = content(copy.parent)
    rename, calls = Path.rename, []

    def second_fails(path, target):
        calls.append(path)
        if len(calls) == 2:
            raise OSError(errno.EIO, "Input/output error")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", second_fails)
    with pytest.raises(CorpusError, match="Input/output error"):
        write(copy, [f"another {text}" for text in DOCUMENTS])
    assert content(copy.parent) == before


def test_rewriting_replaces_the_whole_corpus(copy):
    write(copy, DOCUMENTS[:40])
    write(copy.parent / "fresh", DOCUMENTS[:40])
    assert content(copy) == content(copy.parent / "fresh")
    assert sorted(path.name for path in copy.parent.iterdir()) == ["corpus", "fresh"]


def test_a_folder_of_something_else_is_not_replaced(tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(CorpusError, match="exists and is not a corpus"):
        write(tmp_path)
    assert (tmp_path / "thesis.txt").read_text() == "years of work"
