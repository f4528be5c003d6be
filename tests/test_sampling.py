"""How the next token is drawn: literal probabilities in, kept sets and frequencies out."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from unihetero_jax.inference.sampling import GREEDY, Sampling, sample

DRAWS = 6000
PROBABILITIES = [0.1, 0.4, 0.2, 0.3]


def draw(distributions, sampling, seed=0):
    """Tokens by distribution: `DRAWS` rows in all, which alternate between them. One shape, so compiled once."""
    distributions = np.atleast_2d(np.asarray(distributions, np.float32))
    logits = jnp.log(np.resize(distributions, (DRAWS, 4)))
    tokens = np.asarray(sample(logits, jax.random.key(seed), sampling))
    assert tokens.dtype == np.int32
    return tokens.reshape(-1, len(distributions)).T


def assert_drawn_from(tokens, expected):
    """Frequencies lie within four standard errors of the probabilities; what has none never occurs."""
    expected = np.asarray(expected)
    frequencies = np.bincount(tokens, minlength=4) / len(tokens)
    tolerance = 4 * np.sqrt(expected * (1 - expected) / len(tokens))
    assert (np.abs(frequencies - expected) <= tolerance + 1e-6).all(), frequencies


@pytest.mark.parametrize("top_p", [1.0, 0.5])
def test_temperature_zero_takes_the_likeliest_whatever_the_seed(top_p):
    logits = jnp.array([[0.0, 2.0, 1.9, -1.0], [-3.0, -5.0, -4.0, -2.9], [-jnp.inf, 0.0, -jnp.inf, -jnp.inf]])
    for seed in range(3):
        tokens = sample(logits, jax.random.key(seed), Sampling(0.0, top_p))
        np.testing.assert_array_equal(tokens, [1, 3, 1])
    assert Sampling(0.0, 1.0) == GREEDY


def test_temperature_one_draws_from_the_softmax():
    assert_drawn_from(draw(PROBABILITIES, Sampling(1.0))[0], PROBABILITIES)


@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_temperature_divides_the_logits(temperature):
    powers = np.array(PROBABILITIES) ** (1 / temperature)
    assert_drawn_from(draw(PROBABILITIES, Sampling(temperature))[0], powers / powers.sum())


@pytest.mark.parametrize(
    ("top_p", "kept"),
    [(0.01, [1]), (0.39, [1]), (0.41, [1, 3]), (0.69, [1, 3]), (0.71, [1, 2, 3]), (0.89, [1, 2, 3]),
     (0.91, [0, 1, 2, 3]), (1.0, [0, 1, 2, 3])],
)  # fmt: skip
def test_top_p_keeps_the_smallest_set_with_that_probability(top_p, kept):
    """Of .4, .3, .2, .1 (given in another order); what is kept is drawn in its old proportions."""
    tokens = draw(PROBABILITIES, Sampling(1.0, top_p))[0]
    assert set(tokens.tolist()) == set(kept)
    expected = np.zeros(4)
    expected[kept] = np.array(PROBABILITIES)[kept]
    assert_drawn_from(tokens, expected / expected.sum())


def test_top_p_is_a_matter_of_each_row():
    """The first row drops a token that is likelier than the last that the second row keeps."""
    rows = [[0.6, 0.3, 0.06, 0.04], [0.2, 0.27, 0.3, 0.23], [0.0, 0.0, 0.0, 1.0]]
    first, second, third = draw(rows, Sampling(1.0, 0.5))
    assert_drawn_from(first, [1, 0, 0, 0])
    assert_drawn_from(second, [0, 27 / 57, 30 / 57, 0])
    assert_drawn_from(third, [0, 0, 0, 1])


def test_top_p_counts_the_probabilities_after_the_temperature():
    """.8, .15, .05 at temperature 3 are .508, .291, .202: of the former one token makes .75, of the latter two."""
    peaked = [0.8, 0.15, 0.05, 0]
    flat = np.array(peaked) ** (1 / 3)
    np.testing.assert_allclose(flat / flat.sum(), [0.508, 0.291, 0.202, 0], atol=1e-3)
    assert_drawn_from(draw(peaked, Sampling(1.0, 0.75))[0], [1, 0, 0, 0])
    assert_drawn_from(draw(peaked, Sampling(3.0, 0.75))[0], [*flat[:2] / flat[:2].sum(), 0, 0])


@pytest.mark.parametrize("sampling", [Sampling(1.0), Sampling(5.0), Sampling(1.0, 0.99)])
def test_a_forbidden_token_is_never_drawn(sampling):
    assert set(draw([0.5, 0.0, 0.3, 0.2], sampling)[0].tolist()) == {0, 2, 3}


@pytest.mark.parametrize("sampling", [Sampling(1.0), Sampling(0.7, 0.8)])
def test_draws_are_a_function_of_the_seed(sampling):
    first, again, other = (draw(PROBABILITIES, sampling, seed)[0] for seed in (3, 3, 4))
    np.testing.assert_array_equal(first, again)
    assert (first != other).mean() > 0.3


def test_rows_of_a_batch_are_drawn_apart():
    one, two = draw([PROBABILITIES, PROBABILITIES], Sampling(1.0))
    assert (one != two).mean() > 0.5


@pytest.mark.parametrize(("temperature", "top_p"), [(-0.1, 1.0), (1.0, 0.0), (1.0, 1.1), (1.0, -0.5)])
def test_values_out_of_range_are_refused(temperature, top_p):
    with pytest.raises(ValueError, match=rf"temperature {temperature} must be >= 0 and top_p {top_p} in \(0, 1\]"):
        Sampling(temperature, top_p)
