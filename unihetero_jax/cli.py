"""The commands: train, evaluate, score, compare, generate, data-stats, checkpoints, compile, explain."""

import argparse
import dataclasses
import functools
import hashlib
import json
import math
import os
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from data_pipelines.bias import turns_of
from data_pipelines.prepared import read_stored
from data_pipelines.scene_reader import read_cells
from data_pipelines.scene_world import ensure_index, ensure_scene_world
from data_pipelines.scenes import CELL
from experiments import base as base_experiment
from unihetero_jax import compile_ahead, data_stats, distributed, explain, export, stored_steps
from unihetero_jax.arrays import Batch
from unihetero_jax.checkpoint import SaveError, list_steps, read_metadata, restore_subtree, valid_step
from unihetero_jax.command_line import load_experiment, parse_arguments, parse_config_flags, with_overrides
from unihetero_jax.config import Config, config_hash, has_cross_attention, rolls_out
from unihetero_jax.data.labelled_images import class_names, read_labelled_images
from unihetero_jax.data.mixture import image_spec
from unihetero_jax.data.records import MERGE_SIZE, RecordError, format_prompt, probe_image
from unihetero_jax.data.tokenizer import Tokenizer, load_tokenizer
from unihetero_jax.evaluation import comparison, official
from unihetero_jax.evaluation.benchmarks import read_benchmark
from unihetero_jax.evaluation.diagnostics import Reader, check_candidates, rollout_retrieval
from unihetero_jax.evaluation.drawing_quality import (
    check_drawings,
    drawing_quality,
    format_drawing_quality,
    write_pictures,
)
from unihetero_jax.evaluation.drawings import default_grid, draw_from_texts, reconstruct
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
from unihetero_jax.evaluation.runner import (
    SCORERS,
    LogProbs,
    Model,
    check_mode,
    evaluate,
    format_table,
    select_benchmarks,
    write_json,
)
from unihetero_jax.evaluation.sheet import draw_pictures
from unihetero_jax.evaluation.training_prior import TrainingPrior
from unihetero_jax.hf_config import VISION_CLASSES
from unihetero_jax.hf_export import export_hugging_face
from unihetero_jax.hf_import import import_pretrained
from unihetero_jax.inference.generate import Prompt, generate_text, generate_texts
from unihetero_jax.inference.sampling import Sampling
from unihetero_jax.integrity import read_manifest
from unihetero_jax.metrics import announce, read_metrics
from unihetero_jax.model.attention import require_segments_alone
from unihetero_jax.model.unihetero import Params, build
from unihetero_jax.profiling import parse_range
from unihetero_jax.sharding import activation_mesh, fetch, local_rows, make_mesh, to_global
from unihetero_jax.state import TrainState, params_in_use
from unihetero_jax.step import abstract_state
from unihetero_jax.storage import StorageError, list_folder, local_target, read_bytes, to_path
from unihetero_jax.text_loss import text_nll
from unihetero_jax.train import Hook, Interrupted, agree_on_run, train
from unihetero_jax.watchdog import EXIT_STALLED
from unihetero_jax.workdir import prepare_workdir

EXIT_BAD_INPUT = 2
"""Exit code when the message says what to change; an interrupted run exits with 128 + the signal's number."""
EXIT_STORAGE = 74
"""Exit code when storage failed, or a save: start it again (EX_IOERR of sysexits.h)."""
EXIT_PROCESSES_MISSING = 76
"""Exit code when not all processes of the run came: start it again. After a stall, or the loss of one, it is
`watchdog.EXIT_STALLED`."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns the process's exit code."""
    try:
        namespace, overrides = parse_arguments(_parser(), sys.argv[1:] if arguments is None else arguments)
        if getattr(namespace, "distributed", "off") == "auto":
            address, number = namespace.coordinator_address, namespace.num_processes
            cluster = distributed.find_cluster(address, number, namespace.process_id)
            distributed.connect(cluster, namespace.startup_deadline)
        namespace.command(namespace, overrides)
    except Interrupted as stop:
        announce(str(stop))
        return 128 + stop.signal_number
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except (ValueError, OSError, distributed.StartupError, distributed.LostProcess) as error:
        if os.environ.get("UNIHETERO_TRACEBACK"):  # where a message is not enough
            raise
        of_many = f"process {distributed.process_id()}: " if distributed.num_processes() > 1 else ""
        print(f"error: {of_many}{error}", file=sys.stderr)
        return _exit_code(error)
    finally:
        distributed.disconnect()
    return 0


def _exit_code(error: Exception) -> int:
    match error:
        case distributed.StartupError():
            return EXIT_PROCESSES_MISSING
        case distributed.LostProcess():
            return EXIT_STALLED
        case StorageError() | SaveError():
            return EXIT_STORAGE
    return EXIT_BAD_INPUT


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m unihetero_jax", description=__doc__, allow_abbrev=False)
    commands = parser.add_subparsers(
        required=True,
        metavar="train|evaluate|score|compare|generate|data-stats|checkpoints|import-hf|export-hf|compile|explain",
    )

    trains = commands.add_parser("train", allow_abbrev=False, help="train, or go on training, the run in a workdir")
    trains.add_argument("--config", required=True, help="experiments/x.py[:argument]; fields by --config.a.b=value")
    trains.add_argument("--workdir", required=True)
    trains.add_argument(
        "--change-mixture", action="store_true", help="go on from a checkpoint of another data.sources, where each was"
    )
    trains.add_argument("--profile", default="", help="START:STOP: first and last step of a trace in WORKDIR/profile")
    trains.set_defaults(command=_train)

    evaluates = commands.add_parser("evaluate", allow_abbrev=False, help="score a run's checkpoint on benchmarks")
    evaluates.add_argument(
        "--benchmarks", default="", help="names from eval.benchmarks or paths, by comma; all if empty"
    )
    evaluates.add_argument("--mode", choices=tuple(SCORERS), default="likelihood", help="; ".join(
        f"{mode}: {words}" for mode, words in SCORERS.items()))  # fmt: skip
    evaluates.add_argument("--without-image", action="store_true", help="also score with the image left out")
    evaluates.add_argument("--steps", default="last", help="last, best (least validation loss), all, or by comma")
    evaluates.add_argument(
        "--watch", type=float, default=0.0, metavar="SECONDS",
        help="beside a training run: look for new checkpoints so often, until the last one",
    )  # fmt: skip
    evaluates.add_argument("--max-new-tokens", type=int, default=32, help="generation: of an answer")
    evaluates.add_argument(
        "--training-prior", type=int, default=0, metavar="RECORDS",
        help="also what the answers of training alone say, from so many records of each source",
    )  # fmt: skip
    evaluates.add_argument("--held-out", action="store_true", help="also perplexity of every source's validation text")
    evaluates.add_argument("--rollout", action="store_true", help="also draw from captions of eval.rollout_source")
    evaluates.add_argument(
        "--rollout-judge", default="", metavar="WORKDIR",
        help="also the error of rollouts by position, in the space of that run's encoder (experiments/scene_judge.py)",
    )  # fmt: skip
    evaluates.add_argument(
        "--drawings", type=int, default=None, metavar="N",
        help="also draw N captions and compare the pictures with true ones: Frechet distance, precision and recall in "
        "the space of the judge's encoder, or of its own",
    )  # fmt: skip
    evaluates.add_argument(
        "--layers", action="store_true",
        help="also, layer by layer: conflict of the losses' gradients, what stays of the image, linear probes",
    )  # fmt: skip
    evaluates.add_argument(
        "--probe-images", default="", metavar="PATH",
        help="with --layers: also probe classes of pictures, a folder for each class or a parquet file (CIFAR-10)",
    )  # fmt: skip
    evaluates.set_defaults(command=_evaluate)

    scores = commands.add_parser("score", allow_abbrev=False, help="score anybody's predictions by the public rules")
    scores.add_argument("--benchmark", required=True, choices=tuple(official.BENCHMARKS), metavar="NAME",
                        help=", ".join(official.BENCHMARKS))  # fmt: skip
    scores.add_argument("--questions", default="", help="the benchmark's own file, with the right answers")
    scores.add_argument("--predictions", required=True, help=".tsv or .xlsx of VLMEvalKit, .json or .jsonl")
    scores.add_argument("--rule", default="", help="whose: " + "; ".join(
        f"{name}: {', '.join(scorer.rules)}" for name, scorer in official.BENCHMARKS.items()))  # fmt: skip
    scores.add_argument("--output", default="", help="a JSON file for the figures and every item")
    scores.set_defaults(command=_score)

    compares = commands.add_parser("compare", allow_abbrev=False, help="whether two runs differ on what both answered")
    compares.add_argument("run_a", metavar="RUN_A", help="WORKDIR, or WORKDIR@STEP")
    compares.add_argument("run_b", metavar="RUN_B")
    compares.add_argument("--mode", choices=tuple(SCORERS), default="likelihood")
    compares.add_argument("--output", default="", help="a JSON file for the rows of the table")
    compares.set_defaults(command=_compare)

    generates = commands.add_parser("generate", allow_abbrev=False, help="continue a prompt, with or without an image")
    generates.add_argument("--image", default="", help="an image file")
    generates.add_argument("--prompt", default="", help="words to go on from, or to draw")
    generates.add_argument("--num-images", type=int, default=0, help="draw so many images of the prompt instead")
    generates.add_argument("--grid", type=_grid, default=None, metavar="HxW", help="of the images, in visual tokens")
    generates.add_argument("--reconstruct", nargs="+", default=[], metavar="FILE", help="draw images from themselves")
    generates.add_argument("--output", default="", metavar="FILE.png", help="the sheet of what was drawn")
    generates.add_argument("--max-new-tokens", type=int, default=64)
    generates.add_argument("--temperature", type=float, default=0.0)
    generates.add_argument("--top-p", type=float, default=1.0)
    generates.add_argument("--seed", type=int, default=0)
    generates.add_argument("--step", type=int, default=-1, help="-1: the newest that verifies")
    generates.set_defaults(command=_generate)
    stats = commands.add_parser("data-stats", allow_abbrev=False, help="what a mixture holds, what a run drew of it")
    chosen = stats.add_mutually_exclusive_group(required=True)
    chosen.add_argument("--workdir", default="", help="a run: also what it has drawn")
    chosen.add_argument("--config", default="", help="an experiment that has not run yet")
    stats.set_defaults(command=_data_stats)
    stored = commands.add_parser("checkpoints", allow_abbrev=False, help="list, verify, compare, prune, export steps")
    stored.add_argument("action", choices=("list", "verify", "diff", "prune", "export"))
    stored.add_argument("--workdir", required=True)
    stored.add_argument("--steps", type=_steps, default=(), help="verify: those, by comma (all if empty); diff: two")
    stored.add_argument("--keep-last", type=int, default=3, help="prune: so many of the newest")
    stored.add_argument("--keep-every", type=int, default=0, help="prune: and every step divisible by this")
    stored.add_argument("--dry-run", action="store_true", help="prune: only say what would go")
    stored.add_argument("--step", type=int, default=-1, help="export: which; -1: the newest that verifies")
    stored.add_argument("--output", default="", help="export: folder for safetensors files, config and tokenizer")
    stored.add_argument("--ema", action="store_true", help="export: the moving averages, where a component has one")
    stored.add_argument("--replicate", type=int, default=0, help="export: which model of a run with several")
    stored.add_argument("--dtype", default="", help="export: float32 or bfloat16; as stored if left out")
    stored.add_argument("--tokenizer", default="", help="export: the run's tokenizer, if it is no longer where it was")
    stored.add_argument("--max-file-gb", type=float, default=export.MAX_FILE_BYTES / 1e9, help="export: of one file")
    stored.set_defaults(command=_checkpoints)
    imports = commands.add_parser("import-hf", allow_abbrev=False, help="a first checkpoint from pretrained models")
    where = "folder with config.json and *.safetensors, or owner/name@revision of the Hugging Face hub"
    imports.add_argument("--language-model", default="", help=f"Qwen2, Qwen3, Llama, SmolLM2: {where}")
    imports.add_argument("--vision-encoder", default="", help="SigLIP, SigLIP 2, CLIP: likewise")
    imports.add_argument("--workdir", required=True)
    imports.add_argument("--config", default="", help="experiment for all but the architecture; the defaults if empty")
    imports.set_defaults(command=_import_hf)
    exports = commands.add_parser("export-hf", allow_abbrev=False, help="folders that transformers loads")
    exports.add_argument("--workdir", required=True)
    exports.add_argument("--output", required=True)
    exports.add_argument("--step", type=int, default=-1, help="-1: the newest that verifies")
    exports.add_argument("--ema", action="store_true", help="the moving averages, where a component has one")
    exports.add_argument("--replicate", type=int, default=0, help="which model of a run with several")
    exports.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    exports.add_argument("--vision-family", choices=tuple(VISION_CLASSES), default=None, help="default: as imported")
    exports.add_argument("--original-vocabulary", action="store_true", help="without this program's special tokens")
    exports.add_argument("--pretrained", default="", metavar="WORKDIR", help="import that the run started from")
    exports.add_argument("--max-file-gb", type=float, default=export.MAX_FILE_BYTES / 1e9)
    exports.set_defaults(command=_export_hf)
    compile_ahead.add_parser(commands)
    explain.add_parser(commands)
    for command in (trains, evaluates):
        processes = command.add_argument_group("several processes", "found by themselves on Slurm, GKE and Cloud TPU")
        processes.add_argument(
            "--distributed", choices=("auto", "off"), default="auto", help="off: one process, whatever the machine says"
        )
        processes.add_argument("--coordinator_address", default="", help="HOST:PORT of process 0")
        processes.add_argument("--num_processes", type=int, default=0)
        processes.add_argument("--process_id", type=int, default=-1)
        processes.add_argument(
            "--startup_deadline", type=float, default=distributed.STARTUP_DEADLINE_S,
            help="seconds within which all processes have to come (default: %(default).0f)",
        )  # fmt: skip
    for command in (evaluates, generates):
        command.add_argument("--workdir", required=True)
        command.add_argument("--replicate", type=int, default=0, help="which model of a run with num_replicates > 1")
    return parser


def _train(flags: argparse.Namespace, overrides: list[str]) -> None:
    config = parse_config_flags(flags.config, overrides)
    profile = parse_range(flags.profile, config.train.num_steps)
    run_training(config, flags.workdir, change_mixture=flags.change_mixture, profile=profile)


def _evaluate(flags: argparse.Namespace, overrides: list[str]) -> None:
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


def _evaluate_step(flags: argparse.Namespace, overrides: list[str], step: int) -> "Run":
    """Evaluates one checkpoint as the flags say, and writes the run's page anew."""
    requested = [name for name in flags.benchmarks.split(",") if name]
    run = load_run(flags.workdir, step, flags.replicate, overrides)
    if (flags.rollout or flags.rollout_judge) and not _rolls_out(run.config):
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
        _roll_out(run, to_path(flags.workdir) / "eval")
    if judge:
        _measure_rollout_error(run, judge, to_path(flags.workdir) / "eval")
    if flags.drawings is not None:
        _measure_drawings(run, flags.drawings, judge, to_path(flags.workdir) / "eval")
    if flags.layers:
        _measure_layers(run, flags.workdir, flags.replicate, flags.probe_images)
    if distributed.is_lead():
        announce(f"page: {write_page(flags.workdir)}")
    return run


def _measure_layers(run: "Run", workdir: str, replicate: int, labelled: str) -> None:
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


def _measure_held_out(run: "Run", folder: epath.Path) -> None:
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


def _score(flags: argparse.Namespace, overrides: list[str]) -> None:
    if overrides:
        raise ValueError(f"{overrides[0]}: score takes no --config fields")
    result = official.score_predictions(flags.benchmark, flags.questions, flags.predictions, flags.rule)
    print(official.format_score(result))
    if flags.output:
        write_json(to_path(flags.output), result)


def _compare(flags: argparse.Namespace, overrides: list[str]) -> None:
    if overrides:
        raise ValueError(f"{overrides[0]}: compare takes no --config fields")
    rows = comparison.compare_runs(flags.run_a, flags.run_b, flags.mode)
    unlike = comparison.unlike_runs(flags.run_a, flags.run_b)
    print(comparison.format_differences(rows, flags.run_a, flags.run_b, unlike))
    if flags.output:
        found = {"differences": [dataclasses.asdict(row) for row in rows], "unlike": unlike}
        write_json(to_path(flags.output), found)


def _generate(flags: argparse.Namespace, overrides: list[str]) -> None:
    run = load_run(flags.workdir, flags.step, flags.replicate, overrides)
    if flags.num_images or flags.reconstruct:
        _draw(flags, run)
        return
    image = _read_image(flags.image) if flags.image else None
    if not image and not format_prompt(flags.prompt):
        raise ValueError("--prompt is empty and there is no --image: nothing to continue")
    sampling = Sampling(flags.temperature, flags.top_p)
    prompts = [Prompt(flags.prompt, (image,) if image else ())]
    print(generate_text(run.config, run.params, run.tokenizer, prompts, flags.max_new_tokens, sampling, flags.seed)[0])


def _grid(text: str) -> tuple[int, int]:
    parts = text.split("x")
    if len(parts) != 2 or not all(part.isdecimal() for part in parts):
        raise argparse.ArgumentTypeError(f"{text!r}: give height and width in visual tokens, such as 3x3")
    return int(parts[0]), int(parts[1])


def _draw(flags: argparse.Namespace, run: "Run") -> None:
    """A sheet of images drawn from the prompt, of the given images beside what is drawn from them, or of both."""
    if not flags.output.endswith(".png"):
        raise ValueError(f"--output {flags.output!r}: name the PNG file that the images are written to")
    if flags.num_images < 0 or (flags.num_images and not flags.prompt):
        raise ValueError("--num-images: a positive number of images, and --prompt says of what")
    rows: list[tuple[str, list[np.ndarray]]] = []
    if flags.num_images:
        grid = flags.grid or default_grid(run.config)
        texts = [flags.prompt] * flags.num_images
        start = time.monotonic()
        rows.append((flags.prompt, draw_from_texts(run.config, run.params, run.tokenizer, texts, grid, flags.seed)))
        seconds, tokens = time.monotonic() - start, flags.num_images * grid[0] * grid[1]
        print(f"{tokens} visual tokens in {seconds:.1f} s with compilation ({tokens / seconds:.0f} a second)")
    if flags.reconstruct:
        files = [_read_image(path) for path in flags.reconstruct]
        pairs = reconstruct(run.config, run.params, run.tokenizer, files, flags.seed)
        rows.append(("as the model sees it", [seen for seen, _ in pairs]))
        rows.append(("drawn from that", [drawn for _, drawn in pairs]))
    draw_pictures(rows, Path(flags.output))
    print(flags.output)


def _data_stats(flags: argparse.Namespace, overrides: list[str]) -> None:
    if flags.config:
        config = parse_config_flags(flags.config, overrides)
    else:
        step, totals = data_stats.last_totals(flags.workdir)
        config = with_overrides(json.loads(read_bytes(to_path(flags.workdir) / "config.json")), overrides)
    lengths, costs = data_stats.mixture_lengths(config)
    print(data_stats.format_lengths(lengths))
    if flags.workdir:
        print(f"\ndrawn up to step {step}:\n{data_stats.format_totals(totals, lengths)}")
    sizes, proposed = data_stats.row_sizes(costs, config.data.row_tokens)
    print("\n" + data_stats.format_row_sizes(sizes, proposed, config))


def _steps(text: str) -> tuple[int, ...]:
    if not all(part.isdecimal() for part in text.split(",")):
        raise argparse.ArgumentTypeError(f"{text!r}: give steps by comma, such as 100,200")
    return tuple(map(int, text.split(",")))


def _checkpoints(flags: argparse.Namespace, overrides: list[str]) -> None:
    if overrides:
        raise ValueError(f"{overrides[0]}: checkpoints takes no --config fields")
    match flags.action:
        case "list":
            print(stored_steps.format_steps(stored_steps.describe_steps(flags.workdir)))
        case "verify":
            faults = stored_steps.verify_steps(flags.workdir, flags.steps)
            for step, fault in faults.items():
                print(f"step {step}: {fault or 'every file matches its digest'}")
            if damaged := [str(step) for step, fault in faults.items() if fault]:
                raise ValueError(f"damaged: step {', '.join(damaged)}; a restore passes over them")
        case "diff":
            if len(flags.steps) != 2:
                raise ValueError("checkpoints diff: name two steps, such as --steps=100,200")
            print(stored_steps.format_differences(*stored_steps.compare_steps(flags.workdir, *flags.steps)))
        case "prune":
            gone = stored_steps.prune_steps(flags.workdir, flags.keep_last, flags.keep_every, flags.dry_run)
            print(f"{len(gone)} steps {'would be ' if flags.dry_run else ''}removed")
        case "export":
            if not flags.output:
                raise ValueError("checkpoints export: name a folder to write, such as --output=exported")
            export.export_parameters(
                flags.workdir, flags.step, flags.output, flags.ema, flags.replicate, flags.dtype, flags.tokenizer,
                int(flags.max_file_gb * 1e9),
            )  # fmt: skip


def _import_hf(flags: argparse.Namespace, overrides: list[str]) -> None:
    base = load_experiment(flags.config) if flags.config else base_experiment.get_config().to_dict()
    import_pretrained(
        flags.language_model, flags.vision_encoder, flags.workdir, base,
        lambda values: with_overrides(values, overrides),
    )  # fmt: skip
    print(f"{flags.workdir}: a run of 0 steps; go on by init_from.workdir={flags.workdir}, or try `generate`")


def _export_hf(flags: argparse.Namespace, overrides: list[str]) -> None:
    if overrides:
        raise ValueError(f"{overrides[0]}: export-hf takes no --config fields")
    export_hugging_face(
        flags.workdir, flags.step, flags.output, averaged=flags.ema, replicate=flags.replicate, dtype=flags.dtype,
        family=flags.vision_family, original_vocabulary=flags.original_vocabulary, pretrained=flags.pretrained,
        max_file_bytes=int(flags.max_file_gb * 1e9),
    )  # fmt: skip


def run_training(
    config: Config,
    workdir: str,
    hooks: Sequence[Hook] = (),
    change_mixture: bool = False,
    profile: tuple[int, int] | None = None,
) -> TrainState:
    """Makes the scene world if it is missing, trains, and evaluates the end state on the configured benchmarks."""
    agree_on_run(config, workdir, change_mixture)
    prepare_workdir(workdir)  # before minutes go into a scene world
    world = config.scene_world
    if world.level != "none":
        make = functools.partial(_make_scene_world, config)
        distributed.lead_first("scene-world", make, make)
    _check_evaluation(config)
    evaluate_now = functools.partial(evaluate_state, config, workdir)
    if every := config.eval.every_steps:

        def evaluate_sometimes(step: int, state: TrainState) -> None:
            if step % every == 0 and step < config.train.num_steps:
                evaluate_now(state, step)

        hooks = [*hooks, evaluate_sometimes]
    return train(config, workdir, hooks, evaluate_now, change_mixture, profile)


def _make_scene_world(config: Config) -> None:
    world, spec = config.scene_world, image_spec(config)
    assert world.level != "none"
    ensure_scene_world(world.path, world.level, world.num_scenes, spec, config.model.decoder.vocab_size, world.seed)
    if config.data.turns != "branches":  # of branches it comes with one
        ensure_index(world.path, spec, config.data.turns)


def _check_evaluation(config: Config) -> None:
    """What the evaluation at the end needs is there, before hours go into training. Raises ValueError if not."""
    for path in config.eval.benchmarks.values():
        check_mode(path, read_benchmark(path), "likelihood")
    if _rolls_out(config):
        check_candidates(config, load_tokenizer(config.data.tokenizer))


def _rolls_out(config: Config) -> bool:
    return rolls_out(config) and bool(config.eval.rollout_source)


def evaluate_state(config: Config, workdir: str, state: TrainState, step: int) -> dict[str, Any]:
    """Benchmarks and, where images are generated, rollout retrieval; writes eval/*.json and prints both."""
    tokenizer = load_tokenizer(config.data.tokenizer)
    params = _one_replicate(params_in_use(state.params, state.ema), config, 0)
    run = Run(config, config_hash(config), step, params, tokenizer)
    results: dict[str, Any] = {}
    folder = to_path(workdir) / "eval"
    if config.eval.benchmarks:
        results = evaluate(
            config, model_of(run), tokenizer, config.eval.benchmarks, step=step, config_hash=run.config_hash,
            output_dir=folder,
        )  # fmt: skip
        announce(format_table(results))
        if distributed.is_lead():
            write_page(workdir)
    if _rolls_out(config):
        results["rollout"] = _roll_out(run, folder)
    return results


def _roll_out(run: "Run", folder: epath.Path) -> dict[str, Any]:
    """Rollout retrieval: measured, judged, written to `rollout-<step>.json` and printed."""
    config = run.config
    found = rollout_retrieval(config, run.params, run.tokenizer)
    alarms = ["rollout_retrieval"] if found["retrieval"] < config.diagnostics.retrieval_alarm else []
    result = found | {"alarms": alarms, "step": run.step, "config_hash": run.config_hash}
    write_json(folder / f"rollout-{run.step}.json", result)
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
    """The newest step of the run `--rollout-judge`. Raises ValueError unless it reads patches of the run's size."""
    found = load_run(workdir, -1, 0)
    judge = Judge(found.config, found.params, found.tokenizer)
    judge.check_patches(config)
    return judge


def _measure_drawings(run: "Run", number: int, judge: Judge | None, folder: epath.Path) -> None:
    """Written to `drawings-<step>.json` and, the pictures, to `drawings-<step>/`; and printed."""
    result, pictures = drawing_quality(run.config, run.params, run.tokenizer, number, judge)
    result |= {"objective": run.config.objective, "step": run.step, "config_hash": run.config_hash}
    announce(format_drawing_quality(result))
    if distributed.is_lead():
        write_pictures(pictures, folder / f"drawings-{run.step}")
        write_json(folder / f"drawings-{run.step}.json", result)


def _measure_rollout_error(run: "Run", judge: Judge, folder: epath.Path) -> None:
    """Written to `rollout-error-<step>.json` and `.png`, and printed."""
    result = rollout_error(run.config, run.params, run.tokenizer, judge, _reader(run.config))
    result |= {"objective": run.config.objective, "step": run.step, "config_hash": run.config_hash}
    announce(format_rollout_error(result))
    if distributed.is_lead():
        write_json(folder / f"rollout-error-{run.step}.json", result)
        with local_target(folder / f"rollout-error-{run.step}.png") as path:
            plot_rollout_error(result, path)


@dataclasses.dataclass(frozen=True)
class Run:
    """A trained run, ready for use. `config` has the command line's overrides; `config_hash` is the trained one's."""

    config: Config
    config_hash: str
    step: int
    params: Params
    tokenizer: Tokenizer


def load_run(workdir: str, step: int, replicate: int, overrides: Sequence[str] = ()) -> Run:
    """A run's parameters on the mesh that its configuration and the overrides ask for.

    Raises:
        ValueError: the workdir is no run, has no valid checkpoint, the replicate does not exist, or the tokenizer at
            the configured path is not the one that it was trained with.
    """
    if not list_folder(to_path(workdir) / "checkpoints"):
        raise ValueError(f"--workdir {workdir}: no run here (no checkpoints/); train first, or correct the path")
    folder = valid_step(workdir, step)
    stored_step, metadata = int(folder.name), read_metadata(folder)
    config = with_overrides(metadata["config"], overrides)
    if not 0 <= replicate < config.train.num_replicates:
        raise ValueError(f"--replicate {replicate}: the run has replicates 0 to {config.train.num_replicates - 1}")
    tokenizer = load_tokenizer(config.data.tokenizer)
    if tokenizer.hash != metadata.get("data", {}).get("tokenizer", tokenizer.hash):
        raise ValueError(
            f"data.tokenizer: {config.data.tokenizer} holds another tokenizer (hash {tokenizer.hash}) than the "
            f"one that {workdir} was trained with ({metadata['data']['tokenizer']}); name that one by "
            "--config.data.tokenizer"
        )
    state = abstract_state(config, make_mesh(config.mesh))
    averaged = params_in_use({}, _stored_averages(folder, state.ema))
    prefixes = ["params", *(f"ema/{name}" for name in averaged)]
    target: dict[str, Any] = {"params": state.params} | ({"ema": averaged} if averaged else {})
    _, restored, _ = restore_subtree(workdir, stored_step, prefixes, target)
    params = _one_replicate(params_in_use(restored["params"], restored.get("ema", {})), config, replicate)
    return Run(config, metadata["config_hash"], stored_step, params, tokenizer)


def _stored_averages(folder: epath.Path, ema: Params) -> Params:
    """Those of the state's averages that a step holds: what was imported has not been averaged yet."""
    names = {name.split("/")[1] for name in read_manifest(folder)["arrays"] if name.startswith("ema/")}
    return {name: tree for name, tree in ema.items() if name in names}


def load_averages(run: Run, workdir: str, replicate: int) -> Params:
    """The averages of a run's state, by component; empty where it keeps none."""
    ema = abstract_state(run.config, make_mesh(run.config.mesh)).ema
    target = _stored_averages(valid_step(workdir, run.step), ema)
    if not target:
        return {}
    prefixes = [f"ema/{name}" for name in target]
    _, restored, _ = restore_subtree(workdir, run.step, prefixes, {"ema": target})
    return _one_replicate(restored["ema"], run.config, replicate)


def model_of(run: Run, max_new_tokens: int = 32) -> Model:
    """The evaluation's view of a model."""
    mesh, batch_rows = make_mesh(run.config.mesh), run.config.eval.batch_rows

    def generate(prompts: Sequence[tuple[str, tuple[bytes, ...]]]) -> list[str | None]:
        asked = [Prompt(text, images) for text, images in prompts]
        return generate_texts(run.config, run.params, run.tokenizer, asked, batch_rows, max_new_tokens)

    def own_rows(num_rows: int) -> list[int]:
        return local_rows(mesh, num_rows)

    identity = {"parameters": fingerprint(run.params), "max_new_tokens": max_new_tokens}
    identity["dtype"], identity["objective"] = run.config.model.compute_dtype, run.config.objective
    return Model(make_log_probs(run.config, run.params), own_rows, generate, identity)


def fingerprint(params: Params) -> str:
    """16 hex digits of parameters, the same on every mesh: sums of their bits, which have no rounding."""

    def of(x: jax.Array) -> jax.Array:
        bits = jax.lax.bitcast_convert_type(x, {2: jnp.uint16, 4: jnp.uint32}[x.dtype.itemsize]).astype(jnp.uint32)
        return jnp.stack([jnp.sum(bits, dtype=jnp.uint32), jnp.sum(bits * bits, dtype=jnp.uint32)])

    sums = jax.jit(lambda tree: jnp.stack([of(x) for x in jax.tree.leaves(tree)]))(params)
    return hashlib.blake2b(fetch(sums).tobytes(), digest_size=8).hexdigest()


def make_log_probs(config: Config, params: Params) -> LogProbs:
    """This process's packed rows in, log-probability of every supervised token out."""
    mesh = make_mesh(config.mesh)
    rows = local_rows(mesh, config.eval.batch_rows)

    def score(arrays: Mapping[str, np.ndarray]) -> np.ndarray:
        with activation_mesh(mesh):
            return fetch(_log_probs(config, params, to_global(arrays, mesh)))[rows]

    return score


@functools.partial(jax.jit, static_argnames="config")
def _log_probs(config: Config, params: Params, batch: Batch) -> jax.Array:
    """Of module level, so that each evaluation of a run uses the program that the first one compiled."""
    require_segments_alone(config.model.attention_backend, config.data.turns)
    output = build(config.model, config.objective, params)(batch)
    return -text_nll(output.hidden, output.unembedding, batch.tokens, batch.text_loss_mask, config.loss.text_chunk)[1]


def _one_replicate(params: Params, config: Config, replicate: int) -> Params:
    return params if config.train.num_replicates == 1 else jax.tree.map(lambda x: x[replicate], params)


def _read_image(path: str) -> bytes:
    file = Path(path)
    if not file.is_file():
        raise ValueError(f"--image {path}: no such file")
    data = file.read_bytes()
    try:
        probe_image(data)
    except RecordError as error:
        raise ValueError(f"--image {path}: {error}") from error
    return data
