"""Plans: counts against the models themselves, Google's compiler on the programs of a run, sentences for bad input.

The compiler is in the libtpu wheel; where that is not installed (macOS, Windows, Arm) its tests are skipped.
"""

import dataclasses
import json
import math
import re
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT

from gpt2lib import plan as planning
from gpt2lib import report
from gpt2lib.config import SIZES, ConfigError, TrainConfig
from gpt2lib.model import GPT2
from gpt2lib.plan import PlanError, compiler, counts, plan
from gpt2lib.plan.topology import find, topologies
from gpt2lib.step import make_optimizer

pytestmark = pytest.mark.backend_free

SMALL = {"n_ctx": 128, "n_embd": 128, "n_head": 2, "n_vocab": 311, "n_layer": 3}
VERSION = planning._version("libtpu") if planning.libtpu() else ""
OLD = bool(VERSION) and tuple(map(int, VERSION.split(".")[:3])) < (0, 0, 52)  # as Colab's is
compiles = pytest.mark.skipif(not VERSION or OLD, reason=f"libtpu {VERSION} is too old" if OLD else "no libtpu")


# --- counts -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", ["117M", "345M", "774M", "1.5B", "PrettyBig", "test"])
def test_components_are_all_parameters(size):
    assert sum(counts.components(SIZES[size]).values()) == SIZES[size].n_params


def test_components_are_those_of_the_model():
    found = dict.fromkeys(counts.components(SIZES["test"]), 0)
    kinds = {"wte": "wte", "wpe": "wpe", "attn": "attention", "mlp": "mlp"}
    for v in GPT2(SIZES["test"]).trainable_variables:
        part = next((kinds[name] for name in v.path.split("/") if name in kinds), "norms")
        found[part] += math.prod(v.shape)
    assert found == counts.components(SIZES["test"])


@pytest.mark.parametrize("optimizer", ["adamw", "adafactor"])
@pytest.mark.parametrize("options", [{}, {"beta1": 0.9}, {"rounding": "master"}], ids=str)
@pytest.mark.parametrize("dtype", ["float32", "mixed_bfloat16", "bfloat16"])
def test_state_bytes_are_those_of_the_variables(optimizer, options, dtype):
    if optimizer == "adamw" and options:
        pytest.skip("adafactor's")
    config = TrainConfig(
        "", "", size="test", optimizer=optimizer, optimizer_options=options, dtype=dtype, learning_rate=1e-3
    )
    model, made = GPT2(config.model_config(), dtype=dtype), make_optimizer(config)
    made.build(model.trainable_variables)

    def size(variables):
        width = {"float32": 4, "bfloat16": 2}
        return sum(width[str(v.dtype)] * math.prod(v.shape) for v in variables)

    state = counts.state_bytes(config)
    assert state["parameters"] == size(model.trainable_variables)
    assert state["slots"] == size(v for v in made.variables if v.shape != ())


# --- topologies -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, compiler_name, devices",
    [
        ("v2-8", "v2:2x2", 8), ("v3-8", "v3:2x2", 8), ("v3-512", "v3:16x16", 512), ("v2-256", "v2:8x16", 256),
        ("v4-8", "v4:2x2x1", 4), ("v4-128", "v4:4x4x4", 64), ("v5e-1", "v5e:1x1", 1), ("v5e-8", "v5e:2x4", 8),
        ("v6e-8", "v6e:2x4", 8), ("v5p-8", "v5p:2x2x1", 4),
    ],
)  # fmt: skip
def test_names_of_slices(name, compiler_name, devices):
    assert (find(name).compiler_name, find(name).devices) == (compiler_name, devices)


def test_rates_are_those_of_a_device():
    assert find("v3-8").peak == 61.5e12 and find("v3-8").bandwidth == 450e9 and find("v3-8").memory == 16 * 2**30
    assert find("v5e-8").peak == 197e12 and find("v4-8").memory == 32 * 2**30
    assert all(t.peak > 1e13 and t.bandwidth > 1e11 for t in topologies().values())


@pytest.mark.parametrize(
    "options, words",
    [
        ({"topology": "v3-9"}, ["v3-9", "v3-8, v3-32"]),
        ({"topology": "v7-8"}, ["v7-8", "v2, v3, v4, v5e, v5p, v6e"]),
        ({"topology": 8}, ["`8`"]),
        ({"size": "117"}, ["117", "117M"]),
        ({"optimizer": "adam"}, ["adam", "adamw"]),
        ({"dtype": "bf16"}, ["bf16", "bfloat16"]),
        ({"program": "training"}, ["training", "train, evaluate, generate"]),
        ({"batch_per_device": 0}, ["batch_per_device", "at least 1"]),
        ({"rematerialise": True}, ["rematerialise", "remat"]),
    ],
)  # fmt: skip
def test_bad_input(options, words):
    with pytest.raises(ConfigError) as error:
        plan(**{"size": "117M", "topology": "v3-8", **options})
    assert "\n" not in str(error.value)
    assert all(word in str(error.value) for word in words), str(error.value)


# --- the compiler -----------------------------------------------------------------------------------------------------


def small(folder, topology, program="train", **options):
    text = folder / "program.txt"
    made = plan(
        "test", topology=topology, program=program, batch_per_device=2, cache=folder, text=text, model=SMALL, **options
    )
    return made, text.read_text()


@compiles
@pytest.mark.parametrize("topology", ["v5e-1", "v5e-8", "v3-8"])
@pytest.mark.parametrize("program", ["train", "evaluate", "generate"])
def test_programs_compile(topology, program, tmp_path):
    """All shapes are known, no number is of 64 bits, nothing asks the host; attention is the kernel."""
    made, text = small(tmp_path, topology, program)
    assert made.fits and made.source == "compiler"
    assert 0 < made.arguments < made.total < made.limit < made.slice.memory
    assert "[<=" not in text and "s32[]{:T(256)} get-dimension-size" not in text, (
        "a shape that is known at run time only"
    )
    assert not re.search(r"\b[fs]64\[|\bc128\[", text)
    assert not re.search(r"custom_call_target=\"[^\"]*(callback|host)|\b(send|recv|infeed|outfeed)\(", text, re.I)
    kernels = {"train": 2, "evaluate": 1, "generate": 0}[program] * SMALL["n_layer"]
    assert text.count('custom_call_target="tpu_custom_call"') == kernels


@compiles
@pytest.mark.parametrize("rows", [1, 2])
def test_a_tpu_keeps_its_cache_in_bfloat16(rows, tmp_path):
    """It is for the CPU, where this compiler runs, that a cache is converted and one row computed apart."""
    text = tmp_path / "program.txt"
    options = {"topology": "v5e-1", "program": "generate", "dtype": "mixed_bfloat16", "model": SMALL}
    assert plan("test", batch_per_device=rows, cache=tmp_path, text=text, **options).fits
    loops = [line for line in text.read_text().splitlines() if " while(" in line and "32,64]" in line]
    assert {*re.findall(r"\b(\w+\[[\d,]*2,32,64\])", " ".join(loops))} == {f"bf16[{rows},2,32,64]"}


@compiles
def test_gradients_cross_once(tmp_path):
    """The bytes of all-reduces are those of the gradients, matrices in bfloat16, within 5%."""
    made, _ = small(tmp_path, "v3-8")
    shape = made.config.model_config()
    sizes = counts.components(shape)
    vectors = shape.n_layer * 9 * shape.n_embd + sizes["norms"]  # biases, norms
    kernels = sizes["attention"] + sizes["mlp"] - shape.n_layer * 9 * shape.n_embd
    expected = 2 * kernels + 4 * (sizes["wte"] + sizes["wpe"] + vectors)
    assert list(made.collectives) == ["all-reduce"]
    assert abs(made.collectives["all-reduce"]["bytes"] / expected - 1) < 0.05
    accumulated, _ = small(tmp_path, "v3-8", accumulate=2)
    assert abs(accumulated.collectives["all-reduce"]["bytes"] / (4 * shape.n_params) - 1) < 0.05, "sums are float32"


@compiles
def test_sharded_state_is_cut(tmp_path):
    whole, _ = small(tmp_path, "v3-8", optimizer="adamw")
    cut, _ = small(tmp_path, "v3-8", optimizer="adamw", sharded=True)
    assert cut.arguments < whole.arguments / 3
    assert "all-gather" in cut.collectives and "all-gather" not in whole.collectives


@compiles
def test_what_was_compiled_is_kept(tmp_path):
    first = plan("test", topology="v5e-1", cache=tmp_path)
    again = plan("test", topology="v5e-1", cache=tmp_path)
    other = plan("test", topology="v5e-1", cache=tmp_path, remat=True)
    assert (first.details["cached"], again.details["cached"], other.details["cached"]) == (False, True, False)
    assert dataclasses.replace(again, details={}) == dataclasses.replace(first, details={})
    assert len(list(tmp_path.glob("*.json"))) == 2 == len(list(tmp_path.iterdir()))


@compiles
def test_what_does_not_fit_says_by_how_much(tmp_path):
    made = plan(
        "test", topology="v5e-1", batch_per_device=32, optimizer="adamw", cache=tmp_path,
        model={"n_vocab": 100_003, "n_ctx": 1024, "n_embd": 128, "n_head": 2, "n_layer": 1},
    )  # fmt: skip
    assert not made.fits and made.total > made.limit
    said = made.sentence()
    numbers = [float(x) for x in re.findall(r"([\d.]+) GiB", said)]
    assert "does not fit" in said and "loss_chunk" in said and len(numbers) >= 1
    chunked = plan(
        "test", topology="v5e-1", batch_per_device=32, optimizer="adamw", cache=tmp_path, loss_chunk=1024,
        model={"n_vocab": 100_003, "n_ctx": 1024, "n_embd": 128, "n_head": 2, "n_layer": 1},
    )  # fmt: skip
    assert chunked.fits, "the advice helps"


@compiles
def test_the_program_is_known_wherever_the_library_lies(tmp_path):
    """What was compiled holds for every clone: places in files, which move with each edit, are no part of a program."""
    clone = tmp_path / "elsewhere"
    shutil.copytree(ROOT / "gpt2lib", clone / "gpt2lib")
    shutil.copytree(ROOT / "data" / "published", clone / "data" / "published")
    for path in clone.rglob("*.py"):
        path.write_text("\n\n" + path.read_text())
    here = plan("test", topology="v5e-1", cache=tmp_path, model=SMALL)
    code = "from gpt2lib.plan import plan; import json, sys; print(plan(**json.load(sys.stdin)).details)"
    request = json.dumps({"size": "test", "topology": "v5e-1", "cache": str(tmp_path), "model": SMALL})
    there = subprocess.run([sys.executable, "-c", code], input=request, cwd=clone, capture_output=True, text=True)
    assert here.details["program_hash"] in there.stdout and "'cached': True" in there.stdout, there.stderr


@compiles
def test_loops_count_as_often_as_they_run(tmp_path):
    """The compiler's own analysis takes their bodies once."""
    once = plan("test", topology="v5e-1", batch_per_device=4, cache=tmp_path, model=SMALL)
    parts = plan("test", topology="v5e-1", batch_per_device=1, accumulate=4, cache=tmp_path, model=SMALL)
    chunked = plan("test", topology="v5e-1", batch_per_device=4, loss_chunk=128, cache=tmp_path, model=SMALL)
    assert parts.tokens == once.tokens == chunked.tokens
    assert 0.9 < parts.flops / once.flops < 1.3
    assert 0.9 < chunked.flops / once.flops < 1.3


def test_products_of_a_traced_program():
    import jax
    from jax import numpy

    def program(a, b):
        total = jax.lax.fori_loop(0, 5, lambda i, x: x @ b, a)
        return jax.checkpoint(lambda x: jax.jit(numpy.dot)(x, b))(total)

    traced = jax.jit(program).trace(numpy.zeros((7, 3)), numpy.zeros((3, 3))).jaxpr.jaxpr
    assert compiler.products(traced, repeated=False) == 2 * (2 * 7 * 3 * 3)
    assert compiler.products(traced, repeated=True) == 6 * (2 * 7 * 3 * 3)


@compiles
def test_the_largest_batch(tmp_path):
    """Three compiled programs find it; one more sequence is refused."""
    request = dict(
        size="test", topology="v5e-1", cache=tmp_path,
        model={"n_vocab": 100_003, "n_ctx": 1024, "n_embd": 128, "n_head": 2, "n_layer": 1},
    )  # fmt: skip
    made = planning.largest_batch(**request)
    fitting = [p for p in made if p.fits]
    assert len(made) <= 5 and fitting[-1].batch_per_device > 10
    assert fitting[-1].total > 0.9 * fitting[-1].limit
    more = plan(batch_per_device=fitting[-1].batch_per_device + 1, **request)
    assert not more.fits
    together = planning.plans([{**request, "batch_per_device": b} for b in (1, 2)], workers=2)
    assert [p.total for p in together] == [p.total for p in made[:2]]


@pytest.mark.parametrize("refusal", ["total", "no total"])
def test_the_search_for_the_largest_batch(monkeypatch, refusal):
    """Memory that grows, then less, because things are computed again; a compiler that may say no total beyond."""
    tried = []

    def answer(batch_per_device):
        tried.append(batch_per_device)
        if batch_per_device > 23 and refusal == "no total":
            raise planning.NoRoom("no room")
        total = min(2 + batch_per_device, 14 + 0.04 * batch_per_device)
        made = made_up(total, batch_size=8 * batch_per_device)
        return dataclasses.replace(
            made, total=made.total if batch_per_device <= 23 else 18 << 30, fits=batch_per_device <= 23
        )

    monkeypatch.setattr(planning, "plan", answer)
    made = planning.largest_batch()
    assert [p.batch_per_device for p in made if p.fits][-1] == 23
    assert max(tried) <= 32 and len(tried) < 12 and len(tried) == len(set(tried))


def test_a_model_that_fits_with_no_batch(monkeypatch):
    """One program says so; where it says no total, that is the answer."""
    tried = []
    monkeypatch.setattr(planning, "plan", lambda batch_per_device: tried.append(batch_per_device) or made_up(20))
    assert [p.fits for p in planning.largest_batch()] == [False] and tried == [1]

    def none(batch_per_device):
        raise planning.NoRoom("no room")

    monkeypatch.setattr(planning, "plan", none)
    with pytest.raises(planning.NoRoom):
        planning.largest_batch()


def made_up(total, **fields):
    """A plan with a total, without a compiler."""
    config = TrainConfig("", "", **{"size": "1.5B", "batch_size": 8, "dtype": "mixed_bfloat16"} | fields)
    return planning.Plan(config, find("v3-8"), "train", fits=False, total=int(total * 2**30), limit=int(15.48 * 2**30))


def test_remedies_are_those_that_would_make_it_fit():
    """1.5B with Adam on v3, of which the compiler says 21.6 GiB: only what touches the 18.7 GB of state helps."""
    adam = made_up(21.58, optimizer="adamw", learning_rate=1e-3)
    remedies = adam.remedies()
    assert set(remedies) == {"sharded=True", "optimizer=adafactor"}
    assert all(total < adam.limit for total in remedies.values())
    assert "6.10 too many; what would fit: sharded=True: about " in adam.sentence()
    several = made_up(40, batch_size=64).remedies()
    assert several and all(", " in change and total < adam.limit for change, total in several.items())
    hopeless = made_up(15.6, batch_size=8, remat=True, loss_chunk=128, sharded=True)
    assert not hopeless.remedies() and "no means of this program" in hopeless.sentence()


def test_without_a_compiler(monkeypatch):
    """An estimate, which says what it is; there is none of what is not trained."""
    monkeypatch.setattr(planning, "libtpu", lambda: None)
    made = plan("117M", topology="v3-8", batch_per_device=4)
    assert made.source == "estimate" and made.fits and "by an estimate" in made.sentence()
    assert 0 < made.seconds < 1 and 0 < made.mfu(made.seconds) < 1
    assert not plan("1.5B", "adamw", topology="v3-8").fits and plan("1.5B", topology="v3-8").fits
    assert [p.batch_per_device for p in planning.largest_batch(size="117M", topology="v3-8")][-1] > 10
    with pytest.raises(PlanError, match=r"no TPU compiler here, .* run: pip install"):
        plan("117M", program="generate")


def recorded():
    """Every plan of the train step in `reports/plan`."""
    numbers = report.load("reports/plan/00_plan")
    return numbers["grid"] + numbers["means"] + [row for tried in numbers["largest_batch"] for row in tried]


def test_estimates_are_near_what_the_compiler_said(monkeypatch):
    """Within 15% of the total, over all models, optimizers, types, TPUs and means that were compiled."""
    monkeypatch.setattr(planning, "libtpu", lambda: None)
    names = (
        "size",
        "optimizer",
        "dtype",
        "topology",
        "batch_per_device",
        "remat",
        "sharded",
        "accumulate",
        "loss_chunk",
    )
    off = {}
    for row in recorded():
        request = {name: row[name] for name in names if name in row}
        off[str(request)] = plan(**request).total / row["total"] - 1
    assert len(off) > 50
    assert max(map(abs, off.values())) < 0.15, max(off.items(), key=lambda item: abs(item[1]))


def test_a_compiler_that_crashes_ends_its_own_process(monkeypatch, tmp_path):
    """As libtpu 0.0.21 does with jax 0.7.2."""
    monkeypatch.setattr(planning, "libtpu", lambda: str(tmp_path / "libtpu.so"))
    crashed = subprocess.run([sys.executable, "-c", "import os; os.abort()"], capture_output=True, text=True)
    monkeypatch.setattr(planning.subprocess, "run", lambda *args, **kwargs: crashed)
    with pytest.raises(PlanError, match=r"ended with SIGABRT; plans were made with libtpu 0\.0\.52"):
        plan("117M", cache=tmp_path)


def test_a_batch_beyond_every_memory_is_a_sentence(monkeypatch, tmp_path):
    """As libtpu 0.0.52 says for 117M with hundreds of sequences on a core of v3: not the memory of the parameters."""
    said = "JaxRuntimeError: RESOURCE_EXHAUSTED: Ran out of memory in memory space smem. Used 17.2K of 16.0K smem."
    done = subprocess.CompletedProcess([], 0, json.dumps({"error": said}), "")
    monkeypatch.setattr(planning, "libtpu", lambda: str(tmp_path / "libtpu.so"))
    monkeypatch.setattr(planning.subprocess, "run", lambda *args, **kwargs: done)
    with pytest.raises(planning.NoRoom, match=r"no room for so large a step \(.* smem\.\); take a smaller batch$"):
        plan("117M", cache=tmp_path, batch_per_device=500)


@pytest.mark.skipif(not OLD, reason="this compiler is new enough")
def test_a_compiler_that_is_too_old_is_a_sentence(tmp_path):
    with pytest.raises(PlanError, match=rf"libtpu {re.escape(VERSION)}.*plans were made with libtpu") as error:
        plan("test", topology="v5e-1", cache=tmp_path, model=SMALL)
    assert "\n" not in str(error.value)


@compiles
def test_a_broken_compiler_is_a_sentence(monkeypatch, tmp_path):
    broken = tmp_path / "libtpu.so"
    broken.write_bytes(b"not a library")
    monkeypatch.setattr(planning, "libtpu", lambda: str(broken))
    with pytest.raises(PlanError) as error:
        plan("test", topology="v5e-1", cache=tmp_path)
    assert "\n" not in str(error.value) and "libtpu" in str(error.value)


# --- reading what the compiler says -----------------------------------------------------------------------------------


def test_collectives_are_read():
    text = """
%body (x: f32[3]) -> f32[3] {
  %again = f32[3]{0:S(1)} all-reduce(%x), channel_id=9
}

ENTRY %main (x: f32[3]) -> s32[8] {
  %loop = f32[3]{0} while(%x), condition=%c, body=%body, backend_config={"known_trip_count":{"n":"4"}}
  %all-reduce.1 = f32[257,64]{0,1:T(8,128)} all-reduce(%fusion), channel_id=2
  %ar = (bf16[64,192]{1,0}, /*index=1*/f32[3]{0}, f32[]) all-reduce-start(%a, %b), channel_id=7
  %done = (bf16[64,192]{1,0}, f32[3]{0}, f32[]) all-reduce-done(%ar)
  ROOT %ag = s32[8]{0} all-gather(%x), dimensions={0}
}
"""
    assert compiler.collectives(text) == {
        "all-reduce": {"count": 6, "bytes": 4 * 257 * 64 + 2 * 64 * 192 + 12 + 4 + 4 * 12},
        "all-gather": {"count": 1, "bytes": 32},
    }


def test_memory_traffic_is_read():
    """What lies in a core's fast memory, in space 1, costs nothing; what is brought there is read once."""
    text = """
ENTRY %main (a: f32[100]) -> f32[100] {
  %a = f32[100]{0} parameter(0)
  %copy-start = (f32[100]{0:S(1)}, f32[100]{0}, u32[]{:S(2)}) copy-start(%a)
  %copy-done = f32[100]{0:S(1)} copy-done(%copy-start)
  %slice-start = ((f32[100]{0}), f32[50]{0:S(1)}, s32[]{:S(2)}) slice-start(%a), slice={[0:50]}
  %fast = f32[100]{0:S(1)} fusion(%copy-done, %copy-done), kind=kLoop, calls=%f
  %out = f32[100]{0} fusion(%fast, %a), kind=kLoop, calls=%g
  %gather_fusion = f32[7]{0} fusion(%a, %fast), kind=kCustom, calls=%h
  ROOT %dynamic-update-slice_fusion = f32[100]{0} fusion(%out, %gather_fusion), kind=kLoop, calls=%i
}
"""
    assert compiler.memory_traffic(text) == 4 * (100 + 50 + 200 + 14 + 14)


def test_refusals_are_read():
    v3 = "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 20.92G of 15.48G hbm. Exceeded by 5.44G."
    v5e = (
        "RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: Ran out of memory on HBM, the total memory required for HLO "
        "temporaries (8.00T) exceeds available HBM (15.75G). HLO module: jit_step."
    )
    assert compiler.refusal(v3)["total"] == int(20.92 * 2**30) and compiler.refusal(v3)["limit"] == int(15.48 * 2**30)
    assert compiler.refusal(v5e)["total"] == 8 * 2**40 and compiler.refusal(v5e)["limit"] == int(15.75 * 2**30)
    assert compiler.refusal("INTERNAL: Mosaic failed") is None
    assert json.dumps(compiler.refusal(v3))


@compiles
@pytest.mark.slow
def test_117m_uses_most_of_a_v3(tmp_path):
    """By the compiler's own clock; it fits with room, and its gradients cross once."""
    made = plan("117M", topology="v3-8", batch_per_device=4, cache=tmp_path)
    assert made.total < made.limit / 2
    assert made.mfu(made.optimal_seconds) > 0.6
    assert made.collectives.keys() == {"all-reduce"}
