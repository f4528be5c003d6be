"""`sweep`: plans runs, takes those that are missing one after another, and gathers what all found in one table.

A sweep file names one base experiment and yields its arms; a plain sweep needs none:

    BASE = "experiments/quickstart.py"

    def sweep(scale: str) -> Iterator[tuple[str, dict[str, Any]]]:
        for seed in range(3):
            yield "understanding", {"objective": "understanding", "seed": seed}

    python -m unihetero_jax sweep --sweep=experiments/sweeps/x.py:smoke --workdir=runs/x
    python -m unihetero_jax sweep --config=experiments/quickstart.py --config.seed=0,1,2 --workdir=runs/y

A run lives in WORKDIR/runs/ARM-SEED-HASH, by the hash of its configuration, so a changed arm is another run. What is
finished is skipped, what was interrupted goes on, and two processes on one sweep never take the same run: each is
claimed by a lock with a heartbeat. The table (results.parquet, as `verify-claims` reads it) is made anew from the runs'
own files after each run, so it is the same however often the sweep was stopped.
"""

import dataclasses
import itertools
import json
import os
import statistics
import typing
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from unihetero_jax import flops
from unihetero_jax.checkpoint import list_steps
from unihetero_jax.command_line import load_experiment, load_module, with_overrides
from unihetero_jax.config import Config, config_hash, to_dict
from unihetero_jax.evaluate_run import draws_images
from unihetero_jax.metrics import announce, read_metrics
from unihetero_jax.train_run import run_training
from unihetero_jax.workdir import RunLock, WorkdirError

RESULTS = "results.parquet"
_SCHEMA = pa.schema([
    ("arm", pa.string()), ("seed", pa.int64()), ("metric", pa.string()), ("value", pa.float64()),
    ("run", pa.string()), ("config_hash", pa.string()), ("step", pa.int64()),
])  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Planned:
    """One run of a sweep."""

    arm: str
    config: Config

    @property
    def name(self) -> str:
        """Of its folder."""
        return f"{self.arm}-{self.config.seed}-{config_hash(self.config)}"


# ---------------------------------------------------------------- plans


def plan_file(flag: str) -> list[Planned]:
    """The runs of `--sweep=FILE[:scale]`.

    Raises:
        ValueError: the file has no BASE or no `sweep(scale)`, knows no such scale, or plans one run twice.
        ConfigError: an arm's fields are wrong; names the arm.
    """
    base, arms = _read_file(flag)
    values = load_experiment(base)
    return _checked([_planned(arm, values, overrides) for arm, overrides in arms(flag.partition(":")[2])], flag)


def base_of(flag: str) -> str:
    """The base experiment that a sweep file names."""
    return _read_file(flag)[0]


def _read_file(flag: str) -> tuple[str, Any]:
    path = Path(flag.partition(":")[0])
    if not path.is_file():
        raise ValueError(f"--sweep={flag}: no file {path}")
    module = load_module(path)
    base, arms = getattr(module, "BASE", None), getattr(module, "sweep", None)
    if not isinstance(base, str) or not callable(arms):
        raise ValueError(f"--sweep={flag}: {path} needs BASE = 'experiments/x.py' and a function sweep(scale)")
    return base, arms


def plan_product(experiment: str, overrides: Sequence[str]) -> list[Planned]:
    """Every combination of the overrides' values: `a.b=x,y` has two. A field that is a tuple takes its commas itself.

    Raises:
        ValueError: nothing varies.
        ConfigError: a field is unknown, or a value of another type.
    """
    values, axes = load_experiment(experiment), []
    for override in overrides:
        path, _, text = override.partition("=")
        found: Any = values
        for part in path.split("."):
            found = found.get(part) if isinstance(found, Mapping) else None
        is_list = isinstance(found, (tuple, list)) or "," not in text
        axes.append([override] if is_list else [f"{path}={one}" for one in text.split(",")])
    varying = [options for options in axes if len(options) > 1]
    if not varying:
        raise ValueError(
            "sweep: nothing varies; give a field several values, such as --config.seed=0,1,2, or --sweep=FILE"
        )
    planned = []
    for chosen in itertools.product(*axes):
        pairs = [one.partition("=") for one, options in zip(chosen, axes, strict=True) if len(options) > 1]
        arm = "-".join(f"{path.rpartition('.')[2]}={value}" for path, _, value in pairs if path != "seed")
        planned.append(Planned(arm or "run", with_overrides(values, chosen)))
    return _checked(planned, experiment)


def _planned(arm: str, values: Mapping[str, Any], overrides: Mapping[str, Any]) -> Planned:
    try:
        return Planned(arm, with_overrides(values, [f"{path}={_text(value)}" for path, value in overrides.items()]))
    except ValueError as error:
        raise ValueError(f"arm {arm}: {error}") from error


def _text(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, (tuple, list)) else str(value)


def _checked(planned: list[Planned], flag: str) -> list[Planned]:
    if not planned:
        raise ValueError(f"{flag}: plans no run")
    twice = [name for name, number in Counter(one.name for one in planned).items() if number > 1]
    if twice:
        raise ValueError(f"{flag}: plans {', '.join(twice)} twice; give them different names, seeds or fields")
    several = [one.name for one in planned if one.config.train.num_replicates > 1]
    if several:
        raise ValueError(
            f"{flag}: {several[0]} has train.num_replicates > 1; the table has one model a run, set it to 1"
        )
    return planned


# ---------------------------------------------------------------- runs


def execute(planned: Sequence[Planned], workdir: Path) -> Counter[str]:
    """Takes every run that is neither finished nor in another process's hands; writes the table after each.

    A run that fails is reported, counted, and tried again the next time; the others go on.

    Returns:
        How many were `finished` before, `trained` now, `elsewhere` (another process has them) or `failed`.
    """
    counts: Counter[str] = Counter()
    for number, one in enumerate(planned, start=1):
        folder = workdir / "runs" / one.name
        if is_finished(one, folder):
            counts["finished"] += 1
            continue
        claim = workdir / "claims" / one.name
        claim.mkdir(parents=True, exist_ok=True)
        try:
            lock = RunLock(claim, report=announce).acquire()
        except WorkdirError:
            announce(f"run {number} of {len(planned)}: {one.name} is being trained by another process")
            counts["elsewhere"] += 1
            continue
        try:
            if is_finished(one, folder):  # another process has done it since
                counts["finished"] += 1
                continue
            announce(f"run {number} of {len(planned)}: {one.name}")
            run_training(one.config, os.fspath(folder))
            counts["trained"] += 1
        except (ValueError, OSError) as error:
            announce(f"FAILED: {one.name}: {error}")
            counts["failed"] += 1
        finally:
            lock.release()
        write_table(planned, workdir)
    write_table(planned, workdir)
    return counts


def is_finished(one: Planned, folder: Path) -> bool:
    """Whether the run's last step is stored and evaluated, its rollouts included."""
    steps = one.config.train.num_steps
    names = [*one.config.eval.benchmarks, *(["rollout"] if draws_images(one.config) else [])]
    results = [folder / "eval" / f"{name}-{steps}.json" for name in names]
    return steps in list_steps(folder) and all(path.exists() for path in results)


# ---------------------------------------------------------------- the table


def write_table(planned: Sequence[Planned], workdir: Path) -> None:
    """A row for each metric of each finished run, in the plan's order."""
    rows = [row for one in planned for row in measured(one, workdir / "runs" / one.name)]
    path = workdir / RESULTS
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    pq.write_table(pa.Table.from_pylist(rows, _SCHEMA), temporary)
    temporary.replace(path)


def measured(one: Planned, folder: Path) -> Iterator[dict[str, Any]]:
    """The rows of a run; none if it is not finished.

    `accuracy/BENCHMARK` of the last step, `held_out/SOURCE/TERM` (means on validation rows; `text` is the negative
    log-likelihood of a supervised token), `rollout_retrieval`, and `collapsed`: whether an alarm was on at the end.
    """
    if not is_finished(one, folder):
        return
    step = one.config.train.num_steps
    line = read_metrics(folder)[-1]
    values: dict[str, float] = {}
    for name in one.config.eval.benchmarks:
        found = json.loads((folder / "eval" / f"{name}-{step}.json").read_text())
        values[f"accuracy/{name}"] = found["overall"]["accuracy"]
    for source, terms in (line.get("eval_loss") or {}).items():
        values |= {f"held_out/{source}/{term}": value for term, value in terms.items()}
    alarms, rollout = list(line["alarms"]), folder / "eval" / f"rollout-{step}.json"
    if rollout.exists():
        found = json.loads(rollout.read_text())
        values["rollout_retrieval"] = found["retrieval"]
        alarms += found["alarms"]
    values["collapsed"] = float(bool(alarms))
    about = {"arm": one.arm, "seed": one.config.seed, "run": one.name, "config_hash": config_hash(one.config)}
    for metric, value in values.items():
        yield about | {"metric": metric, "value": float(value), "step": step}


# ---------------------------------------------------------------- dry run


def describe(planned: Sequence[Planned], workdir: Path) -> str:
    """What is there and what is missing: row positions and FLOPs of each run, hours at the pace of finished ones."""
    lines = [f"{'run':<60}{'state':>10}{'tokens':>14}{'PFLOP':>10}"]
    paces, left, total = [], 0.0, 0.0
    for one in planned:
        folder, train = workdir / "runs" / one.name, one.config.train
        own = train.num_steps * train.num_replicates * flops.model_flops(
            one.config, flops.padded_work(one.config, train.global_batch_rows)
        )["total"]  # fmt: skip
        tokens = train.num_steps * train.global_batch_rows * one.config.data.row_tokens
        state = "finished" if is_finished(one, folder) else "started" if list_steps(folder) else "missing"
        lines.append(f"{one.name:<60}{state:>10}{tokens:>14,}{own / 1e15:>10.4g}")
        total += own
        if state == "finished":
            times = [line["step_time_s"] for line in read_metrics(folder) if "step_time_s" in line]
            paces += [own / (statistics.median(times) * train.num_steps)] if times else []
        else:
            left += own
    hours = f"{left / statistics.median(paces) / 3600:.2f} h" if paces else "unknown until a run is finished"
    lines.append(f"{len(planned)} runs, {total / 1e15:.4g} PFLOP; left {left / 1e15:.4g} PFLOP, {hours} of training")
    return "\n".join(lines)


def override_lines(planned: Sequence[Planned], base: Mapping[str, Any], workdir: Path) -> list[str]:
    """Flags of `train` for each run that is not finished, a line each: for the arrays of experiments/launch.

    Raises:
        ValueError: a value holds a character that those files cannot hold.
    """
    plain = _flat(to_dict(with_overrides(base, [])))
    lines = []
    for one in planned:
        folder = workdir / "runs" / one.name
        if is_finished(one, folder):
            continue
        own = _flat(to_dict(one.config))
        changed = {path: _text(value) for path, value in own.items() if plain.get(path) != value}
        unfit = [path for path, text in changed.items() if any(mark in text for mark in "'\"\\\n ")]
        if unfit:
            raise ValueError(f"{one.name}: {', '.join(unfit)} has blanks or quotes; overrides.txt cannot hold it")
        flags = [f"--config.{path}={text}" for path, text in changed.items()]
        lines.append(" ".join([f"--workdir={folder}", *flags]))
    return lines


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            found |= _flat(typing.cast(Mapping[str, Any], value), f"{prefix}{name}.")
        else:
            found[f"{prefix}{name}"] = value
    return found
