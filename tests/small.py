"""A tiny model and packed batches of random samples for it, shared by the tests of the model and the losses."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from conftest import make_tiny_config

from unihetero_jax.arrays import Batch
from unihetero_jax.data.packing import ImagePiece, PackedSample, TokenPiece, assemble_row, stack_rows
from unihetero_jax.model import unihetero

PAD, BOI, EOI, EOS = 0, 1, 2, 3
PATCH = 4


def tokens(rng, length, loss=True, branch=0):
    return TokenPiece(rng.integers(4, 64, length).tolist(), loss, branch)


def picture(rng, blocks_h=1, blocks_w=2):
    return rng.integers(0, 256, (blocks_h * 2 * PATCH, blocks_w * 2 * PATCH, 3)).astype(np.uint8)


def reading(rng, grid=(1, 2), turns=(3, 4)):
    """An image, then independent turns."""
    pieces = [TokenPiece([BOI]), ImagePiece(picture(rng, *grid)), TokenPiece([EOI])]
    for branch, length in enumerate(turns, start=1):
        pieces += [tokens(rng, length, False, branch), tokens(rng, 2, True, branch), TokenPiece([EOS], True, branch)]
    return PackedSample(pieces)


def drawing(rng, grid=(2, 1), length=4):
    """A caption, then the image it asks for."""
    image = ImagePiece(picture(rng, *grid), True)
    markers = TokenPiece([BOI], True), TokenPiece([EOI], True)
    return PackedSample([tokens(rng, length), markers[0], image, markers[1], TokenPiece([EOS], True)])


def writing(rng, length=6):
    """Plain text."""
    return PackedSample([tokens(rng, length), TokenPiece([EOS], True)])


def batch_of(rows, row_tokens=40, row_patches=40, turns="branches"):
    """One packed row per list of samples."""
    made = [assemble_row(samples, row_tokens, row_patches, PATCH, PAD, turns) for samples in rows]
    return Batch(**{name: jnp.asarray(value) for name, value in stack_rows(made).items()})


def mixed_batch(seed=0, num_rows=4, turns="branches", row_tokens=40, row_patches=40):
    rng = np.random.default_rng(seed)
    rows = [[reading(rng), drawing(rng), writing(rng)] for _ in range(num_rows)]
    return batch_of(rows, row_tokens, row_patches, turns)


def many_turns(turns="branches", num_rows=2):
    """Rows of four samples, two with several turns; one prefix holds supervised text and a drawn image."""
    rng = np.random.default_rng(7)

    def drawn_and_asked():
        return PackedSample([*drawing(rng).pieces[:-1], *reading(rng, turns=(2, 5)).pieces[3:]])

    rows = [
        [writing(rng), drawn_and_asked(), reading(rng, (2, 2), (3, 1, 4, 2)), drawing(rng)] for _ in range(num_rows)
    ]
    return batch_of(rows, 128, 80, turns)


def drawing_prompts_and_truth(num_rows=2, num_tokens=4):
    """Samples of text and an image of so many tokens: their prompts up to `<boi>`, and the samples whole."""
    rng = np.random.default_rng(6)
    texts = [tokens(rng, 4) for _ in range(num_rows)]
    images = [ImagePiece(picture(rng, 1, num_tokens), True) for _ in range(num_rows)]
    rows = [[PackedSample([text, TokenPiece([BOI])])] for text in texts]
    whole = [[PackedSample([t, TokenPiece([BOI]), image])] for t, image in zip(texts, images, strict=True)]
    prompts = batch_of(rows, row_tokens=5, row_patches=4)
    grid = jnp.array([1, num_tokens])
    prompts = dataclasses.replace(prompts, boi_grid=prompts.boi_grid.at[:, 4].set(grid))
    return prompts, batch_of(whole, row_tokens=5 + num_tokens, row_patches=4 * num_tokens)


def host(batch):
    """A batch's fields as numpy arrays."""
    return {field.name: np.asarray(getattr(batch, field.name)) for field in dataclasses.fields(batch)}


@functools.cache
def params_of(objective="semantic_input", seed=0):
    """Initial parameters with noise, so that no zero hides a path."""
    config = make_tiny_config(objective=objective)
    params = jax.jit(lambda: unihetero.init_params(config.model, objective, seed))()
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: x + 0.05 * rng.standard_normal(x.shape).astype(np.float32), params)


@functools.cache
def forward(objective="semantic_input"):
    """The jitted model: (params, batch) -> ModelOutput."""
    config = make_tiny_config(objective=objective)
    return jax.jit(lambda params, batch: unihetero.build(config.model, objective, params)(batch))


PIXEL_SIZES = {
    f"model__pixel_decoder__{name}": value
    for name, value in {"num_layers": 2, "dim": 16, "num_heads": 2, "mlp_dim": 16}.items()
}
"""A pixel decoder that compiles in a second."""


def pixel_config(objective, **changes):
    """The tiny configuration with a tiny pixel decoder."""
    return make_tiny_config(objective=objective, **(PIXEL_SIZES | changes))


def perturbed(config, seed=0):
    """Initial parameters with noise, of any configuration."""
    params = jax.jit(lambda: unihetero.init_params(config.model, config.objective, seed))()
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: x + 0.1 * rng.standard_normal(x.shape).astype(np.float32), params)
