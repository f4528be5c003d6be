"""The configuration: nested frozen dataclasses, built once from an experiment's ConfigDict and checked as a whole.

Defaults live in `experiments/base.py`, every field explicit; the classes here have none, so that no value can come from
two places. Past `from_config_dict` no ConfigDict is seen and nothing is read by name with a fallback.
"""

import dataclasses
import difflib
import hashlib
import itertools
import json
import math
import types
import typing
from collections.abc import Mapping
from typing import Any, Literal

from ml_collections import ConfigDict

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
    order: Literal["stored", "image_first", "text_first", "coin"] = "stored"
    text_first_share: float = 0.5
    text_loss: Literal["stored", "none"] = "stored"
    visual_loss: Literal["inherit", "generated", "all", "none"] = "inherit"


@dataclasses.dataclass(frozen=True)
class SceneWorldConfig:
    """The embedded scene world: generated into `path` when missing, from `seed`. `level` none: not used."""

    level: Literal["none", "easy", "hard"]
    path: str
    num_scenes: int
    seed: int = 0


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

    `chat_template` asks as the tokenizer's chat template has it, for models that were trained to answer so (a run of
    `train` reads its records as they are, without one).

    `batch_rows` rows are scored at once; `shard_items` items are a part of a job, which a kill cannot take away once it
    is written; `validation_rows` bounds the fixed validation plan per source (0: every item).
    `rollout_source` (empty: none) names the source whose unseen captions are rolled out, to be found among
    `rollout_candidates` images.
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


def from_config_dict(config_dict: ConfigDict | Mapping[str, Any]) -> Config:
    """Builds and validates the configuration.

    Raises:
        ConfigError: listing every unknown, missing or ill-typed field with its dotted path, or every invalid
            combination.
    """
    faults: list[str] = []
    values = config_dict.to_dict() if isinstance(config_dict, ConfigDict) else config_dict
    config = _build(Config, values, "", faults)
    if faults:
        raise ConfigError(faults)
    faults = validate(config)
    if faults:
        raise ConfigError(faults)
    return config


def to_dict(config: Any) -> dict[str, Any]:
    """The configuration as plain JSON-ready values; `from_config_dict` reads it back."""
    return json.loads(json.dumps(_plain(config)))


def config_hash(config: Config) -> str:
    """12 hex digits that identify the resolved configuration."""
    text = json.dumps(to_dict(config), sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=6).hexdigest()


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


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Dotted paths where two plain configurations differ, as `path: old -> new`."""
    a, b = _flatten(old), _flatten(new)
    missing = "(absent)"
    return [
        f"{key}: {a.get(key, missing)!r} -> {b.get(key, missing)!r}"
        for key in sorted(a.keys() | b.keys())
        if a.get(key, missing) != b.get(key, missing)
    ]


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {k: _plain(v) for k, v in value.items()}
    return list(value) if isinstance(value, tuple) else value


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat = {}
    for key, value in tree.items():
        path = f"{prefix}{key}"
        if isinstance(value, Mapping):
            flat.update(_flatten(value, path + "."))
        else:
            flat[path] = value
    return flat


def _build(cls: type, values: Any, path: str, faults: list[str]) -> Any:
    if not isinstance(values, Mapping):
        faults.append(f"{path or 'config'}: expected a section, got {values!r}")
        return None
    hints = typing.get_type_hints(cls)
    for key in values:
        if key not in hints:
            close = difflib.get_close_matches(key, hints, n=1, cutoff=0.5)
            hint = f"; did you mean {_join(path, close[0])}?" if close else f"; fields here: {', '.join(hints)}"
            faults.append(f"{_join(path, key)}: unknown field{hint}")
    built = {}
    defaults = {field.name: field.default for field in dataclasses.fields(cls)}
    for name, hint in hints.items():
        if name not in values and defaults[name] is not dataclasses.MISSING:
            built[name] = defaults[name]
            continue
        if name not in values:
            faults.append(f"{_join(path, name)}: missing (defaults are in experiments/base.py)")
            continue
        built[name] = _convert(hint, values[name], _join(path, name), faults)
    return cls(**built) if len(built) == len(hints) else None


def _convert(hint: Any, value: Any, path: str, faults: list[str]) -> Any:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if dataclasses.is_dataclass(hint):
        return _build(typing.cast(type, hint), value, path, faults)
    if origin is Literal:
        return _one_of(arguments, value, path, faults)
    if origin is tuple:
        if isinstance(value, str):
            value = tuple(part for part in value.split(",") if part)
        if not isinstance(value, list | tuple):
            faults.append(f"{path}: expected a list, got {value!r}")
            return ()
        return tuple(_convert(arguments[0], item, f"{path}[{i}]", faults) for i, item in enumerate(value))
    if origin is not None and issubclass(origin, Mapping):
        if not isinstance(value, Mapping):
            faults.append(f"{path}: expected a section of named entries, got {value!r}")
            return {}
        entries = {key: _convert(arguments[1], item, _join(path, key), faults) for key, item in value.items()}
        return types.MappingProxyType(entries)
    return _scalar(hint, value, path, faults)


def _one_of(choices: tuple[Any, ...], value: Any, path: str, faults: list[str]) -> Any:
    if value not in choices:
        close = difflib.get_close_matches(str(value), choices, n=1, cutoff=0.5)
        hint = f" (did you mean {close[0]!r}?)" if close else ""
        faults.append(f"{path}: {value!r} is none of {', '.join(map(repr, choices))}{hint}")
    return value


def _scalar(hint: type, value: Any, path: str, faults: list[str]) -> Any:
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, hint) or (hint is not bool and isinstance(value, bool)):
        faults.append(f"{path}: expected {hint.__name__}, got {value!r} ({type(value).__name__})")
    elif hint is float and not math.isfinite(value):
        faults.append(f"{path}: {value!r} is not a finite number")
    return value


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def validate(config: Config) -> list[str]:
    """Every rule that a combination of fields breaks, as messages that name the fields and the remedy."""
    return [
        *_validate_model(config.model),
        *_validate_data(config),
        *_validate_optimization(config.optimizer, config.loss),
        *_validate_run(config),
        *_validate_mesh(config),
    ]


def _validate_model(model: ModelConfig) -> list[str]:
    encoder, decoder = model.encoder, model.decoder
    rules = [
        (
            encoder.dim % max(encoder.num_heads, 1) == 0,
            f"model.encoder.dim {encoder.dim} must be a multiple of model.encoder.num_heads {encoder.num_heads}",
        ),
        (
            decoder.num_heads % max(decoder.num_kv_heads, 1) == 0,
            f"model.decoder.num_heads {decoder.num_heads} must be a multiple of num_kv_heads {decoder.num_kv_heads}",
        ),
        (decoder.head_dim % 2 == 0, f"model.decoder.head_dim {decoder.head_dim} must be even (rotary pairs)"),
        (
            len(encoder.pixel_mean) == len(encoder.pixel_std) == 3 and all(std > 0 for std in encoder.pixel_std),
            "model.encoder.pixel_mean and pixel_std need three values each, the latter positive",
        ),
        (
            not (encoder.class_token and encoder.attention == "causal"),
            "model.encoder.class_token sees the whole image: set model.encoder.attention=bidirectional",
        ),
        *_rope_rules(decoder),
        *_head_rules(model),
        *_connector_rules(model),
    ]
    positive = {
        "model.encoder": (encoder, ("num_layers", "dim", "num_heads", "mlp_dim", "patch_size", "position_grid")),
        "model.projector": (model.projector, ("hidden_dim", "num_layers", "num_heads")),
        "model.semantic_head": (model.semantic_head, ("hidden_dim", "flow_steps")),
        "model.pixel_decoder": (model.pixel_decoder, ("num_layers", "dim", "num_heads", "mlp_dim")),
        "model.decoder": (
            decoder,
            (
                "num_layers",
                "dim",
                "num_heads",
                "num_kv_heads",
                "head_dim",
                "mlp_dim",
                "vocab_size",
                "max_grid",
                "rope_theta",
                "norm_eps",
            ),
        ),
    }
    return _broken(rules) + _not_positive(positive)


def _head_rules(model: ModelConfig) -> list[tuple[bool, str]]:
    head, pixels, split = model.semantic_head, model.pixel_decoder, model.visual_branch.split_layer
    return [
        (
            0 < head.statistics_decay < 1,
            f"model.semantic_head.statistics_decay {head.statistics_decay} must lie in (0, 1)",
        ),
        (
            0 <= split < max(model.decoder.num_layers, 1),
            f"model.visual_branch.split_layer {split} must leave layers above it: 0 (no branch) to "
            f"{model.decoder.num_layers - 1}",
        ),
        (
            pixels.dim % max(pixels.num_heads, 1) == 0,
            f"model.pixel_decoder.dim {pixels.dim} must be a multiple of num_heads {pixels.num_heads}",
        ),
        (
            0 <= pixels.condition_dropout < 1,
            f"model.pixel_decoder.condition_dropout {pixels.condition_dropout} must lie in [0, 1)",
        ),
        (
            pixels.condition_noise >= 0 and 0 <= pixels.predicted_share <= 1,
            "model.pixel_decoder.condition_noise must not be negative, predicted_share must lie in [0, 1]",
        ),
        (
            pixels.rollout_passes >= 0,
            f"model.pixel_decoder.rollout_passes {pixels.rollout_passes} must not be negative (0: teacher forcing)",
        ),
    ]


def _connector_rules(model: ModelConfig) -> list[tuple[bool, str]]:
    projector = model.projector
    return [
        (
            not has_queries(model) or model.encoder.dim % max(projector.num_heads, 1) == 0,
            f"model.encoder.dim {model.encoder.dim} is the width of the {projector.kind}'s queries: it must be a "
            f"multiple of model.projector.num_heads {projector.num_heads}",
        ),
        (
            not has_cross_attention(model) or not model.pixel_decoder.rollout_passes,
            "model.projector.kind=cross_attention reads images across, which model.pixel_decoder.rollout_passes does "
            "not do again: set it to 0",
        ),
        (
            not has_cross_attention(model) or not model.visual_branch.split_layer,
            "model.projector.kind=cross_attention has gated layers for one stack: set "
            "model.visual_branch.split_layer=0",
        ),
    ]


def _rope_rules(decoder: DecoderConfig) -> list[tuple[bool, str]]:
    scaling, path = decoder.rope_scaling, "model.decoder.rope_scaling"
    has_lengths = scaling.kind in ("llama3", "yarn")
    return [
        (scaling.factor > 0, f"{path}.factor {scaling.factor} must be positive"),
        (not has_lengths or scaling.original_positions > 0, f"{path}.original_positions: {scaling.kind} needs it"),
        (
            not has_lengths or 0 < scaling.low < scaling.high,
            f"{path}.low {scaling.low} must be positive and less than {path}.high {scaling.high}",
        ),
    ]


def _validate_data(config: Config) -> list[str]:
    data = config.data
    rules = [
        (
            data.row_patches % MERGED_PATCHES == 0,
            f"data.row_patches {data.row_patches} must be a multiple of {MERGED_PATCHES}",
        ),
        (
            MERGED_PATCHES <= data.image_max_patches <= data.row_patches,
            f"data.image_max_patches {data.image_max_patches} must lie between {MERGED_PATCHES} and data.row_patches "
            f"{data.row_patches}",
        ),
        (
            1 <= data.image_min_patches <= data.image_max_patches,
            f"data.image_min_patches {data.image_min_patches} must lie between 1 and data.image_max_patches "
            f"{data.image_max_patches}",
        ),
        (
            data.image_max_patches // MERGED_PATCHES + 3 <= data.row_tokens,
            f"data.row_tokens {data.row_tokens} must hold the largest image: data.image_max_patches / 4 + 3 markers",
        ),
        (
            data.image_max_patches // MERGED_PATCHES <= config.model.decoder.max_grid,
            f"model.decoder.max_grid {config.model.decoder.max_grid} must reach data.image_max_patches / 4 = "
            f"{data.image_max_patches // MERGED_PATCHES}: an image may be a strip one visual token high",
        ),
        ("://" not in data.cache_dir, f"data.cache_dir {data.cache_dir} must be a local path"),
        ("://" not in config.scene_world.path, f"scene_world.path {config.scene_world.path} must be a local path"),
        (data.cache_gib > 0, f"data.cache_gib {data.cache_gib} must be positive"),
        (0 <= data.max_failed_share <= 1, f"data.max_failed_share {data.max_failed_share} must lie in [0, 1]"),
    ]
    rules += [rule for name in data.sources for rule in _source_rules(config, name)]
    positive = {
        "data": (
            data,
            ("row_tokens", "row_patches", "num_data_shards", "window_size", "num_threads", "prefetch_batches"),
        )
    }
    batch, shards = config.train.global_batch_rows, data.num_data_shards
    if batch > 0 and shards > 0:
        rules.append(
            (
                batch % shards == 0 or shards % batch == 0,
                f"train.global_batch_rows {batch} and data.num_data_shards {shards}: one must divide the other",
            )
        )
    return _broken(rules) + _not_positive(positive)


def _source_rules(config: Config, name: str) -> list[tuple[bool, str]]:
    source, path = config.data.sources[name], f"data.sources.{name}"
    pairs = all(len(pair) == 2 for pair in source.weight_schedule)
    at = [pair[0] for pair in source.weight_schedule] if pairs else []
    rising = all(a < b for a, b in itertools.pairwise([-1e-9, *at, 1 + 1e-9])) if at else True
    return [
        (
            source.weight > 0,
            f"{path}.weight {source.weight} must be positive; to leave the source out, remove it from the config",
        ),
        (
            pairs and rising and all(pair[1] >= 0 for pair in source.weight_schedule if pairs),
            f"{path}.weight_schedule {source.weight_schedule}: give (progress, factor) pairs, progress rising within "
            "[0, 1], factors not negative",
        ),
        (
            not source.weight_schedule or config.data.planned_draws > 0,
            f"{path}.weight_schedule needs data.planned_draws: the number of draws at which progress is 1",
        ),
        (source.max_epochs >= 0, f"{path}.max_epochs {source.max_epochs} must not be negative; 0 means without limit"),
        (
            0 <= source.text_first_share <= 1,
            f"{path}.text_first_share {source.text_first_share} must lie in [0, 1]",
        ),
        (
            not (config.loss.cut_input_gradient and visual_loss_of(config, name) == "all"),
            f"loss.cut_input_gradient with a visual loss on all images of {path} would train encoder and projector by "
            "nothing; set loss.visual_loss_on or the source's visual_loss to generated",
        ),
    ]


def _validate_optimization(optimizer: OptimizerConfig, loss: LossConfig) -> list[str]:
    rules = [
        (0 <= optimizer.beta1 < 1 and 0 <= optimizer.beta2 < 1, "optimizer.beta1 and beta2 must lie in [0, 1)"),
        (0 <= optimizer.final_lr_ratio <= 1, f"optimizer.final_lr_ratio {optimizer.final_lr_ratio} must lie in [0, 1]"),
        (0 < optimizer.decay_fraction <= 1, f"optimizer.decay_fraction {optimizer.decay_fraction} must lie in (0, 1]"),
        (optimizer.warmup_steps >= 0, f"optimizer.warmup_steps {optimizer.warmup_steps} must not be negative"),
        (optimizer.weight_decay >= 0, f"optimizer.weight_decay {optimizer.weight_decay} must not be negative"),
        (
            min(getattr(optimizer, f"{name}_lr") for name in COMPONENTS) >= 0,
            f"optimizer.{', '.join(f'{name}_lr' for name in COMPONENTS)} must not be negative",
        ),
        (0 <= loss.ema_decay < 1, f"loss.ema_decay {loss.ema_decay} must lie in [0, 1)"),
        (0 <= loss.pixel_ema_decay < 1, f"loss.pixel_ema_decay {loss.pixel_ema_decay} must lie in [0, 1)"),
        (
            loss.visual_weight >= 0 and loss.visual_weight_start >= 0,
            "loss.visual_weight and visual_weight_start must not be negative",
        ),
        (loss.target_shift in (0, 1), f"loss.target_shift {loss.target_shift} must be 1 (next position) or 0 (own)"),
        (loss.pixel_weight >= 0, f"loss.pixel_weight {loss.pixel_weight} must not be negative"),
        (loss.visual_ramp_steps >= 0, f"loss.visual_ramp_steps {loss.visual_ramp_steps} must not be negative"),
        (
            not (loss.visual_loss == "cosine" and loss.target_norm == "l2"),
            "loss.visual_loss=cosine normalises already; set loss.target_norm to none or layer_norm",
        ),
    ]
    positive = {"optimizer": (optimizer, ("learning_rate", "clip_norm", "eps")), "loss": (loss, ("text_chunk",))}
    return _broken(rules) + _not_positive(positive)


def _validate_run(config: Config) -> list[str]:
    train, loss, init_from = config.train, config.loss, config.init_from
    rules = [
        (
            train.accumulation_steps < 1 or train.global_batch_rows % train.accumulation_steps == 0,
            f"train.global_batch_rows {train.global_batch_rows} must be a multiple of train.accumulation_steps "
            f"{train.accumulation_steps}",
        ),
        (0 <= config.seed < 2**31 and 0 <= config.data.seed < 2**31, "seed and data.seed must lie in [0, 2^31)"),
        (
            bool(init_from.workdir) or not init_from.components,
            "init_from.components is set but init_from.workdir is empty",
        ),
        (
            bool(init_from.components) or not init_from.workdir,
            "init_from.workdir is set but init_from.components is empty",
        ),
        (
            not (init_from.language_model and "decoder" in init_from.components)
            and not (init_from.vision_encoder and "encoder" in init_from.components),
            "init_from: language_model and components=decoder (vision_encoder and encoder) exclude each other",
        ),
        *_objective_rules(config),
        (
            train.num_replicates == 1 or config.mesh.fsdp == config.mesh.tensor == config.mesh.context == 1,
            "train.num_replicates > 1 shards replicates over mesh.data alone: set mesh.fsdp, tensor and context to 1",
        ),
        (
            train.num_replicates == 1 or config.model.attention_backend != "splash",
            "model.attention_backend=splash cannot be split over replicates; set it to auto or dense, or "
            "train.num_replicates to 1",
        ),
        (
            config.model.attention_backend != "splash" or config.data.turns == "repeated_prefix",
            "model.attention_backend=splash cannot mask independent turns of a sample; set "
            "data.turns=repeated_prefix, or model.attention_backend=dense",
        ),
        (
            train.num_replicates < 1
            or config.mesh.data < 1
            or train.num_replicates == 1
            or train.num_replicates % config.mesh.data == 0,
            f"train.num_replicates {train.num_replicates} must be a multiple of mesh.data {config.mesh.data}",
        ),
        (train.step_deadline_s >= 0, "train.step_deadline_s must not be negative (0: without limit)"),
        (config.checkpoint.keep_every_steps >= 0, "checkpoint.keep_every_steps must not be negative (0: off)"),
        (config.eval.validation_rows >= 0, "eval.validation_rows must not be negative (0: every item)"),
        (config.eval.every_steps >= 0, "eval.every_steps must not be negative (0: only at the end)"),
        (
            config.eval.rollout_source in ("", *config.data.sources),
            f"eval.rollout_source {config.eval.rollout_source!r} is not in data.sources: "
            f"{', '.join(config.data.sources)}",
        ),
        (
            not config.eval.rollout_source or loss.target_norm != "layer_norm" or not visual_target(config.objective),
            "loss.target_norm=layer_norm predicts embeddings without their mean, which cannot be fed back; "
            "set eval.rollout_source= (empty), or loss.target_norm to none or l2",
        ),
    ]
    positive = {
        "train": (
            train,
            (
                "num_steps",
                "global_batch_rows",
                "accumulation_steps",
                "log_every_steps",
                "eval_every_steps",
                "num_replicates",
                "max_consecutive_skips",
            ),
        ),
        "checkpoint": (config.checkpoint, ("every_steps", "keep_last")),
        "eval": (config.eval, ("batch_rows", "shard_items", "rollout_candidates")),
        "drawing": (config.drawing, ("steps",)),
        "mesh": (config.mesh, ("data", "fsdp", "tensor", "context", "num_slices")),
    }
    return _broken(rules) + _not_positive(positive)


def _objective_rules(config: Config) -> list[tuple[bool, str]]:
    kept, num_layers = config.optimizer.frozen_encoder_layers, config.model.encoder.num_layers
    objective, loss, head = config.objective, config.loss, config.model.semantic_head
    absent = [name for name in config.init_from.components if name not in components_of(config.model, objective)]
    predicts = visual_target(objective) is not None or pixel_role(objective) is not None
    return [
        (not absent, f"init_from.components names {', '.join(absent)}, which objective={objective} does not have"),
        (
            bool(set(components_of(config.model, objective)) - set(config.optimizer.frozen)),
            "optimizer.frozen freezes every component: nothing would train",
        ),
        (
            0 <= kept <= num_layers,
            f"optimizer.frozen_encoder_layers {kept} must lie between 0 and model.encoder.num_layers {num_layers}",
        ),
        (
            pixel_role(objective) != "detached" or not config.model.visual_branch.split_layer,
            "objective=pixel_detached gives a visual branch no gradient; set model.visual_branch.split_layer=0",
        ),
        (
            not loss.target_shuffled or config.train.accumulation_steps == 1,
            "loss.target_shuffled takes targets from other images of the batch, which train.accumulation_steps > 1 "
            "cuts in parts; set it to 1",
        ),
        (
            head.kind == "regression" or (loss.visual_loss == "mse" and loss.target_norm == "none"),
            "model.semantic_head.kind=flow predicts velocities: set loss.visual_loss=mse and loss.target_norm=none",
        ),
        (
            not head.standardise_targets or loss.target_norm == "none",
            "model.semantic_head.standardise_targets normalises already; set loss.target_norm=none",
        ),
        *_rollout_pass_rules(config),
        (
            not config.eval.rollout_source or not predicts or rolls_out(config),
            f"objective={objective} with model.projector.kind={config.model.projector.kind} predicts what cannot "
            "be fed back as an input; set eval.rollout_source= (empty)",
        ),
        (
            not has_queries(config.model) or visual_target(objective) in (None, "input"),
            f"objective={objective} has targets of blocks, and model.projector.kind={config.model.projector.kind} "
            "tokens of queries: set objective=semantic_input, or model.projector.kind=mlp",
        ),
        (
            not has_cross_attention(config.model)
            or all(visual_loss_of(config, name) != "all" for name in config.data.sources),
            "model.projector.kind=cross_attention gives images that are read no inputs, so they have none to predict: "
            "set loss.visual_loss_on=generated, and visual_loss of the sources to match",
        ),
        (
            not config.eval.rollout_source or visual_target(objective) != "patch" or loss.visual_loss != "cosine",
            "loss.visual_loss=cosine leaves the length of a patch embedding open, which a rollout has to read; set "
            "loss.visual_loss to mse or smooth_l1, or eval.rollout_source= (empty)",
        ),
    ]


def _rollout_pass_rules(config: Config) -> list[tuple[bool, str]]:
    pixels, loss, name = config.model.pixel_decoder, config.loss, "model.pixel_decoder.rollout_passes"
    is_off, off = pixels.rollout_passes <= 0, f"set {name}=0"
    return [
        (
            is_off or pixel_role(config.objective) == "renderer",
            f"{name}: objective={config.objective} has no renderer to draw from rolled-out embeddings; {off}, or "
            "objective=unihetero",
        ),
        (
            is_off or config.model.semantic_head.kind == "regression",
            f"{name}: conditions are predictions of a regression head; {off}, or model.semantic_head.kind=regression",
        ),
        (
            is_off or (loss.target_shift == 1 and loss.target_norm != "layer_norm"),
            f"{name} feeds predictions back: they must be of the next embedding (loss.target_shift=1) and have their "
            f"mean (loss.target_norm none or l2); {off} otherwise",
        ),
        (
            is_off or pixels.predicted_share > 0,
            f"{name}: with model.pixel_decoder.predicted_share=0 no image takes them as its condition; {off}, or raise "
            "the share",
        ),
    ]


def _validate_mesh(config: Config) -> list[str]:
    mesh, model, train = config.mesh, config.model, config.train
    if min(*dataclasses.astuple(mesh), train.accumulation_steps) < 1:
        return []  # already reported
    row_shards = mesh.data * mesh.fsdp
    microbatch = train.global_batch_rows // train.accumulation_steps
    rules = [
        (
            config.data.row_tokens % mesh.context == 0,
            f"data.row_tokens {config.data.row_tokens} must be a multiple of mesh.context {mesh.context}",
        ),
        (
            mesh.data % mesh.num_slices == 0,
            f"mesh.data {mesh.data} must be a multiple of mesh.num_slices {mesh.num_slices}: data crosses slices",
        ),
        (
            train.num_replicates > 1 or microbatch % row_shards == 0,
            f"rows per microbatch {microbatch} must be a multiple of mesh.data x mesh.fsdp = {row_shards}",
        ),
        (
            model.decoder.num_kv_heads % mesh.tensor == 0,
            f"model.decoder.num_kv_heads {model.decoder.num_kv_heads} must be a multiple of mesh.tensor {mesh.tensor}",
        ),
        (
            model.encoder.num_heads % mesh.tensor == 0,
            f"model.encoder.num_heads {model.encoder.num_heads} must be a multiple of mesh.tensor {mesh.tensor}",
        ),
        (
            model.decoder.vocab_size % mesh.tensor == 0,
            f"model.decoder.vocab_size {model.decoder.vocab_size} must be a multiple of mesh.tensor {mesh.tensor}",
        ),
        (
            model.decoder.dim % mesh.fsdp == 0,
            f"model.decoder.dim {model.decoder.dim} must be a multiple of mesh.fsdp {mesh.fsdp}",
        ),
        (
            model.encoder.dim % mesh.fsdp == 0,
            f"model.encoder.dim {model.encoder.dim} must be a multiple of mesh.fsdp {mesh.fsdp}",
        ),
        (
            config.eval.batch_rows % row_shards == 0,
            f"eval.batch_rows {config.eval.batch_rows} must be a multiple of mesh.data x mesh.fsdp = {row_shards}",
        ),
    ]
    for name, width in (
        ("encoder.mlp_dim", model.encoder.mlp_dim),
        ("decoder.mlp_dim", model.decoder.mlp_dim),
        ("projector.hidden_dim", model.projector.hidden_dim),
        ("semantic_head.hidden_dim", model.semantic_head.hidden_dim),
        ("pixel_decoder.mlp_dim", model.pixel_decoder.mlp_dim),
    ):
        rules.append(
            (width % mesh.tensor == 0, f"model.{name} {width} must be a multiple of mesh.tensor {mesh.tensor}")
        )
    return _broken(rules)


def _broken(rules: list[tuple[bool, str]]) -> list[str]:
    return [message for holds, message in rules if not holds]


def _not_positive(sections: Mapping[str, tuple[Any, tuple[str, ...]]]) -> list[str]:
    return [
        f"{path}.{name} {getattr(section, name)} must be positive"
        for path, (section, names) in sections.items()
        for name in names
        if getattr(section, name) <= 0
    ]
