"""Evaluation sets in prepared folders: planted copies are found with their places, and removed with nothing else."""

import base64
import csv
import io
import json
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_pipelines import decontaminate
from data_pipelines.prepared import read_stored
from data_pipelines.writer import build_index, check_prepared, write_prepared
from unihetero_jax.data import records
from unihetero_jax.data.records import ImageSegment, ImageSpec, Record, TextSegment
from unihetero_jax.data.tokenizer import train_tokenizer

SPEC, OTHER_SPEC = ImageSpec(8, 4, 16), ImageSpec(4, 4, 64)
LONG = "The tall man in a green coat walks his two small dogs along the frozen river"
DATA = Path(os.environ.get("UNIHETERO_REAL_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))


def photo(seed):
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 8, 3)).astype(np.uint8)
    return Image.fromarray(coarse).resize((64, 48), Image.Resampling.BICUBIC)


def saved(image, file_format="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    return buffer.getvalue()


def record(name, data=None, text="What is it?"):
    image = [] if data is None else [ImageSegment(data, 48, 64)]
    turn = TextSegment(text, False, 1), TextSegment(f" {name}", True, 1)
    return Record("set", "vqa", (*image, *turn), {"id": name})


PLANTED = {
    "copied": record("copied", saved(photo(1))),
    "converted": record("converted", saved(photo(2), "BMP")),
    "compressed": record("compressed", saved(photo(3), "JPEG", quality=40)),
    "quoted": record("quoted", saved(photo(50)), f"I read: {LONG}. True?"),
    "asked": record("asked", None, "is it warm there"),
}
FOUND = dict(zip(PLANTED, ("image", "pixels", "near_image", "text", "short_text"), strict=True))
CLEAN = {f"clean {n}": record(f"clean {n}", saved(photo(100 + n)), f"What is number {n}?") for n in range(40)}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return train_tokenizer(["What is it? number 0123456789"] * 3, 280, tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture
def prepare(tmp_path, tokenizer):
    def run(name, samples, val_samples=()):
        write_prepared(samples, tmp_path / name, source=name, tokenizer=tokenizer, spec=SPEC, licence="CC0",
                       val_samples=val_samples, num_shards=3, settings={"made": "here"})  # fmt: skip
        return tmp_path / name

    return run


@pytest.fixture
def questions(tmp_path):
    """An MMBench file with five pictures, of which three are planted, and two texts that are."""
    texts = ["What is on the plate?", "Which way?", LONG, "Is it warm there?", "Nothing of this"]
    with (tmp_path / "set.tsv").open("w", newline="") as file:
        writer = csv.writer(file, dialect="excel-tab")
        writer.writerow(["index", "question", "A", "B", "answer", "image"])
        for number, text in enumerate(texts, start=1):
            writer.writerow([number, text, "yes", "no", "A", base64.b64encode(saved(photo(number))).decode()])
    return tmp_path / "set.tsv"


def run(*arguments):
    return decontaminate.main([str(argument) for argument in arguments])


def ids(folder, split="train"):
    return [stored.record.meta["id"] for stored in read_stored(folder, split)]


def test_planted_copies_are_found_with_their_places_and_nothing_else(prepare, questions, tmp_path, capsys):
    folder = prepare("mixed", [*PLANTED.values(), *CLEAN.values()], [record("seen in val", saved(photo(4)))])
    clean = prepare("clean", CLEAN.values())
    assert run(folder, clean, "--against", questions, f"--report={tmp_path / 'out' / 'found.json'}") == 0
    report = json.loads((tmp_path / "out" / "found.json").read_text())
    assert report["evaluation_sets"] == {
        "set.tsv": {"items": 5, "pictures": 5, "texts": 5, "template_texts": 0, "not_read": {}}
    }
    train = report["sources"][str(folder)]["train"]
    assert train["records"] == 45
    found = train["sets"]["set.tsv"]
    assert found["records"] == dict.fromkeys(FOUND.values(), 1)
    assert (found["pictures"], found["texts"]) == (3, 1), "a short text is no sure find"
    places = {stored.record.meta["id"]: stored.where for stored in read_stored(folder, "train")}
    for (name, reason), row in zip(FOUND.items(), (2, 3, 4, 4, 5), strict=True):
        (example,) = found["examples"][reason]
        assert example.startswith(f"{places[name]}, id {name}: {reason} of set.tsv, row {row}")
    assert report["sources"][str(folder)]["val"]["sets"]["set.tsv"]["records"] == {"image": 1}
    assert report["sources"][str(clean)] == {"train": {"records": 40, "sets": {}}, "val": {"records": 0, "sets": {}}}
    printed = capsys.readouterr().out
    assert "nothing found" in printed and "3 of 5" in printed and f"{places['copied']}, id copied: image" in printed


def test_records_are_removed_and_the_rest_stays_as_it_was(prepare, questions, tmp_path, tokenizer):
    val = [record("seen in val", saved(photo(1))), *(record(f"val {n}", None, f"Which is {n}?") for n in range(60))]
    folder = prepare("mixed", [*PLANTED.values(), *CLEAN.values()], val)
    build_index(folder, tokenizer, OTHER_SPEC)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert run(folder, "--against", questions, "--write=-clean") == 0
    made = tmp_path / "mixed-clean"
    assert check_prepared(made) == "" and {path: path.read_bytes() for path in before} == before
    assert ids(made) == [name for name in ids(folder) if name in CLEAN or name == "asked"]
    assert ids(made, "val") == ids(folder, "val") and len(ids(made, "val")) == 61
    manifest = json.loads((made / "manifest.json").read_text())
    assert manifest["num_records"] == {"train": 41, "val": 61}
    assert manifest["dropped"] == {
        "in_evaluation_image": 1, "in_evaluation_pixels": 1, "in_evaluation_near_image": 1, "in_evaluation_text": 1,
    }  # fmt: skip
    assert "id copied: image of set.tsv, row 2" in manifest["dropped_examples"]["in_evaluation_image"][0]
    assert manifest["settings"]["made"] == "here"
    assert manifest["settings"]["decontaminated"]["against"] == ["set.tsv"]
    for spec in (SPEC, OTHER_SPEC):
        key = records.index_key(tokenizer.hash, spec)
        for split in ("train", "val"):
            rows = np.load(made / "index" / f"{key}.{split}.npy", allow_pickle=False)
            costs = [records.record_cost(s.record, tokenizer.encode, spec) for s in read_stored(made, split)]
            assert [(int(row["num_tokens"]), int(row["num_patches"])) for row in rows] == costs


def test_what_is_removed_can_be_chosen_and_is_added_to_what_was_dropped(prepare, questions, tmp_path):
    folder = prepare("mixed", [*PLANTED.values(), *CLEAN.values()])
    assert run(folder, "--against", questions, "--write=.a", "--remove", "pixels", "--distance=-1") == 0
    assert set(ids(folder)) - set(ids(tmp_path / "mixed.a")) == {"converted"}
    assert run(tmp_path / "mixed.a", "--against", questions, "--write=.b", "--remove", "short_text", "image") == 0
    again = tmp_path / "mixed.a.b"
    assert set(ids(folder)) - set(ids(again)) == {"converted", "asked", "copied"}
    dropped = json.loads((again / "manifest.json").read_text())["dropped"]
    assert dropped == {"in_evaluation_pixels": 1, "in_evaluation_short_text": 1, "in_evaluation_image": 1}


def test_a_folder_with_nothing_to_remove_is_not_written(prepare, questions, tmp_path, capsys):
    clean = prepare("clean", CLEAN.values())
    assert run(clean, "--against", questions, "--write=-clean") == 0
    assert not (tmp_path / "clean-clean").exists()
    assert "nothing to remove" in capsys.readouterr().out


def test_threads_find_the_same(prepare, questions, tmp_path):
    folder = prepare("mixed", [*PLANTED.values(), *CLEAN.values()])
    for workers in (1, 3):
        assert run(folder, "--against", questions, f"--workers={workers}", f"--report={tmp_path / str(workers)}") == 0
    assert (tmp_path / "1").read_text() == (tmp_path / "3").read_text()


def test_texts_of_a_set_whose_pictures_are_elsewhere(prepare, tmp_path, capsys):
    folder = prepare("mixed", [*PLANTED.values(), *CLEAN.values()])
    rows = [{"question_id": 1, "image": "far.jpg", "text": LONG, "label": "yes"}]
    (tmp_path / "pope.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert run(folder, "--against", tmp_path / "pope.jsonl") == 2
    assert "no item could be read, so none would be found; not read: 1 missing_image" in capsys.readouterr().err
    assert run(folder, "--against", tmp_path / "pope.jsonl", "--texts-only", f"--report={tmp_path / 'r'}") == 0
    found = json.loads((tmp_path / "r").read_text())["sources"][str(folder)]["train"]["sets"]["pope.jsonl"]
    assert (found["records"], found["pictures"], found["texts"]) == ({"text": 1}, 0, 1)


def test_refusals_come_before_the_work(prepare, questions, tmp_path, capsys):
    folder = prepare("mixed", CLEAN.values())
    (tmp_path / "mixed-clean").mkdir()

    def refused(*arguments):
        assert run(*arguments) == 2
        return capsys.readouterr().err

    assert "mixed-clean exists; remove it" in refused(folder, "--against", questions, "--write=-clean")
    assert "no readable manifest.json" in refused(tmp_path / "none", "--against", questions)
    assert "no such benchmark file" in refused(folder, "--against", tmp_path / "none.tsv")
    assert "--ngram 0" in refused(folder, "--against", questions, "--ngram=0")
    assert "--workers: 0 must be positive" in refused(folder, "--against", questions, "--workers=0")
    for index in (folder / "index").iterdir():
        index.write_bytes(b"no index")
    everything = ["--against", questions, "--write=.x", "--distance=63", "--max-difference=255"]
    assert "no readable index" in refused(folder, *everything)
    shard = next(folder.glob("train-*"))
    shard.write_bytes(shard.read_bytes()[:-1])
    assert f"{shard} is missing or damaged" in refused(folder, "--against", questions)


@pytest.mark.skipif(not (DATA / "evalmini").is_dir(), reason=f"the real data are not in {DATA}")
def test_validation_pictures_that_a_benchmark_took_are_all_found(prepare, tmp_path):
    """The benchmark's pictures are original bytes of the validation splits."""
    path = DATA / "evalmini" / "MMBench_DEVMINI.tsv"
    lookup = decontaminate.load_evaluation([path], None, decontaminate.Limits())
    with path.open(newline="", encoding="utf-8") as file:
        csv.field_size_limit(2**30)
        cells = {row["image"] for row in csv.DictReader(file, delimiter="\t") if len(row["image"]) > 64}
    copies = [base64.b64decode(cell) for cell in sorted(cells)]
    assert lookup.sets[path.name].num_pictures == len(copies) == 630
    samples = [Record("s", "vqa", (ImageSegment(data, *records.probe_image(data)),)) for data in copies[:50]]
    scanned = decontaminate.scan(read_stored(prepare("copies", samples), "train"), lookup)
    assert [{found.reason for found in hit.found} >= {"image"} for hit in scanned.hits] == [True] * 50
