"""The instruments by layer, on vectors and states whose answer is known, and the command on a run."""

import dataclasses
import json
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small
from conftest import make_tiny_config

from data_pipelines.scenes import encode_png
from unihetero_jax import cli
from unihetero_jax.data.labelled_images import class_names, read_labelled_images
from unihetero_jax.evaluation import layers as instrument
from unihetero_jax.evaluation.ridge import STRENGTHS, best_ridge, ridge
from unihetero_jax.model.attention import decoder_attention
from unihetero_jax.model.unihetero import build
from unihetero_jax.objectives import count_targets
from unihetero_jax.step import loss_terms
from unihetero_jax.train import train


def gram_of(*vectors):
    stacked = np.stack(vectors)
    return stacked @ stacked.T


def test_figures_of_known_vectors():
    t, v = np.array([3.0, 0.0, 0.0]), np.array([0.0, 4.0, 0.0])
    same = instrument._figures(gram_of(t, t, t, t))
    assert same["cosine"] == same["corrected"] == same["text_halves"] == same["norm_ratio"] == pytest.approx(1)
    apart = instrument._figures(gram_of(t, t, v, v))
    assert apart["cosine"] == apart["corrected"] == 0 and apart["norm_ratio"] == pytest.approx(4 / 3)
    against = instrument._figures(gram_of(t, t, -2 * t, -2 * t))
    assert against["cosine"] == against["corrected"] == pytest.approx(-1)
    noise = instrument._figures(gram_of(t, -t, v, v))
    assert noise["text_halves"] == pytest.approx(-1) and noise["corrected"] is None


@pytest.mark.parametrize("planted", [-0.6, 0.0, 0.6])
def test_the_corrected_cosine_finds_a_planted_one_under_noise(planted):
    """Noise ten times as long as the gradients hides the plain cosine; shared within a half, it fakes another one."""
    rng, width, batches = np.random.default_rng(0), 200, 400
    t = rng.standard_normal(width)
    t /= np.linalg.norm(t)
    other = rng.standard_normal(width)
    other -= (other @ t) * t
    v = planted * t + np.sqrt(1 - planted**2) * other / np.linalg.norm(other)
    grams = []
    for _ in range(batches):
        shared = 3 * rng.standard_normal((2, width)) / np.sqrt(width)
        text, visual = (3 * rng.standard_normal((2, width)) / np.sqrt(width) + shared for _ in range(2))
        grams.append(gram_of(t + text[0], t + text[1], v + visual[0], v + visual[1]))
    found = instrument._with_intervals(np.stack(grams))
    value, low, high = found["corrected"]
    assert low < planted < high and value == pytest.approx(planted, abs=0.1)
    assert found["cosine"][0] == pytest.approx(0.5, abs=0.15), "whatever was planted: rows that both losses share"
    assert found["text_halves"][0] < 0.1, "and the noise floor says how much of it there is"


def test_losses_that_do_not_agree_with_themselves_have_no_corrected_cosine():
    rng = np.random.default_rng(0)
    found = instrument._with_intervals(np.stack([gram_of(*rng.standard_normal((4, 50))) for _ in range(20)]))
    assert found["corrected"] == [None, None, None] and found["text_halves"][1] < 0 < found["text_halves"][2]


def test_inner_products_are_those_of_the_gradients():
    config, params = make_tiny_config(loss__target="stop_gradient"), small.params_of()
    batch = small.mixed_batch(num_rows=4)
    grams = instrument._grams(config, params, {}, batch, "visual")
    counts = [count_targets(config, jax.tree.map(lambda x: x[start::2], batch)) for start in (0, 1)]  # noqa: B023

    def gradient(half, name):
        part = jax.tree.map(lambda x: x[half::2], batch)

        def mean(params):
            return loss_terms(config, params, {}, part, jnp.float32(1), counts[half]).sums[name] / counts[half][name]

        return jax.jit(jax.grad(mean))(params)

    gradients = [gradient(half, name) for name in ("text", "visual") for half in (0, 1)]
    blocks = [one["decoder"]["blocks"] for one in gradients]
    for layer in range(2):
        flat = [
            np.concatenate([np.asarray(x[layer]).ravel() for x in jax.tree.leaves([b["attention"]["query"], b["mlp"]])])
            for b in blocks
        ]
        rest = [
            np.concatenate([np.asarray(b["attention"][n]["kernel"][layer]).ravel() for n in ("key", "value", "out")])
            for b in blocks
        ]
        weights = gram_of(*flat) + gram_of(*rest)
        np.testing.assert_allclose(grams["decoder", layer, "weights"], weights, rtol=1e-3, atol=1e-7)
        gains = [
            [b["attention_norm"], b["mlp_norm"], b["attention"]["query_norm"], b["attention"]["key_norm"]]
            for b in blocks
        ]
        norms = [np.concatenate([np.asarray(one["gain"][layer]) for one in of_block]) for of_block in gains]
        np.testing.assert_allclose(grams["decoder", layer, "norms"], gram_of(*norms), rtol=1e-3, atol=1e-8)
    assert grams["semantic_head", -1, "weights"][0, 0] == 0 < grams["semantic_head", -1, "weights"][2, 2]


def test_layers_end_in_the_decoders_output_and_idle_ones_keep_the_image():
    config, params, batch = make_tiny_config(), small.params_of(), small.mixed_batch(num_rows=2)
    model = build(config.model, config.objective, params)
    x = model.embed(batch, model.see(batch))
    attention = decoder_attention("dense", batch.segment_ids, batch.branch_ids)
    layers = model.decoder.by_layer(x, batch.positions, attention)
    np.testing.assert_allclose(model.decoder.norm(layers[-1]), model.decoder(x, batch.positions, attention), atol=1e-5)
    idle = jax.tree_util.tree_map_with_path(
        lambda path, leaf: 0 * leaf if {"out", "down"} & {getattr(entry, "key", "") for entry in path} else leaf,
        params["decoder"],
    )
    model = build(config.model, config.objective, params | {"decoder": idle})
    kept = model.decoder.by_layer(x, batch.positions, attention)
    np.testing.assert_array_equal(kept, np.broadcast_to(x, kept.shape))
    assert instrument._mean_cosine(np.asarray(kept[0]), np.asarray(x)) == pytest.approx(1)
    assert instrument._mean_cosine(np.asarray(layers[-1]), np.asarray(x)) < 0.99


def test_probes_read_what_is_there_and_no_more():
    rng = np.random.default_rng(0)
    train, test = rng.standard_normal((300, 3, 8)), rng.standard_normal((80, 3, 8))
    direction = rng.standard_normal(8)

    def named(x):
        labels = np.where(x @ direction > 0, "red", "blue").astype(object)
        labels[:, 2] = ""
        return labels.astype(str)

    accuracy, floor = instrument.probe(train, named(train), test, named(test))
    assert accuracy > 0.95 and 0.3 < floor < 0.7
    shuffled = named(train)[rng.permutation(300)]
    assert instrument.probe(train, shuffled, test, named(test))[0] < 0.7, "labels of other images teach nothing"
    alone = np.full((300, 3), "red")
    assert instrument.probe(train, alone, test, np.full((80, 3), "red")) == (1.0, 1.0)


def test_the_best_ridge_is_least_squares_with_penalty_rows():
    """By numpy's least squares on rows that pull the weights to zero; its strength is that of the held-out fifth."""
    rng = np.random.default_rng(1)
    x, y = rng.standard_normal((40, 5)) + 3.0, rng.standard_normal((40, 2))
    square = (np.square(x - x.mean(axis=0)).sum() / 40) / 5

    def by_rows(x, y, strength):
        inputs, wanted = x - x.mean(axis=0), y - y.mean(axis=0)
        penalty = np.sqrt(strength * square * len(x)) * np.eye(5)
        weights = np.linalg.lstsq(np.r_[inputs, penalty], np.r_[wanted, np.zeros((5, 2))], rcond=None)[0]
        return lambda values: (values - x.mean(axis=0)) @ weights + y.mean(axis=0)

    fresh = rng.standard_normal((7, 5))
    np.testing.assert_allclose(ridge(x, y, 0.3)(fresh), by_rows(x, y, 0.3)(fresh), atol=1e-9)
    # Noise has nothing to tell: the strongest penalty serves best.
    chosen = best_ridge(x, y, lambda guess, wanted: float(((guess - wanted) ** 2).mean()))
    np.testing.assert_allclose(chosen(fresh), ridge(x, y, max(STRENGTHS))(fresh))


def test_classes_of_pictures_are_told_from_every_layer(tmp_path):
    """Folders of dark and bright pictures of two sizes; labels that fit no picture are told no better than chance."""
    rng, config = np.random.default_rng(0), make_tiny_config()
    for name, low in (("bright", 150), ("dark", 0)):
        (tmp_path / name).mkdir()
        for number in range(40):
            side = 8 * (1 + number // 2 % 2)
            pixels = (low + rng.integers(0, 100, (side, 8, 3))).astype(np.uint8)
            (tmp_path / name / f"{number:02}.png").write_bytes(encode_png(pixels))
    images, names = list(read_labelled_images(tmp_path)), class_names(tmp_path)
    tokenizer = SimpleNamespace(boi_id=small.BOI, pad_id=small.PAD)
    found = instrument.class_probes(config, small.params_of(), tokenizer, images, names)
    assert list(found) == ["encoder", "input", "layer 1", "layer 2"]
    assert all(accuracy > 0.9 and floor == 0.5 for accuracy, floor in found.values())
    random = [dataclasses.replace(image, label=int(rng.integers(2))) for image in images]
    assert (
        max(x for x, _ in instrument.class_probes(config, small.params_of(), tokenizer, random, names).values()) < 0.8
    )
    with pytest.raises(ValueError, match="3 pictures of 2 classes; at least two of each"):
        instrument.class_probes(config, small.params_of(), tokenizer, images[:3], names)


@pytest.mark.parametrize("rank", [1, 3, 8])
def test_effective_rank_counts_equal_directions(rank):
    rng = np.random.default_rng(0)
    basis = np.linalg.qr(rng.standard_normal((8, 8)))[0][:rank]
    states = rng.standard_normal((50, 400, rank)) @ basis + 5.0
    assert instrument.effective_rank(states) == pytest.approx(rank, rel=0.02)


@pytest.mark.slow
def test_the_command_writes_figures_and_a_plot(tiny_experiment, tiny_world, tmp_path, capsys):
    workdir = tmp_path / "run"
    config = tiny_experiment(
        train__num_steps=2, eval__rollout_source="generation", eval__rollout_candidates=8,
        eval__benchmarks={"scenes": str(tiny_world / "questions.tsv")}, loss__cut_input_gradient=False,
    )  # fmt: skip
    train(config, workdir)
    assert cli.main(["evaluate", f"--workdir={workdir}", "--probe-images=nowhere"]) == 2
    assert "say --layers, too" in capsys.readouterr().err
    assert cli.main(["evaluate", f"--workdir={workdir}", "--layers", "--probe-images=nowhere"]) == 2
    assert "nowhere: no such file or folder of labelled pictures" in capsys.readouterr().err
    assert cli.main(["evaluate", f"--workdir={workdir}", "--layers"]) == 0
    printed = capsys.readouterr().out
    assert "gradients of text and visual" in printed and "(commonest)" in printed
    found = json.loads((workdir / "eval" / "layers-2.json").read_text())
    assert [row["name"] for row in found["layers"]] == ["encoder", "input", "layer 1"]
    assert found["layers"][1]["retention"] == pytest.approx(1) and found["layers"][0]["retention"] is None
    assert found["layers"][1]["probes"].keys() == {"color", "shape", "size", "there"}
    parts = {(row["component"], row["layer"], row["part"]) for row in found["conflict"]}
    assert {("decoder", 0, "weights"), ("decoder", 0, "norms"), ("projector", -1, "weights")} <= parts
    assert not any(component == "semantic_head" for component, _, _ in parts), "the text loss does not reach it"
    assert (workdir / "eval" / "layers-2.png").stat().st_size > 5000
