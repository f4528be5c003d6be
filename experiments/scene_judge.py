"""A judge of drawn scenes: an encoder that no compared run trained on, in whose space all of them are measured.

Command: `python -m unihetero_jax train --config=experiments/scene_judge.py --workdir=runs/scene_judge`, then
`python -m unihetero_jax evaluate --workdir=RUN --rollout-judge=runs/scene_judge`.
Expected: the text loss of captions falls from 6 to under 1 nat a token; where it stays high the judge knows no scenes.

It learns to caption scenes of a seed that no other experiment uses, from the image alone: so its space holds what
captions tell (objects, colours, shapes, sizes, places) and no run's own objective (our choice).
"""

from ml_collections import ConfigDict

from experiments import quickstart
from experiments.scene_encoder import fine_images, small_model

VARIANTS = ("easy", "hard", "easy-fine", "hard-fine")
SEED = 7_919
"""Of its scenes and of its parameters."""


def get_config(arg: str = "") -> ConfigDict:
    """The judge of the easy world, or by the argument of the hard one, or of either in 64 visual tokens an image."""
    variant = arg or "easy"
    if variant not in VARIANTS:
        raise ValueError(f"experiments/scene_judge.py: {variant!r}; there are {', '.join(VARIANTS)}")
    level, _, fine = variant.partition("-")
    path = f"data/judge-{variant}"
    config = quickstart.get_config()
    config.objective, config.seed = "understanding_i2t", SEED
    config.scene_world.update(level=level, path=path, seed=SEED)
    config.data.tokenizer = f"{path}/tokenizer"
    config.data.sources = ConfigDict({"captions": {"path": f"{path}/generation", "weight": 1.0, "augment": "none"}})
    config.eval.benchmarks, config.eval.rollout_source = ConfigDict(), ""
    config.train.num_steps = 1500
    if fine:
        small_model(config)
        fine_images(config, images_per_row=1)
    return config
