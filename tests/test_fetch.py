"""Downloads, from a server that breaks, lies and refuses."""

import hashlib
import json
import os
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from gpt2lib import fetch as module
from gpt2lib.fetch import FetchError, fetch

pytestmark = pytest.mark.backend_free
K = 1 << 16  # what is kept of a piece is a multiple of this
BODY = os.urandom(3_000_017)
SHA256 = hashlib.sha256(BODY).hexdigest()


class Server(ThreadingHTTPServer):
    """Serves `body`; each request takes the next of `plan`, then all goes well.

    A number cuts the connection after so many bytes; "404" and the like refuse; "whole" ignores ranges; "elsewhere"
    sends another range; "longer" promises a byte too many, "shorter" one too few; "nameless" has no version and no
    length; "later" asks for two seconds.
    """

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.body, self.plan, self.asked, self.version = BODY, [], [], '"one"'
        self.url = f"http://127.0.0.1:{self.server_port}/file"


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def do_GET(self):
        server = self.server
        what = server.plan.pop(0) if server.plan else ""
        body, span = server.body, self.headers.get("Range")
        server.asked.append(span)
        if what == "later" or (isinstance(what, str) and what.isdigit()):
            self.send_response(503 if what == "later" else int(what))
            self.send_header("Retry-After", "2" if what == "later" else "0")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        start = 0
        if span and what != "whole" and self.headers.get("If-Range") == server.version:
            start = int(span.removeprefix("bytes=").removesuffix("-"))
            if start >= len(body):
                self.send_response(416)
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            start += what == "elsewhere"
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
        else:
            self.send_response(200)
        if what != "nameless":
            self.send_header("ETag", server.version)
            self.send_header("Content-Length", str(len(body) - start + {"longer": 1, "shorter": -1}.get(what, 0)))
        self.end_headers()
        self.wfile.write(body[start : start + what] if isinstance(what, int) else body[start:])
        self.close_connection = True


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(module, "_PAUSE", 0.001)
    with Server() as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield server
        server.shutdown()


def left(folder) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def check(path):
    assert path.read_bytes() == BODY
    assert left(path.parent) == ["downloads.json", path.name], "nothing half-written stays"
    noted = json.loads((path.parent / "downloads.json").read_text())
    assert noted[path.name]["sha256"] == SHA256 and noted[path.name]["size"] == len(BODY)


def test_a_file(server, tmp_path):
    path = tmp_path / "new" / "file.bin"
    assert fetch(server.url, path, progress=False) == path
    check(path)
    fetch(server.url, path, progress=False)
    fetch(server.url, path, SHA256, progress=False)
    assert server.asked == [None], "it was there already"


@pytest.mark.parametrize(
    ("plan", "asked"),
    [
        ([16 * K, 5, 20 * K], [None, f"bytes={16 * K}-", f"bytes={16 * K}-", f"bytes={36 * K}-"]),
        (["500", "503", "429", K], [None, None, None, None, f"bytes={K}-"]),
        ([K, "whole"], [None, f"bytes={K}-"]),
        ([K, "elsewhere"], [None, f"bytes={K}-", None]),
        (["longer"], [None, f"bytes={len(BODY) // K * K}-"]),
        (["nameless"], [None]),
    ],
    ids=["cut", "busy", "no ranges", "wrong range", "a length that is a lie", "no length"],
)
def test_a_server_that_fails_and_recovers(server, tmp_path, plan, asked):
    server.plan = list(plan)
    path = fetch(server.url, tmp_path / "file.bin", SHA256, progress=False)
    check(path)
    assert server.asked == asked


def test_a_process_that_was_killed_goes_on(server, tmp_path):
    server.plan = [30 * K, *["500"] * 5]
    with pytest.raises(FetchError, match=r"the server answers 500; try again later; what came of it is kept in"):
        fetch(server.url, tmp_path / "file.bin", progress=False)
    assert not (tmp_path / "file.bin").exists()
    server.asked.clear()
    check(fetch(server.url, tmp_path / "file.bin", progress=False))
    assert server.asked == [f"bytes={30 * K}-"]


def test_a_file_that_changes_between_two_pieces(server, tmp_path):
    server.body, server.plan = BODY[::-1], [K, *["500"] * 5]
    with pytest.raises(FetchError):
        fetch(server.url, tmp_path / "file.bin", progress=False)
    server.body, server.version = BODY, '"two"'
    check(fetch(server.url, tmp_path / "file.bin", SHA256, progress=False))


def test_pieces_of_two_files_are_found_out(server, tmp_path):
    """A server that changes a file under the same version."""
    server.body, server.plan = BODY[::-1], [K, *["500"] * 5]
    with pytest.raises(FetchError):
        fetch(server.url, tmp_path / "file.bin", progress=False)
    server.body = BODY
    check(fetch(server.url, tmp_path / "file.bin", SHA256, progress=False))


def test_a_length_that_is_too_small(server, tmp_path):
    """Such an answer looks whole, so only its sha256 tells."""
    server.plan = ["shorter"]
    with pytest.raises(FetchError, match=rf"is not the file that it should be: its sha256 is \w+, not {SHA256}"):
        fetch(server.url, tmp_path / "file.bin", SHA256, progress=False)
    assert left(tmp_path) == []
    check(fetch(server.url, tmp_path / "file.bin", SHA256, progress=False))


def test_pauses_grow_and_are_as_long_as_the_server_asks(server, tmp_path, monkeypatch):
    pauses = []
    monkeypatch.setattr(module, "_PAUSE", 1.0)
    monkeypatch.setattr(module.time, "sleep", pauses.append)
    server.plan = ["later", "500", "500", K, "500"]
    check(fetch(server.url, tmp_path / "file.bin", progress=False))
    asked, second, third, after_some, again = pauses
    assert asked == 2
    assert 1 <= second <= 2 <= third <= 4, "twice as long each time"
    assert 0.5 <= after_some <= 1 <= again <= 2, "from the beginning when something came"


def test_progress_is_shown(server, tmp_path, capsys):
    server.plan = [16 * K]
    fetch(server.url, tmp_path / "file.bin")
    shown = capsys.readouterr().err
    assert all(said in shown for said in ("file.bin", " 0%", "1.05M/3.00M", "100%", "3.00M/3.00M"))


@pytest.mark.parametrize("status", ["404", "403", "410"])
def test_refused_at_once(server, tmp_path, status):
    server.plan = [status]
    with pytest.raises(FetchError, match=rf"answers {status}; look for the file's new address") as error:
        fetch(server.url, tmp_path / "file.bin", progress=False)
    assert len(server.asked) == 1 and left(tmp_path) == [] and "\n" not in str(error.value)


def test_wrong_bytes(server, tmp_path):
    with pytest.raises(FetchError, match=rf"its sha256 is {SHA256}, not 00") as error:
        fetch(server.url, tmp_path / "file.bin", "0" * 64, progress=False)
    assert left(tmp_path) == [] and "\n" not in str(error.value)


def test_other_bytes_than_the_first_time(server, tmp_path):
    path = fetch(server.url, tmp_path / "file.bin", progress=False)
    path.unlink()
    server.body = BODY[:-1]
    with pytest.raises(FetchError, match=r"if it has changed for good, delete .*downloads\.json"):
        fetch(server.url, path, progress=False)
    assert not path.exists()


def test_a_file_that_was_damaged_here(server, tmp_path):
    path = fetch(server.url, tmp_path / "file.bin", progress=False)
    path.write_bytes(BODY[:100])
    with pytest.warns(UserWarning, match=r"file\.bin is not the file that it should be"):
        fetch(server.url, path, progress=False)
    check(path)


def test_no_server(monkeypatch, tmp_path):
    monkeypatch.setattr(module, "_PAUSE", 0.001)
    with pytest.raises(FetchError, match=r"cannot be had: .*refused.*; try again later") as error:
        fetch("http://127.0.0.1:9/file", tmp_path / "file.bin", progress=False)
    assert "\n" not in str(error.value)
