"""Checkpoints: state, data position and configuration as one unit that is either whole or does not exist.

Orbax writes the arrays asynchronously and commits a step folder, but it restores flipped bits without an error (30 of
30 in our measurement). So once it has committed, every file is hashed and `manifest.json` is written as the last,
atomic act. A step without a manifest does not exist, for restoring, listing and retention. On restore the digests are
verified; a damaged step is set aside with a message and the previous one is used.

    <workdir>/checkpoints/
        completed.json              the newest step that was ever completed: tells "nothing yet" from "all is lost"
        200/manifest.json           digests of all files of the step, names, shapes and dtypes of its arrays
        200/state/...               arrays (Orbax)
        200/position/, metadata/    data position; configuration and library versions (JSON, through Orbax)
        damaged-100-0/              a step that failed verification, with `damaged.json`

The paths may be in a bucket: nothing here needs a rename to be atomic.
"""

import concurrent.futures
import contextlib
import importlib.metadata
import json
import os
import platform
import signal
import threading
import time
import types
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from unihetero_jax import __version__, distributed
from unihetero_jax.config import Config, config_hash, to_dict
from unihetero_jax.config_reading import differences
from unihetero_jax.integrity import (
    MANIFEST,
    digest_files,
    list_files,
    read_manifest,
    share_of,
    verify,
    write_manifest,
)
from unihetero_jax.storage import (
    StorageError,
    file_exists,
    is_folder,
    is_local,
    list_folder,
    make_folder,
    remove,
    remove_tree,
    to_path,
)
from unihetero_jax.workdir import write_atomically

_NO_ANSWER = "no answer: "
DAMAGED = "damaged.json"
COMPLETED = "completed.json"
FREE_FIELDS = (
    "train.num_steps", "train.log_every_steps", "train.eval_every_steps", "train.accumulation_steps",
    "train.max_consecutive_skips", "train.step_deadline_s", "checkpoint", "mesh", "eval", "diagnostics",
    "data.num_threads", "data.prefetch_batches", "data.max_failed_share", "data.verify_digests",
    "data.cache_dir", "data.cache_gib",
    "model.encoder.remat", "model.decoder.remat", "model.attention_backend",
)  # fmt: skip
"""Fields, or whole sections, that may change between a save and its restore: they move no data and no arithmetic beyond
rounding. `train.num_steps` reshapes the schedule, so a change of it is announced."""
MIXTURE_FIELDS = ("data.sources", "data.planned_draws", "data.window_size")
"""What a change of the mixture may change, when it is asked for."""
_LIBRARIES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")


class CheckpointError(ValueError):
    """A checkpoint cannot be written, or none can be trusted; the message names file, step and remedy."""


class SaveError(CheckpointError):
    """Writing a checkpoint failed, earlier ones are untouched: starting again goes on from the last of them."""


class Checkpointer:
    """Saves and restores the checkpoints of the run that owns `workdir`. Every process of the run makes one.

    At most one save is in flight; the next one waits for it. A failure in the background surfaces at the next `check`,
    `save`, `wait` or `close`, once.

    Args:
        workdir: folder of the run.
        config: the run's configuration; stored with every step and compared on restore.
        data_identity: what the configuration's paths held: `tokenizer` (hash) and `sources` (digest by name); stored
            and compared likewise, for a folder may be prepared anew at the same path.
        report: receives messages for the user (process 0 only).
        change_mixture: a stored step may have another mixture.

    Attributes:
        mixture_changes: how the mixture of the restored step differs, as `path: old -> new`.
    """

    def __init__(
        self,
        workdir: epath.PathLike,
        config: Config,
        data_identity: Mapping[str, Any] = types.MappingProxyType({}),
        report: Callable[[str], None] = print,
        change_mixture: bool = False,
    ):
        self._root = checkpoint_root(workdir)
        self._change_mixture, self.mixture_changes = change_mixture, []
        self._config, self._data_identity = config, dict(data_identity)
        self._report = report if distributed.is_lead() else lambda _: None
        self._own_steps: set[int] = set()
        self._thread: threading.Thread | None = None
        self._failure: tuple[int, BaseException] | None = None
        self._newest_begun = 0
        self._compiling: concurrent.futures.Future[Any] | None = None
        self._clean_leftovers()
        self._manager = self._make_manager()

    def save(self, step: int, state: Any, position: Mapping[str, np.ndarray], wait: bool = False) -> bool:
        """Starts saving `state` and `position` as `step`; the caller may donate or change them once this returns.

        Args:
            step: number of finished steps.
            state: pytree of arrays and scalars; leaves under `params` must be finite.
            position: position of the data stream, of the batches *consumed*.
            wait: return only after the step is complete.

        Returns:
            False if this run has saved or restored this very step already, so that there is nothing to do.

        Raises:
            CheckpointError: if an earlier save failed, this one cannot start, or a parameter is not finite.
        """
        self.wait()
        if step in self._own_steps:
            return False
        leaves = _named_leaves(state)
        if self._compiling is not None:
            concurrent.futures.wait([self._compiling])
        _refuse_non_finite(step, leaves)
        _kill_point("before_save", step)
        self._make_room(step)
        arrays = {name: {"shape": list(np.shape(leaf)), "dtype": str(_dtype(leaf))} for name, leaf in leaves.items()}
        saved = {name: leaf if isinstance(leaf, jax.Array) else np.asarray(leaf) for name, leaf in leaves.items()}
        try:
            self._manager.save(step, force=True, args=ocp.args.Composite(
                state=ocp.args.PyTreeSave(_nest(saved)),
                position=ocp.args.JsonSave(_position_to_json(position)),
                metadata=ocp.args.JsonSave(run_metadata(self._config, self._data_identity)),
            ))  # fmt: skip
        except Exception as error:
            self._recover(step)
            raise _save_failed(step, f"{type(error).__name__}: {error}") from error
        self._newest_begun = step
        _kill_point("during_save", step)
        self._thread = threading.Thread(target=self._complete, args=(step, arrays), name=f"checkpoint-{step}")
        self._thread.start()
        if wait:
            self.wait()
        return True

    @property
    def has_failed(self) -> bool:
        """Whether a save has failed on this process; then `wait` raises, once all processes call it."""
        return self._failure is not None and (self._thread is None or not self._thread.is_alive())

    def check(self) -> None:
        """Raises SaveError if a save has failed; never blocks. For a run of one process."""
        if self.has_failed:
            self.wait()

    def wait(self) -> None:
        """Blocks until the save in flight is complete; all processes of the run call it together.

        Raises:
            SaveError: on all of them, if it failed on one.
        """
        self._join()
        (step, error), self._failure = self._failure or (self._newest_begun, None), None
        reason = distributed.first_failure("save", "" if error is None else f"{type(error).__name__}: {error}")
        if reason:
            self._recover(step)
            raise _save_failed(step, reason) from error

    def close(self) -> None:
        """Waits, then frees Orbax's threads. Raises SaveError if the last save failed on this process."""
        self._join()
        if self._failure is None:
            self._manager.close()
            return
        (step, error), self._failure = self._failure, None  # no exchange: another process may have ended
        with contextlib.suppress(Exception):  # Orbax raises the failure again
            self._manager.close()
        raise _save_failed(step, f"{type(error).__name__}: {error}") from error

    def _join(self) -> None:
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def all_steps(self) -> list[int]:
        """Complete steps, ascending. Their digests are verified on restore only."""
        return list_steps(self._root.parent)

    def latest_step(self) -> int | None:
        """The newest complete step."""
        return max(self.all_steps(), default=None)

    def restore(self, target: Any, step: int | None = None) -> tuple[int, Any, dict[str, np.ndarray]] | None:
        """Restores onto the shardings of `target`, whatever mesh the step was saved from.

        Args:
            target: pytree of `jax.ShapeDtypeStruct` with shardings (arrays and Python scalars do, too).
            step: None for the newest step that verifies.

        Returns:
            (step, state, position), or None if this workdir never completed a checkpoint.

        Raises:
            CheckpointError: if checkpoints were completed but none verifies, or the named step is absent or damaged.
            ValueError: if the stored configuration or the arrays' names, shapes or dtypes do not fit.
        """
        self.wait()
        if self._compiling is None:
            self._compiling = _compile_finite_check(_named_leaves(target))
        chosen = self._choose(step)
        if chosen is None:
            return None
        self._manager.reload()
        metadata = self._manager.restore(chosen, args=ocp.args.Composite(metadata=ocp.args.JsonRestore()))["metadata"]
        may_change = FREE_FIELDS + (MIXTURE_FIELDS if self._change_mixture else ())
        changed = check_config(metadata["config"], to_dict(self._config), str(self._root / str(chosen)), may_change)
        for line in changed:
            self._report(f"checkpoint {chosen}: continuing with a changed field: {line}")
        self.mixture_changes = [line for line in changed if _is_within(line.partition(":")[0], MIXTURE_FIELDS)]
        check_data(metadata["data"], self._data_identity, str(self._root / str(chosen)), bool(self.mixture_changes))
        stored = read_manifest(self._root / str(chosen))["arrays"]
        wanted = _named_leaves(target)
        _check_arrays(stored, wanted, self._root / str(chosen))
        item, restore_args = _restore_plan(wanted)
        restored = self._manager.restore(chosen, args=ocp.args.Composite(
            state=ocp.args.PyTreeRestore(item=item, restore_args=restore_args), position=ocp.args.JsonRestore()
        ))  # fmt: skip
        self._own_steps.add(chosen)
        return chosen, _rebuild(target, restored["state"]), _position_from_json(restored["position"])

    def _complete(self, step: int, arrays: Mapping[str, Any]) -> None:
        """Runs in the background: waits for Orbax's commit, hashes, writes the manifest, then removes old steps."""
        try:
            self._manager.wait_until_finished()
            _kill_point("after_orbax_commit", step)
            folder = self._root / str(step)
            files = _digest_together(folder)
            _kill_point("before_manifest", step)
            distributed.lead_first("manifest", lambda: self._write_manifest(step, files, arrays))
            self._own_steps.add(step)
        except BaseException as error:
            # Whatever happened here must reach the main thread.
            self._failure = (step, error)

    def _write_manifest(self, step: int, files: Mapping[str, Any], arrays: Mapping[str, Any]) -> None:
        write_manifest(self._root / str(step), {
            "format": 1, "step": step, "files": files, "arrays": arrays,
            "config_hash": config_hash(self._config), "program_version": __version__,
        })  # fmt: skip
        write_atomically(self._root / COMPLETED, json.dumps({"step": step}))
        self._remove_old(step)

    def _remove_old(self, newest: int) -> None:
        """Applies the keep policy; called only after `newest` is complete, which is always kept."""
        policy = self._config.checkpoint
        steps = list_steps(self._root.parent)
        kept = steps_to_keep(steps, policy.keep_last, policy.keep_every_steps) | {newest}
        for step in steps:
            if step not in kept:
                remove_step(self._root, step, lambda: _kill_point("during_retention", newest))

    def _clean_leftovers(self) -> None:
        """Removes what killed saves and removals left behind: Orbax's temporary folders and steps without a manifest.

        If steps were completed but none has its manifest, something else went wrong: nothing is touched.
        """
        distributed.lead_first("clean-leftovers", self._remove_leftovers)

    def _remove_leftovers(self) -> None:
        make_folder(self._root)
        complete = list_steps(self._root.parent)
        lost = not complete and file_exists(self._root / COMPLETED)
        for path in list_folder(self._root):
            is_temporary = ".orbax-checkpoint-tmp" in path.name or path.name.endswith(".tmp")
            is_incomplete = path.name.isdigit() and int(path.name) not in complete and not file_exists(path / DAMAGED)
            if is_temporary or (is_incomplete and not lost):
                self._report(f"removing {path}, the leftover of an unfinished save or removal")
                if is_folder(path):
                    remove_tree(path)
                else:
                    remove(path)

    def _make_manager(self) -> ocp.CheckpointManager:
        # No retention by Orbax: ours waits for the manifest. No root metadata: it would be outside every digest.
        options = ocp.CheckpointManagerOptions(
            max_to_keep=None, create=True, enable_async_checkpointing=True, save_root_metadata=False
        )
        return ocp.CheckpointManager(self._root, options=options, item_names=("state", "position", "metadata"))

    def _recover(self, step: int) -> None:
        """After a failed save: drops its remains and Orbax's memory of it, which would raise again or skip saves."""
        try:
            self._manager.close()
        except Exception as error:
            # The failure itself is raised by the caller.
            self._report(f"checkpoint {step}: closing the failed save: {error}")
        self._clean_leftovers()
        self._manager = self._make_manager()

    def _make_room(self, step: int) -> None:
        """Makes sure that nothing else lies where `step` will be written."""
        folder = self._root / str(step)
        if not distributed.broadcast("room", "taken" if list_folder(folder) else ""):
            return
        if step in list_steps(self._root.parent) and not self._own_steps:
            raise CheckpointError(
                f"{folder} exists and this run has not restored from it: restore first, or use a new --workdir"
            )
        self._report(f"replacing {folder}, which is damaged or of an abandoned continuation of this run")
        distributed.lead_first("make-room", lambda: remove_step(self._root, step))
        self._manager.reload()

    def _choose(self, step: int | None) -> int | None:
        """The step to restore. All processes verify their share of it and take one verdict, so that no two differ."""
        digests = self._config.checkpoint.verify_digests
        if step is not None:
            return _named_step(self._root, step, digests)
        return _newest_valid(self._root, self._set_aside, digests)

    def _set_aside(self, step: int, fault: str) -> None:
        distributed.lead_first("set-aside", lambda: self._move_aside(step, fault))

    def _move_aside(self, step: int, fault: str) -> None:
        folder = self._root / str(step)
        self._report(f"checkpoint {step} is damaged and will not be used: {fault}")
        # The marker alone settles it; moving the folder only frees its name and may not work everywhere.
        write_atomically(folder / DAMAGED, json.dumps({"step": step, "fault": fault, "found": time.time()}))
        number = sum(path.name.startswith(f"damaged-{step}-") for path in list_folder(self._root))
        try:
            folder.rename(self._root / f"damaged-{step}-{number}")
        except OSError as error:
            self._report(f"checkpoint {step}: stays at {folder}, marked by {DAMAGED} ({error})")


def list_steps(workdir: epath.PathLike) -> list[int]:
    """Complete steps of a run, ascending. Reads names only; the digests are verified when a step is restored."""
    return sorted(
        int(path.name)
        for path in list_folder(checkpoint_root(workdir))
        if path.name.isdigit() and file_exists(path / MANIFEST) and not file_exists(path / DAMAGED)
    )


def steps_to_keep(steps: Sequence[int], keep_last: int, keep_every: int) -> set[int]:
    """Of ascending steps: the newest `keep_last`, and those divisible by `keep_every` (0: none)."""
    return {*steps[-keep_last:], *(step for step in steps if keep_every and step % keep_every == 0)}


def remove_step(root: epath.Path, step: int, between: Callable[[], None] = lambda: None) -> None:
    """Removes a complete step. Without its manifest it ceases to exist at once.

    A kill before the rest is gone (`between` is called there) leaves a leftover that the next start removes.
    """
    remove(root / str(step) / MANIFEST)
    between()
    remove_tree(root / str(step))


def restore_subtree(
    workdir: epath.PathLike,
    step: int | None,
    path_prefixes: Collection[str],
    target: Any = None,
    report: Callable[[str], None] = print,
) -> tuple[int, Any, dict[str, Any]]:
    """Reads a part of another run's checkpoint, such as `params/encoder`, or parameters without optimizer state.

    Only reads: a damaged step is reported and passed over, not set aside, as the folder may belong to a live run.

    Args:
        workdir: folder of the run that wrote the checkpoint.
        step: None or -1 for the newest step that verifies.
        path_prefixes: whole path components, as `params/encoder`; each must name at least one array.
        target: pytree of `jax.ShapeDtypeStruct` with shardings, with the stored names below the prefixes; None
            for nested dicts of numpy arrays.
        report: receives messages for the user.

    Returns:
        (step, arrays, metadata): `arrays` shaped like `target`, or nested dicts that start at the root of the stored
        state; `metadata` as of `run_metadata`.

    Raises:
        CheckpointError: if there is no valid checkpoint, or the named step is absent or damaged.
        ValueError: if a prefix names nothing, or names, shapes or dtypes do not fit.
    """
    folder = valid_step(workdir, step, report)
    arrays = read_manifest(folder)["arrays"]
    stored: dict[str, Any] = {}
    for prefix in path_prefixes:
        found = {name: value for name, value in arrays.items() if f"{name}/".startswith(f"{prefix.strip('/')}/")}
        if not found:
            tops = sorted({"/".join(name.split("/")[:2]) for name in arrays})
            raise ValueError(f"{folder}: no arrays under {prefix!r}; there are {', '.join(tops)}")
        stored.update(found)
    if target is None:
        wanted: dict[str, Any] = {name: np.empty(v["shape"], jnp.dtype(v["dtype"])) for name, v in stored.items()}
    else:
        wanted = _named_leaves(target)
        _check_arrays(stored, wanted, folder)
    restored = read_arrays(folder, wanted)
    return int(folder.name), restored if target is None else _rebuild(target, restored), read_metadata(folder)


def valid_step(workdir: epath.PathLike, step: int | None, report: Callable[[str], None] = print) -> epath.Path:
    """The folder of a step whose digests have just been verified; arguments and errors as of `restore_subtree`."""
    root = checkpoint_root(workdir)
    if step is not None and step >= 0:
        return root / str(_named_step(root, step))
    chosen = _newest_valid(
        root, lambda damaged, fault: report(f"{root}: checkpoint {damaged} is damaged, passed over: {fault}")
    )
    if chosen is None:
        raise CheckpointError(f"{root}: no complete checkpoint; train first, or name another workdir")
    return root / str(chosen)


def read_arrays(folder: epath.Path, wanted: Mapping[str, Any]) -> dict[str, Any]:
    """Reads arrays of a step, and no others, as nested dicts.

    Args:
        folder: of the step, from `valid_step`.
        wanted: by stored name; numpy arrays of the stored shape and dtype give such, `jax.ShapeDtypeStruct` jax arrays.
    """
    item, restore_args = _restore_plan(wanted)
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
        return reader.restore(folder / "state", args=ocp.args.PyTreeRestore(
            item=item, restore_args=restore_args, partial_restore=True
        ))  # fmt: skip


def read_metadata(folder: epath.Path) -> dict[str, Any]:
    """What `run_metadata` said when the step was saved."""
    with ocp.Checkpointer(ocp.JsonCheckpointHandler()) as reader:
        return reader.restore(folder / "metadata", args=ocp.args.JsonRestore())


def run_metadata(config: Config, data_identity: Mapping[str, Any]) -> dict[str, Any]:
    """What is stored beside the arrays: configuration, its hash, what its data were, versions."""
    return {
        "data": dict(data_identity),
        "config": to_dict(config),
        "config_hash": config_hash(config),
        "program_version": __version__,
        "versions": {
            "python": platform.python_version(),
            **{name: importlib.metadata.version(name) for name in _LIBRARIES},
        },
    }


def check_config(
    stored: Mapping[str, Any], current: Mapping[str, Any], where: str, may_change: Sequence[str] = FREE_FIELDS
) -> list[str]:
    """Compares a checkpoint's configuration with the current one.

    Returns:
        Differences in fields (or sections) that may change, to be shown, as `path: old -> new`.

    Raises:
        ValueError: listing every other difference.
    """
    changed = differences(stored, current)
    free = [line for line in changed if _is_within(line.partition(":")[0], may_change)]
    binding = [line for line in changed if line not in free]
    if binding:
        mixture_alone = all(_is_within(line.partition(":")[0], MIXTURE_FIELDS) for line in binding)
        or_change = "; or go on with the changed mixture by --change-mixture" if mixture_alone else ""
        raise ValueError(
            f"{where} was written with another config:\n" + "".join(f"  - {line}\n" for line in binding)
            + "restore these fields to continue that run; else use a new --workdir (and init_from its weights)"
            + or_change
        )  # fmt: skip
    return free


def check_data(
    stored: Mapping[str, Any], current: Mapping[str, Any], where: str, mixture_changed: bool = False
) -> None:
    """Compares what a checkpoint's data were with what lies at the same paths now; an unknown identity fits all.

    With `mixture_changed`, sources may be new or gone; one that both have must hold the same.

    Raises:
        ValueError: naming the tokenizer and the sources that hold something else.
    """
    if not stored or not current:
        return
    if mixture_changed:
        both = stored["sources"].keys() & current["sources"].keys()
        stored, current = ({**data, "sources": {name: data["sources"][name] for name in both}}
                           for data in (stored, current))  # fmt: skip
    changed = differences(stored, current)
    if changed:
        raise ValueError(
            f"{where} was trained on other data than its paths hold now:\n"
            + "".join(f"  - {line}\n" for line in changed)
            + "put the data back, or train anew in a new --workdir"
        )  # fmt: skip


def _is_within(field: str, sections: Sequence[str]) -> bool:
    return any(field == section or field.startswith(f"{section}.") for section in sections)


def _kill_point(point: str, step: int) -> None:
    """Ends this process as kill -9 would, if UNIHETERO_KILL_AT is `<point>:<step>`. For tests of resuming only.

    Points: before_save, during_save (arrays handed to Orbax), after_orbax_commit, before_manifest (files hashed),
    during_retention (the old step's manifest is gone, its arrays are not).
    """
    if os.environ.get("UNIHETERO_KILL_AT") == f"{point}:{step}":
        os.kill(os.getpid(), signal.SIGKILL)


def checkpoint_root(workdir: epath.PathLike) -> epath.Path:
    """Where the checkpoints of a run are."""
    path = to_path(workdir)
    # Orbax refuses relative paths.
    return (path.absolute() if is_local(path) else path) / "checkpoints"


def _save_failed(step: int, reason: str) -> SaveError:
    return SaveError(
        f"saving checkpoint {step} failed: {reason}; earlier checkpoints are untouched. "
        "If the disk is full, free space and start the same command again"
    )


def _newest_valid(root: epath.Path, on_damage: Callable[[int, str], None], digests: bool = True) -> int | None:
    """The newest step whose files all match their digests (or sizes); `on_damage` is told of each newer one.

    Raises:
        CheckpointError: if steps were completed but none is valid. To start over is the user's decision.
    """
    faults = []
    steps = json.loads(distributed.broadcast("steps", json.dumps(list_steps(root.parent))))
    for step in reversed(steps):
        fault = _verify_together(root / str(step), digests)
        if fault is None:
            return step
        on_damage(step, fault)
        faults.append(f"step {step}: {fault}")
    was_completed = file_exists(root / COMPLETED) or any(file_exists(path / DAMAGED) for path in list_folder(root))
    if faults or was_completed:
        listing = "".join(f"\n  - {fault}" for fault in faults)
        raise CheckpointError(
            f"{root}: checkpoints were written here but none is valid, and the run will not silently start again at "
            f"step 0.{listing}\nRestore the folder from a copy, or start over with a new --workdir"
        )
    return None


def _verify_together(folder: epath.Path, digests: bool) -> str | None:
    """`verify` with the files divided over the processes; the same verdict on all of them."""
    share = (distributed.process_id(), distributed.num_processes())
    try:
        fault = verify(folder, share, digests) or ""
    except StorageError as error:  # says nothing of what is there: no process may take it for damage, or go on
        fault = f"{_NO_ANSWER}{error}"
    found = distributed.first_failure("verify", fault)
    if _NO_ANSWER in found:
        raise StorageError(found.replace(_NO_ANSWER, ""))
    return found or None


def _digest_together(folder: epath.Path) -> dict[str, Any]:
    """Digests of all files of a step that Orbax has committed, divided over the processes; process 0 gets them all."""
    # Process 0 commits, so what it lists is complete; another process may come here earlier.
    listed = json.loads(distributed.broadcast("committed", json.dumps(list_files(folder, ignored=(DAMAGED,)))))
    names = share_of(listed, (distributed.process_id(), distributed.num_processes()))
    try:
        # One thread: the training step needs the cores.
        own, failure = digest_files(folder, num_threads=1, names=names), ""
    except (OSError, StorageError) as error:
        own, failure = {}, str(error)
    parts = distributed.gather("digests", json.dumps(own))
    if failure := distributed.first_failure("digested", failure):
        raise StorageError(failure)
    return {name: entry for part in parts for name, entry in json.loads(part).items()}


def _named_step(root: epath.Path, step: int, digests: bool = True) -> int:
    steps = list_steps(root.parent)
    if step not in steps:
        raise CheckpointError(f"{root}: no complete checkpoint of step {step}; there are {steps or 'none'}")
    fault = _verify_together(root / str(step), digests)
    if fault is not None:
        raise CheckpointError(f"{root}: checkpoint {step} is damaged: {fault}; name another step of {steps}")
    return step


def _named_leaves(tree: Any) -> dict[str, Any]:
    """{"params/decoder/...": leaf}: names instead of container types, so that a stored state outlives refactorings."""
    named: dict[str, Any] = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        parts = [_key_name(key) for key in path]
        name = "/".join(parts)
        if not parts or any("/" in part for part in parts) or name in named:
            raise ValueError(f"state leaf {jax.tree_util.keystr(path)}: needs a unique path without '/' in its keys")
        named[name] = leaf
    return named


def _key_name(key: Any) -> str:
    match key:
        case jax.tree_util.DictKey() | jax.tree_util.FlattenedIndexKey():
            return str(key.key)
        case jax.tree_util.GetAttrKey():
            return key.name
        case jax.tree_util.SequenceKey():
            return str(key.idx)
    return str(key)


def _nest(named: Mapping[str, Any]) -> dict[str, Any]:
    nested: dict[str, Any] = {}
    for name, value in named.items():
        *parents, last = name.split("/")
        level = nested
        for parent in parents:
            level = level.setdefault(parent, {})
        level[last] = value
    return nested


def _dtype(leaf: Any) -> np.dtype:
    return np.dtype(leaf.dtype) if hasattr(leaf, "dtype") else np.asarray(leaf).dtype


def _check_arrays(stored: Mapping[str, Any], wanted: Mapping[str, Any], where: epath.Path) -> None:
    faults = [f"{name}: not in the checkpoint" for name in sorted(wanted.keys() - stored.keys())]
    faults += [f"{name}: in the checkpoint but not wanted" for name in sorted(stored.keys() - wanted.keys())]
    for name in sorted(wanted.keys() & stored.keys()):
        old = (tuple(stored[name]["shape"]), stored[name]["dtype"])
        new = (tuple(np.shape(wanted[name])), str(_dtype(wanted[name])))
        if old != new:
            faults.append(f"{name}: stored {old[1]}{list(old[0])}, expected {new[1]}{list(new[0])}")
    if faults:
        more = f"\n  ... and {len(faults) - 20} more" if len(faults) > 20 else ""
        raise ValueError(f"{where} does not fit:\n" + "\n".join(f"  - {fault}" for fault in faults[:20]) + more)


def _restore_plan(wanted: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Orbax's `item` and `restore_args` for named leaves: sharded jax arrays where the target is one, else numpy."""
    args: dict[str, Any] = {}
    for name, leaf in wanted.items():
        if isinstance(leaf, jax.Array | jax.ShapeDtypeStruct):
            sharding = leaf.sharding or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
            args[name] = ocp.ArrayRestoreArgs(sharding=sharding, global_shape=leaf.shape, dtype=leaf.dtype)
        else:
            args[name] = ocp.RestoreArgs(restore_type=np.ndarray)
    return _nest(wanted), _nest(args)


def _rebuild(target: Any, restored: Any) -> Any:
    """Puts restored leaves into the containers of `target`, Python scalars as such."""
    named = _named_leaves(restored)
    leaves = [
        named[name].item() if isinstance(wanted, bool | int | float) else named[name]
        for name, wanted in _named_leaves(target).items()
    ]
    return jax.tree.unflatten(jax.tree.structure(target), leaves)


@jax.jit
def _all_finite(arrays: list[jax.Array]) -> jax.Array:
    return jnp.stack([jnp.isfinite(array).all() for array in arrays]).all()


def _checked(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """The leaves that must be finite: floating-point parameters."""
    return {
        name: leaf
        for name, leaf in leaves.items()
        if name.split("/")[0] == "params" and jnp.issubdtype(_dtype(leaf), jnp.inexact)
    }


def _compile_finite_check(leaves: Mapping[str, Any]) -> concurrent.futures.Future[Any]:
    """Compiles the check in a thread, beside whatever starts now: half a second that the first save need not take."""
    params = [jax.ShapeDtypeStruct(np.shape(x), _dtype(x), sharding=getattr(x, "sharding", None))
              for x in _checked(leaves).values()]  # fmt: skip
    pool = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="compile-finite-check")
    compiled = pool.submit(lambda: _all_finite.lower(params).compile() if params else None)
    pool.shutdown(wait=False)
    return compiled


def _refuse_non_finite(step: int, leaves: Mapping[str, Any]) -> None:
    params = _checked(leaves)
    if params and not _all_finite(list(params.values())):
        bad = next(name for name, leaf in params.items() if not _all_finite([leaf]))
        raise CheckpointError(
            f"checkpoint {step}: {bad} holds NaN or infinity and is not saved; earlier checkpoints are untouched"
        )


def _position_to_json(position: Mapping[str, np.ndarray]) -> dict[str, Any]:
    arrays = {name: np.asarray(value) for name, value in position.items()}
    return {
        name: {"dtype": str(a.dtype), "shape": list(a.shape), "values": a.ravel().tolist()}
        for name, a in arrays.items()
    }


def _position_from_json(stored: Mapping[str, Any]) -> dict[str, np.ndarray]:
    return {name: np.array(v["values"], np.dtype(v["dtype"])).reshape(v["shape"]) for name, v in stored.items()}
