"""Parameter and FLOP counts against hand counts, brute force, XLA, and the products of the traced step."""

import dataclasses
import math
import typing

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params
from jax.interpreters import partial_eval as pe

from experiments.base import get_config
from unihetero_jax.compile_ahead import abstract_batch
from unihetero_jax.config import Objective
from unihetero_jax.config_reading import from_config_dict
from unihetero_jax.flops import (
    Work,
    count_work,
    executed_flops,
    full_work,
    model_flops,
    padded_work,
    parameter_counts,
)
from unihetero_jax.model import unihetero
from unihetero_jax.sharding import make_mesh
from unihetero_jax.step import abstract_state, make_train_step


def make_config(**fields):
    config = get_config()
    config.data.sources = {"scenes": {"path": "data/scenes", "weight": 1.0, "augment": "none"}}
    config.loss.update(target="ema", cut_input_gradient=False)
    config.model.update_from_flattened_dict({
        "encoder.num_layers": 2, "encoder.dim": 8, "encoder.num_heads": 2, "encoder.mlp_dim": 12,
        "encoder.patch_size": 2,
        "encoder.position_grid": 3, "projector.hidden_dim": 10, "semantic_head.hidden_dim": 5,
        "decoder.num_layers": 3, "decoder.dim": 6, "decoder.num_heads": 2, "decoder.num_kv_heads": 1,
        "decoder.head_dim": 4,
        "decoder.mlp_dim": 7, "decoder.vocab_size": 11, "decoder.max_grid": 9,
    })  # fmt: skip
    config.update_from_flattened_dict(fields)
    return from_config_dict(config)


WORK = Work(tokens=20, targets=9, patches=12, token_pairs=70, patch_pairs=80)
# Multiply-adds by hand, each factor written as input x output.
ENCODER_DENSE = 2 * 12 * (12 * 8 + 2 * (4 * 8 * 8 + 8 * 12 + 12 * 8))
ENCODER_ATTENTION = 2 * 2 * 80 * 8 * 2
PROJECTOR = 2 * 3 * (32 * 10 + 10 * 6)
DECODER_DENSE = 2 * 20 * 3 * (6 * 8 + 6 * 4 + 6 * 4 + 8 * 6 + 3 * 6 * 7)
DECODER_ATTENTION = 2 * 2 * 70 * 8 * 3
LM_HEAD = 2 * 9 * 6 * 11


def test_training_step_by_hand():
    flops = model_flops(make_config(), WORK)
    assert flops == {
        "encoder": 3 * (ENCODER_DENSE + ENCODER_ATTENTION),
        "projector": 3 * PROJECTOR,
        "decoder": 3 * (DECODER_DENSE + DECODER_ATTENTION),
        "lm_head": 3 * LM_HEAD,
        "semantic_head": 3 * 2 * 20 * (6 * 5 + 5 * 6),
        "pixel_decoder": 0,
        "visual_branch": 0,
        "ema_target": ENCODER_DENSE + ENCODER_ATTENTION + PROJECTOR,
        "total": flops["total"],
    }
    assert flops["total"] == sum(value for name, value in flops.items() if name != "total")


def test_objectives_and_targets():
    flops = model_flops(make_config(objective="understanding"), WORK)
    assert flops["semantic_head"] == flops["ema_target"] == 0
    flops = model_flops(make_config(objective="semantic_encoder"), WORK)
    assert flops["semantic_head"] == 3 * 2 * 20 * (6 * 5 + 5 * 32)
    assert flops["ema_target"] == ENCODER_DENSE + ENCODER_ATTENTION
    assert model_flops(make_config(**{"loss.target": "stop_gradient"}), WORK)["ema_target"] == 0


def test_frozen_parts():
    flops = model_flops(make_config(**{"optimizer.frozen": ("encoder",)}), WORK)
    assert flops["encoder"] == ENCODER_DENSE + ENCODER_ATTENTION and flops["ema_target"] == PROJECTOR
    assert flops["projector"] == 3 * PROJECTOR and flops["decoder"] == 3 * (DECODER_DENSE + DECODER_ATTENTION)
    flops = model_flops(make_config(**{"optimizer.frozen": ("encoder", "projector")}), WORK)
    assert flops["projector"] == PROJECTOR and flops["ema_target"] == 0
    # A frozen decoder still carries the gradient to the projector, but computes none for its weights.
    flops = model_flops(make_config(**{"optimizer.frozen": ("decoder",)}), WORK)
    assert flops["decoder"] == 2 * DECODER_DENSE + 3 * DECODER_ATTENTION and flops["lm_head"] == 2 * LM_HEAD
    flops = model_flops(make_config(**{"optimizer.frozen": ("encoder", "projector", "decoder")}), WORK)
    assert flops["decoder"] == DECODER_DENSE + DECODER_ATTENTION and flops["lm_head"] == LM_HEAD
    assert flops["semantic_head"] == 3 * 2 * 20 * (6 * 5 + 5 * 6)


def test_parameters_by_hand():
    encoder = (12 * 8 + 8) + 9 * 8 + 2 * (2 * 16 + 4 * (64 + 8) + (8 * 12 + 12) + (12 * 8 + 8)) + 16
    projector = (32 * 10 + 10) + (10 * 6 + 6) + 6
    block = 6 + 6 * 8 + 2 * 6 * 4 + 8 * 6 + 2 * 4 + 6 + 3 * 6 * 7
    decoder = 11 * 6 + 2 * 10 * 6 + 3 * block + 6
    head = (6 * 5 + 5) + (5 * 6 + 6)
    counts = parameter_counts(make_config().model, "semantic_input")
    assert counts == {
        "encoder": encoder, "projector": projector, "decoder": decoder, "semantic_head": head,
        "total": encoder + projector + decoder + head,
    }  # fmt: skip
    assert "semantic_head" not in parameter_counts(make_config().model, "understanding")
    assert parameter_counts(make_config().model, "semantic_encoder")["semantic_head"] == 6 * 5 + 5 + 5 * 32 + 32
    changed = make_config(
        **{"model.decoder.tied_embeddings": False, "model.decoder.qkv_bias": True, "model.decoder.qk_norm": False}
    )
    assert parameter_counts(changed.model, "understanding")["decoder"] == decoder + 11 * 6 + 3 * (8 + 4 + 4) - 3 * 8


@pytest.mark.parametrize("attention", ["bidirectional", "causal"])
def test_work_equals_the_number_of_open_mask_entries(attention):
    arrays = {
        "text_loss_mask": np.array([[0, 1, 1, 0, 0, 0, 1, 0, 0, 0], [0, 0, 0, 1, 0, 0, 0, 0, 0, 0]], bool),
        "segment_ids": np.array([[1, 1, 1, 2, 2, 2, 2, 2, 2, 0], [1, 1, 1, 1, 1, 1, 0, 0, 0, 0]]),
        "branch_ids": np.array([[0, 0, 0, 0, 0, 1, 1, 2, 2, 0], [0, 0, 1, 2, 2, 3, 0, 0, 0, 0]]),
        "patch_segment_ids": np.array([[1] * 8 + [2] * 4 + [0] * 4, [0] * 16]),
    }
    segments, branches, images = arrays["segment_ids"], arrays["branch_ids"], arrays["patch_segment_ids"]
    order = np.arange(10)
    mask = (
        (segments[:, :, None] == segments[:, None, :]) & (segments > 0)[:, :, None] & (order[:, None] >= order[None, :])
    )
    mask &= (branches[:, None, :] == 0) | (branches[:, :, None] == branches[:, None, :])
    image_mask = (images[:, :, None] == images[:, None, :]) & (images > 0)[:, :, None]
    if attention == "causal":
        block = np.arange(16) // 4
        image_mask &= block[:, None] >= block[None, :]
    work = count_work(make_config(**{"model.encoder.attention": attention}), arrays)
    assert work == Work(
        tokens=15, targets=4, patches=12, token_pairs=int(mask.sum()), patch_pairs=int(image_mask.sum())
    )


def test_padded_work_is_that_of_full_rows():
    config = make_config()
    tokens, patches = config.data.row_tokens, config.data.row_patches
    full = {
        "segment_ids": np.ones((3, tokens), int), "branch_ids": np.zeros((3, tokens), int),
        "text_loss_mask": np.ones((3, tokens), bool),
        "patch_segment_ids": np.ones((3, patches), int),
    }  # fmt: skip
    assert padded_work(config, 3) == count_work(config, full)


@pytest.mark.parametrize("objective", typing.get_args(Objective))
@pytest.mark.parametrize(
    "switches",
    [
        {},
        {
            "decoder.qkv_bias": True, "decoder.qk_norm": False, "decoder.tied_embeddings": False,
            "semantic_head.standardise_targets": True, "pixel_decoder.conditioning": "cross_attention",
            "pixel_decoder.space": "dct",
        },
    ],
)  # fmt: skip
def test_parameters_are_those_of_the_model(objective, switches):
    config = make_config(objective=objective, **{f"model.{name}": value for name, value in switches.items()})
    shapes = jax.eval_shape(lambda: unihetero.init_params(config.model, objective, 0))
    built = {name: sum(x.size for x in jax.tree.leaves(tree)) for name, tree in shapes.items()}
    assert parameter_counts(config.model, objective) == built | {"total": sum(built.values())}


def test_dense_decoder_agrees_with_xla():
    """The same products, unrolled, as XLA counts them (a scan's body it would count once)."""
    decoder = make_config().model.decoder
    shapes = [(6, 8), (6, 4), (6, 4), (8, 6), (6, 7), (6, 7), (7, 6)] * decoder.num_layers + [(6, 11)]

    def products(inputs, weights):
        return [x @ w for x, w in zip(inputs, weights, strict=True)]

    inputs = [jnp.ones((20, rows)) for rows, _ in shapes]
    weights = [jnp.ones(shape) for shape in shapes]
    counted = jax.jit(products).lower(inputs, weights).compile().cost_analysis()["flops"]
    flops = model_flops(
        make_config(objective="understanding"), Work(tokens=20, targets=20, patches=0, token_pairs=0, patch_pairs=0)
    )
    assert counted == (flops["decoder"] + flops["lm_head"]) / 3


def products(jaxpr, chunks):
    """FLOPs of all dot_generals of a jaxpr; scans times their length, the text loss's loop `chunks` times."""
    total = 0
    read = {id(v) for v in (*jaxpr.outvars, *(v for equation in jaxpr.eqns for v in equation.invars))}
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (contracted, _), (batched, _) = equation.params["dimension_numbers"]
            left, right = (variable.aval.shape for variable in equation.invars)
            shared = math.prod(left[i] for i in (*contracted, *batched))
            total += 2 * math.prod(left) * math.prod(right) // shared
        elif equation.primitive.name == "while":
            total += chunks * products(live_body(equation, read), chunks)
        else:
            times = equation.params["length"] if equation.primitive.name == "scan" else 1
            total += times * sum(products(inner, chunks) for inner in jaxprs_in_params(equation.params))
    return total


def live_body(loop, read):
    """The body of a loop without what only feeds results that nobody reads: a frozen table's gradient."""
    body, num_consts = loop.params["body_jaxpr"].jaxpr, loop.params["body_nconsts"]
    live = [id(variable) in read for variable in loop.outvars]
    # What the condition reads is needed, too: here the counter and its end, the first two.
    live[:2] = [True, True]
    while True:
        reduced, used = pe.dce_jaxpr(body, live)
        needed = [a or b for a, b in zip(live, used[num_consts:], strict=True)]
        if needed == live:
            return reduced
        live = needed


def traced_step(config):
    """FLOPs of the products in the gradient of the whole loss graph, as traced: no compiler has seen it."""
    mesh = make_mesh(config.mesh, jax.devices()[:1])
    state, batch = abstract_state(config, mesh), abstract_batch(config, mesh)
    rows, tokens = config.train.global_batch_rows, config.data.row_tokens
    closed = jax.make_jaxpr(make_train_step(config))(state, batch)
    jaxpr, _ = pe.dce_jaxpr(closed.jaxpr, [True] * len(closed.jaxpr.outvars))
    return products(jaxpr, -(-rows * tokens // min(config.loss.text_chunk, rows * tokens)))


SMALL_STEP = {
    "train.global_batch_rows": 2, "data.row_tokens": 256, "data.row_patches": 256, "data.image_max_patches": 64,
    "data.image_min_patches": 16, "data.num_data_shards": 2, "eval.batch_rows": 2,
    "model.encoder.num_layers": 3, "model.encoder.dim": 128, "model.encoder.num_heads": 4,
    "model.encoder.mlp_dim": 384, "model.encoder.patch_size": 4, "model.encoder.position_grid": 4,
    "model.decoder.num_layers": 3, "model.decoder.dim": 192, "model.decoder.num_heads": 6,
    "model.decoder.num_kv_heads": 2, "model.decoder.head_dim": 32, "model.decoder.mlp_dim": 512,
    "model.decoder.vocab_size": 1024, "model.decoder.max_grid": 64,
    "model.projector.hidden_dim": 256, "model.semantic_head.hidden_dim": 256,
}  # fmt: skip


@pytest.mark.parametrize(
    ("objective", "frozen"),
    [
        ("understanding", ()), ("semantic_encoder", ()), ("semantic_input", ()), ("semantic_input", ("encoder",)),
        ("semantic_input", ("encoder", "projector")), ("semantic_input", ("decoder",)),
        ("semantic_input", ("encoder", "projector", "decoder")), ("patch", ()), ("pixels", ()),
        ("random", ("encoder",)), ("pixel_through", ()), ("pixel_detached", ()), ("unihetero", ()),
    ],
)  # fmt: skip
def test_model_flops_are_those_of_the_traced_products(objective, frozen):
    """All that differs from the count by hand stays under 2%: statistics, the position table, pixels' own gradient.

    The dense mask hides half of a causal row after its products are computed, so all pairs are counted here.
    """
    config = make_config(**SMALL_STEP, **{"objective": objective, "optimizer.frozen": frozen})
    full = padded_work(config, 2)
    work = dataclasses.replace(full, token_pairs=2 * 256**2, patch_pairs=2 * 256**2)
    counted = model_flops(config, work)["total"]
    if objective in ("pixel_through", "pixel_detached"):  # so does the mask of a block's four patches
        pixels = config.model.pixel_decoder
        counted += 3 * 4 * 2 * (256**2 - 4 * 256) * pixels.dim * pixels.num_layers
    assert counted == pytest.approx(traced_step(config), rel=0.02)


@pytest.mark.parametrize(("cut", "frozen"), [(False, ()), (True, ()), (False, ("encoder", "projector", "decoder"))])
def test_flops_of_a_visual_branch_are_those_of_the_traced_products(cut, frozen):
    branch = {"model.visual_branch.split_layer": 1, "loss.cut_branch_gradient": cut, "optimizer.frozen": frozen}
    config = make_config(**SMALL_STEP, **branch)
    work = dataclasses.replace(padded_work(config, 2), token_pairs=2 * 256**2, patch_pairs=2 * 256**2)
    assert model_flops(config, work)["total"] == pytest.approx(traced_step(config), rel=0.02)


@pytest.mark.parametrize("frozen", [(), ("encoder",), ("encoder", "projector"), ("decoder",)])
@pytest.mark.parametrize("kind", ["resampler", "qformer", "cross_attention"])
def test_flops_of_connectors_are_those_of_the_traced_products(kind, frozen):
    """Dense masks over whole rows: all pairs of queries and patches, and of positions, are computed."""
    changes = {"model.projector.kind": kind, "optimizer.frozen": frozen, "model.projector.num_layers": 3}
    config = make_config(**SMALL_STEP, **changes)
    full = padded_work(config, 2)
    cross = 2 * 256**2 if kind == "cross_attention" else 0
    work = dataclasses.replace(full, token_pairs=2 * 256**2, patch_pairs=2 * 256**2, cross_pairs=cross)
    assert model_flops(config, work)["total"] == pytest.approx(traced_step(config), rel=0.02)


@pytest.mark.parametrize(
    ("objective", "switches"),
    [
        ("unihetero", {"model.pixel_decoder.conditioning": "cross_attention"}),
        ("pixel_through", {"model.pixel_decoder.conditioning": "cross_attention"}),
        ("pixel_detached", {"model.pixel_decoder.conditioning": "cross_attention"}),
        ("unihetero", {"model.pixel_decoder.rollout_passes": 5}),
        ("unihetero", {"model.pixel_decoder.rollout_passes": 5, "model.visual_branch.split_layer": 1}),
        (
            "unihetero",
            {
                "model.pixel_decoder.rollout_passes": 3, "model.pixel_decoder.conditioning": "cross_attention",
                "optimizer.frozen": ("encoder", "projector", "decoder", "semantic_head"),
            },
        ),
    ],
)  # fmt: skip
def test_flops_of_a_pixel_decoder_are_those_of_the_traced_products(objective, switches):
    """A pass is a forward pass of the language model; dense attention of blocks computes all pairs of a row."""
    config = make_config(**SMALL_STEP, objective=objective, **switches)
    work = dataclasses.replace(padded_work(config, 2), token_pairs=2 * 256**2, patch_pairs=2 * 256**2)
    counted, pixels = model_flops(config, work)["total"], config.model.pixel_decoder
    if objective != "unihetero":
        pairs_hidden = 2 * (256**2 - 4 * 256)
        counted += 3 * 4 * (pairs_hidden + pairs_hidden / 4) * pixels.dim * pixels.num_layers
    assert counted == pytest.approx(traced_step(config), rel=0.02)


@pytest.mark.parametrize(("remat", "frozen"), [("dots", ()), ("full", ()), ("full", ("encoder",))])
def test_executed_flops_are_those_of_the_traced_products(remat, frozen):
    config = make_config(
        **SMALL_STEP, **{"model.encoder.remat": remat, "model.decoder.remat": remat, "optimizer.frozen": frozen}
    )
    assert executed_flops(config, 2, "dense") == pytest.approx(traced_step(config), rel=0.02)


def test_full_rows_hold_images_of_the_largest_size():
    config = make_config(**(SMALL_STEP | {"data.row_patches": 144}))
    assert full_work(config, 3) == dataclasses.replace(padded_work(config, 3), patch_pairs=3 * (2 * 64**2 + 16**2))
