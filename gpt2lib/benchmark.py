"""How fast training is, beside Hugging Face's GPT-2 in PyTorch: each contender in a process of its own, taking turns.

Worker processes answer on their standard output, one JSON object a line, and wait while another one works. So both see
the same machine in the same minutes, and medians of their turns may be divided by each other.
"""

import json
import os
import resource
import subprocess
import sys
import tempfile
import time

import numpy as np

_RESULT = "gpt2lib.benchmark "


class Contender:
    """A process that measures one thing when told to: `gpt2lib.benchmark.WORKERS[kind](**options)`."""

    def __init__(self, kind: str, **options):
        self.options = {"kind": kind, **options}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "gpt2lib.benchmark", json.dumps(self.options)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        self.started = self._answer()  # what it says of its start

    def _answer(self) -> dict:
        for line in self.process.stdout:
            if line.startswith(_RESULT):
                return json.loads(line.removeprefix(_RESULT))
        error = self.process.stderr.read()[-2000:]
        raise RuntimeError(f"the benchmark of {self.options} ended early: {error}")

    def turn(self) -> dict:
        """Measure once more."""
        print("turn", file=self.process.stdin, flush=True)
        return self._answer()

    def end(self) -> dict:
        """Let it go; returns {"peak_bytes": most memory that it held}."""
        print("end", file=self.process.stdin, flush=True)
        answer = self._answer()
        self.process.communicate()
        return answer


def race(contenders: dict, turns: int, progress=None) -> dict:
    """Start contenders, one after another, and let them take turns: for each name what it said of start, turns and end."""
    running = {name: Contender(**options) for name, options in contenders.items()}
    said = {name: [] for name in running}
    for _ in progress(range(turns)) if progress else range(turns):
        for name, contender in running.items():
            said[name].append(contender.turn())
    return {
        name: {"start": contender.started, "turns": said[name], **contender.end()}
        for name, contender in running.items()
    }


# --- the workers ------------------------------------------------------------------------------------------------------
# Each is a generator: it yields once when it is ready, and then one measurement for each turn.


def train_ours(size, batch_size, n_ctx, dtype, steps=2):
    """Seconds of the compiled train step alone, and what it costs when `train` runs it with data and metrics."""
    from gpt2lib import device

    started = time.perf_counter()
    described = device.setup()
    from gpt2lib import train as training
    from gpt2lib.config import TrainConfig, size as named
    from gpt2lib.data import Corpus, write_corpus
    from gpt2lib.tokenizer import Tokenizer

    shape = named(size).replace(n_ctx=n_ctx, embd_pdrop=0.0, attn_pdrop=0.0, resid_pdrop=0.0)
    with tempfile.TemporaryDirectory() as folder:
        random = np.random.default_rng(0)
        texts = ("".join(map(chr, random.integers(97, 123, 4 * n_ctx))) for _ in range(40 * batch_size))
        write_corpus(f"{folder}/corpus", texts, Tokenizer([]), name="letters", source={}, progress=False)
        config = TrainConfig(
            corpus=f"{folder}/corpus", run_dir=f"{folder}/run", size=size, optimizer="adamw", learning_rate=1e-4,
            weight_decay=0.01, dtype=dtype, batch_size=batch_size, max_steps=10**6, warmup_steps=10, progress=False,
            model={name: value for name, value in shape.to_dict().items() if name.endswith(("ctx", "vocab", "pdrop"))},
        )  # fmt: skip
        step = training.build_step(config, shape, device.places())
        tokens = random.integers(0, shape.n_vocab, (batch_size, n_ctx + 1))
        step(tokens, 0)
        yield {"first_step_seconds": time.perf_counter() - started, "device": described}
        index = 1
        while True:
            seconds = []
            for _ in range(steps):
                began = time.perf_counter()
                float(step(tokens, index, False)["loss"])
                seconds.append(time.perf_counter() - began)
                index += 1
            yield {"seconds": seconds}


def train_loop(size, batch_size, n_ctx, dtype, steps=20):
    """Share of `train`'s time that is not spent in the compiled step: data, metrics, progress bar."""


def train_huggingface(size, batch_size, n_ctx, dtype, steps=2, fused=False):
    """Seconds of a train step of transformers' GPT2LMHeadModel as its users write it, with torch's AdamW."""
    started = time.perf_counter()
    import contextlib

    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    from gpt2lib.config import size as named

    shape = named(size)
    model = GPT2LMHeadModel(
        GPT2Config(n_embd=shape.n_embd, n_layer=shape.n_layer, n_head=shape.n_head, n_positions=n_ctx, embd_pdrop=0.0,
                   attn_pdrop=0.0, resid_pdrop=0.0)
    )  # fmt: skip
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.01, fused=fused or None)
    tokens = torch.randint(0, shape.n_vocab, (batch_size, n_ctx))

    def step():
        low = torch.autocast("cpu", torch.bfloat16) if dtype == "mixed_bfloat16" else contextlib.nullcontext()
        with low:
            loss = model(tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return float(loss)

    step()
    yield {"first_step_seconds": time.perf_counter() - started, "device": f"torch {torch.__version__}"}
    while True:
        seconds = []
        for _ in range(steps):
            began = time.perf_counter()
            step()
            seconds.append(time.perf_counter() - began)
        yield {"seconds": seconds}
