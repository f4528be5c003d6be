"""The losses and the objective table. Arrays in, (sum, count) pairs out; divided once, by counts of the whole batch.

Every loss is a sum over its targets and a count of them, so accumulation, packing and the number of devices do not
change it. All losses are float32.
"""

import types
from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from unihetero_jax.arrays import Batch, Flow, LossOutput, ModelOutput, TargetStatistics, VisionOutput, typechecked
from unihetero_jax.config import (
    MERGED_PATCHES,
    MIN_TAU,
    Component,
    Config,
    LossConfig,
    Objective,
    VisualTarget,
    components_of,
    has_cross_attention,
    num_branch_layers,
    pixel_role,
    visual_target,
)
from unihetero_jax.patch_codec import patch_codec
from unihetero_jax.text_loss import text_nll

LossName = Literal["text", "visual", "pixel"]
TARGET_SUMS = ("target_mean", "target_square")
"""Sums over the visual targets, per dimension, of which the head's running statistics are made."""

_VISION_AND_LM: tuple[Component, ...] = ("encoder", "projector", "decoder")
_TEXT_ALONE: Mapping[LossName, tuple[Component, ...]] = {"text": _VISION_AND_LM}
_SEMANTIC: Mapping[LossName, tuple[Component, ...]] = {**_TEXT_ALONE, "visual": (*_VISION_AND_LM, "semantic_head")}

GRADIENT_TABLE: Mapping[Objective, Mapping[LossName, tuple[Component, ...]]] = {
    "understanding": _TEXT_ALONE,
    "understanding_i2t": _TEXT_ALONE,
    "semantic_input": _SEMANTIC,
    "semantic_encoder": _SEMANTIC,
    "patch": _SEMANTIC,
    "pixels": _SEMANTIC,
    "random": _SEMANTIC,
    "pixel_through": {**_TEXT_ALONE, "pixel": (*_VISION_AND_LM, "pixel_decoder")},
    "pixel_detached": {**_TEXT_ALONE, "pixel": ("pixel_decoder",)},
    "generation": _SEMANTIC,
    "unihetero": {**_SEMANTIC, "pixel": ("pixel_decoder",)},
}
"""Objective -> loss -> the components its gradient reaches (through the *inputs*; targets are always stopped).

    understanding      text alone
    understanding_i2t  text alone; every pair as image, then text (the fair baseline: it sees the same pairs)
    semantic_input     the next input embedding: UniHetero
    semantic_encoder   the next output of the encoder (the control of claim 3)
    patch              the next raw patch embedding (arXiv 2512.16922)
    pixels, random     the next patches' normalised pixels; the next output of a frozen random encoder (controls)
    pixel_through      pixels of the next block, drawn from the hidden state; the language model learns from it
    pixel_detached     the same but for one stop-gradient
    generation         semantic_input whose text loss is that of samples with a drawn image (the separate specialist)
    unihetero          semantic_input, and a pixel decoder that draws images from visual embeddings

`gradient_table.py` proves this at start-up on a miniature twin. A visual or pixel loss with `cut_input_gradient` does
not reach encoder and projector, and a frozen component is reached by nothing: `reached` applies both.
"""


def gradient_groups(config: Config) -> tuple[tuple[Component, ...], ...]:
    """Components that share a loss graph. Clipping acts within a group, so that an isolated part cannot change the size
    of the others' update: a pixel decoder whose gradient ends in it, and a visual branch that is cut off.
    """
    role, apart = pixel_role(config.objective), list[tuple[Component, ...]]()
    if role not in (None, "through"):
        apart.append(("pixel_decoder",))
    components = components_of(config.model, config.objective)
    if config.loss.cut_branch_gradient and "visual_branch" in components:
        above: set[Component] = {"visual_branch", "semantic_head"}
        above |= {"pixel_decoder"} if role == "through" else set()
        apart.append(tuple(name for name in components if name in above))
    taken = {name for group in apart for name in group}
    return (tuple(name for name in components if name not in taken), *apart)


def reached(config: Config, loss: LossName) -> set[Component]:
    """The components that a loss trains under this configuration."""
    components = set(GRADIENT_TABLE[config.objective][loss])
    if loss != "text" and "decoder" in components and num_branch_layers(config.model, config.objective):
        components.add("visual_branch")
        if config.loss.cut_branch_gradient:
            components -= set(_VISION_AND_LM)
    # The text of `generation` is that of samples with a drawn image alone: the cut is theirs, too.
    if config.loss.cut_input_gradient and (loss != "text" or config.objective == "generation"):
        # Gated layers are the projector's, and lie above what is cut.
        components -= {"encoder"} if has_cross_attention(config.model) else {"encoder", "projector"}
    return components - set(config.optimizer.frozen)


@typechecked
def count_targets(config: Config, batch: Batch) -> dict[str, Float[Array, ""]]:
    """How many targets each loss has in the whole batch: the denominators, known before any microbatch runs."""
    masks = {"text": supervised_text(config, batch), "visual": batch.visual_loss_mask}
    if pixel_role(config.objective):
        masks["pixel"] = _drawn_patches(config, batch)
    return {name: jnp.sum(mask, dtype=jnp.float32) for name, mask in masks.items()}


@typechecked
def supervised_text(config: Config, batch: Batch) -> Bool[Array, "B T"]:
    """Which tokens carry the text loss; of the specialist for generation, those of samples with a drawn image."""
    if config.objective != "generation":
        return batch.text_loss_mask
    num_rows, length = batch.segment_ids.shape
    has_image = jnp.zeros((num_rows, length + 1), bool)
    has_image = has_image.at[jnp.arange(num_rows)[:, None], batch.segment_ids].max(batch.visual_loss_mask)
    return batch.text_loss_mask & jnp.take_along_axis(has_image, batch.segment_ids, axis=1)


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
def target_space(target: VisualTarget, vision: VisionOutput, batch: Batch) -> Float[Array, "B U Z"]:
    """The embeddings that the visual loss predicts, without gradient (else a constant is a minimiser)."""
    match target:
        case "input":
            embeddings = vision.visual_embeddings
        case "encoder" | "random":
            embeddings = vision.merged
        case "patch":
            embeddings = vision.patch_embeddings
        case "pixels":
            embeddings = _normalised_pixels(batch)
    return jax.lax.stop_gradient(embeddings)


def _normalised_pixels(batch: Batch) -> jax.Array:
    """A visual token's pixels less their mean, over their deviation, float32[B, U, 4F] (as MAE, arXiv 2111.06377)."""
    pixels = batch.patches.astype(jnp.float32) / 255
    pixels = pixels.reshape(pixels.shape[0], -1, MERGED_PATCHES * pixels.shape[-1])
    centred = pixels - pixels.mean(axis=-1, keepdims=True)
    # The constant is that of a deviation of one grey level in 100: a plain block stays near zero.
    return centred * jax.lax.rsqrt((centred * centred).mean(axis=-1, keepdims=True) + 1e-4)


@typechecked
def compute_loss(
    config: Config,
    output: ModelOutput,
    batch: Batch,
    target: VisionOutput,
    weight: Float[Array, ""],
    denominators: dict[str, Float[Array, ""]],
    flows: Mapping[str, tuple[Flow, Any]] = types.MappingProxyType({}),
) -> LossOutput:
    """`L = L_text + lambda L_visual + mu L_pixel` (design section 2), and what is needed to judge it.

    Args:
        config: the experiment.
        output: the model's output on this (micro)batch.
        batch: the (micro)batch.
        target: the vision path that gives the targets: that of the moving average, or the online one.
        weight: lambda.
        denominators: from `count_targets` of the *whole* batch.
        flows: of the losses by flow matching: what is to be predicted and what was.
    """
    text_mask = supervised_text(config, batch)
    total, nll = text_nll(output.hidden, output.unembedding, batch.tokens, text_mask, config.loss.text_chunk)
    sums, counts = {"text": total}, {"text": jnp.sum(text_mask, dtype=jnp.float32)}
    num_sources = len(config.data.sources)
    sums["text_by_source"], counts["text_by_source"] = _by_source(nll, text_mask, batch, num_sources)
    loss = sums["text"] / jnp.maximum(denominators["text"], 1.0)
    for name, spread in (("within_spread", within_image_spread), ("across_spread", across_image_spread)):
        sums[name], counts[name] = spread(output.vision.visual_embeddings, batch.patch_segment_ids)
    if visual_target(config.objective):
        visual_sums, visual_counts = _visual_terms(config, output, batch, target, flows.get("visual"))
        loss = loss + weight * visual_sums["visual"] / jnp.maximum(denominators["visual"], 1.0)
        sums, counts = sums | visual_sums, counts | visual_counts
    if "pixel" in flows:
        sums["pixel"], counts["pixel"] = _flow_error(*flows["pixel"])
        loss = loss + config.loss.pixel_weight * sums["pixel"] / jnp.maximum(denominators["pixel"], 1.0)
    return LossOutput(loss, sums, counts)


def _by_source(values: jax.Array, mask: jax.Array, batch: Batch, num_sources: int) -> tuple[jax.Array, jax.Array]:
    one_hot = jax.nn.one_hot(batch.source_ids, num_sources, dtype=jnp.float32) * mask[..., None]
    return jnp.einsum("bt,bts->s", values, one_hot), one_hot.sum(axis=(0, 1))


def _visual_terms(
    config: Config, output: ModelOutput, batch: Batch, target: VisionOutput, flow: tuple[Flow, Any] | None
) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
    """The visual loss, and what it is judged by: the distance that the copy alarm watches, whose scale is the same
    whatever the loss is, and of a regression the two baselines that need no model (the mean is the (micro)batch's).
    """
    at_position = _targets_at_positions(config, batch, target)
    wanted = _wanted(config, output, at_position)
    mask = batch.visual_loss_mask
    has_previous = mask & jnp.roll(batch.visual_mask, 1, axis=1)
    count = jnp.sum(mask, dtype=jnp.float32)
    mean = jnp.sum(jnp.where(mask[..., None], wanted, 0.0), axis=(0, 1)) / jnp.maximum(count, 1.0)

    def distance(guess: jax.Array) -> jax.Array:
        return embedding_distance(guess, wanted, config.loss)

    distances = {"copy_previous_cosine": (cosine_distance(jnp.roll(at_position, 1, axis=1), at_position), has_previous)}
    if flow is None:
        distances |= {
            "visual": (distance(jnp.roll(output.predicted_embeddings, config.loss.target_shift, axis=1)), mask),
            "visual_copy_previous": (distance(jnp.roll(wanted, 1, axis=1)), has_previous),
            "visual_mean_embedding": (distance(jnp.broadcast_to(mean, wanted.shape)), mask),
        }
    sums = {name: jnp.sum(jnp.where(valid, value, 0.0)) for name, (value, valid) in distances.items()}
    counts = {name: jnp.sum(valid, dtype=jnp.float32) for name, (_, valid) in distances.items()}
    if flow is not None:
        sums["visual"], counts["visual"] = _flow_error(*flow)
    if output.target_statistics is not None:
        targets = jnp.where(mask[..., None], at_position.astype(jnp.float32), 0.0)
        sums |= dict(zip(TARGET_SUMS, (targets.sum(axis=(0, 1)), (targets**2).sum(axis=(0, 1))), strict=True))
    return sums, counts


def _targets_at_positions(config: Config, batch: Batch, target: VisionOutput) -> jax.Array:
    """The target of every position that carries the visual loss, [B, T, Z]."""
    kind = visual_target(config.objective)
    assert kind is not None
    embeddings = target_space(kind, target, batch)
    at_position = jnp.take_along_axis(embeddings, batch.visual_index[..., None], axis=1)
    if config.loss.target_shuffled:
        at_position = _of_another_image(at_position, batch.visual_loss_mask, config.data.image_max_patches)
    return at_position


def _of_another_image(values: jax.Array, mask: jax.Array, max_patches: int) -> jax.Array:
    """At each masked position the value of one that lies as many of them further on as the largest image has tokens.

    An image's tokens follow each other, so that is another image's; where all are of the largest size, it is the next
    one's at the same place. A batch with fewer than two such images is cut in halves.
    """
    flat = mask.reshape(-1)
    count = jnp.sum(flat)
    rank = jnp.cumsum(flat) - 1
    place = jnp.nonzero(flat, size=flat.shape[0], fill_value=0)[0]
    step = jnp.minimum(max_patches // MERGED_PATCHES, count // 2)
    donor = place[(rank + step) % jnp.maximum(count, 1)].reshape(mask.shape)
    shuffled = values.reshape(-1, values.shape[-1])[donor]
    return jnp.where(mask[..., None], shuffled, values)


def _wanted(config: Config, output: ModelOutput, at_position: jax.Array) -> jax.Array:
    """What the head shall predict, float32[B, T, Z]."""
    statistics: TargetStatistics | None = output.target_statistics
    if statistics is None:
        return normalise_target(at_position, config.loss)
    return (at_position.astype(jnp.float32) - statistics.mean) / statistics.deviation


# ---------------------------------------------------------------- flow matching


@typechecked
def visual_flow(config: Config, output: ModelOutput, batch: Batch, target: VisionOutput) -> Flow:
    """Points on the way from each visual target to noise, at the target's position."""
    wanted = _wanted(config, output, _targets_at_positions(config, batch, target))
    own = jnp.broadcast_to(jnp.arange(wanted.shape[1]), wanted.shape[:2])
    return draw_flow(wanted, own, batch.visual_loss_mask, batch.row_hash, purpose=0)


@typechecked
def pixel_flow(
    config: Config, output: ModelOutput, batch: Batch, predicted: Float[Array, "B T D"] | None = None
) -> tuple[Flow, Float[Array, "B U D"], Bool[Array, "B U"]]:
    """Points on the way from patches, coded, to noise, the condition of each visual token, and whether it is given.

    The renderer is conditioned on the image's visual embeddings, true with noise or `predicted` from the position
    before; as an objective the decoder draws the block at t + 1 from the hidden state at t, and `pixel_detached`
    differs from `pixel_through` by one stop-gradient.
    """
    role = pixel_role(config.objective)
    num_visual = batch.patches.shape[1] // MERGED_PATCHES
    if role == "renderer":
        condition = jax.lax.stop_gradient(_renderer_condition(config, output, batch, predicted))
        groups = batch.patch_segment_ids
    else:
        condition = _hidden_before(batch, output.visual_hidden, num_visual)
        groups = jnp.broadcast_to(jnp.arange(num_visual * MERGED_PATCHES) // MERGED_PATCHES, batch.patches.shape[:2])
    if role == "detached":
        condition = jax.lax.stop_gradient(condition)
    clean = patch_codec(config.model).encode(batch.patches)
    flow = draw_flow(clean, groups, _drawn_patches(config, batch), batch.row_hash, purpose=1, min_tau=MIN_TAU)
    coin = _by_group(batch.row_hash, 2, groups[:, ::MERGED_PATCHES])
    return flow, condition, coin >= config.model.pixel_decoder.condition_dropout


def _renderer_condition(config: Config, output: ModelOutput, batch: Batch, predicted: jax.Array | None) -> jax.Array:
    """Visual embeddings as the renderer will meet them, [B, U, D]: with noise, of some drawn images as predicted."""
    pixels, condition = config.model.pixel_decoder, output.vision.visual_embeddings
    images = batch.patch_segment_ids[:, ::MERGED_PATCHES]
    if predicted is not None:
        is_drawn = _position_of_target(batch, condition.shape[1]) > 0
        takes = is_drawn & (_by_group(batch.row_hash, 3, images) < pixels.predicted_share)
        condition = jnp.where(takes[..., None], _hidden_before(batch, predicted, condition.shape[1]), condition)
    amount = pixels.condition_noise * _by_group(batch.row_hash, 4, images)[..., None]
    scale = jnp.sqrt(jnp.mean(condition.astype(jnp.float32) ** 2, axis=-1, keepdims=True))
    noise = jax.vmap(lambda key: jax.random.normal(key, condition.shape[1:]))(_row_keys(batch.row_hash, 5))
    return (condition + amount * scale * noise).astype(condition.dtype)


def _drawn_patches(config: Config, batch: Batch) -> jax.Array:
    """Which patches carry the pixel loss, bool[B, P]: of the renderer, those of all images."""
    if pixel_role(config.objective) == "renderer":
        return batch.patch_segment_ids > 0
    num_visual = batch.patches.shape[1] // MERGED_PATCHES
    return jnp.repeat(_position_of_target(batch, num_visual) > 0, MERGED_PATCHES, axis=1)


def _position_of_target(batch: Batch, num_visual: int) -> jax.Array:
    """Where each visual token is a target, int32[B, U]; 0 if it is none (no target stands first in a row)."""
    num_rows, length = batch.tokens.shape
    index = jnp.where(batch.visual_loss_mask, batch.visual_index, num_visual)
    positions = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), (num_rows, length))
    empty = jnp.zeros((num_rows, num_visual + 1), jnp.int32)
    return empty.at[jnp.arange(num_rows)[:, None], index].max(positions)[:, :-1]


def _hidden_before(batch: Batch, hidden: jax.Array, num_visual: int) -> jax.Array:
    """The hidden state that each visual token is predicted from, [B, U, D]."""
    before = jnp.maximum(_position_of_target(batch, num_visual) - 1, 0)
    return jnp.take_along_axis(hidden, before[..., None], axis=1)


@typechecked
def draw_flow(
    clean: Float[Array, "B S Z"],
    groups: Int[Array, "B S"],
    mask: Bool[Array, "B S"],
    row_hash: Any,
    purpose: int,
    min_tau: float = 0.0,
) -> Flow:
    """`y_tau = (1 - tau) y_0 + tau eps` with tau uniform from `min_tau` to 1, one for each group of a row.

    The noise is a function of the row's content (our choice): it is the same on any number of devices, in any
    microbatch and for every arm of a comparison, and there is no random state to save.
    """
    noise = jax.vmap(lambda key: jax.random.normal(key, clean.shape[1:], jnp.float32))(_row_keys(row_hash, purpose))
    tau = min_tau + (1 - min_tau) * _by_group(row_hash, purpose + 16, groups)
    noisy = clean + tau[..., None] * (noise - clean)
    return Flow(noisy, tau, noise - clean, mask)


def _by_group(row_hash: jax.Array, purpose: int, groups: jax.Array) -> jax.Array:
    """A uniform number for each group of a row, float32[B, S]."""
    length = groups.shape[1]
    drawn = jax.vmap(lambda key: jax.random.uniform(key, (length + 1,)))(_row_keys(row_hash, purpose))
    return jnp.take_along_axis(drawn, groups, axis=1)


def _row_keys(row_hash: jax.Array, purpose: int) -> jax.Array:
    def of_row(halves: jax.Array) -> jax.Array:
        key = jax.random.fold_in(jax.random.key(purpose), halves[0])
        return jax.random.fold_in(key, halves[1])

    return jax.vmap(of_row)(row_hash.astype(jnp.uint32))


def _flow_error(flow: Flow, predicted: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(sum, count) of the mean squared error of the velocity."""
    error = jnp.mean((predicted.astype(jnp.float32) - flow.velocity) ** 2, axis=-1)
    return jnp.sum(jnp.where(flow.mask, error, 0.0)), jnp.sum(flow.mask, dtype=jnp.float32)


# ---------------------------------------------------------------- alarms


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
