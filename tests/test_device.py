"""What `describe` says of machines that are not this one, and the cell that opens notebooks in Colab."""

import json
import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import nbformat
import pytest

from gpt2lib import device
from gpt2lib.config import ConfigError

pytestmark = pytest.mark.backend_free


@pytest.fixture
def machine(monkeypatch):
    """A machine with these device files and so much free memory."""

    def make(*files, free=8e9):
        monkeypatch.setattr(device, "_exists", lambda pattern: any(pattern.rstrip("*[0-9]") in f for f in files))
        monkeypatch.setattr(device, "free_memory", lambda: free)

    return make


@pytest.mark.parametrize(
    "files, free, used, words",
    [
        ([], 8e9, ("tensorflow", "2.20.0", "cpu"), None),
        (["/dev/accel0"], 8e9, ("jax", "0.7.2", "tpu"), None),
        (["/dev/nvidia0"], 8e9, ("tensorflow", "2.20.0", "gpu"), None),
        (["/dev/accel0"], 8e9, ("tensorflow", "2.20.0", "cpu"), ["TPU", "KERAS_BACKEND=jax"]),
        (["/dev/accel0"], 8e9, ("jax", "0.7.2", "cpu"), ["TPU", "jax 0.7.2", "jax[tpu]"]),
        (["/dev/nvidia0"], 8e9, ("tensorflow", "2.20.0", "cpu"), ["GPU", "tensorflow[and-cuda]"]),
        (["/dev/nvidia0"], 8e9, ("jax", "0.7.2", "cpu"), ["GPU", "jax[cuda12]"]),
        ([], 0.9e9, ("tensorflow", "2.20.0", "cpu"), ["0.9 GB"]),
        ([], None, ("tensorflow", "2.20.0", "cpu"), None),
    ],
)
def test_advice(machine, files, free, used, words):
    machine(*files, free=free)
    advice = device._advice(*used)
    assert len(advice) == (words is not None)
    assert all(word in advice[0] for word in words or ())


def test_the_sentence_ends_with_the_advice(machine):
    machine()
    plain = device.describe()
    machine("/dev/accel0", free=1e9)
    assert device.describe().startswith(f"{plain}; a TPU is here")
    assert device.describe().count(";") == 2 and "\n" not in device.describe()


def test_a_tpu_that_is_held():
    held = device._in_use(RuntimeError("The TPU is already in use by process with pid 4711. Not attempting to load"))
    assert isinstance(held, ConfigError) and "4711" in str(held) and "restart" in str(held)
    assert "another process" in str(device._in_use(RuntimeError("/tmp/libtpu_lockfile is there")))
    other = RuntimeError("something else")
    assert device._in_use(other) is other


def test_free_memory_is_that_of_this_machine():
    if not os.path.exists("/proc/meminfo"):
        pytest.skip("no /proc/meminfo")
    assert 1e8 < device.free_memory() < 1e13


@pytest.mark.parametrize(
    "packages, files, expected",
    [
        (["tensorflow", "jax"], [], None),
        (["jax"], [], "jax"),
        (["tensorflow", "jax", "libtpu"], [], None),  # a machine that compiles for TPUs
        (["tensorflow", "jax", "libtpu"], ["/dev/accel0"], "jax"),
        (["tensorflow"], ["/dev/accel0"], None),
    ],
)
def test_the_backend_is_chosen_before_keras_is_imported(packages, files, expected):
    code = f"""
import glob, importlib.util, os
importlib.util.find_spec = lambda name, find=importlib.util.find_spec: name in {packages} or None
glob.glob = lambda pattern: {files}
import gpt2lib
print(os.environ.get("KERAS_BACKEND"))
"""
    environment = {name: value for name, value in os.environ.items() if name != "KERAS_BACKEND"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(expected)


@pytest.mark.parametrize("given, width", [("", 512), (" --xla_cpu_prefer_vector_width=128", 128)])
def test_xla_takes_all_of_a_vector_unless_told_otherwise(tmp_path, given, width):
    code = """
from gpt2lib import device
device.setup()
from keras import ops
device.compiled(None, lambda x: ops.sum(x * x), xla=True)(ops.ones(100))
"""
    environment = {**os.environ, "XLA_FLAGS": f"--xla_dump_to={tmp_path}{given}"}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True)
    options = [file.read_text() for file in tmp_path.glob("*debug_options")]
    assert options and all(f"xla_cpu_prefer_vector_width: {width}" in o for o in options)


@pytest.mark.parametrize("given", ["flags.txt", " --xla_cpu_prefer_vector_width=256"])
def test_the_flags_of_others_are_left_alone(given):
    code = "import os, gpt2lib; print(os.environ['XLA_FLAGS'], end='')"
    environment = {**os.environ, "XLA_FLAGS": given}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == given


# --- Colab ------------------------------------------------------------------------------------------------------------

ROOT = Path(__file__).resolve().parents[1]


def first_cell(folder, **variables):
    """What a notebook's first cell of code prints in a folder; where it is, what `gpt2lib` is. pip is a fake."""
    (folder / "fake" / "pip").mkdir(parents=True, exist_ok=True)
    (folder / "fake" / "pip" / "__init__.py").touch()  # a package proper, else the real pip would come first
    (folder / "fake" / "pip" / "__main__.py").write_text(
        "import json, sys\n"
        "kept = open(sys.argv[sys.argv.index('-c') + 1]).read().split()\n"
        "print(json.dumps([sys.argv[1:], kept]))\n"
    )
    cell = nbformat.read(ROOT / "notebooks" / "03_train.ipynb", as_version=4).cells[1].source
    code = f"{cell}\nimport gpt2lib\nprint(os.getcwd())\nprint(gpt2lib.__file__)"
    environment = {
        **os.environ,
        "PYTHONPATH": str(folder / "fake"),
        "GIT_CONFIG_COUNT": "2",
        "GIT_CONFIG_KEY_0": f"url.{ROOT}.insteadOf",
        "GIT_CONFIG_VALUE_0": "https://github.com/gpt2lib/gpt2lib",
        "GIT_CONFIG_KEY_1": "safe.directory",  # whoever owns this clone
        "GIT_CONFIG_VALUE_1": "*",
        **variables,
    }
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, env=environment, capture_output=True, text=True, check=True
    )
    return done.stdout.splitlines()


def test_first_cell_in_colab(tmp_path):
    """It fetches the project, holds pip to all versions that are there, and works from the project's folder."""
    if not (ROOT / ".git").exists():
        pytest.skip("no git repository to fetch")
    installed, folder, module = first_cell(tmp_path, COLAB_RELEASE_TAG="release-colab")
    arguments, kept = json.loads(installed)
    assert arguments[:3] == ["install", "-q", "-c"] and arguments[-2:] == ["-e", f"{tmp_path}/gpt2lib[evaluate]"]
    assert {f"{name}=={metadata.version(name)}" for name in ("numpy", "jax", "keras")} <= set(kept)
    assert not any(line.startswith("gpt2lib") for line in kept)
    assert folder == str(tmp_path / "gpt2lib") and module.startswith(folder)
    again = first_cell(tmp_path, COLAB_RELEASE_TAG="release-colab")  # the session was restarted
    assert again[1:] == [folder, module] and json.loads(again[0])[0][-1] == arguments[-1], "fetched once"


def test_first_cell_elsewhere_does_nothing(tmp_path):
    environment = {name: "" for name in ("COLAB_RELEASE_TAG",) if name in os.environ}
    folder, _ = first_cell(tmp_path, **environment)
    assert folder == str(tmp_path) and [path.name for path in tmp_path.iterdir()] == ["fake"]
