"""Raw text files: literal bytes in, lines and values out; what is damaged is named and costs no more than it must."""

import gzip
import json

import pyarrow as pa
import pytest

from data_pipelines.entries import Dropped
from data_pipelines.text_files import is_json_lines, open_file, read_json, read_json_lines, read_lines


def zstd(data):
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(data)
    return sink.getvalue().to_pybytes()


PACKED = {"": bytes, ".gz": gzip.compress, ".zst": zstd}


@pytest.mark.parametrize("suffix", PACKED)
def test_files_are_unpacked_by_their_name(tmp_path, suffix):
    path = tmp_path / f"a.jsonl{suffix}"
    path.write_bytes(PACKED[suffix](b'{"a": 1}\r\n[2]') + PACKED[suffix](b"\n3"))  # two members
    assert list(read_lines(path)) == [
        ("a.jsonl" + suffix + ", line 1", b'{"a": 1}'),
        ("a.jsonl" + suffix + ", line 2", b"[2]"),
        ("a.jsonl" + suffix + ", line 3", b"3"),
    ]
    assert [value for _, value in read_json_lines(path)] == [{"a": 1}, [2], 3]
    path.write_bytes(PACKED[suffix](b'{"a": [1]}'))
    assert read_json(path, "set") == {"a": [1]}
    path.write_bytes(PACKED[suffix](b""))
    assert list(read_lines(path)) == []


def test_lines_have_a_bound_and_a_longer_one_costs_itself_alone(tmp_path):
    path = tmp_path / "a.txt"
    for end in (b"", b"\n"):
        path.write_bytes(b"12345\n123456\n" + b"x" * 3_000_000 + b"\n\n1234" + end)
        assert list(read_lines(path, max_bytes=5)) == [
            ("a.txt, line 1", b"12345"),
            ("a.txt, line 2", Dropped("line_too_long", "a.txt, line 2: more than 5 bytes")),
            ("a.txt, line 3", Dropped("line_too_long", "a.txt, line 3: more than 5 bytes")),
            ("a.txt, line 4", b""),
            ("a.txt, line 5", b"1234"),
        ]
    path.write_bytes(b"12\n123456")
    assert [line for _, line in read_lines(path, max_bytes=5)][1].reason == "line_too_long"


def test_lines_that_hold_no_json(tmp_path):
    path = tmp_path / "a.jsonl"
    bad = (b"{'a': 1}", b"", b" \t", b'{"a": "\xff"}', b"[" * 100_000, b"1" * 5000, b'{"a": 1} {"a": 2}', b'{"a": ')
    path.write_bytes(b"\n".join(bad))
    made = list(read_json_lines(path))
    assert [value.reason for _, value in made] == [
        "not_json", "empty_line", "empty_line", "not_json", "not_json", "not_json", "not_json", "not_json",
    ]  # fmt: skip
    assert [where for where, _ in made] == [f"a.jsonl, line {number}" for number in range(1, 9)]
    assert all(value.where.startswith(where) for where, value in made)


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_a_file_cut_short_gives_what_is_whole_and_then_is_named(tmp_path, suffix):
    path = tmp_path / f"a.jsonl{suffix}"
    lines = b"".join(b'{"a": "%d %d"}\n' % (n, n * n * n % 9973) for n in range(40_000))
    whole = PACKED[suffix](lines)
    path.write_bytes(whole[: len(whole) // 2])
    got = []
    with pytest.raises(ValueError, match=r"a\.jsonl\S+: damaged after line \d+: .*; fetch the file again") as caught:
        for _, line in read_lines(path):
            got.append(line)
    assert f"after line {len(got)}:" in str(caught.value)
    assert 1000 < len(got) < 40_000 and b"\n".join(got) == lines[: len(b"\n".join(got))]


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.jsonl.zst"])
def test_files_that_cannot_be_read_are_named(tmp_path, name):
    with pytest.raises(ValueError, match=rf"{name}: cannot be read"):
        list(read_lines(tmp_path / name))
    with pytest.raises(ValueError, match=rf"{name}: no readable set"):
        read_json(tmp_path / name, "set")
    if name != "a.jsonl":
        (tmp_path / name).write_bytes(b"not packed at all")
        with pytest.raises(ValueError, match=rf"{name}: cannot be read"):
            list(read_lines(tmp_path / name))
        with pytest.raises(OSError):
            with open_file(tmp_path / name) as file:
                file.read()


def test_json_that_is_none_is_named_with_a_remedy(tmp_path):
    path = tmp_path / "a.json"
    for content in (b"", b"{", b"[" * 100_000, b'"\xff"'):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"a\.json: no readable set: ") as caught:
            read_json(path, "set")
        assert ".jsonl" not in str(caught.value)
    path.write_text("\n".join(json.dumps({"a": n}) for n in range(3)))
    with pytest.raises(ValueError, match=r"a\.json: no readable set: .*name it \.jsonl"):
        read_json(path, "set")


def test_names_of_json_lines(tmp_path):
    lines = ("a.jsonl", "a.jsonl.gz", "a.JSONL", "a.ndjson", "b.jsonl.zst")
    assert all(is_json_lines(tmp_path / name) for name in lines)
    assert not any(is_json_lines(tmp_path / name) for name in ("a.json", "a.json.gz", "jsonl", "a.txt", "a.parquet"))
