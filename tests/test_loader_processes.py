"""The stream on real `jax.distributed` processes: the same batch hashes on any number of them and after any stop."""

import json
import os
import random
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from experiments import base
from tests.test_mixture import WORDS, make_records, write_source
from unihetero_jax.config import to_dict
from unihetero_jax.config_reading import from_config_dict
from unihetero_jax.data.tokenizer import train_tokenizer

ROOT = Path(__file__).resolve().parent.parent
NUM_DEVICES, NUM_STEPS = 4, 200
TIMEOUT_S = 240


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    root = tmp_path_factory.mktemp("mixture")
    tokenizer = train_tokenizer((" ".join(WORDS) + f" {i}" for i in range(50)), 320, root / "tokenizer")
    for name, count in (("a", 300), ("b", 70)):
        write_source(root / name, name, tokenizer, {"train": make_records(name, count), "val": []})
    values = base.get_config()
    values.data.sources = {
        name: {"path": str(root / name), "weight": weight, "augment": "mirror_shift"}
        for name, weight in (("a", 3.0), ("b", 1.0))
    }
    values.data.update(
        tokenizer=str(root / "tokenizer"), row_tokens=160, row_patches=144, image_min_patches=4, window_size=40,
        num_data_shards=8,
    )  # fmt: skip
    values.train.global_batch_rows = 8
    values.mesh.data = NUM_DEVICES
    return to_dict(from_config_dict(values))


def free_port():
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


def load(folder, config, processes, last=NUM_STEPS, threads=1, kill_after_steps=0):
    """Runs processes over `folder` until step `last`, or kills all of them once so many steps more are reported."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    devices = f"--xla_force_host_platform_device_count={NUM_DEVICES // processes}"
    environment = {**os.environ, "XLA_FLAGS": devices, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    started, port = len(hashes(folder)), free_port()
    running = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.loader_process", str(folder), f"--process={number}",
             f"--processes={processes}", f"--port={port}", f"--last={last}", f"--threads={threads}"],
            cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for number in range(processes)
    ]  # fmt: skip
    if kill_after_steps:
        until = time.monotonic() + TIMEOUT_S
        while len(hashes(folder)) < started + kill_after_steps and time.monotonic() < until:
            time.sleep(0.005)
        for process in running:
            process.kill()
    outputs = [process.communicate(timeout=TIMEOUT_S)[0] for process in running]
    if not kill_after_steps:
        assert [process.returncode for process in running] == [0] * processes, outputs


def hashes(folder):
    """(step, hash) in the order reported; a line torn by a kill is left out."""
    path = folder / "hashes.jsonl"
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    return [(entry["step"], entry["hash"]) for entry in map(json.loads, lines)]


@pytest.fixture(scope="module")
def expected(config, tmp_path_factory):
    """The hashes of one process with one reader thread."""
    folder = tmp_path_factory.mktemp("one")
    load(folder, config, processes=1)
    found = hashes(folder)
    assert [step for step, _ in found] == list(range(1, NUM_STEPS + 1))
    assert len({value for _, value in found}) == NUM_STEPS
    return dict(found)


@pytest.mark.slow
@pytest.mark.parametrize(("processes", "threads"), [(1, 4), (1, 16), (2, 1), (4, 4)])
def test_hashes_do_not_depend_on_processes_or_threads(config, expected, tmp_path, processes, threads):
    load(tmp_path / "run", config, processes, threads=threads)
    assert dict(hashes(tmp_path / "run")) == expected


@pytest.mark.slow
def test_hashes_do_not_depend_on_kills_and_restarts_on_other_counts(config, expected, tmp_path):
    """1 -> 4 -> 2 processes, ended and killed at random steps, then to the end."""
    rng, folder = random.Random(0), tmp_path / "run"
    first = rng.randrange(20, 60)
    load(folder, config, processes=1, last=first)
    load(folder, config, processes=4, kill_after_steps=rng.randrange(15, 40))
    load(folder, config, processes=2, kill_after_steps=rng.randrange(15, 40))
    load(folder, config, processes=2)
    found = hashes(folder)
    assert len(found) > NUM_STEPS, "the kills took steps back"
    assert {step for step, _ in found} == set(expected)
    assert all(expected[step] == value for step, value in found)
