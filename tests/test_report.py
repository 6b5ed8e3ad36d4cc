"""record(), load(), tables and figures: what a notebook leaves behind."""

import io
import json
import math
from importlib import metadata

import matplotlib.figure
import matplotlib.pyplot as plt
import ml_dtypes
import numpy as np
import pandas as pd
import pytest

from gpt2lib import report

pytestmark = pytest.mark.backend_free
STEM = "reports/tiny/01_data"


@pytest.fixture(autouse=True)
def workspace(tmp_path, monkeypatch):
    monkeypatch.setenv("GPT2LIB_WORKSPACE", str(tmp_path))
    monkeypatch.delenv("GPT2LIB_DATA", raising=False)
    return tmp_path.resolve()


def test_workspace_is_the_nearest_project(workspace, tmp_path, monkeypatch):
    monkeypatch.delenv("GPT2LIB_WORKSPACE")
    inner = tmp_path / "project" / "reports" / "tiny"
    inner.mkdir(parents=True)
    monkeypatch.chdir(inner)
    (inner / "pyproject.toml").write_text('[project]\nname = "another"\n')
    (tmp_path / "project" / "pyproject.toml").write_text('[project]\nname = "gpt2lib"\n')
    assert report.workspace() == workspace / "project"
    (tmp_path / "project" / "pyproject.toml").unlink()
    assert report.workspace() == inner.resolve()


def test_data_folder_can_be_elsewhere(workspace, tmp_path_factory, monkeypatch):
    assert report.data_folder("corpus", "x") == workspace / "data" / "corpus" / "x"
    drive = tmp_path_factory.mktemp("drive").resolve()
    monkeypatch.setenv("GPT2LIB_DATA", str(drive))
    assert report.data_folder("corpus") == drive / "corpus"
    assert report.portable(drive / "corpus") == "data/corpus"
    assert report.locate("data/corpus") == drive / "corpus"
    assert report.portable(workspace / "reports") == "reports"
    with pytest.raises(report.ReportError, match="outside the workspace and the data folder"):
        report.portable("/elsewhere/corpus")


def test_record_holds_numbers_and_where_they_came_from(workspace):
    corpus = report.data_folder("corpus")
    corpus.mkdir(parents=True)
    numbers = {
        "loss": np.float32(2.5), "steps": np.int64(7), "ok": np.bool_(True), "none": None, "text": "/a sample",
        "curve": np.arange(6.0).reshape(2, 3), "half": np.array([0.5], ml_dtypes.bfloat16),
        "rows": [{"n": 1}, (2, 3)], "series": pd.Series([1, 2], index=["a", "b"]),
        "frame": pd.DataFrame({"x": [1.5], "y": [2]}), "config": {"corpus": str(corpus)}, "folder": corpus,
    }  # fmt: skip
    path = report.record(STEM, numbers, artifacts=[corpus], device="a test")
    assert path.as_posix() == f"{STEM}.json", "a cell may show the path, so it must be relative"
    written = json.loads((workspace / path).read_text())
    assert written["numbers"] == report.load(STEM) == {
        "loss": 2.5, "steps": 7, "ok": True, "none": None, "text": "/a sample",
        "curve": [[0, 1, 2], [3, 4, 5]], "half": [0.5],
        "rows": [{"n": 1}, [2, 3]], "series": {"a": 1, "b": 2},
        "frame": {"x": [1.5], "y": [2]}, "config": {"corpus": "data/corpus"}, "folder": "data/corpus",
    }  # fmt: skip
    assert written["artifacts"] == ["data/corpus"]
    assert written["device"] == "a test"
    assert written["versions"]["numpy"] == metadata.version("numpy")
    assert written["wall_time_s"] > 0
    assert {"git_commit", "git_dirty", "backend", "date"} <= written.keys()
    assert str(workspace) not in (workspace / path).read_text()
    assert [p.name for p in (workspace / path).parent.iterdir()] == ["01_data.json"], "nothing half-written stays"


@pytest.mark.parametrize("value", [math.nan, np.float32("inf"), np.array([0.0, math.nan])])
def test_record_refuses_what_is_not_finite(workspace, value):
    report.record(STEM, {"loss": 1.0})
    with pytest.raises(report.ReportError, match=r"numbers\.eval\.loss.* is (nan|inf)"):
        report.record(STEM, {"eval": {"loss": value}})
    assert report.load(STEM) == {"loss": 1.0}, "the earlier record stays"


def test_record_refuses_what_json_cannot_hold_and_missing_artifacts():
    with pytest.raises(report.ReportError, match=r"numbers\.model is of type object"):
        report.record(STEM, {"model": object()})
    with pytest.raises(report.ReportError, match="the artifact data/corpus does not exist"):
        report.record(STEM, {}, artifacts=[report.data_folder("corpus")])


def test_without_a_stem_nothing_is_written(workspace):
    assert report.record(None, {"loss": 1.0}) is None
    assert report.save_figure(matplotlib.figure.Figure(), None, "loss") is None
    assert not list(workspace.iterdir())


def test_load_says_what_to_run(workspace):
    with pytest.raises(report.ReportError, match=r"python -m gpt2lib\.study reports/tiny"):
        report.load(STEM)
    (workspace / "reports" / "tiny").mkdir(parents=True)
    (workspace / f"{STEM}.json").write_text("{")
    with pytest.raises(report.ReportError, match="damaged"):
        report.load(STEM)


def test_device_names_the_cores():
    assert report.describe_cpu().endswith(" cores")


def test_figures_are_the_same_bytes_every_time(workspace):
    report.set_style()

    def draw():
        figure = matplotlib.figure.Figure()
        axes = figure.subplots()
        axes.plot([1, 2, 3], [3, 1, 2], label="loss", clip_on=True)
        axes.legend()
        return report.save_figure(figure, STEM, "loss")

    path = draw()
    assert path.as_posix() == "reports/tiny/figures/01_data-loss.png"
    files = [workspace / path, (workspace / path).with_suffix(".svg")]
    first = [file.read_bytes() for file in files]
    assert first[0].startswith(b"\x89PNG") and b"<svg" in first[1] and all(first)
    draw()
    assert [file.read_bytes() for file in files] == first
    assert sorted(files) == sorted((workspace / path).parent.iterdir())


def test_table_is_plain_text_with_fixed_digits():
    rows = [{"model": "a", "loss": 1.23456, "tokens": 1234567}, {"model": "b", "loss": math.nan, "tokens": 8}]
    shown = report.table(rows, digits={"loss": 2}, index="model")
    assert shown.to_dict("index") == {
        "a": {"loss": "1.23", "tokens": "1,234,567"},
        "b": {"loss": "–", "tokens": "8"},
    }
    assert list(report.table(rows).index) == ["", ""]


def test_expectations_name_what_is_wrong():
    shown = report.expectations([("parameters", 124_439_808, 124_439_808, True), ("loss", "< 3", 2.5, np.bool_(True))])
    assert shown.loc["parameters", "seen"] == "124,439,808"
    with pytest.raises(AssertionError, match="loss: expected < 3, seen 4"):
        report.expectations([("steps", 7, 7, True), ("loss", "< 3", 4, False)])


def test_tokens_in_colours():
    """Each token stands where it should, in the colour of its value; long texts are cut, and it says so."""
    figure = report.token_figure(
        {"one": (["ab", "\x13\n", "d" * 8 + "日"], [0, 4, 8]), "two": (["x "] * 100, [1] * 100)},
        "nats",
        8,
        columns=10,
        lines=3,
    )
    one, two, bar = figure.axes
    title, *words = one.texts
    assert title.get_text() == "one"
    assert [(word.get_text(), word.get_position()) for word in words] == [
        ("ab", (0, 1)), ("▯", (2, 1)), ("↵", (3, 1)), ("d" * 8 + "▯", (0, 2)),
    ]  # fmt: skip
    shades = [patch.get_facecolor()[1] for patch in one.patches]
    assert shades[0] > shades[1] == shades[2] > shades[3], "less green is more red"
    assert len(two.texts) == 1 + 15 + 1 and two.texts[-1].get_text() == "[...]"
    assert bar.get_xlabel() == "nats"
    figure.savefig(io.BytesIO(), format="png")  # a warning of a missing glyph would be an error
    plt.close(figure)
