"""Scenes drawn from captions that a run never saw, and how much of each caption the reader of scenes finds in them."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from data_pipelines.scene_questions import make_questions
from data_pipelines.scene_reader import Fidelity, fidelity, read_scene
from data_pipelines.scenes import SIZES, Scene, caption, encode_png, make_scene, part_of, render, scene_rng
from unihetero_jax.config import Config
from unihetero_jax.data.question_files import StoredImage
from unihetero_jax.data.tokenizer import Tokenizer
from unihetero_jax.evaluation.benchmarks import Item
from unihetero_jax.evaluation.drawings import BlockBank, block_bank, default_grid, roll_out_texts
from unihetero_jax.evaluation.multiple_choice import score_items
from unihetero_jax.evaluation.rollout_questions import in_place_of, log_probs_on
from unihetero_jax.model.unihetero import Params

FIRST_UNSEEN = 920_000
"""Index in the test split that no question file and no other sheet reaches. Guidance was chosen on those from 910,000
on."""
BANK_SCENES = 2_000
QUESTIONS_PER_SCENE = 4
_BATCH = 64


@dataclasses.dataclass(frozen=True)
class UnseenScenes:
    """Scenes of the test split with their pictures, and the captions they are asked for by.

    Attributes:
        scenes: whole.
        pictures: true ones.
        captions: of all objects of each scene, or of some.
        named: the cells, by location, whose objects the caption names.
    """

    scenes: tuple[Scene, ...]
    pictures: tuple[np.ndarray, ...]
    captions: tuple[str, ...]
    named: tuple[frozenset[str], ...]

    def fidelity(self, pictures: Sequence[np.ndarray], *, all_sizes: bool = False) -> Fidelity:
        """Of pictures of the scenes. A caption may not name sizes; a picture drawn from the true one has them all."""
        return fidelity(self.scenes, [read_scene(picture) for picture in pictures], self._sizes_named(all_sizes))

    def of_other_scenes(self) -> Fidelity:
        """The blind floor: each true picture scored against the caption of the scene before."""
        return self.fidelity([*self.pictures[1:], self.pictures[0]])

    def partially(self) -> "UnseenScenes":
        """Those of two objects or more, asked for by captions that leave at least one of them out.

        Which ones follows from the scene alone. Nothing tells such a caption from the whole one of a smaller scene.
        """
        places = [i for i, scene in enumerate(self.scenes) if len(scene.objects) > 1]
        scenes = tuple(self.scenes[i] for i in places)
        captions, named = [], []
        for scene in scenes:
            rng = scene_rng(0, "test", "easy", scene.index, "part")
            part = part_of(scene, rng)
            captions.append(caption(part, rng))
            named.append(_cells(part))
        return UnseenScenes(scenes, tuple(self.pictures[i] for i in places), tuple(captions), tuple(named))

    def fidelity_by_name(self, pictures: Sequence[np.ndarray]) -> dict[str, Fidelity]:
        """`named` objects and `unnamed` ones apart, each as if the others' cells were not there; of the unnamed, all
        sizes count. Above the blind floor (`unnamed` of other scenes' pictures), the latter would betray a leak.
        """
        readings = [read_scene(picture) for picture in pictures]

        def of(is_named: bool, sizes: list[bool]) -> Fidelity:
            scenes, seen = [], []
            for scene, named, reading in zip(self.scenes, self.named, readings, strict=True):
                asked = named if is_named else _cells(scene) - named
                others = _cells(scene) - asked
                objects = tuple(item for item in scene.objects if scene.location(item) in asked)
                scenes.append(dataclasses.replace(scene, objects=objects))
                seen.append({cell: item for cell, item in reading.items() if cell not in others})
            return fidelity(scenes, seen, sizes)

        return {"named": of(True, self._sizes_named()), "unnamed": of(False, self._sizes_named(True))}

    def _sizes_named(self, all_sizes: bool = False) -> list[bool]:
        return [all_sizes or any(size in text.split() for size in SIZES) for text in self.captions]


def _cells(scene: Scene) -> frozenset[str]:
    """Where its objects stand."""
    return frozenset(scene.location(item) for item in scene.objects)


def unseen_scenes(number: int) -> UnseenScenes:
    """The first so many."""
    indices = range(FIRST_UNSEEN, FIRST_UNSEEN + number)
    scenes = tuple(make_scene(0, "test", "easy", index) for index in indices)
    captions = tuple(
        caption(scene, scene_rng(0, "test", "easy", index, "caption"))
        for scene, index in zip(scenes, indices, strict=True)
    )
    pictures = tuple(render(scene, 0, "test") for scene in scenes)
    return UnseenScenes(scenes, pictures, captions, tuple(_cells(scene) for scene in scenes))


def scene_bank(config: Config, params: Params, tokenizer: Tokenizer) -> BlockBank:
    """Blocks of training scenes, which hold no scene of the test split."""
    scenes = (make_scene(config.scene_world.seed, "train", "easy", index) for index in range(BANK_SCENES))
    return block_bank(config, params, tokenizer, [encode_png(render(scene)) for scene in scenes])


def predicted_embeddings(
    config: Config, params: Params, tokenizer: Tokenizer, captions: Sequence[str], seed: int
) -> np.ndarray:
    """Rolled out from the captions, float[captions, N, D]."""
    key = jax.random.key(seed)
    parts = [
        roll_out_texts(config, params, tokenizer, part, default_grid(config), jax.random.fold_in(key, number))
        for number, part in enumerate(batches(captions))
    ]
    return np.concatenate([np.asarray(part.embeddings) for part in parts])


def batches(values: Sequence[Any]) -> Iterator[Sequence[Any]]:
    """Of what is drawn at one time."""
    return (values[start : start + _BATCH] for start in range(0, len(values), _BATCH))


def questions_about(asked: UnseenScenes) -> list[Item]:
    """Questions about the scenes with their true pictures; the category is the kind."""
    items = []
    for scene, picture in zip(asked.scenes, asked.pictures, strict=True):
        image = StoredImage.of(encode_png(picture))
        for question in make_questions(
            scene, scene_rng(0, "test", "easy", scene.index, "questions"), QUESTIONS_PER_SCENE
        ):
            right = question.options.index(question.answer)
            name = f"{scene.index}-{len(items)}"
            items.append(Item(name, question.text, question.options, right, (image,), question.kind))
    return items


def answers_on(
    config: Config, params: Params, tokenizer: Tokenizer, asked: UnseenScenes, embeddings: np.ndarray
) -> dict[str, float]:
    """Share of the questions answered right by kind, and `overall`, where embeddings [scenes, N, D] stand in place of
    the pictures.
    """
    items = questions_about(asked)
    log_probs = log_probs_on(config, params, in_place_of(config, asked.pictures, embeddings))
    scores = score_items(items, tokenizer, config, log_probs)
    by_kind: dict[str, list[bool]] = {"overall": []}
    for item, score in zip(items, scores, strict=True):
        is_right = score.by_sum == item.answer
        by_kind["overall"].append(is_right)
        by_kind.setdefault(item.category, []).append(is_right)
    return {kind: float(np.mean(right)) for kind, right in by_kind.items()}


def answers_table(rows: Mapping[str, Mapping[str, float]]) -> str:
    """One line for each kind of embeddings."""
    kinds = list(next(iter(rows.values())))
    lines = [f"{'answered right, about a scene seen by':<38}" + "".join(f"{kind:>11}" for kind in kinds)]
    return "\n".join([*lines, *(f"{label:<38}" + "".join(f"{row[kind]:>11.3f}" for kind in kinds)
                                for label, row in rows.items())])  # fmt: skip


def fidelity_table(rows: Mapping[str, Fidelity]) -> str:
    """One line for each kind of picture."""
    names = ("object", "color", "shape", "size", "count", "scene")
    lines = [f"{'right, of what was asked for':<38}" + "".join(f"{name:>8}" for name in names) + "   extra a scene"]
    for label, found in rows.items():
        shares = "".join(f"{found.shares[name]:>8.3f}" for name in names)
        lines.append(f"{label:<38}{shares}{found.extra_per_scene:>10.2f}")
    return "\n".join(lines)
