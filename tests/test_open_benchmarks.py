"""Benchmarks without options and of labelled pictures, from the file to the figures."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from test_benchmarks import BLUE, RED, write_tsv
from test_multiple_choice import hashed_log_probs, make_config, tokenizer  # noqa: F401

from unihetero_jax.data.records import RecordError
from unihetero_jax.evaluation.benchmarks import read_benchmark
from unihetero_jax.evaluation.runner import Model, evaluate, select_benchmarks


def class_label(names):
    return {"_type": "ClassLabel", "names": names}


@pytest.fixture
def pictures(tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "red.png").write_bytes(RED)
    (tmp_path / "images" / "blue.png").write_bytes(BLUE)
    return tmp_path


def write_vqa(folder):
    people = [{"answer": "red"}] * 5 + [{"answer": "crimson"}] * 5
    questions = [{"question_id": i, "question": f"What color is it, {i}?", "image_id": "red"} for i in (1, 2)]
    annotations = [{"question_id": i, "answers": people, "answer_type": "other"} for i in (1, 2)]
    path = folder / "vqa.json"
    path.write_text(json.dumps({"questions": questions, "annotations": annotations}))
    return path


def run(path, generate, tokenizer, output_dir=None, mode="words"):  # noqa: F811
    model = Model(hashed_log_probs, generate=generate)
    config = make_config(row_tokens=256)
    facts = {"step": 1, "config_hash": "x", "output_dir": output_dir, "mode": mode}
    return evaluate(config, model, tokenizer, {"set": str(path)}, **facts)["set"]


def test_open_questions_are_asked_with_their_pictures_and_judged_by_people(pictures, tokenizer):  # noqa: F811
    asked = []

    def generate(prompts):
        asked.extend(prompts)
        return ["The Red!", "blue"]

    path = write_vqa(pictures)
    result = run(path, generate, tokenizer, pictures / "eval")
    assert asked == [(f"What color is it, {i}?", (RED,)) for i in (1, 2)]
    assert result["items"] == {"1": 1.0, "2": 0.0} and result["overall"]["accuracy"] == 0.5
    assert result["by_category"]["other"]["num_clusters"] == 1 and "EvalAI" in result["rule"]
    lines = (pictures / "eval" / "set-words-1.predictions.jsonl").read_text().splitlines()
    assert json.loads(lines[0]) == {"question_id": "1", "prediction": "The Red!"}
    with pytest.raises(ValueError, match="has no options to rank; such questions are answered by --mode=words"):
        run(path, generate, tokenizer, mode="likelihood")


def test_captions_are_asked_for_by_the_prompt(pictures):
    annotations = [{"image_id": 7, "caption": "a red square"}, {"image_id": 7, "caption": "all red"}]
    path = pictures / "captions.json"
    path.write_text(json.dumps({"images": [{"id": 7, "file_name": "red.png"}], "annotations": annotations}))
    (item,) = read_benchmark(path).items
    assert (item.index, item.question, item.images) == ("7", "", (RED,))
    assert item.references == ("a red square", "all red")


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ({"images": [{"id": 7}, {"id": 8}], "annotations": [{"image_id": 7}]}, "1 pictures without a caption.*image 8"),
        ({"images": [{"id": 7}], "annotations": [{"image_id": 7}, {"image_id": 9}]}, "does not list, such as image 9"),
        ({"images": [7], "annotations": []}, "field images, entry 1: expected an object, got 7"),
        ({"annotations": [5]}, "field annotations, entry 1: expected an object, got 5"),
        ({"annotations": [{"question_id": 1}], "questions": 5}, "field questions: a list was expected, got 5"),
    ],
)
def test_broken_annotations_are_refused(pictures, document, message):
    path = pictures / "faulty.json"
    path.write_text(json.dumps(document))
    with pytest.raises(ValueError, match=message):
        read_benchmark(path)


def test_pictures_are_not_kept_in_memory(pictures):
    """Each is read once to know it, and again when it is asked for."""
    path = write_vqa(pictures)
    first, second = read_benchmark(path).items
    assert first.pictures[0] is second.pictures[0] and first.cluster == second.cluster
    (pictures / "images" / "red.png").unlink()
    with pytest.raises(RecordError, match=r"cannot be read: .*red\.png"):
        _ = first.images


def test_annotations_of_vqa_alone_are_no_captions(pictures):
    """They name COCO's pictures by number, and do not hold the questions."""
    annotations = [{"question_id": 1, "image_id": 42, "answers": [{"answer": "red"}] * 10}]
    path = pictures / "v2.json"
    path.write_text(json.dumps({"data_subtype": "val2014", "annotations": annotations}))
    with pytest.raises(ValueError, match=r"entry 1: no question; put the list `questions`"):
        read_benchmark(path)
    (pictures / "images" / "COCO_val2014_000000000042.jpg").write_bytes(RED)
    questions = [{"question_id": 1, "image_id": 42, "question": "What color?"}]
    path.write_text(json.dumps({"data_subtype": "val2014", "annotations": annotations, "questions": questions}))
    assert read_benchmark(path).items[0].images == (RED,)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"answer": " "}, "row 2: no answers"),
        ({"image": "7"}, "row 2, .*column image: '7' should be the index of a row"),
    ],
)
def test_faulty_rows_of_open_tables_are_refused(pictures, change, message):
    rows = [{"index": "0", "question": "What?", "answer": "red", "image": "", "image_path": ""} | change]
    rows.append({"index": "1", "question": "What?", "answer": "red", "image": "", "image_path": ""})
    path = write_tsv(pictures / "open.tsv", rows, ("index", "question", "answer", "image", "image_path"))
    with pytest.raises(ValueError, match=message):
        read_benchmark(path)


def test_a_table_of_open_questions(pictures):
    rows = [{"index": "0", "question": "What?", "answer": "['red', 'scarlet']", "image_path": "red.png"},
            {"index": "1", "question": "How many?", "answer": "3", "image_path": "blue.png"}]  # fmt: skip
    benchmark = read_benchmark(write_tsv(pictures / "open.tsv", rows, ("index", "question", "answer", "image_path")))
    assert [item.references for item in benchmark.items] == [("red", "scarlet"), ("3",)]
    assert benchmark.is_open and benchmark.items[1].images == (BLUE,)


@pytest.fixture(params=["folder", "parquet", "named"])
def classes(tmp_path, request):
    """Three pictures of two classes."""
    labelled = [("a_cat", RED), ("a_cat", BLUE), ("dog", RED)]
    if request.param == "folder":
        for number, (name, data) in enumerate(labelled):
            (tmp_path / "set" / name).mkdir(parents=True, exist_ok=True)
            (tmp_path / "set" / name / f"{number}.png").write_bytes(data)
        return tmp_path / "set"
    features = {"image": {"_type": "Image"}}
    columns = {"image": [{"bytes": data, "path": None} for _, data in labelled]}
    if request.param == "named":
        columns["label_name"] = [name for name, _ in labelled]
    else:
        features["label"] = class_label(["a_cat", "dog"])
        columns["label"] = [["a_cat", "dog"].index(name) for name, _ in labelled]
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    table = pa.table(columns).replace_schema_metadata(metadata)
    pq.write_table(table, tmp_path / "set.parquet")
    return tmp_path / "set.parquet"


def test_classes_are_ranked_by_the_likelihood_of_their_captions(classes, tokenizer):  # noqa: F811
    benchmark = read_benchmark(classes)
    assert [item.images for item in benchmark.items] == [(RED,), (BLUE,), (RED,)]
    assert {item.options for item in benchmark.items} == {("a photo of a a cat.", "a photo of a dog.")}
    assert [item.answer for item in benchmark.items] == [0, 0, 1] and benchmark.name == "set"
    result = run(classes, None, tokenizer, mode="likelihood")
    assert result["overall"]["num_items"] == 3 and set(result["by_category"]) == {"a_cat", "dog"}
    assert result["overall"]["blind_floor"] == pytest.approx(2 / 3), "the class is no part of what is asked"
    assert select_benchmarks({}, [str(classes)]) == {"set": str(classes)}


def test_classes_answered_in_words(classes, tokenizer):  # noqa: F811
    result = run(classes, lambda prompts: ["a photo of a dog."] * len(prompts), tokenizer)
    assert sorted(result["items"].values()) == [0, 0, 1] and result["overall"]["num_unparsed"] == 0


def test_more_classes_than_letters(tmp_path, tokenizer):  # noqa: F811
    for number in range(30):
        (tmp_path / "many" / f"class{number:02}").mkdir(parents=True)
        (tmp_path / "many" / f"class{number:02}" / "x.png").write_bytes(RED)
    result = run(tmp_path / "many", None, tokenizer, mode="likelihood")
    assert set(result["predictions"].values()) <= {f"a photo of a class{number:02}." for number in range(30)}
    with pytest.raises(ValueError, match="30 options, more than there are letters"):
        run(tmp_path / "many", None, tokenizer, mode="letters")
    assert sum(result["items"].values()) == 1, "thirty equal pictures have one answer, which is right once"


@pytest.mark.parametrize(
    ("features", "message"),
    [
        (None, "no parquet file whose schema describes its columns"),
        ({"image": {"_type": "Image"}}, "no column of type ClassLabel and none called label_name"),
        ({"label": class_label(["x", "y"])}, r"one column of type Image and one ClassLabel were expected, found \[\]"),
        ({"image": {"_type": "Image"}, "label": class_label(["one"])}, "1 classes"),
        ({"image": {"_type": "Image"}, "label": class_label(["x", "y"])}, "row 0, column image: no picture"),
    ],
)  # fmt: skip
def test_parquet_files_that_do_not_say(tmp_path, features, message):
    metadata = {"huggingface": json.dumps({"info": {"features": features}})} if features else None
    table = pa.table({"image": [{"bytes": None, "path": "x"}], "label": [0]}).replace_schema_metadata(metadata)
    pq.write_table(table, tmp_path / "x.parquet")
    with pytest.raises(ValueError, match=message):
        read_benchmark(tmp_path / "x.parquet")
