"""Do errors add up less where the language model predicts its own input embedding?

    for v in easy-fine easy-fine-causal; do                   # once: what all arms start from
      python -m experiments.scene_encoder --variant=$v --workdir=runs/scene_encoder${v#easy}
    done
    python -m unihetero_jax train --config=experiments/scene_judge.py:easy-fine --workdir=runs/scene_judge-fine
    F=experiments/sweeps/claim3_target_space.py
    python -m unihetero_jax sweep --sweep=$F:scenes --workdir=runs/claim3
    python -m unihetero_jax report --results=runs/claim3/results.parquet

Expected: nothing is claimed beforehand; it was not run at the scenes scale yet. The metric is the error of the free
rollout of 64 visual tokens in the judge's space (`evaluation/rollout_error.py`), 1 for the mean embedding. The planted
control is an arm that was taught another image's embeddings: the true ones have to be better than it, and it no better
than the encoder's output. Raw patches are held against the input embedding with a causal encoder: what a rollout of
patches drew is read again without the blocks to come, and a bidirectional encoder knows whole images alone. Scales:
`smoke`, `scenes`, `accelerator`.
"""

from collections.abc import Iterator
from typing import Any

from experiments.scene_horizon import ENCODERS
from experiments.sweeps.scales import SEEDS, check_scale, groups, schedule

__all__ = ["BASE", "PROTOCOL", "sweep"]
BASE = "experiments/scene_horizon.py"
STEPS = {"smoke": 20, "scenes": 1000, "accelerator": 8000}
TARGETS = ("semantic_input", "semantic_encoder", "patch")
PROTOCOL = {
    "metric": "rollout_error/free_running",
    "margin": 0.02,
    "num_seeds": 8,
    "matching": "data",
    "contrasts": {
        "the input embedding departs less than the encoder's output": ["semantic_input", "semantic_encoder"],
        "it departs less than the raw patch, with a causal encoder": ["semantic_input-causal", "patch-causal"],
        "it departs less than the encoder's output, with a causal encoder": [
            "semantic_input-causal", "semantic_encoder-causal",
        ],
        "it departs less than the raw patch": ["semantic_input", "patch"],
        "true embeddings depart less than another image's": ["semantic_input", "semantic_input-shuffled"],
        "another image's embeddings depart less than the encoder's output": [
            "semantic_input-shuffled", "semantic_encoder",
        ],
    },
    "positive": ["true embeddings depart less than another image's"],
    "negative": ["another image's embeddings depart less than the encoder's output"],
    "exploratory": [
        "it departs less than the encoder's output, with a causal encoder", "it departs less than the raw patch",
    ],
}  # fmt: skip


def sweep(scale: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every target with either encoder, and the control, for each group of seeds in turn."""
    check_scale("claim3_target_space", scale, SEEDS)
    for seeds in groups(SEEDS[scale]):
        common = schedule(STEPS[scale]) | seeds
        yield "semantic_input-shuffled", common | {"loss.target_shuffled": True}
        for attention, encoder in ENCODERS.items():
            own = {"model.encoder.attention": attention, "init_from.workdir": encoder}
            for target in TARGETS:
                yield target + ("-causal" if attention == "causal" else ""), common | own | {"objective": target}
