"""The training stream: which record comes when, in which row, read and laid out ahead of need.

The stream is a function of the configuration alone: `schedule` says in closed form which draws a window of the mixture
holds. `S` virtual shards take windows in turn:

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
import itertools
import logging
import types
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import grain
import numpy as np

from unihetero_jax.config import Config, visual_loss_of
from unihetero_jax.data import packing
from unihetero_jax.data.records import FLAG_TOO_LONG, ImageSpec, RecordError, content_hash, deserialize, index_key
from unihetero_jax.data.roles import Role
from unihetero_jax.data.row_plan import plan_rows
from unihetero_jax.data.schedule import Member, MixtureSchedule, keyed_order, stable_key
from unihetero_jax.data.shards import ShardError, shared_readers
from unihetero_jax.data.sources import Source, open_source
from unihetero_jax.data.tokenizer import Tokenizer

FAILED_MIN_SAMPLES = 1000
"""The share of failed samples is judged from this many samples on."""
MAX_WARNINGS = 1000  # failed samples whose description is kept; all are counted
VALIDATION_WINDOW = 2048
COUNTERS = ("samples", "tokens", "text_targets", "visual_targets", "failed", "dropped")
"""Counters that every batch has for every source."""
_log = logging.getLogger(__name__)


def chat_around(config: Config, tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    """What stands before and after a prompt: nothing, unless `eval.chat_template` asks for the tokenizer's.

    Raises:
        ValueError: it asks for one, and the tokenizer has none.
    """
    if not config.eval.chat_template:
        return [], []
    if tokenizer.chat is None:
        raise ValueError(
            f"eval.chat_template: the tokenizer in {config.data.tokenizer} has no chat template; set it to False"
        )
    return tokenizer.chat


def image_spec(config: Config) -> ImageSpec:
    """Patch size and bounds of an image's patches that a configuration asks for."""
    return ImageSpec(config.model.encoder.patch_size, config.data.image_min_patches, config.data.image_max_patches)


def open_split(config: Config, tokenizer: Tokenizer, name: str, split: str) -> Source:
    """The `train` or `val` split of a source of the configuration, of training as many records as it may have.

    Raises:
        ValueError: it is not whole, or has fewer records than `max_records`.
    """
    spec = image_spec(config)
    data = config.data
    index = index_key(tokenizer.hash, spec, data.turns)
    readers = shared_readers(data.cache_dir, int(data.cache_gib * 2**30))
    source = open_source(
        name, data.sources[name].path, split, index, data.tokenizer, spec, readers, data.verify_digests, data.turns
    )  # fmt: skip
    limit = data.sources[name].max_records
    return source.first(limit) if limit and split == "train" else source


def make_schedule(
    config: Config, sizes: Mapping[str, int], offsets: Mapping[str, int] = types.MappingProxyType({})
) -> MixtureSchedule:
    """The schedule of the configured mixture over sources of so many records each.

    Args:
        config: the experiment.
        sizes: records of each source.
        offsets: draws that an earlier mixture of the run has had of each source.

    Raises:
        ValueError: see `MixtureSchedule`.
    """
    data = config.data
    members = {
        name: Member(sizes[name], source.weight, source.weight_schedule, source.max_epochs, offsets.get(name, 0))
        for name, source in data.sources.items()
    }
    return MixtureSchedule(members, data.seed, data.window_size, data.planned_draws)


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
        indices: Mapping[str, np.ndarray],
        schedule: MixtureSchedule,
        seed: int,
        row_tokens: int,
        row_patches: int,
        num_shards: int,
    ):
        """`indices` holds an array of `records.INDEX_DTYPE` by source of the schedule; it may be memory-mapped."""
        self._names, self._indices = schedule.names, [indices[name] for name in schedule.names]
        self._schedule, self._seed, self._num_shards = schedule, seed, num_shards
        self._row = (row_tokens, row_patches)

    def plan(self, shard: int, window: int) -> WindowPlan:
        """The rows of a window, in an order that does not tell their lengths."""
        sources, records, epochs = self._schedule.window(window * self._num_shards + shard)
        costs, too_long = np.zeros((len(sources), 2), np.int64), np.zeros(len(sources), bool)
        for source, index in enumerate(self._indices):
            mine = np.flatnonzero(sources == source)
            entries = index[records[mine]]
            costs[mine, 0], costs[mine, 1] = entries["num_tokens"], entries["num_patches"]
            too_long[mine] = (entries["flags"] & FLAG_TOO_LONG) > 0
        too_long |= (costs > self._row).any(axis=1)
        kept = np.flatnonzero(~too_long)
        rows = [kept[members].tolist() for members in plan_rows(costs[kept], *self._row)]
        order = keyed_order(stable_key(self._seed, "rows", shard, window), len(rows))
        dropped = np.bincount(sources[too_long], minlength=len(self._names))
        return WindowPlan(sources, records, epochs, [rows[i] for i in order], dropped)

    def require_more(self, shard: int, window: int) -> None:
        """Called at a window without rows: raises ValueError if none can come after it.

        Either every source has reached its `max_epochs` or the end of its schedule, or no record of the others fits a
        row.
        """
        drawable = self._schedule.drawable(window * self._num_shards + shard)
        left = [name for name, is_left in zip(self._names, drawable, strict=True) if is_left]
        if not left:
            raise ValueError(
                f"data.sources: {', '.join(self._names)} have reached their max_epochs; raise one, or train fewer steps"
            )
        if not any(_any_fits(index, *self._row) for index in itertools.compress(self._indices, drawable)):
            raise ValueError(
                f"data.sources: no record of {', '.join(left)} fits a row of data.row_tokens {self._row[0]} and "
                f"data.row_patches {self._row[1]}, and no other source is drawn any more; enlarge the row"
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


def _num_begun(position: np.ndarray) -> int:
    """Windows of the mixture up to the furthest one of which a shard has handed out a row."""
    shards = np.arange(len(position))
    windows = position[:, 0] - (position[:, 1] == 0)  # the last one begun; -1: none
    return int(np.max(np.where(windows >= 0, windows * len(position) + shards + 1, 0)))


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
        counters: `samples/SOURCE`, `tokens/SOURCE`, `text_targets/SOURCE`, `visual_targets/SOURCE` (supervised text
            and visual tokens), `failed/SOURCE`, `dropped/SOURCE` (records that no row can hold), `pad_tokens`,
            `pad_patches`, and where they occur `failed_reason/REASON`, `left_out/PART`, `storage_retries/SOURCE`
            (reads of a bucket that had to be repeated since the batch before).
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

    def empty_rows(self, count: int) -> dict[str, np.ndarray]:
        """Rows to read into."""
        data = self._config.data
        return packing.empty_rows(
            count, data.row_tokens, data.row_patches, self._spec.patch_size, self._tokenizer.pad_id
        )

    def read(self, draws: Sequence[_Draw], arrays: dict[str, np.ndarray]) -> _Row:
        """Fills an empty row with the given samples.

        One that cannot be read becomes padding of its planned size, in its place.
        """
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
            except ShardError:
                raise
            except Exception as error:
                raise RuntimeError(f"{source.locate(draw.record)}: {type(error).__name__}: {error}") from error
            else:
                counters[f"samples/{name}"] += 1
                counters[f"tokens/{name}"] += int(source.index[draw.record]["num_tokens"])
                counters.update(f"left_out/{part}" for part in sample.left_out)
            samples.append(sample)
        packing.fill_row(arrays, samples, self._spec.patch_size, self._config.data.turns)
        counters.update(self._targets(arrays))
        counters["pad_tokens"] += int((arrays["segment_ids"] == 0).sum())
        counters["pad_patches"] += int((arrays["patch_segment_ids"] == 0).sum())
        return _Row(counters, sample_ids, failures)

    def _targets(self, arrays: dict[str, np.ndarray]) -> dict[str, int]:
        """Supervised text tokens and visual tokens of a row, by source."""
        counts = {}
        for kind in ("text", "visual"):
            sources = arrays["source_ids"][arrays[f"{kind}_loss_mask"]]
            for name, source_id in zip(self._names, self._source_ids, strict=True):
                counts[f"{kind}_targets/{name}"] = int((sources == source_id).sum())
        return counts

    def _role(self, name: str, draw: _Draw) -> Role:
        """How a draw is used; where a coin decides, it is thrown anew in every epoch."""
        source = self._config.data.sources[name]
        order = "captioned" if self._config.objective == "understanding_i2t" else source.order
        if order == "coin":
            coin = stable_key(self._config.data.seed, name, draw.epoch, draw.record, "order") / 2**64
            order = "text_first" if coin < source.text_first_share else "image_first"
        return Role(order, source.text_loss, visual_loss_of(self._config, name))

    def _sample(self, draw: _Draw) -> packing.PackedSample:
        name, source = self._names[draw.source_id], self._sources[draw.source_id]
        stored = source.read(draw.record)
        augment, rng = self._config.data.sources[name].augment, None
        if self._augment and augment != "none":
            rng = np.random.default_rng(stable_key(self._config.data.seed, name, draw.epoch, draw.record, "augment"))
        sample = packing.sample_from_record(
            deserialize(stored),
            self._tokenizer,
            self._spec,
            self._source_ids[draw.source_id],
            rng,
            augment,
            content_hash(stored),
            self._role(name, draw),
        )
        cost = packing.sample_cost(sample, self._spec.patch_size, self._config.data.turns)
        entry = source.index[draw.record]
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
        self._planning = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="plan")
        self._reading = concurrent.futures.ThreadPoolExecutor(data.num_threads, thread_name_prefix="read")
        self._seen: collections.Counter = collections.Counter()
        self.warnings: list[str] = []
        self._restart(np.zeros((data.num_data_shards, 2), np.int64), 0, {})

    def _restart(self, position: np.ndarray, batch: int, offsets: Mapping[str, int]) -> None:
        data = self._config.data
        self._offsets = {name: int(offsets.get(name, 0)) for name in self._sources}
        sizes = {name: len(source) for name, source in self._sources.items()}
        self._schedule = make_schedule(self._config, sizes, self._offsets)
        indices = {name: source.index for name, source in self._sources.items()}
        self._planner = WindowPlanner(
            indices, self._schedule, data.seed, data.row_tokens, data.row_patches, data.num_data_shards
        )
        self._consumed, self._batch = position.copy(), batch
        self._ahead, self._ahead_batch = position.copy(), batch
        self._pending: collections.deque = collections.deque()
        self._end: ValueError | None = None
        self._plans: dict[tuple[int, int], concurrent.futures.Future[WindowPlan]] = {}

    def __next__(self) -> HostBatch:
        """The next batch.

        Raises:
            ValueError: more than `data.max_failed_share` of a source's samples could not be read; a shard's content is
                not the one that was prepared; every source has reached its
                `max_epochs`, or no record fits a row; or the iterator is closed.
            RuntimeError: reading a record failed in a way that is no fault of the record; names file and number.
        """
        self._assert_not_closed()
        self._fill()
        if self._end is not None and not self._pending:
            raise self._end
        future, _, position = self._pending[0]
        batch = future.result()
        self._pending.popleft()
        self._consumed, self._batch = position, self._batch + 1
        for name, source in self._sources.items():
            if retries := source.take_retries():
                batch.counters[f"storage_retries/{name}"] = retries
        self._count_failures(batch)
        self._fill()
        return batch

    def get_state(self) -> dict[str, Any]:
        """What was *consumed*, not what was read ahead.

        Returns:
            `position`: int64[S, 2], (window, row) of each shard's next row; with several processes, `merge_positions`
            joins theirs. `batch`: batches handed out since the mixture began. `offset:SOURCE`: draws that the source
            had had when this mixture began. `drawn:SOURCE`: draws up to the end of the furthest window begun, where
            another mixture may go on (`start_after`).
        """
        drawn = self._schedule.counts(_num_begun(self._consumed) * self._config.data.window_size)
        return {
            "position": self._consumed.copy(),
            "batch": self._batch,
            **{f"offset:{name}": offset for name, offset in self._offsets.items()},
            **{f"drawn:{name}": int(count) for name, count in zip(self._schedule.names, drawn, strict=True)},
        }

    def start_after(self, state: Mapping[str, Any]) -> dict[str, int]:
        """Begins this mixture where another one of the same run was left: no source repeats a sample of its epoch.

        What is left of the windows that were begun is not drawn in this epoch.

        Args:
            state: of the other mixture; its sources may be others, a source that is new here starts at its beginning.

        Returns:
            The draws that each source here has had.
        """
        self._cancel_pending()
        offsets = {name: int(state.get(f"drawn:{name}", 0)) for name in self._sources}
        self._restart(np.zeros((self._num_shards, 2), np.int64), 0, offsets)
        return offsets

    def set_state(self, state: Mapping[str, Any]) -> None:
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
        self._cancel_pending()
        offsets = {name: int(state.get(f"offset:{name}", 0)) for name in self._sources}
        self._restart(position, int(state.get("batch", 0)), offsets)

    def _cancel_pending(self) -> None:
        for batch, rows, _ in self._pending:
            for future in (*rows, batch):
                future.cancel()

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
        """Queues batches until the configured number is under way, or the data ends: what was drawn comes first."""
        while len(self._pending) < self._config.data.prefetch_batches and self._end is None:
            try:
                work = self._next_rows()
            except ValueError as error:
                self._end = error
                return
            arrays, draws = self._reader.empty_rows(len(work)), [draws for draws, _ in work]
            # One task for each thread, not for each row: every task that is handed over costs this thread a turn.
            size = -(-len(draws) // self._config.data.num_threads)
            futures = [
                self._reading.submit(self._read_rows, draws[first : first + size], arrays, first)
                for first in range(0, len(draws), size)
            ]
            dropped = sum((counters for _, counters in work), collections.Counter())
            # Queued behind its rows in the same pool, so the rows it waits for have always begun.
            batch = self._reading.submit(_join_rows, futures, arrays, list(self._config.data.sources), dropped)
            self._pending.append((batch, futures, self._ahead.copy()))

    def _read_rows(self, draws: Sequence[list[_Draw]], arrays: dict[str, np.ndarray], first: int) -> list[_Row]:
        return [self._reader.read(row, packing.row_of(arrays, first + number)) for number, row in enumerate(draws)]

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
                self._planner.require_more(shard, window)
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
            self._plans[shard, window] = self._planning.submit(self._plan_and_prefetch, shard, window)
        return self._plans[shard, window]

    def _plan_and_prefetch(self, shard: int, window: int) -> WindowPlan:
        plan = self._planner.plan(shard, window)
        for number, source in enumerate(self._sources.values()):
            if source.is_in_bucket:
                source.prefetch(plan.records[plan.sources == number])
        return plan

    def _count_dropped(self, dropped: collections.Counter, plan: WindowPlan) -> None:
        for name, count in zip(self._sources, plan.dropped.tolist(), strict=True):
            dropped[f"dropped/{name}"] += count

    def _count_failures(self, batch: HostBatch) -> None:
        self._seen.update(batch.counters)
        room = MAX_WARNINGS - len(self.warnings)
        self.warnings += batch.failures[: max(room, 0)]
        limit = self._config.data.max_failed_share
        for name, source in self._sources.items():
            failed = self._seen[f"failed/{name}"]
            drawn = self._seen[f"samples/{name}"] + failed
            if drawn >= FAILED_MIN_SAMPLES and failed > limit * drawn:
                of_source = [text for text in self.warnings if text.startswith(source.paths)]
                raise ValueError(
                    f"{failed} of {drawn} samples of source {name!r} could not be read, more than "
                    f"data.max_failed_share {limit}; the first: {'; '.join(of_source[:3])}. Prepare it again, or raise "
                    "data.max_failed_share"
                )


def _join_rows(
    futures: Sequence["concurrent.futures.Future[list[_Row]]"],
    arrays: dict[str, np.ndarray],
    names: Sequence[str],
    dropped: collections.Counter,
) -> HostBatch:
    rows = [row for future in futures for row in future.result()]
    counters = {f"{kind}/{name}": 0 for kind in COUNTERS for name in names}
    for part in (*(row.counters for row in rows), dropped):
        for key, count in part.items():
            counters[key] = counters.get(key, 0) + count
    return HostBatch(
        arrays,
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


def validation_batches(
    config: Config, tokenizer: Tokenizer, source_name: str, rows_held: Sequence[int] | None = None
) -> Iterator[dict[str, np.ndarray]]:
    """The fixed validation plan of a source: every item of its val split once, `eval.batch_rows` rows at a time.

    The plan depends on the data and the row sizes alone, not on `data.seed`, the batch size or the training stream.
    With `eval.validation_rows` only so many rows are given (of a shuffled plan, so their lengths are typical). The last
    batch is filled with rows of padding. Items that no row can hold or that cannot be read are logged.

    Args:
        config: the experiment.
        tokenizer: of `config.data.tokenizer`.
        source_name: the source.
        rows_held: the rows of each batch that this process holds, in the order wanted; all when not given.

    Raises:
        ValueError: the source is unknown, missing, incomplete or without a fitting index.
    """
    held = range(config.eval.batch_rows) if rows_held is None else rows_held
    if source_name not in config.data.sources:
        raise ValueError(f"data.sources has no {source_name!r}; there are {', '.join(config.data.sources)}")
    source = open_split(config, tokenizer, source_name, "val")
    try:
        reader = RowReader(config, tokenizer, {source_name: source}, augment=False)
        rows = _validation_rows(config, source)
        if config.eval.validation_rows:
            rows = itertools.islice(rows, config.eval.validation_rows)
        while chosen := list(itertools.islice(rows, config.eval.batch_rows)):
            arrays = reader.empty_rows(len(held))
            for number, row in enumerate(held):
                if row < len(chosen):
                    for failure in reader.read(chosen[row], packing.row_of(arrays, number)).failures:
                        _log.warning("masked: %s", failure)
            yield arrays
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
        rows = plan_rows(costs[kept], data.row_tokens, data.row_patches)
        for row in keyed_order(stable_key("validation", start), len(rows)):
            yield [_Draw(0, start + int(kept[i]), 0) for i in rows[row]]
