"""Several processes of one run: how they find each other, and what they tell each other beside the devices.

A run on many hosts hangs where one of them is missing, stalled or different, and says nothing. So before JAX is set up
the processes meet on a plain socket, where those that do not come are named; and what has to be agreed on (stop, damage
of a checkpoint, configuration, data) goes through the key-value store of JAX's coordination service, with a deadline,
and never through a collective of the devices.

Everything here is a no-op in a run of one process.
"""

import collections
import contextlib
import dataclasses
import hashlib
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

STARTUP_DEADLINE_S = 300.0
"""How long all processes may take to come (our choice: a node of a cluster boots in less)."""
MESSAGE_DEADLINE_S = 600.0
"""How long a process may take to reach an exchange (our choice: the hashing of a large checkpoint takes minutes)."""
HEARTBEAT_TIMEOUT_S = 120
"""After so long without a sign of life JAX ends the processes that are left, naming none: longer than the watchdog's
`SILENT_S`."""
SHUTDOWN_TIMEOUT_S = 60
"""How long a process that ends with an error waits for the others to end too."""
_RETRY_S = 0.2
_CONNECTION_S = 5.0
"""How long a connection to the start-up barrier may take to say who it is; others wait meanwhile."""
_DAY_S = 86_400.0
_BROADCASTS_KEPT = 8
"""Of one name: no process is so many calls behind another, as steps of the devices lie between them."""


class StartupError(RuntimeError):
    """Some processes of the run did not come; the message names them."""


class LostProcess(RuntimeError):
    """A process of the run did not reach an exchange; the message names it. Starting the run again may help."""


@dataclasses.dataclass(frozen=True)
class Cluster:
    """Where a process stands in its run. `hosts` are the names expected, where the environment tells; else empty."""

    coordinator_address: str
    num_processes: int
    process_id: int
    local_device_ids: Sequence[int] | None = None
    hosts: tuple[str, ...] = ()


_cluster: Cluster | None = None
_hosts: dict[int, str] = {}
_numbers: collections.Counter[str] = collections.Counter()
_numbers_lock = threading.Lock()


def find_cluster(address: str = "", num_processes: int = 0, process_id: int = -1) -> Cluster | None:
    """The run's processes: from these values if given, else as the environment says; None if there is one only.

    Read are SLURM's variables, those that GKE and Cloud TPU machines have, Open MPI's, and `JAX_COORDINATOR_ADDRESS`,
    `JAX_NUM_PROCESSES`, `JAX_PROCESS_ID`; but for the last three by JAX itself.

    Raises:
        ValueError: some but not all of the three are given, or they contradict each other.
    """
    address = address or os.environ.get("JAX_COORDINATOR_ADDRESS", "")
    num_processes = num_processes or int(os.environ.get("JAX_NUM_PROCESSES", 0))
    process_id = process_id if process_id >= 0 else int(os.environ.get("JAX_PROCESS_ID", -1))
    given = (bool(address), num_processes > 0, process_id >= 0)
    if any(given):
        if not all(given):
            raise ValueError(
                "--coordinator_address, --num_processes and --process_id belong together; give all three or none"
            )
        if not 0 <= process_id < num_processes:
            raise ValueError(f"--process_id {process_id}: must lie in 0 .. --num_processes - 1 = {num_processes - 1}")
        if not address.rpartition(":")[0] or not address.rpartition(":")[2].isdigit():
            raise ValueError(f"--coordinator_address {address}: give HOST:PORT of process 0")
        return Cluster(address, num_processes, process_id) if num_processes > 1 else None
    # JAX offers this only as a part of its set-up, which ends the process when another one is missing.
    from jax._src.clusters.cluster import ClusterEnv

    found = ClusterEnv.auto_detect_unset_distributed_params(None, None, None, None, None, int(STARTUP_DEADLINE_S))
    coordinator, count, process, devices = found
    if coordinator is None or count is None or process is None or count == 1:
        return None
    return Cluster(coordinator, count, process, devices, _expected_hosts())


def connect(cluster: Cluster | None, deadline_s: float = STARTUP_DEADLINE_S) -> None:
    """Waits for all processes, then sets JAX up for them. To be called before anything asks JAX for its devices.

    Raises:
        StartupError: naming those that did not come within the deadline.
    """
    global _cluster
    if cluster is None:
        return
    _hosts.update(_meet(cluster, deadline_s))
    # It would take SIGTERM for itself wherever we have no handler: an evaluation could not be stopped.
    jax.config.update("jax_enable_preemption_service", False)
    jax.distributed.initialize(
        cluster.coordinator_address, cluster.num_processes, cluster.process_id, cluster.local_device_ids,
        heartbeat_timeout_seconds=HEARTBEAT_TIMEOUT_S, shutdown_timeout_seconds=SHUTDOWN_TIMEOUT_S,
    )  # fmt: skip
    _cluster = cluster


def disconnect() -> None:
    """Leaves the run together with the other processes: the first to go must not look lost to the rest."""
    if _cluster is None:
        return
    try:
        jax.distributed.shutdown()
    except jax.errors.JaxRuntimeError as error:  # others did not come: each has its own reason and says it
        print(f"process {process_id()}: {str(error).splitlines()[0]}", file=sys.stderr)


def is_lead() -> bool:
    """Whether this process writes what the run writes: process 0."""
    return process_id() == 0


def process_id() -> int:
    """Number of this process in its run; asks no device."""
    return _cluster.process_id if _cluster else 0


def num_processes() -> int:
    """Processes of the run."""
    return _cluster.num_processes if _cluster else 1


def host_of(process: int) -> str:
    """Name of the host that a process runs on."""
    return _hosts.get(process, socket.gethostname() if process == process_id() else "unknown host")


def gather(name: str, text: str, deadline_s: float = MESSAGE_DEADLINE_S) -> list[str]:
    """Brings a text of every process to process 0, which gets them in order; the others get nothing.

    All processes call it, in the same order for one name; different threads use different names.

    Raises:
        LostProcess: on process 0, naming who did not send.
    """
    if _cluster is None:
        return [text]
    client, key = _client(), _next_key(name)
    client.key_value_set(f"{key}/{process_id()}", text)
    if not is_lead():
        return []
    end, texts, silent = time.monotonic() + deadline_s, [], []
    for process in range(num_processes()):
        left_ms = max(int((end - time.monotonic()) * 1000), 1)
        try:
            texts.append(client.blocking_key_value_get(f"{key}/{process}", left_ms))
        except jax.errors.JaxRuntimeError:
            silent.append(process)
    if silent:
        raise LostProcess(f"{name}: nothing came within {deadline_s:.0f} s from {named(silent)}")
    client.key_value_delete(f"{key}/")
    return texts


def broadcast(name: str, text: str | None = None, deadline_s: float = 2 * MESSAGE_DEADLINE_S) -> str:
    """Brings a text of process 0 to all. `text` is read there only.

    The deadline is longer than that of `gather`: process 0 may have to wait there, and then it can say for whom.

    Raises:
        LostProcess: process 0 did not send.
    """
    if _cluster is None:
        assert text is not None
        return text
    client, key = _client(), _next_key(name)
    if is_lead():
        assert text is not None
        client.key_value_set(key, text)
        if (old := _numbers[name] - _BROADCASTS_KEPT) > 0:
            client.key_value_delete(f"unihetero/{name}/{old}")
        return text
    try:
        return client.blocking_key_value_get(key, int(deadline_s * 1000))
    except jax.errors.JaxRuntimeError as error:
        raise LostProcess(f"{name}: nothing came within {deadline_s:.0f} s from {named([0])}") from error


def agree(name: str, values: Mapping[str, str]) -> None:
    """Compares values of all processes, which are to be the same.

    Raises:
        ValueError: on all of them, with what differs and where.
    """
    all_values = [json.loads(text) for text in gather(name, json.dumps(dict(values)))]
    faults = [
        f"  - {key}: {values.get(key, 'absent')} on {named([0])}, {other.get(key, 'absent')} on {named([process])}"
        for process, other in enumerate(all_values)
        for key in sorted(values.keys() | other.keys())
        if other.get(key) != values.get(key)
    ]
    verdict = broadcast(f"{name}-verdict", "\n".join(faults))
    if verdict:
        raise ValueError(f"the processes of the run differ in what has to be the same:\n{verdict}")


def lead_first(name: str, act: Callable[[], Any], others: Callable[[], Any] = lambda: None) -> Any:
    """`act()` on process 0; when it is done `others()` on the rest. A failure of the first stops all.

    Raises:
        ValueError: on the others, with the message of what failed.
    """
    if not is_lead():
        failure = broadcast(name, deadline_s=_DAY_S)  # the act may take long; JAX notices if process 0 is gone
        if failure:
            raise ValueError(f"process 0: {failure}")
        return others()
    try:
        result = act()
    except BaseException as error:
        broadcast(name, f"{type(error).__name__}: {error}")
        raise
    broadcast(name, "")
    return result


def program_digest() -> str:
    """8 hex digits of the program's own source: two checkouts on two hosts are no run."""
    state = hashlib.blake2b(digest_size=4)
    package = Path(__file__).parent
    for path in sorted(package.rglob("*.py")):
        state.update(f"{path.relative_to(package)}\0".encode() + path.read_bytes())
    return state.hexdigest()


def first_failure(name: str, own: str) -> str:
    """What went wrong on the first process on which something did, told to all of them; empty: nothing anywhere."""
    texts = gather(name, own)
    failures = [f"{named([process])}: {text}" if _cluster else text for process, text in enumerate(texts) if text]
    return broadcast(f"{name}-verdict", failures[0] if failures else "")


def publish(key: str, text: str) -> None:
    """Leaves a text where `published` finds it, in place of what was there."""
    _client().key_value_set(f"unihetero/{key}", text, allow_overwrite=True)


def published(folder: str) -> dict[str, str]:
    """What all processes have published below a folder."""
    return dict(_client().key_value_dir_get(f"unihetero/{folder}/"))


def named(processes: Sequence[int]) -> str:
    """`process 3 (host b), process 5 (host c)`."""
    return ", ".join(f"process {process} ({host_of(process)})" for process in processes)


def _client() -> Any:
    # JAX has no public way to its key-value store; Orbax takes the same one.
    from jax._src import distributed

    client = distributed.global_state.client
    assert client is not None, "connect() first"
    return client


def _next_key(name: str) -> str:
    with _numbers_lock:
        _numbers[name] += 1
        return f"unihetero/{name}/{_numbers[name]}"


def _expected_hosts() -> tuple[str, ...]:
    """Names of the hosts that the environment lists."""
    if names := os.environ.get("TPU_WORKER_HOSTNAMES"):
        return tuple(names.split(","))
    if nodes := os.environ.get("SLURM_STEP_NODELIST"):
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            listing = subprocess.run(
                ["scontrol", "show", "hostnames", nodes], capture_output=True, text=True, timeout=10, check=True
            )
            return tuple(listing.stdout.split())
    return ()


def _meet(cluster: Cluster, deadline_s: float) -> dict[int, str]:
    """Waits on a plain socket at the coordinator's address until all are there; host names by process.

    JAX's own set-up ends the process with a stack trace of C++ when one is missing, and names none.
    """
    end = time.monotonic() + deadline_s
    own = {"process": cluster.process_id, "host": socket.gethostname()}
    meet = _receive if cluster.process_id == 0 else _report
    return meet(cluster, own, end, deadline_s)


def _receive(cluster: Cluster, own: Mapping[str, Any], end: float, deadline_s: float) -> dict[int, str]:
    hosts: dict[int, str] = {0: own["host"]}
    waiting: list[socket.socket] = []
    port = int(cluster.coordinator_address.rpartition(":")[2])
    with contextlib.ExitStack() as cleanup:
        listener = cleanup.enter_context(socket.create_server(("", port), backlog=cluster.num_processes))
        while len(hosts) < cluster.num_processes and (left := end - time.monotonic()) > 0:
            listener.settimeout(left)
            with contextlib.suppress(TimeoutError):
                connection = cleanup.enter_context(listener.accept()[0])
                connection.settimeout(_CONNECTION_S)
                with contextlib.suppress(OSError, ValueError, KeyError, TypeError):  # a stranger, or one that is gone
                    hello = json.loads(connection.makefile().readline(1024))
                    if 0 <= (process := int(hello["process"])) < cluster.num_processes:
                        hosts[process] = str(hello["host"])
                        waiting.append(connection)
        fault = _missing(cluster, hosts, deadline_s)
        answer = json.dumps({"fault": fault, "hosts": hosts}) + "\n"
        for connection in waiting:
            with contextlib.suppress(OSError):  # it left; the exchange that follows will tell
                connection.sendall(answer.encode())
    if fault:
        raise StartupError(fault)
    return hosts


def _report(cluster: Cluster, own: Mapping[str, Any], end: float, deadline_s: float) -> dict[int, str]:
    host, _, port = cluster.coordinator_address.rpartition(":")
    while (left := end - time.monotonic()) > 0:
        try:
            with socket.create_connection((host, int(port)), timeout=left) as connection:
                connection.sendall((json.dumps(dict(own)) + "\n").encode())
                connection.settimeout(max(end - time.monotonic(), 1.0) + 5.0)  # process 0 decides
                answer = json.loads(connection.makefile().readline())
        except (OSError, ValueError):  # not up yet, or gone
            time.sleep(_RETRY_S)
            continue
        if answer["fault"]:
            raise StartupError(answer["fault"])
        return {int(process): name for process, name in answer["hosts"].items()}
    raise StartupError(
        f"process 0 did not answer at --coordinator_address {cluster.coordinator_address} within {deadline_s:.0f} s"
    )


def _missing(cluster: Cluster, hosts: Mapping[int, str], deadline_s: float) -> str:
    """Who did not come, or nothing."""
    missing = [process for process in range(cluster.num_processes) if process not in hosts]
    if not missing:
        return ""
    came = {name.partition(".")[0] for name in hosts.values()}
    silent_hosts = [host for host in cluster.hosts if host.partition(".")[0] not in came]
    of_hosts = f", of hosts {', '.join(silent_hosts)}" if silent_hosts else ""
    return (
        f"{len(missing)} of {cluster.num_processes} processes did not come within {deadline_s:.0f} s: "
        f"{', '.join(f'process {process}' for process in missing)}{of_hosts}; here are "
        + ", ".join(f"process {process} ({host})" for process, host in sorted(hosts.items()))
    )
