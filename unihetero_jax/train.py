"""The training loop: everything from a configuration to a trained, checkpointed state, in reading order."""

import contextlib
import functools
import itertools
import json
import os
import signal
import threading
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from clu import parameter_overview
from etils import epath
from jax.sharding import Mesh

from unihetero_jax import __version__, distributed, gradient_table, step
from unihetero_jax.checkpoint import Checkpointer, restore_subtree
from unihetero_jax.config import Config, config_hash, to_dict
from unihetero_jax.data.mixture import (
    TrainIterator,
    make_train_iterator,
    merge_positions,
    open_split,
    validation_batches,
)
from unihetero_jax.data.tokenizer import Tokenizer, load_tokenizer
from unihetero_jax.metrics import IntervalMetrics, StepTimer, announce
from unihetero_jax.model.unihetero import Params
from unihetero_jax.pretrained import check_architecture, load_components, open_pretrained, read_pretrained
from unihetero_jax.profiling import Profile
from unihetero_jax.reporting import Reporter
from unihetero_jax.sharding import Vote, local_rows, make_mesh, to_global
from unihetero_jax.state import TrainState, ema_components, fixed_targets
from unihetero_jax.watchdog import Watchdog
from unihetero_jax.workdir import STALE_AFTER_S, RunLock, prepare_workdir, write_config

LOCK_PATIENCE_S = 1.25 * STALE_AFTER_S
SAVE_FAILED = 1000
"""Given to the vote by a process whose save failed; above every signal's number."""
Hook = Callable[[int, TrainState], None]
Evaluate = Callable[[TrainState, int], Mapping[str, Any]]


class Interrupted(Exception):
    """The run was asked to stop and has saved. `signal_number` says by what; running the same command goes on."""

    def __init__(self, step: int, signal_number: int):
        saved = f"after step {step}; the state is saved" if step else "before the first step; there is nothing to save"
        super().__init__(f"stopped by {signal.Signals(signal_number).name} {saved}, run the same command to go on")
        self.signal_number = signal_number


def train(
    config: Config,
    workdir: epath.PathLike,
    hooks: Sequence[Hook] = (),
    evaluate: Evaluate | None = None,
    change_mixture: bool = False,
    profile: tuple[int, int] | None = None,
) -> TrainState:
    """Trains, or goes on training, the experiment in `workdir`.

    Args:
        config: the experiment.
        workdir: folder of the run; holds config.json, metrics.jsonl, tensorboard/, checkpoints/, eval/.
        hooks: called with (step, state) after every step.
        evaluate: called with (state, step) once the last step is done.
        change_mixture: the checkpoint to go on from may have another mixture; each source goes on where it was.
        profile: first and last step of a trace in `profile/`.

    Returns:
        The state after `train.num_steps` steps.

    Raises:
        Interrupted: SIGTERM or SIGINT came; the step was finished and saved.
        ValueError: bad input of any kind; the message names it and the remedy.
    """
    if not config.data.sources:
        raise ValueError("data.sources: name at least one source")
    agree_on_run(config, workdir, change_mixture)
    workdir = prepare_workdir(workdir)
    lock = RunLock(workdir, patience_s=LOCK_PATIENCE_S, report=announce)
    with contextlib.ExitStack() as cleanup:
        distributed.lead_first("lock", lambda: cleanup.enter_context(lock))
        with _StopSignals() as signals:
            done, state, stopped_by = _train_steps(config, workdir, hooks, lock, signals, change_mixture, profile)
        if stopped_by and done < config.train.num_steps:
            raise Interrupted(done, stopped_by)
        if evaluate is not None:
            evaluate(state, done)
    return state


def agree_on_run(config: Config, workdir: epath.PathLike, change_mixture: bool) -> None:
    """Compares what the processes of a run were started with.

    Raises:
        ValueError: on all of them, with what differs and where.
    """
    distributed.agree("start", {
        "configuration": config_hash(config), "--workdir": str(workdir), "--change-mixture": str(change_mixture),
        "program": f"{__version__} {distributed.program_digest()}", "jax": jax.__version__,
    })  # fmt: skip


def _train_steps(
    config: Config,
    workdir: epath.Path,
    hooks: Sequence[Hook],
    lock: RunLock,
    signals: "_StopSignals",
    change_mixture: bool,
    profile: tuple[int, int] | None,
) -> tuple[int, TrainState, int]:
    """Takes steps until the last one or a request to stop, and saves.

    Returns:
        The step that it ended at, its state, and the number of the signal that stopped it or 0.
    """
    mesh = make_mesh(config.mesh)
    tokenizer = _load_fitting_tokenizer(config)
    rows = local_rows(mesh, config.train.global_batch_rows, config.train.num_replicates > 1)
    stream = make_train_iterator(config, tokenizer, rows)
    data_identity = {"tokenizer": tokenizer.hash, "sources": stream.digests}
    distributed.agree("data", {"tokenizer": tokenizer.hash, **stream.digests})
    validate = _make_validation(config, mesh, tokenizer)
    prove = functools.partial(gradient_table.prove, config, step.loss_terms, workdir, announce)
    distributed.lead_first("gradient-table", prove, prove)
    checkpointer = Checkpointer(workdir, config, data_identity, announce, change_mixture)
    timer = StepTimer()
    with timer.phase("restore"):
        state, first_step, counters = _restore_or_init(config, mesh, checkpointer, stream)
    distributed.lead_first("config", lambda: write_config(workdir, to_dict(config)))
    reporter = Reporter(config, workdir, first_step, counters, timer, _counts_rows(rows))
    trace = Profile(profile, workdir, first_step, announce)
    train_step = step.compile_train_step(config, mesh)
    is_replicated = config.train.num_replicates > 1
    num_steps = config.train.num_steps
    done, stopped_by = first_step, 0
    vote = Vote(mesh)
    with contextlib.ExitStack() as cleanup:
        for resource in (checkpointer, reporter, stream, trace):
            cleanup.callback(resource.close)
        watchdog = cleanup.enter_context(Watchdog(config.train.step_deadline_s))
        while done < num_steps:
            stopped_by = vote.highest(SAVE_FAILED if checkpointer.has_failed else signals.requested)
            if stopped_by == SAVE_FAILED:
                checkpointer.wait()  # raises, on all processes
            if stopped_by:
                break
            lock.check()
            with timer.phase("input_wait"):
                host_batch = next(stream)
            batch = to_global(host_batch.arrays, mesh, is_replicated)
            with timer.phase("compile" if done == first_step else "step"):
                state, metrics = trace.run(done + 1, train_step, state, batch)
            done += 1
            reporter.finish_pending()
            reporter.start(done, host_batch, metrics)
            for hook in hooks:
                hook(done, state)
            if done > first_step + 1:  # the first step was only dispatched, and may compile for long
                watchdog.beat(done)
            if done % config.train.eval_every_steps == 0 or done == num_steps:
                with timer.phase("eval"):
                    reporter.add_eval_loss(validate(state))
            if done % config.checkpoint.every_steps == 0:
                reporter.flush()  # a step that is saved has its line
                with timer.phase("save"):
                    checkpointer.save(done, state, _position(stream) | reporter.get_state())
        reporter.flush()
        if done:  # the last step, or the one that a signal stopped at; saved already, it is not saved again
            checkpointer.save(done, state, _position(stream) | reporter.get_state(), wait=True)
    return done, state, stopped_by


def _counts_rows(rows: Sequence[int]) -> bool:
    """Whether this process counts the rows that it holds: the first of those that hold the same ones does.

    Raises:
        ValueError: two processes share some of their rows only.
    """
    texts = distributed.broadcast("rows", json.dumps(distributed.gather("rows-of", json.dumps(list(rows)))))
    all_rows = [json.loads(text) for text in json.loads(texts)]
    if any(one != other and set(one) & set(other) for one, other in itertools.combinations(all_rows, 2)):
        raise ValueError(
            "mesh: two processes share some of the rows that they hold, and not all; let mesh.tensor x mesh.context be "
            "a multiple or a divisor of the devices of a process"
        )
    return list(rows) not in all_rows[: distributed.process_id()]


def _position(stream: TrainIterator) -> dict[str, Any]:
    """The stream's state, of which each process knows its own rows' part; whole on process 0, which stores it."""
    state = stream.get_state()
    texts = distributed.gather("position", json.dumps(state["position"].tolist()))
    parts = [np.asarray(json.loads(text)) for text in texts]
    return {**state, "position": merge_positions(parts)} if parts else state


def _load_fitting_tokenizer(config: Config) -> Tokenizer:
    tokenizer = load_tokenizer(config.data.tokenizer)
    if tokenizer.vocab_size > config.model.decoder.vocab_size:
        raise ValueError(
            f"{config.data.tokenizer}: {tokenizer.vocab_size} tokens do not fit model.decoder.vocab_size "
            f"{config.model.decoder.vocab_size}; raise it (a multiple of 128 shards well)"
        )
    return tokenizer


def _restore_or_init(
    config: Config, mesh: Mesh, checkpointer: Checkpointer, stream: TrainIterator
) -> tuple[TrainState, int, dict[str, np.ndarray]]:
    """The state to start from, its step, and the reporter's counters; winds the stream to the same place."""
    restored = checkpointer.restore(step.abstract_state(config, mesh))
    if restored is None:
        state = _init_from(config, step.init_state(config, mesh))
        announce(parameter_overview.get_parameter_overview(state.params, include_stats=False))
        return state, 0, {}
    done, state, position = restored
    if checkpointer.mixture_changes:
        offsets = stream.start_after(position)
        announce("the mixture changed; draws that each source has had: "
                 + ", ".join(f"{name} {count:,}" for name, count in offsets.items()))  # fmt: skip
    else:
        stream.set_state(position)
    announce(f"going on from the checkpoint of step {done}")
    return state, done, position


def _init_from(config: Config, state: TrainState) -> TrainState:
    """Replaces components as `init_from` asks; averages start from them too."""
    loaded = _components_of_run(config, state) | _pretrained_components(config, state)
    if not loaded:
        return state

    def place(new: jax.Array, old: jax.Array) -> jax.Array:
        return jax.device_put(jnp.broadcast_to(new, old.shape), old.sharding)

    params = state.params | {name: jax.tree.map(place, tree, state.params[name]) for name, tree in loaded.items()}
    if "visual_branch" in params and "decoder" in loaded and "visual_branch" not in loaded:
        params["visual_branch"] = _upper_layers(config, params["decoder"], params["visual_branch"])
    fixed = fixed_targets(config)
    ema = {n: state.ema[n] if n in fixed else jax.tree.map(jnp.copy, params[n]) for n in ema_components(config)}
    return TrainState(state.step, params, ema, state.opt_state, state.skipped, state.consecutive_skips)


def _upper_layers(config: Config, decoder: Params, branch: Params) -> Params:
    """A visual branch over a decoder that was loaded starts as its copy, like one over a fresh decoder."""
    layers = (slice(None),) * (config.train.num_replicates > 1) + (slice(config.model.visual_branch.split_layer, None),)
    copied = {"blocks": jax.tree.map(lambda x: x[layers], decoder["blocks"]), "norm": decoder["norm"]}
    return jax.tree.map(lambda new, old: jax.device_put(jnp.array(new), old.sharding), copied, branch)


def _abstract_params(config: Config, state: TrainState, components: Sequence[str]) -> Params:
    """Of one replicate, with the shardings of the state where it has one alone."""
    replicated = config.train.num_replicates > 1

    def one(x: jax.Array) -> jax.ShapeDtypeStruct:
        shape = x.shape[1:] if replicated else x.shape
        return jax.ShapeDtypeStruct(shape, x.dtype, sharding=None if replicated else x.sharding)

    return {name: jax.tree.map(one, state.params[name]) for name in components}


def _pretrained_components(config: Config, state: TrainState) -> Params:
    """Decoder and encoder of pretrained models of Hugging Face."""
    init_from = config.init_from
    if not init_from.language_model and not init_from.vision_encoder:
        return {}
    pretrained = read_pretrained(init_from.language_model, init_from.vision_encoder, to_dict(config))
    check_architecture(config, pretrained)
    target = _abstract_params(config, state, ["decoder", "encoder"])
    sources = open_pretrained(pretrained, config, target)
    new_tokens = range(0)
    if pretrained.language_folder:
        theirs, ours = load_tokenizer(pretrained.language_folder), load_tokenizer(config.data.tokenizer)
        if not ours.extends(theirs):
            raise ValueError(
                f"data.tokenizer: {config.data.tokenizer} is not that of {pretrained.language_folder} with special "
                "tokens added; prepare the data with the one that import-hf writes"
            )
        new_tokens = range(theirs.num_known, ours.vocab_size)
    loaded = load_components(sources, config, target, new_tokens)
    for name, source in sources.items():
        announce(f"{name} initialised from {source.folder}")
    return loaded


def _components_of_run(config: Config, state: TrainState) -> Params:
    """Those of another run's checkpoint."""
    components = config.init_from.components
    if not components:
        return {}
    missing = [name for name in components if name not in state.params]
    if missing:
        raise ValueError(f"init_from.components: objective={config.objective} has no {', '.join(missing)}")
    target = {"params": _abstract_params(config, state, components)}
    prefixes = [f"params/{name}" for name in components]
    found, loaded, _ = restore_subtree(config.init_from.workdir, config.init_from.step, prefixes, target)
    announce(f"{', '.join(components)} initialised from {config.init_from.workdir}, step {found}")
    return loaded["params"]


def _make_validation(config: Config, mesh: Mesh, tokenizer: Tokenizer) -> Callable[[TrainState], dict[str, Any]]:
    """Losses on the fixed validation plan of every source; nothing of it touches the training stream.

    Raises:
        ValueError: now, not at the first validation, if a source has no readable validation split.
    """
    for name in config.data.sources:
        open_split(config, tokenizer, name, "val").close()
    eval_step = step.make_eval_step(config, mesh)
    is_replicated = config.train.num_replicates > 1
    rows = local_rows(mesh, config.eval.batch_rows, is_replicated)

    def validate(state: TrainState) -> dict[str, Any]:
        results = {}
        for name in config.data.sources:
            merged = IntervalMetrics()
            for arrays in validation_batches(config, tokenizer, name, rows):
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
    """Turns the first SIGTERM or SIGINT into a request; the second ends the process at once.

    Python runs a handler only between its own instructions, and compiling is one long call. So the numbers also reach a
    thread through a pipe, which announces the first at once and exits on the second.
    """

    def __init__(self):
        self.requested = 0
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "_StopSignals":
        self._read_end, self._write_end = os.pipe()
        os.set_blocking(self._write_end, False)
        self._previous_wakeup = signal.set_wakeup_fd(self._write_end, warn_on_full_buffer=False)
        for number in (signal.SIGTERM, signal.SIGINT):
            self._previous[number] = signal.signal(number, self._on_signal)
        self._watcher = threading.Thread(target=self._watch, name="stop-signals", daemon=True)
        self._watcher.start()
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._previous_wakeup)
        os.close(self._write_end)
        self._watcher.join()
        os.close(self._read_end)

    def _on_signal(self, number: int, frame: types.FrameType | None) -> None:
        self.requested = self.requested or number

    def _watch(self) -> None:
        seen = 0
        while numbers := os.read(self._read_end, 1):
            if (number := numbers[0]) not in self._previous:
                continue
            if seen:
                os._exit(128 + number)
            seen = number
            announce(f"\n{signal.Signals(number).name}: finishing this step and saving; once more to stop at once")
