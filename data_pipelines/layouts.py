"""The raw layouts that `convert` reads: for each its flags, and how it becomes samples.

A new layout is a module with a parse function, and one `Layout` here.
"""

import argparse
import dataclasses
import functools
import glob
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from data_pipelines.caption_tsv import CaptionTsvOptions, read_caption_tsv
from data_pipelines.coco_captions import CocoOptions, read_coco
from data_pipelines.entries import Samples
from data_pipelines.hf_parquet import ParquetOptions, read_parquet
from data_pipelines.image_files import read_image_map
from data_pipelines.image_only import read_image_only
from data_pipelines.interleaved import InterleavedOptions, read_interleaved
from data_pipelines.jsonl import JsonlOptions, read_jsonl, read_text_parquet
from data_pipelines.llava import LlavaOptions, read_llava
from data_pipelines.plain_text import read_text
from data_pipelines.tfds_builder import TfdsOptions, read_tfds
from data_pipelines.web_metadata import WebMetadataOptions, parse_filter, read_web_metadata
from data_pipelines.webdataset import WebdatasetOptions, read_webdataset

Read = Callable[[Sequence[Path]], Samples]
"""Samples of some of the input files, in their order."""


@dataclasses.dataclass(frozen=True)
class Layout:
    """A raw layout.

    Attributes:
        summary: one line for `--help`.
        add_flags: adds the flags that it alone has.
        reader: from the parsed flags and the name of the source to the function that reads files.
        reads_file_by_file: files may be read apart from each other, as by several workers.
    """

    summary: str
    add_flags: Callable[[argparse.ArgumentParser], None]
    reader: Callable[[argparse.Namespace, str], Read]
    reads_file_by_file: bool = True


def expand(patterns: Sequence[str], flag: str) -> list[Path]:
    """Files and folders that patterns stand for, each pattern's in order.

    Raises:
        ValueError: one stands for nothing.
    """
    paths = [Path(path) for pattern in patterns for path in (sorted(glob.glob(pattern)) or [pattern])]
    if missing := [path for path in paths if not path.exists()]:
        raise ValueError(f"{flag}: {missing[0]} does not exist")
    return paths


def _images_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--images", default="", help="folder, zip or tar of images; default: the folder of each input")
    parser.add_argument("--val-images", default="", help="those of --val-input; default: --images")


def _images(flags: argparse.Namespace, path: Path) -> Path:
    """The images of an input file: it may be one of several folders that have images of equal names."""
    return Path(flags.images) if flags.images else path.parent


_image_map = functools.lru_cache(maxsize=2)(read_image_map)  # a layout's reader is made anew for each input file


def _map_flag(parser: argparse.ArgumentParser, required: bool = False) -> None:
    parser.add_argument("--image-map", default="", required=required,
                        help="file of each URL: TSV, CSV, JSON, parquet, or img2dataset's folder")  # fmt: skip


def _turns_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--turns", choices=("independent", "dialogue"), default="independent")
    parser.add_argument(
        "--choices", choices=("letter", "text"), default="text", help="answers of multiple-choice turns"
    )


def _llava_flags(parser: argparse.ArgumentParser) -> None:
    _images_flags(parser)
    _turns_flags(parser)
    parser.add_argument("--first-turn", type=int, default=0)
    parser.add_argument("--last-turn", type=int, default=None)


def _llava(flags: argparse.Namespace, source: str) -> Read:
    options = LlavaOptions(source, flags.turns, flags.choices, flags.first_turn, flags.last_turn)
    return lambda paths: (sample for path in paths for sample in read_llava(path, _images(flags, path), options))


def _parquet_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--task", choices=("qa", "generation", "pair", "conversation"), default="qa")
    parser.add_argument("--image-column", default="image")
    parser.add_argument("--caption-column", default="")
    parser.add_argument("--label-column", default="")
    parser.add_argument("--conversation-column", default="", help="turns as in LLaVA JSON")
    parser.add_argument("--texts-column", default="", help="turns as in the Cauldron: user, assistant")
    _turns_flags(parser)
    _wording_flags(parser)


def _wording_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--question", action="append", help="wording of the label's question; may be repeated")
    parser.add_argument("--caption-prompt", default=ParquetOptions.caption_prompt)


def _parquet(flags: argparse.Namespace, source: str) -> Read:
    questions = tuple(flags.question) if flags.question else ParquetOptions.questions
    options = ParquetOptions(
        source, flags.task, flags.image_column, flags.caption_column, flags.label_column, questions,
        flags.caption_prompt, flags.conversation_column, flags.texts_column, flags.turns, flags.choices,
    )  # fmt: skip
    return lambda paths: read_parquet(paths, options)


def _coco_flags(parser: argparse.ArgumentParser) -> None:
    _images_flags(parser)
    parser.add_argument("--captions", choices=("separate", "together", "text"), default="separate",
                        help="a record for each caption, for each image, or captions alone")  # fmt: skip
    parser.add_argument("--caption-prompt", default=CocoOptions.prompt, help="with --captions=together")
    parser.add_argument("--image-prefix", default="", help="before each file_name, e.g. train2017/")


def _coco(flags: argparse.Namespace, source: str) -> Read:
    options = CocoOptions(source, flags.captions, flags.caption_prompt, flags.image_prefix)

    def read(paths: Sequence[Path]) -> Samples:
        for path in paths:
            yield from read_coco(path, None if flags.captions == "text" else _images(flags, path), options)

    return read


def _tsv_flags(parser: argparse.ArgumentParser) -> None:
    _images_flags(parser)
    _map_flag(parser, required=True)
    parser.add_argument("--columns", default="caption,url", help="order of the columns; url,caption for CC12M")


def _tsv(flags: argparse.Namespace, source: str) -> Read:
    options = CaptionTsvOptions(source, tuple(flags.columns.split(",")))
    names = _image_map(Path(flags.image_map))
    return lambda paths: (
        sample for path in paths for sample in read_caption_tsv([path], _images(flags, path), names, options)
    )


def _webdataset_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--caption-field", default="", help="field of a sample's json; default: its txt")
    parser.add_argument("--verify-hash", action="store_true",
                        help="drop images without their json's hash, which is of the original bytes")  # fmt: skip


def _webdataset(flags: argparse.Namespace, source: str) -> Read:
    options = WebdatasetOptions(source, flags.caption_field, flags.verify_hash)
    return lambda paths: read_webdataset(paths, options)


def _web_metadata_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--metadata", nargs="+", required=True, help="parquet files of LAION, COYO or DataComp")
    parser.add_argument("--join", choices=("auto", "url", "uid"), default="auto")
    parser.add_argument("--caption-column", default="text")
    parser.add_argument("--filter", action="append", default=[], help="e.g. 'similarity>=0.3'; may be repeated")
    parser.add_argument("--subset", default="", help="DataComp subset: npy of sorted uids")


def _web_metadata(flags: argparse.Namespace, source: str) -> Read:
    filters = tuple(parse_filter(text) for text in flags.filter)
    options = WebMetadataOptions(source, flags.join, flags.caption_column, filters)
    metadata, subset = expand(flags.metadata, "--metadata"), Path(flags.subset) if flags.subset else None
    return lambda paths: read_web_metadata(paths, metadata, options, subset)


def _interleaved_flags(parser: argparse.ArgumentParser) -> None:
    _images_flags(parser)
    _map_flag(parser)
    parser.add_argument("--documents", choices=("obelics", "mmc4"), default="obelics", help="fields of a document")
    parser.add_argument("--missing", choices=("drop_image", "drop_document"), default="drop_image",
                        help="what a missing or damaged image takes with it")  # fmt: skip
    parser.add_argument(
        "--max-images", type=int, default=4, help="per record: it must fit a row; longer ones are split"
    )
    parser.add_argument("--max-chars", type=int, default=2000, help="per record: it must fit a row")
    parser.add_argument("--image-place", choices=("before", "after"), default="before", help="MMC4: by its sentence")
    parser.add_argument("--min-similarity", type=float, default=None, help="MMC4: lower matched_sim is left out")


def _interleaved(flags: argparse.Namespace, source: str) -> Read:
    options = InterleavedOptions(
        source, flags.documents, flags.missing, flags.max_images, flags.max_chars, flags.image_place,
        flags.min_similarity,
    )  # fmt: skip
    names = _image_map(Path(flags.image_map)) if flags.image_map else None
    return lambda paths: (
        sample for path in paths for sample in read_interleaved([path], _images(flags, path), options, names)
    )


def _jsonl_flags(parser: argparse.ArgumentParser) -> None:
    _max_chars_flag(parser)
    parser.add_argument("--text-field", default="text")
    parser.add_argument("--id-field", default="id")


def _max_chars_flag(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--max-chars", type=int, default=600, help="characters per document: it must fit a row")


def _jsonl(flags: argparse.Namespace, source: str) -> Read:
    options = JsonlOptions(source, flags.max_chars, flags.text_field, flags.id_field)

    def read(paths: Sequence[Path]) -> Samples:
        for path in paths:
            yield from (read_text_parquet if path.suffix == ".parquet" else read_jsonl)([path], options)

    return read


def _text(flags: argparse.Namespace, source: str) -> Read:
    return lambda paths: read_text(paths, source, flags.max_chars)


def _tfds_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--split", default="train", help="also train[:10%%]")
    parser.add_argument("--val-split", default="", help="of --val-input; default: --split")
    parser.add_argument("--image-feature", default="image", help="nested features as outer/inner")
    for feature in ("caption", "label", "question", "answer"):
        parser.add_argument(f"--{feature}-feature", default="")
    _wording_flags(parser)


def _tfds(flags: argparse.Namespace, source: str) -> Read:
    questions = tuple(flags.question) if flags.question else ParquetOptions.questions
    options = TfdsOptions(
        source, flags.image_feature, flags.caption_feature, flags.label_feature, flags.question_feature,
        flags.answer_feature, questions, flags.caption_prompt,
    )  # fmt: skip
    return lambda paths: (sample for path in paths for sample in read_tfds(str(path), flags.split, options, None))


def _no_flags(parser: argparse.ArgumentParser) -> None:
    del parser


LAYOUTS: Mapping[str, Layout] = {
    "llava": Layout("conversations: LLaVA JSON, ShareGPT and their kin", _llava_flags, _llava),
    "webdataset": Layout("tars as img2dataset writes them", _webdataset_flags, _webdataset),
    "parquet": Layout("Hugging Face parquet with images", _parquet_flags, _parquet),
    "coco": Layout("COCO captions", _coco_flags, _coco),
    "interleaved": Layout("OBELICS and MMC4 documents", _interleaved_flags, _interleaved),
    "jsonl": Layout("text in JSONL or parquet", _jsonl_flags, _jsonl),
    "text": Layout("plain text", _max_chars_flag, _text),
    "tfds": Layout("prepared TensorFlow Datasets", _tfds_flags, _tfds),
    "cc_tsv": Layout("captions and URLs (CC3M, CC12M) with an image map", _tsv_flags, _tsv),
    "web_metadata": Layout("LAION, COYO or DataComp metadata joined to tars", _web_metadata_flags, _web_metadata,
                           reads_file_by_file=False),
    "image_only": Layout("images alone, in folders or archives", _no_flags,
                         lambda flags, source: lambda paths: read_image_only(paths, source)),
}  # fmt: skip
