"""COCO captions to records: literal files in, literal records or reasons out; and the real ones where they lie."""

import gzip
import io
import json
import os
import zipfile
from pathlib import Path

import pytest
from PIL import Image

from data_pipelines.coco_captions import (
    AnnotatedImage,
    CocoOptions,
    parse_captions,
    parse_pairs,
    parse_together,
    read_coco,
)
from data_pipelines.entries import Dropped
from unihetero_jax.data.records import ImageSegment, Record, RecordError, TextSegment

DATA = Path(os.environ.get("UNIHETERO_REAL_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))
COCO = DATA / "coco_captions"


def jpeg(color="red", size=(8, 6), **options):
    buffer = io.BytesIO()
    Image.new("RGB", size, color).save(buffer, "JPEG", **options)
    return buffer.getvalue()


FILES = {"red.jpg": jpeg(), "blue.jpg": jpeg("blue", (4, 10)), "text.jpg": b"no image"}
RED = ImageSegment(FILES["red.jpg"], 6, 8)
ENTRY = {
    "license": 5, "file_name": "red.jpg", "coco_url": "http://c", "height": 6, "width": 8, "flickr_url": "http://f",
    "id": 3,
}  # fmt: skip
META = {"image_id": "3", "license": "5", "flickr_url": "http://f"}


def read_image(name):
    if name not in FILES:
        raise RecordError("missing_image", f"{name} does not exist")
    return FILES[name]


def captioned(*captions, **entry):
    annotations = [
        ({"image_id": 3, "id": n, "caption": text}, f"c.json, annotations[{n}]") for n, text in enumerate(captions)
    ]
    return AnnotatedImage(ENTRY | entry, annotations, "c.json, images[0]")


def parse(*captions, mode="separate", **entry):
    options = CocoOptions("coco", mode)
    return {"separate": parse_pairs, "together": parse_together}[mode](
        captioned(*captions, **entry), read_image, options
    )


def test_each_caption_is_a_pair_without_a_prompt():
    made = parse("A dog. ", "Two dogs")
    assert made == [
        Record("coco", "caption", (RED, TextSegment("A dog.", True)), {"id": "0"} | META),
        Record("coco", "caption", (RED, TextSegment("Two dogs", True)), {"id": "1"} | META),
    ]
    assert [record.where for record in made] == ["c.json, annotations[0]", "c.json, annotations[1]"]


def test_what_an_image_does_not_state_is_not_in_its_meta():
    (record,) = parse("A dog.", license=None, flickr_url=["x"])
    assert record.meta == {"id": "0", "image_id": "3"}


def test_captions_together_are_independent_turns():
    (record,) = parse("A dog. ", "Two dogs", mode="together")
    segments = (
        RED,
        TextSegment("Describe this image.", False, 1), TextSegment(" A dog.", True, 1),
        TextSegment("Describe this image.", False, 2), TextSegment(" Two dogs", True, 2),
    )  # fmt: skip
    assert record == Record("coco", "caption", segments, {"id": "3"} | META)
    assert record.where == "c.json, images[0]"
    record, dropped = parse(None, "Two dogs", mode="together")
    assert [segment.text for segment in record.segments[1:]] == ["Describe this image.", " Two dogs"]
    assert dropped.reason == "empty_caption" and dropped.where.startswith("c.json, annotations[0]: ")
    assert [sample.reason for sample in parse("", " ", mode="together")] == ["empty_caption"] * 2
    with pytest.raises(ValueError, match="need a prompt"):
        CocoOptions("coco", "together", prompt=" ")


def test_captions_alone_are_text():
    good, *bad = parse_captions(captioned("A dog. ", " ", None), CocoOptions("coco", "text"))
    assert good == Record("coco", "text", (TextSegment("A dog.", True),), {"id": "0"} | META)
    assert [sample.reason for sample in bad] == ["empty_caption", "empty_caption"]
    assert bad[1].where == "c.json, annotations[2]: caption is None"


@pytest.mark.parametrize(
    ("entry", "reason"),
    [
        ({"file_name": "gone.jpg"}, "missing_image"),
        ({"file_name": "text.jpg"}, "not_an_image"),
        ({"file_name": "blue.jpg"}, "size_mismatch"),
        ({"height": 7}, "size_mismatch"),
        ({"width": None}, "size_mismatch"),
        ({"width": [8]}, "size_mismatch"),
        ({"file_name": None}, "bad_image_entry"),
        ({"file_name": ""}, "bad_image_entry"),
    ],
)
@pytest.mark.parametrize("mode", ["separate", "together"])
def test_what_is_wrong_with_an_image_is_counted_for_each_caption(entry, reason, mode):
    made = parse("A dog.", "Two dogs", mode=mode, **entry)
    assert [sample.reason for sample in made] == [reason] * 2
    assert made[1].where.startswith(f"c.json, annotations[1]: {reason}")


def test_a_size_may_be_stated_before_exif_turns_the_image_or_not_at_all():
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = jpeg(size=(8, 6), exif=exif)
    options = CocoOptions("coco")
    for entry in ({"height": 6, "width": 8}, {"height": 8, "width": 6}, {"height": None, "width": None}):
        (record,) = parse_pairs(captioned("A dog.", **entry), lambda _: turned, options)
        assert record.segments[0] == ImageSegment(turned, 8, 6)


def write(tmp_path, content, name="c.json"):
    data = json.dumps(content).encode()
    (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    return tmp_path / name


CONTENT = {
    "info": {},
    "licenses": [],
    "images": [
        ENTRY | {"id": 1, "file_name": "blue.jpg", "height": 10, "width": 4},
        ENTRY | {"id": 2},
        ENTRY,
        "red.jpg",
        ENTRY | {"id": None},
        ENTRY | {"id": 1},
    ],
    "annotations": [
        {"image_id": 3, "id": 10, "caption": "Red"},
        {"image_id": 1, "id": 11, "caption": "Blue"},
        {"image_id": 9, "id": 12, "caption": "Nobody's"},
        {"image_id": 3, "id": 13, "caption": "Red again"},
        "Red",
        {"image_id": [3], "id": 14, "caption": "Red"},
    ],
}
DROPPED = [
    ("bad_annotation", "c.json, annotations[4]"),
    ("bad_annotation", "c.json, annotations[5]"),
    ("no_caption", "c.json, images[1]"),
    ("bad_image_entry", "c.json, images[3]"),
    ("bad_image_entry", "c.json, images[4]"),
    ("duplicate_image_id", "c.json, images[5]"),
    ("no_image_entry", "c.json, annotations[2]"),
]


def split(samples):
    samples = list(samples)
    kept = [sample for sample in samples if isinstance(sample, Record)]
    dropped = [(each.reason, each.where.partition(":")[0]) for each in samples if isinstance(each, Dropped)]
    assert len(kept) + len(dropped) == len(samples)
    return kept, dropped


def test_a_file_is_read_in_the_order_of_its_images_and_what_has_no_counterpart_is_placed(tmp_path):
    path = write(tmp_path, CONTENT)
    with zipfile.ZipFile(tmp_path / "images.zip", "w") as archive:
        for name, data in FILES.items():
            archive.writestr(f"val2017/{name}", data)
    (tmp_path / "val2017").mkdir()
    for name, data in FILES.items():
        (tmp_path / "val2017" / name).write_bytes(data)
    from_zip = split(read_coco(path, tmp_path / "images.zip", CocoOptions("coco", image_prefix="val2017/")))
    from_folder = split(read_coco(path, tmp_path / "val2017", CocoOptions("coco")))
    assert from_zip == from_folder
    assert [record.segments[1].text for record in from_zip[0]] == ["Blue", "Red", "Red again"]
    assert [record.segments[0].data for record in from_zip[0]] == [FILES["blue.jpg"], *[FILES["red.jpg"]] * 2]
    assert from_zip[1] == DROPPED
    assert split(read_coco(path, tmp_path / "images.zip", CocoOptions("coco")))[0] == []
    together = split(read_coco(path, tmp_path / "val2017", CocoOptions("coco", "together")))
    assert [record.meta["id"] for record in together[0]] == ["1", "3"] and together[1] == DROPPED


def test_text_needs_no_images_and_files_may_be_packed(tmp_path):
    path = write(tmp_path, CONTENT, "c.json.gz")
    kept, dropped = split(read_coco(path, None, CocoOptions("coco", "text")))
    assert [record.segments for record in kept] == [(TextSegment(text, True),) for text in ("Blue", "Red", "Red again")]
    assert [reason for reason, _ in dropped] == [reason for reason, _ in DROPPED]
    with pytest.raises(ValueError, match="--images: captions=separate needs the folder"):
        list(read_coco(path, None, CocoOptions("coco")))


def test_files_that_are_no_captions_are_named(tmp_path):
    instances = {"images": [ENTRY], "annotations": [{"image_id": 3, "id": 1, "bbox": [0, 0, 1, 1]}]}
    for content, message in (
        ([ENTRY], "is a JSON object with the lists images and annotations"),
        ({"images": []}, "is a JSON object with the lists"),
        ({"images": {}, "annotations": []}, "is a JSON object with the lists"),
        (instances, "no annotation has a caption"),
    ):
        with pytest.raises(ValueError, match=rf"c\.json: .*{message}"):
            list(read_coco(write(tmp_path, content), tmp_path, CocoOptions("coco")))
    (tmp_path / "c.json").write_text("{")
    with pytest.raises(ValueError, match=r"c\.json: no readable COCO captions JSON"):
        list(read_coco(tmp_path / "c.json", tmp_path, CocoOptions("coco")))


@pytest.mark.skipif(not DATA.is_dir(), reason=f"the real data are not in {DATA}")
@pytest.mark.parametrize(("name", "num_images"), [("train", 26), ("val", 30)])
def test_real_captions_are_all_read(name, num_images):
    """Five captions of each image, as the raw folder's own description states."""
    path, images = COCO / f"captions_{name}.json", COCO / f"images_{name}.zip"
    kept, dropped = split(read_coco(path, images, CocoOptions("coco")))
    assert (len(kept), dropped) == (5 * num_images, [])
    assert {record.meta["license"] for record in kept} == {"4", "5"}
    assert all(record.meta["flickr_url"].startswith("http") for record in kept)
    kept, dropped = split(read_coco(path, images, CocoOptions("coco", "together")))
    assert ([len(record.segments) for record in kept], dropped) == ([11] * num_images, [])


@pytest.mark.skipif(not DATA.is_dir(), reason=f"the real data are not in {DATA}")
def test_real_captions_without_images_are_text():
    kept, dropped = split(read_coco(COCO / "captions_val2017_4970.json.gz", None, CocoOptions("coco", "text")))
    assert (len(kept), dropped) == (24_864, [])
    assert len({record.meta["image_id"] for record in kept}) == 4970
