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
        self._poll_s = min(MAX_POLL_S, deadline_s / 10)
        self._step = 0
        self._last: float | None = None
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
            if distributed.num_processes() > 1:
                self._publish()
            if self._last is not None and time.monotonic() - self._last > self._deadline_s:
                self._end()

    def _publish(self) -> None:
        state = f"{time.time()} {self._step}"
        key = f"watchdog/{distributed.process_id()}"
        # In a thread of its own: a coordinator that is stopped never answers, and must not stop this one.
        threading.Thread(target=_try, args=(distributed.publish, key, state), daemon=True).start()

    def _end(self) -> None:
        print(
            f"\nwatchdog: no step was finished for {self._deadline_s:.0f} s (train.step_deadline_s) after step "
            f"{self._step}, here {distributed.named([distributed.process_id()])}. {self._who_is_silent()}\n"
            "The stacks of all threads:",
            file=sys.stderr, flush=True,
        )  # fmt: skip
        faulthandler.dump_traceback(all_threads=True)
        sys.stderr.flush()
        if distributed.is_lead():
            # With this process the coordination service ends, and JAX would end the others before they have spoken.
            time.sleep(min(ANSWER_S, self._deadline_s))
        os._exit(EXIT_STALLED)

    def _who_is_silent(self) -> str:
        if distributed.num_processes() == 1:
            return ""
        found: list[dict[str, str]] = []
        asking = threading.Thread(target=_try, args=(lambda: found.append(distributed.published("watchdog")),))
        asking.daemon = True
        asking.start()
        asking.join(ANSWER_S)
        if not found:
            return f"{distributed.named([0])}, the coordinator, does not answer."
        states = {int(key.rpartition("/")[2]): value.split() for key, value in found[0].items()}
        silent, now = [], time.time()
        for process in range(distributed.num_processes()):
            heard = float(states[process][0]) if process in states else 0.0
            if now - heard > max(3 * self._poll_s, self._deadline_s / 2):
                ago = f"for {now - heard:.0f} s" if heard else "ever"
                silent.append(f"{distributed.named([process])} was not heard of {ago}")
        if silent:
            return "; ".join(silent) + "."
        steps = ", ".join(f"{process}: {states[process][1]}" for process in sorted(states))
        return f"All processes are alive; the last steps that they finished: {steps}."


def _try(act, *arguments: str) -> None:
    try:
        act(*arguments)
    except Exception as error:  # the service is gone: the watchdog goes on without it
        print(f"watchdog: {type(error).__name__}: {error}".split("\n")[0], file=sys.stderr)
