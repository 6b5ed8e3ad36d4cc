"""From lists of URLs, WARC files or documents to clean text, as stages on Apache Beam; see `run`.

A stage reads the numbered parts of the one before and writes its own, each beside its counts. A part that is there is
not made again, so a killed run goes on where it was. What a part holds depends on its input alone: the number of
workers changes nothing. Between the machines of a runner the folder must be shared.
"""

import contextlib
import functools
import gzip
import hashlib
import json
import logging
import os
import shutil
import sys
import threading
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path

import numpy as np
from tqdm import tqdm

from gpt2lib.data import CorpusError

logging.disable(logging.WARNING)  # Beam tells at its import for which clouds it has no packages
try:
    import apache_beam as beam
    from apache_beam.metrics import Metrics
    from apache_beam.options.pipeline_options import PipelineOptions

    from gpt2lib.corpus import crawl, docstrings, duplicates, files, text, urls
    from gpt2lib.corpus.crawl import Manners
    from gpt2lib.corpus.urls import Refused
except ModuleNotFoundError as error:
    advice = "run: pip install -c constraints.txt -e '.[corpus]'"
    raise ModuleNotFoundError(
        f"{error.name} is not installed, which the stages need; {advice}", name=error.name
    ) from None
finally:
    logging.disable(logging.NOTSET)
# In a notebook Beam would rename transforms, for which it imports its data frames, which pandas 3 does not let it.
beam.pipeline.alter_label_if_ipython = lambda transform, inputs: None

PARTS, _URLS = 16, 2000  # at least so many parts, about so many URLs in one
LOCAL = (
    "--runner=DirectRunner",
    "--direct_running_mode=multi_processing",
    "--direct_num_workers=0",  # all cores
)
VERSION = 2  # of what the stages write; another one is made anew


# --- parts on disk ----------------------------------------------------------------------------------------------------


def part(folder: Path, n: int, suffix: str = ".jsonl.gz") -> Path:
    return Path(folder) / f"part-{n:05}{suffix}"


def read_part(path: Path) -> Iterator[dict]:
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        yield from map(json.loads, lines)


@contextlib.contextmanager
def _written(path: Path):
    """A binary file that is at `path` when all of it is. A worker that outlives a killed run may write it as well."""
    beside = path.with_name(f".{path.name}.{os.getpid()}.part")
    with beside.open("wb") as file:
        yield file
    os.replace(beside, path)


def write_part(path: Path, records: Iterable[dict]) -> None:
    with _written(path) as file, gzip.GzipFile("", "wb", 1, file, mtime=0) as packed:
        for record in records:
            packed.write(json.dumps(record, ensure_ascii=False).encode("utf-8", "replace") + b"\n")


def _write_json(path: Path, value) -> None:
    with _written(path) as file:
        file.write(json.dumps(value, indent=1, ensure_ascii=False).encode())


@dataclass
class Counts:
    """What became of the records of a part: `entered` = `left` + dropped by reason + dead by reason."""

    entered: int = 0
    left: int = 0
    dropped: Counter = field(default_factory=Counter)
    dead: Counter = field(default_factory=Counter)

    def __add__(self, other):
        return Counts(
            self.entered + other.entered,
            self.left + other.left,
            self.dropped + other.dropped,
            self.dead + other.dead,
        )

    def plain(self) -> dict:
        return {**vars(self), "dropped": dict(self.dropped), "dead": dict(self.dead)}

    def check(self, where) -> None:
        out = self.left + self.dropped.total() + self.dead.total()
        if self.entered != out:
            raise CorpusError(f"{where}: {self.entered} records went in, but {out} came out; remove it and run again")


def _pair(record) -> tuple:
    return record if isinstance(record, tuple) else (record,)


class Sieve:
    """Takes records through steps, counts, and keeps those that a step broke on for the dead-letter file."""

    def __init__(self, *steps: Callable[[dict], dict]):
        self.steps, self.counts, self.letters = steps, Counts(), []

    def __call__(self, records: Iterable[dict | tuple[dict, Exception | None]]) -> Iterator[dict]:
        """Those records that pass, see `take`."""
        return (passed for record in records if (passed := self.take(*_pair(record))) is not None)

    def take(self, record: dict, error: Exception | None = None) -> dict | None:
        """The record after all steps; None if it goes, as one does that has met an error already."""
        self.counts.entered += 1
        try:
            if error is not None:
                raise error
            passed = functools.reduce(lambda record, step: step(record), self.steps, record)
        except Refused as reason:
            self.counts.dropped[str(reason)] += 1
        except Exception as error:  # whatever a page does to a parser
            reason = str(error) if isinstance(error, crawl.Failed) else type(error).__name__
            self.counts.dead[reason] += 1
            about = {key: record[key] for key in ("id", "url") if key in record}
            self.letters.append({**about, "reason": reason, "message": str(error)[:500]})
        else:
            self.counts.left += 1
            return passed
        return None

    def finish(self, stage: str, folder: Path, n: int) -> None:
        """Write the dead letters and, last of all, the counts: then the part is done."""
        write_part(part(folder, n, ".dead.gz"), self.letters)
        for kind in ("dropped", "dead"):
            for reason, count in getattr(self.counts, kind).items():
                Metrics.counter(stage, f"{kind}: {reason}").inc(count)
        _write_json(part(folder, n, ".json"), self.counts.plain())


def _digest(value) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


# --- what is done with a part -----------------------------------------------------------------------------------------


def read_links(n: int, folder: Path, lists: Sequence[Path], min_score: int) -> None:
    """List n -> its URLs, canonical, without those that are blocked."""

    def address(record):
        if record["score"] is not None and record["score"] < min_score:
            raise Refused("low score")
        if not record["url"]:
            raise Refused("no link")
        return {"url": urls.check(urls.canonical(record["url"]))}

    sieve = Sieve(address)
    write_part(part(folder, n), sieve(urls.read_list(lists[n])))
    sieve.finish("links", folder, n)


def fetch(n: int, folder: Path, source: Path, manners: Manners) -> None:
    """Part n of the URLs -> a WARC file of their pages."""
    sieve = Sieve()
    with _written(part(folder, n, ".warc.gz")) as file:
        warc = crawl.WarcFile(file)

        def take(url, found):
            if isinstance(found, Exception):
                sieve.take({"url": url}, found)
            else:
                sieve.take({"url": url})
                warc.add(url, found)

        crawl.crawl((record["url"] for record in read_part(part(source, n))), manners, take)
    sieve.letters.sort(key=lambda letter: letter["url"])
    sieve.finish("pages", folder, n)


def read_pages(n: int, folder: Path, warcs: Sequence[Path], language: str | None) -> None:
    """WARC file or folder of pages n -> the texts of its pages, by id."""

    def pages():
        seen = Counter()  # pages of one address; their order in the file does not matter
        for record, problem in crawl.read_pages(warcs[n]):
            yield {"id": crawl.identity(f"{record['url']} {warcs[n].name} {seen[record['url']]}"), **record}, problem
            seen[record["url"]] += 1

    def address(record):
        if not record["url"]:
            raise urls.Refused("without an address")
        return {**record, "url": urls.check(urls.canonical(record["url"]))}

    _texts(n, folder, pages(), [address, text.extract], language)


def read_documents(n: int, folder: Path, sources: Sequence[Path], field: str, language: str | None) -> None:
    """File n -> its documents, by id."""
    name = sources[n].name
    records = (
        {"id": crawl.identity(f"{name} {i}"), "url": f"{name}#{i}", "text": document}
        for i, document in enumerate(files.documents(sources[n], field))
    )
    _texts(n, folder, records, [], language)


def _texts(n, folder, records, steps, language):
    judged = [functools.partial(text.english, language=language)] if language else []
    sieve = Sieve(*steps, text.fix, *judged, text.quality)
    write_part(part(folder, n), sorted(sieve(records), key=lambda record: record["id"]))
    sieve.finish("texts", folder, n)


def leave_out(n: int, folder: Path, source: Path) -> None:
    """Part n of the texts without those that are said to be duplicates beside it."""
    reasons = {record["id"]: record["reason"] for record in read_part(part(folder, n, ".same.gz"))}

    def first(record):
        if record["id"] in reasons:
            raise Refused(reasons[record["id"]])
        return record

    sieve = Sieve(first)
    write_part(part(folder, n), sieve(read_part(part(source, n))))
    sieve.finish("unique", folder, n)


def apart(n: int, folder: Path, source: Path, overlaps: Sequence[duplicates.Overlap]) -> None:
    """Part n of the texts without those that hold n-grams of evaluations, and which of these there were.

    The texts that go are those that hold n-grams of the last of `overlaps`.
    """
    seen = {overlap.n: [np.zeros(0, np.uint64)] for overlap in overlaps}

    def clean(record):
        for overlap in overlaps:
            hits = overlap.hits(record["text"])
            seen[overlap.n].append(hits)
        if len(hits):
            raise Refused("overlaps an evaluation")
        return record

    sieve = Sieve(clean)
    write_part(part(folder, n), sieve(read_part(part(source, n))))
    with _written(part(folder, n, ".npz")) as file:
        np.savez(file, **{str(k): np.unique(np.concatenate(hits)) for k, hits in seen.items()})
    sieve.finish("clean", folder, n)


# --- Beam -------------------------------------------------------------------------------------------------------------


class EachPart(beam.PTransform):
    """Numbers of parts -> (number, what was wrong with its input or None), when `work(n)` has written them."""

    def __init__(self, work: Callable[[int], None]):
        super().__init__()
        self.work = work

    def expand(self, numbers):
        def make(n, work):
            try:
                work(n)
            except CorpusError as error:  # which a runner may have no way to hand over
                return n, str(error)
            return n, None

        return numbers | beam.Reshuffle() | beam.Map(make, self.work)


class Links(beam.PTransform):
    """Numbers of parts of links -> (part, its URLs and None): all of a host in one part."""

    def __init__(self, source: Path, parts: int):
        super().__init__()
        self.source, self.parts = source, parts

    def expand(self, numbers):
        def of(n, source, parts):
            for record in read_part(part(source, n)):
                host = hashlib.blake2b(urls.host(record["url"]).encode(), digest_size=4)
                yield int(host.hexdigest(), 16) % parts, record["url"]

        found = numbers | beam.FlatMap(of, self.source, self.parts)
        empty = numbers.pipeline | beam.Create([(n, None) for n in range(self.parts)])
        return (found, empty) | beam.Flatten() | beam.GroupByKey()


class Same(beam.PTransform):
    """Numbers of parts of texts -> (((id, part), those of a text which says the same), reason)."""

    def __init__(self, source: Path):
        super().__init__()
        self.source = source

    def expand(self, numbers):
        def keys(n, source):
            for record in read_part(part(source, n)):
                yield (b"exact" + duplicates.exact(record["text"])), (record["id"], n)
                for key in duplicates.bands(record["text"]):
                    yield (b"near " + key), (record["id"], n)

        def edges(key, members):
            reason = "exact duplicate" if key.startswith(b"exact") else "near duplicate"
            return [(edge, reason) for edge in duplicates.pairs(members)]

        return numbers | beam.FlatMap(keys, self.source) | beam.GroupByKey() | beam.FlatMapTuple(edges)


def _write_same(edges, folder: Path, n: int) -> None:
    """For each of the n parts which of its texts go, why, and which one stays for them."""
    edges = sorted(set(edges))
    exact = {b for (_, b), reason in edges if reason == "exact duplicate"}
    stays = duplicates.components(edge for edge, _ in edges)
    gone = [[] for _ in range(n)]
    for member in sorted(stays):
        reason = "exact duplicate" if member in exact else "near duplicate"
        gone[member[1]].append({"id": member[0], "reason": reason, "same": stays[member][0]})
    for i, records in enumerate(gone):
        write_part(part(folder, i, ".same.gz"), records)
    _write_json(folder / "same.json", sum(map(len, gone)))


def _write_links(n: int, addresses: Iterable[str | None], folder: Path) -> None:
    """A part of the links, each once, in the order of their ids."""

    def links():
        before = None
        for url in sorted((url for url in addresses if url is not None), key=lambda url: (crawl.identity(url), url)):
            yield {"url": url} if url != before else ({"url": url}, Refused("duplicate"))
            before = url

    sieve = Sieve()
    write_part(part(folder, n), sieve(links()))
    sieve.finish("urls", folder, n)


# --- the run ----------------------------------------------------------------------------------------------------------


class Run:
    """The stages of one run in `folder`, one after the other."""

    def __init__(self, folder: Path, options: Sequence[str], progress: bool):
        self.folder, self.options, self.progress = folder, list(options), progress
        self.before, self.funnel = "", []

    def stage(self, name: str, made: dict, n: int, work) -> Path:
        """Make the n parts of a stage by `work(folder, numbers of those that are not there)`.

        `made` says what the stage depends on beside the stage before. Parts that were made otherwise are removed; those
        that hold what was fetched are not, CorpusError.
        """
        folder = self.folder / f"{len(self.funnel) + 1}-{name}"
        made = [VERSION, self.before, name, made, n]
        self.before = _digest(made)
        stamp = folder / "made.json"
        if not (stamp.exists() and json.loads(stamp.read_text())["hash"] == self.before):
            if name == "pages" and any(folder.glob("part-*.warc.gz")):
                raise CorpusError(
                    f"{folder} has the pages of other URLs or another version; take another folder, or remove this one"
                )
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            _write_json(stamp, {"hash": self.before, "made": made})
        missing = [i for i in range(n) if not part(folder, i, ".json").exists()]
        if missing:
            for left in folder.glob(".*.part"):
                left.unlink(missing_ok=True)
            with self._watched(name, folder, n):
                work(folder, missing)
        counts = Counts()
        for i in range(n):
            read = json.loads(part(folder, i, ".json").read_text())
            own = Counts(read["entered"], read["left"], Counter(read["dropped"]), Counter(read["dead"]))
            own.check(part(folder, i))
            counts += own
        if self.funnel and self.funnel[-1]["left"] != counts.entered:
            raise CorpusError(f"{folder}: {counts.entered} of {self.funnel[-1]['left']} records came in; run again")
        self.funnel.append({"stage": name, **counts.plain()})
        return folder

    def each(self, folder: Path, numbers: Iterable[int], work) -> None:
        """`work(n, folder=folder)` for each number, on Beam."""
        errors = folder / "errors.json"
        errors.unlink(missing_ok=True)
        numbers = list(numbers)
        with self.pipeline(len(numbers)) as pipeline:
            made = pipeline | beam.Create(numbers) | EachPart(functools.partial(work, folder=folder))
            wrong = made | beam.Filter(lambda item: item[1] is not None) | beam.combiners.ToList()
            wrong | beam.Map(lambda items, path: _write_json(path, sorted(items)), errors)
        if found := json.loads(errors.read_text()):
            raise CorpusError(found[0][1])

    def pipeline(self, parts: int) -> beam.Pipeline:
        """For so many parts: one is worked on in this process, which is done before others would have started."""
        alone = parts == 1 and self.options == list(LOCAL)
        return beam.Pipeline(options=PipelineOptions(LOCAL[:1] if alone else self.options))

    @contextlib.contextmanager
    def _watched(self, name: str, folder: Path, n: int):
        """A progress bar of the parts that are done; what Beam's processes have to say goes to beam.log."""
        ended = threading.Event()

        def done():
            return sum(part(folder, i, ".json").exists() for i in range(n))

        with _said(self.folder / "beam.log") as screen:
            with tqdm(total=n, desc=name, unit=" parts", disable=not self.progress, file=screen) as bar:

                def watch():
                    while not ended.wait(0.5):
                        bar.update(done() - bar.n)

                thread = threading.Thread(target=watch, daemon=True)
                thread.start()
                try:
                    yield
                finally:
                    ended.set()
                    thread.join()
                    bar.update(done() - bar.n)


@contextlib.contextmanager
def _said(path: Path):
    """Standard error goes to a file, of processes that are started as well; gives a stream that still reaches it.

    So do Beam's messages, which a notebook would show.
    """
    saved, logger, handler = os.dup(2), logging.getLogger("apache_beam"), logging.FileHandler(path)
    logger.addHandler(handler)
    logger.propagate = False
    try:
        own = sys.stderr.fileno() == 2
    except (OSError, ValueError, AttributeError):  # of a notebook
        own = False
    with path.open("ab") as log, open(saved, "w", buffering=1) as screen:
        sys.stderr.flush()
        os.dup2(log.fileno(), 2)
        try:
            yield screen if own else sys.stderr
        finally:
            os.dup2(saved, 2)
            logger.propagate = True
            logger.removeHandler(handler)
            handler.close()


def run(
    folder: str | PathLike,
    *,
    lists: Sequence[str | PathLike] = (),
    warcs: Sequence[str | PathLike] = (),
    source: str | PathLike | None = None,
    parts: int | None = None,
    min_score: int = urls.MIN_SCORE,
    manners: Manners = Manners(),  # noqa: B008, frozen
    language: str | None = "en",
    text_field: str = "text",
    packages: Collection[str] | None = None,
    evaluations: dict[str, list[str]] | None = None,
    n_grams: Sequence[int] = (8, 13),
    options: Sequence[str] = LOCAL,
    progress: bool = True,
) -> dict:
    """Clean text in `folder`, from one of: lists of URLs, which are fetched; WARC files; a folder of text files.

    Args:
        lists: files of URLs, see `urls.read_list`; links below `min_score` are left out.
        warcs: WARC files of pages that were fetched before, by whomever, or folders of pages saved as .html files,
            which say their address in their canonical link.
        source: what `files.documents` reads, with its `text_field`; or "docstrings", of all packages or `packages`.
        parts: in how many the URLs are cut, by host; None: 2,000 in each, but at least 16 parts.
        manners: how pages are fetched; those that are there stay as they are.
        language: of the texts to keep; None: any.
        evaluations: name -> texts; the share of their n-grams of words that the documents have is counted for each n of
            `n_grams`, and documents that have one of the last n are left out.
        options: Beam's, such as ["--runner=FlinkRunner", "--flink_master=..."]; the folder must be shared then.
        progress: show a bar for each stage.

    Returns: `texts`, the folder of the last stage, of which `corpus.build` makes a corpus; `funnel`, for each stage the
        records that `entered` and were `left`, and those `dropped` and `dead` by reason; `overlap`, for each n the
        share of each evaluation's n-grams that the texts had; `compared` and `unique`, the folders before and after
        duplicates went, see `examples`. CorpusError for input that cannot be read.
    """
    if sum(map(bool, (lists, warcs, source))) != 1:
        raise CorpusError("give one of lists (of URLs), warcs and source (a folder of texts)")
    lists, warcs = [Path(p).resolve() for p in lists], [Path(p).resolve() for p in warcs]
    for path in (*lists, *warcs):
        if not path.is_file() and not (path in warcs and path.is_dir()):
            raise CorpusError(f"the file {path} does not exist")
    this = Run(Path(folder).resolve(), options, progress)
    this.folder.mkdir(parents=True, exist_ok=True)
    if source == "docstrings":
        source = this.folder / f"docstrings-{_digest(docstrings.installed(packages))[:8]}"
        if not part(source, PARTS - 1).exists():
            source.mkdir(exist_ok=True)
            texts = list(docstrings.docstrings(packages))
            for n in range(PARTS):
                write_part(part(source, n), ({"text": text} for text in texts[n::PARTS]))
    if lists:
        made = {"lists": [files.described(p, p.name) for p in lists], "min_score": min_score}
        work = functools.partial(read_links, lists=lists, min_score=min_score)
        links = this.stage("links", made, len(lists), functools.partial(this.each, work=work))

        parts = parts or max(PARTS, this.funnel[-1]["left"] // _URLS)

        def unique(folder, _):
            with this.pipeline(len(lists)) as pipeline:
                grouped = pipeline | beam.Create(range(len(lists))) | Links(links, parts)
                grouped | beam.MapTuple(functools.partial(_write_links, folder=folder))

        addresses = this.stage("urls", {}, parts, unique)
        work = functools.partial(fetch, source=addresses, manners=manners)
        fetched = this.stage("pages", {}, parts, functools.partial(this.each, work=work))
        warcs, made = [part(fetched, n, ".warc.gz") for n in range(parts)], []
    else:
        made = [] if warcs else files.describe(source)
        for path in warcs:
            pages = [path] if path.is_file() else crawl.saved_pages(path)
            made += [files.described(page, page.relative_to(path.parent).as_posix()) for page in pages]
    if warcs:
        n, work = len(warcs), functools.partial(read_pages, warcs=warcs, language=language)
    else:
        sources = files.text_files(source)
        n, work = len(sources), functools.partial(read_documents, sources=sources, field=text_field, language=language)
    made = {"files": made, "language": language, "field": text_field}
    texts = this.stage("texts", made, n, functools.partial(this.each, work=work))

    def compare(folder, missing):
        if not (folder / "same.json").exists():
            with this.pipeline(n) as pipeline:
                edges = pipeline | beam.Create(range(n)) | Same(texts) | beam.combiners.ToList()
                edges | beam.Map(_write_same, folder, n)
        this.each(folder, missing, functools.partial(leave_out, source=texts))

    last = this.stage("unique", {}, n, compare)
    result = {"compared": texts, "unique": last, "overlap": {}}
    if evaluations:
        overlaps = [duplicates.Overlap(evaluations, k) for k in n_grams]
        made = {
            "n": list(n_grams),
            "evaluations": {
                name: hashlib.sha256("\0".join(t).encode()).hexdigest() for name, t in sorted(evaluations.items())
            },
        }
        work = functools.partial(apart, source=last, overlaps=overlaps)
        last = this.stage("clean", made, n, functools.partial(this.each, work=work))
        found = [np.load(part(last, i, ".npz")) for i in range(n)]
        for overlap in overlaps:
            hits = np.unique(np.concatenate([each[str(overlap.n)] for each in found]))
            result["overlap"][overlap.n] = overlap.shares(hits)
    return {**result, "texts": last, "funnel": this.funnel}


def examples(found: dict, count: int) -> Iterator[tuple[str, dict, dict]]:
    """Of what `run` returned: (reason, text that went, text that stayed for it), `count` of each reason."""
    chosen, left = [], Counter()
    for path in sorted(found["unique"].glob("part-*.same.gz")):
        for record in read_part(path):
            left[record["reason"]] += 1
            if left[record["reason"]] <= count:
                chosen.append(record)
    wanted = {record[key] for record in chosen for key in ("id", "same")}
    paths = sorted(found["compared"].glob("part-*.jsonl.gz"))
    texts = {record["id"]: record for path in paths for record in read_part(path) if record["id"] in wanted}
    return ((record["reason"], texts[record["id"]], texts[record["same"]]) for record in chosen)
