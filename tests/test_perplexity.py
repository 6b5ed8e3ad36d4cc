"""Perplexity of texts: sums first; equal to other people's programs on the same weights."""

import importlib.util
import math

import numpy as np
import pytest
from literal import distinctive, gpt2
from literal import nll as literal_nll

from gpt2lib.checkpoint import save_huggingface
from gpt2lib.config import SIZES
from gpt2lib.evaluate.perplexity import document_losses, perplexity
from gpt2lib.evaluate.score import Scorer
from gpt2lib.evaluate.texts import Text, TextError
from gpt2lib.model import GPT2
from gpt2lib.tokenizer import Tokenizer

BYTES = Tokenizer([])  # 256 bytes and the end of text
CONFIG = SIZES["test"]
DOCUMENTS = ["A first line.\n", "é is of two bytes, and this document is longer than a window.\n", "End\n"]
peer = pytest.mark.skipif(not importlib.util.find_spec("torch"), reason="the bench extra is not installed")


@pytest.fixture(scope="module")
def model():
    return GPT2(CONFIG, init=distinctive)


@pytest.mark.parametrize("joined", [False, True])
def test_figures_written_out(model, joined):
    arrays = {v.path: np.asarray(v.value) for v in model.trainable_variables}
    text = Text("ptb", DOCUMENTS, [4, 14, 2], joined, raw=0.25)
    figures = perplexity(Scorer(model), BYTES, text)
    nats = 0
    for part in ["".join(DOCUMENTS)] if joined else DOCUMENTS:
        ids = [BYTES.end_of_text, *BYTES.encode(part)]
        for at in range(0, len(ids) - 1, CONFIG.n_ctx):
            window = ids[at : at + CONFIG.n_ctx + 1]
            nats += literal_nll(gpt2(arrays, CONFIG.n_head, window[:-1])[0], window[1:]).sum()
    n_bytes, n_characters = sum(len(d.encode()) for d in DOCUMENTS), sum(map(len, DOCUMENTS))
    expected = {
        "documents": 3, "tokens": n_bytes, "words": 20, "nats": nats, "loss": nats / n_bytes,
        "perplexity": math.exp(nats / 20), "bits_per_byte": nats / n_bytes / math.log(2),
        "bits_per_character": nats / n_characters / math.log(2), "raw_lines": 0.25,
    }  # fmt: skip
    assert {name: figures[name] for name in expected} == pytest.approx(expected, rel=1e-5)
    assert n_characters == n_bytes - 1
    assert all(figures[f"{name}_se"] > 0 for name in ("loss", "perplexity", "bits_per_byte", "bits_per_character"))


def test_more_context_is_a_stride(model):
    """The same tokens, predicted from others."""
    text = Text("ptb", DOCUMENTS, [4, 14, 2], joined=True)
    losses = [perplexity(Scorer(model), BYTES, text, stride=stride)["nats"] for stride in (1, 7, None)]
    assert len(set(losses)) == 3


@peer
@pytest.mark.parametrize("stride", [1, 5, 23])
def test_as_transformers_documents_it(learnt, tmp_path, stride):
    """The loop of its page on perplexity of fixed-length models, over the same weights, which have learnt."""
    import torch
    from transformers import GPT2LMHeadModel

    model, tokenizer, stories = learnt
    save_huggingface(model, tmp_path / "m")
    theirs, n_ctx = GPT2LMHeadModel.from_pretrained(tmp_path / "m").eval(), model.config.n_ctx
    ids = tokenizer.encode(stories[0])
    sums = count = previous = 0
    for begin in range(0, len(ids), stride):
        end = min(begin + n_ctx, len(ids))
        labels = torch.tensor([ids[begin:end]])
        labels[:, : len(labels[0]) - (end - previous)] = -100
        with torch.no_grad():
            loss = theirs(torch.tensor([ids[begin:end]]), labels=labels).loss
        predicted = int((labels[:, 1:] != -100).sum())
        sums, count, previous = sums + loss.item() * predicted, count + predicted, end
        if end == len(ids):
            break
    ours = Scorer(model).text(ids, window=n_ctx - 1, stride=stride)  # theirs has the predicted one in its window
    assert count == len(ours) == len(ids) - 1 > 2 * n_ctx
    assert ours.mean() < 0.8 * math.log(model.config.n_vocab), "no better than a guess"
    assert math.exp(ours.mean()) == pytest.approx(math.exp(sums / count), rel=1e-5)


@pytest.mark.parametrize("joined", [False, True])
def test_empty_documents_and_single_tokens(model, joined):
    """An empty document adds nothing; one byte is one token, predicted after the end of text."""
    scorer = Scorer(model)
    with_empty = document_losses(scorer, BYTES, Text("x", ["", "ab", "", "c"], [0, 1, 0, 1], joined))
    without = document_losses(scorer, BYTES, Text("x", ["ab", "c"], [1, 1], joined))
    np.testing.assert_allclose(with_empty[0][[1, 3]], without[0], rtol=1e-6)
    assert with_empty[0][[0, 2]].tolist() == [0, 0]
    assert with_empty[1].tolist() == [0, 2, 0, 1]
    long = Text("x", ["ab" * CONFIG.n_ctx + "abc", "c"], [1, 1], joined)  # its last window is not full by itself
    assert perplexity(scorer, BYTES, long, full=True)["nats"] != perplexity(scorer, BYTES, long)["nats"]
    single = perplexity(scorer, BYTES, Text("x", ["c"], [1], joined))
    assert single["tokens"] == 1
    assert single["loss"] == pytest.approx(scorer.passages([[256, *BYTES.encode("c")]])[0].nats[0])
    with pytest.raises(TextError, match=r"^x has nothing to be predicted: all of its 2 documents are empty$"):
        perplexity(scorer, BYTES, Text("x", ["", ""], [0, 0], joined))
