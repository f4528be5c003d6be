"""Parameter and FLOP counts against hand counts, brute force and XLA."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.base import get_config
from unihetero_jax.config import from_config_dict
from unihetero_jax.flops import Work, count_work, model_flops, padded_work, parameter_counts
from unihetero_jax.model import unihetero


def make_config(**fields):
    config = get_config()
    config.data.sources = {"scenes": {"path": "data/scenes", "weight": 1.0, "augment": "none"}}
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


@pytest.mark.parametrize("objective", ["understanding", "semantic_input", "semantic_encoder"])
@pytest.mark.parametrize(
    "switches", [{}, {"decoder.qkv_bias": True, "decoder.qk_norm": False, "decoder.tied_embeddings": False}]
)
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
