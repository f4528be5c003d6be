"""The public scorers' rules, on the examples that state them; `test_official.py` has the golden files."""

import random

import pytest

from unihetero_jax.evaluation import extraction
from unihetero_jax.evaluation.extraction import lmms_eval_option, vlmevalkit_option

ANIMALS = ("cat", "a dog", "frog", "bird")
A, B, C, D = range(4)


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("B", B),
        ("(B)", B),
        ("Answer: B.", B),
        ("#B!", B),
        ("b", None),  # letters are case-sensitive, and no option's text is in it
        ("Is it B or C", None),
        ("B is what I would say to that", None),  # the letter stands before the last four words
        ("I would say B to that", B),  # among the last four
        ("B one two three", B),
        ("B one two three four", None),  # the fifth from the end
        ("Z frog", None),  # none of them, says the letter, whatever text follows
        ("I say, the correct answer is **B**. Here is why: it barks a lot and has a tail", B),
        ("the answer is d, since it flies through the air and all that", D),  # this pattern is not case-sensitive
        ("Z", None),
        ("Cannot determine the answer. D", None),
        ("Sorry, I can't help with images of people yet. B", None),
        ("A FROG", A),  # the article is taken for the letter, as by the original
        ("FROG", C),
        ("it is a dog", B),
        ("a cat and a dog", None),
        ("frog " * 8, None),  # longer than twice all options together
        ("E", None),
        ("", None),
        ("Failed to obtain answer via API: B", None),
        ("Failed to obtain answer via API: frog", None),  # too long to search for a text
    ],
)
def test_vlmevalkit(answer, expected):
    assert vlmevalkit_option(answer, ANIMALS) == expected


def test_options_as_they_are_read_are_texts_whatever_they_say():
    assert vlmevalkit_option("none", ("None", "NA", "3", "07")) == 0
    assert vlmevalkit_option("07", ("None", "NA", "3", "07")) == 3
    assert vlmevalkit_option("answer is C", ("yes", "no")) is None, "a letter that is no option"


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("B", B),
        ("B.", B),
        ("(B)", B),
        ("A dog is what I see", B),  # an article
        ("A cat or a bird", A),  # an article, and two options: the answer starts with the letter
        ("A frog here", A),  # three words are too few for an article
        ("A frog is here", C),
        ("It is a dog", B),
        ("(B) or (C)", C),  # of two in the same form the last
        ("B is what I would say to that", B),
        ("frog " * 8, C),  # no limit of length
        ("no idea", None),
        ("", None),
        ("E", None),
    ],
)
def test_lmms_eval(answer, expected):
    assert lmms_eval_option(answer, ANIMALS) == expected


@pytest.mark.parametrize(
    ("answer", "expected"),
    [("A", "A"), ("x (B) y C z", "B"), ("so: C", "C"), ("I choose the B one. D", "D"), ("xyz", "")],
)
def test_the_most_telling_place_wins(answer, expected):
    assert extraction.last_letter(answer, "ABCD") == expected


def test_first_character():
    assert [extraction.first_character(text, ANIMALS) for text in (" b) dog", "D", "e", "", "?")] == [
        B,
        D,
        None,
        None,
        None,
    ]


@pytest.mark.parametrize(
    ("answer", "pope", "vlmevalkit", "lmms_eval", "mme"),
    [
        ("yes", "yes", "yes", "yes", "yes"),
        ("Yes.", "yes", "yes", None, "yes"),
        ("No, it is not there", "no", "no", None, "no"),
        ("There is not. Yes", "no", "yes", None, None),
        ("I see a red car", "yes", None, None, None),  # POPE: whatever is no denial affirms
        ("yes and no", "no", None, None, "yes"),
        ("nothing", "yes", None, None, "no"),
        ("n", "yes", None, None, "no"),
        ("", None, None, None, None),
    ],
)
def test_yes_or_no(answer, pope, vlmevalkit, lmms_eval, mme):
    assert extraction.pope_answer(answer) == pope
    assert extraction.vlmevalkit_yes_no(answer) == vlmevalkit
    assert extraction.lmms_eval_yes_no(answer) == lmms_eval
    assert extraction.mme_answer(answer) == mme


def test_no_text_breaks_a_rule():
    """Ten thousand random answers of letters, marks, phrases and other alphabets: an option of the item, or None."""
    rng = random.Random(0)
    pieces = ["A", "B", "E", "Z", "(", ")", ".", "**", ":", " ", "\n", "answer is", "cat", "frog", "答案是", "no",
              "yes", "é", "\x00", "\U0001f600", "'", "1,000", "{}", "%s"]  # fmt: skip
    for _ in range(10_000):
        answer = "".join(rng.choices(pieces, k=rng.randrange(12)))
        options = tuple(rng.choices(["cat", "frog", "A", "", "no", "("], k=rng.randint(2, 6)))
        for rule in (vlmevalkit_option, lmms_eval_option, extraction.first_character):
            assert rule(answer, options) in (None, *range(len(options)))
        for rule in (extraction.pope_answer, extraction.vlmevalkit_yes_no, extraction.mme_answer):
            assert rule(answer) in (None, "yes", "no")
