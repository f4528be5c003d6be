"""The watchdog: a step that takes too long ends the process, with all stacks and the name of who is to blame.

In a run of many processes a stalled one leaves the others waiting in a collective for ever. After the deadline each
process prints what it was doing and which processes have not been heard of, and exits with `EXIT_STALLED`; whatever
started the run may start it again.
"""

import faulthandler
import os
import sys
import threading
import time
from typing import Self

from unihetero_jax import distributed

EXIT_STALLED = 75
"""Exit code after a stall: EX_TEMPFAIL of sysexits.h, "try again"."""
MAX_POLL_S = 10.0
SILENT_S = 40.0
"""A process that gives no sign of life for so long, while a step is not finished, ends the others (our choice: four
missed signs, and under JAX's own limit, which ends them without a name)."""
ANSWER_S = 5.0
"""How long the coordination service may take to say who is alive."""


class Watchdog:
    """A context manager around the loop, which calls `beat` after every step.

    It takes effect with the first beat: what comes before (restoring, compiling) may take any time.

    Args:
        deadline_s: seconds between two beats; 0 for no watchdog.
    """

    def __init__(self, deadline_s: float):
        self._deadline_s = deadline_s
        self._silent_s = min(SILENT_S, deadline_s / 2)
        self._poll_s = min(MAX_POLL_S, deadline_s / 10)
        self._step = self._signs = 0
        self._last: float | None = None
        self._heard: dict[int, tuple[str, float]] = {}
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def beat(self, step: int) -> None:
        """The loop is alive, and this is the step that it has finished."""
        self._step, self._last = step, time.monotonic()

    def __enter__(self) -> Self:
        if self._deadline_s > 0:
            self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join(timeout=ANSWER_S)

    def _watch(self) -> None:
        while not self._stop.wait(self._poll_s):
            silent = ""
            if distributed.num_processes() > 1:
                self._give_sign()
                silent = self._who_is_silent()
            waited = 0.0 if self._last is None else time.monotonic() - self._last
            if waited > self._deadline_s or (silent and waited > self._silent_s / 2):
                self._end(waited, silent)

    def _give_sign(self) -> None:
        self._signs += 1
        key, sign = f"watchdog/{distributed.process_id()}", f"{self._signs} {self._step}"
        # In a thread of its own: a coordinator that is stopped never answers, and must not stop this one.
        threading.Thread(target=_try, args=(distributed.publish, key, sign), daemon=True).start()

    def _end(self, waited: float, silent: str) -> None:
        if not silent and self._heard:
            silent = "All processes are alive; the last steps that they finished: " + ", ".join(
                f"{process}: {sign.split()[1]}" for process, (sign, _) in sorted(self._heard.items())
            )
        print(
            f"\nwatchdog: no step was finished for {waited:.0f} s (train.step_deadline_s {self._deadline_s:.0f}) after "
            f"step {self._step}, here {distributed.named([distributed.process_id()])}. {silent}\n"
            "The stacks of all threads:",
            file=sys.stderr, flush=True,
        )  # fmt: skip
        faulthandler.dump_traceback(all_threads=True)
        sys.stderr.flush()
        if distributed.is_lead():
            # With this process the coordination service ends, and JAX would end the others before they have spoken.
            time.sleep(2 * self._poll_s)
        os._exit(EXIT_STALLED)

    def _who_is_silent(self) -> str:
        """The processes whose last sign of life is too long ago, by this process's own clock; empty: none."""
        found: list[dict[str, str]] = []
        asking = threading.Thread(target=_try, args=(lambda: found.append(distributed.published("watchdog")),))
        asking.daemon = True
        asking.start()
        asking.join(ANSWER_S)
        now = time.monotonic()
        if not found:
            last_answer = self._heard.setdefault(0, ("", now))[1]
            is_long = now - last_answer > self._silent_s
            return f"{distributed.named([0])}, the coordinator, does not answer." if is_long else ""
        signs = {int(key.rpartition("/")[2]): value for key, value in found[0].items()}
        for process in range(distributed.num_processes()):
            sign = signs.get(process, "")
            if self._heard.get(process, ("none", 0.0))[0] != sign:
                self._heard[process] = (sign, now)
        silent = [process for process, (_, heard) in self._heard.items() if now - heard > self._silent_s]
        return "; ".join(
            f"{distributed.named([process])} was not heard of for {now - self._heard[process][1]:.0f} s"
            for process in silent
        )


def _try(act, *arguments: str) -> None:
    try:
        act(*arguments)
    except Exception as error:  # the service is gone: the watchdog goes on without it
        print(f"watchdog: {type(error).__name__}: {error}".split("\n")[0], file=sys.stderr)
