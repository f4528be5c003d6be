"""Patches, resizing and augmentations."""

import itertools

import numpy as np
import pytest
from PIL import Image

from unihetero_jax.data import transforms
from unihetero_jax.data.records import ImageSegment, ImageSpec, Record, TextSegment


def test_patchify_is_block_major():
    numbered = np.asarray([[0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 12, 13], [10, 11, 14, 15]], np.uint8)
    pixels = np.repeat(np.repeat(numbered, 3, axis=0), 3, axis=1)[..., None].repeat(3, axis=-1)
    patches, coords = transforms.patchify(pixels, 3)
    assert patches.shape == (16, 27)
    assert (patches == np.arange(16)[:, None]).all()
    assert coords[:6].tolist() == [[0, 0], [0, 1], [1, 0], [1, 1], [0, 2], [0, 3]]
    assert [numbered[y, x] for y, x in coords] == list(range(16))


def test_patch_values_are_in_reading_order():
    pixels = np.random.default_rng(0).integers(0, 256, (8, 24, 3), np.uint8)
    patches, coords = transforms.patchify(pixels, 4)
    for patch, (y, x) in zip(patches, coords, strict=True):
        np.testing.assert_array_equal(patch.reshape(4, 4, 3), pixels[4 * y : 4 * y + 4, 4 * x : 4 * x + 4])


@pytest.mark.parametrize(
    ("size", "spec", "expected"),
    [
        ((48, 48), ImageSpec(8, 36, 36), (48, 48)),
        ((100, 400), ImageSpec(8, 4, 144), (48, 192)),
        ((500, 100), ImageSpec(8, 4, 36), (112, 16)),
        ((10, 10), ImageSpec(8, 16, 64), (32, 32)),
    ],
)
def test_resize_keeps_aspect_and_whole_blocks(size, spec, expected):
    pixels = np.full((*size, 3), 77, np.uint8)
    resized = transforms.resize_to_grid(pixels, spec)
    assert resized.shape == (*expected, 3)
    assert resized.dtype == np.uint8
    assert (resized == 77).all()


def test_resize_leaves_a_fitting_image_alone_and_antialiases_others():
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8)
    assert np.array_equal(transforms.resize_to_grid(pixels, ImageSpec(8, 4, 4)), pixels)
    as_pillow = transforms.resize_to_grid(Image.fromarray(pixels), ImageSpec(4, 4, 4))
    assert np.array_equal(as_pillow, transforms.resize_to_grid(pixels, ImageSpec(4, 4, 4)))
    stripes = np.zeros((256, 256, 3), np.uint8)
    stripes[:, ::2] = 255  # without antialias some stripes would survive as black or white
    assert np.abs(transforms.resize_to_grid(stripes, ImageSpec(8, 4, 4)).astype(int) - 127).max() <= 4


def test_mirror_shift_moves_by_a_sixteenth_and_repeats_the_edge():
    pixels = np.arange(32 * 32 * 3, dtype=np.uint32).reshape(32, 32, 3).astype(np.uint8)
    y, x = np.indices((32, 32))
    pixels[..., 0], pixels[..., 1] = y, x
    seen = set()
    for seed in range(300):
        out = transforms.mirror_shift(pixels, np.random.default_rng(seed))
        assert out.shape == pixels.shape
        source_y, source_x = out[..., 0].astype(int), out[..., 1].astype(int)
        mirrored = source_x[0, 20] < source_x[0, 10]
        shift_y, shift_x = source_y[16, 0] - 16, source_x[0, 16] - (15 if mirrored else 16)
        columns = x[:, ::-1] if mirrored else x
        np.testing.assert_array_equal(source_y, np.clip(y + shift_y, 0, 31))
        np.testing.assert_array_equal(source_x, np.clip(columns + shift_x, 0, 31))
        seen.add((bool(mirrored), int(shift_y), int(shift_x)))
    assert seen == set(itertools.product((False, True), range(-2, 3), range(-2, 3)))


QUESTION = "Which box contains the most objects?\nA. right box\nB. all boxes are equal\nC. Left box\nD. middle box"


def nlvr_record(*texts):
    return Record(
        "nlvr",
        "vqa",
        (ImageSegment(b"-", 100, 400), *(TextSegment(t, i % 2 == 1, 1 + i // 2) for i, t in enumerate(texts))),
    )


def nlvr_pixels():
    pixels = np.zeros((100, 400, 3), np.uint8)
    for number, left in enumerate((0, 150, 300), start=1):
        pixels[:, left : left + 100, 0] = number
        pixels[:, left : left + 100, 1] = np.arange(100)  # column within the box
    pixels[..., 2] = np.arange(100)[:, None]
    return pixels


def encode(text):
    return text.split()


def texts_of(record):
    return [s.text for s in record.segments if isinstance(s, TextSegment)]


def test_nlvr_texts_follow_the_boxes():
    record, pixels = nlvr_record(QUESTION, " left", "Where is it?", " middle box"), nlvr_pixels()
    seen = set()
    for seed in range(400):
        new, (image,), left_out = transforms.nlvr(record, [pixels], np.random.default_rng(seed), encode)
        assert not left_out
        boxes = [int(image[0, left + 50, 0]) for left in (0, 150, 300)]  # which box stands at left, middle, right
        names = [("left", "middle", "right")[boxes.index(box)] for box in (1, 2, 3)]  # new names of the three boxes
        left, middle, right = names
        assert texts_of(new) == [
            f"Which box contains the most objects?\nA. {right} box\nB. all boxes are equal\n"
            f"C. {left.capitalize()} box\nD. {middle} box",
            f" {left}",
            "Where is it?",
            f" {middle} box",
        ]
        mirrors = tuple(bool(image[0, start, 1] == 99) for start in (0, 150, 300))
        for start, mirrored in zip((0, 150, 300), mirrors, strict=True):
            columns = np.arange(99, -1, -1) if mirrored else np.arange(100)
            assert (image[:, start : start + 100, 1] == columns).all()
        assert not image[:, 100:150, :2].any()
        seen.add((tuple(boxes), mirrors, bool(image[0, 0, 2] == 99)))
    assert len(seen) > 90  # of 6 x 8 x 2
    assert pixels[0, 0, 0] == 1  # the caller's pixels are untouched


@pytest.mark.parametrize(
    ("text", "reason", "kept"),
    [
        ("There is a tower with a black base.", "nlvr_vertical_word", "rows"),
        ("a black item above a yellow one", "nlvr_vertical_word", "rows"),
        ("the leftmost item is blue, left of all", "nlvr_direction_word", "columns"),
        ("The right box and the object on the right", "nlvr_direction_word", "columns"),
    ],
)
def test_nlvr_leaves_out_what_would_make_a_text_false(text, reason, kept):
    reasons = set()
    for seed in range(40):
        new, (image,), left_out = transforms.nlvr(
            nlvr_record(text, " true"), [nlvr_pixels()], np.random.default_rng(seed), encode
        )
        assert texts_of(new) == [text, " true"]
        if kept == "rows":
            assert image[0, 0, 2] == 0
        else:
            np.testing.assert_array_equal(image[..., :2], nlvr_pixels()[..., :2])
        reasons |= set(left_out)
    assert reason in reasons


def test_nlvr_keeps_lengths():
    def uneven(text):
        return ["x"] * (len(text) + 3 * text.count("middle"))

    for seed in range(30):
        new, (image,), left_out = transforms.nlvr(
            nlvr_record("Where?", " left box"), [nlvr_pixels()], np.random.default_rng(seed), uneven
        )
        assert [len(uneven(t)) for t in texts_of(new)] == [6, 9]
        boxes = [int(image[0, left + 50, 0]) for left in (0, 150, 300)]
        assert boxes == [1, 2, 3] or not left_out
        assert texts_of(new)[1] == " left box" if left_out or boxes[0] == 1 else True
    _, (image,), left_out = transforms.nlvr(
        nlvr_record("Where?", " left"), [np.zeros((64, 64, 3), np.uint8)], np.random.default_rng(0), encode
    )
    assert left_out == ["nlvr_image_size"]
    assert image.shape == (64, 64, 3)


def test_unknown_augmentation():
    with pytest.raises(ValueError, match="augment 'flip' is none of"):
        transforms.augment_sample("flip", nlvr_record("a"), [], np.random.default_rng(0), encode)
