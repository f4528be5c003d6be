"""Which combinations of fields make sense: every rule with the message that names the fields and the remedy."""

import dataclasses
import itertools
from collections.abc import Mapping
from typing import Any

from unihetero_jax.config import (
    COMPONENTS,
    MERGED_PATCHES,
    Config,
    DecoderConfig,
    LossConfig,
    ModelConfig,
    OptimizerConfig,
    components_of,
    has_cross_attention,
    has_queries,
    pixel_role,
    rolls_out,
    visual_loss_of,
    visual_target,
)


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
        (
            not (config.loss.cut_input_gradient and data.sources)
            or any(visual_loss_of(config, name) != "all" for name in data.sources),
            "loss.cut_input_gradient with a visual loss on all images of all sources would train encoder and projector "
            "by nothing: set loss.visual_loss_on, or a source's visual_loss, to generated, or take "
            "loss.cut_input_gradient=False with loss.target=ema",
        ),
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
        (source.max_records >= 0, f"{path}.max_records {source.max_records} must not be negative; 0 means all"),
        (source.max_epochs >= 0, f"{path}.max_epochs {source.max_epochs} must not be negative; 0 means without limit"),
        (
            0 <= source.text_first_share <= 1,
            f"{path}.text_first_share {source.text_first_share} must lie in [0, 1]",
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
            bool(config.eval.rollout_source) or not config.eval.rollout_judge,
            f"eval.rollout_judge {config.eval.rollout_judge!r} judges rollouts from captions of eval.rollout_source, "
            "which is empty: name a source, or set eval.rollout_judge= (empty)",
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
