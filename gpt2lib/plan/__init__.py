"""What a run costs on a TPU, before anyone has one: memory, operations, time and money.

    python -m gpt2lib.plan 1.5B --topology v3-8 --optimizer adamw

The program that `train` would run is compiled by Google's own compiler, in the `libtpu` wheel, on any x86-64 Linux.
"""

import dataclasses
import importlib.metadata
import importlib.util
import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

from gpt2lib.config import ConfigError, TrainConfig
from gpt2lib.plan.compiler import environment
from gpt2lib.plan.counts import model_flops
from gpt2lib.plan.topology import Topology, find
from gpt2lib.report import workspace

_PROGRAMS = ("train", "evaluate", "generate")
_TRIED = "libtpu 0.0.52 and jax 0.10.2"


class PlanError(RuntimeError):
    """No plan could be made; the message says why and what to do."""


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
    bytes_accessed: float | None = None  # read from memory or written to it
    optimal_seconds: float | None = None  # the compiler's own guess; not to be trusted on every generation
    collectives: dict = dataclasses.field(default_factory=dict)  # {kind: {"count", "bytes"}} of what devices exchange
    compile_seconds: float | None = None
    details: dict = dataclasses.field(default_factory=dict, repr=False)  # versions, hash, memory of the compiler
    source: str = "compiler"  # compiler | estimate

    @property
    def tokens(self) -> int:
        """Tokens of a step, over all devices."""
        return self.config.batch_tokens

    @property
    def roofline_seconds(self) -> float | None:
        """A step's time if nothing but matrix units or memory limited it (Williams, Waterman and Patterson 2009)."""
        if self.flops is None:
            return None
        return max(self.flops / self.slice.peak, self.bytes_accessed / self.slice.bandwidth)

    @property
    def seconds(self) -> float | None:
        """A step's time: the compiler's own on v2 and v3, elsewhere, where that is no time, the roofline's."""
        return self.optimal_seconds if self.slice.version in ("v2", "v3") else self.roofline_seconds

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

    def sentence(self) -> str:
        """What came out, for people."""
        c, gib = self.config, 2**30
        what = f"{c.size} with {c.optimizer} in {c.dtype}, {c.batch_size // c.accumulate // self.slice.devices} x "
        what += f"{c.model_config().n_ctx} tokens a core of {self.slice.name}"
        sizes = f"{self.total / gib:.2f} GiB of {self.limit / gib:.2f}"
        if self.fits:
            return f"{what}: fits, {sizes}"
        lacking = (self.total - self.limit) / gib
        return f"{what}: does not fit, {sizes}, {lacking:.2f} too many; {' or '.join(self.remedies())}"

    def remedies(self) -> list[str]:
        """What would need less memory."""
        c = self.config
        found = []
        if c.batch_size // c.accumulate > self.slice.devices:
            found.append("a smaller batch at a time (accumulate)")
        if not c.remat:
            found.append("remat=True")
        if not c.sharded and self.slice.devices > 1:
            found.append("sharded=True")
        if c.loss_chunk is None:
            found.append("loss_chunk=1024")
        if c.optimizer == "adamw":
            found.append("optimizer=adafactor")
        return found or ["a larger slice with sharded=True"]


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
        raise PlanError(
            "there is no TPU compiler here; on x86-64 Linux run: pip install -c constraints.txt -e '.[plan]'"
        )
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


def _ask(request: dict, library: str) -> dict:
    """The answer of a process of the compiler's own."""
    done = subprocess.run(
        [sys.executable, "-m", "gpt2lib.plan.compiler"],
        input=json.dumps(request), capture_output=True, text=True, env={**os.environ, **environment(library)},
    )  # fmt: skip
    answer = json.loads(done.stdout.splitlines()[-1]) if done.returncode == 0 else {}
    if answer and "error" not in answer:
        return answer
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
