"""What keeps visual embeddings from collapsing: how encoder and target are trained, with several seeds.

    python -m experiments.encoder_study --workdir=runs/encoder-study [--seeds=3] [--steps=700]

A small model on the easy scene world. Every arm trains as long, on the same samples, with text plentiful (half of the
samples are questions) and scarce (a tenth). The encoders that are frozen, or start trained, come from a run that
captions scenes of another seed, as experiments/scene_judge.py does. Writes <workdir>/table.json and prints the table;
run again it goes on where it was. What was found is in docs/generation.md.
"""

import argparse
import itertools
import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from experiments import quickstart, scene_judge
from experiments.scene_encoder import small_model
from unihetero_jax.config_reading import from_config_dict
from unihetero_jax.metrics import read_metrics
from unihetero_jax.train_run import exit_code, run_training

ENCODER_STEPS = 700
_SG: dict[str, Any] = {"loss.target": "stop_gradient", "loss.cut_input_gradient": False}
_EMA: dict[str, Any] = {"loss.target": "ema", "loss.cut_input_gradient": False}
_TRAINED = {"init_from.components": ("encoder",)}
ARMS: dict[str, dict[str, Any]] = {
    "understanding": {"objective": "understanding"},
    "stop-gradient": _SG,
    "EMA": _EMA,
    "inputs cut": _SG | {"loss.cut_input_gradient": True},
    "trained encoder, EMA": _TRAINED | _EMA,
    "trained encoder, partly frozen, EMA": _TRAINED | _EMA | {"optimizer.frozen_encoder_layers": 1},
    "trained encoder, frozen": _TRAINED | _EMA | {"optimizer.frozen": ("encoder",)},
    "trained encoder, frozen, stop-gradient": _TRAINED | _SG | {"optimizer.frozen": ("encoder",)},
}
TEXT_SHARES = {"plenty": 0.5, "scarce": 0.1}
COLUMNS = ("answer_nll", "retrieval", "visual", "mean_embedding", "copy_previous", "within_spread", "across_spread")
"""Beside accuracy and alarms: all on held-out scenes; the visual loss stands beside its two baselines."""


def make_config(arm: str, text_share: float, seed: int, steps: int, encoder: str) -> ConfigDict:
    """One run of the study; `encoder` is the workdir of the trained encoder."""
    config = quickstart.get_config()
    small_model(config)
    config.seed = config.data.seed = seed
    config.data.sources.qa.weight, config.data.sources.generation.weight = text_share, 1 - text_share
    config.loss.update(visual_weight=1.0, visual_weight_start=1.0, visual_ramp_steps=20)
    config.eval.benchmarks = ConfigDict({"scenes": config.eval.benchmarks.scenes})
    config.train.num_steps, config.train.eval_every_steps = steps, steps
    config.checkpoint.every_steps = steps
    config.update_from_flattened_dict(ARMS[arm])
    if config.init_from.components:
        config.init_from.workdir = encoder
    return config


def train_encoder(workdir: str) -> None:
    """The encoder that arms start from or keep: it learns to caption scenes that no arm sees."""
    config = scene_judge.get_config()
    small_model(config)
    config.train.num_steps, config.train.eval_every_steps = ENCODER_STEPS, ENCODER_STEPS
    run_training(from_config_dict(config), workdir)


def measure(workdir: Path, steps: int) -> dict[str, Any]:
    """What a finished run is judged by."""
    found = json.loads((workdir / "eval" / f"scenes-{steps}.json").read_text())["overall"]
    last = read_metrics(workdir)[-1]
    held_out = last["eval_loss"]
    path = workdir / "eval" / f"rollout-{steps}.json"
    rollout = json.loads(path.read_text()) if path.exists() else {"retrieval": None, "alarms": []}
    drawn = held_out["generation"]
    return {
        "accuracy": found["accuracy"], "answer_nll": held_out["qa"]["text"], "retrieval": rollout["retrieval"],
        "visual": drawn.get("visual"), "mean_embedding": drawn.get("visual_mean_embedding"),
        "copy_previous": drawn.get("visual_copy_previous"), "within_spread": drawn["within_spread"],
        "across_spread": drawn["across_spread"], "alarms": last["alarms"] + rollout["alarms"],
    }  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    """Trains what is missing, and prints the table."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments.encoder_study", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--workdir", default="runs/encoder-study")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=700)
    flags = parser.parse_args(arguments)
    return exit_code(lambda: print(format_table(study(Path(flags.workdir), flags.seeds, flags.steps))))


def study(folder: Path, num_seeds: int, steps: int) -> dict[str, dict[str, list[dict[str, Any]]]]:
    """Trains what is missing, seeds outermost; {text share: {arm: what each seed found}}."""
    encoder = os.fspath(folder / "encoder")
    train_encoder(encoder)
    runs: dict[str, dict[str, list[dict[str, Any]]]] = {share: {arm: [] for arm in ARMS} for share in TEXT_SHARES}
    for seed, (share, text_share), arm in itertools.product(range(num_seeds), TEXT_SHARES.items(), ARMS):
        workdir = folder / f"{arm.replace(', ', '-').replace(' ', '_')}-{share}-{seed}"
        run_training(from_config_dict(make_config(arm, text_share, seed, steps, encoder)), os.fspath(workdir))
        runs[share][arm].append(measure(workdir, steps))
        (folder / "table.json").write_text(json.dumps(runs, indent=1) + "\n")
    return runs


def format_table(runs: Mapping[str, Mapping[str, Sequence[Mapping[str, Any]]]]) -> str:
    """Means over seeds, with the standard deviation of the accuracy; alarms as runs that had one."""
    lines = []
    for share, by_arm in runs.items():
        lines.append(f"text {share}")
        names = (*COLUMNS, "alarms in")
        lines.append(f"  {'arm':<40}{'accuracy':>16}" + "".join(f"{name:>15}" for name in names))
        for arm, seeds in by_arm.items():
            accuracy = [one["accuracy"] for one in seeds]
            cells = [f"{np.mean(accuracy):.3f} ± {np.std(accuracy, ddof=1) if len(seeds) > 1 else 0:.3f}".rjust(16)]
            for name in COLUMNS:
                values = [one[name] for one in seeds]
                cells.append("-".rjust(15) if None in values else f"{np.mean(values):>15.3f}")
            alarmed = sum(bool(one["alarms"]) for one in seeds)
            lines.append(f"  {arm:<40}" + "".join(cells) + f"{alarmed} of {len(seeds)}".rjust(15))
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
