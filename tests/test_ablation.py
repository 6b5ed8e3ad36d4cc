"""07_ablate in the small, as a study runs it: killed, it goes on; every number of its tables is that of its runs."""

import json
import math
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from gpt2lib import corpus

ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.backend_free


def start(workspace):
    command = [sys.executable, "-m", "gpt2lib.study", "reports/ablation"]
    env = {**os.environ, "GPT2LIB_WORKSPACE": str(workspace)}
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    return subprocess.Popen(command, env=env, start_new_session=True, **pipes)


def test_it_goes_on_and_says_what_its_runs_say(tmp_path):
    for folder in ("notebooks", "data/published"):
        shutil.copytree(ROOT / folder, tmp_path / folder)
    corpus.build(tmp_path / "data/corpora/try", ROOT / "tests" / "corpus", n_vocab=400, progress=False)
    study = tmp_path / "reports" / "ablation"
    study.mkdir(parents=True)
    (study / "07_ablate.yaml").write_text(
        "# A test. Hardware: 2 CPU cores. Takes half a minute.\n"
        "arms: {small rate: [small rate], restart: [restart],\n"
        "  '2019': {switches: [all], scaled: {restart: {reading: {restart_every: 5}}}}}\n"
        "rates: {relative: {fields: {}, values: [1.0e-3, 1.0e-2, 1.0e+9]}}\n"
        "scales: {wider: {model: {n_embd: 48}, max_steps: 30}}\n"
        "scale_arms: [small rate]\n"
        "tasks: [wikitext2]\ndownload: false\n"
    )
    first = start(tmp_path)
    runs = tmp_path / "data/runs/ablation-try"
    until = time.monotonic() + 400
    while len(list(runs.rglob("ablation.json"))) < 3 and first.poll() is None and time.monotonic() < until:
        time.sleep(0.2)
    os.killpg(first.pid, 9)
    first.communicate()
    time.sleep(4)  # its kernel ends by itself when it sees that
    made = {path: path.stat().st_mtime_ns for path in runs.rglob("ablation.json")}
    assert 3 <= len(made) < 12
    second = start(tmp_path)
    _, said = second.communicate(timeout=400)
    assert second.returncode == 0, said
    assert all(path.stat().st_mtime_ns == at for path, at in made.items()), "what was there was not made again"

    numbers = json.loads((study / "07_ablate.json").read_text())["numbers"]
    kept = {path.parent: json.loads(path.read_text()) for path in runs.rglob("ablation.json")}
    assert len(kept) == 4 * 2 + 2 + 2 * 2, "the good recipe, at its own rate too, is one run for each seed"
    every = {arm: kept[runs / arm / "0"]["config"]["reading"]["restart_every"] for arm in ("restart", "2019")}
    assert every == {"restart": 10, "2019": 5}
    rows = {row["arm"]: row for row in numbers["arms"]}
    assert list(rows) == ["good", "small rate", "restart", "2019"]
    losses = {arm: [kept[runs / arm.replace(" ", "-") / seed]["loss"] for seed in "01"] for arm in rows}
    for arm, row in rows.items():
        assert row["loss"] == pytest.approx(np.mean(losses[arm]))
        gaps = np.subtract(losses[arm], losses["good"])
        assert row["worse by"] == pytest.approx(gaps.mean())
        assert row["± 95%"] == pytest.approx(12.706 * gaps.std(ddof=1) / math.sqrt(2), rel=1e-3, abs=1e-12)
    assert rows["small rate"]["worse by"] > 0.05, "at a 40th of the rate less is learned"
    assert rows["restart"]["documents"] < rows["good"]["documents"]
    assert [row["scale"] for row in numbers["scales"]] == ["wider"]
    (wider,) = numbers["scales"]
    assert wider["parameters"] > numbers["parameters"]
    assert wider["bigram"] > numbers["bigram"]["loss"], "it has counted as many tokens as that model was trained on"
    assert wider["counts"] == (wider["good"] < wider["bigram"])
    assert [rate for rate, _ in numbers["rates"]["relative"]] == [1e-3, 1e-2, 1e9]
    assert [loss is None for _, loss in numbers["rates"]["relative"]] == [False, False, True], "the last one diverged"
    assert numbers["rates"]["relative"][1][1] == losses["good"][0]
    (diverged,) = numbers["runs"]["relative at 1e+09"]
    assert "lower the learning rate" in diverged["diverged"] and diverged["curve"]
    assert not any(row["diverged"] for row in rows.values())
    names = {path.name for path in (study / "figures").glob("*.png")}
    assert names == {f"07_ablate{name}.png" for name in ("", "-updates", "-rates", "-scales")}
    for suffix in ("ipynb", "json"):
        assert str(tmp_path) not in (study / f"07_ablate.{suffix}").read_text()
