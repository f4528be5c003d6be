"""What the compiled train step allocates, by XLA's own figures: nothing here is run."""

import dataclasses
import json

import jax
import numpy as np
import pytest
import small
from conftest import make_tiny_config

from benchmarks import memory
from unihetero_jax import optim, step
from unihetero_jax.sharding import make_mesh, to_global


def memory_of(config, row_tokens=40, row_patches=40):
    """(XLA's analysis of the compiled step, abstract state, bytes of the batch on a device)."""
    mesh = make_mesh(config.mesh)
    rng = np.random.default_rng(0)
    row = small.batch_of([[small.reading(rng), small.drawing(rng)]], row_tokens, row_patches)
    rows = config.train.global_batch_rows
    arrays = {field.name: np.repeat(np.asarray(getattr(row, field.name)), rows, 0) for field in dataclasses.fields(row)}
    arrays["text_loss_mask"] = np.ones_like(arrays["text_loss_mask"])
    state, batch = step.abstract_state(config, mesh), to_global(arrays, mesh)
    analysis = step.compile_train_step(config, mesh).lower(state, batch).compile().memory_analysis()
    return analysis, state, sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(batch))


def bytes_on_a_device(tree):
    return sum(np.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree))


@pytest.mark.parametrize(
    "mesh", [{}, pytest.param({"mesh__data": 2, "mesh__fsdp": 2, "mesh__tensor": 2}, marks=pytest.mark.slow)]
)
def test_every_byte_of_the_state_is_donated(mesh):
    analysis, state, _ = memory_of(make_tiny_config(**mesh, train__global_batch_rows=8))
    assert bytes_on_a_device(state.ema) > 0 and bytes_on_a_device(state.opt_state) > bytes_on_a_device(state.params)
    assert analysis.alias_size_in_bytes == bytes_on_a_device(state)


@pytest.mark.slow
def test_accumulation_adds_one_gradient_and_no_copy():
    """Four microbatches against one of the same size: the running total, and the batch dealt out."""
    wide = {
        "model__encoder__num_layers": 1,
        "model__decoder__num_layers": 1,
        "model__decoder__mlp_dim": 8192,
        "model__decoder__vocab_size": 8192,
    }
    one, state, _ = memory_of(make_tiny_config(**wide, train__global_batch_rows=4))
    four, _, batch_bytes = memory_of(make_tiny_config(**wide, train__global_batch_rows=16, train__accumulation_steps=4))
    gradient_bytes = bytes_on_a_device(optim.trainable(state.params, ()))
    added = four.temp_size_in_bytes - one.temp_size_in_bytes
    assert gradient_bytes > 8 * batch_bytes
    assert added <= gradient_bytes + 2 * batch_bytes


@pytest.mark.slow
def test_a_large_vocabulary_costs_memory_only_without_chunks():
    """From 8k to 152k tokens; a single chunk shows that the growth would be seen."""

    def temporary_bytes(vocab_size, chunk):
        config = make_tiny_config(
            objective="understanding", train__global_batch_rows=32, model__decoder__vocab_size=vocab_size,
            loss__text_chunk=chunk,
        )  # fmt: skip
        return memory_of(config, row_tokens=256)[0].temp_size_in_bytes

    before, after, whole = temporary_bytes(8192, 16), temporary_bytes(152064, 16), temporary_bytes(152064, 10**6)
    assert after <= 1.5 * before < whole / 10


def test_the_page_about_memory_has_the_tables_of_the_results(repo_root):
    results = json.loads((repo_root / "benchmarks" / "results" / "memory.json").read_text())
    assert memory.page(results) in (repo_root / "docs" / "memory.md").read_text()
