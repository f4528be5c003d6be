"""`make demo-images`: trains `unihetero` until it draws scenes from captions that it never saw, and reads what it drew.

    python -m experiments.demo_images --workdir=runs/demo-images

Writes <workdir>/images.json (fidelity by attribute, also of captions that leave objects out), images.png (captions, the
true scenes, what is drawn from their own embeddings and from the captions) and training.png (the same captions drawn by
the steps that were kept). Expected on two CPU cores: the table in docs/generation.md.
"""

import argparse
import dataclasses
import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from ml_collections import ConfigDict

from data_pipelines.scene_reader import Fidelity
from data_pipelines.scenes import encode_png
from experiments import quickstart
from experiments.scene_drawings import (
    UnseenScenes,
    answers_on,
    answers_table,
    batches,
    fidelity_table,
    predicted_embeddings,
    scene_bank,
    unseen_scenes,
)
from unihetero_jax.checkpoint import list_steps
from unihetero_jax.config_reading import from_config_dict
from unihetero_jax.evaluation.drawings import BlockBank, default_grid, draw_from_texts, reconstruct, seen_images
from unihetero_jax.evaluation.sheet import draw_pictures
from unihetero_jax.loaded_run import Run, load_run
from unihetero_jax.train_run import exit_code, run_training

NUM_SCENES = 256
SHEET_SCENES, DRAWN_EACH = 8, 4
KEPT_EVERY = 1000


def get_config(arg: str = "") -> ConfigDict:
    """The quickstart with a renderer beside it, twice as long, half of it scenes to imagine; takes no argument."""
    config = quickstart.get_config(arg)
    config.objective = "unihetero"
    config.data.sources.qa.weight = config.data.sources.generation.weight = 0.5
    config.loss.visual_weight = 1.0
    # Our choice, of 1 to 6, on other scenes than those that are measured: more shapes are right, above it no more.
    config.drawing.guidance = 2.5
    config.eval.benchmarks = ConfigDict({"scenes": config.eval.benchmarks.scenes})
    config.train.num_steps, config.train.eval_every_steps = 4000, 2000
    config.checkpoint.every_steps, config.checkpoint.keep_every_steps = 500, KEPT_EVERY
    return config


def main(arguments: list[str] | None = None) -> int:
    """Trains, draws, reads, and writes the sheets; returns the exit code."""
    summary = (__doc__ or "").split("\n")[0]
    parser = argparse.ArgumentParser(prog="python -m experiments.demo_images", description=summary)
    parser.add_argument("--workdir", default="runs/demo-images")
    flags = parser.parse_args(arguments)
    workdir = Path(flags.workdir)

    def work() -> None:
        run_training(from_config_dict(get_config()), flags.workdir)
        draw(workdir)

    return exit_code(work)


def draw(workdir: Path) -> dict[str, Fidelity]:
    """Measures the run's last step and writes its sheets."""
    run, asked = load_run(os.fspath(workdir), -1, 0), unseen_scenes(NUM_SCENES)
    rolled = predicted_embeddings(run.config, run.params, run.tokenizer, asked.captions, 0)
    bank = scene_bank(run.config, run.params, run.tokenizer)
    pictures = drawn_pictures(run, asked, rolled, bank)
    found = {"true pictures (the reader's accuracy)": asked.fidelity(asked.pictures, all_sizes=True)}
    found |= {label: asked.fidelity(made, all_sizes="true emb" in label) for label, made in pictures.items()}
    found["another scene's picture (blind floor)"] = asked.of_other_scenes()
    found |= from_partial_captions(run, asked, pictures["drawn from captions"], bank)
    print(fidelity_table(found))
    answers = answers_on_rollouts(run, asked, rolled)
    print(answers_table(answers))
    values = {label: dataclasses.asdict(one) for label, one in found.items()}
    result = {"step": run.step, "config_hash": run.config_hash, "num_scenes": NUM_SCENES, "fidelity": values,
              "answers": answers}  # fmt: skip
    (workdir / "images.json").write_text(json.dumps(result, indent=1) + "\n")
    draw_sheet_of_scenes(run, asked, pictures, workdir / "images.png")
    draw_over_training(workdir, asked, workdir / "training.png")
    print(f"see {workdir / 'images.png'}, {workdir / 'training.png'} and {workdir / 'images.json'}")
    return found


def drawn_pictures(run: Run, asked: UnseenScenes, rolled: np.ndarray, bank: BlockBank) -> dict[str, list[np.ndarray]]:
    """Every scene, by what it was drawn from."""
    config, params, tokenizer = run.config, run.params, run.tokenizer
    files = [encode_png(picture) for picture in asked.pictures]
    from_true = [pair[1] for part in batches(files) for pair in reconstruct(config, params, tokenizer, part, 0)]
    return {
        "drawn from true embeddings": from_true,
        "drawn from captions": _from_captions(run, asked.captions, 0),
        "nearest blocks, from captions": bank.draw(rolled),
    }


def from_partial_captions(
    run: Run, asked: UnseenScenes, from_whole: Sequence[np.ndarray], bank: BlockBank
) -> dict[str, Fidelity]:
    """The control: captions that name some of a scene's objects; training had none that left any out. What they name
    should be as right as the same objects under whole captions, what they leave out no better than in another scene's
    picture.
    """
    partial = asked.partially()
    rolled = predicted_embeddings(run.config, run.params, run.tokenizer, partial.captions, 0)
    kinds = {
        "drawn from partial captions": partial.fidelity_by_name(_from_captions(run, partial.captions, 0)),
        "nearest blocks, partial": partial.fidelity_by_name(bank.draw(rolled)),
    }
    found = {f"{label}: {name}": one for label, by_name in kinds.items() for name, one in by_name.items()}
    same = [made for made, scene in zip(from_whole, asked.scenes, strict=True) if scene in partial.scenes]
    others = [*partial.pictures[1:], partial.pictures[0]]
    return found | {
        "drawn from captions: those named": partial.fidelity_by_name(same)["named"],
        "another scene's picture: unnamed": partial.fidelity_by_name(others)["unnamed"],
    }


def answers_on_rollouts(run: Run, asked: UnseenScenes, rolled: np.ndarray) -> dict[str, dict[str, float]]:
    """Questions about the scenes, answered from what was rolled out of their captions, beside what is above and below:
    the true embeddings; the mean of the places over all scenes, and the rollout of the scene before.
    """
    config, params, tokenizer = run.config, run.params, run.tokenizer
    _, true, _ = seen_images(config, params, tokenizer, [encode_png(picture) for picture in asked.pictures])
    seen = {
        "true embeddings": true,
        "rolled out from captions": rolled,
        "mean embedding": np.broadcast_to(rolled.mean(axis=0), rolled.shape),
        "another scene's rollout": np.roll(rolled, 1, axis=0),
    }
    return {label: answers_on(config, params, tokenizer, asked, values) for label, values in seen.items()}


def _from_captions(run: Run, captions: Sequence[str], seed: int) -> list[np.ndarray]:
    grid = default_grid(run.config)
    return [
        picture
        for number, part in enumerate(batches(captions))
        for picture in draw_from_texts(run.config, run.params, run.tokenizer, part, grid, seed + number)
    ]


def draw_sheet_of_scenes(
    run: Run, asked: UnseenScenes, pictures: Mapping[str, Sequence[np.ndarray]], path: Path
) -> None:
    """A row for each of the first scenes."""
    again = [_from_captions(run, asked.captions[:SHEET_SCENES], 1000 + number) for number in range(DRAWN_EACH - 1)]
    columns = ["true scene", *pictures, *["another noise"] * len(again)]
    rows = [
        (asked.captions[i], [asked.pictures[i], *(made[i] for made in pictures.values()), *(made[i] for made in again)])
        for i in range(SHEET_SCENES)
    ]
    draw_pictures(rows, path, [name.replace(" from ", "\nfrom ").replace(",", "") for name in columns])


def draw_over_training(workdir: Path, asked: UnseenScenes, path: Path) -> None:
    """The same captions drawn by each step that was kept for it, and the true scenes."""
    rows: list[tuple[str, Sequence[np.ndarray]]] = []
    for step in sorted(step for step in list_steps(workdir) if step % KEPT_EVERY == 0):
        run = load_run(os.fspath(workdir), step, 0)
        rows.append((f"step {step}", _from_captions(run, asked.captions[:SHEET_SCENES], 0)))
    draw_pictures([*rows, ("the true scenes", asked.pictures[:SHEET_SCENES])], path)


if __name__ == "__main__":
    sys.exit(main())
