"""Runs the program in processes that may be killed, without paying its imports each time.

A server process imports everything once and forks for each command; a child starts its own jax backend. This file is
both sides: `ForkServer` in the tests, `main` in the server.
"""

import concurrent.futures
import dataclasses
import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

STOPPED_FOR_S = 15.0
"""A process that stops itself (SIGSTOP) is killed after this time."""


@dataclasses.dataclass(frozen=True)
class Finished:
    """How a command ended: its exit code (negative: the signal that killed it), what it printed, how long it ran."""

    code: int
    output: str
    seconds: float


class ForkServer:
    """A context manager; `run` gives one command to the server and waits for it."""

    def __init__(self, root: Path):
        self._root = root

    def __enter__(self) -> "ForkServer":
        environment = {**os.environ, "PYTHONPATH": str(self._root)}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.fork_server"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            cwd=self._root, env=environment,
        )  # fmt: skip
        return self

    def __exit__(self, *_: object) -> None:
        self._process.stdin.close()
        self._process.stdout.close()
        self._process.wait(timeout=60)

    def run(
        self,
        arguments: list[str],
        kill_at: str = "",
        signal_at: tuple[int, int] | None = None,
        kill_after_s: float | None = None,
        devices: int = 0,
    ) -> Finished:
        """Runs `python -m unihetero_jax <arguments>`.

        Args:
            arguments: of the command.
            kill_at: a point of `checkpoint._kill_point`, `<point>:<step>`.
            signal_at: (signal, step): the process gets this signal once the step is done.
            kill_after_s: kill -9 after so many seconds, whatever it does then.
            devices: simulated devices of the process, if not those of the tests.
        """
        request = {
            "arguments": arguments, "kill_at": kill_at, "signal_at": signal_at, "kill_after_s": kill_after_s,
            "devices": devices,
        }  # fmt: skip
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        assert answer, "the server of processes ended; its error is above"
        return Finished(**json.loads(answer))


def free_port() -> int:
    """Of this machine, that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        return probe.getsockname()[1]


def run_together(
    servers: Sequence[ForkServer],
    count: int,
    command_of: Callable[[int], list[str]],
    stops: Mapping[int, dict[str, Any]] | None = None,
    missing: Collection[int] = (),
) -> dict[int, Finished]:
    """A command on `count` processes of one run with 4 / count devices each, all at once; how each of them ended."""
    port = free_port()
    finished: dict[int, Finished] = {}

    def one(process: int) -> None:
        command = command_of(process)
        if count > 1:
            command += [f"--coordinator_address=localhost:{port}", f"--num_processes={count}"]
            command += [f"--process_id={process}", "--startup_deadline=100"]
        stop = {"kill_after_s": 400.0} | (stops or {}).get(process, {})
        finished[process] = servers[process].run(command, devices=4 // count, **stop)

    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        list(pool.map(one, [process for process in range(count) if process not in missing]))
    return finished


def codes(finished: Mapping[int, Finished]) -> dict[int, int]:
    """Exit codes by process."""
    return {process: end.code for process, end in finished.items()}


def outputs(finished: Mapping[int, Finished]) -> str:
    """What to say when it went wrong."""
    return "\n".join(f"--- process {process}\n{end.output[-4000:]}" for process, end in finished.items())


def main() -> None:
    """Serves requests from standard input, one JSON object per line, until it is closed."""
    sys.modules["torch"] = None  # the program needs none, and tensorboardX would spend seconds on importing it
    import tensorboardX  # noqa: F401

    from unihetero_jax import cli

    answers = os.fdopen(os.dup(1), "w")
    for line in sys.stdin:
        request = json.loads(line)
        with tempfile.TemporaryFile() as output:
            start = time.monotonic()
            pid = os.fork()
            if pid == 0:
                _child(cli, request, output.fileno())
            code = _wait(pid, request["kill_after_s"])
            output.seek(0)
            text = output.read().decode(errors="replace")
        answers.write(json.dumps({"code": code, "output": text, "seconds": time.monotonic() - start}) + "\n")
        answers.flush()


def _child(cli, request, output: int) -> None:
    code = 70
    try:
        os.dup2(output, 1)
        os.dup2(output, 2)
        os.environ["UNIHETERO_KILL_AT"] = request["kill_at"]
        if request["devices"]:
            count = f"--xla_force_host_platform_device_count={request['devices']}"
            os.environ["XLA_FLAGS"] = f"{os.environ['XLA_FLAGS']} {count}"  # the last one counts
        if request["signal_at"]:
            number, at_step = request["signal_at"]
            from unihetero_jax import train_run

            train = train_run.train

            def train_and_signal(config, workdir, hooks, *others):
                def send(step, state):
                    if step == at_step:
                        os.kill(os.getpid(), number)

                return train(config, workdir, [*hooks, send], *others)

            train_run.train = train_and_signal
        code = cli.main(request["arguments"])
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else 1
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _wait(pid: int, kill_after_s: float | None) -> int:
    if kill_after_s is not None:
        descriptor = os.pidfd_open(pid)
        ended = select.select([descriptor], [], [], kill_after_s)[0]
        os.close(descriptor)
        if not ended:
            os.kill(pid, signal.SIGKILL)  # not reaped yet, so the id is still its own
    _, status = os.waitpid(pid, os.WUNTRACED)
    if os.WIFSTOPPED(status):
        time.sleep(STOPPED_FOR_S)
        os.kill(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
    return os.waitstatus_to_exitcode(status)


if __name__ == "__main__":
    main()
