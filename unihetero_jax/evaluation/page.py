"""The `eval/index.html` of a run: figures, where they come from, and the items behind them.

It shows what a table of accuracies hides: chance and the blind model beside each bar, the course over the steps, which
places of the answer are preferred, and the most confident right and wrong answers with picture, question, options and
log-probabilities.
"""

import base64
import dataclasses
import io
import json
from collections.abc import Mapping
from typing import Any

from etils import epath
from PIL import Image

from unihetero_jax.evaluation.benchmarks import Item, read_benchmark
from unihetero_jax.evaluation.comparison import read_results
from unihetero_jax.evaluation.runner import SHOWS_OPTIONS, notes_of, stem_of
from unihetero_jax.html_page import definitions, escaped, page, section, table
from unihetero_jax.storage import list_folder, read_bytes, to_path
from unihetero_jax.workdir import write_atomically

NUM_EXAMPLES = 6
"""Of the most confident right answers, and of wrong ones."""
THUMBNAIL = 160
"""Pixels of a picture's longer side."""
MAX_TEXT = 400
BAR_WIDTH = 260
OPTIONAL_COLUMNS = {
    "blind floor": "blind_floor", "no image": "accuracy_without_image", "per token": "accuracy_mean_normalized",
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Example:
    """An item, what was answered, whether it is right, and by how many nats the choice led (0 for free answers)."""

    item: Item
    answer: Mapping[str, Any]
    is_right: bool
    margin: float


def write_page(workdir: epath.PathLike) -> epath.Path:
    """Writes the page of a run's newest results; returns where.

    Raises:
        ValueError: the run has no results.
    """
    folder = to_path(workdir) / "eval"
    results = read_results(workdir)
    parts = [f"<h1>Evaluation of {escaped(workdir)}</h1>", _overview(results)]
    for number, (name, result) in enumerate(results.items()):
        content = [_facts(result), _bars(result), _notes(result), _places(result), _course(folder, result)]
        parts.append(section(name, f"benchmark-{number}", "".join([*content, _examples(folder, result)])))
    path = folder / "index.html"
    write_atomically(path, page("Evaluation", "\n".join(parts)))
    return path


def _overview(results: Mapping[str, Mapping[str, Any]]) -> str:
    rows = []
    for name, result in results.items():
        overall = result["overall"]
        rows.append((
            name, result["mode"], str(result["step"]), str(overall["num_items"]), _share(overall["accuracy"]),
            _share(1.96 * overall["standard_error"]), _share(overall.get("chance")),
        ))  # fmt: skip
    return table("Newest results", ("benchmark", "mode", "step", "items", "accuracy", "± 95%", "chance"), rows)


def _share(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def _facts(result: Mapping[str, Any]) -> str:
    facts = {
        "file": result["file"], "data": result["data_hash"], "config": result["config_hash"], "step": result["step"],
        "scorer": result.get("rule", result["scorer"]), "prompt": result["prompt_template"],
        "image transform": result["image_transform"],
    }  # fmt: skip
    return definitions(facts)


def _bars(result: Mapping[str, Any]) -> str:
    """Accuracy by category with its interval, chance and the blind model as marks."""
    overall = result["overall"]
    extra = {title: key for title, key in OPTIONAL_COLUMNS.items() if key in overall}
    rows = [
        (escaped(category), _bar(row), str(row["num_items"]), _share(row["accuracy"]), _share(row["standard_error"]),
         _share(row.get("chance")), *(_share(row.get(key)) for key in extra.values()))
        for category, row in [*result["by_category"].items(), ("overall", overall)]
    ]  # fmt: skip
    header = ("question type", "bar", "items", "accuracy", "s.e.", "chance", *extra)
    caption = "Accuracy; bars with 95% interval, chance as a line, the same model without the picture as a diamond"
    return table(caption, header, rows, html_cells=True)


def _bar(row: Mapping[str, Any]) -> str:
    def at(value: float) -> float:
        return round(BAR_WIDTH * min(max(value, 0.0), 1.0), 1)

    accuracy, error = row["accuracy"], 1.96 * row["standard_error"]
    low, high = at(accuracy - error), at(accuracy + error)
    parts = [
        f'<rect x="0" y="3" width="{BAR_WIDTH}" height="12" fill="#eef1f5"/>',
        f'<rect x="0" y="3" width="{at(accuracy)}" height="12" fill="#2f5f9e"/>',
        f'<path d="M{low} 9H{high}M{low} 5v8M{high} 5v8" stroke="#c2570c" stroke-width="2"/>',
    ]
    if row.get("chance") is not None:
        parts.append(f'<path d="M{at(row["chance"])} 0v18" stroke="#1f2430" stroke-width="1.5"/>')
    if row.get("accuracy_without_image") is not None:
        x = at(row["accuracy_without_image"])
        parts.append(f'<path d="M{x} 4l5 5l-5 5l-5 -5z" fill="#fff" stroke="#1f2430"/>')
    label = f"{accuracy:.3f} of {row['num_items']} items"
    return f'<svg width="{BAR_WIDTH}" height="18" role="img" aria-label="{label}">{"".join(parts)}</svg>'


def _notes(result: Mapping[str, Any]) -> str:
    return f'<p class="note">{escaped("; ".join(notes_of(result)))}</p>'


def _places(result: Mapping[str, Any]) -> str:
    """How often each place is right and chosen: a preference for one is no understanding."""
    rows = [
        (letter, str(row["num_offered"]), _share(row["right"]), _share(row["chosen"]))
        for letter, row in result.get("positions", {}).items()
    ]
    return table("Place of the answer", ("option", "offered", "right", "chosen"), rows) if rows else ""


def _course(folder: epath.Path, result: Mapping[str, Any]) -> str:
    """Accuracy over the steps that were evaluated on the same data in the same mode."""
    found = (json.loads(read_bytes(path)) for path in list_folder(folder) if path.suffix == ".json")
    same = [r for r in found if all(r.get(key) == result[key] for key in ("benchmark", "mode", "data_hash"))]
    if len(same) < 2:
        return ""
    rows = [
        (str(other["step"]), _bar(other["overall"]), _share(other["overall"]["accuracy"]))
        for other in sorted(same, key=lambda other: other["step"])
    ]
    return table("Over the steps", ("step", "bar", "accuracy"), rows, html_cells=True)


# ---------------------------------------------------------------- examples


def _examples(folder: epath.Path, result: Mapping[str, Any]) -> str:
    try:
        wrong, right = choose_examples(folder, result)
    except (ValueError, OSError) as error:  # the questions are no longer where they were: the figures stand without
        return f'<p class="note">No examples: {escaped(error)}</p>'
    blocks = (("Most confident wrong answers", wrong), ("Most confident right answers", right))
    cards = ((title, "".join(map(_card, chosen))) for title, chosen in blocks if chosen)
    return "".join(f'<h3>{title}</h3>\n<div class="cards">{shown}</div>\n' for title, shown in cards)


def choose_examples(folder: epath.Path, result: Mapping[str, Any]) -> tuple[list[Example], list[Example]]:
    """The wrong and the right answers of which the model is surest; of free answers the first of each.

    Raises:
        ValueError: the questions have changed since.
        OSError: the answers are no longer there.
    """
    benchmark = read_benchmark(result["file"], rotations=result["mode"] in SHOWS_OPTIONS)
    if benchmark.data_hash != result["data_hash"]:
        raise ValueError(f"{result['file']} has changed since")
    stem = stem_of(result["benchmark"], result["step"], result["mode"], result["replicate"])
    lines = read_bytes(folder / f"{stem}.jsonl").decode().splitlines()[1:]
    examples = [_example(item, json.loads(line), result) for item, line in zip(benchmark.items, lines, strict=True)]
    surest = sorted(examples, key=lambda example: -example.margin)
    if "log_probs" not in surest[0].answer:  # free answers are judged by item, not by row
        surest = [one for one in surest if not one.item.original_index]
    wrong, right = ([one for one in surest if one.is_right == kind] for kind in (False, True))
    return wrong[:NUM_EXAMPLES], right[:NUM_EXAMPLES]


def _example(item: Item, answer: Mapping[str, Any], result: Mapping[str, Any]) -> Example:
    log_probs = sorted(answer.get("log_probs", ()), reverse=True)
    if not log_probs:
        return Example(item, answer, result["items"].get(item.index, 0) >= 0.5, 0.0)
    is_right = result["predictions"][item.index] == item.option_label(item.answer)
    return Example(item, answer, is_right, log_probs[0] - log_probs[1])


def _card(example: Example) -> str:
    item, answer = example.item, example.answer
    log_probs = answer.get("log_probs") or [None] * len(item.options)
    best = max((value for value in log_probs if value is not None), default=None)
    lines = []
    for number, (option, value) in enumerate(zip(item.options, log_probs, strict=True)):
        marks = " (right)" * (number == item.answer) + " (chosen)" * (value is not None and value == best)
        name = escaped(_clipped(option, 80)) + marks
        name = f"<mark>{name}</mark>" if number == item.answer else name
        lines.append(f"<li>{name}{'' if value is None else f': {value:.2f}'}</li>")
    said = f'<p class="text">said: {escaped(_clipped(answer["text"]))}</p>' if "text" in answer else ""
    why = f"<p>not scored: {escaped(answer['unscored'])}</p>" if answer.get("unscored") else ""
    question = f"{item.hint}\n{item.question}" if item.hint else item.question
    body = f'<p class="text">{escaped(_clipped(question))}</p><ul>{"".join(lines)}</ul>{said}{why}'
    footer = f"<footer>{escaped(item.category)}, item {escaped(item.index)}</footer>"
    return f"<article>{''.join(map(_picture, item.images))}{body}{footer}</article>"


def _clipped(text: str, length: int = MAX_TEXT) -> str:
    return text if len(text) <= length else text[:length] + " …"


def _picture(data: bytes) -> str:
    """A thumbnail; small pictures are enlarged by whole factors, pixel by pixel."""
    try:
        with Image.open(io.BytesIO(data)) as opened:
            image = opened.convert("RGB")
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        return f"<p>picture: {escaped(error)}</p>"
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    scale = max(1, THUMBNAIL // max(image.size))
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    encoded = base64.b64encode(buffer.getvalue()).decode()
    size = f'width="{image.width * scale}" height="{image.height * scale}"'
    return f'<img src="data:image/png;base64,{encoded}" {size} alt="picture of the question">'
