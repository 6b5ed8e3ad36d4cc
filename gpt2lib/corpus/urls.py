"""Lists of URLs as they are found: one form for each page, and those that no text is to be had from left out.

The paper's list is every outbound link of Reddit with at least 3 karma, without Wikipedia (Radford et al. 2019,
section 2.1).
"""

import bz2
import gzip
import io
import ipaddress
import json
import lzma
import re
from collections.abc import Collection, Iterator
from pathlib import Path, PurePosixPath
from urllib.parse import unquote, urljoin, urlsplit, urlunsplit

import yarl
from courlan import normalize_url, scrub_url
from tld import get_tld

from gpt2lib.data import CorpusError

MIN_SCORE = 3  # karma of a link, where the list has it
# Wikipedia as in the paper: it is in the evaluations. The others hold pictures, films, sound, or nothing without login.
BLOCKED_DOMAINS = frozenset(
    """wikipedia.org wikimedia.org wiktionary.org wikiquote.org wikibooks.org wikisource.org dbpedia.org
    youtube.com youtu.be vimeo.com twitch.tv dailymotion.com liveleak.com streamable.com gfycat.com giphy.com
    imgur.com flickr.com instagram.com pinterest.com deviantart.com photobucket.com tinypic.com redd.it reddit.com
    facebook.com twitter.com x.com tiktok.com snapchat.com linkedin.com
    spotify.com soundcloud.com bandcamp.com steampowered.com play.google.com itunes.apple.com""".split()
)
BLOCKED_TYPES = frozenset(
    """jpg jpeg png gif gifv bmp svg webp ico tif tiff psd mp3 mp4 m4a m4v wav ogg ogv flac avi mov mkv wmv flv webm swf
    pdf ps doc docx xls xlsx ppt pptx odt epub zip gz bz2 xz 7z rar tar tgz iso dmg exe msi apk jar deb rpm bin
    css js json xml rss atom torrent""".split()
)
_LABEL = re.compile(r"[a-z0-9_-]{1,63}")  # of a name that can be asked for
_NUMBER = re.compile(r"[0-9]+|0x[0-9a-f]*")  # a host whose last label is one is an IPv4 address, as browsers have it
_OPEN = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}


class Refused(Exception):
    """A record that a stage leaves out; the message is the reason under which it is counted."""


class Failed(Exception):
    """A record that could not be had or read this time; the message is the reason under which it is kept."""


def canonical(url: str, base: str = "") -> str:
    """One form of the addresses of a page: lower-case host, no fragment, no tracking parameters, those left sorted.

    Args:
        base: the address of the page that leads to this one, which may then be a part of an address.

    Refused for what is no web address: another scheme, no host, user and password, a port that is no number.
    """
    try:
        url = scrub_url(urljoin(base, url.strip()))
        url.encode()  # which half a surrogate pair has no way to be
        parts = urlsplit(url)
        scheme, port = parts.scheme.lower(), parts.port
    except ValueError:
        raise Refused("malformed address") from None
    if scheme not in ("http", "https"):
        raise Refused("neither http nor https")
    if parts.username is not None or parts.password is not None:
        raise Refused("with a user's name")
    name = reached(url)
    place = f"[{name}]" if ":" in name else name
    place = place if port in (None, {"http": 80, "https": 443}[scheme]) else f"{place}:{port}"
    query = f"?{parts.query}" if parts.query else ""
    rest = urlsplit(normalize_url(urljoin("http://_/", re.sub("/+", "/", parts.path) + query)))
    return urlunsplit((scheme, place, rest.path or "/", rest.query, ""))


def reached(url: str) -> str:
    """The host that a client connects to for a URL: a name in ASCII, or an address in its one form.

    Refused for what DNS can have no name for, and for an address in other words, such as 127.1, 0x7f.1, 2130706433.
    """
    try:
        name = (yarl.URL(url).raw_host or "").removesuffix(".")  # where digits of full width have become plain ones
        if ":" in name:
            return ipaddress.IPv6Address(name if "%" not in name else "").compressed
        labels = name.split(".")
        if _NUMBER.fullmatch(labels[-1]):
            return str(ipaddress.IPv4Address(name))
    except ValueError:
        raise Refused("malformed address") from None
    if len(name) > 253 or not all(map(_LABEL.fullmatch, labels)):
        raise Refused("malformed address")
    return name


def host(url: str) -> str:
    """As it is written there; "" for a URL that has none."""
    try:
        return urlsplit(url).hostname or ""
    except ValueError:
        return ""


def domain(url: str) -> str:
    """The name that its owner registered, without what stands behind it: bbc of https://news.bbc.co.uk/1."""
    found = get_tld(url, as_object=True, fail_silently=True, search_private=False)
    return found.domain if found else host(url)


def check(url: str, domains: Collection[str] = BLOCKED_DOMAINS, types: Collection[str] = BLOCKED_TYPES) -> str:
    """The canonical URL as it is; Refused for one of a blocked domain, or below it, and for a blocked type of file."""
    labels = host(url).split(".")
    if any(".".join(labels[i:]) in domains for i in range(len(labels))):
        raise Refused("blocked domain")
    if PurePosixPath(unquote(urlsplit(url).path)).suffix.lower().lstrip(".") in types:
        raise Refused("blocked type of file")
    return url


def read_list(path: Path) -> Iterator[tuple[dict, Failed | None]]:
    """The links of a list: one a line, or Reddit's submissions as Pushshift has them, one JSON object a line.

    A link has its `url`, "" for a submission without one of its own, and its `score`, None where the list has none. It
    comes with None, or with the Failed that says why its line cannot be read; `url` is that line then. The files may be
    packed: .gz, .bz2, .xz, .zst. CorpusError, with file and line, for one that cannot be read.
    """
    number = 0
    try:
        with _opened(path) as lines:
            for number, line in enumerate(lines, 1):  # noqa: B007, said in the error
                line = line.strip()
                if line.startswith("{"):
                    yield _submission(line)
                elif line:
                    yield {"url": line, "score": None}, None
    except Exception as error:  # each way of packing has its own
        raise CorpusError(f"{path}, after line {number}: this list of URLs cannot be read ({error})") from error


def _submission(line: str) -> tuple[dict, Failed | None]:
    problem = "not JSON"
    try:
        record = json.loads(line)
        link, score = "" if record.get("is_self") else record.get("url") or "", record.get("score")
        problem = "a score that is no number"
        return {"url": str(link), "score": None if score is None else int(score)}, None
    except (ValueError, TypeError, OverflowError, RecursionError):
        return {"url": line[:500], "score": None}, Failed(problem)


def _opened(path: Path):
    if path.suffix == ".zst":
        import zstandard

        packed = zstandard.ZstdDecompressor(max_window_size=2**31).stream_reader(
            path.open("rb"), read_across_frames=True, closefd=True
        )
        return io.TextIOWrapper(packed, encoding="utf-8", errors="replace")
    return _OPEN.get(path.suffix, open)(path, "rt", encoding="utf-8", errors="replace")
