"""Benchmark files: what is read, what is counted, and what is refused with which words."""

import base64
import csv
import io
import json
import os
import zipfile
from pathlib import Path

import pytest
from PIL import Image

from unihetero_jax.evaluation.benchmarks import read_benchmark

DATA = Path(os.environ.get("UNIHETERO_DATA", Path(__file__).parents[2] / "shared" / "data"))
needs_data = pytest.mark.skipif(
    not (DATA / "evalmini").is_dir(), reason=f"no evalmini data at {DATA} (set UNIHETERO_DATA)"
)
COLUMNS = ("index", "question", "hint", "A", "B", "C", "D", "answer", "category", "image")


def png(colour: str, size: int = 40) -> bytes:
    """A picture whose base64 text is longer than 64 characters."""
    buffer = io.BytesIO()
    Image.new("RGB", (size, size), colour).save(buffer, "PNG")
    return buffer.getvalue()


RED, BLUE = png("red"), png("blue")


def write_tsv(path: Path, rows: list[dict[str, str]], columns: tuple[str, ...] = COLUMNS) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, dialect="excel-tab", restval="")
        writer.writeheader()
        writer.writerows(rows)
    return path


def mmbench_row(**changes: str) -> dict[str, str]:
    row = {
        "index": "0",
        "question": "What?",
        "A": "cat",
        "B": "dog",
        "answer": "A",
        "category": "animal",
        "image": base64.b64encode(RED).decode(),
    }
    return row | changes


def test_mmbench_rows_are_read_as_strings(tmp_path):
    rows = [
        mmbench_row(question='two\nlines and "quotes"', A="3", B="None", C="NA", D="07", answer="D", hint="look"),
        mmbench_row(index="7", A="none", B="null", answer="B", image="0", category=""),
    ]
    benchmark = read_benchmark(write_tsv(tmp_path / "easy.tsv", rows))
    first, second = benchmark.items
    assert benchmark.name == "easy" and benchmark.num_unscored == 0
    assert first.question == 'two\nlines and "quotes"' and first.hint == "look" and first.category == "animal"
    assert first.options == ("3", "None", "NA", "07") and first.answer == 3 and first.answer_text == "07"
    assert first.images == (RED,)
    assert second.options == ("none", "null") and second.answer == 1 and second.category == "all"
    assert second.pictures[0].digest == first.pictures[0].digest, "a reference to another row shares its picture"


def test_a_cell_larger_than_the_csv_module_allows_by_default(tmp_path):
    limit = csv.field_size_limit()
    big = os.urandom(200_000)
    path = write_tsv(tmp_path / "big.tsv", [mmbench_row(image=base64.b64encode(big).decode())])
    assert read_benchmark(path).items[0].images == (big,)
    assert csv.field_size_limit() == limit


def test_rows_outside_what_is_scored_are_counted_by_reason(tmp_path):
    rows = [
        mmbench_row(),
        mmbench_row(index="1000000", A="dog", B="cat", answer="B"),
        mmbench_row(index="2", A="", B=""),
    ]
    benchmark = read_benchmark(write_tsv(tmp_path / "mixed.tsv", rows))
    assert [item.index for item in benchmark.items] == ["0"]
    assert benchmark.unscored_rows == {"circular_row": 1, "no_options": 1}
    assert benchmark.num_unscored == 2


def test_statements_of_nlvr_and_nlvr2(tmp_path):
    """Fields and names of pictures as the two sets have them."""
    (tmp_path / "images" / "4").mkdir(parents=True)
    for name, data in (("dev-850-0-img0.png", RED), ("dev-850-0-img1.png", BLUE), ("4/dev-1304-0-0.png", BLUE)):
        (tmp_path / "images" / name).write_bytes(data)
    rows = [{"identifier": "dev-850-0-2", "sentence": "Both are red.", "label": "False"},
            {"identifier": "1304-0", "directory": "4", "sentence": "It is blue.", "label": "true"}]  # fmt: skip
    (tmp_path / "nlvr.jsonl").write_text("\n".join(map(json.dumps, rows)))
    two, one = read_benchmark(tmp_path / "nlvr.jsonl").items
    assert two.images == (RED, BLUE) and (two.options, two.answer) == (("yes", "no"), 1)
    assert two.question == "Is the following statement about the images true? Both are red."
    assert one.images == (BLUE,) and one.answer == 0 and one.index == "1304-0"


def test_questions_about_several_pictures(tmp_path):
    """As in NLVR2: both are read, in order, and told apart from one of them alone."""
    cells = [base64.b64encode(data).decode() for data in (RED, BLUE)]
    both, one = mmbench_row(image=str(cells)), mmbench_row(index="1", image=cells[0])
    first, second = read_benchmark(write_tsv(tmp_path / "two.tsv", [both, one])).items
    assert first.images == (RED, BLUE) and second.images == (RED,)
    assert first.cluster != second.cluster


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"answer": "C"}, "row 2, column answer: expected one of A, B, got 'C'"),
        ({"answer": ""}, "row 2, column answer.*TEST file has no answers"),
        ({"answer": "AB"}, "row 2, column answer"),
        ({"index": "x1"}, "row 2, column index"),
        ({"question": " "}, "row 2, column question: empty"),
        ({"B": ""}, "row 2, column B: empty; a question needs at least two"),
        ({"B": "", "C": "bird"}, "row 2, column B: empty, but a later option is not"),
        ({"image": "99"}, "row 2, column image: '99' should be the index"),
        ({"image": "0"}, "row 2, column image: '0' should be the index"),
        ({"image": "?" * 80}, "row 2, column image: not base64"),
    ],
)
def test_mmbench_faults_name_file_row_and_column(tmp_path, changes, words):
    path = write_tsv(tmp_path / "bad.tsv", [mmbench_row(**changes)])
    with pytest.raises(ValueError, match=rf"bad.tsv: {words}"):
        read_benchmark(path)


def test_table_faults(tmp_path):
    with pytest.raises(ValueError, match=r"missing column answer"):
        read_benchmark(write_tsv(tmp_path / "a.tsv", [{"index": "0"}], ("index", "question", "A", "B")))
    (tmp_path / "b.tsv").write_text("index\tquestion\tA\tB\tanswer\n0\twhat\tcat\n")
    with pytest.raises(ValueError, match=r"row 2 .line 2. has 3 cells, the header 5"):
        read_benchmark(tmp_path / "b.tsv")
    with pytest.raises(ValueError, match=r"must be unique, repeated: 0"):
        read_benchmark(write_tsv(tmp_path / "c.tsv", [mmbench_row(), mmbench_row()]))
    (tmp_path / "d.tsv").write_bytes(b"index\t\xff\xfe")
    with pytest.raises(ValueError, match=r"not UTF-8"):
        read_benchmark(tmp_path / "d.tsv")
    with pytest.raises(ValueError, match=r"no question to score .*circular_row"):
        read_benchmark(write_tsv(tmp_path / "e.tsv", [mmbench_row(index="1000000")]))


def test_unknown_files_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"no such benchmark file"):
        read_benchmark(tmp_path / "none.tsv")
    (tmp_path / "x.csv").write_text("a,b\n")
    with pytest.raises(ValueError, match=r"unknown benchmark format '.csv'"):
        read_benchmark(tmp_path / "x.csv")
    (tmp_path / "x.json").write_text("[1, 2]")
    with pytest.raises(ValueError, match=r"entry 1: expected an object, got 1"):
        read_benchmark(tmp_path / "x.json")
    (tmp_path / "x.json").write_text('"text"')
    with pytest.raises(ValueError, match=r"SEED-Bench.*POPE"):
        read_benchmark(tmp_path / "x.json")
    (tmp_path / "y.json").write_text('{"questions": [\n {]}')
    with pytest.raises(ValueError, match=r"y.json: line 2, column 3: not JSON"):
        read_benchmark(tmp_path / "y.json")


def seed_question(**changes) -> dict:
    question = {
        "answer": "B",
        "choice_a": "1",
        "choice_b": 2,
        "choice_c": "3",
        "choice_d": "4",
        "data_id": "0001_red",
        "data_type": "image",
        "question": "How many?",
        "question_id": "101669",
        "question_type_id": 5,
    }
    return question | changes


def write_seed(path: Path, questions: list[dict]) -> Path:
    path.write_text(
        json.dumps({"questions": questions, "question_type": {"Instances Counting": 5, "Action Recognition": 10}})
    )
    return path


def test_seed_bench_with_pictures_in_a_zip(tmp_path):
    with zipfile.ZipFile(tmp_path / "images_v1.zip", "w") as archive:
        archive.writestr("part/0001_red.png", RED)
        archive.writestr("part/blue.png", BLUE)
    questions = [
        seed_question(),
        seed_question(question_id="2", data_id="part/blue.png", answer="D"),
        seed_question(question_id="3", data_type="video", question_type_id=10),
        seed_question(question_id="4", data_id=["part/blue.png", "part/0001_red"]),
    ]
    benchmark = read_benchmark(write_seed(tmp_path / "seed.json", questions))
    first, second, third = benchmark.items
    assert (first.index, first.options, first.answer) == ("101669", ("1", "2", "3", "4"), 1)
    assert first.category == "Instances Counting" and first.images == (RED,)
    assert second.images == (BLUE,) and second.answer == 3
    assert third.images == (BLUE, RED)
    assert benchmark.unscored_rows == {"video": 1}


def test_seed_bench_with_pictures_in_a_folder(tmp_path):
    (tmp_path / "images_cc3m").mkdir()
    (tmp_path / "images_cc3m" / "0001_red.png").write_bytes(RED)
    assert read_benchmark(write_seed(tmp_path / "seed.json", [seed_question()])).items[0].images == (RED,)


def test_picture_names_that_cannot_be_resolved(tmp_path):
    path = write_seed(tmp_path / "seed.json", [seed_question()])
    with pytest.raises(ValueError, match=r"question 1, field data_id: picture '0001_red' not found; looked in"):
        read_benchmark(path)
    with zipfile.ZipFile(tmp_path / "images.zip", "w") as archive:
        archive.writestr("a/0001_red.png", RED)
        archive.writestr("b/0001_red.png", BLUE)
    with pytest.raises(ValueError, match=r"ambiguous.*a/0001_red.png, b/0001_red.png"):
        read_benchmark(path)
    (tmp_path / "images.zip").write_bytes(b"no zip")
    with pytest.raises(ValueError, match=r"images.zip: not a readable zip"):
        read_benchmark(path)


def test_a_picture_name_cannot_leave_the_folder(tmp_path):
    (tmp_path / "secret.png").write_bytes(RED)
    (tmp_path / "bench").mkdir()
    with pytest.raises(ValueError, match=r"not found"):
        read_benchmark(write_seed(tmp_path / "bench" / "seed.json", [seed_question(data_id="../secret.png")]))


@pytest.mark.parametrize(
    ("changes", "words"),
    [({"answer": "E"}, "question 1, field answer"), ({"choice_c": ""}, "question 1, column choice_c: empty")],
)
def test_seed_bench_faults(tmp_path, changes, words):
    (tmp_path / "0001_red.png").write_bytes(RED)
    with pytest.raises(ValueError, match=words):
        read_benchmark(write_seed(tmp_path / "seed.json", [seed_question(**changes)]))


@pytest.mark.parametrize("name", ["pope.jsonl", "pope.json"])
def test_pope(tmp_path, name):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "red.png").write_bytes(RED)
    lines = [
        {"question_id": 1, "image": "red.png", "text": "Is there a dog?", "label": "yes"},
        {"question_id": 2, "image": "red.png", "text": "Is there a cat?", "label": "no"},
    ]
    path = tmp_path / name
    path.write_text("\n".join(map(json.dumps, lines)) + "\n")
    items = read_benchmark(path).items
    assert [(i.index, i.question, i.options, i.answer) for i in items] == [
        ("1", "Is there a dog?", ("yes", "no"), 0),
        ("2", "Is there a cat?", ("yes", "no"), 1),
    ]
    assert items[0].images == (RED,) and items[1].pictures[0] is items[0].pictures[0]
    path.write_text(json.dumps(lines[0]) + "\n" + json.dumps(lines[1] | {"label": "maybe"}))
    with pytest.raises(ValueError, match=r"line 2, field label: expected yes or no, got 'maybe'"):
        read_benchmark(path)
    path.write_text(json.dumps(lines[0]) + "\n{broken\n")
    with pytest.raises(ValueError, match=r"line 2, column 2: not JSON"):
        read_benchmark(path)


def test_data_hash_covers_questions_and_pictures(tmp_path):
    picture = tmp_path / "0001_red.png"
    picture.write_bytes(RED)
    path = write_seed(tmp_path / "seed.json", [seed_question()])
    first = read_benchmark(path).data_hash
    assert read_benchmark(path).data_hash == first
    picture.write_bytes(BLUE)
    second = read_benchmark(path).data_hash
    write_seed(path, [seed_question(answer="C")])
    assert len({first, second, read_benchmark(path).data_hash}) == 3


@needs_data
def test_shared_files_have_the_counts_their_readme_states():
    folder = DATA / "evalmini"
    vanilla, circular = (read_benchmark(folder / f"MMBench_DEVMINI{kind}.tsv") for kind in ("", "_circular"))
    assert len(vanilla.items) == 1094 and vanilla.num_unscored == 0
    assert len({item.images for item in vanilla.items}) == 630
    assert circular.items == vanilla.items and circular.unscored_rows == {"circular_row": 4076 - 1094}
    seed = read_benchmark(folder / "SEED-Bench_DEVMINI.json")
    assert len(seed.items) == 944 and all(len(item.options) == 4 for item in seed.items)
    by_index = {item.index: item for item in vanilla.items}
    for item in seed.items:  # question_id is the MMBench index: two formats, one truth
        twin = by_index[item.index]
        assert (item.question, item.options, item.answer, item.images) == (
            twin.question,
            twin.options,
            twin.answer,
            twin.images,
        )
    assert len(read_benchmark(folder / "cifar10_pope_random_DEVMINI.jsonl").items) == 800
    assert len(read_benchmark(folder / "nlvr_statements_DEVMINI.jsonl").items) == 150
