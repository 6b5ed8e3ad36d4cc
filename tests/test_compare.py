"""Models side by side: the groups add up, the differences are where they are, the colours are safe to show."""

import numpy as np
import pytest
from literal import distinctive

from gpt2lib.config import ModelConfig
from gpt2lib.evaluate import compare
from gpt2lib.evaluate.compare import Reading
from gpt2lib.evaluate.score import Scorer
from gpt2lib.model import GPT2
from gpt2lib.tokenizer import Tokenizer

BYTES = Tokenizer([])
TEXTS = {"short": ["ab", "a longer text", ""], "long": ["z" * 40, "héllo wörlz " * 3]}


@pytest.fixture(scope="module")
def scorer():
    return Scorer(GPT2(ModelConfig(n_vocab=257, n_ctx=16, n_embd=15, n_head=3, n_layer=1), init=distinctive))


@pytest.fixture(scope="module")
def reading(scorer):
    return compare.read(scorer, BYTES, TEXTS)


def shifted(reading, shift):
    """Another model's reading of the same documents."""
    return Reading(reading.ids, [n + shift(i, n) for i, n in enumerate(reading.nats)], reading.bytes, reading.domains)


def test_a_reading(scorer, reading):
    assert reading.domains == ["short", "short", "long", "long"]
    assert list(reading.bytes) == [2, 13, 40, 42]
    for ids, nats in zip(reading.ids, reading.nats, strict=True):
        assert len(ids) == len(nats)
    alone = scorer.passages([[256, *BYTES.encode("a longer text")]])[0].nats
    np.testing.assert_allclose(reading.nats[1], alone, rtol=1e-5)
    np.testing.assert_allclose(reading.nats[2], scorer.text([256, *BYTES.encode("z" * 40)]), rtol=1e-5)
    assert reading.bits_per_byte[1] == pytest.approx(alone.sum() / 13 / np.log(2), rel=1e-5)


def test_groups_add_up(reading):
    everything = np.concatenate(reading.nats)
    for rows in (
        compare.by_position(reading, [0, 1, 4, 1024]),
        compare.by_frequency(reading, np.arange(257)),
        compare.by_domain(reading),
    ):
        assert sum(row["tokens"] for row in rows) == len(everything)
        assert sum(row["tokens"] * row["loss"] for row in rows) == pytest.approx(everything.sum())
    first, *_ = compare.by_position(reading, [0, 1, 4, 1024])
    assert first["label"] == "0"
    assert first["loss"] == pytest.approx(np.mean([nats[0] for nats in reading.nats]))
    assert [r["label"] for r in compare.by_position(reading, [0, 1, 4])] == ["0", "1 to 3"]


def test_frequencies(reading):
    counts = np.zeros(257)
    counts[BYTES.encode("za")] = 40, 9
    rows = {row["label"]: row for row in compare.by_frequency(reading, counts)}
    assert list(rows) == ["never", "1 to 9", "10 to 99"]
    assert rows["10 to 99"]["tokens"] == 43
    last = [i for i, token in enumerate(reading.ids[3]) if token == BYTES.encode("z")[0]]
    assert rows["10 to 99"]["loss"] == pytest.approx((reading.nats[2].sum() + reading.nats[3][last].sum()) / 43)


def test_domains(reading):
    short, long = compare.by_domain(reading)
    assert (short["label"], short["documents"], long["documents"]) == ("short", 2, 2)
    nats = sum(n.sum() for n in reading.nats[:2])
    assert short["bits_per_byte"] == pytest.approx(nats / 15 / np.log(2))


def test_difference(reading):
    worse = shifted(reading, lambda i, nats: np.log(2))  # one bit a token, and these tokens are bytes
    value, se = compare.difference(worse, reading)
    assert (value, se) == (pytest.approx(1), pytest.approx(0, abs=1e-9))
    assert compare.difference(reading, worse)[0] == pytest.approx(-1)


def test_disagreements_are_found(reading):
    def shift(i, nats):
        values = np.zeros(len(nats))
        values[20:25] = {2: 1.0, 3: -1.0}.get(i, 0)
        return values

    other = shifted(reading, shift)
    (i, start, end), (j, begin, stop) = compare.disagreements(reading, other, length=5, count=2)
    assert (i, start, end, j, begin, stop) == (2, 20, 25, 3, 20, 25)
    assert compare.disagreements(reading, reading) == []


def test_same_tokens(reading):
    assert compare.same_tokens([reading])
    assert compare.same_tokens([reading, shifted(reading, lambda i, n: 1)])
    fewer = Reading([ids[:1] for ids in reading.ids], reading.nats, reading.bytes, reading.domains)
    assert not compare.same_tokens([reading, fewer])


@pytest.mark.backend_free
def test_coloured_text():
    shown = compare.coloured(BYTES, BYTES.encode("<b>é"), [1.0, -3.0, 0.0, 9.0, 9.0])
    assert "&lt;" in shown and "&gt;" in shown and "<b>" not in shown
    assert shown.count("<span") == 4, "the two bytes of é are one character"
    assert "é</span>" in shown and "rgba(67,147,195,1.00)" in shown and "rgba(214,96,77,0.33)" in shown


@pytest.mark.backend_free
def test_verdicts():
    assert compare.verdict("A", "B", -1.0, 0.1, "ppl") == "A is ahead of B by 1 ± 0.1 ppl"
    assert compare.verdict("A", "B", -1.0, 0.1, "acc", "higher") == "B is ahead of A by 1 ± 0.1 acc"
    assert compare.verdict("A", "B", 1.0, 0.6, "ppl").startswith("no difference seen: +1")
    assert compare.verdict("A", "B", 1.0, 0.0, "ppl").startswith("no verdict")
