"""The training loop: everything from a configuration to a trained, checkpointed state, in reading order."""

import json
import signal
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from clu import parameter_overview
from etils import epath
from jax.sharding import Mesh

from unihetero_jax import flops, gradient_table, step
from unihetero_jax.checkpoint import Checkpointer, restore_subtree
from unihetero_jax.config import Config, config_hash, to_dict
from unihetero_jax.data.mixture import HostBatch, TrainIterator, make_train_iterator, validation_batches
from unihetero_jax.data.tokenizer import Tokenizer, load_tokenizer
from unihetero_jax.metrics import IntervalMetrics, MetricsWriter, Progress, StepTimer
from unihetero_jax.optim import learning_rate_schedule
from unihetero_jax.sharding import local_rows, make_mesh, to_global
from unihetero_jax.state import TrainState, ema_components
from unihetero_jax.workdir import RunLock, prepare_workdir, write_config

SKIPPED_BATCHES = "skipped_batches.jsonl"
MIN_TARGET_WINDOW = 50
"""An enabled loss must see a target within the log interval, or within this many steps if that is longer (our choice:
a batch or two of a mixture may well hold none)."""

Hook = Callable[[int, TrainState], None]
Evaluate = Callable[[TrainState, int], Mapping[str, Any]]


class Interrupted(Exception):
    """The run was asked to stop and has saved. `signal_number` says by what; running the same command goes on."""

    def __init__(self, step: int, signal_number: int):
        super().__init__(
            f"stopped by {signal.Signals(signal_number).name} after step {step}; the state is saved, "
            "run the same command to go on"
        )
        self.signal_number = signal_number


def train(
    config: Config, workdir: epath.PathLike, hooks: Sequence[Hook] = (), evaluate: Evaluate | None = None
) -> TrainState:
    """Trains, or goes on training, the experiment in `workdir`.

    Args:
        config: the experiment.
        workdir: folder of the run; holds config.json, metrics.jsonl, tensorboard/, checkpoints/, eval/.
        hooks: called with (step, state) after every step.
        evaluate: called with (state, step) once the last step is done.

    Returns:
        The state after `train.num_steps` steps.

    Raises:
        Interrupted: SIGTERM or SIGINT came; the step was finished and saved.
        ValueError: bad input of any kind; the message names it and the remedy.
    """
    workdir = prepare_workdir(workdir)
    with RunLock(workdir) as lock, _StopSignals() as stop:
        mesh = make_mesh(config.mesh)
        tokenizer = _load_fitting_tokenizer(config)
        stream = make_train_iterator(config, tokenizer, _rows_of_this_process(config, mesh))
        gradient_table.prove(config, step.loss_terms, workdir)
        checkpointer = Checkpointer(workdir, config)
        state, first_step, totals = _restore_or_init(config, mesh, checkpointer, stream)
        write_config(workdir, to_dict(config))
        reporter = _Reporter(config, workdir, first_step, totals)
        train_step = step.compile_train_step(config, mesh)
        validate = _make_validation(config, mesh, tokenizer)
        is_replicated = config.train.num_replicates > 1
        num_steps = config.train.num_steps
        done = first_step
        try:
            while done < num_steps and not stop.requested:
                lock.check()
                checkpointer.check()
                with reporter.timer.input_wait():
                    host_batch = next(stream)
                batch = to_global(host_batch.arrays, mesh, is_replicated)
                state, metrics = train_step(state, batch)
                done += 1
                reporter.finish_pending()
                reporter.start(done, host_batch, metrics)
                for hook in hooks:
                    hook(done, state)
                if done % config.train.eval_every_steps == 0 or done == num_steps:
                    reporter.add_validation(validate(state))
                if done % config.checkpoint.every_steps == 0 or done == num_steps or stop.requested:
                    reporter.finish_pending()  # a step that is saved has its line
                    checkpointer.save(done, state, stream.get_state() | reporter.totals_as_arrays())
            reporter.finish_pending()
            checkpointer.wait()
        finally:
            stream.close()
            reporter.close()
            checkpointer.close()
        if stop.requested and done < num_steps:
            raise Interrupted(done, stop.requested)
        if evaluate is not None:
            evaluate(state, done)
    return state


def _load_fitting_tokenizer(config: Config) -> Tokenizer:
    tokenizer = load_tokenizer(config.data.tokenizer)
    if tokenizer.vocab_size > config.model.decoder.vocab_size:
        raise ValueError(
            f"{config.data.tokenizer}: {tokenizer.vocab_size} tokens do not fit model.decoder.vocab_size "
            f"{config.model.decoder.vocab_size}; raise it (a multiple of 128 shards well)"
        )
    return tokenizer


def _rows_of_this_process(config: Config, mesh: Mesh) -> list[int] | None:
    """None for all rows: what a single process holds, and what a single process reads fastest."""
    if jax.process_count() == 1:
        return None
    return local_rows(mesh, config.train.global_batch_rows, config.train.num_replicates > 1)


def _restore_or_init(
    config: Config, mesh: Mesh, checkpointer: Checkpointer, stream: TrainIterator
) -> tuple[TrainState, int, dict[str, int]]:
    """The state to start from, its step, and the running totals of counters; winds the stream to the same place."""
    restored = checkpointer.restore(step.abstract_state(config, mesh))
    if restored is None:
        state = _init_from(config, step.init_state(config, mesh))
        if jax.process_index() == 0:
            print(parameter_overview.get_parameter_overview(state.params, include_stats=False))
        return state, 0, {}
    done, state, position = restored
    stream.set_state({"position": position["position"], "batch": int(position["batch"])})
    prefix = "total:"
    totals = {key.removeprefix(prefix): int(value) for key, value in position.items() if key.startswith(prefix)}
    print(f"going on from the checkpoint of step {done}")
    return state, done, totals


def _init_from(config: Config, state: TrainState) -> TrainState:
    """Replaces components by those of another run, as `init_from` asks; averages start from them too."""
    components = config.init_from.components
    if not components:
        return state
    missing = [name for name in components if name not in state.params]
    if missing:
        raise ValueError(f"init_from.components: objective={config.objective} has no {', '.join(missing)}")
    replicated = config.train.num_replicates > 1

    def one(x: jax.Array) -> jax.ShapeDtypeStruct:
        shape = x.shape[1:] if replicated else x.shape
        return jax.ShapeDtypeStruct(shape, x.dtype, sharding=None if replicated else x.sharding)

    target = {"params": {name: jax.tree.map(one, state.params[name]) for name in components}}
    prefixes = [f"params/{name}" for name in components]
    found, loaded, _ = restore_subtree(config.init_from.workdir, config.init_from.step, prefixes, target)
    print(f"{', '.join(components)} initialised from {config.init_from.workdir}, step {found}")

    def place(new: jax.Array, old: jax.Array) -> jax.Array:
        return jax.device_put(jnp.broadcast_to(new, old.shape), old.sharding)

    params = state.params | {
        name: jax.tree.map(place, tree, state.params[name]) for name, tree in loaded["params"].items()
    }
    ema = {name: jax.tree.map(jnp.copy, params[name]) for name in ema_components(config)}
    return TrainState(state.step, params, ema, state.opt_state, state.skipped, state.consecutive_skips)


def _make_validation(config: Config, mesh: Mesh, tokenizer: Tokenizer) -> Callable[[TrainState], dict[str, Any]]:
    """Losses on the fixed validation plan of every source; nothing of it touches the training stream."""
    eval_step = step.make_eval_step(config)
    is_replicated = config.train.num_replicates > 1

    def validate(state: TrainState) -> dict[str, Any]:
        results = {}
        for name in config.data.sources:
            merged = IntervalMetrics()
            for arrays in validation_batches(config, tokenizer, name):
                losses = eval_step(state, to_global(arrays, mesh, is_replicated))
                sums, counts = jax.device_get((losses.sums, losses.counts))
                merged.add(_without_sources(sums), _without_sources(counts))
            terms = merged.result()
            results[name] = {term: value["mean"] for term, value in terms.items() if np.all(value["count"] > 0)}
        return results

    return validate


def _without_sources(terms: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in terms.items() if name != "text_by_source"}


class _StopSignals:
    """Turns the first SIGTERM or SIGINT into a request; the second ends the process at once."""

    def __init__(self):
        self.requested = 0
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "_StopSignals":
        for number in (signal.SIGTERM, signal.SIGINT):
            self._previous[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _on_signal(self, number: int, frame: types.FrameType | None) -> None:
        if self.requested:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        self.requested = number
        print(f"\n{signal.Signals(number).name}: finishing this step and saving; once more to stop at once", flush=True)


class _Reporter:
    """Writes what steps report, one step late: the device is never waited for while it has nothing to do."""

    def __init__(self, config: Config, workdir: epath.Path, first_step: int, totals: dict[str, int]):
        self._config = config
        self._skipped_path = workdir / SKIPPED_BATCHES
        self._writer = MetricsWriter(workdir)
        self._writer.truncate_after(first_step)
        self._progress = Progress(config.train.num_steps, first_step)
        self._schedule = learning_rate_schedule(config.optimizer, config.train.num_steps)
        self._interval = IntervalMetrics()
        self._totals = dict(totals)
        self._pending: tuple[int, HostBatch, step.StepMetrics] | None = None
        self._validation: dict[str, Any] = {}
        self._unseen: dict[str, int] = {}
        self._alarms: dict[str, str] = {}
        self._identity = {"config_hash": config_hash(config), "objective": config.objective}
        self.timer = StepTimer()

    def start(self, done: int, host_batch: HostBatch, metrics: step.StepMetrics) -> None:
        """Keeps a step that has been dispatched; `finish_pending` waits for it."""
        self._pending = (done, host_batch, metrics)

    def add_validation(self, results: dict[str, Any]) -> None:
        """Joins validation losses to the line of the step they belong to."""
        self._validation = results
        for source, terms in results.items():
            shown = "  ".join(f"{name} {np.mean(value):.4f}" for name, value in terms.items())
            self._progress.print(f"validation {source}: {shown}")

    def totals_as_arrays(self) -> dict[str, np.ndarray]:
        """The running totals as they are saved beside the data position."""
        return {f"total:{name}": np.asarray(value, np.int64) for name, value in self._totals.items()}

    def finish_pending(self) -> None:
        """Fetches the step that was kept, accounts for it and, once per interval, writes its line.

        Raises:
            ValueError: too many skipped steps in a row, or an enabled loss without any target for a whole window.
        """
        if self._pending is None:
            return
        (done, host_batch, metrics), self._pending = self._pending, None
        metrics = jax.device_get(metrics)
        self._count(host_batch)
        self._interval.add(metrics.sums, metrics.counts)
        self._check_targets(done, metrics)
        self._progress.update(done)
        if not np.all(metrics.finite):
            self._record_skip(done, host_batch, metrics)
        if done % self._config.train.log_every_steps == 0 or done == self._config.train.num_steps or self._validation:
            self._write_line(done, metrics)

    def close(self) -> None:
        self._progress.close()
        self._writer.close()

    def _count(self, host_batch: HostBatch) -> None:
        for name, value in host_batch.counters.items():
            self._totals[name] = self._totals.get(name, 0) + int(value)
        for failure in host_batch.failures:
            self._progress.print(f"sample became padding: {failure}")
        work = flops.count_work(self._config, host_batch.arrays)
        num_samples = sum(v for k, v in host_batch.counters.items() if k.startswith("samples/"))
        self.timer.add_step(num_samples, work.tokens, flops.model_flops(self._config, work)["total"])

    def _write_line(self, done: int, metrics: step.StepMetrics) -> None:
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
            "learning_rate": float(np.asarray(self._schedule(done - 1))),
            "skipped_steps": metrics.skipped,
            "totals": dict(self._totals),
            **speed,
        }
        if self._config.train.num_replicates > 1:
            line["loss_by_replicate"] = metrics.loss
        if self._validation:
            line["validation"], self._validation = self._validation, {}
        line["alarms"] = self._update_alarms(done, terms)
        self._writer.write(done, line)
        shown = {
            "loss": line["loss"],
            **{k: float(np.mean(v["mean"])) for k, v in terms.items() if k in ("text", "visual")},
        }
        self._progress.report(done, shown, speed["samples_per_s"])

    def _update_alarms(self, done: int, terms: Mapping[str, Mapping[str, Any]]) -> list[str]:
        """Collapse alarms that hold now; each is printed when it begins and when it ends."""
        thresholds = self._config.diagnostics
        spread = _worst(terms.get("within_spread"))
        copy = _worst(terms.get("visual_copy_previous"))
        alarms = {}
        if spread < thresholds.within_spread_alarm:
            alarms["within_spread"] = (
                f"ALARM: within-image spread {spread:.4f}: the tokens of an image become one vector"
            )
        elif spread < thresholds.within_spread_warn:
            alarms["within_spread_warn"] = f"warning: within-image spread {spread:.4f} is low"
        if copy < thresholds.copy_distance_alarm:
            alarms["copy_distance"] = f"ALARM: copying the previous embedding has distance {copy:.4f} only"
        for name in alarms.keys() - self._alarms.keys():
            self._progress.print(f"step {done}: {alarms[name]}")
        for name in self._alarms.keys() - alarms.keys():
            self._progress.print(f"step {done}: {name} is over")
        self._alarms = alarms
        return sorted(alarms)

    def _check_targets(self, done: int, metrics: step.StepMetrics) -> None:
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

    def _record_skip(self, done: int, host_batch: HostBatch, metrics: step.StepMetrics) -> None:
        with self._skipped_path.open("a") as file:
            file.write(json.dumps({"step": done, "sample_ids": host_batch.sample_ids}) + "\n")
        self._progress.print(f"step {done}: gradient not finite, step skipped; its samples are in {self._skipped_path}")
        limit = self._config.train.max_consecutive_skips
        if np.max(metrics.consecutive_skips) >= limit:
            raise ValueError(
                f"{limit} steps in a row had no finite gradient (train.max_consecutive_skips), the last one {done}; "
                f"the last checkpoint is kept. See {self._skipped_path}; lower optimizer.learning_rate, or inspect "
                "the samples"
            )


def _worst(term: Mapping[str, Any] | None) -> float:
    """The smallest mean over replicates of a term, infinity where it had nothing to measure."""
    if term is None:
        return np.inf
    mean = np.asarray(term["mean"], np.float64)
    return float(np.min(np.where(np.isnan(mean), np.inf, mean)))
