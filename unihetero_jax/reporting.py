"""What the loop reports: metric lines, progress, counters that outlive a restart, skipped steps, collapse alarms."""

import collections
import dataclasses
import io
import json
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from etils import epath

from unihetero_jax import distributed, flops
from unihetero_jax.arrays import StepMetrics
from unihetero_jax.config import Config, DiagnosticsConfig, config_hash
from unihetero_jax.data.mixture import HostBatch
from unihetero_jax.metrics import (
    METRICS_NAME,
    REPLACED_NAME,
    IntervalMetrics,
    MetricsWriter,
    Progress,
    StepTimer,
    announce,
    keep_lines_up_to,
)
from unihetero_jax.optim import learning_rate_schedule
from unihetero_jax.workdir import GrowingFiles

SKIPPED_BATCHES = "skipped_batches.jsonl"
FAILED_SAMPLES = "failed_samples.jsonl"
MIN_TARGET_WINDOW = 50
"""An enabled loss must see a target within the log interval, or within this many steps if that is longer (our choice:
a batch or two of a mixture may well hold none)."""
MAX_FAILURES_SHOWN = 100
"""Failed samples that are named on the console; all are in `failed_samples.jsonl`, and counted by reason."""


@dataclasses.dataclass
class _Counts:
    """What a process has counted and not told yet; failures by step."""

    counters: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    tokens: int = 0
    model_flops: float = 0.0
    failures: list[tuple[int, list[str]]] = dataclasses.field(default_factory=list)


class _Files:
    """What a run writes while it trains; process 0 has it."""

    def __init__(self, workdir: epath.Path, first_step: int):
        self._growing = GrowingFiles(workdir, (METRICS_NAME, REPLACED_NAME, SKIPPED_BATCHES, FAILED_SAMPLES), announce)
        self._folder = self._growing.folder
        self._metrics = MetricsWriter(self._folder, announce)
        self._metrics.truncate_after(first_step)
        for name in (SKIPPED_BATCHES, FAILED_SAMPLES):
            keep_lines_up_to(self._folder / name, first_step)

    def write_metrics(self, step: int, line: Mapping[str, Any]) -> None:
        """A line of `metrics.jsonl`."""
        self._metrics.write(step, line)
        self._growing.publish()

    def append(self, name: str, line: Mapping[str, Any]) -> None:
        """A line of another file."""
        with (self._folder / name).open("a") as file:
            file.write(json.dumps(line) + "\n")

    def flush(self) -> None:
        """Every line so far is where a restart finds it."""
        self._metrics.flush()
        self._growing.publish(wait=True)

    def close(self) -> None:
        """Copies what the workdir does not have yet."""
        self._metrics.close()
        self._growing.close()


_WATCHED = ("within_spread", "copy_previous_cosine", "across_spread")
WARNING = "within_spread_warn"


def has_collapsed(thresholds: DiagnosticsConfig, terms: Mapping[str, Any], replicate: int | None) -> bool:
    """Whether a model was collapsed at the end of its run, however short: by what a metrics line holds of it.

    Unlike the alarms it has no grace: that is for the first steps of a run that goes on.
    """
    measured = {name: _worst(terms.get(name), replicate) for name in _WATCHED}
    at_the_end = thresholds.across_spread_grace_steps + 1
    return bool(collapse_alarms(thresholds, at_the_end, measured).keys() - {WARNING})


def collapse_alarms(thresholds: DiagnosticsConfig, done: int, measured: Mapping[str, float]) -> dict[str, str]:
    """{alarm: what is wrong} of a model after so many steps; what was not measured is infinite."""
    spread, copy, across = (measured[name] for name in _WATCHED)
    alarms = {}
    if spread < thresholds.within_spread_alarm:
        alarms["within_spread"] = f"ALARM: within-image spread {spread:.4f}: the tokens of an image become one vector"
    elif spread < thresholds.within_spread_warn:
        alarms[WARNING] = f"warning: within-image spread {spread:.4f} is low"
    if done > thresholds.across_spread_grace_steps and across < thresholds.across_spread_alarm:
        alarms["across_spread"] = (
            f"ALARM: across-image spread {across:.4f}: a token tells its place, and not what the image shows"
        )
    if copy < thresholds.copy_distance_alarm:
        alarms["copy_distance"] = f"ALARM: copying the previous embedding has cosine distance {copy:.4f} only"
    return alarms


class _Silent(io.StringIO):
    """Where the processes but the first report their progress."""

    def write(self, text: str) -> int:
        return len(text)


class Reporter:
    """Writes what steps report, one step late: the device is never waited for while it has nothing to do.

    Of several processes each counts the rows that it holds; before anything is written process 0 brings these counts
    together.
    """

    def __init__(
        self,
        config: Config,
        workdir: epath.Path,
        first_step: int,
        counters: Mapping[str, np.ndarray],
        timer: StepTimer | None = None,
        counts_rows: bool = True,
    ):
        """What a run reports from `first_step` on.

        Args:
            config: the experiment.
            workdir: folder of the run.
            first_step: finished steps at the start.
            counters: those of `get_state` at `first_step`; empty for a new run.
            timer: of the run.
            counts_rows: False where another process holds the same rows and counts them.
        """
        self._config, self._counts_rows = config, counts_rows
        is_lead = distributed.is_lead()
        self._files = _Files(workdir, first_step) if is_lead else None
        self._progress = Progress(config.train.num_steps, first_step, None if is_lead else _Silent())
        self._schedule = learning_rate_schedule(config.optimizer, config.train.num_steps)
        self._interval = IntervalMetrics()
        self._totals: dict[str, int] = {}
        self._unseen: dict[str, int] = {}
        self._set_state(counters)
        self._own = _Counts()
        self._pending: tuple[int, HostBatch, StepMetrics] | None = None
        self._eval_loss: dict[str, Any] = {}
        self._alarms: dict[str, str] = {}
        self._failures_shown = 0
        self._identity = {"config_hash": config_hash(config), "objective": config.objective}
        self.timer = timer or StepTimer()

    def start(self, done: int, host_batch: HostBatch, metrics: StepMetrics) -> None:
        """Keeps a step that has been dispatched; `finish_pending` waits for it."""
        self._pending = (done, host_batch, metrics)

    def add_eval_loss(self, results: dict[str, Any]) -> None:
        """Joins losses on validation data to the line of the step they belong to."""
        self._eval_loss = results
        for source, terms in results.items():
            shown = "  ".join(f"{name} {np.mean(value):.4f}" for name, value in terms.items())
            self._progress.print(f"eval_loss {source}: {shown}")

    def get_state(self) -> dict[str, np.ndarray]:
        """Counters that a restart must not lose, saved beside the data position: running totals, the sums and counts of
        the log interval that has begun, and for how many steps each loss has seen no target.
        """
        return {
            **{f"total:{name}": np.asarray(value, np.int64) for name, value in self._totals.items()},
            **{f"unseen:{name}": np.asarray(value, np.int64) for name, value in self._unseen.items()},
            **{f"interval:{name}": value for name, value in self._interval.get_state().items()},
        }

    def _set_state(self, counters: Mapping[str, np.ndarray]) -> None:
        def named(prefix: str) -> dict[str, np.ndarray]:
            return {key.removeprefix(prefix): value for key, value in counters.items() if key.startswith(prefix)}

        self._totals = {name: int(value) for name, value in named("total:").items()}
        self._unseen = {name: int(value) for name, value in named("unseen:").items()}
        self._interval.set_state(named("interval:"))

    def finish_pending(self) -> None:
        """Fetches the step that was kept, accounts for it and, once per interval, writes its line.

        Raises:
            ValueError: too many skipped steps in a row, or an enabled loss without any target for a whole window.
        """
        if self._pending is None:
            return
        (done, host_batch, metrics), self._pending = self._pending, None
        with self.timer.phase("step"):
            metrics = jax.device_get(metrics)
        self._count(done, host_batch)
        self._interval.add(*_of_applied_steps(metrics))
        self._check_targets(done, metrics)
        self._progress.update(done)
        is_line_due = done % self._config.train.log_every_steps == 0 or done == self._config.train.num_steps
        is_skipped = not np.all(metrics.finite)
        if is_skipped or is_line_due or self._eval_loss:
            skipped_ids = self._bring_together(host_batch.sample_ids if is_skipped else [])
            if is_skipped:
                self._record_skip(done, skipped_ids, metrics)
            if is_line_due or self._eval_loss:
                self._write_line(done, metrics)

    def flush(self) -> None:
        """Accounts for the step that was kept; then every line so far is where a restart finds it.

        Raises:
            ValueError: see `finish_pending`; or the workdir is in a bucket that cannot be written.
        """
        self.finish_pending()
        self._bring_together([])
        if self._files is not None:
            self._files.flush()

    def close(self) -> None:
        """Ends the line of progress, and copies what the workdir does not have yet."""
        self._progress.close()
        if self._files is not None:
            self._files.close()
        self.timer.close()

    def _count(self, done: int, host_batch: HostBatch) -> None:
        self.timer.add_step()
        if not self._counts_rows:
            return
        work = flops.count_work(self._config, host_batch.arrays)
        self._own.counters.update(host_batch.counters)
        self._own.tokens += work.tokens
        self._own.model_flops += flops.model_flops(self._config, work)["total"]
        if host_batch.failures:
            self._own.failures.append((done, host_batch.failures))

    def _bring_together(self, sample_ids: Sequence[str]) -> list[str]:
        """Adds what the processes have counted since the last time to the totals; process 0 writes failures down.

        Returns:
            The `sample_ids` of all processes, on process 0.
        """
        own, self._own = self._own, _Counts()
        message = json.dumps({**vars(own), "sample_ids": list(sample_ids)})
        shares = [json.loads(text) for text in distributed.gather("counts", message)]
        for share in shares:
            counters = share["counters"]
            for name, value in counters.items():
                self._totals[name] = self._totals.get(name, 0) + int(value)
            num_samples = sum(value for name, value in counters.items() if name.startswith("samples/"))
            self.timer.add_work(num_samples, share["tokens"], share["model_flops"])
            for done, failures in share["failures"]:
                self._record_failures(done, failures)
        return [sample_id for share in shares for sample_id in share["sample_ids"]]

    def _record_failures(self, done: int, failures: Sequence[str]) -> None:
        if self._files is not None:
            self._files.append(FAILED_SAMPLES, {"step": done, "failures": failures})
        for failure in failures[: MAX_FAILURES_SHOWN - self._failures_shown]:
            self._progress.print(f"sample became padding: {failure}")
            self._failures_shown += 1

    def _write_line(self, done: int, metrics: StepMetrics) -> None:
        terms = self._interval.result()
        by_source = terms.pop("text_by_source")
        speed = self.timer.result()
        low, high = (int(half) for half in np.asarray(metrics.batch_hash).reshape(-1, 2)[0])
        line = {
            **self._identity,
            "loss": float(np.mean(metrics.loss)),
            "batch_hash": high << 32 | low,
            "terms": terms,
            "text_by_source": {
                name: {key: value[..., i] for key, value in by_source.items()}
                for i, name in enumerate(self._config.data.sources)
            },
            "visual_weight": float(np.mean(metrics.visual_weight)),
            "gradient_norm": metrics.gradient_norms,
            "learning_rate": self._learning_rate(done, metrics),
            "skipped_steps": metrics.skipped,
            "totals": dict(self._totals),
            **speed,
            "goodput": self.timer.goodput(),
        }
        if self._config.train.num_replicates > 1:
            line["loss_by_replicate"] = metrics.loss
        if self._eval_loss:
            line["eval_loss"], self._eval_loss = self._eval_loss, {}
        line["alarms"] = self._update_alarms(done, terms)
        if self._config.train.num_replicates > 1:
            line["alarms_by_replicate"] = [
                sorted(collapse_alarms(self._config.diagnostics, done, {n: _worst(terms.get(n), i) for n in _WATCHED}))
                for i in range(self._config.train.num_replicates)
            ]
        if self._files is not None:
            self._files.write_metrics(done, line)
        shown = {
            "loss": line["loss"],
            **{k: float(np.mean(v["mean"])) for k, v in terms.items() if k in ("text", "visual", "pixel")},
        }
        self._progress.report(done, shown, speed["samples_per_s"])

    def _learning_rate(self, done: int, metrics: StepMetrics) -> float:
        """Of the newest update; skipped steps do not move the schedule."""
        applied = done - int(np.min(metrics.skipped))
        return float(np.asarray(self._schedule(max(applied - 1, 0))))

    def _update_alarms(self, done: int, terms: Mapping[str, Mapping[str, Any]]) -> list[str]:
        """Collapse alarms that hold now; each is printed when it begins and when it ends."""
        measured = {name: _worst(terms.get(name)) for name in _WATCHED}
        alarms = collapse_alarms(self._config.diagnostics, done, measured)
        for name in alarms.keys() - self._alarms.keys():
            self._progress.print(f"step {done}: {alarms[name]}")
        for name in self._alarms.keys() - alarms.keys():
            self._progress.print(f"step {done}: {name} is over")
        self._alarms = alarms
        return sorted(alarms)

    def _check_targets(self, done: int, metrics: StepMetrics) -> None:
        window = max(self._config.train.log_every_steps, MIN_TARGET_WINDOW)
        for name in ("text", "visual"):
            if name in metrics.counts:
                seen = np.sum(metrics.counts[name]) > 0
                self._unseen[name] = 0 if seen else self._unseen.get(name, 0) + 1
                if self._unseen[name] >= window:
                    raise ValueError(
                        f"the {name} loss of objective={self._config.objective} saw no target in the {window} steps up "
                        f"to step {done}: does the mixture hold samples that carry it (loss.visual_loss_on)?"
                    )

    def _record_skip(self, done: int, sample_ids: Sequence[str], metrics: StepMetrics) -> None:
        if self._files is not None:
            self._files.append(SKIPPED_BATCHES, {"step": done, "sample_ids": sample_ids})
        self._progress.print(f"step {done}: gradient not finite, step skipped; its samples are in {SKIPPED_BATCHES}")
        limit = self._config.train.max_consecutive_skips
        if np.max(metrics.consecutive_skips) >= limit:
            raise ValueError(
                f"{limit} steps in a row had no finite gradient (train.max_consecutive_skips), the last one {done}; "
                f"the last checkpoint is kept. See {SKIPPED_BATCHES} in the workdir; lower optimizer.learning_rate, or "
                "inspect the samples"
            )


def _of_applied_steps(metrics: StepMetrics) -> tuple[dict[str, Any], dict[str, Any]]:
    """Sums and counts, zero for a replicate whose step was skipped: one NaN must not hide a whole interval."""
    finite = np.asarray(metrics.finite)

    def kept(terms: Mapping[str, Any]) -> dict[str, Any]:
        return {
            name: np.where(finite.reshape(finite.shape + (1,) * (np.ndim(value) - finite.ndim)), value, 0.0)
            for name, value in terms.items()
        }

    return kept(metrics.sums), kept(metrics.counts)


def _worst(term: Mapping[str, Any] | None, replicate: int | None = None) -> float:
    """A term's mean, of several replicates the smallest or one's own; infinity where it had nothing to measure."""
    if term is None:
        return np.inf
    mean = np.asarray(np.nan if term["mean"] is None else term["mean"], np.float64)
    mean = mean if replicate is None else mean[replicate]
    return float(np.min(np.where(np.isnan(mean), np.inf, mean)))
