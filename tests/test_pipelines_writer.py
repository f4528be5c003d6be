"""Prepared folders: what is dropped is counted, order and split follow from content, what is written can be trusted."""

import dataclasses
import hashlib
import io
import json
import struct
import subprocess
import sys
import zlib

import numpy as np
import pytest
from array_record.python.array_record_data_source import ArrayRecordDataSource
from PIL import Image

from data_pipelines import index, writer
from data_pipelines.writer import (
    Dropped,
    FolderExists,
    build_index,
    check_prepared,
    new_folder,
    read_records,
    write_prepared,
)
from unihetero_jax.data import records
from unihetero_jax.data.records import ImageSegment, ImageSpec, Record, TextSegment
from unihetero_jax.data.tokenizer import train_tokenizer

SPEC = ImageSpec(8, 4, 16)


def png(color, size=(20, 12), file_format="PNG"):
    buffer = io.BytesIO()
    Image.new("RGB", size, color).save(buffer, file_format)
    return buffer.getvalue()


def noise_jpeg():
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=95)
    return buffer.getvalue()


def image_record(number, data=None, size=(12, 20)):
    image = ImageSegment(png((number % 256, 0, 0)) if data is None else data, *size)
    turn = (TextSegment("What is it?", False, 1), TextSegment(f" thing {number}", True, 1))
    return Record("set", "vqa", (image, *turn), {"id": f"n{number}"})


def text_record(number):
    return Record("set", "text", (TextSegment(f"text number {number}", True),), {"id": f"t{number}"})


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(["What is it? thing text number 0 1 2 3 4 5 6 7 8 9"] * 3, 280, folder)
    return folder


@pytest.fixture(scope="module")
def tokenizer(tokenizer_folder):
    from unihetero_jax.data.tokenizer import load_tokenizer

    return load_tokenizer(tokenizer_folder)


@pytest.fixture
def write(tokenizer, tmp_path):
    def run(samples, name="out", **settings):
        settings = {"source": "set", "licence": "CC0"} | settings
        write_prepared(samples, tmp_path / name, tokenizer=tokenizer, spec=SPEC, **settings)
        return tmp_path / name

    return run


def manifest_of(folder):
    return json.loads((folder / "manifest.json").read_text())


def file_bytes(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_every_record_is_stored_once_and_order_follows_from_content(write):
    samples = [*(image_record(n) for n in range(15)), *(text_record(n) for n in range(15))]
    folder = write(samples, val_share=0.3)
    turned = write(samples[::-1], "turned", val_share=0.3)
    assert file_bytes(folder) == file_bytes(turned)
    train, val = read_records(folder, "train"), read_records(folder, "val")
    assert sorted(r.meta["id"] for r in train + val) == sorted(r.meta["id"] for r in samples)
    assert [r.meta["id"] for r in train] != sorted(r.meta["id"] for r in train)
    assert {r.kind for r in train[:8]} == {"vqa", "text"}, "kinds lie side by side: not shuffled"
    for split, stored in (("train", train), ("val", val)):
        for record in stored:  # the split, decided here without the project's hash function
            image = record.segments[0].data if isinstance(record.segments[0], ImageSegment) else None
            decides = image or records.serialize(Record("", "", record.segments))
            digest = hashlib.blake2b(decides, digest_size=16).digest()
            is_val = int.from_bytes(digest, "little") % 2**32 < 0.3 * 2**32
            assert is_val == (split == "val")
    assert manifest_of(folder)["num_records"] == {"train": len(train), "val": len(val)} and train and val


def test_index_states_the_cost_of_each_record_in_file_order(write, tokenizer):
    caption_first = Record("set", "image", (TextSegment("thing 3", True), image_record(3).segments[0]), {"id": "g"})
    folder = write([*(image_record(n) for n in range(9)), caption_first, text_record(1)])
    key = records.index_key(tokenizer.hash, SPEC)
    rows = np.load(folder / "index" / f"{key}.train.npy", allow_pickle=False)
    assert rows.dtype == records.INDEX_DTYPE
    shards = sorted(p for p in folder.glob("train-*.array_record"))
    assert [p.name for p in shards] == [f"train-{i:05d}-of-00004.array_record" for i in range(4)]
    stored = []
    for shard in shards:
        with ArrayRecordDataSource([str(shard)]) as reader:
            stored += [records.deserialize(reader[i]) for i in range(len(reader))]
    assert len(rows) == len(stored) == 11
    for row, record in zip(rows, stored, strict=True):
        cost = records.record_cost(record, tokenizer.encode, SPEC)
        num_images = sum(isinstance(s, ImageSegment) for s in record.segments)
        assert (row["num_tokens"], row["num_patches"], row["num_images"]) == (*cost, num_images)
        assert row["flags"] == (records.FLAG_GENERATED_IMAGE if record.meta["id"] == "g" else 0)
    assert len(np.load(folder / "index" / f"{key}.val.npy", allow_pickle=False)) == 0


def test_manifest_describes_the_files(write):
    folder = write([image_record(n) for n in range(6)], settings={"answer": 42})
    manifest = manifest_of(folder)
    assert (manifest["source"], manifest["licence"], manifest["settings"]) == ("set", "CC0", {"answer": 42})
    assert manifest["record_version"] == records.RECORD_VERSION
    assert set(manifest["files"]) == {p.name for p in folder.glob("*.array_record")}
    for name, entry in manifest["files"].items():
        content = (folder / name).read_bytes()
        with ArrayRecordDataSource([str(folder / name)]) as reader:
            count = len(reader)
        digest = hashlib.blake2b(content).hexdigest()
        assert entry == {"records": count, "bytes": len(content), "digest": digest}


def bomb():
    """A PNG of 20,000 x 20,000 pixels in a hundred bytes: its header alone must be refused."""

    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", 20_000, 20_000, 8, 2, 0, 0, 0)
    pixels = zlib.compress(b"\0" * 64)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def test_bad_samples_are_counted_by_reason_and_the_rest_is_kept(write, capsys):
    jpeg, too_long = noise_jpeg(), "x" * (records.MAX_TEXT_CHARS + 1)
    bad = {
        "empty_image": image_record(100, b""),
        "not_an_image": image_record(101, b"this is no image at all"),
        "truncated_image": image_record(102, jpeg[: len(jpeg) // 2], (64, 64)),
        "image_too_large": image_record(103, bomb(), (20_000, 20_000)),
        "size_mismatch": image_record(104, png("red", (20, 12)), (20, 12)),
        "text_too_long": Record("set", "text", (TextSegment(too_long, True),), {"id": "long"}),
        "invalid_text": Record("set", "text", (TextSegment("half \ud800 a pair", True),), {"id": "surrogate"}),
        "empty_record": Record("set", "text", (), {"id": "none"}),
        "caption_missing": Dropped("caption_missing", "raw.json: record 7"),
    }
    good = [image_record(0), image_record(1, jpeg, (64, 64)), text_record(0)]
    folder = write([*bad.values(), *good])
    manifest = manifest_of(folder)
    assert manifest["dropped"] == dict.fromkeys(bad, 1)
    assert manifest["num_records"] == {"train": 3, "val": 0}
    assert {r.meta["id"] for r in read_records(folder, "train")} == {"n0", "n1", "t0"}
    assert manifest["dropped_examples"]["caption_missing"] == ["raw.json: record 7"]
    assert manifest["dropped_examples"]["truncated_image"][0].startswith("n102")
    printed = capsys.readouterr().out
    assert all(f"1 {reason}" in printed for reason in bad)


def test_what_is_dropped_here_names_its_file_and_place(write):
    cut = dataclasses.replace(image_record(1, noise_jpeg()[:2000], (64, 64)), where="raw.json[7]")
    empty = Record("set", "text", ())
    folder = write([text_record(0), cut, dataclasses.replace(text_record(1), where="raw.json[8]"), empty])
    examples = manifest_of(folder)["dropped_examples"]
    assert examples["truncated_image"][0].startswith("raw.json[7], id n1: truncated_image: ")
    assert examples["empty_record"] == ["set, sample 3: empty_record: no segment"]
    stored = read_records(folder, "train")
    assert {(r.meta["id"], r.where) for r in stored} == {("t0", ""), ("t1", "")}, "the place is for messages only"


def test_a_text_of_a_million_characters_is_kept(write):
    folder = write([Record("set", "text", (TextSegment("ab " * (records.MAX_TEXT_CHARS // 3), True),))])
    assert manifest_of(folder)["num_records"]["train"] == 1


def test_a_set_may_bring_its_own_validation_records(write):
    folder = write(
        [text_record(n) for n in range(20)],
        val_samples=[*(text_record(n) for n in range(20, 25)), Dropped("no_text", "v9")],
    )
    assert {r.meta["id"] for r in read_records(folder, "train")} == {f"t{n}" for n in range(20)}
    assert {r.meta["id"] for r in read_records(folder, "val")} == {f"t{n}" for n in range(20, 25)}
    assert manifest_of(folder)["dropped"] == {"no_text": 1}


def test_refusals_name_what_to_do(write, tmp_path):
    with pytest.raises(ValueError, match=r"set: no record was left of 2 samples; dropped: 2 gone \(e\.g\. here\)"):
        write([Dropped("gone", "here"), Dropped("gone", "there")])
    assert not (tmp_path / "out").exists()
    write([text_record(0)])
    with pytest.raises(ValueError, match="out exists; remove it"):
        write([text_record(0)])
    with pytest.raises(ValueError, match=r"--val-share: 1\.5 must lie in \[0, 1\]"):
        write([text_record(0)], "other", val_share=1.5)


def test_a_stopped_preparation_leaves_no_folder(write, tmp_path):
    def samples():
        yield text_record(0)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write(samples())
    with pytest.raises(OSError, match="disk full"), new_folder(tmp_path / "out") as partial:
        (partial / "file").write_text("half")
        raise OSError("disk full")
    assert list(tmp_path.iterdir()) == []


def test_of_two_preparations_of_a_folder_the_first_to_finish_wins(write, tmp_path):
    def samples():
        yield text_record(0)
        (tmp_path / "out").mkdir()  # after the check at the start
        (tmp_path / "out" / "manifest.json").write_text("theirs")

    with pytest.raises(FolderExists, match="out exists; remove it"):
        write(samples())
    with pytest.raises(FolderExists, match="two was made by another process"), new_folder(tmp_path / "two") as partial:
        (partial / "manifest.json").write_text("ours")
        (tmp_path / "two").mkdir()
        (tmp_path / "two" / "manifest.json").write_text("theirs")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "two"], "what the slower one wrote is left"
    assert (tmp_path / "two" / "manifest.json").read_text() == "theirs"


def test_what_a_killed_preparation_left_is_removed_and_a_living_one_is_not_disturbed(tmp_path):
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    alive = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        for process in (gone, alive):
            (tmp_path / f"out.partial-{process.pid}").mkdir()
        with new_folder(tmp_path / "out") as partial:
            (partial / "file").write_text("whole")
        assert sorted(p.name for p in tmp_path.iterdir()) == sorted(["out", f"out.partial-{alive.pid}"])
    finally:
        alive.communicate(b"\n")


def test_check_prepared_finds_every_fault(write):
    folder = write([image_record(n) for n in range(8)], settings={"version": 1})
    shard = folder / "train-00002-of-00004.array_record"
    assert check_prepared(folder) == check_prepared(folder, {"version": 1}) == ""
    assert "other settings" in check_prepared(folder, {"version": 2})
    assert "no readable manifest.json" in check_prepared(folder / "nowhere")
    content = shard.read_bytes()
    place = len(content) // 2
    shard.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
    assert check_prepared(folder) == f"{shard} is missing or damaged"
    shard.unlink()
    assert check_prepared(folder) == f"{shard} is missing or damaged"
    for content in ("{}", "not json", "[]", "3", '{"files": [], "settings": {}}', '{"files": {}, "settings": 1}', "\0"):
        (folder / "manifest.json").write_text(content)
        assert f"{folder} " in check_prepared(folder) and "no readable manifest.json" in check_prepared(folder)
        with pytest.raises(ValueError, match=r"no readable manifest\.json"):
            read_records(folder, "train")
    (folder / "manifest.json").write_bytes(b"\xff\xfe")
    assert "no readable manifest.json" in check_prepared(folder)


def test_index_for_another_spec_is_added_without_touching_records(write, tokenizer, tokenizer_folder, capsys):
    folder = write([image_record(n) for n in range(10)], val_share=0.4)
    before = file_bytes(folder)
    flags = [f"--tokenizer={tokenizer_folder}", "--patch-size=2", "--min-patches=4", "--max-patches=64"]
    assert index.main([str(folder), *flags]) == 0
    spec = ImageSpec(2, 4, 64)
    key = records.index_key(tokenizer.hash, spec)
    assert key in capsys.readouterr().out
    after = file_bytes(folder)
    assert {name: after[name] for name in before} == before
    assert set(after) - set(before) == {f"index/{key}.train.npy", f"index/{key}.val.npy"}
    for split in ("train", "val"):
        stored = read_records(folder, split)
        rows = np.load(folder / "index" / f"{key}.{split}.npy", allow_pickle=False)
        costs = [records.record_cost(record, tokenizer.encode, spec) for record in stored]
        assert [(int(r["num_tokens"]), int(r["num_patches"])) for r in rows] == costs
    assert build_index(folder, tokenizer, SPEC) == records.index_key(tokenizer.hash, SPEC)
    assert file_bytes(folder) == after


def test_index_command_refuses_what_is_no_prepared_folder(tmp_path, tokenizer_folder, capsys):
    assert index.main([str(tmp_path), f"--tokenizer={tokenizer_folder}"]) == 2
    assert "no readable manifest.json" in capsys.readouterr().err
    assert index.main([str(tmp_path), f"--tokenizer={tmp_path / 'none'}"]) == 2
    assert "tokenizer.json does not exist" in capsys.readouterr().err
    assert index.main([str(tmp_path), f"--tokenizer={tokenizer_folder}", "--patch-size=0"]) == 2
    assert "--patch-size: 0 must be positive" in capsys.readouterr().err


def test_a_record_too_large_for_its_index_row_is_marked(write, tokenizer, monkeypatch):
    monkeypatch.setattr(writer.records, "record_cost", lambda *_: (10, 2**16))
    folder = write([image_record(0)])
    row = np.load(folder / "index" / f"{records.index_key(tokenizer.hash, SPEC)}.train.npy", allow_pickle=False)[0]
    assert row["flags"] & records.FLAG_TOO_LONG
    assert (row["num_tokens"], row["num_patches"]) == (10, 2**16 - 1)
