"""The run that the arms of claim 3 vary: images of 64 visual tokens, imagined from captions that tell all of them.

Command: `experiments/sweeps/claim3_target_space.py` has all of them.
Expected: nothing is claimed beforehand; it was not run at the scenes scale yet.

The argument says how the shared, frozen encoder attends: `bidirectional`, or `causal`, where no embedding holds
anything of later blocks. What all arms have in common besides (our choices): squared error on targets standardised per
dimension, since a raw patch has a length that a cosine would lose; the inputs cut from the visual loss; a tenth of the
samples are questions, so that the language model reads, too.
"""

from ml_collections import ConfigDict

from experiments import quickstart
from experiments.scene_encoder import fine_images, small_model

PATH = "data/claims-easy-fine"
ENCODERS = {"bidirectional": "runs/scene_encoder-fine", "causal": "runs/scene_encoder-fine-causal"}
JUDGE = "runs/scene_judge-fine"
IMAGES_PER_ROW = 2


def get_config(arg: str = "") -> ConfigDict:
    """A run that predicts the input embedding; the argument is the encoder's attention, `bidirectional` if empty."""
    attention = arg or "bidirectional"
    if attention not in ENCODERS:
        raise ValueError(f"experiments/scene_horizon.py: {attention!r}; there are {', '.join(ENCODERS)}")
    config = quickstart.get_config()
    small_model(config)
    config.objective = "semantic_input"
    config.scene_world.update(path=PATH, seed=0)
    config.data.tokenizer = f"{PATH}/tokenizer"
    config.data.sources = ConfigDict(
        {
            "qa": {"path": f"{PATH}/qa", "weight": 0.1, "augment": "none"},
            "generation": {"path": f"{PATH}/generation", "weight": 0.9, "augment": "none"},
        }
    )
    fine_images(config, IMAGES_PER_ROW)
    config.model.encoder.attention = attention
    config.model.semantic_head.standardise_targets = True
    config.init_from.update(workdir=ENCODERS[attention], components=("encoder",))
    config.optimizer.frozen = ("encoder",)
    config.loss.update(
        target="stop_gradient", cut_input_gradient=True, visual_loss="mse", visual_weight=1.0, visual_weight_start=1.0,
        visual_ramp_steps=20,
    )  # fmt: skip
    config.eval.benchmarks = ConfigDict()
    config.eval.update(rollout_source="generation", rollout_candidates=128, rollout_judge=JUDGE)
    config.train.num_steps = config.train.eval_every_steps = config.checkpoint.every_steps = 1000
    return config
