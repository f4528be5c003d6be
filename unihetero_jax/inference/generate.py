"""Text generation with a key/value cache, from text and images."""

import contextlib
import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray

from unihetero_jax.arrays import Batch, typechecked
from unihetero_jax.config import MERGED_PATCHES, Config
from unihetero_jax.data.mixture import image_spec
from unihetero_jax.data.packing import PackedSample, TokenPiece, assemble_row, image_pieces, sample_cost, stack_rows
from unihetero_jax.data.records import RecordError, decode_image, format_prompt
from unihetero_jax.data.tokenizer import Tokenizer
from unihetero_jax.data.transforms import resize_to_grid
from unihetero_jax.inference.sampling import GREEDY, Sampling, sample
from unihetero_jax.model.unihetero import Params, build
from unihetero_jax.sharding import fetch


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
    """`generate_text`, greedily, of any number of prompts: `batch_rows` at a time, in few shapes.

    Prompts of like length share a batch; a batch's shape is a power of two in positions and in patches, and its last
    rows may be repeats, so that a whole benchmark compiles a handful of programs. A prompt whose
    image cannot be decoded gives None.

    Raises:
        ValueError: `max_new_tokens` is not positive.
    """
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens {max_new_tokens} must be positive")
    samples: dict[int, PackedSample] = {}
    for number, prompt in enumerate(prompts):
        with contextlib.suppress(RecordError):
            samples[number] = prompt_sample(config, tokenizer, prompt)
    patch_size = config.model.encoder.patch_size
    costs = {number: sample_cost(sample, patch_size) for number, sample in samples.items()}
    forbidden = (tokenizer.pad_id, tokenizer.boi_id, tokenizer.eoi_id)
    order = sorted(samples, key=costs.__getitem__)
    texts: list[str | None] = [None] * len(prompts)
    for start in range(0, len(order), batch_rows):
        chosen = order[start : start + batch_rows]
        tokens, patches = (1 << (max(costs[n][i] for n in chosen) - 1).bit_length() for i in (0, 1))
        filled = chosen + [chosen[-1]] * (batch_rows - len(chosen))
        batch = prompt_batch(config, tokenizer, [samples[n] for n in filled], (tokens, patches))
        key = jax.random.key(0)
        out, _ = decode(config, params, batch, key, max_new_tokens, tokenizer.eos_id, forbidden, GREEDY)
        for number, row in zip(chosen, fetch(out), strict=False):
            texts[number] = tokenizer.decode(_until(row, tokenizer.eos_id)).strip()
    return texts


def prompt_sample(config: Config, tokenizer: Tokenizer, prompt: Prompt) -> PackedSample:
    """A prompt as it stood in training: each image between its markers, then the prompt's text."""
    pieces = []
    for image in prompt.images:
        pieces += image_pieces(resize_to_grid(decode_image(image), image_spec(config)), tokenizer)
    ids = tokenizer.encode(format_prompt(prompt.text))
    return PackedSample([*pieces, TokenPiece(ids)] if ids else pieces)


def prompt_batch(
    config: Config, tokenizer: Tokenizer, samples: Sequence[PackedSample], at_least: tuple[int, int] = (0, 0)
) -> Batch:
    """One sample per row, padded at its end to the longest, so that position p lies in cache slot p.

    `at_least` are positions and patches that a row has in any case.
    """
    patch_size = config.model.encoder.patch_size
    costs = [sample_cost(one, patch_size) for one in samples]
    row_tokens, row_patches = (max(at_least[i], *(cost[i] for cost in costs)) for i in (0, 1))
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
    num_rows, length = batch.tokens.shape
    hidden, cache = model.prefill(batch, length + max_new_tokens)
    last = jnp.take_along_axis(hidden, cache.length[:, None, None] - 1, axis=1)[:, 0]
    no_grid = jnp.zeros((num_rows, 1, 2), jnp.int32)
    blocked = jnp.zeros(config.model.decoder.vocab_size, bool).at[jnp.asarray(forbidden, jnp.int32)].set(True)

    def next_token(step, last, ended):
        logits = (last @ model.decoder.unembedding.T.astype(last.dtype)).astype(jnp.float32)
        token = sample(jnp.where(blocked, -jnp.inf, logits), jax.random.fold_in(key, step), sampling)
        token = jnp.where(ended, end_id, token)
        return token, jnp.take_along_axis(jax.nn.log_softmax(logits), token[:, None], axis=-1)[:, 0]

    def body(carry):
        step, last, cache, ended, tokens, log_probs = carry
        token, log_prob = next_token(step, last, ended)
        tokens = tokens.at[:, step].set(token)
        log_probs = log_probs.at[:, step].set(jnp.where(ended, 0.0, log_prob))
        embedding = model.decoder.embed(token[:, None], no_grid, model.dtype)[:, 0]
        last, cache = model.decode_step(embedding, cache)
        return step + 1, last, cache, ended | (token == end_id), tokens, log_probs

    def unfinished(carry):
        return (carry[0] < max_new_tokens) & ~jnp.all(carry[3])

    tokens = jnp.full((num_rows, max_new_tokens), end_id, jnp.int32)
    start = (0, last, cache, jnp.zeros(num_rows, bool), tokens, jnp.zeros(tokens.shape))
    return jax.lax.while_loop(unfinished, body, start)[4:]


def _until(tokens: np.ndarray, end_id: int) -> list[int]:
    ends = np.flatnonzero(tokens == end_id)
    return tokens[: ends[0] if len(ends) else len(tokens)].tolist()
