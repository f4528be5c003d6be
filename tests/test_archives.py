"""Tar and zip archives: what is read of good ones, and what becomes of hostile and damaged ones; nothing is written."""

import bz2
import gzip
import io
import lzma
import os
import random
import stat
import struct
import subprocess
import tarfile
import zipfile
import zlib

import pytest

from data_pipelines.archives import ArchiveLimits, Member, read_members, tar_index
from data_pipelines.entries import Dropped
from data_pipelines.image_files import ImageFiles, read_image_map
from unihetero_jax.data.records import RecordError

LIMITS = ArchiveLimits(max_member_bytes=5000, max_entries=20, max_ratio=50, free_bytes=20_000)
FILES = {"a.jpg": b"first", "sub/b.txt": bytes(range(256)) * 5, "empty": b"", "c": b"x" * 512}


def header(name="x", size=0, kind=b"0", **fields):
    """A header as POSIX lays it out, with any field replaced by raw bytes, and a right checksum."""
    field = {
        "name": name if isinstance(name, bytes) else name.encode(), "mode": b"0000644\0", "uid": b"0000000\0",
        "gid": b"0000000\0", "size": b"%011o\0" % size if isinstance(size, int) else size, "mtime": b"00000000000\0",
        "checksum": b" " * 8, "kind": kind, "link": b"", "magic": b"ustar\x0000", "users": b"", "devices": b"",
        "prefix": b"",
    } | fields  # fmt: skip
    sizes = {
        "name": 100, "mode": 8, "uid": 8, "gid": 8, "size": 12, "mtime": 12, "checksum": 8, "kind": 1, "link": 100,
        "magic": 8, "users": 64, "devices": 16, "prefix": 167,
    }  # fmt: skip
    block = b"".join(field[key].ljust(length, b"\0") for key, length in sizes.items())
    assert len(block) == 512
    return block[:148] + b"%06o\0 " % sum(block) + block[156:]


def padded(data):
    return data + bytes(-len(data) % 512)


def entry(name="x", data=b"", kind=b"0", **fields):
    return header(name, len(data), kind, **fields) + padded(data)


def pax(kind=b"x", **records):
    lines = b""
    for key, value in records.items():
        rest = b" " + key.encode() + b"=" + value + b"\n"
        length = len(rest) + 1
        while len(b"%d" % length) + len(rest) != length:
            length += 1
        lines += b"%d" % length + rest
    return entry("pax", lines, kind)


END = bytes(1024)
LAST = entry("last", b"kept")


def tar(*parts):
    return b"".join(parts) + LAST + END


def write_tar(path, files=FILES, mode="w", form=tarfile.PAX_FORMAT):
    with tarfile.open(path, mode, format=form) as archive:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def read(tmp_path, content, limits=LIMITS, name="t.tar"):
    (tmp_path / name).write_bytes(content)
    return list(read_members(tmp_path / name, limits))


def found(members):
    return [member.reason if isinstance(member, Dropped) else (member.name, member.data) for member in members]


KEPT = ("last", b"kept")


# ---------------------------------------------------------------- what is read


@pytest.mark.parametrize("mode", ["w", "w:gz", "w:bz2", "w:xz"])
def test_tars_are_read_in_order_whatever_their_compression(tmp_path, mode):
    path = write_tar(tmp_path / "named-anyhow", mode=mode)
    members = list(read_members(path))
    assert [(member.name, member.data) for member in members] == list(FILES.items())
    assert members[1].where == "named-anyhow, member 'sub/b.txt'"


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_names_in_every_form(tmp_path, form):
    files = {"d" * 90 + "/" + "e" * 60 + ".jpg": b"long", "plain": b"short"}
    if form != tarfile.USTAR_FORMAT:
        files |= {"f" * 200: b"longer", "g/" * 200 + "\u00e9.png": b"longest"}
    path = write_tar(tmp_path / "t.tar", files, form=form)
    assert found(read_members(path)) == list(files.items())
    assert {name: (path.read_bytes()[at.offset :][: at.size]) for name, at in tar_index(path).items()} == files


@pytest.mark.parametrize("form", ["v7", "oldgnu", "gnu", "ustar", "pax"])
def test_tars_of_the_tar_command_with_folders(tmp_path, form):
    (tmp_path / "in" / "sub").mkdir(parents=True)
    for name in ("a.jpg", "sub/b.txt", "empty", "c"):
        (tmp_path / "in" / name).write_bytes(FILES[name])
    subprocess.run(["tar", f"--format={form}", "-cf", tmp_path / "t.tar", "-C", tmp_path / "in", "."], check=True)
    assert dict(found(read_members(tmp_path / "t.tar"))) == FILES, "names have no ./ and folders are no members"


def test_zips_are_read_in_order_and_folders_passed_over(tmp_path):
    with zipfile.ZipFile(tmp_path / "z.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.mkdir("sub")
        for name, data in FILES.items():
            archive.writestr(name, data)
    assert found(read_members(tmp_path / "z.zip")) == list(FILES.items())


def test_an_empty_tar_has_no_members(tmp_path):
    assert read(tmp_path, bytes(10240)) == []


# ---------------------------------------------------------------- members that are refused alone


REFUSED = {
    "absolute": (entry("/etc/passwd", b"x"), "unsafe_path"),
    "parent": (entry("a/../../x.jpg", b"x"), "unsafe_path"),
    "parent_in_prefix": (entry("x.jpg", b"x", prefix=b".."), "unsafe_path"),
    "backslash": (entry("..\\x.jpg", b"x"), "unsafe_path"),
    "no_unicode": (entry(b"\xff\xfe.jpg", b"x"), "invalid_name"),
    "folder_as_file": (entry("./", b"x"), "invalid_name"),
    "no_name": (entry("", b"x"), "invalid_name"),
    "symbolic_link": (entry("x", kind=b"2", link=b"/etc/passwd"), "link_member"),
    "hard_link": (entry("x", kind=b"1", link=b"last"), "link_member"),
    "character_device": (entry("x", kind=b"3"), "special_member"),
    "block_device": (entry("x", kind=b"4"), "special_member"),
    "fifo": (entry("x", kind=b"6"), "special_member"),
    "sparse": (entry("x", b"holes", kind=b"S"), "sparse_member"),
    "volume": (entry("x", kind=b"V"), "unknown_member_kind"),
    "too_large": (entry("x", bytes(5001)), "member_too_large"),
    "pax_leads_outside": (pax(path=b"../x") + entry("x", b"x"), "unsafe_path"),
    "pax_is_absolute": (pax(path=b"/x") + entry("x", b"x"), "unsafe_path"),
    "pax_holds_nul": (pax(path=b"x\0.jpg") + entry("x", b"x"), "unsafe_path"),
    "pax_no_unicode": (pax(path=b"\xff") + entry("x", b"x"), "invalid_name"),
    "pax_sparse": (pax(**{"GNU.sparse.realsize": b"9"}) + entry("x", b"x"), "sparse_member"),
    "pax_size": (pax(size=b"6000") + header("x", 1) + padded(bytes(6000)), "member_too_large"),
    "gnu_long_name_leads_outside": (entry("L", b"../x\0", kind=b"L") + entry("x", b"x"), "unsafe_path"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_members_are_refused_alone(tmp_path, name):
    content, reason = REFUSED[name]
    refused, last = read(tmp_path, tar(content))
    assert isinstance(refused, Dropped) and refused.reason == reason
    assert refused.where.startswith("t.tar, member '")
    refused.where.encode()  # can be printed
    assert found([last]) == [KEPT]


def test_a_link_states_no_content_whatever_its_size_says(tmp_path):
    content = header("x", 512, b"2", link=b"y")
    assert found(read(tmp_path, tar(content))) == ["link_member", KEPT]


def test_of_equal_names_the_first_is_read(tmp_path):
    content = tar(entry("a.jpg", b"one"), entry("./a.jpg", b"two"), pax(path=b"a.jpg") + entry("b.jpg", b"three"))
    assert found(read(tmp_path, content)) == [("a.jpg", b"one"), "duplicate_member", "duplicate_member", KEPT]


def test_pax_records_of_all_members_and_of_one(tmp_path):
    content = tar(pax(b"g", comment=b"a commit", path=b"all"), entry("x", b"1"), pax(path=b"one"), entry("y", b"2"))
    assert found(read(tmp_path, content)) == [("all", b"1"), ("one", b"2"), "duplicate_member"]


@pytest.mark.parametrize("size", [b"\x80" + (3).to_bytes(11, "big"), b"3", b"3 ", b"     3 \0", b"00000000003"])
def test_sizes_in_every_form(tmp_path, size):
    assert found(read(tmp_path, tar(header("x", size) + padded(b"abc")))) == [("x", b"abc"), KEPT]


def test_a_prefix_is_part_of_the_name_in_posix_form_alone(tmp_path):
    content = entry("x", b"1", prefix=b"sub"), entry("y", b"2", prefix=b"0777", magic=b"ustar  \0")
    assert found(read(tmp_path, tar(*content))) == [("sub/x", b"1"), ("y", b"2"), KEPT]


def test_checksums_of_signed_bytes_are_accepted(tmp_path):
    block = header("\u00e9", 0)
    signed = sum(struct.unpack("512b", block[:148] + b" " * 8 + block[156:]))
    assert signed != sum(block[:148] + b" " * 8 + block[156:])
    assert found(read(tmp_path, tar(block[:148] + b"%06o\0 " % signed + block[156:]))) == [("\u00e9", b""), KEPT]


# ---------------------------------------------------------------- tars that are refused as a whole


BROKEN = {
    "negative_size": (header("x", b"\xff" * 12), "impossible size"),
    "size_of_letters": (header("x", b"0000000a000\0"), "impossible size"),
    "signed_size": (header("x", b"-0000000001\0"), "impossible size"),
    "absurd_size": (header("x", b"\x80" + b"\x7f" * 11), "ends within member 'x'"),
    "size_beyond_the_end": (header("x", 5000), "ends within member 'x'"),
    "damaged_header": (entry("x", b"x")[:100] + b"?" + entry("x", b"x")[101:], "damaged header"),
    "content_taken_for_a_header": (header("x", 0) + padded(b"more than was stated"), "damaged header"),
    "pax_negative_size": (pax(size=b"-512") + entry("x", b"x"), "impossible size"),
    "pax_endless_size": (pax(size=b"9" * 5000) + entry("x", b"x"), "impossible size"),
    "pax_record_of_length_0": (entry("p", b"0 path=x\n", b"x") + entry("x"), "damaged extended header"),
    "pax_record_beyond_its_end": (entry("p", b"99 path=x\n", b"x") + entry("x"), "damaged extended header"),
    "pax_record_cut_short": (entry("p", b"9 path=xx\n", b"x") + entry("x"), "damaged extended header"),
    "pax_without_length": (entry("p", b"path=x\n", b"x") + entry("x"), "damaged extended header"),
    "huge_pax_header": (header("p", 1 << 32, b"x"), "extended header of 4294967296 bytes"),
    "huge_gnu_name": (header("p", 1 << 32, b"L"), "extended header of 4294967296 bytes"),
}


@pytest.mark.parametrize("name", BROKEN)
@pytest.mark.parametrize("pack", [bytes, gzip.compress])
def test_damage_is_reported_after_what_came_before(tmp_path, name, pack):
    content, message = BROKEN[name]
    path = tmp_path / "t.tar"
    path.write_bytes(pack(entry("before", b"read") + content + LAST + END))
    members = read_members(path, LIMITS)
    assert next(members) == Member("before", b"read", "t.tar, member 'before'")
    with pytest.raises(ValueError, match=rf"t\.tar: .*{message}.*, at byte \d+; fetch the file again"):
        for member in members:
            assert isinstance(member, Dropped) or member.name == "x"
    if pack is bytes:
        with pytest.raises(ValueError, match=message):
            tar_index(path, LIMITS)


def test_a_tar_cut_anywhere_says_so(tmp_path):
    whole = entry("a", b"1" * 600) + entry("b", b"2" * 512)
    for length in range(1536, len(whole) + 512, 64):
        with pytest.raises(ValueError, match=r"t\.tar: ends (before its end mark|within member 'b'), at byte"):
            read(tmp_path, (whole + END)[:length])
    for length in range(len(whole) + 512, len(whole) + 1025, 64):
        assert len(read(tmp_path, (whole + END)[:length])) == 2, "one block of zeros is an end mark"


PACKERS = {"gz": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress}


@pytest.mark.parametrize("kind", PACKERS)
def test_a_compressed_tar_cut_short_or_damaged_says_so(tmp_path, kind):
    noise = {f"{number}.jpg": os.urandom(5000) for number in range(15)}
    data = PACKERS[kind](write_tar(tmp_path / "whole.tar", noise).read_bytes())
    path = tmp_path / f"t.tar.{kind}"
    path.write_bytes(data)
    assert dict(found(read_members(path))) == noise
    half = len(data) // 2
    for damaged in (data[:half], data[:-3], data[:half] + b"\xff" * 8 + data[half + 8 :]):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=rf"t\.tar\.{kind}: .* at byte \d+; fetch the file again"):
            list(read_members(path))


def test_what_comes_before_the_cut_is_given_out(tmp_path):
    noise = {f"{number}.jpg": os.urandom(50_000) for number in range(10)}
    data = gzip.compress(write_tar(tmp_path / "whole.tar", noise).read_bytes())
    (tmp_path / "t.tar.gz").write_bytes(data[: len(data) // 2])
    seen = []
    with pytest.raises(ValueError, match=r"damaged within member '[45]\.jpg'"):
        for member in read_members(tmp_path / "t.tar.gz"):
            seen.append(member)
    assert found(seen) == list(noise.items())[: len(seen)] and len(seen) >= 4


def test_tars_joined_by_cat_are_not_read_in_part_only(tmp_path):
    with pytest.raises(ValueError, match=r"goes on after its end mark, .* give them one by one"):
        read(tmp_path, tar() + tar(entry("second", b"2")))


def test_a_gzip_bomb_is_stopped_early(tmp_path):
    bomb = gzip.compress(tar(header("x", 1 << 30) + bytes(1 << 24)))
    (tmp_path / "t.tar.gz").write_bytes(bomb)
    members = read_members(tmp_path / "t.tar.gz", ArchiveLimits(max_ratio=100, free_bytes=1 << 20))
    assert next(members).reason == "member_too_large"
    message = r"the first \d+ bytes unpack to (\d+), more than 100 times as many, .* unpack it to a plain tar first"
    with pytest.raises(ValueError, match=message) as caught:
        next(members)
    assert int(str(caught.value).split(" unpack to ")[1].split(",")[0]) < 1 << 22
    zeros = gzip.compress(tar() + bytes(1 << 24))
    with pytest.raises(ValueError, match="as a bomb does"):
        read(tmp_path, zeros)


def test_small_archives_may_pack_as_well_as_they_like(tmp_path):
    assert len(read(tmp_path, gzip.compress(tar(entry("x", bytes(5000)), entry("y", bytes(5000)))))) == 3


def test_too_many_entries(tmp_path):
    folders = b"".join(entry(f"{number}/", kind=b"5") for number in range(19))
    assert found(read(tmp_path, tar(folders))) == [KEPT]
    with pytest.raises(ValueError, match=r"t\.tar: more than 20 entries; pack it as several archives"):
        read(tmp_path, tar(folders, entry("19/", kind=b"5")))


@pytest.mark.parametrize("content", [b"", b"no archive", LAST[:500], b"?" * 2000, b"\x28\xb5\x2f\xfd" + bytes(600)])
def test_other_files_are_named(tmp_path, content):
    with pytest.raises(ValueError, match=r"t\.tar: neither a tar \(plain, \.gz, \.bz2 or \.xz\) nor a zip file"):
        read(tmp_path, content)


def test_a_compressed_file_that_holds_no_tar_and_one_that_is_missing(tmp_path):
    with pytest.raises(ValueError, match=r"t\.tar: has a damaged header, at byte 512"):
        read(tmp_path, gzip.compress(b"text " * 200))
    with pytest.raises(ValueError, match=r"gone\.tar: cannot be read"):
        list(read_members(tmp_path / "gone.tar"))


# ---------------------------------------------------------------- zip


def write_zip(path, *entries):
    """`entries` are names or ZipInfos, and contents."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in (*entries, KEPT):
            archive.writestr(name, data)
    return path


def with_mode(name, mode):
    info = zipfile.ZipInfo(name)
    info.external_attr = mode << 16
    return info


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_members_of_zips_are_refused_alone(tmp_path):
    entries = [
        ("/etc/passwd", b"x"), ("../x", b"x"), ("a\\x", b"x"), (with_mode("link", stat.S_IFLNK), b"/etc/passwd"),
        (with_mode("fifo", stat.S_IFIFO), b""), (with_mode("device", stat.S_IFCHR), b""), ("large", bytes(5001)),
        ("same", b"1"), ("./same", b"2"), ("same", b"3"), (with_mode("plain", stat.S_IFREG), b"4"),
    ]  # fmt: skip
    path = write_zip(tmp_path / "z.zip", *entries)
    assert found(read_members(path, LIMITS)) == [
        "unsafe_path", "unsafe_path", "unsafe_path", "link_member", "special_member", "special_member",
        "member_too_large", ("same", b"1"), "duplicate_member", "duplicate_member", ("plain", b"4"), KEPT,
    ]  # fmt: skip


def test_a_nul_in_the_name_of_a_zip_member(tmp_path):
    path = write_zip(tmp_path / "z.zip", ("x#jpg", b"1"))
    path.write_bytes(path.read_bytes().replace(b"x#jpg", b"x\0jpg"))
    assert found(read_members(path)) == ["unsafe_path", KEPT]


def test_encrypted_and_damaged_members_of_zips(tmp_path):
    path = write_zip(tmp_path / "z.zip", ("secret", b"1" * 50), ("bad", os.urandom(50)))
    whole = bytearray(path.read_bytes())
    directory = whole.index(b"PK\1\2")
    whole[6] |= 1  # the flag of encryption, in the member's header and in the directory
    whole[directory + 8] |= 1
    whole[whole.index(b"bad") + 20] ^= 255
    path.write_bytes(whole)
    assert found(read_members(path)) == ["encrypted_member", "damaged_member", KEPT]


def test_a_zip_bomb_and_one_of_overlapping_members_are_refused(tmp_path):
    path = write_zip(tmp_path / "z.zip", ("x", bytes(1 << 22)))
    with pytest.raises(ValueError, match=r"z\.zip: its \d+ bytes unpack to 4194308, more than 50 times as many"):
        list(read_members(path, LIMITS))
    path = write_zip(tmp_path / "z.zip", ("aaaa", b"1" * 50), ("bbbb", b"1" * 50))
    whole = path.read_bytes()
    first, second = (whole.index(b"PK\1\2", start) for start in (0, whole.index(b"PK\1\2") + 1))
    where = whole[first + 42 : first + 46]  # both entries of the directory point to one member
    path.write_bytes(whole[: second + 42] + where + whole[second + 46 :])
    with pytest.raises(ValueError, match=r"z\.zip: members overlap at byte 0"):
        list(read_members(path, LIMITS))


def test_a_size_stated_too_small_does_not_unpack_more(tmp_path):
    path = write_zip(tmp_path / "z.zip", ("x", bytes(100_000)))
    whole = path.read_bytes()
    path.write_bytes(whole.replace(struct.pack("<I", 100_000), struct.pack("<I", 10)))
    assert found(read_members(path, LIMITS)) == ["damaged_member", KEPT], "the checksum is of all its bytes"
    crc = struct.pack("<I", zlib.crc32(bytes(100_000)))
    forged = whole.replace(struct.pack("<I", 100_000), struct.pack("<I", 10))
    path.write_bytes(forged.replace(crc, struct.pack("<I", zlib.crc32(bytes(10)))))
    assert found(read_members(path, LIMITS)) == [("x", bytes(10)), KEPT]


def test_too_many_entries_and_a_zip_cut_short(tmp_path):
    path = write_zip(tmp_path / "z.zip", *[(str(number), b"") for number in range(20)])
    with pytest.raises(ValueError, match=r"z\.zip: more than 20 entries"):
        list(read_members(path, LIMITS))
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(ValueError, match=r"z\.zip: no readable zip file"):
        list(read_members(path, LIMITS))


def test_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    read(tmp_path, tar(*[content for content, _ in REFUSED.values() if len(content) < 5000]), ArchiveLimits())
    assert [path.name for path in tmp_path.iterdir()] == ["t.tar"]


@pytest.mark.parametrize("kind", ["tar", "gz", "xz", "zip"])
def test_damaged_bytes_anywhere_give_a_message_or_other_members(tmp_path, kind):
    rng = random.Random(kind)
    if kind == "zip":
        whole = write_zip(tmp_path / "t.zip", *FILES.items()).read_bytes()
    else:
        contents = pax(path=b"long") + b"".join(entry(name, data) for name, data in FILES.items())
        whole = PACKERS.get(kind, bytes)(tar(contents))
    messages = 0
    for _ in range(300):
        damaged = bytearray(whole)
        for place in rng.choices(range(len(whole)), k=rng.randint(1, 4)):
            damaged[place] = rng.randrange(256)
        try:
            assert len(read(tmp_path, damaged, name=f"t.{kind}")) <= len(FILES) + 1
        except ValueError as error:
            assert f"t.{kind}: " in str(error)
            messages += 1
    assert 20 < messages, "most damage to headers is noticed"


# ---------------------------------------------------------------- images of a set


def test_images_are_read_from_a_tar_in_any_order(tmp_path):
    (tmp_path / "t.tar").write_bytes(
        tar(
            entry("./a.jpg", b"1"), entry("sub/b.jpg", b"22"), entry("link.jpg", kind=b"2", link=b"a.jpg"),
            entry("two.jpg", b"1"), entry("two.jpg", b"2"), entry("large.jpg", b"3" * 20_000),
            entry("in.zip", b"PK\5\6" + bytes(18)),
        )
    )  # fmt: skip
    with ImageFiles(tmp_path / "t.tar") as images:
        for name, data in (("sub/b.jpg", b"22"), ("a.jpg", b"1"), ("./a.jpg", b"1"), ("sub//b.jpg", b"22")):
            assert images.read(name) == data
        for name, reason in {
            "../a.jpg": "unsafe_path", "/a.jpg": "unsafe_path", "b.jpg": "missing_image", "link.jpg": "link_member",
            "two.jpg": "duplicate_member",
        }.items():  # fmt: skip
            with pytest.raises(RecordError) as caught:
                images.read(name)
            assert caught.value.reason == reason
        os.truncate(tmp_path / "t.tar", 9_000)
        with pytest.raises(RecordError, match=r"damaged_archive: .*shortened"):
            images.read("large.jpg")


def test_compressed_and_damaged_tars_of_images_are_refused(tmp_path):
    path = tmp_path / "t.tar.gz"
    path.write_bytes(gzip.compress(tar()))
    with pytest.raises(ValueError, match=r"--images: .*t\.tar\.gz is compressed \(tar\.gz\); unpack it to a plain tar"):
        ImageFiles(path)
    path.write_bytes(tar()[:600])
    with pytest.raises(ValueError, match=r"t\.tar\.gz: ends within member 'last', at byte 512"):
        ImageFiles(path)


NAMES = {"http://x/1": "a.jpg", "http://x/2,3": "sub/b.jpg"}


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("m.tsv", b"http://x/1\ta.jpg\r\n\nhttp://x/2,3\tsub/b.jpg"),
        ("m.txt", b"URL\tfile\nhttp://x/1\ta.jpg\nhttp://x/2,3\tsub/b.jpg\n"),
        ("m.tsv.gz", gzip.compress(b"http://x/1\told\nhttp://x/1\ta.jpg\nhttp://x/2,3\tsub/b.jpg\n", mtime=0)),
        ("m.csv", b'url,file\nhttp://x/1,a.jpg\n"http://x/2,3",sub/b.jpg\n'),
        ("m.json", b'{"http://x/1": "a.jpg", "http://x/2,3": "sub/b.jpg"}'),
    ],
)
def test_image_maps_in_every_form(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    assert read_image_map(tmp_path / name) == NAMES


def test_image_maps_of_parquet(tmp_path):
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    pq.write_table(pa.table({"url": list(NAMES), "file": list(NAMES.values())}), tmp_path / "m.parquet")
    assert read_image_map(tmp_path / "m.parquet") == NAMES
    folder = tmp_path / "fetched"
    folder.mkdir()
    for shard in range(2):
        keys = [f"{shard:05d}{number:04d}" for number in range(3)]
        table = {
            "url": [f"http://{shard}", f"http://lost/{shard}", None], "key": keys,
            "status": ["success", "failed_to_download", "success"],
        }  # fmt: skip
        pq.write_table(pa.table(table), folder / f"{shard:05d}.parquet")
    assert read_image_map(folder) == {"http://0": "00000/000000000.jpg", "http://1": "00001/000010000.jpg"}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("m.tsv", b"http://x/1\ta.jpg\nhttp://x/2", r"m\.tsv: line 2 must be a URL, a tab and a file name"),
        ("m.tsv", b"http://x/1\t\n", r"m\.tsv: line 1 must be"),
        ("m.tsv", b"http://x/\xff\ta.jpg\n", r"m\.tsv: line 1 must be"),
        ("m.csv", b"http://x/1,a.jpg,more\n", r"m\.csv: line 1 must be a URL, a comma and a file name"),
        ("m.json", b'["a.jpg"]', r"m\.json: an image map is a JSON object"),
        ("m.json", b'{"http://x/1": 3}', r"m\.json: an image map is a JSON object"),
        ("m.json", b"{", r"m\.json: no readable image map"),
        ("m.parquet", b"no parquet", r"m\.parquet: no readable image map"),
        ("gone.tsv", None, r"gone\.tsv: no readable image map"),
        ("empty", "folder", r"empty: an image map is a file, or a folder with the parquet files"),
    ],
)
def test_faulty_image_maps_are_named(tmp_path, name, content, message):
    if content == "folder":
        (tmp_path / name).mkdir()
    elif content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_image_map(tmp_path / name)
