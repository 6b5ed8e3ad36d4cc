"""Tasks that GPT-2's paper showed by prompting (sections 3.5 to 3.8): answers, summaries, translations.

Readers make items from the published files. `converse`, `answer`, `summarise` and `translate` let a model write, and
return the figures and what was written. Every prompt begins with the end of text, as texts did in training, except one
that had to lose its beginning. A scorer brings the model, the size of the batches and the progress bar.
"""

import collections
import json
import re
import string
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from gpt2lib.evaluate.score import Scorer
from gpt2lib.evaluate.statistics import bootstrap
from gpt2lib.evaluate.tasks import read_lines, read_record, share
from gpt2lib.evaluate.texts import TextError
from gpt2lib.sample import generate

_HINT = "\nTL;DR:"
_MULTIPLE = 128  # prompts are padded to a multiple: as many programs are compiled at most as it goes into n_ctx
_TAIL = 200  # characters of a prompt that are shown beside what was written
_INSTALL = "run: pip install -c constraints.txt -e '.[evaluate]'"


@dataclass(frozen=True)
class Story:
    """A text, and a conversation about it."""

    text: str
    questions: list[str]
    answers: list[list[str]]  # of each question: the one of the conversation, then those of other people


@dataclass(frozen=True)
class Question:
    """A question, and what counts as an answer."""

    text: str
    answers: list[str]


@dataclass(frozen=True)
class Article:
    """A text, and the sentences that sum it up."""

    text: str
    highlights: list[str]


# --- writing ----------------------------------------------------------------------------------------------------------


def _write(scorer: Scorer, tokenizer, prompts, length, end, **sampling) -> list[list[int]]:
    """New ids of each prompt, up to `end` or the end of text; prompts of like length are continued together."""
    left = sorted(range(len(prompts)), key=lambda i: len(prompts[i]), reverse=True)  # the largest batch first
    groups, out = [], [None] * len(prompts)
    while left:
        width = -(-len(prompts[left[0]]) // _MULTIPLE) * _MULTIPLE + length
        rows = min(max(1, scorer.batch_tokens // width), len(prompts))
        groups.append((rows, left[:rows]))
        left = left[rows:]
    for rows, group in scorer.progress(groups) if scorer.progress else groups:
        batch = [prompts[i] for i in group]
        batch += batch[-1:] * (rows - len(batch))  # as many rows as the program has
        options = {"end_of_text": end, "multiple": _MULTIPLE, **sampling}
        for i, ids in zip(group, generate(scorer.model, batch, length, **options), strict=False):
            out[i] = ids[: ids.index(tokenizer.end_of_text)] if tokenizer.end_of_text in ids else ids
    return out


def _lines(scorer: Scorer, tokenizer, prompts, length) -> tuple[list[list[int]], list[list[int]]]:
    """Prompts that fit, and the ids of the line that is the greedy continuation of each, without its end."""
    room = _room(scorer, length)
    prompts = [[tokenizer.end_of_text, *tokenizer.encode(prompt)][-room:] for prompt in prompts]
    (newline,) = tokenizer.encode("\n")
    lines = []
    for ids in _write(scorer, tokenizer, prompts, length, newline, temperature=0):
        ends = (i for i, token in enumerate(ids) if "\n" in tokenizer.decode([token]))  # several blanks in one token
        lines.append(ids[: next(ends, len(ids))])
    return prompts, lines


def _room(scorer, length, least=1) -> int:
    """How many tokens a prompt may have."""
    room = scorer.model.config.n_ctx - length
    if room < least:
        raise ValueError(
            f"{length} new tokens leave no room for a prompt in a context of {scorer.model.config.n_ctx}; "
            "ask for fewer, or take a model with a longer context"
        )
    return room


def _shown(prompts, predictions, references) -> list[dict]:
    rows = zip(prompts, predictions, references, strict=True)
    return [{"prompt": p[-_TAIL:], "prediction": said, "references": refs} for p, said, refs in rows]


def _some(things, limit, path):
    if not things:
        raise TextError(f"{path} holds nothing to ask a model about; fetch it again")
    return things[:limit]


# --- agreement of answers (Rajpurkar et al. 2016, SQuAD) --------------------------------------------------------------


def normalise(text: str) -> str:
    """Lower case, without punctuation, articles (a, an, the) and needless blanks."""
    text = "".join(character for character in text.lower() if character not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def same(prediction: str, reference: str) -> float:
    """1 if both are equal when normalised, else 0: exact match."""
    return float(normalise(prediction) == normalise(reference))


def overlap(prediction: str, reference: str) -> float:
    """F1 of the words that both have, normalised; of two empty answers 1, of an empty and another 0."""
    words, expected = normalise(prediction).split(), normalise(reference).split()
    if not words or not expected:
        return float(words == expected)
    common = (collections.Counter(words) & collections.Counter(expected)).total()
    return 2 * common / (len(words) + len(expected))


def among(score, prediction: str, references: list[str]) -> float:
    """The highest score that an answer has with any of several references, each left out in turn, on average.

    So people, each compared with the others, and a model are measured alike (official scorer of CoQA, Reddy et al.
    2019, section 5.1). With one reference: its score.
    """
    scores = [score(prediction, reference) for reference in references]
    if len(scores) == 1:
        return scores[0]
    return float(np.mean([max(scores[:i] + scores[i + 1 :]) for i in range(len(scores))]))


# --- CoQA (Reddy et al. 2019) -----------------------------------------------------------------------------------------


def read_coqa(path, limit: int | None = None) -> list[Story]:
    """The stories of `coqa-dev-v1.0.json`, at most the first `limit`."""
    content = "\n".join(read_lines(path))
    try:
        records = json.loads(content)["data"]
    except (ValueError, KeyError, TypeError) as error:
        raise TextError(
            f"{path} is no JSON object with `data`: was it cut short? fetch the file of CoQA again"
        ) from error
    stories = []
    for number, record in enumerate(records, 1):
        try:
            people = [record["answers"], *record.get("additional_answers", {}).values()]
            answers = [[answer["input_text"] for answer in turn] for turn in zip(*people, strict=True)]
            questions = [question["input_text"] for question in record["questions"]]
            stories.append(Story(record["story"], questions, answers))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise TextError(f"story {number} of {path} is not laid out as CoQA's; fetch it again") from error
        if not questions or len(questions) != len(answers):
            raise TextError(
                f"story {number} of {path} has {len(questions)} questions, but {len(answers)} answers; fetch it again"
            )
    return _some(stories, limit, path)


def converse(scorer: Scorer, tokenizer, stories: list[Story], length: int = 32) -> tuple[dict, list[dict]]:
    """Answers to questions about stories: figures, and what was written.

    A prompt is the story, a blank line, the conversation so far as lines `Q: ...` and `A: ...` with the answers of its
    first person (not the model's), the question, and `A:` (section 3.5). The answer is the first line of the greedy
    continuation of up to `length` tokens. A prompt that is too long for the context loses its beginning.

    Figures: n questions, `f1` and `exact_match` (see `among`) as shares, standard errors over stories.
    """
    prompts, references, places = [], [], []
    for place, story in enumerate(stories):
        so_far = f"{story.text}\n\n"
        for question, answers in zip(story.questions, story.answers, strict=True):
            prompts.append(f"{so_far}Q: {question}\nA:")
            so_far = f"{prompts[-1]} {answers[0]}\n"
            references.append(answers)
            places.append(place)
    _, lines = _lines(scorer, tokenizer, prompts, length)
    predictions = [tokenizer.decode(ids).strip() for ids in lines]
    counts, figures = np.bincount(places), {"n": len(prompts), "stories": len(stories)}
    for name, score in (("f1", overlap), ("exact_match", same)):
        scores = [among(score, said, answers) for said, answers in zip(predictions, references, strict=True)]
        sums = np.bincount(places, scores)
        figures |= {name: float(np.mean(scores)), f"{name}_se": bootstrap(lambda x, n: x / n, sums, counts)}
    return figures, _shown(prompts, predictions, references)


# --- Natural Questions (Kwiatkowski et al. 2019; the open version of Lee et al. 2019) ---------------------------------


def read_questions(path, limit: int | None = None) -> list[Question]:
    """The questions of `NQ-open.dev.jsonl` or `NQ-open.train.jsonl`, at most the first `limit`."""
    questions = []
    for number, line in enumerate(read_lines(path)[:limit], 1):
        record = read_record(path, number, line)
        text, answers = record.get("question"), record.get("answer")
        if not isinstance(text, str) or not isinstance(answers, list) or not answers:
            raise TextError(f"line {number} of {path} has no `question` with a list `answer`; fetch the file again")
        questions.append(Question(text, answers))
    return questions


def answer(
    scorer: Scorer, tokenizer, questions: list[Question], examples: list[Question], length: int = 32
) -> tuple[dict, list[dict]]:
    """Answers from what the model knows: figures, and what was written with its `probability`.

    A prompt is the examples with their first answers as lines `Q: ...?` and `A: ...`, the question, and `A:` (section
    3.8; the paper does not give its format). `examples` are such as the first of the training file. The answer is the
    first line of the greedy continuation of up to `length` tokens, its probability that of its tokens and of the end
    of the line. A prompt that is too long for the context loses its beginning.

    Figures: n questions, the share that equals one of the answers (`same`), and `..._most_confident`: of the hundredth
    of the questions, at least one, whose answers the model gives the highest probability.
    """
    seed = "".join(f"{_asked(example)} {example.answers[0]}\n" for example in examples)
    texts = [seed + _asked(question) for question in questions]
    prompts, lines = _lines(scorer, tokenizer, texts, length)
    end = tokenizer.encode("\n")
    passages = [prompt + ids + end for prompt, ids in zip(prompts, lines, strict=True)]
    scored = scorer.passages(passages, [len(ids) + 1 for ids in lines])
    nats = np.array([one.nats.sum() for one in scored])
    predictions = [tokenizer.decode(ids).strip() for ids in lines]
    references = [question.answers for question in questions]
    hits = np.array([_right(said, answers) for said, answers in zip(predictions, references, strict=True)])
    surest = np.argsort(nats, kind="stable")[: max(1, len(hits) // 100)]
    figures = {"n": len(hits), **share("exact_match", hits), "n_most_confident": len(surest)}
    figures |= share("exact_match_most_confident", hits[surest])
    shown = _shown(texts, predictions, references)
    return figures, [row | {"probability": float(np.exp(-x))} for row, x in zip(shown, nats, strict=True)]


def most_common(questions: list[Question], train: list[Question]) -> dict:
    """The baseline of section 3.8: to each question the most common answer of those that begin with the same word."""
    counts = collections.defaultdict(collections.Counter)
    for question in train:
        for kind in (_kind(question), None):
            counts[kind].update(question.answers[:1])
    said = [(counts.get(_kind(question)) or counts[None]).most_common(1)[0][0] for question in questions]
    hits = [_right(one, question.answers) for one, question in zip(said, questions, strict=True)]
    return {"n": len(hits), **share("exact_match", hits)}


def _asked(question):
    return f"Q: {question.text.rstrip(' ?')}?\nA:"


def _kind(question):
    return question.text.lower().split(maxsplit=1)[0] if question.text.strip() else ""


def _right(said, answers):
    return max(same(said, reference) for reference in answers)


# --- CNN and Daily Mail (Hermann et al. 2015, Nallapati et al. 2016) --------------------------------------------------

_NO_END = "".join(rf"(?<!\b{word}\.)" for word in ("Mr", "Ms", "Dr", "St", "Mrs", "Gen", "Sen", "Rep", "Gov", "[A-Z]"))
_BETWEEN = re.compile(
    rf"""\s*\n\s*|{_NO_END}(?:(?<=[.!?])|(?<=[.!?]["'”’)]))\s+(?=["'“‘(]*[A-Z0-9])""",
)


def sentences(text: str) -> list[str]:
    """Cut at ends of lines, and at blanks between `.`, `!` or `?` and a capital or digit; not after Mr. or initials."""
    return [part for part in _BETWEEN.split(text.strip()) if part]


def read_articles(path, limit: int | None = None) -> list[Article]:
    """Articles and highlights, at most the first `limit`.

    From a folder of `.story` files as they were first published (text, then `@highlight` before each of them) in the
    order of their names, or from JSON lines with `article` and `highlights`, a sentence a line. An article without text
    has nothing to be summed up, and is left out.
    """
    path, articles = Path(path), []
    if path.is_dir():
        for file in sorted(path.glob("*.story")):
            text, *highlights = re.split(r"^@highlight\s*$", "\n".join(read_lines(file)), flags=re.MULTILINE)
            articles.append((file, text, highlights))
            if limit is not None and len(articles) == limit:
                break
    else:
        for number, line in enumerate(read_lines(path)[:limit], 1):
            record = read_record(path, number, line)
            if not all(isinstance(record.get(name), str) for name in ("article", "highlights")):
                raise TextError(f"line {number} of {path} has no `article` and `highlights`; fetch the file again")
            articles.append((f"line {number} of {path}", record["article"], record["highlights"].split("\n")))
    found = []
    for place, text, highlights in articles:
        highlights = [" ".join(highlight.split()) for highlight in highlights if highlight.strip()]
        if not highlights:
            raise TextError(f"{place} has no highlights: was it cut short? fetch it again")
        if text.strip():
            found.append(Article(re.sub(r"\s*\n\s*", "\n", text.strip()), highlights))
    return _some(found, limit, path)


def summarise(
    scorer: Scorer, tokenizer, articles: list[Article], seed: int = 0, length: int = 100
) -> tuple[dict, list[dict]]:
    """Summaries of articles after `TL;DR:`: figures, and what was written.

    `length` tokens are drawn from the 2 most likely; the first 3 sentences written are the summary (section 3.6). Of an
    article that is too long for the context with the hint and the summary, the beginning is kept.

    Figures, in hundredths, each with its standard error over articles: F1 of `rouge_1`, `rouge_2`, `rouge_l` (of
    summaries, sentence by sentence, with stems, as the field gives it) by rouge-score, and their mean `rouge`. Beside
    them those of `..._no_hint`: the same without `TL;DR:`; `..._lead_3`: the article's first 3 sentences;
    `..._random_3`: 3 drawn from it. The same seed gives the same summaries, on one backend.

    Raises: TextError if rouge-score is not installed.
    """
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError as error:
        raise TextError(f"summaries are measured with rouge-score, which is not installed; {_INSTALL}") from error
    hint, end = tokenizer.encode(_HINT), tokenizer.end_of_text
    room = _room(scorer, length, len(hint) + 2) - len(hint) - 1
    starts = [[end, *tokenizer.encode(article.text)[:room]] for article in articles]
    random = np.random.default_rng(seed)
    summaries = {}
    for name, after in (("", hint), ("_no_hint", [])):
        ids = _write(scorer, tokenizer, [s + after for s in starts], length, end, temperature=1.0, top_k=2, seed=seed)
        summaries[name] = [sentences(tokenizer.decode(written))[:3] for written in ids]
    parts = [sentences(article.text) for article in articles]
    summaries["_lead_3"] = [part[:3] for part in parts]
    drawn = [sorted(random.permutation(len(part))[:3]) for part in parts]
    summaries["_random_3"] = [[part[i] for i in places] for part, places in zip(parts, drawn, strict=True)]
    kinds = {"rouge_1": "rouge1", "rouge_2": "rouge2", "rouge_l": "rougeLsum"}
    rouge, figures = RougeScorer([*kinds.values()], use_stemmer=True), {"n": len(articles)}
    for name, texts in summaries.items():
        pairs = zip(articles, texts, strict=True)
        scored = [rouge.score("\n".join(article.highlights), "\n".join(text)) for article, text in pairs]
        columns = {kind: [100 * score[theirs].fmeasure for score in scored] for kind, theirs in kinds.items()}
        columns["rouge"] = np.mean([*columns.values()], axis=0)
        for kind, column in columns.items():
            figures |= share(f"{kind}{name}", column)
    prompts = [article.text[: _TAIL - len(_HINT)] + _HINT for article in articles]
    return figures, _shown(prompts, [" ".join(s) for s in summaries[""]], [a.highlights for a in articles])


# --- WMT 2014 (Bojar et al. 2014) -------------------------------------------------------------------------------------


def read_pairs(source, target, limit: int | None = None) -> list[tuple[str, str]]:
    """(sentence, its translation) from two plain texts with as many lines, at most the first `limit`."""
    texts = [[line.strip() for line in read_lines(path)] for path in (source, target)]
    if len(texts[0]) != len(texts[1]):
        raise TextError(f"{source} has {len(texts[0])} lines, {target} {len(texts[1])}; they must be parallel")
    return [*zip(*texts, strict=True)][:limit]


def read_wmt(name: str, languages: str, folder=None, limit: int | None = None) -> list[tuple[str, str]]:
    """(sentence, its translation) of a test of WMT, at most the first `limit`.

    Args:
        name: such as "wmt14", or "wmt13" to take examples from.
        languages: "en-fr", "fr-en", or another pair that sacrebleu knows.
        folder: has `wmt14.en` and `wmt14.fr`, a sentence a line; None: what sacrebleu fetches and keeps.
    """
    if folder is not None:
        return read_pairs(*(Path(folder) / f"{name}.{language}" for language in languages.split("-")), limit)
    _sacrebleu()
    from sacrebleu.utils import get_reference_files, get_source_file

    try:
        paths = get_source_file(name, languages), get_reference_files(name, languages)[0]
    except (Exception, SystemExit) as error:  # it ends the program over a wrong checksum
        raise TextError(
            f"sacrebleu could not fetch {name} {languages} ({error}); give a folder with its two texts"
        ) from error
    return read_pairs(*paths, limit)


def translate(scorer: Scorer, tokenizer, pairs, examples, length: int = 128) -> tuple[dict, list[dict]]:
    """Translations: figures, and what was written.

    A prompt is a line `sentence = its translation` for each of the examples, then `sentence =` (section 3.7). The
    translation is the first line of the greedy continuation of up to `length` tokens. A prompt that is too long for the
    context loses its beginning, so the first examples.

    Figures: n sentences, `bleu` by sacrebleu (its default: 13a words, one reference), standard error over sentences.

    Args:
        pairs: of (sentence, reference), such as those of wmt14.
        examples: likewise, such as the first of wmt13.

    Raises: TextError if sacrebleu is not installed.
    """
    metric = _sacrebleu()
    seed = "".join(f"{sentence} = {translation}\n" for sentence, translation in examples)
    prompts = [f"{seed}{sentence} =" for sentence, _ in pairs]
    _, lines = _lines(scorer, tokenizer, prompts, length)
    predictions, references = [tokenizer.decode(ids).strip() for ids in lines], [reference for _, reference in pairs]
    single = metric(effective_order=True)  # of one sentence only its counts are used
    scored = [single.sentence_score(said, [ref]) for said, ref in zip(predictions, references, strict=True)]
    columns = np.array([[*one.counts, *one.totals, one.sys_len, one.ref_len] for one in scored]).T

    def bleu(*sums):
        rows = np.stack(sums, axis=1).round().astype(int).tolist()
        return [metric.compute_bleu(row[:4], row[4:8], *row[8:], smooth_method="exp").score for row in rows]

    figures = {"n": len(pairs), "bleu": metric().corpus_score(predictions, [references]).score}
    figures["bleu_se"] = bootstrap(bleu, *columns)
    return figures, _shown(prompts, predictions, [[reference] for reference in references])


def _sacrebleu():
    try:
        from sacrebleu.metrics import BLEU
    except ImportError as error:
        raise TextError(f"translations are measured with sacrebleu, which is not installed; {_INSTALL}") from error
    return BLEU
