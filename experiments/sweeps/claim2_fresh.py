"""Does generation have the better trend where every pair is new?

    python -m experiments.scene_encoder                       # once: what all arms start from
    F=experiments/sweeps/claim2_fresh.py
    python -m unihetero_jax sweep --sweep=$F:scenes --workdir=runs/claim2-fresh
    python -m unihetero_jax report --results=runs/claim2-fresh/results.parquet

Expected: nothing is claimed beforehand; it was not run at the scenes scale yet. One complete schedule for each number
of steps. NAME@SAMPLES counts all samples, some 32 a step, two fifths each of questions and of pairs to imagine; of
none has the world fewer than are drawn. There are no contrasts: the trend (exponents, data multiplier) is the page's.
Scales: `smoke`, `scenes`, `accelerator`.
"""

from collections.abc import Iterator
from typing import Any

from experiments.sweeps.scales import (
    BASE,
    BASELINES,
    METRIC,
    SAMPLES_PER_STEP,
    SEEDS,
    check_scale,
    groups,
    large_world,
    schedule,
)

__all__ = ["BASE", "PROTOCOL", "sweep"]
STEPS = {"smoke": (10, 20, 30, 40), "scenes": (125, 250, 500, 1000, 1500),
         "accelerator": (125, 250, 500, 1000, 2000, 4000, 8000)}  # fmt: skip
PROTOCOL = {"metric": METRIC, "margin": 0.02, "num_seeds": 8, "matching": "data", "contrasts": {}}


def sweep(scale: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """The arms at every size, for each group of seeds in turn."""
    check_scale("claim2_fresh", scale, SEEDS)
    world = large_world() if scale == "accelerator" else {}
    for seeds in groups(SEEDS[scale]):
        for steps in STEPS[scale]:
            for objective in (*BASELINES, "semantic_input"):
                own = {"objective": objective} | schedule(steps)
                yield f"{objective}@{steps * SAMPLES_PER_STEP}", world | seeds | own
