"""Shards and batches: against literal NumPy windows, and every way in which a corpus can be bad or out of reach."""

import errno
import functools
import hashlib
import http.server
import json
import re
import shutil
import subprocess
import sys
import threading
from itertools import accumulate
from pathlib import Path

import fsspec
import numpy as np
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from gpt2lib import data
from gpt2lib.benchmark import anonymous_memory, pretend
from gpt2lib.data import Batches, Corpus, CorpusError, prefetch, validation_windows, write_corpus
from gpt2lib.tokenizer import Tokenizer, TokenizerError

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


HOST = """
import json, sys
sys.modules["jax"] = None  # grain would import it, which takes long
from gpt2lib import data

pieces, ranges = [], data._Disk.ranges
data._Disk.ranges = lambda self, asked: pieces.extend(asked) or ranges(self, asked)
folder, steps, host, n_hosts = json.loads(sys.argv[1])
batches = data.Batches(data.Corpus(folder), batch_size=8, n_ctx=17, seed=2, host=host, n_hosts=n_hosts)
rows = [batches[step].tolist() for step in steps]
assert not {"keras", "tensorflow"} & set(sys.modules)
print(json.dumps([rows, pieces]))
"""


@pytest.mark.parametrize("n_hosts", [1, 2, 8])
def test_hosts_as_processes(folder, n_hosts):
    """An epoch and two far steps: together the hosts have the batches of one, and each read only what it has."""
    tokens, n_ctx = literal(DOCUMENTS, "train").tolist(), 17
    whole = Batches(Corpus(folder), batch_size=8, n_ctx=n_ctx, seed=2)
    steps = [*range(len(whole)), 1000, 10**9]
    commands = [
        [sys.executable, "-c", HOST, json.dumps([str(folder), steps, host, n_hosts])] for host in range(n_hosts)
    ]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for command in commands]
    answers = [process.communicate(timeout=60)[0] for process in processes]
    assert not any(process.returncode for process in processes)
    rows, pieces = zip(*map(json.loads, answers), strict=True)
    batches = np.concatenate(rows, axis=1)
    np.testing.assert_array_equal(batches, [whole[step] for step in steps])
    epoch = [window for batch in batches[: len(whole)] for window in windows_of(batch, tokens, n_ctx)]
    assert len(set(epoch)) == len(epoch) == len(whole) * 8

    shards = Corpus(folder).manifest["splits"]["train"]
    begins = accumulate((shard["tokens"] for shard in shards), initial=0)
    begin = {shard["file"]: at for shard, at in zip(shards, begins, strict=False)}
    for own, read in zip(rows, pieces, strict=True):
        assert [t for name, a, b in read for t in tokens[begin[name] + a : begin[name] + b]] == np.ravel(own).tolist()


def test_sharding_does_not_change_the_batches(folder, tmp_path):
    write(tmp_path / "corpus", shard_tokens=10**6)
    one, many = (Batches(Corpus(f), batch_size=5, n_ctx=19, seed=1)[7] for f in (tmp_path / "corpus", folder))
    np.testing.assert_array_equal(one, many)


def test_a_corpus_replaced_while_it_is_read(copy, folder):
    options = dict(batch_size=4, n_ctx=17, seed=2)
    batches = Batches(Corpus(copy), **options)
    write(copy, [f"another {text}" for text in DOCUMENTS])
    for step in range(20):
        np.testing.assert_array_equal(batches[step], Batches(Corpus(folder), **options)[step])


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


@pytest.mark.parametrize("split", ["train", "validation"])
@pytest.mark.parametrize("scanned_at_once", [7, 10**6])
def test_windows_and_documents(folder, monkeypatch, split, scanned_at_once):
    monkeypatch.setattr(data, "_SCAN_TOKENS", scanned_at_once)
    tokens, n_ctx = literal(DOCUMENTS, split), 23
    document = np.concatenate([[0], (tokens == 256).cumsum()[:-1]])  # of each token; an end of text is of its own
    batches = Batches(Corpus(folder), split, batch_size=6, n_ctx=n_ctx, seed=2, host=1, n_hosts=2)
    seen = set()
    for step in (0, 3, len(batches), 10**9):
        windows = batches.windows(step)
        assert windows == windows_of(batches[step], tokens.tolist(), n_ctx)
        expected = [sorted({*document[i * n_ctx : i * n_ctx + n_ctx + 1].tolist()}) for i in windows]
        assert batches.documents(step) == expected
        seen |= {len(row) for row in expected}
    assert len(seen) > 1  # windows within one document and windows over several


def test_prefetch_gives_the_same_batches(folder):
    batches = Batches(Corpus(folder), batch_size=4, n_ctx=17, seed=2)
    for ahead in (0, 1, 5, 100):
        read = [*prefetch(batches, 3, 20, ahead)]
        np.testing.assert_array_equal(read, [batches[step] for step in range(3, 20)])
    assert [*prefetch(batches, 5, 5)] == []


def reading() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("prefetch")]


class Steps:
    """Stands in for batches: `steps[s]` is s, and says that it was asked for; reading `fails_at` fails."""

    def __init__(self, fails_at=None):
        self.fails_at, self.read = fails_at, {step: threading.Event() for step in range(100)}

    def __getitem__(self, step):
        self.read[step].set()
        if step == self.fails_at:
            raise CorpusError("the disk went away")
        return step


def test_prefetch_reads_ahead_and_stops_with_its_reader():
    steps = Steps()
    batches = prefetch(steps, 0, 100, ahead=3)
    assert not reading()
    assert next(batches) == 0
    assert steps.read[3].wait(10) and not steps.read[4].is_set()
    assert next(batches) == 1
    assert steps.read[4].wait(10) and not steps.read[5].is_set()
    assert len(reading()) == 1
    batches.close()
    assert not reading()

    for step in prefetch(Steps(), 0, 100):
        if step == 7:
            break
    assert not reading()  # nobody holds the generator any more


def test_prefetch_fails_where_the_batch_is_due():
    batches = prefetch(Steps(fails_at=5), 2, 100, ahead=4)
    assert [next(batches) for _ in range(3)] == [2, 3, 4]
    with pytest.raises(CorpusError, match="the disk went away"):
        next(batches)
    assert not reading()


# -------------------------------------------------------------------------------------------------------- large corpora


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the kernel does not say what memory is used")
def test_memory_does_not_grow_with_the_corpus(tmp_path):
    """10 million and 10 billion tokens: opened, 2000 batches read, and far steps reached."""
    n_ctx, grown = 1024, {}
    Batches(Corpus(pretend(tmp_path / "warm", 1, 10**4)), batch_size=2, n_ctx=8)[0]  # imports grain
    for name, n_shards, shard_tokens in (("small", 1, 10**7), ("large", 300, 2**25)):
        folder = pretend(tmp_path / name, n_shards, shard_tokens)
        before = anonymous_memory()
        batches = Batches(Corpus(folder), batch_size=2, n_ctx=n_ctx, seed=1)
        for step in range(2000):
            assert not batches[step].any()
        grown[name] = anonymous_memory() - before
    assert grown["large"] < 10e6
    assert grown["large"] - grown["small"] < 5e6

    assert len(batches) == (300 * 2**25 - 1) // n_ctx // 2
    windows = np.ravel([batches.windows(step) for step in range(2000)])
    assert len(set(windows)) == 4000
    counts = np.histogram(windows, 20, (0, 2 * len(batches)))[0]  # of 200 expected in each part of the corpus
    assert 100 < counts.min() and counts.max() < 300
    for step in (10**6, len(batches) - 1, len(batches), 10**9):  # the end of the first epoch, and beyond
        for row, window in enumerate(batches.windows(step)):
            shard, at = divmod(window * n_ctx, 2**25)
            with (tmp_path / "large" / f"{shard:05d}.bin").open("r+b") as file:
                file.seek(2 * at)
                file.write(np.arange(100 * row, 100 * row + n_ctx, dtype="<u2").tobytes())
        np.testing.assert_array_equal(batches[step][:, :-1], [[*range(n_ctx)], [*range(100, 100 + n_ctx)]])


# ---------------------------------------------------------------------------------------------------- remote corpora


@pytest.fixture
def remote(folder):
    """The corpus at an address."""
    memory = fsspec.filesystem("memory")
    memory.put(str(folder), "/bucket/corpus", recursive=True)
    yield "memory://bucket/corpus"
    memory.rm("/bucket", recursive=True)


@pytest.fixture
def fetched(monkeypatch) -> list:
    """(path, start, stop) in bytes of each read from memory://."""
    reads, cat_file = [], MemoryFileSystem.cat_file

    def recorded(self, path, start=None, end=None, **kwargs):
        reads.append((path, start, end))
        return cat_file(self, path, start, end, **kwargs)

    monkeypatch.setattr(MemoryFileSystem, "cat_file", recorded)
    return reads


@pytest.fixture
def pauses(monkeypatch) -> list:
    """The seconds that would have been waited."""
    waited = []
    monkeypatch.setattr(data.time, "sleep", waited.append)
    return waited


def assert_same(there: Corpus, here: Corpus):
    assert there.hash == here.hash
    assert there.tokenizer.hash == here.tokenizer.hash
    there.verify()
    for split in data.SPLITS:
        np.testing.assert_array_equal(there.tokens(split)[:], here.tokens(split)[:])
        np.testing.assert_array_equal(there.tokens(split)[200:450], here.tokens(split)[200:450])
        options = dict(split=split, batch_size=4, n_ctx=19, seed=3, host=1, n_hosts=2)
        a, b = Batches(there, **options), Batches(here, **options)
        for step in (0, 5, 10**9):
            np.testing.assert_array_equal(a[step], b[step])
            assert a.documents(step) == b.documents(step)
        np.testing.assert_array_equal([*prefetch(a, 2, 7)], [b[step] for step in range(2, 7)])
    for count in (7, None):
        np.testing.assert_array_equal(validation_windows(there, 13, count), validation_windows(here, 13, count))


@pytest.mark.parametrize("scanned_at_once", [64, 10**6])
def test_a_remote_corpus_is_the_local_one(remote, folder, monkeypatch, scanned_at_once):
    monkeypatch.setattr(data, "_SCAN_TOKENS", scanned_at_once)
    assert_same(Corpus(remote), Corpus(folder))
    assert Corpus(remote + "/").folder == remote


def test_an_address_on_disk_is_mapped(folder):
    corpus = Corpus(folder.as_uri())
    assert corpus.folder == folder
    assert_same(corpus, Corpus(folder))


def test_a_host_fetches_its_part_in_one_call(remote, fetched, monkeypatch):
    calls, cat_ranges = [], MemoryFileSystem.cat_ranges
    monkeypatch.setattr(MemoryFileSystem, "cat_ranges", lambda *args, **kw: calls.append(1) or cat_ranges(*args, **kw))
    monkeypatch.setattr(MemoryFileSystem, "size", None)  # opening lists the folder and asks for no file's size
    corpus = Corpus(remote)
    assert fetched == [("/bucket/corpus/manifest.json", None, None)]
    batches = Batches(corpus, batch_size=6, n_ctx=17, seed=2, host=1, n_hosts=3)
    fetched.clear()
    batch = batches[4]
    assert len(calls) == 1
    parts = [fsspec.filesystem("memory").store[path].getvalue()[start:stop] for path, start, stop in fetched]
    assert b"".join(parts) == batch.astype("<u2").tobytes()


def test_a_folder_that_cannot_be_listed(remote, folder, monkeypatch):
    def forbidden(*args, **kwargs):
        raise PermissionError("storage.objects.list")

    def hidden(self, path):
        raise FileNotFoundError(path)

    monkeypatch.setattr(MemoryFileSystem, "ls", forbidden)
    assert_same(Corpus(remote), Corpus(folder))
    with monkeypatch.context() as patch:  # as of a server that does not answer HEAD
        patch.setattr(MemoryFileSystem, "size", hidden)
        assert_same(Corpus(remote), Corpus(folder))
    del MemoryFileSystem.store["/bucket/corpus/train-00001.bin"]
    with pytest.raises(CorpusError, match=rf"the shard {remote}/train-00001\.bin is missing \(\d+ bytes expected\)"):
        Corpus(remote)


def test_bad_remote_corpora(remote, folder):
    store = MemoryFileSystem.store
    corpus = Corpus(remote)
    with pytest.raises(CorpusError, match=r"^there is no corpus in memory://bucket: manifest\.json is missing$"):
        Corpus("memory://bucket")
    path = "/bucket/corpus/validation-00000.bin"
    with fsspec.open(f"memory:/{path}", "r+b") as file:
        file.write(b"\0\0")
    with pytest.raises(CorpusError, match=rf"the shard {remote}/validation-00000\.bin has changed"):
        corpus.verify()
    store[path].truncate(10)
    with pytest.raises(CorpusError, match=rf"the shard {remote}/validation-00000\.bin has 10 bytes, \d+ expected"):
        Corpus(remote)
    del store[path]
    with pytest.raises(CorpusError, match=rf"the shard {remote}/validation-00000\.bin is missing"):
        Corpus(remote)
    with pytest.raises(CorpusError, match=rf"cannot read {remote}: validation-00000\.bin: FileNotFoundError"):
        corpus.tokens("validation")[:5]
    store["/bucket/corpus/tokenizer/encoder.json"].truncate(10)
    with pytest.raises(TokenizerError, match=rf"{remote}/tokenizer/encoder\.json is not a vocabulary file"):
        _ = corpus.tokenizer
    del store["/bucket/corpus/tokenizer/encoder.json"]
    with pytest.raises(CorpusError, match=rf"{remote}/tokenizer/encoder\.json is missing"):
        _ = corpus.tokenizer


@pytest.mark.parametrize(("address", "package"), [("gs://bucket/corpus", "gcsfs"), ("s3://bucket/corpus", "s3fs")])
def test_a_package_that_is_missing(address, package, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(
        CorpusError, match=f"reading {address} needs a package that is not installed: run `pip install {package}`"
    ):
        Corpus(address)


def test_an_address_of_no_kind():
    with pytest.raises(CorpusError, match="cannot read gopher://bucket/corpus: ValueError: Protocol not known: gopher"):
        Corpus("gopher://bucket/corpus")


def failing(monkeypatch, errors):
    """The next reads from memory:// fail with these errors, or give these bytes; returns what was asked for."""
    asked, errors, cat_file = [], iter(errors), MemoryFileSystem.cat_file

    def cat_file_later(self, path, start=None, end=None, **kwargs):
        asked.append((path, start, end))
        match next(errors, None):
            case Exception() as error:
                raise error
            case bytes() as content:
                return content
        return cat_file(self, path, start, end, **kwargs)

    monkeypatch.setattr(MemoryFileSystem, "cat_file", cat_file_later)
    return asked


def test_a_remote_that_recovers(remote, folder, monkeypatch, pauses):
    options = dict(batch_size=4, n_ctx=17, seed=2)
    asked = failing(monkeypatch, [TimeoutError("slow"), ConnectionResetError("gone")])
    batches = Batches(Corpus(remote), **options)
    assert len(asked) == 3
    assert pauses == [1, 2]

    pauses.clear()
    expected = Batches(Corpus(folder), **options)[9]
    # The second of several ranges fails, then comes cut off; what has come is not fetched again.
    asked = failing(monkeypatch, [None, OSError("503"), *[None] * (len(expected) - 2), b"short"])
    np.testing.assert_array_equal(batches[9], expected)
    assert len(set(asked)) >= len(expected)
    assert asked[-2:] == [asked[1]] * 2
    assert len(asked) == len(set(asked)) + 2
    assert pauses == [1, 2]


def test_a_remote_that_does_not_recover(remote, monkeypatch, pauses):
    batches = Batches(Corpus(remote), batch_size=4, n_ctx=17)
    asked = failing(monkeypatch, [ConnectionResetError("gone\nfor good")] * 100)
    with pytest.raises(
        CorpusError, match=rf"^cannot read {remote}/manifest\.json: ConnectionResetError: gone for good$"
    ):
        Corpus(remote)
    assert len(asked) == 5
    assert pauses == [1, 2, 4, 8]
    pauses.clear()
    with pytest.raises(
        CorpusError, match=rf"^cannot read {remote}: train-\d+\.bin: ConnectionResetError: gone for good$"
    ):
        batches[0]
    assert pauses == [1, 2, 4, 8]


def test_a_remote_without_ranges(remote, monkeypatch, pauses):
    batches = Batches(Corpus(remote), batch_size=4, n_ctx=17)
    failing(monkeypatch, [bytes(422)] * 100)
    with pytest.raises(CorpusError, match=r"train-\d+\.bin: 422 bytes came where \d+ were asked for$"):
        batches[0]


def test_a_remote_that_forbids_is_not_asked_again(remote, monkeypatch, pauses):
    batches = Batches(Corpus(remote), batch_size=4, n_ctx=17)
    failing(monkeypatch, [PermissionError("no")] * 100)
    with pytest.raises(CorpusError, match=rf"^cannot read {remote}/manifest\.json: PermissionError: no$"):
        Corpus(remote)
    with pytest.raises(CorpusError, match=rf"^cannot read {remote}: train-\d+\.bin: PermissionError: no$"):
        batches[0]
    assert not pauses


class Server(http.server.ThreadingHTTPServer):
    request_queue_size = 128  # as many as fsspec asks at once; what finds no place waits for seconds


class Ranges(http.server.SimpleHTTPRequestHandler):
    """Serves a folder, and ranges of its files, which Python's own server does not."""

    def log_message(self, *args):
        pass

    def do_GET(self):
        path = Path(self.translate_path(self.path))
        wanted = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        if not wanted or not path.is_file():
            return super().do_GET()
        content = path.read_bytes()[int(wanted[1]) : int(wanted[2]) + 1]
        self.send_response(206)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


def test_http(copy, folder, pauses):
    pytest.importorskip("aiohttp", reason="fsspec reads http:// with aiohttp, which is not installed")
    with Server(("127.0.0.1", 0), functools.partial(Ranges, directory=copy.parent)) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            address = f"http://127.0.0.1:{server.server_port}/corpus"
            assert_same(Corpus(address), Corpus(folder))
            (copy / "train-00001.bin").unlink()
            with pytest.raises(CorpusError, match=rf"the shard {address}/train-00001\.bin is missing"):
                Corpus(address)
            with pytest.raises(CorpusError, match=rf"there is no corpus in {address}/nothing"):
                Corpus(f"{address}/nothing")
        finally:
            server.shutdown()
            thread.join()
    with pytest.raises(CorpusError, match=rf"^cannot read {address}/manifest\.json: ClientConnector"):
        Corpus(address)
    assert pauses == [1, 2, 4, 8]


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
