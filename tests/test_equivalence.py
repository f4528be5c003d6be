"""The same numbers by different roads: packed or alone, cached or whole, one device or eight, one batch or parts."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small
from conftest import make_tiny_config

from unihetero_jax import step
from unihetero_jax.data.packing import PackedSample, TokenPiece
from unihetero_jax.inference.draw import follow_flow
from unihetero_jax.inference.generate import decode, draw_and_tell
from unihetero_jax.inference.rollout import rollout
from unihetero_jax.inference.sampling import GREEDY
from unihetero_jax.model import unihetero
from unihetero_jax.model.attention import attend
from unihetero_jax.model.unihetero import build
from unihetero_jax.model.vision_encoder import patch_places
from unihetero_jax.sharding import activation_mesh, make_mesh, shardings_for, to_global
from unihetero_jax.state import TrainState
from unihetero_jax.text_loss import text_nll


def test_packed_rows_equal_separate_rows():
    rng = np.random.default_rng(1)
    samples = [small.reading(rng), small.drawing(rng), small.writing(rng)]
    together = small.forward()(small.params_of(), small.batch_of([samples]))
    start = 0
    for sample in samples:
        batch = small.batch_of([[sample]])
        alone = small.forward()(small.params_of(), batch)
        length = int((batch.segment_ids > 0).sum())
        for name in ("hidden", "predicted_embeddings", "input_embeddings"):
            packed = getattr(together, name)[0, start : start + length]
            np.testing.assert_allclose(packed, getattr(alone, name)[0, :length], atol=1e-5)
        start += length


def test_turns_equal_the_plain_sequence_without_the_other_turns():
    rng = np.random.default_rng(2)
    both = small.reading(rng, turns=(3, 4))
    second = PackedSample([piece for piece in both.pieces if getattr(piece, "branch", 0) != 1])
    together = small.forward()(small.params_of(), small.batch_of([[both]])).hidden[0]
    alone = small.forward()(small.params_of(), small.batch_of([[second]])).hidden[0]
    prefix, skipped, length = 4, 6, 7
    np.testing.assert_allclose(together[prefix + skipped :][:length], alone[prefix:][:length], atol=1e-5)


@pytest.mark.parametrize("with_image", [True, False])
def test_cached_generation_equals_the_whole_forward(with_image):
    config, rng = make_tiny_config(), np.random.default_rng(3)
    prompts = []
    for length in (3, 6):
        image = small.reading(rng, turns=()).pieces if with_image else []
        prompts.append([*image, TokenPiece(rng.integers(4, 64, length).tolist())])
    batch = small.batch_of([[PackedSample(prompt)] for prompt in prompts], row_tokens=12)
    params, new = small.params_of(), 8
    made, log_probs = decode(config, params, batch, jax.random.key(0), new, small.EOS, (), GREEDY)
    for row, prompt in enumerate(prompts):
        full = small.batch_of([[PackedSample([*prompt, TokenPiece(np.asarray(made[row]).tolist())])]])
        output = small.forward()(params, full)
        everything = jnp.ones(full.tokens.shape, bool)
        whole = -text_nll(output.hidden, output.unembedding, full.tokens, everything, 64)[1][0]
        start = int((batch.segment_ids[row] > 0).sum())
        ended = np.flatnonzero(np.asarray(made[row]) == small.EOS)
        kept = int(ended[0]) + 1 if len(ended) else new
        np.testing.assert_allclose(log_probs[row, :kept], whole[start : start + kept], atol=1e-5)
        logits = output.hidden[0, start - 1 : start - 1 + kept] @ output.unembedding.T
        np.testing.assert_array_equal(np.argmax(logits, axis=-1), made[row, :kept])


@pytest.mark.parametrize("objective", ["semantic_input", "semantic_encoder"])
def test_rollout_equals_feeding_predictions_back_by_hand(objective):
    config, rng, num_tokens = make_tiny_config(objective=objective), np.random.default_rng(4), 3
    params = small.params_of(objective)
    prompt = PackedSample([small.tokens(rng, 4), TokenPiece([small.BOI])])
    batch = small.batch_of([[prompt]], row_tokens=5, row_patches=4)
    batch = dataclasses.replace(batch, boi_grid=batch.boi_grid.at[0, 4].set(jnp.array([1, num_tokens])))
    rolled = rollout(config, params, batch, num_tokens, jax.random.key(0)).embeddings[0]
    model = build(config.model, objective, params)
    x = model.decoder.embed(batch.tokens, batch.boi_grid, model.dtype)
    for position in range(num_tokens):
        length = x.shape[1]
        mask = jnp.tril(jnp.ones((1, length, length), bool))
        hidden = model.decoder(x, jnp.arange(length)[None], functools.partial(attend, mask=mask))
        predicted = model.predict_embedding(hidden[:, -1], jax.random.key(0))
        np.testing.assert_allclose(rolled[position], predicted[0], atol=1e-5)
        x = jnp.concatenate([x, predicted[:, None]], axis=1)


def reread_config(objective, **changes):
    """Of an objective whose predictions go back through the vision path; no cosine, which leaves a length open."""
    return make_tiny_config(
        objective=objective, loss__visual_loss="mse", model__pixel_decoder__num_layers=1, drawing__steps=2, **changes
    )


@pytest.mark.parametrize("attention", ["bidirectional", "causal"])
def test_blocks_are_read_as_images_of_which_only_those_are_there(attention):
    """All of them: the image itself. The first ones of a causal encoder: the same, whatever follows."""
    config, params = make_tiny_config(model__encoder__attention=attention), small.params_of()
    rng, grid = np.random.default_rng(0), (2, 3)
    whole = small.batch_of([[PackedSample([TokenPiece([small.BOI]), small.ImagePiece(small.picture(rng, *grid))])]],
                           row_tokens=8, row_patches=24)  # fmt: skip
    model = build(config.model, config.objective, params)
    vision = model.see(whole)
    read = functools.partial(model.read_blocks, vision.patch_embeddings, jnp.array([grid]))
    np.testing.assert_array_equal(patch_places(jnp.array([grid]), 6)[0], whole.patch_coords[0])
    np.testing.assert_allclose(read(jnp.int32(6)), vision.visual_embeddings, atol=1e-5)
    part = np.abs(np.asarray(read(jnp.int32(4)) - vision.visual_embeddings))[0].max(axis=-1)
    assert (part[:4] < 1e-5).all() == (attention == "causal")
    changed = vision.patch_embeddings.at[:, 4:].add(1.0)
    np.testing.assert_array_equal(
        model.read_blocks(changed, jnp.array([grid]), jnp.int32(4))[:, :4], read(jnp.int32(4))[:, :4]
    )


@pytest.mark.parametrize(
    "objective",
    ["patch", *(pytest.param(name, marks=pytest.mark.slow) for name in ("pixel_through", "pixel_detached"))],
)
def test_a_rollout_that_is_read_again_equals_its_steps_by_hand(objective):
    """Each prediction is put on the canvas, the canvas is read, and what was read is the next input."""
    config, num_tokens = reread_config(objective), 4
    params = unihetero.init_params(config.model, objective, 0)
    params = jax.tree.map(lambda x: x + 0.1 * jax.random.normal(jax.random.key(x.size), x.shape), params)
    prompts, _ = small.drawing_prompts_and_truth()
    key = jax.random.key(3)
    rolled = rollout(config, params, prompts, num_tokens, key)
    model = build(config.model, objective, params)
    grid = jnp.array([[1, num_tokens]] * 2)
    x = model.decoder.embed(prompts.tokens, prompts.boi_grid, model.dtype)
    canvas = jnp.zeros((2, num_tokens, 4 * config.model.encoder.dim))
    for position in range(num_tokens):
        length = x.shape[1]
        mask = jnp.tril(jnp.ones((2, length, length), bool))
        positions = jnp.broadcast_to(jnp.arange(length), (2, length))
        last = model.decoder(x, positions, functools.partial(attend, mask=mask))[:, -1]
        own_key = jax.random.fold_in(key, position)
        if objective == "patch":
            block = model.semantic_head(last)
        else:
            places = patch_places(grid, num_tokens)[:, 4 * position : 4 * position + 4]
            pixels = follow_flow(config, model, last[:, None], places, own_key)
            off = np.abs(np.asarray(pixels, int) - np.asarray(rolled.patches[:, 4 * position : 4 * position + 4], int))
            assert off.max() <= 1, "one grey level, by rounding"
            block = model.encoder.embed_patches(pixels, model.dtype).reshape(2, -1)
        canvas = canvas.at[:, position].set(block)
        read = model.read_blocks(canvas, grid, jnp.int32(position + 1))[:, position]
        np.testing.assert_allclose(
            rolled.embeddings[:, position], read, atol=2e-2 if rolled.patches is not None else 1e-4
        )
        x = jnp.concatenate([x, rolled.embeddings[:, position : position + 1]], axis=1)
    assert (rolled.patches is None) == (objective == "patch")


@pytest.mark.parametrize("objective", ["patch", pytest.param("pixel_through", marks=pytest.mark.slow)])
def test_a_rollout_that_is_read_again_and_given_all_sees_true_blocks_alone(objective):
    """Of a causal encoder, whose embeddings do not change as blocks are added: predictions follow the true hidden
    states, and what was drawn before does not matter.
    """
    config = reread_config(objective, model__encoder__attention="causal")
    params = unihetero.init_params(config.model, objective, 0)
    params = jax.tree.map(lambda x: x + 0.1 * jax.random.normal(jax.random.key(x.size), x.shape), params)
    prompts, whole = small.drawing_prompts_and_truth()
    model = build(config.model, objective, params)
    output = model(whole)
    forced = rollout(config, params, prompts, 4, jax.random.key(3), output.vision, 4)
    if objective == "patch":
        blocks = model.semantic_head(output.hidden[:, 4:8])
        for position in range(4):
            canvas = output.vision.patch_embeddings.at[:, position].set(blocks[:, position])
            read = model.read_blocks(canvas, jnp.array([[1, 4]] * 2), jnp.int32(position + 1))[:, position]
            np.testing.assert_allclose(forced.embeddings[:, position], read, atol=1e-4)
    free = rollout(config, params, prompts, 4, jax.random.key(3))
    np.testing.assert_allclose(free.embeddings[:, 0], forced.embeddings[:, 0], atol=1e-4)
    assert np.abs(np.asarray(free.embeddings - forced.embeddings))[:, 2:].max() > 1e-3


@pytest.mark.parametrize("objective", ["semantic_input", "semantic_encoder"])
def test_a_rollout_that_is_given_all_is_teacher_forcing(objective):
    """And one that is given a part is equal up to there, and another from there on."""
    config, params = make_tiny_config(objective=objective), small.params_of(objective)
    prompts, whole = small.drawing_prompts_and_truth()
    output = small.forward(objective)(params, whole)
    true = output.vision.visual_embeddings
    model = build(config.model, objective, params)
    forced = model.predict_embedding(output.hidden[:, 4:8].reshape(8, -1), jax.random.key(0)).reshape(true.shape)
    given = {n: rollout(config, params, prompts, 4, jax.random.key(0), output.vision, n).embeddings for n in (0, 2, 4)}
    np.testing.assert_allclose(given[4], forced, atol=1e-5)
    np.testing.assert_allclose(given[2][:, :3], forced[:, :3], atol=1e-5)
    assert np.abs(given[2][:, 3] - forced[:, 3]).max() > 1e-3
    np.testing.assert_array_equal(given[0], rollout(config, params, prompts, 4, jax.random.key(0)).embeddings)


def test_a_rollout_on_eight_devices_is_that_on_one():
    config = make_tiny_config(mesh__fsdp=4, mesh__tensor=2, train__global_batch_rows=8, eval__batch_rows=8)
    params, (prompts, _) = small.params_of(), small.drawing_prompts_and_truth(4)
    one = rollout(make_tiny_config(), params, prompts, 4, jax.random.key(0)).embeddings
    mesh = make_mesh(config.mesh)
    with activation_mesh(mesh):
        shardings = shardings_for(unihetero.logical_axes(config.model, config.objective), mesh)
        split = jax.device_put(params, shardings)
        eight = rollout(config, split, to_global(small.host(prompts), mesh), 4, jax.random.key(0)).embeddings
    np.testing.assert_allclose(eight, one, atol=1e-5)


def test_text_goes_on_after_an_image_that_was_drawn():
    """Greedy text after `<eoi>` is that of the whole model over prompt, drawn embeddings, `<eoi>` and what was said."""
    config, params, new = make_tiny_config(), small.params_of(), 5
    prompts, _ = small.drawing_prompts_and_truth(1)
    drawn, tokens = draw_and_tell(config, params, prompts, jax.random.key(0), 4, small.EOI, new, small.EOS, (), GREEDY)
    np.testing.assert_allclose(drawn, rollout(config, params, prompts, 4, jax.random.key(0)).embeddings, atol=1e-6)
    model = build(config.model, config.objective, params)
    no_grid = jnp.zeros((1, 1, 2), jnp.int32)
    embed = lambda token: model.decoder.embed(jnp.full((1, 1), token, jnp.int32), no_grid, model.dtype)  # noqa: E731
    start = model.decoder.embed(prompts.tokens, prompts.boi_grid, model.dtype)
    x = jnp.concatenate([start, drawn, embed(small.EOI)], axis=1)
    for token in np.asarray(tokens[0]):
        mask = jnp.tril(jnp.ones((1, x.shape[1], x.shape[1]), bool))
        hidden = model.decoder(x, jnp.arange(x.shape[1])[None], functools.partial(attend, mask=mask))
        assert int(jnp.argmax(hidden[0, -1] @ model.decoder.unembedding.T)) == token
        if token == small.EOS:
            break
        x = jnp.concatenate([x, embed(token)], axis=1)


def run_steps(config, num_steps, num_rows=8):
    mesh = make_mesh(config.mesh)
    state = step.init_state(config, mesh)
    train_step = step.compile_train_step(config, mesh)
    losses = []
    for i in range(num_steps):
        batch = to_global(small.host(small.mixed_batch(i, num_rows)), mesh, config.train.num_replicates > 1)
        state, metrics = train_step(state, batch)
        losses.append(jax.device_get(metrics))
    return state, losses, train_step


def eight_rows(**changes):
    return make_tiny_config(train__global_batch_rows=8, eval__batch_rows=8, train__num_steps=100, **changes)


@pytest.fixture(scope="module")
def one_device():
    return run_steps(eight_rows(), 5)


@pytest.mark.parametrize(
    "mesh",
    [
        {"mesh__data": 2, "mesh__fsdp": 2, "mesh__tensor": 2},
        pytest.param({"mesh__data": 8}, marks=pytest.mark.slow),
        pytest.param({"mesh__fsdp": 4, "mesh__tensor": 2}, marks=pytest.mark.slow),
        pytest.param({"mesh__fsdp": 2, "mesh__tensor": 2, "mesh__context": 2}, marks=pytest.mark.slow),
        pytest.param({"mesh__data": 4, "mesh__context": 2, "mesh__num_slices": 2}, marks=pytest.mark.slow),
    ],
)
def test_eight_devices_equal_one(one_device, mesh):
    config = eight_rows(**mesh)
    state, metrics, train_step = run_steps(config, 5)
    reference = one_device[1]
    for ours, theirs in zip(metrics, reference, strict=True):
        assert abs(ours.loss - theirs.loss) < 1e-5
        np.testing.assert_array_equal(ours.batch_hash, theirs.batch_hash)
        np.testing.assert_allclose(ours.counts["text"], theirs.counts["text"])
    kernel = state.params["decoder"]["blocks"]["mlp"]["up"]["kernel"]
    parts = config.mesh.fsdp * config.mesh.tensor
    assert kernel.addressable_shards[0].data.size * parts == kernel.size
    moment = state.opt_state[0].mu["decoder"]["blocks"]["mlp"]["up"]["kernel"]
    assert moment.sharding == kernel.sharding
    assert train_step._cache_size() == 1  # nothing recompiles after the first step


def test_compiled_step_has_the_shardings_of_the_rules():
    config = eight_rows(mesh__data=2, mesh__fsdp=2, mesh__tensor=2)
    mesh = make_mesh(config.mesh)
    abstract = step.abstract_state(config, mesh)
    batch = to_global(small.host(small.mixed_batch(0, 8)), mesh)
    compiled = step.compile_train_step(config, mesh).lower(abstract, batch).compile()
    (state_in, batch_in), _ = compiled.input_shardings
    state_out, _ = compiled.output_shardings
    for shardings in (state_in, state_out):
        kernel = shardings.params["decoder"]["blocks"]["mlp"]["up"]["kernel"]
        assert tuple(kernel.spec)[-2:] == ("fsdp", "tensor")
        assert tuple(shardings.params["decoder"]["embedding"].spec) == ("tensor", "fsdp")
    assert batch_in.tokens.spec[0] == ("data", "fsdp")
    text = compiled.as_text()
    assert "all-reduce" in text or "reduce-scatter" in text


def test_accumulated_microbatches_equal_the_big_batch(one_device):
    _, metrics, _ = run_steps(eight_rows(train__accumulation_steps=4), 2)
    for ours, theirs in zip(metrics, one_device[1], strict=False):
        np.testing.assert_allclose(ours.loss, theirs.loss, rtol=1e-5)
        assert ours.gradient_norms.keys() == theirs.gradient_norms.keys() != set()
        for group, norm in ours.gradient_norms.items():
            np.testing.assert_allclose(norm, theirs.gradient_norms[group], rtol=1e-4)
        for name in ("text", "visual", "within_spread"):
            np.testing.assert_allclose(ours.sums[name], theirs.sums[name], rtol=1e-4)
            np.testing.assert_array_equal(ours.counts[name], theirs.counts[name])


@pytest.mark.slow
def test_each_replicate_equals_the_single_run_with_its_seed():
    _, many, _ = run_steps(eight_rows(train__num_replicates=2), 3)
    for replicate in range(2):
        _, single, _ = run_steps(eight_rows(seed=replicate), 3)
        np.testing.assert_allclose([m.loss[replicate] for m in many], [m.loss for m in single], rtol=1e-5)
    assert many[0].loss[0] != many[0].loss[1]


def test_objectives_share_the_initial_values_of_common_components():
    states = {}
    for objective in ("understanding", "semantic_input", "semantic_encoder"):
        config = eight_rows(objective=objective)
        states[objective] = step.init_state(config, make_mesh(config.mesh)).params
    for objective in ("semantic_input", "semantic_encoder"):
        for name, tree in states["understanding"].items():
            jax.tree.map(np.testing.assert_array_equal, tree, states[objective][name])
    other = step.init_state(eight_rows(seed=1), make_mesh(eight_rows().mesh)).params
    assert not np.array_equal(other["decoder"]["embedding"], states["understanding"]["decoder"]["embedding"])


def test_a_gradient_that_is_not_finite_changes_nothing_but_the_counters():
    config = eight_rows()
    mesh = make_mesh(config.mesh)
    state = step.init_state(config, mesh)
    poisoned = jax.tree.map(jnp.copy, state.params)
    poisoned["semantic_head"]["mlp"]["down"]["bias"] = poisoned["semantic_head"]["mlp"]["down"]["bias"] + jnp.nan
    bad = TrainState(state.step, poisoned, state.ema, state.opt_state, state.skipped, state.consecutive_skips)
    before = jax.device_get(bad)
    after, metrics = jax.jit(step.make_train_step(config))(bad, small.mixed_batch(0, 8))
    assert not metrics.finite
    assert (int(after.step), int(after.skipped), int(after.consecutive_skips)) == (1, 1, 1)
    for name in ("params", "ema", "opt_state"):
        jax.tree.map(np.testing.assert_array_equal, getattr(before, name), jax.device_get(getattr(after, name)))
