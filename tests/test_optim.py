"""Schedules, AdamW, component learning rates and clipping against literal numbers and numpy."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small
from conftest import make_tiny_config

from unihetero_jax import optim, step
from unihetero_jax.model import unihetero
from unihetero_jax.state import create_state

PEAK, FINAL, WARMUP = 0.01, 0.001, 200


def schedule_of(name, num_steps, **changes):
    """Learning rates before step 0, ..., `num_steps`, over the peak."""
    config = dataclasses.replace(
        make_tiny_config().optimizer, schedule=name, learning_rate=PEAK, final_lr_ratio=FINAL / PEAK,
        warmup_steps=WARMUP, **changes,
    )  # fmt: skip
    rates = jax.jit(optim.learning_rate_schedule(config, num_steps))(jnp.arange(num_steps + 1))
    return np.broadcast_to(rates, num_steps + 1) / PEAK


def rate_by_hand(name, at, num_steps, decay_fraction):
    warmup = min(WARMUP, num_steps // 10)
    if at < warmup:
        return (at + 1) / warmup
    if name == "cosine":
        return 0.1 + 0.9 * (1 + np.cos(np.pi * (at - warmup) / (num_steps - warmup))) / 2
    decay_steps = max(1, round(decay_fraction * num_steps))
    return 1 - 0.9 * max(0, at - (num_steps - decay_steps)) / decay_steps


@pytest.mark.parametrize("name", ["cosine", "warmup_stable_decay"])
@pytest.mark.parametrize(("num_steps", "warmup"), [(1, 0), (5, 0), (100, 10), (10_000, 200)])
def test_warm_up_is_the_setting_or_a_tenth_of_the_run(name, num_steps, warmup):
    rates = schedule_of(name, num_steps)
    assert np.argmax(rates) == max(warmup - 1, 0) and rates.max() == pytest.approx(1, rel=1e-6)
    np.testing.assert_allclose(rates[:warmup], np.arange(1, warmup + 1) / max(warmup, 1), rtol=1e-5)
    assert rates[-1] == pytest.approx(0.1, rel=1e-4)
    assert (np.diff(rates[warmup:]) <= 0).all()
    np.testing.assert_allclose(
        rates, [rate_by_hand(name, at, num_steps, 0.2) for at in range(num_steps + 1)], rtol=1e-4
    )


def test_a_setting_shorter_than_a_tenth_of_the_run_holds_and_zero_is_no_warm_up():
    config = dataclasses.replace(make_tiny_config().optimizer, learning_rate=1.0)
    for warmup, start in ((0, [1, 1]), (1, [1, 1]), (4, [0.25, 0.5, 0.75, 1])):
        schedule = optim.learning_rate_schedule(dataclasses.replace(config, warmup_steps=warmup), 1000)
        np.testing.assert_allclose([schedule(at) for at in range(len(start))], start, rtol=1e-4)


def test_cosine_at_chosen_steps():
    """20 steps: two of warm-up, then 18 of half a cosine, whose third has cos 60 degrees and whose middle has 0."""
    rates = schedule_of("cosine", 20)
    np.testing.assert_allclose(rates[[0, 1, 2, 8, 11, 14, 20]], [0.5, 1, 1, 0.775, 0.55, 0.325, 0.1], rtol=1e-5)


@pytest.mark.parametrize(
    ("num_steps", "decay_fraction", "expected"),
    [
        (20, 0.2, [0.5] + [1] * 16 + [0.775, 0.55, 0.325, 0.1]),
        (10, 0.3, [1, 1, 1, 1, 1, 1, 1, 1, 0.7, 0.4, 0.1]),
        (10, 1.0, [1, 1, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1]),  # all but the warm-up
        (3, 0.2, [1, 1, 1, 0.1]),  # one step at least
    ],
)
def test_warmup_stable_decay_holds_the_peak_and_falls_linearly(num_steps, decay_fraction, expected):
    rates = schedule_of("warmup_stable_decay", num_steps, decay_fraction=decay_fraction)
    np.testing.assert_allclose(rates, expected, rtol=1e-5)


def test_only_kernels_are_decayed():
    """Every name that a model's parameters have, in every variant."""
    decayed = {}
    for variant in ({}, {"model__decoder__qkv_bias": True, "model__decoder__tied_embeddings": False}):
        config = make_tiny_config(**variant)
        params = jax.eval_shape(lambda config=config: unihetero.init_params(config.model, config.objective, 0))
        for path, value in jax.tree_util.tree_leaves_with_path(optim.is_decayed(params)):
            assert decayed.setdefault(path[-1].key, value) == value, path
    assert decayed == {
        "kernel": True, "bias": False, "gain": False, "embedding": False, "output": False, "position": False,
        "grid_height": False, "grid_width": False,
    }  # fmt: skip


COMPONENTS = ("encoder", "projector", "decoder", "semantic_head")


def random_tree(seed, components=COMPONENTS):
    rng = np.random.default_rng(seed)
    names = ("kernel", "bias", "gain", "embedding")
    return {
        component: {name: rng.standard_normal((3, 2)).astype(np.float32) for name in names} for component in components
    }


def updates_of(config, num_steps=3):
    """The updates of the first steps, under random gradients. Not jitted: fusion may move a last bit."""
    optimizer = optim.make_optimizer(config)
    params = random_tree(0)
    state, made = optimizer.init(params), []
    for i in range(num_steps):
        updates, state = optimizer.update(random_tree(i + 1), state, params)
        params = jax.tree.map(np.add, params, jax.device_get(updates))
        made.append(updates)
    return jax.device_get(made)


def test_adamw_is_eight_lines_of_numpy():
    """With an epsilon that counts, a rate that falls, and one component slower than the others."""
    config = make_tiny_config(
        optimizer__learning_rate=PEAK, optimizer__warmup_steps=0, optimizer__final_lr_ratio=0.1,
        optimizer__beta1=0.8, optimizer__beta2=0.9, optimizer__eps=0.1, optimizer__weight_decay=0.3,
        optimizer__projector_lr=0.25, train__num_steps=4,
    )  # fmt: skip
    made = updates_of(config)
    rates = [rate_by_hand("cosine", at, 4, 0.0) for at in range(3)]
    for component in COMPONENTS:
        for name, p in random_tree(0)[component].items():
            p, m, v = p.astype(np.float64), 0.0, 0.0
            for t, rate in enumerate(rates, start=1):
                g = random_tree(t)[component][name]
                m, v = 0.8 * m + 0.2 * g, 0.9 * v + 0.1 * g**2
                step_size = PEAK * rate * (0.25 if component == "projector" else 1)
                decay = 0.3 * p if name == "kernel" else 0
                update = -step_size * (m / (1 - 0.8**t) / (np.sqrt(v / (1 - 0.9**t)) + 0.1) + decay)
                np.testing.assert_allclose(made[t - 1][component][name], update, rtol=1e-4, atol=1e-8)
                p = p + update


@pytest.mark.parametrize("slowed", COMPONENTS)
def test_a_component_with_half_the_rate_moves_half_as_far_and_the_others_as_before(slowed):
    usual = updates_of(make_tiny_config(), 1)[0]
    other = updates_of(make_tiny_config(**{f"optimizer__{slowed}_lr": 0.5}), 1)[0]
    for component in COMPONENTS:
        factor = np.float32(0.5 if component == slowed else 1)
        for name, update in usual[component].items():
            assert np.abs(update).min() > 0
            np.testing.assert_array_equal(other[component][name], factor * update)


def test_frozen_components_stay_and_have_no_moments():
    """Through a whole step. The values are drawn by numpy, since compiling the initialiser takes seconds."""
    config = make_tiny_config(optimizer__frozen=("encoder", "decoder"))
    shapes = jax.eval_shape(lambda: unihetero.init_params(config.model, config.objective, 0))
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: jnp.asarray(0.2 * rng.standard_normal(x.shape), jnp.float32), shapes)
    before = create_state(config, params, optim.make_optimizer(config))
    assert before.ema.keys() == {"projector"}, "what is frozen is its own average"
    for moments in (before.opt_state[0].mu, before.opt_state[0].nu):
        assert moments.keys() == {"projector", "semantic_head"}
    after, metrics = jax.jit(step.make_train_step(config))(before, small.mixed_batch(0, 2))
    assert metrics.finite and metrics.gradient_norms.keys() == {"projector+semantic_head"}
    for component in ("encoder", "decoder"):
        jax.tree.map(np.testing.assert_array_equal, before.params[component], after.params[component])
    for component in ("projector", "semantic_head"):
        moved = jax.tree.map(lambda a, b: np.any(np.asarray(a) != b), before.params[component], after.params[component])
        assert all(jax.tree.leaves(moved)), component


GROUPS = (("encoder", "projector"), ("decoder",))


def three_gradients(**changes):
    """Norm 5 in the first group (3, 0 and 4), 0.5 in the second (0.3 and 0.4)."""
    gradients = {"encoder": [3.0, 0.0], "projector": [4.0], "decoder": [0.3, 0.4]} | changes
    return {component: {"kernel": jnp.array(values)} for component, values in gradients.items()}


def test_groups_are_clipped_each_to_its_own_norm():
    clipped, norms, finite = optim.clip_by_group(three_gradients(), GROUPS, 1.0)
    np.testing.assert_allclose(clipped["encoder"]["kernel"], [0.6, 0.0], rtol=1e-6)
    np.testing.assert_allclose(clipped["projector"]["kernel"], [0.8], rtol=1e-6)
    np.testing.assert_array_equal(clipped["decoder"]["kernel"], np.float32([0.3, 0.4]))
    assert norms.keys() == {"encoder+projector", "decoder"} and finite
    np.testing.assert_allclose([norms["encoder+projector"], norms["decoder"]], [5.0, 0.5], rtol=1e-6)


def test_one_group_of_all_is_clipped_as_a_whole():
    clipped, norms, finite = optim.clip_by_group(three_gradients(decoder=[0.0, 12.0]), (COMPONENTS,), 6.5)
    assert norms == {"encoder+projector+decoder": 13.0} and finite
    flat = np.concatenate([clipped[name]["kernel"] for name in ("encoder", "projector", "decoder")])
    np.testing.assert_allclose(flat, [1.5, 0, 2, 0, 6], rtol=1e-6)


def test_a_group_without_gradients_is_left_out_and_zero_stays_zero():
    """What is frozen has no gradient; a norm is named by the components that have one."""
    gradients = {"projector": {"kernel": jnp.zeros(2)}}
    clipped, norms, finite = optim.clip_by_group(gradients, GROUPS, 1.0)
    np.testing.assert_array_equal(clipped["projector"]["kernel"], [0, 0])
    assert clipped.keys() == {"projector"} and norms == {"projector": 0.0} and finite


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("component", ["encoder", "projector", "decoder"])
def test_one_bad_number_anywhere_is_seen_and_changes_no_other_group(component, bad):
    usual, usual_norms, _ = optim.clip_by_group(three_gradients(), GROUPS, 1.0)
    clipped, norms, finite = optim.clip_by_group(three_gradients(**{component: [1.0, bad]}), GROUPS, 1.0)
    assert not finite
    group = next(group for group in GROUPS if component in group)
    assert not np.isfinite(norms["+".join(group)])
    for other in set(GROUPS) - {group}:
        assert norms["+".join(other)] == usual_norms["+".join(other)]
        for name in other:
            np.testing.assert_array_equal(clipped[name]["kernel"], usual[name]["kernel"])


def test_the_encoders_first_layers_stay_as_they_are():
    """Patches, positions and one of two layers; the second layer, the final norm and all else train."""
    config = make_tiny_config(optimizer__frozen_encoder_layers=1, train__num_steps=100)
    params, batch = small.params_of(), small.mixed_batch(0, 4)
    state = create_state(config, params, optim.make_optimizer(config))
    after = jax.jit(step.make_train_step(config))(state, batch)[0].params

    def moved(tree, start):
        return [bool(jnp.any(a != b)) for a, b in zip(jax.tree.leaves(tree), jax.tree.leaves(start), strict=True)]

    for name in ("patch", "position"):
        assert not any(moved(after["encoder"][name], params["encoder"][name]))
    before, trained = params["encoder"]["blocks"], after["encoder"]["blocks"]
    first, second = (lambda x: x[0]), (lambda x: x[1])
    assert not any(moved(jax.tree.map(first, trained), jax.tree.map(first, before)))
    assert any(moved(jax.tree.map(second, trained), jax.tree.map(second, before)))
    assert all(any(moved(after[name], params[name])) for name in ("projector", "decoder"))
    assert any(moved(after["encoder"]["norm"], params["encoder"]["norm"]))


def test_more_layers_than_there_are_cannot_be_frozen():
    with pytest.raises(ValueError, match="frozen_encoder_layers 3 must lie between 0 and"):
        make_tiny_config(optimizer__frozen_encoder_layers=3)
