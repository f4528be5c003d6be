"""Adds the index of lengths for another tokenizer, image spec or layout of turns to prepared folders.

python -m data_pipelines.index data/real/nlvr --tokenizer=data/real/tokenizer --patch-size=16
"""

import argparse
import sys

from data_pipelines.spec_flags import add_spec_flags, spec_from_flags
from data_pipelines.writer import build_index
from unihetero_jax.data.tokenizer import load_tokenizer
from unihetero_jax.storage import to_path


def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m data_pipelines.index", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("folders", nargs="+", help="prepared folders, local or in a bucket")
    parser.add_argument("--tokenizer", required=True, help="folder with a tokenizer.json")
    add_spec_flags(parser)
    parser.add_argument("--turns", choices=["branches", "repeated_prefix"], default="branches", help="data.turns")
    flags = parser.parse_args(arguments)
    try:
        tokenizer, spec = load_tokenizer(flags.tokenizer), spec_from_flags(flags)
        for folder in map(to_path, flags.folders):
            print(f"{folder}: index {build_index(folder, tokenizer, spec, flags.turns)}")
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
