"""Tables of captions and URLs to records: literal rows in, literal records or reasons out."""

import gzip
import io

import pytest
from PIL import Image

from data_pipelines.caption_tsv import CaptionTsvOptions, parse_row, read_caption_tsv
from unihetero_jax.data.records import ImageSegment, Record, RecordError, TextSegment


def png(color, size=(8, 6)):
    buffer = io.BytesIO()
    Image.new("RGB", size, color).save(buffer, "PNG")
    return buffer.getvalue()


RED, BLUE = ImageSegment(png("red"), 6, 8), ImageSegment(png("blue", (4, 10)), 10, 4)
FETCHED = {"http://a/red": RED.data, "https://b/blue?x=1&y=2": BLUE.data, "http://a/text": b"no image"}
WHERE = "cc3m.tsv, line 4"


def read_image(url):
    if url not in FETCHED:
        raise RecordError("not_in_image_map", url)
    return FETCHED[url]


def parse(*row, columns=("caption", "url")):
    return parse_row(row, read_image, CaptionTsvOptions("cc", columns), WHERE)


def test_a_row_is_a_pair_without_a_prompt():
    record = parse(" a red thing ", "http://a/red")
    segments = (RED, TextSegment("a red thing", True))
    assert record == Record("cc", "caption", segments, {"id": WHERE, "url": "http://a/red"})
    assert record.where == WHERE
    assert parse("http://a/red", "a red thing", columns=("url", "caption")) == record


def test_quotes_are_literal():
    for caption in ('"Red', 'a "red" thing', '"a red thing"', "it's 5\" wide", '""'):
        assert parse(caption, "http://a/red").segments[1].text == caption


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (["a thing"], "bad_row"),
        ([""], "bad_row"),
        (["a", "thing", "http://a/red"], "bad_row"),
        (["http://a/red", "a thing"], "bad_url"),
        (["a thing", "a/red"], "bad_url"),
        (["a thing", "http://a/red and more"], "bad_url"),
        (["a thing", ""], "bad_url"),
        (["a thing", "http://a/gone"], "not_in_image_map"),
        (["a thing", "http://a/text"], "not_an_image"),
        (["  ", "http://a/red"], "empty_caption"),
    ],
)
def test_what_makes_no_record_has_a_reason_and_a_place(row, reason):
    dropped = parse(*row)
    assert dropped.reason == reason
    assert dropped.where.startswith(f"{WHERE}: {reason}")


@pytest.mark.parametrize("columns", [("caption", "caption"), ("url",), ("caption", "url", "id"), ("text", "url")])
def test_columns_must_be_a_caption_and_a_url(columns):
    with pytest.raises(ValueError, match=r"--columns: .* must be caption and url"):
        CaptionTsvOptions("cc", columns)


IMAGE_MAP = {
    "http://a/red": "red.png",
    "https://b/blue?x=1&y=2": "blue.png",
    "http://a/lost": "lost.png",
    "http://a/up": "../x",
}


@pytest.fixture
def folder(tmp_path):
    """Holds the images, but one that the map names."""
    (tmp_path / "red.png").write_bytes(RED.data)
    (tmp_path / "blue.png").write_bytes(BLUE.data)
    return tmp_path


def read(folder, *names, **options):
    paths = [folder / name for name in names]
    return list(read_caption_tsv(paths, folder, IMAGE_MAP, CaptionTsvOptions("cc", **options)))


def test_tables_are_read_in_order_and_bad_rows_are_placed(folder):
    rows = [
        b'"red\thttp://a/red', b"caf\xc3\xa9\thttps://b/blue?x=1&y=2\r", b"gone\thttp://a/gone", b"lost\thttp://a/lost",
        b"up\thttp://a/up", b"", b"\xff\thttp://a/red", b'red"\thttp://a/red',
    ]  # fmt: skip
    (folder / "z.tsv").write_bytes(b"\n".join(rows))
    (folder / "a.tsv.gz").write_bytes(gzip.compress(b"last\thttp://a/red\n"))
    made = read(folder, "z.tsv", "a.tsv.gz")
    kept = [sample for sample in made if isinstance(sample, Record)]
    assert [record.segments for record in kept] == [
        (RED, TextSegment('"red', True)),
        (BLUE, TextSegment("caf\u00e9", True)),
        (RED, TextSegment('red"', True)),
        (RED, TextSegment("last", True)),
    ]
    assert [record.where for record in kept] == [
        "z.tsv, line 1", "z.tsv, line 2", "z.tsv, line 8", "a.tsv.gz, line 1",
    ]  # fmt: skip
    assert [(sample.reason, sample.where.partition(":")[0]) for sample in made[2:7]] == [
        ("not_in_image_map", "z.tsv, line 3"),
        ("missing_image", "z.tsv, line 4"),
        ("unsafe_path", "z.tsv, line 5"),
        ("bad_row", "z.tsv, line 6"),
        ("invalid_text", "z.tsv, line 7"),
    ]


def test_a_table_in_the_other_order_is_refused_and_a_header_is_not(folder):
    rows = ["a red thing\thttp://a/red"] * 30
    (folder / "a.tsv").write_text("\n".join(["caption\turl", *rows]))
    assert [getattr(sample, "reason", "") for sample in read(folder, "a.tsv")] == ["bad_url"] + [""] * 30
    with pytest.raises(ValueError, match=r"a\.tsv: of the first 20 rows, 0 .* --columns url,caption; give that of the"):
        read(folder, "a.tsv", columns=("url", "caption"))
    (folder / "a.tsv").write_text("\n".join(row + "\tmore" for row in rows))
    with pytest.raises(ValueError, match=r"a\.tsv: of the first 20 rows, 0 .*--columns"):
        read(folder, "a.tsv")
    (folder / "a.tsv").write_text("")
    assert read(folder, "a.tsv") == []


def test_files_that_cannot_be_read_are_named(folder):
    with pytest.raises(ValueError, match=r"none\.tsv: cannot be read"):
        read(folder, "none.tsv")
    with pytest.raises(ValueError, match=r"--images: .* does not exist"):
        read(folder / "nowhere", "none.tsv")
