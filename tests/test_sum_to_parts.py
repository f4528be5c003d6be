"""Sums over devices of which each keeps a part, whole and in pieces, against the plain sum."""

import jax
import numpy as np
import pytest

from unihetero_jax import sharding
from unihetero_jax.config import MeshConfig

MESHES = {"fsdp": MeshConfig(1, 8, 1, 1), "data x fsdp": MeshConfig(2, 4, 1, 1), "x tensor": MeshConfig(2, 2, 2, 1)}


@pytest.mark.parametrize("mesh", MESHES.values(), ids=MESHES)
@pytest.mark.parametrize("limit", [2**28, 0], ids=["at once", "in pieces"])
@pytest.mark.parametrize("axes", [("vocab", "embed"), ("embed", "vocab"), ("replicated", "embed", "replicated")])
def test_every_device_keeps_its_part_of_the_sum(monkeypatch, mesh, limit, axes):
    """Each device adds its own row number to a table; integers, so the order of the sum does not matter."""
    monkeypatch.setattr(sharding, "IN_PIECES_ABOVE", limit)
    shape = (64, 16, 3)[: len(axes)]
    rows = np.arange(8, dtype=np.float32)
    table = np.random.default_rng(0).integers(0, 9, shape).astype(np.float32)
    # Along tensor the table is split already, in the dimension that is named vocab.
    split = tuple("vocab" if name == "vocab" else "replicated" for name in axes)

    def add(rows, table):
        return (sharding.sum_to_parts(table * rows.sum(), ("batch",), axes),)

    on_mesh = sharding.make_mesh(mesh)

    @jax.jit
    def summed(rows, table):
        with sharding.activation_mesh(on_mesh):
            return sharding.by_device(add, (("batch",), split), (axes,))(rows, table)[0]

    np.testing.assert_array_equal(np.asarray(summed(rows, table)), table * rows.sum())
