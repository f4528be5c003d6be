"""Does generation harm a shared decoder, and do upper layers of its own mend that (arXiv 2608.12209)?

Command: `python -m unihetero_jax sweep --sweep=experiments/sweeps/split_branch.py:scenes --workdir=runs/split-branch`,
after `python -m experiments.scene_encoder`.
Expected: nothing is claimed beforehand; it was not run at the scenes scale yet.

`split`: the visual loss has the upper half of the decoder's layers to itself and shares the lower; `isolated`: its
gradient ends where the branch begins, so it trains nothing that answers questions. Scales: `smoke`, `scenes`,
`accelerator`.
"""

from collections.abc import Iterator
from typing import Any

from experiments.sweeps.scales import BASE, BASELINES, METRIC, SEEDS, STEPS, check_scale, groups, schedule

__all__ = ["BASE", "PROTOCOL", "sweep"]
SPLIT_LAYER = 1
"""Of two."""
PROTOCOL = {
    "metric": METRIC,
    "margin": 0.02,
    "num_seeds": 8,
    "matching": "data",
    "contrasts": {
        "generation in shared layers helps": ["semantic_input", BASELINES],
        "generation in a branch helps": ["semantic_input-split", BASELINES],
        "a branch helps more than shared layers": ["semantic_input-split", "semantic_input"],
        "an isolated branch changes something": ["semantic_input-isolated", "understanding"],
    },
    "negative": ["an isolated branch changes something"],
}


def sweep(scale: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Baselines, shared layers, and the two branches, for each group of seeds in turn."""
    check_scale("split_branch", scale, SEEDS)
    branch = {"model.visual_branch.split_layer": SPLIT_LAYER}
    arms = {
        **{name: {"objective": name} for name in (*BASELINES, "semantic_input")},
        "semantic_input-split": {"objective": "semantic_input"} | branch,
        "semantic_input-isolated": {"objective": "semantic_input", "loss.cut_branch_gradient": True} | branch,
    }
    for seeds in groups(SEEDS[scale]):
        for arm, own in arms.items():
            yield arm, schedule(STEPS[scale]) | seeds | own
