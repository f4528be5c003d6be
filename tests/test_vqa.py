"""Accuracy of open answers: by hand, on the examples of the VQA evaluation's own rules."""

import pytest

from unihetero_jax.evaluation.vqa import exact_match, normalize_evalai, normalize_vlmevalkit, vqa_accuracy


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The Two Dogs", "2 dogs"),
        ("dont know", "don't know"),
        ("couldnt've", "couldn't've"),
        ("well, it's 1,000!", "well it 's 1000"),
        ("black/white", "black white"),
        ("3.5", "3.5"),
        ("No. 7.", "no 7"),
        ("a\nb", "b"),
        ("", ""),
    ],
)
def test_evalai_normalisation(text, expected):
    assert normalize_evalai(text) == expected


def test_vlmevalkit_keeps_a_period_behind_a_digit():
    assert normalize_vlmevalkit("7.") == "7." and normalize_evalai("7.") == "7"
    assert normalize_vlmevalkit("1,000 men") == "1000 men"


def test_each_person_is_left_out_in_turn():
    """Of ten, n agree: those are judged by n - 1 others, the rest by n; so 1 agreeing gives .3, 2 .6, 3 .9, 4 all."""
    for count, expected in enumerate((0.0, 0.3, 0.6, 0.9, 1.0, 1.0)):
        people = ["red"] * count + [f"other{i}" for i in range(10 - count)]
        assert vqa_accuracy("Red", people) == pytest.approx(expected, abs=1e-12)


def test_vqa_s_own_code_leaves_agreed_answers_alone():
    agreed = ["Red."] * 10
    assert vqa_accuracy("red", agreed, "vqa") == 0.0, "no normalisation where all agree"
    assert vqa_accuracy("red", agreed, "evalai") == 1.0
    mixed = ["Red."] * 9 + ["blue"]
    assert vqa_accuracy("The red!", mixed, "vqa") == vqa_accuracy("The red!", mixed, "vlmevalkit") == 1.0


def test_exact_match_ignores_case_and_punctuation():
    assert exact_match("Yes.", "yes") == 1.0 and exact_match("t-shirt", "tshirt") == 1.0
    assert exact_match("the yes", "yes") == 0.0
