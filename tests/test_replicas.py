"""The studies that nobody has run yet: every notebook of them goes through, at a size that a test can afford."""

import json
import re
import shutil
from pathlib import Path

import matplotlib
import nbformat
import pytest
from literal import distinctive
from test_suite import FILES

from gpt2lib import recipe2019, report, study
from gpt2lib.checkpoint import save_huggingface
from gpt2lib.config import ModelConfig, Reading, TrainConfig, size
from gpt2lib.data import Corpus
from gpt2lib.model import GPT2
from gpt2lib.tokenizer import Tokenizer

ROOT = Path(__file__).resolve().parent.parent
NAMES = ["openai-117M", "openai-345M", "replicate-117M", "replicate-345M", "replicate-PrettyBig", "replicate-1.5B"]
# What a model after four steps need not do.
LEARNT = {"model below the unigram", "loss at the end of the window below its start"}
TINY = dict(n_vocab=300, n_ctx=64, n_embd=15, n_head=3, n_layer=1)


def smaller(run) -> dict:
    """The parameters of a run, with what decides its cost cut down, and everything else as it is."""
    given = dict(run.parameters)
    kind = run.source.stem[:2]
    cuts = {
        "01": {"source": "tests/corpus", "tokenizer": None, "n_vocab": 300, "n_ctx": 64, "validation_fraction": 0.1},
        "02": {"download": False, "size": None, "other_backend": False},
        "03": {"size": "test", "max_steps": 4, "warmup_steps": 1, "batch_size": 8, "sharded": False},
        "04": {"windows": 4, "limit": 3, "download": False, "tasks": ["lambada", "wikitext2", "winograd"]},
        "05": {"length": 4, "unprompted": 1, "statistics_samples": 2},
        "06": {"documents": 4, "samples": 4, "length": 6, "download": False},
    }[kind]
    given |= cuts
    if kind == "03":
        given |= {"validate_every": 2, "validation_windows": 4, "checkpoint_every": 4, "log_every": 1}
        given |= {"model": given["model"] | TINY, "expect_drop": -100.0}
        if reading := given.get("reading"):
            few = {"restart_every": 2, "hosts": min(reading.get("hosts", 1), 2), "buffer": 6, "stitch": 3}
            given["reading"] = reading | few | {"long_tokens": 40}
    if given.get("tokenizer") == "gpt2":
        given["tokenizer"] = None
    if "progress" in study._defaults(run.source):
        given["progress"] = False
    return given


def run_cells(run, given):
    """The cells of a notebook one after another in this process, its parameters replaced."""
    space = {"__name__": "__main__", "display": lambda *_: None}
    for cell in nbformat.read(run.source, as_version=4).cells:
        if cell.cell_type == "code":
            exec(compile(cell.source, f"{run.source.stem}:{cell.id}", "exec"), space)
            if "parameters" in cell.metadata.get("tags", ()):
                space.update(given)
    matplotlib.pyplot.close("all")


@pytest.fixture
def workspace(tmp_path, monkeypatch):
    """A folder with the studies, the text that tests train on, the benchmarks' layouts and released checkpoints."""
    monkeypatch.setenv("GPT2LIB_WORKSPACE", str(tmp_path))
    monkeypatch.delenv("GPT2LIB_DATA", raising=False)
    monkeypatch.chdir(ROOT)
    kept = report.expectations
    monkeypatch.setattr(report, "expectations", lambda rows: kept([r for r in rows if r[0] not in LEARNT]))
    matplotlib.use("Agg")
    for name in ("notebooks", "tests/corpus", "data/published", "tests/golden"):
        shutil.copytree(ROOT / name, tmp_path / name)
    for name in NAMES:
        shutil.copytree(ROOT / "reports" / name, tmp_path / "reports" / name)
    (tmp_path / "data" / "benchmarks").mkdir(parents=True)
    for name, content in FILES.items():
        (tmp_path / "data" / "benchmarks" / name).write_text(content)
    return tmp_path


def release(workspace, name, tokenizer=None):
    """A checkpoint where a released one would lie; None: with a vocabulary of its own."""
    texts = [path.read_text() for path in sorted((ROOT / "tests" / "corpus").iterdir())]
    model = GPT2(ModelConfig(**TINY), init=distinctive)
    tokenizer = tokenizer or Tokenizer.train(texts, TINY["n_vocab"])
    save_huggingface(model, workspace / "data" / "models" / name, tokenizer)


@pytest.mark.parametrize("name", NAMES)
def test_a_study_runs_from_its_first_notebook_to_its_last(workspace, name):
    runs = study.plan(f"reports/{name}")
    assert all(run.needs for run in runs)
    if name.startswith("openai"):
        release(workspace, name.removeprefix("openai-"))
    there = name == "replicate-117M"  # the reference, read and evaluated before; in the others it is absent
    for run in runs:
        if there and run.source.stem == "06_compare":
            release(workspace, "117M", Corpus(workspace / "data" / "corpora" / "openwebtext").tokenizer)
            (workspace / "reports" / "openai-117M" / "04_evaluate.json").write_text(
                (workspace / "reports" / name / "04_evaluate-ours.json").read_text()
            )
        run_cells(run, smaller(run))
        assert run.file(".json").exists(), run.stem
    compared = report.load(runs[-1].stem)
    assert {row["column"] for row in next(iter(compared["zero_shot"].values()))} >= {"LAMBADA ppl", "WikiText2 ppl"}
    published = any("published" in column for column in compared["zero_shot"])
    assert published != there, "a reference has its published figures where it has none of its own"
    assert compared["verdicts"]
    if there:
        models = {"2019's recipe", "today's recipe", "OpenAI 117M"}
        assert compared["zero_shot"].keys() == models == {row["model"] for row in compared["domains"]}
        assert models < compared["statistics"].keys()
        assert all(lines.keys() == models for lines in compared["groups"].values())
        of_documents = [row["verdict"] for row in compared["verdicts"] if "documents" in row["measure"]]
        assert len(of_documents) == 3, "each pair"
        held = {key for piece in compared["disagreements"] for key in piece if " - " in key}
        assert held == {"2019's recipe - OpenAI 117M", "today's recipe - OpenAI 117M"}


@pytest.mark.backend_free
@pytest.mark.parametrize("name", [name for name in NAMES if name.startswith("replicate")])
def test_what_the_recipes_say(name, monkeypatch):
    """2019's is the one that was published, and hours are those of the plans."""
    monkeypatch.setenv("GPT2LIB_WORKSPACE", str(ROOT))
    plans = report.load("reports/plan/00_plan")
    which = name.removeprefix("replicate-")
    runs = {run.stem.rpartition("-")[2]: run for run in study.plan(f"reports/{name}") if run.source.stem == "03_train"}
    fields = TrainConfig.__dataclass_fields__.keys()
    for recipe, run in runs.items():
        given = {k: v for k, v in run.parameters.items() if k in fields}
        config = TrainConfig(**given, run_dir=run.parameters["run"])
        assert config.model_config() == size(which).replace(**given["model"])
        tokens = config.batch_tokens * config.max_steps
        if recipe == "2019":
            known, reading = recipe2019.RUNS[which], Reading.from_dict(config.reading)
            assert (known.batch_size, known.max_steps) == (config.batch_size, config.max_steps)
            said = (reading.hosts, reading.restart_every, reading.long_share)
            assert said == (known.hosts, known.segment, known.long_share)
            assert config.model_config().n_params == known.parameters
            row = next(h for h in plans["history"] if h["run"] == which and h["dtype"] == "float32")
            assert tokens == pytest.approx(row["billion tokens"] * 1e9)
            hours, topology = row["days"] * 24, row["topology"]
        else:
            best, topology = plans["best"][f"{which} v3-8"], "v3-512" if which == "1.5B" else "v3-8"
            hours = tokens * best["seconds"] / best["tokens"] / 3600 * 8 / int(topology.rpartition("-")[2])
        text = run.file(".yaml").read_text().replace("\n# ", " ")
        assert f"Hardware: a TPU {topology}. Takes about {hours:.0f} hours of train steps" in text
        chips = int(topology.rpartition("-")[2]) // 2  # of two cores each
        dollars = int(re.search(r"([\d,]+) dollars\.", text)[1].replace(",", ""))
        assert dollars == pytest.approx(2 * hours * chips, rel=0.01)


@pytest.mark.backend_free
@pytest.mark.parametrize("name", NAMES)
def test_what_they_are_headed_by(name, monkeypatch):
    monkeypatch.setenv("GPT2LIB_WORKSPACE", str(ROOT))
    for run in study.plan(f"reports/{name}"):
        head = run.file(".yaml").read_text().partition("\n\n")[0].replace("\n# ", " ")
        words = ["# not yet run: needs ", " Hardware: ", " Takes ", " Expect "]
        words += [" dollars"] if name.startswith("replicate") and run.source.stem != "01_data" else []
        assert [word for word in words if word not in head] == [], run.stem


@pytest.mark.backend_free
def test_numbers_of_parameters():
    counts = {"117M": 124_439_808, "345M": 354_823_168, "PrettyBig": 367_419_392, "1.5B": 1_557_611_200}
    assert {name: size(name).n_params for name in counts} == counts
    assert json.loads((ROOT / "tests/golden/openai-124M/hparams.json").read_text()) == size("117M").hparams
