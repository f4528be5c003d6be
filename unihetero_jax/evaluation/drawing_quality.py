"""How good the pictures are that a run draws from captions: as a set, beside true ones, without any download.

N captions are drawn; N further true images of the same split are the reference, so that the true images of those very
captions, compared with it, have the figures of a perfect generator at this number of images (the floor). Pictures
without any content of their own, the mean picture and pixels in random order, have those of a poor one (the ceiling).

Features: the mean over an image's visual tokens of a frozen encoder's output, as FID takes the mean over the places of
its last layer (our choice: all tokens side by side have more features than there are images). The encoder is a judge's,
in whose space runs can be compared, or else the run's own: that needs nothing else, but it does not see what the run
itself overlooks, and its distances have a unit of their own.
"""

import io
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from etils import epath
from PIL import Image

from unihetero_jax.arrays import Batch
from unihetero_jax.config import Config, pixel_role, rolls_out
from unihetero_jax.data.mixture import open_split
from unihetero_jax.data.packing import PackedSample
from unihetero_jax.data.tokenizer import Tokenizer
from unihetero_jax.evaluation.diagnostics import (
    common_grid,
    drawing_prompts,
    drawn_records,
    hash_of,
    image_of,
    samples_of,
    stored_drawn_records,
)
from unihetero_jax.evaluation.drawings import pictures_of
from unihetero_jax.evaluation.image_distance import MIN_IMAGES, NUM_NEIGHBOURS, compare_images
from unihetero_jax.evaluation.rollout_error import Judge
from unihetero_jax.inference.rollout import rollout
from unihetero_jax.model.unihetero import Params
from unihetero_jax.sharding import fetch
from unihetero_jax.storage import make_folder, remove_tree, write_bytes

FEATURES = "mean over visual tokens of the encoder's output"
_BATCH_IMAGES = 64


def check_drawings(config: Config, tokenizer: Tokenizer, number: int) -> None:
    """Raises ValueError unless the run can draw so many captions and has as many true images beside theirs."""
    source = config.eval.rollout_source
    if number < MIN_IMAGES:
        raise ValueError(
            f"--drawings={number}: give at least {MIN_IMAGES} (precision asks for {NUM_NEIGHBOURS} neighbours), "
            "better some hundreds: of few images the distance is too large"
        )
    if pixel_role(config.objective) is None:
        raise ValueError(
            f"--drawings: objective={config.objective} draws no pixels (and blocks of true images, put together, would "
            "be precise whatever it predicts); train a renderer for the run with experiments/renderer.py, or "
            "objective=unihetero"
        )
    if not rolls_out(config):
        raise ValueError(
            f"--drawings: objective={config.objective} with model.projector.kind={config.model.projector.kind} cannot "
            "read again what it drew; only a run that can be rolled out draws captions"
        )
    if not source:
        raise ValueError("--drawings: eval.rollout_source is empty; name a source with captions, such as "
                         "--config.eval.rollout_source=generation")  # fmt: skip
    opened = open_split(config, tokenizer, source, "val")
    found = len(drawn_records(opened))
    opened.close()
    if found < 2 * number:
        raise ValueError(
            f"--drawings={number}: {found} validation records of {source} (eval.rollout_source) ask for one image; "
            f"as many true images as drawn ones are needed beside them, so give at most {found // 2}"
        )


def drawing_quality(
    config: Config, params: Params, tokenizer: Tokenizer, number: int, judge: Judge | None = None
) -> tuple[dict[str, Any], dict[str, list[np.ndarray]]]:
    """Draws captions of `eval.rollout_source` and compares the pictures with true ones.

    Args:
        config: the run's; `check_drawings` passes.
        params: the run's.
        tokenizer: the run's.
        number: N, of captions.
        judge: whose encoder gives the features; the run's own if left out.

    Returns:
        Two dictionaries. The figures: `frechet_distance`, `precision` and `recall` of what was drawn; the same for the
        captions' own true images (`floor`) and for `mean picture` and `shuffled pixels` (`ceiling`); and what they were
        made of. The pictures, N `uint8[h, w, 3]` each: `drawn`; `captioned`, the captions' own true images; `true`,
        the others, which all are compared with.

    Raises:
        ValueError: images of several grids, or features that are not finite.
    """
    stored = stored_drawn_records(config, tokenizer, 2 * number)
    samples = samples_of(config, tokenizer, stored)
    grid = common_grid(config, samples)
    images = [image_of(sample) for sample in samples]
    pictures = {
        "drawn": _draw(config, params, tokenizer, samples[:number], grid),
        "captioned": images[:number],
        "true": images[number:],
    }
    encoder = judge or Judge(config, params, tokenizer)

    def seen(made: Sequence[np.ndarray]) -> np.ndarray:
        return encoder.features(made).mean(axis=1)

    reference = seen(pictures["true"])
    result = {
        **compare_images(reference, seen(pictures["drawn"])),
        "floor": compare_images(reference, seen(pictures["captioned"])),
        "ceiling": {name: compare_images(reference, seen(made)) for name, made in _empty(images[:number]).items()},
        "num_images": number, "num_neighbours": NUM_NEIGHBOURS,
        "features": FEATURES, "num_features": reference.shape[1],
        "encoder": "judge" if judge else "own", "encoder_digest": encoder.digest,
        "source": config.eval.rollout_source, "data_hash": hash_of(stored),
    }  # fmt: skip
    return result, pictures


def _draw(
    config: Config, params: Params, tokenizer: Tokenizer, samples: list[PackedSample], grid: tuple[int, int]
) -> list[np.ndarray]:
    """One picture for each caption, a part of them at a time; the prompts of all are equally long."""
    prompts, pictures = drawing_prompts(config, tokenizer, samples), []
    for start in range(0, len(samples), _BATCH_IMAGES):
        part: Batch = jax.tree.map(lambda x: x[start : start + _BATCH_IMAGES], prompts)  # noqa: B023
        of_embeddings, of_pixels = jax.random.split(jax.random.key(start))
        rolled = jax.tree.map(fetch, rollout(config, params, part, grid[0] * grid[1], of_embeddings))
        pictures += pictures_of(config, params, rolled, grid, of_pixels)
    return pictures


def _empty(images: Sequence[np.ndarray]) -> dict[str, list[np.ndarray]]:
    """Pictures that show nothing: the mean of all, for each; and each one's own pixels in random order."""
    mean = np.round(np.mean(images, axis=0)).astype(np.uint8)
    rng = np.random.default_rng(0)
    shuffled = [rng.permutation(image.reshape(-1, 3)).reshape(image.shape) for image in images]
    return {"mean picture": [mean] * len(images), "shuffled pixels": shuffled}


def write_pictures(pictures: Mapping[str, Sequence[np.ndarray]], folder: epath.Path) -> None:
    """`folder/NAME/00000.png` ... for each kind, in place of what was there: what other programs compute FID from."""
    remove_tree(folder)
    for name, made in pictures.items():
        make_folder(folder / name)
        for number, picture in enumerate(made):
            buffer = io.BytesIO()
            Image.fromarray(picture).save(buffer, "PNG")
            write_bytes(folder / name / f"{number:05d}.png", buffer.getvalue())


def format_drawing_quality(result: Mapping[str, Any]) -> str:
    """What the command prints."""
    lines = [
        f"drawn from {result['num_images']} captions of {result['source']}, beside as many other true images",
        f"  by {result['num_features']} features: {result['features']} ({result['encoder']}, "
        f"{result['encoder_digest']})",
        f"  {'':<32}{'Frechet distance':>18}{'precision':>11}{'recall':>9}",
    ]
    rows = {"drawn": result, "true images (floor)": result["floor"]}
    rows |= {f"{name} (ceiling)": found for name, found in result["ceiling"].items()}
    for label, found in rows.items():
        figures = f"{found['frechet_distance']:>18.4g}{found['precision']:>11.3f}{found['recall']:>9.3f}"
        lines.append(f"  {label:<32}{figures}")
    return "\n".join(lines)
