"""Interleaved documents to records: literal documents in, literal records and reasons out."""

import io
import json
import os
import zipfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from data_pipelines import interleaved
from data_pipelines.archives import ArchiveLimits
from data_pipelines.entries import Dropped
from data_pipelines.image_files import read_image_map
from data_pipelines.interleaved import InterleavedOptions, parse_mmc4, parse_obelics, read_interleaved
from unihetero_jax.data.records import ImageSegment, Record, RecordError, TextSegment

DATA = Path(os.environ.get("UNIHETERO_REAL_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))
WHERE = "docs.jsonl, line 3"


def png(color, size=(8, 6)):
    buffer = io.BytesIO()
    Image.new("RGB", size, color).save(buffer, "PNG")
    return buffer.getvalue()


NOISE = Image.frombytes("L", (64, 64), bytes(range(256)) * 16)
CUT = io.BytesIO()
NOISE.save(CUT, "PNG")
FILES = {
    "a.png": png("red"),
    "b.png": png("blue", (4, 10)),
    "c.png": png("green", (5, 5)),
    "text.png": b"no image",
    "cut.png": CUT.getvalue()[: len(CUT.getvalue()) // 2],
}
A, B, C = ImageSegment(FILES["a.png"], 6, 8), ImageSegment(FILES["b.png"], 10, 4), ImageSegment(FILES["c.png"], 5, 5)


def read_image(name):
    if name not in FILES:
        raise RecordError("missing_image", f"{name} does not exist")
    return FILES[name]


def said(text):
    return TextSegment(text, True)


def obelics(*places, url="http://x"):
    """A document of texts and, by their file's name, images."""
    return {
        "images": [place if place.endswith(".png") else None for place in places],
        "texts": [None if place.endswith(".png") else place for place in places],
        "metadata": json.dumps([None for _ in places]),
        "general_metadata": json.dumps({"url": url}),
    }


def parse(document, **options):
    return parse_obelics(document, read_image, InterleavedOptions("web", **options), WHERE)


def parts(made):
    return [sample.segments for sample in made]


# ---------------------------------------------------------------- OBELICS


def test_texts_and_images_keep_their_order():
    made = parse(obelics("One.", "Two.", "a.png", "b.png", "Three.", "c.png"))
    segments = (said("One.\n\nTwo.\n\n"), A, B, said("Three.\n\n"), C)
    assert made == [Record("web", "interleaved", segments, {"id": "http://x", "part": 0})]
    assert made[0].where == WHERE


def test_outer_blanks_and_blank_texts_leave_no_trace():
    assert parts(parse(obelics("\n One.\n\n", "", " \n", "a.png", "  "))) == [(said("One.\n\n"), A)]


@pytest.mark.parametrize("general", [None, "", "{", "[1]", '{"url": 5}', '{"other": 1}', "[" * 100_000])
def test_a_document_without_url_is_named_by_its_place(general):
    (record,) = parse(obelics("One.") | {"general_metadata": general})
    assert record.meta == {"id": WHERE, "part": 0}


REFUSED = {
    "no_object": ("text", "not_an_object"),
    "no_lists": ({"images": None, "texts": ["x"]}, "bad_document"),
    "no_texts": ({"images": ["a.png"]}, "bad_document"),
    "lengths": ({"images": [None, None], "texts": ["x"]}, "bad_document"),
    "both": ({"images": ["a.png"], "texts": ["x"]}, "bad_document"),
    "neither": ({"images": [None], "texts": [None]}, "bad_document"),
    "number": ({"images": [5], "texts": [None]}, "bad_document"),
    "no_name": ({"images": [""], "texts": [None]}, "bad_document"),
    "number_as_text": ({"images": [None], "texts": [5]}, "bad_document"),
    "nothing": ({"images": [], "texts": []}, "empty_document"),
    "blank": ({"images": [None], "texts": [" "]}, "empty_document"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_document_has_a_reason_and_a_place(name):
    document, reason = REFUSED[name]
    (dropped,) = parse(document)
    assert isinstance(dropped, Dropped)
    assert dropped.reason == reason and dropped.where.startswith(WHERE)


# ---------------------------------------------------------------- missing images


@pytest.mark.parametrize(
    ("name", "reason"), [("gone.png", "missing_image"), ("text.png", "not_an_image"), ("cut.png", "truncated_image")]
)
def test_a_missing_or_damaged_image_is_counted_and_its_document_is_kept_or_not(name, reason):
    document = obelics("One.", name, "Two.", "a.png")
    dropped, record = parse(document)
    assert (dropped.reason, dropped.where.startswith(f"{WHERE}, image {name}: {reason}")) == (reason, True)
    assert record.segments == (said("One.\n\nTwo.\n\n"), A), "the texts meet where the image was"
    image, whole = parse(document, missing="drop_document")
    assert image == dropped
    assert whole == Dropped("incomplete_document", f"{WHERE}: lacks 1 images")


def test_a_document_that_loses_all_it_has_is_dropped_itself():
    assert [sample.reason for sample in parse(obelics("gone.png"))] == ["missing_image", "empty_document"]


# ---------------------------------------------------------------- long documents


def test_a_document_is_split_by_images():
    made = parse(obelics("One.", "a.png", "Two.", "b.png", "c.png"), max_images=1)
    assert parts(made) == [(said("One.\n\n"), A, said("Two.\n\n")), (B,), (C,)]
    assert [record.meta for record in made] == [{"id": "http://x", "part": number} for number in range(3)]
    assert [record.where for record in made] == [f"{WHERE} part {number}" for number in range(3)]


def test_a_document_is_split_by_characters_and_an_image_moves_on_with_its_text():
    made = parse(obelics("x" * 10, "y" * 10, "a.png", "b.png", "z" * 10), max_chars=24)
    assert parts(made) == [(said("x" * 10 + "\n\n" + "y" * 10 + "\n\n"),), (A, B, said("z" * 10))]


def test_images_of_one_text_stay_together_where_the_bound_allows():
    document = obelics("a.png", "One.", "b.png", "c.png", "Two.")
    assert parts(parse(document, max_images=2)) == [(A, said("One.\n\n")), (B, C, said("Two."))]


def test_a_long_text_is_cut_at_paragraphs_lines_and_words():
    made = parse(obelics("a.png", "one two three\nfour five", "end"), max_chars=15)
    assert parts(made) == [(A, said("one two three\n")), (said("four five\n\nend"),)]
    assert parts(parse(obelics("aa bb cc"), max_chars=6)) == [(said("aa bb "),), (said("cc"),)]


@pytest.mark.parametrize("max_images", [None, 1, 2, 5])
@pytest.mark.parametrize("max_chars", [None, 1, 9, 40, 1000])
def test_nothing_is_lost_and_the_bounds_hold(max_images, max_chars):
    places = [
        "a.png",
        "A few words.",
        "b.png",
        "c.png",
        "More\n\nwords " * 5,
        "Again.",
        "a.png",
        "a.png",
        "b.png",
        "End",
    ]
    made = parse(obelics(*places), max_images=max_images, max_chars=max_chars)
    segments = [segment for record in made for segment in record.segments]
    images = [segment for segment in segments if isinstance(segment, ImageSegment)]
    assert images == [A, B, C, A, A, B]
    joined = "".join(segment.text for segment in segments if isinstance(segment, TextSegment))
    assert joined == "\n\n".join(place.strip() for place in places if not place.endswith(".png"))
    for record in made:
        assert sum(isinstance(s, ImageSegment) for s in record.segments) <= (max_images or 99)
        assert sum(len(s.text) for s in record.segments if isinstance(s, TextSegment)) <= (max_chars or 9999)
        assert record.segments
    assert [record.meta["part"] for record in made] == list(range(len(made)))


def test_ten_thousand_sentences_become_one_text():
    document = {"text_list": ["A sentence of words."] * 10_000, "image_info": []}
    (record,) = parse_mmc4(document, read_image, InterleavedOptions("web", "mmc4"), WHERE)
    assert len(record.segments[0].text) == 10_000 * 21 - 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_images": 0}, "max_images 0 must be positive"),
        ({"max_chars": -1}, "max_chars -1 must be positive"),
        ({"image_place": "after"}, "are of MMC4"),
        ({"min_similarity": 0.3}, "are of MMC4"),
    ],
)
def test_options_that_make_no_sense_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        InterleavedOptions("web", **options)


# ---------------------------------------------------------------- MMC4


def image_info(name, sentence, similarity=0.5, **changes):
    info = {"image_name": name, "raw_url": f"http://x/{name}", "matched_text_index": sentence, "face_detections": None}
    return info | {"matched_sim": similarity} | changes


def mmc4(*infos, texts=("One.", "Two. ", "Three.")):
    return {
        "url": "http://page",
        "text_list": list(texts),
        "image_info": list(infos),
        "similarity_matrix": [[0.1] * len(texts) for _ in infos],
        "could_have_url_duplicate": 0,
    }


def parse_sentences(document, read=read_image, **options):
    return parse_mmc4(document, read, InterleavedOptions("web", "mmc4", **options), WHERE)


def test_images_stand_before_or_after_the_sentence_they_match():
    document = mmc4(image_info("a.png", 2), image_info("b.png", 0), image_info("c.png", 2))
    before = (B, said("One. Two.\n\n"), A, C, said("Three."))
    assert parse_sentences(document) == [Record("web", "interleaved", before, {"id": "http://page", "part": 0})]
    assert parts(parse_sentences(document, image_place="after")) == [
        (said("One.\n\n"), B, said("Two. Three.\n\n"), A, C)
    ]  # fmt: skip


def test_an_image_after_its_sentence_stays_with_it_where_the_document_is_split():
    document = mmc4(image_info("a.png", 0), texts=("x" * 10, "y" * 10))
    made = parse_sentences(document, image_place="after", max_chars=15)
    assert parts(made) == [(said("x" * 10 + "\n\n"), A), (said("y" * 10),)]


def test_images_unlike_their_sentence_are_left_out_and_counted():
    document = mmc4(image_info("a.png", 0, 0.25), image_info("b.png", 1, 0.24), image_info("c.png", 2, float("nan")))
    low, nan, record = parse_sentences(document, min_similarity=0.25)
    assert low == Dropped("low_similarity", f"{WHERE}, image b.png: 0.24")
    assert nan == Dropped("low_similarity", f"{WHERE}, image c.png: nan")
    assert record.segments == (A, said("One. Two. Three."))
    assert len(parse_sentences(document, min_similarity=0.25, missing="drop_document")) == 3, "it is not missing"


def test_an_image_is_found_by_its_name_or_its_url():
    by_url = {"http://x/gone.png": FILES["b.png"], "http://x/none": FILES["c.png"]}

    def read(name):
        return by_url[name] if name in by_url else read_image(name)

    infos = (image_info("gone.png", 0), image_info(None, 1, raw_url="http://x/none"), image_info("text.png", 2))
    dropped, record = parse_sentences(mmc4(*infos), read)
    assert (dropped.reason, "image text.png" in dropped.where) == ("not_an_image", True)
    assert record.segments == (B, said("One.\n\n"), C, said("Two. Three."))


REFUSED_MMC4 = {
    "no_object": ([], {}, "not_an_object"),
    "no_texts": (mmc4() | {"text_list": None}, {}, "bad_document"),
    "number_as_text": (mmc4(texts=("One.", 2)), {}, "bad_document"),
    "no_images": (mmc4() | {"image_info": {}}, {}, "bad_document"),
    "no_info": (mmc4("a.png"), {}, "bad_image_info"),
    "no_name": (mmc4(image_info("", 0, raw_url=None)), {}, "bad_image_info"),
    "beyond": (mmc4(image_info("a.png", 3)), {}, "bad_image_info"),
    "negative": (mmc4(image_info("a.png", -1)), {}, "bad_image_info"),
    "truth": (mmc4(image_info("a.png", True)), {}, "bad_image_info"),
    "fraction": (mmc4(image_info("a.png", 1.0)), {}, "bad_image_info"),
    "no_similarity": (mmc4(image_info("a.png", 0, None)), {"min_similarity": 0.1}, "bad_image_info"),
    "no_sentence": (mmc4(texts=()), {}, "empty_document"),
}


@pytest.mark.parametrize("name", REFUSED_MMC4)
def test_what_is_no_mmc4_document_has_a_reason_and_a_place(name):
    document, options, reason = REFUSED_MMC4[name]
    (dropped,) = parse_sentences(document, **options)
    assert isinstance(dropped, Dropped)
    assert dropped.reason == reason and dropped.where.startswith(WHERE)


# ---------------------------------------------------------------- files


@pytest.fixture
def images(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    for name, data in FILES.items():
        (folder / name).write_bytes(data)
    return folder


def test_json_lines_and_parquet_give_the_same_records(tmp_path, images):
    documents = [obelics("One.", "a.png", url=f"http://{number}") for number in range(300)]
    lines, table = tmp_path / "docs.jsonl", tmp_path / "docs.parquet"
    lines.write_text("".join(json.dumps(document) + "\n" for document in documents))
    pq.write_table(pa.Table.from_pylist(documents), table)
    made = list(read_interleaved([lines, table], images, InterleavedOptions("web")))
    assert made[:300] == made[300:]
    assert made[299] == Record("web", "interleaved", (said("One.\n\n"), A), {"id": "http://299", "part": 0})
    assert (made[299].where, made[599].where) == ("docs.jsonl, line 300", "docs.parquet[299]")


def test_parquet_without_metadata_is_read_and_without_texts_is_refused(tmp_path, images):
    path = tmp_path / "docs.parquet"
    pq.write_table(pa.Table.from_pylist([{"images": ["a.png"], "texts": [None]}]), path)
    (record,) = read_interleaved([path], images, InterleavedOptions("web"))
    assert record.segments == (A,) and record.meta["id"] == "docs.parquet[0]"
    with pytest.raises(ValueError, match=r"docs\.parquet: no column 'text_list'; the file has images, texts"):
        list(read_interleaved([path], images, InterleavedOptions("web", "mmc4")))


def test_lines_that_are_no_documents_are_dropped_in_their_place(tmp_path, images):
    path = tmp_path / "docs.jsonl"
    path.write_text('{"images"\n5\n' + json.dumps(obelics("One.")) + "\n")
    broken, number, record = read_interleaved([path], images, InterleavedOptions("web"))
    assert (broken.reason, number.reason) == ("not_json", "not_an_object")
    assert number.where.startswith("docs.jsonl, line 2") and record.where == "docs.jsonl, line 3"


def zipped(path, members):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, documents in members.items():
            archive.writestr(name, "".join(json.dumps(document) + "\n" for document in documents))
    return path


def test_documents_inside_a_zip_are_read_in_the_order_of_their_names(tmp_path, images):
    document = mmc4(image_info("a.png", 0))
    path = zipped(tmp_path / "docs.jsonl.zip", {"b.jsonl": [document], "x/a.jsonl": [document] * 2, "readme.txt": []})
    made = list(read_interleaved([path], images, InterleavedOptions("web", "mmc4")))
    assert [record.segments for record in made] == [(A, said("One. Two. Three."))] * 3
    assert [record.where for record in made] == [
        "docs.jsonl.zip/b.jsonl, line 1", "docs.jsonl.zip/a.jsonl, line 1", "docs.jsonl.zip/a.jsonl, line 2",
    ]  # fmt: skip


def test_a_zip_bomb_of_documents_is_refused(tmp_path, images, monkeypatch):
    path = zipped(tmp_path / "bomb.jsonl.zip", {"a.jsonl": [{"text": "a" * 3_000_000}]})
    monkeypatch.setattr(interleaved, "LIMITS", ArchiveLimits(free_bytes=2_000_000, max_entries=1))
    with pytest.raises(ValueError, match=r"bomb.jsonl.zip: unpacks to more than 100 times its size"):
        list(read_interleaved([path], images, InterleavedOptions("web", "mmc4")))
    path = zipped(tmp_path / "many.jsonl.zip", {"a.jsonl": [], "b.jsonl": []})
    with pytest.raises(ValueError, match=r"many.jsonl.zip: has more than 1 members"):
        list(read_interleaved([path], images, InterleavedOptions("web", "mmc4")))


def test_damaged_zips_are_named(tmp_path, images):
    documents = [mmc4(texts=[f"Sentence {number}."]) for number in range(500)]
    path = zipped(tmp_path / "docs.zip", {"a.jsonl": documents})
    whole = path.read_bytes()
    for damaged in (b"no zip", whole[:100] + b"\xff" * 40 + whole[140:], whole[:-30]):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"docs\.zip: no readable zip file: .*fetch it again"):
            list(read_interleaved([path], images, InterleavedOptions("web", "mmc4")))
    with pytest.raises(ValueError, match=r"docs\.zip: holds no \.jsonl file"):
        list(read_interleaved([zipped(path, {"a.png": []})], images, InterleavedOptions("web", "mmc4")))
    with pytest.raises(ValueError, match=r"gone\.jsonl: cannot be read"):
        list(read_interleaved([tmp_path / "gone.jsonl"], images, InterleavedOptions("web")))


def test_urls_are_found_through_an_image_map(tmp_path, images):
    (tmp_path / "map.tsv").write_text("http://x/1\ta.png\r\n\nhttp://x/2?a=1\tsub/gone.png\n")
    image_map = read_image_map(tmp_path / "map.tsv")
    assert image_map == {"http://x/1": "a.png", "http://x/2?a=1": "sub/gone.png"}
    urls = ["http://x/1", "http://x/2?a=1", "http://x/3", "b.png"]
    path = tmp_path / "docs.jsonl"
    path.write_text(json.dumps({"images": urls, "texts": [None] * 4}))
    *dropped, record = read_interleaved([path], images, InterleavedOptions("web"), image_map)
    assert [sample.reason for sample in dropped] == ["missing_image"] * 2
    assert record.segments == (A, B)


@pytest.mark.parametrize("line", ["http://x", "http://x\t", "\ta.png", "http://x\ta.png\tb.png"])
def test_a_faulty_image_map_is_named(tmp_path, line):
    path = tmp_path / "map.tsv"
    path.write_text(f"http://y\tb.png\n{line}\n")
    with pytest.raises(ValueError, match=r"map\.tsv: line 2 must be a URL, a tab and a file name"):
        read_image_map(path)
    path.unlink()
    with pytest.raises(ValueError, match=r"map\.tsv: no readable image map"):
        read_image_map(path)


@pytest.mark.skipif(not (DATA / "interleaved").is_dir(), reason=f"the real data are not in {DATA}")
def test_the_shared_documents_are_whole():
    """Counts as the raw folder's own description states them."""
    folder = DATA / "interleaved"
    images = set()
    for split, num_documents, num_images in (("train", 38, 66), ("val", 5, 7)):
        path = folder / f"docs_{split}.jsonl"
        made = list(read_interleaved([path], folder / "images.zip", InterleavedOptions("pages")))
        assert len(made) == num_documents and all(isinstance(sample, Record) for sample in made)
        found = [s.data for record in made for s in record.segments if isinstance(s, ImageSegment)]
        assert len(found) == num_images
        images |= set(found)
        bounded = InterleavedOptions("pages", max_images=2, max_chars=600)
        shorter = list(read_interleaved([path], folder / "images.zip", bounded))
        for kind, content in ((ImageSegment, "data"), (TextSegment, "text")):
            joined, rejoined = (
                [getattr(s, content) for record in records for s in record.segments if isinstance(s, kind)]
                for records in (made, shorter)
            )
            assert joined[0][:0].join(joined) == rejoined[0][:0].join(rejoined)
    assert len(images) == 64
