"""What the pixel decoder draws of a patch: its pixels, or fewer values that an encoder-decoder pair makes of them.

A pair is three things (`PatchCodec`): how many values a patch has, a function to them, a function back. Every other
part of the program sees values alone: a further pair is a further case of `patch_codec`, with its name in
`config.PatchSpace` and its number of values in `config.drawn_values`. It codes each patch by itself, since rows hold
patches of many images (our choice).
"""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8

from unihetero_jax.arrays import typechecked
from unihetero_jax.config import ModelConfig, drawn_values

_AC_SCALE = 0.5
"""Our choice: waves of scenes then have deviations of .07 to .5, their mean one of .2, under noise of 1."""


class PatchCodec(NamedTuple):
    """An encoder-decoder pair for patches.

    Attributes:
        num_values: of a patch, Y.
        encode: uint8[B, P, F] to float32[B, P, Y], of a deviation near that of the flow's noise, 1.
        decode: back, rounded and clipped to what a pixel can be.
    """

    num_values: int
    encode: Callable[[UInt8[Array, "B P F"]], Float[Array, "B P Y"]]
    decode: Callable[[Float[Array, "B P Y"]], UInt8[Array, "B P F"]]


def patch_codec(model: ModelConfig) -> PatchCodec:
    """The pair that `model.pixel_decoder.space` names."""
    match model.pixel_decoder.space:
        case "pixels":
            return PatchCodec(drawn_values(model), _from_bytes, _to_bytes)
        case "dct":
            return _low_frequencies(model.encoder.patch_size, drawn_values(model))


@typechecked
def _from_bytes(patches: UInt8[Array, "B P F"]) -> Float[Array, "B P F"]:
    return patches.astype(jnp.float32) / 127.5 - 1.0


@typechecked
def _to_bytes(values: Float[Array, "B P F"]) -> UInt8[Array, "B P F"]:
    return jnp.round(jnp.clip((values + 1.0) * 127.5, 0, 255)).astype(jnp.uint8)


def _low_frequencies(side: int, num_values: int) -> PatchCodec:
    """The lower half of a patch's waves in each direction, by channel: a quarter of its values.

    The two-dimensional discrete cosine transform (DCT-II, as JPEG's): `encode` drops what is finer, `decode` gives the
    closest patch without it.
    """
    basis = _cosines(side)[: side // 2]
    kept = len(basis)
    scale = np.full((kept, kept, 1), _AC_SCALE, np.float32)
    scale[0, 0] = 1.0 / side  # the orthonormal transform's first value is the mean, `side` times

    def encode(patches: UInt8[Array, "B P F"]) -> Float[Array, "B P Y"]:
        pixels = _from_bytes(patches).reshape(*patches.shape[:2], side, side, 3)
        waves = jnp.einsum("ih,jw,bphwc->bpijc", basis, basis, pixels) * scale
        return waves.reshape(*patches.shape[:2], num_values)

    def decode(values: Float[Array, "B P Y"]) -> UInt8[Array, "B P F"]:
        waves = values.reshape(*values.shape[:2], kept, kept, 3) / scale
        pixels = jnp.einsum("ih,jw,bpijc->bphwc", basis, basis, waves)
        return _to_bytes(pixels.reshape(*values.shape[:2], -1))

    return PatchCodec(num_values, encode, decode)


def _cosines(length: int) -> np.ndarray:
    """Orthonormal rows of the DCT-II, float32[length, length]."""
    rows = np.cos(np.pi / length * np.arange(length)[:, None] * (np.arange(length) + 0.5)) * np.sqrt(2 / length)
    rows[0] /= np.sqrt(2)
    return rows.astype(np.float32)
