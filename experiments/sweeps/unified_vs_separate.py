"""Is one model that reads and imagines better than a reader and an imaginer?

Command: `python -m unihetero_jax sweep --sweep=experiments/sweeps/unified_vs_separate.py:scenes --workdir=runs/one`,
after `python -m experiments.scene_encoder`.
Expected: nothing is claimed beforehand; it was not run at the scenes scale yet.

`unified` sees questions and scenes to imagine, as many of each. At equal inference cost, `reader` and `imaginer` are as
large, and each sees its own kind alone for as many steps: together twice the training, and twice the questions. `-half`
have one decoder layer of two, so that both together have as much of a decoder (encoders, projectors and embeddings are
there twice). `understanding` has the questions of `unified` and no more. The verdicts are on reading; how well scenes
are imagined stands beside them (`rollout_retrieval`). Scales: `smoke`, `scenes`, `accelerator`.
"""

from collections.abc import Iterator
from typing import Any

from experiments.sweeps.scales import BASE, METRIC, NEVER, SEEDS, STEPS, check_scale, groups, schedule

__all__ = ["BASE", "PROTOCOL", "sweep"]
READS = {"objective": "understanding", "data.sources.generation.weight": NEVER}
IMAGINES = {"objective": "generation", "data.sources.qa.weight": NEVER}
HALF = {"model.decoder.num_layers": 1}
ARMS: dict[str, dict[str, Any]] = {
    "unified": {"objective": "semantic_input"},
    "understanding": {"objective": "understanding"},
    "reader": READS,
    "imaginer": IMAGINES,
    "reader-half": READS | HALF,
    "imaginer-half": IMAGINES | HALF,
}
PROTOCOL = {
    "metric": METRIC,
    "margin": 0.02,
    "num_seeds": 8,
    "matching": "none",
    "contrasts": {
        "one model reads better, at equal inference cost": ["unified", "reader"],
        "one model reads better than a reader with half of the decoder": ["unified", "reader-half"],
        "one model reads better, from as many questions": ["unified", "understanding"],
    },
}


def sweep(scale: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """One model and the specialists, for each group of seeds in turn."""
    check_scale("unified_vs_separate", scale, SEEDS)
    common = schedule(STEPS[scale]) | {"data.sources.objects.weight": NEVER, "eval.rollout_source": "generation"}
    for seeds in groups(SEEDS[scale]):
        for arm, own in ARMS.items():
            yield arm, common | seeds | own
