"""The scene world's folder: what the records and question files hold, the same bytes each time, never half a folder."""

import base64
import csv
import io
import itertools
import json
import re
import shutil
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from data_pipelines import scene_world
from data_pipelines.scene_questions import QUESTION_KINDS, make_question
from data_pipelines.scenes import (
    BACKGROUND,
    COLORS,
    HELD_OUT,
    LOCATIONS,
    SHAPES,
    caption,
    encode_png,
    make_scene,
    render,
    scene_rng,
)
from data_pipelines.writer import read_records
from unihetero_jax.data import records
from unihetero_jax.data.records import ImageSegment, ImageSpec, TextSegment, decode_image
from unihetero_jax.data.tokenizer import load_tokenizer
from unihetero_jax.evaluation.benchmarks import read_benchmark

SPEC = ImageSpec(8, 36, 36)
NUM_SCENES = 120
SEED = 5
ITEMS = 6


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    path = tmp_path_factory.mktemp("worlds") / "easy"
    scene_world.write_scene_world(path, "easy", NUM_SCENES, SPEC, 512, seed=SEED, items_per_kind=ITEMS)
    return path


def stored_records(folder):
    return read_records(folder, "train") + read_records(folder, "val")


def scene_of(record):
    """The scene that a record's id names, and its picture."""
    split, _, index = record.meta["id"].partition("-")
    scene = make_scene(SEED, split, "easy", int(index))
    return scene, render(scene, SEED, split)


def test_world_has_the_parts_of_the_contract(world):
    assert {p.name for p in world.iterdir()} == {
        "qa", "generation", "tokenizer", "questions.tsv", "questions_heldout.tsv", "manifest.json",
    }  # fmt: skip
    assert [p.name for p in world.parent.iterdir()] == ["easy"]
    assert load_tokenizer(world / "tokenizer").vocab_size <= 512


def test_qa_records_are_an_image_and_independent_turns(world):
    tokenizer = load_tokenizer(world / "tokenizer")
    stored = stored_records(world / "qa")
    assert len(stored) == NUM_SCENES + 200
    described = 0
    for record in stored:
        image, *texts = record.segments
        scene, picture = scene_of(record)
        assert isinstance(image, ImageSegment)
        assert np.array_equal(decode_image(image.data), picture)
        assert [t.branch for t in texts] == [branch for branch in range(1, len(texts) // 2 + 1) for _ in range(2)]
        assert [t.loss for t in texts] == [False, True] * (len(texts) // 2)
        for prompt, answer in zip(texts[::2], texts[1::2], strict=True):
            assert answer.text.startswith(" ") and prompt.text == prompt.text.strip()
            if prompt.text == scene_world.CAPTION_PROMPT:
                described += 1
                assert all(f"{item.color} {item.shape}" in answer.text for item in scene.objects)
            else:
                assert len(answer.text.split()) <= 2
                assert len(tokenizer.encode(answer.text)) <= 2
    assert 0 < described < len(stored) / 3


def test_generation_records_are_a_caption_then_its_scene(world):
    stored = stored_records(world / "generation")
    assert len(stored) == NUM_SCENES + 200
    for record in stored:
        text, image = record.segments
        assert isinstance(text, TextSegment) and text.branch == 0
        scene, picture = scene_of(record)
        assert np.array_equal(decode_image(image.data), picture)
        assert all(f"{item.color} {item.shape}" in text.text for item in scene.objects)


def test_a_source_tells_what_is_where_if_it_is_asked_for(tmp_path):
    scene_world.write_scene_world(tmp_path / "told", "easy", 40, SPEC, 512, SEED, items_per_kind=1, with_objects=True)
    stored = stored_records(tmp_path / "told" / "objects")
    for record in stored:
        image, *texts = record.segments
        scene, picture = scene_of(record)
        assert np.array_equal(decode_image(image.data), picture)
        told = {prompt.text: answer for prompt, answer in zip(texts[::2], texts[1::2], strict=True)}
        assert all(answer.loss for answer in told.values()) and not any(prompt.loss for prompt in texts[::2])
        for item in scene.objects:
            answer = next(answer for prompt, answer in told.items() if f"What is {scene.location(item)}?" in prompt)
            assert f"{item.size} {item.color} {item.shape}" in answer.text
        empty = [answer for answer in told.values() if "nothing" in answer.text]
        assert len(empty) == 1 and len(told) == len(scene.objects) + 1, "objects of the easy world lie apart"
    settings = json.loads((tmp_path / "told" / "manifest.json").read_text())
    assert settings["with_objects"] is True and settings["items_per_kind"] == 1
    scene_world.ensure_index(str(tmp_path / "told"), SPEC, "repeated_prefix", with_objects=True)
    assert len(list((tmp_path / "told" / "objects" / "index").glob("*.train.npy"))) == 2


def pictures(records):
    return {s.data for record in records for s in record.segments if isinstance(s, ImageSegment)}


def test_validation_pictures_are_trained_on_in_neither_source(world):
    """A caption is unseen only if its picture is, and the two sources hold the same scenes."""
    train = [pictures(read_records(world / name, "train")) for name in ("qa", "generation")]
    val = [pictures(read_records(world / name, "val")) for name in ("qa", "generation")]
    assert train[0] == train[1] and val[0] == val[1], "the split is by scene, the same in both"
    assert (len(train[0]), len(val[0])) == (NUM_SCENES, 200)
    asked = set()
    for name in ("questions.tsv", "questions_heldout.tsv"):
        with (world / name).open(newline="") as file:
            asked |= {base64.b64decode(row["image"]) for row in csv.DictReader(file, delimiter="\t")}
    assert len(asked) == 6 * 6 + 6 * 5
    assert not train[0] & val[0] and not train[0] & asked and not val[0] & asked


def test_validation_scenes_grow_with_the_world_from_a_floor():
    assert [scene_world.num_val_scenes(number) for number in (1, 10_000, 20_000, 40_000)] == [200, 200, 400, 800]


def test_questions_are_a_benchmark_about_unseen_scenes(world):
    items = read_benchmark(world / "questions.tsv").items
    assert Counter(item.category for item in items) == dict.fromkeys(QUESTION_KINDS, 6)
    with (world / "questions.tsv").open(newline="") as file:
        rows = list(csv.DictReader(file, delimiter="\t"))
    columns = "index question hint A B C D answer category image source l2-category comment split"
    assert list(rows[0]) == columns.split()
    trained = {render(make_scene(SEED, "train", "easy", n), SEED, "train").tobytes() for n in range(NUM_SCENES)}
    for row, item in zip(rows, items, strict=True):
        scene = make_scene(SEED, "test", "easy", int(row["comment"].removeprefix("test-")))
        picture = np.asarray(Image.open(io.BytesIO(base64.b64decode(row["image"]))))
        assert np.array_equal(picture, render(scene, SEED, "test"))
        assert picture.tobytes() not in trained
        assert row[row["answer"]] == item.options[item.answer]
        assert [row[letter] for letter in "ABCD" if row[letter]] == list(item.options)


def test_compositional_questions_are_about_heldout_pairs(world):
    items = read_benchmark(world / "questions_heldout.tsv").items
    assert Counter(item.category for item in items) == dict.fromkeys(set(QUESTION_KINDS) - {"count"}, 6)
    for item in items:
        words = re.findall("[a-z]+", item.question)
        if item.category in ("color", "shape"):
            words += [item.options[item.answer]]
            pair = (next(w for w in words if w in COLORS), next(w for w in words if w in SHAPES))
            assert pair in HELD_OUT
        else:
            assert set(itertools.pairwise(words)) & HELD_OUT


def test_two_worlds_of_a_seed_are_equal_byte_by_byte(world, tmp_path):
    again = tmp_path / "again"
    scene_world.write_scene_world(again, "easy", NUM_SCENES, SPEC, 512, seed=SEED, items_per_kind=ITEMS)
    files = sorted(p.relative_to(world) for p in world.rglob("*") if p.is_file())
    assert files == sorted(p.relative_to(again) for p in again.rglob("*") if p.is_file())
    assert all((world / name).read_bytes() == (again / name).read_bytes() for name in files)


def test_existing_world_is_kept_and_another_is_refused(world, capsys):
    before = (world / "manifest.json").stat()
    scene_world.ensure_scene_world(str(world), "easy", NUM_SCENES, SPEC, 512, SEED, ITEMS)
    assert capsys.readouterr().out == ""
    assert (world / "manifest.json").stat() == before
    with pytest.raises(ValueError, match=r"holds another scene world .*num_scenes 120 instead of 130"):
        scene_world.ensure_scene_world(str(world), "easy", 130, SPEC, 512, SEED, ITEMS)
    with pytest.raises(ValueError, match=r"holds another scene world \(seed 5 instead of 0\); remove it"):
        scene_world.ensure_scene_world(str(world), "easy", NUM_SCENES, SPEC, 512, items_per_kind=ITEMS)
    with pytest.raises(ValueError, match=r"\(with_objects False instead of True\); remove it"):
        scene_world.ensure_scene_world(str(world), "easy", NUM_SCENES, SPEC, 512, SEED, ITEMS, with_objects=True)
    with pytest.raises(ValueError, match="exists; remove it"):
        scene_world.write_scene_world(world, "easy", 10, SPEC, 512)


def test_an_index_for_another_layout_of_turns_is_added_once(world, tmp_path):
    copy = tmp_path / "world"
    shutil.copytree(world, copy)
    scene_world.ensure_index(str(copy), SPEC, "repeated_prefix")
    key, plain = (records.index_key(load_tokenizer(copy / "tokenizer").hash, SPEC, turns)
                  for turns in ("repeated_prefix", "branches"))  # fmt: skip
    for name, is_longer in (("qa", True), ("generation", False)):
        repeated, branches = (np.load(copy / name / "index" / f"{k}.train.npy")["num_tokens"] for k in (key, plain))
        assert (repeated > branches).all() == is_longer and (repeated == branches).all() != is_longer
    made = (copy / "qa" / "index" / f"{key}.val.npy").stat()
    scene_world.ensure_index(str(copy), SPEC, "repeated_prefix")
    assert (copy / "qa" / "index" / f"{key}.val.npy").stat() == made


def test_a_world_of_an_earlier_version_is_refused(tmp_path):
    """Version 4 split each source by itself, so its validation pictures were trained on."""
    settings = {"version": 4, "level": "easy", "num_scenes": 5, "seed": 0}
    (tmp_path / "manifest.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match=r"holds another scene world \(version 4 instead of 5\); remove it"):
        scene_world.ensure_scene_world(str(tmp_path), "easy", 5, SPEC, 512)


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"3", b"\xff\xfe"])
def test_a_corrupt_manifest_is_named(tmp_path, content):
    (tmp_path / "manifest.json").write_bytes(content)
    with pytest.raises(ValueError, match=rf"{re.escape(str(tmp_path / 'manifest.json'))} .*remove .* to make it anew"):
        scene_world.ensure_scene_world(str(tmp_path), "easy", 5, SPEC, 512)


@pytest.mark.parametrize("their_scenes", [5, 6])
def test_a_world_that_another_run_finished_first_is_used_if_it_is_the_same(tmp_path, monkeypatch, capsys, their_scenes):
    write_questions = scene_world.write_questions

    def meanwhile(path, *arguments):
        if not (tmp_path / "world").exists():  # the other run's folder appears while this one is at its last step
            other = tmp_path / "world"
            other.mkdir()
            settings = {"version": scene_world.VERSION, "level": "easy", "num_scenes": their_scenes, "seed": 0}
            (other / "manifest.json").write_text(json.dumps(settings))
        write_questions(path, *arguments[:3], 1)

    monkeypatch.setattr(scene_world, "write_questions", meanwhile)
    if their_scenes == 5:
        scene_world.ensure_scene_world(str(tmp_path / "world"), "easy", 5, SPEC, 512)
        assert "another process finished it first" in capsys.readouterr().out
    else:
        with pytest.raises(ValueError, match="num_scenes 6 instead of 5"):
            scene_world.ensure_scene_world(str(tmp_path / "world"), "easy", 5, SPEC, 512)
    assert [p.name for p in tmp_path.iterdir()] == ["world"], "what the slower run wrote is left"
    assert [p.name for p in (tmp_path / "world").iterdir()] == ["manifest.json"], "the other run's world was touched"


def test_a_failure_midway_leaves_nothing(tmp_path, monkeypatch):
    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(scene_world, "write_questions", fail)
    with pytest.raises(OSError, match="disk full"):
        scene_world.write_scene_world(tmp_path / "world", "easy", 5, SPEC, 512)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--num-scenes=0"], "num_scenes 0 must be positive"),
        (["--num-scenes=5", "--vocab-size=10"], "vocab_size 10 is below"),
        (["--min-patches=9", "--max-patches=8"], "--min-patches 9, --max-patches 8"),
        (["--patch-size=0"], "--patch-size: 0 must be positive"),
    ],
)
def test_command_line_refuses_with_exit_code_2(tmp_path, capsys, flags, message):
    assert scene_world.main([f"--output={tmp_path / 'world'}", *flags]) == 2
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_easy_objects_stand_in_cells_of_their_own():
    for index in range(200):
        scene = make_scene(0, "train", "easy", index)
        picture = render(scene).astype(int)
        cells = {(int(item.y) // 16, int(item.x) // 16): item for item in scene.objects}
        assert len(cells) == len(scene.objects)
        for row, column in np.ndindex(3, 3):
            window = picture[16 * row : 16 * row + 16, 16 * column : 16 * column + 16]
            item = cells.get((row, column))
            if item is None:
                assert (window == BACKGROUND).all()
            else:
                assert (window == COLORS[item.color]).all(-1).any()
    assert np.array_equal(decode_image(encode_png(picture.astype(np.uint8))), picture)


@pytest.mark.parametrize("level", ["easy", "hard"])
def test_captions_name_every_object_and_vary(level):
    texts = set()
    for index in range(100):
        scene = make_scene(0, "train", level, index)
        text = caption(scene, scene_rng(0, "train", level, index, "caption"))
        texts.add(text)
        for item in scene.objects:
            place = scene.location(item)
            assert re.search(rf"{item.color} {item.shape} (at|in) the ({place}|middle)\b", text), text
        assert len(re.findall(rf"\b({'|'.join(COLORS)}) ({'|'.join(SHAPES)})\b", text)) == len(scene.objects)
        assert not re.search(r"\ba orange|\ban [^aeiou]", text)
    assert len(texts) > 90


def test_places_of_the_hard_level_are_asked_for_equally_often():
    """Objects keep away from the border, so that more of them lie in the middle; the questions make up for it."""
    answers = Counter()
    for index in range(4000):
        scene = make_scene(2, "train", "hard", index)
        question = make_question("location", scene, scene_rng(2, "train", "hard", index, "questions"))
        if question:
            answers[question.answer] += 1
    expected = sum(answers.values()) / 9
    assert all(abs(answers[place] - expected) < 4.5 * expected**0.5 for place in LOCATIONS), answers
