"""The demo's picture sheet: scenes with what the model said about them, right answers green, wrong ones red."""

import dataclasses
import functools
import os
import textwrap
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

SCALE = 2
"""Everything is drawn at twice its nominal size, so that text stays crisp on dense displays."""
PICTURE, CARD, COLUMNS = 184, 620, 2
"""Nominal pixels: side of a picture, width of a card; cards side by side."""
MARGIN, PADDING, GAP = 28, 20, 20
TEXT_SIZE, LABEL_SIZE, TITLE_SIZE = 15, 11, 22
LETTERS_PER_INCH = 13
"""Of a label above pictures, in its 9 points."""
BACKGROUND, PAPER, BORDER = "#f3f4f6", "#ffffff", "#d9dce1"
INK, MUTED, RIGHT, WRONG = "#1f2430", "#6b7280", "#15803d", "#c2262e"


@dataclasses.dataclass(frozen=True)
class SheetQuestion:
    """One question about a scene: the model's answer and the true one."""

    question: str
    predicted: str
    answer: str

    @property
    def is_right(self) -> bool:
        """Whether the model's answer is the true one."""
        return self.predicted.strip().lower() == self.answer.strip().lower()


@dataclasses.dataclass(frozen=True)
class SheetEntry:
    """One card of the sheet.

    Attributes:
        image: the scene, `uint8[height, width, 3]`, of any size.
        caption: what the model wrote.
        true_caption: a caption that is right.
        questions: asked about this scene.
    """

    image: np.ndarray
    caption: str
    true_caption: str
    questions: Sequence[SheetQuestion]


@dataclasses.dataclass(frozen=True)
class _Line:
    """A run of words on the card: text, font, colour, and the free space above it in nominal pixels."""

    words: str
    font: ImageFont.ImageFont | ImageFont.FreeTypeFont
    colour: str
    above: int


def draw_sheet(entries: Sequence[SheetEntry], path: str | Path, *, title: str = "Four new scenes") -> None:
    """Draws one card per entry, two side by side, and writes a PNG (through a neighbour and a rename).

    Raises:
        ValueError: no entry, or a picture that is not `uint8[height, width, 3]`.
    """
    if not entries:
        raise ValueError("a sheet needs at least one scene")
    for number, entry in enumerate(entries):
        if entry.image.dtype != np.uint8 or entry.image.ndim != 3 or entry.image.shape[2] != 3:
            raise ValueError(
                f"scene {number}: expected uint8[height, width, 3], got {entry.image.dtype}{list(entry.image.shape)}"
            )
    cards = [_draw_card(entry) for entry in entries]
    rows = [cards[i : i + COLUMNS] for i in range(0, len(cards), COLUMNS)]
    heights = [max(card.height for card in row) for row in rows]
    header = MARGIN + TITLE_SIZE + LABEL_SIZE + 26
    columns = min(COLUMNS, len(cards))
    width = (2 * MARGIN + columns * CARD + (columns - 1) * GAP) * SCALE
    height = (header + MARGIN + (len(rows) - 1) * GAP) * SCALE + sum(heights)
    sheet = Image.new("RGB", (width, height), BACKGROUND)
    _draw_header(ImageDraw.Draw(sheet), entries, title)
    top = header * SCALE
    for row, row_height in zip(rows, heights, strict=True):
        for column, card in enumerate(row):
            left = (MARGIN + column * (CARD + GAP)) * SCALE
            box = (left, top, left + CARD * SCALE, top + row_height)
            ImageDraw.Draw(sheet).rounded_rectangle(box, 10 * SCALE, fill=PAPER, outline=BORDER, width=SCALE)
            sheet.paste(card, (left, top), card.getchannel("A"))
        top += row_height + GAP * SCALE
    _save(sheet, Path(path))


def draw_pictures(rows: Sequence[tuple[str, Sequence[np.ndarray]]], path: Path, columns: Sequence[str] = ()) -> None:
    """Pictures in labelled rows, as a PNG; every pixel of theirs becomes a square. `columns` are named in each row."""
    from matplotlib.figure import Figure  # only who draws needs it

    width = max(len(pictures) for _, pictures in rows)
    inches = 1.3 * width + 0.2
    labels = [textwrap.fill(label, max(int(LETTERS_PER_INCH * inches), 1)) for label, _ in rows]
    heights = [1.6 + 0.15 * label.count("\n") for label in labels]
    figure = Figure(figsize=(inches, sum(heights)), layout="constrained")
    parts = figure.subfigures(len(rows), squeeze=False, height_ratios=heights)[:, 0]
    for label, (_, pictures), row in zip(labels, rows, parts, strict=True):
        row.suptitle(label, fontsize=9, x=0.01, ha="left")
        for axes in row.subplots(1, width, squeeze=False)[0]:
            axes.set_axis_off()
        for axes, name in zip(row.axes, columns, strict=False):
            axes.set_title(name, fontsize=7, color=MUTED, pad=2)
        for axes, picture in zip(row.axes, pictures, strict=False):
            axes.imshow(picture, interpolation="nearest")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def _draw_header(draw: ImageDraw.ImageDraw, entries: Sequence[SheetEntry], title: str) -> None:
    asked = [question for entry in entries for question in entry.questions]
    right = sum(question.is_right for question in asked)
    x, y = MARGIN * SCALE, (MARGIN - 6) * SCALE
    draw.text((x, y), title, INK, _font(TITLE_SIZE, bold=True))
    y += (TITLE_SIZE + 9) * SCALE
    for words, colour in (
        (f"{right} of {len(asked)} questions answered right", MUTED),
        ("    green: right", RIGHT),
        ("    red: wrong", WRONG),
    ):
        draw.text((x, y), words, colour, _font(LABEL_SIZE + 2))
        x += round(_font(LABEL_SIZE + 2).getlength(words))


def _draw_card(entry: SheetEntry) -> Image.Image:
    lines = _card_lines(entry)
    left = (PADDING + PICTURE + PADDING) * SCALE
    column = CARD * SCALE - left - PADDING * SCALE
    wrapped = [(line, _wrap(line.words, line.font, column)) for line in lines]
    text_height = sum(line.above * SCALE + len(parts) * _line_height(line.font) for line, parts in wrapped)
    height = max(text_height, PICTURE * SCALE) + 2 * PADDING * SCALE
    card = Image.new("RGBA", (CARD * SCALE, height), (0, 0, 0, 0))
    draw = ImageDraw.Draw(card)
    picture = _upscaled(entry.image)
    corner = ((PADDING * SCALE + (PICTURE * SCALE - picture.width) // 2), PADDING * SCALE)
    card.paste(picture, corner)
    draw.rectangle(
        (corner[0] - 1, corner[1] - 1, corner[0] + picture.width, corner[1] + picture.height),
        outline=BORDER,
        width=SCALE,
    )
    y = PADDING * SCALE
    for line, parts in wrapped:
        y += line.above * SCALE
        for part in parts:
            draw.text((left, y), part, line.colour, line.font)
            y += _line_height(line.font)
    return card


def _card_lines(entry: SheetEntry) -> list[_Line]:
    text, label, bold = _font(TEXT_SIZE), _font(LABEL_SIZE, bold=True), _font(TEXT_SIZE, bold=True)
    lines = [
        _Line("MODEL'S CAPTION", label, MUTED, 0),
        _Line(entry.caption or "(empty)", text, INK, 3),
        _Line("TRUE CAPTION", label, MUTED, 12),
        _Line(entry.true_caption, text, INK, 3),
    ]
    if entry.questions:
        lines.append(_Line("QUESTIONS", label, MUTED, 14))
    for question in entry.questions:
        answer = (
            question.predicted if question.is_right else f"{question.predicted or '(none)'}   (true: {question.answer})"
        )
        lines.append(_Line(question.question, text, INK, 7))
        lines.append(_Line(answer.strip(), bold, RIGHT if question.is_right else WRONG, 1))
    return lines


def _wrap(words: str, font: ImageFont.ImageFont | ImageFont.FreeTypeFont, width: int) -> list[str]:
    """Breaks text into lines at most `width` pixels wide; a single word that is wider is broken between characters."""
    lines = [""]
    for word in words.split():
        candidate = f"{lines[-1]} {word}".strip()
        if font.getlength(candidate) <= width:
            lines[-1] = candidate
            continue
        if lines[-1]:
            lines.append("")
        for character in word:
            if lines[-1] and font.getlength(lines[-1] + character) > width:
                lines.append("")
            lines[-1] += character
    return lines


def _upscaled(pixels: np.ndarray) -> Image.Image:
    """Scales a picture, keeping its aspect ratio, to the longer side of the card's square."""
    image, side = Image.fromarray(pixels), PICTURE * SCALE
    ratio = side / max(image.size)
    size = (max(1, round(image.width * ratio)), max(1, round(image.height * ratio)))
    return image.resize(size, Image.Resampling.LANCZOS)


@functools.cache
def _font(size: int, *, bold: bool = False) -> ImageFont.ImageFont | ImageFont.FreeTypeFont:
    """DejaVu Sans, which matplotlib brings along or the system has; otherwise Pillow's own face, which has no bold."""
    file_name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    for candidate in (_matplotlib_font(file_name), file_name):
        try:
            return ImageFont.truetype(candidate, size * SCALE)
        except OSError:
            continue
    return ImageFont.load_default(size * SCALE)


def _matplotlib_font(file_name: str) -> str:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            import matplotlib
        except ImportError:
            return file_name
    return os.path.join(matplotlib.get_data_path(), "fonts", "ttf", file_name)


def _line_height(font: ImageFont.ImageFont | ImageFont.FreeTypeFont) -> int:
    box = font.getbbox("Ágjy")
    return round((box[3] - box[1]) * 1.25)


def _save(sheet: Image.Image, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        sheet.save(partial, "PNG", optimize=True)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
