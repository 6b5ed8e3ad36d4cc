"""How the 2019 replication (ConnorJL/GPT2, `inputs.py`) came to its batches, each of its ways as an option of its own.

What training uses otherwise is `data.Batches`. `config.Reading` has the options.
"""

from collections.abc import Iterator

import numpy as np

from gpt2lib.config import Reading
from gpt2lib.data import Corpus, CorpusError


def seen(batches, steps: int) -> tuple[int, int]:
    """Of how many documents of the split the first `steps` batches of a `ReadBatches` or `data.Batches` are, and of how
    many tokens: those of the documents that windows are taken from, or of the distinct windows of the whole text.
    """
    if isinstance(batches, ReadBatches):
        documents = {document for step in range(steps) for row in batches.documents(step) for document in row}
        return len(documents), int(batches.lengths[list(documents)].sum())
    corpus, n_ctx = batches.corpus, batches.n_ctx
    ends = np.flatnonzero(corpus.tokens("train")[:] == corpus.tokenizer.end_of_text)
    starts = np.unique([window for step in range(steps) for window in batches.windows(step)]) * n_ctx
    first, last = np.searchsorted(ends, starts), np.searchsorted(ends, starts + n_ctx)
    edges = np.zeros(len(ends) + 2, np.int64)
    np.add.at(edges, first, 1)
    np.add.at(edges, last + 1, -1)
    return int((np.cumsum(edges)[: len(ends)] > 0).sum()), len(starts) * n_ctx


class ReadBatches:
    """`batches[step]` -> int32 [B / n_hosts, T + 1], as `data.Batches` gives them, but read as `options` say.

    A pure function of the corpus, options, seed, batch size B over all hosts, and the step: a step that was not the one
    after the last is reached by going through those before it, from where the data began for the last time.
    """

    def __init__(
        self,
        corpus: Corpus,
        options: Reading,
        *,
        batch_size: int,
        n_ctx: int,
        seed: int = 0,
        host: int = 0,
        n_hosts: int = 1,
    ):
        """Raises CorpusError if hosts cannot share a batch evenly, or no document is long enough for `long_share`."""
        if batch_size % n_hosts or not 0 <= host < n_hosts:
            raise CorpusError(f"host {host} of {n_hosts} cannot take an equal part of a batch of {batch_size}")
        if batch_size % options.hosts:
            raise CorpusError(f"Reading.hosts ({options.hosts}) cannot share a batch of {batch_size} evenly")
        self.batch_size, self.n_ctx, self.options, self.seed = batch_size, n_ctx, options, seed
        self._part = slice(host * batch_size // n_hosts, (host + 1) * batch_size // n_hosts)
        tokens = corpus.tokens("train")
        self._tokens = tokens[:]
        ends = np.flatnonzero(self._tokens == corpus.tokenizer.end_of_text) + 1
        self._starts, self._ends = np.concatenate([[0], ends[:-1]]), ends
        self.lengths = self._ends - self._starts  # of the documents, with their ends of text
        if len(self._tokens) < n_ctx + 2:
            raise CorpusError(
                f"the train split of {corpus.folder} has {len(self._tokens)} tokens, too few for a window"
            )
        self._all = np.arange(len(ends))
        if options.mixed:
            self._all = np.random.Generator(np.random.Philox(2019)).permutation(self._all)
        self._long = self._all[self.lengths[self._all] >= options.long_tokens]
        if options.long_share and not len(self._long):
            raise CorpusError(f"no document of {corpus.folder} has {options.long_tokens} tokens, as long_share wants")
        self._streams = {}

    def __getitem__(self, step: int) -> np.ndarray:
        return np.stack([row for row, _ in self._rows(step)[self._part]])

    def windows(self, step: int) -> list[list[int]]:
        """For each row, the document that it begins in and the place in it."""
        return [
            [int(document), int(start - self._starts[document])] for _, ((document, start), *_) in self._where(step)
        ]

    def documents(self, step: int) -> list[list[int]]:
        """For each row, the documents that its T + 1 tokens are of, by their number in the split, from 0."""
        return [[int(document) for document, _ in places] for _, places in self._where(step)]

    def _where(self, step):
        return self._rows(step)[self._part]

    def _rows(self, step: int) -> list[tuple[np.ndarray, list]]:
        """Of all hosts, for each row its tokens and the places [document, token of the split] they are from."""
        if step < 0:
            raise IndexError(f"steps count from 0, got {step}")
        segment, at = divmod(step, self.options.restart_every or step + 1)
        rows = []
        for host in range(self.options.hosts):
            now, done, stream = self._streams.get(host, (None, 0, None))
            if now != segment or done > at:
                done, stream = 0, self._stream(segment, host)
            each = self.batch_size // self.options.hosts
            for _ in range((at - done) * each):
                next(stream)
            rows += [next(stream) for _ in range(each)]
            self._streams[host] = segment, at + 1, stream
        return rows

    def _stream(self, segment: int, host: int) -> Iterator[tuple[np.ndarray, list]]:
        """The windows that one host reads after the data began for the `segment`-th time."""
        o = self.options
        shuffles = o.buffer is not None or o.stitch is not None  # without a seed: each host has an order of its own
        random = np.random.Generator(np.random.Philox(np.random.SeedSequence([self.seed, segment, host * shuffles])))
        usual = self._cut(self._in_order(self._all, o.buffer, random, 1 - o.long_share, o.stitch), o.stitch, random)
        if not o.long_share:
            yield from usual
        stitch = None if o.stitch is None else 2
        buffer = o.buffer and min(o.buffer, 2000)
        long = self._cut(self._in_order(self._long, buffer, random, o.long_share, stitch), stitch, random)
        while True:
            yield next(long if random.random() < o.long_share else usual)

    def _in_order(self, documents, buffer, random, share, stitch) -> Iterator[int]:
        """Documents without end: as they lie, through a buffer of which one is drawn at a time; or all shuffled.

        A `share` of the windows is of them, each cut from `stitch` documents.
        """
        o = self.options
        if buffer is None and o.restart_every is None:
            while True:
                yield from random.permutation(documents)
        if buffer is None:  # those that are read before the next beginning, shuffled among themselves
            n = share * o.restart_every * self.batch_size / o.hosts
            first = documents[: max(1, round(n * (stitch or self.n_ctx / self.lengths[documents].mean())))]
            while True:
                yield from random.permutation(first)
        held, at = list(documents[:buffer]), buffer
        while True:
            i = random.integers(len(held))
            yield held[i]
            held[i] = documents[at % len(documents)]
            at += 1

    def _cut(self, documents, stitch, random) -> Iterator[tuple[np.ndarray, list]]:
        """Windows of documents one after the other: all that there are, or one at random from each `stitch`."""
        if stitch is not None:
            while True:
                group = [next(documents) for _ in range(stitch)]
                while self.lengths[group].sum() < self.n_ctx + 2:
                    group.append(next(documents))
                text, places = self._joined(group)
                start = random.integers(len(text) - self.n_ctx - 1)  # as in 2019, the last token is never a label
                yield self._window(text, places, start)
        text, places = self._joined([next(documents)])
        while True:
            while len(text) < self.n_ctx + 1:
                more, theirs = self._joined([next(documents)])
                places += [(document, start, at + len(text)) for document, start, at in theirs]
                text = np.concatenate([text, more])
            yield self._window(text, places, 0)
            text = text[self.n_ctx :]  # the last label is the next first token
            places = [(document, start, at - self.n_ctx) for document, start, at in places]
            while len(places) > 1 and places[1][2] <= 0:
                places.pop(0)

    def _joined(self, group):
        """The tokens of documents, each with its end of text, and (document, its start in the split, its place)."""
        text = np.concatenate([self._tokens[self._starts[d] : self._ends[d]] for d in group])
        places = np.cumsum([0, *self.lengths[group[:-1]]])
        return text, [(d, self._starts[d], at) for d, at in zip(group, places, strict=True)]

    def _window(self, text, places, start):
        stop, inside = start + self.n_ctx + 1, []
        for i, (document, begin, at) in enumerate(places):
            end = places[i + 1][2] if i + 1 < len(places) else len(text)
            if at < stop and end > start:
                inside.append((document, begin + max(0, start - at)))
        return text[start:stop].astype(np.int32), inside
