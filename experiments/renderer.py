"""Can images be drawn from the embeddings that a finished run reads and predicts?

Command: `python -m unihetero_jax train --config=experiments/renderer.py:RUN --workdir=runs/renderer`, where RUN is a
workdir of objective `semantic_input`; then `generate --workdir=runs/renderer --prompt=... --num-images=8
--output=out.png`. Expected: see docs/generation.md.

All of RUN stays as it is, to the bit; the pixel decoder alone learns, from its true, noised and predicted embeddings.
"""

import json
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from experiments import base, quickstart
from unihetero_jax.checkpoint import CheckpointError, read_metadata, valid_step

KEPT = ("encoder", "projector", "decoder", "semantic_head")


def get_config(arg: str = "") -> ConfigDict:
    """The renderer of a run; the argument is its workdir. Without one, the model of the quickstart at random."""
    config = quickstart.get_config()
    if arg:
        values = _stored_config(Path(arg))
        new = base.get_config()
        for section in ("model", "data", "scene_world", "loss"):
            config[section] = ConfigDict({**new[section].to_dict(), **values[section]})
        config.init_from.update(workdir=arg, components=KEPT)
        config.optimizer.frozen = KEPT
    config.objective = "unihetero"
    config.loss.target = "stop_gradient"  # a frozen target needs no average
    config.eval.benchmarks = ConfigDict()
    config.train.num_steps = 1500
    return config


def _stored_config(workdir: Path) -> dict[str, Any]:
    """Of a run, or of an export, which has its newest step's alone."""
    path = workdir / "config.json"
    if path.is_file():
        return json.loads(path.read_text())
    try:
        return read_metadata(valid_step(workdir, None))["config"]
    except CheckpointError as error:
        raise ValueError(f"{workdir}: no workdir of a run (no config.json, no complete checkpoint)") from error
