"""Text generation with a key/value cache, from text and images."""

import contextlib
import dataclasses
import functools
import json
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray

from unihetero_jax import distributed
from unihetero_jax.arrays import Batch, Cache, Hidden, typechecked
from unihetero_jax.config import MERGED_PATCHES, Config
from unihetero_jax.data.mixture import chat_around, image_spec
from unihetero_jax.data.packing import (
    NUM_MARKERS,
    PackedSample,
    Piece,
    TokenPiece,
    assemble_row,
    empty_rows,
    fill_row,
    image_pieces,
    row_of,
    sample_cost,
    stack_rows,
)
from unihetero_jax.data.records import (
    MERGE_SIZE,
    RecordError,
    decode_image,
    format_prompt,
    image_tokens,
    probe_image,
)
from unihetero_jax.data.tokenizer import Tokenizer
from unihetero_jax.data.transforms import resize_to_grid
from unihetero_jax.inference.rollout import asked_grid, roll_on
from unihetero_jax.inference.sampling import GREEDY, Sampling, sample
from unihetero_jax.model.unihetero import Params, UniHetero, build
from unihetero_jax.sharding import activation_mesh, fetch, local_rows, make_mesh, to_global


@dataclasses.dataclass(frozen=True)
class Prompt:
    """What the model is given: images (their files' bytes) in order, then text."""

    text: str
    images: tuple[bytes, ...] = ()


def generate_text(
    config: Config,
    params: Params,
    tokenizer: Tokenizer,
    prompts: Sequence[Prompt],
    max_new_tokens: int = 64,
    sampling: Sampling = GREEDY,
    seed: int = 0,
) -> list[str]:
    """Continues each prompt until the end-of-sample token or `max_new_tokens`.

    Raises:
        ValueError: there is no prompt, or `max_new_tokens` is not positive.
        RecordError: an image cannot be decoded.
    """
    if not prompts or max_new_tokens < 1:
        raise ValueError(f"{len(prompts)} prompts, max_new_tokens {max_new_tokens}: both must be positive")
    batch = prompt_batch(config, tokenizer, [prompt_sample(config, tokenizer, prompt) for prompt in prompts])
    forbidden = (tokenizer.pad_id, tokenizer.boi_id, tokenizer.eoi_id)
    tokens, _ = decode(
        config, params, batch, jax.random.key(seed), max_new_tokens, tokenizer.eos_id, forbidden, sampling
    )
    return [tokenizer.decode(_until(row, tokenizer.eos_id)).strip() for row in fetch(tokens)]


def generate_texts(
    config: Config,
    params: Params,
    tokenizer: Tokenizer,
    prompts: Sequence[Prompt],
    batch_rows: int,
    max_new_tokens: int = 64,
) -> list[str | None]:
    """`generate_text`, greedily, of any number of prompts: `batch_rows` at a time, over the mesh, in few shapes.

    Prompts of like length share a batch; a batch's shape is a power of two in positions and in patches, so that a whole
    benchmark compiles a handful of programs. A prompt whose image cannot be decoded gives None.

    In a run of several processes all call it with the same prompts. Each decodes the pictures of the rows that its
    devices hold and no others; the texts come to process 0, the others get nothing.

    Raises:
        ValueError: `max_new_tokens` is not positive.
    """
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens {max_new_tokens} must be positive")
    mesh = make_mesh(config.mesh)
    own = local_rows(mesh, batch_rows)
    costs: dict[int, tuple[int, int]] = {}
    for number, prompt in enumerate(prompts):
        with contextlib.suppress(RecordError):
            costs[number] = _prompt_cost(config, tokenizer, prompt)
    order = sorted(costs, key=costs.__getitem__)
    forbidden = (tokenizer.pad_id, tokenizer.boi_id, tokenizer.eoi_id)
    texts: dict[int, str] = {}
    undecodable: list[int] = []
    for start in range(0, len(order), batch_rows):
        chosen = order[start : start + batch_rows]
        of_rows = [(prompts[n], costs[n]) for n in chosen]
        arrays, faulty_rows = _own_rows(config, tokenizer, of_rows, own)
        undecodable += [chosen[row] for row in faulty_rows]
        batch, key = to_global(arrays, mesh), jax.random.key(0)
        with activation_mesh(mesh):
            out, _ = decode(config, params, batch, key, max_new_tokens, tokenizer.eos_id, forbidden, GREEDY)
        for number, tokens in zip(chosen, fetch(out), strict=False):
            texts[number] = tokenizer.decode(_until(tokens, tokenizer.eos_id)).strip()
    found = distributed.gather("undecodable-prompts", json.dumps(undecodable))
    for number in (number for text in found for number in json.loads(text)):
        texts.pop(number, None)
    return [texts.get(number) for number in range(len(prompts))] if found else []


def _own_rows(
    config: Config, tokenizer: Tokenizer, prompts: Sequence[tuple[Prompt, tuple[int, int]]], own: Sequence[int]
) -> tuple[dict[str, np.ndarray], list[int]]:
    """The rows that this process holds of a batch of prompts, given with their costs; and which of those rows hold
    none, because its picture is not what its header says. Rows beyond the prompts hold none either.
    """
    patch_size = config.model.encoder.patch_size
    row_tokens, row_patches = (1 << (max(cost[i] for _, cost in prompts) - 1).bit_length() for i in (0, 1))
    arrays = empty_rows(len(own), row_tokens, max(row_patches, MERGED_PATCHES), patch_size, tokenizer.pad_id)
    faulty = []
    for place, row in enumerate(own):
        sample = _sample_of_cost(config, tokenizer, *prompts[row]) if row < len(prompts) else None
        if row < len(prompts) and sample is None:
            faulty.append(row)
        fill_row(row_of(arrays, place), [sample or PackedSample([TokenPiece([tokenizer.eos_id])])], patch_size)
    return arrays, faulty


def _sample_of_cost(config: Config, tokenizer: Tokenizer, prompt: Prompt, cost: tuple[int, int]) -> PackedSample | None:
    """`prompt_sample`; None where an image does not decode to the size that its header promised."""
    try:
        sample = prompt_sample(config, tokenizer, prompt)
    except RecordError:
        return None
    return sample if sample_cost(sample, config.model.encoder.patch_size) == cost else None


def _prompt_cost(config: Config, tokenizer: Tokenizer, prompt: Prompt) -> tuple[int, int]:
    """Positions and patches of `prompt_sample`, from the headers of the images alone."""
    visual = [image_tokens(*probe_image(image), image_spec(config)) for image in prompt.images]
    before, after = chat_around(config, tokenizer)
    text = before + tokenizer.encode(format_prompt(prompt.text)) + after
    return sum(visual) + NUM_MARKERS * len(visual) + len(text), sum(visual) * MERGE_SIZE**2


def prompt_sample(config: Config, tokenizer: Tokenizer, prompt: Prompt) -> PackedSample:
    """A prompt as it stood in training: each image between its markers, then the prompt's text. With
    `eval.chat_template`, both are what the user says.
    """
    before, after = chat_around(config, tokenizer)
    pieces: list[Piece] = [TokenPiece(before)] if before else []
    for image in prompt.images:
        pieces += image_pieces(resize_to_grid(decode_image(image), image_spec(config)), tokenizer)
    ids = tokenizer.encode(format_prompt(prompt.text)) + after
    return PackedSample([*pieces, TokenPiece(ids)] if ids else pieces)


def prompt_batch(config: Config, tokenizer: Tokenizer, samples: Sequence[PackedSample]) -> Batch:
    """One sample per row, padded at its end to the longest, so that position p lies in cache slot p."""
    patch_size = config.model.encoder.patch_size
    costs = [sample_cost(one, patch_size) for one in samples]
    row_tokens, row_patches = (max(column) for column in zip(*costs, strict=True))
    rows = [
        assemble_row([one], row_tokens, max(row_patches, MERGED_PATCHES), patch_size, tokenizer.pad_id)
        for one in samples
    ]
    whole: dict[str, Any] = stack_rows(rows)  # of numpy: in a run of many processes each of them gives the whole
    return Batch(**whole)


@functools.partial(jax.jit, static_argnames=("config", "max_new_tokens", "end_id", "forbidden", "sampling"))
@typechecked
def decode(
    config: Config,
    params: Params,
    batch: Batch,
    key: PRNGKeyArray,
    max_new_tokens: int,
    end_id: int,
    forbidden: tuple[int, ...],
    sampling: Sampling,
) -> tuple[Int[Array, "B S"], Float[Array, "B S"]]:
    """Prefills the prompts and decodes one token at a time; stops when every row has ended.

    Returns:
        Tokens, `end_id` from a row's end on, and the log-probability each had under the model (before temperature).
    """
    model = build(config.model, config.objective, params)
    last, cache = model.prefill(batch, batch.tokens.shape[1] + max_new_tokens)
    return _decode_on(model, last, cache, key, max_new_tokens, end_id, forbidden, sampling)


@functools.partial(
    jax.jit, static_argnames=("config", "num_visual", "eoi_id", "max_new_tokens", "end_id", "forbidden", "sampling")
)
@typechecked
def draw_and_tell(
    config: Config,
    params: Params,
    batch: Batch,
    key: PRNGKeyArray,
    num_visual: int,
    eoi_id: int,
    max_new_tokens: int,
    end_id: int,
    forbidden: tuple[int, ...],
    sampling: Sampling,
) -> tuple[Float[Array, "B N D"], Int[Array, "B S"]]:
    """Text, then an image, then text again: rolls an image out after prompts that end in `<boi>` (as `rollout`), closes
    it with `<eoi>`, and goes on with text that reads it.

    Returns:
        The embeddings of the image, and the tokens after it, `end_id` from a row's end on.
    """
    model = build(config.model, config.objective, params)
    last, cache = model.prefill(batch, batch.tokens.shape[1] + num_visual + 1 + max_new_tokens)
    drawn, _, cache = roll_on(config, model, last, cache, asked_grid(batch), num_visual, jax.random.fold_in(key, 0))
    num_rows = batch.tokens.shape[0]
    closing = jnp.full((num_rows, 1), eoi_id, jnp.int32)
    last, cache = model.decode_step(_embedded(model, closing), cache)
    key = jax.random.fold_in(key, 1)
    return drawn.embeddings, _decode_on(model, last, cache, key, max_new_tokens, end_id, forbidden, sampling)[0]


def _embedded(model: UniHetero, tokens: jax.Array) -> jax.Array:
    """The input embeddings of one token for each row, int32[B, 1]."""
    return model.decoder.embed(tokens, jnp.zeros((*tokens.shape, 2), jnp.int32), model.dtype)[:, 0]


def _decode_on(
    model: UniHetero,
    last: Hidden,
    cache: Cache,
    key: PRNGKeyArray,
    max_new_tokens: int,
    end_id: int,
    forbidden: tuple[int, ...],
    sampling: Sampling,
) -> tuple[jax.Array, jax.Array]:
    """Tokens and their log-probabilities after a hidden state, by the cache that belongs to it."""
    num_rows = last.text.shape[0]
    blocked = jnp.zeros(model.config.decoder.vocab_size, bool).at[jnp.asarray(forbidden, jnp.int32)].set(True)

    def next_token(step, last, ended):
        logits = (last.text @ model.decoder.unembedding.T.astype(last.text.dtype)).astype(jnp.float32)
        token = sample(jnp.where(blocked, -jnp.inf, logits), jax.random.fold_in(key, step), sampling)
        token = jnp.where(ended, end_id, token)
        return token, jnp.take_along_axis(jax.nn.log_softmax(logits), token[:, None], axis=-1)[:, 0]

    def body(carry):
        step, last, cache, ended, tokens, log_probs = carry
        token, log_prob = next_token(step, last, ended)
        tokens = tokens.at[:, step].set(token)
        log_probs = log_probs.at[:, step].set(jnp.where(ended, 0.0, log_prob))
        last, cache = model.decode_step(_embedded(model, token[:, None]), cache)
        return step + 1, last, cache, ended | (token == end_id), tokens, log_probs

    def unfinished(carry):
        return (carry[0] < max_new_tokens) & ~jnp.all(carry[3])

    tokens = jnp.full((num_rows, max_new_tokens), end_id, jnp.int32)
    start = (0, last, cache, jnp.zeros(num_rows, bool), tokens, jnp.zeros(tokens.shape))
    return jax.lax.while_loop(unfinished, body, start)[4:]


def _until(tokens: np.ndarray, end_id: int) -> list[int]:
    ends = np.flatnonzero(tokens == end_id)
    return tokens[: ends[0] if len(ends) else len(tokens)].tolist()
