"""Fair side-by-side timing: one persistent process per arm, one computing at a time, rounds dealt in turn.

Machines drift (heat, neighbours, clocks), so arms that are timed one after the other are not comparable. Here every
round times every arm, an arm's figure is the median over rounds, and an arm whose median is far above its best was
disturbed and is rejected.

Protocol: a worker prints one JSON line of facts when it is warm, then answers each line `n` with the seconds that `n`
calls took.
"""

import dataclasses
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

REJECT_ABOVE = 1.25
"""Limit of median / best; beyond it the machine was not quiet."""


def serve(run: Callable[[int], float], facts: Mapping[str, Any]) -> None:
    """The worker's side: answers on the real stdout; whatever libraries print goes to stderr."""
    channel = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    print(json.dumps(dict(facts)), file=channel, flush=True)
    for line in sys.stdin:
        print(json.dumps(run(int(line))), file=channel, flush=True)


@dataclasses.dataclass(frozen=True)
class Timing:
    """Seconds per call of one arm, by round."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def best(self) -> float:
        return min(self.seconds)

    @property
    def is_rejected(self) -> bool:
        return self.median > REJECT_ABOVE * self.best

    def to_json(self) -> dict[str, Any]:
        """Figures for the results file."""
        return {
            "median_s": self.median, "best_s": self.best, "rounds_s": list(self.seconds), "rejected": self.is_rejected,
        }  # fmt: skip


class Worker:
    """One arm: a process that has compiled and warmed up, and waits."""

    def __init__(self, name: str, command: Sequence[str], calls_per_round: int):
        self.name = name
        self.calls_per_round = calls_per_round
        self._process = subprocess.Popen(
            [sys.executable, "-m", *command], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env=os.environ | {"JAX_PLATFORMS": "cpu"},
        )  # fmt: skip
        self.facts: dict[str, Any] = self._receive()

    def time(self, calls: int) -> float:
        """Seconds per call over `calls` calls."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{calls}\n")
        self._process.stdin.flush()
        return self._receive() / calls

    def close(self) -> None:
        """Ends the process."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(timeout=60)

    def _receive(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(
                f"benchmark arm {self.name} ended with status {self._process.wait()}; its output is above"
            )
        return json.loads(line)


def interleaved(workers: Sequence[Worker], rounds: int, report: Callable[[str], None]) -> dict[str, Timing]:
    """Times all workers in turn, `rounds` times. The order is reversed every other round, so no arm is always first."""
    seconds: dict[str, list[float]] = {worker.name: [] for worker in workers}
    for number in range(rounds):
        for worker in workers if number % 2 == 0 else reversed(workers):
            seconds[worker.name].append(worker.time(worker.calls_per_round))
        report(f"round {number + 1}/{rounds}, load average {os.getloadavg()[0]:.2f}")
    return {name: Timing(tuple(values)) for name, values in seconds.items()}
