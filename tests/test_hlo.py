"""Collectives of compiled programs: literal HLO with sums by hand, and a real compiled FSDP scan in closed form."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from unihetero_jax.hlo import UnknownTripCount, by_operation, read_collectives, totals_by_kind

LOOP = """HloModule jit_step, is_scheduled=true

%add (x: f32[], y: f32[]) -> f32[] {
  %x = f32[] parameter(0)
  %y = f32[] parameter(1)
  ROOT %sum = f32[] add(%x, %y)
}

%inner_body (p.1: (s32[], f32[8,4])) -> (s32[], f32[8,4]) {
  %p.1 = (s32[], f32[8,4]{1,0}) parameter(0)
  %i.1 = s32[] get-tuple-element(%p.1), index=0
  %v.1 = f32[8,4]{1,0} get-tuple-element(%p.1), index=1
  %one.1 = s32[] constant(1)
  %next.1 = s32[] add(%i.1, %one.1)
  %reduced = f32[8,4]{1,0} all-reduce(%v.1), channel_id=1, replica_groups=[2,4]<=[4,2]T(1,0), to_apply=%add, metadata={op_name="inner"}
  ROOT %t.1 = (s32[], f32[8,4]{1,0}) tuple(%next.1, %reduced)
}

%inner_condition (p.2: (s32[], f32[8,4])) -> pred[] {
  %p.2 = (s32[], f32[8,4]{1,0}) parameter(0)
  %i.2 = s32[] get-tuple-element(%p.2), index=0
  %n.2 = s32[] constant(5)
  ROOT %less.2 = pred[] compare(%i.2, %n.2), direction=LT
}

%async_collective_fusion.1 (q: f32[2,4]) -> f32[16,4] {
  %q = f32[2,4]{1,0} parameter(0)
  ROOT %gathered = f32[16,4]{1,0} all-gather(%q), channel_id=2, replica_groups=mesh['a'=1,'b'=8] {'b'}, dimensions={0}, metadata={op_name="weights"}
}

%async_collective_fusion.2 (q.1: f32[2,4]) -> f32[16,4] {
  %q.1 = f32[2,4]{1,0} parameter(0)
  ROOT %gathered.1 = f32[16,4]{1,0} all-gather(%q.1), channel_id=2, replica_groups=mesh['a'=1,'b'=8] {'b'}, dimensions={0}, metadata={op_name="weights"}
}

%outer_body (p.3: (s32[], f32[8,4], f32[2,4])) -> (s32[], f32[8,4], f32[2,4]) {
  %p.3 = (s32[], f32[8,4]{1,0}, f32[2,4]{1,0}) parameter(0)
  %i.3 = s32[] get-tuple-element(%p.3), index=0
  %v.3 = f32[8,4]{1,0} get-tuple-element(%p.3), index=1
  %w.3 = f32[2,4]{1,0} get-tuple-element(%p.3), index=2
  %one.3 = s32[] constant(1)
  %next.3 = s32[] add(%i.3, %one.3)
  %start = f32[16,4]{1,0} fusion(%w.3), kind=kCustom, calls=%async_collective_fusion.1
  %done = f32[16,4]{1,0} fusion(%w.3), kind=kCustom, calls=%async_collective_fusion.2
  %zero.3 = s32[] constant(0)
  %init = (s32[], f32[8,4]{1,0}) tuple(%zero.3, %v.3)
  %loop = (s32[], f32[8,4]{1,0}) while(%init), condition=%inner_condition, body=%inner_body
  %out = f32[8,4]{1,0} get-tuple-element(%loop), index=1
  ROOT %t.3 = (s32[], f32[8,4]{1,0}, f32[2,4]{1,0}) tuple(%next.3, %out, %w.3)
}

%outer_condition (p.4: (s32[], f32[8,4], f32[2,4])) -> pred[] {
  %p.4 = (s32[], f32[8,4]{1,0}, f32[2,4]{1,0}) parameter(0)
  %i.4 = s32[] get-tuple-element(%p.4), index=0
  ROOT %less.4 = pred[] custom-call(%i.4), custom_call_target="opaque"
}

ENTRY %main (a: f32[8,4], b: f32[2,4]) -> f32[8,4] {
  %a = f32[8,4]{1,0} parameter(0)
  %b = f32[2,4]{1,0} parameter(1)
  %zero = s32[] constant(0)
  %begin = (s32[], f32[8,4]{1,0}, f32[2,4]{1,0}) tuple(%zero, %a, %b)
  %layers = (s32[], f32[8,4]{1,0}, f32[2,4]{1,0}) while(%begin), condition=%outer_condition, body=%outer_body, metadata={op_name="layers"}KNOWN
  %x.9 = f32[8,4]{1,0} get-tuple-element(%layers), index=1
  %pair = (f32[8,4]{1,0}, f32[2,4]{1,0}) all-reduce(%x.9, %b), replica_groups={{0,1},{2,3}}, to_apply=%add
  ROOT %result = f32[8,4]{1,0} get-tuple-element(%pair), index=0
}
"""  # noqa: E501
KNOWN = LOOP.replace("KNOWN", ', backend_config={"known_trip_count":{"n":"3"}}')
UNKNOWN = LOOP.replace("KNOWN", "")


def test_loops_multiply_and_fusions_are_followed():
    found = {(item.kind, item.op_name): item for item in read_collectives(KNOWN)}
    assert len(found) == 3
    inner = found["all-reduce", "inner"]  # 3 x 5 runs; a group of 4 sends 2 * 3/4 of 128 bytes
    assert (inner.count, inner.group_size, inner.sent_bytes) == (15, 4, 2 * 0.75 * 128)
    assert inner.groups == ((0, 2, 4, 6), (1, 3, 5, 7))  # iota(8) as [4,2], transposed, as [2,4]
    gather = found["all-gather", "weights"]  # the two fusions are parts of one
    assert (gather.count, gather.group_size, gather.array_bytes, gather.sent_bytes) == (3, 8, 256, 256 * 7 / 8)
    assert found["all-reduce", ""].sent_bytes == 2 * 0.5 * (128 + 32)
    totals = totals_by_kind(list(found.values()))
    assert totals["all-reduce"] == {"sent_bytes": 15 * 192 + 160, "runs": 16, "instructions": 2}
    assert list(totals) == ["all-gather", "all-reduce"]
    assert by_operation(list(found.values()), 1) == [("all-reduce", "inner", "f32[8,4]", 15 * 192, 15)]


def test_a_loop_that_stops_by_its_data_needs_a_bound():
    with pytest.raises(UnknownTripCount, match=r"layers.*give an upper bound"):
        read_collectives(UNKNOWN)
    with pytest.raises(UnknownTripCount):
        read_collectives(UNKNOWN, {"another loop": 3})
    bounded = read_collectives(UNKNOWN, {"layers": 7})
    assert sorted((item.op_name, item.count, item.bounded) for item in bounded) == [
        ("", 1, False), ("inner", 35, True), ("weights", 7, True),
    ]  # fmt: skip


def module(line):
    return f"HloModule m\n\nENTRY %main (a: f32[2]) -> f32[2] {{\n  {line}\n}}\n"


@pytest.mark.parametrize(
    ("line", "kind", "array_bytes", "sent_bytes", "group_size"),
    [
        (
            "%x = (bf16[2,8]{1,0}, bf16[16,8]{1,0}) all-gather-start(%a), channel_id=1, replica_groups=[1,8]<=[8]",
            "all-gather", 256, 224, 8,
        ),
        (
            "%x = f32[2]{0:T(128)} reduce-scatter(%a), replica_groups={{0,1,2,3}}, to_apply=%add, dimensions={0}",
            "reduce-scatter", 32, 24, 4,
        ),
        (
            "%x = (bf16[4,4], bf16[4,4], u32[]{:S(2)}, u32[]{:S(2)}) collective-permute-start(%a), channel_id=3, "
            "source_target_pairs={{0,1},{1,0}}",
            "collective-permute", 32, 32, 2,
        ),
        (
            "%x = (f32[1,4]{1,0}, f32[1,4]{1,0}) all-to-all(%a, %b), channel_id=1, replica_groups={{0,1}}",
            "all-to-all", 32, 16, 2,
        ),
        (
            "%x = s8[64] all-gather(%a), replica_groups=mesh['a'=2,'b'=8] {'b':(2)4}, dimensions={0}",
            "all-gather", 64, 48, 4,
        ),
    ],
)  # fmt: skip
def test_forms(line, kind, array_bytes, sent_bytes, group_size):
    (found,) = read_collectives(module(line))
    assert (found.kind, found.array_bytes, found.sent_bytes, found.group_size) == (
        kind, array_bytes, sent_bytes, group_size,
    )  # fmt: skip


def test_part_of_an_axis():
    line = "%x = s8[64] all-gather(%a), replica_groups=mesh['a'=2,'b'=4] {'b':(2)2}, dimensions={0}"
    assert read_collectives(module(line))[0].groups == ((0, 1), (2, 3), (4, 5), (6, 7))
    line = "%x = s8[64] all-gather(%a), replica_groups=mesh['a'=2,'b'=4] {'b':(1)2}, dimensions={0}"
    assert read_collectives(module(line))[0].groups == ((0, 2), (1, 3), (4, 6), (5, 7))
    line = "%x = s8[64] all-gather(%a), replica_groups=mesh['a'=2,'b'=4] {'a'}, dimensions={0}"
    assert read_collectives(module(line))[0].groups == ((0, 4), (1, 5), (2, 6), (3, 7))


def test_devices_in_another_order():
    line = (
        "%x = s8[64] all-gather(%a), replica_groups=mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'b'}, dimensions={0}"
    )
    assert read_collectives(module(line))[0].groups == ((0, 4), (1, 5), (2, 6), (3, 7))


def test_without_groups_all_devices_take_part():
    text = module("%x = f32[2] all-reduce(%a), replica_groups={}, to_apply=%add")
    (found,) = read_collectives(text.replace("HloModule m", "HloModule m, num_partitions=4"))
    assert (found.group_size, found.sent_bytes) == (4, 2 * 8 * 3 / 4)


def test_what_cannot_be_read_is_refused():
    with pytest.raises(ValueError, match="no ENTRY"):
        read_collectives("nothing")
    with pytest.raises(ValueError, match="unknown form: replica_groups=novel"):
        read_collectives(module("%x = f32[2] all-reduce(%a), replica_groups=novel{3}, to_apply=%add"))


@pytest.mark.parametrize("num_layers", [3, 11])
def test_a_compiled_scan_of_sharded_weights_in_closed_form(num_layers):
    """`x <- tanh(x W_l)`, rows and weights split over 8 devices.

    Each W is gathered once forward and once backward, and its gradient summed over the devices.
    """
    mesh = jax.make_mesh((8,), ("fsdp",), axis_types=(AxisType.Auto,))
    dim, rows = 32, 64

    def loss(weights, x):
        return jnp.sum(jax.lax.scan(jax.checkpoint(lambda x, w: (jnp.tanh(x @ w), None)), x, weights)[0] ** 2)

    split_weights = NamedSharding(mesh, PartitionSpec(None, "fsdp"))
    split_rows = NamedSharding(mesh, PartitionSpec("fsdp"))
    step = jax.jit(jax.grad(loss), in_shardings=(split_weights, split_rows), out_shardings=split_weights)
    shapes = jax.ShapeDtypeStruct((num_layers, dim, dim), jnp.float32), jax.ShapeDtypeStruct((rows, dim), jnp.float32)
    found = read_collectives(step.lower(*shapes).compile().as_text())
    one = 4 * dim * dim
    sent = {kind: entry["sent_bytes"] for kind, entry in totals_by_kind(found).items()}
    assert sent.pop("all-gather") == 2 * num_layers * one * 7 / 8
    # XLA sums gradients by an all-reduce on CPUs, inside the loop or once after it.
    assert sent == {"all-reduce": 2 * num_layers * one * 7 / 8}
    assert all(item.group_size == 8 and not item.bounded for item in found)
