"""Converts one raw set to a prepared folder.

python -m data_pipelines.convert llava --input train.json --images=images.zip --output=data/mine --tokenizer=data/tok
python -m data_pipelines.convert parquet --input 'train-*.parquet' --label-column=label --output=... --tokenizer=...
python -m data_pipelines.convert text --input notes.txt --output=... --tokenizer=data/tok --train-tokenizer=4096
"""

import argparse
import sys
from collections.abc import Sequence

from data_pipelines.beam_runner import run_on_beam
from data_pipelines.entries import Filters, texts_of
from data_pipelines.layouts import LAYOUTS, expand
from data_pipelines.preparation import Preparation, run_locally
from data_pipelines.prepared import Folder
from data_pipelines.spec_flags import add_spec_flags, spec_from_flags
from data_pipelines.writer import About, require_absent, require_writable
from unihetero_jax.data.records import index_key
from unihetero_jax.data.tokenizer import load_tokenizer, train_tokenizer
from unihetero_jax.storage import to_local, to_path


def _parser() -> argparse.ArgumentParser:
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--input", nargs="+", required=True, help="files, patterns, or folders where a layout has them")
    common.add_argument("--val-input", nargs="+", default=[], help="files of the validation split, if the set has one")
    common.add_argument("--val-share", type=float, default=0.01, help="share of records for validation otherwise")
    common.add_argument("--output", required=True, help="prepared folder to make")
    common.add_argument(
        "--source",
        default="",
        help="name kept in records, whose order follows from it too; default: the output folder's",
    )
    common.add_argument("--licence", default="not stated")
    common.add_argument("--tokenizer", required=True, help="folder with a tokenizer.json")
    common.add_argument("--train-tokenizer", type=int, default=0, metavar="VOCAB",
                        help="train a byte-level BPE on the input into the --tokenizer folder first")  # fmt: skip
    common.add_argument("--num-shards", type=int, default=4, help="files per split")
    common.add_argument("--keep-duplicates", action="store_true", help="keep records of equal text and image bytes")
    common.add_argument("--min-side", type=int, default=Filters.min_side, help="of every image, pixels")
    common.add_argument("--max-aspect", type=float, default=Filters.max_aspect, help="of every image; 0: no limit")
    common.add_argument("--min-text", type=int, default=Filters.min_chars, help="characters of a record")
    common.add_argument("--max-text", type=int, default=Filters.max_chars, help="characters of a record; 0: no limit")
    common.add_argument("--workers", type=int, default=1, help="processes of this machine that read and check")
    common.add_argument("--runner", default="", help="run on Apache Beam instead: DirectRunner, DataflowRunner, ...; "
                        "what the runner needs follows after --")  # fmt: skip
    add_spec_flags(common)
    summary = (__doc__ or "").split("\n")[0]
    parser = argparse.ArgumentParser(prog="python -m data_pipelines.convert", description=summary)
    layouts = parser.add_subparsers(dest="layout", required=True)
    for name, layout in LAYOUTS.items():
        layout.add_flags(layouts.add_parser(name, parents=[common], help=layout.summary))
    return parser


def _convert(flags: argparse.Namespace, runner_flags: Sequence[str]) -> None:
    output = to_path(flags.output)
    require_absent(output)
    require_writable(output)
    if not 0 <= flags.val_share < 1:
        raise ValueError(f"--val-share: {flags.val_share} must lie in [0, 1)")
    for name in ("num_shards", "workers"):
        if getattr(flags, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')}: {getattr(flags, name)} must be positive")
    if runner_flags and not flags.runner:
        raise ValueError(f"{' '.join(runner_flags)}: flags of a runner need --runner")
    job = _preparation(flags, output)
    if flags.runner:
        run_on_beam(job, output, flags.runner, runner_flags)
    else:
        run_locally(job, output, flags.workers)


def _preparation(flags: argparse.Namespace, output: Folder) -> Preparation:
    source, spec = flags.source or output.name, spec_from_flags(flags)
    files, val_files = expand(flags.input, "--input"), expand(flags.val_input, "--val-input")
    read = LAYOUTS[flags.layout].reader(flags, source)
    if flags.train_tokenizer:
        if (to_local(flags.tokenizer, "--train-tokenizer: --tokenizer") / "tokenizer.json").exists():
            raise ValueError(f"--train-tokenizer: {flags.tokenizer} has a tokenizer; leave the flag out to use it")
        tokenizer = train_tokenizer(texts_of(read(files)), flags.train_tokenizer, flags.tokenizer)
    else:
        tokenizer = load_tokenizer(flags.tokenizer)
    own = {name.removeprefix("val_"): value for name, value in vars(flags).items()
           if name in ("val_images", "val_split") and value}  # fmt: skip
    how_it_ran = ("output", "tokenizer", "workers", "runner")
    settings = {name: value for name, value in vars(flags).items() if name not in how_it_ran}
    about = About(source, flags.licence, index_key(tokenizer.hash, spec), settings | {"tokenizer": tokenizer.hash})
    return Preparation(
        layout=flags.layout, flags=vars(flags), val_flags=vars(flags) | own, source=source, files=tuple(files),
        val_files=tuple(val_files), tokenizer_folder=flags.tokenizer, spec=spec,
        filters=Filters(flags.min_side, flags.max_aspect, flags.min_text, flags.max_text),
        val_share=0.0 if val_files else flags.val_share, keep_duplicates=flags.keep_duplicates,
        num_shards=flags.num_shards, about=about,
    )  # fmt: skip


def _split_at_dashes(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """What stands before and after the first `--`."""
    at = list(arguments).index("--") if "--" in arguments else len(arguments)
    return list(arguments[:at]), list(arguments[at + 1 :])


def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit code."""
    try:
        arguments = sys.argv[1:] if arguments is None else arguments
        own, runner_flags = _split_at_dashes(arguments)
        _convert(_parser().parse_args(own), runner_flags)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
