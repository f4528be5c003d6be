"""One optimizer step: the loss graph of an objective, gradients, update; and its compilation onto a mesh."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from unihetero_jax import optim
from unihetero_jax.arrays import Batch, LossOutput, StepMetrics
from unihetero_jax.config import Config, pixel_role, visual_target
from unihetero_jax.model import unihetero
from unihetero_jax.model.attention import require_segments_alone
from unihetero_jax.objectives import (
    TARGET_SUMS,
    compute_loss,
    count_targets,
    gradient_groups,
    pixel_flow,
    visual_flow,
    visual_weight,
)
from unihetero_jax.sharding import activation_mesh, batch_sharding
from unihetero_jax.state import TrainState, averages_of_targets, create_state, state_shardings, update_ema

Params = dict[str, Any]
RANDOM_ENCODER_SEED = 20_251_223
"""Of the encoder whose output is the target of objective `random`; no run has it."""


def loss_terms(
    config: Config, params: Params, ema: Params, batch: Batch, weight: jax.Array, denominators: dict[str, jax.Array]
) -> LossOutput:
    """The whole loss graph of an objective: model, target, losses. All that differs between objectives is here."""
    frozen = {name: jax.lax.stop_gradient(params[name]) for name in config.optimizer.frozen if name in params}
    params = params | frozen
    require_segments_alone(config.model.attention_backend, config.data.turns)
    model = unihetero.build(config.model, config.objective, params)
    output = model(batch, config.loss.cut_input_gradient, config.loss.cut_branch_gradient)
    target, averages = output.vision, averages_of_targets(ema)
    if averages:
        averaged = unihetero.build(config.model, config.objective, jax.lax.stop_gradient(params | averages))
        seen = jax.lax.stop_gradient(output.vision)
        # A frozen encoder equals its own average: it need not run twice.
        target = (
            averaged.see(batch)
            if "encoder" in averages
            else dataclasses.replace(seen, visual_embeddings=averaged.project(seen.merged, batch))
        )
    flows = {}
    if visual_target(config.objective) and config.model.semantic_head.kind == "flow":
        flow = visual_flow(config, output, batch, target)
        hidden = jnp.roll(output.visual_hidden, config.loss.target_shift, axis=1)
        flows["visual"] = flow, model.semantic_head.velocity(hidden, flow.noisy, flow.tau)
    if pixel_role(config.objective):
        predicted = None
        if pixel_role(config.objective) == "renderer" and config.model.semantic_head.kind == "regression":
            fixed = unihetero.build(config.model, config.objective, jax.lax.stop_gradient(params))
            passes = config.model.pixel_decoder.rollout_passes
            predicted = fixed.reread_predictions(batch, jax.lax.stop_gradient(output), passes)
        flow, condition, is_conditioned = pixel_flow(config, output, batch, predicted)
        velocity = model.pixel_velocity(batch.patch_segment_ids, batch.patch_coords, flow, condition, is_conditioned)
        flows["pixel"] = flow, velocity
    return compute_loss(config, output, batch, target, weight, denominators, flows)


def make_train_step(config: Config) -> Callable[[TrainState, Batch], tuple[TrainState, StepMetrics]]:
    """The pure function of one step; `compile_train_step` puts it on a mesh."""
    optimizer = optim.make_optimizer(config)

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, StepMetrics]:
        weight = visual_weight(config.loss, state.step)
        gradients, losses = _accumulated_gradients(config, state, batch, weight)
        groups = gradient_groups(config)
        gradients, norms, finite = optim.clip_by_group(gradients, groups, config.optimizer.clip_norm)
        kept = {name: state.params[name] for name in gradients}
        updates, opt_state = optimizer.update(gradients, state.opt_state, kept)
        params = state.params | jax.tree.map(lambda p, u: p + u, kept, updates)
        params = _with_statistics(config, params, losses)
        ema = update_ema(config, state.ema, params)
        params, ema, opt_state = _where(finite, (params, ema, opt_state), (state.params, state.ema, state.opt_state))
        skipped = state.skipped + ~finite
        consecutive = jnp.where(finite, 0, state.consecutive_skips + 1)
        new_state = TrainState(state.step + 1, params, ema, opt_state, skipped, consecutive)
        return new_state, StepMetrics(
            losses.loss,
            _scalar_sums(losses),
            losses.counts,
            norms,
            finite,
            weight,
            batch_hash(batch),
            consecutive,
            skipped,
        )

    return train_step


def _scalar_sums(losses: LossOutput) -> dict[str, Any]:
    """What is logged: all but the sums per dimension that the head's statistics are made of."""
    return {name: value for name, value in losses.sums.items() if name not in TARGET_SUMS}


def _with_statistics(config: Config, params: Params, losses: LossOutput) -> Params:
    """The running mean and mean square of the visual targets, moved towards this batch's."""
    if not config.model.semantic_head.standardise_targets or "semantic_head" not in params:
        return params
    count = losses.counts["visual"]
    pull = jnp.where(count > 0, 1 - config.model.semantic_head.statistics_decay, 0.0)
    head = dict(params["semantic_head"])
    for name in TARGET_SUMS:
        head[name] = head[name] + pull * (losses.sums[name] / jnp.maximum(count, 1.0) - head[name])
    return params | {"semantic_head": head}


def _accumulated_gradients(
    config: Config, state: TrainState, batch: Batch, weight: jax.Array
) -> tuple[Params, LossOutput]:
    """Gradients of the whole batch, computed in `accumulation_steps` microbatches over the same denominators."""
    denominators = count_targets(config, batch)
    trainable = optim.trainable(state.params, config.optimizer.frozen)

    def loss_of(trainable: Params, batch: Batch) -> tuple[jax.Array, LossOutput]:
        output = loss_terms(config, state.params | trainable, state.ema, batch, weight, denominators)
        return output.loss, output

    gradient_of = jax.grad(loss_of, has_aux=True)
    num_parts = config.train.accumulation_steps
    if num_parts == 1:
        return gradient_of(trainable, batch)
    # Rows are dealt in turn: each microbatch keeps the rows' layout over devices.
    parts = jax.tree.map(lambda x: x.reshape(-1, num_parts, *x.shape[1:]).swapaxes(0, 1), batch)
    zero = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(gradient_of, trainable, _first(parts)))
    total, _ = jax.lax.scan(
        lambda total, part: (jax.tree.map(jnp.add, total, gradient_of(trainable, part)), None), zero, parts
    )
    return total


def _first(parts: Batch) -> Batch:
    return jax.tree.map(lambda x: x[0], parts)


def _where(condition: jax.Array, new: Any, old: Any) -> Any:
    return jax.tree.map(lambda n, o: jnp.where(condition, n, o), new, old)


def make_eval_step(config: Config, mesh: Mesh) -> Callable[[TrainState, Batch], LossOutput]:
    """The losses of a batch without any update, jitted; with replicates, of every replicate."""
    replicates = config.train.num_replicates > 1

    def eval_step(state: TrainState, batch: Batch) -> LossOutput:
        weight = visual_weight(config.loss, state.step)
        losses = loss_terms(config, state.params, state.ema, batch, weight, count_targets(config, batch))
        return dataclasses.replace(losses, sums=_scalar_sums(losses))

    def on_mesh(state: TrainState, batch: Batch) -> LossOutput:
        with activation_mesh(None if replicates else mesh):
            return (jax.vmap(eval_step, in_axes=(0, None)) if replicates else eval_step)(state, batch)

    return jax.jit(on_mesh, out_shardings=NamedSharding(mesh, PartitionSpec()))


def batch_hash(batch: Batch) -> jax.Array:
    """uint32[2] over all rows and their order; equal on any number of devices and processes."""
    rows = jnp.arange(batch.row_hash.shape[0], dtype=jnp.uint32)[:, None]
    mixed = (batch.row_hash.astype(jnp.uint32) ^ (rows * jnp.uint32(0x9E3779B9))) * jnp.uint32(0x85EBCA6B)
    return jnp.sum((mixed ^ (mixed >> 15)) * jnp.uint32(0xC2B2AE35), axis=0, dtype=jnp.uint32)


def abstract_state(config: Config, mesh: Mesh) -> TrainState:
    """Shapes, dtypes and shardings of the state on this mesh; allocates nothing."""
    shapes = jax.eval_shape(_initialiser(config))
    axes = unihetero.logical_axes(config.model, config.objective)
    shardings = state_shardings(config, shapes, axes, mesh)
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings)


def init_state(config: Config, mesh: Mesh) -> TrainState:
    """A fresh state, born sharded: no device ever holds a full copy."""
    shardings = jax.tree.map(lambda x: x.sharding, abstract_state(config, mesh))
    return jax.jit(_initialiser(config), out_shardings=shardings)()


def _initialiser(config: Config) -> Callable[[], TrainState]:
    optimizer = optim.make_optimizer(config)

    def one(seed: jax.Array) -> TrainState:
        params = unihetero.init_params(config.model, config.objective, seed)
        random_encoder = None
        if visual_target(config.objective) == "random":
            # From one seed for all runs: the target is the same, whatever the run starts from.
            random_encoder = unihetero.init_params(config.model, config.objective, RANDOM_ENCODER_SEED)["encoder"]
        return create_state(config, params, optimizer, random_encoder)

    num_replicates = config.train.num_replicates
    if num_replicates == 1:
        return lambda: one(jnp.int32(config.seed))
    return lambda: jax.vmap(one)(config.seed + jnp.arange(num_replicates, dtype=jnp.int32))


def compile_train_step(config: Config, mesh: Mesh) -> Callable[[TrainState, Batch], tuple[TrainState, StepMetrics]]:
    """The step under `jax.jit` with shardings (what used to be pjit); the old state's memory is donated."""
    step = make_train_step(config)
    replicates = config.train.num_replicates > 1
    if replicates:
        step = jax.vmap(step, in_axes=(0, None))
    shardings = jax.tree.map(lambda x: x.sharding, abstract_state(config, mesh))

    def on_mesh(state: TrainState, batch: Batch) -> tuple[TrainState, StepMetrics]:
        with activation_mesh(None if replicates else mesh):
            return step(state, batch)

    return jax.jit(
        on_mesh,
        in_shardings=(shardings, batch_sharding(mesh, replicates)),
        # Metrics are whole on every device, so that each process can read them.
        out_shardings=(shardings, NamedSharding(mesh, PartitionSpec())),
        donate_argnums=0,
    )
