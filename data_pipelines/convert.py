"""Converts one raw set to a prepared folder.

python -m data_pipelines.convert llava --input train.json --images=images.zip --output=data/mine --tokenizer=data/tok
python -m data_pipelines.convert parquet --input 'train-*.parquet' --label-column=label --output=... --tokenizer=...
python -m data_pipelines.convert text --input notes.txt --output=... --tokenizer=data/tok --train-tokenizer=4096
"""

import argparse
import glob
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from data_pipelines.hf_parquet import ParquetOptions, read_parquet
from data_pipelines.llava import LlavaOptions, read_llava
from data_pipelines.plain_text import read_text
from data_pipelines.spec_flags import add_spec_flags, spec_from_flags
from data_pipelines.writer import Dropped, write_prepared
from unihetero_jax.data.records import Record, TextSegment
from unihetero_jax.data.tokenizer import load_tokenizer, train_tokenizer

Samples = Iterable[Record | Dropped]


def texts_of(samples: Samples) -> Iterator[str]:
    """All texts of the records among samples, to train a tokenizer on; what is no Unicode in them is left out."""
    for sample in samples:
        if isinstance(sample, Record):
            for segment in sample.segments:
                if isinstance(segment, TextSegment):
                    yield segment.text.encode("utf-8", "ignore").decode()


def _llava_reader(flags: argparse.Namespace, source: str) -> Callable[[Sequence[Path]], Samples]:
    options = LlavaOptions(source, flags.turns, flags.choices, flags.first_turn, flags.last_turn)
    images = Path(flags.images or Path(flags.input[0]).parent)
    return lambda paths: (sample for path in paths for sample in read_llava(path, images, options))


def _parquet_reader(flags: argparse.Namespace, source: str) -> Callable[[Sequence[Path]], Samples]:
    questions = tuple(flags.question) if flags.question else ParquetOptions.questions
    columns = (flags.image_column, flags.caption_column, flags.label_column)
    options = ParquetOptions(source, flags.task, *columns, questions, flags.caption_prompt)
    return lambda paths: read_parquet(paths, options)


def _text_reader(flags: argparse.Namespace, source: str) -> Callable[[Sequence[Path]], Samples]:
    return lambda paths: read_text(paths, source, flags.max_chars)


READERS = {"llava": _llava_reader, "parquet": _parquet_reader, "text": _text_reader}


def _expand(patterns: Sequence[str], flag: str) -> list[Path]:
    paths = [Path(path) for pattern in patterns for path in (sorted(glob.glob(pattern)) or [pattern])]
    if missing := [path for path in paths if not path.is_file()]:
        raise ValueError(f"{flag}: {missing[0]} is not a file")
    return paths


def _parser() -> argparse.ArgumentParser:
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--input", nargs="+", required=True, help="files or patterns")
    common.add_argument("--val-input", nargs="+", default=[], help="files of the validation split, if the set has one")
    common.add_argument("--val-share", type=float, default=0.01, help="share of records for validation otherwise")
    common.add_argument("--output", required=True, help="prepared folder to make")
    common.add_argument("--source", default="", help="name kept in records; default: the output folder's")
    common.add_argument("--licence", default="not stated")
    common.add_argument("--tokenizer", required=True, help="folder with a tokenizer.json")
    common.add_argument("--train-tokenizer", type=int, default=0, metavar="VOCAB",
                        help="train a byte-level BPE on the input into the --tokenizer folder first")  # fmt: skip
    common.add_argument("--num-shards", type=int, default=4, help="files per split")
    add_spec_flags(common)
    summary = (__doc__ or "").split("\n")[0]
    parser = argparse.ArgumentParser(prog="python -m data_pipelines.convert", description=summary)
    layouts = parser.add_subparsers(dest="layout", required=True)
    llava = layouts.add_parser("llava", parents=[common], help="LLaVA JSON and images")
    llava.add_argument("--images", default="", help="folder or zip; default: the input's folder")
    llava.add_argument("--val-images", default="", help="folder or zip of --val-input; default: --images")
    llava.add_argument("--turns", choices=("independent", "dialogue"), default="independent")
    llava.add_argument("--choices", choices=("letter", "text"), default="text", help="answers of multiple-choice turns")
    llava.add_argument("--first-turn", type=int, default=0)
    llava.add_argument("--last-turn", type=int, default=None)
    parquet = layouts.add_parser("parquet", parents=[common], help="Hugging Face parquet")
    parquet.add_argument("--task", choices=("qa", "generation"), default="qa")
    parquet.add_argument("--image-column", default="image")
    parquet.add_argument("--caption-column", default="")
    parquet.add_argument("--label-column", default="")
    parquet.add_argument("--question", action="append", help="wording of the label's question; may be repeated")
    parquet.add_argument("--caption-prompt", default=ParquetOptions.caption_prompt)
    text = layouts.add_parser("text", parents=[common], help="plain text")
    text.add_argument("--max-chars", type=int, default=600, help="characters per document: it must fit a row")
    return parser


def _convert(flags: argparse.Namespace) -> None:
    output = Path(flags.output)
    if output.exists():
        raise ValueError(f"{output} exists; remove it, or name another folder")
    if not 0 <= flags.val_share < 1:
        raise ValueError(f"--val-share: {flags.val_share} must lie in [0, 1)")
    if flags.num_shards < 1:
        raise ValueError(f"--num-shards: {flags.num_shards} must be positive")
    source = flags.source or output.name
    spec = spec_from_flags(flags)
    train, val = _expand(flags.input, "--input"), _expand(flags.val_input, "--val-input")
    read = READERS[flags.layout](flags, source)
    own_images = {"images": flags.val_images} if vars(flags).get("val_images") else {}
    read_val = READERS[flags.layout](argparse.Namespace(**vars(flags) | own_images), source)
    if flags.train_tokenizer:
        if (Path(flags.tokenizer) / "tokenizer.json").exists():
            raise ValueError(f"--train-tokenizer: {flags.tokenizer} has a tokenizer; leave the flag out to use it")
        tokenizer = train_tokenizer(texts_of(read(train)), flags.train_tokenizer, flags.tokenizer)
    else:
        tokenizer = load_tokenizer(flags.tokenizer)
    settings = {name: value for name, value in vars(flags).items() if name not in ("output", "tokenizer")}
    write_prepared(
        read(train), output, source=source, tokenizer=tokenizer, spec=spec, licence=flags.licence,
        val_share=0.0 if val else flags.val_share, val_samples=read_val(val), num_shards=flags.num_shards,
        settings=settings | {"tokenizer": tokenizer.hash},
    )  # fmt: skip


def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit code."""
    try:
        _convert(_parser().parse_args(arguments))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
