"""Does predicting images help understanding, and does it matter what is predicted of them?

Command: `python -m unihetero_jax sweep --sweep=experiments/sweeps/claim1_semantics_not_pixels.py:scenes
--workdir=runs/claim1`; `:smoke` is the same in miniature, to see that everything runs.
Expected: nothing is claimed beforehand; `verify-claims` says what the table says.

Every arm has the same samples, initialisation and steps. The ladder of targets at lambda and mu 1, each level with its
two controls: `own` (the position's own target: supervision without generation) and `shuffled` (another image's).
"""

from collections.abc import Iterator
from typing import Any

BASE = "experiments/quickstart.py"
SCALES = {"smoke": (1, 20), "scenes": (8, 2000)}
"""Seeds and steps. Fewer than 8 seeds is exploratory."""
LADDER = ("semantic_input", "semantic_encoder", "patch", "pixels", "random")
CONTROLS: dict[str, dict[str, Any]] = {
    "": {},
    "-own": {"loss.target_shift": 0},
    "-shuffled": {"loss.target_shuffled": True},
}


def sweep(scale: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Baselines, ladder and pixel arms, for each seed in turn."""
    if scale not in SCALES:
        raise ValueError(f"claim1_semantics_not_pixels: scale {scale!r}; there are {', '.join(SCALES)}")
    num_seeds, steps = SCALES[scale]
    common = {
        "train.num_steps": steps, "train.eval_every_steps": steps, "checkpoint.every_steps": steps,
        "loss.visual_weight": 1.0, "eval.rollout_source": "",
    }  # fmt: skip
    for seed in range(num_seeds):
        own = common | {"seed": seed, "data.seed": seed}
        for objective in ("understanding", "understanding_i2t", "pixel_through", "pixel_detached"):
            yield objective, own | {"objective": objective}
        for objective in LADDER:
            for suffix, changes in CONTROLS.items():
                yield objective + suffix, own | changes | {"objective": objective}
