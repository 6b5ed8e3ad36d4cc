"""What a notebook leaves behind: recorded numbers, tables and figures, all beside the executed notebook.

A notebook's `stem` (`reports/<study>/<notebook>[-<variant>]`, relative to the workspace) comes from `gpt2lib.study`.
It is None when somebody runs the notebook by hand; then nothing is written.
"""

import io
import json
import math
import os
import platform
import subprocess
import sys
import time
import tomllib
from datetime import UTC, datetime
from importlib import metadata
from numbers import Integral, Real
from pathlib import Path

import matplotlib
import matplotlib.font_manager
import numpy as np
import pandas as pd

_STARTED = time.monotonic()  # a notebook imports this module in its first cell: wall time counts from here
_PACKAGES = ("gpt2lib", "keras", "numpy", "pandas", "grain", "tiktoken", "tokenizers")
_BACKENDS = {"tensorflow": ("tensorflow",), "jax": ("jax", "jaxlib", "libtpu"), "torch": ("torch",)}


class ReportError(ValueError):
    """A report that cannot be written or read; the message says what, where and what to do."""


def workspace() -> Path:
    """The folder that holds `reports/` and `data/`.

    GPT2LIB_WORKSPACE, else the nearest folder above the current one that has gpt2lib's pyproject.toml, else the
    current folder.
    """
    if chosen := os.environ.get("GPT2LIB_WORKSPACE"):
        return Path(chosen).resolve()
    here = Path.cwd().resolve()
    return next((folder for folder in (here, *here.parents) if _is_project(folder)), here)


def _is_project(folder: Path) -> bool:
    try:
        return tomllib.loads((folder / "pyproject.toml").read_text())["project"]["name"] == "gpt2lib"
    except (OSError, KeyError, ValueError):  # not there, not ours, not TOML
        return False


def data_folder(*parts: str) -> Path:
    """A path below the folder of corpora and runs: GPT2LIB_DATA, else `data` in the workspace."""
    return Path(os.environ.get("GPT2LIB_DATA") or workspace() / "data").resolve().joinpath(*parts)


def portable(path: str | Path) -> str:
    """A path as it may be recorded: below the workspace, or `data/...` wherever the data folder is.

    Raises ReportError for a path outside both, which would mean nothing on another machine.
    """
    full = (workspace() / path).resolve()
    for folder, name in ((data_folder(), "data"), (workspace(), ".")):
        if full.is_relative_to(folder):
            return (Path(name) / full.relative_to(folder)).as_posix()
    raise ReportError(f"{path} lies outside the workspace and the data folder; write it below one of them")


def locate(recorded: str) -> Path | str:
    """The place of a path that `portable` wrote, on this machine; an address such as gs://x/y stays one."""
    if "://" in recorded:
        return recorded
    first, *rest = Path(recorded).parts or (".",)
    return data_folder(*rest) if first == "data" else workspace() / recorded


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file beside its place, then rename it, so that no reader meets half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        part.write_bytes(content)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def record(stem: str | None, numbers: dict, *, artifacts=(), device: str | None = None) -> Path | None:
    """Write `<stem>.json`: a notebook's numbers with commit, versions, backend, device, wall time (s) and date.

    `artifacts` are the files and folders that the notebook made for later ones; while one is missing, the notebook
    is not up to date. Returns the path relative to the workspace, so that a cell may show it on any machine; without
    a stem writes nothing and returns None. Raises ReportError for a number that is NaN or infinite (naming its key),
    for a value that JSON cannot hold, and for a missing artifact.
    """
    if stem is None:
        return None
    content = {
        "numbers": _plain(numbers, "numbers"),
        "artifacts": [portable(path) for path in artifacts],
        **provenance(),
        "device": device or describe_cpu(),
        "wall_time_s": round(time.monotonic() - _STARTED, 3),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    for name in content["artifacts"]:
        if not locate(name).exists():
            raise ReportError(f"the artifact {name} does not exist; record it after it was written")
    relative = Path(f"{stem}.json")
    write_atomically(workspace() / relative, (json.dumps(content, indent=1, ensure_ascii=False) + "\n").encode())
    return relative


def load(stem: str) -> dict:
    """The numbers that another notebook recorded under `stem`."""
    path = workspace() / f"{stem}.json"
    try:
        return json.loads(path.read_text(encoding="utf-8"))["numbers"]
    except FileNotFoundError:
        parent = Path(stem).parent.as_posix()
        raise ReportError(f"{stem}.json is missing; run `python -m gpt2lib.study {parent}` first") from None
    except (ValueError, KeyError):
        raise ReportError(f"{stem}.json is damaged; delete it and run its study again") from None


def _plain(value, key: str):
    """`value` as JSON holds it: NumPy and Keras scalars become numbers, arrays become lists, paths become portable."""
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):  # a configuration holds folders as text
        return portable(value) if value.startswith((f"{workspace()}/", f"{data_folder()}/")) else value
    if isinstance(value, Path):
        return portable(value)
    if isinstance(value, dict):
        return {str(name): _plain(item, f"{key}.{name}") for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item, f"{key}[{i}]") for i, item in enumerate(value)]
    if isinstance(value, Integral):
        return int(value)
    if isinstance(value, Real):
        if not math.isfinite(value):
            raise ReportError(f"{key} is {float(value)}; find out why before recording it, or leave the key out")
        return float(value)
    if hasattr(value, "to_dict"):  # pandas
        return _plain(value.to_dict(**({"orient": "list"} if value.ndim == 2 else {})), key)
    if hasattr(value, "__array__"):  # NumPy, TensorFlow, JAX, Keras variables
        array = np.asarray(value)
        return _plain((array if array.dtype.kind in "biufOU" else array.astype(float)).tolist(), key)  # bfloat16: float
    raise ReportError(f"{key} is of type {type(value).__name__}, which JSON cannot hold; record numbers, text or lists")


def provenance() -> dict:
    """Where numbers came from: git commit (None outside git), versions of the packages that matter, Keras' backend."""
    commit, changes = _git("rev-parse", "HEAD"), _git("status", "--porcelain", "--", ".", ":!reports")
    backend = _backend()
    names = (*_PACKAGES, *_BACKENDS.get(backend, ()))
    return {
        "git_commit": commit,
        "git_dirty": bool(changes),  # outside reports/, which a running study changes itself
        "versions": {"python": platform.python_version(), **{name: v for name in names if (v := _version(name))}},
        "backend": backend,
    }


def _backend() -> str | None:
    """Keras' backend, without importing Keras for it; None if nothing chose one."""
    keras = sys.modules.get("keras")
    return keras.backend.backend() if keras else os.environ.get("KERAS_BACKEND")


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _git(*command: str) -> str | None:
    try:
        done = subprocess.run(["git", *command], cwd=workspace(), capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):  # no git, or no repository
        return None
    return done.stdout.strip()


def describe_cpu() -> str:
    """The processor and the cores that this process may use, such as `Intel(R) Xeon(R) CPU @ 2.20GHz, 2 cores`."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    model = platform.processor() or platform.machine()
    try:
        if sys.platform == "darwin":
            model = subprocess.check_output(["sysctl", "-n", "machdep.cpu.brand_string"], text=True).strip()
        else:
            lines = Path("/proc/cpuinfo").read_text().splitlines()
            model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), model)
    except (OSError, subprocess.CalledProcessError):
        pass  # the machine's architecture is all that can be had
    return f"{model}, {cores} cores"


def set_style() -> None:
    """The look of figures and tables: legible sizes, colours that the colour-blind can tell, whole cells."""
    import seaborn  # brings SciPy: a second that only those who draw should wait

    seaborn.set_theme(context="notebook", style="whitegrid", palette="colorblind")
    pd.set_option("display.max_colwidth", None, "display.max_columns", None, "display.width", 200)
    matplotlib.rcParams.update({"figure.figsize": (8, 4.5), "figure.dpi": 100, "axes.titlelocation": "left"})


def save_figure(figure, stem: str | None, name: str = "") -> Path | None:
    """Save a figure as `reports/<study>/figures/<stem>[-<name>].png` (150 dpi) and `.svg`; without a stem, nothing.

    Both files depend on nothing but the figure: no date, no random identifiers. Returns the path of the png relative
    to the workspace.
    """
    if stem is None:
        return None
    target = Path(stem).parent / "figures" / (Path(stem).name + (f"-{name}" if name else ""))
    with matplotlib.rc_context({"svg.hashsalt": "gpt2lib"}):
        for kind, options in (("svg", {"metadata": {"Date": None}}), ("png", {"dpi": 150})):
            relative = target.with_name(f"{target.name}.{kind}")
            write_atomically(workspace() / relative, _render(figure, kind, options))
    return relative


_MONOSPACE = "DejaVu Sans Mono"  # comes with Matplotlib


def token_figure(texts: dict, label: str, limit: float, columns: int = 96, lines: int = 14):
    """Texts whose tokens are coloured by a value of each, from white at 0 to red at `limit`: a figure.

    Args:
        texts: title -> (strings of the tokens, a value for each).
        label: what the values are, with their unit.
        columns, lines: of each text at most; the rest is not shown, and "[...]" says so.

    Characters that the font does not have are shown as a box.
    """
    import matplotlib.pyplot as plt  # here, so that whoever only records does not start it

    inch, size = 0.602 * 10 / 72, 10  # what a character of 10 points is wide
    colours = matplotlib.colormaps["Reds"]
    drawn = {title: _wrapped(*text, columns, lines) for title, text in texts.items()}
    heights = [max((line for line, *_ in cells), default=0) + 3 for cells in drawn.values()]
    figure = plt.figure(figsize=((columns + 2) * inch, sum(heights) * 0.2 + 0.7))
    bottom, top = 0.7 / figure.get_figheight(), 1.0
    for height, (title, cells) in zip(heights, drawn.items(), strict=True):
        part = height * 0.2 / figure.get_figheight()
        axes = figure.add_axes((0, top - part, 1, part), xlim=(-1, columns + 1), ylim=(height - 1, -1))
        axes.axis("off")
        top -= part
        axes.text(0, -0.3, title, family=_MONOSPACE, size=size, weight="bold", va="center", parse_math=False)
        for line, column, text, value in cells:
            share = min(max(value, 0) / limit, 1)
            axes.add_patch(plt.Rectangle((column, line + 0.5), len(text), 1, color=colours(0.8 * share), lw=0))
            style = dict(family=_MONOSPACE, size=size, va="center", parse_math=False)
            axes.text(column, line + 1, text, color="white" if share > 0.75 else "black", **style)
    bar = figure.add_axes((0.3, 0.55 * bottom, 0.4, 0.2 * bottom))
    shades = matplotlib.colors.ListedColormap([colours(0.8 * i / 255) for i in range(256)])
    norm = matplotlib.colors.Normalize(0, limit)
    figure.colorbar(matplotlib.cm.ScalarMappable(norm, shades), bar, orientation="horizontal", label=label)
    return figure


def _wrapped(tokens, values, columns, lines) -> list[tuple]:
    """(line, column, text, value) of pieces of tokens, broken after so many columns and where the text breaks."""
    cells, line, column = [], 0, 0
    known = matplotlib.font_manager.get_font(matplotlib.font_manager.findfont(_MONOSPACE)).get_charmap()
    for token, value in zip(tokens, values, strict=True):
        token = "".join(c if c in "\t\n" or (ord(c) in known and c.isprintable()) else "▯" for c in token)
        for i, part in enumerate(token.replace("\t", "    ").split("\n")):
            if i:
                cells.append((line, column, "↵", value))
                line, column = line + 1, 0
            while part:
                if column + len(part) > columns and column:  # a token that does not fit begins a line
                    line, column = line + 1, 0
                cells.append((line, column, part[:columns], value))
                column += len(part[:columns])
                part = part[columns:]
        if line >= lines:
            cells = [cell for cell in cells if cell[0] < lines]
            return [*cells, (lines, 0, "[...]", 0.0)]
    return cells


def _render(figure, kind: str, options: dict) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format=kind, bbox_inches="tight", **options)
    return buffer.getvalue()


def table(rows, digits: int | dict = 3, index: str | None = None) -> pd.DataFrame:
    """Rows (dicts, or a DataFrame) as a table of text that looks the same wherever it is shown.

    Floats get `digits` decimals (one number, or one for each column: {"loss": 2}), integers get thousands separators,
    and a missing value is a dash. `index` is the column that names the rows.
    """
    frame = rows if isinstance(rows, pd.DataFrame) else pd.DataFrame(rows, dtype=object)  # an int stays an int
    decimals = digits if isinstance(digits, dict) else dict.fromkeys(frame.columns, digits)
    shown = pd.DataFrame({c: [_cell(v, decimals.get(c, 3)) for v in frame[c]] for c in frame.columns}, dtype=object)
    return shown.set_index(index) if index else shown.set_index(pd.Index([""] * len(shown)))


def _cell(value, decimals: int) -> str:
    if isinstance(value, str | bool):
        return str(value)
    if pd.api.types.is_scalar(value) and pd.isna(value):
        return "–"
    if isinstance(value, Integral):
        return f"{value:,}"
    if isinstance(value, Real):
        return f"{value:,.{decimals}f}"
    return str(value)


def expectations(rows) -> pd.DataFrame:
    """The table of expected and seen that ends a notebook; `rows` are (what, expected, seen, ok).

    Raises AssertionError, naming every row that is not ok.
    """
    rows = list(rows)
    wrong = [f"{what}: expected {expected}, seen {seen}" for what, expected, seen, ok in rows if not ok]
    if wrong:
        raise AssertionError("not as expected: " + "; ".join(wrong))
    names = ("what", "expected", "seen", "ok")
    return table([dict(zip(names, (*row[:3], "yes"), strict=True)) for row in rows], index="what")
