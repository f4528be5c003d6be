"""The cumulative-error instrument on errors whose growth, horizon and floor are known."""

import numpy as np
import pytest

from unihetero_jax.evaluation import rollout_error as instrument

NUM_IMAGES, NUM_TOKENS, WIDTH = 400, 9, 6


def truth(rng, num_images=NUM_IMAGES):
    return rng.standard_normal((num_images, NUM_TOKENS, WIDTH)) + np.arange(NUM_TOKENS)[:, None]


def summary_of(curves):
    """A summary of predictions whose error at each position is that share of the truth's variance."""
    rng = np.random.default_rng(0)
    seen = truth(rng)
    errors = {
        name: ((np.sqrt(np.asarray(curve))[:, None] * rng.standard_normal(seen.shape)) ** 2).sum(axis=-1)
        for name, curve in curves.items()
    }
    variance = ((seen - seen.mean(axis=0)) ** 2).sum(axis=-1)
    return instrument.summarise(errors, variance)


def test_growth_and_horizon_of_errors_that_add_up():
    """A fifth more error at every position, and teacher forcing that stays where it was."""
    free = 0.2 * 1.2 ** np.arange(NUM_TOKENS)
    found = summary_of({"free_running": free, "teacher_forced": np.full(9, 0.2), "floor": np.full(9, 0.1)})
    np.testing.assert_allclose(found["curves"]["free_running"], free, rtol=0.15)
    value, low, high = found["growth"]
    assert low < np.log(1.2) < high and high - low < 0.06 and low < value < high
    value, low, high = found["gap"]
    assert value == pytest.approx(free.mean() - 0.2, rel=0.1) and low < value < high
    assert found["horizon"][0] == np.flatnonzero(free > 0.55)[0]
    value, low, high = found["overall"]["teacher_forced"]
    assert low < 0.2 < high and high - low < 0.03


def test_errors_that_do_not_add_up_have_neither():
    flat = np.full(NUM_TOKENS, 0.3)
    found = summary_of({"free_running": flat, "teacher_forced": flat, "floor": np.full(9, 0.1)})
    assert found["growth"][1] < 0 < found["growth"][2] and found["gap"][1] < 0 < found["gap"][2]
    assert found["horizon"][0] == NUM_TOKENS


def test_the_map_to_the_judge_is_the_linear_one_and_its_floor_the_noise():
    rng = np.random.default_rng(1)
    inputs, matrix = rng.standard_normal((200, NUM_TOKENS, 5)), rng.standard_normal((5, WIDTH))
    outputs = inputs @ matrix + 3.0
    found = instrument._fit_map(inputs, outputs)
    fresh = rng.standard_normal((7, NUM_TOKENS, 5))
    np.testing.assert_allclose(found(fresh), fresh @ matrix + 3.0, atol=5e-3)
    noise = instrument._fit_map(inputs, rng.standard_normal(outputs.shape))(fresh)
    assert np.abs(noise).mean() < 0.3, "what does not follow from the inputs is not made up"


def test_attributes_by_hand():
    """Two pictures of three positions, each named by its first pixel; what stands nowhere is asked of nobody."""
    red, blue = {"color": "red", "shape": "ring"}, {"color": "blue", "shape": "ring"}
    named = {0: [red, None, blue], 1: [blue, None, None], 2: [red, red, red]}

    def read(picture):
        return named[int(picture[0, 0, 0])]

    pictures = [np.full((2, 2, 3), value, np.uint8) for value in range(3)]
    found = instrument._fidelity(read, pictures[:2], {"drawn": [pictures[2], pictures[1]]})
    assert found["drawn"]["share"] == pytest.approx({"there": 1.0, "color": 2 / 3, "shape": 1.0})
    assert found["drawn"]["by_position"]["color"] == [1.0, 0.0, 0.0] and found["drawn"]["added"] == 0.5
    floor = found["another image"]["share"]
    assert floor == pytest.approx({"there": 2 / 3, "color": 0.0, "shape": 2 / 3}), "the first by the second, and back"


@pytest.mark.parametrize(("share", "expected"), [(0.0, 0.0), (0.6, 0.36), (1.0, 1.0)])
def test_the_leak_is_what_follows_from_earlier_tokens(share, expected):
    """Tokens that are each `share` of the one before, the rest fresh: of the next one's variance share^2 is known."""
    rng = np.random.default_rng(2)

    def chain(num_images):
        z = rng.standard_normal((num_images, NUM_TOKENS, 4))
        for position in range(1, NUM_TOKENS):
            z[:, position] = share * z[:, position - 1] + np.sqrt(1 - share**2) * z[:, position]
        return z + np.arange(NUM_TOKENS)[:, None]

    assert instrument._leak(chain(400), chain(300)) == pytest.approx(expected, abs=0.03)


def test_retrieval_grows_with_what_is_seen():
    rng = np.random.default_rng(3)
    seen = truth(rng, 64)
    found = instrument._retrieval(seen + 1.5 * rng.standard_normal(seen.shape), seen)
    assert found[-1] > 0.9 > 0.5 > found[0] > 1 / 64
    blind = instrument._retrieval(truth(np.random.default_rng(4), 64), seen)
    assert blind[-1] < 0.1, "position means alone find nothing"


def test_copies_carry_the_departure_from_the_mean_on():
    mean = np.arange(3.0)[:, None]
    true = np.array([[[0.5], [1.0], [4.0]]])
    np.testing.assert_allclose(instrument._copied(true, mean)[0, :, 0], [0.0, 1.5, 2.0])
