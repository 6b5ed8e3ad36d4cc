"""All tasks by name, the figure of each that stands in the paper's table, and what others published."""

import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from gpt2lib.config import nearest
from gpt2lib.evaluate import tasks, texts
from gpt2lib.evaluate.perplexity import perplexity
from gpt2lib.evaluate.sources import locate
from gpt2lib.evaluate.texts import TextError
from gpt2lib.fetch import FetchError

PUBLISHED = Path(__file__).parents[2] / "data" / "published"


@dataclass(frozen=True)
class Options:
    """How tasks are measured.

    Attributes:
        limit: passages, items or documents at most, evenly spread (of one long text its beginning); None: all.
        window, stride: of `Scorer.text`, for texts longer than the context.
        variants: measure the other protocols too, such as texts as they were published.
    """

    limit: int | None = None
    window: int | None = None
    stride: int | None = None
    variants: bool = True


@dataclass(frozen=True)
class Task:
    """One task.

    Attributes:
        file: in `sources.SOURCES`.
        protocols: {name: f(scorer, tokenizer, path, options) -> figures}. The first is the one that comes closest to
            the paper, as far as is known.
    """

    file: str
    protocols: dict[str, Callable]


def _spread(items, limit):
    """At most `limit` of them, evenly spread."""
    if limit is None or limit >= len(items):
        return items
    return [items[i] for i in np.linspace(0, len(items) - 1, limit).round().astype(int)]


def _text(name, detokenized):
    def measure(scorer, tokenizer, path, options):
        text = texts.read(name, path, detokenized, options.limit)
        return perplexity(scorer, tokenizer, text, options.window, options.stride)

    return measure


def _lambada(prepared):
    def measure(scorer, tokenizer, path, options):
        return tasks.guess(scorer, tokenizer, _spread(tasks.read_lambada(path, prepared), options.limit))

    return measure


def _choice(read, **how):
    def measure(scorer, tokenizer, path, options):
        return tasks.choose(scorer, tokenizer, _spread(read(path, **how), options.limit))

    return measure


def _language(name, file):
    return Task(file, {"de-tokenized": _text(name, True), "as published": _text(name, False)})


def _cbt(kind, split):
    protocols = {
        "de-tokenized": _choice(tasks.read_cbt, detokenized=True),
        "as published": _choice(tasks.read_cbt, detokenized=False),
    }
    return Task(f"cbtest_{kind}_{split}ex.txt", protocols)


TASKS = {
    # Last token: 46.7 to 46.9% is measured with the released 117M (openai/gpt-2#131), the paper says 45.99.
    "lambada": Task("lambada_test.jsonl", {"prepared": _lambada(True), "as published": _lambada(False)}),
    # The paper's split is valid: test has a book that the training text may have (section 3.2).
    "cbt-cn": _cbt("CN", "valid_2000"),
    "cbt-ne": _cbt("NE", "valid_2000"),
    # De-tokenized, windows of the whole context: 37.37 on WikiText103 with the released 117M
    # (huggingface/transformers#13761), the paper says 37.50.
    "wikitext2": _language("wikitext2", "wikitext-2.test.tokens"),
    "ptb": _language("ptb", "ptb.test.txt"),
    "enwik8": Task("enwik8", {"as published": _text("enwik8", False)}),
    "text8": Task("text8", {"as published": _text("text8", False)}),
    "wikitext103": _language("wikitext103", "wikitext-103.test.tokens"),
    "1bw": _language("1bw", "1bw.heldout-00000.txt"),
    # Beyond the table
    "cbt-cn-test": _cbt("CN", "test_2500"),
    "cbt-ne-test": _cbt("NE", "test_2500"),
    "winograd": Task(
        "wsc273.txt",
        {
            "partial": _choice(tasks.read_winograd, partial=True),
            "full": _choice(tasks.read_winograd, partial=False),
        },
    ),
    "hellaswag": Task(
        "hellaswag_val.jsonl",
        {
            "completion": _choice(tasks.read_hellaswag, harness=False),
            "harness": _choice(tasks.read_hellaswag, harness=True),
        },
    ),
    "webtext": Task("webtext.test.jsonl", {"as published": _text("webtext", False)}),
}
TABLE3 = tuple(TASKS)[:9]


@dataclass(frozen=True)
class Column:
    """A figure of a table: its title, the task and the figure that it is, what it is multiplied by, which is better."""

    title: str
    task: str
    figure: str
    scale: float = 1.0
    better: str = "lower"


COLUMNS = (
    Column("LAMBADA ppl", "lambada", "perplexity"),
    Column("LAMBADA acc", "lambada", "accuracy_last_token", 100, "higher"),
    Column("CBT-CN acc", "cbt-cn", "accuracy", 100, "higher"),
    Column("CBT-NE acc", "cbt-ne", "accuracy", 100, "higher"),
    Column("WikiText2 ppl", "wikitext2", "perplexity"),
    Column("PTB ppl", "ptb", "perplexity"),
    Column("enwik8 bpb", "enwik8", "bits_per_byte"),
    Column("text8 bpc", "text8", "bits_per_character"),
    Column("WikiText103 ppl", "wikitext103", "perplexity"),
    Column("1BW ppl", "1bw", "perplexity"),
    Column("CBT-CN test acc", "cbt-cn-test", "accuracy", 100, "higher"),
    Column("CBT-NE test acc", "cbt-ne-test", "accuracy", 100, "higher"),
    Column("Winograd acc", "winograd", "accuracy", 100, "higher"),
    Column("HellaSwag acc_norm", "hellaswag", "accuracy_by_token", 100, "higher"),
    Column("WebText loss", "webtext", "loss"),
)


PROBLEMS = (TextError, FetchError)  # what keeps one task from being measured, and not the others


def names(asked) -> list[str]:
    """The tasks that are asked for, `table3` and `all` among them, each once; TextError for one that there is not."""
    groups = {"table3": TABLE3, "all": tuple(TASKS)}
    for name in asked:
        if name not in TASKS and name not in groups:
            raise TextError(f"there is no task `{name}`; {nearest(str(name), [*TASKS, *groups])}")
    return list(dict.fromkeys(task for name in asked for task in groups.get(name, (name,))))


def measure(name: str, scorer, tokenizer, folder, options: Options, download: bool = True, progress=True) -> dict:
    """The figures of one task: {protocol: {figure: value, ..., figure_se: its standard error}}.

    Args:
        name: in TASKS.
        scorer: `score.Scorer` of the model.
        tokenizer: of the model.
        folder: of the benchmarks' files.
        options: how.
        download: whether a file that is not there is fetched from its public address.
        progress: whether downloads show a bar.

    Raises: TextError or FetchError with a sentence that says what is not as it should be.
    """
    (name,) = names([name])
    if tokenizer.n_vocab > scorer.model.config.n_vocab:
        raise TextError(
            f"the tokenizer has {tokenizer.n_vocab} entries and the model {scorer.model.config.n_vocab}: they are not "
            "of each other; give the model's own"
        )
    task = TASKS[name]
    path = locate(task.file, folder, download, progress)
    protocols = list(task.protocols.items())[: None if options.variants else 1]
    return {protocol: run(scorer, tokenizer, path, options) for protocol, run in protocols}


def columns(results: dict) -> list[dict]:
    """The tables' columns that `results` {task: measure(...)} has: title, value, se, n, protocol, better."""
    rows = []
    for column in COLUMNS:
        if column.task in results:
            protocol, figures = next(iter(results[column.task].items()))
            rows.append(
                {
                    "column": column.title,
                    "value": figures[column.figure] * column.scale,
                    "se": figures[f"{column.figure}_se"] * column.scale,
                    "n": figures.get("n", figures.get("documents")),
                    "protocol": protocol,
                    "better": column.better,
                }
            )
    return rows


def details(results: dict) -> list[dict]:
    """Every figure of every protocol, a row each: task, protocol, figure, value, se (NaN for counts)."""
    return [
        {
            "task": task,
            "protocol": protocol,
            "figure": figure,
            "value": value,
            "se": figures.get(f"{figure}_se", np.nan),
        }
        for task, protocols in results.items()
        for protocol, figures in protocols.items()
        for figure, value in figures.items()
        if not figure.endswith("_se")
    ]


def published() -> pd.DataFrame:
    """What others published, a row each: model, column (as in COLUMNS), value, protocol, source."""
    table = pd.read_csv(PUBLISHED / "gpt2_table3.csv", comment="#").melt("model", var_name="column")
    table = table.assign(protocol="the paper's", source="Radford et al. 2019, Table 3")
    lines = (PUBLISHED / "zero_shot.csv").read_text().splitlines(keepends=True)  # its sources have # inside
    more = pd.read_csv(io.StringIO("".join(line for line in lines if not line.startswith("#"))))
    return pd.concat([table, more], ignore_index=True)


def published_columns(model: str) -> list[dict]:
    """The paper's figures of a model, as `columns` has ours: no standard errors."""
    table, better = published(), {column.title: column.better for column in COLUMNS}
    rows = table[(table.model == model) & (table.protocol == "the paper's")]
    if rows.empty:
        raise TextError(f"there are no published figures of `{model}`; {nearest(model, set(table.model))}")
    return [
        {
            "column": row.column,
            "value": row.value,
            "se": 0.0,
            "n": None,
            "protocol": row.protocol,
            "better": better[row.column],
        }
        for row in rows.itertuples()
    ]


def documents(kinds, count: int, corpus, folder, download: bool = True, progress=True) -> tuple[dict, dict]:
    """Documents to read side by side, of each kind `count` at most, evenly spread: ({kind: texts}, {kind: problem}).

    Args:
        kinds: `validation` for the split of the corpus, or names in `texts.TEXTS`.
        count: of each kind.
        corpus: data.Corpus, or None.
        folder, download, progress: as in `measure`.
    """
    found, problems = {}, {}
    for kind in kinds:
        try:
            if kind == "validation":
                if corpus is None:
                    raise TextError("there is no corpus that all runs were trained on")
                ids, end = corpus.tokens("validation")[:], corpus.tokenizer.end_of_text
                pieces = np.split(ids, np.flatnonzero(ids == end))
                some = [piece[piece != end] for piece in pieces]
                found[kind] = [
                    corpus.tokenizer.decode(piece.tolist()) for piece in _spread([p for p in some if len(p)], count)
                ]
            elif kind not in texts.TEXTS:
                raise TextError(f"there is no text `{kind}`; {nearest(str(kind), ['validation', *texts.TEXTS])}")
            else:
                path = locate(TASKS[kind].file, folder, download, progress)
                found[kind] = _spread(texts.read(kind, path).documents, count)
        except PROBLEMS as problem:
            problems[kind] = str(problem)
    return found, problems


def beside(results: dict, models) -> pd.DataFrame:
    """Ours beside the published figures of some models: a row for each pair of a column and a published figure.

    `standard errors` is (ours - published) / the standard error of ours; published figures have none of their own.
    """
    rows = []
    others = published()
    for row in columns(results):
        for other in others[(others.column == row["column"]) & others.model.isin(list(models))].itertuples():
            difference = row["value"] - other.value
            rows.append(
                {
                    "column": row["column"],
                    "ours": row["value"],
                    "se": row["se"],
                    "n": row["n"],
                    "ours by": row["protocol"],
                    "model": other.model,
                    "published": other.value,
                    "published by": other.protocol,
                    "source": other.source,
                    "difference": difference,
                    "standard errors": difference / row["se"] if row["se"] else float("nan"),
                }
            )
    return pd.DataFrame(rows)
