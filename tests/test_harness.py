"""Word perplexity and LAMBADA, beside lm-evaluation-harness on the same exported weights."""

import importlib.util
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from gpt2lib.checkpoint import save_huggingface
from gpt2lib.evaluate.perplexity import perplexity
from gpt2lib.evaluate.score import Scorer
from gpt2lib.evaluate.tasks import guess, read_lambada
from gpt2lib.evaluate.texts import Text

pytestmark = pytest.mark.skipif(
    not (importlib.util.find_spec("lm_eval") and importlib.util.find_spec("torch")),
    reason="the bench extra is not installed",
)

# Their tasks, with the functions and templates of the installed package, on files of ours.
WIKITEXT = """
task: local_wikitext
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
output_type: loglikelihood_rolling
test_split: test
doc_to_text: ""
doc_to_target: !function preprocess_wikitext.wikitext_detokenizer
process_results: !function preprocess_wikitext.process_results
metric_list: [{{metric: word_perplexity}}, {{metric: byte_perplexity}}, {{metric: bits_per_byte}}]
"""
LAMBADA = """
include: {package}/tasks/lambada/lambada_openai.yaml
task: local_lambada
dataset_path: json
dataset_name: null
dataset_kwargs: {{data_files: {{test: {file}}}}}
"""
HARNESS = """
import json, sys
import lm_eval
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
model, tasks = sys.argv[1:]
found = lm_eval.simple_evaluate(
    model=HFLM(pretrained=model, device="cpu", dtype="float32", batch_size=1),
    tasks=["local_wikitext", "local_lambada"],
    task_manager=TaskManager(include_path=tasks, include_defaults=False),
    bootstrap_iters=0,
)
print("RESULTS" + json.dumps(found["results"], default=str))
"""


@pytest.fixture(scope="module")
def tokenizer(learnt):
    return learnt[1]


@pytest.fixture(scope="module")
def model(learnt):
    return learnt[0]


@pytest.fixture(scope="module")
def files(learnt, tmp_path_factory):
    """A file of each layout: pages as words between blanks, passages."""
    folder, stories = tmp_path_factory.mktemp("files"), learnt[2]
    pages = [re.sub(r"([.,!?;:])", r" \1", story) + " \n" for story in stories[:12]]
    passages = [" ".join(story.split()[:n]).strip('."!?,') for n, story in enumerate(stories[:60], 4)]
    (folder / "pages.jsonl").write_text("".join(json.dumps({"page": page}) + "\n" for page in pages))
    (folder / "lambada.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in passages))
    return folder


@pytest.fixture(scope="module")
def theirs(model, tokenizer, files, tmp_path_factory):
    folder = tmp_path_factory.mktemp("harness")
    package = Path(importlib.util.find_spec("lm_eval").origin).parent
    save_huggingface(model, folder / "model", tokenizer)
    (folder / "tasks").mkdir()
    source = package / "tasks" / "wikitext" / "preprocess_wikitext.py"
    (folder / "tasks" / source.name).write_text(source.read_text())
    (folder / "tasks" / "w.yaml").write_text(WIKITEXT.format(file=files / "pages.jsonl"))
    (folder / "tasks" / "l.yaml").write_text(LAMBADA.format(file=files / "lambada.jsonl", package=package))
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(folder / "cache")}
    done = subprocess.run(
        [sys.executable, "-c", HARNESS, str(folder / "model"), str(folder / "tasks")],
        env=os.environ | offline,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.partition("RESULTS")[2])


def test_word_perplexity(model, tokenizer, files, theirs):
    source = Path(importlib.util.find_spec("lm_eval").origin).parent / "tasks" / "wikitext" / "preprocess_wikitext.py"
    spec = importlib.util.spec_from_file_location("preprocess_wikitext", source)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    pages = [json.loads(line)["page"] for line in (files / "pages.jsonl").read_text().splitlines()]
    words = [len(re.split(r"\s+", page)) for page in pages]
    text = Text("pages", [module.wikitext_detokenizer({"page": page}) for page in pages], words, joined=False)
    lengths = [len(tokenizer.encode(document)) for document in text.documents]
    n_ctx = model.config.n_ctx
    assert max(lengths) > 2 * n_ctx and any(n % n_ctx for n in lengths), "windows are not put to the test"
    ours = perplexity(Scorer(model), tokenizer, text, full=True)
    expected = theirs["local_wikitext"]
    assert ours["perplexity"] == pytest.approx(expected["word_perplexity,none"], rel=1e-5)
    n_bytes = sum(len(page.encode()) for page in pages)
    assert ours["nats"] / n_bytes / math.log(2) == pytest.approx(expected["bits_per_byte,none"], rel=1e-5)
    other = perplexity(Scorer(model), tokenizer, text)
    assert other["perplexity"] != pytest.approx(ours["perplexity"], rel=3e-5), "the last window makes no difference"


def test_lambada(model, tokenizer, files, theirs):
    passages = read_lambada(files / "lambada.jsonl", prepared=False)
    assert any(len(tokenizer.encode(word)) > 1 for _, word in passages), "all words are single tokens"
    ours = guess(Scorer(model), tokenizer, passages, start=False)
    expected = theirs["local_lambada"]
    assert ours["perplexity"] == pytest.approx(expected["perplexity,none"], rel=1e-5)
    assert ours["accuracy"] == pytest.approx(expected["acc,none"], abs=1e-9)
    assert 0 < ours["accuracy"] < 1
