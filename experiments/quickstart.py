"""Does the main job run end to end, and does a small model learn both to read scenes and to imagine them?

Command: `make demo`, or `python -m unihetero_jax train --config=experiments/quickstart.py --workdir=runs/quickstart`.
Expected on two CPU cores: the README's table, which `make demo` prints.

One mixture of two sources of the embedded scene world: questions about scenes (image, then independent turns) and
scenes to imagine (caption, then image).
"""

from ml_collections import ConfigDict

from experiments import base

PATH = "data/scenes-easy"


def get_config(arg: str = "") -> ConfigDict:
    """The quickstart; takes no argument."""
    config = base.get_config(arg)
    config.scene_world.update(level="easy", path=PATH, num_scenes=20_000)
    config.data.tokenizer = f"{PATH}/tokenizer"
    config.data.sources = ConfigDict(
        {
            "qa": {"path": f"{PATH}/qa", "weight": 0.7, "augment": "none"},
            "generation": {"path": f"{PATH}/generation", "weight": 0.3, "augment": "none"},
        }
    )
    config.eval.benchmarks = ConfigDict(
        {"scenes": f"{PATH}/questions.tsv", "scenes_heldout": f"{PATH}/questions_heldout.tsv"}
    )
    config.data.row_tokens, config.data.row_patches = 112, 72  # two scenes a row: short rows are cheap
    config.data.num_data_shards = 8
    config.loss.visual_ramp_steps = 600  # text shapes the space before it becomes a target
    config.loss.visual_weight = 0.3  # at 1.0 the same run imagines as well and reads a little worse
    config.train.num_steps, config.train.global_batch_rows = 2000, 16
    config.train.log_every_steps, config.train.eval_every_steps = 20, 500
    config.checkpoint.every_steps = 250
    config.eval.rollout_source = "generation"
    return config
