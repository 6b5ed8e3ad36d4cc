"""Configuration: strict reading, sizes, and every error a sentence that says what and where."""

import dataclasses
import json

import pytest

from gpt2lib.config import SIZES, ConfigError, ModelConfig, TrainConfig, size

pytestmark = pytest.mark.backend_free

RUN = {"corpus": "data/corpus", "run_dir": "data/run"}


def n_params(v, c, d, n_layer):
    """Counted variable by variable, from the shapes of OpenAI's `model.py`."""
    norm = 2 * d
    attention = d * 3 * d + 3 * d + d * d + d
    mlp = d * 4 * d + 4 * d + 4 * d * d + d
    return v * d + c * d + n_layer * (norm + attention + norm + mlp) + norm


@pytest.mark.parametrize(
    "names, count, shape",
    [
        (("117M", "124M"), 124_439_808, (768, 12, 12)),
        (("345M", "355M"), 354_823_168, (1024, 16, 24)),
        (("774M",), 774_030_080, (1280, 20, 36)),
        (("1.5B", "1558M"), 1_557_611_200, (1600, 25, 48)),
        (("PrettyBig",), 367_419_392, (1024, 16, 25)),
    ],
)
def test_sizes(names, count, shape):
    for name in names:
        config = SIZES[name]
        assert (config.n_embd, config.n_head, config.n_layer) == shape
        assert (config.n_vocab, config.n_ctx) == (50257, 1024)
        assert config.n_params == count == n_params(50257, 1024, shape[0], shape[2])
        assert size(name) == config
    pretty = "PrettyBig" in names
    rates = (SIZES[names[0]].embd_pdrop, SIZES[names[0]].attn_pdrop, SIZES[names[0]].resid_pdrop)
    assert rates == ((0.0, 0.0, 0.1) if pretty else (0.1, 0.1, 0.1))


def test_the_test_size_has_no_two_equal_dimensions():
    c = SIZES["test"]
    dimensions = [c.n_vocab, c.n_ctx, c.n_embd, c.n_head, c.n_layer, c.n_embd // c.n_head, 3 * c.n_embd, 4 * c.n_embd]
    assert len(set(dimensions)) == len(dimensions)
    assert c.n_params < 100_000


def test_unknown_size_names_the_nearest():
    with pytest.raises(ConfigError, match=r"`345m`.*`345M`"):
        size("345m")
    with pytest.raises(ConfigError, match=r"`1.5b`.*`1.5B`"):
        TrainConfig(**RUN, size="1.5b")


@pytest.mark.parametrize(
    "cls, values, said",
    [
        (ModelConfig, {"n_embed": 8}, ("n_embed", "n_embd")),
        (ModelConfig, {"n_layers": 8}, ("n_layers", "n_layer")),
        (ModelConfig, {"attn_dropout": 0.0}, ("attn_dropout", "attn_pdrop")),
        (TrainConfig, RUN | {"learning_rte": 1e-3}, ("learning_rte", "learning_rate")),
        (TrainConfig, RUN | {"batchsize": 4}, ("batchsize", "batch_size")),
        (TrainConfig, RUN | {"warmup": 4}, ("warmup", "warmup_steps")),
        (TrainConfig, RUN | {"model": {"n_heads": 4}}, ("n_heads", "n_head")),
    ],
)
def test_a_misspelt_key_names_the_nearest(cls, values, said):
    with pytest.raises(ConfigError) as error:
        cls.from_dict(values)
    for name in said:
        assert f"`{name}`" in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "values",
    [
        {"learning_rate": "1e-4"},
        {"learning_rate": True},
        {"batch_size": True},
        {"batch_size": 8.0},
        {"batch_size": "8"},
        {"batch_size": None},
        {"max_steps": 1e3},
        {"seed": None},
        {"size": 117},
        {"corpus": None},
        {"progress": 1},
        {"optimizer_options": [1]},
        {"model": "test"},
        {"model": {"n_layer": 2.0}},
        {"model": {"embd_pdrop": "0.1"}},
    ],
    ids=str,
)
def test_a_wrong_type_names_the_field(values):
    with pytest.raises(ConfigError) as error:
        TrainConfig.from_dict(RUN | values)
    (name, value), *_ = values.items()
    if isinstance(value, dict):
        ((name, value),) = value.items()
    assert name in str(error.value) and repr(value) in str(error.value)
    assert type(value).__name__ in str(error.value)


def test_a_number_that_yaml_reads_as_text_says_how_to_write_it():
    with pytest.raises(ConfigError, match=r"learning_rate.*'1e-4'.*1\.0e-4"):
        TrainConfig(**RUN, learning_rate="1e-4")


def test_an_int_is_a_float_and_null_is_allowed_where_it_means_something():
    config = TrainConfig(**RUN, learning_rate=1, clip_norm=None, weight_decay=0)
    assert config.learning_rate == 1
    assert TrainConfig(**RUN, learning_rate=None).learning_rate is None


def test_a_missing_key_is_named():
    with pytest.raises(ConfigError, match=r"`run_dir`"):
        TrainConfig.from_dict({"corpus": "x"})


@pytest.mark.parametrize(
    "values, said",
    [
        ({"n_embd": 10, "n_head": 3}, ("n_embd", "10", "n_head", "3")),
        ({"n_layer": 0}, ("n_layer", "0")),
        ({"n_vocab": -1}, ("n_vocab", "-1")),
        ({"attn_pdrop": 1.0}, ("attn_pdrop", "1.0")),
        ({"embd_pdrop": -0.1}, ("embd_pdrop", "-0.1")),
        ({"resid_pdrop": float("nan")}, ("resid_pdrop", "nan")),
    ],
    ids=str,
)
def test_model_values_out_of_range(values, said):
    with pytest.raises(ConfigError) as error:
        ModelConfig(**values)
    assert all(word in str(error.value) for word in said)


@pytest.mark.parametrize(
    "values, said",
    [
        ({"batch_size": 0}, ("batch_size", "0")),
        ({"max_steps": 0, "warmup_steps": 0}, ("max_steps", "0")),
        ({"log_every": 0}, ("log_every", "0")),
        ({"keep_checkpoints": 0}, ("keep_checkpoints", "0")),
        ({"checkpoint_every": -5}, ("checkpoint_every", "-5")),
        ({"warmup_steps": 1000, "max_steps": 1000}, ("warmup_steps", "1000")),
        ({"warmup_steps": -1}, ("warmup_steps", "-1")),
        ({"optimizer": "adafacto"}, ("adafacto", "adafactor")),
        ({"optimizer": "adam"}, ("`adam`", "`adamw`")),
        ({"dtype": "float16"}, ("float16", "bfloat16")),
        ({"batch_size": 8, "accumulate": 3}, ("batch_size", "8", "accumulate", "3")),
        ({"validation_windows": 1}, ("validation_windows", "2", "1")),
        ({"loss_chunk": 0}, ("loss_chunk", "0")),
        ({"max_minutes": 0.0}, ("max_minutes", "0")),
        ({"schedule": "cosin"}, ("cosin", "cosine")),
        ({"allow_changes": ["batchsize"]}, ("batchsize", "batch_size")),
        ({"freeze": [3]}, ("freeze", "3")),
        ({"optimizer": "adamw", "learning_rate": None}, ("learning_rate", "adamw")),
    ],
    ids=str,
)
def test_train_values_out_of_range(values, said):
    with pytest.raises(ConfigError) as error:
        TrainConfig(**RUN, **values)
    assert all(word in str(error.value) for word in said)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", SIZES)
def test_model_round_trip(name):
    config = SIZES[name]
    assert ModelConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert list(config.hparams) == ["n_vocab", "n_ctx", "n_embd", "n_head", "n_layer"]  # as in hparams.json
    assert ModelConfig.from_dict(config.hparams).hparams == config.hparams


def test_train_round_trip():
    config = TrainConfig(
        **RUN, size="test", model={"n_layer": 3, "resid_pdrop": 0.0}, optimizer="adamw", clip_norm=1.0,
        optimizer_options={"beta_2": 0.95}, learning_rate=3e-4, weight_decay=0.1, dtype="mixed_bfloat16", seed=7,
    )  # fmt: skip
    again = TrainConfig.from_dict(json.loads(json.dumps(config.to_dict())))
    assert again == config
    assert again.replace(seed=8) != config
    assert again.replace(seed=8).replace(seed=7) == config
    with pytest.raises(ConfigError, match=r"`sed`.*`seed`"):
        config.replace(sed=8)


def test_configurations_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        SIZES["test"].n_embd = 30


def test_the_vocabulary_is_the_corpus_unless_the_configuration_names_one():
    config = TrainConfig(**RUN, size="test", model={"n_layer": 1})
    assert config.model_config(101).n_vocab == 101
    assert config.model_config(101).n_layer == 1
    assert config.model_config().n_vocab == 257
    assert config.replace(model={"n_vocab": 300}).model_config(101).n_vocab == 300
    assert config.batch_tokens == 8 * 19
