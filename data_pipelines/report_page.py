"""The HTML page of a data report: one file that needs nothing else, readable without colours and without scripts.

Whatever comes from data is escaped (`escaped`), and the page forbids the browser to load or run anything.
"""

import base64
import dataclasses
import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from data_pipelines.bias import AnswerPriors, Bias, QuestionPrior, coverage, jaccard
from unihetero_jax.html_page import escaped, page, section, table

MAX_TEXT = 600
"""Characters of a text that are shown."""
MAX_ROWS = 12
"""Lines of a table of questions or answers."""
NUM_BARS = 24
CHART_WIDTH, CHART_HEIGHT, MAX_PITCH = 380, 110, 60
POSITIONS_PER_LINE, POSITION_WIDTH = 128, 7
SMALL_PICTURE = 256
"""Pictures whose sides are at most this are shown at twice their size, pixel by pixel."""
SPAN_KINDS = {
    "context": ("text, read only", "#c9d3e0", 10),
    "supervised": ("text, supervised", "#c2570c", 16),
    "visual": ("visual tokens, read only", "#8fb4e3", 10),
    "visual_supervised": ("visual tokens that may carry the visual loss", "#1d4f91", 16),
    "padding": ("padding", "#ffffff", 4),
}
"""Kind of a row's positions: its name, its colour, its height in pixels (what is supervised is also taller)."""


@dataclasses.dataclass(frozen=True)
class ShownText:
    """A text of a sample."""

    text: str
    supervised: bool
    branch: int


@dataclasses.dataclass(frozen=True)
class ShownPicture:
    """A picture as the model gets it, `uint8[h, w, 3]`; its stored (height, width); or why it cannot be shown."""

    pixels: np.ndarray | None
    size: tuple[int, int]
    patch_size: int
    fault: str = ""


@dataclasses.dataclass(frozen=True)
class ShownSample:
    """A sample of the contact sheet: its place, its kind, what it takes of a row, and its parts in order."""

    where: str
    kind: str
    num_tokens: int
    num_patches: int
    parts: tuple[ShownText | ShownPicture, ...]


@dataclasses.dataclass(frozen=True)
class Pictures:
    """Pictures of a sample of records.

    Attributes:
        shapes: (height, width) -> how many.
        digests: identity of the bytes -> how many.
        num_enlarged: those that have to be enlarged to reach the smallest number of patches.
    """

    shapes: Mapping[tuple[int, int], int]
    digests: Mapping[bytes, int]
    num_enlarged: int

    @property
    def count(self) -> int:
        """Pictures, copies included."""
        return sum(self.digests.values())


@dataclasses.dataclass(frozen=True)
class SourceReport:
    """Everything about one prepared folder.

    Attributes:
        name: as it is called on this page.
        manifest: of the folder.
        token_lengths, patch_lengths: of all training records, `int[n]`, from the index of lengths.
        num_too_long: training records that do not fit a row; None: no row was stated.
        kinds: of the sampled training records.
        num_copies: sampled training records with the content of another.
        bias: over the sampled training records.
        pictures, val_pictures: of the sampled training and validation records.
        samples: for the contact sheet.
    """

    name: str
    manifest: Mapping[str, Any]
    token_lengths: np.ndarray
    patch_lengths: np.ndarray
    num_too_long: int | None
    kinds: Mapping[str, int]
    num_copies: int
    bias: Bias
    pictures: Pictures
    val_pictures: Pictures
    samples: tuple[ShownSample, ...]


@dataclasses.dataclass(frozen=True)
class Span:
    """Neighbouring positions of a row of one kind (a key of `SPAN_KINDS`) and one sample (from 1; 0: none)."""

    kind: str
    start: int
    length: int
    sample: int


@dataclasses.dataclass(frozen=True)
class DrawnRow:
    """A packed row: its spans, the (source, place) of its samples, patches used, and how many it has."""

    spans: tuple[Span, ...]
    samples: tuple[tuple[str, str], ...]
    used_patches: int
    row_patches: int

    def count(self, *kinds: str, sample: int | None = None) -> int:
        """Positions of these kinds, in all the row or in one sample."""
        return sum(s.length for s in self.spans if s.kind in kinds and sample in (None, s.sample))


def render_page(sources: Sequence[SourceReport], facts: Mapping[str, str], row: DrawnRow | None) -> str:
    """The page. `facts` are shown at its top: what it was made with."""
    parts = [
        _header(sources, facts, row is not None),
        section("Sources", "sources", _overview(sources)),
        *(section(source.name, f"source-{i}", _source(source)) for i, source in enumerate(sources)),
        section("Words in common", "words", _words_in_common(sources)),
        section("Pictures in common", "pictures", _pictures_in_common(sources)),
    ]
    if row is not None:
        parts.append(section("A packed row", "row", _row(row)))
    body = "\n".join(parts)
    return page("Data report", body)


# ---------------------------------------------------------------- building blocks


def _share(value: float) -> str:
    return "–" if math.isnan(value) else f"{value:.1%}"


def _bar_chart(title: str, bars: Sequence[tuple[str, int]], note: str) -> str:
    """Bars with their labels; each says its count when pointed at, and `note` is read out instead of the picture."""
    top, pitch = max(count for _, count in bars), min(CHART_WIDTH / len(bars), MAX_PITCH)
    drawn = "".join(
        f'<rect x="{i * pitch + 1:.1f}" y="{CHART_HEIGHT * (1 - count / top):.1f}" width="{pitch - 2:.1f}" '
        f'height="{CHART_HEIGHT * count / top:.1f}"><title>{escaped(label)}: {count:,}</title></rect>'
        for i, (label, count) in enumerate(bars)
    )
    labels = "".join(
        f'<text x="{x:.1f}" y="{CHART_HEIGHT + 15}" text-anchor="{anchor}">{escaped(bars[i][0])}</text>'
        for i, x, anchor in _label_places(len(bars), pitch)
    )
    return (
        f"<figure><figcaption>{escaped(title)}</figcaption>"
        f'<svg viewBox="0 -2 {CHART_WIDTH} {CHART_HEIGHT + 22}" role="img" aria-label="{escaped(f"{title}: {note}")}">'
        f'<line x1="0" x2="{CHART_WIDTH}" y1="{CHART_HEIGHT}" y2="{CHART_HEIGHT}"/>{drawn}{labels}</svg>'
        f'<p class="note">{escaped(note)}; highest bar {top:,}</p></figure>'
    )


def _label_places(num_bars: int, pitch: float) -> list[tuple[int, float, str]]:
    """Which bars are labelled, where, and how the label lies to that place: all of a few, else ends and middle."""
    if num_bars <= CHART_WIDTH / MAX_PITCH:
        return [(i, (i + 0.5) * pitch, "middle") for i in range(num_bars)]
    middle = num_bars // 2
    return [(0, 0.0, "start"), (middle, (middle + 0.5) * pitch, "middle"), (num_bars - 1, float(CHART_WIDTH), "end")]


def _length_chart(title: str, counts: Mapping[int, int]) -> str:
    """Whole numbers in bars of equal width; what lies beyond 99% of them shares the last bar."""
    if not counts:
        return ""
    values, weights = (np.array(column) for column in zip(*sorted(counts.items()), strict=True))
    low, middle, high = (int(values[np.searchsorted(weights.cumsum(), q * weights.sum())]) for q in (0.01, 0.5, 0.99))
    first, last = int(values[0]), int(values[-1])
    width = -(-(high - first + 1) // NUM_BARS)
    starts = list(range(first, high + 1, width))
    places = np.minimum((values - first) // width, len(starts) - 1)
    totals = np.bincount(places, weights, len(starts)).astype(int).tolist()
    labels = [str(start) if width == 1 else f"{start}–{start + width - 1}" for start in starts]
    if last >= starts[-1] + width:
        labels[-1] = f"{starts[-1]} or more"
    note = f"all {last:,}" if first == last else f"median {middle:,}, 98% in {low:,}–{high:,}, largest {last:,}"
    return _bar_chart(title, list(zip(labels, totals, strict=True)), note)


_ASPECTS = (1 / 4, 1 / 3, 1 / 2, 2 / 3, 0.9, 1.1, 3 / 2, 2, 3, 4)
_ASPECT_NAMES = (
    "taller than 4:1", "3:1 to 4:1 tall", "2:1 to 3:1 tall", "3:2 to 2:1 tall", "up to 3:2 tall", "about square",
    "up to 3:2 wide", "3:2 to 2:1 wide", "2:1 to 3:1 wide", "3:1 to 4:1 wide", "wider than 4:1",
)  # fmt: skip


def _aspect_chart(pictures: Pictures) -> str:
    if not pictures.count:
        return ""
    counts = [0] * len(_ASPECT_NAMES)
    for (height, width), count in pictures.shapes.items():
        counts[int(np.searchsorted(_ASPECTS, width / height))] += count
    common = max(pictures.shapes.items(), key=lambda item: (item[1], item[0]))
    (height, width), count = common
    note = f"most common size {width} x {height} (width x height), {_share(count / pictures.count)}"
    return _bar_chart("Aspect of pictures, from tall to wide", list(zip(_ASPECT_NAMES, counts, strict=True)), note)


def _picture(pixels: np.ndarray, alternative: str) -> str:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    data = base64.b64encode(buffer.getvalue()).decode()
    height, width = pixels.shape[:2]
    scale = 2 if max(height, width) <= SMALL_PICTURE else 1
    size = f'width="{width * scale}" height="{height * scale}"'
    return f'<img src="data:image/png;base64,{data}" {size} alt="{escaped(alternative)}">'


# ---------------------------------------------------------------- sections


def _header(sources: Sequence[SourceReport], facts: Mapping[str, str], has_row: bool) -> str:
    links = [("sources", "Sources"), *((f"source-{i}", source.name) for i, source in enumerate(sources))]
    links += [("words", "Words in common"), ("pictures", "Pictures in common")]
    links += [("row", "A packed row")] if has_row else []
    items = "".join(f'<li><a href="#{anchor}">{escaped(title)}</a></li>' for anchor, title in links)
    stated = "".join(f"<dt>{escaped(name)}</dt><dd>{escaped(value)}</dd>" for name, value in facts.items())
    return f"<header><h1>Data report</h1><dl>{stated}</dl><nav><ul>{items}</ul></nav></header>"


def _overview(sources: Sequence[SourceReport]) -> str:
    rows = []
    for source in sources:
        counts = source.manifest["num_records"]
        answers = source.bias.answers
        guessed = f"{_share(answers.best)} ± {_share(answers.standard_error)}" if answers.num_answers else "–"
        too_long = "–" if source.num_too_long is None else f"{source.num_too_long:,}"
        rows.append(
            (source.name, f"{counts['train']:,}", f"{counts['val']:,}",
             f"{sum(source.manifest['dropped'].values()):,}", f"{source.bias.num_records:,}",
             _mean(source.token_lengths), _mean(source.patch_lengths), too_long, guessed, source.manifest["licence"])
        )  # fmt: skip
    header = ("source", "training", "validation", "dropped", "sampled", "mean tokens", "mean patches", "fit no row",
              "blind accuracy", "licence")  # fmt: skip
    return table("Records, lengths, and what is answered right without looking", header, rows) + (
        '<p class="note">Lengths are those of all training records. All else was counted over as many as “sampled” '
        "says, evenly spaced in the shuffled order. Blind accuracy: of the best of three guessers that see only the "
        "question, fitted on one half of the pictures and judged on the other, both ways.</p>"
    )


def _mean(lengths: np.ndarray) -> str:
    return f"{lengths.mean():,.1f}" if len(lengths) else "–"


def _source(source: SourceReport) -> str:
    bias = source.bias
    charts = [
        _length_chart("Token positions of a record", _counted(source.token_lengths)),
        _length_chart("Image patches of a record", _counted(source.patch_lengths))
        if source.patch_lengths.any()
        else "",
        _aspect_chart(source.pictures),
        _length_chart("Words of a caption or a text without a question", bias.caption_words),
        _length_chart("Words of an answer", bias.answer_words),
    ]
    return "\n".join(
        part
        for part in (
            _dropped(source.manifest),
            f'<div class="charts">{"".join(charts)}</div>',
            _duplicates(source),
            _priors(bias.answers),
            _common("Most common captions and texts without a question", bias.captions)
            if source.pictures.count
            else "",
            _contact_sheet(source.samples),
        )
        if part
    )


def _counted(lengths: np.ndarray) -> dict[int, int]:
    values, counts = np.unique(lengths, return_counts=True)
    return dict(zip(values.tolist(), counts.tolist(), strict=True))


def _dropped(manifest: Mapping[str, Any]) -> str:
    dropped = manifest["dropped"]
    if not dropped:
        return "<p>The preparation dropped nothing.</p>"
    examples = manifest["dropped_examples"]
    rows = [
        (reason, f"{count:,}", "; ".join(map(str, examples.get(reason, ()))))
        for reason, count in sorted(dropped.items(), key=lambda item: (-item[1], item[0]))
    ]
    return table("Dropped in the preparation", ("reason", "samples", "examples"), rows)


def _duplicates(source: SourceReport) -> str:
    pictures, num_records = source.pictures, source.bias.num_records
    shared = source.val_pictures.digests.keys() & pictures.digests.keys()
    kinds = ", ".join(f"{kind} {count:,}" for kind, count in sorted(source.kinds.items()))
    lines = [
        f"Of {num_records:,} training records ({kinds}), {source.num_copies:,} have the content of another.",
        f"Their {pictures.count:,} pictures are {len(pictures.digests):,} different files; "
        f"{pictures.num_enlarged:,} are enlarged to reach the smallest number of patches."
        if pictures.count else "They hold no picture.",
    ]  # fmt: skip
    if source.val_pictures.count:
        different = len(source.val_pictures.digests)
        lines.append(f"Of {different:,} different validation pictures {len(shared):,} are also in training.")
    if num_records < source.manifest["num_records"]["train"]:
        lines.append("Copies outside the sample are not counted.")
    return "".join(f"<p>{escaped(line)}</p>" for line in lines)


def _priors(answers: AnswerPriors) -> str:
    if not answers.num_answers:
        return "<p>No supervised text follows a question.</p>"
    guessed = "; ".join(f"{name} {_share(accuracy)}" for name, accuracy in answers.held_out.items())
    rows = [_prior_row(prior) for prior in answers.questions[:MAX_ROWS]]
    caption = f"Questions, most frequent first ({len(answers.questions):,} different ones)"
    header = ("question", "asked", "different answers", "most common answer", "its share", "guessed, held out")
    return (
        f"<p>Without looking, held out: {escaped(guessed)} of {answers.num_answers:,} answers.</p>"
        + table(caption, header, rows)
        + _common("Most common answers", answers)
    )


def _prior_row(prior: QuestionPrior) -> tuple[str, ...]:
    counts = f"{prior.num_answers:,}", f"{prior.num_different:,}"
    shares = _share(prior.share), _share(prior.held_out)
    return (_clipped(prior.question, 160), *counts, _clipped(prior.best_answer, 80), *shares)


def _common(caption: str, priors: AnswerPriors) -> str:
    if not priors.num_answers:
        return ""
    rows = [
        (_clipped(text, 160), f"{count:,}", _share(count / priors.num_answers))
        for text, count in priors.common_answers[:MAX_ROWS]
    ]
    return table(f"{caption} ({len(priors.common_answers):,} different ones)", ("text", "times", "share"), rows)


def _clipped(text: str, length: int) -> str:
    return text if len(text) <= length else f"{text[:length]}… ({len(text) - length:,} more characters)"


def _contact_sheet(samples: Sequence[ShownSample]) -> str:
    cards = "".join(_card(sample) for sample in samples)
    legend = '<p class="note">As the model sees them. <mark>Marked text</mark> is supervised.</p>' if cards else ""
    return f'<h3>Samples</h3>{legend}<div class="cards">{cards}</div>' if cards else ""


def _card(sample: ShownSample) -> str:
    turns: dict[int, str] = {}
    for part in sample.parts:
        branch = part.branch if isinstance(part, ShownText) else 0
        title = f"<b>Turn {branch}:</b> " if branch and branch not in turns else ""
        content = _shown_text(part) if isinstance(part, ShownText) else _shown_picture(part)
        turns[branch] = turns.get(branch, "") + title + content
    content = "".join(f'<div class="text" dir="auto">{turn}</div>' for turn in turns.values())
    facts = f"{sample.kind}; {sample.num_tokens:,} positions, {sample.num_patches:,} patches"
    return f"<article>{content}<footer>{escaped(facts)}<br>{escaped(sample.where)}</footer></article>"


def _shown_text(part: ShownText) -> str:
    text = _clipped(part.text, MAX_TEXT)
    if not part.supervised:
        return escaped(text)
    words = text.lstrip()
    space = text[: len(text) - len(words)]  # before the mark, so that no line ends with a marked space
    return f'{escaped(space)}<mark><span class="spoken">(supervised) </span>{escaped(words)}</mark>'


def _shown_picture(part: ShownPicture) -> str:
    height, width = part.size
    if part.pixels is None:
        return f"<p>[picture of {width} x {height} that cannot be shown: {escaped(part.fault)}]</p>"
    rows, columns = (side // part.patch_size for side in part.pixels.shape[:2])
    size = f"{width} x {height}, seen as {columns} x {rows} patches"
    return f"<figure>{_picture(part.pixels, f'picture of {size}')}<figcaption>{size}</figcaption></figure>"


def _matrix(caption: str, corner: str, names: Sequence[str], values: Sequence[Sequence[float]]) -> str:
    """Shares from 0 to 1, shaded by their size."""
    rows = []
    for name, of_row in zip(names, values, strict=True):
        cells = [
            _share(value) if math.isnan(value) else
            f'<span class="shade" style="--share:{value:.3f}">{_share(value)}</span>'
            for value in of_row
        ]  # fmt: skip
        rows.append((escaped(name), *cells))
    return table(caption, (corner, *names), rows, html_cells=True)


def _words_in_common(sources: Sequence[SourceReport]) -> str:
    names = [source.name for source in sources]
    words = [source.bias.vocabulary for source in sources]
    shared = [[jaccard(one, other) for other in words] for one in words]
    covered = [[coverage(one, other) for other in words] for one in words]
    sizes = "; ".join(f"{name} {len(vocabulary):,}" for name, vocabulary in zip(names, words, strict=True))
    return (
        _matrix("Different words that both sources have, of those that either has", "", names, shared)
        + _matrix(
            "Words of a source (row), every occurrence counted, that the other (column) knows", "", names, covered
        )
        + f'<p class="note">Different words in the sample: {escaped(sizes)}. A larger sample has more words.</p>'
    )


def _pictures_in_common(sources: Sequence[SourceReport]) -> str:
    with_pictures = [source for source in sources if source.pictures.count]
    if not with_pictures:
        return "<p>No source holds a picture.</p>"
    names = [source.name for source in with_pictures]
    values = [[_shared_pictures(one, other) for other in with_pictures] for one in with_pictures]
    note = "By the bytes of the files; scaled up where but a part of the column's source was sampled."
    caption = "Different pictures of a source (row) that the other (column) has too"
    return f'{_matrix(caption, "", names, values)}<p class="note">{note}</p>'


def _shared_pictures(one: SourceReport, other: SourceReport) -> float:
    """Share of one source's pictures that the other has; where but a part of the other was seen, scaled up by that."""
    if one is other:
        return 1.0
    shared = len(one.pictures.digests.keys() & other.pictures.digests.keys()) / len(one.pictures.digests)
    return min(1.0, shared * other.manifest["num_records"]["train"] / other.bias.num_records)


def _row(row: DrawnRow) -> str:
    num_positions = sum(span.length for span in row.spans)
    padding = row.count("padding") / num_positions
    supervised = row.count("supervised", "visual_supervised") / num_positions
    legend = "".join(
        f'<li><svg width="22" height="18" aria-hidden="true">{_bar(0, 18, 22, kind)}</svg> {escaped(name)}</li>'
        for kind, (name, _, _) in SPAN_KINDS.items()
    )
    rows = []
    for number, (source, where) in enumerate(row.samples, start=1):
        of_kinds = (tuple(SPAN_KINDS), ("visual", "visual_supervised"), ("supervised",))
        counts = (f"{row.count(*kinds, sample=number):,}" for kinds in of_kinds)
        rows.append((str(number), source, *counts, where))
    header = ("sample", "source", "positions", "visual tokens", "supervised text", "place")
    words = (
        f"{num_positions:,} positions, {_share(supervised)} supervised, {_share(padding)} padding; "
        f"{row.used_patches:,} of {row.row_patches:,} patches used. Packed by the loader's own code from the first "
        "records of every source in equal numbers, with losses and orders as stored: an experiment has its own weights "
        "and roles."
    )
    return f'<p>{words}</p><ul class="legend">{legend}</ul>{_drawing(row)}{table("Samples of the row", header, rows)}'


def _bar(x: float, bottom: float, width: float, kind: str) -> str:
    _, colour, height = SPAN_KINDS[kind]
    return (
        f'<rect x="{x:.1f}" y="{bottom - height}" width="{width:.1f}" height="{height}" fill="{colour}" '
        'stroke="#5b6472" stroke-width="0.6"/>'
    )


def _drawing(row: DrawnRow) -> str:
    """The row from left to right, line by line; a number stands where a sample begins."""
    line_height, drawn, last = 38, [], 0
    for span in row.spans:
        start, end = span.start, span.start + span.length
        if span.sample not in (0, last):
            x, line = start % POSITIONS_PER_LINE * POSITION_WIDTH, start // POSITIONS_PER_LINE
            drawn.append(f'<text x="{x + 1}" y="{line * line_height + 12}">{span.sample}</text>')
            drawn.append(f'<line x1="{x}" x2="{x}" y1="{line * line_height + 3}" y2="{line * line_height + 34}"/>')
            last = span.sample
        while start < end:  # a span that goes beyond its line is continued on the next
            line, column = divmod(start, POSITIONS_PER_LINE)
            length = min(end - start, POSITIONS_PER_LINE - column)
            drawn.append(_bar(column * POSITION_WIDTH, line * line_height + 32, length * POSITION_WIDTH, span.kind))
            start += length
    num_positions = sum(span.length for span in row.spans)
    height = -(-num_positions // POSITIONS_PER_LINE) * line_height
    width = min(num_positions, POSITIONS_PER_LINE) * POSITION_WIDTH
    return (
        '<div class="scroll" tabindex="0" role="group" aria-label="drawing of the row">'
        f'<svg width="{width}" height="{height}" role="img" aria-label="The row; its samples are in the table below">'
        f"{''.join(drawn)}</svg></div>"
    )
