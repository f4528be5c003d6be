"""The run that the arms of the claim sweeps vary: small, many at a time, from one encoder.

Command: `python -m experiments.scene_encoder`, then `python -m unihetero_jax sweep --sweep=experiments/sweeps/...`.
Expected: docs/claims.md has what was found of claim 1.

The argument says what becomes of the encoder: `frozen` (the primary mode: all arms see the same features to the end),
`trainable` (it goes on from there, targets are averages) or `scratch` (random, with the input cut); `tuning` is
`frozen` without the questions, which nothing may be chosen by. Of the samples two in five are questions and as many
scenes to imagine; the others tell what is where, and are read without a loss by all arms but the planted one. There are
10,200 questions on scenes that no arm sees.
"""

from ml_collections import ConfigDict

from experiments import quickstart
from experiments.scene_encoder import small_model

PATH = "data/claims-easy"
ENCODER = "runs/scene_encoder"
MODES = ("frozen", "trainable", "scratch", "tuning")
QUESTIONS_PER_KIND = 1700


def get_config(arg: str = "") -> ConfigDict:
    """A run of the baseline; the argument is a mode, `frozen` if empty."""
    mode = arg or "frozen"
    if mode not in MODES:
        raise ValueError(f"experiments/scene_claims.py: {mode!r}; there are {', '.join(MODES)}")
    config = quickstart.get_config()
    small_model(config)
    config.objective = "understanding"
    config.scene_world.update(path=PATH, seed=0, items_per_kind=QUESTIONS_PER_KIND, with_objects=True)
    config.data.tokenizer = f"{PATH}/tokenizer"
    config.data.sources = ConfigDict(
        {
            "qa": {"path": f"{PATH}/qa", "weight": 0.4, "augment": "none"},
            "generation": {"path": f"{PATH}/generation", "weight": 0.4, "augment": "none"},
            "objects": {"path": f"{PATH}/objects", "weight": 0.2, "augment": "none", "text_loss": "none"},
        }
    )
    config.loss.update(visual_weight=1.0, visual_weight_start=1.0, visual_ramp_steps=20)
    config.eval.benchmarks = ConfigDict({} if mode == "tuning" else {"scenes": f"{PATH}/questions.tsv"})
    config.eval.rollout_source, config.eval.without_image = "", True
    config.train.num_steps = config.train.eval_every_steps = config.checkpoint.every_steps = 500
    if mode != "scratch":
        config.init_from.update(workdir=ENCODER, components=("encoder",))
    if mode in ("frozen", "tuning"):
        config.optimizer.frozen = ("encoder",)
        config.loss.update(target="stop_gradient", cut_input_gradient=False)
    if mode == "trainable":
        config.loss.update(target="ema", cut_input_gradient=False)
    return config
