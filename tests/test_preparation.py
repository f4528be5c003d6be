"""One preparation, whatever runs it: the same files; duplicates, filters and splits follow from content alone."""

import io
import itertools
import json
import random

import numpy as np
import pytest
from etils import epath
from PIL import Image

from data_pipelines import convert
from data_pipelines.entries import Checker, Dropped, Drops, Filters, best_of, without_duplicates
from data_pipelines.writer import read_records
from tests.bucket_server import running_bucket
from unihetero_jax.data.records import ImageSegment, ImageSpec, Record, TextSegment
from unihetero_jax.data.tokenizer import load_tokenizer, train_tokenizer

SPEC = ImageSpec(8, 4, 36)


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(["a line of text number 0 1 2 3 4 5 6 7 8 9"] * 3, 280, folder)
    return folder


@pytest.fixture(scope="module")
def tokenizer(tokenizer_folder):
    return load_tokenizer(tokenizer_folder)


@pytest.fixture(scope="module")
def raw(tmp_path_factory):
    """Five JSONL files: each has lines of its own, lines of another file, and faults."""
    folder = tmp_path_factory.mktemp("raw")
    for number in range(5):
        lines = [{"text": f"a line of text number {number} {i}", "id": f"{number}/{i}"} for i in range(40)]
        lines += [{"text": f"a line of text number {(number + 1) % 5} {i}", "id": "again"} for i in range(7)]
        rows = [json.dumps(line) for line in lines] + ["no json", json.dumps({"id": "no text"})]
        (folder / f"{number}.jsonl").write_text("\n".join(rows) + "\n")
    return folder


def prepare(raw, tokenizer_folder, output, *flags):
    arguments = ["jsonl", "--input", str(raw / "*.jsonl"), f"--output={output}", f"--tokenizer={tokenizer_folder}",
                 "--source=lines", "--num-shards=3", "--val-share=0.1", *flags]  # fmt: skip
    assert convert.main(arguments) == 0
    return dict(files_of(epath.Path(output)))


def files_of(folder, prefix=""):
    for path in folder.iterdir():
        if path.is_dir():
            yield from files_of(path, f"{prefix}{path.name}/")
        else:
            yield f"{prefix}{path.name}", path.read_bytes()


def test_workers_change_nothing(raw, tokenizer_folder, tmp_path):
    one = prepare(raw, tokenizer_folder, tmp_path / "one")
    assert prepare(raw, tokenizer_folder, tmp_path / "three", "--workers=3") == one
    manifest = json.loads(one["manifest.json"])
    assert manifest["dropped"] == {"duplicate": 35, "not_json": 5, "no_text_field": 5}
    assert sum(manifest["num_records"].values()) == 200
    assert len([name for name in one if name.startswith("train-")]) == 3


def test_beam_makes_the_same_files(raw, tokenizer_folder, tmp_path):
    pytest.importorskip("apache_beam", reason="Apache Beam is an extra: make test-beam")
    one = prepare(raw, tokenizer_folder, tmp_path / "one")
    assert prepare(raw, tokenizer_folder, tmp_path / "beam", "--runner=DirectRunner") == one
    several = prepare(raw, tokenizer_folder, tmp_path / "several", "--runner=DirectRunner", "--",
                      "--direct_num_workers=2", "--direct_running_mode=multi_threading")  # fmt: skip
    assert several == one
    with running_bucket() as bucket:
        assert prepare(raw, tokenizer_folder, bucket.root / "lines", "--runner=DirectRunner") == one


def test_beam_is_asked_for_by_name_when_it_is_missing(raw, tokenizer_folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "apache_beam", None)
    arguments = ["jsonl", "--input", str(raw / "0.jsonl"), f"--output={tmp_path / 'out'}",
                 f"--tokenizer={tokenizer_folder}", "--runner=DirectRunner"]  # fmt: skip
    assert convert.main(arguments) == 2
    assert "--runner=DirectRunner needs Apache Beam" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_duplicates_can_be_kept(raw, tokenizer_folder, tmp_path):
    manifest = json.loads(prepare(raw, tokenizer_folder, tmp_path / "all", "--keep-duplicates")["manifest.json"])
    assert sum(manifest["num_records"].values()) == 235 and "duplicate" not in manifest["dropped"]
    texts = [record.segments[0].text for split in ("train", "val") for record in read_records(tmp_path / "all", split)]
    assert len(texts) == 235 and len(set(texts)) == 200


def picture(height, width, value=0):
    buffer = io.BytesIO()
    Image.fromarray(np.full((height, width, 3), value, np.uint8)).save(buffer, "PNG")
    return ImageSegment(buffer.getvalue(), height, width)


def entries_of(tokenizer, samples, split="", **fields):
    return list(Checker(tokenizer, SPEC, **fields).entries(samples, split))


def test_a_copy_of_validation_is_not_trained_on(tokenizer):
    text = (TextSegment("the same words", True),)
    train = entries_of(tokenizer, [Record("a", "text", text, {"id": i}) for i in range(3)], "train")
    val = entries_of(tokenizer, [Record("b", "text", text, {"id": 9})], "val")
    for order in itertools.permutations([*train, *val]):
        drops = Drops()
        assert without_duplicates(order, drops) == val
        assert dict(drops.counts) == {"duplicate_of_validation": 3}
    kept, copies = best_of(reversed(train))
    assert kept == min(train) and [copy.reason for copy in copies] == ["duplicate", "duplicate"]


def test_equal_text_beside_another_picture_is_no_duplicate(tokenizer):
    text = TextSegment("a square", True)
    samples = [Record("a", "caption", (picture(20, 20, value), text)) for value in (0, 1, 0)]
    samples.append(Record("a", "caption", (text, picture(20, 20, 0))))  # another order is another sample
    drops = Drops()
    assert len(without_duplicates(entries_of(tokenizer, samples), drops)) == 3
    assert dict(drops.counts) == {"duplicate": 1}


def test_filters_name_their_reason(tokenizer):
    text = TextSegment("twelve chars", True)
    samples = [
        Record("a", "caption", (picture(20, 20), text)),
        Record("a", "caption", (picture(15, 20), text)),
        Record("a", "caption", (picture(16, 80), text)),
        Record("a", "caption", (picture(20, 20), TextSegment("short", True))),
        Record("a", "caption", (picture(20, 20), TextSegment("much too many characters", True))),
    ]
    filters = Filters(min_side=16, max_aspect=4.0, min_chars=6, max_chars=20)
    found = entries_of(tokenizer, samples, filters=filters)
    assert [item.reason if isinstance(item, Dropped) else "" for item in found] == [
        "", "small_image", "long_image", "short_text", "long_text",
    ]  # fmt: skip
    assert not any(isinstance(item, Dropped) for item in entries_of(tokenizer, samples))


def test_split_follows_content_not_order_or_metadata(tokenizer):
    samples = [Record("a", "text", (TextSegment(f"number {i}", True),), {"id": i}) for i in range(2000)]
    splits = {entry.content: entry.split for entry in entries_of(tokenizer, samples, val_share=0.1)}
    share = sum(split == "val" for split in splits.values()) / len(splits)
    assert 0.08 < share < 0.12
    random.Random(0).shuffle(samples)
    others = [Record("b", "text", sample.segments, {"id": -1}) for sample in samples]
    assert {entry.content: entry.split for entry in entries_of(tokenizer, others, val_share=0.1)} == splits


def test_what_no_console_can_take_is_escaped_in_the_count():
    drops = Drops()
    for number in range(9, 0, -1):
        drops.add(Dropped("broken", f"file {number} \ud800"))
    assert str(drops).encode() and drops.counts["broken"] == 9
    assert drops.examples["broken"] == [f"file {number} \\ud800" for number in (1, 2, 3)]
