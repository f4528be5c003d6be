"""The configuration: nested frozen dataclasses, built once from an experiment's ConfigDict and checked as a whole.

Defaults live in `experiments/base.py`, every field explicit; the classes here have none, so that no value can come from
two places. Past `from_config_dict` no ConfigDict is seen and nothing is read by name with a fallback.
"""

import dataclasses
import hashlib
import json
import typing
from collections.abc import Mapping
from typing import Any, Literal

Objective = Literal[
    "understanding", "understanding_i2t", "semantic_input", "semantic_encoder", "patch", "pixels", "random",
    "pixel_through", "pixel_detached", "generation", "unihetero",
]  # fmt: skip
"""See `objectives.GRADIENT_TABLE`."""
VisualTarget = Literal["input", "encoder", "patch", "pixels", "random"]
"""What the visual loss predicts: the input embedding, the encoder's output, the raw patch embedding, the normalised
pixels, or the output of a frozen random encoder."""
PixelRole = Literal["through", "detached", "renderer"]
"""What the pixel decoder is conditioned on: hidden states, hidden states without gradient, or visual embeddings."""
VISUAL_TARGETS: Mapping[Objective, VisualTarget] = {
    "semantic_input": "input", "generation": "input", "unihetero": "input", "semantic_encoder": "encoder",
    "patch": "patch", "pixels": "pixels", "random": "random",
}  # fmt: skip
"""Of the objectives that have a visual loss."""
PIXEL_ROLES: Mapping[Objective, PixelRole] = {
    "pixel_through": "through", "pixel_detached": "detached", "unihetero": "renderer",
}  # fmt: skip
"""Of the objectives that have a pixel decoder."""
ConnectorKind = Literal["mlp", "resampler", "qformer", "cross_attention"]
"""See `model/connectors.py`."""
Component = Literal["encoder", "projector", "decoder", "visual_branch", "semantic_head", "pixel_decoder"]
Remat = Literal["none", "dots", "full"]
Activation = Literal["gelu_tanh", "gelu", "quick_gelu"]
AttentionBackend = Literal["auto", "dense", "jax_nn", "splash"]
Conditioning = Literal["adaptive_norm", "cross_attention"]
"""How conditions reach the patches that a pixel decoder draws."""
PatchSpace = Literal["pixels", "dct"]
"""See `patch_codec.py`."""
Turns = Literal["branches", "repeated_prefix"]
"""How independent turns of a sample lie in a row: as branches after one prefix, or each with the prefix repeated."""
COMPONENTS: tuple[Component, ...] = typing.get_args(Component)
MERGED_PATCHES = 4
"""Patches per visual token (2x2 merge)."""
MIN_TAU = 0.05
"""Least share of noise that a pixel decoder is trained at: below it, velocities follow from the smallest errors."""


class ConfigError(ValueError):
    """One or more fields are wrong. `faults` lists all of them."""

    def __init__(self, faults: list[str]):
        super().__init__("invalid config:\n" + "\n".join(f"  - {fault}" for fault in faults))
        self.faults = faults


@dataclasses.dataclass(frozen=True)
class EncoderConfig:
    """Visual Encoder: a ViT over patches at native aspect ratio. The defaults are SigLIP 2's; CLIP has other ones.

    Attributes:
        position_grid: side of the learned position table.
        activation: of the feed-forward parts.
        norm_eps: of all layer norms.
        pixel_mean, pixel_std: by channel; it sees pixels in [0, 1] less the mean, over the standard deviation.
        class_token: each image has one more position with a learned embedding, which its patches see (CLIP).
        patch_bias: of the map from a patch to its embedding.
        pre_norm: a layer norm before the first block (CLIP).
    """

    num_layers: int
    dim: int
    num_heads: int
    mlp_dim: int
    patch_size: int
    position_grid: int
    attention: Literal["bidirectional", "causal"]
    remat: Remat
    activation: Activation = "gelu_tanh"
    norm_eps: float = 1e-6
    pixel_mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    pixel_std: tuple[float, ...] = (0.5, 0.5, 0.5)
    class_token: bool = False
    patch_bias: bool = True
    pre_norm: bool = False


@dataclasses.dataclass(frozen=True)
class ProjectorConfig:
    """Semantic Encoder, or connector: from an image's features to as many visual embeddings as it has 2x2 blocks.

    Attributes:
        hidden_dim: units of the MLP after the merge; of a query connector, those of each block's MLP.
        output_rms: where the gain of the norm at its output starts (0: the RMS of the token embeddings at
            initialisation).
        kind: `mlp` (LLaVA); `resampler` (Flamingo's perceiver) and `qformer` (BLIP-2's query transformer): queries of a
            fixed order, which see the whole image; `cross_attention` (Flamingo): the MLP, and gated layers by which
            the language model looks at images that it does not hold as inputs.
        num_layers: blocks of a query connector.
        num_heads: of a query connector, whose width is the encoder's. Gated layers have the decoder's heads.
    """

    hidden_dim: int
    output_rms: float
    kind: ConnectorKind = "mlp"
    num_layers: int = 2
    num_heads: int = 4


@dataclasses.dataclass(frozen=True)
class RopeScalingConfig:
    """How rotary frequencies are changed for positions beyond those of pretraining; `kind` none: they are not.

    Attributes:
        kind: `linear` (positions over `factor`), `llama3`, or `yarn` (arXiv 2309.00071).
        factor: how many times further positions reach.
        original_positions: length of pretraining (llama3, yarn).
        low, high: of llama3, its low and high frequency factors; of yarn, beta_slow and beta_fast.
        attention_factor: what yarn multiplies cosine and sine by.
        truncate: yarn rounds the bounds of its ramp to whole dimensions.
    """

    kind: Literal["none", "linear", "llama3", "yarn"] = "none"
    factor: float = 1.0
    original_positions: int = 0
    low: float = 1.0
    high: float = 4.0
    attention_factor: float = 1.0
    truncate: bool = True


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """Shared Decoder: a causal transformer. Fields cover Qwen2, Qwen3 and Llama.

    `max_grid` bounds an image's side in visual tokens.
    """

    num_layers: int
    dim: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    mlp_dim: int
    vocab_size: int
    rope_theta: float
    norm_eps: float
    qk_norm: bool
    qkv_bias: bool
    tied_embeddings: bool
    max_grid: int
    remat: Remat
    rope_scaling: RopeScalingConfig = RopeScalingConfig()


@dataclasses.dataclass(frozen=True)
class VisualBranchConfig:
    """The decoder's upper layers once more, for visual prediction alone (arXiv 2608.12209, where the split is at half).

    They start as a copy and are trained by the visual loss only, the decoder's own by the text loss only; below the
    split both reach what is shared, unless `loss.cut_branch_gradient`. Text alone never runs them.

    Attributes:
        split_layer: layers that are shared; 0: no branch.
    """

    split_layer: int = 0


@dataclasses.dataclass(frozen=True)
class SemanticHeadConfig:
    """Generation Head: an MLP of one hidden layer from a hidden state to the next embedding.

    Attributes:
        hidden_dim: of the regression head. A flow head has as many weights, so fewer hidden units.
        kind: `regression`, or `flow`: it draws the embedding from noise by flow matching, given the hidden state
            (as MAR's diffusion loss, arXiv 2406.11838).
        flow_steps: Euler steps of a draw.
        standardise_targets: targets are standardised per dimension by running statistics, so that targets of different
            spaces weigh their dimensions alike.
        statistics_decay: of those statistics.
    """

    hidden_dim: int
    kind: Literal["regression", "flow"] = "regression"
    flow_steps: int = 16
    standardise_targets: bool = False
    statistics_decay: float = 0.99


@dataclasses.dataclass(frozen=True)
class PixelDecoderConfig:
    """Pixel decoder: a flow-matching transformer over patches, given one condition for each visual token.

    Attributes:
        num_layers, dim, num_heads, mlp_dim: of its blocks.
        condition_dropout: share of images whose condition is left out, for classifier-free guidance (arXiv 2207.12598).
        condition_noise: of the renderer: noise on the embeddings, up to this many times their RMS, another amount for
            each image; it has to draw from rolled-out embeddings, which are not exact.
        predicted_share: of the renderer: share of drawn images whose condition is what the Generation Head predicts of
            them under teacher forcing, in place of the true embeddings (regression heads).
        conditioning: `adaptive_norm`: a token's condition shifts, scales and gates its own four patches (DiT,
            arXiv 2212.09748); `cross_attention`: every patch attends to all tokens of its image (of its block, as an
            objective), and norms follow the time alone.
        rollout_passes: of the renderer: forward passes in which drawn images are read as the Generation Head predicted
            them, before `predicted_share` takes its predictions: after n passes the first n + 1 embeddings of an image
            are those of a free rollout. 0: teacher forcing.
        space: what is drawn of a patch, see `patch_codec.py`: its `pixels`, or the lower half of its waves in
            each direction (`dct`), a quarter of the values.
    """

    num_layers: int = 4
    dim: int = 128
    num_heads: int = 4
    mlp_dim: int = 512
    condition_dropout: float = 0.1
    condition_noise: float = 0.2
    predicted_share: float = 0.25
    conditioning: Conditioning = "adaptive_norm"
    rollout_passes: int = 0
    space: PatchSpace = "pixels"


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The architecture. `compute_dtype` is that of activations; parameters and losses are always float32.

    `attention_backend` computes attention over whole rows: with a dense mask (`dense`, `jax_nn`), or by a kernel that
    needs none and skips what segments leave empty (`splash`). `auto`: by the platform of the devices that the step is
    compiled for, splash on TPU, jax_nn on GPU, else dense. It has a default since it came after 0.1.0.
    """

    encoder: EncoderConfig
    projector: ProjectorConfig
    decoder: DecoderConfig
    semantic_head: SemanticHeadConfig
    compute_dtype: Literal["float32", "bfloat16"]
    attention_backend: AttentionBackend = "auto"
    pixel_decoder: PixelDecoderConfig = PixelDecoderConfig()
    visual_branch: VisualBranchConfig = VisualBranchConfig()


@dataclasses.dataclass(frozen=True)
class LossConfig:
    """How the objective's terms are computed and weighted.

    The default of `experiments/base.py`, online targets with `cut_input_gradient`, is what the measurements favour for
    an encoder from scratch (docs/generation.md, three seeds each): as good as `ema` or better, at no cost, and tokens
    stay apart where text is scarce, where neither the average nor a plain stop-gradient keeps them so. A trained
    encoder that is frozen does best of all and needs neither.

    Attributes:
        visual_weight: lambda after the ramp.
        visual_weight_start: lambda at step 0 (arXiv 2608.12209 ramps 0.015 to 1.0).
        visual_ramp_steps: length of the linear ramp.
        visual_loss: distance between predicted and target embedding.
        target_norm: normalisation of the target before the distance (under l2 of the prediction too).
        target: `ema` takes targets from a moving average of encoder and projector, `stop_gradient` from the online
            ones.
        ema_decay: decay of that average; fit it to the run's length (.99 for a thousand steps, .999 for long runs).
        cut_input_gradient: stops every loss's gradient at the visual *inputs* of samples with an image that carries the
            visual loss; encoder and projector then learn from the text of the other samples.
        cut_branch_gradient: with a visual branch, stops the gradient of what it predicts at the split.
        visual_loss_on: images that come after text (`generated`), or all.
        target_shift: 1: the next position's target is predicted; 0: the position's own, which is supervision without
            generation (a control).
        target_shuffled: targets are those of another image of the batch (a control).
        pixel_weight: mu, of the pixel decoder's loss.
        pixel_ema_decay: decay of the average of the pixel decoder's parameters, which draws in its place (as diffusion
            models do since arXiv 2006.11239); 0 for none.
        text_chunk: supervised positions of a device's rows whose logits exist at one time; bounds their memory.
    """

    visual_weight: float
    visual_weight_start: float
    visual_ramp_steps: int
    visual_loss: Literal["cosine", "mse", "smooth_l1"]
    target_norm: Literal["none", "l2", "layer_norm"]
    target: Literal["ema", "stop_gradient"]
    ema_decay: float
    cut_input_gradient: bool
    visual_loss_on: Literal["generated", "all"]
    text_chunk: int
    target_shift: int = 1
    target_shuffled: bool = False
    pixel_weight: float = 1.0
    pixel_ema_decay: float = 0.0
    cut_branch_gradient: bool = False


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW with a schedule. `frozen` components get no update; `*_lr` multiply the learning rate of a component.

    `frozen_encoder_layers` keeps the encoder's patches, positions and so many of its layers as they are; they still
    cost what trained ones do.
    """

    learning_rate: float
    schedule: Literal["cosine", "warmup_stable_decay"]
    warmup_steps: int
    final_lr_ratio: float
    decay_fraction: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    clip_norm: float
    encoder_lr: float
    projector_lr: float
    decoder_lr: float
    semantic_head_lr: float
    frozen: tuple[Component, ...]
    pixel_decoder_lr: float = 1.0
    visual_branch_lr: float = 1.0
    frozen_encoder_layers: int = 0


@dataclasses.dataclass(frozen=True)
class InitFromConfig:
    """Start `components` from the checkpoint of another run. `workdir` empty: off. `step` -1: its newest step.

    `language_model` and `vision_encoder` (empty: none) are pretrained models of Hugging Face that decoder and encoder
    start from: folders, or `owner/name@revision` of the hub.
    """

    workdir: str
    step: int
    components: tuple[Component, ...]
    language_model: str = ""
    vision_encoder: str = ""


@dataclasses.dataclass(frozen=True)
class SourceConfig:
    """One member of the mixture.

    Attributes:
        path: prepared folder.
        weight: its share of the drawn samples is proportional to this.
        augment: augmentation of its images.
        weight_schedule: (progress, factor) pairs: the weight is multiplied by the factor, linear in the share of
            `data.planned_draws` drawn. Empty: constant. So a curriculum is data, not code.
        max_epochs: it is drawn at most so many times its size; 0: without limit.
        max_records: only the first so many of its training records, of which the preparation has made a random choice;
            0: all. How much there is of other data is then what varies.
        order: of a record that is one image and one text: as stored, image or text first, or by a coin for each draw.
        text_first_share: of a coin's draws.
        text_loss: `stored`: text is supervised where its record says so; `none`: read only.
        visual_loss: images that may carry the visual loss; `inherit`: as `loss.visual_loss_on`.
    """

    path: str
    weight: float
    augment: Literal["none", "mirror_shift", "nlvr"]
    weight_schedule: tuple[tuple[float, ...], ...] = ()
    max_epochs: float = 0.0
    max_records: int = 0
    order: Literal["stored", "image_first", "text_first", "coin"] = "stored"
    text_first_share: float = 0.5
    text_loss: Literal["stored", "none"] = "stored"
    visual_loss: Literal["inherit", "generated", "all", "none"] = "inherit"


@dataclasses.dataclass(frozen=True)
class SceneWorldConfig:
    """The embedded scene world: generated into `path` when missing, from `seed`. `level` none: not used.

    It has so many benchmark questions of each kind, and `with_objects` a source that tells what is where.
    """

    level: Literal["none", "easy", "hard"]
    path: str
    num_scenes: int
    seed: int = 0
    items_per_kind: int = 200
    with_objects: bool = False


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """The training stream; a pure function of these fields.

    What has a default here came after 0.1.0: the configuration of an older run lacks it, and can be read all the same.

    Attributes:
        sources: by name; random order is seeded by the name, so adding one moves no other.
        seed: of the data order, apart from the model's `seed`.
        tokenizer: folder with a `tokenizer.json`.
        row_tokens: token positions T of a row.
        row_patches: image patches P of a row.
        image_min_patches, image_max_patches: bounds of an image's patches.
        num_data_shards: virtual shards S; a constant of the experiment, independent of hosts and devices.
        window_size: draws that are planned together.
        num_threads: threads that read and decode rows (no part of the stream).
        prefetch_batches: batches prepared ahead (no part of the stream).
        max_failed_share: share of a source's samples that may fail to read or decode before the run stops.
        turns: independent turns of a sample are branches over one prefix, or each repeats the prefix as a segment of
            its own, which a kernel that knows segments alone needs; it takes more positions, and an index of its own.
        planned_draws: draws at which a `weight_schedule` has run its course; 0 where no source has one.
        verify_digests: compare each shard file's content with its digest when it is read first; else sizes alone.
        cache_dir: where record files of a bucket are copied to; empty: the system's temporary folder.
        cache_gib: bound on those copies, of each process (no part of the stream).
    """

    sources: Mapping[str, SourceConfig]
    seed: int
    tokenizer: str
    row_tokens: int
    row_patches: int
    image_min_patches: int
    image_max_patches: int
    num_data_shards: int
    window_size: int
    num_threads: int
    prefetch_batches: int
    max_failed_share: float
    turns: Turns = "branches"
    planned_draws: int = 0
    verify_digests: bool = True
    cache_dir: str = ""
    cache_gib: float = 20.0


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """The loop. Intervals longer than the run mean at its end.

    `num_replicates` models with seeds seed, seed + 1, ... share one step. A process in which no step is finished for
    `step_deadline_s` seconds (0: without limit) prints what it waits for and ends; validation and saving included.
    """

    num_steps: int
    global_batch_rows: int
    accumulation_steps: int
    log_every_steps: int
    eval_every_steps: int
    num_replicates: int
    max_consecutive_skips: int
    step_deadline_s: float = 0.0


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """Saving and keeping: the newest `keep_last`, and every step divisible by `keep_every_steps` (0: none).

    `verify_digests` reads every byte of a step before a run goes on from it; without, the sizes of its files must do.
    """

    every_steps: int
    keep_last: int
    keep_every_steps: int
    verify_digests: bool = True


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices along each mesh axis; their product is the number of devices used.

    Attributes:
        data: rows, parameters repeated.
        fsdp: rows and parameters.
        tensor: heads, hidden units and vocabulary.
        context: positions of the language model's rows; the encoder is repeated.
        num_slices: `data` runs over so many slices first, which a slower network joins.
    """

    data: int
    fsdp: int
    tensor: int
    context: int
    num_slices: int = 1


@dataclasses.dataclass(frozen=True)
class EvalConfig:
    """Benchmarks that run at the end of training and by default in `evaluate`: by name, the file of questions.

    They also run after every `every_steps` steps (0: only at the end), within `train.step_deadline_s`; what takes
    longer belongs beside the run (`evaluate --watch`). `caption_prompt` asks for a caption where a benchmark has no
    question.

    `without_image` also asks without the picture at the end of training: what the model knows blind.

    `chat_template` asks as the tokenizer's chat template has it, for models that were trained to answer so (a run of
    `train` reads its records as they are, without one).

    `batch_rows` rows are scored at once; `shard_items` items are a part of a job, which a kill cannot take away once it
    is written; `validation_rows` bounds the fixed validation plan per source (0: every item).
    `rollout_source` (empty: none) names the source whose unseen captions are rolled out, to be found among
    `rollout_candidates` images. `rollout_judge` (empty: none), another run, has the cumulative error of those rollouts
    measured in its space at the end of training, which takes as many images again.
    """

    benchmarks: Mapping[str, str]
    batch_rows: int
    validation_rows: int
    rollout_source: str
    rollout_candidates: int
    shard_items: int = 512
    every_steps: int = 0
    caption_prompt: str = "Describe the image."
    chat_template: bool = False
    without_image: bool = False
    rollout_judge: str = ""


@dataclasses.dataclass(frozen=True)
class DrawingConfig:
    """How the pixel decoder draws: steps of the flow from noise, by whom, and the scale of classifier-free guidance."""

    sampler: Literal["euler", "heun"] = "heun"
    steps: int = 20
    guidance: float = 1.0


@dataclasses.dataclass(frozen=True)
class DiagnosticsConfig:
    """Thresholds of the collapse alarms: within-image spread of z (warn, alarm), spread across images at equal places,
    copy-previous distance, rollout retrieval.

    Every run begins with a small spread across images: that alarm is silent for `across_spread_grace_steps`.
    """

    within_spread_warn: float
    within_spread_alarm: float
    copy_distance_alarm: float
    retrieval_alarm: float
    across_spread_alarm: float = 0.10
    across_spread_grace_steps: int = 500


@dataclasses.dataclass(frozen=True)
class Config:
    """A whole experiment."""

    objective: Objective
    seed: int
    model: ModelConfig
    loss: LossConfig
    optimizer: OptimizerConfig
    init_from: InitFromConfig
    scene_world: SceneWorldConfig
    data: DataConfig
    train: TrainConfig
    checkpoint: CheckpointConfig
    mesh: MeshConfig
    eval: EvalConfig
    diagnostics: DiagnosticsConfig
    drawing: DrawingConfig = DrawingConfig()

    def __hash__(self) -> int:
        """Of the values: mappings have no hash, and compiled functions are cached by configuration."""
        return hash(config_hash(self))


def to_dict(config: Any) -> dict[str, Any]:
    """The configuration as plain JSON-ready values; `from_config_dict` reads it back."""
    return json.loads(json.dumps(_plain(config)))


def config_hash(config: Config) -> str:
    """12 hex digits that identify the resolved configuration."""
    text = json.dumps(to_dict(config), sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=6).hexdigest()


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {k: _plain(v) for k, v in value.items()}
    return list(value) if isinstance(value, tuple) else value


def visual_target(objective: Objective) -> VisualTarget | None:
    """What the objective's visual loss predicts; None without one."""
    return VISUAL_TARGETS.get(objective)


def has_queries(model: ModelConfig) -> bool:
    """Whether the connector's tokens are those of queries, which see the whole image, not of blocks."""
    return model.projector.kind in ("resampler", "qformer")


def has_cross_attention(model: ModelConfig) -> bool:
    """Whether the language model looks at images through gated layers."""
    return model.projector.kind == "cross_attention"


def rolls_out(config: Config) -> bool:
    """Whether what the objective predicts can be fed back as an input. Normalised pixels have lost their mean and
    deviation, from a random encoder's features there is no way back, and what was drawn of an image has no tokens of
    queries, which ask for the whole.
    """
    objective = config.objective
    if pixel_role(objective) in ("through", "detached"):
        return not has_queries(config.model)
    return visual_target(objective) in ("input", "encoder", "patch")


def target_dim(model: ModelConfig, objective: Objective) -> int:
    """Width of the space that the Generation Head predicts in; 0 without a visual target."""
    match visual_target(objective):
        case None:
            return 0
        case "input":
            return model.decoder.dim
        case "encoder" | "patch" | "random":
            return MERGED_PATCHES * model.encoder.dim
        case "pixels":
            return MERGED_PATCHES * patch_values(model.encoder)


def head_widths(config: SemanticHeadConfig, dim: int, target_dim: int) -> tuple[int, int]:
    """Width of the Generation Head's input and of its hidden layer: heads of both kinds have equally many weights."""
    if config.kind == "regression":
        return dim, config.hidden_dim
    in_dim = dim + target_dim + 1
    return in_dim, max(round(config.hidden_dim * (dim + target_dim) / (in_dim + target_dim)), 1)


def patch_values(encoder: EncoderConfig) -> int:
    """Values of a patch: its pixels in three channels."""
    return 3 * encoder.patch_size**2


def drawn_values(model: ModelConfig) -> int:
    """Values of a patch as the pixel decoder draws it."""
    match model.pixel_decoder.space:
        case "pixels":
            return patch_values(model.encoder)
        case "dct":
            return 3 * (model.encoder.patch_size // 2) ** 2


def pixel_role(objective: Objective) -> PixelRole | None:
    """What the objective's pixel decoder is for; None without one."""
    return PIXEL_ROLES.get(objective)


def num_branch_layers(model: ModelConfig, objective: Objective) -> int:
    """Layers of the visual branch; 0 without one, or where nothing visual is predicted."""
    split = model.visual_branch.split_layer
    predicts = visual_target(objective) is not None or pixel_role(objective) is not None
    return model.decoder.num_layers - split if split and predicts else 0


def components_of(model: ModelConfig, objective: Objective) -> tuple[Component, ...]:
    """The components that a model of this objective has."""
    components: list[Component] = ["encoder", "projector", "decoder"]
    if num_branch_layers(model, objective):
        components.append("visual_branch")
    if visual_target(objective):
        components.append("semantic_head")
    if pixel_role(objective):
        components.append("pixel_decoder")
    return tuple(components)


def visual_loss_of(config: Config, source: str) -> Literal["generated", "all", "none"]:
    """Which images of a source may carry the visual loss."""
    own = config.data.sources[source].visual_loss
    return config.loss.visual_loss_on if own == "inherit" else own
