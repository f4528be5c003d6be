"""Machines by name: both spellings, counts by hand, and what is said of a machine that does not exist."""

import pytest

from unihetero_jax.topology import CHIPS, SLICES, parse_topology, spellings


@pytest.mark.parametrize(
    ("by_shape", "by_size", "chips"),
    [
        ("v5e:2x4", "v5e-8", 8), ("v5e:16x16", "v5e-256", 256), ("v6e:16x16", "v6e-256", 256),
        # Sizes of v5p count TensorCores: cloud.google.com/tpu/docs/v5p has 4x4x4 = 128 cores = 64 chips.
        ("v5p:2x2x1", "v5p-8", 4), ("v5p:4x4x4", "v5p-128", 64), ("v5p:8x8x8", "v5p-1024", 512),
    ],
)  # fmt: skip
def test_both_spellings_are_the_same_machine(by_shape, by_size, chips):
    found = parse_topology(by_shape)
    assert found == parse_topology(by_size)
    assert (found.name, found.num_devices, found.platform) == (by_shape, chips, "tpu")


def test_every_slice_has_two_spellings():
    for kind in SLICES:
        for by_shape, by_size in spellings(kind):
            assert parse_topology(by_shape) == parse_topology(by_size)


def test_other_machines():
    assert parse_topology("v5litepod-16") == parse_topology("v5e:4x4")
    assert parse_topology("cpu:8").num_devices == 8 and parse_topology("cpu").num_devices == 1
    assert parse_topology("gpu").num_devices == 0
    server = parse_topology("8xh100")
    assert (server.name, server.num_devices, server.platform, server.chip) == ("8xH100", 8, "gpu", CHIPS["H100"])


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        ("v5e:16x32", "no such slice of v5e; the nearest are v5e:16x16 (= v5e-256)"),
        ("v5e-100", "v5e:8x16 (= v5e-128)"),
        ("v5p-64x", "did you mean v5p-64"),
        ("v5p-4", "v5p:2x2x1 (= v5p-8)"),
        ("v7x:4x4", "unknown machine; did you mean v"),
        ("nothing", "there are TPU slices such as v5e:16x16"),
        ("16xH100", "1xH100 to 8xH100"),
        ("8xB200", "1xH100 to 8xH100"),
        ("cpu:0", "cpu:8"),
    ],
)
def test_an_unknown_machine_is_refused_with_the_near_ones(text, hint):
    with pytest.raises(ValueError) as caught:
        parse_topology(text)
    assert text in str(caught.value) and hint in str(caught.value)


def test_v5p_sizes_are_said_to_count_cores():
    with pytest.raises(ValueError, match="TensorCores, two a chip"):
        parse_topology("v5p-4")
