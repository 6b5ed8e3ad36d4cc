"""What a run costs on a TPU, before anyone has one: memory, operations, time and money.

    python -m gpt2lib.plan 1.5B --topology v3-8 --optimizer adamw

The program that `train` would run is compiled by Google's own compiler, in the `libtpu` wheel, on any x86-64 Linux.
Elsewhere what it would say is estimated (`counts.memory`).
"""

import dataclasses
import importlib.metadata
import importlib.util
import itertools
import json
import math
import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from gpt2lib.config import ConfigError, TrainConfig
from gpt2lib.plan.compiler import environment
from gpt2lib.plan.counts import memory, model_flops, training_flops
from gpt2lib.plan.topology import Topology, find
from gpt2lib.report import workspace

_PROGRAMS = ("train", "evaluate", "generate")
_TRIED = "libtpu 0.0.52 and jax 0.10.2"


class PlanError(RuntimeError):
    """No plan could be made; the message says why and what to do."""


class NoRoom(PlanError):
    """The compiler refuses a step for want of another memory than that of the parameters; it says no total."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """A program of a run on a slice of TPUs. Bytes and operations are those of one device."""

    config: TrainConfig
    slice: Topology
    program: str  # train | evaluate | generate
    fits: bool
    total: int  # bytes of memory that it needs
    limit: int  # bytes of memory that it may use
    arguments: int | None = None  # of these: parameters, slots, tokens
    temporaries: int | None = None  # of these: gradients, activations
    flops: float | None = None
    bytes_accessed: float | None = None  # as the compiler counts them, those of the cores' fast memory too
    memory_traffic: float | None = None  # bytes read from the device's memory or written to it
    optimal_seconds: float | None = None  # the compiler's own guess; not to be trusted on every generation
    collectives: dict = dataclasses.field(default_factory=dict)  # {kind: {"count", "bytes"}} of what devices exchange
    compile_seconds: float | None = None
    details: dict = dataclasses.field(default_factory=dict, repr=False)  # versions, hash, memory of the compiler
    source: str = "compiler"  # compiler | estimate

    @property
    def batch_per_device(self) -> int:
        """Sequences that a device computes at once."""
        return self.config.batch_size // self.config.accumulate // self.slice.devices

    @property
    def tokens(self) -> int:
        """Tokens of a step, over all devices."""
        return self.config.batch_tokens

    @property
    def roofline_seconds(self) -> float | None:
        """A step's time if nothing but matrix units or memory limited it (Williams, Waterman and Patterson 2009)."""
        if self.flops is None:
            return None
        return max(self.flops / self.slice.peak, (self.memory_traffic or 0) / self.slice.bandwidth)

    @property
    def seconds(self) -> float | None:
        """A step's time: the compiler's own on v2 and v3, elsewhere, where that is no time, the roofline's."""
        own = self.slice.version in ("v2", "v3") and self.source == "compiler"
        return self.optimal_seconds if own else self.roofline_seconds

    def mfu(self, seconds: float) -> float:
        """Model FLOPs utilisation of steps that take so long: `counts.model_flops` over what the devices could do."""
        useful = model_flops(self.config.model_config()) * self.tokens
        return useful / (seconds * self.slice.peak * self.slice.devices)

    def hours(self, tokens: float) -> float:
        """Hours of training on so many tokens, at `seconds` a step."""
        return tokens / self.tokens * self.seconds / 3600

    def cost(self, tokens: float, price: float) -> float:
        """What that costs at a price for one chip and one hour."""
        return self.hours(tokens) * price * math.prod(self.slice.chips)

    def means(self) -> dict:
        """The fields of TrainConfig that save memory, where they are not the usual ones."""
        c = self.config
        usual = {"remat": False, "sharded": False, "accumulate": 1, "loss_chunk": None}
        return {name: getattr(c, name) for name in usual if getattr(c, name) != usual[name]}

    def sentence(self) -> str:
        """What came out, for people."""
        c, gib = self.config, 2**30
        what = f"{c.size} with {c.optimizer} in {c.dtype}, {self.batch_per_device} x {c.model_config().n_ctx} tokens a "
        what += f"core of {self.slice.name}{''.join(f', {name}={value}' for name, value in self.means().items())}"
        sizes = f"{self.total / gib:.2f} GiB of {self.limit / gib:.2f}"
        if self.source == "estimate":
            sizes += " by an estimate"
        if self.fits:
            return f"{what}: fits, {sizes}"
        lacking = (self.total - self.limit) / gib
        advice = "; ".join(f"{means}: about {total / gib:.1f} GiB" for means, total in self.remedies().items())
        advice = f"what would fit: {advice}" if advice else "no means of this program would make it fit"
        return f"{what}: does not fit, {sizes}, {lacking:.2f} too many; {advice}"

    def remedies(self) -> dict[str, int]:
        """What would make it fit, and the bytes that it would then need, by the estimate: as few changes as can be."""
        c, devices = self.config, self.slice.devices
        changes = {}
        if self.batch_per_device > 1:
            changes["accumulate"] = c.accumulate * self.batch_per_device
        if not c.remat:
            changes["remat"] = True
        if c.loss_chunk is None:
            changes["loss_chunk"] = 1024
        if not c.sharded and devices > 1:
            changes["sharded"] = True
        if c.dtype == "float32":
            changes["dtype"] = "mixed_bfloat16"
        if c.optimizer == "adamw":
            changes["optimizer"] = "adafactor"

        def needed(changed):
            if "accumulate" in changed and c.batch_size % changed["accumulate"]:
                return math.inf
            before, after = (memory(x, devices)["total"] for x in (c, c.replace(**changed)))
            return self.total * after / before

        def named(changed):
            return ", ".join(f"{name}={value}" for name, value in changed.items())

        for several in range(1, len(changes) + 1):
            options = [dict(some) for some in itertools.combinations(changes.items(), several)]
            fitting = {named(x): int(needed(x)) for x in options if needed(x) <= self.limit}
            if fitting:
                return dict(sorted(fitting.items(), key=lambda item: item[1])[:3])
        return {}

    def to_dict(self) -> dict:
        """What a report records of it."""
        c, names = self.config, ("flops", "bytes_accessed", "memory_traffic", "optimal_seconds", "compile_seconds")
        out = {"size": c.size, "optimizer": c.optimizer, "dtype": c.dtype, "topology": self.slice.name}
        out |= {"batch_per_device": self.batch_per_device, **self.means(), "source": self.source, "fits": self.fits}
        out |= {"total": self.total, "limit": self.limit, "arguments": self.arguments, "temporaries": self.temporaries}
        if self.fits:
            out |= {name: getattr(self, name) for name in names} | {"collectives": self.collectives}
            out |= {"seconds": self.seconds, "mfu": self.mfu(self.seconds), "tokens": self.tokens}
            out |= {"roofline_seconds": self.roofline_seconds, "roofline_mfu": self.mfu(self.roofline_seconds)}
        return out | {"host_bytes": self.details.get("host_bytes"), "program_hash": self.details.get("program_hash")}


def libtpu() -> str | None:
    """The file of the compiler; None where there is none."""
    if path := os.environ.get("TPU_LIBRARY_PATH"):
        return path
    spec = importlib.util.find_spec("libtpu")
    return str(Path(spec.origin).parent / "libtpu.so") if spec and spec.origin else None


def plan(
    size: str,
    optimizer: str = "adafactor",
    dtype: str = "mixed_bfloat16",
    batch_per_device: int = 1,
    topology: str = "v3-8",
    program: str = "train",
    sample: tuple[int, int] = (16, 16),
    cache: str | Path | None = None,
    text: str | Path | None = None,
    **fields,
) -> Plan:
    """Compile a program of a run for a slice of TPUs.

    Args:
        size: of the model, a name in SIZES.
        optimizer, dtype: as in TrainConfig.
        batch_per_device: sequences that a device computes at once; with `accumulate` it does so as often.
        topology: a slice such as v3-8, v5e-1, v6e-8.
        program: train: the step of `train`; evaluate: losses of a batch; generate: `sample` = (prompt, new) tokens.
        cache: folder of what was compiled before, by the hash of the program; None: data/plan.
        text: a file for the compiled program, to be read.
        fields: others of TrainConfig that shape the program: remat, sharded, accumulate, loss_chunk, model, ...

    Where there is no compiler, `train` is estimated: `source` says so.

    Raises: ConfigError for a name that there is not; PlanError where the compiler cannot be used.
    """
    slice_ = find(topology)
    if program not in _PROGRAMS:
        raise ConfigError(f"there is no program `{program}`; valid: {', '.join(_PROGRAMS)}")
    if batch_per_device < 1:
        raise ConfigError(f"batch_per_device must be at least 1, got {batch_per_device}")
    config = TrainConfig.from_dict(
        dict(corpus="", run_dir="", size=size, optimizer=optimizer, dtype=dtype, learning_rate=2.5e-4)
        | {"batch_size": batch_per_device * slice_.devices * fields.get("accumulate", 1)}
        | fields
    )
    library = libtpu()
    if library is None:
        return _estimate(config, slice_, program)
    request = {
        "program": program,
        "topology": slice_.name,
        "config": config.to_dict(),
        "sample": list(sample),
        "cache": str(cache or workspace() / "data" / "plan"),
        "text": text and str(text),
    }
    answer = _ask(request, library)
    names = {f.name for f in dataclasses.fields(Plan)}
    details = {name: value for name, value in answer.items() if name not in names}
    known = {name: value for name, value in answer.items() if name in names}
    return Plan(config=config, slice=slice_, program=program, details=details, **known)


def plans(requests: list[dict], workers: int = 1, progress=None) -> list[Plan]:
    """A plan for each request, the arguments of `plan`; `workers` compile at a time.

    The compiler needs 3 GB of the host's memory for 117M and 13 GB for 1.5B. `progress(plans,
    total)` wraps the plans as they come, such as tqdm.
    """
    with ThreadPoolExecutor(workers) as pool:
        made = pool.map(lambda request: plan(**request), requests)
        return list(progress(made, total=len(requests)) if progress else made)


def largest_batch(**request) -> list[Plan]:
    """Plans at one sequence a device, at two, and so on to the most that fits; `request` has the arguments of `plan`.

    Memory grows in proportion to the batch, until the compiler begins to compute things again instead of keeping
    them: the line through the largest that fits and its neighbour, refused or smaller, says which one to try next, but
    not more than twice as many, until none is left between.
    """
    made, refused = {1: plan(batch_per_device=1, **request)}, math.inf

    def attempt(batch):
        nonlocal refused
        try:
            made[batch] = plan(batch_per_device=batch, **request)
            fits = made[batch].fits
        except NoRoom:
            fits = False
        if not fits:
            refused = min(refused, batch)

    if made[1].fits:
        attempt(2)
    while made[1].fits:
        largest = max(batch for batch in made if made[batch].fits)
        smaller = max((batch for batch in made if batch < largest), default=None)
        other = refused if refused in made else smaller
        batch = refused - 1
        if other is not None:
            slope = max(1, (made[other].total - made[largest].total) / (other - largest))
            batch = largest + int((made[largest].limit - made[largest].total) / slope)
        batch = min(batch, refused - 1, max(2 * largest, 16))
        if batch <= largest:
            break
        attempt(batch)
    return [made[batch] for batch in sorted(made)]


def _estimate(config, slice_, program) -> Plan:
    """A plan of the train step without a compiler."""
    if program != "train":
        raise PlanError(
            f"there is no TPU compiler here, and only `train` can be estimated, not `{program}`; on x86-64 Linux run: "
            "pip install -c constraints.txt -e '.[plan]'"
        )
    needed = memory(config, slice_.devices, room=slice_.memory, thrifty=slice_.version == "v6e")
    flops = training_flops(config.model_config()) * config.batch_tokens / slice_.devices
    total, limit = needed["total"], int(slice_.memory * 0.97)  # the rest is the runtime's
    return Plan(
        config=config, slice=slice_, program=program, fits=total <= limit, total=total, limit=limit,
        arguments=needed["state"], temporaries=total - needed["state"], flops=flops, source="estimate",
    )  # fmt: skip


def _ask(request: dict, library: str) -> dict:
    """The answer of a process of the compiler's own."""
    done = subprocess.run(
        [sys.executable, "-m", "gpt2lib.plan.compiler"],
        input=json.dumps(request), capture_output=True, text=True, env={**os.environ, **environment(library)},
    )  # fmt: skip
    answer = json.loads(done.stdout.splitlines()[-1]) if done.returncode == 0 else {}
    if answer and "error" not in answer:
        return answer
    if "Ran out of memory in memory space" in answer.get("error", ""):  # another one than that of the parameters
        raise NoRoom(f"the TPU compiler has no room for so large a step ({answer['error']}); take a smaller batch")
    name = "libtpu " + _version("libtpu")
    if done.returncode < 0:
        how = f"ended with {signal.Signals(-done.returncode).name}"
    else:
        how = f"failed: {answer.get('error', done.stderr[-300:])}"
    raise PlanError(
        f"the TPU compiler ({name}, jax {_version('jax')}) {how}; plans were made with {_TRIED}: in an environment of "
        "its own run: pip install -c constraints.txt -e '.[plan]'"
    )


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "(not installed)"
