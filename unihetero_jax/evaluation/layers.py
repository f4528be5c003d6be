"""What happens layer by layer: do the losses pull apart, does the image stay, and what can be read from it?

gradient conflict   cosine and ratio of norms of two losses' gradients, weights and norms apart
visual retention    cosine of the hidden state at a visual position with the embedding that was put in there
linear probes       what stands at a visual position, told from the hidden state there by a linear map
effective rank      exp of the entropy of the singular values (Roy and Vetterli, EUSIPCO 2007)
"""

import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from unihetero_jax.arrays import Batch, VisionOutput
from unihetero_jax.config import MERGED_PATCHES, Config, Objective, pixel_role, visual_target
from unihetero_jax.data.labelled_images import LabelledImage
from unihetero_jax.data.mixture import image_spec, validation_batches
from unihetero_jax.data.packing import ImagePiece, PackedSample, TokenPiece
from unihetero_jax.data.records import decode_image
from unihetero_jax.data.tokenizer import Tokenizer
from unihetero_jax.data.transforms import resize_to_grid
from unihetero_jax.evaluation.diagnostics import Reader, boi_rows, held_out_samples, image_of
from unihetero_jax.evaluation.ridge import best_ridge
from unihetero_jax.inference.generate import prompt_batch
from unihetero_jax.model.attention import decoder_attention
from unihetero_jax.model.unihetero import Params, build
from unihetero_jax.objectives import count_targets
from unihetero_jax.step import loss_terms

MAX_BATCHES = 8
_NUM_DRAWS = 1000
_BATCH_IMAGES = 64
Part = tuple[str, int, str]
"""(component, layer or -1 where it has none, `weights` or `norms`)."""


# ---------------------------------------------------------------- gradient conflict


def second_loss(objective: Objective) -> Literal["visual", "pixel"] | None:
    """The loss beside that of the text; None without one."""
    if visual_target(objective):
        return "visual"
    return "pixel" if pixel_role(objective) else None


def gradient_conflict(config: Config, params: Params, ema: Params, tokenizer: Tokenizer) -> list[dict[str, Any]]:
    """How the gradients of the text loss and of the visual (else the pixel) loss lie to each other, part by part.

    Every source's validation rows are cut in two halves A and B, so that noise can be told from conflict:

        cosine           cos(t, v) over all rows
        text_halves      cos(t_A, t_B): the noise floor; a loss does not agree with itself any better
        visual_halves    cos(v_A, v_B)
        corrected        <t_A, v_B> / sqrt(<t_A, t_B> <v_A, v_B>), products of both halves averaged: no noise is shared,
                         so it estimates the cosine without any (our choice; None unless both losses agree with
                         themselves: lower bounds of the two halves' cosines above 0)
        norm_ratio       |v| / |t|, losses unweighted

    Args:
        config: the run's; its objective has a visual or a pixel loss that reaches what the text loss reaches.
        params, ema: the run's state.
        tokenizer: the run's.

    Returns:
        One mapping for each part that both losses reach: `component`, `layer`, `part`, and the figures as [value, low,
        high] (95%, bootstrap over batches).

    Raises:
        ValueError: the objective has one loss alone.
    """
    other = second_loss(config.objective)
    if other is None:
        raise ValueError(f"--layers: objective={config.objective} has no loss beside that of the text")
    grams = [_grams(config, params, ema, batch, other) for batch in _mixed_batches(config, tokenizer)]
    stacked = {part: np.stack([gram[part] for gram in grams]) for part in grams[0]}
    return [
        {"component": part[0], "layer": part[1], "part": part[2], **_with_intervals(values)}
        for part, values in stacked.items()
        if values[..., 0, 0].sum() > 0 and values[..., 2, 2].sum() > 0
    ]


def _mixed_batches(config: Config, tokenizer: Tokenizer) -> Iterator[Batch]:
    """Rows of all sources together, one batch of each at a time."""
    sources = [validation_batches(config, tokenizer, name) for name in config.data.sources]
    for _, parts in zip(range(MAX_BATCHES), zip(*sources, strict=False), strict=False):
        arrays: Any = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        yield Batch(**arrays)


def _grams(config: Config, params: Params, ema: Params, batch: Batch, other: str) -> dict[Part, np.ndarray]:
    """Inner products of (text A, text B, other A, other B) in every part, float64[4, 4]."""
    halves = [jax.tree.map(lambda x: x[start::2], batch) for start in (0, 1)]  # noqa: B023
    gradients = [_gradient(config, params, ema, half, name) for name in ("text", other) for half in halves]
    products = jax.device_get(_products(gradients))
    grams: dict[Part, np.ndarray] = {}
    for path, values in jax.tree_util.tree_leaves_with_path(products):
        names = [entry.key for entry in path if isinstance(entry, jax.tree_util.DictKey)]
        kind = "norms" if any("norm" in name for name in names[1:]) else "weights"
        by_layer = values if "blocks" in names else values[None]
        for layer, gram in enumerate(by_layer):
            part = (names[0], layer if "blocks" in names else -1, kind)
            grams[part] = grams.get(part, np.zeros((4, 4))) + np.asarray(gram, np.float64)
    return grams


@functools.partial(jax.jit, static_argnames=("config", "name"))
def _gradient(config: Config, params: Params, ema: Params, batch: Batch, name: str) -> Params:
    """Of a loss's mean over its targets; every device's rows together."""
    counts = count_targets(config, batch)

    def mean(params: Params) -> jax.Array:
        sums = loss_terms(config, params, ema, batch, jnp.float32(1.0), counts).sums
        return sums[name] / jnp.maximum(counts[name], 1.0)

    return jax.grad(mean)(params)


@jax.jit
def _products(gradients: list[Params]) -> Params:
    """[4, 4] of every parameter, and of stacked layers [L, 4, 4]."""

    def of(path: Any, *leaves: jax.Array) -> jax.Array:
        is_stacked = any(getattr(entry, "key", None) == "blocks" for entry in path)
        shape = (leaves[0].shape[0], -1) if is_stacked else (1, -1)
        vectors = jnp.stack([leaf.astype(jnp.float32).reshape(shape) for leaf in leaves])
        gram = jnp.einsum("alx,blx->lab", vectors, vectors)
        return gram if is_stacked else gram[0]

    return jax.tree_util.tree_map_with_path(of, *gradients)


def _with_intervals(grams: np.ndarray) -> dict[str, Any]:
    """The figures from inner products by batch, [batches, 4, 4]."""
    rng = np.random.default_rng(0)
    whole = _figures(grams.mean(axis=0))
    drawn = [_figures(grams[rng.integers(len(grams), size=len(grams))].mean(axis=0)) for _ in range(_NUM_DRAWS)]
    found: dict[str, Any] = {}
    for name, value in whole.items():
        values = [number for one in drawn if (number := one[name]) is not None]
        bounds = [float(x) for x in np.quantile(values, (0.025, 0.975))] if values else [None, None]
        found[name] = [value, *bounds]
    is_clear = all((found[name][1] or 0.0) > 0 for name in ("text_halves", "visual_halves"))
    return found if is_clear else found | {"corrected": [None, None, None]}


def _figures(gram: np.ndarray) -> dict[str, float | None]:
    text_a, text_b, other_a, other_b = range(4)
    text, other = gram[:2, :2].sum(), gram[2:, 2:].sum()
    shared = (gram[text_a, other_b] + gram[text_b, other_a]) / 2
    own = gram[text_a, text_b] * gram[other_a, other_b]
    is_clear = gram[text_a, text_b] > 0 and gram[other_a, other_b] > 0
    return {
        "cosine": _ratio(gram[:2, 2:].sum(), text * other),
        "text_halves": _ratio(gram[text_a, text_b], gram[text_a, text_a] * gram[text_b, text_b]),
        "visual_halves": _ratio(gram[other_a, other_b], gram[other_a, other_a] * gram[other_b, other_b]),
        "corrected": _ratio(shared, own) if is_clear else None,
        "norm_ratio": _ratio(other, other * text),
    }


def _ratio(product: float, square: float) -> float | None:
    return float(product / np.sqrt(square)) if square > 0 else None


# ---------------------------------------------------------------- retention, probes, rank


@dataclasses.dataclass(frozen=True)
class _Seen:
    """Images as every layer has them: float32[images, N, width] by name, and their pictures."""

    states: dict[str, np.ndarray]
    pictures: list[np.ndarray]


def visual_layers(
    config: Config, params: Params, tokenizer: Tokenizer, read: Reader | None = None
) -> list[dict[str, Any]]:
    """Retention, effective rank and probes of every layer, at the visual positions of images read without text.

    Args:
        config: the run's; images are those of `eval.rollout_source`, `eval.rollout_candidates` of them measured and
            further ones to fit the probes.
        params: the run's.
        tokenizer: the run's.
        read: names what stands at each position of a picture, for the probes.

    Returns:
        One mapping for each of `encoder`, `input` and the layers in order: `name`, `retention` and
        `retention_centred` (cosine with the input, raw and less each position's mean; None of the encoder, which has
        another space), `effective_rank` of all tokens, and `probes`: {attribute: [accuracy, the majority's share]}.

    Raises:
        ValueError: too few images, or images of several grids.
    """
    measured, fitting, _ = held_out_samples(config, tokenizer)
    test, train = (_seen(config, params, tokenizer, samples) for samples in (measured, fitting))
    labels = None if read is None else [_labels(read, seen.pictures) for seen in (train, test)]
    found = []
    for name, states in test.states.items():
        has_input_space = name != "encoder"
        row: dict[str, Any] = {"name": name, "effective_rank": effective_rank(states)}
        row["retention"] = _mean_cosine(states, test.states["input"]) if has_input_space else None
        row["retention_centred"] = (
            _mean_cosine(_centred(states), _centred(test.states["input"])) if has_input_space else None
        )
        if labels is not None:
            row["probes"] = {
                attribute: probe(train.states[name], labels[0][attribute], states, labels[1][attribute])
                for attribute in labels[0]
                if attribute in labels[1]
            }
        found.append(row)
    return found


def _seen(config: Config, params: Params, tokenizer: Tokenizer, samples: Sequence[Any]) -> _Seen:
    parts = []
    for start in range(0, len(samples), _BATCH_IMAGES):
        batch = boi_rows(config, tokenizer, samples[start : start + _BATCH_IMAGES])
        parts.append(jax.device_get(_states(config, params, batch)))
    states = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    return _Seen(states, [image_of(sample) for sample in samples])


def class_probes(
    config: Config, params: Params, tokenizer: Tokenizer, images: Sequence[LabelledImage], names: Sequence[str]
) -> dict[str, tuple[float, float]]:
    """What class a whole image is of, told from the mean of each layer's states at its tokens by a linear map.

    Args:
        config, params, tokenizer: the run's.
        images: pictures with their classes, of any grids; every second one fits the map, the others measure it.
        names: of the classes.

    Returns:
        {`encoder`, `input`, `layer 1` ...: (accuracy, share of the commonest class)}.

    Raises:
        ValueError: there are fewer than two images for each class.
        RecordError: a picture cannot be decoded, or is larger than the run's rows hold.
    """
    if len(images) < 2 * len(names):
        raise ValueError(
            f"--probe-images: {len(images)} pictures of {len(names)} classes; at least two of each are needed"
        )
    parts = []
    for start in range(0, len(images), _BATCH_IMAGES):
        pixels = (
            resize_to_grid(decode_image(image.picture.read()), image_spec(config))
            for image in images[start : start + _BATCH_IMAGES]
        )
        samples = [PackedSample([TokenPiece([tokenizer.boi_id]), ImagePiece(one)]) for one in pixels]
        parts.append(jax.device_get(_mean_states(config, params, prompt_batch(config, tokenizer, samples))))
    labels = np.array([names[image.label] for image in images])
    fit, held_out = slice(0, None, 2), slice(1, None, 2)
    found = {}
    for name in parts[0]:
        states = np.concatenate([part[name] for part in parts])
        found[name] = probe(states[fit], labels[fit], states[held_out], labels[held_out])
    return found


@functools.partial(jax.jit, static_argnames="config")
def _mean_states(config: Config, params: Params, batch: Batch) -> dict[str, jax.Array]:
    """Of rows `<boi>` and an image of any size: the mean over its tokens in every layer, float32[B, width]."""
    vision, layers = _read(config, params, batch)
    is_token = batch.patch_segment_ids[:, ::MERGED_PATCHES] > 0
    means = {"encoder": _mean(vision.merged, is_token), "input": _mean(vision.visual_embeddings, is_token)}
    return means | {
        f"layer {number + 1}": _mean(layers[number], batch.visual_mask) for number in range(layers.shape[0])
    }


def _read(config: Config, params: Params, batch: Batch) -> tuple[VisionOutput, jax.Array]:
    """What the vision path makes of the rows, and what each layer of the language model does, [L, B, T, D]."""
    model = build(config.model, config.objective, params)
    vision = model.see(batch)
    attention = decoder_attention(config.model.attention_backend, batch.segment_ids, batch.branch_ids)
    return vision, model.decoder.by_layer(model.embed(batch, vision), batch.positions, attention)


def _mean(states: jax.Array, mask: jax.Array) -> jax.Array:
    kept = jnp.where(mask[..., None], states.astype(jnp.float32), 0.0)
    return kept.sum(axis=1) / jnp.maximum(mask.sum(axis=1, keepdims=True), 1)


@functools.partial(jax.jit, static_argnames="config")
def _states(config: Config, params: Params, batch: Batch) -> dict[str, jax.Array]:
    """Of rows `<boi>` and an image: the image's tokens in every layer, float32[B, N, width]."""
    vision, layers = _read(config, params, batch)
    states = {"encoder": vision.merged, "input": vision.visual_embeddings}
    states |= {f"layer {number + 1}": layers[number][:, 1:] for number in range(config.model.decoder.num_layers)}
    return {name: value.astype(jnp.float32) for name, value in states.items()}


def _labels(read: Reader, pictures: Sequence[np.ndarray]) -> dict[str, np.ndarray]:
    """By attribute, the value at each position, strings [images, N]; "" where nothing stands. `there` is yes or no."""
    seen = [read(picture) for picture in pictures]
    names = sorted({name for one in seen for item in one if item for name in item})
    labels = {name: np.array([[item[name] if item else "" for item in one] for one in seen]) for name in names}
    return labels | {"there": np.array([["yes" if item else "no" for item in one] for one in seen])}


def probe(
    train: np.ndarray, train_labels: np.ndarray, test: np.ndarray, test_labels: np.ndarray
) -> tuple[float, float]:
    """(accuracy, share of the commonest class) of a ridge regression onto classes; positions labelled "" are left out.

    Args:
        train, test: [images, N, width], or [images, width].
        train_labels, test_labels: strings [images, N], or [images].
    """
    classes = sorted(set(train_labels[train_labels != ""]))
    inputs, labels = train[train_labels != ""].astype(np.float64), train_labels[train_labels != ""]
    fresh, truth = test[test_labels != ""].astype(np.float64), test_labels[test_labels != ""]
    mean, deviation = inputs.mean(axis=0), inputs.std(axis=0) + 1e-8
    one_hot = (labels[:, None] == np.array(classes)).astype(np.float64)
    tell = best_ridge((inputs - mean) / deviation, one_hot, _share_wrong)
    guess = np.array(classes)[tell((fresh - mean) / deviation).argmax(axis=1)]
    commonest = max(classes, key=lambda name: (labels == name).sum())
    return float((guess == truth).mean()), float((truth == commonest).mean())


def _share_wrong(guess: np.ndarray, wanted: np.ndarray) -> float:
    return float((guess.argmax(axis=1) != wanted.argmax(axis=1)).mean())


def effective_rank(states: np.ndarray) -> float:
    """exp of the entropy of the singular values' shares, of all tokens less their mean; [..., width]."""
    flat = states.reshape(-1, states.shape[-1]).astype(np.float64)
    values = np.linalg.svd(flat - flat.mean(axis=0), compute_uv=False)
    shares = values[values > 0] / max(values.sum(), 1e-300)
    return float(np.exp(-(shares * np.log(shares)).sum()))


def _centred(states: np.ndarray) -> np.ndarray:
    return states - states.mean(axis=0)


def _mean_cosine(a: np.ndarray, b: np.ndarray) -> float:
    norms = np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1)
    return float(((a * b).sum(axis=-1) / np.maximum(norms, 1e-12)).mean())


# ---------------------------------------------------------------- what is shown


def format_layers(result: Mapping[str, Any]) -> str:
    """What the command prints."""
    lines = []
    if result["conflict"]:
        lines.append(f"{'gradients of text and ' + result['other_loss']:<32}{'cosine':>8}{'corrected':>11}"
                     f"{'text halves':>13}{'other halves':>14}{'norm ratio':>12}")  # fmt: skip
    for row in result["conflict"]:
        where = row["component"] + ("" if row["layer"] < 0 else f" {row['layer'] + 1}")
        values = (row[name][0] for name in ("cosine", "corrected", "text_halves", "visual_halves", "norm_ratio"))
        cells = [f"{value:.3f}" if value is not None else "-" for value in values]
        lines.append(f"{where + ' ' + row['part']:<32}" + "".join(map("{:>{}}".format, cells, (8, 11, 13, 14, 12))))
    attributes = sorted(result["layers"][0].get("probes", {}))
    lines.append(f"{'visual tokens':<16}{'retention':>10}{'centred':>9}{'rank':>8}"
                 + "".join(f"{'probe ' + name:>14}" for name in attributes))  # fmt: skip
    for row in result["layers"]:
        kept = [f"{row[name]:.3f}" if row[name] is not None else "-" for name in ("retention", "retention_centred")]
        probes = "".join(f"{row['probes'][name][0]:>14.3f}" for name in attributes)
        lines.append(f"{row['name']:<16}{kept[0]:>10}{kept[1]:>9}{row['effective_rank']:>8.1f}{probes}")
    if attributes:
        floors = "".join(f"{result['layers'][0]['probes'][name][1]:>14.3f}" for name in attributes)
        lines.append(f"{'(commonest)':<43}{floors}")
    for name, (accuracy, floor) in result.get("classes", {}).get("by_layer", {}).items():
        lines.append(
            f"class of {result['classes']['images']}, from {name:<12}{accuracy:>8.3f}   (commonest {floor:.3f})"
        )
    return "\n".join(lines)


def plot_layers(result: Mapping[str, Any], path: Path) -> None:
    """Conflict of the decoder's layers, retention and rank, and probes."""
    from matplotlib.figure import Figure  # only who draws needs it

    figure = Figure(figsize=(12, 3.6), layout="constrained")
    conflict, kept, probes = figure.subplots(1, 3)
    rows = [row for row in result["conflict"] if row["component"] == "decoder" and row["layer"] >= 0]
    for part, style in (("weights", "-"), ("norms", ":")):
        chosen = [row for row in rows if row["part"] == part]
        for name, color in (("cosine", "#c2570c"), ("corrected", "#7a3e9d"), ("text_halves", "#6b7280")):
            conflict.plot([row["layer"] + 1 for row in chosen], [row[name][0] for row in chosen], style, color=color,
                          marker=".", label=f"{name.replace('_', ' ')}, {part}")  # fmt: skip
    conflict.set_xticks([row["layer"] + 1 for row in rows if row["part"] == "weights"])
    conflict.axhline(0, color="#d9dce1", linewidth=1)
    conflict.set_title(f"gradients of text and {result['other_loss']} loss, by layer", fontsize=9)
    names = [row["name"] for row in result["layers"]]
    for name, color in (("retention", "#1b6ca8"), ("retention_centred", "#c2570c")):
        values = [row[name] for row in result["layers"]]
        kept.plot(names, [np.nan if value is None else value for value in values], marker=".", color=color,
                  label=name.replace("_", ", "))  # fmt: skip
    kept.set_title("cosine with the visual input", fontsize=9)
    for attribute in sorted(result["layers"][0].get("probes", {})):
        probes.plot(names, [row["probes"][attribute][0] for row in result["layers"]], marker=".", label=attribute)
    probes.set_title("linear probes: accuracy", fontsize=9)
    for axes in (kept, probes):
        axes.tick_params(axis="x", labelrotation=30, labelsize=7)
    for axes in (conflict, kept, probes):
        if axes.lines[1:]:
            axes.legend(fontsize=6, frameon=False)
    figure.savefig(path, dpi=120)
