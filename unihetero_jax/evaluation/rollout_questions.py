"""Questions about images that the model sees by given embeddings alone: what it rolled out must answer for itself.

The caption that was rolled out from is not there, so an answer can only come from the embeddings.
"""

import functools
import hashlib
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from unihetero_jax.arrays import Batch
from unihetero_jax.config import MERGED_PATCHES, Config
from unihetero_jax.data.mixture import image_spec
from unihetero_jax.data.transforms import patchify, resize_to_grid
from unihetero_jax.model.unihetero import Params, build
from unihetero_jax.sharding import fetch
from unihetero_jax.text_loss import text_nll

Known = Mapping[bytes, np.ndarray]
"""By image, the embeddings that stand in its place, float[N, D]."""


def in_place_of(config: Config, pictures: Sequence[np.ndarray], embeddings: np.ndarray) -> Known:
    """Embeddings [images, N, D] for images, `uint8[h, w, 3]`, which are known again by their patches."""
    patch_size, spec = config.model.encoder.patch_size, image_spec(config)
    keys = [_key(patchify(resize_to_grid(picture, spec), patch_size)[0]) for picture in pictures]
    return dict(zip(keys, embeddings, strict=True))


def log_probs_on(config: Config, params: Params, known: Known) -> Callable[[Mapping[str, np.ndarray]], np.ndarray]:
    """As `multiple_choice.score_items` asks for it: log-probabilities of packed rows, with every image's embeddings
    replaced.

    Raises:
        KeyError: a row holds an image that is not among the known ones.
    """

    def score(arrays: Mapping[str, np.ndarray]) -> np.ndarray:
        fields = {name: jnp.asarray(value) for name, value in arrays.items()}
        return fetch(_log_probs(config, params, Batch(**fields), jnp.asarray(_given(config, arrays, known))))

    return score


def _given(config: Config, arrays: Mapping[str, np.ndarray], known: Known) -> np.ndarray:
    """The embedding of every visual token of the rows, float32[B, U, D]."""
    segments = arrays["patch_segment_ids"]
    given = np.zeros((len(segments), segments.shape[1] // MERGED_PATCHES, config.model.decoder.dim), np.float32)
    for row, of_row in enumerate(segments):
        for image in np.unique(of_row[of_row > 0]):
            patches = np.flatnonzero(of_row == image)
            tokens = patches[::MERGED_PATCHES] // MERGED_PATCHES
            given[row, tokens] = known[_key(arrays["patches"][row, patches])]
    return given


def _key(patches: np.ndarray) -> bytes:
    return hashlib.blake2b(np.ascontiguousarray(patches).tobytes(), digest_size=16).digest()


@functools.partial(jax.jit, static_argnames="config")
def _log_probs(config: Config, params: Params, batch: Batch, given: jax.Array) -> jax.Array:
    model = build(config.model, config.objective, params)
    output = model(batch, visual_embeddings=given.astype(model.dtype))
    return -text_nll(output.hidden, output.unembedding, batch.tokens, batch.text_loss_mask, config.loss.text_chunk)[1]
