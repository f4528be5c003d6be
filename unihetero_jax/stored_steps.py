"""The checkpoints of a run, looked at from outside: listed, verified, compared, pruned. The command `checkpoints`."""

import dataclasses
import json
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import numpy as np
from etils import epath

from unihetero_jax.checkpoint import (
    DAMAGED,
    CheckpointError,
    checkpoint_root,
    list_steps,
    remove_step,
    restore_subtree,
    steps_to_keep,
)
from unihetero_jax.config_reading import differences
from unihetero_jax.integrity import MANIFEST, read_manifest, verify
from unihetero_jax.storage import file_exists, list_folder, read_bytes
from unihetero_jax.text_table import align
from unihetero_jax.workdir import RunLock


@dataclasses.dataclass(frozen=True)
class StoredStep:
    """A step folder.

    Attributes:
        step: number of finished steps.
        state: complete, damaged (found so by a restore), or unfinished (a save or a removal that was cut off).
        num_bytes, num_files, num_arrays: of a complete step, as its manifest states them; else 0.
        config_hash, program_version: of a complete step; else empty.
        fault: of a damaged step.
    """

    step: int
    state: str
    num_bytes: int = 0
    num_files: int = 0
    num_arrays: int = 0
    config_hash: str = ""
    program_version: str = ""
    fault: str = ""


@dataclasses.dataclass(frozen=True)
class GroupDifference:
    """How far the arrays of a group, such as `params/decoder`, are apart.

    Attributes:
        group: first two components of the arrays' names.
        num_arrays: in the group.
        num_equal: of them, bit for bit.
        largest: largest absolute difference of two elements, in float64.
        relative: L2 norm of the difference over that of the first step.
    """

    group: str
    num_arrays: int
    num_equal: int
    largest: float
    relative: float


def describe_steps(workdir: epath.PathLike) -> list[StoredStep]:
    """Every step folder of a run, ascending. Reads manifests only.

    Raises:
        CheckpointError: there is no checkpoint of any kind.
    """
    root = checkpoint_root(workdir)
    numbered = sorted((path for path in list_folder(root) if path.name.isdigit()), key=lambda path: int(path.name))
    if not numbered:
        raise CheckpointError(f"{root}: no checkpoints; train first, or correct --workdir")
    return [_describe(path) for path in numbered]


def _describe(folder: epath.Path) -> StoredStep:
    step = int(folder.name)
    if file_exists(folder / DAMAGED):
        return StoredStep(step, "damaged", fault=str(json.loads(read_bytes(folder / DAMAGED)).get("fault", "")))
    if not file_exists(folder / MANIFEST):
        return StoredStep(step, "unfinished")
    try:
        manifest = read_manifest(folder)
    except ValueError as error:
        return StoredStep(step, "damaged", fault=str(error))
    num_bytes = sum(entry["bytes"] for entry in manifest["files"].values())
    return StoredStep(
        step, "complete", num_bytes, len(manifest["files"]), len(manifest["arrays"]), manifest["config_hash"],
        manifest["program_version"],
    )  # fmt: skip


def verify_steps(workdir: epath.PathLike, steps: Sequence[int] = ()) -> dict[int, str | None]:
    """What is wrong with each complete step, or None; reads every byte and changes nothing.

    Args:
        workdir: folder of the run.
        steps: those to look at; all complete ones when empty.

    Raises:
        CheckpointError: a step is not complete or not there, or there is none.
    """
    complete = _complete(workdir, steps)
    return {step: verify(checkpoint_root(workdir) / str(step)) for step in complete}


def _complete(workdir: epath.PathLike, steps: Sequence[int]) -> list[int]:
    found = list_steps(workdir)
    missing = sorted(set(steps) - set(found))
    if missing or not found:
        raise CheckpointError(
            f"{checkpoint_root(workdir)}: no complete checkpoint"
            + (f" of step {', '.join(map(str, missing))}" if missing else "")
            + f"; there are {', '.join(map(str, found)) or 'none'}"
        )
    return sorted(set(steps)) or found


def compare_steps(workdir: epath.PathLike, first: int, second: int) -> tuple[list[GroupDifference], list[str]]:
    """How the parameters and averages of two steps differ, by group; and their configurations, as `path: old -> new`.

    Raises:
        CheckpointError: a step is absent or damaged.
    """
    _complete(workdir, [first, second])
    sides = [_parameters(workdir, step) for step in (first, second)]
    (old, old_metadata), (new, new_metadata) = sides
    groups: dict[str, list[str]] = {}
    for name in sorted(old.keys() | new.keys()):
        groups.setdefault("/".join(name.split("/")[:2]), []).append(name)
    found = [_group_difference(group, names, old, new) for group, names in groups.items()]
    return found, differences(old_metadata["config"], new_metadata["config"])


def _parameters(workdir: epath.PathLike, step: int) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    names = read_manifest(checkpoint_root(workdir) / str(step))["arrays"]
    prefixes = sorted({name.split("/")[0] for name in names} & {"params", "ema"})
    _, arrays, metadata = restore_subtree(workdir, step, prefixes)
    leaves = jax.tree_util.tree_flatten_with_path(arrays)[0]
    return {"/".join(str(key.key) for key in path): np.asarray(leaf) for path, leaf in leaves}, metadata


def _group_difference(
    group: str, names: Sequence[str], old: dict[str, np.ndarray], new: dict[str, np.ndarray]
) -> GroupDifference:
    num_equal, largest, squared, squared_old = 0, 0.0, 0.0, 0.0
    for name in names:
        a, b = old.get(name), new.get(name)
        if a is None or b is None or a.shape != b.shape:
            largest = squared = np.inf
            continue
        num_equal += a.dtype == b.dtype and a.tobytes() == b.tobytes()
        change = b.astype(np.float64) - a.astype(np.float64)
        largest = max(largest, float(np.abs(change).max(initial=0.0)))
        squared += float(np.square(change).sum())
        squared_old += float(np.square(a.astype(np.float64)).sum())
    relative = np.sqrt(squared / squared_old) if squared_old else (np.inf if squared else 0.0)
    return GroupDifference(group, len(names), int(num_equal), largest, float(relative))


def prune_steps(
    workdir: epath.PathLike,
    keep_last: int,
    keep_every: int,
    dry_run: bool = False,
    report: Callable[[str], None] = print,
) -> list[int]:
    """Removes complete steps that the policy does not keep; the newest one that verifies is always kept.

    Args:
        workdir: folder of a run that is not in use; its lock is held meanwhile.
        keep_last: newest steps to keep, at least 1.
        keep_every: steps divisible by this are kept; 0: none.
        dry_run: only say what would go.
        report: receives messages for the user.

    Returns:
        The steps that were, or would be, removed.

    Raises:
        CheckpointError: there is no complete step, or none that verifies: then nothing is removed.
        WorkdirError: a run uses the workdir.
    """
    if keep_last < 1 or keep_every < 0:
        raise CheckpointError(f"--keep-last {keep_last} must be positive, --keep-every {keep_every} not negative")
    _complete(workdir, ())  # before a lock is put into a folder that is no run
    with RunLock(workdir):
        root = checkpoint_root(workdir)
        steps = _complete(workdir, ())
        valid = next((step for step in reversed(steps) if _verifies(root, step, report)), None)
        if valid is None:
            raise CheckpointError(f"{root}: no checkpoint verifies, so none is removed")
        kept = steps_to_keep(steps, keep_last, keep_every) | {valid}
        gone = [step for step in steps if step not in kept]
        for step in gone:
            report(f"{root / str(step)}: {'would be removed' if dry_run else 'removed'}")
            if not dry_run:
                remove_step(root, step)
    return gone


def _verifies(root: epath.Path, step: int, report: Callable[[str], None]) -> bool:
    fault = verify(root / str(step))
    if fault:
        report(f"{root / str(step)} is damaged: {fault}")
    return fault is None


def format_steps(steps: Iterable[StoredStep]) -> str:
    """The table of `checkpoints list`."""
    rows = [("step", "state", "MB", "files", "arrays", "config", "program", "")]
    rows += [
        (
            str(s.step),
            s.state,
            f"{s.num_bytes / 1e6:,.1f}",
            str(s.num_files),
            str(s.num_arrays),
            s.config_hash,
            s.program_version,
            s.fault,
        )
        for s in steps
    ]
    return "\n".join(align(rows))


def format_differences(groups: Iterable[GroupDifference], config: Sequence[str]) -> str:
    """The table of `checkpoints diff`."""
    rows = [("group", "arrays", "equal", "largest", "relative")]
    rows += [(g.group, str(g.num_arrays), str(g.num_equal), f"{g.largest:.3g}", f"{g.relative:.3g}") for g in groups]
    lines = [*align(rows), *(f"config {line}" for line in config)]
    return "\n".join(lines if config else [*lines, "the configurations are equal"])
