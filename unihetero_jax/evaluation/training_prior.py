"""What the training data's answers alone would say: a shortcut that a high accuracy may hide.

A guesser that has seen the questions and answers of training, and no picture, picks the option that most often answered
this question; a question that training never asked is taken by its first words. Where it is right, a model may be right
without looking; where it is wrong, only looking helps. So the two accuracies stand apart.
"""

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from unihetero_jax.evaluation.benchmarks import Item

FIRST_WORDS = 3
"""Words by which questions are of one type, as in `data_pipelines.bias`."""


class TrainingPrior:
    """Counts of answers by question, and by the first words of a question.

    Args:
        turns: (question, answer) of training samples; those of captions, without a question, tell nothing here.
    """

    def __init__(self, turns: Iterable[tuple[str, str]]):
        self._counts: dict[str, Counter[str]] = {}
        for question, answer in turns:
            if question.strip():
                for key in self._keys(question):
                    self._counts.setdefault(key, Counter())[_plain(answer)] += 1

    def guess(self, item: Item) -> int | None:
        """The option that most often was the answer; None if none of them ever was."""
        for key in self._keys(item.question):
            counts = [self._counts.get(key, Counter())[_plain(option)] for option in item.options]
            if any(counts):
                return counts.index(max(counts))
        return None

    @staticmethod
    def _keys(question: str) -> tuple[str, str]:
        words = re.findall(r"\w+", question.lower())
        return " ".join(words), "first words: " + " ".join(words[:FIRST_WORDS])


def _plain(text: str) -> str:
    return " ".join(text.lower().split()).rstrip(".")


def split_by_prior(prior: TrainingPrior, items: Sequence[Item], chosen: Sequence[int | None]) -> dict[str, Any]:
    """Accuracy of the prior, and of what was chosen where it is right, where it is wrong, and where it says nothing.

    Returns:
        prior_accuracy: of the guesser over the items on which it says something; and for each of `right`, `wrong`,
        `silent` the number of items and the accuracy of `chosen` on them (None for no items).
    """
    guesses = [prior.guess(item) for item in items]
    groups: dict[str, list[bool]] = {"right": [], "wrong": [], "silent": []}
    for item, guess, choice in zip(items, guesses, chosen, strict=True):
        kind = "silent" if guess is None else "right" if guess == item.answer else "wrong"
        groups[kind].append(choice == item.answer)
    told = len(groups["right"]) + len(groups["wrong"])
    return {"prior_accuracy": len(groups["right"]) / told if told else None} | {
        kind: {"num_items": len(hits), "accuracy": sum(hits) / len(hits) if hits else None}
        for kind, hits in groups.items()
    }
