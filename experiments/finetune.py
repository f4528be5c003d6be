r"""Does a pretrained language model with a pretrained vision encoder learn to follow instructions about images?

Commands, with a folder of each model, and conversations in LLaVA's JSON beside their images:

    python -m unihetero_jax import-hf --language-model=LM --vision-encoder=VE --workdir=runs/pretrained
    python -m data_pipelines.convert llava --input=train.json --images=images.zip --output=data/instructions \
        --tokenizer=runs/pretrained/tokenizer --patch-size=16 --min-patches=4 --max-patches=256
    python -m unihetero_jax train --config=experiments/finetune.py:runs/pretrained --workdir=runs/finetuned
    python -m unihetero_jax export-hf --workdir=runs/finetuned --output=exported

The argument is the workdir of the import; without one the model of `experiments/base.py` starts at random. Expected:
the text loss on held-out conversations falls. It was run from end to end with tiny random models
(`tests/test_hf_import.py`), with real weights not yet: none can be had where this was written.

Our choices, after LLaVA's second stage (arXiv 2310.03744): the vision encoder stays as it is, the projector, which is
new, learns ten times as fast as the language model, answers alone carry a loss.
"""

import json
from pathlib import Path

from ml_collections import ConfigDict

from experiments import base

DATA = "data/instructions"


def get_config(arg: str = "") -> ConfigDict:
    """The instruction stage; the argument is the workdir of an import."""
    config = base.get_config()
    if arg:
        imported = Path(arg) / "config.json"
        if not imported.is_file():
            raise ValueError(
                f"{arg}: no workdir of an import (no config.json); make one with `import-hf --workdir={arg}`"
            )
        values = json.loads(imported.read_text())
        config.model = ConfigDict(values["model"])
        sizes = ("tokenizer", "row_tokens", "row_patches", "image_min_patches", "image_max_patches")
        config.data.update({name: values["data"][name] for name in sizes})
        config.init_from = ConfigDict(
            {
                "workdir": arg,
                "step": 0,
                "components": ("encoder", "projector", "decoder"),
                "language_model": "",
                "vision_encoder": "",
            }
        )
    else:
        config.data.tokenizer = f"{DATA}/tokenizer"
    config.objective = "understanding"  # images are read, none is drawn
    config.data.sources = ConfigDict({"instructions": {"path": DATA, "weight": 1.0, "augment": "none"}})
    config.optimizer.frozen = ("encoder",)
    config.optimizer.learning_rate, config.optimizer.projector_lr = 2e-5, 10.0
    config.optimizer.weight_decay, config.optimizer.warmup_steps = 0.0, 100
    config.train.num_steps = 1000
    return config
