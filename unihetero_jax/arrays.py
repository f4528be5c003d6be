"""Containers that cross room boundaries, the shape alphabet, and the explicit shape checker.

Shape alphabet (used by every annotation of this project):

    B  packed rows of a batch          T  token positions of a row
    P  image patches of a row          U  visual tokens of a row, U = P / 4
    D  language-model width            E  vision-encoder width
    V  vocabulary                      F  values of one patch, patch_size^2 * 3
    N  image tokens of one image       K  key positions of an attention (cache slots)
    H  attention heads                 G  key/value heads
    L  layers                          S  token positions of a decode call
    d  values of one head              Z  width of the visual target space
    M  width of merged features, 4E    I  images of a row
    s  side of the position table      i, o  widths before and after a linear map
    C  width of a pixel decoder's condition  Y  values of a patch as it is drawn
"""

import dataclasses
import typing
from typing import Any

import jax
from beartype import beartype
from jaxtyping import Array, Bool, Float, Int, UInt, UInt8, jaxtyped

typechecked = jaxtyped(typechecker=beartype)
"""Checks shapes and dtypes of a function's arguments and result.

Applied explicitly: jaxtyping's import hook would also rewrite our dataclasses, which breaks `jax.tree.map` over them.
"""


@typing.dataclass_transform(frozen_default=True)
def pytree_dataclass(cls):
    """A frozen dataclass whose fields are all pytree children."""
    cls = dataclasses.dataclass(frozen=True)(cls)
    names = [field.name for field in dataclasses.fields(cls)]
    return jax.tree_util.register_dataclass(cls, data_fields=names, meta_fields=[])


@pytree_dataclass
class Batch:
    """`B` packed rows. Masks of losses are aligned to the *target*: position t is predicted from position t - 1.

    One row holding `caption <boi> v0 v1 v2 v3 <eoi> <eos>` and, as a second sample, an image with two independent
    turns:

        tokens           the  cat  boi   .    .    .    .   eoi  eos | boi   .    .    .    .   eoi  q1   a1   q2   a2
        segment_ids       1    1    1    1    1    1    1    1    1  |  2    2    2    2    2    2    2    2    2    2
        branch_ids        0    0    0    0    0    0    0    0    0  |  0    0    0    0    0    0    1    1    2    2
        positions         0    1    2    3    4    5    6    7    8  |  0    1    2    3    4    5    6    7    6    7
        visual_mask       .    .    .    x    x    x    x    .    .  |  .    x    x    x    x    .    .    .    .    .
        visual_index      .    .    .    0    1    2    3    .    .  |  .    4    5    6    7    .    .    .    .    .
        visual_loss_mask  .    .    .    x    x    x    x    .    .  |  .    .    .    .    .    .    .    .    .    .
        text_loss_mask    .    x    x    .    .    .    .    x    x  |  .    .    .    .    .    .    .    x    .    x

    (the end-of-sample token that closes each turn is left out of the drawing)

    With `data.turns=repeated_prefix` the second turn has its own copy of the prefix, as a segment of its own that names
    the same visual tokens and whose prefix has no targets. Attention then follows from segment ids alone:

        tokens           boi   .    .    .    .   eoi  q1   a1 | boi   .    .    .    .   eoi  q2   a2
        segment_ids       2    2    2    2    2    2    2    2 |  3    3    3    3    3    3    3    3
        branch_ids        0    0    0    0    0    0    1    1 |  0    0    0    0    0    0    2    2
        positions         0    1    2    3    4    5    6    7 |  0    1    2    3    4    5    6    7
        visual_index      .    4    5    6    7    .    .    . |  .    4    5    6    7    .    .    .
        text_loss_mask    .    .    .    .    .    .    .    x |  .    .    .    .    .    .    .    x

    Attributes:
        tokens: token ids; at visual positions and padding the pad id.
        positions: rotary positions; those of a branch restart after the shared prefix.
        segment_ids: 0 is padding, samples count from 1.
        branch_ids: 0 is the prefix all turns of a sample share; turn k attends to the prefix and itself.
        source_ids: index of the data source a position came from.
        text_loss_mask: the token here is a supervised target.
        visual_mask: the input here is a visual embedding.
        visual_index: which merged token of the row feeds this position; 0 where `visual_mask` is false.
        visual_loss_mask: the visual embedding here is a target of the visual loss.
        boi_grid: at `<boi>` the (height, width) of the image in merged tokens, 0 elsewhere.
        patches: raw pixel values, block-major: the four patches of a 2x2 block are adjacent, blocks in raster order.
        patch_segment_ids: 0 is padding, images of a row count from 1.
        patch_coords: (y, x) of a patch in its image, in patches.
        patch_grid: (height, width) of the image a patch belongs to, in patches.
        row_hash: 64 bits over the identities of a row's samples and their contents.
    """

    tokens: Int[Array, "B T"]
    positions: Int[Array, "B T"]
    segment_ids: Int[Array, "B T"]
    branch_ids: Int[Array, "B T"]
    source_ids: Int[Array, "B T"]
    text_loss_mask: Bool[Array, "B T"]
    visual_mask: Bool[Array, "B T"]
    visual_index: Int[Array, "B T"]
    visual_loss_mask: Bool[Array, "B T"]
    boi_grid: Int[Array, "B T 2"]
    patches: UInt8[Array, "B P F"]
    patch_segment_ids: Int[Array, "B P"]
    patch_coords: Int[Array, "B P 2"]
    patch_grid: Int[Array, "B P 2"]
    row_hash: UInt[Array, "B 2"]


@pytree_dataclass
class VisionOutput:
    """What the vision path makes of a batch's patches.

    Attributes:
        merged: encoder output with the four patches of a block concatenated (the encoder-side target space).
        visual_embeddings: `z`, the language model's own input embedding of each visual token.
        patch_embeddings: what the encoder's blocks read of the pixels, without positions, concatenated alike.
    """

    merged: Float[Array, "B U 4*E"]
    visual_embeddings: Float[Array, "B U D"]
    patch_embeddings: Float[Array, "B U 4*E"]


@pytree_dataclass
class TargetStatistics:
    """Running mean and standard deviation of the visual targets, per dimension."""

    mean: Float[Array, " Z"]
    deviation: Float[Array, " Z"]


@pytree_dataclass
class Flow:
    """What flow matching compares: velocities at points between data and noise.

    Attributes:
        noisy: `y_tau = (1 - tau) y_0 + tau eps`.
        tau: share of noise.
        velocity: `eps - y_0`.
        mask: which of them are targets.
    """

    noisy: Float[Array, "B S Z"]
    tau: Float[Array, "B S"]
    velocity: Float[Array, "B S Z"]
    mask: Bool[Array, "B S"]


@pytree_dataclass
class ModelOutput:
    """What the losses see.

    Attributes:
        hidden: final normalised hidden states, that text is predicted from.
        visual_hidden: those that images are predicted from: of the visual branch, or the same.
        input_embeddings: `X`, token embeddings with visual embeddings put in place.
        vision: the online vision path's output.
        predicted_embeddings: semantic head's prediction *of the next position* from each position, or None when
            the objective has no visual target.
        unembedding: matrix that turns hidden states into logits.
        target_statistics: by which the targets are standardised (`TargetStatistics`), or None where they are not.
    """

    hidden: Float[Array, "B T D"]
    visual_hidden: Float[Array, "B T D"]
    input_embeddings: Float[Array, "B T D"]
    vision: VisionOutput
    predicted_embeddings: Any
    unembedding: Float[Array, "V D"]
    target_statistics: Any = None


@pytree_dataclass
class Hidden:
    """The hidden state at one position of each row, that text and that images are predicted from; one, or two."""

    text: Float[Array, "B D"]
    visual: Float[Array, "B D"]


NOT_VISUAL = 2**30
"""In `VisualCache.begun`: nothing visual lies in the slot."""


@pytree_dataclass
class VisualCache:
    """What the gated layers of `cross_attention` have read; visible once its image has ended.

    Attributes:
        keys, values: by gated layer, row and slot.
        begun: at a visual slot how many positions that are not visual came before it, else `NOT_VISUAL`.
        ended: how many have come up to now; an image has ended once there are more than at its own slots.
    """

    keys: Float[Array, "L B K G d"]
    values: Float[Array, "L B K G d"]
    begun: Int[Array, "B K"]
    ended: Int[Array, " B"]


@pytree_dataclass
class Cache:
    """Keys and values of what has been read so far; position p of a row lies in slot p.

    Attributes:
        keys, values: by layer, row and slot; the layers of a visual branch follow the decoder's.
        length: slots in use of each row.
        visual: the `VisualCache` of gated layers, or None without such.
    """

    keys: Float[Array, "L B K G d"]
    values: Float[Array, "L B K G d"]
    length: Int[Array, " B"]
    visual: Any = None


@pytree_dataclass
class LossOutput:
    """Sums and counts, never means: they add up over microbatches, devices and steps, and are divided once.

    Attributes:
        loss: scalar to differentiate; already divided by the *global* counts.
        sums, counts: per named term. `sums[k] / counts[k]` is the mean that is logged.
    """

    loss: Float[Array, ""]
    sums: dict[str, Any]
    counts: dict[str, Any]


@pytree_dataclass
class StepMetrics:
    """What a step reports; fetched a step late, so the loop never waits for the device.

    Attributes:
        loss: the total that was differentiated.
        sums, counts: per term.
        gradient_norms: per gradient-isolated group, before clipping.
        finite: whether the update was applied.
        visual_weight: lambda.
        batch_hash: two 32-bit halves, reduced from `Batch.row_hash`.
        consecutive_skips, skipped: counters after the step.
    """

    loss: Any
    sums: dict[str, Any]
    counts: dict[str, Any]
    gradient_norms: dict[str, Any]
    finite: Any
    visual_weight: Any
    batch_hash: Any
    consecutive_skips: Any
    skipped: Any
