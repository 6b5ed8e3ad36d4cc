"""The tree keeps its own rules: imports point one way, studies load, notebooks hold what they must."""

import ast
import json
import math
import re
import tomllib
from pathlib import Path

import nbformat
import numpy as np
import pytest
from scipy import stats

from gpt2lib import study

pytestmark = pytest.mark.backend_free

ROOT = Path(__file__).resolve().parent.parent
LIBRARY = ROOT / "gpt2lib"
SOURCES = sorted((ROOT / "notebooks").glob("*.ipynb"))
EXECUTED = sorted(p for p in (ROOT / "reports").rglob("*.ipynb") if p.suffixes == [".ipynb"] and p.name[0] != ".")
ADDRESS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["urls"]["Repository"]
STUDIES = sorted({path.parent for path in (ROOT / "reports").rglob("*.yaml")})

# What a module of gpt2lib may import of gpt2lib. A package's modules also import each other.
BASE = {"config", "seed", "fetch"}
CORE = BASE | {"attention", "model", "adafactor", "schedule", "tokenizer"}
MIDDLE = CORE | {"data", "checkpoint", "sample"}
TOP = MIDDLE | {"step", "train", "report", "device", "reading"}
MAY_IMPORT = {
    "__init__": set(),
    "config": set(),
    "seed": set(),
    "fetch": set(),
    "attention": BASE,
    **dict.fromkeys(("model", "adafactor", "schedule", "tokenizer"), BASE | {"attention"}),
    **dict.fromkeys(("data", "checkpoint"), MIDDLE),
    "sample": MIDDLE | {"device"},  # compiles what it runs
    "report": set(),
    "device": {"config"},
    "step": CORE,
    "study": {"config", "report"},
    "corpus": MIDDLE,
    "reading": {"config", "data"},
    "recipe2019": {"config"},
    "ablation": TOP | {"evaluate"},
    "benchmark": TOP | {"evaluate", "corpus"},
    **dict.fromkeys(("train", "evaluate", "plan"), TOP | {"corpus", "evaluate", "plan"}),
}


def name_of(path: Path) -> str:
    """The module of gpt2lib, or the package, that a file belongs to."""
    first, *rest = path.relative_to(LIBRARY).parts
    return first if rest else Path(first).stem


def imported(nodes) -> set[str]:
    """The full names of the modules that import statements name; `from gpt2lib import x` counts as gpt2lib.x."""
    names = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports name gpt2lib in full, so that this test can read them"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def at_import_time(node: ast.AST):
    """The statements that run when a module is imported: everything outside functions and TYPE_CHECKING."""
    for child in ast.iter_child_nodes(node):
        guarded = isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test)
        if not guarded and not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            yield child
            yield from at_import_time(child)


@pytest.mark.parametrize("path", sorted(LIBRARY.rglob("*.py")), ids=lambda path: str(path.relative_to(LIBRARY)))
def test_imports_point_one_way(path):
    tree, name = ast.parse(path.read_text()), name_of(path)
    assert name in MAY_IMPORT, f"say in MAY_IMPORT what gpt2lib.{name} may import"
    everything = imported(ast.walk(tree))
    ours = {full.split(".")[1] for full in everything if full.startswith("gpt2lib.")}
    assert ours <= MAY_IMPORT[name] | {name}
    tops = {full.split(".")[0] for full in everything}
    assert "papermill" not in tops or name == "study", "only study.py imports papermill"
    heavy = {full.split(".")[0] for full in imported(at_import_time(tree))} & {"tensorflow", "jax", "torch"}
    assert not heavy, "a backend is imported inside the function that needs it: the other runtimes do not have it"


@pytest.mark.parametrize("folder", STUDIES, ids=lambda path: path.name)
def test_every_study_passes_its_checks(folder, monkeypatch):
    monkeypatch.setenv("GPT2LIB_WORKSPACE", str(ROOT))
    for run in study.plan(folder):
        outputs = [run.file(suffix).exists() for suffix in (".ipynb", ".json")]
        assert not (run.needs and any(outputs)), f"{run.stem} says that it was not yet run, but has outputs"
        assert outputs[0] == outputs[1], f"{run.stem} has only one of its two outputs"


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.stem)
def test_a_source_notebook_has_parameters_and_no_outputs(path):
    cells = nbformat.read(path, as_version=4).cells
    assert sum("parameters" in cell.metadata.get("tags", ()) for cell in cells) == 1
    for cell in cells:
        if cell.cell_type == "code":
            assert not cell.outputs and cell.execution_count is None, "clear the outputs before saving"


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.stem)
def test_a_source_notebook_opens_in_colab(path):
    """Its badge leads to itself, its first cell of code is that of all, and both have pyproject.toml's address."""
    title, first, *_ = nbformat.read(path, as_version=4).cells
    at_colab = ADDRESS.replace("https://github.com", "https://colab.research.google.com/github")
    assert f"]({at_colab}/blob/main/notebooks/{path.name})\n" in title.source
    assert first.source == nbformat.read(SOURCES[0], as_version=4).cells[1].source
    assert f'"clone", "-q", "--depth=1", "{ADDRESS}"' in first.source


def test_the_address_stands_in_one_place():
    """Whoever moves the project changes pyproject.toml, then this in all other files."""
    found = set()
    for path in (ROOT / "README.md", *SOURCES):
        found |= set(re.findall(r"github(?:\.com)?/([\w-]+/[\w-]+)(?=[/\s\"\\)])", path.read_text()))
    assert found == {ADDRESS.removeprefix("https://github.com/")}


@pytest.mark.parametrize("path", EXECUTED, ids=lambda path: str(path.relative_to(ROOT / "reports")))
def test_an_executed_notebook_was_executed(path):
    """nbval passes over a notebook without outputs, so a reference must have them."""
    notebook = nbformat.read(path, as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1)), "run it from top to bottom"
    assert any(cell.outputs for cell in code)
    assert not any(output.output_type == "error" for cell in code for output in cell.outputs)
    home = re.compile(r"(?<![\w.~/])/(home|root|Users|work|tmp|content|opt)/\w")
    found = home.search(json.dumps([notebook.metadata, *([cell.metadata, cell.get("outputs")] for cell in code)]))
    assert not found, f"an output shows a path of one machine: {found.string[found.start() - 40 : found.end() + 40]}"


@pytest.mark.parametrize("path", sorted((ROOT / "reports").rglob("*.ipynb")), ids=lambda path: path.stem)
def test_numbers_beside_a_notebook_say_where_they_came_from(path):
    if path not in EXECUTED:
        pytest.skip("an unfinished or failed run")
    recorded = json.loads(path.with_suffix(".json").read_text())
    assert recorded["git_commit"] and recorded["versions"] and recorded["device"]
    assert recorded["inputs"], "only a study writes numbers to keep"


@pytest.mark.parametrize(
    ("study", "suffix"), [("docstrings", ""), ("quickstart", "-adamw"), ("quickstart", "-adafactor")]
)
def test_readme_says_what_was_recorded(study, suffix):
    """A row of the league table for each run, from the numbers of its notebooks."""
    trained, measured = (
        json.loads((ROOT / "reports" / study / f"{name}{suffix}.json").read_text())["numbers"]
        for name in ("03_train", "04_evaluate")
    )
    model, bigram = (measured["results"][name] for name in ("model", "bigram"))
    cells = [
        f"`reports/{study}`",
        f"{trained['parameters'] / 1e6:.1f} M, {trained['config']['optimizer']}",
        f"{trained['tokens_seen'] / 1e6:.1f} M",
        f"{model['loss']:.2f} ± {model['loss_se']:.2f}",
        f"{model['perplexity']:.0f} ± {model['perplexity_se']:.0f}",
        f"{model['bits_per_byte']:.2f} ± {model['bits_per_byte_se']:.2f}",
        f"{bigram['loss']:.2f}",
    ]
    assert f"| {' | '.join(cells)} |" in (ROOT / "README.md").read_text()


def test_readme_says_how_fast_it_was():
    """A row for each precision and batch of the benchmark."""
    numbers = json.loads((ROOT / "reports" / "benchmark" / "08_benchmark.json").read_text())["numbers"]
    rows, readme = numbers["training"], (ROOT / "README.md").read_text()
    for ours, peer, fused in zip(rows[::3], rows[1::3], rows[2::3], strict=True):
        cells = [f"{ours['precision']}, {ours['batch']}", f"{ours['tokens/s']:.0f}"]
        for other in (peer, fused):
            cells += [f"{other['tokens/s']:.0f}", f"{other['ours / it']:.2f}"]
        assert f"| {' | '.join(cells)} |" in readme
    evaluation = numbers["evaluation"]
    ours, peer = (8 * 512 / evaluation["seconds"][name] for name in ("ours", "peer"))
    assert f"{ours:,.0f} tokens/s beside {peer:,.0f} of Hugging Face's forward pass, {ours / peer:.1f} times" in readme
    assert f"all of LAMBADA in\n{evaluation['lambada_minutes']:.0f} minutes" in readme
    rows = numbers["generation"]["rows"]
    for ours, peer in zip(rows, [*rows[1:], {"program": "gpt2lib"}], strict=True):
        if ours["program"] == "gpt2lib":
            alone = peer["program"] == "gpt2lib"
            cells = [
                f"{ours['precision']}, {ours['at once']} at once",
                f"{ours['tokens/s']:.0f}",
                "– | –" if alone else f"{peer['tokens/s']:.0f} | {peer['ours / it']:.2f}",
                f"{ours['of reads, %']:.0f}%",
            ]
            assert f"| {' | '.join(cells)} |" in readme
    beside = [
        f"{100 - row['of reads, %']:.0f}%" for row in rows if (row["at once"], row["of reads, %"] is None) == (1, False)
    ]
    assert "not reading is {} of the time in float32 and {} in bfloat16".format(*beside) in readme


def test_readme_says_what_a_corpus_costs():
    """From web pages to tokens, beside datatrove, and the plan that follows from it."""
    numbers = json.loads((ROOT / "reports/benchmark/08_benchmark-corpus.json").read_text())["numbers"]["corpus"]
    readme = (ROOT / "README.md").read_text()
    for row in numbers["rows"]:
        cells = [row["program"], f"{row['pages']:,}", f"{row['texts that stay']:,}", f"{row['to clean text, s']:.1f}"]
        cells += [f"{row['to tokens, s']:.2f}", f"{row['HTML, MB/s']:.2f}"]
        assert f"| {' | '.join(cells)} |" in readme
    for row in numbers["plan"]:
        cells = [f"{value:,.2f}" for name, value in row.items() if name != "stage"]
        assert f"| {row['stage']} | {' | '.join(cells)} |" in readme
    ids, library, ours = (f"{numbers['encoding_bytes_per_second'][n] / 1e6:.1f}" for n in ("ids", "library", "ours"))
    assert f"Tokens alone are made at {ids} MB/s of text" in readme and f"by tiktoken's batches at {library}" in readme
    assert f"written as a corpus at {ours}" in readme


def pairs(piece, arm, other, task=None):
    """How much worse one arm is than another, seed by seed: mean and half the 95% interval, in nats per token or, of a
    task, per word."""
    runs = json.loads((ROOT / f"reports/ablation/07_ablate-{piece}.json").read_text())["numbers"]["runs"]
    losses = [[math.log(x["perplexities"][task]) if task else x["loss"] for x in runs[name]] for name in (arm, other)]
    gaps = np.subtract(*losses)
    return np.mean(gaps), stats.t.ppf(0.975, len(gaps) - 1) * np.std(gaps, ddof=1) / math.sqrt(len(gaps))


def test_the_verdict_says_what_restarts_cost():
    """Against as many epochs as there would have been without them, seed by seed."""
    text, rows, no = (ROOT / "reports/ablation/README.md").read_text(), {}, "no restarts, stitch"
    verdict = " ".join(text.split())
    for piece, one, other in (("5-as-PrettyBig", 109, 136), ("2-switches", 25, 32)):
        said = [pairs(piece, arm, no) for arm in ("restart, stitch", "restart, stitch 4")]
        factors = [f"{math.exp(gap):.2f}" for gap, _ in said]
        gaps = [f"{gap:.2f} ± {half:.2f}" for gap, half in said]
        assert f"lie {gaps[0]} and {gaps[1]} nats, factors of {factors[0]} and {factors[1]}." in verdict
        assert f"{factors[0]} ({one} epochs) to {factors[1]} ({other} epochs)" in verdict
        rows[piece] = f"| {factors[0]} ({one}) to {factors[1]} ({other}) |"
    wanted = [("PrettyBig's epochs, all documents equally often", f"{rows['5-as-PrettyBig']} – | – |")]
    for label, arm in (
        ("PrettyBig, its long documents more often", "restart, hosts, long, stitch"),
        ("the same with its dropout", "restart, hosts, long, stitch, dropout"),
    ):
        wanted.append((label, f"| {math.exp(pairs('5-as-PrettyBig', arm, no)[0]):.2f} | – | – |"))
    arm = "restart, hosts, long, stitch"
    docstrings = math.exp(pairs("2-switches", arm, "no restarts, hosts, long, stitch")[0])
    for label, first, arm, other in (
        (
            "1.5B, its long documents more often",
            f"| {docstrings:.2f} |",
            "restart, long, stitch",
            "no restarts, long, stitch",
        ),
        ("the same with all else of 2019", "| – |", "2019", "2019 without restarts"),
        ("1.5B's epochs, all documents equally often", rows["2-switches"], "restart, stitch", no),
    ):
        words = interval(*pairs("3-webtext", arm, other, "wikitext2"))
        wanted.append((label, f"{first} {math.exp(pairs('3-webtext', arm, other)[0]):.2f} | {words} |"))
    for label, cells in wanted:
        assert re.search(rf"^\| {re.escape(label)} \| [^|]* {re.escape(cells)}$", text, re.MULTILINE), label
    together, alone = "restart, hosts, stitch", "restart, stitch"
    (here, _), (webtext, half) = pairs("2-switches", together, alone), pairs("3-webtext", together, alone)
    assert f"add little to restarts**: {abs(here):.2f} nats here and {webtext:.2f} ± {half:.2f} on WebText" in verdict


def test_the_ablation_takes_up_to_six_hours():
    """Of two cores: a run takes one."""
    pieces = [json.loads(path.read_text())["numbers"] for path in (ROOT / "reports/ablation").glob("07_*.json")]
    hours = sum(piece["minutes"] for piece in pieces) / 2 / 60
    assert hours <= 6
    assert f"All pieces take {hours:.1f} hours of two CPU cores." in (ROOT / "reports/ablation/README.md").read_text()


def test_the_verdict_says_what_all_of_it_costs():
    """Beside the good recipe on few documents, and without one choice each."""
    verdict = " ".join((ROOT / "reports/ablation/README.md").read_text().split())
    few = [math.exp(pairs("3-webtext", "2019", "no restarts, stitch", task)[0]) for task in (None, "wikitext2", "ptb")]
    assert "they cost {:.2f}, {:.2f} and {:.2f}.".format(*few) in verdict
    without = ("2019 at the good rate", "2019 without restarts", "2019 that reads everything")
    gains = [pairs("3-webtext", "2019", arm)[0] for arm in without]
    said = "the good rate (not swept again) gains {:.2f} nats, no restarts {:.2f}, reading everything {:.2f};"
    assert said.format(*gains) in verdict
    reading = interval(*pairs("3-webtext", "2019", "2019 that reads everything", "wikitext2"))
    assert f"There its reading costs {math.exp(gains[2]):.2f} on WebText and {reading} zero-shot" in verdict


def test_the_verdict_says_what_keeps_a_model_from_learning_by_heart():
    """What dropout and the small rate take away of the cost of 2019's reading, and what 2019 is without dropout."""
    verdict, piece = " ".join((ROOT / "reports/ablation/README.md").read_text().split()), "8-by-heart"
    reading, _ = pairs(piece, "restart, long, stitch", "good")
    arms = [f"its reading, {with_}" for with_ in ("matrix dropout", "dropout", "both dropouts", "small rate")]
    gains = [pairs(piece, "restart, long, stitch", arm) for arm in arms]
    said = (
        "of the {:.2f} nats that its reading costs, dropout of matrices alone takes away {:.2f}, dropout elsewhere "
        "{:.2f}, both {:.2f}, and the small rate {:.2f}."
    )
    assert said.format(reading, *(gain for gain, _ in gains)) in verdict
    said = "dropout of matrices takes away {}, dropout elsewhere {}, both {}, the small rate {}."
    assert said.format(*(f"{gain:.2f} ± {half:.2f}" for gain, half in gains)) in verdict
    runs = json.loads((ROOT / f"reports/ablation/07_ablate-{piece}.json").read_text())["numbers"]["runs"]
    curves = [np.mean([[loss for _, loss in run["curve"]] for run in runs[arms[i]]], axis=0) for i in (1, 3)]
    assert "it ends {:.2f} and {:.2f} nats above its lowest".format(*(x[-1] - x.min() for x in curves)) in verdict
    beside = pairs(piece, "its reading, dropout", "its reading, both dropouts")[0]
    assert f"where it gains {gains[0][0]:.2f} nats, and {beside:.2f} beside the other kind." in verdict
    without, whole = pairs(piece, "2019 without dropout", "good")[0], pairs("3-webtext", "2019", "good")[0]
    shot = interval(*pairs(piece, "2019 without dropout", "good", "wikitext2"))
    of_all = math.exp(pairs("3-webtext", "2019", "good", "wikitext2")[0])
    said = (
        f"costs {math.exp(without):.2f} instead of {math.exp(whole):.2f}, and zero-shot {shot} instead of {of_all:.2f}"
    )
    assert said in verdict


def interval(gap, half):
    """The factor in perplexity and its 95% interval, as the tables have them."""
    return "{:.2f} ({:.2f} to {:.2f})".format(*(math.exp(gap + x) for x in (0, -half, half)))


@pytest.mark.parametrize("path", sorted((ROOT / "reports/ablation").glob("07_*.json")), ids=lambda path: path.stem)
def test_the_verdict_has_what_was_recorded(path):
    """Each piece of the ablation has a table of its arms, and the losses by learning rate where it has those."""
    numbers, verdict = json.loads(path.read_text())["numbers"], (path.parent / "README.md").read_text()
    scales = dict.fromkeys((row["parameters"], row["tokens"]) for row in numbers["scales"])  # the arms are among them
    for scale in scales:
        rows = [row for row in numbers["scales"] if (row["parameters"], row["tokens"]) == scale]
        cells = [f"{scale[0]:,}", f"{scale[1] / 1e6:.1f}", f"{rows[0]['good']:.2f}", f"{rows[0]['bigram']:.2f}"]
        cells += [f"{row['worse by']:.2f} ± {row['± 95%']:.2f}" for row in rows]
        assert f"| {' | '.join(cells)} |\n" in verdict
    for row in [] if scales else numbers["arms"]:
        gap = "" if row["arm"] == "good" else f"{row['worse by']:.2f}"
        gap += f" ± {row['± 95%']:.2f}" if gap and row["± 95%"] else ""
        factor = f"{row['factor in perplexity']:.2f}" if gap else ""
        line = f"| {row['arm']} | {row['loss']:.2f} | {gap} | {factor} | {row['documents']:,} |"
        line += f" {row['epochs']:.1f} |" if "epochs" in row else ""
        piece = path.stem.removeprefix("07_ablate-")
        if piece in ("3-webtext", "8-by-heart"):  # other models know nothing of prose
            for task in ("wikitext2", "ptb"):
                times = interval(*pairs(piece, row["arm"], "good", task)) if gap else ""
                line += f" {row[task]:,.0f} | {times} |"
        assert line + "\n" in verdict
    for name, points in numbers["rates"].items():
        losses = ", ".join(f"{rate:g}: diverged" if loss is None else f"{rate:g}: {loss:.2f}" for rate, loss in points)
        assert f"{name}: {losses}" in verdict.replace("\n", " ")


def test_the_verdict_begins_with_the_factors():
    def arms(piece):
        recorded = json.loads((ROOT / f"reports/ablation/07_ablate-{piece}.json").read_text())["numbers"]
        return {row["arm"]: row for row in recorded["arms"]}

    verdict, alone, webtext = (ROOT / "reports/ablation/README.md").read_text(), arms("2-switches"), arms("3-webtext")
    piece = {arm: "3-webtext" for arm in webtext}
    piece |= {arm: "8-by-heart" for arm in arms("8-by-heart") if arm not in piece}
    webtext = arms("8-by-heart") | webtext
    reads = "how it reads: restarts, 70% of windows of few long documents, none shuffled; hosts on docstrings only"
    alone["restart, long, stitch"] = alone["restart, hosts, long, stitch"]
    for choice, arm in (
        ("all of the 1.5B's", "2019"),
        (reads, "restart, long, stitch"),
        ("a relative rate that is too small, rate times steps 75", "small rate"),
        ("dropout of embedding matrices", "matrix dropout"),
        ("restarts and hosts that read alike, all documents equally often", "restart, hosts, stitch"),
        ("all of it but the rate", "2019 at the good rate"),
        ("all of it but restarts", "2019 without restarts"),
        ("all of it but how it reads", "2019 that reads everything"),
        ("all of it but dropout", "2019 without dropout"),
        ("how it reads, with both kinds of its dropout", "its reading, both dropouts"),
        ("how it reads, with its rate", "its reading, small rate"),
        ("dropout elsewhere", "dropout"),
        ("weight decay of all variables, beside none", "decay"),
        ("windows of stitched documents", "stitch"),
        ("no clipping, tried with Adafactor only", "no clipping"),
    ):
        cells = [f"{rows[arm]['factor in perplexity']:.2f}" if arm in rows else "–" for rows in (alone, webtext)]
        cells += [interval(*pairs(piece[arm], arm, "good", "wikitext2")) if arm in webtext else "–"]
        assert re.search(
            rf"^\| {re.escape(choice)} \| [^|]* \| {re.escape(' | '.join(cells))} \|$", verdict, re.MULTILINE
        )


def test_the_verdict_says_how_often_documents_were_read():
    numbers = json.loads((ROOT / "reports/ablation/07_ablate-6-scales.json").read_text())["numbers"]["read_in_2019"]
    verdict = (ROOT / "reports/ablation/README.md").read_text()
    for name, row in numbers.items():
        cells = [name, f"{row['documents'] / 1e6:.1f}", f"{row['share']:.0%}", f"{row['passes']:,.0f}"]
        cells += [f"{row[key] / 1e9:.1f}" for key in ("tokens", "distinct_tokens")]
        cells += [f"{row[key]:.1f}" for key in ("epochs", "tokens_per_parameter", "distinct_per_parameter")]
        assert f"| {' | '.join(cells)} |\n" in verdict
    runs, mean = (numbers["PrettyBig"], numbers["1.5B"]), 1128  # tokens of a document
    long = [0.7 * run["tokens"] / (mean * run["long_documents"]) for run in runs]
    others = [0.3 * run["tokens"] / (mean * (run["documents"] - run["long_documents"])) for run in runs]
    said = "{:.0f} times by PrettyBig and {:.0f} times by the 1.5B, the others {:.0f} and {:.0f} times"
    assert said.format(*long, *others) in " ".join(verdict.split())


def test_the_verdict_says_what_would_settle_it():
    """Hours and dollars by the plan: two dollars a chip-hour, a chip has two cores."""
    best = json.loads((ROOT / "reports" / "plan" / "00_plan.json").read_text())["numbers"]["best"]
    verdict = " ".join((ROOT / "reports/ablation/README.md").read_text().split())
    for tokens, of in (
        (300_000 * 32_768, "117M v3-8"),
        (53.7e9, "117M v3-8"),
        (30_000 * 512 * 1024, "1.5B v3-512"),
        (300_000 * 512 * 1024, "1.5B v3-512"),
    ):
        hours = tokens * best[of]["seconds"] / best[of]["tokens"] / 3600
        dollars = 2 * hours * int(of.rpartition("-")[2]) / 2
        topology = of.split()[1]
        assert re.search(
            rf"takes {hours:.1f} hours of a (TPU )?{topology}[\w ]* and costs {dollars:,.0f} dollars", verdict
        )


def test_readme_says_what_the_ablation_found():
    recorded = json.loads((ROOT / "reports" / "ablation" / "07_ablate-3-webtext.json").read_text())["numbers"]
    everything = {row["arm"]: row for row in recorded["arms"]}["2019"]
    factor, readme = everything["factor in perplexity"], (ROOT / "README.md").read_text().replace("\n", " ")
    assert f"cost a factor of {factor:.2f} in perplexity" in readme
    assert f"{interval(*pairs('3-webtext', '2019', 'good', 'wikitext2'))} zero-shot on WikiText-2" in readme


def test_readme_says_what_the_compiler_said():
    """The claim of 2019, what makes Adam fit after all, and how well the chips are used."""
    numbers = json.loads((ROOT / "reports" / "plan" / "00_plan.json").read_text())["numbers"]
    readme = " ".join((ROOT / "README.md").read_text().split())

    def gib(row):
        return f"{row['total'] / 2**30:.1f}"

    claim = {
        (row["optimizer"], row["dtype"]): row
        for row in numbers["grid"]
        if (row["size"], row["topology"]) == ("1.5B", "v3-512")
    }
    for name, optimizer in (("AdamW", "adamw"), ("Adafactor", "adafactor")):
        rows = [claim[optimizer, dtype] for dtype in ("float32", "mixed_bfloat16", "bfloat16")]
        cells = [f"{gib(row)} GiB" + ("" if row["fits"] else ", refused") for row in rows]
        assert f"| {name} | {' | '.join(cells)} |" in readme
    adam = [row for row in numbers["means"] if (row["optimizer"], row["dtype"]) == ("adamw", "mixed_bfloat16")]
    known = {"remat", "loss_chunk", "accumulate", "sharded"}
    means = {name: next(row for row in adam if known & row.keys() == {name}) for name in known}
    assert [name for name, row in means.items() if row["fits"]] == ["sharded"]
    for name, said in (("remat", "rematerialisation ({})"), ("loss_chunk", "a loss in chunks ({})"),
                       ("accumulate", "accumulation ({})"), ("sharded", "v3-8: {} GiB")):  # fmt: skip
        assert said.format(gib(means[name])) in readme
    best = numbers["best"]
    assert f"117M reaches {best['117M v3-8']['mfu']:.0%} of a v3's peak" in readme
    assert f"would allow {best['117M v5e-8']['roofline_mfu']:.0%}" in readme
    days = [row["days"] for row in numbers["history"] if row["dtype"] == "float32"]
    assert len(days) == 4 and f"would take {min(days):.1f} to {max(days):.1f} days" in readme
