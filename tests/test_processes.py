"""Real processes of one run, over `jax.distributed`: equal to one process, stopped together, and never silent."""

import json
import re
import signal
import socket
import threading

import pytest
from fork_server import ForkServer, codes, free_port, outputs, run_together

from unihetero_jax import distributed
from unihetero_jax.checkpoint import list_steps
from unihetero_jax.metrics import read_metrics
from unihetero_jax.watchdog import EXIT_STALLED

SIX_STEPS = {"train__num_steps": 6, "model__decoder__num_kv_heads": 2}
"""On a mesh of 2 x 2, whichever its axes are."""


@pytest.fixture(scope="module")
def servers(repo_root_of_module):
    with ForkServer(repo_root_of_module) as first, ForkServer(repo_root_of_module) as second:
        yield [first, second]


@pytest.fixture(scope="module")
def train_on(servers, tiny_flags):
    """`train_on(n, workdir, stops={process: ...})`: `train` on n processes."""

    def run(count, workdir, stops=None, changes=None, missing=(), own_changes=None):
        def command_of(process):
            mine = SIX_STEPS | {"mesh__data": 2, "mesh__fsdp": 2} | (changes or {})
            mine |= (own_changes or {}).get(process, {})
            return ["train", "--config=experiments/quickstart.py", f"--workdir={workdir}", *tiny_flags(**mine)]

        return run_together(servers, count, command_of, stops, missing)

    return run


@pytest.fixture(scope="module")
def evaluate_on(servers):
    """`evaluate_on(n, workdir, questions, flags)`: `evaluate` of the last step on n processes."""

    def run(count, workdir, questions, *flags):
        command = ["evaluate", f"--workdir={workdir}", f"--benchmarks={questions}", *flags]
        return run_together(servers, count, lambda _: command)

    return run


@pytest.fixture(scope="module")
def repo_root_of_module(request):
    return request.config.rootpath


@pytest.mark.slow
def test_two_processes_are_one_and_stop_together(train_on, tmp_path):
    """SIGTERM to one of two; both save the same step, and one process goes on from it as if it had been one always."""
    whole = train_on(1, tmp_path / "one")
    assert whole[0].code == 0, outputs(whole)
    expected = read_metrics(tmp_path / "one")

    stopped = train_on(2, tmp_path / "many", {1: {"signal_at": (signal.SIGTERM, 2)}})
    assert codes(stopped) == {0: 128 + signal.SIGTERM, 1: 128 + signal.SIGTERM}, outputs(stopped)
    assert "stopped by SIGTERM after step" in stopped[0].output
    assert "step 1/6" in stopped[0].output and "step 1/6" not in stopped[1].output, "process 0 alone writes"
    (last,) = set(list_steps(tmp_path / "many")) - {2}
    assert 3 <= last <= 4, "a vote takes one step"

    finished = train_on(1, tmp_path / "many")
    assert codes(finished) == {0: 0}, outputs(finished)
    assert f"going on from the checkpoint of step {last}" in finished[0].output
    assert_same_run(read_metrics(tmp_path / "many"), expected)


def assert_same_run(found, expected):
    """The same data to the bit, and the same losses but for the order of sums."""
    assert [line["step"] for line in found] == [line["step"] for line in expected]
    for ours, theirs in zip(found, expected, strict=True):
        assert ours["batch_hash"] == theirs["batch_hash"] and ours["totals"] == theirs["totals"]
        assert ours["loss"] == pytest.approx(theirs["loss"], abs=1e-5)
        assert ours["terms"]["text"]["count"] == theirs["terms"]["text"]["count"]
    for name, losses in expected[-1]["eval_loss"].items():
        assert found[-1]["eval_loss"][name] == pytest.approx(losses, abs=1e-5)


@pytest.mark.slow
def test_one_process_becomes_two(train_on, tmp_path):
    """And two meshes, and evaluation with rollouts at the end, which process 0 writes."""
    whole = train_on(1, tmp_path / "one")
    begun = train_on(1, tmp_path / "many", {0: {"signal_at": (signal.SIGTERM, 3)}}, {"mesh__data": 4, "mesh__fsdp": 1})
    assert codes(whole) == {0: 0} and codes(begun) == {0: 128 + signal.SIGTERM}, outputs(whole) + outputs(begun)
    drawing = {"eval__rollout_source": "generation", "eval__rollout_candidates": 3}
    finished = train_on(2, tmp_path / "many", changes=drawing)
    assert codes(finished) == {0: 0, 1: 0}, outputs(finished)
    assert_same_run(read_metrics(tmp_path / "many"), read_metrics(tmp_path / "one"))
    assert (tmp_path / "many" / "eval" / "rollout-6.json").exists()
    assert "rollout from captions" in finished[0].output and "rollout from captions" not in finished[1].output


@pytest.mark.slow
@pytest.mark.parametrize("stalled", [1, 0])
def test_a_stopped_process_ends_the_others_by_name(train_on, tmp_path, stalled):
    """SIGSTOP, which no program sees: the other one ends within the deadline, saying who; also if it is the lead."""
    alive = 1 - stalled
    finished = train_on(
        2, tmp_path, {stalled: {"signal_at": (signal.SIGSTOP, 3), "kill_after_s": None}},
        {"train__step_deadline_s": 5.0},
    )  # fmt: skip
    assert finished[alive].code == EXIT_STALLED, outputs(finished)
    text = finished[alive].output
    assert re.search(r"watchdog: no step was finished for \d+ s \(train.step_deadline_s 5\) after step", text)
    blamed = rf"process {stalled} \({socket.gethostname()}\)" + (" was not heard of for" if stalled else ", the coord")
    assert re.search(blamed, text), text[-3000:]
    assert "Thread 0x" in text and "train.py" in text, "the stacks of all threads"
    assert finished[stalled].code == -signal.SIGKILL


@pytest.mark.slow
def test_a_killed_process_ends_the_others(train_on, tmp_path):
    """In good time, with a reason; the run then goes on from its checkpoint."""
    finished = train_on(2, tmp_path, {1: {"signal_at": (signal.SIGKILL, 5)}})
    assert finished[1].code == -signal.SIGKILL
    assert finished[0].code not in (0, -signal.SIGKILL), outputs(finished)
    waited = finished[0].seconds - finished[1].seconds  # they were started together
    assert waited < 90, outputs(finished)  # before JAX's own limit, which names nobody
    again = train_on(2, tmp_path)
    assert codes(again) == {0: 0, 1: 0} and re.search("checkpoint of step [24]", again[0].output), outputs(again)


@pytest.mark.slow
def test_processes_that_differ_do_not_start(train_on, tmp_path):
    finished = train_on(2, tmp_path, own_changes={1: {"optimizer__learning_rate": 0.5}})
    assert codes(finished) == {0: 2, 1: 2}, outputs(finished)
    for end in finished.values():
        assert re.search(r"configuration: \w+ on process 0 \(.*\), \w+ on process 1", end.output), end.output
        assert "program:" not in end.output, "only what differs is listed"


@pytest.mark.slow
def test_heads_split_over_processes(train_on, tmp_path):
    """Both processes hold all rows: each row is counted once."""
    changes = {"mesh__data": 1, "mesh__fsdp": 1, "mesh__tensor": 2, "mesh__context": 2, "train__num_steps": 3}
    one, two = train_on(1, tmp_path / "1", changes=changes), train_on(2, tmp_path / "2", changes=changes)
    assert codes(one) | codes(two) == {0: 0, 1: 0}, outputs(one) + outputs(two)
    assert_same_run(read_metrics(tmp_path / "2"), read_metrics(tmp_path / "1"))


@pytest.mark.slow
def test_two_processes_evaluate_as_one(train_on, evaluate_on, tiny_world, tmp_path):
    """Each decodes its rows; process 0 writes what one process alone writes."""
    assert codes(train_on(1, tmp_path, changes={"train__num_steps": 2})) == {0: 0}
    results = {}
    for count in (1, 2):
        for path in (tmp_path / "eval").glob("questions*"):
            path.unlink()
        finished = evaluate_on(count, tmp_path, tiny_world / "questions.tsv")
        assert codes(finished) == dict.fromkeys(range(count), 0), outputs(finished)
        results[count] = json.loads((tmp_path / "eval" / "questions-2.json").read_text())
        answers = [json.loads(line) for line in (tmp_path / "eval" / "questions-2.jsonl").read_text().splitlines()]
        results[count, "log_probs"] = [answer["log_probs"] for answer in answers[1:]]
    assert results[1]["items"] == results[2]["items"] and results[1]["predictions"] == results[2]["predictions"]
    for one, two in zip(results[1, "log_probs"], results[2, "log_probs"], strict=True):
        assert one == pytest.approx(two, abs=1e-4)


@pytest.mark.slow
def test_two_processes_say_what_one_says(train_on, evaluate_on, tiny_world, tmp_path):
    assert codes(train_on(1, tmp_path, changes={"train__num_steps": 2})) == {0: 0}
    results = {}
    for count in (1, 2):
        for path in (tmp_path / "eval").glob("questions*"):
            path.unlink()
        flags = ["--mode=words", "--max-new-tokens=6"]
        finished = evaluate_on(count, tmp_path, tiny_world / "questions.tsv", *flags)
        assert codes(finished) == dict.fromkeys(range(count), 0), outputs(finished)
        results[count] = json.loads((tmp_path / "eval" / "questions-words-2.json").read_text())["predictions"]
    assert results[1] == results[2] and any(results[1].values())


@pytest.mark.slow
def test_a_damaged_step_is_passed_over_by_all(train_on, tmp_path):
    """Each process reads a share of the files; one that finds damage speaks for all."""
    assert codes(train_on(2, tmp_path, changes={"train__num_steps": 4})) == {0: 0, 1: 0}
    data = max((tmp_path / "checkpoints" / "4" / "state").rglob("d/*"), key=lambda path: path.stat().st_size)
    raw = bytearray(data.read_bytes())
    raw[len(raw) // 2] ^= 1
    data.write_bytes(raw)
    finished = train_on(2, tmp_path)
    assert codes(finished) == {0: 0, 1: 0}, outputs(finished)
    assert "checkpoint 4 is damaged" in finished[0].output
    assert "going on from the checkpoint of step 2" in finished[0].output
    assert (tmp_path / "checkpoints" / "damaged-4-0" / "damaged.json").exists()


def meet(port, count, processes, deadline_s, hosts=()):
    """What each of the processes learns at the start; threads stand for them."""
    found = {}

    def one(process):
        cluster = distributed.Cluster(f"localhost:{port}", count, process, hosts=hosts)
        try:
            found[process] = distributed._meet(cluster, deadline_s)
        except distributed.StartupError as error:
            found[process] = str(error)

    threads = [threading.Thread(target=one, args=(process,)) for process in processes]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def test_all_that_come_know_each_other():
    found = meet(free_port(), 3, [2, 0, 1], 20.0)
    assert found == dict.fromkeys(range(3), dict.fromkeys(range(3), socket.gethostname()))


def test_missing_processes_are_named_on_all_that_came():
    found = meet(free_port(), 4, [0, 2], 1.0, hosts=(socket.gethostname(), "tower-7.example"))
    for text in found.values():
        assert "2 of 4 processes did not come within 1 s: process 1, process 3, of hosts tower-7.example" in text
        assert f"here are process 0 ({socket.gethostname()}), process 2 (" in text


def test_a_missing_coordinator_is_named():
    port = free_port()
    found = meet(port, 2, [1], 0.5)
    assert f"process 0 did not answer at --coordinator_address localhost:{port} within 0" in found[1]


def test_strangers_at_the_door_are_no_processes():
    port = free_port()

    def knock():
        with socket.create_connection(("localhost", port), timeout=10) as stranger:
            stranger.sendall(b"GET / HTTP/1.1\r\n\r\n")

    found = {}
    waiting = threading.Thread(target=lambda: found.update(meet(port, 2, [0], 3.0)))
    waiting.start()
    for _ in range(50):
        try:
            knock()
            break
        except ConnectionRefusedError:
            threading.Event().wait(0.05)
    waiting.join()
    assert "1 of 2 processes did not come" in found[0]


def test_processes_by_flags(monkeypatch):
    for name in ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"):
        monkeypatch.delenv(name, raising=False)
    assert distributed.find_cluster() is None
    assert distributed.find_cluster("host:1", 1, 0) is None, "one process needs no set-up"
    assert distributed.find_cluster("host:1", 2, 1) == distributed.Cluster("host:1", 2, 1)
    with pytest.raises(ValueError, match="belong together"):
        distributed.find_cluster("host:1", 2)
    with pytest.raises(ValueError, match="--process_id 2"):
        distributed.find_cluster("host:1", 2, 2)
    with pytest.raises(ValueError, match="HOST:PORT"):
        distributed.find_cluster("host", 2, 1)
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "other:5")
    monkeypatch.setenv("JAX_NUM_PROCESSES", "3")
    monkeypatch.setenv("JAX_PROCESS_ID", "2")
    assert distributed.find_cluster() == distributed.Cluster("other:5", 3, 2)


def test_processes_by_slurm(monkeypatch):
    values = {
        "SLURM_JOB_ID": "4711", "SLURM_STEP_NODELIST": "node[03-04]", "SLURM_NTASKS": "8", "SLURM_PROCID": "5",
        "SLURM_LOCALID": "1", "SLURM_STEP_NUM_NODES": "2",
    }  # fmt: skip
    for name, value in values.items():
        monkeypatch.setenv(name, value)
    found = distributed.find_cluster()
    assert (found.num_processes, found.process_id, list(found.local_device_ids)) == (8, 5, [1])
    assert found.coordinator_address == f"node03:{4711 % 4096 + 61440}"
    monkeypatch.setenv("SLURM_NTASKS", "1")
    assert distributed.find_cluster() is None


def test_one_process_talks_to_itself():
    assert distributed.gather("a", "x") == ["x"] and distributed.broadcast("b", "y") == "y"
    distributed.agree("c", {"config": "1"})
    assert distributed.lead_first("d", lambda: 5) == 5
    assert distributed.is_lead() and distributed.num_processes() == 1
    assert json.loads(json.dumps(distributed.program_digest())) == distributed.program_digest()
