"""Training: one straight function, `train(config)`, that survives being killed at any moment.

    python -m gpt2lib.train RUN

starts a run, or goes on with it: RUN is its folder, or a .yaml or .json file with the fields of TrainConfig. With
`--distributed` it is one of several hosts, which each run this command.
"""

import argparse
import collections
import contextlib
import json
import math
import os
import shutil
import signal
import sys
import threading
import time
import warnings
from pathlib import Path

import keras
import numpy as np
from tqdm import tqdm

from gpt2lib import checkpoint, device
from gpt2lib.config import ConfigError, ModelConfig, TrainConfig
from gpt2lib.data import Batches, Corpus, CorpusError, prefetch, validation_windows
from gpt2lib.evaluate.loss import total, window_losses
from gpt2lib.model import GPT2
from gpt2lib.report import provenance
from gpt2lib.step import make_optimizer, make_step, trained_variables

# A run goes on under another value of these; a change of any other would make it another run.
_FREE = {
    "corpus", "run_dir", "log_every", "validate_every", "checkpoint_every", "keep_checkpoints", "progress",
    "max_minutes", "spike_deviations", "tensorboard", "allow_changes", "remat", "loss_chunk", "sharded", "devices",
}  # fmt: skip
_ANEW = "name another folder for this run, or delete that one with restart=True (a study: `restart: true`, or --force)"
_WRITTEN = ("checkpoints", "incidents", "tensorboard", "metrics.jsonl", "incidents.jsonl", "train.json")
_STOPPED = 75  # exit status of a run that is to be started again (EX_TEMPFAIL)


class TrainingError(RuntimeError):
    """A run that cannot go on; the message says at which step and why."""


class Stopped(TrainingError):
    """A run that stopped before its end as it was asked to, saved; the message says how to go on."""


# --- files ------------------------------------------------------------------------------------------------------------


class _Lines:
    """A file of one JSON object a line; lines after the step that a run resumes from are dropped."""

    def __init__(self, path, step):
        kept = [line for line in read_metrics(path) if line["step"] <= step] if step else []
        part = path.with_suffix(".part")
        part.write_text("".join(json.dumps(line) + "\n" for line in kept))
        os.replace(part, path)
        self.file = open(path, "ab", buffering=0)  # one write a line: a kill cannot leave a part of it

    def write(self, line: dict):
        try:
            self.file.write((json.dumps(line) + "\n").encode())
        except OSError as error:
            raise TrainingError(
                f"could not write {self.file.name}: {error.strerror}; free some space and start again, "
                "the run goes on from its last checkpoint"
            ) from error


def read_metrics(path) -> list[dict]:
    """The lines of a `metrics.jsonl`; a last line cut off by a full disk is left out."""
    lines = []
    for text in Path(path).read_text().splitlines() if Path(path).exists() else []:
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            break
    return lines


def read_history(run_dir) -> dict:
    """What a run has recorded: {"train": [...], "validation": [...]}, dicts as in `metrics.jsonl`."""
    lines = read_metrics(Path(run_dir) / "metrics.jsonl")
    return {
        "train": [line for line in lines if "loss" in line],
        "validation": [line for line in lines if "validation_loss" in line],
    }


def _tensorboard(run_dir, done):
    """A writer of run_dir/tensorboard that hides what was logged after step `done`."""
    try:
        from tensorboardX import SummaryWriter
    except ImportError as error:
        raise ConfigError("TrainConfig.tensorboard needs tensorboardX; run: pip install tensorboardX") from error
    return SummaryWriter(str(run_dir / "tensorboard"), purge_step=done + 1)


def _delete_run(run_dir) -> None:
    """Delete what a run has written, and nothing else."""
    for name in _WRITTEN:
        path = run_dir / name
        shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)


# --- where a run starts -----------------------------------------------------------------------------------------------


def model_config(config: TrainConfig, corpus: Corpus) -> ModelConfig:
    """The model of a run. With `init_from` that checkpoint's, with the dropout rates of `config.model`.

    ConfigError naming the field in which they differ; CorpusError if the corpus has another tokenizer.
    """
    if config.init_from is None:
        shape = config.model_config(corpus.n_vocab)
        if shape.n_vocab < corpus.n_vocab:
            raise ConfigError(f"model.n_vocab is {shape.n_vocab}, but {config.corpus} has {corpus.n_vocab} words")
        return shape
    shape = checkpoint.pretrained_config(config.init_from)
    asked = config.model_config(shape.n_vocab).to_dict() if config.size else {**shape.to_dict(), **config.model}
    for name, value in asked.items():
        if not name.endswith("_pdrop") and value != getattr(shape, name):
            raise ConfigError(
                f"{config.init_from} has {name}={getattr(shape, name)}, but this run asks for {value}; "
                "leave out `size` and that field of `model`, or name a checkpoint of that shape"
            )
    tokenizer = checkpoint.tokenizer_hash(config.init_from)
    if tokenizer is not None:
        corpus.check_tokenizer(tokenizer, config.init_from)
    elif shape.n_vocab != corpus.n_vocab:
        raise ConfigError(
            f"{config.init_from} has a vocabulary of {shape.n_vocab}, {config.corpus} one of {corpus.n_vocab}; "
            "write the corpus with the checkpoint's tokenizer"
        )
    return shape.replace(**{name: value for name, value in asked.items() if name.endswith("_pdrop")})


def _initial_values(config):
    """What `GPT2(init=...)` takes: the name of an initialisation, or the parameters of `init_from`."""
    if config.init_from is None:
        return config.init
    parameters = {v.path: v for v in checkpoint.load_pretrained(config.init_from).trainable_variables}
    return lambda path, shape: np.asarray(parameters[path].value, np.float32)


def _build(config, shape, places):
    """The compiled step of a run, with a new model and optimizer, and the number of its devices."""
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
        model = GPT2(shape, init=_initial_values(config), seed=config.seed, dtype=config.dtype, remat=config.remat)
        optimizer = make_optimizer(config)
        trained = trained_variables(model, config.freeze)
        optimizer.build(trained)
    return make_step(model, optimizer, trained, config, places)


def _resume(config, corpus, step, host) -> tuple[int, float]:
    """Restore the newest intact checkpoint into the step: (steps done, seconds trained); (0, 0.0) without one."""
    found = checkpoint.read(Path(config.run_dir) / "checkpoints") if host == 0 else None
    arrays, info = found or ({}, {"step": -1, "seconds": 0.0})
    if found:
        _check_same_run(config, corpus, info)
    at, seconds = (int(x) for x in device.from_first_host(np.array([info["step"], info["seconds"]], np.int32)))
    if 0 <= at < config.max_steps:
        known = step.arrays()
        if host == 0:
            checkpoint.check(known, arrays, f"{config.run_dir}, step {at}")
        step.assign({path: device.from_first_host(arrays.get(path, value)) for path, value in known.items()})
    return max(at, 0), info["seconds"] if found else float(seconds)


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
    if info["corpus"] != corpus.hash and "corpus" not in config.allow_changes:
        raise ConfigError(f"{config.run_dir} was trained on another corpus than {config.corpus} is now; {_ANEW}")


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
            os.kill(os.getpid(), number)
        noted.append(number)

    before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield noted
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class _Spikes:
    """Exponentially weighted mean and variance of the losses; tells when one lies far above them."""

    horizon = 100

    def __init__(self, deviations):
        self.deviations, self.n, self.mean, self.square, self.quiet_until = deviations, 0, 0.0, 0.0, 0

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
    tokens, width = rows * shape.n_ctx, 2 if "bfloat16" in config.dtype else 4
    slots = {"adamw": 8.0, "adafactor": 0.05}[config.optimizer]
    state = shape.n_params * (4 + 4 + slots) / (n_devices if config.sharded else 1)
    layer = tokens * (34 * shape.n_embd * width / 2 + shape.n_head * shape.n_ctx * (4 + 2 * width))
    activations = layer if config.remat else layer * shape.n_layer
    logits = min(tokens, config.loss_chunk or tokens) * shape.n_vocab * 12
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
        f"gradients and slots, {activations / 1e9:.1f} GB for activations and {logits / 1e9:.1f} GB for logits on each "
        f"of {n_devices} device(s); try {', '.join(filter(None, advice))}"
    )


@contextlib.contextmanager
def _out_of_memory(config, shape, n_devices):
    """Turn what the backends raise when memory runs out into one sentence."""
    try:
        yield
    except Exception as error:
        text = str(error)
        if isinstance(error, MemoryError) or any(
            sign in text for sign in ("RESOURCE_EXHAUSTED", "OOM when allocating", "out of memory", "Out of memory")
        ):
            raise TrainingError(f"out of memory: {_memory(config, shape, n_devices)}") from error
        raise


def train(config: TrainConfig, restart: bool = False) -> dict:
    """Train a GPT-2 as `config` says, from its last checkpoint if there is one.

    Writes into `config.run_dir`: `train.json`, `checkpoints/`, `metrics.jsonl`; `incidents.jsonl` and `incidents/` (a
    state to inspect) for loss spikes and gradients that are not finite. A finished run is not trained again. After a
    kill, all later losses are those of an undisturbed run, bit for bit. SIGTERM and Ctrl-C save first.

    Raises Stopped when `max_minutes` are over; TrainingError on a non-finite gradient, naming the step, and when memory
    runs out; ConfigError if `run_dir` holds another run or the batch does not divide over the devices.

    Args:
        config: `TrainConfig`.
        restart: delete the run that `run_dir` holds first.

    Returns: `read_history(config.run_dir)`.
    """
    began = time.monotonic()
    host, n_hosts = device.hosts()
    corpus, run_dir = Corpus(config.corpus), Path(config.run_dir)
    shape = model_config(config, corpus)
    order = dict(batch_size=config.batch_size, n_ctx=shape.n_ctx, seed=config.seed)
    batches = Batches(corpus, **order, host=host, n_hosts=n_hosts)
    validation = validation_windows(corpus, shape.n_ctx, config.validation_windows)
    places = device.places(config.devices, config.sharded)
    n_devices = len(places) if isinstance(places, list) else places.num_replicas_in_sync
    with _out_of_memory(config, shape, n_devices):
        step = _build(config, shape, places)
    if restart and host == 0:
        _delete_run(run_dir)
    done, seconds = _resume(config, corpus, step, host)
    if done >= config.max_steps:
        return read_history(run_dir)
    batch_tokens = config.batch_size * shape.n_ctx
    if host == 0:
        run_dir.mkdir(parents=True, exist_ok=True)
        checkpoint.write_json(run_dir / "train.json", config.to_dict())
    main = host == 0
    metrics = _Lines(run_dir / "metrics.jsonl", done) if main else None
    incidents = _Lines(run_dir / "incidents.jsonl", done) if main else None
    board = _tensorboard(run_dir, done) if main and config.tensorboard else None
    bar = tqdm(
        total=config.max_steps,
        initial=done,
        unit="step",
        disable=not (config.progress and main),
        mininterval=1,
        dynamic_ncols=True,
    )
    spikes, flying, saved = _Spikes(config.spike_deviations), collections.deque(), done
    rows = config.batch_size // config.accumulate

    def write(line):
        if main:
            metrics.write(line)
        if board:
            for name, value in line.items():
                if name not in ("step", "tokens_seen", "seconds"):
                    board.add_scalar(name, value, line["step"])
            board.flush()

    def validate():
        result = total(window_losses(step.losses, validation, rows))
        if not math.isfinite(result.loss):
            raise TrainingError(f"the validation loss after step {done} is {result.loss}; lower the learning rate")
        write(
            {"step": done, "tokens_seen": done * batch_tokens, "validation_loss": result.loss,
             "validation_loss_se": result.standard_error, "seconds": round(seconds, 3)}
        )  # fmt: skip

    def save(folder="checkpoints", at=None, keep=config.keep_checkpoints, **more):
        info = {
            "config": config.to_dict(), "model": shape.to_dict(), "dtype": config.dtype, "seconds": seconds,
            "corpus": corpus.hash, "tokenizer": corpus.manifest["tokenizer"]["hash"],
            "provenance": {**provenance(), "device": device.describe()}, **more,
        }  # fmt: skip
        arrays = step.arrays()
        if main:
            checkpoint.save(run_dir / folder, done if at is None else at, arrays, info, keep)

    def report(at, what, state_at):
        """Note an incident of step `at`, with its batch and the state after `state_at` steps; returns the sentence."""
        everywhere = Batches(corpus, **order)  # the rows of all hosts
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
                sentence = report(failed + 1, f"the loss is {loss}, the norm of its gradient {norm}", failed)
                raise TrainingError(
                    f"{sentence}; lower the learning rate ({config.learning_rate}), lengthen the warm-up "
                    f"({config.warmup_steps} steps) or clip gradients; nothing was changed by this step"
                )
            if unusual := spikes.look(loss):
                warnings.warn(report(at, unusual, done), stacklevel=3)

    with contextlib.ExitStack() as stack:
        noted = stack.enter_context(_signals())
        stack.enter_context(bar)
        if main:
            stack.callback(metrics.file.close)
            stack.callback(incidents.file.close)
        if board:
            stack.callback(board.close)
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
            measures = step(tokens, done, due["log"])
            done += 1
            flying.append((done, measures))
            bar.update()
            settle(0 if any(due.values()) else 1)
            if any(due.values()):
                now = time.perf_counter()
                seconds += now - clock
                if due["log"]:
                    speed = (done - since) * batch_tokens / max(now - clock, 1e-9)
                    line = {
                        "step": done,
                        "tokens_seen": done * batch_tokens,
                        "learning_rate": step.learning_rate(done - 1),
                    }
                    line |= {name: float(value) for name, value in measures.items() if name != "failed"}
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
        else:
            return read_history(run_dir)
    if noted:  # again, now that it may do what it does: SIGTERM ends the process, Ctrl-C raises KeyboardInterrupt
        os.kill(os.getpid(), noted[0])
    raise Stopped(
        f"stopped after {(time.monotonic() - began) / 60:.1f} minutes at step {done} of {config.max_steps}, saved; to go "
        f"on: python -m gpt2lib.train {config.run_dir}, or run the same notebook or study again"
    )


def _some(documents) -> str:
    """A few of a batch's documents, for a sentence."""
    numbers = sorted({number for row in documents for number in row})
    return f"{', '.join(map(str, numbers[:8]))}{f' and {len(numbers) - 8} more' if len(numbers) > 8 else ''}"


def main(arguments=None) -> int:
    """The command line; see the top of this file. Exit status: 0 finished, 75 to be started again, 1 failed."""
    parser = argparse.ArgumentParser(
        prog="python -m gpt2lib.train", description="Start a training run, or go on with one."
    )
    parser.add_argument("run", help="a run's folder, or a .yaml or .json file with the fields of TrainConfig")
    parser.add_argument("--restart", action="store_true", help="delete what the run's folder holds first")
    parser.add_argument("--distributed", action="store_true", help="one of several hosts (JAX)")
    options = parser.parse_args(arguments)
    path = Path(options.run)
    path = path / "train.json" if path.is_dir() else path
    try:
        import yaml

        if not path.is_file():
            raise ConfigError(f"there is no {path}; give a run's folder or a file with the fields of TrainConfig")
        fields = yaml.safe_load(path.read_text())  # JSON is YAML
        if not isinstance(fields, dict):
            raise ConfigError(f"{path} holds no fields of TrainConfig")
        config = TrainConfig.from_dict(fields)
        print(device.setup(distributed=options.distributed))
        train(config, options.restart)
    except Stopped as stopped:
        print(stopped)
        return _STOPPED
    except (ConfigError, CorpusError, TrainingError, checkpoint.CheckpointError, yaml.YAMLError) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
