"""Does generation help whichever way an image comes to the language model?

Command: `python -m unihetero_jax sweep --sweep=experiments/sweeps/connectors.py:scenes --workdir=runs/connectors`,
after `python -m experiments.scene_encoder`.
Expected: nothing is claimed beforehand; it was not run at the scenes scale yet.

The four connectors of `model.projector.kind`, at equal numbers of visual tokens, each with and without the visual loss.
Scales: `smoke`, `scenes`, `accelerator`.
"""

import typing
from collections.abc import Iterator
from typing import Any

from experiments.sweeps.scales import BASE, BASELINES, METRIC, SEEDS, STEPS, check_scale, groups, schedule
from unihetero_jax.config import ConnectorKind

__all__ = ["BASE", "PROTOCOL", "sweep"]
KINDS = typing.get_args(ConnectorKind)
PROTOCOL = {
    "metric": METRIC,
    "margin": 0.02,
    "num_seeds": 8,
    "matching": "data",
    "contrasts": {
        f"generation helps with {kind}": [f"semantic_input-{kind}", [f"{name}-{kind}" for name in BASELINES]]
        for kind in KINDS
    },
}


def sweep(scale: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Baselines and generation with every connector, for each group of seeds in turn."""
    check_scale("connectors", scale, SEEDS)
    for seeds in groups(SEEDS[scale]):
        for kind in KINDS:
            for objective in (*BASELINES, "semantic_input"):
                own = {"objective": objective, "model.projector.kind": kind}
                yield f"{objective}-{kind}", schedule(STEPS[scale]) | seeds | own
