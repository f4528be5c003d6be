"""Evaluation sets as inputs of a preparation: every picture and text is given, or counted with a reason."""

import base64
import csv
import io
import json
import os
import zipfile
from collections import Counter
from pathlib import Path

import pytest
from PIL import Image

from data_pipelines.entries import Dropped
from data_pipelines.evaluation_sets import EvaluationItem, read_evaluation_set

DATA = Path(os.environ.get("UNIHETERO_REAL_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))
needs_data = pytest.mark.skipif(not (DATA / "evalmini").is_dir(), reason=f"the real data are not in {DATA}")


def png(color, size=(40, 40)):
    buffer = io.BytesIO()
    Image.new("RGB", size, color).save(buffer, "PNG")
    return buffer.getvalue()


RED, BLUE = png("red"), png("blue")
RED_CELL, BLUE_CELL = (base64.b64encode(data).decode() for data in (RED, BLUE))


def write_tsv(path, *rows):
    columns = ("index", "question", "hint", "A", "B", "C", "answer", "category", "image", "image_path")
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, dialect="excel-tab", restval="")
        writer.writeheader()
        writer.writerows(rows)
    return path


def row(index, **changes):
    fields = {"question": "What?", "A": "cat", "B": "None", "answer": "B", "category": "animal", "image": RED_CELL}
    return {"index": str(index)} | fields | changes


def reasons(made):
    return [sample.reason if isinstance(sample, Dropped) else sample.id for sample in made]


def test_an_item_has_all_that_its_row_says(tmp_path):
    path = write_tsv(tmp_path / "set.tsv", row(5, hint=" look ", C="dog"), row(7, image="5", category="", answer="A"))
    assert list(read_evaluation_set(path)) == [
        EvaluationItem("5", "What?", ("cat", "None", "dog"), "None", "animal", RED, "set.tsv, row 2", "look"),
        EvaluationItem("7", "What?", ("cat", "None"), "cat", "all", RED, "set.tsv, row 3"),
    ]


def test_rows_that_cannot_be_scored_give_their_pictures_too(tmp_path):
    unanswered = row(1, answer="")
    without_options = row(2, A="", B="", answer="", image=BLUE_CELL)
    several = row(3, image=json.dumps([RED_CELL, BLUE_CELL]))
    path = write_tsv(tmp_path / "set.tsv", unanswered, without_options, several)
    items = list(read_evaluation_set(path))
    assert [(item.id, item.options, item.answer, item.image) for item in items] == [
        ("1", ("cat", "None"), "", RED),
        ("2", (), "", BLUE),
        ("3", ("cat", "None"), "None", RED),
        ("3", ("cat", "None"), "None", BLUE),
    ]


def test_a_rotation_is_dropped_unless_it_is_all_there_is(tmp_path):
    rows = [row(4), row(1_000_004, answer="A"), row(2_000_004, image="4"), row(1_000_009)]
    made = list(read_evaluation_set(write_tsv(tmp_path / "set.tsv", *rows)))
    assert reasons(made) == ["4", "circular_row", "circular_row", "1000009"]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"index": "x1"}, "bad_index"),
        ({"question": " "}, "empty_text"),
        ({"A": ""}, "bad_options"),
        ({"answer": "C"}, "bad_answer"),
        ({"image": "99"}, "missing_image"),
        ({"image": "[1, 2]"}, "missing_image"),
        ({"image": "['a', "}, "missing_image"),
        ({"image": "?" * 80}, "not_base64"),
        ({"image": "é" * 80}, "not_base64"),
        ({"image": base64.b64encode(b"no image" * 10).decode()}, "not_an_image"),
        ({"image": "", "image_path": "gone.png"}, "missing_image"),
        ({"image": "", "image_path": "x" * 5000}, "unreadable_image"),
        ({"image": "", "image_path": "../secret.png"}, "missing_image"),
    ],
)
def test_a_damaged_row_is_dropped_in_its_place(tmp_path, changes, reason):
    (tmp_path / "secret.png").write_bytes(RED)
    (tmp_path / "set").mkdir()
    path = write_tsv(tmp_path / "set" / "set.tsv", row(0), row(1) | changes, row(2))
    made = list(read_evaluation_set(path))
    assert reasons(made) == ["0", reason, "2"]
    assert made[1].where.startswith("set.tsv, row 3")


def seed(**changes):
    choices = {f"choice_{letter}": f"{letter}!" for letter in "abcd"}
    fields = {"answer": "C", "data_id": "red", "data_type": "image", "question": "How many?", "question_id": "5_0"}
    return choices | fields | {"question_type_id": 5} | changes


def test_seed_bench_and_its_pictures_in_a_zip_elsewhere(tmp_path):
    (tmp_path / "far").mkdir()
    with zipfile.ZipFile(tmp_path / "far" / "pictures.zip", "w") as archive:
        archive.writestr("cc3m/red.png", RED)
        archive.writestr("cc3m/blue.png", BLUE)
    questions = [
        seed(),
        seed(data_id=["red", "blue.png"], question_type_id=22),
        seed(data_type="video", question_type_id=10),
        seed(data_id="green"),
        seed(answer="E"),
        {"question": "?"},
        "no object",
    ]
    path = tmp_path / "seed.json"
    path.write_text(json.dumps({"questions": questions, "question_type": {"Instances Counting": 5}}))
    made = list(read_evaluation_set(path, tmp_path / "far" / "pictures.zip"))
    options = ("a!", "b!", "c!", "d!")
    first = EvaluationItem("5_0", "How many?", options, "c!", "Instances Counting", RED, "seed.json, question 1")
    assert made[0] == first
    assert [(item.category, item.image) for item in made[1:3]] == [("type 22", RED), ("type 22", BLUE)]
    assert reasons(made[3:]) == ["video", "missing_image", "bad_answer", "missing_field", "not_an_object"]
    assert reasons(read_evaluation_set(path, tmp_path / "far")) == reasons(made)


def test_pope_and_its_pictures_in_a_folder(tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "red.png").write_bytes(RED)
    question = {"question_id": 1, "image": "red.png", "text": "Is there a dog?", "label": "no"}
    lines = [json.dumps(question), "{broken", "5", "[" * 100_000, json.dumps(question | {"label": "maybe"})]
    path = tmp_path / "pope.jsonl"
    path.write_text("\n".join(lines) + "\n")
    made = list(read_evaluation_set(path))
    assert made[0] == EvaluationItem("1", "Is there a dog?", ("yes", "no"), "no", "yes_no", RED, "pope.jsonl, line 1")
    assert reasons(made[1:]) == ["not_json", "not_an_object", "not_json", "bad_answer"]


def test_texts_alone_need_no_pictures(tmp_path):
    path = write_tsv(tmp_path / "set.tsv", row(1, image="", image_path="['a.png', 'b.png']"), row(2, image=""))
    assert [(item.id, item.image) for item in read_evaluation_set(path, with_images=False)] == [
        ("1", None),
        ("2", None),
    ]
    assert reasons(read_evaluation_set(path)) == ["missing_image", "missing_image", "2"]


def test_files_that_cannot_be_read_are_named(tmp_path):
    for name, content, message in (
        ("gone.tsv", None, "no such benchmark file"),
        ("a.csv", b"a,b\n", "unknown benchmark format"),
        ("a.tsv", b"index\tquestion\n", "missing column"),
        ("b.tsv", b"\xff\xfe", "not UTF-8"),
        ("a.json", b"[" * 100_000, "nested too deeply"),
    ):
        if content is not None:
            (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=rf"{name}: {message}"):
            list(read_evaluation_set(tmp_path / name))
    path = write_tsv(tmp_path / "set.tsv", row(1, image="", image_path="a.png"))
    with pytest.raises(ValueError, match=r"nowhere does not exist; give the folder or zip file with the pictures"):
        list(read_evaluation_set(path, tmp_path / "nowhere"))
    with pytest.raises(ValueError, match=r"a\.csv: not a readable zip"):
        list(read_evaluation_set(path, tmp_path / "a.csv"))


def count(path, **arguments):
    made = list(read_evaluation_set(path, **arguments))
    items = [sample for sample in made if isinstance(sample, EvaluationItem)]
    return items, dict(Counter(sample.reason for sample in made if isinstance(sample, Dropped)))


@needs_data
def test_the_shared_sets_have_the_counts_their_readme_states():
    folder = DATA / "evalmini"
    plain, dropped = count(folder / "MMBench_DEVMINI.tsv")
    assert (len(plain), dropped) == (1094, {})
    with zipfile.ZipFile(folder / "images_DEVMINI.zip") as archive:
        pictures = {archive.read(name) for name in archive.namelist()}
    assert len(pictures) == 630 and {item.image for item in plain} == pictures
    circular, dropped = count(folder / "MMBench_DEVMINI_circular.tsv")
    assert ([item.id for item in circular], dropped) == ([item.id for item in plain], {"circular_row": 4076 - 1094})
    for name, number in (
        ("SEED-Bench_DEVMINI.json", 944),
        ("cifar10_pope_random_DEVMINI.jsonl", 800),
        ("nlvr_statements_DEVMINI.jsonl", 150),
    ):
        items, dropped = count(folder / name)
        assert (len(items), dropped) == (number, {})
        assert {item.image for item in items} <= pictures


@needs_data
def test_official_samples_have_the_counts_their_readme_states():
    folder = DATA / "eval_samples"
    for name, number in (("MMBench_EN_samples", 20), ("MMBench_CN_samples", 20), ("CCBench_samples", 14)):
        items, dropped = count(folder / f"{name}.tsv")
        assert (len(items), dropped) == (number, {}) and all(item.image for item in items)
    path = folder / "coco_pope_random.json"  # its pictures are not there
    items, dropped = count(path, with_images=False)
    assert len(items) == 3000 and Counter(item.answer for item in items) == {"yes": 1500, "no": 1500}
    assert count(path) == ([], {"missing_image": 3000})
