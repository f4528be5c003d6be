"""The start-up proof holds for every objective, and catches a loss graph that is not what it says."""

import dataclasses
import json
import typing

import jax
import pytest
from conftest import make_tiny_config

from unihetero_jax import gradient_table, step
from unihetero_jax.arrays import LossOutput
from unihetero_jax.config import Objective

FLOW = {"model__semantic_head__kind": "flow", "loss__visual_loss": "mse"}


@pytest.mark.parametrize("objective", typing.get_args(Objective))
@pytest.mark.parametrize(
    "changes",
    [{}, {"loss__cut_input_gradient": True}, {"optimizer__frozen": ("encoder",), "loss__target": "stop_gradient"},
     FLOW | {"model__semantic_head__standardise_targets": True}],
)  # fmt: skip
def test_the_table_holds(tmp_path, objective, changes):
    config = make_tiny_config(objective=objective, **changes)
    norms = gradient_table.prove(config, step.loss_terms, tmp_path, report=lambda _: None)
    assert norms["text"]["decoder"] > 0
    cut = objective == "generation" and config.loss.cut_input_gradient  # its text is that of the cut samples
    assert (norms["text"]["encoder"] > 0) == ("encoder" not in config.optimizer.frozen and not cut)
    for loss in norms.keys() - {"text"}:
        own = {"visual": "semantic_head", "pixel": "pixel_decoder"}[loss]
        assert norms[loss][own] > 0
        through_inputs = loss == "visual" or objective == "pixel_through"
        assert (norms[loss]["decoder"] > 0) == through_inputs
        assert (norms[loss]["projector"] > 0) == (through_inputs and not config.loss.cut_input_gradient)


@pytest.mark.parametrize("cut", [False, True])
def test_the_table_holds_where_one_source_of_two_predicts_images_that_are_read(tmp_path, cut):
    """With the cut, text teaches the encoder by the other source's images alone; it failed on the twin before."""
    common = {"weight": 1.0, "augment": "none"}
    sources = {"images": {"path": "a", "visual_loss": "all"} | common, "pairs": {"path": "b"} | common}
    config = make_tiny_config(loss__cut_input_gradient=cut, data__sources=sources)
    norms = gradient_table.prove(config, step.loss_terms, tmp_path, report=lambda _: None)
    assert norms["text"]["encoder"] > 0 and (norms["visual"]["encoder"] > 0) != cut


@pytest.mark.parametrize(
    ("objective", "changes"),
    [
        *(pytest.param(name, {}, marks=pytest.mark.slow) for name in ("pixel_through", "pixel_detached", "unihetero")),
        ("unihetero", {"model__pixel_decoder__rollout_passes": 2, "model__visual_branch__split_layer": 1}),
    ],
)  # fmt: skip
def test_the_table_holds_for_a_decoder_that_cross_attends(tmp_path, objective, changes):
    config = make_tiny_config(objective=objective, model__pixel_decoder__conditioning="cross_attention", **changes)
    norms = gradient_table.prove(config, step.loss_terms, tmp_path, report=lambda _: None)
    assert norms["pixel"]["pixel_decoder"] > 0
    assert (norms["pixel"]["decoder"] > 0) == (objective == "pixel_through")


def test_a_proof_is_kept_for_its_configuration_only(tmp_path):
    config = make_tiny_config()
    gradient_table.prove(config, step.loss_terms, tmp_path, report=lambda _: None)
    calls = []

    def counted(*arguments):
        calls.append(1)
        return step.loss_terms(*arguments)

    gradient_table.prove(config, counted, tmp_path, report=lambda _: None)
    assert not calls
    gradient_table.prove(dataclasses.replace(config, seed=1), counted, tmp_path, report=lambda _: None)
    assert calls
    assert json.loads((tmp_path / gradient_table.FILE_NAME).read_text())["norms"]["visual"]["decoder"] > 0


def leaking(config, params, ema, batch, weight, denominators):
    """A frozen encoder that trains all the same."""
    thawed = dataclasses.replace(config, optimizer=dataclasses.replace(config.optimizer, frozen=()))
    return step.loss_terms(thawed, params, ema, batch, weight, denominators)


def deaf(config, params, ema, batch, weight, denominators):
    """A visual loss that reaches nothing."""
    losses = step.loss_terms(config, params, ema, batch, weight, denominators)
    return LossOutput(
        losses.loss, losses.sums | {"visual": jax.lax.stop_gradient(losses.sums["visual"])}, losses.counts
    )


@pytest.mark.parametrize(
    ("fault", "changes", "message"),
    [
        (leaking, {"optimizer__frozen": ("encoder",), "loss__target": "stop_gradient"}, "text loss in encoder.*zero"),
        (deaf, {}, "visual loss in semantic_head.*non-zero"),
    ],
)
def test_an_injected_fault_stops_the_run(tmp_path, fault, changes, message):
    with pytest.raises(ValueError, match=message):
        gradient_table.prove(make_tiny_config(**changes), fault, tmp_path, report=lambda _: None)
    assert not (tmp_path / gradient_table.FILE_NAME).exists()
