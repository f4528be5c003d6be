"""Hugging Face parquet to records: literal rows in, literal records or reasons out; damaged files are named."""

import io
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from data_pipelines.entries import Dropped
from data_pipelines.hf_parquet import ParquetOptions, parse_row, read_parquet
from unihetero_jax.data.records import ImageSegment, Record, TextSegment


def png(color="red", size=(8, 6)):
    buffer = io.BytesIO()
    Image.new("RGB", size, color).save(buffer, "PNG")
    return buffer.getvalue()


RED = ImageSegment(png(), 6, 8)
NAMES = ("cat", "dog ")
WHERE = "a.parquet[3]"


def row(**changes):
    image = {"bytes": RED.data, "path": "train/1.png"}
    return {"image": image, "label": 1, "name": "dog", "caption": " a dog. "} | changes


def parse(changes, **options):
    return parse_row(row(**changes), ParquetOptions("set", **options), WHERE, NAMES)


def turn(question, answer, branch):
    return TextSegment(question, False, branch), TextSegment(answer, True, branch)


def test_a_label_is_a_question_and_a_caption_a_description():
    record = parse({}, label_column="label", caption_column="caption")
    segments = (
        RED,
        *turn("What is the main object in this image?", " dog", 1),
        *turn("Describe this image.", " a dog.", 2),
    )
    assert record == Record("set", "vqa", segments, {"id": "train/1.png"})
    assert record.where == WHERE


def test_a_caption_alone_and_a_label_that_is_text():
    assert parse({}, caption_column="caption", caption_prompt="What do you see? ") == Record(
        "set", "caption", (RED, *turn("What do you see?", " a dog.", 1)), {"id": "train/1.png"}
    )
    record = parse({}, label_column="name", questions=("Which animal?",))
    assert record == Record("set", "vqa", (RED, *turn("Which animal?", " dog", 1)), {"id": "train/1.png"})


def test_generation_is_the_caption_then_the_image():
    record = parse({}, task="generation", caption_column="caption")
    assert record == Record("set", "image", (TextSegment("a dog.", True), RED), {"id": "train/1.png"})


def test_plain_bytes_and_images_without_path_are_named_by_their_place():
    for image in (RED.data, {"bytes": RED.data, "path": None}):
        record = parse({"image": image}, label_column="name")
        assert record.segments[0] == RED and record.meta == {"id": WHERE}


def test_the_bytes_of_an_image_choose_the_wording():
    questions = ("What is it?", "Which animal is it?", "Name it.")
    chosen = [parse({"image": png((n, 0, 0))}, label_column="label", questions=questions) for n in range(60)]
    again = [parse({"image": png((n, 0, 0))}, label_column="label", questions=questions) for n in range(60)]
    assert chosen == again
    counts = [sum(record.segments[1].text == question for record in chosen) for question in questions]
    assert sum(counts) == 60 and min(counts) >= 8, counts


BLUE = ImageSegment(png("blue", (4, 10)), 10, 4)
IMAGES = [{"bytes": RED.data, "path": None}, {"bytes": BLUE.data, "path": "b.png"}]


def test_a_pair_has_no_prompt():
    record = parse({}, task="pair", caption_column="caption")
    assert record == Record("set", "caption", (RED, TextSegment("a dog.", True)), {"id": "train/1.png"})


def test_a_list_of_images():
    record = parse({"image": IMAGES}, label_column="name", questions=("Which animal?",))
    assert record == Record("set", "vqa", (RED, BLUE, *turn("Which animal?", " dog", 1)), {"id": "b.png"})
    alone = parse({"image": IMAGES[:1]}, label_column="label", questions=("a", "b", "c"))
    assert alone.segments == parse({}, label_column="label", questions=("a", "b", "c")).segments
    for task in ("pair", "generation"):
        one = parse({"image": [row()["image"]]}, task=task, caption_column="caption")
        assert one == parse({}, task=task, caption_column="caption") and isinstance(one, Record)


def talk(*values):
    return [{"from": ("human", "gpt")[number % 2], "value": value} for number, value in enumerate(values)]


def converse(changes, **options):
    return parse(changes, task="conversation", **options)


def test_a_conversation_with_one_image_several_and_none():
    values = talk("<image>\nWhat is it?", "red", "Big?", "no")
    record = converse({"talk": values}, conversation_column="talk")
    segments = (RED, *turn("What is it?", " red", 1), *turn("Big?", " no", 2))
    assert record == Record("set", "vqa", segments, {"id": "train/1.png"})
    messages = [
        {"role": role, "content": m["value"]} for role, m in zip(("user", "assistant") * 2, values, strict=True)
    ]
    assert converse({"talk": messages}, conversation_column="talk") == record
    values = talk("<image>\nWhat?", "red", "And <image>?", "blue")
    record = converse({"image": IMAGES, "talk": values}, conversation_column="talk", turns="dialogue")
    assert record.segments == (
        RED, *turn("What?", " red", 0), TextSegment("\nAnd"), BLUE, *turn("?", " blue", 0)
    )  # fmt: skip
    for image in (None, []):
        record = converse({"image": image, "talk": talk("Who?", "I")}, conversation_column="talk")
        assert record == Record("set", "text", turn("Who?", " I", 1), {"id": WHERE})
    assert converse({"talk": talk("Who?", "I")}, conversation_column="talk", image_column="").kind == "text"


def test_choices_of_a_conversation():
    values = talk("<image>\nHow many?\nA. 4\nB. 5", "B")
    record = converse({"talk": values}, conversation_column="talk", choices="text")
    assert record.segments == (RED, *turn("How many?", " 5", 1))


def test_texts_of_the_cauldron():
    texts = [{"user": "Which is red?", "assistant": "1", "source": "x"}, {"user": "Blue?", "assistant": "2"}]
    record = converse({"image": IMAGES, "texts": texts}, texts_column="texts")
    segments = (RED, BLUE, *turn("Which is red?", " 1", 1), *turn("Blue?", " 2", 2))
    assert record == Record("set", "vqa", segments, {"id": "b.png"})


TALK = {"task": "conversation", "conversation_column": "talk"}
REFUSED = {
    "several_images": ({"image": IMAGES}, {"caption_column": "caption", "task": "pair"}, "several_images"),
    "several_drawn": ({"image": IMAGES}, {"caption_column": "caption", "task": "generation"}, "several_images"),
    "no_image_in_list": ({"image": []}, {"label_column": "label"}, "missing_image"),
    "null_in_list": ({"image": [IMAGES[0], None]}, {"label_column": "label"}, "missing_image"),
    "no_caption_of_pair": ({"caption": " "}, {"caption_column": "caption", "task": "pair"}, "empty_caption"),
    "pair_of_no_image": ({"image": b"no"}, {"caption_column": "caption", "task": "pair"}, "not_an_image"),
    "null_conversation": ({"talk": None}, TALK, "empty_conversation"),
    "no_mark": ({"talk": talk("What?", "red")}, TALK, "image_count"),
    "fewer_marks": ({"image": IMAGES, "talk": talk("<image>?", "red")}, TALK, "image_count"),
    "no_bytes": ({"image": [{"path": "x.png"}], "talk": talk("<image>?", "red")}, TALK, "missing_image"),
    "null_texts": ({"texts": None}, {"task": "conversation", "texts_column": "texts"}, "empty_conversation"),
    "null_image": ({"image": None}, {"label_column": "label"}, "missing_image"),
    "null_bytes": ({"image": {"bytes": None, "path": "x.png"}}, {"label_column": "label"}, "missing_image"),
    "path_alone": ({"image": "cache/x.png"}, {"label_column": "label"}, "missing_image"),
    "empty_bytes": ({"image": b""}, {"label_column": "label"}, "empty_image"),
    "not_an_image": ({"image": b"no image"}, {"label_column": "label"}, "not_an_image"),
    "empty_caption": ({"caption": " \n"}, {"caption_column": "caption"}, "empty_caption"),
    "null_caption": ({"caption": None}, {"caption_column": "caption", "task": "generation"}, "empty_caption"),
    "number_as_caption": ({"caption": 5}, {"caption_column": "caption"}, "empty_caption"),
    "null_label": ({"label": None}, {"label_column": "label"}, "empty_label"),
    "empty_label": ({"name": ""}, {"label_column": "name"}, "empty_label"),
    "label_beyond_the_names": ({"label": 2}, {"label_column": "label"}, "unknown_label"),
    "no_label_stated": ({"label": -1}, {"label_column": "label"}, "unknown_label"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_makes_no_record_has_a_reason_and_a_place(name):
    changes, options, reason = REFUSED[name]
    dropped = parse(changes, **options)
    assert isinstance(dropped, Dropped)
    assert dropped.reason == reason
    assert dropped.where.startswith(f"{WHERE}: {reason}")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"task": "generation"}, "needs a caption column"),
        ({}, "needs a label column or a caption column"),
        ({"task": "pair"}, "pair needs a caption column"),
        ({"task": "conversation", "caption_column": "caption"}, "needs a conversation column or a texts column"),
        (TALK | {"texts_column": "texts"}, "and not both"),
        ({"caption_column": "caption", "texts_column": "t"}, "column 't' .* task qa does not use it"),
        ({"label_column": "label", "questions": ()}, "needs a question"),
    ],
)
def test_options_that_ask_nothing_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        ParquetOptions("set", **options)


def write(path, rows, names=None, **options):
    table = pa.Table.from_pylist(rows)
    if names:
        feature = {"names": names, "_type": "ClassLabel"}
        metadata = json.dumps({"info": {"features": {"label": feature}}})
        table = table.replace_schema_metadata({"huggingface": metadata})
    pq.write_table(table, path, **options)
    return path


def test_files_are_read_in_order_with_the_names_that_each_states(tmp_path):
    paths = [
        write(tmp_path / "a.parquet", [row(label=n % 2) for n in range(300)], ["cat", "dog"], row_group_size=70),
        write(tmp_path / "b.parquet", [row(label=0), row(label=1)], ["hen"]),
        write(tmp_path / "c.parquet", [row(label=0)]),
    ]
    made = list(read_parquet(paths, ParquetOptions("set", label_column="label")))
    assert [record.segments[2].text for record in made[:301]] == [" cat", " dog"] * 150 + [" hen"]
    assert made[299].where == "a.parquet[299]"
    assert [(sample.reason, sample.where.partition(":")[0]) for sample in made[301:]] == [
        ("unknown_label", "b.parquet[1]"),
        ("unknown_label", "c.parquet[0]"),
    ]


def test_lists_of_structs_are_read_from_files(tmp_path):
    """The Cauldron's schema: images are `list<struct{bytes, path}>`, texts `list<struct{user, assistant, source}>`."""
    image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    text = pa.struct([(name, pa.string()) for name in ("user", "assistant", "source")])
    message = pa.struct([("from", pa.string()), ("value", pa.string())])
    schema = pa.schema([("images", pa.list_(image)), ("texts", pa.list_(text)), ("conversations", pa.list_(message))])
    rows = [
        {"images": IMAGES[:n], "texts": [{"user": f"{n}?", "assistant": "x", "source": "s"}] * n,
         "conversations": talk("<image>" * n + "How many?", f"{n}")}
        for n in (1, 2)
    ]  # fmt: skip
    rows.append({"images": None, "texts": None, "conversations": talk("How many?", "0")})
    pq.write_table(pa.Table.from_pylist(rows, schema), tmp_path / "a.parquet")
    options = {"task": "conversation", "image_column": "images"}
    one, two, none = read_parquet([tmp_path / "a.parquet"], ParquetOptions("set", texts_column="texts", **options))
    assert one.segments == (RED, *turn("1?", " x", 1))
    assert two.segments == (RED, BLUE, *turn("2?", " x", 1), *turn("2?", " x", 2))
    assert none == Dropped("empty_conversation", "a.parquet[2]: empty_conversation")
    options |= {"conversation_column": "conversations", "turns": "dialogue"}
    made = list(read_parquet([tmp_path / "a.parquet"], ParquetOptions("set", **options)))
    assert [record.segments for record in made] == [
        (*images, *turn("How many?", f" {n}", 0)) for n, images in ((1, [RED]), (2, [RED, BLUE]), (0, []))
    ]
    with pytest.raises(ValueError, match=r"no column 'talk'; the file has images, texts, conversations"):
        list(read_parquet([tmp_path / "a.parquet"], ParquetOptions("set", image_column="images", **TALK)))


def test_other_files_and_missing_columns_are_named(tmp_path):
    path = write(tmp_path / "a.parquet", [row()])
    with pytest.raises(ValueError, match=r"a\.parquet: no column 'title'; the file has image, label, name, caption"):
        list(read_parquet([path], ParquetOptions("set", caption_column="title")))
    path.write_bytes(b"no parquet at all")
    with pytest.raises(ValueError, match=r"a\.parquet: no readable parquet file"):
        list(read_parquet([path], ParquetOptions("set", caption_column="caption")))


def test_pages_damaged_further_on_are_reported_with_the_file(tmp_path):
    rows = [row(caption=f"caption {n} " * 20) for n in range(600)]
    path = write(tmp_path / "a.parquet", rows, row_group_size=300, use_dictionary=False, compression="zstd")
    chunk = pq.ParquetFile(path).metadata.row_group(1).column(4)
    assert chunk.path_in_schema == "caption"
    whole, start = path.read_bytes(), chunk.data_page_offset
    path.write_bytes(whole[:start] + b"\xff" * 60 + whole[start + 60 :])  # the page's header and the start of its frame
    with pytest.raises(ValueError, match=r"a\.parquet: damaged after row \d+: .*fetch the file again"):
        list(read_parquet([path], ParquetOptions("set", caption_column="caption")))
    path.write_bytes(whole)
    assert len(list(read_parquet([path], ParquetOptions("set", caption_column="caption")))) == 600


def test_text_that_is_no_unicode_is_reported_with_the_file(tmp_path):
    caption = pa.array([b"a dog", b"\xff\xfe"], pa.binary()).view(pa.string())
    table = pa.table({"image": pa.array([RED.data] * 2), "caption": caption})
    pq.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r"a\.parquet: damaged after row 0: .*utf-8"):
        list(read_parquet([tmp_path / "a.parquet"], ParquetOptions("set", caption_column="caption")))
