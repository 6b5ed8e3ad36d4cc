"""Hugging Face's layout both ways, held against what transformers wrote and computed; choosing among the layouts."""

import errno
import json
import os
import re
import shutil
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from conftest import relative_error
from literal import distinctive
from safetensors.numpy import load_file, save_file
from test_checkpoint import arrays_of, assert_same_bits, python, sentence, without

from gpt2lib import checkpoint
from gpt2lib.checkpoint import (
    CheckpointError,
    load_huggingface,
    load_openai,
    load_pretrained,
    save_huggingface,
    tokenizer_hash,
)
from gpt2lib.config import SIZES, ModelConfig
from gpt2lib.model import GPT2
from gpt2lib.tokenizer import Tokenizer, TokenizerError

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


@pytest.fixture
def copy(golden, tmp_path) -> Path:
    return shutil.copytree(golden / "huggingface" / "model", tmp_path / "model")


@pytest.fixture(scope="module")
def tokenizer(golden) -> Tokenizer:
    folder = golden / "huggingface" / "model"
    return Tokenizer.from_files(folder / "merges.txt", folder / "vocab.json")


def change_config(folder, **fields):
    """Set fields of config.json; `None` as a string, "absent", removes one."""
    document = json.loads((folder / "config.json").read_text()) | fields
    kept = {name: value for name, value in document.items() if value != "absent"}
    (folder / "config.json").write_text(json.dumps(kept))


def change_tensors(folder, change):
    """Write the weights again after `change(arrays) -> arrays`."""
    arrays = change(load_file(folder / WEIGHTS))
    save_file({name: np.ascontiguousarray(array) for name, array in arrays.items()}, folder / WEIGHTS)


def files_of(folder) -> dict:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# --- reading ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["model", "sharded"])
def test_logits_are_those_of_transformers(golden, name):
    model = load_huggingface(golden / "huggingface" / name)
    assert model.config == ModelConfig(311, 19, 15, 3, 2, embd_pdrop=0.0, attn_pdrop=0.15, resid_pdrop=0.05)
    recorded = np.load(golden / "huggingface" / "golden.npz")
    logits = np.asarray(model(recorded["tokens"]))
    assert np.abs(recorded["logits"]).max() > 1, "they are of a size at which 1e-5 says something"
    np.testing.assert_allclose(logits, recorded["logits"], rtol=0, atol=1e-5)
    assert relative_error(logits, recorded["logits"]) < 1e-5


def test_names_of_variables(golden):
    """Every tensor arrives under its name, none twice and none transposed."""
    there = load_file(golden / "huggingface" / "model" / WEIGHTS)
    here = arrays_of(load_huggingface(golden / "huggingface" / "model"))
    assert_same_bits({f"transformer.{checkpoint.huggingface_name(path)}": value for path, value in here.items()}, there)
    assert_same_bits(here, arrays_of(load_huggingface(golden / "huggingface" / "sharded")))
    assert checkpoint.huggingface_name("model/h10/attn/c_attn/w") == "h.10.attn.c_attn.weight"
    assert checkpoint.huggingface_name("model/h0/ln_1/b") == "h.0.ln_1.bias"


def test_as_the_release_has_it(copy, golden):
    """openai-community/gpt2: no prefix, the causal mask beside the weights, an older config.json."""

    def release(arrays):
        arrays = {name.removeprefix("transformer."): array for name, array in arrays.items()}
        mask = {f"h.{i}.attn.bias": np.tril(np.ones((1, 1, 19, 19), np.float32)) for i in range(2)}
        return arrays | mask | {f"h.{i}.attn.masked_bias": np.array(-1e4, np.float32) for i in range(2)}

    change_tensors(copy, release)
    absent = ("n_inner", "scale_attn_weights", "tie_word_embeddings", "add_cross_attention", "dtype", "n_positions")
    change_config(copy, **dict.fromkeys(absent, "absent"), n_ctx=19, task_specific_params={"text-generation": {}})
    assert_same_bits(arrays_of(load_huggingface(copy)), arrays_of(load_huggingface(golden / "huggingface" / "model")))


def test_an_output_matrix_that_is_wte_again(copy, golden):
    change_tensors(copy, lambda arrays: arrays | {"lm_head.weight": arrays["transformer.wte.weight"]})
    assert_same_bits(arrays_of(load_huggingface(copy)), arrays_of(load_huggingface(golden / "huggingface" / "model")))


def test_an_output_matrix_of_its_own_is_refused(copy):
    change_tensors(copy, lambda arrays: arrays | {"lm_head.weight": arrays["transformer.wte.weight"] * 2})
    with pytest.raises(CheckpointError, match=r"`lm_head\.weight` .* differs from `transformer\.wte\.weight`") as error:
        load_huggingface(copy)
    assert str(copy) in sentence(error)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16], ids=["float16", "bfloat16"])
def test_half_precision_is_read_as_float32(copy, golden, dtype):
    change_tensors(copy, lambda arrays: {name: array.astype(dtype) for name, array in arrays.items()})
    exact = arrays_of(load_huggingface(golden / "huggingface" / "model"))
    rounded = {name: array.astype(dtype).astype(np.float32) for name, array in exact.items()}
    assert_same_bits(arrays_of(load_huggingface(copy)), rounded)


def test_dtype_is_the_policy_of_the_model(copy, golden):
    model = load_huggingface(copy, dtype="mixed_bfloat16")
    assert model.compute_dtype == "bfloat16"
    assert_same_bits(arrays_of(model), arrays_of(load_huggingface(golden / "huggingface" / "model")))


# --- what is refused --------------------------------------------------------------------------------------------------

TENSORS = {
    "missing": (lambda a: {n: v for n, v in a.items() if n != "transformer.h.1.ln_2.weight"},
                r"no tensor `transformer\.h\.1\.ln_2\.weight`"),
    "transposed": (lambda a: a | {"transformer.h.0.attn.c_attn.weight": a["transformer.h.0.attn.c_attn.weight"].T},
                   r"`transformer\.h\.0\.attn\.c_attn\.weight`.*\[45, 15\].*\[15, 45\]"),
    "a head": (lambda a: a | {"score.weight": np.zeros((2, 15), np.float32)}, r"`score\.weight`"),
    "a layer more": (lambda a: a | {"transformer.h.2.ln_1.bias": np.zeros(15, np.float32)}, r"`transformer\.h\.2\."),
    "integers": (lambda a: a | {"transformer.ln_f.bias": np.zeros(15, np.int8)}, r"`transformer\.ln_f\.bias`.* I8"),
}  # fmt: skip


@pytest.mark.parametrize("case", TENSORS)
def test_a_wrong_tensor_is_named(copy, case):
    change, message = TENSORS[case]
    change_tensors(copy, change)
    with pytest.raises(CheckpointError, match=message) as error:
        load_huggingface(copy)
    assert str(copy) in sentence(error)


@pytest.mark.parametrize(
    "field, value",
    [
        ("model_type", "bert"), ("architectures", ["GPT2ForSequenceClassification"]), ("activation_function", "gelu"),
        ("activation_function", "relu"), ("layer_norm_epsilon", 1e-6), ("n_inner", 30), ("scale_attn_weights", False),
        ("scale_attn_by_inverse_layer_idx", True), ("reorder_and_upcast_attn", True), ("add_cross_attention", True),
        ("tie_word_embeddings", False), ("is_causal", False), ("quantization_config", {"load_in_8bit": True}),
    ],
    ids=str,
)  # fmt: skip
def test_what_this_model_does_not_compute_is_refused(copy, field, value):
    change_config(copy, **{field: value})
    shown = json.dumps(value[0] if isinstance(value, list) else value)
    with pytest.raises(CheckpointError, match=re.escape(f"{field}={shown}")) as error:
        load_huggingface(copy)
    assert str(copy / "config.json") in sentence(error)


@pytest.mark.parametrize("fields", [{"n_inner": 60}, {"activation_function": "gelu_fast"}, {"architectures": None},
                                    {"architectures": ["GPT2Model"]}, {"summary_type": "mean"}], ids=str)  # fmt: skip
def test_what_is_the_same_model_is_not(copy, golden, fields):
    change_config(copy, **fields)
    assert_same_bits(arrays_of(load_huggingface(copy)), arrays_of(load_huggingface(golden / "huggingface" / "model")))


@pytest.mark.parametrize("field", ["vocab_size", "n_positions", "n_embd", "n_head", "n_layer"])
def test_a_field_that_is_missing_is_named(copy, field):
    change_config(copy, **{field: "absent"})
    with pytest.raises(CheckpointError, match=f"config.json has no `{field}`") as error:
        load_huggingface(copy)
    sentence(error)


@pytest.mark.parametrize("fields", [{"n_layer": "2"}, {"n_head": 4}, {"n_embd": 0}, {"attn_pdrop": 1.5}], ids=str)
def test_numbers_that_are_no_model(copy, fields):
    change_config(copy, **fields)
    with pytest.raises(CheckpointError, match=f"config.json.*{next(iter(fields))}") as error:
        load_huggingface(copy)
    sentence(error)


@pytest.mark.parametrize("fields", [{"n_layer": 3}, {"n_layer": 1}, {"n_positions": 20}, {"vocab_size": 312}], ids=str)
def test_numbers_of_another_model_name_a_tensor(copy, fields):
    change_config(copy, **fields)
    with pytest.raises(CheckpointError, match=r"`transformer\.[^`]+`.*config\.json") as error:
        load_huggingface(copy)
    sentence(error)


@pytest.mark.parametrize("content", ['{"model_type": ', "3", "[1]"])
def test_a_config_that_is_none(copy, content):
    (copy / "config.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"config\.json cannot be read") as error:
        load_huggingface(copy)
    sentence(error)


def test_only_a_pickle(copy):
    (copy / WEIGHTS).rename(copy / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin.* save them as safetensors") as error:
        load_huggingface(copy)
    assert str(copy) in sentence(error)


@pytest.mark.parametrize("name", ["config.json", WEIGHTS])
def test_a_missing_file_is_named(copy, name):
    (copy / name).unlink()
    with pytest.raises(CheckpointError, match=f"{copy} has no {name}") as error:
        load_huggingface(copy)
    sentence(error)


@pytest.mark.parametrize("left", [0, 5, 1000, 45_639])
def test_truncated_weights(copy, left):
    with open(copy / WEIGHTS, "r+b") as file:
        file.truncate(left)
    with pytest.raises(CheckpointError, match=f"{copy / WEIGHTS} cannot be read") as error:
        load_huggingface(copy)
    sentence(error)


def test_a_missing_shard_is_named(golden, tmp_path):
    folder = shutil.copytree(golden / "huggingface" / "sharded", tmp_path / "model")
    (folder / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model-00002-of-00003\.safetensors cannot be read") as error:
        load_huggingface(folder)
    sentence(error)
    for content in ("{}", "[]", '{"weight_map": {"wte.weight": 3}}', '{"weight'):
        (folder / INDEX).write_text(content)
        with pytest.raises(CheckpointError, match=INDEX) as error:
            load_huggingface(folder)
        sentence(error)


# --- writing ----------------------------------------------------------------------------------------------------------


def test_what_was_read_is_written_byte_for_byte(golden, tmp_path, tokenizer):
    original, saved = golden / "huggingface" / "model", tmp_path / "saved"
    save_huggingface(load_huggingface(original), saved, tokenizer)
    assert (saved / WEIGHTS).read_bytes() == (original / WEIGHTS).read_bytes()
    assert [path.name for path in tmp_path.iterdir()] == ["saved"], "nothing stays beside it"
    for name in ("config.json", "generation_config.json"):
        ours, theirs = (json.loads((folder / name).read_text()) for folder in (saved, original))
        assert ours.pop("n_ctx", 19) == 19, "for readers other than transformers"
        assert ours == {field: theirs[field] for field in ours}
    left_out = theirs_without_ours(saved, original)
    assert {name for name in left_out if not name.startswith("summary_")} == {
        "initializer_range", "pad_token_id", "transformers_version", "use_cache",
    }, "nothing that decides what a trained model computes"  # fmt: skip
    assert Tokenizer.from_files(saved / "merges.txt", saved / "vocab.json").hash == tokenizer.hash


def theirs_without_ours(saved, original) -> set:
    ours, theirs = (json.loads((folder / "config.json").read_text()) for folder in (saved, original))
    return theirs.keys() - ours.keys()


def test_round_trip_bit_for_bit(tmp_path):
    config = ModelConfig(
        101, 13, 35, 5, 12, embd_pdrop=0.01, attn_pdrop=0.02, resid_pdrop=0.03
    )  # h.10 sorts before h.2
    model, folder = GPT2(config, init=distinctive), tmp_path / "saved"
    save_huggingface(model, folder)
    save_huggingface(model, folder)  # once more over what is there
    again = load_huggingface(folder)
    assert again.config == config
    assert_same_bits(arrays_of(again), arrays_of(model))
    for path, value in arrays_of(again).items():
        np.testing.assert_array_equal(value, distinctive(path, value.shape))
    assert json.loads((folder / "config.json").read_text())["eos_token_id"] == 100
    assert {path.name for path in folder.iterdir()} == {WEIGHTS, "config.json", "generation_config.json"}


@pytest.mark.parametrize("dtype", ["mixed_bfloat16", "bfloat16"])
def test_float32_is_written(copy, golden, tmp_path, dtype):
    save_huggingface(load_huggingface(copy, dtype=dtype), tmp_path / "saved")
    there = load_file(tmp_path / "saved" / WEIGHTS)
    expected = load_file(golden / "huggingface" / "model" / WEIGHTS)
    if dtype == "bfloat16":
        rounded = {n: v.astype(ml_dtypes.bfloat16).astype(np.float32) for n, v in expected.items()}
        expected = {n: expected[n] if ".ln_" in n else rounded[n] for n in expected}  # norms are float32 in any policy
    assert_same_bits(there, expected)


WITHOUT_TORCH = (
    without("torch", "transformers", "tensorflow")
    + """
import numpy as np
from gpt2lib.checkpoint import load_huggingface, save_huggingface
model = load_huggingface(sys.argv[1])
print(float(np.abs(np.asarray(model(np.load(sys.argv[3])["tokens"])) - np.load(sys.argv[3])["logits"]).max()))
save_huggingface(model, sys.argv[2])
"""
)


def test_neither_torch_nor_transformers_nor_tensorflow_is_needed(golden, tmp_path):
    folder = golden / "huggingface"
    printed = python(WITHOUT_TORCH, folder / "model", tmp_path / "saved", folder / "golden.npz", backend="jax")
    assert float(printed) < 1e-5
    assert (tmp_path / "saved" / WEIGHTS).read_bytes() == (folder / "model" / WEIGHTS).read_bytes()


def test_a_failed_save_leaves_the_folder_as_it_was(copy, monkeypatch, tokenizer):
    model, before = load_huggingface(copy), files_of(copy)

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(CheckpointError, match="No space left on device") as error:
        save_huggingface(model, copy, tokenizer)
    assert str(copy) in sentence(error)
    assert files_of(copy) == before
    assert [path.name for path in copy.parent.iterdir()] == ["model"]


def test_a_disk_that_is_really_full(copy):
    """As the library that writes the arrays reports it: a limit on the size of files stands for the end of the disk."""
    import resource
    import signal

    model, before = load_huggingface(copy), files_of(copy)
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limit[1]))
    try:
        with pytest.raises(CheckpointError, match="could not write") as error:
            save_huggingface(model, copy)
        sentence(error)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        signal.signal(signal.SIGXFSZ, handler)
    assert files_of(copy) == before
    assert [path.name for path in copy.parent.iterdir()] == ["model"]


def test_older_weights_and_vocabulary_give_way_and_the_rest_stays(golden, tmp_path, tokenizer):
    folder = shutil.copytree(golden / "huggingface" / "sharded", tmp_path / "model")
    for name in ("README.md", "pytorch_model.bin", "tokenizer.json", "added_tokens.json", "chat_template.jinja"):
        (folder / name).write_text("older")
    model = GPT2(load_huggingface(folder).config, init=distinctive)
    save_huggingface(model, folder, tokenizer)
    assert_same_bits(arrays_of(load_huggingface(folder)), arrays_of(model))
    assert {path.name for path in folder.iterdir()} == {
        WEIGHTS, "config.json", "generation_config.json", "merges.txt", "vocab.json", "tokenizer_config.json",
        "special_tokens_map.json", "README.md", "chat_template.jinja",
    }  # fmt: skip
    save_huggingface(model, folder)
    assert tokenizer_hash(folder) == tokenizer.hash, "a save without a tokenizer keeps the one that is there"


@pytest.mark.parametrize("there", ["notes", "another config", "a folder", "a file"])
def test_something_else_is_not_written_to(copy, tmp_path, there):
    model, folder = load_huggingface(copy), tmp_path / "mine"
    if there == "a file":
        folder.write_text("mine")
    elif there == "a folder":
        shutil.copytree(copy, folder)
        (folder / "runs").mkdir()
    else:
        folder.mkdir()
        name, content = {"notes": ("notes.txt", "mine"), "another config": ("config.json", '{"model_type": "bert"}')}[
            there
        ]
        (folder / name).write_text(content)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(CheckpointError, match="something else than a checkpoint") as error:
        save_huggingface(model, folder)
    assert str(folder) in sentence(error)
    assert sorted(tmp_path.rglob("*")) == before


def test_an_empty_folder_is_written_to(copy, tmp_path):
    (tmp_path / "new").mkdir()
    save_huggingface(load_huggingface(copy), tmp_path / "new")
    load_huggingface(tmp_path / "new")


def test_the_end_of_text_is_the_tokenizers(tmp_path, tokenizer):
    """A vocabulary may be padded to a round number of rows; more entries than rows cannot be."""
    save_huggingface(GPT2(SIZES["test"].replace(n_vocab=320)), tmp_path / "padded", tokenizer)
    for name in ("config.json", "generation_config.json"):
        document = json.loads((tmp_path / "padded" / name).read_text())
        assert document["bos_token_id"] == document["eos_token_id"] == tokenizer.end_of_text == 310
    with pytest.raises(CheckpointError, match=r"311 entries and the model has 310") as error:
        save_huggingface(GPT2(SIZES["test"].replace(n_vocab=310)), tmp_path / "small", tokenizer)
    sentence(error)
    assert not (tmp_path / "small").exists()


# --- whatever layout --------------------------------------------------------------------------------------------------


def make_run(folder, info: dict, steps=(3,), dtype="float32"):
    """A training run's folder, and the model of its last step."""
    for step in steps:
        model = GPT2(SIZES["test"], seed=step)
        document = {"model": model.config.to_dict(), "dtype": dtype, **info}
        checkpoint.save(
            folder / "checkpoints", step, {v.path: np.asarray(v.value) for v in model.trainable_variables}, document
        )
    return model


def test_the_layout_is_found(golden, tmp_path):
    openai, huggingface = golden / "openai-test", golden / "huggingface" / "model"
    assert_same_bits(arrays_of(load_pretrained(openai)), arrays_of(load_openai(openai)))
    assert_same_bits(arrays_of(load_pretrained(str(huggingface))), arrays_of(load_huggingface(huggingface)))
    model = make_run(tmp_path / "run", {}, (3, 40), "mixed_bfloat16")
    assert_same_bits(arrays_of(load_pretrained(tmp_path / "run")), arrays_of(model))
    assert load_pretrained(tmp_path / "run").compute_dtype == "bfloat16", "as it was trained"
    for folder in (openai, huggingface, tmp_path / "run"):
        for dtype, compute in (("float32", "float32"), ("mixed_bfloat16", "bfloat16")):
            assert load_pretrained(folder, dtype=dtype).compute_dtype == compute


@pytest.mark.parametrize("what", [load_pretrained, tokenizer_hash])
def test_no_layout_names_all_three(tmp_path, what):
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(CheckpointError, match=r"hparams\.json .*config\.json .*checkpoints/") as error:
            what(folder)
        assert str(folder) in sentence(error)


def test_the_hash_of_the_tokenizer(golden, copy, tmp_path, tokenizer):
    openai = shutil.copytree(golden / "openai-test", tmp_path / "openai")
    assert tokenizer_hash(openai) is None
    tokenizer.save(openai)
    assert tokenizer_hash(openai) == tokenizer.hash
    assert tokenizer_hash(golden / "huggingface" / "sharded") is None
    assert tokenizer_hash(copy) == tokenizer.hash
    (copy / "vocab.json").unlink()
    assert tokenizer_hash(copy) == tokenizer.hash, "tokenizer.json alone, as transformers 5 writes it"
    document = json.loads((copy / "tokenizer.json").read_text())
    document["model"]["merges"] = [" ".join(merge) for merge in document["model"]["merges"]]
    (copy / "tokenizer.json").write_text(json.dumps(document))
    assert tokenizer_hash(str(copy)) == tokenizer.hash, "as older versions write merges"
    save_huggingface(load_huggingface(copy), tmp_path / "saved", tokenizer)
    assert tokenizer_hash(tmp_path / "saved") == tokenizer.hash
    other = Tokenizer.train(["the fox and the fox and the dog"], 259)
    other.save(openai)
    assert tokenizer_hash(openai) == other.hash != tokenizer.hash


def test_the_hash_that_a_run_notes(tmp_path):
    make_run(tmp_path / "run", {"tokenizer": "abc123"}, (3, 40))
    assert tokenizer_hash(tmp_path / "run") == "abc123"
    (tmp_path / "run" / "checkpoints" / "step-00000040" / "checkpoint.json").write_text('{"step"')
    assert tokenizer_hash(tmp_path / "run") == "abc123", "that of the step before"
    make_run(tmp_path / "silent", {})
    assert tokenizer_hash(tmp_path / "silent") is None


@pytest.mark.parametrize("damage", ["merges", "vocabulary", "another's", "tokenizer.json"])
def test_a_vocabulary_that_is_not_gpt2s(copy, damage):
    if damage == "merges":
        (copy / "merges.txt").write_text("#version: 0.2\na b c\n")
    elif damage == "vocabulary":
        (copy / "vocab.json").write_text('{"a": ')
    elif damage == "another's":
        entries = json.loads((copy / "vocab.json").read_text())
        (copy / "vocab.json").write_text(json.dumps(entries | {"<pad>": len(entries)}))
    else:
        (copy / "vocab.json").unlink()
        (copy / "tokenizer.json").write_text('{"model": {"type": "Unigram", "vocab": [["a", -1.5]]}}')
    with pytest.raises(CheckpointError, match=r"the vocabulary in .* is not laid out as GPT-2's") as error:
        tokenizer_hash(copy)
    assert str(copy) in sentence(error)
    assert isinstance(error.value.__cause__, TokenizerError | KeyError), "which says more"


def test_ids_are_those_of_transformers(golden, tokenizer):
    texts = json.loads((golden / "huggingface" / "texts.json").read_text())
    assert len(texts) > 5
    for text, ids in texts.items():
        assert tokenizer.encode(text) == ids, text


# --- beside transformers itself ---------------------------------------------------------------------------------------

REASON = "needs torch and transformers: pip install -e '.[bench]'"
TEXTS = [
    "Once upon a time there was a little fox.", "  two   blanks,\ttabs\n\nand lines \n  ",
    "it's 1234567 o'clock, ISN'T it?",
    "naïve café, größer, 日本語, Ελληνικά, עברית, e\u0301, \U0001f469\u200d\U0001f680\U0001f642",
    "a\u00a0b\u2003c\u2028d\u0000e", " ", "\n \n", "", "<|endoftext",
]  # fmt: skip


@pytest.fixture(scope="module")
def transformers():
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read when it is imported
    pytest.importorskip("torch", reason=REASON)
    transformers = pytest.importorskip("transformers", reason=REASON)
    transformers.utils.logging.disable_progress_bar()
    return transformers


def logits_of(theirs, tokens) -> np.ndarray:
    import torch

    with torch.no_grad():
        return theirs.eval()(torch.tensor(tokens).long()).logits.float().numpy()


def assert_close(logits, expected):
    assert np.abs(expected).max() > 1, "they are of a size at which 1e-5 says something"
    print(f"largest difference {np.abs(logits - expected).max():.2e}, relative {relative_error(logits, expected):.2e}")
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-5)


@pytest.fixture
def tokens() -> np.ndarray:
    return np.random.default_rng(0).integers(311, size=(3, 19), dtype=np.int32)


def test_transformers_computes_what_we_saved(transformers, tmp_path, tokens, tokenizer):
    model = load_like_trained(ModelConfig(311, 19, 15, 3, 2))
    save_huggingface(model, tmp_path / "saved", tokenizer)
    theirs, report = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "saved", output_loading_info=True)
    assert not any(report.values()), report
    assert type(theirs).__name__ == "GPT2LMHeadModel"
    assert_close(np.asarray(model(tokens)), logits_of(theirs, tokens))
    assert theirs.generation_config.eos_token_id == tokenizer.end_of_text


def load_like_trained(config) -> GPT2:
    """A model with weights of the size that a trained one has; no two are equal."""
    return GPT2(config, init=lambda path, shape: distinctive(path, shape) * (1 if path.endswith("/g") else 0.5))


OPTIONS = [
    {}, {"activation_function": "gelu_fast"}, {"activation_function": "gelu_pytorch_tanh"}, {"n_inner": 60},
]  # fmt: skip


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_we_compute_what_transformers_saved(transformers, tmp_path, tokens, options):
    import torch

    torch.manual_seed(1)
    sizes = dict(vocab_size=311, n_positions=19, n_embd=15, n_head=3, n_layer=2, bos_token_id=310, eos_token_id=310)
    theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, initializer_range=0.3, **options))
    expected = logits_of(theirs, tokens)
    theirs.save_pretrained(tmp_path / "whole")
    theirs.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    theirs.transformer.save_pretrained(tmp_path / "base")  # a GPT2Model: no prefix
    assert (tmp_path / "shards" / INDEX).is_file()
    for name in ("whole", "shards", "base"):
        assert_close(np.asarray(load_huggingface(tmp_path / name)(tokens)), expected)
    for dtype in (torch.float16, torch.bfloat16):
        theirs.to(dtype).save_pretrained(tmp_path / "half")
        rounded = {
            f"transformer.{name}": value.detach().float().numpy()
            for name, value in theirs.transformer.named_parameters()
        }
        here = arrays_of(load_huggingface(tmp_path / "half"))
        assert_same_bits({f"transformer.{checkpoint.huggingface_name(n)}": v for n, v in here.items()}, rounded)


def test_transformers_reads_our_config_as_its_own(transformers, golden, tmp_path):
    original = golden / "huggingface" / "model"
    save_huggingface(load_huggingface(original), tmp_path / "saved")
    ours, theirs = (
        transformers.GPT2Config.from_pretrained(folder).to_dict() for folder in (tmp_path / "saved", original)
    )
    assert ours.pop("n_ctx") == 19
    for document in (ours, theirs):
        for name in ("transformers_version", "_name_or_path"):
            document.pop(name, None)
    assert ours == theirs


def test_its_tokenizer_gives_our_ids(transformers, tmp_path, tokenizer):
    save_huggingface(GPT2(ModelConfig(311, 19, 15, 3, 2)), tmp_path / "saved", tokenizer)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "saved")
    for text in TEXTS:
        assert theirs(text)["input_ids"] == tokenizer.encode(text), text
        assert theirs.decode(tokenizer.encode(text), clean_up_tokenization_spaces=False) == text
    assert len(theirs) == tokenizer.n_vocab
    assert theirs.bos_token_id == theirs.eos_token_id == tokenizer.end_of_text
    assert theirs("<|endoftext|>")["input_ids"] == [tokenizer.end_of_text]
    theirs.save_pretrained(tmp_path / "saved")
    assert tokenizer_hash(tmp_path / "saved") == tokenizer.hash
    for name in ("vocab.json", "merges.txt"):
        (tmp_path / "saved" / name).unlink()
    assert tokenizer_hash(tmp_path / "saved") == tokenizer.hash, "by what its tokenizer wrote"


def test_its_tokenizer_gives_gpt2s_ids(transformers, tmp_path):
    """The released vocabulary, with a model of as many rows."""
    gpt2 = Tokenizer.gpt2()
    save_huggingface(GPT2(ModelConfig(gpt2.n_vocab, 19, 15, 3, 2)), tmp_path / "saved", gpt2)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "saved")
    for text in TEXTS:
        assert theirs(text)["input_ids"] == gpt2.encode(text), text
    assert tokenizer_hash(tmp_path / "saved") == gpt2.hash
