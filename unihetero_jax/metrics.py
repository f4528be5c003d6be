"""What a run reports: `metrics.jsonl`, TensorBoard files, interval means, speed, and one line of progress.

`metrics.jsonl` is the record: one JSON object per line with full float precision, flushed line by line. TensorBoard
files are a convenience that is derived from the same calls.
"""

import contextlib
import json
import math
import os
import sys
import time
import typing
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal, TextIO

import numpy as np
from clu import metrics as clu_metrics
from etils import epath
from tqdm import tqdm

from unihetero_jax.distributed import is_lead
from unihetero_jax.storage import read_bytes, to_path
from unihetero_jax.workdir import write_atomically

METRICS_NAME = "metrics.jsonl"
REPLACED_NAME = "metrics.replaced.jsonl"
Phase = Literal["restore", "compile", "input_wait", "step", "eval", "save"]
"""What a run does: restoring or initialising, compiling the first step, waiting for the loader, steps, validation, the
blocking part of a save."""


def announce(message: str) -> None:
    """Prints a message at once; of several processes only process 0 does.

    A reader that is gone (`| tee`, ended by the same Ctrl-C) is no reason to stop.
    """
    if not is_lead():
        return
    with contextlib.suppress(BrokenPipeError):
        print(message, flush=True)


class MetricsWriter:
    """Appends to `metrics.jsonl` and to TensorBoard files under `tensorboard/`. One process of a run makes it.

    Args:
        workdir: folder that can be appended to: `workdir.GrowingFiles` has one for a run in a bucket.
        report: receives messages for the user.
    """

    def __init__(self, workdir: epath.PathLike, report: Callable[[str], None] = print):
        self._workdir = epath.Path(workdir)
        self._report = report
        self._file: Any = None
        self._tensorboard: Any = None
        self._purge_step: int | None = None

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Writes one line `{"step": step, **values}`.

        Args:
            step: number of finished steps.
            values: numbers, strings, arrays (jax or numpy), lists and nested dicts of these. TensorBoard gets the
                numbers, with `/` between levels. NaN and infinities become the strings "NaN", "Infinity" and
                "-Infinity", as JSON has none; Python's `float` reads them back.
        """
        plain = {"step": int(step), **{key: _plain(value) for key, value in values.items()}}
        line = json.dumps(plain, allow_nan=False) + "\n"
        file = self._file or (self._workdir / METRICS_NAME).open("a")
        self._file = file
        file.write(line)
        file.flush()
        for tag, value in _scalars(values):
            self._writer().add_scalar(tag, value, step)

    def truncate_after(self, step: int) -> tuple[int, int]:
        """Prepares for going on from `step`: later lines move to `metrics.replaced.jsonl`, a torn last line is dropped.

        Later lines are first appended to the other file, then the shortened file replaces the old one at once, so a
        kill in between loses nothing; lines that are there from such a kill already are not appended twice.

        Returns:
            (lines moved, torn lines dropped); both are reported if there were any.
        """
        self.close()
        self._purge_step = step + 1
        path = self._workdir / METRICS_NAME
        if not path.exists():
            return 0, 0
        text = path.read_text()
        lines, num_torn = _complete_lines(text)
        kept, moved = [], []
        for line in lines:
            (moved if _step_of(line) > step else kept).append(line)
        if moved:
            self._append_replaced(moved)
        if "".join(kept) != text:  # a line that lost only its newline is completed
            write_atomically(path, "".join(kept))
        if moved or num_torn:
            self._report(
                f"{path}: {len(moved)} lines beyond step {step} moved to {REPLACED_NAME}, {num_torn} torn line dropped"
            )
        return len(moved), num_torn

    def flush(self) -> None:
        """Flushes TensorBoard's buffer; lines of `metrics.jsonl` never wait."""
        if self._tensorboard is not None:
            self._tensorboard.flush()

    def close(self) -> None:
        """Closes both outputs; a later `write` opens them again."""
        if self._file is not None:
            self._file.close()
            self._file = None
        if self._tensorboard is not None:
            self._tensorboard.close()
            self._tensorboard = None

    def _append_replaced(self, moved: list[str]) -> None:
        path, block = self._workdir / REPLACED_NAME, "".join(moved)
        before = path.read_text() if path.exists() else ""
        before = "".join(_complete_lines(before)[0])
        if not before.endswith(block):
            write_atomically(path, before + block)

    def _writer(self) -> Any:
        if self._tensorboard is None:
            # Imported here: it imports torch where that is installed, which costs seconds that evaluation need not pay.
            from tensorboardX import SummaryWriter

            self._tensorboard = SummaryWriter(os.fspath(self._workdir / "tensorboard"), purge_step=self._purge_step)
        return self._tensorboard


class IntervalMetrics:
    """Sums and counts of the steps since the last report, merged with `clu.metrics.Average` on the host in float64."""

    def __init__(self) -> None:
        self._averages: dict[str, clu_metrics.Average] = {}

    def add(self, sums: Mapping[str, Any], counts: Mapping[str, Any]) -> None:
        """Adds one step's terms; scalars, or arrays with one entry per replicate."""
        if sums.keys() != counts.keys():
            raise ValueError(f"sums have terms {sorted(sums)}, counts have {sorted(counts)}")
        average: Any = clu_metrics.Average  # a flax dataclass, whose fields a type checker does not see
        for name, total in sums.items():
            new: Any = average(total=np.asarray(total, np.float64), count=np.asarray(counts[name], np.float64))
            old = self._averages.get(name)
            self._averages[name] = new if old is None else old.merge(new)

    def get_state(self) -> dict[str, np.ndarray]:
        """{term: float64[2, ...]}, sums and counts since the last report."""
        return {name: np.stack([a.total, a.count]) for name, a in self._averages.items()}

    def set_state(self, state: Mapping[str, np.ndarray]) -> None:
        """Goes on from `get_state`, to the bit."""
        self._averages = {}
        self.add({name: value[0] for name, value in state.items()}, {name: value[1] for name, value in state.items()})

    def result(self) -> dict[str, dict[str, Any]]:
        """{term: {"sum", "count", "mean"}} since the last call, and starts anew. No count: a mean of NaN."""
        merged, self._averages = self._averages, {}
        with np.errstate(invalid="ignore", divide="ignore"):
            return {name: {"sum": a.total, "count": a.count, "mean": a.compute()} for name, a in merged.items()}


class StepTimer:
    """Speed since the last report, and where the time since the start of the process went.

    The loop runs ahead of the device, so `step` is the time in which it hands steps over or waits for their results; a
    wait for input may lie beside a step that is still computing.

    Args:
        clock: seconds, monotonic.
        started_s: the clock when the run began; None: when the process did, or its last run ended.
    """

    _last_end_s: float | None = None

    def __init__(self, clock: Callable[[], float] = time.perf_counter, started_s: float | None = None):
        self._clock = clock
        if started_s is None:
            last_end_s = StepTimer._last_end_s
            started_s = clock() - _process_age_s() if last_end_s is None else last_end_s
        self._run_start_s = started_s
        self._loop_start_s: float | None = None
        self._phases_s = dict.fromkeys(typing.get_args(Phase), 0.0)
        self._reset()

    @contextlib.contextmanager
    def phase(self, name: Phase) -> Iterator[None]:
        """Counts the time inside as one of the phases, which do not nest. `restore`, `compile` and `eval` are left out
        of all rates.
        """
        start = self._clock()
        if self._loop_start_s is None:
            self._loop_start_s = start
        try:
            yield
        finally:
            elapsed = self._clock() - start
            self._phases_s[name] += elapsed
            if name == "input_wait":
                self._waited_s += elapsed
            if name in ("restore", "compile", "eval"):
                self._start_s += elapsed

    def goodput(self) -> dict[str, float]:
        """Seconds of the run so far by phase; `goodput` is the share of the steps.

        `start_up_s` is what came before the first phase (imports, set-up), `other_s` what is in none: hooks,
        accounting, writing lines. The parts add up to `wall_s`.
        """
        now = self._clock()
        loop_start_s = now if self._loop_start_s is None else self._loop_start_s
        start_up = loop_start_s - self._run_start_s
        wall = now - self._run_start_s
        parts = {f"{name}_s": seconds for name, seconds in self._phases_s.items()}
        other = wall - start_up - sum(parts.values())
        share = self._phases_s["step"] / max(wall, 1e-9)
        return {"goodput": share, "wall_s": wall, "start_up_s": start_up, **parts, "other_s": other}

    def close(self) -> None:
        """The run is over: what follows in this process is another one's."""
        StepTimer._last_end_s = self._clock()

    def add_step(self) -> None:
        """Counts one finished step."""
        self._steps += 1

    def add_work(self, num_samples: int, num_tokens: int, model_flops: float) -> None:
        """Counts samples, real (unpadded) row positions, and model FLOPs of finished steps."""
        self._samples += num_samples
        self._tokens += num_tokens
        self._flops += model_flops

    def result(self) -> dict[str, float]:
        """Rates per second, mean step time in seconds and share of time spent waiting for input; starts anew."""
        elapsed = max(self._clock() - self._start_s, 1e-9)
        rates = {
            "step_time_s": elapsed / max(self._steps, 1),
            "steps_per_s": self._steps / elapsed,
            "samples_per_s": self._samples / elapsed,
            "tokens_per_s": self._tokens / elapsed,
            "model_flops_per_s": self._flops / elapsed,
            "input_wait_share": self._waited_s / elapsed,
        }
        self._reset()
        return rates

    def _reset(self) -> None:
        self._start_s = self._clock()
        self._waited_s = 0.0
        self._steps = self._samples = self._tokens = 0
        self._flops = 0.0


class Progress:
    """One line that shows step, losses, samples/s and time left; on a non-terminal one plain line per report.

    Args:
        num_steps: step at which the run ends.
        first_step: finished steps at the start (a resumed run).
        stream: where to; standard error by default, so that results on standard output stay clean.
    """

    def __init__(
        self,
        num_steps: int,
        first_step: int = 0,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._stream = sys.stderr if stream is None else stream
        self._num_steps, self._first_step, self._clock = num_steps, first_step, clock
        self._start_s = clock()
        self._bar = (
            tqdm(total=num_steps, initial=first_step, unit="step", dynamic_ncols=True, file=self._stream)
            if self._stream.isatty()
            else None
        )

    def update(self, step: int) -> None:
        """Moves the line on a terminal; call it after every step."""
        if self._bar is not None:
            self._bar.update(step - self._bar.n)

    def report(self, step: int, losses: Mapping[str, float], samples_per_s: float) -> None:
        """Shows losses and speed; call it once per log interval."""
        terms = "  ".join(f"{name} {float(value):.4f}" for name, value in losses.items())
        if self._bar is not None:
            self._bar.set_postfix_str(f"{terms}  {samples_per_s:.1f} samples/s", refresh=False)
            self._bar.update(step - self._bar.n)
            return
        self.print(f"step {step}/{self._num_steps}  {terms}  {samples_per_s:.1f} samples/s  {self._left(step)} left")

    def print(self, message: str) -> None:
        """Prints a message without tearing the progress line."""
        with contextlib.suppress(BrokenPipeError):  # see `announce`
            if self._bar is not None:
                self._bar.write(message, file=self._stream)
            else:
                print(message, file=self._stream, flush=True)

    def close(self) -> None:
        """Ends the line."""
        if self._bar is not None:
            self._bar.close()

    def _left(self, step: int) -> str:
        done = step - self._first_step
        if done <= 0:
            return "?"
        seconds = (self._clock() - self._start_s) / done * (self._num_steps - step)
        return tqdm.format_interval(seconds)


def _process_age_s() -> float:
    """Seconds since this process was started; where the system does not tell, 0."""
    try:
        with open("/proc/self/stat") as file:
            ticks = int(file.read().rpartition(")")[2].split()[19])
        return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    except (OSError, AttributeError):
        return 0.0


def keep_lines_up_to(path: epath.Path, step: int) -> None:
    """Drops lines of later steps, and a torn last one, from a file of JSON lines; a missing file stays missing."""
    if path.exists():
        text = path.read_text()
        kept = "".join(line for line in _complete_lines(text)[0] if _step_of(line) <= step)
        if kept != text:
            write_atomically(path, kept)


def read_metrics(workdir: epath.PathLike) -> list[dict[str, Any]]:
    """The lines of `metrics.jsonl` in order; a torn last line (the run is writing, or was killed) is left out."""
    lines, _ = _complete_lines(read_bytes(to_path(workdir) / METRICS_NAME).decode())
    return [json.loads(line) for line in lines]


def _complete_lines(text: str) -> tuple[list[str], int]:
    """Lines with their newline, and how many torn ones (0 or 1) were dropped at the end."""
    lines = text.splitlines(keepends=True)
    if not lines or (lines[-1].endswith("\n") and _parses(lines[-1])):
        return lines, 0
    if _parses(lines[-1]):
        return [*lines[:-1], lines[-1] + "\n"], 0
    return lines[:-1], 1


def _parses(line: str) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except json.JSONDecodeError:
        return False


def _step_of(line: str) -> float:
    """The step of a line; minus infinity for one that has none, which is kept."""
    return json.loads(line).get("step", -math.inf) if _parses(line) else -math.inf


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, str | bool | int) or value is None:
        return value
    if not isinstance(value, float):
        return _plain(np.asarray(value).tolist())
    if math.isfinite(value):
        return value
    return "NaN" if math.isnan(value) else ("Infinity" if value > 0 else "-Infinity")


def _scalars(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    for key, value in values.items():
        tag = f"{prefix}{key}"
        if isinstance(value, Mapping):
            yield from _scalars(value, f"{tag}/")
        elif value is not None and not isinstance(value, str):
            array = np.asarray(value)
            if array.dtype.kind not in "biuf":
                continue  # names such as sample ids belong to the JSON lines only
            for index, item in np.ndenumerate(array):
                yield "/".join([tag, *map(str, index)]), float(item)
