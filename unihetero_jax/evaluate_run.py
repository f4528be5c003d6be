"""`evaluate`: which steps, benchmarks and instruments; what they find is written under the run's eval/."""

import argparse
import json
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from etils import epath

from data_pipelines.bias import turns_of
from data_pipelines.prepared import read_stored
from data_pipelines.scene_reader import read_cells
from data_pipelines.scenes import CELL
from unihetero_jax import distributed
from unihetero_jax.checkpoint import list_steps
from unihetero_jax.config import Config, config_hash, has_cross_attention, rolls_out
from unihetero_jax.data.labelled_images import class_names, read_labelled_images
from unihetero_jax.data.records import MERGE_SIZE
from unihetero_jax.data.tokenizer import load_tokenizer
from unihetero_jax.evaluation.benchmarks import read_benchmark
from unihetero_jax.evaluation.diagnostics import Reader, check_candidates, check_judged, rollout_retrieval
from unihetero_jax.evaluation.drawing_quality import (
    check_drawings,
    drawing_quality,
    format_drawing_quality,
    write_pictures,
)
from unihetero_jax.evaluation.held_out import held_out_likelihood
from unihetero_jax.evaluation.layers import (
    class_probes,
    format_layers,
    gradient_conflict,
    plot_layers,
    second_loss,
    visual_layers,
)
from unihetero_jax.evaluation.page import write_page
from unihetero_jax.evaluation.rollout_error import Judge, format_rollout_error, plot_rollout_error, rollout_error
from unihetero_jax.evaluation.runner import check_mode, evaluate, format_table, select_benchmarks, stem_of, write_json
from unihetero_jax.evaluation.training_prior import TrainingPrior
from unihetero_jax.loaded_run import Run, load_averages, load_run, model_of, one_replicate
from unihetero_jax.metrics import announce, read_metrics
from unihetero_jax.state import TrainState, params_in_use
from unihetero_jax.storage import local_target, to_path

ROLLOUT, ROLLOUT_ERROR = "rollout", "rollout-error"
"""What the results of these are called, in place of a benchmark's name."""


def evaluate_command(flags: argparse.Namespace, overrides: list[str]) -> None:
    """Evaluates the steps that `--steps` names, or with `--watch` each one that comes."""
    if flags.watch:
        if flags.steps != "last":
            raise ValueError(f"--steps {flags.steps}: --watch evaluates every step that comes; leave one of them out")
        _watch(flags, overrides)
        return
    steps = choose_steps(flags.workdir, flags.steps, flags.replicate)
    # Those that process 0 sees: a run that goes on may have another one a moment later.
    for step in json.loads(distributed.broadcast("steps", json.dumps(steps))):
        _evaluate_step(flags, overrides, step)


def _watch(flags: argparse.Namespace, overrides: list[str]) -> None:
    """Evaluates every checkpoint once, also those to come, until the run's last step is there."""
    done: set[int] = set()
    while True:
        # Process 0 looks, for all: another might already see a step that this one does not.
        waiting = sorted(set(list_steps(flags.workdir)) - done) if distributed.is_lead() else []
        steps = json.loads(distributed.broadcast("watch", json.dumps(waiting)))
        for step in steps:
            done.add(step)
            try:
                run = _evaluate_step(flags, overrides, step)
            except (ValueError, OSError) as error:
                if step in list_steps(flags.workdir):
                    raise
                announce(f"step {step} was removed before it could be evaluated ({error})")
                continue
            if step >= run.config.train.num_steps:
                return
        if not steps:
            time.sleep(flags.watch)


def _evaluate_step(flags: argparse.Namespace, overrides: list[str], step: int) -> Run:
    """Evaluates one checkpoint as the flags say, and writes the run's page anew."""
    requested = [name for name in flags.benchmarks.split(",") if name]
    run = load_run(flags.workdir, step, flags.replicate, overrides)
    _check_instruments(flags, run)
    judge = _load_judge(flags.rollout_judge, run.config) if flags.rollout_judge else None
    results = evaluate(
        run.config, model_of(run, flags.max_new_tokens), run.tokenizer,
        select_benchmarks(run.config.eval.benchmarks, requested), step=run.step, config_hash=run.config_hash,
        output_dir=to_path(flags.workdir) / "eval", mode=flags.mode, without_image=flags.without_image,
        prior=_training_prior(run.config, flags.training_prior), replicate=flags.replicate,
        on_progress=_show_progress,
    )  # fmt: skip
    announce(format_table(results))
    if flags.held_out:
        _measure_held_out(run, to_path(flags.workdir) / "eval")
    if flags.rollout:
        _roll_out(run, to_path(flags.workdir) / "eval", flags.replicate)
    if judge:
        _measure_rollout_error(run, judge, to_path(flags.workdir) / "eval", flags.replicate)
    if flags.drawings is not None:
        _measure_drawings(run, flags.drawings, judge, to_path(flags.workdir) / "eval")
    if flags.layers:
        _measure_layers(run, flags.workdir, flags.replicate, flags.probe_images)
    if distributed.is_lead():
        announce(f"page: {write_page(flags.workdir)}")
    return run


def _check_instruments(flags: argparse.Namespace, run: Run) -> None:
    """Raises ValueError for what the flags ask and the run cannot give, before minutes go into benchmarks."""
    if (flags.rollout or flags.rollout_judge) and not draws_images(run.config):
        raise ValueError(
            "--rollout: the run draws no images; it needs eval.rollout_source, and an objective whose predictions can "
            "be fed back"
        )
    if flags.probe_images:
        if not flags.layers:
            raise ValueError("--probe-images are probed layer by layer: say --layers, too")
        class_names(Path(flags.probe_images))
    if flags.layers and has_cross_attention(run.config.model):
        raise ValueError(
            "--layers reads the language model's state at an image's positions, which "
            "model.projector.kind=cross_attention leaves without input"
        )
    if flags.layers and not run.config.eval.rollout_source:
        raise ValueError("--layers reads images of eval.rollout_source, which is empty; name a source with captions")
    if flags.drawings is not None:
        check_drawings(run.config, run.tokenizer, flags.drawings)


def _measure_layers(run: Run, workdir: str, replicate: int, labelled: str) -> None:
    """Written to `layers-<step>.json` and `.png`, and printed."""
    config, folder = run.config, to_path(workdir) / "eval"
    other = second_loss(config.objective)
    averages = load_averages(run, workdir, replicate) if other else {}
    conflict = gradient_conflict(config, run.params, averages, run.tokenizer) if other else []
    layers = visual_layers(config, run.params, run.tokenizer, _reader(config))
    result = {"conflict": conflict, "other_loss": other, "layers": layers, "objective": config.objective}
    result |= {"step": run.step, "config_hash": run.config_hash}
    if labelled:
        images, names = list(read_labelled_images(Path(labelled))), class_names(Path(labelled))
        by_layer = class_probes(config, run.params, run.tokenizer, images, names)
        result["classes"] = {"images": labelled, "num_images": len(images), "by_layer": by_layer}
    announce(format_layers(result))
    if distributed.is_lead():
        write_json(folder / f"layers-{run.step}.json", result)
        with local_target(folder / f"layers-{run.step}.png") as path:
            plot_layers(result, path)


def _reader(config: Config) -> Reader | None:
    """Of the easy scene world where a visual token is a cell of its grid: there one object stands, or none."""
    is_cell = config.model.encoder.patch_size * MERGE_SIZE == CELL
    return read_cells if config.scene_world.level == "easy" and is_cell else None


def _training_prior(config: Config, max_records: int) -> TrainingPrior | None:
    """From evenly spaced records of every source's training split."""
    if not max_records or not distributed.is_lead():
        return None
    return TrainingPrior(
        (turn.question, turn.answer)
        for source in config.data.sources.values()
        for stored in read_stored(to_path(source.path), "train", max_records)
        for turn in turns_of(stored.record)
    )


def _measure_held_out(run: Run, folder: epath.Path) -> None:
    """Perplexity of the validation text, written to `held-out-<step>.json` and printed."""
    model = model_of(run)
    sources = held_out_likelihood(run.config, model.log_probs, run.tokenizer, model.own_rows)
    write_json(folder / f"held-out-{run.step}.json", {
        "step": run.step, "config_hash": run.config_hash, "sources": sources
    })  # fmt: skip
    for name, found in sources.items():
        if found["nll_per_token"] is None:
            announce(f"held-out text of {name}: a likelihood that is not finite")
            continue
        announce(
            f"held-out text of {name}: {found['nll_per_token']:.4f} ± {found['standard_error']:.4f} nats a token, "
            f"perplexity {found['perplexity']:.3f} ({found['num_tokens']:,} tokens)"
        )


def _show_progress(name: str, done: int, total: int) -> None:
    if done < total:  # a benchmark of one shard is done when it is first heard of
        announce(f"{name}: {done:,} of {total:,} items")


def choose_steps(workdir: str, wanted: str, replicate: int = 0) -> list[int]:
    """The checkpoints that `--steps` names; -1 stands for the newest that verifies.

    `best` is the one of least validation loss of the text, averaged over the sources, among those that are there.

    Raises:
        ValueError: nothing of the kind is there.
    """
    match wanted:
        case "last":
            return [-1]
        case "all" | "best":
            stored = list_steps(workdir)
            if not stored:
                raise ValueError(f"--workdir {workdir}: no run here (no complete checkpoint); train first")
            return stored if wanted == "all" else [_best_step(workdir, stored, replicate)]
    if not all(part.isdecimal() for part in wanted.split(",")):
        raise ValueError(f"--steps {wanted}: give last, best, all, or steps by comma, such as 100,200")
    return [int(part) for part in wanted.split(",")]


def _best_step(workdir: str, stored: Sequence[int], replicate: int) -> int:
    losses = {}
    for line in read_metrics(workdir):
        if line.get("eval_loss") and line["step"] in stored:
            texts = [np.atleast_1d(source["text"]) for source in line["eval_loss"].values() if "text" in source]
            loss = float(np.mean([of[replicate if len(of) > 1 else 0] for of in texts])) if texts else math.nan
            if math.isfinite(loss):
                losses[line["step"]] = loss
    if not losses:
        raise ValueError(
            f"--steps best: no stored step of {workdir} was validated (stored: {', '.join(map(str, stored))}); "
            "name one, or train with train.eval_every_steps at multiples of checkpoint.every_steps"
        )
    return min(losses, key=lambda step: losses[step])


def evaluate_state(config: Config, workdir: str, state: TrainState, step: int) -> dict[str, Any]:
    """What the configuration asks for, of every replicate: benchmarks, rollout retrieval, cumulative error. Writes
    eval/*.json and prints all. Returns the first replicate's results.
    """
    tokenizer = load_tokenizer(config.data.tokenizer)
    in_use, folder = params_in_use(state.params, state.ema), to_path(workdir) / "eval"
    judge = _load_judge(config.eval.rollout_judge, config) if is_judged(config) else None
    results: dict[str, Any] = {}
    for replicate in range(config.train.num_replicates):
        if config.train.num_replicates > 1:
            announce(f"replicate {replicate}")
        run = Run(config, config_hash(config), step, one_replicate(in_use, config, replicate), tokenizer)
        found = _evaluate_replicate(run, folder, judge, replicate)
        results = results or found
    if config.eval.benchmarks and distributed.is_lead():
        write_page(workdir)
    return results


def _evaluate_replicate(run: Run, folder: epath.Path, judge: Judge | None, replicate: int) -> dict[str, Any]:
    config, found = run.config, {}
    if config.eval.benchmarks:
        found = evaluate(
            config, model_of(run), run.tokenizer, config.eval.benchmarks, step=run.step, config_hash=run.config_hash,
            output_dir=folder, without_image=config.eval.without_image, replicate=replicate,
        )  # fmt: skip
        announce(format_table(found))
    if draws_images(config):
        found = {**found, "rollout": _roll_out(run, folder, replicate)}
    if judge:
        _measure_rollout_error(run, judge, folder, replicate)
    return found


def check_evaluation(config: Config) -> None:
    """What the evaluation at the end needs is there, before hours go into training. Raises ValueError if not."""
    for path in config.eval.benchmarks.values():
        check_mode(path, read_benchmark(path), "likelihood")
    if draws_images(config):
        check_candidates(config, load_tokenizer(config.data.tokenizer))
    if is_judged(config):
        check_judged(config, load_tokenizer(config.data.tokenizer))
        _load_judge(config.eval.rollout_judge, config)


def draws_images(config: Config) -> bool:
    """Whether an evaluation rolls images out: the run can, and names captions for it."""
    return rolls_out(config) and bool(config.eval.rollout_source)


def is_judged(config: Config) -> bool:
    """Whether the end of training measures cumulative error: the run draws, and names a judge."""
    return draws_images(config) and bool(config.eval.rollout_judge)


def _roll_out(run: Run, folder: epath.Path, replicate: int) -> dict[str, Any]:
    """Rollout retrieval: measured, held against its alarm, written by the name `ROLLOUT` and printed."""
    config = run.config
    found = rollout_retrieval(config, run.params, run.tokenizer)
    alarms = ["rollout_retrieval"] if found["retrieval"] < config.diagnostics.retrieval_alarm else []
    result = found | {"alarms": alarms, "step": run.step, "config_hash": run.config_hash}
    write_json(folder / f"{stem_of(ROLLOUT, run.step, replicate=replicate)}.json", result)
    announce(
        f"rollout from captions of {found['source']}: finds its image among {found['num_candidates']} "
        f"at {found['retrieval']:.3f} +- {found['standard_error']:.3f} (chance {found['chance']:.3f}); "
        f"cosine distance {found['free_running']:.3f} "
        f"(mean embedding {found['mean_embedding']:.3f}, copy previous {found['copy_previous']:.3f})"
    )
    if alarms:
        announce(f"ALARM: rollout retrieval {found['retrieval']:.3f} is under {config.diagnostics.retrieval_alarm}")
    return result


def _load_judge(workdir: str, config: Config) -> Judge:
    """The newest step of a run as judge. Raises ValueError unless it reads patches of the run's size."""
    found = load_run(workdir, -1, 0)
    judge = Judge(found.config, found.params, found.tokenizer)
    judge.check_patches(config)
    return judge


def _measure_drawings(run: Run, number: int, judge: Judge | None, folder: epath.Path) -> None:
    """Written to `drawings-<step>.json` and, the pictures, to `drawings-<step>/`; and printed."""
    result, pictures = drawing_quality(run.config, run.params, run.tokenizer, number, judge)
    result |= {"objective": run.config.objective, "step": run.step, "config_hash": run.config_hash}
    announce(format_drawing_quality(result))
    if distributed.is_lead():
        write_pictures(pictures, folder / f"drawings-{run.step}")
        write_json(folder / f"drawings-{run.step}.json", result)


def _measure_rollout_error(run: Run, judge: Judge, folder: epath.Path, replicate: int) -> None:
    """Written by the name `ROLLOUT_ERROR`, `.json` and `.png`, and printed."""
    result = rollout_error(run.config, run.params, run.tokenizer, judge, _reader(run.config))
    result |= {"objective": run.config.objective, "step": run.step, "config_hash": run.config_hash}
    announce(format_rollout_error(result))
    if distributed.is_lead():
        stem = stem_of(ROLLOUT_ERROR, run.step, replicate=replicate)
        write_json(folder / f"{stem}.json", result)
        with local_target(folder / f"{stem}.png") as path:
            plot_rollout_error(result, path)
