"""What happens to a sample before it is written: checked, filtered, measured, given its split and its place.

Everything here is a pure function of one sample, so it runs the same in one process, in several, and on a cluster.
"""

import collections
import dataclasses
import functools
import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence

from unihetero_jax.data import records
from unihetero_jax.data.records import ImageSegment, ImageSpec, Record, RecordError, TextSegment, Turns
from unihetero_jax.data.tokenizer import Tokenizer

MAX_EXAMPLE_CHARS = 500
MAX_EXAMPLES = 3
"""Examples kept per reason for dropping, to find the samples again."""
CACHED_TEXTS = 1 << 16
"""A set asks the same questions again and again: their lengths are looked up, not computed."""

Encode = Callable[[str], Sequence[int]]
IndexRow = tuple[int, int, int, int]


@dataclasses.dataclass(frozen=True)
class Dropped:
    """A raw sample that made no record: why (a short stable key that is counted), and where it stands."""

    reason: str
    where: str


Samples = Iterable[Record | Dropped]


@dataclasses.dataclass(frozen=True)
class Filters:
    """Bounds that a record has to keep; none speaks of language or content.

    Attributes:
        min_side: of every image, in pixels.
        max_aspect: longer over shorter side of every image; 0: without limit.
        min_chars, max_chars: of all its text; `max_chars` 0: without limit.
    """

    min_side: int = 1
    max_aspect: float = 0.0
    min_chars: int = 0
    max_chars: int = 0

    def check(self, record: Record) -> None:
        """Raises RecordError with the reason if a record does not keep them."""
        for segment in record.segments:
            if isinstance(segment, ImageSegment):
                short, long = sorted((segment.height, segment.width))
                if short < self.min_side:
                    raise RecordError("small_image", f"{segment.height} x {segment.width}, at least {self.min_side}")
                if self.max_aspect and long > self.max_aspect * short:
                    raise RecordError("long_image", f"{segment.height} x {segment.width}, aspect {self.max_aspect}")
        chars = sum(len(segment.text) for segment in record.segments if isinstance(segment, TextSegment))
        if chars < self.min_chars:
            raise RecordError("short_text", f"{chars} characters, at least {self.min_chars}")
        if self.max_chars and chars > self.max_chars:
            raise RecordError("long_text", f"{chars} characters, at most {self.max_chars}")


@dataclasses.dataclass(frozen=True, order=True)
class Entry:
    """A record that can be stored.

    Attributes:
        order: place in the global shuffle: a keyed hash of `data`; entries are stored by (order, data).
        data: the serialised record.
        row: its row in the index of lengths.
        split: `train` or `val`.
        content: hash of its texts and image bytes; equal for records that differ in source or metadata alone.
        where: the sample's place in the raw files.
    """

    order: int
    data: bytes
    row: IndexRow = dataclasses.field(compare=False)
    split: str = dataclasses.field(compare=False)
    content: bytes = dataclasses.field(compare=False)
    where: str = dataclasses.field(compare=False)


class Checker:
    """Turns samples into entries. Holds only what never changes, so it can be sent to other processes."""

    def __init__(self, tokenizer: Tokenizer, spec: ImageSpec, filters: Filters = Filters(), val_share: float = 0.0):
        """`val_share`: of the samples whose set has no split of its own, by hash of their content."""
        if not 0 <= val_share <= 1:
            raise ValueError(f"--val-share: {val_share} must lie in [0, 1]")
        self._tokenizer, self._spec, self._filters, self._val_share = tokenizer, spec, filters, val_share

    def entries(self, samples: Samples, split: str = "") -> Iterator[Entry | Dropped]:
        """An entry, or why not, for every sample. `split` empty: by hash."""
        encode = functools.lru_cache(CACHED_TEXTS)(self._tokenizer.encode)
        for number, sample in enumerate(samples):
            yield sample if isinstance(sample, Dropped) else self._entry(sample, encode, split, number)

    def _entry(self, record: Record, encode: Encode, split: str, number: int) -> Entry | Dropped:
        names = dict.fromkeys(name for name in (record.where, str(record.meta.get("id", ""))) if name)
        where = ", id ".join(names) or f"{record.source}, sample {number}"
        try:
            check_record(record)
            self._filters.check(record)
            data, row = records.serialize(record), index_row(record, encode, self._spec)
        except RecordError as error:
            return Dropped(error.reason, f"{where}: {error}")
        except UnicodeEncodeError as error:
            return Dropped("invalid_text", f"{where}: {error}")
        content = content_of(record)
        is_val = int.from_bytes(_split_hash(record, content)[:4], "little") < self._val_share * 2**32
        return Entry(_shuffle_key(data), data, row, split or ("val" if is_val else "train"), content, where)


def _split_hash(record: Record, content: bytes) -> bytes:
    """What decides the split: the first image, so that all that is said of it is on one side; else the content."""
    images = (segment.data for segment in record.segments if isinstance(segment, ImageSegment))
    first = next(images, None)
    return content if first is None else hashlib.blake2b(first, digest_size=16).digest()


class Drops:
    """Counts by reason, with some examples of each."""

    def __init__(self):
        self.counts: collections.Counter[str] = collections.Counter()
        self.examples: dict[str, list[str]] = {}

    def add(self, dropped: Dropped, count: int = 1) -> None:
        """Counts samples dropped for one reason."""
        self.counts[dropped.reason] += count
        shown = dropped.where[:MAX_EXAMPLE_CHARS]
        where = shown.encode("utf-8", "backslashreplace").decode()  # it may hold what no console can take
        # The first by name, not by time: so it is the same however the work was shared.
        self.examples[dropped.reason] = sorted([*self.examples.get(dropped.reason, []), where])[:MAX_EXAMPLES]

    def __str__(self) -> str:
        parts = [f"{count} {reason} (e.g. {self.examples[reason][0]})" for reason, count in sorted(self.counts.items())]
        return ", ".join(parts) or "none"


def texts_of(samples: Samples) -> Iterator[str]:
    """All texts of the records among samples, to train a tokenizer on; what is no Unicode in them is left out."""
    for sample in samples:
        if isinstance(sample, Record):
            for segment in sample.segments:
                if isinstance(segment, TextSegment):
                    yield segment.text.encode("utf-8", "ignore").decode()


def check_record(record: Record) -> None:
    """Raises RecordError if a record cannot be stored and read back. Every image is decoded whole once, here."""
    if not record.segments:
        raise RecordError("empty_record", "no segment")
    for segment in record.segments:
        if isinstance(segment, ImageSegment):
            shape = records.decode_image(segment.data).shape
            if shape[:2] != (segment.height, segment.width):
                raise RecordError("size_mismatch", f"{shape[:2]} against {(segment.height, segment.width)}")
        elif len(segment.text) > records.MAX_TEXT_CHARS:
            raise RecordError("text_too_long", f"{len(segment.text)} characters, limit {records.MAX_TEXT_CHARS}")


def content_of(record: Record) -> bytes:
    """16-byte hash of what a record shows and says: its segments, not its source or metadata."""
    bare = Record("", "", record.segments)
    return hashlib.blake2b(records.serialize(bare), digest_size=16).digest()


def index_row(record: Record, encode: Encode, spec: ImageSpec, turns: Turns = "branches") -> IndexRow:
    """The record's row of the index of lengths, as `records.INDEX_DTYPE` has it."""
    num_tokens, num_patches = records.record_cost(record, encode, spec, turns)
    num_images = sum(isinstance(segment, ImageSegment) for segment in record.segments)
    flags = records.FLAG_GENERATED_IMAGE if _generates(record) else 0
    if num_tokens >= 2**32 or num_patches >= 2**16 or num_images >= 2**8:
        flags |= records.FLAG_TOO_LONG
    return min(num_tokens, 2**32 - 1), min(num_patches, 2**16 - 1), min(num_images, 2**8 - 1), flags


def _generates(record: Record) -> bool:
    seen_text = False
    for segment in record.segments:
        if isinstance(segment, ImageSegment) and seen_text:
            return True
        seen_text |= isinstance(segment, TextSegment) and bool(segment.text)
    return False


def _shuffle_key(data: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(data, digest_size=8, person=b"shuffle").digest(), "little")


def without_duplicates(entries: Iterable[Entry], drops: Drops) -> list[Entry]:
    """One entry of each content; the others are counted."""
    groups: dict[bytes, list[Entry]] = {}
    for entry in entries:
        groups.setdefault(entry.content, []).append(entry)
    kept = []
    for group in groups.values():
        best, copies = best_of(group)
        kept.append(best)
        for copy in copies:
            drops.add(copy)
    return kept


def best_of(entries: Iterable[Entry]) -> tuple[Entry, list[Dropped]]:
    """Of entries of one content the one to keep, and the others as dropped.

    One for validation is preferred, so that no copy of it is trained on; else the first in the shuffled order.
    """
    kept, *copies = sorted(entries, key=lambda entry: (entry.split != "val", entry))
    reasons = ["duplicate_of_validation" if kept.split == "val" != copy.split else "duplicate" for copy in copies]
    return kept, [
        Dropped(reason, f"{copy.where}: has the content of {kept.where}")
        for reason, copy in zip(reasons, copies, strict=True)
    ]
