"""The committed notebooks of reports/stories run again with the same outputs, and a changed number does not pass."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).resolve().parent.parent
STUDY = Path("reports/stories")


def nbval(workspace, *notebooks):
    """Run nbval on notebooks of a workspace, in this interpreter's environment and with this session's backend."""
    command = [sys.executable, "-m", "pytest", "--nbval", "--nbval-current-env", "--nbval-cell-timeout=300", "-q"]
    command += [
        "--nbval-sanitize-with",
        str(ROOT / "tests" / "nbval.cfg"),
        "-p",
        "no:cacheprovider",
        *map(str, notebooks),
    ]
    environment = {**os.environ, "GPT2LIB_WORKSPACE": str(workspace), "PYDEVD_DISABLE_FILE_VALIDATION": "1"}
    environment.pop("GPT2LIB_DATA", None)
    return subprocess.run(command, cwd=workspace, env=environment, capture_output=True, text=True, check=False)


@pytest.fixture
def workspace(tmp_path):
    """A folder with what the study reads and nothing that it has made."""
    shutil.copytree(ROOT / STUDY, tmp_path / STUDY)
    shutil.copytree(ROOT / "tests" / "corpus", tmp_path / "tests" / "corpus")
    shutil.copytree(ROOT / "data" / "published", tmp_path / "data" / "published")
    for record in (tmp_path / STUDY).glob("*.json"):
        record.unlink()
    return tmp_path


def test_the_study_gives_the_same_outputs(workspace):
    notebooks = sorted((workspace / STUDY).glob("*.ipynb"))
    assert [path.name[:2] for path in notebooks] == ["01", "03", "04", "05", "06"]
    result = nbval(workspace, *notebooks)
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-2000:]
    for path in notebooks:
        assert path.with_suffix(".json").exists(), f"{path.name} did not record"


@pytest.mark.backend_free
def test_a_changed_number_fails(workspace):
    path = workspace / STUDY / "01_data.ipynb"
    notebook = nbformat.read(path, as_version=4)
    texts = [
        output.data
        for cell in notebook.cells
        if cell.cell_type == "code"
        for output in cell.outputs
        if "text/plain" in output.get("data", {}) and "train" in output.data["text/plain"]
    ]
    shown = texts[0]["text/plain"]
    digit = next(character for character in shown if character in "123456789")
    texts[0]["text/plain"] = shown.replace(digit, str(int(digit) % 9 + 1), 1)
    nbformat.write(notebook, path)
    result = nbval(workspace, path)
    assert result.returncode == 1, result.stdout[-2000:]
    assert result.stdout.count("FAILED ") == 1, result.stdout[-2000:]
    assert "Traceback: mismatch 'text/plain'" in result.stdout or "mismatch" in result.stdout
