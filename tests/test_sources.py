"""Files of the benchmarks: found where they lie, else fetched, taken out of archives and checked."""

import hashlib
import io
import tarfile
import threading
import zipfile
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from gpt2lib.evaluate import sources, suite
from gpt2lib.evaluate.prompted import Article, read_articles
from gpt2lib.evaluate.sources import SOURCES, Source, locate
from gpt2lib.evaluate.texts import TextError
from gpt2lib.fetch import FetchError, sha256_of

pytestmark = pytest.mark.backend_free
EVALDATA = Path(__file__).parents[2] / "shared" / "evaldata"
CONTENT = b"a line\n" * 1000


@pytest.fixture
def served(tmp_path, monkeypatch):
    """A server of a folder with an archive of each kind; `served(name, ...)` makes a Source of one of its files."""
    folder = tmp_path / "served"
    folder.mkdir()
    (folder / "plain").write_bytes(CONTENT)
    with zipfile.ZipFile(folder / "all.zip", "w") as archive:
        archive.writestr("inside/file", CONTENT)
    with tarfile.open(folder / "all.tgz", "w:gz") as archive:
        info = tarfile.TarInfo("inside/file")
        info.size = len(CONTENT)
        archive.addfile(info, io.BytesIO(CONTENT))

    class Handler(SimpleHTTPRequestHandler):
        def __init__(self, *arguments):
            super().__init__(*arguments, directory=str(folder))

        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()

        def make(name, member="", sha256=None):
            source = Source("wanted", f"http://127.0.0.1:{server.server_port}/{name}", member, sha256)
            monkeypatch.setitem(SOURCES, "wanted", source)
            return folder / name

        yield make
        server.shutdown()


@pytest.mark.parametrize(("name", "member"), [("plain", ""), ("all.zip", "inside/file"), ("all.tgz", "inside/file")])
def test_fetched_once(served, tmp_path, name, member):
    there = served(name, member, hashlib.sha256(CONTENT).hexdigest())
    path = locate("wanted", tmp_path / "data", progress=False)
    assert path == tmp_path / "data" / "wanted"
    assert path.read_bytes() == CONTENT
    there.unlink()
    assert locate("wanted", tmp_path / "data", progress=False) == path


@pytest.mark.parametrize(("name", "member"), [("plain", ""), ("all.zip", "inside/file"), ("all.tgz", "inside/file")])
def test_another_file_is_refused(served, tmp_path, name, member):
    served(name, member, "0" * 64)
    with pytest.raises(FetchError, match="sha256"):
        locate("wanted", tmp_path / "data", progress=False)
    assert not (tmp_path / "data" / "wanted").exists()


@pytest.mark.parametrize("name", ["all.zip", "all.tgz"])
def test_archives_that_lack_it_or_are_none(served, tmp_path, name):
    there = served(name, "inside/other")
    with pytest.raises(FetchError, match="inside/other"):
        locate("wanted", tmp_path / "data", progress=False)
    there.write_bytes(b"no archive")
    served(name, "inside/file")
    with pytest.raises(FetchError, match="delete it"):
        locate("wanted", tmp_path / "more", progress=False)
    assert not list(tmp_path.glob("*/.wanted*")), "half a file was left"


def test_what_lies_there_is_read(tmp_path):
    with pytest.raises(TextError, match=r"has no hellaswag_val\.jsonl; .* downloaded from https://"):
        locate("hellaswag_val.jsonl", tmp_path, download=False)
    (tmp_path / "hellaswag_val_full.txt.bz2").touch()
    assert locate("hellaswag_val.jsonl", tmp_path).name == "hellaswag_val_full.txt.bz2"


def test_every_task_has_a_source():
    assert {task.file for task in suite.TASKS.values()} - {""} <= SOURCES.keys()
    for source in SOURCES.values():
        assert source.url.startswith(("https://", "http://"))
        assert bool(source.member or source.make) == source.url.endswith((".zip", ".tgz", ".tar.gz"))


def test_test_stories_are_picked(tmp_path):
    urls = ["http://web.archive.org/one", "http://web.archive.org/two"]
    names = [hashlib.sha1(url.encode()).hexdigest() for url in urls]
    (tmp_path / "list").write_text(urls[1] + "\n")
    with tarfile.open(tmp_path / "a.tgz", "w:gz") as archive:
        for name, text in zip(names, ("One.", "Two."), strict=True):
            story = f"{text} é\n\n@highlight\n\nfirst\n\n@highlight\n\nsecond\n".encode()
            info = tarfile.TarInfo(f"cnn/stories/{name}.story")
            info.size = len(story)
            archive.addfile(info, io.BytesIO(story))
    sources._test_stories([tmp_path / "a.tgz", tmp_path / "list"], tmp_path / "out.jsonl")
    assert read_articles(tmp_path / "out.jsonl") == [Article("Two. é", ["first", "second"])]


@pytest.mark.parametrize("file", [name for name, source in SOURCES.items() if source.sha256])
def test_the_real_files_have_these_hashes(file):
    if not EVALDATA.exists():
        pytest.skip("the evaluation texts are not here")
    assert sha256_of(EVALDATA / file) == sources.SOURCES[file].sha256
