"""The stored sample: round trip, image decoding of every kind of file, grids and costs."""

import io
import struct
import subprocess
import sys
import zlib

import numpy as np
import pytest
from PIL import Image

from unihetero_jax.data import records
from unihetero_jax.data.records import ImageSegment, ImageSpec, Record, RecordError, TextSegment


def encoded(picture, kind="PNG", **options):
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


def gradient(height=6, width=9):
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[..., 0] = np.arange(width) * 20
    pixels[..., 1] = np.arange(height)[:, None] * 30
    return pixels


def test_record_comes_back():
    record = Record(
        "set",
        "vqa",
        (ImageSegment(b"\x00\xff", 3, 4), TextSegment("é\x00", False, 1), TextSegment("b", True, 2)),
        {"id": "x", "n": 3, "f": 0.5},
    )
    assert records.deserialize(records.serialize(record)) == record
    assert records.content_hash(b"abc") == 0x78AF5F94892F3950


@pytest.mark.parametrize("data", [b"", b"\x00", b"no record at all", b"\x93\x01\x02\x03", b"\x81\xa1a\x01", b"\xc1"])
def test_other_bytes_are_refused(data):
    with pytest.raises(RecordError) as caught:
        records.deserialize(data)
    assert caught.value.reason == "not_a_record"


def test_every_truncation_of_a_record_is_refused():
    data = records.serialize(Record("s", "text", (ImageSegment(b"123456", 1, 1), TextSegment("abc", True)), {"k": 1}))
    for length in range(len(data)):
        with pytest.raises(RecordError):
            records.deserialize(data[:length])


def test_damaged_bodies_are_refused_with_a_reason():
    import msgpack

    body = {"v": 1, "source": "s", "kind": "text", "segments": [{"t": "a", "l": True, "b": 0}], "meta": {}}
    for field, value in {"segments": [{"x": 1}], "source": None, "meta": 3}.items():
        broken = {**body, field: value} if value is not None else {k: v for k, v in body.items() if k != field}
        with pytest.raises(RecordError, match="not_a_record"):
            records.deserialize(msgpack.packb(broken))
    with pytest.raises(RecordError, match="record has version 2"):
        records.deserialize(msgpack.packb({**body, "v": 2}))


def test_order_of_segments_is_checked():
    with pytest.raises(RecordError, match="branch_order"):
        Record("s", "vqa", (TextSegment("a", False, 2), TextSegment("b", False, 1)))
    with pytest.raises(RecordError, match="image_in_branch"):
        Record("s", "vqa", (TextSegment("a", False, 1), ImageSegment(b"", 1, 1)))


def test_plain_png_is_exact_and_greyscale_is_repeated():
    np.testing.assert_array_equal(records.decode_image(encoded(Image.fromarray(gradient()))), gradient())
    grey = gradient()[..., 0]
    np.testing.assert_array_equal(records.decode_image(encoded(Image.fromarray(grey))), grey[..., None].repeat(3, -1))


def test_sixteen_bit_keeps_its_range():
    values = np.asarray([[0, 257, 32896, 65535]], np.uint16)
    assert records.decode_image(encoded(Image.fromarray(values)))[0, :, 0].tolist() == [0, 1, 128, 255]


def test_alpha_and_palette_transparency_lie_on_white():
    rgba = np.zeros((2, 2, 4), np.uint8)
    rgba[0, 0], rgba[0, 1], rgba[1, 0] = (10, 20, 30, 255), (10, 20, 30, 0), (0, 0, 0, 128)
    out = records.decode_image(encoded(Image.fromarray(rgba)))
    assert (
        out[0, 0].tolist() == [10, 20, 30] and out[0, 1].tolist() == [255, 255, 255] and out[1, 0].tolist() == [127] * 3
    )
    palette = Image.new("P", (2, 1))
    palette.putpalette([200, 0, 0, 0, 200, 0])
    palette.putdata([0, 1])
    assert records.decode_image(encoded(palette, transparency=0))[0].tolist() == [[255, 255, 255], [0, 200, 0]]


def test_cmyk_and_animation():
    cmyk = Image.new("CMYK", (4, 4), (0, 255, 255, 0))
    red = records.decode_image(encoded(cmyk, "JPEG", quality=95))
    assert red.shape == (4, 4, 3) and red[..., 0].min() > 200 and red[..., 1:].max() < 60
    frames = [Image.new("RGB", (3, 3), color) for color in ("red", "blue")]
    data = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert records.decode_image(data)[0, 0].tolist() == [255, 0, 0]


TURNED = {
    1: lambda pixels: pixels,
    2: np.fliplr,
    3: lambda pixels: np.rot90(pixels, 2),
    4: np.flipud,
    5: lambda pixels: pixels.swapaxes(0, 1),
    6: lambda pixels: np.rot90(pixels, -1),
    7: lambda pixels: np.rot90(pixels, 2).swapaxes(0, 1),
    8: np.rot90,
}
"""How the picture of each EXIF orientation must be turned to stand upright; any other value leaves it."""


def exif_of(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


@pytest.mark.parametrize("orientation", TURNED)
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("PNG", {}),
        ("JPEG", {"quality": 95}),
        ("WEBP", {"lossless": True}),
        ("TIFF", {}),
        ("TIFF", {"compression": "tiff_lzw"}),
    ],
)
def test_exif_orientation_is_applied_and_seen_by_the_probe(kind, options, orientation):
    picture = Image.fromarray(gradient())
    upright = records.decode_image(encoded(picture, kind, **options))
    if kind != "JPEG":
        np.testing.assert_array_equal(upright, gradient())
    data = encoded(picture, kind, exif=exif_of(orientation), **options)
    decoded = records.decode_image(data)
    np.testing.assert_array_equal(decoded, TURNED[orientation](upright))
    assert records.probe_image(data) == decoded.shape[:2] == ((9, 6) if orientation in (5, 6, 7, 8) else (6, 9))


@pytest.mark.parametrize("orientation", [0, 9, 65535])
def test_orientations_that_do_not_exist_mean_upright(orientation):
    data = encoded(Image.fromarray(gradient()), "PNG", exif=exif_of(orientation))
    assert records.probe_image(data) == (6, 9)
    np.testing.assert_array_equal(records.decode_image(data), gradient())


def test_tiff_that_names_its_orientation_in_xmp_alone():
    """Pillow reads the tag for the size but the XMP for the turn, so the two could differ."""
    xmp = b'<x:xmpmeta><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
    data = encoded(Image.fromarray(gradient()), "TIFF", tiffinfo={700: xmp})
    assert records.probe_image(data) == records.decode_image(data).shape[:2]


def test_odd_exif_does_not_matter_unless_it_hides_the_orientation():
    """A tag of a kind that could not be written again used to end the whole preparation."""
    # Little-endian TIFF header and one directory: orientation 6, and a copyright (ASCII) with numbers as its type.
    entries = struct.pack("<HHIHH", 0x0112, 3, 1, 6, 0) + struct.pack("<HHII", 0x8298, 5, 1, 38)
    body = b"II*\0" + struct.pack("<IH", 8, 2) + entries + struct.pack("<I", 0) + struct.pack("<II", 1, 0)
    exif = b"Exif\0\0" + body
    data = encoded(Image.fromarray(gradient()), "JPEG", exif=exif)
    assert records.probe_image(data) == records.decode_image(data).shape[:2] == (9, 6)


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")  # Pillow tells of tags that it skips
def test_damaged_headers_never_escape_as_another_error():
    """Bytes changed where headers and EXIF lie; probe and decoder agree on every image that survives."""
    rng = np.random.default_rng(1)
    exif = exif_of(6)
    exif.update({0x010E: "title", 0x011A: 72.0, 0x8298: "someone"})
    picture = Image.fromarray(gradient(24, 40))
    starts = [encoded(picture, kind, exif=exif) for kind in ("JPEG", "PNG", "TIFF", "WEBP")]
    results = {"image": 0, "error": 0}
    for number in range(400):
        damaged = bytearray(starts[number % len(starts)])
        for place in rng.integers(0, min(len(damaged), 260), rng.integers(1, 6)):
            damaged[place] = rng.choice([0, 1, 255, rng.integers(256)])
        try:
            size = records.probe_image(bytes(damaged))
            decoded = records.decode_image(bytes(damaged))
        except RecordError:
            results["error"] += 1
            continue
        assert decoded.shape == (*size, 3) and decoded.dtype == np.uint8
        results["image"] += 1
    assert min(results.values()) > 50, results


def test_floats_have_a_defined_range():
    values = np.asarray([[np.nan, -1, 0.5], [1, np.inf, -np.inf]], np.float32)
    decoded = records.decode_image(encoded(Image.fromarray(values), "TIFF"))
    assert decoded[..., 0].tolist() == [[0, 0, 128], [255, 255, 0]]
    nothing = np.full((1, 2), np.nan, np.float32)
    assert not records.decode_image(encoded(Image.fromarray(nothing), "TIFF")).any()


def test_wide_integers_are_clipped_to_sixteen_bits():
    values = np.asarray([[-5, 0, 257, 65535, 70_000]], np.int32)
    assert records.decode_image(encoded(Image.fromarray(values), "TIFF"))[0, :, 0].tolist() == [0, 0, 1, 255, 255]


def png_chunk(name, body):
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


def test_transparent_value_of_sixteen_bit_grey_lies_on_white():
    pixels = np.asarray([[257, 514, 65535]], ">u2")
    header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", 3, 1, 16, 0, 0, 0, 0))
    chunks = png_chunk(b"tRNS", struct.pack(">H", 257)) + png_chunk(b"IDAT", zlib.compress(b"\0" + pixels.tobytes()))
    data = b"\x89PNG\r\n\x1a\n" + header + chunks + png_chunk(b"IEND", b"")
    assert records.decode_image(data)[0, :, 0].tolist() == [255, 2, 255]


def test_formats_that_run_programs_or_that_nobody_needs_are_not_opened():
    eps = encoded(Image.fromarray(gradient()), "EPS")
    dds = b"DDS " + struct.pack("<I", 124) + bytes(120)
    for data in (eps, dds, encoded(Image.fromarray(gradient()), "TGA")):
        for read in (records.probe_image, records.decode_image):
            with pytest.raises(RecordError) as caught:
                read(data)
            assert caught.value.reason == "not_an_image"


def test_a_large_image_makes_no_noise_and_filters_stay_as_they_are():
    """Between Pillow's own limit and twice that it would warn; the refusal is ours and is counted."""
    code = (
        "import sys, warnings\n"
        "from unihetero_jax.data.records import RecordError, probe_image\n"
        "before = list(warnings.filters)\n"
        "try:\n    probe_image(sys.stdin.buffer.read())\n"
        "except RecordError as error:\n    print(error.reason)\n"
        "assert warnings.filters == before\n"
    )
    result = subprocess.run(
        [sys.executable, "-W", "default", "-c", code], input=png_header(10_000, 10_000), capture_output=True
    )
    assert (result.stdout.decode().strip(), result.stderr) == ("image_too_large", b"")


def png_header(width, height):
    start = b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return start + struct.pack(">I", 1000) + b"IDAT" + bytes(100)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty_image"),
        (b"<html>not found</html>", "not_an_image"),
        (encoded(Image.fromarray(gradient(64, 64)), "JPEG")[:-100], "truncated_image"),
        (
            encoded(Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)))[:5000],
            "truncated_image",
        ),
        (png_header(20_000, 20_000), "image_too_large"),
        (png_header(9_000, 9_000), "image_too_large"),
        (png_header(10_000, 10_000), "image_too_large"),
    ],
)
def test_bad_images_have_a_reason(data, reason):
    with pytest.raises(RecordError) as caught:
        records.decode_image(data)
    assert caught.value.reason == reason


@pytest.mark.parametrize("seed", range(3))
def test_grids_are_whole_blocks_within_bounds(seed):
    rng = np.random.default_rng(seed)
    for _ in range(2000):
        spec = ImageSpec(int(rng.integers(1, 17)), int(rng.integers(1, 40)), int(rng.integers(40, 800)))
        height, width = (int(v) for v in np.exp(rng.uniform(0, 9, 2)))
        grid_h, grid_w = records.image_grid(height, width, spec)
        assert grid_h % 2 == grid_w % 2 == 0 and grid_h > 0 and grid_w > 0
        assert grid_h * grid_w <= spec.max_patches
        assert records.image_tokens(height, width, spec) == grid_h * grid_w // 4


@pytest.mark.parametrize(
    ("size", "spec", "grid"),
    [
        ((48, 48), ImageSpec(8, 36, 36), (6, 6)),
        ((100, 400), ImageSpec(8, 4, 144), (6, 24)),
        ((480, 640), ImageSpec(16, 4, 1024), (28, 36)),
        ((1, 1000), ImageSpec(8, 4, 36), (2, 18)),
    ],
)
def test_grid_examples(size, spec, grid):
    assert records.image_grid(*size, spec) == grid


def test_cost_counts_markers_and_ends():
    spec = ImageSpec(8, 36, 36)
    picture = ImageSegment(b"", 48, 48)
    assert records.record_cost(Record("s", "text", (TextSegment("a b c"),)), str.split, spec) == (4, 0)
    assert records.record_cost(Record("s", "image", (TextSegment("a b"), picture)), str.split, spec) == (2 + 11 + 1, 36)
    turns = tuple(TextSegment("q a", True, branch) for branch in (1, 2, 3))
    assert records.record_cost(Record("s", "vqa", (picture, *turns)), str.split, spec) == (11 + 3 * 3, 36)


def test_index_key_names_tokenizer_and_spec():
    keys = {
        records.index_key(*arguments)
        for arguments in [
            ("a", ImageSpec(8, 4, 36)),
            ("b", ImageSpec(8, 4, 36)),
            ("a", ImageSpec(16, 4, 36)),
            ("a", ImageSpec(8, 5, 36)),
            ("a", ImageSpec(8, 4, 40)),
        ]
    }
    assert len(keys) == 5
    assert records.INDEX_DTYPE.itemsize == 8


def test_prompt_and_answer():
    assert records.format_prompt(" What? \n") == "What?"
    assert records.format_answer("red ") == " red"
