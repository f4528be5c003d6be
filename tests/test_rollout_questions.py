"""Questions on given embeddings: the true ones change nothing, others do, and what is unknown is not guessed."""

import dataclasses

import numpy as np
import pytest
import small
from conftest import make_tiny_config

from unihetero_jax.data.packing import ImagePiece
from unihetero_jax.evaluation.rollout_questions import in_place_of, log_probs_on
from unihetero_jax.loaded_run import make_log_probs
from unihetero_jax.model.unihetero import build


def rows_and_pictures():
    """Two rows of two samples that read an image each, of different grids."""
    rng = np.random.default_rng(0)
    rows = [[small.reading(rng, (1, 2)), small.reading(rng, (1, 2), turns=(2,))] for _ in range(2)]
    pictures = [
        next(piece.pixels for piece in sample.pieces if isinstance(piece, ImagePiece)) for row in rows for sample in row
    ]
    return small.batch_of(rows), pictures


def test_true_embeddings_give_the_models_own_answers_and_others_their_own():
    config = make_tiny_config(eval__batch_rows=2)
    params, (batch, pictures) = small.params_of(), rows_and_pictures()
    model = build(config.model, config.objective, params)
    seen = np.asarray(model.see(batch).visual_embeddings)
    true = np.stack([seen[row, 2 * image : 2 * image + 2] for row in (0, 1) for image in (0, 1)])
    arrays = small.host(batch)
    own = make_log_probs(config, params)(arrays)
    same = log_probs_on(config, params, in_place_of(config, pictures, true))(arrays)
    mask = arrays["text_loss_mask"]
    np.testing.assert_allclose(same[mask], own[mask], atol=1e-5)

    swapped = log_probs_on(config, params, in_place_of(config, pictures, true[[0, 1, 3, 2]]))(arrays)
    changed = np.abs(swapped - own)
    np.testing.assert_allclose(changed[0][mask[0]], 0, atol=1e-5)
    assert changed[1][mask[1]].max() > 1e-3, "the second row's images were exchanged"
    wrong = dataclasses.replace(batch, patches=batch.patches.at[1].add(1))
    with pytest.raises(KeyError):
        log_probs_on(config, params, in_place_of(config, pictures, true))(small.host(wrong))
    blind = log_probs_on(config, params, in_place_of(config, pictures, 0 * true))
    np.testing.assert_array_equal(blind(arrays), blind(arrays))
    assert np.abs(blind(arrays) - own)[mask].max() > 1e-3
