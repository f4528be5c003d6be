"""Which renderer draws best from one finished run: how conditions reach it, and what is rolled out in training.

    python -m experiments.renderer_choices --run=reference/demo --workdir=runs/renderer-choices

Trains a renderer (experiments/renderer.py) for every arm and seed, equal in steps, batches and noise, and reads what it
draws of unseen scenes: from their own embeddings and from those rolled out of their captions. These come from the
frozen run, so every arm draws from the same ones. Writes <workdir>/choices.json after every renderer; a finished
renderer is neither trained nor drawn again. Expected: the table in docs/generation.md.
"""

import argparse
import dataclasses
import json
import os
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from data_pipelines.scenes import encode_png
from experiments import renderer
from experiments.scene_drawings import UnseenScenes, batches, predicted_embeddings, unseen_scenes
from unihetero_jax.config import MERGED_PATCHES, Config
from unihetero_jax.config_reading import from_config_dict
from unihetero_jax.evaluation.drawings import seen_images
from unihetero_jax.flops import model_flops, padded_work, parameter_counts
from unihetero_jax.inference.draw import draw_images
from unihetero_jax.loaded_run import Run, load_run
from unihetero_jax.train_run import exit_code, run_training

ARMS = ("adaptive_norm", "cross_attention", "adaptive_norm+rollout")
ATTRIBUTES = ("object", "color", "shape", "size")
SOURCES = ("true", "captions")
RESULTS = "choices.json"
Result = dict[str, Any]


def main(arguments: list[str] | None = None) -> int:
    """Trains, draws, reads, and prints the table; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m experiments.renderer_choices", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--run", default="reference/demo", help="finished run whose embeddings are drawn")
    parser.add_argument("--workdir", default="runs/renderer-choices")
    parser.add_argument("--steps", type=int, default=1200, help="of every renderer")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--scenes", type=int, default=128, help="unseen scenes that are drawn and read")
    parser.add_argument("--guidance", default="1.0,2.5", help="scales of classifier-free guidance to draw with")
    parser.add_argument("--arms", default=",".join(ARMS))
    flags = parser.parse_args(arguments)
    return exit_code(lambda: print(table(compare(flags))))


def compare(flags: argparse.Namespace) -> list[Result]:
    """Every arm with every seed, seeds outermost: what is there when it is stopped can be compared."""
    workdir, arms = Path(flags.workdir), flags.arms.split(",")
    unknown = [arm for arm in arms if arm not in ARMS]
    if unknown:
        raise ValueError(f"--arms {','.join(unknown)}: there are {', '.join(ARMS)}")
    scales = [float(scale) for scale in flags.guidance.split(",")]
    settings = {"steps": flags.steps, "scenes": flags.scenes, "guidance": scales}
    results = [result for result in _stored(workdir) if all(result[name] == value for name, value in settings.items())]
    asked, embeddings = unseen_scenes(flags.scenes), {}
    for seed in range(flags.seeds):
        for arm in arms:
            if any((result["arm"], result["seed"]) == (arm, seed) for result in results):
                continue
            folder, config = workdir / f"{arm}-{seed}", make_config(flags.run, arm, seed, flags.steps)
            run_training(config, os.fspath(folder))
            run = load_run(os.fspath(folder), -1, 0)
            embeddings = embeddings or embeddings_of(run, asked)
            drawn = {str(scale): read_drawings(run, asked, embeddings, scale) for scale in scales}
            results.append({"arm": arm, "seed": seed, **settings, **describe(config, folder), "drawn": drawn})
            (workdir / RESULTS).write_text(json.dumps(results, indent=1) + "\n")
            print(table(results[-1:]), flush=True)
    return results


def _stored(workdir: Path) -> list[Result]:
    return json.loads((workdir / RESULTS).read_text()) if (workdir / RESULTS).exists() else []


def make_config(run: str, arm: str, seed: int, num_steps: int) -> Config:
    """The renderer of a run, by arm; what is the same for all arms is that of experiments/renderer.py."""
    config = renderer.get_config(run)
    pixels = config.model.pixel_decoder
    pixels.conditioning = arm.removesuffix("+rollout")
    if arm.endswith("+rollout"):  # so many that all embeddings are those of a free rollout
        pixels.rollout_passes = config.data.image_max_patches // MERGED_PATCHES - 1
    config.seed = config.data.seed = seed
    config.eval.rollout_source, config.eval.validation_rows = "", 64
    config.train.num_steps = config.train.eval_every_steps = config.checkpoint.every_steps = num_steps
    return from_config_dict(config)


def embeddings_of(run: Run, asked: UnseenScenes) -> dict[str, np.ndarray]:
    """What is drawn, by where it comes from, float[scenes, N, D]: the frozen run's, whatever the renderer is."""
    files = [encode_png(picture) for picture in asked.pictures]
    _, true, _ = seen_images(run.config, run.params, run.tokenizer, files)
    rolled = predicted_embeddings(run.config, run.params, run.tokenizer, asked.captions, 0)
    return dict(zip(SOURCES, (true, rolled), strict=True))


def read_drawings(
    run: Run, asked: UnseenScenes, embeddings: Mapping[str, np.ndarray], guidance: float
) -> dict[str, dict[str, float]]:
    """Share right of what was asked for, by where the embeddings come from and by attribute; the noise is the same for
    all runs.
    """
    config = dataclasses.replace(run.config, drawing=dataclasses.replace(run.config.drawing, guidance=guidance))
    height, width = asked.pictures[0].shape[:2]
    side = 2 * config.model.encoder.patch_size
    found = {}
    for source, values in embeddings.items():
        pictures = [
            picture
            for number, part in enumerate(batches(list(values)))
            for picture in draw_images(
                config, run.params, np.asarray(part), (height // side, width // side), jax.random.key(number)
            )
        ]
        found[source] = dict(asked.fidelity(pictures, all_sizes=source == "true").shares)
    return found


def describe(config: Config, folder: Path) -> Result:
    """What a renderer is and costs: parameters of the pixel decoder, FLOPs and seconds of a step (the median of those
    logged), and the pixel loss of unseen images.
    """
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    flops = model_flops(config, padded_work(config, config.train.global_batch_rows))
    losses = [terms["pixel"] for terms in lines[-1]["eval_loss"].values()]
    return {
        "parameters": parameter_counts(config.model, config.objective)["pixel_decoder"],
        "pixel_decoder_gflop": flops["pixel_decoder"] / 1e9, "total_gflop": flops["total"] / 1e9,
        "step_time_s": statistics.median(line["step_time_s"] for line in lines),
        "pixel_loss": statistics.fmean(losses),
    }  # fmt: skip


def table(results: Sequence[Result]) -> str:
    """A line for each arm and guidance: means over seeds; of an attribute, from true embeddings / from captions."""
    lines = [f"{'arm':<24}{'seeds':>6}{'guidance':>9}" + "".join(f"{name:>14}" for name in ATTRIBUTES)
             + f"{'pixel loss':>12}{'parameters':>12}{'GFLOP/step':>12}{'s/step':>8}"]  # fmt: skip
    for arm in dict.fromkeys(result["arm"] for result in results):
        own = [result for result in results if result["arm"] == arm]

        def mean(name: str, own: Sequence[Result] = own) -> float:
            return statistics.fmean(result[name] for result in own)

        for scale in own[0]["drawn"]:
            shares = [
                "/".join(f"{statistics.fmean(r['drawn'][scale][source][name] for r in own):.3f}" for source in SOURCES)
                for name in ATTRIBUTES
            ]
            lines.append(
                f"{arm:<24}{len(own):>6}{scale:>9}" + "".join(f"{share:>14}" for share in shares)
                + f"{mean('pixel_loss'):>12.4f}{own[0]['parameters']:>12,}{own[0]['total_gflop']:>12.1f}"
                + f"{mean('step_time_s'):>8.3f}"
            )  # fmt: skip
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
