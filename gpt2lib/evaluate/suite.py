"""All tasks by name, the figure of each that stands in the paper's table, and what others published."""

import io
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd

from gpt2lib.config import nearest
from gpt2lib.evaluate import prompted, tasks, texts
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
        protocols: {name: f(scorer, tokenizer, files, options) -> figures, or figures and what the model wrote}, where
            `files(name)` is the path of a source. The first is the one that comes closest to the paper, as far as is
            known.
    """

    file: str
    protocols: dict[str, Callable]


def _spread(items, limit):
    """At most `limit` of them, evenly spread."""
    if limit is None or limit >= len(items):
        return items
    return [items[i] for i in np.linspace(0, len(items) - 1, limit).round().astype(int)]


def _text(name, file, detokenized):
    def run(scorer, tokenizer, files, options):
        text = texts.read(name, files(file), detokenized, options.limit)
        return perplexity(scorer, tokenizer, text, options.window, options.stride)

    return run


def _of_items(read, measure, file, **how):
    """A protocol that reads items of a file and measures them."""

    def run(scorer, tokenizer, files, options):
        return measure(scorer, tokenizer, _spread(read(files(file), **how), options.limit))

    return run


def _language(name, file):
    return Task(file, {"de-tokenized": _text(name, file, True), "as published": _text(name, file, False)})


def _plain(name, file):
    return Task(file, {"as published": _text(name, file, True)})


def _cbt(kind, split):
    file = f"cbtest_{kind}_{split}ex.txt"
    ways = {"de-tokenized": True, "as published": False}
    return Task(file, {n: _of_items(tasks.read_cbt, tasks.choose, file, detokenized=way) for n, way in ways.items()})


def _lambada(prepared, start=True):
    measure = partial(tasks.guess, start=start)
    return _of_items(tasks.read_lambada, measure, "lambada_test.jsonl", prepared=prepared)


def _winograd(partial):
    return _of_items(tasks.read_winograd, tasks.choose, "wsc273.txt", partial=partial)


def _hellaswag(harness):
    return _of_items(tasks.read_hellaswag, tasks.choose, "hellaswag_val.jsonl", harness=harness)


_EXAMPLES = 5  # in front of a question or a sentence; the paper does not say how many


def _questions(scorer, tokenizer, files, options):
    questions = prompted.read_questions(files("NQ-open.dev.jsonl"))
    examples = prompted.read_questions(files("NQ-open.train.jsonl"), _EXAMPLES)
    return prompted.answer(scorer, tokenizer, _spread(questions, options.limit), examples)


def _translations(languages):
    def run(scorer, tokenizer, files, options):
        pairs = prompted.read_wmt("wmt14", languages, files.folder_with("wmt14.en", "wmt14.fr"))
        examples = prompted.read_wmt("wmt13", languages, files.folder_with("wmt13.en", "wmt13.fr"), _EXAMPLES)
        return prompted.translate(scorer, tokenizer, _spread(pairs, options.limit), examples)

    return run


TASKS = {
    # Last token: 46.7 to 46.9% is measured with the released 117M (openai/gpt-2#131), the paper says 45.99.
    "lambada": Task(
        "lambada_test.jsonl",
        {
            "prepared": _lambada(True),
            "as published": _lambada(False),
            "lm-evaluation-harness": _lambada(False, start=False),
        },
    ),
    # The paper's split is valid: test has a book that the training text may have (section 3.2).
    "cbt-cn": _cbt("CN", "valid_2000"),
    "cbt-ne": _cbt("NE", "valid_2000"),
    # De-tokenized, windows of the whole context: 37.37 on WikiText103 with the released 117M
    # (huggingface/transformers#13761), the paper says 37.50.
    "wikitext2": _language("wikitext2", "wikitext-2.test.tokens"),
    "ptb": _language("ptb", "ptb.test.txt"),
    "enwik8": _plain("enwik8", "enwik8"),
    "text8": _plain("text8", "text8"),
    "wikitext103": _language("wikitext103", "wikitext-103.test.tokens"),
    "1bw": _language("1bw", "1bw.heldout-00000.txt"),
    # Beyond the table
    "cbt-cn-test": _cbt("CN", "test_2500"),
    "cbt-ne-test": _cbt("NE", "test_2500"),
    "winograd": Task("wsc273.txt", {"partial": _winograd(True), "full": _winograd(False)}),
    "hellaswag": Task("hellaswag_val.jsonl", {"completion": _hellaswag(False), "harness": _hellaswag(True)}),
    "webtext": _plain("webtext", "webtext.test.jsonl"),
    "webtext-valid": _plain("webtext-valid", "webtext.valid.jsonl"),
    "coqa": Task(
        "coqa-dev-v1.0.json", {"greedy": _of_items(prompted.read_coqa, prompted.converse, "coqa-dev-v1.0.json")}
    ),
    "nq": Task("NQ-open.dev.jsonl", {f"greedy, {_EXAMPLES} examples": _questions}),
    "cnn-dm": Task(
        "cnn_dailymail.test.jsonl",
        {"TL;DR:, k = 2": _of_items(prompted.read_articles, prompted.summarise, "cnn_dailymail.test.jsonl")},
    ),
    "wmt14-en-fr": Task("", {f"greedy, {_EXAMPLES} examples": _translations("en-fr")}),
    "wmt14-fr-en": Task("", {f"greedy, {_EXAMPLES} examples": _translations("fr-en")}),
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
    Column("WebText valid loss", "webtext-valid", "loss"),
    Column("CoQA F1", "coqa", "f1", 100, "higher"),
    Column("NQ exact match", "nq", "exact_match", 100, "higher"),
    Column("NQ exact match, surest 1%", "nq", "exact_match_most_confident", 100, "higher"),
    Column("CNN/DM ROUGE-1", "cnn-dm", "rouge_1", 1, "higher"),
    Column("CNN/DM ROUGE-2", "cnn-dm", "rouge_2", 1, "higher"),
    Column("CNN/DM ROUGE-L", "cnn-dm", "rouge_l", 1, "higher"),
    Column("WMT14 en-fr BLEU", "wmt14-en-fr", "bleu", 1, "higher"),
    Column("WMT14 fr-en BLEU", "wmt14-fr-en", "bleu", 1, "higher"),
)


PROBLEMS = (TextError, FetchError)  # what keeps one task from being measured, and not the others


def names(asked) -> list[str]:
    """The tasks that are asked for, `table3` and `all` among them, each once; TextError for one that there is not."""
    groups = {"table3": TABLE3, "all": tuple(TASKS)}
    for name in asked:
        if name not in TASKS and name not in groups:
            raise TextError(f"there is no task `{name}`; {nearest(str(name), [*TASKS, *groups])}")
    return list(dict.fromkeys(task for name in asked for task in groups.get(name, (name,))))


@dataclass(frozen=True)
class _Files:
    """`files(name)`: the path of a source, fetched if need be."""

    folder: Path
    download: bool
    progress: bool

    def __call__(self, name: str) -> Path:
        return locate(name, self.folder, self.download, self.progress)

    def folder_with(self, *names: str) -> Path | None:
        """The folder if it has these files; None: another library fetches them."""
        if all((self.folder / name).exists() for name in names):
            return self.folder
        if not self.download:
            raise TextError(f"{self.folder} has no {' and '.join(names)}; put them there, or allow a download")
        return None


def measure(
    name: str, scorer, tokenizer, folder, options: Options, download: bool = True, progress: bool = True
) -> tuple[dict, dict]:
    """The figures of one task, and what the model wrote if it had to: both {protocol: ...}.

    Figures are {figure: value, ..., figure_se: its standard error, unless there is only one item}; what it wrote is a
    list of {prompt, prediction, references}.

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
    files, found, wrote = _Files(Path(folder), download, progress), {}, {}
    for protocol, run in list(TASKS[name].protocols.items())[: None if options.variants else 1]:
        found[protocol] = run(scorer, tokenizer, files, options)
        if isinstance(found[protocol], tuple):
            found[protocol], wrote[protocol] = found[protocol]
        # Of one item there is no standard error.
        found[protocol] = {name: value for name, value in found[protocol].items() if not math.isnan(value)}
    return found, wrote


def columns(results: dict) -> list[dict]:
    """The tables' columns that `results` {task: figures of `measure`} has: title, value, se, n, protocol, better.

    An se of 0 means that there is none. The protocol of a text has the window and the stride, in tokens.
    """
    rows = []
    for column in COLUMNS:
        if column.task in results:
            protocol, figures = next(iter(results[column.task].items()))
            windows = [f"{name} {figures[name]}" for name in ("window", "stride") if name in figures]
            rows.append(
                {
                    "column": column.title,
                    "value": figures[column.figure] * column.scale,
                    "se": figures.get(f"{column.figure}_se", 0) * column.scale,
                    "n": figures["n"] if "n" in figures else figures["documents"],
                    "protocol": ", ".join([protocol, *windows]),
                    "better": column.better,
                }
            )
    return rows


# Figures that change with where a vocabulary cuts a word.
_BY_TOKEN = {
    "loss", "accuracy_by_token", "accuracy_last_token", "accuracy_last_token_no_stop_words", "accuracy_no_stop_words",
    "perplexity_last_token",
}  # fmt: skip


def vocabulary(results: dict, tokenizer) -> str:
    """A sentence on the figures of `results` that go by tokens, if the vocabulary is not GPT-2's; else nothing."""
    shown = {name for protocols in results.values() for figures in protocols.values() for name in figures} & _BY_TOKEN
    if tokenizer.is_gpt2 or not shown:
        return ""
    return (
        f"The vocabulary of {tokenizer.n_vocab:,} entries is not GPT-2's: figures by its tokens "
        f"({', '.join(sorted(shown)).replace('_', ' ')}) are not comparable with those of GPT-2's vocabulary; "
        "figures by words, bytes and characters are."
    )


def details(results: dict) -> list[list[dict]]:
    """Every figure of every protocol: a list of rows for each kind of task, with errors as `value ± se`."""
    tables = {}
    for task, protocols in results.items():
        for protocol, figures in protocols.items():
            row = {"task": task, "protocol": protocol}
            for name, value in figures.items():
                if not name.endswith("_se"):
                    se = figures.get(f"{name}_se")
                    row[name.replace("_", " ")] = value if se is None else f"{value:,.3f} ± {se:,.3f}"
            tables.setdefault(tuple(row), []).append(row)
    return list(tables.values())


def published() -> pd.DataFrame:
    """What others published, a row each: model, column (as in COLUMNS), value, protocol, source."""
    table = pd.read_csv(PUBLISHED / "gpt2_table3.csv", comment="#").melt("model", var_name="column")
    table = table.assign(protocol="the paper's", source="Radford et al. 2019, Table 3")
    lines = (PUBLISHED / "zero_shot.csv").read_text().splitlines(keepends=True)  # its sources have # inside
    more = pd.read_csv(io.StringIO("".join(line for line in lines if not line.startswith("#"))))
    return pd.concat([table, more], ignore_index=True)


def published_columns(model: str) -> list[dict]:
    """The paper's figures of a model, or others' of another, as `columns` has ours: no standard errors."""
    table, better = published(), {column.title: column.better for column in COLUMNS}
    rows = table[table.model == model]
    if rows.empty:
        raise TextError(f"there are no published figures of `{model}`; {nearest(model, set(table.model))}")
    if "the paper's" in set(rows.protocol):
        rows = rows[rows.protocol == "the paper's"]
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
                path = locate(TASKS[kind].file, Path(folder), download, progress)
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
