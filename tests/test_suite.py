"""Tasks by name, what is published of them, and both beside each other."""

import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from literal import distinctive

from gpt2lib.config import ModelConfig
from gpt2lib.evaluate import suite, tasks
from gpt2lib.evaluate.perplexity import perplexity
from gpt2lib.evaluate.score import Scorer
from gpt2lib.evaluate.texts import WHOLE_BYTES, TextError, read
from gpt2lib.model import GPT2
from gpt2lib.tokenizer import Tokenizer

EVALDATA = Path(__file__).parents[2] / "shared" / "evaldata"
BYTES = Tokenizer([])
STORY = "".join(f"{i} Sentence {i} of it , they said .\n" for i in range(1, 21))
FILES = {
    "lambada_test.jsonl": "".join(f'{{"text": "She had {n} things and then {n} more"}}\n' for n in range(7)),
    "wikitext-2.test.tokens": " \n = One = \n \n A line , of words . \n Three @-@ four . \n \n = Two = \n x y \n",
    "ptb.test.txt": " a line of <unk> words \n" * 90,
    "enwik8": "<page>\n  <title>A</title>\n</page>\n" * 50,
    "text8": "just words and more words " * 40,
    "1bw.heldout-00000.txt": "A sentence .\nAnother one , longer .\n",
    "cbtest_CN_valid_2000ex.txt": STORY + "21 Good XXXXX , said he .\tmorning\t\tmorning|day|night\n\n",
    "wsc273.txt": "The cup hit the jar and [MASK] broke.\nit\nThe cup,The jar\nThe jar\n\n",
    "hellaswag_val.jsonl": '{"ctx": "A man", "ctx_a": "A man", "ctx_b": "runs", "activity_label": "Running", '
    '"endings": ["sits.", "runs.", "flies.", "eats."], "label": 1}\n',
    "webtext.test.jsonl": '{"text": "Some words."}\n{"text": ""}\n{"text": "More of them."}\n',
    "webtext.valid.jsonl": '{"text": "Others of it."}\n{"text": "And the last."}\n',
}
WRITTEN = {
    "coqa-dev-v1.0.json": '{"data": [{"story": "A cat sat.", "questions": [{"input_text": "Who sat?"}], "answers": '
    '[{"input_text": "a cat"}], "additional_answers": {"0": [{"input_text": "the cat"}]}}]}',
    "NQ-open.dev.jsonl": '{"question": "who was it", "answer": ["he", "him"]}\n' * 2,
    "NQ-open.train.jsonl": '{"question": "where is it", "answer": ["here"]}\n' * 7,
    "cnn_dailymail.test.jsonl": '{"article": "A man ran. He fell. He got up.", "highlights": "A man fell."}\n' * 2,
    "wmt13.en": "one\ntwo\n", "wmt13.fr": "un\ndeux\n", "wmt14.en": "a cat\na dog\n", "wmt14.fr": "un chat\nun chien\n",
}  # fmt: skip
ASKED = [
    "lambada", "cbt-cn", "wikitext2", "ptb", "enwik8", "text8", "1bw", "winograd", "hellaswag", "webtext",
    "webtext-valid",
]  # fmt: skip


@pytest.fixture(scope="module")
def scorer():
    return Scorer(GPT2(ModelConfig(n_vocab=257, n_ctx=512, n_embd=15, n_head=3, n_layer=1), init=distinctive))


@pytest.fixture
def folder(tmp_path, monkeypatch):
    for name in WHOLE_BYTES:
        monkeypatch.setitem(WHOLE_BYTES, name, len(FILES[name]))
    for name, content in FILES.items():
        (tmp_path / name).write_text(content)
    return tmp_path


def test_every_layout_gives_its_columns(scorer, folder):
    results = {n: suite.measure(n, scorer, BYTES, folder, suite.Options(), download=False)[0] for n in ASKED}
    rows = {row["column"]: row for row in suite.columns(results)}
    assert list(rows) == [c.title for c in suite.COLUMNS if c.task in ASKED]
    for row in rows.values():
        assert math.isfinite(row["value"])
    text = read("wikitext2", folder / "wikitext-2.test.tokens")
    figures = perplexity(scorer, BYTES, text)
    assert rows["WikiText2 ppl"]["value"] == figures["perplexity"]
    assert rows["WikiText2 ppl"]["protocol"] == "de-tokenized, window 512, stride 512"
    assert rows["LAMBADA ppl"]["protocol"] == "prepared"
    raw = perplexity(scorer, BYTES, read("wikitext2", folder / "wikitext-2.test.tokens", detokenized=False))
    assert results["wikitext2"]["as published"] == raw
    assert raw["perplexity"] != figures["perplexity"]
    lambada = tasks.guess(scorer, BYTES, tasks.read_lambada(folder / "lambada_test.jsonl"))
    assert rows["LAMBADA acc"]["value"] == 100 * lambada["accuracy_last_token"]
    bpb = results["enwik8"]["as published"]
    assert rows["enwik8 bpb"]["value"] == bpb["nats"] / len(FILES["enwik8"]) / math.log(2)
    valid = perplexity(scorer, BYTES, read("webtext-valid", folder / "webtext.valid.jsonl"))
    assert results["webtext-valid"] == {"as published": valid} and valid["documents"] == 2
    assert rows["WebText valid loss"]["value"] == valid["loss"] != rows["WebText loss"]["value"]
    tables = suite.details(results)
    assert sum(map(len, tables)) == sum(map(len, results.values()))
    (choices,) = (table for table in tables if table[0]["task"] == "cbt-cn")
    assert [row["protocol"] for row in choices if row["task"] == "winograd"] == ["partial", "full"]
    (texts,) = (table for table in tables if table[0]["task"] == "wikitext2")
    assert texts[0]["tokens"] == results["wikitext2"]["de-tokenized"]["tokens"]
    assert texts[0]["perplexity"].startswith(f"{figures['perplexity']:,.3f} ± ")


def test_what_is_written(scorer, folder):
    pytest.importorskip("sacrebleu")
    pytest.importorskip("rouge_score")
    for name, content in WRITTEN.items():
        (folder / name).write_text(content)
    asked = ["coqa", "nq", "cnn-dm", "wmt14-en-fr", "wmt14-fr-en"]
    found = {n: suite.measure(n, scorer, BYTES, folder, suite.Options(), download=False) for n in asked}
    rows = suite.columns({name: figures for name, (figures, _) in found.items()})
    assert [row["column"] for row in rows] == [c.title for c in suite.COLUMNS if c.task in asked]
    for name, (_, wrote) in found.items():
        (predictions,) = wrote.values()
        assert predictions[0].keys() >= {"prompt", "prediction", "references"}, name
    assert next(iter(found["wmt14-fr-en"][1].values()))[0]["references"] == ["a cat"]
    (folder / "wmt14.fr").unlink()
    with pytest.raises(TextError, match=r"has no wmt14\.en and wmt14\.fr"):
        suite.measure("wmt14-en-fr", scorer, BYTES, folder, suite.Options(), download=False)


def test_a_part(scorer, folder):
    options = suite.Options(limit=3, variants=False)
    results, _ = suite.measure("lambada", scorer, BYTES, folder, options, download=False)
    assert list(results) == ["prepared"]
    passages = tasks.read_lambada(folder / "lambada_test.jsonl")
    assert results["prepared"] == tasks.guess(scorer, BYTES, [passages[0], passages[3], passages[6]])
    text, _ = suite.measure("1bw", scorer, BYTES, folder, suite.Options(limit=1), download=False)
    assert text["de-tokenized"]["documents"] == 1


def test_windows_and_strides_are_protocols(scorer, folder):
    values = set()
    for stride in (2, None):
        options = suite.Options(window=6, stride=stride)
        text, _ = suite.measure("1bw", scorer, BYTES, folder, options, download=False)
        (row,) = suite.columns({"1bw": text})
        assert row["protocol"] == f"de-tokenized, window 6, stride {stride or 6}"
        assert set(suite.beside({"1bw": text}, ["117M"])["ours by"]) == {row["protocol"]}
        values.add(row["value"])
    assert len(values) == 2


def test_names():
    assert suite.names(["1bw", "table3"]) == ["1bw", *[n for n in suite.TABLE3 if n != "1bw"]]
    assert suite.names(["all"]) == list(suite.TASKS)
    assert suite.names([]) == []
    with pytest.raises(TextError, match="there is no task `wikitext`; did you mean `wikitext2`"):
        suite.names(["wikitext"])


def test_a_tokenizer_of_another_model(folder):
    small = Scorer(GPT2(ModelConfig(n_vocab=100, n_ctx=8, n_embd=6, n_head=1, n_layer=1), init=distinctive))
    with pytest.raises(TextError, match="257 entries and the model 100"):
        suite.measure("lambada", small, BYTES, folder, suite.Options(), download=False)


def test_another_vocabulary_than_gpt2s_is_said(scorer, folder):
    """The model is measured all the same."""
    measured = {n: suite.measure(n, scorer, BYTES, folder, suite.Options(), download=False)[0] for n in ASKED[:3]}
    known = {"loss", "accuracy by token", "accuracy last token", "perplexity last token"}
    for results in ({"lambada": measured["lambada"]}, {"wikitext2": measured["wikitext2"]}, measured):
        figures = {name.replace("_", " ") for protocols in results.values() for f in protocols.values() for name in f}
        said = suite.vocabulary(results, BYTES)
        named = set(said.partition("(")[2].partition(")")[0].split(", "))
        assert said.startswith("The vocabulary of 257 entries is not GPT-2's: figures by its tokens (")
        assert "\n" not in said and named & known == figures & known and named <= figures
    assert suite.vocabulary({}, BYTES) == ""
    assert suite.vocabulary(measured, SimpleNamespace(is_gpt2=True)) == ""


def test_published_figures():
    table = suite.published()
    titles = {column.title for column in suite.COLUMNS}
    assert set(table.column) <= titles
    assert not table.isna().any().any(), "a row without a source or a protocol"
    table3 = [column.title for column in suite.COLUMNS if column.task in suite.TABLE3]
    assert set(table3) <= set(table[table.protocol == "the paper's"].column)
    assert [row["value"] for row in suite.published_columns("345M")][:2] == [15.60, 55.48]
    with pytest.raises(TextError, match="no published figures of `354M`; did you mean `345M`"):
        suite.published_columns("354M")


def test_beside():
    figures = {"perplexity": 40.0, "perplexity_se": 0.5, "documents": 62}
    table = suite.beside({"wikitext103": {"de-tokenized": figures}}, ["117M", "345M"])
    paper = table[(table.model == "117M") & (table["published by"] == "the paper's")].iloc[0]
    assert paper["difference"] == pytest.approx(40 - 37.5)
    assert paper["standard errors"] == pytest.approx(5)
    harness = table[table.source == "huggingface/transformers#13761"].iloc[0]
    assert harness["published"] == 37.37
    assert set(table.model) == {"117M", "345M"}


def test_documents_side_by_side(folder):
    found, problems = suite.documents(
        ["wikitext2", "webtext", "validation", "wikitext103", "x"], 1, None, folder, False
    )
    assert found["webtext"] == ["Some words."]
    assert len(found["wikitext2"]) == 1
    assert set(problems) == {"validation", "wikitext103", "x"}
    assert "no corpus" in problems["validation"]


def test_real_files_measured(scorer):
    """Every file at hand runs through its task; the counts are those of the whole."""
    if not EVALDATA.exists():
        pytest.skip("the evaluation texts are not here")
    options = suite.Options(limit=4, variants=False)
    there = ["lambada", "wikitext2", "ptb", "wikitext103", "1bw", "winograd", "hellaswag", "webtext"]
    for name in there:
        ((_, figures),) = suite.measure(name, scorer, BYTES, EVALDATA, options, download=False)[0].items()
        assert figures.get("n", figures.get("documents")) == 4, name
        assert all(np.isfinite(v) for v in figures.values()), name
