"""Does predicting images help understanding, and does it matter what is predicted of them?

    python -m experiments.scene_encoder                       # once: what all arms start from
    F=experiments/sweeps/claim1_semantics_not_pixels.py
    P=runs/claim1-pilot W=runs/claim1
    python -m unihetero_jax sweep --sweep=$F:pilot --workdir=$P
    python -m unihetero_jax sweep --sweep=$F:scenes --workdir=$W --dry-run --pilot=$P/results.parquet
    python -m unihetero_jax sweep --sweep=$F:scenes --workdir=$W
    python -m unihetero_jax verify-claims --results=$W/results.parquet

Expected: nothing is claimed beforehand; docs/claims.md has what was found. Scales: `smoke` (minutes), `pilot` (the
baselines on seeds of their own), `scenes` (two cores, an hour or two), `accelerator` (64 seeds; the whole ladder of
targets, each level with its controls, at three shares of generation). SCALE-trainable and SCALE-scratch take another
mode of the encoder (`experiments/scene_claims.py`).
"""

from collections.abc import Iterator
from typing import Any

from experiments.sweeps.scales import BASE, BASELINES, GATE, METRIC, SEEDS, STEPS, check_scale, groups, schedule

__all__ = ["BASE", "PROTOCOL", "sweep"]
PROTOCOL = {
    "metric": METRIC,
    "margin": 0.02,
    "num_seeds": 8,
    "matching": "data",
    "contrasts": {
        "semantic generation helps": ["semantic_input", BASELINES],
        "pixel generation helps": ["pixel_through", BASELINES],
        "semantics help more than pixels": ["semantic_input", "pixel_through"],
        # Against the run that differs by the planted loss alone: captions (i2t) tell much of the same.
        "what is where, told to it, helps": ["revealed", "understanding"],
        "another image's embeddings help": ["semantic_input-shuffled", BASELINES],
        "the encoder's output as target helps": ["semantic_encoder", BASELINES],
        "the position's own embedding as target helps": ["semantic_input-own", BASELINES],
    },
    "positive": ["what is where, told to it, helps"],
    "negative": ["another image's embeddings help"],
    "exploratory": ["the encoder's output as target helps", "the position's own embedding as target helps"],
    "gate": GATE,
}
PILOT_SEED, PILOT_SEEDS = 1000, 16
"""Used by nothing else."""
LADDER = ("semantic_input", "semantic_encoder", "patch", "pixels", "random")
CONTROLS: dict[str, dict[str, Any]] = {
    "": {},
    "-own": {"loss.target_shift": 0},
    "-shuffled": {"loss.target_shuffled": True},
}
MODES: dict[str, dict[str, Any]] = {
    "": {},
    "trainable": {"optimizer.frozen": (), "loss.target": "ema"},
    "scratch": {
        "optimizer.frozen": (), "init_from.workdir": "", "init_from.components": (), "loss.cut_input_gradient": True,
    },
}  # fmt: skip
SHARES = (0.25, 0.5, 0.75)
"""Of generation, among the samples that are no plain questions and no telling ones."""


def sweep(scale: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """The arms, for each group of seeds in turn."""
    name, _, mode = scale.partition("-")
    check_scale(
        "claim1_semantics_not_pixels",
        scale,
        [f"{one}{'-' * bool(of)}{of}" for one in (*SEEDS, "pilot") for of in MODES],
    )
    is_pilot = name == "pilot"
    common = schedule(STEPS["scenes" if is_pilot else name]) | MODES[mode]
    for seeds in groups(PILOT_SEEDS, PILOT_SEED) if is_pilot else groups(SEEDS[name]):
        for arm, overrides in _arms(name):
            yield arm, common | seeds | overrides


def _arms(scale: str) -> Iterator[tuple[str, dict[str, Any]]]:
    for objective in BASELINES:
        yield objective, {"objective": objective}
    if scale == "pilot":
        return
    yield "revealed", {"objective": "understanding", "data.sources.objects.text_loss": "stored"}
    if scale != "accelerator":
        for arm in ("semantic_input", "semantic_input-own", "semantic_input-shuffled", "semantic_encoder"):
            objective, _, control = arm.partition("-")
            yield arm, {"objective": objective} | CONTROLS[f"-{control}" if control else ""]
        yield "pixel_through", {"objective": "pixel_through"}
        return
    for share in SHARES:
        of_share = {"data.sources.qa.weight": 0.8 * (1 - share), "data.sources.generation.weight": 0.8 * share}
        suffix = "" if share == 0.5 else f"-at{share}"
        for objective in LADDER:
            for control, changes in CONTROLS.items():
                yield objective + control + suffix, {"objective": objective} | changes | of_share
        for objective in ("pixel_through", "pixel_detached", *(BASELINES if suffix else ())):
            yield objective + suffix, {"objective": objective} | of_share
