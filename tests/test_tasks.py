"""Tasks of choices and guesses: items as they are published, figures against each choice by itself."""

import dataclasses
import functools
import math
from pathlib import Path

import numpy as np
import pytest
from literal import distinctive

from gpt2lib.config import ModelConfig
from gpt2lib.evaluate import tasks
from gpt2lib.evaluate.score import Scorer
from gpt2lib.evaluate.tasks import Choice, choose, guess, read_cbt, read_hellaswag, read_lambada, read_winograd
from gpt2lib.evaluate.texts import TextError
from gpt2lib.model import GPT2
from gpt2lib.tokenizer import Tokenizer

EVALDATA = Path(__file__).parents[2] / "shared" / "evaldata"
BYTES = Tokenizer([])
CONFIG = ModelConfig(n_vocab=257, n_ctx=24, n_embd=15, n_head=3, n_layer=1)
CBT = "".join(f"{i} Sentence {i} of it , they said .\n" for i in range(1, 21))
CBT += "21 `` Good XXXXX , '' said he , `` do n't go .\tmorning\t\tmorning|day|night\n\n"


@pytest.fixture(scope="module")
def model():
    return GPT2(CONFIG, init=distinctive)


@pytest.fixture(scope="module")
def alone(model):
    """`alone(context, text)`: nats of each byte of a text after a context, one at a time."""
    scorer = Scorer(model, batch_tokens=CONFIG.n_ctx)

    @functools.cache
    def alone(context, text):
        ids, n = [256, *BYTES.encode(context), *BYTES.encode(text)], len(text.encode())
        ids = ids[-CONFIG.n_ctx - 1 :]
        return [scorer.passages([ids[: len(ids) - n + i + 1]], [1])[0].nats[0] for i in range(n)]

    return alone


def file(folder, content, name="file") -> Path:
    (folder / name).write_text(content)
    return folder / name


# --- LAMBADA ----------------------------------------------------------------------------------------------------------


def test_lambada_items(tmp_path):
    path = file(tmp_path, '{"text": "He said \\u201cno\\u201d to her. "}\n{"text": "A\\n\\nb c"}\n')
    assert read_lambada(path) == [('\nHe said "no" to', " her."), ("\nA\n\nb", " c")]
    assert read_lambada(path, prepared=False)[1] == ("A\n\nb", " c")


def test_guess(model, alone):
    passages = [("a b", " cd"), ("A longer context than the model", " e"), ("x", " yz"), ("q r", " s")]
    figures = guess(Scorer(model), BYTES, passages)
    sums = [sum(alone(context, word)) for context, word in passages]
    assert figures["n"] == 4 and math.isclose(figures["perplexity"], math.exp(np.mean(sums)), rel_tol=1e-5)
    lasts = [alone(context, word)[-1] for context, word in passages]
    assert math.isclose(figures["perplexity_last_token"], math.exp(np.mean(lasts)), rel_tol=1e-5)
    assert figures["perplexity_se"] > 0 and figures["accuracy"] <= figures["accuracy_last_token"]


def test_a_model_that_knows(model):
    """The word of greedy tokens is guessed, and one whose last token is another's only by its other tokens."""
    scorer, context = Scorer(model), "ab"

    def best(ids):
        scored = scorer.passages([[*ids, token] for token in range(256)], [1] * 256)
        return min(range(256), key=lambda token: scored[token].nats[0])

    ids = [256, *BYTES.encode(context)]
    word = [best(ids)]
    word.append(best(ids + word))

    class Spelled:
        n_vocab, end_of_text = 257, 256

        def encode(self, text):
            return {"right": word, "wrong": [word[0] ^ 1, best([*ids, word[0] ^ 1])]}.get(text) or BYTES.encode(text)

    right = guess(scorer, Spelled(), [(context, "right")])
    wrong = guess(scorer, Spelled(), [(context, "wrong")])
    assert (right["accuracy"], right["accuracy_last_token"]) == (1, 1)
    assert (wrong["accuracy"], wrong["accuracy_last_token"]) == (0, 1)
    assert math.isnan(right["accuracy_se"])


@pytest.mark.backend_free
def test_stop_words_of_gpt2():
    if not EVALDATA.exists():
        pytest.skip("the evaluation texts are not here")
    gpt2 = Tokenizer.gpt2(EVALDATA / "bpe")
    words = {gpt2.decode([token]) for token in tasks.stop_words(gpt2)}
    assert {" the", " her", " yourself"} < words and " Shane" not in words and len(words) > 250


# --- choices ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shared", [(), (1, 2, 3)])
def test_choose(model, alone, shared):
    """Every figure from the sums of each choice by itself."""
    random = np.random.default_rng(0)
    items = [
        Choice("ctx" * (i % 3), ["".join(random.choice([*"abc "], n)) for n in (4, 7, 5)], i % 3, shared)
        for i in range(30)
    ]
    figures = choose(Scorer(model), BYTES, items)
    hits = {"accuracy": 0, "accuracy_by_token": 0, "accuracy_by_character": 0}
    for item in items:
        losses = [alone(item.context, choice) for choice in item.choices]
        losses = [each[n:] for each, n in zip(losses, shared or (0, 0, 0), strict=True)]
        sizes = {
            "accuracy": [1, 1, 1],
            "accuracy_by_token": [len(each) for each in losses],
            "accuracy_by_character": [len(choice.strip()) for choice in item.choices],
        }
        for name, size in sizes.items():
            ranks = [sum(each) / n for each, n in zip(losses, size, strict=True)]
            hits[name] += ranks.index(min(ranks)) == item.answer
    assert {name: round(figures[name] * 30) for name in hits} == hits
    p = figures["accuracy"]
    assert math.isclose(figures["accuracy_se"], math.sqrt(p * (1 - p) / 30), rel_tol=0.15)


def test_a_choice_longer_than_the_context(model):
    with pytest.raises(TextError, match="a choice of 30 tokens is longer than the context of 24"):
        choose(Scorer(model), BYTES, [Choice("a", ["b" * 30, "c"], 0)])


@pytest.mark.backend_free
def test_cbt_items(tmp_path):
    item = read_cbt(file(tmp_path, CBT + CBT))[1]
    assert item.context.startswith("Sentence 1 of it, they said.\nSentence 2") and item.context.endswith("said.\n")
    assert item.choices == [f'"Good {word}," said he, "don\'t go.' for word in ("morning", "day", "night")]
    assert item.answer == 0 and not item.shared
    assert read_cbt(tmp_path / "file", detokenized=False)[0].choices[1] == "`` Good day , '' said he , `` do n't go ."


def test_lines_of_cbt_that_stay_raw(model, tmp_path):
    """Counted by lines: two of the first story, and a sentence that only one candidate keeps from coming back."""
    first = CBT.replace("Sentence 3 of", "Sentence  3 of").replace("Sentence 9 of", "Sentence  9 of")
    items = read_cbt(file(tmp_path, first + CBT.replace("|day|", "|a  day|") + CBT))
    assert [item.raw for item in items] == [2 / 21, 1 / 21, 0]
    assert "\nSentence  3 of it , they said .\nSentence 4 of it, they said.\n" in items[0].context
    assert items[1].choices[1].startswith("`` Good a  day , ''") and items[1].choices[2].startswith('"Good night,"')
    figures = choose(Scorer(model), BYTES, [dataclasses.replace(item, choices=["a", "b", "c"]) for item in items])
    assert figures["raw_lines"] == pytest.approx(3 / 63)
    assert not any(item.raw for item in read_cbt(tmp_path / "file", detokenized=False))


@pytest.mark.backend_free
def test_winograd_items(tmp_path):
    lines = "The cup fell off the table because  [MASK]  was round. \n[MASK]\nThe cup ,the table \nThe cup \n\n"
    path = file(tmp_path, lines + "[MASK] fell. She wept.\n[MASK]\nthe cup ,Ann\nAnn\n")
    one, other = read_winograd(path)
    assert one.choices == [f"The cup fell off the table because the {name} was round." for name in ("cup", "table")]
    assert [choice[n:] for choice, n in zip(one.choices, one.shared, strict=True)] == [" was round."] * 2
    assert other.choices == ["The cup fell. She wept.", "Ann fell. She wept."] and other.answer == 1
    assert read_winograd(path, partial=False)[0].shared == ()


@pytest.mark.backend_free
def test_hellaswag_items(tmp_path):
    path = file(
        tmp_path,
        '{"ctx": "A man [x] sits. he", "ctx_a": "A man [x] sits.", "ctx_b": "he", "activity_label": "Sitting", '
        '"label": 2, "endings": ["a.", "b [title] c", "d", "e"]}\n',
    )
    assert read_hellaswag(path) == [Choice("A man [x] sits. he", [" a.", " b [title] c", " d", " e"], 2)]
    assert read_hellaswag(path, harness=True) == [Choice("Sitting: A man sits. He", [" a.", " b. c", " d", " e"], 2)]
    text = file(tmp_path, "Sitting: A man sits. he\n3\na\nb\nc\nd\n", "text")
    assert read_hellaswag(text) == [Choice("A man sits. he", [" a", " b", " c", " d"], 3)]


@pytest.mark.backend_free
def test_real_files():
    if not EVALDATA.exists():
        pytest.skip("the evaluation texts are not here")
    lambada = read_lambada(EVALDATA / "lambada_test.jsonl")
    assert len(lambada) == 5153 and lambada[1][1] == " Shane"
    assert len(read_lambada(EVALDATA / "lambada_test_plain_text.txt", prepared=False)) == 5153
    winograd = read_winograd(EVALDATA / "wsc273.txt")
    assert len(winograd) == 273 and all(len(set(item.choices)) == 2 for item in winograd)
    whole = read_hellaswag(EVALDATA / "hellaswag_val_full.txt.bz2")
    assert len(whole) == 10_042 and all(len(item.choices) == 4 for item in whole)
    assert len(read_hellaswag(EVALDATA / "hellaswag_val_1000.jsonl")) == 1000


@pytest.mark.backend_free
@pytest.mark.parametrize(
    ("read", "content", "said"),
    [
        (read_lambada, "", "is empty; fetch it again"),
        (read_lambada, '{"text": "a b"}\n{"text": "a', "line 2 of .* is no JSON object: was it cut short"),
        (read_lambada, "alone\n", "line 1 of .* is no passage of several words"),
        (read_cbt, "1 A\n3 B\n", "line 2 of .* does not begin with 2: it is no file of CBT"),
        (read_cbt, CBT[:100].rpartition("\n")[0] + "\n", "ends in the middle of a story: it was cut short"),
        (read_cbt, CBT.replace("XXXXX", "x"), "line 21 of .* is not a sentence with XXXXX"),
        (read_winograd, "A [MASK] b.\n[MASK]\nx ,y\nz\n", "line 1 of .* does not begin a schema"),
        (read_winograd, "A [MASK] b.\n[MASK]\n", "line 1 of .* does not begin a schema"),
        (read_hellaswag, '{"ctx": "a"}\n', "line 1 of .* has no 'endings'; fetch"),
        (read_hellaswag, "A: b\n2\nx\ny\n", "line 1 of .* does not begin an item"),
    ],
)
def test_a_file_that_is_something_else(tmp_path, read, content, said):
    with pytest.raises(TextError, match=said) as error:
        read(file(tmp_path, content))
    assert "\n" not in str(error.value)
    with pytest.raises(TextError, match=r"nowhere is missing; fetch it"):
        read(tmp_path / "nowhere")
