"""Runs benchmarks as jobs and writes one result file for each; prints them as a table.

A result file says everything that its figures depend on: benchmark and data hash, prompt, scorer rule, image
transform, config hash and step. Four modes, never in one column:

    likelihood   options are ranked by the likelihood of their text; the prompt does not show them
    letters      the prompt shows the options, their letters are ranked by likelihood
    generation   the prompt shows the options, the model answers freely, a public scorer's rule reads the answer
    words        the same, but the prompt is the question alone, as in training
"""

import dataclasses
import difflib
import json
import math
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from etils import epath

from unihetero_jax import distributed
from unihetero_jax.config import Config
from unihetero_jax.data.open_questions import OpenQuestion
from unihetero_jax.data.question_files import OPTION_LETTERS, Picture, Question, tsv_rows
from unihetero_jax.data.records import PROMPT_TEMPLATE
from unihetero_jax.data.tokenizer import Tokenizer
from unihetero_jax.evaluation import extraction, official
from unihetero_jax.evaluation.benchmarks import Benchmark, Item, read_benchmark
from unihetero_jax.evaluation.jobs import Answer, run_job
from unihetero_jax.evaluation.multiple_choice import prompt_text, score_items
from unihetero_jax.evaluation.predictions import Prediction, write_leaderboard, write_table
from unihetero_jax.evaluation.scoring import (
    OptionScores,
    clustered_error,
    hits,
    summarize,
    summarize_by_category,
    yes_no_metric_errors,
    yes_no_metrics,
)
from unihetero_jax.evaluation.training_prior import TrainingPrior, split_by_prior
from unihetero_jax.storage import to_path
from unihetero_jax.text_table import align
from unihetero_jax.workdir import write_atomically

RESULT_VERSION = 3
BENCHMARK_SUFFIXES = (".tsv", ".json", ".jsonl", ".parquet")

Mode = Literal["likelihood", "letters", "generation", "words"]
SCORERS: Mapping[Mode, str] = {
    "likelihood": "likelihood, sum of log-probabilities of the option text",
    "letters": "likelihood of the option's letter, the options being in the prompt",
    "generation": "free answers, the options being in the prompt",
    "words": "free answers to the question alone",
}
SHOWS_OPTIONS: frozenset[Mode] = frozenset({"letters", "generation"})
"""Modes in which the order of the options can matter, so that circular rows are asked."""
GENERATED: frozenset[Mode] = frozenset({"generation", "words"})
"""Modes in which the model answers freely."""
OPTIONS_TEMPLATE = (
    "Hint: {hint}\\nQuestion: {question}\\nOptions:\\nA. {A}\\n...\\nPlease select the correct answer ..."
)
"""VLMEvalKit's prompt, in short; `options_prompt` writes it."""

LogProbs = Callable[[dict[str, np.ndarray]], np.ndarray]
"""From a packed batch (the fields of `arrays.Batch`) to `float[B,T]`: log p(tokens[t] | what t may see before it) where
`text_loss_mask`."""


@dataclasses.dataclass(frozen=True)
class Model:
    """What evaluation knows of a model.

    Attributes:
        log_probs: see `LogProbs`; called with this process's rows of `eval.batch_rows`, on all processes at once.
        own_rows: which of so many rows those are.
        generate: continues prompts, (text, pictures before it) each, on all processes at once; None for a prompt whose
            picture cannot be decoded.
        identity: whatever else an answer depends on (which parameters, how long it may be); kept answers of another
            one are not used.
    """

    log_probs: LogProbs
    own_rows: Callable[[int], Sequence[int]] = range
    generate: Callable[[Sequence[tuple[str, tuple[bytes, ...]]]], list[str | None]] | None = None
    identity: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def select_benchmarks(configured: Mapping[str, str], requested: Sequence[str]) -> dict[str, str]:
    """Which benchmarks to run, by name: the configured ones called `requested`, all of them when that is empty.

    A request may also be the path of a questions file; its name is then the file's, without suffix.

    Raises:
        ValueError: a name is not configured (with a spelling hint) or asked for twice.
    """
    selected: dict[str, str] = {}
    for request in requested or configured:
        is_path = request not in configured and (request.lower().endswith(BENCHMARK_SUFFIXES) or Path(request).is_dir())
        name, path = (Path(request).stem, request) if is_path else (request, configured.get(request))
        if path is None:
            close = difflib.get_close_matches(request, configured, n=1, cutoff=0.5)
            hint = (
                f"did you mean {close[0]!r}"
                if close
                else f"configured (eval.benchmarks): {', '.join(configured) or 'none'}"
            )
            raise ValueError(
                f"unknown benchmark {request!r}; {hint}. The path of a .tsv, .json, .jsonl or .parquet file works "
                "too, or of a folder of pictures by class"
            )
        if name in selected:
            raise ValueError(f"benchmark {name!r} is asked for twice; name each once")
        selected[name] = path
    return selected


def evaluate(
    config: Config,
    model: Model,
    tokenizer: Tokenizer,
    benchmarks: Mapping[str, str],
    *,
    step: int,
    config_hash: str,
    output_dir: epath.PathLike | None,
    mode: Mode = "likelihood",
    without_image: bool = False,
    prior: TrainingPrior | None = None,
    replicate: int = 0,
    on_progress: Callable[[str, int, int], None] | None = None,
) -> dict[str, Any]:
    """Scores every benchmark and writes `<output_dir>/<name>-<step>.json` for each (with the mode in the name, but for
    `likelihood`), its answers beside it, and predictions in the layout of the benchmark's public scorer.

    A job that was killed goes on where it was; one that was finished is not computed again (see `jobs`).

    Args:
        config: the run's configuration; row sizes, image spec, `eval.batch_rows` and `eval.shard_items` are used.
        model: see `Model`.
        tokenizer: the run's tokenizer.
        benchmarks: name -> questions file; see `select_benchmarks`.
        step: training step of the model's parameters.
        config_hash: of the configuration that they were trained with (`config` may have other evaluation settings).
        output_dir: folder of the result files, created if missing; normally `<workdir>/eval`. None writes nothing.
        mode: see above.
        without_image: also score with the picture left out of the prompt (`likelihood`, `letters`): adds
            `accuracy_without_image`, the blind accuracy of this very model, `answer_nll_per_token_without_image`,
            and `accuracy_prior_normalized`, which
            ranks by how much the picture raises an option's log-probability.
        prior: adds `training_prior`, see `split_by_prior` (`likelihood`, `letters`).
        replicate: of a run with several; it names the files, but for the first.
        on_progress: called with (benchmark, items done, items in all) after every shard.

    Returns:
        name -> the content of its result file; on process 0 alone, the others get nothing.

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
    files = {name: read_benchmark(path, rotations=mode in SHOWS_OPTIONS) for name, path in benchmarks.items()}
    for name, benchmark in files.items():
        check_mode(name, benchmark, mode)
    if mode in GENERATED and (without_image or prior is not None):
        raise ValueError(f"--mode={mode}: --without-image and --training-prior belong to the modes that rank options")
    results = {}
    for name, benchmark in files.items():
        facts = _facts(name, benchmark, config, mode)
        facts |= {"config_hash": config_hash, "step": step, "replicate": replicate}
        stem = to_path(output_dir) / stem_of(name, step, mode, replicate) if output_dir is not None else None
        report = (lambda done, total, name=name: on_progress(name, done, total)) if on_progress else None
        answer = _answerer(config, model, tokenizer, mode, without_image)
        identity = facts | {
            "tokenizer": tokenizer.hash, "without_image": without_image, "program": distributed.program_digest(),
            "rows": [config.data.row_tokens, config.data.row_patches, config.data.turns], **model.identity,
        }  # fmt: skip
        answers = run_job(stem, identity, benchmark.items, config.eval.shard_items, answer, report)
        if distributed.is_lead():
            results[name] = facts | _judge(benchmark, answers, mode, prior)
            if stem is not None:
                write_json(stem.parent / f"{stem.name}.json", results[name])
                _write_predictions(stem, benchmark, results[name]["predictions"])
    return results


def check_mode(name: str, benchmark: Benchmark, mode: Mode) -> None:
    """Raises ValueError if a benchmark cannot be asked in a mode."""
    if benchmark.is_open and mode != "words":
        raise ValueError(
            f"{name}: {benchmark.path} has no options to rank; such questions are answered by --mode=words"
        )
    most = max(len(item.options) for item in benchmark.items)
    if mode in SHOWS_OPTIONS and most > len(OPTION_LETTERS):
        raise ValueError(f"{name}: {most} options, more than there are letters; take --mode=likelihood")


def stem_of(name: str, step: int, mode: Mode = "likelihood", replicate: int = 0) -> str:
    """Name of a result's files, without suffix."""
    of_mode = "" if mode == "likelihood" else f"-{mode}"
    of_replicate = f"-replicate{replicate}" if replicate else ""
    return f"{name}{of_mode}{of_replicate}-{step}"


def _facts(name: str, benchmark: Benchmark, config: Config, mode: Mode) -> dict[str, Any]:
    """What the figures of a result depend on, besides the parameters."""
    data = config.data
    return {
        "result_version": RESULT_VERSION,
        "benchmark": name,
        "file": str(benchmark.path),
        "data_hash": benchmark.data_hash,
        "mode": mode,
        "prompt_template": OPTIONS_TEMPLATE if mode in SHOWS_OPTIONS else PROMPT_TEMPLATE,
        "scorer": SCORERS[mode],
        "caption_prompt": config.eval.caption_prompt,
        "chat_template": config.eval.chat_template,
        "image_transform": {
            "patch_size": config.model.encoder.patch_size,
            "min_patches": data.image_min_patches,
            "max_patches": data.image_max_patches,
        },
    }


# ---------------------------------------------------------------- answers


def _answerer(
    config: Config, model: Model, tokenizer: Tokenizer, mode: Mode, without_image: bool
) -> Callable[[Sequence[Item]], list[Answer]]:
    """What computes the answers of a shard."""

    def generated(items: Sequence[Item]) -> list[Answer]:
        assert model.generate is not None
        shown = options_prompt if mode in SHOWS_OPTIONS else prompt_text
        texts = model.generate([(shown(item) or config.eval.caption_prompt, item.images) for item in items])
        return [
            {"index": item.index, "text": text or "", "unscored": "" if text is not None else "undecodable_image"}
            for item, text in zip(items, texts, strict=False)  # other processes than the first have no texts
        ]

    def ranked(items: Sequence[Item]) -> list[Answer]:
        asked = [with_letters(item) if mode == "letters" else asked_for_caption(item, config) for item in items]
        seen = score_items(asked, tokenizer, config, model.log_probs, own_rows=model.own_rows)
        answers = [
            {"index": item.index, "log_probs": s.sum_log_probs, "num_tokens": s.num_tokens, "unscored": s.unscored}
            for item, s in zip(items, seen, strict=False)
        ]
        if without_image:
            blind = score_items(asked, tokenizer, config, model.log_probs, own_rows=model.own_rows, without_image=True)
            for answer, scores in zip(answers, blind, strict=True):
                answer["blind"] = {
                    "log_probs": scores.sum_log_probs, "num_tokens": scores.num_tokens, "unscored": scores.unscored,
                }  # fmt: skip
        return answers

    return generated if mode in GENERATED else ranked


def options_prompt(item: Item) -> str:
    """VLMEvalKit's prompt of a multiple-choice question; a yes/no question stands alone there too."""
    if item.is_yes_no:
        return prompt_text(item)
    options = "".join(f"{letter}. {text}\n" for letter, text in zip(OPTION_LETTERS, item.options, strict=False))
    hint = f"Hint: {item.hint}\n" if item.hint else ""
    asking = "Please select the correct answer from the options above. \n"
    return f"{hint}Question: {item.question}\nOptions:\n{options}{asking}"


def asked_for_caption(item: Item, config: Config) -> Item:
    """The item, with the caption prompt where it has no question: its options are captions then."""
    return item if item.question else dataclasses.replace(item, question=config.eval.caption_prompt)


def with_letters(item: Item) -> Item:
    """The item with its options in the prompt and their letters as what is ranked; yes and no are ranked as words."""
    if item.is_yes_no:
        return item
    letters = tuple(OPTION_LETTERS[: len(item.options)])
    return dataclasses.replace(item, question=options_prompt(item), hint="", options=letters)


# ---------------------------------------------------------------- results


def _judge(benchmark: Benchmark, answers: Sequence[Answer], mode: Mode, prior: TrainingPrior | None) -> dict[str, Any]:
    is_free = mode in GENERATED
    result = _judge_words(benchmark, answers) if is_free else _judge_ranks(benchmark, answers, prior)
    bases = {item.original_index or item.index: item for item in reversed(benchmark.items)}
    return result | {
        "rows_not_scored": dict(benchmark.unscored_rows),
        "categories": {index: bases[index].category for index in result["items"]},
        "clusters": {index: bases[index].cluster for index in result["items"]},
    }


def _judge_ranks(benchmark: Benchmark, answers: Sequence[Answer], prior: TrainingPrior | None) -> dict[str, Any]:
    items = benchmark.items
    scores = [_option_scores(answer) for answer in answers]
    overall, by_category = summarize(items, scores), summarize_by_category(items, scores)
    if answers and "blind" in answers[0]:
        _add_blind(items, scores, answers, overall, by_category)
    chosen = {item.index: score.by_sum for item, score in zip(items, scores, strict=True)}
    right = _by_base(items, chosen)
    if any(item.original_index for item in items):
        overall["accuracy_circular"] = sum(right.values()) / len(right)
        of_bases = {item.original_index or item.index: item.cluster for item in items}
        overall["accuracy_circular_error"] = clustered_error(list(right.values()), [of_bases[base] for base in right])
    return {
        "overall": overall,
        "by_category": by_category,
        "yes_no": yes_no_metrics(items, [score.by_sum for score in scores]),
        "yes_no_errors": yes_no_metric_errors(items, [score.by_sum for score in scores]),
        "positions": position_bias(items, list(chosen.values())),
        "training_prior": split_by_prior(prior, items, list(chosen.values())) if prior else None,
        "items_not_scored": {i.index: s.unscored for i, s in zip(items, scores, strict=True) if s.unscored},
        "items": right,
        "predictions": {i.index: None if (c := chosen[i.index]) is None else i.option_label(c) for i in items},
    }


def _option_scores(answer: Answer) -> OptionScores:
    return OptionScores(tuple(answer["log_probs"]), tuple(answer["num_tokens"]), answer["unscored"])


def _add_blind(
    items: Sequence[Item],
    scores: Sequence[OptionScores],
    answers: Sequence[Answer],
    overall: dict[str, Any],
    by_category: dict[str, dict[str, Any]],
) -> None:
    """Adds what the same model reaches with the picture left out, and when its prior is taken off."""
    blind = [_option_scores(answer["blind"]) for answer in answers]
    raised = [_raised(with_image, without) for with_image, without in zip(scores, blind, strict=True)]
    for key, changed in (("accuracy_without_image", blind), ("accuracy_prior_normalized", raised)):
        right = hits(items, changed)
        overall[key] = sum(right) / len(right)
        overall[f"{key}_error"] = clustered_error(right, [item.cluster for item in items])
        for category, summary in by_category.items():
            own = [hit for item, hit in zip(items, right, strict=True) if item.category == category]
            summary[key] = sum(own) / len(own)
    overall["answer_nll_per_token_without_image"] = summarize(items, blind)["answer_nll_per_token"]
    seen, unseen = ([s.by_sum == i.answer for i, s in zip(items, them, strict=True)] for them in (scores, blind))
    for name, prior in (("right", True), ("wrong", False)):
        with_it = [right for right, prior_right in zip(seen, unseen, strict=True) if prior_right == prior]
        overall[f"accuracy_where_prior_is_{name}"] = sum(with_it) / len(with_it) if with_it else None


def _raised(with_image: OptionScores, without: OptionScores) -> OptionScores:
    """How much the picture raises each option; unscored where either is."""
    if reason := with_image.unscored or without.unscored:
        return OptionScores((), (), reason)
    differences = np.subtract(with_image.sum_log_probs, without.sum_log_probs)
    return OptionScores(tuple(differences.tolist()), with_image.num_tokens)


def _by_base(items: Sequence[Item], chosen: Mapping[str, int | None]) -> dict[str, int]:
    """1 for each original item that is right in all of its rows."""
    right: dict[str, int] = {}
    for item in items:
        base = item.original_index or item.index
        right[base] = right.get(base, 1) & int(chosen[item.index] == item.answer)
    return right


def position_bias(items: Sequence[Item], chosen: Sequence[int | None]) -> dict[str, dict[str, float]]:
    """By letter: share of items that offer it, of which it is right, and for which it was chosen."""
    result = {}
    for position, letter in enumerate(OPTION_LETTERS):
        offered = [(item, c) for item, c in zip(items, chosen, strict=True) if len(item.options) > position]
        if offered:
            result[letter] = {
                "num_offered": len(offered),
                "right": sum(item.answer == position for item, _ in offered) / len(offered),
                "chosen": sum(c == position for _, c in offered) / len(offered),
            }
    return result


def _judge_words(benchmark: Benchmark, answers: Sequence[Answer]) -> dict[str, Any]:
    """Answers in words, by the rule of the benchmark's public scorer."""
    items = benchmark.items
    name, rule = official.benchmark_of(items)
    texts = {answer["index"]: answer["text"] for answer in answers}
    predictions = {index: Prediction(index, text) for index, text in texts.items()}
    questions = [_as_question(item) for item in items]
    score = official.score_task(name, official.Task(str(benchmark.path), "answers", predictions, rule, questions))
    bases = {item.index: item for item in items if not item.original_index}
    num_rows = Counter(item.original_index or item.index for item in items)

    def summary(indices: Sequence[str]) -> dict[str, Any]:
        values = [score["items"][index] for index in indices]
        clusters = [bases[index].cluster for index in indices]
        # A guesser has to be right in every rotation.
        chances = [len(bases[i].options) ** -num_rows[i] for i in indices if bases[i].options]
        return ({"chance": sum(chances) / len(chances)} if chances else {}) | {
            "accuracy": sum(values) / len(values), "standard_error": clustered_error(values, clusters),
            "num_clusters": len(set(clusters)), "num_items": len(indices),
        }  # fmt: skip

    unscored = {answer["index"]: answer["unscored"] for answer in answers if answer["unscored"]}
    groups: dict[str, list[str]] = {}
    for index in score["items"]:
        groups.setdefault(bases[index].category, []).append(index)
    return {
        "overall": summary(list(score["items"]))
        | {"num_unparsed": score["num_unparsed"]}
        | {"num_unscored": len(unscored)},
        "by_category": {category: summary(indices) for category, indices in groups.items()},
        "yes_no": {key: score[key] for key in official.YES_NO_FIGURES if key in score} or None,
        "yes_no_errors": score["errors"].get("figures"),
        "official": {key: value for key, value in score.items() if key != "items"},
        "rule": score["rule"],
        "items_not_scored": unscored,
        "items": score["items"],
        "predictions": texts,
    }


def _as_question(item: Item) -> Question | OpenQuestion:
    """The item as the public scorers' rules take it."""
    pictures = (Picture("picture", name=item.cluster),) if item.pictures else ()
    if item.references:
        return OpenQuestion("", item.index, item.question, item.references, item.category, pictures)
    return Question(
        "", index=item.index, question=item.question, options=item.options, answer=item.answer, category=item.category,
        group=item.group, pictures=pictures, original_index=item.original_index,
    )  # fmt: skip


# ---------------------------------------------------------------- files and tables


def _write_predictions(stem: epath.Path, benchmark: Benchmark, predictions: Mapping[str, str | None]) -> None:
    """In the file that the benchmark's public scorer reads: a table for VLMEvalKit, JSON lines for the others.

    A table is the benchmark's own with the column `prediction` for the pictures' `image`, as VLMEvalKit makes it. The
    lines hold letters (yes or no): of a free answer the one that is meant, where one is.
    """
    if benchmark.path.suffix.lower() != ".tsv":
        labels = {item.index: _label_of(item, predictions[item.index] or "") for item in benchmark.items}
        write_leaderboard(stem.parent / f"{stem.name}.predictions.jsonl", labels)
        return
    rows = [
        {column: cell for column, cell in row.items() if column != "image"}
        | {"prediction": predictions[row["index"]] or ""}
        for row in tsv_rows(benchmark.path, benchmark.path.read_text("utf-8-sig"))
        if row["index"] in predictions
    ]
    write_table(stem.parent / f"{stem.name}.predictions.tsv", rows)


def _label_of(item: Item, prediction: str) -> str:
    """A letter, or yes or no, as the files for leaderboards have them; what names no option stays as it is."""
    position = extraction.vlmevalkit_option(prediction, item.options) if item.options else None
    return prediction if position is None else item.option_label(position)


def write_json(path: epath.Path, content: Mapping[str, Any]) -> None:
    """Writes a result file at once, so that a reader never sees half of it; makes its folder.

    Every process of a run may call it; process 0 writes.
    """
    if not distributed.is_lead():
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
    ("less prior", "accuracy_prior_normalized"),
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
        title = f"{name}  (step {result['step']}; {result.get('rule', result['scorer'])})"
        blocks.append("\n".join([title, lines[0], rule, *lines[1:-1], rule, lines[-1], *notes_of(result)]))
    return "\n\n".join(blocks)


def notes_of(result: Mapping[str, Any]) -> list[str]:
    """What a reader of the figures has to know beside them."""
    overall = result["overall"]
    notes = [f"s.e.: clustered by {overall['num_clusters']} pictures or questions without one"]
    if "blind_floor" in overall:
        notes.append(
            "blind floor: best guess from question and options alone, fitted on this file; held out: the same, "
            "cross-fitted"
        )
    if "accuracy_circular" in overall:
        shown = f"{overall['accuracy_circular']:.3f} ± {overall['accuracy_circular_error']:.3f}"
        notes.append(f"right in all rotations of the options: {shown}")
    if "accuracy_without_image" in overall:
        notes.append(
            f"s.e. without the picture {overall['accuracy_without_image_error']:.3f}, less the prior "
            f"{overall['accuracy_prior_normalized_error']:.3f}"
        )
    for name in ("right", "wrong"):
        if (value := overall.get(f"accuracy_where_prior_is_{name}")) is not None:
            notes.append(f"accuracy where the same model is {name} without the picture: {value:.3f}")
    if split := result.get("training_prior"):
        notes.append(_prior_note(split))
    if result["yes_no"]:
        errors = result.get("yes_no_errors") or {}  # results before version 3 have none
        shown = [
            f"{key} {value:.3f}" + (f" ± {errors[key]:.3f}" if key in errors else "")
            for key, value in result["yes_no"].items()
        ]
        notes.append("yes/no: " + ", ".join(shown))
    figures = {key: value for key, value in result.get("official", {}).items() if key in official.CAPTION_FIGURES}
    if figures:
        errors = result["official"]["errors"].get("figures", dict.fromkeys(figures, math.nan))
        shown = [f"{key} {value:.4f} ± {errors[key]:.4f}" for key, value in figures.items()]
        notes.append(f"the column accuracy is CIDEr-D (0 to 10): {', '.join(shown)}")
    if result.get("official", {}).get("benchmark") == "mme":
        points = result["official"]
        notes.append(f"MME points: {points['overall']:.1f} ± {points['standard_error']:.1f}")
    if unparsed := overall.get("num_unparsed", 0):
        notes.append(f"answers in which the rule found none, counted as misses: {unparsed}")
    if overall["num_unscored"]:
        counts = Counter(result["items_not_scored"].values())
        notes.append(f"items that could not be scored, counted as misses: {_counts(counts)}")
    if result["rows_not_scored"]:
        notes.append(f"rows of the file outside what is scored: {_counts(result['rows_not_scored'])}")
    return notes


def _prior_note(split: Mapping[str, Any]) -> str:
    if split["prior_accuracy"] is None:
        return "the answers of training say nothing about these questions"
    shown = [
        f"{split[kind]['accuracy']:.3f} where they are {kind} ({split[kind]['num_items']})"
        for kind in ("right", "wrong", "silent")
        if split[kind]["num_items"]
    ]
    return f"the answers of training alone reach {split['prior_accuracy']:.3f}; accuracy {', '.join(shown)}"


def _counts(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {reason}" for reason, count in counts.items())
