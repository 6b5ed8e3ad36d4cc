"""Tasks in which a model chooses or guesses: LAMBADA, the Children's Book Test, Winograd schemas, HellaSwag.

Readers make items from the published files; `guess` and `choose` score them.
"""

import bz2
import json
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from gpt2lib.evaluate.detokenize import detokenize
from gpt2lib.evaluate.score import Scorer
from gpt2lib.evaluate.statistics import bootstrap
from gpt2lib.evaluate.texts import TextError

_STOP_WORDS = Path(__file__).parents[2] / "data" / "published" / "stop_words.txt"
_CURLY = str.maketrans({"“": '"', "”": '"'})


@dataclass(frozen=True)
class Choice:
    """One of several texts is right.

    Attributes:
        context: the text before.
        choices: what may follow it.
        answer: the index of the right one.
        shared: how many characters at the start of each choice are not scored.
        raw: share of its lines that no de-tokenizer brings back, and that stay as they were.
    """

    context: str
    choices: list[str]
    answer: int
    shared: tuple[int, ...] = ()
    raw: float = 0.0


# --- LAMBADA (Paperno et al. 2016) ------------------------------------------------------------------------------------


def read_lambada(path, prepared: bool = True) -> list[tuple[str, str]]:
    """(context, last word with its blank) of each passage: JSON lines with `text`, or a passage a line.

    `prepared`: as openai/gpt-2#131 tells: straight double quotes, a line break before the passage.
    """
    passages = []
    for number, line in enumerate(read_lines(path), 1):
        text = read_record(path, number, line)["text"] if line.startswith("{") else line
        text = "\n" + text.translate(_CURLY).strip() if prepared else text.strip()
        context, _, word = text.rpartition(" ")
        if not context.strip() or not word:
            raise TextError(f"line {number} of {path} is no passage of several words")
        passages.append((context, f" {word}"))
    return passages


def stop_words(tokenizer) -> list[int]:
    """Ids of the tokens that are a blank and a stop word."""
    words = [line for line in _STOP_WORDS.read_text().splitlines() if line and not line.startswith("#")]
    spelled = [tokenizer.encode(f" {word}") for word in words]
    return sorted({ids[0] for ids in spelled if len(ids) == 1})


def guess(scorer: Scorer, tokenizer, passages, start: bool = True) -> dict:
    """Figures of LAMBADA, each with its standard error: n passages of (context, last word).

    `perplexity` of the last words, one unit each; `accuracy`: all tokens of the word come first, one after another;
    `..._last_token`: its last token only, given the others; `..._no_stop_words`: words of a list are never guessed.
    What is too long for the context loses its beginning. `start`: whether the end of text stands in front of a passage,
    as in training (lm-evaluation-harness has nothing there).
    """
    most = scorer.model.config.n_ctx + 1
    front = [tokenizer.end_of_text] if start else []
    words = [tokenizer.encode(word) for _, word in passages]
    texts = [
        [*front, *tokenizer.encode(context), *word][-most:] for (context, _), word in zip(passages, words, strict=True)
    ]
    counts = [min(len(word), len(text) - 1) for word, text in zip(words, texts, strict=True)]
    found = scorer.passages(texts, counts, stop_words(tokenizer))
    nats, ones = [scored.nats.sum() for scored in found], np.ones(len(texts))
    columns = {}
    for name, firsts in (
        ("", [scored.first for scored in found]),
        ("_no_stop_words", [scored.first_allowed for scored in found]),
    ):
        columns[f"accuracy{name}"] = [first.all() for first in firsts]
        columns[f"accuracy_last_token{name}"] = [first[-1] for first in firsts]
    figures = {"n": len(texts), "perplexity": float(np.exp(np.mean(nats)))}
    figures["perplexity_se"] = bootstrap(lambda nats, n: np.exp(nats / n), nats, ones)
    last = [scored.nats[-1] for scored in found]
    figures["perplexity_last_token"] = float(np.exp(np.mean(last)))
    figures["perplexity_last_token_se"] = bootstrap(lambda nats, n: np.exp(nats / n), last, ones)
    for name, hits in columns.items():
        figures |= share(name, hits)
    return figures


# --- choices ----------------------------------------------------------------------------------------------------------


def read_cbt(path, detokenized: bool = True) -> list[Choice]:
    """Items of the Children's Book Test (Hill et al. 2016): 20 numbered sentences and one with XXXXX.

    The 21st ends with a tab, the answer, two tabs and ten candidates between bars. Each candidate is scored with the
    rest of its sentence (GPT-2's paper, section 3.2).
    """

    def written(*lines):
        texts, stayed = detokenize(lines, "cbt") if detokenized else (lines, [])
        return list(texts), bool(stayed)

    items, story, raw = [], [], 0
    for number, line in enumerate(read_lines(path), 1):
        if not line.strip():
            continue
        count, _, sentence = line.partition(" ")
        if count != str(len(story) + 1):
            raise TextError(f"line {number} of {path} does not begin with {len(story) + 1}: it is no file of CBT")
        if count != "21":
            (text,), stayed = written(sentence)
            story.append(text)
            raw += stayed
            continue
        parts = sentence.split("\t")
        if len(parts) != 4 or "XXXXX" not in parts[0] or parts[1] not in parts[3].split("|"):
            raise TextError(f"line {number} of {path} is not a sentence with XXXXX, an answer and its candidates")
        candidates = parts[3].split("|")
        filled, stayed = written(*(parts[0].replace("XXXXX", candidate) for candidate in candidates))
        answer = candidates.index(parts[1])
        items.append(Choice("\n".join(story) + "\n", filled, answer, raw=(raw + stayed) / 21))
        story, raw = [], 0
    if story:
        raise TextError(f"{path} ends in the middle of a story: it was cut short; fetch it again")
    return items


def read_winograd(path, partial: bool = True) -> list[Choice]:
    """The 273 Winograd schemas: a sentence with [MASK], the pronoun, two candidates, the answer, a blank line.

    Each candidate takes the place of the pronoun. `partial` scores only what follows it, else the whole sentence counts
    (Trinh and Le 2018, section 3).
    """
    lines = [" ".join(line.split()) for line in read_lines(path)]
    items = []
    for at in range(0, len(lines), 5):
        number, (sentence, _, candidates, answer) = at + 1, (lines[at : at + 4] + [""] * 4)[:4]
        names = [name.strip() for name in candidates.split(",")]
        if "[MASK]" not in sentence or len(names) != 2 or answer not in names:
            raise TextError(f"line {number} of {path} does not begin a schema: [MASK], pronoun, candidates, answer")
        before, after = (part.strip() for part in sentence.split("[MASK]", 1))
        filled = [_placed(before, name) for name in names]
        gaps = "" if after[:1] in ".,;!?'" else " "
        shared = tuple(map(len, filled)) if partial else ()
        items.append(Choice("", [f"{text}{gaps}{after}" for text in filled], names.index(answer), shared))
    return items


def _placed(before, name):
    """A name after what is before it: a capital at the start of a sentence, none at that of an article elsewhere."""
    if not before or before.endswith((".", "!", "?")):
        return f"{before} {name[:1].upper()}{name[1:]}".strip()
    first, _, rest = name.partition(" ")
    return f"{before} {first.lower() if first in ('The', 'A', 'An', 'My', 'His', 'Her') else first} {rest}".strip()


def read_hellaswag(path, harness: bool = False) -> list[Choice]:
    """HellaSwag's validation items (Zellers et al. 2019) from JSON lines, or from text: context, answer, four endings.

    `harness`: the activity first and the context as lm-evaluation-harness cleans it; else the context as it is
    (completion style, karpathy/llm.c dev/data/hellaswag.py).
    """
    items, lines = [], read_lines(path)
    if lines[0].startswith("{"):
        for number, line in enumerate(lines, 1):
            record = read_record(path, number, line)
            try:
                context, endings, answer = record["ctx"], record["endings"], int(record["label"])
                if harness:
                    context = f"{record['activity_label']}: {record['ctx_a']} {record['ctx_b'].capitalize()}"
            except KeyError as error:
                raise TextError(f"line {number} of {path} has no {error}; fetch the file of HellaSwag again") from error
            items.append((context, endings, answer))
    else:
        for at in range(0, len(lines), 6):
            part = lines[at : at + 6]
            if len(part) < 6 or part[1] not in "0123":
                raise TextError(f"line {at + 1} of {path} does not begin an item: context, answer, four endings")
            items.append((part[0] if harness else part[0].partition(": ")[2], part[2:], int(part[1])))
    clean = _clean if harness else str
    return [Choice(clean(c), [f" {clean(ending)}" for ending in endings], answer) for c, endings, answer in items]


def _clean(text):
    text = text.strip().replace(" [title]", ". ")
    return re.sub(r"\[.*?\]", "", text).replace("  ", " ")


def choose(scorer: Scorer, tokenizer, items) -> dict:
    """Figures of a task of choices, each with its standard error.

    `accuracy`: the right one has the highest probability; `accuracy_by_token`, `accuracy_by_character`: the highest
    for each of its tokens, characters; `raw_lines`: the share of lines that no de-tokenizer brings back. What is too
    long for the context loses its beginning.
    """
    hits = {"accuracy": [], "accuracy_by_token": [], "accuracy_by_character": []}
    most = scorer.model.config.n_ctx + 1
    for item in scorer.progress(items) if scorer.progress else items:
        context = [tokenizer.end_of_text, *tokenizer.encode(item.context)]
        branches = [tokenizer.encode(choice) for choice in item.choices]
        room = most - max(map(len, branches))
        if room < 1:
            raise TextError(f"a choice of {max(map(len, branches))} tokens is longer than the context of {most - 1}")
        nats = scorer.branches(context[-room:], branches)
        if item.shared:
            given = [len(tokenizer.encode(choice[:n])) for choice, n in zip(item.choices, item.shared, strict=True)]
            nats = [losses[n:] for losses, n in zip(nats, given, strict=True)]
        sums = np.array([losses.sum() for losses in nats])
        sizes = {
            "accuracy": 1,
            "accuracy_by_token": [len(losses) for losses in nats],
            "accuracy_by_character": [len(choice.strip()) for choice in item.choices],
        }
        for name, size in sizes.items():
            hits[name].append(np.argmin(sums / size) == item.answer)
    figures = {"n": len(items)}
    for name, column in hits.items():
        figures |= share(name, column)
    return figures | {"raw_lines": float(np.mean([item.raw for item in items]))}


def share(name, hits) -> dict:
    """The share of hits, or the mean of other scores, and its standard error, as figures of that name."""
    share = float(np.mean(hits))
    return {name: share, f"{name}_se": bootstrap(lambda hits, n: hits / n, np.asarray(hits, float), np.ones(len(hits)))}


def read_lines(path) -> list[str]:
    """The lines of a text, packed by bz2 or not; TextError if it is missing, empty or not text."""
    path = Path(path)
    try:
        with (bz2.open if path.suffix == ".bz2" else open)(path, "rt", encoding="utf-8") as file:
            content = file.read()
    except FileNotFoundError as error:
        raise TextError(f"{path} is missing; fetch it, or give the folder that has it") from error
    except (UnicodeDecodeError, EOFError, OSError) as error:
        raise TextError(f"{path} cannot be read ({error}); fetch it again") from error
    if not content.strip():
        raise TextError(f"{path} is empty; fetch it again")
    return content.rstrip("\n").split("\n")


def read_record(path, number, line) -> dict:
    """What a line of JSON holds; TextError if that is no object."""
    try:
        record = json.loads(line)
        assert isinstance(record, dict)
        return record
    except (ValueError, AssertionError) as error:
        raise TextError(f"line {number} of {path} is no JSON object: was it cut short? fetch it again") from error
