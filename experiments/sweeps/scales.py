"""What the shipped sweeps share: scales, groups of seeds that are trained in one step, and schedules."""

from collections.abc import Collection, Iterator
from typing import Any

BASE = "experiments/scene_claims.py"
BASELINES = ["understanding", "understanding_i2t"]
METRIC = "answer_nll/scenes"
SEEDS = {"smoke": 1, "scenes": 8, "accelerator": 64}
"""Fewer than 8 is exploratory."""
STEPS = {"smoke": 20, "scenes": 500, "accelerator": 2000}
REPLICATES = 8
"""Models that are trained in one step and share their order of data; each group of them has its own (our choice)."""
SAMPLES_PER_STEP = 32
"""About so many fit into 16 rows."""
NEVER = 1e-9
"""Weight of a source that is left out: of so many samples as are drawn here it gives none."""
GATE = {"metric": "accuracy/scenes", "chance": 0.292, "low": 0.4, "high": 0.7}


def check_scale(sweep: str, scale: str, known: Collection[str]) -> None:
    """Raises ValueError for a scale that the sweep does not have."""
    if scale not in known:
        raise ValueError(f"{sweep}: scale {scale!r}; there are {', '.join(known)}")


def groups(num_seeds: int, first: int = 0, replicates: int = REPLICATES) -> Iterator[dict[str, Any]]:
    """Overrides of each group of seeds."""
    size = min(replicates, num_seeds)
    for seed in range(first, first + num_seeds, size):
        yield {"seed": seed, "data.seed": seed, "train.num_replicates": size}


def schedule(steps: int) -> dict[str, Any]:
    """Overrides of a complete schedule of so many steps, evaluated and stored at its end."""
    return {
        "train.num_steps": steps, "train.eval_every_steps": steps, "checkpoint.every_steps": steps,
        "optimizer.warmup_steps": max(min(200, steps // 5), 1),
    }  # fmt: skip


def large_world() -> dict[str, Any]:
    """Overrides of a world of 131,072 scenes, where the usual one of 20,000 has too few."""
    path = "data/claims-easy-large"
    paths = {f"data.sources.{name}.path": f"{path}/{name}" for name in ("qa", "generation", "objects")}
    return paths | {
        "scene_world.path": path, "scene_world.num_scenes": 131_072, "data.tokenizer": f"{path}/tokenizer",
        "eval.benchmarks.scenes": f"{path}/questions.tsv",
    }  # fmt: skip
