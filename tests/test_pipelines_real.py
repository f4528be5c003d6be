"""Preparation of the shared real data: the rules on small files, and the whole of it where the raw data lie."""

import csv
import json
import os
import zipfile
from pathlib import Path

import pytest

from data_pipelines import real
from data_pipelines.entries import Dropped
from unihetero_jax.data.records import ImageSegment, Record, TextSegment

DATA = Path(os.environ.get("UNIHETERO_REAL_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))


def test_missing_raw_data_give_one_message(tmp_path, capsys):
    assert real.main([f"--data={tmp_path / 'nowhere'}", f"--output={tmp_path / 'out'}"]) == 2
    message = capsys.readouterr().err
    assert "nlvr/llava_train.json" in message
    assert "--data" in message
    assert not (tmp_path / "out").exists()


def test_benchmark_pictures_are_kept_out_of_training():
    image, other = ImageSegment(b"seen", 1, 1), ImageSegment(b"new", 1, 1)
    samples = [
        Record("s", "image", (TextSegment("x"), image), {"id": "leak"}, "raw.json[3]"),
        Record("s", "vqa", (other,)),
        Dropped("earlier", "y"),
    ]
    kept = list(real.without_images(samples, {real._digest(b"seen")}))
    assert kept == [Dropped("in_evaluation", "raw.json[3]"), samples[1], samples[2]]


def test_a_benchmark_is_filtered_and_keeps_its_pictures(tmp_path):
    rows = [
        {"index": "0", "category": "a", "image": "P" * 100, "source": "other"},
        {"index": "1", "category": "a", "image": "Q" * 100, "source": "mine"},
        {"index": "2", "category": "b", "image": "0", "source": "mine"},
        {"index": "3", "category": "b", "image": "0", "source": "mine"},
        {"index": "4", "category": "b", "image": "1", "source": "mine"},
        {"index": "5", "category": "c", "image": "1", "source": "mine"},
    ]
    with (tmp_path / "in.tsv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), delimiter="\t")
        writer.writeheader()
        writer.writerows(rows)
    assert real.write_benchmark(tmp_path / "in.tsv", tmp_path / "out.tsv", "mine", ("a", "b")) == 4
    with (tmp_path / "out.tsv").open(newline="") as file:
        written = list(csv.DictReader(file, delimiter="\t"))
    assert [(r["index"], r["image"]) for r in written] == [
        ("1", "Q" * 100), ("2", "P" * 100), ("3", "2"), ("4", "1")
    ]  # fmt: skip
    with pytest.raises(ValueError, match="no row with source mine and category z"):
        real.write_benchmark(tmp_path / "in.tsv", tmp_path / "out.tsv", "mine", ("z",))


def test_a_damaged_archive_of_benchmark_pictures_is_named(tmp_path):
    path = tmp_path / "evalmini" / "images_DEVMINI.zip"
    path.parent.mkdir()
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.png", bytes(range(256)) * 20)
    whole = path.read_bytes()
    for damaged in (b"no zip", whole[:60] + b"\xff" * 20 + whole[80:]):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"images_DEVMINI\.zip: no readable zip file .*fetch it again"):
            real.evaluation_images(tmp_path)


@pytest.mark.slow
@pytest.mark.skipif(not DATA.is_dir(), reason=f"the real data are not in {DATA}")
def test_the_shared_data_are_prepared_once(tmp_path, capsys):
    """Record counts as the raw folders' own descriptions state them; benchmarks are read by the evaluator's reader."""
    from unihetero_jax.evaluation.benchmarks import read_benchmark

    assert real.main([f"--data={DATA}", f"--output={tmp_path}"]) == 0
    counts = {}
    for name in real.PARTS:
        manifest = json.loads((tmp_path / name / "manifest.json").read_text())
        counts[name] = (sum(manifest["num_records"].values()), sum(manifest["dropped"].values()))
    assert {name: sum(pair) for name, pair in counts.items() if name != "text"} == {
        "nlvr": 3671, "nlvr_statements": 3671, "nlvr_generation": 3671, "cifar10": 50_000, "cifar10_generation": 50_000,
    }  # fmt: skip
    assert counts["cifar10"][1] == 0
    dropped = json.loads((tmp_path / "text" / "manifest.json").read_text())["dropped"]
    assert dropped == {"empty_text": 8}, "blank lines behind a paragraph that was cut at the limit"
    assert counts["nlvr"][1] < 10
    stamps = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.array_record")}
    assert real.main([f"--data={DATA}", f"--output={tmp_path}"]) == 0
    assert capsys.readouterr().out.count("finished earlier") == len(real.PARTS)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.array_record")} == stamps
    items = {name: len(read_benchmark(tmp_path / "benchmarks" / f"{name}.tsv").items) for name in real.BENCHMARKS}
    assert items == {"cifar10": 400, "nlvr": 464}
