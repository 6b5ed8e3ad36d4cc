"""Texts of the language-modelling benchmarks: the counts that everyone has; files that are not what they should be."""

from pathlib import Path

import pytest

from gpt2lib.evaluate.texts import TextError, read
from gpt2lib.tokenizer import Tokenizer

pytestmark = pytest.mark.backend_free
EVALDATA = Path(__file__).parents[2] / "shared" / "evaldata"
WIKITEXT = " \n = One = \n \n A line , of words . \n = = Part = = \n Three @-@ four . \n \n = Two = \n x < y \n"


@pytest.mark.parametrize(
    ("name", "file", "documents", "words", "tokens", "published", "ratios"),
    [
        ("wikitext2", "wikitext-2.test.tokens", 62, 245_569, 281_259, 295_877, (1.145, 1.205)),
        ("wikitext2", "wikitext-2.test.raw", 62, 245_569, 274_112, 286_221, (1.116, 1.166)),
        ("wikitext103", "wikitext-103.test.tokens", 62, 245_569, 272_365, 285_234, (1.109, 1.162)),
        ("ptb", "ptb.test.txt", 95, 82_430, 100_650, 105_243, (1.221, 1.277)),
        ("1bw", "1bw.heldout-00000.txt", 6_075, 159_658, 176_245, 178_483, (1.104, 1.118)),
        ("webtext", "webtext.test/webtext.test.split.0.jsonl", 1_002, 83_014, 114_027, 114_027, (1.374, 1.374)),
    ],
)
def test_real_files(name, file, documents, words, tokens, published, ratios):
    """Words as in the papers of the benchmarks; GPT-2's tokens after the de-tokenizer, and of the file as it is.

    Tokens per word are the exponent between the perplexities by token and by word.
    """
    if not EVALDATA.exists():
        pytest.skip("the evaluation texts are not here")
    encode = Tokenizer.gpt2(EVALDATA / "bpe").encode
    for detokenized, expected, ratio in ((True, tokens, ratios[0]), (False, published, ratios[1])):
        text = read(name, EVALDATA / file, detokenized)
        assert (len(text.documents), sum(text.words)) == (documents, words)
        assert sum(len(encode(document)) for document in text.documents) == expected
        assert round(expected / sum(text.words), 3) == ratio
        if text.joined:  # documents end where tokens do
            assert len(encode("".join(text.documents))) == expected
        if not detokenized and name != "webtext":
            assert "".join(text.documents) == (EVALDATA / file).read_text()
        assert text.raw < 0.01


def write(folder, content) -> Path:
    path = folder / "file"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def test_articles(tmp_path):
    text = read("wikitext103", write(tmp_path, WIKITEXT))
    assert text.documents == [
        "\n= One =\n\nA line, of words.\n= = Part = =\nThree-four.\n\n",
        "= Two =\nx < y\n",
    ]
    assert text.words == [1 + 4 + 1 + 7 + 6 + 5 + 1, 4 + 4] and not text.joined and text.raw == 0
    assert read("wikitext103", tmp_path / "file", detokenized=False).documents[1] == " = Two = \n x < y \n"
    assert len(read("wikitext103", tmp_path / "file", limit=1).documents) == 1


def test_enwik8_is_its_last_five_million_bytes(tmp_path):
    line = '<page title="é">text of a page</page>\n'.encode()
    whole = (line * 3_000_000)[-100_000_000:]
    text = read("enwik8", write(tmp_path, whole))
    assert sum(text.bytes) == 5_000_000 and text.joined
    assert "".join(text.documents) == whole[-5_000_000:].decode()
    assert len(text.documents) > 1000


def test_text8_has_no_lines(tmp_path):
    letters = "the quick brown fox " * 5_000_000
    text = read("text8", write(tmp_path, letters))
    assert "".join(text.documents) == letters[-5_000_000:] and len(text.documents) > 1000
    assert all(document.startswith(" ") for document in text.documents[1:]), "a token begins there"


@pytest.mark.parametrize("name", ["enwik8", "text8"])
@pytest.mark.parametrize("length", [99_999_999, 100_000_001])
def test_a_part_of_100_million_bytes_is_refused(tmp_path, name, length):
    """Its last five million would be another text."""
    with open(tmp_path / "file", "wb") as file:
        file.truncate(length)
    said = rf"^{tmp_path}/file has {length:,} bytes, and {name} has 100,000,000: .*; delete it and fetch it again$"
    with pytest.raises(TextError, match=said):
        read(name, tmp_path / "file")


def test_records(tmp_path):
    text = read("webtext", write(tmp_path, '{"text": "Two words.\\n"}\n{"text": ""}\n{"text": "x", "id": 3}\n'))
    assert text.documents == ["Two words.\n", "x"] and text.words == [2, 1]


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("wikitext3", "x", "there is no text `wikitext3`; valid: wikitext2, "),
        ("ptb", None, "is missing; it is the file of ptb"),
        ("ptb", "", "is empty; fetch"),
        ("ptb", " a line \n another li", "ends in the middle of a line: it was cut short"),
        ("wikitext2", "a line\n", "has no line such as ` = Title = `"),
        ("ptb", b"\xff\xfe\n", "is not UTF-8 from byte 0 on"),
        ("webtext", '{"text": "a"}\n{"text": "b', "line 2 of .* is no JSON object with a `text`"),
        ("webtext", "[]\n", "line 1 of .* is no JSON object"),
    ],
)
def test_a_file_that_is_something_else(tmp_path, name, content, said):
    path = tmp_path / "file" if content is None else write(tmp_path, content)
    with pytest.raises(TextError, match=said) as error:
        read(name, path)
    assert "\n" not in str(error.value)
