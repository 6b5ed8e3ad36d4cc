"""A small web on this machine, crawled from a list of URLs to clean text, and the rules of every stage."""

import bz2
import contextlib
import dataclasses
import gzip
import http.server
import io
import json
import lzma
import os
import pickle
import random
import shutil
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

for package in ("apache_beam", "aiohttp", "protego", "trafilatura", "warcio", "zstandard"):
    pytest.importorskip(package)

import trafilatura  # noqa: E402
import zstandard  # noqa: E402
from apache_beam.options.pipeline_options import PipelineOptions  # noqa: E402
from warcio.statusandheaders import StatusAndHeaders  # noqa: E402
from warcio.warcwriter import WARCWriter  # noqa: E402

from gpt2lib import corpus  # noqa: E402
from gpt2lib.corpus import crawl, duplicates, files, pipeline, text, urls  # noqa: E402
from gpt2lib.corpus.urls import Refused  # noqa: E402
from gpt2lib.data import CorpusError  # noqa: E402

pytestmark = pytest.mark.backend_free
ROOT = Path(__file__).resolve().parent.parent

NOUNS = """river mountain garden letter window teacher market winter engine sailor village harbour forest kitchen
painter doctor bridge island journal melody captain orchard library station lantern valley meadow printer soldier mirror
basket carpet dinner festival glacier hammer iron jacket kettle ladder museum needle ocean pepper quarry ribbon saddle
temple""".split()
VERBS = "follows carries answers crosses watches repairs forgets measures praises borrows finds teaches".split()
KINDS = "quiet narrow golden bitter early distant hollow gentle crooked silver patient wooden modern ancient".split()


def article(seed: int, sentences: int = 30) -> list[str]:
    """Sentences of words drawn at random."""
    pick, out = random.Random(seed), []
    for _ in range(sentences):
        (a, b, c, d), (k, m), v = pick.choices(NOUNS, k=4), pick.choices(KINDS, k=2), pick.choice(VERBS)
        out.append(
            pick.choice(
                [
                    f"The {k} {a} {v} the {b} of the {c}, and that is what the {m} {d} has to be.",
                    f"With the {a} and the {b}, the {k} {c} {v} a {m} {d} that nobody can see.",
                    f"It is said to be of the {k} {a} that the {b} {v} with the {m} {c} of a {d}.",
                    f"They have the {a}, the {k} {b} and a {m} {c}, to be with the {d} that {v}.",
                ]
            )
        )
    return out


def changed(sentences: list[str]) -> list[str]:
    """Nearly the same: one word is another one."""
    return [*sentences[:7], sentences[7].replace(" the ", " another ", 1), *sentences[8:]]


def page(sentences: list[str], head: str = "") -> str:
    body = "".join(f"<p>{' '.join(sentences[i : i + 5])}</p>\n" for i in range(0, len(sentences), 5))
    menu = "".join(f'<li><a href="/{i}">Section {i}</a></li>' for i in range(5))
    return (
        f"<!DOCTYPE html><html><head><title>A title</title>{head}</head><body><nav><ul>{menu}</ul></nav><article>"
        f"<h1>A title</h1>\n{body}</article><footer>Copyright, all rights reserved</footer></body></html>"
    )


# --- the web ----------------------------------------------------------------------------------------------------------

SITES, ARTICLES = 12, 16  # 127.0.1.1 to 127.0.1.12, /a/0 to /a/15
PATIENT = 40  # 127.0.1.40 asks for more of it
GERMAN = ["Der Garten hinter dem Haus ist im Winter leer, und die Leute gehen nicht hin, weil es zu kalt ist."] * 2 + [
    f"Im Jahr {year} kamen die Menschen aus dem Dorf in die Stadt, um dort Arbeit und eine Wohnung zu finden."
    for year in range(1900, 1920)
]
LATIN = [
    s.replace("garden", "caf\u00e9").replace("river", "Z\u00fcrich").replace("The", "Na\u00efve") for s in article(7001)
]
SAID = [s.replace("winter", "gar\u00e7on").replace("village", "\u00cele") for s in article(7007)]
BOMB = gzip.compress(b"x" * 30_000_000)
# Where servers send a crawler that should not go there, and why it does not.
ELSEWHERE = {
    "http://[bad": "malformed address",
    "http://a..b/x": "malformed address",
    f"http://{'a' * 64}.example/": "malformed address",
    "http://127.1/": "malformed address",
    "http://caf\udce9.example/": "malformed address",  # a byte that is not UTF-8
    "http://10.0.0.1/secret": "private address",
    "http://localhost/": "private address",  # a name that resolves to one
    "http://\uff11\uff12\uff17.\uff10.\uff10.\uff11/": "private address",  # 127.0.0.1 in full width
    "https://en.wikipedia.org/wiki/GPT-2": "blocked domain",
    "https://en.\uff57ikipedia.org/wiki/GPT-2": "blocked domain",
    "file:///etc/passwd": "neither http nor https",
}
EVALUATION = [s.replace(" the ", " the same ").replace(" a ", " a certain ") for s in article(9001, 4)]


def answer(site: int, path: str) -> tuple[int, dict, bytes]:
    """What a server of the web says: status, headers, body."""
    kind, _, rest = path.partition("?")[0].lstrip("/").partition("/")
    html = {"Content-Type": "text/html; charset=utf-8"}
    pages = {
        "a": lambda: article(100 * site + int(rest)),
        "copy": lambda: article(100 + int(rest)),
        "near": lambda: changed(article(100 + int(rest))),
        "huge": lambda: ["x" * 3_000_000],
        "german": lambda: GERMAN,
        "short": lambda: ["Only this."],
        "again": lambda: ["It is said to be of the same line that they have with it."] * 60,
        "evaluation": lambda: [*article(7002), *EVALUATION, *article(7003)],
        "private": lambda: article(7004),
        "odd": lambda: article(7005),
        "once": lambda: article(7006),
    }
    if kind == "robots.txt" and site == PATIENT:
        return 200, {"Content-Type": "text/plain"}, b"User-agent: *\nCrawl-delay: 0.4\n"
    if kind == "robots.txt" and site > SITES:
        return 302, {"Location": list(ELSEWHERE)[site - SITES - 1]}, b""
    if kind == "robots.txt":
        rules = b"User-agent: *\nDisallow: /private/\n"
        return {2: 503, 3: 404}.get(site, 200), {"Content-Type": "text/plain"}, rules
    if kind in pages:
        more = {"X-Odd": "\udcff"} if kind == "odd" else {}
        return 200, {**html, **more}, page(pages[kind]()).encode()
    if kind == "slow":
        time.sleep(3)
    return {
        "moved": (301, {"Location": f"/a/{rest}"}, b""),
        "loop": (302, {"Location": "/loop/1" if rest == "0" else "/loop/0"}, b""),
        "to": (302, {"Location": list(ELSEWHERE)[int(rest) if kind == "to" else 0]}, b""),
        "bomb": (200, {**html, "Content-Encoding": "gzip"}, BOMB),
        "latin": (200, html, page(LATIN, '<meta charset="iso-8859-1">').encode("iso-8859-1")),  # which is not utf-8
        "said": (200, {"Content-Type": "text/html; charset=iso-8859-1"}, page(SAID).encode("iso-8859-1")),
        "empty": (200, html, b""),
        "broken": (503, html, b""),
        "picture": (200, {"Content-Type": "image/png"}, b"\x89PNG"),
    }.get(kind, (404, html, b"not here"))


@pytest.fixture(scope="module")
def web():
    """The port of the web, and what was asked of it: the requests, when, and how many of one host overlapped."""
    seen, inside, lock = {"requests": [], "times": [], "overlaps": 0}, {}, threading.Lock()

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self):
            host = self.connection.getsockname()[0]
            slow = "/slow/" in self.path  # given up by the crawler before it ends
            with lock:
                inside[host] = inside.get(host, 0) + (not slow)
                seen["overlaps"] += inside[host] > 1
                seen["requests"].append((host, self.path))
                seen["times"].append(time.monotonic())
            try:
                status, headers, body = answer(int(host.rpartition(".")[2]), self.path)
                if self.path.startswith("/once") and seen["requests"].count((host, self.path)) == 1:
                    status, headers, body = 503, {"Retry-After": "3600"} if "later" in self.path else {}, b""
                with lock:
                    inside[host] -= not slow
                self.send_response(status)
                for key, value in {**headers, "Content-Length": str(len(body))}.items():
                    self.send_header(key, value.encode("utf-8", "surrogateescape").decode("latin-1"))
                self.end_headers()
                self.wfile.write(body)
            except OSError:  # it has gone
                pass

        def handle(self):
            with contextlib.suppress(ConnectionResetError):
                super().handle()

        def log_message(self, *_):
            pass

    try:
        http.server.HTTPServer(("127.0.1.1", 0), Handler).server_close()  # not every system has all of 127.0.0.0/8
    except OSError:
        pytest.skip("127.0.1.1 is no address of this system")
    server = http.server.ThreadingHTTPServer(("0.0.0.0", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server.server_address[1], seen
    server.shutdown()
    server.server_close()


MANNERS = crawl.Manners(
    pause=0.0, timeout=1.0, tries=2, max_bytes=1_000_000, max_redirects=3, allowed=("127.0.1.0/24",)
)


def addresses(port: int) -> list[str]:
    def at(site, path):
        return f"http://127.0.1.{site}:{port}{path}"

    out = [at(site, f"/a/{i}") for site in range(1, SITES + 1) for i in range(ARTICLES)]
    out += [at(1, f"/a/{i}?utm_source=x#top") for i in range(5)] + [at(1, "/a/0")]
    out += [at(4, f"/copy/{i}") for i in range(5)] + [at(5, f"/moved/{i}") for i in range(5)]
    out += [at(6, f"/near/{i}") for i in range(5, 13)]
    out += [at(1, f"/{kind}/0") for kind in ("loop", "slow", "huge", "bomb")]
    out += [at(10, f"/to/{i}") for i in range(len(ELSEWHERE))] + [at(SITES + i, "/a/0") for i in (1, 8)]
    out += [at(6, "/odd/0"), at(6, "/once/0"), at(8, "/said/0")]
    out += [at(7, f"/{kind}/0") for kind in ("latin", "german", "short", "again", "empty", "broken", "picture")]
    out += [at(8, "/private/0"), at(8, "/evaluation/0"), at(9, "/none/0"), at(9, "/none/1")]
    out += ["http://10.0.0.1/", "http://169.254.169.254/latest/meta-data", "http://[::1]/"]
    out += [f"http://\uff11\uff12\uff17.\uff10.\uff10.\uff11:{port}/", "http://127\u30020\u30020\u30021/"]
    out += [f"http://{host}/" for host in ("0xA9FEA9FE", "127.1", "0x7f.1", "2130706433", "0177.0.0.1", "0")]
    out += ["http://[bad", "http://a..b/x", f"http://{'a' * 64}.example/", "https://en.\uff57ikipedia.org/wiki/GPT-2"]
    out += [
        "http://localhost/",
        "file:///etc/passwd",
        "javascript:alert(1)",
        "http://me:secret@127.0.1.1/a/1",
        "http://",
    ]
    out += ["https://en.wikipedia.org/wiki/GPT-2", "http://a.example/film.mp4", "http://a.example/x.PDF?page=1"]
    random.Random(5).shuffle(out)
    return out


FUNNEL = {
    "links": ({"neither http nor https": 2, "with a user's name": 1, "malformed address": 10, "blocked domain": 2,
               "blocked type of file": 2}, {}),
    "urls": ({"duplicate": 6}, {}),
    "pages": ({"too many redirects": 1, "private address": 10, "too large": 2, "not HTML": 1, "status 404": 2,
               "forbidden by robots.txt": 1, "malformed address": 6, "blocked domain": 2,
               "neither http nor https": 1}, {"timeout": 1, "status 503": 1, "robots.txt cannot be had": ARTICLES}),
    "texts": ({"another language": 1, "too short": 2, "no HTML": 1}, {}),
    "unique": ({"exact duplicate": 10, "near duplicate": 8}, {}),
    "clean": ({"overlaps an evaluation": 1}, {}),
}  # fmt: skip


ONE = ("--runner=DirectRunner",)  # worker, in this process
TWO = (*pipeline.LOCAL[:-1], "--direct_num_workers=2")
THREE = (*ONE, "--direct_running_mode=multi_threading", "--direct_num_workers=3")
EVALUATIONS = {"invented": [" ".join(EVALUATION)], "other": [" ".join(EVALUATION[::-1]).replace("same", "other")]}


def crawled(folder, port, **options):
    folder.mkdir(exist_ok=True)
    (folder / "urls.txt").write_text("\n".join(addresses(port)) + "\n")
    options = {"options": ONE, "parts": 4, "evaluations": EVALUATIONS, "progress": False, **options}
    return pipeline.run(folder / "run", lists=[folder / "urls.txt"], manners=MANNERS, **options)


@pytest.fixture(scope="module")
def result(web, tmp_path_factory):
    """Of one crawl, with its `seconds` and its `folder`."""
    folder = tmp_path_factory.mktemp("crawl")
    began = time.perf_counter()
    found = crawled(folder, web[0])
    return {**found, "seconds": time.perf_counter() - began, "folder": folder / "run"}


def test_from_urls_to_clean_text(web, result):
    """The exact funnel, and a text for each article in its own characters."""
    _, seen = web
    assert result["seconds"] < 60
    for row, (name, (dropped, dead)) in zip(result["funnel"], FUNNEL.items(), strict=True):
        assert (row["stage"], row["dropped"], row["dead"]) == (name, dropped, dead)
        assert row["entered"] == row["left"] + sum(dropped.values()) + sum(dead.values())
    texts = list(files.documents(result["texts"]))
    assert len(texts) == result["funnel"][-1]["left"] == (SITES - 1) * ARTICLES + 4
    for words in (("caf\u00e9", "Z\u00fcrich"), ("gar\u00e7on", "\u00cele")):
        assert any(all(word in text for word in words) for text in texts)
    assert not any("Section" in text or "Copyright" in text for text in texts)
    assert not seen["overlaps"], "one connection to a host at a time"
    assert not any(path.startswith("/private") for _, path in seen["requests"])
    assert {host for host, _ in seen["requests"]} == {f"127.0.1.{site}" for site in [*range(1, SITES + 2), SITES + 8]}
    assert seen["requests"].count(("127.0.1.6", "/once/0")) == 2
    assert result["overlap"][13] == {"invented": 1.0, "other": 0.0}
    assert result["overlap"][8]["invented"] == 1 and 0 < result["overlap"][8]["other"] < 0.5  # of the same patterns
    letters = [r for path in sorted((result["folder"] / "3-pages").glob("*.dead.gz")) for r in pipeline.read_part(path)]
    assert sorted({r["reason"] for r in letters}) == ["robots.txt cannot be had", "status 503", "timeout"]
    assert len(letters) == ARTICLES + 2 and all(r["url"].startswith("http://127.0.1.") for r in letters)


def test_a_second_run_asks_for_nothing(web, result):
    port, seen = web
    before = len(seen["requests"])
    again = crawled(result["folder"].parent, port)
    assert again["funnel"] == result["funnel"] and len(seen["requests"]) == before


def written(folder) -> dict[str, bytes]:
    """What the stages after fetching wrote, without their names' numbers."""
    kinds = ("part-*.jsonl.gz", "part-*.dead.gz", "part-*[0-9].json", "part-*.same.gz", "part-*.npz")
    names = ("texts", "unique", "clean")
    paths = [path for name in names for kind in kinds for path in folder.glob(f"*-{name}/{kind}")]
    return {f"{path.parent.name[2:]}/{path.name}": path.read_bytes() for path in paths}


def warcs(result):
    return sorted((result["folder"] / "3-pages").glob("*.warc.gz"))


def test_the_number_of_workers_changes_nothing(result, tmp_path, capfd):
    """One made the result; here are three threads, and two processes, of which each stage's start takes seconds."""
    expected = written(result["folder"])
    assert {name.partition("/")[0] for name in expected} == {"texts", "unique", "clean"}
    pipeline.run(tmp_path / "3", warcs=warcs(result), evaluations=EVALUATIONS, progress=False, options=THREE)
    assert written(tmp_path / "3") == expected
    pipeline.run(tmp_path / "2", warcs=warcs(result), progress=False, options=TWO)
    assert written(tmp_path / "2") == {name: made for name, made in expected.items() if not name.startswith("clean/")}
    assert capfd.readouterr() == ("", ""), "what Beam has to say is in a file"


def gathered(transform, numbers, folder):
    """What a transform makes of some numbers of parts, by itself, and what it counted."""
    import apache_beam as beam

    line = beam.Pipeline(options=PipelineOptions(ONE))
    made = line | beam.Create(numbers) | transform | beam.combiners.ToList()
    made | beam.Map(lambda found, path: path.write_bytes(pickle.dumps(found)), folder / "made")
    ended = line.run()
    ended.wait_until_finish()
    counted = {counter.key.metric.name: counter.committed for counter in ended.metrics().query()["counters"]}
    return pickle.loads((folder / "made").read_bytes()), counted


def test_links_of_a_host_are_in_one_part(tmp_path):
    addresses = [f"http://{host}.example/{page}" for page in range(3) for host in "abcdefgh"]
    for n in range(2):
        pipeline.write_part(pipeline.part(tmp_path, n), ({"url": url} for url in addresses[n::2]))
    made, _ = gathered(pipeline.Links(tmp_path, 5), [0, 1], tmp_path)
    parts = {n: [url for url in found if url] for n, found in made}
    assert sorted(parts) == [0, 1, 2, 3, 4], "an empty one is made too"
    assert sorted(url for found in parts.values() for url in found) == sorted(addresses)
    hosts = [{url[:16] for url in found} for found in parts.values()]
    assert len(set().union(*hosts)) == sum(map(len, hosts))


def test_same_texts_are_joined_across_parts(tmp_path):
    texts = [" ".join(f"word{i + 40 * j}" for i in range(40)) for j in range(3)]
    near = texts[1] + " again"
    for n, some in enumerate(([texts[0], texts[1]], [texts[0], near, texts[2]])):
        records = ({"id": f"{n}{i}", "text": text} for i, text in enumerate(some))
        pipeline.write_part(pipeline.part(tmp_path, n), records)
    made, _ = gathered(pipeline.Same(tmp_path), [0, 1], tmp_path)
    edges = set(made)
    assert ((("00", 0), ("10", 1)), "exact duplicate") in edges
    assert {pair for pair, _ in edges} == {(("00", 0), ("10", 1)), (("01", 0), ("11", 1))}


def test_each_part_says_what_was_wrong_with_it_and_counts(tmp_path):
    def work(n):
        if n == 2:
            raise CorpusError("part 2 is broken")
        sieve = pipeline.Sieve()
        sieve.take({"url": "a"})
        sieve.take({"url": "b"}, Refused("too odd"))
        sieve.finish("odd", tmp_path, n)

    made, counted = gathered(pipeline.EachPart(work), [0, 1, 2], tmp_path)
    found = dict(made)
    assert counted["dropped: too odd"] == 2
    assert found[0] is found[1] is None and "part 2 is broken" in str(found[2])
    counts = json.loads(pipeline.part(tmp_path, 0, ".json").read_text())
    assert (counts["entered"], counts["left"], counts["dropped"]) == (2, 1, {"too odd": 1})
    assert not pipeline.part(tmp_path, 2, ".json").exists()


def test_another_runner_writes_the_same(tmp_path):
    """Beam's portable protocol, by which Flink and Spark are reached, with a job server in this process."""
    portable = ["--runner=PortableRunner", "--job_endpoint=embed", "--environment_type=LOOPBACK"]
    stories = Path(__file__).parent / "corpus"
    for name, options in (("one", THREE), ("other", portable)):
        pipeline.run(tmp_path / name, source=stories, options=options, progress=False)
    assert written(tmp_path / "one") == written(tmp_path / "other") != {}


def test_killed_runs_go_on(web, result, tmp_path):
    """SIGKILL at random moments of fetching and later, until a run ends by itself: the same pages, the same texts."""
    program = (
        "import sys; from pathlib import Path; sys.path.insert(0, sys.argv[1]); import test_web as t;"
        "t.crawled(Path(sys.argv[2]), int(sys.argv[3]), options=sys.argv[4:])"
    )
    command = [sys.executable, "-c", program, str(ROOT / "tests"), str(tmp_path), str(web[0])]
    pick, kills, run = random.Random(3), 0, tmp_path / "run"
    for options, stage, least, most in (TWO, "3-pages", 3, 6), (THREE, "4-texts", 0, 4), (THREE, "3-pages", 300, 300):
        child = subprocess.Popen([*command, *options], env={**os.environ, "KERAS_BACKEND": "jax"})
        while child.poll() is None and not (run / stage).exists():
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(0.05)
        try:
            assert child.wait(pick.uniform(least, most)) == 0
            break
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()
            kills += 1
    assert kills and written(run) == written(result["folder"])
    assert not list(run.rglob(".*.part"))

    def pages(folder):
        found = [record for path in sorted(folder.glob("3-pages/*.warc.gz")) for record, _ in crawl.read_warc(path)]
        return sorted((record["url"], record["html"]) for record in found)

    assert pages(run) == pages(result["folder"])


def test_other_parameters_make_it_anew(result, tmp_path):
    german = [path for path in warcs(result) if any("/german/" in r["url"] for r, _ in crawl.read_warc(path))]
    first = pipeline.run(tmp_path / "run", warcs=german, progress=False, options=ONE)
    other = pipeline.run(tmp_path / "run", warcs=german, progress=False, options=ONE, language=None)
    assert first["funnel"][0]["dropped"]["another language"] == 1
    assert "another language" not in other["funnel"][0]["dropped"]


def test_what_was_fetched_is_not_removed(web, result, tmp_path):
    port, seen = web
    copy = shutil.copytree(result["folder"].parent, tmp_path / "copy")
    before = len(seen["requests"])
    with pytest.raises(
        CorpusError, match=r"3-pages has the pages of other URLs or another version; take another folder"
    ):
        crawled(copy, port, parts=5)
    assert len(list((copy / "run" / "3-pages").glob("*.warc.gz"))) == 4 and len(seen["requests"]) == before


def test_a_corpus_of_it(result, tmp_path):
    manifest = corpus.build(tmp_path / "corpus", result["texts"], n_vocab=300, progress=False)
    assert sum(s["documents"] for split in manifest["splits"].values() for s in split) == result["funnel"][-1]["left"]


def test_docstrings_go_through_the_same(tmp_path):
    result = pipeline.run(tmp_path, source="docstrings", packages=["fsspec"], progress=False, options=ONE)
    texts, unique = result["funnel"]
    assert texts["entered"] > 200 and texts["dropped"]["too short"] > 0 and unique["dropped"]["near duplicate"] > 0
    left = list(files.documents(result["texts"]))
    assert len({duplicates.exact(document) for document in left}) == len(left) == unique["left"]
    assert min(map(len, left)) >= text.MIN_CHARACTERS


# --- the rules --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "url, expected",
    [
        ("HTTP://Example.COM:80/a/../b?utm_source=x&b=2&a=1#frag", "http://example.com/b?a=1&b=2"),
        ("https://example.com", "https://example.com/"),
        ("http://example.com./x", "http://example.com/x"),
        ("http://[2001:db8::1]:8080/x", "http://[2001:db8::1]:8080/x"),
        (" https://a.example/c?fbclid=1 ", "https://a.example/c"),
        ("ftp://example.com/a", Refused),
        ("javascript:alert(1)", Refused),
        ("http://user:secret@example.com/", Refused),
        ("http://example.com:99999/", Refused),
        ("http:///a", Refused),
        ("", Refused),
        ("http://a.example//b.example/x", "http://a.example/b.example/x"),
        ("http://B\u00fccher.example/\u00e4", "http://xn--bcher-kva.example/%C3%A4"),
        ("http://\uff11\uff12\uff17.\uff10.\uff10.\uff11:80/", "http://127.0.0.1/"),
        ("http://127\u30020\u30020\u30021./", "http://127.0.0.1/"),
        ("http://en.\uff57ikipedia.org/", "http://en.wikipedia.org/"),
        ("http://[::ffff:127.0.0.1]/", "http://[::ffff:7f00:1]/"),
        ("http://a.example/\ud83d", Refused),
        ("http://[bad", Refused),
        ("http://[fe80::1%25eth0]/", Refused),
        ("http://[::1].example/", Refused),
        ("http://a..b/", Refused),
        ("http://.b/", Refused),
        ("http://a.example../", Refused),
        (f"http://{'a' * 64}.example/", Refused),
        (f"http://{'a.' * 127}example/", Refused),
        ("http://%31%32%37.0.0.1/", Refused),
        ("http://127.1/", Refused),
        ("http://127.0.0.0x1/", Refused),
        ("http://0x7f.1/", Refused),
        ("http://0X7F000001/", Refused),
        ("http://2130706433/", Refused),
        ("http://0177.0.0.1/", Refused),
        ("http://127.0.0.256/", Refused),
        ("http://0/", Refused),
    ],
)
def test_canonical_urls(url, expected):
    if expected is Refused:
        with pytest.raises(Refused):
            urls.canonical(url)
    else:
        assert urls.canonical(url) == expected == urls.canonical(expected)


def test_blocked_urls():
    for url in (
        "http://en.wikipedia.org/x",
        "http://wikipedia.org/",
        "http://a.example/b.JPG",
        "http://a.example/b.pd%66",
        urls.canonical("http://en.\uff57ikipedia\u3002org./"),
    ):
        with pytest.raises(Refused):
            urls.check(url)
    for url in ("http://notwikipedia.org/x", "http://a.example/b.html", "http://a.example/jpg"):
        assert urls.check(url) == url


def test_private_addresses():
    """Also those that are written inside an IPv6 address."""
    manners = crawl.Manners()
    for address in ("8.8.8.8", "2606:4700:4700::1111", "64:ff9b::808:808", "2002:808:808::1"):
        assert manners.reachable(address), address
    for address in (
        "127.0.0.1 10.1.2.3 172.16.0.1 192.168.1.1 169.254.169.254 100.64.0.1 0.0.0.0 224.0.0.1 255.255.255.255 ::1 :: "
        "fe80::1 fe80::1%eth0 fc00::1 ff02::1 ::ffff:10.0.0.1 ::ffff:127.0.0.1 64:ff9b::a00:1 2002:a00:1::1 "
        "fec0::1 feff::1 ::127.0.0.1 ::8.8.8.8 64:ff9b:1::a00:1 ::ffff:0:127.0.0.1 5f00::1 3fff::1 2001:db8::1 "
        "192.0.0.192"
    ).split():
        assert not manners.reachable(address), address
    assert crawl.Manners(allowed=("10.0.0.0/8",)).reachable("10.1.2.3")


def test_a_name_that_leads_inside(web, monkeypatch):
    """What counts is the address to which a name resolves when it is connected to; of several, one outside."""
    port, seen = web
    names = {
        "harmless.example": ["10.0.0.1"],
        "six.example": ["fd00::1"],
        "both.example": ["10.0.0.1", "fd00::1"],
        "mixed.example": ["127.0.2.1", "::1", "127.0.1.3", "10.0.0.1"],
    }

    def resolved(host, port, *_, **__):
        for address in names[host]:
            place = (address, port, 0, 0) if ":" in address else (address, port)
            yield (socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_STREAM, 6, "", place)

    monkeypatch.setattr(socket, "getaddrinfo", lambda *a, **k: list(resolved(*a, **k)))
    found, before = {}, len(seen["requests"])
    manners = dataclasses.replace(MANNERS, tries=1)
    crawl.crawl([f"http://{name}:{port}/a/1" for name in names], manners, lambda url, got: found.update({url: got}))
    reasons = [repr(found.pop(f"http://{name}:{port}/a/1")) for name in list(names)[:3]]
    assert reasons == [repr(Refused("private address"))] * 3
    assert [type(page) for page in found.values()] == [crawl.Page]
    assert seen["requests"][before:] == [("127.0.1.3", "/robots.txt"), ("127.0.1.3", "/a/1")]


def test_a_guest_waits(web, monkeypatch):
    """Between two requests to a host, and longer where its robots.txt or an answer asks for it, but not for an hour."""
    port, seen = web
    before = len(seen["requests"])

    def gaps(site):
        asked = zip(seen["requests"][before:], seen["times"][before:], strict=True)
        return np.diff([moment for (host, _), moment in asked if host == f"127.0.1.{site}"])

    found = {}
    listed = [f"http://127.0.1.{site}:{port}/a/{i}" for site in (1, PATIENT) for i in range(3)]
    crawl.crawl(listed, dataclasses.replace(MANNERS, pause=0.2), found.__setitem__)
    assert {type(page) for page in found.values()} == {crawl.Page}
    for site, least in ((1, 0.2), (PATIENT, 0.4)):
        assert len(gaps(site)) == 3 and gaps(site).min() > least - 0.001  # a clock's resolution
    monkeypatch.setattr(crawl, "_LONGEST_PAUSE", 0.5)
    later = f"http://127.0.1.3:{port}/once/later"
    crawl.crawl([later], MANNERS, found.__setitem__)
    assert isinstance(found[later], crawl.Page)
    assert len(gaps(3)) == 2 and gaps(3)[1] > 0.499


def test_what_no_list_should_hold(web, monkeypatch):
    """Also when a crawl is given it as it is, and whatever is taken for canonical: what is reached counts."""
    port, seen = web
    hosts = ("[bad", "\uff11\uff12\uff17.0.0.1", "127.0.0.1.", "127.1", "0x7f.1")
    listed = [f"http://{host}:{port}/a/1" for host in hosts]
    expected = ["malformed address", "private address", "private address", "malformed address", "malformed address"]
    found, before = {}, len(seen["requests"])
    crawl.crawl(listed, MANNERS, lambda url, got: found.update({url: str(got)}))
    assert [found[url] for url in listed] == expected
    monkeypatch.setattr(urls, "canonical", lambda url, base="": url)
    crawl.crawl(listed[1:], MANNERS, lambda url, got: found.update({url: str(got)}))
    assert [found[url] for url in listed] == expected and len(seen["requests"]) == before


def test_an_answer_that_breaks_the_client_is_a_dead_letter(web, tmp_path, monkeypatch):
    port, _ = web
    page = crawl.Crawler.page

    async def breaks(self, url):
        return 1 / 0 if url.endswith("/7") else await page(self, url)

    monkeypatch.setattr(crawl.Crawler, "page", breaks)
    (tmp_path / "urls").mkdir()
    listed = [{"url": f"http://127.0.1.3:{port}/a/{i}"} for i in (6, 7, 8)]
    pipeline.write_part(pipeline.part(tmp_path / "urls", 0), listed)
    pipeline.fetch(0, tmp_path, tmp_path / "urls", MANNERS)
    counts = json.loads((tmp_path / "part-00000.json").read_text())
    assert counts == {"entered": 3, "left": 2, "dropped": {}, "dead": {"ZeroDivisionError": 1}}
    letters = list(pipeline.read_part(tmp_path / "part-00000.dead.gz"))
    assert letters == [{**listed[1], "reason": "ZeroDivisionError", "message": "division by zero"}]


def test_hosts_that_do_not_answer_or_have_too_much(web):
    port, _ = web
    slow = [f"http://127.0.1.11:{port}/slow/{i}" for i in range(5)]
    many = [f"http://127.0.1.12:{port}/a/{i}" for i in range(5)]
    manners = dataclasses.replace(MANNERS, timeout=0.3, tries=1, patience=2, per_host=4)
    found = {}
    crawl.crawl(slow + many, manners, found.__setitem__)
    assert [str(found[url]) for url in slow] == ["timeout"] * 2 + ["the host does not answer"] * 2 + [
        "too many of one host"
    ]
    assert [type(found[url]) for url in many] == [crawl.Page] * 4 + [Refused]


def test_lists_of_urls(tmp_path):
    """One a line or as Pushshift has them, packed in any way."""
    plain = "http://a.example/\n\nhttp://b.example/x\n"
    shift = (
        '{"url": "http://a.example/", "score": 7}\n{"url": "http://b.example/", "score": 1}\n'
        '{"url": "https://www.reddit.com/r/x", "is_self": true, "score": 50}\n'
    )
    packers = {"": bytes, ".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress, ".zst": zstandard.compress}
    for suffix, pack in packers.items():
        (tmp_path / f"list.txt{suffix}").write_bytes(pack(plain.encode()))
        assert list(urls.read_list(tmp_path / f"list.txt{suffix}")) == [
            ({"url": "http://a.example/", "score": None}, None),
            ({"url": "http://b.example/x", "score": None}, None),
        ]
        (tmp_path / f"RS_2011-01{suffix}").write_bytes(pack(shift.encode()))
        found = [tuple(link.values()) for link, _ in urls.read_list(tmp_path / f"RS_2011-01{suffix}")]
        assert found == [("http://a.example/", 7), ("http://b.example/", 1), ("", 50)]
    pipeline.read_links(0, tmp_path, [tmp_path / "RS_2011-01.zst"], 3)
    counts = json.loads((tmp_path / "part-00000.json").read_text())
    assert counts == {"entered": 3, "left": 1, "dropped": {"low score": 1, "no link": 1}, "dead": {}}
    (tmp_path / "cut.xz").write_bytes(lzma.compress(plain.encode())[:-20])
    (tmp_path / "bad.gz").write_bytes(gzip.compress(plain.encode())[:12] + b"\xff" * 50)
    (tmp_path / "bad.zst").write_bytes(plain.encode())
    for name in ("cut.xz", "bad.gz", "bad.zst"):
        with pytest.raises(CorpusError, match=rf"{name}, after line \d+: this list of URLs cannot be read"):
            list(urls.read_list(tmp_path / name))


def test_bad_lines_of_a_list_are_kept_with_the_reason(tmp_path):
    lines = [
        '{"url": "http://a.example/1", "score": "7"}',
        '{"url": "http://a.example/2", "score": "2"}',
        '{"url": "http://a.example/3", "score": 7.5}',
        '{"url": "http://a.example/4", "score": null}',
        '{"url": "http://a.example/5", "score": "many"}',
        '{"url": "http://a.example/6", "score": [7]}',
        '{"url": "http://a.example/7", "score": NaN}',
        '{"url": "http://a.example/8", "sc',
        '{"url": ' * 100_000,
        '{"url": ["http://a.example/9"], "score": 7}',
        '{"url": "http://a.example/\\ud83d", "score": 7}',
        "http://a.example/10",
    ]
    (tmp_path / "list").write_text("\n".join(lines))
    pipeline.read_links(0, tmp_path, [tmp_path / "list"], 3)
    counts = pipeline.Counts(**json.loads((tmp_path / "part-00000.json").read_text()))
    counts.dropped, counts.dead = map(pipeline.Counter, (counts.dropped, counts.dead))
    counts.check("links")
    assert [r["url"] for r in pipeline.read_part(tmp_path / "part-00000.jsonl.gz")] == [
        f"http://a.example/{i}" for i in (1, 3, 4, 10)
    ]
    assert counts.entered == len(lines)
    assert counts.dropped == {"low score": 1, "neither http nor https": 1, "malformed address": 1}
    assert counts.dead == {"a score that is no number": 3, "not JSON": 2}
    letters = list(pipeline.read_part(tmp_path / "part-00000.dead.gz"))
    assert [letter["url"] for letter in letters] == [line[:500] for line in lines[4:9]]


GOOD = "\n".join(article(1, 20))


@pytest.mark.parametrize(
    "reason, body",
    [
        (None, GOOD),
        ("too short", GOOD[:500]),
        ("too short", "a" * 600),
        ("too long", GOOD * 800),
        ("words too short or long", "of the " + "ab " * 300),
        ("symbols", GOOD.replace(" ", " # ", 60)),
        ("a list", "\n".join(f"- {line}" for line in GOOD.splitlines())),
        ("cut lines", "\n".join(line.rstrip(".") + "\u2026" for line in GOOD.splitlines()[:3] * 3)),
        ("not made of words", GOOD + " 1234" * 200),
        ("no sentences", " ".join(NOUNS * 4)),
        ("repeated lines", GOOD + ("\n" + GOOD.splitlines()[0]) * 10),
    ],
)
def test_quality(reason, body):
    if reason is None:
        assert text.quality({"text": body}) == {"text": body}
    else:
        with pytest.raises(Refused, match=f"^{reason}$"):
            text.quality({"text": body})


@pytest.mark.parametrize(
    "head, encoding",
    [
        ('<meta charset="iso-8859-1">', "iso-8859-1"),
        ('<META http-equiv="Content-Type" content="text/html; charset=windows-1252">', "cp1252"),
        ('<meta charset="utf-8">', "utf-8"),
        ('<meta charset="iso-8859-1">', "utf-8"),  # it lies
        ('<meta charset="koi8-r">', "koi8-r"),
        ("", "utf-8-sig"),
    ],
)
def test_a_page_is_read_as_it_declares(head, encoding):
    word = "\u0433\u043e\u0440\u043e\u0434" if encoding == "koi8-r" else "Z\u00fcrich"
    sentences = [s.replace("the", word) for s in article(3)]
    for start in ("", f'<?xml version="1.0" encoding="{encoding}"?>\n'):
        html = (start + page(sentences, head)).encode(encoding)
        found = text.extract({"url": "http://example.org/", "html": html})["text"]
        assert found.count(word) > 20 and "\ufffd" not in found


@pytest.mark.parametrize("head", ["", '<meta charset="no-such-thing">', '<meta charset="utf-8">'])
def test_a_page_that_does_not_say_is_read_as_its_server_says(head, tmp_path):
    """If that is an encoding; else it is left to be guessed."""
    html = page([s.replace("winter", "z\u0142oty") for s in article(3)], head).encode("iso-8859-2")
    with (tmp_path / "a.warc.gz").open("wb") as file:
        warc = crawl.WarcFile(file)
        for i, charset in enumerate(("; charset=iso-8859-2", '; a=b; Charset="Latin2"', ";charset=undefined", "")):
            headers = [("Content-Type", f"text/html{charset}")]
            warc.add(f"http://a.example/{i}", crawl.Page(f"http://a.example/{i}", headers, html))
    records = [record for record, _ in crawl.read_warc(tmp_path / "a.warc.gz")]
    found = [text.decoded(record["html"], record["charset"]) for record in records]
    assert [type(html) for html in found] == [str, str, bytes, bytes]
    texts = list(map(text.extract, records))
    assert all(got.keys() == {"url", "text"} for got in texts)
    assert all("z\u0142oty" in got["text"] for got in texts[:2])


def test_where_no_main_text_is_found_paragraphs_are_taken():
    html = f'<html><body><div class="comments"><p>{" ".join(article(3, 5))}</p></div></body></html>'
    assert not trafilatura.extract(html, include_comments=False, include_tables=False)
    assert text.extract({"url": "", "html": html.encode()})["text"] == " ".join(article(3, 5))


def test_encodings_are_put_right():
    broken = "na\u00efve caf\u00e9 \u2014 quoted".encode().decode("cp1252")
    assert text.fix({"text": f"{broken}  \r\nx\x07"}) == {"text": "na\u00efve caf\u00e9 \u2014 quoted\nx"}


# --- duplicates -------------------------------------------------------------------------------------------------------


def overlapping(similarity: float, random_, n: int = 600) -> tuple[str, str, float]:
    """Two texts of n words, the first of which they share, and the Jaccard similarity of their sets of 5 words."""
    shared = round(n * 2 * similarity / (1 + similarity))
    a = [f"w{x}" for x in random_.integers(10**9, size=n)]
    b = a[:shared] + [f"v{x}" for x in random_.integers(10**9, size=n - shared)]
    sets = [set(zip(*(words[i:] for i in range(duplicates.SHINGLE)), strict=False)) for words in (a, b)]
    return " ".join(a), " ".join(b), len(sets[0] & sets[1]) / len(sets[0] | sets[1])


@pytest.mark.parametrize("similarity", [0.3, 0.6, 0.7, 0.8, 0.9])
def test_minhash_finds_as_many_as_theory_says(similarity):
    random_ = np.random.default_rng(round(100 * similarity))
    pairs = [overlapping(similarity, random_) for _ in range(100)]
    estimates = [np.mean(duplicates.signature(a) == duplicates.signature(b)) - true for a, b, true in pairs]
    count, true = duplicates.BANDS * duplicates.ROWS, pairs[0][2]
    deviation = (true * (1 - true) / count) ** 0.5  # of one estimate
    assert abs(np.mean(estimates)) < 4 * deviation / 10 and np.std(estimates) < 1.5 * deviation
    found = np.mean([bool(set(duplicates.bands(a)) & set(duplicates.bands(b))) for a, b, _ in pairs])
    expected = 1 - (1 - true**duplicates.ROWS) ** duplicates.BANDS
    assert abs(found - expected) < 4 * (expected * (1 - expected) / 100) ** 0.5 + 0.01


def test_what_counts_as_the_same():
    assert duplicates.exact("The  quick, brown fox!") == duplicates.exact("the quick brown\nfox")
    assert duplicates.exact("Caf\u00e9") == duplicates.exact("cafe") != duplicates.exact("coffee")
    assert duplicates.bands("") != duplicates.bands("a") and len(set(duplicates.bands("a"))) == duplicates.BANDS


def test_components():
    edges = [("b", "a"), ("c", "b"), ("x", "y"), ("e", "d"), ("d", "c"), ("x", "x")]
    assert duplicates.components(edges) == {"b": "a", "c": "a", "d": "a", "e": "a", "y": "x"}


def test_overlap_with_evaluations():
    """Against a literal count of n-grams."""
    first, second = " ".join(article(11, 6)), " ".join(article(12, 6))
    text_ = " ".join([*article(13, 5), *article(11, 6)[2:4], *article(14, 5)])
    overlap = duplicates.Overlap({"first": [first], "second": [second], "tiny": ["a few words"]}, n=8)

    def grams(string):
        words = duplicates.words(string)
        return {tuple(words[i : i + 8]) for i in range(len(words) - 7)}

    shares = overlap.shares(overlap.hits(text_))
    literal = {k: len(grams(t) & grams(text_)) / len(grams(t)) for k, t in (("first", first), ("second", second))}
    assert shares == pytest.approx({**literal, "tiny": 0.0}) and 0 < shares["first"] < 1
    assert not len(overlap.hits("a few words"))


# --- bad input --------------------------------------------------------------------------------------------------------


def test_a_page_that_breaks_a_parser_is_kept_with_the_reason(tmp_path):
    def step(record):
        return {**record, "text": 1 / record["x"]}

    sieve = pipeline.Sieve(step)
    assert [r["text"] for r in sieve([{"id": "a", "x": 1}, {"id": "b", "x": 0}, {"id": "c", "x": 2}])] == [1, 0.5]
    sieve.finish("texts", tmp_path, 0)
    assert list(pipeline.read_part(tmp_path / "part-00000.dead.gz")) == [
        {"id": "b", "reason": "ZeroDivisionError", "message": "division by zero"}
    ]


def test_answers_of_a_warc_file_that_are_no_pages(tmp_path):
    """All are counted, with the reason: what other crawlers keep as well."""
    html = ("Content-Type", "text/html")
    answers = [
        ("http://a.example/", "200 OK", [html], page(article(1))),
        ("http://a.example/gone", "404 Not Found", [html], page(article(2))),
        ("http://a.example/moved", "301 Moved", [html, ("Location", "/")], ""),
        ("http://a.example/picture", "200 OK", [("Content-Type", "image/png")], "x"),
        ("http://a.example/untyped", "200 OK", [], page(article(3))),
        ("http://a.example/broken", "so to say", [html], page(article(4))),
        ("dns:a.example", None, None, "a.example. IN A 192.0.2.1"),
    ]
    with (tmp_path / "foreign.warc.gz").open("wb") as file:
        writer = WARCWriter(file, gzip=True)
        writer.write_record(writer.create_warcinfo_record("foreign.warc.gz", {"software": "another"}))
        for url, status, headers, body in answers:
            http_ = StatusAndHeaders(status, headers, protocol="HTTP/1.1") if status else None
            record = writer.create_warc_record(
                url, "response", io.BytesIO(body.encode()), len(body), http_headers=http_
            )
            writer.write_record(record)
    found = pipeline.run(tmp_path / "run", warcs=[tmp_path / "foreign.warc.gz"], progress=False, options=ONE)
    texts = found["funnel"][0]
    assert (texts["entered"], texts["left"], texts["dead"]) == (len(answers), 1, {})
    assert texts["dropped"] == {"status 404": 1, "status 301": 1, "not HTML": 2, "without a status": 2}


def test_saved_pages_say_their_address(tmp_path):
    """Those of a folder, .html and .htm, by their canonical link; what has none is counted as such."""
    saved = tmp_path / "saved"
    (saved / "more").mkdir(parents=True)
    link = '<link rel="canonical" href="{}"/>'
    (saved / "a.html").write_text(page(article(1), link.format("https://www.Example.org/a?utm_source=x#top")))
    (saved / "more" / "b.HTM").write_text(page(article(2), '<meta property="og:url" content="http://example.com/b"/>'))
    (saved / "c.html").write_text(page(article(3), link.format("https://en.wikipedia.org/wiki/C")))
    (saved / "d.html").write_text(page(article(4)))
    (saved / "e.html").write_bytes(b"")
    (saved / "style.css").write_text("p {}")
    found = pipeline.run(tmp_path / "run", warcs=[saved], progress=False, options=ONE)
    texts = found["funnel"][0]
    assert (texts["entered"], texts["left"]) == (5, 2)
    assert texts["dropped"] == {"blocked domain": 1, "without an address": 2}
    records = [r for path in found["texts"].glob("part-*.jsonl.gz") for r in pipeline.read_part(path)]
    assert {r["url"] for r in records} == {"https://www.example.org/a", "http://example.com/b"}
    assert all(r["text"].count("that") > 10 and "Section" not in r["text"] for r in records)
    (tmp_path / "empty").mkdir()
    with pytest.raises(CorpusError, match=r"empty has no saved pages \(\.html, \.htm\)"):
        pipeline.run(tmp_path / "none", warcs=[tmp_path / "empty"], progress=False)


def test_bad_input_is_one_sentence(result, tmp_path):
    local = {"progress": False, "options": ONE}
    with pytest.raises(CorpusError, match="give one of lists"):
        pipeline.run(tmp_path / "a", **local)
    with pytest.raises(CorpusError, match=r"the file .*nowhere\.txt does not exist"):
        pipeline.run(tmp_path / "a", lists=[tmp_path / "nowhere.txt"], **local)
    (tmp_path / "cut.warc.gz").write_bytes(warcs(result)[0].read_bytes()[:5000])
    (tmp_path / "text.warc").write_text("no WARC\n" * 10)
    for name, reason in (
        ("text.warc", "is not a WARC file that can be read"),
        ("cut.warc.gz", "is cut off in the middle"),
    ):
        with pytest.raises(CorpusError, match=f"{name} {reason}"):
            pipeline.run(tmp_path / "b", warcs=[tmp_path / name], **local)


@pytest.mark.parametrize("package", ["apache_beam", "aiohttp", "tld"])
def test_what_is_not_installed_is_said(package):
    program = f"import sys; sys.modules['{package}'] = None; from gpt2lib.corpus import pipeline"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert result.returncode == 1
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith(f"ModuleNotFoundError: {package} is not installed") and "'.[corpus]'" in last


# --- the notebook -----------------------------------------------------------------------------------------------------


def test_the_notebook_shows_what_came_of_a_crawl(tmp_path):
    """01_data as a study runs it, in a kernel, on pages of several sites."""
    for folder in ("notebooks", "data/published"):
        shutil.copytree(ROOT / folder, tmp_path / folder)
    pages = {f"https://www.bbc.co.uk/{i}": page(article(8000 + i)) for i in range(30)}
    pages |= {f"http://blog.example.org/{i}": page(article(8100 + i)) for i in range(20)}
    pages |= {"https://edition.cnn.com/1": page(changed(article(8000))), "https://en.wikipedia.org/wiki/A": "x"}
    with (tmp_path / "pages.warc.gz").open("wb") as file:
        warc = crawl.WarcFile(file)
        for url, html in pages.items():
            warc.add(url, crawl.Page(url, [("Content-Type", "text/html; charset=utf-8")], html.encode()))
    evaluations = tmp_path / "data" / "benchmarks"
    evaluations.mkdir(parents=True)
    said = " ".join(article(8001)[4:8])
    (evaluations / "lambada_test.jsonl").write_text(json.dumps({"text": said}) + "\n")
    study = tmp_path / "reports" / "web"
    study.mkdir(parents=True)
    (study / "01_data.yaml").write_text(
        "# A test. Hardware: 2 CPU cores. Takes seconds.\ncorpus: data/corpora/web\nstages: data/web/test\n"
        "warcs: [pages.warc.gz]\nevaluations: [lambada, ptb]\ndownload: false\nn_vocab: 300\nn_ctx: 64\n"
    )
    result = subprocess.run(
        [sys.executable, "-m", "gpt2lib.study", "reports/web"],
        env={**os.environ, "GPT2LIB_WORKSPACE": str(tmp_path), "KERAS_BACKEND": "jax"}, capture_output=True, text=True,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-3000:]
    numbers = json.loads((study / "01_data.json").read_text())["numbers"]
    assert numbers["domains"] == {"bbc": 28, "example": 20, "cnn": 1} or numbers["domains"] == {
        "bbc": 29,
        "example": 20,
    }
    assert [at["dropped"] for at in numbers["funnel"]] == [
        {"blocked domain": 1}, {"near duplicate": 1}, {"overlaps an evaluation": 1},
    ]  # fmt: skip
    assert [row["text"] for row in numbers["overlap"]] == ["lambada"] and numbers["overlap"][0]["13-grams, %"] == 100
    assert len(numbers["minhash_recall"]) > 3
    names = {path.name for path in (study / "figures").glob("*.png")}
    assert names == {f"01_data{name}.png" for name in ("", "-funnel", "-domains", "-recall")}
    notebook = (study / "01_data.ipynb").read_text()
    assert str(tmp_path) not in notebook and "WARNING" not in notebook and "ptb is left out" in notebook
