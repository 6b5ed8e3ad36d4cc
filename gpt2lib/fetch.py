"""Files from public addresses: resumed where they were cut off, tried again, checked, never half-written."""

import contextlib
import hashlib
import json
import os
import random
import time
import warnings
from pathlib import Path

from tqdm import tqdm

TIMEOUT = (10, 60)
ATTEMPTS = 6  # in a row that bring nothing new
_PAUSE = 1.0  # seconds before the second attempt; doubles
_RECORD = "downloads.json"
_CHUNK = 1 << 16  # bytes; a piece that breaks off within one is lost


class FetchError(OSError):
    """A file that could not be had; the message says which, why and what to do."""


class _Again(Exception):
    """This attempt failed, another may not; `pause` is what the server asks for, in seconds."""

    def __init__(self, why, pause=0.0):
        super().__init__(why)
        self.pause = pause


def fetch(
    url: str, path, sha256: str | None = None, progress: bool = True, attempts: int = ATTEMPTS, timeout=TIMEOUT
) -> Path:
    """The file of an address, in `path`; nothing is downloaded if it is there already.

    Size and sha256 are noted in `downloads.json` beside it when it first comes, and compared whenever it is asked for
    again; a file that has changed since is fetched anew. What a broken connection left is kept, and the next attempt,
    or the next call, goes on behind it.

    Args:
        url: an http or https address.
        path: of the file; its folder is made.
        sha256: what it must have; None: what it had the first time.
        progress: whether to show a bar.
        attempts: how often in a row it may fail before FetchError.
        timeout: seconds until a server is there, and until it sends something.

    Raises: FetchError if it cannot be had, or is not what it should be.
    """
    path = Path(path)
    noted = _notes(path.parent).get(path.name, {})
    wanted = sha256 or noted.get("sha256")
    if path.is_file():
        found = sha256_of(path)
        if wanted in (None, found):
            _note(path, url, found)
            return path
        warnings.warn(
            f"{path} is not the file that it should be (its sha256 is {found[:12]}...): fetched anew", stacklevel=2
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    for last in (False, True):
        resumed = _download(url, part, progress, attempts, timeout)
        found = sha256_of(part)
        if wanted in (None, found):
            break
        _remove(part)
        if last or not resumed:  # one that was put together from pieces gets a second chance
            raise FetchError(
                f"{url} is not the file that it should be: its sha256 is {found}, not {wanted}; if it has changed for "
                f"good, delete {path.parent / _RECORD}" + (" and the number in gpt2lib" if sha256 else "")
            )
    with open(part, "rb") as file:
        os.fsync(file.fileno())
    _note(path, url, found, part.stat().st_size)
    part.replace(path)
    _mark(part).unlink(missing_ok=True)
    return path


def sha256_of(path) -> str:
    """In hexadecimal, of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _notes(folder) -> dict:
    try:
        return json.loads((folder / _RECORD).read_text())
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise FetchError(f"{folder / _RECORD} is not JSON ({error}); delete it") from error


def _note(path, url, sha256, size=None):
    notes = _notes(path.parent)
    entry = {"url": url, "size": path.stat().st_size if size is None else size, "sha256": sha256}
    if notes.get(path.name) != entry:
        beside = path.with_name(f".{_RECORD}.{os.getpid()}")
        beside.write_text(json.dumps(notes | {path.name: entry}, indent=1) + "\n")
        beside.replace(path.parent / _RECORD)


def _mark(part) -> Path:
    """Where it is noted which version of a file its part is of."""
    return part.with_name(f"{part.name}.version")


def _remove(part):
    part.unlink(missing_ok=True)
    _mark(part).unlink(missing_ok=True)


def _download(url, part, progress, attempts, timeout) -> bool:
    """All of a file in `part`; whether it came in several pieces."""
    failures, resumed = 0, False
    while True:
        had = part.stat().st_size if part.exists() else 0
        resumed |= had > 0
        try:
            _receive(url, part, progress, timeout)
            return resumed
        except _Again as error:
            failures = 1 if part.exists() and part.stat().st_size > had else failures + 1
            if failures >= attempts:
                kept = f"; what came of it is kept in {part}" if part.exists() else ""
                raise FetchError(f"{url} cannot be had: {error}; try again later{kept}") from error
            time.sleep(max(error.pause, _PAUSE * 2 ** (failures - 1) * random.uniform(0.5, 1)))


def _receive(url, part, progress, timeout):
    """One attempt: the rest of a file, or all of it."""
    import requests

    had, mark = part.stat().st_size if part.exists() else 0, _mark(part)
    headers = {"Accept-Encoding": "identity", "User-Agent": "gpt2lib"}
    if had and mark.exists():
        headers |= {"Range": f"bytes={had}-", "If-Range": mark.read_text()}
    try:
        with requests.get(url, headers=headers, stream=True, timeout=timeout) as response:
            start, size = _answer(response, url, part, had)
            version = response.headers.get("ETag") or response.headers.get("Last-Modified") or ""
            if start == 0:
                _remove(part)
                if version and not version.startswith("W/"):
                    mark.write_text(version)
            bar = tqdm(total=size, initial=start, unit="B", unit_scale=True, desc=part.name[1:-5], disable=not progress)
            with bar, open(part, "r+b" if start else "wb") as file:
                file.seek(start)
                file.truncate()
                for chunk in response.iter_content(_CHUNK):
                    file.write(chunk)
                    bar.update(len(chunk))
    except requests.RequestException as error:
        raise _Again(" ".join(str(error).split())) from error
    came = part.stat().st_size
    if size is not None and came != size:
        raise _Again(f"{came:,} bytes of {size:,} came")


def _answer(response, url, part, had) -> tuple[int, int | None]:
    """Where the bytes of an answer begin, and how many the whole file has, if the server says so."""
    status = response.status_code
    if status == 206:
        with contextlib.suppress(KeyError, ValueError):
            span, total = response.headers["Content-Range"].removeprefix("bytes ").split("/")
            if int(span.split("-")[0]) == had:
                return had, int(total) if total != "*" else None
        _remove(part)
        raise _Again("the server sent another piece of it than it was asked for")
    if status == 416:
        _remove(part)
        raise _Again("the server has less of it than came before")
    if status == 429 or status >= 500:
        asked = response.headers.get("Retry-After", "")
        raise _Again(f"the server answers {status}", min(float(asked), 300) if asked.isdigit() else 0)
    if status != 200:
        raise FetchError(f"{url} cannot be had: the server answers {status}; look for the file's new address")
    length = response.headers.get("Content-Length")
    return 0, int(length) if length else None
