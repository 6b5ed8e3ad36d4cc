"""Studies: everything is checked before anything runs; outputs are replaced only by a run that went well."""

import json
import shutil
import sys
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from gpt2lib import study

pytestmark = pytest.mark.backend_free

PARAMETERS = """\
stem = None  # set by the study
steps = 2
learning_rate = 1e-2  # relative
name = "a # b"
choice = None
verbose = False
options = {}
"""
BODY = """\
import pathlib, sys
print(sys.executable == pathlib.Path("data/python.txt").read_text(), pathlib.Path.cwd().name)
if name == "exit": sys.exit(0)
if name == "fail": raise ValueError("first line\\nthe last line")
"""
RECORD = """\
from gpt2lib.report import data_folder, record
made = data_folder(pathlib.Path(stem).name)
made.mkdir(parents=True, exist_ok=True)
if name != "silent": record(stem, {"steps": steps, "name": name}, artifacts=[made])
if name == "late": raise ValueError("after the record")
"""


def write_notebook(path: Path, *sources: str) -> None:
    """A source notebook: a title, a parameters cell (the first source), code; no outputs, no kernel."""
    parameters, *code = map(new_code_cell, sources)
    parameters.metadata.tags = ["parameters"]
    path.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(new_notebook(cells=[new_markdown_cell("# Why?"), parameters, *code]), path)


@pytest.fixture
def root(tmp_path, monkeypatch):
    """A workspace with one notebook, `01_tiny`, and an empty study."""
    monkeypatch.setenv("GPT2LIB_WORKSPACE", str(tmp_path))
    monkeypatch.delenv("GPT2LIB_DATA", raising=False)
    write_notebook(tmp_path / "notebooks" / "01_tiny.ipynb", PARAMETERS, BODY, RECORD)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "python.txt").write_text(sys.executable)
    (tmp_path / "reports" / "s").mkdir(parents=True)
    return tmp_path.resolve()


def write_yaml(root: Path, name: str, text: str) -> Path:
    path = root / "reports" / "s" / f"{name}.yaml"
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("01_tiny", "# why\nstep: 3\n", "01_tiny.ipynb has no parameter `step`; did you mean `steps`?"),
        ("01_tiny", "# why\nsteps: 3.5\n", "`steps` must be of type int like its default 2"),
        ("01_tiny", "# why\nsteps: true\n", "`steps` must be of type int"),
        ("01_tiny", "# why\nverbose: 1\n", "`verbose` must be of type bool"),
        ("01_tiny", "# why\nlearning_rate: 1e-4\n", "`learning_rate` is the text '1e-4' to YAML, not a number; "
                                                    "write 1.0e-4"),
        ("01_tiny", "# why\nchoice: 1.5e4\n", "write 1.5e+4"),
        ("01_tiny", "# why\noptions: {eps: [1e-8]}\n", "`options.eps` is the text '1e-8'"),
        ("01_tiny", "steps: 3\n", "does not begin with a comment"),
        ("01_tiny", "# why\nsteps: [\n", "is no valid YAML"),
        ("01_tiny", "# why\n- steps\n", "holds a list, not parameters"),
        ("01_tiny", "# why\nstem: x\n", "sets `stem`"),
        ("01_tinny", "# why\n", "there is no notebook 01_tinny.ipynb; did you mean `01_tiny`?"),
        ("01_tiny2", "# why\n", "there is no notebook 01_tiny2.ipynb"),
        ("01_tiny", "# not yet run: needs a TPU\nstep: 3\n", "no parameter `step`"),
    ],
)  # fmt: skip
def test_a_wrong_yaml_is_one_sentence_and_nothing_runs(root, capsys, name, text, message):
    write_yaml(root, "01_tiny-a", "# this one is right\n")
    path = write_yaml(root, name, text)
    assert study.main(["reports/s"]) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith(f"reports/s/{path.name}: ") and message in printed.err
    assert printed.err.count("\n") == 1 and not printed.out
    assert sorted(p.name for p in path.parent.iterdir()) == sorted({path.name, "01_tiny-a.yaml"})


def test_every_wrong_yaml_is_named(root, capsys):
    write_yaml(root, "01_tiny-a", "# why\nstep: 3\n")
    write_yaml(root, "01_tiny-b", "# why\nsteps: x\n")
    assert study.main(["reports/s"]) == 2
    assert [line.split(":")[0] for line in capsys.readouterr().err.splitlines()] == [
        "reports/s/01_tiny-a.yaml",
        "reports/s/01_tiny-b.yaml",
    ]


def test_what_may_be_given(root):
    text = "# why\nsteps: 3\nlearning_rate: 1\nname: 1e-4\nchoice: [1, x]\nverbose: true\noptions: {a: 1.0e-8}\n"
    write_yaml(root, "01_tiny", text)
    write_yaml(root, "01_tiny-null", "# why\nlearning_rate: null\n")
    write_notebook(root / "notebooks" / "01_tiny-long.ipynb", "stem = None\n")
    write_yaml(root, "01_tiny-long-variant", "# the notebook with the longest fitting name, no parameters\n")
    runs = study.plan("reports/s")
    assert [run.source.stem for run in runs] == ["01_tiny", "01_tiny-long", "01_tiny"]
    assert runs[0].parameters["name"] == "1e-4" and runs[0].parameters["stem"] == "reports/s/01_tiny"


@pytest.mark.parametrize(("folder", "message"), [("reports/t", "is no folder below"), ("reports/s", "has no .yaml")])
def test_a_study_that_is_not_there(root, capsys, folder, message):
    assert study.main([folder]) == 2
    assert message in capsys.readouterr().err


def test_only_names_the_nearest(root, capsys):
    write_yaml(root, "01_tiny-a", "# why\n")
    assert study.main(["reports/s", "--only", "01_tiny-b"]) == 2
    assert "did you mean `01_tiny-a`?" in capsys.readouterr().err


def test_not_yet_run_runs_when_asked(root, capsys, monkeypatch):
    write_yaml(root, "01_tiny", "# not yet run: needs a TPU\nsteps: 3\n")
    ran = []
    monkeypatch.setattr(study, "execute", lambda run, **_: ran.append(run.stem))
    assert study.main(["reports/s", "--not-yet-run"]) == 0
    assert ran == ["reports/s/01_tiny"]
    assert "reports/s/01_tiny: done" in capsys.readouterr().out


def test_not_yet_run_is_skipped_and_says_so(root, capsys):
    write_yaml(root, "01_tiny", "# not yet run: needs a TPU\nsteps: 3\n")
    assert study.main(["reports/s"]) == 0
    assert capsys.readouterr().out == "reports/s/01_tiny: skipped, needs a TPU; --not-yet-run runs it\n"


def test_what_needs_a_file_is_left_out_without_it(root, capsys, monkeypatch):
    write_yaml(root, "01_tiny", "# only with data/some/file.txt\nsteps: 3\n")
    write_yaml(root, "01_tiny-b", "# always\n")
    ran = []
    monkeypatch.setattr(study, "execute", lambda run, **_: ran.append(run.stem))
    assert study.main(["reports/s"]) == 0 and ran == ["reports/s/01_tiny-b"]
    assert "reports/s/01_tiny: skipped, it needs data/some/file.txt, which is not there\n" in capsys.readouterr().out
    (root / "data" / "some").mkdir(parents=True)
    (root / "data" / "some" / "file.txt").touch()
    assert study.main(["reports/s"]) == 0 and ran[1:] == ["reports/s/01_tiny", "reports/s/01_tiny-b"]


def test_a_study_from_the_first_run_to_the_last(root, capfd, monkeypatch):
    """One story, since every run starts a kernel: run, up to date, what makes it run again, outputs of failed runs."""
    foreign = root / "jupyter" / "kernels" / "python3"
    foreign.mkdir(parents=True)
    spec = {"argv": ["/nowhere/python", "-f", "{connection_file}"], "display_name": "x", "language": "python"}
    (foreign / "kernel.json").write_text(json.dumps(spec))
    monkeypatch.setenv("JUPYTER_PATH", str(root / "jupyter"))  # another environment's python3 must not be taken
    write_yaml(root, "01_tiny-a", "# why\nsteps: 3\n")
    write_yaml(root, "01_tiny-b", "# why\n")
    folder = root / "reports" / "s"

    def run(*options) -> list[str]:
        """The stems that ran."""
        assert study.main(["reports/s", *options]) == 0
        printed = capfd.readouterr()  # of the kernels as well
        *lines, last = printed.out.splitlines()
        assert not printed.err
        assert last == f"Report: reports/s/{options[1] if options else '01_tiny-b'}.ipynb"
        return [line.split("-")[1][0] for line in lines if "done in" in line]

    assert run() == ["a", "b"]
    text = (folder / "01_tiny-a.ipynb").read_text()
    notebook = nbformat.reads(text, as_version=4)
    nbformat.validate(notebook)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == [1, 2, 3, 4]
    assert cells[2].outputs[0].text == f"True {root.name}\n", "the interpreter of the study, in the workspace"
    assert 'stem = "reports/s/01_tiny-a"' in cells[1].source and "steps = 3" in cells[1].source
    assert str(root) not in text and str(Path.home()) not in text
    assert not any({"papermill", "execution"} & cell.metadata.keys() for cell in notebook.cells)
    recorded = json.loads((folder / "01_tiny-a.json").read_text())
    assert recorded["numbers"] == {"steps": 3, "name": "a # b"} and recorded["artifacts"] == ["data/01_tiny-a"]
    assert {p.name for p in folder.iterdir()} == {
        f"01_tiny-{v}.{kind}" for v in "ab" for kind in ("yaml", "ipynb", "json")
    }

    assert run() == []
    shutil.rmtree(root / "data" / "01_tiny-b")
    assert run() == ["b"]
    assert (folder / "01_tiny-a.ipynb").read_text() == text
    write_yaml(root, "01_tiny-a", "# a comment may change\nsteps: 3\n")
    assert run() == []
    write_yaml(root, "01_tiny-a", "# why\nsteps: 4\n")
    assert run("--only", "01_tiny-b") == []
    assert run() == ["a", "b"], "what reads a new output runs again"

    before = {p: p.read_bytes() for p in folder.iterdir() if p.suffix != ".yaml"}
    for name, sentence in {
        "fail": "In [3] stopped with ValueError: the last line",
        "exit": "In [3] left the notebook early",
        "silent": "it did not write 01_tiny-a.json",
        "late": "In [4] stopped with ValueError: after the record",
    }.items():
        write_yaml(root, "01_tiny-a", f"# why\nname: {name}\n")
        assert study.main(["reports/s"]) == 1
        printed = capfd.readouterr()
        assert printed.err.startswith("reports/s/01_tiny-a failed: ") and sentence in printed.err
        assert printed.err.count("\n") == 1
        assert "done in" not in printed.out, "later notebooks do not run"
        failed = folder / "01_tiny-a.failed.ipynb"
        assert f'name = \\"{name}\\"' in failed.read_text()
        assert {p: p.read_bytes() for p in folder.iterdir() if p.suffix != ".yaml" and p != failed} == before
        failed.unlink()


def test_a_dead_kernel_is_a_failure(root, capsys):
    write_notebook(
        root / "notebooks" / "02_dies.ipynb", "stem = None\n", "import os\nos.write(2, b'no room\\n')\nos._exit(1)\n"
    )
    write_yaml(root, "02_dies", "# why\n")
    assert study.main(["reports/s"]) == 1
    said = capsys.readouterr().err
    assert said.startswith("reports/s/02_dies failed: Kernel died") and "; it said last: no room; see " in said
    assert not (root / "reports" / "s" / "02_dies.ipynb").exists()


def test_a_record_made_again_outdates_what_follows(root):
    write_yaml(root, "01_tiny", "# why\n")
    write_yaml(root, "01_tiny-b", "# why\n")
    first, second = study.plan("reports/s")
    before = first.inputs(), second.inputs()
    first.file(".json").write_text('{"numbers": 1}')
    assert first.inputs() == before[0]
    assert second.inputs() != before[1]


def test_force_trains_from_the_start(root):
    body = "from gpt2lib import report\nreport.record(stem, {'restart': restart})\n"
    write_notebook(root / "notebooks" / "03_restarts.ipynb", "stem = None\nrestart = False\n", body)
    write_yaml(root, "03_restarts", "# why\n")
    for force in (False, True):
        assert study.main(["reports/s", *["--force"] * force]) == 0
        assert json.loads((root / "reports/s/03_restarts.json").read_text())["numbers"] == {"restart": force}


def test_a_progress_bar_leaves_its_last_state(root):
    body = "\n".join([
        "import sys",
        "from gpt2lib import report",
        "for i in range(3):",
        "    print('\\r', i, 'of 3', end='', file=sys.stderr)",
        "    sys.stderr.flush()",
        "print(file=sys.stderr)",
        "report.record(stem, {})",
    ])  # fmt: skip
    write_notebook(root / "notebooks" / "03_shows.ipynb", "stem = None\n", body)
    write_yaml(root, "03_shows", "# why\n")
    assert study.main(["reports/s"]) == 0
    cells = nbformat.read(root / "reports/s/03_shows.ipynb", as_version=4).cells
    streams = [output.text for cell in cells for output in cell.get("outputs", ()) if output.output_type == "stream"]
    assert streams == [" 2 of 3\n"]


def test_inputs_cover_notebook_parameters_and_library(root):
    write_yaml(root, "01_tiny", "# why\n")
    (run,) = study.plan("reports/s")
    first = run.inputs()
    assert first == run.inputs()
    assert first != study.Run(run.stem, run.source, {**run.parameters, "steps": 3}).inputs()
    write_notebook(run.source, PARAMETERS, BODY)
    assert first != run.inputs()
