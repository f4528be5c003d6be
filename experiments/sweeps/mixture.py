"""What of the mixture matters: how much is to be imagined, in which order, of how many kinds?

Command: `python -m unihetero_jax sweep --sweep=experiments/sweeps/mixture.py:scenes --workdir=runs/mixture`, after
`python -m experiments.scene_encoder`.
Expected: nothing is claimed beforehand; it was not run at the scenes scale yet.

All arms predict the input embedding and take as many samples. `shareX`: X of questions and scenes to imagine are the
latter. `imagine-first`, `read-first`: the shares of .5 as a ramp over the run. `all-kinds`: also texts that tell what
is where, with their loss; `no-KIND`: the same without one of the three (without any to imagine it can but read, by
`understanding`). The planner's windows are small enough for an order to show in the batches. Curated is `share0.5`, two
kinds of clean pairs; heterogeneous is `all-kinds`. Scales: `smoke`, `scenes`, `accelerator`.
"""

from collections.abc import Iterator
from typing import Any

from experiments.sweeps.scales import (
    BASE,
    METRIC,
    NEVER,
    SAMPLES_PER_STEP,
    SEEDS,
    STEPS,
    check_scale,
    groups,
    schedule,
)

__all__ = ["BASE", "PROTOCOL", "sweep"]
SHARDS, WINDOWS_PER_SHARD = 8, 20
"""Draws are shuffled within a window, so a run needs many of them for a course of its shares."""
SHARES = (0.1, 0.25, 0.5, 0.75, 0.9)
KINDS = ("qa", "generation", "objects")
UP, DOWN = ((0.0, 0.0), (1.0, 2.0)), ((0.0, 2.0), (1.0, 0.0))
"""Factors of a weight over the run; their mean is 1."""
PROTOCOL = {
    "metric": METRIC,
    "margin": 0.02,
    "num_seeds": 8,
    "matching": "none",
    "contrasts": {
        "heterogeneous helps at equal samples": ["all-kinds", "share0.5"],
        "imagining first helps": ["imagine-first", "share0.5"],
        "reading first helps": ["read-first", "share0.5"],
        **{f"{kind} helps among all kinds": ["all-kinds", f"no-{kind}"] for kind in KINDS if kind != "qa"},
    },
}


def sweep(scale: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Shares, orders and kinds, for each group of seeds in turn."""
    check_scale("mixture", scale, SEEDS)
    steps = STEPS[scale]
    window = {"data.window_size": max(steps * SAMPLES_PER_STEP // (SHARDS * WINDOWS_PER_SHARD), 16)}
    common = {"objective": "semantic_input"} | schedule(steps) | window
    for seeds in groups(SEEDS[scale]):
        for arm, own in _arms(STEPS[scale]):
            yield arm, common | seeds | own


def _arms(steps: int) -> Iterator[tuple[str, dict[str, Any]]]:
    without_objects = {"data.sources.objects.weight": NEVER}
    for share in SHARES:
        weights = {"data.sources.qa.weight": 1 - share, "data.sources.generation.weight": share}
        yield f"share{share}", without_objects | weights
    ramp = without_objects | {"data.planned_draws": steps * SAMPLES_PER_STEP}
    for arm, generation, qa in (("imagine-first", DOWN, UP), ("read-first", UP, DOWN)):
        of_source = {"generation": generation, "qa": qa}
        yield arm, ramp | {f"data.sources.{name}.weight_schedule": factors for name, factors in of_source.items()}
    told = {"data.sources.objects.text_loss": "stored"}
    yield "all-kinds", told
    for kind in KINDS:
        reads_only = {"objective": "understanding"} if kind == "generation" else {}
        yield f"no-{kind}", told | {f"data.sources.{kind}.weight": NEVER} | reads_only
