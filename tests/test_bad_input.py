"""Odd and broken input: each has a defined result or is a counted drop with its reason; nothing crashes or is lost."""

import hashlib
import io
import json
import re
import struct
import sys
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
from array_record.python.array_record_module import ArrayRecordWriter
from PIL import Image

from data_pipelines.writer import read_records, write_prepared
from experiments import base
from unihetero_jax.config import ConfigError
from unihetero_jax.config_reading import from_config_dict
from unihetero_jax.data import records
from unihetero_jax.data.mixture import make_train_iterator
from unihetero_jax.data.records import ImageSegment, ImageSpec, Record, RecordError, TextSegment
from unihetero_jax.data.tokenizer import SPECIAL_TOKENS, load_tokenizer, train_tokenizer

SPEC = ImageSpec(8, 4, 36)
HEIGHT, WIDTH = 24, 40
RNG = np.random.default_rng(0)
PIXELS = RNG.integers(0, 256, (HEIGHT, WIDTH, 3), np.uint8)
GREY = PIXELS[..., 0]


def encoded(picture, kind="PNG", **options):
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


def png_chunk(name, body):
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


def png_file(width, height, *chunks):
    header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(png_chunk(name, body) for name, body in chunks)


def png_bomb(side):
    """A whole, valid PNG of side x side black pixels; a side of 20,000 takes 1.2 MB here and 1.2 GB when decoded."""
    size, block = side * (3 * side + 1), 1 << 20
    whole, rest = divmod(size, block)

    def squeezed(count):
        # Flushed fully, so that the result can be repeated.
        packer = zlib.compressobj(9, zlib.DEFLATED, -15)
        return packer.compress(bytes(count)) + packer.flush(zlib.Z_FULL_FLUSH)

    checksum = struct.pack(">I", (size % 65521) << 16 | 1)  # Adler-32 of so many zeros
    stream = b"\x78\xda" + squeezed(block) * whole + squeezed(rest) + b"\x03\x00" + checksum
    return png_file(side, side, (b"IDAT", stream), (b"IEND", b""))


def rgba():
    alpha = np.full((HEIGHT, WIDTH, 1), 255, np.uint8)
    alpha[0, 0], alpha[0, 1] = 0, 128
    return Image.fromarray(np.concatenate([PIXELS, alpha], axis=-1))


def rotated():
    exif = Image.Exif()
    exif[0x0112] = 6
    return encoded(Image.fromarray(PIXELS), "PNG", exif=exif)


def palette(**options):
    picture = Image.new("P", (WIDTH, HEIGHT))
    picture.putpalette([200, 0, 0, 0, 200, 0, 0, 0, 200])
    picture.putdata([i % 3 for i in range(HEIGHT * WIDTH)])
    return encoded(picture, "PNG", **options)


def gif():
    frames = [Image.new("RGB", (WIDTH, HEIGHT), color) for color in ("red", "blue", "lime")]
    return encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])


PNG = encoded(Image.fromarray(PIXELS))
JPEG = encoded(Image.fromarray(PIXELS), "JPEG", quality=90)
SIXTEEN = GREY.astype(np.uint16) * 257
HUGE_PROFILE = np.random.default_rng(1).bytes(3 << 20)

DEFINED = {
    "png": (PNG, PIXELS),
    "grey": (encoded(Image.fromarray(GREY)), GREY[..., None].repeat(3, -1)),
    "one_bit": (encoded(Image.fromarray(GREY > 127)), ((GREY > 127) * 255)[..., None].repeat(3, -1)),
    "sixteen_bit": (encoded(Image.fromarray(SIXTEEN)), GREY[..., None].repeat(3, -1)),
    "sixteen_bit_tiff": (encoded(Image.fromarray(SIXTEEN), "TIFF"), GREY[..., None].repeat(3, -1)),
    "one_pixel": (encoded(Image.fromarray(PIXELS[:1, :1])), PIXELS[:1, :1]),
    "one_row": (encoded(Image.fromarray(PIXELS[:1])), PIXELS[:1]),
    "one_column": (encoded(Image.fromarray(PIXELS[:, :1])), PIXELS[:, :1]),
    "exif_rotated": (rotated(), np.rot90(PIXELS, -1)),
    "animated_gif": (gif(), np.broadcast_to(np.array([255, 0, 0]), (HEIGHT, WIDTH, 3))),
    "profile": (encoded(Image.fromarray(PIXELS), icc_profile=HUGE_PROFILE[: 1 << 19]), PIXELS),
    "jpeg_with_huge_profile": (encoded(Image.fromarray(PIXELS), "JPEG", quality=90, icc_profile=HUGE_PROFILE), None),
    "bmp": (encoded(Image.fromarray(PIXELS), "BMP"), PIXELS),
    "webp": (encoded(Image.fromarray(PIXELS), "WEBP", lossless=True), PIXELS),
    "wrong_suffix_does_not_matter": (JPEG, None),
    "jpeg_cmyk": (encoded(Image.fromarray(PIXELS).convert("CMYK"), "JPEG"), None),
    "trailing_bytes": (PNG + b"more", PIXELS),
    "alpha": (encoded(rgba()), None),
    "palette": (palette(), None),
    "palette_with_transparency": (palette(transparency=1), None),
}
DROPPED = {
    # Pillow reads no compressed chunk beyond 1 MiB: the profile might be a bomb itself.
    "huge_profile": (encoded(Image.fromarray(PIXELS), icc_profile=HUGE_PROFILE), "not_an_image"),
    "zero_bytes": (b"", "empty_image"),
    "html": (b"<html>404 not found</html>", "not_an_image"),
    "zeros": (bytes(1000), "not_an_image"),
    "wrong_magic": (b"\x89PNX" + PNG[4:], "not_an_image"),
    "signature_only": (PNG[:8], "not_an_image"),
    "truncated_jpeg": (JPEG[: len(JPEG) // 2], "truncated_image"),
    "jpeg_without_its_end": (JPEG[:-40], "truncated_image"),
    "truncated_png": (PNG[: len(PNG) // 2], "truncated_image"),
    "truncated_gif": (gif()[:60], "truncated_image"),
    "png_without_pixels": (png_file(WIDTH, HEIGHT, (b"IEND", b"")), "truncated_image"),
    "png_with_bad_deflate": (png_file(WIDTH, HEIGHT, (b"IDAT", b"not deflate"), (b"IEND", b"")), "truncated_image"),
    "bomb": (png_bomb(20_000), "image_too_large"),
    "just_over_the_limit": (png_bomb(8_001), "image_too_large"),
}


@pytest.mark.parametrize("name", DEFINED)
def test_odd_images_have_a_defined_result(name):
    data, expected = DEFINED[name]
    decoded = records.decode_image(data)
    assert decoded.dtype == np.uint8 and decoded.shape == (*records.probe_image(data), 3)
    if expected is not None:
        np.testing.assert_array_equal(decoded, expected)


def test_conversions_that_are_not_exact_are_close():
    for name in ("wrong_suffix_does_not_matter", "jpeg_with_huge_profile"):
        with Image.open(io.BytesIO(DEFINED[name][0])) as picture:
            np.testing.assert_array_equal(records.decode_image(DEFINED[name][0]), np.asarray(picture))
    flat = records.decode_image(encoded(Image.new("CMYK", (16, 16), (255, 0, 0, 0)), "JPEG", quality=95))
    assert flat[..., 0].max() < 60 and flat[..., 1:].min() > 150, "full cyan ink is no red"
    over_white = records.decode_image(DEFINED["alpha"][0])
    np.testing.assert_array_equal(over_white[1:], PIXELS[1:])
    np.testing.assert_array_equal(over_white[0, 0], [255] * 3)
    np.testing.assert_allclose(over_white[0, 1], PIXELS[0, 1] * (128 / 255) + 255 * (127 / 255), atol=1)
    plain, clear = (records.decode_image(DEFINED[name][0]) for name in ("palette", "palette_with_transparency"))
    assert plain[0, :3].tolist() == [[200, 0, 0], [0, 200, 0], [0, 0, 200]]
    np.testing.assert_array_equal(clear[plain[..., 1] == 200], 255)
    np.testing.assert_array_equal(clear[plain[..., 1] == 0], plain[plain[..., 1] == 0])


@pytest.mark.parametrize("name", DROPPED)
def test_broken_images_have_a_reason(name):
    data, reason = DROPPED[name]
    with pytest.raises(RecordError) as caught:
        records.decode_image(data)
    assert caught.value.reason == reason


def peak_rss_mib():
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) / 1024


@pytest.mark.skipif(sys.platform != "linux", reason="the peak of memory is read from /proc")
def test_a_bomb_is_refused_from_its_header():
    """In time and memory that do not depend on its 1.2 GB of pixels."""
    assert not records.decode_image(png_bomb(100)).any(), "made as the large one, it decodes"
    data = png_bomb(20_000)
    Path("/proc/self/clear_refs").write_text("5")  # the peak of this process begins anew
    before = peak_rss_mib()
    start = time.process_time()  # wall time says nothing about the decoder on a busy machine
    for read in (records.probe_image, records.decode_image):
        with pytest.raises(RecordError, match="image_too_large"):
            read(data)
    assert time.process_time() - start < 0.05
    assert peak_rss_mib() - before < 50


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")  # Pillow tells of tags that it skips
def test_random_damage_never_escapes_as_another_error():
    """Flipped and cut bytes give an image of the promised kind or a RecordError, nothing else."""
    rng = np.random.default_rng(3)
    results = {"image": 0, "error": 0}
    for data in (JPEG, PNG, gif(), palette(transparency=1), rotated(), DEFINED["sixteen_bit_tiff"][0]):
        for _ in range(40):
            damaged = bytearray(data[: int(rng.integers(1, len(data) + 1))])
            for place in rng.integers(0, len(damaged), 3):
                damaged[place] = rng.integers(0, 256)
            try:
                decoded = records.decode_image(bytes(damaged))
                assert decoded.dtype == np.uint8 and decoded.ndim == 3 and decoded.shape[2] == 3
                results["image"] += 1
            except RecordError:
                results["error"] += 1
    assert min(results.values()) > 5, results


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(["what is it? a thing, number 0 1 2 3 4 5 6 7 8 9"] * 3, 280, folder)
    return folder


@pytest.fixture(scope="module")
def tokenizer(tokenizer_folder):
    return load_tokenizer(tokenizer_folder)


def image_sample(name, data):
    """What a converter makes of an image: it asks the header for the size, and counts what has none."""
    try:
        height, width = records.probe_image(data)
    except RecordError:
        height, width = 1, 1
    return Record("odd", "vqa", (ImageSegment(data, height, width), TextSegment("a thing", True)), {"id": name})


TEXTS = {
    "nul": "a\x00b",
    "special": f"a {'<boi>'} b {'<eos>'}{'<pad>'} <eoi>",
    "emoji": "🟥🔺 ü 漢字 \u202e",
    "long": "thing " * (records.MAX_TEXT_CHARS // 6),
    "empty": "",
    "blank": " \n\t ",
}
BAD_TEXTS = {
    "too_long": ("a" * (records.MAX_TEXT_CHARS + 1), "text_too_long"),
    "surrogate": ("a \ud800 b", "invalid_text"),
}


@pytest.fixture(scope="module")
def odd_folder(tmp_path_factory, tokenizer):
    """Everything above, written as one source."""
    samples = [image_sample(name, data) for name, (data, _) in (DEFINED | DROPPED).items()]
    samples += [Record("odd", "text", (TextSegment(text, True),), {"id": name}) for name, text in TEXTS.items()]
    samples += [Record("odd", "text", (TextSegment(text, True),), {"id": n}) for n, (text, _) in BAD_TEXTS.items()]
    samples += [Record("odd", "text", (), {"id": "no_segment"})]
    folder = tmp_path_factory.mktemp("odd") / "source"
    start = time.process_time()
    write_prepared(samples, folder, source="odd", tokenizer=tokenizer, spec=SPEC, licence="none")
    assert time.process_time() - start < 20, "a million characters may not take long"
    return folder


def test_the_writer_keeps_the_defined_and_counts_the_rest(odd_folder):
    manifest = json.loads((odd_folder / "manifest.json").read_text())
    kept = {record.meta["id"]: record for record in read_records(odd_folder, "train")}
    assert set(kept) == set(DEFINED) | set(TEXTS)
    expected: dict[str, int] = {"empty_record": 1}
    for reason in [reason for _, reason in (DROPPED | BAD_TEXTS).values()]:
        expected[reason] = expected.get(reason, 0) + 1
    assert manifest["dropped"] == expected
    assert sum(manifest["dropped"].values()) + manifest["num_records"]["train"] == len(DEFINED | DROPPED) + len(
        TEXTS | BAD_TEXTS
    ) + 1  # fmt: skip
    for reason, examples in manifest["dropped_examples"].items():
        assert examples and len(examples) <= 3, reason
    assert manifest["dropped_examples"]["text_too_long"][0].startswith("too_long: ")
    for name, (data, _) in DEFINED.items():
        assert kept[name].segments[0].data == data, "original bytes are stored"
    for name, text in TEXTS.items():
        assert kept[name].segments[0].text == text


def make_config(folder, tokenizer_folder, **fields):
    config = base.get_config()
    config.data.sources = {"odd": {"path": str(folder), "weight": 1.0, "augment": "none"}}
    config.data.tokenizer = str(tokenizer_folder)
    config.data.update(row_tokens=64, row_patches=72, image_min_patches=4, image_max_patches=36, window_size=64)
    config.data.update(num_data_shards=1)
    config.train.global_batch_rows = 1
    with config.ignore_type():
        config.update_from_flattened_dict(fields)
    return from_config_dict(config)


def one_epoch(config, tokenizer):
    """Batches until every draw of the first window was seen."""
    iterator = make_train_iterator(config, tokenizer)
    try:
        batches = [next(iterator)]
        while iterator.get_state()["position"][0, 0] == 0:
            batches.append(next(iterator))
        return batches
    finally:
        iterator.close()


def test_the_loader_reads_what_the_writer_kept(odd_folder, tokenizer_folder, tokenizer):
    """One window holds each record 2 or 3 times; only the text that no row can hold is left out, and counted."""
    kept = read_records(odd_folder, "train")
    batches = one_epoch(make_config(odd_folder, tokenizer_folder), tokenizer)
    assert not [failure for batch in batches for failure in batch.failures]
    totals: dict[str, int] = {}
    for batch in batches:
        for name, value in batch.counters.items():
            totals[name] = totals.get(name, 0) + value
    seen = {int(sample.split("/")[1]) for batch in batches for sample in batch.sample_ids}
    assert {kept[i].meta["id"] for i in range(len(kept)) if i not in seen} == {"long"}
    assert totals["samples/odd"] + totals["dropped/odd"] == 64 and totals["dropped/odd"] in (2, 3)
    for batch in batches:
        specials = np.isin(batch.arrays["tokens"], [tokenizer.boi_id, tokenizer.eoi_id])
        images = sum(isinstance(kept[int(s.split("/")[1])].segments[0], ImageSegment) for s in batch.sample_ids)
        assert specials.sum() == 2 * images, "special tokens written in a text open no image"


def test_literal_special_tokens_come_back_as_text(tokenizer):
    ids = tokenizer.encode(TEXTS["special"])
    specials = {tokenizer.pad_id, tokenizer.boi_id, tokenizer.eoi_id, tokenizer.eos_id}
    assert len(specials) == len(SPECIAL_TOKENS) and not specials & set(ids)
    assert tokenizer.decode(ids) == TEXTS["special"]
    assert tokenizer.decode(tokenizer.encode(TEXTS["nul"])) == TEXTS["nul"]
    with pytest.raises(UnicodeEncodeError):
        tokenizer.encode(BAD_TEXTS["surrogate"][0])


def test_an_image_larger_than_a_row_is_scaled_or_refused(tmp_path, tokenizer_folder, tokenizer):
    """An image of any size is scaled to `data.image_max_patches`; a config where that overflows a row is refused."""
    big = image_sample("big", encoded(Image.fromarray(np.zeros((600, 900, 3), np.uint8))))
    several = Record("odd", "interleaved", big.segments[:1] * 3, {"id": "three"})
    write_prepared([big, several], tmp_path / "s", source="odd", tokenizer=tokenizer, spec=SPEC, licence="none")
    config = make_config(tmp_path / "s", tokenizer_folder)
    batches = one_epoch(config, tokenizer)
    stored = [record.meta["id"] for record in read_records(tmp_path / "s", "train")]
    assert {sample for batch in batches for sample in batch.sample_ids} == {f"odd/{stored.index('big')}"}
    assert sum(batch.counters["dropped/odd"] for batch in batches) == 32, "three images need 108 of 72 patches"
    with pytest.raises(ConfigError, match=r"data.image_max_patches 76 must lie between 4 and data.row_patches 72"):
        make_config(tmp_path / "s", tokenizer_folder, **{"data.image_max_patches": 76})
    with pytest.raises(ConfigError, match=r"data.row_tokens 11 must hold the largest image"):
        make_config(tmp_path / "s", tokenizer_folder, **{"data.row_tokens": 11})


def test_missing_and_empty_sources_and_zero_weights_are_named(tmp_path, tokenizer_folder, tokenizer):
    with pytest.raises(ValueError, match=r"data.sources.odd.path: folder .*nowhere does not exist; prepare it"):
        make_train_iterator(make_config(tmp_path / "nowhere", tokenizer_folder), tokenizer)
    (tmp_path / "raw").mkdir()
    with pytest.raises(ValueError, match=r"data.sources.odd.path: .*manifest.json does not exist"):
        make_train_iterator(make_config(tmp_path / "raw", tokenizer_folder), tokenizer)
    with pytest.raises(ValueError, match=r"odd: no record was left of 1 samples; dropped: 1 empty_image \(e.g. x: "):
        write_prepared(
            [image_sample("x", b"")], tmp_path / "e", source="odd", tokenizer=tokenizer, spec=SPEC, licence="none"
        )
    assert not (tmp_path / "e").exists()
    text = Record("odd", "text", (TextSegment("a thing", True),), {})
    write_prepared([], tmp_path / "v", source="odd", tokenizer=tokenizer, spec=SPEC, licence="none", val_samples=[text])
    with pytest.raises(ValueError, match=r"data.sources.odd.path: .* holds no training record"):
        make_train_iterator(make_config(tmp_path / "v", tokenizer_folder), tokenizer)
    not_positive = r"data.sources.odd.weight .* must be positive; to leave the source out"
    not_finite = r"data.sources.odd.weight: nan is not a finite number"
    for weight, message in ((0.0, not_positive), (-1.0, not_positive), (float("nan"), not_finite)):
        with pytest.raises(ConfigError, match=message):
            make_config(tmp_path / "v", tokenizer_folder, **{"data.sources.odd.weight": weight})


def test_stored_images_that_rot_become_padding_and_are_named(tmp_path, tokenizer_folder, tokenizer):
    """What the writer would have refused but stands in a file all the same (older writer, damaged copy)."""
    good = [Record("odd", "text", (TextSegment(f"thing {i}", True),), {"id": str(i)}) for i in range(6)]
    folder = tmp_path / "s"
    held = image_sample("rotten", PNG)
    write_prepared([*good, held], folder, source="odd", tokenizer=tokenizer, spec=SPEC, licence="none", num_shards=1)
    stored = read_records(folder, "train")
    number = [record.meta["id"] for record in stored].index("rotten")
    path = folder / "train-00000-of-00001.array_record"
    writer = ArrayRecordWriter(str(path), "group_size:1")
    for record in stored:
        if record.meta["id"] == "rotten":
            broken = ImageSegment(PNG[: len(PNG) // 2], HEIGHT, WIDTH)
            record = Record("odd", "vqa", (broken, *record.segments[1:]), record.meta)
        writer.write(records.serialize(record))
    writer.close()
    manifest = json.loads((folder / "manifest.json").read_text())
    content = path.read_bytes()
    manifest["files"][path.name] = {"bytes": len(content), "digest": hashlib.blake2b(content).hexdigest()}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    config = make_config(folder, tokenizer_folder, **{"data.max_failed_share": 0.5})
    batches = one_epoch(config, tokenizer)
    failures = [failure for batch in batches for failure in batch.failures]
    assert failures and all(f.startswith(f"{path}: record {number}: truncated_image") for f in failures)
    assert sum(batch.counters.get("failed_reason/truncated_image", 0) for batch in batches) == len(failures)
    assert sum(batch.counters["samples/odd"] for batch in batches) == 64 - len(failures)
