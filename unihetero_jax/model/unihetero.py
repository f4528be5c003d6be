r"""UniHetero: the assembly. This is the file to read.

    patches --Visual Encoder--> e --merge 2x2, Semantic Encoder--> z  (the LLM's own input embedding)
    tokens  --embedding-------> \
                                 X = tokens and z in reading order --Shared Decoder--> H
    H[t] --Understanding Head--> next text token          H[t] --Generation Head--> zhat[t+1], the next visual embedding

Names of the paper (arXiv 2512.23512) and ours: Visual Encoder = `VisionEncoder`; Semantic Encoder = `Projector`; Shared
Decoder = `Decoder`; Generation Head = `SemanticHead`; Understanding Head = the decoder's unembedding.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from unihetero_jax.arrays import (
    NOT_VISUAL,
    Batch,
    Cache,
    Flow,
    Hidden,
    ModelOutput,
    VisionOutput,
    VisualCache,
    typechecked,
)
from unihetero_jax.config import (
    MERGED_PATCHES,
    ModelConfig,
    Objective,
    drawn_values,
    num_branch_layers,
    pixel_role,
    target_dim,
    visual_target,
)
from unihetero_jax.model.attention import RowAttention, decoder_attention, encoder_attention
from unihetero_jax.model.connectors import CachedCrossReader, CrossReader, complete_image_mask
from unihetero_jax.model.decoder import Decoder, VisualBranch
from unihetero_jax.model.layers import ParamKeys
from unihetero_jax.model.pixel_decoder import PixelDecoder
from unihetero_jax.model.semantic_encoder import Projector, token_embedding_rms
from unihetero_jax.model.semantic_head import SemanticHead
from unihetero_jax.model.vision_encoder import VisionEncoder, merge_patches, patch_places, with_class_tokens
from unihetero_jax.sharding import constrain

Params = dict[str, Any]
"""Parameters by component, then by path: plain nested dicts of arrays."""


class UniHetero(nnx.Module):
    """One causal transformer over text tokens and visual embeddings.

    Generation Head and pixel decoder exist only for objectives that have a use for them; the other components start
    from the same values whatever the objective.
    """

    def __init__(self, config: ModelConfig, objective: Objective, keys: ParamKeys):
        self.config = config
        self.objective: Objective = objective
        self.encoder = VisionEncoder(config.encoder, keys.child("encoder"))
        self.projector = Projector(config, keys.child("projector"))
        self.decoder = Decoder(config.decoder, token_embedding_rms(config), keys.child("decoder"))
        split = config.visual_branch.split_layer if num_branch_layers(config, objective) else 0
        # It has the decoder's own keys, so it starts as the copy of its upper layers.
        self.visual_branch = VisualBranch(config.decoder, split, keys.child("decoder")) if split else None
        self.has_head = visual_target(objective) is not None
        if self.has_head:
            width = target_dim(config, objective)
            self.semantic_head = SemanticHead(
                config.semantic_head, config.decoder.dim, width, keys.child("semantic_head")
            )
        if pixel_role(objective):
            self.pixel_decoder = PixelDecoder(
                config.pixel_decoder, drawn_values(config), config.decoder.dim, keys.child("pixel_decoder")
            )

    @typechecked
    def __call__(
        self,
        batch: Batch,
        cut_input_gradient: bool = False,
        cut_branch_gradient: bool = False,
        visual_embeddings: Float[Array, "B U D"] | None = None,
    ) -> ModelOutput:
        """Reads whole packed rows.

        Args:
            batch: packed rows.
            cut_input_gradient: stop the gradient at the visual *inputs* of samples with an image that carries the
                visual loss, so that the loss cannot be lowered by making its own inputs easy to predict from.
            cut_branch_gradient: stop the gradient where the visual branch begins.
            visual_embeddings: stand in place of what the vision path makes of the images.
        """
        vision = self.see(batch)
        if visual_embeddings is not None:
            vision = dataclasses.replace(vision, visual_embeddings=visual_embeddings)
        read = self._cut(batch, vision) if cut_input_gradient else vision
        x = constrain(self.embed(batch, read), "batch", "sequence", "replicated")
        attention = decoder_attention(self.config.attention_backend, batch.segment_ids, batch.branch_ids)
        if self.visual_branch is None:
            cross = self._cross_reader(batch, read)
            hidden = self.decoder(x, batch.positions, attention, cross)
            hidden = visual = constrain(hidden, "batch", "sequence", "replicated")
        else:
            split = self.visual_branch.split
            shared = self.decoder.below(x, split, batch.positions, attention)
            hidden = self.decoder.above(shared, split, batch.positions, attention)
            shared = jax.lax.stop_gradient(shared) if cut_branch_gradient else shared
            visual = self.visual_branch(shared, batch.positions, attention)
            hidden, visual = (constrain(one, "batch", "sequence", "replicated") for one in (hidden, visual))
        predicted = statistics = None
        if self.has_head:
            statistics = self.semantic_head.statistics
            predicted = self.semantic_head(visual) if self.config.semantic_head.kind == "regression" else None
        return ModelOutput(hidden, visual, x, vision, predicted, self.decoder.unembedding, statistics)

    @typechecked
    def pixel_velocity(
        self,
        patch_segment_ids: Int[Array, "B P"],
        patch_coords: Int[Array, "B P 2"],
        flow: Flow,
        condition: Float[Array, "B U D"],
        is_conditioned: Bool[Array, "B U"],
    ) -> Float[Array, "B P Y"]:
        """What the pixel decoder predicts at noisy patches. As renderer it sees a whole image, else one block."""
        segments = patch_segment_ids
        if pixel_role(self.objective) != "renderer":
            blocks = jnp.arange(segments.shape[1], dtype=segments.dtype) // MERGED_PATCHES + 1
            segments = jnp.where(segments > 0, blocks, 0)
        longest = MERGED_PATCHES * self.config.decoder.max_grid
        attention = encoder_attention(self.config.attention_backend, segments, False, longest)
        noisy = constrain(flow.noisy.astype(self.dtype), "batch", "replicated", "replicated")
        return self.pixel_decoder(noisy, flow.tau, condition, is_conditioned, patch_coords, segments, attention)

    @typechecked
    def see(self, batch: Batch) -> VisionOutput:
        """The vision path alone: Visual Encoder, merge, Semantic Encoder."""
        attention = self._vision_attention(batch.patch_segment_ids)
        features = self.encoder(batch.patches, batch.patch_coords, batch.patch_grid, attention, self.dtype)
        merged = merge_patches(constrain(features, "batch", "replicated", "replicated"))
        patch_embeddings = merge_patches(self.encoder.embed_patches(batch.patches, self.dtype))
        return VisionOutput(merged, self.project(merged, batch), patch_embeddings)

    @typechecked
    def project(self, merged: Float[Array, "B U M"], batch: Batch) -> Float[Array, "B U D"]:
        """The Semantic Encoder alone, on the batch's merged features."""
        return self.projector(merged, batch.patch_segment_ids, batch.patch_coords)

    def _cut(self, batch: Batch, vision: VisionOutput) -> VisionOutput:
        """As it is read where the gradient stops at the images of samples that carry the visual loss."""
        embeddings = vision.visual_embeddings
        is_cut = _of_samples_with_visual_loss(batch, embeddings.shape[1])[..., None]
        return dataclasses.replace(
            vision, visual_embeddings=jnp.where(is_cut, jax.lax.stop_gradient(embeddings), embeddings)
        )

    def _cross_reader(self, batch: Batch, vision: VisionOutput) -> CrossReader | None:
        if self.projector.gated is None:
            return None
        mask = complete_image_mask(batch.segment_ids, batch.branch_ids, batch.visual_mask)
        return CrossReader(self.projector.gated, vision.visual_embeddings, batch.visual_index, mask)

    def _vision_attention(self, segments: jax.Array) -> RowAttention:
        # A strip one visual token high is the longest image that the grid table allows.
        max_patches = MERGED_PATCHES * self.config.decoder.max_grid
        causal = self.config.encoder.attention == "causal"
        if self.config.encoder.class_token:
            segments, max_patches = with_class_tokens(segments), None
        return encoder_attention(self.config.attention_backend, segments, causal, max_patches)

    @typechecked
    def read_blocks(
        self, patch_embeddings: Float[Array, "B U M"], grid: Int[Array, "B 2"], num_seen: Int[Array, ""]
    ) -> Float[Array, "B U D"]:
        """Input embeddings of one image per row whose first blocks alone are there yet.

        Args:
            patch_embeddings: the four patch embeddings of every block, as in `VisionOutput`.
            grid: (height, width) in visual tokens, whose product is U.
            num_seen: how many blocks are there; no patch attends to those that are not.
        """
        num_rows, num_tokens, _ = patch_embeddings.shape
        embedded = patch_embeddings.reshape(num_rows, num_tokens * MERGED_PATCHES, -1)
        is_there = jnp.arange(num_tokens * MERGED_PATCHES) < num_seen * MERGED_PATCHES
        segments = jnp.broadcast_to(is_there.astype(jnp.int32), embedded.shape[:2])
        places = patch_places(grid, num_tokens)
        sizes = jnp.broadcast_to(2 * grid[:, None], places.shape)
        features = self.encoder.features(embedded, places, sizes, self._vision_attention(segments))
        return self.projector.of_blocks(merge_patches(features))

    @typechecked
    def embed(self, batch: Batch, vision: VisionOutput) -> Float[Array, "B T D"]:
        """`X`: token embeddings, with visual embeddings at visual positions.

        With gated layers only those of images that carry the visual loss: an image that is read leaves the embedding of
        the padding token in its places, the same in all of them (our choice, so that rows are laid out alike).
        """
        tokens = self.decoder.embed(batch.tokens, batch.boi_grid, self.dtype)
        embeddings = vision.visual_embeddings
        visual = jnp.take_along_axis(embeddings, batch.visual_index[..., None], axis=1)
        is_input = batch.visual_mask
        if self.projector.gated is not None:
            is_input &= jnp.take_along_axis(_with_visual_loss(batch, embeddings.shape[1]), batch.visual_index, axis=1)
        return jnp.where(is_input[..., None], visual, tokens)

    @typechecked
    def prefill(self, batch: Batch, num_slots: int) -> tuple[Hidden, Cache]:
        """Reads one sample per row, padded at its end: the hidden state there, and a cache of `num_slots` positions."""
        decoder = self.config.decoder
        num_rows = batch.tokens.shape[0]
        num_layers = decoder.num_layers + num_branch_layers(self.config, self.objective)
        shape = (num_layers, num_rows, num_slots, decoder.num_kv_heads, decoder.head_dim)
        length = jnp.sum(batch.segment_ids > 0, axis=1, dtype=jnp.int32)
        keys, values = (
            constrain(jnp.zeros(shape, self.dtype), "layers", "batch", "replicated", "heads", "replicated")
            for _ in range(2)
        )
        seen = None
        if self.projector.gated is not None:
            none_begun = jnp.full((num_rows, num_slots), NOT_VISUAL, jnp.int32)
            seen = VisualCache(keys, values, none_begun, jnp.zeros_like(length))
        vision = self.see(batch)
        positions = jnp.broadcast_to(jnp.arange(batch.tokens.shape[1], dtype=jnp.int32), batch.tokens.shape)
        read = jnp.take_along_axis(vision.visual_embeddings, batch.visual_index[..., None], axis=1)
        cache = Cache(keys, values, jnp.zeros_like(length), seen)
        return self._cached(self.embed(batch, vision), read, positions, batch.visual_mask, length, cache)

    def _cached(
        self,
        x: jax.Array,
        read: jax.Array,
        positions: jax.Array,
        visual_mask: jax.Array,
        num_new: jax.Array,
        cache: Cache,
    ) -> tuple[Hidden, Cache]:
        """Reads new positions, of which `num_new` of each row are no padding; gated layers look at `read`, not `x`."""
        mask = jnp.arange(cache.keys.shape[2]) <= positions[..., None]
        length = cache.length + num_new
        if self.visual_branch is not None:
            text, visual, slots = self.decoder.cached_with_branch(self.visual_branch, x, positions, mask, cache)
            cache = Cache(*slots, length)
        else:
            cross = None
            if self.projector.gated is not None:
                cross = CachedCrossReader(self.projector.gated, read, positions, visual_mask, cache.visual)
            text, slots, seen = self.decoder.cached(x, positions, mask, cache, cross)
            cache = Cache(*slots, length, None if cross is None else cross.cache_with(seen, num_new))
            visual = text
        text, visual = (jnp.take_along_axis(x, num_new[:, None, None] - 1, axis=1)[:, 0] for x in (text, visual))
        return Hidden(text, visual), cache

    @typechecked
    def decode_step(
        self, embedding: Float[Array, "B D"], cache: Cache, is_visual: bool = False
    ) -> tuple[Hidden, Cache]:
        """Reads one more input embedding per row, of a token or of an image; returns the hidden state there."""
        x, positions = embedding[:, None], cache.length[:, None]
        return self._cached(x, x, positions, jnp.full(positions.shape, is_visual), jnp.ones_like(cache.length), cache)

    @typechecked
    def predict_embedding(self, hidden: Float[Array, "*batch D"], key: PRNGKeyArray) -> Float[Array, "*batch D"]:
        """The input embedding that the Generation Head expects next, ready to be fed back in a rollout.

        Either space gets its scale back, which a cosine loss leaves open; a prediction in encoder space then goes
        through the Semantic Encoder. A flow head draws it, by `key`.
        """
        predicted = self.semantic_head.draw(hidden, key)
        if visual_target(self.objective) == "encoder":
            return self.projector.of_blocks(self.encoder.rescale_merged(predicted))
        return self.projector.rescale(predicted)

    @typechecked
    def reread_predictions(self, batch: Batch, output: ModelOutput, num_passes: int) -> Float[Array, "B T D"]:
        """The input embedding expected next at every position, when drawn images are read as they are expected.

        Images that carry the visual loss are fed what the passes before predicted of them, all positions of a row at
        once (Jacobi iteration; our choice: it needs no cache and takes packed rows as they are). Every pass makes one
        embedding more exact: after n the first n + 1 of a sample's drawn image are those of a free rollout (of several
        such images, the first n + 1 of all of them).

        Args:
            batch: packed rows.
            output: of them, true images in place.
            num_passes: n; 0 predicts from true images (teacher forcing).
        """
        attention = decoder_attention(self.config.attention_backend, batch.segment_ids, batch.branch_ids)
        no_noise = jax.random.key(0)  # a regression head takes none

        def read_again(_: jax.Array, predicted: jax.Array) -> jax.Array:
            fed = jnp.roll(predicted, 1, axis=1).astype(self.dtype)
            x = jnp.where(batch.visual_loss_mask[..., None], fed, output.input_embeddings)
            x = constrain(x, "batch", "sequence", "replicated")
            if self.visual_branch is None:
                visual = self.decoder(x, batch.positions, attention)
            else:
                shared = self.decoder.below(x, self.visual_branch.split, batch.positions, attention)
                visual = self.visual_branch(shared, batch.positions, attention)
            return self.predict_embedding(constrain(visual, "batch", "sequence", "replicated"), no_noise)

        first = self.predict_embedding(output.visual_hidden, no_noise)
        return jax.lax.fori_loop(0, num_passes, read_again, first) if num_passes else first

    @property
    def dtype(self) -> jnp.dtype:
        return jnp.dtype(self.config.compute_dtype)


def _of_samples_with_visual_loss(batch: Batch, num_visual: int) -> jax.Array:
    """Which visual tokens belong to a sample with an image that carries the visual loss, bool[B, U].

    By token, not by position: where turns repeat their prefix, only its first copy carries the loss.
    """
    num_rows, length = batch.segment_ids.shape
    rows = jnp.arange(num_rows)[:, None]
    has_loss = jnp.zeros((num_rows, length + 1), bool).at[rows, batch.segment_ids].max(batch.visual_loss_mask)
    is_cut = jnp.take_along_axis(has_loss, batch.segment_ids, axis=1) & batch.visual_mask
    return jnp.zeros((num_rows, num_visual), bool).at[rows, batch.visual_index].max(is_cut)


def _with_visual_loss(batch: Batch, num_visual: int) -> jax.Array:
    """Which visual tokens are of an image that carries the visual loss, bool[B, U]."""
    num_rows = batch.segment_ids.shape[0]
    none = jnp.zeros((num_rows, num_visual), bool)
    return none.at[jnp.arange(num_rows)[:, None], batch.visual_index].max(batch.visual_loss_mask)


def abstract_model(config: ModelConfig, objective: Objective) -> tuple[nnx.GraphDef, nnx.State]:
    """The model's structure and the shapes of its parameters; allocates nothing."""
    return nnx.split(nnx.eval_shape(lambda: UniHetero(config, objective, ParamKeys(jax.random.key(0)))))


def init_params(config: ModelConfig, objective: Objective, seed: jax.Array | int) -> Params:
    """Fresh parameters, each from the seed and its own path. Traceable, so that they can be born sharded."""
    model = UniHetero(config, objective, ParamKeys(jax.random.key(seed)))
    return nnx.to_pure_dict(nnx.split(model)[1])


def logical_axes(config: ModelConfig, objective: Objective) -> Params:
    """The logical axis names of every parameter, in the parameters' structure. Stacked layers lead with `layers`."""
    _, state = abstract_model(config, objective)

    def axes(param: nnx.Param) -> tuple[str, ...]:
        names = param.get_metadata()["logical_axes"]
        return ("layers",) * (len(param.shape) - len(names)) + names

    tree = jax.tree.map(axes, state, is_leaf=lambda x: isinstance(x, nnx.Variable))
    return nnx.to_pure_dict(tree)


def build(config: ModelConfig, objective: Objective, params: Params) -> UniHetero:
    """A model over these parameters."""
    graphdef, state = abstract_model(config, objective)
    nnx.replace_by_pure_dict(state, params)
    return nnx.merge(graphdef, state)
