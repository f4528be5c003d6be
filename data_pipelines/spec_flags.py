"""Command-line flags that every preparation shares: the image spec, which the index of lengths is made for."""

import argparse

from unihetero_jax.data.records import MERGE_SIZE, ImageSpec


def add_spec_flags(parser: argparse.ArgumentParser, min_patches: int = 36, max_patches: int = 36) -> None:
    """Adds --patch-size, --min-patches and --max-patches; the defaults are those of experiments/base.py."""
    parser.add_argument("--patch-size", type=int, default=8, help="model.encoder.patch_size")
    parser.add_argument("--min-patches", type=int, default=min_patches, help="data.image_min_patches")
    parser.add_argument("--max-patches", type=int, default=max_patches, help="data.image_max_patches")


def spec_from_flags(flags: argparse.Namespace) -> ImageSpec:
    """The image spec that the flags describe.

    Raises:
        ValueError: the numbers make no spec.
    """
    if flags.patch_size < 1:
        raise ValueError(f"--patch-size: {flags.patch_size} must be positive")
    if not MERGE_SIZE**2 <= flags.max_patches or not 1 <= flags.min_patches <= flags.max_patches:
        raise ValueError(
            f"--min-patches {flags.min_patches}, --max-patches {flags.max_patches}: need 1 <= min <= max and max >= "
            f"{MERGE_SIZE**2} (one visual token)"
        )
    return ImageSpec(flags.patch_size, flags.min_patches, flags.max_patches)
