"""Connectors: what each computes, what it may see, what trains it, and that rollouts read what training read."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small
from conftest import make_tiny_config
from flax import nnx

from unihetero_jax import flops, gradient_table, step
from unihetero_jax.arrays import NOT_VISUAL, Cache
from unihetero_jax.config import ConfigError, rolls_out
from unihetero_jax.data.packing import ImagePiece, PackedSample, TokenPiece
from unihetero_jax.inference.generate import decode, draw_and_tell
from unihetero_jax.inference.rollout import roll_on, rollout
from unihetero_jax.inference.sampling import GREEDY
from unihetero_jax.model import unihetero
from unihetero_jax.model.connectors import complete_image_mask, query_mask
from unihetero_jax.model.unihetero import build
from unihetero_jax.sharding import activation_mesh, make_mesh, shardings_for, to_global

KINDS = ("resampler", "qformer", "cross_attention")
QUERIES = KINDS[:2]
OTHERS = ("understanding", "pixel_through", "pixel_detached", "unihetero")
NUM_HEADS, NUM_GROUPS = (make_tiny_config().model.decoder.num_heads, make_tiny_config().model.decoder.num_kv_heads)


def connected(kind, **changes):
    return make_tiny_config(model__projector__kind=kind, model__projector__num_heads=2, **changes)


@functools.cache
def params_of(kind, objective="semantic_input"):
    """Initial parameters with noise, so that no zero (a gate's) hides a path."""
    config = connected(kind, objective=objective)
    params = jax.jit(lambda: unihetero.init_params(config.model, objective, 0))()
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda x: x + 0.1 * rng.standard_normal(x.shape).astype(np.float32), params)


@functools.cache
def forward(kind):
    config = connected(kind)
    return jax.jit(
        lambda params, batch, given=None: build(config.model, config.objective, params)(batch, visual_embeddings=given)
    )


# ---------------------------------------------------------------- against numpy


def softmax(x):
    weights = np.exp(x - x.max(axis=-1, keepdims=True))
    return weights / weights.sum(axis=-1, keepdims=True)


def layer_norm(x, p):
    centred = x - x.mean(axis=-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(axis=-1, keepdims=True) + 1e-6) * p["gain"] + p["bias"]


def rms_norm(x, p):
    return x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + 1e-6) * p["gain"]


def linear(x, p):
    return x @ p["kernel"] + p.get("bias", 0.0)


def gelu(x):
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def attention(x, read, p, num_heads=2):
    q, k, v = linear(x, p["query"]), linear(read, p["key"]), linear(read, p["value"])
    heads = [np.split(one, num_heads, axis=-1) for one in (q, k, v)]
    made = [softmax(a @ b.T / np.sqrt(a.shape[-1])) @ c for a, b, c in zip(*heads, strict=True)]
    return linear(np.concatenate(made, axis=-1), p["out"])


def by_numpy(kind, p, features, grid):
    """Visual embeddings of one image, [N, D], from its features [4 N, E]."""
    places = [(y, x) for y in range(grid[0]) for x in range(grid[1])]
    x = np.stack([p["queries"]["row"][y] + p["queries"]["column"][x] for y, x in places])
    for number in range(2):
        block = jax.tree.map(lambda leaf: leaf[number], p["queries"]["blocks"])  # noqa: B023
        if kind == "resampler":
            normed = layer_norm(x, block["norm"])
            read = np.concatenate([layer_norm(features, block["feature_norm"]), normed])
            x = x + attention(normed, read, block["attention"])
        else:
            normed = layer_norm(x, block["self_norm"])
            x = x + attention(normed, normed, block["self_attention"])
            x = x + attention(layer_norm(x, block["norm"]), features, block["attention"])
        mlp = block["mlp"]
        x = x + linear(gelu(linear(layer_norm(x, block["mlp_norm"]), mlp["up"])), mlp["down"])
    return rms_norm(linear(x, p["queries"]["out"]), p["norm"])


@pytest.mark.parametrize("kind", QUERIES)
def test_queries_compute_what_numpy_computes_for_each_image_alone(kind):
    """Packed beside others, of different grids: an image sees itself and nothing else."""
    rng = np.random.default_rng(0)
    grids = ((1, 2), (2, 2), (2, 1))
    batch = small.batch_of([[small.reading(rng, grid, (2,)) for grid in grids]], 60, 48)
    config, params = connected(kind), params_of(kind)
    vision = jax.jit(lambda: build(config.model, config.objective, params).see(batch))()
    numpy_params = jax.tree.map(lambda x: np.asarray(x, np.float64), params["projector"])
    first = 0
    for grid in grids:
        num_tokens = grid[0] * grid[1]
        features = np.asarray(vision.merged[0, first : first + num_tokens], np.float64).reshape(4 * num_tokens, -1)
        expected = by_numpy(kind, numpy_params, features, grid)
        np.testing.assert_allclose(vision.visual_embeddings[0, first : first + num_tokens], expected, atol=2e-5)
        first += num_tokens


def test_a_gated_layer_computes_what_numpy_computes():
    config, params = connected("cross_attention"), params_of("cross_attention")
    model = build(config.model, config.objective, params)
    gated = jax.tree.map(lambda x: np.asarray(x[0], np.float64), params["projector"]["gated"])
    rng = np.random.default_rng(1)
    x, z = (jnp.asarray(rng.standard_normal((1, length, 32)), jnp.float32) for length in (5, 3))
    mask = jnp.array([[[False] * 3, [True, True, False], [True] * 3, [False] * 3, [True, True, False]]])

    graphdef, state = nnx.split(model.projector.gated)
    layer = nnx.merge(graphdef, jax.tree.map(lambda leaf: leaf[0], state))
    found = layer(x, *layer.read(z), mask)[0]

    x, z, mask = (np.asarray(one) for one in (x, z, mask))
    q = linear(rms_norm(x[0], gated["norm"]), gated["query"]).reshape(5, NUM_HEADS, -1)
    k, v = (linear(z[0], gated[name]).reshape(3, NUM_GROUPS, -1) for name in ("key", "value"))
    seen = np.zeros((5, 32))
    for position in range(5):
        open_ = mask[0, position]
        if open_.any():
            groups = [head * NUM_GROUPS // NUM_HEADS for head in range(NUM_HEADS)]
            rows = [
                softmax(q[position, head] @ k[open_, group].T / np.sqrt(q.shape[-1])) @ v[open_, group]
                for head, group in enumerate(groups)
            ]
            seen[position] = linear(np.concatenate(rows), gated["out"])
    expected = x[0] + np.tanh(gated["gate"]) * seen
    normed = rms_norm(expected, gated["mlp_norm"])
    gate, up = linear(normed, gated["mlp"]["gate"]), linear(normed, gated["mlp"]["up"])
    expected = expected + np.tanh(gated["mlp_gate"]) * linear(gate / (1 + np.exp(-gate)) * up, gated["mlp"]["down"])
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_a_fresh_gated_layer_changes_nothing():
    """The model with closed gates reads text as the model without gated layers does."""
    config, plain = connected("cross_attention"), make_tiny_config()
    params = unihetero.init_params(config.model, config.objective, 0)
    own = unihetero.init_params(plain.model, plain.objective, 0)
    batch = small.batch_of([[small.drawing(np.random.default_rng(0))]], 20, 16)
    with_gates = build(config.model, config.objective, params)(batch).hidden
    np.testing.assert_allclose(with_gates, build(plain.model, plain.objective, own)(batch).hidden, atol=1e-6)


# ---------------------------------------------------------------- who sees whom


def test_masks_are_the_drawings():
    drawn = """
        xxxx........
        xxxxxxxx....
        ........xxxx
    """
    expected = [[cell == "x" for cell in line] for line in drawn.split()]
    np.testing.assert_array_equal(query_mask(jnp.array([[1] * 8 + [2] * 4]), True)[0], expected)
    drawn = """
        .........
        .........
        .........
        .xx......
        .xx......
        .xx......
        .xx......
        .xx......
        .xx...xx.
    """
    expected = [[cell == "x" for cell in line] for line in drawn.split()]
    visual = jnp.array([[False, True, True, False, False, False, True, True, False]])
    ones = jnp.ones((1, 9), jnp.int32)
    np.testing.assert_array_equal(complete_image_mask(ones, 0 * ones, visual)[0], expected)


@pytest.mark.parametrize("kind", QUERIES)
def test_with_a_causal_encoder_no_token_holds_a_later_block(kind):
    config = connected(kind, model__encoder__attention="causal")
    params, batch = params_of(kind), small.batch_of([[small.reading(np.random.default_rng(0), (1, 4), (2,))]], 20, 16)
    see = jax.jit(lambda batch: build(config.model, config.objective, params).see(batch).visual_embeddings[0])
    for block in range(4):
        patches = batch.patches.at[0, 4 * block : 4 * block + 4].set(7)
        moved = np.abs(np.asarray(see(dataclasses.replace(batch, patches=patches)) - see(batch))).max(axis=-1)
        assert (moved[:block] == 0).all() and (moved[block:4] > 0).all()


@pytest.mark.parametrize("kind", KINDS)
def test_an_embedding_moves_no_prediction_before_it_and_none_of_another_sample(kind):
    batch = small.mixed_batch(0, 1)
    plain = forward(kind)(params_of(kind), batch)
    segments, given = np.asarray(batch.segment_ids[0]), plain.vision.visual_embeddings
    for position in np.flatnonzero(np.asarray(batch.visual_mask[0])):
        token = int(batch.visual_index[0, position])
        changed = forward(kind)(params_of(kind), batch, given.at[0, token].add(1.0))
        moved = np.abs(np.asarray(changed.predicted_embeddings - plain.predicted_embeddings)).max(axis=-1)[0]
        may_see = (segments == segments[position]) & (np.arange(len(segments)) >= position)
        assert (moved[~may_see & (segments > 0)] == 0).all()
        assert moved[may_see].max() > 0


def test_an_image_that_is_read_is_seen_through_gates_alone():
    """Its places hold the padding token's embedding, the drawn image's its own; with closed gates nothing is seen."""
    params, batch = params_of("cross_attention"), small.mixed_batch(0, 1)
    output = forward("cross_attention")(params, batch)
    x, visual, drawn = output.input_embeddings[0], batch.visual_mask[0], batch.visual_loss_mask[0]
    pad = params["decoder"]["embedding"][small.PAD]
    np.testing.assert_allclose(x[visual & ~drawn], np.broadcast_to(pad, x[visual & ~drawn].shape))
    np.testing.assert_allclose(
        x[drawn], np.asarray(output.vision.visual_embeddings[0])[np.asarray(batch.visual_index[0, drawn])]
    )

    read = np.asarray(batch.segment_ids[0]) == 1

    def moved(params):
        given = output.vision.visual_embeddings
        one, other = (forward("cross_attention")(params, batch, z).hidden[0] for z in (given, -given))
        return np.abs(np.asarray(one - other))[read].max(axis=-1)

    ended = np.flatnonzero(np.asarray(visual) & read)[-1] + 1
    by_position = moved(params)
    assert (by_position[:ended] == 0).all() and (by_position[ended:] > 0).all()
    gated = params["projector"]["gated"]
    gated = {**gated, "gate": jnp.zeros_like(gated["gate"])}
    assert (moved(params | {"projector": {**params["projector"], "gated": gated}}) == 0).all()


def test_both_layouts_of_turns_give_the_same_answers_through_gates():
    params = params_of("cross_attention")
    losses = []
    for turns in ("branches", "repeated_prefix"):
        config, batch = connected("cross_attention", data__turns=turns), small.many_turns(turns)
        counts = step.count_targets(config, batch)
        ema = {name: params[name] for name in ("encoder", "projector")}
        found = jax.jit(lambda c, b, n, e: step.loss_terms(c, params, e, b, jnp.float32(1), n).sums, static_argnums=0)
        losses.append(found(config, batch, counts, ema))
    np.testing.assert_allclose(losses[0]["text"], losses[1]["text"], rtol=1e-5)
    np.testing.assert_allclose(losses[0]["visual"], losses[1]["visual"], rtol=1e-5)


# ---------------------------------------------------------------- what trains


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "objective",
    [*(pytest.param(name, marks=pytest.mark.slow)
       for name in ("understanding", "semantic_input", "pixel_through", "pixel_detached")), "unihetero"],
)  # fmt: skip
def test_the_gradient_table_holds(tmp_path, kind, objective):
    config = connected(kind, objective=objective)
    norms = gradient_table.prove(config, step.loss_terms, tmp_path, report=lambda _: None)
    assert norms["text"]["projector"] > 0


@pytest.mark.parametrize("kind", KINDS)
def test_cutting_inputs_leaves_the_connector_to_text(tmp_path, kind):
    config = connected(kind, loss__cut_input_gradient=True)
    norms = gradient_table.prove(config, step.loss_terms, tmp_path, report=lambda _: None)
    assert norms["visual"]["encoder"] == 0 < norms["text"]["encoder"]
    assert (norms["visual"]["projector"] == 0) == (kind != "cross_attention"), "gated layers lie above what is cut"


@pytest.mark.parametrize("kind", KINDS)
def test_targets_are_those_of_the_averaged_connector(kind):
    config, params, batch = connected(kind), params_of(kind), small.mixed_batch(0, 1)
    counts = step.count_targets(config, batch)

    @jax.jit
    def visual(projector):
        ema = {"encoder": params["encoder"], "projector": projector}
        return step.loss_terms(config, params, ema, batch, jnp.float32(1), counts).sums["visual"]

    other = jax.tree.map(lambda x: x * 1.5 + 0.1, params["projector"])
    assert visual(params["projector"]) != visual(other)


# ---------------------------------------------------------------- rollouts


@pytest.mark.parametrize("kind", KINDS)
def test_a_rollout_that_is_given_all_is_teacher_forcing(kind):
    prompts, whole = small.drawing_prompts_and_truth()
    config, params = connected(kind), params_of(kind)
    output = forward(kind)(params, whole)
    rolled = rollout(config, params, prompts, 4, jax.random.key(0), output.vision, 4).embeddings
    model = build(config.model, config.objective, params)
    predicted = model.projector.rescale(output.predicted_embeddings[:, 4:8])
    np.testing.assert_allclose(rolled, predicted, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_a_free_rollout_is_the_whole_row_fed_with_its_own_predictions(kind):
    prompts, whole = small.drawing_prompts_and_truth()
    config, params = connected(kind), params_of(kind)
    rolled = rollout(config, params, prompts, 4, jax.random.key(0)).embeddings
    again = forward(kind)(params, whole, rolled)
    model = build(config.model, config.objective, params)
    np.testing.assert_allclose(model.projector.rescale(again.predicted_embeddings[:, 4:8]), rolled, atol=1e-5)


def asked_then_drawn(rng):
    """An image that is read, a text, and `<boi>` for a second one: as a prompt, and whole with that image and text."""
    read = [TokenPiece([small.BOI]), ImagePiece(small.picture(rng, 1, 2)), TokenPiece([small.EOI])]
    text, told = small.tokens(rng, 3), small.tokens(rng, 2)
    drawn = ImagePiece(small.picture(rng, 1, 2), True)
    prompt = [*read, text, TokenPiece([small.BOI])]
    return PackedSample(prompt), PackedSample([*prompt, drawn, TokenPiece([small.EOI]), told]), told.ids


@pytest.mark.parametrize(
    "kind",
    [pytest.param(kind, marks=[pytest.mark.slow] * (kind != "cross_attention")) for kind in KINDS],
)
def test_text_after_a_drawn_image_reads_it_and_the_one_before(kind):
    """Interleaved, cached: position by position against the whole row."""
    config, params = connected(kind), params_of(kind)
    prompt, whole, told = asked_then_drawn(np.random.default_rng(3))
    prompts, rows = small.batch_of([[prompt]], 9, 8), small.batch_of([[whole]], 13, 16)
    prompts = dataclasses.replace(prompts, boi_grid=prompts.boi_grid.at[0, 7].set(jnp.array([1, 2])))
    prompts, rows = (
        dataclasses.replace(one, **{name: getattr(one, name)[:, :8] for name in TOKEN_FIELDS})
        if one is prompts
        else one
        for one in (prompts, rows)
    )
    output = forward(kind)(params, rows)
    model = build(config.model, config.objective, params)
    last, cache = model.prefill(prompts, 13)
    assert isinstance(cache, Cache)
    np.testing.assert_allclose(last.text, output.hidden[:, 7], atol=1e-5)
    for number in range(2):
        last, cache = model.decode_step(output.vision.visual_embeddings[:, 2 + number], cache, is_visual=True)
        np.testing.assert_allclose(last.text, output.hidden[:, 8 + number], atol=1e-5)
    for number, token in enumerate([small.EOI, *told]):
        embedded = model.decoder.embed(jnp.array([[token]]), jnp.zeros((1, 1, 2), jnp.int32), model.dtype)[:, 0]
        last, cache = model.decode_step(embedded, cache)
        np.testing.assert_allclose(last.text, output.hidden[:, 10 + number], atol=1e-5)
    drawn, tokens = draw_and_tell(config, params, prompts, jax.random.key(0), 2, small.EOI, 3, small.EOS, (), GREEDY)
    given = jnp.concatenate([output.vision.visual_embeddings[:, :2], drawn, output.vision.visual_embeddings[:, 4:]], 1)
    again = forward(kind)(params, rows, given)
    assert int(tokens[0, 0]) == int(jnp.argmax(again.hidden[0, 10] @ again.unembedding.T)), "what <eoi> says"
    rolled, hidden, seen = roll_on(
        config, model, *model.prefill(prompts, 13), jnp.array([[1, 2]]), 2, jax.random.key(0)
    )
    np.testing.assert_allclose(
        hidden.text, forward(kind)(params, rows, with_last(given, rolled)).hidden[:, 9], atol=1e-5
    )
    if kind == "cross_attention":
        np.testing.assert_array_equal(np.asarray(seen.visual.begun[0, 8:10] < NOT_VISUAL), True)


TOKEN_FIELDS = ("tokens", "positions", "segment_ids", "branch_ids", "source_ids", "text_loss_mask", "visual_mask",
                "visual_index", "visual_loss_mask", "boi_grid")  # fmt: skip


def with_last(given, rolled):
    """Embeddings of a row whose second image is the rollout."""
    return given.at[:, 2:4].set(rolled.embeddings)


@pytest.mark.parametrize("kind", KINDS)
def test_a_cached_answer_is_that_of_the_whole_row(kind):
    """Prompts of different lengths, padded at the end."""
    config, params = connected(kind), params_of(kind)
    rng = np.random.default_rng(2)
    samples = [PackedSample(small.reading(rng, turns=(length,)).pieces[:4]) for length in (5, 2)]
    batch = small.batch_of([[one] for one in samples], 9, 8)
    tokens, log_probs = decode(config, params, batch, jax.random.key(0), 3, small.EOS, (), GREEDY)
    for row, sample in enumerate(samples):
        told = PackedSample([*sample.pieces, TokenPiece(np.asarray(tokens[row]).tolist(), True, 1)])
        whole = small.batch_of([[told]], 16, 8)
        output = forward(kind)(params, whole)
        logits = jax.nn.log_softmax(output.hidden[0] @ output.unembedding.T)
        first = int((whole.segment_ids[0] > 0).sum()) - 3
        for number in range(3):
            expected = logits[first + number - 1, tokens[row, number]]
            if number == 0 or tokens[row, number - 1] != small.EOS:
                np.testing.assert_allclose(log_probs[row, number], expected, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_rollout_on_eight_devices_is_that_on_one(kind):
    config = connected(kind, mesh__fsdp=4, mesh__tensor=2, train__global_batch_rows=8, eval__batch_rows=8)
    params, (prompts, _) = params_of(kind), small.drawing_prompts_and_truth(4)
    one = rollout(connected(kind), params, prompts, 4, jax.random.key(0)).embeddings
    mesh = make_mesh(config.mesh)
    with activation_mesh(mesh):
        split = jax.device_put(params, shardings_for(unihetero.logical_axes(config.model, config.objective), mesh))
        eight = rollout(config, split, to_global(small.host(prompts), mesh), 4, jax.random.key(0)).embeddings
    np.testing.assert_allclose(eight, one, atol=1e-5)


# ---------------------------------------------------------------- counts and refusals


@pytest.mark.parametrize("kind", KINDS)
def test_parameters_are_those_of_the_model_and_pairs_those_of_the_mask(kind):
    config, params = connected(kind), params_of(kind)
    built = sum(x.size for x in jax.tree.leaves(params["projector"]))
    assert flops.parameter_counts(config.model, config.objective)["projector"] == built
    batch = small.many_turns()
    expected = complete_image_mask(batch.segment_ids, batch.branch_ids, batch.visual_mask).sum()
    assert flops.count_work(config, small.host(batch)).cross_pairs == (expected if kind == "cross_attention" else 0)


def test_what_a_connector_cannot_do_is_refused():
    with pytest.raises(ConfigError, match="semantic_encoder has targets of blocks"):
        connected("qformer", objective="semantic_encoder")
    with pytest.raises(ConfigError, match="set eval"):
        connected("resampler", objective="pixel_through", eval__rollout_source="generation")
    assert not rolls_out(connected("resampler", objective="pixel_through"))
    assert rolls_out(connected("cross_attention", objective="pixel_through"))
    with pytest.raises(ConfigError, match="images that are read no inputs"):
        connected("cross_attention", loss__visual_loss_on="all", data__sources=SOURCES)
    with pytest.raises(ConfigError, match="gated layers for one stack"):
        connected("cross_attention", model__visual_branch__split_layer=1)
    with pytest.raises(ConfigError, match="num_heads 3"):
        make_tiny_config(model__projector__kind="resampler", model__projector__num_heads=3)


SOURCES = {"scenes": {"path": "data/scenes", "weight": 1.0, "augment": "none"}}
