"""Scores of anybody's predictions by the rules of the public scorers, item by item; no model takes part.

Every question counts: one without a prediction is a miss and is reported, as is a prediction for no question. Nothing
is guessed. See `extraction` for how an answer in words becomes an option, `vqa` for open answers.
"""

import dataclasses
import itertools
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from unihetero_jax.data.open_questions import OpenQuestion, read_open_questions
from unihetero_jax.data.question_files import Question, read_questions, unknown_columns
from unihetero_jax.evaluation import extraction
from unihetero_jax.evaluation.benchmarks import Item
from unihetero_jax.evaluation.captioning import score_captions
from unihetero_jax.evaluation.circular import NUM_NAMED, group_rotations
from unihetero_jax.evaluation.predictions import Prediction, by_index, read_predictions
from unihetero_jax.evaluation.scoring import clustered_error, yes_no_errors, yes_no_figures
from unihetero_jax.evaluation.vqa import exact_match, vqa_accuracy
from unihetero_jax.text_table import align

PERCEPTION = (
    "existence", "count", "position", "color", "posters", "celebrity", "scene", "landmark", "artwork", "OCR",
)  # fmt: skip
COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")
"""MME's categories (arXiv 2306.13394)."""

OTHER_ANSWERS = "Other Answers"
YES_NO_FIGURES = ("accuracy", "precision", "recall", "f1", "yes_ratio")
MEANS = (*YES_NO_FIGURES, "yes_ratio_of_labels", "cider", "bleu_1", "bleu_2", "bleu_3", "bleu_4", "rouge_l")
"""Figures that are averaged over files."""
UNMATCHED = ("unanswered", "unknown_predictions", "unknown_columns")
CAPTION_FIGURES = ("cider", "bleu_1", "bleu_4", "rouge_l")

MATCHING: Mapping[str, str] = {
    "vlmevalkit": "VLMEvalKit exact matching (no judge model)",
    "lmms-eval": "lmms-eval static matching (no judge model)",
    "first-character": "the first character of the answer is the letter (SEED-Bench leaderboard, lmms-eval)",
    "pope": "POPE evaluate.py: a no, No or not in the first sentence is no, all else is yes",
    "mme": "MME evaluation tool: yes or no within the first four characters",
    "smallest-loss": "the option of smallest loss, the first of equal ones (SEED-Bench EVALUATION.md)",
    "evalai": "VQA accuracy, leave one out, after EvalAI's normalisation",
    "vqa": "VQA accuracy, leave one out, after the normalisation of VQA's own evaluation code",
    "regex": "CIDEr-D, BLEU, ROUGE-L (pycocoevalcap) on words by our own expression, without punctuation",
    "ptb": "CIDEr-D, BLEU, ROUGE-L (pycocoevalcap) on words by the Penn Treebank tokenizer, without punctuation",
    "exact": "equal but for case, punctuation and blanks",
}
"""What each rule does, in words; with what `rule` in a result begins."""


@dataclasses.dataclass(frozen=True)
class Scored:
    """One item: its score (0 or 1, for open answers in between), whether its prediction held an answer, its picture."""

    index: str
    category: str
    group: str
    score: float
    is_parsed: bool
    picture: str

    @property
    def cluster(self) -> str:
        """What items share that are not independent."""
        return self.picture or f"item {self.index}"


@dataclasses.dataclass(frozen=True)
class Task:
    """What is to be scored.

    Attributes:
        questions, source: files, for messages.
        predictions: by item.
        rule: its name.
        asked: the questions, where they are at hand; None: those of the file.
    """

    questions: str
    source: str
    predictions: Mapping[str, Prediction]
    rule: str
    asked: Sequence[Question | OpenQuestion] | None = None


def format_score(result: Mapping[str, Any]) -> str:
    """The figures of `score_predictions` as text."""
    digits = 1 if result["benchmark"] == "mme" else 4
    errors = result.get("errors", {})

    def shown(value: float, error: float | None, digits: int = digits) -> str:
        return f"{value:.{digits}f}" + (f" ± {error:.{digits}f}" if error is not None else "")

    rows = [("", "score")]
    for key in ("by_group", "by_category"):
        rows += [(name, shown(value, errors.get(key, {}).get(name))) for name, value in result[key].items()]
    rows.append(("overall", shown(result["overall"], result.get("standard_error"))))
    named = [key for key in (*YES_NO_FIGURES, *CAPTION_FIGURES) if key in result]
    rows += [(key, shown(result[key], errors.get("figures", {}).get(key), 4)) for key in named]
    lines = [f"{result['benchmark']}: {result['rule']}", *align(rows, numbers=True)]
    lines.append(f"{result['num_items']} items, {result['num_unparsed']} without an answer that could be read")
    for key, words in (("unanswered", "without a prediction, counted as misses"),
                       ("unknown_predictions", "predictions for no question, not scored"),
                       ("repeated", "identifiers that come several times, every line counted")):  # fmt: skip
        if count := result.get(f"num_{key}", 0):
            lines.append(f"{count} {words}: {_named(result[key], count)}")
    if result.get("unknown_columns"):
        lines.append(f"columns of the questions that nothing here reads: {', '.join(result['unknown_columns'])}")
    if result.get("missing_categories"):
        lines.append(f"categories of MME that are not there: {', '.join(result['missing_categories'])}")
    return "\n".join(lines)


def score_predictions(benchmark: str, questions: str, predictions: str, rule: str = "") -> dict[str, Any]:
    """Scores a file of predictions.

    Args:
        benchmark: one of `BENCHMARKS`.
        questions: the benchmark's own file, or several by comma (POPE has three): each is scored with the predictions
            at its place, the main figure is the mean, `by_group` has that of each file. For SEED-Bench it may be left
            empty where the predictions state the right answers (`gt_answer`), as published ones do; every line then
            counts, repeated ones too.
        predictions: see `read_predictions`; as many by comma as there are questions.
        rule: one of those of the benchmark; empty: its first.

    Returns:
        overall: the main figure, a share in [0, 1] (`mme`: points, 2,800 at most; `captions`: CIDEr-D, 10 at most).
        standard_error: of that figure, items on one picture being no independent ones. Of a mean over several files it
            is the mean of their errors, which is an upper bound: their items may share pictures.
        num_items, num_unparsed: items scored, and those of them in whose prediction (circular: in one of whose) the
            rule found no answer.
        by_category, by_group: the figure for each question type, and for each group of types where the file has them;
            `errors` has their standard errors, and under `figures` those of the benchmark's own figures.
        items: 0 or 1 by item (open answers: in between, too).
        rule: what was done, in words.
        num_unanswered, unanswered, num_unknown_predictions, unknown_predictions: what did not match, counted in full,
            named up to `NUM_NAMED`.
        And figures that belong to the benchmark.

    Raises:
        ValueError: a file is faulty or of another benchmark, or nothing in it matches.
    """
    if benchmark not in BENCHMARKS:
        raise ValueError(f"--benchmark {benchmark}: unknown; there are {', '.join(BENCHMARKS)}")
    scorer = BENCHMARKS[benchmark]
    rule = rule or scorer.rules[0]
    if rule not in scorer.rules:
        raise ValueError(f"--rule {rule}: for {benchmark} there are {', '.join(scorer.rules)}")
    pairs = list(itertools.zip_longest(questions.split(","), predictions.split(","), fillvalue=""))
    if len(pairs) > 1:
        return _score_several(benchmark, pairs, rule)
    found = read_predictions(predictions, scorer.answer_fields)
    if benchmark == "seedbench" and (not questions or questions == predictions):
        if rule != scorer.rules[0]:
            raise ValueError(f"--rule {rule}: needs the options, so the benchmark's file by --questions")
        return {"benchmark": benchmark} | _score_stated(predictions, found)
    if not questions:
        raise ValueError(f"--questions: {benchmark} needs the benchmark's own file")
    return score_task(benchmark, Task(questions, predictions, by_index(predictions, found), rule))


def _score_several(benchmark: str, pairs: Sequence[tuple[str, str]], rule: str) -> dict[str, Any]:
    """The mean over files, each with its predictions."""
    if not all(questions and predictions for questions, predictions in pairs):
        raise ValueError(
            f"--questions and --predictions: as many files of one as of the other, got {len(pairs)} of the longer list"
        )
    names = [Path(questions).stem for questions, _ in pairs]
    if len(set(names)) < len(names):
        raise ValueError(f"--questions: files have to differ in name, got {', '.join(names)}")
    if benchmark == "mme":
        raise ValueError("--questions: MME's points are of one file with all of its categories; give that one")
    parts = {name: score_predictions(benchmark, *pair, rule) for name, pair in zip(names, pairs, strict=True)}
    first = parts[names[0]]

    def mean(values: Callable[[Mapping[str, Any]], float]) -> float:
        return math.fsum(map(values, parts.values())) / len(parts)

    def together(values: Callable[[Mapping[str, Any]], Mapping[str, Any]]) -> dict[str, Any]:
        return {f"{name}/{inner}": value for name, part in parts.items() for inner, value in values(part).items()}

    result = {
        "benchmark": benchmark,
        **{key: mean(lambda part, key=key: part[key]) for key in ("overall", *MEANS) if key in first},
        **{key: sum(p[key] for p in parts.values()) for key in first if key.startswith("num_")},
        **{key: [f"{name}/{index}" for name, p in parts.items() for index in p.get(key, ())] for key in UNMATCHED},
        "by_category": together(lambda part: part["by_category"]),
        "by_group": {name: part["overall"] for name, part in parts.items()},
        "items": together(lambda part: part["items"]),
        "rule": f"{first['rule']}; mean over {len(parts)} files",
    }
    if "errors" not in first:
        return result
    figures = first["errors"].get("figures", {})
    return result | {
        "standard_error": mean(lambda part: part["standard_error"]),
        "errors": {
            "by_category": together(lambda part: part["errors"]["by_category"]),
            "by_group": {name: part["standard_error"] for name, part in parts.items()},
            "figures": {key: mean(lambda part, key=key: part["errors"]["figures"][key]) for key in figures},
        },
    }


def score_task(benchmark: str, task: Task) -> dict[str, Any]:
    """`score_predictions` of predictions that are at hand."""
    return {"benchmark": benchmark} | BENCHMARKS[benchmark].score(task)


def _open_questions(task: Task) -> list[OpenQuestion]:
    if task.asked is not None:
        return [question for question in task.asked if isinstance(question, OpenQuestion)]
    return read_open_questions(task.questions)


def benchmark_of(items: Sequence[Item]) -> tuple[str, str]:
    """The entry of `BENCHMARKS`, and its rule for answers in words, by which a model's own answers are judged."""
    if items[0].references:
        if not items[0].question:
            return "captions", "regex"
        is_of_people = all(len(item.references) > 1 for item in items)
        return ("vqa", "evalai") if is_of_people else ("gqa", "exact")
    if any(item.original_index for item in items):
        return "mmbench", "vlmevalkit"
    if all(item.is_yes_no for item in items):
        pairs = Counter((item.category, item.cluster) for item in items)
        is_mme = {category for category, _ in pairs} <= {*PERCEPTION, *COGNITION} and set(pairs.values()) == {2}
        return ("mme", "mme") if is_mme else ("pope", "vlmevalkit")
    return "mmbench-vanilla", "vlmevalkit"


# ---------------------------------------------------------------- multiple choice


def _score_circular(task: Task) -> dict[str, Any]:
    """An item is right if it is in all rotations of its options."""
    questions = _closed_questions(task)
    groups = group_rotations(task.questions, questions)
    chosen = _choose_options(task, questions)
    scored = []
    for base, rows in groups.items():
        is_right = all(chosen[row.index] == row.answer for row in rows)
        is_parsed = all(chosen[row.index] is not None for row in rows)
        scored.append(Scored(base, rows[0].category, rows[0].group, int(is_right), is_parsed, _picture(rows[0])))
    result = _summary(task, scored, questions, "; an item is right if it is in all rotations of its options")
    unparsed = sum(choice is None for choice in chosen.values())
    return result | {"num_rows": len(questions), "num_unparsed_rows": unparsed}


def _score_single(task: Task) -> dict[str, Any]:
    """Every question once, with its options as given; rows that repeat one with rotated options are left out."""
    everything = _closed_questions(task)
    questions = [question for question in everything if not question.original_index]
    chosen = _choose_options(task, questions)
    words = "; every question once, its options as given"
    result = _summary(task, _scored(questions, chosen), questions, words, known=everything)
    return result | {"num_rotated_rows_left_out": len(everything) - len(questions)}


def _score_losses(task: Task) -> dict[str, Any]:
    """SEED-Bench's own protocol: the harness gives a loss for each option."""
    questions = _closed_questions(task)
    chosen = {question.index: _smallest_loss(task, question) for question in questions}
    return _summary(task, _scored(questions, chosen), questions)


def _smallest_loss(task: Task, question: Question) -> int | None:
    """Place of the smallest loss, the first of equal ones; None without a prediction or where one is not finite."""
    if question.index not in task.predictions:
        return None
    losses = task.predictions[question.index].answer
    if not isinstance(losses, list) or len(losses) != len(question.options):
        raise ValueError(
            f"{task.source}: item {question.index}: {len(question.options)} losses were expected, got {losses!r:.80}"
        )
    return losses.index(min(losses)) if all(map(math.isfinite, losses)) else None


def _score_stated(source: str, predictions: Sequence[Prediction]) -> dict[str, Any]:
    """Letters beside each of which the right one stands."""
    untold = [prediction.index for prediction in predictions if not prediction.truth]
    if untold:
        raise ValueError(
            f"{source}: {len(untold)} predictions without gt_answer ({_named(untold)}); "
            "give the benchmark's file by --questions"
        )
    letters = [str(prediction.answer).strip()[:1].upper() for prediction in predictions]
    numbers: Counter[str] = Counter()
    items = {}
    for prediction, letter in zip(predictions, letters, strict=True):
        numbers[prediction.index] += 1
        repeat = f"#{numbers[prediction.index]}" if numbers[prediction.index] > 1 else ""
        items[prediction.index + repeat] = int(letter == prediction.truth.upper())
    repeated = [index for index, count in numbers.items() if count > 1]
    return {
        "overall": sum(items.values()) / len(items), "num_items": len(items),
        "num_unparsed": sum(letter not in tuple("ABCD") for letter in letters),
        "by_category": {}, "by_group": {}, "items": items,
        "rule": f"{MATCHING['first-character']}; right answers as the predictions state them, every line counts",
        "num_repeated": len(repeated), "repeated": repeated[:NUM_NAMED],
    }  # fmt: skip


def _choose_options(task: Task, questions: Sequence[Question]) -> dict[str, int | None]:
    """The option that each prediction means, by the task's rule."""
    choose = extraction.first_character if task.rule == "first-character" else extraction.OPTION_RULES[task.rule]
    return {q.index: choose(_text(task, q.index), q.options) for q in questions}


def _scored(questions: Sequence[Question], chosen: Mapping[str, int | None]) -> list[Scored]:
    return [
        Scored(q.index, q.category, q.group, int(chosen[q.index] == q.answer), chosen[q.index] is not None, _picture(q))
        for q in questions
    ]


# ---------------------------------------------------------------- yes or no


YES_NO_RULES: Mapping[str, extraction.YesNoRule] = {
    "pope": extraction.pope_answer,
    "vlmevalkit": extraction.vlmevalkit_yes_no,
    "lmms-eval": extraction.lmms_eval_yes_no,
    "mme": extraction.mme_answer,
}


def _score_pope(task: Task) -> dict[str, Any]:
    """POPE: accuracy, and precision, recall and F1 of the answer yes."""
    questions = _closed_questions(task)
    chosen = _choose_yes_no(task, questions)
    answers = [q.options[c].lower() if (c := chosen[q.index]) is not None else "" for q in questions]
    truth = [q.options[q.answer].lower() for q in questions if q.answer is not None]
    scored = _scored(questions, chosen)
    result, unparsed_is_no = _summary(task, scored, questions), task.rule != "lmms-eval"
    errors = yes_no_errors(truth, answers, [item.cluster for item in scored], unparsed_is_no)
    return result | yes_no_figures(truth, answers, unparsed_is_no) | {"errors": result["errors"] | {"figures": errors}}


def _score_mme(task: Task) -> dict[str, Any]:
    """MME: for each category 100 x (accuracy + share of pictures with both questions right), and their sums."""
    questions = _closed_questions(task)
    chosen = _choose_yes_no(task, questions)
    pictures: dict[tuple[str, str], list[int]] = {}
    for question in questions:
        if not question.pictures:
            raise ValueError(
                f"{task.questions}: {question.place}: no image and no image_path, which tells what questions belong "
                "together"
            )
        key = (question.category, _picture(question))
        pictures.setdefault(key, []).append(int(chosen[question.index] == question.answer))
    odd = [name[:40] for (_, name), hits in pictures.items() if len(hits) != 2]
    if odd:
        raise ValueError(f"{task.questions}: MME has two questions on each picture; not so for {_named(odd)}")
    points, errors = {}, {}
    for category in dict.fromkeys(question.category for question in questions):
        hits = {name: pair for (of, name), pair in pictures.items() if of == category}
        of_pictures = [100 * (sum(pair) / 2 + all(pair)) for pair in hits.values()]
        points[category] = math.fsum(of_pictures) / len(of_pictures)
        errors[category] = clustered_error(of_pictures, list(hits))
    groups = {"perception": PERCEPTION, "cognition": COGNITION}

    def group_error(categories: Sequence[str]) -> float:
        return math.hypot(*(errors.get(category, 0.0) for category in categories))

    result = _summary(task, _scored(questions, chosen), questions, "; points: accuracy and accuracy of both, x 100")
    return result | {
        "overall": sum(points.values()), "standard_error": group_error(list(points)), "accuracy": result["overall"],
        "by_category": points,
        "by_group": {name: sum(points.get(one, 0.0) for one in categories) for name, categories in groups.items()},
        "errors": {
            "by_category": errors,
            "by_group": {name: group_error(categories) for name, categories in groups.items()},
            "figures": {"accuracy": result["standard_error"]},
        },
        "missing_categories": [name for name in (*PERCEPTION, *COGNITION) if name not in points],
    }  # fmt: skip


def _choose_yes_no(task: Task, questions: Sequence[Question]) -> dict[str, int | None]:
    choose = YES_NO_RULES[task.rule]
    chosen = {}
    for question in questions:
        options = tuple(option.lower() for option in question.options)
        if sorted(options) != ["no", "yes"]:
            raise ValueError(
                f"{task.questions}: {question.place}: a yes/no question was expected, "
                f"its options are {question.options}"
            )
        answer = choose(_text(task, question.index))
        chosen[question.index] = None if answer is None else options.index(answer)
    return chosen


# ---------------------------------------------------------------- open answers


def _score_captions(task: Task) -> dict[str, Any]:
    """COCO's caption metrics; the main figure is CIDEr-D."""
    questions = _open_questions(task)
    texts = {question.index: _text(task, question.index) for question in questions}
    references = {question.index: question.answers for question in questions}
    found = score_captions(references, texts, task.rule)  # pyright: ignore[reportArgumentType]
    scored = [
        Scored(q.index, q.category, "", found.cider_by_picture[q.index], bool(texts[q.index].strip()), q.index)
        for q in questions
    ]
    result = _summary(task, scored, questions)
    # By category and over all: pycocoevalcap weighs words by the references of all pictures scored together.
    figures = {"overall": found.figures["cider"], **found.figures}
    return result | figures | {"errors": result["errors"] | {"figures": dict(found.errors)}}


def _score_open(task: Task) -> dict[str, Any]:
    """VQAv2, VQA-CP, OK-VQA, TextVQA (accuracy against ten people), GQA (exact match)."""
    questions = _open_questions(task)
    scored = []
    for question in questions:
        text = _text(task, question.index)
        if task.rule == "exact":
            score = exact_match(text, question.answers[0])
        else:
            if len(question.answers) < 2:
                raise ValueError(
                    f"{task.questions}: {question.place}: one answer; the leave-one-out accuracy needs those of "
                    "several people (--benchmark=gqa compares with one)"
                )
            score = vqa_accuracy(text, question.answers, task.rule)  # pyright: ignore[reportArgumentType]
        is_parsed, picture = bool(text.strip()), _picture(question)
        scored.append(Scored(question.index, question.category, "", score if is_parsed else 0.0, is_parsed, picture))
    return _summary(task, scored, questions)


# ---------------------------------------------------------------- shared


def _closed_questions(task: Task) -> list[Question]:
    """The questions with options and a right answer; videos are included, as nobody looks at the pictures here.

    Raises:
        ValueError: a row is faulty (but for its picture), has no answer or no options, or an index is repeated.
    """
    if task.asked is not None:
        return [question for question in task.asked if isinstance(question, Question)]
    questions = [_with_other_answers(question) for question in read_questions(Path(task.questions))]
    for question in questions:
        place = f"{task.questions}: {question.place}"
        if question.fault and question.fault.reason != "missing_image":
            raise ValueError(f"{place}: {question.fault}") from question.fault
        if question.answer is None:
            raise ValueError(f"{place}: no right answer; a TEST file cannot be scored here")
    repeated = [index for index, count in Counter(q.index for q in questions).items() if count > 1]
    if repeated:
        raise ValueError(f"{task.questions}: question identifiers must be unique, repeated: {_named(repeated)}")
    if not questions:
        raise ValueError(f"{task.questions}: no questions in it")
    return questions


def _with_other_answers(question: Question) -> Question:
    """A question without options as VLMEvalKit judges it (MMMU): the right answer is A, anything else B."""
    if question.options or not question.open_answer:
        return question
    return dataclasses.replace(question, options=(question.open_answer, OTHER_ANSWERS), answer=0)


def _picture(question: Question | OpenQuestion) -> str:
    """What tells a question's picture from others; empty where the file does not say."""
    return "|".join(picture.name or picture.cell for picture in question.pictures)


def _text(task: Task, index: str) -> str:
    """What was predicted for an item, as text; empty for an item without a prediction."""
    prediction = task.predictions.get(index)
    if prediction is None:
        return ""
    if isinstance(prediction.answer, list):
        raise ValueError(
            f"{task.source}: item {index}: losses instead of an answer; they are scored by seedbench-likelihood"
        )
    return prediction.answer


def _summary(
    task: Task, scored: Sequence[Scored], asked: Sequence[Any], words: str = "", known: Sequence[Any] = ()
) -> dict[str, Any]:
    """Means over all items, by category and by group, and what did not match.

    `asked` are the rows that need a prediction, `known` all that may have one, if these are more.
    """
    names = {question.index for question in known or asked}
    unanswered = [question.index for question in asked if question.index not in task.predictions]
    unknown = [index for index in task.predictions if index not in names]
    if len(unanswered) == len(asked):
        raise ValueError(
            f"{task.source}: no prediction is for a question of {task.questions} (it has items {_named(unknown)}, "
            f"asked are {_named(unanswered)})"
        )
    return {
        "overall": _mean(scored),
        "standard_error": _error(scored),
        "num_items": len(scored),
        "num_unparsed": sum(not item.is_parsed for item in scored),
        "by_category": _by(scored, lambda item: item.category, _mean),
        "by_group": _by([item for item in scored if item.group], lambda item: item.group, _mean),
        "errors": {
            "by_category": _by(scored, lambda item: item.category, _error),
            "by_group": _by([item for item in scored if item.group], lambda item: item.group, _error),
        },
        "items": {item.index: item.score for item in scored},
        "rule": MATCHING[task.rule] + words,
        "num_unanswered": len(unanswered), "unanswered": unanswered[:NUM_NAMED],
        "num_unknown_predictions": len(unknown), "unknown_predictions": unknown[:NUM_NAMED],
        "unknown_columns": unknown_columns(Path(task.questions)) if task.asked is None else [],
    }  # fmt: skip


def _mean(scored: Sequence[Scored]) -> float:
    return math.fsum(item.score for item in scored) / len(scored)


def _error(scored: Sequence[Scored]) -> float:
    return clustered_error([item.score for item in scored], [item.cluster for item in scored])


def _by(
    scored: Sequence[Scored], key: Callable[[Scored], str], figure: Callable[[Sequence[Scored]], float]
) -> dict[str, float]:
    groups: dict[str, list[Scored]] = {}
    for item in scored:
        groups.setdefault(key(item), []).append(item)
    return {name: figure(items) for name, items in sorted(groups.items())}


def _named(items: Sequence[str], count: int = 0) -> str:
    left = max(count, len(items)) - NUM_NAMED
    more = f" and {left} more" if left > 0 else ""
    return ", ".join(items[:NUM_NAMED]) + more


@dataclasses.dataclass(frozen=True)
class Scorer:
    """How a benchmark is scored: its rules, the main one first, and where predictions in JSON may stand."""

    score: Callable[[Task], dict[str, Any]]
    rules: tuple[str, ...]
    answer_fields: tuple[str, ...] = ()


BENCHMARKS: Mapping[str, Scorer] = {
    "mmbench": Scorer(_score_circular, ("vlmevalkit", "lmms-eval")),
    "mmbench-vanilla": Scorer(_score_single, ("vlmevalkit", "lmms-eval")),
    "seedbench": Scorer(_score_single, ("first-character", "vlmevalkit", "lmms-eval")),
    "seedbench-likelihood": Scorer(_score_losses, ("smallest-loss",), ("losses",)),
    "pope": Scorer(_score_pope, ("pope", "vlmevalkit", "lmms-eval"), ("answer", "text")),
    "mme": Scorer(_score_mme, ("mme", "vlmevalkit")),
    "vqa": Scorer(_score_open, ("evalai", "vqa", "vlmevalkit"), ("answer",)),
    "gqa": Scorer(_score_open, ("exact",), ("answer",)),
    "captions": Scorer(_score_captions, ("regex", "ptb"), ("caption",)),
}
