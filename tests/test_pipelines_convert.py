"""The commands: `convert` for one raw set, `real` on a tiny copy of the raw data; and where image bytes come from."""

import io
import json
import zipfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from data_pipelines import convert, real
from data_pipelines.entries import Dropped
from data_pipelines.image_files import ImageFiles
from data_pipelines.llava import LlavaOptions, parse_entry
from data_pipelines.writer import read_records
from unihetero_jax.data.records import ImageSegment, Record, RecordError, TextSegment
from unihetero_jax.data.tokenizer import load_tokenizer


def png(color="red", size=(8, 6)):
    buffer = io.BytesIO()
    Image.new("RGB", size, color).save(buffer, "PNG")
    return buffer.getvalue()


RED = ImageSegment(png("red"), 6, 8)
CHOICES = "\nA. 4\nB. 0\nC. 5\nD. 2\nAnswer with the option's letter from the given choices directly."


def entry(*turns, image="red.png"):
    roles = ("human", "gpt")
    talk = [{"from": roles[number % 2], "value": value} for number, value in enumerate(turns)]
    return {"id": "7", "image": image, "conversations": talk}


def test_llava_image_mark_behind_the_options_is_kept():
    sample = entry("How many?" + CHOICES + "\n<image>", "C")
    record = parse_entry(sample, lambda _: RED.data, LlavaOptions("set", choices="text"), "x.json[0]")
    assert record.segments == (RED, TextSegment("How many?", False, 1), TextSegment(" 5", True, 1))


def test_image_names_cannot_lead_outside(tmp_path):
    (tmp_path / "secret.png").write_bytes(RED.data)
    root = tmp_path / "images"
    root.mkdir()
    (root / "link.png").symlink_to(tmp_path / "secret.png")
    with ImageFiles(root) as images:
        for name in ("../secret.png", str(tmp_path / "secret.png"), "link.png", "a\\..\\secret.png", "nul\0.png"):
            with pytest.raises(RecordError, match="unsafe_path"):
                images.read(name)
        with pytest.raises(RecordError, match="missing_image"):
            images.read("none.png")
    with pytest.raises(ValueError, match="does not exist; give the folder or zip"):
        ImageFiles(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="neither a folder nor a readable zip"):
        ImageFiles(tmp_path / "secret.png")


METHODS = {
    "stored": zipfile.ZIP_STORED, "deflate": zipfile.ZIP_DEFLATED, "bzip2": zipfile.ZIP_BZIP2, "lzma": zipfile.ZIP_LZMA,
}  # fmt: skip


@pytest.mark.parametrize("method", METHODS)
def test_damaged_archive_members_are_reported_and_others_are_read(tmp_path, method):
    path = tmp_path / "images.zip"
    with zipfile.ZipFile(path, "w", METHODS[method]) as archive:
        archive.writestr("bad.bin", bytes(range(256)) * 40)
        archive.writestr("red.png", RED.data)
        start, size = len("bad.bin") + 30, archive.getinfo("bad.bin").compress_size
    whole = path.read_bytes()
    for place in (start, start + size // 4, start + size // 2, start + size - 4):
        path.write_bytes(whole[:place] + bytes(byte ^ 255 for byte in whole[place : place + 4]) + whole[place + 4 :])
        with ImageFiles(path) as images:
            with pytest.raises(RecordError) as caught:
                images.read("bad.bin")
            assert caught.value.reason == "damaged_archive" and f"{path}, member bad.bin" in str(caught.value)
            assert images.read("red.png") == RED.data
    path.write_bytes(b"PK?" + whole[3:])  # the header before the member
    with ImageFiles(path) as images, pytest.raises(RecordError, match="damaged_archive"):
        images.read("bad.bin")


def test_files_that_cannot_be_read_are_reported(tmp_path, monkeypatch):
    with ImageFiles(tmp_path) as images:
        with pytest.raises(RecordError) as caught:
            images.read("x" * 300 + ".png")
        assert caught.value.reason == "unreadable_image" and "name too long" in str(caught.value)
        (tmp_path / "red.png").write_bytes(RED.data)
        assert images.read("red.png") == RED.data

        def refuse(path):  # a mode would not do: the tests may run as root
            raise PermissionError(13, "Permission denied", str(path))

        monkeypatch.setattr(type(tmp_path), "read_bytes", refuse)
        with pytest.raises(RecordError, match=r"unreadable_image: .*red\.png: Permission denied"):
            images.read("red.png")


# ---------------------------------------------------------------- parquet


def row(**changes):
    image = {"bytes": RED.data, "path": "train/1.png"}
    return {"image": image, "label": 1, "name": "dog", "caption": "a dog."} | changes


def write_parquet(path, rows, metadata=None):
    table = pa.Table.from_pylist(rows)
    if metadata:
        table = table.replace_schema_metadata({"huggingface": json.dumps(metadata)})
    pq.write_table(table, path)
    return path


# ---------------------------------------------------------------- commands


def make_llava(folder, number, answer="x"):
    folder.mkdir()
    for n in range(number):
        (folder / f"{n}.png").write_bytes(png((n, 0, 0)))
    samples = [entry("<image>\nWhat is it?", f"{answer} {n}", image=f"{n}.png") for n in range(number)]
    (folder / "set.json").write_text(json.dumps([*samples, entry("<image>\nWhat?", "x", image="gone.png")]))


def test_convert_llava_with_its_own_validation_set(tmp_path, capsys):
    make_llava(tmp_path / "train", 12)
    make_llava(tmp_path / "val", 3, "y")
    arguments = [
        "llava", f"--input={tmp_path / 'train' / 'set.json'}", f"--images={tmp_path / 'train'}",
        f"--val-input={tmp_path / 'val' / 'set.json'}", f"--val-images={tmp_path / 'val'}",
        f"--output={tmp_path / 'out'}", f"--tokenizer={tmp_path / 'tokenizer'}",
    ]  # fmt: skip
    assert convert.main([*arguments, "--train-tokenizer=280", "--licence=CC0"]) == 0
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["num_records"] == {"train": 12, "val": 3}
    assert manifest["dropped"] == {"missing_image": 2}
    assert (manifest["source"], manifest["licence"]) == ("out", "CC0")
    assert manifest["dropped_examples"]["missing_image"][0].startswith("set.json[12]: missing_image: ")
    assert {r.segments[2].text[:2] for r in read_records(tmp_path / "out", "val")} == {" y"}
    assert load_tokenizer(tmp_path / "tokenizer").vocab_size <= 280
    assert "12 train, 3 val; dropped: 2 missing_image" in capsys.readouterr().out
    assert convert.main(arguments) == 2
    assert "out exists; remove it" in capsys.readouterr().err


def test_equal_names_in_two_folders_are_two_images(tmp_path):
    for folder, color in (("A", "red"), ("B", "blue")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "1.png").write_bytes(png(color))
        samples = [entry("<image>\nWhich color?", color, image="1.png")]
        (tmp_path / folder / "x.json").write_text(json.dumps(samples))
    arguments = ["llava", "--input", str(tmp_path / "*" / "x.json"), f"--output={tmp_path / 'out'}",
                 f"--tokenizer={tmp_path / 'tokenizer'}", "--train-tokenizer=280", "--val-share=0"]  # fmt: skip
    assert convert.main(arguments) == 0
    found = {
        record.segments[2].text.strip(): record.segments[0].data for record in read_records(tmp_path / "out", "train")
    }
    assert found == {color: png(color) for color in ("red", "blue")}


def test_all_that_is_said_of_an_image_is_in_one_split(tmp_path):
    rows = [row(image={"bytes": png((n, n, n)), "path": f"{n}.png"}, caption=f"{n} said {i} times")
            for n in range(60) for i in range(3)]  # fmt: skip
    path = write_parquet(tmp_path / "p.parquet", rows)
    arguments = ["parquet", f"--input={path}", "--task=pair", "--caption-column=caption", "--val-share=0.4",
                 f"--output={tmp_path / 'out'}", f"--tokenizer={tmp_path / 'tokenizer'}",
                 "--train-tokenizer=280"]  # fmt: skip
    assert convert.main(arguments) == 0
    train, val = (
        {record.segments[0].data for record in read_records(tmp_path / "out", split)} for split in ("train", "val")
    )
    assert len(train) + len(val) == 60 and not train & val and min(len(train), len(val)) > 10


def test_outputs_that_cannot_be_written_are_refused_before_the_work(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    (tmp_path / "notes.txt").write_text("a note")
    arguments = ["text", f"--input={tmp_path / 'notes.txt'}", "--tokenizer=nowhere"]
    for output in (tmp_path / "file" / "out", Path("/proc/nowhere/out")):
        assert convert.main([*arguments, f"--output={output}"]) == 2
        assert f"--output: {output} cannot be written" in capsys.readouterr().err


def test_examples_of_what_was_dropped_are_short(tmp_path, capsys):
    path = write_parquet(tmp_path / "p.parquet", [row(), row(caption="x")])
    arguments = ["parquet", f"--input={path}", "--task=pair", "--caption-column=image", f"--output={tmp_path / 'out'}",
                 f"--tokenizer={tmp_path / 'tokenizer'}", "--train-tokenizer=280"]  # fmt: skip
    assert convert.main(arguments) == 2
    assert len(capsys.readouterr().err) < 1000


def test_convert_parquet_and_text(tmp_path):
    rows = [row(caption=f"a dog {n}", image={"bytes": png((n, 0, 0)), "path": None}) for n in range(9)]
    write_parquet(tmp_path / "a-0.parquet", rows[:5])
    write_parquet(tmp_path / "a-1.parquet", rows[5:])
    tokenizer = f"--tokenizer={tmp_path / 'tokenizer'}"
    arguments = [f"--input={tmp_path / 'a-*.parquet'}", "--task=generation", "--caption-column=caption", tokenizer]
    out = [f"--output={tmp_path / 'drawn'}", "--train-tokenizer=270", "--val-share=0", "--num-shards=2"]
    assert convert.main(["parquet", *arguments, *out]) == 0
    stored = read_records(tmp_path / "drawn", "train")
    assert sorted(r.segments[0].text for r in stored) == [f"a dog {n}" for n in range(9)]
    (tmp_path / "notes.txt").write_text("one\n\ntwo\n\nthree")
    text = ["text", f"--input={tmp_path / 'notes.txt'}", f"--output={tmp_path / 'text'}", tokenizer]
    assert convert.main([*text, "--max-chars=6", "--val-share=0"]) == 0
    assert sorted(r.segments[0].text for r in read_records(tmp_path / "text", "train")) == [
        "one\n\n",
        "three",
        "two\n\n",
    ]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["text", "--input=none.txt"], "--input: none.txt does not exist"),
        (["text", "--input={here}", "--val-share=1.5"], "--val-share: 1.5 must lie in [0, 1)"),
        (["text", "--input={here}", "--num-shards=0"], "--num-shards: 0 must be positive"),
        (["text", "--input={here}", "--max-patches=2", "--min-patches=1"], "--max-patches 2"),
        (["text", "--input={here}"], "tokenizer.json does not exist"),
        (["parquet", "--input={here}", "--task=generation"], "needs a caption column"),
    ],
)
def test_convert_refusals_are_one_line_with_exit_code_2(tmp_path, capsys, flags, message):
    here = tmp_path / "a.txt"
    here.write_text("text")
    common = [f"--output={tmp_path / 'out'}", f"--tokenizer={tmp_path / 'none'}"]
    assert convert.main([*(flag.format(here=here) for flag in flags), *common]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_training_a_tokenizer_survives_text_that_is_no_unicode():
    record = Record("set", "text", (TextSegment("half \ud800 a pair", True),))
    assert list(convert.texts_of([record, Dropped("x", "y")])) == ["half  a pair"]


# ---------------------------------------------------------------- make real


@pytest.fixture
def raw(tmp_path):
    """A tiny copy of the raw layouts; the evaluation holds the picture of one training row."""
    data = tmp_path / "raw"
    for name in ("nlvr", "cifar10", "text", "evalmini"):
        (data / name).mkdir(parents=True)
    for split, number in (("train", 6), ("val", 2)):
        samples = []
        with zipfile.ZipFile(data / f"nlvr/images_{split}.zip", "w") as archive:
            for n in range(number):
                archive.writestr(f"{split}/{n}.png", png((n, 9 if split == "val" else 0, 0), (400, 100)))
                truth = "true" if n % 2 == 0 else "false"
                said = f"<image>\nIs the following statement true or false? There is a box {n}."
                turns = [said, truth, "How many blue objects are in the image?" + CHOICES, "D"]
                samples.append(entry(*turns, image=f"{split}/{n}.png") | {"id": f"{split}-{n}"})
        (data / f"nlvr/llava_{split}.json").write_text(json.dumps(samples))
        rows = [
            {"image": {"bytes": png((n, 0, 99 if split == "val" else 50), (32, 32)), "path": f"{split}/{n}.jpg"},
             "label_name": "dog", "caption": "a photo of a dog."}
            for n in range(number)
        ]  # fmt: skip
        write_parquet(data / f"cifar10/{split}-00000-of-00001.parquet", rows)
        (data / f"text/tinyshakespeare_{split}.txt").write_text(f"{split}: To be,\n\nor not to be.\n")
    with zipfile.ZipFile(data / "evalmini/images_DEVMINI.zip", "w") as archive:
        archive.writestr("x.png", png((3, 0, 50), (32, 32)))
    columns = "index question A B C D answer category image source".split()
    cell = "A" * 80
    lines = [
        ["0", "What is it?", "a", "b", "", "", "A", "digit_sign", cell, "cifar10"],
        ["1", "What is it?", "a", "b", "", "", "A", "object_recognition", "0", "cifar10"],
        ["2", "What is it?", "a", "b", "", "", "A", "object_recognition", "0", "cifar10"],
        ["3", "How many?", "a", "b", "", "", "A", "counting", cell, "nlvr"],
    ]
    table = "\n".join("\t".join(line) for line in [columns, *lines]) + "\n"
    (data / "evalmini/MMBench_DEVMINI.tsv").write_text(table)
    return data


def test_real_prepares_every_part_once(raw, tmp_path, capsys, monkeypatch):
    out = tmp_path / "out"
    assert real.main([f"--data={raw}", f"--output={out}"]) == 0
    manifests = {name: json.loads((out / name / "manifest.json").read_text()) for name in real.PARTS}
    counts = {name: (m["num_records"]["train"], m["num_records"]["val"], m["dropped"]) for name, m in manifests.items()}
    assert [name for name, m in manifests.items() if "text_chars" in m["settings"]] == ["text"]
    assert manifests["cifar10"]["dropped_examples"] == {"in_evaluation": ["train-00000-of-00001.parquet[3]"]}
    false = manifests["nlvr_generation"]["dropped_examples"]["false_statement"]
    assert false == [f"llava_train.json[{n}]" for n in (1, 3, 5)]
    assert counts == {
        "nlvr": (6, 2, {}),
        "nlvr_statements": (6, 2, {}),
        "nlvr_generation": (3, 1, {"false_statement": 4}),
        "cifar10": (5, 2, {"in_evaluation": 1}),
        "cifar10_generation": (5, 2, {"in_evaluation": 1}),
        "text": (1, 1, {}),
    }
    asked = {r.segments[1].text for r in read_records(out / "nlvr", "train")}
    assert asked == {"How many blue objects are in the image?"}
    stated = read_records(out / "nlvr_statements", "train")[0].segments[1].text
    assert stated.startswith("Is the following statement about the image true? There is a box")
    drawn = read_records(out / "nlvr_generation", "train")[0].segments
    assert isinstance(drawn[1], ImageSegment) and drawn[0].text.startswith("There is a box")
    photo = read_records(out / "cifar10", "train")[0].segments
    assert [s.text for s in photo[1:3]] == ["What is the main object in this image?", " dog"]
    table = [line.split("\t") for line in (out / "benchmarks/cifar10.tsv").read_text().splitlines()]
    assert [(line[0], line[8]) for line in table[1:]] == [("1", "A" * 80), ("2", "1")]
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*.array_record")}
    capsys.readouterr()
    assert real.main([f"--data={raw}", f"--output={out}"]) == 0
    assert capsys.readouterr().out.count("finished earlier") == len(real.PARTS)
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*.array_record")} == before
    monkeypatch.setattr(real, "TEXT_CHARS", real.TEXT_CHARS + 1)
    assert real.main([f"--data={raw}", f"--output={out}"]) == 2
    said = capsys.readouterr()
    assert said.out.count("finished earlier") == len(real.PARTS) - 1 and f"remove {out / 'text'}" in said.err
    monkeypatch.undo()
    (raw / "text/tinyshakespeare_train.txt").write_text("another text\n")
    assert real.main([f"--data={raw}", f"--output={out}"]) == 2
    assert "made from other data or with other settings; remove" in capsys.readouterr().err
