"""Configuration: frozen dataclasses, every default in one place, strict reading.

`ModelConfig` has OpenAI's field names (`hparams.json`); `TrainConfig` holds everything that decides a training run.
An unknown key or a wrong type raises `ConfigError` and names the nearest valid key.
"""

import dataclasses
import difflib
import types
import typing
from dataclasses import dataclass, field


class ConfigError(ValueError):
    """A configuration that cannot be used; the message says what, where and what to do."""


def _matches(value, annotation) -> bool:
    """True if `value` may be stored under the type `annotation` (int is a float; bool is not an int)."""
    if isinstance(annotation, types.UnionType):
        return any(_matches(value, option) for option in typing.get_args(annotation))
    origin = typing.get_origin(annotation) or annotation
    if origin is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if origin is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, origin)


def nearest(name: str, valid) -> str:
    """A hint that ends an error sentence: the nearest valid name, or all of them."""
    close = difflib.get_close_matches(name, valid, n=1)
    return f"did you mean `{close[0]}`?" if close else f"valid: {', '.join(sorted(valid))}."


class _Strict:
    """Type-checks the fields of a dataclass and reads it from a dict without guessing."""

    def __post_init__(self):
        hints = typing.get_type_hints(type(self))
        for f in dataclasses.fields(self):
            value = getattr(self, f.name)
            if not _matches(value, hints[f.name]):
                hint = getattr(hints[f.name], "__name__", hints[f.name])
                written = " (in YAML write 1.0e-4, not 1e-4)" if isinstance(value, str) and hint != "str" else ""
                what, kind = f"{type(self).__name__}.{f.name}", type(value).__name__
                raise ConfigError(f"{what} must be {hint}, got {value!r} of type {kind}{written}")

    @classmethod
    def from_dict(cls, values: dict):
        """Build from a dict; an unknown or a missing key is an error that names the nearest valid key."""
        fields = {f.name: f for f in dataclasses.fields(cls)}
        for key in values:
            if key not in fields:
                raise ConfigError(f"{cls.__name__} has no key `{key}`; {nearest(str(key), fields)}")
        for name, f in fields.items():
            required = f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
            if required and name not in values:
                raise ConfigError(f"{cls.__name__} needs the key `{name}`, which is missing")
        return cls(**values)

    def to_dict(self) -> dict:
        """The fields as a dict that JSON can hold and `from_dict` reads back."""
        return dataclasses.asdict(self)

    def replace(self, **changes):
        """A copy with some fields changed, checked like `from_dict`."""
        return type(self).from_dict({**self.to_dict(), **changes})


@dataclass(frozen=True)
class ModelConfig(_Strict):
    """The shape of a GPT-2 (OpenAI's `hparams.json`) and its three dropout rates."""

    n_vocab: int = 50257  # V, words of the vocabulary
    n_ctx: int = 1024  # longest context in tokens
    n_embd: int = 768  # D, width
    n_head: int = 12  # N, attention heads
    n_layer: int = 12  # L, blocks
    embd_pdrop: float = 0.1  # dropout on the summed embeddings, or where embd_pdrop_on says
    attn_pdrop: float = 0.1  # dropout on the attention weights
    resid_pdrop: float = 0.1  # dropout at the end of both residual branches
    embd_pdrop_on: str = "sum"  # sum | matrices: all of wte, as output matrix too, and wpe, as GPT-1 and 2019's

    def __post_init__(self):
        super().__post_init__()
        for name in ("n_vocab", "n_ctx", "n_embd", "n_head", "n_layer"):
            if getattr(self, name) < 1:
                raise ConfigError(f"ModelConfig.{name} must be at least 1, got {getattr(self, name)}")
        if self.n_embd % self.n_head:
            raise ConfigError(f"ModelConfig.n_embd ({self.n_embd}) must be a multiple of n_head ({self.n_head})")
        for name in ("embd_pdrop", "attn_pdrop", "resid_pdrop"):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(f"ModelConfig.{name} must lie in [0, 1), got {getattr(self, name)}")
        if self.embd_pdrop_on not in ("sum", "matrices"):
            raise ConfigError(f"ModelConfig.embd_pdrop_on must be sum or matrices, got {self.embd_pdrop_on}")

    @property
    def n_params(self) -> int:
        """Number of parameters; the output matrix is wte and counts once."""
        d, embedding = self.n_embd, self.n_vocab + self.n_ctx
        return embedding * d + self.n_layer * (12 * d * d + 13 * d) + 2 * d

    @property
    def hparams(self) -> dict:
        """The five keys of OpenAI's `hparams.json`."""
        return {name: getattr(self, name) for name in ("n_vocab", "n_ctx", "n_embd", "n_head", "n_layer")}


_OPENAI = {
    "117M": dict(n_embd=768, n_head=12, n_layer=12),
    "345M": dict(n_embd=1024, n_head=16, n_layer=24),
    "774M": dict(n_embd=1280, n_head=20, n_layer=36),
    "1.5B": dict(n_embd=1600, n_head=25, n_layer=48),
}
SIZES = {name: ModelConfig(**shape) for name, shape in _OPENAI.items()}
for _old, _counted in (("117M", "124M"), ("345M", "355M"), ("1.5B", "1558M")):  # OpenAI's first names were miscounts
    SIZES[_counted] = SIZES[_old]
SIZES["PrettyBig"] = ModelConfig(n_embd=1024, n_head=16, n_layer=25, embd_pdrop=0.0, attn_pdrop=0.0)  # 2019
SIZES["test"] = ModelConfig(n_vocab=257, n_ctx=19, n_embd=15, n_head=3, n_layer=2)  # no two dimensions equal


def size(name: str) -> ModelConfig:
    """The configuration of a size by its name; an unknown name is an error that names the nearest."""
    if name not in SIZES:
        raise ConfigError(f"there is no size `{name}`; {nearest(name, SIZES)}")
    return SIZES[name]


@dataclass(frozen=True)
class Reading(_Strict):
    """How the 2019 replication read its data, each of its ways by itself; see `gpt2lib.reading`."""

    restart_every: int | None = None  # steps after which reading begins again, in one order of the files
    hosts: int = 1  # parts of a batch that are read alike: each host read all files in the same order
    buffer: int | None = None  # documents among which the next one is drawn, the files being read in order
    stitch: int | None = None  # documents that are joined and of which one window is cut at random
    long_share: float = 0.0  # share of the windows that are from long documents only, 2 of which are joined
    long_tokens: int = 512  # tokens of those at least
    mixed: bool = False  # the order of the files is a random one, the same in every run, instead of the corpus's

    def __post_init__(self):
        super().__post_init__()
        for name in ("restart_every", "hosts", "buffer", "stitch", "long_tokens"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ConfigError(f"Reading.{name} must be at least 1, got {getattr(self, name)}")
        if not 0 <= self.long_share <= 1:
            raise ConfigError(f"Reading.long_share must lie in [0, 1], got {self.long_share}")


@dataclass(frozen=True)
class TrainConfig(_Strict):
    """Everything that decides a training run. Two runs with equal configurations on one machine are equal."""

    corpus: str  # folder of token shards (has manifest.json), or its fsspec address, such as gs://bucket/corpus
    run_dir: str  # folder of this run: checkpoints, metrics.jsonl
    size: str | None = None  # a name in SIZES; None: 117M, or the shape of init_from
    model: dict = field(default_factory=dict)  # ModelConfig fields that differ from that size; n_vocab: the corpus's
    init: str = "gpt2"  # a name in model.INITS
    init_from: str | None = None  # start from this checkpoint: a folder of OpenAI's or Hugging Face's layout, or a run
    freeze: list = field(default_factory=list)  # parts of paths not to train: wte, wpe, ln_f, h0, h1/mlp, ...
    reading: dict = field(default_factory=dict)  # fields of Reading; empty: every window once in an epoch, shuffled
    optimizer: str = "adafactor"  # adafactor | adamw
    optimizer_options: dict = field(default_factory=dict)  # passed to the optimizer's constructor
    learning_rate: float | None = 1e-2  # relative for Adafactor with parameter scale, else absolute; None: its default
    schedule: str = "cosine"  # after the warm-up: cosine (to 0 at max_steps) | constant
    warmup_steps: int = 100
    max_steps: int = 1000  # the run ends here
    weight_decay: float | None = None  # decoupled, times the learning rate, on every variable
    clip_norm: float | None = None  # clip gradients to this global norm
    batch_size: int = 8  # sequences of n_ctx tokens in a step, over all devices and hosts
    accumulate: int = 1  # parts that a batch is computed in, one after another: less memory, the same gradient
    remat: bool = False  # compute blocks again for their gradients instead of keeping what they computed
    loss_chunk: int | None = None  # hold the logits of about so many tokens at once; None: of all
    sharded: bool = False  # cut parameters and optimizer state over the devices (JAX) instead of copying them
    devices: int | None = None  # of this machine to use; None: all
    dtype: str = "float32"  # Keras dtype policy: float32 | mixed_bfloat16 | bfloat16 (parameters too; adafactor)
    seed: int = 0  # initial parameters, order of the data, dropout
    log_every: int = 10  # steps between lines of metrics.jsonl
    validate_every: int = 100  # steps between validations; also after the last step
    validation_windows: int = 64  # windows of n_ctx tokens, the same ones every time
    checkpoint_every: int = 500  # steps between checkpoints; also after the last step
    keep_checkpoints: int = 2
    copy_to: str | None = None  # folder (a mounted Drive) or address (gs://bucket/run) for copies of checkpoints
    max_minutes: float | None = None  # stop, saved, after so long in this process; to be started again
    spike_deviations: float | None = 6.0  # report a loss so many standard deviations above those before; None: never
    measure_layers: bool = False  # in metrics.jsonl RMS of update and parameters of each block too; slow when large
    tensorboard: bool = False  # write run_dir/tensorboard as well
    progress: bool = True  # show a progress bar
    allow_changes: list = field(default_factory=list)  # fields in which a run that goes on may differ from before

    def __post_init__(self):
        super().__post_init__()
        for name in (
            "max_steps", "batch_size", "accumulate", "loss_chunk", "devices", "log_every", "validate_every",
            "checkpoint_every", "keep_checkpoints",
        ):  # fmt: skip
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"TrainConfig.{name} must be at least 1, got {value}")
        if self.validation_windows < 2:
            few = self.validation_windows
            raise ConfigError(f"TrainConfig.validation_windows must be at least 2, for a standard error, got {few}")
        for name in ("max_minutes", "spike_deviations", "clip_norm"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ConfigError(f"TrainConfig.{name} must be above 0, got {value}")
        if not 0 <= self.warmup_steps < self.max_steps:
            raise ConfigError(
                f"TrainConfig.warmup_steps must lie in [0, max_steps), got {self.warmup_steps} of {self.max_steps}"
            )
        if not 0 <= self.seed < 2**31:
            raise ConfigError(f"TrainConfig.seed must lie in [0, 2**31), got {self.seed}")
        choices = {
            "optimizer": ("adafactor", "adamw"),
            "dtype": ("float32", "mixed_bfloat16", "bfloat16"),
            "schedule": ("cosine", "constant"),
        }
        for name, valid in choices.items():
            if getattr(self, name) not in valid:
                raise ConfigError(
                    f"TrainConfig.{name} cannot be `{getattr(self, name)}`; {nearest(getattr(self, name), valid)}"
                )
        if self.learning_rate is None and self.optimizer != "adafactor":
            raise ConfigError("TrainConfig.learning_rate may be null for adafactor only; give adamw a number")
        if self.batch_size % self.accumulate:
            raise ConfigError(
                f"TrainConfig.batch_size ({self.batch_size}) must be a multiple of accumulate ({self.accumulate})"
            )
        fields = {f.name for f in dataclasses.fields(self)}
        for name in self.allow_changes:
            if name not in fields:
                raise ConfigError(
                    f"TrainConfig.allow_changes: there is no field `{name}`; {nearest(str(name), fields)}"
                )
        for part in self.freeze:
            if not isinstance(part, str):
                raise ConfigError(f"TrainConfig.freeze holds parts of paths such as wte or h0, got {part!r}")
        Reading.from_dict(self.reading)
        self.model_config()  # a misspelt field of `model` is an error now, not when the run starts

    def model_config(self, n_vocab: int | None = None) -> ModelConfig:
        """The model's configuration; `n_vocab` is the vocabulary of the corpus, used unless `model` names one.

        That of a run with `init_from` is decided by that checkpoint: `train.model_config`.
        """
        base = size(self.size or "117M")
        return base.replace(**{"n_vocab": n_vocab or base.n_vocab, **self.model})

    @property
    def batch_tokens(self) -> int:
        """Tokens that one step learns from."""
        return self.batch_size * self.model_config().n_ctx
