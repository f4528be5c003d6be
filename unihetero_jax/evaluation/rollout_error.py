"""Cumulative error: how a free rollout departs from the truth, position by position, in the space of a judge.

    FR(j)  error at position j when every input before it was predicted      (free running)
    TF(j)  error when every input before it was true                         (teacher forcing)
    gap = FR - TF;  growth = slope of log FR(j) over j;  horizon = positions before FR(j) passes half of the way

All runs are measured in one space: the encoder of a judge that none of them trained on. A run's embeddings go there
through a linear map, fitted the same way for each on true pairs of other images. The error is 1 - R^2: squared distance
over the judge's variance at that position, so the mean embedding has 1, and the map's own error on true embeddings is
the floor. FR is what counts; the gap is read with the leak (design section 2): with a bidirectional encoder the true
inputs of teacher forcing already hold pixels of what is to be predicted.

Pictures need no map: what a run draws of its rollout, the judge's encoder reads like any image (`drawn`), so semantic
and pixel objectives are compared by what they put on the canvas. `reconstructed` is the renderer's own floor: the same,
drawn from the true embeddings.
"""

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from unihetero_jax.arrays import VisionOutput
from unihetero_jax.config import Config, pixel_role
from unihetero_jax.data.packing import ImagePiece, PackedSample, TokenPiece
from unihetero_jax.data.tokenizer import Tokenizer
from unihetero_jax.evaluation.diagnostics import (
    Reader,
    common_grid,
    drawing_prompts,
    held_out_samples,
    image_of,
    see_images,
)
from unihetero_jax.evaluation.drawings import BlockBank, pictures_of
from unihetero_jax.evaluation.ridge import LinearMap, best_ridge
from unihetero_jax.inference.draw import draw_images
from unihetero_jax.inference.rollout import Rollout, rollout
from unihetero_jax.model.unihetero import Params
from unihetero_jax.sharding import fetch

TEACHER_FRACTIONS = (0.0, 0.25, 0.5, 0.75, 1.0)
"""Shares of an image's positions whose inputs are true; 0 is free running, 1 is teacher forcing."""
NUM_DRAWS = 1000
_BATCH_IMAGES = 64


def digest_of(params: Params) -> str:
    """12 hex digits of parameters, in the order of their names."""
    digest = hashlib.blake2b(digest_size=6)
    for leaf in jax.tree.leaves(params):
        digest.update(np.ascontiguousarray(fetch(leaf)).tobytes())
    return digest.hexdigest()


@dataclasses.dataclass(frozen=True)
class Judge:
    """A frozen encoder in whose space runs are compared; of another run, or of none of those compared."""

    config: Config
    params: Params
    tokenizer: Tokenizer

    @property
    def digest(self) -> str:
        """12 hex digits of its encoder's parameters, by which results name it."""
        return digest_of(self.params["encoder"])

    def check_patches(self, config: Config) -> None:
        """Raises ValueError unless it reads patches of the run's size."""
        own, of_run = self.config.model.encoder.patch_size, config.model.encoder.patch_size
        if own != of_run:
            raise ValueError(
                f"the judge of rollouts reads patches of {own} pixels, the run of {of_run}; they see different visual "
                "tokens, train a judge of the run's size"
            )

    def features(self, pictures: Sequence[np.ndarray]) -> np.ndarray:
        """What its encoder makes of the visual tokens of pictures of one grid, float64[images, N, J]."""
        samples = [PackedSample([TokenPiece([self.tokenizer.boi_id]), ImagePiece(picture)]) for picture in pictures]
        return np.asarray(_see(self.config, self.params, self.tokenizer, samples).merged, np.float64)


def rollout_error(
    config: Config, params: Params, tokenizer: Tokenizer, judge: Judge, read: Reader | None = None
) -> dict[str, Any]:
    """Rolls images out from the captions of `eval.rollout_source` and measures them.

    Args:
        config: the run's; `eval.rollout_candidates` images are measured, further ones of the split fit the map.
        params: the run's.
        tokenizer: the run's.
        judge: its encoder must read patches of the run's size.
        read: names what stands at each position of a picture, attribute by attribute, or None where nothing does.

    Returns:
        `curves` and `overall`: {name: values by position} and {name: [value, low, high]} (95%, bootstrap over images)
        of `floor`, `free_running`, `teacher_forced`, `teacher_0.25` ..., `mean_embedding`, `copy_previous`, and of a
        run that draws `drawn` and, of a renderer, `reconstructed`;
        `gap`, `growth` and `horizon` with their intervals; `retrieval_by_position`, among as many images as were
        measured, from the positions up to there; `leak`: R^2 of the next embedding from the earlier ones by a linear
        map, without text; `attributes`, with a reader (`_fidelity`); and what it was made of.

    Raises:
        ValueError: too few images, images of several grids, or a judge of another patch size.
    """
    judge.check_patches(config)
    measured, fitting, data_hash = held_out_samples(config, tokenizer)
    originals, fit_originals = ([image_of(sample) for sample in samples] for samples in (measured, fitting))
    seen, seen_fit = judge.features(originals), judge.features(fit_originals)
    vision, fit_vision = (_see(config, params, tokenizer, samples) for samples in (measured, fitting))
    true, true_fit = (np.asarray(x.visual_embeddings, np.float64) for x in (vision, fit_vision))
    to_judge = _fit_map(true_fit, seen_fit)
    rollouts = _rollouts(config, params, tokenizer, measured, vision)
    guesses = {"floor": to_judge(true)}
    guesses |= {name: to_judge(np.asarray(rolled.embeddings, np.float64)) for name, rolled in rollouts.items()}
    grid = common_grid(config, measured)
    pictures = _pictures(config, params, rollouts["free_running"], vision, grid)
    for name, made in pictures.items():
        guesses[name] = judge.features(made)
    guesses["mean_embedding"] = np.broadcast_to(seen_fit.mean(axis=0), seen.shape)
    guesses["copy_previous"] = _copied(to_judge(true), seen_fit.mean(axis=0))
    errors = {name: ((guess - seen) ** 2).sum(axis=-1) for name, guess in guesses.items()}
    variance = ((seen - seen.mean(axis=0)) ** 2).sum(axis=-1)
    result = summarise(errors, variance)
    result["retrieval_by_position"] = _retrieval(guesses["free_running"], seen)
    if read is not None:
        bank = BlockBank.of(fit_originals, true_fit, grid)
        shown = {"nearest blocks": bank.draw(np.asarray(rollouts["free_running"].embeddings))} | pictures
        result["attributes"] = _fidelity(read, originals, shown)
    result["leak"] = {
        "r_squared": _leak(true_fit, true), "encoder_attention": config.model.encoder.attention,
    }  # fmt: skip
    return result | {
        "source": config.eval.rollout_source, "data_hash": data_hash, "judge": judge.digest,
        "num_images": len(measured), "num_fit_images": len(fitting), "chance": 1 / len(measured),
    }  # fmt: skip


def _see(config: Config, params: Params, tokenizer: Tokenizer, samples: Sequence[PackedSample]) -> VisionOutput:
    """What the vision path makes of the samples' images, [images, N, ...], a part of them at a time."""
    parts = [
        see_images(config, params, tokenizer, samples[start : start + _BATCH_IMAGES])
        for start in range(0, len(samples), _BATCH_IMAGES)
    ]
    return jax.tree.map(lambda *arrays: np.concatenate(arrays), *parts)


def _rollouts(
    config: Config, params: Params, tokenizer: Tokenizer, samples: Sequence[PackedSample], true: VisionOutput
) -> dict[str, Rollout]:
    """Predictions by the share of true inputs, in numpy arrays."""
    found: dict[str, list[Rollout]] = {}
    num_tokens = true.visual_embeddings.shape[1]
    for start in range(0, len(samples), _BATCH_IMAGES):
        part = slice(start, start + _BATCH_IMAGES)
        prompts = drawing_prompts(config, tokenizer, list(samples[part]))
        given = jax.tree.map(lambda x: x[part], true)  # noqa: B023
        for fraction in TEACHER_FRACTIONS:
            count = round(fraction * num_tokens)
            drawn = rollout(config, params, prompts, num_tokens, jax.random.key(start), given, count)
            found.setdefault(_name(fraction), []).append(jax.tree.map(fetch, drawn))
    return {name: jax.tree.map(lambda *x: np.concatenate(x), *parts) for name, parts in found.items()}


def _pictures(
    config: Config, params: Params, rolled: Rollout, true: VisionOutput, grid: tuple[int, int]
) -> dict[str, list[np.ndarray]]:
    """What the run draws of its free rollout and, of a renderer, of the true embeddings; nothing without pixels."""
    if pixel_role(config.objective) is None:
        return {}
    pictures = {"drawn": pictures_of(config, params, rolled, grid, jax.random.key(0))}
    if pixel_role(config.objective) == "renderer":
        embeddings = np.asarray(true.visual_embeddings)
        pictures["reconstructed"] = draw_images(config, params, embeddings, grid, jax.random.key(0))
    return pictures


def _fidelity(
    read: Reader, true: Sequence[np.ndarray], shown: Mapping[str, Sequence[np.ndarray]]
) -> dict[str, dict[str, Any]]:
    """Of what the reader finds in the true pictures, the share that it finds at the same position in those of a kind.

    Returns:
        {kind: {"share": {attribute: of all positions at which something stands}, "by_position": {attribute: shares},
        "added": positions per picture at which something stands and nothing should}}. The kind `another image` is the
        blind floor: each true picture judged by the one before it.
    """
    wanted = [read(picture) for picture in true]
    kinds = {name: [read(picture) for picture in made] for name, made in shown.items()}
    kinds["another image"] = [*wanted[1:], wanted[0]]
    names = sorted({name for one in wanted for item in one if item for name in item})
    return {kind: _shares(names, wanted, found) for kind, found in kinds.items()}


def _shares(names: Sequence[str], wanted: Sequence[Any], found: Sequence[Any]) -> dict[str, Any]:
    there = np.array([[item is not None for item in one] for one in wanted])
    drawn = np.array([[item is not None for item in one] for one in found])
    right = {"there": there & drawn}
    for name in names:
        same = [
            [bool(a and b and a[name] == b[name]) for a, b in zip(*pair, strict=True)]
            for pair in zip(wanted, found, strict=True)
        ]
        right[name] = np.array(same)
    return {
        "share": {name: float(is_right.sum() / max(there.sum(), 1)) for name, is_right in right.items()},
        "by_position": {
            name: (is_right.sum(axis=0) / np.maximum(there.sum(axis=0), 1)).tolist() for name, is_right in right.items()
        },
        "added": float((drawn & ~there).sum() / len(there)),
    }


def _copied(true: np.ndarray, mean: np.ndarray) -> np.ndarray:
    """Each token's departure from its position's mean, repeated at the next position; the first has the mean."""
    departure = np.concatenate([np.zeros_like(true[:, :1]), (true - mean)[:, :-1]], axis=1)
    return mean + departure


def _name(fraction: float) -> str:
    return {0.0: "free_running", 1.0: "teacher_forced"}.get(fraction, f"teacher_{fraction:g}")


def _fit_map(inputs: np.ndarray, outputs: np.ndarray) -> LinearMap:
    """The ridge regression from embeddings [images, N, d] to the judge's features, one for all positions."""
    x, y = (values.reshape(-1, values.shape[-1]) for values in (inputs, outputs))
    return best_ridge(x, y, lambda guess, wanted: float(((guess - wanted) ** 2).mean()))


def summarise(errors: Mapping[str, np.ndarray], variance: np.ndarray) -> dict[str, Any]:
    """Curves, means over positions, gap, growth and horizon, with intervals.

    Args:
        errors: squared distances to the truth by name, [images, N].
        variance: squared distances of the truth to its mean at each position, [images, N].
    """
    rng = np.random.default_rng(0)
    num_images = len(variance)
    weights = rng.multinomial(num_images, np.full(num_images, 1 / num_images), size=NUM_DRAWS)

    def statistics(weight: np.ndarray) -> dict[str, float]:
        curves = {name: weight @ error / (weight @ variance) for name, error in errors.items()}
        total = {name: (weight @ error).sum() / (weight @ variance).sum() for name, error in errors.items()}
        return total | {
            "gap": total["free_running"] - total["teacher_forced"],
            "growth": _growth(curves["free_running"]),
            "horizon": _horizon(curves["free_running"], curves["floor"]),
        }

    whole = statistics(np.ones(num_images))
    drawn = [statistics(weight) for weight in weights]
    intervals = {
        name: [float(value), *(float(x) for x in np.quantile([one[name] for one in drawn], (0.025, 0.975)))]
        for name, value in whole.items()
    }
    curves = {name: (error.sum(axis=0) / variance.sum(axis=0)).tolist() for name, error in errors.items()}
    return {
        "curves": curves,
        "overall": {name: intervals[name] for name in errors},
        **{name: intervals[name] for name in ("gap", "growth", "horizon")},
    }


def _growth(curve: np.ndarray) -> float:
    """Slope of the logarithm over positions: 0.1 is ten per cent more error with every position."""
    if len(curve) < 2:
        return 0.0
    return float(np.polyfit(np.arange(len(curve)), np.log(np.maximum(curve, 1e-12)), 1)[0])


def _horizon(curve: np.ndarray, floor: np.ndarray) -> float:
    """Positions before the error passes half of the way from the floor to the mean embedding's 1 (our choice)."""
    beyond = np.flatnonzero(curve > (floor + 1) / 2)
    return float(beyond[0] if len(beyond) else len(curve))


def _retrieval(guess: np.ndarray, seen: np.ndarray) -> list[float]:
    """Share of rollouts nearest to their own image among all, by the positions up to each; position means removed."""
    mean = seen.mean(axis=0)
    shares = []
    for last in range(1, seen.shape[1] + 1):
        a, b = ((x[:, :last] - mean[:last]).reshape(len(x), -1) for x in (guess, seen))
        a, b = (x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12) for x in (a, b))
        shares.append(float(((a @ b.T).argmax(axis=1) == np.arange(len(seen))).mean()))
    return shares


def _leak(fitting: np.ndarray, measured: np.ndarray) -> float:
    """R^2 of z[t+1] from z[t] and the mean of z[..t], by a linear map fitted on other images, over position means."""
    if measured.shape[1] < 2:
        return 0.0
    mean = fitting.mean(axis=0)

    def before(z: np.ndarray) -> np.ndarray:
        centred = z - mean
        average = np.cumsum(centred, axis=1) / np.arange(1, z.shape[1] + 1)[:, None]
        return np.concatenate([centred, average], axis=-1)[:, :-1]

    guess = _fit_map(before(fitting), (fitting - mean)[:, 1:])(before(measured))
    truth = (measured - mean)[:, 1:]
    return float(1 - ((guess - truth) ** 2).sum() / (truth**2).sum())


def format_rollout_error(result: Mapping[str, Any]) -> str:
    """What the command prints."""
    overall = result["overall"]
    lines = [f"rollout error (1 - R^2 in the space of judge {result['judge']}; {result['num_images']} images)"]
    for name, (value, low, high) in overall.items():
        lines.append(f"  {name:<16}{value:8.4f}   {low:.4f} to {high:.4f}")
    for name in ("gap", "growth", "horizon"):
        value, low, high = result[name]
        lines.append(f"  {name:<16}{value:8.4f}   {low:.4f} to {high:.4f}")
    leak = result["leak"]
    lines.append(
        f"  the leak: {leak['r_squared']:.3f} of the next embedding's variance follows from earlier ones without text "
        f"({leak['encoder_attention']} encoder); teacher forcing is optimistic by what of that is pixels"
    )
    for kind, found in result.get("attributes", {}).items():
        shares = ", ".join(f"{name} {share:.3f}" for name, share in found["share"].items())
        lines.append(f"  read in {kind}: {shares}; {found['added']:.2f} added a picture")
    lines.append(
        f"  found among {result['num_images']} by all positions: {result['retrieval_by_position'][-1]:.3f} "
        f"(chance {result['chance']:.3f})"
    )
    return "\n".join(lines)


def plot_rollout_error(result: Mapping[str, Any], path: Path) -> None:
    """Error by position of free running, of each teacher fraction, and of the baselines."""
    from matplotlib.figure import Figure  # only who draws needs it; a figure of its own keeps no global state

    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.add_subplot()
    shades = {"free_running": "#c2570c", "teacher_forced": "#1b6ca8", "floor": "#6b7280", "drawn": "#7a3e9d"}
    for name, curve in result["curves"].items():
        positions = np.arange(1, len(curve) + 1)
        is_main, is_baseline = name in shades, name in ("mean_embedding", "copy_previous")
        axes.plot(
            positions, curve, label=name.replace("_", " "), color=shades.get(name), linewidth=2 if is_main else 1,
            linestyle=":" if is_baseline else "-", marker="." if is_main else None,
        )  # fmt: skip
    axes.set_xlabel("visual token")
    axes.set_ylabel("1 - R² in the judge's space")
    axes.set_ylim(bottom=0)
    axes.set_title(f"{result['source']}: {result['num_images']} images, judge {result['judge']}", fontsize=10)
    axes.legend(fontsize=8, frameon=False, ncols=2)
    figure.savefig(path, dpi=120)
