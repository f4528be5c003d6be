"""The optimizer: AdamW with a schedule, clipping per gradient-isolated group, learning rates per component."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from unihetero_jax.config import COMPONENTS, Config, OptimizerConfig

Tree = dict[str, Any]


def learning_rate_schedule(config: OptimizerConfig, num_steps: int) -> optax.Schedule:
    """Learning rate by step. Warm-up is the setting or 10% of the run, whichever is shorter: any run length is valid.

    `warmup_stable_decay` holds the peak and decays linearly over the last `decay_fraction` (MiniCPM, arXiv 2404.06395).
    """
    peak, final = config.learning_rate, config.learning_rate * config.final_lr_ratio
    warmup = min(config.warmup_steps, num_steps // 10)
    match config.schedule:
        case "cosine":
            decay = optax.cosine_decay_schedule(peak, max(num_steps - warmup, 1), alpha=config.final_lr_ratio)
            phases, boundaries = [decay], []
        case "warmup_stable_decay":
            decay_steps = max(1, min(round(num_steps * config.decay_fraction), num_steps - warmup))
            decay = optax.linear_schedule(peak, final, decay_steps)
            phases, boundaries = [optax.constant_schedule(peak), decay], [num_steps - decay_steps]
    if warmup:
        ramp = optax.linear_schedule(peak / warmup, peak, max(warmup - 1, 1))
        phases, boundaries = [ramp, *phases], [warmup, *boundaries]
    return optax.join_schedules(phases, boundaries)


def make_optimizer(config: Config) -> optax.GradientTransformation:
    """AdamW (arXiv 1711.05101) over the trainable components; weight decay on kernels only (our choice)."""
    optimizer = config.optimizer
    return optax.chain(
        optax.scale_by_adam(optimizer.beta1, optimizer.beta2, optimizer.eps),
        optax.add_decayed_weights(optimizer.weight_decay, mask=is_decayed),
        _scale_components(optimizer),
        optax.scale_by_learning_rate(learning_rate_schedule(optimizer, config.train.num_steps)),
    )


def is_decayed(params: Tree) -> Tree:
    """True for kernels of linear maps; norms, biases, embeddings and position tables are not decayed."""
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key == "kernel", params)


def trainable(params: Tree, frozen: Sequence[str]) -> Tree:
    """The components that the optimizer sees; frozen ones have no moments and no update."""
    return {name: value for name, value in params.items() if name not in frozen}


def clip_by_group(
    gradients: Tree, groups: Sequence[Sequence[str]], clip_norm: float
) -> tuple[Tree, dict[str, jax.Array], jax.Array]:
    """Clips each gradient-isolated group of components to a global norm of its own.

    Returns:
        The clipped gradients, the norm of each group before clipping (named `a+b`), and whether
        everything is finite.
    """
    clipped: Tree = {}
    norms = {}
    for group in groups:
        members = {name: gradients[name] for name in group if name in gradients}
        if not members:
            continue
        norm = optax.tree.norm(members)
        scale = jnp.minimum(1.0, clip_norm / jnp.maximum(norm, 1e-12))
        clipped |= jax.tree.map(lambda g, scale=scale: g * scale, members)
        norms["+".join(members)] = norm
    return clipped, norms, jnp.all(jnp.isfinite(jnp.stack(list(norms.values()))))


def _scale_components(config: OptimizerConfig) -> optax.GradientTransformation:
    scales = {name: getattr(config, f"{name}_lr") for name in COMPONENTS}

    def update(updates: Any, params: Any = None) -> Any:
        scaled = {name: jax.tree.map(lambda u, s=scales[name]: u * s, tree) for name, tree in updates.items()}
        if config.frozen_encoder_layers and "encoder" in scaled:
            scaled["encoder"] = _without_first_layers(scaled["encoder"], config.frozen_encoder_layers)
        return scaled

    return optax.stateless(update)


def _without_first_layers(encoder: Tree, number: int) -> Tree:
    """Updates of the encoder from layer `number` on: zero for what comes before, its patches and positions included."""
    blocks = jax.tree.map(lambda u: u.at[:number].set(0.0), encoder["blocks"])
    below = {name: jax.tree.map(jnp.zeros_like, tree) for name, tree in encoder.items() if name != "norm"}
    return {**encoder, **below, "blocks": blocks}
