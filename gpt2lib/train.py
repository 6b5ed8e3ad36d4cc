"""Training: one straight function, `train(config)`, and the compiled step under it."""

import inspect
import json
import math
import os
import shutil
import time
from pathlib import Path

import keras
from keras import ops
from tqdm import tqdm

from gpt2lib import checkpoint
from gpt2lib.adafactor import Adafactor
from gpt2lib.config import ConfigError, TrainConfig, nearest
from gpt2lib.data import Batches, Corpus, validation_windows
from gpt2lib.device import describe
from gpt2lib.evaluate.loss import loss_function, total, window_losses
from gpt2lib.model import GPT2, nll
from gpt2lib.report import provenance
from gpt2lib.schedule import WarmupCosine

# A run goes on under another value of these; a change of any other would make it another run.
_FREE = {"corpus", "run_dir", "log_every", "validate_every", "checkpoint_every", "keep_checkpoints", "progress"}
_ANEW = "name another folder for this run, or delete that one with restart=True (a study: `restart: true`, or --force)"


class TrainingError(RuntimeError):
    """A run that cannot go on; the message says at which step and why."""


def make_optimizer(config: TrainConfig):
    """The optimizer of a run, with its schedule: warm-up and cosine, or Adafactor's default when the rate is None."""
    rate = config.learning_rate
    if rate is not None:
        rate = WarmupCosine(rate, config.warmup_steps, config.max_steps)
    make = {"adafactor": Adafactor, "adamw": keras.optimizers.AdamW}[config.optimizer]
    valid = set(inspect.signature(make.__init__).parameters) - {
        "self",
        "kwargs",
        "name",
        "learning_rate",
        "weight_decay",
    }
    for option in config.optimizer_options:
        if option not in valid:
            raise ConfigError(f"{config.optimizer} has no option `{option}`; {nearest(option, valid)}")
    decay = {"weight_decay": config.weight_decay}
    if config.optimizer == "adamw" and config.weight_decay is None:
        decay = {"weight_decay": 0.0}  # Keras' default would decay
    try:
        return make(rate, name=config.optimizer, **decay, global_clipnorm=config.clip_norm, **config.optimizer_options)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{config.optimizer} does not accept {config.optimizer_options}: {error}") from error


def _sum_of_squares(arrays):
    return sum(ops.sum(ops.square(ops.cast(a, "float32"))) for a in arrays)


def _measures(loss, gradients, before, after):
    """What a line of metrics says of one step, as float32 scalars."""
    n = sum(math.prod(a.shape) for a in after)
    return {
        "loss": loss,
        "gradient_norm": ops.sqrt(_sum_of_squares(gradients)),  # before clipping
        "update_rms": ops.sqrt(_sum_of_squares([new - old for new, old in zip(after, before, strict=True)]) / n),
        "parameter_rms": ops.sqrt(_sum_of_squares(after) / n),
    }


def mean_loss(model, tokens):
    """Mean nats per token of tokens [B, T + 1], with dropout."""
    return ops.mean(nll(model(tokens[:, :-1], training=True), tokens[:, 1:]))


def jax_step(model, optimizer):
    """The train step, pure: (trainable, other, slots, tokens [B, T + 1]) -> (trainable, other, slots, measures).

    `trainable`, `other` are the values of the model's variables, `slots` those of the optimizer's.
    """
    import jax

    def loss_of(trainable, other, tokens):
        mapping = [*zip(model.trainable_variables, trainable, strict=True)]
        mapping += [*zip(model.non_trainable_variables, other, strict=True)]
        with keras.StatelessScope(state_mapping=mapping) as scope:
            loss = mean_loss(model, tokens)
        return loss, [scope.get_current_value(v) for v in model.non_trainable_variables]

    def step(trainable, other, slots, tokens):
        (loss, other), gradients = jax.value_and_grad(loss_of, has_aux=True)(trainable, other, tokens)
        updated, slots = optimizer.stateless_apply(slots, gradients, trainable)
        return updated, other, slots, _measures(loss, gradients, trainable, updated)

    return step


class TrainStep:
    """`step(tokens [B, T + 1]) -> measures`, compiled for the backend in use; it changes the model and the optimizer.

    Under JAX the state lives here between steps; `sync()` writes it back into the variables.
    """

    def __init__(self, model, optimizer):
        self.model, self.optimizer = model, optimizer
        if keras.backend.backend() == "jax":
            import jax

            self.step = jax.jit(jax_step(model, optimizer), donate_argnums=(0, 1, 2))
            groups = (model.trainable_variables, model.non_trainable_variables, optimizer.variables)
            self.groups = groups
            # Copies: the first step donates its arguments, and a variable's value may be in use elsewhere.
            self.state = [[v.value.copy() for v in group] for group in groups]
        else:
            import tensorflow as tf

            def step(tokens):
                with tf.GradientTape() as tape:
                    loss = mean_loss(model, tokens)
                gradients = tape.gradient(loss, [v.value for v in model.trainable_variables])
                before = [tf.identity(v.value) for v in model.trainable_variables]
                optimizer.apply(gradients, model.trainable_variables)
                return _measures(loss, gradients, before, [v.value for v in model.trainable_variables])

            self.step = tf.function(step, autograph=False)
            self.state = None

    def __call__(self, tokens):
        tokens = ops.convert_to_tensor(tokens, "int32")
        if self.state is None:
            return self.step(tokens)
        *self.state, measures = self.step(*self.state, tokens)
        return measures

    def sync(self):
        """Make the variables of the model and the optimizer hold the state after the last step."""
        if self.state is not None:
            for group, values in zip(self.groups, self.state, strict=True):
                for variable, value in zip(group, values, strict=True):
                    variable.assign(value.copy())


class _MetricsFile:
    """`metrics.jsonl`: one JSON object a line; lines after the step that a run resumes from are dropped."""

    def __init__(self, path, step):
        kept = [line for line in read_metrics(path) if line["step"] <= step] if step else []
        part = path.with_suffix(".part")
        part.write_text("".join(json.dumps(line) + "\n" for line in kept))
        os.replace(part, path)
        self.file = open(path, "a")

    def write(self, line: dict):
        try:
            self.file.write(json.dumps(line) + "\n")
            self.file.flush()
        except OSError as error:
            raise TrainingError(
                f"could not write {self.file.name}: {error.strerror}; free some space and start again, "
                "the run goes on from its last checkpoint"
            ) from error


def read_metrics(path) -> list[dict]:
    """The lines of a `metrics.jsonl`; a last line cut off by a kill is left out."""
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


def _resume(config, corpus, model, optimizer) -> tuple[int, float]:
    """Restore the newest intact checkpoint into model and optimizer: (step, seconds trained); (0, 0.0) without one."""
    found = checkpoint.read(Path(config.run_dir) / "checkpoints")
    if found is None:
        return 0, 0.0
    arrays, info = found
    ours = json.loads(json.dumps(config.to_dict()))
    for name in sorted(ours.keys() - _FREE):
        if info["config"].get(name) != ours[name]:
            raise ConfigError(
                f"{config.run_dir} holds a run with {name}={info['config'].get(name)!r}, not {ours[name]!r}; {_ANEW}"
            )
    if info["corpus"] != corpus.hash:
        raise ConfigError(f"{config.run_dir} was trained on another corpus than {config.corpus} is now; {_ANEW}")
    if info["step"] >= config.max_steps:
        return info["step"], info["seconds"]
    checkpoint.assign([*model.variables, *optimizer.variables], arrays, f"{config.run_dir}, step {info['step']}")
    return info["step"], info["seconds"]


def _delete_run(run_dir) -> None:
    """Delete what a run has written, and nothing else."""
    shutil.rmtree(run_dir / "checkpoints", ignore_errors=True)
    (run_dir / "metrics.jsonl").unlink(missing_ok=True)


def train(config: TrainConfig, restart: bool = False) -> dict:
    """Train a GPT-2 as `config` says, from its last checkpoint if there is one.

    Writes `checkpoints/` and `metrics.jsonl` into `config.run_dir`. A finished run is not trained again.
    Raises TrainingError on a non-finite loss, naming the step; ConfigError if `run_dir` holds another run.

    Args:
        config: `TrainConfig`.
        restart: delete the run that `run_dir` holds first.

    Returns: `read_history(config.run_dir)`.
    """
    corpus, run_dir = Corpus(config.corpus), Path(config.run_dir)
    shape = config.model_config(corpus.n_vocab)
    if shape.n_vocab < corpus.n_vocab:
        raise ConfigError(f"model.n_vocab is {shape.n_vocab}, but {config.corpus} has {corpus.n_vocab} words")
    batches = Batches(corpus, batch_size=config.batch_size, n_ctx=shape.n_ctx, seed=config.seed)
    validation = validation_windows(corpus, shape.n_ctx, config.validation_windows)
    model = GPT2(shape, init=config.init, seed=config.seed, dtype=config.dtype)
    optimizer = make_optimizer(config)
    optimizer.build(model.trainable_variables)
    if restart:
        _delete_run(run_dir)
    done, seconds = _resume(config, corpus, model, optimizer)
    if done >= config.max_steps:
        return read_history(run_dir)
    run_dir.mkdir(parents=True, exist_ok=True)
    step, validation_losses = TrainStep(model, optimizer), loss_function(model)
    metrics = _MetricsFile(run_dir / "metrics.jsonl", done)
    bar = tqdm(
        total=config.max_steps,
        initial=done,
        unit="step",
        disable=not config.progress,
        mininterval=1,
        dynamic_ncols=True,
    )

    def validate():
        step.sync()
        result = total(window_losses(validation_losses, validation, config.batch_size))
        check_finite([result.loss], done, "validation loss")
        metrics.write(
            {"step": done, "tokens_seen": done * config.batch_tokens, "validation_loss": result.loss,
             "validation_loss_se": result.standard_error, "seconds": round(seconds, 3)}
        )  # fmt: skip

    def save():
        step.sync()
        info = {
            "config": config.to_dict(), "model": shape.to_dict(), "dtype": config.dtype, "seconds": seconds,
            "corpus": corpus.hash, "tokenizer": corpus.manifest["tokenizer"]["hash"],
            "provenance": {**provenance(), "device": describe()},
        }  # fmt: skip
        checkpoint.save(run_dir / "checkpoints", done, checkpoint.state_arrays(model, optimizer), info,
                        config.keep_checkpoints)  # fmt: skip

    def check_finite(losses, at, what="loss"):
        for i, loss in enumerate(losses):
            if not math.isfinite(loss):
                raise TrainingError(
                    f"the {what} of step {at - len(losses) + i + 1} is {loss}; lower the learning rate "
                    f"({config.learning_rate}) or lengthen the warm-up ({config.warmup_steps} steps); "
                    f"the checkpoints in {run_dir} are from before"
                )

    with bar, metrics.file:
        if not done:
            validate()
        unread = []  # losses are read in groups, so that no step waits for the one before
        since, clock = done, time.perf_counter()
        while done < config.max_steps:
            measures = step(batches[done])
            unread.append(measures["loss"])
            done += 1
            bar.update()
            last = done == config.max_steps
            due = {
                "log": last or done % config.log_every == 0,
                "validate": last or done % config.validate_every == 0,
                "save": last or done % config.checkpoint_every == 0,
            }
            if not any(due.values()):
                continue
            losses, unread = [float(loss) for loss in unread], []
            now = time.perf_counter()
            check_finite(losses, done)
            check_finite([float(measures["parameter_rms"])], done, "size of the parameters")
            seconds += now - clock
            if due["log"]:
                speed = (done - since) * config.batch_tokens / max(now - clock, 1e-9)
                rate = float(optimizer._learning_rate(done - 1))
                line = {"step": done, "tokens_seen": done * config.batch_tokens, "learning_rate": rate}
                line |= {name: float(value) for name, value in measures.items()}
                metrics.write({**line, "tokens_per_second": round(speed, 1), "seconds": round(seconds, 3)})
                bar.set_postfix_str(f"loss {line['loss']:.3f}, {speed:,.0f} tokens/s", refresh=False)
            if due["validate"]:
                validate()
            if due["save"]:
                save()
            since, clock = done, time.perf_counter()
    return read_history(run_dir)
