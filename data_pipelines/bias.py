"""What a model can guess of a source without looking: answer priors, lengths of texts, words shared between sources.

Pure functions over records. They keep counts, and of a long text a digest, so memory grows with the number of
different texts and words: give them a bounded sample (`prepared.read_stored`).
"""

import collections
import dataclasses
import hashlib
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

from unihetero_jax.data.records import ImageSegment, Record, TextSegment

MAX_TEXT_KEY = 200
"""Longer questions and answers are told apart by a digest (our choice: nobody guesses such an answer)."""
FIRST_WORDS = 3
"""Words by which questions are of one type, as "what color is" or "how many" (our choice)."""
_WORD = re.compile(r"\w+")


@dataclasses.dataclass(frozen=True)
class Turn:
    """A supervised text and what is asked before it; `question` is empty for captions and plain text."""

    question: str
    answer: str


@dataclasses.dataclass(frozen=True)
class QuestionPrior:
    """Answers to one question.

    Attributes:
        question: its text.
        num_answers, num_different: how many answers, and how many different ones.
        best_answer: the most common one.
        share: of the answers that are it; an upper bound, 1 for a question that was asked once.
        held_out: of the answers that are guessed by question, held out.
    """

    question: str
    num_answers: int
    num_different: int
    best_answer: str
    share: float
    held_out: float


@dataclasses.dataclass(frozen=True)
class AnswerPriors:
    """How well supervised texts are guessed from the question alone.

    Attributes:
        num_answers: supervised texts.
        held_out: for each guesser of `GUESSERS` the share that it guesses exactly, case aside. Cross-fitted: it is
            fitted on one half of the pictures and judged on the other, both ways. A question that it has not met it
            answers by the wider rule: its first words, then the most common answer of all.
        questions: by question text, the most frequent first.
        common_answers: most frequent first, with their counts.
    """

    num_answers: int
    held_out: Mapping[str, float]
    questions: tuple[QuestionPrior, ...]
    common_answers: tuple[tuple[str, int], ...]

    @property
    def best(self) -> float:
        """Accuracy of the best blind guesser, held out; not a number where there is nothing to guess.

        The guesser is chosen by this very figure, which among three makes it hardly too high.
        """
        return max(self.held_out.values(), default=math.nan)

    @property
    def standard_error(self) -> float:
        """Of `best`, as that of a share."""
        return math.sqrt(self.best * (1 - self.best) / self.num_answers) if self.num_answers else math.nan


@dataclasses.dataclass(frozen=True)
class Bias:
    """What was counted over the records of one source.

    Attributes:
        num_records: records seen.
        answers: supervised texts that follow a question.
        captions: supervised texts without one: captions, and plain text.
        answer_words, caption_words: number of words of such a text -> how many there are.
        vocabulary: lower-cased word -> occurrences, in all texts.
    """

    num_records: int
    answers: AnswerPriors
    captions: AnswerPriors
    answer_words: Mapping[int, int]
    caption_words: Mapping[int, int]
    vocabulary: Mapping[str, int]


def words_of(text: str) -> list[str]:
    """Lower-cased runs of letters, digits and underscores. A phrase of a script without spaces is one word."""
    return _WORD.findall(text.lower())


def turns_of(record: Record) -> Iterator[Turn]:
    """Supervised texts, each with the unsupervised text that leads to it.

    That is what stands between it and the supervised text before it, along its branch; a branch begins with the
    unsupervised text that ends the prefix.
    """
    branch, question, shared = 0, "", ""
    for segment in record.segments:
        if isinstance(segment, ImageSegment):
            continue
        if segment.branch != branch:
            branch, question = segment.branch, shared
        if not segment.loss:
            question += segment.text
        elif segment.text.strip():
            yield Turn(question.strip(), segment.text.strip())
            question = ""
        if not branch:
            shared = question


def measure_bias(records: Iterable[Record]) -> Bias:
    """Counts over records, which are read once."""
    answers: _Counts = collections.Counter()
    captions: _Counts = collections.Counter()
    answer_words: collections.Counter[int] = collections.Counter()
    caption_words: collections.Counter[int] = collections.Counter()
    vocabulary: collections.Counter[str] = collections.Counter()
    num_records = 0
    for record in records:
        num_records += 1
        half = _half(record)
        for turn in turns_of(record):
            counts, lengths = (answers, answer_words) if turn.question else (captions, caption_words)
            counts[half, _key(turn.question), _key(turn.answer.lower())] += 1
            lengths[len(words_of(turn.answer))] += 1
        for segment in record.segments:
            if isinstance(segment, TextSegment):
                vocabulary.update(words_of(segment.text))
    return Bias(num_records, _priors(answers), _priors(captions), answer_words, caption_words, vocabulary)


def jaccard(one: Iterable[str], other: Iterable[str]) -> float:
    """Words that two vocabularies share, over the words of either; not a number if both are empty."""
    first, second = set(one), set(other)
    return len(first & second) / len(first | second) if first or second else math.nan


def coverage(counts: Mapping[str, int], vocabulary: Iterable[str]) -> float:
    """Share of the word occurrences of `counts` whose word is in a vocabulary; not a number if there is none."""
    known, total = set(vocabulary), sum(counts.values())
    return sum(count for word, count in counts.items() if word in known) / total if total else math.nan


_Counts = collections.Counter[tuple[int, str, str]]
"""(half, question, answer) -> how often."""
_Key = Callable[[str], str]


def _half(record: Record) -> int:
    """0 or 1, the same for all records of a picture, so that no question about it stands on both sides."""
    images = [segment.data for segment in record.segments if isinstance(segment, ImageSegment)]
    texts = [segment.text for segment in record.segments if isinstance(segment, TextSegment)]
    content = images[0] if images else "".join(texts).encode("utf-8", "surrogatepass")
    return hashlib.blake2b(content, digest_size=1, person=b"blind").digest()[0] & 1


def _key(text: str) -> str:
    if len(text) <= MAX_TEXT_KEY:
        return text
    digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).hexdigest()
    return f"{text[:MAX_TEXT_KEY]}... ({digest})"


def _first_words(question: str) -> str:
    return " ".join(words_of(question)[:FIRST_WORDS])


def _constant(question: str) -> str:
    del question
    return ""


def _whole(question: str) -> str:
    return question


BY_QUESTION = "by question"
GUESSERS: Mapping[str, Sequence[_Key]] = {
    "always the same": (_constant,),
    "by first words": (_first_words, _constant),
    BY_QUESTION: (_whole, _first_words, _constant),
}
"""What a blind guesser goes by; where that was not met in the other half, the next."""


def _priors(counts: _Counts) -> AnswerPriors:
    by_question: dict[str, collections.Counter[str]] = {}
    common: collections.Counter[str] = collections.Counter()
    for (_, question, answer), count in counts.items():
        by_question.setdefault(question, collections.Counter())[answer] += count
        common[answer] += count
    hits = {name: _held_out_hits(counts, keys) for name, keys in GUESSERS.items()} if counts else {}
    questions = []
    for question, answers in by_question.items():
        (best, count), total = _ranked(answers)[0], answers.total()
        held_out = hits[BY_QUESTION][question] / total
        questions.append(QuestionPrior(question, total, len(answers), best, count / total, held_out))
    return AnswerPriors(
        num_answers=counts.total(),
        held_out={name: of_guesser.total() / counts.total() for name, of_guesser in hits.items()},
        questions=tuple(sorted(questions, key=lambda prior: (-prior.num_answers, prior.question))),
        common_answers=tuple(_ranked(common)),
    )


def _ranked(answers: Mapping[str, int]) -> list[tuple[str, int]]:
    """Most frequent first, equals by name: the same whatever the order of counting was."""
    return sorted(answers.items(), key=lambda item: (-item[1], item[0]))


def _held_out_hits(counts: _Counts, keys: Sequence[_Key]) -> collections.Counter[str]:
    """Answers guessed right, by question: those of each half by what was most common in the other."""
    fitted = [[_best_answers(counts, half, key) for key in keys] for half in (0, 1)]
    hits: collections.Counter[str] = collections.Counter()
    for (half, question, answer), count in counts.items():
        guesses = (best.get(key(question)) for key, best in zip(keys, fitted[1 - half], strict=True))
        if next((guess for guess in guesses if guess is not None), None) == answer:
            hits[question] += count
    return hits


def _best_answers(counts: _Counts, half: int, key: _Key) -> dict[str, str]:
    """The most common answer of each group of questions, in one half."""
    groups: dict[str, collections.Counter[str]] = {}
    for (at, question, answer), count in counts.items():
        if at == half:
            groups.setdefault(key(question), collections.Counter())[answer] += count
    return {group: _ranked(answers)[0][0] for group, answers in groups.items()}
