"""Does generation use data better: with the same pairs again and again, and with ever new ones?

    python -m experiments.scene_encoder                       # once: what all arms start from
    F=experiments/sweeps/claim2_data_scaling.py
    python -m unihetero_jax sweep --sweep=$F:scenes-pool --workdir=runs/claim2-pool
    python -m unihetero_jax report --results=runs/claim2-pool/results.parquet

Expected: nothing is claimed beforehand; docs/claims.md has what was found. `SCALE-pool`: so many pairs of each kind,
the same number of steps whatever the pool (the world has 20,000 scenes; at `accelerator` 131,072). `SCALE-fresh`: pairs
seen once or nearly so, one complete schedule for each number of them. Arms are written NAME@PAIRS; the page fits laws
over them. Scales: `smoke` (minutes), `scenes` (two cores, hours), `accelerator` (64 seeds).
"""

from collections.abc import Iterator
from typing import Any

from experiments.sweeps.common import BASE, BASELINES, METRIC, SEEDS, STEPS, check_scale, groups, schedule

__all__ = ["BASE", "PROTOCOL", "sweep"]
POOLS = {
    "smoke": (128, 256),
    "scenes": (128, 512, 2048, 8192, 20_000),
    "accelerator": tuple(2**i for i in range(7, 18)),
}
FRESH = {"smoke": (20, 40), "scenes": (125, 250, 500, 1000), "accelerator": (125, 250, 500, 1000, 2000, 4000, 8000)}
"""Steps; a step has some 32 pairs."""
PAIRS_PER_STEP = 32
LARGE_WORLD = 131_072
PROTOCOL = {
    "metric": METRIC,
    "margin": 0.02,
    "num_seeds": 8,
    "matching": "data",
    "contrasts": {
        f"generation helps with {size} pairs": [f"semantic_input@{size}", [f"{name}@{size}" for name in BASELINES]]
        for size in (512, 2048, 8192)
    },
}
"""Of the pool; the trend itself (exponents, data multiplier) is the page's."""


def sweep(scale: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """The arms at every size, for each group of seeds in turn."""
    name, _, kind = scale.partition("-")
    check_scale("claim2_data_scaling", scale, [f"{one}-{of}" for one in SEEDS for of in ("pool", "fresh")])
    for seeds in groups(SEEDS[name]):
        for size, changes in _pool(name) if kind == "pool" else _fresh(name):
            for objective in (*BASELINES, "semantic_input"):
                yield f"{objective}@{size}", seeds | changes | {"objective": objective}


def _pool(scale: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """So many records of each source; of another world where the usual one has too few."""
    world = {}
    if scale == "accelerator":
        path = "data/claims-easy-large"
        world = {"scene_world.path": path, "scene_world.num_scenes": LARGE_WORLD, "data.tokenizer": f"{path}/tokenizer"}
        world |= {f"data.sources.{name}.path": f"{path}/{name}" for name in ("qa", "generation", "objects")}
        world |= {"eval.benchmarks.scenes": f"{path}/questions.tsv"}
    for size in POOLS[scale]:
        limits = {f"data.sources.{name}.max_records": size for name in ("qa", "generation", "objects")}
        yield size, world | limits | schedule(STEPS["smoke" if scale == "smoke" else "scenes"])


def _fresh(scale: str) -> Iterator[tuple[int, dict[str, Any]]]:
    for steps in FRESH[scale]:
        yield steps * PAIRS_PER_STEP, schedule(steps)
