"""Lists of URLs as they are found: one form for each page, and those that no text is to be had from left out.

The paper's list is every outbound link of Reddit with at least 3 karma, without Wikipedia (Radford et al. 2019,
section 2.1).
"""

import bz2
import gzip
import io
import json
import lzma
from collections.abc import Collection, Iterator
from pathlib import Path, PurePosixPath
from urllib.parse import unquote, urljoin, urlsplit

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
_OPEN = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}


class Refused(Exception):
    """A record that a stage leaves out; the message is the reason under which it is counted."""


def canonical(url: str) -> str:
    """One form of the addresses of a page: lower-case host, no fragment, no tracking parameters, those left sorted.

    Refused for what is no web address: another scheme, no host, user and password, a port that is no number.
    """
    url = scrub_url(url.strip())
    try:
        parts = urlsplit(url)
        port, host = parts.port, parts.hostname
    except ValueError:
        raise Refused("malformed") from None
    if parts.scheme.lower() not in ("http", "https"):
        raise Refused("neither http nor https")
    if not host or any(c.isspace() for c in url):
        raise Refused("malformed")
    if parts.username is not None or parts.password is not None:
        raise Refused("with a user's name")
    usual = {"http": 80, "https": 443}[parts.scheme.lower()]
    place = f"[{host}]" if ":" in host else host.rstrip(".")
    place = place if port in (None, usual) else f"{place}:{port}"
    query = f"?{parts.query}" if parts.query else ""
    return normalize_url(urljoin(f"{parts.scheme.lower()}://{place}/", (parts.path or "/") + query))


def host(url: str) -> str:
    return urlsplit(url).hostname or ""


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


def read_list(path: Path) -> Iterator[tuple[str, int | None]]:
    """The (URL, score) of a list: one a line, or Reddit's submissions as Pushshift has them, one JSON object a line.

    The files may be packed: .gz, .bz2, .xz, .zst. The score is None where the list has none; a submission without a
    link of its own has the URL "". CorpusError, with file and line, for what cannot be read.
    """
    number = 0
    try:
        with _opened(path) as lines:
            for number, line in enumerate(lines, 1):  # noqa: B007, said in the error
                line = line.strip()
                if line.startswith("{"):
                    record = json.loads(line)
                    link = "" if record.get("is_self") else record.get("url") or ""
                    yield str(link), record.get("score")
                elif line:
                    yield line, None
    except (OSError, EOFError, lzma.LZMAError, ValueError) as error:
        raise CorpusError(f"{path}, after line {number}: this list of URLs cannot be read ({error})") from error


def _opened(path: Path):
    if path.suffix == ".zst":
        import zstandard

        packed = zstandard.ZstdDecompressor(max_window_size=2**31).stream_reader(path.open("rb"), closefd=True)
        return io.TextIOWrapper(packed, encoding="utf-8", errors="replace")
    return _OPEN.get(path.suffix, open)(path, "rt", encoding="utf-8", errors="replace")
