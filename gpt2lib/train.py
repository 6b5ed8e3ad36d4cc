"""Training: one straight function, `train(config)`, that survives being killed at any moment.

    python -m gpt2lib.train RUN

starts a run, or goes on with it: RUN is its folder, or a .yaml or .json file with the fields of TrainConfig. With
`--distributed` it is one of several hosts, which each run this command.
"""

import argparse
import collections
import contextlib
import errno
import functools
import importlib.util
import json
import math
import os
import shlex
import shutil
import signal
import sys
import threading
import time
import warnings
from pathlib import Path

import keras
import numpy as np
import yaml
from tqdm import tqdm

from gpt2lib import checkpoint, device
from gpt2lib.config import ConfigError, ModelConfig, Reading, TrainConfig
from gpt2lib.data import Batches, Corpus, CorpusError, prefetch, validation_windows
from gpt2lib.evaluate.loss import NotFinite, total, window_losses
from gpt2lib.plan.counts import memory
from gpt2lib.reading import ReadBatches
from gpt2lib.report import provenance
from gpt2lib.step import make_parts, make_step
from gpt2lib.tokenizer import TokenizerError

# A run goes on under another value of these; a change of any other would make it another run.
_FREE = {
    "corpus", "run_dir", "log_every", "validate_every", "checkpoint_every", "keep_checkpoints", "progress", "copy_to",
    "max_minutes", "spike_deviations", "tensorboard", "allow_changes", "remat", "loss_chunk", "sharded", "devices",
}  # fmt: skip
_ANEW = "name another folder for this run, or delete that one with restart=True (a study: `restart: true`, or --force)"
_WRITTEN = ("checkpoints", "incidents", "tensorboard", "metrics.jsonl", "incidents.jsonl", "train.json")
_STOPPED = 75  # exit status of a run that is to be started again (EX_TEMPFAIL)


class TrainingError(RuntimeError):
    """A run that cannot go on; the message says at which step and why."""


class Diverged(TrainingError):
    """A run of which loss, gradient or parameters are no finite numbers any more."""


class Stopped(TrainingError):
    """A run that stopped before its end as it was asked to, saved; the message says how to go on."""


# --- files ------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _disk_errors(path):
    """Turn a failed write into one sentence."""
    try:
        yield
    except OSError as error:
        raise TrainingError(
            f"could not write {path}: {error.strerror or error}; make it writable or free some space, and start again: "
            "the run goes on from its last checkpoint"
        ) from error


class _Lines:
    """A file of one JSON object a line, cut after the step that a run resumes from."""

    def __init__(self, path, step):
        whole = [end for line, end in _read_lines(path) if step and line["step"] <= step]
        self.path, self.file = path, open(path, "ab", buffering=0)  # one write a line: a kill cannot leave a part of it
        self.file.truncate(max(whole, default=0))

    def write(self, line: dict):
        data = (json.dumps(line) + "\n").encode()
        with _disk_errors(self.path):
            if self.file.write(data) < len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def sync(self):
        """Bring to the disk what a checkpoint is about to make final."""
        with _disk_errors(self.path):
            os.fsync(self.file.fileno())


def _read_lines(path):
    """(line, where it ends in bytes) for each, up to the first one that is broken."""
    end = 0
    for text in Path(path).read_bytes().splitlines(keepends=True) if Path(path).exists() else []:
        end += len(text)
        try:
            line = json.loads(text)
        except ValueError:
            return
        if text.endswith(b"\n"):
            yield line, end


def read_metrics(path) -> list[dict]:
    """The lines of a `metrics.jsonl`; a last line cut off by a full disk is left out."""
    return [line for line, _ in _read_lines(path)]


def _layers(before: dict, after: dict) -> dict:
    """{wte, wpe, h0, ..., ln_f: [RMS of the update, RMS of the parameters before it]}, of a state by paths."""
    squares = {}
    for path, old in before.items():
        if path.startswith("model/"):  # not the optimizer's
            moved, n = squares.setdefault(path.split("/")[1], ([0.0, 0.0], [0]))
            new, old = (np.asarray(x, np.float64) for x in (after[path], old))
            moved[0] += float(np.square(new - old).sum())
            moved[1] += float(np.square(old).sum())
            n[0] += old.size
    return {name: [math.sqrt(x / n) for x in sums] for name, (sums, (n,)) in squares.items()}


def read_history(run_dir) -> dict:
    """What a run has recorded: {"train": [...], "validation": [...]}, dicts as in `metrics.jsonl`."""
    lines = read_metrics(Path(run_dir) / "metrics.jsonl")
    return {
        "train": [line for line in lines if "loss" in line],
        "validation": [line for line in lines if "validation_loss" in line],
    }


class _Board:
    """TensorBoard's log of a run; what was logged after the step that it resumes from is hidden."""

    def __init__(self, folder, step):
        from tensorboardX.event_file_writer import EventsWriter  # unlike SummaryWriter's, its flush is one
        from tensorboardX.proto import event_pb2, summary_pb2

        self.folder, self.event, self.summary = folder, event_pb2.Event, summary_pb2.Summary
        folder.mkdir(exist_ok=True)
        self.file = EventsWriter(str(folder / "events"), f".{time.time_ns()}")
        start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
        self.file.write_event(self.event(wall_time=time.time(), step=step + 1 if step else 0, session_log=start))

    def write(self, line: dict):
        value, shown = self.summary.Value, line.keys() - {"step", "tokens_seen", "seconds", "layers"}
        summary = self.summary(value=[value(tag=name, simple_value=line[name]) for name in sorted(shown)])
        with _disk_errors(self.folder):
            self.file.write_event(self.event(wall_time=time.time(), step=line["step"], summary=summary))
            self.file.flush()


def _delete_run(run_dir) -> None:
    """Delete what a run has written, and nothing else."""
    for name in _WRITTEN:
        path = run_dir / name
        shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)


# --- where a run starts -----------------------------------------------------------------------------------------------


def _newest(config, corpus) -> tuple[dict, dict] | None:
    """(arrays, info) of the newest intact checkpoint of this run, on every host those of the first; None without one.

    ConfigError if its folder holds another run.
    """
    first = device.hosts()[0] == 0
    arrays, info = (checkpoint.read(Path(config.run_dir) / "checkpoints") if first else None) or ({}, None)
    shapes = {path: (array.shape, str(array.dtype)) for path, array in arrays.items()}
    info, shapes = device.json_from_first_host([info, shapes])
    if info is None:
        return None
    _check_same_run(config, corpus, info)
    return {
        path: device.from_first_host(arrays[path] if first else np.zeros(shape, dtype))
        for path, (shape, dtype) in shapes.items()
    }, info


def _check_same_run(config, corpus, info):
    """ConfigError naming the field in which a run differs from the one that its folder holds."""
    theirs = TrainConfig.from_dict(info["config"]).to_dict()  # fields that are newer than the run have their defaults
    ours = json.loads(json.dumps(config.to_dict()))
    for name in sorted(ours.keys() - _FREE - set(config.allow_changes)):
        if theirs[name] != ours[name]:
            raise ConfigError(
                f"{config.run_dir} holds a run with {name}={theirs[name]!r}, not {ours[name]!r}; {_ANEW}; "
                f"to go on all the same: allow_changes: [{name}]"
            )
    corpus.check_tokenizer(info["tokenizer"], config.run_dir)
    if info["corpus"] != corpus.hash and "corpus" not in config.allow_changes:
        raise ConfigError(
            f"{config.run_dir} was trained on another corpus than {config.corpus} is now; {_ANEW}; "
            "to go on all the same: allow_changes: [corpus]"
        )


def model_config(config: TrainConfig, corpus: Corpus, resumed: dict | None = None) -> ModelConfig:
    """The model of a run. With `init_from` that checkpoint's, with the dropout rates of `config.model`.

    `resumed` are the fields of the model that the run has already: then `init_from` need not be there any more. Where
    it is gone and nothing is given, what the run's folder holds counts.
    ConfigError naming the field in which they differ; CorpusError if the corpus has another tokenizer.
    """
    if config.init_from is None:
        shape = config.model_config(corpus.n_vocab)
        if shape.n_vocab < corpus.n_vocab:
            raise ConfigError(f"model.n_vocab is {shape.n_vocab}, but {config.corpus} has {corpus.n_vocab} words")
        return shape
    begun = checkpoint.list_steps(Path(config.run_dir) / "checkpoints")
    if resumed is None and begun and not Path(config.init_from).exists():
        resumed = checkpoint.pretrained_config(config.run_dir).to_dict()
    shape = ModelConfig.from_dict(resumed) if resumed else checkpoint.pretrained_config(config.init_from)
    asked = config.model_config(shape.n_vocab).to_dict() if config.size else {**shape.to_dict(), **config.model}
    for name, value in asked.items():
        if not name.endswith("_pdrop") and value != getattr(shape, name):
            raise ConfigError(
                f"{config.init_from} has {name}={getattr(shape, name)}, but this run asks for {value}; "
                "leave out `size` and that field of `model`, or name a checkpoint of that shape"
            )
    if not resumed:
        tokenizer = checkpoint.tokenizer_hash(config.init_from)
        if tokenizer is not None:
            corpus.check_tokenizer(tokenizer, config.init_from)
        elif shape.n_vocab != corpus.n_vocab:
            raise ConfigError(
                f"{config.init_from} has a vocabulary of {shape.n_vocab}, {config.corpus} one of {corpus.n_vocab}; "
                "write the corpus with the checkpoint's tokenizer"
            )
    return shape.replace(**{name: value for name, value in asked.items() if name.endswith("_pdrop")})


def _first_values(config, arrays):
    """What `GPT2(init=...)` takes: the name of an initialisation, or the parameters of a checkpoint."""
    if arrays is None and config.init_from is None:
        return config.init
    if arrays is None:
        pretrained = checkpoint.load_pretrained(config.init_from)
        arrays = {v.path: np.asarray(v.value, np.float32) for v in pretrained.trainable_variables}
    return lambda path, shape: checkpoint.expect(arrays, path, shape, config.init_from or config.run_dir)


def _build(config, shape, places, arrays=None):
    """The compiled step of a run, with its model and optimizer: new ones, or with the arrays of its last checkpoint."""
    if keras.backend.backend() == "jax":
        scope, n = device.on_host(), len(places)
    else:
        scope, n = places.scope(), places.num_replicas_in_sync
    rows = config.batch_size // config.accumulate
    if rows % n:
        raise ConfigError(
            f"TrainConfig.batch_size {config.batch_size} in {config.accumulate} part(s) gives {rows} sequences at a "
            f"time, which {n} devices cannot share evenly; make it a multiple of {n * config.accumulate}, or "
            "set devices"
        )
    with scope:
        model, optimizer, trained = make_parts(config, shape, _first_values(config, arrays))
        for v in optimizer.variables if arrays else ():
            v.assign(checkpoint.expect(arrays, v.path, v.shape, config.run_dir))
    return make_step(model, optimizer, trained, config, places)


# --- while it runs ----------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _signals():
    """Yields a list that SIGTERM and the first Ctrl-C are noted in, instead of ending the process at once."""
    noted = []
    if threading.current_thread() is not threading.main_thread():
        yield noted
        return

    def note(number, frame):
        if number in noted:  # asked twice
            signal.signal(number, before[number])
            signal.raise_signal(number)
        noted.append(number)

    before = {number: signal.getsignal(number) or signal.SIG_DFL for number in (signal.SIGTERM, signal.SIGINT)}
    before = {number: handler for number, handler in before.items() if handler is not signal.SIG_IGN}
    for number in before:
        signal.signal(number, note)
    try:
        yield noted
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class _Spikes:
    """Exponentially weighted mean and variance of the losses; tells when one lies far above them."""

    horizon = 100

    def __init__(self, deviations, state=None):
        self.deviations = deviations
        self.n, self.mean, self.square, self.quiet_until = state or (0, 0.0, 0.0, 0)

    @property
    def state(self) -> list:
        """What a run that goes on needs to tell what an undisturbed one would."""
        return [self.n, self.mean, self.square, self.quiet_until]

    def look(self, loss) -> str | None:
        """What is unusual about the next loss, at most once in a horizon; None for the first half of the first one."""
        self.n += 1
        share = max(1 / self.n, 1 / self.horizon)
        above = loss - self.mean
        deviation = math.sqrt(max(self.square - self.mean**2, 1e-12))
        self.mean += share * above
        self.square += share * (loss**2 - self.square)
        if not self.deviations or self.n <= max(self.horizon // 2, self.quiet_until):
            return None
        if above <= self.deviations * deviation:
            return None
        self.quiet_until = self.n + self.horizon
        return f"the loss {loss:.3f} is {above / deviation:.0f} standard deviations above the mean {loss - above:.3f}"


def _memory(config, shape, n_devices) -> str:
    """What a step holds on each device, roughly, and what to change: for the message when it was too much."""
    rows = config.batch_size // config.accumulate / n_devices
    needed = memory(config, n_devices, shape, kernel=device.is_tpu())
    state = needed["state"] + needed["gradients"]
    advice = [
        f"accumulate above {config.accumulate}" if rows > 1 else "",
        "" if config.remat else "remat: true",
        "" if config.loss_chunk else "loss_chunk: 512",
        "dtype: mixed_bfloat16" if config.dtype == "float32" else "",
        "sharded: true" if n_devices > 1 and not config.sharded else "",
        "a smaller batch_size or model",
    ]
    return (
        f"{rows:g} sequences of {shape.n_ctx} tokens at a time need about {state / 1e9:.1f} GB for parameters, "
        f"gradients and slots, {needed['blocks'] / 1e9:.1f} GB for activations and {needed['logits'] / 1e9:.1f} GB for "
        f"logits on each of {n_devices} device(s); try {', '.join(filter(None, advice))}"
    )


@contextlib.contextmanager
def _out_of_memory(config, shape, n_devices):
    """Turn what the backends raise when memory runs out into one sentence."""
    try:
        yield
    except Exception as error:
        text = str(error)
        if isinstance(error, MemoryError) or any(
            sign in f"{type(error).__name__}: {text}"
            for sign in ("RESOURCE_EXHAUSTED", "ResourceExhausted", "OOM when", "out of memory", "Out of memory")
        ):
            raise TrainingError(f"out of memory: {_memory(config, shape, n_devices)}") from error
        raise


def train(config: TrainConfig, restart: bool = False) -> dict:
    """Train a GPT-2 as `config` says, from its last checkpoint if there is one.

    Writes into `config.run_dir`: `train.json`, `checkpoints/`, `metrics.jsonl`; `incidents.jsonl` and `incidents/` (a
    state to inspect) for loss spikes and gradients that are not finite. A finished run is not trained again. After a
    kill, all later losses are those of an undisturbed run, bit for bit. SIGTERM and Ctrl-C save first.

    Raises Stopped when `max_minutes` are over; Diverged on a non-finite gradient, naming the step; TrainingError when
    memory runs out; ConfigError if `run_dir` holds another run or the batch does not divide over the devices.

    Args:
        config: `TrainConfig`.
        restart: delete the run that `run_dir` holds first.

    Returns: `read_history(config.run_dir)`.
    """
    began = time.monotonic()
    if config.dtype == "bfloat16" and config.optimizer != "adafactor":
        raise ConfigError("TrainConfig.dtype `bfloat16` is for adafactor, which rounds well; for adamw: mixed_bfloat16")
    host, n_hosts = device.hosts()
    main = host == 0
    corpus, run_dir = Corpus(config.corpus), Path(config.run_dir)
    if config.init_from and Path(config.init_from).resolve() == run_dir.resolve():
        raise ConfigError(f"init_from and run_dir are both {run_dir}; give the new run a folder of its own")
    if config.tensorboard and importlib.util.find_spec("tensorboardX") is None:
        raise ConfigError("TrainConfig.tensorboard needs tensorboardX; run: pip install tensorboardX")
    copies = None
    if main and config.copy_to:
        copies = checkpoint.Copies(run_dir, config.copy_to)
        if not restart:
            copies.fetch()
    fresh = None, {"step": 0, "seconds": 0.0, "model": None}
    arrays, info = (None if restart else _newest(config, corpus)) or fresh
    done, seconds = info["step"], info["seconds"]
    if done >= config.max_steps:
        return read_history(run_dir)
    shape = model_config(config, corpus, info["model"])
    order = dict(batch_size=config.batch_size, n_ctx=shape.n_ctx, seed=config.seed)
    read = Batches
    if config.reading:
        read = functools.partial(ReadBatches, options=Reading.from_dict(config.reading))
    batches = read(corpus, **order, host=host, n_hosts=n_hosts)
    validation = validation_windows(corpus, shape.n_ctx, config.validation_windows)
    places = device.places(config.devices, config.sharded)
    n_devices = len(places) if isinstance(places, list) else places.num_replicas_in_sync
    with _out_of_memory(config, shape, n_devices):
        step = _build(config, shape, places, arrays)
    del arrays
    batch_tokens = config.batch_size * shape.n_ctx
    metrics = incidents = board = None
    if main:
        with _disk_errors(run_dir):
            if restart:
                _delete_run(run_dir)
                if copies:
                    copies.clear()
            run_dir.mkdir(parents=True, exist_ok=True)
            checkpoint.write_json(run_dir / "train.json", config.to_dict())
            metrics, incidents = _Lines(run_dir / "metrics.jsonl", done), _Lines(run_dir / "incidents.jsonl", done)
            board = _Board(run_dir / "tensorboard", done) if config.tensorboard else None
    bar = tqdm(
        total=config.max_steps,
        initial=done,
        unit="step",
        disable=not (config.progress and main),
        mininterval=1,
        dynamic_ncols=True,
    )
    spikes, flying, saved = _Spikes(config.spike_deviations, info.get("spikes")), collections.deque(), done
    ahead = 1 if keras.backend.backend() == "jax" else 0  # JAX takes the next step while the last one is looked at
    rows, origin = config.batch_size // config.accumulate, {**provenance(), "device": device.describe()}

    def write(line):
        for file in filter(None, (metrics, board)):
            file.write(line)

    def validate():
        try:
            result = total(window_losses(step.losses, validation, rows))
        except NotFinite as error:
            raise Diverged(f"the validation loss after step {done} is no number; lower the learning rate") from error
        error = None if math.isnan(result.standard_error) else result.standard_error  # of one window
        write(
            {"step": done, "tokens_seen": done * batch_tokens, "validation_loss": result.loss,
             "validation_loss_se": error, "seconds": round(seconds, 3)}
        )  # fmt: skip

    def save(folder="checkpoints", at=None, keep=config.keep_checkpoints, **more):
        info = {
            "config": config.to_dict(), "model": shape.to_dict(), "dtype": config.dtype, "seconds": seconds,
            "spikes": spikes.state, "corpus": corpus.hash, "tokenizer": corpus.manifest["tokenizer"]["hash"],
            "provenance": origin, **more,
        }  # fmt: skip
        arrays = step.arrays()
        if main:
            metrics.sync()
            if copies:
                copies.wait()
            checkpoint.save(run_dir / folder, done if at is None else at, arrays, info, keep)
            if copies:
                copies.start()

    def report(at, what, state_at):
        """Note an incident of step `at`, with its batch and the state after `state_at` steps; returns the sentence."""
        everywhere = read(corpus, **order)  # the rows of all hosts
        batch = {"windows": everywhere.windows(at - 1), "documents": everywhere.documents(at - 1)}
        save("incidents", state_at, 3, incident={"step": at, "what": what, **batch})
        if main:
            incidents.write({"step": at, "what": what, "state": f"incidents/step-{state_at:08d}", **batch})
        return (
            f"step {at}: {what}; its batch has the documents {_some(batch['documents'])} of the train split; "
            f"the state after step {state_at} is in {run_dir / 'incidents'}, all of it in incidents.jsonl"
        )

    def settle(left):
        """Look at the steps that were started, until only `left` of them are unseen."""
        while len(flying) > left:
            at, measures = flying.popleft()
            loss, failed = float(measures["loss"]), int(measures["failed"])
            if failed >= 0:
                norm = float(measures["gradient_norm"])
                if math.isfinite(loss) and math.isfinite(norm):
                    rms = float(measures["parameter_rms"])
                    sentence = report(failed + 1, f"the RMS of the parameters after its update is {rms}", failed + 1)
                else:
                    sentence = report(failed + 1, f"the loss is {loss}, the norm of its gradient {norm}", failed)
                raise Diverged(
                    f"{sentence}; lower the learning rate ({config.learning_rate}), lengthen the warm-up "
                    f"({config.warmup_steps} steps) or clip gradients; the last checkpoint is as it was"
                )
            if unusual := spikes.look(loss):
                failed = int((flying or [(at, measures)])[-1][1]["failed"])  # a later step that changed nothing
                warnings.warn(report(at, unusual, done if failed < 0 else failed), stacklevel=3)

    with contextlib.ExitStack() as stack:
        noted = stack.enter_context(_signals())
        stack.enter_context(bar)
        if copies:
            stack.callback(copies.wait)
        for file in filter(None, (metrics, incidents, board)):
            stack.callback(file.file.close)
        stack.enter_context(_out_of_memory(config, shape, n_devices))
        stream = stack.enter_context(contextlib.closing(prefetch(batches, done, config.max_steps)))
        if not done:
            validate()
        since, clock = done, time.perf_counter()
        for tokens in stream:
            last = done + 1 == config.max_steps
            due = {
                "log": last or (done + 1) % config.log_every == 0,
                "validate": last or (done + 1) % config.validate_every == 0,
                "save": last or (done + 1) % config.checkpoint_every == 0,
            }
            before = step.arrays() if config.measure_layers and due["log"] else None
            measures = step(tokens, done, any(due.values()))
            done += 1
            flying.append((done, measures))
            bar.update()
            settle(0 if any(due.values()) else ahead)
            if any(due.values()):
                now = time.perf_counter()
                seconds += now - clock
                if due["log"]:
                    speed = (done - since) * batch_tokens / max(now - clock, 1e-9)
                    line = {
                        "step": done,
                        "tokens_seen": done * batch_tokens,
                        "learning_rate": float(step.optimizer._learning_rate(done - 1)),
                    }
                    line |= {name: float(value) for name, value in measures.items() if name != "failed"}
                    if before is not None:
                        line["layers"] = _layers(before, step.arrays())
                    write({**line, "tokens_per_second": round(speed, 1), "seconds": round(seconds, 3)})
                    bar.set_postfix_str(f"loss {line['loss']:.3f}, {speed:,.0f} tokens/s", refresh=False)
                if due["validate"]:
                    validate()
                if due["save"]:
                    save()
                    saved = done
                since, clock = done, time.perf_counter()
            late = config.max_minutes is not None and time.monotonic() - began > 60 * config.max_minutes
            if not last and device.any_host(bool(noted) or late):
                settle(0)
                seconds += time.perf_counter() - clock
                if done > saved:
                    save()
                break
    if noted:  # now it may do what it does: SIGTERM ends the process, Ctrl-C raises KeyboardInterrupt
        signal.raise_signal(noted[0])
    if done < config.max_steps:
        command = f"KERAS_BACKEND={keras.backend.backend()} python -m gpt2lib.train {shlex.quote(config.run_dir)}"
        command += " --distributed" if n_hosts > 1 else ""
        raise Stopped(
            f"stopped after {(time.monotonic() - began) / 60:.1f} minutes at step {done} of {config.max_steps}, saved; "
            f"to go on: {command}, or run the same notebook or study again"
        )
    return read_history(run_dir)


def _some(documents) -> str:
    """A few of a batch's documents, for a sentence."""
    numbers = sorted({number for row in documents for number in row})
    return f"{', '.join(map(str, numbers[:8]))}{f' and {len(numbers) - 8} more' if len(numbers) > 8 else ''}"


def _read_config(run) -> TrainConfig:
    """The configuration of a run's folder, wherever that lies now, or in a file; ConfigError if it cannot be read."""
    folder = Path(run).is_dir()
    path = Path(run) / "train.json" if folder else Path(run)
    try:
        text = path.read_text(encoding="utf-8")
        fields = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except FileNotFoundError as error:
        raise ConfigError(
            f"there is no {path}; give a run's folder or a file with the fields of TrainConfig"
        ) from error
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ConfigError(f"{path} cannot be read: {' '.join(str(error).split())}") from error
    if not isinstance(fields, dict):
        raise ConfigError(f"{path} holds no fields of TrainConfig")
    return TrainConfig.from_dict({**fields, "run_dir": str(run)} if folder else fields)


def main(arguments=None) -> int:
    """The command line; see the top of this file. Exit status: 0 finished, 75 to be started again, 1 failed."""
    parser = argparse.ArgumentParser(
        prog="python -m gpt2lib.train", description="Start a training run, or go on with one."
    )
    parser.add_argument("run", help="a run's folder, or a .yaml or .json file with the fields of TrainConfig")
    parser.add_argument("--restart", action="store_true", help="delete what the run's folder holds first")
    parser.add_argument("--distributed", action="store_true", help="one of several hosts (JAX)")
    options = parser.parse_args(arguments)
    try:
        config = _read_config(options.run)
        print(device.setup(distributed=options.distributed), flush=True)
        train(config, options.restart)
    except Stopped as stopped:
        print(stopped)
        return _STOPPED
    except (ConfigError, CorpusError, TokenizerError, TrainingError, checkpoint.CheckpointError) as error:
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; run the same command to go on", file=sys.stderr, flush=True)
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        signal.raise_signal(signal.SIGINT)  # so that the shell knows
    return 0


if __name__ == "__main__":
    sys.exit(main())
