"""TensorFlow Datasets to records: literal examples in, literal records out; small sets are prepared and read back."""

import importlib.abc
import io
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from data_pipelines.entries import Dropped
from data_pipelines.tfds_builder import TfdsOptions, parse_example, read_tfds
from unihetero_jax.data import records
from unihetero_jax.data.records import ImageSegment, Record, TextSegment

WHERE = "set/1.0.0/train[3]"
ASKED = "What is the main object in this image?"


def encoded(color, form="PNG", size=(8, 6)):
    buffer = io.BytesIO()
    Image.new("RGB", size, color).save(buffer, form)
    return buffer.getvalue()


RED = ImageSegment(encoded("red", "JPEG"), 6, 8)
NAMES = {"label": ("cat", "dog ")}


def example(**changes):
    fields = {
        "image": RED.data,
        "label": 1,
        "caption": b" a dog. ",
        "captions": {"text": [b"one", b"", b"two"], "id": [1, 2, 3]},
        "qa": {"question": [b"What?", b"How many?"], "answer": [b"dog", np.int64(3)]},
    }
    return fields | changes


def parse(options, **changes):
    return parse_example(example(**changes), TfdsOptions("set", **options), WHERE, NAMES)


def turn(question, answer, branch):
    return TextSegment(question, False, branch), TextSegment(answer, True, branch)


# ---------------------------------------------------------------- one example


def test_a_caption_alone_makes_a_pair():
    (record,) = parse({"caption": "caption"})
    assert record == Record("set", "caption", (RED, TextSegment("a dog.", True)), {"id": WHERE})
    assert record.where == WHERE


def test_each_caption_of_a_sequence_makes_a_pair_or_is_dropped():
    one, empty, two = parse({"caption": "captions/text"})
    assert [record.segments[1].text for record in (one, two)] == ["one", "two"]
    assert empty.reason == "empty_caption" and empty.where.startswith(WHERE)


def test_a_label_questions_and_a_caption_make_independent_turns():
    options = {"label": "label", "question": "qa/question", "answer": "qa/answer", "caption": "caption"}
    turns = (
        *turn(ASKED, " dog", 1),
        *turn("What?", " dog", 2),
        *turn("How many?", " 3", 3),
        *turn("Describe this image.", " a dog.", 4),
    )
    assert parse(options) == [Record("set", "vqa", (RED, *turns), {"id": WHERE})]


def test_the_bytes_of_an_image_choose_the_wording():
    options = {"label": "label", "questions": ("What is it?", "Name it.")}
    asked = [parse(options, image=encoded((number, 0, 0)))[0].segments[1].text for number in range(40)]
    assert asked == [parse(options, image=encoded((number, 0, 0)))[0].segments[1].text for number in range(40)]
    assert min(asked.count(wording) for wording in options["questions"]) >= 8


@pytest.mark.parametrize("shape", [(6, 8, 3), (6, 8, 4), (6, 8, 1), (6, 8)])
def test_an_array_becomes_png_and_says_so(shape):
    pixels = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    if shape[2:] == (4,):
        pixels[..., 3] = 255
    (record,) = parse({"label": "label"}, image=pixels)
    assert record.meta == {"id": WHERE, "encoding": "PNG of an array"}
    image = record.segments[0]
    assert (image.height, image.width) == (6, 8)
    expected = np.broadcast_to(pixels.reshape(6, 8, -1)[..., :3], (6, 8, 3))
    assert np.array_equal(records.decode_image(image.data), expected)


QA = {"question": "qa/question", "answer": "qa/answer"}
REFUSED = {
    "no_image": ({"image": None}, {"label": "label"}, "missing_feature"),
    "empty_image": ({"image": b""}, {"label": "label"}, "empty_image"),
    "no_picture": ({"image": b"no image"}, {"caption": "caption"}, "not_an_image"),
    "floats": ({"image": np.zeros((6, 8, 3))}, {"label": "label"}, "not_an_image"),
    "five_channels": ({"image": np.zeros((6, 8, 5), np.uint8)}, {"label": "label"}, "not_an_image"),
    "no_pixels": ({"image": np.zeros((0, 8, 3), np.uint8)}, {"label": "label"}, "not_an_image"),
    "unknown_class": ({"label": -1}, {"label": "label"}, "unknown_label"),
    "class_beyond_the_names": ({"label": 2}, {"label": "label"}, "unknown_label"),
    "empty_label": ({"label": b" "}, {"label": "label"}, "empty_answer"),
    "no_labels": ({"label": []}, {"label": "label"}, "empty_conversation"),
    "no_label": ({"label": None}, {"label": "label"}, "missing_feature"),
    "fraction": ({"label": 0.5}, {"label": "label"}, "not_a_text"),
    "no_utf8": ({"caption": b"\xff"}, {"caption": "caption"}, "invalid_text"),
    "blank_caption": ({"caption": b" "}, {"caption": "caption"}, "empty_caption"),
    "no_captions": ({"caption": []}, {"caption": "caption"}, "empty_caption"),
    "no_such_part": ({"qa": {"question": [b"What?"]}}, QA, "missing_feature"),
    "one_answer_more": ({"qa": {"question": [b"What?"], "answer": [b"1", b"2"]}}, QA, "answer_count"),
    "no_questions": ({"qa": {"question": [], "answer": []}}, QA, "empty_conversation"),
    "empty_answer": ({"qa": {"question": b"What?", "answer": b""}}, QA, "empty_answer"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_makes_no_record_has_a_reason_and_a_place(name):
    changes, options, reason = REFUSED[name]
    (dropped,) = parse(options, **changes)
    assert isinstance(dropped, Dropped)
    assert dropped.reason == reason and dropped.where.startswith(WHERE)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "caption, label or question feature is needed"),
        ({"image": "", "label": "label"}, "image feature is needed"),
        ({"question": "q"}, "needs an answer feature"),
        ({"answer": "a", "caption": "c"}, "an answer feature a question"),
        ({"label": "label", "questions": ()}, "needs a question that the label answers"),
    ],
)
def test_options_that_ask_nothing_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        TfdsOptions("set", **options)


# ---------------------------------------------------------------- prepared sets

COLORS = ("red", "blue", "green", "white")


class SmallSet(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """Four photographs; nobody asks for `thumbnail`, which cannot be decoded."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        features = tfds.features
        objects = {"name": features.ClassLabel(names=["disc", "box"]), "crop": features.Image(shape=(6, 8, 3))}
        return tfds.core.DatasetInfo(
            builder=self,
            features=features.FeaturesDict(
                {
                    "image": features.Image(shape=(None, None, 3)),
                    "label": features.ClassLabel(names=["cat", "dog"]),
                    "number": np.int64,
                    "captions": features.Sequence({"text": features.Text()}),
                    "inner": {"image": features.Image(shape=(None, None, 3)), "name": features.Text()},
                    "pixels": features.Tensor(shape=(6, 8, 3), dtype=np.uint8),
                    "depth": features.Tensor(shape=(6, 8, 1), dtype=np.float32),
                    "objects": features.Sequence(objects),
                    "thumbnail": features.Image(shape=(None, None, 3)),
                }
            ),
        )

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples()}

    def _generate_examples(self):
        for number, color in enumerate(COLORS):
            yield (
                number,
                {
                    "image": io.BytesIO(encoded(color, "JPEG")),
                    "label": number % 2,
                    "number": number,
                    "captions": [{"text": color}, {"text": f"all {color}"}],
                    "inner": {"image": io.BytesIO(encoded(color, "WEBP")), "name": f"inner {color}"},
                    "pixels": np.full((6, 8, 3), number, np.uint8),
                    "depth": np.zeros((6, 8, 1), np.float32),
                    "objects": [{"name": name, "crop": io.BytesIO(encoded(color))} for name in (1, 0)],
                    "thumbnail": io.BytesIO(b"no image"),
                },
            )


@pytest.fixture(scope="module", params=["array_record", "parquet"])
def prepared(request, tmp_path_factory):
    """The folder of a prepared set in one of the formats that can be read without TensorFlow."""
    builder = SmallSet(data_dir=tmp_path_factory.mktemp(request.param), file_format=request.param)
    builder.download_and_prepare()
    return Path(builder.data_path)


class Spy(importlib.abc.MetaPathFinder):
    """Notes each attempt to import TensorFlow, whether it is there or not."""

    def __init__(self):
        self.attempts = []

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "tensorflow":
            self.attempts.append(name)


def test_a_prepared_set_is_read_without_tensorflow_and_keeps_its_bytes(prepared, monkeypatch):
    spy = Spy()
    monkeypatch.setattr(sys, "meta_path", [spy, *sys.meta_path])
    made = list(read_tfds(str(prepared), "train", TfdsOptions("set", label="label", caption="captions/text")))
    assert spy.attempts == [] and "tensorflow" not in sys.modules
    expected = {
        (encoded(color, "JPEG"), (" cat", " dog")[number % 2], f" {color}", f" all {color}")
        for number, color in enumerate(COLORS)
    }
    assert len(made) == 4
    assert {(r.segments[0].data, *(s.text for s in r.segments[2::2])) for r in made} == expected
    assert [record.meta["id"] for record in made] == [f"small_set/1.0.0/train[{number}]" for number in range(4)]
    assert made == list(read_tfds(str(prepared), "train", TfdsOptions("set", label="label", caption="captions/text")))


def test_features_inside_others_and_arrays(prepared):
    made = list(read_tfds(str(prepared), "train", TfdsOptions("set", image="inner/image", caption="inner/name")))
    assert {(r.segments[0].data, r.segments[1].text) for r in made} == {
        (encoded(color, "WEBP"), f"inner {color}") for color in COLORS
    }
    made = list(
        read_tfds(str(prepared), "train", TfdsOptions("set", image="pixels", question="inner/name", answer="number"))
    )
    shades = {int(r.segments[2].text): records.decode_image(r.segments[0].data).max() for r in made}
    assert shades == {0: 0, 1: 1, 2: 2, 3: 3}
    made = list(read_tfds(str(prepared), "train", TfdsOptions("set", label="objects/name")))
    assert [[s.text for s in r.segments[2::2]] for r in made] == [[" box", " disc"]] * 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"caption": "title"}, "no feature 'title'; the set has .*captions.*image"),
        ({"image": "inner/picture", "label": "label"}, "no feature 'inner/picture'"),
        ({"image": "label", "caption": "captions/text"}, "'label' is no single image but a ClassLabel"),
        ({"image": "objects/crop", "label": "label"}, "'objects/crop' is no single image but a Sequence"),
        ({"image": "depth", "label": "label"}, "'depth' is no single image"),
        ({"label": "number"}, "'number' is neither a class with a name nor a text"),
    ],
)
def test_features_that_do_not_serve_are_named(prepared, options, message):
    with pytest.raises(ValueError, match=message):
        list(read_tfds(str(prepared), "train", TfdsOptions("set", **options)))


LABEL = TfdsOptions("set", label="label")


def test_splits(prepared):
    with pytest.raises(ValueError, match=r"split 'test' cannot be read: Unknown split"):
        list(read_tfds(str(prepared), "test", LABEL))
    if prepared.parent.parent.name.startswith("array_record"):
        whole = list(read_tfds(str(prepared), "train", LABEL))
        part = list(read_tfds(str(prepared), "train[1:3]", LABEL))
        assert [record.segments for record in part] == [record.segments for record in whole[1:3]]
    else:
        with pytest.raises(ValueError, match=r"has 2 examples, 4 would be read; use whole splits"):
            list(read_tfds(str(prepared), "train[1:3]", LABEL))


def test_a_set_is_found_by_its_name(prepared):
    made = list(read_tfds("small_set", "train", LABEL, data_dir=prepared.parent.parent))
    assert len(made) == 4
    assert made == list(read_tfds("small_set:1.0.0", "train", LABEL, data_dir=prepared.parent.parent))


def test_sets_that_are_not_there_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"mnist is not prepared in .*run tfds build mnist --file_format=array_record"):
        list(read_tfds("mnist", "train", LABEL, data_dir=tmp_path))
    for name in ("no_such_set", str(tmp_path)):
        with pytest.raises(ValueError, match=r"neither a prepared folder nor a known builder: [^\n]*\Z"):
            list(read_tfds(name, "train", LABEL, data_dir=tmp_path))


def copied(prepared, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(prepared, folder)
    (shard,) = folder.glob("small_set-train.*")
    return folder, shard


def test_damaged_sets_are_named(prepared, tmp_path):
    folder, shard = copied(prepared, tmp_path)
    shard.write_bytes(shard.read_bytes()[: shard.stat().st_size // 2])
    with pytest.raises(
        ValueError, match=r"copy: (train\[0\] is empty: a file is damaged|split 'train' cannot be read)"
    ):
        list(read_tfds(str(folder), "train", LABEL))
    shard.unlink()
    with pytest.raises(ValueError, match=r"copy: .*cannot be read"):
        list(read_tfds(str(folder), "train", LABEL))


def test_a_set_in_a_format_that_needs_tensorflow_is_named(prepared, tmp_path):
    folder, _ = copied(prepared, tmp_path)
    info = json.loads((folder / "dataset_info.json").read_text())
    (folder / "dataset_info.json").write_text(json.dumps(info | {"fileFormat": "tfrecord"}))
    with pytest.raises(ValueError, match=r"is stored as tfrecord, which only TensorFlow reads; prepare it with"):
        list(read_tfds(str(folder), "train", LABEL))


def test_an_example_that_is_none_is_dropped_in_its_place(prepared, monkeypatch):
    source = tfds.core.data_sources.base.BaseDataSource
    read = source.__getitem__
    monkeypatch.setattr(source, "__getitem__", lambda self, n: b"\xff no example" if n == 2 else read(self, n))
    made = list(read_tfds(str(prepared), "train", LABEL))
    assert [isinstance(sample, Dropped) for sample in made] == [False, False, True, False]
    assert made[2].reason == "not_an_example" and made[2].where.startswith("small_set/1.0.0/train[2]: ")


def test_importing_the_module_costs_no_tensorflow_datasets():
    code = "import sys, data_pipelines.tfds_builder; sys.exit('tensorflow_datasets' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[1]).returncode == 0


def test_without_tensorflow_datasets_the_remedy_is_named(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
    with pytest.raises(ValueError, match="pip install tensorflow-datasets"):
        list(read_tfds(str(tmp_path), "train", LABEL))
