"""Where arrays lie on a machine, against hand counts; no device of that machine is needed."""

import jax
import pytest

from unihetero_jax import explain
from unihetero_jax.command_line import parse_config_flags
from unihetero_jax.sharding import bytes_per_device, make_mesh
from unihetero_jax.step import abstract_state, init_state
from unihetero_jax.topology import parse_topology

WIDE = {
    "mesh__fsdp": 4, "mesh__tensor": 2, "train__global_batch_rows": 8, "eval__batch_rows": 8,
    "model__decoder__vocab_size": 40_000, "model__decoder__dim": 1024,
}  # fmt: skip


def entries(config, topology):
    topology = parse_topology(topology)
    mesh = explain.abstract_mesh(config, topology)
    return {
        entry.name: entry
        for entry in (
            *explain.parameter_entries(config, mesh),
            *explain.activation_entries(config, mesh, topology.platform),
        )
    }


def test_bytes_by_hand(tiny_config):
    found = entries(tiny_config(**WIDE), "v5e:2x4")
    table = found["decoder.embedding"]
    assert (table.axes, table.spec, table.shape) == (("vocab", "embed"), "tensor, fsdp", (40_000, 1024))
    assert table.bytes_per_device == 4 * 40_000 * 1024 // 8
    hidden = found["decoder: hidden units of a layer"]  # rows over 4 devices, hidden units over 2; float32
    assert (hidden.spec, hidden.bytes_per_device) == ("data+fsdp, context, tensor", 4 * (8 // 4) * 32 * (64 // 2))
    assert found["text loss: logits of a chunk"].bytes_per_device == 4 * 64 * 40_000 // 2
    assert "decoder: attention mask" not in found, "splash has none"
    assert "decoder: attention mask" in entries(tiny_config(**WIDE), "cpu:8")


def test_what_is_replicated_and_large_is_flagged(tiny_config):
    split = entries(tiny_config(**WIDE), "cpu:8")
    assert not any(entry.flag for entry in split.values())
    fields = WIDE | {"mesh__data": 8, "mesh__fsdp": 1, "mesh__tensor": 1}
    flagged = {name for name, entry in entries(tiny_config(**fields), "cpu:8").items() if entry.flag}
    assert flagged == {"decoder.embedding", "text loss: table", "text loss: gradient of the table"}


def test_the_state_is_as_large_as_it_is_said_to_be(tiny_config):
    config = tiny_config(mesh__fsdp=4, mesh__tensor=2, train__global_batch_rows=8, eval__batch_rows=8)
    mesh = make_mesh(config.mesh)
    state = init_state(config, mesh)
    on_first = sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(state))
    assert bytes_per_device(abstract_state(config, mesh)) == on_first
    said = sum(entry.bytes_per_device for entry in explain.parameter_entries(config, explain.abstract_mesh(
        config, parse_topology("cpu:8"))))  # fmt: skip
    assert said == sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(state.params))


def test_a_pod_from_here(repo_root):
    config = parse_config_flags(str(repo_root / "experiments" / "pretrain.py") + ":8b", [])
    text = explain.format_entries(config, parse_topology("v5e-256"))
    assert "v5e:16x16: data 2 x fsdp 128" in text
    assert "decoder.blocks.mlp.gate.kernel" in text and "36 x 4096 x 12288" in text
    # 36 layers x 4096 x 12288 float32, split by 128.
    assert "54.00" in next(line for line in text.splitlines() if line.startswith("decoder.blocks.mlp.gate.kernel"))
    last = text.splitlines()[-1]
    assert last.endswith("text loss: table, text loss: gradient of the table"), last


def test_a_mesh_of_another_size_is_refused(tiny_config):
    with pytest.raises(ValueError, match=r"has 8 devices.* = 1; set them, for example .*--config.mesh.fsdp=8"):
        explain.abstract_mesh(tiny_config(), parse_topology("v5e:2x4"))
