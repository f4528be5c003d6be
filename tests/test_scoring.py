"""Accuracy, its references and the published scoring rules, against literal numbers and golden files."""

import json
import math
import os
import random
from pathlib import Path

import numpy as np
import pytest

from unihetero_jax.evaluation.benchmarks import Item, read_benchmark
from unihetero_jax.evaluation.scoring import (
    OptionScores,
    blind_floor,
    blind_floor_held_out,
    clustered_error,
    hits,
    summarize,
    summarize_by_category,
    yes_no_errors,
    yes_no_figures,
    yes_no_metrics,
)
from unihetero_jax.evaluation.training_prior import TrainingPrior, split_by_prior

DATA = Path(os.environ.get("UNIHETERO_DATA", Path(__file__).parents[2] / "shared" / "data")) / "evalmini"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason=f"no evalmini data at {DATA} (set UNIHETERO_DATA)")


def item(index: int, answer: int, options=("a", "b", "c", "d"), category="x", question="which?") -> Item:
    return Item(str(index), question, tuple(options), answer, (), category)


def test_sum_and_mean_per_token_rank_differently():
    scores = OptionScores(sum_log_probs=(-2.0, -3.0), num_tokens=(1, 3))
    assert scores.by_sum == 0
    assert scores.by_mean == 1
    summary = summarize([item(0, 1, ("a", "b b b"))], [scores])
    assert summary["accuracy"] == 0 and summary["accuracy_mean_normalized"] == 1
    assert summary["answer_nll_per_token"] == 1.0  # 3 nats over 3 tokens


def test_summary_in_numbers():
    items = [item(0, 0), item(1, 1), item(2, 2, category="y"), item(3, 0, ("yes", "no"), category="y")]
    good = [OptionScores((-1.0, -9.0, -9.0, -9.0), (1, 1, 1, 1)), OptionScores((-9.0, -2.0, -9.0, -9.0), (1, 2, 1, 1))]
    bad = [OptionScores((-1.0, -2.0, -3.0, -4.0), (1, 1, 1, 1)), OptionScores((), (), unscored="too_long")]
    summary = summarize(items, good + bad)
    assert hits(items, good + bad) == [1, 1, 0, 0]
    assert summary["accuracy"] == 0.5
    assert summary["standard_error"] == 0.25  # sqrt(.5 * .5 / 4)
    assert summary["chance"] == (3 * 0.25 + 0.5) / 4
    assert summary["num_items"] == 4 and summary["num_unscored"] == 1
    assert summary["answer_nll_per_token"] == (1 + 2 + 3) / 4
    by_category = summarize_by_category(items, good + bad)
    assert list(by_category) == ["x", "y"]
    assert by_category["x"]["accuracy"] == 1 and by_category["x"]["standard_error"] == 0
    assert by_category["y"]["accuracy"] == 0 and by_category["y"]["num_unscored"] == 1


def test_nothing_scored_has_no_likelihood():
    summary = summarize([item(0, 0)], [OptionScores((), (), unscored="too_long")])
    assert summary["accuracy"] == 0 and summary["answer_nll_per_token"] is None


def test_lengths_must_agree():
    with pytest.raises(ValueError, match="2 items and 1 scores"):
        summarize([item(0, 0), item(1, 0)], [OptionScores((0.0,) * 4, (1,) * 4)])
    with pytest.raises(ValueError, match="at least one"):
        summarize([], [])


def test_blind_floor_uses_question_text_and_options_only():
    # "what color?": red is right 3 times of 4 whatever its place, so the blind guesser gets 3 of 4.
    colors = [
        item(i, answer, ("red", "blue") if i % 2 else ("blue", "red"), question="what color?")
        for i, answer in enumerate([1, 0, 1, 1])
    ]
    assert blind_floor(colors) == 0.75
    # another question text has its own answer; an option that ties shares its credit
    counts = [item(4, 0, ("1", "2"), question="how many?"), item(5, 1, ("1", "2"), question="how many?")]
    assert blind_floor(counts) == 0.5
    assert blind_floor(colors + counts) == pytest.approx((3 + 1) / 6)


def test_blind_floors_on_balanced_and_on_predictable_answers():
    rng = random.Random(0)
    balanced = [item(i, rng.randrange(4)) for i in range(2000)]
    assert 0.25 <= blind_floor(balanced) < 0.29
    assert 0.20 < blind_floor_held_out(balanced) < 0.27
    predictable = [item(i, 2 if rng.random() < 0.8 else 0) for i in range(2000)]
    assert blind_floor_held_out(predictable) == pytest.approx(0.8, abs=0.03)
    unique = [item(i, rng.randrange(4), question=f"question {i}") for i in range(400)]
    assert blind_floor(unique) == 1.0, "in sample, a question text that never repeats gives itself away"
    assert blind_floor_held_out(unique) == pytest.approx(0.25, abs=0.04)
    # The right count is mostly the second smallest of its options, though every text occurs as often.
    middling = [
        item(i, rng.choice([1, 1, 1, 2]), tuple(str(i % 5 + k) for k in range(4)), question=f"q{i}") for i in range(999)
    ]
    assert blind_floor_held_out(middling) == pytest.approx(0.75, abs=0.04)


def test_yes_no_metrics():
    items = [item(i, answer, ("yes", "no")) for i, answer in enumerate([0, 0, 0, 1, 1])]
    metrics = yes_no_metrics(items, [0, 0, 1, 0, None])
    assert metrics == pytest.approx(
        {
            "accuracy": 0.4,
            "precision": 2 / 3,
            "recall": 2 / 3,
            "f1": 2 / 3,
            "yes_ratio": 0.6,
            "yes_ratio_of_labels": 0.6,
        }
    )
    assert yes_no_metrics([item(0, 0)], [0]) is None
    assert yes_no_metrics(items[3:], [1, 1])["f1"] == 0.0


@needs_data
def test_likelihood_rule_gives_the_golden_seed_bench_figures():
    """SEED-Bench's rule picks the smallest loss; our rule picks the largest log-probability."""
    benchmark = read_benchmark(DATA / "SEED-Bench_DEVMINI.json")
    golden = (json.loads(line) for line in (DATA / "golden" / "DEVMINI_seed_losses.jsonl").read_text().splitlines())
    losses = {row["question_id"]: row["losses"] for row in golden}
    scores = [OptionScores(tuple(-x for x in losses[i.index]), (1,) * len(i.options)) for i in benchmark.items]
    expected = json.loads((DATA / "golden" / "DEVMINI_expected.json").read_text())["seed_ppl"]["seed_bench_rule"]
    summary = summarize(benchmark.items, scores)
    assert summary["num_items"] == expected["n"]
    assert math.isclose(100 * summary["accuracy"], expected["total_pct"], abs_tol=1e-9)
    types = json.loads((DATA / "SEED-Bench_DEVMINI.json").read_text())["question_type"]
    by_type = {
        str(types[name]): 100 * s["accuracy"] for name, s in summarize_by_category(benchmark.items, scores).items()
    }
    assert by_type == pytest.approx(expected["per_type_pct"], abs=1e-9)


def test_what_the_answers_of_training_say():
    prior = TrainingPrior([
        ("What color?", "red"), ("What color?", "Red."), ("What color?", "blue"), ("How many dogs are there?", "two"),
        ("", "a caption"),
    ])  # fmt: skip
    items = [
        item(0, 0, ("red", "blue"), question="what color"), item(1, 1, ("red", "blue"), question="What color?"),
        item(2, 1, ("one", "two"), question="How many dogs sleep?"), item(3, 0, ("x", "y"), question="Why?"),
        item(4, 0, ("green", "pink"), question="What color?"),
    ]  # fmt: skip
    assert [prior.guess(one) for one in items] == [0, 0, 1, None, None]
    split = split_by_prior(prior, items, [0, 0, 0, 0, None])
    assert split["prior_accuracy"] == 2 / 3
    assert split["right"] == {"num_items": 2, "accuracy": 0.5} and split["wrong"] == {"num_items": 1, "accuracy": 0.0}
    assert split["silent"] == {"num_items": 2, "accuracy": 0.5}


def test_items_of_a_cluster_widen_the_error():
    values = [1, 1, 0, 1, 0, 0, 1, 0]
    apart = clustered_error(values, [str(i) for i in range(8)])
    assert apart == pytest.approx(math.sqrt(0.5 * 0.5 / 8))
    assert clustered_error(values * 4, [str(i) for i in range(8)] * 4) == pytest.approx(apart), (
        "copies tell nothing new"
    )
    assert clustered_error([1, 0, 1, 0], ["a", "a", "b", "b"]) == 0.0


@pytest.mark.parametrize("unparsed_is_no", [True, False])
def test_errors_of_f1_are_the_spread_over_samples_of_clusters(unparsed_is_no):
    """2,000 samples of 150 pictures with four questions each; an answer is neither yes nor no now and then."""
    rng = np.random.default_rng(1)
    found, errors = [], []
    for _ in range(2000):
        ease = np.repeat(rng.beta(1, 0.5, 150), 4)
        is_yes = rng.random(600) < 0.4
        said = np.where(rng.random(600) < ease, is_yes, ~is_yes)
        answers = np.where(rng.random(600) < 0.1, "", np.where(said, "yes", "no")).tolist()
        truth = np.where(is_yes, "yes", "no").tolist()
        found.append(yes_no_figures(truth, answers, unparsed_is_no))
        errors.append(yes_no_errors(truth, answers, np.repeat(np.arange(150), 4).astype(str).tolist(), unparsed_is_no))
    for name in ("accuracy", "precision", "recall", "f1", "yes_ratio"):
        spread = np.std([figures[name] for figures in found])
        assert np.mean([error[name] for error in errors]) == pytest.approx(spread, rel=0.06), name


def test_no_yes_has_no_error_of_its_precision():
    assert yes_no_errors(["no", "no"], ["no", "no"], ["a", "b"])["precision"] == 0.0


def test_the_clustered_error_is_the_spread_of_means_over_samples_of_clusters():
    """2,000 samples of 100 pictures with three questions each, which share much of their difficulty."""
    rng = np.random.default_rng(0)
    means, errors = [], []
    for _ in range(2000):
        ease = rng.beta(0.5, 0.5, 100)
        values = (rng.random((100, 3)) < ease[:, None]).astype(float).ravel()
        means.append(values.mean())
        errors.append(clustered_error(values.tolist(), np.repeat(np.arange(100), 3).astype(str).tolist()))
    assert np.mean(errors) == pytest.approx(np.std(means), rel=0.05)
    assert np.mean(errors) > 1.2 * math.sqrt(0.25 / 300), "the naive error is too small"
