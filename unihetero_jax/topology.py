"""Machines by name: chips, their shape, and the published figures that a roofline needs.

A TPU slice is written by shape (`v5e:16x16`, `v5p:4x4x4`) or by the size that the cloud sells it under (`v5e-256`,
`v5p-128`). For v5e and v6e that size counts chips; for v5p it counts TensorCores, of which a chip has two: `v5p-128` is
`v5p:4x4x4`, 64 chips. GPUs of one server are written `8xH100`, simulated CPU devices `cpu:8`, and `gpu` stands for the
devices of this machine.

Figures per chip: Google Cloud's pages "TPU v5e", "TPU v5p", "TPU v6e" (cloud.google.com/tpu/docs/v5e, read in a stored
copy); there the network is given in both directions together (400, 1200 and 800 GB/s), here one way, as older editions
of the same pages do (1,600 and 4,800 Gbps). NVIDIA's H100 and H200 SXM: 989 TFLOP/s dense bfloat16, 3.35 and 4.8 TB/s,
NVLink 900 GB/s both ways; from secondary sources, the data sheets themselves were not at hand. Gigabytes are 10^9
bytes, except that v5p's 95 are GiB.
"""

import dataclasses
import difflib
import math
import re
from typing import Literal

from unihetero_jax.config import Config

Platform = Literal["tpu", "gpu", "cpu"]
GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """One accelerator.

    Attributes:
        name: as it is written in a topology.
        platform: who compiles for it.
        hbm_bytes: memory that a program may use. For TPUs less than is sold: the compiler keeps a part.
        peak_flops: dense bfloat16 FLOP/s.
        hbm_bandwidth: bytes per second.
        link_bandwidth: bytes per second that a chip sends over all its links together, one way.
        torus_dims: dimensions of the network; each has an equal share of the links. 1: a switch.
    """

    name: str
    platform: Platform
    hbm_bytes: float
    peak_flops: float
    hbm_bandwidth: float
    link_bandwidth: float
    torus_dims: int


CHIPS = {
    chip.name: chip
    for chip in (
        # The memory limits of TPUs are those that libtpu 0.0.42.1 states when a program is too big.
        Chip("v5e", "tpu", 15.75 * GIB, 197e12, 819e9, 200e9, 2),
        Chip("v5p", "tpu", 95.74 * GIB, 459e12, 2765e9, 600e9, 3),
        Chip("v6e", "tpu", 31.25 * GIB, 918e12, 1638e9, 400e9, 2),
        Chip("H100", "gpu", 80e9, 989e12, 3.35e12, 450e9, 1),
        Chip("H200", "gpu", 141e9, 989e12, 4.8e12, 450e9, 1),
    )
}

_FLAT_SHAPES = ((2, 2), (2, 4), (4, 4), (4, 8), (8, 8), (8, 16), (16, 16))
_CUBE_SHAPES = (
    (2, 2, 1), (2, 2, 2), (2, 2, 4), (2, 4, 4), (4, 4, 4), (4, 4, 8), (4, 8, 8), (8, 8, 8), (8, 8, 16), (8, 16, 16),
    (16, 16, 16), (16, 16, 24),
)  # fmt: skip
SLICES = {"v5e": _FLAT_SHAPES, "v6e": _FLAT_SHAPES, "v5p": _CUBE_SHAPES}
"""Shapes that can be asked for, by kind of chip; those with wrap-around links are whole multiples of 16 or of 4x4x4."""
CORES_PER_CHIP = {"v5e": 1, "v6e": 1, "v5p": 2}
"""TensorCores; a size such as `v5p-128` counts them."""
_ALIASES = {"v5litepod": "v5e", "v5lite": "v5e"}


@dataclasses.dataclass(frozen=True)
class Topology:
    """A machine.

    Attributes:
        name: its canonical spelling.
        platform: "tpu", "gpu" or "cpu".
        shape: of the slice; of other machines (number of devices,). `(0,)` where only the machine itself knows.
        chip: figures of a chip; None for CPUs and for GPUs that are asked at run time.
    """

    name: str
    platform: Platform
    shape: tuple[int, ...]
    chip: Chip | None

    @property
    def num_devices(self) -> int:
        return math.prod(self.shape)


def parse_topology(text: str) -> Topology:
    """A machine from its name, in any of the spellings above.

    Raises:
        ValueError: naming the near ones, if there is no such machine.
    """
    name = text.strip()
    if name == "gpu":
        return Topology("gpu", "gpu", (0,), None)
    if match := re.fullmatch(r"cpu(?::(\d+))?", name):
        count = int(match[1] or 1)
        if count < 1:
            raise ValueError(f"--topology={text}: write the number of simulated devices, such as cpu:8")
        return Topology(f"cpu:{count}", "cpu", (count,), None)
    if match := re.fullmatch(r"(\d+)x([A-Za-z]\w*)", name):
        chip = CHIPS.get(match[2].upper())
        if chip is None or chip.platform != "gpu" or not 1 <= int(match[1]) <= 8:
            raise ValueError(f"--topology={text}: GPUs of one server are written 1xH100 to 8xH100, or 8xH200")
        return Topology(f"{int(match[1])}x{chip.name}", "gpu", (int(match[1]),), chip)
    return _parse_slice(text, name)


def _parse_slice(text: str, name: str) -> Topology:
    match = re.fullmatch(r"(\w+?)(?::(\d+(?:x\d+)*)|-(\d+))", name)
    kind = _ALIASES.get(match[1], match[1]) if match else ""
    if match is None or kind not in SLICES:
        raise ValueError(f"--topology={text}: unknown machine{_near(name)}")
    if match[2]:
        shape = tuple(map(int, match[2].split("x")))
    else:
        cores = int(match[3])
        shape = next((s for s in SLICES[kind] if math.prod(s) * CORES_PER_CHIP[kind] == cores), ())
    if shape not in SLICES[kind]:
        raise ValueError(f"--topology={text}: there is no such slice of {kind}{_near_shapes(kind, match)}")
    return Topology(f"{kind}:{'x'.join(map(str, shape))}", "tpu", shape, CHIPS[kind])


def spellings(kind: str) -> list[tuple[str, str]]:
    """The slices of a kind of chip: (by shape, by size)."""
    return [
        (f"{kind}:{'x'.join(map(str, shape))}", f"{kind}-{math.prod(shape) * CORES_PER_CHIP[kind]}")
        for shape in SLICES[kind]
    ]


def _near_shapes(kind: str, match: re.Match[str]) -> str:
    """The slices whose number of chips is nearest to what was asked for."""
    if match[2]:
        wanted = math.prod(map(int, match[2].split("x")))
    else:
        wanted = int(match[3]) / CORES_PER_CHIP[kind]
    by_distance = sorted(
        zip(SLICES[kind], spellings(kind), strict=True),
        key=lambda entry: abs(math.log(math.prod(entry[0]) / max(wanted, 0.5))),
    )
    near = [f"{shape} (= {size})" for _, (shape, size) in by_distance[:3]]
    counted = "; its sizes count TensorCores, two a chip" if CORES_PER_CHIP[kind] == 2 and match[3] else ""
    return f"; the nearest are {', '.join(near)}{counted}"


def _near(name: str) -> str:
    known = [name for kind in SLICES for pair in spellings(kind) for name in pair]
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    if close:
        return f"; did you mean {' or '.join(close)}?"
    return "; there are TPU slices such as v5e:16x16, v5p:4x4x4 and v6e-256, servers such as 8xH100, cpu:8, and gpu"


def check_mesh(config: Config, topology: Topology) -> None:
    """Raises ValueError if the configuration is not for this machine: another number of devices, or many models."""
    mesh = config.mesh
    shape = (mesh.data, mesh.fsdp, mesh.tensor, mesh.context)
    if config.train.num_replicates > 1:
        raise ValueError("train.num_replicates > 1: compile and explain are for one model; set it to 1")
    if mesh.num_slices > 1:
        raise ValueError(f"mesh.num_slices {mesh.num_slices}: one slice is looked at; set mesh.num_slices=1")
    available = topology.num_devices
    if available and math.prod(shape) != available:  # how many GPUs there are is for the compiling process to see
        raise ValueError(
            f"--topology={topology.name} has {available} devices, but mesh.data x fsdp x tensor x context is "
            f"{' x '.join(map(str, shape))} = {math.prod(shape)}; set them, for example --config.mesh.data=1 "
            f"--config.mesh.fsdp={available} --config.mesh.tensor=1 --config.mesh.context=1"
        )
