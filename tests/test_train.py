"""Training: the first step by hand, runs that are interrupted and go on, and every way in which a run must refuse."""

import hashlib
import json
import math
import os
import shutil
from pathlib import Path

import keras
import numpy as np
import pytest
from literal import gpt2
from literal import nll as literal_nll

from gpt2lib import checkpoint
from gpt2lib.config import ConfigError, TrainConfig
from gpt2lib.data import Batches, Corpus, validation_windows, write_corpus
from gpt2lib.evaluate.loss import NotFinite
from gpt2lib.model import GPT2
from gpt2lib.schedule import WarmupCosine
from gpt2lib.tokenizer import Tokenizer
from gpt2lib.train import Diverged, TrainingError, read_history, read_metrics, train

WORDS = ["the ", "cat ", "sat ", "on ", "a ", "mat ", "and ", "then ", "it ", "ran ", "away.\n"]
T = 11


def documents(seed: int, count: int = 60):
    random = np.random.default_rng(seed)
    return ["".join(random.choice(WORDS, 12)) for _ in range(count)]


def write(folder, seed=0) -> Path:
    write_corpus(folder, documents(seed), Tokenizer([]), name="t", source={}, validation_fraction=0.3, progress=False)
    return folder


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    return write(tmp_path_factory.mktemp("train") / "corpus")


def configuration(corpus, run_dir, **changes) -> TrainConfig:
    model = {"n_ctx": T, "n_layer": 1, "embd_pdrop": 0.1, "attn_pdrop": 0.0, "resid_pdrop": 0.0}
    model |= changes.pop("model", {})
    defaults = dict(
        size="test", model=model, learning_rate=0.03, warmup_steps=2, max_steps=6, batch_size=3, log_every=1,
        validate_every=3, validation_windows=5, checkpoint_every=2, keep_checkpoints=2, progress=False, seed=1,
    )  # fmt: skip
    return TrainConfig(corpus=str(corpus), run_dir=str(run_dir), **(defaults | changes))


def state_of(run_dir) -> dict:
    arrays, info = checkpoint.read(Path(run_dir) / "checkpoints")
    return arrays | {"step": np.array(info["step"])}


def assert_same_run(one, other):
    """Bit for bit: all losses, norms and rates, and every number of the last checkpoint."""
    timed = {"tokens_per_second", "seconds"}
    a, b = (
        [
            {key: value for key, value in line.items() if key not in timed}
            for line in read_metrics(Path(d) / "metrics.jsonl")
        ]
        for d in (one, other)
    )
    assert a == b
    a, b = state_of(one), state_of(other)
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_array_equal(a[name], b[name], err_msg=name)


def watched(config):
    """(configuration, history, what was read: step and sha256 of each batch) of a run."""
    seen, read = [], Batches.__getitem__

    def getitem(self, step):
        batch = read(self, step)
        seen.append((step, hashlib.sha256(batch.tobytes()).hexdigest()))
        return batch

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Batches, "__getitem__", getitem)
        return config, train(config), seen


@pytest.fixture(scope="module")
def finished(corpus, tmp_path_factory):
    """One undisturbed run, which most tests look at."""
    return watched(configuration(corpus, tmp_path_factory.mktemp("run") / "run"))


@pytest.fixture(scope="module")
def finished_adamw(finished, tmp_path_factory):
    run_dir = str(tmp_path_factory.mktemp("run") / "adamw")
    return watched(finished[0].replace(run_dir=run_dir, optimizer="adamw", learning_rate=1e-3))


@pytest.fixture
def copied(finished, tmp_path) -> TrainConfig:
    """A run of its own for a test that touches it."""
    run_dir = shutil.copytree(finished[0].run_dir, tmp_path / "run")
    return finished[0].replace(run_dir=str(run_dir))


# --- what is written --------------------------------------------------------------------------------------------------


def test_lines_of_metrics(finished):
    config, history, _ = finished
    lines = read_metrics(Path(config.run_dir) / "metrics.jsonl")
    assert lines == [json.loads(line) for line in (Path(config.run_dir) / "metrics.jsonl").read_text().splitlines()]
    assert history["train"] == [line for line in lines if "loss" in line]
    assert [line["step"] for line in history["train"]] == [1, 2, 3, 4, 5, 6]
    assert [line["step"] for line in history["validation"]] == [0, 3, 6]
    keys = {"loss", "learning_rate", "gradient_norm", "update_rms", "parameter_rms", "tokens_per_second", "tokens_seen"}
    schedule = WarmupCosine(0.03, 2, 6)
    for line in history["train"]:
        assert keys <= line.keys()
        assert all(math.isfinite(line[key]) for key in keys)
        assert line["tokens_seen"] == line["step"] * 3 * T
        assert line["tokens_per_second"] > 0
        assert line["learning_rate"] == float(schedule(line["step"] - 1))
    assert history["train"][0]["learning_rate"] == 0 == history["train"][0]["update_rms"]


def test_first_step_by_hand(corpus, tmp_path):
    """Against the NumPy model and a finite difference; no dropout, no warm-up, plain AdamW."""
    config = configuration(
        corpus, tmp_path / "run", model={"embd_pdrop": 0.0}, optimizer="adamw", learning_rate=1e-3, warmup_steps=0,
        max_steps=1,
    )  # fmt: skip
    history = train(config)
    (line,) = history["train"]
    data = Corpus(corpus)
    batch = Batches(data, "train", batch_size=3, n_ctx=T, seed=1)[0]
    before = {v.path: np.asarray(v.value).copy() for v in GPT2(config.model_config(257), seed=1).trainable_variables}

    def mean_loss(p, windows):
        return np.mean([literal_nll(gpt2(p, 3, window[:-1])[0], window[1:]) for window in windows])

    assert abs(line["loss"] - mean_loss(before, batch)) < 1e-5
    after, info = checkpoint.read(tmp_path / "run" / "checkpoints")
    assert info["step"] == 1
    new = {path: after[path] for path in before}
    n = sum(value.size for value in before.values())
    change = math.sqrt(sum(np.sum((new[p].astype(np.float64) - before[p]) ** 2) for p in before) / n)
    size = math.sqrt(sum(np.sum(new[p].astype(np.float64) ** 2) for p in before) / n)
    assert abs(line["update_rms"] / change - 1) < 1e-3
    assert abs(line["parameter_rms"] / size - 1) < 1e-5
    # Adam's first step is the rate times the sign of the gradient; 1e-7 is Keras' epsilon, so tiny ones move less.
    moved = np.concatenate([(new[p] - before[p]).ravel() for p in before])
    assert np.abs(moved).max() <= 1.01e-3
    # Finite differences along one bias: the step goes against them, and the norm of the whole is larger.
    bias = "model/h0/mlp/c_proj/b"
    slopes = []
    for i in range(15):
        ends = []
        for sign in (1, -1):
            p = {path: value.astype(np.float64) for path, value in before.items()}
            p[bias][i] += sign * 1e-4
            ends.append(mean_loss(p, batch))
        slopes.append((ends[0] - ends[1]) / 2e-4)
    assert (np.sign(slopes) == -np.sign(new[bias] - before[bias])).all()
    assert line["gradient_norm"] > np.linalg.norm(slopes) > 0
    windows = validation_windows(data, T, 5)
    first, last = history["validation"]
    assert abs(first["validation_loss"] - mean_loss(before, windows)) < 1e-5
    assert abs(last["validation_loss"] - mean_loss(new, windows)) < 1e-5


def test_gradient_norm_and_clipping(corpus, tmp_path):
    """Most optimizers ignore the scale of a first gradient; AdamW with a large epsilon shows it."""
    base = configuration(
        corpus, tmp_path / "a", model={"embd_pdrop": 0.0}, optimizer="adamw", learning_rate=10.0, warmup_steps=0,
        max_steps=1, optimizer_options={"epsilon": 1e3},
    )  # fmt: skip
    free = train(base)["train"][0]
    clipped = train(base.replace(run_dir=str(tmp_path / "b"), clip_norm=free["gradient_norm"] / 4))["train"][0]
    assert clipped["loss"] == free["loss"]
    assert abs(clipped["gradient_norm"] / free["gradient_norm"] - 1) < 1e-5, "the norm before clipping"
    assert abs(clipped["update_rms"] / free["update_rms"] - 0.25) < 0.02


def test_loss_falls(corpus, tmp_path):
    config = configuration(corpus, tmp_path / "run", max_steps=40, log_every=20, validate_every=100,
                           checkpoint_every=100, optimizer="adamw", learning_rate=0.02)  # fmt: skip
    validation = train(config)["validation"]
    assert [line["step"] for line in validation] == [0, 40]
    assert abs(validation[0]["validation_loss"] - math.log(257)) < 0.2
    assert validation[1]["validation_loss"] < validation[0]["validation_loss"] - 1.5


def test_a_checkpoint_is_a_model(finished):
    config, history, _ = finished
    model, info = checkpoint.load(config.run_dir)
    assert info["step"] == 6 and info["model"]["n_vocab"] == 257
    assert TrainConfig.from_dict(info["config"]) == config
    windows = validation_windows(Corpus(config.corpus), T, 5)
    p = {v.path: np.asarray(v.value) for v in model.trainable_variables}
    loss = np.mean([literal_nll(gpt2(p, 3, window[:-1])[0], window[1:]) for window in windows])
    assert abs(loss - history["validation"][-1]["validation_loss"]) < 1e-5
    assert checkpoint.list_steps(Path(config.run_dir) / "checkpoints") == [4, 6]
    with pytest.raises(checkpoint.CheckpointError, match="nothing"):
        checkpoint.load(Path(config.run_dir) / "nothing")


# --- interrupted runs -------------------------------------------------------------------------------------------------


class Interrupted(Exception):
    pass


@pytest.fixture
def interrupt(monkeypatch):
    """`interrupt(step)`: the batch of that step is never read; `interrupt(None)`: all are."""
    read = Batches.__getitem__

    def at(stop):
        def getitem(self, step):
            if step == stop:
                raise Interrupted
            return read(self, step)

        monkeypatch.setattr(Batches, "__getitem__", getitem)

    return at


@pytest.mark.parametrize("whole", ["finished", "finished_adamw"])
def test_an_interrupted_run_goes_on_as_if_nothing_had_been(tmp_path, interrupt, request, whole):
    """With dropout, a second model and a second optimizer in the same process, interrupted behind its checkpoint."""
    config = request.getfixturevalue(whole)[0]
    interrupted = config.replace(run_dir=str(tmp_path / "interrupted"))
    interrupt(5)
    with pytest.raises(Interrupted):
        train(interrupted)
    assert checkpoint.list_steps(tmp_path / "interrupted" / "checkpoints")[-1] == 4
    assert [line["step"] for line in read_history(tmp_path / "interrupted")["train"]] == [1, 2, 3, 4, 5]
    interrupt(None)
    history = train(interrupted)
    assert [line["step"] for line in history["train"]] == [1, 2, 3, 4, 5, 6], "no line is repeated"
    assert [line["step"] for line in history["validation"]] == [0, 3, 6]
    assert_same_run(config.run_dir, interrupted.run_dir)


@pytest.mark.parametrize("kind", ["folder", "address"])
def test_a_run_goes_on_from_its_copy(finished, tmp_path, interrupt, kind):
    """On another machine, where only the copy is: a mounted folder, or an object store."""
    place = str(tmp_path / "drive" / "run") if kind == "folder" else f"memory://{tmp_path.name}/run"
    one = finished[0].replace(run_dir=str(tmp_path / "one"), copy_to=place, keep_checkpoints=1)
    interrupt(5)
    with pytest.raises(Interrupted):
        train(one)
    interrupt(None)
    other = one.replace(run_dir=str(tmp_path / "other"))
    history = train(other)
    assert [line["step"] for line in history["train"]] == [1, 2, 3, 4, 5, 6]
    assert_same_run(finished[0].run_dir, other.run_dir)
    third = one.replace(run_dir=str(tmp_path / "third"))
    interrupt(0)
    assert train(third) == history, "it is finished, and was brought here"
    assert checkpoint.Copies(third.run_dir, place).steps() == [6], "as many as the run keeps"
    assert not list(Path(third.run_dir).rglob("*.part"))
    interrupt(None)
    train(third.replace(max_steps=2, warmup_steps=1, checkpoint_every=2), restart=True)
    assert checkpoint.Copies(third.run_dir, place).steps() == [2]


@pytest.mark.parametrize("cut", ["state.safetensors", "metrics.jsonl", "checkpoint.json"])
def test_a_copy_that_is_cut_off_leaves_the_one_before(finished, tmp_path, monkeypatch, cut):
    """The bytes of one file stop half-way in the second copy; another machine goes on from the first."""
    from fsspec.implementations.local import LocalFileSystem

    place, whole = tmp_path / "drive", LocalFileSystem.put_file
    first = place / "checkpoints" / "step-00000002" / "checkpoint.json"

    def put_file(self, source, target, *more, **named):
        whole(self, source, target, *more, **named)
        if cut in target and first.exists():
            os.truncate(target, os.path.getsize(target) // 2)
            raise OSError("the connection broke")

    one = finished[0].replace(run_dir=str(tmp_path / "one"), copy_to=str(place))
    monkeypatch.setattr(LocalFileSystem, "put_file", put_file)
    with pytest.warns(UserWarning, match="the connection broke"):
        train(one)
    monkeypatch.undo()
    assert checkpoint.Copies(one.run_dir, str(place)).steps() == [2]
    other = one.replace(run_dir=str(tmp_path / "other"))
    history = train(other)
    assert [line["step"] for line in history["train"]] == [1, 2, 3, 4, 5, 6]
    assert_same_run(finished[0].run_dir, other.run_dir)


def test_a_copy_that_fails_does_not_end_the_run(finished, tmp_path):
    config = finished[0].replace(run_dir=str(tmp_path / "run"), copy_to=str(tmp_path / "drive"))
    (tmp_path / "drive").mkdir()
    (tmp_path / "drive" / "checkpoints").write_text("in the way")
    with pytest.warns(UserWarning, match=r"could not copy .* to .*drive: .*; the run goes on"):
        train(config)
    assert_same_run(finished[0].run_dir, config.run_dir)


@pytest.mark.parametrize("place", ["nowhere://bucket/run", "gs://bucket/run"])
def test_a_place_for_copies_that_cannot_be_used(copied, place):
    with pytest.raises(ConfigError, match=r"copy_to: .* cannot be used: ") as error:
        train(copied.replace(copy_to=place))
    assert "\n" not in str(error.value)


def test_interrupted_before_the_first_checkpoint(finished, tmp_path, interrupt):
    config = finished[0].replace(run_dir=str(tmp_path / "run"))
    interrupt(1)
    with pytest.raises(Interrupted):
        train(config)
    interrupt(None)
    train(config)
    assert_same_run(finished[0].run_dir, config.run_dir)


def test_a_damaged_checkpoint_costs_only_its_steps(finished, copied):
    state = Path(copied.run_dir) / "checkpoints" / "step-00000006" / "state.safetensors"
    state.write_bytes(state.read_bytes()[:-1])
    with pytest.warns(UserWarning, match="step-00000006"):
        train(copied)
    assert_same_run(finished[0].run_dir, copied.run_dir)


def test_a_metrics_line_cut_by_a_kill(finished, copied):
    path = Path(copied.run_dir) / "metrics.jsonl"
    path.write_text(path.read_text() + '{"step": 7, "lo')
    assert read_history(copied.run_dir) == finished[1]


def test_a_finished_run_is_not_trained_again(finished, copied, interrupt):
    interrupt(0)
    before = {path: path.stat().st_mtime_ns for path in Path(copied.run_dir).rglob("*")}
    assert train(copied) == finished[1]
    assert {path: path.stat().st_mtime_ns for path in Path(copied.run_dir).rglob("*")} == before


def test_a_restart_that_cannot_begin_deletes_nothing(finished, copied):
    with pytest.raises(ConfigError, match="beta1"):
        train(copied.replace(optimizer_options={"beta_1": 0.5}), restart=True)
    assert read_history(copied.run_dir) == finished[1]


def test_a_restart_deletes_the_run_and_nothing_else(copied):
    beside = Path(copied.run_dir) / "notes.txt"
    beside.write_text("mine")
    train(copied.replace(max_steps=2, warmup_steps=1), restart=True)
    assert beside.read_text() == "mine"


def test_restart(finished, copied):
    other = copied.replace(seed=2)
    history = train(other, restart=True)
    assert [line["step"] for line in history["train"]] == [1, 2, 3, 4, 5, 6]
    assert history["train"][0]["loss"] != finished[1]["train"][0]["loss"]


@pytest.mark.parametrize(
    "changes",
    [{"seed": 2}, {"learning_rate": 0.02}, {"max_steps": 8}, {"batch_size": 2}, {"optimizer": "adamw"},
     {"init": "2019"}, {"model": {"n_layer": 2}}, {"dtype": "mixed_bfloat16"}, {"optimizer_options": {"beta1": 0.5}},
     {"clip_norm": 1.0}],
    ids=str,
)  # fmt: skip
def test_another_configuration_is_refused(copied, changes):
    (name,) = changes
    if name == "model":
        changes = {"model": copied.model | changes["model"]}
    before = (Path(copied.run_dir) / "metrics.jsonl").read_bytes()
    with pytest.raises(ConfigError, match=rf"\b{name}\b") as error:
        train(copied.replace(**changes))
    assert copied.run_dir in str(error.value) and "restart=True" in str(error.value)
    assert (Path(copied.run_dir) / "metrics.jsonl").read_bytes() == before
    assert checkpoint.list_steps(Path(copied.run_dir) / "checkpoints") == [4, 6]


def test_another_corpus_is_refused(copied, tmp_path):
    with pytest.raises(ConfigError, match="another corpus") as error:
        train(copied.replace(corpus=str(write(tmp_path / "other", seed=9))))
    assert str(tmp_path / "other") in str(error.value)


def test_the_same_corpus_elsewhere_is_the_same(finished, copied, tmp_path):
    assert train(copied.replace(corpus=str(shutil.copytree(copied.corpus, tmp_path / "moved")))) == finished[1]


# --- what a run must refuse -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("log_every", [1, 10])
def test_a_non_finite_loss_names_its_step(corpus, tmp_path, log_every):
    """The first step of a warm-up has rate 0, the second breaks the parameters, the third one's loss shows it.

    TensorFlow looks at the parameters in the steps that it logs, JAX in all.
    """
    step = 3 if log_every == 10 and keras.backend.backend() == "tensorflow" else 2
    config = configuration(
        corpus, tmp_path / "run", learning_rate=1e38, log_every=log_every, optimizer="adamw", validate_every=10,
        checkpoint_every=10,
    )  # fmt: skip
    with pytest.raises(TrainingError, match=rf"\bstep {step}\b") as error:
        train(config)
    assert "\n" not in str(error.value)
    assert not checkpoint.list_steps(tmp_path / "run" / "checkpoints"), "broken parameters are not kept"


def test_a_validation_that_is_no_number_names_its_step(finished, tmp_path, monkeypatch):
    def damaged(*_):
        raise NotFinite("the loss of token 0 of window 0 is nan")

    monkeypatch.setattr("gpt2lib.train.window_losses", damaged)
    with pytest.raises(Diverged, match=r"^the validation loss after step 0 is no number; lower the learning rate$"):
        train(finished[0].replace(run_dir=str(tmp_path / "run")))


def test_a_full_disk_stops_the_run_and_keeps_the_checkpoint_before(finished, tmp_path, monkeypatch):
    import safetensors.numpy

    save = safetensors.numpy.save_file

    def full(arrays, path):
        if "step-00000004" in str(path):
            raise OSError(28, "No space left on device")
        save(arrays, path)

    config = finished[0].replace(run_dir=str(tmp_path / "run"))
    with monkeypatch.context() as patch:
        patch.setattr(safetensors.numpy, "save_file", full)
        with pytest.raises(checkpoint.CheckpointError, match="No space left on device"):
            train(config)
    assert checkpoint.list_steps(tmp_path / "run" / "checkpoints") == [2]
    train(config)
    assert_same_run(finished[0].run_dir, config.run_dir)


@pytest.mark.parametrize(
    "options, said",
    [
        ({"optimizer_options": {"beta_1": 0.9}}, ("beta_1", "`beta1`")),
        ({"optimizer_options": {"beta1": 0.9}, "optimizer": "adamw"}, ("beta1", "`beta_1`")),
        ({"optimizer_options": {"learning_rate": 0.9}}, ("learning_rate",)),
        ({"optimizer_options": {"clip_threshold": 0.9}}, ("clip_threshold", "`clipping_threshold`")),
    ],
    ids=str,
)
def test_an_unknown_optimizer_option_names_the_nearest(corpus, tmp_path, options, said):
    with pytest.raises(ConfigError) as error:
        train(configuration(corpus, tmp_path / "run", **options))
    assert all(word in str(error.value) for word in said)


def test_a_vocabulary_smaller_than_the_corpus(corpus, tmp_path):
    with pytest.raises(ConfigError, match=r"n_vocab.*256.*257"):
        train(configuration(corpus, tmp_path / "run", model={"n_vocab": 256}))
    assert not (tmp_path / "run").exists()


def test_both_optimizers_see_the_same_batches(finished, finished_adamw):
    """And start from the same parameters: the first loss is equal, and so is every token."""
    assert finished[2] == finished_adamw[2]
    assert [step for step, _ in finished[2]] == [0, 1, 2, 3, 4, 5]
    ours, theirs = finished[1], finished_adamw[1]
    assert ours["train"][0]["loss"] == theirs["train"][0]["loss"]
    assert ours["train"][-1]["loss"] != theirs["train"][-1]["loss"]
    assert ours["validation"][0]["validation_loss"] == theirs["validation"][0]["validation_loss"]


def test_weight_decay_is_the_rate_times_the_weight(corpus, tmp_path):
    """A rate that moves nothing else: unused words have no gradient, so AdamW only shrinks them."""
    base = configuration(corpus, tmp_path / "a", optimizer="adamw", learning_rate=0.1, warmup_steps=0, max_steps=1,
                         model={"embd_pdrop": 0.0})  # fmt: skip
    train(base)
    train(base.replace(run_dir=str(tmp_path / "b"), weight_decay=0.5))
    plain, decayed = state_of(tmp_path / "a"), state_of(tmp_path / "b")
    before = {v.path: np.asarray(v.value) for v in GPT2(base.model_config(257), seed=1).trainable_variables}
    for path, value in before.items():
        np.testing.assert_allclose(decayed[path], plain[path] - 0.05 * value, rtol=1e-5, atol=1e-6, err_msg=path)


def test_adamw_does_not_train_bfloat16_parameters(corpus, tmp_path):
    """Its updates would be lost in rounding; a plan may ask what it would need all the same."""
    config = configuration(corpus, tmp_path / "run", dtype="bfloat16", optimizer="adamw", learning_rate=1e-3)
    with pytest.raises(ConfigError, match="mixed_bfloat16"):
        train(config)
    assert not (tmp_path / "run").exists()


def test_bfloat16_keeps_float32_parameters(corpus, tmp_path):
    config = configuration(corpus, tmp_path / "run", dtype="mixed_bfloat16", max_steps=3)
    history = train(config)
    assert all(math.isfinite(line["loss"]) for line in history["train"])
    arrays = state_of(config.run_dir)
    assert all(value.dtype == np.float32 for name, value in arrays.items() if name.startswith("model/"))
    model, info = checkpoint.load(config.run_dir)
    assert info["dtype"] == "mixed_bfloat16" and model.compute_dtype == "bfloat16"
    assert checkpoint.load(config.run_dir, dtype="float32")[0].compute_dtype == "float32"
    assert keras.config.dtype_policy().name == "float32", "the policy of others is left alone"
