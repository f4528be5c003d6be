"""Tables of URLs or uids joined to the tars fetched for them: literal rows and samples in, literal records or reasons
out; each sample and each row is accounted for once.
"""

import io
import itertools
import json
import os
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from data_pipelines import web_metadata
from data_pipelines.entries import Dropped
from data_pipelines.web_metadata import (
    RowFilter,
    WebMetadataOptions,
    parse_filter,
    parse_pair,
    read_subset,
    read_web_metadata,
)
from data_pipelines.webdataset import Sample
from unihetero_jax.data.records import ImageSegment, Record, TextSegment

DATA = Path(os.environ.get("UNIHETERO_REAL_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))


def png(color="red"):
    buffer = io.BytesIO()
    Image.new("RGB", (8, 6), color).save(buffer, "PNG")
    return buffer.getvalue()


RED = ImageSegment(png(), 6, 8)
NAME = "00000.tar/000000003"
SAMPLE = Sample(NAME, (("png", RED.data),))
JSON = {"url": "http://a/1", "caption": "from the tar"}


def filters(*texts):
    return tuple(parse_filter(text) for text in texts)


# ---------------------------------------------------------------- one sample and its row


def parse(row, *conditions, sample=SAMPLE, metadata=JSON):
    return parse_pair(sample, metadata, row, WebMetadataOptions("set", filters=filters(*conditions)))


def test_a_row_gives_caption_licence_and_scores():
    row = {
        "caption": " a red thing ", "license": "CC-BY", "nsfw": "UNLIKELY", "similarity": 0.3125, "punsafe": None,
        "pwatermark": float("nan"), "width": 8.0,
    }  # fmt: skip
    meta = {"id": NAME, "url": "http://a/1", "licence": "CC-BY", "nsfw": "UNLIKELY", "similarity": 0.3125}
    record = parse(row)
    assert record == Record("set", "caption", (RED, TextSegment("a red thing", True)), meta)
    assert record.where == NAME


def test_a_uid_and_a_class_are_kept():
    sample = Sample(NAME, (("png", RED.data), ("cls", b"3")))
    assert parse({"caption": "x"}, sample=sample, metadata={"uid": "ab"}).meta == {"id": NAME, "cls": 3, "uid": "ab"}


@pytest.mark.parametrize(
    ("condition", "kept"),
    [
        ("s>=0.5", True), ("s>=0.51", False), ("s<=0.5", True), ("s<=0.49", False), ("s>0.5", False), ("s>0.4", True),
        ("s<0.5", False), ("s<0.6", True), ("s==0.5", True), ("s==0.4", False), (" S >= 5e-1 ", True),
    ],
)  # fmt: skip
def test_filters_keep_what_meets_them(condition, kept):
    made = parse({"caption": "x", "s": 0.5}, condition)
    assert isinstance(made, Record) if kept else made.reason == "filtered_s"


def test_the_first_filter_that_fails_is_the_reason():
    row = {"caption": "x", "a": 1.0, "b": 2.0, "c": None}
    dropped = parse(row, "a>=1", "b<=1.5", "a>3")
    assert dropped == Dropped("filtered_b", f"{NAME}: filtered_b: 2.0 is not <= 1.5")
    assert parse(row, "c>=0").reason == "no_c"
    assert parse(row | {"c": float("nan")}, "c>=0").reason == "no_c"


@pytest.mark.parametrize(
    "text",
    [
        "", "similarity", "similarity>=", ">=0.3", "similarity=0.3", "similarity!=0.3", "similarity>=0.3 and x>1",
        "similarity>=nan", "similarity>=inf", "similarity>=1e999", "similarity>=0x10", "similarity>=1_000",
        "0.3<=similarity", "a.b>=1", "__import__('os')>=1", "similarity>=\u0663", "similarity>=.", "s>=1;s<=2",
    ],
)  # fmt: skip
def test_what_is_no_filter_is_named(text):
    with pytest.raises(ValueError, match=r"filter .* must be a column, one of >= <= > < == and a number"):
        parse_filter(text)


def test_filters_are_read_literally():
    assert filters("pUnsafe <= .1", "x==-1.5e2") == (RowFilter("punsafe", "<=", 0.1), RowFilter("x", "==", -150.0))
    with pytest.raises(ValueError, match="filters are on columns of numbers"):
        WebMetadataOptions("set", filters=filters("caption>=1"))


@pytest.mark.parametrize(
    ("row", "sample", "reason"),
    [
        ({"caption": None}, SAMPLE, "empty_caption"),
        ({"caption": " \n"}, SAMPLE, "empty_caption"),
        ({"caption": "x"}, Sample(NAME, (("txt", b"x"),)), "no_image"),
        ({"caption": "x"}, Sample(NAME, (("jpg", b"<html>"),)), "not_an_image"),
    ],
)
def test_what_makes_no_record_has_a_reason_and_a_place(row, sample, reason):
    dropped = parse(row, sample=sample)
    assert dropped.reason == reason and dropped.where.startswith(f"{NAME}: {reason}")


# ---------------------------------------------------------------- tables and tars


def write_tar(path, *samples):
    """Samples are the fields of their json, or None for a sample without one; image and txt as img2dataset writes."""
    with tarfile.open(path, "w") as archive:
        for number, fields in enumerate(samples):
            members = {"png": png((number, 0, 0)), "txt": b"from the tar"}
            if fields is not None:
                members["json"] = json.dumps({"status": "success"} | fields).encode()
            for extension, data in members.items():
                info = tarfile.TarInfo(f"{number:09d}.{extension}")
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
    return path


def urls(*names):
    return [{"url": f"http://a/{name}", "caption": "from the tar"} for name in names]


def write_table(path, types=None, **columns):
    arrays = {name: pa.array(values, (types or {}).get(name)) for name, values in columns.items()}
    pq.write_table(pa.table(arrays), path)
    return path


def read(tars, tables, *conditions, subset=None, **options):
    made = WebMetadataOptions("set", filters=filters(*conditions), **options)
    return list(read_web_metadata(tars, tables, made, subset))


def texts(samples):
    return [sample.segments[1].text if isinstance(sample, Record) else sample.reason for sample in samples]


LAION = {
    "SAMPLE_ID": [10, 11, 12], "URL": ["http://a/1", "http://a/2", "http://a/3"], "TEXT": ["one", "two", "three"],
    "HEIGHT": [6, 6, 6], "WIDTH": [8, 8, 8], "LICENSE": ["?", None, "CC-BY"], "NSFW": ["UNLIKELY", "NSFW", None],
    "similarity": [0.31, 0.29, 0.5],
}  # fmt: skip
LAION_2B = {
    "URL": ["http://a/1", "http://a/2"], "TEXT": ["one", "two"], "WIDTH": [8, 8], "HEIGHT": [6, 6],
    "similarity": [0.31, 0.29], "hash": [-5, 5], "punsafe": [0.1, 0.9], "pwatermark": [0.25, 0.5],
    "AESTHETIC_SCORE": [5.5, 6.5],
}  # fmt: skip
COYO = {
    "id": [1, 2], "url": ["http://a/1", "http://a/2"], "text": ["one", "two"], "width": [8, 8], "height": [6, 6],
    "image_phash": ["a", "b"], "text_length": [3, 3], "word_count": [1, 1], "num_tokens_bert": [1, 1],
    "num_tokens_gpt": [1, 1], "num_faces": [0, 2], "clip_similarity_vitb32": [0.25, 0.5],
    "clip_similarity_vitl14": [0.125, 0.5], "nsfw_score_opennsfw2": [0.5, 0.5], "nsfw_score_gantman": [0.5, 0.5],
    "watermark_score": [0.5, 0.5], "aesthetic_score_laion_v2": [4.5, 5.5],
}  # fmt: skip
UIDS = ["139e4a9b22a614771f06c700a8ebe150", "6e356964a967af455c8016b75d691203", "6e356964a967af450000000000000000"]
DATACOMP = {
    "uid": UIDS, "url": [f"http://a/{number}" for number in range(3)], "text": ["one", "two", "three"],
    "original_width": [8, 8, 8], "original_height": [6, 6, 6], "clip_b32_similarity_score": [0.25, 0.5, 0.75],
    "clip_l14_similarity_score": [0.125, 0.5, 0.75], "face_bboxes": [[], [[0.0, 0.1, 0.2, 0.3]], []],
    "sha256": ["0" * 64] * 3,
}  # fmt: skip


def test_laion_by_url_with_what_is_left_over_on_both_sides(tmp_path):
    tars = [write_tar(tmp_path / "00000.tar", *urls(2, 7)), write_tar(tmp_path / "00001.tar", *urls(1))]
    two, without_row, one, without_sample = read(tars, [write_table(tmp_path / "m.parquet", **LAION)])
    assert two.segments[1] == TextSegment("two", True)
    assert two.meta == {"id": "00000.tar/000000000", "url": "http://a/2", "similarity": 0.29, "nsfw": "NSFW"}
    assert one.meta["licence"] == "?" and one.meta["id"] == "00001.tar/000000000"
    assert without_row == Dropped("no_row", "00000.tar/000000001: no_row: no row has url 'http://a/7'")
    assert without_sample == Dropped("row_without_sample", "m.parquet[2]")


def test_laion_2b_in_single_precision_is_filtered_as_it_reads(tmp_path):
    types = {name: pa.float32() for name in ("punsafe", "pwatermark", "AESTHETIC_SCORE")}
    table = write_table(tmp_path / "m.parquet", types, **LAION_2B)
    tars = [write_tar(tmp_path / "00000.tar", *urls(1, 2))]
    one, two = read(tars, [table], "punsafe<=0.1", "similarity>=0.3")
    assert one.meta["punsafe"] == 0.1, "not the nearest float32, 0.10000000149"
    assert {name: one.meta[name] for name in ("pwatermark", "aesthetic_score", "similarity")} == {
        "pwatermark": 0.25, "aesthetic_score": 5.5, "similarity": 0.31,
    }  # fmt: skip
    assert two.reason == "filtered_punsafe"
    assert texts(read(tars, [table], "similarity<0.3", "width>=8", "hash>0")) == ["filtered_similarity", "two"]


def test_coyo_by_url(tmp_path):
    tars = [write_tar(tmp_path / "00000.tar", *urls(1, 2))]
    one, two = read(tars, [write_table(tmp_path / "m.parquet", **COYO)], "num_faces==0")
    assert one.segments[1].text == "one" and two.reason == "filtered_num_faces"
    assert one.meta == {
        "id": "00000.tar/000000000", "url": "http://a/1", "clip_similarity_vitb32": 0.25,
        "clip_similarity_vitl14": 0.125, "nsfw_score_opennsfw2": 0.5, "nsfw_score_gantman": 0.5,
        "watermark_score": 0.5, "aesthetic_score_laion_v2": 4.5,
    }  # fmt: skip


def test_datacomp_by_uid_and_its_subset(tmp_path):
    table = write_table(tmp_path / "m.parquet", **DATACOMP)
    samples = [{"uid": uid, "url": "http://moved"} for uid in (*reversed(UIDS), "f" * 32, "no uid")]
    tars = [write_tar(tmp_path / "00000.tar", *samples)]
    made = read(tars, [table])
    assert texts(made) == ["three", "two", "one", "no_row", "no_uid"]
    assert made[0].meta["uid"] == UIDS[2] and made[0].meta["clip_l14_similarity_score"] == 0.75
    halves = [(int(uid[:16], 16), int(uid[16:32], 16)) for uid in UIDS[:2]]  # as DataComp's own description says
    chosen = np.array(halves, np.dtype("u8,u8"))
    chosen.sort()
    np.save(tmp_path / "s.npy", chosen)
    assert texts(read(tars, [table], subset=tmp_path / "s.npy")) == ["not_in_subset", "two", "one", "no_row", "no_uid"]
    np.save(tmp_path / "s.npy", chosen[:0])
    assert texts(read(tars, [table], subset=tmp_path / "s.npy"))[:3] == ["not_in_subset"] * 3


def test_the_join_can_be_chosen(tmp_path):
    table = write_table(tmp_path / "m.parquet", **DATACOMP)
    tars = [write_tar(tmp_path / "00000.tar", *urls(1))]
    assert texts(read(tars, [table], join="url")) == ["two", "row_without_sample", "row_without_sample"]
    assert texts(read(tars, [table]))[0] == "no_uid"


def test_every_sample_and_every_row_comes_out_once(tmp_path):
    """Random tables and tars against sets of numbers."""
    rng = np.random.default_rng(0)
    tables, tars, rows, samples = [], [], [], []
    for number in range(3):
        rows.append(rng.permutation(100)[:30] + 100 * number)
        tables.append(write_table(tmp_path / f"{number}.parquet", url=[f"http://a/{n}" for n in rows[-1]],
                                  text=[f"text {n}" for n in rows[-1]]))  # fmt: skip
        samples.append(rng.permutation(300)[:20])
        tars.append(write_tar(tmp_path / f"{number:05d}.tar", *urls(*samples[-1])))
    made = read(tars, tables)
    all_rows = list(itertools.chain(*rows))
    expected = [f"text {n}" if n in all_rows else "no_row" for n in itertools.chain(*samples)]
    assert texts(made[:60]) == expected and expected.count("no_row") > 10
    unused = [n for n in all_rows if n not in set(itertools.chain(*samples))]
    assert {sample.reason for sample in made[60:]} == {"row_without_sample"}
    places = [f"{file}.parquet[{place}]" for file in range(3) for place in range(30) if rows[file][place] in unused]
    assert [sample.where for sample in made[60:]] == places


def test_of_rows_with_one_url_the_one_with_the_caption_of_the_sample_is_taken(tmp_path):
    table = write_table(tmp_path / "m.parquet", url=["http://a/1"] * 3, text=["one", "two", "three"])
    samples = [{"url": "http://a/1", "caption": caption} for caption in ("two", "other", "two")]
    made = read([write_tar(tmp_path / "00000.tar", *samples)], [table])
    assert texts(made) == ["two", "one", "two", "row_without_sample"]
    assert made[-1].where == "m.parquet[2]"


def test_samples_and_rows_that_nothing_is_known_of(tmp_path):
    table = write_table(tmp_path / "m.parquet", url=[None, "", "http://a/1"], text=["x", "y", "one"])
    samples = [None, {"url": None}, {"url": "http://a/1", "status": "failed_to_download"}, *urls(1)]
    made = read([write_tar(tmp_path / "00000.tar", *samples)], [table])
    assert texts(made) == ["no_url", "no_url", "download_failed", "one", "row_without_key", "row_without_key"]
    assert [sample.where for sample in made[-2:]] == ["m.parquet[0]", "m.parquet[1]"]


def test_tables_may_differ_in_case_type_and_scores(tmp_path):
    tables = [
        write_table(tmp_path / "0.parquet", {"similarity": pa.float32()}, URL=["http://a/1"], TEXT=["one"],
                    similarity=[0.3]),
        write_table(tmp_path / "1.parquet", url=["http://a/2"], text=["two"], SIMILARITY=[1], punsafe=[0.5]),
        write_table(tmp_path / "2.parquet", {"url": pa.large_string(), "text": pa.large_string()}, url=["http://a/3"],
                    text=["three"], license=["CC0"]),
    ]  # fmt: skip
    made = read([write_tar(tmp_path / "00000.tar", *urls(1, 2, 3))], tables)
    assert texts(made) == ["one", "two", "three"]
    assert [set(record.meta) - {"id", "url"} for record in made] == [
        {"similarity"}, {"similarity", "punsafe"}, {"licence"},
    ]  # fmt: skip
    assert [record.meta.get("similarity") for record in made] == [0.3, 1.0, None]


FAULTS = {
    "no_caption_column": ({"url": ["x"], "title": ["y"]}, {}, r"m\.parquet: no column 'text'; the file has url, title"),
    "no_key_column": ({"text": ["y"]}, {}, r"m\.parquet: no column 'url'"),
    "no_filter_column": ({"url": ["x"], "text": ["y"]}, {"filters": filters("s>1")}, r"m\.parquet: no column 's'"),
    "two_columns": ({"URL": ["x"], "Url": ["y"], "text": ["z"]}, {}, r"m\.parquet: columns URL and Url differ in case"),
    "filter_on_text": (
        {"url": ["x"], "text": ["y"], "NSFW": ["UNLIKELY"]}, {"filters": filters("nsfw>1")},
        r"m\.parquet: column 'NSFW' \(string\) cannot be read as double: .*UNLIKELY",
    ),
    "score_is_a_list": (
        {"url": ["x"], "text": ["y"], "punsafe": [[0.1]]}, {},
        r"m\.parquet: column 'punsafe' .*cannot be read as double",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FAULTS)
def test_tables_that_do_not_fit_are_named(tmp_path, name):
    columns, options, message = FAULTS[name]
    table = write_table(tmp_path / "m.parquet", **columns)
    with pytest.raises(ValueError, match=message):
        list(read_web_metadata([], [table], WebMetadataOptions("set", **options)))


def test_other_and_damaged_files_are_named(tmp_path):
    path = tmp_path / "m.parquet"
    with pytest.raises(ValueError, match="--metadata: give the parquet files"):
        read([], [])
    with pytest.raises(ValueError, match=r"m\.parquet: no readable parquet file"):
        read([], [path])
    captions = pa.array([b"a dog", b"\xff\xfe"], pa.binary()).view(pa.string())
    pq.write_table(pa.table({"url": pa.array(["x", "y"]), "text": captions}), path)
    with pytest.raises(ValueError, match=r"m\.parquet: damaged after row 0: .*fetch the file again"):
        read([], [path])
    captions = [f"caption {n} " * 20 for n in range(600)]
    table = pa.table({"url": [str(n) for n in range(600)], "text": captions})
    pq.write_table(table, path, row_group_size=300, use_dictionary=False, compression="zstd")
    whole, start = path.read_bytes(), pq.ParquetFile(path).metadata.row_group(1).column(1).data_page_offset
    path.write_bytes(whole[:start] + b"\xff" * 60 + whole[start + 60 :])
    with pytest.raises(ValueError, match=r"m\.parquet: damaged after row \d+"):
        read([], [path])


def test_rows_are_held_up_to_a_bound(tmp_path, monkeypatch):
    tables = [
        write_table(tmp_path / f"{number}.parquet", url=[f"http://a/{n}" for n in range(100)], text=["x" * 60] * 100)
        for number in range(3)
    ]
    monkeypatch.setattr(web_metadata, "MAX_TABLE_BYTES", 20_000)
    assert len(read([], tables[:2])) == 200
    with pytest.raises(
        ValueError, match=r"2\.parquet: the 300 rows so far take more than 20000 bytes; convert the set"
    ):
        read([], tables)


def test_faulty_subsets_are_named(tmp_path):
    path = tmp_path / "s.npy"
    for content, message in {
        "missing": "no readable", "text": "no readable", "objects": "no readable",
        "floats": r"this is float64 \(3,\)", "table": "this is", "unsorted": "not sorted", "low_unsorted": "not sorted",
    }.items():  # fmt: skip
        match content:
            case "text":
                path.write_bytes(b"no array")
            case "objects":
                np.save(path, np.array([{}, []], object))
            case "floats":
                np.save(path, np.zeros(3))
            case "table":
                np.save(path, np.zeros((2, 2), np.dtype("u8,u8")))
            case "unsorted":
                np.save(path, np.array([(2, 0), (1, 9)], np.dtype("u8,u8")))
            case "low_unsorted":
                np.save(path, np.array([(1, 2), (1, 1)], np.dtype("u8,u8")))
        with pytest.raises(ValueError, match=rf"s\.npy: .*{message}"):
            read_subset(path)
    table = write_table(tmp_path / "m.parquet", url=["x"], text=["y"])
    with pytest.raises(ValueError, match=r"s\.npy: a subset is of uids, and the metadata has URLs alone"):
        read([], [table], subset=path)


def test_a_subset_is_checked_for_order_across_its_blocks(tmp_path, monkeypatch):
    monkeypatch.setattr(web_metadata, "_SUBSET_BLOCK", 2)
    for values in ([1, 2, 3, 4, 5], [1, 2, 1, 4, 5], [1, 2, 3, 4, 0]):
        np.save(tmp_path / "s.npy", np.array([(0, value) for value in values], np.dtype("u8,u8")))
        if values == sorted(values):
            assert len(read_subset(tmp_path / "s.npy")) == 5
        else:
            with pytest.raises(ValueError, match="not sorted"):
                read_subset(tmp_path / "s.npy")


@pytest.mark.skipif(not (DATA / "clothing").is_dir(), reason=f"the real data are not in {DATA}")
def test_the_shared_photos_join_a_table_of_their_urls(tmp_path):
    from data_pipelines.webdataset import metadata_of, read_samples

    tars = [DATA / "clothing" / name for name in ("00000.tar", "00001.tar", "val-00000.tar")]
    found = [metadata_of(sample)["url"] for tar in tars for sample in read_samples(tar)]
    table = write_table(tmp_path / "m.parquet", URL=found, TEXT=[f"photo {n}" for n in range(len(found))])
    assert texts(read(tars, [table])) == [f"photo {n}" for n in range(276)]
