"""From the log-probabilities of options to accuracies, with what a guesser reaches printed beside them.

Rule (SEED-Bench's, EVALUATION.md): the option with the highest likelihood given image and question is the answer. The
main figure ranks by the *sum* of log-probabilities over an option's tokens; ranking by the mean per token is reported
beside it, because short options win under the sum and long ones under the mean. Equal scores go to the earlier option.
"""

import dataclasses
import hashlib
import math
from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import numpy as np

from unihetero_jax.evaluation.benchmarks import Item

MAX_FLOOR_OPTIONS = 30
NUM_FOLDS = 10
"""Parts of the held-out blind floor (our choice)."""

BlindKey = Callable[[Item, int], Hashable]
"""What of an item's option a guesser looks at."""


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
        standard_error: of that share, see `clustered_error`.
        num_clusters: pictures (or questions without one) that the items are about.
        accuracy_mean_normalized: the same when options are ranked by mean log-probability per token.
        chance: mean of 1 / (number of options).
        blind_floor: see `blind_floor`. blind_floor_held_out: see `blind_floor_held_out`. Both are absent where an item
            has more than `MAX_FLOOR_OPTIONS` options.
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
    # Of hundreds of classes a guesser that counts answers takes hours and says nothing.
    has_floor = max(len(item.options) for item in items) <= MAX_FLOOR_OPTIONS
    floors = (
        {"blind_floor": blind_floor(items), "blind_floor_held_out": blind_floor_held_out(items)} if has_floor else {}
    )
    return floors | {
        "accuracy": accuracy,
        "standard_error": clustered_error(hits(items, scores), [item.cluster for item in items]),
        "num_clusters": len({item.cluster for item in items}),
        "accuracy_mean_normalized": sum(s.by_mean == i.answer for i, s in zip(items, scores, strict=True)) / num_items,
        "chance": sum(1 / len(item.options) for item in items) / num_items,
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


def clustered_error(values: Sequence[float], clusters: Sequence[str]) -> float:
    """Standard error of a mean whose items are independent between clusters only.

    sqrt(sum over clusters of (sum of (x - mean) in it)^2) / n (arXiv 2411.00640, equation 4): with one item in each it
    is sqrt(p (1 - p) / n), and items of a cluster that agree widen it.
    """
    return influence_error(mean_influences(values), clusters)


def mean_influences(values: Sequence[float]) -> list[float]:
    """How much each value pulls their mean: (x - mean) / n."""
    return ratio_influences(values, [1.0] * len(values))


def ratio_influences(numerators: Sequence[float], denominators: Sequence[float]) -> list[float]:
    """How much each item pulls the ratio of two sums, to first order: (y - ratio x) / sum of x; zeros without any x."""
    total = math.fsum(denominators)
    if not total:
        return [0.0] * len(numerators)
    ratio = math.fsum(numerators) / total
    return [(y - ratio * x) / total for y, x in zip(numerators, denominators, strict=True)]


def influence_error(influences: Sequence[float], clusters: Sequence[str]) -> float:
    """Standard error of a figure from what each item adds to it: the root of the sum of squares of clusters' sums.

    This is the delta method, and for a mean `clustered_error`. Clusters of one item give the plain error.
    """
    sums: dict[str, float] = {}
    for influence, cluster in zip(influences, clusters, strict=True):
        sums[cluster] = sums.get(cluster, 0.0) + influence
    return math.sqrt(math.fsum(total**2 for total in sums.values()))


def blind_floor(items: Sequence[Item]) -> float:
    """Accuracy of the best guesser that sees question text and options, but no picture, and knows this very file.

    Each of `BLIND_KEYS` makes a guesser, which picks the option whose key was most often the right one's; options that
    tie share the credit. Fitted on the items it is judged on, so it is an upper bound: where question texts hardly
    repeat, it approaches 1 and says nothing. Read it together with `blind_floor_held_out`.
    """
    return max(math.fsum(_blind_credits(items, items, key)) / len(items) for key in BLIND_KEYS.values())


def blind_floor_held_out(items: Sequence[Item]) -> float:
    """The same guessers, fitted on nine tenths of the file and judged on the rest, ten times; the best one's accuracy.

    What a guesser has not met it guesses uniformly. The tenths are drawn by a hash of the item's index. On a file whose
    answers are balanced it lies near chance.
    """
    folds = [hashlib.blake2b(item.index.encode(), digest_size=2).digest()[0] % NUM_FOLDS for item in items]
    parts = [
        ([item for item, at in zip(items, folds, strict=True) if at != fold],
         [item for item, at in zip(items, folds, strict=True) if at == fold])
        for fold in range(NUM_FOLDS)
    ]  # fmt: skip
    return max(
        math.fsum(credit for fitted, judged in parts for credit in _blind_credits(fitted, judged, key)) / len(items)
        for key in BLIND_KEYS.values()
    )


def _blind_credits(fitted: Sequence[Item], judged: Sequence[Item], key: BlindKey) -> list[float]:
    """What each of `judged` earns a guesser that has seen the answers of `fitted`."""
    shown: Counter[Hashable] = Counter(key(item, option) for item in fitted for option in range(len(item.options)))
    right: Counter[Hashable] = Counter(key(item, item.answer) for item in fitted)
    credits = []
    for item in judged:
        chance = 1 / len(item.options)
        # As if each key had been shown once more, and had been right as often as chance has it.
        shares = [(right[k] + chance) / (shown[k] + 1) for k in (key(item, i) for i in range(len(item.options)))]
        best = max(shares)
        credits.append((shares[item.answer] == best) / shares.count(best))
    return credits


def _rank(item: Item, option: int) -> int:
    """Place of an option among the item's numbers, smallest first; 0 for every option where they are no numbers."""
    try:
        values = [float(text) for text in item.options]
    except ValueError:
        return 0
    return sorted(values).index(values[option])


def _asked(item: Item) -> str:
    """Kind of question, as far as a guesser knows it: without a question the category is the class itself."""
    return item.category if item.question else ""


BLIND_KEYS: Mapping[str, BlindKey] = {
    "question and option": lambda item, option: (item.question, item.options[option]),
    "category and option": lambda item, option: (_asked(item), item.options[option]),
    "category and rank of a number": lambda item, option: (_asked(item), _rank(item, option)),
}
"""What a guesser without the picture may go by."""


def yes_no_metrics(items: Sequence[Item], predictions: Sequence[int | None]) -> dict[str, float] | None:
    """`yes_no_figures` of items that all offer exactly yes and no; None for others. A prediction of None is neither."""
    if not all(item.is_yes_no for item in items):
        return None
    return yes_no_figures(*_yes_no_answers(items, predictions))


def yes_no_metric_errors(items: Sequence[Item], predictions: Sequence[int | None]) -> dict[str, float] | None:
    """Standard errors of `yes_no_metrics`, clustered by picture; None where there are none."""
    if not all(item.is_yes_no for item in items):
        return None
    return yes_no_errors(*_yes_no_answers(items, predictions), [item.cluster for item in items])


def _yes_no_answers(items: Sequence[Item], predictions: Sequence[int | None]) -> tuple[list[str], list[str]]:
    """The right answers, and those predicted."""
    answers = ["" if p is None else item.options[p].lower() for item, p in zip(items, predictions, strict=True)]
    return [item.answer_text.lower() for item in items], answers


def yes_no_errors(
    truth: Sequence[str], answers: Sequence[str], clusters: Sequence[str], unparsed_is_no: bool = True
) -> dict[str, float]:
    """Standard errors of `yes_no_figures`, each a ratio of counts (see `influence_error`)."""
    pairs = list(zip(truth, answers, strict=True))
    is_hit = [float(pair == ("yes", "yes")) for pair in pairs]
    says_yes = [float(answer == "yes") for _, answer in pairs]
    is_yes = [float(t == "yes" and (unparsed_is_no or answer in ("yes", "no"))) for t, answer in pairs]
    both = [said + true for said, true in zip(says_yes, is_yes, strict=True)]
    ones = [1.0] * len(pairs)
    ratios = {
        "accuracy": ([float(t == answer) for t, answer in pairs], ones),
        "precision": (is_hit, says_yes),
        "recall": (is_hit, is_yes),
        "f1": ([2 * hit for hit in is_hit], both),
        "yes_ratio": (says_yes, ones),
    }
    return {name: influence_error(ratio_influences(*ratio), clusters) for name, ratio in ratios.items()}


def yes_no_figures(truth: Sequence[str], answers: Sequence[str], unparsed_is_no: bool = True) -> dict[str, float]:
    """POPE's figures with "yes" as the positive class; a ratio without a denominator is 0.

    Args:
        truth: "yes" or "no" for each item.
        answers: "yes", "no", or anything else for neither.
        unparsed_is_no: an answer that is neither counts as a missed yes in the recall (not so in lmms-eval).
    """
    pairs = Counter(zip(truth, answers, strict=True))
    true_positive, false_positive = pairs["yes", "yes"], pairs["no", "yes"]
    num_yes = sum(t == "yes" for t in truth) if unparsed_is_no else true_positive + pairs["yes", "no"]
    precision = true_positive / (true_positive + false_positive) if true_positive + false_positive else 0.0
    recall = true_positive / num_yes if num_yes else 0.0
    return {
        "accuracy": (pairs["yes", "yes"] + pairs["no", "no"]) / len(truth),
        "precision": precision,
        "recall": recall,
        "f1": 2 * precision * recall / (precision + recall) if precision + recall else 0.0,
        "yes_ratio": (true_positive + false_positive) / len(truth),
        "yes_ratio_of_labels": sum(t == "yes" for t in truth) / len(truth),
    }
