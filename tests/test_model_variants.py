"""The model in bfloat16, the variants of the decoder, and attention, against float32 and plain numpy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small
from conftest import make_tiny_config

from unihetero_jax.inference.generate import decode
from unihetero_jax.inference.rollout import rollout
from unihetero_jax.inference.sampling import GREEDY
from unihetero_jax.model import unihetero
from unihetero_jax.model.attention import attend
from unihetero_jax.objectives import compute_loss, count_targets


def shapes_of(config):
    return jax.eval_shape(lambda: unihetero.init_params(config.model, config.objective, 0))


def random_params(config):
    """Drawn by numpy, which compiles nothing: gains around 1, everything else, biases too, around 0."""
    rng = np.random.default_rng(0)

    def values(path, x):
        return jnp.asarray((path[-1].key == "gain") + 0.2 * rng.standard_normal(x.shape), jnp.float32)

    return jax.tree_util.tree_map_with_path(values, shapes_of(config))


@pytest.fixture(scope="module")
def by_dtype():
    """{dtype: (model output, losses, gradients)} on the same parameters and batch."""
    batch = small.mixed_batch(0, 2)
    found = {}
    for dtype in ("float32", "bfloat16"):
        config = make_tiny_config(
            model__compute_dtype=dtype, model__encoder__num_layers=1, model__decoder__num_layers=1
        )

        def loss(params, config=config):
            output = unihetero.build(config.model, config.objective, params)(batch)
            losses = compute_loss(config, output, batch, output.vision, jnp.float32(0.5), count_targets(config, batch))
            return losses.loss, (output, losses)

        compiled = jax.jit(jax.grad(loss, has_aux=True))
        gradients, (output, losses) = jax.device_get(compiled(random_params(config)))
        found[dtype] = output, losses, gradients
    return found


def test_bfloat16_computes_in_bfloat16_and_comes_close(by_dtype):
    """Its numbers have 8 bits: the error of one is up to 0.2%, of what several layers make of them about 1%."""
    real = np.asarray(small.mixed_batch(0, 2).segment_ids) > 0
    exact, rounded = by_dtype["float32"][0], by_dtype["bfloat16"][0]
    for name in ("hidden", "input_embeddings", "predicted_embeddings"):
        expected, got = getattr(exact, name)[real], getattr(rounded, name)[real]
        assert (expected.dtype, got.dtype) == (np.float32, jnp.bfloat16), name
        error = np.sqrt(np.mean((got.astype(np.float32) - expected) ** 2) / np.mean(expected**2))
        assert 1e-4 < error < 0.015, (name, error)


def test_losses_are_float32_whatever_the_activations_are(by_dtype):
    exact, rounded = by_dtype["float32"][1], by_dtype["bfloat16"][1]
    for name in ("loss", "sums", "counts"):
        for leaf in jax.tree.leaves(getattr(rounded, name)):
            assert leaf.dtype == np.float32 and np.isfinite(leaf).all(), name
    assert rounded.loss != exact.loss and rounded.loss == pytest.approx(exact.loss, rel=0.01)
    assert {"text", "text_by_source", "visual", "within_spread"} <= exact.sums.keys()
    for name, expected in exact.sums.items():
        np.testing.assert_allclose(rounded.sums[name], expected, rtol=0.01, err_msg=name)
        np.testing.assert_array_equal(rounded.counts[name], exact.counts[name])
        assert np.sum(exact.counts[name]) > 0, name


def test_losses_of_bfloat16_activations_are_computed_to_the_last_digit(by_dtype):
    """What the model gives is rounded; the losses of it agree with float64 as those of float32 do."""
    output, losses, _ = by_dtype["bfloat16"]
    batch = jax.device_get(small.mixed_batch(0, 2))
    hidden, predicted, z, table = (
        np.asarray(jnp.asarray(x, jnp.bfloat16)).astype(np.float64)
        for x in (output.hidden, output.predicted_embeddings, output.vision.visual_embeddings, output.unembedding)
    )
    sums = dict.fromkeys(("text", "visual", "visual_copy_previous", "visual_mean_embedding"), 0.0)
    targets = [z[row, batch.visual_index[row, t]] for row, t in np.argwhere(batch.visual_loss_mask)]

    def distance(a, b):
        return 1 - a @ b / np.linalg.norm(a) / np.linalg.norm(b)

    for row, t in np.argwhere(batch.text_loss_mask):
        logits = table @ hidden[row, t - 1]
        sums["text"] += np.log(np.exp(logits - logits.max()).sum()) + logits.max() - logits[batch.tokens[row, t]]
    for row, t in np.argwhere(batch.visual_loss_mask):
        target, previous = (z[row, batch.visual_index[row, at]] for at in (t, t - 1))
        sums["visual"] += distance(predicted[row, t - 1], target)
        sums["visual_mean_embedding"] += distance(np.mean(targets, axis=0), target)
        sums["visual_copy_previous"] += distance(previous, target) if batch.visual_mask[row, t - 1] else 0
    for name, expected in sums.items():
        assert losses.sums[name] == pytest.approx(expected, rel=1e-5), name


def test_parameters_stay_float32_and_bfloat16_gradients_point_the_same_way(by_dtype):
    config = make_tiny_config(model__compute_dtype="bfloat16")
    assert {x.dtype for x in jax.tree.leaves(shapes_of(config))} == {np.dtype(np.float32)}
    for component, exact in by_dtype["float32"][2].items():
        rounded = by_dtype["bfloat16"][2][component]
        assert {x.dtype for x in jax.tree.leaves(rounded)} == {np.dtype(np.float32)}
        a, b = (np.concatenate([x.ravel() for x in jax.tree.leaves(tree)]) for tree in (exact, rounded))
        cosine = a @ b / np.linalg.norm(a) / np.linalg.norm(b)
        assert 0.999 < cosine < 1 - 1e-7, (component, cosine)
        assert np.linalg.norm(b) == pytest.approx(np.linalg.norm(a), rel=0.01), component


@pytest.mark.parametrize("objective", ["semantic_input", "semantic_encoder"])
def test_generation_and_rollout_carry_bfloat16_through_their_loops(objective):
    """A loop whose carry changes its dtype is refused when it is traced, so nothing need be compiled."""
    config = make_tiny_config(model__compute_dtype="bfloat16", objective=objective)
    batch = small.batch_of([[small.writing(np.random.default_rng(0))]], row_tokens=8, row_patches=4)
    tokens, log_probs = jax.eval_shape(
        lambda params: decode(config, params, batch, jax.random.key(0), 5, small.EOS, (), GREEDY), shapes_of(config)
    )
    assert (tokens.shape, tokens.dtype, log_probs.dtype) == ((1, 5), jnp.int32, jnp.float32)
    rolled = jax.eval_shape(lambda params: rollout(config, params, batch, 3, jax.random.key(0)), shapes_of(config))
    rolled = rolled.embeddings
    assert (rolled.shape, rolled.dtype) == ((1, 3, 32), jnp.bfloat16)


OTHER = {"model__decoder__qkv_bias": True, "model__decoder__qk_norm": False, "model__decoder__tied_embeddings": False}
"""As in Qwen2 and Llama; the default is as in Qwen3."""
DEFAULT: dict[str, bool] = {}


def test_variants_have_the_parameters_that_their_names_say():
    default, other = (shapes_of(make_tiny_config(**variant))["decoder"] for variant in (DEFAULT, OTHER))
    common = {"embedding", "grid_height", "grid_width", "blocks", "norm"}
    assert default.keys() == common and other.keys() == common | {"output"}
    assert other["output"].shape == other["embedding"].shape == (64, 32)

    def attention(decoder):
        return {f"{map_}.{name}" for map_, tree in decoder["blocks"]["attention"].items() for name in tree}

    kernels = {"query.kernel", "key.kernel", "value.kernel", "out.kernel"}
    assert attention(default) == kernels | {"query_norm.gain", "key_norm.gain"}
    assert attention(other) == kernels | {"query.bias", "key.bias", "value.bias"}
    biases = [other["blocks"]["attention"][name]["bias"].shape for name in ("query", "key", "value")]
    assert biases == [(2, 4 * 8), (2, 2 * 8), (2, 2 * 8)], "layers, heads x head_dim"


@pytest.mark.parametrize("variant", [DEFAULT, OTHER])
def test_every_parameter_of_a_variant_has_a_logical_axis_for_each_dimension(variant):
    config = make_tiny_config(**variant)
    axes = unihetero.logical_axes(config.model, config.objective)
    ranks = jax.tree.map(len, axes, is_leaf=lambda x: isinstance(x, tuple))
    assert ranks == jax.tree.map(lambda x: x.ndim, shapes_of(config))
    if variant is OTHER:
        attention = axes["decoder"]["blocks"]["attention"]
        assert attention["query"]["bias"] == attention["value"]["bias"] == ("layers", "heads")
        assert axes["decoder"]["output"] == ("vocab", "embed")


THETA, EPSILON = 50.0, 0.05


def rms_norm(x, gain):
    return x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + EPSILON) * gain


def rotary(x, positions):
    """Value i of the first half of a head and value i of the second are a complex number, turned by the position."""
    half = x.shape[-1] // 2
    angle = positions[:, None, None] * THETA ** (-np.arange(half) / half)
    turned = (x[..., :half] + 1j * x[..., half:]) * np.exp(1j * angle)
    return np.concatenate([turned.real, turned.imag], axis=-1)


def softmax_attention(query, key, value, mask):
    """[T, H, d] against [K, G, d]; head h reads key/value head h // (H / G)."""
    outputs = []
    for head in range(query.shape[1]):
        group = head * key.shape[1] // query.shape[1]
        scores = np.where(mask, query[:, head] @ key[:, group].T / np.sqrt(query.shape[-1]), -np.inf)
        weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
        outputs.append(weights / weights.sum(axis=-1, keepdims=True) @ value[:, group])
    return np.concatenate(outputs, axis=-1)


def numpy_block(params, x, positions, mask, head_dim):
    """One decoder block on one row [T, D], in float64."""
    attention, mlp = params["attention"], params["mlp"]
    normed = rms_norm(x, params["attention_norm"]["gain"])
    query, key, value = (
        (normed @ attention[name]["kernel"] + attention[name].get("bias", 0)).reshape(len(x), -1, head_dim)
        for name in ("query", "key", "value")
    )
    if "query_norm" in attention:
        query, key = rms_norm(query, attention["query_norm"]["gain"]), rms_norm(key, attention["key_norm"]["gain"])
    query, key = rotary(query, positions), rotary(key, positions)
    x = x + softmax_attention(query, key, value, mask) @ attention["out"]["kernel"]
    normed = rms_norm(x, params["mlp_norm"]["gain"])
    gate = normed @ mlp["gate"]["kernel"]
    return x + (gate / (1 + np.exp(-gate)) * (normed @ mlp["up"]["kernel"])) @ mlp["down"]["kernel"]


@pytest.mark.parametrize("variant", [DEFAULT, OTHER])
def test_the_decoder_is_its_blocks_in_numpy(variant):
    """Two layers, two rows with positions and masks of their own."""
    config = make_tiny_config(model__decoder__rope_theta=THETA, model__decoder__norm_eps=EPSILON, **variant)
    params = random_params(config)
    rng = np.random.default_rng(1)
    x = rng.standard_normal((2, 6, 32)).astype(np.float32)
    positions = rng.integers(0, 20, (2, 6)).astype(np.int32)
    mask = (rng.random((2, 6, 6)) < 0.6) | np.eye(6, dtype=bool)

    @jax.jit
    def forward(params, x, positions, mask):
        model = unihetero.build(config.model, config.objective, params)
        return model.decoder(x, positions, functools.partial(attend, mask=mask)), model.decoder.unembedding

    hidden, unembedding = forward(params, x, positions, mask)
    decoder = jax.tree.map(lambda x: np.asarray(x, np.float64), params["decoder"])
    for row in range(2):
        expected = x[row].astype(np.float64)
        for layer in range(2):
            block = jax.tree.map(lambda x, layer=layer: x[layer], decoder["blocks"])
            expected = numpy_block(block, expected, positions[row], mask[row], head_dim=8)
        np.testing.assert_allclose(hidden[row], rms_norm(expected, decoder["norm"]["gain"]), atol=1e-5)
    np.testing.assert_array_equal(unembedding, params["decoder"]["output" if variant else "embedding"])


def heads(num_heads, num_groups, scale=1.0, num_queries=5, num_keys=7):
    """Queries, keys and values; a mask under which every query sees a key; a direction in the space of outputs."""
    rng = np.random.default_rng(2)
    query = scale * rng.standard_normal((2, num_queries, num_heads, 6))
    key, value = rng.standard_normal((2, 2, num_keys, num_groups, 6))
    mask = rng.random((2, num_queries, num_keys)) < 0.5
    mask[..., 3] |= ~mask.any(axis=-1)
    direction = rng.standard_normal((2, num_queries, num_heads * 6))
    return [x.astype(np.float32) for x in (query, key, value)], mask, direction.astype(np.float32)


@jax.jit
def attend_and_differentiate(query, key, value, mask, direction):
    """The output of `attend`, and the gradients of its product with `direction`."""

    def product(*arrays):
        out = attend(*arrays, mask)
        return jnp.vdot(out, direction), out

    gradients, out = jax.grad(product, (0, 1, 2), has_aux=True)(query, key, value)
    return out, gradients


@pytest.mark.parametrize("scale", [1.0, 1000.0])
@pytest.mark.parametrize(("num_heads", "num_groups"), [(4, 2), (3, 1)])
def test_attention_is_a_masked_softmax(num_heads, num_groups, scale):
    """Of scores of ordinary size and of thousands, whose exponentials no float holds."""
    arrays, mask, direction = heads(num_heads, num_groups, scale)
    ours, gradients = attend_and_differentiate(*arrays, mask, direction)
    assert ours.shape == (2, 5, num_heads * 6)
    for row in range(2):
        expected = softmax_attention(*(np.asarray(x[row], np.float64) for x in arrays), mask[row])
        np.testing.assert_allclose(ours[row], expected, atol=1e-5 if scale == 1 else 1e-3)
    assert all(np.isfinite(x).all() for x in gradients)


def test_gradients_of_attention_are_those_of_jax():
    arrays, mask, direction = heads(4, 2)

    @jax.jit
    def reference(*arrays):
        out = jax.nn.dot_product_attention(*arrays, mask=mask[:, None])
        return jnp.vdot(out.reshape(direction.shape), direction)

    _, gradients = attend_and_differentiate(*arrays, mask, direction)
    for ours, theirs in zip(gradients, jax.grad(reference, (0, 1, 2))(*arrays), strict=True):
        assert np.abs(theirs).max() > 0.1
        np.testing.assert_allclose(ours, theirs, atol=1e-5)


def test_a_position_that_sees_nothing_gets_finite_values_and_disturbs_no_other():
    """No loss is taken at such a position: with none, gradients are what they were; with one, they are finite still."""
    arrays, mask, direction = heads(4, 2)
    blind, others = mask.copy(), np.ones((2, 5), bool)
    blind[0, 2] = others[0, 2] = False
    elsewhere = np.where(others[..., None], direction, 0)
    usual, expected = attend_and_differentiate(*arrays, mask, elsewhere)
    out, gradients = attend_and_differentiate(*arrays, blind, elsewhere)
    assert np.isfinite(out).all()
    np.testing.assert_array_equal(out[others], usual[others])
    jax.tree.map(np.testing.assert_array_equal, gradients, expected)
    _, through = attend_and_differentiate(*arrays, blind, direction)
    assert all(np.isfinite(x).all() for x in through)
