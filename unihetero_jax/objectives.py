"""The losses and the objective table. Arrays in, (sum, count) pairs out; divided once, by counts of the whole batch.

Every loss is a sum over its targets and a count of them, so accumulation, packing and the number of devices do not
change it. All losses are float32.
"""

from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from unihetero_jax.arrays import Batch, LossOutput, ModelOutput, VisionOutput, typechecked
from unihetero_jax.config import MERGED_PATCHES, Component, Config, LossConfig, Objective
from unihetero_jax.text_loss import text_nll

LossName = Literal["text", "visual"]

GRADIENT_TABLE: Mapping[Objective, Mapping[LossName, frozenset[Component]]] = {
    "understanding": {"text": frozenset({"encoder", "projector", "decoder"})},
    "semantic_input": {
        "text": frozenset({"encoder", "projector", "decoder"}),
        "visual": frozenset({"encoder", "projector", "decoder", "semantic_head"}),
    },
    "semantic_encoder": {
        "text": frozenset({"encoder", "projector", "decoder"}),
        "visual": frozenset({"encoder", "projector", "decoder", "semantic_head"}),
    },
}
"""Objective -> loss -> the components its gradient reaches (through the *inputs*; targets are always stopped).

`gradient_table.py` proves this at start-up on a miniature twin. A visual loss with `cut_input_gradient` does not reach
encoder and projector, and a frozen component is reached by nothing: `reached` applies both.
"""

GRADIENT_GROUPS: Mapping[Objective, tuple[tuple[Component, ...], ...]] = {
    "understanding": (("encoder", "projector", "decoder"),),
    "semantic_input": (("encoder", "projector", "decoder", "semantic_head"),),
    "semantic_encoder": (("encoder", "projector", "decoder", "semantic_head"),),
}
"""Components that share a loss graph. Clipping acts within a group, so that an isolated part cannot change the size of
the others' update."""


def reached(objective: Objective, loss: LossName, config: LossConfig, frozen: tuple[Component, ...]) -> set[Component]:
    """The components that a loss trains under this configuration."""
    components = set(GRADIENT_TABLE[objective][loss])
    if loss == "visual" and config.cut_input_gradient:
        components -= {"encoder", "projector"}
    return components - set(frozen)


@typechecked
def count_targets(batch: Batch) -> dict[str, Float[Array, ""]]:
    """How many targets each loss has in the whole batch: the denominators, known before any microbatch runs."""
    return {
        "text": jnp.sum(batch.text_loss_mask, dtype=jnp.float32),
        "visual": jnp.sum(batch.visual_loss_mask, dtype=jnp.float32),
    }


@typechecked
def visual_weight(config: LossConfig, step: Int[Array, ""]) -> Float[Array, ""]:
    """lambda at a step: linear from `visual_weight_start` to `visual_weight` (as arXiv 2608.12209 over 4,000 steps)."""
    progress = jnp.clip(step / max(config.visual_ramp_steps, 1), 0.0, 1.0) if config.visual_ramp_steps else 1.0
    return jnp.asarray(config.visual_weight_start + (config.visual_weight - config.visual_weight_start) * progress)


@typechecked
def embedding_distance(
    predicted: Float[Array, "*n Z"], target: Float[Array, "*n Z"], config: LossConfig
) -> Float[Array, "*n"]:
    """Distance between prediction and target in float32.

    cosine: `1 - cos`. mse, smooth_l1 (beta 1): mean over dimensions. The target comes normalised (`normalise_target`);
    under l2 the prediction is too, since a regression onto the unit sphere has no use for another radius.
    """
    predicted, target = predicted.astype(jnp.float32), target.astype(jnp.float32)
    if config.target_norm == "l2":
        predicted = _unit(predicted)
    match config.visual_loss:
        case "cosine":
            return cosine_distance(predicted, target)
        case "mse":
            return jnp.mean((predicted - target) ** 2, axis=-1)
        case "smooth_l1":
            difference = jnp.abs(predicted - target)
            return jnp.mean(jnp.where(difference < 1, 0.5 * difference**2, difference - 0.5), axis=-1)


@typechecked
def normalise_target(target: Float[Array, "*n Z"], config: LossConfig) -> Float[Array, "*n Z"]:
    """What the head shall predict, in float32: the embedding itself, its direction, or standardised over dimensions."""
    target = target.astype(jnp.float32)
    match config.target_norm:
        case "none":
            return target
        case "l2":
            return _unit(target)
        case "layer_norm":
            centred = target - target.mean(axis=-1, keepdims=True)
            return centred * jax.lax.rsqrt((centred * centred).mean(axis=-1, keepdims=True) + 1e-6)


def cosine_distance(a: jax.Array, b: jax.Array) -> jax.Array:
    """`1 - cos` over the last dimension, in float32."""
    return 1.0 - jnp.sum(_unit(a.astype(jnp.float32)) * _unit(b.astype(jnp.float32)), axis=-1)


def _unit(x: jax.Array) -> jax.Array:
    return x * jax.lax.rsqrt(jnp.sum(x * x, axis=-1, keepdims=True) + 1e-12)


@typechecked
def target_space(objective: Objective, vision: VisionOutput) -> Float[Array, "B U Z"]:
    """The embeddings that the visual loss predicts, without gradient (else a constant is a minimiser)."""
    embeddings = vision.merged if objective == "semantic_encoder" else vision.visual_embeddings
    return jax.lax.stop_gradient(embeddings)


@typechecked
def compute_loss(
    config: Config,
    output: ModelOutput,
    batch: Batch,
    target: VisionOutput,
    weight: Float[Array, ""],
    denominators: dict[str, Float[Array, ""]],
) -> LossOutput:
    """`L = L_text + lambda L_visual` (design section 2), and what is needed to judge it.

    Args:
        config: the experiment.
        output: the model's output on this (micro)batch.
        batch: the (micro)batch.
        target: the vision path that gives the targets: that of the moving average, or the online one.
        weight: lambda.
        denominators: from `count_targets` of the *whole* batch.
    """
    total, nll = text_nll(output.hidden, output.unembedding, batch.tokens, batch.text_loss_mask, config.loss.text_chunk)
    sums, counts = {"text": total}, {"text": jnp.sum(batch.text_loss_mask, dtype=jnp.float32)}
    num_sources = len(config.data.sources)
    sums["text_by_source"], counts["text_by_source"] = _by_source(nll, batch.text_loss_mask, batch, num_sources)
    loss = sums["text"] / jnp.maximum(denominators["text"], 1.0)
    sums["within_spread"], counts["within_spread"] = within_image_spread(
        output.vision.visual_embeddings, batch.patch_segment_ids
    )
    sums["across_spread"], counts["across_spread"] = across_image_spread(
        output.vision.visual_embeddings, batch.patch_segment_ids
    )
    if output.predicted_embeddings is not None:
        visual_sums, visual_counts = _visual_terms(config, output.predicted_embeddings, batch, target)
        loss = loss + weight * visual_sums["visual"] / jnp.maximum(denominators["visual"], 1.0)
        sums, counts = sums | visual_sums, counts | visual_counts
    return LossOutput(loss, sums, counts)


def _by_source(values: jax.Array, mask: jax.Array, batch: Batch, num_sources: int) -> tuple[jax.Array, jax.Array]:
    one_hot = jax.nn.one_hot(batch.source_ids, num_sources, dtype=jnp.float32) * mask[..., None]
    return jnp.einsum("bt,bts->s", values, one_hot), one_hot.sum(axis=(0, 1))


def _visual_terms(
    config: Config, predicted: jax.Array, batch: Batch, target: VisionOutput
) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
    """The visual loss, the two baselines that need no model, and the distance that the copy alarm watches.

    The mean embedding is that of the (micro)batch. `copy_previous_cosine` has the same scale whatever the loss is.
    """
    embeddings = target_space(config.objective, target)
    at_position = jnp.take_along_axis(embeddings, batch.visual_index[..., None], axis=1)
    wanted = normalise_target(at_position, config.loss)
    mask = batch.visual_loss_mask
    has_previous = mask & jnp.roll(batch.visual_mask, 1, axis=1)
    count = jnp.sum(mask, dtype=jnp.float32)
    mean = jnp.sum(jnp.where(mask[..., None], wanted, 0.0), axis=(0, 1)) / jnp.maximum(count, 1.0)

    def distance(guess: jax.Array) -> jax.Array:
        return embedding_distance(guess, wanted, config.loss)

    distances = {
        "visual": (distance(jnp.roll(predicted, 1, axis=1)), mask),
        "visual_copy_previous": (distance(jnp.roll(wanted, 1, axis=1)), has_previous),
        "visual_mean_embedding": (distance(jnp.broadcast_to(mean, wanted.shape)), mask),
        "copy_previous_cosine": (cosine_distance(jnp.roll(at_position, 1, axis=1), at_position), has_previous),
    }
    sums = {name: jnp.sum(jnp.where(valid, value, 0.0)) for name, (value, valid) in distances.items()}
    counts = {name: jnp.sum(valid, dtype=jnp.float32) for name, (_, valid) in distances.items()}
    return sums, counts


@typechecked
def within_image_spread(
    embeddings: Float[Array, "B U D"], patch_segment_ids: Int[Array, "B P"]
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """(sum, count) over images of `1 - mean cosine between two different tokens of the same image`.

    The alarm for collapse within the image, which a low visual loss, the spread across images and "beats the mean" all
    miss. By `|sum of unit vectors|^2 = n + 2 * sum of pair cosines` no pair is ever formed.
    """
    unit = _unit(jax.lax.stop_gradient(embeddings).astype(jnp.float32))
    member = _image_members(patch_segment_ids)
    num_tokens = member.sum(axis=1)
    total = jnp.einsum("bui,bud->bid", member, unit)
    pairs = num_tokens * (num_tokens - 1)
    mean_cosine = (jnp.sum(total * total, axis=-1) - num_tokens) / jnp.maximum(pairs, 1.0)
    valid: Bool[Array, "B I"] = pairs > 0
    return jnp.sum(jnp.where(valid, 1.0 - mean_cosine, 0.0)), jnp.sum(valid, dtype=jnp.float32)


@typechecked
def across_image_spread(
    embeddings: Float[Array, "B U D"], patch_segment_ids: Int[Array, "B P"]
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """(sum, count) over places of `1 - mean cosine between the tokens of two different images at the same place`.

    The alarm for the other collapse, in which every place gets a vector of its own whatever the image shows: the spread
    within an image and the distance of copying stay high while the visual loss looks superb (our choice: seen where
    text is scarce, .001 to .01 against .43 of the demo, with rollout retrieval at chance). Every run begins like that
    and leaves it as text is learnt. A place is a token's number within its image; the images are those of the
    (micro)batch.
    """
    unit = _unit(jax.lax.stop_gradient(embeddings).astype(jnp.float32))
    member = _image_members(patch_segment_ids)
    place = jnp.einsum("bui,bui->bu", jnp.cumsum(member, axis=1) - 1.0, member).astype(jnp.int32)
    num_places = member.shape[1]
    is_token = member.sum(axis=-1)
    at_place = jnp.where(is_token > 0, place, num_places).reshape(-1)  # padding goes to a place of its own
    total = jax.ops.segment_sum((unit * is_token[..., None]).reshape(-1, unit.shape[-1]), at_place, num_places + 1)
    num_images = jax.ops.segment_sum(is_token.reshape(-1), at_place, num_places + 1)
    pairs = num_images * (num_images - 1)
    mean_cosine = (jnp.sum(total * total, axis=-1) - num_images) / jnp.maximum(pairs, 1.0)
    valid: Bool[Array, " K"] = pairs > 0
    return jnp.sum(jnp.where(valid, 1.0 - mean_cosine, 0.0)), jnp.sum(valid, dtype=jnp.float32)


def _image_members(patch_segment_ids: jax.Array) -> jax.Array:
    """Which image of its row each visual token belongs to, one-hot `float32[B, U, I]`; padding is a row of zeros."""
    image_ids = patch_segment_ids[:, ::MERGED_PATCHES]
    return jax.nn.one_hot(image_ids - 1, image_ids.shape[1], dtype=jnp.float32)


def means(sums: Mapping[str, Any], counts: Mapping[str, Any]) -> dict[str, Any]:
    """What is logged: sum / count, and 0 where there was nothing to count (the count is logged beside it)."""
    return {name: sums[name] / jnp.maximum(counts[name], 1.0) for name in sums}
