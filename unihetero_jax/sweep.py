"""`sweep`: plans runs, takes those that are missing one after another, and gathers what all found in one table.

A sweep file names one base experiment and yields its arms; a plain sweep needs none:

    BASE = "experiments/quickstart.py"

    def sweep(scale: str) -> Iterator[tuple[str, dict[str, Any]]]:
        for seed in range(3):
            yield "understanding", {"objective": "understanding", "seed": seed}

    PROTOCOL = {...}   # optional: what `verify-claims` asks of the table, fixed before the runs

    python -m unihetero_jax sweep --sweep=experiments/sweeps/x.py:smoke --workdir=runs/x
    python -m unihetero_jax sweep --config=experiments/quickstart.py --config.seed=0,1,2 --workdir=runs/y

A run lives in WORKDIR/runs/ARM-SEED-HASH, by the hash of its configuration, so a changed arm is another run. What is
finished is skipped, what was interrupted goes on, and two processes on one sweep never take the same run: each is
claimed by a lock with a heartbeat. A protocol is registered before the first run, with digest and commit of the file,
and void once the file has changed (`preregistration.py`). The table (results.parquet, as `verify-claims` reads it) is
made anew from the runs' own files after each run, so it is the same however often the sweep was stopped.
"""

import json
import os
import statistics
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from unihetero_jax.checkpoint import list_steps
from unihetero_jax.command_line import with_overrides
from unihetero_jax.config import config_hash, to_dict
from unihetero_jax.evaluate_run import ROLLOUT, ROLLOUT_ERROR, draws_images, is_judged
from unihetero_jax.evaluation.runner import stem_of
from unihetero_jax.metrics import announce, read_metrics
from unihetero_jax.reporting import has_collapsed
from unihetero_jax.sweep_plan import Planned, flat_fields, run_flops, text_of, trained_parameters
from unihetero_jax.train_run import run_training
from unihetero_jax.workdir import RunLock, WorkdirError

RESULTS = "results.parquet"
_SCHEMA = pa.schema([
    ("arm", pa.string()), ("seed", pa.int64()), ("metric", pa.string()), ("value", pa.float64()),
    ("run", pa.string()), ("config_hash", pa.string()), ("step", pa.int64()),
])  # fmt: skip


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
    rollouts = {ROLLOUT: draws_images(one.config), ROLLOUT_ERROR: is_judged(one.config)}
    names = [*one.config.eval.benchmarks, *(name for name, is_measured in rollouts.items() if is_measured)]
    results = [_result(one, folder, name, replicate) for name in names for replicate in range(len(one.seeds))]
    return one.config.train.num_steps in list_steps(folder) and all(path.exists() for path in results)


def _result(one: Planned, folder: Path, name: str, replicate: int) -> Path:
    return folder / "eval" / f"{stem_of(name, one.config.train.num_steps, replicate=replicate)}.json"


# ---------------------------------------------------------------- the table


def write_table(planned: Sequence[Planned], workdir: Path) -> None:
    """A row for each metric of each finished run, in the plan's order.

    Raises:
        ValueError: rollouts were judged by different judges, whose figures cannot be compared.
    """
    rows = [row for one in planned for row in measured(one, workdir / "runs" / one.name)]
    _check_one_judge(planned, workdir)
    path = workdir / RESULTS
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    pq.write_table(pa.Table.from_pylist(rows, _SCHEMA), temporary)
    temporary.replace(path)


def run_names(table: Path) -> set[str]:
    """Folders under runs/ of which a table holds figures."""
    return set(pq.read_table(table, columns=["run"])["run"].to_pylist())


def _check_one_judge(planned: Sequence[Planned], workdir: Path) -> None:
    by_judge: dict[str, str] = {}
    for one in planned:
        folder = workdir / "runs" / one.name
        if is_judged(one.config) and is_finished(one, folder):
            for replicate in range(len(one.seeds)):
                path = _result(one, folder, ROLLOUT_ERROR, replicate)
                by_judge.setdefault(json.loads(path.read_text())["judge"], str(path))
    if len(by_judge) > 1:
        found = ", ".join(f"{path} by {judge}" for judge, path in by_judge.items())
        raise ValueError(f"rollouts were judged by different judges: {found}; remove those files of one, and go on")


def measured(one: Planned, folder: Path) -> Iterator[dict[str, Any]]:
    """The rows of a run, for each of its replicates; none if it is not finished.

    Of the last step, by benchmark: `accuracy`, `answer_nll` (nats per token of the right answers) and, with
    `eval.without_image`, `answer_nll_gain`: the same less what it is without the picture. `held_out/SOURCE/TERM`: means
    on validation rows. `rollout_retrieval`, `rollout_alarm`; with a judge `rollout_error/free_running`,
    `/teacher_forced`, `/floor`, `/gap`, `/growth`, `/horizon` and `/num_positions`, and `leak`. `collapsed`: whether
    the encoder did by the alarms' thresholds (a bad rollout is an outcome, not a collapse); `pflop` of the run;
    `parameters`: those that it trains.
    """
    if not is_finished(one, folder):
        return
    line, hash_of_all = read_metrics(folder)[-1], config_hash(one.config)
    for replicate, seed in enumerate(one.seeds):
        about = {"arm": one.arm, "seed": seed, "run": one.name, "config_hash": hash_of_all}
        for metric, value in _values_of(one, folder, line, replicate).items():
            yield about | {"metric": metric, "value": float(value), "step": one.config.train.num_steps}


def _values_of(one: Planned, folder: Path, line: Mapping[str, Any], replicate: int) -> dict[str, float]:
    """{metric: value} of one model; `line` is the last of the run's metrics."""
    several = len(one.seeds) > 1
    values: dict[str, float] = {}
    for name in one.config.eval.benchmarks:
        overall = json.loads(_result(one, folder, name, replicate).read_text())["overall"]
        values[f"accuracy/{name}"] = overall["accuracy"]
        values[f"answer_nll/{name}"] = overall["answer_nll_per_token"]
        if (blind := overall.get("answer_nll_per_token_without_image")) is not None:
            values[f"answer_nll_gain/{name}"] = overall["answer_nll_per_token"] - blind
    for source, terms in (line.get("eval_loss") or {}).items():
        own = {term: value[replicate] if several else value for term, value in terms.items()}
        values |= {f"held_out/{source}/{term}": value for term, value in own.items()}
    collapsed = has_collapsed(one.config.diagnostics, line["terms"], replicate if several else None)
    if draws_images(one.config):
        found = json.loads(_result(one, folder, ROLLOUT, replicate).read_text())
        values |= {"rollout_retrieval": found["retrieval"], "rollout_alarm": float(bool(found["alarms"]))}
    if is_judged(one.config):
        values |= _cumulative_error(json.loads(_result(one, folder, ROLLOUT_ERROR, replicate).read_text()))
    values["collapsed"] = float(collapsed)
    values["pflop"] = run_flops(one.config) / 1e15 / len(one.seeds)
    values["parameters"] = trained_parameters(one.config)
    return values


def _cumulative_error(found: Mapping[str, Any]) -> dict[str, float]:
    """Without the intervals, which are those of the images of one model."""
    overall = {name: found["overall"][name][0] for name in ("free_running", "teacher_forced", "floor")}
    shape = {name: found[name][0] for name in ("gap", "growth", "horizon")}
    length = {"num_positions": len(found["curves"]["free_running"])}
    figures = {f"rollout_error/{name}": value for name, value in (overall | shape | length).items()}
    return figures | {"leak": found["leak"]["r_squared"]}


# ---------------------------------------------------------------- dry run


def describe(planned: Sequence[Planned], workdir: Path, power: str = "") -> str:
    """What is there and what is missing: samples, row positions and FLOPs of each run, hours at the pace of finished
    ones; then what can be seen with them (`power`).
    """
    lines = [f"{'run':<60}{'state':>10}{'rows':>12}{'tokens':>14}{'PFLOP':>10}"]
    paces, left, total = [], 0.0, 0.0
    for one in planned:
        folder, train = workdir / "runs" / one.name, one.config.train
        own, rows = run_flops(one.config), train.num_steps * train.global_batch_rows
        tokens = rows * one.config.data.row_tokens
        state = "finished" if is_finished(one, folder) else "started" if list_steps(folder) else "missing"
        lines.append(f"{one.name:<60}{state:>10}{rows:>12,}{tokens:>14,}{own / 1e15:>10.4g}")
        total += own
        if state == "finished":
            times = [line["step_time_s"] for line in read_metrics(folder) if "step_time_s" in line]
            paces += [own / (statistics.median(times) * train.num_steps)] if times else []
        else:
            left += own
    hours = f"{left / statistics.median(paces) / 3600:.2f} h" if paces else "unknown until a run is finished"
    lines.append(f"{len(planned)} runs, {total / 1e15:.4g} PFLOP; left {left / 1e15:.4g} PFLOP, {hours} of training")
    return "\n".join([*lines, *([power] if power else [])])


def override_lines(planned: Sequence[Planned], base: Mapping[str, Any], workdir: Path) -> list[str]:
    """Flags of `train` for each run that is not finished, a line each: for the arrays of experiments/launch.

    Raises:
        ValueError: a value holds a character that those files cannot hold.
    """
    plain = flat_fields(to_dict(with_overrides(base, [])))
    lines = []
    for one in planned:
        folder = workdir / "runs" / one.name
        if is_finished(one, folder):
            continue
        own = flat_fields(to_dict(one.config))
        changed = {path: text_of(value) for path, value in own.items() if plain.get(path) != value}
        unfit = [path for path, text in changed.items() if any(mark in text for mark in "'\"\\\n ")]
        if unfit:
            raise ValueError(f"{one.name}: {', '.join(unfit)} has blanks or quotes; overrides.txt cannot hold it")
        flags = [f"--config.{path}={text}" for path, text in changed.items()]
        lines.append(" ".join([f"--workdir={folder}", *flags]))
    return lines
