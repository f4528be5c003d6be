"""Text sets in JSON lines and parquet: literal samples in, literal records or reasons out."""

import gzip
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_pipelines.entries import Dropped
from data_pipelines.jsonl import JsonlOptions, parse_sample, read_jsonl, read_text_parquet
from unihetero_jax.data.records import Record, TextSegment

WHERE = "a.jsonl, line 3"


def parse(sample, max_chars=100, **options):
    return list(parse_sample(sample, JsonlOptions("set", max_chars, **options), WHERE))


def text(value, identity="7", **meta):
    return Record("set", "text", (TextSegment(value, True),), {"id": identity, **meta})


def test_a_document_is_one_record():
    (record,) = parse({"id": "7", "text": "One.\n\nTwo.\n", "url": "x"})
    assert record == text("One.\n\nTwo.\n")
    assert record.where == WHERE


def test_a_long_document_becomes_several_with_one_id():
    made = parse({"text": "One.\n\nTwo words\n\nThree.", "id": 7}, max_chars=12)
    assert made == [text("One.\n\n", part=1), text("Two words\n\n", part=2), text("Three.", part=3)]
    assert [record.where for record in made] == [f"{WHERE}, part {part}" for part in (1, 2, 3)]
    made = parse({"text": "12345678\n \n"}, max_chars=9)
    assert made == [text("12345678\n", WHERE, part=1), Dropped("empty_text", f"{WHERE}, part 2")]


def test_fields_have_names_that_can_be_stated():
    sample = {"content": "One.", "uuid": "u1", "text": "other", "id": "7"}
    assert parse(sample, text_field="content", id_field="uuid") == [text("One.", "u1")]
    for identity in ({}, {"id": None}, {"id": ""}, {"id": [1]}):
        assert parse({"text": "One."} | identity) == [text("One.", WHERE)]


REFUSED = {
    "list": (["One."], "not_an_object"),
    "string": ("One.", "not_an_object"),
    "null": (None, "not_an_object"),
    "no_field": ({"id": "7", "body": "One."}, "no_text_field"),
    "null_text": ({"text": None}, "text_not_a_string"),
    "number": ({"text": 5}, "text_not_a_string"),
    "empty": ({"text": ""}, "empty_text"),
    "blank": ({"text": " \n\t"}, "empty_text"),
    "lone_surrogate": ({"text": "One \ud800 two"}, "invalid_text"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_makes_no_record_has_a_reason_and_a_place(name):
    sample, reason = REFUSED[name]
    (dropped,) = parse(sample)
    assert dropped.reason == reason and dropped.where.startswith(f"{WHERE}: ")
    assert dropped.where.isprintable()


def test_options_that_make_no_sense_are_refused():
    for options in ({"max_chars": 0}, {"max_chars": 9, "max_line_bytes": 0}):
        with pytest.raises(ValueError, match="must be positive"):
            JsonlOptions("set", **options)


def test_files_are_read_in_order_and_bad_lines_are_placed(tmp_path):
    lines = [
        b'{"text": "One.", "id": "a"}', b"{", b"", b'{"text": "' + b"x" * 200 + b'"}', b"[1]", b'{"text": "\\ud800"}',
        b'{"text": "\\ud83d\\ude00"}',
    ]  # fmt: skip
    paths = [tmp_path / "b.jsonl", tmp_path / "a.jsonl.gz"]
    paths[0].write_bytes(b"\n".join(lines) + b"\n")
    paths[1].write_bytes(gzip.compress(json.dumps({"text": "Two."}).encode()))
    made = list(read_jsonl(paths, JsonlOptions("set", 100, max_line_bytes=100)))
    assert (made[0], made[6], made[7]) == (
        text("One.", "a"), text("\U0001f600", "b.jsonl, line 7"), text("Two.", "a.jsonl.gz, line 1"),
    )  # fmt: skip
    assert [(sample.reason, sample.where.partition(":")[0]) for sample in made[1:6]] == [
        ("not_json", "b.jsonl, line 2"),
        ("empty_line", "b.jsonl, line 3"),
        ("line_too_long", "b.jsonl, line 4"),
        ("not_an_object", "b.jsonl, line 5"),
        ("invalid_text", "b.jsonl, line 6"),
    ]
    with pytest.raises(ValueError, match=r"none\.jsonl: cannot be read"):
        list(read_jsonl([tmp_path / "none.jsonl"], JsonlOptions("set", 100)))


def test_parquet_has_the_columns_of_fineweb(tmp_path):
    rows = [
        {"text": value, "id": f"<urn:uuid:{n}>", "dump": "CC", "url": "http://x", "language": "en", "token_count": 5}
        for n, value in enumerate(["One.\n\nTwo.", None, " "])
    ]
    path = tmp_path / "a.parquet"
    pq.write_table(pa.Table.from_pylist(rows), path)
    assert list(read_text_parquet([path], JsonlOptions("set", 8))) == [
        text("One.\n\n", "<urn:uuid:0>", part=1),
        text("Two.", "<urn:uuid:0>", part=2),
        Dropped("text_not_a_string", "a.parquet[1]: 'text' is None"),
        Dropped("empty_text", "a.parquet[2]: 'text' is blank"),
    ]
    without_id = list(read_text_parquet([path], JsonlOptions("set", 100, id_field="uuid")))
    assert without_id[0] == text("One.\n\nTwo.", "a.parquet[0]")
    with pytest.raises(ValueError, match=r"a\.parquet: no column 'content'; the file has text, id, dump"):
        list(read_text_parquet([path], JsonlOptions("set", 100, text_field="content")))
    path.write_bytes(b"no parquet")
    with pytest.raises(ValueError, match=r"a\.parquet: no readable parquet file"):
        list(read_text_parquet([path], JsonlOptions("set", 100)))
