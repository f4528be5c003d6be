"""`make demo`: trains the quickstart, evaluates it on scenes it never saw, and draws what it sees.

    python -m experiments.demo --workdir=runs/demo [--compare] [--export=reference/demo]

Writes <workdir>/summary.json, <workdir>/sheet.png (what it says of new scenes) and <workdir>/rollouts.png (what it
imagines for captions, drawn from blocks of true scenes). With `--compare` the same budget is also trained without a
visual loss, in <workdir>-understanding, and both are printed side by side. With `--export` the trained parameters, the
tokenizer, the questions and the metric curve are written to a folder that stands alone (the repository keeps one).
"""

import argparse
import contextlib
import dataclasses
import json
import os
import resource
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from data_pipelines.scene_questions import Question, make_questions
from data_pipelines.scene_world import CAPTION_PROMPT
from data_pipelines.scenes import Level, caption, encode_png, make_scene, render, scene_rng
from experiments import quickstart
from experiments.scene_drawings import fidelity_table, predicted_embeddings, scene_bank, unseen_scenes
from unihetero_jax.checkpoint import Checkpointer
from unihetero_jax.config import Config, rolls_out
from unihetero_jax.config_reading import from_config_dict
from unihetero_jax.data.question_files import StoredImage
from unihetero_jax.data.tokenizer import load_tokenizer
from unihetero_jax.evaluation.benchmarks import Item
from unihetero_jax.evaluation.multiple_choice import score_items
from unihetero_jax.evaluation.scoring import OptionScores
from unihetero_jax.evaluation.sheet import SheetEntry, SheetQuestion, draw_pictures, draw_sheet
from unihetero_jax.inference.generate import Prompt, generate_text
from unihetero_jax.loaded_run import load_run, make_log_probs
from unihetero_jax.model.unihetero import Params
from unihetero_jax.train_run import exit_code, run_training

SHEET_SCENES = range(900_000, 900_004)
"""Indices of the test split that no question file reaches."""
QUESTIONS_PER_SCENE = 4
ROLLOUTS, SHEET_ROLLOUTS = 128, 6
WALL_CLOCK = "wall_clock_s"
"""File in the workdir that adds up the seconds of a demo that was interrupted and started again."""


def main(arguments: list[str] | None = None) -> int:
    """Runs the demo; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments.demo", description="Train, evaluate and draw the demo."
    )
    parser.add_argument("--workdir", default="runs/demo")
    parser.add_argument("--compare", action="store_true", help="also train objective=understanding at equal budget")
    parser.add_argument("--export", default="", help="folder for parameters, tokenizer, questions and metric curve")
    flags = parser.parse_args(arguments)
    config = from_config_dict(quickstart.get_config())

    def work() -> None:
        summaries = {config.objective: run_demo(config, Path(flags.workdir))}
        if flags.export:
            export(Path(flags.workdir), Path(flags.export))
        if flags.compare:
            other = dataclasses.replace(config, objective="understanding")
            summaries[other.objective] = run_demo(other, Path(f"{flags.workdir}-understanding"))
            (Path(flags.workdir) / "compare.json").write_text(json.dumps(summaries, indent=1) + "\n")
            print(comparison(summaries))

    return exit_code(work)


def run_demo(config: Config, workdir: Path) -> dict[str, Any]:
    """Trains, evaluates and draws one objective; returns what summary.json holds."""
    with _wall_clock(workdir) as seconds:
        state = run_training(config, os.fspath(workdir))
        draw_scenes(config, state.params, workdir / "sheet.png")
        drawn = draw_rollouts(config, state.params, workdir / "rollouts.png") if rolls_out(config) else None
        summary = summarise(config, workdir, seconds(), drawn)
    (workdir / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    print(
        f"{summary['wall_s']:.0f} s, {summary['peak_rss_gib']:.2f} GiB; "
        f"see {workdir / 'sheet.png'} and {workdir / 'summary.json'}"
    )
    return summary


@contextlib.contextmanager
def _wall_clock(workdir: Path) -> Iterator[Callable[[], float]]:
    """Seconds that the demo has taken, earlier legs of an interrupted one included; a finished one takes no more."""
    path, start = workdir / WALL_CLOCK, time.monotonic()
    earlier = float(path.read_text()) if path.exists() else 0.0
    was_finished = (workdir / "summary.json").exists()

    def seconds() -> float:
        return earlier if was_finished else earlier + time.monotonic() - start

    try:
        yield seconds
    finally:
        if workdir.is_dir():
            path.write_text(f"{seconds():.1f}\n")


def summarise(config: Config, workdir: Path, wall_s: float, drawn: dict[str, float] | None) -> dict[str, Any]:
    """What summary.json holds, from the result files of the last step and what was read in imagined scenes."""

    def result(name: str) -> dict[str, Any]:
        return json.loads((workdir / "eval" / f"{name}-{config.train.num_steps}.json").read_text())

    def accuracy(name: str) -> dict[str, float]:
        found = result(name)
        rows = {"overall": found["overall"], **found["by_category"]}
        return {kind: row["accuracy"] for kind, row in rows.items()}

    return {
        "objective": config.objective,
        "accuracy": accuracy("scenes"),
        "accuracy_heldout": accuracy("scenes_heldout"),
        "rollout": result("rollout") if rolls_out(config) else None,
        "drawn": drawn,
        "wall_s": round(wall_s, 1),
        "peak_rss_gib": max(
            round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 3), _earlier_peak(workdir)
        ),
    }


def _earlier_peak(workdir: Path) -> float:
    """Of a demo that was finished before: to draw it again takes less memory than to train it did."""
    path = workdir / "summary.json"
    return json.loads(path.read_text())["peak_rss_gib"] if path.exists() else 0.0


def draw_scenes(config: Config, params: Params, path: Path) -> None:
    """Captions four new scenes, answers questions about them, and writes the sheet."""
    tokenizer = load_tokenizer(config.data.tokenizer)
    level: Level = "hard" if config.scene_world.level == "hard" else "easy"
    scenes = [make_scene(0, "test", level, index) for index in SHEET_SCENES]
    pictures = [render(scene, 0, "test") for scene in scenes]
    files = [encode_png(picture) for picture in pictures]
    captions = generate_text(config, params, tokenizer, [Prompt(CAPTION_PROMPT, (file,)) for file in files])
    rngs = [scene_rng(0, "test", level, index, "questions") for index in SHEET_SCENES]
    questions = [make_questions(scene, rng, QUESTIONS_PER_SCENE) for scene, rng in zip(scenes, rngs, strict=True)]
    items = [
        Item(
            f"{i}-{j}",
            question.text,
            question.options,
            question.options.index(question.answer),
            (StoredImage.of(files[i]),),
            question.kind,
        )
        for i, asked in enumerate(questions)
        for j, question in enumerate(asked)
    ]
    scores = iter(score_items(items, tokenizer, config, make_log_probs(config, params)))
    entries = []
    for scene, picture, text, asked, rng in zip(scenes, pictures, captions, questions, rngs, strict=True):
        print(f"caption: {text}")
        answered = tuple(
            SheetQuestion(question.text, _chosen(question, next(scores)), question.answer) for question in asked
        )
        entries.append(SheetEntry(picture, text, caption(scene, rng), answered))
    draw_sheet(entries, path)


def draw_rollouts(config: Config, params: Params, path: Path) -> dict[str, float]:
    """Scenes imagined for unseen captions, beside the true ones; returns what the reader finds right in them."""
    tokenizer, asked = load_tokenizer(config.data.tokenizer), unseen_scenes(ROLLOUTS)
    predicted = predicted_embeddings(config, params, tokenizer, asked.captions, 0)
    drawn = scene_bank(config, params, tokenizer).draw(predicted)
    found = {"imagined from captions": asked.fidelity(drawn), "another scene (blind floor)": asked.of_other_scenes()}
    print(fidelity_table(found))
    rows = [(asked.captions[i], [asked.pictures[i], drawn[i]]) for i in range(SHEET_ROLLOUTS)]
    draw_pictures(rows, path, ["true scene", "imagined"])
    return dict(found["imagined from captions"].shares)


def _chosen(question: Question, scores: OptionScores) -> str:
    return "(no answer)" if scores.by_sum is None else question.options[scores.by_sum]


def export(workdir: Path, folder: Path) -> None:
    """Writes what `evaluate` and `generate` need, without optimizer state, and the run's metric curve."""
    if folder.is_absolute():
        raise ValueError(f"--export {folder}: the export keeps this name to find its files; give a relative one")
    if folder.exists():
        raise ValueError(f"--export {folder} exists; remove it, or name another folder")
    run = load_run(os.fspath(workdir), -1, 0)
    config, step = run.config, run.step
    world = Path(config.scene_world.path)
    folder.mkdir(parents=True)
    shutil.copytree(world / "tokenizer", folder / "tokenizer")
    shutil.copy(world / "questions.tsv", folder)
    for name in ("metrics.jsonl", "summary.json", "sheet.png"):
        shutil.copy(workdir / name, folder)
    moved = dataclasses.replace(
        config,
        data=dataclasses.replace(config.data, tokenizer=os.fspath(folder / "tokenizer")),
        eval=dataclasses.replace(config.eval, benchmarks={"scenes": os.fspath(folder / "questions.tsv")}),
    )
    checkpointer = Checkpointer(folder, moved, {"tokenizer": run.tokenizer.hash})
    checkpointer.save(step, {"step": step, "params": run.params}, {}, wait=True)
    checkpointer.close()


def comparison(summaries: dict[str, dict[str, Any]]) -> str:
    """Accuracy per question type of the objectives, side by side."""
    kinds = next(iter(summaries.values()))["accuracy"]
    lines = [f"{'accuracy':<12}" + "".join(f"{name:>18}" for name in summaries)]
    lines += [f"{kind:<12}" + "".join(f"{s['accuracy'][kind]:>18.3f}" for s in summaries.values()) for kind in kinds]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
