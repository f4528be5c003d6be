"""The picture sheet: what is on it, by colour and by size."""

import numpy as np
import pytest
from PIL import Image, ImageColor

from unihetero_jax.evaluation.sheet import (
    RIGHT,
    WRONG,
    SheetEntry,
    SheetQuestion,
    _font,
    _wrap,
    draw_pictures,
    draw_sheet,
)


def scene(value: tuple[int, int, int], height: int = 48, width: int = 48) -> np.ndarray:
    return np.broadcast_to(np.array(value, np.uint8), (height, width, 3)).copy()


def count(sheet: np.ndarray, colour: tuple[int, int, int]) -> int:
    return int((sheet == np.array(colour)).all(-1).sum())


def draw(tmp_path, entries) -> np.ndarray:
    draw_sheet(entries, tmp_path / "out" / "sheet.png")
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["sheet.png"], "no partial file stays behind"
    return np.asarray(Image.open(tmp_path / "out" / "sheet.png").convert("RGB"))


def entry(predicted: str, colour=(10, 200, 30), num_questions: int = 3, caption: str = "a red circle") -> SheetEntry:
    questions = [SheetQuestion(f"What color is shape {i}?", predicted, "red") for i in range(num_questions)]
    return SheetEntry(scene(colour), caption, "a red circle above a square", questions)


def test_long_labels_of_pictures_are_broken_and_make_room(tmp_path):
    """Two pictures are 2.8 inches wide: a label of 60 letters takes two lines, and the sheet grows by one."""
    heights = []
    for label in ("short", "a label of some sixty letters, " * 2):
        draw_pictures([(label, [scene((1, 2, 3))] * 2)], tmp_path / "out.png")
        with Image.open(tmp_path / "out.png") as sheet:
            heights.append(sheet.height)
            assert sheet.width == 420
    assert heights[1] - heights[0] == pytest.approx(0.15 * 150, abs=1)


def test_right_answers_are_green_and_wrong_ones_red(tmp_path):
    right, wrong = ImageColor.getrgb(RIGHT), ImageColor.getrgb(WRONG)
    all_right, all_wrong = draw(tmp_path, [entry(" Red")]), draw(tmp_path, [entry("blue")])
    legend = draw(tmp_path, [entry("red", num_questions=0)])
    assert count(all_right, right) > count(legend, right) and count(all_right, wrong) == count(legend, wrong)
    assert count(all_wrong, wrong) > count(legend, wrong) and count(all_wrong, right) == count(legend, right)


def test_every_scene_is_shown_as_large_as_the_others(tmp_path):
    colours = [(10, 200, 30), (200, 10, 30), (30, 10, 200), (120, 60, 200)]
    sheet = draw(tmp_path, [entry("red", colour) for colour in colours])
    areas = [count(sheet, colour) for colour in colours]
    assert min(areas) > 300 * 300 and max(areas) == min(areas)


def test_long_text_makes_the_sheet_taller_not_wider(tmp_path):
    short, long = draw(tmp_path, [entry("red")]), draw(tmp_path, [entry("red", caption="many words " * 60)])
    assert long.shape[1] == short.shape[1] and long.shape[0] > short.shape[0]


def test_wrapped_lines_fit_and_lose_nothing():
    font = _font(15)
    text = "a rather long sentence with an " + "x" * 200 + " unbreakable word"
    lines = _wrap(text, font, 300)
    assert all(font.getlength(line) <= 300 for line in lines)
    assert "".join(lines).replace(" ", "") == text.replace(" ", "")
    assert _wrap("", font, 300) == [""]


def test_empty_generation_and_odd_shapes_are_drawn(tmp_path):
    odd = SheetEntry(scene((1, 2, 3), 10, 90), "", "true", [SheetQuestion("q?", "", "red")])
    assert draw(tmp_path, [odd, entry("red"), odd]).shape[2] == 3


def test_bad_input_is_refused(tmp_path):
    with pytest.raises(ValueError, match="at least one scene"):
        draw_sheet([], tmp_path / "x.png")
    with pytest.raises(ValueError, match="scene 0: expected uint8"):
        draw_sheet([SheetEntry(np.zeros((4, 4), np.uint8), "", "", [])], tmp_path / "x.png")
