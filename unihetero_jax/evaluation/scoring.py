"""From the log-probabilities of options to accuracies, with what a guesser reaches printed beside them.

Rule (SEED-Bench's, EVALUATION.md): the option with the highest likelihood given image and question is the answer. The
main figure ranks by the *sum* of log-probabilities over an option's tokens; ranking by the mean per token is reported
beside it, because short options win under the sum and long ones under the mean. Equal scores go to the earlier option.
"""

import dataclasses
import hashlib
import math
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from unihetero_jax.evaluation.benchmarks import Item

NUM_FOLDS = 10
"""Parts of the held-out blind floor (our choice)."""


@dataclasses.dataclass(frozen=True)
class OptionScores:
    """What the model gave to the options of one item.

    Attributes:
        sum_log_probs: per option, log p(token | image, question, earlier tokens) summed over its tokens, in nats.
        num_tokens: per option, how many tokens that sum has.
        unscored: why the item could not be scored; empty when it was. Such an item has no numbers and counts as a miss.
    """

    sum_log_probs: tuple[float, ...]
    num_tokens: tuple[int, ...]
    unscored: str = ""

    @property
    def by_sum(self) -> int | None:
        """The option with the highest likelihood, or None for an unscored item."""
        return None if self.unscored else int(np.argmax(self.sum_log_probs))

    @property
    def by_mean(self) -> int | None:
        """The option with the highest likelihood per token (geometric mean), or None for an unscored item."""
        return None if self.unscored else int(np.argmax(np.divide(self.sum_log_probs, self.num_tokens)))


def summarize(items: Sequence[Item], scores: Sequence[OptionScores]) -> dict[str, Any]:
    """Accuracy and its references over `items`.

    Returns:
        accuracy: share of items whose likeliest option is right; an unscored item is a miss.
        standard_error: sqrt(p (1 - p) / n) of that share.
        accuracy_mean_normalized: the same when options are ranked by mean log-probability per token.
        chance: mean of 1 / (number of options).
        blind_floor: see `blind_floor`. blind_floor_held_out: see `blind_floor_held_out`.
        answer_nll_per_token: -(sum of log-probabilities) / tokens of the *right* options of scored items, nats.
        num_items, num_unscored: items in all, and those of them that could not be scored.

    Raises:
        ValueError: the two sequences differ in length or are empty.
    """
    if len(items) != len(scores) or not items:
        raise ValueError(f"{len(items)} items and {len(scores)} scores: need as many, and at least one")
    num_items = len(items)
    accuracy = sum(hits(items, scores)) / num_items
    scored = [(item, score) for item, score in zip(items, scores, strict=True) if not score.unscored]
    answer_tokens = sum(score.num_tokens[item.answer] for item, score in scored)
    answer_log_prob = math.fsum(score.sum_log_probs[item.answer] for item, score in scored)
    return {
        "accuracy": accuracy,
        "standard_error": math.sqrt(accuracy * (1 - accuracy) / num_items),
        "accuracy_mean_normalized": sum(s.by_mean == i.answer for i, s in zip(items, scores, strict=True)) / num_items,
        "chance": sum(1 / len(item.options) for item in items) / num_items,
        "blind_floor": blind_floor(items),
        "blind_floor_held_out": blind_floor_held_out(items),
        "answer_nll_per_token": -answer_log_prob / answer_tokens if answer_tokens else None,
        "num_items": num_items,
        "num_unscored": num_items - len(scored),
    }


def summarize_by_category(items: Sequence[Item], scores: Sequence[OptionScores]) -> dict[str, dict[str, Any]]:
    """`summarize` for each question type, in order of first appearance."""
    groups: dict[str, list[int]] = {}
    for position, item in enumerate(items):
        groups.setdefault(item.category, []).append(position)
    return {
        category: summarize([items[i] for i in positions], [scores[i] for i in positions])
        for category, positions in groups.items()
    }


def hits(items: Sequence[Item], scores: Sequence[OptionScores]) -> list[int]:
    """1 where the likeliest option is the right one, else 0."""
    return [int(score.by_sum == item.answer) for item, score in zip(items, scores, strict=True)]


def blind_floor(items: Sequence[Item]) -> float:
    """Accuracy of the best guesser that sees question text and options, but no picture, and knows this very file.

    It picks, among an item's options, the one that is most often the answer to this question text in the file; options
    that tie share the credit. Fitted on the items it is judged on, so it is an upper bound: where question texts hardly
    repeat, it approaches 1 and says nothing. Read it together with `blind_floor_held_out`.
    """
    counts = _answer_counts(items)
    return math.fsum(_blind_credit(item, counts[item.question]) for item in items) / len(items)


def blind_floor_held_out(items: Sequence[Item]) -> float:
    """The same guesser, fitted on nine tenths of the file and judged on the rest, ten times.

    Question texts that it has not met are guessed uniformly. The tenths are drawn by a hash of the item's index. On a
    file whose answers are balanced it lies a little under chance: an answer that was held out is rarer in the rest.
    """
    total = _answer_counts(items)
    folds: defaultdict[int, list[Item]] = defaultdict(list)
    for item in items:
        folds[hashlib.blake2b(item.index.encode(), digest_size=2).digest()[0] % NUM_FOLDS].append(item)
    credit = []
    for fold in folds.values():
        own = _answer_counts(fold)
        for item in fold:
            rest = Counter(total[item.question])
            rest.subtract(own[item.question])
            credit.append(_blind_credit(item, rest))
    return math.fsum(credit) / len(items)


def _answer_counts(items: Sequence[Item]) -> Mapping[str, Counter[str]]:
    counts: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for item in items:
        counts[item.question][item.answer_text] += 1
    return counts


def _blind_credit(item: Item, answers: Mapping[str, int]) -> float:
    frequency = [answers.get(option, 0) for option in item.options]
    best = max(frequency)
    return (frequency[item.answer] == best) / frequency.count(best)


def yes_no_metrics(items: Sequence[Item], predictions: Sequence[int | None]) -> dict[str, float] | None:
    """POPE's figures with "yes" as the positive class, or None unless every item offers exactly yes and no.

    accuracy, precision, recall, f1, and yes_ratio (share of items answered "yes"). A prediction of None is neither:
    it is a miss, and counts as negative. A ratio without a denominator is 0 (POPE's own code would divide by zero).
    """
    if any(tuple(option.lower() for option in item.options) not in (("yes", "no"), ("no", "yes")) for item in items):
        return None
    answered = [None if p is None else item.options[p].lower() for item, p in zip(items, predictions, strict=True)]
    truth = [item.answer_text.lower() for item in items]
    true_positive = sum(a == t == "yes" for a, t in zip(answered, truth, strict=True))
    num_answered_yes, num_yes = answered.count("yes"), truth.count("yes")
    return {
        "accuracy": sum(a == t for a, t in zip(answered, truth, strict=True)) / len(items),
        "precision": true_positive / num_answered_yes if num_answered_yes else 0.0,
        "recall": true_positive / num_yes if num_yes else 0.0,
        "f1": 2 * true_positive / (num_answered_yes + num_yes) if num_answered_yes + num_yes else 0.0,
        "yes_ratio": num_answered_yes / len(items),
    }
