"""What is guessed without looking: counted by hand, and against sets whose best guess is known."""

import dataclasses
import io
import math

import pytest
from PIL import Image

from data_pipelines.bias import (
    QuestionPrior,
    Turn,
    coverage,
    jaccard,
    measure_bias,
    turns_of,
    words_of,
)
from unihetero_jax.data.records import ImageSegment, Record, TextSegment


def image(number):
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), (number // 256, number % 256, 0)).save(buffer, "PNG")
    return ImageSegment(buffer.getvalue(), 8, 8)


def asked(number, *turns):
    segments = [image(number)]
    for branch, (question, answer) in enumerate(turns, start=1):
        segments += [TextSegment(question, False, branch), TextSegment(answer, True, branch)]
    return Record("set", "vqa", tuple(segments))


def plain(*segments):
    return Record("set", "text", segments)


def test_words_are_lower_cased_runs_of_letters_and_digits():
    assert words_of("The 2 DOGS' café_3, isn't\nит!") == ["the", "2", "dogs", "café_3", "isn", "t", "ит"]


def test_a_turn_is_a_supervised_text_with_what_leads_to_it():
    picture = image(0)
    branches = plain(
        TextSegment("Be brief. "), picture, TextSegment("Look."), TextSegment(" What? ", False, 1),
        TextSegment(" dog", True, 1), TextSegment(" Where? ", False, 2), TextSegment(" home", True, 2),
    )  # fmt: skip
    assert list(turns_of(branches)) == [Turn("Be brief. Look. What?", "dog"), Turn("Be brief. Look. Where?", "home")]
    dialogue = plain(
        TextSegment("What?"), TextSegment(" dog", True), TextSegment("\nBig?"), TextSegment(" no", True),
        TextSegment("Sure?", False, 1), TextSegment(" yes", True, 1),
    )  # fmt: skip
    assert list(turns_of(dialogue)) == [Turn("What?", "dog"), Turn("Big?", "no"), Turn("Sure?", "yes")]
    document = plain(TextSegment("One. ", True), picture, TextSegment(" ", True), TextSegment("Two.", True))
    assert list(turns_of(document)) == [Turn("", "One."), Turn("", "Two.")]
    assert list(turns_of(plain(TextSegment("read only")))) == []


def test_priors_of_each_question_are_counts():
    records = [
        asked(0, ("What color?", " Red"), ("How many?", " 2")),
        asked(1, ("What color?", "red "), ("How many?", " 3")),
        asked(2, ("What color?", " blue")),
        plain(image(3), TextSegment("a dog on grass", True)),
        plain(TextSegment("a dog", True)),
    ]
    bias = measure_bias(iter(records))
    assert bias.num_records == 5
    assert [dataclasses.replace(prior, held_out=0.0) for prior in bias.answers.questions] == [
        QuestionPrior("What color?", 3, 2, "red", 2 / 3, 0.0),
        QuestionPrior("How many?", 2, 2, "2", 1 / 2, 0.0),
    ]
    assert bias.answers.common_answers == (("red", 2), ("2", 1), ("3", 1), ("blue", 1))
    assert (bias.answers.num_answers, bias.captions.num_answers) == (5, 2)
    assert bias.captions.common_answers == (("a dog", 1), ("a dog on grass", 1))
    assert (bias.answer_words, bias.caption_words) == ({1: 5}, {4: 1, 2: 1})
    assert bias.vocabulary == {
        "what": 3, "color": 3, "red": 2, "blue": 1, "how": 2, "many": 2, "2": 1, "3": 1, "a": 2, "dog": 2, "on": 1,
        "grass": 1,
    }  # fmt: skip


def test_an_answer_that_follows_from_the_question_is_guessed():
    colours = ["red", "blue", "green", "black"]
    records = [asked(n, (f"What color is {'abcd'[n % 4]}?", colours[n % 4])) for n in range(400)]
    held_out = measure_bias(records).answers.held_out
    assert held_out["by question"] == 1.0
    assert 0.2 < held_out["always the same"] <= 0.3


def test_each_question_has_a_held_out_share_of_its_own():
    """Colour follows a coin of 3 to 1; the number of a picture is its own, so 1 is the most common by mere order."""
    records = [asked(n, ("What color?", "red" if n % 4 else "blue"), ("Which number?", str(n))) for n in range(400)]
    color, number = measure_bias(records).answers.questions
    assert (color.question, color.share, color.held_out) == ("What color?", 0.75, 0.75)
    assert (number.share, number.held_out) == (1 / 400, 0.0)
    assert measure_bias(records).answers.held_out["by question"] == 300 / 800


def test_unknown_wording_is_guessed_by_its_first_words():
    records = [asked(n, (f"{'Is there' if n % 2 else 'How many'} x{n}?", "yes" if n % 2 else "2")) for n in range(300)]
    answers = measure_bias(records).answers
    assert len(answers.questions) == 300 and all(prior.share == 1.0 for prior in answers.questions)
    assert 0.45 < answers.best < 0.56, "no question is asked twice, and three words include the unknown one"
    records = [
        asked(n, (f"{'Is there a' if n % 2 else 'How many of'} x{n}?", "yes" if n % 2 else "2")) for n in range(300)
    ]
    assert measure_bias(records).answers.held_out["by first words"] == 1.0


def test_what_cannot_be_guessed_is_not_however_often_a_picture_repeats():
    """Each picture has an answer of its own, known to who has seen the picture's question in another record."""
    records = [
        asked(n, (f"What is thing {n}?", f"a{n}"), (f"And copy {k} of {n}?", f"b{n} {k}"))
        for n in range(200)
        for k in range(3)
    ]
    answers = measure_bias(records).answers
    assert answers.num_answers == 1200 and answers.best < 0.02
    assert answers.questions[0].share == 1.0, "the upper bound over all answers says nothing here"


def test_the_standard_error_is_that_of_a_share():
    records = [asked(n, ("Is it?", "yes" if n % 4 else "no")) for n in range(1000)]
    answers = measure_bias(records).answers
    assert answers.best == pytest.approx(0.75)
    assert answers.standard_error == pytest.approx(math.sqrt(0.75 * 0.25 / 1000))


def test_long_texts_are_told_apart_though_only_their_start_is_kept():
    start = "word " * 100
    records = [asked(n, (start + f"question {n % 2}", start + f"answer {n % 2}")) for n in range(100)]
    answers = measure_bias(records).answers
    assert len(answers.questions) == 2 and len(answers.common_answers) == 2
    assert answers.held_out["by question"] == 1.0
    assert all(len(prior.question) < 230 and prior.question.startswith("word word") for prior in answers.questions)


def test_nothing_to_guess():
    bias = measure_bias([plain(TextSegment("read only"))])
    assert math.isnan(bias.answers.best) and math.isnan(bias.answers.standard_error)
    assert (bias.answers.questions, bias.captions.common_answers) == ((), ())
    assert measure_bias([]).num_records == 0


def test_words_in_common():
    one, other = {"a": 3, "dog": 1, "runs": 1}, {"a": 1, "cat": 5}
    assert jaccard(one, other) == 1 / 4 and jaccard(one, one) == 1
    assert coverage(one, other) == 3 / 5 and coverage(other, one) == 1 / 6
    assert math.isnan(jaccard({}, {})) and math.isnan(coverage({}, one)) and coverage(one, {}) == 0
