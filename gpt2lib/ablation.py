"""The runs of an ablation: each is kept in its folder as it ends, and several go on at a time, on a core each.

A small model leaves most of the cores idle that one step could use, so runs side by side end sooner than one by one.
"""

import json
import multiprocessing
import os
import threading
import warnings
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

from tqdm import tqdm

from gpt2lib.config import Reading, TrainConfig
from gpt2lib.report import locate, workspace, write_atomically


def _kept(config: TrainConfig) -> tuple[Path, dict | None]:
    """Where a run is kept, and what was said of it, if that was with this configuration."""
    place = locate(config.run_dir) / "ablation.json"
    said = json.loads(place.read_text()) if place.exists() else {}
    return place, said if said.get("config") == config.to_dict() else None


def run(config: dict, tasks=(), benchmarks="data/benchmarks", download=False) -> dict:
    """Train, or read what was trained with this very configuration.

    Args:
        config: the fields of a `TrainConfig`; what is said is kept in its `run_dir`.
        tasks: of which the last checkpoint's zero-shot perplexity is measured, such as wikitext2.
        benchmarks: the folder of their files.
        download: whether to fetch a file that is not there; a task without its file is left out.

    Returns: config, loss (last of the validation, nats per token; None where it diverged), diverged (how, or None),
        curve [[tokens seen, validation loss]], layers [[tokens seen, {block: [RMS of update, RMS of parameters]}]],
        perplexities {task: per unit of the task}, left_out {task: why}, documents (distinct ones seen in all steps),
        distinct_tokens (see `reading.seen`), parameters, seconds.

    Raises: what `train` raises, but Diverged: that is a result.
    """
    config = TrainConfig.from_dict(config)
    place, said = _kept(config)
    if said is not None:
        return said
    from gpt2lib import checkpoint
    from gpt2lib.data import Batches, Corpus
    from gpt2lib.evaluate import suite
    from gpt2lib.evaluate.score import Scorer
    from gpt2lib.reading import ReadBatches, seen
    from gpt2lib.train import Diverged, model_config, train

    data, perplexities, left_out, diverged = Corpus(locate(config.corpus)), {}, {}, None
    shape, options = model_config(config, data), suite.Options(variants=False)
    try:
        with warnings.catch_warnings():  # of spikes, that small batches have; incidents.jsonl has them
            warnings.filterwarnings("ignore", r"step \d+: the loss")
            history = train(config)
        model, _ = checkpoint.load(place.parent)
    except Diverged as error:
        diverged = str(error).replace(f"{workspace()}/", "")
        lines = [json.loads(line) for line in (place.parent / "metrics.jsonl").read_text().splitlines()]
        history = {
            "validation": [x for x in lines if "validation_loss" in x],
            "train": [x for x in lines if "loss" in x],
        }
    for task in () if diverged else tasks:
        try:
            figures, _ = suite.measure(task, Scorer(model), data.tokenizer, locate(benchmarks), options, download)
            perplexities[task] = next(iter(figures.values()))["perplexity"]
        except suite.PROBLEMS as problem:
            left_out[task] = str(problem)
    order = dict(batch_size=config.batch_size, n_ctx=shape.n_ctx, seed=config.seed)
    batches = (
        ReadBatches(data, Reading.from_dict(config.reading), **order) if config.reading else Batches(data, **order)
    )
    documents, distinct_tokens = seen(batches, config.max_steps)
    said = {
        "config": config.to_dict(),
        "loss": None if diverged else history["validation"][-1]["validation_loss"],
        "diverged": diverged,
        "curve": [[x["tokens_seen"], x["validation_loss"]] for x in history["validation"]],
        "layers": [[x["tokens_seen"], x["layers"]] for x in history["train"] if "layers" in x],
        "perplexities": perplexities,
        "left_out": left_out,
        "documents": documents,
        "distinct_tokens": distinct_tokens,
        "parameters": shape.n_params,
        "seconds": max(x["seconds"] for x in history["train"] + history["validation"]),
    }
    write_atomically(place, json.dumps(said).encode())
    return said


def run_all(configs: list[dict], workers: int | None = None, progress: bool = True, **options) -> list[dict]:
    """What `run` says of each, in their order. The first are begun first.

    Args:
        configs: the fields of a `TrainConfig` each.
        workers: processes at a time, with a core each where the system can tie them to it; None: as many as there are
            cores, on an accelerator 1. 1 runs them in this process.
        progress: show a bar.
        options: tasks, benchmarks, download, as for `run`.

    Raises: ConfigError before anything runs; what `train` raises, after the runs that had begun were stopped.
    """
    from gpt2lib import device

    found = [_kept(TrainConfig.from_dict(config))[1] for config in configs]
    missing = [i for i, said in enumerate(found) if said is None]
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count()))
    workers = min(workers or (len(cores) if device.is_cpu() else 1), len(missing))
    with tqdm(total=len(configs), initial=len(configs) - len(missing), desc="runs", disable=not progress) as bar:
        if workers < 2:
            for i in missing:
                found[i] = run(configs[i], **options)
                bar.update()
            return found
        others, context = set(multiprocessing.active_children()), multiprocessing.get_context("spawn")
        free = context.Queue()
        for i in range(workers):
            free.put(cores[i % len(cores)])
        with ProcessPoolExecutor(workers, context, _begin, (free,)) as pool:
            asked = {pool.submit(run, configs[i], **options): i for i in missing}
            try:
                for one in as_completed(asked):
                    found[asked[one]] = one.result()
                    bar.update()
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                for process in set(multiprocessing.active_children()) - others:
                    process.terminate()
                raise
    return found


def _begin(free):
    """At the start of a worker: it keeps to one core, and ends when the process ends that it works for."""
    core = free.get()
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {core})
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()
    from gpt2lib import device

    device.setup()
