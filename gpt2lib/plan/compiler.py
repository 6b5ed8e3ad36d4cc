"""Google's TPU compiler, which the `libtpu` wheel has, given the programs of a run; no TPU, no arrays.

    python -m gpt2lib.plan.compiler < request.json

is the process that `gpt2lib.plan.plan` starts for each plan, so that a compiler that ends its process ends only that
one. It reads a `request` and writes what came of it as one JSON object on its last line.
"""

import hashlib
import importlib.metadata
import json
import math
import re
import resource
import sys
import time
import traceback
from pathlib import Path

_BYTES = {"pred": 1, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4, "f64": 8}
_COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


def environment(libtpu: str) -> dict[str, str]:
    """What must be set before JAX is imported, for a compiler without a TPU."""
    return {
        "KERAS_BACKEND": "jax",
        "JAX_PLATFORMS": "cpu",
        "TPU_SKIP_MDS_QUERY": "1",  # there is no metadata server to ask for the TPU
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # else a second process aborts on a lock file
        "TPU_LIBRARY_PATH": libtpu,
    }


def mesh_of(topology):
    """The mesh with the one axis `data` over the devices of a `Topology`, none of which exists."""
    import numpy as np
    from jax.experimental import topologies
    from jax.sharding import Mesh

    options = {}
    if math.prod(topology.chips) == 1:  # else a host of several chips is assumed
        one = (1,) * 3
        options = dict(chips_per_host_bounds=one, chip_config_name="default", num_slices=1, wrap=(False,) * 3)
    found = topologies.get_topology_desc(topology_name=topology.compiler_name, platform="tpu", **options)
    return Mesh(np.array(found.devices), ("data",))


def abstract_parts(config, shape):
    """`step.make_parts` without a value: variables that have a shape and a type, made while JAX traces."""
    import jax

    from gpt2lib.step import make_parts

    made = []
    jax.eval_shape(lambda: made.append(make_parts(config, shape, lambda path, shape: jax.numpy.zeros(shape))))
    return made[0]


def lower(program, config, mesh, sample=None):
    """The program `train`, `evaluate` or `generate` of a run over a mesh, for its compiler."""
    import jax
    from jax import ShapeDtypeStruct
    from jax.sharding import NamedSharding, PartitionSpec

    from gpt2lib.device import functional
    from gpt2lib.sample import program as sampling
    from gpt2lib.step import JaxPrograms

    shape = config.model_config()
    model, optimizer, trained = abstract_parts(config, shape)
    programs = JaxPrograms(model, optimizer, trained, config, mesh)

    def shapes(variables):
        return [ShapeDtypeStruct(tuple(v.shape), v.dtype) for v in variables]

    windows, number = ShapeDtypeStruct((config.batch_size, shape.n_ctx + 1), "int32"), ShapeDtypeStruct((), "int32")
    values, frozen = shapes(programs.trained), shapes(programs.held)
    if program == "train":
        state = {"trained": values, "slots": shapes(programs.slots), "failed": number}
        return programs.step.lower(state, frozen, windows, number)
    if program == "evaluate":
        return programs.losses.lower(values, frozen, windows)
    prompt, length = sample
    run = sampling(model, length, prompt + length, greedy=False, top_k=40, use_top_p=False)
    rows, everywhere = NamedSharding(mesh, PartitionSpec("data")), NamedSharding(mesh, PartitionSpec())
    layouts = (everywhere, rows, rows, *[everywhere] * 4)
    run = jax.jit(functional(model, run), in_shardings=layouts, out_shardings=rows)
    tokens, start = (ShapeDtypeStruct(s, "int32") for s in ((config.batch_size, prompt), (config.batch_size,)))
    real = ShapeDtypeStruct((), "float32")
    return run.lower(shapes(model.variables), tokens, start, real, real, number, number)


def _size(shapes: str) -> int:
    """Bytes of all arrays in a piece of HLO, such as `(f32[3,5]{1,0}, bf16[7])`."""
    found = re.findall(r"\b(\w+)\[([\d,]*)\]", shapes)
    return sum(
        _BYTES[kind] * math.prod(map(int, filter(None, size.split(",")))) for kind, size in found if kind in _BYTES
    )


def collectives(text: str) -> dict[str, dict[str, int]]:
    """{kind: {"count", "bytes"}} of what the devices exchange, from a compiled program's text; bytes of the results."""
    found = {}
    for kind in _COLLECTIVES:
        results = re.findall(rf"^\s*(?:ROOT )?%?[\w.-]+ = (.+?) {kind}(?:-start)?\(", text, re.MULTILINE)
        if results:
            found[kind] = {"count": len(results), "bytes": sum(map(_size, results))}
    return found


def refusal(message: str) -> dict | None:
    """What a compiler's out-of-memory error says: {"total", "limit"} in bytes of a device; None for another error."""
    found = re.search(r"([\d.]+)([KMGT]?)\)? exceeds available HBM \(([\d.]+)([KMGT]?)\)", message)
    found = found or re.search(r"([\d.]+)([KMGT]?) of ([\d.]+)([KMGT]?) hbm", message)
    if not found or "RESOURCE_EXHAUSTED" not in message:
        return None
    needed, unit, limit, limit_unit = found.groups()
    return {
        "total": int(float(needed) * _UNITS[unit]),
        "limit": int(float(limit) * _UNITS[limit_unit]),
        "message": message.splitlines()[0][:500],
    }


def compile_program(lowered) -> dict:
    """Compile it; what the compiler says of its memory, its work and its exchanges, or how much it lacks."""
    began = time.perf_counter()
    try:
        compiled = lowered.compile()
    except Exception as error:
        lacking = refusal(str(error))
        if lacking is None:
            raise
        return {"fits": False, **lacking, "compile_seconds": time.perf_counter() - began}
    seconds = time.perf_counter() - began
    memory, cost = compiled.memory_analysis(), compiled.cost_analysis()
    text = compiled.as_text()
    arguments, temporaries = memory.argument_size_in_bytes, memory.temp_size_in_bytes
    results = memory.output_size_in_bytes - memory.alias_size_in_bytes
    return {
        "fits": True,
        "arguments": arguments,
        "temporaries": temporaries,
        "total": arguments + temporaries + results + memory.generated_code_size_in_bytes,
        "flops": cost["flops"],
        "bytes_accessed": cost["bytes accessed"],
        "optimal_seconds": cost.get("optimal_seconds"),
        "collectives": collectives(text),
        "compile_seconds": seconds,
        "text": text,
    }


def device_limit(mesh) -> int | None:
    """Bytes of memory that a program may use on one device: what the compiler says of one that is far too large."""
    import jax
    from jax.sharding import NamedSharding, PartitionSpec

    everywhere = NamedSharding(mesh, PartitionSpec())
    huge = jax.jit(lambda x: x + 1, in_shardings=everywhere, out_shardings=everywhere)
    return compile_program(huge.lower(jax.ShapeDtypeStruct((2**20, 2**20), "float32"))).get("limit")


def versions() -> dict[str, str]:
    """Of what decides over a compiled program beside itself."""
    return {name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "keras", "libtpu")}


def main(request: dict) -> dict:
    """Answer one request: {"program", "topology", "config", "sample", "cache", "text"}."""
    from gpt2lib.config import TrainConfig
    from gpt2lib.plan.topology import find
    from gpt2lib.report import write_atomically

    began = time.perf_counter()
    slice_ = find(request["topology"])
    mesh, config = mesh_of(slice_), TrainConfig.from_dict(request["config"])
    lowered = lower(request["program"], config, mesh, request["sample"])
    used = versions()
    identity = [lowered.as_text(), slice_.compiler_name, used["jaxlib"], used["libtpu"]]
    key = hashlib.sha256(json.dumps(identity).encode()).hexdigest()
    file = Path(request["cache"]) / f"{key[:32]}.json"
    result = {"program_hash": key, "versions": used, "trace_seconds": time.perf_counter() - began}
    if file.exists() and not request["text"]:
        return {**result, **json.loads(file.read_text()), "cached": True}
    result |= compile_program(lowered)
    result["limit"] = result.get("limit") or device_limit(mesh)
    text = result.pop("text", "")
    if request["text"]:
        Path(request["text"]).write_text(text)
    result["host_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    write_atomically(file, json.dumps(result, indent=1).encode())
    return {**result, "cached": False}


if __name__ == "__main__":
    try:
        answer = main(json.load(sys.stdin))
    except Exception as error:
        traceback.print_exc()
        answer = {"error": f"{type(error).__name__}: {str(error).splitlines()[0][:300]}"}
    print(json.dumps(answer))
