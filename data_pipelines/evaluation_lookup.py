"""Pictures and texts of evaluation sets, made ready to be found in records: exactly, nearly, and in part."""

import collections
import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np

from data_pipelines.bias import words_of
from data_pipelines.entries import Dropped, Drops
from data_pipelines.evaluation_sets import EvaluationItem
from data_pipelines.picture_hash import PictureHash, digest_of, hash_picture, largest_difference, within
from unihetero_jax.data.records import ImageSegment, Record, RecordError, TextSegment

PICTURE_REASONS = ("image", "pixels", "near_image")
"""How a picture is found: a file of equal bytes; equal pixels; a near perceptual hash, and a thumbnail that agrees."""
DOUBTFUL_REASONS = ("near_hash", "short_text")
"""Often chance: a near hash alone, as drawings of one layout have; a text of few words, as "Is there a dog here?"."""
REASONS = (*PICTURE_REASONS, "text", *DOUBTFUL_REASONS)
"""The surest first. `text`: most word n-grams of an evaluation text; `short_text`: all of one too short to have any."""


@dataclasses.dataclass(frozen=True)
class Limits:
    """What counts as found.

    Attributes:
        max_distance: bits of 64 in which the perceptual hashes of near pictures may differ; -1: none is looked for.
        max_difference: of near pictures' thumbnails, see `picture_hash.largest_difference`.
        ngram: words of an n-gram.
        min_share: of an evaluation text's different n-grams that a record has to hold (our choice: the share from which
            Llama 2 calls a sample dirty, arXiv 2307.09288).
        max_repeats: what more items of a set than this have in common (a whole text, or an n-gram) is the wording of a
            template and says nothing of an item: it is not looked for.
    """

    max_distance: int = 4
    max_difference: float = 64.0
    ngram: int = 8
    min_share: float = 0.8
    max_repeats: int = 10

    def __post_init__(self):
        if not -1 <= self.max_distance <= 63:
            raise ValueError(f"--distance: {self.max_distance} must lie in [-1, 63]")
        if self.max_difference < 0:
            raise ValueError(f"--max-difference: {self.max_difference} must not be negative")
        if self.ngram < 1 or self.max_repeats < 1:
            raise ValueError(f"--ngram {self.ngram}, --max-repeats {self.max_repeats}: both must be positive")
        if not 0 < self.min_share <= 1:
            raise ValueError(f"--min-share: {self.min_share} must lie in (0, 1]")


@dataclasses.dataclass(frozen=True)
class Target:
    """A picture or a text of an evaluation set: the set, and the first place where it stands."""

    set_name: str
    where: str


@dataclasses.dataclass(frozen=True)
class Found:
    """What a record shares with a target, by number; for near pictures the distance in bits, for texts the share."""

    reason: str
    target: int
    measure: float = 0.0


def surest(found: Iterable[Found]) -> Found:
    """The one with the surest reason, the nearest among equals."""
    return min(found, key=lambda item: (REASONS.index(item.reason), item.measure))


@dataclasses.dataclass
class EvaluationSet:
    """What a set gave: items, pictures and texts that are looked for, template texts, and what could not be read.

    A picture or text counts once in a set, however many items have it.
    """

    num_items: int = 0
    num_pictures: int = 0
    num_texts: int = 0
    num_templates: int = 0
    unread: Drops = dataclasses.field(default_factory=Drops)


class EvaluationLookup:
    """Looks records up in evaluation sets. Once filled it may be shared between threads.

    Attributes:
        sets: name -> what it gave. A picture that stands in two sets is looked for in each.
        targets: numbered by `Found.target`.
    """

    def __init__(self, limits: Limits):
        self.limits = limits
        self.sets: dict[str, EvaluationSet] = {}
        self.targets: list[Target] = []
        self._by_bytes: dict[bytes, list[int]] = {}
        self._by_pixels: dict[bytes, list[int]] = {}
        self._hashes = np.zeros(0, np.uint64)
        self._hashed: list[tuple[int, np.ndarray]] = []  # target and thumbnail of each hash
        self._by_text: dict[str, list[int]] = {}
        self._by_ngram: dict[str, list[int]] = {}
        self._num_ngrams: dict[int, int] = {}

    def add(self, name: str, items: Iterable[EvaluationItem | Dropped]) -> None:
        """Adds a set.

        Raises:
            ValueError: no item of it could be read, so that nothing of it would ever be found.
        """
        added = self.sets[name] = EvaluationSet()
        pictures: dict[bytes, tuple[PictureHash, str]] = {}
        texts: dict[str, dict[str, str]] = {}
        for item in items:
            if isinstance(item, Dropped):
                added.unread.add(item)
                continue
            added.num_items += 1
            text = " ".join(words_of(f"{item.hint} {item.question}"))
            texts.setdefault(text, {}).setdefault(item.id, item.where)
            if item.image is not None and (digest := digest_of(item.image)) not in pictures:
                try:
                    pictures[digest] = hash_picture(item.image), item.where
                except RecordError as error:
                    added.unread.add(Dropped(error.reason, f"{item.where}: {error}"))
        if not added.num_items:
            raise ValueError(f"{name}: no item could be read, so none would be found; not read: {added.unread}")
        self._add_pictures(name, pictures.values())
        self._add_texts(name, texts)

    def _add_pictures(self, name: str, pictures: Iterable[tuple[PictureHash, str]]) -> None:
        hashes = []
        for picture, where in pictures:
            number = self._add_target(name, where)
            self._by_bytes.setdefault(picture.of_bytes, []).append(number)
            self._by_pixels.setdefault(picture.of_pixels, []).append(number)
            if picture.perceptual is not None:
                hashes.append(picture.perceptual)
                self._hashed.append((number, picture.thumbnail))
            self.sets[name].num_pictures += 1
        self._hashes = np.concatenate([self._hashes, np.array(hashes, np.uint64)])

    def _add_texts(self, name: str, texts: Mapping[str, Mapping[str, str]]) -> None:
        """`texts`: words -> id and place of each item that has them."""
        ngrams = {text: set(_ngrams(text.split(), self.limits.ngram)) for text in texts if text}
        repeats: collections.Counter[str] = collections.Counter()
        for text, of_text in ngrams.items():
            repeats.update(dict.fromkeys(of_text, len(texts[text])))
        for text, of_text in ngrams.items():
            own = {ngram for ngram in of_text if repeats[ngram] <= self.limits.max_repeats}
            if len(texts[text]) > self.limits.max_repeats or (of_text and not own):
                self.sets[name].num_templates += 1
                continue
            number = self._add_target(name, next(iter(texts[text].values())))
            self.sets[name].num_texts += 1
            self._num_ngrams[number] = len(own)
            for ngram in own:
                self._by_ngram.setdefault(ngram, []).append(number)
            if not of_text:
                self._by_text.setdefault(text, []).append(number)

    def _add_target(self, name: str, where: str) -> int:
        self.targets.append(Target(name, where))
        return len(self.targets) - 1

    def find(self, record: Record) -> tuple[Found, ...]:
        """What a record shares with the sets: every target once, found in the surest way.

        A picture that does not decode is compared by its bytes alone.
        """
        by_target: dict[int, list[Found]] = {}
        for segment in record.segments:
            if isinstance(segment, ImageSegment):
                for found in self._find_picture(segment.data):
                    by_target.setdefault(found.target, []).append(found)
        return (*map(surest, by_target.values()), *self._find_texts(record))

    def _find_picture(self, data: bytes) -> Iterator[Found]:
        yield from (Found("image", number) for number in self._by_bytes.get(digest_of(data), ()))
        if not self._by_bytes:
            return  # nothing to compare with, and decoding is what takes the time
        try:
            picture = hash_picture(data)
        except RecordError:
            return
        yield from (Found("pixels", number) for number in self._by_pixels.get(picture.of_pixels, ()))
        if picture.perceptual is not None:
            for place in within(self._hashes, picture.perceptual, self.limits.max_distance).tolist():
                number, thumbnail = self._hashed[place]
                agrees = largest_difference(picture.thumbnail, thumbnail) <= self.limits.max_difference
                distance = (int(self._hashes[place]) ^ picture.perceptual).bit_count()
                yield Found("near_image" if agrees else "near_hash", number, distance)

    def _find_texts(self, record: Record) -> Iterator[Found]:
        branches: dict[int, list[str]] = {}
        whole = set()
        for segment in record.segments:
            if isinstance(segment, TextSegment):
                words = words_of(segment.text)
                branches.setdefault(segment.branch, []).extend(words)
                whole.add(" ".join(words) if len(words) < self.limits.ngram else "")
        ngrams = {ngram for words in branches.values() for ngram in _ngrams(words, self.limits.ngram)}
        shared = ngrams & self._by_ngram.keys()
        counts = collections.Counter(number for ngram in shared for number in self._by_ngram[ngram])
        for number, count in sorted(counts.items()):
            if count >= self.limits.min_share * self._num_ngrams[number]:
                yield Found("text", number, count / self._num_ngrams[number])
        for text in sorted(whole & self._by_text.keys()):
            yield from (Found("short_text", number, 1.0) for number in self._by_text[text])


def _ngrams(words: Sequence[str], size: int) -> Iterator[str]:
    return (" ".join(words[i : i + size]) for i in range(len(words) - size + 1))
