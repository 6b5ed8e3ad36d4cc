"""The ways of the 2019 replication do what they say."""

import itertools
from dataclasses import asdict, replace

import numpy as np
import pytest
from keras import ops

from gpt2lib import ablation, recipe2019
from gpt2lib.config import SIZES, ConfigError, ModelConfig, Reading, TrainConfig
from gpt2lib.data import Batches, Corpus, CorpusError, write_corpus
from gpt2lib.model import GPT2
from gpt2lib.reading import ReadBatches, seen
from gpt2lib.seed import FixedSeed
from gpt2lib.step import loss_of
from gpt2lib.tokenizer import Tokenizer
from gpt2lib.train import train

T = 8  # n_ctx


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """300 documents of single bytes, document i beginning with its number; every tenth is long."""
    folder = tmp_path_factory.mktemp("recipe") / "corpus"
    letters = np.random.default_rng(1).choice(list("abcdefgh"), (300, 60))
    texts = [f"{i:03}" + "".join(letters[i, : 60 if i % 10 == 0 else i % 7 + 3]) for i in range(300)]
    write_corpus(folder, texts, Tokenizer([]), name="numbered", source={}, validation_fraction=0.1, progress=False)
    return Corpus(folder)


def read(corpus, *, batch_size=4, n_hosts=1, host=0, seed=5, **options):
    sizes = dict(batch_size=batch_size, n_ctx=T, seed=seed, host=host, n_hosts=n_hosts)
    return ReadBatches(corpus, Reading(**options), **sizes)


def documents(batches, steps):
    return [d for step in steps for row in batches.documents(step) for d in row]


def test_documents_are_those_of_the_tokens(corpus):
    text = corpus.tokens("train")[:]
    for options in ({}, {"stitch": 4}, {"buffer": 10, "stitch": 3, "long_share": 0.5, "long_tokens": 40}):
        batches, again = read(corpus, **options), read(corpus, **options)
        starts = [0, *(np.flatnonzero(text == corpus.tokenizer.end_of_text) + 1)]
        for step in (0, 1, 2, 7, 3):  # back as well
            assert batches[step].shape == (4, T + 1) and batches[step].dtype == np.int32
            for row, place, at in zip(batches[step], batches.windows(step), batches.documents(step), strict=True):
                begin = starts[place[0]] + place[1]
                n = min(T + 1, starts[place[0] + 1] - begin)
                assert place[0] == at[0] and (text[begin : begin + n] == row[:n]).all()
                assert (row == corpus.tokenizer.end_of_text).sum() in (len(at) - 1, len(at))
        assert (again[7] == batches[7]).all() and (again[3] == batches[3]).all()
    with pytest.raises(IndexError):
        batches[-1]


def test_without_options_every_token_is_a_label_once(corpus):
    batches = read(corpus)
    windows = np.concatenate([batches[step] for step in range(2 * corpus.n_tokens("train") // (4 * T))])
    labels = np.bincount(windows[:, 1:].ravel(), minlength=257)
    text = np.bincount(corpus.tokens("train")[:], minlength=257)
    assert np.abs(labels / labels.sum() - text / text.sum()).max() < 0.01
    assert len(set(documents(batches, range(40)))) > 60
    for a, b in itertools.pairwise(windows[:20]):
        assert a[-1] == b[0]


def test_the_restart_repeats_the_same_documents(corpus):
    """With a buffer of one document there is one order, so the very batches are the same."""
    batches = read(corpus, restart_every=5, buffer=1)
    first = [batches[step] for step in range(5)]
    for step in range(5, 23):
        assert (batches[step] == first[step % 5]).all()
    usual = set(documents(read(corpus, buffer=1), range(25)))
    assert len(set(documents(batches, range(25)))) < len(usual) / 3
    shuffled = read(corpus, restart_every=5)
    prefix = set(documents(batches, range(5)))
    assert not (shuffled[0] == shuffled[5]).all()
    assert max(documents(shuffled, range(25))) <= 1.5 * max(prefix)


def test_hosts_read_alike(corpus):
    batches = read(corpus, batch_size=8, hosts=4)
    for step in range(6):
        parts = batches[step].reshape(4, 2, T + 1)
        assert (parts == parts[0]).all() and not (parts[0, 0] == parts[0, 1]).all()
    one_host = [read(corpus, batch_size=8, hosts=4, n_hosts=4, host=host)[3] for host in range(4)]
    assert all((part == one_host[0]).all() for part in one_host)  # the shards of real hosts are identical
    drawn = read(corpus, batch_size=8, hosts=4, buffer=20)  # each from its own buffer of the same documents
    parts = drawn[0].reshape(4, 2, T + 1)
    assert not (parts == parts[0]).all()
    assert max(documents(drawn, range(2))) < 30
    with pytest.raises(CorpusError, match="cannot share"):
        read(corpus, batch_size=4, hosts=3)


def test_the_buffer_is_a_window_on_the_files(corpus):
    batches = read(corpus, buffer=20)
    for step in range(0, 30, 3):
        seen = documents(batches, range(step + 1))
        assert max(seen) < len(set(seen)) + 20
    assert documents(batches, range(3)) != sorted(documents(batches, range(3)))


def test_stitching_reads_far_more_than_it_cuts(corpus):
    batches = read(corpus, buffer=1, stitch=5)
    for step in range(5):
        for row, found in enumerate(batches.documents(step)):
            group = 4 * step + row  # the 5 documents that this window is from
            assert all(5 * group <= d < 5 * group + 5 for d in found)
    seeds = [read(corpus, buffer=1, stitch=5, seed=seed).windows(0)[0] for seed in range(200)]
    lengths = read(corpus).lengths[:5]
    places = {sum(lengths[:document]) + at for document, at in seeds}
    assert min(places) < 3 and sum(lengths) - T - 2 in range(max(places), max(places) + 3), "any place but the last"
    assert len(places) > 0.9 * (sum(lengths) - T - 1)


def test_files_can_be_mixed(corpus):
    one, other = (read(corpus, buffer=1, mixed=True, seed=seed) for seed in (1, 2))
    assert (one[3] == other[3]).all(), "in the same way in every run"
    found = documents(one, range(20))
    assert np.mean(np.diff(found) > 0) < 0.7 and max(found) > 200


def test_long_documents(corpus):
    text, ends = corpus.tokens("train")[:], corpus.tokenizer.end_of_text
    lengths = np.diff([0, *(np.flatnonzero(text == ends) + 1)])
    batches = read(corpus, batch_size=50, long_share=0.7, long_tokens=40, stitch=2)
    rows = [row for step in range(20) for row in batches.documents(step)]
    assert abs(np.mean([lengths[row].min() >= 40 for row in rows]) - 0.7) < 0.08
    with pytest.raises(CorpusError, match="long_share"):
        read(corpus, long_share=0.5, long_tokens=400)


def test_restarts_read_of_long_documents_what_is_theirs(corpus):
    """Of 5 steps of 4 windows half are of long documents, 2 for each, and half of any, 4 for each."""
    batches = read(corpus, restart_every=5, long_share=0.5, long_tokens=40, stitch=4)
    long = np.flatnonzero(batches.lengths >= 40)[: 5 * 2 * 2]
    assert set(documents(batches, range(400))) == {*range(5 * 2 * 4), *long.tolist()}


def test_switches_are_fields(corpus):
    base = dict(corpus="c", run_dir="r", learning_rate=1e-2, clip_norm=1.0, model={"n_embd": 24}, max_steps=10**6)
    for name in recipe2019.SWITCHES:
        assert TrainConfig.from_dict(recipe2019.switched(base, [name])) != TrainConfig.from_dict(base)
    assert recipe2019.switched(base, []) == base
    usual = TrainConfig(corpus="c", run_dir="r").to_dict()
    usual |= {"model": asdict(SIZES["117M"]), "reading": asdict(Reading())}
    for name, fields in recipe2019.SWITCHES.items():
        if name not in ("dropout", "no clipping"):  # GPT-2 has that dropout; clipping is chosen in each recipe
            for key, value in fields.items():
                was = {k: usual[key].get(k) for k in value} if isinstance(value, dict) else usual[key]
                assert was != value, f"{name} is off by default"
    everything = recipe2019.switched(base, recipe2019.ALL, same_on_hosts={"reading": {"hosts": 2}})
    config = TrainConfig.from_dict(everything)
    assert Reading(**config.reading) == Reading(10_000, 2, 2000, 42, 0.7, 512)
    assert config.model == {
        "n_embd": 24, "embd_pdrop": 0.1, "embd_pdrop_on": "matrices", "attn_pdrop": 0.1, "resid_pdrop": 0.1,
    }  # fmt: skip
    assert (config.learning_rate, config.clip_norm, config.weight_decay, config.init) == (2.5e-4, None, 0.01, "2019")
    assert base["model"] == {"n_embd": 24}
    with pytest.raises(ConfigError, match="`restart`"):
        recipe2019.switched(base, ["restrat"])
    with pytest.raises(ConfigError, match="Reading has no key"):
        TrainConfig.from_dict({**base, "reading": {"bufer": 3}})
    with pytest.raises(ConfigError, match=r"Reading\.hosts"):
        Reading(hosts=0)


def test_whole_matrices_are_dropped():
    """The loss is that of a model whose wte, in both its places, and wpe have the dropped entries."""
    shape = ModelConfig(
        n_vocab=30, n_ctx=8, n_embd=12, n_head=2, n_layer=1, embd_pdrop=0.4, attn_pdrop=0.0, resid_pdrop=0.0,
        embd_pdrop_on="matrices",
    )  # fmt: skip
    model = GPT2(shape, seed=2)
    tokens, seed = ops.convert_to_tensor(np.arange(18).reshape(2, 9) % 30, "int32"), FixedSeed(7, 3)
    loss = float(loss_of(model, tokens, seed, None))
    wte = np.asarray(ops.convert_to_tensor(model.dropped_wte(seed)))
    kept = wte != 0
    assert 0.45 < kept.mean() < 0.75
    np.testing.assert_allclose(wte[kept], (np.asarray(model.wte) / 0.6)[kept], rtol=1e-5)
    logits = np.asarray(model(tokens[:, :-1], training=True, seed=seed), np.float64)
    ids = np.asarray(tokens)
    shifted = logits - logits.max(-1, keepdims=True)
    nats = np.log(np.exp(shifted).sum(-1)) - np.take_along_axis(shifted, ids[:, 1:, None], -1)[..., 0]
    assert abs(loss - nats.mean()) < 1e-5, "one mask for both"
    assert abs(loss - float(loss_of(model, tokens, FixedSeed(8, 3), None))) > 1e-4
    quiet = np.asarray(model(tokens[:, :-1]))
    assert np.abs(quiet - logits).max() > 1e-3, "not without training"


def test_what_was_seen_is_counted(corpus):
    """The quick count is that of the documents of each row, and an epoch sees them all."""
    usual = Batches(corpus, batch_size=4, n_ctx=T, seed=0)
    for steps in (1, 3, 10):
        slow = len({d for step in range(steps) for row in usual.documents(step) for d in row})
        assert seen(usual, steps) == (slow, steps * 4 * T), "no window comes twice in an epoch"
    documents, tokens = seen(usual, 2 * len(usual))
    assert documents in (corpus.n_documents("train"), corpus.n_documents("train") - 1)
    assert 0 <= corpus.n_tokens("train") - tokens <= 5 * T
    batches = read(corpus, restart_every=5, buffer=1)
    assert seen(batches, 5) == seen(batches, 20)
    which = {d for step in range(5) for row in batches.documents(step) for d in row}
    texts = "".join(corpus.tokenizer.decode(corpus.tokens("train")[:])).split("<|endoftext|>")
    tokens = sum(len(corpus.tokenizer.encode(texts[d])) + 1 for d in which)
    assert seen(batches, 20) == (len(which), tokens) and len(which) < 60


def test_layers_are_measured(corpus, tmp_path):
    """Together they are what is measured of the whole model."""
    history = train(
        TrainConfig(
            corpus=str(corpus.folder), run_dir=str(tmp_path / "run"), size="test", model={"n_ctx": T}, warmup_steps=1,
            max_steps=4, batch_size=4, log_every=2, validation_windows=4, measure_layers=True, progress=False,
        )
    )  # fmt: skip
    shape = ModelConfig.from_dict({**SIZES["test"].to_dict(), "n_ctx": T})
    sizes = {"wte": shape.n_vocab * shape.n_embd, "wpe": T * shape.n_embd, "ln_f": 2 * shape.n_embd}
    block = 12 * shape.n_embd**2 + 13 * shape.n_embd
    for line in history["train"]:
        assert line["layers"].keys() == {*sizes, "h0", "h1"}
        squares = sum(sizes.get(name, block) * moved**2 for name, (moved, _) in line["layers"].items())
        assert abs((squares / shape.n_params) ** 0.5 / line["update_rms"] - 1) < 1e-3


def test_a_run_reads_as_it_is_told_and_goes_on_after_a_stop(corpus, tmp_path):
    """Stopped and started again it has the same losses as at one go."""
    options = dict(
        corpus=str(corpus.folder), size="test", model={"n_ctx": T, "embd_pdrop_on": "matrices"}, warmup_steps=2,
        learning_rate=1e-2, schedule="constant", batch_size=4, log_every=1, validate_every=100,
        validation_windows=4, progress=False,
        reading={"restart_every": 4, "hosts": 2, "buffer": 30, "stitch": 3}, max_steps=12, checkpoint_every=5,
    )  # fmt: skip
    whole = train(TrainConfig(run_dir=str(tmp_path / "whole"), **options))
    train(TrainConfig(run_dir=str(tmp_path / "cut"), **{**options, "max_steps": 7}))
    rest = {**options, "allow_changes": ["max_steps"]}
    cut = train(TrainConfig(run_dir=str(tmp_path / "cut"), **rest))
    assert [x["step"] for x in whole["train"]] == [x["step"] for x in cut["train"]]
    assert [x["loss"] for x in whole["train"]] == [x["loss"] for x in cut["train"]]
    usual = Batches(corpus, batch_size=4, n_ctx=T, seed=0)
    assert not (read(corpus, seed=0, restart_every=4, hosts=2, buffer=30, stitch=3)[0] == usual[0]).all()


def test_what_2019_read_is_what_its_configurations_say():
    pretty = recipe2019.documents_read(recipe2019.RUNS["PrettyBig"], 8_000_000, 1000.0)
    assert pretty["documents"] == 112_000 + 1_008_000, "of 80,000 windows of a host in a call, 70% of 2, the rest of 42"
    assert pretty["long_documents"] == 112_000
    assert pretty["passes"] == pytest.approx(60.48 * 32)
    assert pretty["tokens"] == pytest.approx(158.5e9, rel=1e-3)
    assert pretty["epochs"] == pytest.approx(pretty["tokens"] / 1.12e9)
    for changes in ({"segment": 604_800}, {"hosts": 1}):  # it took both to make the data few
        alone = recipe2019.documents_read(replace(recipe2019.RUNS["PrettyBig"], **changes), 8_000_000, 1000.0)
        assert alone["share"] == 1 and alone["epochs"] < 20
    small = recipe2019.documents_read(recipe2019.RUNS["117M"], 8_000_000, 1000.0)
    assert small["share"] == 1 and small["passes"] == pytest.approx(10_000 * 32 * 42 * 50 / 8e6)

    run = recipe2019.Run(parameters=10, hosts=2, batch_size=4, max_steps=20, segment=5, long_share=0.0, n_ctx=8)
    times = np.zeros(1000, int)
    for _ in range(run.max_steps // run.segment):
        for _ in range(run.hosts):
            for window in range(run.segment * run.batch_size // run.hosts):
                times[42 * window : 42 * (window + 1)] += 1
    said = recipe2019.documents_read(run, len(times), 30.0)
    assert said["documents"] == (times > 0).sum() and said["passes"] == times.max()


def test_runs_side_by_side_are_those_one_by_one(corpus, tmp_path):
    def configs(place):
        fields = dict(
            corpus=str(corpus.folder), learning_rate=1e-2, max_steps=6, warmup_steps=1, batch_size=4, log_every=3,
            validate_every=3, validation_windows=4, progress=False, measure_layers=True,
            model=dict(n_ctx=T, n_embd=12, n_head=2, n_layer=1, attn_pdrop=0.0, resid_pdrop=0.0, embd_pdrop=0.0),
        )  # fmt: skip
        return [{**fields, "seed": seed, "run_dir": str(tmp_path / place / str(seed))} for seed in (1, 2, 3)]

    one_by_one = ablation.run_all(configs("a"), 1, progress=False)
    beside = ablation.run_all(configs("b"), 2, progress=False, tasks=["wikitext2"], benchmarks=str(tmp_path))
    for a, b in zip(one_by_one, beside, strict=True):
        assert a["config"]["seed"] == b["config"]["seed"]
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-5)
        assert a["documents"] == b["documents"] and len(b["layers"]) == 2
    assert "wikitext2" in beside[0]["left_out"] and not beside[0]["perplexities"]
    kept = [(tmp_path / "b" / seed / "ablation.json").stat().st_mtime_ns for seed in "123"]
    assert ablation.run_all(configs("b"), 2, progress=False) == beside
    assert [(tmp_path / "b" / seed / "ablation.json").stat().st_mtime_ns for seed in "123"] == kept

    wrong = configs("c")
    wrong[1]["corpus"] = str(tmp_path / "nowhere")
    with pytest.raises(CorpusError, match="nowhere"):
        ablation.run_all(wrong, 2, progress=False)
    with pytest.raises(ConfigError, match="max_step"):
        ablation.run_all([configs("d")[0], {**configs("d")[1], "max_step": 3}], 2, progress=False)
    assert not (tmp_path / "d").exists(), "all are looked at before one runs"
