"""Three back ends of attention give one result; the TPU's kernel (interpreted) leaves out what segments leave empty."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small
from conftest import make_tiny_config

from unihetero_jax import step
from unihetero_jax.config import MeshConfig
from unihetero_jax.loaded_run import make_log_probs
from unihetero_jax.model import splash, unihetero
from unihetero_jax.model.attention import (
    attend,
    choose_backend,
    decoder_attention,
    decoder_mask,
    encoder_attention,
    encoder_mask,
    require_segments_alone,
)
from unihetero_jax.objectives import compute_loss, count_targets
from unihetero_jax.sharding import activation_mesh, current_platform, make_mesh, to_global

LENGTHS = ((40, 60, 36, 4, 88), (100, 128, 8), ())
"""Segments of each row, multiples of 4; the last row is all padding."""


def segment_ids(length, rows=LENGTHS, hole=slice(44, 52)):
    """Ids of rows with a hole, as a sample that could not be read leaves it, and padding at the end."""
    ids = np.zeros((len(rows), length), np.int32)
    for row, lengths in enumerate(rows):
        ids[row, : sum(lengths)] = np.repeat(np.arange(1, len(lengths) + 1), lengths)
    ids[:, hole] = 0
    return jnp.asarray(ids)


def arrays(length, heads, groups, head_dim, num_rows=3, seed=0):
    rng = np.random.default_rng(seed)
    shapes: list[tuple[int, ...]] = [(num_rows, length, count, head_dim) for count in (heads, groups, groups)]
    shapes.append((num_rows, length, heads * head_dim))
    return [jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in shapes]


def output_and_gradient(attention, ids, query, key, value, weight):
    """At real positions, which alone count."""
    weight = jnp.where((ids > 0)[..., None], weight, 0.0)

    def total(query, key, value):
        out = attention(query, key, value)
        return jnp.sum(out * weight), out

    (_, out), gradients = jax.jit(jax.value_and_grad(total, (0, 1, 2), has_aux=True))(query, key, value)
    assert all(jnp.isfinite(x).all() for x in (out, *gradients)), "padding may hold anything but NaN"
    return jnp.where((ids > 0)[..., None], out, 0.0), *gradients


KINDS = {
    "decoder": (lambda choice, ids: decoder_attention(choice, ids, jnp.zeros_like(ids)), (4, 2, 16)),
    "encoder": (lambda choice, ids: encoder_attention(choice, ids, False, 128), (2, 2, 72)),
    "causal encoder": (lambda choice, ids: encoder_attention(choice, ids, True, 128), (2, 2, 8)),
}
"""What is attended by, and heads, groups and head width; 72 is that of SigLIP-so400m."""


@pytest.mark.parametrize("backend", ["jax_nn", "splash"])
@pytest.mark.parametrize("kind", KINDS)
def test_back_ends_agree_forward_and_backward(kind, backend):
    """Blocks of 128; 300 positions are no multiple of it."""
    make, shape = KINDS[kind]
    ids = segment_ids(300)
    inputs = arrays(300, *shape)
    expected = output_and_gradient(make("dense", ids), ids, *inputs)
    found = output_and_gradient(make(backend, ids), ids, *inputs)
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=2e-5)


def test_turns_are_branches_for_jax_nn_too():
    ids = segment_ids(64, ((20, 30),), slice(0, 0))
    branches = jnp.asarray([[0] * 8 + [1] * 6 + [2] * 6 + [0] * 44])
    inputs = arrays(64, 4, 2, 8, 1)
    expected = output_and_gradient(decoder_attention("dense", ids, branches), ids, *inputs)
    for ours, theirs in zip(
        output_and_gradient(decoder_attention("jax_nn", ids, branches), ids, *inputs), expected, strict=True
    ):
        np.testing.assert_allclose(ours, theirs, atol=2e-5)


def test_active_blocks_are_the_drawing():
    ids = jnp.array([[1, 1, 1, 1, 1, 2, 2, 2, 2, 2, 3, 3, 0, 0, 0, 0]])
    drawn = """
        x...
        xx..
        .xx.
        ...x
    """
    expected = [[cell == "x" for cell in line] for line in drawn.split()]
    np.testing.assert_array_equal(splash.active_blocks(ids, ids, jnp.arange(16), "causal", 4)[0], expected)
    either_way = np.asarray(expected) | np.asarray(expected).T
    np.testing.assert_array_equal(splash.active_blocks(ids, ids, jnp.arange(16), "full", 4)[0], either_way)


@pytest.mark.parametrize("order", ["causal", "block_causal", "full"])
def test_no_block_with_an_open_entry_is_left_out_and_none_without_is_kept(order):
    """Against the dense mask of random rows; queries in whole or the second half, as under a context axis."""
    rng = np.random.default_rng(0)
    for _ in range(20):
        lengths = [tuple(4 * rng.integers(1, 20, rng.integers(1, 9))) for _ in range(3)]
        ids = segment_ids(640, lengths, slice(0, 0))
        mask = encoder_mask(ids, order == "block_causal") if order != "causal" else decoder_mask(ids, ids * 0)
        for half in (slice(0, 640), slice(320, 640)):
            index, num_blocks = jnp.arange(640)[half], len(range(*half.indices(640))) // 32
            found = np.asarray(splash.active_blocks(ids[:, half], ids, index, order, 32))
            needed = np.asarray(mask)[:, half].reshape(3, num_blocks, 32, 20, 32).any((2, 4))
            own = np.arange(num_blocks)[:, None] + (half.start // 32) == np.arange(20)
            np.testing.assert_array_equal(found, needed | own)
            assert found.sum() < 0.5 * found.size


@pytest.mark.parametrize("max_segment", [100, 129, 130])
@pytest.mark.parametrize("order", ["causal", "full"])
def test_a_bound_on_segments_leaves_room_for_every_active_block_and_no_more(order, max_segment):
    """Segments of the longest length, next to each other and apart, at many offsets; blocks of 128."""
    most = 0
    for start in range(0, 400, 3):
        rows = (
            (start, max_segment, max_segment, max_segment),
            (start, max_segment, min(126, max_segment), max_segment),
        )
        ids = segment_ids(1024, rows, slice(0, start))
        active = splash.active_blocks(ids, ids, jnp.arange(1024), order, 128)
        most = max(most, int(active.sum(1).max()), int(active.sum(2).max()))
    assert most == splash.num_steps(8, 128, order, max_segment) < 8
    assert splash.num_steps(8, 128, order, None) == splash.num_steps(8, 128, order, 1024) == 8


def test_blocks_are_small_enough_to_be_skipped():
    """An eighth of a row at most, and no larger than an image can be; T = 8192 has blocks of 512."""
    assert [splash.block_side(n, n, None) for n in (100, 1024, 2048, 4096, 8192)] == [128, 128, 256, 512, 512]
    assert splash.block_side(8192, 8192, 256) == 256 and splash.block_side(8192, 8192, 36) == 128
    assert splash.block_side(8192 - 128, 8192 - 128, None) == 128 and splash.block_side(4096, 8192, None) == 512


def test_visiting_order_packs_active_blocks_and_names_them_in_the_long_row():
    active = jnp.array([[[True, False, True], [False, True, False]], [[False, False, True], [True, True, True]]])
    blocks, is_active = splash.visiting_order(active, 3)
    assert blocks.tolist() == [[[0, 2, 2], [1, 1, 1], [5, 5, 5], [3, 4, 5]]]
    assert is_active.tolist() == [[[1, 1, 0], [1, 0, 0], [1, 0, 0], [1, 1, 1]]]


@pytest.mark.parametrize("kind", KINDS)
def test_skipped_blocks_are_never_touched(kind):
    """NaN in the keys of one segment: 0 x NaN is NaN, so whoever computes with them and masks after shows it."""
    make, shape = KINDS[kind]
    ids = segment_ids(512, ((128, 128, 40, 60),), slice(0, 0))
    assert splash.active_blocks(ids, ids, jnp.arange(512), "full", 128).sum() == 4, "of 16"
    query, key, value, weight = arrays(512, *shape, num_rows=1)
    poisoned = jnp.where((ids == 2)[..., None, None], jnp.nan, value)

    def touched(choice):
        out = make(choice, ids)(query, key, poisoned)
        return {number for number in range(5) if jnp.isnan(out[ids == number]).any()}

    assert touched("splash") == {2}
    assert touched("dense") == {0, 1, 2, 3, 4}
    weight = jnp.where(((ids > 0) & (ids != 2))[..., None], weight, 0.0)
    gradients = jax.grad(lambda *x: jnp.sum(jnp.where(weight != 0, make("splash", ids)(*x), 0.0) * weight), (0, 1, 2))(
        query, key, poisoned
    )
    for gradient in gradients:
        assert jnp.isfinite(gradient[ids != 2]).all() and jnp.any(gradient[ids == 1] != 0)


def shapes_in(jaxpr):
    """Of every value of a jaxpr and of those within it."""
    for equation in jaxpr.eqns:
        for variable in equation.outvars:
            yield getattr(variable.aval, "shape", ())
        for inner in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                yield from shapes_in(inner)


@pytest.mark.parametrize("backend", ["dense", "splash"])
def test_splash_forms_no_mask(backend):
    """Nowhere in the losses and their gradient is there an array over pairs of positions."""
    changes = {"data__row_tokens": 640, "data__row_patches": 640, "loss__cut_input_gradient": True}
    config = make_tiny_config(model__attention_backend=backend, data__turns="repeated_prefix", **changes)
    params, batch = small.params_of(), small.mixed_batch(0, 1, "repeated_prefix", 640, 640)

    def loss(params):
        counts = count_targets(config, batch)
        return step.loss_terms(config, params, {}, batch, jnp.float32(1), counts).loss

    pairs = {s for s in shapes_in(jax.make_jaxpr(jax.grad(loss))(params).jaxpr) if sum(n >= 640 for n in s) > 1}
    assert bool(pairs) == (backend == "dense"), pairs


@pytest.mark.parametrize("mesh", [MeshConfig(2, 1, 2, 2, 1), MeshConfig(1, 2, 2, 2, 1), MeshConfig(2, 2, 2, 1, 1)])
@pytest.mark.parametrize("kind", ["decoder", "encoder"])
def test_splash_on_eight_devices_equals_dense_on_one(kind, mesh):
    """Rows, heads and (of the decoder) queries are split; 320 positions make halves that are no whole blocks."""
    make, _ = KINDS[kind]
    ids = segment_ids(320, (*LENGTHS, (120, 128)))
    inputs = arrays(320, 4, 2, 8, 4)
    expected = output_and_gradient(make("dense", ids), ids, *inputs)

    def on_mesh(query, key, value):
        with activation_mesh(make_mesh(mesh)):
            return make("splash", ids)(query, key, value)

    for ours, theirs in zip(output_and_gradient(on_mesh, ids, *inputs), expected, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=2e-5)


def losses(config, batch):
    """Named sums and counts, the value of every text target in order, and the gradient, of the mean losses."""
    params = small.params_of()

    def total(params):
        model = unihetero.build(config.model, config.objective, params)
        output = model(batch, config.loss.cut_input_gradient)
        result = compute_loss(config, output, batch, output.vision, jnp.float32(1), count_targets(config, batch))
        return result.loss, (result, output)

    (_, (result, output)), gradient = jax.jit(jax.value_and_grad(total, has_aux=True))(params)
    nll = -jax.nn.log_softmax(output.hidden @ output.unembedding.T)
    nll = np.asarray(jnp.take_along_axis(nll[:, :-1], batch.tokens[:, 1:, None], axis=2)[..., 0])
    return result, nll[np.asarray(batch.text_loss_mask)[:, 1:]], gradient


@pytest.mark.parametrize("cut", [False, True])
def test_branches_and_repeated_prefixes_have_equal_losses_and_gradients(cut):
    changes = {"data__row_tokens": 128, "loss__cut_input_gradient": cut}
    batches = {turns: small.many_turns(turns) for turns in ("branches", "repeated_prefix")}
    assert batches["repeated_prefix"].segment_ids.max() == 8 and batches["branches"].segment_ids.max() == 4
    found = [losses(make_tiny_config(**changes, data__turns=turns), batch) for turns, batch in batches.items()]
    (ours, our_nll, our_gradient), (theirs, their_nll, their_gradient) = found
    assert ours.counts["text"] > 0 and ours.counts["visual"] > 0
    np.testing.assert_allclose(our_nll, their_nll, atol=1e-5)
    for name in ours.sums:
        np.testing.assert_allclose(ours.counts[name], theirs.counts[name], err_msg=name)
        np.testing.assert_allclose(ours.sums[name], theirs.sums[name], rtol=1e-5, atol=1e-5, err_msg=name)
    for one, other in zip(jax.tree.leaves(our_gradient), jax.tree.leaves(their_gradient), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)


@pytest.mark.slow
def test_the_model_with_splash_has_the_losses_and_gradients_of_dense():
    batch = small.many_turns("repeated_prefix")
    found = [
        losses(make_tiny_config(data__row_tokens=128, data__turns="repeated_prefix", model__attention_backend=b), batch)
        for b in ("dense", "splash")
    ]
    (ours, our_nll, our_gradient), (theirs, their_nll, their_gradient) = found
    np.testing.assert_allclose(our_nll, their_nll, atol=1e-5)
    np.testing.assert_allclose(ours.loss, theirs.loss, atol=1e-5)
    for one, other in zip(jax.tree.leaves(our_gradient), jax.tree.leaves(their_gradient), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("backend", "split"), [("jax_nn", "mesh__fsdp"), ("splash", "mesh__fsdp"), ("splash", "mesh__context")]
)
def test_a_step_on_eight_devices_with_another_back_end_equals_dense_on_one(backend, split):
    """With rematerialised layers, whose backward pass runs the kernel again."""
    batch = small.mixed_batch(0, 8, "repeated_prefix")
    host = {field.name: np.asarray(getattr(batch, field.name)) for field in dataclasses.fields(batch)}
    found = []
    for changes in (
        {"model__attention_backend": "dense"},
        {
            "model__attention_backend": backend, "mesh__data": 2, "mesh__tensor": 2, split: 2,
            "model__encoder__remat": "full", "model__decoder__remat": "dots",
        },
    ):  # fmt: skip
        rows = {"train__global_batch_rows": 8, "eval__batch_rows": 8, "data__turns": "repeated_prefix"}
        config = make_tiny_config(**rows, **changes)
        mesh = make_mesh(config.mesh)
        _, metrics = step.compile_train_step(config, mesh)(step.init_state(config, mesh), to_global(host, mesh))
        found.append(jax.device_get((metrics.loss, metrics.gradient_norms, metrics.sums)))
    for one, other in zip(*map(jax.tree.leaves, found), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)


def test_auto_follows_the_devices_of_the_mesh():
    assert [choose_backend("auto", platform) for platform in ("tpu", "gpu", "cpu", None)] == [
        "splash", "jax_nn", "dense", "dense",
    ]  # fmt: skip
    assert choose_backend("splash", "cpu") == "splash" and choose_backend("dense", "tpu") == "dense"
    assert current_platform() is None
    with activation_mesh(make_mesh(MeshConfig(2, 1, 1, 1, 1))):
        assert current_platform() == "cpu"


def test_branches_are_refused_where_the_kernel_would_ignore_them(monkeypatch):
    require_segments_alone("auto", "branches")
    require_segments_alone("splash", "repeated_prefix")
    monkeypatch.setattr("unihetero_jax.model.attention.current_platform", lambda: "tpu")
    require_segments_alone("dense", "branches")
    with pytest.raises(ValueError, match=r"set data\.turns=repeated_prefix, or model\.attention_backend=dense"):
        require_segments_alone("auto", "branches")


def test_an_evaluation_on_a_mesh_refuses_them_too(monkeypatch):
    monkeypatch.setattr("unihetero_jax.model.attention.current_platform", lambda: "tpu")
    batch = small.mixed_batch()
    host = {field.name: np.asarray(getattr(batch, field.name)) for field in dataclasses.fields(batch)}
    with pytest.raises(ValueError, match=r"set data\.turns=repeated_prefix"):
        make_log_probs(make_tiny_config(), small.params_of())(host)


def test_splash_is_refused_on_a_gpu_where_it_would_be_interpreted(monkeypatch):
    monkeypatch.setattr("unihetero_jax.model.attention.current_platform", lambda: "gpu")
    with pytest.raises(ValueError, match="kernel for TPUs"):
        encoder_attention("splash", segment_ids(300), False, 128)


def test_attend_is_kept_for_whatever_mask():
    """The cached path has masks that are no segments."""
    query, key, value, _ = arrays(6, 2, 1, 4, 1)
    mask = jnp.eye(6, dtype=bool)[None]
    out = attend(query, key, value, mask).reshape(1, 6, 2, 4)
    np.testing.assert_allclose(out, jnp.broadcast_to(value, out.shape), atol=1e-6)
