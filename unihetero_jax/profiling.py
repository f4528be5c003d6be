"""A trace of some training steps, which XProf and TensorBoard open: what the device did, and what it waited for."""

import contextlib
import os
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from etils import epath

from unihetero_jax.distributed import is_lead
from unihetero_jax.storage import StorageError, is_local, upload

FOLDER = "profile"


def parse_range(text: str, num_steps: int) -> tuple[int, int] | None:
    """First and last step of `--profile=START:STOP`, both traced; None for an empty text.

    Raises:
        ValueError: it is no range of the run's steps.
    """
    if not text:
        return None
    found = re.fullmatch(r"(\d+):(\d+)", text)
    first, last = (int(found[1]), int(found[2])) if found else (0, 0)
    if not 1 <= first <= last <= num_steps:
        raise ValueError(
            f"--profile={text}: give the first and the last step to trace, such as --profile=11:13; the run has steps "
            f"1 to {num_steps} (train.num_steps), and the first after a start is the one that compiles"
        )
    return first, last


class Profile:
    """Traces the steps of a range into `<workdir>/profile`. Process 0 does; a trace has the devices of its host.

    Args:
        steps: first and last step to trace, from `parse_range`; None: none.
        workdir: folder of the run; for one in a bucket the files are copied at the end.
        first_step: finished steps at the start; what is done already is not traced.
        report: receives messages for the user.
    """

    def __init__(
        self,
        steps: tuple[int, int] | None,
        workdir: epath.Path,
        first_step: int,
        report: Callable[[str], None],
    ):
        self._target, self._report = workdir / FOLDER, report
        self._first, self._last = steps or (0, -1)
        self._running = 0
        self._cleanup = contextlib.ExitStack()
        if steps and self._last <= first_step:
            report(f"--profile: steps {self._first} to {self._last} are done already, nothing is traced")
        self._first = max(self._first, first_step + 1)
        if not is_lead():
            self._last = -1

    def run(self, number: int, step: Callable[..., Any], *arguments: Any) -> Any:
        """Calls `step`, which is step `number`; its results, for which it waits where the trace ends with them."""
        if not self._first <= number <= self._last:
            return step(*arguments)
        if number == self._first:
            self._start()
        with jax.profiler.StepTraceAnnotation("train", step_num=number):
            self._running = number
            results = step(*arguments)
        if number == self._last:
            jax.block_until_ready(results)
            self.close()
        return results

    def close(self) -> None:
        """Ends a trace that is under way, and puts it where the run is."""
        if not self._running:
            return
        first, last, self._running, self._last = self._first, self._running, 0, -1
        with self._cleanup:
            jax.profiler.stop_trace()
            try:
                self._publish()
            except StorageError as error:  # no reason to stop training
                self._report(f"trace of steps {first} to {last} is lost: {error}")
                return
        self._report(f"trace of steps {first} to {last}: tensorboard --logdir={self._target} (or xprof) shows it")

    def _publish(self) -> None:
        if not is_local(self._target):
            for path in sorted(path for path in Path(self._folder).rglob("*") if path.is_file()):
                upload(path, self._target / path.relative_to(self._folder))

    def _start(self) -> None:
        self._folder = os.fspath(self._target)
        if not is_local(self._target):
            self._folder = self._cleanup.enter_context(tempfile.TemporaryDirectory(prefix="unihetero-"))
        jax.profiler.start_trace(self._folder)
