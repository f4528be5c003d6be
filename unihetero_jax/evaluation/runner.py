"""Runs benchmarks and writes one result file for each; prints them as a table.

A result file says everything that its figures depend on: benchmark and data hash, prompt, scorer rule, image
transform, config hash and step.
"""

import difflib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from etils import epath

from unihetero_jax.config import Config
from unihetero_jax.data.question_files import OPTION_LETTERS
from unihetero_jax.data.records import PROMPT_TEMPLATE
from unihetero_jax.data.tokenizer import Tokenizer
from unihetero_jax.distributed import is_lead
from unihetero_jax.evaluation.benchmarks import Benchmark, read_benchmark
from unihetero_jax.evaluation.multiple_choice import score_items
from unihetero_jax.evaluation.scoring import (
    OptionScores,
    hits,
    summarize,
    summarize_by_category,
    yes_no_metrics,
)
from unihetero_jax.storage import to_path
from unihetero_jax.text_table import align
from unihetero_jax.workdir import write_atomically

RESULT_VERSION = 1
SCORER_RULE = "likelihood, sum of log-probabilities of the option text"
BENCHMARK_SUFFIXES = (".tsv", ".json", ".jsonl")

LogProbs = Callable[[dict[str, np.ndarray]], np.ndarray]
"""From a packed batch (the fields of `arrays.Batch`) to `float[B,T]`: log p(tokens[t] | what t may see before it) where
`text_loss_mask`."""


def select_benchmarks(configured: Mapping[str, str], requested: Sequence[str]) -> dict[str, str]:
    """Which benchmarks to run, by name: the configured ones called `requested`, all of them when that is empty.

    A request may also be the path of a questions file; its name is then the file's, without suffix.

    Raises:
        ValueError: a name is not configured (with a spelling hint) or asked for twice.
    """
    selected: dict[str, str] = {}
    for request in requested or configured:
        is_path = request not in configured and request.lower().endswith(BENCHMARK_SUFFIXES)
        name, path = (Path(request).stem, request) if is_path else (request, configured.get(request))
        if path is None:
            close = difflib.get_close_matches(request, configured, n=1, cutoff=0.5)
            hint = (
                f"did you mean {close[0]!r}"
                if close
                else f"configured (eval.benchmarks): {', '.join(configured) or 'none'}"
            )
            raise ValueError(
                f"unknown benchmark {request!r}; {hint}. The path of a .tsv, .json or .jsonl file works too"
            )
        if name in selected:
            raise ValueError(f"benchmark {name!r} is asked for twice; name each once")
        selected[name] = path
    return selected


def evaluate(
    config: Config,
    log_probs: LogProbs,
    tokenizer: Tokenizer,
    benchmarks: Mapping[str, str],
    *,
    step: int,
    config_hash: str,
    output_dir: epath.PathLike | None,
    without_image: bool = False,
    on_progress: Callable[[str, int, int], None] | None = None,
) -> dict[str, Any]:
    """Scores every benchmark and writes `<output_dir>/<name>-<step>.json` for each.

    Args:
        config: the run's configuration; row sizes, image spec and `eval.batch_rows` are used.
        log_probs: the model, see `LogProbs`. Called with `eval.batch_rows` rows each time.
        tokenizer: the run's tokenizer.
        benchmarks: name -> questions file; see `select_benchmarks`.
        step: training step of the parameters behind `log_probs`.
        config_hash: of the configuration that they were trained with (`config` may have other evaluation settings).
        output_dir: folder of the result files, created if missing; normally `<workdir>/eval`. None writes nothing (all
            processes but one on a multi-process run).
        without_image: also score with the picture left out of the prompt; adds `accuracy_without_image` to every
            summary, the blind accuracy of this very model.
        on_progress: called with (benchmark, rows scored, rows in all) after every batch.

    Returns:
        name -> the content of its result file.

    Raises:
        ValueError: no benchmark, a name unfit for a file name, or a faulty file. All are read before any is scored.
    """
    if not benchmarks:
        raise ValueError(
            "no benchmark to evaluate: set eval.benchmarks in the config, or give the path of a questions file"
        )
    for name in benchmarks:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", name):
            raise ValueError(
                f"benchmark name {name!r}: use letters, digits, '_', '-' and '.'; it names the result file"
            )
    files = {name: read_benchmark(path) for name, path in benchmarks.items()}
    results = {}
    for name, benchmark in files.items():
        report = (lambda done, total, name=name: on_progress(name, done, total)) if on_progress else None
        scores = score_items(benchmark.items, tokenizer, config, log_probs, on_progress=report)
        blind = (
            score_items(benchmark.items, tokenizer, config, log_probs, without_image=True) if without_image else None
        )
        results[name] = _result(name, benchmark, scores, blind, config) | {"config_hash": config_hash, "step": step}
        if output_dir is not None:
            write_json(to_path(output_dir) / f"{name}-{step}.json", results[name])
    return results


def _result(
    name: str,
    benchmark: Benchmark,
    scores: Sequence[OptionScores],
    blind: Sequence[OptionScores] | None,
    config: Config,
) -> dict[str, Any]:
    items, data = benchmark.items, config.data
    overall, by_category = summarize(items, scores), summarize_by_category(items, scores)
    if blind is not None:
        overall["accuracy_without_image"] = summarize(items, blind)["accuracy"]
        for category, summary in summarize_by_category(items, blind).items():
            by_category[category]["accuracy_without_image"] = summary["accuracy"]
    unscored = {item.index: score.unscored for item, score in zip(items, scores, strict=True) if score.unscored}
    return {
        "result_version": RESULT_VERSION,
        "benchmark": name,
        "file": str(benchmark.path),
        "data_hash": benchmark.data_hash,
        "prompt_template": PROMPT_TEMPLATE,
        "scorer": SCORER_RULE,
        "image_transform": {
            "patch_size": config.model.encoder.patch_size,
            "min_patches": data.image_min_patches,
            "max_patches": data.image_max_patches,
        },
        "overall": overall,
        "by_category": by_category,
        "yes_no": yes_no_metrics(items, [score.by_sum for score in scores]),
        "rows_not_scored": dict(benchmark.unscored_rows),
        "items_not_scored": unscored,
        "items": dict(zip((item.index for item in items), hits(items, scores), strict=True)),
        "predictions": {
            item.index: None if score.by_sum is None else OPTION_LETTERS[score.by_sum]
            for item, score in zip(items, scores, strict=True)
        },
    }


def write_json(path: epath.Path, content: Mapping[str, Any]) -> None:
    """Writes a result file at once, so that a reader never sees half of it; makes its folder.

    Every process of a run computes the same result; process 0 writes it.
    """
    if not is_lead():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, json.dumps(content, indent=1, allow_nan=False) + "\n")


TABLE_COLUMNS = (
    ("accuracy", "accuracy"),
    ("± s.e.", "standard_error"),
    ("chance", "chance"),
    ("blind floor", "blind_floor"),
    ("held out", "blind_floor_held_out"),
    ("per token", "accuracy_mean_normalized"),
    ("no image", "accuracy_without_image"),
)


def format_table(results: Mapping[str, Mapping[str, Any]]) -> str:
    """The results of `evaluate` as text: one line per question type and one for the whole, for each benchmark."""
    blocks = []
    for name, result in results.items():
        summaries = {**result["by_category"], "overall": result["overall"]}
        columns = [(title, key) for title, key in TABLE_COLUMNS if key in result["overall"]]
        header = ["question type", "items", *(title for title, _ in columns)]
        body = [
            [category, str(summary["num_items"]), *(f"{summary[key]:.3f}" for _, key in columns)]
            for category, summary in summaries.items()
        ]
        lines = align([header, *body], numbers=True)
        rule = "-" * len(lines[0])
        title = f"{name}  (step {result['step']}; {result['scorer']})"
        blocks.append("\n".join([title, lines[0], rule, *lines[1:-1], rule, lines[-1], *_notes(result)]))
    return "\n\n".join(blocks)


def _notes(result: Mapping[str, Any]) -> list[str]:
    notes = [
        "blind floor: best guess from question and options alone, fitted on this file; held out: the same, cross-fitted"
    ]
    if result["yes_no"]:
        notes.append("yes/no: " + ", ".join(f"{key} {value:.3f}" for key, value in result["yes_no"].items()))
    if result["overall"]["num_unscored"]:
        counts: dict[str, int] = {}
        for reason in result["items_not_scored"].values():
            counts[reason] = counts.get(reason, 0) + 1
        notes.append(f"items that could not be scored, counted as misses: {_counts(counts)}")
    if result["rows_not_scored"]:
        notes.append(f"rows of the file outside what is scored: {_counts(result['rows_not_scored'])}")
    return notes


def _counts(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {reason}" for reason, count in counts.items())
