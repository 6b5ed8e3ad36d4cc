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
        "MALLOC_ARENA_MAX": "1",  # a sixth less of the host's memory
        "MALLOC_TRIM_THRESHOLD_": "65536",
    }


def mesh_of(topology):
    """The mesh with the one axis `data` over the devices of a `Topology`, none of which exists."""
    import numpy as np
    from jax.experimental import topologies
    from jax.sharding import Mesh

    options = {"chip_config_name": "megacore"} if topology.version == "v4" else {}  # both cores of a chip as one device
    if math.prod(topology.chips) == 1:  # else a host of several chips is assumed
        one = (1,) * 3
        options |= dict(chips_per_host_bounds=one, chip_config_name="default", num_slices=1, wrap=(False,) * 3)
    found = topologies.get_topology_desc(topology_name=topology.compiler_name, platform="tpu", **options)
    assert len(found.devices) == topology.devices, f"{topology} has {len(found.devices)} devices"
    return Mesh(np.array(found.devices), ("data",))


def abstract_parts(config, shape):
    """`step.make_parts` without a value: variables that have a shape and a type, made while JAX traces."""
    import jax

    from gpt2lib.step import make_parts

    made = []
    jax.eval_shape(lambda: made.append(make_parts(config, shape, lambda path, shape: jax.numpy.zeros(shape))))
    return made[0]


def trace(program, config, mesh, sample=None):
    """The program `train`, `evaluate` or `generate` of a run over a mesh, traced: to be lowered for its compiler."""
    import jax
    from jax import ShapeDtypeStruct
    from jax.sharding import NamedSharding, PartitionSpec

    from gpt2lib import attention
    from gpt2lib.device import functional
    from gpt2lib.sample import Rules
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
        return programs.step.trace(state, frozen, windows, number)
    if program == "evaluate":
        return programs.losses.trace(values, frozen, windows)
    prompt, length = sample
    rules = Rules(top_k=True, top_p=True, penalty=True, early=True)  # all that sampling may do
    b, v, real = config.batch_size, shape.n_vocab, ShapeDtypeStruct((), "float32")
    run = sampling(model, length, prompt + length, rules)
    rows, everywhere = NamedSharding(mesh, PartitionSpec("data")), NamedSharding(mesh, PartitionSpec())
    run = jax.jit(
        functional(model, run), in_shardings=(everywhere, rows, rows, rows, rows, everywhere), out_shardings=rows
    )
    tokens, start = ShapeDtypeStruct((b, prompt), "int32"), ShapeDtypeStruct((b,), "int32")
    flags, scores = ShapeDtypeStruct((b,), "bool"), ShapeDtypeStruct((b,), "float32")
    state = (flags, ShapeDtypeStruct((b, v), "bool"), scores, start)
    knobs = (real, number, real, real, number, ShapeDtypeStruct((v,), "bool"))
    with attention.target(mesh, alone=False):
        return run.trace(shapes(model.variables), tokens, start, ShapeDtypeStruct((b, 2), "uint32"), state, knobs)


def products(jaxpr, repeated: bool) -> int:
    """Operations of the matrix products in a traced program; with `repeated` those of a loop as often as it runs."""
    found = 0
    for equation in jaxpr.eqns:
        kind, options = equation.primitive.name, equation.params
        if kind == "dot_general":
            (summed, _), _ = options["dimension_numbers"]
            shape = equation.invars[0].aval.shape
            found += 2 * math.prod(equation.outvars[0].aval.shape) * math.prod(shape[axis] for axis in summed)
        elif kind == "pallas_call":
            found += options["cost_estimate"].flops
        else:
            inner = [x for value in options.values() for x in (value if isinstance(value, list | tuple) else [value])]
            inner = [getattr(x, "jaxpr", x) for x in inner]
            times = options["length"] if kind == "scan" and repeated else 1
            found += times * sum(products(x, repeated) for x in inner if hasattr(x, "eqns"))
    return found


def _sizes(shapes: str) -> list[int]:
    """Bytes in the device's memory of each array in a piece of HLO, such as `(f32[3,5]{1,0}, bf16[7]{0:T(1024)S(1)})`.

    What the compiler keeps elsewhere, in the cores' fast memory or the registers, has a space `S(...)`: no bytes.
    """
    found = re.findall(r"\b(\w+)\[([\d,]*)\](\{[^}]*\})?", shapes)
    return [
        0 if "S(" in layout else _BYTES[kind] * math.prod(map(int, filter(None, size.split(","))))
        for kind, size, layout in found
        if kind in _BYTES
    ]


def _anywhere(shapes: str) -> str:
    """The same arrays, wherever they lie."""
    return re.sub(r"S\(\d+\)", "", shapes)


def instructions(text: str):
    """(times, name, type, operation, the rest) of each instruction that a compiled program runs, and how often."""
    bodies = dict(re.findall(r"^((?:ENTRY )?%?[\w.-]+) [^\n]*\{\n(.*?)^\}", text, re.MULTILINE | re.DOTALL))

    def run(body, times):
        for line in re.finditer(r"^ +(?:ROOT )?(%?[\w.-]+) = (.*?) ([a-z][a-z-]*)\((.*)$", body, re.MULTILINE):
            yield times, *line.groups()
            if line[3] == "while":
                repeats = re.search(r'"known_trip_count":\{"n":"(\d+)"', line[4])
                inside = re.search(r"body=(%?[\w.-]+)", line[4])[1]
                yield from run(bodies[inside], times * int(repeats[1] if repeats else 1))

    for name, body in bodies.items():
        if name.startswith("ENTRY "):
            yield from run(body, 1)


def memory_traffic(text: str) -> int:
    """Bytes that a compiled program reads from the device's memory or writes to it.

    The compiler's own `bytes accessed` counts fast memory too. Here each instruction reads its operands and writes its
    results, once; one that picks rows, or puts them into an array, moves those rows only.
    """
    types, total = {}, 0
    for times, name, kind, operation, rest in instructions(text):
        types[name] = kind
        if operation in ("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional"):
            continue
        if operation.endswith("-done") or "Bitcast" in rest:
            continue
        results = _sizes(kind)
        if operation == "copy-start":  # (target, source, semaphore)
            moved = results[0] + results[1]
        elif operation == "slice-start":  # ((source), target, semaphore)
            moved = _sizes(_anywhere(kind))[1] * (2 if results[1] else 1)
        else:
            operands = [sum(_sizes(types.get(operand, ""))) for operand in re.findall(r"%[\w.-]+", rest.split(")")[0])]
            written = sum(results)
            if re.match(r"%?(gather|dynamic-slice)", name):
                operands = [min(size, written) for size in operands]
            elif "dynamic-update-slice" in name:
                operands = [size for size in operands if size < max(results)]
                written = sum(operands)
            moved = sum(operands) + written
        total += times * moved
    return total


def collectives(text: str) -> dict[str, dict[str, int]]:
    """{kind: {"count", "bytes"}} of what the devices exchange, from a compiled program's text; bytes of the results."""
    found = {}
    for times, _, kind, operation, _ in instructions(text):
        operation = operation.removesuffix("-done")
        if operation in _COLLECTIVES:
            entry = found.setdefault(operation, {"count": 0, "bytes": 0})
            entry["count"] += times
            entry["bytes"] += times * sum(_sizes(_anywhere(kind)))
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


def compile_program(lowered, repeats: float = 1.0) -> dict:
    """Compile it; what the compiler says of its memory, its work and its exchanges, or how much it lacks.

    The compiler's cost analysis takes the body of a loop once: operations and seconds are multiplied by `repeats`.
    """
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
        "flops": cost["flops"] * repeats,
        "bytes_accessed": cost["bytes accessed"],
        "memory_traffic": memory_traffic(text),
        "optimal_seconds": cost["optimal_seconds"] * repeats if "optimal_seconds" in cost else None,
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
    import jax

    from gpt2lib.config import TrainConfig
    from gpt2lib.plan.topology import find
    from gpt2lib.report import write_atomically

    jax.config.update("jax_traceback_in_locations_limit", 0)  # else line numbers were part of the program
    began = time.perf_counter()
    slice_ = find(request["topology"])
    mesh, config = mesh_of(slice_), TrainConfig.from_dict(request["config"])
    traced = trace(request["program"], config, mesh, request["sample"])
    lowered, used = traced.lower(), versions()
    identity = [lowered.as_text(), slice_.compiler_name, used["jaxlib"], used["libtpu"]]
    key = hashlib.sha256(json.dumps(identity).encode()).hexdigest()
    file = Path(request["cache"]) / f"{key[:32]}.json"
    result = {"program_hash": key, "versions": used, "trace_seconds": time.perf_counter() - began}
    if file.exists() and not request["text"]:
        return {**result, **json.loads(file.read_text()), "cached": True}
    repeats = products(traced.jaxpr.jaxpr, True) / products(traced.jaxpr.jaxpr, False)
    del traced
    result |= compile_program(lowered, repeats)
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
