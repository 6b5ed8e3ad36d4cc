"""De-tokenizers: real lines come back letter by letter, and read as people write."""

import lzma
from pathlib import Path

import pytest

from gpt2lib.evaluate.detokenize import DETOKENIZERS, detokenize

pytestmark = pytest.mark.backend_free
EVALDATA = Path(__file__).parents[2] / "shared" / "evaldata"


@pytest.mark.parametrize(
    ("kind", "line", "text"),
    [
        ("wikitext", " = = Career = = ", "= = Career = ="),
        ("wikitext", " ", ""),
        (
            "wikitext",
            ' He had a guest @-@ starring role as " Craig " in the episode " Teddy \'s Story " , in 2000 . ',
            'He had a guest-starring role as "Craig" in the episode "Teddy\'s Story", in 2000.',
        ),
        ("wikitext", " It cost $ 1 @,@ 200 @.@ 50 ( 5 % less ) . ", "It cost $1,200.50 (5% less)."),
        ("wikitext", " Mr. Smith 's and / or the Joneses ' U.S. . ", "Mr. Smith's and/or the Joneses' U.S.."),
        ("ptb", " n't $ N mgm\\/ua did n't say <unk> 's u.s. unit ", "n't $N mgm/ua didn't say <unk>'s u.s. unit"),
        ("1bw", "We don 't know -- yet .", "We don't know -- yet."),
        ("1bw", 'U.S. firms : " It \'s $ 5 ( or so ) , " they said .', 'U.S. firms: "It\'s $5 (or so)," they said.'),
        ("cbt", "`` I 'll go , '' she said ; `` do n't -LRB- Tom -RRB- ?", '"I\'ll go," she said; "don\'t (Tom)?'),
        ("cbt", "`` No . ''", '"No."'),
    ],
)  # fmt: skip
def test_a_line(kind, line, text):
    made = DETOKENIZERS[kind].detokenize(line)
    assert made == text
    assert DETOKENIZERS[kind].tokenize(made) == line


@pytest.mark.parametrize(
    ("kind", "line"),
    [
        ("wikitext", " Two  blanks . "), ("wikitext", "no blank at its ends ."), ("wikitext", " an end . stuck. "),
        ("1bw", " a blank in front"), ("wikitext", " a T4.5 within a word "),
    ],
)  # fmt: skip
def test_a_line_that_would_not_come_back_stays(kind, line):
    assert detokenize([line], kind) == ([line], [0])


def lines_of(name) -> list[str]:
    with (lzma.open if name.endswith(".xz") else open)(EVALDATA / name, "rt", encoding="utf-8", newline="\n") as file:
        return file.read().split("\n")[:-1]


@pytest.mark.parametrize(
    ("kind", "name", "raw"),
    [
        ("wikitext", "wikitext-2.test.raw", 23),
        ("wikitext", "wikitext-2.test.tokens", 1),
        ("wikitext", "wikitext-103.test.tokens", 9),
        pytest.param("wikitext", "wikitext-2.train.tokens.xz", 37, marks=pytest.mark.slow),
        ("ptb", "ptb.test.txt", 0),
        ("1bw", "1bw.heldout-00000.txt", 19),
        ("cbt", "lambada_test_plain_text.txt", 27),
    ],
)
def test_real_files_come_back(kind, name, raw):
    """Every line; those that stay as they are are counted, and under 1%."""
    if not EVALDATA.exists():
        pytest.skip("the evaluation texts are not here")
    lines = lines_of(name)
    texts, stayed = detokenize(lines, kind)
    back = [text if i in set(stayed) else DETOKENIZERS[kind].tokenize(text) for i, text in enumerate(texts)]
    assert back == lines
    assert len(stayed) == raw < 0.01 * len(lines)
    assert sum(map(len, texts)) < sum(map(len, lines)), "something was joined"


def test_the_text_that_is_trained_on_comes_back():
    """Every twentieth line; the slow test has them all."""
    if not EVALDATA.exists():
        pytest.skip("the evaluation texts are not here")
    lines = lines_of("wikitext-2.train.tokens.xz")[::20]
    texts, stayed = detokenize(lines, "wikitext")
    assert len(stayed) < 0.01 * len(lines) and len(lines) > 1800
    for i, (line, text) in enumerate(zip(lines, texts, strict=True)):
        assert (text if i in stayed else DETOKENIZERS["wikitext"].tokenize(text)) == line
