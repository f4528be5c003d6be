"""Does generation get more out of the same pairs, shown again and again?

    python -m experiments.scene_encoder                       # once: what all arms start from
    F=experiments/sweeps/claim2_pool.py
    python -m unihetero_jax sweep --sweep=$F:scenes --workdir=runs/claim2-pool
    python -m unihetero_jax report --results=runs/claim2-pool/results.parquet

Expected: nothing is claimed beforehand; it was not run at the scenes scale yet. So many records of each source, the
same number of steps whatever the pool, which every pool is smaller than: so NAME@PAIRS tells how many different ones
there are. The page fits laws over them. All seeds have the same pools. Scales: `smoke`, `scenes`, `accelerator`.
"""

from collections.abc import Iterator
from typing import Any

from experiments.sweeps.scales import BASE, BASELINES, METRIC, SEEDS, check_scale, groups, large_world, schedule

__all__ = ["BASE", "PROTOCOL", "sweep"]
JUDGED = (256, 1024, 4096)
POOLS = {"smoke": JUDGED, "scenes": (64, *JUDGED), "accelerator": (64, 128, *JUDGED, 16_384, 65_536, 131_072)}
STEPS = {"smoke": 20, "scenes": 500, "accelerator": 12_000}
"""A step draws some 13 records of `qa` and of `generation`, and half as many of `objects`."""
PROTOCOL = {
    "metric": METRIC,
    "margin": 0.02,
    "num_seeds": 8,
    "matching": "data",
    "contrasts": {
        f"generation helps with {size} pairs": [f"semantic_input@{size}", [f"{name}@{size}" for name in BASELINES]]
        for size in JUDGED
    },
}


def sweep(scale: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """The arms at every size, for each group of seeds in turn."""
    check_scale("claim2_pool", scale, SEEDS)
    world = large_world() if scale == "accelerator" else {}
    for seeds in groups(SEEDS[scale]):
        for size in POOLS[scale]:
            limits = {f"data.sources.{name}.max_records": size for name in ("qa", "generation", "objects")}
            for objective in (*BASELINES, "semantic_input"):
                own = {"objective": objective} | schedule(STEPS[scale])
                yield f"{objective}@{size}", world | limits | seeds | own
