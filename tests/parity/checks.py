"""Our side of the parity tests: what the model computes from imported weights, compared with what torch computed."""

import dataclasses
import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from experiments import base
from unihetero_jax.arrays import Batch
from unihetero_jax.config import Config
from unihetero_jax.config_reading import from_config_dict
from unihetero_jax.data.packing import ImagePiece, PackedSample, TokenPiece, assemble_row, stack_rows
from unihetero_jax.hf_weights import leaf_of, their_values
from unihetero_jax.inference.generate import decode
from unihetero_jax.inference.sampling import GREEDY
from unihetero_jax.model.attention import decoder_attention, encoder_attention
from unihetero_jax.model.decoder import Decoder
from unihetero_jax.model.unihetero import UniHetero, build, init_params
from unihetero_jax.model.vision_encoder import VisionEncoder, with_class_tokens
from unihetero_jax.pretrained import load_components, open_pretrained, read_pretrained

WHOLE, MODULE = 1e-4, 1e-5
"""Bars: of what has passed the whole model (logits, hidden states, gradients), and of one layer alone."""


@dataclasses.dataclass(frozen=True)
class Loaded:
    """A model whose decoder or encoder is imported."""

    config: Config
    params: dict[str, Any]
    table: Any

    @property
    def model(self) -> UniHetero:
        return build(self.config.model, "understanding", self.params)


def load(folder: Path, component: str) -> Loaded:
    """The golden model of a folder as a component of a model whose other one is small and random."""
    values = base.get_config().to_dict() | {"objective": "understanding"}
    locations = {"decoder": (str(folder), ""), "encoder": ("", str(folder))}[component]
    pretrained = read_pretrained(*locations, values)
    section = pretrained.language.decoder if pretrained.language else pretrained.vision.encoder
    values["model"][component] = dataclasses.asdict(section)
    config = from_config_dict(values)
    fresh = init_params(config.model, "understanding", 0)
    target = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), fresh)
    sources = open_pretrained(pretrained, config, target)
    loaded = load_components(sources, config, target, range(0))
    return Loaded(config, fresh | loaded, sources[component].table)


def compare(ours: Any, theirs: Any, bar: float, what: str) -> None:
    """Largest difference against the bar, relative to the largest value where that is above 1."""
    ours, theirs = np.asarray(ours), np.asarray(theirs)
    assert ours.shape == theirs.shape, f"{what}: {ours.shape} against {theirs.shape}"
    scale = max(1.0, float(np.abs(theirs).max()))
    difference = float(np.abs(ours - theirs).max()) / scale
    assert difference <= bar, f"{what}: differs by {difference:.2e} of {scale:.2f}"


def layer_of(blocks: nnx.Module, number: int) -> Any:
    graph, state = nnx.split(blocks)
    return nnx.merge(graph, jax.tree.map(lambda x: x[number], state))


# ---------------------------------------------------------------- language models


def check_language(folder: Path, expected: dict[str, np.ndarray]) -> None:
    """Hidden states, logits, packed rows, gradients and greedy text of an imported language model."""
    loaded = load(folder, "decoder")
    ids = jnp.asarray(expected["ids"], jnp.int32)
    decoder = loaded.model.decoder
    positions = jnp.broadcast_to(jnp.arange(ids.shape[1]), ids.shape)
    attention = decoder_attention("dense", jnp.ones_like(ids), jnp.zeros_like(ids))
    num_layers = loaded.config.model.decoder.num_layers
    x = embed(decoder, ids)
    compare(x, expected["hidden/0"], MODULE, "embeddings")
    for number in range(num_layers):
        block = layer_of(decoder.blocks, number)
        x = block(x, positions, attention)
        if number + 1 < num_layers:  # of the last layer torch shows the state after the norm
            compare(x, expected[f"hidden/{number + 1}"], WHOLE, f"after layer {number}")
            alone = block(jnp.asarray(expected[f"hidden/{number}"]), positions, attention)
            compare(alone, expected[f"hidden/{number + 1}"], MODULE, f"layer {number} alone")
    hidden = decoder(embed(decoder, ids), positions, attention)
    compare(hidden, expected[f"hidden/{num_layers}"], WHOLE, "after the norm")
    compare(hidden @ decoder.unembedding.T, expected["logits"], WHOLE, "logits")
    _check_packed(decoder, ids, expected)
    _check_language_gradients(loaded, ids, expected)
    compare(greedy(loaded, expected["ids"][0, :8], len(expected["greedy"])), expected["greedy"], 0.0, "greedy text")


def embed(decoder: Decoder, ids: jax.Array) -> jax.Array:
    return decoder.embed(ids, jnp.zeros((*ids.shape, 2), jnp.int32), jnp.dtype("float32"))


def _check_packed(decoder: Decoder, ids: jax.Array, expected: dict[str, np.ndarray]) -> None:
    """Both sequences in one row, as separate segments."""
    row = ids.reshape(1, -1)
    length = ids.shape[1]
    positions = jnp.tile(jnp.arange(length), 2)[None]
    segments = jnp.repeat(jnp.array([1, 2]), length)[None]
    hidden = decoder(embed(decoder, row), positions, decoder_attention("dense", segments, jnp.zeros_like(row)))
    logits = (hidden @ decoder.unembedding.T).reshape(2, length, -1)
    compare(logits, expected["logits"], WHOLE, "logits of a packed row")


def _check_language_gradients(loaded: Loaded, ids: jax.Array, expected: dict[str, np.ndarray]) -> None:
    positions = jnp.broadcast_to(jnp.arange(ids.shape[1]), ids.shape)
    attention = decoder_attention("dense", jnp.ones_like(ids), jnp.zeros_like(ids))

    @jax.value_and_grad
    def loss_of(params: dict[str, Any]) -> jax.Array:
        decoder = build(loaded.config.model, "understanding", loaded.params | {"decoder": params}).decoder
        logits = decoder(embed(decoder, ids), positions, attention) @ decoder.unembedding.T
        log_probs = jax.nn.log_softmax(logits[:, :-1])
        return -jnp.mean(jnp.take_along_axis(log_probs, ids[:, 1:, None], axis=-1))

    loss, gradients = jax.jit(loss_of)(loaded.params["decoder"])
    compare(loss, expected["loss"], WHOLE, "loss")
    check_gradients(loaded, {"decoder": gradients}, expected)


def check_gradients(loaded: Loaded, gradients: dict[str, Any], expected: dict[str, np.ndarray]) -> None:
    """Every gradient that torch has, relative to its own largest value.

    Or to a hundredth of the largest of all: that of a key's bias is zero but for rounding, as it moves no softmax.
    """
    wanted = {name.removeprefix("gradient/") for name in expected if name.startswith("gradient/")}
    floor = 1e-2 * max(np.abs(expected[f"gradient/{name}"]).max() for name in wanted)
    prefix = loaded.table.prefixes[0]
    names = {prefix + name for name in wanted}
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), loaded.params)
    read = lambda path: np.asarray(leaf_of(gradients, path))  # noqa: E731
    compared = set()
    for name, ours in their_values(loaded.table, read, abstract, np.dtype(np.float32), names):
        bare = name.removeprefix(prefix)
        theirs = expected[f"gradient/{bare}"]
        compare(ours / max(np.abs(theirs).max(), floor), theirs / max(np.abs(theirs).max(), floor), WHOLE, bare)
        compared.add(bare)
    rest = {name for name in wanted - compared if not name.startswith("head.")}
    assert not rest, f"gradients that were not compared: {rest}"


def greedy(loaded: Loaded, prompt: np.ndarray, num_new: int) -> np.ndarray:
    """The continuation by the program's own cached decoding."""
    sample = PackedSample([TokenPiece([int(token) for token in prompt])])
    patch_size = loaded.config.model.encoder.patch_size
    whole: Any = stack_rows([assemble_row([sample], len(prompt), 4, patch_size, 0)])
    tokens, _ = decode(
        loaded.config, loaded.params, Batch(**whole), jax.random.key(0), num_new, -1, (), GREEDY
    )  # fmt: skip
    return np.asarray(tokens[0])


# ---------------------------------------------------------------- vision encoders


def check_vision(folder: Path, expected: dict[str, np.ndarray]) -> None:
    """Features after every layer, all images in one row, and gradients of an imported vision encoder."""
    loaded = load(folder, "encoder")
    config = loaded.config.model.encoder
    pieces: list[Any] = []
    grids = expected["grids"]
    for number in range(len(grids)):
        pieces += [TokenPiece([1]), ImagePiece(expected[f"pixels/{number}"], False)]
    num_patches = int(np.prod(grids, axis=1).sum()) + 8  # some padding
    row = assemble_row([PackedSample(pieces)], 400, num_patches, config.patch_size, 0)
    arrays = stack_rows([row])
    segments = jnp.asarray(arrays["patch_segment_ids"])
    attention = encoder_attention("dense", with_class_tokens(segments) if config.class_token else segments, False, None)
    run = functools.partial(_features, arrays=arrays, attention=attention)
    states = run(loaded.model.encoder)
    assert len(states) == config.num_layers + 1
    for layer, state in enumerate(states):
        bar = WHOLE if layer else MODULE
        for number in range(len(grids)):
            ours = _raster(state[0], arrays, number + 1, grids[number])
            compare(ours, expected[f"hidden/{number}/{layer}"], bar, f"image {number} after layer {layer}")

    def total(params: dict[str, Any]) -> jax.Array:
        encoder = build(loaded.config.model, "understanding", loaded.params | {"encoder": params}).encoder
        last = run(encoder)[-1][0]
        sums = [
            jnp.sum(_raster(last, arrays, number + 1, grids[number]) * expected[f"weights/{number}"])
            for number in range(len(grids))
        ]
        return jnp.sum(jnp.stack(sums))

    check_gradients(loaded, {"encoder": jax.jit(jax.grad(total))(loaded.params["encoder"])}, expected)


def _features(encoder: VisionEncoder, arrays: dict[str, np.ndarray], attention: Any) -> list[jax.Array]:
    """[1, P, E] after every layer and at the end."""
    patches, coords, grid = (jnp.asarray(arrays[name]) for name in ("patches", "patch_coords", "patch_grid"))
    inputs = (patches, coords, grid, attention, jnp.dtype("float32"))
    states = []
    for number in range(encoder.config.num_layers):
        graph, state = nnx.split(encoder)
        shallow = nnx.merge(graph, state)
        shallow.blocks = _first_layers(encoder.blocks, number + 1)
        shallow.norm = lambda x: x
        states.append(shallow(*inputs))
    return [*states, encoder(*inputs)]


def _first_layers(blocks: nnx.Module, count: int) -> Any:
    graph, state = nnx.split(blocks)
    return nnx.merge(graph, jax.tree.map(lambda x: x[:count], state))


def _raster(features: jax.Array, arrays: dict[str, np.ndarray], image: int, grid: np.ndarray) -> jax.Array:
    """Patches of an image in raster order, [h * w, E]."""
    of_image = np.flatnonzero(arrays["patch_segment_ids"][0] == image)
    coords = arrays["patch_coords"][0][of_image]
    return features[of_image[np.argsort(coords[:, 0] * grid[1] + coords[:, 1])]]
