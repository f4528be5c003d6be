"""Tars of samples to records: literal members in, literal records or reasons out; and the shared clothing photos."""

import hashlib
import io
import json
import os
import tarfile
from pathlib import Path

import pytest
from PIL import Image

from data_pipelines import webdataset
from data_pipelines.entries import Dropped
from data_pipelines.webdataset import Sample, WebdatasetOptions, parse_sample, read_samples, read_webdataset
from unihetero_jax.data.records import ImageSegment, Record, TextSegment

DATA = Path(os.environ.get("UNIHETERO_REAL_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))


def encoded(color="red", kind="PNG", size=(8, 6)):
    buffer = io.BytesIO()
    Image.new("RGB", size, color).save(buffer, kind)
    return buffer.getvalue()


RED = ImageSegment(encoded(), 6, 8)
BLUE = ImageSegment(encoded("blue", "WEBP", (4, 10)), 10, 4)
NAME = "00000.tar/000000003"


def fields(**changes):
    """A json as img2dataset writes it."""
    stated = {
        "caption": "a red thing.", "url": "http://a/red.png", "key": "000000003", "status": "success",
        "error_message": None, "width": 8, "height": 6, "original_width": 8, "original_height": 6, "exif": "{}",
        "sha256": hashlib.sha256(RED.data).hexdigest(),
    }  # fmt: skip
    return json.dumps(stated | changes).encode()


def parse(*members, **options):
    return parse_sample(Sample(NAME, members), WebdatasetOptions("set", **options))


IMAGE, TEXT, JSON = ("png", RED.data), ("txt", b" a red thing. \n"), ("json", fields())


def test_an_image_and_its_caption_are_a_pair():
    record = parse(IMAGE, JSON, TEXT)
    meta = {"id": NAME, "url": "http://a/red.png"}
    assert record == Record("set", "caption", (RED, TextSegment("a red thing.", True)), meta)
    assert record.where == NAME


def test_a_sample_without_json_and_one_with_a_class():
    assert parse(IMAGE, TEXT).meta == {"id": NAME}
    assert parse(IMAGE, TEXT, ("cls", b"7\n")).meta == {"id": NAME, "cls": 7}
    assert parse(IMAGE, TEXT, ("cls", b"n01440764")).meta == {"id": NAME, "cls": "n01440764"}


def test_the_caption_may_be_a_field_of_the_json():
    record = parse(IMAGE, TEXT, ("json", fields(re_caption="a square, red.")), caption_field="re_caption")
    assert record.segments[1] == TextSegment("a square, red.", True)
    assert parse(IMAGE, TEXT, JSON, caption_field="re_caption").reason == "no_caption"


def test_a_text_may_begin_with_a_byte_order_mark():
    assert parse(IMAGE, ("txt", b"\xef\xbb\xbfred")).segments[1].text == "red"


@pytest.mark.parametrize("name", ["sha256", "sha512", "md5"])
def test_a_hash_counts_only_where_images_are_stored_as_they_came(name):
    other = ("json", fields(**{"sha256": None, name: hashlib.new(name, b"before it was encoded anew").hexdigest()}))
    right = ("json", fields(**{"sha256": None, name: hashlib.new(name, RED.data).hexdigest().upper()}))
    assert isinstance(parse(IMAGE, TEXT, other), Record)
    assert parse(IMAGE, TEXT, other, verify_hash=True).reason == "hash_mismatch"
    assert isinstance(parse(IMAGE, TEXT, right, verify_hash=True), Record)
    assert isinstance(parse(IMAGE, TEXT, verify_hash=True), Record), "nothing is stated"


REFUSED = {
    "no_image": ([TEXT, JSON], "no_image"),
    "two_images": ([IMAGE, ("jpg", RED.data), TEXT], "several_images"),
    "no_caption": ([IMAGE, JSON], "no_caption"),
    "blank_caption": ([IMAGE, ("txt", b" \n")], "empty_caption"),
    "two_captions": ([IMAGE, TEXT, TEXT], "several_members"),
    "not_an_image": ([("jpg", b"<html>"), TEXT], "not_an_image"),
    "empty_image": ([("jpg", b""), TEXT], "empty_image"),
    "no_unicode": ([IMAGE, ("txt", b"caf\xe9")], "invalid_text"),
    "class_no_unicode": ([IMAGE, TEXT, ("cls", b"\xff")], "invalid_text"),
    "not_json": ([IMAGE, TEXT, ("json", b"{")], "not_json"),
    "nested_json": ([IMAGE, TEXT, ("json", b"[" * 100_000)], "not_json"),
    "no_object": ([IMAGE, TEXT, ("json", b"[1]")], "not_an_object"),
    "failed": ([IMAGE, TEXT, ("json", fields(status="failed_to_resize"))], "download_failed"),
    "no_status": ([IMAGE, TEXT, ("json", fields(status=None))], "download_failed"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_makes_no_record_has_a_reason_and_a_place(name):
    members, reason = REFUSED[name]
    dropped = parse(*members)
    assert isinstance(dropped, Dropped)
    assert dropped.reason == reason
    assert dropped.where.startswith(f"{NAME}: {reason}")


def test_a_caption_that_is_no_text():
    assert parse(IMAGE, ("json", fields(caption=5)), caption_field="caption").reason == "empty_caption"


# ---------------------------------------------------------------- shards


def write_tar(path, *members):
    with tarfile.open(path, "w") as archive:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def described(samples):
    return [
        sample.reason if isinstance(sample, Dropped) else (sample.name, *(extension for extension, _ in sample.members))
        for sample in samples
    ]


def test_samples_are_what_shares_a_name_up_to_its_first_dot(tmp_path):
    members = [
        ("./a.JPG", b"1"), ("./a.txt", b"2"), ("sub/a.jpeg", b"3"), ("sub/a.seg.png", b"4"), ("sub/a.json", b"5"),
        ("sub.1/b.png", b"6"), ("sub.1/c.webp", b"7"), ("sub.1/c.cls", b"8"), ("README", b"9"), ("d/.DS_Store", b""),
        ("e.npz", b"0"),
    ]  # fmt: skip
    assert described(read_samples(write_tar(tmp_path / "s.tar", *members))) == [
        ("s.tar/a", "jpg", "txt"), "unused_member", ("s.tar/sub/a", "jpeg", "json"), ("s.tar/sub.1/b", "png"),
        "no_key", "no_key", "unused_member", ("s.tar/sub.1/c", "webp", "cls"),
    ]  # fmt: skip


def test_a_key_that_comes_again_later_is_another_sample(tmp_path):
    members = [("a.png", RED.data), ("b.png", BLUE.data), ("a.txt", b"red"), ("b.txt", b"blue")]
    path = write_tar(tmp_path / "s.tar", *members)
    assert described(read_webdataset([path], WebdatasetOptions("set"))) == [
        "no_caption", "no_caption", "no_image", "no_image",
    ]  # fmt: skip


def test_names_that_differ_in_case_do_not_choose_an_image(tmp_path):
    path = write_tar(tmp_path / "s.tar", ("a.png", RED.data), ("a.PNG", BLUE.data), ("a.txt", b"red"))
    assert described(read_webdataset([path], WebdatasetOptions("set"))) == ["several_images"]


def test_keys_begin_anew_in_each_shard_and_shards_are_read_in_order(tmp_path):
    paths = [
        write_tar(tmp_path / "00001.tar", ("0.png", RED.data), ("0.txt", b"red"), ("1.txt", b"lost")),
        write_tar(tmp_path / "00000.tar", ("0.webp", BLUE.data), ("0.txt", b"blue")),
    ]
    red, lost, blue = read_webdataset(paths, WebdatasetOptions("set"))
    assert red == Record("set", "caption", (RED, TextSegment("red", True)), {"id": "00001.tar/0"})
    assert blue == Record("set", "caption", (BLUE, TextSegment("blue", True)), {"id": "00000.tar/0"})
    assert (lost.reason, lost.where) == ("no_image", "00001.tar/1: no_image: members txt")


def test_what_an_archive_refuses_is_counted_with_its_sample(tmp_path):
    path = tmp_path / "s.tar"
    with tarfile.open(path, "w") as archive:
        link = tarfile.TarInfo("0.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
        text = tarfile.TarInfo("0.txt")
        archive.addfile(text)
    assert described(read_webdataset([path], WebdatasetOptions("set"))) == ["link_member", "no_image"]


def test_a_sample_is_held_up_to_a_bound(tmp_path, monkeypatch):
    monkeypatch.setattr(webdataset, "MAX_SAMPLE_BYTES", 10)
    path = write_tar(tmp_path / "s.tar", ("0.png", b"12345678"), ("0.txt", b"123"), ("1.txt", b"1234567890"))
    samples = list(read_samples(path))
    assert described(samples) == ["sample_too_large", ("s.tar/0", "png"), ("s.tar/1", "txt")]
    assert samples[0].where == "s.tar, member '0.txt': 11 bytes with the members before it, limit 10"


STATISTICS = {
    "right": ('{"count": 3, "successes": 2}', []),
    "more": ('{"count": 3, "successes": 3}', ["other_sample_count"]),
    "no_number": ('{"count": 3, "successes": "2"}', ["other_sample_count"]),
    "no_successes": ('{"count": 3}', ["bad_statistics"]),
    "no_object": ("[2]", ["bad_statistics"]),
    "no_json": ("{", ["bad_statistics"]),
}


@pytest.mark.parametrize("name", STATISTICS)
def test_the_number_of_images_is_compared_with_the_statistics(tmp_path, name):
    content, reasons = STATISTICS[name]
    members = [("0.png", RED.data), ("0.txt", b"red"), ("1.png", b"no image"), ("1.txt", b"x"), ("2.txt", b"x")]
    path = write_tar(tmp_path / "00000.tar", *members)
    (tmp_path / "00000_stats.json").write_text(content)
    made = list(read_webdataset([path], WebdatasetOptions("set")))
    assert described(made[1:]) == ["not_an_image", "no_image", *reasons]
    if name == "more":
        assert made[-1].where == "00000.tar: 2 images, but 00000_stats.json states 3"


def test_a_shard_that_was_cut_short_is_named_after_its_samples(tmp_path):
    members = [("0.png", RED.data), ("0.txt", b"red"), ("1.txt", b"x"), ("2.png", bytes(2000))]
    path = write_tar(tmp_path / "00000.tar", *members)
    os.truncate(path, 5 * 512 + 512 * 2)
    samples = read_webdataset([path], WebdatasetOptions("set"))
    assert next(samples).segments[0] == RED
    with pytest.raises(
        ValueError, match=r"00000\.tar: ends within member '2\.png', at byte 3584; fetch the file again"
    ):
        next(samples)


@pytest.mark.skipif(not (DATA / "clothing").is_dir(), reason=f"the real data are not in {DATA}")
@pytest.mark.parametrize("verify_hash", [False, True])
def test_the_shared_photos_are_whole(verify_hash):
    """Counts as the raw folder's own description states them; its hashes are of the stored bytes."""
    shards = {200: ["00000.tar", "00001.tar"], 76: ["val-00000.tar"]}
    for count, names in shards.items():
        paths = [DATA / "clothing" / name for name in names]
        made = list(read_webdataset(paths, WebdatasetOptions("clothing", verify_hash=verify_hash)))
        assert [sample for sample in made if isinstance(sample, Dropped)] == []
        assert len(made) == count
        assert len({record.meta["id"] for record in made}) == count
    assert made[0].meta == {"id": "val-00000.tar/000000000", "url": made[0].meta["url"]}
    assert made[0].segments[1].text.startswith("a photo of ")
