"""Parameters and model FLOPs of a configuration, in closed form, per component.

Model FLOPs are those of the matrix products that the method needs, 2 per multiply-add; norms, softmax, rotary
positions, gathers, the optimizer and rematerialisation count nothing. A trained part counts its forward three times
(forward, gradient by input, gradient by weight), as is customary; a frozen part only what still flows through it.
Attention counts the (query, key) pairs that may attend: causal within a segment for the decoder, the whole image for
the encoder. XLA's `cost_analysis` is no substitute: it counts the body of a scan once.

Padding is reported apart: `count_work` counts real positions, `padded_work` what the static shapes make the device do.
MFU = FLOPs of `padded_work` per second / peak; useful MFU = FLOPs of `count_work` per second / peak.
"""

import dataclasses
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from unihetero_jax.config import (
    COMPONENTS,
    MERGED_PATCHES,
    Config,
    DecoderConfig,
    EncoderConfig,
    ModelConfig,
    Objective,
    drawn_values,
    has_cross_attention,
    has_queries,
    head_widths,
    num_branch_layers,
    patch_values,
    pixel_role,
    target_dim,
    visual_target,
)


@dataclasses.dataclass(frozen=True)
class Work:
    """What one batch asks for.

    Attributes:
        tokens: row positions, visual ones and markers included.
        targets: supervised positions; only they have logits.
        patches: image patches.
        token_pairs: (query, key) pairs of the decoder's attention; a position attends to itself, too.
        patch_pairs: those of the encoder's attention.
        cross_pairs: (position, visual token of a complete image) pairs of the gated layers, where there are such.
    """

    tokens: int
    targets: int
    patches: int
    token_pairs: int
    patch_pairs: int
    cross_pairs: int = 0


def count_work(config: Config, arrays: Mapping[str, np.ndarray]) -> Work:
    """Counts a host batch's real work, repeated prefixes included: they are computed, and `data.turns` asks for them.

    Args:
        config: for `model.encoder.attention`.
        arrays: fields of `arrays.Batch`: `segment_ids`, `branch_ids`, `text_loss_mask` [B, T] and
            `patch_segment_ids` [B, P]; with gated layers also `visual_mask` [B, T].
    """
    segments, branches = np.asarray(arrays["segment_ids"]), np.asarray(arrays["branch_ids"])
    images = np.asarray(arrays["patch_segment_ids"])
    token_pairs = patch_pairs = 0
    for row, row_branches, row_images in zip(segments, branches, images, strict=True):
        token_pairs += _causal_pairs(row, row_branches)
        for length in _run_lengths(row_images):
            patch_pairs += _image_pairs(length, config.model.encoder)
    cross_pairs = 0
    if has_cross_attention(config.model):
        rows = zip(segments, branches, np.asarray(arrays["visual_mask"]), strict=True)
        cross_pairs = sum(_complete_pairs(*row) for row in rows)
    targets = int(np.sum(arrays["text_loss_mask"]))
    return Work(int((segments > 0).sum()), targets, int((images > 0).sum()), token_pairs, patch_pairs, cross_pairs)


def padded_work(config: Config, num_rows: int) -> Work:
    """The work of `num_rows` full rows: every position real and supervised, one segment and one image per row.

    This is what dense masked attention computes, but for the causal half, which is not counted in either case.
    """
    tokens, patches = config.data.row_tokens, config.data.row_patches
    return Work(
        tokens=num_rows * tokens,
        targets=num_rows * tokens,
        patches=num_rows * patches,
        token_pairs=num_rows * (tokens * (tokens + 1) // 2),
        patch_pairs=num_rows * _image_pairs(patches, config.model.encoder),
        cross_pairs=num_rows * tokens * (patches // MERGED_PATCHES) if has_cross_attention(config.model) else 0,
    )


def full_work(config: Config, num_rows: int) -> Work:
    """The most that `num_rows` rows can need: one sample fills each, with images of the largest size side by side."""
    work = padded_work(config, num_rows)
    patches, largest = config.data.row_patches, config.data.image_max_patches
    pairs = patches // largest * _image_pairs(largest, config.model.encoder)
    return dataclasses.replace(
        work, patch_pairs=num_rows * (pairs + _image_pairs(patches % largest, config.model.encoder))
    )


def executed_flops(config: Config, num_rows: int, backend: str) -> float:
    """FLOPs of the matrix products that a step on full rows makes the devices execute, beyond what the method needs.

    Dense attention (`dense`, `jax_nn`) computes all pairs of a row, those that the mask then hides included; the splash
    kernel those of `full_work`, but its two backward kernels each compute the logits again: seven products for the
    backward pass instead of four. Rematerialisation repeats the forward pass of the layers that have a backward pass:
    `full` all but the product at a layer's end, which nobody reads; `dots` attention alone.
    """
    work, encoder, decoder = full_work(config, num_rows), config.model.encoder, config.model.decoder
    is_dense = backend != "splash"
    if is_dense:
        tokens, patches = config.data.row_tokens, config.data.row_patches
        work = dataclasses.replace(work, token_pairs=num_rows * tokens**2, patch_pairs=num_rows * patches**2)
    if has_cross_attention(config.model):  # with a dense mask over positions, whatever the back end
        work = dataclasses.replace(work, cross_pairs=num_rows * config.data.row_tokens**2)
    total = model_flops(config, work)["total"]
    frozen = set(config.optimizer.frozen)
    layers = (
        ("encoder" not in frozen, encoder.remat, 4 * work.patch_pairs * encoder.dim * encoder.num_layers,
         2 * work.patches * encoder.num_layers * (4 * encoder.dim**2 + encoder.dim * encoder.mlp_dim)),
        (bool({"encoder", "projector", "decoder"} - frozen), decoder.remat,
         4 * work.token_pairs * decoder.num_heads * decoder.head_dim * decoder.num_layers,
         2 * work.tokens * (_decoder_weights(decoder) - decoder.num_layers * decoder.dim * decoder.mlp_dim)),
    )  # fmt: skip
    for has_backward, remat, attention, dense in layers:
        if has_backward:
            total += (0 if is_dense else 1.5 * attention) + (attention if remat != "none" else 0)
            total += dense if remat == "full" else 0
    return float(total)


def model_flops(config: Config, work: Work) -> dict[str, float]:
    """FLOPs of one training step per component, and their `total`.

    Args:
        config: architecture, objective, frozen components and target.
        work: of the whole batch.

    Returns:
        {"encoder", "projector", "decoder", "lm_head", "visual_branch", "semantic_head", "pixel_decoder", "ema_target",
        "total"}. Zero
        for parts that the objective does not have. With replicates, those of one.
    """
    model, frozen = config.model, config.optimizer.frozen
    encoder_dense = 2 * work.patches * _encoder_weights(model.encoder)
    encoder_attention = 4 * work.patch_pairs * model.encoder.dim * model.encoder.num_layers
    projector = _connector_flops(model, work)
    decoder_dense = 2 * work.tokens * _decoder_weights(model.decoder)
    heads_dim = model.decoder.num_heads * model.decoder.head_dim
    decoder_attention = 4 * work.token_pairs * heads_dim * model.decoder.num_layers
    lm_head = 2 * work.targets * model.decoder.dim * model.decoder.vocab_size

    trains = {name: name not in frozen for name in COMPONENTS}
    below_projector = trains["encoder"]
    below_decoder = trains["encoder"] or trains["projector"]
    below_heads = below_decoder or trains["decoder"]
    flops = {
        "encoder": _step(encoder_dense, trains["encoder"], False)
        + _step_attention(encoder_attention, trains["encoder"]),
        "projector": _step(projector.dense, trains["projector"], below_projector)
        + _step_attention(projector.attention, below_decoder),
        "decoder": _step(decoder_dense, trains["decoder"], below_decoder)
        + _step_attention(decoder_attention, below_heads),
        # Tied or not, the unembedding belongs to the decoder.
        "lm_head": _step(lm_head, trains["decoder"], below_heads),
        "visual_branch": 0.0,
        "semantic_head": 0.0,
        "pixel_decoder": 0.0,
        "ema_target": 0.0,
    }
    if has_cross_attention(model):
        flops["projector"] += _gated_flops(model.decoder, work, trains["projector"], below_decoder, below_heads)
    below_visual = below_heads
    if num_layers := num_branch_layers(model, config.objective):
        share = num_layers / model.decoder.num_layers
        below_branch = below_heads and not config.loss.cut_branch_gradient
        below_visual = below_branch or trains["visual_branch"]
        flops["visual_branch"] = _step(share * decoder_dense, trains["visual_branch"], below_branch)
        flops["visual_branch"] += _step_attention(share * decoder_attention, below_visual)
    target = visual_target(config.objective)
    head = 2 * work.tokens * _semantic_head_weights(model, config.objective) if target else 0
    if target:
        flops["semantic_head"] = _step(head, trains["semantic_head"], below_visual)
    if pixel_role(config.objective):
        drawn = _pixel_decoder_flops(config, work)
        below_pixels = below_visual and pixel_role(config.objective) == "through"
        flops["pixel_decoder"] = _step(drawn, trains["pixel_decoder"], below_pixels)
        # A pass reads the rows again, by the layers that predict images, and predicts; forward alone.
        if passes := model.pixel_decoder.rollout_passes:
            flops["pixel_decoder"] += passes * (decoder_dense + decoder_attention + head)
    has_average = config.loss.target == "ema"
    # A frozen component equals its own average: the online output serves, unless its input differs.
    if target == "random" or (target in ("input", "encoder") and has_average and trains["encoder"]):
        flops["ema_target"] += encoder_dense + encoder_attention
    if target == "input" and has_average and (trains["encoder"] or trains["projector"]):
        flops["ema_target"] += projector.dense + projector.attention
    if target == "patch" and has_average and trains["encoder"]:
        flops["ema_target"] += 2 * work.patches * patch_values(model.encoder) * model.encoder.dim
    flops = {name: float(value) for name, value in flops.items()}
    return flops | {"total": sum(flops.values())}


def parameter_counts(model: ModelConfig, objective: Objective) -> dict[str, int]:
    """Parameters per component, and their `total`. Averages and optimizer moments are no parameters."""
    counts = {
        "encoder": _encoder_parameters(model.encoder),
        "projector": _connector_parameters(model),
        "decoder": _decoder_parameters(model.decoder),
    }
    if num_layers := num_branch_layers(model, objective):
        counts["visual_branch"] = num_layers * _decoder_block_parameters(model.decoder) + model.decoder.dim
    if visual_target(objective):
        width = target_dim(model, objective)
        _, hidden = head_widths(model.semantic_head, model.decoder.dim, width)
        statistics = 2 * width if model.semantic_head.standardise_targets else 0
        counts["semantic_head"] = _semantic_head_weights(model, objective) + hidden + width + statistics
    if pixel_role(objective):
        counts["pixel_decoder"] = _pixel_decoder_parameters(model)
    return counts | {"total": sum(counts.values())}


def _step(forward: float, trains: bool, gradient_flows_through: bool) -> float:
    """Forward and backward of products with weights. What trains counts three forwards, inputs' gradient included."""
    return forward * (3 if trains else 2 if gradient_flows_through else 1)


def _step_attention(forward: float, gradient_flows_through: bool) -> float:
    """Both factors of attention's products are activations, so there is all of the backward or none."""
    return forward * (3 if gradient_flows_through else 1)


def _encoder_weights(encoder: EncoderConfig) -> int:
    patch = patch_values(encoder) * encoder.dim
    block = 4 * encoder.dim**2 + 2 * encoder.dim * encoder.mlp_dim
    return patch + encoder.num_layers * block


def _encoder_parameters(encoder: EncoderConfig) -> int:
    norm = 2 * encoder.dim
    block_biases = 4 * encoder.dim + encoder.mlp_dim + encoder.dim
    positions = (encoder.position_grid**2 + encoder.class_token) * encoder.dim
    ends = encoder.dim * (encoder.patch_bias + encoder.class_token) + norm * (1 + encoder.pre_norm)
    return _encoder_weights(encoder) + positions + encoder.num_layers * (block_biases + 2 * norm) + ends


class _Forward(NamedTuple):
    """FLOPs of a part's forward pass: products with weights, and those of attention."""

    dense: float
    attention: float


def _connector_flops(model: ModelConfig, work: Work) -> _Forward:
    """From features to visual embeddings. Queries see the patches of their image and each other: with as many of them
    as blocks these are 5/16 of the pairs of patches, causal or not.
    """
    visual_tokens = work.patches / MERGED_PATCHES
    if not has_queries(model):
        return _Forward(2 * visual_tokens * _projector_weights(model), 0.0)
    width, layers = model.encoder.dim, model.projector.num_layers
    num_maps = 4 if model.projector.kind == "resampler" else 6  # a query transformer's queries attend twice
    by_query = num_maps * width**2 + 2 * width * model.projector.hidden_dim
    dense = (
        layers * (visual_tokens * by_query + work.patches * 2 * width**2) + visual_tokens * width * model.decoder.dim
    )
    return _Forward(2 * dense, 4 * layers * width * work.patch_pairs * (1 + MERGED_PATCHES) / MERGED_PATCHES**2)


def _gated_flops(decoder: DecoderConfig, work: Work, trains: bool, below_images: bool, below_positions: bool) -> float:
    """A step of the gated layers: keys and values of every visual token, all else at every position. Where neither
    these layers nor what is below the images trains, attention has a gradient by its queries alone.
    """
    queries, keys = decoder.num_heads * decoder.head_dim, decoder.num_kv_heads * decoder.head_dim
    by_position = 2 * decoder.dim * queries + 3 * decoder.dim * decoder.mlp_dim
    by_token = 2 * decoder.dim * keys
    read = 2 * decoder.num_layers * work.patches / MERGED_PATCHES * by_token
    rest = 2 * decoder.num_layers * work.tokens * by_position
    attention = 4 * work.cross_pairs * queries * decoder.num_layers
    factor = 3 if trains or below_images else 2 if below_positions else 1
    return _step(read, trains, below_images) + _step(rest, trains, below_positions) + factor * attention


def _projector_weights(model: ModelConfig) -> int:
    hidden = model.projector.hidden_dim
    return MERGED_PATCHES * model.encoder.dim * hidden + hidden * model.decoder.dim


def _connector_parameters(model: ModelConfig) -> int:
    decoder, projector, width = model.decoder, model.projector, model.encoder.dim
    if has_queries(model):
        num_attentions = 1 if projector.kind == "resampler" else 2
        mlp = 2 * width * projector.hidden_dim + projector.hidden_dim + width
        block = num_attentions * 4 * (width**2 + width) + mlp + 3 * 2 * width
        places = 2 * decoder.max_grid * width
        return projector.num_layers * block + places + width * decoder.dim + 2 * decoder.dim
    count = _projector_weights(model) + projector.hidden_dim + 2 * decoder.dim
    if has_cross_attention(model):
        queries, keys = decoder.num_heads * decoder.head_dim, decoder.num_kv_heads * decoder.head_dim
        attention = decoder.dim * (2 * queries + 2 * keys)
        count += decoder.num_layers * (attention + 3 * decoder.dim * decoder.mlp_dim + 2 * decoder.dim + 2)
    return count


def _decoder_weights(decoder: DecoderConfig) -> int:
    """Weights that every position is multiplied with; the unembedding apart."""
    queries, keys = decoder.num_heads * decoder.head_dim, decoder.num_kv_heads * decoder.head_dim
    attention = decoder.dim * (2 * queries + 2 * keys)
    return decoder.num_layers * (attention + 3 * decoder.dim * decoder.mlp_dim)


def _decoder_parameters(decoder: DecoderConfig) -> int:
    embeddings = decoder.vocab_size * decoder.dim * (1 if decoder.tied_embeddings else 2)
    grids = 2 * (decoder.max_grid + 1) * decoder.dim
    return embeddings + grids + decoder.num_layers * _decoder_block_parameters(decoder) + decoder.dim


def _decoder_block_parameters(decoder: DecoderConfig) -> int:
    queries, keys = decoder.num_heads * decoder.head_dim, decoder.num_kv_heads * decoder.head_dim
    rest = 2 * decoder.dim
    if decoder.qkv_bias:
        rest += queries + 2 * keys
    if decoder.qk_norm:
        rest += 2 * decoder.head_dim
    return _decoder_weights(decoder) // decoder.num_layers + rest


def _semantic_head_weights(model: ModelConfig, objective: Objective) -> int:
    width = target_dim(model, objective)
    in_dim, hidden = head_widths(model.semantic_head, model.decoder.dim, width)
    return in_dim * hidden + hidden * width


def _pixel_decoder_flops(config: Config, work: Work) -> float:
    """Forward, over all patches of the rows; attention over whole images, or the four patches of a block."""
    decoder = config.model.pixel_decoder
    control = 2 * work.patches / MERGED_PATCHES * _pixel_control_weights(config.model)
    pairs = MERGED_PATCHES * work.patches
    if pixel_role(config.objective) == "renderer":
        causal = config.model.encoder.attention == "causal"
        pairs = 2 * work.patch_pairs - MERGED_PATCHES * work.patches if causal else work.patch_pairs
    if decoder.conditioning == "cross_attention":  # a patch reads a quarter as many tokens as patches
        pairs += pairs / MERGED_PATCHES
    attention = 4 * pairs * decoder.dim * decoder.num_layers
    return control + 2 * work.patches * _pixel_decoder_weights(config.model) + attention


def _pixel_decoder_weights(model: ModelConfig) -> int:
    """Weights that every patch is multiplied with: patch in and out, attention and MLP of the blocks; of
    cross-attention, query and output.
    """
    dim, mlp_dim = model.pixel_decoder.dim, model.pixel_decoder.mlp_dim
    block = (4 + 2 * _reads_tokens(model)) * dim**2 + 2 * dim * mlp_dim
    return 2 * drawn_values(model) * dim + model.pixel_decoder.num_layers * block


def _pixel_control_weights(model: ModelConfig) -> int:
    """Weights that every visual token is multiplied with: condition, time and the norms' modulations; of
    cross-attention, key and value.
    """
    dim, block = model.pixel_decoder.dim, 6 + 2 * _reads_tokens(model)
    return model.decoder.dim * dim + 2 * dim**2 + (block * model.pixel_decoder.num_layers + 2) * dim**2


def _reads_tokens(model: ModelConfig) -> bool:
    return model.pixel_decoder.conditioning == "cross_attention"


def _pixel_decoder_parameters(model: ModelConfig) -> int:
    decoder, values = model.pixel_decoder, drawn_values(model)
    conditions = _pixel_control_weights(model) + 2 * decoder.dim
    biases = decoder.dim + values + 2 * decoder.dim + 2 * decoder.dim
    block_biases = 6 * decoder.dim + 4 * (1 + _reads_tokens(model)) * decoder.dim + decoder.mlp_dim + decoder.dim
    return _pixel_decoder_weights(model) + conditions + biases + decoder.num_layers * block_biases


def _causal_pairs(segments: np.ndarray, branches: np.ndarray) -> int:
    """Pairs in one row: a position sees the earlier ones of its segment that are in the prefix or its own branch."""
    pairs = 0
    for segment in np.unique(segments[segments > 0]):
        lengths = np.bincount(branches[segments == segment])
        prefix = int(lengths[0])
        pairs += prefix * (prefix + 1) // 2
        pairs += sum(prefix * n + n * (n + 1) // 2 for n in map(int, lengths[1:]))
    return pairs


def _complete_pairs(segments: np.ndarray, branches: np.ndarray, is_visual: np.ndarray) -> int:
    """Pairs in one row of a position and a visual one of its segment and branch whose image has ended before it."""
    pairs = 0
    ended = np.cumsum(~is_visual)
    for place in np.flatnonzero(is_visual):
        sees = (segments == segments[place]) & (ended > ended[place])
        pairs += int((sees & ((branches[place] == 0) | (branches == branches[place]))).sum())
    return pairs


def _run_lengths(ids: np.ndarray) -> np.ndarray:
    return np.unique(ids[ids > 0], return_counts=True)[1]


def _image_pairs(num_patches: int, encoder: EncoderConfig) -> int:
    """Pairs within an image: all of them, or those of a block with itself and earlier blocks if causal."""
    num_patches = int(num_patches)
    if encoder.attention == "bidirectional":
        return num_patches**2
    num_blocks = num_patches // MERGED_PATCHES
    return MERGED_PATCHES**2 * (num_blocks * (num_blocks + 1) // 2)
