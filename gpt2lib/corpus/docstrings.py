"""The default corpus: the English docstrings of the installed packages, read with `ast`, never imported or executed."""

import ast
import gc
import importlib.metadata
import inspect
import re
import warnings
from collections.abc import Collection, Iterator
from pathlib import Path, PurePath

from gpt2lib.config import nearest
from gpt2lib.data import CorpusError

MIN_CHARACTERS = 80  # shorter ones ("Returns the name.") teach little and repeat much
MIN_ASCII = 0.9  # of the characters; tables of symbols and other languages lie below
_OURSELVES = "gpt2lib"  # a corpus that changed with every edit of this project could not be built twice
# Test folders hold about 2% of the text in a quarter of the files.
_TESTS = {"test", "tests", "testing"}
_DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def installed(packages: Collection[str] | None = None) -> dict[str, str]:
    """Distribution -> version of the installed packages that the corpus is made from, sorted by name.

    `packages` narrows them; CorpusError for one that is not installed.
    """
    found = {}
    for distribution in importlib.metadata.distributions():
        found.setdefault(_normal(distribution.metadata["Name"]), distribution.version)  # the first is the one imported
    found.pop(_OURSELVES, None)
    if packages is None:
        return dict(sorted(found.items()))
    for name in packages:
        if _normal(name) not in found:
            raise CorpusError(f"the package {name} is not installed; {nearest(_normal(name), found)}")
    return {name: found[name] for name in sorted(map(_normal, packages))}


def docstrings(packages: Collection[str] | None = None) -> Iterator[str]:
    """The docstrings, one a document, in the order of distribution, file and line.

    Left out: those shorter than MIN_CHARACTERS, those less ASCII than MIN_ASCII, tests, and files that do not parse.
    """
    for name in installed(packages):
        files = importlib.metadata.distribution(name).files or []
        for file in sorted(files, key=PurePath.as_posix):
            if file.suffix == ".py" and not _is_test(file):
                for text in _docstrings_of(Path(file.locate())):
                    if len(text) >= MIN_CHARACTERS and len(text.encode("ascii", "ignore")) >= MIN_ASCII * len(text):
                        yield text


def _normal(name: str) -> str:
    """A distribution's name as package indexes compare it (PEP 503)."""
    return re.sub(r"[-_.]+", "-", name).lower()


def _is_test(file: PurePath) -> bool:
    return not _TESTS.isdisjoint(file.parts) or file.stem.startswith("test_") or file.stem.endswith("_test")


def _docstrings_of(path: Path) -> list[str]:
    """All docstrings of a Python file, cleaned as `help` shows them, from top to bottom."""
    collecting = gc.isenabled()
    gc.disable()  # a syntax tree is many objects and no cycle: collecting garbage would take two fifths of the time
    try:
        with warnings.catch_warnings(action="ignore"):  # other people's invalid escapes
            return [inspect.cleandoc(text) for text in _walk(ast.parse(path.read_bytes()).body)]
    except (OSError, SyntaxError, ValueError, RecursionError, MemoryError):  # a template, or for another Python
        return []
    finally:
        if collecting:
            gc.enable()


def _walk(body: list[ast.stmt], documented: bool = True) -> Iterator[str]:
    """The docstrings in a block of statements; expressions hold none, and skipping them is most of the speed."""
    match body:
        case [ast.Expr(value=ast.Constant(value=str(text))), *_] if documented:
            yield text
    for statement in body:
        for block in ("body", "orelse", "handlers", "finalbody"):
            inside = getattr(statement, block, None)
            if isinstance(inside, list):
                yield from _walk(inside, block == "body" and isinstance(statement, _DOCUMENTED))
