"""Writes a scene world: training and validation records, tokenizer, and question files, each of scenes of their own.

python -m data_pipelines.scene_world --output=data/scenes-easy --level=easy --num-scenes=40000
"""

import argparse
import base64
import csv
import functools
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from data_pipelines.scene_questions import QUESTION_KINDS, Question, make_question, make_questions
from data_pipelines.scenes import (
    IMAGE_SIZE,
    LOCATIONS,
    Level,
    Scene,
    Split,
    caption,
    encode_png,
    make_scene,
    render,
    scene_rng,
)
from data_pipelines.spec_flags import add_spec_flags, spec_from_flags
from data_pipelines.writer import FolderExists, build_index, new_folder, write_prepared
from unihetero_jax.data.records import (
    ImageSegment,
    ImageSpec,
    Record,
    TextSegment,
    Turns,
    format_answer,
    format_prompt,
    index_key,
)
from unihetero_jax.data.tokenizer import load_tokenizer, train_tokenizer

TURNS_PER_SCENE = 5
CAPTION_TURN_SHARE = 0.15
CAPTION_PROMPT = "Describe the scene."
ITEMS_PER_KIND = 200
MAX_TRIES_PER_ITEM = 200
TSV_COLUMNS: tuple[str, ...] = (
    "index", "question", "hint", "A", "B", "C", "D", "answer", "category", "image", "source", "l2-category", "comment",
    "split",
)  # fmt: skip
MIN_VAL_SCENES = 200
"""However small the world: rollout retrieval alone needs 64 pictures to choose from."""
VAL_PER_TRAIN = 0.02
VERSION = 5


def qa_record(seed: int, split: Split, level: Level, index: int) -> Record:
    """A scene, then independent turns about it; now and then one asks for a description."""
    scene = make_scene(seed, split, level, index)
    rng = scene_rng(seed, split, level, index, "questions")
    turns = [(question.text, question.answer) for question in make_questions(scene, rng, TURNS_PER_SCENE)]
    if rng.random() < CAPTION_TURN_SHARE:
        turns[-1] = (CAPTION_PROMPT, caption(scene, rng))
    segments: list[TextSegment | ImageSegment] = [_image(scene, seed, split)]
    for branch, (question, answer) in enumerate(turns, start=1):
        segments.append(TextSegment(format_prompt(question), False, branch))
        segments.append(TextSegment(format_answer(answer), True, branch))
    return Record("scenes_qa", "vqa", tuple(segments), {"id": f"{split}-{index}"})


def generation_record(seed: int, split: Split, level: Level, index: int) -> Record:
    """A caption, then the scene that it describes.

    The caption is what is asked for, so it carries no text loss: most of it is chance (which scene?), and predicting
    that takes gradient from everything else.
    """
    scene = make_scene(seed, split, level, index)
    text = caption(scene, scene_rng(seed, split, level, index, "caption"))
    segments = (TextSegment(text), _image(scene, seed, split))
    return Record("scenes_generation", "image", segments, {"id": f"{split}-{index}"})


def objects_record(seed: int, split: Split, level: Level, index: int) -> Record:
    """A scene, then a turn for each ninth of it that holds an object, and one for one that does not: what is there.

    It tells all that questions are about, place by place: the planted help of `experiments/sweeps`, and no part of an
    ordinary mixture.
    """
    scene = make_scene(seed, split, level, index)
    held: dict[str, list[str]] = {}
    for item in scene.objects:
        held.setdefault(scene.location(item), []).append(f"{item.size} {item.color} {item.shape}")
    rng = scene_rng(seed, split, level, index, "part")
    free = [place for place in LOCATIONS if place not in held]
    if free:
        held[free[rng.integers(len(free))]] = ["nothing"]
    segments: list[TextSegment | ImageSegment] = [_image(scene, seed, split)]
    for branch, (place, items) in enumerate(held.items(), start=1):
        segments.append(TextSegment(format_prompt(f"What is {place}?"), False, branch))
        segments.append(TextSegment(format_answer(" and ".join(items)), True, branch))
    return Record("scenes_objects", "vqa", tuple(segments), {"id": f"{split}-{index}"})


def _image(scene: Scene, seed: int, split: Split) -> ImageSegment:
    return ImageSegment(_picture(scene, seed, split), scene.image_size, scene.image_size)


@functools.lru_cache(maxsize=50_000)  # both kinds of record hold the same pictures; some 60 MB
def _picture(scene: Scene, seed: int, split: Split) -> bytes:
    return encode_png(render(scene, seed, split))


def num_val_scenes(num_scenes: int) -> int:
    """Validation scenes that come with so many training scenes."""
    return max(MIN_VAL_SCENES, round(num_scenes * VAL_PER_TRAIN))


def question_items(
    seed: int, split: Split, level: Level, items_per_kind: int = ITEMS_PER_KIND
) -> Iterator[tuple[Scene, Question]]:
    """`items_per_kind` questions of every kind, each about a scene of its own."""
    index = 0
    for kind in QUESTION_KINDS:
        if split == "heldout" and kind == "count":
            continue  # a count names no pair, so nothing about it is compositional
        made = 0
        for _ in range(items_per_kind * MAX_TRIES_PER_ITEM):
            scene = make_scene(seed, split, level, index)
            rng = scene_rng(seed, split, level, index, "questions")
            question = make_question(kind, scene, rng, heldout=split == "heldout")
            index += 1
            if question is not None:
                yield scene, question
                made += 1
            if made == items_per_kind:
                break
        if made < items_per_kind:
            raise RuntimeError(f"only {made} of {items_per_kind} {kind} questions could be made")


def write_questions(path: Path, seed: int, split: Split, level: Level, items_per_kind: int = ITEMS_PER_KIND) -> None:
    """An MMBench TSV, read like any benchmark; the category is the kind of question."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, TSV_COLUMNS, delimiter="\t")
        writer.writeheader()
        for number, (scene, question) in enumerate(question_items(seed, split, level, items_per_kind)):
            options = dict(zip("ABCD", question.options, strict=False))
            letter = "ABCD"[question.options.index(question.answer)]
            image = base64.b64encode(encode_png(render(scene, seed, split))).decode()
            writer.writerow({
                "index": number, "question": question.text, **options, "answer": letter, "category": question.kind,
                "image": image, "source": f"scenes-{level}", "l2-category": split, "comment": f"{split}-{scene.index}",
                "split": "test",
            })  # fmt: skip


def write_scene_world(
    path: str | os.PathLike[str],
    level: Level,
    num_scenes: int,
    spec: ImageSpec,
    vocab_size: int,
    seed: int = 0,
    items_per_kind: int = ITEMS_PER_KIND,
    with_objects: bool = False,
) -> None:
    """Writes the whole folder under another name and renames it at the end, so a folder that exists is complete.

    All sources hold the same scenes, one as questions, one as captions and, `with_objects`, one as what is where.
    Validation scenes therefore have indices of their own: a share of each source's records would hold pictures that the
    other source trains on.

    Raises:
        ValueError: `num_scenes` is not positive, the level is unknown, or the folder exists (`FolderExists`).
    """
    output = Path(path)
    if num_scenes < 1 or level not in IMAGE_SIZE:
        raise ValueError(f"scene world: num_scenes {num_scenes} must be positive and level {level!r} easy or hard")
    with new_folder(output) as made:
        partial = Path(made)
        texts = (s.text for i in range(min(num_scenes, 4000)) for make in (qa_record, generation_record)
                 for s in make(seed, "train", level, i).segments if isinstance(s, TextSegment))  # fmt: skip
        tokenizer = train_tokenizer(texts, vocab_size, partial / "tokenizer")
        for name in sources_of(with_objects):
            make = _RECORDS[name]
            train = (make(seed, "train", level, i) for i in range(num_scenes))
            val = (make(seed, "val", level, i) for i in range(num_val_scenes(num_scenes)))
            write_prepared(train, partial / name, source=f"scenes_{name}", tokenizer=tokenizer, spec=spec,
                           licence="generated", val_samples=val)  # fmt: skip
        write_questions(partial / "questions.tsv", seed, "test", level, items_per_kind)
        write_questions(partial / "questions_heldout.tsv", seed, "heldout", level, items_per_kind)
        settings = _settings(level, num_scenes, seed, items_per_kind, with_objects)
        (partial / "manifest.json").write_text(json.dumps(settings, indent=1) + "\n")
    _picture.cache_clear()


def sources_of(with_objects: bool) -> tuple[str, ...]:
    """Names of a world's sources."""
    return ("qa", "generation", *(["objects"] if with_objects else []))


_RECORDS: dict[str, Callable[[int, Split, Level, int], Record]] = {
    "qa": qa_record, "generation": generation_record, "objects": objects_record,
}  # fmt: skip


_BEFORE = {"items_per_kind": ITEMS_PER_KIND, "with_objects": False}
"""What a world has whose manifest does not say."""


def _settings(level: Level, num_scenes: int, seed: int, items_per_kind: int, with_objects: bool) -> dict[str, object]:
    """What tells a world from another."""
    return {
        "version": VERSION, "level": level, "num_scenes": num_scenes, "seed": seed, "items_per_kind": items_per_kind,
        "with_objects": with_objects,
    }  # fmt: skip


def ensure_scene_world(
    path: str,
    level: Level,
    num_scenes: int,
    spec: ImageSpec,
    vocab_size: int,
    seed: int = 0,
    items_per_kind: int = ITEMS_PER_KIND,
    with_objects: bool = False,
) -> None:
    """Makes the scene world unless it is there; says so, since it takes a while.

    Raises:
        ValueError: another world is there, or its manifest.json cannot be read.
    """
    manifest = Path(path) / "manifest.json"
    if not manifest.exists():
        print(f"scene world {path} is missing: generating {num_scenes} {level} scenes", flush=True)
        try:
            write_scene_world(path, level, num_scenes, spec, vocab_size, seed, items_per_kind, with_objects)
            return
        except FolderExists:
            if not manifest.exists():
                raise
            print(f"scene world {path}: another process finished it first; its world is used", flush=True)
    try:
        settings = json.loads(manifest.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{manifest} cannot be read ({error}); remove {path} to make it anew") from error
    if not isinstance(settings, dict):
        raise ValueError(f"{manifest} holds a {type(settings).__name__}, no object; remove {path} to make it anew")
    wanted = _settings(level, num_scenes, seed, items_per_kind, with_objects)
    found = _BEFORE | settings
    other = {key: value for key, value in wanted.items() if found.get(key) != value}
    different = ", ".join(f"{key} {found.get(key)!r} instead of {value!r}" for key, value in other.items())
    if different:
        raise ValueError(f"{path} holds another scene world ({different}); remove it, or set scene_world.path")


def ensure_index(path: str, spec: ImageSpec, turns: Turns, with_objects: bool = False) -> None:
    """Adds the index of lengths for a layout of turns to the sources of a scene world, unless it is there."""
    tokenizer = load_tokenizer(Path(path) / "tokenizer")
    key = index_key(tokenizer.hash, spec, turns)
    for name in sources_of(with_objects):
        if not all((Path(path) / name / "index" / f"{key}.{split}.npy").exists() for split in ("train", "val")):
            build_index(Path(path) / name, tokenizer, spec, turns)


def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit code."""
    summary = (__doc__ or "").split("\n")[0]
    parser = argparse.ArgumentParser(prog="python -m data_pipelines.scene_world", description=summary)
    parser.add_argument("--output", required=True)
    parser.add_argument("--level", choices=list(IMAGE_SIZE), default="easy")
    parser.add_argument("--num-scenes", type=int, default=40_000)
    parser.add_argument("--seed", type=int, default=0)
    add_spec_flags(parser)
    parser.add_argument("--vocab-size", type=int, default=512)
    flags = parser.parse_args(arguments)
    try:
        spec = spec_from_flags(flags)
        write_scene_world(flags.output, flags.level, flags.num_scenes, spec, flags.vocab_size, flags.seed)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
