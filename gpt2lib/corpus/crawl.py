"""Fetch pages as a guest: robots.txt, one connection to a host at a time with a pause, and never a private address.

Pages are kept as WARC (ISO 28500), which every other crawler's tools read as well.
"""

import asyncio
import contextlib
import hashlib
import io
import ipaddress
import re
import socket
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import aiohttp
import trafilatura
from aiohttp.abc import AbstractResolver
from protego import Protego
from warcio.archiveiterator import ArchiveIterator
from warcio.exceptions import ArchiveLoadFailed
from warcio.statusandheaders import StatusAndHeaders
from warcio.warcwriter import WARCWriter

from gpt2lib.corpus import urls
from gpt2lib.corpus.urls import Failed, Refused
from gpt2lib.data import CorpusError

HTML = ("text/html", "application/xhtml+xml")
_CHARSET = re.compile(r"""\bcharset\s*=\s*["']?([\w.:-]+)""", re.IGNORECASE | re.ASCII)
_ROBOTS_BYTES = 500 * 1024  # RFC 9309, section 2.5
_NAT64 = ipaddress.ip_network("64:ff9b::/96")
_GIVEN_OUT = ipaddress.ip_network("2000::/3")  # all of IPv6 that is (IANA, Global Unicast Address Space)
_SPECIAL = tuple(map(ipaddress.ip_network, ("192.0.0.0/24", "3fff::/20")))  # RFC 6890 and 9637; unknown to Python 3.11
_LONGEST_PAUSE = 60.0  # s, of those that a robots.txt or an answer asks for


@dataclass(frozen=True)
class Manners:
    """How pages are fetched.

    Attributes:
        agent: what the crawler calls itself; robots.txt is read for the word before the first `/` or space.
        pause: seconds between two requests to one host, at least; a `Crawl-delay` may ask for more.
        timeout: seconds that one request may take.
        max_bytes: of a page, unpacked.
        max_redirects: from one address to another.
        tries: of one request, each after twice the pause of the one before.
        hosts: how many are asked at the same time.
        per_host: pages of one host, at most; None: all that are listed.
        patience: requests in a row that a host may leave without an answer; then the rest of its pages is given up.
        allowed: networks that may be reached although they are private, such as "127.0.0.0/8" in a test.
    """

    agent: str = "gpt2lib/1 (+https://github.com/gpt2lib/gpt2lib)"
    pause: float = 1.0
    timeout: float = 30.0
    max_bytes: int = 4_000_000
    max_redirects: int = 5
    tries: int = 3
    hosts: int = 100
    per_host: int | None = None
    patience: int = 10
    allowed: tuple[str, ...] = ()

    def reachable(self, address: str) -> bool:
        """Whether an IP address lies in the public network: not private, loopback, link-local, multicast, reserved."""
        ip = ipaddress.ip_address(address.partition("%")[0])
        if any(ip in ipaddress.ip_network(network) for network in self.allowed):
            return True
        if ip in _NAT64:
            ip = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
        if (ip.version == 6 and ip not in _GIVEN_OUT) or any(ip in network for network in _SPECIAL):
            return False
        inner = getattr(ip, "sixtofour", None)
        return all(one.is_global and not one.is_multicast for one in (ip, inner) if one is not None)


class _Again(Failed):
    """The same, where another try may help, `after` seconds at least."""

    def __init__(self, reason: str, after: float = 0.0):
        super().__init__(reason)
        self.after = after


@dataclass(frozen=True)
class Page:
    url: str  # where it was found, after redirects
    headers: list[tuple[str, str]]
    body: bytes


class _PublicAddresses(AbstractResolver):
    """Names to addresses, of which those are left that may be reached: checked here, so that none can change later."""

    def __init__(self, manners):
        self.manners, self.resolver = manners, aiohttp.ThreadedResolver()

    async def resolve(self, host, port=0, family=socket.AF_INET):
        found = await self.resolver.resolve(host, port, family)
        public = [address for address in found if self.manners.reachable(address["host"])]
        if found and not public:
            raise Refused("private address")
        return public

    async def close(self):
        await self.resolver.close()


class Crawler:
    """Fetches within `async with`; robots.txt and the last request of each host are remembered."""

    def __init__(self, manners: Manners):
        self.manners, self.robots, self.last = manners, {}, {}
        self.turns, self.asking = defaultdict(asyncio.Lock), defaultdict(asyncio.Lock)

    async def __aenter__(self):
        connector = aiohttp.TCPConnector(resolver=_PublicAddresses(self.manners), limit=0, limit_per_host=1)
        self.session = aiohttp.ClientSession(
            connector=connector,
            cookie_jar=aiohttp.DummyCookieJar(),
            headers={"User-Agent": self.manners.agent, "Accept": ",".join(HTML)},
            timeout=aiohttp.ClientTimeout(total=self.manners.timeout),
        )
        return self

    async def __aexit__(self, *_):
        await self.session.close()

    async def page(self, url: str) -> Page:
        """The HTML page at a URL. Refused for what the rules forbid, Failed for what did not work."""
        url = urls.canonical(url)
        for _ in range(self.manners.max_redirects + 1):
            urls.check(url)
            answer = await self._patiently(lambda url=url: self._ask(url))
            if isinstance(answer, Page):
                return answer
            url = urls.canonical(answer, url)
        raise Refused("too many redirects")

    async def _patiently(self, ask):
        for attempt in range(1, self.manners.tries + 1):
            try:
                return await ask()
            except _Again as error:
                if attempt == self.manners.tries:
                    raise
                await asyncio.sleep(max(self.manners.pause * 2**attempt, error.after))

    async def _ask(self, url: str) -> Page | str:
        """A page, or where it has gone."""
        rules = await self._rules(url)
        if not rules.can_fetch(url, self.manners.agent):
            raise Refused("forbidden by robots.txt")
        pause = min(rules.crawl_delay(self.manners.agent) or 0.0, _LONGEST_PAUSE)
        async with self._get(url, pause) as answer:
            if 300 <= answer.status < 400 and "Location" in answer.headers:
                return answer.headers["Location"]
            if answer.status == 429 or answer.status >= 500:
                raise _busy(answer)
            if answer.status != 200:
                raise Refused(f"status {answer.status}")
            if answer.content_type not in HTML:
                raise Refused("not HTML")
            body = await self._read(answer, self.manners.max_bytes)
            if len(body) > self.manners.max_bytes:
                raise Refused("too large")
            return Page(url, [(k, v) for k, v in answer.headers.items()], body)

    async def _rules(self, url: str):
        """The robots.txt of a URL's host (RFC 9309): no such file forbids nothing, one that cannot be had all."""
        parts = urlsplit(url)
        origin = f"{parts.scheme}://{parts.netloc}"
        async with self.asking[origin]:
            if origin not in self.robots:
                try:
                    self.robots[origin] = Protego.parse(await self._robots(f"{origin}/robots.txt"))
                except _Again:
                    self.robots[origin] = Failed("robots.txt cannot be had")
                except Refused as reason:  # of where it has gone
                    self.robots[origin] = reason
        if isinstance(self.robots[origin], Exception):
            raise self.robots[origin]
        return self.robots[origin]

    async def _robots(self, url: str) -> str:
        for _ in range(5 + 1):
            answer = await self._patiently(lambda url=url: self._robots_once(url))
            if isinstance(answer, bytes):
                return answer[:_ROBOTS_BYTES].decode("utf-8", "replace")
            url = urls.canonical(answer, url)
        return ""

    async def _robots_once(self, url: str) -> bytes | str:
        async with self._get(url) as answer:
            if 300 <= answer.status < 400 and "Location" in answer.headers:
                return answer.headers["Location"]
            if answer.status == 429 or answer.status >= 500:
                raise _busy(answer)
            return await self._read(answer, _ROBOTS_BYTES) if answer.status == 200 else b""

    async def _read(self, answer, most: int) -> bytes:
        """At most `most` bytes, and one more if there are more."""
        if (answer.content_length or 0) > most and "Content-Encoding" not in answer.headers:
            return b"\0" * (most + 1)
        body = bytearray()
        async for chunk in answer.content.iter_chunked(1 << 16):
            body += chunk
            if len(body) > most:
                break
        return bytes(body[: most + 1])

    @contextlib.asynccontextmanager
    async def _get(self, url: str, pause: float = 0.0) -> AsyncIterator[aiohttp.ClientResponse]:
        """The answer to one request, in its host's turn."""
        name, clock = urls.reached(url), asyncio.get_running_loop().time
        if _is_address(name) and not self.manners.reachable(name):  # a name is checked when it is resolved
            raise Refused("private address")
        async with self.turns[name]:
            wait = self.last.get(name, -1e9) + max(pause, self.manners.pause) - clock()
            await asyncio.sleep(max(0.0, wait))
            try:
                async with self.session.get(url, allow_redirects=False) as answer:
                    yield answer
            except TimeoutError:
                raise _Again("timeout") from None
            except aiohttp.ClientConnectorDNSError:
                raise Failed("no such host") from None
            except (aiohttp.ClientError, ConnectionError) as error:
                raise _Again(f"connection: {type(error).__name__}") from None
            finally:
                self.last[name] = clock()


def _busy(answer: aiohttp.ClientResponse) -> _Again:
    after = answer.headers.get("Retry-After", "")  # seconds; dates are left alone
    return _Again(f"status {answer.status}", min(float(after), _LONGEST_PAUSE) if after.isdecimal() else 0.0)


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def crawl(addresses: Iterable[str], manners: Manners, take: Callable[[str, Page | Exception], None]) -> None:
    """`take(url, its page or the exception that it ended with)` for each address, as they come.

    That is Refused, Failed, or whatever an answer did to the client: none of them ends the crawl.
    """

    async def visit(crawler, room, own):
        async with room:
            silent = 0
            for number, url in enumerate(own):
                try:
                    if manners.per_host is not None and number >= manners.per_host:
                        raise Refused("too many of one host")
                    if silent >= manners.patience:
                        raise Failed("the host does not answer")
                    found = await crawler.page(url)
                except Exception as error:
                    found = error
                silent = 0 if isinstance(found, (Page, Refused)) else silent + isinstance(found, _Again)
                take(url, found)

    async def run():
        of_host = defaultdict(list)
        for url in addresses:
            of_host[urls.host(url)].append(url)
        room = asyncio.Semaphore(manners.hosts)
        async with Crawler(manners) as crawler, asyncio.TaskGroup() as tasks:
            for own in of_host.values():
                tasks.create_task(visit(crawler, room, own))

    asyncio.run(run())


class WarcFile:
    """Pages as response records of a file."""

    def __init__(self, file):
        self.writer = WARCWriter(file, gzip=True)

    def add(self, url: str, page: Page) -> None:
        gone = ("content-encoding", "transfer-encoding", "content-length")  # the body is unpacked
        headers = [(k, v.encode("utf-8", "replace").decode()) for k, v in page.headers if k.lower() not in gone]
        http = StatusAndHeaders("200 OK", [*headers, ("Content-Length", str(len(page.body)))], protocol="HTTP/1.1")
        ends = {"WARC-Redirected-To": page.url} if page.url != url else {}
        body = io.BytesIO(page.body)
        record = self.writer.create_warc_record(
            url, "response", body, len(page.body), http_headers=http, warc_headers_dict=ends
        )
        self.writer.write_record(record)


def read_warc(path: Path | str) -> Iterator[tuple[dict, Refused | None]]:
    """The answers in a WARC file, each with None, or with the Refused that says why it is no HTML page.

    A record has its `url`, a page also `html` (bytes) and the `charset` that its server told, or None. CorpusError for
    a file that cannot be read.
    """
    try:
        with open(path, "rb") as stream:
            for record in ArchiveIterator(stream):
                if record.rec_type != "response":
                    continue
                found, http = {"url": record.rec_headers.get_header("WARC-Target-URI")}, record.http_headers
                status = http.get_statuscode() if http is not None else ""
                if status != "200":
                    yield found, Refused(f"status {status}" if re.fullmatch("[0-9]{3}", status) else "without a status")
                    continue
                kind, _, parameters = (http.get_header("Content-Type") or "").partition(";")
                if kind.strip().lower() not in HTML:
                    yield found, Refused("not HTML")
                else:
                    html = record.content_stream().read()
                    while record.raw_stream.read(1 << 16):
                        pass
                    if getattr(record.raw_stream, "limit", 0):
                        raise CorpusError(f"{path} is cut off in the middle of a page; fetch it again")
                    charset = _CHARSET.search(parameters)
                    yield {**found, "html": html, "charset": charset and charset[1]}, None
    except (ArchiveLoadFailed, OSError, EOFError) as error:
        raise CorpusError(f"{path} is not a WARC file that can be read: {error}") from error


def read_pages(path: Path) -> Iterator[tuple[dict, Refused | None]]:
    """The same of a WARC file, or of a folder of saved pages, .html and .htm.

    Their `url` is their canonical link, or what they tell social networks (`og:url`), or "".
    """
    if path.is_file():
        yield from read_warc(path)
        return
    for page in saved_pages(path):
        html = page.read_bytes()
        tree = trafilatura.load_html(html)
        found = (
            [] if tree is None else tree.xpath("//link[@rel='canonical']/@href | //meta[@property='og:url']/@content")
        )
        yield {"url": next((url for url in map(str, found) if "://" in url), ""), "html": html}, None


def saved_pages(folder: Path) -> list[Path]:
    """Its pages, in the order of their names. CorpusError if there is none."""
    found = sorted(path for path in folder.rglob("*") if path.suffix.lower() in (".html", ".htm") and path.is_file())
    if not found:
        raise CorpusError(f"{folder} has no saved pages (.html, .htm); give a folder that does, or a WARC file")
    return found


def identity(url: str) -> str:
    """A document's name: a hash of its URL."""
    return hashlib.blake2b(url.encode("utf-8", "replace"), digest_size=10).hexdigest()
