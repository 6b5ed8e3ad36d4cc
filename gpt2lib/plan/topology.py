"""TPU slices by the names that Google gives them, such as v3-8, and what a chip of them can do."""

import csv
import functools
from dataclasses import dataclass
from pathlib import Path

from gpt2lib.config import ConfigError, nearest

_TABLE = Path(__file__).parents[2] / "data" / "published" / "tpus.csv"


@dataclass(frozen=True)
class Topology:
    """A slice of TPU chips. A device is what JAX sees as one: a core of v2 and v3, a whole chip of the others."""

    name: str  # such as v3-8
    version: str  # such as v3
    chips: tuple[int, ...]  # of each axis of the network, such as (2, 2)
    devices: int
    peak: float  # operations a second of one device in bfloat16 matrix products, as published
    bandwidth: float  # bytes a second between one device and its memory, as published
    memory: float  # bytes of one device's memory, as published

    @property
    def compiler_name(self) -> str:
        """What libtpu calls it, such as v3:2x2."""
        return f"{self.version}:{'x'.join(map(str, self.chips))}"


def _shape(chips: int, axes: int) -> tuple[int, ...]:
    """Chips, a power of two, over the axes as evenly as can be: 8 are 2 x 4, or 2 x 2 x 2."""
    exponent = chips.bit_length() - 1
    shape = [2 ** ((exponent + i) // axes) for i in range(axes)]
    return tuple(sorted(shape, reverse=chips < 8))


@functools.cache
def topologies() -> dict[str, Topology]:
    """Every slice that a plan can be made for, by its name. ConfigError where `data/published/tpus.csv` is missing."""
    if not _TABLE.exists():
        raise ConfigError(f"{_TABLE} is missing; a plan needs a clone of the project: git clone, then pip install -e .")
    found = {}
    with _TABLE.open() as file:
        for row in csv.DictReader(line for line in file if not line.startswith("#")):
            version, cores = row["version"], int(row["cores"])
            for size in map(int, row["slices"].split()):
                chips = size // 2 if row["counted"] == "cores" else size
                found[f"{version}-{size}"] = Topology(
                    name=f"{version}-{size}",
                    version=version,
                    chips=_shape(chips, axes=3 if version in ("v4", "v5p") else 2),
                    devices=chips * cores,
                    peak=float(row["tflops"]) * 1e12 / cores,
                    bandwidth=float(row["hbm_gb_per_s"]) * 1e9 / cores,
                    memory=float(row["hbm_gib"]) * 2**30 / cores,
                )
    return found


def find(name: str) -> Topology:
    """The slice of this name. ConfigError for another one, which lists those of its generation."""
    every = topologies()
    if name not in every:
        version = str(name).partition("-")[0]
        same = [other for other in every if every[other].version == version]
        versions = ", ".join(dict.fromkeys(t.version for t in every.values()))
        hint = (
            f"of {version} there are {', '.join(same)}"
            if same
            else f"{nearest(str(name), every)} (generations: {versions})"
        )
        raise ConfigError(f"there is no TPU slice `{name}`; {hint}")
    return every[name]
