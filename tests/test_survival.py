"""Runs that are killed, stopped, cut short by a full disk or a loss that runs away, fine-tuned, refused."""

import contextlib
import json
import math
import os
import random
import re
import secrets
import select
import shlex
import shutil
import signal
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path

import keras
import numpy as np
import pytest
import yaml
from conftest import ROOT, assert_same_bits
from literal import gpt2
from literal import nll as literal_nll
from test_train import documents, write

from gpt2lib import checkpoint, sample
from gpt2lib import train as training
from gpt2lib.config import ConfigError, TrainConfig
from gpt2lib.data import Batches, Corpus, CorpusError, validation_windows, write_corpus
from gpt2lib.evaluate.loss import loss_function, total, window_losses
from gpt2lib.model import GPT2
from gpt2lib.tokenizer import Tokenizer
from gpt2lib.train import Stopped, TrainingError, model_config, read_history, read_metrics, train

BACKEND = keras.backend.backend()
T, B = 11, 4
DROPOUTS = {"embd_pdrop": 0.1, "attn_pdrop": 0.15, "resid_pdrop": 0.2}
DRY = {"n_ctx": T, "n_layer": 1, **dict.fromkeys(DROPOUTS, 0.0)}  # where dropout tells nothing: it takes JAX seconds


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    return write(tmp_path_factory.mktemp("survival") / "corpus", seed=3)


def configuration(corpus, run_dir, **changes) -> TrainConfig:
    defaults = dict(
        size="test", model={"n_ctx": T, "n_layer": 1, **DROPOUTS}, optimizer="adafactor",
        optimizer_options={"beta1": 0.9}, learning_rate=0.03, schedule="constant", warmup_steps=50, max_steps=60,
        batch_size=B, clip_norm=1.0, log_every=1, validate_every=10, validation_windows=5, checkpoint_every=7,
        progress=False, seed=6,
    )  # fmt: skip
    return TrainConfig(corpus=str(corpus), run_dir=str(run_dir), **(defaults | changes))


# --- what is compared -------------------------------------------------------------------------------------------------


def no_constant(name):
    raise AssertionError(f"{name} is not JSON")


def whole_lines(path) -> list[dict]:
    """The lines of a file of JSON lines; none is broken, none is repeated, steps rise."""
    data = Path(path).read_bytes() if Path(path).exists() else b""
    assert not data or data.endswith(b"\n"), f"{path} ends with {data[-80:]}"
    lines = [json.loads(text, parse_constant=no_constant) for text in data.splitlines()]
    places = [(line["step"], "validation_loss" in line) for line in lines]
    assert places == sorted(set(places)), places
    return lines


def trace(run_dir) -> list[dict]:
    """All that `metrics.jsonl` says but how long it took."""
    lines = whole_lines(Path(run_dir) / "metrics.jsonl")
    return [{k: v for k, v in line.items() if k not in ("seconds", "tokens_per_second")} for line in lines]


def steps_logged(run_dir) -> int:
    path = Path(run_dir) / "metrics.jsonl"
    return path.read_bytes().count(b'"loss"') if path.exists() else 0


def newest(run_dir, folder="checkpoints"):
    """(step, arrays) of the newest checkpoint, which is intact; step 0 without one."""
    found = checkpoint.read(Path(run_dir) / folder)
    return (found[1]["step"], found[0]) if found else (0, {})


def sentence(error) -> str:
    text = str(error.value if hasattr(error, "value") else error)
    assert "\n" not in text, text
    return text


def watch(monkeypatch, look):
    """Steps are taken by `look(step, index, take)`, which returns what `take()` does."""
    make = training.make_step

    def made(*args):
        step = make(*args)
        call = type(step).__call__

        def watched(self, tokens, index, *more):
            return look(self, index, lambda: call(self, tokens, index, *more))

        step.__class__ = type("Watched", (type(step),), {"__call__": watched})
        return step

    monkeypatch.setattr(training, "make_step", made)


class Reference:
    """An undisturbed run in this process, with the state after each step."""

    def __init__(self, config):
        self.config, self.states = config, {}

        def look(step, index, take):
            self.states[index] = step.arrays()
            return take()

        with pytest.MonkeyPatch.context() as patch:
            watch(patch, look)
            train(config)
        self.trace = trace(config.run_dir)
        last, self.states[config.max_steps] = newest(config.run_dir)
        assert last == config.max_steps

    def check(self, run_dir, finished=False):
        """What a run has left is part of what the undisturbed one has, bit for bit; returns its last saved step."""
        lines = trace(run_dir)
        assert lines == self.trace[: len(lines)]
        step, arrays = newest(run_dir)
        if step:
            assert_same_bits(arrays, self.states[step])
        logged = [line["step"] for line in lines if "loss" in line]
        assert step <= (logged[-1] if logged else 0), "a checkpoint is never ahead of what is logged"
        if finished:
            assert lines == self.trace and step == self.config.max_steps
            assert not [path for path in Path(run_dir).rglob("*") if "part" in path.name], "nothing half-written stays"
        return step


@pytest.fixture(scope="module")
def reference(corpus, tmp_path_factory) -> Reference:
    run_dir = tmp_path_factory.mktemp("reference") / "run"
    return Reference(configuration(corpus, run_dir, checkpoint_every=55))


@pytest.fixture
def begun(reference, tmp_path) -> TrainConfig:
    """The undisturbed run as if it had ended after 55 of 60 steps, saved; for a test of its own."""
    shutil.copytree(reference.config.run_dir, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-00000060")
    return reference.config.replace(run_dir=str(tmp_path / "run"), checkpoint_every=100)


# --- processes --------------------------------------------------------------------------------------------------------

# Forks processes that go on as `python -m gpt2lib.train` would: what takes seconds is imported, no device is started.
SERVER = """
import json, os, signal, sys
import grain
import gpt2lib.train

for line in sys.stdin:
    order = json.loads(line)
    child = os.fork()
    if not child:
        for number, name in enumerate((os.devnull, order["out"], order["err"])):
            os.dup2(os.open(name, os.O_RDWR | os.O_CREAT | os.O_TRUNC), number)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        exec(order["first"], globals())
        sys.exit(gpt2lib.train.main(order["arguments"]))
    print(child, flush=True)
    print(os.waitpid(child, 0)[1], flush=True)
"""
# `at(index, do)`: do it when the step of that index, from 0, is about to be taken.
AT = """
def at(index, do):
    make = gpt2lib.train.make_step
    def made(*args):
        step = make(*args)
        take = type(step).__call__
        def call(self, tokens, i, *more):
            if i == index:
                do()
            return take(self, tokens, i, *more)
        step.__class__ = type("Watched", (type(step),), {"__call__": call})
        return step
    gpt2lib.train.make_step = made
"""
STRICT = [sys.executable, "-W", "error", "-W", "ignore::DeprecationWarning"]  # old packages on a newer Python warn
DEADLINE = 300  # seconds that any one thing may take on a busy machine


class Process:
    """A process that trains."""

    def __init__(self, server, folder, arguments, first):
        self.server, self.out, self.err = server, folder / "out.txt", folder / "err.txt"
        order = {"arguments": [*map(str, arguments)], "first": first, "out": str(self.out), "err": str(self.err)}
        server.stdin.write(f"{json.dumps(order)}\n".encode())
        self.pid, self.status = int(server.stdout.readline()), None

    def ended(self, seconds: float = 0) -> bool:
        """Whether it ends within so many seconds."""
        if self.status is None and select.select([self.server.stdout], [], [], seconds)[0]:
            self.status = os.waitstatus_to_exitcode(int(self.server.stdout.readline()))
        return self.status is not None

    def until(self, condition, what: str, or_end=False):
        """Wait until something is so; with `or_end` or until the process has ended."""
        deadline = time.monotonic() + DEADLINE
        while not condition():
            if self.ended(0.001):
                assert or_end, f"it ended with {self.status} before {what}: {self.err.read_text()}"
                return
            assert time.monotonic() < deadline, f"waited too long for {what}"

    def send(self, number):
        with contextlib.suppress(ProcessLookupError):  # it has ended
            os.kill(self.pid, number)

    def wait(self) -> int:
        """The exit status, -9 after a SIGKILL."""
        if not self.ended(DEADLINE):
            self.send(signal.SIGKILL)
            pytest.fail(f"it did not end: {self.err.read_text()}")
        return self.status

    def said(self) -> str:
        """What it wrote to stderr, without the notes that TensorFlow leaves there."""
        lines = [
            line for line in self.err.read_text().splitlines() if not re.match(r"[IWE]0000 |WARNING: All log", line)
        ]
        return "\n".join(lines)


@pytest.fixture(scope="module")
def server():
    command = [*STRICT, "-c", SERVER]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0, cwd=ROOT) as process:
        yield process
        process.stdin.close()
        assert process.wait(DEADLINE) == 0


@pytest.fixture
def start(server, tmp_path):
    """`start(config, first code)`: a process that trains it, or goes on."""
    begun = []

    def start(config, first="", *options):
        path = tmp_path / f"{len(begun)}.yaml"
        path.write_text(yaml.safe_dump(config.to_dict()))
        begun.append(Process(server, tmp_path, [path, *options], first))
        return begun[-1]

    yield start
    if begun and not begun[-1].ended():
        begun[-1].send(signal.SIGKILL)
        begun[-1].wait()


# --- killed -----------------------------------------------------------------------------------------------------------


# Steps that take some time: else a run is over before one that watches it gets the processor back.
PACE = """
import random, time
make = gpt2lib.train.make_step
def made(*args):
    step = make(*args)
    take = type(step).__call__
    def call(self, *given):
        time.sleep(random.uniform(0, 0.02))
        return take(self, *given)
    step.__class__ = type("Paced", (type(step),), {"__call__": call})
    return step
gpt2lib.train.make_step = made
"""


def test_killed_at_random_moments(start, reference, tmp_path):
    """Five kills: while it starts, between any two steps, during a checkpoint. TensorBoard shows no less.

    All in one run, but one that has ended before it was killed, as may be on a busy machine, is followed by another.
    """
    seed = secrets.randbits(32)
    print(f"seed {seed}")
    choose = random.Random(seed)
    moments = ["start", "step", "step", "save", "save"]
    choose.shuffle(moments)
    runs, saved = 0, 0

    def fresh():
        return reference.config.replace(
            run_dir=str(tmp_path / f"run-{runs}"), checkpoint_every=7, keep_checkpoints=2, tensorboard=True
        )

    def logged(at):
        return lambda: steps_logged(config.run_dir) >= at

    def saving(at):
        part = Path(config.run_dir) / "checkpoints" / f".step-{at:08d}.part"
        return lambda: part.exists() or steps_logged(config.run_dir) > at  # a busy machine may miss it

    config = fresh()
    while moments:
        process = start(config, PACE)
        if moments[-1] == "start":
            process.ended(choose.uniform(0, 1.5))
        elif moments[-1] == "step":
            process.until(logged(steps_logged(config.run_dir) + choose.randrange(1, 12)), "it goes on", or_end=True)
            process.ended(choose.uniform(0, 0.01))
        else:
            process.until(saving(saved + 7 * choose.randrange(1, 3)), "it saves", or_end=True)
            process.ended(choose.uniform(0, 0.005))
        process.send(signal.SIGKILL)
        assert process.wait() in (-signal.SIGKILL, 0), (moments[-1], process.said())
        killed = process.status != 0
        saved = reference.check(config.run_dir, finished=not killed)
        if killed:
            moments.pop()
        else:
            runs, saved = runs + 1, 0
            assert runs < 10, "it is never killed in time"
            config = fresh()
    assert start(config).wait() == 0
    reference.check(config.run_dir, finished=True)
    assert shown(config.run_dir) == scalars(config.run_dir)


HALF = """
import os, signal, safetensors.numpy
save = safetensors.numpy.save_file
def half(arrays, path, *more, **named):
    save(arrays, path, *more, **named)
    if "step-00000014" in str(path):
        os.truncate(path, os.path.getsize(path) // 2)
        os.kill(os.getpid(), signal.SIGKILL)
safetensors.numpy.save_file = half
"""
UNNAMED = """
import os, signal, sys
def hook(event, arguments):
    if event == "os.rename" and "step-00000021.part" in str(arguments[0]):
        signal.raise_signal(signal.SIGKILL)
sys.addaudithook(hook)
"""
FULL = """
import os, resource
unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
def full():
    resource.setrlimit(resource.RLIMIT_FSIZE, (os.path.getsize(METRICS) + 100, unlimited[1]))
def save(*args, save=gpt2lib.checkpoint.save):
    resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
    return save(*args)
gpt2lib.checkpoint.save = save
at(41, full)
"""


def test_one_run_stopped_in_every_way(start, reference, tmp_path):
    """In the middle of a checkpoint's file; when all of it is written but its name; SIGTERM, a full disk, Ctrl-C."""
    config = reference.config.replace(run_dir=str(tmp_path / "run"), checkpoint_every=7, keep_checkpoints=2)

    def stopped(status, *first) -> int:
        process = start(config, AT + "".join(first))
        assert process.wait() == status, process.said()
        assert "Traceback" not in process.said()
        return reference.check(config.run_dir)

    assert stopped(-signal.SIGKILL, HALF) == 7
    assert stopped(-signal.SIGKILL, UNNAMED) == 14
    assert stopped(-signal.SIGTERM, "import os, signal\nat(30, lambda: os.kill(os.getpid(), signal.SIGTERM))") == 31

    metrics = tmp_path / "run" / "metrics.jsonl"
    process = start(config, f"{AT}METRICS = {str(metrics)!r}{FULL}")
    assert process.wait() == 1, "where a line is cut off, no checkpoint is saved, even if there is space for one"
    assert "metrics.jsonl" in process.said() and "space" in process.said() and process.said().count("\n") == 0
    assert newest(config.run_dir)[0] == 35
    assert len(read_history(config.run_dir)["train"]) == 41, "a broken line does not hide those before it"

    process = start(config)
    process.until(lambda: steps_logged(config.run_dir) > 45, "it goes on")
    process.send(signal.SIGINT)
    assert process.wait() == -signal.SIGINT, process.said()
    assert "go on" in process.said() and "Traceback" not in process.said()
    assert reference.check(config.run_dir) == trace(config.run_dir)[-1]["step"] < 60, "it saves at the step it is at"

    assert start(config).wait() == 0
    reference.check(config.run_dir, finished=True)


# For each number k: saves in a process that dies at the k-th thing that it does to the disk, then looks.
EVERY = """
import os, shutil, signal, sys, warnings
from pathlib import Path
import numpy as np
from gpt2lib import checkpoint

root, damaged = Path(sys.argv[1]), sys.argv[2] == "damaged"
def arrays(step):
    return {"a": np.full((7, 5), step, np.float32), "b": np.array(step)}
for step in (2, 4):
    checkpoint.save(root / "template", step, arrays(step), {})
if damaged:
    path = root / "template/step-00000004/state.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
new, older = (4, 2) if damaged else (6, 4)
k, status, seen = 0, None, set()
while status != 0:
    k, work = k + 1, root / str(k)
    shutil.copytree(root / "template", work)
    child = os.fork()
    if not child:
        left = k
        def hook(event, arguments):
            global left
            left -= any(str(work) in str(argument) for argument in arguments)
            if not left:
                signal.raise_signal(signal.SIGKILL)
        sys.addaudithook(hook)
        checkpoint.save(work, new, arrays(new), {})
        os._exit(0)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status in (0, -9), status
    with warnings.catch_warnings():
        warnings.simplefilter("ignore" if damaged else "error")
        found, info = checkpoint.read(work)
    assert info["step"] in (new, older), (k, info)
    seen.add(info["step"])
    assert all((found[name] == arrays(info["step"])[name]).all() for name in "ab"), k
    checkpoint.save(work, 8, arrays(8), {})
    checkpoint.save(work, 9, arrays(9), {})
    assert sorted(path.name for path in work.iterdir()) == ["step-00000008", "step-00000009"], (k, list(work.iterdir()))
assert seen == {new, older}
print(k - 1)
"""


@pytest.mark.parametrize("before", ["intact", "damaged"])
def test_killed_at_every_moment_of_a_checkpoint(tmp_path, before):
    """At each call that touches its folder; with `damaged` it replaces one of the same step."""
    command = [sys.executable, "-W", "error", "-c", EVERY, str(tmp_path), before]
    done = subprocess.run(command, capture_output=True, text=True, timeout=DEADLINE, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 10


WAITS = """
import os, threading
ticks = os.open(TICKS, os.O_WRONLY | os.O_CREAT)
def wait():
    while True:
        os.write(ticks, b".")
        threading.Event().wait(0.002)
at(3, wait)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_ends_it_at_once(start, corpus, tmp_path, number):
    """The first one waits for the end of the step, which here never comes."""
    ticks = tmp_path / "ticks"
    process = start(configuration(corpus, tmp_path / "run"), f"{AT}TICKS = {str(ticks)!r}{WAITS}")
    process.until(lambda: ticks.exists() and ticks.stat().st_size, "it waits")
    process.send(number)

    def delivered():
        status = Path(f"/proc/{process.pid}/status").read_text()
        return not int(re.search(r"ShdPnd:\s*(\w+)", status)[1], 16) >> (number - 1) & 1

    process.until(delivered, "the signal arrives")
    size = ticks.stat().st_size
    process.until(lambda: ticks.stat().st_size > size + 2, "it is noted")
    process.send(number)
    assert process.wait() == -number, process.said()
    assert [line["step"] for line in read_history(tmp_path / "run")["train"]] == [1, 2, 3]
    assert newest(tmp_path / "run") == (0, {})


def test_max_minutes(start, reference, tmp_path):
    """Stopped in a notebook; by the command of its message, in a folder that a shell would take apart; to the end."""
    config = reference.config.replace(run_dir=str(tmp_path / "it's a run"), checkpoint_every=7, max_minutes=1e-6)
    with pytest.raises(Stopped) as stopped:
        train(config)
    assert "step 1 of 60" in sentence(stopped) and reference.check(config.run_dir) == 1
    command = re.search(r"to go on: (.+?), or", str(stopped.value))[1]
    backend, python, *arguments = shlex.split(command)
    assert (backend, python) == (f"KERAS_BACKEND={BACKEND}", "python")
    done = subprocess.run([*STRICT, *arguments], capture_output=True, text=True, timeout=DEADLINE, cwd=ROOT)
    assert done.returncode == 75, done.stderr
    assert "step 2 of 60" in done.stdout and command in done.stdout
    assert reference.check(config.run_dir) == 2
    assert start(config.replace(max_minutes=None)).wait() == 0
    reference.check(config.run_dir, finished=True)


def test_an_interrupt_in_the_last_step_is_one_still(reference, begun, monkeypatch):
    """In a notebook, the next cell must not run; the handlers are those from before."""
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]

    def look(step, index, take):
        if index == 59:
            os.kill(os.getpid(), signal.SIGINT)
        return take()

    watch(monkeypatch, look)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a test run in the background ignores it
    try:
        with pytest.raises(KeyboardInterrupt):
            train(begun)
    finally:
        signal.signal(signal.SIGINT, before)
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers
    reference.check(begun.run_dir, finished=True)


def test_in_a_thread(reference, begun):
    """Where no handler can be set."""
    results = []
    thread = threading.Thread(target=lambda: results.append(train(begun)))
    thread.start()
    thread.join(DEADLINE)
    assert results == [read_history(begun.run_dir)]
    reference.check(begun.run_dir, finished=True)


# --- a study ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def long(corpus, tmp_path_factory) -> Reference:
    """An undisturbed run of 400 steps, with what differs in the notebook."""
    run_dir = tmp_path_factory.mktemp("long") / "run"
    return Reference(
        configuration(corpus, run_dir, max_steps=400, log_every=10, validate_every=200, checkpoint_every=150)
    )


def test_a_study_is_stopped_and_goes_on(long, tmp_path):
    """SIGTERM to the study, of which its kernel, a process of its own, hears nothing by itself."""
    psutil = pytest.importorskip("psutil")
    pytest.importorskip("papermill")
    for folder in ("notebooks", "reports/s", "data"):
        (tmp_path / folder).mkdir(parents=True)
    shutil.copy(ROOT / "notebooks" / "03_train.ipynb", tmp_path / "notebooks")
    shutil.copytree(long.config.corpus, tmp_path / "data" / "corpus")
    known = json.dumps(json.loads((ROOT / "notebooks" / "03_train.ipynb").read_text()))
    fields = {key: value for key, value in long.config.to_dict().items() if f'"{key} = ' in known}
    fields |= {
        "corpus": "data/corpus",
        "run": "data/run",
        "expect_drop": -9.0,
        "log_every": 1,
        "checkpoint_every": 1000,
    }
    (tmp_path / "reports" / "s" / "03_train.yaml").write_text(f"# why\n{yaml.safe_dump(fields)}")
    run_dir, recorded = tmp_path / "data" / "run", tmp_path / "reports" / "s" / "03_train.json"
    environment = os.environ | {"GPT2LIB_WORKSPACE": str(tmp_path)}
    environment.pop("GPT2LIB_DATA", None)

    def study():
        command = [sys.executable, "-m", "gpt2lib.study", "reports/s"]
        return subprocess.Popen(
            command, env=environment, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )

    with study() as process:
        deadline = time.monotonic() + DEADLINE
        while steps_logged(run_dir) < 5:
            assert process.poll() is None, process.stderr.read()
            assert time.monotonic() < deadline
            time.sleep(0.002)
        kernels = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=DEADLINE)
    # Colab's ipykernel 6.17 and absl 1.4 do not close their streams well when a kernel ends
    err = re.sub(r"Exception ignored in atexit callback: <function shutdown.*?'watch_fd_thread'\n", "", err, flags=re.S)
    assert process.returncode == 130 and "go on" in err and "Traceback" not in err, err
    assert not psutil.wait_procs(kernels, DEADLINE)[1], "no kernel outlives its study"
    assert not recorded.exists()
    step = newest(run_dir)[0]
    assert 5 <= step == trace(run_dir)[-1]["step"] < 400, "it saved at the step it was at"

    with study() as process:
        out, err = process.communicate(timeout=DEADLINE)
    assert process.returncode == 0, out + err
    ours = [line for line in trace(run_dir) if line["step"] % 10 == 0]
    assert ours == long.trace
    assert_same_bits(newest(run_dir)[1], long.states[400])
    assert json.loads(recorded.read_text())["numbers"]["config"]["seed"] == 6


# --- TensorBoard ------------------------------------------------------------------------------------------------------


def crc32c(data: bytes) -> int:
    """CRC-32C by the bit, masked as TFRecord has it."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
    crc ^= 0xFFFFFFFF
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def fields(message: bytes):
    """(number, value) of each field of a protocol buffer: an int, or bytes."""
    at = 0

    def varint():
        nonlocal at
        value = shift = 0
        while True:
            byte, at = message[at], at + 1
            value, shift = value | (byte & 127) << shift, shift + 7
            if byte < 128:
                return value

    while at < len(message):
        tag = varint()
        kind = tag & 7
        if kind == 0:
            yield tag >> 3, varint()
            continue
        size = varint() if kind == 2 else {1: 8, 5: 4}[kind]
        yield tag >> 3, message[at : at + size]
        at += size


def shown(run_dir) -> dict:
    """(step, name) -> the value that TensorBoard shows: a session that begins at a step hides what is from then on."""
    values = {}
    for path in sorted((Path(run_dir) / "tensorboard").iterdir()):
        data, at = path.read_bytes(), 0
        while at < len(data):
            (size,) = struct.unpack_from("<Q", data, at)
            if at + 16 + size > len(data):
                break  # the process was killed while it wrote
            assert struct.unpack_from("<I", data, at + 8)[0] == crc32c(data[at : at + 8])
            body = data[at + 12 : at + 12 + size]
            assert struct.unpack_from("<I", data, at + 12 + size)[0] == crc32c(body)
            at += 16 + size
            event = dict(fields(body))  # of Event: 2 step, 5 summary, 7 session_log
            step = event.get(2, 0)
            if 7 in event:
                assert dict(fields(event[7])) == {1: 1}, "SessionLog.START"
                values = {key: value for key, value in values.items() if key[0] < step}
            for _, value in fields(event.get(5, b"")):
                value = dict(fields(value))  # of Summary.Value: 1 tag, 2 simple_value
                key = step, value[1].decode()
                assert key not in values, f"{key} is there twice"
                values[key] = struct.unpack("<f", value[2])[0]
    return values


def scalars(run_dir) -> dict:
    """The same from `metrics.jsonl`."""
    untold = ("step", "tokens_seen", "seconds")
    return {
        (line["step"], name): float(np.float32(value))
        for line in read_metrics(Path(run_dir) / "metrics.jsonl")
        for name, value in line.items()
        if name not in untold
    }


def test_tensorboard_is_the_metrics(reference, tmp_path, monkeypatch):
    """Interrupted before the first checkpoint: all steps are taken again, the validation before them too."""
    config = reference.config.replace(run_dir=str(tmp_path / "run"), tensorboard=True)
    with monkeypatch.context() as patch:
        unreadable(patch, 6)
        with pytest.raises(Unreadable):
            train(config)
    assert max(step for step, _ in shown(config.run_dir)) == 6
    with monkeypatch.context() as patch:
        unreadable(patch, 9)
        with pytest.raises(Unreadable):
            train(config)
    assert shown(config.run_dir) == scalars(config.run_dir)
    assert {name for _, name in shown(config.run_dir)} >= {"loss", "validation_loss", "learning_rate", "gradient_norm"}
    assert max(step for step, _ in shown(config.run_dir)) == 9


def test_tensorboard_without_its_package(reference, tmp_path, monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] == "tensorboardX"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    run_dir = shutil.copytree(reference.config.run_dir, tmp_path / "run")
    with pytest.raises(ConfigError, match="pip install tensorboardX") as error:
        train(reference.config.replace(run_dir=str(run_dir), tensorboard=True), restart=True)
    sentence(error)
    assert trace(run_dir) == reference.trace, "a restart that cannot begin deletes nothing"


class Unreadable(Exception):
    pass


def unreadable(monkeypatch, index):
    """The batch of that step, from 0, cannot be read."""
    read = Batches.__getitem__

    def getitem(self, step):
        if step == index:
            raise Unreadable
        return read(self, step)

    monkeypatch.setattr(Batches, "__getitem__", getitem)


# --- incidents --------------------------------------------------------------------------------------------------------


def documents_of(corpus, windows) -> list[list[int]]:
    """For each window the documents that it is of: as many ends of text (256) as there are before each token."""
    tokens = np.concatenate([np.fromfile(path, "<u2") for path in sorted(Path(corpus).glob("train-*.bin"))])
    before = np.concatenate([[0], np.cumsum(tokens == 256)])
    return [sorted({int(before[i]) for i in range(w * T, w * T + T + 1)}) for w in windows]


def check_batch(config, incident):
    """The batch of an incident is that of its step, and its documents are those of the tokens."""
    order = dict(batch_size=config.batch_size, n_ctx=T, seed=config.seed)
    batch = Batches(Corpus(config.corpus), **order)[incident["step"] - 1]
    tokens = np.concatenate([np.fromfile(path, "<u2") for path in sorted(Path(config.corpus).glob("train-*.bin"))])
    for row, window in zip(batch, incident["windows"], strict=True):
        np.testing.assert_array_equal(row, tokens[window * T : window * T + T + 1])
    assert incident["documents"] == documents_of(config.corpus, incident["windows"])


def leaping(monkeypatch, steps):
    """The losses of some steps, from 1, read 50 nats higher than they are."""

    def look(step, index, take):
        measures = take()
        return measures | ({"loss": measures["loss"] + 50} if index + 1 in steps else {})

    watch(monkeypatch, look)


def test_loss_spikes(long, tmp_path, monkeypatch):
    """Each is reported once, whatever happens to the run; nothing changes by it; few states are kept."""
    leaps = [60, 165, 270, 375]
    leaping(monkeypatch, leaps)
    config = long.config.replace(run_dir=str(tmp_path / "run"))
    with monkeypatch.context() as patch, pytest.warns(UserWarning, match="standard deviations") as warned:
        unreadable(patch, 200)
        with pytest.raises(Unreadable):
            train(config)
        assert [int(re.search(r"step (\d+)", str(w.message))[1]) for w in warned] == [60, 165]
        saying = str(warned[0].message)
    first = whole_lines(tmp_path / "run" / "incidents.jsonl")
    with pytest.warns(UserWarning) as warned:  # from its checkpoint of step 150
        train(config)
    assert [int(re.search(r"step (\d+)", str(w.message))[1]) for w in warned] == [165, 270, 375]

    incidents = whole_lines(tmp_path / "run" / "incidents.jsonl")
    assert [incident["step"] for incident in incidents] == leaps and incidents[:2] == first
    for incident in incidents:
        check_batch(config, incident)
        assert "nan" not in incident["what"]
    some = sorted({number for row in incidents[0]["documents"] for number in row})
    assert str(some[0]) in saying and str(some[-1]) in saying and str(tmp_path / "run" / "incidents") in saying
    ours = [line for line in trace(config.run_dir) if line["step"] not in leaps]
    assert ours == [line for line in long.trace if line["step"] not in leaps]
    assert_same_bits(newest(config.run_dir)[1], long.states[400])

    kept = checkpoint.list_steps(tmp_path / "run" / "incidents")
    assert 1 <= len(kept) <= 3
    assert incidents[-1]["state"] == f"incidents/step-{kept[-1]:08d}" and kept[-1] - 375 in (0, 1)
    info = checkpoint.read(tmp_path / "run" / "incidents")[1]
    assert info["incident"]["step"] == 375 and info["incident"]["documents"] == incidents[-1]["documents"]
    assert_same_bits(newest(tmp_path / "run", "incidents")[1], long.states[kept[-1]])


def test_a_spike_just_before_the_end(long, tmp_path, monkeypatch):
    """Step 62 has been started, and has changed nothing, when the loss of step 61 is looked at."""

    def look(step, index, take):
        if index >= 61:
            return {"loss": math.nan, "gradient_norm": math.nan, "failed": 61}
        measures = take()
        return measures | ({"loss": measures["loss"] + 50} if index == 60 else {})

    watch(monkeypatch, look)
    config = long.config.replace(run_dir=str(tmp_path / "run"))
    with pytest.warns(UserWarning, match="step 61:"), pytest.raises(TrainingError, match="step 62:"):
        train(config)
    incidents = whole_lines(tmp_path / "run" / "incidents.jsonl")
    assert [(i["step"], i["state"]) for i in incidents] == [(n, "incidents/step-00000061") for n in (61, 62)]
    step, arrays = newest(tmp_path / "run", "incidents")
    assert step == 61
    assert_same_bits(arrays, long.states[61])


@pytest.mark.parametrize("rate", [1e14, 1e38])
def test_a_loss_that_is_not_finite(corpus, tmp_path, rate):
    """A real divergence: the state before the failing step is kept, whether or not that step is logged.

    At the higher rate the gradient is finite, the RMS of the parameters is not: the state behind it is kept to look at,
    and no checkpoint. TensorFlow looks at the parameters in the steps that it logs.
    """
    overflows = rate == 1e38
    config = configuration(
        corpus, tmp_path / "run", model=DRY, optimizer="adamw", optimizer_options={}, clip_norm=None,
        learning_rate=rate, warmup_steps=1, checkpoint_every=100, validate_every=100,
        log_every=1 if overflows and BACKEND == "tensorflow" else 10,
    )  # fmt: skip
    closely = config.replace(run_dir=str(tmp_path / "closely"), log_every=1, checkpoint_every=1)
    with pytest.raises(TrainingError, match=r"step \d+") as error:
        train(closely)
    before, arrays = newest(closely.run_dir)
    assert f"step {before + 1}:" in sentence(error)
    assert all(np.isfinite(value).all() for value in arrays.values())
    assert all(line["step"] <= before for line in trace(closely.run_dir)), "what is not finite is not logged"
    with pytest.raises(TrainingError) as error:
        train(config)
    said, saved = sentence(error), before + overflows
    assert f"step {before + 1}:" in said and "learning rate" in said
    (incident,) = whole_lines(tmp_path / "run" / "incidents.jsonl")
    assert incident["step"] == before + 1 and incident["state"] == f"incidents/step-{saved:08d}"
    check_batch(config, incident)
    for number in sorted({number for row in incident["documents"] for number in row})[:3]:
        assert re.search(rf"\b{number}\b", said)
    step, state = newest(config.run_dir, "incidents")
    assert step == saved and state.keys() == arrays.keys()
    if overflows:
        assert max(np.abs(value).max() for value in state.values()) > 1e30
    else:
        assert_same_bits(state, arrays)


def test_validation_lines(reference):
    """Against the NumPy model: the mean over fixed windows, its standard error from blocks of windows."""
    config = reference.config
    lines = [line for line in whole_lines(Path(config.run_dir) / "metrics.jsonl") if "validation_loss" in line]
    assert [line["step"] for line in lines] == [0, 10, 20, 30, 40, 50, 60]
    tokens = np.concatenate([np.fromfile(p, "<u2") for p in sorted(Path(config.corpus).glob("validation-*.bin"))])
    n_windows = (len(tokens) - 1) // T
    starts = [i * n_windows // 5 * T for i in range(5)]  # five, evenly spread
    initial = GPT2(config.model_config(257), seed=config.seed).trainable_variables
    for line in (lines[0], lines[3], lines[-1]):
        assert line.keys() == {"step", "tokens_seen", "validation_loss", "validation_loss_se", "seconds"}
        assert line["tokens_seen"] == line["step"] * B * T
        arrays = reference.states[line["step"]] if line["step"] else {v.path: np.asarray(v.value) for v in initial}
        windows = [tokens[start : start + T + 1].astype(int) for start in starts]
        nats = np.array([literal_nll(gpt2(arrays, 3, w[:-1])[0], w[1:]) for w in windows], np.float64)  # [5, T]
        assert abs(line["validation_loss"] - nats.mean()) < 1e-5
        means, sizes = nats.mean(1), (3, 2)  # about sqrt(5) blocks of neighbours
        blocks = [means[:3].sum() - 3 * nats.mean(), means[3:].sum() - 2 * nats.mean()]
        error = math.sqrt(2 / 1 * sum(block**2 for block in blocks)) / sum(sizes)
        assert abs(line["validation_loss_se"] - error) < 1e-5 and error > 0


# --- refused ----------------------------------------------------------------------------------------------------------


def test_another_seed_batch_or_corpus_only_when_told(reference, begun, tmp_path, monkeypatch):
    changes = {"seed": 7, "batch_size": 2, "corpus": str(write(tmp_path / "other", seed=4))}
    for name, value in changes.items():
        for allowed in ([], [other for other in changes if other != name]):
            with pytest.raises(ConfigError, match=rf"\b{name}\b.*allow_changes: \[{name}\]") as error:
                train(begun.replace(**changes if allowed else {name: value}, allow_changes=allowed))
            said = sentence(error)
            assert begun.run_dir in said and str(value) in said
    assert trace(begun.run_dir) == reference.trace
    taken = []

    def look(step, index, take):
        taken.append(index)
        return dict.fromkeys(("loss", "gradient_norm", "update_rms", "parameter_rms"), 1.0) | {"failed": -1}

    watch(monkeypatch, look)
    train(begun.replace(**changes, allow_changes=[*changes]))
    assert taken == [55, 56, 57, 58, 59] and newest(begun.run_dir)[0] == 60
    before = [line for line in reference.trace if line["step"] <= 55]
    lines = trace(begun.run_dir)
    assert lines[: len(before)] == before and [line["step"] for line in lines[len(before) :]] == [*range(56, 61), 60]
    assert lines[-1]["validation_loss"] != reference.trace[-1]["validation_loss"], "of the other corpus"


def test_another_tokenizer_is_refused_even_when_told(begun, tmp_path):
    """It may have as many entries: then only its hash tells."""
    other = Tokenizer.train(documents(0), 258)
    write_corpus(tmp_path / "other", documents(3), other, name="t", source={}, validation_fraction=0.3, progress=False)
    manifest = tmp_path / "other" / "manifest.json"
    content = json.loads(manifest.read_text())
    content["tokenizer"]["n_vocab"] = 257
    manifest.write_text(json.dumps(content))
    config = begun.replace(corpus=str(tmp_path / "other"))
    for allowed in ([], ["corpus"]):
        with pytest.raises((ConfigError, CorpusError), match="tokenizer") as error:
            train(config.replace(allow_changes=allowed))
        assert begun.run_dir in sentence(error) and config.corpus in sentence(error)


TWO_DEVICES = {
    "jax": 'import os\nos.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=2"\n',
    "tensorflow": "import tensorflow as tf\ncpu = tf.config.list_physical_devices('CPU')[0]\n"
    "tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)\n",
}[BACKEND]


def test_a_batch_that_two_devices_cannot_share(start, corpus, tmp_path):
    process = start(configuration(corpus, tmp_path / "run", batch_size=3), TWO_DEVICES)
    assert process.wait() == 1
    assert re.fullmatch(r".*batch_size 3 .*\b2 devices.*multiple of 2.*", process.said()), process.said()
    assert not (tmp_path / "run").exists()


def memory_error(text):
    """What the backend raises when memory runs out; without a text, what Python does."""
    if not text:
        return MemoryError()
    if BACKEND == "jax":
        import jax

        return jax.errors.JaxRuntimeError(f"RESOURCE_EXHAUSTED: {text}")
    import tensorflow as tf

    return tf.errors.ResourceExhaustedError(None, None, text)


class Failing:
    """A step that raises."""

    def __init__(self, error):
        self.error = error

    def losses(self, windows):
        raise self.error


@pytest.mark.parametrize("text", ["", "Out of memory while trying to allocate 12 bytes.", "failed to allocate memory"])
@pytest.mark.parametrize("when", ["building", "stepping"])
def test_out_of_memory(corpus, tmp_path, monkeypatch, text, when):
    error = memory_error(text)

    def build(*args):
        if when == "building":
            raise error
        return Failing(error)

    monkeypatch.setattr(training, "make_step", build)
    with pytest.raises(TrainingError, match="out of memory") as raised:
        train(configuration(corpus, tmp_path / "run", model=DRY))
    said = sentence(raised)
    assert "4 sequences of 11 tokens" in said and "accumulate" in said and "batch_size" in said


@pytest.mark.parametrize("error", [RuntimeError("no such thing"), ValueError("shapes"), KeyError("x")], ids=repr)
def test_other_errors_are_left_as_they_are(corpus, tmp_path, monkeypatch, error):
    monkeypatch.setattr(training, "make_step", lambda *args: Failing(error))
    with pytest.raises(type(error)) as raised:
        train(configuration(corpus, tmp_path / "run"))
    assert raised.value is error


@pytest.mark.parametrize(
    "changes, state, activations, logits, absent",
    [
        ({"optimizer": "adamw"}, 16 * 0.124, (10, 30), (3.2, 5.0), None),
        ({"optimizer": "adafactor"}, 8 * 0.124, (10, 30), (3.2, 5.0), None),
        ({"remat": True}, 8 * 0.124, (0.8, 3), (3.2, 5.0), "remat"),
        ({"loss_chunk": 1024, "accumulate": 4}, 12 * 0.124, (2.5, 8), (0.3, 0.7), "loss_chunk"),
        ({"dtype": "mixed_bfloat16"}, 6 * 0.124, (5, 20), (3.2, 5.0), "mixed_bfloat16"),
    ],
    ids=str,
)
def test_the_numbers_of_out_of_memory(
    tmp_path_factory, tmp_path, monkeypatch, changes, state, activations, logits, absent
):
    """GPT-2 small, 8 sequences of 1024 tokens: 0.124 billion parameters, 0.41 billion logits two or three times."""

    def exhausted(*args, **kwargs):
        raise MemoryError

    many = [f"{i} " + "the cat sat on the mat. " * 40 for i in range(40)]
    write_corpus(tmp_path / "c", many, Tokenizer([]), name="t", source={}, validation_fraction=0.3, progress=False)
    monkeypatch.setattr(training, "make_parts", exhausted)
    config = TrainConfig(str(tmp_path / "c"), str(tmp_path / "run"), model={"n_vocab": 50257}, **changes)
    with pytest.raises(TrainingError) as error:
        train(config)
    said = sentence(error)
    numbers = [float(number) for number in re.findall(r"(\d+\.\d) GB", said)]
    assert abs(numbers[0] - state) < 0.15
    assert activations[0] < numbers[1] < activations[1]
    assert logits[0] < numbers[2] < logits[1]
    assert f"{8 // changes.get('accumulate', 1)} sequences of 1024 tokens" in said
    assert not absent or absent not in said.split("; try ")[1], "what is done already is not advised"


# --- fine-tuning ------------------------------------------------------------------------------------------------------

FINE = dict(size=None, model={}, optimizer="adafactor", optimizer_options={}, learning_rate=1e-3, warmup_steps=1,
            schedule="constant", max_steps=4, batch_size=3, validation_windows=4, checkpoint_every=2)  # fmt: skip


@pytest.fixture(scope="module")
def theirs(golden, tmp_path_factory) -> Path:
    """A corpus with the tokenizer of the Hugging Face checkpoint."""
    folder = golden / "huggingface" / "model"
    tokenizer = Tokenizer.from_files(folder / "merges.txt", folder / "vocab.json")
    path = tmp_path_factory.mktemp("theirs") / "corpus"
    write_corpus(path, documents(1), tokenizer, name="t", source={}, validation_fraction=0.3, progress=False)
    return path


def evaluated(folder, corpus):
    """The validation loss of a checkpoint, as evaluation has it."""
    model = checkpoint.load_pretrained(folder)
    windows = validation_windows(Corpus(corpus), model.config.n_ctx, 4)
    return total(window_losses(loss_function(model), windows)).loss


def first_loss(config, monkeypatch) -> float:
    """The validation loss before any training, which is not begun."""
    unreadable(monkeypatch, 0)
    with pytest.raises(Unreadable):
        train(config)
    (line,) = read_history(config.run_dir)["validation"]
    assert line["step"] == 0
    return line["validation_loss"]


def test_fine_tuning_openais(golden, corpus, tmp_path, monkeypatch):
    """Parts are frozen; the folder is gone when it goes on; at a constant rate it goes on for longer than planned."""
    source = shutil.copytree(golden / "openai-test", tmp_path / "openai")
    expected = evaluated(source, corpus)
    given = {v.path: np.asarray(v.value) for v in checkpoint.load_pretrained(source).trainable_variables}
    config = configuration(corpus, tmp_path / "run", **FINE).replace(
        init_from=str(source), freeze=["wte", "h0/mlp"], model={"resid_pdrop": 0.25, "attn_pdrop": 0.0}
    )
    with monkeypatch.context() as patch:
        unreadable(patch, 3)
        with pytest.raises(Unreadable):
            train(config)
    shutil.rmtree(source)
    shape = model_config(config, Corpus(corpus))
    assert (shape.n_ctx, shape.n_embd, shape.resid_pdrop) == (19, 15, 0.25)
    history = train(config)
    assert abs(history["validation"][0]["validation_loss"] - expected) < 1e-5
    assert [line["step"] for line in history["train"]] == [1, 2, 3, 4]
    assert [line["learning_rate"] for line in history["train"]] == [0.0] + [float(np.float32(1e-3))] * 3
    model, _ = checkpoint.load(config.run_dir)
    assert (model.config.n_vocab, model.config.n_ctx, model.config.n_embd) == (257, 19, 15)
    assert (model.config.resid_pdrop, model.config.attn_pdrop, model.config.embd_pdrop) == (0.25, 0.0, 0.1)
    assert len(sample.generate(model, [[1, 2, 3]], 5, seed=0)[0]) <= 5
    for v in model.trainable_variables:
        same = np.array_equal(np.asarray(v.value), given[v.path])
        assert same == (v.path == "model/wte" or v.path.startswith("model/h0/mlp/")), v.path
    longer = config.replace(max_steps=6)
    with pytest.raises(ConfigError, match="max_steps"):
        train(longer)
    history = train(longer.replace(allow_changes=["max_steps"]))
    assert [line["step"] for line in history["train"]] == [1, 2, 3, 4, 5, 6]

    undisturbed = shutil.copytree(golden / "openai-test", source)
    whole = config.replace(run_dir=str(tmp_path / "whole"), init_from=str(undisturbed), max_steps=6)
    train(whole)
    ours = [line for line in trace(config.run_dir) if line["step"] != 4 or "loss" in line]  # one validation more
    assert ours == trace(whole.run_dir)
    assert_same_bits(newest(config.run_dir)[1], newest(whole.run_dir)[1])


def test_fine_tuning_hugging_faces(golden, theirs, corpus, tmp_path, monkeypatch):
    source = golden / "huggingface" / "model"
    config = configuration(theirs, tmp_path / "run", **FINE).replace(init_from=str(source), max_steps=2)
    with pytest.raises((ConfigError, CorpusError), match="tokenizer") as error:
        train(config.replace(corpus=str(corpus)))
    assert str(source) in sentence(error) and str(corpus) in sentence(error)
    assert not (tmp_path / "run").exists()
    shape = training.model_config(config, Corpus(theirs))
    assert (shape.embd_pdrop, shape.attn_pdrop, shape.resid_pdrop) == (0.0, 0.15, 0.05), "its own dropout rates"
    assert abs(first_loss(config, monkeypatch) - evaluated(source, theirs)) < 1e-5


def test_fine_tuning_a_run_of_our_own(reference, corpus, tmp_path, monkeypatch):
    """The newest checkpoint of a run, with its tokenizer; that run is not touched."""
    source = Path(reference.config.run_dir)
    config = configuration(corpus, tmp_path / "run", **FINE).replace(init_from=str(source), max_steps=2, seed=9)
    assert abs(first_loss(config, monkeypatch) - evaluated(source, corpus)) < 1e-5
    assert trace(source) == reference.trace
    own = reference.config.replace(init_from=str(source))
    for restart in (False, True):
        with pytest.raises(ConfigError, match="init_from"):
            train(own, restart=restart)
    assert trace(source) == reference.trace and newest(source)[0] == 60


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"model": {"n_layer": 3}}, r"n_layer=2.*\b3\b"),
        ({"model": {"n_ctx": 11}}, r"n_ctx=19.*\b11\b"),
        ({"size": "117M"}, r"n_(embd|ctx|head|layer)="),
        ({"freeze": ["h7"]}, "freeze.*h7"),
    ],
    ids=str,
)
def test_what_fine_tuning_refuses(golden, corpus, tmp_path, changes, said):
    config = configuration(corpus, tmp_path / "run", **FINE).replace(init_from=str(golden / "openai-test"))
    with pytest.raises(ConfigError, match=said) as error:
        train(config.replace(**changes))
    sentence(error)
    assert not (tmp_path / "run").exists()


def test_a_folder_that_holds_no_model(corpus, tmp_path):
    (tmp_path / "empty").mkdir()
    for source in (tmp_path / "empty", tmp_path / "nowhere"):
        config = configuration(corpus, tmp_path / "run", **FINE).replace(init_from=str(source))
        with pytest.raises((ConfigError, checkpoint.CheckpointError), match=r"hparams\.json") as error:
            train(config)
        assert str(source) in sentence(error)


# --- the command line -------------------------------------------------------------------------------------------------


def command(capfd, *arguments) -> tuple[int, str]:
    """(exit status, the one line on stderr) of `python -m gpt2lib.train`."""
    capfd.readouterr()
    status = training.main([*map(str, arguments)])
    err = capfd.readouterr().err
    assert err.count("\n") <= 1, err
    return status, err


@pytest.mark.parametrize(
    "text, said",
    [
        ("corpus: [\n", "cannot be read"),
        ("- corpus\n", "no fields"),
        ("", "no fields"),
        ("corpus: x\nrun_dir: y\nsedd: 3\n", r"`sedd`.*`seed`"),
        ("corpus: x\nrun_dir: y\nmax_steps: many\n", r"max_steps.*many"),
        ("corpus: x\nrun_dir: y\nlearning_rate: 1e-4\n", r"learning_rate.*1\.0e-4"),
        ("corpus: x\n", "run_dir"),
        ("corpus: nowhere\nrun_dir: y\n", "nowhere"),
        ("corpus: x\nrun_dir: y\n1: 2\n", "`1`"),
    ],
    ids=str,
)
def test_a_bad_file(capfd, tmp_path, monkeypatch, text, said):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "run.yaml"
    path.write_text(text)
    status, err = command(capfd, path)
    assert status == 1 and re.search(said, err), err
    assert [p.name for p in tmp_path.iterdir()] == ["run.yaml"]


def test_files_that_are_not_text_or_not_there(capfd, tmp_path):
    binary = tmp_path / "run.yaml"
    binary.write_bytes(bytes(range(256)))
    (tmp_path / "folder").mkdir()
    (tmp_path / "cut.json").write_text('{"corpus": ')
    for path in (binary, tmp_path / "nowhere.yaml", tmp_path / "folder", tmp_path / "cut.json"):
        status, err = command(capfd, path)
        assert status == 1 and str(path) in err


def test_a_folder_that_cannot_be_written(capfd, corpus, tmp_path):
    (tmp_path / "file").write_text("mine")
    config = configuration(corpus, tmp_path / "file" / "run")
    (tmp_path / "run.json").write_text(json.dumps(config.to_dict()))
    status, err = command(capfd, tmp_path / "run.json")
    assert status == 1 and str(tmp_path / "file") in err


def test_a_run_by_its_folder(capfd, reference, begun, tmp_path, monkeypatch):
    """Moved, and from another place; JSON has numbers such as 1e-05, which YAML takes for text."""
    given = Path(begun.run_dir, "train.json")
    given.write_text(json.dumps(begun.replace(run_dir="was/elsewhere", max_minutes=1e-05).to_dict()))
    monkeypatch.chdir(tmp_path)
    assert command(capfd, "run") == (75, "")
    assert reference.check("run") == 56
    given.write_text(json.dumps(begun.to_dict()))
    assert command(capfd, "run") == (0, "")
    reference.check("run", finished=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]
    before = given.stat().st_mtime_ns
    assert command(capfd, "run") == (0, "") and given.stat().st_mtime_ns == before, "a finished run is finished"
    given.write_text(json.dumps(begun.replace(max_minutes=1e-05).to_dict()))
    assert command(capfd, "run", "--restart") == (75, "")
    assert reference.check("run") == 1
