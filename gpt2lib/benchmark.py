"""How fast training, evaluation and generation are, beside Hugging Face's GPT-2 in PyTorch.

Each contender is a process of its own that answers on its standard output, one JSON object a line, and waits while
another one works. So all see the same machine in the same minutes, and medians of their turns may be divided by each
other.
"""

import collections
import json
import math
import os
import re
import resource
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

_RESULT = "gpt2lib.benchmark "


class Contender:
    """A process that measures one thing when told to: `gpt2lib.benchmark.WORKERS[kind](**options)`."""

    def __init__(self, kind: str, **options):
        self.options = {"kind": kind, **options}
        self.errors = tempfile.TemporaryFile("w+")  # a pipe that nobody reads would fill up and block it
        self.process = subprocess.Popen(
            [sys.executable, "-m", "gpt2lib.benchmark", json.dumps(self.options)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors, text=True,
        )  # fmt: skip
        self.started = self._answer()  # what it says of its start

    def _answer(self) -> dict:
        for line in self.process.stdout:
            if line.startswith(_RESULT):
                return json.loads(line.removeprefix(_RESULT))
        self.errors.seek(0)
        raise RuntimeError(f"the benchmark of {self.options} ended early: {self.errors.read()[-2000:]}")

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
    """Start contenders, one after another, and let them take turns: what each said at its start, its turns, its end."""
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
# Each is a generator: it yields once when it is ready and once for each turn, and returns what it says at its end.


def train_ours(shape, batch_size, dtype, steps=2, loop_steps=20):
    """Seconds of the compiled train step alone; at the end, what a step costs inside `train`, with data and metrics."""
    from unittest import mock

    from gpt2lib import device

    described = device.setup()
    from gpt2lib import train as training
    from gpt2lib.config import ModelConfig, TrainConfig
    from gpt2lib.data import write_corpus
    from gpt2lib.tokenizer import Tokenizer

    shape, random = ModelConfig.from_dict(shape), np.random.default_rng(0)
    config = TrainConfig(
        corpus="", run_dir="", optimizer="adamw", learning_rate=1e-4, weight_decay=0.01, dtype=dtype,
        batch_size=batch_size, max_steps=loop_steps, warmup_steps=1, checkpoint_every=loop_steps,
        validate_every=loop_steps, validation_windows=2, model=shape.to_dict(),
    )  # fmt: skip
    step = training._build(config, shape, device.places())
    tokens = random.integers(0, shape.n_vocab, (batch_size, shape.n_ctx + 1))
    step(tokens, 0)
    command = yield {"first_step_seconds": _age(), "device": described}
    while command == "turn":
        command = yield {"seconds": [_timed(lambda: float(step(tokens, 1, False)["loss"])) for _ in range(steps)]}

    bare, kind = [], type(step)
    call = kind.__call__

    def watched(self, tokens, index, sizes):
        began = time.perf_counter()
        measures = call(self, tokens, index, sizes)
        if not sizes:
            float(measures["loss"])
            bare.append(time.perf_counter() - began)
        return measures

    with tempfile.TemporaryDirectory() as folder:
        texts = ("".join(map(chr, random.integers(97, 123, 2 * shape.n_ctx))) for _ in range(40 * batch_size))
        write_corpus(f"{folder}/corpus", texts, Tokenizer([]), name="letters", source={}, progress=False)
        config = config.replace(corpus=f"{folder}/corpus", run_dir=f"{folder}/run")
        with mock.patch.object(training, "_build", lambda *_: step), mock.patch.object(kind, "__call__", watched):
            history = training.train(config)
    return {"step_seconds": float(np.median(bare)), "loop_seconds": history["train"][-1]["seconds"] / loop_steps}


def train_huggingface(shape, batch_size, dtype, steps=2, fused=False):
    """Seconds of a train step of transformers' GPT2LMHeadModel, written as its users write it, with torch's AdamW."""
    import contextlib

    import torch

    model = _huggingface(shape).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.01, fused=fused or None)
    tokens = torch.randint(0, shape["n_vocab"], (batch_size, shape["n_ctx"]))

    def step():
        low = torch.autocast("cpu", torch.bfloat16) if dtype == "mixed_bfloat16" else contextlib.nullcontext()
        with low:
            loss = model(tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        float(loss)

    step()
    command = yield {"first_step_seconds": _age(), "device": f"torch {torch.__version__}"}
    while command == "turn":
        command = yield {"seconds": [_timed(step) for _ in range(steps)]}


def evaluate_ours(shape, batch_size, dtype, steps=2, lengths=()):
    """Seconds for the losses of all tokens of a batch; at the end, of the last 2 of passages of `lengths`."""
    from gpt2lib import device

    described = device.setup()
    from gpt2lib.config import ModelConfig
    from gpt2lib.evaluate.score import Scorer
    from gpt2lib.model import GPT2

    shape, random = ModelConfig.from_dict(shape), np.random.default_rng(0)
    scorer = Scorer(GPT2(shape, dtype=dtype), batch_tokens=batch_size * shape.n_ctx)
    passages = random.integers(0, shape.n_vocab, (batch_size, shape.n_ctx + 1)).tolist()
    scorer.passages(passages)
    command = yield {"first_step_seconds": _age(), "device": described}
    while command == "turn":
        command = yield {"seconds": [_timed(lambda: scorer.passages(passages)) for _ in range(steps)]}
    if not lengths:
        return {}
    scorer.batch_tokens = 4096
    some = [random.integers(0, shape.n_vocab, length).tolist() for length in lengths]
    return {"passages_seconds": _timed(lambda: scorer.passages(some, [2] * len(some)))}


def prefill_ours(shape, batch_size, dtype, steps=2):
    """Seconds for the first token after prompts as long as the context."""
    from gpt2lib import device

    described = device.setup()
    from gpt2lib.config import ModelConfig
    from gpt2lib.model import GPT2
    from gpt2lib.sample import generate

    shape, random = ModelConfig.from_dict(shape), np.random.default_rng(0)
    model = GPT2(shape, dtype=dtype)
    prompts = random.integers(0, shape.n_vocab, (batch_size, shape.n_ctx)).tolist()
    generate(model, prompts, 1, temperature=0)
    command = yield {"device": described}
    while command == "turn":
        command = yield {"seconds": [_timed(lambda: generate(model, prompts, 1, temperature=0)) for _ in range(steps)]}


def evaluate_huggingface(shape, batch_size, dtype, steps=2):
    """Seconds of a forward pass of transformers' GPT2LMHeadModel with the losses of all tokens of a batch."""
    import contextlib

    import torch

    model = _huggingface(shape).eval()
    tokens = torch.randint(0, shape["n_vocab"], (batch_size, shape["n_ctx"]))

    def step():
        low = torch.autocast("cpu", torch.bfloat16) if dtype == "mixed_bfloat16" else contextlib.nullcontext()
        with torch.inference_mode(), low:
            float(model(tokens, labels=tokens).loss)

    step()
    command = yield {"first_step_seconds": _age(), "device": f"torch {torch.__version__}"}
    while command == "turn":
        command = yield {"seconds": [_timed(step) for _ in range(steps)]}


def generate_ours(shape, batch_size, dtype, steps=2, prompt=16, length=128, int8=False):
    """Seconds of greedy texts of `length` tokens, and of their first one, for which the prompts are read; at the start
    those of two tokens of a new shape, which compile, and again.

    Also the bytes of parameters and cache that are read for each token.
    """
    from gpt2lib import device

    described = device.setup()
    from gpt2lib.config import ModelConfig
    from gpt2lib.model import GPT2, quantized
    from gpt2lib.sample import cache_length, generate

    shape, random = ModelConfig.from_dict(shape), np.random.default_rng(0)
    model = GPT2(shape, dtype=dtype)
    model = quantized(model) if int8 else model
    prompts = random.integers(0, shape.n_vocab, (batch_size, prompt)).tolist()

    def step(length=length):
        generate(model, prompts, length, temperature=0, end_of_text=None)

    new = _timed(lambda: step(2))  # both programs, for a cache of another length
    again = _timed(lambda: step(2))
    step()
    matrices = sum(math.prod(v.shape) for v in model.weights if v.path.endswith("/w"))
    each = 1 if int8 else 2 if "bfloat16" in dtype else 4
    cached = 2 * shape.n_layer * shape.n_embd * batch_size * cache_length(prompt, length)
    wte = (1 if int8 else 2 if dtype == "bfloat16" else 4) * shape.n_vocab * shape.n_embd
    read = each * matrices + wte + 4 * cached
    command = yield {"new_seconds": new, "again_seconds": again, "read_bytes": read, "device": described}
    while command == "turn":
        first = [_timed(lambda: step(1)) for _ in range(steps)]
        command = yield {"seconds": [_timed(step) for _ in range(steps)], "first_seconds": first}


def generate_huggingface(shape, batch_size, dtype, steps=2, prompt=16, length=128):
    """Seconds of transformers' greedy `generate`, all of it in `dtype`."""
    import torch

    model = _huggingface(shape).eval().to(getattr(torch, dtype))
    tokens = torch.randint(0, shape["n_vocab"], (batch_size, prompt))

    def step():
        with torch.inference_mode():
            options = dict(do_sample=False, eos_token_id=None, pad_token_id=0)
            model.generate(tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=length, **options)

    step()
    command = yield {"device": f"torch {torch.__version__}"}
    while command == "turn":
        command = yield {"seconds": [_timed(step) for _ in range(steps)]}


def reading(size=2**29, times=5):
    """The machine's rate of memory reads in bytes/s: NumPy's dot products, by as many threads as there are cores."""
    n = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    arrays = [np.ones(size // 4, np.float32) for _ in range(n)]
    command = yield {}
    with ThreadPoolExecutor(n) as threads:
        while command == "turn":
            seconds = [_timed(lambda: list(threads.map(np.vdot, arrays, arrays))) for _ in range(times)]
            command = yield {"bytes_per_second": n * size / float(np.median(seconds))}


def _huggingface(shape):
    from transformers import GPT2Config, GPT2LMHeadModel

    names = {"n_vocab": "vocab_size", "n_ctx": "n_positions"}
    end = {"bos_token_id": shape["n_vocab"] - 1, "eos_token_id": shape["n_vocab"] - 1}
    return GPT2LMHeadModel(GPT2Config(**{names.get(name, name): value for name, value in shape.items()}, **end))


def machine(dtype, size=2048, times=5):
    """The machine's rate of matrix products [size, size] in FLOP/s, with the backend in use."""
    from gpt2lib import device

    described = device.setup()
    from keras import ops

    a = ops.cast(np.random.default_rng(0).standard_normal((size, size)), dtype)
    product = device.compiled(None, ops.matmul)
    np.asarray(ops.cast(product(a, a), "float32"))
    command = yield {"device": described}
    while command == "turn":
        seconds = [_timed(lambda: np.asarray(product(a, a)[:1, :1])) for _ in range(times)]
        command = yield {"flops": 2 * size**3 / float(np.median(seconds))}


def data(n_tokens, n_ctx=1024, batch_size=8, steps=2000):
    """Tokens/s that reach the training loop on one core, and the memory that reading takes, from a pretended corpus."""
    from gpt2lib.data import Batches, Corpus, prefetch

    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        Batches(Corpus(pretend(folder / "small", 1, 10**5)), batch_size=2, n_ctx=8)[0]  # imports grain
        n_shards = -(-n_tokens // 2**25)
        path = pretend(folder / "corpus", n_shards, n_tokens // n_shards)
        before = anonymous_memory()
        command = yield {}
        while command == "turn":
            batches = Batches(Corpus(path), batch_size=batch_size, n_ctx=n_ctx, seed=1)
            began = time.perf_counter()
            for _ in prefetch(batches, 0, steps):
                pass
            seconds = time.perf_counter() - began
            grown = anonymous_memory() - before
            command = yield {"tokens_per_second": steps * batch_size * n_ctx / seconds, "grown_bytes": grown}


def pretend(folder, n_shards: int, shard_tokens: int) -> Path:
    """A corpus of zeros, as large as one likes, that takes no room on disk."""
    from gpt2lib.tokenizer import Tokenizer

    tokenizer = Tokenizer([])
    tokenizer.save(folder / "tokenizer")
    shards = [
        {"file": f"{i:05d}.bin", "sha256": "", "tokens": shard_tokens, "documents": 1, "bytes": 1}
        for i in range(n_shards)
    ]
    for shard in shards:
        with (folder / shard["file"]).open("wb") as file:
            file.truncate(2 * shard_tokens)
    manifest = {
        "format": 1, "name": "pretended", "source": {}, "validation_fraction": 0.5, "left_out": {},
        "tokenizer": {"n_vocab": 257, "hash": tokenizer.hash}, "splits": {"train": shards, "validation": shards[:1]},
    }  # fmt: skip
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


def anonymous_memory() -> int:
    """Bytes that this process holds itself, without the pages of mapped files, which can be dropped at any time."""
    return int(re.search(r"RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024


def peak_memory() -> int:
    """The most bytes that this process has held. What getrusage says may be its parent's: exec does not reset it."""
    status = Path("/proc/self/status")
    if status.exists():
        return int(re.search(r"VmHWM:\s+(\d+) kB", status.read_text())[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _timed(function) -> float:
    began = time.perf_counter()
    function()
    return time.perf_counter() - began


def _age() -> float:
    """Seconds since this process began."""
    import psutil

    return time.time() - psutil.Process().create_time()


def corpus_ours(warcs, vocabulary):
    """Seconds from WARC files to clean text and from there to token shards."""
    from gpt2lib import corpus
    from gpt2lib.corpus import pipeline
    from gpt2lib.tokenizer import Tokenizer

    tokenizer = Tokenizer.from_files(f"{vocabulary}/vocab.bpe", f"{vocabulary}/encoder.json")
    paths = sorted(Path(warcs).glob("*.warc.gz"))
    command = yield {}
    while command == "turn":
        with tempfile.TemporaryDirectory() as folder:
            began = time.perf_counter()
            found = pipeline.run(f"{folder}/stages", warcs=paths, language=None, progress=False)
            clean = time.perf_counter()
            manifest = corpus.build(f"{folder}/corpus", found["texts"], tokenizer=tokenizer, progress=False)
            ended = time.perf_counter()
        shards = [shard for split in manifest["splits"].values() for shard in split]
        command = yield {
            "seconds": [ended - began],
            "text_seconds": clean - began,
            "token_seconds": ended - clean,
            "documents": sum(shard["documents"] for shard in shards),
            "tokens": sum(shard["tokens"] for shard in shards),
            "text_bytes": sum(shard["bytes"] for shard in shards),
        }


def corpus_datatrove(warcs, vocabulary):
    """The same by datatrove: WARC, trafilatura, ftfy, rules of quality and repeated lines, MinHash, tokens.

    Of its repetition filter only the rules about lines, and no filter of languages, whose model is a download.
    """
    from datatrove.executor.local import LocalPipelineExecutor
    from datatrove.pipeline.dedup import (
        MinhashDedupBuckets,
        MinhashDedupCluster,
        MinhashDedupFilter,
        MinhashDedupSignature,
    )
    from datatrove.pipeline.dedup.minhash import MinhashConfig
    from datatrove.pipeline.extractors import Trafilatura
    from datatrove.pipeline.filters import GopherQualityFilter, GopherRepetitionFilter
    from datatrove.pipeline.formatters import FTFYFormatter
    from datatrove.pipeline.readers import JsonlReader, WarcReader
    from datatrove.pipeline.tokens import DocumentTokenizer
    from datatrove.pipeline.writers import JsonlWriter
    from tokenizers import ByteLevelBPETokenizer

    from gpt2lib.corpus.duplicates import BANDS, ROWS, SHINGLE

    cores, n_files = os.cpu_count(), len(list(Path(warcs).glob("*.warc.gz")))
    config = MinhashConfig(n_grams=SHINGLE, num_buckets=BANDS, hashes_per_bucket=ROWS)
    command = yield {}
    while command == "turn":
        with tempfile.TemporaryDirectory() as folder:
            tokenizer = ByteLevelBPETokenizer(f"{vocabulary}/encoder.json", f"{vocabulary}/vocab.bpe")
            tokenizer.save(f"{folder}/tokenizer.json")

            def run(n, name, *steps, folder=folder):
                LocalPipelineExecutor(list(steps), n, workers=cores, logging_dir=f"{folder}/log/{name}").run()

            began = time.perf_counter()
            run(
                n_files, "texts", WarcReader(warcs, glob_pattern="*.warc.gz"), Trafilatura(favour_precision=False),
                FTFYFormatter(), GopherQualityFilter(), GopherRepetitionFilter(top_n_grams=(), dup_n_grams=()),
                JsonlWriter(f"{folder}/texts"),
            )  # fmt: skip
            texts = JsonlReader(f"{folder}/texts")
            run(n_files, "signatures", texts, MinhashDedupSignature(f"{folder}/signatures", config=config))
            run(BANDS, "buckets", MinhashDedupBuckets(f"{folder}/signatures", f"{folder}/buckets", config=config))
            run(1, "clusters", MinhashDedupCluster(f"{folder}/buckets", f"{folder}/removed", config=config))
            removed = MinhashDedupFilter(f"{folder}/removed")
            run(n_files, "unique", texts, removed, JsonlWriter(f"{folder}/unique"))
            clean = time.perf_counter()
            options = {"tokenizer_name_or_path": f"{folder}/tokenizer.json", "shuffle_documents": False}
            tokens = DocumentTokenizer(f"{folder}/tokens", **options)
            run(n_files, "tokens", JsonlReader(f"{folder}/unique"), tokens)
            ended = time.perf_counter()
            stats = json.loads(Path(f"{folder}/log/tokens/stats.json").read_text())[0]["stats"]
        command = yield {
            "seconds": [ended - began],
            "text_seconds": clean - began,
            "token_seconds": ended - clean,
            "documents": stats["documents"]["total"],
        }


def tokenize(texts, vocabulary, what="corpus"):
    """Seconds to write a corpus of texts that lie in files.

    `what`: `corpus`, or only the texts' ids: by `Tokenizer.encode_each` (`ids`) or by tiktoken's batches (`library`).
    """
    from gpt2lib import corpus
    from gpt2lib.corpus import files
    from gpt2lib.tokenizer import Tokenizer

    tokenizer = Tokenizer.from_files(f"{vocabulary}/vocab.bpe", f"{vocabulary}/encoder.json")
    documents = list(files.documents(texts))
    encoded_bytes = sum(len(document.encode()) for document in documents)
    command = yield {"bytes": encoded_bytes}
    while command == "turn":
        with tempfile.TemporaryDirectory() as folder:
            began = time.perf_counter()
            if what == "library":
                tokenizer._bpe.encode_ordinary_batch(documents, num_threads=os.cpu_count())
            elif what == "ids":
                collections.deque(tokenizer.encode_each(documents), maxlen=0)
            else:
                corpus.build(f"{folder}/corpus", texts, tokenizer=tokenizer, progress=False)
            command = yield {"seconds": [time.perf_counter() - began]}


def write_pages(texts, folder, n_files: int = 8) -> int:
    """Texts as pages of HTML with menus, styles and scripts around them, in WARC files; returns the bytes of HTML."""
    import contextlib
    import html

    from gpt2lib.corpus.crawl import Page, WarcFile

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    style = "".join(f".c{i} {{ margin: {i}px; padding: 0; color: #333 }}\n" for i in range(60))
    script = "var a = 1; function f(x) { return x + a }\n" * 60
    menu = "".join(f'<li class="c{i}"><a href="/section/{i}">Section {i}</a></li>' for i in range(30))
    aside = "".join(f'<div class="c{i}"><h4><a href="/x/{i}">Another story, {i}</a></h4></div>' for i in range(15))
    size = 0
    with contextlib.ExitStack() as stack:
        names = [folder / f"{n:02}.warc.gz" for n in range(n_files)]
        warcs = [WarcFile(stack.enter_context(name.open("wb"))) for name in names]
        for i, text in enumerate(texts):
            title = html.escape(" ".join(text[:60].split()))
            paragraphs = "".join(f"<p>{html.escape(p)}</p>\n" for p in text.split("\n") if p.strip())
            body = (
                f"<!DOCTYPE html><html><head><title>{title}</title><style>{style}</style><script>{script}</script>"
                f"</head><body><nav><ul>{menu}</ul></nav><article><h1>{title}</h1>{paragraphs}</article>"
                f"<aside>{aside}</aside><footer>Copyright</footer></body></html>"
            ).encode("utf-8", "replace")
            size += len(body)
            url = f"https://site{i % 200}.example/{i}"
            warcs[i % n_files].add(url, Page(url, [("Content-Type", "text/html; charset=utf-8")], body))
    return size


WORKERS = {
    f.__name__: f
    for f in (
        train_ours, train_huggingface, evaluate_ours, evaluate_huggingface, prefill_ours, generate_ours,
        generate_huggingface, machine, reading, data, corpus_ours, corpus_datatrove, tokenize,
    )
}  # fmt: skip


def _work(kind, **options):
    """Answer the commands of a `Contender`."""

    def answer(message):
        print(_RESULT + json.dumps(message), flush=True)

    worker = WORKERS[kind](**options)
    answer(next(worker))
    for line in sys.stdin:
        try:
            answer(worker.send(line.strip()))
        except StopIteration as end:
            answer({**(end.value or {}), "peak_bytes": peak_memory()})
            return


if __name__ == "__main__":
    _work(**json.loads(sys.argv[1]))
