"""Prompted tasks: files as they are published, scores against values computed by hand, a tiny model from end to end."""

import itertools
import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
from literal import distinctive

from gpt2lib.config import ModelConfig
from gpt2lib.evaluate import prompted
from gpt2lib.evaluate.prompted import (
    Article,
    Question,
    Story,
    among,
    answer,
    converse,
    most_common,
    overlap,
    read_articles,
    read_coqa,
    read_pairs,
    read_questions,
    read_wmt,
    same,
    sentences,
    summarise,
    translate,
)
from gpt2lib.evaluate.score import Scorer
from gpt2lib.evaluate.texts import TextError
from gpt2lib.model import GPT2
from gpt2lib.sample import generate
from gpt2lib.tokenizer import Tokenizer

BYTES = Tokenizer([])
CONFIG = ModelConfig(n_vocab=257, n_ctx=200, n_embd=15, n_head=3, n_layer=1)
COQA = {
    "version": "1.0",
    "data": [
        {
            "source": "wikipedia",
            "id": "3zotghdk5ibi9cex97fepx7jetpso7",
            "filename": "Vatican_Library.txt",
            "story": "Ann has a red cat.",
            "questions": [{"input_text": "Who?", "turn_id": 1}, {"input_text": "Where?", "turn_id": 2}],
            "answers": [
                {"span_start": 0, "span_end": 3, "span_text": "Ann", "input_text": "Ann", "turn_id": 1},
                {"span_start": -1, "span_end": -1, "span_text": "unknown", "input_text": "unknown", "turn_id": 2},
            ],
            "additional_answers": {
                str(i): [{"input_text": one, "turn_id": 1}, {"input_text": "unknown", "turn_id": 2}]
                for i, one in enumerate(["a girl", "Ann has"])
            },
            "name": "Vatican_Library.txt",
        },
        {
            "story": "It rains.",
            "questions": [{"input_text": "Does it snow?", "turn_id": 1}],
            "answers": [{"input_text": "No.", "turn_id": 1}],
        },
    ],
}
STORIES = [
    Story("Ann has a red cat.", ["Who?", "Where?"], [["Ann", "a girl", "Ann has"], ["unknown"] * 3]),
    Story("It rains.", ["Does it snow?"], [["No."]]),
]


@pytest.fixture(scope="module")
def scorer():
    return Scorer(GPT2(CONFIG, init=distinctive), batch_tokens=500)


@pytest.fixture
def script(monkeypatch):
    """`script({end of a prompt: what is written})`: takes the place of the model, and returns the list of its calls."""

    def script(written):
        calls = []

        def stand_in(model, prompts, length, **options):
            calls.append({"prompts": [BYTES.decode(p) for p in prompts], "length": length, **options})
            assert max(map(len, prompts)) + length <= model.config.n_ctx
            texts = [BYTES.decode(p) for p in prompts]
            said = [next(said for end, said in written.items() if text.endswith(end)) for text in texts]
            ids = [[*BYTES.encode(text.replace("<END>", "")), *[256] * ("<END>" in text)] for text in said]
            end = options["end_of_text"]
            return [(row[: row.index(end)] if end in row else row)[:length] for row in ids]

        monkeypatch.setattr(prompted, "generate", stand_in)
        return calls

    return script


def file(folder, content, name="file") -> Path:
    (folder / name).write_text(content if isinstance(content, str) else json.dumps(content))
    return folder / name


# --- agreement --------------------------------------------------------------------------------------------------------


@pytest.mark.backend_free
@pytest.mark.parametrize(
    ("said", "reference", "f1", "exact"),
    [
        ("The cat!", "a CAT", 1, 1),  # articles, punctuation, case
        ("red cat", "the cat", 2 / 3, 0),  # 1 of 2, 1 of 1
        ("theatre and another", "theatre", 0.5, 0),  # an article is a whole word
        ("cat cat cat", "cat dog", 0.4, 0),  # one cat is common: 1 of 3, 1 of 2
        ("  U.S.  army ", "us army", 1, 1),
        ("unknown", "Unknown.", 1, 1),
        ("yes", "unknown", 0, 0),
        ("the", "an", 1, 1),  # nothing is left of both
        ("", "cat", 0, 0),
        ("cat", "", 0, 0),
    ],
)
def test_one_reference(said, reference, f1, exact):
    assert math.isclose(overlap(said, reference), f1) and same(said, reference) == exact
    assert among(overlap, said, [reference]) == overlap(said, reference)


@pytest.mark.backend_free
def test_several_references():
    """Said "ann": 1, 0 and 2/3 with each; without the first the best is 2/3, without either other it is 1."""
    references = ["Ann", "a girl", "Ann has"]
    assert math.isclose(among(overlap, "ann", references), (2 / 3 + 1 + 1) / 3)
    assert math.isclose(among(same, "ann", references), 2 / 3)
    assert among(overlap, "unknown", ["unknown", "unknown"]) == 1
    assert among(same, "unknown", ["unknown", "no"]) == 0.5


# --- CoQA -------------------------------------------------------------------------------------------------------------


@pytest.mark.backend_free
def test_coqa_file(tmp_path):
    path = file(tmp_path, COQA)
    assert read_coqa(path) == STORIES and read_coqa(path, limit=1) == STORIES[:1]


def test_converse(scorer, script):
    calls = script({"Who?\nA:": " Ann\nQ: What?", "Where?\nA:": " in a house<END>", "snow?\nA:": " no"})
    figures, written = converse(scorer, BYTES, STORIES, length=20)
    conversation = "<|endoftext|>Ann has a red cat.\n\nQ: Who?\nA: Ann\nQ: Where?\nA:"  # not what the model said
    assert conversation in [prompt for call in calls for prompt in call["prompts"]]
    assert all((call["temperature"], call["length"]) == (0, 20) for call in calls)
    assert [row["prediction"] for row in written] == ["Ann", "in a house", "no"]
    assert written[0]["references"] == ["Ann", "a girl", "Ann has"] and written[1]["prompt"].endswith("Where?\nA:")
    assert (figures["n"], figures["stories"]) == (3, 2)
    assert math.isclose(figures["f1"], (8 / 9 + 0 + 1) / 3)
    assert math.isclose(figures["exact_match"], (2 / 3 + 0 + 1) / 3)
    assert written[0]["prompt"].endswith("Who?\nA:") and figures["exact_match_se"] > 0


def test_errors_are_over_stories_by_their_questions(scorer, script):
    """9 questions of a story wrong, the one of another right: that is 0, 1 of 10 or 2 of 2, with 1/4, 1/2, 1/4."""
    script({"Where?\nA:": " no", "Who?\nA:": " x"})
    stories = [Story("One.", ["Where?"] * 9, [["x"]] * 9), Story("Two.", ["Who?"], [["x"]])]
    figures, _ = converse(scorer, BYTES, stories, length=8)
    values, weights = np.array([0, 0.1, 1]), [0.25, 0.5, 0.25]
    assert figures["f1"] == 0.1
    expected = math.sqrt((values - values @ weights) ** 2 @ weights)
    assert math.isclose(figures["f1_se"], expected, rel_tol=0.06)


def test_a_line_that_ends_within_a_token(scorer, monkeypatch):
    blanks = Tokenizer([("Ċ", "Ċ")])  # an entry of two ends of lines, as GPT-2 has one
    assert len(blanks.encode("\n\n")) == 1
    monkeypatch.setattr(
        prompted, "generate", lambda model, prompts, *_, **__: [blanks.encode(" No.\n\nQ")] * len(prompts)
    )
    figures, written = converse(scorer, blanks, STORIES[1:], length=8)
    assert (figures["f1"], written[0]["prediction"]) == (1, "No.")
    _, written = answer(scorer, BYTES, QUESTIONS[:1], [], length=8)
    assert written[0]["prediction"] == "No."


def test_a_long_story_loses_its_beginning(scorer, script):
    calls = script({"A:": " x"})
    converse(scorer, BYTES, [Story("y" * 300, ["Who?"], [["x"]])], length=30)
    (prompt,) = calls[0]["prompts"]
    assert len(prompt) == 170 and prompt.startswith("yy") and prompt.endswith("y\n\nQ: Who?\nA:")


# --- Natural Questions ------------------------------------------------------------------------------------------------

QUESTIONS = [Question("who wrote it", ["Ann Lee", "A. Lee"]), Question("when was it", ["1990"])]


@pytest.mark.backend_free
def test_questions_file(tmp_path):
    lines = '{"question": "who wrote it", "answer": ["Ann Lee", "A. Lee"]}\n'
    lines += '{"question": "when was it", "answer": ["1990"]}\n'
    assert read_questions(file(tmp_path, lines)) == QUESTIONS
    assert read_questions(tmp_path / "file", limit=1) == QUESTIONS[:1]


def test_answer(scorer, script):
    """The probability is the product over the tokens of the answer and the end of its line."""
    examples = [Question("what is it?", ["the cat", "a dog"])]
    calls = script({"who wrote it?\nA:": " a lee\nQ: what", "when was it?\nA:": " 1991"})
    figures, written = answer(scorer, BYTES, QUESTIONS, examples, length=20)
    prompt = "Q: what is it?\nA: the cat\nQ: who wrote it?\nA:"
    assert f"<|endoftext|>{prompt}" in [p for call in calls for p in call["prompts"]]
    assert [row["prediction"] for row in written] == ["a lee", "1991"] and written[0]["prompt"] == prompt
    assert (figures["n"], figures["exact_match"], figures["n_most_confident"]) == (2, 0.5, 1)
    ids, said = [256, *BYTES.encode(prompt)], BYTES.encode(" a lee\n")
    alone = [scorer.passages([ids + said[: i + 1]], [1])[0].nats[0] for i in range(len(said))]
    assert math.isclose(written[0]["probability"], math.exp(-sum(alone)), rel_tol=1e-4)
    sure = max(written, key=lambda row: row["probability"])
    assert figures["exact_match_most_confident"] == (sure["prediction"] == "a lee")
    assert figures["exact_match_se"] > 0 and math.isnan(figures["exact_match_most_confident_se"])


def test_the_most_confident_hundredth(scorer, script, monkeypatch):
    """Of 200 questions the two whose answers are likeliest, one of which is right."""
    questions = [Question(f"q {i}", [f"{i}"]) for i in range(200)]
    script({f"q {i}?\nA:": f" {i}" if i in (7, 60) else " no" for i in range(200)})
    nats = {f"q {i}?": 1 + i / 1000 for i in range(200)} | {"q 150?": 0.1, "q 60?": 0.2}

    def passages(self, passages, counts):
        texts = [BYTES.decode(ids) for ids in passages]
        assert all(text.endswith("\n") and text[-count - 1] == ":" for text, count in zip(texts, counts, strict=True))
        asked = [text.partition("Q: ")[2].partition("\n")[0] for text in texts]
        return [prompted_scored(nats[one]) for one in asked]

    class prompted_scored:
        def __init__(self, nats):
            self.nats = np.array([nats])

    monkeypatch.setattr(Scorer, "passages", passages)
    figures, _ = answer(scorer, BYTES, questions, [], length=8)
    assert (figures["exact_match"], figures["n_most_confident"]) == (0.01, 2)
    assert figures["exact_match_most_confident"] == 0.5


@pytest.mark.backend_free
def test_most_common():
    train = [Question("who a", ["Bo"]), Question("who b", ["A. Lee"]), Question("Who c", ["A. Lee"])]
    assert most_common(QUESTIONS, train)["exact_match"] == 0.5  # nobody asked when: A. Lee
    train += [Question("when d", ["1990", "1991"])]
    assert most_common(QUESTIONS, train) == {"n": 2, "exact_match": 1, "exact_match_se": 0}


# --- summaries --------------------------------------------------------------------------------------------------------

STORY = """(CNN) -- Mr. Bo saw the U.S. Senate. "It rains." He left!

Then 3 dogs ran?  No. x

@highlight

Bo saw the  Senate

@highlight

Dogs ran
"""
TEXT = '(CNN) -- Mr. Bo saw the U.S. Senate. "It rains." He left!\nThen 3 dogs ran?  No. x'


@pytest.mark.backend_free
def test_sentences():
    parts = ["(CNN) -- Mr. Bo saw the U.S. Senate.", '"It rains."', "He left!", "Then 3 dogs ran?", "No. x"]
    assert sentences(TEXT) == parts and sentences(" \n") == []


@pytest.mark.backend_free
def test_articles_files(tmp_path):
    article = Article(TEXT, ["Bo saw the Senate", "Dogs ran"])
    file(tmp_path, STORY, "b.story")
    file(tmp_path, "\n\n@highlight\n\nNothing to sum up", "a.story")
    file(tmp_path, "Other text", "c.txt")
    assert read_articles(tmp_path) == [article]
    lines = json.dumps({"article": TEXT, "highlights": "Bo saw the Senate\nDogs ran", "id": "1"}) + "\n"
    assert read_articles(file(tmp_path, 2 * lines, "lines")) == [article, article]
    assert read_articles(tmp_path / "lines", limit=1) == [article]
    file(tmp_path, STORY, "d.story")
    assert len(read_articles(tmp_path)) == 2 and len(read_articles(tmp_path, limit=2)) == 1


def test_summarise(scorer, script):
    """By hand, with stems: 3 words of 4 and of 6 are common, 1 pair of 3 and of 5; ROUGE-L within each sentence."""
    pytest.importorskip("rouge_score")
    articles = [Article("One cat. Two dogs. Red hens. Four cows.", ["Bo saw dogs", "It will rain"])]
    calls = script({"TL;DR:": " Rains. Bo saw. Then\nmore. Never read.", "cows.": " None."})
    figures, written = summarise(scorer, BYTES, articles, seed=3, length=40)
    assert {call["seed"] for call in calls} == {3} and {call["top_k"] for call in calls} == {2}
    assert calls[0]["prompts"] == ["<|endoftext|>" + articles[0].text + "\nTL;DR:"]
    assert calls[1]["prompts"] == ["<|endoftext|>" + articles[0].text]
    assert written[0]["prediction"] == "Rains. Bo saw. Then" and written[0]["references"] == articles[0].highlights
    assert written[0]["prompt"] == articles[0].text + "\nTL;DR:"
    expected = {"rouge_1": 2 * 3 / (4 + 6), "rouge_2": 2 * 1 / (3 + 5), "rouge_l": 2 * 3 / (4 + 6)}
    for kind, value in expected.items():
        assert math.isclose(figures[kind], 100 * value), kind
    assert math.isclose(figures["rouge"], 100 * np.mean([*expected.values()]))
    assert figures["rouge_no_hint"] == 0
    assert math.isclose(figures["rouge_1_lead_3"], 100 * 2 * 1 / (6 + 6))  # dogs
    assert figures["n"] == 1 and math.isnan(figures["rouge_se"])


def test_a_summary_is_the_same_in_every_batch(scorer):
    pytest.importorskip("rouge_score")
    articles = [Article(word, ["x"]) for word in ("one", "two", "three", "four", "five")]
    written = [
        [one["prediction"] for one in summarise(Scorer(scorer.model, tokens), BYTES, articles, seed=3, length=8)[1]]
        for tokens in (2 * 136, 1000)
    ]
    assert written[0] == written[1] and len({*written[0]}) > 1


def test_random_sentences(scorer, script):
    """Three different ones in their order, other ones by another seed; of a shorter article all."""
    pytest.importorskip("rouge_score")
    words = ["one", "two", "six", "ten", "red", "cow"]
    text = " ".join(f"{word.title()}." for word in words)
    script({"": ""})
    seen = set()
    for seed in range(12):
        articles = [Article(text, [" ".join(triple)]) for triple in itertools.combinations(words, 3)]
        figures, _ = summarise(scorer, BYTES, [*articles, Article("One.", ["one"])], seed=seed, length=8)
        again, _ = summarise(scorer, BYTES, [*articles, Article("One.", ["one"])], seed=seed, length=8)
        assert figures["rouge_1_random_3"] == again["rouge_1_random_3"] and figures["rouge_1_random_3_se"] > 0
        seen.add(figures["rouge_1_random_3"])
        assert figures["rouge_1_random_3"] > 100 / 21  # the short one is found at least
    assert len(seen) > 1
    for seed in range(5):
        figures, _ = summarise(scorer, BYTES, [Article("One. Two. Six.", ["one two six"])], seed=seed, length=8)
        assert figures["rouge_2_random_3"] == 100


def test_a_long_article_loses_its_end(scorer, script):
    pytest.importorskip("rouge_score")
    calls = script({"": " x"})
    text = "".join(f"{i} " for i in range(100))
    summarise(scorer, BYTES, [Article(text, ["x"])], length=30)
    room = CONFIG.n_ctx - 30 - len("\nTL;DR:") - 1
    assert calls[0]["prompts"] == ["<|endoftext|>" + text[:room] + "\nTL;DR:"]


# --- translations -----------------------------------------------------------------------------------------------------

PAIRS = [
    ("The cat sat here .", "Le chat noir est assis ici ."),
    ("He left .", "Il est parti hier ."),
    ("Yes .", "Oui , bien vu ."),
]


def test_translate(scorer, script):
    """BLEU by hand, from all n-grams of the lines that were written, and how short they are."""
    pytest.importorskip("sacrebleu")
    calls = script(
        {"here . =": " Le chat noir est assis .\nThe", "left . =": " Il est parti hier .", "Yes . =": "<END>"}
    )
    figures, written = translate(scorer, BYTES, PAIRS, [("A dog .", "Un chien .")], length=30)
    prompts = [prompt for call in calls for prompt in call["prompts"]]
    assert "<|endoftext|>A dog . = Un chien .\nYes . =" in prompts
    assert [row["prediction"] for row in written] == ["Le chat noir est assis .", "Il est parti hier .", ""]
    assert written[1]["references"] == ["Il est parti hier ."]
    precisions = [(6 + 5) / 11, (4 + 4) / 9, (3 + 3) / 7, (2 + 2) / 5]
    expected = 100 * math.exp(1 - (7 + 5 + 5) / 11) * math.prod(precisions) ** 0.25
    assert math.isclose(figures["bleu"], expected) and figures["n"] == 3
    assert 0 < figures["bleu_se"] < 50


def test_the_error_of_bleu(scorer, script):
    """That over all 27 ways to draw 3 of 3 sentences, of which some have no 4-gram in common with their references."""
    sacrebleu = pytest.importorskip("sacrebleu")
    script({"here . =": " Le chat noir est assis .", "left . =": " Il est parti .", "Yes . =": " Oui , mal vu ."})
    figures, written = translate(scorer, BYTES, PAIRS, [], length=30)
    every = []
    for drawn in itertools.product(written, repeat=3):
        said, references = [row["prediction"] for row in drawn], [row["references"][0] for row in drawn]
        every.append(sacrebleu.corpus_bleu(said, [references]).score)
    assert math.isclose(figures["bleu_se"], np.std(every), rel_tol=0.06)


@pytest.mark.backend_free
def test_pairs_files(tmp_path):
    file(tmp_path, "A dog.\nHe left.\n", "wmt14.en")
    file(tmp_path, "Un chien.\nIl est parti.\n", "wmt14.fr")
    pairs = [("A dog.", "Un chien."), ("He left.", "Il est parti.")]
    assert read_wmt("wmt14", "en-fr", tmp_path) == pairs
    assert read_wmt("wmt14", "fr-en", tmp_path, limit=1) == [pairs[0][::-1]]


@pytest.mark.backend_free
def test_what_sacrebleu_keeps(tmp_path, monkeypatch):
    """From its own files, as its download unpacks them; without them and without a network one sentence."""
    pytest.importorskip("sacrebleu")
    from sacrebleu.dataset import DATASETS

    monkeypatch.setattr(DATASETS["wmt14"], "_outdir", str(tmp_path))
    file(tmp_path, "A dog.\n", "wmt14.en-fr.src")
    file(tmp_path, "Un chien.\n", "wmt14.en-fr.ref")
    for name in DATASETS["wmt14"].fieldnames("en-fr")[2:]:
        file(tmp_path, "x\n", f"wmt14.en-fr.{name}")
    assert read_wmt("wmt14", "en-fr") == [("A dog.", "Un chien.")]

    def no_network(*args):
        raise SystemExit(1)

    monkeypatch.setattr(DATASETS["wmt14"], "process_to_text", no_network)
    with pytest.raises(TextError, match=r"sacrebleu could not fetch wmt14 fr-en \(1\); give a folder"):
        read_wmt("wmt14", "fr-en")
    with pytest.raises(TextError, match=r"sacrebleu could not fetch wmt1 en-fr \(No such test set wmt1\)"):
        read_wmt("wmt1", "en-fr")


# --- from end to end --------------------------------------------------------------------------------------------------


def test_prompts_of_other_lengths_do_not_matter(scorer):
    """Batches, and rows that fill them up, write what each prompt gets by itself; the bar sees every batch."""
    random, bars = np.random.default_rng(0), []
    prompts = [random.integers(0, 257, n).tolist() for n in (3, 190, 7, 150, 100, 131, 2)]
    bar = Scorer(scorer.model, batch_tokens=400, progress=lambda groups: bars.append(len(groups)) or groups)
    together = prompted._write(bar, BYTES, prompts, 10, 256, temperature=0)
    alone = [generate(scorer.model, [prompt], 10, temperature=0)[0] for prompt in prompts]
    assert together == alone and bars[0] > 2 and len({tuple(row) for row in alone}) > 2


def test_a_model_answers(scorer):
    """Every task runs on a model, and twice the same."""
    pytest.importorskip("rouge_score")
    pytest.importorskip("sacrebleu")

    def everything():
        articles = [Article(TEXT, ["Bo saw the Senate"]), Article("x. " * 99, ["Dogs ran"])]
        return [
            converse(scorer, BYTES, STORIES, length=12),
            answer(scorer, BYTES, QUESTIONS, QUESTIONS[:1], length=12),
            summarise(scorer, BYTES, articles, seed=5, length=30),
            translate(scorer, BYTES, PAIRS, PAIRS[:1], length=12),
        ]

    first = everything()
    for (figures, written), n in zip(first, (3, 2, 2, 3), strict=True):
        assert figures["n"] == len(written) == n
        assert all({"prompt", "prediction", "references"} <= row.keys() for row in written)
        names = [name for name in figures if f"{name}_se" in figures]
        assert names and all(0 <= figures[name] <= 100 for name in names)
    np.testing.assert_equal(everything(), first)
    assert first[2][1][0]["prediction"]  # it did write


# --- what cannot be ---------------------------------------------------------------------------------------------------


def _without(record, key):
    return {"data": [{name: value for name, value in record.items() if name != key}]}


@pytest.mark.backend_free
@pytest.mark.parametrize(
    ("read", "content", "said"),
    [
        (read_coqa, json.dumps(COQA)[:300], "is no JSON object with `data`: was it cut short"),
        (read_coqa, "[]", "is no JSON object with `data`"),
        (read_coqa, {"data": []}, "holds nothing to ask a model about"),
        (read_coqa, _without(COQA["data"][0], "story"), "story 1 of .* is not laid out as CoQA's; fetch"),
        (read_coqa, {"data": [COQA["data"][1] | {"questions": []}]}, "story 1 of .* has 0 questions, but 1 answers"),
        (
            read_coqa,
            {"data": [COQA["data"][1] | {"additional_answers": {"0": []}}]},
            "story 1 of .* is not laid out as CoQA's; fetch",
        ),
        (read_questions, '{"question": "who"}\n', "line 1 of .* has no `question` with a list `answer`"),
        (read_questions, '{"question": "who", "answer": ["x"]}\n{"quest', "line 2 of .* is no JSON object"),
        (read_articles, '{"article": "who"}\n', "line 1 of .* has no `article` and `highlights`"),
        (read_articles, '{"article": "who", "highlights": " "}\n', "line 1 of .* has no highlights: was it cut short"),
        (read_articles, '{"article": "", "highlights": "x"}\n', "holds nothing to ask a model about"),
    ],
)
def test_a_file_that_is_something_else(tmp_path, read, content, said):
    with pytest.raises(TextError, match=said) as error:
        read(file(tmp_path, content))
    assert "\n" not in str(error.value)
    with pytest.raises(TextError, match=r"nowhere is missing; fetch it"):
        read(tmp_path / "nowhere")


@pytest.mark.backend_free
def test_stories_and_texts_that_were_cut_short(tmp_path):
    file(tmp_path, STORY.partition("@highlight")[0], "a.story")
    with pytest.raises(TextError, match=r"a.story has no highlights: was it cut short"):
        read_articles(tmp_path)
    file(tmp_path, "A dog.\nHe left.\n", "en")
    with pytest.raises(TextError, match=r"en has 2 lines, .*fr 1; they must be parallel"):
        read_pairs(tmp_path / "en", file(tmp_path, "Un chien.\n", "fr"))


@pytest.mark.parametrize("length", [200, 300])
def test_no_room(scorer, length):
    with pytest.raises(ValueError, match=f"{length} new tokens leave no room for a prompt in a context of 200"):
        converse(scorer, BYTES, STORIES, length=length)


def test_no_room_for_an_article(scorer):
    pytest.importorskip("rouge_score")
    with pytest.raises(ValueError, match="192 new tokens leave no room for a prompt"):
        summarise(scorer, BYTES, [Article("x", ["x"])], length=192)


def test_packages_that_are_missing(scorer, monkeypatch):
    for name in ("rouge_score", "rouge_score.rouge_scorer", "sacrebleu", "sacrebleu.metrics"):
        monkeypatch.setitem(sys.modules, name, None)
    for call, name in (
        (lambda: summarise(scorer, BYTES, [Article("x", ["x"])], length=8), "rouge-score"),
        (lambda: translate(scorer, BYTES, PAIRS, []), "sacrebleu"),
        (lambda: read_wmt("wmt14", "en-fr"), "sacrebleu"),
    ):
        with pytest.raises(TextError, match=rf"{name}, which is not installed; run: pip install .*\[evaluate\]"):
            call()
