"""Which learning rate and which weight of the generating loss does each arm of claim 1 want, at equal effort?

    python -m experiments.scene_encoder                       # once: what all arms start from
    F=experiments/sweeps/tuning.py
    python -m unihetero_jax sweep --sweep=$F:scenes --workdir=runs/tuning
    python -m unihetero_jax report --workdir=runs/tuning      # every setting's loss

Expected: nothing is claimed beforehand; it was not run at the scenes scale yet.

Nine settings for every arm: three learning rates by three weights, or, of a baseline, which has no such weight, nine
learning rates over the same range. What counts is the loss of answers on validation rows (`held_out/qa/text`), not the
benchmark that the claim is judged on, with seeds that nothing else uses. There are no contrasts: nothing is decided
here but what the claim's arms are given. Scales: `smoke`, `scenes`, `accelerator`.
"""

from collections.abc import Iterator
from typing import Any

from experiments.sweeps.scales import BASELINES, STEPS, check_scale, groups, schedule

__all__ = ["BASE", "PROTOCOL", "sweep"]
BASE = "experiments/scene_claims.py:tuning"
FIRST_SEED = 2000
NUM_SEEDS = {"smoke": 1, "scenes": 2, "accelerator": 16}
LEARNING_RATES = (0.0003, 0.0004, 0.0006, 0.0008, 0.001, 0.0014, 0.002, 0.0025, 0.003)
WEIGHTS = (0.1, 0.3, 1.0)
GENERATING = {"semantic_input": "visual_weight", "pixel_through": "pixel_weight"}
"""And the field that weighs its loss."""
PROTOCOL: dict[str, Any] = {
    "metric": "held_out/qa/text", "margin": 0.02, "num_seeds": 2, "matching": "data", "contrasts": {},
}  # fmt: skip


def sweep(scale: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Nine settings of every arm, for each group of seeds in turn."""
    check_scale("tuning", scale, NUM_SEEDS)
    for seeds in groups(NUM_SEEDS[scale], FIRST_SEED):
        for arm, own in _settings():
            yield arm, schedule(STEPS[scale]) | seeds | own


def _settings() -> Iterator[tuple[str, dict[str, Any]]]:
    for objective in BASELINES:
        for rate in LEARNING_RATES:
            yield f"{objective}-lr{rate}", {"objective": objective, "optimizer.learning_rate": rate}
    for objective, field in GENERATING.items():
        for rate in LEARNING_RATES[::4]:
            for weight in WEIGHTS:
                own = {"objective": objective, "optimizer.learning_rate": rate, f"loss.{field}": weight}
                yield f"{objective}-lr{rate}-weight{weight}", own
