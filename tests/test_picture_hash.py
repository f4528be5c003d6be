"""Identities of pictures: against SciPy's cosine transform, and pictures that were saved again."""

import io

import numpy as np
import pytest
import scipy.fft
from PIL import Image

from data_pipelines.picture_hash import hash_picture, largest_difference, perceptual_hash, within
from unihetero_jax.data.records import RecordError


def photo(seed, height=96, width=128):
    """Smooth random patches of colour: as unlike each other as photos are."""
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 8, 3)).astype(np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def saved(image, file_format="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    return buffer.getvalue()


def distance(one, other):
    return (one ^ other).bit_count()


def test_the_hash_is_that_of_the_low_frequencies_of_the_cosine_transform():
    pixels = np.asarray(photo(0, 32, 32))
    grey = np.asarray(Image.fromarray(pixels).convert("L"), float)
    low = scipy.fft.dctn(grey, type=2)[:8, :8]
    expected = sum(1 << (8 * y + x) for y in range(8) for x in range(8) if low[y, x] > np.median(low))
    assert perceptual_hash(pixels) == expected
    assert expected.bit_count() == 32


@pytest.mark.parametrize("seed", range(5))
def test_a_picture_saved_again_is_near_and_others_are_far(seed):
    original = hash_picture(saved(photo(seed)))
    again = [
        hash_picture(saved(photo(seed), "JPEG", quality=50)),
        hash_picture(saved(photo(seed).resize((64, 48), Image.Resampling.LANCZOS))),
        hash_picture(saved(photo(seed).point(lambda value: min(value + 12, 255)))),
    ]
    assert all(distance(original.perceptual, other.perceptual) <= 4 for other in again)
    assert all(largest_difference(other.thumbnail, original.thumbnail) < 30 for other in again)
    assert len({original.of_pixels, *(other.of_pixels for other in again)}) == 4
    others = [hash_picture(saved(photo(100 + n))) for n in range(20)]
    assert min(distance(original.perceptual, other.perceptual) for other in others) > 12


def test_thumbnails_differ_where_the_picture_does():
    one = np.random.default_rng(0).integers(40, 100, (16, 16, 3)).astype(np.uint8)
    assert largest_difference(one, one) == pytest.approx(0, abs=1e-9)
    assert largest_difference(one, (2 * one + np.array([9, 20, 30])).astype(np.uint8)) == pytest.approx(0, abs=1e-9)
    spotted = one.copy()
    spotted[3, 4, 1] = 250
    assert 140 < largest_difference(one, spotted) < 250
    assert largest_difference(np.full_like(one, 7), one) == pytest.approx(np.abs(one - one.mean((0, 1))).max())


def test_equal_pixels_in_another_file():
    png, bmp = hash_picture(saved(photo(1))), hash_picture(saved(photo(1), "BMP"))
    assert png.of_bytes != bmp.of_bytes
    assert (png.of_pixels, png.perceptual) == (bmp.of_pixels, bmp.perceptual)
    turned = np.zeros((4, 6, 3), np.uint8), np.zeros((6, 4, 3), np.uint8)
    assert len({hash_picture(saved(Image.fromarray(pixels))).of_pixels for pixels in turned}) == 2


def test_a_uniform_picture_is_near_to_nothing():
    assert perceptual_hash(np.full((40, 40, 3), 90, np.uint8)) is None
    assert perceptual_hash(np.asarray(photo(0))) is not None


def test_a_damaged_picture_is_refused():
    with pytest.raises(RecordError):
        hash_picture(saved(photo(0))[:60])


def test_search_finds_what_differs_in_few_bits():
    base = 0xDEADBEEF01234567
    flipped = [base, base ^ 1, base ^ (1 << 63 | 0b1010), base ^ 0xFF, base ^ (2**64 - 1)]
    hashes = np.array(flipped, np.uint64)
    assert [within(hashes, base, limit).tolist() for limit in (-1, 0, 2, 3, 8, 64)] == [
        [], [0], [0, 1], [0, 1, 2], [0, 1, 2, 3], [0, 1, 2, 3, 4],
    ]  # fmt: skip
    assert within(np.zeros(0, np.uint64), base, 4).tolist() == []
