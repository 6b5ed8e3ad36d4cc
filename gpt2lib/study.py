"""Runs a study: `python -m gpt2lib.study reports/<study> [--force] [--only STEM]`.

Rule of three files: `reports/<study>/<notebook>[-<variant>].yaml` goes in; the same stem with `.ipynb` (the notebook as
Papermill executed it) and `.json` (what the notebook recorded) come out. Every yaml is checked before anything runs.
Exit codes: 0 all is up to date, 1 a notebook failed, 2 the study itself is wrong.
"""

import argparse
import ast
import contextlib
import dataclasses
import hashlib
import json
import logging
import os
import re
import signal
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import nbformat
import papermill
import yaml
from jupyter_client.kernelspec import KernelSpec
from jupyter_client.manager import AsyncKernelManager
from papermill.exceptions import PapermillExecutionError

from gpt2lib.config import nearest
from gpt2lib.report import locate, workspace, write_atomically

_LANGUAGE = {"display_name": "Python 3 (ipykernel)", "language": "python"}
_NOT_YET_RUN = "# not yet run: needs "
_ONLY_WITH = "# only with "


class StudyError(ValueError):
    """A study that cannot run; the message says which file, what is wrong and what to do."""


class RunError(RuntimeError):
    """A notebook that failed; the message says which cell and how."""


class OwnKernel(AsyncKernelManager):
    """The kernel of the interpreter that runs this study.

    Jupyter looks kernels up by name, in JUPYTER_PATH and often in the user's folder before its own environment, so
    that another environment's `python3` would answer, with other packages. What a kernel writes to its standard error
    goes to `said`: of a cell it is in the notebook as well, the rest is about Jupyter and how kernels end.
    """

    said = None  # a file

    async def start_kernel(self, **options):
        await super().start_kernel(stderr=self.said, **options)

    @property
    def kernel_spec(self) -> KernelSpec:
        quiet = ["--log-level=CRITICAL"]  # an error of a cell is in the notebook; the rest is about Jupyter
        os.environ.setdefault("PYDEVD_DISABLE_FILE_VALIDATION", "1")  # older debuggers warn, here and in the kernel
        from ipykernel.kernelspec import make_ipkernel_cmd

        return KernelSpec(argv=make_ipkernel_cmd(extra_arguments=quiet), **_LANGUAGE)


@dataclass(frozen=True)
class Run:
    """One yaml of a study, checked: a notebook and the parameters to run it with."""

    stem: str  # reports/<study>/<notebook>[-<variant>]
    source: Path  # notebooks/<notebook>.ipynb
    parameters: dict  # with `stem` itself
    needs: str = ""  # what is not at hand, from the first line `# not yet run: needs ...`
    only_with: str = ""  # a file or folder without which it is left out, from the first line `# only with data/...`
    earlier: tuple[str, ...] = ()  # the stems before it in its study, which it may read

    def file(self, suffix: str) -> Path:
        """The file with this stem and the given suffix, such as `.json`."""
        return workspace() / f"{self.stem}{suffix}"

    def inputs(self) -> str:
        """A sha256 over what decides the outputs: notebook, parameters, library, what ran before."""
        library = Path(__file__).parent
        digest = hashlib.sha256(self.source.read_bytes())
        digest.update(json.dumps(self.parameters, sort_keys=True, default=str).encode())
        for path in sorted(library.rglob("*.py")):
            digest.update(f"\n{path.relative_to(library).as_posix()}\n".encode() + path.read_bytes())
        for stem in self.earlier:
            with contextlib.suppress(OSError):
                digest.update((workspace() / f"{stem}.json").read_bytes())
        return digest.hexdigest()

    def is_up_to_date(self) -> bool:
        """True if this very notebook has run with these inputs and everything that it made is still there."""
        try:
            recorded = json.loads(self.file(".json").read_text(encoding="utf-8"))
            made = all(locate(name).exists() for name in recorded["artifacts"])
            return self.file(".ipynb").exists() and made and recorded["inputs"] == self.inputs()
        except (OSError, ValueError, KeyError):  # missing, damaged, or written outside a study
            return False


def plan(folder: str | Path) -> list[Run]:
    """The runs of a study, in the order of their names; raises StudyError with one sentence for each problem."""
    root = workspace()
    folder = (root / folder).resolve()
    if not folder.is_dir() or not folder.is_relative_to(root):
        raise StudyError(f"{folder} is no folder below {root}; give a study, such as reports/quickstart")
    paths = sorted(folder.glob("*.yaml"), key=lambda path: path.stem)  # a notebook before its variants
    if not paths:
        raise StudyError(f"{folder.relative_to(root)} has no .yaml file; a study needs one for each notebook")
    runs, problems = [], []
    for path in paths:
        try:
            runs.append(_check(path, root))
        except StudyError as error:
            problems.append(f"{path.relative_to(root).as_posix()}: {error}")
    if problems:
        raise StudyError("\n".join(problems))
    stems = [run.stem for run in runs]
    return [dataclasses.replace(run, earlier=tuple(stems[:i])) for i, run in enumerate(runs)]


def _check(path: Path, root: Path) -> Run:
    """Read one yaml strictly; the caller adds the file's name to an error."""
    text = path.read_text(encoding="utf-8")
    if not text.startswith("#"):
        raise StudyError("does not begin with a comment; say why this run exists, on what it runs and how long")
    try:
        parameters = yaml.safe_load(text) or {}
    except yaml.YAMLError as error:
        raise StudyError(f"is no valid YAML ({' '.join(str(error).split())}); correct it there") from None
    if not isinstance(parameters, dict):
        raise StudyError(f"holds a {type(parameters).__name__}, not parameters; write lines `name: value`")
    source = _source(path.stem, root)
    defaults = _defaults(source)
    if "stem" not in defaults:
        raise StudyError(f"{source.name} has no parameter `stem`; add `stem = None` to its cell tagged `parameters`")
    for name, value in parameters.items():
        if name == "stem":
            raise StudyError("sets `stem`, which is the study's to set; remove it")
        if name not in defaults:
            raise StudyError(f"{source.name} has no parameter `{name}`; {nearest(str(name), defaults)}")
        _check_type(str(name), value, defaults[name])
    stem = path.relative_to(root).with_suffix("").as_posix()
    first = text.splitlines()[0]
    needs = first.removeprefix(_NOT_YET_RUN).strip() if first.startswith(_NOT_YET_RUN) else ""
    only_with = first.removeprefix(_ONLY_WITH).strip() if first.startswith(_ONLY_WITH) else ""
    return Run(stem, source, {**parameters, "stem": stem}, needs, only_with)


def _source(stem: str, root: Path) -> Path:
    """The notebook that a yaml is for: the longest name that is the stem or begins it, up to a dash."""
    notebooks = {path.stem: path for path in (root / "notebooks").glob("*.ipynb")}
    fitting = [name for name in notebooks if stem == name or stem.startswith(f"{name}-")]
    if not fitting:
        hint = nearest(stem, notebooks) if notebooks else "the folder `notebooks` has none."
        raise StudyError(f"there is no notebook {stem}.ipynb; {hint}")
    return notebooks[max(fitting, key=len)]


def _read(source: Path) -> nbformat.NotebookNode:
    """A source notebook, set to run on Python whatever the editor that saved it wrote there."""
    notebook = nbformat.read(source, as_version=4)
    notebook.metadata.kernelspec = {"name": "python3", **_LANGUAGE}
    return notebook


def _defaults(source: Path) -> dict:
    """Name -> default of the notebook's parameters; a default that is no literal counts as None.

    Papermill's own `inspect_notebook` goes line by line and takes the `#` inside a text for a comment.
    """
    try:
        cells = [cell for cell in _read(source).cells if "parameters" in cell.metadata.get("tags", ())]
        body = ast.parse(cells[0].source).body
    except (nbformat.reader.NotJSONError, IndexError, SyntaxError):
        raise StudyError(f"{source.name} has no cell tagged `parameters` that can be read; correct it") from None
    defaults = {}
    for node in body:
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        for target in targets:
            if isinstance(target, ast.Name):
                defaults[target.id] = _literal(node.value)
    return defaults


def _literal(node: ast.expr | None):
    try:
        return ast.literal_eval(node)
    except (ValueError, TypeError):
        return None


def _check_type(name: str, value, default) -> None:
    """Raise StudyError unless `value` may replace `default`: an int may stand for a float, anything for None."""
    if not isinstance(default, str):
        _check_exponents(name, value)
    if default is None or value is None:
        return
    wanted = {float: (int, float), tuple: list}.get(type(default), type(default))
    if not isinstance(value, wanted) or isinstance(value, bool) != isinstance(default, bool):
        raise StudyError(
            f"`{name}` must be of type {type(default).__name__} like its default {default!r}, "
            f"but {value!r} is of type {type(value).__name__}; correct it"
        )


def _check_exponents(name: str, value) -> None:
    """YAML 1.1 reads 1e-4 as text: it wants a point and a sign. Raise StudyError for such a value at any depth."""
    if isinstance(value, dict):
        for key, item in value.items():
            _check_exponents(f"{name}.{key}", item)
    elif isinstance(value, list):
        for item in value:
            _check_exponents(name, item)
    elif isinstance(value, str) and (match := re.fullmatch(r"([-+]?\d+)(\.\d*)?[eE]([-+]?\d+)", value)):
        whole, fraction, exponent = match.groups()
        number = f"{whole}{fraction or '.0'}e{int(exponent):+d}"
        raise StudyError(f"`{name}` is the text {value!r} to YAML, not a number; write {number}")


def execute(run: Run, progress: bool = False, restart: bool = False) -> None:
    """Run one notebook; the outputs replace the earlier ones only when everything went well.

    `restart` is handed to a notebook with such a parameter: a training begins anew instead of going on.
    Raises RunError otherwise, and keeps the notebook as `<stem>.failed.ipynb`.
    """
    inputs, recorded = run.inputs(), run.file(".json")
    earlier = recorded.read_bytes() if recorded.exists() else None
    failed = run.file(".failed.ipynb")
    part = failed.with_name(f".{failed.name}.part.ipynb")
    try:
        extra = {"restart": True} if restart and "restart" in _defaults(run.source) else {}
        _papermill(run, part, extra, progress)
        if not recorded.exists() or recorded.read_bytes() == earlier:
            raise RunError(f"it did not write {recorded.name}; end the notebook with record(stem, ...)")
    except BaseException:  # an interrupt as well: the notebook shows how far it came
        if part.exists():
            part.replace(failed)
        if earlier is None:
            recorded.unlink(missing_ok=True)
        else:
            write_atomically(recorded, earlier)
        raise
    notebook = nbformat.read(part, as_version=4)
    _clean(notebook)
    write_atomically(run.file(".ipynb"), (nbformat.writes(notebook) + "\n").encode())
    content = {**json.loads(recorded.read_text(encoding="utf-8")), "inputs": inputs}
    write_atomically(recorded, (json.dumps(content, indent=1, ensure_ascii=False) + "\n").encode())
    part.unlink()
    failed.unlink(missing_ok=True)


def _papermill(run: Run, part: Path, extra: dict, progress: bool) -> None:
    """Execute into `part`; every way to fail becomes a RunError."""
    bar = {"desc": run.stem, "leave": False} if progress else False
    with tempfile.TemporaryFile("w+", errors="replace") as OwnKernel.said:
        try:
            notebook = papermill.execute_notebook(
                _read(run.source), part, {**run.parameters, **extra}, kernel_name="python3", language="python",
                progress_bar=bar, cwd=workspace(), kernel_manager_class=OwnKernel,
            )  # fmt: skip
        except PapermillExecutionError as error:
            last = (error.evalue.strip().splitlines() or [""])[-1]
            raise RunError(f"In [{error.exec_count}] stopped with {error.ename}: {last}") from None
        except RuntimeError as error:  # nbclient: the kernel died, or never started
            OwnKernel.said.seek(0)
            last = "".join(f"; it said last: {line}" for line in OwnKernel.said.read().strip().splitlines()[-1:])
            raise RunError(f"{error}; a dead kernel has mostly run out of memory{last}") from None
    for cell in notebook.cells:
        if any(output.output_type == "error" for output in cell.get("outputs", ())):  # Papermill lets sys.exit(0) pass
            raise RunError(f"In [{cell.execution_count}] left the notebook early; let it run to its last cell")


def _clean(notebook: nbformat.NotebookNode) -> None:
    """Take out what changes with the machine and the hour: paths, time stamps, random cell identifiers.

    A progress bar leaves its last state only.
    """
    notebook.metadata.pop("papermill", None)
    for cell in notebook.cells:
        for key in ("papermill", "execution"):
            cell.metadata.pop(key, None)
        merged = []
        for output in cell.get("outputs", ()):
            if output.output_type == "stream" and merged and merged[-1].get("name") == output.name:
                merged[-1].text += output.text
            else:
                merged.append(output)
        for output in merged:
            if output.output_type == "stream":
                output.text = re.sub(r"[^\n]*\r(?!\n)", "", output.text)
        if merged:
            cell.outputs = merged
        if "injected-parameters" in cell.metadata.get("tags", ()):
            cell.id = "injected-parameters"


def run_study(folder: str | Path, force: bool = False, only: str | None = None, unrun: bool = False) -> None:
    """Run what is not up to date, in order. Once a notebook has run, the later ones, which read it, run too.

    What says `# only with data/...` in its first line is left out where that is not there. `unrun`: also those whose
    first line says `# not yet run: needs ...`.
    """
    runs = plan(folder)
    if only:
        chosen = Path(only).name.removesuffix(".yaml")
        names = [Path(run.stem).name for run in runs]
        if chosen not in names:
            raise StudyError(f"{folder} has no {chosen}.yaml; {nearest(chosen, names)}")
        runs = [runs[names.index(chosen)]]
    report, rerun = None, force
    for run in runs:
        if run.needs and not unrun:
            print(f"{run.stem}: skipped, needs {run.needs}; --not-yet-run runs it", flush=True)
            continue
        if run.only_with and not locate(run.only_with).exists():
            print(f"{run.stem}: skipped, it needs {run.only_with}, which is not there", flush=True)
            continue
        report = run.file(".ipynb").relative_to(workspace()).as_posix()
        if not rerun and run.is_up_to_date():
            print(f"{run.stem}: up to date", flush=True)
            continue
        rerun, started = True, time.monotonic()
        try:
            execute(run, progress=sys.stderr.isatty(), restart=force)
        except RunError as error:
            raise RunError(f"{run.stem} failed: {error}; see {run.stem}.failed.ipynb") from None
        print(f"{run.stem}: done in {time.monotonic() - started:.0f} s", flush=True)
    if report:
        print(f"Report: {report}")


def main(arguments: list[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = argparse.ArgumentParser(prog="python -m gpt2lib.study", description="Run a study's notebooks in order.")
    parser.add_argument("study", help="the study's folder, such as reports/quickstart")
    parser.add_argument("--force", action="store_true", help="run also what is up to date, and train from the start")
    parser.add_argument("--not-yet-run", action="store_true", help="run also what is marked so: what it needs is there")
    parser.add_argument("--only", metavar="STEM", help="run one notebook, such as 03_train-adamw")
    options = parser.parse_args(arguments)
    logging.getLogger("papermill").setLevel(logging.ERROR)
    try:
        run_study(options.study, options.force, options.only, options.not_yet_run)
    except StudyError as error:
        print(error, file=sys.stderr)
        return 2
    except RunError as error:
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; run the same command to go on", file=sys.stderr)
        return 130
    return 0


def _interrupt(number, frame):
    """What Ctrl-C does, and SIGTERM, which a machine gets that is taken back: a training is interrupted and saves."""
    OwnKernel.shutdown_wait_time = 300.0  # seconds until the kernel is ended by force
    for name in ("asyncio", "papermill"):  # what still waits for the cell may say that its kernel has died
        logging.getLogger(name).setLevel(logging.CRITICAL)
    raise KeyboardInterrupt


if __name__ == "__main__":
    for interrupt in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(interrupt) is not signal.SIG_IGN:
            signal.signal(interrupt, _interrupt)
    sys.exit(main())
