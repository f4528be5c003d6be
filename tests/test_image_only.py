"""Images without text from folders and archives; what else lies there is counted; and the shared photos of signs."""

import io
import os
import tarfile
import zipfile
from pathlib import Path

import pytest
from PIL import Image

from data_pipelines.entries import Dropped
from data_pipelines.image_only import parse_image, read_image_only
from unihetero_jax.data.records import ImageSegment, Record

DATA = Path(os.environ.get("UNIHETERO_REAL_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))


def encoded(color="red", kind="PNG", size=(8, 6)):
    buffer = io.BytesIO()
    Image.new("RGB", size, color).save(buffer, kind)
    return buffer.getvalue()


RED = ImageSegment(encoded(), 6, 8)
BLUE = ImageSegment(encoded("blue", "JPEG", (4, 10)), 10, 4)


def described(samples):
    return [
        (sample.reason, sample.where) if isinstance(sample, Dropped) else (sample.meta["id"], sample.segments[0])
        for sample in samples
    ]


def test_an_image_is_a_record_of_itself():
    record = parse_image(RED.data, "set", "f/a.png")
    assert record == Record("set", "image_only", (RED,), {"id": "f/a.png"})
    assert record.where == "f/a.png"
    dropped = parse_image(b"<html>", "set", "f/a.png")
    assert dropped.reason == "not_an_image" and dropped.where.startswith("f/a.png: not_an_image")


def test_a_folder_is_read_with_those_below_it_in_order(tmp_path):
    root = tmp_path / "f"
    files = {
        "b.png": RED.data, "a.JPEG": BLUE.data, "notes.txt": b"x", "z/1.png": RED.data, "c/d/2.png": RED.data,
        "c/3.png": b"no image", "c.png": RED.data,
    }  # fmt: skip
    for name, data in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    first, *rest = read_image_only([root], "set")
    assert described([first, *rest[:3], *rest[4:]]) == [
        ("f/a.JPEG", BLUE), ("f/b.png", RED), ("f/c.png", RED), ("other_file", "'f/notes.txt'"),
        ("f/c/d/2.png", RED), ("f/z/1.png", RED),
    ]  # fmt: skip
    assert rest[3].reason == "not_an_image" and rest[3].where.startswith("f/c/3.png: ")


def test_links_and_what_is_no_file_are_counted(tmp_path):
    root, other = tmp_path / "f", tmp_path / "other"
    root.mkdir()
    other.mkdir()
    (other / "x.png").write_bytes(RED.data)
    (root / "in.png").write_bytes(RED.data)
    (root / "again.png").symlink_to("in.png")
    (root / "folder").symlink_to(other)
    (root / "loop").symlink_to(root)
    (root / "lost.png").symlink_to("gone.png")
    (root / "out.png").symlink_to(other / "x.png")
    os.mkfifo(root / "pipe.png")
    (root / os.fsdecode(b"\xff.png")).write_bytes(RED.data)
    made = described(read_image_only([root], "set"))
    assert [name for name, _ in made] == [
        "f/again.png", "link_to_folder", "f/in.png", "link_to_folder", "missing_image", "unsafe_path", "special_file",
        "invalid_name",
    ]  # fmt: skip
    for _, where in made[3:]:
        where.encode()


@pytest.mark.parametrize("mode", ["w", "w:gz"])
def test_archives_are_read_in_their_order(tmp_path, mode):
    path = tmp_path / "images.tar"
    with tarfile.open(path, mode) as archive:
        for name, data in {"z/b.png": RED.data, "./a.jpg": BLUE.data, "labels.csv": b"x", "bad.jpg": b""}.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
        link = tarfile.TarInfo("link.png")
        link.type, link.linkname = tarfile.LNKTYPE, "z/b.png"
        archive.addfile(link)
    *made, bad, refused = read_image_only([path], "set")
    assert described(made) == [
        ("images.tar/z/b.png", RED), ("images.tar/a.jpg", BLUE), ("other_file", "images.tar, member 'labels.csv'"),
    ]  # fmt: skip
    assert bad.reason == "empty_image" and bad.where.startswith("images.tar/bad.jpg: ")
    assert refused == Dropped("link_member", "images.tar, member 'link.png'")


def test_folders_and_archives_in_the_order_given(tmp_path):
    (tmp_path / "f").mkdir()
    (tmp_path / "f" / "1.png").write_bytes(RED.data)
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("2.png", BLUE.data)
    made = read_image_only([tmp_path / "f", tmp_path / "a.zip"], "set")
    assert described(made) == [("f/1.png", RED), ("a.zip/2.png", BLUE)]


def test_what_is_neither_is_named(tmp_path):
    (tmp_path / "a.png").write_bytes(RED.data)
    with pytest.raises(ValueError, match=r"a\.png: neither a tar"):
        list(read_image_only([tmp_path / "a.png"], "set"))
    with pytest.raises(ValueError, match=r"gone: cannot be read"):
        list(read_image_only([tmp_path / "gone"], "set"))


def test_a_folder_that_cannot_be_listed_is_named(tmp_path, monkeypatch):
    (tmp_path / "f").mkdir()

    def refuse(path):  # a mode would not do: the tests may run as root
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(ValueError, match=r"f: cannot be listed: .*Permission denied"):
        list(read_image_only([tmp_path / "f"], "set"))


@pytest.mark.skipif(not (DATA / "sign_digits").is_dir(), reason=f"the real data are not in {DATA}")
def test_the_shared_photos_are_whole():
    """Counts as the raw folder's own description states them."""
    for name, count in {"train": 500, "val": 100}.items():
        made = list(read_image_only([DATA / "sign_digits" / f"{name}.tar"], "signs"))
        assert {type(sample) for sample in made} == {Record} and len(made) == count
        assert {(segment.height, segment.width) for record in made for segment in record.segments} == {(100, 100)}
        assert made[0].meta == {"id": f"{name}.tar/{name}/00000.jpg"}
