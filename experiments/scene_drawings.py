"""Scenes drawn from captions that a run never saw, and how much of each caption the reader of scenes finds in them."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from data_pipelines.scene_reader import Fidelity, fidelity, read_scene
from data_pipelines.scenes import SIZES, Scene, caption, encode_png, make_scene, render, scene_rng
from unihetero_jax.config import Config
from unihetero_jax.data.tokenizer import Tokenizer
from unihetero_jax.evaluation.drawings import BlockBank, block_bank, default_grid, roll_out_texts
from unihetero_jax.model.unihetero import Params

FIRST_UNSEEN = 920_000
"""Index in the test split that no question file and no other sheet reaches. Guidance was chosen on those from 910,000
on."""
BANK_SCENES = 2_000
_BATCH = 64


@dataclasses.dataclass(frozen=True)
class UnseenScenes:
    """Scenes of the test split with their pictures, and the captions they are asked for by."""

    scenes: tuple[Scene, ...]
    pictures: tuple[np.ndarray, ...]
    captions: tuple[str, ...]

    def fidelity(self, pictures: Sequence[np.ndarray], *, all_sizes: bool = False) -> Fidelity:
        """Of pictures of the scenes. A caption may not name sizes; a picture drawn from the true one has them all."""
        named = [all_sizes or any(size in text.split() for size in SIZES) for text in self.captions]
        return fidelity(self.scenes, [read_scene(picture) for picture in pictures], named)

    def of_other_scenes(self) -> Fidelity:
        """The blind floor: each true picture scored against the caption of the scene before."""
        return self.fidelity([*self.pictures[1:], self.pictures[0]])


def unseen_scenes(number: int) -> UnseenScenes:
    """The first so many."""
    indices = range(FIRST_UNSEEN, FIRST_UNSEEN + number)
    scenes = tuple(make_scene(0, "test", "easy", index) for index in indices)
    captions = tuple(
        caption(scene, scene_rng(0, "test", "easy", index, "caption"))
        for scene, index in zip(scenes, indices, strict=True)
    )
    return UnseenScenes(scenes, tuple(render(scene, 0, "test") for scene in scenes), captions)


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


def fidelity_table(rows: Mapping[str, Fidelity]) -> str:
    """One line for each kind of picture."""
    names = ("object", "color", "shape", "size", "count", "scene")
    lines = [f"{'right, of what was asked for':<38}" + "".join(f"{name:>8}" for name in names) + "   extra a scene"]
    for label, found in rows.items():
        shares = "".join(f"{found.shares[name]:>8.3f}" for name in names)
        lines.append(f"{label:<38}{shares}{found.extra_per_scene:>10.2f}")
    return "\n".join(lines)
