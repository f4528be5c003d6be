"""All fields with their defaults. Experiments start from this and change what their question needs.

The defaults describe a small model on the embedded scene world. Where the paper (arXiv 2512.23512) is silent the value
is our choice; the reason stands beside it.
"""

from ml_collections import ConfigDict


def get_config(arg: str = "") -> ConfigDict:
    """The default experiment. Takes no argument."""
    if arg:
        raise ValueError(f"experiments/base.py takes no argument, got {arg!r}")
    return ConfigDict(
        {
            "objective": "semantic_input",
            "seed": 0,
            "model": {
                "encoder": {
                    "num_layers": 3,
                    "dim": 96,
                    "num_heads": 4,
                    "mlp_dim": 384,
                    "patch_size": 8,
                    "position_grid": 6,
                    "attention": "bidirectional",
                    "remat": "none",
                    "activation": "gelu_tanh",
                    "norm_eps": 1e-6,
                    "pixel_mean": (0.5, 0.5, 0.5),
                    "pixel_std": (0.5, 0.5, 0.5),
                    "class_token": False,
                    "patch_bias": True,
                    "pre_norm": False,
                },
                "projector": {
                    "hidden_dim": 256,
                    "output_rms": 0.0,
                    "kind": "mlp",
                    "num_layers": 2,
                    "num_heads": 4,
                },
                "decoder": {
                    "num_layers": 3,
                    "dim": 128,
                    "num_heads": 4,
                    "num_kv_heads": 2,
                    "head_dim": 32,
                    "mlp_dim": 384,
                    "vocab_size": 512,
                    "rope_theta": 10000.0,
                    "norm_eps": 1e-6,
                    "qk_norm": True,
                    "qkv_bias": False,
                    "tied_embeddings": True,
                    "max_grid": 64,
                    "remat": "none",
                    "rope_scaling": {
                        "kind": "none",
                        "factor": 1.0,
                        "original_positions": 0,
                        "low": 1.0,
                        "high": 4.0,
                        "attention_factor": 1.0,
                        "truncate": True,
                    },
                },
                "semantic_head": {
                    "hidden_dim": 256,
                    "kind": "regression",
                    "flow_steps": 16,
                    "standardise_targets": False,
                    "statistics_decay": 0.99,
                },
                "pixel_decoder": {
                    "num_layers": 4,
                    "dim": 128,
                    "num_heads": 4,
                    "mlp_dim": 512,
                    "condition_dropout": 0.1,
                    "condition_noise": 0.2,
                    "predicted_share": 0.25,
                    "conditioning": "adaptive_norm",  # draws better than cross-attention (docs/generation.md)
                    "rollout_passes": 0,  # nine tokens showed no cumulative error, and a pass costs a forward pass
                    "space": "pixels",
                },
                "visual_branch": {"split_layer": 0},
                "compute_dtype": "float32",
                "attention_backend": "auto",
            },
            "loss": {
                "visual_weight": 1.0,
                "visual_weight_start": 0.015,
                "visual_ramp_steps": 200,
                "visual_loss": "cosine",
                "target_norm": "none",
                "target": "stop_gradient",  # with the cut: what the measurements favour, see LossConfig
                "ema_decay": 0.99,
                "cut_input_gradient": True,
                "cut_branch_gradient": False,
                "visual_loss_on": "generated",  # teacher-forced loss on images read first is optimistic (the leak)
                "target_shift": 1,
                "target_shuffled": False,
                "pixel_weight": 1.0,
                "pixel_ema_decay": 0.995,  # some 200 steps: runs of the base are a thousand or two
                "text_chunk": 128,
            },
            "optimizer": {
                "learning_rate": 1e-3,
                "schedule": "cosine",
                "warmup_steps": 200,
                "final_lr_ratio": 0.05,
                "decay_fraction": 0.2,
                "beta1": 0.9,
                "beta2": 0.98,
                "eps": 1e-8,
                "weight_decay": 0.05,
                "clip_norm": 1.0,
                "encoder_lr": 1.0,
                "projector_lr": 1.0,
                "decoder_lr": 1.0,
                "semantic_head_lr": 1.0,
                "pixel_decoder_lr": 1.0,
                "visual_branch_lr": 1.0,
                "frozen": (),
                "frozen_encoder_layers": 0,
            },
            "init_from": {"workdir": "", "step": -1, "components": (), "language_model": "", "vision_encoder": ""},
            "scene_world": {
                "level": "none",
                "path": "",
                "num_scenes": 0,
                "seed": 0,
                "items_per_kind": 200,
                "with_objects": False,
            },
            "data": {
                "sources": {},
                "seed": 0,
                "tokenizer": "",
                "row_tokens": 128,
                "row_patches": 72,
                "image_min_patches": 36,
                "image_max_patches": 36,
                "num_data_shards": 8,
                "window_size": 2048,
                "turns": "branches",
                "planned_draws": 0,
                "num_threads": 2,
                "prefetch_batches": 4,
                "max_failed_share": 0.001,
                "verify_digests": True,
                "cache_dir": "",
                "cache_gib": 20.0,
            },
            "train": {
                "num_steps": 1000,
                "global_batch_rows": 16,
                "accumulation_steps": 1,
                "log_every_steps": 10,
                "eval_every_steps": 500,
                "num_replicates": 1,
                "max_consecutive_skips": 10,
                "step_deadline_s": 1800.0,  # longer than validation or a save; compiling is not under it
            },
            "checkpoint": {
                "every_steps": 200,
                "keep_last": 3,
                "keep_every_steps": 0,
                "verify_digests": True,  # storage flips bits, and Orbax restores them without an error
            },
            "mesh": {"data": 1, "fsdp": 1, "tensor": 1, "context": 1, "num_slices": 1},
            "eval": {
                "benchmarks": {},
                "batch_rows": 16,
                "validation_rows": 0,  # every item
                "rollout_source": "",
                "rollout_candidates": 64,
                "shard_items": 512,
                "every_steps": 0,  # only at the end
                "caption_prompt": "Describe the image.",
                "chat_template": False,
                "without_image": False,
                "rollout_judge": "",
            },
            "drawing": {"sampler": "heun", "steps": 20, "guidance": 1.0},
            "diagnostics": {
                "within_spread_warn": 0.20,
                "within_spread_alarm": 0.10,
                "across_spread_alarm": 0.10,
                "across_spread_grace_steps": 500,
                "copy_distance_alarm": 0.10,
                "retrieval_alarm": 0.10,
            },
        }
    )
