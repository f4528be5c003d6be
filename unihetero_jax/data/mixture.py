"""The training stream: which record comes when, in which row, read and laid out ahead of need.

The stream is a function of the configuration alone. Draw n of the mixture belongs to a source by a fixed schedule of
the weights; draw i of a source has epoch `i // n` and stands in a keyed order of blocks and of records within a block.
`S` virtual shards take windows of draws in turn:

    draws      0 .. W   W .. 2W   2W .. 3W   3W .. 4W   4W .. 5W      (W = data.window_size, S = 2)
    shard         0        1          0          1          0
    window        0        0          1          1          2

Each window is packed into rows from the index of lengths alone, so any (window, row) can be reached without reading
what came before. A batch takes rows of the shards by a fixed rule, so the stream does not depend on the number of
processes; and the position of a run is a pair of integers per shard.
"""

import collections
import concurrent.futures
import dataclasses
import functools
import hashlib
import itertools
import logging
from collections.abc import Iterator, Sequence
from typing import Any

import grain
import numpy as np

from unihetero_jax.config import Config
from unihetero_jax.data import packing
from unihetero_jax.data.records import FLAG_TOO_LONG, ImageSpec, RecordError, content_hash, deserialize, index_key
from unihetero_jax.data.sources import Source, open_source
from unihetero_jax.data.tokenizer import Tokenizer

BLOCK_RECORDS = 1024
"""Records drawn from one neighbourhood of a file before the next; keeps reads local."""
CYCLE = 10_000
"""Draws after which the schedule of sources repeats; weights are kept to 1 / 10,000."""
FAILED_MIN_SAMPLES = 1000
"""The share of failed samples is judged from this many samples on."""
MAX_WARNINGS = 1000  # failed samples whose description is kept; all are counted
VALIDATION_WINDOW = 2048
_log = logging.getLogger(__name__)


def image_spec(config: Config) -> ImageSpec:
    """Patch size and bounds of an image's patches that a configuration asks for."""
    return ImageSpec(config.model.encoder.patch_size, config.data.image_min_patches, config.data.image_max_patches)


def open_split(config: Config, tokenizer: Tokenizer, name: str, split: str) -> Source:
    """The `train` or `val` split of a source of the configuration. Raises ValueError if it is not whole."""
    spec = image_spec(config)
    key = index_key(tokenizer.hash, spec)
    return open_source(name, config.data.sources[name].path, split, key, config.data.tokenizer, spec)


def _key(*parts: Any) -> int:
    """64-bit key of a purpose, the same on every machine."""
    text = "|".join(map(str, parts))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def _keyed_order(key: int, size: int) -> np.ndarray:
    """A permutation of `range(size)`: numbers sorted by a keyed 64-bit hash (splitmix64)."""
    x = (np.arange(size, dtype=np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(key)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, 0xD6E8FEB86659FD93)):
        x = (x ^ (x >> np.uint64(shift))) * np.uint64(factor)
    return np.argsort(x ^ (x >> np.uint64(32)), kind="stable")


@functools.lru_cache(maxsize=16)
def _order_of_blocks(key: int, num_blocks: int) -> tuple[np.ndarray, int]:
    """The order in which an epoch visits blocks, and where in it the last (perhaps short) block stands."""
    order = _keyed_order(key, num_blocks)
    return order, int(np.flatnonzero(order == num_blocks - 1)[0])


_order_in_block = functools.lru_cache(maxsize=512)(_keyed_order)


def epoch_records(seed: int, name: str, size: int, epoch: int, start: int, stop: int) -> np.ndarray:
    """Record numbers `start .. stop` of an epoch's order over a source of `size` records. Reads only what it returns.

    Every epoch is a permutation: blocks of 1,024 records in a keyed order, records of a block in another.
    """
    num_blocks = -(-size // BLOCK_RECORDS)
    short = size - (num_blocks - 1) * BLOCK_RECORDS
    order, short_at = _order_of_blocks(_key(seed, name, epoch, "blocks"), num_blocks)
    missing = BLOCK_RECORDS - short  # blocks after the short one begin this much earlier
    at = start // BLOCK_RECORDS
    if at >= short_at and start >= short_at * BLOCK_RECORDS + short:
        at = (start + missing) // BLOCK_RECORDS
    parts = []
    while (first := at * BLOCK_RECORDS - (missing if at > short_at else 0)) < stop:
        block = int(order[at])
        length = short if at == short_at else BLOCK_RECORDS
        within = _order_in_block(_key(seed, name, epoch, "records", block), length)
        parts.append(block * BLOCK_RECORDS + within[max(start - first, 0) : stop - first])
        at += 1
    return np.concatenate(parts) if parts else np.zeros(0, np.int64)


def source_schedule(weights: dict[str, float]) -> np.ndarray:
    """Which source each of `CYCLE` draws belongs to, as an index into `weights`.

    Weights are rounded to whole draws of the cycle by largest remainder (at least one each), and a source's draws are
    spread evenly over it. Ties go by name, so the order in which sources are listed changes nothing.

    Raises:
        ValueError: more sources than draws in a cycle.
    """
    if len(weights) > CYCLE:
        raise ValueError(f"data.sources: {len(weights)} sources, at most {CYCLE}")
    by_name = sorted(weights)
    shares = np.asarray([weights[name] for name in by_name], np.float64)
    exact = shares / shares.sum() * CYCLE
    counts = np.maximum(np.floor(exact), 1).astype(np.int64)
    while (difference := CYCLE - int(counts.sum())) != 0:
        step = 1 if difference > 0 else -1
        gain = np.where((counts > 1) | (step > 0), (exact - counts) * step, -np.inf)
        counts[int(np.argmax(gain))] += step
    places = np.concatenate([(np.arange(count) + 0.5) / count for count in counts])
    owners = np.repeat(np.arange(len(by_name)), counts)
    listed = {name: i for i, name in enumerate(weights)}
    return np.asarray([listed[name] for name in by_name])[owners[np.lexsort((owners, places))]]


@dataclasses.dataclass(frozen=True)
class WindowPlan:
    """Rows of one window: `sources`, `records`, `epochs` by draw; `rows` lists draws; `dropped` counts by source."""

    sources: np.ndarray
    records: np.ndarray
    epochs: np.ndarray
    rows: list[list[int]]
    dropped: np.ndarray


class WindowPlanner:
    """Makes the plan of any window of any shard from lengths alone."""

    def __init__(
        self,
        indices: dict[str, np.ndarray],
        weights: dict[str, float],
        seed: int,
        row_tokens: int,
        row_patches: int,
        num_shards: int,
        window_size: int,
    ):
        """`indices` holds an array of `records.INDEX_DTYPE` by source; it may be memory-mapped."""
        self._names, self._indices = list(indices), list(indices.values())
        self._seed, self._row = seed, (row_tokens, row_patches)
        self._num_shards, self._window_size = num_shards, window_size
        self._schedule = source_schedule(weights)
        one_hot = self._schedule[:, None] == np.arange(len(self._names))
        self._before = np.concatenate([np.zeros((1, len(self._names)), np.int64), np.cumsum(one_hot, axis=0)])

    def draws(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(source, record, epoch) of draws `start .. stop`; the cost does not depend on `start`."""
        sources = self._schedule[np.arange(start, stop) % CYCLE]
        records, epochs = np.zeros(len(sources), np.int64), np.zeros(len(sources), np.int64)
        first, last = self._drawn(start), self._drawn(stop)
        for source, name in enumerate(self._names):
            size, low, high = len(self._indices[source]), int(first[source]), int(last[source])
            counters = np.arange(low, high)
            mine = sources == source
            epochs[mine] = counters // size
            bounds = [low, *range((low // size + 1) * size, high, size), high] if high > low else []
            parts = [
                epoch_records(self._seed, name, size, a // size, a % size, a % size + b - a)
                for a, b in itertools.pairwise(bounds)
            ]
            records[mine] = np.concatenate(parts) if parts else 0
        return sources, records, epochs

    def _drawn(self, draw: int) -> np.ndarray:
        """Draws of each source before a draw of the mixture: a closed form, so any position is as near as the first."""
        return (draw // CYCLE) * self._before[-1] + self._before[draw % CYCLE]

    def plan(self, shard: int, window: int) -> WindowPlan:
        """The rows of a window, in an order that does not tell their lengths."""
        start = (window * self._num_shards + shard) * self._window_size
        sources, records, epochs = self.draws(start, start + self._window_size)
        costs, too_long = np.zeros((len(sources), 2), np.int64), np.zeros(len(sources), bool)
        for source, index in enumerate(self._indices):
            mine = np.flatnonzero(sources == source)
            entries = index[records[mine]]
            costs[mine, 0], costs[mine, 1] = entries["num_tokens"], entries["num_patches"]
            too_long[mine] = (entries["flags"] & FLAG_TOO_LONG) > 0
        too_long |= (costs > self._row).any(axis=1)
        kept = np.flatnonzero(~too_long)
        rows = [kept[members].tolist() for members in packing.plan_rows(costs[kept], *self._row)]
        order = _keyed_order(_key(self._seed, "rows", shard, window), len(rows))
        dropped = np.bincount(sources[too_long], minlength=len(self._names))
        return WindowPlan(sources, records, epochs, [rows[i] for i in order], dropped)

    def require_fitting(self) -> None:
        """Raises ValueError if no record of any source fits a row: the stream would have no next row."""
        if not any(_any_fits(index, *self._row) for index in self._indices):
            raise ValueError(
                f"data.sources: no record of {', '.join(self._names)} fits a row of data.row_tokens "
                f"{self._row[0]} and data.row_patches {self._row[1]}; enlarge the row"
            )


def _any_fits(index: np.ndarray, row_tokens: int, row_patches: int, chunk: int = 1_000_000) -> bool:
    for start in range(0, len(index), chunk):
        entries = index[start : start + chunk]
        fits = (entries["num_tokens"] <= row_tokens) & (entries["num_patches"] <= row_patches)
        if np.any(fits & ((entries["flags"] & FLAG_TOO_LONG) == 0)):
            return True
    return False


def batch_shards(batch: int, batch_rows: int, num_shards: int) -> np.ndarray:
    """The shard that feeds each row of a batch, `int64[batch_rows]`; rows of one shard are in its own order.

    With fewer shards than rows each feeds `batch_rows / num_shards` neighbouring rows; with more, batches take turns.
    """
    rows = np.arange(batch_rows)
    if batch_rows % num_shards == 0:
        return rows // (batch_rows // num_shards)
    return (batch * batch_rows + rows) % num_shards


def merge_positions(positions: Sequence[np.ndarray]) -> np.ndarray:
    """Joins the positions of several processes that started from the same state.

    A process moves only the shards that feed its rows, so the furthest (window, row) of each shard is the true one.
    """
    stacked = np.stack(positions)
    furthest = [max(map(tuple, stacked[:, shard])) for shard in range(stacked.shape[1])]
    return np.asarray(furthest, np.int64)


@dataclasses.dataclass(frozen=True)
class HostBatch:
    """The rows of a batch that this process holds.

    Attributes:
        arrays: the fields of `arrays.Batch`.
        counters: `samples/SOURCE`, `tokens/SOURCE`, `failed/SOURCE`, `dropped/SOURCE` (records that no row can hold),
            `pad_tokens`, `pad_patches`, and where they occur `failed_reason/REASON`, `augment_left_out/PART`.
        sample_ids: `SOURCE/RECORD` of every sample, row by row.
        failures: file, record number and reason of each sample that became padding.
    """

    arrays: dict[str, np.ndarray]
    counters: dict[str, int]
    sample_ids: list[str]
    failures: list[str]


@dataclasses.dataclass(frozen=True)
class _Draw:
    """One sample of a row that is to be read."""

    source_id: int
    record: int
    epoch: int


@dataclasses.dataclass(frozen=True)
class _Row:
    arrays: dict[str, np.ndarray]
    counters: collections.Counter
    sample_ids: list[str]
    failures: list[str]


class RowReader:
    """Reads, decodes and lays out rows. Holds no state that changes, so any number of threads may use it."""

    def __init__(self, config: Config, tokenizer: Tokenizer, sources: dict[str, Source], augment: bool):
        self._names, self._sources = list(sources), list(sources.values())
        self._config, self._tokenizer, self._augment = config, tokenizer, augment
        self._spec = image_spec(config)
        self._source_ids = [list(config.data.sources).index(name) for name in self._names]

    def read(self, draws: Sequence[_Draw]) -> _Row:
        """A row of the given samples. One that cannot be read becomes padding of its planned size, in its place."""
        counters: collections.Counter = collections.Counter()
        samples, sample_ids, failures = [], [], []
        for draw in draws:
            name, source = self._names[draw.source_id], self._sources[draw.source_id]
            sample_ids.append(f"{name}/{draw.record}")
            try:
                sample = self._sample(draw)
            except RecordError as error:
                entry = source.index[draw.record]
                sample = packing.Hole(*(int(entry[field]) for field in ("num_tokens", "num_patches", "num_images")))
                counters.update({f"failed/{name}": 1, f"failed_reason/{error.reason}": 1})
                failures.append(f"{source.locate(draw.record)}: {error}")
            except Exception as error:
                raise RuntimeError(f"{source.locate(draw.record)}: {type(error).__name__}: {error}") from error
            else:
                counters[f"samples/{name}"] += 1
                counters[f"tokens/{name}"] += int(source.index[draw.record]["num_tokens"])
                counters.update(f"augment_left_out/{part}" for part in sample.left_out)
            samples.append(sample)
        data = self._config.data
        arrays = packing.assemble_row(
            samples,
            data.row_tokens,
            data.row_patches,
            self._spec.patch_size,
            self._tokenizer.pad_id,
            self._config.loss.visual_loss_on,
        )
        counters["pad_tokens"] += int((arrays["segment_ids"] == 0).sum())
        counters["pad_patches"] += int((arrays["patch_segment_ids"] == 0).sum())
        return _Row(arrays, counters, sample_ids, failures)

    def _sample(self, draw: _Draw) -> packing.PackedSample:
        name, source = self._names[draw.source_id], self._sources[draw.source_id]
        stored = source.read(draw.record)
        augment, rng = "none", None
        if self._augment:
            augment = self._config.data.sources[name].augment
            rng = np.random.default_rng(_key(self._config.data.seed, name, draw.epoch, draw.record, "augment"))
        sample = packing.sample_from_record(
            deserialize(stored),
            self._tokenizer,
            self._spec,
            self._source_ids[draw.source_id],
            rng,
            augment,
            content_hash(stored),
        )
        cost, entry = packing.sample_cost(sample, self._spec.patch_size), source.index[draw.record]
        planned = (int(entry["num_tokens"]), int(entry["num_patches"]))
        if cost != planned:
            raise RecordError(
                "cost_mismatch",
                f"takes {cost[0]} tokens and {cost[1]} patches, its index says "
                f"{planned[0]} and {planned[1]}; write the index again",
            )
        return sample


class MixtureDataset(grain.IterDataset):
    """The endless mixture of `config.data.sources`, as a grain dataset of `HostBatch`.

    Raises:
        ValueError: a source is missing, incomplete or without an index for this tokenizer and image spec.
    """

    def __init__(self, config: Config, tokenizer: Tokenizer, rows: Sequence[int] | None = None):
        super().__init__()
        batch_rows = config.train.global_batch_rows
        self.rows = list(range(batch_rows)) if rows is None else [int(row) for row in rows]
        wrong = [row for row in self.rows if not 0 <= row < batch_rows]
        if wrong or not self.rows:
            raise ValueError(f"rows {self.rows}: give rows of a batch of train.global_batch_rows {batch_rows}")
        self.config, self.tokenizer = config, tokenizer
        self.sources = {name: open_split(config, tokenizer, name, "train") for name in config.data.sources}

    def __iter__(self) -> "TrainIterator":
        return TrainIterator(self)


class TrainIterator(grain.DatasetIterator):
    """Batches of the mixture, read ahead by threads; `get_state` is the position of the batches handed out.

    Attributes:
        warnings: descriptions of failed samples so far (the first 1,000).
    """

    def __init__(self, dataset: MixtureDataset):
        super().__init__()
        config = dataset.config
        data = config.data
        self._config, self._rows = config, dataset.rows
        self._num_shards = data.num_data_shards
        self._sources = dataset.sources
        self._reader = RowReader(config, dataset.tokenizer, dataset.sources, augment=True)
        self._planner = WindowPlanner(
            {name: source.index for name, source in dataset.sources.items()},
            {name: source.weight for name, source in data.sources.items()},
            data.seed,
            data.row_tokens,
            data.row_patches,
            data.num_data_shards,
            data.window_size,
        )
        self._planning = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="plan")
        self._reading = concurrent.futures.ThreadPoolExecutor(data.num_threads, thread_name_prefix="read")
        self._num_samples = self._num_failed = 0
        self.warnings: list[str] = []
        self._restart(np.zeros((data.num_data_shards, 2), np.int64), 0)

    def _restart(self, position: np.ndarray, batch: int) -> None:
        self._consumed, self._batch = position.copy(), batch
        self._ahead, self._ahead_batch = position.copy(), batch
        self._pending: collections.deque = collections.deque()
        self._plans: dict[tuple[int, int], concurrent.futures.Future[WindowPlan]] = {}

    def __next__(self) -> HostBatch:
        """The next batch.

        Raises:
            ValueError: more than `data.max_failed_share` of the samples could not be read; or the iterator is closed.
            RuntimeError: reading a record failed in a way that is no fault of the record; names file and number.
        """
        self._assert_not_closed()
        self._fill()
        future, _, position = self._pending[0]
        batch = future.result()
        self._pending.popleft()
        self._consumed, self._batch = position, self._batch + 1
        self._count_failures(batch)
        self._fill()
        return batch

    def get_state(self) -> dict[str, Any]:
        """`position`: int64[S, 2], (window, row) of each shard's next row; `batch`: batches handed out since draw 0.

        With several processes, `merge_positions` joins theirs. Position and batch are those of what was *consumed*.
        """
        return {"position": self._consumed.copy(), "batch": self._batch}

    def set_state(self, state: dict[str, Any]) -> None:
        """Continues from a state, whatever was handed out before; the cost does not depend on how far it is.

        Raises:
            ValueError: the state belongs to another `data.num_data_shards`, or lacks `batch` where that is needed.
        """
        position = np.asarray(state["position"], np.int64)
        if position.shape != (self._num_shards, 2) or (position < 0).any():
            raise ValueError(
                f"data position of shape {position.shape} does not fit data.num_data_shards "
                f"{self._num_shards}: resume with the value the run was started with"
            )
        takes_turns = self._config.train.global_batch_rows % self._num_shards != 0
        if takes_turns and "batch" not in state:
            raise ValueError(
                "data position lacks 'batch', which tells whose turn it is when data.num_data_shards "
                "exceeds train.global_batch_rows"
            )
        for batch, rows, _ in self._pending:
            for future in (*rows, batch):
                future.cancel()
        self._restart(position, int(state.get("batch", 0)))

    @property
    def digests(self) -> dict[str, str]:
        """What each source's folder holds, by name: two folders of one digest give the same stream."""
        return {name: source.digest for name, source in self._sources.items()}

    def close(self) -> None:
        """Stops the threads and closes the files. Further `__next__` raises."""
        if self._closed:
            return
        super().close()
        for pool in (self._planning, self._reading):
            pool.shutdown(wait=True, cancel_futures=True)
        for source in self._sources.values():
            source.close()

    def _fill(self) -> None:
        """Queues batches until the configured number is under way."""
        while len(self._pending) < self._config.data.prefetch_batches:
            work = self._next_rows()
            futures = [self._reading.submit(self._reader.read, draws) for draws, _ in work]
            dropped = sum((counters for _, counters in work), collections.Counter())
            # Queued behind its rows in the same pool, so the rows it waits for have always begun.
            batch = self._reading.submit(_join_rows, futures, list(self._config.data.sources), dropped)
            self._pending.append((batch, futures, self._ahead.copy()))

    def _next_rows(self) -> list[tuple[list[_Draw], collections.Counter]]:
        """Moves `_ahead` by one batch; the samples of each of this process's rows, and what was dropped before it."""
        shards = batch_shards(self._ahead_batch, self._config.train.global_batch_rows, self._num_shards)
        mine = set(self._rows)
        needed = sorted({int(shards[row]) for row in mine})
        for shard in needed:
            self._plan(shard, int(self._ahead[shard, 0]))
        found = {}
        for shard in needed:
            for row in np.flatnonzero(shards == shard).tolist():
                found[row] = self._take_row(shard)
        self._ahead_batch += 1
        return [found[row] for row in self._rows]

    def _take_row(self, shard: int) -> tuple[list[_Draw], collections.Counter]:
        window, row = map(int, self._ahead[shard])
        dropped: collections.Counter = collections.Counter()
        while row >= len((plan := self._plan(shard, window).result()).rows):
            if not plan.rows:
                self._planner.require_fitting()
                self._count_dropped(dropped, plan)
            self._plans.pop((shard, window))
            window, row = window + 1, 0
        if row == 0:
            self._count_dropped(dropped, plan)
        if row >= len(plan.rows) // 2:  # early enough, and out of the way of the first batch after a start
            self._plan(shard, window + 1)
        draws = [_Draw(int(plan.sources[i]), int(plan.records[i]), int(plan.epochs[i])) for i in plan.rows[row]]
        row += 1
        if row == len(plan.rows):  # one way to write a position: the first row of the next window
            self._plans.pop((shard, window))
            window, row = window + 1, 0
        self._ahead[shard] = window, row
        return draws, dropped

    def _plan(self, shard: int, window: int) -> "concurrent.futures.Future[WindowPlan]":
        if (shard, window) not in self._plans:
            self._plans[shard, window] = self._planning.submit(self._planner.plan, shard, window)
        return self._plans[shard, window]

    def _count_dropped(self, dropped: collections.Counter, plan: WindowPlan) -> None:
        for name, count in zip(self._sources, plan.dropped.tolist(), strict=True):
            dropped[f"dropped/{name}"] += count

    def _count_failures(self, batch: HostBatch) -> None:
        failed = len(batch.failures)
        self._num_failed += failed
        self._num_samples += len(batch.sample_ids)
        room = MAX_WARNINGS - len(self.warnings)
        self.warnings += batch.failures[: max(room, 0)]
        limit = self._config.data.max_failed_share
        if self._num_samples >= FAILED_MIN_SAMPLES and self._num_failed > limit * self._num_samples:
            raise ValueError(
                f"{self._num_failed} of {self._num_samples} samples could not be read, more than "
                f"data.max_failed_share {limit}; the first: {'; '.join(self.warnings[:3])}. Prepare the data again, or "
                "raise data.max_failed_share"
            )


def _join_rows(
    futures: Sequence["concurrent.futures.Future[_Row]"], names: Sequence[str], dropped: collections.Counter
) -> HostBatch:
    rows = [future.result() for future in futures]
    counters = {f"{kind}/{name}": 0 for kind in ("samples", "tokens", "failed", "dropped") for name in names}
    for part in (*(row.counters for row in rows), dropped):
        for key, count in part.items():
            counters[key] = counters.get(key, 0) + count
    return HostBatch(
        packing.stack_rows([row.arrays for row in rows]),
        counters,
        [sample_id for row in rows for sample_id in row.sample_ids],
        [failure for row in rows for failure in row.failures],
    )


def make_train_iterator(config: Config, tokenizer: Tokenizer, rows: Sequence[int] | None = None) -> TrainIterator:
    """Opens the sources of a configuration and starts their stream.

    Args:
        config: the experiment.
        tokenizer: of `config.data.tokenizer`.
        rows: the rows of the global batch that this process holds, in the order wanted; all when not given. Only the
            virtual shards that feed them are planned and read.

    Raises:
        ValueError: a source is missing, incomplete or without a fitting index; the message says which and the remedy.
    """
    return iter(MixtureDataset(config, tokenizer, rows))


def validation_batches(config: Config, tokenizer: Tokenizer, source_name: str) -> Iterator[dict[str, np.ndarray]]:
    """The fixed validation plan of a source: every item of its val split once, `eval.batch_rows` rows at a time.

    The plan depends on the data and the row sizes alone, not on `data.seed`, the batch size or the training stream.
    With `eval.validation_rows` only so many rows are given (of a shuffled plan, so their lengths are typical). The last
    batch is filled with rows of padding. Items that no row can hold or that cannot be read are logged.

    Raises:
        ValueError: the source is unknown, missing, incomplete or without a fitting index.
    """
    if source_name not in config.data.sources:
        raise ValueError(f"data.sources has no {source_name!r}; there are {', '.join(config.data.sources)}")
    source = open_split(config, tokenizer, source_name, "val")
    try:
        reader = RowReader(config, tokenizer, {source_name: source}, augment=False)
        empty = packing.empty_row(
            config.data.row_tokens, config.data.row_patches, config.model.encoder.patch_size, tokenizer.pad_id
        )
        rows = _validation_rows(config, source)
        if config.eval.validation_rows:
            rows = itertools.islice(rows, config.eval.validation_rows)
        while chosen := list(itertools.islice(rows, config.eval.batch_rows)):
            read = [reader.read(draws) for draws in chosen]
            for failure in (failure for row in read for failure in row.failures):
                _log.warning("masked: %s", failure)
            yield packing.stack_rows([row.arrays for row in read] + [empty] * (config.eval.batch_rows - len(read)))
    finally:
        source.close()


def _validation_rows(config: Config, source: Source) -> Iterator[list[_Draw]]:
    data = config.data
    for start in range(0, len(source.index), VALIDATION_WINDOW):
        entries = source.index[start : start + VALIDATION_WINDOW]
        costs = np.stack([entries["num_tokens"], entries["num_patches"]], axis=-1).astype(np.int64)
        fits = (costs <= (data.row_tokens, data.row_patches)).all(axis=1) & ((entries["flags"] & FLAG_TOO_LONG) == 0)
        if not fits.all():
            _log.warning("%s: %d validation items do not fit a row and are left out", source.name, int((~fits).sum()))
        kept = np.flatnonzero(fits)
        rows = packing.plan_rows(costs[kept], data.row_tokens, data.row_patches)
        for row in _keyed_order(_key("validation", start), len(rows)):
            yield [_Draw(0, start + int(kept[i]), 0) for i in rows[row]]
